r"""The exact log-density of the probability flow.

Where :math:`\hat x_0(x_t) = E[x_0 \mid x_t]`, the law of :math:`x_t` is carried from one log-SNR :math:`\lambda` to another by

.. math:: \frac{d x_t}{d \lambda} = \tfrac12 \alpha\, (\hat x_0(x_t, \lambda) - \alpha\, x_t),

which is the flow of ``sample.py`` in coordinates that stay bounded (and :math:`d x_t / d\phi = \hat v` in the angle
:math:`\phi = \arccos \alpha`). For any network it is an invertible map between :math:`x_1` and :math:`x_T`, the two ends of the
schedule, and with :math:`p(x_T) = N(0, 1)` the change of variables is a model with an exact density:

.. math::

    \log p(x_1) = \log N(x_T; 0, 1) + \int_{\lambda_1}^{\lambda_T} \operatorname{div} \frac{d x_t}{d \lambda}\, d\lambda .

**What it is the density of.** The flow ends at :math:`x_1`, which has noise of :math:`\bar\sigma_1 = \sigma_1 / \alpha_1` left. Data
stand in the place of :math:`\bar x_1 = x_1 / \alpha_1`: for exact scores the density is that of
:math:`x_0 + \bar\sigma_1 \epsilon`, not of x_0. A bound on log p(x_0) itself, for discrete data a probability, is
:func:`~pyrodiff.likelihood.dequantise.flow_bound`.

**Another model than the chain.** The chain draws at every step, the flow at none; they have one law only where the scores are
exact. For a network the flow's density may be above the chain's log p(x_0) or below its ELBO
(:func:`~pyrodiff.likelihood.dequantise.signed_gap`).

**A clipped** :math:`\hat x_0` bends the flow where it starts to clip. It stays invertible and its density exact, but a solver's
order is lost there: take more steps than without.

References:
    Score-Based Generative Modeling through SDEs (Song et al., 2021), section 4.3, appendix D.2.
    https://arxiv.org/abs/2011.13456
    FFJORD (Grathwohl et al., 2019), section 3.1 (probes fixed along the path). https://arxiv.org/abs/1810.01367
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._tensor import check_event, in_parts, take_rows
from ..diffusion import GaussianDiffusion
from ..errors import OptionError, ShapeError, check_option

__all__ = ["SOLVERS", "FlowDensity", "decode", "encode", "log_density"]

# Explicit Runge-Kutta: where each slope is taken, ahead along the slope before it; and its weight in the step.
RUNGE_KUTTA = {
    "heun": ((0.0, 1 / 2), (1.0, 1 / 2)),
    "rk4": ((0.0, 1 / 6), (1 / 2, 1 / 3), (1 / 2, 1 / 3), (1.0, 1 / 6)),
}
SOLVERS = (*RUNGE_KUTTA, "dopri5")
STEPS, TOLERANCE = 64, 1e-6

Field = Callable[[Any, Tensor], Tensor]
"""Slope of a state ``[N, S]`` at u in [0, 1], the share of the way from one end to the other."""


@dataclass(frozen=True)
class FlowDensity:
    """Log-densities and what they cost.

    Attributes:
        log_prob: nats, float64 ``[R, B]``: R independent estimates for each of B examples, each unbiased; R = 1 where the
            divergence is exact. Their mean and its two standard errors: ``Estimate.of(log_prob)``.
        network_evaluations: forward passes of one example.
        vector_jacobian_products: backward passes of one example.
        seconds: wall time.
    """

    log_prob: Tensor
    network_evaluations: int
    vector_jacobian_products: int
    seconds: float


def log_density(
    diffusion: GaussianDiffusion,
    x: Tensor,
    *,
    probes: int | Tensor | None = None,
    solver: str = "rk4",
    steps: int | None = None,
    tolerance: float | None = None,
    seed: int | None = None,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> FlowDensity:
    r"""Log-density of the probability flow at :math:`\bar x_1 = x`, in the units of the data.

    With a ``seed`` or given probes, a deterministic function of ``x``. It is differentiable where ``x`` requires grad, in ``x``
    and in the parameters (the whole path is then kept; networks with attention need ``sdpa_kernel(SDPBackend.MATH)``), and
    keeps nothing otherwise. Fixed steps treat every example alike, whatever the batch; ``"dopri5"`` chooses steps for a
    batch together, so that its error, not more than that, depends on the neighbours.

    Args:
        diffusion: the model; its network runs in evaluation mode. The schedule must be one for the whole event.
        x: ``[B, *event]``; for data, see the module's text.
        probes: None: the exact divergence, D backward passes for a network call. An integer R: Hutchinson's estimate by R
            vectors of random signs, kept along the path. A tensor ``[R, B, *event]``: those vectors.
        solver: ``"heun"`` (second order, two calls for a step), ``"rk4"`` (fourth, four) or ``"dopri5"`` (adaptive; needs
            torchdiffeq, ``pyrodiff[ode]``).
        steps: of ``"heun"`` and ``"rk4"``, equal in log-SNR (default 64).
        tolerance: of ``"dopri5"``, absolute and relative, for every element and the log-density (default 1e-6).
        seed: example i's probes depend on the seed and i alone. None: drawn from torch's generator.
        batch_size: examples per network call.
        progress: show a progress bar after two seconds.
        cond: passed to the network, a row per example, or values without batch dim for all.

    Returns:
        ``log_prob`` ``[R, B]`` nats; R = 1 for the exact divergence.

    Raises:
        OptionError: an option outside its set; a schedule per element; ``prediction="previous"``.
        ShapeError: ``x``, ``probes`` or ``cond`` has another shape.
    """
    began = time.perf_counter()
    check_batch("x", x, diffusion)
    integrate = _integrator(solver, steps, tolerance)
    vectors = _vectors(probes, x, seed)
    with _gradients(x):
        alpha_1 = _alpha_1(diffusion, x)
        x_T, integral, calls = _transport(
            diffusion, alpha_1 * x.double(), _ends(diffusion), x.dtype, vectors, integrate, batch_size, cond, progress
        )
        dims = diffusion.event_shape.numel()
        noise = -0.5 * x_T.reshape(len(x), dims).square().sum(1) - 0.5 * dims * math.log(2 * math.pi)
        log_prob = noise + integral + dims * alpha_1.log()
    return FlowDensity(log_prob, calls, calls * vectors.shape[:2].numel(), time.perf_counter() - began)


def encode(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    *,
    solver: str = "rk4",
    steps: int | None = None,
    tolerance: float | None = None,
    batch_size: int = 256,
    **cond: Tensor,
) -> Tensor:
    r"""The noise x_T that the flow carries data to, from :math:`\bar x_1 = x_0`; ``[B, *event]``, in the dtype of ``x0``.

    Arguments, gradients and errors are those of :func:`log_density`.
    """
    check_batch("x0", x0, diffusion)
    integrate, path = _integrator(solver, steps, tolerance), _ends(diffusion)
    with _gradients(x0):
        start = _alpha_1(diffusion, x0) * x0.double()
        x_T, _, _ = _transport(diffusion, start, path, x0.dtype, _none(x0), integrate, batch_size, cond)
        return x_T.to(x0.dtype)


def decode(
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    *,
    solver: str = "rk4",
    steps: int | None = None,
    tolerance: float | None = None,
    batch_size: int = 256,
    **cond: Tensor,
) -> Tensor:
    r"""The inverse of :func:`encode`: :math:`\bar x_1` of the flow through ``x_T``; ``[B, *event]``, in the dtype of ``x_T``.

    It still has the noise of t = 1, and lies off the grid of discrete data: a sampler's last step would denoise it.
    """
    check_batch("x_T", x_T, diffusion)
    integrate, path = _integrator(solver, steps, tolerance), _ends(diffusion)[::-1]
    with _gradients(x_T):
        x_1, _, _ = _transport(diffusion, x_T.double(), path, x_T.dtype, _none(x_T), integrate, batch_size, cond)
        return (x_1 / _alpha_1(diffusion, x_T)).to(x_T.dtype)


# ---------------------------------------------------------------------- arguments


def check_batch(name: str, x: Tensor, diffusion: GaussianDiffusion) -> None:
    """Raise unless ``x`` is floating, ``[B, *event]`` with B >= 1, and the schedule has one log-SNR for the event."""
    check_event(name, x, diffusion.event_shape)
    if x.dim() != len(diffusion.event_shape) + 1 or not len(x):
        raise ShapeError(f"{name} has shape {list(x.shape)}, not [B, *{list(diffusion.event_shape)}] with B >= 1")
    if diffusion.schedule.event_dim:
        raise OptionError("a schedule per element has no one log-SNR: the flow between its steps is not known")


def _gradients(x: Tensor) -> torch.set_grad_enabled:
    """A context in which a graph is kept if the caller wants one."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad)


