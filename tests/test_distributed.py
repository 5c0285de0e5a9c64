"""Two processes (gloo, on this machine) under torchrun: the gradient, the noise, the files, the way out."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pyrodiff import CosineSchedule, GaussianDiffusion, fit
from pyrodiff.nets import MLP
from pyrodiff.training import checkpoint

pytest.importorskip("lightning_fabric")
loop = importlib.import_module("pyrodiff.training.fit")

OPTIONS = {
    "steps": 6,
    "batch_size": 8,
    "progress": False,
    "device": "cpu",
    "lr": 1e-2,
    "warmup": 3,
    "validate_every": 2,
}


def make(objective: str = "elbo", data_size: int | None = None) -> GaussianDiffusion:
    torch.manual_seed(7)
    net = MLP(3, width=8, depth=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return GaussianDiffusion(net, CosineSchedule(12), (3,), decoder="learned", objective=objective, data_size=data_size)


def examples(n: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(size=(n, 3)).astype(np.float32)) * 0.5


HEAD = f"""
import os, sys, signal
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import test_distributed as t
rank, out = int(os.environ["RANK"]), sys.argv[1]
seen, gradients = [], []
clip = torch.nn.utils.clip_grad_norm_
def spy(parameters, norm):
    parameters = list(parameters)
    gradients.append(torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters]))
    return clip(parameters, norm)
torch.nn.utils.clip_grad_norm_ = spy
"""
# Everything of interest in one launch, which takes seconds: a run per question.
MAIN = """
def run(name, objective="elbo", n=40, data_size=None, **options):
    diffusion = t.make(objective, data_size)
    if rank and name == "plain":
        with torch.no_grad():
            diffusion.net.input.weight.add_(1.0)  # ranks that disagree at the start follow rank 0
    seen.clear(), gradients.clear()
    hook = diffusion.net.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    if name == "cut":
        hook2 = diffusion.net.register_forward_hook(
            lambda m, a, o: signal.raise_signal(signal.SIGINT) if rank == 1 and m.training and len(gradients) == 2 else None)
    if name == "nan":
        hook2 = diffusion.net.register_forward_hook(
            lambda m, a, o: o * float("nan") if rank == 1 and m.training and len(gradients) == 3 else None)
    given = dict(folder=f"{out}/{name}", **{**t.OPTIONS, **options})
    result = t.fit(diffusion, t.examples(n), t.examples(9), **given)
    hook.remove()
    if name == "cut":
        assert result.interrupted and result.steps == 3, result.steps
        hook2.remove()
        diffusion = t.make(objective)
        result = t.fit(diffusion, t.examples(), t.examples(9), resume=True, **given)
    state = {k: v.clone() for k, v in diffusion.state_dict().items()}
    tree = {"state": state, "seen": list(seen), "gradients": list(gradients), "skipped": result.skipped, "steps": result.steps}
    t.checkpoint.write(f"{out}/{name}.{rank}", tree, kind="test")

