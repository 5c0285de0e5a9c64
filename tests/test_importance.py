"""Importance-weighted bounds against quadrature, enumeration, stock Pyro and ArviZ."""

import itertools
import math

import numpy as np
import pytest
import torch
from monte_carlo import any_seed, assert_estimate
from oracles import DDPM, GaussianDenoiser, LinearModel, linear_betas

import pyrodiff
from pyrodiff.elbo import Estimate
from pyrodiff.errors import OptionError
from pyrodiff.likelihood.importance import (
    curve,
    effective_chains,
    importance_weighted,
    log_weights,
    pareto_k,
    renyi_bound,
)

F64 = torch.float64
X0 = 0.7
GAIN, BIAS = 0.15, -0.1  # a denoiser that is not the exact one: nothing cancels by luck


def make(steps, variance="fixed_small", dims=1, **error):
    """A linear denoiser of Gaussian data, as a program and in closed form."""
    betas, error = linear_betas(steps), {"gain": GAIN, "bias": BIAS} | error
    ddpm = DDPM(betas)
    net = GaussianDenoiser("x0", betas, **error)
    diffusion = pyrodiff.GaussianDiffusion(
        net, pyrodiff.TableSchedule(torch.tensor(betas)), (dims,), prediction="x0", variance=variance
    )
    return diffusion, LinearModel(ddpm, ddpm.variances(variance), ddpm.decoder_variance("vdm"), **error)


def trapezoid(dims, step, reach=12.0):
    """Nodes ``[n, dims]`` of the noise and their weights: converges like exp(-1 / step^2) for what decays in the weighted tail.

    (Hermite nodes do not reach where p / q grows.)
    """
    x = np.arange(-reach, reach + step / 2, step)
    w = step * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    points = np.stack([z.ravel() for z in np.meshgrid(*[x] * dims, indexing="ij")], -1)
    weights = np.prod(np.stack([z.ravel() for z in np.meshgrid(*[w] * dims, indexing="ij")], -1), -1)
    return torch.tensor(points), torch.tensor(weights)


def tape(nodes):
    """Noise that is given: one column of nodes per call."""
    left = iter(nodes.T)
    return lambda like: next(left).reshape(like.shape).to(like)


def on_nodes(diffusion, nodes, x0=X0):
    """Log-weights of one example's chains, one for each row of nodes."""
    found = log_weights(diffusion, torch.full((1, 1), x0, dtype=F64), len(nodes), tape(nodes), len(nodes))
    return found[:, 0]


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_mean_weight_is_the_evidence(steps, variance):
    diffusion, closed = make(steps, variance)
    nodes, weights = trapezoid(steps, 0.05 if steps == 1 else 0.15)
    for x0 in (X0, -1.5):
        mean = float((on_nodes(diffusion, nodes, x0).exp() * weights).sum())
        assert mean == pytest.approx(math.exp(float(closed.log_density(np.array(x0)))), rel=1e-9)


def test_weights_are_constant_where_the_reverse_kernel_is_exact():
    """For data N(0, 1) every state is N(0, 1): the prior, the kernels and the decoder can all be exact, and w = p(x_0)."""
    betas = linear_betas(6)
    ddpm = DDPM(betas)
    exact = LinearModel(ddpm, np.ones(6), 1.0, mean=0.0, var=1.0).exact_variance
    net = GaussianDenoiser("x0", betas, np.log(exact), mean=0.0, var=1.0)
    schedule = pyrodiff.TableSchedule(torch.tensor(betas))
    diffusion = pyrodiff.GaussianDiffusion(net, schedule, (2,), "x0", variance="learned", decoder="openai")
    x0 = torch.tensor([[0.3, -1.0], [2.5, 0.1]], dtype=F64)
    found = importance_weighted(diffusion, x0, chains=32, repeats=2)
    expected = (-0.5 * x0.square() - 0.5 * math.log(2 * math.pi)).sum(-1)
    # 7 differences of log-densities of order 1 to 10, in float64
    torch.testing.assert_close(found.diagnostics["log_weights"], expected.expand(2, 32, 2), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.log_prob, expected)
    torch.testing.assert_close(found.diagnostics["effective_chains"], torch.full((2,), 32.0, dtype=F64))
    assert (found.diagnostics["pareto_k"] == -math.inf).all() and found.warnings == ()


