"""Checkpoints: round trips, crashes at every moment, damaged and hostile files."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import pyrodiff
from pyrodiff import _files
from pyrodiff.errors import CheckpointError, OptionError, SaveError
from pyrodiff.nets import MLP, UNet
from pyrodiff.training import checkpoint
from pyrodiff.training.checkpoint import load, lock, read, save, write

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
)


def raw(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def same(a: object, b: object) -> bool:
    """Equal to the bit, types and order of keys included; tuples as lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and raw(a) == raw(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


def one_line(error: BaseException, *words: str) -> bool:
    text = str(error)
    return len(text.splitlines()) == 1 and all(word in text for word in words)


def craft(
    path: Path,
    tree: object = None,
    tensors: dict[str, torch.Tensor] | None = None,
    entries: dict[str, object] | None = None,
    data: bytes | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """A file with a right digest and wrong content, as someone who knows the format would make it."""
    made, blob = {}, b""
    for name, value in (tensors or {}).items():
        stop = len(blob) + value.nbytes
        made[name] = {
            "dtype": checkpoint._DTYPE_NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(blob), stop],
        }
        blob += raw(value)
    made |= entries or {}
    blob = blob if data is None else data
    fields = {"pyrodiff_format": "1", "kind": "model", "sha256": "0" * 64, "tree": json.dumps(tree)}
    fields |= metadata or {}
    fields["sha256"] = hashlib.sha256(checkpoint._header(fields, made) + blob).hexdigest()
    path.write_bytes(checkpoint._header(fields, made) + blob)


# ---------------------------------------------------------------- trees


def test_every_dtype_and_shape(tmp_path):
    tree = {
        str(dtype): [torch.randint(0, 2, shape).to(dtype) for shape in ((), (3,), (2, 0, 3), (1, 2, 3))]
        for dtype in DTYPES
    }
    tree["odd floats"] = torch.tensor([math.nan, math.inf, -0.0, 5e-324], dtype=torch.float64)
    write(tmp_path / "a", tree, kind="test")
    assert same(tree, read(tmp_path / "a", kind="test"))


def test_views_and_shared_tensors(tmp_path):
    x = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tree = {"t": x.T, "x": x, "again": x, "row": x[1], "wide": x[:1].expand(5, 4), "one": x[:1, 2]}
    tree["parameter"] = nn.Parameter(x.detach())
    tree["stride"] = torch.empty_strided((1,), (7,)).fill_(2)
    write(tmp_path / "a", tree, kind="test")
    back = read(tmp_path / "a", kind="test")
    assert same({k: v.detach() for k, v in tree.items()}, back)
    assert back["x"].data_ptr() != back["again"].data_ptr() and not back["x"].requires_grad


def test_json_values(tmp_path):
    tree = {
        "": {"empty key": {}, "list": [], "nested": [[1, [2.5, None, True]], ()]},
        "numbers": [0, -1, 2**53 + 1, 2**127 - 1, 1e-320, 0.1, math.inf, -math.inf, math.nan],
        "keys": {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "%2F": 1, "é\n\ud800": [torch.ones(2)]},
        "text": "é\n\u0000\ud800😀",
        "__metadata__": {"__metadata__": torch.ones(1)},
    }
    write(tmp_path / "a", tree, kind="test")
    assert same(tree, read(tmp_path / "a", kind="test"))


def test_random_states(tmp_path):
    numpy = np.random.default_rng(5)
    numpy.random(3)
    python = random.Random(3)
    tree = {
        "torch": torch.get_rng_state(),
        "numpy": numpy.bit_generator.state,
        "python": python.getstate(),
    }
    write(tmp_path / "a", tree, kind="test")
    back = read(tmp_path / "a", kind="test")
    other, other_python = np.random.default_rng(), random.Random()
    other.bit_generator.state = back["numpy"]
    version, state, gauss = back["python"]
    other_python.setstate((version, tuple(state), gauss))
    assert other.random() == numpy.random() and other_python.random() == python.random()
    first = torch.rand(3)
    torch.set_rng_state(back["torch"])
    assert torch.equal(first, torch.rand(3))


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        b"bytes",
        object(),
        1j,
        np.zeros(3),
        np.int64(3),
        {1: 2},
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        print,
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_refused_by_path(tmp_path, value):
    with pytest.raises(OptionError, match=r"'a/1/b'") as caught:
        write(tmp_path / "x", {"a": [0, {"b": value}]}, kind="test")
    assert one_line(caught.value)
    assert os.listdir(tmp_path) == []


def test_trees_that_have_no_json(tmp_path):
    circle: list[object] = []
    circle.append(circle)
    for tree in ({"a": circle}, {"a": 10**5000}, {"__metadata__": torch.ones(1)}, torch.ones(1)):
        with pytest.raises(OptionError) as caught:
            write(tmp_path / "x", tree, kind="test")
        assert one_line(caught.value)


def test_a_header_that_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    for name in ("_MAX_HEADER", "_MAX_VALUES"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, 1000)
            write(tmp_path / "x", {"a": list(range(100))}, kind="test")
            with pytest.raises(OptionError, match="use tensors"):
                write(tmp_path / "x", {"a": list(range(1000))}, kind="test")


def test_any_safetensors_reader_can_open_it(tmp_path):
    tree = {"a": {"b.c": torch.arange(3), "d": [torch.ones(2, dtype=torch.bfloat16)]}, "0": torch.tensor(True)}
    write(tmp_path / "x", tree, kind="test")
    tensors = safetensors.torch.load_file(tmp_path / "x")
    assert set(tensors) == {"a/b.c", "a/d/0", "0"}
    assert same(tensors["a/b.c"], tree["a"]["b.c"]) and same(tensors["0"], tree["0"])
    assert same(tensors["a/d/0"], tree["a"]["d"][0])
    content = (tmp_path / "x").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    # Int64, bfloat16, bool: each starts at a multiple of its size, as the format asks.
    assert length % 8 == 0
    starts = {name: entries[name]["data_offsets"][0] for name in tensors}
    assert starts == {"a/b.c": 0, "a/d/0": 24, "0": 28}


def test_same_tree_same_bytes(tmp_path):
    tree = {"a": torch.ones(3), "b": torch.arange(4)}
    write(tmp_path / "x", tree, kind="test")
    write(tmp_path / "y", read(tmp_path / "x", kind="test"), kind="test")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_odd_file_names(tmp_path):
    for name in ("ä ö", "-x", "a\nb", "x" * 255, os.fsdecode(b"\xff"), "[a]*"):
        folder = tmp_path / name
        folder.mkdir()
        write(folder / name, {"a": 1}, kind="test")
        assert read(folder / name, kind="test") == {"a": 1}
        with pytest.raises(CheckpointError) as caught:
            read(folder / name, kind="other")
        assert one_line(caught.value, "kind 'test', not 'other'")


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        write(tmp_path / "x", {}, kind="test")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


# ---------------------------------------------------------------- crashes


# A fork for each kill: importing torch takes far longer than writing.
WRITER = """
import os, signal, sys, torch
from pyrodiff.training.checkpoint import write

torch.set_num_threads(1)
for line in sys.stdin:
    pid = os.fork()
    i = 0
    while pid == 0:
        write(sys.argv[1], {"i": i, "x": torch.full((200_000,), float(i))}, kind="test")
        i += 1
    print("writing", flush=True)
    sys.stdin.readline()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("killed", flush=True)
"""


@pytest.mark.reliability("Q14", "F1")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_writing(tmp_path, figure, kills):
    path, rng, strays = tmp_path / "x", random.Random(kills), 0
    write(path, {"i": -1, "x": torch.full((200_000,), -1.0)}, kind="test")
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:

        def tell(answer):
            process.stdin.write("go on\n")
            process.stdin.flush()
            assert process.stdout.readline() == answer + "\n"

        for _ in range(kills):
            tell("writing")
            time.sleep(rng.uniform(0, 0.06))
            tell("killed")
            for file in {path, tmp_path / "x.previous"} & set(tmp_path.iterdir()):
                tree = read(file, kind="test")
                assert (tree["x"] == tree["i"]).all()
            strays += sum(name.endswith(".tmp") for name in os.listdir(tmp_path))
        process.stdin.close()
    assert process.returncode == 0
    assert strays > 0, "no kill came while a file was being written"
    write(path, {}, kind="test")
    figure.count("Q14", "kills at random moments survived", kills, at_least=200)
    figure("F1", "temporary files after a restart", len(set(os.listdir(tmp_path)) - {"x", "x.previous"}), at_most=0)


class Faulty:
    """A file whose n-th call fails."""

    def __init__(self, file, count):
        self.file, self.count = file, count

    def __getattr__(self, name):
        value = getattr(self.file, name)
        if name not in ("write", "seek", "flush"):
            return value
        return lambda *args: (self.count(name), value(*args))[1]

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()
        self.count("close")


class Stop(BaseException):
    """Neither an OSError nor an Exception: like KeyboardInterrupt."""


CALLS = ["open", "write", "write", "write", "seek", "write", "flush", "fsync", "link", "replace", "replace", "close"]
CALLS += ["fsync"]  # of the folder


@pytest.mark.reliability("F3")
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), Stop()])
def test_failure_at_every_call(tmp_path, monkeypatch, figure, failure):
    """Every call in Python that a save makes fails in turn; the two that keep the replaced file may."""
    path = tmp_path / "x"
    old = {"version": "old", "x": torch.zeros(5), "y": torch.zeros(3)}
    new = {"version": "new", "x": torch.ones(5), "y": torch.ones(3)}
    calls: list[str] = []
    fail_at = None

    def count(name):
        calls.append(name)
        if fail_at is not None and len(calls) == fail_at + 1:
            raise failure

    def counted(name):
        function = getattr(os, name)
        return lambda *args, **kwargs: (count(name), function(*args, **kwargs))[1]

    def faulty_open(file, mode):
        count("open")
        return Faulty(open(file, mode), count)

    def attempt():
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(_files, "open", faulty_open, raising=False)
            for name in ("fsync", "link", "replace"):
                patch.setattr(_files.os, name, counted(name))
            write(path, new, kind="test")

    write(path, old, kind="test")
    attempt()
    assert calls == CALLS
    for fail_at, name in enumerate(CALLS):
        write(path, old, kind="test")
        harmless = isinstance(failure, OSError) and fail_at in (8, 9)
        if harmless:
            attempt()
        else:
            with pytest.raises((SaveError, Stop)) as caught:
                attempt()
            if isinstance(failure, OSError):
                assert one_line(caught.value, str(path), "No space left on device", "MB free"), name
        assert same(read(path, kind="test"), new if harmless or fail_at > 10 else old), name
        read(tmp_path / "x.previous", kind="test")
        assert sorted(os.listdir(tmp_path)) == ["x", "x.previous"], name
    figure.count("F3", "calls made to fail", len(CALLS), at_least=len(CALLS))


