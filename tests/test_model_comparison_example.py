"""The example of model comparison: evidence with a Gaussian prior by enumeration, data, scores; and it runs."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from monte_carlo import any_seed, assert_estimate, assert_mean, assert_proportion
from torch.distributions import MultivariateNormal

import pyrodiff
from pyrodiff.inference.observe import observation

F64 = torch.float64


@pytest.fixture
def example():
    return importlib.import_module("model_comparison")


def law(dims: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = torch.randn(dims, dims, dtype=F64)
    return torch.randn(dims, dtype=F64), a @ a.T + 0.1 * torch.eye(dims, dtype=F64), torch.randn(dims, dtype=F64)


def test_one_part_is_a_gaussian(example):
    mean, covariance, y = law()
    exact = MultivariateNormal(mean, covariance + 0.09 * torch.eye(4, dtype=F64)).log_prob(y)
    assert example.gaussian_evidence(mean, covariance, y, [(1.0, 0.3)]) == pytest.approx(float(exact), abs=1e-9)


@pytest.mark.monte_carlo
def test_two_parts_are_a_sum_over_which_is_which(example):
    mean, covariance, y = law()
    noise = [(0.8, 0.2), (0.2, 1.5)]
    exact = 0.0
    for parts in itertools.product(noise, repeat=4):
        variances = torch.tensor([std**2 for _, std in parts], dtype=F64)
        weight = math.prod(share for share, _ in parts)
        exact += weight * float(MultivariateNormal(mean, covariance + variances.diag()).log_prob(y).exp())
    draws = [example.gaussian_evidence(mean, covariance, y, noise, particles=64) for _ in range(60)]
    ratio = torch.tensor(draws).double().exp() / exact
    assert_mean(ratio, 1.0, detects=0.5)


def test_the_noises_have_one_variance_and_are_those_of_the_programs(example):
    x = torch.zeros(3, 1, 2, 2)
    y = torch.tensor([0.3, -1.0, 0.0, 2.0]).view(1, 2, 2)
    for name, noise in example.NOISES.items():
        assert sum(share * std**2 for share, std in noise) == pytest.approx(0.09)
        each = [sum(w * math.exp(-((v / s) ** 2) / 2) / s for w, s in noise) for v in y.flatten().tolist()]
        exact = sum(math.log(p / math.sqrt(2 * math.pi)) for p in each)
        assert observation(example.PROGRAMS[name], y)(x).tolist() == pytest.approx([exact] * 3, rel=1e-5)
        assert example.log_likelihood(name, x[0], y) == pytest.approx(exact, rel=1e-5)


@pytest.mark.monte_carlo
def test_data_are_what_they_are_said_to_be(example):
    data = pyrodiff.load_data("digits")
    off = {"normal": [], "outliers": []}
    for given in example.simulate(data, 200, seed=any_seed()):
        off[given.truth].append((given.y - given.x).flatten())
    for truth, errors in off.items():
        noise = torch.cat(errors).double()
        fourth = sum(share * 3 * std**4 for share, std in example.NOISES[truth])
        # 6400 squares: their mean has the standard deviation sqrt((fourth moment - variance^2) / 6400)
        error = math.sqrt((fourth - 0.0081) / len(noise))
        assert_estimate(noise.square().mean(), error, 0.09, detects=0.05)
        # fourth powers have heavy tails, and differ by a factor of 4: their own test is which law's the noise beyond 3 x 0.3 is
        beyond = sum(share * math.erfc(0.9 / std / math.sqrt(2)) for share, std in example.NOISES[truth])
        assert_proportion((noise.abs() > 0.9).sum(), len(noise), beyond, detects=0.025)


def test_scores(example):
    found = example.score(2.0, "outliers")
    p = 1 / (1 + math.exp(-2.0))
    assert found == pytest.approx({"right": 1, "log loss": -math.log(p), "brier": 2 * (1 - p) ** 2, "log odds": 2.0})
    found = example.score(2.0, "normal")
    assert found == pytest.approx({"right": 0, "log loss": -math.log(1 - p), "brier": 2 * p**2, "log odds": -2.0})
    assert example.score(5000.0, "normal")["log loss"] == 5000.0


def test_the_wiener_filter_is_the_posterior_mean(example):
    mean, covariance, y = law()
    precision = torch.linalg.inv(covariance)
    exact = torch.linalg.solve(precision + torch.eye(4) / example.STD**2, precision @ mean + y / example.STD**2)
    torch.testing.assert_close(example.wiener(mean, covariance, y), exact)
