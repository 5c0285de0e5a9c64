"""benchmarks/posterior.py: what its figures rest on, by formulas it does not use."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from monte_carlo import assert_mean
from scipy import stats
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("posterior", ROOT / "benchmarks" / "posterior.py")
posterior = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(posterior)


def mixture(weights: torch.Tensor, means: torch.Tensor, covariance: torch.Tensor) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariance))


def test_the_denoiser_is_tweedies_formula():
    """x0_hat = (x + sigma^2 grad log p_t(x)) / alpha; float64, so 1e-9 is rounding."""
    net = posterior.Mixture(4).double()
    for log_snr in (-6.0, 0.0, 6.0):
        ab = torch.tensor(log_snr).double().sigmoid()
        x = (10 * ab.sqrt() * torch.randn(20, 4).double()).requires_grad_()
        law = mixture(torch.full((25,), 1 / 25.0).double(), ab.sqrt() * net.means, torch.eye(4).double())
        (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
        expected = (x + (1 - ab) * score) / ab.sqrt()
        torch.testing.assert_close(net(x, torch.full((20,), log_snr).double()), expected, rtol=1e-9, atol=1e-9)


def test_a_backward_pass_is_counted():
    net = posterior.Mixture(2)
    x = torch.randn(7, 2, requires_grad=True)
    torch.autograd.grad(net(x, torch.zeros(7)).sum(), x)
    net(x.detach(), torch.zeros(7))
    assert (net.calls, net.backward_calls) == (14, 7)


@pytest.mark.parametrize("cell", [(0.01, 8, 4), (0.1, 8, 1), (1.0, 20, 2)], ids=str)
def test_the_exact_posterior_obeys_bayes(cell):
    """log p(x) + log p(y | x) - log p(x | y) is log p(y) at every x; and the moments are those of Kalman's gain."""
    noise, d, d_y = cell
    net = posterior.Mixture(d)
    given = posterior.problem(net, *cell)
    m, eye = net.means.double(), torch.eye(d).double()
    a, y = given.seen.operator(eye).T, given.seen.y
    singular = torch.linalg.svdvals(a)
    assert 0 < singular.min() and singular.max() < 1

    gain = torch.linalg.solve(a @ a.T + noise**2 * torch.eye(d_y).double(), a).T
    torch.testing.assert_close(given.means, m + (y - m @ a.T) @ gain.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(given.root @ given.root.T, eye - gain @ a, rtol=1e-9, atol=1e-9)

    x = given.draw(50)  # where x is likely given y, no term is so large that its rounding shows
    prior = mixture(torch.full((25,), 1 / 25.0).double(), m, eye)
    seen = MultivariateNormal(x @ a.T, noise**2 * torch.eye(d_y).double())
    evidence = prior.log_prob(x) + seen.log_prob(y) - mixture(given.weights, given.means, eye - gain @ a).log_prob(x)
    torch.testing.assert_close(evidence, torch.full((50,), given.log_z).double(), rtol=0, atol=1e-6)


@pytest.mark.monte_carlo
def test_exact_samples_have_the_exact_moments():
    given = posterior.problem(posterior.Mixture(2), 1.0, 2, 1)
    x = given.draw(200_000)
    centre = given.weights @ given.means
    spread = given.root @ given.root.T + (given.means - centre).T @ torch.diag(given.weights) @ (given.means - centre)
    products = (x - centre)[:, :, None] * (x - centre)[:, None]
    for values, expected in ((x, centre), (products, spread)):
        assert_mean(values, expected, detects=0.05 * values.std(0))


def test_the_distance_is_scipys():
    x, y, slices = torch.randn(60, 5), 2 * torch.randn(60, 5) + 1, posterior.directions(5)
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(100).double())
    pairs = zip((x.double() @ slices).T, (y.double() @ slices).T, strict=True)
    expected = sum(stats.wasserstein_distance(a.numpy(), b.numpy()) for a, b in pairs) / 100
    assert posterior.distance(x, y, slices) == pytest.approx(expected, rel=1e-12)


@pytest.mark.monte_carlo
def test_the_floor_of_normal_samples():
    """F_n - G_n is N(0, 2 F (1 - F) / n), whose absolute value is integrated over the line."""
    n, repeats = 1000, 100
    grid = torch.linspace(-8, 8, 4001).double()
    cdf = torch.special.ndtr(grid)
    expected = float(torch.trapezoid((4 * cdf * (1 - cdf) / (math.pi * n)).sqrt(), grid))
    one = torch.ones(1, 1).double()
    found = torch.tensor([posterior.distance(torch.randn(n, 1), torch.randn(n, 1), one) for _ in range(repeats)])
    assert_mean(found, expected, detects=0.6 * expected)


@pytest.mark.parametrize("steps", [1, 2, 20, 250, 1000])
def test_kept_steps(steps):
    kept = posterior.quadratic(steps)
    assert len(kept) == steps and kept == sorted(set(kept)) and kept[0] == 1
    assert kept[-1] == (1000 if steps > 1 else 1)


def test_rows_are_kept_and_not_made_twice(tmp_path, capsys):
    chosen = argparse.Namespace(
        particles=30, steps=4, variance="fixed_large", threshold=0.8, methods=("bootstrap", "DPS"), azula=False
    )
    path = tmp_path / "found.csv"
    for seed in range(2):
        posterior.write(path, list(posterior.solve(0.1, 8, 1, seed, chosen, set())))
    rows = posterior.read(path)
    assert [row["method"] for row in rows] == ["bootstrap", "DPS"] * 2
    assert [int(row["evaluations"]) for row in rows] == [120] * 4
    assert [int(row["backward"]) for row in rows] == [0, 120] * 2
    assert rows[0]["floor"] == rows[1]["floor"] and rows[0]["log_z_error"] and not rows[1]["log_z_error"]

    done = {tuple(row[key] for key in posterior.COLUMNS[:7]) for row in rows}
    assert not list(posterior.solve(0.1, 8, 1, 0, chosen, done))
    posterior.table(path)
    mean = sum(float(row["distance"]) for row in rows[::2]) / 2
    assert f"{mean:.2f} ±" in capsys.readouterr().out


def test_the_page_says_what_the_file_says(capsys):
    posterior.table(ROOT / "benchmarks" / "results" / "posterior.csv")
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "posterior_benchmark.md").read_text()
