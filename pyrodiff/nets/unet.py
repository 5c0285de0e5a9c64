"""The UNet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.nets.encoder import Encoder, Level
from pyrodiff.nets.layers import Upsample, convolution, zero_parameters

__all__ = ["UNet"]


class UNet(Encoder):
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
        label_dropout: probability with which training replaces a label by the null class, label ``classes``, which
            stands for no label: one network then learns the conditional and the unconditional model, which
            classifier-free guidance combines (Ho & Salimans, 2022, algorithm 1, https://arxiv.org/abs/2207.12598).
            0: there is no null class.
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
        null_cond: conditioning that says nothing, ``{"y": classes}`` if there is a null class, else ``{}``.

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
        label_dropout: float = 0.0,
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
        if out_channels is not None and out_channels < 1:
            raise OptionError(f"out_channels={out_channels} is not positive")
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
            "classes": classes,
            "label_dropout": label_dropout,
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
        super().__init__(**config)
        self.config = config | {"out_channels": out_channels, "decoder_heads": decoder_heads}
        self.low_res_channels = low_res_channels
        self.cond_event_dims = {} if classes is None else {"y": 0}
        if low_res_channels:
            self.cond_event_dims["low_res"] = dims + 1
        self.null_cond = self.embedding.null_cond

        levels, skips = range(len(self.widths)), list(self.skip_channels)
        current = self.widths[-1]
        decoder = []
        for level in reversed(levels):
            stack = []
            for _ in range(blocks + 1):
                stack.append(
                    self.layers.block(current + skips.pop(), self.widths[level], level, decoder_heads or heads)
                )
                current = self.widths[level]
            decoder.append(Level(stack, self.layers.change(Upsample, current) if level else None))
        # Stored finest first, so that the same number names a level in both halves.
        self.decoder = nn.ModuleList(reversed(decoder))

        self.norm_out = self.layers.norm(current)
        self.conv_out = zero_parameters(convolution(dims, current, out_channels or channels))

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
            y: class labels, integer tensor of shape [N]; wanted if and only if ``classes`` is set. The null class, if
                there is one, is label ``classes``.
            low_res: smaller images, tensor of shape [N, low_res_channels, *smaller size]; wanted if
                and only if ``low_res_channels`` is set.

        Returns:
            Tensor of shape [N, out_channels, *size].

        Raises:
            OptionError: an input is missing, or given to a network that cannot use it.
            ShapeError: an input has the wrong shape or kind of number.
        """
        self.check_input(x)
        embedding = self.embedding(x, log_snr, index, y)
        x, skips = self.encode(self._with_low_res(self.with_fourier_features(x), low_res), embedding)
        for level in cast("Iterable[Level]", reversed(self.decoder)):
            for block in level.blocks:
                x = self.run(block, torch.cat([x, skips.pop()], dim=1), embedding)
            if level.resample is not None:
                x = self.run(level.resample, x, embedding)
        return self.conv_out(F.silu(self.norm_out(x)))
