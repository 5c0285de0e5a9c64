"""The samplers against diffusers' schedulers, an installed peer: the same network and noise in, the same states out.

``docs/diffusers.md`` is the other half of this file: the differences that it states are the limits here, and its list of what
diffusers does wrong is measured anew. Its tables are float32 and so are, in some schedulers, its steps; therefore each pair is
compared twice:

* **as installed**, to at most ``INSTALLED`` = 1.1e-3: what they re-derive from float32 tables, a beta first of all, is off by up
  to that, relative (``test_their_tables``); the states are of order 1, and the steps do not amplify an error;
* **with float64 tables** put in the place of theirs, where the same formula gives the same numbers: to ``FORMULA`` = 1e-9 (1e-16 of
  states that are divided by alpha_T, 5e-5 for the cosine schedule; and 1e-10 of noise in their last step, whose variance they
  clamp to 1e-20), or, where their steps compute in float32, to ``SINGLE`` = 1e-5 (6e-8 a few times in each of 20 steps, of
  states up to 5).
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import DDPM, MEAN, VAR, GaussianDenoiser, MixtureDenoiser
from torch import Tensor, nn

from pyrodiff import CosineSchedule, ForwardProcess, GaussianDiffusion, LinearSchedule, sample, trajectory
from pyrodiff.sample import invert
from pyrodiff.schedules import Schedule, kept_steps

peer = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, of numpy 2

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "diffusers.md"
FORMULA, SINGLE, INSTALLED = 1e-9, 1e-5, 1.1e-3
T = 1000
CHAINS = {"linear": LinearSchedule(T), "squaredcos_cap_v2": CosineSchedule(T)}
TABLES = {chain: DDPM(schedule.betas.numpy()) for chain, schedule in CHAINS.items()}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SHAPE, BATCH = (2, 3), 16
SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]

every_chain = pytest.mark.parametrize("chain", CHAINS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """It imports its classes when they are first asked for, some of them not without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in rows("Scheduler by scheduler"):
            getattr(peer, name)


