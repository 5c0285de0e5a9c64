"""The flow's density, map and bounds against Gaussian and mixture data in closed form, by enumeration and by quadrature."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from monte_carlo import assert_estimate, assert_mean, assert_proportion
from oracles import DDPM, MEAN, VAR, Denoiser, GaussianDenoiser, GridDenoiser, LinearModel, hermite
from scipy.linalg import logm
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from pyrodiff import GaussianDiffusion, LogLinearSchedule, elbo_terms, nets
from pyrodiff.elbo import BitsPerDim, Estimate
from pyrodiff.errors import DataError, OptionError, ShapeError
from pyrodiff.likelihood import dequantise
from pyrodiff.likelihood.dequantise import DEQUANTISATIONS, flow_bound, signed_gap
from pyrodiff.likelihood.flow import SOLVERS, decode, encode, log_density
from pyrodiff.schedules import Schedule

MEANS = torch.tensor([[0.6, -0.4], [-0.5, 0.3]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.20, 0.12], [0.12, 0.15]], [[0.10, -0.05], [-0.05, 0.30]]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
TIGHT = {"solver": "dopri5", "tolerance": 1e-8}


class CorrelatedDenoiser(Denoiser):
    """Exact for a mixture of correlated Gaussians: x ``[N, D]``."""

    def __init__(self, weights, means, covariances, prediction="v"):
        super().__init__(prediction)
        self.weights, self.means = weights, means
        self.values, self.vectors = torch.linalg.eigh(covariances)  # [K, D], [K, D, D]: columns

    def posterior_mean(self, x, alpha, var):
        along = torch.einsum("nkd,kde->nke", x[:, None] - alpha[:, None] * self.means, self.vectors)
        noisy = (alpha**2)[:, None] * self.values + var[:, None]
        log_r = self.weights.log() - 0.5 * (along**2 / noisy + noisy.log()).sum(-1)
        shrunk = torch.einsum("nke,kde->nkd", alpha[:, None] * self.values / noisy * along, self.vectors)
        return (torch.softmax(log_r, -1)[..., None] * (self.means + shrunk)).sum(1)


def mixture(schedule, prediction="v", components=slice(None)):
    weights = WEIGHTS[components] / WEIGHTS[components].sum()
    net = CorrelatedDenoiser(weights, MEANS[components], COVARIANCES[components], prediction)
    return GaussianDiffusion(net, schedule, (2,), prediction=prediction)


def smoothed_log_prob(x, noise_variance):
    """Log-density of the mixture's x_0 with noise added, ``[B]``."""
    laws = MultivariateNormal(MEANS, COVARIANCES + noise_variance * torch.eye(2, dtype=torch.float64))
    return torch.logsumexp(WEIGHTS.log() + laws.log_prob(x[:, None]), 1)


def roots(schedule, covariance):
    """V_1^(1/2), V_T^(1/2), symmetric: those of the covariances of x_1 and x_T."""
    found = []
    for t in (1, schedule.steps):
        alpha2, sigma2 = schedule.alpha(t) ** 2, schedule.sigma(t) ** 2
        values, vectors = torch.linalg.eigh(alpha2 * covariance + sigma2 * torch.eye(2, dtype=torch.float64))
        found.append(vectors @ values.sqrt().diag() @ vectors.T)
    return found


def gaussian_flow(schedule, x, mean, covariance):
    """x_T and log-density of the flow of Gaussian data: x keeps its place, in standard deviations; N(0, 1) at x_T."""
    alpha_1, alpha_T = schedule.alpha(1), schedule.alpha(schedule.steps)
    root_1, root_T = roots(schedule, covariance)
    jacobian = root_T @ torch.linalg.inv(root_1)
    x_T = alpha_T * mean + (alpha_1 * (x - mean)) @ jacobian.T
    return x_T, Normal(0, 1).log_prob(x_T).sum(1) + torch.logdet(jacobian) + 2 * alpha_1.log()


