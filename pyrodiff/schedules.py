r"""Noise schedules, in log-SNR.

A schedule says how much signal is left at step :math:`t \in \{0, \dots, T\}` of

.. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon, \qquad \alpha_t^2 + \sigma_t^2 = 1,

by one number, :math:`\lambda_t = \log(\alpha_t^2 / \sigma_t^2)`, so that
:math:`\alpha_t^2 = \mathrm{sigmoid}(\lambda_t)` and :math:`\sigma_t^2 = \mathrm{sigmoid}(-\lambda_t)` lose no digits
at either end. Here :math:`\alpha_t` is the square root of DDPM's :math:`\bar\alpha_t`, never its :math:`1 - \beta_t`.

Steps count from 1: ``t = 0`` is data (:math:`\lambda_0 = +\infty`) and ``t = T`` is the noisiest. guided-diffusion's
and diffusers' index is ``t - 1``. Everything is float64; callers round once, to the dtype of their data.

**Continuous time**, ``steps=math.inf``: t is a real number, 0 the least noisy state, :math:`\lambda(0)` = ``log_snr_max``, and 1
the noisiest. A bound then depends on the schedule's two ends and on nothing between them; how it goes from one to the other,
its *interior*, decides which log-SNRs a uniform t visits, and so the variance of an estimate.

References:
    Variational Diffusion Models (Kingma et al., 2021), sections 3.2, 5 and appendices H, I.2. https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ._tensor import append_dims
from .errors import OptionError, ProgramError, ShapeError

__all__ = [
    "CosineSchedule",
    "Curve",
    "LearnedSchedule",
    "LinearSchedule",
    "LogLinearSchedule",
    "RespacedSchedule",
    "Schedule",
    "TableSchedule",
]

# Beyond |36.7| the smaller of alpha^2 and sigma^2 is below half a unit in the last place of the other.
LIMIT = 36.7
# In continuous time, the share of random timesteps that are t = 0 exactly, the reconstruction.
SHARE_OF_0 = 0.125


class Schedule(nn.Module):
    """Interface of a noise schedule: ``steps`` and :meth:`log_snr`; everything else follows.

    A subclass may have parameters (a learned schedule): :meth:`log_snr` must then be differentiable. It may also be
    a schedule per element of the event: ``event_dim`` says how many dims :meth:`log_snr` appends to those of ``t``, which are
    the event's first (``[C]`` is a schedule per channel, ``[1, H, W]`` one per pixel).

    Attributes:
        steps: number of steps T; ``math.inf`` in continuous time, where :meth:`slope` is needed too.
        event_dim: event dims of the values (0: one number per example).
    """

    steps: int
    event_dim: int = 0

    @property
    def continuous(self) -> bool:
        """Whether time is."""
        return self.steps == math.inf

    @property
    def first(self) -> int:
        """The time of the least noisy state: 1, or 0.0 in continuous time."""
        return 0.0 if self.continuous else 1  # type: ignore[return-value]

    @property
    def last(self) -> int:
        """The time of the noisiest state: T, or 1.0 in continuous time."""
        return 1.0 if self.continuous else self.steps  # type: ignore[return-value]

    @property
    def length(self) -> int:
        """T, of a chain that has an end.

        Raises:
            ProgramError: continuous time.
        """
        if self.continuous:
            raise ProgramError("in continuous time (steps=inf) no chain has an end: respace(T) gives one of T steps")
        return self.steps

    def log_snr(self, t: int | Tensor) -> Tensor:
        """Log signal-to-noise ratio, in nats.

        Args:
            t: integer step(s) in 0..T, of any shape; in continuous time floats in [0, 1].

        Returns:
            float64 tensor of shape ``t.shape`` (and the event's, for a schedule per element); ``inf`` at step 0.
        """
        raise NotImplementedError

    def slope(self, t: Tensor) -> Tensor:
        r""":math:`d\lambda / dt`, negative, in continuous time; shapes as :meth:`log_snr`."""
        raise NotImplementedError

    def log_density(self, t: Tensor) -> Tensor | None:
        """For a learned interior, in continuous time: see :meth:`LearnedSchedule.log_density` (nats). Else None."""
        return None

    def weight(self, t: Tensor) -> Tensor | float:
        """1 / p(t) of the timesteps that :func:`~pyrodiff.timesteps.uniform` and ``low_discrepancy`` draw."""
        if not self.continuous:
            return float(self.steps)
        return torch.where(t == 0, t.new_tensor(1 / SHARE_OF_0), 1 / (1 - SHARE_OF_0))

    def alpha(self, t: int | Tensor) -> Tensor:
        r"""Signal scale :math:`\alpha_t = \sqrt{\mathrm{sigmoid}(\lambda_t)}`; shapes as :meth:`log_snr`."""
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: int | Tensor) -> Tensor:
        r"""Noise scale :math:`\sigma_t = \sqrt{\mathrm{sigmoid}(-\lambda_t)}`; shapes as :meth:`log_snr`."""
        return (-self.log_snr(t)).sigmoid().sqrt()

    @property
    def betas(self) -> Tensor:
        r"""DDPM's :math:`\beta_t = 1 - \bar\alpha_t / \bar\alpha_{t-1}` for t = 1..T, float64, shape ``[T]``."""
        log_alpha_bar = logsigmoid(self.log_snr(torch.arange(self.length + 1, device="cpu")))
        return -torch.expm1(log_alpha_bar[1:] - log_alpha_bar[:-1])

    def respace(self, spec: str | int | Sequence[int]) -> RespacedSchedule:
        """A shorter chain through some of the steps, with the same marginals at the kept ones.

        Args:
            spec: ``"ddimN"`` (every k-th step from the first, for the k that keeps exactly N), ``"N"`` or ``"N1,N2,..."``
                (that many evenly spread steps in each of as many equal sections), an integer N (the same as ``"N"``), or
                the kept steps themselves, in 1..T. The strings mean what they mean in guided-diffusion's ``respace.py``.
                In continuous time: N times evenly spread over [0, 1], both ends included, or the kept times themselves.

        Returns:
            A schedule of K steps, renumbered 1..K; its ``kept`` holds the original numbers.

        Raises:
            OptionError: the notation is unknown, asks for too many steps, or names steps outside 1..T.
        """
        return RespacedSchedule(self, kept_steps(self.steps, spec))

    @property
    def config(self) -> dict[str, object] | None:
        """Constructor arguments as JSON-able values, ``schedule`` naming the class; None for a schedule of a user's own."""
        return None

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"steps={self.steps}"


class _Table:
    """A table of numbers at steps 0..T, made on the CPU and looked up on the device of ``t``."""

    def __init__(self, values: Tensor) -> None:
        # A plain tensor and not a buffer: .to(bfloat16) on the model would leave 715 of 1000 distinct values.
        self._on: dict[torch.device, Tensor] = {values.device: values}

    def __call__(self, t: Tensor) -> Tensor:
        """The numbers at ``t``, refusing what is not a step; a CUDA device asserts on its own."""
        if t.device not in self._on:
            self._on[t.device] = self._on[torch.device("cpu")].to(t.device)
        table = self._on[t.device]
        steps = len(table) - 1
        if t.is_floating_point() or t.dtype == torch.bool:
            raise ShapeError(f"t has dtype {t.dtype}; steps are integers in 0..{steps}")
        try:  # unlike indexing, index_select refuses negative numbers; looking at t beforehand would cost as much again
            return table.index_select(0, t.reshape(-1)).reshape(t.shape)
        except IndexError:
            raise ShapeError(f"t has values in {int(t.min())}..{int(t.max())}; steps are in 0..{steps}") from None

    def __getstate__(self) -> dict[str, object]:
        """Copies carry the table once, not once per device."""
        cpu = torch.device("cpu")
        return {"_on": {cpu: self._on[cpu]}}


class _Tabulated(Schedule):
    """A fixed schedule: one table of log-SNR."""

    def __init__(self, log_snr: Tensor) -> None:
        """``log_snr``: float64 ``[T]`` for t = 1..T, decreasing."""
        super().__init__()
        name = type(self).__name__
        bad = ~(log_snr.abs() < LIMIT)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise OptionError(
                f"{name}: alpha-bar rounds to {0 if log_snr[i] < 0 else 1} at step {i + 1} of {len(log_snr)}; "
                "every step must keep 0 < alpha-bar < 1"
            )
        rising = log_snr.diff() >= 0
        if rising.any():
            i = int(rising.nonzero()[0])
            raise OptionError(f"{name}: log-SNR must decrease, but does not from step {i + 1} to {i + 2}")
        self.steps = len(log_snr)
        self._table = _Table(nn.functional.pad(log_snr.double(), (1, 0), value=math.inf))

    def log_snr(self, t: int | Tensor) -> Tensor:
        """See :meth:`Schedule.log_snr`.

        Raises:
            ShapeError: ``t`` is not an integer, or outside 0..T.
        """
        return self._table(torch.as_tensor(t))


def _check_steps(steps: float, continuous: bool = False) -> int:
    if continuous and steps == math.inf:
        return steps  # type: ignore[return-value]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps={steps!r} is not an integer of at least 1{', or math.inf' * continuous}")
    return steps


def _check_ends(log_snr_min: float, log_snr_max: float) -> None:
    if not -LIMIT < log_snr_min < log_snr_max < LIMIT:
        raise OptionError(
            f"log_snr_min={log_snr_min!r} and log_snr_max={log_snr_max!r} are not increasing and within +-{LIMIT}, beyond "
            "which alpha-bar rounds to 0 or 1"
        )


def _log_snr_of_betas(betas: Tensor) -> Tensor:
    bad = ~((betas > 0) & (betas < 1))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise OptionError(f"beta is {float(betas[i]):.6g} at step {i + 1} of {len(betas)}; it must lie in (0, 1)")
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))


