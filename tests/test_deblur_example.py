"""The deblurring example: what it computes against dense linear algebra."""

from __future__ import annotations

from types import ModuleType

import deblur
import pytest
import torch
from monte_carlo import assert_mean
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyrodiff import GaussianDiffusion, LogLinearSchedule
from pyrodiff.inference.operators import LinearGaussian
from pyrodiff.inference.smc import smc

F64 = torch.float64
SIDE = 4
EYE = torch.eye(SIDE**2, dtype=F64)


@pytest.fixture
def small(monkeypatch):
    """The example, of patches of 4 x 4."""
    monkeypatch.setattr(deblur, "SIDE", SIDE)
    deblur.operator.cache_clear()
    yield deblur
    deblur.operator.cache_clear()


class Linear(nn.Module):
    """The best denoiser of N(mean, covariance), as an estimate of x_0."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.mean, self.covariance = nn.Parameter(mean), covariance

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        ab, om = log_snr[0].sigmoid(), (-log_snr[0]).sigmoid()
        total = ab * self.covariance + om * EYE
        residual = (x.flatten(1) - ab.sqrt() * self.mean).mT
        return (self.mean + ab.sqrt() * (self.covariance @ torch.linalg.solve(total, residual)).mT).view_as(x)


def gaussian(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(SIDE**2, SIDE**2, generator=generator, dtype=F64) / SIDE
    return torch.linspace(-0.3, 0.4, SIDE**2, dtype=F64), root @ root.T / 4 + 0.02 * EYE


def law_of_x0(diffusion: GaussianDiffusion) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0 under the chain, whose every step is affine."""
    size = SIDE**2
    mean, covariance = torch.zeros(size, dtype=F64), torch.eye(size, dtype=F64)
    basis = torch.cat([torch.zeros(1, size, dtype=F64), torch.eye(size, dtype=F64)]).view(-1, 1, SIDE, SIDE)
    with torch.no_grad():
        for t in range(diffusion.steps, 0, -1):
            law = diffusion.reverse_kernel(basis, t)
            offset = law.mean[0].flatten()
            a = (law.mean[1:].flatten(1) - offset).mT
            mean = a @ mean + offset
            covariance = a @ covariance @ a.mT + law.variance[0].flatten().diag()
    return mean, covariance


def observed(module: ModuleType, truth: Tensor) -> tuple[LinearGaussian, Tensor]:
    """Y, and A as a matrix."""
    width, sigma = 1.1, 0.04
    y = module.operator(width)(truth.view(1, 1, SIDE, SIDE))[0]
    observation = module.seen(y + 0.05 * torch.sin(torch.arange(SIDE**2.0, dtype=F64)).view_as(y), width, sigma)
    a = module.operator(width)(EYE.view(-1, 1, SIDE, SIDE)).flatten(1).mT
    return observation, a


def moments_of(module: ModuleType, mean: Tensor, covariance: Tensor):
    precision = torch.linalg.inv(covariance)
    return module.Moments(mean, precision, torch.linalg.eigvalsh(precision))


@pytest.mark.monte_carlo
def test_the_posterior_mean_of_a_gaussian_is_the_wiener_filter(small):
    """Of a Gaussian diffusion by sequential Monte Carlo; the evidence too. The Gaussian is the chain's own law, not the data's."""
    mean, covariance = gaussian(0)
    diffusion = GaussianDiffusion(
        Linear(mean, covariance), LogLinearSchedule(12, -5.0, 7.0), (1, SIDE, SIDE), "x0", "fixed_large"
    )
    mean, covariance = law_of_x0(diffusion)
    observation, a = observed(
        small, mean + torch.linalg.cholesky(covariance) @ torch.cos(torch.arange(SIDE**2.0).double())
    )
    moments = moments_of(small, mean, covariance)
    total = a @ covariance @ a.T + observation.noise_std**2 * EYE
    y = observation.y.flatten()
    exact = mean + covariance @ a.T @ torch.linalg.solve(total, y - a @ mean)
    torch.testing.assert_close(small.wiener(observation, moments).flatten(), exact, rtol=0, atol=1e-9)  # rounding
    repeats = 60
    found = smc(diffusion, observation, 40, twist=small.twist_of(observation, moments), repeats=repeats)
    log_z = MultivariateNormal(a @ mean, total).log_prob(y)
    z = (found.log_evidence - log_z).exp()
    assert_mean(z, 1.0, detects=1.0)
    # Z-hat times a repeat's weighted mean is unbiased for Z times the posterior mean
    error = (found.particles.flatten(2) - exact) * (found.log_weights - log_z).exp()[..., None]
    spread = (covariance - covariance @ a.T @ torch.linalg.solve(total, a @ covariance)).diag().sqrt()
    assert_mean(error.mean(1) / spread, 0.0, detects=1.5)


