"""The flags of openai/guided-diffusion's and openai/improved-diffusion's scripts, and those of the published checkpoints."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pyrodiff.errors import OptionError, check_option
from pyrodiff.interop import _foreign
from pyrodiff.schedules import CosineSchedule, LinearSchedule, Schedule

__all__ = ["CARDS", "CLASSIFIERS", "Card", "ClassifierCard", "as_card", "as_classifier_card"]

# Of the scripts, by size of the image; upsamplers have those of 256 pixels at 512, too.
_MULTIPLIERS: dict[int, tuple[float, ...]] = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
# Flags that say how a network was trained or is run, not what it is.
_OTHER_FLAGS = frozenset("timestep_respacing use_kl rescale_learned_sigmas use_checkpoint use_fp16".split())
_LIMITS = {
    "diffusion_steps": 100_000,
    "num_res_blocks": 100,
    "num_channels": 100_000,
    "num_heads": 100_000,
    "num_classes": 10_000_000,
    "classifier_depth": 100,
    "classifier_width": 100_000,
    "image_size": 100_000,
    "in_channels": 100_000,
}


@dataclass(frozen=True, kw_only=True)
class _Flags:
    """The flags that a diffusion model's card and a classifier's share."""

    _passed_over: ClassVar[frozenset[str]]

    image_size: int = 64
    channel_mult: tuple[float, ...] | None = None
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    rescale_timesteps: bool = False
    in_channels: int = 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        """Check what a file or a command line may have got wrong."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if not _fits(value, str(field.type)):
                raise OptionError(f"card: {field.name}={value!r} is not of type {field.type}")
        check_option("card: noise_schedule", self.noise_schedule, ("linear", "cosine"))
        if self.channel_mult is None and self.image_size not in _MULTIPLIERS:
            sizes = ", ".join(map(str, _MULTIPLIERS))
            raise OptionError(f"card: image_size={self.image_size} is not one of {sizes}: give channel_mult")
        for name in [field.name for field in fields(self)]:
            value = getattr(self, name)
            if name in _LIMITS and not 1 <= value <= _LIMITS[name]:
                raise OptionError(f"card: {name}={value} is not in 1..{_LIMITS[name]}")
            if name.endswith("attention_resolutions") and not all(1 <= size <= self.image_size for size in value):
                raise OptionError(f"card: {name}={value} are not in 1..{self.image_size}")

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return {"linear": LinearSchedule, "cosine": CosineSchedule}[self.noise_schedule](self.diffusion_steps)

    @property
    def index_step(self) -> float:
        """The distance between the indices of neighbouring steps."""
        return 1000 / self.diffusion_steps if self.rescale_timesteps else 1.0

    @classmethod
    def _read(cls, flags: str) -> dict[str, Any]:
        words = flags.split()
        if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
            raise OptionError(f"flags {flags!r} are not '--name value --name value ...'")
        types = {field.name: str(field.type) for field in fields(cls) if field.name not in cls._passed_over}
        values: dict[str, Any] = {}
        for word, text in zip(words[::2], words[1::2], strict=True):
            name = {"large_size": "image_size"}.get(word[2:], word[2:])
            if name not in cls._passed_over:
                check_option("flag", name, types)
                values[name] = _parsed(name, text, types[name])
        return values


