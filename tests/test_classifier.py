"""The classifier of noisy examples: Bayes' rule on a mixture, by its programs, by training and by guidance."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from monte_carlo import any_seed, assert_estimate, assert_mean
from oracles import GaussianDenoiser, MixtureDenoiser, hermite
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyrodiff
from pyrodiff import CosineSchedule, GaussianDiffusion, NoisyClassifier, fit, sample, timesteps
from pyrodiff.elbo import Estimate
from pyrodiff.errors import CheckpointError, DataError, OptionError, ProgramError, ShapeError
from pyrodiff.nets import MLP
from pyrodiff.sample import Guided

WEIGHTS, MEANS, VARIANCES = [0.3, 0.7], [-0.6, 0.5], [0.04, 0.09]


class Bayes(nn.Module):
    """Exact logits of the mixture's component, for vectors whose dims are independent draws of one component each."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        w, m, S = (torch.tensor(z, dtype=x.dtype) for z in (WEIGHTS, MEANS, VARIANCES))
        alpha, var = log_snr.sigmoid().sqrt()[:, None], (-log_snr).sigmoid()[:, None]
        C = alpha**2 * S + var
        return w.log() - 0.5 * (x - alpha * m) ** 2 / C - 0.5 * C.log()


def bayes(steps: int = 10) -> NoisyClassifier:
    return NoisyClassifier(Bayes(), CosineSchedule(steps), (1,))


