"""A residual perceptron for vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.nets.embeddings import ConditionEmbedding
from pyrodiff.nets.layers import zero_parameters

__all__ = ["MLP"]


class Block(nn.Module):
    """A residual block whose hidden layer is scaled and shifted by the embedding (FiLM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(width, 2 * width)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map [N, width] to [N, width], given the embedding of shape [N, width]."""
        scale, shift = self.embedding(embedding).chunk(2, dim=1)
        h = torch.addcmul(shift, self.hidden(F.silu(x)), 1 + scale)
        return x + self.output(F.silu(h))


class MLP(nn.Module):
    """A residual multilayer perceptron for vectors. A fresh network returns 0.

    Args:
        features: size of the input vectors.
        out_features: size of the output vectors; None means ``features``. A network that also
            predicts variances has ``2 * features``.
        width: size of the hidden layers, even.
        depth: number of residual blocks, each of two layers.
        classes: number of class labels, or None for a network without labels.
        label_dropout: see :class:`~pyrodiff.nets.UNet`.

    Attributes:
        config: the arguments above; ``MLP(**net.config)`` is the same architecture.
        cond_event_dims: dims of each conditioning value beyond N.
        null_cond: see :class:`~pyrodiff.nets.UNet`.

    Raises:
        OptionError: an argument is outside its range.
    """

    cond_event_dims: dict[str, int]

    def __init__(
        self,
        features: int,
        *,
        out_features: int | None = None,
        width: int = 128,
        depth: int = 3,
        classes: int | None = None,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "features": features,
            "out_features": out_features,
            "width": width,
            "depth": depth,
            "classes": classes,
            "label_dropout": label_dropout,
        }
        outputs = features if out_features is None else out_features
        for name, value in (("features", features), ("out_features", outputs), ("depth", depth)):
            if value < 1:
                raise OptionError(f"{name}={value} is not positive")
        self.features = features
        self.cond_event_dims = {} if classes is None else {"y": 0}
        self.embedding = ConditionEmbedding(width, width, classes=classes, label_dropout=label_dropout)
        self.null_cond = self.embedding.null_cond
        self.input = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.output = zero_parameters(nn.Linear(width, outputs))

    def forward(self, x: Tensor, log_snr: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: tensor of shape [N, features].
            log_snr: floating-point tensor of shape [N], finite, in nats.
            y: class labels, integer tensor of shape [N]; wanted if and only if ``classes`` is set. The null class, if
                there is one, is label ``classes``.

        Returns:
            Tensor of shape [N, out_features].

        Raises:
            OptionError: labels are missing, or given to a network without classes.
            ShapeError: an input has the wrong shape or kind of number.
        """
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ShapeError(f"x has shape {list(x.shape)}, not [N, {self.features}]")
        if not x.is_floating_point():
            raise ShapeError(f"x has dtype {x.dtype}, not a floating-point one")
        embedding = self.embedding(x, log_snr, y=y)
        h = self.input(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(F.silu(h))