def points(n=5):
    return torch.randn(n, 2, dtype=torch.float64) * 0.6


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("prediction", "options", "atol"),
    [
        # the solvers' errors, measured: 2e-5, 1e-7, 1e-7
        ("v", {"solver": "heun", "steps": 1024}, 1e-4),
        ("eps", {"steps": 128}, 1e-6),
        ("x0", TIGHT, 1e-6),
        ("score", TIGHT, 1e-6),
    ],
)
def test_gaussian_data(prediction, options, atol):
    diffusion = mixture(LogLinearSchedule(7, -6.0, 6.0), prediction, slice(1))
    x = MEANS[0] + torch.randn(5, 2, dtype=torch.float64) @ torch.linalg.cholesky(COVARIANCES[0]).T
    x_T, log_prob = gaussian_flow(diffusion.schedule, x, MEANS[0], COVARIANCES[0])
    found = log_density(diffusion, x, **options)
    torch.testing.assert_close(found.log_prob, log_prob[None], rtol=0, atol=atol)
    torch.testing.assert_close(encode(diffusion, x, **options), x_T, rtol=0, atol=atol)
    torch.testing.assert_close(decode(diffusion, x_T, **options), x, rtol=0, atol=atol)


def test_mixture_data():
    """At log-SNR -24 the law of x_T is N(0, 1) but for 1e-5 nats; the density is that of x_0 with the noise of t = 1."""
    diffusion, x = mixture(LogLinearSchedule(7, -24.0, 5.0)), points()
    expected = smoothed_log_prob(x, math.exp(-5.0))
    assert (expected - smoothed_log_prob(x, 0.0)).abs().max() > 1e-2  # and not of x_0
    for options in ({"solver": "rk4", "steps": 256}, TIGHT):
        found = log_density(diffusion, x, **options)
        torch.testing.assert_close(found.log_prob[0], expected, rtol=0, atol=1e-4)
    back = decode(diffusion, encode(diffusion, x, **TIGHT), **TIGHT)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("solver", "order", "grids"), [("heun", 2, (64, 128, 256)), ("rk4", 4, (32, 64, 128))])
def test_order_of_convergence(solver, order, grids):
    diffusion, x = mixture(LogLinearSchedule(7, -6.0, 4.0), components=slice(1)), points(1)
    x_T, log_prob = gaussian_flow(diffusion.schedule, x, MEANS[0], COVARIANCES[0])
    errors = []
    for steps in grids:
        found = log_density(diffusion, x, solver=solver, steps=steps).log_prob[0] - log_prob
        there = encode(diffusion, x, solver=solver, steps=steps) - x_T
        back = decode(diffusion, x_T, solver=solver, steps=steps) - x
        errors.append([found.abs().max().item(), there.abs().max().item(), back.abs().max().item()])
    for coarse, fine in itertools.pairwise(np.array(errors)):
        # the next term of the error is relative to this one some h, at most 0.16: 2^order to within 12 %
        assert np.abs(np.log2(coarse / fine) - order).max() < 0.25, errors


