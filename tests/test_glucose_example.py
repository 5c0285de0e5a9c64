"""The glucose example: its scores against closed forms, its splits, its parts."""

import importlib
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monte_carlo import any_seed, assert_mean, assert_proportion
from scipy.special import ndtr, ndtri

from pyrodiff.inference.smc import smc

DAY = 96


@pytest.fixture
def glucose():
    return importlib.import_module("glucose")


def gaussian_crps(mean, std, y):
    """Gneiting and Raftery (2007), after eq. 21."""
    z = (y - mean) / std
    return std * (z * (2 * ndtr(z) - 1) + 2 * np.exp(-z * z / 2) / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi))


TRUTH = np.array([3.0, 4.5, -2.0])


def test_crps_of_a_gaussian(glucose):
    draws = 3 + 2 * ndtri((np.arange(20_000) + 0.5) / 20_000)[:, None].repeat(3, 1)
    found = glucose.crps(draws, np.ones(20_000), TRUTH)
    np.testing.assert_allclose(found, gaussian_crps(3, 2, TRUTH), rtol=1e-3)  # quantiles: an error of order 1 / M


def test_crps_of_weighted_draws(glucose):
    """Draws of N(0, 3^2), by their importance weights those of N(1, 1)."""
    draws = 3 * ndtri((np.random.default_rng(0).permutation(50_000) + 0.5) / 50_000)[:, None].repeat(3, 1)
    weights = np.exp(-((draws[:, 0] - 1) ** 2) / 2 + (draws[:, 0] / 3) ** 2 / 2)
    np.testing.assert_allclose(glucose.crps(draws, weights, TRUTH), gaussian_crps(1, 1, TRUTH), rtol=2e-3)


@pytest.mark.monte_carlo
def test_crps_of_few_draws_is_unbiased(glucose):
    """With 3 draws the pairs of a draw with itself, left in, would add 0.19."""
    draws = 3 + np.random.standard_normal((3, 40_000))
    found = glucose.crps(draws, np.array([2.0, 2.0, 2.0]), np.full(40_000, 3.7))
    assert_mean(found, gaussian_crps(3, 1, 3.7), detects=0.19)


@pytest.mark.monte_carlo
def test_quantiles_and_the_coverage_of_a_right_posterior(glucose):
    draws, truth = np.random.standard_normal((1000, 2000)), np.random.standard_normal(2000)
    low, high = glucose.quantiles(draws, np.ones(1000), (0.05, 0.95))
    assert_mean(-low, (1.64, 1.65), detects=0.05)  # quantiles of a thousand draws are off by a few thousandths
    assert_mean(high, (1.64, 1.65), detects=0.05)
    # given their draws; of intervals off by a thousandth
    assert_proportion(((low <= truth) & (truth <= high)).sum(), 2000, (0.897, 0.901), detects=0.1)
    tilted = [
        glucose.quantiles(x[:, None], np.exp(x), (0.5,))[0, 0] for x in draws.T[:100]
    ]  # by these weights: N(1, 1)
    assert_mean(np.array(tilted), (0.98, 1.0), detects=0.3)


def test_windows_have_no_long_holes_and_do_not_overlap(glucose):
    values = np.zeros(400)
    values[[10, 11, 150, 151, 152]] = np.nan
    found = glucose.starts(values, 5, 390, longest=2)
    assert found == [*range(5, 150 - DAY + 1), *range(153, 390 - DAY + 1)]
    assert glucose.disjoint(found) == [5, 153, 249]


def test_units_come_from_the_training_part_alone(glucose):
    values, clock = glucose.made_up()
    later = values.copy()
    later[800:] += 5
    one, other = (glucose.Series.of(v, clock, 800) for v in (values, later))
    assert one.scale == other.scale and np.array_equal(one.coefficients, other.coefficients)
    np.testing.assert_allclose(np.log(one.mg_dl(one.values[500 : 500 + DAY], 500)), values[500 : 500 + DAY])


def process_and_task(glucose):
    hours = glucose.HOURS[:, 0]
    covariance = torch.from_numpy(np.exp(-np.abs(hours[:, None] - hours) / 4) + 0.01 * np.eye(DAY))
    process = glucose.Process(covariance, glucose.LogNormal(math.log(0.3), 0.5))
    x = np.random.default_rng(0).multivariate_normal(np.zeros(DAY), covariance.numpy())
    series = glucose.Series(x, np.arange(DAY), np.zeros(7), 0.33)
    return process, glucose.make_task(series, 0, np.random.default_rng(0))


def conditional(covariance, task, sigma):
    """Of a Gaussian x given y: mean, standard deviation and log p(y)."""
    seen = torch.from_numpy(task.seen)
    y = torch.from_numpy(task.y)[seen]
    total = covariance[seen][:, seen] + sigma**2 * torch.eye(len(y), dtype=y.dtype)
    gain = covariance[:, seen] @ torch.linalg.inv(total)
    log_z = torch.distributions.MultivariateNormal(torch.zeros_like(y), total).log_prob(y)
    return gain @ y, (covariance - gain @ covariance[seen]).diagonal().sqrt(), float(log_z)


