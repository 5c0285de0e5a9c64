"""Drawing timesteps: which terms of the bound a training step estimates.

A bound is a sum over t; one random t per example, weighted by 1 / p(t), estimates it without bias. The programs of
:class:`~pyrodiff.GaussianDiffusion` take ``t`` and that ``weight`` (default: right for uniform t).

In continuous time, ``steps=math.inf``, t is 0 exactly with probability 1/8, for the reconstruction, and else uniform on (0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import OptionError, ShapeError
from .schedules import SHARE_OF_0

__all__ = ["ImportanceSampler", "low_discrepancy", "uniform"]


def _check(batch: int, steps: int) -> None:
    if batch < 1 or steps < 1:
        raise OptionError(f"batch={batch!r} and steps={steps!r} must be at least 1")


def uniform(
    batch: int, steps: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Independent uniform timesteps.

    Args:
        batch: number of examples B.
        steps: number of steps T, or ``math.inf``.
        device: where to make them.
        generator: source of randomness, on that device (default: torch's).

    Returns:
        int64 ``[B]``, values in 1..T; in continuous time float64, values in [0, 1].
    """
    _check(batch, steps)
    if steps == math.inf:
        return _mixed(torch.rand(batch, device=device, generator=generator, dtype=torch.float64))
    return torch.randint(1, steps + 1, (batch,), device=device, generator=generator)


def low_discrepancy(
    batch: int, steps: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Timesteps spread evenly over 1..T from one random offset: each is uniform, together they cover the range.

    The batch then estimates the bound with far less variance than :func:`uniform`. Examples are not matched to timesteps at
    random: shuffle the data, as every training loop does.

    Args:
        batch, steps, device, generator: see :func:`uniform`.

    Returns:
        ``[batch]``, as :func:`uniform`.

    References:
        Variational Diffusion Models (Kingma et al., 2021), appendix I.1. https://arxiv.org/abs/2107.00630
    """
    _check(batch, steps)
    offset = torch.rand((), device=device, generator=generator, dtype=torch.float64)
    u = (offset + torch.arange(batch, device=device, dtype=torch.float64) / batch) % 1
    if steps == math.inf:
        return _mixed(u)
    return (u * steps).long().clamp(max=steps - 1) + 1


def _mixed(u: Tensor) -> Tensor:
    """Times in [0, 1] from numbers in [0, 1): 0 for a share of them, the rest stretched over (0, 1]."""
    return ((1 - u - SHARE_OF_0) / (1 - SHARE_OF_0)).clamp(min=0)


class ImportanceSampler:
    r"""Timesteps drawn in proportion to :math:`\sqrt{E[L_t^2]}`, from a short history of each t's losses.

    Uniform until every t has a full history; then :math:`p(t)` mixes in a little of the uniform, so that no weight is
    unbounded. The weights 1 / p(t) keep the bound's estimate unbiased.

    Args:
        steps: number of steps T.
        history: losses kept per timestep.
        uniform_share: share of the uniform distribution.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), section 3.3, eq. 18.
        https://arxiv.org/abs/2102.09672
    """

    def __init__(self, steps: int, history: int = 10, uniform_share: float = 0.001) -> None:
        _check(1, steps)
        if steps == math.inf:
            raise OptionError(
                "steps=inf: importance sampling keeps a history of each t; take low_discrepancy, and learn the schedule"
            )
        if history < 1 or not 0 < uniform_share <= 1:
            raise OptionError(f"history={history!r} must be at least 1 and uniform_share={uniform_share!r} in (0, 1]")
        self.steps, self.history, self.uniform_share = steps, history, uniform_share
        self._losses = torch.zeros(steps, history, dtype=torch.float64, device="cpu")
        self._seen = torch.zeros(steps, dtype=torch.int64, device="cpu")

    @property
    def probabilities(self) -> Tensor:
        """p(t) for t = 1..T: float64 ``[T]``, summing to 1."""
        uniform = torch.full((self.steps,), 1 / self.steps, dtype=torch.float64, device="cpu")
        if (self._seen < self.history).any():
            return uniform
        p = self._losses.square().mean(1).sqrt()
        if not p.sum() > 0:
            return uniform
        return (1 - self.uniform_share) * p / p.sum() + self.uniform_share * uniform

    def sample(
        self, batch: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw timesteps.

        Args:
            batch: number of examples B.
            device: where to put the result.
            generator: source of randomness, on the CPU.

        Returns:
            ``t``, int64 ``[B]``, values in 1..T; and ``weight`` = 1 / p(t), float32 ``[B]``.
        """
        _check(batch, self.steps)
        p = self.probabilities
        index = torch.multinomial(p, batch, replacement=True, generator=generator)
        return (index + 1).to(device), (1 / p[index]).float().to(device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember losses.

        Args:
            t: int64 ``[B]``, values in 1..T.
            losses: the terms L_t at those timesteps, unweighted, nats, ``[B]``; non-finite ones are left out.
        """
        if t.shape != losses.shape or t.dim() != 1:
            raise ShapeError(f"t has shape {list(t.shape)} and losses {list(losses.shape)}; both must be [B]")
        if t.numel() and not 1 <= t.min() <= t.max() <= self.steps:
            raise ShapeError(f"t has values in {int(t.min())}..{int(t.max())}; timesteps are in 1..{self.steps}")
        for i, loss in zip((t - 1).tolist(), losses.detach().double().tolist(), strict=True):
            if loss - loss == 0:  # finite
                self._losses[i, self._seen[i] % self.history] = loss
                self._seen[i] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The history, for a checkpoint."""
        return {"losses": self._losses.clone(), "seen": self._seen.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        if state["losses"].shape != self._losses.shape:
            shape = list(self._losses.shape)
            raise ShapeError(f"sampler history has shape {list(state['losses'].shape)}, not {shape} (steps, history)")
        self._losses.copy_(state["losses"])
        self._seen.copy_(state["seen"])