def _alpha_1(diffusion: GaussianDiffusion, x: Tensor) -> Tensor:
    return diffusion.schedule.alpha(torch.tensor(diffusion.schedule.first, device=x.device))


def _ends(diffusion: GaussianDiffusion) -> tuple[float, ...]:
    """Where the way to the noise begins and ends."""
    return diffusion.schedule.first, diffusion.schedule.last


def _vectors(probes: int | Tensor | None, x: Tensor, seed: int | None) -> Tensor:
    """Float64 ``[R, S, B, *event]``: estimate r of a divergence is the sum of v J v over the S vectors."""
    if probes is None:
        dims = x[0].numel()
        unit = torch.eye(dims, dtype=torch.float64, device=x.device).reshape(1, dims, 1, *x.shape[1:])
        return unit.expand(1, dims, *x.shape)
    if isinstance(probes, Tensor):
        if probes.shape[1:] != x.shape or not len(probes):
            raise ShapeError(f"probes have shape {list(probes.shape)}, not [R, *{list(x.shape)}] with R >= 1")
        return probes.to(x.device, torch.float64)[:, None]
    if probes < 1:
        raise OptionError(f"probes={probes!r} is not None (the exact divergence), at least 1, or a tensor")
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    shape = (probes, 1, *x.shape[1:])
    signs = [2.0 * np.random.default_rng([seed % 2**64, i]).integers(0, 2, shape) - 1 for i in range(len(x))]
    return torch.from_numpy(np.stack(signs, axis=2)).to(x.device)


