r"""What a program says of draws of its latents: log-likelihoods, replicated data, and how good the guide is that drew them.

Nothing is drawn from the prior: the draws are replayed in the model, so that a diffusion's chain is never walked for a value that
the guide supplies (which Pyro's ``Predictive`` does, twice, to look at shapes).

The weights :math:`w = p(x, \theta, z, y) / q(x, \theta, z)` of the draws, with z the chain's states where the prior is a chain, tell how
far the guide is from the posterior: their tail index k, and the effective number of draws, :math:`(\sum w)^2 / \sum w^2`. A guide
with a point mass, such as ``AutoDelta``, has none: its draws are all alike, and so would be ratios that are no weights.

References:
    Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018), section 2. https://arxiv.org/abs/1802.02538
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from ..elbo import RenyiELBO
from ..errors import OptionError, ProgramError, ShapeError
from .bound import Bounded
from .observe import unobserved

__all__ = ["GuideDraws", "Outlook", "Plated", "guide_draws", "joined", "known", "outlook"]

_OF_A_BOUND = (
    "the pair estimates a bound, which is no density to weight draws by: how far the guide is from the posterior is not known; ask "
    "the pair of bound(..., chain=True)"
)


class Plated(NamedTuple):
    """Values of a site for n draws.

    Attributes:
        values: ``[n, *plates, *event]``.
        plates: names of the dims after the first, from left to right; of a dim without a plate ``"{site}_dim_{i}"``.
    """

    values: Tensor
    plates: tuple[str, ...]


class Outlook(NamedTuple):
    """What a program says of n draws of its latents, by site.

    Attributes:
        latents: the draws, and what the program computes from them (``pyro.deterministic``, which must depend on the draws, or have
            ``event_dim`` told).
        log_likelihood: of each observed site, nats, ``[n, *plates]``.
        replicated: the observed sites drawn anew.
        observed: the data, of n = 1.
    """

    latents: dict[str, Plated]
    log_likelihood: dict[str, Plated]
    replicated: dict[str, Plated]
    observed: dict[str, Plated]


@dataclass(frozen=True)
class GuideDraws:
    """Draws of a guide, and what model and guide say of them.

    Attributes:
        outlook: of the plain model.
        log_weights: ``[S]``, nats, float64, or None.
        no_weights: why there are none; empty where there are.
    """

    outlook: Outlook = field(repr=False)
    log_weights: Tensor | None = field(repr=False)
    no_weights: str = ""


@torch.no_grad()
def guide_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    draws: int = 1000,
    batch_size: int = 1,
) -> GuideDraws:
    """Draws of the guide's latents, with their weights where the pair has any.

    Args:
        model, guide: what ``SVI`` was given: the pair of :func:`~pyrodiff.inference.bound`, or plain programs whose densities are
            known. Of ``bound(..., chain=True)`` a draw's weight is of the chain's states too, T network calls.
        args, kwargs: of both programs.
        draws: S.
        batch_size: draws per run of the programs. More than 1 take a plate outside of the programs' own, as
            ``vectorize_particles=True`` does, and the programs must allow it.

    Raises:
        OptionError: a number below 1.
        ProgramError: a plate that subsamples; a latent that the guide lacks; a scaled or masked site in a pair with weights.
        ShapeError: programs that do not allow another plate, where that can be seen.
    """
    if draws < 1 or batch_size < 1:
        raise OptionError(f"draws={draws!r} or batch_size={batch_size!r} is not at least 1")
    kwargs = kwargs or {}
    unbiased = all(getattr(program, "unbiased", True) for program in (model, guide))
    plain = model.program if isinstance(model, Bounded) else model
    elbo = RenyiELBO if unbiased else Trace_ELBO  # the first refuses scaled and masked sites
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    seen = poutine.trace(poutine.replay(plain, trace)).get_trace(*args, **kwargs)
    stacks = [
        one.nodes[name]["cond_indep_stack"] for one in (trace, seen) for name in one.nodes if "fn" in one.nodes[name]
    ]
    nesting = max((-(frame.dim or 0) for stack in stacks for frame in stack), default=0)
    found, weights = [], []
    for done in range(0, draws, batch_size):
        n = min(batch_size, draws - done)
        some = elbo(num_particles=n, vectorize_particles=True, max_plate_nesting=nesting)
        model_trace, guide_trace = some._get_vectorized_trace(model, guide, args, kwargs)
        weights.append(_log_prob(model_trace, n, nesting) - _log_prob(guide_trace, n, nesting))
        run = partial(some._vectorized_num_particles(plain), *args, **kwargs)
        found.append(outlook(run, guide_trace, n, -nesting - 1))
    told = joined(found)
    why = "" if unbiased else _OF_A_BOUND
    if points := _points(trace, told, draws):
        why = f"the guide puts all of its mass on one value of {', '.join(points)}: a point has no density to weight it by"
    return GuideDraws(told, None if why else torch.cat(weights), why)


def outlook(program: Callable[[], Any], latents: Trace, n: int, dim: int) -> Outlook:
    """What the program says of n draws of its latents; it is run twice, its observed sites drawn the second time.

    Args:
        program: to be called without arguments.
        latents: a trace with the draws at its sites (see :func:`known`).
        n: number of draws.
        dim: the batch dim along which they lie, negative, counted from the event dims.

    Raises:
        ProgramError: a plate that subsamples; a latent that is not in the trace.
    """
    seen = poutine.trace(poutine.replay(program, latents)).get_trace()
    drawn = poutine.trace(poutine.replay(Anew()(program), latents)).get_trace()
    seen.compute_log_prob(lambda name, site: name in seen.observation_nodes)
    found = Outlook({}, {}, {}, {})
    for name, latent in unobserved(seen).items():
        if name not in latents:
            raise ProgramError(f"site {name!r} of the model is latent, and was not inferred")
        found.latents[name] = _plated(name, latent, latent["value"], n, dim)
    for name in seen.observation_nodes:
        site: Any = seen.nodes[name]
        if not _is_data(site["fn"]):  # computed from the latents; a factor has no value
            if site["value"].numel():
                found.latents[name] = _computed(name, site, n, dim)
            continue
        again: Any = drawn.nodes[name]
        log_prob = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])  # a scale is the ELBO's
        found.log_likelihood[name] = _plated(name, site, log_prob, n, dim, event_dim=0)
        found.replicated[name] = _plated(name, again, again["value"], n, dim)
        data = _plated(name, site, site["value"], n, dim)
        found.observed[name] = data._replace(values=data.values[:1])
    return found


def _points(guide: Trace, found: Outlook, draws: int) -> list[str]:
    """Sites that the guide gives one value in all draws; one draw does not tell."""
    values = {name: found.latents[name].values for name in guide.stochastic_nodes if name in found.latents}
    return [
        name
        for name, value in values.items()
        if draws > 1 and not _is_data(guide.nodes[name]["fn"]) and bool((value == value[:1]).all())
    ]


class Anew(UnconditionMessenger):
    """Draws data instead of observing them; what is computed stays, for in a plate Pyro would give it more dims than it has."""

    def _pyro_sample(self, msg: Any) -> None:
        if _is_data(msg["fn"]):
            super()._pyro_sample(msg)


def _is_data(law: Any) -> bool:
    """Whether a site's law is that of data, and neither a computed value nor a factor."""
    while hasattr(law, "base_dist"):
        law = law.base_dist
    return not isinstance(law, Delta | Unit)


