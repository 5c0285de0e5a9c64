"""The report of a run on held-out data: the ledger, samples and their quality, pictures, and a file for ArviZ."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import inference_data, plots
from .diffusion import GaussianDiffusion
from .elbo import ELBOTerms, bits_per_dim, elbo_terms
from .errors import OptionError, ShapeError
from .sample import sample, trajectory
from .training import metrics
from .training.data import ImageData, to_levels

__all__ = ["ScoringOptions", "bar", "classes_of", "conditioning", "data_range", "enlarges", "report", "score"]


@dataclass
class ScoringOptions:
    """The report on the test split after training.

    Attributes:
        timesteps: timesteps per image and repeat, spread over 2..T; 0 for all of them, along one chain.
        repeats: independent repeats; from 2 on the bound has a standard error over noise.
        samples: samples drawn for the picture and the figures of sample quality.
        sample_steps: a respacing of the chain for them: 100 (at most), ddim50, ...; null for all steps.
        images: at most that many test images are scored.
    """

    timesteps: int = 20
    repeats: int = 4
    samples: int = 1000
    sample_steps: str | None = "100"
    images: int = 2000

    def check(self, diffusion: GaussianDiffusion) -> None:
        """Refuse before training what would fail after it."""
        for name, least in (("timesteps", 0), ("repeats", 1), ("samples", 2), ("images", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"scoring.{name}={getattr(self, name)!r} is not at least {least}")
        if self.timesteps and diffusion.steps < 2:
            raise OptionError(
                f"scoring.timesteps={self.timesteps!r} has nothing to draw from at schedule.steps=1; 0 will do"
            )
        self.respacing(diffusion)

    def respacing(self, diffusion: GaussianDiffusion) -> str | None:
        """Of the samples' chain, checked; a plain number asks for at most so many steps."""
        spec = self.sample_steps
        if spec is None or (spec.isdecimal() and int(spec) >= diffusion.steps):
            return None
        diffusion.schedule.respace(spec)
        return spec


def bar(progress: bool) -> bool:
    """Progress bars are for people: a log file would get thousands of lines."""
    return progress and sys.stderr.isatty()


def classes_of(diffusion: GaussianDiffusion) -> int | None:
    """Number of class labels that the network knows."""
    return _config(diffusion).get("classes")


def enlarges(diffusion: GaussianDiffusion) -> bool:
    """Whether the network is given smaller images."""
    return bool(_config(diffusion).get("low_res_channels"))


def _config(diffusion: GaussianDiffusion) -> dict[str, Any]:
    config = getattr(diffusion.net, "config", None)
    return config if isinstance(config, dict) else {}


def conditioning(
    diffusion: GaussianDiffusion, x0: Tensor, labels: Tensor | None, low_res: int | None
) -> dict[str, Tensor]:
    """What the network is told of images: their labels, if it knows classes; themselves at a smaller size, if it enlarges.

    Args:
        diffusion: the model.
        x0: the images, ``[B, *event]``.
        labels: ``[B]``, or None.
        low_res: the smaller size, to which pixels are averaged, as guided-diffusion's upsamplers are trained.

    Raises:
        OptionError: the size is missing, given for nothing, or not smaller.
    """
    told = {"y": labels} if labels is not None and classes_of(diffusion) is not None else {}
    if not enlarges(diffusion):
        if low_res is not None:
            raise OptionError(
                f"low_res={low_res!r} is for a network that is given smaller images, which this one is not"
            )
        return told
    if low_res is None:
        raise OptionError("the network enlarges images: name the size of those it is given, low_res=4 or so")
    if not 1 <= low_res < min(x0.shape[2:]):
        raise OptionError(f"low_res={low_res!r} is not in 1..{min(x0.shape[2:]) - 1}, below the image's own size")
    return told | {"low_res": F.interpolate(x0, (low_res,) * (x0.dim() - 2), mode="area")}


def score(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    cond: dict[str, Tensor],
    timesteps: int,
    repeats: int,
    chain: bool,
    progress: bool,
) -> ELBOTerms:
    """The ledger of ``x0``, ``[B, *event]``; ``timesteps`` 0 is all of them."""
    options: Any = {"chain": chain, "repeats": repeats, "progress": bar(progress), **cond}
    return elbo_terms(diffusion, x0, timesteps or None, **options)


def data_range(diffusion: GaussianDiffusion) -> tuple[float, float]:
    """Black and white of a picture, in model units."""
    bins = diffusion.reverse_kernel.bins
    return (-1.0, 1.0) if bins is None else bins[1:]


