"""Folders of huggingface/diffusers: a ``UNet2DModel`` and a ``DDPMScheduler`` or ``DDIMScheduler``.

Reads and writes their JSON and safetensors files; the package itself is not needed. Their timestep index counts from 0 (the
least noisy step): it is this library's step minus one.

What is refused, by name, is what this library's UNet or chain has no counterpart of. Of a scheduler, how it lays out fewer
steps (``timestep_spacing``, ``steps_offset``) is passed over: that is ``respace``'s to say. Their tables are float32, ours
float64, so that a step of the chain agrees to about 1e-4 where alpha-bar is near 1, and the networks to rounding.

References:
    https://huggingface.co/docs/diffusers/api/models/unet2d
    https://huggingface.co/docs/diffusers/api/schedulers/ddpm
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrodiff import _files
from pyrodiff.diffusion import GaussianDiffusion
from pyrodiff.errors import CheckpointError, OptionError, PyrodiffError
from pyrodiff.interop import _foreign
from pyrodiff.nets import UNet
from pyrodiff.nets.embeddings import index_features
from pyrodiff.nets.layers import Attention
from pyrodiff.reverse import Bins
from pyrodiff.schedules import CosineSchedule, LinearSchedule, Schedule, TableSchedule

__all__ = ["find", "load", "save"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"
_MAX_STEPS = 100_000  # of a schedule: its tables are in memory
_MALFORMED = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

# The arguments of UNet2DModel and their defaults, which stand for what an older file leaves out.
_UNET: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# Those of both schedulers; each ignores what only the other has.
_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    # passed over
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# fixed_small_log is a standard deviation taken from the same variance. fixed_large_log and learned are no variances in
# diffusers: it takes the square root of a logarithm, and of the network's own channel.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
_BLOCKS: dict[str, tuple[bool, str]] = {  # attention, and how the resolution changes
    "DownBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, "downsample_type"),
    "UpBlock2D": (False, "conv"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
    "AttnUpBlock2D": (True, "upsample_type"),
}
_RESAMPLE = {"conv": "conv", "resnet": "residual"}

_LAYERS = {
    # of a residual block
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embedding": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
    # of attention
    "norm": "group_norm",
    "qkv": "to_q",
    "out": "to_out.0",
    # of a change of resolution
    "conv": "conv",
}
_ENDS = {
    "embedding.hidden": "time_embedding.linear_1",
    "embedding.output": "time_embedding.linear_2",
    "embedding.label": "class_embedding",
    "embedding.rows": "time_proj",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def find(path: str | os.PathLike[str]) -> tuple[Path, Path | None] | None:
    """Where a folder keeps its network and its scheduler's file; None if it is no folder of diffusers.

    A folder is that of a network (``config.json``), its scheduler in the same or in a folder ``scheduler`` beside it, or
    that of a pipeline, with folders ``unet`` and ``scheduler``.
    """
    folder = Path(path)
    net = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    if not (net / "config.json").is_file():
        return None
    if net is folder and "_class_name" not in _foreign.read_json(net / "config.json"):
        return None
    for scheduler in (net / SCHEDULER, folder / "scheduler" / SCHEDULER, folder.parent / "scheduler" / SCHEDULER):
        if scheduler.is_file():
            return net, scheduler
    return net, None


def load(
    path: str | os.PathLike[str],
    *,
    event_shape: Sequence[int] | None = None,
    decoder: str = "openai",
    bins: Bins | None = (256, -1.0, 1.0),
) -> GaussianDiffusion:
    """Load a folder of diffusers (see :func:`find`) as a diffusion.

    The folder does not say what the data are: decoder and bins default to guided-diffusion's, images of 256 levels in
    [-1, 1].

    Args:
        path: the folder.
        event_shape: shape of one example; None: from the network's ``in_channels`` and ``sample_size``.
        decoder, bins: see :class:`~pyrodiff.GaussianDiffusion`.

    Returns:
        The diffusion, in evaluation mode, on the CPU; weights in half precision become float32. Its network can be called
        with diffusers' timestep, too: ``net(x, index=timestep)``.

    Raises:
        CheckpointError: a file is missing or unsound, or the weights do not fit the configuration.
        OptionError: an option that this library has no counterpart of, by name.
    """
    found = find(path)
    if found is None:
        raise CheckpointError(f"{os.fspath(path)!r} is no folder of diffusers: it has no config.json of theirs")
    folder, scheduler = found
    unet = _config(folder / "config.json", ("UNet2DModel",), _UNET)
    if scheduler is None:
        raise CheckpointError(f"{os.fspath(path)!r} has no {SCHEDULER}: save the scheduler into the same folder")
    chain = _config(scheduler, ("DDPMScheduler", "DDIMScheduler"), _SCHEDULER)
    theirs = {_modern(key): value for key, value in _foreign.read_safetensors(folder / WEIGHTS).items()}
    try:
        schedule, options = _chain(chain, bins)
        arguments = _arguments(unet, schedule)
        if arguments["blocks"] * len(arguments["multipliers"]) > len(theirs):
            raise CheckpointError(f"{str(folder / WEIGHTS)!r} has fewer tensors than config.json has layers")
        with torch.device("meta"):
            net = UNet(**arguments)
        shape = tuple(event_shape) if event_shape is not None else _event_shape(unet)
        outputs = unet["in_channels"] * (2 if options["variance"] == "learned_range" else 1)
        _foreign.refuse("this library", {"out_channels": (unet["out_channels"], (outputs,))})
        diffusion = GaussianDiffusion(net, schedule, shape, decoder=decoder, bins=bins, **options)
    except PyrodiffError:
        raise
    except _MALFORMED as error:
        raise CheckpointError(
            f"{os.fspath(path)!r} has a configuration that does not work: {_foreign.line(error)}"
        ) from None
    if problem := _foreign.difference(theirs, _theirs(net)):
        raise CheckpointError(f"{str(folder / WEIGHTS)!r} does not fit config.json; parameters: {problem}")
    state = _ours(net, theirs)
    if not unet["flip_sin_to_cos"] and unet["time_embedding_type"] == "positional":  # sines first, there
        state["embedding.hidden.weight"] = torch.cat(state["embedding.hidden.weight"].chunk(2, dim=1)[::-1], dim=1)
    _foreign.assign(net, state)
    return diffusion.eval()


def save(path: str | os.PathLike[str], diffusion: GaussianDiffusion) -> None:
    """Save a diffusion as a folder that ``UNet2DModel.from_pretrained`` and ``DDPMScheduler.from_pretrained`` read.

    A network that sees the log-SNR, or whose steps are not those of the schedule, becomes one with
    ``time_embedding_type="learned"``: a row of features for each step. A network with a null class becomes one with one
    class more, the last; so is it loaded, without ``null_cond``.

    Args:
        path: the folder, created if need be; gets ``config.json``, ``scheduler_config.json`` and the weights.
        diffusion: its decoder and bins are not saved: diffusers has none.

    Raises:
        OptionError: an option that diffusers does not have, by name.
        CheckpointError: a file cannot be written.
    """
    import safetensors.torch

    net = diffusion.net
    if not isinstance(net, UNet):
        raise OptionError(f"diffusers cannot hold a {type(net).__name__}: the network is not a UNet")
    scheduler = _scheduler_config(diffusion)
    config = _unet_config(net, diffusion)
    state = {key: value.detach().cpu() for key, value in _theirs(net).items()}
    log_snr = diffusion.schedule.log_snr(torch.arange(1, diffusion.steps + 1, device="cpu")).detach().float()
    with torch.no_grad():
        embedding = net.embedding
        features = embedding.time_features(log_snr, log_snr.to(embedding.hidden.weight.device)).float().cpu()
    index = torch.arange(diffusion.steps, device="cpu")
    if net.config["time_embedding"] != "index" or not torch.equal(
        features, index_features(index, embedding.features, embedding.index_shift)
    ):
        config |= {"time_embedding_type": "learned", "num_train_timesteps": diffusion.steps}
        state["time_proj.weight"] = features
    data = safetensors.torch.save({key: value.contiguous() for key, value in state.items()}, {"format": "pt"})
    folder = Path(path)
    _files.write(folder / WEIGHTS, data)
    _files.write_json(folder / SCHEDULER, scheduler)
    _files.write_json(folder / "config.json", config)


# ---------------------------------------------------------------------- configurations


def _config(path: Path, classes: tuple[str, ...], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its defaults; refuses another class, and options that are none of its."""
    given = _foreign.read_json(path)
    name = given.get("_class_name")
    if name not in classes:
        raise OptionError(f"{str(path)!r} is of class {name!r}, not one of {', '.join(classes)}")
    given = {key: value for key, value in given.items() if not key.startswith("_")}
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise OptionError(f"{str(path)!r} has options that {name} does not: {', '.join(sorted(unknown)[:5])}")
    return {**defaults, **given}


