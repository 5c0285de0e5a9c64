"""Training: the loop against a hand-written one, resume bit for bit, faults that must cost nothing."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyrodiff
from pyrodiff import CosineSchedule, GaussianDiffusion, fit, timesteps
from pyrodiff.errors import CheckpointError, DataError, DivergenceError, OptionError, PyrodiffError, ShapeError
from pyrodiff.nets import MLP, UNet
from pyrodiff.training import checkpoint
from pyrodiff.training.ema import EMA

loop = importlib.import_module("pyrodiff.training.fit")

SMALL = {"steps": 10, "batch_size": 8, "progress": False, "device": "cpu", "lr": 1e-2, "warmup": 3}


class Dropout(nn.Module):
    """A network that consumes random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = MLP(3, width=8, depth=1), nn.Dropout(0.3)

    def forward(self, x, log_snr, **cond):
        return self.inner(self.dropout(x), log_snr, **cond)


def make(net: Callable[[], nn.Module] | None = None, steps: int = 12, **options) -> GaussianDiffusion:
    torch.manual_seed(7)
    if net is None:
        outputs = 6 if options.get("variance", "").startswith("learned") else 3
        module: nn.Module = MLP(3, out_features=outputs, width=8, depth=1)
    else:
        module = net()
    with torch.no_grad():  # a fresh network returns 0, whose gradient with respect to most weights is 0 too
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return GaussianDiffusion(module, CosineSchedule(steps), (3,), **options)


def examples(n: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(size=(n, 3)).astype(np.float32)) * 0.5


def weights(diffusion: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in diffusion.state_dict().items()}


def same(a: object, b: object, where: str = "") -> None:
    """Equal trees, tensors bit for bit; the wall times apart."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "seconds":
                same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    else:
        assert a == b or (a != a and b != b), (where, a, b)


def on_call(diffusion: GaussianDiffusion, action, when: int):
    """Run ``action`` in the network's training call number ``when`` (from 1)."""
    calls = [0]

    def hook(module, args, output):
        if module.training:
            calls[0] += 1
            if calls[0] == when:
                return action(output)
        return None

    return diffusion.net.register_forward_hook(hook)


def stop_at(diffusion: GaussianDiffusion, step: int):
    return on_call(diffusion, lambda output: signal.raise_signal(signal.SIGINT), step)


# ---------------------------------------------------------------------- the average of the weights


@pytest.mark.parametrize(("decay", "n"), [(0.999, 50), (0.9999, 20_000), (0.3, 5), (0.0, 3)])
def test_ema_of_constant_weights_is_the_closed_form(decay: float, n: int):
    module = nn.Linear(3, 2)
    start = module.weight.detach().clone()
    ema = EMA(module, decay)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5)
    for _ in range(n):
        ema.update()
    product = math.prod(min(decay, (1 + k) / (10 + k)) for k in range(1, n + 1))
    expected = module.weight + (start - module.weight) * product
    with ema.swapped_in():
        torch.testing.assert_close(module.weight, expected, rtol=1e-5, atol=1e-6)
    assert ema.updates == n
    wrong = module.weight + (start - module.weight) * decay**n  # without the warm-up
    assert decay == 0.0 or n > 1000 or not torch.allclose(wrong, expected, rtol=1e-5, atol=1e-6)


def test_ema_of_moving_weights_is_the_recursion():
    module, rng = nn.Linear(1, 1, bias=False), np.random.default_rng(0)
    ema, expected = EMA(module, 0.7), module.weight.item()
    for n, value in enumerate(rng.normal(size=30), start=1):
        nn.init.constant_(module.weight, value)
        ema.update()
        rate = min(0.7, (1 + n) / (10 + n))
        expected = rate * expected + (1 - rate) * np.float32(value)
    ema.copy_to_parameters()
    assert module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_ema_of_a_bfloat16_module_is_kept_in_float32_and_moves():
    module = nn.Linear(2, 2).bfloat16()
    nn.init.constant_(module.weight, 1.0)
    ema = EMA(module, 0.9999)
    nn.init.constant_(module.weight, 1.5)
    for _ in range(200):
        ema.update()
    average = ema.state_dict()["average"][0]
    product = math.prod(min(0.9999, (1 + k) / (10 + k)) for k in range(1, 201))
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((2, 2), 1.5 - 0.5 * product), rtol=1e-5, atol=0)
    ema.copy_to_parameters()
    assert module.weight.dtype == torch.bfloat16
    assert EMA(nn.Linear(1, 1).double()).state_dict()["average"][0].dtype == torch.float64


def test_ema_swaps_back_whatever_happens_and_its_state_is_a_copy():
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.5)
    nn.init.zeros_(module.weight)
    ema.update()
    before, state = weights(module), ema.state_dict()
    with pytest.raises(KeyError), ema.swapped_in():
        assert module.weight.abs().sum() > 0
        raise KeyError
    same(before, weights(module))
    kept = [e.clone() for e in state["average"]]
    ema.update()
    same(kept, state["average"])
    ema.load_state_dict(state)
    same(ema.state_dict(), state)
    with pytest.raises(ShapeError):
        ema.load_state_dict(EMA(nn.Linear(3, 2)).state_dict())
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(OptionError, match="decay"):
            EMA(module, decay)


