"""Pictures: the bound by timestep, images, denoising paths, training curves, the laboratory's tables, posteriors.

Every function returns a :class:`matplotlib.figure.Figure` that no window or pyplot knows of, so
that no display is needed and nothing has to be closed; :func:`save` writes it. Matplotlib is an
extra, ``pip install "pyrodiff[demo]"``, imported when a picture is asked for.
"""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .elbo import KLS, BitsPerDim, ELBOTerms, Estimate, bits_per_dim
from .errors import OptionError, ProgramError, ShapeError, check_option
from .inference.calibration import Calibration, band
from .inference.smc import HEAVY, Posterior
from .inference_data import replaced
from .schedules import Schedule

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "calibration",
    "denoising",
    "elbo_by_timestep",
    "estimators",
    "gradients",
    "image_grid",
    "posterior",
    "save",
    "smc_diagnostics",
    "timesteps",
    "training_curve",
]

DPI = 150
PRINT_DPI = 300  # of the laboratory's pictures, which are as wide as a page's text
# Of Okabe and Ito's palette, which readers with any common colour vision can tell apart.
_COLOURS = {"analytic": "#0072B2", "monte_carlo": "#D55E00"}
_TRAIN, _VALIDATION = "#0072B2", "#D55E00"
_NAMES = {"analytic": "analytic KL", "monte_carlo": "Monte Carlo KL"}
_MOST_BINS = 60
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_KL_COLOURS = {"analytic": "#0072B2", "k1": "#D55E00", "k2": "#CC79A7", "k3": "#009E73", "analytic + c N": "#56B4E9"}
_MARKERS = "osD^vPX"
_SAND = (0.85, 0.75, 0.55)  # neither a grey nor in viridis
_WIDTH = 6.5
_NAME_WIDTH = 20
_LINE, _SMALL = 0.13, 0.115  # inches: of a line of names, of small print


def elbo_by_timestep(terms: ELBOTerms, schedule: Schedule, x: str = "timestep") -> Figure:
    """Where the bound is lost: the KL of each reverse step, its running sum, and the parts.

    Left, the mean over images of the KL of each reverse step in nats per image, with a band of one
    standard error over images; more than 60 timesteps are put into bins of as many neighbours each.
    Middle, the running sum in bits per dim: it starts with the reconstruction, and the step at the
    end is the prior. Right, the parts with one standard error over images.

    Args:
        terms: what :func:`~pyrodiff.elbo_terms` returned.
        schedule: the noise schedule of the model.
        x: ``"timestep"``, or ``"log_snr"`` (of the noisier end of a step; averaged over the event
            for a schedule per element).

    Raises:
        OptionError: ``x`` is unknown, or matplotlib is not installed.
        ShapeError: the terms have timesteps beyond the schedule's.
    """
    check_option("x", x, ("timestep", "log_snr"))
    if terms.t.numel() and int(terms.t.max()) > schedule.length:
        raise ShapeError(f"the terms have timestep {int(terms.t.max())}, the schedule has {schedule.steps}")
    figure = _figure(12, 4.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=[4, 4, 2.2])
    per_dim = terms.dims * math.log(2)
    spread: Tensor | None = None
    for kl in reversed(KLS):  # the analytic ones on top, which vary less
        one = terms.by(kl)
        colour, name = _COLOURS[kl], _NAMES[kl]
        t, last, mean, se, share = _by_timestep(one)
        at = _coordinate(schedule, t, x)
        left.plot(at, mean, color=colour, linewidth=1.4, label=name, marker="o", markersize=3)
        left.fill_between(at, mean - se, mean + se, color=colour, alpha=0.2, linewidth=0)
        reconstruction, prior = bits_per_dim(one, "reconstruction"), bits_per_dim(one, "prior")
        ends = torch.tensor([1.0, float(schedule.steps)], device="cpu")
        path = torch.cat([torch.zeros(1, device="cpu"), share.cumsum(0) / per_dim]) + reconstruction.mean
        along = torch.cat([ends[:1], last, ends[1:]])
        path = torch.cat([path, path[-1:] + prior.mean])
        middle.plot(_coordinate(schedule, along, x), path, color=colour, linewidth=1.4, label=name)
        if kl == "analytic":
            spread = mean.quantile(torch.tensor([0.0, 0.5, 1.0], dtype=mean.dtype, device="cpu")) if len(mean) else None
    if spread is not None and spread[2] > 10 * spread[1].abs():
        # Logarithmic, but for the last hundredth, so that estimates below zero stay in sight.
        left.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(float(spread[2]) / 100)))
    left.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    left.set_ylabel("KL of a step (nats per image)")
    left.set_title("Each reverse step, 1 standard error over images")
    middle.set_ylabel("running sum (bits/dim)")
    middle.set_title("From the reconstruction to the whole bound")
    for axes in (left, middle):
        axes.set_xlabel(r"timestep $t$" if x == "timestep" else r"$\log$ SNR at $t$, data to noise")
        if x == "log_snr":
            axes.invert_xaxis()
    left.legend(*_reversed_legend(left), frameon=False)
    _plain(left)
    _plain(middle)
    _mark_ends(middle, terms, schedule, x)
    _parts(right, terms)
    figure.suptitle("\n".join(f"{_NAMES[kl]}: {_total(bits_per_dim(terms.by(kl)))}" for kl in KLS), fontsize=10)
    return figure


