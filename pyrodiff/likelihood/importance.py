r"""Importance-weighted bounds of the whole chain.

A chain :math:`x_{1:T}` drawn from q, given the datum, has the weight

.. math:: w = \frac{p(x_0, x_1, \dots, x_T)}{q(x_1, \dots, x_T \mid x_0)}, \qquad E\, w = p(x_0),

and K of them give bounds on :math:`\log p(x_0)`, Renyi's of order :math:`0 \le \alpha \le 1`:

.. math:: \mathcal L_K^\alpha = E\, \frac{1}{1 - \alpha} \log \frac1K \sum_{k=1}^K w_k^{1 - \alpha}.

:math:`\alpha = 0` is the IWAE bound, :math:`\alpha = 1` (the limit, the mean of log w) the ELBO. For :math:`\alpha < 1` the
bound rises with K towards :math:`\frac{1}{1 - \alpha} \log E\, w^{1 - \alpha} \le \log p(x_0)`, with equality at 0: the
logarithm is concave, so the bound of a set of weights is at least the mean of its parts' bounds.

How much it rises is up to the weights' spread. Along a diffusion chain the variance of log w falls with T and with the
model's error, and grows with the dimension; at some tens of nats squared all of K weights but one are as good as nothing. Two
figures tell: the effective number of chains, :math:`(\sum w)^2 / \sum w^2`, and Pareto's k, the tail index of w: its moments
exist below order 1 / k, so that from 0.5 on the variance is infinite and above 0.7 averages of any practical size mislead.

References:
    Importance Weighted Autoencoders (Burda et al., 2015), theorem 1. https://arxiv.org/abs/1509.00519
    Renyi Divergence Variational Inference (Li and Turner, 2016), section 4. https://arxiv.org/abs/1602.02311
    Pareto Smoothed Importance Sampling (Vehtari et al., 2024), sections 2 and 3. https://arxiv.org/abs/1507.02646
    A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang and Stephens, 2009), Technometrics 51.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import draws
from .._tensor import take_rows
from ..diffusion import GaussianDiffusion
from ..draws import Noise
from ..errors import OptionError
from .estimate import LogLikelihood, cautions, check, seeded

__all__ = ["curve", "effective_chains", "importance_weighted", "log_weights", "pareto_k", "renyi_bound"]

HEAVY = 0.7  # Pareto's k above which importance sampling fails in practice (Vehtari et al., 2024)
FEW = 0.1  # of the chains after the first: fewer effective ones than that are a collapse
ROUNDING = 1e-5  # of log w, nats: what varies less has no tail
TINY = 1e-280  # against 0 / 0
LEAST = 25  # weights whose upper fifth makes the five points that a tail takes


def importance_weighted(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    *,
    chains: int = 64,
    alpha: float = 0.0,
    repeats: int = 2,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> LogLikelihood:
    r"""The importance-weighted bound of ``chains`` chains per example and repeat; T network evaluations each.

    Memory: ``batch_size`` rows of the network's and of T numbers; with ``chains`` it grows by a float64 number per example.

    Args:
        diffusion: the model; its network runs in evaluation mode, without gradients.
        x0: data, ``[B, *event]``.
        chains: K.
        alpha: order of Renyi's bound, in [0, 1]; 0 is IWAE, 1 the ELBO.
        repeats: R, each of K chains of its own.
        seed: of the noise; the global generators are neither used nor changed.
        batch_size: chains per network call.
        progress: show a progress bar after two seconds.
        cond: passed to the network, a row per example, or values without batch dim for all.

    Returns:
        The bound; in its diagnostics ``log_weights`` ``[R, K, B]``, from which :func:`curve` has the bounds of fewer chains;
        ``effective_chains`` ``[B]``, averaged over repeats; ``pareto_k`` ``[B]``, of all R K weights (NaN below 25).

    Raises:
        OptionError, ShapeError, DataError: an argument outside its range.
    """
    check(diffusion, x0, repeats, seed, batch_size)
    if not isinstance(chains, int) or chains < 1:
        raise OptionError(f"chains={chains!r} is not an integer of at least 1")
    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha={alpha!r} is not in [0, 1]: below is no bound, and above a looser one than the ELBO")
    started, evaluations = time.perf_counter(), repeats * chains * len(x0) * diffusion.schedule.length
    bar = tqdm(
        total=evaluations, desc="chains", unit="eval", unit_scale=True, delay=2, disable=not progress, leave=False
    )
    with bar:
        weights = log_weights(diffusion, x0, repeats * chains, seeded(seed, x0), batch_size, bar.update, **cond)
    weights = weights.unflatten(0, (repeats, chains))
    effective, k = effective_chains(weights).mean(0), pareto_k(weights.flatten(0, 1))
    kind = "IWAE bound" if alpha == 0 else f"Renyi bound of order {alpha:g}"
    return LogLikelihood(
        method="iwae",
        meaning=f"lower bound in expectation ({kind} of {chains:,} chains)",
        unbiased=alpha == 0 or chains == 1,
        draws=renyi_bound(weights, alpha, 1),
        dims=diffusion.event_shape.numel(),
        network_evaluations=evaluations,
        seconds=time.perf_counter() - started,
        diagnostics={"log_weights": weights, "effective_chains": effective, "pareto_k": k},
        warnings=(*cautions(diffusion), *_collapse(effective, k, chains)),
    )


def log_weights(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    chains: int,
    noise: Noise = torch.randn_like,
    batch_size: int = 256,
    advance: Callable[[int], object] = lambda n: None,
    **cond: Tensor,
) -> Tensor:
    """The log w of independent chains: ``[K, B]``, nats, float64.

    Args:
        x0: ``[B, *event]``.
        chains: K.
        noise: called for x_T, then for x_{T-1}, ..., x_1, for each batch of chains.
        batch_size: chains per network call; an example's k-th chain is row k B + i.
        advance: called with the number of network evaluations just made.
        cond: passed to the network, a row per example.
    """
    batch, found = len(x0), []
    for part in (torch.arange(chains * batch, device=x0.device) % batch).split(batch_size):
        rows = take_rows(diffusion.net, cond, part, batch)
        terms = draws.chain(diffusion, x0[part], 1, noise, len(part), advance, **rows).terms
        found.append(-terms.log_ratio[0].sum(-1))
    return torch.cat(found).unflatten(0, (chains, batch))


def renyi_bound(log_weights: Tensor, alpha: float = 0.0, dim: int = 0) -> Tensor:
    """Renyi's bound of the K log-weights along ``dim``, ``[K, ...]`` to ``[...]``; nats."""
    if alpha == 1:
        return log_weights.mean(dim)
    order = 1 - alpha
    return (torch.logsumexp(order * log_weights, dim) - math.log(log_weights.shape[dim])) / order