# ---------------------------------------------------------------------- a step


def by_hand(diffusion, data, n, *, kl="analytic", rule="low_discrepancy", clip=1.0, seed=0, lr=1e-2, warmup=3, size=8):
    """The documented loop in plain PyTorch; yields the losses."""
    elbo = {"analytic": TraceMeanField_ELBO, "monte_carlo": Trace_ELBO}[kl]()
    losses = []
    with pyro.settings.context(module_local_params=True):
        loss_module = elbo(diffusion.model, diffusion.guide)
        optimizer = torch.optim.AdamW(diffusion.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        diffusion.train()
        for step in range(n):
            rows = np.random.default_rng([seed, 0]).permutation(len(data))[step * size : (step + 1) * size]
            noise_seed = np.random.SeedSequence([seed, 0, step]).generate_state(1, np.uint64)[0] >> 1
            torch.manual_seed(int(noise_seed))
            t = getattr(timesteps, rule)(size, diffusion.steps)
            loss = loss_module(data[rows], t) / (size * 3)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(diffusion.parameters(), clip)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / warmup)
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
@pytest.mark.parametrize("rule", ["low_discrepancy", "uniform"])
def test_steps_are_those_of_a_hand_written_loop(kl: str, rule: str):
    mine, theirs, data = make(), make(), examples()
    by_hand(theirs, data, 3, kl=kl, rule=rule)
    with torch.random.fork_rng(devices=[]):
        fit(mine, data, **{**SMALL, "steps": 3}, kl=kl, timesteps=rule, lr_schedule="constant", ema_decay=0.0)
    same(weights(mine), weights(theirs))  # an average with decay 0 is the weights


def gradient_of_a_step(diffusion, data, monkeypatch, **options):
    found = []

    def spy(parameters, clip):
        found.append(clip_grad_norm(parameters, clip))
        return found[-1]

    clip_grad_norm = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    fit(diffusion, data, **{**SMALL, "steps": 1, **options})
    monkeypatch.undo()
    return found[0], torch.cat([p.grad.flatten() for p in diffusion.parameters()])  # all of what the optimiser took


def test_clipping_is_by_the_norm_of_the_whole_gradient(monkeypatch):
    norm, clipped = gradient_of_a_step(make(), examples(), monkeypatch, clip_norm=1e-3)
    assert norm > 1e-2  # otherwise nothing was clipped
    assert clipped.norm() <= 1e-3 * (1 + 1e-5)
    _, free = gradient_of_a_step(make(), examples(), monkeypatch, clip_norm=math.inf)
    torch.testing.assert_close(free.norm(), norm)
    torch.testing.assert_close(clipped, free * (1e-3 / norm), rtol=1e-3, atol=1e-9)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(monkeypatch):
    # Four parts with the noise and the timesteps that the whole batch would have had.
    data, generator = examples(), torch.Generator().manual_seed(0)
    noise, t = torch.randn(8, 3, generator=generator), torch.arange(1, 9)
    row = {tuple(x.tolist()): i for i, x in enumerate(data)}
    picked = []

    def step(self, x0, t_, weight):
        indices = [first[row[tuple(x.tolist())]] for x in x0]
        picked.extend(indices)
        self_t = t[indices]
        return original(self, x0, self_t, weight)

    first: dict[int, int] = {}
    order = loop._Order(0, len(data), 8).batch(0).tolist()
    first = {index: i for i, index in enumerate(order)}
    original = pyrodiff.diffusion.Program._one_step

    def rsample(self, shape=()):
        rows = noise[picked[-len(self.loc) :]]
        return self.loc + self.scale * rows

    gradients = []
    for accumulate in (1, 2, 4):
        monkeypatch.setattr(pyrodiff.diffusion.Program, "_one_step", step)
        monkeypatch.setattr(pyrodiff.distributions.Gaussian, "rsample", rsample)
        found = gradient_of_a_step(make(), data, monkeypatch, accumulate=accumulate, clip_norm=math.inf)
        gradients.append(found[1])
        assert len(picked) >= 8
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)
    plain = gradient_of_a_step(make(), data, monkeypatch, clip_norm=math.inf)[1]
    assert not torch.allclose(plain, gradients[0], rtol=1e-2)  # the noise was indeed ours


def test_the_rate_rises_then_falls_along_a_cosine():
    diffusion, rates = make(), []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    torch.optim.AdamW.step = step
    try:
        fit(diffusion, examples(), **{**SMALL, "steps": 20, "warmup": 5, "lr": 0.5})
    finally:
        torch.optim.AdamW.step = original
    expected = [0.5 * min(1, n / 5) * 0.5 * (1 + math.cos(math.pi * (n - 1) / 20)) for n in range(1, 21)]
    assert rates == pytest.approx(expected)
    assert rates[-1] < 0.01 * 0.5


