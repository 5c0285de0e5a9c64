"""The first half of a UNet, which a classifier has as well: from the input down to the coarsest level and its middle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyrodiff.errors import OptionError, ShapeError, check_option
from pyrodiff.nets.embeddings import ConditionEmbedding
from pyrodiff.nets.layers import Attention, Downsample, GroupNorm, ResidualBlock, Upsample, convolution

__all__ = ["Block", "Encoder", "Layers", "Level"]


class Block(nn.Module):
    """A residual block, followed by attention where the level has it."""

    def __init__(self, residual: ResidualBlock, attention: Attention | None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map [N, C, *size] to [N, C', *size], given the embedding of shape [N, E]."""
        x = self.residual(x, embedding)
        return x if self.attention is None else self.attention(x)


class Level(nn.Module):
    """The blocks of one resolution, and what leads from it to the next one, if any."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


@dataclass(frozen=True)
class Layers:
    """What the blocks of one network have in common; its methods make them."""

    dims: int
    axes: int
    embedding: int
    attention: Sequence[int]
    head_channels: int | None
    attention_order: str
    scale_shift: bool
    resample: str
    dropout: float
    norm: Callable[[int], nn.Module]

    def heads(self, channels: int, heads: int) -> int:
        """The number of attention heads: ``heads``, unless their size is fixed."""
        if self.head_channels is None:
            return heads
        if self.head_channels < 1 or channels % self.head_channels:
            raise OptionError(f"head_channels={self.head_channels} does not divide {channels} channels")
        return channels // self.head_channels

    def attend(self, channels: int, heads: int, norm: Callable[[int], nn.Module] | None = None) -> Attention:
        """Attention, with another normalisation if one is given."""
        return Attention(channels, self.heads(channels, heads), order=self.attention_order, norm=norm or self.norm)

    def residual(
        self, channels: int, out_channels: int, resample: Downsample | Upsample | None = None
    ) -> ResidualBlock:
        """A residual block."""
        return ResidualBlock(
            channels,
            out_channels,
            self.embedding,
            dims=self.dims,
            dropout=self.dropout,
            scale_shift=self.scale_shift,
            resample=resample,
            norm=self.norm,
        )

    def block(self, channels: int, out_channels: int, level: int, heads: int) -> Block:
        """A block of a level."""
        return Block(
            self.residual(channels, out_channels),
            self.attend(out_channels, heads) if level in self.attention else None,
        )

    def change(self, kind: Callable[..., Downsample] | Callable[..., Upsample], channels: int) -> nn.Module:
        """A change of resolution."""
        layer = kind(channels, dims=self.dims, axes=self.axes, learned=self.resample == "conv")
        return self.residual(channels, channels, layer) if self.resample == "residual" else layer


class Encoder(nn.Module):
    """The embedding of the conditioning, the levels from the finest to the coarsest, and the blocks in the middle.

    A base class: the networks that derive from it describe the arguments.

    Attributes:
        layers: makes more blocks of the same kind.
        widths: channels of each level.
        skip_channels: channels of each of the activations that :meth:`encode` returns.

    Raises:
        OptionError: an argument is outside its range.
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int,
        multipliers: Sequence[float],
        blocks: int,
        attention: Sequence[int],
        dims: int,
        resample_axes: int | None,
        heads: int,
        head_channels: int | None,
        attention_order: str,
        scale_shift: bool,
        resample: str,
        dropout: float,
        fourier_features: Sequence[int],
        norm_groups: int | None,
        time_embedding: str,
        log_snr_table: Sequence[float] | None,
        index_step: float,
        checkpointing: bool,
        classes: int | None = None,
        label_dropout: float = 0.0,
        low_res_channels: int = 0,
        norm_eps: float = 1e-5,
        middle_attention: str = "normalised",
        downsample_padding: str = "both",
        index_shift: float = 0.0,
    ) -> None:
        super().__init__()
        if dims not in (1, 2, 3):
            raise OptionError(f"dims={dims} is not one of 1, 2, 3")
        axes = dims if resample_axes is None else resample_axes
        if not 1 <= axes <= dims:
            raise OptionError(f"resample_axes={axes} is not between 1 and dims={dims}")
        check_option("attention_order", attention_order, ("qkv_first", "heads_first"))
        check_option("resample", resample, ("residual", "conv", "fixed"))
        check_option("middle_attention", middle_attention, ("normalised", "plain", "none"))
        check_option("downsample_padding", downsample_padding, ("both", "after"))
        for name, value in (("channels", channels), ("width", width), ("blocks", blocks)):
            if value < 1:
                raise OptionError(f"{name}={value} is not positive")
        if low_res_channels < 0:
            raise OptionError(f"low_res_channels={low_res_channels} is negative")
        if not norm_eps > 0:
            raise OptionError(f"norm_eps={norm_eps} is not positive")
        if not 0 <= dropout < 1:
            raise OptionError(f"dropout={dropout} is not in [0, 1)")
        if not all(abs(n) <= 50 for n in fourier_features):
            raise OptionError(f"fourier_features={list(fourier_features)} are not all in -50..50")
        widths = [int(multiplier * width) for multiplier in multipliers]
        if not widths or min(widths) < 1:
            raise OptionError(f"multipliers={list(multipliers)} of width={width} leave a level without channels")
        levels = range(len(widths))
        for level in attention:
            if level not in levels:
                raise OptionError(
                    f"attention={list(attention)} names level {level}, but the levels are 0 to {len(widths) - 1}"
                )

        self.channels = channels
        self.dims = dims
        self.axes = axes
        self.widths = widths
        self.fourier_features = tuple(fourier_features)
        self.checkpointing = checkpointing
        self.layers = layers = Layers(
            dims=dims,
            axes=axes,
            embedding=4 * width,
            attention=tuple(attention),
            head_channels=head_channels,
            attention_order=attention_order,
            scale_shift=scale_shift,
            resample=resample,
            dropout=dropout,
            norm=partial(GroupNorm, groups=norm_groups, eps=norm_eps),
        )

        self.embedding = ConditionEmbedding(
            width,
            4 * width,
            classes=classes,
            label_dropout=label_dropout,
            time_embedding=time_embedding,
            log_snr_table=log_snr_table,
            index_step=index_step,
            index_shift=index_shift,
        )
        in_channels = channels * (1 + 2 * len(fourier_features)) + low_res_channels
        self.conv_in = convolution(dims, in_channels, widths[0])

        current = widths[0]
        self.skip_channels = [current]
        encoder = []
        for level in levels:
            stack = []
            for _ in range(blocks):
                stack.append(layers.block(current, widths[level], level, heads))
                current = widths[level]
                self.skip_channels.append(current)
            down = None
            if level != levels[-1]:
                down = layers.change(partial(Downsample, padding=downsample_padding), current)
                self.skip_channels.append(current)
            encoder.append(Level(stack, down))
        self.encoder = nn.ModuleList(encoder)

        norms = {"normalised": layers.norm, "plain": nn.Identity}
        first = layers.residual(current, current)
        attend = layers.attend(current, heads, norms[middle_attention]) if middle_attention in norms else None
        self.middle = nn.ModuleList([Block(first, attend), Block(layers.residual(current, current), None)])

    def check_input(self, x: Tensor) -> None:
        """Raise :class:`~pyrodiff.errors.ShapeError` unless ``x`` is floating, of shape [N, C, *size], and halves evenly."""
        if x.dim() != self.dims + 2 or x.shape[1] != self.channels:
            raise ShapeError(
                f"x has shape {list(x.shape)}, not [N, {self.channels}"
                + ", size" * self.dims
                + f"] as dims={self.dims} and channels={self.channels} want"
            )
        if not x.is_floating_point():
            raise ShapeError(f"x has dtype {x.dtype}, not a floating-point one")
        factor = 2 ** (len(self.encoder) - 1)
        if any(size % factor or size == 0 for size in x.shape[-self.axes :]):
            raise ShapeError(
                f"x has size {list(x.shape[-self.axes :])}, not divisible by {factor} "
                f"as {len(self.encoder)} resolution levels want"
            )

    def with_fourier_features(self, x: Tensor) -> Tensor:
        """Join ``sin(2^n pi x)`` and ``cos(2^n pi x)`` to ``x``, of shape [N, C, *size], as channels."""
        if not self.fourier_features:
            return x
        # In half precision the phase 2^n pi x would have lost all its digits.
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        phases = [2.0**n * math.pi * precise for n in self.fourier_features]
        waves = [phase.sin() for phase in phases] + [phase.cos() for phase in phases]
        return torch.cat([x, *(wave.to(x.dtype) for wave in waves)], dim=1)

    def run(self, module: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        """``module(x, embedding)``, its activations to be recomputed in the backward pass if ``checkpointing``."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, x, embedding, use_reentrant=False)
        return module(x, embedding)

    def encode(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the levels and the middle.

        Args:
            x: the input and all that joins it, of shape [N, channels of conv_in, *size].
            embedding: of shape [N, 4 * width].

        Returns:
            The middle's output, of shape [N, widths[-1], *coarsest size], and the activations on the way.
        """
        x = self.conv_in(x)
        skips = [x]
        for level in cast("Iterable[Level]", self.encoder):
            for block in level.blocks:
                x = self.run(block, x, embedding)
                skips.append(x)
            if level.resample is not None:
                x = self.run(level.resample, x, embedding)
                skips.append(x)
        for block in self.middle:
            x = self.run(block, x, embedding)
        return x, skips
