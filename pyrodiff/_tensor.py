"""What the modules above share: batch dims on the left and event dims on the right, batches that fit into memory, seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import OutOfMemoryError, ShapeError

__all__ = [
    "append_dims", "batch_dims", "check_event", "in_parts", "is_out_of_memory", "like_of", "seed_everything", "seeded", "sum_event",
    "take_rows", "to_network",
]  # fmt: skip


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


def to_network(net: nn.Module, x: Tensor, cond: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Data and conditioning values, moved to the network if they lie elsewhere: ``fit`` may have taken it to a GPU."""
    like = next(itertools.chain(net.parameters(), net.buffers()), None)

    def move(value: Any) -> Any:
        return value.to(like.device) if isinstance(value, Tensor) and like is not None else value

    return move(x), {name: move(value) for name, value in cond.items()}


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


def in_parts(function: Callable[[slice], Tensor], n: int, rows: float = math.inf) -> tuple[Tensor, float]:
    """A function of ``n`` rows, computed so many at a time, and half as many from where memory no longer suffices.

    A function that draws no noise gives the same rows whatever their number, up to rounding.

    Args:
        function: rows to their values, ``[len(rows), ...]``.
        n: number of rows.
        rows: at a time.

    Returns:
        The values ``[n, ...]``; and how many rows at a time it took, from which a next call may start.

    Raises:
        OutOfMemoryError: one row is too many.
    """
    found: list[Tensor] = []
    first = 0
    while first < n or not found:
        size = int(min(rows, n - first))
        try:
            found.append(function(slice(first, first + size)))
            first += size
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
                raise
            if size <= 1:
                line = (str(error).splitlines() or [type(error).__name__])[0]
                raise OutOfMemoryError(f"out of memory, with one example at a time: {line}") from None
            # Tried again after this block, which holds the failed call's tensors by its traceback.
            rows = (size + 1) // 2
    return (found[0] if len(found) == 1 else torch.cat(found)), rows


def like_of(net: nn.Module) -> Tensor:
    """A tensor of the network's dtype, on its device; of torch's defaults where it has no parameters."""
    return next(net.parameters(), torch.zeros((), device=torch.get_default_device()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the CPU had no memory left: of several types and wordings, by where the memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def seed_everything(device: torch.device, *numbers: int) -> None:
    """Seed the CPU's generator and the device's, and no other GPU's, as ``torch.manual_seed`` would.

    By NumPy's SeedSequence, for which zeros at the end of ``numbers`` are as if they were not there.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """The generators that :func:`seed_everything` seeds, seeded for the length of a ``with`` block and put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_everything(device, *numbers)
        yield
