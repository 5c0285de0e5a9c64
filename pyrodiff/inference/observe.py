"""Likelihoods written as Pyro programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..errors import ProgramError, ShapeError
from .proposals import Likelihood

__all__ = ["observation", "unobserved"]


def observation(program: Callable[..., Any], *args: Any, **kwargs: Any) -> Likelihood:
    """The log p(y | x_0) of a Pyro program, for each of N x_0 at once.

    The program is called with x_0 ``[N, *event]``; its sites are observed, and their batch dim -1 is that of x_0. What else a
    site has is its event (``.to_event``), or plates of the program's own at dims -2 and further left.

    Args:
        program: ``program(x0, *args, **kwargs)``.
        args, kwargs: passed on.

    Returns:
        A function of x_0, which raises

        * ProgramError: a site that is not observed (condition it, or see :func:`~pyrodiff.inference.gibbs.particle_gibbs`); a plate
          that draws a subsample: an estimate of log p(y | x_0) is no weight;
        * ShapeError: a site whose log-probability is not one number per x_0, as it would be without ``.to_event``.

    Example:
        >>> def photons(x0, counts):
        ...     pyro.sample("y", dist.Poisson(x0.exp()).to_event(3), obs=counts)
        >>> posterior = smc(diffusion, observation(photons, counts), 1000)
    """

    def log_likelihood(x0: Tensor) -> Tensor:
        trace = poutine.trace(program).get_trace(x0, *args, **kwargs)
        for name in unobserved(trace):
            raise ProgramError(f"site {name!r} is not observed: condition it, or infer it by particle_gibbs")
        trace.compute_log_prob()
        total = x0.new_zeros(len(x0))
        for name in trace.observation_nodes:
            total = total + _by_particle(name, trace.nodes[name], len(x0))
        return total

    return log_likelihood


def unobserved(trace: poutine.Trace) -> dict[str, Any]:
    """The sites of a program's trace that are drawn.

    Raises:
        ProgramError: a plate draws a subsample.
    """
    plates: dict[str, Any] = {name: node["fn"] for name, node in trace.nodes.items() if site_is_subsample(node)}
    for name, law in plates.items():
        if law.subsample_size is not None and law.subsample_size < law.size:
            raise ProgramError(
                f"plate {name!r} draws {law.subsample_size} of {law.size} rows at every call: the exponential of an estimate of "
                "log p(y | x_0) is not unbiased; take all rows, or fixed ones by subsample="
            )
    return {name: trace.nodes[name] for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])}


def _by_particle(name: str, site: Mapping[str, Any], count: int) -> Tensor:
    """A site's log-probability, summed over its plates, for each particle."""
    log_prob: Tensor = site["log_prob"]
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    extra = range(-log_prob.dim(), -1)
    undeclared = [d for d in extra if d not in plates and log_prob.shape[d] > 1]
    if log_prob.dim() and (undeclared or log_prob.shape[-1] != count):
        raise ShapeError(
            f"site {name!r} has log-probabilities of shape {list(log_prob.shape)} for {count} particles, not [{count}]: declare "
            "its event dims by to_event, or plates at dims -2 and further left"
        )
    return torch.broadcast_to(log_prob.flatten(0, -2).sum(0) if log_prob.dim() > 1 else log_prob, (count,))