def test_the_first_steps_average_is_the_documented_one():
    data, theirs, mine = examples(), make(), make()
    start = weights(theirs)
    by_hand(theirs, data, 1)
    fit(mine, data, **{**SMALL, "steps": 1}, ema_decay=0.999, lr_schedule="constant")
    for key, value in mine.state_dict().items():
        expected = torch.lerp(start[key], theirs.state_dict()[key], 1 - 2 / 11)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_data_size_changes_nothing_per_dim():
    records = []
    for size in (None, 1000):
        result = fit(make(data_size=size), examples(), examples(10), **SMALL)
        records.append(result.records)
    for a, b in zip(*records, strict=True):
        assert a["train_bits_per_dim"] == pytest.approx(b["train_bits_per_dim"], rel=1e-5)
        assert a["validation_bits_per_dim"] == pytest.approx(b["validation_bits_per_dim"], rel=1e-4)


@pytest.mark.parametrize("objective", ["simple", "min_snr", "p2", "hybrid"])
def test_other_objectives_train_and_are_not_called_bits(objective: str):
    diffusion = make(objective=objective, variance="learned_range", decoder="learned")
    before = weights(diffusion)
    result = fit(diffusion, examples(), **{**SMALL, "steps": 60}, ema_decay=0.9)
    assert "train_bits_per_dim" not in result.records[-1]
    assert result.records[-1]["train_loss_nats_per_dim"] < result.records[0]["train_loss_nats_per_dim"]
    assert 0 <= result.records[-1]["learned_range_outside"] <= 1
    moved = [k for k, v in diffusion.state_dict().items() if not torch.equal(v, before[k])]
    assert any(k.startswith("reverse_kernel.net") for k in moved)


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_training_improves_the_bound(kl: str):
    diffusion = make(decoder="learned")
    data = examples(200)
    before = pyrodiff.bits_per_dim(pyrodiff.elbo_terms(diffusion, data)).mean
    fit(diffusion, data, **{**SMALL, "steps": 150, "batch_size": 32}, kl=kl, ema_decay=0.95)
    after = pyrodiff.bits_per_dim(pyrodiff.elbo_terms(diffusion, data)).mean
    assert after < before - 0.5


def test_labels_reach_the_network_with_their_rows():
    seen = []
    diffusion = make(lambda: MLP(3, width=8, depth=1, classes=4))
    data, y = examples(), torch.arange(40) % 4
    data[:, 0] = y / 4
    diffusion.net.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["y"]), with_kwargs=True)
    result = fit(diffusion, data, data[:9], cond={"y": y}, validation_cond={"y": y[:9]}, **SMALL)
    assert result.best is not None
    order = loop._Order(0, 40, 8)
    assert torch.equal(seen[0], y[order.batch(0)])


def test_every_epoch_sees_every_example_once_in_another_order():
    order = loop._Order(3, 40, 8)
    epochs = [torch.cat([order.batch(5 * e + i) for i in range(5)]) for e in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(40))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(loop._Order(3, 40, 8).batch(7), order.batch(7))


# ---------------------------------------------------------------------- importance sampling


@pytest.mark.parametrize("data_size", [None, 400])
def test_importance_sampling_learns_from_the_steps_own_terms(monkeypatch, data_size):
    diffusion = make(data_size=data_size)
    scale = 1 if data_size is None else data_size / 8
    calls, updates, expected = [], [], []
    diffusion.net.register_forward_hook(lambda *args: calls.append(1))
    update = timesteps.ImportanceSampler.update
    monkeypatch.setattr(
        timesteps.ImportanceSampler, "update", lambda self, t, v: (updates.append((t, v)), update(self, t, v))[1]
    )
    both = type(diffusion.reverse_kernel).laws

    def laws(self, predicted, x_t, t):
        law_of_x_s, law_of_x_0 = both(self, predicted, x_t, t)
        x0 = seen[-1]
        q = diffusion.forward_process.posterior(x0, x_t, t.clamp(min=2))
        kl = torch.distributions.kl_divergence(q, law_of_x_s)
        expected.append((t, torch.where(t == 1, -law_of_x_0.log_prob(x0), kl).detach()))
        return law_of_x_s, law_of_x_0

    seen: list[torch.Tensor] = []
    check = pyrodiff.diffusion.Program._batch
    monkeypatch.setattr(
        pyrodiff.diffusion.Program, "_batch", lambda self, x0, cond: (seen.append(x0), check(self, x0, cond))[1]
    )
    monkeypatch.setattr(type(diffusion.reverse_kernel), "laws", laws)
    fit(diffusion, examples(), **{**SMALL, "steps": 30}, timesteps="importance")
    assert len(calls) == 30 == len(updates)
    for (t, value), (t_expected, terms) in zip(updates, expected, strict=True):
        assert torch.equal(t, t_expected)
        torch.testing.assert_close(value, terms * scale, rtol=1e-4, atol=1e-4)


def test_importance_sampling_serves_other_objectives_and_a_single_step(monkeypatch):
    histories = []
    monkeypatch.setattr(timesteps.ImportanceSampler, "update", lambda self, t, losses: histories.append(losses))
    fit(make(objective="simple"), examples(), **SMALL, timesteps="importance")
    assert all((losses > 0).all() for losses in histories)
    fit(make(steps=1), examples(), examples(9), **SMALL, timesteps="importance")


# ---------------------------------------------------------------------- resume