def test_rows_are_chains_of_their_own_example():
    """Without noise every chain of an example is the same; whatever the batches."""
    diffusion, _ = make(5)
    x0 = torch.tensor([[0.1], [0.7], [-2.0]], dtype=F64)
    found = log_weights(diffusion, x0, 4, torch.zeros_like, batch_size=5)
    alone = torch.cat([log_weights(diffusion, x, 1, torch.zeros_like) for x in x0.split(1)], 1)
    torch.testing.assert_close(found, alone.expand(4, 3), rtol=1e-12, atol=1e-12)
    assert (alone.diff() != 0).all()


# ---------------------------------------------------------------------- bounds


def test_bounds_rise_with_the_chains_and_stay_below_the_evidence():
    """The expectation over every combination of nodes: the ELBO at K = 1, IWAE at alpha = 0, Renyi's between them."""
    diffusion, closed = make(1)
    nodes, weights = trapezoid(1, 0.3, reach=8.0)  # 54 nodes; 157,464 triples
    log_w = on_nodes(diffusion, nodes, x0=1.8)
    elbo, evidence = -float(closed.nelbo(np.array(1.8))), float(closed.log_density(np.array(1.8)))
    means = {}
    for alpha, k in itertools.product((0.0, 0.5, 1.0), (1, 2, 3)):
        index = torch.cartesian_prod(*[torch.arange(len(nodes))] * k).reshape(-1, k)
        bound = renyi_bound(log_w[index], alpha, 1)
        means[alpha, k] = float((bound * weights[index].prod(-1)).sum())
    for alpha in (0.0, 0.5, 1.0):
        assert means[alpha, 1] == pytest.approx(elbo, abs=1e-9)
    assert means[1.0, 2] == pytest.approx(elbo, abs=1e-9) and means[1.0, 3] == pytest.approx(elbo, abs=1e-9)
    for k in (2, 3):
        assert elbo + 0.01 < means[0.5, k] < means[0.0, k] - 0.01 < evidence - 0.02
        for alpha in (0.0, 0.5):
            assert means[alpha, k] > means[alpha, k - 1] + 0.005


