"""A Gaussian diffusion model as a Pyro program.

Three files are the library: ``forward.py`` (q), ``reverse.py`` (p) and ``diffusion.py`` (the programs); the rest are
accessories.
"""

from __future__ import annotations

from . import distributions, errors, inference, nets, schedules, timesteps
from ._version import __version__
from .classifier import NoisyClassifier
from .diffusion import GaussianDiffusion
from .distributions import DiscretizedNormal
from .elbo import ELBOTerms, RenyiELBO, TraceMeanField_ELBO, bits_per_dim, elbo_terms
from .forward import ForwardProcess
from .inference_data import compare_models, to_datatree
from .laboratory.budget import estimate_elbo
from .laboratory.compare import compare_estimators
from .likelihood.methods import log_likelihood
from .reverse import ReverseKernel
from .sample import invert, rsample, sample, step_log_probs, trajectory
from .schedules import CosineSchedule, LearnedSchedule, LinearSchedule, LogLinearSchedule, TableSchedule
from .training.checkpoint import load, load_classifier, save
from .training.data import load_data
from .training.fit import fit

__all__ = [
    "CosineSchedule",
    "DiscretizedNormal",
    "ELBOTerms",
    "ForwardProcess",
    "GaussianDiffusion",
    "LearnedSchedule",
    "LinearSchedule",
    "LogLinearSchedule",
    "NoisyClassifier",
    "RenyiELBO",
    "ReverseKernel",
    "TableSchedule",
    "TraceMeanField_ELBO",
    "__version__",
    "bits_per_dim",
    "compare_estimators",
    "compare_models",
    "distributions",
    "elbo_terms",
    "errors",
    "estimate_elbo",
    "fit",
    "inference",
    "invert",
    "load",
    "load_classifier",
    "load_data",
    "log_likelihood",
    "nets",
    "rsample",
    "sample",
    "save",
    "schedules",
    "step_log_probs",
    "timesteps",
    "to_datatree",
    "trajectory",
]
