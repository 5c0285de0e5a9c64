r"""Learned schedules: derivatives, what trains which parameter, and that it is the right gradient.

The reference of the interior's gradient is brute force: E[L^2] as a Gauss-Legendre sum over t and Hermite sums over x_0 and noise, with
L written out from the paper's formula, differentiated by autograd at fixed t. The library's is another estimator of it (a score at
fixed log-SNR), so that agreement is not a comparison of two copies.
"""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path

import pytest
import torch
from oracles import MEAN, VAR, GaussianDenoiser, hermite
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer import TraceMeanField_ELBO as StockMeanField
from pyro.optim import Adam
from test_continuous_time import F64, HIGH, LOW, SHARE_OF_0, Rows, closed_form, data, learned, legendre, small

import pyrodiff
from pyrodiff import GaussianDiffusion, LogLinearSchedule, elbo_terms, timesteps
from pyrodiff.diffusion import Model
from pyrodiff.elbo import site_terms
from pyrodiff.errors import OptionError, ProgramError
from pyrodiff.laboratory.gradients import compare_gradients
from pyrodiff.schedules import LearnedSchedule, from_config

ROOT = Path(__file__).parents[1]
INTERIOR = ("linear", "heights", "rates", "offsets")
ENDS = ("log_snr_max", "log_range")


def interior(schedule):
    return [getattr(schedule, name) for name in INTERIOR]


def make(schedule, gain=0.0, **options):
    """With a gain the denoiser is wrong, and the losses are not the exact one's."""
    return GaussianDiffusion(GaussianDenoiser("x0", gain=gain), schedule, (1,), prediction="x0", **options).double()


def flat(tensors):
    return torch.cat([torch.zeros(0) if t is None else t.flatten() for t in tensors])


# ---------------------------------------------------------------------- the curve


@pytest.mark.parametrize("width", [1, 4, 32])
def test_a_fresh_schedule_is_nearly_log_linear(width):
    t = torch.linspace(0, 1, 101, dtype=F64)
    fresh, straight = (cls(math.inf, LOW, HIGH) for cls in (LearnedSchedule, LogLinearSchedule))
    assert (fresh.log_snr(t) - straight.log_snr(t)).abs().max() < 0.06
    assert isinstance(LearnedSchedule(math.inf, LOW, HIGH, width).log_snr(0.5), torch.Tensor)


@pytest.mark.parametrize("seed", range(5))
def test_monotone_with_the_ends_it_says(seed):
    schedule = LearnedSchedule(1000, LOW, HIGH).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in schedule.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=F64))
    log_snr = schedule.log_snr(torch.arange(1001)).detach()
    assert log_snr[0] == math.inf and (log_snr.diff() < 0).all()
    ends = schedule.log_snr_max.item(), (schedule.log_snr_max - schedule.log_range.exp()).item()
    torch.testing.assert_close(log_snr[[1, -1]], torch.tensor(ends, dtype=F64))
    assert LearnedSchedule(1, LOW, HIGH).log_snr(1).item() == pytest.approx(LOW, abs=1e-6)


def test_derivatives_of_the_network():
    schedule = learned(width=8)
    u = torch.linspace(0, 1, 21, dtype=F64, requires_grad=True)
    h, h1, h2 = schedule._interior(u)
    for value, derivative in ((h, h1), (h1, h2)):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), u, retain_graph=True)[0], derivative)
    torch.testing.assert_close(schedule.slope(u), -schedule.log_range.exp() * h1)