def test_one_step_of_the_chain_is_the_prior_alone():
    """T = 1: the two ends are one."""
    diffusion, x = mixture(LogLinearSchedule(1, -6.0, 1.0)), points()
    alpha = diffusion.schedule.alpha(1)
    for solver in SOLVERS:
        found = log_density(diffusion, x, solver=solver)
        expected = Normal(0, 1 / alpha).log_prob(x).sum(1)
        torch.testing.assert_close(found.log_prob[0], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(encode(diffusion, x, solver=solver), alpha * x, rtol=0, atol=1e-12)


def test_float32_and_what_it_cost():
    diffusion, x = mixture(LogLinearSchedule(7, -6.0, 4.0)), points(3)
    rows = []
    diffusion.net.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    exact = log_density(diffusion, x, steps=40, batch_size=2)
    assert exact.network_evaluations == sum(rows) == 3 * 40 * 4
    assert exact.vector_jacobian_products == 2 * exact.network_evaluations
    assert exact.seconds > 0
    rows.clear()
    probed = log_density(diffusion, x, solver="dopri5", probes=3)
    assert probed.network_evaluations == sum(rows)
    assert probed.vector_jacobian_products == 3 * probed.network_evaluations
    for options, steps, calls in (({"solver": "heun", "steps": 5}, 5, 2), ({"steps": 1}, 1, 4), ({}, 64, 4)):
        assert log_density(diffusion, x, probes=1, **options).network_evaluations == 3 * steps * calls
    for name in ("weights", "means", "values", "vectors"):
        setattr(diffusion.net, name, getattr(diffusion.net, name).float())
    single = log_density(diffusion, x.float(), steps=40)
    assert encode(diffusion, x.float()).dtype == torch.float32
    # float32's rounding of x0_hat, 6e-8, times 1 / sigma_1^2 = 50 in the divergence, at most; some of it cancels
    torch.testing.assert_close(single.log_prob, exact.log_prob, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------- the divergence by probes


def test_probes_enumerated():
    """Over all signs, Hutchinson's estimate has the exact mean, also off linearity, and for a linear field a known variance."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)))
    for components in (slice(1), slice(None)):
        diffusion, x = mixture(LogLinearSchedule(7, -6.0, 4.0), components=components), points(3)
        every = log_density(diffusion, x, probes=signs[:, None].expand(4, 3, 2), steps=64).log_prob
        exact = log_density(diffusion, x, steps=64).log_prob[0]
        torch.testing.assert_close(every.mean(0), exact, rtol=0, atol=1e-11)  # sums of 256 slopes, by 1e-16 each
        assert every.var(0).min() > 1e-3
        if components == slice(1):
            # the estimate is v M v, M the logarithm of the map's symmetric Jacobian: variance 2 * (its off-diagonal squared)
            root_1, root_T = roots(diffusion.schedule, COVARIANCES[0])
            M = logm((root_T @ torch.linalg.inv(root_1)).numpy())
            variance = 2 * (M**2).sum() - 2 * (np.diag(M) ** 2).sum()
            # RK4's error is 1e-5 of M, 2e-5 of its square
            np.testing.assert_allclose(every.var(0, correction=0), np.full(3, variance), rtol=1e-4)


@pytest.mark.monte_carlo
def test_probes_are_signs_of_their_own():
    diffusion, x = mixture(LogLinearSchedule(7, -6.0, 4.0), components=slice(1)), points(2)
    probed = log_density(diffusion, x, probes=400, steps=2).log_prob
    extremes = log_density(diffusion, x, probes=torch.tensor([[[1.0, 1.0]] * 2, [[1.0, -1.0]] * 2]), steps=2).log_prob
    high = (probed - extremes[0]).abs() < 1e-9
    assert (high | ((probed - extremes[1]).abs() < 1e-9)).all()
    # fair coins; two examples' agree in half of the cases
    assert_proportion([*high.sum(0).tolist(), int((high[:, 0] == high[:, 1]).sum())], 400, 0.5, detects=0.3)
    exact = log_density(diffusion, x, steps=2).log_prob
    assert_mean(probed, exact, detects=0.3 * float((extremes[0] - extremes[1]).abs().max()))


def test_a_density_is_a_function():
    """Of the seed, not of the batch size nor, with fixed steps, of the neighbours."""
    diffusion, x = mixture(LogLinearSchedule(7, -6.0, 4.0)), points(7)
    options = {"probes": 2, "steps": 8, "seed": 3}
    all_at_once = log_density(diffusion, x, **options).log_prob
    for size in (1, 3):
        # LAPACK's and BLAS's kernels round by the batch's size
        torch.testing.assert_close(
            log_density(diffusion, x, batch_size=size, **options).log_prob, all_at_once, rtol=0, atol=1e-11
        )
    assert torch.equal(log_density(diffusion, x, **options).log_prob, all_at_once)
    torch.testing.assert_close(
        log_density(diffusion, x[:2], **options).log_prob, all_at_once[:, :2], rtol=0, atol=1e-11
    )
    assert not torch.equal(log_density(diffusion, x, **(options | {"seed": 4})).log_prob, all_at_once)
    one, other = (log_density(diffusion, x, batch_size=b, **TIGHT).log_prob for b in (1, 7))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("options", [{"steps": 256}, TIGHT], ids=["rk4", "dopri5"])
def test_gradient_is_the_score(options):
    diffusion, x = mixture(LogLinearSchedule(7, -24.0, 3.0)), points(3).requires_grad_()
    (found,) = torch.autograd.grad(log_density(diffusion, x, **options).log_prob.sum(), x)
    (score,) = torch.autograd.grad(smoothed_log_prob(x, math.exp(-3.0)).sum(), x)
    # as the density's: alpha_T = 6e-6 times numbers of order 1, and the solver's
    torch.testing.assert_close(found, score, rtol=0, atol=1e-4)


def mlp(features=1, **options):
    """A network of random weights, its last layer too: a smooth model, of nothing."""
    net = nets.MLP(features, width=16, depth=1, **options).double()
    nn.init.normal_(net.output.weight, std=0.2)
    return net


def test_gradient_in_the_parameters():
    net = mlp(2)
    diffusion, x = GaussianDiffusion(net, LogLinearSchedule(7, -4.0, 4.0), (2,), prediction="v"), points(3)

    def total(shift):
        with torch.no_grad():
            net.output.bias[0] += shift
            found = log_density(diffusion, x, steps=16, probes=1, seed=0).log_prob.sum()
            net.output.bias[0] -= shift
        return found.item()

    (gradient,) = torch.autograd.grad(
        log_density(diffusion, x.requires_grad_(), steps=16, probes=1, seed=0).log_prob.sum(), net.output.bias
    )
    # central differences: h^2 = 1e-10 times a third derivative of order 10
    assert abs(gradient[0].item() - (total(1e-5) - total(-1e-5)) / 2e-5) < 1e-7


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_graph_is_kept_only_where_it_is_wanted(solver):
    diffusion, x = GaussianDiffusion(mlp(2), LogLinearSchedule(7, -4.0, 4.0), (2,), prediction="v"), points(3)
    assert not log_density(diffusion, x, solver=solver).log_prob.requires_grad
    assert not encode(diffusion, x, solver=solver).requires_grad
    wanting = x.clone().requires_grad_()
    with torch.no_grad():
        assert not log_density(diffusion, wanting, solver=solver).log_prob.requires_grad
    assert not flow_bound(diffusion, wanting, solver=solver).log_prob.requires_grad
    kept = log_density(diffusion, wanting, solver=solver).log_prob
    assert kept.requires_grad
    # the same number, with or without
    torch.testing.assert_close(kept.detach(), log_density(diffusion, x, solver=solver).log_prob, rtol=0, atol=1e-12)
    back = decode(diffusion, encode(diffusion, wanting, solver=solver), solver=solver)
    (gradient,) = torch.autograd.grad(back.sum(), wanting)
    torch.testing.assert_close(gradient, torch.ones_like(x), rtol=0, atol=1e-3)  # of the identity, by 64 steps


# ---------------------------------------------------------------------- any network


class Wave(nn.Module):
    """The denoiser of no data: a wave in x, with dropout and a variance output."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, log_snr):
        return torch.cat([self.dropout(1.3 * torch.sin(1.5 * x + 0.2 * log_snr[:, None])), x], dim=1)


@pytest.mark.parametrize("clip", [False, True])
def test_the_density_of_any_network_integrates_to_one(clip):
    """Whatever the network says; clipped too, where the flow has kinks. With a variance output, and dropout switched off."""
    net, schedule = Wave(), LogLinearSchedule(7, -4.0, 2.0)
    diffusion = GaussianDiffusion(net, schedule, (1,), prediction="x0", variance="learned_range", clip=clip)
    x = torch.linspace(-4, 4, 1601, dtype=torch.float64)[:, None]
    found = log_density(diffusion, x, steps=128, batch_size=1601).log_prob[0]
    assert net.training and net.dropout.training
    total = torch.trapezoid(found.exp(), x[:, 0]).item()
    # the trapezoid rule is exact for smooth densities; kinks cost it, and RK4, their order
    assert abs(total - 1) < (1e-3 if clip else 1e-6)  # found: 2e-4, 2e-8


def test_conditioning_is_by_row():
    net = mlp(2, classes=3)
    diffusion = GaussianDiffusion(net, LogLinearSchedule(7, -4.0, 4.0), (2,), prediction="v")
    x, y = points(3), torch.tensor([2, 0, 1])
    together = log_density(diffusion, x, steps=8, y=y, batch_size=2).log_prob[0]
    bounds = flow_bound(diffusion, x, steps=8, samples=3, repeats=2, seed=0, y=y, batch_size=4).log_prob
    assert (together - log_density(diffusion, x, steps=8, y=torch.tensor(0)).log_prob[0]).abs()[[0, 2]].min() > 1e-6
    for i in range(3):
        alone = log_density(diffusion, x[i : i + 1], steps=8, y=y[i : i + 1]).log_prob[0]
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-11)
    first = flow_bound(diffusion, x[:1], steps=8, samples=3, repeats=2, seed=0, y=y[:1]).log_prob
    torch.testing.assert_close(first, bounds[:, :1], rtol=0, atol=1e-11)  # example i's noise is its own


# ---------------------------------------------------------------------- bounds on log p(x_0)

GRID = (9, -1.0, 1.0)


def discrete(schedule, bins=GRID, **options):
    """The exact denoiser of N(MEAN, VAR), with bins: a network that was trained on other data than it is to score."""
    return GaussianDiffusion(GaussianDenoiser("v"), schedule, (1,), prediction="v", bins=bins, **options)


def midpoints(monkeypatch, n, as_samples):
    """Uniform numbers that are a grid of midpoints: sums over them are integrals."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    shape = (1, 1, n, 1) if as_samples else (1, n, 1, 1)
    monkeypatch.setattr(dequantise, "_uniforms", lambda seed, wanted: u.reshape(shape).expand(wanted))


@pytest.mark.parametrize("noise", [-1.0, 5.5])
def test_importance_weights_integrate_to_the_probability(noise, monkeypatch):
    """K samples that are a quadrature's nodes: the bin's probability under the flow, or the model's with its decoder."""
    n = 2000
    midpoints(monkeypatch, n, as_samples=True)
    schedule = LogLinearSchedule(7, -24.0, noise)
    diffusion, x0 = discrete(schedule), torch.tensor([[-1.0], [0.25], [0.75]], dtype=torch.float64)
    smoothed = Normal(MEAN, math.sqrt(VAR + math.exp(-noise)))
    for dequantisation in ("uniform", "truncated_normal"):
        found = flow_bound(diffusion, x0, dequantisation, samples=n, steps=128, batch_size=20000).log_prob
        expected = (smoothed.cdf(x0 + 0.125) - smoothed.cdf(x0 - 0.125)).log().T
        # the midpoint rule's error is 1 / (24 n^2) of a second derivative below 1000; the solver's as above
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    continuous = discrete(schedule, bins=None)
    found = flow_bound(continuous, x0, samples=n, steps=128, batch_size=20000).log_prob
    # x_0 = A x_1 + B + noise, x_1 ~ N(alpha_1 MEAN, V_1)
    alpha_1, var_1 = schedule.alpha(1), schedule.sigma(1) ** 2
    V_1 = alpha_1**2 * VAR + var_1
    A = alpha_1 * VAR / V_1
    law = Normal(MEAN, (A**2 * V_1 + var_1 / alpha_1**2).sqrt())
    # cut off at the outermost midpoints: weights there grow, as exp(z^2 / 2 * (1 - ratio of variances)); 1e-3 at noise = -1
    torch.testing.assert_close(found, law.log_prob(x0).T, rtol=0, atol=1e-3)


def test_probabilities_of_discrete_data_add_up_to_one(monkeypatch):
    """Those of all levels, with the discretised decoder; of bins, what lies further out is lost."""
    midpoints(monkeypatch, 1000, as_samples=True)
    levels, pmf = torch.linspace(-1, 1, 9, dtype=torch.float64), torch.arange(1.0, 10.0, dtype=torch.float64) / 45
    schedule = LogLinearSchedule(7, -4.0, 4.0)
    diffusion = GaussianDiffusion(GridDenoiser(levels, pmf, "v"), schedule, (1,), prediction="v", bins=GRID)
    total = {}
    for dequantisation in DEQUANTISATIONS:
        found = flow_bound(diffusion, levels[:, None], dequantisation, samples=1000, steps=48, batch_size=9000)
        total[dequantisation] = found.log_prob.exp().sum().item()
    # the nodes end at 3.3 standard deviations of q, where the weights are not small
    assert abs(total["decoder"] - 1) < 3e-3
    assert 0.9 < total["uniform"] < 0.99
    assert abs(total["uniform"] - total["truncated_normal"]) < 1e-4


@pytest.mark.parametrize("dequantisation", ["uniform", "truncated_normal"])
def test_one_sample_is_the_elbo(dequantisation, monkeypatch):
    """Averaged over nodes: the mean of log p less that of log q, both in closed form for Gaussian data."""
    n, noise = 2000, 4.0
    midpoints(monkeypatch, n, as_samples=False)
    diffusion, x0 = discrete(LogLinearSchedule(7, -24.0, noise)), torch.tensor([[0.75]], dtype=torch.float64)
    found = flow_bound(diffusion, x0, dequantisation, repeats=n, steps=128, batch_size=20000).log_prob.mean()
    half, s = 0.125, math.exp(-noise / 2)
    if dequantisation == "uniform":
        variance, log_q = half**2 / 3, -math.log(2 * half)
    else:  # the truncated normal's moments
        tau = half / s
        mass, density = math.erf(tau / math.sqrt(2)), math.exp(-(tau**2) / 2) / math.sqrt(2 * math.pi)
        variance = s**2 * (1 - 2 * tau * density / mass)
        log_q = -0.5 * math.log(2 * math.pi) - math.log(s * mass) - variance / (2 * s**2)
    V = VAR + s**2
    expected = -0.5 * math.log(2 * math.pi * V) - ((0.75 - MEAN) ** 2 + variance) / (2 * V) - log_q
    assert abs(found.item() - expected) < 2e-5


def test_a_uniform_number_of_0_has_a_quantile(monkeypatch):
    class Zeros:
        def random(self, shape):
            return np.zeros(shape)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Zeros())
    u = dequantise._uniforms(0, (1, 2))
    assert (u > 0).all() and torch.special.ndtri(u).isfinite().all()


