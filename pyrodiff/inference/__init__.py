"""A diffusion as one site of a bigger Pyro model."""

from __future__ import annotations

from .bound import bound
from .guides import DenoiserGuide
from .prior import DiffusionPrior, FlowReparam
from .steps import StepsBias, steps_bias

__all__ = ["DenoiserGuide", "DiffusionPrior", "FlowReparam", "StepsBias", "bound", "steps_bias"]
