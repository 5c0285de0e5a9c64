"""The command: ``pyrodiff train | elbo | compare | sample | convert | info``.

Every option of ``train`` is a field of one of the classes below, on the command line (``--net.width 64``) or in a YAML file
(``--config run.yaml``); what a run ended up with is saved beside its results and starts the same run again.

Exit codes: 0; 2 for a mistake of the user's (one line on stderr says which), 1 for a failure, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]
from torch import Tensor, nn

from . import _files, nets, plots
from ._version import __version__
from .classifier import NoisyClassifier
from .diffusion import GaussianDiffusion
from .elbo import bits_per_dim
from .errors import (
    CheckpointError,
    DataError,
    DivergenceError,
    OptionError,
    ProgramError,
    PyrodiffError,
    SaveError,
    check_option,
)
from .inference_data import replaced
from .interop import convert as formats
from .laboratory.budget import estimate_elbo
from .laboratory.compare import compare_estimators
from .likelihood.methods import METHODS, log_likelihood, options_of
from .report import ScoringOptions, bar, classes_of, conditioning, data_range, enlarges, report, score
from .sample import sample as draw
from .schedules import CosineSchedule, LearnedSchedule, LinearSchedule, LogLinearSchedule, Schedule
from .training import checkpoint
from .training._engine import check_device
from .training.data import ImageData, load_data
from .training.fit import fit

__all__ = ["main"]

_MAX_STEPS = 100_000  # of a schedule: its tables are in memory
_MAX_SAMPLES = 10_000_000
_MAX_COUNT = 1_000_000  # of anything that is drawn, or averaged over, in one command
_MAX_BLOCKS = 1000
_MAX_SCALE = 1_000_000  # of guidance
_MAX_YAML, _MAX_DEPTH = 100_000, 20  # bytes of a file of options, and how deep it may be nested
_MAX_LINE = 1000  # characters of a message
# What the parsers of YAML and of options let through besides their own errors.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_CHAIN = 1000  # steps of the chain that stands for continuous time in a report


@dataclass
class NetOptions:
    """The network: a UNet for images, an MLP for vectors.

    Attributes:
        width: channels at the finest resolution (units of a hidden layer, for vectors).
        multipliers: channels of each resolution, finest first, as multiples of width; each is half the size of the last.
        blocks: residual blocks per resolution (of the MLP).
        attention: resolutions with self-attention, 0 being the finest.
        resample: how the resolution changes: conv, residual or fixed.
        dropout: dropout probability.
        fourier_features: integers n; sin and cos of 2^n pi x join the input.
        conditional: whether the network sees the class labels.
        label_dropout: share of the labels that are dropped in training, for classifier-free guidance.
        low_res: size of the smaller images that the network is given, to enlarge them; default none.
    """

    width: int = 24
    multipliers: list[float] = field(default_factory=lambda: [1, 2])
    blocks: int = 1
    attention: list[int] = field(default_factory=lambda: [1])
    resample: str = "conv"
    dropout: float = 0.0
    fourier_features: list[int] = field(default_factory=lambda: [3, 4])
    conditional: bool = False
    label_dropout: float = 0.0
    low_res: int | None = None


@dataclass
class ScheduleOptions:
    """The noise schedule.

    Attributes:
        kind: log_linear, learned (starts there), linear (DDPM's betas) or cosine.
        steps: number of timesteps T of the diffusion; inf for continuous time (log_linear and learned).
        log_snr_min: log-SNR at t = T, for log_linear and learned.
        log_snr_max: log-SNR at t = 1, likewise; the noise there should be near the width of the data's bins.
    """

    kind: str = "log_linear"
    steps: int | str = 1000
    log_snr_min: float = -5.0
    log_snr_max: float = 6.5

    def build(self) -> Schedule:
        """The schedule."""
        curves = {"log_linear": LogLinearSchedule, "learned": LearnedSchedule}
        tables = {"linear": LinearSchedule, "cosine": CosineSchedule}
        check_option("schedule.kind", self.kind, curves | tables)
        if self.kind in curves and self.steps == "inf":
            return curves[self.kind](math.inf, self.log_snr_min, self.log_snr_max)
        if not (isinstance(self.steps, int) and 1 <= self.steps <= _MAX_STEPS):
            raise OptionError(
                f"schedule.steps={self.steps!r} is not an integer in 1..{_MAX_STEPS} (or inf, for log_linear, learned)"
            )
        if self.kind in curves:
            return curves[self.kind](self.steps, self.log_snr_min, self.log_snr_max)
        return tables[self.kind](self.steps)


@dataclass
class ModelOptions:
    """What the network's output means.

    Attributes:
        prediction: eps, x0, v, score or previous.
        variance: fixed_small, fixed_large, learned or learned_range.
        decoder: scale of p(x_0 | x_1): vdm, learned, openai, or openai_tanh (guided-diffusion's approximate bins too).
        objective: elbo; or simple, min_snr, p2, hybrid, none of which is a bound.
    """

    prediction: str = "v"
    variance: str = "fixed_small"
    decoder: str = "learned"
    objective: str = "elbo"


@dataclass
class TrainingOptions:
    """The optimiser's loop.

    Attributes:
        steps: optimiser steps.
        batch_size: examples per step.
        accumulate: parts a batch is split into, to save memory.
        lr: peak learning rate, in (0, 1].
        warmup: steps over which it rises.
        lr_schedule: cosine or constant.
        weight_decay: AdamW's.
        clip_norm: largest norm of the gradient of the loss in nats per dim.
        ema_decay: rate of the weights' average.
        kl: analytic or monte_carlo.
        timesteps: low_discrepancy, uniform or importance.
        precision: float32 or bf16.
        validate_every: steps between validations; default a tenth of steps.
    """

    steps: int = 1800
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 3e-3
    warmup: int = 100
    lr_schedule: str = "cosine"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    kl: str = "analytic"
    timesteps: str = "importance"
    precision: str = "float32"
    validate_every: int | None = None


def train(
    data: str,
    out: str | None = None,
    net: NetOptions = NetOptions(),  # noqa: B008  (read only; jsonargparse wants the default itself)
    schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008
    model: ModelOptions = ModelOptions(),  # noqa: B008
    training: TrainingOptions = TrainingOptions(),  # noqa: B008
    scoring: ScoringOptions = ScoringOptions(),  # noqa: B008
    data_dir: str | None = None,
    levels: int | None = None,
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Train a diffusion model, score it on held-out data, draw samples; leave it all in one folder.

    Args:
        data: digits, mnist, fashion-mnist, a folder of images, or a .npy or .npz file.
        out: the run's folder; default runs/<data>, with a number if that is taken.
        net: the network.
        schedule: the noise schedule.
        model: what the network's output means.
        training: the optimiser's loop.
        scoring: the report afterwards.
        data_dir: where mnist and fashion-mnist lie.
        levels: number of levels of an integer array whose dtype does not tell.
        seed: of data order, noise, timesteps and samples.
        device: cpu, cuda, cuda:1, ...; default cuda where there is one.
        resume: go on with the run in --out, with the same options.
        progress: show progress bars.
    """
    started = time.monotonic()
    images = load_data(data, seed=seed, levels=levels, data_dir=data_dir)
    if net.conditional and images.train_labels is None:
        raise OptionError(f"net.conditional=true, but {images.name} has no labels")
    if net.low_res is not None and len(images.event_shape) == 1:
        raise OptionError(f"net.low_res={net.low_res!r} is for images, and {images.name} holds vectors")
    if schedule.steps == "inf" and training.timesteps == "importance":
        raise OptionError(
            'training.timesteps="importance" keeps a history of each t, of which continuous time has too many: '
            "take low_discrepancy"
        )
    if resume and out is None:
        raise OptionError("resume=true needs out: the folder of the run to continue")
    folder = Path(out) if out is not None else _free_folder(Path("runs") / images.name)
    if not resume and _taken(folder):
        raise OptionError(
            f"out={str(folder)!r} holds a run already; continue it with --resume true, or name another folder"
        )
    _check_counts(**{f"scoring.{k}": getattr(scoring, k) for k in ("timesteps", "repeats", "samples")})
    diffusion = _build(images, net, schedule, model, seed)
    _check_memory(f"scoring.samples={scoring.samples}", 4 * scoring.samples * diffusion.event_shape.numel())
    _check_terms(scoring.timesteps, scoring.repeats, min(scoring.images, len(images.test)))
    # Continuous time is trained; what is sampled from and reported is a chain of its steps.
    scored = diffusion.respace(_CHAIN) if diffusion.schedule.continuous else diffusion
    scoring.check(scored)
    options = {
        "data": data, "net": asdict(net), "schedule": asdict(schedule), "model": asdict(model), "training": asdict(training),
        "scoring": asdict(scoring), "data_dir": data_dir, "levels": levels, "seed": seed, "device": device,
    }  # fmt: skip
    first = int(os.environ.get("RANK", "0")) == 0
    text = yaml.safe_dump(options, sort_keys=False)
    if first:
        if not resume:  # a resumed run keeps its own until these options have proved to be its continuation
            with _files.lock(folder):
                _files.write(folder / "run.yaml", text)
        parameters = sum(p.numel() for p in diffusion.parameters())
        _say(
            f"{images.description}\n{type(diffusion.net).__name__} with {parameters:,} parameters, T = {diffusion.steps}"
        )
    cond = conditioning(diffusion, images.train, images.train_labels, net.low_res)
    validation_cond = conditioning(diffusion, images.validation, images.validation_labels, net.low_res)
    result = fit(
        diffusion, images.train, images.validation, cond=cond, validation_cond=validation_cond,
        folder=folder, resume=resume, seed=seed, device=device, progress=progress, **asdict(training),
    )  # fmt: skip
    if first:
        _files.write(folder / "run.yaml", text)
    if result.interrupted:
        if first:
            again = f"pyrodiff train --config {folder / 'run.yaml'} --out {folder} --resume true"
            _say(f"\nstopped at step {result.steps} of {training.steps}; go on with: {again}")
        sys.exit(128 + result.interrupted)
    if first:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rows = report(scored, images, scoring, folder, seed, progress, net.low_res)
        if scored is not diffusion:
            rows.insert(0, ("chain", f"{_CHAIN} steps of continuous time"))
        rows.insert(0, ("training", f"{result.steps} steps in {result.seconds:.0f} s, best at {result.best_step}"))
        rows.append(("all in", f"{time.monotonic() - started:.0f} s"))
        lines = [f"{name:16s}  {text}" for name, text in rows]
        files = [str(path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
        _say("\n".join(["", *lines, "", *files]))


def _say(text: str) -> None:
    """Print, now. Where nobody reads any more, as after ``| head -1``, the work goes on all the same."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def elbo(
    run: str,
    data: str | None = None,
    split: str = "test",
    timesteps: int = 32,
    repeats: int = 4,
    chain: bool = True,
    images: int | None = None,
    steps: str | None = None,
    low_res: int | None = None,
    data_dir: str | None = None,
    levels: int | None = None,
    se: float | None = None,
    over: str = "examples",
    method: str | None = None,
    options: dict[str, Any] = {},  # noqa: B006  (read only; jsonargparse wants the default itself)
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Print the ELBO ledger of a trained model, every term by analytic and by Monte Carlo KL; or another estimate of log p(x_0).

    Args:
        run: a run's folder, a model.safetensors, or a model of another format (see convert).
        data: what to score; default the run's own data.
        split: train, validation or test.
        timesteps: timesteps per image and repeat, spread over 2..T; 0 for all of them.
        repeats: independent repeats; from 2 on there is a standard error over noise.
        chain: with all timesteps, walk one chain per image; false draws each state independently.
        images: score only the first so many.
        steps: a respacing of the chain to score: 100, ddim50, ...; default all steps.
        low_res: size of the smaller images that an upsampler is given; default the run's own.
        data_dir: where mnist and fashion-mnist lie.
        levels: number of levels of an integer array whose dtype does not tell.
        se: only the total, to this standard error in bits/dim, with the fewest network evaluations.
        over: what that standard error is over: examples (as drawn from a population) or noise (given these images).
        method: instead of the ledger one table of log p(x_0): elbo, iwae, ode (the probability flow) or immse.
        options: of the method, see pyrodiff.log_likelihood: --options.chains 64 (iwae), --options.points 32 (immse), ...
        seed: of the noise.
        device: default cuda where there is one.
        progress: show a progress bar.
    """
    check_option("over", over, ("examples", "noise"))
    _check_counts(timesteps=timesteps, repeats=repeats)
    if method is not None:
        check_option("method", method, METHODS)
        for name in options:
            check_option(f"an option of {method}", name, options_of(method))
        if se is not None:
            raise OptionError(f"se={se!r} plans evaluations of the ELBO; method={method!r} does not take it")
    elif options:
        raise OptionError(f"options={options!r} are a method's: name it with --method")
    scored = _scored(run, data, split, images, low_res, data_dir, levels, seed, device)
    _check_terms(timesteps, repeats, len(scored.x0))
    if steps is not None:
        scored = scored._replace(diffusion=scored.diffusion.respace(steps))
    print(f"{scored.about}, T = {scored.diffusion.steps}")
    common: Any = {"seed": seed, "progress": bar(progress), **scored.cond}
    if se is not None:
        print(estimate_elbo(scored.diffusion, scored.x0, se, over, **common))
        return
    if method is not None:
        own = {"timesteps": timesteps or None, **options} if method == "elbo" else options
        print(f"\n{log_likelihood(scored.diffusion, scored.x0, method, repeats=repeats, **own, **common)}")
        return
    torch.manual_seed(seed)
    terms = score(scored.diffusion, scored.x0, scored.cond, timesteps, repeats, chain, progress)
    print(f"\n{terms}\n\n{terms.network_evaluations:,} network evaluations\n{bits_per_dim(terms)}")


def compare(
    run: str,
    out: str | None = None,
    data: str | None = None,
    split: str = "test",
    examples: int = 8,
    repeats: int = 8,
    steps: str | None = None,
    timesteps: list[int] = [1, 16],  # noqa: B006  (read only; jsonargparse wants the default itself)
    iwae: list[int] = [1, 4],  # noqa: B006
    controls: bool = False,
    gradients: int = 16,
    se: float | None = None,
    low_res: int | None = None,
    data_dir: str | None = None,
    levels: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Compare ways of estimating a trained model's ELBO and its gradient: variance, bias, cost, efficiency.

    Args:
        run: a run's folder, a model.safetensors, or a model of another format (see convert).
        out: folder for tables (CSV), pictures (PNG) and comparison.nc; default <run's folder>/comparison.
        data: what to score; default the run's own data.
        split: train, validation or test.
        examples: images to compare on.
        repeats: draws of every estimator that evaluates all timesteps.
        steps: a respacing of the chain to compare on: 100, ddim50, 10,10,10, ...; default all steps.
        timesteps: numbers of timesteps per draw to compare.
        iwae: numbers of chains of importance-weighted bounds; K of them need 2 K repeats.
        controls: add estimators known to be biased.
        gradients: draws of every gradient; 0 for no gradients.
        se: also estimate the bound of the whole split to this standard error, bits/dim.
        low_res: size of the smaller images that an upsampler is given; default the run's own.
        data_dir: where mnist and fashion-mnist lie.
        levels: number of levels of an integer array whose dtype does not tell.
        seed: of everything.
        device: default cuda where there is one.
        progress: show progress bars.
    """
    _check_counts(repeats=repeats, gradients=gradients, **{"a number of timesteps": max(timesteps, default=1)})
    if examples < 1:
        raise OptionError(f"examples={examples!r} is not at least 1")
    scored = _scored(run, data, split, None, low_res, data_dir, levels, seed, device)
    diffusion = scored.diffusion if steps is None else scored.diffusion.respace(steps)
    cond = {k: v[:examples] for k, v in scored.cond.items()}
    pool = {} if se is None else {"pool": scored.x0, "se": se, "pool_cond": scored.cond}
    options: Any = {"seed": seed, "progress": bar(progress), **pool, **cond}
    found = compare_estimators(
        diffusion, scored.x0[:examples], repeats=repeats, timesteps=timesteps, iwae=iwae, controls=controls,
        gradients=gradients or None, **options,
    )  # fmt: skip
    print(f"{scored.about}\n{found}\n")
    for path in found.save(_run_folder(run) / "comparison" if out is None else out):
        print(path)


def sample(
    run: str,
    n: int = 64,
    out: str = "samples.png",
    method: str = "ancestral",
    steps: str | None = None,
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    classifier: str | None = None,
    classifier_scale: float = 1.0,
    last: str = "mean",
    label: int | None = None,
    low_res: int | None = None,
    data: str | None = None,
    split: str = "test",
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Draw samples from a trained model.

    Args:
        run: a run's folder, a model.safetensors, or a model of another format (see convert).
        n: number of samples.
        out: a .png picture, or a .npy array in model units.
        method: ancestral or ddim; or, deterministic and of second order, dpm++2m or heun.
        steps: a respacing of the chain: 50, ddim50, 10,10,10, ...; default all steps.
        eta: noise of ddim and dpm++2m, from 0 (none) to 1.
        guidance_scale: of classifier-free guidance towards the label, for a network with a null class; 1 for none.
        classifier: a classifier of noisy images to guide towards the label: its folder, or a guided-diffusion .pt file.
        classifier_scale: what its log-probability is multiplied by.
        last: mean (the decoder's mean, no noise at the last step) or sample (a draw from the decoder).
        label: class to draw, for a conditional model or a classifier.
        low_res: size of the smaller images that an upsampler is given, made of the data's; default the run's own.
        data: whose images an upsampler enlarges; default the run's own.
        split: train, validation or test.
        seed: sample i depends on the seed and i alone.
        device: default cuda where there is one.
        progress: show a progress bar.
    """
    path = Path(out)
    check_option("the suffix of out", path.suffix, (".png", ".npy"))
    diffusion = _load(run, device)
    if not 1 <= n <= _MAX_SAMPLES:
        raise OptionError(f"n={n!r} is not in 1..{_MAX_SAMPLES}")
    _check_memory(f"n={n}", 4 * n * diffusion.event_shape.numel())
    if path.suffix == ".png" and len(diffusion.event_shape) != 3:
        raise OptionError(f"out={out!r} is a picture, and the model's are vectors: give a .npy")
    for name, scale in (("guidance_scale", guidance_scale), ("classifier_scale", classifier_scale)):
        if not abs(scale) <= _MAX_SCALE:  # NaN too
            raise OptionError(f"{name}={scale!r} is not a number up to {_MAX_SCALE}")
    options: dict[str, Any] = {"eta": eta, "guidance_scale": guidance_scale, "progress": bar(progress)}
    classes, at = classes_of(diffusion), next(diffusion.parameters()).device
    if classifier is None and classifier_scale != 1:
        raise OptionError(f"classifier_scale={classifier_scale!r} is for a classifier, and there is none")
    if data is not None and not enlarges(diffusion):
        raise OptionError(f"data={data!r} is for a network that enlarges images, which this one does not")
    if steps is None and diffusion.schedule.continuous:
        steps = str(_CHAIN)
    if classifier is not None:
        if label is None:
            raise OptionError(f"classifier={classifier!r} guides towards a label, which is not given")
        loaded = formats.load_classifier(classifier)
        if loaded.event_shape != diffusion.event_shape:
            shapes = f"{list(loaded.event_shape)}, not {list(diffusion.event_shape)}"
            raise OptionError(f"classifier={classifier!r} is of events of shape {shapes}")
        # The network is told the log-SNR, and so may have been trained on another schedule.
        judge = NoisyClassifier(loaded.net, diffusion.schedule, diffusion.event_shape).to(at)
        options["classifier"] = lambda x_t, t, y: classifier_scale * judge.log_prob(x_t, t, y)
        options["classifier_cond"] = {"y": label}
        if classes is None:
            classes = getattr(judge.net, "config", {}).get("classes")
    if label is not None and classes is not None and not 0 <= label < classes:
        raise OptionError(f"label={label!r} is not in 0..{classes - 1}")
    cond: Any = {}
    if enlarges(diffusion) or low_res is not None:
        check_option("split", split, ("train", "validation", "test"))
        _, told = _told(run, diffusion, _run_data(run, data, None, None), split, low_res)
        cond = {k: v[torch.arange(n, device=at) % len(v)] for k, v in told.items()}
    if label is not None and (classifier is None or classes_of(diffusion) is not None):
        cond["y"] = torch.full((n,), label, device=at)
    x = draw(diffusion, n, method, steps, seed, last, **options, **cond)
    if not x.isfinite().all():
        raise DivergenceError(f"{int((~x.isfinite()).flatten(1).any(1).sum())} of {n} samples are not finite")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        plots.save(plots.image_grid(x.cpu(), data_range=data_range(diffusion)), path)
    else:
        with replaced(path) as temporary, open(temporary, "wb") as file:
            np.save(file, x.cpu().numpy())
    print(path)


def convert(source: str, out: str, format: str, card: str | None = None) -> None:
    """Convert a model between pyrodiff, diffusers and guided-diffusion.

    Args:
        source: a run's folder or its model.safetensors, a folder of diffusers, or a guided-diffusion .pt file.
        out: what to write: a folder; for guided-diffusion a .pt file (its flags go into the .json beside it).
        format: pyrodiff, diffusers or guided-diffusion.
        card: flags of a guided-diffusion source: a published checkpoint's name, or a .json file; default by its file's name.
    """
    for path in formats.convert(source, out, format, card):
        print(path)


def info(run: str, card: str | None = None) -> None:
    """Say what a checkpoint holds.

    Args:
        run: a run's folder, a model.safetensors, a folder of diffusers, or a guided-diffusion .pt file.
        card: flags of a guided-diffusion file: a published checkpoint's name, or a .json file; default by its file's name.
    """
    print(yaml.safe_dump(formats.describe(run, card), sort_keys=False).strip())
    log = _run_folder(run) / "metrics.jsonl"
    if log.is_file() and (records := log.read_text(encoding="utf-8", errors="replace").splitlines()):
        print(f"last record: {records[-1]}")


# ---------------------------------------------------------------------- their parts


class _Scored(NamedTuple):
    diffusion: GaussianDiffusion
    x0: Tensor
    cond: dict[str, Tensor]
    about: str


def _scored(
    run: str,
    data: str | None,
    split: str,
    images: int | None,
    low_res: int | None,
    data_dir: str | None,
    levels: int | None,
    seed: int,
    device: str | None,
) -> _Scored:
    """A model, and images that its numbers mean something for, on its device."""
    check_option("split", split, ("train", "validation", "test"))
    if images is not None and images < 1:
        raise OptionError(f"images={images!r} is not at least 1")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed={seed!r} is not an integer in 0..2**63 - 1")
    diffusion, loaded = _load(run, device), _run_data(run, data, data_dir, levels)
    if loaded.bins != diffusion.reverse_kernel.bins:
        kinds = [
            "continuous" if b is None else f"on {b[0]} levels" for b in (loaded.bins, diffusion.reverse_kernel.bins)
        ]
        raise DataError(f"{loaded.name} is {kinds[0]}, the model {kinds[1]}: their bits/dim would mean nothing")
    x0, cond = _told(run, diffusion, loaded, split, low_res)
    x0, cond = x0[:images], {k: v[:images] for k, v in cond.items()}
    return _Scored(diffusion, x0, cond, f"{loaded.description}; {len(x0)} images of the {split} split")


def _told(
    run: str, diffusion: GaussianDiffusion, loaded: ImageData, split: str, low_res: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The images of a split, and what the network is told of them, on its device."""
    at = next(diffusion.parameters()).device
    x0, labels, classes = getattr(loaded, split), getattr(loaded, f"{split}_labels"), classes_of(diffusion)
    if classes is not None and labels is not None and int(labels.max()) >= classes:
        raise DataError(f"{loaded.name} has label {int(labels.max())}, and the model {classes} classes")
    if low_res is None and enlarges(diffusion):
        net = _run_options(run).get("net")
        low_res = net.get("low_res") if isinstance(net, dict) else None
        if low_res is not None and type(low_res) is not int:  # true is an int too
            raise DataError(f"{_run_folder(run) / 'run.yaml'} has net.low_res={low_res!r}, which is not an integer")
    return x0.to(at), {k: v.to(at) for k, v in conditioning(diffusion, x0, labels, low_res).items()}


def _taken(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return any((folder / name).exists() for name in ("resume.safetensors", checkpoint.MODEL))


def _run_folder(run: str) -> Path:
    path = Path(run)
    return path.parent if path.is_file() else path


def _free_folder(folder: Path) -> Path:
    number, candidate = 1, folder
    while _taken(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _build(
    images: ImageData, net: NetOptions, schedule: ScheduleOptions, model: ModelOptions, seed: int
) -> GaussianDiffusion:
    channels = images.event_shape[0]
    outputs = channels * (2 if model.variance.startswith("learned") else 1)
    splits = (images.train_labels, images.validation_labels, images.test_labels)
    classes = max(int(y.max()) + 1 for y in splits if y is not None and len(y)) if net.conditional else None
    if net.blocks > _MAX_BLOCKS:
        raise OptionError(f"net.blocks={net.blocks} is more than {_MAX_BLOCKS}")

    def network() -> nn.Module:
        if len(images.event_shape) == 1:
            return nets.MLP(
                channels, out_features=outputs, width=net.width, depth=net.blocks, classes=classes,
                label_dropout=net.label_dropout,
            )  # fmt: skip
        return nets.UNet(
            channels, out_channels=outputs, width=net.width, multipliers=net.multipliers, blocks=net.blocks,
            attention=net.attention, resample=net.resample, dropout=net.dropout, fourier_features=net.fourier_features, classes=classes,
            label_dropout=net.label_dropout, low_res_channels=0 if net.low_res is None else channels,
        )  # fmt: skip

    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):  # without memory: first see how much it would take
                parameters = sum(parameter.numel() for parameter in network().parameters())
        except OptionError:
            raise
        except (*_MALFORMED, RuntimeError) as error:  # of a width of NaN, or sizes that overflow
            raise OptionError(f"net={asdict(net)} is no network: {error}") from None
        # The weights, their average and their gradients, and AdamW's two moments.
        _check_memory(f"a network of {parameters:,} parameters", 5 * 4 * parameters)
        torch.manual_seed(seed)
        built = network()
    if len(images.event_shape) == 3:  # a quarter faster on a CPU, and what tensor cores want
        built = built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return GaussianDiffusion(built, schedule.build(), images.event_shape, bins=images.bins, **asdict(model))


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count > _MAX_COUNT:
            raise OptionError(f"{name}={count} is more than {_MAX_COUNT}")


def _check_memory(what: str, needed: int) -> None:
    """Refuse what this machine cannot hold; asking for it could end other programs as well as this one."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else needed
    if needed > total:
        raise OptionError(
            f"{what} would take {needed / 2**30:,.0f} GiB of memory, and this machine has {total / 2**30:,.0f}"
        )


def _check_terms(timesteps: int, repeats: int, images: int) -> None:
    """The ledger keeps every term of the bound, by two KLs in float64."""
    _check_memory(f"timesteps={timesteps} and repeats={repeats} of {images} images", 16 * timesteps * repeats * images)


def _load(run: str, device: str | None) -> GaussianDiffusion:
    return formats.load(run).to(check_device(device))


def _run_data(run: str, data: str | None, data_dir: str | None, levels: int | None) -> ImageData:
    """The data named, or the run's own."""
    if data is not None:
        return load_data(data, data_dir=data_dir, levels=levels)
    options = _run_options(run)
    if not isinstance(options.get("data"), str):
        path = _run_folder(run) / "run.yaml"
        raise OptionError(f"{path} does not name the run's data: name it with --data")
    return load_data(
        options["data"],
        seed=options.get("seed", 0),
        levels=levels or options.get("levels"),
        data_dir=data_dir or options.get("data_dir"),
    )


def _run_options(run: str) -> dict[str, Any]:
    """What the run was started with; nothing for a model without a run."""
    path = _run_folder(run) / "run.yaml"
    options = _read_yaml(path) if path.is_file() else {}
    return options if isinstance(options, dict) else {}


def _read_yaml(path: Path) -> Any:
    """A file from anywhere: refused where it would take long to read, or could unfold to any size (aliases of aliases of ...)."""
    if not path.is_file():  # a pipe would wait for its writer, and a device never end
        raise OptionError(f"{str(path)!r} is no file" if path.exists() else f"{str(path)!r} does not exist")
    if (size := path.stat().st_size) > _MAX_YAML:
        raise OptionError(f"{str(path)!r} has {size} bytes, more than {_MAX_YAML}")
    depth = 0
    try:
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise OptionError(f"{str(path)!r} is nested more than {_MAX_DEPTH} deep")
            if isinstance(event, yaml.AliasEvent):
                raise OptionError(f"{str(path)!r} has YAML aliases (*name), which are not accepted")
        return yaml.safe_load(text)
    except OptionError:
        raise
    except (*_MALFORMED, yaml.YAMLError) as error:
        raise OptionError(f"{str(path)!r} is no YAML: {error}") from None


# ---------------------------------------------------------------------- the entry point


class _ConfigFile(ActionConfigFile):
    """``--config``, for a file from anywhere."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        _read_yaml(Path(str(values)))
        super().__call__(parser, cfg, values, option_string)


class _Parser(ArgumentParser):
    """Mistakes in options become exceptions, so that one place prints them."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise OptionError(" ".join(message.split()))


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train, "elbo": elbo, "compare": compare, "sample": sample, "convert": convert, "info": info,
}  # fmt: skip


def _parser() -> _Parser:
    parser = _Parser(prog="pyrodiff", description="Gaussian diffusion models as Pyro programs.", version=__version__)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        sub = _Parser(description=summary)
        if name == "train":
            sub.add_argument(
                "--config", action=_ConfigFile, help="a YAML file of these options, such as a run's run.yaml"
            )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_function_arguments(function, as_positional=True, sub_configs=False)
        commands.add_subcommand(name, sub, help=summary)
    return parser


def _parse(arguments: list[str]) -> tuple[str, Namespace]:
    """The command and its options."""
    parser = _parser()
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # its name from 4.49 on
    try:
        parsed: Namespace = parser.parse_args(arguments)
        options = instantiate(parsed)[parsed.command]
    except OptionError:
        raise
    except RecursionError:
        raise OptionError("the options are nested too deeply") from None
    except TypeError as error:  # "net: 3", which the parser lets through
        raise OptionError(f"a group of options (net, schedule, ...) is no mapping: {error}") from None
    except _MALFORMED as error:  # a number of 5000 digits, ...
        raise OptionError(f"the options cannot be read: {error}") from None
    for name, value in vars(options).items():  # most are paths, and all may be printed
        if isinstance(value, str) and (not value or "\0" in value or not _encodable(value)):
            raise OptionError(f"{name}={value!r} is empty, or holds a character that no path can")
    return parsed.command, options


def _encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _line(text: str) -> str:
    """Text that may come from anywhere, on one line that a terminal shows as it is and a person reads to its end."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= _MAX_LINE else f"{text[: _MAX_LINE // 2]} ... {text[-_MAX_LINE // 2 :]}"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command at once; :func:`fit` has handlers of its own, and these from a second signal on.

    An exception instead, as Python's own handler raises, may come up in the middle of anything, and be lost in a destructor.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    # A signal that is ignored, as in a shell's background, stays so.
    handlers = {n: signal.getsignal(n) for n in numbers}
    previous = {n: handler for n, handler in handlers.items() if handler is not None and handler != signal.SIG_IGN}
    try:
        for n in previous:
            signal.signal(n, leave)
        yield
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    # What cannot be printed is shown escaped: names of files that are no text, and ± where the locale knows only ASCII.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with _ended_by_signals():
                command, options = _parse(arguments)
                COMMANDS[command](**{k: v for k, v in vars(options).items() if k not in ("config", "debug")})
        finally:
            sys.stdout.flush()  # here, where a closed pipe is not yet the interpreter's problem
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `pyrodiff ... | head`: nobody is reading, and nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        text = _line(str(error))
        if isinstance(error, PyrodiffError | OSError):
            users = isinstance(error, ValueError | OSError | CheckpointError | ProgramError)
            users &= not isinstance(error, SaveError)  # a full disk
        else:
            users, text = False, f"{type(error).__name__}: {text} (--debug shows where)"
        print(f"pyrodiff: {text}", file=sys.stderr)
        sys.exit(2 if users else 1)
    sys.exit(0)
