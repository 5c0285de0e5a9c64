"""Checkpoints of `save` and of `fit` under faults: kills at every system call, thousands of damaged files, full disks."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from test_checkpoint import FOREIGN, Payload, craft, make_mlp, one_line, same

from pyrodiff import CosineSchedule, GaussianDiffusion, _files, cli, fit
from pyrodiff.errors import CheckpointError, OptionError, SaveError
from pyrodiff.interop import convert
from pyrodiff.nets import MLP
from pyrodiff.training.checkpoint import load, lock, read, save, write

loop = importlib.import_module("pyrodiff.training.fit")

FILES = ("model", "resume")
OPTIONS = {
    **{"steps": 6, "batch_size": 8, "lr": 1e-2, "warmup": 2, "ema_decay": 0.8, "validate_every": 2},
    **{"timesteps": "importance", "progress": False, "device": "cpu"},
}


def diffusion() -> GaussianDiffusion:
    """As good as new each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = MLP(2, width=8, depth=1)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return GaussianDiffusion(net, CosineSchedule(5), (2,))


def examples(n: int = 24) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(n, 2)).astype(np.float32))


def go_on(folder: Path, resume: bool = True, **options) -> GaussianDiffusion:
    trained = diffusion()
    fit(trained, examples(), examples(8), folder=folder, resume=resume, **{**OPTIONS, **options})
    return trained


def interrupted_at(folder: Path, step: int) -> None:
    """A run that was asked to stop at a step, as by Ctrl-C; all its files are there."""
    first, calls = diffusion(), itertools.count(1)

    def stop(*_) -> None:
        if first.training and next(calls) == step:
            signal.raise_signal(signal.SIGINT)

    handle = first.net.register_forward_hook(stop)
    fit(first, examples(), examples(8), folder=folder, **OPTIONS)
    handle.remove()


def without_times(node: object) -> object:
    if isinstance(node, dict):
        return {key: without_times(value) for key, value in node.items() if key != "seconds"}
    return [without_times(value) for value in node] if isinstance(node, list) else node


