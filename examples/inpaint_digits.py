"""Digits with half of their pixels missing: which digit it is, and what the pixels are, from one posterior.

    pyrodiff train digits --out runs/classes --net.width 16 --net.dropout 0.1 --net.conditional true --net.label_dropout 0.1 \
        --schedule.steps 50 --model.variance learned_range --training.steps 4000
    python examples/inpaint_digits.py       # writes examples/results/inpaint_digits

The model is p(class) p(x | class) p(y | x): ten diffusions in one network, and y the pixels that are seen, with a little noise. Sequential
Monte Carlo gives p(y | class) with a standard error, and so p(class | y) by Bayes' rule; the pixels are the mixture over classes of the
particles. Nothing is trained for the task: any pixels may be missing. Both answers are scored on test digits against what one would
take otherwise: a classifier behind an imputer, a classifier of the very pixels that are seen, neighbours, and Gaussians. The training
takes 5 core-minutes, the diffusion's answers 3.3 core-minutes.
"""

from __future__ import annotations

import csv
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import command_line, untrained
from torch import Tensor, nn

import pyrodiff
from pyrodiff import GaussianDiffusion, plots
from pyrodiff.inference.operators import LinearGaussian, mask
from pyrodiff.inference.proposals import Twist
from pyrodiff.inference.smc import FAMILIES, FEW, HEAVY, Posterior, smc
from pyrodiff.training.data import ImageData

RUN = Path("runs") / "classes"
RESULTS = Path(__file__).resolve().parent / "results" / "inpaint_digits"
NOISE = 0.2  # of the pixels seen; a level is 0.125
LEVEL = 0.125
DRAWS = 400  # of the Gaussians
FIRST, BEHIND = 12, 15.0  # particles of the first look; nats by which a class is then out
STEPS = 25  # of the 50 that were trained: another prior, a little worse, at half the price
LOOKED_AT = 600  # training digits whose errors make the twist
WIDER = 2.0  # the twist's variance, times: with 1 the weights have heavier tails


def denoising_errors(diffusion: GaussianDiffusion, x0: Tensor, **cond: Tensor) -> Tensor:
    """Second moments of the denoiser's error E[x_0 | x_t] - x_0 at each t, over data and noise, ``[T, D, D]``, float64."""
    q, kernel, found = diffusion.forward_process, diffusion.reverse_kernel, []
    with torch.no_grad(), diffusion.evaluating():
        for t in range(1, diffusion.steps + 1):
            x_t = q.marginal(x0, torch.full((len(x0),), t)).sample()
            error = (kernel.predict(x_t, t, **cond).x0_hat - x0).flatten(1).double()
            found.append(error.mT @ error / len(error))
    return torch.stack(found)


