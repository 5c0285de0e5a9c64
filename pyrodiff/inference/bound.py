r"""The chain's bound as the prior of a site, inside the ELBO of a bigger model.

With x a latent of the user's program, the chain's states :math:`z = x_{1:T}` are latents too, and q(z | x) is their guide: the joint

.. math::

    \mathcal L = E_{q(x, \theta)} \Big[ \log p(y \mid x, \theta)\, p(\theta) - \log q(x, \theta)
        + \underbrace{E_{q(z \mid x)} \log \frac{p(x, z)}{q(z \mid x)}}_{\text{the bound on } \log p(x)} \Big]

is the ELBO of a pair of programs. :func:`bound` makes that pair from the user's two: wherever the model draws x from a
:class:`~pyrodiff.inference.DiffusionPrior`, x gets the measure dx as its law (log-probability 0: the guide supplies the value, and
its entropy is counted as that of any site), and the terms of the bound follow as further sites.

**One timestep**: t is drawn in the guide, and the bound's terms are estimated from one network call, by analytic KL: linear in the
bound, and of low variance whatever the ELBO class. **The whole chain**: T sites, whose log-ratio is the weight of a sampled chain.

============== ============================ ===================================== =====================================
sites of ``x`` guide                        model                                 exp(ELBO draw)
============== ============================ ===================================== =====================================
one timestep   ``x_step`` = t, ``x_t``      factors ``x_T`` (prior KL) and        only a bound's estimate: for SVI alone
                                            ``x_s`` (the term of t, times 1/p(t))
whole chain    ``x_1000``, ..., ``x_1``     the same, then ``x_0`` observed at x  unbiased for the evidence
============== ============================ ===================================== =====================================

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 5. https://arxiv.org/abs/2006.11239
    Auxiliary Deep Generative Models (Maaloe et al., 2016), eq. 2-4 (auxiliary variables in guide and model).
    https://arxiv.org/abs/1602.05473
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    constraints,
    kl_divergence,
    register_kl,
)
from torch.types import _size

from .. import timesteps
from .._tensor import check_event
from ..diffusion import register
from ..distributions import Gaussian
from ..errors import OptionError, ProgramError
from .prior import DiffusionPrior

__all__ = ["bound"]

Program = Callable[..., Any]


def bound(
    model: Program, guide: Program, priors: Mapping[str, DiffusionPrior], *, chain: bool = False
) -> tuple[Bounded, Bounded]:
    """The pair whose ELBO has the chain's bound in the place of log p(x).

    Any guide of the user's own latents will do: an autoguide made of the plain ``model``, an amortised one, a hand-written one. It
    knows nothing of the chain.

    Args:
        model: the program, with sites ``pyro.sample(name, prior)`` or ``pyro.sample(name, prior.given(...))``.
        guide: the user's guide, of the same sites.
        priors: site name to its prior, ``law="chain"``.
        chain: False: one timestep of each example of x, one network call. For ``SVI`` with ``Trace_ELBO``, ``TraceMeanField_ELBO``,
            ``TraceEnum_ELBO`` (labels enumerated in the guide); for anything that exponentiates (Renyi bounds, importance
            weights, labels summed out of the model) it is wrong, and refused where that can be seen. True: the whole chain, T
            network calls, for those.

    Returns:
        The model and the guide to give to ``SVI``, or to ``ELBO()(model, guide)`` and a torch optimiser; ``unbiased`` says of each
        which of the two it is. Plates, masks and scales around the site hold for the bound's sites too.

    Raises:
        OptionError: a prior with ``law="flow"``, whose ``log_prob`` needs no bound; a guide that is an effect handler.
        ProgramError: when run: a site of the model without an entry, of another law or diffusion, or observed; or a model run
            without its guide.
    """
    for name, prior in priors.items():
        if prior.law != "chain":
            raise OptionError(f"the prior of {name!r} has law={prior.law!r} and a density: give SVI the plain programs")
    if isinstance(poutine.unwrap(guide), Messenger):
        raise OptionError(f"guide is a {type(poutine.unwrap(guide)).__name__}, an effect handler and no program")
    return Bounded(model, BoundModel(priors, chain)), Bounded(guide, BoundGuide(priors, chain))


class FromGuide(ImproperUniform):
    """The measure dx: what the guide supplies, with log-probability 0."""

    prior: DiffusionPrior | None = None

    def expand(self, batch_shape: _size, _instance: Any = None) -> FromGuide:
        """The same with another batch shape."""
        new = FromGuide(self.support, torch.Size(batch_shape), self.event_shape)
        new.prior = self.prior
        return new

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Raises."""
        raise ProgramError(
            "this model is one of a pair from inference.bound, and was run without its guide: sample, and run MCMC on, the plain "
            'model (MCMC needs DiffusionPrior(..., law="flow"))'
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """0, ``[*batch]``."""
        return value.new_zeros(
            torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], self.batch_shape),
            dtype=value.dtype if value.is_floating_point() else torch.get_default_dtype(),
        )


# From the measure dx the divergence of q is minus its entropy. Where q has none in closed form, Pyro takes a draw's log-probability.
for _family in (Normal, Gaussian, Independent, MultivariateNormal, LowRankMultivariateNormal):
    register_kl(_family, FromGuide)(lambda q, p: -q.entropy())
register_kl(Delta, FromGuide)(lambda q, p: q.log_density + p.log_prob(q.v))  # a point that an autoguide drew elsewhere


