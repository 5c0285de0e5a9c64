"""Classifier guidance: an unconditional model of the digits that is asked for a class.

    make demo                                       # trains the model, runs/digits
    python examples/guided_digits.py                # trains a classifier of noisy digits, and guides with it; about 90 core-seconds

The classifier is half a UNet, trained by the same ``fit``: its programs say that x_t ~ q(x_t | x_0) and y ~ Categorical(net(x_t)).
Its log-probability, times a scale w, bends the reverse chain towards log p(x) + w log p(y | x). How well that works is judged by
another classifier, of clean digits: the share of samples that it takes for the class asked for, and how varied they are, as the
mean variance of a pixel within a class, next to that of real digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _common import command_line, untrained

import pyrodiff
from pyrodiff import plots
from pyrodiff.training.metrics import fit_classifier

SCALES = (0.0, 1.0, 3.0)


def main(
    run: Path = Path("runs") / "digits",
    out: Path = Path("guided_digits.png"),
    steps: int = 600,
    per_class: int = 20,
    chain: int = 100,
) -> None:
    """Train the classifier, guide, judge.

    Args:
        run: folder of a trained model of the digits.
        out: the picture.
        steps: of training.
        per_class: samples of each class at each scale.
        chain: steps of a sample.
    """
    diffusion, data = pyrodiff.load(run), pyrodiff.load_data("digits")
    classifier = pyrodiff.NoisyClassifier(
        pyrodiff.nets.Classifier(1, classes=10, width=32, multipliers=(1, 2), blocks=1, dropout=0.1),
        diffusion.schedule,
        diffusion.event_shape,
    )
    pyrodiff.fit(
        classifier,
        data.train,
        data.validation,
        cond={"y": data.train_labels},
        validation_cond={"y": data.validation_labels},
        steps=steps,
        batch_size=64,
        lr=3e-3,
        ema_decay=0.99,
        device="cpu",
    )
    entropy, accuracy = classifier.score(data.test, data.test_labels)
    print(f"noisy test digits, over all t: cross-entropy {entropy} nats, {100 * accuracy:.0f} % right")

    judge = fit_classifier(data.train, data.train_labels, seed=0)
    labels = torch.arange(10).repeat_interleave(per_class)
    within = [data.train[data.train_labels == y].var(0).mean() for y in range(10)]
    print(f"real digits: variance within a class {torch.stack(within).mean():.3f}")
    rows = []
    for scale in SCALES:
        x = pyrodiff.sample(
            diffusion,
            len(labels),
            steps=chain,
            seed=0,
            classifier=lambda x_t, t, y, w=scale: w * classifier.log_prob(x_t, t, y),
            classifier_cond={"y": labels},
            progress=True,
        )
        right = (judge(x).argmax(1) == labels).double().mean()
        spread = x.unflatten(0, (10, per_class)).var(1).mean()
        print(f"scale {scale:g}: {100 * right:.0f} % of the class asked for, variance within a class {spread:.3f}")
        rows.append(x.unflatten(0, (10, per_class))[:, :4].transpose(0, 1).flatten(0, 1))
    # four rows for each scale, a column for each class
    plots.save(plots.image_grid(torch.cat(rows), columns=10), out)
    print(out)


def smoke(folder: Path) -> dict[str, Any]:
    """A setting of seconds."""
    sizes = {"steps": 2, "per_class": 4, "chain": 3}
    return {**sizes, "run": untrained(folder / "run", 20), "out": folder / "guided_digits.png"}


if __name__ == "__main__":
    command_line(main, smoke)
