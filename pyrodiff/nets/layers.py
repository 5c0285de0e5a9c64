"""The layers of the UNet: normalisation, resampling, residual blocks and attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrodiff.errors import OptionError

__all__ = [
    "Attention",
    "AttentionPool",
    "AveragePool",
    "Downsample",
    "GroupNorm",
    "ResidualBlock",
    "Upsample",
    "convolution",
    "zero_parameters",
]

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def convolution(
    dims: int,
    channels: int,
    out_channels: int,
    kernel: int = 3,
    stride: int | tuple[int, ...] = 1,
    padding: int | None = None,
) -> nn.Module:
    """Return a convolution over ``dims`` axes; the default padding keeps their sizes at stride 1."""
    layer: Any = _CONVOLUTIONS[dims]  # each wants tuples of its own length, which we know
    return cast(nn.Module, layer(channels, out_channels, kernel, stride, kernel // 2 if padding is None else padding))


def zero_parameters(module: nn.Module) -> nn.Module:
    """Set every parameter of ``module`` to zero and return it.

    A residual branch that ends in such a module starts as the identity, and a network that ends
    in one starts as the constant 0.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32 or better.

    Args:
        channels: number of channels.
        groups: number of groups. None: 32 where they divide ``channels``, as in the published
            networks. Otherwise as many as leave four channels or more in a group: a group of one
            channel would normalise away whatever was added to the whole channel, the embedding of
            the noise level included.
        eps: added to the variance.

    Raises:
        OptionError: ``groups`` does not divide ``channels``.
    """

    def __init__(self, channels: int, groups: int | None = None, eps: float = 1e-5) -> None:
        if groups is None:
            groups = 32 if channels % 32 == 0 else max(1, math.gcd(32, channels) // 4)
        if groups < 1 or channels % groups:
            raise OptionError(f"norm_groups={groups} does not divide {channels} channels")
        super().__init__(groups, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, a tensor of shape [N, C, *size]."""
        if x.dtype in (torch.float16, torch.bfloat16):
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        return super().forward(x)


