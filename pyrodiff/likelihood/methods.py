"""One function for log p(x_0): ``pyrodiff.log_likelihood``."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._tensor import to_network
from ..diffusion import GaussianDiffusion
from ..elbo import elbo_terms
from ..errors import OptionError, check_option
from .dequantise import flow_bound
from .estimate import LogLikelihood, cautions, check
from .importance import importance_weighted
from .information import information

__all__ = ["METHODS", "log_likelihood", "lower_bound", "options_of"]


def log_likelihood(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    method: str = "elbo",
    *,
    repeats: int = 2,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **options: Any,
) -> LogLikelihood:
    """Estimate log p(x_0) of each example, or a bound on it: nats, bits per dim, standard errors, evaluations and time.

    ============ ======================================================= ==============================
    method       estimates                                               options
    ============ ======================================================= ==============================
    ``"elbo"``   the ELBO of the chain (:func:`lower_bound`)             ``timesteps``, ``kl``
    ``"iwae"``   its importance-weighted bound                           ``chains``, ``alpha``
                 (:mod:`~pyrodiff.likelihood.importance`)
    ``"ode"``    the density of the probability flow, another            ``dequantisation``,
                 model, or a bound on its probability of a bin           ``samples``, ``probes``,
                 (:mod:`~pyrodiff.likelihood.dequantise`)                ``solver``, ``solver_steps``,
                                                                         ``tolerance``
    ``"immse"``  the integral of the denoising error over log-SNR        ``points``, ``pilot``
                 (:mod:`~pyrodiff.likelihood.information`)
    ============ ======================================================= ==============================

    Args:
        diffusion: the model; its network runs in evaluation mode, without gradients.
        x0: data, ``[B, *event]``; moved to the network's device, should they be elsewhere.
        method: one of the above.
        repeats: independent repetitions R; from 2 on there is a standard error over noise.
        seed: of everything; the global generators end as they began.
        batch_size: rows of a network call.
        progress: show a progress bar after two seconds.
        options: those of the method, and what is passed to the network: a row per example, or a value without batch dim.

    Raises:
        OptionError: an option outside its set, or of another method.
        ShapeError, DataError: data that do not fit the model.

    Example:
        >>> print(pyrodiff.log_likelihood(diffusion, images, "iwae", chains=100))
    """
    check_option("method", method, METHODS)
    owners = {name: other for other in METHODS for name in options_of(other)}
    for name in options:
        if name in owners and name not in options_of(method):
            raise OptionError(
                f"{name}={options[name]!r} belongs to method={owners[name]!r}; the options of {method!r} are "
                f"{', '.join(options_of(method))}"
            )
    common = {"repeats": repeats, "seed": seed, "batch_size": batch_size, "progress": progress}
    x0, options = to_network(diffusion.net, x0, options)
    return METHODS[method](diffusion, x0, **common, **options)


def lower_bound(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    *,
    timesteps: int | None = None,
    kl: str = "analytic",
    repeats: int = 2,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> LogLikelihood:
    """The ELBO, as :func:`~pyrodiff.elbo_terms` has it.

    Args:
        diffusion, x0: see :func:`log_likelihood`.
        timesteps: drawn afresh for each example and repeat; None: all of them, along one chain.
        kl: ``"analytic"`` or ``"monte_carlo"``.
        repeats, seed, batch_size, progress: see :func:`log_likelihood`.
        cond: passed to the network, a row per example.

    Returns:
        The bound; in its diagnostics ``prior``, ``diffusion`` and ``reconstruction``, costs in nats, ``[R, B]``. The
        exponential of a draw is unbiased for p(x_0) with Monte Carlo KLs of all timesteps, where it is the weight of a chain.
    """
    check(diffusion, x0, repeats, seed, batch_size)
    started = time.perf_counter()
    options: Any = {"repeats": repeats, "batch_size": batch_size, "progress": progress, **cond}
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        terms = elbo_terms(diffusion, x0, timesteps, kl, **options)
    parts = terms.parts()
    return LogLikelihood(
        method="elbo",
        meaning="lower bound in expectation (ELBO)",
        unbiased=timesteps is None and kl == "monte_carlo",
        draws=-parts.pop("total"),
        dims=terms.dims,
        network_evaluations=terms.network_evaluations,
        seconds=time.perf_counter() - started,
        diagnostics=parts,
        warnings=cautions(diffusion),
    )


def flow(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    *,
    dequantisation: str = "decoder",
    samples: int = 1,
    probes: int | None = 1,
    solver: str = "rk4",
    solver_steps: int | None = None,
    tolerance: float | None = None,
    repeats: int = 2,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> LogLikelihood:
    """A bound on log p(x_0) of the probability flow and a decoder: :func:`~pyrodiff.likelihood.dequantise.flow_bound`.

    Args:
        diffusion, x0: see :func:`log_likelihood`.
        dequantisation, samples, solver, tolerance: see :func:`~pyrodiff.likelihood.dequantise.flow_bound`.
        probes: Hutchinson's vectors for each draw; None: the exact divergence, which importance weights (``samples`` above 1)
            need.
        solver_steps: steps of ``"heun"`` and ``"rk4"``.
        repeats, seed, batch_size, progress: see :func:`log_likelihood`.
        cond: passed to the network, a row per example.

    Returns:
        The bound; ``vector_jacobian_products`` of one example in its diagnostics. The exponential of a draw is unbiased for the flow's
        p(x_0) where the divergence is exact.
    """
    check(diffusion, x0, repeats, seed, batch_size)
    found = flow_bound(
        diffusion, x0, dequantisation, samples=samples, repeats=repeats, probes=probes, solver=solver, steps=solver_steps,
        tolerance=tolerance, seed=seed, batch_size=batch_size, progress=progress, **cond,
    )  # fmt: skip
    sharp = "" if samples == 1 else f", {samples} importance-weighted samples"
    return LogLikelihood(
        method="ode",
        meaning=f"lower bound in expectation of the probability flow, another model than the chain ({dequantisation}{sharp})",
        unbiased=probes is None,
        draws=found.log_prob.cpu(),
        dims=diffusion.event_shape.numel(),
        network_evaluations=found.network_evaluations,
        seconds=found.seconds,
        diagnostics={"vector_jacobian_products": torch.tensor(found.vector_jacobian_products, device="cpu")},
        warnings=cautions(diffusion) if dequantisation == "decoder" else (),
    )


METHODS: dict[str, Callable[..., LogLikelihood]] = {
    "elbo": lower_bound,
    "iwae": importance_weighted,
    "ode": flow,
    "immse": information,
}


def options_of(method: str) -> list[str]:
    """The keyword arguments that are the method's own."""
    common = inspect.signature(log_likelihood).parameters
    own = inspect.signature(METHODS[method]).parameters.values()
    return [p.name for p in own if p.kind is p.KEYWORD_ONLY and p.name not in common]
