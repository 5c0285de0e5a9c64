"""Exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError

__all__ = ["EMA"]


class EMA:
    r"""A slow copy of a module's parameters, :math:`e_n = d_n e_{n-1} + (1 - d_n) \theta_n`, with a warm-up.

    The rate is :math:`d_n = \min(d, \frac{1 + n}{10 + n})`, so that the first averages forget the initial weights. Kept in
    float32 or better, whatever the module's precision: in bfloat16 an average at d = 0.9999 would never move.

    Args:
        module: whose parameters to follow.
        decay: the rate d, in [0, 1).

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2020), appendix H. https://arxiv.org/abs/2011.13456
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise OptionError(f"decay={decay!r} is not in [0, 1)")
        self.decay = decay
        self.updates = 0
        self._parameters = list(module.parameters())
        self._average = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self._parameters
        ]

    @torch.no_grad()
    def update(self) -> None:
        """One step, after the optimiser's."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.to(e.dtype) for p, e in zip(self._parameters, self._average, strict=True)]
        torch._foreach_lerp_(self._average, parameters, 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the module's parameters with their average."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The module with averaged parameters, for the length of a ``with`` block."""
        saved = [p.detach().clone() for p in self._parameters]
        try:
            self.copy_to_parameters()
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, saved, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        """The average and the number of updates, for a checkpoint."""
        return {"updates": self.updates, "average": [e.clone() for e in self._average]}

    def load_state_dict(self, state: dict[str, int | list[Tensor]]) -> None:
        """Restore :meth:`state_dict`."""
        average = state["average"]
        if [e.shape for e in average] != [e.shape for e in self._average]:  # type: ignore[union-attr]
            raise ShapeError("the averaged parameters are not those of this network")
        self.updates = int(state["updates"])  # type: ignore[arg-type]
        for mine, theirs in zip(self._average, average, strict=True):  # type: ignore[arg-type]
            mine.copy_(theirs)
