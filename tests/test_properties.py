"""Properties of every public function, over sizes, dtypes and layouts that hypothesis draws.

`@covers` names what a test calls, and the test fails if it does not; a public name that no test covers fails too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
import os
import pkgutil
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracles import hermite, linear_betas
from pyro import poutine
from test_closed_forms import exact_terms, gaussian
from torch.distributions import Normal, kl_divergence

import pyrodiff
from pyrodiff import GaussianDiffusion, nets
from pyrodiff.distributions import DiscretizedNormal, Gaussian
from pyrodiff.forward import ForwardProcess
from pyrodiff.schedules import CosineSchedule, LearnedSchedule, LinearSchedule, LogLinearSchedule, TableSchedule

F32, F64 = torch.float32, torch.float64
CLOSE = {F32: {"rtol": 2e-4, "atol": 2e-5}, F64: {"rtol": 1e-10, "atol": 1e-11}}  # sums in another order
COVERED: dict[str, set[str]] = {}

# Whole modules whose tests are of another kind
EXEMPT = {
    "pyrodiff.cli": "the command: bad input and its messages in test_cli and the fuzz of Q17",
    "pyrodiff.errors": "exceptions and the wording of a refusal",
    "pyrodiff.inference_data": "trees for ArviZ, read back by ArviZ in their own tests",
    "pyrodiff.interop.cards": "flags of foreign checkpoints: test_interop_*",
    "pyrodiff.interop.convert": "files: converted there and back in test_interop_convert",
    "pyrodiff.interop.diffusers": "files: parity with the peer in test_interop_diffusers*",
    "pyrodiff.interop.guided_diffusion": "files: parity with published figures in test_interop_guided_diffusion",
    "pyrodiff.laboratory.compare": "tables, pictures and files of what laboratory.values and .gradients measure",
    "pyrodiff.plots": "pictures",
    "pyrodiff.report": "a run's files and its words",
    "pyrodiff._files": "files: every call fails in turn in test_checkpoint",
    "pyrodiff.training.checkpoint": "files: damaged by the ten thousand in test_checkpoint",
    "pyrodiff.training.data": "files: every mode, depth and damage in test_data",
    "pyrodiff.training.fit": "trains: test_fit",
}


def public() -> dict[str, Any]:
    """Functions and classes that a module's ``__all__`` names and that are defined there."""
    found = {}
    for info in pkgutil.walk_packages(pyrodiff.__path__, "pyrodiff."):
        if info.name in EXEMPT or info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", None) == info.name:
                found[f"{info.name.removeprefix('pyrodiff.')}.{name}"] = value
    return found


def codes(value: Any) -> set[CodeType]:
    """The code of a function, or of a class's own functions."""
    members = [value] if inspect.isroutine(value) else [*vars(value).values()]
    functions = [getattr(inspect.unwrap(getattr(m, "__func__", m)), "__code__", None) for m in members]
    functions += [m.fget.__code__ for m in members if isinstance(m, property)]
    return {code for code in functions if code}