@pytest.mark.reliability("F3")
def test_file_system_refuses_to_grow(tmp_path):
    """The operating system's own refusal, in the middle of a tensor."""
    resource = pytest.importorskip("resource")
    write(tmp_path / "x", {"a": 1}, kind="test")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            write(tmp_path / "x", {"a": torch.zeros(10**6)}, kind="test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(caught.value, "File too large", "MB free there")
    assert read(tmp_path / "x", kind="test") == {"a": 1}
    assert os.listdir(tmp_path) == ["x"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    diffusion = make_mlp()
    for path in (tmp_path / "folder", tmp_path / "none" / "x", tmp_path / "file" / "x"):
        with pytest.raises(CheckpointError) as caught:
            write(path, {}, kind="test")
        assert one_line(caught.value, "cannot write", repr(str(path)))
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "file", diffusion)
    assert one_line(caught.value, "cannot create")


def test_only_strays_of_the_dead_are_removed(tmp_path):
    stray, other = tmp_path / ".pyrodiff-00.tmp", tmp_path / "pyrodiff-1.tmp"
    stray.touch()
    other.touch()
    with open(stray, "rb+") as file:
        assert _files._locked(file)
        write(tmp_path / "x", {}, kind="test")
        assert stray.exists()
    write(tmp_path / "x", {}, kind="test")
    assert not stray.exists() and other.exists()


@pytest.mark.skipif(_files.fcntl is None, reason="there are no advisory locks")
def test_a_write_leaves_another_that_is_under_way(tmp_path, monkeypatch):
    fsync, pending = os.fsync, ["y"]

    def write_another(descriptor):
        if pending:
            write(tmp_path / pending.pop(), {"a": 2}, kind="test")
        fsync(descriptor)

    monkeypatch.setattr(_files.os, "fsync", write_another)
    write(tmp_path / "x", {"a": 1}, kind="test")
    assert read(tmp_path / "x", kind="test") == {"a": 1}
    assert read(tmp_path / "y", kind="test") == {"a": 2}


# ---------------------------------------------------------------- damage


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "x"
    tree = {"a": torch.randn(40), "b": [torch.arange(5), {"c": 1.5, "text": "hello"}], "d": None}
    write(path, tree, kind="test")
    return path, path.read_bytes()


@pytest.mark.reliability("Q16", "F4")
def test_bit_flips(sound, figure):
    path, content = sound
    rng = random.Random(1)
    positions = rng.sample(range(8 * len(content)), 400)
    figure.count("Q16", "damaged files refused", len(positions), at_least=10_000)
    for position in positions:
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError) as caught:
            read(path, kind="test")
        assert one_line(caught.value, str(path)), position


