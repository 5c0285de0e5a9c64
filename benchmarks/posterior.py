"""Posterior sampling where the posterior is known: a mixture of 25 Gaussians seen through a random matrix.

    python benchmarks/posterior.py                               # three cells, four problems each
    python benchmarks/posterior.py --all --problems 20 --azula --csv posterior.csv  # what the file has is not run again
    python benchmarks/posterior.py --table posterior.csv         # what a file says
    python benchmarks/posterior.py --gaussian --repeats 100 --particles 200   # data N(0, 1), 1000 steps, y = 1, noise variance 1/4
    python benchmarks/posterior.py --guidance                    # every kind of guidance with and without weights, in two dims

The task is that of Monte Carlo guided Diffusion (Cardoso et al., 2023, https://arxiv.org/abs/2308.07983), with equal weights of the
components, a noise of known size and the noise schedule of https://github.com/bd3dowling/diffusion-research (``scripts/gmm.py``),
whose ``gmm.csv`` (commit dcf5064) has the published figures: five problems a cell, 1000 steps, 1000 particles.

Of each method: the mean over 100 random directions of the 1-d Wasserstein distance between its samples and exact ones ("floor": that
of two sets of exact samples), and the error of log p(y). A problem's exact samples and directions are the same for all methods.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributions as dist

from pyrodiff import GaussianDiffusion, NoisyClassifier, TableSchedule
from pyrodiff.inference import LinearGaussian, Posterior, class_label, guided, mmps, pigdm, repaint, smc
from pyrodiff.inference.operators import mask, matrix
from pyrodiff.inference.resampling import systematic

CELLS = [(noise, d, d_y) for noise in (0.01, 0.1, 1.0) for d in (8, 80) for d_y in (1, 2, 4)]
FEW = [(0.1, 8, 1), (0.1, 8, 2), (1.0, 80, 1)]
SCALE = math.sqrt(1 + 128)  # the data's standard deviation: of the components, and of their means
BETAS = torch.linspace(1e-5, 0.02, 1000).double()

# The best mean of five methods (DPS, MCGDiff, PiGDM, TMPD, SMCDiffOpt), in the order of CELLS.
PUBLISHED = dict(
    zip(
        CELLS,
        [0.91, 0.22, 0.07, 0.76, 0.19, 0.06, 0.80, 0.17, 0.06, 1.14, 0.30, 0.07, 1.06, 0.49, 0.09, 1.07, 0.74, 0.70],
        strict=True,
    )
)
COLUMNS = (
    "method noise d d_y seed steps particles distance floor log_z_error ess families pareto_k evaluations backward warned"
).split()
OURS = ("bootstrap", "TDS+pigdm", "TDS+mmps", "MCGDiff+std", "DPS")

Row = dict[str, str]


class Mixture(nn.Module):
    """E[x_0 | x_t] for 25 unit Gaussians with means (-8i, -8j, -8i, ...), i and j in -2..2."""

    def __init__(self, d: int) -> None:
        super().__init__()
        i = torch.arange(-2.0, 3.0)
        self.register_buffer("means", -8 * torch.cartesian_prod(i, i).repeat(1, d // 2))
        self.like = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.calls = self.backward_calls = 0  # rows

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        alpha = log_snr.sigmoid().sqrt()[:, None]  # x_t given a component: N(alpha m, 1)
        share = torch.softmax(alpha * (x @ self.means.T) - alpha**2 * self.means.square().sum(1) / 2, 1)
        self.calls += len(x)
        if share.requires_grad:
            share.register_hook(self._count)
        return alpha * x + (1 - alpha**2) * (share @ self.means)

    def _count(self, gradient: Tensor) -> None:
        self.backward_calls += len(gradient)


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


def directions(d: int) -> Tensor:
    """100 random unit vectors, ``[d, 100]``."""
    return nn.functional.normalize(torch.randn(100, d), dim=1).double().T


def distance(x: Tensor, y: Tensor, slices: Tensor) -> float:
    """Sliced Wasserstein-1 of two sets of one size: sorted, point by point."""
    return float(((x.double() @ slices).sort(0).values - (y.double() @ slices).sort(0).values).abs().mean())


def quadratic(steps: int) -> list[int]:
    """That many of 1..1000, closer to each other where there is little noise."""
    kept: list[int] = []
    for i in range(steps):
        kept.append(max(round(1 + 999 * (i / max(steps - 1, 1)) ** 2), kept[-1] + 1 if kept else 1))
    return kept


def methods(
    diffusion: GaussianDiffusion,
    seen: LinearGaussian,
    n: int,
    steps: int | list[int],
    scale: float = SCALE,
    repeats: int = 1,
    threshold: float = 0.5,
) -> dict[str, Callable[[], Posterior]]:
    options = {"steps": steps, "batch_size": n * repeats}

    def heuristic(**more):
        return lambda: guided(diffusion, seen, n * repeats, **options, **more)

    def weighted(**more):
        return lambda: smc(diffusion, seen, n, repeats=repeats, threshold=threshold, **options, **more)

    return {
        "DPS": heuristic(),
        "PiGDM": heuristic(twist=pigdm(seen, scale)),
        "bootstrap": weighted(proposal="bootstrap"),
        "TDS": weighted(),
        "TDS+pigdm": weighted(twist=pigdm(seen, scale)),
        "TDS+mmps": weighted(twist=mmps(seen)),
        "MCGDiff": weighted(proposal="mcgdiff"),
        "MCGDiff+std": weighted(proposal="mcgdiff", data_std=scale),
    }


def solve(
    noise: float, d: int, d_y: int, seed: int, arguments: argparse.Namespace, done: set[tuple[str, ...]]
) -> Iterable[Row]:
    """A row for each method on one problem, but those that are done."""
    n, net = arguments.particles, Mixture(d)
    diffusion = GaussianDiffusion(net, TableSchedule(BETAS), (d,), "x0", variance=arguments.variance)
    kept = quadratic(arguments.steps)
    torch.manual_seed(seed)
    given = problem(net, noise, d, d_y)
    exact, other, slices = given.draw(n), given.draw(n), directions(d)
    ours = methods(diffusion, given.seen, n, kept, threshold=arguments.threshold)
    runs: dict[str, Callable[[], Posterior | Tensor]] = {name: ours[name] for name in arguments.methods}
    if arguments.azula:
        runs |= peers()(diffusion.reverse_kernel.respace(kept), given.seen, n, SCALE)
    for name, run in runs.items():
        row = dict(zip(COLUMNS, [name, noise, d, d_y, seed, arguments.steps, n], strict=False))
        if tuple(map(str, row.values())) in done:
            continue
        torch.manual_seed(seed)
        net.calls = net.backward_calls = 0
        found = run()
        samples = found if isinstance(found, Tensor) else even(found)
        row["distance"] = distance(exact, samples, slices) if samples.isfinite().all() else math.inf
        row["floor"] = distance(exact, other, slices)
        if isinstance(found, Posterior) and not found.no_evidence:
            row["log_z_error"] = float(found.log_evidence) - given.log_z
            row["ess"], row["families"] = float(found.ess[0, -1]), float(found.families)
            row["pareto_k"], row["warned"] = float(found.pareto_k.max()), int(bool(found.warnings))
        row |= {"evaluations": net.calls, "backward": net.backward_calls}
        yield {
            key: f"{row[key]:.4g}" if key in COLUMNS[7:13] and key in row else str(row.get(key, "")) for key in COLUMNS
        }


def peers():
    """azula's samplers, or what to do to have them."""
    try:
        from _azula import peers
    except ModuleNotFoundError as error:
        sys.exit(
            f"--azula: no module {error.name!r}; pip install --target peer --no-deps azula einops, and PYTHONPATH=peer"
        )
    return peers


