"""What every method of estimating log p(x_0) returns, and what they all check and draw from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._tensor import check_event
from ..diffusion import GaussianDiffusion
from ..draws import Noise
from ..elbo import BitsPerDim, Estimate
from ..errors import DataError, OptionError, ShapeError

__all__ = ["LogLikelihood", "cautions", "check", "seeded"]


@dataclass(frozen=True)
class LogLikelihood:
    r"""Estimates of log p(x_0), or of a bound on it, for B examples.

    Attributes:
        method: the method's name.
        meaning: what the numbers are, in words.
        unbiased: whether :math:`\exp` of a draw has the mean p(x_0). Only such draws may enter importance weights of an
            outer sampler; the exponential of an unbiased estimate of a bound may not.
        draws: nats, ``[R, B]``, float64, independent over the R repeats.
        dims: number of dims D of an example.
        network_evaluations: forward passes of one example that it took.
        seconds: wall time.
        diagnostics: further numbers by name; the method says which.
        warnings: what the reader must know, in words.
    """

    method: str
    meaning: str
    unbiased: bool
    draws: Tensor = field(repr=False)
    dims: int
    network_evaluations: int
    seconds: float
    diagnostics: dict[str, Tensor] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def log_prob(self) -> Tensor:
        """The estimate for each example, nats, ``[B]``."""
        return self.draws.mean(0)

    @property
    def nats(self) -> Estimate:
        """The mean of -log p per example, nats; see :class:`~pyrodiff.elbo.Estimate`."""
        return Estimate.of(-self.draws)

    @property
    def bits_per_dim(self) -> BitsPerDim:
        """The mean of -log p, bits per dim; its ``se_noise`` needs two repeats or more."""
        return BitsPerDim.of(-self.draws / (self.dims * math.log(2)))

    def __str__(self) -> str:
        repeats, examples = self.draws.shape
        lines = [f"{self.method}: {self.meaning}", f"{'':12s}{'-log p':>12s}{'± images':>12s}{'± noise':>12s}"]
        lines += [f"{'nats':12s}" + "".join(f"{value:12.3f}" for value in self.nats)]
        lines += [f"{'bits/dim':12s}" + "".join(f"{value:12.4f}" for value in self.bits_per_dim)]
        lines += [
            f"{examples:,} images, {repeats:,} repeats, {self.network_evaluations:,} network evaluations, {self.seconds:.1f} s"
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def check(diffusion: GaussianDiffusion, x0: Tensor, repeats: int, seed: int, batch_size: int) -> None:
    """Refuse arguments that no method takes.

    Raises:
        OptionError: a number outside its range.
        ShapeError: ``x0`` is not ``[B, *event]``.
        DataError: ``x0`` holds values that are not the model's.
    """
    check_event("x0", x0, diffusion.event_shape)
    if x0.dim() != 1 + len(diffusion.event_shape) or not len(x0):
        raise ShapeError(f"x0 has shape {list(x0.shape)}, not [B, *{list(diffusion.event_shape)}] with B >= 1")
    for name, number, least in (("repeats", repeats, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if not isinstance(number, int) or not least <= number < 2**63:
            raise OptionError(f"{name}={number!r} is not an integer in {least}..2**63 - 1")
    diffusion.reverse_kernel.check_grid("x0", x0)
    if not x0.isfinite().all():
        raise DataError("x0 holds NaN or infinite values")


def seeded(seed: int, like: Tensor) -> Noise:
    """Standard normal noise from a generator of its own, on the device of ``like``."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def cautions(diffusion: GaussianDiffusion) -> tuple[str, ...]:
    """What is wrong with any bound of this model."""
    if diffusion.reverse_kernel.decoder != "openai_tanh":
        return ()
    return ('decoder="openai_tanh" puts a floor under the probability of every bin: for outliers this is no bound',)