@pytest.mark.reliability("F5")
def test_truncations_and_appendices(sound):
    path, content = sound
    rng = random.Random(2)
    for length in [0, 1, 7, 8, 9, len(content) - 1, *rng.sample(range(10, len(content)), 100)]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            read(path, kind="test")
        assert one_line(caught.value, str(path))
        assert length < 9 or "truncated" in str(caught.value)
    for tail in (b"\0", b"\n", content):
        path.write_bytes(content + tail)
        with pytest.raises(CheckpointError, match="bytes instead of"):
            read(path, kind="test")


@pytest.mark.reliability("F2")
def test_zeroed_and_swapped_blocks(sound):
    path, content = sound
    for start in range(0, len(content) - 32, 32):
        block = content[start : start + 32]
        for other in (bytes(32), block[::-1], content[-32:]):
            changed = content[:start] + other + content[start + 32 :]
            if changed != content:
                path.write_bytes(changed)
                with pytest.raises(CheckpointError) as caught:
                    read(path, kind="test")
                assert one_line(caught.value, str(path))


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def f32(shape, start, stop):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


def torch_save(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def safetensors_file(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


FOREIGN = {
    "empty": (lambda m: b"", "empty"),
    "text": (lambda m: b"hello, world\n" * 10, "text"),
    "json": (lambda m: b'{"config": {}}', "text"),
    "pickle": (lambda m: pickle.dumps(Payload(m)), "pickle"),
    "old pickle": (lambda m: pickle.dumps(Payload(m), protocol=0), "not a pyrodiff checkpoint"),
    "torch.save": (lambda m: torch_save({"a": torch.ones(3)}), "zip"),
    "torch.save, code": (lambda m: torch_save({"state": Payload(m)}), "zip"),
    "torch.save, legacy": (
        lambda m: torch_save({"a": Payload(m)}, _use_new_zipfile_serialization=False),
        "pickle",
    ),
    "png": (lambda m: b"\x89PNG\r\n\x1a\n" + bytes(100), "not a pyrodiff checkpoint"),
    "zeros": (lambda m: bytes(1000), "not a pyrodiff checkpoint"),
    "a wide character": (lambda m: safetensors_file('{"a":"😀"}'.encode()), "no ASCII"),
    "millions of lists": (lambda m: safetensors_file(b"{" + b"[]," * 10**6), "above 1000000 values"),
    "huge header": (lambda m: struct.pack("<Q", 2**63) + b"{" * 100, "not a pyrodiff checkpoint"),
    "long header": (lambda m: struct.pack("<Q", 10**7) + b'{"a"', "truncated"),
    "deep header": (lambda m: safetensors_file(b'{"a":' + b"[" * 10**5), "no JSON"),
    "list header": (lambda m: safetensors_file(b"{}" + b" " * 6), "another program"),
    "long number": (lambda m: safetensors_file(b'{"a":' + b"9" * 5000 + b"}"), "no JSON"),
    "metadata is a list": (lambda m: safetensors_file({"__metadata__": []}), "no JSON"),
    "other program": (
        lambda m: safetensors.torch.save({"a": torch.ones(2)}, {"format": "pt"}),
        "another program",
    ),
    "version is a list": (
        lambda m: safetensors_file({"__metadata__": {"pyrodiff_format": []}}),
        "damaged",
    ),
    "endless version": (
        lambda m: safetensors_file({"__metadata__": {"pyrodiff_format": "9" * 5000}}),
        "damaged",
    ),
    "newer": (
        lambda m: safetensors_file({"__metadata__": {"pyrodiff_format": "2"}}),
        "format 2 was written by a newer pyrodiff",
    ),
    "older": (
        lambda m: safetensors_file({"__metadata__": {"pyrodiff_format": "0"}}),
        "format 0 was written by an older pyrodiff",
    ),
}


@pytest.mark.reliability("Q16", "F5", "F6")
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(tmp_path, figure, name):
    make, word = FOREIGN[name]
    marker = tmp_path / "executed"
    (tmp_path / "model.safetensors").write_bytes(make(marker))
    for call in (lambda: load(tmp_path), lambda: read(tmp_path / "model.safetensors", kind="model")):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert one_line(caught.value, word, "model.safetensors")
    figure("F6", "payloads executed", marker.exists(), at_most=0)
    figure.count("Q16", "foreign and hostile files refused", 1, at_least=50)


@pytest.mark.reliability("Q16", "F5")
def test_not_files(tmp_path, figure):
    os.mkdir(tmp_path / "folder")
    cases = {"none": "No such file", "folder": "a folder", "folder/none/x": "No such file"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "zero").symlink_to("/dev/zero")
        (tmp_path / "loop").symlink_to("loop")
        cases |= {"pipe": "a pipe", "zero": "device", "loop": "symbolic links"}
    for name, word in cases.items():
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path / name, kind="test")
        assert one_line(caught.value, word, name)
    figure.count("Q16", "foreign and hostile files refused", len(cases), at_least=50)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(tmp_path / "folder")


X = torch.ones(2)
CRAFTED = {
    "negative shape": dict(entries={"a": f32([-2], 0, 8)}, data=bytes(8)),
    "two negative shapes": dict(entries={"a": f32([-2, -1], 0, 8)}, data=bytes(8)),
    "overlapping": dict(entries={"a": f32([2], 0, 8), "b": f32([2], 0, 8)}, data=bytes(8)),
    "gap": dict(entries={"a": f32([2], 0, 8), "b": f32([2], 16, 24)}, data=bytes(24)),
    "claims 4 TB": dict(entries={"a": f32([10**6, 10**6], 0, 4 * 10**12)}, data=bytes(8)),
    "claims 4 TB of 8 bytes": dict(entries={"a": f32([10**6, 10**6], 0, 8)}, data=bytes(8)),
    "none of 2**80": dict(entries={"a": f32([0, 2**80], 0, 0)}, data=b""),
    "shape of floats": dict(entries={"a": f32([2.0], 0, 8)}, data=bytes(8)),
    "shape of booleans": dict(entries={"a": f32([True], 0, 4)}, data=bytes(4)),
    "no shape": dict(entries={"a": {"dtype": "F32"}}, data=b""),
    "unknown dtype": dict(entries={"a": f32([2], 0, 8) | {"dtype": "F4"}}, data=bytes(8)),
    "unknown field": dict(entries={"a": f32([2], 0, 8) | {"code": "x"}}, data=bytes(8)),
    "entry is a list": dict(entries={"a": []}, data=b""),
    "too little data": dict(entries={"a": f32([2], 0, 8)}, data=bytes(7)),
    "too much data": dict(entries={"a": f32([2], 0, 8)}, data=bytes(9)),
    "tensor nowhere": dict(tree={}, tensors={"a": X}),
    "tensor on a value": dict(tree={"a": 1}, tensors={"a": X}),
    "tensor in a value": dict(tree={"a": 1}, tensors={"a/b": X}),
    "tensor beyond a list": dict(tree={"a": [None]}, tensors={"a/1": X}),
    "tensor at a name in a list": dict(tree={"a": [None]}, tensors={"a/b": X}),
    "tree is a list": dict(tree=[]),
    "tree is no JSON": dict(metadata=dict(tree="{")),
    "tree is deep": dict(metadata=dict(tree="[" * 10**5)),
    "kind": dict(metadata=dict(kind="resume")),
    "more metadata": dict(metadata=dict(note="x")),
}


@pytest.mark.reliability("Q16", "F7")
@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files(tmp_path, figure, name):
    path = tmp_path / "model.safetensors"
    craft(path, **{"tree": {"a": None, "b": None}, **CRAFTED[name]})
    with pytest.raises(CheckpointError) as caught:
        read(path, kind="model")
    assert one_line(caught.value, str(path))
    figure.count("Q16", "foreign and hostile files refused", 1, at_least=50)


def test_crafted_files_would_be_read_without_the_flaw(tmp_path):
    craft(tmp_path / "x", {"a": None}, entries={"a": f32([2], 0, 8)}, data=bytes(8))
    assert same(read(tmp_path / "x", kind="model"), {"a": torch.zeros(2)})
    craft(tmp_path / "x", {"a": [None]}, {"a/0": X})
    assert same(read(tmp_path / "x", kind="model"), {"a": [X]})


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"a":{', b'"a":{"dtype":"F32",'),
        (b'{"__metadata__"', b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__"'),
        (b'"shape":[2]', b'"shape": [2]'),
        (b'"shape":[2]', b'"shape":[2.0]'),
    ],
    ids=["duplicated field", "duplicated entry", "another spelling", "another number"],
)
def test_a_second_spelling_of_a_header_is_refused(tmp_path, old, new):
    craft(tmp_path / "x", {"a": None}, {"a": X})
    content = (tmp_path / "x").read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].replace(old, new)
    assert text != content[8 : 8 + length]
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(CheckpointError, match="damaged"):
        read(tmp_path / "x", kind="model")


# ---------------------------------------------------------------- diffusions


def shake(module):
    """Weights that are not the initial ones, where much is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def make_mlp(net=None, **options):
    net = shake(MLP(2, width=8, depth=1)) if net is None else net
    return pyrodiff.GaussianDiffusion(net, pyrodiff.CosineSchedule(5), (2,), **options)


def make_unet():
    net = shake(UNet(1, out_channels=2, width=8, multipliers=(1, 2), blocks=1, attention=(1,), heads=2))
    schedule = pyrodiff.LinearSchedule(100).respace("ddim10")
    return pyrodiff.GaussianDiffusion(
        net,
        schedule,
        (1, 4, 4),
        prediction="v",
        variance="learned_range",
        decoder="learned",
        bins=(17, -1.0, 1.0),
        clip=True,
        objective="hybrid",
        data_size=100,
        name="images",
    )


@pytest.mark.parametrize("make", [make_mlp, make_unet])
def test_a_loaded_diffusion_is_the_saved_one(tmp_path, make):
    diffusion = shake(make())
    folder = tmp_path / "new" / "folder"
    save(folder, diffusion)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    before = torch.get_rng_state()
    loaded = load(folder)
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.config == diffusion.config and loaded.net.config == diffusion.net.config
    assert same(dict(loaded.state_dict()), dict(diffusion.state_dict()))
    assert all(p.requires_grad for p in loaded.parameters())
    assert not any(p.is_meta for p in loaded.parameters())
    x = torch.randn(3, *diffusion.event_shape).clamp(-1, 1)
    if diffusion.config["bins"]:
        x = (x * 8).round() / 8
    results = []
    for each in (diffusion, loaded, load(folder / "model.safetensors", device="cpu")):
        torch.manual_seed(0)
        with torch.no_grad():
            law = each.reverse_kernel(x, torch.tensor([1, 2, 3]))
            results.append((law.mean, law.variance, pyrodiff.elbo_terms(each, x).elbo))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tree = read(folder / "model.safetensors", kind="model")
    assert config == tree["config"]
    assert config["pyrodiff"] == pyrodiff.__version__ and config["network"]["arguments"]
    save(tmp_path / "again", loaded)
    for name in os.listdir(folder):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_loaded_diffusion_trains(tmp_path):
    save(tmp_path, make_mlp())
    diffusion = load(tmp_path)
    optimizer = torch.optim.Adam(diffusion.parameters())
    before = diffusion.net.input.weight.clone()
    diffusion.reverse_kernel(torch.randn(4, 2), 2).mean.square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, diffusion.net.input.weight)


def test_config_json_is_never_read(tmp_path):
    save(tmp_path, make_mlp())
    (tmp_path / "config.json").write_text("{")
    assert isinstance(load(tmp_path), pyrodiff.GaussianDiffusion)


def test_extra(tmp_path):
    save(tmp_path, make_mlp(), step=3, losses=[1.0, math.nan], mean=torch.ones(2))
    extra = read(tmp_path / "model.safetensors", kind="model")["extra"]
    assert same(extra, {"step": 3, "losses": [1.0, math.nan], "mean": torch.ones(2)})
    load(tmp_path)
    with pytest.raises(OptionError, match="'extra/step'"):
        save(tmp_path, make_mlp(), step={1})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_kept(tmp_path, dtype):
    diffusion = make_mlp(decoder="learned").to(dtype)
    save(tmp_path, diffusion)
    assert same(dict(load(tmp_path).state_dict()), dict(diffusion.state_dict()))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x, log_snr):
        return self.b(self.a(x)) * self.count


class OwnMLP(MLP):
    """Not what is registered, although it has the name of its parent in its pedigree."""


def test_unregistered_network(tmp_path):
    diffusion = make_mlp(Own())
    save(tmp_path, diffusion)
    assert json.loads((tmp_path / "config.json").read_text())["network"] is None
    with pytest.raises(OptionError) as caught:
        load(tmp_path)
    assert one_line(caught.value, "net=")
    net = Own()
    loaded = load(tmp_path, net)
    assert loaded.net is net and net.a.weight is net.b.weight
    assert same(dict(loaded.state_dict()), dict(diffusion.state_dict()))
    save(tmp_path, make_mlp(OwnMLP(2, width=8)))
    with pytest.raises(OptionError, match="net="):
        load(tmp_path)


def test_another_precision_of_the_users_network(tmp_path):
    diffusion = make_mlp(Own())
    save(tmp_path, diffusion)
    net = load(tmp_path, Own().double()).net
    assert net.a.weight.dtype == torch.float64
    assert torch.equal(net.a.weight.float(), diffusion.net.a.weight)
    big = Own().double()
    with torch.no_grad():
        big.a.bias.fill_(1e300)
    save(tmp_path, make_mlp(big))
    with pytest.raises(CheckpointError, match="not finite"):
        load(tmp_path, Own())


class OwnSchedule(pyrodiff.CosineSchedule):
    """One that says it is a CosineSchedule, as its parent does."""


class UnknownSchedule(pyrodiff.CosineSchedule):
    config = None


class SilentSchedule(pyrodiff.CosineSchedule):
    config = pyrodiff.schedules.Schedule.config


def test_own_schedule(tmp_path):
    for schedule in (OwnSchedule(7), UnknownSchedule(7), SilentSchedule(7)):
        save(tmp_path, pyrodiff.GaussianDiffusion(MLP(2, width=8), schedule, (2,)))
        with pytest.raises(OptionError, match="schedule="):
            load(tmp_path)
        assert load(tmp_path, schedule=schedule).schedule is schedule


def test_a_schedule_longer_than_a_file_may_ask_for_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_STEPS", 4)
    diffusion = make_mlp()
    save(tmp_path, diffusion)
    with pytest.raises(OptionError, match="schedule="):
        load(tmp_path)
    assert load(tmp_path, schedule=diffusion.schedule).steps == 5


class Compiled(nn.Module):
    """What torch.compile makes of a module, as far as names go."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *args, **kwargs):
        return self._orig_mod(*args, **kwargs)


def test_compiled_modules(tmp_path):
    diffusion = make_mlp()
    names = set(diffusion.state_dict())
    net = diffusion.net
    net.blocks[0] = Compiled(net.blocks[0])
    diffusion.reverse_kernel.net = Compiled(net)
    assert set(diffusion.state_dict()) != names
    for each in (diffusion, Compiled(diffusion)):
        save(tmp_path, each)
        tree = read(tmp_path / "model.safetensors", kind="model")
        assert set(tree["state"]) == names and tree["config"]["network"]["name"] == "MLP"
        assert "_orig_mod" not in (tmp_path / "config.json").read_text()
        loaded = load(tmp_path)
        assert torch.equal(loaded.net.input.weight, net.input.weight)
    own = Compiled(MLP(2, width=8, depth=1))
    loaded = load(tmp_path, own)
    assert loaded.net is own and torch.equal(own._orig_mod.input.weight, net.input.weight)


def test_only_diffusions_are_saved(tmp_path):
    for other in (MLP(2), nn.Linear(1, 1), None):
        with pytest.raises(OptionError, match="GaussianDiffusion"):
            save(tmp_path, other)
    assert os.listdir(tmp_path) == []


KEY = "reverse_kernel.net.input.weight"
WRONG_STATES = {
    "missing": (lambda s: s.pop(KEY), "1 weights missing"),
    "extra": (lambda s: s.update(more=X), "1 weights unexpected (more)"),
    "renamed": (lambda s: s.update(more=s.pop(KEY)), "1 weights missing"),
    "all": (lambda s: s.clear(), "..."),
    "reshaped": (lambda s: s.update({KEY: s[KEY].T.clone()}), "[2, 8] instead of [8, 2]"),
    "scalar": (lambda s: s.update({KEY: torch.tensor(1.0)}), "[] instead of [8, 2]"),
    "integers": (lambda s: s.update({KEY: s[KEY].long()}), "int64 instead of torch.float32"),
    "nan": (lambda s: s[KEY].view(-1)[3].fill_(math.nan), "1 weights not finite"),
    "inf": (lambda s: s[KEY].view(-1)[3].fill_(math.inf), "1 weights not finite"),
    "no tensor": (lambda s: s.update({KEY: [1.0]}), "list instead of"),
}


@pytest.mark.reliability("Q16", "F8")
@pytest.mark.parametrize("name", WRONG_STATES)
def test_wrong_weights(tmp_path, figure, name):
    change, word = WRONG_STATES[name]
    save(tmp_path, make_mlp())
    tree = read(tmp_path / "model.safetensors", kind="model")
    change(tree["state"])
    write(tmp_path / "model.safetensors", tree, kind="model")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert one_line(caught.value, word, str(tmp_path)) and len(str(caught.value)) < 1000
    net = shake(MLP(2, width=8, depth=1))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError):
        load(tmp_path, net)
    assert same(before, dict(net.state_dict()))
    figure.count("Q16", "foreign and hostile files refused", 1, at_least=50)


