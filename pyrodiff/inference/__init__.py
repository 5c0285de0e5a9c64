"""A diffusion as one site of a bigger Pyro model."""

from __future__ import annotations

from . import operators
from .bound import bound
from .calibration import sbc, tarp
from .gibbs import particle_gibbs
from .guidance import class_label, guided, mmps, pigdm, repaint
from .guides import DenoiserGuide
from .observe import observation
from .operators import LinearGaussian
from .prior import DiffusionPrior, FlowReparam
from .smc import Posterior, smc
from .steps import StepsBias, steps_bias

__all__ = [
    "DenoiserGuide",
    "DiffusionPrior",
    "FlowReparam",
    "LinearGaussian",
    "Posterior",
    "StepsBias",
    "bound",
    "class_label",
    "guided",
    "mmps",
    "observation",
    "operators",
    "particle_gibbs",
    "pigdm",
    "repaint",
    "sbc",
    "smc",
    "steps_bias",
    "tarp",
]
