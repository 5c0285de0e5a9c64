r"""Bounds on log p(x_0) from the probability flow's density of the noisy x_1.

The flow is a density of :math:`\bar x_1 = x_1 / \alpha_1`. With a law :math:`q(\bar x_1 \mid x_0)` to draw from and a way
:math:`p(x_0 \mid \bar x_1)` back it says something about x_0, by importance weights:

.. math::

    E \log \frac1K \sum_{k=1}^{K} w_k \le \log p(x_0), \qquad
    w = \frac{p(\bar x_1)\, p(x_0 \mid \bar x_1)}{q(\bar x_1 \mid x_0)}, \quad \bar x_1 \sim q(\cdot \mid x_0),

an ELBO for K = 1 and tighter with every sample. Three choices:

==================== ===================================================== ============================================
dequantisation       :math:`q(\bar x_1 \mid x_0)`                          :math:`p(x_0 \mid \bar x_1)`
==================== ===================================================== ============================================
``uniform``          uniform on the bin of x_0                             1 on the bin, 0 elsewhere
``truncated_normal`` :math:`N(x_0, \bar\sigma_1^2)`, cut off at the bin    the same
``decoder``          :math:`N(x_0, \bar\sigma_1^2)`, the forward process's the model's decoder (continuous data too)
==================== ===================================================== ============================================

The first two bound one number, the flow's probability of the bin (outermost bins end half a bin outside; mass beyond is lost);
the second matches what the network was trained on. The third is the model "flow, then decoder", which the chain's own bound
tends to as T grows where scores are exact; it is the one to compare with the chain's ELBO.

References:
    Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs (Zheng et al., 2023), truncated normal.
    https://arxiv.org/abs/2305.03935
    A Note on the Evaluation of Generative Models (Theis et al., 2016), uniform. https://arxiv.org/abs/1511.01844
    Importance Weighted Autoencoders (Burda et al., 2015), theorem 1. https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from .._tensor import sum_event, take_rows
from ..diffusion import GaussianDiffusion
from ..elbo import ELBOTerms
from ..errors import OptionError, ShapeError, check_option
from .flow import FlowDensity, check_batch, log_density

__all__ = ["DEQUANTISATIONS", "flow_bound", "signed_gap"]

DEQUANTISATIONS = ("uniform", "truncated_normal", "decoder")


def flow_bound(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    dequantisation: str = "decoder",
    *,
    samples: int = 1,
    repeats: int = 1,
    probes: int | None = None,
    solver: str = "rk4",
    steps: int | None = None,
    tolerance: float | None = None,
    seed: int | None = None,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> FlowDensity:
    r"""A lower bound on log p(x_0) of the flow, estimated without bias: importance-weighted, for each example.

    It is a bound but for the solver's error. For discrete data it is of a probability, and
    ``BitsPerDim.of(-found.log_prob / (D * math.log(2)))`` its bits/dim. Nothing is kept on the autograd graph.

    Args:
        diffusion: the model.
        x0: data, ``[B, *event]``.
        dequantisation: ``"uniform"``, ``"truncated_normal"`` (both need bins) or ``"decoder"``; see the module's text.
        samples: K, draws of x_1 under one logarithm.
        repeats: independent repetitions R; from 2 on the estimates have a standard error over noise.
        probes: None for the exact divergence, or the number of Hutchinson's vectors. With K = 1 only: the estimate of log p is
            unbiased, its exponential is not, and an average of those would not be bounded by p(x_0).
        seed: example i's noise depends on the seed and i alone. None: drawn from torch's generator.
        solver, steps, tolerance, batch_size, progress, cond: see :func:`~pyrodiff.likelihood.flow.log_density`.

    Returns:
        ``log_prob`` ``[R, B]``, nats; the evaluations of "decoder" include the decoder's own.

    Raises:
        OptionError: an option outside its set; bins wanted; importance weights of estimated divergences.
        ShapeError, DataError: ``x0`` has another shape, or is off the grid.
    """
    began = time.perf_counter()
    check_option("dequantisation", dequantisation, DEQUANTISATIONS)
    check_batch("x0", x0, diffusion)
    p, event_dim = diffusion.reverse_kernel, len(diffusion.event_shape)
    if samples < 1 or repeats < 1:
        raise OptionError(f"samples={samples!r} and repeats={repeats!r} must be at least 1")
    if samples > 1 and probes is not None:
        raise OptionError(
            f"probes={probes!r} with samples={samples!r}: importance weights exponentiate the noise of the probes, and the "
            "result would be no bound; take probes=None (the exact divergence), or samples=1"
        )
    if p.bins is None and dequantisation != "decoder":
        raise OptionError(f'dequantisation={dequantisation!r} fills bins, and bins=None has none; take "decoder"')
    p.check_grid("x0", x0)
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.no_grad():
        u = _uniforms(seed, (len(x0), repeats, samples, *diffusion.event_shape)).to(x0.device)
        scale = (-0.5 * diffusion.schedule.log_snr(diffusion.schedule.first)).exp().item()
        levels, low, high = p.bins or (2, 0.0, math.inf)
        offset, log_q = _dequantise(u, dequantisation, scale, (high - low) / (levels - 1) / 2)
        x_bar = (x0.double()[:, None, None] + offset).to(x0.dtype).flatten(0, 2)
        rows = torch.arange(len(x0), device=x0.device).repeat_interleave(repeats * samples)
        found = log_density(
            diffusion, x_bar, probes=probes, solver=solver, steps=steps, tolerance=tolerance, seed=seed,
            batch_size=batch_size, progress=progress, **take_rows(diffusion.net, cond, rows, len(x0)),
        )  # fmt: skip
        log_p = found.log_prob.mean(0)
        evaluations = found.network_evaluations
        if dequantisation == "decoder":
            log_p = log_p + _log_decoder(diffusion, x_bar, x0, rows, batch_size, cond)
            evaluations += len(x_bar)
        log_weight = log_p.reshape(len(x0), repeats, samples) - sum_event(log_q, event_dim)
        bound = log_weight.logsumexp(-1).T - math.log(samples)
    return FlowDensity(bound, evaluations, found.vector_jacobian_products, time.perf_counter() - began)


def signed_gap(found: FlowDensity, terms: ELBOTerms) -> Tensor:
    """The flow's bound minus the chain's, of the same examples: ``[R, B]`` nats, by repeats that are independent.

    Neither model bounds the other. Both lose a term of second order in the error of x0_hat: the chain a sum of squares over
    the path, the flow the square of what the errors add up to. Errors that cancel, or turn probability in circles, favour the
    flow; errors of one sign over a long path favour the chain, and the flow falls below the ELBO.

    Each example's gap is the mean over R, with the standard error ``std(0) / sqrt(R)``; ``Estimate.of`` gives that of the data.

    Args:
        found: ``flow_bound(diffusion, x0, repeats=R)``, with ``"decoder"``: the bounds then have decoder and x_1 in common.
        terms: ``elbo_terms(diffusion, x0, repeats=R)``.

    Raises:
        ShapeError: they are not of as many examples and repeats.
    """
    cost = terms.parts()["total"]
    if cost.shape != found.log_prob.shape:
        raise ShapeError(
            f"the flow's draws are {list(found.log_prob.shape)}, the chain's {list(cost.shape)}: [R, B] each"
        )
    return found.log_prob.cpu() + cost


def _uniforms(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers in (0, 1), float64, of ``shape``, whose first dim is the examples', each with a stream of its own."""
    streams = [np.random.default_rng([seed % 2**64, i, 1]).random(shape[1:]) for i in range(shape[0])]
    return torch.from_numpy(np.stack(streams)).clamp(min=2.0**-54)