CUTS = (1, 2, 4, 5, 7, 9)  # an epoch is 5 steps, a validation every 3


def state_of(folder: Path) -> dict:
    tree = checkpoint.read(folder / "resume.safetensors", kind="resume")
    return {"tree": tree, "records": [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]}


def options_of(rule: str) -> dict:
    return {**SMALL, "validate_every": 3, "timesteps": rule, "ema_decay": 0.8, "validation": examples(12)}


@pytest.mark.reliability("Q15", "F10")
@pytest.mark.parametrize("rule", loop.TIMESTEPS)
def test_resuming_continues_bit_for_bit(tmp_path: Path, rule: str, figure):
    data, options = examples(), options_of(rule)
    whole = make(Dropout)
    expected = fit(whole, data, folder=tmp_path / "whole", **options)
    assert not expected.interrupted and len(expected.records) == 4
    for cut in CUTS:
        folder, first = tmp_path / str(cut), make(Dropout)
        hook = stop_at(first, cut)
        stopped = fit(first, data, folder=folder, **options)
        hook.remove()
        assert stopped.interrupted and stopped.steps == cut
        second = make(Dropout)
        nn.init.zeros_(second.net.inner.input.weight)  # whatever it was, the file has the weights
        result = fit(second, data, folder=folder, resume=True, **options)
        same(weights(whole), weights(second), f"cut {cut}")
        same(state_of(tmp_path / "whole"), state_of(folder), f"cut {cut}")
        assert not result.interrupted
        assert (result.steps, result.best_step, result.best) == (expected.steps, expected.best_step, expected.best)
    figure("Q15", f"cut points in one process, {rule} timesteps", len(CUTS), at_least=6)


