"""Blind deblurring: patches of one photograph as the prior, of another as the test; blur width and noise level unknown.

    python examples/deblur.py            # about 40 core-minutes; writes examples/results/deblur, and the prior into runs/deblur

Scikit-learn has two photographs. A diffusion learns 16 x 16 patches of china.jpg (grey, the left four fifths). Patches of flower.jpg,
another subject, are blurred and get noise, and :func:`~pyrodiff.inference.gibbs.particle_gibbs` draws (x, width, sigma) given one
blurred patch. The comparison is given the true width and noise: the Wiener filter with the mean and covariance of the same training
patches, and total variation with its weight chosen on training patches.

**The blur** is a Gaussian kernel, cut at 6 pixels; what lies outside of a patch is mid-grey, which
:func:`~pyrodiff.inference.operators.blur` takes for 0. So nothing of a patch's surroundings is seen or guessed.

**The twist** takes x_0 given x_t to have the mean :math:`\\hat x_0` and the covariance :math:`(C^{-1} + \\mathrm{SNR}_t)^{-1}` that
it has under the Gaussian of the training patches. With :math:`M = C^{-1} + A^\\top A / \\sigma^2`, one eigendecomposition serves all t:

.. math:: \\log p(y \\mid x_t) = -\\tfrac12 \\Big( \\frac{|r|^2}{\\sigma^2} - g^\\top (M + \\mathrm{SNR}_t)^{-1} g
    + \\log \\frac{\\det (M + \\mathrm{SNR}_t)}{\\det (C^{-1} + \\mathrm{SNR}_t)} + K \\log 2 \\pi \\sigma^2 \\Big),
    \\qquad r = y - A \\hat x_0,\\ g = A^\\top r / \\sigma^2.
"""

from __future__ import annotations

import csv
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _common import command_line
from torch import Tensor

import pyrodiff
from pyrodiff.inference.gibbs import GibbsChain, particle_gibbs
from pyrodiff.inference.operators import LinearGaussian, LinearOperator, blur
from pyrodiff.inference.proposals import Twist

RESULTS = Path(__file__).resolve().parent / "results" / "deblur"
MODEL = Path("runs") / "deblur"
SIDE = 16  # of a patch
REACH = 6  # of the kernel
WIDTH = (0.8, 1.8)  # the kernel's standard deviation, pixels: the prior's range, from which the truth is drawn
SIGMA = (0.02, 0.05)  # the noise's, of the range from black to white
WEIGHTS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # of total variation, to choose from


# ---------------------------------------------------------------------- data


def photograph(name: str) -> Tensor:
    """One of scikit-learn's two sample images, grey, ``[h, w]``, 8 bits."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(np.array(Image.fromarray(load_sample_image(name)).convert("L")))


def patches(image: Tensor, n: int, seed: int) -> Tensor:
    """Patches from anywhere in it, ``[n, 1, SIDE, SIDE]`` in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    row, column = (torch.randint(size - SIDE + 1, (n,), generator=generator) for size in image.shape)
    return image.unfold(0, SIDE, 1).unfold(1, SIDE, 1)[row, column][:, None] / 127.5 - 1


def split(image: Tensor) -> tuple[Tensor, Tensor]:
    """What is trained on, and what is held out."""
    column = image.shape[1] * 4 // 5
    return image[:, :column], image[:, column:]


# ---------------------------------------------------------------------- the prior


def prior() -> pyrodiff.GaussianDiffusion:
    """Untrained."""
    torch.manual_seed(0)
    net = pyrodiff.nets.UNet(1, width=16, multipliers=(1, 2, 2), blocks=1, resample="conv")
    return pyrodiff.GaussianDiffusion(
        net.to(memory_format=torch.channels_last),
        pyrodiff.LogLinearSchedule(1000, -5.0, 8.5),  # the last noise: 0.007 of the range from black to white
        (1, SIDE, SIDE),
        prediction="v",
        bins=(256, -1.0, 1.0),
    )


class Moments(NamedTuple):
    """Of patches as vectors, float64: the mean ``[D]``, the inverse covariance ``[D, D]``, and its eigenvalues ``[D]``."""

    mean: Tensor
    precision: Tensor
    eigenvalues: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """``[n, *event]``."""
        flat = x.double().flatten(1)
        precision = torch.linalg.inv(flat.T.cov())
        return cls(flat.mean(0), precision, torch.linalg.eigvalsh(precision))