def outcome(folder: Path) -> list[object]:
    """All that a run leaves, wall times apart."""
    trees = [read(folder / f"{name}.safetensors", kind=name) for name in FILES]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_times(node) for node in (*trees, records, json.loads((folder / "config.json").read_text()))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def strays(folder: Path) -> int:
    return len(list(folder.glob(".pyrodiff-*.tmp")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    go_on(folder, resume=False)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A finished run's folder, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refusal(error: type[Exception], function, *arguments: object) -> Exception:
    with pytest.raises(error) as caught:
        function(*arguments)
    return caught.value


def command(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of the command line."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return caught.value.code, capsys.readouterr().err


# ---------------------------------------------------------------- kill -9 at every system call


def under_strace(work, *options: str) -> tuple[int, list[str]]:
    """Run ``work()`` in a fork under strace: its wait status, and the names of its calls on files and descriptors."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            # Where only a parent may trace, anyone may trace this one.
            ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            os.write(write_end, b"x")
            signal.sigwait({signal.SIGUSR1})  # no call on a file: what is counted begins after it
            work()
        finally:
            os._exit(0)
    os.read(read_end, 1)
    os.close(read_end)
    os.close(write_end)
    line = ["strace", "-q", "-o", "/dev/stdout", "-e", "trace=%file,%desc", *options, "-p", str(pid)]
    tracer = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
            if tracer.poll() is not None:
                pytest.skip("strace may not trace a process here")
            time.sleep(0.001)
        os.kill(pid, signal.SIGUSR1)
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        text, _ = tracer.communicate()
    return status, re.findall(r"^(\w+)\(", text, re.MULTILINE)


def kill_at_every_call(before: Path, place: Path, work) -> tuple[int, list[Path]]:
    """Do ``work()`` on copies of a folder, killed before each of its calls: how many; copies of the different states left."""

    def attempt(*options: str) -> tuple[int, list[str]]:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(before, place)
        return under_strace(work, *options)

    status, calls = attempt()
    assert status == 0 and {"fsync", "rename", "write", "link", "flock"} <= set(calls)
    states, seen, killed = {}, Counter(), 0
    for name in calls:
        seen[name] += 1
        status, _ = attempt("-e", f"inject={name}:signal=KILL:when={seen[name]}")
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{name} number {seen[name]}"
        killed += 1
        digest = hashlib.sha256()
        for path in sorted(place.rglob("*")):
            if path.is_file() and path.name != ".lock":
                kind = "stray" if path.suffix == ".tmp" else path.name
                digest.update(f"{kind} {path.stat().st_nlink} {len(path.read_bytes())}".encode() + path.read_bytes())
        if (key := digest.hexdigest()) not in states:
            states[key] = Path(shutil.copytree(place, place.with_name(f"state-{len(states)}")))
    return killed, list(states.values())


needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="there is no strace")


@needs_strace
@pytest.mark.slow
@pytest.mark.reliability("Q14", "F1", "F9")
def test_killed_at_every_system_call_of_a_save(tmp_path, figure):
    """SIGKILL by the kernel before the n-th system call that a save makes on any file or descriptor, for every n.

    Between two of those calls nothing changes on the disk, so that these are all the states a kill can leave. Each of them is
    looked at: the model that was there or the new one, whole; the next save works and leaves nothing of the killed one.
    """
    old, new = make_mlp(), make_mlp()
    before, place = tmp_path / "before", tmp_path / "place"
    for _ in range(2):  # so that there is a previous one too
        save(before, old)
    killed, states = kill_at_every_call(before, place, lambda: save(place, new))
    figure.count("Q14", "system calls, killed before each", killed, at_least=100)
    found, left = Counter(), 0
    for folder in states:
        state = dict(load(folder).state_dict())
        found[
            "new" if same(state, dict(new.state_dict())) else "old" if same(state, dict(old.state_dict())) else "?"
        ] += 1
        assert same(dict(load(folder / "model.previous.safetensors").state_dict()), dict(old.state_dict()))
        json.loads((folder / "config.json").read_text())
        left += strays(folder)
        save(folder, new)
        assert same(dict(load(folder).state_dict()), dict(new.state_dict()))
        figure("F1", "temporary files after a restart", strays(folder), at_most=0)
    assert left and found["old"] and found["new"] and not found["?"], found


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.reliability("Q14", "F1", "F9")
def test_killed_at_every_system_call_of_a_resumed_run(tmp_path, figure):
    """The same of `fit`, from taking up a run to its end: every set of half-written files resumes to the same end."""
    before, place = tmp_path / "before", tmp_path / "place"
    interrupted_at(before, 5)
    go_on(Path(shutil.copytree(before, tmp_path / "whole")))
    expected = outcome(tmp_path / "whole")
    killed, states = kill_at_every_call(before, place, lambda: go_on(place))
    figure.count("Q14", "system calls, killed before each", killed, at_least=100)
    for folder in states:
        for name in FILES:
            read(folder / f"{name}.safetensors", kind=name)
        go_on(folder)
        assert same(expected, outcome(folder))
        figure("F1", "temporary files after a restart", strays(folder), at_most=0)
    figure("F9", "half-written sets of files, resumed to the same end", len(states), at_least=10)


@pytest.mark.reliability("F9")
def test_the_best_model_of_a_later_step_does_not_outlive_its_run(run):
    """Killed after model.safetensors and before resume.safetensors, resumed where numbers come out otherwise."""
    expected = (run / "model.safetensors").read_bytes()
    save(run, make_mlp())
    go_on(run)
    assert (run / "model.safetensors").read_bytes() == expected


# ---------------------------------------------------------------- damage


def damaged(a: bytes, b: bytes, rng: random.Random):
    """Ways in which a disk or a transfer spoils a file, and the row of each."""
    flipped = bytearray(a)
    flipped[rng.randrange(len(a))] ^= 1 << rng.randrange(8)
    yield "F4", bytes(flipped)
    page = rng.choice((512, 4096))
    start = page * rng.randrange(-(-len(a) // page))
    yield "F2", a[:start] + bytes(len(a[start : start + page])) + a[start + page :]
    yield "F5", a[: rng.randrange(len(a)) // (step := rng.choice((1, 512))) * step]
    cut = rng.randrange(1, len(a))
    yield "F2", a[:cut] + b[cut:]


@pytest.mark.reliability("Q16", "F2", "F4", "F5")
@pytest.mark.parametrize("n", [100, pytest.param(2700, marks=pytest.mark.slow)])
def test_damaged_files_of_runs(finished, tmp_path, figure, n):
    """Files of `fit`, and of another one, so that a splice of two has a head and a tail that were sound."""
    interrupted_at(tmp_path / "other", 3)
    rng, accepted, refused, path = random.Random(n), 0, Counter(), tmp_path / "x"
    path.touch()
    for name in FILES:
        files = [(folder / f"{name}.safetensors").read_bytes() for folder in (finished, tmp_path / "other")]
        for i in range(n // 2):
            for row, content in damaged(files[i % 2], files[1 - i % 2], rng):
                if content in files:
                    continue
                with open(path, "r+b") as file:  # not emptied first, after which some file systems flush
                    file.write(content)
                    file.truncate()
                try:
                    read(path, kind=name)
                    accepted += 1
                except CheckpointError as error:  # anything else is a traceback, and fails
                    refused[row] += one_line(error, str(path))
    figure("Q16", "damaged files accepted", accepted, at_most=0)
    assert refused.total() > 3.5 * n
    figure.count("Q16", "damaged files refused", refused.total(), at_least=10_000)
    figure.count("F2", "zeroed pages and splices refused", refused["F2"], at_least=4500)
    figure.count("F4", "flipped bits refused", refused["F4"], at_least=2500)
    figure.count("F5", "truncations refused", refused["F5"], at_least=2500)


MEMORY = """
import json, os, re, struct, sys
import torch
from pyrodiff.errors import CheckpointError
from pyrodiff.training.checkpoint import load, read, write, _header

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()).group(1)) / 1024

def reset():
    open("/proc/self/clear_refs", "w").write("5")

def header(text):
    return struct.pack("<Q", len(text)) + text

def metadata(tree):
    return {"pyrodiff_format": "1", "kind": "test", "sha256": "0" * 64, "tree": tree}

large = {"x": torch.zeros(12_000_000)}
for _ in range(2):  # and with a previous one, which is looked at too
    write("large", large, kind="test")
del large
content = bytearray(open("large", "rb").read())
content[len(content) // 2] ^= 1
open("large", "wb").write(content)
del content
empty = {f"{i:x}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(90_000)}
bombs = {
    "lists": header(b'{"a":[' + b"[]," * 300_000 + b"[]]}"),
    "too many lists": header(b'{"a":[' + b"[]," * 6_000_000 + b"[]]}"),
    "objects": header(b'{"a":[' + b'{"":0},' * 300_000 + b"0]}"),
    "numbers": header(b'{"a":[' + b"12345678," * 990_000 + b"0]}"),
    "one text": header(b'{"a":"' + b"x" * 19_000_000 + b'"}'),
    "escapes": header(b'{"a":"' + b"\\\\ud83d\\\\ude00" * 1_500_000 + b'"}'),
    "tree of lists": _header(metadata("[" + "[]," * 300_000 + "[]]"), {}),
    "tree of text": _header(metadata('["' + "x" * 19_000_000 + '"]'), {}),
    "empty tensors": _header(metadata(json.dumps(dict.fromkeys(empty))), empty),
    "claims TiB": header(b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}') + bytes(8),
    "header of TiB": struct.pack("<Q", 2**40) + b"{" * 1000,
    "200 MB of one list": header(b'{"a":' + b"[" * 200_000_000),
}
for name in list(bombs):
    open(name, "wb").write(bombs.pop(name))
worst = {}
for name in ["large", *[n for n in os.listdir() if n not in ("large", "large.previous")]]:
    reset()
    before = peak()
    try:
        read(name, kind="test")
        raise SystemExit(f"{name} was accepted")
    except CheckpointError as error:
        assert "\\n" not in str(error)
        assert ("large.previous" in str(error)) == (name == "large"), error
    worst[name] = peak() - before - os.path.getsize(name) / 2**20
print(json.dumps(worst))
"""


@pytest.mark.slow
@pytest.mark.reliability("Q16", "F7")
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of memory cannot be reset here")
def test_memory_is_bounded_by_the_size_of_a_file(tmp_path, figure):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, "-c", MEMORY]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    for megabytes in json.loads(done.stdout).values():
        figure("Q16", "peak memory above the size of the file, MB", megabytes, at_most=256)


# ---------------------------------------------------------------- hostile files


def npy(shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def twice(payload: bytes) -> bytes:
    """A zip archive with two members of one name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("data.pkl", b"")
        file.writestr("data.pkl", payload)
    return buffer.getvalue()


def optimizer_with_payload(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"optimizer": {"state": {0: {"exp_avg": Payload(marker)}}}, "model": Payload(marker)}, buffer)
    return buffer.getvalue()


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: str, start: int, stop: int) -> bytes:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{stop}]}}'.encode()


