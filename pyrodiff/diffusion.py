r"""A Gaussian diffusion as two Pyro programs.

::

    guide:  x_T ~ q(x_T | x_0)     x_{t-1} ~ q(x_{t-1} | x_t, x_0)   for t = T..2
    model:  x_T ~ N(0, 1)          x_{t-1} ~ p(x_{t-1} | x_t)        for t = T..2     x_0 ~ p(x_0 | x_1), observed

DDPM's variational bound is the ELBO of this pair: ``TraceMeanField_ELBO`` gives it with analytic KLs, ``Trace_ELBO`` with
Monte Carlo ones, and the unconditioned model is the sampler. The guide runs in the model's order, noisiest first; the
forward chain (:attr:`GaussianDiffusion.noising`) has the same joint law, but not the structure that an analytic KL needs.

With one timestep per example the same bound costs one network call: training on a random timestep is subsampling the plate
of timesteps, the scale being 1 / p(t).

In continuous time (a schedule with ``steps=math.inf``) these one-timestep programs are all there is, with the same sites: x_s is
the standardised infinitesimal step of :mod:`~pyrodiff.forward`, and t = 0 the reconstruction. :meth:`GaussianDiffusion.respace`
gives chains of T steps around the same parameters.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 5. https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), sections 4 and 5. https://arxiv.org/abs/2107.00630
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015).
    https://arxiv.org/abs/1503.03585
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ._tensor import append_dims, batch_dims, check_event, sum_event
from .errors import OptionError, ProgramError, ShapeError, check_option
from .forward import ForwardProcess
from .reverse import Bins, Prediction, ReverseKernel
from .schedules import Schedule

__all__ = ["OBJECTIVES", "GaussianDiffusion"]

# Weight of |x0 - x0_hat|^2 as a function of (SNR, weight that makes it the error of the network's own target).
OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "elbo": lambda snr, own: torch.zeros_like(snr),  # no error term: the sites themselves
    "simple": lambda snr, own: own,
    "min_snr": lambda snr, own: snr.clamp(max=5.0),
    "p2": lambda snr, own: snr / (1 + snr),
    "hybrid": lambda snr, own: own,
}
PARTICLES = "num_particles_vectorized"  # Pyro's name of the plate of vectorised particles
HYBRID_WEIGHT = 0.001 / math.log(2)  # Improved DDPM's lambda multiplies a bound in bits; sites are in nats


class GaussianDiffusion(nn.Module):
    r"""A Gaussian diffusion model: :attr:`model` and :attr:`guide`, two Pyro programs that share one network.

    Both programs have the signature ``(x0=None, t=None, *, weight=None, **cond)``:

    * ``x0``: data ``[*plates, B, *event]`` in model units. B is the plate ``"data"`` at dim -1; dims further left are
      plates of the caller's. Without x0 the model draws (one example per plate entry, or as many as ``cond`` has rows).
    * ``t``: None runs the whole chain, sites ``x_{T}``, ..., ``x_1``, ``x_0``. Integers 1..T, one per example, run one
      timestep of it: sites ``x_T``, ``x_t`` (drawn from the marginal, masked out in both programs), ``x_s`` (s = t - 1; masked
      to t > 1) and ``x_0`` (masked to t = 1), the last two scaled by ``weight``. In continuous time t is a float in [0, 1],
      and 0 stands for 1.
    * ``weight``: 1 / p(t) per example, ``[B]``; default: right for :mod:`~pyrodiff.timesteps`' uniform t (T).
    * ``cond``: passed to the network (class labels and the like).

    Args:
        net: see :class:`ReverseKernel`.
        schedule: the noise schedule.
        event_shape: shape of one example, channels first: ``(1, 28, 28)``.
        prediction, variance, decoder, bins, clip: see :class:`ReverseKernel`.
        objective: what one-timestep programs are trained on. ``"elbo"``; or, none of them a bound, ``"simple"`` (squared error
            of the network's own target, summed over dims and averaged over t), ``"min_snr"`` (the x_0 error weighted by
            min(SNR, 5)), ``"p2"`` (the eps error weighted by 1 / (1 + SNR)), ``"hybrid"`` (``"simple"`` plus 0.001 times the
            bound in bits, its mean detached: for learned variances, which the other three leave untrained, as they do a
            learned decoder). The whole chain is always the ELBO.
        data_size: number of examples N of the data set, for SVI's usual scaling N / B of a mini-batch; None: no scaling.
        name: prefix of the sites, so that one program can hold two diffusions.

    Raises:
        OptionError: an option outside its set.

    Example:
        >>> diffusion = GaussianDiffusion(pyrodiff.nets.MLP(2), pyrodiff.CosineSchedule(100), (2,))
        >>> svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        >>> loss = svi.step(torch.randn(8, 2), pyrodiff.timesteps.low_discrepancy(8, diffusion.steps))

    References:
        Improved DDPM (Nichol and Dhariwal, 2021), eq. 16 (hybrid). https://arxiv.org/abs/2102.09672
        Efficient Diffusion Training via Min-SNR Weighting (Hang et al., 2023). https://arxiv.org/abs/2303.09556
        Perception Prioritized Training (Choi et al., 2022). https://arxiv.org/abs/2204.00227
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        event_shape: Sequence[int],
        prediction: str = "eps",
        variance: str = "fixed_small",
        decoder: str = "vdm",
        bins: Bins | None = None,
        clip: bool = False,
        objective: str = "elbo",
        data_size: int | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        check_option("objective", objective, OBJECTIVES)
        if data_size is not None and data_size < 1:
            raise OptionError(f"data_size={data_size!r} is not a positive number of examples")
        self.event_shape = torch.Size(event_shape)
        event_dim = len(self.event_shape)
        of_schedule = schedule.log_snr(schedule.first).shape
        if len(of_schedule) > event_dim or any(
            a not in (1, b) for a, b in zip(of_schedule, self.event_shape, strict=False)
        ):
            raise ShapeError(
                f"the schedule has values of shape {list(of_schedule)}, which are the first dims of the event, "
                f"and the event is {list(self.event_shape)}"
            )
        self.reverse_kernel = ReverseKernel(net, schedule, prediction, variance, decoder, bins, event_dim, clip)
        self.objective, self.data_size, self.name = objective, data_size, name
        # Not children: their parameters are the kernel's, and a state dict should hold each once.
        self.__dict__.update(model=Model(self), guide=Guide(self), noising=Noising(self))

    model: Model
    guide: Guide
    noising: Noising

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would register a module beside the property of that name, and nothing would change.
        if name == "net":
            self.reverse_kernel.net = value
        elif name in ("schedule", "forward_process") or (name == "reverse_kernel" and name in self._modules):
            raise ProgramError(f"{name} cannot be exchanged: make a new GaussianDiffusion, or respace")
        else:
            super().__setattr__(name, value)

    def respace(self, spec: str | int | Sequence[int]) -> GaussianDiffusion:
        """The model of a shorter chain (see :meth:`~pyrodiff.schedules.Schedule.respace`), around the same parameters."""
        kernel = self.reverse_kernel
        shorter = GaussianDiffusion(
            kernel.net, self.schedule.respace(spec), self.event_shape, kernel.prediction, kernel.variance, kernel.decoder,
            kernel.bins, kernel.clip, self.objective, self.data_size, self.name,
        )  # fmt: skip
        if kernel.decoder == "learned":
            shorter.reverse_kernel.log_scale = kernel.log_scale
        return shorter

    @property
    def forward_process(self) -> ForwardProcess:
        """The forward process, q."""
        return self.reverse_kernel.forward_process

    @property
    def net(self) -> nn.Module:
        """The network."""
        return self.reverse_kernel.net

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.reverse_kernel.schedule

    @property
    def steps(self) -> int:
        """Number of steps T; ``math.inf`` in continuous time."""
        return self.schedule.steps

    @contextmanager
    def evaluating(self: nn.Module) -> Iterator[None]:
        """The network in evaluation mode (no dropout) for the length of a ``with`` block."""
        training = [module for module in self.modules() if module.training]
        try:
            self.eval()
            yield
        finally:
            for module in training:
                module.training = True

    @property
    def config(self) -> dict[str, object]:
        """Constructor arguments but for the network, as JSON-able values."""
        kernel = self.reverse_kernel
        return {
            "schedule": self.schedule.config,
            "event_shape": list(self.event_shape),
            "prediction": kernel.prediction,
            "variance": kernel.variance,
            "decoder": kernel.decoder,
            "bins": None if kernel.bins is None else list(kernel.bins),
            "clip": kernel.clip,
            "objective": self.objective,
            "data_size": self.data_size,
            "name": self.name,
        }