def test_log_density_is_a_density_and_its_gradient_is_at_fixed_log_snr():
    schedule = learned()
    t, _ = legendre()
    # of log-SNR, whose law is the image of a uniform t
    torch.testing.assert_close(schedule.log_density(t), -(-schedule.slope(t)).log())
    # finite differences in the parameters, t following its log-SNR by Newton's method
    at, h = t[::8], 1e-6
    target = schedule.log_snr(at).detach()
    for p in interior(schedule):
        jacobian = [torch.autograd.grad(d, p, retain_graph=True)[0].flatten() for d in schedule.log_density(at)]
        for i, gradient in enumerate(torch.stack(jacobian).T):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * h
                    moved = at.clone()
                    for _ in range(6):
                        moved -= (schedule.log_snr(moved) - target) / schedule.slope(moved)
                    values.append(schedule.log_density(moved))
                    p.view(-1)[i] -= sign * h
            torch.testing.assert_close(gradient, (values[0] - values[1]) / (2 * h), rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in schedule.parameters())
    assert torch.autograd.grad(schedule.log_density(t).sum(), schedule.log_range, allow_unused=True)[0] is None


def test_steps_stay_apart_in_bfloat16():
    schedule = LearnedSchedule(1000, LOW, HIGH).to(torch.bfloat16)
    log_snr = schedule.log_snr(torch.arange(1, 1001)).detach()
    assert log_snr.dtype == F64 and (log_snr.diff() < 0).all()


def test_config_holds_the_start_and_the_state_dict_the_rest():
    schedule = learned(5)
    again = from_config(schedule.config)
    assert again.config == schedule.config and again.steps == 5
    again.double().load_state_dict(schedule.state_dict())
    t = torch.arange(6)
    assert torch.equal(again.log_snr(t), schedule.log_snr(t))
    assert from_config(LearnedSchedule(math.inf, LOW, HIGH).config).steps == math.inf