def _chain(config: dict[str, Any], bins: Bins | None) -> tuple[Schedule, dict[str, Any]]:
    """A scheduler's schedule, and the options of the diffusion that it decides."""
    _, low, high = bins or (0, -1.0, 1.0)
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "thresholding": (config["thresholding"], (False,)),
        "rescale_betas_zero_snr": (config["rescale_betas_zero_snr"], (False,)),
        "set_alpha_to_one": (config["set_alpha_to_one"], (True,)),
        "prediction_type": (config["prediction_type"], tuple(_PREDICTIONS)),
        "variance_type": (config["variance_type"], tuple(_VARIANCES)),
        "clip_sample": (config["clip_sample"], (True, False)),
    }
    if config["trained_betas"] is None:
        kinds = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
        wanted["beta_schedule"] = (config["beta_schedule"], kinds)
    if config["clip_sample"]:
        allowed = (high,) if low == -high else ()
        wanted["clip_sample_range"] = (config["clip_sample_range"], allowed)
    _foreign.refuse("this library", wanted)
    return _schedule(config), {
        "prediction": _PREDICTIONS[config["prediction_type"]],
        "variance": _VARIANCES[config["variance_type"]],
        "clip": bool(config["clip_sample"]),
    }


def _schedule(config: dict[str, Any]) -> Schedule:
    if config["trained_betas"] is not None:
        return TableSchedule(config["trained_betas"])
    steps, kind = config["num_train_timesteps"], config["beta_schedule"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= _MAX_STEPS:
        raise OptionError(f"num_train_timesteps={steps!r} is not in 1..{_MAX_STEPS}")
    if kind == "squaredcos_cap_v2":
        return CosineSchedule(steps)
    start, end = float(config["beta_start"]), float(config["beta_end"])
    if kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")
        if steps > 20 and torch.equal(betas, LinearSchedule(steps).betas):
            return LinearSchedule(steps)
        return TableSchedule(betas)
    if kind == "scaled_linear":
        return TableSchedule(torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64, device="cpu") ** 2)
    return TableSchedule(
        torch.linspace(-6, 6, steps, dtype=torch.float64, device="cpu").sigmoid() * (end - start) + start
    )