def image_grid(
    x: Tensor,
    data_range: tuple[float, float] = (-1.0, 1.0),
    columns: int | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Images side by side, every pixel a square of whole screen pixels.

    Args:
        x: ``[N, C, H, W]`` with C = 1 (grey) or 3 (RGB), or grey ``[N, H, W]``.
        data_range: the values shown as black and white; beyond, they are clipped.
        columns: images in a row; default: about as many as rows.
        titles: a short text above each image.

    Raises:
        ShapeError: ``x`` holds no such images.
        OptionError: another option is out of range, or matplotlib is not installed.
    """
    pixels = _pixels("x", x, data_range)
    if columns is None:
        columns = math.ceil(math.sqrt(len(pixels)))
    if columns < 1:
        raise OptionError(f"columns={columns!r} is not at least 1")
    if titles is not None and len(titles) != len(pixels):
        raise OptionError(f"{len(titles)} titles do not fit {len(pixels)} images")
    rows: list[list[Tensor | None]] = [list(pixels[i : i + columns]) for i in range(0, len(pixels), columns)]
    text = None
    if titles is not None:
        text = [list(titles[i : i + columns]) for i in range(0, len(titles), columns)]
    return _mosaic(rows, text)


def denoising(
    trajectory: Tensor,
    timesteps: Sequence[int] | None = None,
    x0_hat: Tensor | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
    columns: int = 10,
    rows: int = 8,
) -> Figure:
    """Paths of the sampler, one in a row, from noise on the left to data on the right.

    Args:
        trajectory: what :func:`~pyrodiff.trajectory` returned, ``[K + 1, n, C, H, W]``, C = 1 or 3.
        timesteps: the timestep of each state, ``[K + 1]``; default K, ..., 0. For a path along some of the steps,
            ``[*reversed(schedule.respace(...).kept), 0]``.
        x0_hat: the network's estimate of x_0 at each state but the last, ``[K, n, C, H, W]``: a second row per path.
        data_range: the values shown as black and white; beyond, they are clipped.
        columns: states shown, evenly spread, the first and last among them.
        rows: most paths shown.

    Raises:
        ShapeError: the tensors hold no such paths, or do not fit each other.
        OptionError: another option is out of range, or matplotlib is not installed.
    """
    if not isinstance(trajectory, Tensor) or trajectory.dim() != 5 or len(trajectory) < 2:
        shape = list(trajectory.shape) if isinstance(trajectory, Tensor) else type(trajectory).__name__
        raise ShapeError(f"trajectory has shape {shape}, not [K + 1, n, C, H, W] with K >= 1")
    length = len(trajectory)
    timesteps = range(length - 1, -1, -1) if timesteps is None else [int(t) for t in timesteps]
    if len(timesteps) != length:
        raise ShapeError(f"{len(timesteps)} timesteps do not fit a trajectory of {length} states")
    if x0_hat is not None and x0_hat.shape != (length - 1, *trajectory.shape[1:]):
        raise ShapeError(f"x0_hat has shape {list(x0_hat.shape)}, not {[length - 1, *trajectory.shape[1:]]}")
    if columns < 2 or rows < 1:
        raise OptionError(f"columns={columns!r} must be at least 2, rows={rows!r} at least 1")
    shown = torch.linspace(0, length - 1, min(columns, length), device="cpu").round().long()
    tiles: list[list[Tensor | None]] = []
    names = []
    for path in range(min(rows, trajectory.shape[1])):
        tiles.append(list(_pixels("trajectory", trajectory[shown, path], data_range)))
        names.append(r"$x_t$")
        if x0_hat is not None:
            tiles.append([*_pixels("x0_hat", x0_hat[shown[:-1], path], data_range), None])
            names.append(r"$\hat x_0$")
    text = [[rf"$t = {timesteps[i]}$" for i in shown]]
    return _mosaic(tiles, text, names if x0_hat is not None else None, group=1 if x0_hat is None else 2)


def training_curve(records: Iterable[Mapping[str, Any]]) -> Figure:
    """Bits per dim on the training and the validation data against optimiser steps.

    Args:
        records: the lines of ``metrics.jsonl``: mappings with ``step`` and some of ``train_bits_per_dim``,
            ``validation_bits_per_dim`` and their standard errors ``train_bits_per_dim_se`` and
            ``validation_bits_per_dim_se``. Records without a step, and values that are missing or not finite, are skipped.

    Raises:
        OptionError: no record has anything to show, or matplotlib is not installed.
    """
    records = [record for record in records if "step" in record]
    curves = {}
    for part in ("train", "validation"):
        key = f"{part}_bits_per_dim"
        found = [(r["step"], r[key], r.get(f"{key}_se")) for r in records if _is_finite(r.get(key))]
        if found:
            curves[part] = sorted(found, key=lambda point: point[0])
    if not curves:
        raise OptionError("no record has a step and finite train_bits_per_dim or validation_bits_per_dim")
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for part, points in curves.items():
        steps, values = [p[0] for p in points], [p[1] for p in points]
        colour = _TRAIN if part == "train" else _VALIDATION
        smooth = part == "train" and len(points) > 50
        if smooth:  # a value per mini-batch: the noise in pale, its running median in front
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.45)
            values = _running_median(values, max(5, len(points) // 50))
        label = f"{part} (running median)" if smooth else part
        marker = "o" if len(points) <= 50 else None
        axes.plot(steps, values, color=colour, linewidth=1.6, label=label, marker=marker, markersize=3.5)
        if not smooth and all(_is_finite(p[2]) for p in points):
            low = [v - p[2] for v, p in zip(values, points, strict=True)]
            high = [v + p[2] for v, p in zip(values, points, strict=True)]
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    best = min(curves.get("validation", curves.get("train", [])), key=lambda point: point[1])
    which = "validation" if "validation" in curves else "training"
    axes.set_title(f"Best {which}: {best[1]:.4f} bits/dim at step {best[0]:,}")
    _limit_to_typical(axes, [p[1] for points in curves.values() for p in points])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("minus ELBO (bits/dim)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def estimators(values: pandas.DataFrame) -> Figure:
    """Ways of estimating the bound side by side: efficiency, variance, and bias against its standard error.

    A line for each estimator, in the table's order, those of one path together; coloured by KL, hollow where the estimator
    does not claim to be unbiased. Whiskers of a variance are one standard error of its logarithm; the band of the bias is two.
    What has no number is listed below, with the reason.

    Args:
        values: the laboratory's table of estimators: ``path``, ``kl``, ``target``, ``unbiased``, ``efficiency``, ``variance``,
            ``variance_se``, ``z``, ``against``, ``reason``.

    Raises:
        OptionError: a column is missing, the table is empty, or matplotlib is not installed.
    """
    columns = "path kl target unbiased efficiency variance variance_se z against reason"
    values = _checked("values", values, columns)
    shown = values[values["variance"].notna()]
    target = shown["target"].map(lambda name: "" if name == "elbo" else f", bounds {name}")
    places, groups = _places(shown["path"] + target)
    below = _small_print(values, ("path", "kl"))
    figure = _figure(_WIDTH, 0.75 + _LINE * (max(places, default=0) + 2) + _SMALL * len(below), dpi=PRINT_DPI)
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[1, 1, 0.9])
    styles = [{"color": _KL_COLOURS.get(kl, "#E69F00" if kl.startswith("IWAE") else "#000000")} for kl in shown["kl"]]
    for one, column in zip(axes, ("efficiency", "variance"), strict=False):
        _log_axis(one, "x", shown[column])
        _dots(one, places, shown, column, styles)
    axes[0].set_xlabel("efficiency\n(1 / variance / evaluations)")
    axes[1].set_xlabel("variance of one draw\n(nats², noise only)")
    z = axes[2]
    z.axvspan(-2, 2, color="0.85", linewidth=0, zorder=0)
    z.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    most = max([4.0, *(abs(value) for value in shown["z"] if math.isfinite(value))])
    z.set_xscale("symlog", linthresh=2, linscale=max(0.6, 0.25 * math.log10(most)))  # logarithmic beyond the band
    far = max(10, 10 ** math.floor(math.log10(most)))
    z.set_xticks([-far, -2, 0, 2, far], [f"{tick:g}".replace("-", "−") for tick in (-far, -2, 0, 2, far)])
    z.minorticks_off()
    z.set_xlim(-2 * most, 2 * most)
    _dots(z, places, shown, "z", styles)
    against = [name for name in dict.fromkeys(shown["against"]) if isinstance(name, str) and name]
    wanting = f"against {', '.join(against)}" if against else "nothing to hold against"
    z.set_xlabel("bias (standard errors)\n" + textwrap.fill(wanting, 24, max_lines=2, placeholder=" …"))
    _name_lines(axes, places, groups, list(shown["kl"]))
    figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=6.5)
    return figure


def timesteps(table: pandas.DataFrame, x: str = "timestep") -> Figure:
    """The bound term by term: its KL, the variance of its two estimators, and the running share.

    Args:
        table: the laboratory's table of terms, in the bound's order: ``term``, ``t``, ``log_snr``, ``kl``, ``se_noise``,
            ``variance_analytic``, ``variance_monte_carlo``, ``share``.
        x: ``"timestep"`` or ``"log_snr"``.

    Raises:
        OptionError: ``x`` is unknown, a column is missing, the table is empty, or matplotlib is not installed.
    """
    check_option("x", x, ("timestep", "log_snr"))
    table = _checked("table", table, "term t log_snr kl se_noise variance_analytic variance_monte_carlo share")
    at, name = ("t", r"timestep $t$") if x == "timestep" else ("log_snr", r"$\log$ SNR at $t$")
    table = table.assign(x=table[at].where(table[at].map(math.isfinite)))
    steps, ends = table[table["term"] == "diffusion"], table[table["term"] != "diffusion"]
    figure = _figure(_WIDTH, 2.5, dpi=PRINT_DPI)
    left, middle, right = figure.subplots(1, 3)
    blue = _COLOURS["analytic"]
    style = {"linewidth": 1.2, "marker": "o" if len(steps) <= 40 else "", "markersize": 2.5}
    left.plot(steps["x"], steps["kl"], color=blue, label="reverse step", **style)
    low, high = steps["kl"] - steps["se_noise"], steps["kl"] + steps["se_noise"]
    left.fill_between(steps["x"], low, high, color=blue, alpha=0.25, linewidth=0)
    for end, marker in (("reconstruction", "s"), ("prior", "D")):
        rows = ends[ends["term"] == end]
        point = {"marker": marker, "linestyle": "", "markersize": 4, "markerfacecolor": "none"}
        label = end if (rows["kl"] > 0).all() else f"{end} (below 0)"
        left.plot(rows["x"], rows["kl"], color="black", label=label, **point)
        for kl in KLS:
            middle.plot(rows["x"], rows[f"variance_{kl}"], color=_COLOURS[kl], **point)
    for kl, dashes in zip(KLS, ("-", "--"), strict=True):
        label = _NAMES[kl].removesuffix(" KL")
        middle.plot(steps["x"], steps[f"variance_{kl}"], dashes, color=_COLOURS[kl], label=label, **style)
    _log_axis(left, "y", table["kl"])
    _log_axis(middle, "y", [*table["variance_analytic"], *table["variance_monte_carlo"]])
    if shares := bool(table["share"].notna().all()):
        right.axhline(100, color="0.6", linewidth=0.8, zorder=0)
    right.plot(table["x"], (100 * table["share"] if shares else table["kl"]).cumsum(), color=blue, **style)
    running = "Running share of the bound (%)" if shares else "Running sum (nats)"
    titles = ("Term (nats)", "Variance of one draw (nats²)", running)
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set(title=title, xlabel=name)
        if axes is not right:
            axes.legend(frameon=False)
        if x == "timestep":
            axes.locator_params(axis="x", integer=True, nbins=5)
            pad = max(0.5, 0.03 * float(table["t"].max()))
            axes.set_xlim(1 - pad, float(table["t"].max()) + pad)
        else:
            axes.invert_xaxis()
        _plain(axes, 7)
    sums = [f"{row.term} {row.kl:.3g} ± {row.se_noise:.1g}" for row in ends.itertuples()]
    sums.insert(-1, f"reverse steps {steps['kl'].sum():.3g} ± {math.sqrt((steps['se_noise'] ** 2).sum()):.1g}")
    figure.supxlabel(f"{', '.join(sums)} nats".replace("-", "−"), x=0.01, ha="left", fontsize=6.5)
    return figure


def gradients(table: pandas.DataFrame) -> Figure:
    """Variance of estimators of the gradient, a row of panels for each parameter group.

    Left, from one timestep, against the timestep; right, from whole chains: of the bound, of importance-weighted bounds, of
    reverse samples. Estimators that agree lie on each other, the earlier ones larger. Hollow where an estimator does not claim
    to be unbiased. What has no number is listed below, with the reason.

    Args:
        table: the laboratory's table of gradients: ``where`` (``"one timestep"``, or the name of a whole-chain question), ``t``,
            ``group``, ``estimator``, ``unbiased``, ``variance``, ``reason``.

    Raises:
        OptionError: a column is missing, the table is empty, or matplotlib is not installed.
    """
    table = _checked("table", table, "where t group estimator unbiased variance reason")
    shown = table[table["variance"].notna()]
    names, step = list(dict.fromkeys(shown["estimator"])), shown["where"] == "one timestep"
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": _PALETTE[i % len(_PALETTE)],
            "marker": _MARKERS[(i + i // len(_PALETTE)) % len(_MARKERS)],  # no pair twice
            "markersize": 2.5 + 4 * (1 - i / len(names)),
            "linewidth": 0.8 + 1.5 * (1 - i / len(names)),
        }
        for i, name in enumerate(names)
    }
    below = _small_print(table, ("where", "estimator"))
    groups = list(dict.fromkeys(shown["group"]))
    chains = {group: shown[~step & (shown["group"] == group)] for group in groups}
    lines = {group: _places(rows["where"]) for group, rows in chains.items()}
    heights = [max(1.6, 0.65 + _LINE * max(places, default=0)) for places, _ in lines.values()]
    height = 0.6 + 0.16 * math.ceil(len(names) / 2) + sum(heights) + _SMALL * len(below)
    figure = _figure(_WIDTH, height, dpi=PRINT_DPI)
    sides = [side for side, there in (("one timestep", step.any()), ("whole chains", (~step).any())) if there]
    grid = figure.add_gridspec(max(1, len(groups)), max(1, len(sides)), height_ratios=heights or None)
    for (i, group), (j, side) in itertools.product(enumerate(groups), enumerate(sides)):
        axes = figure.add_subplot(grid[i, j])
        if side == "one timestep":
            by_t = shown[step & (shown["group"] == group)].sort_values("t")
            for name, line in by_t.groupby("estimator", sort=False):
                face = {} if line["unbiased"].all() else {"markerfacecolor": "white"}
                axes.plot(line["t"], line["variance"], **styles[name] | face)
            _log_axis(axes, "y", shown["variance"][step])
            axes.locator_params(axis="x", integer=True)
            axes.set(xlabel=r"timestep $t$", ylabel="variance")
            _plain(axes, 7)
        else:
            rows, (places, blocks) = chains[group], lines[group]
            _log_axis(axes, "x", shown["variance"][~step])
            _dots(axes, places, rows, "variance", [styles[name] for name in rows["estimator"]])
            axes.set_xlabel("variance")
            _name_lines([axes], places, blocks, [""] * len(rows))
        axes.set_title(f"{group}: {side}", loc="left", fontsize=8)
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], **style) for style in styles.values()]
    figure.legend(keys, names, loc="outside upper left", ncols=2, frameon=False, fontsize=7)
    figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=6.5)
    return figure


def posterior(
    found: Posterior | Tensor,
    observation: Tensor | None = None,
    draws: int = 4,
    data_range: tuple[float, float] | None = None,
    units: str = "model units",
) -> Figure:
    """Mean, standard deviation and a few draws of a posterior of images or signals, beside what was observed.

    Images are panels, those of the data's values on one colour scale, the standard deviation on another, from 0 on (of RGB images
    the root mean square over colours). Of signals ``[C, L]`` each channel is a panel: bands of one and two standard deviations about
    the mean, the draws as lines, the observation as dots. The draws stand at evenly spaced places of the cumulative
    weights; two of them may be copies. What the result warns of is written below.

    Args:
        found: particles, weighted as they are (and repeats by their evidence); or draws of equal weight, ``[N, *event]``, such as
            ``chain.x0`` of a Gibbs chain or ``draws["x"]`` of ``Predictive``. Events ``[C, H, W]`` with C = 1 or 3, ``[C, L]``
            or ``[D]``.
        observation: an image ``[C, h, w]`` of any size, or a signal of the event's shape. NaN: not observed.
        draws: number of them.
        data_range: the values at the ends of the colour scale; None: the smallest and largest shown.
        units: of the data.

    Raises:
        ShapeError: the tensors hold no such events.
        OptionError: an option is out of range, or matplotlib is not installed.
    """
    if isinstance(found, Posterior):
        x, weights, notes = found.particles.flatten(0, 1), found.weights.flatten(), found.warnings
    else:
        x, notes = found, ()
        weights = torch.full((len(x),), 1 / max(1, len(x)), dtype=torch.float64, device="cpu")
    x = x.detach().double().cpu()
    if not 2 <= x.dim() <= 4 or not x.numel() or (x.dim() == 4 and x.shape[1] not in (1, 3)):
        raise ShapeError(
            f"a posterior of shape {list(x.shape)} is not [N, C, H, W] with C = 1 or 3, [N, C, L] or [N, D]"
        )
    if draws < 0:
        raise OptionError(f"draws={draws!r} is not at least 0")
    if x.dim() == 2:
        x, observation = x[:, None], None if observation is None else observation[None]
    weights = weights.detach().cpu()
    mean = torch.tensordot(weights, x, 1)
    deviation = torch.tensordot(weights, (x - mean).square(), 1).sqrt()
    shown = x[:0]
    if draws:
        places = (torch.arange(draws, dtype=torch.float64, device="cpu") + 0.5) / draws
        shown = x[torch.searchsorted(weights.cumsum(0), places).clamp(max=len(x) - 1)]
    if observation is not None:
        observation = observation.detach().double().cpu()
        fits = (
            observation.dim() == 3 and len(observation) == x.shape[1]
            if x.dim() == 4
            else observation.shape == x.shape[1:]
        )
        if not fits:
            raise ShapeError(
                f"an observation of shape {list(observation.shape)} does not go with events {list(x.shape[1:])}"
            )
    below = [part for text in notes for part in textwrap.wrap(f"warning: {text}", 130, subsequent_indent="    ")]
    draw = _posterior_images if x.dim() == 4 else _posterior_signals
    figure = draw(mean, deviation, shown, observation, data_range, units, _SMALL * len(below))
    figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=6.5)
    return figure


def smc_diagnostics(found: Posterior) -> Figure:
    """Effective number of weights and Pareto's k-hat of each repeat along the chain, with the families in the title.

    Args:
        found: what :func:`~pyrodiff.inference.smc.smc` returned.

    Raises:
        ProgramError: the result has no weights.
        OptionError: matplotlib is not installed.
    """
    if found.no_evidence:
        raise ProgramError(found.no_evidence)
    repeats, count = found.log_weights.shape
    ess, k = found.ess.cpu(), found.pareto_k.cpu()
    t = torch.arange(ess.shape[1] - 1, -1, -1, device="cpu")
    below = [
        part for text in found.warnings for part in textwrap.wrap(f"warning: {text}", 130, subsequent_indent="    ")
    ]
    figure = _figure(_WIDTH, 2.9 + _SMALL * len(below), dpi=PRINT_DPI)
    left, right = figure.subplots(1, 2)
    style: dict[str, Any] = {"linewidth": 1, "marker": "o" if len(t) <= 40 else "", "markersize": 2.5, "alpha": 0.8}
    for r in range(repeats):
        colour = _PALETTE[r % len(_PALETTE)]
        left.plot(t, 100 * ess[r] / count, color=colour, **style)
        right.plot(t, torch.where(k[r].isfinite(), k[r], math.nan), color=colour, **style)
    left.set(
        ylim=(0, 103),
        ylabel=f"effective share of {count:,} (%)",
        title="Effective number of weights, a line per repeat",
    )
    right.axhline(HEAVY, color="0.4", linewidth=0.8, linestyle="--")
    low, high = right.get_ylim()
    right.set(
        ylim=(min(low, 0), max(high, 1)),
        ylabel=r"$\hat k$",
        title=rf"Pareto's $\hat k$ (above {HEAVY}, a few weights decide)",
    )
    if not k.isfinite().any():
        right.annotate("no tail to fit", (0.5, 0.4), xycoords="axes fraction", ha="center", fontsize=7)
    for axes in (left, right):
        axes.set_xlabel(r"step $t$ of the chain; 0 is $x_0$")
        axes.invert_xaxis()
        axes.locator_params(axis="x", integer=True)
        _plain(axes, 7)
    log_z, error = found.evidence
    families = ", ".join(f"{float(value):.1f}" for value in found.families[:8])
    told = f"± {error:.3f} over repeats" if repeats > 1 else f"± {float(found.families[0]) ** -0.5:.3f} by families"
    lines = [
        f"{found.method}: {count:,} particles, {repeats} repeats; log p(y) = {log_z:.3f} {told}, nats".replace(
            "-", "−"
        ),
        f"families: {families}{', …' if repeats > 8 else ''}",
    ]
    figure.suptitle("\n".join(lines), fontsize=8)
    figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=6.5)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, 150 pixels per inch, tables' 300; a file under ``path`` is replaced at once, or left as it was.

    The same figure gives the same bytes: no date or version is written.

    Args:
        figure: what a function of this module returned.
        path: file to write.

    Raises:
        OSError: the folder is missing, or cannot be written to.
    """
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi="figure", metadata={"Software": None})


