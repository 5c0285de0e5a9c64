"""Every public function that takes a batch, against a loop over its examples.

With sizes that are all equal (batch, channels, height and width: what right-aligned broadcasting confuses), all different, and
1. The names come from the modules' ``__all__``: a new one without a check here, or a reason, fails.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_kernels import Wavy
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyrodiff
from pyrodiff import (
    CosineSchedule,
    GaussianDiffusion,
    LearnedSchedule,
    LinearSchedule,
    LogLinearSchedule,
    TableSchedule,
)
from pyrodiff import draws as term_draws
from pyrodiff.classifier import NoisyClassifier
from pyrodiff.distributions import DiscretizedNormal, Gaussian, OnGrid
from pyrodiff.elbo import bits_per_dim, elbo_terms, site_terms
from pyrodiff.forward import ForwardProcess
from pyrodiff.inference import DiffusionPrior, LinearGaussian, operators, resampling
from pyrodiff.inference.calibration import sbc
from pyrodiff.inference.guidance import class_label, mmps, pigdm
from pyrodiff.inference.observe import observation
from pyrodiff.laboratory import budget, values
from pyrodiff.likelihood import flow, importance, information
from pyrodiff.nets import embeddings, layers
from pyrodiff.nets.classifier import Classifier
from pyrodiff.nets.mlp import MLP
from pyrodiff.nets.unet import UNet
from pyrodiff.reverse import ReverseKernel
from pyrodiff.timesteps import ImportanceSampler
from pyrodiff.training.data import to_levels
from pyrodiff.training.metrics import ImageClassifier

sampling = importlib.import_module("pyrodiff.sample")
F64 = torch.float64
STEPS = 6
EQUAL, DIFFERENT, ONE = (3, (3, 3, 3)), (5, (2, 4, 3)), (1, (1, 1, 1))
SIZES = (EQUAL, DIFFERENT, ONE, (4, (1, 5)), (2, (1,)), (3, (3,)))
IMAGES = ((4, (4, 4, 4)), (5, (3, 2, 6)), (1, (1, 2, 2)))
FLAT = ((4, ()), (1, ()))  # functions of one number per example

Case = tuple[object, Callable[[int], object]]  # of the whole batch; of example i alone, as a batch of one
CHECKS: dict[str, tuple[tuple, Callable[[int, tuple[int, ...]], Case]]] = {}


def check(*names: str, sizes=SIZES):
    """A check of public names: a function of batch and event to what the whole batch gives and what one example does."""

    def keep(function):
        for name in names:
            CHECKS[name if name not in CHECKS else f"{name} ({function.__name__})"] = (sizes, function)
        return function

    return keep


def rows(x: object, i: int | None):
    """Example i as a batch of one; everything for None."""
    return x if i is None or not isinstance(x, Tensor) else x[i : i + 1]


def case(function: Callable[..., object], *args: object) -> Case:
    """Of a function whose tensor arguments all have the batch first."""
    return function(*args), lambda i: function(*(rows(a, i) for a in args))


def randn(batch: int, event: tuple[int, ...]) -> Tensor:
    return torch.randn(batch, *event, dtype=F64)


def times(batch: int, first: int = 1) -> Tensor:
    return torch.arange(batch) % (STEPS + 1 - first) + first


def schedule():
    return LogLinearSchedule(STEPS, -4.0, 5.0)


class Conditional(Wavy):
    """Depends on a number per example too; float64."""

    def __init__(self, twice=False):
        super().__init__(twice)
        self.scale = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x, log_snr, shift=None):
        return self.scale * super().forward(x, log_snr, shift)


def make(event, schedule_=None, **options):
    return GaussianDiffusion(
        Conditional(options.get("variance") == "learned"), schedule_ or schedule(), event, **options
    )


class Rows:
    """Noise of every example's own: call k of it is the same for example i, alone or among others."""

    def __init__(self, batch: int, event: tuple[int, ...], i: int | None) -> None:
        self.batch, self.event, self.i, self.calls = batch, event, i, 0

    def __call__(self, like: Tensor | tuple[int, ...]) -> Tensor:
        shape = tuple(like.shape if isinstance(like, Tensor) else like)
        dim = len(shape) - len(self.event) - 1
        self.calls += 1
        full = torch.randn(*shape[:dim], self.batch, *self.event, dtype=F64, generator=generator(self.calls))
        return full if self.i is None else full.narrow(dim, self.i, 1)


