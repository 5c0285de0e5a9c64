r"""Resampling: ancestors for particles, such that particle n has :math:`N W_n` offspring on average.

Every scheme is a function of the weights and of uniforms, so that its mean can be had by enumeration.

References:
    Comparison of Resampling Schemes for Particle Filtering (Douc, Cappe and Moulines, 2005). https://arxiv.org/abs/cs/0507025
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["RESAMPLING", "Resampling", "multinomial", "residual", "stratified", "systematic"]

Resampling = Callable[[Tensor, Tensor], Tensor]
"""``ancestors(weights, uniforms)``, both ``[R, N]``, float64; a row's weights add up to 1. Returns indices ``[R, N]``."""


def multinomial(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Independent draws, ``[R, N]``."""
    return _at(weights, uniforms)


def stratified(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One draw from each N-th of the mass, ``[R, N]``."""
    count = weights.shape[-1]
    return _at(weights, (torch.arange(count, device=weights.device) + uniforms) / count)


def systematic(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws 1/N of the mass apart, from the first uniform of each row, ``[R, N]``."""
    return stratified(weights, uniforms[:, :1])


def residual(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The whole part of N W_n copies each, and independent draws from what remains, ``[R, N]``."""
    count = weights.shape[-1]
    whole = (count * weights + 1e-9).floor()  # weights that add up to 1 but for rounding
    copies, rest = whole.cumsum(-1), (count * weights - whole).clamp(min=0)
    place = torch.arange(count, device=weights.device).double().expand(weights.shape).contiguous()
    kept = torch.searchsorted(copies.contiguous(), place, right=True).clamp(max=count - 1)
    return torch.where(place < copies[:, -1:], kept, _at(rest, uniforms))


def _at(weights: Tensor, points: Tensor) -> Tensor:
    """The particles in whose share of the mass the points, in [0, 1), lie; never one of weight 0."""
    mass = weights.cumsum(-1)
    total = mass[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    # of weights in another layout cumsum keeps it, and searchsorted warns
    points = torch.minimum(points * total, below).contiguous()
    return torch.searchsorted(mass.contiguous(), points, right=True).clamp(max=weights.shape[-1] - 1)


RESAMPLING: dict[str, Resampling] = {
    "multinomial": multinomial,
    "residual": residual,
    "stratified": stratified,
    "systematic": systematic,
}