def known(values: Mapping[str, Tensor]) -> Trace:
    """A trace of latents with these values."""
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return trace


def joined(parts: Sequence[Outlook]) -> Outlook:
    """The draws of one after those of another; the data are the first's."""

    def join(found: Sequence[dict[str, Plated]]) -> dict[str, Plated]:
        return {
            name: Plated(torch.cat([one[name].values for one in found]), first.plates)
            for name, first in found[0].items()
        }

    latents, log_likelihood, replicated, observed = zip(*parts, strict=True)
    return Outlook(join(latents), join(log_likelihood), join(replicated), observed[0])


def _plated(name: str, site: Mapping[str, Any], x: Tensor, n: int, dim: int, event_dim: int | None = None) -> Plated:
    """A site's tensor with its draws first; batch dims of size 1 that belong to no plate are dropped."""
    plates = {}
    for frame in site["cond_indep_stack"]:
        if frame.full_size != frame.size:
            raise ProgramError(
                f"plate {frame.name!r} takes {frame.size} of {frame.full_size}: draws for another part each cannot stand side by "
                "side; run the programs on all of the data"
            )
        if frame.vectorized:
            plates[frame.dim] = frame.name
    if event_dim is None:
        event_dim = site["fn"].event_dim
    event = x.shape[x.dim() - event_dim :]
    batch = torch.broadcast_shapes(
        x.shape[: x.dim() - event_dim], site["fn"].batch_shape, torch.Size([n, *(1,) * (-dim - 1)])
    )
    rows = x.expand(batch + event).movedim(len(batch) + dim, 0)
    kept = [d for d in range(-len(batch), 0) if d != dim and (d in plates or batch[d] > 1)]
    names = tuple(plates.get(d, f"{name}_dim_{i}") for i, d in enumerate(kept))
    return Plated(rows.reshape(n, *(batch[d] for d in kept), *event), names)


def _computed(name: str, site: Mapping[str, Any], n: int, dim: int) -> Plated:
    """The same of a site computed from the latents; ``pyro.deterministic`` without ``event_dim`` takes all dims for the event's."""
    x = site["value"]
    if not site["infer"].get("_deterministic") or site["fn"].event_dim < x.dim():
        return _plated(name, site, x, n, dim)
    if n > 1 and (not x.dim() or len(x) != n):
        x = x.expand(n, *x.shape)
    sizes = [size for size in x.shape[n > 1 :] if size > 1]
    return Plated(x.reshape(n, *sizes), tuple(f"{name}_dim_{i}" for i in range(len(sizes))))


def _log_prob(trace: Trace, n: int, nesting: int) -> Tensor:
    """Of all sites, for each of n draws; float64."""
    total = torch.zeros(n, dtype=torch.float64, device="cpu")
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        log_prob: Any = site["log_prob"]
        if n > 1 and log_prob.dim() > nesting + 1:
            raise ShapeError(
                f"site {name!r} has log-probabilities of shape {list(log_prob.shape)} for {n} draws and {nesting} plates: the programs "
                "do not allow a plate outside of their own; take batch_size=1"
            )
        total = total + log_prob.detach().double().cpu().reshape(n, -1).sum(1)
    return total