def test_weights_that_are_not_finite_are_saved_without_a_warning(tmp_path):
    diffusion = make_mlp()
    nn.init.constant_(diffusion.net.input.weight, math.nan)
    save(tmp_path, diffusion)
    with pytest.raises(CheckpointError, match=r"1 weights not finite \(reverse_kernel\.net\.input"):
        load(tmp_path)


WRONG_CONFIGS = {
    "no config": lambda t: t.pop("config"),
    "no state": lambda t: t.pop("state"),
    "a path to import": lambda t: t["config"]["network"].update(name="os.system"),
    "a billion layers": lambda t: t["config"]["network"]["arguments"].update(depth=10**9),
    "a billion steps": lambda t: t["config"]["schedule"].update(steps=10**9),
    "infinite steps": lambda t: t["config"]["schedule"].update(steps=math.inf),
    "a billion steps, respaced": lambda t: t["config"].update(
        schedule={"schedule": "RespacedSchedule", "base": {"schedule": "LinearSchedule", "steps": 10**9}, "kept": [1]}
    ),
    "unknown argument": lambda t: t["config"]["network"]["arguments"].update(code="x"),
    "a huge network": lambda t: t["config"]["network"]["arguments"].update(width=2 * 10**6),
    "network is a list": lambda t: t["config"].update(network=[1]),
    "network without arguments": lambda t: t["config"]["network"].pop("arguments"),
    "arguments are a list": lambda t: t["config"]["network"].update(arguments=[1]),
    "unknown schedule": lambda t: t["config"]["schedule"].update(schedule="os.system"),
    "schedule is a text": lambda t: t["config"].update(schedule="linear"),
    "steps": lambda t: t["config"]["schedule"].update(steps=-1),
    "unknown option": lambda t: t["config"].update(code="x"),
    "prediction": lambda t: t["config"].update(prediction="x"),
    "event_shape": lambda t: t["config"].update(event_shape="x"),
    "bins": lambda t: t["config"].update(bins=3),
    "no event_shape": lambda t: t["config"].pop("event_shape"),
}


