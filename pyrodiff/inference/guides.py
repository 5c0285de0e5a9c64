"""A guide made of the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import Normal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from .._tensor import append_dims, check_event
from .prior import DiffusionPrior

__all__ = ["DenoiserGuide"]


class DenoiserGuide(PyroModule):
    r"""An amortised guide, :math:`q(x \mid y) = N(\hat x_0(\alpha\, r(y), \lambda),\ s^2)`: the denoiser's answer to a rough estimate r(y).

    Where y = x + noise is the estimate itself and the network exact, :math:`\lambda` minus the log of the noise's variance gives
    the posterior's mean for every y. Elsewhere :math:`\lambda` and s are what two learned numbers can do: as a start, or beside
    the amortisation over many y.

    Call: ``guide(*args, **kwargs)`` with the model's arguments, in the plates of the model's site; a part for ``AutoGuideList`` too.

    Args:
        prior: the site's prior (of either law).
        name: the site.
        estimate: the model's arguments to a rough estimate of x, ``[*batch, *event]``.
        log_snr: where :math:`\lambda` starts.
        scale: where s starts.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        name: str,
        estimate: Callable[..., Tensor],
        log_snr: float = 0.0,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.__dict__["prior"] = prior
        self.name, self.estimate = name, estimate
        self.log_snr = nn.Parameter(torch.tensor(float(log_snr)))
        self.scale: Any = PyroParam(torch.tensor(float(scale)), constraints.positive)

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draws x; returns it by name."""
        rough = self.estimate(*args, **kwargs)
        check_event("the estimate", rough, self.prior.event_shape)
        kernel = self.prior.diffusion.reverse_kernel
        log_snr = append_dims(self.log_snr, kernel.schedule.event_dim)
        loc = kernel.denoise_at(self.log_snr.sigmoid().sqrt().to(rough) * rough, log_snr, **self.prior.cond)
        return {self.name: pyro.sample(self.name, Normal(loc, self.scale).to_event(self.prior.event_dim))}