@pytest.mark.reliability("Q15", "F10")
def test_resuming_many_times_and_at_the_end(tmp_path: Path):
    data, options = examples(), options_of("importance")
    fit(make(Dropout), data, folder=tmp_path / "whole", **options)
    folder = tmp_path / "bits"
    for n in range(10):
        diffusion = make(Dropout)
        hook = stop_at(diffusion, 1)
        fit(diffusion, data, folder=folder, resume=n > 0, **options)
        hook.remove()
    again = fit(make(Dropout), data, folder=folder, resume=True, **options)  # nothing left to do
    assert again.steps == 10
    same(state_of(tmp_path / "whole"), state_of(folder))


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_fit as t
t.fit(t.make(t.Dropout), t.examples(), folder={folder!r}, resume={resume}, **t.options_of("importance"))
"""


def script(folder: Path, resume: bool) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), resume=resume)]


@pytest.mark.reliability("Q15", "F10")
def test_resuming_in_a_new_process_continues_bit_for_bit(tmp_path: Path):
    options = options_of("importance")
    fit(make(Dropout), examples(), folder=tmp_path / "whole", **options)
    first = make(Dropout)
    stop_at(first, 4)
    fit(first, examples(), folder=tmp_path / "cut", **options)
    subprocess.run(script(tmp_path / "cut", True), check=True, timeout=120)
    same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


@pytest.mark.reliability("Q15", "F10")
def test_a_longer_run_can_follow_at_a_constant_rate(tmp_path: Path):
    data, options = examples(), {**options_of("uniform"), "lr_schedule": "constant", "validation": None}
    options["validate_every"] = 5
    whole, half = make(), make()
    fit(whole, data, folder=tmp_path / "whole", **options)
    fit(half, data, folder=tmp_path / "half", **{**options, "steps": 5})
    fit(half, data, folder=tmp_path / "half", resume=True, **options)
    same(weights(whole), weights(half))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *(({name: value}, name) for name, value in {
            "lr": 0.5, "batch_size": 4, "accumulate": 2, "warmup": 1, "lr_schedule": "constant", "weight_decay": 0.1,
            "clip_norm": 0.5, "ema_decay": 0.5, "kl": "monte_carlo", "timesteps": "uniform", "precision": "bf16",
            "seed": 1, "steps": 11,
        }.items()),
        ({"diffusion": make(objective="simple")}, "diffusion.objective"),
        ({"diffusion": make(lambda: MLP(3, out_features=3, width=16, depth=1))}, "net.width"),
        ({"data": examples(41)}, "examples"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_options_are_refused_by_name(tmp_path: Path, change: dict, name: str):
    fit(make(), examples(), folder=tmp_path, **SMALL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = {"diffusion": make(), "data": examples(), **SMALL, **change}
    with pytest.raises(CheckpointError, match=f"{name}=") as caught:
        fit(**arguments, folder=tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_weights_of_another_network_are_refused_in_one_line(tmp_path: Path):
    fit(make(Dropout), examples(), folder=tmp_path, **SMALL)  # a network that says nothing of its options
    with pytest.raises(CheckpointError, match="weights missing") as caught:
        fit(make(lambda: nn.Linear(3, 3)), examples(), folder=tmp_path, resume=True, **SMALL)
    assert "\n" not in str(caught.value)


CRAFTED = {
    "other network": lambda t: t["weights"].pop("reverse_kernel.net.input.bias"),
    "weights": lambda t: t["weights"]["reverse_kernel.net.input.bias"].fill_(math.nan),
    "moments' shape": lambda t: t["optimizer"]["state"]["0"].update(exp_avg=torch.ones(2, 2)),
    "moments": lambda t: t["optimizer"]["state"]["0"]["exp_avg"].fill_(math.inf),
    "more moments": lambda t: t["optimizer"]["state"].update({"99": {"step": torch.ones(())}}),
    "no moments": lambda t: t["optimizer"]["state"].clear(),
    "groups": lambda t: t["optimizer"]["param_groups"].clear(),
    "average": lambda t: t["ema"]["average"].pop(),
}


@pytest.mark.reliability("F8", "F10")
@pytest.mark.parametrize("name", CRAFTED)
def test_a_sound_file_of_the_wrong_content_is_refused_in_one_line(tmp_path: Path, name: str):
    fit(make(), examples(), folder=tmp_path, **SMALL)
    path = tmp_path / "resume.safetensors"
    tree = checkpoint.read(path, kind="resume")
    CRAFTED[name](tree)
    checkpoint.write(path, tree, kind="resume")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        fit(make(), examples(), folder=tmp_path, resume=True, **SMALL)
    assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.reliability("F5")
def test_missing_and_damaged_resume_files_are_refused(tmp_path: Path):
    with pytest.raises(OptionError, match="folder"):
        fit(make(), examples(), resume=True, **SMALL)
    with pytest.raises(CheckpointError, match="no run to continue"):
        fit(make(), examples(), folder=tmp_path / "none", resume=True, **SMALL)
    assert not (tmp_path / "none").exists()
    folder = tmp_path / "run"
    fit(make(), examples(), folder=folder, **SMALL)
    path = folder / "resume.safetensors"
    good = path.read_bytes()
    for bad in (b"", good[:-10], good[:3000] + bytes([good[3000] ^ 1]) + good[3001:], b"\x80\x04.", b"PK\x03\x04"):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            fit(make(), examples(), folder=folder, resume=True, **SMALL)
        assert path.read_bytes() == bad
    path.write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="kind 'model'"):
        fit(make(), examples(), folder=folder, resume=True, **SMALL)


def test_a_run_is_not_overwritten(tmp_path: Path):
    fit(make(), examples(), folder=tmp_path, **SMALL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OptionError, match="resume that run"):
        fit(make(), examples(), folder=tmp_path, **SMALL)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.reliability("F26")
def test_a_folder_in_use_is_refused(tmp_path: Path):
    with checkpoint.lock(tmp_path), pytest.raises(OptionError, match="in use"):
        fit(make(), examples(), folder=tmp_path, **SMALL)
    assert fit(make(), examples(), folder=tmp_path, **SMALL).steps == 10


# ---------------------------------------------------------------------- bad input


@pytest.mark.reliability("F13", "F15", "F20")
def test_bad_data_is_refused():
    good = examples()
    nan, infinite = good.clone(), good.clone()
    nan[3, 1], infinite[5, 0] = math.nan, math.inf
    bad = [
        (nan, DataError, r"data\[3\] holds NaN"),
        (infinite, DataError, r"data\[5\] holds"),
        (good[:0], DataError, "N >= 1"),
        (good[None], DataError, "shape"),
        (good[:, :2], ShapeError, "shape"),
        (good.long(), ShapeError, "dtype"),
        (good.double(), DataError, "dtype torch.float64"),
        (good.numpy(), ShapeError, "ndarray"),
        (good[:4], OptionError, "more than the 4 training examples"),
    ]
    diffusion = make()
    before = weights(diffusion)
    for data, error, message in bad:
        with pytest.raises(error, match=message):
            fit(diffusion, data, **SMALL)
        if len(data) != 4:
            with pytest.raises(error, match=message.replace("data", "validation")):
                fit(diffusion, good, data, **SMALL)
    with pytest.raises(DataError, match="y is no tensor with a row"):
        fit(diffusion, good, cond={"y": torch.zeros(3)}, **SMALL)
    same(before, weights(diffusion))


def test_data_off_the_grid_of_the_bins_are_refused():
    grid = (examples().clamp(-1, 1) * 8).round() / 8
    fit(make(bins=(17, -1.0, 1.0)), grid, **SMALL)
    for bad in (grid * 3, grid + 0.02, grid * 127.5):
        with pytest.raises(DataError, match="off the grid"):
            fit(make(bins=(17, -1.0, 1.0)), bad, **SMALL)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("steps", "batch_size", "accumulate", "validate_every", "validation_timesteps")
          for value in (0, -1, 2.5)),
        *({"lr": value} for value in (0.0, -1.0, math.nan, math.inf)),
        *({"clip_norm": value} for value in (0.0, math.nan)),
        {"warmup": -1}, {"weight_decay": -1.0}, {"weight_decay": math.nan}, {"ema_decay": 1.0}, {"ema_decay": math.nan},
        {"accumulate": 3}, {"kl": "exact"}, {"timesteps": "linear"}, {"precision": "fp8"}, {"lr_schedule": "step"},
        {"seed": -1}, {"seed": 2**63}, {"device": "abacus"}, {"device": "meta"}, {"device": "cuda:99"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(change: dict):
    with pytest.raises(OptionError, match=next(iter(change))) as caught:
        fit(make(), examples(), **{**SMALL, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.reliability("F28", "Q21")
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 - 1])
def test_any_seed_gives_the_same_run_twice(seed: int):
    first, second = make(), make()
    for diffusion in (first, second):
        fit(diffusion, examples(), examples(9), **{**SMALL, "steps": 3}, seed=seed)
    same(weights(first), weights(second))


# ---------------------------------------------------------------------- faults


@pytest.mark.reliability("Q19", "F14")
@pytest.mark.parametrize("when", [1, 2, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bins", [None, (17, -1.0, 1.0)], ids=["continuous", "bins"])
def test_a_non_finite_step_changes_nothing_and_is_counted(monkeypatch, when: int, value: float, bins, figure):
    data = (examples().clamp(-1, 1) * 8).round() / 8
    states, runs, init = [], [], loop._Run.__init__
    monkeypatch.setattr(loop._Run, "__init__", lambda self, *a: (runs.append(self), init(self, *a))[1])
    step = loop._Run.step

    def spy(self, *args):
        step(self, *args)
        states.append(
            {
                "weights": weights(self.diffusion),
                "optimizer": json.loads(json.dumps(self.optimizer.state_dict(), default=lambda x: x.tolist())),
                "ema": self.ema.state_dict(),
            }
        )

    monkeypatch.setattr(loop._Run, "step", spy)
    diffusion = make(bins=bins)
    on_call(diffusion, lambda output: output * value, when)
    result = fit(diffusion, data, data[:9], **SMALL, validate_every=5)
    assert result.skipped == 1 and result.steps == 10
    if when > 1:
        same(states[when - 2], states[when - 1])
        moved = sum(not torch.equal(a, states[when - 1]["weights"][k]) for k, a in states[when - 2]["weights"].items())
        figure("Q19", "tensors that a bad step moved", moved, at_most=0)
    with pytest.raises(AssertionError):
        same(states[when - 1], states[when])
    assert all(v.isfinite().all() for v in diffusion.state_dict().values())
    assert all(math.isfinite(v) for v in result.records[-1].values())


@pytest.mark.reliability("Q19", "F14")
def test_a_loss_that_is_not_finite_is_enough(monkeypatch):
    """Its gradient can be finite all the same."""
    original = loop._Run._loss
    calls = []

    def loss(self, *args):
        calls.append(1)
        return original(self, *args) + (math.inf if len(calls) == 4 else 0)

    monkeypatch.setattr(loop._Run, "_loss", loss)
    result = fit(make(), examples(), **SMALL)
    assert result.skipped == 1
    assert math.isfinite(result.records[-1]["train_loss_nats_per_dim"])


@pytest.mark.reliability("Q19", "F14")
def test_divergence_ends_with_the_last_good_state_on_disk(tmp_path: Path):
    diffusion, calls, good = make(), [], {}

    def hook(module, args, output):
        if not module.training:
            return None
        calls.append(1)
        if len(calls) == 7:
            good.update(weights(diffusion))
        return output * math.nan if len(calls) >= 7 else None

    diffusion.net.register_forward_hook(hook)
    with pytest.raises(DivergenceError, match="20 steps in a row") as caught:
        fit(diffusion, examples(), folder=tmp_path, **{**SMALL, "steps": 100}, validate_every=50)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(calls) == 26
    same(checkpoint.read(tmp_path / "resume.safetensors", kind="resume")["weights"], good)
    result = fit(make(), examples(), folder=tmp_path, resume=True, **{**SMALL, "steps": 100}, validate_every=50)
    assert result.steps == 100 and result.skipped == 20


@pytest.mark.reliability("Q19", "F14")
def test_nineteen_bad_steps_in_a_row_are_survived_also_across_a_resume(tmp_path: Path):
    def train(stop: int | None, bad: range) -> object:
        diffusion = make()
        calls = [0]

        def hook(module, args, output):
            if module.training:
                calls[0] += 1
                if calls[0] == stop:
                    signal.raise_signal(signal.SIGINT)
                return output * math.nan if calls[0] in bad else None
            return None

        diffusion.net.register_forward_hook(hook)
        return fit(diffusion, examples(), folder=tmp_path, resume=stop is None, **{**SMALL, "steps": 40})

    assert train(12, range(3, 13)).skipped == 10
    with pytest.raises(DivergenceError):  # ten before, ten after: twenty in a row
        train(None, range(1, 100))
    assert checkpoint.read(tmp_path / "resume.safetensors", kind="resume")["result"]["steps"] == 22


@pytest.mark.reliability("F22")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_handlers_of_signals_are_put_back(number: int):
    def mine(*args):
        raise PyrodiffError("the second signal acts at once")

    previous = signal.signal(number, mine)
    try:
        diffusion = make()
        on_call(diffusion, lambda output: signal.raise_signal(number), 2)
        assert fit(diffusion, examples(), **SMALL).steps == 2
        assert signal.getsignal(number) is mine
        diffusion = make()
        on_call(diffusion, lambda output: (signal.raise_signal(number), signal.raise_signal(number)), 2)
        with pytest.raises(PyrodiffError, match="at once"):
            fit(diffusion, examples(), **SMALL)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, previous)


@pytest.mark.reliability("F22")
def test_a_second_ctrl_c_leaves_the_earlier_state(tmp_path: Path):
    diffusion, options = make(), {**SMALL, "validate_every": 3}

    def twice(output: torch.Tensor) -> None:
        for _ in range(2):  # apart, for a handler runs some time after its signal, and two signals at once are one
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.05)

    on_call(diffusion, twice, 5)
    # What starts a process in the background may have it ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(diffusion, examples(), folder=tmp_path / "cut", **options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint.read(tmp_path / "cut" / "resume.safetensors", kind="resume")["result"]["steps"] == 3
    fit(make(), examples(), folder=tmp_path / "cut", resume=True, **options)
    fit(make(), examples(), folder=tmp_path / "whole", **options)
    same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


@pytest.mark.slow
@pytest.mark.reliability("F22")
def test_ctrl_c_at_any_moment_of_a_process(tmp_path: Path):
    fit(make(Dropout), examples(), folder=tmp_path / "whole", **options_of("importance"))
    slow = SCRIPT.replace("import test_fit as t\n", SLOW)
    rng = np.random.default_rng(0)
    for i, wait in enumerate(rng.uniform(0, 0.5, size=2)):
        folder = tmp_path / str(i)
        code = slow.format(tests=str(Path(__file__).parent), folder=str(folder), resume=False)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "first step\n"
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
        fit(make(Dropout), examples(), folder=folder, resume=True, **options_of("importance"))
        same(state_of(tmp_path / "whole"), state_of(folder), f"after {wait}")


# Steps of 0.1 s, so that the signal meets one of them, a validation or a save.
SLOW = """
import test_fit as t
import time
original = t.loop._Run._loss
def slow(self, *args):
    if self.result.steps == 0:
        print("first step", flush=True)
    time.sleep(0.1)
    return original(self, *args)
