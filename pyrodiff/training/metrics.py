"""Sample quality of small labelled images, by a classifier that is trained on the spot.

Nothing is downloaded: a small convolutional network learns the labels of the real training images
in seconds, and its first and last hidden layers give the features. The distance between the features of two
sets is the Fréchet distance between the Gaussians with their moments, the formula of FID but with
another network and so on another scale. Name it after the data, "digits-Fréchet", never "FID", and
compare only values of one classifier and one number of images: the estimate is biased upwards, the
more so the fewer the images.

Held-out bits per dim come first; this sees what they hardly notice (noise left in the images,
missing classes) and is blind to what they see (copies of the training data).

References:
    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al.,
    2017), eq. 6. https://arxiv.org/abs/1706.08500
    Effectively Unbiased FID and Inception Score (Chong and Forsyth, 2020), on the bias.
    https://arxiv.org/abs/1911.07023
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrodiff.errors import OptionError, ShapeError

__all__ = [
    "ImageClassifier",
    "class_shares",
    "feature_distance",
    "fit_classifier",
    "frechet_distance",
]

_WIDTH = 16  # channels of the first layer
_HIDDEN = 32  # units of the last hidden layer
_ROWS = 1024  # images per network call once trained


class ImageClassifier(nn.Module):
    """A small convolutional classifier; made by :func:`fit_classifier`.

    Args:
        x: training images ``[N, C, H, W]``, for their shape, mean and scale.
        classes: number of classes.

    Attributes:
        classes: number of classes.
        event_shape: shape of an image.
    """

    mean: Tensor
    scale: Tensor
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, x: Tensor, classes: int) -> None:
        super().__init__()
        self.classes, self.event_shape = classes, x.shape[1:]
        self.register_buffer("mean", x.mean())
        self.register_buffer("scale", x.std(correction=0).clamp(min=1e-6))
        self.register_buffer("feature_mean", torch.zeros(_HIDDEN + _WIDTH))
        self.register_buffer("feature_scale", torch.ones(_HIDDEN + _WIDTH))
        self.first = nn.Conv2d(x.shape[1], _WIDTH, 3, padding=1, dtype=torch.float32)
        self.second = nn.Conv2d(_WIDTH, 2 * _WIDTH, 3, stride=2, padding=1, dtype=torch.float32)
        size = [min(4, -(-side // 2)) for side in x.shape[2:]]
        self.pool = nn.AdaptiveMaxPool2d((size[0], size[1]))
        flat = 2 * _WIDTH * size[0] * size[1]
        self.hidden = nn.Linear(flat, _HIDDEN, dtype=torch.float32)
        self.output = nn.Linear(_HIDDEN, classes, dtype=torch.float32)

    def _layers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """First layer ``[N, 16, H, W]`` and last hidden one ``[N, 32]``."""
        if x.dim() != 4 or x.shape[1:] != self.event_shape or not x.is_floating_point():
            raise ShapeError(
                f"images have shape {list(x.shape)} and dtype {x.dtype}, "
                f"not a floating one and [N, {', '.join(map(str, self.event_shape))}]"
            )
        first = F.silu(self.first((x.float() - self.mean) / self.scale))
        pooled = self.pool(F.silu(self.second(first)))
        return first, F.silu(self.hidden(pooled.flatten(1)))

    def features(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, 48]``, float32.

        Each has mean 0 and variance 1 over the training images, so that none dominates a distance.
        """
        first, hidden = self._layers(x)
        # A good classifier's last layer forgets noise, which does not change the class: the mean
        # activation of the first one is there to see it.
        found = torch.cat([hidden, first.mean((2, 3))], dim=1)
        return (found - self.feature_mean) / self.feature_scale

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return self.output(self._layers(x)[1])


