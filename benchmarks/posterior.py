"""Posterior sampling where the posterior is known: a mixture of 25 Gaussians seen through a random matrix.

    python benchmarks/posterior.py                     # three cells, a few problems each: about a minute
    python benchmarks/posterior.py --all --problems 20 --steps 1000
    python benchmarks/posterior.py --gaussian          # data N(0, 1) along 1000 steps, y = 1, noise variance 1/4
    python benchmarks/posterior.py --guidance          # every kind of guidance with and without weights, a mixture of two in 2-d

The task is that of Monte Carlo guided Diffusion (Cardoso et al., 2023, https://arxiv.org/abs/2308.07983), with equal weights of the
components and a noise of known size. Of each method: the mean over 100 random directions of the 1-d Wasserstein distance between
its samples and exact ones (with two standard errors over problems; "exact" is that of two sets of exact samples, "prior" that
of samples without y), the error of log p(y), how often it warns, and how often it does not where log p(y) is off by half a nat.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributions as dist

from pyrodiff import GaussianDiffusion, NoisyClassifier, TableSchedule
from pyrodiff.inference.guidance import class_label, guided, mmps, pigdm, repaint
from pyrodiff.inference.operators import LinearGaussian, mask, matrix
from pyrodiff.inference.smc import Posterior, smc

CELLS = [(noise, d, d_y) for noise in (0.01, 0.1, 1.0) for d in (8, 80) for d_y in (1, 2, 4)]
FEW = [(0.1, 8, 1), (0.1, 8, 2), (1.0, 80, 1)]
SCALE = math.sqrt(1 + 128)  # the data's standard deviation: of the components, and of their means


class Mixture(nn.Module):
    """E[x_0 | x_t] for 25 unit Gaussians with means (-8i, -8j, -8i, ...), i and j in -2..2."""

    def __init__(self, d: int) -> None:
        super().__init__()
        i = torch.arange(-2.0, 3.0)
        self.register_buffer("means", -8 * torch.cartesian_prod(i, i).repeat(1, d // 2))
        self.like = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        alpha = log_snr.sigmoid().sqrt()[:, None]  # x_t given a component: N(alpha m, 1)
        share = torch.softmax(alpha * (x @ self.means.T) - alpha**2 * self.means.square().sum(1) / 2, 1)
        return alpha * x + (1 - alpha**2) * (share @ self.means)


class Problem(NamedTuple):
    seen: LinearGaussian
    log_z: float
    weights: Tensor  # of the posterior's components
    means: Tensor
    root: Tensor  # of their covariance

    def draw(self, n: int) -> Tensor:
        component = torch.multinomial(self.weights, n, replacement=True)
        return self.means[component] + torch.randn(n, self.means.shape[1]).double() @ self.root.T


def problem(net: Mixture, noise: float, d: int, d_y: int) -> Problem:
    """A with singular values uniform on [0, 1], an x_0 of the prior, its y, and the exact posterior."""
    u, _, vh = torch.linalg.svd(torch.randn(d_y, d).double(), full_matrices=False)
    a = u @ torch.rand(d_y).double().sort(descending=True).values.diag() @ vh
    m = net.means.double()
    y = a @ (m[torch.randint(25, ())] + torch.randn(d).double()) + noise * torch.randn(d_y).double()
    covariance = torch.linalg.inv(torch.eye(d).double() + a.T @ a / noise**2)
    law = torch.distributions.MultivariateNormal(m @ a.T, a @ a.T + noise**2 * torch.eye(d_y).double())
    log_w = law.log_prob(y) - math.log(25)
    means = (a.T @ y / noise**2 + m) @ covariance
    seen = LinearGaussian(matrix(a), y, noise)
    return Problem(seen, float(torch.logsumexp(log_w, 0)), log_w.softmax(0), means, torch.linalg.cholesky(covariance))


def distance(x: Tensor, y: Tensor) -> float:
    """Sliced Wasserstein-1 of two sets of one size: sorted, point by point."""
    slices = nn.functional.normalize(torch.randn(100, x.shape[1]), dim=1).double().T
    return float(((x.double() @ slices).sort(0).values - (y.double() @ slices).sort(0).values).abs().mean())


def methods(
    diffusion: GaussianDiffusion, seen: LinearGaussian, n: int, steps: int, scale: float = SCALE
) -> dict[str, Callable[[], Posterior]]:
    options = {"steps": steps, "batch_size": n}

    def weighted(**more):
        return lambda: smc(diffusion, seen, n, **options, **more)

    return {
        "DPS": lambda: guided(diffusion, seen, n, **options),
        "PiGDM": lambda: guided(diffusion, seen, n, twist=pigdm(seen, scale), **options),
        "bootstrap": weighted(proposal="bootstrap"),
        "TDS": weighted(),
        "TDS, PiGDM's twist": weighted(twist=pigdm(seen, scale)),
        "TDS, MMPS's twist": weighted(twist=mmps(seen)),
        "MCGDiff": weighted(proposal="mcgdiff"),
        "MCGDiff, data_std": weighted(proposal="mcgdiff", data_std=scale),
    }


def cell(noise: float, d: int, d_y: int, arguments: argparse.Namespace) -> None:
    n, net = arguments.particles, Mixture(d)
    diffusion = GaussianDiffusion(
        net, TableSchedule(torch.linspace(1e-4, 0.02, 1000).double()), (d,), "x0", variance=arguments.variance
    )
    rows: dict[str, list[tuple[float, float, bool, float]]] = {}
    for seed in range(arguments.problems):
        torch.manual_seed(seed)
        given = problem(net, noise, d, d_y)
        exact = given.draw(n)
        prior = net.means.double()[torch.randint(25, (n,))] + torch.randn(n, d).double()
        for name, samples in (("exact", given.draw(n)), ("prior", prior)):
            rows.setdefault(name, []).append((distance(exact, samples), math.nan, False, 0.0))
        for name, run in methods(diffusion, given.seen, n, arguments.steps).items():
            started = time.perf_counter()
            found = run()
            samples, finite = found.sample(n), bool(found.particles.isfinite().all())
            error = math.nan if found.no_evidence else float(found.log_evidence) - given.log_z
            warned = bool(found.warnings) and not found.no_evidence
            rows.setdefault(name, []).append(
                (distance(exact, samples) if finite else math.inf, error, warned, time.perf_counter() - started)
            )
    for name, values in rows.items():
        w, error, warned, seconds = torch.tensor(values).double().unbind(1)
        two = 2 * float(w.std()) / math.sqrt(len(w)) if len(w) > 1 else math.nan
        evidence = "" if error.isnan().all() else f"{float(error.abs().median()):.2f}"
        print(
            f"| {noise:g} | {d} | {d_y} | {name} | {float(w.mean()):.2f} ± {two:.2f} | {evidence} | "
            f"{int(warned.sum())} of {len(w)} | {int(((error.abs() > 0.5) & (warned == 0)).sum())} | {float(seconds.mean()):.1f} |",
            flush=True,
        )


class Standard(nn.Module):
    """E[x_0 | x_t] for data N(0, 1)."""

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return log_snr.sigmoid().sqrt()[:, None] * x


def gaussian(arguments: argparse.Namespace) -> None:
    """The posterior is N(0.8, 0.2), and log p(y) is -1.4305."""
    schedule = TableSchedule(torch.linspace(1e-4, 0.02, 1000).double())
    diffusion = GaussianDiffusion(Standard(), schedule, (1,), "x0", variance=arguments.variance)
    seen = LinearGaussian(matrix(torch.ones(1, 1)), torch.ones(1), 0.5)
    log_z = -0.5 * math.log(2 * math.pi * 1.25) - 0.4
    print("| method | mean | variance | error of log p(y) | families | s |\n|---|---|---|---|---|---|")
    torch.manual_seed(0)
    n, batch = arguments.particles, {"batch_size": arguments.particles}
    rows = methods(diffusion, seen, n, 1000, 1.0) | {
        "DPS, eta = 0": lambda: guided(diffusion, seen, n, eta=0.0, seed=0, **batch),
        "replacement": lambda: smc(diffusion, seen, n, proposal="replacement", seed=0, **batch),
    }
    for name, run in rows.items():
        found = run()
        mean = float(found.mean())
        variance = float(found.mean(lambda x: x**2)) - mean**2
        evidence = (
            " | " if found.no_evidence else f"{float(found.log_evidence) - log_z:.3f} | {float(found.families):.0f}"
        )
        print(f"| {name} | {mean:.3f} | {variance:.3f} | {evidence} | {found.seconds:.1f} |", flush=True)


class Parts(nn.Module):
    """Logits of the parts of 0.3 N(-0.8, 0.1) + 0.7 N(0.6, 0.1), each in two dims, given x_t."""

    means, variance = torch.tensor([-0.8, 0.6]), 0.1

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        ab = log_snr.sigmoid()[:, None]
        squares = (x[:, None] - (ab.sqrt() * self.means)[..., None]).square().sum(2)
        return torch.tensor([0.3, 0.7]).log() - squares / (2 * (ab * self.variance + 1 - ab))


class Two(nn.Module):
    """E[x_0 | x_t, part y] of the same, and of y = 2 that of both parts."""

    null_cond = {"y": 2}  # noqa: RUF012

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor) -> Tensor:
        ab, m, y = log_snr.sigmoid()[:, None], Parts.means, y[..., None]
        other = (torch.arange(2) != y) & (y != 2)
        share = Parts()(x, log_snr).masked_fill(other, -math.inf).softmax(1)
        gain = ab.sqrt() * Parts.variance / (ab * Parts.variance + 1 - ab)
        return gain * x + (share @ m)[:, None] * (1 - gain * ab.sqrt())


def guidance(arguments: argparse.Namespace) -> None:
    """Of x_0 = (u, v): the mean of v and the share of the first part, given u or the part; its exact values first."""
    schedule, n = TableSchedule(torch.linspace(1e-4, 0.02, 1000).double()), arguments.particles
    diffusion = GaussianDiffusion(Two(), schedule, (2,), "x0", variance=arguments.variance)
    classifier, first = (
        NoisyClassifier(Parts(), schedule, (2,)),
        dist.Normal(Parts.means, (Parts.variance + 0.01) ** 0.5),
    )
    seen = LinearGaussian(mask(torch.tensor([True, False])), torch.tensor([-0.15]), 0.1)
    parts = torch.tensor([0.3, 0.7]).log() + first.log_prob(seen.y)
    options = {"steps": arguments.steps, "batch_size": n, "seed": 0}
    u = {"log_likelihood": seen, "y": 2, **options}
    label, twist = class_label(classifier, 0)
    of_label = {"log_likelihood": label, "twist": twist, "y": 2, **options}
    free = {"log_likelihood": lambda x0: x0.new_zeros(len(x0)), "proposal": "bootstrap", "guidance_scale": 3.0, "y": 0}
    free |= options
    told = {"twist": pigdm(seen, 0.7)}
    problems = {
        "u = -0.15 ± 0.1": (
            parts,
            {
                "DPS": lambda: guided(diffusion, n=n, **u),
                "DPS, eta = 0": lambda: guided(diffusion, n=n, eta=0.0, **u),
                "PiGDM": lambda: guided(diffusion, n=n, **told, **u),
                "MMPS": lambda: guided(diffusion, n=n, twist=mmps(seen), **u),
                "replacement, no weights": lambda: repaint(diffusion, seen, n, times=1, y=2, **options),
                "RePaint": lambda: repaint(diffusion, seen, n, y=2, **options),
                "smc, bootstrap": lambda: smc(diffusion, particles=n, proposal="bootstrap", **u),
                "smc, twisted": lambda: smc(diffusion, particles=n, **u),
                "smc, twisted, pigdm": lambda: smc(diffusion, particles=n, **told, **u),
                "smc, twisted, mmps": lambda: smc(diffusion, particles=n, twist=mmps(seen), **u),
                "smc, mcgdiff": lambda: smc(diffusion, particles=n, proposal="mcgdiff", data_std=0.7, **u),
                "smc, replacement": lambda: smc(diffusion, particles=n, proposal="replacement", data_std=0.7, **u),
            },
        ),
        "part 1": (
            torch.tensor([0.3, 0.0]).log(),
            {
                "classifier": lambda: guided(diffusion, n=n, **of_label),
                "smc, classifier": lambda: smc(diffusion, particles=n, **of_label),
            },
        ),
        "nothing, chain of part 1": (
            torch.tensor([1.0, 0.0]).log(),
            {
                "classifier-free, 3": lambda: guided(diffusion, n=n, **free),
                "smc, classifier-free, 3": lambda: smc(diffusion, particles=n, **free),
            },
        ),
    }
    print("| observed | method | mean of v | variance of v | error of log p | effective | families | k-hat |")
    print("|---|---|---|---|---|---|---|---|")
    for observed, (log_w, rows) in problems.items():
        mean = float(log_w.softmax(0) @ Parts.means)
        spread = Parts.variance + float(log_w.softmax(0) @ (Parts.means - mean).square())
        print(f"| {observed} | exact | {mean:.3f} | {spread:.3f} | | | | |")
        for name, run in rows.items():
            found = run()
            v, square = float(found.mean()[1]), float(found.mean(lambda x: x[:, 1] ** 2))
            signs = " | | | "
            if not found.no_evidence:
                error = float(found.log_evidence) - float(torch.logsumexp(log_w, 0))
                k = float(found.pareto_k.nan_to_num(-math.inf).max())
                signs = f"{error:.3f} | {float(found.ess[0, -1]):.0f} | {float(found.families):.0f} | {k:.2f}"
            print(f"| | {name} | {v:.3f} | {square - v**2:.3f} | {signs} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all 18 cells")
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100, help="of the chain's 1000")
    parser.add_argument("--variance", default="fixed_large")
    parser.add_argument("--gaussian", action="store_true", help="the Gaussian, in the mixture's place")
    parser.add_argument("--guidance", action="store_true", help="every kind of guidance, in the mixture's place")
    arguments = parser.parse_args()
    if arguments.guidance:
        guidance(arguments)
        return
    if arguments.gaussian:
        gaussian(arguments)
        return
    print("| noise | d | d_y | method | distance | median error of log p(y), nats | warned | silent | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for noise, d, d_y in CELLS if arguments.all else FEW:
        cell(noise, d, d_y, arguments)


if __name__ == "__main__":
    main()