class TableSchedule(_Tabulated):
    r"""Any table of DDPM's :math:`\beta_t`.

    Args:
        betas: :math:`\beta_1, \dots, \beta_T`, shape ``[T]``, each in (0, 1).

    Raises:
        OptionError: a beta lies outside (0, 1), or alpha-bar rounds to 0 or 1.
        ShapeError: the table is empty or not one-dimensional.
    """

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach().clone()
        if betas.dim() != 1 or not len(betas):
            raise ShapeError(f"betas has shape {list(betas.shape)}, not [T] with T >= 1")
        super().__init__(_log_snr_of_betas(betas))
        self._betas = betas

    @property
    def betas(self) -> Tensor:
        """The table as given, float64, shape ``[T]``."""
        return self._betas

    @property
    def config(self) -> dict[str, object]:
        """See :attr:`Schedule.config`."""
        return {"schedule": "TableSchedule", "betas": self._betas.tolist()}


class LinearSchedule(TableSchedule):
    r"""DDPM's linear :math:`\beta_t`, from :math:`10^{-4}` to 0.02 at T = 1000, scaled by 1000 / T otherwise.

    Args:
        steps: number of steps T, at least 21: below, the last beta would reach 1.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 4. https://arxiv.org/abs/2006.11239
    """

    def __init__(self, steps: int = 1000) -> None:
        scale = 1000 / _check_steps(steps)
        if steps <= 20:
            raise OptionError(
                f"LinearSchedule(steps={steps}): beta reaches 1 for steps <= 20; take CosineSchedule or LogLinearSchedule"
            )
        super().__init__(torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64, device="cpu"))

    @property
    def config(self) -> dict[str, object]:
        """See :attr:`Schedule.config`."""
        return {"schedule": "LinearSchedule", "steps": self.steps}


