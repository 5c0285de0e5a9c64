r"""Continuous time against closed forms: Gaussian data and their exact denoiser, by quadrature over t and noise.

For data N(m, s^2) the error of the exact denoiser is mmse(snr) = s^2 / (1 + s^2 snr), so that the diffusion term at T = infinity is
1/2 log[(1 + s^2 snr_max) / (1 + s^2 snr_min)], whatever the schedule does in between. Terms are quadratic in x_0 and in the noise,
where three Hermite nodes are exact; over t, Gauss-Legendre sums of these smooth integrands are exact to rounding.
"""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from monte_carlo import assert_mean, assert_proportion
from oracles import MEAN, VAR, GaussianDenoiser, hermite
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer import TraceMeanField_ELBO as StockMeanField
from pyro.optim import Adam
from torch.distributions import kl_divergence

import pyrodiff
from pyrodiff import (
    CosineSchedule,
    ForwardProcess,
    GaussianDiffusion,
    LogLinearSchedule,
    bits_per_dim,
    elbo,
    elbo_terms,
    plots,
    sample,
    timesteps,
)
from pyrodiff.errors import OptionError, ProgramError, ShapeError
from pyrodiff.laboratory.gradients import compare_gradients
from pyrodiff.schedules import SHARE_OF_0, Curve, LearnedSchedule, from_config

F64 = torch.float64
LOW, HIGH = -5.0, 6.0
PREDICTIONS = ("eps", "x0", "v", "score")


class Bent(Curve):
    """Another interior between the same ends."""

    def curve(self, u):
        return HIGH + (LOW - HIGH) * (u + 0.8 * u * (1 - u))

    def slope(self, t):
        return (LOW - HIGH) * (1.8 - 1.6 * t)


def learned(steps=math.inf, width=4):
    """A learned schedule far from where it starts."""
    schedule = LearnedSchedule(steps, LOW, HIGH, width=width).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (schedule.linear, schedule.heights, schedule.rates, schedule.offsets):
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=F64))
        schedule.log_range.fill_(math.log(HIGH - LOW))  # beyond the float32 that it was made in
    return schedule


SCHEDULES = {
    "log-linear": lambda: LogLinearSchedule(math.inf, LOW, HIGH),
    "bent": lambda: Bent(math.inf),
    "learned": learned,
}


def make(schedule, prediction="x0", **options):
    net = GaussianDenoiser(prediction)
    return GaussianDiffusion(net, schedule, (1,), prediction=prediction, **options).double()