def _scheduler_config(diffusion: GaussianDiffusion) -> dict[str, Any]:
    kernel, schedule = diffusion.reverse_kernel, diffusion.schedule
    _, low, high = kernel.bins or (0, -1.0, 1.0)
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "prediction": (kernel.prediction, tuple(predictions)),
        "variance": (kernel.variance, tuple(_VARIANCES.values())),
        "dims of the schedule's values": (schedule.event_dim, (0,)),
    }
    if kernel.clip:
        wanted["range of bins to clip to"] = ([low, high], ([-high, high],))
    _foreign.refuse("diffusers", wanted)
    config = {
        **{"_class_name": "DDPMScheduler", "num_train_timesteps": schedule.steps},
        **{"prediction_type": predictions[kernel.prediction], "variance_type": kernel.variance},
        **{"clip_sample": kernel.clip, "clip_sample_range": high if kernel.clip else 1.0},
    }
    if type(schedule) is CosineSchedule:
        return {**config, "beta_schedule": "squaredcos_cap_v2"}
    betas = schedule.betas.detach().tolist()
    if type(schedule) is LinearSchedule:
        return {**config, "beta_schedule": "linear", "beta_start": betas[0], "beta_end": betas[-1]}
    return {**config, "trained_betas": betas}


def _event_shape(config: dict[str, Any]) -> tuple[int, ...]:
    size = config["sample_size"]
    if size is None:
        raise OptionError("config.json has no sample_size: give event_shape=")
    height, width = (size, size) if isinstance(size, int) else size
    if not all(isinstance(n, int) and n > 0 for n in (height, width)):
        raise OptionError(f"sample_size={size!r} is not one or two positive numbers of pixels")
    return config["in_channels"], height, width