@pytest.mark.parametrize(
    "arguments", [(0, LOW, HIGH), (10, HIGH, LOW), (10, -40.0, HIGH), (10, LOW, math.nan), (10, LOW, HIGH, 0)]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(OptionError):
        LearnedSchedule(*arguments)


# ---------------------------------------------------------------------- what the bound trains


@pytest.mark.parametrize("elbo", [StockMeanField, Trace_ELBO])
@pytest.mark.parametrize("one_timestep", [False, True])
def test_with_finite_T_the_bound_trains_all_of_it(elbo, one_timestep):
    """At fixed noise, against central differences (h = 1e-5: relative error 1e-6 or so)."""
    schedule = learned(4)
    diffusion = make(schedule, gain=0.1)
    x0 = torch.tensor([[0.4], [-0.3], [1.0], [0.1]], dtype=F64)
    args = (x0, torch.tensor([1, 2, 3, 4])) if one_timestep else (x0,)

    def value():
        torch.manual_seed(5)
        return elbo().differentiable_loss(diffusion.model, diffusion.guide, *args)

    parameters = list(schedule.parameters())
    gradients = torch.autograd.grad(value(), parameters)
    h = 1e-5
    for p, gradient in zip(parameters, gradients, strict=True):
        assert gradient.abs().max() > 1e-6
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * h
                    ends.append(value().item())
                    p.view(-1)[i] -= sign * h
            expected = (ends[0] - ends[1]) / (2 * h)
            assert gradient.flatten()[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def losses(schedule, gain=0.0, nodes=64, hermite_nodes=3):
    """L = -1/2 dSNR/dt |x_0 - x0_hat|^2 / (1 - share of t = 0) for every t, x_0 and noise; t, probabilities and L, differentiable."""
    u, wu = legendre(nodes)
    z, w = (torch.as_tensor(a) for a in hermite(hermite_nodes))
    h, h1, _ = schedule._interior(u)
    span = schedule.log_range.exp()
    log_snr, slope = schedule.log_snr_max - span * h, -span * h1
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    x0 = MEAN + math.sqrt(VAR) * z
    x_t = alpha[:, None, None] * x0[:, None] + sigma[:, None, None] * z  # [t, x_0, noise]
    k = alpha * VAR / (alpha**2 * VAR + sigma**2)
    x0_hat = (1 + gain) * (MEAN + k[:, None, None] * (x_t - alpha[:, None, None] * MEAN))
    loss = (-0.5 * log_snr.exp() * slope)[:, None, None] * (x0[:, None] - x0_hat) ** 2 / (1 - SHARE_OF_0)
    return u, (1 - SHARE_OF_0) * wu[:, None, None] * w[:, None] * w, loss


def brute_force(schedule, gain=0.0, nodes=64):
    """E[L] and E[L^2], by quadrature at fixed t."""
    _, p, loss = losses(schedule, gain, nodes)
    return (p * loss).sum(), (p * loss**2).sum()


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_in_continuous_time_the_interior_descends_the_variance(gain, monkeypatch):
    schedule = learned()
    diffusion = make(schedule, gain)
    mean, square = brute_force(schedule, gain)
    # VDM's section 5: the bound does not depend on the interior
    assert flat(torch.autograd.grad(mean, interior(schedule), retain_graph=True)).abs().max() < 1e-9
    expected = flat(torch.autograd.grad(square, interior(schedule)))
    assert expected.abs().max() > 0.1

    def gradient(names=None):
        sites = Rows(diffusion).sites()
        total = sum(value for name, value in sites.items() if names is None or name in names)
        return flat(torch.autograd.grad(total, interior(schedule), allow_unused=True))

    torch.testing.assert_close(gradient(), expected, rtol=1e-7, atol=1e-8)
    # through the bound's own sites there is no way to it
    bound = sum(Rows(diffusion).sites()[name] for name in ("x_T", "x_t", "x_s", "x_0"))
    assert all(g is None for g in torch.autograd.grad(bound, interior(schedule), allow_unused=True))
    assert Rows(diffusion).sites()["x_interior"].item() == 0
    # each part of the formula is seen
    original = Model._learn_interior

    def with_other(change):
        def new(self, x0, x_t, t, law, weight):
            original(self, *change(x0, x_t, t, law, weight))

        with monkeypatch.context() as patch:
            patch.setattr(Model, "_learn_interior", new)
            return (gradient() - expected).abs().max() / expected.abs().max()

    assert with_other(lambda x0, x_t, t, law, weight: (x0, x_t, t, law, weight * 1.001)) > 1e-3
    assert with_other(lambda x0, x_t, t, law, weight: (x0 + 0.01, x_t, t, law, weight)) > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(
            LearnedSchedule,
            "log_density",
            lambda self, t: -(self._interior(t)[1] * self.log_range.exp().detach()).log(),
        )
        assert (gradient() - expected).abs().max() > 0.01 * expected.abs().max()  # at fixed t: another gradient


def test_the_score_at_fixed_log_snr_is_less_noisy_than_the_path_at_fixed_t():
    """One draw's gradient of L^2, in both forms: the same mean, a quarter of the variance, by quadrature (data as in the page)."""
    schedule = LearnedSchedule(math.inf, LOW, HIGH, width=8).double()
    u, p, loss = losses(schedule, nodes=32, hermite_nodes=5)  # variances of L^2 are of degree 8
    figures = []
    for one in (loss**2, -(loss.detach() ** 2) * schedule.log_density(u)[:, None, None]):
        rows = [flat(torch.autograd.grad(x, interior(schedule), retain_graph=True)) for x in one.flatten()]
        gradients, weights = torch.stack(rows), p.flatten()[:, None]
        mean = (weights * gradients).sum(0)
        figures.append((mean, ((weights * gradients**2).sum(0) - mean**2).sum()))
    (path, path_variance), (score, score_variance) = figures
    torch.testing.assert_close(path, score, rtol=1e-6, atol=1e-7)
    assert 0.2 < score_variance / path_variance < 0.3


def test_in_continuous_time_the_ends_descend_the_bound():
    """The expected gradient through x_t, weights and decoder, against the derivative of the closed form."""
    schedule = learned()
    diffusion = make(schedule)
    ends = [getattr(schedule, name) for name in ENDS]
    found = torch.autograd.grad(sum(Rows(diffusion).sites().values()), ends)
    high, log_range = (p.detach().clone().requires_grad_() for p in ends)
    expected = torch.autograd.grad(sum(closed_form(high - log_range.exp(), high).values()), [high, log_range])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert min(g.abs().item() for g in expected) > 1e-4


def test_the_interiors_gradient_is_that_of_the_squared_loss_per_dim():
    """-E[L^2] / D through log p alone, from the sites of the same traces; D = 3."""
    schedule = LearnedSchedule(math.inf, LOW, HIGH).double()
    diffusion = GaussianDiffusion(GaussianDenoiser(), schedule, (3,), "x0")
    x0, t = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.0, 0.2, 0.6, 1.0], dtype=torch.float64)
    guide = poutine.trace(diffusion.guide).get_trace(x0, t)
    model = poutine.trace(poutine.replay(diffusion.model, trace=guide)).get_trace(x0, t)
    model.compute_log_prob()
    kl = site_terms(model, guide)["x_s"].detach()  # scaled by 1 / p(t), and 0 at t = 0
    assert (kl[1:] > 0).all() and kl[0] == 0
    expected = torch.autograd.grad((kl**2 / 3 * schedule.log_density(t)).sum(), interior(schedule))
    found = torch.autograd.grad(model.nodes["x_interior"]["log_prob_sum"], interior(schedule))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_descending_reaches_the_least_variance():
    """min over densities of E[L^2] is (int sqrt(E F^2) d lambda)^2, by Cauchy and Schwarz."""
    schedule = LearnedSchedule(math.inf, LOW, HIGH).double()
    diffusion = make(schedule)
    _, start = brute_force(schedule, nodes=500)
    optimizer = torch.optim.Adam(interior(schedule), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        Rows(diffusion).sites()["x_interior"].backward()
        optimizer.step()
    _, end = brute_force(schedule, nodes=500)
    u, w = legendre(200)
    log_snr = LOW + (HIGH - LOW) * u
    z, wz = (torch.as_tensor(a) for a in hermite(3))
    alpha, sigma = (f.sqrt()[:, None, None] for f in (log_snr.sigmoid(), (-log_snr).sigmoid()))
    k = alpha * VAR / (alpha**2 * VAR + sigma**2)
    error = (1 - k * alpha) * math.sqrt(VAR) * z[:, None] - k * sigma * z
    second = torch.einsum("tij,i,j->t", (0.5 * log_snr.exp()[:, None, None] * error**2) ** 2, wz, wz)
    floor = ((HIGH - LOW) * (w * second.sqrt()).sum()) ** 2 / (1 - SHARE_OF_0)
    assert floor < end < 1.03 * floor  # 32 sigmoids are not all densities
    assert start > 1.8 * floor


# ---------------------------------------------------------------------- everything downstream


@pytest.mark.parametrize("steps", [20, math.inf])
@pytest.mark.parametrize("elbo", [StockMeanField, Trace_ELBO, pyrodiff.TraceMeanField_ELBO])
def test_stock_svi_moves_every_parameter(elbo, steps):
    schedule = LearnedSchedule(steps, LOW, HIGH)
    diffusion = small(schedule, decoder="vdm")
    svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 1e-2}), elbo())
    before = [p.detach().clone() for p in schedule.parameters()]
    for _ in range(2):
        svi.step(data(16), timesteps.low_discrepancy(16, steps))
    for name, p, old in zip(dict(schedule.named_parameters()), schedule.parameters(), before, strict=True):
        assert (p != old).all(), name


