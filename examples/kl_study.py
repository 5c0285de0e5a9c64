"""Analytic or Monte Carlo KL, one chain or random timesteps: a study of estimators of a diffusion's bound.

    python examples/kl_study.py                       # about an hour on two cores
    python examples/kl_study.py --data '[gaussian, mixture, digits]'
    python examples/kl_study.py --report_only true    # write the page and the pictures again from the tables

Four kinds of data (Gaussian, a mixture in the plane, scikit-learn's digits, Fashion-MNIST), models early, middle and late in
training, T from 10 to 1000, and three noise schedules with equal endpoints. The tables go to ``docs/kl_study/*.csv``, and from
them alone come the pictures and the page ``docs/kl_study.md``. Each section of the page is one function below: it states a
claim, the numbers for it, and whether they bear it out, so that a run with other numbers says so. Fashion-MNIST is left out,
with a word, where its files are missing (Debian: apt-get install dataset-fashion-mnist).
"""

from __future__ import annotations

import copy
import inspect
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from _common import command_line
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyrodiff
from pyrodiff import CosineSchedule, GaussianDiffusion, LinearSchedule, LogLinearSchedule, TableSchedule, draws, plots
from pyrodiff.errors import DataError
from pyrodiff.laboratory.budget import estimate_elbo
from pyrodiff.laboratory.gradients import compare_gradients
from pyrodiff.schedules import Schedule

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "runs" / "kl_study"
STAGES = ("early", "middle", "late")
SCHEDULES = ("log-linear", "linear", "cosine")
LENGTHS = (10, 100, 1000)
BASE = {"stage": "late", "schedule": "log-linear", "T": 100}
SEEN = {  # what to see in a picture, by the claim it belongs to or by its kind
    "along_the_chain": "above the gray line the log-ratio varies less than the analytic KL does. Both axes are logarithmic.",
    "drawing_the_timestep": "further left is cheaper; the gray line is one uniform timestep. The rows of importance lie far to the left.",
    "network_gradients": """on the left, one timestep, all estimators lie on one line but for the analytic KL, which comes below it.
On the right, whole chains, further left is better.""",
    "other_gradients": """a learned schedule above, data from an encoder below. The score function (green, pink, light blue) lies
mostly above the pathwise estimates (blue and orange) on the left, and to the right of them on the right.""",
    "estimators": """the further right a dot in the first column, the cheaper. In the last, dots outside of the gray band are biased; hollow
ones are so by construction.""",
    "timesteps": """data are on the left of each picture, noise on the right. First what each timestep adds to the bound; then its
variance, dashed for the Monte Carlo KL; then the sum so far.""",
}
COLOURS = {"gaussian": "#0072B2", "mixture": "#009E73", "digits": "#D55E00", "images": "#CC79A7"}

# ---------------------------------------------------------------------- models and data


@dataclass
class Subject:
    """A kind of data: its models by stage, the examples to score, and how much to draw.

    Attributes:
        models: a diffusion for each stage; the network sees log-SNR, so that any schedule between its endpoints fits it.
        x0: the examples, ``[B, *event]``.
        pool: many examples, for the bound of a data set.
        low, high: log-SNR at t = T and t = 1.
        repeats: draws of each all-timestep estimator, by T.
        exact: minus the exact ELBO of the examples under a schedule and stage, where it is known.
    """

    models: dict[str, GaussianDiffusion]
    x0: Tensor
    pool: Tensor
    low: float
    high: float
    repeats: dict[int, int]
    exact: Callable[[GaussianDiffusion], Tensor] | None = None


def schedule(kind: str, steps: int, low: float, high: float) -> Schedule:
    """A schedule of the named shape between the given endpoints of log-SNR."""
    if kind == "log-linear":
        return LogLinearSchedule(steps, low, high)
    shape = {"linear": LinearSchedule, "cosine": CosineSchedule}[kind](1000).log_snr(torch.arange(1, 1001))
    at = torch.linspace(0, 999, steps, dtype=torch.float64)
    before = at.long().clamp(max=998)
    value = shape[before] + (at - before) * (shape[before + 1] - shape[before])
    log_snr = low + (high - low) * (value - shape[-1]) / (shape[0] - shape[-1])
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), log_snr.sigmoid()])
    return TableSchedule(1 - alpha_bar[1:] / alpha_bar[:-1])


def with_schedule(diffusion: GaussianDiffusion, new: Schedule) -> GaussianDiffusion:
    """The same network and decoder under another schedule."""
    config = {k: v for k, v in diffusion.config.items() if k not in ("schedule", "event_shape")}
    other = GaussianDiffusion(diffusion.net, new, diffusion.event_shape, **config)
    if diffusion.reverse_kernel.decoder == "learned":
        other.reverse_kernel.log_scale = diffusion.reverse_kernel.log_scale
    return other


class LinearDenoiser(nn.Module):
    """E[x_0 | x_t] of data N(0, variance), times 1 + error: a model whose bound is known exactly."""

    def __init__(self, variance: float, error: float) -> None:
        super().__init__()
        self.variance, self.error = variance, error

    def gain(self, log_snr: Tensor) -> Tensor:
        """x0_hat = gain * x_t."""
        alpha2 = log_snr.sigmoid()
        return (1 + self.error) * alpha2.sqrt() * self.variance / (alpha2 * self.variance + 1 - alpha2)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return self.gain(log_snr)[:, None] * x