def _none(x: Tensor) -> Tensor:
    """No vectors: no divergence."""
    return x.new_empty((0, 0, *x.shape))


# ---------------------------------------------------------------------- the flow


def _transport(
    diffusion: GaussianDiffusion,
    x: Tensor,
    path: tuple[float, ...],
    dtype: torch.dtype,
    vectors: Tensor,
    integrate: Callable[[Field, Tensor], Tensor],
    batch_size: int,
    cond: dict[str, Tensor],
    progress: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """States from one step to another, float64; the integral of the divergence, ``[R, B]``; and the network's evaluations.

    The state is float64, whatever the network's ``dtype``: its rounding would add up along the path.
    """
    p, event_shape, dims = diffusion.reverse_kernel, diffusion.event_shape, diffusion.event_shape.numel()
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size!r} must be at least 1")
    first, last = diffusion.schedule.log_snr(torch.tensor(path, device=x.device))
    evaluations = 0

    def part(rows: slice) -> Tensor:
        given, probed = take_rows(p.net, cond, rows, len(x)), vectors[:, :, rows]

        def field(u: float | Tensor, state: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += len(state)
            bar.update(rows.start + (float(u.detach()) if isinstance(u, Tensor) else u) * len(state) - bar.n)
            graph = torch.is_grad_enabled()
            with torch.set_grad_enabled(graph or len(probed) > 0):
                x_t = state[:, :dims].reshape(-1, *event_shape)
                if not graph:
                    x_t = x_t.detach().requires_grad_(len(probed) > 0)
                log_snr = first + (last - first) * u
                alpha = log_snr.sigmoid().sqrt()
                x0_hat = p.denoise_at(x_t.to(dtype), log_snr, **given).double()
                slope = (last - first) * alpha / 2 * (x0_hat - alpha * x_t)
                divergences = [
                    torch.stack([_form(slope, x_t, v, graph) for v in estimate], dim=1).sum(1, keepdim=True)
                    for estimate in probed
                ]
                rate = torch.cat([slope.reshape(-1, dims), *divergences], dim=1)
            return rate if graph else rate.detach()

        start = x[rows].reshape(-1, dims)
        return integrate(field, torch.cat([start, start.new_zeros(len(start), len(vectors))], dim=1))

    bar = tqdm(
        total=len(x), desc="flow", unit="example", delay=2, disable=not progress, dynamic_ncols=True, leave=False,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    )  # fmt: skip
    with diffusion.evaluating(), bar:
        found, _ = in_parts(part, len(x), batch_size)
    return found[:, :dims].reshape(x.shape), found[:, dims:].T, evaluations


def _form(slope: Tensor, x: Tensor, v: Tensor, graph: bool) -> Tensor:
    """V J v of each example, ``[B]``, J the Jacobian of ``slope``."""
    (product,) = torch.autograd.grad(slope, x, v, retain_graph=True, create_graph=graph)
    return (product * v).reshape(len(x), -1).sum(1)


# ---------------------------------------------------------------------- solvers


def _integrator(solver: str, steps: int | None, tolerance: float | None) -> Callable[[Field, Tensor], Tensor]:
    """What carries a state along a field from u = 0 to u = 1."""
    check_option("solver", solver, SOLVERS)
    if solver == "dopri5":
        if steps is not None or (tolerance is not None and not tolerance > 0):
            raise OptionError(f"steps={steps!r}, tolerance={tolerance!r}: dopri5 has no steps, but a tolerance above 0")
        return lambda field, state: _dopri5(field, state, TOLERANCE if tolerance is None else tolerance)
    if tolerance is not None or (steps is not None and steps < 1):
        raise OptionError(f"steps={steps!r}, tolerance={tolerance!r}: {solver} has no tolerance, but at least 1 step")
    return lambda field, state: _runge_kutta(field, state, RUNGE_KUTTA[solver], STEPS if steps is None else steps)


def _runge_kutta(field: Field, state: Tensor, tableau: tuple[tuple[float, float], ...], steps: int) -> Tensor:
    for step in range(steps):
        slope, change = torch.zeros_like(state), torch.zeros_like(state)
        for ahead, weight in tableau:
            slope = field((step + ahead) / steps, state + ahead / steps * slope)
            change = change + weight / steps * slope
        state = state + change
    return state


def _dopri5(field: Field, state: Tensor, tolerance: float) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise OptionError('solver="dopri5" needs torchdiffeq: install pyrodiff[ode], or take "rk4"') from None
    u = torch.tensor([0.0, 1.0], dtype=state.dtype, device=state.device)
    # The largest error, where a mean over the batch would let easy examples hide a hard one.
    largest = {"norm": lambda error: error.abs().max()}
    return odeint(field, state, u, rtol=tolerance, atol=tolerance, method="dopri5", options=largest)[-1]
