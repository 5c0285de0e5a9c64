"""Resumed training against uninterrupted training, by the SHA-256 of everything there is, each run in a process of its own.

`fit` takes tensors, in memory or memory-mapped, and gathers each batch itself: there are no data workers, whose number could
matter, and no iterator whose position would have to be saved. What varies here is where the rows lie, and how many processes
share the batch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks
from test_fit import Dropout, examples, make

from pyrodiff import fit
from pyrodiff.training import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")

# 40 examples: an epoch is 5 steps. Every step is 2 calls of the network, one for each part of its batch.
OPTIONS = {
    "steps": 10, "batch_size": 8, "accumulate": 2, "lr": 1e-2, "warmup": 3, "ema_decay": 0.8, "timesteps": "importance",
    "validate_every": 3, "progress": False, "device": "cpu",
}  # fmt: skip
# In the middle of an accumulation (odd: its first part), of an epoch, at its end (9, 10), at a validation (5), in the first step.
CUTS = (1, 4, 5, 9, 10, 12, 15)


def sha(value: object) -> str:
    """Of a tree of tensors and JSON values: types, shapes, and every bit."""
    found = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value):
            if key != "seconds":  # wall time, the only thing that may differ
                found.update(f"{key}:{sha(value[key])}".encode())
    elif isinstance(value, list | tuple):
        found.update("".join(map(sha, value)).encode())
    else:
        found.update(repr(value).encode())
    return found.hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Everything that a run leaves, part by part."""
    tree = checkpoint.read(folder / "resume.safetensors", kind="resume")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {name: sha(part) for name, part in {**tree, "log": log}.items()}
    found["model"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for path in folder.parent.glob(f"{folder.name}.seen.*"):  # what the network was shown: data, timesteps, noise
        found[path.suffix] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def train(folder: str, cut: int = 0, resume: bool = False, mapped: bool = False) -> None:
    """In a process of its own: train, with Ctrl-C in the network's call number ``cut`` on the last rank."""
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    diffusion, data, seen = make(Dropout), examples(), []
    if mapped:
        np.save(f"{folder}.{resume}.npy", data.numpy())
        data = torch.from_numpy(np.load(f"{folder}.{resume}.npy", mmap_mode="c"))

    def look(module, args, output):
        if module.training:
            seen.append(sha(args))
            if len(seen) == cut and rank == ranks - 1:
                signal.raise_signal(signal.SIGINT)

    diffusion.net.register_forward_hook(look)
    result = fit(diffusion, data, examples(12), folder=folder, resume=resume, **OPTIONS)
    # the step is finished, with both its parts
    assert (bool(result.interrupted), result.steps) == ((True, (cut + 1) // 2) if cut else (False, 10)), result
    with open(f"{folder}.seen.{rank}", "a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in seen)


def warm() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fit(make(Dropout), examples(), examples(12), folder=folder, **(OPTIONS | {"steps": 2}))


@pytest.fixture(scope="module")
def forks():
    found = Forks("test_resume")
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.reliability("Q15", "F10")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "memory-mapped"])
def test_every_hash_after_a_resume_in_another_process(forks: Forks, tmp_path: Path, ranks: int, mapped: bool, figure):
    if ranks > 1:
        pytest.importorskip("lightning_fabric")

    def run(name: str, **options: object) -> None:
        code, log = f"t.train({str(tmp_path / name)!r}, **{options!r})", tmp_path / f"{name}.log"
        codes = forks.pair(code, log) if ranks > 1 else [forks.run(code, log)]
        assert not any(codes), "".join(path.read_text() for path in tmp_path.glob(f"{name}.*") if path.stem == name)

    run("whole")
    expected = hashes(tmp_path / "whole")
    assert len(expected) == 11 + ranks
    cuts = CUTS if not mapped else CUTS[1::3]
    differing = []
    for cut in cuts:
        run(f"cut{cut}", cut=cut, mapped=mapped)
        run(f"cut{cut}", resume=True, mapped=mapped)
        found = hashes(tmp_path / f"cut{cut}")
        differing += [(cut, part) for part in expected.keys() | found.keys() if expected.get(part) != found.get(part)]
    assert not differing
    figure("Q15", "hashes that differ", len(differing), at_most=0)
    figure("Q15", "hashes per run", len(expected), at_least=12)
    if not mapped:
        figure("Q15", f"cut points, {ranks} process{'es' * (ranks > 1)}, each half in a new one", len(cuts), at_least=6)


@pytest.mark.reliability("F10")
def test_the_hashes_see_a_single_bit(tmp_path: Path):
    tree = {"a": torch.zeros(3), "b": [1, {"c": 0.1}]}
    other = {"a": torch.zeros(3), "b": [1, {"c": 0.1}]}
    assert sha(tree) == sha(other) and sha({**tree, "seconds": 1.0}) == sha({**other, "seconds": 2.0})
    other["a"].view(torch.int32)[1] = 1
    assert sha(tree) != sha(other)
    assert (
        len(
            {
                sha(x)
                for x in (torch.zeros(2), torch.zeros(1, 2), torch.zeros(2).double(), [0.0, 0.0], 0.1, 0.1 + 2e-17 * 2)
            }
        )
        == 6
    )


@pytest.mark.reliability("F10", "F30")
def test_there_are_no_data_workers_and_no_scale_of_the_loss():
    """Options that do not exist need no row in the table of resumes: should one come, this test asks for it."""
    names = " ".join(inspect.signature(fit).parameters)
    assert not any(word in names for word in ("worker", "loader", "scale", "fp16", "half"))