# ---------------------------------------------------------------------- the bound


def _by_timestep(terms: ELBOTerms) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """By timestep or bin of timesteps: its mean and last one; the mean KL and its standard error, nats; the weighted sum."""
    kl = terms.draws[terms.kl][1]  # [R, B, C]
    t, weights = terms.t, terms.weights
    repeats, examples, _ = kl.shape
    t, weights = t.expand_as(kl), weights.expand_as(kl)
    if not kl.numel():
        empty = torch.empty(0, dtype=torch.float64, device="cpu")
        return empty, empty, empty, empty, empty
    steps = t.unique()
    size = 1
    if len(steps) > _MOST_BINS:
        size = math.ceil((int(steps[-1]) - int(steps[0]) + 1) / _MOST_BINS)
    _, bins = ((t - steps[0]) // size).unique(return_inverse=True)
    count = int(bins.max()) + 1

    def total(values: Tensor) -> Tensor:  # per image and bin, over columns and repeats
        images = torch.arange(examples, device="cpu")[:, None].expand_as(values)
        flat = torch.zeros(examples * count, dtype=torch.float64, device="cpu")
        return flat.index_add(0, (images * count + bins).flatten(), values.flatten().double()).view(examples, count)

    weight = total(weights).sum(0)
    share = total(weights * kl).sum(0)
    mean = share / weight
    # Images are independent, columns and repeats of one image are not: the error is one over images.
    residual = total(weights * (kl - mean[bins]))
    se = residual.square().sum(0).sqrt() / weight
    se = se * math.sqrt(examples / (examples - 1)) if examples > 1 else torch.full_like(se, math.nan)
    last = torch.zeros(count, device="cpu").scatter_reduce(0, bins.flatten(), t.flatten().float(), "amax")
    return total(weights * t).sum(0) / weight, last, mean, se, share / (repeats * examples)


def _coordinate(schedule: Schedule, t: Tensor, x: str) -> Tensor:
    """Timesteps, of which a bin's mean need not be whole, on the axis asked for."""
    if x == "timestep" or not len(t):
        return t
    every = schedule.log_snr(torch.arange(1, schedule.steps + 1, device="cpu")).detach()
    if schedule.event_dim:
        every = every.flatten(1).mean(1)
    below = (t.long() - 1).clamp(0, schedule.steps - 1)
    above = (below + 1).clamp(max=schedule.steps - 1)
    return torch.lerp(every[below], every[above], t.double() - t.long())


def _mark_ends(axes: Axes, terms: ELBOTerms, schedule: Schedule, x: str) -> None:
    """Say where the running sum starts and what its last step is; and, where it has a meaning, the share."""
    parts = {part: bits_per_dim(terms.by("analytic"), part).mean for part in terms.parts()}
    ends = _coordinate(schedule, torch.tensor([1.0, float(schedule.steps)], device="cpu"), x)
    heights = (parts["reconstruction"], parts["total"])
    axes.plot(ends, heights, "o", color=_COLOURS["analytic"], markersize=5, clip_on=False, zorder=3)
    name = "reconstruction, $t = 1$"
    offset: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8}
    axes.annotate(name, (float(ends[0]), heights[0]), (10, 8), **offset)
    down = -40 if heights[1] >= heights[0] else 40
    axes.annotate("whole bound, prior included", (float(ends[1]), heights[1]), (0, down), ha="right", **offset)
    if all(value >= 0 for value in parts.values()) and parts["total"] > 0:
        axes.set_ylim(bottom=0)
        total = parts["total"]
        to_percent, back = (lambda y: y * (100 / total)), (lambda percent: percent * (total / 100))
        percent = axes.secondary_yaxis("right", functions=(to_percent, back))
        percent.set_ylabel("share of the analytic bound (%)", fontsize=9)
        percent.tick_params(labelsize=8)
        percent.spines["right"].set_visible(False)


