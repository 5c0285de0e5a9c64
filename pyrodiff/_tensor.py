"""Shape arithmetic shared by the modules above: batch dims on the left, event dims on the right."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ShapeError

__all__ = ["append_dims", "check_event", "sum_event"]


def append_dims(value: Tensor, n: int) -> Tensor:
    """Append ``n`` dims of size 1, so that a value per example broadcasts over an event of ``n`` dims.

    Explicit, because plain right-aligned broadcasting is silently wrong when the batch happens to
    be as long as the last event dim.
    """
    return value.reshape(value.shape + (1,) * n)


def sum_event(x: Tensor, event_dim: int) -> Tensor:
    """Sum over the last ``event_dim`` dims: shape ``[*batch, *event]`` to ``[*batch]``."""
    return x.flatten(-event_dim).sum(-1) if event_dim else x


def check_event(name: str, x: Tensor, event_shape: torch.Size) -> None:
    """Raise :class:`~pyrodiff.errors.ShapeError` unless ``x`` is floating, of shape ``[*batch, *event_shape]``."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is a {type(x).__name__}, not a torch.Tensor")
    n = len(event_shape)
    if x.dim() < n or x.shape[x.dim() - n :] != event_shape:
        raise ShapeError(f"{name} has shape {list(x.shape)}, not [*batch, {', '.join(map(str, event_shape))}]")
    if not x.is_floating_point():
        raise ShapeError(f"{name} has dtype {x.dtype}, not a floating one; scale the data to model units first")
