"""What VDM found about schedules in continuous time, on small data: writes docs/continuous_time/*.csv and a picture.

    python examples/learned_schedule.py            # two to three core-minutes

* The bound depends on a schedule's two ends and not on its interior.
* With T steps it is above that of continuous time, and falls to it.
* The interior sets the variance of an estimate from one timestep; the learned one's is the smallest.

Data: a mixture of eight Gaussians in the plane with its exact denoiser, and the 8x8 digits with a small U-Net. References: Variational
Diffusion Models (Kingma et al., 2021), sections 5 and 6, figure 4. https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import command_line
from torch import Tensor, nn

import pyrodiff
from pyrodiff import GaussianDiffusion, LogLinearSchedule, bits_per_dim, elbo_terms
from pyrodiff.schedules import Curve, LearnedSchedule, Schedule

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "continuous_time"
PUBLISHED = {"beta-linear": 31.6, "cosine": 31.1, "log-linear": 6.35, "learned": 0.53}  # Var(bits/dim), VDM figure 4


class Rescaled(Curve):
    """Any decreasing function of u in [0, 1], moved and stretched to end where another schedule ends."""

    def __init__(self, raw: Callable[[Tensor], Tensor], like: Schedule) -> None:
        super().__init__(math.inf)
        self.raw, (self.start, self.stop) = raw, raw(torch.tensor([0.0, 1.0], dtype=torch.float64))
        self.high, self.low = (like.log_snr(t).item() for t in (like.first, like.last))

    def curve(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * (self.raw(u) - self.stop) / (self.start - self.stop)

    def slope(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            t = t.detach().double().requires_grad_()
            return torch.autograd.grad(self.curve(t).sum(), t)[0]


def beta_linear(u: Tensor) -> Tensor:
    """DDPM's, as VDM writes it (appendix E)."""
    return -torch.log(torch.expm1(1e-4 + 10 * u**2))


def cosine(u: Tensor) -> Tensor:
    """Improved DDPM's of 1000 steps, from the first to the one before the last, where log-SNR is minus infinity."""
    return -2 * torch.log(torch.tan(math.pi / 2 * (0.001 + 0.998 * u + 0.008) / 1.008))


class Ring(nn.Module):
    """E[x_0 | x_t] for eight Gaussians of standard deviation 0.05 on a circle of radius 0.8."""

    variance = 0.05**2

    def __init__(self) -> None:
        super().__init__()
        angle = 2 * math.pi * torch.arange(8) / 8
        self.register_buffer("means", 0.8 * torch.stack([angle.cos(), angle.sin()], 1))

    def draw(self, n: int) -> Tensor:
        return self.means[torch.randint(8, (n,))] + math.sqrt(self.variance) * torch.randn(n, 2)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        alpha, variance = log_snr.sigmoid().sqrt()[:, None], (-log_snr).sigmoid()[:, None]
        total = alpha**2 * self.variance + variance
        off = x[:, None] - alpha[..., None] * self.means  # [N, 8, 2]
        share = torch.softmax(-0.5 * off.square().sum(-1) / total, dim=1)
        means = self.means + (alpha * self.variance / total)[..., None] * off
        return (share[..., None] * means).sum(1)


def ring(steps: int, images: int) -> tuple[GaussianDiffusion, Tensor]:
    """The diffusion, trained, and data to score it on."""
    net = Ring()
    diffusion = GaussianDiffusion(net, LearnedSchedule(math.inf, -6.0, 8.0), (2,), prediction="x0")
    pyrodiff.fit(diffusion, net.draw(20_000), steps=steps, lr=1e-2, batch_size=128, device="cpu")
    return diffusion, net.draw(10 * images)


def digits(steps: int, images: int) -> tuple[GaussianDiffusion, Tensor]:
    data = pyrodiff.load_data("digits")
    net = pyrodiff.nets.UNet(channels=1, width=16, multipliers=(1, 2), blocks=1)
    schedule = LearnedSchedule(math.inf, -6.0, 6.5)
    diffusion = GaussianDiffusion(net, schedule, (1, 8, 8), prediction="v", bins=data.bins)
    pyrodiff.fit(diffusion, data.train, data.validation, steps=steps, lr=3e-3, batch_size=64, device="cpu")
    return diffusion, data.test[:images]


def interiors(schedule: LearnedSchedule) -> dict[str, Schedule]:
    """Four schedules that end where the learned one ends."""
    low, high = (schedule.log_snr(t).item() for t in (1.0, 0.0))
    return {
        "beta-linear": Rescaled(beta_linear, schedule),
        "cosine": Rescaled(cosine, schedule),
        "log-linear": LogLinearSchedule(math.inf, low, high),
        "learned": schedule,
    }


def with_schedule(diffusion: GaussianDiffusion, schedule: Schedule) -> GaussianDiffusion:
    """The same network on another schedule: it knows log-SNR, not t."""
    kernel = diffusion.reverse_kernel
    return GaussianDiffusion(
        kernel.net, schedule, diffusion.event_shape, prediction=kernel.prediction, bins=kernel.bins
    )