class CosineSchedule(TableSchedule):
    r"""The cosine schedule, :math:`\bar\alpha(u) = \cos^2(\frac{u + 0.008}{1.008} \frac{\pi}{2})` with betas capped at 0.999.

    Args:
        steps: number of steps T.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), eq. 17.
        https://arxiv.org/abs/2102.09672
    """

    def __init__(self, steps: int = 1000) -> None:
        # 1 - cos^2 b / cos^2 a, without the difference, which would leave few digits to a small beta
        quarter = math.pi / 2 / 1.008
        steps = _check_steps(steps)
        a = (torch.arange(steps, dtype=torch.float64, device="cpu") / steps + 0.008) * quarter
        step = quarter / steps
        super().__init__((math.sin(step) * torch.sin(2 * a + step) / torch.cos(a) ** 2).clamp(max=0.999))

    @property
    def config(self) -> dict[str, object]:
        """See :attr:`Schedule.config`."""
        return {"schedule": "CosineSchedule", "steps": self.steps}


class Curve(Schedule):
    r"""A schedule that is a curve over u in [0, 1], from the least noisy state to the noisiest.

    Step t of T is :math:`u = (t - 1) / (T - 1)` (with T = 1 the one step is the noisiest); in continuous time u is t.
    A subclass gives :meth:`curve`, and :meth:`slope` for continuous time.

    Args:
        steps: number of steps T, or ``math.inf``.
    """

    def __init__(self, steps: int | float) -> None:
        super().__init__()
        self.steps = _check_steps(steps, continuous=True)
        if not self.continuous:
            u = torch.linspace(1, 0, self.steps, dtype=torch.float64, device="cpu").flip(0)
            self._u = _Table(torch.cat([u[:1], u]))

    def curve(self, u: Tensor) -> Tensor:
        """Log-SNR at ``u``, float64 of any shape, decreasing and differentiable in the schedule's parameters."""
        raise NotImplementedError

    def log_snr(self, t: int | Tensor) -> Tensor:
        """See :meth:`Schedule.log_snr`.

        Raises:
            ShapeError: ``t`` is not an integer, or outside 0..T; in continuous time not a float, or outside [0, 1].
        """
        t = torch.as_tensor(t)
        if not self.continuous:
            value = self.curve(self._u(t))
            return torch.where(t.to(value.device) == 0, math.inf, value)
        if not t.is_floating_point():
            raise ShapeError(f"t has dtype {t.dtype}; in continuous time (steps=inf) it is a float in [0, 1]")
        if t.device.type == "cpu" and not ((t >= 0) & (t <= 1)).all():
            raise ShapeError(f"t has values in {t.min():.6g}..{t.max():.6g}; continuous time (steps=inf) is [0, 1]")
        return self.curve(t.double())

    @property
    def _config_steps(self) -> int | str:
        return "inf" if self.continuous else self.steps  # JSON knows no infinity