def legendre(n=64):
    """Nodes in (0, 1) and weights that add up to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)


class Rows:
    """Every combination of t (0 with its share, and Legendre nodes), x_0 and noise of x_t, as one batch with probabilities."""

    def __init__(self, diffusion, nodes=64):
        z, w = (torch.as_tensor(a) for a in hermite(3))
        u, wu = legendre(nodes)
        t = torch.cat([torch.zeros(1, dtype=F64), u])
        p = torch.cat([torch.tensor([SHARE_OF_0], dtype=F64), (1 - SHARE_OF_0) * wu])
        grid = torch.meshgrid(t, MEAN + math.sqrt(VAR) * z, z, indexing="ij")
        self.t, x0, self.noise = (a.flatten() for a in grid)
        self.x0 = x0[:, None]
        self.probability = (p[:, None, None] * w[:, None] * w).flatten()
        self.diffusion = diffusion

    def x_t(self):
        law = self.diffusion.forward_process.marginal(self.x0, self.t)
        return law.mean + law.stddev * self.noise[:, None]

    def sites(self):
        """What each site adds to the expected loss, differentiable; per data point, in nats."""
        diffusion = self.diffusion
        guide = poutine.trace(diffusion.guide).get_trace(self.x0, self.t)
        guide.nodes["x_t"]["value"] = self.x_t()
        guide = poutine.trace(poutine.replay(diffusion.guide, trace=guide)).get_trace(self.x0, self.t)
        model = poutine.trace(poutine.replay(diffusion.model, trace=guide)).get_trace(self.x0, self.t)
        terms = elbo.site_terms(model, guide)
        return {name: (self.probability * value).sum() for name, value in terms.items()}


def mmse(log_snr):
    return VAR / (1 + VAR * log_snr.exp())


def closed_form(low, high):
    """Prior, diffusion and reconstruction of the exact denoiser, averaged over the data."""
    low, high = (torch.as_tensor(a, dtype=F64) for a in (low, high))
    alpha2, sigma2 = low.sigmoid(), (-low).sigmoid()
    prior = 0.5 * (alpha2 * (MEAN**2 + VAR) + sigma2 - 1 - sigma2.log())
    diffusion = 0.5 * ((1 + VAR * high.exp()) / (1 + VAR * low.exp())).log()
    reconstruction = 0.5 * (math.log(2 * math.pi) - high + high.exp() * mmse(high))
    return {"x_T": prior, "x_s": diffusion, "x_0": reconstruction}


# ---------------------------------------------------------------------- the bound


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_programs_enumerate_to_the_closed_form_whatever_the_interior(name, prediction):
    diffusion = make(SCHEDULES[name](), prediction)
    found, expected = Rows(diffusion).sites(), closed_form(LOW, HIGH)
    assert found["x_t"] == 0
    for site, value in expected.items():
        torch.testing.assert_close(found[site].detach(), value, rtol=1e-8, atol=1e-10)
    # the ends matter: a bound of other ends is another one
    other = closed_form(LOW, HIGH + 0.01)
    assert abs(other["x_s"] - expected["x_s"]) > 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_kls_of_the_standardised_step(name):
    """E[log q - log p] over x_s, by Hermite nodes, is the analytic KL: half of -dSNR/dt |x_0 - x0_hat|^2."""
    diffusion = make(SCHEDULES[name]())
    rows = Rows(diffusion, 8)
    x_t, schedule = rows.x_t(), diffusion.schedule
    q, (p, _) = diffusion.forward_process.posterior(rows.x0, x_t, rows.t), diffusion.reverse_kernel.both(x_t, rows.t)
    z, w = (torch.as_tensor(a) for a in hermite(3))
    x_s = q.mean + q.stddev * z[:, None, None]
    by_draws = torch.tensordot(w, q.log_prob(x_s) - p.log_prob(x_s), 1)
    error = (rows.x0 - diffusion.reverse_kernel.denoise(x_t, rows.t)).square().sum(-1)
    snr, h = schedule.log_snr(rows.t).exp(), 1e-5
    inside = (rows.t > h) & (rows.t < 1 - h)
    slope = (schedule.log_snr(rows.t[inside] + h).exp() - schedule.log_snr(rows.t[inside] - h).exp()) / (2 * h)
    by_hand = -0.5 * slope * error[inside]
    analytic = kl_divergence(q, p)
    torch.testing.assert_close(by_draws, analytic, rtol=1e-8, atol=1e-8)
    # central differences of step h: their error is h^2 / 6 times a third derivative
    torch.testing.assert_close(analytic[inside], by_hand, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(-0.5 * snr[inside] * schedule.slope(rows.t)[inside] * -error[inside], -analytic[inside])


def test_the_standardised_step_is_the_one_documented():
    """N(sqrt(-dSNR/dt) x_0, 1), and nothing of x_t: what both laws had of it would cancel in their divergence."""
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    x0, x_t = torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64)
    schedule = Bent(math.inf)
    law = make(schedule).forward_process.posterior(x0, x_t, t)
    slope_of_snr = schedule.log_snr(t).exp() * schedule.slope(t)
    torch.testing.assert_close(law.mean, (-slope_of_snr).sqrt()[:, None] * x0, rtol=1e-14, atol=0)
    assert (law.stddev == 1).all()


def test_the_step_is_the_limit_of_many_small_ones():
    """(T - 1) times the KL of one of T steps, at the same x_t, comes within O(1 / T) of the infinitesimal one's."""
    diffusion = make(Bent(math.inf))
    t, x0, x_t = torch.tensor([0.5], dtype=F64), torch.tensor([[1.1]], dtype=F64), torch.tensor([[0.4]], dtype=F64)
    q, p = diffusion.forward_process, diffusion.reverse_kernel
    limit = kl_divergence(q.posterior(x0, x_t, t), p(x_t, t))
    for variance in ("fixed_small", "fixed_large"):
        errors = []
        for steps in (1001, 2001, 4001):
            short = GaussianDiffusion(diffusion.net, Bent(steps), (1,), prediction="x0", variance=variance)
            at = torch.tensor([(steps - 1) // 2 + 1])
            kl = kl_divergence(short.forward_process.posterior(x0, x_t, at), short.reverse_kernel(x_t, at))
            errors.append(((steps - 1) * kl - limit).abs().item())
        assert errors[0] < 0.01 * limit
        for coarse, fine in itertools.pairwise(errors):
            assert coarse / fine == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("name", SCHEDULES)
def test_finite_T_is_above_and_falls_to_continuous_time(name):
    """VDM eq. 14 and section 4.2: on nested grids, T - 1 doubled, the bound falls; the gap halves in the end."""
    diffusion = make(SCHEDULES[name]())
    limit = closed_form(LOW, HIGH)
    z, w = (torch.as_tensor(a) for a in hermite(3))
    x0 = (MEAN + math.sqrt(VAR) * z)[:, None]
    gaps = []
    for steps in (2, 3, 5, 9, 17, 33, 65, 129, 257, 513):
        short = diffusion.respace(steps)
        q, p, t = short.forward_process, short.reverse_kernel, torch.arange(2, steps + 1)[:, None, None]
        law = q.marginal(x0, t)
        x_t = law.mean + law.stddev * z[:, None, None]  # [T - 1, noise, x_0, 1]
        kl = torch.einsum("tkb,k,b->t", kl_divergence(q.posterior(x0, x_t, t), p(x_t, t)), w, w)
        snr = short.schedule.log_snr(torch.arange(1, steps + 1)).exp()
        by_hand = 0.5 * (snr[:-1] - snr[1:]) * mmse(snr[1:].log())
        torch.testing.assert_close(kl, by_hand, rtol=1e-8, atol=1e-10)
        gaps.append((kl.sum() - limit["x_s"]).item())
    assert all(gap > 0 for gap in gaps)
    assert all(fine < coarse for coarse, fine in itertools.pairwise(gaps))
    assert gaps[-2] / gaps[-1] == pytest.approx(2, rel=0.05)


@pytest.mark.monte_carlo
@pytest.mark.parametrize("decoder", ["vdm", "learned"])
def test_the_ledger_against_the_closed_form(decoder):
    """Twenty thousand examples; the ledger's own standard errors."""
    diffusion = make(learned(), "v", decoder=decoder)
    x0 = MEAN + math.sqrt(VAR) * torch.randn(20_000, 1, dtype=F64)
    terms = elbo_terms(diffusion, x0, t=3, batch_size=60_000)
    assert terms.t.dtype == F64 and terms.weights.unique().tolist() == [1 / 3] and 0 < terms.t.min()
    assert terms.network_evaluations == 4 * len(x0)
    expected = closed_form(LOW, HIGH)
    total = sum(expected.values())
    for kl in ("analytic", "monte_carlo"):
        parts = terms.by(kl).parts()
        for part, truth in (("diffusion", expected["x_s"]), ("reconstruction", expected["x_0"]), ("total", total)):
            assert_mean(parts[part][0], truth, detects=0.25)
    # fixed times and their weights: Legendre nodes leave the noise alone
    nodes, weights = legendre(16)
    fixed = elbo_terms(diffusion, x0, t=nodes, weights=weights, batch_size=320_000).parts()["diffusion"]
    assert_mean(fixed[0], expected["x_s"], detects=0.25)
    assert bits_per_dim(terms).mean == pytest.approx(-terms.elbo.mean().item() / math.log(2))


# ---------------------------------------------------------------------- timesteps


@pytest.mark.monte_carlo
@pytest.mark.parametrize("draw", [timesteps.uniform, timesteps.low_discrepancy])
def test_drawn_times_have_their_law_and_weights(draw):
    t = torch.stack([draw(8, math.inf) for _ in range(5000)])
    assert t.dtype == F64 and t.min() == 0 and 0.99 < t.max() <= 1
    zeros = (t == 0).double()
    # each column alone: of low discrepancy, columns are a permutation of each other's
    assert_proportion(zeros.sum(0), 5000, SHARE_OF_0, detects=0.06)
    counts = torch.histc(t[t > 0], 10, 0, 1)
    assert_proportion(counts, int(counts.sum()), 0.1, detects=0.02)
    if draw is timesteps.low_discrepancy:
        assert zeros.sum(1).unique().tolist() == [1.0]  # an eighth of eight, every time
    weight = LogLinearSchedule(math.inf, LOW, HIGH).weight(t)
    assert weight[t == 0].unique().tolist() == [8.0] and weight[t > 0].unique().tolist() == [1 / 0.875]
    with pytest.raises(OptionError, match="steps=inf"):
        timesteps.ImportanceSampler(math.inf)


def test_given_weights_are_used():
    diffusion = make(LogLinearSchedule(math.inf, LOW, HIGH))
    x0, t = torch.randn(4, 1, dtype=F64), torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=F64)
    guide = poutine.trace(diffusion.guide).get_trace(x0, t, weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert guide.nodes["x_s"]["scale"].tolist() == [1, 2, 3, 4]
    assert guide.nodes["x_s"]["mask"].tolist() == [False, True, True, True]
    assert poutine.trace(diffusion.guide).get_trace(x0, t).nodes["x_s"]["scale"].tolist() == [8] + [1 / 0.875] * 3
    assert list(guide.nodes)[2:] == ["x_T", "x_t", "x_s", "_RETURN"]


# ---------------------------------------------------------------------- schedules


def test_times_of_a_curve():
    schedule = LogLinearSchedule(math.inf, LOW, HIGH)
    assert schedule.log_snr(0.0) == HIGH and schedule.log_snr(1.0) == LOW and schedule.log_snr(0.5) == (LOW + HIGH) / 2
    assert schedule.first == 0.0 and schedule.last == 1.0 and schedule.steps == math.inf
    t = torch.tensor([[0.2], [0.7]])  # float32 times
    assert schedule.log_snr(t).dtype == F64 and schedule.log_snr(t).shape == t.shape
    for bad in (1, torch.tensor([0, 1]), -0.1, 1.1, torch.tensor([0.5, math.nan])):
        with pytest.raises(ShapeError, match="continuous time"):
            schedule.log_snr(bad)
    with pytest.raises(ProgramError, match=r"respace\(T\)"):
        schedule.betas  # noqa: B018


def test_respacing_continuous_time():
    schedule = LogLinearSchedule(math.inf, LOW, HIGH)
    for spec in (5, "5", "ddim5", [0.0, 0.25, 0.5, 0.75, 1.0]):
        short = schedule.respace(spec)
        t = torch.arange(6)
        assert torch.equal(short.log_snr(t), LogLinearSchedule(5, LOW, HIGH).log_snr(t))
    assert schedule.respace(5).respace([1, 5]).log_snr(torch.tensor([1, 2])).tolist() == [HIGH, LOW]
    assert schedule.respace(1).log_snr(1) == LOW  # the one step is the noisiest
    assert set(schedule.respace(9).kept) < set(schedule.respace(17).kept)  # nested
    for bad in ("5,5", "x", 0, "0", -1, [], [0.5, 1.1], [-0.1], True, 0.5):
        with pytest.raises((OptionError, TypeError)):
            schedule.respace(bad)
    again = from_config(copy.deepcopy(schedule.respace(4).config))
    assert torch.equal(again.log_snr(torch.arange(5)), schedule.respace(4).log_snr(torch.arange(5)))


def test_fixed_schedules_of_betas_have_no_continuous_time():
    with pytest.raises(OptionError, match="steps"):
        CosineSchedule(math.inf)
    for bad in (-math.inf, math.nan, 0, 2.5):
        with pytest.raises(OptionError, match=r"or math\.inf"):
            LogLinearSchedule(bad, LOW, HIGH)


def test_transitions_between_times():
    """q(x_t | x_0) is q(x_s | x_0) followed by the transition from s to t."""
    q = ForwardProcess(Bent(math.inf))
    x0, s, t = torch.randn(5, 1, dtype=F64), torch.full((5,), 0.2, dtype=F64), torch.full((5,), 0.7, dtype=F64)
    first, step, both = q.marginal(x0, s), q.transition(q.marginal(x0, s).mean, s, t), q.marginal(x0, t)
    ratio = q.schedule.alpha(t) / q.schedule.alpha(s)
    torch.testing.assert_close(step.mean, both.mean)
    torch.testing.assert_close((ratio[:, None] * first.stddev) ** 2 + step.stddev**2, both.variance)


# ---------------------------------------------------------------------- programs and their callers


def small(schedule=None, **options):
    torch.manual_seed(0)
    net = pyrodiff.nets.MLP(3, width=16, depth=1)
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    schedule = LogLinearSchedule(math.inf, LOW, HIGH) if schedule is None else schedule
    options.setdefault("bins", (17, -1.0, 1.0))
    return GaussianDiffusion(net, schedule, (3,), prediction="v", **options)


def data(n=6):
    return torch.randint(0, 17, (n, 3)) / 8 - 1


@pytest.mark.parametrize("make_elbo", [StockMeanField, Trace_ELBO, pyrodiff.TraceMeanField_ELBO])
def test_stock_svi_trains(make_elbo):
    diffusion = small()
    svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 1e-2}), make_elbo())
    before = torch.cat([p.detach().flatten().clone() for p in diffusion.parameters()])
    losses = [svi.step(data(), timesteps.low_discrepancy(6, diffusion.steps)) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert (torch.cat([p.detach().flatten() for p in diffusion.parameters()]) != before).float().mean() > 0.9


def test_the_whole_chain_is_refused_until_respaced():
    diffusion, x0 = small(), data()
    calls = {
        "model": lambda: diffusion.model(x0),
        "sampler": lambda: diffusion.model(),
        "guide": lambda: diffusion.guide(x0),
        "noising": lambda: diffusion.noising(x0),
        "sample": lambda: sample(diffusion, 2),
        "invert": lambda: pyrodiff.invert(diffusion, x0),
        "ledger": lambda: elbo_terms(diffusion, x0),
        "compare_estimators": lambda: pyrodiff.compare_estimators(diffusion, x0),
        "compare_gradients": lambda: compare_gradients(diffusion, x0),
        "estimate_elbo": lambda: pyrodiff.estimate_elbo(diffusion, x0, 0.1),
        "tree": lambda: pyrodiff.to_datatree(elbo_terms(diffusion, x0, t=2), diffusion=diffusion),
        "plot": lambda: plots.elbo_by_timestep(elbo_terms(diffusion, x0, t=2), diffusion.schedule),
    }
    for name, call in calls.items():
        with pytest.raises(ProgramError, match="continuous time"):
            call()
            pytest.fail(name)
    short = diffusion.respace(4)
    assert short.model().shape == (1, 3)
    assert sample(diffusion, 2, steps=4).shape == (2, 3)
    assert pyrodiff.invert(diffusion, x0, steps=4).shape == x0.shape
    assert elbo_terms(diffusion.respace(4), x0).diffusion.shape == (6, 3)
    assert next(short.parameters()) is next(diffusion.parameters())


@pytest.mark.parametrize(
    "options",
    [{"variance": "learned"}, {"variance": "learned_range"}, {"decoder": "openai"}, {"prediction": "previous"}],
)
def test_what_speaks_of_x_s_is_refused(options):
    with pytest.raises(OptionError, match="in continuous time"):
        GaussianDiffusion(pyrodiff.nets.MLP(3), LogLinearSchedule(math.inf, LOW, HIGH), (3,), **options)


@pytest.mark.parametrize(
    "t", [torch.tensor([1, 1]), torch.tensor([-0.1, 0.5]), torch.tensor([0.5, 1.5]), torch.tensor([0.5, math.nan])]
)
def test_times_outside_continuous_time_are_refused(t):
    diffusion, x0 = small(), data(2)
    for call in (diffusion.guide, diffusion.model):
        with pytest.raises(ShapeError):
            call(x0, t)
    with pytest.raises(ShapeError):
        elbo_terms(diffusion, x0, t=t)
    with pytest.raises(ShapeError):
        elbo_terms(diffusion, x0, t=torch.tensor([0.0, 0.5]))  # 0 is the reconstruction


def test_an_objective_is_the_mean_over_t():
    """VDM's unweighted loss: the expectation of the factor is that of |eps - eps_hat|^2 over t in (0, 1], t = 0 left out."""
    diffusion = make(Bent(math.inf), "eps", objective="simple")
    rows = Rows(diffusion)
    found = rows.sites()
    assert all(found[site] == 0 for site in ("x_T", "x_s", "x_0"))
    t, w = legendre()
    log_snr = diffusion.schedule.log_snr(t)
    expected = (w * log_snr.exp() * mmse(log_snr)).sum()
    torch.testing.assert_close(found["x_objective"].detach(), expected, rtol=1e-8, atol=0)


def test_particles_have_times_of_their_own():
    diffusion = small(bins=None)
    t = torch.rand(400, 6, dtype=F64)
    elbo_of = pyrodiff.TraceMeanField_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(elbo_of.loss(diffusion.model, diffusion.guide, data().float(), t))


def test_fit_save_load_and_resume(tmp_path):
    x = data(32)
    options = {
        "batch_size": 8,
        "validate_every": 3,
        "warmup": 0,
        "device": "cpu",
        "progress": False,
        "lr_schedule": "constant",
    }
    diffusion = small(data_size=None)
    result = pyrodiff.fit(diffusion, x, x, steps=6, folder=tmp_path / "whole", **options)
    assert result.best is not None and math.isfinite(result.best.mean)
    again = small()
    pyrodiff.fit(again, x, x, steps=3, folder=tmp_path / "parts", **options)
    again = small()
    pyrodiff.fit(again, x, x, steps=6, folder=tmp_path / "parts", resume=True, **options)
    for a, b in zip(diffusion.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    loaded = pyrodiff.load(tmp_path / "whole")
    assert loaded.steps == math.inf and loaded.config == diffusion.config
    text = (tmp_path / "whole" / "config.json").read_text()
    assert '"steps": "inf"' in text and "Infinity" not in text
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    torch.manual_seed(0)
    expected = pyrodiff.TraceMeanField_ELBO().loss(diffusion.model, diffusion.guide, x[:3], t)
    torch.manual_seed(0)
    assert pyrodiff.TraceMeanField_ELBO().loss(loaded.model, loaded.guide, x[:3], t) == expected