def covers(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test calls these public functions, or functions of these classes, in one of its examples."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            COVERED.setdefault(name, set()).add(test.__name__)

        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            api = public()
            wanted = {code: name for name in names for code in codes(api[name])}
            called: set[str] = set()

            def profile(frame: Any, event: str, _: Any) -> None:
                if event == "call" and frame.f_code in wanted:
                    called.add(wanted[frame.f_code])

            before = sys.getprofile()
            sys.setprofile(profile)
            try:
                test(*args, **kwargs)
            finally:
                sys.setprofile(before)
            if missing := set(wanted.values()) - called:
                raise AssertionError(f"the test does not call {sorted(missing)}")

        return run

    return decorate


def some(n: int) -> settings:
    """So many examples; PYRODIFF_EXAMPLES=20 for as many times more."""
    more = int(os.environ.get("PYRODIFF_EXAMPLES", "1"))
    return settings(max_examples=n * more, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.reliability("Q9")
def test_every_public_function_has_a_property(figure):
    api = public()
    assert COVERED.keys() - api.keys() == set(), "no such public name"
    assert api.keys() - COVERED.keys() == set(), "public, and no property test covers it"
    figure("Q9", "public functions and classes that a property test calls", len(COVERED), at_least=150)
    for module in EXEMPT:
        importlib.import_module(module)


# ---------------------------------------------------------------------- what is drawn

EVENTS = st.sampled_from([(1,), (3,), (2, 1), (1, 2, 3), (3, 3, 3), (2, 2, 2), (1, 1, 1)])
BATCHES = st.sampled_from([1, 2, 3])  # as long as dims of the events
DTYPES = st.sampled_from([F32, F64])
SEEDS = st.integers(0, 2**31)
STEPS = st.one_of(st.integers(1, 12), st.sampled_from([100, 1000, 10_000]))


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


KINDS = ("linear", "cosine", "log-linear", "learned", "table")


def schedule_of(kind: str, T: int, low: float, span: float, seed: int) -> Any:
    if kind == "linear":
        return LinearSchedule(T) if T >= 20 else TableSchedule(torch.from_numpy(linear_betas(T)))
    if kind == "cosine":
        return CosineSchedule(T)
    if kind == "log-linear":
        return LogLinearSchedule(T, low, low + span)
    if kind == "learned":
        return LearnedSchedule(T, low, low + span, width=4)
    # any valid betas: of each, that of the marginal, whatever came before
    return TableSchedule(10.0 ** -(4 * normal(seed, min(T, 50)).abs().clamp(1e-3, 1)))


ENDS = {"low": st.floats(-12, 2), "span": st.floats(0.5, 15), "seed": SEEDS}


def schedules(steps: Any) -> Any:
    return st.builds(schedule_of, st.sampled_from(KINDS), steps, **ENDS)


class Net(nn.Module):
    """Of every element alone and of the example's own noise level; a parameter, so that it has a dtype."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        level = (log_snr / 8).tanh().reshape(-1, *(1,) * (x.dim() - 1)).to(x.dtype)
        return self.scale * (x + 0.3 * level).tanh() + 0.1 * level


@st.composite
def diffusions(draw: Any, steps: Any = None, event: Any = EVENTS, **options: Any) -> GaussianDiffusion:
    steps = st.integers(1, 5) if steps is None else steps
    given = {
        "prediction": draw(st.sampled_from(["eps", "x0", "v"])),
        "variance": draw(st.sampled_from(["fixed_small", "fixed_large"])),
    } | options
    low = draw(st.floats(-6, -2))
    schedule = LogLinearSchedule(draw(steps), low, low + draw(st.floats(4, 9)))
    return GaussianDiffusion(Net(draw(DTYPES)), schedule, draw(event), **given)


def dtype_of(diffusion: GaussianDiffusion) -> torch.dtype:
    return next(diffusion.net.parameters()).dtype


def layouts(x: Tensor) -> list[Tensor]:
    """The same values: strided, transposed, and with an offset."""
    strided = torch.stack([x, x + 1], -1)[..., 0]
    turned = x.movedim(0, -1).contiguous().movedim(-1, 0)
    offset = torch.cat([x[:1], x])[1:]
    return [strided, turned, offset]


def outputs(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in outputs(each)]
    if isinstance(value, dist.Distribution) or hasattr(value, "log_prob"):
        return [value.mean, value.variance]
    return []


def rowwise(function: Callable[..., Any], *inputs: Tensor, tolerance: dict[str, float] | None = None) -> None:
    """A row of the outputs is that of the row of the inputs: alone, among others, in any order and layout.

    And the inputs, the global random state and the parameters' values are left as they were.
    """
    before, state = [x.detach().clone() for x in inputs], torch.get_rng_state()
    whole = outputs(function(*inputs))
    assert whole and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))
    n = len(inputs[0])
    close = tolerance or CLOSE[F64 if all(x.dtype in (F64, torch.int64) for x in inputs) else F32]

    def same(found: Any, expected: list[Tensor]) -> None:
        for a, b in zip(outputs(found), expected, strict=True):
            torch.testing.assert_close(a, b, **close)

    for i in range(n):
        same(function(*(x[i : i + 1] for x in inputs)), [y[i : i + 1] for y in whole])
    order = torch.arange(n).flip(0)
    same(function(*(x[order] for x in inputs)), [y[order] for y in whole])
    same(function(*(torch.cat([x, x]) for x in inputs)), [torch.cat([y, y]) for y in whole])
    for views in zip(*map(layouts, inputs), strict=True):
        same(function(*views), whole)
    one = [x[:1].expand(n, *x.shape[1:]) for x in inputs]
    same(function(*one), [y[:1].expand(n, *y.shape[1:]) for y in whole])


# ---------------------------------------------------------------------- schedules, q, p


@covers(
    "schedules.Schedule", "schedules.CosineSchedule", "schedules.LinearSchedule", "schedules.LogLinearSchedule",
    "schedules.LearnedSchedule", "schedules.TableSchedule", "schedules.RespacedSchedule", "schedules.Curve",
)  # fmt: skip
@some(8)
@given(st.sampled_from([1, 2, 3, 7, 12, 100, 1000, 10_000]), st.data(), st.fixed_dictionaries(ENDS))
def test_schedules(T: int, data: Any, ends: dict[str, Any]):
    for kind in KINDS:
        check_schedule(schedule_of(kind, T, **ends), data)


def check_schedule(schedule: Any, data: Any) -> None:
    T = schedule.steps
    t = torch.tensor(sorted({1, T, *(data.draw(st.integers(1, T)) for _ in range(4))}))
    log_snr = schedule.log_snr(t)
    assert log_snr.dtype == F64 and log_snr.isfinite().all() and (log_snr.diff() <= 0).all()
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(len(t), dtype=F64))
    assert schedule.log_snr(0) == math.inf and schedule.log_snr(int(t[0])) == log_snr[0]
    torch.testing.assert_close(schedule.log_snr(t[:, None].expand(-1, 3)), log_snr[:, None].expand(-1, 3))
    assert schedule.weight(t) == T and schedule.log_density(t) is None
    betas = schedule.betas
    assert betas.shape == (T,) and (betas > 0).all() and (betas < 1).all()
    # a respaced chain keeps the marginals; through all of its steps it is the same chain
    kept = t.tolist()
    torch.testing.assert_close(schedule.respace(kept).log_snr(torch.arange(1, len(kept) + 1)), log_snr, rtol=0, atol=0)
    if T <= 100:
        whole = schedule.respace(T)
        every = torch.arange(1, T + 1)
        torch.testing.assert_close(whole.log_snr(every), schedule.log_snr(every), rtol=0, atol=0)
        torch.testing.assert_close(whole.betas, betas, rtol=1e-9, atol=0)
    assert repr(schedule) and repr(schedule.respace(kept))


@covers("forward.ForwardProcess", "distributions.Gaussian")
@some(12)
@given(schedules(st.integers(2, 30)), EVENTS, BATCHES, DTYPES, SEEDS, st.data())
def test_forward_process(schedule, event, batch, dtype, seed, data):
    q = ForwardProcess(schedule, len(event))
    T = schedule.steps
    x0, x_t = normal(seed, batch, *event, dtype=dtype), normal(seed + 1, batch, *event, dtype=dtype)
    t = torch.tensor([data.draw(st.integers(2, T)) for _ in range(batch)])
    rowwise(q.marginal, x0, t)
    rowwise(lambda x, t: q.transition(x, t - 1, t), x0, t)
    rowwise(q.posterior, x0, x_t, t)
    rowwise(lambda x, t: q.posterior_terms(x, t)[1:], x_t, t)
    # Bayes: q(x_t | x_s) q(x_s | x_0) = q(x_s | x_t, x_0) q(x_t | x_0), at any x_s
    x_s = normal(seed + 2, batch, *event)
    x0, x_t = x0.double(), x_t.double()
    left = q.transition(x_s, t - 1, t).log_prob(x_t) + q.marginal(x0, t - 1).log_prob(x_s)
    right = q.posterior(x0, x_t, t).log_prob(x_s) + q.marginal(x0, t).log_prob(x_t)
    scale = 1 + left.abs() + right.abs() + q.posterior(x0, x_t, t).log_prob(x_s).abs()
    assert ((left - right).abs() <= 1e-7 * scale).all()
    prior = q.prior(x0.shape, x0)
    assert (kl_divergence(q.marginal(x0, T), prior) >= 0).all() and prior.batch_shape == (batch,)
    assert torch.equal(q.with_x_s(torch.tensor([1, 2, T])), torch.tensor([2, 2, T]))


@covers("distributions.Gaussian")
@some(50)
@given(DTYPES, st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.floats(-12, 12))
def test_kl_of_gaussians(dtype, a, b, scale, log_ratio):
    one = Gaussian(torch.tensor([a, 0.0], dtype=dtype), torch.tensor(scale, dtype=dtype))
    other = Gaussian(torch.tensor([b, 1e-8], dtype=dtype), torch.tensor(scale * math.exp(log_ratio), dtype=dtype))
    found = kl_divergence(one, other)
    assert (found >= 0).all() and torch.equal(kl_divergence(one, one), torch.zeros(2, dtype=dtype))
    torch.testing.assert_close(one.log_prob(one.mean), -one.stddev.log() - math.log(2 * math.pi) / 2)
    torch.testing.assert_close(one.entropy(), 0.5 - one.log_prob(one.mean))
    wide = one.expand((3, 2))
    assert wide.rsample().shape == (3, 2) and torch.equal(wide.mean, one.mean.expand(3, 2))
    torch.testing.assert_close(Normal(one.mean, one.stddev).log_prob(one.mean + 1), one.log_prob(one.mean + 1))


@covers("distributions.DiscretizedNormal", "distributions.OnGrid")
@some(25)
@given(DTYPES, st.integers(2, 300), st.floats(-3, 3), st.floats(0.01, 10), st.floats(-30, 30), st.floats(-6, 6), SEEDS)
def test_discretised_normals(dtype, levels, low, span, place, log_scale, seed):
    loc = torch.tensor([low + place * span, low], dtype=dtype)
    d = DiscretizedNormal(loc, math.exp(log_scale) * span, span / (levels - 1), low, low + span)
    grid = d.support
    index = torch.arange(levels)
    points = grid.points(index.to(dtype))
    assert torch.equal(grid.index(points).round().long(), index) and grid.check(points).all()
    log_p = d.log_prob(d.enumerate_support())
    assert (log_p <= 1e-6).all() and log_p.isfinite().all()
    torch.testing.assert_close(log_p.double().exp().sum(0), torch.ones(2, dtype=F64), rtol=0, atol=2e-5)
    torch.testing.assert_close(d.pmf().double().sum(-1), torch.ones(2, dtype=F64), rtol=0, atol=2e-5)
    torch.manual_seed(seed)
    draws = d.sample((5,))
    assert grid.check(draws).all() and torch.equal(d.snap(draws), draws)
    off = low + span * (normal(seed, 5, 2, dtype=dtype) + 0.5)
    assert torch.equal(d.snap(d.snap(off)), d.snap(off))
    wide = d.expand((4, 2))
    torch.testing.assert_close(wide.log_prob(draws[:1].expand(4, 2)), d.log_prob(draws[0]).expand(4, 2))


@covers("reverse.ReverseKernel")
@some(10)
@given(diffusions(st.integers(2, 6)), BATCHES, SEEDS, st.booleans(), st.data())
def test_reverse_kernel(diffusion, batch, seed, clip, data):
    p, dtype = diffusion.reverse_kernel, dtype_of(diffusion)
    T, event = diffusion.steps, diffusion.event_shape
    x = normal(seed, batch, *event, dtype=dtype)
    t = torch.tensor([data.draw(st.integers(2, T)) for _ in range(batch)])
    with torch.no_grad():
        rowwise(p, x, t)
        rowwise(p.both, x, t)
        rowwise(p.decode, x)
        rowwise(p.denoise, x, t)
        rowwise(lambda x, t: p.laws(p.predict(x, t), x, t), x, t)
        rowwise(lambda x, t: p.denoise_at(x, diffusion.schedule.log_snr(t)), x, t)
        torch.testing.assert_close(p.denoise_at(x, diffusion.schedule.log_snr(t)), p.denoise(x, t), **CLOSE[dtype])
        # respacing: the whole chain is itself, and a kept step keeps the denoiser
        whole, kept = p.respace(T), p.respace([1, T])
        for a, b in zip(outputs(whole(x, t)), outputs(p(x, t)), strict=True):
            torch.testing.assert_close(a, b, **CLOSE[dtype])
        torch.testing.assert_close(kept.denoise(x, 2), p.denoise(x, T), **CLOSE[dtype])


@covers("diffusion.GaussianDiffusion", "elbo.site_terms", "elbo.TraceMeanField_ELBO")
@some(10)
@given(diffusions(), BATCHES, SEEDS)
def test_programs(diffusion, batch, seed):
    """A batch costs what its examples cost, in any order and layout; the loss is the sum of the sites."""
    x0 = normal(seed, batch, *diffusion.event_shape, dtype=dtype_of(diffusion))

    def terms(x0: Tensor) -> Tensor:
        # one noise for all, whatever the batch: the sites' values are replayed from a table
        guide = poutine.trace(diffusion.guide).get_trace(x0)
        for name, site in guide.nodes.items():
            if site["type"] == "sample" and name.startswith("x_"):
                noise = normal(hash(len(name)) % 1000, 1, *diffusion.event_shape, dtype=x0.dtype)
                site["value"] = (0.5 * x0 + noise).contiguous()
        model = poutine.trace(poutine.replay(diffusion.model, guide)).get_trace(x0)
        again = poutine.trace(poutine.replay(diffusion.guide, guide)).get_trace(x0)
        return sum(pyrodiff.elbo.site_terms(model, again).values())

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()

        def fixed(x0: Tensor) -> Tensor:
            found = terms(x0)
            torch.set_rng_state(state)
            return found

        rowwise(fixed, x0)
        torch.manual_seed(seed)
        loss = pyrodiff.TraceMeanField_ELBO().loss(diffusion.model, diffusion.guide, x0)
        torch.manual_seed(seed)
        guide = poutine.trace(diffusion.guide).get_trace(x0)
        model = poutine.trace(poutine.replay(diffusion.model, guide)).get_trace(x0)
        found = pyrodiff.elbo.site_terms(model, guide)
        assert loss == pytest.approx(float(sum(v.double().sum() for v in found.values())), rel=1e-4)
        for name, value in found.items():  # kl terms
            assert name == "x_0" or (value >= -1e-6).all()


@covers("diffusion.GaussianDiffusion")
@some(20)
@given(
    st.sampled_from([1, 2, 5, 20]), st.sampled_from(["fixed_small", "fixed_large"]), st.floats(-0.3, 0.3), st.floats(-0.5, 0.5)
)  # fmt: skip
def test_the_bound_is_above_the_entropy(steps, variance, gain, bias):
    """Of any linear denoiser, by quadrature: NELBO >= E[-log p(x_0)] >= H, and of the exact one the first gap is in closed form."""
    assume(variance == "fixed_large" or steps > 1)
    diffusion, oracle = gaussian(linear_betas(steps), "v", variance, event_shape=(1,), gain=gain, bias=bias)
    nodes, weights = hermite(3)
    x0 = torch.from_numpy(oracle.mean + math.sqrt(oracle.var) * nodes)[:, None]
    found = sum(
        float(torch.from_numpy(weights) @ term.reshape(len(x0), -1).sum(1)) for term in exact_terms(diffusion, x0)
    )
    cross = -oracle.data_average(oracle.log_density)
    assert found >= cross - 1e-9 >= oracle.entropy - 2e-9
    assert found == pytest.approx(oracle.data_average(oracle.nelbo), rel=1e-9)


@covers("draws.chain", "draws.independent", "draws.prior", "draws.steps", "draws.Terms", "draws.Draws")
@some(6)
@given(diffusions(st.integers(2, 4)), BATCHES, SEEDS)
def test_terms_from_given_noise(diffusion, batch, seed):
    from pyrodiff import draws

    dtype, event = dtype_of(diffusion), diffusion.event_shape
    x0 = normal(seed, batch, *event, dtype=dtype)
    t = torch.arange(batch) % diffusion.steps + 1

    def noise(x: Tensor) -> Tensor:  # one for all rows
        return normal(seed, 1, *x.shape[1:], dtype=x.dtype).expand(x.shape)

    with torch.no_grad():
        rowwise(lambda x: draws.prior(diffusion, x, noise), x0)
        rowwise(lambda x, t: tuple(draws.steps(diffusion, x, t, noise)), x0, t)
        for function in (draws.chain, draws.independent):
            rowwise(lambda x, f=function: tuple(z[0] for z in f(diffusion, x, 1, noise).terms), x0)
            one, other = (function(diffusion, x0, 3, noise, batch_size=b).terms for b in (2, 100))
            for a, b in zip(one, other, strict=True):
                assert a.shape == (3, batch, diffusion.steps + 1)
                torch.testing.assert_close(a, b, **CLOSE[dtype])
            assert (one.analytic[..., 1:] >= -1e-6).all()  # KLs


@covers("elbo.elbo_terms", "elbo.ELBOTerms", "elbo.bits_per_dim", "elbo.BitsPerDim")
@some(10)
@given(diffusions(st.integers(2, 4)), BATCHES, SEEDS, st.sampled_from([{}, {"chain": False}, {"t": 1}]))
def test_ledgers(diffusion, batch, seed, options):
    x0 = normal(seed, batch, *diffusion.event_shape, dtype=dtype_of(diffusion))
    before = x0.clone()
    terms = pyrodiff.elbo_terms(diffusion, x0, repeats=2, **options)
    assert torch.equal(x0, before) and terms.elbo.shape[-1] == batch
    assert (terms.prior >= -1e-6).all() and (terms.diffusion >= -1e-6).all()
    assert set(terms.parts()) >= {"prior", "diffusion", "reconstruction", "total"} and terms.table()
    torch.testing.assert_close(terms.parts()["total"].mean(0), -terms.elbo)
    bits = pyrodiff.bits_per_dim(terms)
    dims = diffusion.event_shape.numel()
    assert "bits/dim" in str(bits)
    assert bits.mean == pytest.approx(-float(terms.elbo.mean()) / dims / math.log(2), rel=1e-6)
    assert terms.by("monte_carlo").elbo.shape == terms.elbo.shape


@covers("elbo.RenyiELBO")
@some(8)
@given(diffusions(st.integers(1, 3), event=st.sampled_from([(1,), (2,)])), SEEDS)
def test_renyi_bounds_fall_with_alpha(diffusion, seed):
    """At the same draws: a power mean of the same weights."""
    x0 = normal(seed, 1, *diffusion.event_shape, dtype=dtype_of(diffusion))
    found = []
    for alpha in (0.0, 0.5, 2.0):
        torch.manual_seed(seed)
        elbo = pyrodiff.RenyiELBO(alpha=alpha, num_particles=8, vectorize_particles=True, max_plate_nesting=1)
        found.append(-elbo.loss(diffusion.model, diffusion.guide, x0))
    assert found == sorted(found, reverse=True) and all(map(math.isfinite, found))


@covers("timesteps.uniform", "timesteps.low_discrepancy", "timesteps.ImportanceSampler")
@some(25)
@given(st.integers(1, 40), STEPS, SEEDS)
def test_timesteps(batch, T, seed):
    generators = [torch.Generator().manual_seed(seed) for _ in range(6)]
    state = torch.get_rng_state()
    for draw, a, b in (
        (pyrodiff.timesteps.uniform, *generators[:2]),
        (pyrodiff.timesteps.low_discrepancy, *generators[2:4]),
    ):
        t = draw(batch, T, generator=a)
        assert t.shape == (batch,) and t.dtype == torch.int64 and 1 <= t.min() and t.max() <= T
        assert torch.equal(t, draw(batch, T, generator=b))
    sampler = pyrodiff.timesteps.ImportanceSampler(min(T, 50), history=2)
    every = torch.arange(1, min(T, 50) + 1).repeat(2)
    sampler.update(every, every.double() + normal(seed, len(every)).abs())
    p = sampler.probabilities
    assert (p > 0).all() and float(p.sum()) == pytest.approx(1)
    t, weight = sampler.sample(batch, generator=generators[4])
    torch.testing.assert_close(weight, (1 / p[t - 1]).float())
    other = pyrodiff.timesteps.ImportanceSampler(min(T, 50), history=2)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.probabilities, p) and torch.equal(torch.get_rng_state(), state)


@covers(
    "_tensor.append_dims", "_tensor.batch_dims", "_tensor.check_event", "_tensor.in_parts", "_tensor.is_out_of_memory",
    "_tensor.like_of", "_tensor.sum_event", "_tensor.take_rows", "_tensor.to_network",
)  # fmt: skip
@some(25)
@given(EVENTS, BATCHES, DTYPES, SEEDS)
def test_shapes(event, batch, dtype, seed):
    from pyrodiff import _tensor

    x = normal(seed, batch, *event, dtype=dtype)
    rowwise(lambda x: _tensor.sum_event(x, len(event)), x)
    torch.testing.assert_close(_tensor.sum_event(x, len(event)), x.reshape(batch, -1).sum(1))
    assert _tensor.append_dims(x[:, 0], 2).shape == (*x[:, 0].shape, 1, 1)
    _tensor.check_event("x", x, torch.Size(event))
    with pytest.raises(pyrodiff.errors.ShapeError):
        _tensor.check_event("x", x, torch.Size((*event, 7)))
    assert _tensor.like_of(nn.Linear(2, 2, dtype=dtype)).dtype == dtype
    assert _tensor.like_of(nn.Identity()).dtype == torch.get_default_dtype()
    cond = {"y": torch.arange(batch), "all": torch.tensor(1.0), "kind": "a"}
    assert _tensor.batch_dims(nn.Identity(), cond) == {"y": 1, "all": 0}
    assert _tensor.to_network(nn.Identity(), x, cond) == (x, cond)
    moved, told = _tensor.to_network(nn.Linear(2, 2, device="meta"), x, cond)
    assert moved.is_meta and told["y"].is_meta and told["kind"] == "a" and not cond["y"].is_meta
    rows = _tensor.take_rows(nn.Identity(), cond, slice(0, 1), batch)
    assert rows["y"].tolist() == [0] and rows["all"] == 1 and cond["y"].shape == (batch,)

    def square(rows: slice) -> torch.Tensor:
        if len(x[rows]) > batch / 2 > 0.5:
            raise torch.OutOfMemoryError("out of memory")
        return x[rows] ** 2

    found, fitting = _tensor.in_parts(square, batch)
    assert torch.equal(found, x**2) and (fitting == math.inf or fitting <= (batch + 1) / 2)
    assert _tensor.is_out_of_memory(MemoryError()) and not _tensor.is_out_of_memory(RuntimeError("shapes"))


WORDS = st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3)


@covers("_tensor.seed_everything", "_tensor.seeded")
@given(WORDS, WORDS)
def test_seeds(numbers, others):
    from pyrodiff import _tensor

    cpu, before = torch.device("cpu"), torch.get_rng_state()
    with _tensor.seeded(cpu, *numbers):
        first = torch.randn(8)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        _tensor.seed_everything(cpu, *numbers)
        assert torch.equal(torch.randn(8), first)
        _tensor.seed_everything(cpu, *others)
        assert torch.equal(torch.randn(8), first) == (numbers == others)


# ---------------------------------------------------------------------- samplers


@covers(
    "sample.sample", "sample.trajectory", "sample.rsample", "sample.invert", "sample.step_log_probs", "sample.ancestral",
    "sample.ddim", "sample.dpm_2m", "sample.heun",
)  # fmt: skip
@some(25)
@given(
    diffusions(st.integers(2, 4)), st.sampled_from(["ancestral", "ddim", "dpm++2m", "heun"]), st.integers(1, 3), SEEDS
)
def test_samplers(diffusion, method, n, seed):
    dtype, event = dtype_of(diffusion), diffusion.event_shape
    options = {"method": method, "seed": seed}
    state = torch.get_rng_state()
    x = pyrodiff.sample(diffusion, n, **options)
    assert x.shape == (n, *event) and x.dtype == dtype and not x.requires_grad
    # the noise of an example does not depend on how many there are, nor on the batches
    torch.testing.assert_close(pyrodiff.sample(diffusion, n + 2, batch_size=2, **options)[:n], x, **CLOSE[dtype])
    path = pyrodiff.trajectory(diffusion, n, **options)
    assert path.shape == (diffusion.steps + 1, n, *event)
    torch.testing.assert_close(path[-1], x, **CLOSE[dtype])
    again = pyrodiff.rsample(diffusion, n, **options)
    torch.testing.assert_close(again.detach(), x, **CLOSE[dtype])
    assert torch.autograd.grad(again.sum(), diffusion.net.scale)[0].isfinite()
    # respacing through every step is the chain itself
    torch.testing.assert_close(pyrodiff.sample(diffusion, n, steps=diffusion.steps, **options), x, **CLOSE[dtype])
    with torch.no_grad():
        rowwise(lambda x: pyrodiff.invert(diffusion, x), x)
        if method == "ancestral":
            path = pyrodiff.trajectory(diffusion, n, last="sample", seed=seed)
            log_p = pyrodiff.step_log_probs(diffusion, path, last="sample")
            assert log_p.shape == (diffusion.steps, n)
            rowwise(lambda p: pyrodiff.step_log_probs(diffusion, p.movedim(1, 0), last="sample").T, path.movedim(0, 1))
    assert torch.equal(torch.get_rng_state(), state)


@covers("sample.Move")
def test_moves_are_tuples():
    from pyrodiff.sample import Move

    move = Move(torch.zeros(2), torch.ones(()))
    assert move._replace(x0_hat=move.mean).x0_hat is move.mean


# ---------------------------------------------------------------------- networks


@covers("nets.mlp.MLP", "nets.build", "nets.embeddings.ConditionEmbedding")
@some(15)
@given(st.integers(1, 4), st.sampled_from([None, 3]), BATCHES, DTYPES, SEEDS)
def test_mlps(features, classes, batch, dtype, seed):
    net = nets.build("MLP", {"features": features, "width": 8, "depth": 1, "classes": classes}).to(dtype).eval()
    with torch.no_grad():
        for p in net.parameters():  # a fresh network returns 0
            p.copy_(0.3 * normal(seed, *p.shape, dtype=dtype))
        x, log_snr = normal(seed, batch, features, dtype=dtype), 3 * normal(seed + 1, batch, dtype=dtype)
        label = (torch.arange(batch) % 3,) if classes else ()
        rowwise(lambda x, s, *y: net(x, s, **({"y": y[0]} if y else {})), x, log_snr, *label)


@covers(
    "nets.unet.UNet", "nets.classifier.Classifier", "nets.encoder.Encoder", "nets.encoder.Layers", "nets.encoder.Block",
    "nets.encoder.Level", "nets.layers.Attention", "nets.layers.AttentionPool", "nets.layers.AveragePool",
    "nets.layers.Downsample", "nets.layers.GroupNorm", "nets.layers.ResidualBlock", "nets.layers.Upsample",
    "nets.layers.convolution", "nets.layers.zero_parameters",
)  # fmt: skip
@some(8)
@given(
    st.sampled_from([1, 2]), st.sampled_from([1, 3]), BATCHES, DTYPES, st.sampled_from(["residual", "conv", "fixed"]),
    st.sampled_from(["average", "attention"]), SEEDS,
)  # fmt: skip
def test_networks_of_images(dims, channels, batch, dtype, resample, pool, seed):
    size = (4,) * dims
    options = {
        "width": 8,
        "multipliers": (1, 2),
        "blocks": 1,
        "attention": (1,),
        "heads": 2,
        "dims": dims,
        "resample": resample,
    }
    unet = nets.UNet(channels, **options)
    classifier = nets.Classifier(channels, classes=3, size=size if pool == "attention" else None, **options)
    x, log_snr = normal(seed, batch, channels, *size, dtype=dtype), 3 * normal(seed + 1, batch, dtype=dtype)
    with torch.no_grad():
        for net in (unet, classifier):
            net.to(dtype).eval()
            for i, p in enumerate(net.parameters()):
                p.copy_(0.2 * normal(seed + i, *p.shape, dtype=dtype) + (p.dim() == 1))
            rowwise(net, x, log_snr, tolerance={"rtol": 1e-3, "atol": 1e-4} if dtype == F32 else CLOSE[F64])
    assert unet(x, log_snr).shape == x.shape and classifier(x, log_snr).shape == (batch, 3)


@covers("nets.embeddings.log_snr_features", "nets.embeddings.index_features", "nets.embeddings.interpolate_index")
@some(25)
@given(st.integers(1, 5), st.sampled_from([2, 8]), SEEDS)
def test_embeddings(batch, features, seed):
    from pyrodiff.nets.embeddings import index_features, interpolate_index, log_snr_features

    log_snr = 10 * normal(seed, batch)
    rowwise(lambda s: log_snr_features(s, features), log_snr)
    half = features // 2
    for found in (log_snr_features(log_snr, features), index_features(torch.arange(batch), features)):
        squares = found[:, :half] ** 2 + found[:, half:] ** 2
        torch.testing.assert_close(squares, torch.ones_like(squares))
    rowwise(lambda i: index_features(i, features), torch.arange(batch), tolerance=CLOSE[F32])
    table = -normal(seed, 6, dtype=F32).abs().add(0.01).cumsum(0)
    torch.testing.assert_close(interpolate_index(table, table), torch.arange(6.0))
    rowwise(lambda s: interpolate_index(s, table), log_snr, tolerance=CLOSE[F32])
    found = interpolate_index(log_snr, table)
    assert (found >= 0).all() and (found <= 5).all()


@covers("classifier.NoisyClassifier")
@some(10)
@given(BATCHES, DTYPES, SEEDS)
def test_classifiers_of_noisy_examples(batch, dtype, seed):
    net = nets.MLP(2, out_features=3, width=8, depth=1).to(dtype)
    for p in net.parameters():
        p.data.copy_(0.3 * normal(seed, *p.shape, dtype=dtype))
    classifier = pyrodiff.NoisyClassifier(net, CosineSchedule(5), (2,)).eval()
    x, t = normal(seed, batch, 2, dtype=dtype), torch.arange(batch) % 5 + 1
    with torch.no_grad():
        rowwise(lambda x, t, y: classifier.log_prob(x, t, y), x, t, torch.arange(batch) % 3)
        total = sum(classifier.log_prob(x, t, torch.full((batch,), y)).exp() for y in range(3))
    torch.testing.assert_close(total, torch.ones(batch, dtype=total.dtype))
    before = [p.clone() for p in net.parameters()]
    found, accuracy = classifier.score(x, torch.arange(batch) % 3, count=2)
    assert found.mean > 0 and 0 <= accuracy <= 1 and all(map(torch.equal, before, net.parameters()))


# ---------------------------------------------------------------------- inference


@st.composite
def operators(draw: Any) -> Any:
    from pyrodiff.inference import operators as op

    seed = draw(SEEDS)
    kind = draw(st.sampled_from(["matrix", "mask", "separable", "blur", "downsample"]))
    if kind == "matrix":
        shape = draw(st.sampled_from([(1, 1), (2, 3), (3, 1, 2), (3, 3), (4, 2)]))
        return op.matrix(normal(seed, *shape))
    if kind == "mask":
        keep = normal(seed, 1, 2, 3) > 0
        keep[0, 0, 0] = True
        return op.mask(keep)
    if kind == "separable":
        return op.separable((2, 2, 3), normal(seed, 2, 2), normal(seed + 1, 4, 3))
    if kind == "blur":
        return op.blur((1, 2, 3), torch.tensor([0.2, 0.5, 0.3], dtype=F64))
    return op.downsample((2, 4, 2), 2)


@covers(
    "inference.operators.matrix", "inference.operators.mask", "inference.operators.separable", "inference.operators.blur",
    "inference.operators.downsample", "inference.operators.LinearOperator", "inference.operators.LinearGaussian",
    "inference.guidance.pigdm", "inference.guidance.mmps",
)  # fmt: skip
@some(15)
@given(operators(), BATCHES, st.floats(0.1, 2), SEEDS)
def test_operators(operator, batch, noise, seed):
    from pyrodiff.inference import LinearGaussian, mmps, pigdm

    x = normal(seed, batch, *operator.event_shape)
    rowwise(operator, x)
    K = len(operator.singular_values)
    assert (operator.singular_values >= 0).all()
    torch.testing.assert_close(operator.to_rows(operator.from_rows(normal(seed, 2, K))), normal(seed, 2, K))
    torch.testing.assert_close(operator(2 * x), 2 * operator(x))
    torch.testing.assert_close(operator.from_columns(operator.singular_values * operator.to_rows(x)), operator(x))
    seen = LinearGaussian(operator, normal(seed + 1, *operator.observed_shape), noise)
    rowwise(seen, x)
    rowwise(lambda x: seen.log_prob(x, 0.5), x)
    peak = -0.5 * seen.y.numel() * math.log(2 * math.pi * noise**2)
    assert (seen(x) <= peak + 1e-9).all()
    level = torch.tensor(0.3, dtype=F64)
    rowwise(lambda x: pigdm(seen, 0.7)(x, x, level), x)
    rowwise(lambda x: mmps(seen)(z := x.clone().requires_grad_(), 0.8 * z, level).detach(), x)


@covers(
    "inference.resampling.multinomial", "inference.resampling.residual", "inference.resampling.stratified",
    "inference.resampling.systematic",
)  # fmt: skip
@some(40)
@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 20), SEEDS)
def test_resampling(rows, n, contrast, seed):
    from pyrodiff.inference import resampling

    weights = (contrast * normal(seed, rows, n)).softmax(1)
    uniforms = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for scheme in (resampling.multinomial, resampling.residual, resampling.stratified, resampling.systematic):
        rowwise(scheme, weights, uniforms)
        drawn = scheme(weights, uniforms)
        counts = nn.functional.one_hot(drawn, n).sum(1)
        assert drawn.shape == (rows, n) and (counts.sum(1) == n).all()
        if scheme in (resampling.residual, resampling.systematic):
            assert (counts >= (n * weights - 1e-9).floor()).all()


@covers(
    "inference.calibration.sbc", "inference.calibration.tarp", "inference.calibration.uniformity",
    "inference.calibration.band", "inference.calibration.Calibration",
)  # fmt: skip
@some(20)
@given(st.integers(2, 30), st.integers(1, 9), SEEDS)
def test_calibration(simulations, draws, seed):
    from pyrodiff.inference.calibration import band, sbc, tarp, uniformity

    truth, held = normal(seed, simulations, 2), normal(seed + 1, simulations, draws, 2)
    found = sbc({"x": truth}, {"x": held})
    assert 0 <= found.ranks.min() and found.ranks.max() <= draws and 0 <= found.p_value <= 1
    # ranks see order alone, and turn round with it
    assert torch.equal(sbc({"x": truth.exp()}, {"x": held.exp()}).ranks, found.ranks)
    assert torch.equal(sbc({"x": -truth}, {"x": -held}).ranks, draws - found.ranks)
    torch.testing.assert_close(uniformity(draws - found.ranks, draws), found.p_values, rtol=0, atol=1e-9)
    order = torch.arange(simulations).flip(0)
    torch.testing.assert_close(sbc({"x": truth[order]}, {"x": held[order]}).p_values, found.p_values)
    near = {"x": normal(seed + 2, simulations, 2)}
    spread = tarp({"x": truth}, {"x": held}, near)
    torch.testing.assert_close(tarp({"x": 3 * truth}, {"x": 3 * held}, {"x": 3 * near["x"]}).ranks, spread.ranks)
    low, high = band(simulations, draws)
    assert (low <= high).all() and (low.diff() >= 0).all() and (high.diff() >= 0).all() and str(found)
    assert ((found.coverage >= 0) & (found.coverage <= 1)).all() and (found.deviation >= 0).all()


def observed(diffusion: GaussianDiffusion, seed: int, noise: float = 0.5) -> Any:
    from pyrodiff.inference import LinearGaussian
    from pyrodiff.inference.operators import mask

    keep = torch.ones(diffusion.event_shape, dtype=torch.bool)
    keep.view(-1)[1:] = False
    return LinearGaussian(mask(keep), normal(seed, 1, dtype=dtype_of(diffusion)), noise)


@covers(
    "inference.smc.smc", "inference.smc.prepare", "inference.smc.walk", "inference.smc.Walk", "inference.smc.Source",
    "inference.smc.Posterior", "inference.smc.Evidence", "inference.proposals.Bootstrap", "inference.proposals.Twisted",
    "inference.proposals.MCGDiff", "inference.proposals.Replacement", "inference.proposals.Look",
    "inference.proposals.Steer", "inference.proposals.per_particle", "inference.guidance.guided",
    "inference.guidance.repaint",
)  # fmt: skip
@some(4)
@given(
    diffusions(st.integers(2, 4), st.sampled_from([(1,), (3,), (2, 2, 2)]), variance="fixed_large"),
    st.integers(1, 3), SEEDS,
)  # fmt: skip
def test_particles(diffusion, repeats, seed):
    from pyrodiff.inference import guided, repaint, smc
    from pyrodiff.inference.proposals import Look, Steer
    from pyrodiff.inference.smc import Evidence, Walk

    seen, dtype = observed(diffusion, seed), dtype_of(diffusion)
    state, before = torch.get_rng_state(), diffusion.net.scale.detach().clone()
    close = {"rtol": 1e-2, "atol": 1e-3} if dtype == F32 else CLOSE[F64]
    for proposal in ("bootstrap", "twisted", "mcgdiff", "replacement"):
        options = {"proposal": proposal, "seed": seed, "repeats": repeats, "threshold": 1.0}
        one, other = (smc(diffusion, seen, 4, batch_size=b, **options) for b in (3, 100))
        torch.testing.assert_close(one.particles, other.particles, **close)
        torch.testing.assert_close(one.log_weights, other.log_weights, **close)
        assert one.particles.shape == (repeats, 4, *diffusion.event_shape) and one.log_weights.isfinite().all()
        assert float(one.weights.sum()) == pytest.approx(1) and len(one.sample(3, seed=0)) == 3
        torch.testing.assert_close(one.mean(torch.ones_like), torch.ones(diffusion.event_shape, dtype=F64))
        assert (one.ess >= 1 - 1e-6).all() and (one.ess <= 4 + 1e-6).all()
        assert isinstance(one.evidence, Evidence) and str(one)
    assert guided(diffusion, seen, 3, seed=seed).particles.shape == (1, 3, *diffusion.event_shape)
    assert repaint(diffusion, seen, 3, jump=1, seed=seed).particles.isfinite().all()
    look = Look(*normal(seed, 4, 2)[:, :, None])
    assert torch.equal(look.take(torch.tensor([1])).mean, look.mean[1:]) and Steer._fields and Walk._fields
    Walk(*normal(seed, 6, 1)), Steer(*normal(seed, 4, 1)), Evidence(0.0, 1.0)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(before, diffusion.net.scale)


@covers("inference.guidance.class_label")
@some(8)
@given(BATCHES, SEEDS)
def test_class_labels(batch, seed):
    from pyrodiff.inference import class_label

    net = nets.MLP(2, out_features=2, width=4, depth=1).double()
    for p in net.parameters():
        p.data.copy_(0.3 * normal(seed, *p.shape))
    classifier = pyrodiff.NoisyClassifier(net, LogLinearSchedule(4, -4.0, 4.0), (2,))
    x = normal(seed, batch, 2)
    total = 0
    with torch.no_grad():
        for y in (0, 1):
            log_likelihood, twist = class_label(classifier, y)
            rowwise(log_likelihood, x)
            rowwise(lambda x, f=twist: f(x, x, classifier.schedule.log_snr(2)), x)
            total = total + log_likelihood(x).exp()
    torch.testing.assert_close(total, torch.ones(batch, dtype=F64))


@covers("inference.gibbs.particle_gibbs", "inference.gibbs.slice_sample", "inference.gibbs.GibbsChain")
@some(5)
@given(diffusions(st.integers(2, 3), st.sampled_from([(1,), (2,)]), variance="fixed_large"), SEEDS)
def test_gibbs(diffusion, seed):
    from pyrodiff.inference import particle_gibbs
    from pyrodiff.inference.gibbs import slice_sample

    def program(x0: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample(
            "y", dist.Normal(x0 + shift[: x0.shape[-1]], 0.5).to_event(1), obs=torch.ones(diffusion.event_shape)
        )

    state = torch.get_rng_state()
    one, other = (particle_gibbs(diffusion, program, 3, particles=3, seed=seed) for _ in range(2))
    assert torch.equal(one.x0, other.x0) and one.x0.shape == (3, *diffusion.event_shape) and 0 <= one.moved <= 1
    assert one.parameters["shift"].shape == (3, 2) and torch.equal(state, torch.get_rng_state())
    inside = slice_sample(
        lambda x: 0.0 if bool((x.abs() < 1).all()) else -math.inf, torch.zeros(3), torch.Generator().manual_seed(seed)
    )
    assert (inside.abs() < 1).all()


@covers("inference.observe.observation", "inference.observe.unobserved")
@some(10)
@given(BATCHES, SEEDS)
def test_programs_as_likelihoods(batch, seed):
    from pyrodiff.inference import observation
    from pyrodiff.inference.observe import unobserved

    y = normal(seed, 2)

    def program(x0: Tensor) -> None:
        pyro.sample("y", dist.Normal(x0, 0.7).to_event(1), obs=y)

    x = normal(seed + 1, batch, 2)
    rowwise(observation(program), x)
    torch.testing.assert_close(observation(program)(x), dist.Normal(x, 0.7).log_prob(y).sum(1))
    assert unobserved(poutine.trace(program).get_trace(x)) == {}


@covers(
    "inference.prior.DiffusionPrior", "inference.prior.FlowReparam", "inference.bound.bound", "inference.guides.DenoiserGuide",
    "inference.steps.steps_bias", "inference.steps.StepsBias", "likelihood.flow.encode", "likelihood.flow.decode",
    "likelihood.flow.log_density", "likelihood.flow.FlowDensity",
)  # fmt: skip
@some(6)
@given(diffusions(st.integers(2, 4), st.sampled_from([(1,), (2,), (2, 1)])), BATCHES, SEEDS)
def test_priors(diffusion, batch, seed):
    from pyro.infer import Trace_ELBO

    from pyrodiff.inference import DenoiserGuide, DiffusionPrior, FlowReparam, bound, steps_bias
    from pyrodiff.likelihood import flow

    diffusion = diffusion.double()
    event = diffusion.event_shape
    options = {"solver": "rk4", "steps": 8}
    prior = DiffusionPrior(diffusion, "flow", **options)
    x = normal(seed, batch, *event)
    with torch.no_grad():
        rowwise(prior.log_prob, x)
        rowwise(lambda x: flow.log_density(diffusion, x, steps=8).log_prob[0], x)
        for there, back in ((prior.encode, prior.decode), (prior.decode, prior.encode)):
            rowwise(there, x)
            torch.testing.assert_close(back(there(x)), x, rtol=0, atol=0.05)  # of eight steps of the solver
        torch.testing.assert_close(flow.decode(diffusion, x, steps=8), prior.decode(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(flow.encode(diffusion, x, steps=8), prior.encode(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(prior.expand([batch]).log_prob(x), prior.log_prob(x))
        chain = DiffusionPrior(diffusion)
        assert chain.sample((batch,)).shape == (batch, *event) and prior.given().batch_shape == ()
        found = steps_bias(chain, torch.cat([x, x + 1]), repeats=2, seed=seed)
        assert (
            found.gap.shape[1] == 2 * batch and found.nats.mean == pytest.approx(float(found.gap.mean())) and str(found)
        )

    def model() -> None:
        z = pyro.sample("x", chain)
        pyro.sample("y", dist.Normal(z, 1.0).to_event(len(event)), obs=torch.zeros(event, dtype=F64))

    guide = DenoiserGuide(chain, "x", lambda: torch.zeros(event, dtype=F64))
    assert math.isfinite(Trace_ELBO().loss(*bound(model, guide, {"x": chain})))

    flowing = poutine.reparam(lambda: pyro.sample("x", prior), {"x": FlowReparam()})
    trace = poutine.trace(flowing).get_trace()
    torch.testing.assert_close(prior.decode(trace.nodes["x_T"]["value"]), trace.nodes["x"]["value"])


@covers(
    "inference.predictive.guide_draws", "inference.predictive.outlook", "inference.predictive.known",
    "inference.predictive.joined", "inference.predictive.GuideDraws", "inference.predictive.Outlook",
    "inference.predictive.Plated",
)  # fmt: skip
@some(6)
@given(st.integers(1, 4), st.integers(1, 5), SEEDS)
def test_draws_of_guides(groups, batch_size, seed):
    from pyrodiff.inference.predictive import guide_draws, known, outlook

    y = normal(seed, groups)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("groups", groups):
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    found = guide_draws(model, guide, draws=6, batch_size=batch_size)
    z = found.outlook.latents["z"].values
    assert z.shape == (6,) and found.log_weights.shape == (6,)
    said = found.outlook.log_likelihood["y"]
    torch.testing.assert_close(said.values, dist.Normal(z[:, None], 0.5).log_prob(y))
    torch.testing.assert_close(found.log_weights, said.values.sum(1))  # the guide is the prior
    assert said.plates == ("groups",)
    trace = known({"z": torch.tensor(0.3)})
    assert trace.nodes["z"]["value"] == torch.tensor(0.3) and callable(outlook)


# ---------------------------------------------------------------------- log-likelihoods


@covers(
    "likelihood.methods.log_likelihood", "likelihood.methods.lower_bound", "likelihood.methods.options_of",
    "likelihood.importance.importance_weighted", "likelihood.information.information", "likelihood.dequantise.flow_bound",
    "likelihood.dequantise.signed_gap", "likelihood.estimate.LogLikelihood", "likelihood.estimate.check",
    "likelihood.estimate.cautions", "likelihood.estimate.seeded",
)  # fmt: skip
@some(12)
@given(
    diffusions(st.integers(2, 3), st.sampled_from([(1,), (2,), (2, 2, 2)])),
    st.sampled_from([("elbo", {}), ("iwae", {"chains": 3}), ("ode", {"solver_steps": 4}), ("immse", {"points": 3, "pilot": 2})]),
    BATCHES, SEEDS,
)  # fmt: skip
def test_log_likelihoods(diffusion, method, batch, seed):
    from pyrodiff.likelihood.dequantise import flow_bound, signed_gap
    from pyrodiff.likelihood.methods import log_likelihood, options_of

    name, options = method
    x0, state = normal(seed, batch, *diffusion.event_shape, dtype=dtype_of(diffusion)), torch.get_rng_state()
    before = x0.clone()
    one, other = (log_likelihood(diffusion, x0, name, seed=seed, batch_size=b, **options) for b in (100, 100))
    assert torch.equal(one.draws, other.draws) and one.draws.shape == (2, batch) and one.draws.isfinite().all()
    torch.testing.assert_close(one.log_prob, one.draws.mean(0))
    assert one.bits_per_dim.mean == pytest.approx(one.nats.mean / one.dims / math.log(2)) and str(one)
    assert set(options) <= set(options_of(name)) and torch.equal(before, x0)
    if name == "elbo":
        terms = pyrodiff.elbo_terms(diffusion, x0, repeats=2)
        found = flow_bound(diffusion, x0, repeats=2, steps=4, seed=seed)
        torch.testing.assert_close(signed_gap(found, terms).shape, torch.Size([2, batch]))
    else:
        assert torch.equal(torch.get_rng_state(), state)


@covers(
    "likelihood.importance.curve", "likelihood.importance.effective_chains", "likelihood.importance.pareto_k",
    "likelihood.importance.renyi_bound", "likelihood.importance.log_weights", "likelihood.estimate.seeded",
)  # fmt: skip
@some(25)
@given(st.integers(1, 40), BATCHES, st.floats(0, 30), st.floats(-1e3, 1e3), SEEDS)
def test_log_weights(chains, batch, spread, shift, seed):
    from pyrodiff.likelihood import importance
    from pyrodiff.likelihood.estimate import seeded

    log_w = spread * normal(seed, batch, chains)  # rows are examples, for rowwise
    for function in (importance.renyi_bound, importance.effective_chains, importance.pareto_k):
        rowwise(lambda w, f=function: f(w.T).nan_to_num(), log_w, tolerance={"rtol": 1e-7, "atol": 1e-7})
    found = [importance.renyi_bound(log_w.T, alpha) for alpha in (0.0, 0.3, 0.9, 1.0)]
    for a, b in itertools.pairwise(found):
        assert (a >= b - 1e-9 * (1 + a.abs())).all()
    torch.testing.assert_close(found[-1], log_w.mean(1))
    torch.testing.assert_close(importance.renyi_bound(log_w.T + shift), found[0] + shift)
    count = importance.effective_chains(log_w.T)
    assert (count >= 1 - 1e-9).all() and (count <= chains + 1e-9).all()
    torch.testing.assert_close(importance.effective_chains(log_w.T + shift), count, rtol=1e-7, atol=0)
    curve = importance.curve(log_w.T[None])
    assert max(curve) == chains
    torch.testing.assert_close(curve[chains].mean(0), found[0])
    diffusion = GaussianDiffusion(Net(), LogLinearSchedule(2, -4.0, 4.0), (2,))
    x0 = normal(seed, batch, 2)
    w = importance.log_weights(diffusion, x0, min(chains, 3), lambda x: normal(seed, 1, 2).expand(x.shape))
    torch.testing.assert_close(w, w[:1].expand(len(w), batch))
    noise = seeded(seed, x0)
    assert noise(x0).shape == x0.shape and torch.equal(seeded(seed, x0)(x0), seeded(seed, x0)(x0))


@covers("likelihood.information.Density", "likelihood.information.denoising_error")
@some(20)
@given(st.floats(-12, 0), st.floats(0.5, 20), diffusions(st.integers(2, 3)), BATCHES, SEEDS)
def test_densities_over_log_snr(low, span, diffusion, batch, seed):
    from pyrodiff.likelihood.information import Density, denoising_error

    uniform = Density.uniform(low, low + span)
    fitted = uniform.fitted(normal(seed, len(uniform.heights), 3).abs())
    for density in (uniform, fitted):
        width = density.edges.diff()
        assert float((density.heights * width).sum()) == pytest.approx(1) and (density.heights > 0).all()
        u = torch.linspace(0, 1 - 1e-9, 50, dtype=F64)
        log_snr, height = density.draw(u)
        assert (log_snr.diff() >= 0).all() and low - 1e-9 <= log_snr.min() and log_snr.max() <= low + span + 1e-9
        assert (height > 0).all()
        means = density.means(log_snr, torch.ones_like(log_snr))
        assert ((means - 1).abs() < 1e-12).logical_or(means.isnan() | (means == 0)).all()
    x0 = normal(seed, batch, *diffusion.event_shape, dtype=dtype_of(diffusion))
    noise = normal(seed + 1, 1, *diffusion.event_shape, dtype=x0.dtype)
    with torch.no_grad():
        rowwise(lambda x, s: denoising_error(diffusion, x, s, lambda z: noise.expand(z.shape)), x0, normal(seed, batch))


# ---------------------------------------------------------------------- the laboratory


@covers(
    "laboratory.values.control_variate", "laboratory.values.importance_weighted", "laboratory.values.systematic",
    "laboratory.values.value_estimators", "laboratory.values.by_timestep",
)  # fmt: skip
@some(6)
@given(diffusions(st.integers(2, 4), st.sampled_from([(1,), (2, 1)])), st.integers(1, 3), SEEDS)
def test_estimators_of_values(diffusion, batch, seed):
    from pyrodiff.draws import Terms
    from pyrodiff.laboratory import values

    x0, state = normal(seed, batch, *diffusion.event_shape, dtype=dtype_of(diffusion)), torch.get_rng_state()
    options = {"repeats": 8, "timesteps": (1,), "iwae": (1, 2), "seed": seed}
    (table, _, loop), (again, _, _) = (values.value_estimators(diffusion, x0, **options) for _ in range(2))
    same = ["path", "kl", "mean", "variance"]
    assert table[same].equals(again[same]) and (table.variance.dropna() >= 0).all()
    steps = values.by_timestep(diffusion, loop)
    assert len(steps) == diffusion.steps + 1 and torch.equal(torch.get_rng_state(), state)
    # a constant is estimated without error, and K chains of one weight have it as their bound
    terms = Terms(torch.full((8, batch, 3), 2.0), torch.full((8, batch, 3), 2.0))
    combined, _ = values.control_variate(terms)
    torch.testing.assert_close(combined.double(), torch.full((8, batch), 6.0).double())
    cost = normal(seed, 8, batch)
    torch.testing.assert_close(values.importance_weighted(cost, 1), cost)
    assert (values.importance_weighted(cost, 8) <= cost.mean(0) + 1e-12).all()
    p = normal(seed, 5).softmax(0)
    t = values.systematic(p, (torch.arange(1000) + 0.5).double() / 1000)
    torch.testing.assert_close(t.bincount(minlength=6)[1:] / 1000, p, rtol=0, atol=1e-3, check_dtype=False)


@pytest.mark.slow
@covers(
    "laboratory.gradients.compare_gradients", "laboratory.gradients.gradient", "laboratory.gradients.parameter_groups",
    "laboratory.gradients.questions", "laboratory.gradients.Estimator", "laboratory.gradients.Question",
)  # fmt: skip
@some(4)
@given(diffusions(st.integers(2, 3), st.sampled_from([(1,), (2,)])), SEEDS)
def test_estimators_of_gradients(diffusion, seed):
    from pyrodiff.laboratory import gradients

    x0 = normal(seed, 2, *diffusion.event_shape, dtype=dtype_of(diffusion))
    groups, source = gradients.parameter_groups(diffusion, x0)
    assert "net" in groups
    for question in gradients.questions(diffusion, groups, 2, timesteps=[1], chain=False, iwae=()):
        for estimator in question.estimators:
            if not estimator.reason:
                torch.manual_seed(seed)
                found = gradients.gradient(estimator, source, groups)["net"]
                assert found.shape == (1,) and found.isfinite().all() and diffusion.net.scale.grad is None
    options = {"timesteps": [2], "chain": False, "iwae": (), "repeats": 4, "seed": seed}
    one, other = (gradients.compare_gradients(diffusion, x0, **options) for _ in range(2))
    assert one[["estimator", "norm", "variance"]].equals(other[["estimator", "norm", "variance"]])


@covers(
    "laboratory.budget.estimate_elbo", "laboratory.budget.terms", "laboratory.budget.Design", "laboratory.budget.Moments",
    "laboratory.budget.Wiener", "laboratory.budget.ELBOEstimate", "laboratory.budget.t_quantile",
)  # fmt: skip
@some(4)
@given(diffusions(st.integers(3, 6), st.sampled_from([(1,), (2,)])), SEEDS, st.floats(2, 1e6))
def test_budgets(diffusion, seed, df):
    from pyrodiff.laboratory import budget

    x0, state = normal(seed, 80, *diffusion.event_shape, dtype=dtype_of(diffusion)), torch.get_rng_state()
    one, other = (budget.estimate_elbo(diffusion, x0, 3.0, "noise", seed=seed) for _ in range(2))
    assert one.mean == other.mean and one.se_noise >= 0 and str(one)
    low, high = one.interval()
    assert low <= one.mean <= high and torch.equal(torch.get_rng_state(), state)
    assert budget.t_quantile(df) >= 1.95 and budget.t_quantile(df) >= budget.t_quantile(2 * df) - 1e-9
    p = normal(seed, 6).softmax(0)
    design = budget.Design(p, 2, normal(seed, 6), torch.zeros(6, dtype=F64))
    t = design.steps((torch.arange(500, dtype=F64) + 0.5) / 500)
    assert t.shape == (500, 2) and 1 <= t.min() and t.max() <= 6
    exact = design.estimate(t, design.mean[t - 1], torch.zeros(500, 2, dtype=F64))  # terms as the pilot had them
    torch.testing.assert_close(exact, design.mean.sum().expand(500))
    wiener = budget.Wiener.of(diffusion, x0)
    rows, at = torch.arange(4), torch.tensor([2, 3, 2, 3])
    found = budget.terms(diffusion, x0, rows, at, wiener, lambda shape: torch.zeros(*shape, dtype=x0.dtype))
    assert all(z.shape == (4,) and z.isfinite().all() for z in found)


# ---------------------------------------------------------------------- training


@covers("training.ema.EMA", "training.optim.JointOptim")
@some(10)
@given(st.floats(0, 0.999), st.integers(1, 6), DTYPES, SEEDS)
def test_averages_and_optimisers(decay, steps, dtype, seed):
    from pyro.infer import SVI, Trace_ELBO

    from pyrodiff.training.ema import EMA
    from pyrodiff.training.optim import JointOptim

    module = nn.Linear(2, 2).to(dtype)
    ema, other = EMA(module, decay), EMA(module, decay)
    low, high = module.weight.detach().clone(), module.weight.detach().clone()
    for i in range(steps):
        module.weight.data.copy_(normal(seed + i, 2, 2, dtype=dtype))
        low, high = torch.minimum(low, module.weight.detach()), torch.maximum(high, module.weight.detach())
        ema.update()
    other.load_state_dict(ema.state_dict())
    kept = module.weight.detach().clone()
    for each in (ema, other):
        with each.swapped_in():
            averaged = module.weight.detach().clone()
            assert (averaged >= low - 1e-6).all() and (averaged <= high + 1e-6).all()  # a mean of what has been
        assert torch.equal(module.weight, kept)
    other.copy_to_parameters()
    assert torch.equal(module.weight, averaged)

    pyro.clear_param_store()
    optim = JointOptim(torch.optim.Adam, {"lr": 0.1})

    def guide() -> None:
        pyro.sample("z", dist.Delta(pyro.param("at", torch.zeros(()))))

    svi = SVI(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), guide, optim, Trace_ELBO())
    for _ in range(steps):
        svi.step()
    state = optim.get_state()
    again = JointOptim(torch.optim.Adam, {"lr": 0.1})
    again.set_state(state)
    assert again.get_state().keys() == state.keys() == {"at"}


@covers(
    "training.metrics.frechet_distance", "training.metrics.fit_classifier", "training.metrics.class_shares",
    "training.metrics.feature_distance", "training.metrics.ImageClassifier",
)  # fmt: skip
@some(2)
@given(SEEDS)
def test_metrics(seed):
    from pyrodiff.training import metrics

    a, b = normal(seed, 50, 3), 1.3 * normal(seed + 1, 60, 3) + 0.5
    found = metrics.frechet_distance(a, b)
    assert found >= 0 and found == pytest.approx(metrics.frechet_distance(b, a), rel=1e-6)
    assert metrics.frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(a + 7, b + 7) == pytest.approx(found, rel=1e-6)  # of differences alone
    x = normal(seed, 40, 1, 4, 4, dtype=F32)
    state = torch.get_rng_state()
    classifier = metrics.fit_classifier(x, (x.mean((1, 2, 3)) > 0).long(), seed=seed, steps=3, batch_size=8)
    shares = metrics.class_shares(classifier, x)
    assert float(shares.sum()) == pytest.approx(1) and metrics.feature_distance(classifier, x, x) == pytest.approx(
        0, abs=1e-3
    )
    with torch.no_grad():
        rowwise(classifier, x[:3], tolerance={"rtol": 1e-3, "atol": 1e-4})
    assert torch.equal(torch.get_rng_state(), state)
