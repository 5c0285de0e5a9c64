r"""Estimators of one bound, side by side: which KL, which states, which timesteps, at what variance and cost.

The bound is a sum of T + 1 terms (:mod:`pyrodiff.draws`). An estimator chooses

* a **path**: one chain of states per example; every state drawn on its own; or a few random timesteps, weighted by 1 / p(t);
* a **KL**: analytic, or from the log-ratio r = log q(x_s) - log p(x_s) of a draw x_s from q: k1 = r, k2 = r^2 / 2,
  k3 = exp(-r) - 1 + r. k1 and k3 are unbiased, k2 is not;
* what may reduce its variance: antithetic noise; a control variate.

**The control variate of the chain.** Along a chain, the sum N of k1 - KL has mean zero: at every step the analytic KL is the
expectation of the log-ratio given the chain so far. So KL + c N is unbiased for every constant c; c = 0 is the analytic
estimator, c = 1 the Monte Carlo one, and the best c is -cov(KL, N) / var(N). For states drawn on their own it is 0: there
KL and N are uncorrelated, and the analytic KL cannot be improved so (Rao-Blackwell).

References:
    Approximating KL Divergence (Schulman, 2020): k1, k2, k3. http://joschu.net/blog/kl-approx.html
    Variational Diffusion Models (Kingma et al., 2021), appendix I.1: low-discrepancy timesteps. https://arxiv.org/abs/2107.00630
    Improved DDPM (Nichol and Dhariwal, 2021), section 3.3: importance-sampled timesteps. https://arxiv.org/abs/2102.09672
    Importance Weighted Autoencoders (Burda et al., 2015). https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from .. import draws as lab
from .._tensor import take_rows
from ..diffusion import GaussianDiffusion
from ..draws import Draws, Noise, Terms
from ..elbo import Estimate, site_terms

if TYPE_CHECKING:
    import pandas

__all__ = ["KLS", "by_timestep", "control_variate", "importance_weighted", "systematic", "value_estimators"]

KLS: dict[str, Callable[[Terms], Tensor]] = {
    "analytic": lambda terms: terms.analytic,
    "k1": lambda terms: terms.log_ratio,
    "k2": lambda terms: terms.log_ratio.square() / 2,
    "k3": lambda terms: torch.expm1(-terms.log_ratio) + terms.log_ratio,
}
UNBIASED = {"analytic": True, "k1": True, "k2": False, "k3": True}
NORMALISED = "weights divided by their mean: the ratio of two means is biased"
PILOT = 32  # draws of every term, from which the probabilities of importance-sampled timesteps come
LEAST = 16  # draws of anything that costs little: a variance of two numbers is no variance
UNIFORM_SHARE = 0.001  # of importance-sampled timesteps, so that no weight is unbounded


@dataclass
class Estimator:
    """What one way of estimating the bound gave.

    Attributes:
        path, kl: its name.
        draws: minus the bound, nats: ``[R, B]``, independent over R; None with a reason.
        unbiased: whether its mean is claimed to be the bound's value.
        evaluations, seconds: network evaluations and wall time of one draw for one example.
        timesteps: terms evaluated in one draw.
        noise: name of the noise it was drawn with: estimators that share it are compared draw by draw.
        joint: whether the B examples of a repeat are not independent (timesteps spread over the batch).
        target: ``"elbo"``, or ``"log p"`` for a bound that is tighter than the ELBO.
        reason: why there is no number, or what the number is.
    """

    path: str
    kl: str
    draws: Tensor | None
    unbiased: bool
    evaluations: float = math.nan
    seconds: float = math.nan
    timesteps: int = 0
    noise: str = ""
    joint: bool = False
    target: str = "elbo"
    reason: str = ""


def total(terms: Terms, kl: str, weights: Tensor | float = 1.0) -> Tensor:
    """The (weighted) sum over columns, the first being the reconstruction, which is no KL: ``[R, B]``."""
    cost = KLS[kl](terms)
    cost = torch.cat([terms.analytic[..., :1], cost[..., 1:]], -1)
    return (cost * weights).sum(-1)


def control_variate(terms: Terms) -> tuple[Tensor, float]:
    """The chain's best unbiased combination KL + c N (see above), with c fitted on the other half of the repeats.

    Args:
        terms: of chains, ``[R, B, T + 1]`` with R >= 4.

    Returns:
        Its draws, ``[R, B]``, and the mean of the two coefficients. Either half's coefficient is independent of the draws that
        it multiplies, which keeps the estimator unbiased.
    """
    kl, noise = total(terms, "analytic"), total(terms, "k1") - total(terms, "analytic")
    half = len(kl) // 2
    parts, coefficients = [], []
    for mine, other in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        a, n = kl[other] - kl[other].mean(0), noise[other] - noise[other].mean(0)
        c = -(a * n).sum() / n.square().sum().clamp(min=torch.finfo(n.dtype).tiny)  # 0 of no noise at all
        parts.append(kl[mine] + c * noise[mine])
        coefficients.append(float(c))
    return torch.cat(parts), sum(coefficients) / 2


def importance_weighted(chains: Tensor, k: int) -> Tensor:
    """The importance-weighted bound of k chains, negative: ``[R, B]`` of minus log-weights to ``[R // k, B]``, nats."""
    groups = chains[: len(chains) // k * k].unflatten(0, (-1, k))
    return math.log(k) - torch.logsumexp(-groups, 1)


def systematic(p: Tensor, u: Tensor) -> Tensor:
    """Timesteps with probabilities p from uniform numbers, by the inverse of the distribution function.

    Args:
        p: probabilities of t = 1..T, float64 ``[T]``.
        u: numbers in [0, 1), any shape. Evenly spread ones give evenly spread timesteps.

    Returns:
        Integers 1..T of u's shape.
    """
    edges = p.cumsum(0) / p.sum()
    return torch.searchsorted(edges, u.double(), right=True).clamp(max=len(p) - 1) + 1


def value_estimators(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    *,
    exact: Tensor | None = None,
    exact_log_prob: Tensor | None = None,
    repeats: int = 16,
    timesteps: Sequence[int] = (1, 16),
    iwae: Sequence[int] = (1, 4, 16, 64),
    controls: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> tuple[pandas.DataFrame, Draws, Draws]:
    """Estimate the bound of ``x0`` in every way; arguments as :func:`~pyrodiff.compare_estimators`.

    Returns:
        A row per estimator; the draws along chains; and the independent draws, from which :func:`by_timestep` makes its table.
    """
    T, B = diffusion.schedule.length, len(x0)
    pilots = -(-PILOT // B)
    rows = {count: max(LEAST, repeats * T // (4 * count)) for count in timesteps if 1 <= count <= T}
    evaluations = B * (T * (3 * repeats + pilots) + sum(len(PATHS) * count * n for count, n in rows.items()))
    bar = tqdm(
        total=evaluations, desc="bounds", unit="eval", unit_scale=True, delay=2, disable=not progress, leave=False
    )
    advance = bar.update
    streams = _Streams(seed, x0.device)
    plus, minus = streams.mirrored()
    options: Any = {"batch_size": batch_size, "advance": advance, **cond}
    chains = lab.chain(diffusion, x0, repeats, streams.noise(), **options)
    loop = lab.independent(diffusion, x0, repeats, plus, **options)
    mirrored = lab.independent(diffusion, x0, repeats, minus, **options)
    pilot = lab.independent(diffusion, x0, pilots, streams.noise(), **options)
    found = [*_sums("chain", chains), *_sums("independent", loop)]
    if repeats >= 8:
        combined, c = control_variate(chains.terms)
        found.insert(
            1,
            Estimator("chain", "analytic + c N", combined, True, T, chains.seconds, T, "chain", reason=f"c = {c:.3f}"),
        )
    else:
        found.insert(
            1, _refused("chain", "analytic + c N", f"c is fitted on half of the chains: repeats={repeats} is below 8")
        )
    pair = (total(loop.terms, "analytic") + total(mirrored.terms, "analytic")) / 2
    seconds = loop.seconds + mirrored.seconds
    found.append(Estimator("independent, antithetic", "analytic", pair, True, 2 * T, seconds, T, "independent"))
    p = _importance(pilot.terms)
    for count in timesteps:
        if count not in rows:
            found.append(_refused(f"{count} timesteps", "analytic", f"the chain has T = {T} timesteps"))
            continue
        for name in PATHS:
            found += _subsampled(
                diffusion, x0, name, p, count, rows[count], streams, batch_size, advance, controls, cond
            )
    log_weights = total(chains.terms, "k1")
    for k in iwae:
        if repeats < 2 * k:
            found.append(
                _refused("chain", f"IWAE {k}", f"two groups of {k} chains need repeats={2 * k}, not {repeats}")
            )
            continue
        bound = importance_weighted(log_weights, k)
        found.append(Estimator("chain", f"IWAE {k}", bound, False, k * T, k * chains.seconds, T, target="log p"))
    if controls:
        found += _forward_order(diffusion, x0, repeats, seed, batch_size, cond)
    bar.close()
    return _table(found, exact, exact_log_prob, B), chains, loop


# ---------------------------------------------------------------------- paths


class _Streams:
    """Independent generators from one seed: normal numbers of the same seed as uniform ones would be correlated with them."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device, self.count = seed, device, 0

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        self.count += 1
        state = np.random.SeedSequence((self.seed, self.count)).generate_state(1, np.uint64)[0]
        return torch.Generator(device).manual_seed(int(state >> 1))

    def noise(self) -> Noise:
        generator = self.generator(self.device)
        return lambda like: torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)

    def mirrored(self) -> tuple[Noise, Noise]:
        """Noise, and the same with the other sign."""
        state = self.generator(self.device)
        twin = state.clone_state()
        return (
            lambda like: torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=state),
            lambda like: -torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=twin),
        )


def _sums(path: str, drawn: Draws) -> list[Estimator]:
    """All terms, added up, by every KL."""
    T = round(drawn.evaluations)
    return [
        Estimator(path, kl, total(drawn.terms, kl), UNBIASED[kl], drawn.evaluations, drawn.seconds, T, path)
        for kl in KLS
    ]


def _importance(terms: Terms) -> Tensor:
    """p(t) in proportion to the root mean square of the term that t estimates: ``[T]``."""
    p = terms.analytic[..., :-1].flatten(0, 1).square().mean(0).sqrt()
    return (1 - UNIFORM_SHARE) * p / p.sum() + UNIFORM_SHARE / len(p)


def _spread(rows: int, batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Per repeat, batch * count even points of [0, 1) with one random offset, ``[R, B, C]``: even for each example too."""
    points = torch.arange(batch * count, dtype=torch.float64, device="cpu").reshape(count, batch).T / (batch * count)
    order = torch.rand(rows, batch, generator=generator, device="cpu").argsort(1)
    return (points[order] + torch.rand(rows, 1, 1, dtype=torch.float64, generator=generator, device="cpu")) % 1


def _random(rows: int, batch: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, batch, count, dtype=torch.float64, generator=generator, device="cpu")


# How timesteps are drawn: from which law, and whether spread evenly over the batch.
PATHS = {
    "uniform": (False, _random),
    "low discrepancy": (False, _spread),
    "importance": (True, _random),
    "importance, low discrepancy": (True, _spread),
}


def _subsampled(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    path: str,
    p: Tensor,
    count: int,
    repeats: int,
    streams: _Streams,
    batch_size: int,
    advance: Callable[[int], object],
    controls: bool,
    cond: dict[str, Any],
) -> list[Estimator]:
    """A few timesteps per example."""
    weighted, points = PATHS[path]
    if not weighted:
        p = torch.full_like(p, 1 / len(p))
    batch = len(x0)
    t = systematic(p, points(repeats, batch, count, streams.generator()))
    started = time.perf_counter()
    terms = sampled_terms(diffusion, x0, t, streams.noise(), batch_size, advance, **cond)
    seconds = (time.perf_counter() - started) / (repeats * batch)
    name, joint = f"{path}, {count}", points is _spread
    note = f"p(t) from a pilot of {PILOT} draws of every term" if weighted else ""
    found = [
        Estimator(
            name, kl, weighted_total(terms, t, p, kl), UNBIASED[kl], count, seconds, count, name, joint, reason=note
        )
        for kl in KLS
    ]
    if controls and path == "importance" and count > 1:
        wrong = weighted_total(terms, t, p, "analytic", normalise=True)
        found.append(
            Estimator(f"{name}, normalised", "analytic", wrong, False, count, seconds, count, name, reason=NORMALISED)
        )
    return found


def weighted_total(terms: Terms, t: Tensor, p: Tensor, kl: str, normalise: bool = False) -> Tensor:
    """The bound from a few timesteps per example.

    Args:
        terms: ``[R, B, C + 1]``, what :func:`sampled_terms` gave.
        t: the timesteps, integers 1..T, ``[R, B, C]``.
        p: their probabilities, for t = 1..T: ``[T]``.
        kl: one of :data:`KLS`.
        normalise: divide by the mean of the weights, as is often seen: the result is biased.

    Returns:
        Minus the bound, nats: ``[R, B]``.
    """
    weights = 1 / p[t - 1]
    if normalise:
        weights = len(p) * weights / weights.mean(-1, keepdim=True)
    # At t = 1 the term is no KL: both fields hold its cost, and no function of a log-ratio applies.
    cost = KLS[kl](terms)
    sampled = torch.where(t == 1, terms.analytic[..., :-1], cost[..., :-1])
    return (sampled * weights).mean(-1) + cost[..., -1]


def sampled_terms(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    t: Tensor,
    noise: Noise,
    batch_size: int = 256,
    advance: Callable[[int], object] = lambda n: None,
    **cond: Any,
) -> Terms:
    """The terms at given timesteps, one network evaluation each, and the prior in the last column.

    Args:
        x0: ``[B, *event]``.
        t: integers 1..T, ``[R, B, C]``.

    Returns:
        Terms ``[R, B, C + 1]``.
    """
    rows, batch, count = t.shape
    found: list[Terms] = []
    last: list[Terms] = []
    with diffusion.evaluating(), torch.no_grad():
        index = torch.arange(rows * batch * count, device="cpu") // count % batch
        for part, of_t in zip(index.split(batch_size), t.flatten().split(batch_size), strict=True):
            part_cond = take_rows(diffusion.net, cond, part, batch)
            found.append(lab.steps(diffusion, x0[part], of_t.to(x0.device), noise, **part_cond))
            advance(len(part))
        for part in (torch.arange(rows * batch, device="cpu") % batch).split(batch_size):
            last.append(lab.prior(diffusion, x0[part], noise)[1])
    columns = [torch.cat(z).reshape(rows, batch, count) for z in zip(*found, strict=True)]
    priors = [torch.cat(z).reshape(rows, batch, 1) for z in zip(*last, strict=True)]
    return Terms(*(torch.cat(z, -1) for z in zip(columns, priors, strict=True)))


def _forward_order(
    diffusion: GaussianDiffusion, x0: Tensor, repeats: int, seed: int, batch_size: int, cond: dict[str, Any]
) -> list[Estimator]:
    """The guide that adds noise step by step: right by Monte Carlo, silently wrong by analytic KLs, which is why it is here."""
    found: dict[str, list[Tensor]] = {"analytic": [], "monte_carlo": []}
    diffusion = diffusion.respace(range(1, diffusion.steps + 1))  # a twin, to be scored without SVI's N / B
    diffusion.data_size = None
    started, scope = time.perf_counter(), pyro.get_param_store().scope()
    generators = torch.random.fork_rng(range(torch.cuda.device_count()))
    with scope, generators, diffusion.evaluating(), torch.no_grad(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", UserWarning)  # Pyro's, about the order
        for part in (torch.arange(repeats * len(x0), device="cpu") % len(x0)).split(batch_size):
            rows = take_rows(diffusion.net, cond, part, len(x0))
            guide = poutine.trace(diffusion.noising).get_trace(x0[part], **rows)
            model = poutine.trace(poutine.replay(diffusion.model, trace=guide)).get_trace(x0[part], **rows)
            for kl, values in found.items():
                values.append(torch.stack([v.double().cpu() for v in site_terms(model, guide, kl).values()]).sum(0))
    T, seconds = diffusion.steps, (time.perf_counter() - started) / (repeats * len(x0))
    sums = {kl: torch.cat(values).unflatten(0, (repeats, len(x0))) for kl, values in found.items()}
    wrong = "the guide's x_s depends on what the model's x_t does not know"
    return [
        Estimator("chain, forward order", "analytic", sums["analytic"], False, T, seconds, T, reason=wrong),
        Estimator("chain, forward order", "k1", sums["monte_carlo"], True, T, seconds, T),
    ]


def _refused(path: str, kl: str, reason: str) -> Estimator:
    return Estimator(path, kl, None, UNBIASED.get(kl, False), reason=reason)


# ---------------------------------------------------------------------- tables


def _table(found: list[Estimator], exact: Tensor | None, exact_log_prob: Tensor | None, batch: int) -> pandas.DataFrame:
    import pandas

    figures = [_figures(e, batch) for e in found]
    # Without an exact value, others are held against the unbiased estimator with the least standard error. Not against k3, whose
    # heavy tail a sample can miss altogether, nor where few numbers tell that standard error.
    candidates = [i for i, e in enumerate(found) if e.unbiased and e.draws is not None and e.kl != "k3" and not e.joint]
    best = min(candidates, key=lambda i: figures[i]["se_noise"] or math.inf, default=None)
    rows = []
    for i, e in enumerate(found):
        mean, se, against = figures[i]["mean"], figures[i]["se_noise"], ""
        truth = math.nan
        if e.draws is None:
            pass
        elif e.target == "log p" and exact_log_prob is not None:
            truth, against = -float(exact_log_prob.mean()), "exact"
        elif e.target == "elbo" and exact is not None:
            truth, against = float(exact.mean()), "exact"
        elif e.target == "elbo" and best is not None and i != best:
            truth, against = figures[best]["mean"], f"{found[best].path}; {found[best].kl}"
            se = _se_of_difference(e, found[best], se, figures[best]["se_noise"])
        bias = {
            "bias": mean - truth,
            "bias_se": se if against else math.nan,
            "z": (mean - truth) / se if se else math.nan,
        }
        name = {"path": e.path, "kl": e.kl, "unbiased": e.unbiased, "target": e.target}
        rows.append({**name, **figures[i], **bias, "against": against, "reason": e.reason})
    return pandas.DataFrame(rows)


def _figures(e: Estimator, batch: int) -> dict[str, float]:
    names = (
        "timesteps",
        "evaluations",
        "seconds",
        "mean",
        "se_noise",
        "se_examples",
        "variance",
        "variance_se",
        "efficiency",
    )
    if e.draws is None:
        return dict.fromkeys(names, math.nan)
    estimate = Estimate.of(e.draws)
    if e.joint:  # what a batch's mean varies by, per example
        deviations = batch * (e.draws.mean(1) - e.draws.mean()).square()
    else:
        deviations = (e.draws - e.draws.mean(0)).square().mean(1)
    repeats = len(deviations)
    variance = float(deviations.sum() / (repeats - 1))
    variance_se = float(deviations.std() / math.sqrt(repeats))
    se_noise = math.sqrt(variance / batch / repeats)
    efficiency = 1 / (variance * e.evaluations) if variance > 0 else math.inf
    values = (
        e.timesteps,
        e.evaluations,
        e.seconds,
        estimate.mean,
        se_noise,
        estimate.se_examples,
        variance,
        variance_se,
    )
    return dict(zip(names, (*values, efficiency), strict=True))


def _se_of_difference(e: Estimator, other: Estimator, se: float, se_other: float) -> float:
    """Paired where both come from the same noise."""
    if e.noise and e.noise == other.noise and e.draws is not None and other.draws is not None:
        return Estimate.of(e.draws - other.draws).se_noise
    return math.hypot(se, se_other)


def by_timestep(diffusion: GaussianDiffusion, drawn: Draws) -> pandas.DataFrame:
    """Each term of the bound: its mean, what it varies by, its share, and the SNR.

    Args:
        drawn: independent draws, ``[R, B, T + 1]``.

    Returns:
        A row for each term: ``term`` (``"reconstruction"``, ``"diffusion"``, ``"prior"``), ``t``, ``log_snr`` and ``snr`` there
        (averaged over the event, where the schedule has one), ``kl`` (mean, nats per example), ``se_noise``,
        ``variance_analytic`` and ``variance_monte_carlo`` (over noise, given the example, averaged over examples),
        ``variance_examples`` (of the term's mean, between examples), ``share`` of the bound (NaN where
        the reconstruction is negative, as densities can make it: parts have no share of a difference).
    """
    import pandas

    analytic, log_ratio = drawn.terms
    repeats, examples, columns = analytic.shape
    T = columns - 1
    t = torch.arange(1, T + 1, device="cpu")
    log_snr = diffusion.schedule.log_snr(t).detach().double().cpu()
    log_snr = log_snr.flatten(1).mean(1) if log_snr.dim() > 1 else log_snr
    t, log_snr = torch.cat([t, t[-1:]]), torch.cat([log_snr, log_snr[-1:]])
    mean = analytic.mean((0, 1))
    noise = analytic.var(0).mean(0)
    between = (
        (analytic.mean(0).var(0) - noise / repeats).clamp(min=0) if examples > 1 else torch.full_like(mean, math.nan)
    )
    return pandas.DataFrame(
        {
            "term": ["reconstruction", *["diffusion"] * (T - 1), "prior"],
            "t": t.numpy(),
            "log_snr": log_snr.numpy(),
            "snr": log_snr.exp().numpy(),
            "kl": mean.numpy(),
            "se_noise": (noise / (repeats * examples)).sqrt().numpy(),
            "variance_analytic": noise.numpy(),
            "variance_monte_carlo": log_ratio.var(0).mean(0).numpy(),
            "variance_examples": between.numpy(),
            "share": (mean / mean.sum() if mean[0] >= 0 else torch.full_like(mean, math.nan)).numpy(),
        }
    )