t.loop._Run._loss = slow
"""


def test_a_thread_other_than_the_main_one_can_train():
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(make(), examples(), **SMALL)))
    thread.start()
    thread.join(timeout=60)
    assert results[0].steps == 10


# ---------------------------------------------------------------------- validation, and what is left behind


def test_validation_keeps_the_best_weights(tmp_path: Path):
    """A rate that ruins the weights after step 6: the best is an earlier validation's."""
    diffusion, kept = make(), {}
    original = loop._Run._lr

    def rate(self, steps):
        if self.result.steps == 7:
            with torch.no_grad():
                for parameter in self.diffusion.parameters():
                    parameter.add_(3.0)
        return original(self, steps) if self.result.steps < 7 else 1e-6

    save = checkpoint.save

    def spy(folder, module):
        kept["weights"] = weights(module)
        return save(folder, module)

    loop._Run._lr, loop.checkpoint.save = rate, spy
    try:
        result = fit(
            diffusion,
            examples(),
            examples(12),
            folder=tmp_path,
            **{**SMALL, "steps": 10},
            validate_every=3,
            ema_decay=0.2,
        )
    finally:
        loop._Run._lr, loop.checkpoint.save = original, save
    bounds = {record["step"]: record["validation_bits_per_dim"] for record in result.records}
    assert result.best_step == 6 == min(bounds, key=bounds.get) and bounds[10] > bounds[6] + 1
    assert result.best.mean == bounds[6]
    same(weights(diffusion), kept["weights"])
    same(weights(pyrodiff.load(tmp_path)), kept["weights"])
    assert not diffusion.training


