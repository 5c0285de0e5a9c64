r"""Gaps in a day of glucose readings, filled in under a sensor of unknown noise: a learned prior, and a Gaussian process beside it.

    pip install bokeh-sampledata scikit-learn        # the readings; the baseline
    python examples/glucose.py                       # about two core-minutes; writes examples/results/glucose

The readings are those of one wearer of a continuous glucose monitor, one in five minutes for 200 days. A day is 96 means over 15
minutes of the logarithm, less the wearer's mean at that time of day: x. Of a test day we are told

.. math:: y_i = x_i + \sigma \epsilon_i, \qquad \log \sigma \sim N(\log 0.1, 0.5^2),

a sensor's error of about 10 %, except in three gaps of 1, 2 and 4 hours, and ask for the readings in the gaps. What is inferred is
the joint law of x and sigma, with the prior of x once a Gaussian process and once a diffusion:

* **svi**: ``bound`` and a Gaussian guide of each day, in the coordinates of the Gaussian process's answer, where it starts.
* **smc**, for a few of the days: sigma by quadrature. Its marginal likelihood is the evidence that sequential Monte Carlo estimates
  without bias, so that the particles of all nodes, by their weights, are those of the joint posterior. They are steered by the
  Gaussian process's covariance: a twist, which changes how many particles are of use and not what they estimate.

The first 55 % of the time trains, the next 15 % validates, the rest is tested; no window crosses a border. Draws are scored in mg/dL
by CRPS (Gneiting and Raftery, 2007, eq. 21), and by how often an interval of 90 % holds the reading.
"""

from __future__ import annotations

import csv
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from _common import command_line
from numpy.typing import NDArray
from pyro.distributions import LogNormal, MultivariateNormal, Normal, constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn

import pyrodiff
from pyrodiff import GaussianDiffusion, LogLinearSchedule, nets
from pyrodiff.inference import DiffusionPrior, bound
from pyrodiff.inference.observe import observation
from pyrodiff.inference.proposals import Twist
from pyrodiff.inference.smc import Posterior, smc

Array = NDArray[np.float64]

RESULTS = Path(__file__).resolve().parent / "results" / "glucose"
POINTS = 96  # of a day, one in 15 minutes
HOURS = np.arange(POINTS)[:, None] / 4
GAPS = (4, 8, 16)  # of 1, 2 and 4 hours
ENDS = (0.55, 0.70)  # of training and of validation, as shares of the time
NOISE = (0.1, 0.5)  # median of the sensor's noise in the logarithm, and its own spread
LEVEL = 0.9


# ---------------------------------------------------------------------------------------------------------------------- data