def even(found: Posterior) -> Tensor:
    """As many equally weighted samples as particles; systematic, for the least noise of their own."""
    return found.particles[0][systematic(found.weights, torch.rand(found.weights.shape).double())[0]]


def table(path: Path) -> None:
    """What a file says: distances, differences to azula's on the same problems, errors of log p(y)."""
    import pandas as pd

    rows = pd.read_csv(path)
    if rows.steps.nunique() > 1:
        rows["method"] += ", " + rows.steps.astype(str)
    cell = ["noise", "d", "d_y"]
    found = rows.pivot(index=[*cell, "seed"], columns="method", values="distance")[rows.method.unique()]
    floor = rows.groupby([*cell, "seed"]).floor.first()
    best = pd.Series(PUBLISHED).rename_axis(cell)

    def show(name: str, statistic: Callable[[pd.Series], str], values: pd.DataFrame, **first: pd.Series) -> None:
        print(
            f"\n{name}\n\n|",
            " | ".join([*cell, *first, *values.columns]),
            "|\n|" + "---|" * (3 + len(first) + values.shape[1]),
        )
        texts = values.groupby(cell).agg(statistic)
        for place, row in texts.iterrows():
            known = [f"{series.loc[place]}" for series in first.values()]
            print("|", " | ".join([*(f"{x:g}" for x in place), *known, *row]), "|")

    known = best.map("{:.2f}".format)
    show(
        "Distance, mean ± two standard errors.",
        mean_and_error,
        found,
        published=known,
        floor=floor.groupby(cell).agg(mean_and_error),
    )
    show("Distance, median.", median, found, published=known, floor=floor.groupby(cell).agg(median))
    for ours in (name for name in found if name.startswith("TDS")):
        gap = found.filter(like="azula").dropna(how="all").sub(found[ours], axis=0)
        if len(gap.columns):
            show(f"How much further away azula's are than {ours}, on the same problems.", mean_and_error, gap)
            counts = (f"{name} on {(gap[name] > 0).sum()} of {gap[name].count()}" for name in gap)
            print(f"\nFurther away: {', '.join(counts)} problems.")

    print(
        "\n| method | problems of a cell | forward | backward | median error | Z-hat / Z | warned | off | silent |\n|"
        + "---|" * 9
    )
    for name, group in rows.groupby("method", sort=False):
        counts = group.groupby(cell).size()
        cells = [f"{counts.min()} to {counts.max()}", *(f"{group[c].mean():,.0f}" for c in ("evaluations", "backward"))]
        error, warned = group.log_z_error.dropna(), group.warned == 1
        if len(error):
            off = error.abs() > 0.5
            cells += [
                f"{error.abs().median():.3f}",
                mean_and_error(error.map(math.exp)),
                warned.sum(),
                off.sum(),
                (off & ~warned).sum(),
            ]
        print("|", name, "|", " | ".join(map(str, cells)), "|" + " |" * (8 - len(cells)))