def test_the_twist_is_a_gaussian(small):
    mean, covariance = gaussian(1)
    observation, a = observed(small, mean)
    moments = moments_of(small, mean, covariance)
    x0_hat = torch.randn(3, 1, SIDE, SIDE, dtype=F64)
    for log_snr in (torch.tensor(-3.0), torch.tensor(2.0), torch.tensor(8.0)):
        given = torch.linalg.inv(moments.precision + log_snr.double().exp() * EYE)
        law = MultivariateNormal(x0_hat.flatten(1) @ a.T, a @ given @ a.T + observation.noise_std**2 * EYE)
        found = small.twist_of(observation, moments)(x0_hat, x0_hat, log_snr)
        torch.testing.assert_close(found, law.log_prob(observation.y.flatten()), rtol=1e-9, atol=1e-8)


def test_the_moments_are_of_the_patches(small):
    x = torch.randn(200, 1, SIDE, SIDE)
    moments = small.Moments.of(x)
    flat = x.flatten(1).double()
    centred = flat - flat.mean(0)
    torch.testing.assert_close(moments.precision @ (centred.T @ centred / 199), EYE)
    torch.testing.assert_close(moments.mean, flat.mean(0))


def test_total_variation_of_an_edge(small):
    """Halves of an unblurred image draw nearer by weight * noise * edge / area each: 4 / 8."""
    edge = torch.zeros(1, SIDE, SIDE, dtype=F64)
    edge[..., 2:] = 1.0
    observation = small.seen(edge, 0.05, 0.05)  # so narrow a kernel is none
    torch.testing.assert_close(observation.operator(edge[None])[0], edge)
    found = small.total_variation(observation, 2.0, iterations=400)
    shift = 2.0 * 0.1 * 4 / 8
    torch.testing.assert_close(found, shift + (1 - 2 * shift) * edge, rtol=0, atol=1e-4)


def test_total_variation_of_a_blurred_patch_is_a_minimum(small):
    """Quasi-Newton steps from it, on the same cost with its corners rounded off by 1e-5, gain no more than the rounding."""
    observation, _ = observed(small, gaussian(0)[0])
    weight, corner = 0.5, 1e-5

    def cost(x: Tensor) -> Tensor:
        down, right = nn.functional.pad(x.diff(dim=-2), (0, 0, 0, 1)), nn.functional.pad(x.diff(dim=-1), (0, 1))
        misfit = (observation.y - observation.operator(x[None])[0]).square().sum() / (2 * observation.noise_std**2)
        return misfit + weight * (down**2 + right**2 + corner**2).sqrt().sum() / observation.noise_std

    found = small.total_variation(observation, weight, iterations=3000)
    x = found.clone().requires_grad_()
    solver = torch.optim.LBFGS([x], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        value = cost(x)
        value.backward()
        return value

    solver.step(closure)
    assert float(cost(found) - cost(x.detach())) < SIDE**2 * corner * weight / observation.noise_std
    assert cost(observation.y.double()) > cost(found) + 0.1


def test_the_scores_of_known_ranks(small):
    assert small.psnr(torch.full((1, 2, 2), 0.2), torch.zeros(1, 2, 2)) == pytest.approx(20.0)
    names = ("psnr_blurred", "psnr_wiener", "psnr_total_variation", "pixels_covered", "moved", "width_std", "sigma_std")
    rows = [
        dict.fromkeys(names, 1.0) | {"psnr_posterior_mean": 3.0 + i, "width": 1.0, "sigma": 0.03, "width_mean": 1.1}
        | {"sigma_mean": 0.03, "width_rank": rank, "sigma_rank": 0.5}
        for i, rank in enumerate((0.01, 0.5, 0.99, 0.2))
    ]  # fmt: skip
    text = "\n".join(small.summary(rows))
    assert "width in its 90 % interval: 2 of 4; root mean square error 0.1000, 0.3000 without y" in text
    assert "sigma in its 90 % interval: 4 of 4" in text
    assert "posterior_mean - wiener          3.500 ± 0.645 dB, paired" in text
