"""A classifier of noisy data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.nets.encoder import Encoder
from pyrodiff.nets.layers import AttentionPool, AveragePool

__all__ = ["Classifier"]


class Classifier(Encoder):
    r"""The first half of a :class:`~pyrodiff.nets.UNet` and a pool: the logits of :math:`p(y \mid x_t)`.

    The architecture is that of the classifiers of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol, 2021),
    https://arxiv.org/abs/2105.05233. A fresh network returns 0: all classes are equally likely.

    :class:`pyrodiff.NoisyClassifier` makes Pyro programs of it, to train and to guide with.

    Args:
        channels: channels of the input.
        classes: number of classes.
        size: None: the last activations are averaged over all positions, and the input has any size. The size of the input,
            a number for each axis: their mean attends to all positions, with a learned embedding of each.
        width, multipliers, blocks, attention, dims, resample_axes: as of the UNet's first half.
        heads, head_channels: of every attention layer, that of the pool included; as of the UNet.
        attention_order, scale_shift, resample, dropout, fourier_features, norm_groups: as of the UNet (the order is not that
            of the pool, which has the queries first).
        time_embedding, log_snr_table, index_step, checkpointing: as of the UNet.

    Attributes:
        config: the arguments above; ``Classifier(**net.config)`` is the same architecture.
        cond_event_dims: empty: the network takes no conditioning.

    Raises:
        OptionError: an argument is outside its range.
    """

    cond_event_dims: dict[str, int]

    def __init__(
        self,
        channels: int,
        *,
        classes: int,
        size: Sequence[int] | None = None,
        width: int = 64,
        multipliers: Sequence[float] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        dims: int = 2,
        resample_axes: int | None = None,
        heads: int = 4,
        head_channels: int | None = None,
        attention_order: str = "qkv_first",
        scale_shift: bool = True,
        resample: str = "residual",
        dropout: float = 0.0,
        fourier_features: Sequence[int] = (),
        norm_groups: int | None = None,
        time_embedding: str = "sinusoidal",
        log_snr_table: Sequence[float] | None = None,
        index_step: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        if classes < 1:
            raise OptionError(f"classes={classes} is not positive")
        config: dict[str, Any] = {
            "channels": channels,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "dims": dims,
            "resample_axes": resample_axes,
            "heads": heads,
            "head_channels": head_channels,
            "attention_order": attention_order,
            "scale_shift": scale_shift,
            "resample": resample,
            "dropout": dropout,
            "fourier_features": list(fourier_features),
            "norm_groups": norm_groups,
            "time_embedding": time_embedding,
            "log_snr_table": None if log_snr_table is None else list(map(float, log_snr_table)),
            "index_step": index_step,
            "checkpointing": checkpointing,
        }
        super().__init__(**config)
        self.config = config | {"classes": classes, "size": None if size is None else list(size)}
        self.cond_event_dims = {}
        self.size = self._fixed_size(size)
        self.norm_out = self.layers.norm(self.widths[-1])
        if self.size is None:
            self.pool: nn.Module = AveragePool(self.widths[-1], classes)
        else:
            positions = math.prod(self.size) // 2 ** (self.axes * (len(self.widths) - 1))
            heads = self.layers.heads(self.widths[-1], heads)
            self.pool = AttentionPool(self.widths[-1], classes, positions=positions, heads=heads)

    def _fixed_size(self, size: Sequence[int] | None) -> tuple[int, ...] | None:
        if size is None:
            return None
        factor = 2 ** (len(self.widths) - 1)
        if len(size) != self.dims or min(size) < 1 or any(axis % factor for axis in size[-self.axes :]):
            raise OptionError(
                f"size={list(size)} is not {self.dims} positive numbers, the last {self.axes} of them divisible by {factor}"
            )
        return tuple(size)

    def forward(self, x: Tensor, log_snr: Tensor | None = None, *, index: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: tensor of shape [N, C, *size].
            log_snr: floating-point tensor of shape [N], finite, in nats.
            index: with ``time_embedding="index"``, instead of ``log_snr``: the step index in the
                convention of the network's weights, a tensor of shape [N].

        Returns:
            Logits, a tensor of shape [N, classes].

        Raises:
            OptionError: an input is missing, or given to a network that cannot use it.
            ShapeError: an input has the wrong shape or kind of number.
        """
        self.check_input(x)
        if self.size is not None and x.shape[2:] != self.size:
            raise ShapeError(f"x has size {list(x.shape[2:])}, not {list(self.size)} as the network's size")
        embedding = self.embedding(x, log_snr, index)
        x, _ = self.encode(self.with_fourier_features(x), embedding)
        return self.pool(F.silu(self.norm_out(x)))