HOSTILE = {
    **{name: make for name, (make, _) in FOREIGN.items()},
    "pickles in model and optimizer": optimizer_with_payload,
    **{f"pickle, protocol {n}": lambda m, n=n: pickle.dumps(Payload(m), protocol=n) for n in range(6)},
    "zip with one name twice": lambda m: twice(pickle.dumps(Payload(m))),
    "zip bomb": lambda m: archive(zeros=bytes(10**7)),
    "npy that claims 4 TB": lambda m: npy("(1000000, 1000000)"),
    "npy of objects": lambda m: npy("(1,)").replace(b"<f4", b"|O8") + pickle.dumps(Payload(m)),
    "npz bomb": lambda m: archive(**{"a.npy": npy("(2500000,)", bytes(10**7))}),
    "hdf5": lambda m: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "another model": lambda m: safetensors.torch.save({k: v.clone() for k, v in MLP(3).state_dict().items()}),
    "script": lambda m: f"#!/bin/sh\ntouch {m}\n".encode(),
    "yaml": lambda m: f'!!python/object/apply:os.system ["touch {m}"]\n'.encode(),
    "one byte": lambda m: b"\x08",
    "a length alone": lambda m: struct.pack("<Q", 8),
    "a length too long by one": lambda m: header(b"{}")[:-1],
    "negative length": lambda m: struct.pack("<q", -1) + b"{}",
    "header of 16 TiB": lambda m: struct.pack("<Q", 2**44) + b"{}",
    "tensor of 4 TB": lambda m: header(b'{"a":' + entry("F32", "[1000000,1000000]", 0, 4 * 10**12) + b"}", bytes(8)),
    "overlapping tensors": lambda m: header(
        b'{"a":' + entry("F32", "[2]", 0, 8) + b',"b":' + entry("F32", "[2]", 4, 12) + b"}", bytes(12)
    ),
    "duplicate keys": lambda m: header(b'{"a":1,"a":2}'),
    "huge integers": lambda m: header(b'{"a":' + entry("F32", "[" + "9" * 4000 + "]", 0, 8) + b"}", bytes(8)),
    "1e400": lambda m: header(b'{"a":' + entry("F32", "[1e400]", 0, 8) + b"}", bytes(8)),
    "NaN": lambda m: header(b'{"a":' + entry("F32", "[NaN]", 0, 8) + b"}", bytes(8)),
    "deep lists": lambda m: header(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "deep objects": lambda m: header(b'{"a":' * 10**5 + b"0" + b"}" * 10**5),
    "invalid UTF-8": lambda m: header(b'{"\xff\xfe":1}'),
    "half a surrogate": lambda m: header(b'{"\\ud800":1}'),
    "format of a float": lambda m: header(b'{"__metadata__":{"pyrodiff_format":1.0}}'),
    "negative format": lambda m: header(b'{"__metadata__":{"pyrodiff_format":"-1"}}'),
    "a format in other digits": lambda m: header(b'{"__metadata__":{"pyrodiff_format":"\\uff12"}}'),
}


@pytest.mark.reliability("Q16", "F5", "F6", "F7")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_in_the_place_of_a_run(run, tmp_path, figure, name):
    """As model, as state and as every file beside them; nothing runs, and nothing else in the folder changes."""
    marker = tmp_path / "executed"
    content = HOSTILE[name](marker)
    for side in ("config.json", "metrics.jsonl", ".lock", "optimizer.pt", "model.pkl", "model.bin"):
        (run / side).write_bytes(content)
    load(run)  # which reads none of them
    for kind, use in (("model", load), ("resume", go_on), ("model", convert.load)):
        path = run / f"{kind}.safetensors"
        sound = path.read_bytes()
        path.write_bytes(content)
        before = contents(run)
        with pytest.raises(CheckpointError) as caught:
            use(run)
        assert one_line(caught.value, repr(str(path)), repr(str(run / f"{kind}.previous.safetensors")))
        assert contents(run) == before
        path.write_bytes(sound)
    figure("F6", "payloads executed", marker.exists(), at_most=0)
    figure.count("Q16", "foreign and hostile files refused", 1, at_least=50)


FIRST = "reverse_kernel.net.input.weight"
WRONG_RUNS = {
    "moments of another shape": (
        lambda t: t["optimizer"]["state"]["0"].update(exp_avg=torch.zeros(3)),
        "another shape",
    ),
    "moments that are a number": (lambda t: t["optimizer"]["state"]["0"].update(exp_avg_sq=0.5), "another shape"),
    "moments that are integers": (
        lambda t: t["optimizer"]["state"]["0"].update(exp_avg=t["optimizer"]["state"]["0"]["exp_avg"].long()),
        "another dtype",
    ),
    "moments that are NaN": (lambda t: t["optimizer"]["state"]["1"]["exp_avg"].fill_(math.nan), "not finite"),
    "moments of no parameter": (
        lambda t: t["optimizer"]["state"].update({"99": {"exp_avg": torch.zeros(2)}}),
        "unexpected",
    ),
    "half the moments": (lambda t: t["optimizer"]["state"]["0"].pop("exp_avg_sq"), "missing"),
    "no optimizer": (lambda t: t.pop("optimizer"), "no state that can be resumed"),
    "optimizer state is a list": (lambda t: t["optimizer"].update(state=[]), "no state that can be resumed"),
    "no rates": (lambda t: t["optimizer"].update(param_groups=[]), "no state that can be resumed"),
    "integer weights": (lambda t: t["weights"].update({FIRST: t["weights"][FIRST].long()}), "another dtype"),
    "NaN weights": (lambda t: t["weights"][FIRST].fill_(math.nan), "not finite"),
    "weights above float32": (
        lambda t: t["weights"].update({FIRST: torch.full_like(t["weights"][FIRST], 1e300, dtype=torch.float64)}),
        "not finite",
    ),
    "best weights of another shape": (lambda t: t["best_weights"].update({FIRST: torch.zeros(1)}), "another shape"),
    "best weights are missing one": (lambda t: t["best_weights"].pop(FIRST), "missing"),
    "average of another shape": (lambda t: t["ema"]["average"].__setitem__(0, torch.zeros(1)), "another shape"),
    "average is infinite": (lambda t: t["ema"]["average"][0].fill_(math.inf), "not finite"),
    "average cut short": (lambda t: t["ema"]["average"].pop(), "missing"),
    "no average": (lambda t: t.pop("ema"), "no state that can be resumed"),
    "sampler of another shape": (lambda t: t["sampler"].update(losses=torch.zeros(2, 2)), "another shape"),
    "sampler of integers": (lambda t: t["sampler"].update(losses=t["sampler"]["losses"].long()), "another dtype"),
    "no sampler": (lambda t: t.update(sampler=None), "missing"),
    "negative steps": (lambda t: t["result"].update(steps=-1), "counts"),
    "steps are a text": (lambda t: t["result"].update(steps="6"), "counts"),
    "more of the result": (lambda t: t["result"].update(code="x"), "no state that can be resumed"),
    "no result": (lambda t: t.pop("result"), "no state that can be resumed"),
    "best of two numbers": (lambda t: t["result"].update(best=[1.0, 2.0]), "no state that can be resumed"),
    "records are texts": (lambda t: t["result"].update(records=["x"]), "no state that can be resumed"),
    "a record holds a list": (lambda t: t["result"]["records"][0].update(step=[]), "numbers"),
    "running is short": (lambda t: t.update(running=[1.0]), "no state that can be resumed"),
    "options are a list": (lambda t: t.update(options=[]), "no state that can be resumed"),
    "options of another run": (lambda t: t["options"].update(seed=1), "seed=1, not 0"),
}


@pytest.mark.reliability("Q16", "F8")
@pytest.mark.parametrize("name", WRONG_RUNS)
def test_states_of_no_run_are_refused_before_anything_of_them_is_used(run, figure, name):
    """Well-formed files with a right digest and content that `fit` never wrote."""
    change, word = WRONG_RUNS[name]
    path = run / "resume.safetensors"
    tree = read(path, kind="resume")
    change(tree)
    write(path, tree, kind="resume")
    before, mine = contents(run), diffusion()
    initial = {key: value.clone() for key, value in mine.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        fit(mine, examples(), examples(8), folder=run, resume=True, **OPTIONS)
    assert one_line(caught.value, str(path), word)
    assert same(initial, dict(mine.state_dict())) and contents(run) == before
    figure.count("Q16", "foreign and hostile files refused", 1, at_least=50)


# ---------------------------------------------------------------- the one before


@pytest.mark.reliability("Q16", "F4", "F5")
def test_the_previous_good_file_is_named_kept_and_works(run, tmp_path, capsys, figure):
    """What the messages say is done as they say it, and leads to the same end as if nothing had happened."""
    expected = outcome(run)
    states = {name: (run / f"{name}.safetensors").read_bytes() for name in FILES}
    named = 0
    for name, use in (
        ("resume", lambda: refusal(CheckpointError, go_on, run)),
        ("model", lambda: command(capsys, "elbo", run)),
        ("model", lambda: command(capsys, "sample", run, "--out", tmp_path / "x.npy")),
        ("model", lambda: command(capsys, "info", run)),
    ):
        path, previous = run / f"{name}.safetensors", run / f"{name}.previous.safetensors"
        path.write_bytes(states[name][:-1])
        kept = previous.read_bytes()
        told = use()
        text = str(told if name == "resume" else told[1])
        assert name == "resume" or (told[0] == 2 and len(text.splitlines()) == 1)
        assert f"{str(previous)!r}, which it replaced, is sound: to go back to that, rename it to {path.name!r}" in text
        named += 1
        assert path.read_bytes() == states[name][:-1] and previous.read_bytes() == kept
        # Not on its own, and not where it is no better.
        previous.write_bytes(kept[:-1])
        with pytest.raises(CheckpointError) as caught:
            read(path, kind=name)
        assert one_line(caught.value) and previous.name not in str(caught.value)
        previous.write_bytes(kept)
        path.write_bytes(states[name])
    figure("Q16", "commands that name the previous good file", named, at_least=4)
    for name in FILES:
        path, previous = run / f"{name}.safetensors", run / f"{name}.previous.safetensors"
        path.write_bytes(b"")
        previous.rename(path)
    assert read(run / "resume.safetensors", kind="resume")["result"]["steps"] == 4
    assert command(capsys, "sample", run, "--n", 2, "--progress", "false", "--out", tmp_path / "x.npy")[0] == 0
    go_on(run)
    assert same(expected, outcome(run))


def test_the_replaced_file_stays_and_no_other(tmp_path):
    for i in range(4):
        write(tmp_path / "a.b", {"i": i}, kind="test")
    assert sorted(os.listdir(tmp_path)) == ["a.b", "a.previous.b"]
    assert [read(tmp_path / name, kind="test")["i"] for name in ("a.b", "a.previous.b")] == [3, 2]


def test_a_file_system_without_links_keeps_none(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(_files.os, "link", refuse)
    for i in range(2):
        write(tmp_path / "x", {"i": i}, kind="test")
    assert os.listdir(tmp_path) == ["x"] and read(tmp_path / "x", kind="test") == {"i": 1}


def test_a_link_is_replaced_and_its_target_is_left_alone(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    write(link, {"a": 1}, kind="test")
    assert target.read_text() == "mine" and read(link, kind="test") == {"a": 1}


# ---------------------------------------------------------------- disks


def no_space(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.slow
@pytest.mark.reliability("F3", "F9")
def test_a_disk_that_fills_at_any_save_stops_the_run_and_costs_nothing(tmp_path, monkeypatch, figure):
    """Each fsync and each rename of a run's validation and saves fails in turn."""
    before = tmp_path / "before"
    interrupted_at(before, 3)
    go_on(Path(shutil.copytree(before, tmp_path / "whole")))
    expected = outcome(tmp_path / "whole")

    def failing(n: int | None) -> int:
        """Go on in `place` until the n-th call fails; how many there were."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(before, place)
        calls = 0

        def counted(function):
            def call(*arguments):
                nonlocal calls
                calls += 1
                return (no_space if calls == n else function)(*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(_files.os, name, counted(getattr(os, name)))
            if n is None:
                go_on(place)
            else:
                with contextlib.suppress(SaveError):  # or it keeps no previous file, and goes on
                    go_on(place)
        return calls

    place = tmp_path / "place"
    total = failing(None)
    for n in range(1, total + 1):
        failing(n)
        assert not strays(place)
        for name in FILES:
            read(place / f"{name}.safetensors", kind=name)
        go_on(place)
        assert same(expected, outcome(place)), n
    figure("F3", "calls of a run that found the disk full", total, at_least=20)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(line, capture_output=True).returncode:
        pytest.skip("this user cannot mount a small tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.reliability("F3")
def test_a_full_disk(small_disk, capsys, monkeypatch, figure):
    """A real one. The command stops with exit code 1 and one line; what was saved is sound; with room again it goes on."""
    data = small_disk.parent / "vectors.npy"
    np.save(data, examples(60).numpy())
    options = {"net.width": 8, "schedule.steps": 5, "training.steps": 6, "training.batch_size": 8, "progress": "false"}
    options |= {"training.validate_every": 2, "scoring.samples": 2, "scoring.timesteps": 2, "scoring.sample_steps": 2}
    line = ["train", data, "--out", small_disk / "run"]
    line += [text for name, value in options.items() for text in (f"--{name}", value)]
    run, original = small_disk / "run", loop._Run.save

    def fill_then_save(self):
        if self.result.steps == 4:
            with contextlib.suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "save", fill_then_save)
        code, text = command(capsys, *line)
    figure("F3", "exit code of a run whose disk is full", code, at_least=1, at_most=1)
    message = text.splitlines()[-1]
    assert message.startswith("pyrodiff: cannot write") and "No space left on device (0 MB free there)" in message
    assert "Traceback" not in text and not strays(run)
    assert read(run / "resume.safetensors", kind="resume")["result"]["steps"] == 2
    load(run)
    (small_disk / "ballast").unlink()
    with monkeypatch.context() as patch:  # the report's pictures would not fit
        patch.setattr(cli, "report", lambda *_: [])
        assert command(capsys, *line, "--resume", "true")[0] == 0
    assert read(run / "resume.safetensors", kind="resume")["result"]["steps"] == 6


READ_ONLY = """
import os, torch
from pyrodiff.errors import OptionError, SaveError
from pyrodiff.training.checkpoint import load, lock, read, save, write
import test_checkpoint

if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for attempt in (
    lambda: write("x", {"a": 2}, kind="test"),
    lambda: save(".", test_checkpoint.make_mlp()),
    lambda: save("new", test_checkpoint.make_mlp()),
    lambda: lock(".").__enter__(),
    lambda: lock("new").__enter__(),
):
    try:
        attempt()
        print("written")
    except (OptionError, SaveError) as error:
        assert "\\n" not in str(error)
        print(error)
assert read("x", kind="test") == {"a": 1}
"""


@pytest.mark.reliability("F3")
@pytest.mark.skipif(os.name == "nt", reason="folders are not read-only there")
def test_read_only_folder_as_any_user(tmp_path, figure):
    write(tmp_path / "x", {"a": 1}, kind="test")
    (tmp_path / "x").chmod(0o644)
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    try:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        line = [sys.executable, "-c", READ_ONLY]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        tmp_path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    refusals = done.stdout.splitlines()
    assert all("Permission denied" in line for line in refusals)
    figure("F3", "writes to a read-only folder refused in one line", len(refusals), at_least=5, at_most=5)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- two at a time


@pytest.mark.reliability("F26")
@pytest.mark.skipif(_files.fcntl is None, reason="there are no advisory locks")
def test_a_second_run_is_told_who_holds_the_folder(run, tmp_path, capsys, figure):
    np.save(tmp_path / "x.npy", examples().numpy())
    fresh = tmp_path / "fresh"
    refused = 0
    with lock(run), lock(fresh):
        before = contents(run)
        for error in (
            refusal(OptionError, go_on, run),
            refusal(OptionError, go_on, fresh, False),
        ):
            refused += one_line(error, f"in use by another run (process {os.getpid()} on ")
        code, text = command(capsys, "train", tmp_path / "x.npy", "--out", fresh, "--training.batch_size", 8)
        refused += code == 2 and f"(process {os.getpid()} on " in text and len(text.splitlines()) == 1
        assert contents(run) == before and contents(fresh) == {}
    figure("F26", "second runs refused, the first one named", refused, at_least=3)
    assert (run / ".lock").read_bytes() == b""
    (run / ".lock").write_text("process 4242 on a machine that crashed")  # nobody holds it
    go_on(run)
    for content in (b"\x1b[2J", b"\xff" * 10**6, b""):  # not of this library
        with lock(run):
            (run / ".lock").write_bytes(content)
            error = refusal(OptionError, go_on, run)
            assert one_line(error, "in use") and str(error).isprintable() and len(str(error)) < 500


@pytest.mark.reliability("F26")
@pytest.mark.skipif(not hasattr(os, "fork") or _files.fcntl is None, reason="there are no forks or no locks")
def test_a_fork_neither_holds_the_lock_nor_frees_it(tmp_path):
    release, hold = os.pipe()
    with lock(tmp_path):
        child = os.fork()
        if not child:
            code = 1
            try:
                os.close(hold)
                with contextlib.suppress(OptionError), lock(tmp_path):
                    os._exit(2)  # it could take it
                code = 0
                os.read(release, 1)
            finally:
                os._exit(code)
        holder = os.fork()
        if not holder:  # leaves the block as its parent will
            os._exit(0)
        os.waitpid(holder, 0)
        with pytest.raises(OptionError, match=f"process {os.getpid()}"), lock(tmp_path):
            pass
    with lock(tmp_path):  # although the child lives
        pass
    os.close(hold)
    os.close(release)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_may_leave_the_block(tmp_path):
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(tmp_path))
        child = os.fork()
        if not child:
            try:
                stack.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()}")


@pytest.mark.reliability("F26")
def test_where_locks_do_not_work_nothing_is_refused(tmp_path, monkeypatch):
    if _files.fcntl is None:
        pytest.skip("there are no advisory locks")

    def unsupported(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(_files.fcntl, "flock", unsupported)
    with lock(tmp_path), lock(tmp_path):
        write(tmp_path / "x", {"a": 1}, kind="test")
    assert read(tmp_path / "x", kind="test") == {"a": 1}


WRITERS = """
import os, sys
from pyrodiff.training.checkpoint import read, write
children = []
for name in "abcd":
    children.append(os.fork())
    if not children[-1]:
        try:
            for i in range(150):
                write(name, {"i": i}, kind="test")
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(1)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


@pytest.mark.slow
@pytest.mark.reliability("F26")
@pytest.mark.skipif(not hasattr(os, "fork") or _files.fcntl is None, reason="there are no forks or no locks")
def test_writers_in_one_folder_do_not_take_each_others_files_for_strays(tmp_path, figure):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, "-c", WRITERS]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    figure("F26", "failed writers of four in one folder", done.returncode, at_most=0)
    assert all(read(tmp_path / name, kind="test") == {"i": 149} for name in "abcd") and not strays(tmp_path)


def test_a_temporary_file_that_was_taken_for_a_stray_is_made_again(tmp_path, monkeypatch):
    """Another process removes it between its creation and its lock, or is about to."""
    attempts = []

    def robbed(file):
        attempts.append(file.name)
        if len(attempts) == 1:
            os.unlink(file.name)
        return len(attempts) != 2

    monkeypatch.setattr(_files, "_locked", robbed)
    write(tmp_path / "x", {"a": 1}, kind="test")
    assert len(attempts) == 3 and os.listdir(tmp_path) == ["x"] and read(tmp_path / "x", kind="test") == {"a": 1}


# ---------------------------------------------------------------- versions


# The numbers of the day the files were written.
MEANS = [0.5447363, -0.8343517, 43.9711761, 27.1317978]
WEIGHTS = [-0.5000317, -0.3570663, -0.2143022, -0.0713505, 0.0714262, 0.2143606, 0.3571714, 0.5000573]
RELEASED = Path(__file__).parent / "data" / "checkpoint_format_1"


def released_run(folder: Path, **options) -> GaussianDiffusion:
    """What made the files of format 1, with steps=6 and a stop at 4."""
    net = MLP(2, width=4, depth=1)
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter) * (1 - 2 * (i % 2)))
    trained = GaussianDiffusion(net, CosineSchedule(5), (2,), decoder="learned")
    x = torch.linspace(-1, 1, 32).view(16, 2)
    given = {
        "batch_size": 8,
        "steps": 6,
        "validate_every": 2,
        "timesteps": "importance",
        "progress": False,
        "device": "cpu",
    }
    fit(trained, x, x[:4], folder=folder, **{**given, **options})
    return trained


@pytest.mark.reliability("F12")
@pytest.mark.parametrize("name", FILES)
def test_files_of_format_1_are_read_to_the_bit(tmp_path, figure, name):
    path = RELEASED / f"{name}.safetensors"
    write(tmp_path / "again", read(path, kind=name), kind=name)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    figure.count("F12", "files of released formats read", 1, at_least=2)


@pytest.mark.reliability("F12")
def test_a_model_of_format_1_still_computes_what_it_did(figure):
    """The numbers are those of the day it was written; the tolerance is float32's for sums of some ten terms."""
    loaded = load(RELEASED)
    with torch.no_grad():
        law = loaded.reverse_kernel(torch.tensor([[0.5, -1.0], [2.0, 0.25]]), torch.tensor([2, 5]))
    error = (law.mean.flatten() - torch.tensor(MEANS)).abs().max()
    figure("F12", "error of a model of format 1", error, at_most=1e-5)


@pytest.mark.reliability("F12")
def test_a_run_of_format_1_can_be_resumed(tmp_path, figure):
    shutil.copytree(RELEASED, tmp_path / "run")
    trained = released_run(tmp_path / "run", resume=True)
    weights = trained.net.input.weight.detach().flatten()
    error = (weights - torch.tensor(WEIGHTS)).abs().max()
    figure("F12", "error of a resumed run of format 1", error, at_most=1e-4)


@pytest.mark.reliability("F12")
@pytest.mark.parametrize(("version", "age"), [("2", "a newer"), ("99", "a newer"), ("0", "an older"), (None, None)])
def test_other_formats_are_refused_naming_both(tmp_path, figure, version, age):
    """Although the digest is right. A file without a format is no checkpoint of this library."""
    path = tmp_path / "model.safetensors"
    craft(path, {"a": 1}, metadata={"pyrodiff_format": version} if version else {})
    if version is None:
        content = path.read_bytes().replace(b'"pyrodiff_format":"1"', b'"pyrodiff_letter":"1"')
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    words = ["of another program"] if version is None else [f"format {version} was written by {age}", "reads format 1"]
    assert one_line(caught.value, *words)
    figure.count("F12", "other formats refused", 1, at_least=4)


# ---------------------------------------------------------------- no change


@pytest.mark.reliability("F11")
def test_loading_and_saving_without_a_step_gives_the_same_bytes(finished, tmp_path, monkeypatch, figure):
    """Of a model, of a state alone, and of a run that is resumed and saved where it is."""
    changed = 0
    save(tmp_path / "model", load(finished))
    for name in ("model.safetensors", "config.json"):
        changed += (tmp_path / "model" / name).read_bytes() != (finished / name).read_bytes()
    run, restore = Path(shutil.copytree(finished, tmp_path / "run")), loop._Run.restore

    def restore_and_save(self):
        restore(self)
        self.save()

    monkeypatch.setattr(loop._Run, "restore", restore_and_save)
    go_on(run)
    for name in ("model.safetensors", "resume.safetensors", "metrics.jsonl", "config.json"):
        changed += (run / name).read_bytes() != (finished / name).read_bytes()
    figure("F11", "files of six changed by loading and saving", changed, at_most=0)