def curve(log_weights: Tensor, alpha: float = 0.0) -> dict[int, Tensor]:
    """The bounds of fewer chains, from the same ones.

    K is halved while it is even, and then 1. The k chains of a group are disjoint from those of any other, so that the
    groups' bounds are independent, unbiased draws of the bound of k chains, and
    :meth:`Estimate.of <pyrodiff.elbo.Estimate.of>` has its standard errors. A group is a union of smaller ones: the means
    rise with k in every sample, not in expectation alone. (Averaging over all subsets of k, the U-statistic, varies less, but
    has no independent draws to tell its error from.)

    Args:
        log_weights: ``[R, K, B]``.
        alpha: order of Renyi's bound.

    Returns:
        k to draws ``[R K / k, B]``, nats, k increasing.
    """
    sizes = [log_weights.shape[1]]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    every = log_weights.flatten(0, 1)
    return {k: renyi_bound(every.unflatten(0, (-1, k)), alpha, 1) for k in sorted({*sizes, 1})}


def effective_chains(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the chains: ``[*repeats, K, B]`` to ``[*repeats, B]``, values in 1..K."""
    return (2 * torch.logsumexp(log_weights, -2) - torch.logsumexp(2 * log_weights, -2)).exp()


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""Pareto's k-hat of importance weights: the tail index of a generalised Pareto law fitted to the largest.

    Of S weights the largest :math:`\min(S / 5, 3 \sqrt S)`, less the next one, are fitted by Zhang and Stephens's posterior
    mean, which a weak prior (ten weights' worth) draws to 0.5.

    Args:
        log_weights: ``[S, B]``.

    Returns:
        float64 ``[B]``: NaN for S < 25; -inf where the largest weights are equal to 1e-5.
    """
    count = len(log_weights)
    tail = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    if count < LEAST:
        return log_weights.new_full(log_weights.shape[1:], math.nan, dtype=torch.float64)
    largest = log_weights.double().sort(0).values[-tail - 1 :]
    weights = (largest - largest[-1]).exp()
    x = weights[1:] - weights[0]  # increasing
    bounded = x[-1] < ROUNDING
    x = torch.where(bounded, 1.0, x)
    quartile = x[int(tail / 4 + 0.5) - 1].clamp(min=TINY)
    grid = 30 + math.isqrt(tail)
    spread = 1 - (grid / (torch.arange(grid, dtype=torch.float64, device=x.device) + 0.5)).sqrt()
    b = 1 / x[-1] + spread[:, None] / (3 * quartile)  # [grid, B]: minus k / sigma, below 1 / max
    k = torch.log1p(-b[:, None] * x).mean(1)
    log_likelihood = tail * ((-b / k).log() - k - 1)
    posterior = (log_likelihood.softmax(0) * b).sum(0)
    fitted = torch.log1p(-posterior * x).mean(0)
    shrunk = (tail * fitted + 5) / (tail + 10)
    return torch.where(bounded, -math.inf, shrunk)


def _collapse(effective: Tensor, k: Tensor, chains: int) -> list[str]:
    """Warnings, where more chains do not help."""
    heavy = k > HEAVY
    collapsed = heavy | (effective - 1 < FEW * (chains - 1))
    found = []
    if collapsed.any():
        found.append(
            f"weights have collapsed for {int(collapsed.sum())} of {len(collapsed)} examples (Pareto's k-hat above {HEAVY} for "
            f"{int(heavy.sum())}; median of the effective chains {float(effective.median()):.1f} of {chains:,}): the bound "
            "holds in expectation, but a few chains decide it, log p(x_0) may be far above, and the standard error understates"
        )
    if chains > 1 and k.isnan().all():
        found.append(f"Pareto's k-hat takes {LEAST} weights per example (chains x repeats): the tail is not known")
    return found
