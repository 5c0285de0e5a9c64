r"""The forward process q: noise is added, nothing is learned.

.. math::

    q(x_t \mid x_0) &= \mathcal N(\alpha_t x_0,\ \sigma_t^2) && \text{marginal: the rule} \\
    q(x_t \mid x_s) &= \mathcal N(\tfrac{\alpha_t}{\alpha_s} x_s,\ \sigma_t^2 c) && \text{transition} \\
    q(x_s \mid x_t, x_0) &= \mathcal N(a\, x_0 + b\, x_t,\ \sigma_s^2 c) && \text{posterior: the answer key}

for :math:`s < t`, with :math:`c = 1 - \mathrm{SNR}_t / \mathrm{SNR}_s`, :math:`a = \alpha_s c` and
:math:`b = \frac{\alpha_s}{\alpha_t} (1 - c)`. A draw from any of them is ``.rsample()``,
:math:`\text{mean} + \text{std} \cdot \epsilon`, through which gradients flow.

**In continuous time** the step from x_t is infinitesimal. In units of its own standard deviation and less what x_t says of it, its
law is :math:`\mathcal N(\sqrt{\mathrm{SNR}_s - \mathrm{SNR}_t}\, x_0, 1)`; per unit of time that is

.. math:: q(x_s \mid x_t, x_0) = \mathcal N(\sqrt{-d\,\mathrm{SNR} / dt}\; x_0,\ 1),

a = :math:`\sqrt{-d\,\mathrm{SNR}/dt}` and b = 0, whose divergence from the same law of :math:`\hat x_0` is the limit of T times
that of one of T steps: :math:`-\tfrac12 \frac{d\,\mathrm{SNR}}{dt} |x_0 - \hat x_0|^2`.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 2, 4, 6, 7. https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), eq. 17 and appendices A, D. https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ._tensor import append_dims
from .distributions import Gaussian
from .errors import ProgramError
from .schedules import Schedule

__all__ = ["ForwardProcess"]


class ForwardProcess(nn.Module):
    """q of a Gaussian diffusion, as Pyro distributions.

    Args:
        schedule: the noise schedule.
        event_dim: number of event dims of x; None takes all dims of x beyond those of t.

    Shapes, for all methods: ``x`` is ``[*batch, *event]`` and ``t`` an integer or an integer tensor that broadcasts
    with ``batch``, in 1..T; in continuous time a float or a floating tensor, in [0, 1]. The distributions have batch shape
    ``batch`` and the event's event shape.
    """

    def __init__(self, schedule: Schedule, event_dim: int | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        self.event_dim = event_dim

    def _steps(self, x: Tensor, *times: int | Tensor) -> tuple[int, list[Tensor]]:
        """The number of event dims of x, and each time's log-SNR (float64), shaped to broadcast over x."""
        ts = [torch.as_tensor(t, device=x.device) for t in times]
        event_dim = x.dim() - ts[-1].dim() if self.event_dim is None else self.event_dim
        appended = event_dim - self.schedule.event_dim
        return event_dim, [append_dims(self.schedule.log_snr(t), appended) for t in ts]

    def marginal(self, x0: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_t \mid x_0) = \mathcal N(\alpha_t x_0, \sigma_t^2)`, DDPM eq. 4; guided-diffusion's ``q_mean_variance``."""
        event_dim, (log_snr,) = self._steps(x0, t)
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        return Gaussian(alpha.to(x0.dtype) * x0, sigma.to(x0.dtype)).to_event(event_dim)

    def transition(self, x_s: Tensor, s: int | Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_t \mid x_s)` for :math:`0 \le s < t`; DDPM eq. 2 when s = t - 1 (then :math:`\sigma_t^2 c = \beta_t`)."""
        s, t = torch.as_tensor(s, device=x_s.device), torch.as_tensor(t, device=x_s.device)
        if s.device.type == "cpu" and not (s < t).all():
            raise ProgramError(f"transition goes from s to a later t, not from {s.tolist()} to {t.tolist()}")
        event_dim, (log_snr_s, log_snr_t) = self._steps(x_s, s, t)
        ratio = (log_snr_t.sigmoid() / log_snr_s.sigmoid()).sqrt()
        c = -torch.expm1(log_snr_t - log_snr_s)
        std = ((-log_snr_t).sigmoid() * c).sqrt()
        return Gaussian(ratio.to(x_s.dtype) * x_s, std.to(x_s.dtype)).to_event(event_dim)

    def posterior(self, x0: Tensor, x_t: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_{t-1} \mid x_t, x_0)`, DDPM eq. 6-7; guided-diffusion's ``q_posterior_mean_variance``.

        Args:
            x0: data.
            x_t: the noisier state.
            t: step in 2..T. At t = 1 the law is a point mass at x_0, which has no density. In continuous time any t in [0, 1],
                and the law that of the standardised step above.

        Raises:
            ProgramError: some t is below 2 (checked where reading t does not wait for a device).
        """
        t = torch.as_tensor(t, device=x_t.device)
        if t.device.type == "cpu" and not torch.equal(t, self.with_x_s(t)):
            raise ProgramError("q(x_0 | x_1, x_0) is a point mass: posterior needs t >= 2; p(x_0 | x_1) is the decoder")
        event_dim, a, b, small, _ = self.posterior_terms(x_t, t)
        return Gaussian(a * x0 + b * x_t, small.sqrt().to(x_t.dtype)).to_event(event_dim)

    def with_x_s(self, t: Tensor) -> Tensor:
        """``t``, with 2 in the place of 1, which has no x_s but x_0; in continuous time every t has one."""
        return t if self.schedule.continuous else t.clamp(min=2)

    def posterior_terms(self, x_t: Tensor, t: int | Tensor) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        r"""What :math:`q(x_{t-1} \mid x_t, x_0)` is made of, shaped to broadcast over x_t.

        Returns:
            The number of event dims; a and b of the mean :math:`a x_0 + b x_t`, in the dtype of x_t; its variance
            :math:`\sigma_s^2 c` (DDPM's :math:`\tilde\beta_t`) and :math:`\sigma_t^2 c = \beta_t`, both in float64.
        """
        if self.schedule.continuous:
            t = torch.as_tensor(t, device=x_t.device)
            event_dim, (log_snr,) = self._steps(x_t, t)
            slope = append_dims(self.schedule.slope(t), event_dim - self.schedule.event_dim)
            a, one = (log_snr.exp() * -slope).sqrt().to(x_t.dtype), torch.ones_like(log_snr)
            return event_dim, a, torch.zeros_like(a), one, one
        event_dim, (log_snr_s, log_snr_t) = self._steps(x_t, torch.as_tensor(t) - 1, t)
        log_ratio = log_snr_t - log_snr_s
        c = -torch.expm1(log_ratio)
        alpha_s, alpha_t = log_snr_s.sigmoid().sqrt(), log_snr_t.sigmoid().sqrt()
        a, b = alpha_s * c, alpha_s / alpha_t * log_ratio.exp()
        small, large = (-log_snr_s).sigmoid() * c, (-log_snr_t).sigmoid() * c
        return event_dim, a.to(x_t.dtype), b.to(x_t.dtype), small, large

    def prior(self, shape: torch.Size | tuple[int, ...], like: Tensor | None = None) -> TorchDistribution:
        r""":math:`p(x_T) = \mathcal N(0, 1)`.

        Args:
            shape: ``[*batch, *event]``; all of it is event when ``event_dim`` is None.
            like: a tensor whose dtype and device to take (default: torch's).
        """
        event_dim = len(shape) if self.event_dim is None else self.event_dim
        zero = torch.zeros((), dtype=None if like is None else like.dtype, device=None if like is None else like.device)
        return Gaussian(zero.expand(shape), zero + 1).to_event(event_dim)