@pytest.mark.monte_carlo
def test_the_limit_of_the_chains_bound():
    """For exact scores the ELBO of the chain tends to that of the flow with its decoder; the nodes are Gauss-Hermite's."""
    x0, ends = np.array([-0.4, 0.3, 1.1]), (-24.0, 5.0)
    limits = []
    for steps in (4000, 8000):
        ddpm = DDPM(LogLinearSchedule(steps, *ends).betas.numpy())
        chain = LinearModel(ddpm, ddpm.variances("fixed_small"), ddpm.decoder_variance("vdm"))
        limits.append(-chain.nelbo(x0))
    limit = 2 * limits[1] - limits[0]  # the bound's error is c / T
    assert np.abs(limits[1] - limits[0]).min() > 1e-5
    diffusion = discrete(LogLinearSchedule(7, *ends), bins=None)
    nodes, weights = hermite(3)  # exact for log p, which is quadratic in x_1
    data, s = torch.from_numpy(x0)[:, None], math.exp(-ends[1] / 2)
    found = np.zeros(3)
    for node, weight in zip(nodes, weights, strict=True):
        log_p = log_density(diffusion, data + s * node, **TIGHT).log_prob[0]
        decoder = diffusion.reverse_kernel.decode(diffusion.schedule.alpha(1) * (data + s * node)).log_prob(data)
        log_q = Normal(data, s).log_prob(data + s * node).sum(1)
        found += weight * (log_p + decoder - log_q).numpy()
    # c / T^2 and rounding of sums over 8000 steps; alpha_T = 6e-6
    np.testing.assert_allclose(found, limit, rtol=0, atol=2e-5)
    drawn = flow_bound(diffusion, data, repeats=200, solver="heun", steps=128, batch_size=1000).log_prob
    assert_mean(drawn, limit, detects=1.0)