def report(
    diffusion: GaussianDiffusion,
    images: ImageData,
    scoring: ScoringOptions,
    folder: Path,
    seed: int,
    progress: bool,
    low_res: int | None = None,
) -> list[tuple[str, str]]:
    """Score, draw, and write everything; returns the lines of the summary."""
    test = images.test[: scoring.images]
    classes = classes_of(diffusion)
    labels = None if images.test_labels is None else images.test_labels[: scoring.images]
    told = conditioning(diffusion, test, labels, low_res)
    rows_of_test = torch.arange(scoring.samples, device="cpu") % len(test)
    cond = {k: v[rows_of_test] for k, v in told.items()}
    if low_res is None and classes is not None:  # as many of each; smaller images keep their own labels
        cond["y"] = torch.arange(scoring.samples, device="cpu") % classes
    terms = score(diffusion, test, told, scoring.timesteps, scoring.repeats, True, progress)
    rows = [("test", f"{bits_per_dim(terms)}, {len(test)} images")]
    rows += [(f"  {part}", str(bits_per_dim(terms, part))) for part in ("prior", "diffusion", "reconstruction")]
    rows.append(("  by MC KL", str(bits_per_dim(terms.by("monte_carlo")))))
    _write(folder / "ledger.txt", f"{terms}\n")
    _write(folder / "ledger.json", json.dumps([_finite(row) for row in terms.table()], indent=1) + "\n")
    options: Any = {"seed": seed, "progress": bar(progress), **cond}
    samples = sample(diffusion, scoring.samples, "ancestral", scoring.respacing(diffusion), **options).cpu()
    quality = _quality(samples, images, seed)
    rows += [(k, v) for k, v in quality.pop("summary")]
    if quality:
        _write(folder / "samples.json", json.dumps(quality, indent=1) + "\n")
    tree = inference_data.to_datatree(terms, diffusion=diffusion, x0=test, samples=samples[:256])
    inference_data.write(tree, folder / "elbo.nc")
    try:
        _pictures(diffusion, terms, samples, images, folder, seed, cond)
    except (OptionError, ShapeError) as error:  # matplotlib is an extra; the numbers are all there
        rows.append(("no pictures", str(error)))
    return rows


def _quality(samples: Tensor, images: ImageData, seed: int) -> dict[str, Any]:
    """Figures of sample quality, where the data are small labelled images."""
    labels = images.train_labels
    if len(images.test) < 2:
        return {"summary": []}
    if labels is None or images.bins is None or len(images.event_shape) != 3 or max(images.event_shape[1:]) > 32:
        return {"summary": []}
    levels, low, high = images.bins
    on_grid = to_levels(samples, levels) * ((high - low) / (levels - 1)) + low
    classifier = metrics.fit_classifier(images.train, labels, seed=seed)
    shares = metrics.class_shares(classifier, on_grid)
    # Equal numbers everywhere: a Fréchet distance grows as sets shrink. One half of the real images is the reference.
    generator = torch.Generator().manual_seed(seed)
    real = torch.cat([images.train, images.validation, images.test])[: 2 * len(on_grid)]
    real = real[torch.randperm(len(real), generator=generator, device="cpu")]
    reference, other = real.chunk(2)
    noisy = other + 0.15 * torch.randn(other.shape, generator=generator, device="cpu")
    sets = {"samples": on_grid[: len(other)], "real": other, "real_with_noise_0.15": noisy}
    distances = {key: metrics.feature_distance(classifier, reference, x) for key, x in sets.items()}
    name = f"{images.name}-Fréchet"
    text = f"{distances['samples']:.2f}; other real images {distances['real']:.2f}, with noise of 0.15 added "
    text += f"{distances['real_with_noise_0.15']:.2f} ({len(other)} of each)"
    summary = [
        ("samples", f"{len(samples)}, each class between {100 * shares.min():.1f} and {100 * shares.max():.1f} %"),
        (f"  {name}", text),
    ]
    return {"summary": summary, "class_shares": shares.tolist(), name: distances}


def _pictures(
    diffusion: GaussianDiffusion,
    terms: ELBOTerms,
    samples: Tensor,
    images: ImageData,
    folder: Path,
    seed: int,
    cond: Any,
) -> None:
    plots.save(plots.elbo_by_timestep(terms, diffusion.schedule), folder / "elbo_by_timestep.png")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plots.save(plots.training_curve(records), folder / "training.png")
    if len(images.event_shape) == 3:
        plots.save(plots.image_grid(samples[:100], data_range=data_range(diffusion)), folder / "samples.png")
        few = {k: v[:6] for k, v in cond.items()}
        length = min(diffusion.steps, 100)
        path = trajectory(diffusion, 6, steps=length, seed=seed, **few).cpu()
        kept = [*reversed(diffusion.schedule.respace(length).kept), 0]
        plots.save(plots.denoising(path, kept, data_range=data_range(diffusion)), folder / "denoising.png")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """With null for what JSON has no number for (a standard error from one repeat)."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
