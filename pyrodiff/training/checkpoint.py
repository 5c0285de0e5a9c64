"""Checkpoints: one file, written whole or not at all, verified before anything in it is used.

A file holds a tree: dicts and lists of tensors and JSON values. It is a safetensors file, which any
program that knows the format can open: a tensor is an entry named by its path in the tree
(``state/reverse_kernel.net.input.weight``), everything else is JSON in the header, and so is a
SHA-256 of all the rest. Reading executes nothing, imports nothing that the file names, and
allocates the size of the file and at most 256 MB more.

A file that is replaced stays beside the new one, as ``model.previous.safetensors``, where the file
system has hard links. It is never read instead: the error that refuses the newer one names it, if
it is sound, and going back to it is renaming it.

The format is laid out here, not by the ``safetensors`` package, whose ``save_file`` has a temporary
file of its own that a killed process leaves behind, and whose ``save`` and ``load`` hold every
tensor two or three times.

References:
    https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn

from pyrodiff import _files, nets, schedules
from pyrodiff._files import lock
from pyrodiff._version import __version__
from pyrodiff.classifier import NoisyClassifier
from pyrodiff.diffusion import GaussianDiffusion
from pyrodiff.errors import CheckpointError, OptionError

__all__ = ["load", "load_classifier", "lock", "read", "save", "write"]

FORMAT = 1
MODEL = "model.safetensors"
# What parsing may take: 20 MB of text have a few copies, and a value in Python has at most 200 bytes.
_MAX_HEADER, _MAX_VALUES = 20_000_000, 1_000_000
_MAX_STEPS = 1_000_000  # of a schedule that a file may ask for: its tables are in memory
_NO_DIGEST = "0" * 64  # what stands in the digest's place while the digest is computed
_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8},
    **{"I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64},
}
# What a malformed header, tree or config makes the standard library and torch raise.
MALFORMED = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, TypeError, ValueError),
)
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_KINDS = {GaussianDiffusion: "model", NoisyClassifier: "classifier"}


def write(path: str | os.PathLike[str], tree: dict[str, Any], *, kind: str) -> None:
    """Write a tree to a file: all of it, or the file that was there before stays as it is.

    On success that file stays too, as ``NAME.previous.SUFFIX``.

    Args:
        path: the file; its folder must exist.
        tree: dicts (with string keys), lists and tuples (which become lists) of tensors, None,
            bool, int, float and str. Tensors may be on any device, shared or views.
        kind: what the tree is; :func:`read` must ask for the same.

    Raises:
        OptionError: the tree holds something else, or more than tensors should hold.
        SaveError: the file cannot be written (disk full, folder read-only, ...).
    """
    tensors: dict[str, Tensor] = {}
    try:
        text = json.dumps(_without_tensors(tree, (), tensors))
    except OptionError:
        raise
    except (RecursionError, ValueError) as error:  # a circle, or an integer of thousands of digits
        raise OptionError(f"the tree cannot be written as JSON: {_files.one_line(error)}") from None
    metadata = {"pyrodiff_format": str(FORMAT), "kind": kind, "sha256": _NO_DIGEST, "tree": text}
    # Wide types first, so that every entry is aligned, as the format asks.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    entries, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.dtype.itemsize
        entries[name] = _entry(_DTYPE_NAMES[tensor.dtype], list(tensor.shape), start, stop)
        start = stop
    if _too_much(_header(metadata, entries)):
        raise OptionError(
            f"the tree's JSON is above {_MAX_HEADER} bytes or {_MAX_VALUES} values; use tensors for numbers"
        )

    def fill(file: IO[bytes]) -> None:
        header = _header(metadata, entries)
        digest = hashlib.sha256(header)
        file.write(header)
        for tensor in tensors.values():
            # Hashed and written from one copy: the tensor itself may be on another device, strided,
            # or moved on by another thread.
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
            data = _bytes(flat.copy_(tensor.detach().reshape(-1)))
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(_header(metadata | {"sha256": digest.hexdigest()}, entries))

    _files.replace(Path(path), fill, previous=_previous(path))


def read(path: str | os.PathLike[str], *, kind: str) -> dict[str, Any]:
    """Read a tree that :func:`write` wrote; its tensors are on the CPU.

    Args:
        path: the file.
        kind: what was given to :func:`write`.

    Raises:
        CheckpointError: the file is missing, not a checkpoint, of another kind or a newer format,
            truncated or damaged. The message names the file that it replaced, if that is sound.
    """
    try:
        return _read(path, kind)
    except CheckpointError as error:
        problem = str(error)
    # Out of the handler, whose traceback holds what was read of the first file.
    before = _previous(path)
    with contextlib.suppress(CheckpointError):
        _read(before, kind)
        name = os.path.basename(path)
        problem += f"; {before!r}, which it replaced, is sound: to go back to that, rename it to {name!r}"
    raise CheckpointError(problem)


def _previous(path: str | os.PathLike[str]) -> str:
    """Where the file that a newer one replaced is kept."""
    root, suffix = os.path.splitext(os.fspath(path))
    return f"{root}.previous{suffix}"


def _read(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    name = repr(str(path))
    try:
        # Opened without waiting for the writer of a pipe, and looked at before the first byte: a device may never end.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
                raise CheckpointError(f"{name} is {what}, not a checkpoint file")
            with open(descriptor, "rb", closefd=False) as file:
                return _parsed(file, name, kind)
        finally:
            os.close(descriptor)
    except CheckpointError:
        raise
    except MALFORMED as error:
        raise CheckpointError(f"{name} is damaged: {_files.one_line(error)}") from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {_files.reason(error)}") from None


def _parsed(file: IO[bytes], name: str, kind: str) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(512)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length > _MAX_HEADER:
        raise CheckpointError(f"{name} is not a pyrodiff checkpoint: it {_looks_like(start)}")
    if 8 + length > size:
        raise CheckpointError(f"{name} is truncated: {size} bytes, inside its header")
    file.seek(0)
    header = file.read(8 + length)
    if _too_much(header):
        raise CheckpointError(
            f"{name} is damaged, or not a checkpoint: its header is no ASCII, or above {_MAX_VALUES} values"
        )
    try:
        entries = json.loads(header[8:])
        metadata = entries.pop("__metadata__", {})
        version = metadata.get("pyrodiff_format")
    except (AttributeError, RecursionError, ValueError):
        raise CheckpointError(f"{name} is damaged, or not a checkpoint: its header is no JSON") from None
    if version is None:
        raise CheckpointError(f"{name} is a safetensors file of another program, not a pyrodiff checkpoint")
    damaged = CheckpointError(f"{name} is damaged (digest mismatch)")
    if not isinstance(version, str) or not version.isdecimal():
        raise damaged
    if int(version) != FORMAT:
        age = "a newer" if int(version) > FORMAT else "an older"
        raise CheckpointError(
            f"{name}: format {int(version)} was written by {age} pyrodiff; "
            f"this one ({__version__}) reads format {FORMAT}"
        )
    # One spelling only: no duplicated or unknown keys, no slack that the digest would not see.
    if sorted(metadata) != ["kind", "pyrodiff_format", "sha256", "tree"]:
        raise damaged
    if _header(metadata, entries) != header:
        raise damaged

    offset = 0
    for entry in entries.values():
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if not all(type(n) is int and n >= 0 for n in shape):
            raise damaged
        stop = offset + math.prod(shape) * dtype.itemsize
        if entry != _entry(entry["dtype"], shape, offset, stop):
            raise damaged
        offset = stop
    if size != 8 + length + offset:
        what = "truncated" if size < 8 + length + offset else "damaged"
        raise CheckpointError(f"{name} is {what}: {size} bytes instead of {8 + length + offset}")

    digest = hashlib.sha256(_header(metadata | {"sha256": _NO_DIGEST}, entries))
    tensors = {}
    for key, entry in entries.items():
        tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="cpu")
        data = _bytes(tensor)
        file.readinto(data)  # type: ignore[attr-defined]
        digest.update(data)
        tensors[key] = tensor
    if digest.hexdigest() != metadata["sha256"]:
        raise damaged
    if metadata["kind"] != kind:
        raise CheckpointError(f"{name} is a checkpoint of kind {metadata['kind']!r}, not {kind!r}")
    tree = json.loads(metadata["tree"])
    if not isinstance(tree, dict):
        raise damaged
    for key, tensor in tensors.items():
        *parents, last = (unquote(part, errors="surrogatepass") for part in key.split("/"))
        node = tree
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        place = int(last) if isinstance(node, list) else last
        if node[place] is not None:
            raise damaged
        node[place] = tensor
    return tree


def save(path: str | os.PathLike[str], diffusion: nn.Module, **extra: Any) -> None:
    """Save a diffusion, or a classifier: its options, its network's and its weights.

    Args:
        path: a folder, created if need be. It gets ``model.safetensors``, which is all that
            :func:`load` reads, and ``config.json``, a copy of the options for people to read.
        diffusion: the :class:`~pyrodiff.GaussianDiffusion` or :class:`~pyrodiff.NoisyClassifier`; it or parts of it may be
            compiled.
        extra: anything else to keep (see :func:`write`);
            ``read(folder / "model.safetensors", kind="model")["extra"]`` has it.

    Raises:
        OptionError: neither of the two, or ``extra`` holds what cannot be written.
        SaveError: a file cannot be written.
    """
    diffusion = _unwrapped(diffusion)
    if not isinstance(diffusion, GaussianDiffusion | NoisyClassifier):
        raise OptionError(f"diffusion is a {type(diffusion).__name__}, not a GaussianDiffusion or NoisyClassifier")
    net = _unwrapped(diffusion.net)
    names = [name for name, network in nets.REGISTRY.items() if network is type(net)]
    network = {"name": names[0], "arguments": net.config} if names else None
    options = {**diffusion.config, "schedule": _schedule_config(diffusion.schedule)}
    config = {**options, "network": network, "pyrodiff": __version__}
    state = {_name(key): value for key, value in diffusion.state_dict().items()}
    kind = next(kind for cls, kind in _KINDS.items() if isinstance(diffusion, cls))
    folder = Path(path)
    _files.make_folder(folder)
    write(folder / MODEL, {"config": config, "state": state, "extra": extra}, kind=kind)
    _files.write_json(folder / "config.json", config)


def load(
    path: str | os.PathLike[str],
    net: nn.Module | None = None,
    *,
    schedule: schedules.Schedule | None = None,
    device: torch.device | str | None = None,
) -> GaussianDiffusion:
    """Load a diffusion that :func:`save` saved, in the precision it was saved in.

    Args:
        path: the folder, or its ``model.safetensors``; ``config.json`` is a copy, and never read.
        net: the network, which gets the saved weights (in its own precision); needed when it is not
            one of :data:`pyrodiff.nets.REGISTRY`, which the file then knows nothing about.
        schedule: the schedule; likewise.
        device: where to put the diffusion (default: the CPU, or where ``net`` is).

    Raises:
        CheckpointError: the file is not sound (see :func:`read`), or its weights are not finite or
            not those of the network; ``net`` is then as it was.
        OptionError: ``net`` or ``schedule`` is needed.
    """
    return _load(GaussianDiffusion, path, net, schedule, device)


def load_classifier(
    path: str | os.PathLike[str],
    net: nn.Module | None = None,
    *,
    schedule: schedules.Schedule | None = None,
    device: torch.device | str | None = None,
) -> NoisyClassifier:
    """Load a classifier that :func:`save` saved; see :func:`load`."""
    return _load(NoisyClassifier, path, net, schedule, device)


_Saved = TypeVar("_Saved", GaussianDiffusion, NoisyClassifier)


def _load(
    cls: type[_Saved],
    path: str | os.PathLike[str],
    net: nn.Module | None,
    schedule: schedules.Schedule | None,
    device: torch.device | str | None,
) -> _Saved:
    path = Path(path)
    if path.is_dir():
        path = path / MODEL
    tree, name = read(path, kind=_KINDS[cls]), repr(str(path))
    config, state = tree.get("config"), tree.get("state")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{name} holds no config and state of a model")
    options, network = config.pop("schedule", None), config.pop("network", None)
    config.pop("pyrodiff", None)
    for key, given, saved in (("net", net, network), ("schedule", schedule, options)):
        if given is None and saved is None:
            raise OptionError(f"{name} has a {key} that is not one of pyrodiff's: give load {key}=")
    try:
        if net is None:
            # Without memory or random numbers: what the config asks for is first compared with what
            # the file holds, and the file's tensors then become the weights.
            with torch.device("meta"), _at_most(2 * len(state) + 100):
                net = nets.build(network["name"], network["arguments"])
        diffusion = cls(net, schedule or _schedule(options), **config)
    except MALFORMED as error:
        raise CheckpointError(f"{name} has a config that does not work: {_files.one_line(error)}") from None
    own = diffusion.state_dict()
    keys = {_name(key): key for key in own}
    check_state(name, state, {key: own[keys[key]] for key in keys})
    # In place for a network of the user's, whose parameters may be tied or known to an optimizer.
    assign = any(value.is_meta for value in own.values())
    diffusion.load_state_dict({keys[key]: state[key] for key in keys}, assign=assign)
    return diffusion if device is None else diffusion.to(device)


def _without_tensors(node: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """A copy of the tree with None in the place of each tensor; those go to ``tensors`` by name."""
    if isinstance(node, dict) and all(isinstance(key, str) for key in node):
        return {k: _without_tensors(v, (*path, k), tensors) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [_without_tensors(v, (*path, str(i)), tensors) for i, v in enumerate(node)]
    if isinstance(node, Tensor) and node.layout == torch.strided and not node.is_meta:
        if node.dtype in _DTYPE_NAMES:
            # Quoted, so that no key can look like a path, and no name is the format's own.
            name = "/".join(quote(key, safe="", errors="surrogatepass") for key in path)
            if name not in ("", "__metadata__"):
                tensors[name] = node
                return None
    elif node is None or isinstance(node, (bool, int, float, str)):
        return node
    what = type(node).__name__
    if isinstance(node, Tensor):
        what = f"{node.layout} {node.dtype} tensor on {node.device}"
    elif isinstance(node, dict):
        what = "dict with keys that are not strings"
    raise OptionError(f"{'/'.join(path) or 'the tree'!r} is a {what}, which a checkpoint cannot hold")


def _entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _header(metadata: dict[str, str], entries: dict[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _too_much(header: bytes) -> bool:
    """Whether parsing a header may take much more memory than its size."""
    values = sum(header.count(character) for character in (b",", b"[", b"{", b":"))
    return len(header) > _MAX_HEADER or values > _MAX_VALUES or not header[8:].isascii()


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _looks_like(start: bytes) -> str:
    if not start:
        return "is empty"
    if start.startswith(b"PK"):
        return "looks like a zip archive (torch.save writes them)"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return "looks like a pickle, which is never opened"
    if all(9 <= byte <= 13 or 32 <= byte < 127 for byte in start):
        return "looks like text"
    return "does not start with a safetensors header"


def _unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile was given."""
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    return module


