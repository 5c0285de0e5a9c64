"""Mistakes in models, guides and their arguments: each raises and names the site or the option, in three modes.

With Pyro's validation on, with it off, and under ``python -O`` (a subprocess, which runs this file). The strict ELBOs and the
programs' own checks are what raises: Pyro's are off in two of the three modes.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from monte_carlo import assert_estimate
from pyro import poutine
from pyro.infer import SVI, Predictive
from pyro.optim import Adam
from test_sample import exact
from torch import nn

import pyrodiff
from pyrodiff import (
    GaussianDiffusion,
    LinearSchedule,
    LogLinearSchedule,
    RenyiELBO,
    TraceMeanField_ELBO,
    elbo_terms,
    nets,
    sample,
)
from pyrodiff.elbo import check_mean_field, site_terms

B, D, STEPS = 4, 3, 5
NORMAL = dist.Normal(0.0, 1.0)


# ---------------------------------------------------------------------- what is right, to go wrong from


def make(net: nn.Module | None = None, event: tuple[int, ...] = (D,), **options) -> GaussianDiffusion:
    schedule = options.pop("schedule", LogLinearSchedule(STEPS, -5.0, 5.0))
    return GaussianDiffusion(net or nets.MLP(D, width=8, depth=1), schedule, event, **options)


def data() -> torch.Tensor:
    return torch.randint(0, 17, (B, D)) / 8 - 1


def steps() -> torch.Tensor:
    return torch.tensor([1, 2, 5, 3])


def loss(model: Callable, guide: Callable, *args, **kwargs) -> float:
    return TraceMeanField_ELBO().loss(model, guide, *args, **kwargs)


def of(diffusion: GaussianDiffusion, *args, **kwargs) -> float:
    return loss(diffusion.model, diffusion.guide, *args, **kwargs)


def latent(law: Callable[[], dist.Distribution] = lambda: NORMAL.expand([B, D]).to_event(1), plate=(B, -1), name="z"):
    """A program with one latent vector for each of B rows."""

    def program():
        if plate is None:
            return pyro.sample(name, law())
        with pyro.plate("rows", plate[0], dim=plate[1]):
            return pyro.sample(name, law())

    return program


right = latent()


def observing(value: torch.Tensor, law: Callable[[torch.Tensor], dist.Distribution] = lambda z: dist.Normal(z, 1.0)):
    """A model whose latent is seen through a law."""

    def program():
        with pyro.plate("rows", B, dim=-1):
            z = pyro.sample("z", NORMAL.expand([B, D]).to_event(1))
            pyro.sample("y", law(z).to_event(1), obs=value)

    return program


class Shifted(dist.Normal):
    """Another density than Normal's."""

    def log_prob(self, value):
        return super().log_prob(value - 1)


class Normal(dist.Normal):
    """Not Pyro's, whatever its name."""