@pytest.mark.parametrize("decoder", ["vdm", "learned"])
@pytest.mark.parametrize("steps", [20, math.inf])
def test_fit_save_load_score_and_sample(steps, decoder, tmp_path):
    x = data(32)
    diffusion = small(LearnedSchedule(steps, LOW, HIGH), decoder=decoder)
    before = [p.detach().clone() for p in diffusion.schedule.parameters()]
    if decoder == "learned":
        assert diffusion.reverse_kernel.log_scale.item() == pytest.approx(-HIGH / 2)
    options = {"batch_size": 16, "warmup": 0, "device": "cpu", "progress": False, "lr_schedule": "constant"}
    pyrodiff.fit(diffusion, x, x, steps=4, folder=tmp_path / "whole", **options)
    assert all((p != old).all() for p, old in zip(diffusion.schedule.parameters(), before, strict=True) if p.dim())
    again = small(LearnedSchedule(steps, LOW, HIGH), decoder=decoder)
    pyrodiff.fit(again, x, x, steps=2, folder=tmp_path / "parts", **options)
    again = small(LearnedSchedule(steps, LOW, HIGH), decoder=decoder)
    pyrodiff.fit(again, x, x, steps=4, folder=tmp_path / "parts", resume=True, **options)
    for a, b in zip(diffusion.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    loaded = pyrodiff.load(tmp_path / "whole")
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64) if steps == math.inf else torch.arange(steps + 1)
    assert torch.equal(loaded.schedule.log_snr(t), diffusion.schedule.log_snr(t))
    assert pyrodiff.sample(loaded, 2, steps=5, seed=0).isfinite().all()
    assert elbo_terms(loaded, x[:4], t=3).elbo.isfinite().all()
    twin = copy.deepcopy(loaded)
    assert twin.schedule.log_range is not loaded.schedule.log_range