@pytest.mark.monte_carlo
def test_more_samples_are_a_tighter_bound():
    x0 = torch.tensor([[0.25]], dtype=torch.float64).expand(64, 1)
    diffusion = discrete(LogLinearSchedule(7, -24.0, 0.0))
    smoothed = Normal(MEAN, math.sqrt(VAR + 1.0))
    for dequantisation in DEQUANTISATIONS:
        one, ten = (
            Estimate.of(flow_bound(diffusion, x0, dequantisation, samples=k, steps=32, batch_size=9999).log_prob)
            for k in (1, 10)
        )
        # of independent noise; where one sample is nearly exact, ten are no better
        assert_estimate(one.mean, math.hypot(one.se_examples, ten.se_examples), (-math.inf, ten.mean), detects=1.0)
        if dequantisation != "decoder":
            truth = (smoothed.cdf(x0[0] + 0.125) - smoothed.cdf(x0[0] - 0.125)).log().item()
            for found in (one, ten):
                assert_estimate(found.mean, found.se_examples, (-math.inf, truth), detects=1.0)
    twins = flow_bound(diffusion, x0, repeats=2, steps=4, seed=0).log_prob
    assert len(twins.unique()) == 128  # neither examples nor repeats share noise
    bits = BitsPerDim.of(-flow_bound(diffusion, x0, repeats=2, steps=4).log_prob / math.log(2))
    assert bits.mean > 0 and bits.se_noise > 0