# ---------------------------------------------------------------------- what is observed


@functools.lru_cache(maxsize=64)
def operator(width: float) -> LinearOperator:
    """The blur."""
    kernel = torch.arange(-REACH, REACH + 1, dtype=torch.float64).div(width).square().div(-2).softmax(0)
    return blur((1, SIDE, SIDE), kernel)


def seen(y: Tensor, width: float, sigma: float) -> LinearGaussian:
    """Y as a function of x_0; from black to white is 2 in model units."""
    return LinearGaussian(operator(float(width)), y, 2 * float(sigma))


def adjoint(observation: LinearGaussian, y: Tensor) -> Tensor:
    """A^T y, ``[N, *observed]`` to ``[N, D]``, float64."""
    a = observation.operator
    return a.from_rows(a.singular_values * a.to_columns(y.double())).flatten(1)


def precision(observation: LinearGaussian, moments: Moments) -> Tensor:
    """M: of x_0 given y under the Gaussian, ``[D, D]``, float64."""
    identity = torch.eye(len(moments.mean), dtype=torch.float64).view(-1, *observation.operator.event_shape)
    blurred = observation.operator(identity).flatten(1)
    return moments.precision + blurred @ blurred.T / observation.noise_std**2


def twist_of(observation: LinearGaussian, moments: Moments) -> Twist:
    """See the module's text."""
    m, q = torch.linalg.eigh(precision(observation, moments))
    y, noise = observation.y.double(), observation.noise_std

    def twist(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        snr = log_snr.double().exp()
        r = y - observation.operator(x0_hat.double())
        g = (adjoint(observation, r) / noise**2) @ q
        squares = r.flatten(1).square().sum(1) / noise**2 - (g.square() / (m + snr)).sum(1)
        log_det = ((m + snr) / (moments.eigenvalues + snr)).log().sum() + y.numel() * math.log(2 * math.pi * noise**2)
        return -(squares + log_det) / 2

    return twist


def deblur(
    diffusion: pyrodiff.GaussianDiffusion,
    moments: Moments,
    y: Tensor,
    sweeps: int,
    particles: int,
    steps: int | None,
    seed: int,
) -> GibbsChain:
    """Draws of x, width and sigma given a blurred patch ``[1, SIDE, SIDE]``."""

    def program(x0: Tensor) -> None:
        width, sigma = (pyro.sample(name, dist.Uniform(*ends)) for name, ends in (("width", WIDTH), ("sigma", SIGMA)))
        pyro.factor("y", seen(y, width, sigma)(x0))

    def twist(parameters: dict[str, Tensor]) -> Twist:
        return twist_of(seen(y, parameters["width"], parameters["sigma"]), moments)

    return particle_gibbs(diffusion, program, sweeps, particles=particles, twist=twist, steps=steps, seed=seed)


# ---------------------------------------------------------------------- what it is compared with


def wiener(observation: LinearGaussian, moments: Moments) -> Tensor:
    """The posterior mean under the Gaussian."""
    mean = moments.mean.view(1, *observation.operator.event_shape)
    pull = adjoint(observation, observation.y.double() - observation.operator(mean))[0] / observation.noise_std**2
    return (mean.flatten() + torch.linalg.solve(precision(observation, moments), pull)).view(mean.shape[1:])


def total_variation(observation: LinearGaussian, weight: float, iterations: int = 200) -> Tensor:
    r"""The x of least :math:`|y - A x|^2 / 2 \sigma^2 + w \sum |\nabla x| / \sigma`, by Chambolle and Pock's algorithm 1.

    References:
        A First-Order Primal-Dual Algorithm for Convex Problems (2011), algorithm 1. https://doi.org/10.1007/s10851-010-0251-1
    """
    a, noise = observation.operator, observation.noise_std
    reach, tau = weight * noise, 1.0  # of |y - A x|^2 / 2 + reach |grad x|
    dual = 1 / (8 * tau)  # 8 is the gradient's largest squared norm
    s = a.singular_values
    pull, shrink = s * observation.target, 1 / (1 + tau * s**2)
    x = ahead = observation.y.double()[None]
    p = x.new_zeros(2, *x.shape)
    for _ in range(iterations):
        down, right = torch.zeros_like(x), torch.zeros_like(x)
        down[..., :-1, :], right[..., :-1] = ahead.diff(dim=-2), ahead.diff(dim=-1)
        p = p + dual * torch.stack([down, right])
        p = p / p.square().sum(0).sqrt().div(reach).clamp(min=1)
        down, right = p[0, ..., :-1, :], p[1, ..., :-1]
        adjoint_gradient = torch.zeros_like(x)
        adjoint_gradient[..., :-1, :] -= down
        adjoint_gradient[..., 1:, :] += down
        adjoint_gradient[..., :-1] -= right
        adjoint_gradient[..., 1:] += right
        z = x - tau * adjoint_gradient
        rows = a.to_rows(z)
        new = z + a.from_rows((rows + tau * pull) * shrink - rows)
        ahead, x = 2 * new - x, new
    return x[0]


def psnr(x: Tensor, truth: Tensor) -> float:
    """Decibels; the range from black to white is 2."""
    return float(10 * (4 / (x - truth).square().mean()).log10())


# ---------------------------------------------------------------------- the study


def problems(x: Tensor, seed: int) -> Iterator[tuple[Tensor, LinearGaussian, float, float]]:
    """Of each patch: itself, what is observed of it with its true law, width and sigma."""
    generator = torch.Generator().manual_seed(seed)
    for truth in x:
        u = torch.rand(2, generator=generator).tolist()
        width, sigma = (low + share * (high - low) for share, (low, high) in zip(u, (WIDTH, SIGMA), strict=True))
        noise = 2 * sigma * torch.randn(truth.shape, generator=generator)
        yield truth, seen(operator(width)(truth[None])[0] + noise, width, sigma), width, sigma


def tuned_weight(x: Tensor, seed: int) -> float:
    """The weight of total variation that is best on average, in decibels, on training patches with widths and noise of the same law."""

    def score(weight: float) -> float:
        return sum(psnr(total_variation(observation, weight), truth) for truth, observation, *_ in problems(x, seed))

    return max(WEIGHTS, key=score)


def study(
    diffusion: pyrodiff.GaussianDiffusion,
    moments: Moments,
    x: Tensor,
    weight: float,
    sweeps: int,
    burn_in: int,
    particles: int,
    steps: int | None,
) -> tuple[list[dict[str, float]], list[list[Tensor]]]:
    """Of each patch: its row of figures; and truth, y, Wiener, total variation, posterior mean and deviation, two draws."""
    rows, pictures = [], []
    for i, (truth, observation, width, sigma) in enumerate(problems(x, seed=4)):
        chain = deblur(diffusion, moments, observation.y, sweeps, particles, steps, seed=i)
        draws = chain.x0[burn_in:].double()
        mean, tv, linear = draws.mean(0), total_variation(observation, weight), wiener(observation, moments)
        low, high = draws.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
        row: dict[str, float] = {"patch": i, "width": width, "sigma": sigma}
        found = {"blurred": observation.y.double(), "wiener": linear, "total_variation": tv, "posterior_mean": mean}
        row |= {f"psnr_{name}": psnr(image, truth) for name, image in found.items()}
        row["pixels_covered"] = float(((low <= truth) & (truth <= high)).double().mean())
        for name, true in (("width", width), ("sigma", sigma)):
            values = chain.parameters[name][burn_in:].double()
            row[f"{name}_mean"], row[f"{name}_std"] = float(values.mean()), float(values.std())
            row[f"{name}_rank"] = float((values < true).double().mean())
        row["moved"], row["network_evaluations"] = chain.moved, chain.network_evaluations
        rows.append(row)
        pictures.append([truth, *found.values(), draws.std(0), draws[len(draws) // 2], draws[-1]])
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return rows, pictures


def summary(rows: list[dict[str, float]]) -> list[str]:
    """Means over patches with their standard errors."""

    def column(name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    def told(values: Tensor) -> str:
        return f"{float(values.mean()):.3f} ± {float(values.std()) / math.sqrt(len(values)):.3f}"

    names = ("blurred", "wiener", "total_variation", "posterior_mean")
    lines = [f"psnr_{name:18s}{told(column(f'psnr_{name}'))} dB" for name in names]
    for name in names[:-1]:
        lines.append(
            f"posterior_mean - {name:16s}{told(column('psnr_posterior_mean') - column(f'psnr_{name}'))} dB, paired"
        )
    lines.append(f"pixels in their 90 % intervals  {told(column('pixels_covered'))}")
    for name, ends in (("width", WIDTH), ("sigma", SIGMA)):
        rank, error = column(f"{name}_rank"), column(f"{name}_mean") - column(name)
        inside = int(((rank >= 0.05) & (rank <= 0.95)).sum())
        flat = (column(name) - sum(ends) / 2).square().mean().sqrt()
        lines.append(
            f"{name} in its 90 % interval: {inside} of {len(rows)}; root mean square error {float(error.square().mean().sqrt()):.4f}, "
            f"{float(flat):.4f} without y; mean posterior deviation {float(column(f'{name}_std').mean()):.4f}"
        )
    lines.append(f"x changed in {told(column('moved'))} of the sweeps")
    return lines


def draw(pictures: list[list[Tensor]], path: Path) -> None:
    """A row per patch."""
    from matplotlib.figure import Figure

    titles = ("truth", "blurred", "Wiener", "total variation", "posterior mean", "deviation", "a draw", "a draw")
    figure = Figure(figsize=(len(titles) * 1.3, len(pictures) * 1.35), layout="constrained")
    axes = figure.subplots(len(pictures), len(titles), squeeze=False)
    for row, images in zip(axes, pictures, strict=True):
        for axis, title, image in zip(row, titles, images, strict=True):
            low, high = (0.0, 0.3) if title == "deviation" else (-1.0, 1.0)
            axis.imshow(image[0].numpy(), cmap="gray", vmin=low, vmax=high)
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def main(
    training: int = 4500,
    problems: int = 32,
    sweeps: int = 60,
    burn_in: int = 10,
    particles: int = 8,
    steps: int = 30,
    tuning: int = 24,
    scored: int = 256,
    model: Path = MODEL,
    out: Path = RESULTS,
) -> None:
    """Train, deblur, score.

    Args:
        training: steps of it.
        problems: patches that are blurred.
        sweeps: of particle Gibbs, for each of them.
        burn_in: of those, how many are left out.
        particles: of a sweep.
        steps: of the chain.
        tuning: patches on which total variation's weight is chosen.
        scored: patches whose bound is told.
        model: folder where the prior is kept, once trained.
        out: folder of the results.
    """
    left, right = split(photograph("china.jpg"))
    data, held_out, flower = patches(left, 60_000, seed=0), patches(right, scored, seed=1), photograph("flower.jpg")
    data[::2] = data[::2].flip(3)
    diffusion, moments = prior(), Moments.of(data)
    fitted = pyrodiff.fit(
        diffusion,
        data,
        held_out,
        steps=training,
        batch_size=64,
        lr=3e-3,
        weight_decay=0.01,
        timesteps="importance",
        validation_timesteps=16,
        validate_every=max(1, training // 10),
        folder=model,
        resume=(model / "resume.safetensors").exists(),
    )
    if fitted.interrupted:
        return
    diffusion.cpu()  # it may have been trained on a GPU
    lines = [f"{fitted.steps} training steps, best at {fitted.best_step}; the bound of all 1000 steps:"]
    torch.manual_seed(2)
    for name, x in (("china.jpg, held out", held_out), ("flower.jpg", patches(flower, scored, seed=2))):
        lines.append(f"{name:20s}{pyrodiff.bits_per_dim(pyrodiff.elbo_terms(diffusion, x, t=16, repeats=2))}")
    weight = tuned_weight(patches(left, tuning, seed=5), seed=6)
    cpu = time.process_time()
    rows, pictures = study(
        diffusion, moments, patches(flower, problems, seed=3), weight, sweeps, burn_in, particles, steps
    )
    lines += [
        f"{problems} patches of flower.jpg, {sweeps} sweeps ({burn_in} left out) of {particles} particles, {steps} steps; "
        f"total variation's weight {weight}",
        *summary(rows),
        f"{sum(int(row['network_evaluations']) for row in rows):,} network evaluations, "
        f"{(time.process_time() - cpu) / 60:.1f} core-minutes",
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (out / "patches.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: round(value, 5) for name, value in row.items()} for row in rows)
    draw(pictures[:6], out / "patches.png")
    print("\n".join(lines))


def smoke(folder: Path) -> dict[str, Any]:
    """A setting of seconds."""
    sizes = {
        "training": 2,
        "problems": 2,
        "sweeps": 3,
        "burn_in": 1,
        "particles": 2,
        "steps": 3,
        "tuning": 1,
        "scored": 2,
    }
    return {**sizes, "model": folder / "model", "out": folder / "out"}


if __name__ == "__main__":
    command_line(main, smoke)
