"""Networks: ``net(x, log_snr, **conditioning) -> tensor``.

The contract of a network of a diffusion, ours or a user's:

* ``x`` is a tensor of shape [N, *event], ``log_snr`` a float32 tensor of shape [N] in nats, each
  conditioning value a tensor of shape [N, ...]. The result has shape [N, *event], with twice the
  channels if the network also predicts variances.
* The attribute ``cond_event_dims`` (a dict from name to int) says how many dims each conditioning
  value has beyond N; a missing name means 0.
* The attribute ``null_cond`` (a dict from name to value; may be missing or empty) is the conditioning that stands for none.
* A network of this package keeps its constructor's arguments, JSON-able, in ``config``: a
  checkpoint stores the network as its registered name and these.

A :class:`Classifier` is called likewise and returns logits, [N, classes].
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from pyrodiff.errors import OptionError, check_option
from pyrodiff.nets.classifier import Classifier
from pyrodiff.nets.mlp import MLP
from pyrodiff.nets.unet import UNet

__all__ = ["MLP", "REGISTRY", "Classifier", "UNet", "build"]

REGISTRY: dict[str, type[nn.Module]] = {"UNet": UNet, "MLP": MLP, "Classifier": Classifier}


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a registered network.

    Args:
        name: a key of :data:`REGISTRY`.
        arguments: the constructor's keyword arguments, such as the ``config`` of another network.

    Returns:
        A fresh network.

    Raises:
        OptionError: the name is not registered, or an argument is unknown, missing or outside its
            range.
    """
    check_option("network", name, REGISTRY)
    network = REGISTRY[name]
    try:
        inspect.signature(network).bind(**arguments)
    except TypeError as error:
        raise OptionError(f"{name}: {error}") from None
    return network(**arguments)
