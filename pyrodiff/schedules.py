r"""Noise schedules, in log-SNR.

A schedule says how much signal is left at step :math:`t \in \{0, \dots, T\}` of

.. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon, \qquad \alpha_t^2 + \sigma_t^2 = 1,

by one number, :math:`\lambda_t = \log(\alpha_t^2 / \sigma_t^2)`, so that
:math:`\alpha_t^2 = \mathrm{sigmoid}(\lambda_t)` and :math:`\sigma_t^2 = \mathrm{sigmoid}(-\lambda_t)` lose no digits
at either end. Here :math:`\alpha_t` is the square root of DDPM's :math:`\bar\alpha_t`, never its :math:`1 - \beta_t`.

Steps count from 1: ``t = 0`` is data (:math:`\lambda_0 = +\infty`) and ``t = T`` is the noisiest. guided-diffusion's
and diffusers' index is ``t - 1``. Everything is float64; callers round once, to the dtype of their data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .errors import OptionError, ShapeError

__all__ = [
    "CosineSchedule",
    "LinearSchedule",
    "LogLinearSchedule",
    "RespacedSchedule",
    "Schedule",
    "TableSchedule",
]


class Schedule(nn.Module):
    """Interface of a noise schedule: ``steps`` and :meth:`log_snr`; everything else follows.

    A subclass may have parameters (a learned schedule): :meth:`log_snr` must then be differentiable. It may also be
    a schedule per element of the event: ``event_dim`` says how many dims :meth:`log_snr` appends to those of ``t``, which are
    the event's first (``[C]`` is a schedule per channel, ``[1, H, W]`` one per pixel).

    Attributes:
        steps: number of steps T.
        event_dim: event dims of the values (0: one number per example).
    """

    steps: int
    event_dim: int = 0

    def log_snr(self, t: int | Tensor) -> Tensor:
        """Log signal-to-noise ratio.

        Args:
            t: integer step(s) in 0..T, of any shape.

        Returns:
            float64 tensor of shape ``t.shape`` (and the event's, for a schedule per element); ``inf`` at ``t = 0``.
        """
        raise NotImplementedError

    def alpha(self, t: int | Tensor) -> Tensor:
        r"""Signal scale :math:`\alpha_t = \sqrt{\mathrm{sigmoid}(\lambda_t)}`; shapes as :meth:`log_snr`."""
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: int | Tensor) -> Tensor:
        r"""Noise scale :math:`\sigma_t = \sqrt{\mathrm{sigmoid}(-\lambda_t)}`; shapes as :meth:`log_snr`."""
        return (-self.log_snr(t)).sigmoid().sqrt()

    @property
    def betas(self) -> Tensor:
        r"""DDPM's :math:`\beta_t = 1 - \bar\alpha_t / \bar\alpha_{t-1}` for t = 1..T, float64, shape ``[T]``."""
        log_alpha_bar = logsigmoid(self.log_snr(torch.arange(self.steps + 1)))
        return -torch.expm1(log_alpha_bar[1:] - log_alpha_bar[:-1])

    def respace(self, spec: str | int | Sequence[int]) -> RespacedSchedule:
        """A shorter chain through some of the steps, with the same marginals at the kept ones.

        Args:
            spec: ``"ddimN"`` (every k-th step from the first, for the k that keeps exactly N), ``"N"`` or ``"N1,N2,..."``
                (that many evenly spread steps in each of as many equal sections), an integer N (the same as ``"N"``), or
                the kept steps themselves, in 1..T. The strings mean what they mean in guided-diffusion's ``respace.py``.

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


class _Tabulated(Schedule):
    """A fixed schedule: one table of log-SNR, looked up on the device of ``t``."""

    def __init__(self, log_snr: Tensor) -> None:
        """``log_snr``: float64 ``[T]`` for t = 1..T, decreasing."""
        super().__init__()
        name = type(self).__name__
        # Beyond |36.7| the smaller of alpha^2 and sigma^2 is below half a unit in the last place of the other.
        bad = ~(log_snr.abs() < 36.7)
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
        # A plain tensor and not a buffer: .to(bfloat16) on the model would leave 715 of 1000 distinct values.
        table = torch.cat([torch.tensor([math.inf], dtype=torch.float64), log_snr.to(torch.float64)])
        self._tables: dict[torch.device, Tensor] = {table.device: table}

    def log_snr(self, t: int | Tensor) -> Tensor:
        """See :meth:`Schedule.log_snr`.

        Raises:
            ShapeError: ``t`` is not an integer, or outside 0..T.
        """
        t = torch.as_tensor(t)
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        return _look_up(self._tables[t.device], t)

    def __getstate__(self) -> dict[str, object]:
        """Copies carry the table once, not once per device."""
        cpu = torch.device("cpu")
        return self.__dict__ | {"_tables": {cpu: self._tables[cpu]}}


def _look_up(table: Tensor, t: Tensor) -> Tensor:
    """``table[t]``, refusing what is not a step; a CUDA device asserts on its own."""
    steps = len(table) - 1
    if t.is_floating_point() or t.dtype == torch.bool:
        raise ShapeError(f"t has dtype {t.dtype}; steps are integers in 0..{steps}")
    try:  # unlike indexing, index_select refuses negative numbers; looking at t beforehand would cost as much again
        return table.index_select(0, t.reshape(-1)).reshape(t.shape)
    except IndexError:
        raise ShapeError(f"t has values in {int(t.min())}..{int(t.max())}; steps are in 0..{steps}") from None


def _check_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps={steps!r} is not an integer of at least 1")
    return steps


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
        betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().clone()
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
        super().__init__(torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64))

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
        u = torch.arange(_check_steps(steps) + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))

    @property
    def config(self) -> dict[str, object]:
        """See :attr:`Schedule.config`."""
        return {"schedule": "CosineSchedule", "steps": self.steps}


class LogLinearSchedule(_Tabulated):
    r"""Log-SNR linear in t: :math:`\lambda_1` = ``log_snr_max`` down to :math:`\lambda_T` = ``log_snr_min``.

    Args:
        steps: number of steps T. With T = 1 the one step has ``log_snr_min``.
        log_snr_min: log-SNR of the noisiest step; about -10 leaves nothing of x_0 in x_T.
        log_snr_max: log-SNR of the first step; the noise scale :math:`e^{-\lambda/2}` should be near the width of the
            data's bins.

    Raises:
        OptionError: ``log_snr_min >= log_snr_max``, or alpha-bar rounds to 0 or 1 (beyond about 36).

    References:
        Variational Diffusion Models (Kingma et al., 2021), section 3.2. https://arxiv.org/abs/2107.00630
    """

    def __init__(self, steps: int, log_snr_min: float, log_snr_max: float) -> None:
        if not -math.inf < log_snr_min < log_snr_max < math.inf:
            raise OptionError(f"log_snr_min={log_snr_min!r} is not below log_snr_max={log_snr_max!r}")
        u = torch.ones(1, dtype=torch.float64)
        if _check_steps(steps) > 1:
            u = torch.arange(steps, dtype=torch.float64) / (steps - 1)
        self.log_snr_min, self.log_snr_max = log_snr_min, log_snr_max
        super().__init__(log_snr_max + (log_snr_min - log_snr_max) * u)

    @property
    def config(self) -> dict[str, object]:
        """See :attr:`Schedule.config`."""
        ends = {"log_snr_min": self.log_snr_min, "log_snr_max": self.log_snr_max}
        return {"schedule": "LogLinearSchedule", "steps": self.steps, **ends}


class RespacedSchedule(Schedule):
    """Some steps of another schedule, renumbered 1..K; made by :meth:`Schedule.respace`.

    Args:
        base: the schedule whose steps are kept (it may be learned, or respaced itself).
        kept: the kept steps, increasing, in 1..T.

    Raises:
        OptionError: no step is kept, or one lies outside 1..T.
    """

    def __init__(self, base: Schedule, kept: Sequence[int]) -> None:
        super().__init__()
        kept = sorted({int(t) for t in kept})
        if not kept or not 1 <= kept[0] <= kept[-1] <= base.steps:
            raise OptionError(f"kept steps {kept[:1]}..{kept[-1:]} are not in 1..{base.steps}")
        self.base, self.kept, self.steps, self.event_dim = base, kept, len(kept), base.event_dim
        self._kept: dict[torch.device, Tensor] = {}

    def log_snr(self, t: int | Tensor) -> Tensor:
        """See :meth:`Schedule.log_snr`."""
        t = torch.as_tensor(t)
        if t.device not in self._kept:
            self._kept[t.device] = torch.tensor([0, *self.kept]).to(t.device)
        return self.base.log_snr(_look_up(self._kept[t.device], t))

    @property
    def config(self) -> dict[str, object]:
        """See :attr:`Schedule.config`."""
        return {"schedule": "RespacedSchedule", "base": self.base.config, "kept": self.kept}


def kept_steps(steps: int, spec: str | int | Sequence[int]) -> list[int]:
    """The steps, in 1..``steps``, that a respacing notation keeps; see :meth:`Schedule.respace`."""
    if isinstance(spec, int) and not isinstance(spec, bool):
        spec = str(spec)
    if not isinstance(spec, str):
        return [int(t) for t in spec]  # type: ignore[union-attr]
    if match := re.fullmatch(r"ddim(\d+)", spec):
        count = int(match[1])
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return list(range(1, steps + 1, stride))
        raise OptionError(
            f"no whole stride keeps exactly {count} of {steps} steps; take {str(count)!r} for uneven ones"
        )
    if not re.fullmatch(r"\d+(,\d+)*", spec):
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


_CLASSES = (TableSchedule, LinearSchedule, CosineSchedule, LogLinearSchedule)


def from_config(config: dict[str, object]) -> Schedule:
    """Rebuild a schedule from :attr:`Schedule.config`; never names something to import."""
    arguments = dict(config)
    name = arguments.pop("schedule", None)
    if name == "RespacedSchedule":
        return RespacedSchedule(from_config(arguments["base"]), arguments["kept"])  # type: ignore[arg-type]
    for cls in _CLASSES:
        if name == cls.__name__:
            return cls(**arguments)  # type: ignore[arg-type]
    raise OptionError(f"schedule {name!r} is not one of {', '.join(c.__name__ for c in _CLASSES)}, RespacedSchedule")
