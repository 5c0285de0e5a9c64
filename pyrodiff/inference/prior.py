r"""A diffusion as the prior of a site: ``x = pyro.sample("x", DiffusionPrior(diffusion))``.

A diffusion is two models of one network (see :mod:`~pyrodiff.likelihood.flow`), and a prior is one of them:

* **the chain**, ``law="chain"``. It is drawn step by step, and its density is an integral over all of its states: there is a lower
  bound on it, and no number. ``log_prob`` raises. Variational inference takes the bound instead, by
  :func:`~pyrodiff.inference.bound`.
* **the probability flow**, ``law="flow"``. An invertible map from N(0, 1) with a density: ``log_prob`` is a deterministic function,
  which NUTS, importance weights and stock ``SVI`` may ask for. :class:`FlowReparam` puts the map itself into the model, and the
  density is then not needed.

``sample`` and ``log_prob`` are always of one law.

References:
    Score-Based Generative Modeling through SDEs (Song et al., 2021), section 4.3. https://arxiv.org/abs/2011.13456
    NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo (Hoffman et al., 2019), for sampling in the noise's space.
    https://arxiv.org/abs/1903.03704
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.types import _size

from .._tensor import batch_dims, check_event, like_of
from ..diffusion import GaussianDiffusion
from ..errors import OptionError, ProgramError, ShapeError, check_option
from ..likelihood.flow import RUNGE_KUTTA, decode, encode, log_density
from ..sample import rsample, sample

__all__ = ["DiffusionPrior", "FlowReparam"]

LAWS = ("chain", "flow")


class DiffusionPrior(TorchDistribution):
    r"""A diffusion as a distribution over R^event, for a site of a Pyro program.

    The law is of continuous data: a discretised decoder becomes the Normal behind it, as ``sample(..., last="sample")`` would
    draw before rounding. For ``law="flow"`` it is that of :math:`\bar x_1 = x_1 / \alpha_1`, which has the noise of t = 1 left.

    Draws are reparameterised, in the conditioning values and (``frozen=False``) in the parameters.

    Args:
        diffusion: the model; :meth:`~pyrodiff.GaussianDiffusion.respace` it for a chain of fewer steps.
        law: ``"chain"`` or ``"flow"``: see the module's text.
        frozen: the network is evaluated as it is (its parameters share memory with those of ``diffusion``, until that is moved or
            cast: do it before), in evaluation mode; nothing is registered with Pyro and no parameter gets a gradient. False:
            the parameters are the model's to learn: those of ``"chain"`` are registered by ``bound``, those of ``"flow"`` by
            ``pyro.module("prior", prior.diffusion)`` in the program, without which ``SVI`` does not know them. Training mode
            is that of ``prior.diffusion``.
        probes: of ``"flow"``. None: the exact divergence, D backward passes for a network call. R: Hutchinson's estimate by R
            vectors of signs, the same for every x, example and call: a deterministic function still, but one whose
            exponential does not integrate to 1.
        solver: of ``"flow"``: ``"rk4"`` (default) or ``"heun"``.
        steps: the solver's, of ``"flow"`` (default 64).

    Raises:
        OptionError: an option outside its set, or of another law.

    Example:
        >>> prior = DiffusionPrior(diffusion)
        >>> def model(y):
        ...     x = pyro.sample("x", prior)
        ...     noise = pyro.sample("noise", dist.HalfNormal(1.0))
        ...     pyro.sample("y", dist.Normal(A(x), noise).to_event(1), obs=y)
        >>> model_, guide_ = bound(model, AutoNormal(model), {"x": prior})
        >>> svi = SVI(model_, guide_, Adam({"lr": 0.01}), Trace_ELBO())
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        law: str = "chain",
        *,
        frozen: bool = True,
        probes: int | None = None,
        solver: str | None = None,
        steps: int | None = None,
    ) -> None:
        check_option("law", law, LAWS)
        if law == "chain" and (probes, solver, steps) != (None, None, None):
            raise OptionError(f'probes={probes!r}, solver={solver!r}, steps={steps!r} belong to law="flow"')
        self.law, self.frozen = law, frozen
        self.cond: dict[str, Any] = {}
        self.diffusion = _continuous(diffusion, frozen)
        self._probes: Tensor | None = None
        if law == "flow":
            check_option("solver", solver := solver or "rk4", RUNGE_KUTTA, ": adaptive steps depend on the batch")
            if probes is not None:
                if probes < 1:
                    raise OptionError(f"probes={probes!r} is not None (the exact divergence) or at least 1")
                signs = 2.0 * np.random.default_rng(0).integers(0, 2, (probes, *diffusion.event_shape)) - 1
                self._probes = torch.from_numpy(signs)
        self._solver: dict[str, Any] = {"solver": solver, "steps": steps}
        super().__init__(torch.Size(), diffusion.event_shape)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """R^event."""
        return constraints.independent(constraints.real, self.event_dim)

    def given(self, **cond: Any) -> DiffusionPrior:
        """p(x | cond): this prior with conditioning values for the network, such as a class label or another site's value.

        The batch shape is that of the values, broadcast: left of the event dims that the network declares for them.
        """
        device = like_of(self.diffusion.net).device
        tensors = self.cond | {name: torch.as_tensor(value, device=device) for name, value in cond.items()}
        batches = [tensors[name].shape[:n] for name, n in batch_dims(self.diffusion.net, tensors).items()]
        new = copy.copy(self)
        new.cond, new._batch_shape = tensors, torch.broadcast_shapes(self.batch_shape, *batches)
        return new

    def expand(self, batch_shape: _size, _instance: Any = None) -> DiffusionPrior:
        """This law with its batch shape expanded; the draws are independent."""
        batch_shape = torch.Size(batch_shape)
        pairs = zip(reversed(self.batch_shape), reversed(batch_shape), strict=False)
        if len(batch_shape) < len(self.batch_shape) or any(a not in (1, b) for a, b in pairs):
            raise ShapeError(f"batch shape {list(self.batch_shape)} cannot be expanded to {list(batch_shape)}")
        new = copy.copy(self)
        new._batch_shape = batch_shape
        return new

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """Draws, ``[*sample_shape, *batch, *event]``: down the whole chain (T network calls), or by the flow from N(0, 1)."""
        if self.law == "flow":
            return self.decode(self.noise.sample(sample_shape))
        shape = self._extended_shape(torch.Size(sample_shape))
        batch = shape[: len(shape) - self.event_dim]
        draw = rsample if self._learning() else sample
        return draw(self.diffusion, batch.numel(), last="sample", **self.rows(batch)).reshape(shape)

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """:meth:`rsample` without gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the flow, nats, ``[*batch]``; differentiable in the value, the conditioning and the parameters.

        The same number in any batch.

        Raises:
            ProgramError: ``law="chain"``.
        """
        if self.law == "chain":
            raise ProgramError(
                "the density of a chain is not known, and a bound on it must not pose as one: for SVI take "
                'inference.bound(model, guide, {site: prior}); for a density (NUTS, importance weights) DiffusionPrior(..., law="flow")'
            )
        if self._validate_args:
            self._validate_sample(value)
        x, batch = self._flat("value", value)
        probes = None
        if self._probes is not None:
            probes = self._probes[:, None].expand(-1, len(x), *self.event_shape)
        found = log_density(self.diffusion, x, probes=probes, **self._solver, **self.rows(batch))
        return found.log_prob.mean(0).to(x.dtype).reshape(batch)

    @property
    def noise(self) -> TorchDistribution:
        """N(0, 1), of this law's shapes."""
        like = like_of(self.diffusion.net)
        zero = torch.zeros(self.shape(), dtype=like.dtype, device=like.device)
        return Normal(zero, 1.0).to_event(self.event_dim)

    def decode(self, x_T: Tensor) -> Tensor:
        """The flow's map from noise to data, both ``[*batch, *event]``."""
        return self._map(decode, "x_T", x_T)

    def encode(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`decode`."""
        return self._map(encode, "x", x)

    def rows(self, batch: torch.Size) -> dict[str, Any]:
        """The conditioning values of the flattened examples of a batch shape, a row each, or without batch dim for all."""
        split = batch_dims(self.diffusion.net, self.cond)

        def flat(value: Tensor, n: int) -> Tensor:
            rest = value.shape[n:]
            return value.expand(batch + rest).reshape(-1, *rest) if n else value

        return {name: flat(value, split[name]) for name, value in self.cond.items()}

    def _map(self, function: Callable[..., Tensor], name: str, x: Tensor) -> Tensor:
        rows, batch = self._flat(name, x)
        return function(self.diffusion, rows, **self._solver, **self.rows(batch)).reshape(batch + self.event_shape)

    def _flat(self, name: str, x: Tensor) -> tuple[Tensor, torch.Size]:
        """``[*batch, *event]`` as ``[N, *event]``, and its batch shape, which is broadcast with this law's."""
        check_event(name, x, self.event_shape)
        batch = torch.broadcast_shapes(x.shape[: x.dim() - self.event_dim], self.batch_shape)
        rows = x.expand(batch + self.event_shape).reshape(-1, *self.event_shape)
        if self._learning() and not rows.requires_grad:
            rows = rows.detach().requires_grad_()  # the flow keeps a graph where its state asks for one
        return rows, batch

    def _learning(self) -> bool:
        """Whether something besides x wants a gradient."""
        tensors = (*self.cond.values(), *self.diffusion.parameters())
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class FlowReparam(Reparam):
    """The flow's noise as the latent variable: site ``"{name}_T"`` ~ N(0, 1), and x its image, exactly.

    ``poutine.reparam(model, {"x": FlowReparam()})`` has the posterior of ``DiffusionPrior(..., law="flow")``, without the divergence
    and its derivatives: a gradient costs one pass through the solver and back. What a sampler moves in is nearly a standard
    normal before it sees the data.
    """

    def apply(self, msg: Any) -> Any:
        """See Pyro's ``Reparam``."""
        name, value = msg["name"], msg["value"]
        prior, event_dim = self._unwrap(msg["fn"])
        if not isinstance(prior, DiffusionPrior) or prior.law != "flow":
            raise OptionError(f'site {name!r} is not a DiffusionPrior with law="flow", which alone is a map of noise')
        if msg["is_observed"]:
            raise ProgramError(f"site {name!r} is observed: its noise has no density of its own; leave it as it is")
        start = None if value is None else prior.encode(value)
        noise = prior.noise.to_event(event_dim - prior.event_dim)  # batch dims that the site has made event dims
        x_T = pyro.sample(f"{name}_T", noise, obs=start, infer={"is_observed": False})
        x = prior.decode(x_T) if value is None else value
        return {"fn": Delta(x, event_dim=event_dim).mask(False), "value": x, "is_observed": True}


def _continuous(diffusion: GaussianDiffusion, frozen: bool) -> GaussianDiffusion:
    """A copy around the same tensors whose decoder is Normal; frozen, it never gets a gradient, nor dropout."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) if frozen else p for p in diffusion.parameters()}
    twin = copy.deepcopy(diffusion, dict[int, Any](shared))
    kernel = twin.reverse_kernel
    kernel.bins = None
    if kernel.decoder == "openai_tanh":  # the scale's rule; its approximation was of bins
        kernel.decoder = "openai"
    return twin.eval() if frozen else twin