class Downsample(nn.Module):
    """Halve the last ``axes`` axes, by a strided convolution or by averaging.

    Args:
        channels: channels of the input and of the output.
        dims: number of axes beyond the channels.
        axes: how many of them, counted from the last, are halved.
        learned: strided convolution rather than averaging.
        padding: where the convolution pads a halved axis, ``"both"`` ends or only ``"after"`` it:
            the first output then looks at inputs 0, 1, 2 and not at -1, 0, 1.
    """

    def __init__(self, channels: int, *, dims: int, axes: int, learned: bool, padding: str = "both") -> None:
        super().__init__()
        self.dims = dims
        self.stride = (1,) * (dims - axes) + (2,) * axes
        # F.pad counts from the last axis.
        self.pad = None if padding == "both" else (0, 1) * axes + (1, 1) * (dims - axes)
        own = None if self.pad is None else 0
        self.conv = convolution(dims, channels, channels, stride=self.stride, padding=own) if learned else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map [N, C, *size] to [N, C, *size / 2]; ``embedding`` is not used."""
        if self.conv is not None:
            return self.conv(x if self.pad is None else F.pad(x, self.pad))
        return _AVERAGE_POOLS[self.dims](x, self.stride)


class Upsample(nn.Module):
    """Double the last ``axes`` axes by repetition, optionally followed by a convolution.

    Args:
        channels: channels of the input and of the output.
        dims: number of axes beyond the channels.
        axes: how many of them, counted from the last, are doubled.
        learned: convolve the result.
    """

    def __init__(self, channels: int, *, dims: int, axes: int, learned: bool) -> None:
        super().__init__()
        self.factor = (1.0,) * (dims - axes) + (2.0,) * axes
        self.conv = convolution(dims, channels, channels) if learned else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map [N, C, *size] to [N, C, 2 * *size]; ``embedding`` is not used."""
        x = F.interpolate(x, scale_factor=self.factor, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResidualBlock(nn.Module):
    """Two convolutions around the embedding of the noise level, plus a skip connection.

    With ``scale_shift`` the embedding scales and shifts the normalised activations, as in
    "Improved Denoising Diffusion Probabilistic Models" (Nichol & Dhariwal, 2021),
    https://arxiv.org/abs/2102.09672; without, it is added to them, as in "Denoising Diffusion
    Probabilistic Models" (Ho et al., 2020), https://arxiv.org/abs/2006.11239.

    Args:
        channels: channels of the input.
        out_channels: channels of the output.
        embedding: size of the embedding.
        dims: number of axes beyond the channels.
        dropout: probability of dropping an activation before the second convolution.
        scale_shift: see above.
        resample: a parameter-free change of resolution applied to both branches, or None.
        norm: makes a normalisation of so many channels.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        *,
        dims: int,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resample: Downsample | Upsample | None = None,
        norm: Callable[[int], nn.Module] = GroupNorm,
    ) -> None:
        super().__init__()
        self.dims = dims
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm_in = norm(channels)
        self.conv_in = convolution(dims, channels, out_channels)
        self.embedding = nn.Linear(embedding, 2 * out_channels if scale_shift else out_channels)
        self.norm_out = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_parameters(convolution(dims, out_channels, out_channels))
        self.skip = None if channels == out_channels else convolution(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: tensor of shape [N, C, *size].
            embedding: tensor of shape [N, E].

        Returns:
            Tensor of shape [N, C', *size], its size halved or doubled by ``resample``.
        """
        h = F.silu(self.norm_in(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h)
        condition = self.embedding(embedding)
        condition = condition.reshape(*condition.shape, *(1,) * self.dims)
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        else:
            h = self.norm_out(h + condition)
        h = self.conv_out(self.dropout(F.silu(h)))
        return h + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
    """Multi-head self-attention over all positions, with a residual connection.

    The projections are linear layers over positions-major activations, so that neither they nor
    the attention need a copy when the input is in ``channels_last`` format.

    The fast kernels of ``scaled_dot_product_attention`` have no second derivative: wrap a call
    that needs one in ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        channels: channels of the input and of the output.
        heads: number of heads; divides ``channels``.
        order: how the output channels of the joint projection are laid out: ``"qkv_first"``, all
            queries, all keys, all values; or ``"heads_first"``, queries, keys and values of the
            first head, then of the second, and so on.
        norm: makes a normalisation of so many channels.

    Raises:
        OptionError: ``heads`` does not divide ``channels``.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        order: str = "qkv_first",
        norm: Callable[[int], nn.Module] = GroupNorm,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise OptionError(f"{heads} attention heads do not divide {channels} channels")
        self.heads = heads
        self.order = order
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_parameters(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Attend; ``x`` is a tensor of shape [N, C, *size] and so is the result."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, L, C]
        qkv = self.qkv(tokens)
        if self.order == "qkv_first":
            q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        tokens = F.scaled_dot_product_attention(q, k, v)  # [N, heads, L, C / heads]
        tokens = self.out(tokens.transpose(1, 2).flatten(2))
        return x + tokens.transpose(1, 2).reshape(x.shape)


class AveragePool(nn.Module):
    """The mean over all positions, followed by a linear layer, which starts at 0.

    Args:
        channels: channels of the input.
        outputs: size of the output.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.out = zero_parameters(nn.Linear(channels, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, *size] to [N, outputs]."""
        return self.out(x.flatten(2).mean(2))


class AttentionPool(nn.Module):
    """Attention of the mean over all positions to itself and to each of them, followed by a linear layer, which starts at 0.

    The pooling of "Learning Transferable Visual Models From Natural Language Supervision" (Radford et al., 2021), section
    2.4, https://arxiv.org/abs/2103.00020.

    Args:
        channels: channels of the input.
        outputs: size of the output.
        positions: number of positions of the input; each has an embedding, and so has the mean.
        heads: number of heads; divides ``channels``.

    Raises:
        OptionError: ``heads`` does not divide ``channels``.
    """

    def __init__(self, channels: int, outputs: int, *, positions: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise OptionError(f"{heads} attention heads do not divide {channels} channels")
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(channels, 1 + positions) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_parameters(nn.Linear(channels, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, *size] to [N, outputs]."""
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positions
        qkv = self.qkv(x.transpose(1, 2))  # [N, 1 + L, 3 C]
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # [N, heads, 1, C / heads]
        return self.out(pooled.flatten(1))