def _name(key: str) -> str:
    """A state dict's key as it is without torch.compile."""
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


@contextlib.contextmanager
def _at_most(n: int) -> Iterator[None]:
    """Networks made inside have at most n parameters: a config can ask for a billion layers in a few bytes."""
    thread, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: Tensor) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > n:
            raise ValueError("it asks for many more weights than the file has")

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _schedule(config: dict[str, Any]) -> schedules.Schedule:
    """The schedule of a config."""
    base: Any = config
    while isinstance(base, dict):
        steps = base.get("steps")
        if isinstance(steps, (int, float)) and not steps <= _MAX_STEPS:
            raise ValueError(f"steps={steps!r} is above {_MAX_STEPS}")
        base = base.get("base")
    return schedules.from_config(config)


def _schedule_config(schedule: schedules.Schedule) -> dict[str, object] | None:
    """The config from which the schedule can be rebuilt; None for one of the user's own."""
    config = schedule.config
    if config is None:
        return None
    try:
        return config if type(_schedule(config)) is type(schedule) else None
    except MALFORMED:
        return None


def check_state(name: str, state: dict[str, Any], own: dict[str, Tensor]) -> None:
    """Raise :class:`CheckpointError` if what the file ``name`` holds cannot be loaded in the place of ``own``."""
    shapes, dtypes, infinite = [], [], []
    for key in own.keys() & state.keys():
        saved, value = state[key], own[key]
        if not isinstance(saved, Tensor) or saved.shape != value.shape:
            saved_shape = list(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
            shapes.append(f"{key}: {saved_shape} instead of {list(value.shape)}")
        elif saved.dtype != value.dtype and not (saved.is_floating_point() and value.is_floating_point()):
            dtypes.append(f"{key}: {saved.dtype} instead of {value.dtype}")
        elif not (saved if value.is_meta else saved.to(value.dtype)).isfinite().all():
            infinite.append(key)
    problems = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": shapes,
        "of another dtype": dtypes,
        "not finite": infinite,
    }
    said = [
        f"{len(keys)} weights {what} ({', '.join(sorted(keys)[:3])}{', ...' * (len(keys) > 3)})"
        for what, keys in problems.items()
        if keys
    ]
    if said:
        raise CheckpointError(f"{name}: {'; '.join(said)}")
