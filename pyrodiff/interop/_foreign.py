"""Foreign files: read without running anything in them, compared with what a network expects, written whole."""

from __future__ import annotations

import json
import os
import stat
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrodiff.errors import CheckpointError, OptionError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_JSON = 10_000_000  # bytes


def read_torch(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict that ``torch.save`` wrote; of its pickle only tensors and plain containers are made.

    Raises:
        CheckpointError: the file is missing, is none, or holds something else.
    """
    name = _regular(path)
    try:
        _check_archive(path, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # besides its own, torch lets through those of zipfile and of unpickling
        raise CheckpointError(f"{name} cannot be read as weights: {line(error)}") from None
    if isinstance(content, Mapping) and "param_groups" in content:
        raise CheckpointError(f"{name} holds an optimiser's state: take the file of the weights (model... or ema_...)")
    return _checked(content, name)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing, or is none.
    """
    from safetensors import safe_open

    name = _regular(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Copies: the file's own memory would change with the file.
            content = {key: file.get_tensor(key).clone() for key in file.keys()}
    except Exception as error:  # the format's own errors are a class of each release
        raise CheckpointError(f"{name} cannot be read as safetensors: {line(error)}") from None
    return _checked(content, name)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        CheckpointError: the file is missing, or holds something else.
    """
    name = _regular(path)
    try:
        if os.path.getsize(path) > _MAX_JSON:
            raise CheckpointError(f"{name} is above {_MAX_JSON} bytes, which no configuration is")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{name} is no JSON: {line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not a mapping")
    return content


def difference(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What keeps ``state`` from being the weights ``expected`` (whose values do not matter); or ''."""
    shapes, infinite = [], []
    for key in expected.keys() & state.keys():
        if state[key].shape != expected[key].shape:
            shapes.append(f"{key} {list(state[key].shape)} for {list(expected[key].shape)}")
        elif not state[key].isfinite().all():
            infinite.append(key)
    problems = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of the wrong shape": shapes,
        "not finite": infinite,
    }
    return "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in problems.items() if keys)


def assign(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Make float32 copies of ``state``, which is emptied, the parameters of a network without memory."""
    own = {}
    for key in list(state):  # one at a time: twice the memory of a large network may not be there
        own[key] = state.pop(key).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    net.load_state_dict(own, assign=True)


def refuse(where: str, wanted: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Raise :class:`~pyrodiff.errors.OptionError` naming every option whose value is not one of its allowed ones."""
    found = [
        f"{name}={_shown(value)} (only {', '.join(map(_shown, allowed))})"
        for name, (value, allowed) in wanted.items()
        if value not in allowed
    ]
    if found:
        raise OptionError(f"{where} cannot hold {'; '.join(found)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def only(values: set[Any]) -> Any:
    """The one element of a set; if there are several, all of them."""
    return next(iter(values)) if len(values) == 1 else sorted(values, key=str)


def _check_archive(path: str | os.PathLike[str], name: str) -> None:
    """Refuse an archive that would unfold to more than its own size; torch.save writes none."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":  # an older format, not compressed
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{name} has compressed entries, which torch.save does not write")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise CheckpointError(f"{name} has entries that overlap, which torch.save does not write")


def _regular(path: str | os.PathLike[str]) -> str:
    """The path, to be shown; refused unless it is a file: a pipe could wait for ever, a device never end."""
    name = repr(os.fspath(path))
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"{name} cannot be read: {error}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{name} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
    return name


def _checked(content: object, name: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise CheckpointError(f"{name} holds no state dict of names and tensors")
    odd = [
        key
        for key, value in content.items()
        if value.dtype not in _FLOATS or value.layout != torch.strided or value.device.type != "cpu"
    ]
    if odd:
        raise CheckpointError(f"{name} holds tensors that are no weights ({_some(odd)})")
    return {key: value.detach() for key, value in content.items()}


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    shown = (key if len(key) < 200 else f"{key[:200]}..." for key in keys[:3])
    return ", ".join(repr(key)[1:-1] for key in shown) + (", ..." if len(keys) > 3 else "")


def line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[0].split())[:500] if lines else type(error).__name__