def _parts(axes: Axes, terms: ELBOTerms) -> None:
    """Bars of the parts in bits per dim, with their numbers."""
    parts = ("prior", "diffusion", "reconstruction")
    found = {(kl, part): bits_per_dim(terms.by(kl), part) for kl in KLS for part in parts}
    for i, part in enumerate(parts):
        for kl, shift in (("analytic", -0.19), ("monte_carlo", 0.19)):
            value = found[kl, part]
            axes.barh(i + shift, value.mean, 0.34, color=_COLOURS[kl], alpha=0.85)
            if math.isfinite(value.se_examples):
                axes.errorbar(value.mean, i + shift, xerr=value.se_examples, color="0.2", linewidth=1, capsize=2)
            end = max(0.0, value.mean + (value.se_examples if math.isfinite(value.se_examples) else 0))
            axes.annotate(
                _short(value.mean), (end, i + shift), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(parts)), parts)
    axes.invert_yaxis()
    axes.margins(x=0.05)
    low, high = axes.get_xlim()
    axes.set_xlim(low if low < 0 else 0, high + 0.4 * (high - low))
    axes.set_xlabel("bits/dim")
    axes.set_title("Parts")
    _plain(axes)


def _short(value: float) -> str:
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _total(value: Estimate) -> str:
    if math.isfinite(value.se_noise):
        return str(BitsPerDim(*value))
    over_images = f"± {value.se_examples:.4f} over images" if math.isfinite(value.se_examples) else "a single image"
    return f"{value.mean:.4f} bits/dim ({over_images}; a single repeat, so none over noise)"