def _dequantise(u: Tensor, dequantisation: str, scale: float, half_bin: float) -> tuple[Tensor, Tensor]:
    """What is added to x_0, from uniform numbers; and the log-density of that, per element."""
    if dequantisation == "uniform":
        return (2 * u - 1) * half_bin, torch.full_like(u, -math.log(2 * half_bin))
    tau = half_bin / scale if dequantisation == "truncated_normal" else math.inf
    mass = math.erf(tau * math.sqrt(0.5))
    z = torch.special.ndtri(0.5 + (u - 0.5) * mass).clamp(-tau, tau)
    return scale * z, -0.5 * z.square() - math.log(scale * mass) - 0.5 * math.log(2 * math.pi)


def _log_decoder(
    diffusion: GaussianDiffusion, x_bar: Tensor, x0: Tensor, rows: Tensor, batch_size: int, cond: dict[str, Tensor]
) -> Tensor:
    """Log p(x_0 | x_1) where row n of ``x_bar`` belongs to example ``rows[n]``: float64 ``[N]``."""
    p, found = diffusion.reverse_kernel, []
    alpha_1 = diffusion.schedule.alpha(diffusion.schedule.first).to(x_bar)
    with diffusion.evaluating():
        for part, x in zip(rows.split(batch_size), x_bar.split(batch_size), strict=True):
            law = p.decode(alpha_1 * x, **take_rows(diffusion.net, cond, part, len(x0)))
            found.append(law.log_prob(x0[part]).double())
    return torch.cat(found)