def linear_bound(diffusion: GaussianDiffusion, x0: Tensor) -> Tensor:
    """Minus the exact ELBO of a :class:`LinearDenoiser`, nats ``[B]``: every expectation is of a square of a Gaussian."""
    log_snr = diffusion.schedule.log_snr(torch.arange(1, diffusion.steps + 1))
    alpha2, sigma2 = log_snr.sigmoid(), (-log_snr).sigmoid()
    gain = diffusion.net.gain(log_snr)
    error = ((1 - gain * alpha2.sqrt()) * x0[..., None]) ** 2 + gain**2 * sigma2  # [B, D, T]
    weight = torch.diff(-log_snr.exp()) / 2  # (SNR_s - SNR_t) / 2: the variances of both laws are the same
    prior = 0.5 * (alpha2[-1] * x0**2 + sigma2[-1] - 1 - sigma2[-1].log())
    scale = sigma2[0] / alpha2[0]
    reconstruction = 0.5 * (2 * math.pi * scale).log() + error[..., 0] / (2 * scale)
    return (prior + (weight * error[..., 1:]).sum(-1) + reconstruction).sum(-1)


def gaussian(quick: bool) -> Subject:
    """Independent N(0, 1/4) in four dims, with the exact denoiser ("late") and two that err by a factor."""
    torch.manual_seed(0)
    pool = torch.randn(2000, 4, dtype=torch.float64) / 2
    low, high = -6.0, 6.0
    models = {
        stage: GaussianDiffusion(LinearDenoiser(0.25, error), LogLinearSchedule(100, low, high), (4,), prediction="x0")
        for stage, error in zip(STAGES, (0.3, 0.05, 0.0), strict=True)
    }
    repeats = {10: 512, 100: 256, 1000: 128}
    return Subject(models, pool[:16], pool, low, high, _few(repeats, quick), lambda d: linear_bound(d, pool[:16]))


def mixture(quick: bool) -> Subject:
    """Eight Gaussians on a circle, and an MLP."""
    torch.manual_seed(0)
    angle = torch.randint(8, (22000,)) * (2 * math.pi / 8)
    data = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(22000, 2)
    low, high = -6.0, 8.0
    net = pyrodiff.nets.MLP(2, width=128, depth=3)
    diffusion = GaussianDiffusion(net, LogLinearSchedule(1000, low, high), (2,), prediction="v")
    models = train("mixture", diffusion, data[:20000], (50, 250, 4000), quick, batch_size=256, lr=2e-3)
    return Subject(models, data[-2000:-1984], data[-2000:], low, high, _few({10: 512, 100: 128, 1000: 32}, quick))


def digits(quick: bool) -> Subject:
    """scikit-learn's 8x8 digits, and the UNet of the demo."""
    images = pyrodiff.load_data("digits")
    torch.manual_seed(0)
    net = pyrodiff.nets.UNet(
        1, width=24, multipliers=(1, 2), blocks=1, attention=(1,), resample="conv", fourier_features=(3, 4)
    )
    return _of_images("digits", net, images, -5.0, 6.5, (50, 300, 1800), quick)


def images(quick: bool) -> Subject:
    """Fashion-MNIST, 28x28, 256 levels, and a small UNet."""
    data = pyrodiff.load_data("fashion-mnist")
    torch.manual_seed(0)
    net = pyrodiff.nets.UNet(
        1, width=16, multipliers=(1, 2, 2), blocks=1, attention=(2,), resample="conv", fourier_features=(5, 6)
    )
    return _of_images("images", net, data, -5.0, 9.0, (50, 150, 600), quick)


def _of_images(
    name: str, net: nn.Module, data: object, low: float, high: float, steps: tuple[int, ...], quick: bool
) -> Subject:
    net = net.to(memory_format=torch.channels_last)
    diffusion = GaussianDiffusion(
        net, LogLinearSchedule(1000, low, high), data.event_shape, prediction="v", decoder="learned", bins=data.bins
    )
    models = train(name, diffusion, data.train, steps, quick, batch_size=64, lr=3e-3)
    pool = torch.cat([data.train, data.validation, data.test])
    examples = 4 if name == "images" else 8
    return Subject(models, data.test[:examples], pool, low, high, _few({10: 64, 100: 16, 1000: 8}, quick))


