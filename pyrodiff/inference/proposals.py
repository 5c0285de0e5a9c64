r"""Proposals of sequential Monte Carlo: how particles move from x_t to x_s, s = t - 1, and what that does to their weights.

The target is the model's chain times the likelihood, :math:`p(x_T) \prod_t p(x_s \mid x_t)\, p(y \mid x_0)`. Between the two
ends stand twists :math:`\psi_t(x_t) > 0`, guesses of :math:`p(y \mid x_t)`, and a particle that moves by q has its weight
multiplied by

.. math:: \frac{p(x_s \mid x_t)\, \psi_s(x_s)}{q(x_s \mid x_t)\, \psi_t(x_t)}, \qquad \psi_0(x_0) = p(y \mid x_0).

Whatever the twists and q are, as long as they are positive, the mean weight has the mean :math:`Z = p(y)`: they cancel but for
the last. How good they are decides how much it varies. A twist belongs to its particle, and is resampled with it.

* :class:`Bootstrap`: :math:`\psi_t = 1`, q = p.
* :class:`Twisted`: a twist of :math:`x_t` and :math:`\hat x_0(x_t)`, by default :math:`p(y \mid \hat x_0(x_t))`; q is p with its
  mean moved by the variance times the twist's gradient. (The variance is p's own, which makes densities ratios of means alone.)
* :class:`MCGDiff`: for y = A x_0 + noise, :math:`\psi_s(x_s) = N(y;\, A \bar x,\ v A A^\top + \sigma_y^2)`, x_0 given x_s being taken as
  :math:`N(\bar x, v)`, which it is for data :math:`N(0, \tau^2)`; in the paper :math:`\tau = \infty`, :math:`\bar x = x_s / \alpha_s` and
  :math:`v = \sigma_s^2 / \alpha_s^2`. q is the best for it, :math:`q \propto p\, \psi_s`, and the twist at x_t is
  :math:`\int p(x_s \mid x_t)\, \psi_s(x_s)\, dx_s`, so that particles are weighted before they move.

References:
    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), section 3 (TDS).
    https://arxiv.org/abs/2306.17775
    Monte Carlo Guided Diffusion for Bayesian Linear Inverse Problems (Cardoso et al., 2023), section 2 (noise-free: the same
    twist; with noise, theirs waits for a step that matches the noise, and this one adds it). https://arxiv.org/abs/2308.07983
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..errors import DataError, OptionError, ProgramError, ShapeError
from ..reverse import Prediction, ReverseKernel
from .operators import LinearGaussian, log_normal

__all__ = ["PROPOSALS", "Bootstrap", "Likelihood", "Look", "MCGDiff", "Twist", "Twisted", "per_particle"]

Likelihood = Callable[[Tensor], Tensor]
"""``log_likelihood(x0)``: log p(y | x_0) of ``[N, *event]``, ``[N]``."""

Twist = Callable[[Tensor, Tensor, Tensor], Tensor]
r"""``twist(x_t, x0_hat, log_snr)``: the log of a guess of p(y | x_t), ``[N]``, differentiable; log_snr is that of t."""


class Look(NamedTuple):
    """What is known of particles at x_t before they move; a row each, so that resampling is one gather.

    Attributes:
        mean, std: of p(x_s | x_t), ``[N, *event]``.
        shift: of the proposal's mean, in standard deviations, ``[N, *event]``.
        log_twist: ``[N]``, float64.
    """

    mean: Tensor
    std: Tensor
    shift: Tensor
    log_twist: Tensor

    def take(self, rows: Tensor) -> Look:
        """What is known of some of the particles."""
        return Look(*(value[rows] for value in self))


class Bootstrap:
    """Particles move by the model itself, and are weighted at the end.

    Args:
        kernel: p; its last step is the Normal behind the decoder.
        log_likelihood: of x_0.
        cond: passed to the network.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, kernel: ReverseKernel, log_likelihood: Likelihood, cond: dict[str, Any]) -> None:
        self.kernel, self.log_likelihood, self.cond = kernel, log_likelihood, cond

    def begin(self, like: Tensor) -> Look:
        """Before x_T is drawn; ``like``: ``[N, *event]``."""
        return self._toward(torch.zeros_like(like), torch.ones_like(like), self.kernel.schedule.length)

    def look(self, x_t: Tensor, t: int) -> Look:
        """Before x_s is drawn, from one network call."""
        law: TorchDistribution = self.kernel(x_t, t, **self.cond)
        return self._toward(law.mean, law.stddev, t - 1)

    def _toward(self, mean: Tensor, std: Tensor, s: int) -> Look:
        return Look(mean, std, torch.zeros_like(mean), mean.new_zeros(len(mean), dtype=torch.float64))

    def move(self, look: Look, noise: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """The x_s that the noise makes, and what is added to the log-weights then: the twist at x_s, if s > 0, comes later."""
        log_ratio = -(look.shift * (noise + look.shift / 2)).double().flatten(1).sum(1)  # log p - log q
        return look.mean + look.std * (noise + look.shift), log_ratio - look.log_twist

    def noise(self, look: Look, x_s: Tensor, s: int) -> Tensor:
        """The noise that makes x_s."""
        return (x_s - look.mean) / look.std - look.shift

    def finish(self, x0: Tensor) -> Tensor:
        """What is added to the log-weights for the likelihood, ``[N]``."""
        return per_particle("log_likelihood", self.log_likelihood(x0), x0).double()


class Twisted(Bootstrap):
    """The gradient of a twist moves the mean.

    Args:
        kernel, log_likelihood, cond: see :class:`Bootstrap`.
        twist: None: the likelihood at x0_hat.
    """

    OPTIONS = ("twist",)

    def __init__(
        self, kernel: ReverseKernel, log_likelihood: Likelihood, cond: dict[str, Any], twist: Twist | None = None
    ) -> None:
        super().__init__(kernel, log_likelihood, cond)
        self.twist = twist

    def look(self, x_t: Tensor, t: int) -> Look:
        """See :meth:`Bootstrap.look`; one backward pass more."""
        log_snr = self.kernel.schedule.log_snr(torch.tensor(t, device=x_t.device))
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            predicted = self.kernel.predict(x, t, **self.cond)
            x0_hat = self.kernel.clipped(predicted.x0_hat)
            log_twist = self.log_likelihood(x0_hat) if self.twist is None else self.twist(x, x0_hat, log_snr)
            per_particle("the twist", log_twist, x_t)
            if not log_twist.requires_grad:
                raise ProgramError('the twist is not differentiable with respect to x_t; take proposal="bootstrap"')
            (gradient,) = torch.autograd.grad(log_twist.sum(), x)
        dead = int((log_twist == -torch.inf).sum())
        if dead:
            raise DataError(
                f"the twist is 0 for {dead} of {len(x_t)} particles at t={t}: the likelihood has gaps, which x0_hat may fall "
                'into and x_0 leave; take proposal="bootstrap", or a twist that is positive everywhere'
            )
        law = self.kernel.law(Prediction(*(None if z is None else z.detach() for z in predicted)), x_t, t)  # type: ignore[arg-type]
        return Look(law.mean, law.stddev, law.stddev * gradient, log_twist.detach().double())


class MCGDiff(Bootstrap):
    """The best proposal for one step towards what a linear-Gaussian observation says.

    Args:
        kernel, log_likelihood, cond: see :class:`Bootstrap`.
        data_std: of x_0 about 0, as the twist takes it; infinite: nothing is known of it, as the paper has it.

    Raises:
        OptionError: another likelihood; steps whose variance differs between the elements of an event; ``data_std`` not positive.
    """

    OPTIONS = ("data_std",)
    log_likelihood: LinearGaussian

    def __init__(
        self, kernel: ReverseKernel, log_likelihood: Likelihood, cond: dict[str, Any], data_std: float = math.inf
    ) -> None:
        super().__init__(kernel, log_likelihood, cond)
        if not isinstance(log_likelihood, LinearGaussian):
            raise OptionError('proposal="mcgdiff" takes a LinearGaussian observation; take "twisted" or "bootstrap"')
        if kernel.learned_variance or kernel.schedule.event_dim:
            raise OptionError('proposal="mcgdiff" takes steps of one variance for all elements; take "twisted"')
        if not data_std > 0:
            raise OptionError(f"data_std={data_std!r} is not positive")
        self.data_std, self.target, self.outside = data_std, log_likelihood.target, log_likelihood.outside

    def _terms(self, std: Tensor, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of log psi_s in the operator's coordinates: the slope, the variance given x_s, and given x_t; float64."""
        log_snr = self.kernel.schedule.log_snr(torch.tensor(s, device=std.device))
        singular, noise = self.log_likelihood.singular_values, self.log_likelihood.noise_std
        ab, om = log_snr.sigmoid(), (-log_snr).sigmoid()
        shrink = 1 / (ab + om / self.data_std**2)  # x_0 given x_s: mean alpha shrink x_s, variance sigma^2 shrink
        slope, variance = singular * ab.sqrt() * shrink, singular**2 * om * shrink + noise**2
        return slope, variance, (slope * std.flatten(1)[:, :1].double()) ** 2 + variance

    def _toward(self, mean: Tensor, std: Tensor, s: int) -> Look:
        operator, (slope, _, total) = self.log_likelihood.operator, self._terms(std, s)
        error = self.target - slope * operator.to_rows(mean).double()
        shift = std * operator.from_rows((slope * error / total).to(mean))
        return Look(mean, std, shift, self.outside + log_normal(error, total))

    def move(self, look: Look, noise: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Bootstrap.move`: log p - log q - log psi_t = -log psi_s, which the likelihood cancels at s = 0."""
        operator, (slope, variance, total) = self.log_likelihood.operator, self._terms(look.std, s)
        squeeze = (variance / total).sqrt() - 1  # of the noise, where y says something of x_s
        noise = noise + operator.from_rows(squeeze.to(noise) * operator.to_rows(noise))
        x_s = look.mean + look.std * (noise + look.shift)
        if s == 0:
            return x_s, torch.zeros_like(look.log_twist)
        return x_s, -self.outside - log_normal(self.target - slope * operator.to_rows(x_s).double(), variance)

    def noise(self, look: Look, x_s: Tensor, s: int) -> Tensor:
        """See :meth:`Bootstrap.noise`."""
        operator = self.log_likelihood.operator
        _, variance, total = self._terms(look.std, s)
        noise = (x_s - look.mean) / look.std - look.shift
        stretch = (total / variance).sqrt() - 1
        return noise + operator.from_rows(stretch.to(noise) * operator.to_rows(noise))

    def finish(self, x0: Tensor) -> Tensor:
        """See :meth:`Bootstrap.finish`: the likelihood is in the last twist already."""
        return x0.new_zeros(len(x0), dtype=torch.float64)


PROPOSALS: dict[str, type[Bootstrap]] = {"bootstrap": Bootstrap, "mcgdiff": MCGDiff, "twisted": Twisted}


def per_particle(name: str, values: Tensor, x: Tensor) -> Tensor:
    """The values, one for each row of x.

    Raises:
        ShapeError: they are not.
    """
    if not isinstance(values, Tensor) or values.shape != x.shape[:1] or not values.is_floating_point():
        found = f"shape {list(values.shape)}, {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(f"{name} returns {found}, not a float for each of {len(x)} particles, [{len(x)}]")
    return values
