"""Shape arithmetic shared by the modules above: batch dims on the left, event dims on the right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import ShapeError

__all__ = ["append_dims", "batch_dims", "check_event", "sum_event", "take_rows"]


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


def batch_dims(net: nn.Module, cond: dict[str, Any]) -> dict[str, int]:
    """How many batch dims each tensor of ``cond`` has: those left of the event dims that the network declares."""
    event_dims = getattr(net, "cond_event_dims", {})
    return {k: max(0, v.dim() - event_dims.get(k, 0)) for k, v in cond.items() if isinstance(v, Tensor)}


def take_rows(net: nn.Module, cond: dict[str, Any], rows: slice | Tensor, n: int) -> dict[str, Any]:
    """Some of ``n`` examples' conditioning values; those without batch dim are everybody's.

    Raises:
        ShapeError: a value has another number of rows than ``n``.
    """
    batches, taken = batch_dims(net, cond), dict(cond)
    for name, dims in batches.items():
        if dims:
            if len(cond[name]) != n:
                raise ShapeError(
                    f"{name} has {len(cond[name])} rows for n={n} examples; give one each, or one value without batch dim"
                )
            taken[name] = cond[name][rows]
    return taken