@contextmanager
def drawn(noise: Rows) -> Iterator[None]:
    def rsample(self, sample_shape=()):
        return self.mean + self.stddev * noise(self._extended_shape(torch.Size(sample_shape)))

    with mock.patch.object(Gaussian, "rsample", rsample):
        yield


def moments(law) -> tuple[Tensor, Tensor]:
    return law.mean, law.stddev


# ---------------------------------------------------------------------- shapes, schedules, laws


@check("_tensor.append_dims")
def _(batch, event):
    x = randn(batch, event)
    return case(lambda v, x: pyrodiff._tensor.append_dims(v, len(event)) * x, torch.rand(batch, dtype=F64), x)


@check("_tensor.sum_event")
def _(batch, event):
    return case(lambda x: pyrodiff._tensor.sum_event(x, len(event)), randn(batch, event))


@check("_tensor.in_parts")
def _(batch, event):
    return case(lambda x: pyrodiff._tensor.in_parts(lambda rows: x[rows] ** 2, len(x), rows=2)[0], randn(batch, event))


@check("_tensor.take_rows")
def _(batch, event):
    cond = {"a": randn(batch, event), "b": torch.tensor(2.0)}
    net = nn.Module()
    net.cond_event_dims = {"a": len(event)}

    def take(index):
        found = pyrodiff._tensor.take_rows(net, cond, index, batch)
        return found["a"] * found["b"]

    return take(torch.arange(batch)), lambda i: take(slice(i, i + 1))


SCHEDULES = {
    "LinearSchedule": lambda: LinearSchedule(30),
    "CosineSchedule": lambda: CosineSchedule(STEPS),
    "LogLinearSchedule": schedule,
    "TableSchedule": lambda: TableSchedule([0.1] * STEPS),
    "LearnedSchedule": lambda: LearnedSchedule(STEPS, -5.0, 5.0),
    "RespacedSchedule": lambda: CosineSchedule(50).respace(STEPS),
}
for _name, _make in SCHEDULES.items():

    @check(f"schedules.{_name}")
    def _(batch, event, make=_make):
        t = torch.randint(1, STEPS + 1, (batch, *event))
        return case(lambda t: (make().log_snr(t), make().alpha(t), make().sigma(t)), t)


@check("schedules.LearnedSchedule")
def learned_in_continuous_time(batch, event):
    found = LearnedSchedule(torch.inf, -5.0, 5.0)
    return case(lambda t: (found.log_snr(t), found.slope(t), found.log_density(t)), torch.rand(batch, *event))


@check("distributions.Gaussian")
def _(batch, event):
    scale = torch.rand(batch, *(1,) * len(event), dtype=F64) + 0.1

    def laws(x, loc, scale):
        q, p = Gaussian(loc, scale).to_event(len(event)), Gaussian(2 * loc, 1 + scale).to_event(len(event))
        return q.log_prob(x), kl_divergence(q, p), q.entropy(), *moments(q), q.expand((3, len(x))).log_prob(x)[1]

    return case(laws, randn(batch, event), randn(batch, event), scale)


@check("distributions.DiscretizedNormal")
def _(batch, event):
    x = torch.randint(0, 17, (batch, *event)) / 8 - 1
    scale = torch.rand(batch, *(1,) * len(event), dtype=F64) + 0.1

    def law(x, loc, scale):
        d = DiscretizedNormal(loc, scale, 1 / 8, -1.0, 1.0)
        tanh = DiscretizedNormal(loc, scale, 1 / 8, -1.0, 1.0, cdf="tanh")
        return d.to_event(len(event)).log_prob(x), d.mean, d.variance, d.pmf(), d.snap(loc), tanh.log_prob(x)

    return case(law, x.double(), randn(batch, event), scale)


@check("distributions.OnGrid")
def _(batch, event):
    grid = OnGrid(-1.0, 1.0, 17)
    return case(lambda x: (grid.check(x), grid.index(x), grid.points(x.round())), 2 * randn(batch, event))


@check("forward.ForwardProcess")
def _(batch, event):
    q = ForwardProcess(schedule(), len(event))

    def laws(x, y, t):
        terms = q.posterior_terms(y, t)[1:]
        found = (q.marginal(x, t), q.transition(x, t - 1, t), q.posterior(x, y, t), q.prior(x.shape, x))
        return *(m for law in found for m in moments(law)), *(z * x for z in terms)

    return case(laws, randn(batch, event), randn(batch, event), times(batch, 2))


