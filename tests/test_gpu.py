"""What must be the same on CUDA as on the CPU: the bound, the samples, resume; and training there under bfloat16."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path

import pyro
import pytest
import torch
from monte_carlo import assert_estimate
from pyro import poutine

import pyrodiff
from pyrodiff import CosineSchedule, GaussianDiffusion, LogLinearSchedule, bits_per_dim, elbo_terms, fit, sample
from pyrodiff.elbo import site_terms
from pyrodiff.nets import MLP, UNet
from pyrodiff.training import checkpoint
from pyrodiff.training._engine import check_device

pytestmark = pytest.mark.gpu
loop = importlib.import_module("pyrodiff.training.fit")

BINS = (17, -1.0, 1.0)


def make(steps: int = 12, **options) -> GaussianDiffusion:
    net = UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=(1,), out_channels=options.pop("out_channels", 1))
    with torch.no_grad():  # a fresh network returns 0
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return GaussianDiffusion(net, CosineSchedule(steps), (1, 8, 8), bins=BINS, **options)


def images(n: int = 16) -> torch.Tensor:
    return torch.randint(0, 17, (n, 1, 8, 8)).float() / 8 - 1


def on_cuda(diffusion: GaussianDiffusion, tmp_path: Path) -> GaussianDiffusion:
    pyrodiff.save(tmp_path / "copy", diffusion)
    return pyrodiff.load(tmp_path / "copy", device="cuda")


def moved(trace: poutine.Trace) -> poutine.Trace:
    trace = trace.copy()
    for name, site in list(trace.nodes.items()):
        if site["type"] == "sample" and isinstance(site["value"], torch.Tensor):
            trace.nodes[name] = {**site, "value": site["value"].cuda()}  # the copy's sites are the original's
    return trace


def test_what_else_the_tests_here_rest_on():
    """Of any CUDA device, and of the simulated one: it refuses the CPU's tensors and generators, and draws numbers of its own."""
    ours, cpus = torch.arange(3.0, device="cuda"), torch.arange(3.0)
    for mixed in (
        lambda: ours + cpus,
        lambda: cpus.add_(ours),
        lambda: torch.cat([ours, cpus]),
        lambda: torch.where(ours > 1, ours, cpus),
        lambda: torch.nn.functional.linear(ours, cpus[None]),
        lambda: cpus[ours.long()],
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: torch.zeros(3, device="cuda:99"),
    ):
        with pytest.raises(RuntimeError):
            mixed()
    with pytest.raises(TypeError):
        ours.numpy()
    assert (ours + cpus[1])[cpus.long()].tolist() == [1, 2, 3]  # numbers and indices may be the CPU's
    before = torch.get_rng_state()
    with torch.random.fork_rng([ours.device]):
        torch.cuda.manual_seed(1)
        first, state = torch.randn(4, device="cuda"), torch.cuda.get_rng_state()
        after = torch.randn(4, device="cuda")
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.randn(4, device="cuda"), after) and not torch.equal(first, after)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.autocast("cuda", torch.bfloat16):
        assert (ours[:, None] @ ours[None]).dtype == torch.bfloat16


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_the_bound_of_given_noise_is_the_cpus(kl: str, one_step: bool, variance: str, tmp_path: Path):
    cpu = make(variance=variance, out_channels=2 if variance == "learned_range" else 1, decoder="learned")
    cpu.eval()
    cuda = on_cuda(cpu, tmp_path).eval()
    x0 = images(13)
    t = torch.arange(13) % 12 + 1 if one_step else None
    with torch.no_grad(), pyro.settings.context(module_local_params=True):
        noise = poutine.trace(cpu.guide).get_trace(x0, t)
        mine = poutine.trace(poutine.replay(cpu.model, trace=noise)).get_trace(x0, t)
        there = None if t is None else t.cuda()
        # the guide scores the CPU's values on CUDA: its own laws there, the same noise
        guide = poutine.trace(poutine.replay(cuda.guide, trace=moved(noise))).get_trace(x0.cuda(), there)
        model = poutine.trace(poutine.replay(cuda.model, trace=moved(noise))).get_trace(x0.cuda(), there)
        expected, found = site_terms(mine, noise, kl), site_terms(model, guide, kl)
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert found[name].device.type == "cuda"
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[name].cpu(), value, rtol=1e-3, atol=1e-3 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("method", ["ancestral", "ddim"])
@pytest.mark.parametrize("last", ["mean", "sample"])
def test_samples_are_the_cpus(method: str, last: str, tmp_path: Path):
    cpu = make()
    cpu.reverse_kernel.bins = None  # a draw from a grid jumps by a level where a rounding error tips it over
    cuda = on_cuda(make(), tmp_path)
    cuda.load_state_dict(cpu.state_dict())
    cuda.reverse_kernel.bins = None
    a, b = (sample(d, 9, method, seed=4, last=last, batch_size=4) for d in (cpu, cuda))
    assert b.device.type == "cuda"
    torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-5 * a.abs().max().item())  # in the hundreds: random weights