def test_a_bound_that_is_not_a_number_does_not_stay_the_best(monkeypatch):
    values = iter([math.nan, math.inf, 3.0, math.nan, 4.0])
    original = loop.bits_per_dim
    monkeypatch.setattr(loop, "bits_per_dim", lambda terms: original(terms)._replace(mean=next(values)))
    result = fit(make(), examples(), examples(9), **SMALL, validate_every=2)
    assert result.best.mean == 3.0 and result.best_step == 6


def test_without_validation_data_the_last_average_is_kept():
    diffusion = make()
    result = fit(diffusion, examples(), **SMALL)
    assert result.best is None and result.best_step == 10 and len(result.records) == 10


def test_validating_does_not_change_training():
    often, never = make(Dropout), make(Dropout)
    fit(often, examples(), **SMALL, validate_every=1)
    fit(never, examples(), **SMALL, validate_every=10)
    same(weights(often), weights(never))
    records = {}
    for every in (2, 10):
        records[every] = fit(make(Dropout), examples(), examples(12), **SMALL, validate_every=every).records
    # A record's training loss is the mean since the record before.
    means = [record["train_loss_nats_per_dim"] for record in records[2]]
    assert len(means) == 5 and len(records[10]) == 1
    assert sum(means) / 5 == pytest.approx(records[10][0]["train_loss_nats_per_dim"], rel=1e-12)
    assert records[2][-1]["validation_bits_per_dim"] == records[10][0]["validation_bits_per_dim"]