def variance(diffusion: GaussianDiffusion, x0: Tensor, nodes: int) -> tuple[float, pyrodiff.elbo.BitsPerDim]:
    """Variance of the diffusion term's estimate from one uniform t, over t, noise and data, in (bits/dim)^2; and the bound.

    Over t by a Legendre sum; over data and noise by averages.
    """
    u, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    t, w = (u + 1) / 2, w / 2
    terms = elbo_terms(diffusion, x0, t=t, weights=w, repeats=2, batch_size=4096)
    bits = terms.draws["analytic"][1].flatten(0, 1) / (terms.dims * math.log(2))  # [R * B, C], the integrand
    mean, square = (bits.mean(0) * w).sum(), (bits.square().mean(0) * w).sum()
    return (square - mean**2).item(), bits_per_dim(terms)


def least_variance(diffusion: GaussianDiffusion, x0: Tensor, nodes: int) -> float:
    """What no interior can go below: the law of log-SNR in proportion to the root of the second moment."""
    u, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    terms = elbo_terms(diffusion, x0, t=(u + 1) / 2, weights=w / 2, batch_size=4096)
    bits = terms.diffusion / (terms.dims * math.log(2))
    root, mean = (bits.square().mean(0).sqrt() * w / 2).sum(), (bits.mean(0) * w / 2).sum()
    return (root**2 - mean**2).item()


def finite(diffusion: GaussianDiffusion, x0: Tensor, lengths: list[int]) -> dict[int, tuple[float, float]]:
    """Bound and its standard error over the noise for T steps, at most 33 columns each."""
    found = {}
    for steps in lengths:
        columns = min(steps - 1, 32)
        bound = bits_per_dim(elbo_terms(diffusion.respace(steps), x0, columns, repeats=2, batch_size=4096))
        found[steps] = (bound.mean, bound.se_noise)
    bound = bits_per_dim(elbo_terms(diffusion, x0, 64, repeats=2, batch_size=4096))
    return found | {0: (bound.mean, bound.se_noise)}


def main(out: Path = RESULTS, steps: int = 1000, images: int = 150, nodes: int = 64, seed: int = 0) -> None:
    """Train, measure, draw.

    Args:
        out: folder of the tables and the picture.
        steps: of training.
        images: of the test set; ten times as many points of the plane.
        nodes: of the quadrature over time.
        seed: of training and of the noise.
    """
    out.mkdir(parents=True, exist_ok=True)
    variances: list[dict[str, object]] = []
    bounds: list[dict[str, object]] = []
    curves = {}
    for name, make in {"ring": ring, "digits": digits}.items():
        torch.manual_seed(seed)
        diffusion, x0 = make(steps, images)
        found = {}
        for interior, schedule in interiors(diffusion.schedule).items():
            other = with_schedule(diffusion, schedule).eval()
            found[interior], bound = variance(other, x0, nodes)
            row: dict[str, object] = {"data": name, "interior": interior, "variance": found[interior]}
            row |= {"bits_per_dim": bound.mean, "se_noise": bound.se_noise}
            variances.append(row | {"published": PUBLISHED[interior]})
            if interior in ("log-linear", "learned"):
                for length, (mean, se) in finite(other, x0, [2, 3, 5, 9, 17, 33, 129]).items():
                    bounds.append(
                        {"data": name, "interior": interior, "T": length or "inf", "bits_per_dim": mean, "se_noise": se}
                    )
            curves[name, interior] = schedule
        least = least_variance(with_schedule(diffusion, curves[name, "log-linear"]), x0, nodes)
        variances.append({"data": name, "interior": "(least possible)", "variance": least})
    for file, rows in (("variance.csv", variances), ("finite_T.csv", bounds)):
        with open(out / file, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    for row in variances:
        print("  ".join(f"{f'{v:.4g}' if isinstance(v, float) else v!s:>16s}" for v in row.values()))
    draw(curves, bounds, out / "schedules.png")


def draw(curves: dict[tuple[str, str], Schedule], bounds: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    for column, data in zip(axes.T, ("ring", "digits"), strict=True):
        for (name, interior), schedule in curves.items():
            if name == data:
                column[0].plot(t, schedule.log_snr(t).detach(), label=interior)
        for interior in ("log-linear", "learned"):
            rows = [r for r in bounds if (r["data"], r["interior"]) == (data, interior)]
            T, bound = (
                [r["T"] for r in rows[:-1]],
                [float(r["bits_per_dim"]) - float(rows[-1]["bits_per_dim"]) for r in rows[:-1]],
            )  # type: ignore[arg-type]
            color = {"log-linear": "C2", "learned": "C3"}[interior]
            column[1].plot(T, bound, "o-", color=color, label=interior)
        column[0].set(title=data, xlabel="t", ylabel="log-SNR")
        column[1].set(xlabel="steps T", ylabel="bits/dim above T = ∞", xscale="log", yscale="log")
        column[0].legend()
        column[1].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def smoke(folder: Path) -> dict[str, Any]:
    """A setting of seconds."""
    return {"out": folder, "steps": 2, "images": 2, "nodes": 4}


if __name__ == "__main__":
    command_line(main, smoke)