for _prediction in ("eps", "previous"):

    @check("reverse.ReverseKernel")
    def reverse(batch, event, prediction=_prediction):
        p = ReverseKernel(Conditional(True), schedule(), prediction, "learned", "openai", event_dim=len(event))

        def laws(x, t, shift):
            found = [p(x, t, shift=shift), p.decode(x, shift=shift), *p.both(x, t, shift=shift)]
            more = [p.denoise_at(x, t.double(), shift=shift)] if prediction == "eps" else []
            return *(m for law in found for m in moments(law)), p.denoise(x, t, shift=shift), *more

        return case(laws, randn(batch, event), times(batch), torch.rand(batch, dtype=F64))


# ---------------------------------------------------------------------- programs and the bound


@check("diffusion.GaussianDiffusion", "elbo.site_terms")
def programs(batch, event):
    found = [
        make(event, variance="learned"),
        make(event, objective="min_snr"),
        make(event, bins=(17, -1.0, 1.0)),
        make(event, LogLinearSchedule(torch.inf, -4.0, 5.0)),
    ]
    x0, shift = torch.randint(0, 17, (batch, *event)).double() / 8 - 1, torch.rand(batch, dtype=F64)

    def terms(i):
        results = []
        for diffusion in found:
            t = torch.linspace(0, 1, batch) if diffusion.schedule.continuous else times(batch)
            for args in ((x0, t),) if diffusion.schedule.continuous else ((x0, t), (x0,)):
                args, weight = [rows(a, i) for a in args], rows(torch.rand(batch, generator=generator(7)), i)
                options = {"shift": rows(shift, i)} | ({"weight": weight} if len(args) == 2 else {})
                with drawn(Rows(batch, event, i)):
                    guide = poutine.trace(diffusion.guide).get_trace(*args, **options)
                    model = poutine.trace(poutine.replay(diffusion.model, guide)).get_trace(*args, **options)
                    noised = () if diffusion.schedule.continuous else (diffusion.noising(*args[:1]),)
                for kl in ("analytic", "monte_carlo"):
                    results += site_terms(model, guide, kl).values()
                results += noised
        return tuple(results)

    return terms(None), terms