def test_a_learned_schedule_in_the_gradient_laboratory():
    diffusion = make(learned(4), gain=0.1)
    table = compare_gradients(diffusion, torch.tensor([[0.4]], dtype=F64), timesteps=[2], chain=False, repeats=8)
    rows = table[
        (table.group == "schedule") & table.estimator.str.startswith("pathwise") & (table["where"] == "one timestep")
    ]
    assert len(rows) == 2 and (rows.norm > 0).all()
    assert rows.z.dropna().max() < 8  # |t_7| > 8 once in ten thousand, four directions


def test_objectives_that_are_no_bound_do_not_train_a_schedule():
    x0, t = data(4), torch.tensor([0.0, 0.2, 0.6, 1.0], dtype=F64)
    diffusion = small(LearnedSchedule(math.inf, LOW, HIGH), objective="simple")
    with pytest.raises(ProgramError, match="is no bound"):
        pyrodiff.TraceMeanField_ELBO().loss(diffusion.model, diffusion.guide, x0, t)
    with torch.no_grad():
        trace = poutine.trace(diffusion.model).get_trace(x0, t)
    assert "x_interior" not in trace.nodes
    diffusion.schedule.requires_grad_(False)
    assert math.isfinite(pyrodiff.TraceMeanField_ELBO().loss(diffusion.model, diffusion.guide, x0, t))


def test_respaced_chains_share_the_ends():
    diffusion = make(learned())
    short = diffusion.respace(5)
    loss = pyrodiff.TraceMeanField_ELBO().differentiable_loss(short.model, short.guide, torch.randn(3, 1, dtype=F64))
    gradients = torch.autograd.grad(loss, list(diffusion.schedule.parameters()), allow_unused=True)
    named = dict(zip(dict(diffusion.schedule.named_parameters()), gradients, strict=True))
    assert all(named[name].abs() > 0 for name in ENDS) and all(named[name] is None for name in INTERIOR)


# ---------------------------------------------------------------------- the page and the example


def test_the_examples_curves_for_the_schedules_of_others_have_the_slope_they_say():
    schedule = LearnedSchedule(math.inf, LOW, HIGH)
    u = torch.linspace(0.01, 0.99, 9, dtype=F64)
    for other in importlib.import_module("learned_schedule").interiors(schedule).values():
        secant = (other.log_snr(u + 1e-6) - other.log_snr(u - 1e-6)) / 2e-6
        torch.testing.assert_close(other.slope(u), secant, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.log_snr(torch.tensor([0.0, 1.0])), schedule.log_snr(torch.tensor([0.0, 1.0])))


def test_asked_from_another_device_it_answers_from_its_own():
    schedule = LearnedSchedule(7, -4.0, 4.0).to("meta")
    assert schedule.respace(3).log_snr(torch.tensor([1, 3])).device.type == "meta"
    assert schedule.log_snr(2).device.type == "meta" and schedule.betas.shape == (7,)