class Net(nn.Module):
    """A network that says what it is told to."""

    def __init__(self, say: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.say = say

    def forward(self, x, log_snr):
        return self.say(x)


def saying(say: Callable[[torch.Tensor], object], **options) -> float:
    return of(make(Net(say), **options), data(), steps())


def labelled(y: object, **options) -> float:
    return of(make(nets.MLP(D, width=8, depth=1, classes=4), **options), data(), steps(), y=y)


def both(a: GaussianDiffusion, b: GaussianDiffusion) -> float:
    def run(which):
        return lambda x0: (getattr(a, which)(x0), getattr(b, which)(x0))

    return loss(run("model"), run("guide"), data())


def in_plate(diffusion: GaussianDiffusion, name: str, size: int, dim: int, **subsample) -> Callable:
    def run(x0):
        with pyro.plate(name, size, dim=dim, **subsample):
            diffusion.model(x0)

    return run


def state_assigned() -> None:
    diffusion = make()
    svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    svi.step(data(), steps())
    diffusion.load_state_dict({k: v.clone() for k, v in diffusion.state_dict().items()}, assign=True)
    svi.step(data(), steps())


def particles(k: int, **options) -> TraceMeanField_ELBO:
    return TraceMeanField_ELBO(num_particles=k, vectorize_particles=True, **options)


def shared_elbo() -> None:
    """The plates of the second model are deeper than what was found out of the first."""
    diffusion, elbo = make(), particles(2)
    elbo.loss(diffusion.model, diffusion.guide, data())

    def deeper(program):
        def run():
            with pyro.plate("groups", 2, dim=-2):
                program(torch.zeros(2, B, D))

        return run

    elbo.loss(deeper(diffusion.model), deeper(diffusion.guide))


def exchanged(name: str) -> None:
    diffusion = make()
    setattr(diffusion, name, LinearSchedule(50) if name == "schedule" else make().reverse_kernel)


# ---------------------------------------------------------------------- the mistakes

# name: (what to do, what the message must say)
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    # --- structure of a guide beside a model
    "guide: no to_event": (lambda: loss(right, latent(lambda: NORMAL.expand([B, D]))), "site '?\"?z"),
    "guide: no to_event, as many dims as rows": (
        lambda: loss(latent(lambda: NORMAL.expand([B, B]).to_event(1)), latent(lambda: NORMAL.expand([B, B]))),
        "site '?\"?z",
    ),
    "guide: to_event of too many": (lambda: loss(right, latent(lambda: NORMAL.expand([B, D]).to_event(2))), "site '?\"?z"),
    "model: no to_event": (lambda: loss(latent(lambda: NORMAL.expand([B, D])), right), "site '?\"?z"),
    "both: no to_event": (
        lambda: loss(latent(lambda: NORMAL.expand([B, D])), latent(lambda: NORMAL.expand([B, D]))),
        "site '?\"?z",
    ),
    "observation: to_event of too many": (
        lambda: loss(observing(torch.zeros(B, D), lambda z: dist.Normal(z, 1.0).to_event(1)), right),
        "site 'y'",
    ),
    "guide: no plate": (lambda: loss(right, latent(plate=None)), "site '?\"?z"),
    "both: no plate": (lambda: loss(latent(plate=None), latent(plate=None)), "site '?\"?z"),
    "guide: plate of another size": (lambda: loss(right, latent(plate=(B + 1, -1))), "'?\"?z"),
    "guide: plate at another dim": (lambda: loss(right, latent(plate=(B, -2))), "site '?\"?z"),
    "guide: misspelt site": (lambda: loss(right, latent(name="zz")), "site 'z' is not in the guide"),
    "guide: missing site": (lambda: loss(right, lambda: None), "site 'z' is not in the guide"),
    "guide: extra site": (
        lambda: loss(right, lambda: (right(), pyro.sample("y", NORMAL))),
        "site 'y' is not in the model",
    ),
    "guide: a site twice": (lambda: loss(right, lambda: [pyro.sample("z", NORMAL) for _ in range(2)]), "'z'"),
    "guide: forward order": (
        lambda: loss(make().model, make().noising, data()),
        "'x_1' comes where the model has 'x_5'",
    ),
    "guide: not reparameterised": (
        lambda: loss(latent(lambda: dist.Poisson(torch.ones(B)).mask(True)), latent(lambda: dist.Poisson(torch.ones(B)))),
        "site 'z' .*not reparameterised",
    ),
    "guide: of a shorter chain": (
        lambda: loss(make().model, make().respace(3).guide, data()),
        "site 'x_5' is not in the guide",
    ),
    "guide: of another diffusion's name": (
        lambda: loss(make(name="a").model, make(name="b").guide, data()),
        "site 'a_x_5' is not in the guide",
    ),
    # --- scales and masks
    "model alone scaled": (lambda: loss(poutine.scale(right, 0.1), right), "different scales at site 'z'"),
    "guide alone scaled": (lambda: loss(right, poutine.scale(right, 0.1)), "different scales at site 'z'"),
    "model and guide scaled differently": (
        lambda: loss(poutine.scale(right, torch.rand(B)), poutine.scale(right, torch.rand(B))),
        "different scales at site 'z'",
    ),
    "model alone masked": (
        lambda: loss(poutine.mask(right, torch.arange(B) > 1), right),
        "different masks at site 'z'",
    ),
    "guide alone masked": (
        lambda: loss(right, poutine.mask(right, torch.arange(B) > 1)),
        "different masks at site 'z'",
    ),
    "guide's law alone masked": (
        lambda: loss(right, latent(lambda: NORMAL.expand([B, D]).to_event(1).mask(torch.arange(B) > 1))),
        "different masks at site 'z'",
    ),
    "laws masked differently": (
        lambda: loss(
            latent(lambda: NORMAL.expand([B, D]).to_event(1).mask(torch.arange(B) > 2)),
            latent(lambda: NORMAL.expand([B, D]).to_event(1).mask(torch.arange(B) > 1)),
        ),
        "different masks at site 'z'",
    ),
    "weights for the model alone": (
        lambda: loss(lambda x0, t: make().model(x0, t, weight=2.0), make().guide, data(), steps()),
        "different scales at site 'x_s'",
    ),
    "subsampling for the model alone": (
        lambda: loss(in_plate(d := make(), "data", 100, -1, subsample=torch.arange(B)), d.guide, data()),
        "different scales at site 'x_5'",
    ),
    "Renyi's bound of one timestep": (
        lambda: RenyiELBO(num_particles=2).loss((d := make()).model, d.guide, data(), steps()),
        "site 'x_.' is scaled or masked",
    ),
    "Renyi's bound with data_size": (
        lambda: RenyiELBO(num_particles=2).loss((d := make(data_size=100)).model, d.guide, data()),
        "site 'x_5' is scaled.*data_size",
    ),
    "Renyi's bound: missing site": (
        lambda: RenyiELBO(num_particles=2).loss(right, latent(name="zz")),
        "site 'z' is not in the guide",
    ),
    "Renyi's bound: no to_event": (
        lambda: RenyiELBO(num_particles=2).loss(latent(lambda: NORMAL.expand([B, D])), right),
        "site '?\"?z",
    ),
    # --- KLs that Pyro would take from a parent, or do without
    "no KL for these laws": (
        lambda: loss(latent(lambda: dist.Cauchy(torch.zeros(B), 1.0)), latent(lambda: NORMAL.expand([B]))),
        "no KL is registered for site 'z'",
    ),
    "a subclass of Normal with another density": (
        lambda: loss(latent(lambda: Shifted(torch.zeros(B), 1.0)), latent(lambda: NORMAL.expand([B]))),
        "no KL is registered for site 'z'",
    ),
    "a subclass called Normal": (
        lambda: loss(latent(lambda: Normal(torch.zeros(B), 1.0)), latent(lambda: NORMAL.expand([B]))),
        "no KL is registered for site 'z'",
    ),
    "a Delta with a log-density": (
        lambda: loss(latent(lambda: NORMAL.expand([B])), latent(lambda: dist.Delta(torch.zeros(B), log_density=10.0))),
        "no KL is registered for site 'z'",
    ),
    # --- observations
    "x0 of another shape": (lambda: of(make(), torch.zeros(B, D + 1)), "x0 has shape"),
    "x0 without a batch": (lambda: of(make(), torch.zeros(D)), "x0 has shape"),
    "x0 of integers": (lambda: of(make(), data().long()), "x0 has dtype torch.int64"),
    "x0 a list": (lambda: of(make(), [[0.0] * D]), "x0 is a list"),
    "x0 NaN": (lambda: of(make(), data() * torch.nan), "'?x_?0'? "),
    "x0 infinite": (lambda: of(make(), data() / 0), "'?x_?0'? "),
    "x0 off the grid": (
        lambda: of(make(bins=(17, -1.0, 1.0)), data() + 0.03),
        "(?s)OnGrid|x_0",
    ),
    "x0 on another grid": (lambda: of(make(bins=(9, -1.0, 1.0)), data() - 0.125), "(?s)OnGrid|x_0"),
    "x0 off the grid, in the ledger": (
        lambda: elbo_terms(make(bins=(17, -1.0, 1.0)), data() + 0.03),
        "x0.*grid of bins",
    ),
    "x0 in 0..255 for a grid of [-1, 1]": (
        lambda: of(make(bins=(256, -1.0, 1.0)), torch.randint(2, 256, (B, D)).float()),
        "(?s)OnGrid|x_0",
    ),
    "y of one dim for D": (lambda: loss(observing(torch.zeros(B, 1)), right), "site 'y'"),
    "y of other rows": (lambda: loss(observing(torch.zeros(B + 1, D)), right), "y|plate"),
    "y outside its law's support": (
        lambda: loss(observing(-torch.ones(B, D), lambda z: dist.LogNormal(z, 1.0)), right),
        "(?s)GreaterThan|'y'",
    ),
    "x_0 conditioned on other data": (
        lambda: loss(poutine.condition((d := make()).model, {"x_0": data() + 1}), d.guide, data()),
        "site 'x_0'",
    ),
    "x_0 of a one-timestep program conditioned": (
        lambda: poutine.condition(make().model, {"x_0": data() + 1})(data(), steps()),
        "site 'x_0'",
    ),
    "x_0 conditioned on more rows than chains": (
        lambda: poutine.condition(make().model, {"x_0": data()})(),
        "site 'x_0'",
    ),
    # --- plates, data_size, particles, names
    "data_size below the batch": (lambda: of(make(data_size=2), data()), "data_size=2"),
    "a caller's plate of other rows": (lambda: in_plate(make(), "mine", B + 1, -1)(data()), "plate 'mine'"),
    "a caller's plate beside data_size": (lambda: in_plate(make(data_size=50), "mine", B, -1)(data()), "plate 'mine'"),
    "particles where the examples are": (
        lambda: particles(3, max_plate_nesting=0).loss((d := make()).model, d.guide, data()),
        "max_plate_nesting",
    ),
    "as many particles as examples, in their place": (
        lambda: particles(B, max_plate_nesting=0).loss((d := make()).model, d.guide, data()),
        "max_plate_nesting",
    ),
    "particles in the place of a caller's plate": (
        lambda: particles(2, max_plate_nesting=1).loss(
            lambda: in_plate(d, "groups", 2, -2)(torch.zeros(2, B, D)) if (d := make()) else None,
            lambda: None,
        ),
        "groups",
    ),
    "one ELBO for two models": (shared_elbo, "groups"),
    "two diffusions of one name": (lambda: both(make(), make()), "'data'"),
    "state assigned under Pyro's store": (state_assigned, "parameter store holds another tensor under diffusion_"),
    "weights in channels_last": (
        lambda: SVI(
            (
                d := make(
                    nets.UNet(1, width=8, multipliers=(1, 2), blocks=1).to(memory_format=torch.channels_last),
                    (1, 8, 8),
                )
            ).model,
            d.guide,
            Adam({"lr": 0.1}),
            TraceMeanField_ELBO(),
        ).step(torch.zeros(B, 1, 8, 8), steps()),
        "channels_last",
    ),
    "schedule exchanged": (lambda: exchanged("schedule"), "schedule cannot be exchanged"),
    "kernel exchanged": (lambda: exchanged("reverse_kernel"), "reverse_kernel cannot be exchanged"),
    # --- timesteps and weights
    "t of 0": (lambda: of(make(), data(), torch.tensor([0, 1, 2, 3])), "t has values in 0..3"),
    "t above T": (lambda: of(make(), data(), torch.tensor([1, 2, 3, 6])), "t has values in 1..6"),
    "t of floats": (lambda: of(make(), data(), steps().float()), "t has dtype torch.float32"),
    "t of another length": (lambda: of(make(), data(), torch.ones(B + 1).long()), "t has shape"),
    "t of a column": (lambda: of(make(), data(), torch.ones(B, 1).long()), "t has shape"),
    "t of particles without particles": (lambda: of(make(), data(), torch.ones(2, B).long()), "t has shape"),
    "t a number": (lambda: of(make(), data(), 3), "t is a int"),
    "t of integers in continuous time": (
        lambda: of(make(schedule=LogLinearSchedule(torch.inf, -5.0, 5.0)), data(), torch.ones(B).long()),
        "t has dtype torch.int64",
    ),
    "a whole chain of continuous time": (
        lambda: of(make(schedule=LogLinearSchedule(torch.inf, -5.0, 5.0)), data()),
        "steps=inf",
    ),
    "weight without t": (lambda: of(make(), data(), weight=torch.ones(B)), "weight belongs to t"),
    "weight of another shape": (lambda: of(make(), data(), steps(), weight=torch.ones(B, 1)), "weight has shape"),
    "t without x0": (lambda: make().model(None, steps()), "needs x0"),
    "guide without x0": (lambda: make().guide(), "guide needs x0"),
    "sampling from a one-timestep program": (
        lambda: poutine.uncondition(make().model)(data(), steps()),
        "site 'x_0' of a one-timestep program",
    ),
    # --- labels and other conditioning
    "labels missing": (lambda: of(make(nets.MLP(D, width=8, depth=1, classes=4)), data(), steps()), r"\by\b"),
    "labels for a network without": (lambda: of(make(), data(), steps(), y=torch.zeros(B).long()), r"\by\b"),
    "labels out of range": (lambda: labelled(torch.tensor([0, 1, 2, 4])), r"\by\b"),
    "labels negative": (lambda: labelled(torch.tensor([0, 1, 2, -1])), r"\by\b"),
    "labels of other rows": (lambda: labelled(torch.zeros(B + 1).long()), r"\by\b"),
    "labels one-hot": (lambda: labelled(torch.eye(B)), r"\by\b"),
    "labels of floats": (lambda: labelled(torch.zeros(B)), r"\by\b"),
    "a keyword the network does not know": (lambda: of(make(), data(), steps(), label=torch.zeros(B)), "label"),
    "labels of other rows, in the ledger": (
        lambda: elbo_terms(make(nets.MLP(D, width=8, depth=1, classes=4)), data(), y=torch.zeros(B + 1).long()),
        r"\by has",
    ),
    "labels of other rows, in sampling": (
        lambda: sample(make(nets.MLP(D, width=8, depth=1, classes=4)), B, y=torch.zeros(B + 1).long()),
        r"\by has",
    ),
    # --- networks
    "network of other channels": (lambda: saying(lambda x: torch.cat([x, x], 1)), "network returns"),
    "network of other rows": (lambda: saying(lambda x: x[:1]), "network returns"),
    "network that transposes": (
        lambda: of(make(Net(lambda x: x.mT), (2, 5)), torch.zeros(B, 2, 5), steps()),
        "network returns",
    ),
    "network that flattens": (lambda: saying(lambda x: x.flatten()), "network returns"),
    "network of integers": (lambda: saying(lambda x: x.long()), "network returns"),
    "network of complex numbers": (lambda: saying(lambda x: x.to(torch.complex64)), "network returns"),
    "network of a tuple": (lambda: saying(lambda x: (x, x)), "network returns"),
    "learned variance without its channels": (lambda: saying(lambda x: x, variance="learned"), "variance='learned'"),
    "variance channels for a fixed variance": (
        lambda: of(make(nets.MLP(D, out_features=2 * D, width=8, depth=1)), data(), steps()),
        "variance='fixed_small'",
    ),
    # --- options
    "prediction unknown": (lambda: make(prediction="epsilon"), "prediction='epsilon'"),
    "variance unknown": (lambda: make(variance="small"), "variance='small'"),
    "decoder unknown": (lambda: make(decoder="tanh"), "decoder='tanh'"),
    "objective unknown": (lambda: make(objective="mse"), "objective='mse'"),
    "bins of one level": (lambda: make(bins=(1, -1.0, 1.0)), r"bins=\(1,"),
    "bins upside down": (lambda: make(bins=(17, 1.0, -1.0)), r"bins=\(17,"),
    "bins without end": (lambda: make(bins=(17, -torch.inf, 1.0)), r"bins=\(17,"),
    "bins a number": (lambda: make(bins=256), "bins=256"),
    "bins of a fraction": (lambda: make(bins=(17.0, -1.0, 1.0)), r"bins=\(17"),
    "tanh decoder without bins": (lambda: make(decoder="openai_tanh"), "bins=None"),
    "openai decoder of one step": (
        lambda: make(decoder="openai", schedule=LogLinearSchedule(1, -5.0, 5.0)),
        "decoder=",
    ),
    "learned variance in continuous time": (
        lambda: make(variance="learned", schedule=LogLinearSchedule(torch.inf, -5.0, 5.0)),
        "variance='learned'",
    ),
    "data_size of 0": (lambda: make(data_size=0), "data_size=0"),
    "learned schedule under another objective": (
        lambda: of(make(objective="simple", schedule=pyrodiff.LearnedSchedule(STEPS, -5.0, 5.0)), data(), steps()),
        "objective='simple'",
    ),
    # --- scoring and sampling
    "ledger's t of 1": (lambda: elbo_terms(make(), data(), t=torch.tensor([1, 2])), "t has values in 1..2"),
    "ledger's weights without t": (lambda: elbo_terms(make(), data(), weights=torch.ones(4)), "weights belong to"),
    "ledger's kl unknown": (lambda: elbo_terms(make(), data(), kl="mc"), "kl='mc'"),
    "no samples": (lambda: sample(make(), 0), "n=0"),
    "samples by an unknown method": (lambda: sample(make(), 1, "euler"), "method='euler'"),
    "posterior at t = 1": (
        lambda: make().forward_process.posterior(data(), data(), steps()),
        "posterior needs t >= 2",
    ),
    "transition backwards": (lambda: make().forward_process.transition(data(), 3, 2), "transition goes from s to a later t"),
    "Predictive with values of other rows": (
        lambda: Predictive(make().model, {"x_5": torch.zeros(7, B, D)}, parallel=True)(torch.zeros(B + 1, D)),
        "x_5|plate",
    ),
}  # fmt: skip