@pytest.mark.reliability("Q16", "F8")
@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_wrong_configs(tmp_path, figure, name):
    save(tmp_path, make_mlp())
    tree = read(tmp_path / "model.safetensors", kind="model")
    WRONG_CONFIGS[name](tree)
    write(tmp_path / "model.safetensors", tree, kind="model")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert one_line(caught.value, str(tmp_path))
    figure.count("Q16", "foreign and hostile files refused", 1, at_least=50)


# ---------------------------------------------------------------- the lock


HOLD = """
import fcntl, sys
with open(sys.argv[1] + "/.lock", "ab") as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.reliability("F26")
@pytest.mark.skipif(_files.fcntl is None, reason="there are no advisory locks")
def test_lock(tmp_path):
    folder = tmp_path / "a" / "run"
    for _ in range(2):
        with lock(folder):
            with pytest.raises(OptionError) as caught, lock(folder):
                pass
            assert one_line(caught.value, str(folder), f"in use by another run (process {os.getpid()} on ")
            with lock(tmp_path):
                pass
    with pytest.raises(ZeroDivisionError), lock(folder):
        raise ZeroDivisionError
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OptionError, match="in use"), lock(folder):
            pass
        process.kill()
        process.wait()
        with lock(folder):
            pass


def test_lock_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "fcntl", None)
    (tmp_path / ".pyrodiff-00.tmp").touch()
    with lock(tmp_path), lock(tmp_path):
        write(tmp_path / "x", {}, kind="test")
    assert sorted(os.listdir(tmp_path)) == [".lock", "x"]
    (tmp_path / "file").touch()
    with pytest.raises(OptionError) as caught, lock(tmp_path / "file"):
        pass
    assert one_line(caught.value, "cannot be used")


def test_nothing_here_can_execute_a_file():
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (checkpoint, _files))
    for name in ("torch.load", "import pickle", "importlib", "eval(", "exec(", "__import__"):
        assert name not in source