def median(values) -> str:
    return "" if values.isna().all() else number(values.median())


def mean_and_error(values) -> str:
    """With two standard errors."""
    return "" if values.count() < 2 else f"{number(values.mean())} ± {number(2 * values.sem())}"


def number(x: float) -> str:
    return f"{x:.0e}" if abs(x) >= 1000 else f"{x:.2f}" if abs(x) >= 0.2 else f"{x:.3f}"


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
    print("| method | mean | variance | error of log p(y) | Z-hat / Z | families | s |\n|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    n, repeats = arguments.particles, arguments.repeats
    batch = {"batch_size": n * repeats, "seed": 0}
    rows = methods(diffusion, seen, n, 1000, 1.0, repeats) | {
        "DPS, eta = 0": lambda: guided(diffusion, seen, n * repeats, eta=0.0, **batch),
        "replacement": lambda: smc(diffusion, seen, n, proposal="replacement", repeats=repeats, **batch),
    }
    for name, run in rows.items():
        found = run()
        x, w = (v.double().view(arguments.repeats, -1) for v in (found.particles, found.log_weights))
        z, w = w.exp().mean(1) / math.exp(log_z), w.softmax(1)
        mean, mean_error = ratio(z, (w * x).sum(1))
        variance, variance_error = ratio(z, (w * (x - mean) ** 2).sum(1))
        cells = [f"{mean:.4f}{mean_error}", f"{variance:.4f}{variance_error}"]
        if found.no_evidence:
            cells += ["", "", ""]
        else:
            cells += [
                f"{math.log(z.mean()):.3f}",
                "{:.4f}{}".format(*ratio(torch.ones_like(z), z)),
                f"{float(found.families.mean()):.0f}",
            ]
        print("|", name, "|", " | ".join(cells), f"| {found.seconds:.1f} |", flush=True)


def ratio(weights: Tensor, values: Tensor) -> tuple[float, str]:
    """The weighted mean over repeats, and two standard errors, in words."""
    mean = (weights * values).sum() / weights.sum()
    error = (weights * (values - mean)).std() / weights.mean() / math.sqrt(len(values))
    return float(mean), f" ± {2 * float(error):.4f}" if len(values) > 1 else ""


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
    parser.add_argument("--cells", help="some of them, as 0.1,8,1:1,80,2")
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100, help="of the chain's 1000")
    parser.add_argument("--methods", nargs="*", default=OURS)
    parser.add_argument("--azula", action="store_true", help="azula's samplers beside them")
    parser.add_argument(
        "--csv", type=Path, help="gets a row for each run that it has not, of one threshold; default: a temporary file"
    )
    parser.add_argument("--table", type=Path, help="tables of such a file; nothing is run")
    parser.add_argument(
        "--threshold", type=float, default=0.8, help="resample below this share (the published SMCDiffOpt's 0.8)"
    )
    parser.add_argument("--variance", default="fixed_large")
    parser.add_argument("--gaussian", action="store_true", help="the Gaussian, in the mixture's place")
    parser.add_argument("--repeats", type=int, default=1, help="of the Gaussian, for standard errors")
    parser.add_argument("--guidance", action="store_true", help="every kind of guidance, in the mixture's place")
    arguments = parser.parse_args()
    if arguments.guidance:
        guidance(arguments)
        return
    if arguments.gaussian:
        gaussian(arguments)
        return
    if arguments.table:
        table(arguments.table)
        return
    cells = CELLS if arguments.all else FEW
    if arguments.cells:
        cells = [(float(a), int(b), int(c)) for a, b, c in (cell.split(",") for cell in arguments.cells.split(":"))]
    path = arguments.csv or Path(tempfile.mkdtemp()) / "posterior.csv"
    done = {tuple(row[key] for key in COLUMNS[:7]) for row in read(path)}
    for seed in range(arguments.problems):  # outermost: stopped early, a file has fewer problems of every cell
        for cell in cells:
            write(path, solve(*cell, seed, arguments, done))
    table(path)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
