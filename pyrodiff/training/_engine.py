"""Where training runs, and what ends it: the device, the other processes, the signals.

Lightning Fabric averages the gradients of several processes; with one it is not imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, ProcessError, PyrodiffError

PATIENCE = timedelta(minutes=30)  # with a process that does not answer
DIGESTED = 64  # rows by which processes compare their data


@dataclass
class Engine:
    """Where the loop runs; Lightning Fabric where there are several processes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    fabric: Any = None
    launcher: int = 0  # the process that started this one and its peers, if torchrun did

    @classmethod
    def of(cls, device: str | torch.device | None, unused: bool = False) -> Engine:
        """Under torchrun, this process's part of it; ``unused``: some parameters may get no gradient."""
        device = check_device(device)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(device)
        try:
            from lightning import fabric as lightning
        except ImportError:
            try:
                import lightning_fabric as lightning
            except ImportError:
                raise OptionError(
                    f'WORLD_SIZE={world_size}: several processes need Lightning Fabric: pip install "pyrodiff[distributed]"'
                ) from None
        nodes = world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        strategy = lightning.strategies.DDPStrategy(timeout=PATIENCE, find_unused_parameters=unused)
        fabric = lightning.Fabric(
            accelerator=device.type, devices=world_size // nodes, num_nodes=nodes, strategy=strategy
        )
        fabric.launch()
        launcher = os.getppid() if torch.distributed.is_torchelastic_launched() else 0
        return cls(fabric.device, fabric.global_rank, world_size, fabric, launcher)

    def mean(self, *values: Tensor) -> list[float]:
        """Scalars as numbers, averaged over the processes: one transfer."""
        stacked = torch.stack([v.detach().float() for v in values])
        if self.fabric is not None:
            stacked = self.fabric.all_reduce(stacked, reduce_op="mean")
        return stacked.tolist()

    def gather(self, value: Tensor) -> Tensor:
        """Rows of all processes."""
        return value if self.fabric is None else self.fabric.all_gather(value).flatten(0, 1)

    def orphaned(self) -> bool:
        """Whether torchrun is gone, which would have ended its processes; killed, it cannot."""
        return self.launcher != 0 and os.getppid() != self.launcher

    def agree(self, told: dict[str, Any]) -> None:
        """Raise :class:`OptionError`, on every process, unless all were told the same; as JSON, which no process executes."""
        text = torch.tensor(list(json.dumps(told, default=str).encode()), dtype=torch.uint8, device=self.device)
        length = int(self.gather(torch.tensor([len(text)], device=self.device)).max())
        rows = self.gather(nn.functional.pad(text, (0, length - len(text)), value=ord(" "))[None])
        first, *others = (json.loads(bytes(row)) for row in rows.tolist())
        for rank, other in enumerate(others, start=1):
            for name in first | other:
                if first.get(name) != other.get(name):
                    raise OptionError(
                        f"process {rank} has {name}={other.get(name)!r}, and process 0 {first.get(name)!r}: all must have the same"
                    )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Where another process is lost, an error that says so."""
        try:
            yield
        except RuntimeError as error:
            words = str(error)
            ours = self.fabric is None or isinstance(error, PyrodiffError)
            if ours or not any(word in words.lower() for word in ("gloo", "nccl", "closed by peer")):
                raise
            others = ", ".join(str(rank) for rank in range(self.world_size) if rank != self.rank)
            raise ProcessError(
                f"process {self.rank} has lost process {others if self.world_size == 2 else f'one of {others}'}, which died or "
                f"did not answer; go on from the state saved last ({words.splitlines()[0]})"
            ) from error


def check_device(device: str | torch.device | None) -> torch.device:
    """The device named, or CUDA where there is one; :class:`OptionError` if it is not there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        # under torchrun a process looks at its own GPU alone: each it touches keeps half a gigabyte for it
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if found == torch.device("cuda") else found
        torch.zeros((), device=own).item()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise OptionError(f"device={str(device)!r} cannot be used: {reason}") from None
    return found


def digest(x: Tensor) -> str:
    """Of some rows, evenly spaced: for :meth:`Engine.agree`."""
    rows = x[:: -(-len(x) // DIGESTED)].detach().cpu().contiguous()
    return hashlib.sha256(rows.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


class Stop:
    requested = 0  # the signal's number


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second one acts at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.requested = number
        for n, handler in previous.items():
            signal.signal(n, handler)

    # None stands for a handler that is not Python's, which could not be put back.
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    previous = {n: handler for n, handler in handlers.items() if handler is not None}
    try:
        for n in previous:
            signal.signal(n, ask)
        yield stop
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