class Bounded(nn.Module):
    """A program of the user's under one of the handlers below; a module, so that a torch optimiser finds its parameters.

    Attributes:
        unbiased: whether exp of the pair's ELBO, of one draw, has the evidence as its mean: only then may it enter importance
            weights. Otherwise it estimates a bound.
    """

    def __init__(self, program: Program, handler: Handler) -> None:
        super().__init__()
        self.program, self.handler, self.unbiased = program, handler, handler.chain
        self.learned = nn.ModuleList(p.diffusion for p in handler.priors.values() if not p.frozen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program."""
        with self.handler:
            return self.program(*args, **kwargs)


class Handler(Messenger):
    """What the two handlers share."""

    def __init__(self, priors: Mapping[str, DiffusionPrior], chain: bool) -> None:
        super().__init__()
        self.priors, self.chain = dict(priors), chain


class BoundGuide(Handler):
    """Adds q(z | x) after each site that has a diffusion as its prior."""

    def _pyro_post_sample(self, msg: Any) -> None:
        prior = self.priors.get(msg["name"])
        if prior is not None:
            check_event(f"site {msg['name']!r}", msg["value"], prior.event_shape)
            (chain_guide if self.chain else step_guide)(msg["name"], prior, msg["value"])


class BoundModel(Handler):
    """Puts the bound in the place of the prior's log-probability."""

    def _pyro_sample(self, msg: Any) -> None:
        name, prior = msg["name"], msg["fn"]
        if not isinstance(prior, DiffusionPrior) or prior.law != "chain":
            if name in self.priors:
                raise ProgramError(
                    f"site {name!r} has a {type(prior).__name__} as its law, and not its prior itself: plates and poutine.mask "
                    "around the site take the place of .to_event and .mask"
                )
            return
        if name not in self.priors:
            raise ProgramError(
                f"site {name!r} has a diffusion as its prior: bound needs it, beside {list(self.priors)}"
            )
        if prior.diffusion is not self.priors[name].diffusion:
            raise ProgramError(
                f"site {name!r} has another prior than bound was given: make it once, outside of the model, and condition by "
                "prior.given(...)"
            )
        msg["fn"] = FromGuide(prior.support, prior.batch_shape, prior.event_shape)
        msg["fn"].prior = prior

    def _pyro_post_sample(self, msg: Any) -> None:
        prior = getattr(msg["fn"], "prior", None)
        if not isinstance(prior, DiffusionPrior):
            return
        if msg["is_observed"]:
            raise ProgramError(
                f"site {msg['name']!r} is observed, and the bound no density to condition: train on data by diffusion.model "
                'and diffusion.guide; MCMC needs DiffusionPrior(..., law="flow") in the plain model'
            )
        register(prior.diffusion, prior.diffusion)
        (chain_model if self.chain else step_model)(msg["name"], prior, msg["value"])


def step_guide(name: str, prior: DiffusionPrior, x: Tensor) -> None:
    """Which term of the bound, and x_t: draws that are no latents of the posterior."""
    q, batch = prior.diffusion.forward_process, x.shape[: x.dim() - prior.event_dim]
    t = timesteps.low_discrepancy(max(1, batch.numel()), prior.diffusion.steps, device=x.device).reshape(batch)
    with poutine.mask(mask=False):
        pyro.sample(f"{name}_step", Delta(t))
        pyro.sample(f"{name}_t", q.marginal(x, t))


def step_model(name: str, prior: DiffusionPrior, x: Tensor) -> None:
    """The bound at x, estimated from one timestep."""
    q, p, schedule = prior.diffusion.forward_process, prior.diffusion.reverse_kernel, prior.diffusion.schedule
    batch = x.shape[: x.dim() - prior.event_dim]
    with poutine.mask(mask=False):
        t = pyro.sample(f"{name}_step", FromGuide(constraints.real, batch, torch.Size()))
        x_t = pyro.sample(f"{name}_t", FromGuide(prior.support, batch, prior.event_shape))
    pyro.factor(f"{name}_T", -kl_divergence(q.marginal(x, schedule.last), q.prior(x.shape, x)))
    law = p(x_t, t, **prior.cond)  # of x_0 where t is the first step, of x_s elsewhere
    term = law.log_prob(x)
    if schedule.steps > 1:
        kl = kl_divergence(q.posterior(x, x_t, q.with_x_s(t)), law)
        term = torch.where(t == schedule.first, term, -kl)
    with poutine.scale(scale=schedule.weight(t)):
        pyro.factor(f"{name}_s", term)


def chain_guide(name: str, prior: DiffusionPrior, x: Tensor) -> None:
    """Q(z | x), noisiest first."""
    q, steps = prior.diffusion.forward_process, prior.diffusion.schedule.length
    x_t = pyro.sample(f"{name}_{steps}", q.marginal(x, steps))
    for t in range(steps, 1, -1):
        x_t = pyro.sample(f"{name}_{t - 1}", q.posterior(x, x_t, t))


def chain_model(name: str, prior: DiffusionPrior, x: Tensor) -> None:
    """P(x, z), with x observed at the value that the guide drew."""
    q, p, steps = prior.diffusion.forward_process, prior.diffusion.reverse_kernel, prior.diffusion.schedule.length
    x_t = pyro.sample(f"{name}_{steps}", q.prior(x.shape, x))
    for t in range(steps, 1, -1):
        x_t = pyro.sample(f"{name}_{t - 1}", p(x_t, t, **prior.cond))
    pyro.sample(f"{name}_0", p(x_t, 1, **prior.cond), obs=x)