def examples(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    y = (torch.rand(n) < WEIGHTS[1]).long()
    m, S = torch.tensor(MEANS)[y], torch.tensor(VARIANCES)[y]
    return (m + S.sqrt() * torch.randn(n))[:, None].to(dtype), y


def entropy(classifier: NoisyClassifier) -> np.ndarray:
    """E[-log p(y | x_t)] at every t, by quadrature over x_t given y."""
    nodes, weights = hermite(80)
    found = []
    for t in range(1, classifier.steps + 1):
        total = 0.0
        for y, (w, m, S) in enumerate(zip(WEIGHTS, MEANS, VARIANCES, strict=True)):
            alpha, sigma = float(classifier.schedule.alpha(t)), float(classifier.schedule.sigma(t))
            x_t = alpha * m + math.sqrt(alpha**2 * S + sigma**2) * torch.from_numpy(nodes)[:, None]
            cost = -classifier.log_prob(x_t, t, torch.tensor(y))
            total += w * float((torch.from_numpy(weights) * cost).sum())
        found.append(total)
    return np.array(found)


def test_the_law_takes_any_batch_shape():
    classifier = bayes()
    x_t = torch.randn(3, 4, 1, dtype=torch.float64)
    t = torch.tensor([1, 4, 7, 10])
    law = classifier(x_t, t)
    assert law.batch_shape == (3, 4) and law.logits.shape == (3, 4, 2)
    one = classifier(x_t[2, 1], 4)
    torch.testing.assert_close(law.logits[2, 1], one.logits)


@pytest.mark.parametrize("elbo", [pyrodiff.TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_elbo_is_minus_the_cross_entropy(elbo, weighted: bool):
    classifier = bayes()
    x0, y = examples(6, torch.float64)
    t = torch.tensor([1, 2, 3, 5, 9, 10])
    weight = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64) if weighted else None
    torch.manual_seed(3)
    loss = elbo().loss(classifier.model, classifier.guide, x0, t, weight=weight, y=y)
    torch.manual_seed(3)
    x_t = classifier.forward_process.marginal(x0, t).sample()
    scale = torch.ones(6, dtype=torch.float64) if weight is None else weight / classifier.steps
    assert loss == pytest.approx(float(-(scale * classifier.log_prob(x_t, t, y)).sum()), rel=1e-12)


@pytest.mark.monte_carlo
def test_the_score_is_the_conditional_entropy():
    classifier = bayes()
    x0, y = examples(4000, torch.float64)
    found, accuracy = classifier.score(x0, y, count=10)
    assert_estimate(found.mean, found.se_examples, entropy(classifier).mean(), detects=0.1)
    assert found.se_noise < found.se_examples < 0.01
    assert 0.7 < accuracy < 1


@pytest.mark.monte_carlo
def test_fit_reaches_bayes_rule():
    classifier = NoisyClassifier(MLP(1, out_features=2, width=32, depth=2), CosineSchedule(10), (1,))
    x0, y = examples(4000)
    at_start = classifier.score(x0, y)[0].mean
    assert at_start == pytest.approx(math.log(2), abs=1e-6)  # a fresh network returns 0
    result = fit(
        classifier, x0[:3000], x0[3000:], cond={"y": y[:3000]}, validation_cond={"y": y[3000:]}, steps=400, batch_size=100,
        timesteps="importance", progress=False, device="cpu", lr=3e-3, warmup=20, seed=any_seed(),
    )  # fmt: skip
    least = entropy(bayes()).mean()
    fresh = examples(20_000)
    found, _ = classifier.score(*fresh, count=10)
    # Jensen: no classifier is better than Bayes' rule; what is lost to 400 steps is under 0.01 nats
    assert_estimate(found.mean, found.se_examples, (least, least + 0.01), detects=0.05)
    assert result.best.mean == min(record["validation_cross_entropy"] for record in result.records)
    assert {"validation_accuracy", "validation_se_noise"} <= set(result.records[-1])
    assert "train_cross_entropy" in result.records[-1]
    assert not any("bits" in name or "per_dim" in name for name in result.records[-1])


def test_stock_svi_trains_it():
    torch.manual_seed(0)
    classifier = NoisyClassifier(MLP(1, out_features=2, width=16, depth=1), CosineSchedule(10), (1,))
    x0, y = examples(200)
    optimiser = pyro.optim.Adam({"lr": 1e-2})
    svi = SVI(classifier.model, classifier.guide, optimiser, pyrodiff.TraceMeanField_ELBO())
    losses = [svi.step(x0, timesteps.low_discrepancy(200, 10), y=y) / 200 for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.6 < losses[0]


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("t", [1, 5, 10])
def test_guided_by_bayes_rule_the_mixture_denoises_as_its_component(label: int, t: int):
    classifier = bayes()
    kernel = GaussianDiffusion(
        MixtureDenoiser(WEIGHTS, MEANS, VARIANCES), CosineSchedule(10), (1,), prediction="x0"
    ).reverse_kernel
    told = {"y": torch.full((7,), label)}
    guided = Guided(kernel, 1.0, lambda x_t, t: classifier.log_prob(x_t, t, **told), range(1, 11))
    x_t = torch.randn(7, 1, dtype=torch.float64)
    alpha, var = classifier.schedule.alpha(t), classifier.schedule.sigma(t) ** 2
    component = GaussianDenoiser(mean=MEANS[label], var=VARIANCES[label])
    torch.testing.assert_close(guided.denoise(x_t, t), component.posterior_mean(x_t, alpha, var), rtol=1e-9, atol=1e-9)


@pytest.mark.monte_carlo
def test_guided_samples_are_the_classes_with_rows_that_survive_batching():
    classifier = bayes(40)
    net = MixtureDenoiser(WEIGHTS, MEANS, VARIANCES)
    diffusion = GaussianDiffusion(net, CosineSchedule(40), (1,), prediction="x0").double()
    y = torch.arange(1000) % 2
    options = {"method": "ddim", "seed": any_seed(), "classifier": classifier.log_prob}
    x = sample(diffusion, 1000, classifier_cond={"y": y}, batch_size=300, **options)
    for label in (0, 1):
        # DDIM's own bias at 40 steps is under 0.01
        assert_mean(x[y == label, 0], (MEANS[label] - 0.01, MEANS[label] + 0.01), detects=0.2)
    together = sample(diffusion, 1000, classifier_cond={"y": y}, batch_size=1000, **options)
    torch.testing.assert_close(x, together, rtol=0, atol=1e-5)
    alone = sample(diffusion, 1000, classifier_cond={"y": 1}, **options)
    torch.testing.assert_close(alone[1::2], x[1::2], rtol=0, atol=1e-5)


def test_it_is_saved_and_loaded_and_not_taken_for_a_diffusion(tmp_path: Path):
    torch.manual_seed(0)
    classifier = NoisyClassifier(MLP(1, out_features=2, width=8, depth=1), CosineSchedule(10), (1,))
    for parameter in classifier.parameters():
        nn.init.normal_(parameter, std=0.3)
    pyrodiff.save(tmp_path / "classifier", classifier)
    again = pyrodiff.load_classifier(tmp_path / "classifier")
    x = torch.randn(5, 1)
    assert torch.equal(again.log_prob(x, 3, torch.ones(5).long()), classifier.log_prob(x, 3, torch.ones(5).long()))
    with pytest.raises(CheckpointError, match="kind 'classifier', not 'model'"):
        pyrodiff.load(tmp_path / "classifier")
    pyrodiff.save(tmp_path / "diffusion", GaussianDiffusion(MLP(1, width=8, depth=1), CosineSchedule(10), (1,)))
    with pytest.raises(CheckpointError, match="kind 'model', not 'classifier'"):
        pyrodiff.load_classifier(tmp_path / "diffusion")


def test_training_it_resumes_bit_for_bit(tmp_path: Path):
    x0, y = examples(60)

    def run(folder: Path, steps: int, resume: bool = False) -> tuple[NoisyClassifier, object]:
        torch.manual_seed(1)
        classifier = NoisyClassifier(MLP(1, out_features=2, width=8, depth=1), CosineSchedule(10), (1,))
        result = fit(
            classifier, x0[:40], x0[40:], cond={"y": y[:40]}, validation_cond={"y": y[40:]}, steps=steps, batch_size=8,
            lr_schedule="constant", timesteps="importance", folder=folder, resume=resume, progress=False, device="cpu",
            validate_every=3,
        )  # fmt: skip
        return classifier, result

    whole, record = run(tmp_path / "whole", 9)
    run(tmp_path / "parts", 3)
    parts, again = run(tmp_path / "parts", 9, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert again.best == record.best and type(again.best) is Estimate


def test_a_learned_schedule_is_taken_as_it_is_and_not_trained():
    """Cross-entropy would fall by leaving out noise, and the schedule is the diffusion's."""
    schedule = pyrodiff.LearnedSchedule(10, -4.0, 4.0)
    classifier = NoisyClassifier(MLP(1, out_features=2, width=8, depth=1), schedule, (1,))
    before = [p.detach().clone() for p in schedule.parameters()]
    x0, y = examples(40)
    fit(classifier, x0, cond={"y": y}, steps=5, batch_size=20, lr=0.1, warmup=0, progress=False, device="cpu")
    svi = SVI(classifier.model, classifier.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x0, timesteps.uniform(40, 10), y=y)
    for own in (schedule, classifier.schedule):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), before, strict=True))


def test_it_guides_and_scores_without_dropout():
    net = pyrodiff.nets.Classifier(1, classes=2, width=8, multipliers=(1,), blocks=1, dropout=0.5)
    nn.init.normal_(net.pool.out.weight)
    classifier = NoisyClassifier(net, CosineSchedule(10), (1, 4, 4)).train()
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 1])
    assert torch.equal(classifier.log_prob(x, 2, y), classifier.log_prob(x, 2, y)) and net.training
    modes = []
    net.register_forward_hook(lambda module, args, out: modes.append(module.training))
    classifier.score(x, y)
    assert modes and not any(modes)


