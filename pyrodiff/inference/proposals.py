r"""Proposals of sequential Monte Carlo: how particles move from x_t to x_s, s = t - 1, and what that does to their weights.

The target is the model's chain times the likelihood, :math:`p(x_T) \prod_t p(x_s \mid x_t)\, p(y \mid x_0)`. Between the two
ends stand twists :math:`\psi_t(x_t) > 0`, guesses of :math:`p(y \mid x_t)`, and a particle that moves by q has its weight
multiplied by

.. math:: \frac{p(x_s \mid x_t)\, \psi_s(x_s)}{q(x_s \mid x_t)\, \psi_t(x_t)}, \qquad \psi_0(x_0) = p(y \mid x_0).

Whatever the twists and q are, as long as they are positive, the mean weight has the mean :math:`Z = p(y)`: they cancel but for
the last. How good they are decides how much it varies. A twist belongs to its particle, and is resampled with it.

* :class:`Bootstrap`: :math:`\psi_t = 1`, q = p; or p with the mean of classifier-free guidance, p being the conditional chain's.
* :class:`Twisted`: a twist of :math:`x_t` and :math:`\hat x_0(x_t)`, by default :math:`p(y \mid \hat x_0(x_t))`; q is the above with
  its mean moved by the variance times the twist's gradient. (The variance is p's own, which makes densities ratios of means
  alone.)
* :class:`MCGDiff`: for y = A x_0 + noise, :math:`\psi_s(x_s) = N(y;\, A \bar x,\ v A A^\top + \sigma_y^2)`, x_0 given x_s being taken as
  :math:`N(\bar x, v)`, which it is for data :math:`N(0, \tau^2)`; in the paper :math:`\tau = \infty`, :math:`\bar x = x_s / \alpha_s` and
  :math:`v = \sigma_s^2 / \alpha_s^2`. q is the best for it, :math:`q \propto p\, \psi_s`, and the twist at x_t is
  :math:`\int p(x_s \mid x_t)\, \psi_s(x_s)\, dx_s`, so that particles are weighted before they move.
* :class:`Replacement`: for the same y, what it observes of x_s is not the model's: each particle has there a noised y of its own,
  drawn backwards, of noise-free y from :math:`q(y_s \mid y_t, y)`. The rest is p's.

References:
    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), section 3 (TDS).
    https://arxiv.org/abs/2306.17775
    Monte Carlo Guided Diffusion for Bayesian Linear Inverse Problems (Cardoso et al., 2023), section 2 (noise-free: the same
    twist; with noise, theirs waits for a step that matches the noise, and this one adds it). https://arxiv.org/abs/2308.07983
    Diffusion Probabilistic Modeling of Protein Backbones in 3D for the Motif-Scaffolding Problem (Trippe et al., 2022), section 3.2
    (SMCDiff: replacement with weights). https://arxiv.org/abs/2206.04119
    Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), eq. 6. https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._tensor import append_dims
from ..errors import DataError, OptionError, ProgramError, ShapeError
from ..reverse import Prediction, ReverseKernel
from ..sample import Guided
from .operators import LinearGaussian, log_normal

__all__ = [
    "PROPOSALS",
    "Bootstrap",
    "Likelihood",
    "Look",
    "MCGDiff",
    "Replacement",
    "Steer",
    "Twist",
    "Twisted",
    "per_particle",
]

Likelihood = Callable[[Tensor], Tensor]
"""``log_likelihood(x0)``: log p(y | x_0) of ``[N, *event]``, ``[N]``."""

Twist = Callable[[Tensor, Tensor, Tensor], Tensor]
r"""``twist(x_t, x0_hat, log_snr)``: the log of a guess of p(y | x_t), ``[N]``, differentiable; log_snr is that of t."""


class Look(NamedTuple):
    """What is known of particles at x_t before they move; a row each, so that resampling is one gather.

    Attributes:
        mean, std: of p(x_s | x_t), ``[N, *event]``.
        shift: of the proposal's mean, in standard deviations, ``[N, *event]``.
        log_twist: ``[N]``, nats, float64.
    """

    mean: Tensor
    std: Tensor
    shift: Tensor
    log_twist: Tensor

    def take(self, rows: Tensor) -> Look:
        """What is known of some of the particles."""
        return Look(*(value[rows] for value in self))


class Steer(NamedTuple):
    """What moves particles at x_t.

    Attributes:
        given: what the network says, of which p is made.
        guided: what classifier-free guidance makes of it.
        gradient: of the log-twist, ``[N, *event]``.
        log_twist: ``[N]``, nats, float64.
    """

    given: Prediction
    guided: Prediction
    gradient: Tensor
    log_twist: Tensor


class Bootstrap:
    """Particles move by the model itself, or as classifier-free guidance has it, and see the likelihood at the end.

    Args:
        kernel: p; its last step is the Normal behind the decoder.
        log_likelihood: of x_0.
        cond: passed to the network; p is the chain given it.
        guidance_scale: w of classifier-free guidance: x0_hat without conditioning plus w times what conditioning changes; 1: p
            itself. Each w has the same target.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("guidance_scale",)

    def __init__(
        self, kernel: ReverseKernel, log_likelihood: Likelihood, cond: dict[str, Any], guidance_scale: float = 1.0
    ) -> None:
        self.kernel, self.log_likelihood, self.cond = kernel, log_likelihood, cond
        self.forward_process = kernel.forward_process
        self.guided = Guided(kernel, guidance_scale, None, ())

    @property
    def calls(self) -> int:
        """Network calls per step and particle."""
        return 1 if self.guided.scale == 1 else 2

    def begin(self, like: Tensor) -> Look:
        """Before x_T is drawn; ``like``: ``[N, *event]``."""
        zero = torch.zeros_like(like)
        return Look(zero, torch.ones_like(like), zero, zero.new_zeros(len(like), dtype=torch.float64))

    def look(self, x_t: Tensor, t: int) -> Look:
        """Before x_s is drawn."""
        given, guided, gradient, log_twist = self.steer(x_t, t)
        law = self.kernel.law(given, x_t, t)
        shift = (self.kernel.law(guided, x_t, t).mean - law.mean) / law.stddev + law.stddev * gradient
        return Look(law.mean, law.stddev, shift, log_twist)

    def denoise(self, x_t: Tensor, t: int) -> Tensor:
        """The estimate of x_0 from a score to which the twist's gradient is added, as deterministic samplers take it."""
        steer = self.steer(x_t, t)
        log_snr = self.kernel.schedule.log_snr(torch.tensor(t, device=x_t.device))
        log_snr = append_dims(log_snr, x_t.dim() - 1 - self.kernel.schedule.event_dim)
        pull = (-log_snr).sigmoid() / log_snr.sigmoid().sqrt()  # sigma^2 / alpha: Tweedie's formula
        return self.kernel.clipped(steer.guided.x0_hat) + pull.to(x_t) * steer.gradient

    def steer(self, x_t: Tensor, t: int) -> Steer:
        """What the network and the twist say of x_t."""
        given, guided = self.guided.predictions(x_t, t, self.cond)
        return Steer(given, guided, torch.zeros_like(x_t), x_t.new_zeros(len(x_t), dtype=torch.float64))

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
    """The gradient of a twist moves the mean; a backward pass for each step.

    Args:
        kernel, log_likelihood, cond, guidance_scale: see :class:`Bootstrap`.
        twist: None: the likelihood at x0_hat.
    """

    OPTIONS = ("guidance_scale", "twist")

    def __init__(
        self,
        kernel: ReverseKernel,
        log_likelihood: Likelihood,
        cond: dict[str, Any],
        guidance_scale: float = 1.0,
        twist: Twist | None = None,
    ) -> None:
        super().__init__(kernel, log_likelihood, cond, guidance_scale)
        self.twist = twist

    def steer(self, x_t: Tensor, t: int) -> Steer:
        """See :meth:`Bootstrap.steer`."""
        log_snr = self.kernel.schedule.log_snr(torch.tensor(t, device=x_t.device))
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            predictions = self.guided.predictions(x, t, self.cond)
            x0_hat = self.kernel.clipped(predictions[0].x0_hat)
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
        given, guided = (Prediction(*(None if z is None else z.detach() for z in p)) for p in predictions)  # type: ignore[arg-type]
        return Steer(given, guided, gradient, log_twist.detach().double())


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
            raise OptionError(
                'proposal="mcgdiff" and "replacement" take a LinearGaussian observation; take "twisted" or "bootstrap"'
            )
        if kernel.learned_variance or kernel.schedule.event_dim:
            raise OptionError(
                'proposal="mcgdiff" and "replacement" take steps of one variance for all elements; take "twisted"'
            )
        if not data_std > 0:
            raise OptionError(f"data_std={data_std!r} is not positive")
        self.data_std, self.target, self.outside = data_std, log_likelihood.target, log_likelihood.outside

    def begin(self, like: Tensor) -> Look:
        """See :meth:`Bootstrap.begin`."""
        return self._toward(torch.zeros_like(like), torch.ones_like(like), self.kernel.schedule.length)

    def look(self, x_t: Tensor, t: int) -> Look:
        """See :meth:`Bootstrap.look`."""
        law = self.kernel(x_t, t, **self.cond)
        return self._toward(law.mean, law.stddev, t - 1)

    def _terms(self, variance: Tensor, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of log psi_s in the operator's coordinates: the slope, the variance given x_s, and given x_s's own variance; float64."""
        log_snr = self.kernel.schedule.log_snr(torch.tensor(s, device=variance.device))
        singular, noise = self.log_likelihood.singular_values, self.log_likelihood.noise_std
        ab, om = log_snr.sigmoid(), (-log_snr).sigmoid()
        shrink = 1 / (ab + om / self.data_std**2)  # x_0 given x_s: mean alpha shrink x_s, variance sigma^2 shrink
        slope, left = singular * ab.sqrt() * shrink, singular**2 * om * shrink + noise**2
        return slope, left, slope**2 * variance + left

    def _toward(self, mean: Tensor, std: Tensor, s: int) -> Look:
        operator, (slope, _, total) = self.log_likelihood.operator, self._terms(_square(std), s)
        error = self.target - slope * operator.to_rows(mean).double()
        shift = std * operator.from_rows((slope * error / total).to(mean))
        return Look(mean, std, shift, self.outside + log_normal(error, total))

    def move(self, look: Look, noise: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Bootstrap.move`: log p - log q - log psi_t = -log psi_s, which the likelihood cancels at s = 0."""
        operator, (slope, variance, total) = self.log_likelihood.operator, self._terms(_square(look.std), s)
        squeeze = (variance / total).sqrt() - 1  # of the noise, where y says something of x_s
        noise = noise + operator.from_rows(squeeze.to(noise) * operator.to_rows(noise))
        x_s = look.mean + look.std * (noise + look.shift)
        if s == 0:
            return x_s, torch.zeros_like(look.log_twist)
        return x_s, -self.outside - log_normal(self.target - slope * operator.to_rows(x_s).double(), variance)

    def noise(self, look: Look, x_s: Tensor, s: int) -> Tensor:
        """See :meth:`Bootstrap.noise`."""
        operator = self.log_likelihood.operator
        _, variance, total = self._terms(_square(look.std), s)
        noise = (x_s - look.mean) / look.std - look.shift
        stretch = (total / variance).sqrt() - 1
        return noise + operator.from_rows(stretch.to(noise) * operator.to_rows(noise))

    def finish(self, x0: Tensor) -> Tensor:
        """See :meth:`Bootstrap.finish`: the likelihood is in the last twist already."""
        return x0.new_zeros(len(x0), dtype=torch.float64)


class Replacement(MCGDiff):
    r"""What y observes is replaced by noised y, and the rest moves by the model.

    In the operator's coordinates, z of x_s, let :math:`r` be the reverse of the forward process where data are
    :math:`N(0, \tau^2)`, a Normal. Then z moves by :math:`r(z_s \mid z_t, y)`, the last by :math:`r(z_0 \mid z_1, y)`; of noise-free y
    these are :math:`q(z_s \mid z_t, y)`, whatever :math:`\tau` is, and y. With the twist :math:`r(y \mid z_s)` the weight is

    .. math:: \frac{p(z_s \mid x_t)\, r(y \mid z_s)}{r(z_s \mid z_t, y)\, r(y \mid z_t)} = \frac{p(z_s \mid x_t)}{r(z_s \mid z_t)}.

    (SMCDiff's weight is :math:`p(z_s \mid x_t)`, its particles sharing one path of noised y. Such particles are those of a posterior
    given that path, which was drawn by q and not by the model; no number of them mends that. Where each has its own, the path is
    a part of what is weighted, and the mean weight has the mean p(y) for any network.)

    Args:
        kernel, log_likelihood, cond: see :class:`MCGDiff`.
        data_std: :math:`\tau`, finite: it makes the twist, and with noise the moves.

    Raises:
        OptionError: see :class:`MCGDiff`.
    """

    def __init__(
        self, kernel: ReverseKernel, log_likelihood: Likelihood, cond: dict[str, Any], data_std: float = 1.0
    ) -> None:
        super().__init__(kernel, log_likelihood, cond, data_std)
        if data_std == math.inf:
            raise OptionError('data_std=inf belongs to "mcgdiff": without a scale noised y has no law at T')

    def begin(self, like: Tensor) -> Look:
        """See :meth:`Bootstrap.begin`; the twist is that of y before anything is known."""
        s, tau, noise = self.log_likelihood.singular_values, self.data_std, self.log_likelihood.noise_std
        log_twist = self.outside + log_normal(self.target, s**2 * tau**2 + noise**2)
        return super(MCGDiff, self).begin(like)._replace(log_twist=log_twist.expand(len(like)))

    def look(self, x_t: Tensor, t: int) -> Look:
        """See :meth:`Bootstrap.look`; the shift is to the mean of r(z_s | z_t), and the ratio of twists is in the weight."""
        law, to_rows = self.kernel(x_t, t, **self.cond), self.log_likelihood.operator.to_rows
        pull, _ = self._reverse(t - 1, x_t)
        shift = (pull.to(x_t) * to_rows(x_t) - to_rows(law.mean)) / law.stddev.flatten(1)[:, :1]
        none = x_t.new_zeros(len(x_t), dtype=torch.float64)
        return Look(law.mean, law.stddev, self.log_likelihood.operator.from_rows(shift), none)

    def observed(self, mean: Tensor, variance: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of z_s given y, where before y they are these; float64."""
        slope, left, total = self._terms(variance, s)
        return mean + slope * variance / total * (self.target - slope * mean), variance * left / total

    def spread(self, s: int, like: Tensor) -> Tensor:
        """The variance of x_s where data are N(0, tau^2), float64."""
        log_snr = self.kernel.schedule.log_snr(torch.tensor(s, device=like.device))
        return log_snr.sigmoid() * self.data_std**2 + (-log_snr).sigmoid()

    def replace(self, x_s: Tensor, z: Tensor) -> Tensor:
        """x_s with z where y observes it."""
        operator = self.log_likelihood.operator
        return x_s + operator.from_rows(z.to(x_s) - operator.to_rows(x_s))

    def move(self, look: Look, noise: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Bootstrap.move`."""
        own, variance, prior, spread, mean, left = self._laws(look, s)
        z = mean + left.sqrt() * self.log_likelihood.operator.to_rows(noise).double()
        log_ratio = log_normal(z - own, variance) - log_normal(z - prior, spread)
        return self.replace(look.mean + look.std * noise, z), log_ratio

    def noise(self, look: Look, x_s: Tensor, s: int) -> Tensor:
        """See :meth:`Bootstrap.noise`."""
        *_, mean, left = self._laws(look, s)
        z = self.log_likelihood.operator.to_rows(x_s).double()
        return self.replace((x_s - look.mean) / look.std, (z - mean) / left.sqrt())

    def _laws(self, look: Look, s: int) -> tuple[Tensor, ...]:
        """Means and variances of z_s by p, by r, and by r given y; float64."""
        to_rows = self.log_likelihood.operator.to_rows
        _, spread = self._reverse(s, look.mean)
        own, prior = to_rows(look.mean).double(), to_rows(look.mean + look.std * look.shift).double()
        return own, _square(look.std), prior, spread, *self.observed(prior, spread, s)

    def _reverse(self, s: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of r(z_s | z_t): what the mean is times z_t, and the variance; of r(z_T) where s = T."""
        spread = self.spread(s, like)
        if s == self.kernel.schedule.length:
            return torch.zeros_like(spread), spread
        log_snr_s, log_snr_t = self.kernel.schedule.log_snr(torch.tensor([s, s + 1], device=like.device))
        share = spread / self.spread(s + 1, like)
        fresh = (-log_snr_t).sigmoid() * -torch.expm1(log_snr_t - log_snr_s)  # the variance of q(x_t | x_s)
        return (log_snr_t.sigmoid() / log_snr_s.sigmoid()).sqrt() * share, fresh * share


PROPOSALS: dict[str, type[Bootstrap]] = {
    "bootstrap": Bootstrap,
    "mcgdiff": MCGDiff,
    "replacement": Replacement,
    "twisted": Twisted,
}


def _square(std: Tensor) -> Tensor:
    """The variance that all elements of an event share, ``[N, 1]``, float64."""
    return std.flatten(1)[:, :1].double() ** 2


def per_particle(name: str, values: Tensor, x: Tensor) -> Tensor:
    """The values, ``[N]``, one for each row of x, ``[N, *event]``.

    Raises:
        ShapeError: they are not.
    """
    if not isinstance(values, Tensor) or values.shape != x.shape[:1] or not values.is_floating_point():
        found = f"shape {list(values.shape)}, {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(f"{name} returns {found}, not a float for each of {len(x)} particles, [{len(x)}]")
    return values