class Program(nn.Module):
    """What the programs share: the plate, the site names, the parameters, and the scale and mask of each site."""

    diffusion: GaussianDiffusion

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.__dict__["diffusion"] = diffusion  # not a child: it owns this module

    @property
    def _q(self) -> ForwardProcess:
        return self.diffusion.forward_process

    @property
    def _schedule(self) -> Schedule:
        return self.diffusion.schedule

    def _site(self, index: str | int) -> str:
        prefix = f"{self.diffusion.name}_" if self.diffusion.name else ""
        return f"{prefix}x_{index}"

    def _batch(self, x0: Tensor | None, cond: dict[str, Tensor]) -> int:
        """Number of examples, after a look at ``x0``."""
        diffusion = self.diffusion
        if x0 is None:
            batches = [cond[k].shape[:n] for k, n in batch_dims(diffusion.net, cond).items()]
            return torch.broadcast_shapes((1,), *batches)[-1]
        check_event("x0", x0, diffusion.event_shape)
        batch = x0.shape[: x0.dim() - len(diffusion.event_shape)]
        if not batch.numel() or not batch:
            raise ShapeError(
                f"x0 has shape {list(x0.shape)}, not [*plates, B, *{list(diffusion.event_shape)}] with B >= 1"
            )
        if is_validation_enabled() and x0.device.type != "meta" and not x0.isfinite().all():
            raise ShapeError("x0 holds NaN or infinite values")
        return batch[-1]

    def _plate(self, size: int) -> AbstractContextManager[Any]:
        """The plate of the examples: the caller's, where one stands at dim -1 already, or one of our own."""
        diffusion = self.diffusion
        for messenger in _PYRO_STACK:
            if isinstance(messenger, IndepMessenger) and messenger.dim == -1:
                if messenger.name == PARTICLES:
                    raise ProgramError(
                        f"plate {PARTICLES!r} stands at dim -1, the plate of the examples: max_plate_nesting is at least 1"
                    )
                rows = getattr(messenger, "subsample_size", messenger.size)
                if rows != size or diffusion.data_size is not None:
                    raise ProgramError(
                        f"plate {messenger.name!r} at dim -1 holds {rows} rows for {size} examples, or scales them beside "
                        f"data_size={diffusion.data_size}: it must be the plate of the examples, and data_size None"
                    )
                return nullcontext()
        if diffusion.data_size is not None and diffusion.data_size < size:
            raise ShapeError(f"data_size={diffusion.data_size} is less than the batch of {size}")
        name = f"{diffusion.name}_data" if diffusion.name else "data"
        # Indices as a range, or the plate would make a tensor of them, and permute the whole data set for it.
        indices: Any = range(size)
        return pyro.plate(name, diffusion.data_size or size, subsample=indices, dim=-1)

    def _one_step(
        self, x0: Tensor | None, t: Tensor, weight: Tensor | float | None
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """The arguments of a one-timestep program, checked."""
        if x0 is None:
            raise ProgramError(
                "a one-timestep program needs x0: without it x_t cannot be drawn; drop t to sample the chain"
            )
        if not isinstance(t, Tensor):
            raise ShapeError(f"t is a {type(t).__name__}, not an integer tensor of one step in 1..T per example")
        first, last = self._schedule.first, self._schedule.last
        if t.device.type == "cpu" and t.numel() and t.min() < first:
            raise ShapeError(f"t has values in {t.min():.6g}..{t.max():.6g}; timesteps are in {first}..{last}")
        if isinstance(weight, Tensor):
            if weight.dim() and weight.shape != t.shape:
                raise ShapeError(f"weight has shape {list(weight.shape)}, not that of t, {list(t.shape)}")
            weight = weight.to(x0.device)
        t = t.to(x0.device)
        return x0, t, self._schedule.weight(t) if weight is None else weight

    def _check_batch(self, t: Tensor, x_T: Tensor) -> None:
        batch = x_T.shape[: x_T.dim() - len(self.diffusion.event_shape)]
        if t.shape not in (batch, batch[-1:]):
            raise ShapeError(
                f"t has shape {list(t.shape)}, not one step per example {list(batch[-1:])} (or {list(batch)}); "
                "for t of shape [K, B] use K vectorised particles and max_plate_nesting=1"
            )

    @contextmanager
    def _bound_site(self, weight: Tensor | float, mask: Any) -> Iterator[None]:
        """Scale and mask of a site that only some examples have, the same in both programs."""
        objective = self.diffusion.objective
        with ExitStack() as stack:
            if objective == "hybrid":
                weight = weight * HYBRID_WEIGHT
            stack.enter_context(poutine.scale(scale=weight))
            stack.enter_context(poutine.mask(mask=mask if objective in ("elbo", "hybrid") else False))
            yield


_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_count = itertools.count()


def register(diffusion: GaussianDiffusion, module: nn.Module, prefix: str = "") -> None:
    """``pyro.module`` under a name of this instance's own, refusing what would train nothing.

    Pyro's store keeps the first tensor it saw under a name: a second object of that name, or new tensors in an old one,
    would never move. ``prefix`` says where in the diffusion the module sits. With ``module_local_params`` the parameters
    are the modules' alone, and there is nothing to do, unless ``SVI.step`` is looking for them.
    """
    traces = [messenger.trace for messenger in _PYRO_STACK if isinstance(messenger, TraceMessenger)]
    asked = any(isinstance(messenger, TraceMessenger) and messenger.param_only for messenger in _PYRO_STACK)
    if pyro.settings.get("module_local_params") and not asked:
        return
    if diffusion not in _names:
        _names[diffusion] = f"diffusion_{next(_count)}"
    # A message per tensor through the whole stack costs more than the rest of the program: those that Pyro's store holds
    # already are handed to the traces, where nothing else on the way could act on a parameter.
    direct = all(
        type(m) in (TraceMessenger, pyro.plate) or (type(m) is ReplayMessenger and m.params is None)
        for m in _PYRO_STACK
    )
    known = pyro.get_param_store()._params
    held: dict[str, Any] = {}
    for name, parameter in module.named_parameters(prefix=_names[diffusion] + "$$$" + prefix):
        if not parameter.requires_grad:
            continue
        if direct and known.get(name) is parameter:
            held[name] = {"type": "param", "name": name, "value": parameter}
        elif pyro.param(name, parameter)._cdata != parameter._cdata:
            remedy = (
                "after an exchange such as load_state_dict(assign=True), call pyro.clear_param_store(), make a new SVI"
            )
            if not parameter.is_contiguous():
                remedy = "it copies what is not contiguous (channels_last): train by ELBO()(model, guide) and a torch optimiser"
            raise ProgramError(
                f"Pyro's parameter store holds another tensor under {name}, and would train that one; {remedy}"
            )
    for trace in traces:  # as Trace.add_node, all at once
        trace.nodes.update(held)
        trace._pred.update({name: set() for name in held})
        trace._succ.update({name: set() for name in held})


def _conditioned(name: str) -> bool:
    """Whether a handler around the program puts a value in the place of a site."""
    return any(isinstance(m, ConditionMessenger) and name in m.data for m in _PYRO_STACK)


class Model(Program):
    """p: see :class:`GaussianDiffusion`. Call: ``model(x0=None, t=None, *, weight=None, **cond)``; returns x_0."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__(diffusion)
        self.reverse_kernel = diffusion.reverse_kernel

    def forward(
        self, x0: Tensor | None = None, t: Tensor | None = None, *, weight: Tensor | float | None = None, **cond: Tensor
    ) -> Tensor:
        """Runs the program: the whole chain without ``t``, one timestep of it with."""
        register(self.diffusion, self)
        if t is None and weight is not None:
            raise ProgramError("weight belongs to t: the whole chain has no random timestep to weigh")
        like = x0 if x0 is not None else next(self.diffusion.net.parameters(), None)
        size = self._batch(x0, cond)
        with self._plate(size):
            x_T = self._q.prior((size, *self.diffusion.event_shape), like)
            if t is None:
                return self._chain(x0, x_T, cond)
            return self._step(*self._one_step(x0, t, weight), x_T, cond)

    def _chain(self, x0: Tensor | None, x_T: dist.TorchDistribution, cond: dict[str, Tensor]) -> Tensor:
        p, steps = self.reverse_kernel, self._schedule.length
        x_t = pyro.sample(self._site(steps), x_T)
        for t in range(steps, 1, -1):
            x_t = pyro.sample(self._site(t - 1), p(x_t, t, **cond))
        law = p.decode(x_t, **cond)
        x_0 = pyro.sample(self._site(0), law, obs=x0)
        if x0 is not None and _conditioned(self._site(0)) and not torch.equal(x_0, x0):
            raise ProgramError(
                f"site {self._site(0)!r} is conditioned on another tensor than x0, and the guide would know x0 alone: pass the data "
                "to the program"
            )
        if x0 is None and x_0.shape != law.shape():
            raise ProgramError(
                f"site {self._site(0)!r} was given {list(x_0.shape)} for chains of {list(law.shape())}, which its rows would "
                "share: pass the data to the program, or wrap it in a plate"
            )
        return x_0

    def _step(
        self, x0: Tensor, t: Tensor, weight: Tensor | float, x_T: dist.TorchDistribution, cond: dict[str, Tensor]
    ) -> Tensor:
        p, objective, schedule = self.reverse_kernel, self.diffusion.objective, self._schedule
        self._check_batch(t, pyro.sample(self._site("T"), x_T if objective == "elbo" else x_T.mask(False)))
        x_t = pyro.sample(self._site("t"), x_T.mask(False))
        predicted = p.predict(x_t, t, **cond)
        if objective != "elbo":
            if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in schedule.parameters()):
                raise ProgramError(
                    f"objective={objective!r} is no bound: a learned schedule would make it small by leaving out noise; train "
                    'with objective="elbo", or freeze the schedule by requires_grad_(False)'
                )
            # The mean over t: each of T steps is 1/T of it, and t = 0 of continuous time nothing.
            share = weight * (t > 0) if schedule.continuous else weight / schedule.steps
            pyro.factor(self._site("objective"), -self._error(predicted, x0, t) * share)
        if objective == "hybrid":
            predicted = predicted._replace(
                x0_hat=predicted.x0_hat.detach(), mean=None if predicted.mean is None else predicted.mean.detach()
            )
        law_of_x_s, law_of_x_0 = p.laws(predicted, x_t, t)
        if law_of_x_s is not None:
            with self._bound_site(weight, t > schedule.first):
                pyro.sample(self._site("s"), law_of_x_s)
            self._learn_interior(x0, x_t, t, law_of_x_s, weight)
        with self._bound_site(weight, t == schedule.first):
            x_0 = pyro.sample(self._site(0), law_of_x_0, obs=x0)
        if x_0 is not x0:
            raise ProgramError(
                f"site {self._site(0)!r} of a one-timestep program is not its observation: x_t was drawn from x0, so that a "
                "draw would be a reconstruction posing as a sample; drop t to sample the chain or to condition it"
            )
        return x_0

    def _learn_interior(
        self, x0: Tensor, x_t: Tensor, t: Tensor, law_of_x_s: dist.TorchDistribution, weight: Tensor | float
    ) -> None:
        r"""For a learned interior, a site of value 0 whose gradient is that of minus :math:`E[L^2] / D`.

        L is what this draw of t adds to the diffusion term, so that its variance falls (VDM's appendix I.2); see
        :meth:`~pyrodiff.schedules.LearnedSchedule.log_density`. Divided by the number of dims D, it grows with them as the
        bound does.
        """
        log_density = self._schedule.log_density(t)
        if log_density is None or self.diffusion.objective != "elbo":
            return
        with torch.no_grad():
            loss = weight * (t > 0) * kl_divergence(self._q.posterior(x0, x_t, t), law_of_x_s)
        square = loss**2 / self.diffusion.event_shape.numel()
        pyro.factor(self._site("interior"), square * (log_density - log_density.detach()).to(square))

    def _error(self, predicted: Prediction, x0: Tensor, t: Tensor) -> Tensor:
        """The objective's weighted squared error, summed over the event: ``[B]``."""
        event_dim = len(self.diffusion.event_shape)
        schedule = self.diffusion.schedule
        log_snr = append_dims(schedule.log_snr(t), event_dim - schedule.event_dim)
        snr, alpha2, sigma2 = log_snr.exp(), log_snr.sigmoid(), (-log_snr).sigmoid()
        own = {
            "eps": snr,
            "x0": torch.ones_like(snr),
            "v": 1 / sigma2,
            "score": alpha2 / sigma2**2,
        }.get(self.reverse_kernel.prediction)
        if own is None:  # the mean of x_s: its error is a times that of x_0
            _, a, _, _, _ = self._q.posterior_terms(x0, t)
            own = a**2
        weight = OBJECTIVES[self.diffusion.objective](snr, own)
        return sum_event(weight.to(x0.dtype) * (x0 - predicted.x0_hat) ** 2, event_dim)


class Guide(Program):
    """q, noisiest first: see :class:`GaussianDiffusion`. Call: ``guide(x0, t=None, *, weight=None, **cond)``."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__(diffusion)
        self.forward_process = diffusion.forward_process

    def forward(
        self, x0: Tensor | None = None, t: Tensor | None = None, *, weight: Tensor | float | None = None, **cond: Tensor
    ) -> Tensor:
        """Runs the program: the whole chain without ``t``, one timestep of it with. Returns the last state drawn."""
        if x0 is None:
            raise ProgramError("the guide needs x0: it is the law of x_1, ..., x_T given the data")
        register(self.diffusion, self, prefix="reverse_kernel")
        with self._plate(self._batch(x0, cond)):
            if t is None:
                return self._chain(x0)
            return self._step(*self._one_step(x0, t, weight))

    def _chain(self, x0: Tensor) -> Tensor:
        q, steps = self.forward_process, self._schedule.length
        x_t = pyro.sample(self._site(steps), q.marginal(x0, steps))
        for t in range(steps, 1, -1):
            x_t = pyro.sample(self._site(t - 1), q.posterior(x0, x_t, t))
        return x_t

    def _step(self, x0: Tensor, t: Tensor, weight: Tensor | float) -> Tensor:
        q, schedule = self.forward_process, self._schedule
        x_T = q.marginal(x0, schedule.last)
        self._check_batch(
            t, pyro.sample(self._site("T"), x_T if self.diffusion.objective == "elbo" else x_T.mask(False))
        )
        x_t = pyro.sample(self._site("t"), q.marginal(x0, t).mask(False))
        if schedule.steps > 1:
            with self._bound_site(weight, t > schedule.first):  # rows at t = 1 are masked: any x_s will do
                pyro.sample(self._site("s"), q.posterior(x0, x_t, q.with_x_s(t)))
        return x_t


class Noising(Program):
    """q as the Markov chain that adds noise: ``noising(x0)``, sites ``x_1``, ..., ``x_T``; returns x_T.

    The same joint law as the guide's, factorised the other way. For teaching: ``Trace_ELBO`` takes it as a guide,
    ``TraceMeanField_ELBO`` is silently wrong with it (and pyrodiff's strict one refuses it).
    """

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__(diffusion)
        self.forward_process = diffusion.forward_process

    def forward(self, x0: Tensor, **cond: Tensor) -> Tensor:
        """Runs the program on ``x0`` of shape ``[*plates, B, *event]``."""
        register(self.diffusion, self, prefix="reverse_kernel")
        with self._plate(self._batch(x0, cond)):
            x_s = x0
            for t in range(1, self._schedule.length + 1):
                x_s = pyro.sample(self._site(t), self.forward_process.transition(x_s, t - 1, t))
        return x_s