def test_bounds_by_probes_are_unbiased_for_one_sample():
    """In one dimension v J v is exact, and so nothing changes; with importance weights it is refused."""
    diffusion, x0 = discrete(LogLinearSchedule(7, -24.0, 3.0)), torch.tensor([[0.25], [0.5]], dtype=torch.float64)
    exact = flow_bound(diffusion, x0, repeats=2, seed=0, steps=8)
    probed = flow_bound(diffusion, x0, repeats=2, seed=0, steps=8, probes=2)
    torch.testing.assert_close(probed.log_prob, exact.log_prob, rtol=0, atol=1e-11)
    assert probed.network_evaluations == exact.network_evaluations == 4 * (8 * 4 + 1)
    assert probed.vector_jacobian_products == 2 * exact.vector_jacobian_products
    with pytest.raises(OptionError, match="would be no bound"):
        flow_bound(diffusion, x0, samples=2, probes=2)


# ---------------------------------------------------------------------- the gap


class Pushed(GaussianDenoiser):
    """Exact for N(0, 1), plus c sigma^2 / alpha: an error of one sign, which shifts the flow by c / 2 times the integral of sigma^2."""

    def __init__(self, c):
        super().__init__("v", mean=0.0, var=1.0)
        self.c = c

    def posterior_mean(self, x, alpha, var):
        return super().posterior_mean(x, alpha, var) + self.c * var / alpha