def generator(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@check("elbo.elbo_terms", "elbo.bits_per_dim", "elbo.TraceMeanField_ELBO")
def bound(batch, event):
    diffusion, x0, shift = make(event), randn(batch, event), torch.rand(batch, dtype=F64)
    columns = torch.stack([times(batch, 2), times(batch, 2).flip(0)], 1)

    def terms(i):
        found = []
        for options in ({}, {"t": rows(columns, i)}):
            with drawn(Rows(batch, event, i)):
                found.append(elbo_terms(diffusion, rows(x0, i), shift=rows(shift, i), **options))
        found.append(found[0].by("monte_carlo"))
        return tuple(z for f in found for z in (f.prior, f.diffusion, f.reconstruction, f.elbo))

    def loss(i):  # the sum over a batch, as [1]
        with drawn(Rows(batch, event, i)):
            args = (rows(x0, i), rows(times(batch), i))
            return torch.tensor(
                pyrodiff.TraceMeanField_ELBO().loss(diffusion.model, diffusion.guide, *args, shift=rows(shift, i))
            )

    whole = loss(None)
    assert abs(whole - sum(loss(i) for i in range(batch))) <= 1e-6 * (1 + abs(whole))
    with drawn(Rows(batch, event, None)):
        found = elbo_terms(diffusion, x0, shift=shift)
    assert abs(bits_per_dim(found).mean + found.elbo.mean().item() / found.dims / 0.6931471805599453) < 1e-12
    return terms(None), terms


@check("draws.prior", "draws.steps", "draws.chain", "draws.independent", "likelihood.importance.log_weights")
def from_given_noise(batch, event):
    diffusion, x0, shift = make(event), randn(batch, event), torch.rand(batch, dtype=F64)

    def terms(i):
        x, cond, noise = rows(x0, i), {"shift": rows(shift, i)}, Rows(batch, event, i)
        found = [
            *term_draws.prior(diffusion, x, noise)[1],
            *term_draws.steps(diffusion, x, rows(times(batch), i), noise, **cond),
            *(z[0] for z in term_draws.chain(diffusion, x, 1, noise, **cond).terms),
            *(z[0] for z in term_draws.independent(diffusion, x, 1, noise, **cond).terms),
            importance.log_weights(diffusion, x, 1, noise, **cond)[0],
        ]
        return tuple(found)

    return terms(None), terms


@check("laboratory.budget.terms", "laboratory.budget.Wiener")
def subsampled(batch, event):
    diffusion, pool = make(event), randn(max(batch, 3), event)
    wiener, t = budget.Wiener.of(diffusion, pool), times(batch)

    def terms(i):
        return budget.terms(diffusion, pool, rows(torch.arange(batch), i), rows(t, i), wiener, Rows(batch, event, i))

    return terms(None), terms


@check("likelihood.information.denoising_error")
def _(batch, event):
    diffusion, x0, log_snr = make(event), randn(batch, event), torch.linspace(-3, 3, batch, dtype=F64)

    def error(i):
        return information.denoising_error(diffusion, rows(x0, i), rows(log_snr, i), Rows(batch, event, i))

    return error(None), error


@check(
    "likelihood.flow.encode", "likelihood.flow.decode", "likelihood.flow.log_density", "inference.prior.DiffusionPrior"
)
def probability_flow(batch, event):
    diffusion, x, shift = make(event), randn(batch, event), torch.rand(batch, dtype=F64)
    prior = DiffusionPrior(diffusion, "flow", steps=2)

    def walk(x, shift):
        encoded = flow.encode(diffusion, x, steps=2, solver="heun", shift=shift)
        decoded = flow.decode(diffusion, x, steps=2, solver="heun", shift=shift)
        density = flow.log_density(diffusion, x, steps=2, solver="heun", shift=shift).log_prob[0]
        return encoded, decoded, density, prior.log_prob(x)

    return case(walk, x, shift)


@check("likelihood.importance.renyi_bound", "likelihood.importance.effective_chains", "likelihood.importance.curve")
@check("likelihood.importance.pareto_k", "laboratory.values.importance_weighted")
def of_weights(batch, event):
    weights = randn(batch, (8, 32))  # [B, R, K] here; the functions have B last

    def found(w):
        w = w.movedim(0, -1)
        return (
            importance.renyi_bound(w, 0.5, 1).T,
            importance.effective_chains(w).T,
            *(z.T for z in importance.curve(w).values()),
            importance.pareto_k(w.flatten(0, 1)),
            values.importance_weighted(w[0], 4).T,
        )

    return case(found, weights)


@check("laboratory.values.systematic")
def _(batch, event):
    p = torch.softmax(torch.randn(STEPS, dtype=F64), 0)
    return case(lambda u: values.systematic(p, u), torch.rand(batch, *event, dtype=F64))


# ---------------------------------------------------------------------- samplers


@check("sample.sample", "sample.rsample", "sample.trajectory", "sample.step_log_probs", "sample.invert")
def whole_samplers(batch, event):
    """Noise is each example's own, so that a batch size of 1 is the loop."""
    diffusion, shift = make(event), torch.rand(batch, dtype=F64)
    path = sampling.trajectory(diffusion, batch, seed=0, last="sample", shift=shift)

    def found(batch_size):
        options = {"seed": 0, "batch_size": batch_size, "shift": shift}
        return (
            *(sampling.sample(diffusion, batch, method, **options) for method in sampling.METHODS),
            sampling.rsample(diffusion, batch, **options).detach(),
            sampling.trajectory(diffusion, batch, **options).movedim(0, 1),
            sampling.step_log_probs(diffusion, path, last="sample", batch_size=batch_size, shift=shift).T.detach(),
            sampling.invert(diffusion, path[-1], batch_size=batch_size, shift=shift),
        )

    alone = found(1)
    return found(batch), lambda i: tuple(z[i : i + 1] for z in alone)


for _method in ("ancestral", "ddim", "dpm_2m", "heun"):

    @check(f"sample.{_method}")
    def steps_of_samplers(batch, event, method=_method):
        p = make(event).reverse_kernel

        def move(x, before, shift):
            found = getattr(sampling, method)(p, x, 3, before, 0.5, {"shift": shift})
            return found.mean, found.std * torch.ones_like(x)

        return case(move, randn(batch, event), randn(batch, event), torch.rand(batch, dtype=F64))


@check("timesteps.ImportanceSampler", sizes=FLAT)
def _(batch, event):
    t, losses = torch.arange(4 * batch) % batch + 1, torch.rand(4 * batch)
    together, apart = ImportanceSampler(batch, 3), ImportanceSampler(batch, 3)
    together.update(t, losses)
    for i in range(len(t)):
        apart.update(t[i : i + 1], losses[i : i + 1])
    return together.probabilities, lambda i: apart.probabilities[i : i + 1]


# ---------------------------------------------------------------------- inference


@check(*(f"inference.operators.{name}" for name in ("matrix", "mask", "LinearOperator", "LinearGaussian")))
@check("inference.guidance.pigdm", "inference.guidance.mmps")
def observations(batch, event):
    keep = torch.rand(event) < 0.7
    keep.view(-1)[0] = True
    found = [operators.matrix(randn(4, event)), operators.mask(keep)]
    return case(*_seen_through(found, event), randn(batch, event))


@check("inference.operators.blur", "inference.operators.downsample", "inference.operators.separable", sizes=IMAGES)
def observations_of_images(batch, event):
    found = [
        operators.blur(event, torch.tensor([0.2, 0.5, 0.3], dtype=F64)),
        operators.downsample(event, 2),
        operators.separable(event, torch.rand(3, event[1], dtype=F64), torch.rand(2, event[2], dtype=F64)),
    ]
    return case(*_seen_through(found, event), randn(batch, event))


def _seen_through(found, event):
    def look(x):
        results = []
        for operator in found:
            seen = LinearGaussian(operator, operator(torch.ones(1, *event, dtype=F64))[0], 0.5)
            log_snr = torch.tensor(0.3, dtype=F64)
            x0_hat = torch.tanh(x.requires_grad_())
            results += [
                operator(x),
                operator.to_rows(x),
                operator.from_rows(operator.to_rows(x)),
                seen.log_prob(x),
                seen(x),
            ]
            results += [pigdm(seen)(x, x0_hat, log_snr), mmps(seen)(x, x0_hat, log_snr)]
        return tuple(z.detach() for z in results)

    return (look,)


@check("inference.observe.observation")
def _(batch, event):
    def program(x0):
        pyro.sample("y", dist.Normal(x0, 0.5).to_event(len(event)), obs=torch.ones(event, dtype=F64))

    return case(observation(program), randn(batch, event))


@check(
    "classifier.NoisyClassifier",
    "inference.guidance.class_label",
    sizes=((3, (3, 3, 3)), (5, (2, 4, 3)), (1, (1, 1, 1))),
)
def _(batch, event):
    net = shaken(Classifier(event[0], classes=3, size=event[1:], width=8, multipliers=(1,), blocks=1, attention=()))
    classifier = NoisyClassifier(net, schedule(), event).eval()
    y = torch.arange(batch) % 3
    likelihood, twist = class_label(classifier, 1)
    log_snr = schedule().log_snr(2)

    def found(x, t, y):
        return classifier(x, t).logits, classifier.log_prob(x, t, y), likelihood(x), twist(x, x, log_snr)

    return case(no_grad(found), randn(batch, event).float(), times(batch), y)


@check(*(f"inference.resampling.{name}" for name in ("multinomial", "residual", "stratified", "systematic")))
def _(batch, event):
    weights = torch.softmax(randn(batch, (7,)), -1)
    names = ("multinomial", "residual", "stratified", "systematic")
    return case(
        lambda w, u: tuple(getattr(resampling, n)(w, u) for n in names), weights, torch.rand(batch, 7, dtype=F64)
    )


@check("inference.calibration.sbc")
def _(batch, event):
    def ranks(truth, draws):
        return sbc({"x": truth}, {"x": draws}).ranks.unflatten(1, event)

    return case(ranks, randn(batch, event), randn(batch, (9, *event)))


# ---------------------------------------------------------------------- networks


def shaken(net: nn.Module) -> nn.Module:
    """A fresh network returns 0 in places: nothing would depend on anything."""
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def no_grad(function):
    def run(*args):
        with torch.no_grad():
            return function(*args)

    return run


@check("nets.mlp.MLP", sizes=((3, (3,)), (5, (2,)), (1, (1,))))
def _(batch, event):
    net = shaken(MLP(event[0], width=4, depth=1, classes=3)).double()
    return case(no_grad(lambda x, s, y: net(x, s, y=y)), randn(batch, event), randn(batch, ()), torch.arange(batch) % 3)


@check("nets.unet.UNet", sizes=IMAGES)
def _(batch, event):
    net = shaken(UNet(event[0], width=4, multipliers=(1, 1), blocks=1, attention=(1,), classes=3)).double()
    return case(no_grad(lambda x, s, y: net(x, s, y=y)), randn(batch, event), randn(batch, ()), torch.arange(batch) % 3)


@check("nets.classifier.Classifier", sizes=IMAGES)
def _(batch, event):
    net = shaken(Classifier(event[0], classes=3, size=event[1:], width=8, multipliers=(1, 1), blocks=1)).double()
    return case(no_grad(net), randn(batch, event), randn(batch, ()))


@check("nets.embeddings.ConditionEmbedding", sizes=FLAT)
def _(batch, event):
    net = shaken(embeddings.ConditionEmbedding(6, 6, classes=3)).double()
    return case(no_grad(lambda x, s, y: net(x, s, y=y)), randn(batch, (2,)), randn(batch, ()), torch.arange(batch) % 3)


@check(
    "nets.embeddings.index_features",
    "nets.embeddings.interpolate_index",
    "nets.embeddings.log_snr_features",
    sizes=FLAT,
)
def features(batch, event):
    table = torch.linspace(5, -5, 9)

    def found(s):
        return (
            embeddings.index_features(s, 6),
            embeddings.interpolate_index(s, table),
            embeddings.log_snr_features(s, 6),
        )

    return case(found, torch.randn(batch))


LAYERS = {
    "Attention": lambda c, size: layers.Attention(c, 1),
    "AttentionPool": lambda c, size: layers.AttentionPool(c, 3, positions=size[0] * size[1], heads=1),
    "AveragePool": lambda c, size: layers.AveragePool(c, 3),
    "Downsample": lambda c, size: layers.Downsample(c, dims=2, axes=2, learned=True),
    "GroupNorm": lambda c, size: layers.GroupNorm(c, 1),
    "Upsample": lambda c, size: layers.Upsample(c, dims=2, axes=2, learned=True),
    "convolution": lambda c, size: layers.convolution(2, c, 3),
}
for _name, _make in LAYERS.items():

    @check(f"nets.layers.{_name}", sizes=IMAGES)
    def _(batch, event, make=_make):
        return case(no_grad(shaken(make(event[0], event[1:])).double()), randn(batch, event))


@check("nets.layers.ResidualBlock", sizes=((4, (4, 4, 4)), (5, (4, 2, 6)), (1, (4, 1, 1))))
def _(batch, event):
    block = shaken(layers.ResidualBlock(event[0], 8, 4, dims=2)).double()
    return case(no_grad(block), randn(batch, event), randn(batch, (4,)))


@check("training.data.to_levels")
def _(batch, event):
    return case(to_levels, randn(batch, event))


@check("training.metrics.ImageClassifier", sizes=IMAGES)
def _(batch, event):
    net = shaken(ImageClassifier(torch.randn(5, *event), 3))
    return case(no_grad(net), torch.randn(batch, *event))


# ---------------------------------------------------------------------- what needs none

CONTAINER = "holds results"
BASE = "an interface: its subclasses are here"
STATISTIC = "one number of a whole batch"
TOGETHER = "particles interact by resampling, or share a generator: the functions it is made of are here"
PARTS = "draws for the batch as a whole: what it is made of is here"
PART = "a part of UNet and Classifier, which are here"
PROGRAM = "takes a program, not a batch"
NUMBERS = "takes numbers or names, not a batch"
EXEMPT = {
    "_tensor.batch_dims": "counts dims",
    "_tensor.check_event": "returns nothing",
    "_tensor.is_out_of_memory": "of an error",
    "_tensor.like_of": "of a network",
    "_tensor.to_network": "moves tensors",
    "_tensor.seed_everything": "returns nothing",
    "_tensor.seeded": "returns nothing",
    "diffusion.OBJECTIVES": "GaussianDiffusion's",
    "draws.Draws": CONTAINER,
    "draws.Terms": CONTAINER,
    "elbo.BitsPerDim": CONTAINER,
    "elbo.ELBOTerms": CONTAINER,
    "elbo.RenyiELBO": "a logarithm of means over particles of whole batches: Pyro's own, with checks",
    "inference.operators": "a module",
    "inference.bound.bound": PROGRAM,
    "inference.calibration.Calibration": CONTAINER,
    "inference.calibration.band": NUMBERS,
    "inference.calibration.uniformity": STATISTIC,
    "inference.calibration.tarp": "distances in units of the simulations' spread",
    "inference.gibbs.GibbsChain": CONTAINER,
    "inference.gibbs.particle_gibbs": TOGETHER,
    "inference.gibbs.slice_sample": "one point",
    "inference.guidance.guided": TOGETHER,
    "inference.guidance.repaint": TOGETHER,
    "inference.guides.DenoiserGuide": PROGRAM,
    "inference.observe.unobserved": PROGRAM,
    "inference.predictive.GuideDraws": CONTAINER,
    "inference.predictive.Outlook": CONTAINER,
    "inference.predictive.Plated": CONTAINER,
    "inference.predictive.guide_draws": PROGRAM,
    "inference.predictive.joined": CONTAINER,
    "inference.predictive.known": PROGRAM,
    "inference.predictive.outlook": PROGRAM,
    "inference.prior.FlowReparam": PROGRAM,
    "inference.proposals.PROPOSALS": NUMBERS,
    "inference.proposals.Bootstrap": TOGETHER,
    "inference.proposals.Look": CONTAINER,
    "inference.proposals.MCGDiff": TOGETHER,
    "inference.proposals.Replacement": TOGETHER,
    "inference.proposals.Steer": CONTAINER,
    "inference.proposals.Twisted": TOGETHER,
    "inference.proposals.per_particle": "returns its argument",
    "inference.resampling.RESAMPLING": NUMBERS,
    "inference.smc.Evidence": CONTAINER,
    "inference.smc.Posterior": CONTAINER,
    "inference.smc.Source": TOGETHER,
    "inference.smc.Walk": CONTAINER,
    "inference.smc.prepare": TOGETHER,
    "inference.smc.smc": TOGETHER,
    "inference.smc.walk": TOGETHER,
    "inference.steps.StepsBias": CONTAINER,
    "inference.steps.steps_bias": PARTS,
    "laboratory.budget.Design": CONTAINER,
    "laboratory.budget.ELBOEstimate": CONTAINER,
    "laboratory.budget.Moments": STATISTIC,
    "laboratory.budget.estimate_elbo": PARTS,
    "laboratory.budget.t_quantile": NUMBERS,
    "laboratory.compare.Comparison": CONTAINER,
    "laboratory.compare.compare_estimators": PARTS,
    "laboratory.gradients.Estimator": CONTAINER,
    "laboratory.gradients.Question": CONTAINER,
    "laboratory.gradients.compare_gradients": PARTS,
    "laboratory.gradients.gradient": STATISTIC,
    "laboratory.gradients.parameter_groups": STATISTIC,
    "laboratory.gradients.questions": PARTS,
    "laboratory.values.KLS": NUMBERS,
    "laboratory.values.by_timestep": STATISTIC,
    "laboratory.values.control_variate": STATISTIC,
    "laboratory.values.value_estimators": PARTS,
    "likelihood.dequantise.DEQUANTISATIONS": NUMBERS,
    "likelihood.dequantise.flow_bound": PARTS,
    "likelihood.dequantise.signed_gap": CONTAINER,
    "likelihood.estimate.LogLikelihood": CONTAINER,
    "likelihood.estimate.cautions": NUMBERS,
    "likelihood.estimate.check": "returns nothing",
    "likelihood.estimate.seeded": NUMBERS,
    "likelihood.flow.SOLVERS": NUMBERS,
    "likelihood.flow.FlowDensity": CONTAINER,
    "likelihood.importance.importance_weighted": PARTS,
    "likelihood.information.Density": "a density of log-SNRs",
    "likelihood.information.information": PARTS,
    "likelihood.methods.METHODS": NUMBERS,
    "likelihood.methods.log_likelihood": PARTS,
    "likelihood.methods.lower_bound": PARTS,
    "likelihood.methods.options_of": NUMBERS,
    "nets.REGISTRY": NUMBERS,
    "nets.build": NUMBERS,
    "nets.encoder.Block": PART,
    "nets.encoder.Encoder": PART,
    "nets.encoder.Layers": PART,
    "nets.encoder.Level": PART,
    "nets.layers.zero_parameters": NUMBERS,
    "reverse.PREDICTIONS": NUMBERS,
    "reverse.VARIANCES": NUMBERS,
    "sample.METHODS": NUMBERS,
    "sample.Move": CONTAINER,
    "schedules.Curve": BASE,
    "schedules.Schedule": BASE,
    "timesteps.low_discrepancy": NUMBERS,
    "timesteps.uniform": NUMBERS,
    "training.ema.EMA": "parameters, not examples",
    "training.data.ImageData": CONTAINER,
    "training.data.load_data": "reads files",
    "training.fit.Fit": CONTAINER,
    "training.fit.fit": "trains: a sum over the batch",
    "training.metrics.class_shares": STATISTIC,
    "training.metrics.feature_distance": STATISTIC,
    "training.metrics.fit_classifier": "trains: a sum over the batch",
    "training.metrics.frechet_distance": STATISTIC,
    "training.optim.JointOptim": "parameters, not examples",
}
# Pictures, files, tables, commands: nothing that is computed per example and returned.
EXEMPT_MODULES = ("_files", "cli", "errors", "inference_data", "interop", "plots", "report", "training.checkpoint")


def public_names() -> set[str]:
    """Each name of an ``__all__``, under the module that defines it."""
    found = set()
    for module in pkgutil.walk_packages(pyrodiff.__path__, "pyrodiff."):
        if module.name.endswith("__main__"):
            continue
        loaded = importlib.import_module(module.name)
        for name in getattr(loaded, "__all__", ()):
            if getattr(getattr(loaded, name), "__module__", module.name) == module.name:
                found.add(f"{module.name.removeprefix('pyrodiff.')}.{name}")
    return {name for name in found if not name.startswith(EXEMPT_MODULES)}


@pytest.mark.reliability("Q9")
def test_every_public_name_is_checked_or_has_a_reason(figure):
    checked = {name.split(" ")[0] for name in CHECKS}
    names = {name for name in public_names() if name not in ("draws.Noise",)}
    assert sorted(names - checked - EXEMPT.keys()) == []
    assert sorted((checked | EXEMPT.keys()) - names) == []
    assert not checked & EXEMPT.keys()
    figure(
        "Q9",
        "share of public names checked or exempt with a reason",
        1 - len(names - checked - EXEMPT.keys()) / len(names),
        at_least=1,
    )
    figure("Q9", "names checked", len(checked), at_least=80)


FUNCTIONS = {function: name for name, (_, function) in reversed(CHECKS.items())}  # a check of several names runs once


def differences(name: str) -> Iterator[float]:
    """For each size, how far a whole batch is from a loop over its examples."""
    sizes, function = CHECKS[name]
    for batch, event in sizes:
        whole, one = function(batch, event)
        whole = whole if isinstance(whole, tuple) else (whole,)
        alone = []
        for i in range(batch):
            found = one(i)
            alone.append(found if isinstance(found, tuple) else (found,))
        worst = 0.0
        for k, together in enumerate(whole):
            apart = torch.cat([row[k] for row in alone])
            assert together.shape == apart.shape, f"{batch}, {event}: {list(together.shape)} for {list(apart.shape)}"
            assert together.dtype == apart.dtype
            off = (together.double() - apart.double()).abs()
            same = together == apart  # infinities
            worst = max(worst, off.masked_fill(same, 0).max().item() if off.numel() else 0.0)
        yield worst


@pytest.mark.reliability("Q9")
@pytest.mark.parametrize("name", sorted(FUNCTIONS.values()))
def test_a_batch_is_its_examples(name, figure):
    for worst in differences(name):
        figure("Q9", "difference from a loop over examples", worst, at_most=1e-6)
        figure.count("Q9", "functions x sizes", 1, at_least=150)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(FUNCTIONS.values()))
def test_every_public_function_runs_on_cuda(name):
    with torch.device("cuda"):  # the tests' tensors are there; the library has to follow them
        assert max(differences(name)) < 1e-4  # float32 networks of another batch size


def test_a_broadcast_from_the_right_would_be_seen():
    """What the checks are for: right where no two sizes are equal (it raises), silently wrong where all are."""
    batch, event = EQUAL
    whole, one = case(lambda v, x: v * x, torch.rand(batch, dtype=F64), randn(batch, event))
    assert max((whole[i] - one(i)[0]).abs().max() for i in range(batch)) > 1e-3