def error_twist(
    diffusion: GaussianDiffusion, errors: Tensor, seen: Tensor, y: Tensor, noise: Sequence[tuple[float, float]]
) -> Twist:
    r"""A guess of p(y | x_t): x_0 given x_t is N(x0_hat, V_t), V_t the mean of what the denoiser's errors are.

    The noise of a pixel is a mixture of Normals about 0. Of its variance the guess is the Normal of all pixels jointly, times what the
    mixture makes of each pixel's own law; so it is exact where V_t is small beside the noise, and where it is large.

    By Tweedie's formula :math:`\partial \hat x_0 / \partial x_t = \frac{\alpha_t}{\sigma_t^2} \mathrm{Cov}(x_0 \mid x_t)`. With V_t in the
    covariance's place the gradient takes no backward pass. (The weights are right for any gradient.)

    Args:
        diffusion: the prior.
        errors: V, ``[T, D, D]``.
        seen: indices of the pixels that are seen, ``[K]``.
        y: ``[K]``.
        noise: share and standard deviation of each part.
    """
    log_snrs = diffusion.schedule.log_snr(torch.arange(1, diffusion.steps + 1)).double()
    slopes = (log_snrs.exp() / log_snrs.sigmoid().sqrt())[:, None, None] * errors[:, :, seen]
    share, std = torch.tensor(noise, dtype=torch.float64).unbind(1)
    total = (share * std**2).sum()
    V = errors[:, seen][:, :, seen]
    roots = torch.linalg.cholesky(V + total * torch.eye(len(seen), dtype=torch.float64))

    def log_normal(error: Tensor, variance: Tensor) -> Tensor:
        return -(error**2 / variance + (2 * math.pi * variance).log()) / 2

    def twist(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        i = int((log_snrs - log_snr).abs().argmin())
        moved = (x_t - x_t.detach()).flatten(1).double() @ slopes[i]  # 0, with a gradient
        error = y.double() - x0_hat.detach().flatten(1)[:, seen].double() - moved
        white = torch.linalg.solve_triangular(roots[i], error.mT, upper=False)
        joint = log_normal(white, torch.ones(())).sum(0) - roots[i].diagonal().log().sum()
        if len(noise) == 1:
            return joint
        v = V[i].diagonal()
        parts = share.log() + log_normal(error[..., None], v[:, None] + std**2)
        return joint + (parts.logsumexp(-1) - log_normal(error, v + total)).sum(1)

    return twist


# ---------------------------------------------------------------------- one digit


class Case(NamedTuple):
    """A digit of which some pixels are seen."""

    mask: str
    digit: int  # its number among the test digits
    label: int
    x: Tensor  # [D]
    seen: Tensor  # indices, [K]
    y: Tensor  # [K]

    @property
    def missing(self) -> Tensor:
        """Indices of the pixels not seen."""
        rest = torch.ones(len(self.x), dtype=torch.bool)
        rest[self.seen] = False
        return rest.nonzero()[:, 0]


def cases(data: ImageData, digits: int) -> list[Case]:
    """Test digits in turn without their lower half, and without half of their pixels, drawn anew for each."""
    generator, found = torch.Generator().manual_seed(0), []
    for n in range(digits):
        x, y = data.test[n].flatten(), int(data.test_labels[n])
        K = len(x) // 2
        scattered = torch.randperm(len(x), generator=generator)[:K].sort().values
        for name, seen in (("lower half", torch.arange(K)), ("random half", scattered)):
            noise = NOISE * torch.randn(K, generator=generator)
            if (n % 2 == 0) == (name == "lower half"):
                found.append(Case(name, n, y, x, seen, x[seen] + noise))
    return found


class Answer(NamedTuple):
    """What a method says of a case.

    Attributes:
        probabilities: of the classes, ``[C]``, or None.
        atoms: values of the missing pixels, ``[S, M]``, or None.
        weights: theirs, ``[S]``.
    """

    probabilities: Tensor | None = None
    atoms: Tensor | None = None
    weights: Tensor | None = None


class Told(nn.Module):
    """A network told classes of its own, for as many equal parts of its rows: repeats of ``smc`` are then of one class each."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.labels = net, torch.zeros(1, dtype=torch.int64)

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor | None = None) -> Tensor:
        return self.net(x, log_snr, y=self.labels.repeat_interleave(len(x) // len(self.labels)) if y is None else y)


def look(
    diffusion: GaussianDiffusion, errors: Tensor, case: Case, labels: Sequence[int], particles: int, repeats: int
) -> dict[int, Posterior]:
    """The posterior of x given each class, all in one walk."""
    keep = torch.zeros(len(case.x), dtype=torch.bool)
    keep[case.seen] = True
    observed = LinearGaussian(mask(keep.view(diffusion.event_shape)), case.y, NOISE)
    twist = error_twist(diffusion, errors, case.seen, case.y, [(1.0, NOISE)])
    diffusion.net.labels = torch.tensor(labels).repeat_interleave(repeats)
    rows = len(labels) * repeats
    found = smc(diffusion, observed, particles, twist=twist, seed=case.digit, repeats=rows, batch_size=rows * particles)
    parts = {
        name: getattr(found, name).split(repeats)
        for name in ("particles", "log_weights", "ess", "pareto_k", "families")
    }
    return {
        label: replace(
            found,
            **{name: part[i] for name, part in parts.items()},
            network_evaluations=found.network_evaluations // len(labels),
        )
        for i, label in enumerate(labels)
    }


def warned(posterior: Posterior) -> bool:
    """Whether ``smc`` would warn of it alone."""
    few = (posterior.ess[:, -1] < FEW * posterior.log_weights.shape[1]) | (posterior.families < FAMILIES)
    return bool(few.any() or (posterior.pareto_k > HEAVY).any())


def by_diffusion(
    diffusion: GaussianDiffusion, errors: Tensor, classes: int, particles: int, repeats: int, case: Case
) -> tuple[Answer, dict[int, Posterior]]:
    """p(class | y) from the evidence of each class, and the particles of all classes, weighted by it.

    A first look with a few particles finds the classes that are worth more of them.
    """
    found = look(diffusion, errors, case, range(classes), FIRST, 1)
    best = max(posterior.evidence.log_z for posterior in found.values())
    near = [label for label, posterior in found.items() if posterior.evidence.log_z > best - BEHIND]
    found |= look(diffusion, errors, case, near, particles, repeats)
    log_z = torch.tensor([posterior.evidence.log_z for posterior in found.values()]).double()
    probabilities = log_z.softmax(0)  # the classes are equally likely beforehand
    atoms = torch.cat([p.particles.flatten(0, 1).flatten(1)[:, case.missing] for p in found.values()])
    weights = [share * p.weights.flatten() for share, p in zip(probabilities, found.values(), strict=True)]
    return Answer(probabilities, atoms.double(), torch.cat(weights)), found


# ---------------------------------------------------------------------- what one would take otherwise


def shrunk(x: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and Ledoit and Wolf's covariance."""
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(x)
    return torch.from_numpy(fitted.location_), torch.from_numpy(fitted.covariance_)


def by_gaussians(laws: Sequence[tuple[Tensor, Tensor]], case: Case) -> Answer:
    """A Gaussian for each class (or one for all): the same posterior in closed form, by draws."""
    y, seen, missing = case.y.double(), case.seen, case.missing
    generator = torch.Generator().manual_seed(case.digit)
    log_z, given = [], []
    for mean, covariance in laws:
        total = covariance[seen][:, seen] + NOISE**2 * torch.eye(len(seen), dtype=torch.float64)
        log_z.append(torch.distributions.MultivariateNormal(mean[seen], total).log_prob(y))
        gain = torch.linalg.solve(total, covariance[seen][:, missing]).mT
        rest = covariance[missing][:, missing] - gain @ covariance[seen][:, missing]
        given.append((mean[missing] + gain @ (y - mean[seen]), torch.linalg.cholesky(rest)))
    probabilities = torch.stack(log_z).softmax(0)
    drawn = probabilities.multinomial(DRAWS, replacement=True, generator=generator)
    noise = torch.randn(DRAWS, len(missing), dtype=torch.float64, generator=generator)
    atoms = torch.stack([given[c][0] + given[c][1] @ z for c, z in zip(drawn.tolist(), noise, strict=True)])
    return equal(atoms)._replace(probabilities=probabilities if len(laws) > 1 else None)


def equal(atoms: Tensor) -> Answer:
    """Of one weight each."""
    return Answer(None, atoms, torch.full((len(atoms),), 1 / len(atoms), dtype=torch.float64))


def baselines(data: ImageData, todo: Sequence[Case]) -> dict[str, list[Answer]]:
    """Every other method's answers, case by case."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestNeighbors
    from sklearn.svm import SVC

    x, labels = data.train.flatten(1).double().numpy(), data.train_labels.numpy()
    holes = np.full((len(todo), x.shape[1]), np.nan)
    for row, case in zip(holes, todo, strict=True):
        row[case.seen] = case.y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # five rounds, of which the last changes little
        chained = IterativeImputer(random_state=0, max_iter=5).fit_transform(np.concatenate([x, holes]))[len(x) :]
    filled = {
        "mean": np.where(np.isnan(holes), x.mean(0), holes),
        "5 neighbours": KNNImputer().fit(x).transform(holes),
        "iterative": chained,
    }
    found = {}
    logistic = LogisticRegression(max_iter=2000).fit(x, labels)
    svc = CalibratedClassifierCV(SVC(), ensemble=False).fit(x, labels)
    for imputer, complete in filled.items():
        points = [equal(torch.from_numpy(row)[None, case.missing]) for row, case in zip(complete, todo, strict=True)]
        found[f"imputed: {imputer}"] = points
        for name, classifier in (("logistic", logistic), ("SVC", svc)):
            said = torch.from_numpy(classifier.predict_proba(complete))
            found[f"{name} of imputed: {imputer}"] = [Answer(p) for p in said]
    whole = [shrunk(x)]
    each = [shrunk(x[labels == label]) for label in np.unique(labels)]
    found["one Gaussian"] = [by_gaussians(whole, case) for case in todo]
    found["a Gaussian for each class"] = [by_gaussians(each, case) for case in todo]
    found["20 neighbours"], found["SVC of the seen"], found["logistic of the seen"] = [], [], []
    fitted: dict[tuple[int, ...], list] = {}
    for case in todo:
        seen, y = case.seen.numpy(), case.y.double().numpy()[None]
        (rows,) = NearestNeighbors(n_neighbors=20).fit(x[:, seen]).kneighbors(y, return_distance=False)
        found["20 neighbours"].append(equal(torch.from_numpy(x[rows][:, case.missing.numpy()])))
        key = tuple(seen.tolist())
        if key not in fitted:
            models = (CalibratedClassifierCV(SVC(), ensemble=False), LogisticRegression(max_iter=2000))
            fitted[key] = [model.fit(x[:, seen], labels) for model in models]
        for name, model in zip(("SVC of the seen", "logistic of the seen"), fitted[key], strict=True):
            found[name].append(Answer(torch.from_numpy(model.predict_proba(y)[0])))
    return found


# ---------------------------------------------------------------------- scores


def scores(answer: Answer, case: Case) -> dict[str, float]:
    """Of one case. Pixels are scored clamped to the data's range, in levels, 0 to 16.

    * ``crps``: of each pixel, the mean; ``energy``: the same of all missing pixels together (Gneiting and Raftery, 2007, eq. 22).
    * ``cover``: of the central 90 % interval. The data are levels, which hold a share of the probability each; counted is the part of
      the true level's share that lies inside (Czado, Gneiting and Held, 2009), which is 90 % on average for the true law.
    """
    found = {}
    if answer.probabilities is not None:
        p = answer.probabilities
        found["right"] = float(int(p.argmax()) == case.label)
        found["log loss"] = -math.log(max(float(p[case.label]), 1e-300))
        found["brier"] = float((p - torch.eye(len(p))[case.label]).square().sum())
    if answer.atoms is not None and answer.weights is not None:
        atoms, w, truth = answer.atoms.clamp(-1, 1) / LEVEL, answer.weights, case.x[case.missing].double() / LEVEL
        found["rmse"] = float((w @ atoms - truth).square().mean().sqrt())
        if len(atoms) > 1:
            off = (atoms - truth).abs()
            found["crps"] = float((w @ off - spread(atoms, w)).mean())
            pairs = torch.cdist(atoms, atoms)
            found["energy"] = float(w @ (atoms - truth).norm(dim=1) - w @ pairs @ w / 2)
            low = torch.where(truth > -8, w @ (atoms < truth - 0.5).double(), 0.0)
            high = torch.where(truth < 8, w @ (atoms < truth + 0.5).double(), 1.0)
            inside = (high.clamp(0.05, 0.95) - low.clamp(0.05, 0.95)) / (high - low)
            sure = ((low > 0.05) & (low < 0.95)).double()  # a level without probability: where it lies
            found["cover"] = float(torch.where(high - low > 1e-12, inside, sure).mean())
    return found


def spread(atoms: Tensor, w: Tensor) -> Tensor:
    """Half the mean distance of two draws, for each column of ``[S, M]``."""
    order = atoms.argsort(0)
    x, w = atoms.gather(0, order), w[order]
    below = w.cumsum(0) - w
    return (w * x * (2 * below + w - 1)).sum(0)  # sum_i w_i x_i (F_below - F_above)


def table(rows: dict[str, list[dict[str, float]]], reference: str, names: Sequence[str]) -> str:
    """Means over cases; in brackets how much more than the reference's, with the standard error of the paired differences."""
    lines = [f"{'':34s}" + "".join(f"{name:>26s}" for name in names)]
    for method, found in rows.items():
        if names[0] not in found[0]:
            continue
        line = f"{method:34s}"
        for name in names:
            if name not in found[0]:
                line += f"{'':>26s}"
                continue
            values = torch.tensor([row[name] for row in found]).double()
            text = f"{float(values.mean()):.3f}"
            if method != reference:
                off = values - torch.tensor([row[name] for row in rows[reference]]).double()
                text += f" ({float(off.mean()):+.3f} ± {float(off.std()) / math.sqrt(len(off)):.3f})"
            line += f"{text:>26s}"
        lines.append(line)
    return "\n".join(lines)


class Solved(NamedTuple):
    """Of one case by the diffusion: its scores, what tells of a collapse, and pictures: the mean and three draws."""

    scores: dict[str, float]
    signs: dict[str, float]
    pictures: Tensor  # [4, D]


def solve(
    diffusion: GaussianDiffusion, errors: Tensor, classes: int, particles: int, repeats: int, case: Case
) -> Solved:
    cpu = time.process_time()
    answer, found = by_diffusion(diffusion, errors, classes, particles, repeats, case)
    order = answer.probabilities.argsort(descending=True).tolist()
    top = found[order[0]]
    first, second = (found[label].evidence for label in order[:2])
    near = sum(posterior.log_weights.shape == (repeats, particles) for posterior in found.values())
    signs: dict[str, float] = {
        "label": case.label,
        "said": order[0],
        "p(label)": float(answer.probabilities[case.label]),
        "log p(y)": first.log_z,
        "its error": first.standard_error,
        "lead": first.log_z - second.log_z,
        "error of the lead": math.hypot(first.standard_error, second.standard_error),  # NaN: the second was out
        "effective": float(top.ess[:, -1].median()),
        "families": float(top.families.median()),
        "k-hat": float(top.pareto_k.max()),
        "warned": float(warned(top)),
        "classes looked at twice": near,
        "evaluations": diffusion.steps * (classes * FIRST + near * repeats * particles),
        "seconds of CPU": time.process_time() - cpu,
    }
    atoms, weights = answer.atoms, answer.weights
    drawn = weights.multinomial(3, replacement=True, generator=torch.Generator().manual_seed(0))
    pictures = case.x.double().repeat(4, 1)
    pictures[:, case.missing] = torch.cat([(weights @ atoms)[None], atoms[drawn]])
    return Solved(scores(answer, case), signs, pictures)


def draw(
    todo: Sequence[Case], solved: Sequence[Solved], others: dict[str, list[Answer]], event: Sequence[int], path: Path
) -> None:
    """A row for each of ten cases: the digit, what is seen, the mean and three draws of the diffusion, the means of two others."""
    names = ("a Gaussian for each class", "20 neighbours")
    rows = []
    for i, case in enumerate(todo[:10]):
        hidden = case.x.double().clone()
        hidden[case.missing] = 0.0
        row = [case.x.double(), hidden, *solved[i].pictures]
        for name in names:
            mean = case.x.double().clone()
            mean[case.missing] = others[name][i].weights @ others[name][i].atoms
            row.append(mean)
        rows.append(torch.stack(row))
    columns = ("digit", "seen", "mean", "draw", "draw", "draw", "Gauss", "nearest")
    titles = [*columns, *[""] * (len(columns) * (len(rows) - 1))]
    plots.save(plots.image_grid(torch.cat(rows).view(-1, *event), columns=len(columns), titles=titles), path)


def main(
    run: Path = RUN, digits: int = 60, particles: int = 32, repeats: int = 2, steps: int = STEPS, out: Path = RESULTS
) -> None:
    """Fill in, classify, score.

    Args:
        run: folder of a trained model.
        digits: test digits, each with one mask.
        particles: of sequential Monte Carlo.
        repeats: of it, from which the standard errors come.
        steps: of the chain that is inferred with.
        out: folder of the results.
    """
    diffusion, data = pyrodiff.load(run).respace(steps), pyrodiff.load_data("digits")
    diffusion.reverse_kernel.net = Told(diffusion.net)
    todo, classes = cases(data, digits), int(data.train_labels.max()) + 1
    torch.manual_seed(0)
    errors = WIDER * denoising_errors(diffusion, data.train[:LOOKED_AT], y=data.train_labels[:LOOKED_AT])
    solved: list[Solved] = []
    for case in todo:
        solved.append(solve(diffusion, errors, classes, particles, repeats, case))
        print(f"{case.mask:12s}", {name: round(value, 3) for name, value in solved[-1].signs.items()}, flush=True)
    others = baselines(data, todo)

    rows = {"diffusion": [found.scores for found in solved]}
    rows |= {name: [scores(a, case) for a, case in zip(answers, todo, strict=True)] for name, answers in others.items()}

    sign = {name: torch.tensor([found.signs[name] for found in solved]).double() for name in solved[0].signs}
    mid = {name: float(values.nanmedian()) for name, values in sign.items()}
    close = int((sign["lead"] < 2 * sign["error of the lead"]).sum())
    evaluations, minutes = int(sign["evaluations"].sum()), float(sign["seconds of CPU"].sum()) / 60
    lines = [
        f"{len(todo)} test digits, T = {diffusion.steps}: {evaluations:,} network evaluations, {minutes:.1f} core-minutes",
        f"{FIRST} particles for each of {classes} classes; {particles} x {repeats} for those within {BEHIND:g} nats of the best, median "
        f"{mid['classes looked at twice']:g}",
        f"of the likeliest class: a warning for {int(sign['warned'].sum())} of {len(todo)} digits; medians of families",
        f"{mid['families']:.1f}, of effective weights at x_0 {mid['effective']:.1f}, of the largest k-hat {mid['k-hat']:.2f}",
        f"standard error of log p(y | class): median {mid['its error']:.2f} nats; lead of the best class over the second:",
        f"median {mid['lead']:.1f} nats, below two standard errors for {close} of {len(todo)}",
        "in brackets: more than the diffusion's, ± the standard error of the paired difference",
    ]
    for name in ("all", *dict.fromkeys(case.mask for case in todo)):
        here = {
            method: [row for row, case in zip(found, todo, strict=True) if name in ("all", case.mask)]
            for method, found in rows.items()
        }
        lines.append(f"\n{name}: {len(here['diffusion'])} digits; classes (log loss in nats)")
        lines.append(table(here, "diffusion", ("right", "log loss", "brier")))
        lines.append(f"\n{name}: missing pixels, in levels (0 to 16)")
        lines.append(table(here, "diffusion", ("rmse", "crps", "energy", "cover")))
    text = "\n".join(lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.txt").write_text(text + "\n", encoding="utf-8")
    with (out / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["mask", "digit", *sign, *(f"{m}: {k}" for m, found in rows.items() for k in found[0])])
        for i, case in enumerate(todo):
            values = [*solved[i].signs.values(), *(v for found in rows.values() for v in found[i].values())]
            writer.writerow([case.mask, case.digit, *(f"{v:.5g}" for v in values)])
    draw(todo, solved, others, diffusion.event_shape, out / "digits.png")
    print(f"\n{text}\n\n{out}")


def smoke(folder: Path) -> dict[str, Any]:
    """A setting of seconds."""
    sizes = {"digits": 4, "particles": 25, "steps": 4}
    return {**sizes, "run": untrained(folder / "run", 4, classes=10, label_dropout=0.1), "out": folder / "out"}


if __name__ == "__main__":
    command_line(main, smoke)
