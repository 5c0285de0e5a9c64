"""Faults of training, scoring and sampling: no memory, no number, no peer, no terminal; and signals at any moment."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from forks import Forks, as_rank
from test_cli import ENVIRONMENT, flags
from test_fit import SMALL, Dropout, examples, make, on_call, same, weights
from test_resume import sha
from test_sample import exact, unet
from torch import nn

import pyrodiff
from pyrodiff import CosineSchedule, GaussianDiffusion, NoisyClassifier, _files, cli, fit
from pyrodiff._tensor import in_parts, is_out_of_memory
from pyrodiff.errors import CheckpointError, OptionError, OutOfMemoryError, ProcessError, PyrodiffError
from pyrodiff.nets import MLP, Classifier
from pyrodiff.sample import invert
from pyrodiff.training import checkpoint

loop = importlib.import_module("pyrodiff.training.fit")
engines = importlib.import_module("pyrodiff.training._engine")
MOMENTS = 50  # at which a signal comes

# How torch, its allocators and libraries, and Python say it.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has\na total capacity of ..."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@contextmanager
def memory_for(rows: int, net: nn.Module, error: BaseException = OUT_OF_MEMORY[0]):
    """A network that has memory for so many examples; yields the numbers that it was called with."""
    calls: list[int] = []

    def hook(module, args):
        calls.append(len(args[0]))
        if len(args[0]) > rows:
            raise error

    handle = net.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


# ---------------------------------------------------------------------- out of memory: scoring and sampling


@pytest.mark.reliability("F23")
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_rows_are_computed_in_halves_until_they_fit(error: BaseException, figure):
    for n, limit in ((1, 1), (7, 3), (64, 5), (64, 64), (65, 64), (10, 1), (0, 3)):
        sizes = []

        def function(rows: slice, n: int = n, limit: int = limit, sizes: list[int] = sizes) -> torch.Tensor:
            if rows.stop - rows.start > limit:
                raise error
            sizes.append(rows.stop - rows.start)
            return torch.arange(n)[rows]

        found, rows = in_parts(function, n)
        assert torch.equal(found, torch.arange(n)) and sum(sizes) == n and (n <= limit or rows <= limit)
        assert torch.equal(in_parts(function, n, rows)[0], found)  # and the next call begins where this one ended
        figure("F23", "rows lost or doubled", abs(sum(sizes) - 2 * n), at_most=0)

    def never(rows: slice) -> torch.Tensor:
        raise error

    with pytest.raises(OutOfMemoryError, match="one example at a time") as caught:
        in_parts(never, 100)
    assert "\n" not in str(caught.value)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("shape mismatch"))


def test_other_errors_pass(monkeypatch):
    calls = []

    def broken(rows: slice) -> torch.Tensor:
        calls.append(rows)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        in_parts(broken, 8)
    assert len(calls) == 1


def scores() -> dict[str, Callable[[GaussianDiffusion], torch.Tensor]]:
    """Each is given the same noise twice; what it returns has the examples' own numbers."""
    x0 = (torch.from_numpy(np.random.default_rng(1).integers(0, 17, (12, 1, 8, 8))) / 8 - 1).float()
    y = torch.arange(12) % 3

    def likelihood(method: str, **options) -> Callable[[GaussianDiffusion], torch.Tensor]:
        return lambda d: pyrodiff.log_likelihood(d, x0[:6], method, repeats=2, seed=0, y=y[:6], **options).draws

    return {
        "sample": lambda d: pyrodiff.sample(d, 12, seed=3, y=y),
        "dpm++2m": lambda d: pyrodiff.sample(d, 12, "dpm++2m", eta=0.5, seed=3, y=y),
        "trajectory": lambda d: pyrodiff.trajectory(d, 12, seed=3, y=torch.tensor(1)),
        "invert": lambda d: invert(d, x0, y=y),
        "elbo": lambda d: pyrodiff.elbo_terms(d, x0, repeats=2, y=y).parts()["total"],
        "elbo, drawn t": lambda d: pyrodiff.elbo_terms(d, x0, 3, repeats=2, y=y).parts()["total"],
        "log p, elbo": likelihood("elbo"),
        "log p, iwae": likelihood("iwae", chains=2),
        "log p, ode": likelihood("ode", probes=1, solver_steps=2),
        "log p, immse": likelihood("immse", points=2, pilot=1),
    }  # fmt: skip


@pytest.mark.reliability("F23", "Q21")
@pytest.mark.parametrize("name", scores())
def test_scores_and_samples_without_memory_are_those_with_it(name: str, figure):
    def compute(limit: int) -> torch.Tensor:
        torch.manual_seed(5)
        diffusion, function = unet(), scores()[name]
        torch.manual_seed(6)
        with memory_for(limit, diffusion.net) as calls:
            found = function(diffusion)
        assert min(calls) <= limit < max(calls) or limit >= 100
        assert sum(size > limit for size in calls) <= 7 or "ode" in name  # halvings, and not at every step
        return found

    whole, halved = compute(100), compute(1)
    # One call of the network for 12 images, or 12: float32 rounding, of sums (nats) relative to their size.
    error = ((halved - whole).abs() / whole.abs().clamp(min=1)).max().item()
    figure("F23", "values after halving, relative error", error, at_most=1e-5)