def raised(name: str) -> str:
    """What is wrong with the way in which a mistake is met; nothing if it raises as it should."""
    do, message = MISTAKES[name]
    pyro.clear_param_store()
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s)Found.*")  # Pyro's word for what is then refused
            result = do()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if not re.search(message, said):
            return f"{name}: says {said!r}, not {message!r}"
        return ""
    return f"{name}: silent, {result!r}"


@pytest.mark.reliability("Q8")
@pytest.mark.parametrize("validation", [True, False], ids=["validated", "not validated"])
def test_every_mistake_raises(validation, figure):
    with pyro.validation_enabled(validation):
        wrong = [found for name in MISTAKES if (found := raised(name))]
    assert not wrong, "\n".join(wrong)
    mode = "on" if validation else "off"
    figure("Q8", f"mistakes that raise, validation {mode}", len(MISTAKES) - len(wrong), at_least=len(MISTAKES))


@pytest.mark.slow
@pytest.mark.reliability("Q8")
def test_every_mistake_raises_under_optimisation(figure):
    run = subprocess.run(
        [sys.executable, "-O", __file__], capture_output=True, text=True, timeout=250, cwd=Path(__file__).parents[1]
    )
    assert run.returncode == 0, run.stdout + run.stderr
    optimised, caught = map(int, run.stdout.split()[-2:])
    assert optimised
    figure("Q8", "mistakes that raise, python -O", caught, at_least=len(MISTAKES))


