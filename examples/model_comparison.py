"""Are there outliers among the pixels? The evidence of two likelihoods decides, with the picture itself unknown.

    pyrodiff train digits --out runs/classes ...      # as for examples/inpaint_digits.py
    python examples/model_comparison.py               # writes examples/results/model_comparison

A noisy digit y = x + noise, and two likelihoods, each a Pyro program: "normal", one Normal for all pixels; "outliers", less noise for nine
pixels of ten, and a lot for the tenth. Both have the same variance and no free parameters. x is unknown, of the diffusion's prior;
log p(y | normal) and log p(y | outliers) come from sequential Monte Carlo, with standard errors. Scored, on data of which the truth is
known: how often the likelier one is the true one, and whether its probability is right. The others are what one would take otherwise:
the likelihoods at a denoised picture (AIC and BIC are the same, where parameters are as many), and the evidence with Gaussian priors.
The diffusion's answers take 1.2 core-minutes.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from _common import command_line
from inpaint_digits import LOOKED_AT, RUN, STEPS, WIDER, denoising_errors, error_twist, shrunk, smoke, table
from torch import Tensor

import pyrodiff
from pyrodiff import GaussianDiffusion
from pyrodiff.inference.observe import observation
from pyrodiff.inference.resampling import systematic
from pyrodiff.inference.smc import Posterior, smc
from pyrodiff.training.data import ImageData

RESULTS = Path(__file__).resolve().parent / "results" / "model_comparison"
STD, SHARE, FAR = 0.3, 0.1, 0.72  # of all noise; of outliers, how many and how large (a level is 0.125)
NEAR = math.sqrt((STD**2 - SHARE * FAR**2) / (1 - SHARE))  # of the others: the variance is the same
NOISES = {"normal": ((1.0, STD),), "outliers": ((1 - SHARE, NEAR), (SHARE, FAR))}

Noise = Sequence[tuple[float, float]]  # share and standard deviation of each part


def normal(x0: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Normal(x0, STD).to_event(3), obs=y)


def outliers(x0: Tensor, y: Tensor) -> None:
    far = dist.Categorical(torch.tensor([1 - SHARE, SHARE]))
    law = dist.MixtureSameFamily(far, dist.Normal(x0[..., None], torch.tensor([NEAR, FAR])))
    pyro.sample("y", law.to_event(3), obs=y)


PROGRAMS: dict[str, Callable[[Tensor, Tensor], None]] = {"normal": normal, "outliers": outliers}


class DataSet(NamedTuple):
    digit: int  # its number among the test digits
    truth: str
    x: Tensor  # [*event]
    y: Tensor  # [*event]


def simulate(data: ImageData, digits: int, seed: int = 0) -> list[DataSet]:
    """Test digits, in turn with Normal noise and with outliers."""
    generator, found = torch.Generator().manual_seed(seed), []
    for n in range(digits):
        x, truth = data.test[n], tuple(NOISES)[n % 2]
        share, std = torch.tensor(NOISES[truth]).unbind(1)
        part = share.multinomial(x.numel(), replacement=True, generator=generator).view_as(x)
        found.append(DataSet(n, truth, x, x + std[part] * torch.randn(x.shape, generator=generator)))
    return found


def log_likelihood(name: str, x: Tensor, y: Tensor) -> float:
    """Log p(y | x)."""
    return float(observation(PROGRAMS[name], y)(x[None]))


def by_diffusion(
    diffusion: GaussianDiffusion, errors: Tensor, particles: int, repeats: int, given: DataSet
) -> dict[str, Posterior]:
    """The posterior of x, and its evidence, by each likelihood."""
    seen = torch.arange(given.y.numel())
    return {
        name: smc(
            diffusion,
            observation(program, given.y),
            particles,
            twist=error_twist(diffusion, errors, seen, given.y.flatten(), NOISES[name]),
            seed=given.digit,
            repeats=repeats,
            **diffusion.net.null_cond,
        )
        for name, program in PROGRAMS.items()
    }


def gaussian_evidence(mean: Tensor, covariance: Tensor, y: Tensor, noise: Noise, particles: int = 64) -> float:
    """Log p(y) for x ~ N(mean, covariance) and noise that is a mixture of Normals: exact for one part, else unbiased.

    Pixel by pixel: which part its noise is of is drawn given all y so far, and x is integrated out (a Rao-Blackwellised particle
    filter, Doucet et al., 2000).

    Args:
        mean: ``[D]``.
        covariance: ``[D, D]``.
        y: ``[D]``.
        noise: share and standard deviation of each part.
        particles: of the parts; one is enough where there is one part.
    """
    share, std = torch.tensor(noise, dtype=torch.float64).unbind(1)
    particles = 1 if len(noise) == 1 else particles
    m, V = mean.expand(particles, -1).clone(), covariance.expand(particles, -1, -1).clone()
    log_w = torch.zeros(particles, dtype=torch.float64)
    for i, value in enumerate(y.double()):
        variance = V[:, i, i, None] + std**2  # [S, K], of y_i
        error = value - m[:, i]
        parts = share.log() - (error[:, None] ** 2 / variance + (2 * math.pi * variance).log()) / 2
        log_w = log_w + parts.logsumexp(1)
        part = parts.softmax(1).multinomial(1)
        gain = V[:, :, i] / variance.gather(1, part)
        m = m + gain * error[:, None]
        V = V - gain[:, :, None] * V[:, None, i]
        w = log_w.softmax(0)
        if 1 / w.square().sum() < particles / 2:
            parent = systematic(w[None], torch.rand(1, particles, dtype=torch.float64))[0]
            m, V, log_w = m[parent], V[parent], (log_w.logsumexp(0) - math.log(particles)).expand(particles)
    return float(log_w.logsumexp(0)) - math.log(particles)


def wiener(mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
    """The picture denoised with a Gaussian prior and Normal noise."""
    total = covariance + STD**2 * torch.eye(len(mean), dtype=torch.float64)
    return mean + covariance @ torch.linalg.solve(total, y.double() - mean)


class Compared(NamedTuple):
    """Of one data set: by each method, log p(y | outliers) - log p(y | normal); and what tells of a collapse."""

    log_ratios: dict[str, float]
    signs: dict[str, float]


def compare(
    diffusion: GaussianDiffusion,
    errors: Tensor,
    gaussians: Sequence[tuple[Tensor, Tensor]],
    particles: int,
    repeats: int,
    given: DataSet,
) -> Compared:
    """Args: gaussians: mean and covariance of all digits, and then of each class."""
    torch.manual_seed(given.digit)
    cpu = time.process_time()
    found = by_diffusion(diffusion, errors, particles, repeats, given)
    cpu = time.process_time() - cpu
    y, likely = given.y.flatten(), partial(log_likelihood, y=given.y)
    evidence = {name: posterior.evidence for name, posterior in found.items()}
    denoised = {name: posterior.mean().to(given.y) for name, posterior in found.items()}
    smooth = wiener(*gaussians[0], y).to(y).view_as(given.y)
    whole = {name: gaussian_evidence(*gaussians[0], y, noise) for name, noise in NOISES.items()}
    each = {
        name: float(
            torch.tensor([gaussian_evidence(*law, y, noise, 24) for law in gaussians[1:]]).double().logsumexp(0)
        )
        for name, noise in NOISES.items()
    }
    by_method = {
        "evidence, diffusion": {name: e.log_z for name, e in evidence.items()},
        "evidence, one Gaussian": whole,
        "evidence, a Gaussian for each class": each,
        "likelihood at the diffusion's means": {name: likely(name, denoised[name]) for name in NOISES},
        "likelihood at the Wiener filter": {name: likely(name, smooth) for name in NOISES},
        "(likelihood at the true x)": {name: likely(name, given.x) for name in NOISES},
    }
    signs = {
        "log Bayes factor": evidence["outliers"].log_z - evidence["normal"].log_z,
        "its error": math.hypot(*(e.standard_error for e in evidence.values())),
        "effective": min(float(p.ess[:, -1].median()) for p in found.values()),
        "families": min(float(p.families.median()) for p in found.values()),
        "k-hat": max(float(p.pareto_k.max()) for p in found.values()),
        "warned": float(any(p.warnings for p in found.values())),
        "evaluations": sum(p.network_evaluations for p in found.values()),
        "seconds of CPU": cpu,
    }
    return Compared({method: both["outliers"] - both["normal"] for method, both in by_method.items()}, signs)


def score(log_ratio: float, truth: str) -> dict[str, float]:
    """Of p(outliers | y), both being equally likely beforehand: whether it chooses the truth, and its log and Brier scores."""
    odds = log_ratio if truth == "outliers" else -log_ratio  # of the truth
    loss = math.log1p(math.exp(-abs(odds))) + max(-odds, 0.0)
    return {"right": float(odds > 0), "log loss": loss, "brier": 2 * (1 - math.exp(-loss)) ** 2, "log odds": odds}


def draw(todo: Sequence[DataSet], compared: Sequence[Compared], path: Path) -> None:
    """Log ratios of every method, by truth, and of the diffusion with their errors."""
    from matplotlib.figure import Figure

    methods = list(compared[0].log_ratios)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for row, method in enumerate(methods):
        for truth, colour, up in (("normal", "#0072B2", -0.12), ("outliers", "#D55E00", 0.12)):
            at = [found.log_ratios[method] for given, found in zip(todo, compared, strict=True) if given.truth == truth]
            axes.scatter(
                at, [row + up] * len(at), s=14, alpha=0.5, color=colour, label=None if row else f"truth: {truth}"
            )
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlabel("log p(y | outliers) - log p(y | normal), nats (linear to 10)")
    axes.legend(loc="lower right", fontsize=8)
    pyrodiff.plots.save(figure, path)


def main(
    run: Path = RUN, digits: int = 60, particles: int = 32, repeats: int = 2, steps: int = STEPS, out: Path = RESULTS
) -> None:
    """Simulate, compare, score.

    Args:
        run: folder of a trained model.
        digits: data sets, each of another test digit.
        particles: of sequential Monte Carlo.
        repeats: of it, from which the standard errors come.
        steps: of the chain that is inferred with.
        out: folder of the results.
    """
    diffusion, data = pyrodiff.load(run).respace(steps), pyrodiff.load_data("digits")
    todo = simulate(data, digits)
    unlabelled = {name: torch.full((LOOKED_AT,), value) for name, value in diffusion.net.null_cond.items()}
    torch.manual_seed(0)
    errors = WIDER * denoising_errors(diffusion, data.train[:LOOKED_AT], **unlabelled)
    x = data.train.flatten(1).double().numpy()
    labels = data.train_labels.numpy()
    gaussians = [shrunk(x), *(shrunk(x[labels == label]) for label in sorted(set(labels.tolist())))]
    compared: list[Compared] = []
    for given in todo:
        compared.append(compare(diffusion, errors, gaussians, particles, repeats, given))
        print(f"{given.truth:9s}", {name: round(value, 2) for name, value in compared[-1].signs.items()}, flush=True)

    rows = {
        method: [score(found.log_ratios[method], given.truth) for given, found in zip(todo, compared, strict=True)]
        for method in compared[0].log_ratios
    }

    sign = {name: torch.tensor([found.signs[name] for found in compared]).double() for name in compared[0].signs}
    mid = {name: float(values.median()) for name, values in sign.items()}
    close = int((sign["log Bayes factor"].abs() < 2 * sign["its error"]).sum())
    evaluations, minutes = int(sign["evaluations"].sum()), float(sign["seconds of CPU"].sum()) / 60
    lines = [
        f"{len(todo)} data sets of {todo[0].y.numel()} pixels, {particles} particles x {repeats} for each of two likelihoods",
        f"T = {diffusion.steps}: {evaluations:,} network evaluations, {minutes:.1f} core-minutes",
        f"standard error of the log Bayes factor: median {mid['its error']:.2f} nats, largest {float(sign['its error'].max()):.2f};",
        f"|log Bayes factor| is below two of them for {close} of {len(todo)}",
        f"a warning for {int(sign['warned'].sum())} of {len(todo)}; of the worse likelihood, medians of families {mid['families']:.1f},",
        f"of effective weights at x_0 {mid['effective']:.1f}, of the largest k-hat {mid['k-hat']:.2f}",
        "in brackets: more than by the diffusion's evidence, ± the standard error of the paired difference;",
        "log odds: of the truth, nats\n",
    ]
    for name in ("all", *NOISES):
        here = {
            method: [row for row, given in zip(found, todo, strict=True) if name in ("all", given.truth)]
            for method, found in rows.items()
        }
        lines.append(f"truth: {name}, {len(here['evidence, diffusion'])} data sets (losses in nats)")
        lines.append(table(here, "evidence, diffusion", ("right", "log loss", "brier", "log odds")) + "\n")
    lines.append(
        "calibration: p(outliers | y) in five bins, as the number of data sets, their mean p, and the share that is outliers"
    )
    for method in rows:
        p = torch.tensor([found.log_ratios[method] for found in compared]).double().sigmoid()
        true = torch.tensor([given.truth == "outliers" for given in todo]).double()
        where = (p * 5).long().clamp(max=4)
        cells = [
            f"{int(k.sum()):3d}: {float(p[k].mean()):.2f} {float(true[k].mean()):.2f}" if k.any() else f"{'-':>14s}"
            for k in (where == b for b in range(5))
        ]
        lines.append(f"{method:38s}" + "   ".join(cells))
    text = "\n".join(lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.txt").write_text(text + "\n", encoding="utf-8")
    with (out / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["digit", "truth", *rows, *compared[0].signs])
        for given, found in zip(todo, compared, strict=True):
            values = [*found.log_ratios.values(), *found.signs.values()]
            writer.writerow([given.digit, given.truth, *(f"{value:.5g}" for value in values)])
    draw(todo, compared, out / "log_ratios.png")
    print(f"\n{text}\n\n{out}")


if __name__ == "__main__":
    command_line(main, smoke)