@pytest.mark.monte_carlo
def test_elbo_terms_run_there_and_agree_within_their_noise(tmp_path: Path):
    cpu = make()
    cuda = on_cuda(cpu, tmp_path)
    x0 = images(32)
    a = bits_per_dim(elbo_terms(cpu, x0, repeats=32))
    b = bits_per_dim(elbo_terms(cuda, x0.cuda(), repeats=32))
    # the same images, other noise; random weights, so that the bound is in the hundreds
    rounding = 1e-3 * a.mean
    assert_estimate(
        a.mean - b.mean, (a.se_noise**2 + b.se_noise**2) ** 0.5, (-rounding, rounding), detects=0.1 * a.mean
    )


def compared(diffusion: GaussianDiffusion, x0: torch.Tensor):
    return pyrodiff.compare_estimators(diffusion, x0, timesteps=(1,), iwae=(2,), gradients=None).values


SCORES = {
    "elbo_terms": lambda d, x0: elbo_terms(d, x0, t=4).draws["analytic"][1],
    "log_likelihood": lambda d, x0: pyrodiff.log_likelihood(d, x0, "immse", points=4).draws,
    "estimate_elbo": lambda d, x0: pyrodiff.estimate_elbo(d, x0, se=1e3).mean,
    "compare_estimators": lambda d, x0: compared(d, x0)["mean"].dropna().to_numpy(copy=True),
    "invert": lambda d, x0: pyrodiff.invert(d, x0),
}


@pytest.mark.parametrize("name", SCORES)
def test_data_are_scored_where_the_network_is(name: str):
    diffusion, x0 = make(4).cuda(), images(16)
    before = x0.clone()
    found = [torch.as_tensor(SCORES[name](diffusion, x)) for x in (x0, x0.cuda())]
    assert found[0].device == found[1].device and found[0].shape == found[1].shape
    assert all(value.isfinite().all() for value in found)
    assert torch.equal(x0, before)


def test_a_classifier_is_scored_where_it_is():
    net = pyrodiff.nets.MLP(3, width=8, depth=1, out_features=2)
    classifier = pyrodiff.NoisyClassifier(net, CosineSchedule(4), (3,)).cuda()
    entropy, share = classifier.score(torch.randn(6, 3), torch.arange(6) % 2)
    assert entropy.mean > 0 and 0 <= share <= 1