@pytest.mark.reliability("Q8")
def test_the_mistakes_are_many_and_what_they_go_wrong_from_is_right(figure):
    """Each is one step away from one of these programs, which raise nothing."""
    figure("Q8", "mistakes in the table", len(MISTAKES), at_least=40)
    diffusion = make(bins=(17, -1.0, 1.0))
    assert loss(right, right) == 0
    assert math.isfinite(loss(observing(torch.zeros(B, D)), right))
    assert math.isfinite(of(diffusion, data())) and math.isfinite(of(diffusion, data(), steps()))
    assert math.isfinite(labelled(torch.arange(B))) and math.isfinite(saying(lambda x: x))
    assert math.isfinite(saying(lambda x: torch.cat([x, x], 1), variance="learned"))
    assert math.isfinite(particles(B, max_plate_nesting=1).loss(diffusion.model, diffusion.guide, data()))
    assert math.isfinite(both(make(name="a"), make(name="b")))
    assert math.isfinite(RenyiELBO(num_particles=2).loss(diffusion.model, diffusion.guide, data()))


# ---------------------------------------------------------------------- what no check can see


class Marginals(nn.Module):
    """A guide with the model's sites in the model's order, each drawn from q(x_t | x_0) by itself."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.q = diffusion.forward_process

    def forward(self, x0: torch.Tensor) -> None:
        with pyro.plate("data", len(x0), dim=-1):
            for t in range(self.q.schedule.steps, 0, -1):
                pyro.sample(f"x_{t}", self.q.marginal(x0, t))


@pytest.mark.monte_carlo
@pytest.mark.reliability("Q8")
def test_independent_marginals_are_a_worse_guide_and_not_a_mistake():
    """A bound, by either ELBO the same one, and a loose one: nothing is wrong with it but its value (see docs/extending.md).

    Both KLs' expectations are equal for any guide that the strict ELBO takes; here they are means over many examples.
    """
    diffusion = exact(50)
    x0 = torch.tensor([0.6]).expand(4_000, 2)
    values = {}
    for kl, guide in (
        ("analytic", Marginals(diffusion)),
        ("monte_carlo", Marginals(diffusion)),
        ("best", diffusion.guide),
    ):
        guide_trace = poutine.trace(guide).get_trace(x0)
        model_trace = poutine.trace(poutine.replay(diffusion.model, guide_trace)).get_trace(x0)
        check_mean_field(model_trace, guide_trace)
        terms = site_terms(model_trace, guide_trace, "analytic" if kl == "best" else kl)
        values[kl] = sum(terms.values()).double()
    mean = {kl: v.mean().item() for kl, v in values.items()}
    se = {kl: v.std().item() / len(x0) ** 0.5 for kl, v in values.items()}
    assert_estimate(mean["analytic"], math.hypot(se["analytic"], se["monte_carlo"]), mean["monte_carlo"], detects=10)
    assert mean["analytic"] > mean["best"] + 100


# ---------------------------------------------------------------------- under python -O

if __name__ == "__main__":
    found = [wrong for name in MISTAKES if (wrong := raised(name))]
    print(*found, int(not __debug__), len(MISTAKES) - len(found), sep="\n")
    sys.exit(bool(found))