def _arguments(config: dict[str, Any], schedule: Schedule) -> dict[str, Any]:
    """The arguments of our network from those of UNet2DModel."""
    widths, steps = list(config["block_out_channels"]), schedule.steps
    down = [str(kind).removeprefix("UNetRes") for kind in config["down_block_types"]]
    up = [str(kind).removeprefix("UNetRes") for kind in reversed(config["up_block_types"])]
    groups, scale_shift = config["norm_num_groups"], config["resnet_time_scale_shift"] == "scale_shift"
    learned = config["time_embedding_type"] == "learned"
    downs = ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D")
    ups = ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "center_input_sample": (config["center_input_sample"], (False,)),
        "time_embedding_type": (config["time_embedding_type"], ("positional", "learned")),
        "time_embedding_dim": (config["time_embedding_dim"], (None, 4 * widths[0])),
        "mid_block_type": (config["mid_block_type"], ("UNetMidBlock2D",)),
        "mid_block_scale_factor": (config["mid_block_scale_factor"], (1,)),
        "downsample_padding": (config["downsample_padding"], (0, 1)),
        "act_fn": (config["act_fn"], ("silu", "swish")),
        "attn_norm_num_groups": (config["attn_norm_num_groups"], (None, groups)),
        "resnet_time_scale_shift": (config["resnet_time_scale_shift"], ("default", "scale_shift")),
        "class_embed_type": (config["class_embed_type"], (None,)),
        **{f"down_block_types[{i}]": (kind, downs) for i, kind in enumerate(down)},
        **{f"up_block_types[-{i + 1}]": (kind, ups) for i, kind in enumerate(up)},
    }
    if learned:
        wanted["num_train_timesteps"] = (config["num_train_timesteps"], (steps,))
    _foreign.refuse("this library", wanted)
    if not isinstance(groups, int):
        raise OptionError(f"norm_num_groups={groups!r} is not an integer")
    if not len(widths) == len(down) == len(up):
        raise OptionError(
            f"block_out_channels, down_block_types and up_block_types have {len(widths)}, {len(down)} and {len(up)} entries"
        )
    attention = [level for level, kind in enumerate(down) if _BLOCKS[kind][0]]
    if attention != [level for level, kind in enumerate(up) if _BLOCKS[kind][0]]:
        raise OptionError(
            "this library cannot hold attention at other levels in up_block_types than in down_block_types"
        )
    # The coarsest level is not reduced, the finest not enlarged.
    changes = [_BLOCKS[kind][1] for kind in down[:-1] + up[1:]]
    resample = {str(config[change] or "conv") if change in config else change for change in changes} or {"conv"}
    _foreign.refuse("this library", {"ways of changing the resolution": (_foreign.only(resample), tuple(_RESAMPLE))})
    middle = "normalised"
    if not config["add_attention"]:
        middle = "none"
    elif scale_shift and config["attn_norm_num_groups"] is None:
        middle = "plain"
    head_dim = config["attention_head_dim"]
    return {
        "channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "width": widths[0],
        "multipliers": [_multiplier(width, widths[0]) for width in widths],
        "blocks": config["layers_per_block"],
        "attention": attention,
        "heads": 1,
        "head_channels": head_dim,
        "classes": config["num_class_embeds"],
        "scale_shift": scale_shift,
        "resample": _RESAMPLE[_foreign.only(resample)],
        "dropout": config["dropout"],
        "norm_groups": groups,
        "norm_eps": config["norm_eps"],
        "middle_attention": middle,
        "downsample_padding": "both" if config["downsample_padding"] else "after",
        "time_embedding": "learned" if learned else "index",
        "log_snr_table": schedule.log_snr(torch.arange(1, steps + 1, device="cpu")).tolist(),
        "index_shift": 0 if learned else config["freq_shift"],
    }


def _multiplier(width: int, first: int) -> float:
    """The multiple of ``first`` that a network of ours rounds down to ``width``."""
    multiplier = width / first
    if int(multiplier * first) < width:
        multiplier = math.nextafter(multiplier, math.inf)
    return int(multiplier) if multiplier == int(multiplier) else multiplier


