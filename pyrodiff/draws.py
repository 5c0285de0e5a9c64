r"""Draws of the bound's terms, each with its analytic KL and its log-ratio, from noise that is an argument.

In DDPM's notation the bound is :math:`L_0 + \sum_{t=2}^{T} L_{t-1} + L_T`: reconstruction, reverse steps, prior. A column
of what these functions return is an index of L: column 0 the reconstruction (which t = 1 estimates), column t - 1 the reverse
step from t, column T the prior.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 5. https://arxiv.org/abs/2006.11239
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ._tensor import take_rows
from .diffusion import GaussianDiffusion
from .distributions import Gaussian

__all__ = ["Draws", "Noise", "Terms", "chain", "independent", "prior", "steps"]

Noise = Callable[[Tensor], Tensor]
"""Standard normal noise of a tensor's shape, dtype and device: ``torch.randn_like``, or a test's nodes."""


class Terms(NamedTuple):
    """A term of the bound by its analytic KL and by the log-ratio log q - log p of a draw; nats, float64, on the CPU.

    Both ``[N]``, or ``[R, B, columns]``. At t = 1, where x_0 is observed, both are -log p(x_0 | x_1).
    """

    analytic: Tensor
    log_ratio: Tensor


@dataclass(frozen=True)
class Draws:
    """Terms of B examples in R repeats.

    Attributes:
        terms: each ``[R, B, columns]``.
        evaluations: network evaluations per example and repeat.
        seconds: wall time per example and repeat.
    """

    terms: Terms
    evaluations: float
    seconds: float


def prior(diffusion: GaussianDiffusion, x0: Tensor, noise: Noise = torch.randn_like) -> tuple[Tensor, Terms]:
    """A draw of x_T, and L_T; no network.

    Args:
        x0: ``[N, *event]``.
        noise: where the noise comes from.

    Returns:
        x_T, ``[N, *event]``; the term, ``[N]``.
    """
    q = diffusion.forward_process
    return _draw(q.marginal(x0, diffusion.steps), q.prior(x0.shape, x0), noise)


def steps(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    t: Tensor,
    noise: Noise = torch.randn_like,
    x_t: Tensor | None = None,
    **cond: Tensor,
) -> Terms:
    """One term L_{t-1} per example, from one network call.

    Args:
        x0: ``[N, *event]``.
        t: integers 1..T, ``[N]``.
        noise: called for x_t, then for x_s.
        x_t: ``[N, *event]`` in place of a draw from q(x_t | x_0).
        cond: passed to the network, ``[N, ...]``.

    Returns:
        The terms, ``[N]``.
    """
    q, p = diffusion.forward_process, diffusion.reverse_kernel
    if x_t is None:
        x_t = _sample(q.marginal(x0, t), noise)
    law_of_x_s, law_of_x_0 = p.laws(p.predict(x_t, t, **cond), x_t, t)
    cost = -law_of_x_0.log_prob(x0).double().cpu()
    if law_of_x_s is None:
        return Terms(cost, cost)
    _, kl = _draw(q.posterior(x0, x_t, t.clamp(min=2)), law_of_x_s, noise)  # rows at t = 1 are put aside
    last = (t == 1).cpu()
    return Terms(*(torch.where(last, cost, value) for value in kl))


def chain(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    repeats: int,
    noise: Noise = torch.randn_like,
    batch_size: int = 256,
    advance: Callable[[int], object] = lambda n: None,
    **cond: Tensor,
) -> Draws:
    """Every term along chains x_T, ..., x_1 of the guide, R for each example.

    Args:
        x0: ``[B, *event]``.
        repeats: R.
        noise: called for x_T, then for x_{T-1}, ..., x_1, for each batch of chains.
        batch_size: chains per network call; a chain's row is repeat-major.
        advance: called with the number of network evaluations just made.
        cond: passed to the network, a row per example.
    """
    q, p, T = diffusion.forward_process, diffusion.reverse_kernel, diffusion.steps

    def walk(x0: Tensor, cond: dict[str, Tensor]) -> Terms:
        x_t, last = prior(diffusion, x0, noise)
        columns = [last]
        for t in range(T, 1, -1):
            x_t, term = _draw(q.posterior(x0, x_t, t), p(x_t, t, **cond), noise)
            columns.append(term)
            advance(len(x0))
        cost = -p.decode(x_t, **cond).log_prob(x0).double().cpu()
        advance(len(x0))
        return Terms(*(torch.stack(z[::-1], -1) for z in zip(*columns, (cost, cost), strict=True)))

    return _gather(diffusion, x0, repeats, batch_size, T, walk, cond)


def independent(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    repeats: int,
    noise: Noise = torch.randn_like,
    batch_size: int = 256,
    advance: Callable[[int], object] = lambda n: None,
    **cond: Tensor,
) -> Draws:
    """Every term with each x_t drawn on its own, as guided-diffusion's ``calc_bpd_loop`` does; arguments of :func:`chain`."""
    T = diffusion.steps

    def loop(x0: Tensor, cond: dict[str, Tensor]) -> Terms:
        columns = []
        for t in range(1, T + 1):
            columns.append(steps(diffusion, x0, torch.full((len(x0),), t, device=x0.device), noise, **cond))
            advance(len(x0))
        columns.append(prior(diffusion, x0, noise)[1])
        return Terms(*(torch.stack(z, -1) for z in zip(*columns, strict=True)))

    return _gather(diffusion, x0, repeats, batch_size, T, loop, cond)


def _gather(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    repeats: int,
    batch_size: int,
    evaluations: int,
    function: Callable[[Tensor, dict[str, Tensor]], Terms],
    cond: dict[str, Tensor],
) -> Draws:
    """Calls of ``function`` on ``repeats`` copies of the examples, in batches."""
    started = time.perf_counter()
    found = []
    with diffusion.evaluating(), torch.no_grad():
        rows = torch.arange(repeats * len(x0), device=x0.device) % len(x0)
        for part in rows.split(batch_size):
            found.append(function(x0[part], take_rows(diffusion.net, cond, part, len(x0))))
    terms = Terms(*(torch.cat(z).unflatten(0, (repeats, len(x0))) for z in zip(*found, strict=True)))
    return Draws(terms, evaluations, (time.perf_counter() - started) / (repeats * len(x0)))


def _sample(law: Gaussian, noise: Noise) -> Tensor:
    return law.mean + law.stddev * noise(law.mean)


def _draw(q: Gaussian, p: Gaussian, noise: Noise) -> tuple[Tensor, Terms]:
    x = _sample(q, noise)
    log_ratio = q.log_prob(x) - p.log_prob(x)
    return x, Terms(kl_divergence(q, p).double().cpu(), log_ratio.double().cpu())