def interrupted(diffusion: GaussianDiffusion, cut: int, *args, **options) -> loop.Fit:
    """A run that Ctrl-C ends in step ``cut``."""
    calls = [0]

    def stop(module, args, output):
        calls[0] += module.training
        if module.training and calls[0] == cut:
            signal.raise_signal(signal.SIGINT)

    hook = diffusion.net.register_forward_hook(stop)
    result = fit(diffusion, *args, **options)
    hook.remove()
    assert result.interrupted
    return result


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("rule", loop.TIMESTEPS)
def test_resuming_there_continues_bit_for_bit(precision: str, rule: str, tmp_path: Path):
    # Without convolutions: cuDNN's gradients may add up in another order each time.
    def build() -> GaussianDiffusion:
        torch.manual_seed(0)
        return GaussianDiffusion(MLP(3, width=32, depth=1), CosineSchedule(12), (3,), decoder="learned")

    data = torch.randn(64, 3)
    options = {"steps": 12, "batch_size": 16, "validate_every": 5, "timesteps": rule, "precision": precision}
    options |= {"device": "cuda", "progress": False}
    whole = build()
    before = torch.cuda.get_rng_state()
    fit(whole, data, data[:8], folder=tmp_path / "whole", **options)
    assert next(whole.parameters()).device.type == "cuda"
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for cut in (1, 5, 8):
        assert interrupted(build(), cut, data, data[:8], folder=tmp_path / str(cut), **options).steps == cut
        second = build()
        fit(second, data, data[:8], folder=tmp_path / str(cut), resume=True, **options)
        for key, value in whole.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), (cut, key)
        trees = [checkpoint.read(tmp_path / n / "resume.safetensors", kind="resume") for n in ("whole", str(cut))]
        for a, b in zip(*(tree["ema"]["average"] for tree in trees), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_elsewhere(first: str, second: str, tmp_path: Path):
    """From what the other device left, to the bit; the noise after that is each device's own."""
    data, options = images(64), {"steps": 8, "batch_size": 16, "folder": tmp_path, "progress": False}
    other = make()
    assert interrupted(make(), 4, data, data[:8], device=first, **options).steps == 4
    left = checkpoint.read(tmp_path / "resume.safetensors", kind="resume")
    seen = []
    hook = other.net.register_forward_pre_hook(
        lambda module, _: seen.append({k: v.cpu().clone() for k, v in other.state_dict().items()})
    )
    result = fit(other, data, data[:8], device=second, resume=True, **options)
    hook.remove()
    assert result.steps == 8 and result.skipped == 0 and next(other.parameters()).device.type == second
    for key, value in left["weights"].items():
        assert torch.equal(value, seen[0][key]), key
    after = checkpoint.read(tmp_path / "resume.safetensors", kind="resume")
    assert after["ema"]["updates"] == left["ema"]["updates"] + 4


def test_a_non_finite_step_is_skipped_there():
    diffusion, calls = make(), [0]

    def poison(module, args, output):
        calls[0] += module.training
        return output * float("nan") if module.training and calls[0] in (1, 4) else None

    diffusion.net.register_forward_hook(poison)
    data = images(32)
    result = fit(diffusion, data, steps=6, batch_size=8, device="cuda", precision="bf16", progress=False)
    assert result.skipped == 2
    assert all(value.isfinite().all() for value in diffusion.state_dict().values())


def test_cuda_is_the_default_device():
    diffusion = make()
    fit(diffusion, images(), steps=1, batch_size=8, progress=False)
    assert {p.device.type for p in diffusion.parameters()} == {"cuda"}


def test_a_process_looks_at_its_own_gpu(monkeypatch: pytest.MonkeyPatch):
    for rank in range(torch.cuda.device_count()):
        monkeypatch.setenv("LOCAL_RANK", str(rank))  # as torchrun does
        assert check_device(None) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(pyrodiff.errors.OptionError, match="device='cuda' cannot be used"):
        check_device("cuda")
    assert check_device("cuda:0").index == 0


@pytest.mark.monte_carlo
def test_digits_under_bf16_learn_and_the_bound_is_the_cpus(tmp_path: Path):
    pytest.importorskip("sklearn")
    digits = pyrodiff.load_data("digits")
    net = UNet(1, width=16, multipliers=(1, 2), blocks=1, attention=(1,), fourier_features=(3, 4))
    schedule = LogLinearSchedule(1000, -6.0, 6.5)
    diffusion = GaussianDiffusion(net, schedule, (1, 8, 8), prediction="v", decoder="learned", bins=digits.bins)
    result = fit(
        diffusion, digits.train, digits.validation, steps=300, batch_size=64, lr=3e-3, ema_decay=0.98, precision="bf16",
        device="cuda", folder=tmp_path, validate_every=100, progress=False,
    )  # fmt: skip
    bounds = [record["validation_bits_per_dim"] for record in result.records]
    assert result.skipped == 0
    assert bounds[-1] < bounds[0] and bounds[-1] < 2.6  # a uniform guess costs log2(17) = 4.09
    cpu = pyrodiff.load(tmp_path)
    a = bits_per_dim(elbo_terms(cpu, digits.test, 16, repeats=4))
    b = bits_per_dim(elbo_terms(pyrodiff.load(tmp_path, device="cuda"), digits.test.cuda(), 16, repeats=4))
    # the same weights and images, other noise
    assert_estimate(a.mean - b.mean, (a.se_noise**2 + b.se_noise**2) ** 0.5, (-2e-3, 2e-3), detects=1.0)
