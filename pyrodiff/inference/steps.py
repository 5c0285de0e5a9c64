r"""What a finite number of steps does to a posterior.

With the bound :math:`b_T(x)` of T steps as the prior, the posterior is that of :math:`e^{b_T(x)}`. As T grows :math:`b_T` rises to
the bound of continuous time, and the gap :math:`g = b_\infty - b_T` is what was lost,

.. math::

    g(x) = \sum_{t=2}^{T} \Big( E\, KL(q(x_s \mid x_t, x) \,\|\, p(x_s \mid x_t))
        - \tfrac12 \int_{SNR_t}^{SNR_s} E \lVert x - \hat x_0(x_\lambda) \rVert^2 \, d\, SNR \Big),

prior term and reconstruction being common. A constant gap costs evidence alone; one that grows with x moves the posterior: to first
order, putting :math:`e^{g}` back shifts its mean by :math:`\mathrm{Cov}(x, g)`.

Both terms are estimated with one draw of the noise, x_t and :math:`x_\lambda` being nearly the same state. The gap is that of the
bounds. It says nothing about the network's own error, which both have in common.

References:
    Variational Diffusion Models (Kingma et al., 2021), eq. 13-15 and section 4.2. https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import draws
from .._tensor import check_event, take_rows
from ..elbo import Estimate
from ..errors import OptionError, ShapeError
from ..likelihood.estimate import seeded
from ..likelihood.information import denoising_error
from .prior import DiffusionPrior

__all__ = ["StepsBias", "steps_bias"]


@dataclass(frozen=True)
class StepsBias:
    """The bound of T steps against that of infinitely many, at draws of a posterior.

    Attributes:
        steps: T.
        gap: by how much the bound of T steps is lower, nats, ``[R, B]``; independent over R. Estimates of bounds: the exponential of
            a draw is unbiased for nothing, and no importance weight.
        shift: of the posterior's mean, if the gap were made up for, to first order, ``[*event]``.
        shift_se: its standard error.
        scale: the draws' standard deviation, what the shift is to be held against.
    """

    steps: int
    gap: Tensor = field(repr=False)
    shift: Tensor
    shift_se: Tensor
    scale: Tensor = field(repr=False)

    @property
    def nats(self) -> Estimate:
        """The mean gap, with its standard errors over draws and over noise."""
        return Estimate.of(self.gap)

    def __str__(self) -> str:
        relative = (self.shift / self.scale).abs().flatten().nan_to_num(0.0)  # 0 of an element that does not vary
        worst = int(relative.argmax())
        se = (self.shift_se / self.scale).flatten()[worst]
        return (
            f"{self.steps} steps: the bound is {self.nats.mean:.3f} nats (± {self.nats.se_examples:.3f} over draws, "
            f"± {self.nats.se_noise:.3f} over noise) below that of infinitely many; this moves the posterior's mean by up to "
            f"{relative[worst]:.3f} (± {se:.3f}) of its standard deviation"
        )


def steps_bias(
    prior: DiffusionPrior,
    x: Tensor,
    *,
    timesteps: int | None = None,
    repeats: int = 4,
    seed: int = 0,
    batch_size: int = 256,
) -> StepsBias:
    """How far the bound of T steps is from that of infinitely many, where the posterior is.

    Args:
        prior: of the posterior.
        x: draws of the posterior, ``[B, *event]`` with B >= 2; the prior's conditioning values hold for all, or are ``[B]``.
        timesteps: how many of the T - 1 steps are asked per draw and repeat, spread evenly; None: all. Each takes two network
            evaluations.
        repeats: R.
        seed: of the noise; the global generators end as they began.
        batch_size: rows of a network call.

    Raises:
        OptionError: ``law="flow"``; continuous time, where nothing is lost; fewer than two steps; a schedule per element or
            ``prediction="previous"``, which have no bound of continuous time.
        ShapeError: fewer than two draws.
    """
    diffusion, schedule = prior.diffusion, prior.diffusion.schedule
    check_event("x", x, prior.event_shape)
    if prior.law != "chain":
        raise OptionError(f"law={prior.law!r} has a density and no bound: steps_bias is of a chain's")
    if schedule.continuous or diffusion.steps < 2 or schedule.event_dim:
        raise OptionError(
            f"schedule of {diffusion.steps} steps with event_dim={schedule.event_dim!r}: a number of steps, 2 or more, and one "
            "log-SNR for all elements are compared with infinitely many"
        )
    if repeats < 1 or batch_size < 1 or (timesteps is not None and timesteps < 1):
        raise OptionError(
            f"timesteps={timesteps!r}, repeats={repeats!r} and batch_size={batch_size!r} must be at least 1"
        )
    if x.dim() != prior.event_dim + 1 or len(x) < 2:
        raise ShapeError(f"x has shape {list(x.shape)}, not [B, *{list(prior.event_shape)}] with B >= 2")
    x, between = x.detach(), diffusion.steps - 1
    shape = (repeats, len(x), timesteps or between)
    cond, noise = prior.rows(x.shape[:1]), seeded(seed, x)
    uniform = torch.Generator().manual_seed(seed + 1)  # another one: of one seed the numbers would be of the same bits
    offset = torch.rand(repeats, len(x), 1, dtype=torch.float64, generator=uniform, device="cpu")
    t = ((torch.arange(shape[-1], device="cpu") + offset) / shape[-1] * between).long().clamp(max=between - 1) + 2
    rows = torch.arange(len(x), device="cpu")[:, None].expand(shape).flatten()
    found = []
    with diffusion.evaluating(), torch.no_grad():
        for row, at in zip(rows.split(batch_size), t.flatten().split(batch_size), strict=True):
            here, given = x[row], take_rows(diffusion.net, cond, row, len(x))
            eps = noise(here)
            below, above = schedule.log_snr(at).exp(), schedule.log_snr(at - 1).exp()
            snr = torch.lerp(below, above, torch.rand(len(row), dtype=torch.float64, generator=uniform, device="cpu"))
            kl = draws.steps(diffusion, here, at.to(x.device), lambda like, eps=eps: eps, **given).analytic  # type: ignore[misc]
            error = denoising_error(diffusion, here, snr.log().to(x.device), lambda like, eps=eps: eps, **given)  # type: ignore[misc]
            found.append(kl - error / snr * (above - below))
    gap = torch.cat(found).reshape(shape).mean(-1) * between
    mean = gap.mean(0)
    products = (x - x.mean(0)).double().cpu() * (mean - mean.mean()).reshape(-1, *(1,) * prior.event_dim)
    return StepsBias(
        steps=diffusion.steps,
        gap=gap,
        shift=products.sum(0) / (len(x) - 1),
        shift_se=products.std(0) / math.sqrt(len(x)),
        scale=x.double().cpu().std(0),
    )