run("plain")
run("accumulate", accumulate=2)
run("uneven", n=41)
run("plate", data_size=1000)
run("importance", timesteps="importance")
run("whole", timesteps="uniform")
run("cut", timesteps="uniform")
run("nan")
run("simple", objective="simple")
"""


def launch(script: Path, *args: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, args)], env=environment, **pipes, **options)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    script = folder / "script.py"
    script.write_text(HEAD + MAIN, encoding="utf-8")
    process = launch(script, folder)
    try:
        _, err = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return folder


def both(out: Path, name: str) -> list[dict]:
    return [checkpoint.read(out / f"{name}.{rank}", kind="test") for rank in (0, 1)]


@pytest.mark.reliability("Q20")
@pytest.mark.parametrize(
    ("name", "accumulate", "n", "data_size"),
    # 41 examples do not divide by processes or batches, which do; a plate of 1000 counts the batch, not a process's share
    [("plain", 1, 40, None), ("accumulate", 2, 40, None), ("uneven", 1, 41, None), ("plate", 1, 40, 1000)],
)
def test_the_gradient_is_that_of_one_process_with_the_same_noise(
    out: Path, name: str, accumulate: int, n: int, data_size: int | None, monkeypatch, figure
):
    # One process computes what each rank does, with that rank's examples and seed, and averages.
    share = 8 // (2 * accumulate)
    indices = loop._Order(0, n, 8).batch(0).reshape(accumulate, 2, share)
    total = None
    for rank in (0, 1):
        diffusion, found = make(data_size=data_size), []
        monkeypatch.setattr(
            nn.utils, "clip_grad_norm_", lambda p, c, f=found: (f.extend(x.grad for x in p), torch.ones(()))[1]
        )
        monkeypatch.setattr(loop._Order, "batch", lambda self, step, r=rank: indices[:, r].reshape(-1))
        monkeypatch.setattr(
            loop, "seed_everything", lambda device, *n, r=rank: seed(device, *((n[0], r, n[2]) if len(n) == 3 else n))
        )
        fit(diffusion, examples(n), **{**OPTIONS, "steps": 1, "batch_size": 4, "accumulate": accumulate})
        monkeypatch.undo()
        gradient = torch.cat([g.flatten() for g in found]) / 2
        total = gradient if total is None else total + gradient
    for result in both(out, name):
        error = ((result["gradients"][0] - total).norm() / total.norm()).item()
        figure("Q20", "gradient of two processes, relative error", error, at_most=1e-6)


seed = loop.seed_everything


@pytest.mark.reliability("Q20")
@pytest.mark.parametrize("name", ["plain", "accumulate", "importance", "cut", "nan", "simple"])
def test_all_ranks_end_with_the_same_weights_and_gradients(out: Path, name: str):
    first, second = both(out, name)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    assert len(first["gradients"]) == len(second["gradients"]) == 6
    for a, b in zip(first["gradients"], second["gradients"], strict=True):
        assert torch.equal(a, b) or a.isnan().any()
    assert first["steps"] == second["steps"] == 6


def test_ranks_have_noise_and_examples_of_their_own(out: Path):
    first, second = both(out, "plain")
    training = [x for x in first["seen"] if len(x) == 4][:1], second["seen"][:1]
    assert not any(torch.equal(a, b) for a, b in zip(*training, strict=True))
    # the noise itself, apart from the examples: what each rank's generator gives at step 0
    draws = []
    with torch.random.fork_rng(devices=[]):
        for rank in (0, 1):
            loop.seed_everything(torch.device("cpu"), 0, rank, 0)
            draws.append(torch.randn(100))
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1]) < 0.5


@pytest.mark.reliability("F24")
def test_rank_zero_alone_writes_and_the_weights_are_the_saved_ones(out: Path):
    names = {path.name for path in (out / "plain").iterdir()}
    names -= {"model.previous.safetensors"}  # there only if a validation bettered another
    kept = {"model.safetensors", "resume.safetensors", "resume.previous.safetensors"}
    assert names == kept | {".lock", "config.json", "metrics.jsonl"}
    records = [json.loads(line) for line in (out / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    saved = checkpoint.read(out / "plain" / "model.safetensors", kind="model")["state"]
    for result in both(out, "plain"):
        for key, value in saved.items():
            assert torch.equal(value, result["state"][key])


@pytest.mark.reliability("Q15", "F10", "F22")
def test_ctrl_c_on_one_rank_stops_all_and_resuming_continues_bit_for_bit(out: Path):
    trees = [checkpoint.read(out / name / "resume.safetensors", kind="resume") for name in ("whole", "cut")]
    for tree in trees:
        for record in tree["result"]["records"]:
            record.pop("seconds")
    assert trees[0]["result"] == trees[1]["result"]
    for part in ("weights", "best_weights"):
        for key, value in trees[0][part].items():
            assert torch.equal(value, trees[1][part][key]), key
    for a, b in zip(trees[0]["ema"]["average"], trees[1]["ema"]["average"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.reliability("Q19", "F14")
def test_a_non_finite_number_on_one_rank_is_skipped_by_all(out: Path):
    assert [result["skipped"] for result in both(out, "nan")] == [1, 1]
    for result in both(out, "nan"):
        assert all(value.isfinite().all() for value in result["state"].values())


def test_importance_histories_are_of_all_ranks(out: Path):
    sampler = checkpoint.read(out / "importance" / "resume.safetensors", kind="resume")["sampler"]
    assert int(sampler["seen"].sum()) == 6 * 8


@pytest.mark.reliability("F24")
def test_a_dead_rank_does_not_leave_the_others_waiting(tmp_path: Path):
    script = tmp_path / "script.py"
    die = "t.loop._Run.step = lambda self, *a: os.kill(os.getpid(), 9) if rank and self.result.steps == 2 else step(self, *a)\n"
    fit_ = "t.fit(t.make(), t.examples(), folder=out, **t.OPTIONS)\n"
    script.write_text(HEAD + "step = t.loop._Run.step\n" + die + fit_, encoding="utf-8")
    process = launch(script, tmp_path / "run", start_new_session=True)
    started = time.monotonic()
    try:
        process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and time.monotonic() - started < 100
    assert checkpoint.read(tmp_path / "run" / "resume.safetensors", kind="resume")["result"]["steps"] == 2