class LogLinearSchedule(Curve):
    r"""Log-SNR linear in t: :math:`\lambda_1` = ``log_snr_max`` down to :math:`\lambda_T` = ``log_snr_min``.

    Args:
        steps: number of steps T. With T = 1 the one step has ``log_snr_min``. ``math.inf``: continuous time.
        log_snr_min: log-SNR of the noisiest step; about -10 leaves nothing of x_0 in x_T.
        log_snr_max: log-SNR of the first step; the noise scale :math:`e^{-\lambda/2}` should be near the width of the
            data's bins.

    Raises:
        OptionError: ``log_snr_min >= log_snr_max``, or alpha-bar rounds to 0 or 1 (beyond about 36).

    References:
        Variational Diffusion Models (Kingma et al., 2021), section 3.2. https://arxiv.org/abs/2107.00630
    """

    def __init__(self, steps: int | float, log_snr_min: float, log_snr_max: float) -> None:
        super().__init__(steps)
        _check_ends(log_snr_min, log_snr_max)
        self.log_snr_min, self.log_snr_max = log_snr_min, log_snr_max

    def curve(self, u: Tensor) -> Tensor:
        """See :meth:`Curve.curve`."""
        return self.log_snr_max + (self.log_snr_min - self.log_snr_max) * u

    def slope(self, t: Tensor) -> Tensor:
        """See :meth:`Schedule.slope`."""
        return torch.full_like(t, self.log_snr_min - self.log_snr_max, dtype=torch.float64)

    @property
    def config(self) -> dict[str, object]:
        """See :attr:`Schedule.config`."""
        ends = {"log_snr_min": self.log_snr_min, "log_snr_max": self.log_snr_max}
        return {"schedule": "LogLinearSchedule", "steps": self._config_steps, **ends}