def train(
    name: str, diffusion: GaussianDiffusion, data: Tensor, steps: tuple[int, ...], quick: bool, **options: float
) -> dict[str, GaussianDiffusion]:
    """Models after so many optimiser steps, each stage going on from the last; those in ``runs/kl_study`` are taken from there."""
    models, done = {}, 0
    for stage, end in zip(STAGES, steps, strict=True):
        folder = MODELS / f"{name}-{stage}"
        if not quick and (folder / "model.safetensors").is_file():
            models[stage], done = pyrodiff.load(folder), end
            diffusion.load_state_dict(models[stage].state_dict())
            continue
        count = max(2, (end - done) // (500 if quick else 1))
        pyrodiff.fit(
            diffusion, data, steps=count, seed=end, warmup=min(50, count), ema_decay=0.998, timesteps="importance",
            weight_decay=0.01, device="cpu", progress=sys.stderr.isatty(), **options,
        )  # fmt: skip
        models[stage], done = copy.deepcopy(diffusion), end
        if not quick:
            pyrodiff.save(folder, diffusion)
    return models


def _few(repeats: dict[int, int], quick: bool) -> dict[int, int]:
    return dict.fromkeys(repeats, 8) if quick else repeats


SUBJECTS = {"gaussian": gaussian, "mixture": mixture, "digits": digits, "images": images}

# ---------------------------------------------------------------------- measurements


def cases(quick: bool) -> Iterator[dict[str, object]]:
    """The base case, and what differs from it in one respect."""
    lengths = (5, 10) if quick else LENGTHS
    base = {**BASE, "T": lengths[-1] if quick else BASE["T"]}
    for T in lengths:
        yield {**base, "T": T}
    for stage in STAGES[:-1]:
        yield {**base, "stage": stage}
    for kind in SCHEDULES[1:]:
        yield {**base, "schedule": kind}


def measure(name: str, subject: Subject, out: Path, quick: bool) -> None:
    """Every table of one kind of data."""
    values, terms = [], []
    for case in cases(quick):
        started = time.monotonic()
        model = with_schedule(
            subject.models[case["stage"]], schedule(case["schedule"], case["T"], subject.low, subject.high)
        )
        exact = None if subject.exact is None else subject.exact(model)
        repeats = subject.repeats.get(case["T"], 8)
        found = pyrodiff.compare_estimators(
            model, subject.x0, exact=exact, repeats=repeats, iwae=(1, 4, 16), controls=True, gradients=None, batch_size=256,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
        values.append(found.values.assign(data=name, **case, dims=model.event_shape.numel(), repeats=repeats))
        terms.append(found.timesteps.assign(data=name, **case))
        print(f"{name}, {case}: {time.monotonic() - started:.0f} s", flush=True)
    pd.concat(values).to_csv(out / f"values-{name}.csv", index=False, float_format="%.6g")
    pd.concat(terms).query("T <= 100").to_csv(out / f"timesteps-{name}.csv", index=False, float_format="%.6g")


def bound_of_the_data(name: str, subject: Subject, out: Path, quick: bool) -> None:
    """The mean bound of a pool of images by the T-step loop, and by :func:`~pyrodiff.estimate_elbo` to the same error.

    The loop runs on a few images, twice, which gives its variance over noise and the limit of what choosing timesteps can
    gain; the variance between images comes from the many images of the estimate.
    """
    T, few, many = (20, 4, 100) if quick else (1000, 24, 600)
    model = with_schedule(subject.models["late"], schedule("log-linear", T, subject.low, subject.high))
    pool = subject.pool[torch.randperm(len(subject.pool), generator=torch.Generator().manual_seed(0))]
    unit = model.event_shape.numel() * math.log(2)
    loop = draws.independent(model, pool[:few], 2).terms.analytic / unit
    totals, v = loop.sum(-1), loop[..., :-1].var(0).mean(0)
    between = float(torch.cov(totals)[0, 1])
    found = estimate_elbo(model, pool, math.sqrt((between + float(v.sum())) / many))
    between = found.images * (found.se_examples**2 - found.se_noise**2)
    evaluations = T * (between + float(v.sum())) / found.se_examples**2
    row = {
        "data": name, "pool": len(pool), "T": T, "loop: mean of a few": float(totals.mean()), "mean": found.mean,
        "se_examples": found.se_examples, "se_noise": found.se_noise, "images": found.images,
        "evaluations": found.network_evaluations, "loop: evaluations": evaluations,
        "gain": evaluations / found.network_evaluations, "gain in noise": found.noise_gain,
        "limit by choice of t": T * float(v.sum()) / float(v.sqrt().sum()) ** 2, "seconds": found.seconds,
    }  # fmt: skip
    pd.DataFrame([row]).to_csv(out / f"bound-{name}.csv", index=False, float_format="%.6g")
    print(found, flush=True)


class LearnedSchedule(Schedule):
    """Log-SNR between fixed endpoints, by free steps; starts as log-linear."""

    def __init__(self, steps: int, low: float, high: float) -> None:
        super().__init__()
        self.steps, self.low, self.high = steps, low, high
        self.drops = nn.Parameter(torch.zeros(steps - 1, dtype=torch.float64))

    def log_snr(self, t: int | Tensor) -> Tensor:
        """Falls by a softmax's share of the range in every step."""
        fallen = torch.cat([self.drops.new_zeros(1), self.drops.softmax(0).cumsum(0)])
        values = self.high - (self.high - self.low) * fallen
        return torch.cat([values.new_tensor([math.inf]), values])[torch.as_tensor(t)]


def gradients(subject: Subject, out: Path, quick: bool) -> None:
    """Gradient estimators of the mixture's model: of its network; of a schedule, data from an encoder, and a reward of samples."""
    repeats, T = (2, 3) if quick else (100, 10)
    timesteps = (1, T) if quick else (1, 2, 5, 10)
    tables = []
    for stage in STAGES[-1:] if quick else STAGES:
        model = with_schedule(subject.models[stage], schedule("log-linear", T, subject.low, subject.high))
        found = compare_gradients(model, subject.x0, timesteps=timesteps, repeats=repeats, progress=sys.stderr.isatty())
        tables.append(found.assign(question="network", stage=stage))
    model = with_schedule(subject.models["late"], LearnedSchedule(T, subject.low, subject.high))
    found = compare_gradients(
        model, subject.x0.clone().requires_grad_(), timesteps=timesteps, repeats=repeats, progress=sys.stderr.isatty(),
        reward=lambda x: -(x - x.new_tensor([1.0, 0.0])).square().sum(-1),
    )  # fmt: skip
    tables.append(found.assign(question="schedule, encoder, samples", stage="late"))
    pd.concat(tables).to_csv(out / "gradients.csv", index=False, float_format="%.6g")


# ---------------------------------------------------------------------- claims


class Tables:
    """What was measured, by name of file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values, self.terms, self.bounds = (self._all(kind) for kind in ("values", "timesteps", "bound"))
        path = folder / "gradients.csv"
        self.gradients = pd.read_csv(path) if path.is_file() else None
        self.data = [name for name in SUBJECTS if name in set(self.values.data)]

    def _all(self, kind: str) -> pd.DataFrame:
        found = [pd.read_csv(path, keep_default_na=True) for path in sorted(self.folder.glob(f"{kind}-*.csv"))]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    def of(self, table: pd.DataFrame, name: str, stage: str, kind: str) -> pd.DataFrame:
        """The rows of one kind of data, stage and schedule."""
        return table[(table.data == name) & (table.stage == stage) & (table.schedule == kind)]

    def pick(self, name: str, path: str, kl: str, **case: object) -> pd.Series:
        """One estimator of one case: the base case, but for ``case``."""
        T = int(self.values["T"][(self.values["T"] - BASE["T"]).abs().idxmin()]) if "T" not in case else case["T"]
        case = {**BASE, "T": T, **case}
        table = self.values[(self.values.data == name) & (self.values.path == path) & (self.values.kl == kl)]
        for key, value in case.items():
            table = table[table[key] == value]
        return table.iloc[0]


Claim = Callable[[Tables], tuple[str, str, bool | None, Figure | None]]
CLAIMS: list[Claim] = []


def claim(function: Claim) -> Claim:
    """A section of the page: title, text with a table, whether the numbers bear it out (None: no yes or no), a picture."""
    CLAIMS.append(function)
    return function


def markdown(table: pd.DataFrame) -> str:
    """A table, numbers to three digits."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.3g}"
        return str(value)

    rows = [
        list(table.columns),
        ["---"] * len(table.columns),
        *([cell(v) for v in row] for row in table.itertuples(index=False)),
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


@claim
def one_random_timestep(t: Tables) -> tuple[str, str, bool, Figure | None]:
    rows = []
    for name in t.data:
        a, k = (t.pick(name, "uniform, 1", kl) for kl in ("analytic", "k1"))
        p, q = (t.pick(name, "importance, 1", kl) for kl in ("analytic", "k1"))
        rows.append({
            "data": name, "uniform t: analytic": a.variance, "k1": k.variance, "k1 / analytic": k.variance / a.variance,
            "importance t: analytic": p.variance, "k1 ": q.variance, "k1 / analytic ": q.variance / p.variance,
        })  # fmt: skip
    table = pd.DataFrame(rows)
    holds = bool((table["k1 / analytic"] > 1).all() and (table["k1 / analytic "] > 1).all())
    text = f"""For one random timestep the analytic KL is the conditional expectation of the Monte Carlo one given x_t, so that its
variance is never larger (Rao-Blackwell). Variance of minus the bound per example, nats squared, late model, T = 100:

{markdown(table)}

Once the timestep is drawn well (by importance; p(t) is that of the analytic terms for both), little but the KL's own noise is left,
and the difference grows to {table["k1 / analytic "].min():.0f} to {table["k1 / analytic "].max():.0f} times."""
    return "At one random timestep, take the analytic KL", text, holds, None


@claim
def along_the_chain(t: Tables) -> tuple[str, str, bool, Figure | None]:
    rows = []
    for name in t.data:
        for case in [{"stage": s} for s in STAGES] + [{"T": T} for T in LENGTHS if T in set(t.values["T"])]:
            try:
                a, k, c = (t.pick(name, "chain", kl, **case) for kl in ("analytic", "k1", "analytic + c N"))
            except IndexError:
                continue
            rows.append({
                "data": name, "stage": case.get("stage", "late"), "T": int(a["T"]), "analytic": a.variance, "k1": k.variance,
                "analytic / k1": a.variance / k.variance, "analytic + c N": c.variance, "c": str(c.reason).removeprefix("c = "),
            })  # fmt: skip
    table = pd.DataFrame(rows).drop_duplicates(["data", "stage", "T"])
    late = table[(table.stage == "late") & (table["T"] >= 100)]
    holds = bool(
        (late["analytic / k1"] > 1).all()
        and (late["analytic + c N"] < 1.05 * late[["analytic", "k1"]].min(axis=1)).all()
    )
    text = f"""Along one chain the errors of the Monte Carlo log-ratios cancel as the model approaches the posterior: their sum tends
to the constant -log p(x_0), while the analytic KLs keep the noise of the states they are evaluated at. Their sum is *not* a
conditional expectation of the other, and Rao-Blackwell says nothing. Variance per example, nats squared:

{markdown(table)}

The ratio analytic / k1 lies between {table["analytic / k1"].min():.2g} and {table["analytic / k1"].max():.3g}. The combination
KL + c N (N is the sum of log-ratio less KL, of mean zero at every step) is at least as good as either, within its fit's error, for
the price of one regression over the draws at hand; c near 1 says "Monte Carlo", c near 0 "analytic"."""
    figure = Figure(figsize=(6.5, 3.2), dpi=200, layout="constrained")
    axes = figure.subplots()
    for name in t.data:
        part = table[(table.data == name) & (table.stage == "late")].sort_values("T")
        axes.plot(part["T"], part["analytic / k1"], marker="o", color=COLOURS[name], label=name)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="T",
        ylabel="variance: analytic / Monte Carlo",
        title="Along one chain, late model",
    )
    axes.legend(frameon=False)
    return "Along one chain, take the log-ratio, or combine the two", text, holds, figure


@claim
def one_chain_or_many_states(t: Tables) -> tuple[str, str, bool, Figure | None]:
    rows = []
    for name in t.data:
        ways = [
            ("chain", "analytic"),
            ("chain", "k1"),
            ("chain", "analytic + c N"),
            ("independent", "analytic"),
            ("independent", "k1"),
        ]
        rows.append({"data": name} | {f"{p}, {k}": t.pick(name, p, k).variance for p, k in ways})
        pair = t.pick(name, "independent, antithetic", "analytic")
        rows[-1]["antithetic pair x 2"] = 2 * pair.variance
    table = pd.DataFrame(rows)
    holds = (table["independent, analytic"] < table["chain, analytic"]) & (
        table["chain, k1"] < table["independent, k1"]
    )
    holds = bool(holds.all())
    longest = max(set(t.values["T"]))
    ways = (("chain", "k1"), ("independent", "analytic"))
    ratio = {n: [t.pick(n, p, k, T=longest).variance for p, k in ways] for n in t.data}
    text = ", ".join(f"{n} {b / a:.2g}" for n, (a, b) in ratio.items())
    text = f"""With all T timesteps at the same cost, states drawn apart have independent errors; along a chain neighbouring states
share theirs, and analytic KLs add them up. Variance per example, late model, T = 100:

{markdown(table)}

With analytic KLs draw the states apart (as guided-diffusion's loop does); with log-ratios walk the chain (as Pyro's program
does). Of these two the chain's log-ratios are the better, and the more so the longer the chain: at T = {longest} the variance of
independent states with analytic KLs is so many times theirs: {text}.

Antithetic noise (eps and -eps) pays only where its last column, which charges for the second evaluation, is below
"independent, analytic"."""
    return "Analytic KLs want independent states, log-ratios want the chain", text, holds, None


@claim
def drawing_the_timestep(t: Tables) -> tuple[str, str, bool, Figure | None]:
    names = [
        f"{p}, {c}"
        for c in (1, 16)
        for p in ("uniform", "low discrepancy", "importance", "importance, low discrepancy")
    ]
    rows = []
    for name in t.data:
        row: dict[str, object] = {"data": name}
        for path in names:
            try:
                e = t.pick(name, path, "analytic")
            except IndexError:
                continue
            row[path] = e.variance * e.evaluations
        row["all timesteps"] = (lambda e: e.variance * e.evaluations)(t.pick(name, "independent", "analytic"))
        rows.append(row)
    table = pd.DataFrame(rows)
    best, gain = table["importance, low discrepancy, 1"], table["uniform, 1"] / table["importance, 1"]
    holds = bool(((best < table["uniform, 1"]) & (best < table["all timesteps"])).all())
    text = f"""Which timestep is drawn decides most of the variance. Variance x network evaluations (what one evaluation's worth of
variance costs; its inverse is the efficiency), analytic KLs, late model, T = 100:

{markdown(table)}

Probabilities in proportion to the root mean square of each term come from a pilot of 32 draws of every term, once per model.
They divide the cost of uniform timesteps by {gain.min():.3g} to {gain.max():.3g}. Spread evenly over the batch ("low discrepancy") they
are cheaper than all timesteps at once; drawn at random they are not always."""
    figure = Figure(figsize=(6.5, 3.4), dpi=200, layout="constrained")
    axes = figure.subplots()
    shown = [n for n in names if n in table.columns] + ["all timesteps"]
    for i, (_, row) in enumerate(table.iterrows()):
        at = [j + 0.18 * (i - (len(table) - 1) / 2) for j in range(len(shown))]
        axes.plot([row[n] / row["uniform, 1"] for n in shown], at, "o", color=COLOURS[row.data], label=row.data)
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="variance x evaluations, relative to one uniform timestep",
        yticks=range(len(shown)),
        yticklabels=shown,
    )
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return "Draw timesteps by importance", text, holds, figure


@claim
def k2_and_k3(t: Tables) -> tuple[str, str, bool, Figure | None]:
    rows = []
    for name in t.data:
        row: dict[str, object] = {"data": name}
        for kl in ("k1", "k2", "k3"):
            e = t.pick(name, "chain", kl)
            row |= {f"{kl} bias": e.bias, f"{kl} z": e.z, f"{kl} variance": e.variance}
        rows.append(row)
    table = pd.DataFrame(rows)
    holds = bool((table["k2 z"].abs() > 4).all() and (table["k3 variance"] > table["k1 variance"]).all())
    text = f"""Of a log-ratio r, k1 = r and k3 = exp(-r) - 1 + r are unbiased, k2 = r^2 / 2 is not. k3 is never negative, for which it is
liked elsewhere; along a diffusion's chain its exponential of a sum over all dims is heavy-tailed. Late model, T = 100,
bias against the exact value or the best unbiased estimator, nats:

{markdown(table)}

A sample mean with heavy tails is too small most of the time, and its standard error with it: a large negative z of k3 is that,
not a bias of the estimator, which quadrature confirms to be unbiased (`tests/test_value_estimators.py`)."""
    return "k2 is biased, and k3 does not pay", text, holds, None


@claim
def schedules(t: Tables) -> tuple[str, str, bool, Figure | None]:
    rows = []
    for name in t.data:
        for kind in SCHEDULES:
            one, every = (t.pick(name, path, "analytic", schedule=kind) for path in ("uniform, 1", "independent"))
            best = t.pick(name, "importance, 1", "analytic", schedule=kind)
            scale = (one.dims * math.log(2)) ** -1
            rows.append({
                "data": name, "schedule": kind, "bits/dim": every["mean"] * scale,
                "var(bits/dim), uniform t": one.variance * scale**2, "importance t": best.variance * scale**2,
            })  # fmt: skip
    table = pd.DataFrame(rows)
    drawn = table["var(bits/dim), uniform t"] / table["importance t"]
    spread = table.groupby("data")["var(bits/dim), uniform t"].agg(lambda v: v.max() / v.min())
    after = table.groupby("data")["importance t"].agg(lambda v: v.max() / v.min())
    holds = bool(drawn.min() > after.max())
    text = f"""The same network under three schedules with equal endpoints, T = 100. What a schedule does between its ends
decides the bound of a short chain, and how much one uniform timestep varies; as steps become many only the second remains (VDM,
section 5.1 and its figure 4b, where the spread over schedules is 60-fold):

{markdown(table)}

Between schedules, the variance at uniform timesteps differs by a factor of {spread.min():.2g} to {spread.max():.2g}; with
importance-sampled timesteps by {after.min():.2g} to {after.max():.2g}. Drawing t by importance divides it by {drawn.min():.2g} to
{drawn.max():.4g} under any of them, which is more than choosing among them does."""
    return "A schedule's shape is a way of drawing timesteps", text, holds, None


@claim
def tighter_bounds(t: Tables) -> tuple[str, str, bool, Figure | None]:
    rows = []
    for name in t.data:
        for T in sorted(set(t.values["T"])):
            row: dict[str, object] = {"data": name, "T": T}
            for k in (1, 4, 16):
                try:
                    row[f"K = {k}"] = t.pick(name, "chain", f"IWAE {k}", T=T)["mean"]
                except IndexError:
                    row[f"K = {k}"] = math.nan
            rows.append(row)
    table = pd.DataFrame(rows)
    short, longer = (table[table["T"] == T].set_index("data") for T in LENGTHS[:2])
    holds = bool((longer["K = 1"] < short["K = 16"]).all())  # 100 evaluations against 160
    text = f"""Importance-weighted bounds of K whole chains, minus the bound in nats per example, late models:

{markdown(table)}

They cost K T network evaluations, and gain most where T is small and the chain itself is loose; more timesteps are the
cheaper way to a tighter bound: one chain of 100 steps beats 16 of 10. Empty cells: fewer than 2 K chains were drawn."""
    return "More chains tighten the bound; more timesteps do it for less", text, holds, None


@claim
def controls(t: Tables) -> tuple[str, str, bool, Figure | None]:
    rows = []
    for name in t.data:
        wrong = [
            e for e in sorted(set(t.values.path[t.values.data == name])) if e.endswith("normalised") or "forward" in e
        ]
        rows += [
            {"data": name, "estimator": f"{p}; analytic", **t.pick(name, p, "analytic")[["bias", "z"]]} for p in wrong
        ]
        rows.append(
            {
                "data": name,
                "estimator": "chain, forward order; k1",
                **t.pick(name, "chain, forward order", "k1")[["bias", "z"]],
            }
        )
    table = pd.DataFrame(rows)
    biased = ~table.estimator.str.contains("k1")
    holds = bool((table.z[biased].abs() > 4).all() and (table.z[~biased].abs() < 4.5).all())
    text = f"""Two mistakes that give a plausible number: importance weights divided by their mean, and a guide that runs forwards with
analytic KLs (Pyro warns about the order, with its validation on). The laboratory's bias column, against the exact value
where there is one and the best unbiased estimator elsewhere:

{markdown(table)}

The forward guide is right by Monte Carlo: both factorisations are of one joint law."""
    return "Wrong estimators are found out", text, holds, None


def by_timestep(table: pd.DataFrame) -> str:
    """Variances of gradient estimators, a column for each timestep; and why some have none."""
    has = table[table.variance.notna()]
    wide = has.assign(column="t = " + has.t.astype(float).map("{:.0f}".format)).pivot(
        index="estimator", columns="column", values="variance"
    )
    order = [c for c in dict.fromkeys("t = " + has.t.astype(float).map("{:.0f}".format))]
    wide = wide.loc[list(dict.fromkeys(has.estimator)), order].reset_index()
    lines = [markdown(wide)]
    for reason, rows in table[table.variance.isna()].groupby("reason"):
        lines.append(f"\nNo number for {', '.join(dict.fromkeys(rows.estimator))}: {reason}.")
    return "\n".join(lines)


@claim
def network_gradients(t: Tables) -> tuple[str, str, bool | None, Figure | None]:
    if t.gradients is None:
        return "The network's gradient", "Not measured in this run.", None, None
    net = t.gradients[(t.gradients.question == "network") & (t.gradients.group == "net")]
    one, chain = net[net["where"] == "one timestep"], net[(net["where"] == "chain") & net.variance.notna()]
    scores = one[one.estimator.str.contains("score|sticking") & one.variance.notna()]
    wide = chain.pivot(index="estimator", columns="stage", values="variance")
    wide = wide[[stage for stage in STAGES if stage in wide]]
    wide = wide.loc[list(dict.fromkeys(chain.estimator))].reset_index()
    text = f"""With a fixed schedule the guide has no parameters: x_t depends on nothing that is learned. The network's gradient by
`rsample` and by `sample` is then the same number at the same noise; the largest difference measured is
{scores.same_noise.abs().max():.1g}. Notes that say the network's gradient dies with `sample` are wrong about a diffusion. Sticking
the landing has nothing to stick to, and a baseline nothing to reduce. What matters is the KL. Mixture, late model, T = 10,
variance of the gradient of L_(t-1), summed over the network's parameters:

{by_timestep(one[one.stage == "late"])}

Along the whole chain, by stage of training; as for the values, the log-ratios' errors cancel:

{markdown(wide)}"""
    figure = plots.gradients(net[net.stage == "late"].reset_index(drop=True))
    return (
        "The network's gradient does not care how x_t was drawn",
        text,
        bool((scores.same_noise.abs() == 0).all()),
        figure,
    )


@claim
def other_gradients(t: Tables) -> tuple[str, str, bool | None, Figure | None]:
    if t.gradients is None:
        return "Where reparameterisation matters", "Not measured in this run.", None, None
    table = t.gradients[t.gradients.question != "network"]
    one = table[table["where"] == "one timestep"]
    rest = table[(table["where"] != "one timestep") & table.variance.notna()]
    path = one[one.estimator == "pathwise, Monte Carlo KL"].set_index(["group", "t"]).variance
    score = one[one.estimator == "score function"].set_index(["group", "t"]).variance
    masked = one[one.estimator == "score function, x_t masked"].z.abs()
    ratio = (score / path).sort_index().drop("net", level="group")
    text = f"""A learned schedule, data that come from an encoder, and a reward of samples reach the states themselves. There the score
function varies {ratio.min():.2g} to {ratio.max():.2g} times as much as the pathwise gradient at one timestep. Mixture, late model,
T = 10; first the schedule:

{by_timestep(one[one.group == "schedule"])}

x_0 from an encoder:

{by_timestep(one[one.group == "x0"])}

The whole chain, importance-weighted chains, and the gradient of a reward through samples of the reverse chain:

{markdown(rest[["where", "group", "estimator", "norm", "variance", "unbiased", "z"]])}

"score function, x_t masked" is what one gets by forcing `sample` on Pyro's one-timestep program, whose x_t is masked: a biased
estimator, with z up to {masked.max():.3g} (and below 2 where the bias is small). Sticking the landing pays for x_0 at the noisiest step
and not elsewhere: data and a schedule are in both laws, and part of what it drops would have cancelled."""
    figure = plots.gradients(table[table.group != "net"].reset_index(drop=True))
    return "Where reparameterisation matters", text, bool((ratio > 1).mean() > 0.5), figure


@claim
def whole_data_sets(t: Tables) -> tuple[str, str, bool | None, Figure | None]:
    if t.bounds.empty:
        return "The bound of a data set", "Not measured in this run.", None, None
    table = t.bounds
    text = f"""The T-step loop evaluates every timestep of every image it uses. At an equal standard error over images it is far
cheaper to take more images and a few importance-sampled timesteps of each, with a Wiener filter's error as control variate
(`pyrodiff elbo RUN --se 0.02`). `gain` is the ratio of network evaluations, the pilot included, at equal `se_examples`; `gain in noise`
what is gained in the noise alone per evaluation of the sample, beside the most that the choice of timesteps alone can gain,
T sum(v_t) / (sum sqrt(v_t))^2 (Cauchy-Schwarz; a control variate can exceed it). Bits per dim:

{markdown(table)}"""
    return "The bound of a data set takes few evaluations", text, bool((table.gain >= 50).all()), None


# ---------------------------------------------------------------------- the page


def picture(text: str, out: Path, name: str) -> list[str]:
    """Lines of the page that show a picture."""
    return [f"![{text}]({out.name}/{name}.png)", "", f"*What to see: {SEEN[name.split('-')[0]]}*", ""]


def report(out: Path) -> Path:
    """Write the page and its pictures from the tables."""
    tables = Tables(out)
    about = (out / "about.txt").read_text(encoding="utf-8").strip()
    lines = [
        "# A study of estimators", "",
        "<!-- Written by examples/kl_study.py: edit that. -->", "",
        "Every number and picture here comes from `python examples/kl_study.py`; the tables behind them are the CSV files in",
        f"[`{out.name}/`]({out.name}). Each section names the function that makes it. " + about, "",
        "Variances are of minus the bound for one example, in nats squared, over noise and timesteps; an estimator's cost is its",
        "network evaluations. Data: " + ", ".join(f"**{n}** ({' '.join(inspect.getdoc(SUBJECTS[n]).split())})" for n in tables.data), "",
        "## In short", "",
        *recommendations(tables), "",
    ]  # fmt: skip
    quick = not set(LENGTHS) <= set(tables.values["T"])
    for function in CLAIMS:
        if quick and function is tighter_bounds:  # compares lengths that a quick run leaves out
            continue
        title, text, holds, figure = function(tables)
        line = inspect.getsourcelines(function)[1]
        verdict = {
            True: "The numbers bear this out.",
            False: "**The numbers of this run do not bear this out in every row.**",
            None: "",
        }[holds]
        lines += [f"## {title}", "", text, ""]
        if figure is not None:
            plots.save(figure, out / f"{function.__name__}.png")
            lines += picture(title, out, function.__name__)
        lines += [f"{verdict} ([`{function.__name__}`](../examples/kl_study.py#L{line}))".strip(), ""]
    for name in tables.data:
        base = tables.of(tables.values, name, "late", "log-linear")
        base = base[(base["T"] - BASE["T"]).abs() == (base["T"] - BASE["T"]).abs().min()]
        plots.save(plots.estimators(base.reset_index(drop=True)), out / f"estimators-{name}.png")
        lines += [f"## All estimators: {name}", "", *picture(f"All estimators, {name}", out, f"estimators-{name}")]
        terms = tables.of(tables.terms, name, "late", "log-linear")
        terms = terms[terms["T"] == terms["T"].max()]
        plots.save(plots.timesteps(terms.reset_index(drop=True), x="log_snr"), out / f"timesteps-{name}.png")
        lines += picture(f"Each timestep, {name}", out, f"timesteps-{name}")
    page = out.with_suffix(".md")
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return page


def recommendations(t: Tables) -> list[str]:
    """Which estimator when, with the numbers."""

    def ratios(above: tuple[str, str], below: tuple[str, str]) -> str:
        found = [t.pick(n, *above).variance / t.pick(n, *below).variance for n in t.data]
        return f"{min(found):.3g} to {max(found):.3g}"

    uniform, drawn, combined = ("uniform, 1", "analytic"), ("importance, 1", "analytic"), ("chain", "analytic + c N")
    return [
        "* **Training, or any random timestep**: analytic KL, importance-sampled t. Importance divides the variance of uniform t by"
        f" {ratios(uniform, drawn)}; the Monte Carlo KL would multiply it by {ratios(('importance, 1', 'k1'), drawn)}.",
        "* **A whole chain** (Pyro's program without t, all timesteps of an image, importance weights): log-ratios, or their best"
        f" combination with the analytic KLs, which divides the variance of analytic KLs along the chain by"
        f" {ratios(('chain', 'analytic'), combined)}, and that of analytic KLs at states drawn apart by"
        f" {ratios(('independent', 'analytic'), combined)} (more in longer chains).",
        "* **The mean over a data set**: many images, few timesteps of each: `pyrodiff elbo RUN --se 0.02`.",
        "* **Gradients of the network**: the same by `sample` and `rsample`; analytic KLs at one timestep, log-ratios along a chain.",
    ]


def main(
    data: tuple[Literal["gaussian", "mixture", "digits", "images"], ...] = tuple(SUBJECTS),
    out: Path = ROOT / "docs" / "kl_study",
    quick: bool = False,
    report_only: bool = False,
) -> None:
    """Measure, and write the page.

    Args:
        data: the kinds of data.
        out: folder of the tables and pictures; the page is beside it.
        quick: tiny sizes.
        report_only: write the page and the pictures again, from the tables.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not report_only:
        started = time.monotonic()
        for name in data:
            try:
                subject = SUBJECTS[name](quick)
            except DataError as error:
                print(f"{name} left out: {error}")
                continue
            print(f"{name}: models after {time.monotonic() - started:.0f} s", flush=True)
            measure(name, subject, out, quick)
            if name in ("digits", "images"):
                bound_of_the_data(name, subject, out, quick)
            if name == "mixture":
                gradients(subject, out, quick)
        about = (
            f"Measured on {platform.machine()} with {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        )
        about += f"pyrodiff {pyrodiff.__version__}."
        (out / "about.txt").write_text(about + "\n", encoding="utf-8")
    print(report(out))


def smoke(folder: Path) -> dict[str, Any]:
    """A setting of seconds."""
    return {"data": ("gaussian", "mixture"), "quick": True, "out": folder / "study"}


if __name__ == "__main__":
    command_line(main, smoke)
