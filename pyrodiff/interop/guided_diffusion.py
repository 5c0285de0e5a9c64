"""Networks of openai/guided-diffusion, and of its predecessor openai/improved-diffusion.

Their timestep index counts from 0 (the least noisy step): it is this library's step minus one.
"Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol, 2021),
https://arxiv.org/abs/2105.05233.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrodiff.errors import CheckpointError
from pyrodiff.nets import UNet

__all__ = ["load_unet", "parameter_name", "unet_arguments"]

_RESIDUAL = {
    "in_layers.0": "norm_in",
    "in_layers.2": "conv_in",
    "emb_layers.1": "embedding",
    "out_layers.0": "norm_out",
    "out_layers.3": "conv_out",
    "skip_connection": "skip",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "proj_out": "out"}
_ENDS = {
    "time_embed.0": "embedding.hidden",
    "time_embed.2": "embedding.output",
    "label_emb": "embedding.label",
    "input_blocks.0.0": "conv_in",
    "out.0": "norm_out",
    "out.2": "conv_out",
}


def unet_arguments(
    *,
    in_channels: int,
    model_channels: int,
    out_channels: int,
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    image_size: int | None = None,
    dropout: float = 0.0,
    channel_mult: Sequence[float] = (1, 2, 4, 8),
    conv_resample: bool = True,
    dims: int = 2,
    num_classes: int | None = None,
    use_checkpoint: bool = False,
    use_fp16: bool = False,
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
) -> dict[str, Any]:
    """Translate the constructor arguments of guided-diffusion's ``UNetModel`` into ours.

    The arguments have the names and the defaults of ``UNetModel``. ``image_size`` and ``use_fp16``
    are accepted and not used. ``attention_resolutions`` are downsampling *factors*, as in
    ``UNetModel`` itself: the command-line flag ``--attention_resolutions 32,16,8`` of a model of
    64 pixels means factors 2, 4 and 8.

    Returns:
        Arguments of :class:`pyrodiff.nets.UNet`.
    """
    own_heads = num_head_channels == -1
    return {
        "channels": in_channels,
        "out_channels": out_channels,
        "width": model_channels,
        "multipliers": list(channel_mult),
        "blocks": num_res_blocks,
        "attention": [level for level in range(len(channel_mult)) if 2**level in attention_resolutions],
        "dims": dims,
        # Its three-dimensional networks keep the first of the three axes at full resolution.
        "resample_axes": min(dims, 2),
        "heads": num_heads if own_heads else 1,
        "decoder_heads": None if num_heads_upsample == -1 or not own_heads else num_heads_upsample,
        "head_channels": None if own_heads else num_head_channels,
        "attention_order": "qkv_first" if use_new_attention_order else "heads_first",
        "classes": num_classes,
        "scale_shift": use_scale_shift_norm,
        "resample": "residual" if resblock_updown else "conv" if conv_resample else "fixed",
        "dropout": dropout,
        "time_embedding": "index",
        "checkpointing": use_checkpoint,
    }


def parameter_name(key: str, *, levels: int, blocks: int) -> str | None:
    """Translate the name of a parameter of guided-diffusion's ``UNetModel`` into ours.

    Args:
        key: a key of the state dict of ``UNetModel``, such as ``"input_blocks.3.0.op.weight"``.
        levels: number of resolution levels, ``len(channel_mult)``.
        blocks: residual blocks per level, ``num_res_blocks``.

    Returns:
        The key in the state dict of :class:`pyrodiff.nets.UNet`, or None if ``UNetModel`` has no
        such key.
    """
    stem, _, kind = key.rpartition(".")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{kind}"

    # Its blocks are numbered through from the first to the last, each a short list of layers.
    match = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)", stem)
    if match is None:
        match = re.fullmatch(r"(middle_block)\.()([012])\.(.+)", stem)
        if match is None:
            return None
    half, number, position, layer = match[1], match[2], int(match[3]), match[4]

    if half == "middle_block":
        ours = "middle.1" if position == 2 else "middle.0"
        last, resampling = position == 1, False
    elif half == "input_blocks":
        level, block = divmod(int(number) - 1, blocks + 1)
        resampling = block == blocks
        ours = f"encoder.{level}" if resampling else f"encoder.{level}.blocks.{block}"
        last = position == 1
    else:
        level, block = divmod(int(number), blocks + 1)
        level = levels - 1 - level
        # The upsampling layer is the last of its block, after attention if there is any.
        resampling = position > 0 and layer not in _ATTENTION
        ours = f"decoder.{level}" if resampling else f"decoder.{level}.blocks.{block}"
        last = position == 1

    if resampling:
        if layer in ("op", "conv"):
            return f"{ours}.resample.conv.{kind}"
        return f"{ours}.resample.{_RESIDUAL[layer]}.{kind}" if layer in _RESIDUAL else None
    if last:
        return f"{ours}.attention.{_ATTENTION[layer]}.{kind}" if layer in _ATTENTION else None
    return f"{ours}.residual.{_RESIDUAL[layer]}.{kind}" if layer in _RESIDUAL else None


def load_unet(
    path: str | os.PathLike[str],
    *,
    log_snr_table: Sequence[float] | None = None,
    index_step: float = 1.0,
    **arguments: Any,
) -> UNet:
    """Load the weights of a guided-diffusion ``UNetModel``.

    The result can be called as ``net(x, index=index, y=y)`` with the timestep index that the
    weights were trained with and, given ``log_snr_table``, as ``net(x, log_snr, y=y)`` like every
    network of this library.

    Args:
        path: a file holding the state dict; weights in half precision become float32.
        log_snr_table: the log-SNR of each step of the chain the network was trained on, least
            noisy first, in nats.
        index_step: the index that belongs to entry i of the table is ``i * index_step``; with
            ``rescale_timesteps`` that is ``1000 / steps``.
        **arguments: the constructor arguments of ``UNetModel``, by its names; see
            :func:`unet_arguments`. The file does not hold them.

    Returns:
        The network, in evaluation mode.

    Raises:
        CheckpointError: the file is not a state dict, or does not fit the arguments.
        OptionError: an argument is outside its range.
    """
    config = unet_arguments(**arguments)
    net = UNet(**config, log_snr_table=log_snr_table, index_step=index_step)
    theirs = _read_state_dict(path)
    expected = net.state_dict()

    state: dict[str, Tensor] = {}
    unexpected, misshapen = [], []
    for key, value in theirs.items():
        name = parameter_name(key, levels=len(config["multipliers"]), blocks=config["blocks"])
        if name is None or name not in expected:
            unexpected.append(key)
            continue
        if ".attention." in name and value.dim() == 3 and value.shape[2] == 1:
            value = value.squeeze(2)  # a convolution of kernel 1 there, a linear layer here
        if value.shape != expected[name].shape:
            misshapen.append(f"{key} {list(value.shape)} for {list(expected[name].shape)}")
        state[name] = value
    missing = [name for name in expected if name not in state]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{os.fspath(path)} does not fit the arguments; parameters: {'; '.join(problems)}")
    net.load_state_dict(state)
    return net.eval()


def _read_state_dict(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # besides its own, torch lets through those of zipfile and pickle
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{os.fspath(path)} cannot be read as weights: {reason}") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise CheckpointError(f"{os.fspath(path)} holds no state dict of names and tensors")
    return content