class LearnedSchedule(Curve):
    r"""A learned schedule: two ends, and a monotone network between them, all of them parameters.

    .. math::

        \lambda(u) = \lambda_{max} - e^{\rho} h(u), \qquad h(u) = \frac{r(u) - r(0)}{r(1) - r(0)}, \qquad
        r(u) = e^{w_0} u + \sum_k e^{w_k} \mathrm{sigmoid}(e^{b_k} u - c_k):

    VDM's three linear layers with positive weights, without the biases that the normalisation takes away. It starts out
    within a few hundredths of a nat of :class:`LogLinearSchedule`. The parameters have the precision of the network's, so
    that they travel, cast and average with them; the curve is computed from them in float64, which keeps neighbouring steps
    apart even in bfloat16.

    **The ends** ``log_snr_max`` :math:`= \lambda_{max}` and ``log_range`` :math:`= \rho` are trained by the bound, through
    ``.rsample()`` and every coefficient. **The interior** ``linear``, ``heights``, ``rates``, ``offsets`` is trained by the bound
    when T is finite. In continuous time the bound does not depend on it: :meth:`log_snr` and :meth:`slope` then (in a respacing
    too) carry no gradient to it, which would be noise, and :meth:`log_density` does, by which the programs minimise the
    variance.

    Args:
        steps: number of steps T, or ``math.inf``: continuous time.
        log_snr_min, log_snr_max: the ends to start from.
        width: number of sigmoids.

    Raises:
        OptionError: see :class:`LogLinearSchedule`; or ``width`` is not positive.

    References:
        Variational Diffusion Models (Kingma et al., 2021), appendices H and I.2. https://arxiv.org/abs/2107.00630
    """

    def __init__(self, steps: int | float, log_snr_min: float, log_snr_max: float, width: int = 32) -> None:
        super().__init__(steps)
        _check_ends(log_snr_min, log_snr_max)
        if width < 1:
            raise OptionError(f"width={width!r} is not a positive number of sigmoids")
        self.start = {"log_snr_min": log_snr_min, "log_snr_max": log_snr_max, "width": width}
        self.log_snr_max = nn.Parameter(torch.tensor(float(log_snr_max)))
        self.log_range = nn.Parameter(torch.tensor(math.log(log_snr_max - log_snr_min)))
        self.linear = nn.Parameter(torch.tensor(0.0))
        # Sigmoids about as wide as they are apart, evenly spread: nothing is drawn, a fresh schedule is always the same.
        rate = 2.0 * width
        self.heights = nn.Parameter(torch.full((width,), -math.log(width)))
        self.rates = nn.Parameter(torch.full((width,), math.log(rate)))
        self.offsets = nn.Parameter(rate * (torch.arange(width) + 0.5) / width)

    def curve(self, u: Tensor) -> Tensor:
        """See :meth:`Curve.curve`."""
        h, _, _ = self._interior(u)
        return self.log_snr_max.double() - self.log_range.double().exp() * (h.detach() if self.continuous else h)

    def slope(self, t: Tensor) -> Tensor:
        """See :meth:`Schedule.slope`."""
        _, h1, _ = self._interior(t.double())
        return -self.log_range.double().exp() * h1.detach()

    def log_density(self, t: Tensor) -> Tensor | None:
        r"""Log-density of the log-SNR, :math:`\log p(\lambda) = -\log |d\lambda / dt|` where t is uniform on [0, 1].

        Its gradient goes to the interior and is the one at fixed :math:`\lambda`, not at fixed t. With it

        .. math::

            \nabla E[L^2] = \nabla \int p(\lambda) \Big( \frac{F(\lambda)}{p(\lambda)} \Big)^2 d\lambda
            = -E[L^2\, \nabla \log p(\lambda)], \qquad F = \tfrac12 E |\epsilon - \hat\epsilon|^2,

        is the gradient of an estimate's variance, its mean not depending on p: weighted maximum likelihood, and no second
        pass through the network.

        Args:
            t: times in [0, 1], of any shape.

        Returns:
            float64 of the shape of ``t``; None when T is finite, where the bound itself depends on the interior.
        """
        if not self.continuous:
            return None
        h, h1, h2 = self._interior(t.double())
        # At fixed h the time moves by dt = -dh / h', and log h'(t) by h'' / h' of it.
        moved = (h2 / h1.square()).detach() * (h - h.detach())
        return -h1.log() + moved - self.log_range.detach().double()

    def _interior(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H(u), from 0 to 1, and its first two derivatives; on the parameters' device."""
        u = u.to(self.rates.device)
        linear, heights, rates = (p.double().exp() for p in (self.linear, self.heights, self.rates))
        offsets = self.offsets.double()
        s = torch.sigmoid(rates * u[..., None] - offsets)
        low, high = torch.sigmoid(-offsets), torch.sigmoid(rates - offsets)
        total = linear + (heights * (high - low)).sum()
        ds = rates * s * (1 - s)
        h = linear * u + (heights * (s - low)).sum(-1)
        h1 = linear + (heights * ds).sum(-1)
        h2 = (heights * rates * ds * (1 - 2 * s)).sum(-1)
        return h / total, h1 / total, h2 / total

    @property
    def config(self) -> dict[str, object]:
        """See :attr:`Schedule.config`; the ends are those it started from, the state dict has what became of them."""
        return {"schedule": "LearnedSchedule", "steps": self._config_steps, **self.start}


class RespacedSchedule(Schedule):
    """Some steps of another schedule, renumbered 1..K; made by :meth:`Schedule.respace`.

    Args:
        base: the schedule whose steps are kept (it may be learned, respaced itself, or in continuous time).
        kept: the kept steps, increasing, in 1..T; in continuous time the kept times, in [0, 1].

    Raises:
        OptionError: no step is kept, or one lies outside 1..T.
    """

    def __init__(self, base: Schedule, kept: Sequence[float]) -> None:
        super().__init__()
        kept = sorted({type(base.first)(t) for t in kept})
        if not kept or not base.first <= kept[0] <= kept[-1] <= base.last:
            raise OptionError(f"kept steps {kept[:1]}..{kept[-1:]} are not in {base.first}..{base.last}")
        self.base, self.steps, self.event_dim = base, len(kept), base.event_dim
        self.kept: list[Any] = kept
        dtype = torch.float64 if base.continuous else torch.int64
        self._kept = _Table(torch.tensor([kept[0], *kept], dtype=dtype, device="cpu"))

    def log_snr(self, t: int | Tensor) -> Tensor:
        """See :meth:`Schedule.log_snr`."""
        t = torch.as_tensor(t)
        of_base = self.base.log_snr(self._kept(t))
        return torch.where(append_dims(t.to(of_base.device) == 0, self.event_dim), math.inf, of_base)

    @property
    def config(self) -> dict[str, object]:
        """See :attr:`Schedule.config`."""
        return {"schedule": "RespacedSchedule", "base": self.base.config, "kept": self.kept}


def kept_steps(steps: int, spec: str | int | Sequence[float]) -> list[Any]:
    """The steps, in 1..``steps``, that a respacing notation keeps; see :meth:`Schedule.respace`."""
    if steps == math.inf:
        return kept_times(spec)
    if isinstance(spec, int) and not isinstance(spec, bool):
        spec = str(spec)
    if not isinstance(spec, str):
        return [int(t) for t in spec]  # type: ignore[union-attr]
    if match := re.fullmatch(r"ddim(\d{1,9})", spec):
        count = int(match[1])
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return list(range(1, steps + 1, stride))
        raise OptionError(
            f"no whole stride keeps exactly {count} of {steps} steps; take {str(count)!r} for uneven ones"
        )
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", spec):
        raise OptionError(f"respacing {spec!r} is not 'ddimN', 'N', 'N1,N2,...' or a list of steps in 1..{steps}")
    counts = [int(part) for part in spec.split(",")]
    kept, first = [], 1
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise OptionError(f"respacing {spec!r} asks for {count} steps of a section of {size}")
        spread = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # added up, as guided-diffusion does: the product would round ties the other way
        for _ in range(count):
            kept.append(first + round(position))
            position += spread
        first += size
    return kept


def kept_times(spec: str | int | Sequence[float]) -> list[float]:
    """The times in [0, 1] that a respacing notation keeps of continuous time; one alone is the noisiest."""
    if not isinstance(spec, str | int):
        return list(spec)
    match = re.fullmatch(r"(?:ddim)?(\d{1,9})", str(spec))
    if match is None or int(match[1]) < 1 or isinstance(spec, bool):
        raise OptionError(f"respacing {spec!r} of continuous time is not N, 'N', 'ddimN' or a list of times in [0, 1]")
    return torch.linspace(1, 0, int(match[1]), dtype=torch.float64, device="cpu").flip(0).tolist()


_CLASSES = (TableSchedule, LinearSchedule, CosineSchedule, LogLinearSchedule, LearnedSchedule)


def from_config(config: dict[str, object]) -> Schedule:
    """Rebuild a schedule from :attr:`Schedule.config`; never names something to import."""
    arguments = dict(config)
    name = arguments.pop("schedule", None)
    if arguments.get("steps") == "inf":
        arguments["steps"] = math.inf
    if name == "RespacedSchedule":
        return RespacedSchedule(from_config(arguments["base"]), arguments["kept"])  # type: ignore[arg-type]
    for cls in _CLASSES:
        if name == cls.__name__:
            return cls(**arguments)  # type: ignore[arg-type]
    raise OptionError(f"schedule {name!r} is not one of {', '.join(c.__name__ for c in _CLASSES)}, RespacedSchedule")
