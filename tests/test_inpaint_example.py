"""The example of missing pixels: its twist and its scores in closed form; and it runs."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from monte_carlo import any_seed, assert_estimate, assert_mean, assert_moments
from oracles import DDPM, GaussianDenoiser, LinearModel, hermite, linear_betas
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from pyrodiff import GaussianDiffusion, TableSchedule
from pyrodiff.inference.operators import LinearGaussian, mask
from pyrodiff.inference.smc import smc

F64 = torch.float64
MEAN, VAR = 0.3, 0.25


@pytest.fixture
def example():
    return importlib.import_module("inpaint_digits")


def gaussian(steps: int = 6, dims: int = 3) -> GaussianDiffusion:
    """The exact denoiser of data N(0.3, 0.25) in each dim."""
    betas = linear_betas(steps)
    net = GaussianDenoiser("x0", mean=MEAN, var=VAR)
    net.unused = nn.Parameter(torch.zeros((), dtype=F64))  # says that particles are float64
    return GaussianDiffusion(net, TableSchedule(torch.tensor(betas)), (dims,), prediction="x0", variance="fixed_large")


def exact_errors(diffusion: GaussianDiffusion) -> torch.Tensor:
    log_snr = diffusion.schedule.log_snr(torch.arange(1, diffusion.steps + 1)).double()
    return (1 / (1 / VAR + log_snr.exp()))[:, None, None] * torch.eye(3, dtype=F64)


def test_the_denoisers_errors_are_the_posterior_variance(example):
    diffusion = gaussian()
    x0 = MEAN + math.sqrt(VAR) * torch.randn(20_000, 3, dtype=F64)
    found, exact = example.denoising_errors(diffusion, x0), exact_errors(diffusion)
    # a mean of 20,000 squares (products) of Normals: relative standard deviation sqrt(2 / 20,000) = 0.01; 5 of them
    scale = exact.diagonal(dim1=1, dim2=2)[:, :1, None]
    assert ((found - exact).abs() < 0.05 * scale).all()


NOISES = {"normal": [(1.0, 0.4)], "mixture": [(0.7, 0.2), (0.3, 1.1)]}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("t", [1, 4])
def test_the_twist_and_its_gradient_are_exact_for_gaussian_data(example, noise, t):
    """p(y | x_t) by quadrature over x_0 given x_t; its gradient by finite differences of that."""
    diffusion, y, seen = gaussian(), torch.tensor([0.9, -0.4], dtype=F64), torch.tensor([0, 2])
    twist = example.error_twist(diffusion, exact_errors(diffusion), seen, y, noise)
    log_snr = diffusion.schedule.log_snr(torch.tensor(t)).double()
    nodes, weights = (torch.from_numpy(z) for z in hermite(120))
    variance = float(1 / (1 / VAR + log_snr.exp()))

    def denoised(x_t):
        return diffusion.reverse_kernel.predict(x_t, t).x0_hat

    def exact(x_t):
        x0 = denoised(x_t)[:, seen, None] + math.sqrt(variance) * nodes  # [N, K, nodes]
        parts = sum(share * Normal(x0, std).log_prob(y[:, None]).exp() for share, std in noise)
        return (parts @ weights).log().sum(1)

    x_t = torch.randn(5, 3, dtype=F64).requires_grad_()
    value = twist(x_t, denoised(x_t), log_snr)
    (gradient,) = torch.autograd.grad(value.sum(), x_t)
    # 120 nodes: 1e-6 at worst, where the noise is 0.2 and x_0's deviation a half; float32 log-SNR inside the network
    torch.testing.assert_close(value, exact(x_t.detach()), rtol=0, atol=1e-5)
    step = 1e-4 * torch.eye(3, dtype=F64)
    at = x_t.detach()
    slopes = torch.stack([(exact(at + e) - exact(at - e)) / 2e-4 for e in step], 1)
    torch.testing.assert_close(gradient, slopes, rtol=1e-4, atol=1e-4)


@pytest.mark.monte_carlo
def test_the_evidence_by_the_twist_is_that_of_a_gaussian(example):
    diffusion = gaussian()
    betas = linear_betas(6)
    ddpm = DDPM(betas)
    closed = LinearModel(ddpm, ddpm.variances("fixed_large"), ddpm.decoder_variance("vdm"), mean=MEAN, var=VAR)
    mu, V = closed.marginal()
    y, std = torch.tensor([0.9, -0.4], dtype=F64), 0.4
    keep = torch.tensor([True, False, True])
    twist = example.error_twist(diffusion, exact_errors(diffusion), torch.tensor([0, 2]), y, [(1.0, std)])
    found = smc(diffusion, LinearGaussian(mask(keep), y, std), 20, twist=twist, repeats=200).evidence
    exact = float(Normal(mu, math.sqrt(V + std**2)).log_prob(y).sum())
    assert_estimate(*found, exact, df=199, detects=0.2)


class ByLabel(nn.Module):
    """The exact denoiser of data N(means[y], 0.25)."""

    means = torch.tensor([0.3, -1.0, 0.8], dtype=F64)

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, log_snr, y):
        alpha, variance = log_snr.double().sigmoid().sqrt()[:, None], (-log_snr.double()).sigmoid()[:, None]
        m = self.means[y][:, None]
        return m + alpha * VAR / (alpha**2 * VAR + variance) * (x - alpha * m)


@pytest.mark.monte_carlo
def test_classes_in_one_walk_have_the_evidence_of_their_own(example):
    betas = linear_betas(6)
    net, schedule = example.Told(ByLabel()), TableSchedule(torch.tensor(betas))
    diffusion = GaussianDiffusion(net, schedule, (3,), prediction="x0", variance="fixed_large")
    case = example.Case("m", any_seed(), 0, torch.zeros(3), torch.tensor([0, 2]), torch.tensor([0.9, 0.4], dtype=F64))
    found = example.look(diffusion, exact_errors(diffusion), case, [2, 1], 40, 400)
    assert list(found) == [2, 1]
    ddpm = DDPM(betas)
    for label, posterior in found.items():
        mean = float(ByLabel.means[label])
        options = {"mean": mean, "var": VAR}
        closed = LinearModel(ddpm, ddpm.variances("fixed_large"), ddpm.decoder_variance("vdm"), **options)
        mu, V = closed.marginal()
        exact = float(Normal(mu, math.sqrt(V + example.NOISE**2)).log_prob(case.y).sum())
        assert_estimate(*posterior.evidence, exact, df=399, detects=0.7)


@pytest.mark.monte_carlo
def test_gaussians_give_bayes_rule(example):
    case = example.Case("m", any_seed(), 1, torch.zeros(3), torch.tensor([0, 2]), torch.tensor([0.3, -0.2]))
    a = torch.tensor([[1.0, 0.3, 0.2], [0.0, 0.8, 0.1], [0.0, 0.0, 0.6]], dtype=F64)
    laws = [(torch.zeros(3, dtype=F64), a @ a.T), (torch.ones(3, dtype=F64), torch.eye(3, dtype=F64))]
    found = example.by_gaussians(laws, case)
    noise = example.NOISE**2 * torch.eye(2, dtype=F64)
    y, seen = case.y.double(), case.seen
    exact = torch.stack([MultivariateNormal(m[seen], C[seen][:, seen] + noise).log_prob(y) for m, C in laws])
    torch.testing.assert_close(found.probabilities, exact.softmax(0))
    # x_1 given y, by precision: that of N(m, C) plus the noise's at 0 and 2
    means, variances = [], []
    for m, C in laws:
        precision = torch.linalg.inv(C)
        precision[seen, seen] += 1 / example.NOISE**2
        h = torch.linalg.inv(C) @ m
        h[seen] += y / example.NOISE**2
        covariance = torch.linalg.inv(precision)
        means.append((covariance @ h)[1])
        variances.append(covariance[1, 1])
    p, means, variances = found.probabilities, torch.stack(means), torch.stack(variances)
    mean = p @ means
    variance = p @ (variances + (means - mean) ** 2)
    assert_mean(found.atoms[:, 0], mean, detects=math.sqrt(variance))
    alone = example.by_gaussians(laws[:1], case)
    assert alone.probabilities is None
    assert_moments(alone.atoms[:, 0], float(means[0]), float(variances[0]), detects=1.0)


def test_scores_of_known_laws(example):
    """CRPS and energy by their definition over pairs; the coverage of levels, for what falls in and on the edges of levels."""
    truth = torch.tensor([0.5, -0.25, -1.0])
    case = example.Case("m", 0, 2, truth, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    atoms = torch.tensor([[0.5, -0.3, -1.2], [0.25, 0.0, -1.0], [0.75, -0.25, -0.9]], dtype=F64)
    w = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    p = torch.tensor([0.2, 0.1, 0.7], dtype=F64)
    found = example.scores(example.Answer(p, atoms, w), case)
    assert found["right"] == 1 and found["log loss"] == pytest.approx(-math.log(0.7))
    assert found["brier"] == pytest.approx(0.2**2 + 0.1**2 + 0.3**2)
    x, z = atoms.clamp(-1, 1).numpy() * 8, truth.double().numpy() * 8
    pair = w[:, None].numpy() * w[None].numpy()
    crps = (w.numpy() @ np.abs(x - z) - (pair[..., None] * np.abs(x[:, None] - x[None])).sum((0, 1)) / 2).mean()
    energy = w.numpy() @ np.linalg.norm(x - z, axis=1) - (pair * np.linalg.norm(x[:, None] - x[None], axis=2)).sum() / 2
    assert found["crps"] == pytest.approx(crps) and found["energy"] == pytest.approx(energy)
    assert found["rmse"] == pytest.approx(np.sqrt(((w.numpy() @ x - z) ** 2).mean()))
    # pixel 0: below the level is 0.3, up to it 0.8, all inside; 1: 0 and 0.7, -0.3 being 0.4 levels off; 2: 0 and 0.8
    assert found["cover"] == pytest.approx((1 + 0.65 / 0.7 + 0.75 / 0.8) / 3)


def test_the_coverage_is_ninety_per_cent_under_the_true_law(example):
    levels = torch.arange(-8, 9) / 8
    law = torch.rand(17, dtype=F64).softmax(0)
    none = torch.zeros(0)
    found = sum(
        float(law[i])
        * example.scores(
            example.Answer(None, levels[:, None].double(), law),
            example.Case("m", 0, 0, levels[i : i + 1], none.long(), none),
        )["cover"]
        for i in range(17)
    )
    assert found == pytest.approx(0.9)
