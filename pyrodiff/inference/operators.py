r"""Linear observations :math:`y = A x_0 + \sigma_y \epsilon`, by the singular value decomposition :math:`A = U S V^\top`.

In the coordinates :math:`V^\top x` and :math:`U^\top y` such an observation is K scalar ones, whatever A is. So an operator is its K
singular values and four rotations, none of which need be a matrix: of a mask they are indexing, of a blur or an average over
blocks two small matrices, one for the rows of an image and one for its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._tensor import check_event
from ..errors import DataError, OptionError, ShapeError

__all__ = ["LinearGaussian", "LinearOperator", "blur", "downsample", "mask", "matrix", "separable"]

ROUNDING = 1e-6  # of the largest singular value or of |y|: what is less, float32 cannot tell from 0

Rotation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearOperator:
    """A linear map A of an event, by its decomposition; called, it is applied: ``[N, *event]`` to ``[N, *observed]``.

    Attributes:
        event_shape: of x.
        observed_shape: of A x.
        singular_values: ``[K]``, float64.
        to_rows: V^T x, ``[N, *event]`` to ``[N, K]``.
        from_rows: V z, ``[N, K]`` to ``[N, *event]``.
        to_columns: U^T y, ``[N, *observed]`` to ``[N, K]``.
        from_columns: U c, ``[N, K]`` to ``[N, *observed]``.
    """

    event_shape: torch.Size
    observed_shape: torch.Size
    singular_values: Tensor
    to_rows: Rotation = field(repr=False)
    from_rows: Rotation = field(repr=False)
    to_columns: Rotation = field(repr=False)
    from_columns: Rotation = field(repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        return self.from_columns(self.singular_values.to(x) * self.to_rows(x))


def matrix(a: Tensor) -> LinearOperator:
    """A dense A.

    Args:
        a: ``[M, *event]``; its decomposition is computed in float64.

    Returns:
        The operator, of observed shape ``[M]``.

    Raises:
        ShapeError: no event dims, or not floating.
        DataError: NaN or infinite values.
    """
    check_event("a", a, torch.Size())
    if a.dim() < 2 or not a.numel():
        raise ShapeError(f"a has shape {list(a.shape)}, not [M, *event] with M >= 1 and an event of one dim or more")
    if not a.isfinite().all():
        raise DataError("a holds NaN or infinite values")
    u, s, vh = torch.linalg.svd(a.double().flatten(1), full_matrices=False)
    event_shape, observed_shape = a.shape[1:], a.shape[:1]
    return LinearOperator(
        event_shape,
        observed_shape,
        s,
        to_rows=lambda x: x.flatten(1) @ vh.mT.to(x),
        from_rows=lambda z: (z @ vh.to(z)).unflatten(1, event_shape),
        to_columns=lambda y: y @ u.to(y),
        from_columns=lambda c: c @ u.mT.to(c),
    )


def mask(keep: Tensor) -> LinearOperator:
    """The elements of the event where ``keep`` (boolean, ``[*event]``) is true; observed shape ``[K]``, in row-major order.

    Raises:
        ShapeError: not boolean, or without dims.
        DataError: nothing is kept.
    """
    if keep.dtype != torch.bool or not keep.dim():
        raise ShapeError(f"keep has dtype {keep.dtype} and shape {list(keep.shape)}: it is a boolean tensor [*event]")
    index = keep.flatten().nonzero()[:, 0]
    if not len(index):
        raise DataError("the mask keeps nothing: nothing is observed")

    def from_rows(z: Tensor) -> Tensor:
        return z.new_zeros(len(z), keep.numel()).index_copy(1, index.to(z.device), z).unflatten(1, keep.shape)

    return LinearOperator(
        keep.shape,
        torch.Size([len(index)]),
        torch.ones(len(index), dtype=torch.float64, device=keep.device),
        to_rows=lambda x: x.flatten(1)[:, index.to(x.device)],
        from_rows=from_rows,
        to_columns=lambda y: y,
        from_columns=lambda c: c,
    )


def separable(event_shape: Sequence[int], rows: Tensor, columns: Tensor) -> LinearOperator:
    r"""The same map :math:`R\, x\, C^\top` of every image of an event.

    The decomposition of a Kronecker product is that of its factors: memory grows with the sides of an image, not with their
    product.

    Args:
        event_shape: ``(*channels, h, w)``.
        rows: R, ``[h', h]``.
        columns: C, ``[w', w]``.

    Returns:
        The operator, of observed shape ``(*channels, h', w')``.

    Raises:
        ShapeError: the matrices do not fit the event.
        DataError: NaN or infinite values.
    """
    event_shape = torch.Size(event_shape)
    _sides(event_shape)
    if (rows.shape[1:], columns.shape[1:]) != (event_shape[-2:-1], event_shape[-1:]):
        raise ShapeError(
            f"rows {list(rows.shape)} and columns {list(columns.shape)} do not map the last two dims of an event "
            f"{list(event_shape)}"
        )
    if not (rows.isfinite().all() and columns.isfinite().all()):
        raise DataError("rows or columns hold NaN or infinite values")
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(a.double(), full_matrices=False) for a in (rows, columns))
    channels = event_shape[:-2]
    core = (*channels, len(s1), len(s2))
    return LinearOperator(
        event_shape,
        torch.Size([*channels, len(rows), len(columns)]),
        (s1[:, None] * s2).expand(core).flatten(),
        to_rows=lambda x: (v1.to(x) @ x @ v2.mT.to(x)).flatten(1),
        from_rows=lambda z: v1.mT.to(z) @ z.unflatten(1, core) @ v2.to(z),
        to_columns=lambda y: (u1.mT.to(y) @ y @ u2.to(y)).flatten(1),
        from_columns=lambda c: u1.to(c) @ c.unflatten(1, core) @ u2.mT.to(c),
    )


def blur(event_shape: Sequence[int], kernel: Tensor) -> LinearOperator:
    """Correlation of every image with the product of a kernel along the rows and the same along the columns.

    Args:
        event_shape: ``(*channels, h, w)``.
        kernel: ``[2 k + 1]``; outside of the image there is 0.

    Raises:
        ShapeError: a kernel that has no middle; an event that is no image.
        DataError: NaN or infinite values.
    """
    if kernel.dim() != 1 or len(kernel) % 2 == 0:
        raise ShapeError(f"kernel has shape {list(kernel.shape)}, not one odd length")
    reach = len(kernel) // 2

    def along(size: int) -> Tensor:
        rows = torch.zeros(size, size + 2 * reach, dtype=kernel.dtype, device=kernel.device)
        for i in range(size):
            rows[i, i : i + len(kernel)] = kernel
        return rows[:, reach : reach + size]

    return separable(event_shape, *(along(size) for size in _sides(event_shape)))


def downsample(event_shape: Sequence[int], factor: int) -> LinearOperator:
    """Means over blocks of ``factor`` by ``factor`` pixels.

    Raises:
        OptionError: a factor that does not divide both sides.
        ShapeError: an event that is no image.
    """
    sides = _sides(event_shape)
    if factor < 1 or any(side % factor for side in sides):
        raise OptionError(f"factor={factor!r} does not divide the sides {list(sides)}")
    block = torch.full((1, factor), 1 / factor, dtype=torch.float64, device="cpu")
    return separable(
        event_shape,
        *(torch.kron(torch.eye(side // factor, dtype=torch.float64, device="cpu"), block) for side in sides),
    )


def _sides(event_shape: Sequence[int]) -> tuple[int, ...]:
    """Height and width of an event's images."""
    if len(event_shape) < 2:
        raise ShapeError(f"events {list(event_shape)} are no images: two dims or more")
    return tuple(event_shape)[-2:]


@dataclass(frozen=True)
class LinearGaussian:
    r"""The observation :math:`y = A x_0 + \sigma_y \epsilon`: called with ``[N, *event]``, log p(y | x_0), ``[N]``, nats.

    Args:
        operator: A.
        y: what was observed, ``[*observed]``.
        noise_std: :math:`\sigma_y`, in units of y; 0 is an exact observation, which has no density given x_0, but one given x_1.

    Raises:
        ShapeError: y has another shape.
        OptionError: a negative or infinite ``noise_std``.
        DataError: y holds NaN or infinite values; an exact observation whose operator is singular, or that no x_0 makes.
    """

    operator: LinearOperator
    y: Tensor
    noise_std: float

    def __post_init__(self) -> None:
        check_event("y", self.y, self.operator.observed_shape)
        if self.y.shape != self.operator.observed_shape:
            raise ShapeError(
                f"y has shape {list(self.y.shape)}, not {list(self.operator.observed_shape)}: one observation"
            )
        if not 0 <= self.noise_std < math.inf:
            raise OptionError(f"noise_std={self.noise_std!r} is not in [0, inf)")
        if not self.y.isfinite().all():
            raise DataError("y holds NaN or infinite values")
        if self.noise_std:
            return
        s, total = self.singular_values, self.y.numel()
        seen = s > ROUNDING * s.max()
        missed = self.y.double().square().sum() - self.target[seen].square().sum()
        if missed > ROUNDING * self.y.double().square().sum():
            raise DataError(
                f"contradictory: without noise no x_0 gives this y ({float(missed.clamp(min=0).sqrt()):.3g} of its length "
                f"{float(self.y.double().norm()):.3g} lies outside the operator's range); give a noise_std above 0"
            )
        if int(seen.sum()) < total:
            raise DataError(
                f"singular: the operator has rank {int(seen.sum())} of {total}, and without noise y has no density; drop what "
                "is observed twice, or give a noise_std above 0"
            )

    @property
    def singular_values(self) -> Tensor:
        """S, ``[K]``, float64, on the device of y."""
        return self.operator.singular_values.to(self.y.device)

    @property
    def target(self) -> Tensor:
        """U^T y, ``[K]``, float64."""
        return self.operator.to_columns(self.y.double()[None])[0]

    @property
    def outside(self) -> Tensor:
        """Log-density of what of y lies outside the range of A: noise alone."""
        target = self.target
        extra = self.y.numel() - len(target)
        if not extra:
            return target.new_zeros(())
        squares = (self.y.double().square().sum() - target.square().sum()).clamp(min=0)
        return -(squares / self.noise_std**2 + extra * math.log(2 * math.pi * self.noise_std**2)) / 2

    def log_prob(self, x: Tensor, variance: float = 0.0) -> Tensor:
        """Log-density of y given that x_0 has the mean x and the variance ``variance`` in every direction.

        Args:
            x: ``[N, *event]``.
            variance: 0: that of log p(y | x_0 = x).

        Returns:
            ``[N]``, float64.

        Raises:
            OptionError: neither noise nor variance.
        """
        if not self.noise_std and not variance:
            raise OptionError('noise_std=0: y has no density given x_0; take proposal="mcgdiff"')
        s = self.singular_values
        error = self.target - s * self.operator.to_rows(x).double()
        return self.outside + log_normal(error, s**2 * variance + self.noise_std**2)

    def __call__(self, x0: Tensor) -> Tensor:
        """Log p(y | x_0)."""
        return self.log_prob(x0)


def log_normal(error: Tensor, variance: Tensor) -> Tensor:
    """Log-density of independent Normals, summed over the last dim."""
    return -(error.square() / variance + (2 * math.pi * variance).log()).sum(-1) / 2