def readings() -> tuple[Array, Array]:
    """Log of glucose (mg/dL) in bins of 15 minutes, ``[N]``, NaN where there is none; and the bin's place in its day, 0 to 95."""
    try:
        from bokeh_sampledata.glucose import data
    except ImportError as error:
        raise SystemExit(
            f"the readings are in the package bokeh-sampledata: pip install bokeh-sampledata ({error})"
        ) from None
    bins = np.log(data["glucose"].astype(float)).resample("15min").mean()
    return bins.to_numpy(), (bins.index.hour * 4 + bins.index.minute // 15).to_numpy(dtype=float)


def starts(values: Array, low: int, high: int, longest: int) -> list[int]:
    """Where windows of a day may begin that lie in [low, high) and have no hole of more than ``longest`` bins."""
    hole = np.isnan(values[low:high])
    edges = np.flatnonzero(np.diff(np.r_[False, hole, False]))
    bad = np.zeros(len(hole) + 1)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        bad[begin + 1 : end + 1] = end - begin > longest
    total = np.cumsum(bad)
    return [low + s for s in range(len(hole) - POINTS + 1) if total[s + POINTS] == total[s]]


def disjoint(begins: list[int]) -> list[int]:
    """The first, and of the others those that overlap none before."""
    chosen: list[int] = []
    for begin in begins:
        if not chosen or begin >= chosen[-1] + POINTS:
            chosen.append(begin)
    return chosen


@dataclass(frozen=True)
class Series:
    """Readings in model units: (log of glucose - mean at that time of day) / scale.

    Attributes:
        values: ``[N]``, NaN where there is none.
        clock: place in the day, ``[N]``.
        coefficients: of the mean's harmonics.
        scale: of the logarithm.
    """

    values: Array
    clock: Array
    coefficients: Array
    scale: float

    @classmethod
    def of(cls, log_glucose: Array, clock: Array, training: int) -> Series:
        """Units by the first ``training`` bins alone."""
        known = ~np.isnan(log_glucose[:training])
        coefficients = np.linalg.lstsq(harmonics(clock[:training][known]), log_glucose[:training][known])[0]
        centred = log_glucose - harmonics(clock) @ coefficients
        scale = float(np.nanstd(centred[:training]))
        return cls(centred / scale, clock, coefficients, scale)

    def mg_dl(self, x: Array, begin: int) -> Array:
        """Glucose of a window in model units, ``[..., 96]``."""
        return np.exp(harmonics(self.clock[begin : begin + POINTS]) @ self.coefficients + self.scale * x)

    def window(self, begin: int) -> Array:
        """Of a day; short holes are filled by straight lines."""
        x, place = self.values[begin : begin + POINTS], np.arange(POINTS)
        return np.interp(place, place[~np.isnan(x)], x[~np.isnan(x)])

    def windows(self, begins: list[int]) -> tuple[Tensor, Tensor]:
        """x ``[B, 96]`` and when each begins, ``[B]``."""
        x = torch.from_numpy(np.stack([self.window(begin) for begin in begins])).float()
        return x, torch.from_numpy(self.clock[begins]).float()


def harmonics(clock: Array, order: int = 3) -> Array:
    """1, and sines and cosines of the time of day."""
    turns = 2 * np.pi * clock[:, None] / POINTS * np.arange(1, order + 1)
    return np.concatenate([np.ones((len(clock), 1)), np.cos(turns), np.sin(turns)], 1)


@dataclass(frozen=True)
class Task:
    """A day as the sensor tells it.

    Attributes:
        begin: in the series.
        x: what is so, ``[96]``; NaN where nobody knows.
        seen: where y is told, ``[96]``.
        y: ``[96]``, of use where seen.
        gaps: begin and end of each.
        sigma: the noise, in model units.
    """

    begin: int
    x: Array
    seen: NDArray[np.bool_]
    y: Array
    gaps: list[tuple[int, int]]
    sigma: float


def make_task(series: Series, begin: int, rng: np.random.Generator) -> Task:
    """Gaps at random places where all readings are known, an hour or more from each other and from the ends."""
    x = series.values[begin : begin + POINTS].copy()
    free = ~np.isnan(x)
    free[:4] = free[-4:] = False
    seen, gaps = ~np.isnan(x), []
    for length in sorted(GAPS, reverse=True):
        places = [i for i in range(POINTS - length) if free[i : i + length].all()]
        i = int(rng.choice(places))
        gaps.append((i, i + length))
        seen[i : i + length] = False
        free[max(0, i - 4) : i + length + 4] = False
    sigma = NOISE[0] * math.exp(NOISE[1] * rng.standard_normal()) / series.scale
    return Task(begin, x, seen, x + sigma * rng.standard_normal(POINTS), gaps, sigma)


# -------------------------------------------------------------------------------------------------------------------- scores


def crps(draws: Array, weights: Array, truth: Array) -> Array:
    r"""Continuous ranked probability score :math:`E|X - y| - E|X - X'| / 2`, from weighted draws.

    Pairs of a draw with itself are left out, which makes the estimate one of the law that the draws come from, whatever their
    number (for independent draws and equal weights it is unbiased).

    Args:
        draws: ``[M, K]``.
        weights: ``[M]``, positive or 0; their sum does not matter.
        truth: ``[K]``.

    Returns:
        ``[K]``, in the units of the draws.
    """
    w = weights / weights.sum()
    error, others = w @ np.abs(draws - truth), 1 - np.square(w).sum()
    order = draws.argsort(0)
    x, w = np.take_along_axis(draws, order, 0), w[order]  # [M, K] both
    between = 2 * (w * x * (2 * w.cumsum(0) - w - 1)).sum(0)
    return error - between / 2 / max(others, 1e-9)  # one draw has no pairs: its absolute error is left


def quantiles(draws: Array, weights: Array, shares: tuple[float, ...]) -> Array:
    """Of weighted draws ``[M, K]``; ``[len(shares), K]``, between draws by straight lines."""
    order = draws.argsort(0)
    x, w = np.take_along_axis(draws, order, 0), (weights / weights.sum())[order]
    middle = w.cumsum(0) - w / 2
    return np.stack([np.interp(shares, middle[:, k], x[:, k]) for k in range(x.shape[1])], 1)


# ---------------------------------------------------------------------------------------------------------- Gaussian process


@dataclass(frozen=True)
class Draws:
    """Of the joint posterior of a day, in model units.

    Attributes:
        x: ``[M, 96]``.
        sigma, weights: ``[M]``.
        families: of a particle method: the effective number of independent ancestors.
    """

    x: Array
    sigma: Array
    weights: Array
    families: float = math.nan


def fit_kernel(train: Tensor, validation: Tensor) -> Any:
    """The best of four stationary kernels by the validation days, each fitted to all training days together."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, Matern, RationalQuadratic, WhiteKernel

    candidates = [
        1.0 * Matern(2.0, nu=1.5) + WhiteKernel(0.01),
        1.0 * Matern(1.0, nu=2.5) + WhiteKernel(0.01),
        1.0 * RationalQuadratic(1.0, 1.0) + WhiteKernel(0.01),
        0.7 * Matern(1.0, nu=1.5) + 0.3 * RBF(10.0) + WhiteKernel(0.01),
    ]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of parameters at their bounds
        for kernel in candidates:
            kernel = GaussianProcessRegressor(kernel).fit(HOURS, train.double().T.numpy()).kernel_
            held_out = GaussianProcessRegressor(kernel, optimizer=None).fit(HOURS, validation.double().T.numpy())
            found.append((held_out.log_marginal_likelihood_value_ / validation.numel(), kernel))
    for score, kernel in found:
        print(f"{score:8.4f} nats a reading of the validation days: {kernel}")
    return max(found, key=lambda pair: pair[0])[1]


@dataclass(frozen=True)
class Process:
    """The baseline: a Gaussian process of x, and what it says of sigma.

    Attributes:
        covariance: K of a day, ``[96, 96]``, float64.
        law: of sigma, in model units.
    """

    covariance: Tensor
    law: LogNormal

    @classmethod
    def fit(cls, series: Series, begins: list[int], validation: list[int]) -> Process:
        """By days that do not overlap."""
        (x, _), (x_v, _) = (series.windows(disjoint(chosen)) for chosen in (begins, validation))
        kernel = fit_kernel(x, x_v)
        return cls(torch.from_numpy(kernel(HOURS)), LogNormal(math.log(NOISE[0] / series.scale), NOISE[1]))

    def nats(self, x: Tensor) -> float:
        """Log-density of days ``[B, 96]``, a reading."""
        law = MultivariateNormal(torch.zeros(POINTS, dtype=torch.float64), self.covariance)
        return float(law.log_prob(x.double()).mean() / POINTS)

    def on_grid(self, task: Task, size: int = 80) -> tuple[Tensor, Tensor]:
        """Log sigma in equal steps, and its posterior there."""
        log_sigma = self.law.loc + NOISE[1] * torch.linspace(-4, 4, size, dtype=torch.float64)
        seen = torch.from_numpy(task.seen)
        values, vectors = torch.linalg.eigh(self.covariance[seen][:, seen])
        variance = values + (2 * log_sigma).exp()[:, None]
        evidence = -((vectors.T @ torch.from_numpy(task.y)[seen]) ** 2 / variance + variance.log()).sum(1) / 2
        prior = -(((log_sigma - self.law.loc) / NOISE[1]) ** 2) / 2
        return log_sigma, (evidence + prior).softmax(0)

    def sigma(self, task: Task) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of log sigma."""
        log_sigma, weights = self.on_grid(task)
        centre = weights @ log_sigma
        return centre, (weights @ (log_sigma - centre) ** 2).sqrt()

    def given(self, task: Task, sigma: float) -> tuple[Tensor, Tensor]:
        """Of x given y and sigma: the mean ``[96]`` and the covariance's Cholesky factor ``[96, 96]``."""
        K, seen = self.covariance, torch.from_numpy(task.seen)
        y = torch.from_numpy(task.y)[seen]
        gain = torch.linalg.solve(K[seen][:, seen] + sigma**2 * torch.eye(len(y), dtype=K.dtype), K[seen]).T
        left = K - gain @ K[seen] + 1e-8 * torch.eye(POINTS, dtype=K.dtype)
        return gain @ y, torch.linalg.cholesky(left)

    def draws(self, task: Task, count: int, rng: np.random.Generator) -> Draws:
        """Of the joint posterior."""
        log_sigma, weights = self.on_grid(task)
        sigma = np.exp(rng.choice(log_sigma.numpy(), count, p=weights.numpy()))
        x = np.empty((count, POINTS))
        for value in np.unique(sigma):
            mean, tril = (part.numpy() for part in self.given(task, value))
            rows = sigma == value
            x[rows] = mean + rng.standard_normal((rows.sum(), POINTS)) @ tril.T
        return Draws(x, sigma, np.ones(count))


# ----------------------------------------------------------------------------------------------------------------- diffusion


class Corrected(nn.Module):
    r"""The Gaussian process's denoiser and a UNet's correction, as the v of a diffusion.

    For x_0 ~ N(0, K) the denoiser is :math:`\hat x_0 = \alpha K (\alpha^2 K + \sigma^2)^{-1} x_t`. A fresh UNet returns 0, so that
    training starts at the Gaussian process. The UNet sees x_t, that denoiser's answer and the time of day, an hour (4 readings) as
    the channels of one point.

    Args:
        covariance: K, ``[96, 96]``.
        width: of the UNet.

    Call: ``net(x_t, log_snr, clock=...)``, clock ``[N]`` being the window's first place in the day.
    """

    cond_event_dims = {"clock": 0}  # noqa: RUF012

    def __init__(self, covariance: Tensor, width: int) -> None:
        super().__init__()
        lam, U = torch.linalg.eigh(covariance.double())
        self.register_buffer("lam", lam.clamp(min=1e-6).float())
        self.register_buffer("U", U.float())
        self.net = nets.UNet(
            10, out_channels=4, dims=1, width=width, multipliers=(1, 2), blocks=1, attention=(1,), dropout=0.1
        )

    def forward(self, x_t: Tensor, log_snr: Tensor, clock: Tensor) -> Tensor:
        alpha, sigma = log_snr.sigmoid().sqrt()[:, None], (-log_snr).sigmoid().sqrt()[:, None]
        shrink = alpha * self.lam / (alpha**2 * self.lam + sigma**2)
        x0_hat = (shrink * (x_t @ self.U)) @ self.U.T
        turn = 2 * math.pi / POINTS * (clock[:, None, None] + torch.arange(0, POINTS, 4))
        hours = torch.cat([by_hour(x_t), by_hour(x0_hat), turn.cos(), turn.sin()], 1)
        return (alpha * x_t - x0_hat) / sigma + self.net(hours, log_snr).mT.flatten(1)


def by_hour(x: Tensor) -> Tensor:
    """``[N, 96]`` as ``[N, 4, 24]``."""
    return x.unflatten(1, (-1, 4)).mT


def make_diffusion(covariance: Tensor, width: int) -> GaussianDiffusion:
    """In continuous time; :meth:`~pyrodiff.GaussianDiffusion.respace` gives chains."""
    schedule = LogLinearSchedule(math.inf, -7.0, 8.0)
    return GaussianDiffusion(Corrected(covariance, width), schedule, (POINTS,), prediction="v")


def train(
    diffusion: GaussianDiffusion, series: Series, begins: list[int], validation: list[int], steps: int, folder: Path
) -> None:
    """By ``fit``, on all windows of the training part, which overlap; goes on, or rests, where ``folder`` holds a run."""
    (x, clock), (x_v, clock_v) = series.windows(begins), series.windows(validation[::12])
    pyrodiff.fit(
        diffusion,
        x,
        x_v,
        cond={"clock": clock},
        validation_cond={"clock": clock_v},
        steps=steps,
        batch_size=64,
        lr=2e-3,
        weight_decay=0.01,
        ema_decay=0.99,
        validation_timesteps=16,
        folder=folder,
        resume=(folder / "resume.safetensors").exists(),
        device="cpu",
    )


def nats(diffusion: GaussianDiffusion, x: Tensor, clock: Tensor) -> str:
    """The bound on log p(x), a reading, with its standard error over the noise."""
    bits = pyrodiff.bits_per_dim(pyrodiff.elbo_terms(diffusion, x, 32, repeats=2, clock=clock))
    return f"{-math.log(2) * bits.mean:.3f} ± {math.log(2) * bits.se_noise:.3f}"


def gaussian_twist(process: Process, task: Task, sigma: float) -> Twist:
    r"""p(y | x_t), x_0 given x_t being :math:`N(\hat x_0, (K^{-1} + \mathrm{SNR})^{-1})`: the network's mean, the Gaussian process's K.

    Its gradient is that of the Gaussian process too, :math:`\partial \hat x_0 / \partial x_t = \alpha K (\alpha^2 K + \sigma_t^2)^{-1}`,
    which saves the pass back through the network.
    """
    values, vectors = torch.linalg.eigh(process.covariance)
    values, seen = values.clamp(min=0), torch.from_numpy(task.seen)
    rows, y = vectors[seen], torch.from_numpy(task.y)[seen]
    noise = sigma**2 * torch.eye(len(y), dtype=torch.float64)

    def twist(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        alpha2, sigma2 = log_snr.sigmoid(), (-log_snr).sigmoid()
        total = alpha2 * values + sigma2
        linear = (x_t.double() @ vectors * (alpha2.sqrt() * values / total)) @ rows.T
        mean = x0_hat.detach()[:, seen] + linear - linear.detach()
        return MultivariateNormal(mean, (rows * (values * sigma2 / total)) @ rows.T + noise).log_prob(y)

    return twist


def sensor(x0: Tensor, task: Task, sigma: float) -> None:
    """What is told of x_0, ``[N, 96]``: a Pyro program."""
    seen = torch.from_numpy(task.seen)
    pyro.sample("y", Normal(x0[:, seen], sigma).to_event(1), obs=torch.from_numpy(task.y)[seen].to(x0))


def by_smc(
    diffusion: GaussianDiffusion, process: Process, task: Task, clock: float, particles: int, nodes: int, seed: int
) -> tuple[Draws, list[Posterior]]:
    """The diffusion's joint posterior: sigma at the nodes of a quadrature, x by smc at each.

    The nodes are Gauss and Hermite's for q(log sigma), the Normal that the Gaussian process's posterior of it suggests, 1.25 times
    as wide; each weighs its share of q, times p(log sigma) Z(sigma) / q(log sigma).
    """
    centre, spread = process.sigma(task)
    p, q = Normal(process.law.loc, NOISE[1]), Normal(centre, 1.25 * spread)
    places, shares = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
    log_sigma = q.loc + q.scale * places
    found = [
        smc(
            diffusion,
            observation(sensor, task, sigma),
            particles,
            twist=gaussian_twist(process, task, sigma),
            seed=seed + i,
            clock=clock,
        )
        for i, sigma in enumerate(log_sigma.exp().tolist())
    ]
    of_node = shares.log() + p.log_prob(log_sigma) - q.log_prob(log_sigma)
    log_weights = torch.cat([run.log_weights for run in found]) + of_node[:, None]
    weights = log_weights.flatten().softmax(0).view(nodes, particles)
    families = 1 / float((weights.sum(1) ** 2 / torch.cat([run.families for run in found])).sum())
    x = torch.cat([run.particles[0] for run in found]).double().numpy()
    sigma = log_sigma.exp().repeat_interleave(particles).numpy()
    return Draws(x, sigma, weights.flatten().numpy(), families), found


def by_svi(
    diffusion: GaussianDiffusion,
    process: Process,
    tasks: list[Task],
    clock: Tensor,
    steps: int,
    draws: int,
    lr: float = 0.015,
) -> list[Draws]:
    """The diffusion's joint posterior of all days at once, by SVI: a Gaussian guide for each x, a log-normal one for each sigma."""
    prior = DiffusionPrior(diffusion).given(clock=clock)
    seen = torch.from_numpy(np.stack([task.seen for task in tasks]))
    y = torch.from_numpy(np.stack([np.where(task.seen, task.y, 0.0) for task in tasks])).float()
    loc, tril, log_sigma = (torch.stack(part) for part in zip(*(start(process, t) for t in tasks), strict=True))

    def model() -> None:
        with pyro.plate("days", len(tasks), dim=-1):
            sigma = pyro.sample("sigma", process.law)
            x = pyro.sample("x", prior)
            pyro.sample("y", Normal(x, sigma[..., None]).mask(seen).to_event(1), obs=y)

    def guide() -> tuple[Tensor, Tensor]:
        # in the coordinates of the Gaussian process's answer, in which that is N(0, 1): what each reading adds to those before
        shift = pyro.param("shift", torch.zeros(len(tasks), POINTS))
        scale = pyro.param("scale", torch.ones(len(tasks), POINTS), constraint=constraints.positive)
        centre = pyro.param("centre", log_sigma[:, 0])
        spread = pyro.param("spread", log_sigma[:, 1], constraint=constraints.positive)
        with pyro.plate("days", len(tasks), dim=-1):
            mean = loc + (tril @ shift[..., None])[..., 0]
            return pyro.sample("sigma", LogNormal(centre, spread)), pyro.sample(
                "x", MultivariateNormal(mean, scale_tril=tril * scale[:, None])
            )

    pyro.clear_param_store()
    svi = SVI(
        *bound(model, guide, {"x": prior}),
        ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps), "clip_norm": 100.0}),
        Trace_ELBO(),
    )
    for _ in range(steps):
        svi.step()
    with torch.no_grad(), pyro.plate("draws", draws, dim=-2):
        sigma, x = guide()
    pyro.clear_param_store()
    return [Draws(x[:, i].double().numpy(), sigma[:, i].double().numpy(), np.ones(draws)) for i in range(len(tasks))]


