r"""The reverse process p: what is learned.

A network sees :math:`(x_t, \lambda_t)` and predicts, in one of several coordinates, the data. Put in the place of
:math:`x_0`, its prediction :math:`\hat x_0` turns the forward process's posterior into the model:

.. math::

    p(x_s \mid x_t) = \mathcal N(a\, \hat x_0(x_t) + b\, x_t,\ \text{variance rule}), \qquad
    p(x_0 \mid x_1) = \text{decoder with location } \hat x_0(x_1).

The step to :math:`x_0` is the observed one and has a law of its own, so that no variance ever is 0 and none is clipped.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 1, 11, 13. https://arxiv.org/abs/2006.11239
    Improved DDPM (Nichol and Dhariwal, 2021), eq. 15 (learned range). https://arxiv.org/abs/2102.09672
    Progressive Distillation (Salimans and Ho, 2022), section 4 (v). https://arxiv.org/abs/2202.00512
    Variational Diffusion Models (Kingma et al., 2021), eq. 8 (decoder scale). https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ._tensor import append_dims, batch_dims, in_parts
from .distributions import DiscretizedNormal, Gaussian
from .errors import DataError, OptionError, ProgramError, ShapeError, check_option
from .forward import ForwardProcess
from .schedules import Schedule

__all__ = ["PREDICTIONS", "VARIANCES", "Bins", "ReverseKernel"]

# x0_hat = u * x_t + w * output, as a function of alpha and sigma. "previous" needs a and b: see ReverseKernel._predict.
COORDINATES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "x0": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "v": lambda alpha, sigma: (alpha, -sigma),
    "score": lambda alpha, sigma: (1 / alpha, sigma**2 / alpha),
}
PREDICTIONS = (*COORDINATES, "previous")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
OPENAI_DECODERS = ("openai", "openai_tanh")
DECODERS = ("vdm", "learned", *OPENAI_DECODERS)

Bins = tuple[int, float, float]


class Prediction(NamedTuple):
    """What one network call says, before it becomes a law."""

    x0_hat: Tensor  # [*batch, *event], before clipping
    variance_output: Tensor | None  # [*batch, *event]: the network's variance channels
    mean: Tensor | None  # [*batch, *event]: the mean of x_s where the network predicts it directly ("previous")


def _check_bins(bins: Any) -> Bins:
    """``bins`` with floats for ends.

    Raises:
        OptionError: not (levels >= 2, low, high) with finite low < high.
    """
    try:
        levels, low, high = bins
        ends = float(low), float(high)
        if isinstance(levels, int) and levels >= 2 and -math.inf < ends[0] < ends[1] < math.inf:
            return levels, *ends
    except (TypeError, ValueError):
        pass
    raise OptionError(f"bins={bins!r} is not (levels >= 2, low, high) with finite low < high")


class ReverseKernel(nn.Module):
    r"""The reverse kernel :math:`p(x_{t-1} \mid x_t)`: a module whose call returns a distribution.

    Args:
        net: ``net(x, log_snr, **cond)`` with x ``[N, *event]`` and log_snr ``[N]`` (x's dtype); returns ``[N, *event]``, or
            twice the channels (the first event dim) for learned variances, the prediction first. Its attribute
            ``cond_event_dims``, a dict, says how many dims each conditioning value has beyond N (default 0).
        schedule: the noise schedule.
        prediction: what the network's output is: ``"eps"``, ``"x0"``, ``"v"`` :math:`= \alpha\epsilon - \sigma x_0`, ``"score"``
            :math:`= \nabla \log q(x_t)`, or ``"previous"``, the mean of :math:`x_{t-1}`.
        variance: ``"fixed_small"`` :math:`\sigma_s^2 c`, ``"fixed_large"`` :math:`\sigma_t^2 c = \beta_t`, ``"learned"`` (the network's
            log-variance), or ``"learned_range"`` (its interpolation of the two logs, -1 the small and 1 the large; not
            clamped to that range).
        decoder: scale of :math:`p(x_0 \mid x_1)`: ``"vdm"`` :math:`\sigma_1/\alpha_1`; ``"learned"``, one learned number
            (per element of a schedule that has several) that starts there; ``"openai"``, guided-diffusion's: the
            posterior's variance at t = 2 for both fixed rules, the network's own for the learned ones (needs T >= 2);
            ``"openai_tanh"``, that scale and its approximate Normal CDF as well (needs bins), to reproduce its bits/dim:
            a floor under every probability makes them no bound for outliers.
        bins: ``(levels, low, high)`` of discrete data, low and high being the outermost values: the decoder is a
            :class:`~pyrodiff.DiscretizedNormal`. None: continuous data, the decoder is Normal.
        event_dim: number of event dims of x; None takes all dims of x_t beyond those of t.
        clip: clamp :math:`\hat x_0` to the range of ``bins`` ([-1, 1] without bins), as guided-diffusion's ``clip_denoised``.

    In continuous time the two fixed variances are one and the same, and the options that speak of x_s or of t = 2 (the learned
    variances, ``"previous"``, the ``"openai"`` decoders) are refused.

    Raises:
        OptionError: an option outside its set.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        prediction: str = "eps",
        variance: str = "fixed_small",
        decoder: str = "vdm",
        bins: Bins | None = None,
        event_dim: int | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__()
        where = " in continuous time" if schedule.continuous else ""
        check_option("prediction", prediction, COORDINATES if where else PREDICTIONS, where)
        check_option("variance", variance, VARIANCES[:2] if where else VARIANCES, where)
        check_option("decoder", decoder, DECODERS[:2] if where else DECODERS, where)
        if decoder in OPENAI_DECODERS and schedule.steps < 2:
            raise OptionError(f'decoder="{decoder}" takes the posterior variance at t = 2: steps=1 has none')
        if decoder == "openai_tanh" and bins is None:
            raise OptionError('decoder="openai_tanh" approximates the probabilities of bins: bins=None has none')
        if bins is not None:
            bins = _check_bins(bins)
        self.net = net
        self.forward_process = ForwardProcess(schedule, event_dim)
        self.prediction, self.variance, self.decoder = prediction, variance, decoder
        self.bins, self.clip = bins, clip
        self.data_range = (-1.0, 1.0) if bins is None else bins[1:]
        self.rows = math.inf  # of a network call without gradients; fewer once memory has not sufficed
        if decoder == "learned":
            self.log_scale = nn.Parameter((-0.5 * schedule.log_snr(schedule.first).detach()).float())

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.forward_process.schedule

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "schedule":  # torch would register a module beside the property, and nothing would change
            raise ProgramError("the schedule of a kernel cannot be exchanged: make a new one, or respace")
        super().__setattr__(name, value)

    @property
    def learned_variance(self) -> bool:
        """Whether the network outputs variance channels."""
        return self.variance in ("learned", "learned_range")

    # ------------------------------------------------------------------ the laws

    def forward(self, x_t: Tensor, t: int | Tensor, **cond: Tensor) -> TorchDistribution:
        r"""The law of :math:`x_{t-1}` given :math:`x_t`, always Normal.

        At t = 1 (0 in continuous time) it is the Normal behind the decoder: its loc and scale, without bins.

        Args:
            x_t: ``[*batch, *event]``.
            t: step(s) in 1..T, broadcasting with ``batch``.
            cond: passed to the network; batch dims broadcast with ``batch``.
        """
        return self.law(self.predict(x_t, t, **cond), x_t, t)

    def both(self, x_t: Tensor, t: int | Tensor, **cond: Tensor) -> tuple[TorchDistribution, TorchDistribution]:
        r"""The laws of :math:`x_{t-1}` and of :math:`x_0` (the decoder's), from one network call.

        What a batch of mixed timesteps needs: the first is meant where t >= 2 and the second where t = 1 (in continuous time
        t > 0 and t = 0). Elsewhere they are proper but meaningless (the first as if t were 2), to be masked out.

        Raises:
            ProgramError: T = 1, where there is no :math:`x_{t-1}` but :math:`x_0`; use :meth:`decode`.
        """
        if self.schedule.steps < 2:
            raise ProgramError("with steps=1 the only law is the decoder's: use decode(x_1)")
        t = self._as_steps(x_t, t)
        return self.laws(self._predict(x_t, t, cond), x_t, t)  # type: ignore[return-value]

    def decode(self, x_1: Tensor, **cond: Tensor) -> TorchDistribution:
        r"""The decoder :math:`p(x_0 \mid x_1)`: a ``DiscretizedNormal`` with bins, a Normal without (DDPM eq. 13)."""
        t = self._as_steps(x_1, self.schedule.first)
        predicted = self._predict(x_1, t, cond)
        return self.law_of_x_0(*self._decoder_terms(predicted, x_1, t), self._event_dim(x_1, t))

    def denoise(self, x_t: Tensor, t: int | Tensor, **cond: Tensor) -> Tensor:
        r""":math:`\hat x_0(x_t)`, the network's estimate of :math:`E[x_0 \mid x_t]`, ``[*batch, *event]``; clipped if asked."""
        return self.clipped(self._predict(x_t, self._as_steps(x_t, t), cond).x0_hat)

    def denoise_at(self, x: Tensor, log_snr: float | Tensor, **cond: Tensor) -> Tensor:
        r""":math:`\hat x_0` at a log-SNR that need be no step's; clipped if asked.

        Args:
            x: :math:`\alpha x_0 + \sigma \epsilon`, ``[*batch, *event]``.
            log_snr: broadcasting with ``batch`` (a schedule per element: followed by its event dims).
            cond: passed to the network.

        Returns:
            ``[*batch, *event]``.

        Raises:
            OptionError: ``prediction="previous"``, the mean of a step's end, which steps alone have.
        """
        check_option("prediction", self.prediction, COORDINATES)
        log_snr = torch.as_tensor(log_snr, dtype=torch.float64, device=x.device)
        event_dim = self.forward_process.event_dim
        if event_dim is None:
            event_dim = x.dim() - log_snr.dim() + self.schedule.event_dim
        output, _ = self._call_net(x, log_snr, cond, event_dim)
        return self.clipped(self._x0_hat(x, log_snr, output, event_dim))

    def respace(self, spec: str | int | Sequence[int]) -> ReverseKernel:
        """The kernel of a shorter chain (see :meth:`~pyrodiff.schedules.Schedule.respace`), around the same network."""
        schedule = self.schedule.respace(spec)
        if self.decoder in OPENAI_DECODERS and schedule.steps < 2:
            raise OptionError(
                f'decoder="{self.decoder}" takes the posterior variance at t = 2: respacing to {spec!r} has none'
            )
        kernel = copy.copy(self)
        kernel._modules = dict(self._modules)
        kernel.forward_process = ForwardProcess(schedule, self.forward_process.event_dim)
        return kernel

    # ------------------------------------------------------------------ their parts

    def law(self, predicted: Prediction, x_t: Tensor, t: int | Tensor) -> TorchDistribution:
        """The call's law of x_{t-1}, from a prediction made before."""
        t = self._as_steps(x_t, t)
        loc, scale = self._decoder_terms(predicted, x_t, t)
        if self.schedule.steps > 1:
            loc_s, scale_s = self._x_s_terms(predicted, x_t, t)
            first = append_dims(t == self.schedule.first, self._event_dim(x_t, t))
            loc, scale = torch.where(first, loc, loc_s), torch.where(first, scale, scale_s)
        return Gaussian(loc, scale).to_event(self._event_dim(x_t, t))

    def laws(self, predicted: Prediction, x_t: Tensor, t: Tensor) -> tuple[TorchDistribution | None, TorchDistribution]:
        """:meth:`both`, from a prediction made before; the first is None when T = 1."""
        event_dim = self._event_dim(x_t, t)
        law_of_x_s = None
        if self.schedule.steps > 1:
            law_of_x_s = Gaussian(*self._x_s_terms(predicted, x_t, t)).to_event(event_dim)
        return law_of_x_s, self.law_of_x_0(*self._decoder_terms(predicted, x_t, t), event_dim)

    def predict(self, x_t: Tensor, t: int | Tensor, **cond: Tensor) -> Prediction:
        """One network call, as x0_hat (before clipping) and the variance channels."""
        return self._predict(x_t, self._as_steps(x_t, t), cond)

    def _x_s_terms(self, predicted: Prediction, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # Rows at t = 1 are masked by the caller; t = 2 in their place keeps every scale positive.
        _, a, b, small, large = self.forward_process.posterior_terms(x_t, self.forward_process.with_x_s(t))
        mean = predicted.mean
        if mean is None:
            mean = a * self.clipped(predicted.x0_hat) + b * x_t
        return mean, self._scale(small, large, predicted)

    def _decoder_terms(self, predicted: Prediction, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.clipped(predicted.x0_hat) if predicted.mean is None else predicted.mean
        if self.decoder not in OPENAI_DECODERS:
            learned = self.decoder == "learned"
            log_scale = (
                self.log_scale if learned else -0.5 * self.schedule.log_snr(torch.full_like(t, self.schedule.first))
            )
            return loc, append_dims(log_scale.exp().to(loc.dtype), self._event_dim(x_t, t) - self.schedule.event_dim)
        _, _, _, small, _ = self.forward_process.posterior_terms(x_t, torch.full_like(t, 2))
        large = small
        if self.learned_variance:
            _, _, _, _, large = self.forward_process.posterior_terms(x_t, torch.ones_like(t))
        return loc, self._scale(small, large, predicted)

    def _scale(self, small: Tensor, large: Tensor, predicted: Prediction) -> Tensor:
        """Standard deviation by the variance rule, from the two fixed variances (float64)."""
        dtype = predicted.x0_hat.dtype
        if predicted.variance_output is None:  # no logarithm on the way: q and p share every bit of fixed_small
            return (large if self.variance == "fixed_large" else small).sqrt().to(dtype)
        log_variance = predicted.variance_output
        if self.variance == "learned_range":
            weight = (log_variance + 1) / 2
            log_variance = torch.lerp(small.log().to(dtype), large.log().to(dtype), weight)
        return (0.5 * log_variance).exp()

    def law_of_x_0(self, loc: Tensor, scale: Tensor, event_dim: int) -> TorchDistribution:
        """The decoder of that location and scale: discretised where there are bins."""
        if self.bins is None:
            return Gaussian(loc, scale).to_event(event_dim)
        levels, low, high = self.bins
        cdf = "tanh" if self.decoder == "openai_tanh" else "exact"
        return DiscretizedNormal(loc, scale, (high - low) / (levels - 1), low, high, cdf=cdf).to_event(event_dim)

    def check_grid(self, name: str, x: Tensor) -> None:
        """Raise :class:`~pyrodiff.errors.DataError` where ``x``, ``[N, *event]``, is off the grid of ``bins``."""
        if self.bins is None or x.device.type == "meta":
            return
        law: Any = self.law_of_x_0(x.new_zeros(()), x.new_ones(()), 0)
        on_grid = law.support.check(x)
        if not on_grid.all():
            bad = int((~on_grid).flatten(1).any(1).nonzero()[0])
            raise DataError(f"{name}[{bad}] has values off the grid of bins={self.bins} (levels, low, high)")

    def clipped(self, x0_hat: Tensor) -> Tensor:
        """``x0_hat``, clamped to the data's range if the kernel clips."""
        if not self.clip:
            return x0_hat
        return x0_hat.clamp(*self.data_range)

    # ------------------------------------------------------------------ the network

    def _as_steps(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        return torch.as_tensor(t, device=x_t.device)

    def _event_dim(self, x_t: Tensor, t: Tensor) -> int:
        event_dim = self.forward_process.event_dim
        return x_t.dim() - t.dim() if event_dim is None else event_dim

    def _predict(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Prediction:
        event_dim, log_snr = self._event_dim(x_t, t), self.schedule.log_snr(t)
        output, variance_output = self._call_net(x_t, log_snr, cond, event_dim)
        if self.prediction == "previous":
            _, a, b, _, _ = self.forward_process.posterior_terms(x_t, t)
            return Prediction((output - b * x_t) / a, variance_output, output)
        return Prediction(self._x0_hat(x_t, log_snr, output, event_dim), variance_output, None)

    def _x0_hat(self, x_t: Tensor, log_snr: Tensor, output: Tensor, event_dim: int) -> Tensor:
        """From what the network predicts in one of the coordinates."""
        log_snr = append_dims(log_snr, event_dim - self.schedule.event_dim)
        u, w = COORDINATES[self.prediction](log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())
        return u.to(x_t.dtype) * x_t + w.to(x_t.dtype) * output

    def _call_net(
        self, x_t: Tensor, log_snr: Tensor, cond: dict[str, Tensor], event_dim: int
    ) -> tuple[Tensor, Tensor | None]:
        """Broadcast every batch dim, show the network one flat batch, restore the shape and the dtype.

        Returns:
            What it predicts, and its variance channels.
        """
        if self.schedule.event_dim:  # a schedule per element: the network sees its mean
            log_snr = log_snr.flatten(-self.schedule.event_dim).mean(-1)
        event_shape = x_t.shape[x_t.dim() - event_dim :]
        split = batch_dims(self.net, cond)
        batches = [x_t.shape[: x_t.dim() - event_dim], log_snr.shape, *(cond[k].shape[:n] for k, n in split.items())]
        try:
            batch_shape = torch.broadcast_shapes(*batches)
        except RuntimeError:
            shapes = ", ".join(str(list(b)) for b in batches)
            raise ShapeError(
                f"batch shapes of x_t, t and {', '.join(cond) or 'nothing else'} differ: {shapes}"
            ) from None

        def flat(value: Tensor, n: int) -> Tensor:
            """``[*batch, *rest]`` to ``[N, *rest]``, where batch has ``n`` dims."""
            rest = value.shape[n:]
            return value.expand(batch_shape + rest).reshape((-1, *rest))

        flat_cond = {k: flat(v, split[k]) if k in split else v for k, v in cond.items()}
        x, log_snr = flat(x_t, x_t.dim() - event_dim), flat(log_snr.to(x_t.dtype), log_snr.dim())

        def call(rows: slice) -> Tensor:
            given = {k: v[rows] if k in split else v for k, v in flat_cond.items()}
            return self.net(x[rows], log_snr[rows], **given)

        if torch.is_grad_enabled() or self.net.training:  # a step of training is done as asked for, or not at all
            output = self.net(x, log_snr, **flat_cond)
        else:
            output, self.rows = in_parts(call, len(x), self.rows)
        expected = list(event_shape)
        if self.learned_variance and expected:
            expected[0] *= 2
        expected = [batch_shape.numel(), *expected]
        if not isinstance(output, Tensor):
            raise ShapeError(f"the network returns a {type(output).__name__}, not a tensor of shape {expected}")
        if list(output.shape) != expected or not output.is_floating_point():
            raise ShapeError(
                f"the network returns shape {list(output.shape)} and dtype {output.dtype}, not {expected} and a floating one "
                f"(variance={self.variance!r}{', twice the channels' if self.learned_variance else ''})"
            )
        # Whatever precision the network ran in, the coefficients that follow need the data's.
        output = output.to(x_t.dtype).reshape(batch_shape + output.shape[1:])
        if not self.learned_variance:
            return output, None
        output, variance_output = output.chunk(2, dim=-event_dim)
        return output, variance_output

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"prediction={self.prediction!r}, variance={self.variance!r}, decoder={self.decoder!r}, bins={self.bins}"
