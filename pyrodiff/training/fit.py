"""Training: a loop over Pyro's ELBO of (model, guide), one random timestep per example.

Nothing here knows what the loss is: it is ``TraceMeanField_ELBO()(diffusion.model, diffusion.guide)``, an ``nn.Module``, and
the loop is what one writes around any such loss: mini-batches, an optimiser, an average of the weights, validation,
checkpoints. Where it runs (CPU, GPU, several processes under torchrun) is decided at the start and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions
import pyro.infer
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import _files
from .. import timesteps as draws
from .._tensor import check_event, is_out_of_memory, seed_everything, seeded
from .._version import __version__
from ..classifier import NoisyClassifier
from ..diffusion import GaussianDiffusion
from ..elbo import BitsPerDim, Estimate, TraceMeanField_ELBO, bits_per_dim, elbo_terms, site_terms
from ..errors import (
    CheckpointError,
    DataError,
    DivergenceError,
    OptionError,
    OutOfMemoryError,
    check_option,
)
from . import checkpoint
from ._engine import Engine, Stop, digest, interruptible
from .ema import EMA

__all__ = ["Fit", "fit"]

TIMESTEPS = ("low_discrepancy", "uniform", "importance")
ELBOS = {"analytic": TraceMeanField_ELBO, "monte_carlo": pyro.infer.Trace_ELBO}
CHECKED_STEPS = 3  # steps with Pyro's validation and the strict ELBO's checks on; the programs do not change after
MAX_SKIPPED = 20  # non-finite steps in a row before giving up


@dataclass
class Fit:
    """What :func:`fit` did.

    Attributes:
        steps: optimiser steps made, over all runs of this folder.
        best_step: the step whose averaged weights validated best (the last one, without validation data).
        best: its validation bound, in bits/dim (a classifier's cross-entropy, in nats); None without validation data.
        skipped: steps left out because the loss or its gradient was not finite.
        seconds: wall time of this run.
        records: one dictionary per validation: step, mean training loss since the last one, bits per dim, ...
        interrupted: the signal that ended it early, 2 (Ctrl-C) or 15 (SIGTERM), with the state saved; 0 for none.
    """

    steps: int = 0
    best_step: int = 0
    best: Estimate | None = None
    skipped: int = 0
    seconds: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    interrupted: int = 0


def fit(
    diffusion: GaussianDiffusion | NoisyClassifier,
    data: Tensor,
    validation: Tensor | None = None,
    *,
    cond: dict[str, Tensor] | None = None,
    validation_cond: dict[str, Tensor] | None = None,
    steps: int = 1000,
    batch_size: int = 128,
    accumulate: int = 1,
    lr: float = 1e-3,
    warmup: int = 100,
    lr_schedule: str = "cosine",
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    ema_decay: float = 0.999,
    kl: str = "analytic",
    timesteps: str = "low_discrepancy",
    precision: str = "float32",
    validate_every: int | None = None,
    validation_timesteps: int = 8,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Fit:
    """Train a diffusion, or a classifier of noisy examples, by stochastic variational inference.

    On return the diffusion holds the averaged weights of the best validation (of the last step, without validation data), on
    ``device``. The random state of torch outside is left as it was. Under torchrun each process takes its share of every
    batch (Lightning Fabric averages the gradients), has noise of its own, and only rank 0 writes.

    Ctrl-C or SIGTERM, once: the step is finished with all its accumulated parts, the state saved, and ``Fit.interrupted`` set;
    twice: at once, and the state saved last stays. A step whose loss or gradient is not finite changes nothing, on any process.
    Neither precision scales the loss, so that there is no scale to lose.

    Args:
        diffusion: what to train; its ``objective`` is what is minimised. A :class:`~pyrodiff.NoisyClassifier` needs the labels
            ``cond={"y": ...}``; its loss is in nats per example.
        data: ``[N, *event]`` in model units, in memory or memory-mapped: rows are taken batch by batch, and there are no data workers.
        validation: ``[M, *event]``, for choosing the best weights; scored by the ELBO whatever the objective (a classifier by
            its cross-entropy, over all timesteps).
        cond, validation_cond: conditioning values with a row per example, by name (class labels ``y``, ...).
        steps: optimiser steps in all, those before a resume included.
        batch_size: examples per optimiser step, over all processes and accumulated parts.
        accumulate: parts that a batch is split into, to save memory; the gradient is the whole batch's.
        lr: peak learning rate of AdamW (betas 0.9 and 0.99), in (0, 1].
        warmup: steps over which it rises linearly.
        lr_schedule: ``"cosine"`` (falls to 0 at the last step) or ``"constant"``.
        weight_decay: AdamW's, of the network's parameters.
        clip_norm: largest norm of the whole gradient; of the loss in nats per dim, so that it survives a change of B, D, T.
        ema_decay: rate of the weights' average.
        kl: ``"analytic"`` (TraceMeanField_ELBO) or ``"monte_carlo"`` (Trace_ELBO).
        timesteps: ``"low_discrepancy"``, ``"uniform"``, or ``"importance"`` (by each t's second moment of the loss).
        precision: ``"float32"`` or ``"bf16"`` (autocast of the network; probabilities stay in float32).
        validate_every: steps between validations and saves; default a tenth of ``steps``.
        validation_timesteps: timesteps per validation image.
        folder: where to keep ``model.safetensors`` (the best), ``resume.safetensors`` and ``metrics.jsonl``, and of the first two the
            one before (``model.previous.safetensors``); None: nowhere.
        resume: continue from the folder's ``resume.safetensors``, bit for bit on the same machine and versions; on CUDA, where
            the network has no convolutions or attention, whose gradients add up in another order each time.
        seed: of data order, noise and timesteps.
        device: default: CUDA where there is one. The diffusion is moved there, and stays.
        progress: show a progress bar, with bits/dim (or the objective's loss) and the time left.

    Raises:
        OptionError, ShapeError, DataError: an argument is outside its range.
        CheckpointError: the state to resume from is missing, damaged, or another run's.
        SaveError: a file cannot be written (disk full, ...); what was saved before is as it was.
        DivergenceError: 20 steps in a row had a non-finite loss or gradient; the last good state stays saved.
        OutOfMemoryError: a step does not fit into memory; the batch is never made smaller on the way.
        ProcessError: another process died, or did not answer for half an hour.
    """
    check_option("kl", kl, ELBOS)
    if diffusion.objective not in ("elbo", "cross_entropy") and any(
        p.requires_grad for p in diffusion.schedule.parameters()
    ):
        raise OptionError(
            f'objective={diffusion.objective!r} is no bound, and cannot train a learned schedule: take "elbo", or freeze it'
        )
    check_option("timesteps", timesteps, TIMESTEPS)
    check_option("precision", precision, ("float32", "bf16"))
    check_option("lr_schedule", lr_schedule, ("cosine", "constant"))
    if resume and folder is None:
        raise OptionError("resume=True needs the folder of the run to continue")
    every = max(1, steps // 10) if validate_every is None else validate_every
    counts = {"steps": steps, "batch_size": batch_size, "accumulate": accumulate}
    counts |= {"validate_every": every, "validation_timesteps": validation_timesteps}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}={value!r} is not an integer of at least 1")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise OptionError(f"seed={seed!r} is not an integer in 0..2**63 - 1")
    if not 0 < lr <= 1:  # Adam moves every weight by about lr
        raise OptionError(f"lr={lr!r} is not in (0, 1]")
    if not (clip_norm > 0 and warmup >= 0 and 0 <= weight_decay < math.inf):
        raise OptionError(
            f"clip_norm={clip_norm!r} must be positive; warmup={warmup!r}, weight_decay={weight_decay!r} not negative"
        )
    if not 0 <= ema_decay < 1:
        raise OptionError(f"ema_decay={ema_decay!r} is not in [0, 1)")
    # What a resumed run must share with the first one; flat, so that a refusal names the one that differs.
    network = getattr(diffusion.net, "config", None)
    options = {
        "batch_size": batch_size,
        "accumulate": accumulate,
        "lr": lr,
        "warmup": warmup,
        "lr_schedule": lr_schedule,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "ema_decay": ema_decay,
        "kl": kl,
        "timesteps": timesteps,
        "precision": precision,
        "seed": seed,
        "steps": steps if lr_schedule == "cosine" else None,
        **{f"diffusion.{k}": v for k, v in diffusion.config.items()},
        **{f"net.{k}": v for k, v in (network if isinstance(network, dict) else {}).items()},
        "examples": len(data),
    }
    cond = _check_data(diffusion, "data", data, cond)
    validation_cond = {} if validation is None else _check_data(diffusion, "validation", validation, validation_cond)
    engine = Engine.of(device, unused=diffusion.objective != "elbo")
    told = {"steps": steps, "validate_every": every, "resume": resume, "folder": str(folder)}
    rows = {"data": digest(data)} | {name: digest(value) for name, value in cond.items()}
    engine.agree({**options, **told, **rows, "pyrodiff": __version__, "torch": torch.__version__})
    share, rest = divmod(batch_size, engine.world_size * accumulate)
    if len(data) < batch_size:
        raise OptionError(f"batch_size={batch_size} is more than the {len(data)} training examples")
    if rest:
        raise OptionError(
            f"batch_size={batch_size} does not divide by processes x accumulate = {engine.world_size * accumulate}"
        )
    if folder is not None:
        _check_folder(Path(folder), resume)
    diffusion.to(engine.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(engine.watched())
        # Parameters live in the modules, not in Pyro's global store: two fits in one process cannot meet there.
        stack.enter_context(pyro.settings.context(module_local_params=True))
        stack.enter_context(torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []))
        stop = stack.enter_context(interruptible())
        run = _Run(diffusion, options, engine, folder, stack)
        if resume:
            run.restore()
            engine.agree({"steps already made": run.result.steps})
        result, start = run.result, time.monotonic()
        score = None if validation is None else (validation, validation_cond, validation_timesteps, 4 * share)
        # In a log file (no terminal) a bar would be thousands of lines: there it is a line per validation.
        shown = progress and engine.rank == 0
        bar = tqdm(
            total=steps, initial=result.steps, desc="training", unit="step", disable=None if shown else True,
            dynamic_ncols=True, smoothing=0.05, mininterval=0.5,
        )  # fmt: skip
        stack.enter_context(bar)
        order = _Order(seed, len(data), batch_size)
        while result.steps < steps and not run.stopped:
            indices = order.batch(result.steps).reshape(accumulate, engine.world_size, share)[:, engine.rank]
            with run.within_memory():
                run.step([(data[i], {k: v[i] for k, v in cond.items()}) for i in indices], steps, stop)
            bar.set_postfix_str(run.describe(run.running), refresh=False)
            bar.update()
            if result.steps % every == 0 or result.steps == steps:
                run.validate(score, time.monotonic() - start)
                run.save()
                bar.set_postfix_str(run.describe(run.running), refresh=False)
                if shown and bar.disable:
                    mean = result.records[-1][run.loss_name]  # a log has the record's figure, the bar a running one
                    text = run.describe(math.nan if mean is None else mean)
                    print(f"step {result.steps} of {steps}: {text}", file=sys.stderr, flush=True)
        if run.stopped or stop.requested:
            result.interrupted = run.stopped or stop.requested
            run.save()
        result.seconds = time.monotonic() - start
        run.finish()
    return result


def _check_data(
    diffusion: GaussianDiffusion | NoisyClassifier, name: str, x: Tensor, cond: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    check_event(name, x, diffusion.event_shape)
    if x.dim() != len(diffusion.event_shape) + 1 or not len(x):
        raise DataError(
            f"{name} has shape {list(x.shape)}, not [N, {', '.join(map(str, diffusion.event_shape))}] with N >= 1"
        )
    dtypes = {p.dtype for p in diffusion.parameters()}
    if x.dtype not in dtypes:
        raise DataError(f"{name} has dtype {x.dtype}, the parameters {', '.join(map(str, dtypes))}: convert either")
    if not x.isfinite().all():
        bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise DataError(f"{name}[{bad}] holds NaN or infinite values")
    if isinstance(diffusion, GaussianDiffusion):
        diffusion.reverse_kernel.check_grid(name, x)
    elif set(cond or {}) != {"y"}:
        raise DataError(
            f"a classifier needs the labels y of {name}, and nothing else; cond has {', '.join(cond or {}) or 'none'}"
        )
    if isinstance(diffusion, NoisyClassifier):
        diffusion.check_labels(name, (cond or {})["y"], len(x))
    for key, value in (cond or {}).items():
        if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != len(x):
            rows = len(value) if isinstance(value, Tensor) and value.dim() else "no"
            raise DataError(f"{key} is no tensor with a row for each of the {len(x)} examples of {name}: it has {rows}")
    return cond or {}


def _check_folder(folder: Path, resume: bool) -> None:
    """Nothing is made in a folder that holds no run to continue, and nothing in one that does is overwritten."""
    path = folder / "resume.safetensors"
    if resume and not path.exists():
        raise CheckpointError(f"{str(path)!r} does not exist: there is no run to continue")
    if not resume and (taken := [p for p in (path, folder / checkpoint.MODEL) if p.exists()]):
        raise OptionError(f"{str(taken[0])!r} exists: resume that run, or name another folder")


class _Order:
    """Which examples each step sees: a fresh permutation per epoch, a function of the seed and the step alone."""

    def __init__(self, seed: int, size: int, batch_size: int) -> None:
        self.seed, self.size, self.batch_size = seed, size, batch_size
        self.epoch, self.permutation = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def batch(self, step: int) -> Tensor:
        epoch, i = divmod(step, self.size // self.batch_size)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.permutation = epoch, torch.from_numpy(rng.permutation(self.size))
        return self.permutation[i * self.batch_size : (i + 1) * self.batch_size]


class _Run:
    """The state of a training run: what a step changes, and what a checkpoint holds."""

    def __init__(
        self,
        diffusion: GaussianDiffusion | NoisyClassifier,
        options: dict[str, Any],
        engine: Engine,
        folder: str | Path | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.diffusion, self.options, self.engine = diffusion, options, engine
        self.folder = None if folder is None or engine.rank else Path(folder)
        self.read_folder = None if folder is None else Path(folder)
        if self.folder is not None:
            stack.enter_context(_files.lock(self.folder))
        self.result = Fit()
        # A bound is per dim, a class is one for the whole example.
        self.dims, self.loss_name = diffusion.event_shape.numel(), "train_loss_nats_per_dim"
        if isinstance(diffusion, NoisyClassifier):
            self.dims, self.loss_name = 1, "train_cross_entropy"
        self.elbo = _recording(ELBOS[options["kl"]])()
        self.loss: nn.Module = self.elbo(diffusion.model, diffusion.guide)
        # Decay pulls towards 0, which means nothing for the ends of a schedule or the scale of a decoder.
        network = set(diffusion.net.parameters())
        others = [parameter for parameter in diffusion.parameters() if parameter not in network]
        groups: list[dict[str, Any]] = [
            {"params": list(diffusion.net.parameters())},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer: Any = torch.optim.AdamW(
            groups[: 1 + bool(others)],
            lr=options["lr"],
            betas=(0.9, 0.99),
            weight_decay=options["weight_decay"],
            fused=True,
        )
        self.ema = EMA(diffusion, options["ema_decay"])
        self.sampler = draws.ImportanceSampler(diffusion.steps) if options["timesteps"] == "importance" else None
        self.best_weights: dict[str, Tensor] | None = None
        self.skipped_in_a_row = 0
        self.running = math.nan  # the loss of recent steps, for the bar
        self.total, self.counted = 0.0, 0  # the losses since the last validation, for the record
        self.published = 0  # the step of the weights that the folder's model has
        self.stopped = 0  # the signal that some process was told
        self.outside = _count_outside_range(diffusion, stack)
        if engine.fabric is not None:
            self.loss = engine.fabric.setup_module(self.loss)
            self.optimizer = engine.fabric.setup_optimizers(self.optimizer)

    # ------------------------------------------------------------------ a step

    def step(self, parts: list[tuple[Tensor, dict[str, Tensor]]], steps: int, stop: Stop) -> None:
        """One optimiser step on a batch given in parts; ``stop`` on one process makes it the last one of all."""
        # Noise is a function of seed, rank and step, so that there is no random state to save or to restore.
        seed_everything(self.engine.device, self.options["seed"], self.engine.rank, self.result.steps)
        self.diffusion.train()
        self.optimizer.zero_grad(set_to_none=True)
        if self.engine.orphaned() and not stop.requested:
            stop.requested = int(signal.SIGTERM)
        buffers = [buffer.clone() for buffer in self.diffusion.buffers()]
        total = torch.zeros((), device=self.engine.device)
        for i, (x0, cond) in enumerate(parts):
            with self._checked(), self._sync(last=i == len(parts) - 1):
                loss = self._loss(x0, cond) / len(parts)
                self.engine.fabric.backward(loss) if self.engine.fabric else loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.diffusion.parameters(), self.options["clip_norm"])
        # The same numbers on every rank, so that all skip, or stop, or none does.
        told = total.new_tensor([float(stop.requested == number) for number in (signal.SIGTERM, signal.SIGINT)])
        loss_value, norm_value, terminated, interrupted = self.engine.mean(total, norm, *told)
        self.stopped = int(signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0)
        self.result.steps += 1
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            for buffer, before in zip(self.diffusion.buffers(), buffers, strict=True):
                buffer.copy_(before)  # running means and the like, which the forward pass has moved
            self._skip(loss_value)
            return
        self.skipped_in_a_row = 0
        self.running = loss_value if math.isnan(self.running) else self.running + 0.05 * (loss_value - self.running)
        self.total, self.counted = self.total + loss_value, self.counted + 1
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(steps)
        self.optimizer.step()
        self.ema.update()

    def _loss(self, x0: Tensor, cond: dict[str, Tensor]) -> Tensor:
        device = self.engine.device
        x0 = x0.to(device, non_blocking=True)
        cond = {k: v.to(device, non_blocking=True) for k, v in cond.items()}
        weight: Any = None
        if self.sampler is not None:
            t, weight = self.sampler.sample(len(x0), device=device)
        else:
            t = getattr(draws, self.options["timesteps"])(len(x0), self.diffusion.steps, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.options["precision"] == "bf16"):
            loss = self.loss(x0, t, weight=weight, **cond)
        if self.sampler is not None:
            model_trace, guide_trace = self.elbo.traces
            terms = site_terms(model_trace, guide_trace, self.options["kl"])
            prefix = f"{self.diffusion.name}_" if self.diffusion.name else ""
            names = [f"{prefix}{name}" for name in ("x_s", "x_0", "x_objective", "y")]  # those that carry the weight
            scaled = torch.stack([terms[name].detach() for name in names if name in terms]).sum(0)
            # With data_size the sites carry Pyro's N / B too: the same factor for all.
            self.sampler.update(self.engine.gather(t).cpu(), self.engine.gather(scaled / weight).cpu())
        # Pyro's sum over examples and dims (times N / B with data_size), as a mean.
        examples = self.diffusion.data_size or len(x0)
        return loss / (examples * self.dims)

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        self.elbo.strict = self.result.steps < CHECKED_STEPS
        with pyro.validation_enabled(self.elbo.strict), warnings.catch_warnings():
            # A step with non-finite numbers is left out and counted; distributions would raise, and Pyro warn three times.
            pyro.distributions.enable_validation(False)
            warnings.filterwarnings("ignore", "Encountered (NaN|[+]?inf)", UserWarning)
            yield

    @contextlib.contextmanager
    def within_memory(self) -> Iterator[None]:
        """Where a step is too big, an error that says what to do: never another batch than was asked for."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"out of memory in a step of batch_size={self.options['batch_size']} in "
                f"accumulate={self.options['accumulate']} part(s): raise accumulate, which keeps the batch and its gradient, or "
                f"lower batch_size ({(str(error).splitlines() or [type(error).__name__])[0]})"
            ) from error

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if self.engine.fabric is None:
            return contextlib.nullcontext()
        return self.engine.fabric.no_backward_sync(self.loss, enabled=not last)

    def _lr(self, steps: int) -> float:
        step, options = self.result.steps, self.options
        rise = min(1.0, step / max(1, options["warmup"]))
        fall = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)) if options["lr_schedule"] == "cosine" else 1.0
        return options["lr"] * rise * fall

    def _skip(self, loss: float) -> None:
        self.result.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            self.save()  # the weights are those of the last good step
            where = f"; the last good state is in {self.read_folder}" if self.read_folder else ""
            raise DivergenceError(
                f"{MAX_SKIPPED} steps in a row had a non-finite loss or gradient (last loss {loss}){where}"
            )

    def describe(self, running: float) -> str:
        """The progress bar's figures, for a training loss in nats per dim."""
        if self.diffusion.objective == "elbo":
            text = f"{running / math.log(2):.3f} bits/dim"
        else:
            text = f"{self.diffusion.objective} {running:.4f}"
        for record in self.result.records[-1:]:
            for name in ("bits_per_dim", self.diffusion.objective):
                if f"validation_{name}" in record:
                    text += f", validation {record[f'validation_{name}']:.3f}"
        return text

    # ------------------------------------------------------------------ validation and checkpoints

    def validate(self, score: tuple[Tensor, dict[str, Tensor], int, int] | None, seconds: float) -> None:
        """Score the averaged weights and keep them if they are the best; :meth:`save` then writes them."""
        if self.engine.rank:
            return
        mean = self.total / self.counted if self.counted else None
        self.total, self.counted = 0.0, 0
        record: dict[str, Any] = {"step": self.result.steps, self.loss_name: mean, "lr": self._last_lr()}
        if mean is not None and self.diffusion.objective == "elbo":
            record["train_bits_per_dim"] = mean / math.log(2)
        bound: Estimate | None = None
        with self.ema.swapped_in():
            if score is not None:
                x0, cond, count, batch_size = score
                device = self.engine.device
                cond = {k: v.to(device) for k, v in cond.items()}
                # The same noise every time: differences between validations are the weights'.
                with seeded(device, self.options["seed"]):
                    bound, figures = _validation(self.diffusion, x0.to(device), cond, count, batch_size)
                record |= figures
            best = self.result.best
            # A bound that is not finite is never the best, but for want of another.
            if bound is None or best is None or bound.mean < best.mean or math.isnan(best.mean):
                self.result.best, self.result.best_step = bound, self.result.steps
                self.best_weights = self._weights()
        if self.outside is not None:
            record["learned_range_outside"] = self.outside()
        record |= {"skipped": self.result.skipped, "seconds": seconds}
        self.result.records.append(record)

    def _weights(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.diffusion.state_dict().items()}

    def _last_lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def save(self) -> None:
        """Write what a later run needs to go on as if nothing had happened."""
        if self.folder is None:
            return
        result, optimizer = self.result, self.optimizer.state_dict()
        tree = {
            "options": self.options,
            "weights": self.diffusion.state_dict(),
            "best_weights": self.best_weights,
            # JSON's keys are strings, the optimiser's are indices.
            "optimizer": {
                "state": {str(k): v for k, v in optimizer["state"].items()},
                "param_groups": optimizer["param_groups"],
            },
            "ema": self.ema.state_dict(),
            "sampler": None if self.sampler is None else self.sampler.state_dict(),
            "running": [self.running, self.total, self.counted],
            "skipped_in_a_row": self.skipped_in_a_row,
            "result": {
                "steps": result.steps,
                "best_step": result.best_step,
                "best": None if result.best is None else list(result.best),
                "skipped": result.skipped,
                "records": result.records,
            },
        }
        checkpoint.write(self.folder / "resume.safetensors", tree, kind="resume")
        self._publish(self.folder)

    def _publish(self, folder: Path) -> None:
        """Show in the folder what the state that was saved holds: the best weights as a model, the records as a log."""
        if self.best_weights is not None and self.published != self.result.best_step:
            own = self._weights()
            self.diffusion.load_state_dict(self.best_weights)
            try:
                checkpoint.save(folder, self.diffusion)
            finally:
                self.diffusion.load_state_dict(own)
            self.published = self.result.best_step
        text = "".join(json.dumps(record) + "\n" for record in self.result.records)
        _files.write(folder / "metrics.jsonl", text)

    def restore(self) -> None:
        """The inverse of :meth:`save`."""
        path = self.read_folder / "resume.safetensors"  # type: ignore[operator]
        tree = checkpoint.read(path, kind="resume")
        mine = json.loads(json.dumps(self.options))
        try:
            if different := [k for k in mine if tree["options"].get(k) != mine[k]]:
                key = different[0]
                raise CheckpointError(
                    f"{path} is of a run with {key}={tree['options'].get(key)!r}, not {mine[key]!r}; resume with the same options"
                )
            self._check(str(path), tree)
            groups = self.optimizer.param_groups
            rates = [float(saved["lr"]) for _, saved in zip(groups, tree["optimizer"]["param_groups"], strict=True)]
            best = tree["result"].pop("best")
            kind = BitsPerDim if isinstance(self.diffusion, GaussianDiffusion) else Estimate
            self.result = Fit(best=None if best is None else kind(*best), **tree["result"])
            # From here on nothing is refused.
            self.diffusion.load_state_dict(tree["weights"])
            self.best_weights = tree["best_weights"]
            state = {int(k): v for k, v in tree["optimizer"]["state"].items()}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self.ema.load_state_dict(tree["ema"])
            if self.sampler is not None:
                self.sampler.load_state_dict(tree["sampler"])
            self.running, self.total, self.counted = tree["running"]
            self.skipped_in_a_row = tree["skipped_in_a_row"]
        except CheckpointError:
            raise
        except checkpoint.MALFORMED as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path} holds no state that can be resumed: {reason}") from None
        if self.folder is not None:  # where a run that was killed may have come less far, or further
            self._publish(self.folder)

    def _check(self, name: str, tree: dict[str, Any]) -> None:
        """Refuse what this run could not have saved, before any of it is used."""
        weights, moments = self.diffusion.state_dict(), tree["optimizer"]["state"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        step = torch.zeros((), device="cpu")
        own = {
            "weights": weights,
            "best_weights": {} if tree["best_weights"] is None else weights,
            "ema": self.ema.state_dict()["average"],
            "sampler": {} if self.sampler is None else self.sampler.state_dict(),
            **{
                f"optimizer/{i}": {"step": step, "exp_avg": p, "exp_avg_sq": p}
                for i, p in enumerate(parameters)
                if str(i) in moments  # a parameter has moments from its first gradient on
            },
        }
        saved = {
            "weights": tree["weights"],
            "best_weights": tree["best_weights"] or {},
            "ema": tree["ema"]["average"],
            "sampler": tree["sampler"] or {},
            **{f"optimizer/{i}": values for i, values in moments.items()},
        }
        checkpoint.check_state(name, _flat(saved), _flat(own))
        if not moments and tree["result"]["steps"] > tree["result"]["skipped"]:
            raise CheckpointError(f"{name} holds no state of the optimiser, after {tree['result']['steps']} steps")
        result, (running, total, counted) = tree["result"], tree["running"]
        counts = [result["steps"], result["best_step"], result["skipped"], tree["skipped_in_a_row"]]
        counts += [counted, tree["ema"]["updates"]]
        if not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError(f"not all of {counts} are counts")
        values = [
            running,
            total,
            *(result["best"] or ()),
            *(v for record in result["records"] for v in record.values()),
        ]
        if not all(value is None or isinstance(value, int | float) for value in values):
            raise ValueError("not all of its losses and figures are numbers")

    def finish(self) -> None:
        """Leave the best averaged weights in the diffusion."""
        if self.best_weights is not None:
            self.diffusion.load_state_dict(self.best_weights)
        else:
            self.ema.copy_to_parameters()
        if self.engine.fabric is not None:  # rank 0 alone knows which were best
            for value in self.diffusion.state_dict().values():
                torch.distributed.broadcast(value, 0)
        self.diffusion.eval()


def _flat(parts: dict[str, Any]) -> dict[str, Any]:
    """The values of a dictionary of dictionaries and lists, by path."""
    return {
        f"{name}/{key}": value
        for name, part in parts.items()
        for key, value in (part.items() if isinstance(part, dict) else enumerate(part))
    }


def _validation(
    diffusion: GaussianDiffusion | NoisyClassifier, x0: Tensor, cond: dict[str, Any], count: int, batch_size: int
) -> tuple[Estimate, dict[str, float]]:
    """What the best weights have least of, and the figures for the record."""
    if isinstance(diffusion, NoisyClassifier):
        entropy, accuracy = diffusion.score(x0, **cond, count=count, batch_size=batch_size)
        return entropy, {
            "validation_cross_entropy": entropy.mean,
            "validation_se_noise": entropy.se_noise,
            "validation_accuracy": accuracy,
        }
    columns = count if diffusion.steps > 1 else None
    bound = bits_per_dim(elbo_terms(diffusion, x0, columns, repeats=2, batch_size=batch_size, **cond))
    return bound, {"validation_bits_per_dim": bound.mean, "validation_se_noise": bound.se_noise}


def _recording(cls: Any) -> Any:
    """An ELBO that keeps its last traces; ``strict`` where it knows the word."""

    class Recording(cls):
        traces: tuple[Any, Any] = (None, None)

        def _get_trace(self, *args: Any) -> tuple[Any, Any]:
            self.traces = super()._get_trace(*args)
            return self.traces

    return Recording


def _count_outside_range(diffusion: GaussianDiffusion | NoisyClassifier, stack: contextlib.ExitStack) -> Any:
    """With a learned range, which is not clamped: the share of variance outputs outside [-1, 1] since the last call."""
    if not isinstance(diffusion, GaussianDiffusion) or diffusion.reverse_kernel.variance != "learned_range":
        return None
    counts = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training:
            variance = output.detach().chunk(2, dim=1)[1]
            counts.append((variance.abs() > 1).float().mean())

    handle = diffusion.net.register_forward_hook(hook)
    stack.callback(handle.remove)

    def share() -> float:
        value = torch.stack(counts).mean().item() if counts else 0.0
        counts.clear()
        return value

    return share
