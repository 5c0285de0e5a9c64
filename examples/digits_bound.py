"""The tightest bound on scikit-learn's digits: 1437 training images, and a network that is not to remember them.

    python examples/digits_bound.py        # about 24 core-minutes; writes examples/results/digits

A plain run overfits: its bound on held-out digits is best after some minutes and then rises, while that on the training images
falls. Two things keep it from that. Dropout; and moved and mirrored digits, which are other data, but whose strokes are the same. The
network is told how each image was moved, as if that were its class (0: not at all), so that what it learns of the others does not
leak into the density of digits as they are: EDM's augmentation (Karras et al., 2022, appendix F.2,
https://arxiv.org/abs/2206.00364). Everything is scored with y = 0.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import command_line
from torch import Tensor
from torch.nn import functional as F

import pyrodiff

RESULTS = Path(__file__).resolve().parent / "results" / "digits"
AS_THEY_ARE = 6  # copies of the images as they are, to one of each that is moved


def shift(right: int, down: int) -> Callable[[Tensor], Tensor]:
    """The images moved by a pixel; what comes in is black."""
    return lambda x: F.pad(x, (1, 1, 1, 1), value=-1.0)[..., 1 - down : 9 - down, 1 - right : 9 - right]


MOVES: list[Callable[[Tensor], Tensor]] = [
    *(shift(right, down) for right, down in ((1, 0), (-1, 0), (0, 1), (0, -1))),
    lambda x: x.flip(3),
    lambda x: x.flip(2),
    lambda x: x.transpose(2, 3),
    lambda x: x.flip(2, 3),
]


def main(
    steps: int = 10_000, images: int | None = None, width: int = 32, timesteps: int = 1000, out: Path = RESULTS
) -> None:
    """Train and score.

    Args:
        steps: of training.
        images: test images that are scored; default all.
        width: of the UNet.
        timesteps: T of the diffusion.
        out: folder of the results.
    """
    torch.manual_seed(0)
    digits = pyrodiff.load_data("digits")
    copies = [digits.train] * AS_THEY_ARE + [move(digits.train) for move in MOVES]
    told = [0] * AS_THEY_ARE + list(range(1, len(MOVES) + 1))
    y = torch.tensor(told).repeat_interleave(len(digits.train))
    net = pyrodiff.nets.UNet(
        1,
        width=width,
        multipliers=(1, 2),
        blocks=1,
        attention=(1,),
        resample="conv",
        fourier_features=(3, 4),
        dropout=0.1,
        classes=len(MOVES) + 1,
    )
    diffusion = pyrodiff.GaussianDiffusion(
        net.to(memory_format=torch.channels_last),
        pyrodiff.LogLinearSchedule(timesteps, -5.0, 6.5),
        digits.event_shape,
        prediction="v",
        decoder="learned",
        bins=digits.bins,
    )
    started, cpu = time.monotonic(), time.process_time()
    result = pyrodiff.fit(
        diffusion,
        torch.cat(copies),
        digits.validation,
        cond={"y": y},
        validation_cond={"y": torch.zeros(len(digits.validation), dtype=torch.int64)},
        steps=steps,
        batch_size=64,
        lr=3e-3,
        weight_decay=0.01,
        timesteps="importance",
        validation_timesteps=32,
        validate_every=max(1, steps // 20),
        seed=0,
    )
    minutes, core_minutes = (time.monotonic() - started) / 60, (time.process_time() - cpu) / 60
    lines = [
        f"{sum(p.numel() for p in net.parameters()):,} parameters, {steps} steps in {minutes:.1f} minutes, "
        f"{core_minutes:.1f} core-minutes; best at {result.best_step} (validation {result.best})"
    ]
    test = digits.test[:images]
    at_rest = torch.zeros(len(test), dtype=torch.int64)
    for method, options in (
        ("elbo", {"timesteps": 64, "repeats": 8}),
        ("immse", {"points": 64, "repeats": 8}),
        ("ode", {"repeats": 4}),
    ):
        lines.append(str(pyrodiff.log_likelihood(diffusion, test, method, y=at_rest, progress=True, **options)))
        print(lines[-1], flush=True)
    few = slice(0, min(24, len(test)))
    for method, options in (("elbo", {"kl": "monte_carlo"}), ("iwae", {"chains": 16})):
        found = pyrodiff.log_likelihood(diffusion, test[few], method, y=at_rest[few], progress=True, **options)
        lines.append(f"the first {few.stop} images, all timesteps\n{found}")
        print(lines[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    records = "".join(json.dumps(record) + "\n" for record in result.records)
    (out / "metrics.jsonl").write_text(records, encoding="utf-8")
    print(f"\n{lines[0]}\n{out}")


def smoke(folder: Path) -> dict[str, Any]:
    """A setting of seconds."""
    return {"steps": 1, "images": 3, "width": 8, "timesteps": 10, "out": folder}


if __name__ == "__main__":
    command_line(main, smoke)
