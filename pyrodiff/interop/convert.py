"""A model in any of three formats, and from each to the others.

====================  ==============================================================================
``pyrodiff``          a run's folder, or a ``model.safetensors``
``diffusers``         a folder with ``config.json`` (``UNet2DModel``), weights and scheduler, or a pipeline's
``guided-diffusion``  a state dict ``.pt`` of guided- or improved-diffusion, and a card: the flags of its scripts
====================  ==============================================================================
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pyrodiff.classifier import NoisyClassifier
from pyrodiff.diffusion import GaussianDiffusion
from pyrodiff.errors import CheckpointError, OptionError, PyrodiffError, check_option
from pyrodiff.interop import diffusers, guided_diffusion
from pyrodiff.training import checkpoint

__all__ = ["FORMATS", "convert", "describe", "format_of", "load", "load_classifier"]

FORMATS = ("pyrodiff", "diffusers", "guided-diffusion")


def format_of(source: str | os.PathLike[str]) -> str:
    """The format of a model, by what lies there; files of no format count as pyrodiff's, whose reader says what they are.

    Raises:
        CheckpointError: a folder without a model, or nothing at all.
    """
    path = Path(source)
    try:
        if path.is_dir():
            if (path / checkpoint.MODEL).is_file():
                return "pyrodiff"
            if diffusers.find(path) is not None:
                return "diffusers"
            raise CheckpointError(
                f"{str(path)!r} holds no model: neither {checkpoint.MODEL} nor a config.json of diffusers"
            )
        if not path.is_file():  # a pipe would wait for its writer
            return "pyrodiff"
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    return "guided-diffusion" if start == b"PK" or start[:1] == b"\x80" else "pyrodiff"


def load(source: str | os.PathLike[str], card: str | os.PathLike[str] | None = None) -> GaussianDiffusion:
    """Load a model of any format, on the CPU.

    Args:
        source: see the module.
        card: the flags of a guided-diffusion source: the name of a published checkpoint, or a ``.json`` file; None: by the
            file's name, or the ``.json`` file beside it.

    Raises:
        CheckpointError: the files are unsound, or do not fit their configuration.
        OptionError: an option that this library has no counterpart of, no such card, or a card for another format.
    """
    kind = format_of(source)
    if kind == "guided-diffusion":
        return guided_diffusion.load(source, card)
    if card is not None:
        raise OptionError(f"card={os.fspath(card)!r} is for guided-diffusion, and {os.fspath(source)!r} is {kind}'s")
    return diffusers.load(source) if kind == "diffusers" else checkpoint.load(source)


def load_classifier(source: str | os.PathLike[str]) -> NoisyClassifier:
    """Load a classifier of noisy images, on the CPU: what ``pyrodiff.save`` wrote, or a file of guided-diffusion.

    Raises:
        CheckpointError: the files are unsound, or hold no classifier.
        OptionError: a guided-diffusion file of an unknown name, without a ``.json`` file beside it.
    """
    if format_of(source) == "guided-diffusion":
        return guided_diffusion.load_classifier(source)
    return checkpoint.load_classifier(source)


def describe(source: str | os.PathLike[str], card: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """What a model of any format is, to be shown: its format, network, size and options; long lists are cut short.

    Args:
        source, card: see :func:`load`.

    Raises:
        CheckpointError, OptionError: see :func:`load`.
    """
    diffusion: GaussianDiffusion | NoisyClassifier
    try:
        diffusion = load(source, card)
    except CheckpointError:
        if card is not None:
            raise
        try:
            diffusion = load_classifier(source)
        except PyrodiffError:
            diffusion = load(source, card)  # says what is wrong with it
    return {
        "format": format_of(source),
        "network": {type(diffusion.net).__name__: _short(getattr(diffusion.net, "config", None))},
        "parameters": sum(parameter.numel() for parameter in diffusion.parameters()),
        **_short(diffusion.config),
    }


def _short(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _short(value) for key, value in node.items()}
    if isinstance(node, list) and len(node) > 16:
        return f"{len(node)} numbers, {node[0]:.6g} ... {node[-1]:.6g}"
    return node


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    card: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Convert a model from one format to another.

    Only pyrodiff's format has a place for the decoder and for the bins of the data; a model that comes from another format
    gets guided-diffusion's, images of 256 levels in [-1, 1].

    Args:
        source: a run's folder or its model.safetensors, a folder of diffusers, or a .pt file of guided-diffusion.
        out: what to write: a folder, or a .pt file (and a .json file of its flags beside it) for guided-diffusion.
        format: pyrodiff, diffusers or guided-diffusion.
        card: flags of a guided-diffusion source: a published checkpoint's name, or a .json file; default by its file's name.

    Returns:
        The files written.

    Raises:
        CheckpointError: see :func:`load`; or a file cannot be written.
        OptionError: an option that the format has no counterpart of, by name; or there is something at ``out`` already.
    """
    check_option("format", format, FORMATS)
    path = Path(out)
    flags = [path.with_suffix(".json")] if format == "guided-diffusion" else []
    for taken in (path, *flags):
        if taken.exists() and not (taken.is_dir() and not any(taken.iterdir())):
            raise OptionError(f"out={os.fspath(out)!r}: {str(taken)!r} exists already; name another")
    diffusion = load(source, card)
    if format == "guided-diffusion":
        guided_diffusion.save(path, diffusion)
        return [path, *flags]
    if format == "diffusers":
        diffusers.save(path, diffusion)
    else:
        checkpoint.save(path, diffusion)
    return sorted(file for file in path.iterdir() if not file.name.startswith("."))