@pytest.mark.reliability("F23", "Q21")
def test_noise_is_bit_equal_whenever_memory_runs_out(figure):
    diffusion, x0 = exact(6), torch.rand(16, 2)  # an elementwise network: its rows are the same bits in any call
    diffusion.net.eval()

    def compute() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        terms = pyrodiff.elbo_terms(diffusion, x0, batch_size=8).parts()["total"]
        return pyrodiff.sample(diffusion, 16, seed=1, last="sample"), terms

    expected, different = compute(), 0
    for k in range(1, 19):  # 6 calls for samples and 2 x 6 for terms
        calls = [0]

        def hook(module, args, calls=calls, k=k):
            calls[0] += 1
            if calls[0] == k:
                raise OUT_OF_MEMORY[0]

        handle = diffusion.net.register_forward_pre_hook(hook)
        try:
            found = compute()
        finally:
            handle.remove()
            diffusion.reverse_kernel.rows = float("inf")
        assert calls[0] > 18
        different += sum(not torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    figure("F23", "results of other noise, memory out at call k", different, at_most=0)


@pytest.mark.reliability("F23")
def test_one_example_too_big_is_one_line():
    diffusion = unet(3)
    y = torch.zeros(4, dtype=torch.int64)
    with memory_for(0, diffusion.net) as calls:
        for function in (
            lambda: pyrodiff.sample(diffusion, 4, y=y),
            lambda: pyrodiff.elbo_terms(diffusion, torch.zeros(4, 1, 8, 8), y=y),
            lambda: pyrodiff.log_likelihood(diffusion, torch.zeros(4, 1, 8, 8), "ode", probes=1, solver_steps=1, y=y),
        ):
            with pytest.raises(OutOfMemoryError, match="one example at a time") as caught:
                function()
            assert "\n" not in str(caught.value) and str(caught.value).count("one example") == 1
    assert min(calls) == 1


@pytest.mark.reliability("F23")
def test_a_classifier_is_scored_in_halves():
    torch.manual_seed(0)
    net = Classifier(1, classes=3, width=8, multipliers=(1, 2), blocks=1)
    classifier = NoisyClassifier(net, CosineSchedule(6), (1, 8, 8))
    x, y = torch.rand(9, 1, 8, 8), torch.arange(9) % 3
    found = []
    for limit in (100, 2):
        torch.manual_seed(1)
        with memory_for(limit, net):
            found.append(classifier.score(x, y))
    assert found[0][1] == found[1][1] and found[0][0].mean == pytest.approx(found[1][0].mean, rel=1e-5)


@pytest.mark.reliability("F23")
def test_the_commands_halve_too(tmp_path: Path, capsys, monkeypatch):
    data = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", data)
    fit(make(), torch.from_numpy(data), folder=tmp_path / "run", **SMALL)
    forward, texts, arrays = MLP.forward, [], []
    for limit in (100, 3, 0):

        def limited(self, x, *args, limit=limit, **cond):
            if len(x) > limit:
                raise OUT_OF_MEMORY[0]
            return forward(self, x, *args, **cond)

        monkeypatch.setattr(MLP, "forward", limited)
        codes = []
        for argv in (
            ["elbo", tmp_path / "run", "--data", tmp_path / "x.npy", "--timesteps", "3"],
            ["sample", tmp_path / "run", "--n", "12", "--out", tmp_path / "s.npy"],
        ):
            with pytest.raises(SystemExit) as caught:
                cli.main([str(a) for a in argv])
            codes.append(caught.value.code)
        out, err = capsys.readouterr()
        if limit:
            assert codes == [0, 0] and err == ""
            texts.append(out), arrays.append(np.load(tmp_path / "s.npy"))
        else:
            lines = err.splitlines()
            assert codes == [1, 1] and len(lines) == 2 and all("out of memory, with one example" in x for x in lines)
    assert texts[0] == texts[1]
    np.testing.assert_allclose(arrays[0], arrays[1], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- out of memory: training


@pytest.mark.reliability("F23")
@pytest.mark.parametrize("call", [1, 2, 7, 12])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_without_memory_stops_with_advice(tmp_path: Path, call: int, where: str, figure):
    diffusion, sizes, states = make(), [], []

    def look(module, args, output):
        if module.training:
            sizes.append(len(output))
            states.append(weights(diffusion))
            if len(sizes) == call:
                if where == "forward":
                    raise OUT_OF_MEMORY[0]
                output.register_hook(lambda gradient: (_ for _ in ()).throw(OUT_OF_MEMORY[1]))
        return None

    handle = diffusion.net.register_forward_hook(look)
    options = {**SMALL, "accumulate": 2, "validate_every": 2}
    with pytest.raises(
        OutOfMemoryError, match=r"batch_size=8 in accumulate=2 part.*raise accumulate.*lower batch_size"
    ) as caught:
        fit(diffusion, examples(), folder=tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    handle.remove()
    figure("F23", "training calls of another batch than asked for", sum(size != 4 for size in sizes), at_most=0)
    same(states[(call - 1) // 2 * 2], weights(diffusion))  # as the last whole step left them
    done = (call - 1) // 2  # steps
    if done < 2:
        assert not (tmp_path / "run" / "resume.safetensors").exists()
        return
    assert checkpoint.read(tmp_path / "run" / "resume.safetensors", kind="resume")["result"]["steps"] == done // 2 * 2
    fit(make(), examples(), folder=tmp_path / "run", resume=True, **options)
    fit(make(), examples(), folder=tmp_path / "whole", **options)
    same(weights(pyrodiff.load(tmp_path / "run")), weights(pyrodiff.load(tmp_path / "whole")))


@pytest.mark.reliability("F23")
def test_validation_without_memory_is_halved_and_training_is_not():
    found = []
    for limit in (100, 4):
        diffusion = make()
        with memory_for(limit, diffusion.net) as calls:
            found.append(fit(diffusion, examples(), examples(12), **{**SMALL, "batch_size": 4}).records)
        assert limit == 100 or ({4} <= set(calls) and max(calls) > 4)
    for a, b in zip(*found, strict=True):
        assert a["validation_bits_per_dim"] == pytest.approx(b["validation_bits_per_dim"], rel=1e-5)
        assert a["train_loss_nats_per_dim"] == b["train_loss_nats_per_dim"]


# ---------------------------------------------------------------------- numbers that are not finite


class Normalised(nn.Module):
    """A network with running means, which the forward pass itself moves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(3), MLP(3, width=8, depth=1)

    def forward(self, x, log_snr):
        return self.inner(self.norm(x), log_snr)


@pytest.mark.reliability("Q19", "F14")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_batch_leaves_no_trace_in_buffers_either(monkeypatch, accumulate: int, figure):
    diffusion, step, states = make(Normalised), loop._Run.step, []

    def spy(self, *args):
        step(self, *args)
        states.append(state(self))

    monkeypatch.setattr(loop._Run, "step", spy)
    calls = [0]

    def poison(module, args):
        calls[0] += module.training
        return (args[0] * float("nan"), *args[1:]) if module.training and calls[0] == 3 * accumulate else None

    diffusion.net.register_forward_pre_hook(poison)
    result = fit(diffusion, examples(), **SMALL, accumulate=accumulate)
    assert result.skipped == 1 and len(set(states)) == 9
    figure("Q19", "states that a bad step changed", states[2] != states[1], at_most=0)
    assert all(value.isfinite().all() for value in diffusion.state_dict().values())


@pytest.mark.reliability("Q19", "F14")
def test_divergence_of_the_command_exits_1_in_one_line_with_a_sound_checkpoint(
    tmp_path: Path, capsys, monkeypatch, figure
):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32))
    original, losses = loop._Run._loss, []

    def loss(self, *args):
        losses.append(1)
        return original(self, *args) * (float("inf") if len(losses) > 6 else 1)

    monkeypatch.setattr(loop._Run, "_loss", loss)
    argv = [
        "train",
        str(tmp_path / "x.npy"),
        "--out",
        str(tmp_path / "run"),
        *flags(training__steps=50, training__validate_every=5),
    ]
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1 and "20 steps in a row" in lines[0]
    figure("Q19", "exit code after 20 bad steps", caught.value.code, at_most=1, at_least=1)
    tree = checkpoint.read(tmp_path / "run" / "resume.safetensors", kind="resume")
    assert tree["result"]["steps"] == 26 and all(v.isfinite().all() for v in tree["weights"].values())
    assert all(v.isfinite().all() for v in pyrodiff.load(tmp_path / "run").state_dict().values())


# ---------------------------------------------------------------------- where it runs


@pytest.mark.reliability("F27")
def test_a_clock_that_jumps_changes_nothing(monkeypatch):
    found = []
    now = time.time
    for jump in (0.0, 1e6, -1e6):
        calls: list[int] = []

        def jumping(jump: float = jump, calls: list[int] = calls) -> float:
            calls.append(1)
            return now() + jump * (len(calls) % 3)

        monkeypatch.setattr(time, "time", jumping)
        diffusion = make(Dropout)
        result = fit(diffusion, examples(), examples(9), **{**SMALL, "progress": True})
        found.append((sha(diffusion.state_dict()), sha(result.records)))
        assert 0 <= result.seconds < 300
        monkeypatch.undo()
    assert len(set(found)) == 1


@pytest.mark.reliability("F28", "Q21")
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1])
def test_every_seed_is_taken_or_refused_in_one_line(seed: int, tmp_path: Path, capsys, figure):
    if 0 <= seed < 2**63:
        runs = [make() for _ in range(3)]
        for diffusion in runs:
            fit(diffusion, examples(), **{**SMALL, "steps": 2}, seed=seed)
        figure("F28", "runs of one seed that differ", len({sha(d.state_dict()) for d in runs}) - 1, at_most=0)
    else:
        with pytest.raises(OptionError, match=r"seed=.* 0\.\.2\*\*63 - 1"):
            fit(make(), examples(), **SMALL, seed=seed)
    draws = [pyrodiff.sample(exact(4), 3, seed=seed) for _ in range(3)]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    fit(make(), examples(), folder=tmp_path / "run", **{**SMALL, "steps": 1})
    np.save(tmp_path / "x.npy", examples().numpy())
    for argv in (
        ["train", tmp_path / "x.npy", "--out", tmp_path / "new", "--seed", seed, *flags(training__steps=0)],
        ["elbo", tmp_path / "run", "--data", tmp_path / "x.npy", "--timesteps", 2, "--seed", seed],
        ["sample", tmp_path / "run", "--n", 2, "--out", tmp_path / "s.npy", "--seed", seed],
        ["compare", tmp_path / "run", "--data", tmp_path / "x.npy", "--seed", seed, "--examples", 0],
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in argv])
        lines = capsys.readouterr().err.splitlines()
        assert (caught.value.code, len(lines)) in ((0, 0), (2, 1)), lines


@pytest.mark.reliability("F27")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_the_caller_has_closed(name: str, tmp_path: Path, monkeypatch):
    fit(make(), examples(), folder=tmp_path / "run", **{**SMALL, "steps": 1})
    monkeypatch.setattr(sys, name, None)  # as Python has it after `>&-`
    with pytest.raises(SystemExit) as caught:
        cli.main(["sample", str(tmp_path / "run"), "--n", "2", "--out", str(tmp_path / "s.npy")])
    getattr(sys, name).close()
    assert caught.value.code == 0 and np.load(tmp_path / "s.npy").shape == (2, 3)


@pytest.mark.reliability("F27")
def test_training_outlives_its_reader(tmp_path: Path, monkeypatch):
    """`pyrodiff train ... | head -1`, where every line is sent at once: the second finds nobody."""
    np.save(tmp_path / "x.npy", examples(60).numpy())
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), *flags()])
        monkeypatch.undo()
    assert caught.value.code == 0
    assert checkpoint.read(tmp_path / "run" / "resume.safetensors", kind="resume")["result"]["steps"] == 4
    assert (tmp_path / "run" / "ledger.txt").stat().st_size > 0


@pytest.mark.reliability("F30")
def test_training_starts_no_process(tmp_path: Path, monkeypatch, figure):
    children = Path(f"/proc/{os.getpid()}/task")
    if not children.exists():
        pytest.skip("there is no /proc")

    def living() -> set[str]:
        return {child for task in children.iterdir() for child in (task / "children").read_text().split()}

    before, during, step = living(), set(), loop._Run.step
    monkeypatch.setattr(loop._Run, "step", lambda self, *args: (during.update(living()), step(self, *args))[1])
    fit(make(), examples(), examples(9), folder=tmp_path, **SMALL)
    assert before >= living()
    figure("F30", "processes that training started", len((during | living()) - before), at_most=0)


# ---------------------------------------------------------------------- handlers


@pytest.mark.reliability("F22")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_signal_is_told_and_the_command_exits_by_it(number: int, tmp_path: Path, monkeypatch, capsys, figure):
    diffusion = make()
    on_call(diffusion, lambda output: signal.raise_signal(number), 2)
    assert fit(diffusion, examples(), **SMALL).interrupted == number
    np.save(tmp_path / "x.npy", examples(60).numpy())
    step = loop._Run.step
    monkeypatch.setattr(
        loop._Run,
        "step",
        lambda self, *args: (self.result.steps == 1 and signal.raise_signal(number), step(self, *args)),
    )
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), *flags()])
    assert "go on with" in capsys.readouterr().out
    figure(
        "F22",
        f"exit code after {signal.Signals(number).name}",
        caught.value.code,
        at_least=128 + number,
        at_most=128 + number,
    )


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch):
    """`signal.getsignal` has None for it, which `signal.signal` would not take."""
    getsignal = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGTERM else getsignal(n))
    before = getsignal(signal.SIGTERM)
    assert fit(make(), examples(), **{**SMALL, "steps": 1}).steps == 1
    assert getsignal(signal.SIGTERM) is before


@pytest.mark.reliability("F22")
@pytest.mark.parametrize("moment", ["resume", "model", "config", "log"])
def test_killed_between_the_files_of_the_first_save(tmp_path: Path, monkeypatch, moment: str):
    """The state is written first and the rest is made of it: whatever is missing, the run can be gone on with."""

    class Killed(BaseException):
        pass

    def raising(function: Callable, when: Callable[..., bool]) -> Callable:
        def call(*args, **kwargs):
            if when(*args):
                raise Killed
            return function(*args, **kwargs)

        return call

    options = {**SMALL, "validate_every": 3, "validation": examples(9)}
    names = {"resume": "resume.safetensors", "model": "model.safetensors", "config": "config.json"}
    with monkeypatch.context() as patch:
        if moment == "log":
            patch.setattr(loop._Run, "_publish", raising(lambda *a: None, lambda *a: True))
        else:
            patch.setattr(_files, "replace", raising(_files.replace, lambda path, *a: path.name == names[moment]))
        with pytest.raises(Killed):
            fit(make(), examples(), folder=tmp_path / "cut", **options)
    started = (tmp_path / "cut" / "resume.safetensors").exists()
    assert started == (moment != "resume") and (started or not (tmp_path / "cut" / "model.safetensors").exists())
    fit(make(), examples(), folder=tmp_path / "cut", resume=started, **options)
    fit(make(), examples(), folder=tmp_path / "whole", **options)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    logs = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("cut", "whole")
    ]
    assert sha(logs[0]) == sha(logs[1])


# ---------------------------------------------------------------------- real processes


def warm() -> None:
    """Called once in the process that the ones below are forks of: everything that a command imports is imported."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", examples(60).numpy())
        try:
            cli.main(["train", f"{folder}/x.npy", "--out", f"{folder}/run", *flags()])
        except SystemExit as end:
            assert not end.code


def alone(function: Callable[[], object]) -> None:
    """As the command does with errors."""
    try:
        function()
    except PyrodiffError as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(2 if isinstance(error, ValueError) else 1)


@pytest.fixture(scope="module")
def forks():
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork")
    found = Forks("test_faults_training")
    yield found
    found.close()


def living(group: int) -> list[int]:
    """Processes of a group, but for those that have ended and whose parent has not looked yet."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = path.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, IndexError):
            continue
        if int(own) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.reliability("F22", "F10", "F30")
def test_signals_at_random_moments(forks: Forks, tmp_path: Path, figure):
    """During training, validations, saves and the scoring afterwards; pictures are left out, which would be most of the time."""
    np.save(tmp_path / "x.npy", examples(60).numpy())
    options = flags(training__steps=40, training__validate_every=2, training__timesteps="importance")

    def start(name: str, *more: str) -> int:
        argv = ["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / name), *options, *more]
        return forks.start(
            f"t.pyrodiff.report._pictures = lambda *a: None; t.cli.main({argv!r})", tmp_path / f"{name}.log"
        )

    began = time.monotonic()
    assert forks.wait(start("whole")) == 0
    length, rng = time.monotonic() - began, np.random.default_rng(0)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes(), (tmp_path / "whole" / "ledger.txt").read_bytes()
    interrupted, tracebacks, wrong, unsound, orphans, different = 0, [], [], 0, 0, 0
    for i in range(MOMENTS):
        number, times = (signal.SIGINT, signal.SIGTERM)[i % 2], 1 + i // 2 % 2
        pid = start(str(i))
        time.sleep(rng.uniform(0, length))
        for _ in range(times):
            os.kill(pid, number)
            time.sleep(rng.uniform(0, 0.1))
        code = forks.wait(pid)
        interrupted += code != 0
        if code not in (0, 128 + number):
            wrong.append((i, code))
        text = (tmp_path / f"{i}.log").read_text()
        tracebacks += [text] * ("Traceback" in text or "Exception" in text)
        orphans += len(living(pid))
        state = tmp_path / str(i) / "resume.safetensors"
        try:
            if state.exists():
                checkpoint.read(state, kind="resume")
        except CheckpointError:
            unsound += 1
        assert forks.wait(start(str(i), *(["--resume", "true"] if state.exists() else []))) == 0, (i, code)
        found = (tmp_path / str(i) / "model.safetensors").read_bytes(), (tmp_path / str(i) / "ledger.txt").read_bytes()
        different += found != expected
    figure.count("F22", "signals at random moments, once or twice", MOMENTS, at_least=50)
    figure("F22", "of which before the end", interrupted, at_least=MOMENTS / 2)
    assert not wrong and not tracebacks, (wrong, tracebacks)
    figure("F22", "tracebacks", len(tracebacks), at_most=0)
    figure("F22", "unsound checkpoints", unsound, at_most=0)
    figure("F22", "processes left behind", orphans, at_most=0)
    figure("F22", "runs that went on to another result", different, at_most=0)


@pytest.mark.slow
@pytest.mark.reliability("F22")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_python_imports(forks: Forks, tmp_path: Path, number: int):
    """Before there is any code of ours to run they are Python's own: death by that signal, nothing begun."""
    np.save(tmp_path / "x.npy", examples(60).numpy())
    argv = ["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), *flags()]
    for wait in (0.1, 0.6):
        process = subprocess.Popen(
            [sys.executable, "-m", "pyrodiff", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        time.sleep(wait)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode in (-number, 128 + number, 1 if number == signal.SIGINT else -number)
        assert not living(process.pid) and not (tmp_path / "run" / "resume.safetensors").exists()
    assert forks.run(f"t.cli.main({argv!r})", tmp_path / "log") == 0


@pytest.mark.slow
@pytest.mark.reliability("F27", "F28", "Q21")
def test_the_same_command_three_times_with_no_home_no_network_and_no_terminal(tmp_path: Path, figure):
    """Of the same machine, versions and threads, and with another hash seed each: the same files, wall times apart."""
    np.save(tmp_path / "x.npy", examples(60).numpy())
    code = """
import socket, sys
del socket.create_connection
socket.socket.connect = socket.getaddrinfo = None
from pyrodiff.cli import main
main(sys.argv[1:])
"""
    texts = []
    for i in range(3):
        folder = tmp_path / str(i)
        folder.mkdir()
        environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("XDG_CACHE_HOME", "MPLCONFIGDIR")}
        environment |= {"PYTHONHASHSEED": str(i)}
        environment |= {"HOME": "/proc/nowhere", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))} if i else {}
        argv = ["train", "../x.npy", "--out", "run", *flags()]
        process = subprocess.run(
            [sys.executable, "-c", code, *argv], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
        texts.append(re.sub(r"in \d+ s|all in .*", "", process.stdout))
    files = sorted(path.name for path in (tmp_path / "0" / "run").iterdir())
    different = [] if len(set(texts)) == 1 else ["stdout"]
    for name in files:
        paths = [tmp_path / str(i) / "run" / name for i in range(3)]
        if name.startswith("resume"):
            contents = {sha(checkpoint.read(path, kind="resume")) for path in paths}
        elif name == "metrics.jsonl":
            contents = {sha([json.loads(line) for line in path.read_text().splitlines()]) for path in paths}
        else:
            stamp = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"  # of elbo.nc, when it was made
            contents = {re.sub(stamp, b"", path.read_bytes()) for path in paths}
        different += [name] * (len(contents) > 1)
    assert different == [] and len(files) >= 10
    figure("F28", "files of three equal commands that differ", len(different), at_most=0)


class Hungry(nn.Module):
    """36 MB for each example: more than the C library would take from memory that was freed before."""

    sizes: ClassVar[list[int]] = []

    def forward(self, x, log_snr):
        self.sizes.append(len(x))
        return 0.5 * x + torch.ones(len(x), 9 * 10**6)[:, :1] * log_snr[:, None].tanh()


def hungry(path: str, megabytes: int) -> None:
    """Draw samples in so much memory."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))
    x = pyrodiff.sample(GaussianDiffusion(Hungry(), CosineSchedule(5), (2,)), 16, seed=0)
    np.savez(path, x=x.numpy(), sizes=Hungry.sizes)


@pytest.mark.slow
@pytest.mark.reliability("F23")
def test_the_operating_systems_own_refusal(forks: Forks, tmp_path: Path, figure):
    found = []
    for megabytes in (2000, 300, 1):
        path = tmp_path / f"{megabytes}.npz"
        code = forks.run(f"t.alone(lambda: t.hungry({str(path)!r}, {megabytes}))", tmp_path / "log")
        assert code == (megabytes == 1)
        found += [np.load(path)] if code == 0 else []
    assert set(found[0]["sizes"]) == {16} and max(found[1]["sizes"]) == 16 > min(found[1]["sizes"]) >= 2
    figure("F23", "samples that differ in 300 MB and 2000", int((found[0]["x"] != found[1]["x"]).sum()), at_most=0)
    text = (tmp_path / "log").read_text()
    assert text.startswith("OutOfMemoryError: out of memory, with one example at a time: ") and text.count("\n") == 1, (
        text
    )


# ---------------------------------------------------------------------- several processes

CHANGES = {
    "lr": "options['lr'] = 0.5",
    "seed": "options['seed'] = 1",
    "steps": "options['steps'] = 12",
    "examples": "data = data[:39]",
    "data": "data = data.flip(0)",
    "net.width": "diffusion = t.make(lambda: t.MLP(3, out_features=3, width=16, depth=1))",
    "folder": "folder += '-other'",
    "pyrodiff": "t.loop.__version__ = '0.0.0'",
}


class Peers:
    """A Fabric of processes that all say the same, but for what ``other`` makes of it."""

    def __init__(self, other: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.other = other

    def all_gather(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack([value, self.other(value)])

    def all_reduce(self, value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        return self.all_gather(value).mean(0)


@pytest.mark.reliability("F25")
def test_what_processes_were_told_is_compared_by_name():
    told = {"lr": 0.1, "seed": 0, "width": 8}

    def saying(**changes: object) -> engines.Engine:
        def other(value: torch.Tensor) -> torch.Tensor:
            if value.shape == (1,):  # the length of what comes next
                return torch.full((1,), 1000)
            text = json.dumps({k: v for k, v in {**told, **changes}.items() if v is not None})
            return torch.tensor([list(text.ljust(value.shape[1]).encode())], dtype=torch.uint8)

        return engines.Engine(torch.device("cpu"), 0, 2, Peers(other))

    saying().agree(told)
    for changes, message in (
        ({"lr": 0.2}, "process 1 has lr=0.2, and process 0 0.1"),
        ({"seed": None}, "process 1 has seed=None, and process 0 0"),
        ({"depth": 3}, "process 1 has depth=3, and process 0 None"),
        ({"width": "é" * 9}, "process 1 has width='ééééééééé'"),
    ):
        with pytest.raises(OptionError, match=message):
            saying(**changes).agree(told)


@pytest.mark.reliability("F24")
def test_the_words_of_a_lost_process():
    for ranks, others in ((2, "process 1"), (4, "process one of 1, 2, 3")):
        engine = engines.Engine(torch.device("cpu"), 0, ranks, Peers(lambda value: value))
        with pytest.raises(ProcessError, match=f"process 0 has lost {others}, which died") as caught, engine.watched():
            raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2\nmore")
        assert "\n" not in str(caught.value)
        for error in (RuntimeError("shapes"), CheckpointError("runs/gloo is damaged"), ValueError("nccl")):
            with pytest.raises(type(error)) as caught, engine.watched():
                raise error
            assert caught.value is error
    with pytest.raises(RuntimeError, match="gloo"), engines.Engine(torch.device("cpu")).watched():
        raise RuntimeError("gloo")  # of the caller's own doing


@pytest.mark.reliability("F30")
def test_training_without_its_launcher_stops_as_if_terminated(monkeypatch):
    engine, step = engines.Engine(torch.device("cpu"), launcher=os.getppid()), loop._Run.step

    def orphan(self, *args):
        if self.result.steps == 3:
            monkeypatch.setattr(os, "getppid", lambda: engine.launcher + 1)
        return step(self, *args)

    monkeypatch.setattr(loop._Run, "step", orphan)
    monkeypatch.setattr(engines.Engine, "of", lambda *args, **kwargs: engine)
    result = fit(make(), examples(), **SMALL)
    assert (result.steps, result.interrupted) == (4, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.reliability("F25")
@pytest.mark.parametrize("name", CHANGES)
def test_processes_that_disagree_say_in_what(forks: Forks, tmp_path: Path, name: str, figure):
    pytest.importorskip("lightning_fabric")
    code = f"""
import os
diffusion, data, options, folder = t.make(), t.examples(), dict(t.SMALL), {str(tmp_path / "run")!r}
if os.environ["RANK"] == "1":
    {CHANGES[name]}
t.alone(lambda: t.fit(diffusion, data, folder=folder, **options))
"""
    codes = forks.pair(code, tmp_path / "log")
    texts = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert codes == [2, 2], texts
    for text in texts:
        assert f"OptionError: process 1 has {name}=" in text and "process 0" in text and "Traceback" not in text, text
    assert not (tmp_path / "run").exists()
    figure.count("F25", "disagreements named on both processes", 1, at_least=len(CHANGES))


FAULTS = {
    "dead": "os.kill(os.getpid(), 9)",
    "hanging": "time.sleep(60)",
    "failing": "raise t.OptionError('a fault of its own')",
}


@pytest.mark.slow
@pytest.mark.reliability("F24")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_that_loses_another_ends_and_says_so(forks: Forks, tmp_path: Path, fault: str, figure):
    pytest.importorskip("lightning_fabric")
    code = f"""
import datetime, os, time
t.engines.PATIENCE = datetime.timedelta(seconds=20)
step = t.loop._Run.step
def faulty(self, *args):
    if os.environ["RANK"] == "1" and self.result.steps == 4:
        {FAULTS[fault]}
    return step(self, *args)
t.loop._Run.step = faulty
t.alone(lambda: t.fit(t.make(), t.examples(), folder={str(tmp_path / "run")!r}, validate_every=2, **t.SMALL))
"""
    began = time.monotonic()
    codes = forks.pair(code, tmp_path / "log")
    text = (tmp_path / "log.0").read_text()
    assert codes[0] == 1 and codes[1] != 0, (codes, text)
    assert (
        re.search("^ProcessError: process 0 has lost process 1, .*$", text, re.MULTILINE) and "Traceback" not in text
    ), text
    figure("F24", "seconds until the survivor ended (a hang: 20 of patience)", time.monotonic() - began, at_most=110)
    assert checkpoint.read(tmp_path / "run" / "resume.safetensors", kind="resume")["result"]["steps"] == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp") == []


@pytest.mark.slow
@pytest.mark.reliability("Q19", "F14")
@pytest.mark.parametrize("bad", [range(3, 4), range(3, 100)], ids=["once", "for ever"])
def test_a_number_that_is_not_finite_on_one_process(forks: Forks, tmp_path: Path, bad: range, figure):
    """Parameters, average and optimiser are bit-unchanged on both; for ever, both end with 1 and the state is sound."""
    pytest.importorskip("lightning_fabric")
    folder = str(tmp_path / "run")
    code = f"""
import os
rank, step = os.environ["RANK"], t.loop._Run.step
def spy(self, *args):
    before = t.state(self)
    try:
        return step(self, *args)
    finally:
        with open({folder!r} + ".states." + rank, "a") as file:
            print(before, t.state(self), file=file)
t.loop._Run.step = spy
diffusion, calls = t.make(t.Normalised), []
def poison(module, args, output):
    calls.append(1)
    return output * float("nan") if rank == "1" and len(calls) in {bad!r} else None
diffusion.net.register_forward_hook(poison)
t.alone(lambda: t.fit(diffusion, t.examples(), folder={folder!r}, **(t.SMALL | dict(steps=30))))
"""
    codes = forks.pair(code, tmp_path / "log")
    states = [[line.split() for line in Path(f"{folder}.states.{rank}").read_text().splitlines()] for rank in (0, 1)]
    skipped = [[before == after for before, after in rank] for rank in states]
    expected = [i + 1 in bad for i in range(30 if len(bad) == 1 else 22)]
    assert codes == ([0, 0] if len(bad) == 1 else [1, 1]), (tmp_path / "log.0").read_text()
    figure("Q19", "bad steps that changed a process", sum(a != expected for a in skipped), at_most=0)
    tree = checkpoint.read(Path(folder) / "resume.safetensors", kind="resume")
    assert all(v.isfinite().all() for v in tree["weights"].values())
    assert tree["result"]["skipped"] == sum(expected)


def state(run: loop._Run) -> str:
    tree = {"weights": run.diffusion.state_dict(), "ema": run.ema.state_dict()}
    return sha({**tree, "optimizer": {str(k): v for k, v in run.optimizer.state_dict()["state"].items()}})


def launcher(folder: str, port: int) -> None:
    """What torchrun does: two processes, of which this one is the parent."""
    for rank in (0, 1):
        if os.fork() == 0:
            os.environ.update({k: str(v) for k, v in as_rank(rank, port).items()})
            result = fit(make(), examples(), folder=folder, **{**SMALL, "steps": 10**6, "validate_every": 20})
            Path(f"{folder}.{rank}").write_text(str(result.interrupted))
            os._exit(0)
    time.sleep(600)


@pytest.mark.reliability("F24")
@pytest.mark.parametrize(("told", "number"), [((0.5, 0.0), 15), ((0.0, 0.5), 2), ((0.5, 0.5), 15)])
def test_a_signal_to_one_process_ends_all_by_that_signal(monkeypatch, told: tuple[float, float], number: int):
    monkeypatch.setattr(engines.Engine, "mean", lambda self, loss, norm, *own: [float(loss), float(norm), *told])
    result = fit(make(), examples(), **SMALL)
    assert (result.interrupted, result.steps) == (number, 1)


@pytest.mark.slow
@pytest.mark.reliability("F30", "F24")
def test_processes_end_when_torchrun_is_killed(forks: Forks, tmp_path: Path, figure):
    pytest.importorskip("lightning_fabric")
    folder = tmp_path / "run"
    pid = forks.start(f"t.launcher({str(folder)!r}, {20000 + os.getpid() % 10000})", tmp_path / "log")
    deadline = time.monotonic() + 100
    while not (folder / "resume.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(living(pid)) == 3, (tmp_path / "log").read_text()
    os.kill(pid, signal.SIGKILL)
    assert forks.wait(pid) == -signal.SIGKILL
    while living(pid) and time.monotonic() < deadline + 60:
        time.sleep(0.1)
    figure("F30", "processes that outlive a killed torchrun", len(living(pid)), at_most=0)
    assert [Path(f"{folder}.{rank}").read_text() for rank in (0, 1)] == [str(int(signal.SIGTERM))] * 2
    assert checkpoint.read(folder / "resume.safetensors", kind="resume")["result"]["steps"] > 0
