"""The probability flow's density: the solvers' errors, what importance samples buy, and the gap to the chain's bound.

    python benchmarks/flow.py

Data are a mixture of two correlated Gaussians in two dimensions, whose denoiser and density are known; the gap is that of a
small network trained on it, early and late.
"""

from __future__ import annotations

import argparse
import math

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

import pyrodiff
from pyrodiff import GaussianDiffusion, LogLinearSchedule, elbo_terms, timesteps
from pyrodiff.elbo import BitsPerDim, Estimate
from pyrodiff.likelihood.dequantise import DEQUANTISATIONS, flow_bound, signed_gap
from pyrodiff.likelihood.flow import decode, encode, log_density

WEIGHTS = torch.tensor([0.3, 0.7]).double()
MEANS = torch.tensor([[0.6, -0.4], [-0.5, 0.3]]).double()
COVARIANCES = torch.tensor([[[0.20, 0.12], [0.12, 0.15]], [[0.10, -0.05], [-0.05, 0.30]]]).double()
LOWEST, HIGHEST = -16.0, 6.0  # log-SNR: at the lower end x_T is N(0, 1) but for 1e-4


class Exact(nn.Module):
    """E[x_0 | x_t] of the mixture."""

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        alpha, var = log_snr.sigmoid().sqrt()[:, None, None], (-log_snr).sigmoid()[:, None, None]
        off = x[:, None] - alpha * MEANS
        noisy = alpha[..., None] ** 2 * COVARIANCES + var[..., None] * torch.eye(2, dtype=x.dtype)
        white = torch.linalg.solve(noisy, off[..., None])
        log_r = WEIGHTS.log() - 0.5 * (off * white[..., 0]).sum(-1) - 0.5 * torch.logdet(noisy)
        parts = MEANS + alpha * (COVARIANCES @ white)[..., 0]
        return (torch.softmax(log_r, -1)[..., None] * parts).sum(1)


def draw(n: int) -> Tensor:
    component = torch.multinomial(WEIGHTS, n, replacement=True)
    return MultivariateNormal(MEANS, COVARIANCES).sample((n,))[torch.arange(n), component]


def log_prob(x: Tensor, noise_variance: float) -> Tensor:
    laws = MultivariateNormal(MEANS, COVARIANCES + noise_variance * torch.eye(2).double())
    return torch.logsumexp(WEIGHTS.log() + laws.log_prob(x[:, None]), 1)


def solvers(x: Tensor) -> None:
    diffusion = GaussianDiffusion(Exact(), LogLinearSchedule(2, LOWEST, HIGHEST), (2,), prediction="x0")
    reference = log_density(diffusion, x, solver="dopri5", tolerance=1e-11).log_prob[0]
    closed = (reference - log_prob(x, math.exp(-HIGHEST))).abs().max()
    print(
        f"{len(x)} points of the data; dopri5 at 1e-11 is {closed:.1e} nats from the closed form, by the prior at x_T\n"
    )
    print("| solver | network calls | largest error, nats | x_0 → x_T → x_0 |\n|---|---|---|---|")
    settings = [("heun", n, None) for n in (64, 256, 1024)] + [("rk4", n, None) for n in (16, 32, 64, 128)]
    settings += [("dopri5", None, 10.0**-k) for k in (4, 6, 8)]
    for solver, steps, tolerance in settings:
        options = {"solver": solver, "steps": steps, "tolerance": tolerance, "batch_size": len(x)}
        found = log_density(diffusion, x, **options)
        error = (found.log_prob[0] - reference).abs().max()
        back = (decode(diffusion, encode(diffusion, x, **options), **options) - x).abs().max()
        name = f"{solver}, {steps} steps" if steps else f"{solver}, {tolerance:.0e}"
        print(f"| {name} | {found.network_evaluations // len(x)} | {error:.1e} | {back:.1e} |")
    exact, probed = (log_density(diffusion, x, probes=p, seed=0) for p in (None, 100))
    print(f"\none probe: standard deviation {probed.log_prob.std(0).mean():.2f} nats, on average over the points")
    bias = Estimate.of(probed.log_prob - exact.log_prob)
    print(f"mean of 100 probes less the exact divergence's: {bias.mean:.4f} ± {bias.se_noise:.4f} nats\n")


