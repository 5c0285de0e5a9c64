"""The UNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pyrodiff.errors import OptionError, ShapeError, check_option
from pyrodiff.nets.embeddings import ConditionEmbedding
from pyrodiff.nets.layers import (
    Attention,
    Downsample,
    GroupNorm,
    ResidualBlock,
    Upsample,
    convolution,
    zero_parameters,
)

__all__ = ["UNet"]


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


class UNet(nn.Module):
    """A residual UNet with attention, for 1-, 2- or 3-dimensional signals.

    The architecture is that of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal &
    Nichol, 2021), https://arxiv.org/abs/2105.05233. A fresh network returns 0.

    The network does not fix the size of its input; each resampled axis must be divisible by
    ``2 ** (len(multipliers) - 1)``. Under autocast the output is in the autocast's dtype: the
    caller upcasts. (On a CPU do not train a 3-dimensional network under bfloat16: torch 2.13's
    convolution then returns wrong weight gradients where an axis has size 2.)

    Args:
        channels: channels of the input.
        out_channels: channels of the output; None means ``channels``. A network that also
            predicts variances has ``2 * channels``.
        width: channels of the first convolution at multiplier 1, even.
        multipliers: channels of each resolution level as multiples of ``width``, finest first;
            fractions are allowed and the product is rounded down.
        blocks: residual blocks per level (the decoder has one more).
        attention: the levels with attention, as positions in ``multipliers`` (0 is the finest).
        dims: number of axes of the signal: 1, 2 or 3.
        resample_axes: how many axes, counted from the last, change resolution; None means all.
            For a video of shape [frames, height, width], 2 keeps the frames.
        heads: attention heads of every attention layer; divides its channels.
        decoder_heads: attention heads in the decoder, if different.
        head_channels: channels per attention head; if given, replaces both of the above.
        attention_order: how the channels of the joint query-key-value projection are laid out,
            ``"qkv_first"`` or ``"heads_first"``; matters only to weights trained elsewhere.
        classes: number of class labels, or None for a network without labels.
        scale_shift: let the embedding of the noise level scale and shift the normalised
            activations instead of being added before the normalisation. Without it a level of
            32 channels or fewer hears little of the noise level: with 32 channels every channel
            is a normalisation group of its own, and what is added is normalised away.
        resample: how the resolution changes: ``"residual"`` (inside a residual block),
            ``"conv"`` (by a convolution) or ``"fixed"`` (averaging and repetition).
        dropout: dropout probability in the residual blocks.
        fourier_features: integers n; ``sin(2^n pi x)`` and ``cos(2^n pi x)`` join the input as
            channels. They let a likelihood model see the fine detail of its input: "Variational
            Diffusion Models" (Kingma et al., 2021), https://arxiv.org/abs/2107.00630, uses (7, 8)
            for data in [-1, 1].
        low_res_channels: channels of a smaller image that the network is given as ``low_res=``
            ([N, C', *smaller size]); it is enlarged by linear interpolation and joins the input. 0:
            none.
        norm_groups: groups of every normalisation; None: 32 where they divide the channels, fewer
            elsewhere.
        norm_eps: what every normalisation adds to the variance.
        middle_attention: attention of the middle block: ``"normalised"``, as everywhere else,
            ``"plain"``, without the normalisation before it, or ``"none"``. The last two are for
            weights trained elsewhere.
        downsample_padding: for ``resample="conv"``: where the convolution pads, at ``"both"`` ends
            of an axis or only ``"after"`` it; for weights trained elsewhere.
        time_embedding: ``"sinusoidal"``: of the log-SNR; for weights trained elsewhere ``"index"``:
            of a step index, or ``"learned"``: a row of parameters for each entry of the table.
        log_snr_table: for ``"index"`` and ``"learned"``: the log-SNR of each step of the network's own chain, least
            noisy first; entry i is the network's index ``i * index_step``. Log-SNRs between
            entries are interpolated, those outside clamped. None: call with ``index=`` only.
        index_step: for ``"index"`` and ``"learned"``: see above.
        index_shift: for ``"index"``: frequency i is ``10000 ** (-i / (width / 2 - index_shift))``.
        checkpointing: recompute activations in the backward pass to save memory.

    Attributes:
        config: the arguments above; ``UNet(**net.config)`` is the same architecture.
        cond_event_dims: dims of each conditioning value beyond N.

    Raises:
        OptionError: an argument is outside its range.
    """

    cond_event_dims: dict[str, int]

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        width: int = 64,
        multipliers: Sequence[float] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        dims: int = 2,
        resample_axes: int | None = None,
        heads: int = 4,
        decoder_heads: int | None = None,
        head_channels: int | None = None,
        attention_order: str = "qkv_first",
        classes: int | None = None,
        scale_shift: bool = True,
        resample: str = "residual",
        dropout: float = 0.0,
        fourier_features: Sequence[int] = (),
        low_res_channels: int = 0,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        middle_attention: str = "normalised",
        downsample_padding: str = "both",
        time_embedding: str = "sinusoidal",
        log_snr_table: Sequence[float] | None = None,
        index_step: float = 1.0,
        index_shift: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": channels,
            "out_channels": out_channels,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "dims": dims,
            "resample_axes": resample_axes,
            "heads": heads,
            "decoder_heads": decoder_heads,
            "head_channels": head_channels,
            "attention_order": attention_order,
            "classes": classes,
            "scale_shift": scale_shift,
            "resample": resample,
            "dropout": dropout,
            "fourier_features": list(fourier_features),
            "low_res_channels": low_res_channels,
            "norm_groups": norm_groups,
            "norm_eps": norm_eps,
            "middle_attention": middle_attention,
            "downsample_padding": downsample_padding,
            "time_embedding": time_embedding,
            "log_snr_table": None if log_snr_table is None else list(map(float, log_snr_table)),
            "index_step": index_step,
            "index_shift": index_shift,
            "checkpointing": checkpointing,
        }
        if dims not in (1, 2, 3):
            raise OptionError(f"dims={dims} is not one of 1, 2, 3")
        axes = dims if resample_axes is None else resample_axes
        if not 1 <= axes <= dims:
            raise OptionError(f"resample_axes={axes} is not between 1 and dims={dims}")
        check_option("attention_order", attention_order, ("qkv_first", "heads_first"))
        check_option("resample", resample, ("residual", "conv", "fixed"))
        check_option("middle_attention", middle_attention, ("normalised", "plain", "none"))
        check_option("downsample_padding", downsample_padding, ("both", "after"))
        for name, value in (
            ("channels", channels),
            ("out_channels", 1 if out_channels is None else out_channels),
            ("width", width),
            ("blocks", blocks),
        ):
            if value < 1:
                raise OptionError(f"{name}={value} is not positive")
        if low_res_channels < 0:
            raise OptionError(f"low_res_channels={low_res_channels} is negative")
        if not norm_eps > 0:
            raise OptionError(f"norm_eps={norm_eps} is not positive")
        if not 0 <= dropout < 1:
            raise OptionError(f"dropout={dropout} is not in [0, 1)")
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
        self.fourier_features = tuple(fourier_features)
        self.checkpointing = checkpointing
        self.low_res_channels = low_res_channels
        self.cond_event_dims = {} if classes is None else {"y": 0}
        if low_res_channels:
            self.cond_event_dims["low_res"] = dims + 1

        embedding_width = 4 * width
        norm = partial(GroupNorm, groups=norm_groups, eps=norm_eps)

        def residual_block(
            channels: int, out_channels: int, resample: Downsample | Upsample | None = None
        ) -> ResidualBlock:
            return ResidualBlock(
                channels,
                out_channels,
                embedding_width,
                dims=dims,
                dropout=dropout,
                scale_shift=scale_shift,
                resample=resample,
                norm=norm,
            )

        def attention_layer(channels: int, heads: int, norm: Callable[[int], nn.Module] = norm) -> Attention:
            if head_channels is not None:
                if head_channels < 1 or channels % head_channels:
                    raise OptionError(f"head_channels={head_channels} does not divide {channels} channels")
                heads = channels // head_channels
            return Attention(channels, heads, order=attention_order, norm=norm)

        def middle_attention_layer(channels: int) -> Attention | None:
            if middle_attention == "none":
                return None
            return attention_layer(channels, heads, norm if middle_attention == "normalised" else nn.Identity)

        def block(channels: int, out_channels: int, level: int, heads: int) -> Block:
            return Block(
                residual_block(channels, out_channels),
                attention_layer(out_channels, heads) if level in attention else None,
            )

        def change_resolution(kind: Callable[..., Downsample] | Callable[..., Upsample], channels: int) -> nn.Module:
            layer = kind(channels, dims=dims, axes=axes, learned=resample == "conv")
            if resample == "residual":
                return residual_block(channels, channels, layer)
            return layer

        self.embedding = ConditionEmbedding(
            width,
            embedding_width,
            classes=classes,
            time_embedding=time_embedding,
            log_snr_table=log_snr_table,
            index_step=index_step,
            index_shift=index_shift,
        )
        in_channels = channels * (1 + 2 * len(fourier_features)) + low_res_channels
        self.conv_in = convolution(dims, in_channels, widths[0])

        current = widths[0]
        skips = [current]
        encoder = []
        for level in levels:
            stack = []
            for _ in range(blocks):
                stack.append(block(current, widths[level], level, heads))
                current = widths[level]
                skips.append(current)
            down = None
            if level != levels[-1]:
                down = change_resolution(partial(Downsample, padding=downsample_padding), current)
                skips.append(current)
            encoder.append(Level(stack, down))
        self.encoder = nn.ModuleList(encoder)

        self.middle = nn.ModuleList(
            [
                Block(residual_block(current, current), middle_attention_layer(current)),
                Block(residual_block(current, current), None),
            ]
        )

        decoder = []
        for level in reversed(levels):
            stack = []
            for _ in range(blocks + 1):
                stack.append(block(current + skips.pop(), widths[level], level, decoder_heads or heads))
                current = widths[level]
            decoder.append(Level(stack, change_resolution(Upsample, current) if level else None))
        # Stored finest first, so that the same number names a level in both halves.
        self.decoder = nn.ModuleList(reversed(decoder))

        self.norm_out = norm(current)
        self.conv_out = zero_parameters(convolution(dims, current, channels if out_channels is None else out_channels))

    def _check_input(self, x: Tensor) -> None:
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

    def _with_low_res(self, x: Tensor, low_res: Tensor | None) -> Tensor:
        if not self.low_res_channels:
            if low_res is not None:
                raise OptionError("low_res is given, but the network has low_res_channels=0")
            return x
        if low_res is None:
            raise OptionError(f"low_res is missing: the network has low_res_channels={self.low_res_channels}")
        if low_res.dim() != x.dim() or low_res.shape[:2] != (len(x), self.low_res_channels):
            raise ShapeError(
                f"low_res has shape {list(low_res.shape)}, not [{len(x)}, {self.low_res_channels}"
                + ", size" * self.dims
                + "]"
            )
        mode = ("linear", "bilinear", "trilinear")[self.dims - 1]
        return torch.cat([x, F.interpolate(low_res, x.shape[2:], mode=mode).to(x.dtype)], dim=1)

    def _with_fourier_features(self, x: Tensor) -> Tensor:
        if not self.fourier_features:
            return x
        # In half precision the phase 2^n pi x would have lost all its digits.
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        phases = [2.0**n * math.pi * precise for n in self.fourier_features]
        waves = [phase.sin() for phase in phases] + [phase.cos() for phase in phases]
        return torch.cat([x, *(wave.to(x.dtype) for wave in waves)], dim=1)

    def forward(
        self,
        x: Tensor,
        log_snr: Tensor | None = None,
        *,
        index: Tensor | None = None,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: tensor of shape [N, C, *size].
            log_snr: floating-point tensor of shape [N], finite, in nats.
            index: with ``time_embedding="index"``, instead of ``log_snr``: the step index in the
                convention of the network's weights, a tensor of shape [N].
            y: class labels, integer tensor of shape [N]; wanted if and only if ``classes`` is set.
            low_res: smaller images, tensor of shape [N, low_res_channels, *smaller size]; wanted if
                and only if ``low_res_channels`` is set.

        Returns:
            Tensor of shape [N, out_channels, *size].

        Raises:
            OptionError: an input is missing, or given to a network that cannot use it.
            ShapeError: an input has the wrong shape or kind of number.
        """
        self._check_input(x)
        embedding = self.embedding(x, log_snr, index, y)

        run: Callable[[nn.Module, Tensor], Tensor]
        if self.checkpointing and torch.is_grad_enabled():

            def run(module: nn.Module, x: Tensor) -> Tensor:
                return checkpoint(module, x, embedding, use_reentrant=False)

        else:

            def run(module: nn.Module, x: Tensor) -> Tensor:
                return module(x, embedding)

        x = self.conv_in(self._with_low_res(self._with_fourier_features(x), low_res))
        skips = [x]
        for level in cast("Iterable[Level]", self.encoder):
            for block in level.blocks:
                x = run(block, x)
                skips.append(x)
            if level.resample is not None:
                x = run(level.resample, x)
                skips.append(x)
        for block in self.middle:
            x = run(block, x)
        for level in cast("Iterable[Level]", reversed(self.decoder)):
            for block in level.blocks:
                x = run(block, torch.cat([x, skips.pop()], dim=1))
            if level.resample is not None:
                x = run(level.resample, x)
        return self.conv_out(F.silu(self.norm_out(x)))