@pytest.mark.monte_carlo
def test_the_gaussian_process(glucose):
    process, task = process_and_task(glucose)
    mean, std, _ = conditional(process.covariance, task, 0.4)
    found, tril = process.given(task, 0.4)
    torch.testing.assert_close(found, mean)
    torch.testing.assert_close((tril @ tril.T).diagonal().sqrt(), std, rtol=1e-5, atol=0)
    log_sigma, weights = process.on_grid(task)
    joint = [conditional(process.covariance, task, float(z.exp()))[2] for z in log_sigma]
    prior = torch.distributions.Normal(math.log(0.3), 0.5).log_prob(log_sigma)
    torch.testing.assert_close(weights, (torch.tensor(joint, dtype=torch.float64) + prior).softmax(0))
    draws = process.draws(task, 4000, np.random.default_rng(any_seed()))
    centre, spread = process.sigma(task)
    assert_mean(np.log(draws.sigma), centre, detects=0.3 * float(spread))
    expected = sum(
        w * conditional(process.covariance, task, float(z.exp()))[0] for z, w in zip(log_sigma, weights, strict=True)
    )
    assert_mean(draws.x, expected, detects=0.2)


def test_gaps_are_apart_and_hidden(glucose):
    series = glucose.Series(np.random.default_rng(0).standard_normal(DAY), np.arange(DAY), np.zeros(7), 0.33)
    for seed in range(20):
        task = glucose.make_task(series, 0, np.random.default_rng(seed))
        assert sorted(end - begin for begin, end in task.gaps) == [4, 8, 16]
        edges = [0, *sorted(edge for gap in task.gaps for edge in gap), DAY]
        assert min(np.diff(edges)[::2]) >= 4  # what is told between gaps, and before and after
        assert not any(task.seen[begin:end].any() for begin, end in task.gaps) and task.seen.sum() == DAY - 28


def chain_variance(values, schedule):
    """Of x_0 in directions where the data's is ``values``, for the chain of the exact denoiser: DDPM's eq. 7, step by step."""
    log_snr = [float(schedule.log_snr(t)) for t in range(schedule.steps + 1)]
    alpha2 = [1 / (1 + math.exp(-z)) for z in log_snr]
    found = torch.ones_like(values)
    for t in range(schedule.steps, 0, -1):
        shrink = math.sqrt(alpha2[t]) * values / (alpha2[t] * values + 1 - alpha2[t])
        if t == 1:
            return shrink**2 * found + (1 - alpha2[1]) / alpha2[1]
        c = 1 - math.exp(log_snr[t] - log_snr[t - 1])
        a, b = (
            math.sqrt(alpha2[t - 1]) * c,
            math.sqrt(alpha2[t] / alpha2[t - 1]) * (1 - alpha2[t - 1]) / (1 - alpha2[t]),
        )
        found = (a * shrink + b) ** 2 * found + (1 - alpha2[t - 1]) * c


@pytest.mark.slow
@pytest.mark.monte_carlo
def test_a_fresh_network_is_the_gaussian_process(glucose):
    """Its chain is Gaussian, and the particles' posterior and evidence those of that Gaussian."""
    process, task = process_and_task(glucose)
    sigma, chain = 0.3, glucose.make_diffusion(process.covariance, width=8).respace(100)
    twist = glucose.gaussian_twist(process, task, sigma)
    repeats = 12
    found = smc(
        chain,
        glucose.observation(glucose.sensor, task, sigma),
        50,
        twist=twist,
        clock=0.0,
        repeats=repeats,
        batch_size=10**4,
    )
    values, vectors = torch.linalg.eigh(process.covariance)
    mean, std, log_z = conditional(vectors * chain_variance(values, chain.schedule) @ vectors.T, task, sigma)
    assert_mean((found.log_evidence - log_z).exp(), 1.0, detects=8.0, misses=1e-2)
    # Z-hat times a repeat's weighted mean, and in the mean over directions its square; far fewer directions than 96 are free
    off = (found.particles - mean) / std
    weights = (found.log_weights - log_z).exp()[..., None]
    assert_mean((weights * off).mean((1, 2)), 0.0, detects=5.0, misses=1e-2)
    assert_mean((weights * (off**2 - 1)).mean((1, 2)), 0.0, detects=8.0, misses=1e-2)


def test_sigma_by_quadrature(glucose, monkeypatch):
    """With the exact evidence in the place of smc's: the Gaussian process's own posterior of sigma."""
    process, task = process_and_task(glucose)

    def exact(diffusion, likelihood, particles, *, twist, seed, clock):
        sigma = likelihood(torch.zeros(1, DAY))  # log p(y | x = 0), which tells sigma
        y = torch.from_numpy(task.y[task.seen]).float()
        candidates = process.on_grid(task, 4000)[0].exp().float()
        at_zero = torch.distributions.Normal(0.0, candidates[:, None]).log_prob(y).sum(1)
        near = [i for i in range(4000) if candidates[i] < y.square().mean().sqrt()]  # there it rises with sigma
        found = float(candidates[min(near, key=lambda i: abs(float(at_zero[i] - sigma)))])
        log_z = torch.full((1, particles), conditional(process.covariance, task, found)[2], dtype=torch.float64)
        return SimpleNamespace(
            log_weights=log_z, particles=torch.zeros(1, particles, DAY), families=torch.tensor([4.0])
        )

    monkeypatch.setattr(glucose, "smc", exact)
    draws, _ = glucose.by_smc(None, process, task, 0.0, particles=2, nodes=9, seed=0)
    centre, spread = process.sigma(task)
    w, log_sigma = draws.weights / draws.weights.sum(), np.log(draws.sigma)
    mean = w @ log_sigma
    assert mean == pytest.approx(float(centre), abs=0.02 * float(spread))
    assert math.sqrt(w @ (log_sigma - mean) ** 2) == pytest.approx(float(spread), rel=0.02)
    assert draws.families == pytest.approx(4 / np.square(w.reshape(9, 2).sum(1)).sum())


def test_a_missing_package_is_named(glucose, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh_sampledata", None)
    monkeypatch.setitem(sys.modules, "bokeh_sampledata.glucose", None)
    with pytest.raises(SystemExit, match="pip install bokeh-sampledata"):
        glucose.readings()