class ExactOnGrid(nn.Module):
    """E[x_0 | x_t] of discrete data in one dimension."""

    def __init__(self, levels: Tensor, pmf: Tensor) -> None:
        super().__init__()
        self.levels, self.log_pmf = levels, pmf.log()

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        alpha, var = log_snr.sigmoid().sqrt()[:, None], (-log_snr).sigmoid()[:, None]
        logits = self.log_pmf + alpha / var * (x - 0.5 * alpha * self.levels) * self.levels
        return (torch.softmax(logits, 1) * self.levels).sum(1, keepdim=True)


def bounds(n: int) -> None:
    bins = (33, -2.0, 2.0)
    levels = torch.linspace(-2, 2, 33).double()
    laws = Normal(MEANS[:, 0], COVARIANCES[:, 0, 0].sqrt())
    pmf = (WEIGHTS * laws.log_prob(levels[:, None]).exp()).sum(1)
    pmf = pmf / pmf.sum()
    index = torch.multinomial(pmf, n, replacement=True)
    truth = -pmf[index].log2().mean()
    print(f"discrete data of {n} examples in one dimension, 33 levels; -log2 of their probability: {truth:.4f} bits\n")
    print("| log-SNR at t = 1 | K | " + " | ".join(DEQUANTISATIONS) + " |\n|---|---|---|---|---|")
    for highest in (4.0, 6.0, 8.0):
        schedule = LogLinearSchedule(2, LOWEST, highest)
        net = ExactOnGrid(levels, pmf)
        diffusion = GaussianDiffusion(net, schedule, (1,), prediction="x0", bins=bins)
        for samples in (1, 10):
            row = []
            for dequantisation in DEQUANTISATIONS:
                found = flow_bound(
                    diffusion, levels[index][:, None], dequantisation, samples=samples, repeats=4, steps=128, seed=0,
                    batch_size=10_000,
                )  # fmt: skip
                row.append(BitsPerDim.of(-found.log_prob / math.log(2)))
            print(f"| {highest:g} | {samples} | " + " | ".join(f"{b.mean:.4f} ± {b.se_noise:.4f}" for b in row) + " |")
    print()


def gap(x: Tensor, steps: int) -> None:
    net = pyrodiff.nets.MLP(2, width=64, depth=2)
    diffusion = GaussianDiffusion(net, LogLinearSchedule(1000, -10.0, HIGHEST), (2,), prediction="v")
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    elbo = pyro.infer.TraceMeanField_ELBO()
    print("| training steps | ELBO of the chain | bound of the flow | flow less chain |\n|---|---|---|---|")
    test = x.float()
    for step in range(1, steps + 1):
        batch = draw(256).float()
        loss = elbo.differentiable_loss(diffusion.model, diffusion.guide, batch, timesteps.low_discrepancy(256, 1000))
        optimiser.zero_grad()
        (loss / 256).backward()
        optimiser.step()
        if step in (100, 300, 1000, steps):
            found = flow_bound(diffusion, test, repeats=4, seed=0, batch_size=10_000)
            terms = elbo_terms(diffusion, test, chain=False, repeats=4, batch_size=50_000)
            difference, chain = Estimate.of(signed_gap(found, terms)), Estimate.of(-terms.parts()["total"])
            flow = Estimate.of(found.log_prob)
            print(
                f"| {step} | {chain.mean:.3f} ± {chain.se_noise:.3f} | {flow.mean:.3f} ± {flow.se_noise:.3f} "
                f"| {difference.mean:+.3f} ± {difference.se_noise:.3f} |"
            )
    print(f"\nmean log-density of these data: {log_prob(x, 0.0).mean():.3f} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--training-steps", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = draw(options.points)
    solvers(x)
    bounds(options.points)
    gap(draw(5 * options.points), options.training_steps)


if __name__ == "__main__":
    main()