def fit_classifier(
    x: Tensor, y: Tensor, seed: int = 0, *, steps: int = 500, batch_size: int = 128, learning_rate: float = 5e-3
) -> ImageClassifier:
    """Train a classifier: a few seconds for 8x8 images on one CPU thread.

    Args:
        x: training images, ``[N, C, H, W]`` in model units.
        y: their labels, integers from 0, ``[N]``.
        seed: initial weights and order of the images are made of it alone; on a CPU, and for a number of threads,
            the result is always the same. torch's own generators stay as they are.
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: highest learning rate of a one-cycle policy for AdamW.

    Returns:
        The network, in evaluation mode and without gradients, on the device of ``x``.

    Raises:
        ShapeError: the images or labels have the wrong shape or dtype.
        OptionError: an option outside its range.
    """
    if x.dim() != 4 or not x.is_floating_point() or not x.numel():
        raise ShapeError(
            f"x has shape {list(x.shape)} and dtype {x.dtype}, not a floating one and [N, C, H, W], N >= 1"
        )
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool or y.min() < 0:
        raise ShapeError(f"y has shape {list(y.shape)} and dtype {y.dtype}, not integers from 0 and [{len(x)}]")
    if steps < 1 or batch_size < 1:
        raise OptionError(f"steps={steps!r} and batch_size={batch_size!r} must be at least 1")
    if not 0 < learning_rate < 1:
        raise OptionError(f"learning_rate={learning_rate!r} is not in (0, 1)")
    x, y = x.detach().float(), y.detach().long().to(x.device)
    # torch.manual_seed would reach the GPUs' generators too, which a fork of the CPU's does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = ImageClassifier(x.cpu(), int(y.max()) + 1).to(x.device)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, cycle_momentum=False)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(x), (batch_size,), generator=order, device="cpu").to(x.device)
            loss = F.cross_entropy(net(x[rows]), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    net.eval().requires_grad_(False)
    features = _apply(net.features, x, net)
    net.feature_mean = features.mean(0)
    net.feature_scale = features.std(0, correction=0).clamp(min=1e-6)
    return net


def class_shares(classifier: ImageClassifier, x: Tensor) -> Tensor:
    """Share of the images that the classifier puts into each class.

    Args:
        classifier: see :func:`fit_classifier`.
        x: images, ``[N, C, H, W]``.

    Returns:
        float64 ``[classes]`` on the CPU, summing to 1.

    Raises:
        ShapeError: the images do not fit the classifier, or there are none.
    """
    found = _apply(classifier, x, classifier).argmax(1)
    return torch.bincount(found, minlength=classifier.classes).double().cpu() / len(x)


def feature_distance(classifier: ImageClassifier, real: Tensor, other: Tensor) -> float:
    """Fréchet distance between the classifier's features of two sets of images.

    For the 8x8 digits report it as "digits-Fréchet"; see the module's notes on what may be compared.

    Args:
        classifier: see :func:`fit_classifier`.
        real: images, ``[N, C, H, W]``.
        other: images, ``[M, C, H, W]``; M = N for comparable numbers.

    Returns:
        As :func:`frechet_distance`, in squared units of the features.

    Raises:
        ShapeError: the images do not fit the classifier, or a set has fewer than two.
    """
    features = [_apply(classifier.features, x, classifier) for x in (real, other)]
    return frechet_distance(*features)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    r"""Squared Fréchet (2-Wasserstein) distance between the Gaussians with the moments of two sets.

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2})

    Args:
        features_a: ``[N, F]``, N >= 2.
        features_b: ``[M, F]``, M >= 2.

    Returns:
        The distance, in squared units of the features, computed in float64; exactly 0 for equal sets.

    Raises:
        ShapeError: the sets are no matrices of as many columns, or have fewer than two rows.

    References:
        Heusel et al. (2017), eq. 6. https://arxiv.org/abs/1706.08500
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.dim() != 2 or len(features) < 2 or not features.isfinite().all():
            raise ShapeError(f"{name} has shape {list(features.shape)}, not [N, F] with N >= 2 and finite values")
    if features_a.shape[1] != features_b.shape[1]:
        raise ShapeError(f"features_a has {features_a.shape[1]} columns, features_b {features_b.shape[1]}")
    a, b = (features.detach().double().cpu() for features in (features_a, features_b))
    if torch.equal(a, b):
        return 0.0
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = (a - mean_a).T @ (a - mean_a) / (len(a) - 1), (b - mean_b).T @ (b - mean_b) / (len(b) - 1)
    # tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2). Taking the root of the eigenvalues of
    # A^(1/2) B A^(1/2) instead would turn a rounding error of 1e-16 in a null direction into 1e-8.
    trace = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace
    return max(0.0, float(distance))


def _root(cov: Tensor) -> Tensor:
    """Symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _apply(function: Callable[[Tensor], Tensor], x: Tensor, classifier: ImageClassifier) -> Tensor:
    """A method of the classifier on images, some at a time."""
    if not len(x):
        raise ShapeError(f"images have shape {list(x.shape)}: there are none")
    device = classifier.mean.device
    with torch.no_grad():
        return torch.cat([function(part.to(device)) for part in x.split(_ROWS)])