def test_another_network_can_take_the_place_of_the_first():
    classifier = NoisyClassifier(MLP(1, out_features=2, width=8, depth=1), CosineSchedule(10), (1,))
    classifier.net = MLP(1, out_features=2, width=8, depth=1)
    before = classifier.net.output.weight.detach().clone()
    x0, y = examples(20)
    svi = SVI(classifier.model, classifier.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x0, timesteps.uniform(20, 10), y=y)
    assert not torch.equal(classifier.net.output.weight, before)
    for name in ("schedule", "forward_process"):
        with pytest.raises(ProgramError, match=f"{name} cannot be exchanged"):
            setattr(classifier, name, CosineSchedule(5))


@pytest.mark.parametrize(
    "y",
    [
        torch.tensor([0.5, 1.0]),
        torch.tensor([0, 2]),
        torch.tensor([-1, 0]),
        torch.tensor([[0], [1]]),
        torch.tensor([0]),
    ],
)
def test_bad_labels_are_named(y: Tensor):
    net = pyrodiff.nets.Classifier(1, classes=2, width=8, multipliers=(1,), blocks=1)
    classifier = NoisyClassifier(net, CosineSchedule(10), (1, 4, 4))
    x0 = torch.randn(2, 1, 4, 4)
    for call in (lambda: classifier.score(x0, y), lambda: fit(classifier, x0, cond={"y": y}, steps=1, batch_size=2)):
        with pytest.raises(DataError, match=r"^the labels y of "):
            call()


def test_the_loss_on_record_is_per_example():
    """A fresh network says log 2 of every example, whatever its dims; the best is no number of bits per dim."""
    classifier = NoisyClassifier(MLP(3, out_features=2, width=8, depth=1), CosineSchedule(10), (3,))
    x0, y = torch.randn(8, 3), torch.arange(8) % 2
    result = fit(
        classifier, x0, x0, cond={"y": y}, validation_cond={"y": y}, steps=1, batch_size=8, progress=False, device="cpu"
    )
    assert result.records[0]["train_cross_entropy"] == pytest.approx(math.log(2), rel=1e-6)
    assert type(result.best) is Estimate


def test_mistakes_are_named():
    classifier = bayes()
    x0, y = examples(20)
    with pytest.raises(DataError, match="needs the labels y of data"):
        fit(NoisyClassifier(MLP(1, out_features=2), CosineSchedule(5), (1,)), x0, steps=1, batch_size=4, progress=False)
    with pytest.raises(ShapeError, match=r"t has values in 0\.\.0"):
        classifier.model(x0, torch.zeros(20).long(), y=y)
    with pytest.raises(ShapeError, match=r"x_t has shape \[20, 2\]"):
        classifier(torch.zeros(20, 2), 1)
    diffusion = GaussianDiffusion(MLP(1), CosineSchedule(5), (1,))
    with pytest.raises(OptionError, match=r"classifier_cond=.* and there is none"):
        sample(diffusion, 2, classifier_cond={"y": 1})
    with pytest.raises(ShapeError, match="y has 3 rows for n=2"):
        sample(diffusion, 2, classifier=classifier.log_prob, classifier_cond={"y": torch.zeros(3).long()})
