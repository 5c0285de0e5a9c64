"""Checkpoints of openai/guided-diffusion, and of its predecessor openai/improved-diffusion.

Their files hold a state dict and nothing else: what the network, the noise schedule and the meaning of its output are is
said by the flags of their scripts. A :class:`~pyrodiff.interop.cards.Card` is a set of those flags;
:data:`~pyrodiff.interop.cards.CARDS` has one for every published checkpoint, under the name of its file. Classifiers of
noisy images have cards of their own, :class:`~pyrodiff.interop.cards.ClassifierCard` and
:data:`~pyrodiff.interop.cards.CLASSIFIERS`.

Their timestep index counts from 0 (the least noisy step): it is this library's step minus one.

References:
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021). https://arxiv.org/abs/2105.05233
    Improved DDPM (Nichol and Dhariwal, 2021). https://arxiv.org/abs/2102.09672
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrodiff import _files
from pyrodiff.classifier import NoisyClassifier
from pyrodiff.diffusion import GaussianDiffusion
from pyrodiff.errors import CheckpointError, OptionError, check_option
from pyrodiff.interop import _foreign
from pyrodiff.interop.cards import CARDS, CLASSIFIERS, Card, ClassifierCard, as_card, as_classifier_card
from pyrodiff.nets import Classifier, UNet
from pyrodiff.reverse import Bins

__all__ = [
    "CARDS",
    "CLASSIFIERS",
    "Card",
    "ClassifierCard",
    "as_card",
    "as_classifier_card",
    "card_of",
    "load",
    "load_classifier",
    "load_unet",
    "parameter_names",
    "save",
    "unet_arguments",
]

_LAYERS = {
    # of a residual block
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
    # of attention
    "norm": "norm",
    "qkv": "qkv",
    "out": "proj_out",
}
_ENDS = {
    "embedding.hidden": "time_embed.0",
    "embedding.output": "time_embed.2",
    "embedding.label": "label_emb",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_POOLS = {
    "attention": {"pool": "out.2", "pool.qkv": "out.2.qkv_proj", "pool.out": "out.2.c_proj"},
    "average": {"pool.out": "out.3"},
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
        "norm_groups": 32,
        "time_embedding": "index",
        "checkpointing": use_checkpoint,
    }


def parameter_names(net: UNet | Classifier) -> dict[str, str]:
    """Where guided-diffusion's ``UNetModel`` or ``EncoderUNetModel`` keeps each parameter of a network of ours.

    Args:
        net: the network, which may be without memory.

    Returns:
        For each key of the network's state dict, theirs, such as ``"input_blocks.3.0.op.weight"``.
    """
    levels, blocks = len(net.config["multipliers"]), net.config["blocks"]
    attention = set(net.config["attention"])
    ends = _ENDS | (_POOLS["average" if net.size is None else "attention"] if isinstance(net, Classifier) else {})

    def stem(ours: str) -> str:
        if ours in ends:
            return ends[ours]
        if match := re.fullmatch(r"middle\.([01])\.(residual|attention)\.(\w+)", ours):
            position = 1 if match[2] == "attention" else 2 * int(match[1])
            return f"middle_block.{position}.{_LAYERS[match[3]]}"
        # Its blocks are numbered through from the first to the last, each a short list of layers.
        match = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(?:blocks\.(\d+)\.(\w+)|resample)\.(\w+)", ours)
        if match is None:
            raise OptionError(f"guided-diffusion's UNetModel has no place for {ours!r}")
        level, resample, layer = int(match[2]), match[3] is None, match[5]
        block = blocks if resample else int(match[3])
        position = 1 if match[4] == "attention" else 0
        if match[1] == "encoder":
            layers = {**_LAYERS, "conv": "op"}
            return f"input_blocks.{1 + level * (blocks + 1) + block}.{position}.{layers[layer]}"
        if resample:  # the last layer of its block, after attention if there is any
            position = 2 if level in attention else 1
        layers = {**_LAYERS, "conv": "conv"}
        return f"output_blocks.{(levels - 1 - level) * (blocks + 1) + block}.{position}.{layers[layer]}"

    parts = ((key, key.rpartition(".")) for key in net.state_dict())
    kinds = {"positions": "positional_embedding"}
    return {key: f"{stem(ours)}.{kinds.get(kind, kind)}" for key, (ours, _, kind) in parts}


def load(
    path: str | os.PathLike[str],
    card: str | os.PathLike[str] | Card | None = None,
    *,
    clip: bool = True,
) -> GaussianDiffusion:
    """Load a checkpoint of guided- or improved-diffusion (or of the weights' average, ``ema_...pt``) as a diffusion.

    The decoder and the bins are theirs: ``decoder="openai"`` and 256 levels in [-1, 1].

    Args:
        path: the file, a state dict; weights in half precision become float32.
        card: what the file does not tell (see :func:`as_card`); None: by the file's name.
        clip: clamp x_0's estimate to [-1, 1], as their scripts do when they sample and when they evaluate the bound.

    Returns:
        The diffusion, in evaluation mode, on the CPU. An upsampler's programs want ``low_res=``, smaller images
        ``[B, 3, small_size, small_size]``.

    Raises:
        CheckpointError: the file is not a state dict, or does not fit the card.
        OptionError: no such card.
    """
    card = as_card(card, path)
    net = _net(card)
    _fill(net, path, "the card")
    return _diffusion(net, card, clip).eval()


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
    with torch.device("meta"):
        net = UNet(**unet_arguments(**arguments), log_snr_table=log_snr_table, index_step=index_step)
    _fill(net, path, "the arguments")
    return net.eval()


def load_classifier(
    path: str | os.PathLike[str], card: str | os.PathLike[str] | ClassifierCard | None = None
) -> NoisyClassifier:
    """Load a classifier of noisy images of guided-diffusion, to guide a sampler with.

    Args:
        path: the file, a state dict; weights in half precision become float32.
        card: what the file does not tell (see :func:`as_classifier_card`); None: by the file's name.

    Returns:
        The classifier, in evaluation mode, on the CPU; its steps are those of the chain that it was trained on, and its network
        ``net`` can be asked by their index too, ``net(x, index=index)``.

    Raises:
        CheckpointError: the file is not a state dict, or does not fit the card.
        OptionError: no such card, or that of a diffusion model.
    """
    card = as_classifier_card(card, path)
    net = _classifier(card)
    _fill(net, path, "the card")
    return NoisyClassifier(net, card.schedule, (card.in_channels, card.image_size, card.image_size)).eval()


def card_of(diffusion: GaussianDiffusion) -> Card:
    """The flags of guided-diffusion's scripts that mean a diffusion; its decoder and bins have none.

    A null class is the last of one class more: guided-diffusion does not know that it is one.

    Raises:
        OptionError: an option of the diffusion or of its network that guided-diffusion does not have, by name.
    """
    net, kernel, schedule = diffusion.net, diffusion.reverse_kernel, diffusion.schedule
    if not isinstance(net, UNet):
        raise OptionError(f"guided-diffusion cannot hold a {type(net).__name__}: the network is not a UNet")
    config, size = net.config, diffusion.event_shape
    schedule_kind = type(schedule).__name__
    schedule_kind = {"LinearSchedule": "linear", "CosineSchedule": "cosine"}.get(schedule_kind, schedule_kind)
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "dims": (config["dims"], (2,)),
        "event_shape": (list(size), ([size[0], size[-1], size[-1]],)),
        "resample": (config["resample"], ("conv", "residual")),
        "fourier_features": (config["fourier_features"], ([],)),
        "low_res_channels": (config["low_res_channels"], (0, config["channels"])),
        "norm_groups": (
            _foreign.only({m.num_groups for m in net.modules() if isinstance(m, torch.nn.GroupNorm)}),
            (32,),
        ),
        "norm_eps": (config["norm_eps"], (1e-5,)),
        "middle_attention": (config["middle_attention"], ("normalised",)),
        "downsample_padding": (config["downsample_padding"], ("both",)),
        "time_embedding": (config["time_embedding"], ("index",)),
        "index_shift": (config["index_shift"], (0,)),
        "schedule": (schedule_kind, ("linear", "cosine")),
        "prediction": (kernel.prediction, ("eps", "x0")),
        "variance": (kernel.variance, ("fixed_small", "fixed_large", "learned_range")),
    }
    _foreign.refuse("guided-diffusion", wanted)
    sizes = [size[1] // 2**level for level in config["attention"]]
    card = Card(
        image_size=size[1],
        num_channels=config["width"],
        num_res_blocks=config["blocks"],
        num_heads=config["heads"],
        num_heads_upsample=config["decoder_heads"] or -1,
        num_head_channels=config["head_channels"] or -1,
        attention_resolutions=tuple(sizes),
        channel_mult=tuple(config["multipliers"]),
        dropout=float(config["dropout"]),
        class_cond=config["classes"] is not None,
        use_scale_shift_norm=config["scale_shift"],
        resblock_updown=config["resample"] == "residual",
        use_new_attention_order=config["attention_order"] == "qkv_first",
        learn_sigma=kernel.variance == "learned_range",
        sigma_small=kernel.variance == "fixed_small",
        diffusion_steps=schedule.steps,
        noise_schedule=schedule_kind,
        predict_xstart=kernel.prediction == "x0",
        rescale_timesteps=config["index_step"] != 1,
        # The network takes any smaller size; that of the published ones is a quarter.
        small_size=max(1, size[1] // 4) if config["low_res_channels"] else None,
        in_channels=config["channels"],
        num_classes=1000 if net.embedding.label is None else net.embedding.label.num_embeddings,
    )
    table = schedule.log_snr(torch.arange(1, schedule.steps + 1, device="cpu")).tolist()
    if not math.isclose(config["index_step"], card.index_step) or config["log_snr_table"] not in (None, table):
        raise OptionError("guided-diffusion cannot hold a network with steps other than those of the schedule")
    return card


def save(path: str | os.PathLike[str], diffusion: GaussianDiffusion) -> None:
    """Save the weights as guided-diffusion does, and the flags that belong to them.

    A network with a null class becomes one with one class more, the last; so is it loaded, without ``null_cond``.

    Args:
        path: the file, ``.pt``; the flags become the ``.json`` of the same name, with which :func:`load` reads the file.
        diffusion: its decoder and bins are not saved: guided-diffusion has only its own.

    Raises:
        OptionError: an option that guided-diffusion does not have, by name.
        CheckpointError: a file cannot be written.
    """
    path = Path(path)
    check_option("the suffix of a guided-diffusion checkpoint", path.suffix, (".pt",))
    card = card_of(diffusion)
    net: Any = diffusion.net
    buffer = io.BytesIO()
    torch.save({key: value.contiguous().cpu() for key, value in _theirs(net).items()}, buffer)
    _files.write(path, buffer.getvalue())
    _files.write_json(path.with_suffix(".json"), asdict(card))


def _net(card: Card) -> UNet:
    """The network that a card describes, without memory."""
    arguments = unet_arguments(**card.unet)
    arguments["low_res_channels"] = 0 if card.small_size is None else card.in_channels
    table = card.schedule.log_snr(torch.arange(1, card.diffusion_steps + 1, device="cpu")).tolist()
    with torch.device("meta"):
        return UNet(**arguments, log_snr_table=table, index_step=card.index_step)


def _classifier(card: ClassifierCard) -> Classifier:
    """The classifier that a card describes, without memory."""
    factors = [card.image_size // size for size in card.classifier_attention_resolutions]
    table = card.schedule.log_snr(torch.arange(1, card.diffusion_steps + 1, device="cpu")).tolist()
    with torch.device("meta"):
        return Classifier(
            card.in_channels,
            classes=card.num_classes,
            size=[card.image_size] * 2 if card.classifier_pool == "attention" else None,
            width=card.classifier_width,
            multipliers=card.multipliers,
            blocks=card.classifier_depth,
            attention=[level for level in range(len(card.multipliers)) if 2**level in factors],
            head_channels=card.num_head_channels,
            attention_order="heads_first",
            scale_shift=card.classifier_use_scale_shift_norm,
            resample="residual" if card.classifier_resblock_updown else "conv",
            norm_groups=32,
            time_embedding="index",
            log_snr_table=table,
            index_step=card.index_step,
        )


def _diffusion(net: UNet, card: Card, clip: bool) -> GaussianDiffusion:
    shape = (card.in_channels, card.image_size, card.image_size)
    fixed = "fixed_small" if card.sigma_small else "fixed_large"
    bins: Bins = (256, -1.0, 1.0)
    return GaussianDiffusion(
        net,
        card.schedule,
        shape,
        prediction="x0" if card.predict_xstart else "eps",
        variance="learned_range" if card.learn_sigma else fixed,
        decoder="openai",
        bins=bins,
        clip=clip,
    )


def _theirs(net: UNet | Classifier) -> dict[str, Tensor]:
    """The network's state dict as ``UNetModel`` or ``EncoderUNetModel`` lays it out."""
    state, names = net.state_dict(), parameter_names(net)
    # A linear layer here, a convolution of kernel 1 there; over positions in a row, or over the pooled image.
    if isinstance(net, Classifier) and net.size is None:
        state["pool.out.weight"] = state["pool.out.weight"][..., None]
    convolutions = (".attention.qkv.weight", ".attention.out.weight", "pool.qkv.weight", "pool.out.weight")
    return {names[key]: value[..., None] if key.endswith(convolutions) else value for key, value in state.items()}


def _fill(net: UNet | Classifier, path: str | os.PathLike[str], what: str) -> None:
    theirs, expected = _foreign.read_torch(path), _theirs(net)
    parts = {key.partition(".")[0] for key in theirs}
    if isinstance(net, Classifier) and "output_blocks" in parts:
        raise CheckpointError(f"{os.fspath(path)!r} holds a diffusion model, not a classifier: load reads it")
    if isinstance(net, UNet) and "middle_block" in parts and "output_blocks" not in parts:
        raise CheckpointError(f"{os.fspath(path)!r} holds a classifier: load_classifier reads it")
    if problem := _foreign.difference(theirs, expected):
        raise CheckpointError(f"{os.fspath(path)!r} does not fit {what}; parameters: {problem}")
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    names = parameter_names(net)
    _foreign.assign(net, {key: theirs.pop(names[key]).reshape(shape) for key, shape in shapes.items()})