@pytest.mark.monte_carlo
@pytest.mark.parametrize(("lowest", "sign"), [(-2.0, 1), (-12.0, -1)])
def test_signed_gap(lowest, sign):
    """With S the integral of sigma^2 over log-SNR the chain loses c^2 S / 2 as T grows, the flow (c S / 2)^2 / 2: less for S < 4."""
    c, highest, steps = 0.5, 4.0, 100
    S = math.log1p(math.exp(-lowest)) - math.log1p(math.exp(-highest))
    schedule = LogLinearSchedule(steps, lowest, highest)
    diffusion = GaussianDiffusion(Pushed(c), schedule, (1,), prediction="v")

    # the flow's expected loss, by quadrature over x_1 ~ N(0, 1)
    nodes, weights = hermite(3)
    x_1 = torch.from_numpy(nodes)[:, None]
    log_p = log_density(diffusion, x_1 / schedule.alpha(1), **TIGHT).log_prob[0] - schedule.alpha(1).log()
    loss = -(torch.from_numpy(weights) * log_p).sum().item() - 0.5 * math.log(2 * math.pi * math.e)
    assert abs(loss - (c * S / 2) ** 2 / 2) < 1e-6

    ddpm = DDPM(schedule.betas.numpy())
    chain = LinearModel(ddpm, ddpm.variances("fixed_small"), ddpm.decoder_variance("vdm"), mean=0.0, var=1.0)
    exact = chain.data_average(chain.nelbo)
    chain.B = c * ddpm.om / np.sqrt(ddpm.ab)
    reconstruction = chain.data_average(chain.reconstruction)
    nelbo = chain.data_average(chain.nelbo)
    # finite T: the steps' mean, in units of the variance, is off by slightly more than the integrals say
    assert abs(nelbo - exact - c**2 * S / 2 - (reconstruction_error := c**2 * ddpm.om[0] / 2)) < 0.2 * c**2 * S / 2
    assert reconstruction_error < 0.003
    entropy_1 = 0.5 * math.log(2 * math.pi * math.e * ddpm.om[0])
    flow = -0.5 * math.log(2 * math.pi * math.e) - (c * S / 2) ** 2 / 2 - reconstruction + entropy_1
    expected = flow + nelbo
    assert sign * expected > 0.05

    x0 = torch.randn(3000, 1, dtype=torch.float64)
    found = flow_bound(diffusion, x0, repeats=2, steps=32, batch_size=6000)
    terms = elbo_terms(diffusion, x0, repeats=2, batch_size=3000)
    gap = Estimate.of(signed_gap(found, terms))
    assert_estimate(gap.mean, gap.se_examples, expected, detects=2 * abs(expected))
    with pytest.raises(ShapeError, match=r"\[2, 3000\].*\[1, 3000\]"):
        signed_gap(found, elbo_terms(diffusion, x0, t=1))