def rows(section: str) -> dict[str, list[str]]:
    """A table of the documentation: by the first cell of a row, the others."""
    text = DOCUMENTATION.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [re.split(r" \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return {first.replace("`", ""): others for first, *others in cells[1:]}


# ---------------------------------------------------------------------- theirs and ours


def network(chain: str, prediction: str, gain: float = 0.0, learned: bool = False) -> nn.Module:
    """Of a mixture with modes at -0.8 and 0.7; exact without ``gain``, and with it often outside of [-1, 1]."""
    variances = (TABLES[chain].beta, torch.linspace(-1, 1, T).double().numpy()) if learned else (None, None)
    law = ([0.4, 0.6], [-0.8, 0.7], [0.02, 0.05])
    return float64(MixtureDenoiser(*law, PREDICTIONS[prediction], *variances, gain=gain))


def float64(net: nn.Module) -> nn.Module:
    """The network, which has no parameters, with one: samples take its dtype."""
    net.register_parameter("float64", nn.Parameter(torch.zeros((), dtype=torch.float64)))
    return net


def noise(steps: int) -> list[Tensor]:
    """x_T and a draw for each step: what a generator of seed 0 gives, in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(steps + 1)]


def kept(scheduler: Any) -> list[int]:
    """The steps of ours that a scheduler visits: its indices, plus one."""
    return sorted({int(index) + 1 for index in scheduler.timesteps})


def as_installed(scheduler: Any) -> Any:
    """The scheduler."""
    return scheduler


def exact(scheduler: Any) -> Any:
    """The scheduler with float64 tables, in the place of its own."""
    table = TABLES[scheduler.config.beta_schedule]
    if hasattr(scheduler, "sigmas"):
        ratio = torch.from_numpy((table.om / table.ab) ** 0.5)
        end = ratio[:1] if scheduler.config.get("final_sigmas_type") == "sigma_min" else torch.zeros_like(ratio[:1])
        scheduler.sigmas = torch.cat([ratio[[int(index) for index in scheduler.timesteps]], end])
    scheduler.alphas_cumprod = torch.from_numpy(table.ab)
    return scheduler


def their_path(scheduler: Any, net: nn.Module, chain: str, noises: list[Tensor], **options: Any) -> Tensor:
    """All states x_t from x_T on, as their pipelines make them: ``[K + 1, B, *SHAPE]``."""
    schedule, name = CHAINS[chain], type(scheduler).__name__
    divided = name in ("HeunDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    alpha = [schedule.alpha(t) if divided else 1.0 for t in [*kept(scheduler)[::-1], 0]]
    generator = torch.Generator().manual_seed(0)
    torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64)
    if name in ("DDPMScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler"):
        options["generator"] = generator
    path = [noises[0] / alpha[0]]
    for i, index in enumerate(scheduler.timesteps):
        if name == "DPMSolverMultistepScheduler":
            options["variance_noise"] = noises[i + 1]
        shown = scheduler.scale_model_input(path[-1], index).double()
        with torch.no_grad():
            output = net(shown, schedule.log_snr(torch.tensor(int(index) + 1)).expand(BATCH))
        path.append(scheduler.step(output, index, path[-1], **options).prev_sample)
    if name == "HeunDiscreteScheduler":  # two calls for a step but the last
        path = [*path[:-1:2], path[-1]]
    return torch.stack([a * x for a, x in zip(alpha, path, strict=True)])


@pytest.fixture
def our_path(monkeypatch):
    """``trajectory`` on given noise instead of its own streams."""
    module = importlib.import_module("pyrodiff.sample")

    def path(diffusion, method, steps, noises, **options):
        states = iter(noises)
        monkeypatch.setattr(module, "_noise", lambda *args: states)
        return trajectory(diffusion, len(noises[0]), method, steps=steps, **options)

    return path


def check(name: str, ours: Tensor, *theirs: Tensor) -> None:
    """As installed and with float64 tables, to the differences that the documentation states."""
    stated = [float(cell) for cell in rows("Scheduler by scheduler")[name][-2:]]
    assert stated[0] <= INSTALLED and stated[1] in (FORMULA, SINGLE)
    for path, limit in zip(theirs, stated, strict=True):
        difference = (path - ours).abs().max().item()
        assert difference < limit, f"{name} is off by {difference:.1e}"


# ---------------------------------------------------------------------- which steps


def indices(count, **options):
    scheduler = peer.DDPMScheduler(num_train_timesteps=T, **options)
    scheduler.set_timesteps(count)
    return kept(scheduler)


@pytest.mark.parametrize("count", [1, 2, 10, 20, 21, 30, 50, 100, 300, T])
def test_spacings(count):
    stride = T // count
    assert indices(count) == list(range(1, 1 + count * stride, stride))
    assert indices(count, steps_offset=1)[: count - 1] == list(range(2, 2 + count * stride, stride))[: count - 1]
    assert indices(count, timestep_spacing="trailing") == [round(i * T / count) for i in range(1, count + 1)]
    spread, ours = indices(count, timestep_spacing="linspace"), kept_steps(T, count)
    assert (spread == ours) == (count != 21)  # where halves are rounded, up or down
    assert all(abs(a - b) <= 1 for a, b in zip(spread, ours, strict=True))
    if T % count == 0:
        assert indices(count) == kept_steps(T, f"ddim{count}")


@pytest.mark.parametrize("count", [10, 20, 100])
def test_spacings_of_multistep_solvers(count):
    """Those of one more, less the first; but for "trailing"."""
    for spacing, more in (("linspace", 1), ("leading", 1), ("trailing", 0)):
        scheduler = peer.DPMSolverMultistepScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(count)
        assert kept(scheduler) == indices(count + more, timestep_spacing=spacing)[more:]


# ---------------------------------------------------------------------- DDPM and DDIM


def compare(our_path, name, chain, prediction, count, method, eta=0.0, clip=False, variance="fixed_small", **options):
    """A scheduler of theirs and a method of ours, state by state."""
    net = network(chain, prediction, gain=0.3 if clip else 0.0, learned=variance == "learned_range")
    noises = noise(count)
    given: dict[str, Any] = {"eta": eta, "use_clipped_model_output": True} if name == "DDIMScheduler" else {}
    if name in ("DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler"):
        options["clip_sample"] = clip
    if name == "DDPMScheduler":
        options["variance_type"] = variance

    def scheduler():
        options.setdefault("beta_start", 0.0001)  # the defaults of some of them are those of Stable Diffusion
        options.setdefault("beta_end", 0.02)
        found = getattr(peer, name)(beta_schedule=chain, prediction_type=prediction, **options)
        found.set_timesteps(count)
        return found

    diffusion = GaussianDiffusion(net, CHAINS[chain], SHAPE, PREDICTIONS[prediction], variance, clip=clip)
    ours = our_path(diffusion, method, kept(scheduler()), noises, eta=eta)
    theirs = [their_path(tables(scheduler()), net, chain, noises, **given) for tables in (as_installed, exact)]
    check(name, ours, *theirs)
    return ours


@every_chain
@every_prediction
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm(our_path, chain, prediction, variance, clip):
    ours = compare(our_path, "DDPMScheduler", chain, prediction, 10, "ancestral", clip=clip, variance=variance)
    assert not clip or (ours[-1].abs() == 1).any()  # else nothing is clipped


@every_chain
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("count", [10, 15])
def test_ddpm_on_fewer_steps(our_path, chain, spacing, offset, count):
    options = {"timestep_spacing": spacing, "steps_offset": offset}
    compare(our_path, "DDPMScheduler", chain, "epsilon", count, "ancestral", **options)


@every_chain
@every_prediction
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim(our_path, chain, prediction, eta, clip):
    compare(our_path, "DDIMScheduler", chain, prediction, 10, "ddim", eta=eta, clip=clip)


@every_chain
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS[1:3])  # "linspace" is below, among what is wrong
def test_ddim_on_other_steps(our_path, chain, spacing, offset):
    options = {"timestep_spacing": spacing, "steps_offset": offset}
    compare(our_path, "DDIMScheduler", chain, "epsilon", 20, "ddim", eta=0.5, **options)


def test_a_whole_chain(our_path):
    compare(our_path, "DDPMScheduler", "linear", "epsilon", T, "ancestral")


def test_ddim_by_default_keeps_the_noise_that_was_not_clipped(our_path):
    """Ours, as guided-diffusion's, derives the noise from the clipped x0_hat: ``use_clipped_model_output=True``."""
    net, noises = network("linear", "epsilon", gain=0.3), noise(20)
    scheduler = peer.DDIMScheduler()
    scheduler.set_timesteps(20)
    diffusion = GaussianDiffusion(net, CHAINS["linear"], SHAPE, clip=True)
    ours = our_path(diffusion, "ddim", kept(scheduler), noises)
    assert (their_path(scheduler, net, "linear", noises) - ours).abs().max() > 0.1


# ---------------------------------------------------------------------- inversion


def their_inversion(tables, net, chain, x0, count, own_level=False, **options):
    """As their pipelines do, the network told the step that x goes to; or, from x_1 = x0 on, the step that x is at."""
    scheduler = peer.DDIMInverseScheduler(beta_schedule=chain, clip_sample=False, **options)
    scheduler.set_timesteps(count)
    scheduler, x = tables(scheduler), x0
    ends = scheduler.timesteps[own_level:]
    told = scheduler.timesteps[:-1] if own_level else ends
    with torch.no_grad():
        for index, end in zip(told, ends, strict=True):
            x = scheduler.step(net(x, CHAINS[chain].log_snr(index + 1).expand(len(x))), end, x).prev_sample
    return x


@every_chain
@every_prediction
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion(chain, prediction, spacing):
    net, x0 = network(chain, prediction), 0.3 * noise(0)[0]
    options = {"prediction_type": prediction, "timestep_spacing": spacing}
    diffusion = GaussianDiffusion(net, CHAINS[chain], SHAPE, PREDICTIONS[prediction])
    ours = invert(diffusion, x0, indices(20, timestep_spacing=spacing))
    theirs = [their_inversion(tables, net, chain, x0, 20, True, **options) for tables in (as_installed, exact)]
    check("DDIMInverseScheduler", ours, *theirs)


def test_which_step_an_inversion_tells_the_network():
    """Both are off the exact flow of Gaussian data by an error of first order, of which theirs is the smaller."""
    table, chain, x0 = TABLES["linear"], "linear", torch.full((1, 1), -0.9, dtype=torch.float64)
    found = {}
    for prediction in ("epsilon", "v_prediction"):
        net = float64(GaussianDenoiser(PREDICTIONS[prediction]))
        diffusion = GaussianDiffusion(net, CHAINS[chain], (1,), PREDICTIONS[prediction])
        for count in (50, 100):
            alpha_bar, variance = (z[indices(count)[-1] - 1] for z in (table.ab, table.ab * VAR + table.om))
            flow = math.sqrt(alpha_bar) * MEAN + math.sqrt(variance / VAR) * (x0 - MEAN)
            theirs = their_inversion(exact, net, chain, x0, count, prediction_type=prediction)
            found[prediction, count] = [(x - flow).item() for x in (invert(diffusion, x0, indices(count)), theirs)]
    stated = rows("Inversion")
    for prediction in ("epsilon", "v_prediction"):
        for coarse, fine in zip(found[prediction, 50], found[prediction, 100], strict=True):
            assert 1.8 < coarse / fine < 2.3
        assert [f"{error:.3f}" for error in found[prediction, 50]] == stated[prediction]


# ---------------------------------------------------------------------- solvers


@pytest.mark.parametrize(
    ("chain", "spacing"), [("linear", "trailing"), ("linear", "linspace"), ("squaredcos_cap_v2", "leading")]
)
@every_prediction
@pytest.mark.parametrize(("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
@pytest.mark.parametrize("count", [10, 20])
def test_dpm_solver(our_path, chain, spacing, prediction, algorithm, eta, count):
    """With their defaults: solver_order=2, solver_type="midpoint", and the last step, to sigma = 0, is the denoiser."""
    options = {"timestep_spacing": spacing, "algorithm_type": algorithm}
    compare(our_path, "DPMSolverMultistepScheduler", chain, prediction, count, "dpm++2m", eta=eta, **options)


@pytest.mark.parametrize(("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
@pytest.mark.parametrize("count", [10, 20])
def test_dpm_solver_that_ends_at_the_first_step(our_path, algorithm, eta, count):
    """final_sigmas_type="sigma_min" returns our x_1, but that below 15 steps its last one is of first order."""
    net, noises = network("linear", "epsilon"), noise(count + 1)

    def scheduler():
        found = peer.DPMSolverMultistepScheduler(algorithm_type=algorithm, final_sigmas_type="sigma_min")
        found.set_timesteps(count)
        return found

    steps = [1, *kept(scheduler())]
    ours = our_path(GaussianDiffusion(net, CHAINS["linear"], SHAPE), "dpm++2m", steps, noises, eta=eta)[:-1]
    theirs = [their_path(tables(scheduler()), net, "linear", noises) for tables in (as_installed, exact)]
    if count < 15:
        assert all((path[-1] - ours[-1]).abs().max() > 0.1 for path in theirs)
        theirs, ours = [path[:-1] for path in theirs], ours[:-1]
    check("DPMSolverMultistepScheduler", ours, *theirs)


@pytest.mark.parametrize(
    ("chain", "spacing"), [("linear", "leading"), ("linear", "trailing"), ("squaredcos_cap_v2", "leading")]
)
@every_prediction
@pytest.mark.parametrize("clip", [False, True])
def test_heun(our_path, chain, spacing, prediction, clip):
    options = {"timestep_spacing": spacing}
    compare(our_path, "HeunDiscreteScheduler", chain, prediction, 20, "heun", clip=clip, **options)


def test_heun_from_where_almost_nothing_is_left_of_the_data():
    """A first step from sigma / alpha = 2e4 to 7 multiplies a change of x0_hat by 1e3, in both: an even spacing is no choice."""
    diffusion = GaussianDiffusion(float64(GaussianDenoiser("eps")), CHAINS["squaredcos_cap_v2"], (1,))
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    found = {}
    for steps in (10, "ddim10"):
        low, high = sample(diffusion, 2, "heun", steps, x_T=ends)
        found[steps] = f"{(high - low).item() / 2:.2f}"
    assert found == {10: "7.40", "ddim10": "0.52"}
    assert all(figure in DOCUMENTATION.read_text(encoding="utf-8") for figure in found.values())


@every_chain
@every_prediction
def test_euler_is_ddim(our_path, chain, prediction):
    compare(our_path, "EulerDiscreteScheduler", chain, prediction, 20, "ddim", timestep_spacing="leading")


@every_chain
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral_is_ancestral(our_path, chain, prediction):
    """Of the small variance."""
    options = {"timestep_spacing": "leading"}
    compare(our_path, "EulerAncestralDiscreteScheduler", chain, prediction, 20, "ancestral", **options)


class Noises(Schedule):
    """The schedule of given noise levels sigma / alpha, falling."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.steps = len(levels)
        self.table = torch.cat([torch.tensor([math.inf], dtype=torch.float64), -2 * levels.flip(0).log()])

    def log_snr(self, t):
        return self.table[torch.as_tensor(t)]


@pytest.mark.parametrize("levels", ["karras", "exponential"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("EDMEulerScheduler", "ddim", {}),
        ("EDMDPMSolverMultistepScheduler", "dpm++2m", {}),
        ("EDMDPMSolverMultistepScheduler", "dpm++2m", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_edm(our_path, levels, prediction, name, method, options):
    """Their x is our x_t / alpha_t, on the schedule of their noise levels; the network is EDM's F, around the same denoiser."""
    scheduler = getattr(peer, name)(sigma_schedule=levels, prediction_type=prediction, **options)
    scheduler.set_timesteps(20)
    schedule, net, noises = Noises(scheduler.sigmas[:-1].double()), network("linear", "sample"), noise(20)
    alpha, data = [schedule.alpha(t) for t in range(20, -1, -1)], scheduler.config.sigma_data
    generator = torch.Generator().manual_seed(0)
    torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64)
    path = [noises[0] / alpha[0]]
    for t, index in zip(range(20, 0, -1), scheduler.timesteps, strict=True):
        x, sigma = path[-1], schedule.sigma(t) / schedule.alpha(t)
        scheduler.scale_model_input(x, index)
        with torch.no_grad():
            denoised = net(x * schedule.alpha(t), schedule.log_snr(t).expand(BATCH))
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
        output = (denoised - skip * x) / (out if prediction == "epsilon" else -out)
        path.append(scheduler.step(output, index, x, generator=generator).prev_sample)
    theirs = torch.stack([a * x for a, x in zip(alpha, path, strict=True)])
    diffusion = GaussianDiffusion(net, schedule, SHAPE, "x0")
    ours = our_path(diffusion, method, None, noises, eta=float("algorithm_type" in options))
    stated = float(rows("Scheduler by scheduler")[name][-1])
    difference = (theirs - ours).abs().max().item()
    assert difference < stated == SINGLE, f"{name} is off by {difference:.1e}"


# ---------------------------------------------------------------------- where diffusers is wrong


@every_chain
def test_their_tables(chain):
    """What ``INSTALLED`` is made of: noise levels, and the betas re-derived from them, from a float32 alpha-bar."""
    table, alpha_bar = TABLES[chain], peer.DDPMScheduler(beta_schedule=chain).alphas_cumprod
    alpha_bar_s = torch.cat([torch.ones(1), alpha_bar[:-1]])
    for theirs, right, limit in ((1 - alpha_bar, table.om, 6e-4), (1 - alpha_bar / alpha_bar_s, table.beta, INSTALLED)):
        assert (theirs.double() / torch.from_numpy(right) - 1).abs().max() < limit


def constant(*channels: float) -> nn.Module:
    """A network that says the same whatever it is shown."""

    class Constant(nn.Module):
        def forward(self, x, log_snr):
            return torch.tensor(channels, dtype=x.dtype).reshape(1, -1, 1).expand(len(x), -1, x.shape[2])

    return float64(Constant())


def deviation(our_path, theirs: str, output: tuple[float, ...]):
    """Standard deviation of the step from index 500."""
    net, ours = constant(*output), theirs.removesuffix("_log")
    kernel = GaussianDiffusion(net, CHAINS["linear"], (1, 1), "x0", ours).reverse_kernel
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    scheduler = peer.DDPMScheduler(variance_type=theirs, prediction_type="sample")
    return kernel(x, 501).stddev.item(), drawn(scheduler, 500, net(x, x))


def drawn(scheduler, index, output) -> float:
    """What a draw of 1 adds to x_s."""
    generator, again = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    step = scheduler.step(output, index, x, generator=generator).prev_sample
    return (step / torch.randn(x.shape, generator=again, dtype=x.dtype)).item()


def last_draw(our_path, **options: Any):
    """What a draw of 1 in the last of ten steps adds to x_0."""
    scheduler = peer.DDPMScheduler(variance_type="fixed_large", prediction_type="sample", **options)
    scheduler.set_timesteps(10)
    diffusion = GaussianDiffusion(constant(0.0), CHAINS["linear"], (1, 1), "x0", "fixed_large")
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    none, one = (our_path(diffusion, "ancestral", kept(scheduler), [x] * 10 + [z])[-1] for z in (x, x + 1))
    return (one - none).item(), drawn(scheduler, scheduler.timesteps[-1], x)


def number_of_steps(our_path):
    theirs = peer.DDPMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(61)
    return CHAINS["linear"].respace([round(i * T / 61) for i in range(1, 62)]).steps, len(theirs.timesteps)


def noise_at_the_last_call(our_path, count: int, spacing: str):
    """Of DDIM for data that are one point, where its steps are exact: sigma_t at the last t that the network is told."""
    net, q = float64(GaussianDenoiser("eps", var=0.0)), CHAINS["linear"]
    scheduler = peer.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(count)
    steps = kept(scheduler)
    x_T = (q.alpha(steps[-1]) * MEAN + q.sigma(steps[-1])).expand(BATCH, *SHAPE)
    ours = our_path(GaussianDiffusion(net, q, SHAPE), "ddim", steps, [x_T] * (count + 1))
    theirs = their_path(exact(scheduler), net, "linear", [x_T])
    return tuple((path[-2] - q.alpha(steps[0]) * MEAN).mean().item() for path in (ours, theirs))


def inverted(our_path):
    """x_1 for x_0 = 0.5."""
    x0 = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    options = {"prediction_type": "sample", "clip_sample": False}
    theirs = peer.DDIMInverseScheduler(**options)
    theirs.set_timesteps(20)
    ours = invert(GaussianDiffusion(constant(0.0), CHAINS["linear"], (1, 1), "x0"), x0, steps=[1])
    return ours.item(), theirs.step(0 * x0, theirs.timesteps[0], x0).prev_sample.item()


def channels(our_path):
    """Of x_s, of images of one channel."""
    diffusion = GaussianDiffusion(constant(0.0, 0.0), CHAINS["linear"], (1, 1), "eps", "learned_range")
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    theirs = peer.DPMSolverMultistepScheduler(variance_type="learned_range")
    theirs.set_timesteps(20)
    step = theirs.step(diffusion.net(x, x), theirs.timesteps[0], x).prev_sample
    return our_path(diffusion, "dpm++2m", 20, [x] * 21).shape[2], step.shape[1]


def steps_that_run(our_path):
    chain, done, x = "squaredcos_cap_v2", 0, torch.zeros(1)
    theirs = peer.DPMSolverMultistepScheduler(beta_schedule=chain, use_karras_sigmas=True)
    theirs.set_timesteps(10)
    with contextlib.suppress(IndexError):
        for index in theirs.timesteps:
            x = theirs.step(x, index, x).prev_sample
            done += 1
    diffusion = GaussianDiffusion(constant(0.0, 0.0), CHAINS[chain], SHAPE)
    return len(our_path(diffusion, "dpm++2m", 10, noise(10))) - 1, done


def first_level(our_path):
    """Of sigma / alpha, where 80, 10, 1 and 0.1 were asked for."""
    levels = torch.tensor([80.0, 10.0, 1.0, 0.1], dtype=torch.float64)
    theirs, ours = peer.EDMEulerScheduler(), Noises(levels)
    theirs.set_timesteps(sigmas=levels)
    return (ours.sigma(4) / ours.alpha(4)).item(), theirs.sigmas[0].item()


def noise_in_bfloat16(our_path):
    """What a draw of 1 adds to x_0 at index 0."""
    zero = torch.zeros(1, dtype=torch.bfloat16)
    theirs = peer.DDPMScheduler().add_noise(zero, zero + 1, torch.tensor([0]))
    return ForwardProcess(CHAINS["linear"]).marginal(zero, 1).stddev.item(), theirs.item()


def error_of_variance(our_path, chain: str):
    """Relative, of 1 - alpha-bar at index 0."""
    right, theirs = TABLES[chain].om[0], 1 - peer.DDPMScheduler(beta_schedule=chain).alphas_cumprod[0].double()
    return (CHAINS[chain].sigma(1) ** 2 / right - 1).item(), (theirs / right - 1).item()


# What is measured, as docs/diffusers.md calls it; the right value; and a function for ours and theirs.
LINEAR = TABLES["linear"]
WRONG: dict[str, tuple[float, Callable[..., tuple[float, float]]]] = {
    "deviation, fixed_large_log": (
        LINEAR.beta[500] ** 0.5,
        partial(deviation, theirs="fixed_large_log", output=(0.0,)),
    ),
    "deviation, learned": (math.exp(-2.0), partial(deviation, theirs="learned", output=(0.0, -4.0))),
    "noise in x_0, trailing": (0.0, partial(last_draw, timestep_spacing="trailing")),
    "noise in x_0, offset": (0.0, partial(last_draw, steps_offset=1)),
    "steps, trailing": (61, number_of_steps),
    "noise left, linspace": (LINEAR.om[0] ** 0.5, partial(noise_at_the_last_call, count=10, spacing="linspace")),
    "noise left, trailing": (LINEAR.om[32] ** 0.5, partial(noise_at_the_last_call, count=30, spacing="trailing")),
    "x_1, inverse": (0.5, inverted),
    "channels, learned_range": (1, channels),
    "steps that run, karras": (10, steps_that_run),
    "first level, sigmas": (80.0, first_level),
    "noise, bfloat16": (LINEAR.om[0] ** 0.5, noise_in_bfloat16),
    "error, linear": (0.0, partial(error_of_variance, chain="linear")),
    "error, cosine": (0.0, partial(error_of_variance, chain="squaredcos_cap_v2")),
}


@pytest.mark.parametrize("what", WRONG)
def test_where_diffusers_is_wrong(our_path, what):
    right, measure = WRONG[what]
    ours, theirs = measure(our_path)
    rounding = 2**-8 if what == "noise, bfloat16" else 1e-9
    assert ours == pytest.approx(right, rel=rounding, abs=1e-12)
    assert theirs != pytest.approx(right, rel=1e-6, abs=1e-6), f"diffusers is right now: {what} can go, here and there"
    assert [f"{right:.3g}", f"{theirs:.3g}"] == rows("Where diffusers is wrong")[what][-2:], (
        "not the documentation's figures"
    )


def test_the_documentations_list():
    assert list(rows("Where diffusers is wrong")) == list(WRONG)