def start(process: Process, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """The Gaussian process's answer as a Gaussian: of x the mean ``[96]`` and the Cholesky factor, of log sigma ``[2]``."""
    centre, spread = process.sigma(task)
    mean, tril = process.given(task, float(centre.exp()))
    return mean.float(), tril.float(), torch.stack([centre, spread]).float()


# --------------------------------------------------------------------------------------------------------------------- study


def scores(series: Series, tasks: list[Task], found: dict[str, list[Draws]]) -> list[dict[str, Any]]:
    """A row for each gap of each day, by each method."""
    return [
        row
        for method, answers in found.items()
        for task, answer in zip(tasks, answers, strict=True)
        for row in score(series, task, method, answer)
    ]


def score(series: Series, task: Task, method: str, found: Draws) -> list[dict[str, Any]]:
    """A row for each gap: means over its readings."""
    draws, truth = series.mg_dl(found.x, task.begin), series.mg_dl(task.x, task.begin)
    rows = []
    for begin, end in sorted(task.gaps, key=lambda gap: gap[1] - gap[0]):
        x, y = draws[:, begin:end], truth[begin:end]
        low, high = quantiles(x, found.weights, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        mean = found.weights / found.weights.sum() @ x
        rows.append(
            {
                "window": task.begin,
                "method": method,
                "hours": (end - begin) / 4,
                "crps": crps(x, found.weights, y).mean(),
                "covered": ((low <= y) & (y <= high)).mean(),
                "width": (high - low).mean(),
                "squared_error": ((mean - y) ** 2).mean(),
            }
        )
    return rows


def straight(task: Task) -> Draws:
    """Straight lines between the noisy readings: one draw, whose CRPS is its absolute error."""
    place = np.arange(POINTS)
    return Draws(np.interp(place, place[task.seen], task.y[task.seen])[None], np.array([math.nan]), np.ones(1))


def mean_and_error(values: Array) -> tuple[float, float]:
    """Over windows, with its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def by_window(rows: list[dict[str, Any]], name: str) -> Array:
    """A score's mean over the readings of each window: a gap counts by its hours."""
    windows = sorted({row["window"] for row in rows})
    of = [[row for row in rows if row["window"] == window] for window in windows]
    return np.array([np.average([r[name] for r in some], weights=[r["hours"] for r in some]) for some in of])


def table(rows: list[dict[str, Any]], methods: list[str]) -> str:
    """By gap and method: means over windows ± standard errors; also of the differences from the first method, window by window."""
    lines = ["gap   method   CRPS mg/dL      less gp          covers 90 %    less gp         width   RMSE"]
    for hours in (*(g / 4 for g in GAPS), 0.0):
        of = {m: [r for r in rows if r["method"] == m and hours in (0.0, r["hours"])] for m in methods}
        for method, some in of.items():
            parts = [f"{f'{hours:g} h' if hours else 'all':5s} {method:8s}"]
            for name, unit, form in (("crps", 1, "{:5.2f} ± {:4.2f}  "), ("covered", 100, "{:5.1f} ± {:3.1f}  ")):
                values, first = (unit * by_window(which, name) for which in (some, of[methods[0]]))
                interval = name == "crps" or method != "lines"  # a line has none
                parts.append(form.format(*mean_and_error(values)) if interval else " " * 13)
                parts.append(
                    form.format(*mean_and_error(values - first)) if interval and method != methods[0] else " " * 13
                )
            parts.append(f"{by_window(some, 'width').mean():6.1f}" if method != "lines" else " " * 6)
            parts.append(f"{math.sqrt(by_window(some, 'squared_error').mean()):5.1f}")
            lines.append(" ".join(parts))
    return "\n".join(lines)


def noise_report(tasks: list[Task], found: dict[str, list[Draws]]) -> str:
    """Of log sigma: error, and how often the interval of 90 % (of a Normal with the draws' mean and variance) holds the truth."""
    truth = np.log([task.sigma for task in tasks])
    lines = ["method   error of log sigma, RMS   covers 90 %   standard deviation claimed"]
    for method, answers in found.items():
        if method == "lines":
            continue
        w = [a.weights / a.weights.sum() for a in answers]
        mean = np.array([p @ np.log(a.sigma) for p, a in zip(w, answers, strict=True)])
        std = np.array([math.sqrt(p @ (np.log(a.sigma) - m) ** 2) for p, a, m in zip(w, answers, mean, strict=True)])
        covered, error = mean_and_error(100.0 * (np.abs(mean - truth) < 1.645 * std))
        rms = math.sqrt(((mean - truth) ** 2).mean())
        lines.append(f"{method:8s} {rms:24.3f}   {covered:4.0f} ± {error:3.0f}   {std.mean():.3f}")
    return "\n".join(lines)


def draw(series: Series, tasks: list[Task], found: dict[str, list[Draws]], path: Path, shown: int = 3) -> None:
    """The first, the middle and the last day: data, the gaps' readings, bands of 90 % and draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(shown, 1, figsize=(8, 2.4 * shown), sharex=True, layout="constrained", squeeze=False)
    hours = HOURS[:, 0]
    for axis, i in zip(axes[:, 0], np.linspace(0, len(tasks) - 1, shown).astype(int), strict=True):
        task = tasks[i]
        for method, color in (("gp", "C1"), ("svi", "C0")):
            answer = found[method][i]
            x = series.mg_dl(answer.x, task.begin)
            low, high = quantiles(x, answer.weights, (0.05, 0.95))
            axis.fill_between(hours, low, high, color=color, alpha=0.25, lw=0, label=f"{method}, 90 %")
            if method == "svi":
                axis.plot(hours, x[:6].T, color=color, lw=0.5, alpha=0.7)
        truth, told = (series.mg_dl(z, task.begin) for z in (task.x, task.y))
        axis.plot(hours[task.seen], told[task.seen], ".", color="0.5", ms=3, label="told, with noise")
        axis.plot(hours[~task.seen], truth[~task.seen], "k.", ms=4, label="held out")
        axis.set_ylabel("mg/dL")
    axes[-1, 0].set_xlabel("hours")
    axes[0, 0].legend(ncols=4, fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def made_up(days: int = 24) -> tuple[Array, Array]:
    """In the place of :func:`readings`: smooth noise about a daily rhythm."""
    rng, clock = np.random.default_rng(2), np.arange(days * POINTS) % POINTS
    smooth = np.convolve(rng.standard_normal(days * POINTS + 40), np.hanning(41), "valid") / 4
    return 4.8 + 0.1 * np.sin(2 * np.pi * clock / POINTS) + 0.3 * smooth, clock.astype(float)


def main(
    out: Path = RESULTS,
    run: Path = Path("runs") / "glucose",
    steps: int = 400,
    width: int = 32,
    windows: int = 1000,
    smc_days: int = 2,
    particles: int = 24,
    nodes: int = 3,
    chain: int = 200,
    svi_steps: int = 300,
    draws: int = 400,
    seed: int = 0,
    simulated: bool = False,
) -> str:
    """The study; its text.

    Args:
        out: folder of the results.
        run: folder where the prior is kept, once trained.
        steps: of training; 0: the Gaussian process itself as the diffusion.
        width: of the UNet.
        windows: test days at the most.
        smc_days: of those, how many smc gets.
        particles: of smc, for each sigma.
        nodes: sigmas that smc gets for a day.
        chain: steps of the chain that smc takes.
        svi_steps: of the optimiser.
        draws: of each posterior.
        seed: of the tasks and of all that is drawn.
        simulated: readings that are made up, which need no package.
    """
    out.mkdir(parents=True, exist_ok=True)
    log_glucose, clock = made_up() if simulated else readings()
    train_end, validation_end = (int(end * len(log_glucose)) for end in ENDS)
    series = Series.of(log_glucose, clock, train_end)
    begins = starts(series.values, 0, train_end, longest=2)
    validation = starts(series.values, train_end, validation_end, longest=2)
    test = disjoint(starts(series.values, validation_end, len(log_glucose), longest=4))[:windows]
    process = Process.fit(series, begins, validation)

    x_t, at_t = series.windows(test)
    torch.manual_seed(seed)
    diffusion = make_diffusion(process.covariance, width)
    told = [
        f"nats a reading of the test days: the Gaussian process {process.nats(x_t):.3f}; at least, its denoiser as a diffusion "
        f"{nats(diffusion, x_t, at_t)}"
    ]
    if steps:
        train(diffusion, series, begins, validation, steps, run)
    diffusion.eval().requires_grad_(False)
    told[0] += f", and that with the UNet's correction {nats(diffusion, x_t, at_t)}"

    rng = np.random.default_rng(seed)
    tasks = [make_task(series, begin, rng) for begin in test]
    torch.manual_seed(seed)
    found = {
        "gp": [process.draws(task, draws, rng) for task in tasks],
        "svi": by_svi(diffusion, process, tasks, at_t, svi_steps, draws),
        "lines": [straight(task) for task in tasks],
    }
    told.append(f"svi: {svi_steps} steps, all days at once, one draw of each a step")
    chosen = np.linspace(0, len(tasks) - 1, min(smc_days, len(tasks))).astype(int).tolist()
    respaced, warned, families = diffusion.respace(chain), 0, []
    part = {method: [answers[i] for i in chosen] for method, answers in found.items()} | {"smc": []}
    for count, i in enumerate(chosen):
        answer, runs = by_smc(
            respaced, process, tasks[i], float(at_t[i]), particles, nodes, 1000 * (seed + 1) + nodes * i
        )
        part["smc"].append(answer)
        families.append(answer.families)
        warned += sum(bool(run.warnings) for run in runs)
        print(f"smc, day {count + 1} of {len(chosen)}: {answer.families:.1f} families", flush=True)
    told.append(
        f"smc: {nodes} sigmas, {particles} particles each, {chain} steps; families of a day: median {np.median(families):.1f}, least "
        f"{min(families):.1f}; {warned} of {nodes * len(chosen)} runs with a warning"
    )

    some = [tasks[i] for i in chosen]
    rows, rows_of_part = scores(series, tasks, found), scores(series, some, part)
    with open(out / "gaps.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows + [row for row in rows_of_part if row["method"] == "smc"]:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    text = "\n\n".join(
        [
            f"{len(begins)} training windows, {len(tasks)} test days of which no two overlap; means over days ± standard errors",
            "\n".join(told),
            f"all {len(tasks)} days\n{table(rows, list(found))}",
            noise_report(tasks, found),
            f"{len(chosen)} of the days, evenly spaced; smc's rows mean little where its families are below 10\n"
            f"{table(rows_of_part, list(part))}",
            noise_report(some, part),
        ]
    )
    (out / "results.txt").write_text(text + "\n", encoding="utf-8")
    draw(series, tasks, found, out / "days.png")
    print(text)
    return text


def smoke(folder: Path) -> dict[str, Any]:
    """A setting of seconds."""
    sizes = {"steps": 3, "width": 8, "windows": 3, "particles": 8, "nodes": 2, "chain": 4, "svi_steps": 2}
    return {**sizes, "simulated": True, "run": folder / "run", "out": folder / "out"}


if __name__ == "__main__":
    command_line(main, smoke)