def _reversed_legend(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


# ---------------------------------------------------------------------- tables


def _checked(name: str, table: pandas.DataFrame, columns: str) -> pandas.DataFrame:
    missing = [column for column in columns.split() if column not in table.columns]
    if missing or not len(table):
        raise OptionError(f"{name} has no {'column ' + ', '.join(map(repr, missing)) if missing else 'rows'}")
    return table


def _small_print(table: pandas.DataFrame, names: Sequence[str]) -> list[str]:
    """What hollow means, and why rows have no number, a sentence for each reason; wrapped to the width of a picture."""
    reasons: dict[str, list[str]] = {}
    for row in table[table["variance"].isna()].to_dict("records"):
        reasons.setdefault(str(row["reason"]), []).append(", ".join(str(row[name]) for name in names))
    lines = [f"No number: {'; '.join(dict.fromkeys(rows))}: {reason}." for reason, rows in reasons.items()]
    lines.insert(0, "Hollow: biased by construction.")
    return [part for line in lines for part in textwrap.wrap(line, 130, subsequent_indent="    ")]


def _places(names: Iterable[str]) -> tuple[list[float], dict[str, tuple[float, float]]]:
    """Where lines stand, those of one name together with a gap after them; and where each name starts and ends."""
    names = list(names)
    places, ends, y = [0.0] * len(names), {}, 0.0
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        height = max(len(rows), len(textwrap.wrap(name, _NAME_WIDTH)))
        for i, row in enumerate(rows):
            places[row] = y + (height - len(rows)) / 2 + i
        ends[name] = (y, y + height - 1)
        y += height + 0.5
    return places, ends


def _dots(
    axes: Axes, places: Sequence[float], rows: pandas.DataFrame, column: str, styles: Sequence[Mapping[str, Any]]
) -> None:
    """A dot for each row. On a logarithmic axis zero and infinity are written at its end, and whiskers are of the logarithm."""
    logarithmic = axes.get_xscale() == "log"
    for y, style, row in zip(places, styles, rows.to_dict("records"), strict=True):
        value, colour, se = float(row[column]), style["color"], row.get(f"{column}_se", math.nan)
        if math.isfinite(value) and (value > 0 or not logarithmic):
            face = colour if row["unbiased"] else "white"
            axes.plot(value, y, **{"marker": "o", **style, "markersize": 3.5, "linestyle": "", "markerfacecolor": face})
            if logarithmic and math.isfinite(se):
                whisker = [value * math.exp(-se / value), value * math.exp(se / value)]
                axes.plot(whisker, [y, y], color=colour, linewidth=0.9, zorder=1)
        elif not math.isnan(value):
            end, text, side = (1, "∞", "right") if value > 0 else (0, "0" if value == 0 else "below 0", "left")
            frame: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            axes.annotate(text, (end, y), (3 - 6 * end, 0), **frame, color=colour, fontsize=6.5, ha=side, va="center")


def _name_lines(
    panels: Sequence[Axes], places: Sequence[float], groups: Mapping[str, tuple[float, float]], names: Sequence[str]
) -> None:
    """Name every line left of the first panel, and every group left of its lines."""
    for axes in panels:
        for first, last in list(groups.values())[::2]:
            axes.axhspan(first - 0.7, last + 0.7, color="0.96", linewidth=0, zorder=-1)
        axes.set_ylim(max(places, default=0.0) + 0.9, -0.9)
        axes.grid(axis="x", color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
        _plain(axes, 7)
        axes.tick_params(axis="y", length=0, labelsize=6.5)
    panels[0].set_yticks(places, names)
    left = -9 - 3.5 * max((len(name) for name in names), default=0)  # points
    frame: dict[str, Any] = {"xycoords": panels[0].get_yaxis_transform(), "textcoords": "offset points"}
    style: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 6.5, "fontweight": "bold", "linespacing": 0.95}
    for name, (first, last) in groups.items():
        panels[0].annotate(textwrap.fill(name, _NAME_WIDTH), (0, (first + last) / 2), (left, 0), **frame, **style)


def _log_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Make an axis logarithmic, from one power of ten to another, where there is anything to show on it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = [value for value in values if math.isfinite(value) and value > 0]
    if not shown:
        axes.set(**{f"{which}ticks": []})
        return
    low, high = math.log10(min(shown)), math.log10(max(shown))
    pad = 0.05 + 0.03 * (high - low)
    limits = 10.0 ** math.floor(low - pad), 10.0 ** math.ceil(high + pad)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log", f"{which}lim": limits})
    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------------- images


def _pixels(name: str, x: Tensor, data_range: tuple[float, float]) -> Tensor:
    """Images to colours: ``[N, H, W, 3]``, uint8."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is a {type(x).__name__}, not a torch.Tensor")
    if x.dim() == 3:
        x = x[:, None]
    if x.dim() != 4 or x.shape[1] not in (1, 3) or not x.numel():
        raise ShapeError(f"{name} has shape {list(x.shape)}, not [N, C, H, W] with C = 1 or 3, or [N, H, W]")
    low, high = data_range
    if not low < high:
        raise OptionError(f"data_range={data_range!r} is not (low, high) with low < high")
    x = (x.detach().float().cpu() - low) / (high - low)
    grey = (x.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    return grey.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def _mosaic(
    rows: list[list[Tensor | None]],
    titles: list[list[str]] | None = None,
    names: list[str] | None = None,
    group: int = 1,
) -> Figure:
    """Rows of tiles ``[H, W, 3]`` on white, without axes.

    The figure has as many pixels as the mosaic, so that none is interpolated, and none is wider than another.

    Args:
        rows: the tiles; None leaves a gap.
        titles: text above the tiles of each row; one row of it is for the first row only.
        names: text left of each row.
        group: rows that belong together; a wider gap follows each group.
    """
    first = rows[0][0]
    if first is None:
        raise ShapeError("the first tile of a mosaic is missing")
    height, width, _ = first.shape
    scale = max(1, round(72 / max(height, width)))
    height, width = height * scale, width * scale
    gap, title_height, margin = 6, 26, 10
    left = margin + (34 if names else 0)
    tops, y = [], margin
    for i in range(len(rows)):
        y += title_height if titles is not None and i < len(titles) else 0
        tops.append(y)
        y += height + (3 * gap if group > 1 and (i + 1) % group == 0 and i + 1 < len(rows) else gap)
    columns = max(len(row) for row in rows)
    canvas_height = y - gap + margin
    canvas_width = left + columns * (width + gap) - gap + margin
    canvas = torch.full((canvas_height, canvas_width, 3), 255, dtype=torch.uint8, device="cpu")
    for top, row in zip(tops, rows, strict=True):
        for j, tile in enumerate(row):
            if tile is not None:
                big = tile.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
                canvas[top : top + height, left + j * (width + gap) :][:, :width] = big
    figure = _figure(canvas_width / DPI, canvas_height / DPI, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas.numpy(), interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for i, texts in enumerate(titles or []):
        for j, text in enumerate(texts):
            at = (left + j * (width + gap) + width / 2 - 0.5, tops[i] - 5)
            axes.text(*at, text, fontsize=7, ha="center", va="bottom")
    for top, name in zip(tops, names or [], strict=False):
        axes.text(left - 8, top + height / 2 - 0.5, name, fontsize=9, ha="right", va="center")
    return figure


# ---------------------------------------------------------------------- posteriors


def _posterior_images(
    mean: Tensor,
    deviation: Tensor,
    draws: Tensor,
    observation: Tensor | None,
    data_range: tuple[float, float] | None,
    units: str,
    below: float,
) -> Figure:
    """Panels of images, ``[C, H, W]``; ``below``: inches of small print."""
    data = [] if observation is None else [("observation", observation)]
    data += [("mean", mean), *((f"draw {i + 1}", draw) for i, draw in enumerate(draws))]
    if data_range is None:
        values = torch.cat([image[image.isfinite()] for _, image in data])
        data_range = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)  # all sand
    low, high = data_range
    if not low < high:
        raise OptionError(f"data_range={data_range!r} is not (low, high) with low < high")
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    at = 1 + (observation is not None)  # of the standard deviation
    count, tall = len(data) + 1, mean.shape[1] / mean.shape[2]
    figure = _figure(1.35 * count, 1.35 * tall + 0.85 + below)
    panels, bars = figure.subplots(2, count, height_ratios=[1.35 * tall, 0.07], squeeze=False)
    for axes, (name, image) in zip([*panels[:at], *panels[at + 1 :]], data, strict=True):
        missing = ~image.isfinite().all(0)
        pixels = ((image - low) / (high - low)).clamp(0, 1).permute(1, 2, 0).repeat(1, 1, 3 // len(image))
        pixels[missing] = torch.tensor(_SAND, dtype=pixels.dtype, device="cpu")
        axes.imshow(pixels.numpy(), interpolation="nearest")
        axes.set_title(name, fontsize=8)
        if missing.any():
            axes.set_xlabel("sand: not observed" if image is observation else "sand: not finite", fontsize=7)
    spread = deviation.square().mean(0).sqrt()
    heat = panels[at].imshow(
        spread.numpy(), cmap="viridis", vmin=0, vmax=float(spread.nan_to_num(0.0).max()) or 1, interpolation="nearest"
    )
    panels[at].set_title("standard deviation", fontsize=8)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    scales = {at: heat} if len(mean) == 3 else {at - 1: ScalarMappable(Normalize(low, high), "gray"), at: heat}
    for i, axes in enumerate(bars):
        if i in scales:
            figure.colorbar(scales[i], cax=axes, orientation="horizontal").set_label(units, fontsize=7)
            axes.tick_params(labelsize=6.5)
        else:
            axes.set_axis_off()
    return figure


def _posterior_signals(
    mean: Tensor,
    deviation: Tensor,
    draws: Tensor,
    observation: Tensor | None,
    data_range: tuple[float, float] | None,
    units: str,
    below: float,
) -> Figure:
    """A panel for each channel of signals ``[C, L]``."""
    channels, length = mean.shape
    figure = _figure(_WIDTH, 0.75 + 1.5 * channels + below)
    panels = figure.subplots(channels, 1, squeeze=False, sharex=True)[:, 0]
    at, colour = torch.arange(length, device="cpu"), _PALETTE[0]
    for c, axes in enumerate(panels):
        for times, alpha in ((2, 0.15), (1, 0.3)):
            low, high = mean[c] - times * deviation[c], mean[c] + times * deviation[c]
            label = f"± {times} standard deviation{'s' * (times > 1)}"
            axes.fill_between(at, low, high, color=colour, alpha=alpha, linewidth=0, label=label)
        for i, draw in enumerate(draws):
            axes.plot(at, draw[c], color="0.35", linewidth=0.6, label="draws" if not i else None)
        axes.plot(at, mean[c], color=colour, linewidth=1.4, label="mean")
        if observation is not None:
            axes.plot(at, observation[c], "o", color=_PALETTE[1], markersize=3, label="observation")
        if data_range is not None:
            axes.set_ylim(data_range)
        axes.set_ylabel(f"channel {c} ({units})" if channels > 1 else units)
        _plain(axes, 7)
    panels[-1].set_xlabel("position")
    panels[-1].locator_params(axis="x", integer=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=7)
    _plain(panels[-1], 7)
    return figure


# ---------------------------------------------------------------------- figures


def _figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained", dpi: int = DPI
) -> Figure:
    """An empty figure, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError('pictures need matplotlib: pip install "pyrodiff[demo]"') from error
    return Figure(figsize=(width, height), dpi=dpi, layout=layout)


def _plain(axes: Axes, size: float = 8) -> None:
    """Without a box; tick labels of this size, in points, and names one larger."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=size)
    axes.title.set_fontsize(size + 1)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(size + 1)
    legend = axes.get_legend()
    if legend is not None:
        for text in legend.get_texts():
            text.set_fontsize(size)


def _limit_to_typical(axes: Axes, values: list[float]) -> None:
    """Cut the first moments of training off, which would flatten all that follows."""
    ordered = sorted(values)
    low, most = ordered[0], ordered[int(0.9 * (len(ordered) - 1))]
    if len(values) >= 10 and ordered[-1] - low > 4 * (most - low) > 0:
        axes.set_ylim(low - 0.1 * (most - low), most + 1.0 * (most - low))


def _running_median(values: list[float], width: int) -> list[float]:
    half = width // 2
    windows = (sorted(values[max(0, i - half) : i + half + 1]) for i in range(len(values)))
    return [window[len(window) // 2] for window in windows]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---------------------------------------------------------------------- calibration


def calibration(result: Calibration, alpha: float = 0.05) -> Figure:
    """How much more often than it should the rank of the truth is below a share of the draws, with the limits for all shares at once.

    The right posterior's line leaves the grey band with probability ``alpha`` at most, each quantity's by itself. Posteriors too
    narrow make an S that starts above 0, too wide ones its mirror image; a shift makes one bow. Drawn in colour, and named: the
    quantities that leave it, seven at most.

    Args:
        result: what :func:`~pyrodiff.inference.calibration.sbc` or :func:`~pyrodiff.inference.calibration.tarp` returned.
        alpha: the band's false-alarm rate.

    Raises:
        OptionError: ``alpha`` is not in (0, 1), or matplotlib is not installed.
    """
    low, high = band(len(result.ranks), result.draws, alpha)
    share = torch.linspace(0, 1, result.draws + 2, dtype=torch.float64, device="cpu")
    figure = _figure(4.2, 3.2)
    axes = figure.subplots()
    axes.fill_between(
        share, low - share, high - share, color="0.88", linewidth=0, label=f"within, but for {100 * alpha:g} %"
    )
    difference = result.coverage.cpu() - share
    worst = result.p_values.argsort().tolist()
    named = [i for i in worst if float(result.p_values[i]) <= alpha][: len(_PALETTE)]
    for i in reversed(worst):
        style: dict[str, Any] = {"color": "0.55", "linewidth": 0.8}
        if i in named:
            colour = _PALETTE[named.index(i)]
            style = {
                "color": colour,
                "linewidth": 1.4,
                "label": f"{result.names[i]}, p = {float(result.p_values[i]):.2g}",
            }
        axes.plot(share, difference[i], **style)
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlabel="share of the draws", ylabel="coverage less the share")
    axes.set_title(f"{result.test}: {len(result.ranks):,} simulations, p = {result.p_value:.2g}")
    handles, names = axes.get_legend_handles_labels()
    axes.legend([handles[0], *handles[:0:-1]], [names[0], *names[:0:-1]], frameon=False)
    _plain(axes)
    return figure
