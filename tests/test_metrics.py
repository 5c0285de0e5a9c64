"""Sample quality: the Fréchet distance against its closed form; the classifier on real digits, and on spoilt ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.training.metrics import (
    ImageClassifier,
    class_shares,
    feature_distance,
    fit_classifier,
    frechet_distance,
)


def with_moments(n: int, mean: Tensor, root: Tensor) -> Tensor:
    """A set whose sample mean and covariance are ``mean`` and ``root @ root.T`` to rounding."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return mean + whitened @ root.T


def test_closed_form_of_commuting_covariances():
    scale_a, scale_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.1, 0.5]).double()
    mean_a, mean_b = torch.zeros(3).double(), torch.tensor([1.0, -2.0, 0.0]).double()
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    a = with_moments(50, mean_a, rotation * scale_a)
    b = with_moments(70, mean_b, rotation * scale_b)
    expected = float((mean_a - mean_b).square().sum() + (scale_a - scale_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_closed_form_of_other_covariances():
    # In two dims, tr(M^(1/2)) = sqrt(tr M + 2 sqrt(det M)); M = A B has positive eigenvalues.
    root_a = torch.tensor([[1.0, 0.0], [0.7, 0.4]]).double()
    root_b = torch.tensor([[0.3, -0.5], [0.0, 2.0]]).double()
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    product = cov_a @ cov_b
    trace = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    expected = float(cov_a.trace() + cov_b.trace()) - 2 * trace
    zero = torch.zeros(2).double()
    assert frechet_distance(with_moments(40, zero, root_a), with_moments(40, zero, root_b)) == pytest.approx(expected)


def test_equal_sets_and_symmetry():
    a, b = torch.randn(30, 48), torch.randn(20, 48) * 2
    assert frechet_distance(a, a.clone()) == 0
    assert 0 <= frechet_distance(a, a[torch.randperm(30)]) < 1e-10
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, a + 3) == pytest.approx(48 * 9, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3)),
        (torch.zeros(5, 3), torch.zeros(5, 4)),
        (torch.zeros(5), torch.zeros(5)),
        (torch.full((5, 3), math.nan), torch.zeros(5, 3)),
    ],
)
def test_features_that_do_not_fit(a: Tensor, b: Tensor):
    with pytest.raises(ShapeError):
        frechet_distance(a, b)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    found = sklearn_datasets.load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(found.target)


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> ImageClassifier:
    x, y = digits
    return fit_classifier(x[:1437], y[:1437], seed=0)


def test_accuracy_on_other_writers_digits(digits: tuple[Tensor, Tensor], classifier: ImageClassifier):
    x, y = digits
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    assert (classifier(x[1437:]).argmax(1) == y[1437:]).double().mean() >= 0.95
    features = classifier.features(x[:1437])
    assert features.mean(0).abs().max() < 1e-4 and (features.std(0) - 1).abs().max() < 1e-2


def test_distances_order_sets_as_they_should_be(digits: tuple[Tensor, Tensor], classifier: ImageClassifier):
    x, y = digits
    shuffled = x[:1437][torch.randperm(1437)]
    real, more, held_out = shuffled[:360], shuffled[360:720], x[1437:]
    assert feature_distance(classifier, real, real) == 0
    same = feature_distance(classifier, real, more)
    other_writers = feature_distance(classifier, real, held_out)
    noisy = feature_distance(classifier, real, held_out + 0.15 * torch.randn_like(held_out))
    five = held_out[y[1437:] < 5]
    classes_lost = feature_distance(classifier, real, five)
    noise = feature_distance(classifier, real, 2 * torch.rand_like(held_out) - 1)
    assert 0 < same < other_writers < noisy < classes_lost < noise
    assert noisy > 1.15 * other_writers
    assert feature_distance(classifier, real, more + 0.15 * torch.randn_like(more)) > 1.3 * same
    # the control's bias: 180 images of all classes are not far
    assert classes_lost > 3 * feature_distance(classifier, real, held_out[: len(five)])


def test_class_shares(digits: tuple[Tensor, Tensor], classifier: ImageClassifier):
    x, y = digits
    shares = class_shares(classifier, x[1437:])
    assert shares.shape == (10,) and shares.dtype == torch.float64
    assert shares.sum() == pytest.approx(1) and (shares - 0.1).abs().max() < 0.03
    assert class_shares(classifier, x[1437:][y[1437:] < 5])[5:].sum() < 0.05


def test_a_seed_decides_and_nobody_elses_generator_moves(digits: tuple[Tensor, Tensor]):
    x, y = digits[0][:100], digits[1][:100]
    before = torch.get_rng_state()
    a = fit_classifier(x, y, seed=3, steps=5)
    torch.rand(7)
    with torch.no_grad():  # the caller's mode neither matters nor changes
        b = fit_classifier(x, y, seed=3, steps=5)
        assert not torch.is_grad_enabled()
    c = fit_classifier(x, y, seed=4, steps=5)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not torch.equal(a.first.weight, c.first.weight)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.rand(7)
    assert torch.equal(torch.get_rng_state(), after)


def test_colour_images_of_odd_sizes_and_few_classes():
    x, y = torch.rand(20, 3, 5, 3), torch.arange(20) % 2
    classifier = fit_classifier(x, y, steps=2, batch_size=4)
    assert class_shares(classifier, x).shape == (2,)
    assert classifier.features(x).shape == (20, 48)
    assert feature_distance(classifier, x.double(), x + 1) > 0
    constant = fit_classifier(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), steps=1)
    assert constant.features(torch.zeros(4, 1, 2, 2)).isfinite().all()


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(4, 8, 8), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 1, 8, 8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(4, 1, 8, 8), torch.zeros(4)),
        (torch.zeros(4, 1, 8, 8), torch.full((4,), -1)),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)),
    ],
)
def test_training_data_that_do_not_fit(x: Tensor, y: Tensor):
    with pytest.raises(ShapeError):
        fit_classifier(x, y)


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_options_out_of_range(options: dict[str, float]):
    with pytest.raises(OptionError):
        fit_classifier(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), **options)


def test_images_that_do_not_fit(classifier: ImageClassifier):
    for x in (torch.zeros(4, 1, 8, 9), torch.zeros(4, 64), torch.zeros(0, 1, 8, 8), torch.zeros(2, 1, 8, 8).long()):
        with pytest.raises(ShapeError):
            class_shares(classifier, x)