def test_renyi_bound_is_continuous_at_one_and_is_a_power_mean():
    log_w = torch.tensor([[0.3, -2.0], [1.1, 0.4], [-0.7, -50.0]], dtype=F64)
    torch.testing.assert_close(renyi_bound(log_w, 1 - 1e-7), renyi_bound(log_w, 1.0), rtol=0, atol=1e-4)
    for alpha in (0.0, 0.25):
        by_hand = (log_w.exp() ** (1 - alpha)).mean(0).log() / (1 - alpha)
        torch.testing.assert_close(renyi_bound(log_w, alpha), by_hand)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_equal_to_pyro(alpha):
    """At one seed, draw for draw: sums of 3 examples in float64."""
    diffusion, _ = make(4, dims=2)
    x0 = torch.tensor([[0.3, -0.2], [1.0, 0.5], [-0.4, 0.1]], dtype=F64)
    pyros = pyrodiff.RenyiELBO(alpha=alpha, num_particles=6, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(0)
    loss = pyros.loss(diffusion.model, diffusion.guide, x0)
    torch.manual_seed(0)
    ours = renyi_bound(log_weights(diffusion, x0, 6, batch_size=18), alpha)
    assert -float(ours.sum()) == pytest.approx(loss, rel=1e-11)


def test_the_curve_rises_in_every_sample():
    torch.manual_seed(0)
    log_w = 5 * torch.randn(3, 12, 4, dtype=F64)
    found = curve(log_w)
    assert {k: tuple(z.shape) for k, z in found.items()} == {1: (36, 4), 3: (12, 4), 6: (6, 4), 12: (3, 4)}
    assert list(found) == [1, 3, 6, 12]
    torch.testing.assert_close(found[12], renyi_bound(log_w, 0.0, 1))
    torch.testing.assert_close(found[1], log_w.flatten(0, 1))
    torch.testing.assert_close(found[3][4:8], renyi_bound(log_w[1].unflatten(0, (4, 3)), 0.0, 1))
    means = torch.stack([z.mean(0) for z in found.values()])
    assert (means.diff(dim=0) > 0).all()
    assert list(curve(log_w[:, :1])) == [1] and list(curve(log_w[:, :7])) == [1, 7]
    assert (torch.stack([z.mean(0) for z in curve(log_w, 0.5).values()]) <= means).all()


@pytest.mark.monte_carlo
def test_the_bound_is_in_its_place_and_its_errors_are_those_of_the_repeats():
    diffusion, closed = make(8)
    x0 = torch.tensor([[X0], [-0.3]], dtype=F64)
    found = importance_weighted(diffusion, x0, chains=64, repeats=50, seed=any_seed(), batch_size=10**4)
    elbo, evidence = -closed.nelbo(x0[:, 0].numpy()).mean(), closed.log_density(x0[:, 0].numpy()).mean()
    assert_estimate(-found.nats.mean, found.nats.se_noise, (elbo + 0.2, evidence), detects=0.5)
    assert found.nats == Estimate.of(-found.draws) and found.draws.shape == (50, 2)
    assert found.network_evaluations == 2 * 50 * 64 * 8
    means = {k: Estimate.of(-z) for k, z in curve(found.diagnostics["log_weights"]).items()}
    assert means[64] == found.nats
    assert_estimate(-means[1].mean, means[1].se_noise, elbo, detects=1.0)
    assert found.unbiased and not importance_weighted(diffusion, x0, chains=4, alpha=0.5).unbiased


# ---------------------------------------------------------------------- have the weights collapsed?


def test_effective_chains():
    log_w = torch.tensor([[0.0, 0.0, 5.0], [0.0, -1000.0, 5.0 + math.log(3)]], dtype=F64)
    torch.testing.assert_close(effective_chains(log_w), torch.tensor([2.0, 1.0, 16 / 10], dtype=F64))
    assert effective_chains(log_w.expand(7, 2, 3)).shape == (7, 3)


@pytest.mark.parametrize("count", [25, 64, 333, 1000])
def test_pareto_k_is_that_of_arviz(count):
    az = pytest.importorskip("arviz")
    torch.manual_seed(count)
    log_w = torch.cat([s * torch.randn(count, 2, dtype=F64) for s in (0.3, 2.0, 30.0)], 1)
    log_w[:, 5] += 10**4  # no overflow
    peer = [az.stats.psislw(column.numpy())[1] for column in log_w.T]
    # ArviZ leaves out grid points of weight below 2e-15.
    np.testing.assert_allclose(pareto_k(log_w).numpy(), np.array(peer, dtype=float), rtol=1e-9)


def test_pareto_k_of_a_known_tail():
    """Evenly spread quantiles of Pareto laws; the fit leaves the prior's 0.5 x 10 / 959 and the tail's last quantile."""
    u = (torch.arange(10**5, dtype=F64) + 0.5) / 10**5
    truth = torch.tensor([0.1, 0.5, 0.7, 1.5], dtype=F64)
    torch.testing.assert_close(pareto_k(-truth * torch.log1p(-u)[:, None]), truth, atol=0.03, rtol=0)
    assert pareto_k(torch.zeros(24, 3)).isnan().all()
    assert (pareto_k(torch.zeros(25, 3)) == -math.inf).all()
    equal = 4e-6 * torch.rand(100, 50, dtype=F64).round()  # but for float32's rounding
    assert (pareto_k(equal) == -math.inf).all()


def test_collapse_is_said_in_plain_words():
    torch.manual_seed(0)
    poor, _ = make(10, dims=16, gain=0.6)
    x0 = 0.3 + 0.5 * torch.randn(6, 16, dtype=F64)
    found = importance_weighted(poor, x0, chains=40)
    assert len(found.warnings) == 1 and "weights have collapsed for 6 of 6 examples" in found.warnings[0]
    assert "the standard error understates" in str(found)
    few = importance_weighted(poor, x0, chains=8)
    assert [w.split(":")[0].split(" (")[0] for w in few.warnings] == [
        "weights have collapsed for 6 of 6 examples",
        "Pareto's k-hat takes 25 weights per example",
    ]
    assert importance_weighted(poor, x0, chains=1).warnings == ()  # one chain has no weights to compare
    good, _ = make(1000, gain=0.0, bias=0.0)
    assert importance_weighted(good, x0[:, :1], chains=100, batch_size=10**4).warnings == ()


@pytest.mark.parametrize("options", [{"chains": 0}, {"alpha": -0.1}, {"alpha": 1.1}, {"alpha": math.nan}])
def test_options_outside_their_range(options):
    with pytest.raises(OptionError, match=f"{next(iter(options))}="):
        importance_weighted(make(3)[0], torch.zeros(2, 1), **options)