# ---------------------------------------------------------------------- refusals


class PerElement(Schedule):
    event_dim, steps = 1, 3

    def log_snr(self, t):
        return (4.0 - 2.0 * torch.as_tensor(t).double())[..., None] + torch.tensor([0.0, 1.0], dtype=torch.float64)


def test_refusals(monkeypatch):
    schedule, x = LogLinearSchedule(7, -6.0, 4.0), points()
    diffusion = mixture(schedule)
    for options, message in (
        ({"solver": "euler"}, "'heun', 'rk4', 'dopri5'"),
        ({"tolerance": 1e-5}, "rk4 has no tolerance"),
        ({"solver": "heun", "steps": 0}, "at least 1 step"),
        ({"solver": "dopri5", "steps": 5}, "dopri5 has no steps"),
        ({"solver": "dopri5", "tolerance": 0.0}, "above 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"probes": 0}, "probes=0"),
    ):
        with pytest.raises(OptionError, match=message):
            log_density(diffusion, x, **options)
    with pytest.raises(ShapeError, match="probes have shape"):
        log_density(diffusion, x, probes=torch.ones(2))
    for function, wrong in itertools.product((log_density, encode, decode, flow_bound), (x[0], x[:0], x[..., :1])):
        with pytest.raises(ShapeError, match=r"not \[(B|\*batch)"):
            function(diffusion, wrong)
    with pytest.raises(OptionError, match="previous"):
        log_density(GaussianDiffusion(mlp(2), schedule, (2,), prediction="previous"), x)
    with pytest.raises(OptionError, match="schedule per element"):
        encode(GaussianDiffusion(mlp(2), PerElement(), (2,)), x)
    for options, message in (
        ({"dequantisation": "logit"}, "'uniform', 'truncated_normal', 'decoder'"),
        ({"dequantisation": "uniform"}, "bins=None"),
        ({"samples": 0}, "samples=0"),
        ({"repeats": 0}, "repeats=0"),
    ):
        with pytest.raises(OptionError, match=message):
            flow_bound(diffusion, x, **options)
    with pytest.raises(DataError, match="off the grid"):
        flow_bound(discrete(schedule), torch.tensor([[0.3]], dtype=torch.float64))
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(OptionError, match=r"pyrodiff\[ode\]"):
        log_density(diffusion, x, solver="dopri5")


def test_denoising_between_the_steps():
    """At the steps it is ``denoise``, bit for bit; between them it is what the network says there."""
    schedule = LogLinearSchedule(5, -6.0, 4.0)
    x = points(5)
    for clip in (False, True):
        kernel = GaussianDiffusion(mlp(2), schedule, (2,), prediction="v", clip=clip).reverse_kernel
        t = torch.arange(1, 6)
        assert torch.equal(kernel.denoise_at(x, schedule.log_snr(t)), kernel.denoise(x, t))
    exact = mixture(schedule).reverse_kernel
    log_snr = torch.tensor(0.123, dtype=torch.float64)
    alpha, var = log_snr.sigmoid().sqrt().expand(5, 1), (-log_snr).sigmoid().expand(5, 1)
    torch.testing.assert_close(
        exact.denoise_at(x, log_snr), exact.net.posterior_mean(x, alpha, var), rtol=0, atol=1e-12
    )