@dataclass(frozen=True, kw_only=True)
class Card(_Flags):
    """What the file of a checkpoint does not tell: the flags of the scripts, by their names.

    The defaults are guided-diffusion's; improved-diffusion has ``rescale_timesteps=True``.

    Attributes:
        image_size: pixels on a side (of the result, for an upsampler: its flag is ``large_size``).
        num_channels: channels at multiplier 1.
        num_res_blocks: residual blocks per resolution.
        num_heads: heads of every attention layer.
        num_heads_upsample: heads in the decoder, if different; -1: the same.
        num_head_channels: channels per head; replaces both of the above unless it is -1.
        attention_resolutions: sizes in pixels at which there is attention.
        channel_mult: channels of each resolution, as multiples; None: what the scripts take for ``image_size``.
        dropout: dropout probability.
        class_cond: whether the network sees class labels.
        use_scale_shift_norm: whether the embedding scales and shifts the normalised activations.
        resblock_updown: whether the resolution changes inside residual blocks.
        use_new_attention_order: how the channels of queries, keys and values are laid out.
        learn_sigma: whether the network outputs variances.
        sigma_small: without ``learn_sigma``: the smaller of the fixed variances.
        diffusion_steps: number of steps T.
        noise_schedule: ``"linear"`` or ``"cosine"``.
        predict_xstart: whether the output is x_0 and not the noise.
        rescale_timesteps: whether the network sees the index times 1000 / T.
        small_size: for an upsampler: pixels on a side of what it is given as ``low_res=``; else None.
        in_channels: channels of the image; no flag, the scripts have 3.
        num_classes: number of class labels; no flag, the scripts have 1000.

    Raises:
        OptionError: a value of the wrong type or outside its range.
    """

    _passed_over: ClassVar[frozenset[str]] = _OTHER_FLAGS

    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: tuple[int, ...] = (16, 8)
    dropout: float = 0.0
    class_cond: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    sigma_small: bool = False
    predict_xstart: bool = False
    small_size: int | None = None

    @classmethod
    def from_flags(cls, flags: str, *, improved: bool = False) -> Card:
        """Read the flags of a script, such as ``"--image_size 64 --learn_sigma True"``.

        Args:
            flags: as on the command line; flags that say how to train or to sample are passed over.
            improved: whether flags left out have improved-diffusion's defaults.

        Raises:
            OptionError: a flag is unknown, or its value not what it should be.
        """
        return cls(**{"rescale_timesteps": improved, **cls._read(flags)})

    @property
    def unet(self) -> dict[str, Any]:
        """The arguments of their ``UNetModel`` (``SuperResModel``, for an upsampler)."""
        multipliers = self.channel_mult
        if multipliers is None:
            multipliers = _MULTIPLIERS[256 if self.small_size and self.image_size == 512 else self.image_size]
        return {
            "image_size": self.image_size,
            "in_channels": self.in_channels,
            "model_channels": self.num_channels,
            "out_channels": self.in_channels * (2 if self.learn_sigma else 1),
            "num_res_blocks": self.num_res_blocks,
            "attention_resolutions": [self.image_size // size for size in self.attention_resolutions],
            "dropout": self.dropout,
            "channel_mult": multipliers,
            "num_classes": self.num_classes if self.class_cond else None,
            "num_heads": self.num_heads,
            "num_head_channels": self.num_head_channels,
            "num_heads_upsample": self.num_heads_upsample,
            "use_scale_shift_norm": self.use_scale_shift_norm,
            "resblock_updown": self.resblock_updown,
            "use_new_attention_order": self.use_new_attention_order,
        }


@dataclass(frozen=True, kw_only=True)
class ClassifierCard(_Flags):
    """What the file of a classifier does not tell: the flags of guided-diffusion's scripts, by their names and defaults.

    Attributes:
        image_size: pixels on a side.
        classifier_width: channels at multiplier 1.
        classifier_depth: residual blocks per resolution.
        classifier_attention_resolutions: sizes in pixels at which there is attention.
        classifier_use_scale_shift_norm: whether the embedding scales and shifts the normalised activations.
        classifier_resblock_updown: whether the resolution changes inside residual blocks.
        classifier_pool: ``"attention"``, or ``"adaptive"``: the average.
        diffusion_steps: number of steps T.
        noise_schedule: ``"linear"`` or ``"cosine"``.
        rescale_timesteps: whether the network sees the index times 1000 / T.
        channel_mult: channels of each resolution, as multiples; no flag; None: what the scripts take for ``image_size``.
        num_head_channels: channels per attention head; no flag, the scripts have 64.
        in_channels: channels of the image; no flag, the scripts have 3.
        num_classes: number of classes; no flag, the scripts have 1000.

    Raises:
        OptionError: a value of the wrong type or outside its range.
    """

    # classifier_sample.py takes the flags of the diffusion model that is guided, too.
    _passed_over: ClassVar[frozenset[str]] = (
        _OTHER_FLAGS
        | {field.name for field in fields(Card)}
        | {"classifier_path", "classifier_scale", "classifier_use_fp16", "model_path"}
    ) - {"image_size", "diffusion_steps", "noise_schedule", "rescale_timesteps"}

    classifier_width: int = 128
    classifier_depth: int = 2
    classifier_attention_resolutions: tuple[int, ...] = (32, 16, 8)
    classifier_use_scale_shift_norm: bool = True
    classifier_resblock_updown: bool = True
    classifier_pool: str = "attention"
    num_head_channels: int = 64

    def __post_init__(self) -> None:
        """Check what a file or a command line may have got wrong."""
        super().__post_init__()
        check_option("card: classifier_pool", self.classifier_pool, ("attention", "adaptive"))

    @classmethod
    def from_flags(cls, flags: str) -> ClassifierCard:
        """Read the flags of a script, such as ``"--image_size 64 --classifier_depth 4"``.

        Args:
            flags: as on the command line; those of the diffusion model beside it, and those that say how to train or to
                sample, are passed over.

        Raises:
            OptionError: a flag is unknown, or its value not what it should be.
        """
        return cls(**cls._read(flags))

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Channels of each resolution, as multiples."""
        return _MULTIPLIERS[self.image_size] if self.channel_mult is None else self.channel_mult


def _cards() -> dict[str, Card]:
    """The flags of both READMEs."""
    adm: dict[str, Any] = {
        "attention_resolutions": (32, 16, 8),
        "learn_sigma": True,
        "num_channels": 256,
        "num_head_channels": 64,
        "resblock_updown": True,
    }
    lsun = {**adm, "image_size": 256, "dropout": 0.1}
    four_heads = {"num_heads": 4, "num_head_channels": -1}
    upsampler = {**adm, "class_cond": True, "num_channels": 192}
    iddpm: dict[str, Any] = {
        "num_res_blocks": 3,
        "learn_sigma": True,
        "diffusion_steps": 4000,
        "noise_schedule": "cosine",
        "rescale_timesteps": True,
    }
    cifar = {**iddpm, "image_size": 32, "dropout": 0.3}
    old_lsun: dict[str, Any] = {
        "image_size": 256,
        "num_heads": 1,
        "learn_sigma": True,
        "use_scale_shift_norm": False,
        "attention_resolutions": (16,),
    }
    flags: dict[str, dict[str, Any]] = {
        "64x64_diffusion": {
            **adm,
            "class_cond": True,
            "num_channels": 192,
            "num_res_blocks": 3,
            "dropout": 0.1,
            "noise_schedule": "cosine",
            "use_new_attention_order": True,
        },
        "128x128_diffusion": {**adm, **four_heads, "image_size": 128, "class_cond": True},
        "256x256_diffusion": {**adm, "image_size": 256, "class_cond": True},
        "256x256_diffusion_uncond": {**adm, "image_size": 256},
        "512x512_diffusion": {**adm, "image_size": 512, "class_cond": True},
        "64_256_upsampler": {**upsampler, **four_heads, "image_size": 256, "small_size": 64},
        "128_512_upsampler": {
            **upsampler,
            "image_size": 512,
            "small_size": 128,
            "attention_resolutions": (32, 16),
        },
        "lsun_bedroom": lsun,
        "lsun_cat": lsun,
        "lsun_horse": lsun,
        "lsun_horse_nodropout": {**lsun, "dropout": 0.0},
        "imagenet64_uncond_100M_1500K": iddpm,
        "imagenet64_uncond_vlb_100M_1500K": iddpm,
        "imagenet64_cond_270M_250K": {**iddpm, "num_channels": 192, "class_cond": True, "rescale_timesteps": False},
        "cifar10_uncond_50M_500K": cifar,
        "cifar10_uncond_vlb_50M_500K": cifar,
        "upsample_cond_500K": {
            "image_size": 256,
            "small_size": 64,
            "num_channels": 192,
            "learn_sigma": True,
            "class_cond": True,
            "diffusion_steps": 4000,
        },
        "lsun_uncond_100M_1200K_bs128": old_lsun,
        "lsun_uncond_100M_2400K_bs64": old_lsun,
    }
    return {name: Card(**values) for name, values in flags.items()}


_AnyCard = TypeVar("_AnyCard", Card, ClassifierCard)


def as_card(card: str | os.PathLike[str] | Card | None, path: str | os.PathLike[str] = "") -> Card:
    """The card of a diffusion model that is meant.

    Args:
        card: a card; a name in :data:`CARDS`; a JSON file with fields of :class:`Card`; or None.
        path: the checkpoint; None means the card of its file's name, or else the JSON file beside it.

    Raises:
        OptionError: there is no such card, it is a classifier's, or a field is unknown or has a bad value.
        CheckpointError: the file cannot be read.
    """
    return _as(Card, CARDS, card, path)


def as_classifier_card(
    card: str | os.PathLike[str] | ClassifierCard | None, path: str | os.PathLike[str] = ""
) -> ClassifierCard:
    """The card of a classifier that is meant: as :func:`as_card`, with :data:`CLASSIFIERS` and :class:`ClassifierCard`."""
    return _as(ClassifierCard, CLASSIFIERS, card, path)


def _as(kind: type[_AnyCard], known: dict[str, _AnyCard], card: object, path: str | os.PathLike[str]) -> _AnyCard:
    if isinstance(card, kind):
        return card
    path = Path(path)
    name = str(path.stem if card is None else card)
    if name in known:
        return known[name]
    if isinstance(card, _Flags) or name in CARDS or name in CLASSIFIERS:
        shown = type(card).__name__ if isinstance(card, _Flags) else repr(name)
        other = "a classifier's: load_classifier takes it" if kind is Card else "a diffusion model's: load takes it"
        raise OptionError(f"card={shown} is {other}")
    file = path.with_suffix(".json") if card is None else Path(name)
    if card is None and not file.is_file():
        raise OptionError(
            f"the flags of {str(path)!r} are unknown: name a card ({', '.join(known)}) or a JSON file of flags"
        )
    if file.suffix != ".json":
        raise OptionError(f"card={name!r} is not one of {', '.join(known)}, nor a .json file of flags")
    values = _foreign.read_json(file)
    for flag in values:
        check_option(f"{str(file)!r}: flag", flag, [field.name for field in fields(kind)])
    return kind(**values)


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _fits(value: object, kind: str) -> bool:
    """Whether a value is of the type that an annotation of :class:`Card` names."""
    kind, _, optional = kind.partition(" | ")
    if optional and value is None:
        return True
    if kind.startswith("tuple"):
        return isinstance(value, tuple) and all(_fits(part, kind[6:].split(",")[0]) for part in value)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


def _parsed(name: str, text: str, kind: str) -> Any:
    """The value of a flag."""
    try:
        if kind.startswith("tuple"):
            number = int if kind.startswith("tuple[int") else float
            return tuple(number(part) for part in text.split(","))
        if kind == "bool":
            check_option(name, text.lower(), ("true", "false"))
            return text.lower() == "true"
        return {"int": int, "float": float, "str": str}[kind.partition(" ")[0]](text)
    except OptionError:
        raise
    except ValueError:
        raise OptionError(f"flag {name}={text!r} is not of type {kind}") from None


CARDS: dict[str, Card] = _cards()
"""The flags of every published checkpoint of a diffusion model, by the name of its file without ``.pt``."""

CLASSIFIERS: dict[str, ClassifierCard] = {
    "64x64_classifier": ClassifierCard(classifier_depth=4, noise_schedule="cosine"),
    "128x128_classifier": ClassifierCard(image_size=128),
    "256x256_classifier": ClassifierCard(image_size=256),
    "512x512_classifier": ClassifierCard(image_size=512),
}
"""The flags of every published classifier, likewise; each sees the noise of the diffusion model that it guides."""