@pytest.mark.reliability("Q22")
def test_nothing_global_changes():
    torch.manual_seed(3)
    state, store = torch.get_rng_state(), dict(pyro.get_param_store().items())
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    diffusion = make(variance="learned_range")
    torch.manual_seed(3)
    hooks = len(diffusion.net._forward_hooks)
    fit(diffusion, examples(), examples(9), **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(pyro.get_param_store().items()) == store == {}
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(diffusion.net._forward_hooks) == hooks
    on_call(diffusion, lambda output: output * math.nan, 1)
    diffusion.net.register_forward_hook(lambda module, args, output: 1 / 0 if module.training else None)
    with pytest.raises(ZeroDivisionError):  # likewise on the way out of an error
        fit(diffusion, examples(), **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_two_fits_in_one_process_are_each_as_if_alone():
    alone, first, second = make(), make(), make(Dropout)
    fit(alone, examples(), **SMALL)
    fit(second, examples(), **SMALL)
    fit(first, examples(), **SMALL)
    same(weights(alone), weights(first))
    before = weights(first)
    fit(first, examples(), **SMALL)  # and once more, from where it is
    with pytest.raises(AssertionError):
        same(before, weights(first))


def test_rank_zero_alone_is_the_default_and_files_are_the_documented_ones(tmp_path: Path):
    fit(make(), examples(), folder=tmp_path / "deep" / "run", **SMALL)
    names = {path.name for path in (tmp_path / "deep" / "run").iterdir()}
    kept = {"model.previous.safetensors", "resume.previous.safetensors"}
    assert names == kept | {".lock", "config.json", "metrics.jsonl", "model.safetensors", "resume.safetensors"}


@pytest.mark.reliability("F27")
def test_a_log_file_gets_a_line_per_validation(capsys):
    fit(make(), examples(), examples(9), **{**SMALL, "progress": True}, validate_every=5)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and [line.split(":")[0] for line in lines] == ["step 5 of 10", "step 10 of 10"]
    assert all("bits/dim, validation" in line for line in lines) and "\r" not in err


def test_bf16_autocast_trains_and_keeps_float32_weights():
    dtypes = []
    diffusion = make()
    diffusion.net.input.register_forward_hook(lambda m, args, out: dtypes.append((m.training, out.dtype)))
    data = examples(200)
    before = pyrodiff.bits_per_dim(pyrodiff.elbo_terms(diffusion, data)).mean
    dtypes.clear()
    result = fit(diffusion, data, **{**SMALL, "steps": 100, "batch_size": 32}, precision="bf16", ema_decay=0.9)
    assert result.skipped == 0
    assert {dtype for training, dtype in dtypes if training} == {torch.bfloat16}
    assert {value.dtype for value in diffusion.state_dict().values()} == {torch.float32}
    assert pyrodiff.bits_per_dim(pyrodiff.elbo_terms(diffusion, data)).mean < before - 0.1


@pytest.mark.reliability("Q15", "F10")
def test_a_unet_with_dropout_resumes_bit_for_bit(tmp_path: Path):
    def build() -> GaussianDiffusion:
        torch.manual_seed(0)
        net = UNet(1, width=4, multipliers=(1,), blocks=1, dropout=0.2)
        return GaussianDiffusion(net, CosineSchedule(6), (1, 4, 4), bins=(17, -1.0, 1.0), decoder="learned")

    data = (torch.from_numpy(np.random.default_rng(0).integers(0, 17, (16, 1, 4, 4))) / 8 - 1).float()
    options = {**SMALL, "steps": 4, "precision": "bf16"}
    whole, cut = build(), build()
    fit(whole, data, folder=tmp_path / "whole", **options)
    hook = stop_at(cut, 2)
    fit(cut, data, folder=tmp_path / "cut", **options)
    hook.remove()
    fit(cut, data, folder=tmp_path / "cut", resume=True, **options)
    same(weights(whole), weights(cut))


def test_several_processes_without_lightning_name_the_extra(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("lightning", "lightning.fabric", "lightning_fabric"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=r"pyrodiff\[distributed\]"):
        fit(make(), examples(), **SMALL)
    assert os.environ["WORLD_SIZE"] == "2"


def test_weight_decay_leaves_schedule_and_decoder_alone(monkeypatch):
    """At a gradient of 0 AdamW moves what it decays, and nothing else."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    schedule = pyrodiff.LearnedSchedule(6, -3.0, 3.0)
    diffusion = GaussianDiffusion(MLP(3, width=8, depth=1), schedule, (3,), decoder="learned")
    before = {name: p.detach().clone() for name, p in diffusion.named_parameters()}
    for parameter in diffusion.parameters():
        parameter.grad = torch.zeros_like(parameter)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None)
    fit(diffusion, examples(), **(SMALL | {"steps": 3, "weight_decay": 0.5, "ema_decay": 0.0}))
    moved = {name for name, p in diffusion.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".net." in name for name in moved)
    assert {name for name in before if ".net." in name and before[name].any()} <= moved


def test_an_objective_that_is_no_bound_does_not_train_a_schedule():
    diffusion = GaussianDiffusion(MLP(3), pyrodiff.LearnedSchedule(6, -3.0, 3.0), (3,), objective="simple")
    with pytest.raises(OptionError, match="learned schedule"):
        fit(diffusion, examples(), **SMALL)