def _unet_config(net: UNet, diffusion: GaussianDiffusion) -> dict[str, Any]:
    """The arguments of UNet2DModel from those of our network."""
    ours = net.config
    attentions = [(m.qkv.in_features, m.heads) for m in net.modules() if isinstance(m, Attention)]
    head_dim: Any = _foreign.only({width // heads for width, heads in attentions} or {8})
    if all(heads == 1 for _, heads in attentions):
        head_dim = None
    groups = _foreign.only({m.num_groups for m in net.modules() if isinstance(m, torch.nn.GroupNorm)})
    widths = [int(multiplier * ours["width"]) for multiplier in ours["multipliers"]]
    shift, levels = "scale_shift" if ours["scale_shift"] else "default", range(len(widths))
    middles = ("normalised", "none", "plain") if ours["scale_shift"] else ("normalised", "none")
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "dims": (ours["dims"], (2,)),
        "resample_axes": (ours["resample_axes"], (None, 2)),
        "fourier_features": (ours["fourier_features"], ([],)),
        "low_res_channels": (ours["low_res_channels"], (0,)),
        "resample": (ours["resample"], tuple(_RESAMPLE.values())),
        "multipliers[0]": (ours["multipliers"][0], (1,)),
        "middle_attention": (ours["middle_attention"], middles),
    }
    _foreign.refuse("diffusers", wanted)
    if isinstance(groups, list):
        raise OptionError(f"diffusers cannot hold norm_groups that differ from layer to layer, {groups}")
    if isinstance(head_dim, list):
        raise OptionError(
            f"diffusers cannot hold channels per attention head that differ from level to level, {head_dim}"
        )
    kind = {"conv": "conv", "residual": "resnet"}[ours["resample"]]
    down, up = ("DownBlock2D", "UpBlock2D") if kind == "conv" else ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    size = list(diffusion.event_shape[1:])
    config = {
        "sample_size": size[0] if size[0] == size[1] else size,
        "in_channels": ours["channels"],
        "out_channels": ours["out_channels"] or ours["channels"],
        "freq_shift": ours["index_shift"],
        "down_block_types": ["AttnDownBlock2D" if level in ours["attention"] else down for level in levels],
        "up_block_types": ["AttnUpBlock2D" if level in ours["attention"] else up for level in reversed(levels)],
        "block_out_channels": widths,
        "layers_per_block": ours["blocks"],
        "downsample_padding": 1 if ours["downsample_padding"] == "both" else 0,
        "downsample_type": kind,
        "upsample_type": kind,
        "dropout": ours["dropout"],
        "attention_head_dim": head_dim,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if ours["middle_attention"] == "normalised" else None,
        "norm_eps": ours["norm_eps"],
        "resnet_time_scale_shift": shift,
        "add_attention": ours["middle_attention"] != "none",
        "num_class_embeds": None if net.embedding.label is None else net.embedding.label.num_embeddings,
    }
    return {"_class_name": "UNet2DModel", **_UNET, **config}


# ---------------------------------------------------------------------- weights


def _name(key: str, levels: int) -> str:
    """Where UNet2DModel keeps a parameter of ours; of queries, keys and values, the queries."""
    stem, _, kind = key.rpartition(".")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{kind}"
    if match := re.fullmatch(r"middle\.([01])\.(residual|attention)\.(\w+)", stem):
        part = "attentions.0" if match[2] == "attention" else f"resnets.{match[1]}"
        return f"mid_block.{part}.{_LAYERS[match[3]]}.{kind}"
    match = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(?:blocks\.(\d+)\.(residual|attention)|resample)\.(\w+)", stem)
    if match is None:
        raise OptionError(f"diffusers' UNet2DModel has no place for {key!r}")
    down, level = match[1] == "encoder", int(match[2])
    block = f"down_blocks.{level}" if down else f"up_blocks.{levels - 1 - level}"
    if match[3] is None:
        part = "downsamplers.0" if down else "upsamplers.0"
    else:
        part = f"{'resnets' if match[4] == 'residual' else 'attentions'}.{match[3]}"
    return f"{block}.{part}.{_LAYERS[match[5]]}.{kind}"


def _theirs(net: UNet) -> dict[str, Tensor]:
    """The network's state dict as UNet2DModel lays it out."""
    levels, found = len(net.config["multipliers"]), {}
    for key, value in net.state_dict().items():
        name = _name(key, levels)
        if ".attention.qkv." not in key:
            found[name] = value
            continue
        if net.config["attention_order"] == "heads_first":
            attention: Any = net.get_submodule(key.rpartition(".qkv.")[0])
            value = value.unflatten(0, (attention.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        for part, rows in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True):
            found[name.replace(".to_q.", f".{part}.")] = rows
    return found


def _ours(net: UNet, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_theirs`, for a network with queries, keys and values in that order; empties ``theirs``."""
    levels, found = len(net.config["multipliers"]), {}
    for key in net.state_dict():
        name = _name(key, levels)
        parts = ("to_q", "to_k", "to_v") if ".attention.qkv." in key else ("to_q",)
        found[key] = torch.cat([theirs.pop(name.replace(".to_q.", f".{part}.")) for part in parts])
    return found


def _modern(key: str) -> str:
    """The name that a key of an older release has today."""
    match = re.fullmatch(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(\w+)", key)
    return f"{match[1]}.{_OLD_NAMES[match[2]]}.{match[3]}" if match else key
