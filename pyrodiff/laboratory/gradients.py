r"""Gradient estimators of the bound, side by side: bias and variance, per group of parameters and per timestep.

With :math:`z = (x_T, \dots, x_1)`, the guide :math:`q_\varphi(z \mid x_0)` and the model :math:`p_\theta(x_0, z)`, minus the ELBO is
:math:`E_q[\log q_\varphi(z \mid x_0) - \log p_\theta(x_0, z)]`. Below, :math:`z(\varphi)` is a draw as a function of the parameters at
fixed noise, and :math:`\bar\varphi` are parameters through which no gradient flows.

* **pathwise**: :math:`\nabla [\log q_\varphi(z(\varphi)) - \log p_\theta(x_0, z(\varphi))]`, what ``.rsample()`` gives;
  or with each site's log-ratio replaced by its analytic KL.
* **score function** (Schulman et al., 2015, theorem 1): :math:`z` by ``.sample()``, and
  :math:`\nabla \log q_\varphi(z) \cdot [\log q - \log p] - \nabla \log p_\theta(x_0, z)`. ``TraceGraph_ELBO`` multiplies the score of a
  site by the costs downstream of it alone, less a baseline if there is one. (What is downstream it sees by a tensor subclass
  that loses the gradient, silently, in any ``torch.autograd.Function`` of a network.)
* **sticking the landing** (Roeder et al., 2017): the pathwise derivative without the score
  :math:`\nabla_\varphi \log q_\varphi(z)` at fixed z, whose mean is 0:
  :math:`\nabla [\log q_{\bar\varphi}(z(\varphi)) - \log p_\theta(x_0, z(\varphi))]`. If q is the model's posterior and p knows nothing
  of :math:`\varphi`, its variance is 0.
* **doubly reparameterised** (Tucker et al., 2019), for the bound :math:`E \log \frac1K \sum_k w_k`,
  :math:`w_k = p_\theta(x_0, z_k) / q_\varphi(z_k \mid x_0)`. With :math:`\tilde w_k = w_k / \sum_j w_j` its pathwise gradient is
  :math:`\sum_k \tilde w_k (\partial_\theta \log p - \partial_\varphi \log q + \partial_z \log w_k \nabla z_k)`. The score
  :math:`\partial_\varphi \log q` now has the weight :math:`\tilde w_k` and no longer a mean of 0, but, reparameterised again,

  .. math::

      E[\tilde w_k \, \partial_\varphi \log q(z_k)] = E[\partial_z \tilde w_k \nabla z_k]
      = E[\tilde w_k (1 - \tilde w_k) \, \partial_z \log w_k \nabla z_k],

  which leaves :math:`\sum_k \tilde w_k \, \partial_\theta \log p + \tilde w_k^2 \, \partial_z \log w_k \nabla z_k`.

**Shared parameters.** A learned schedule and :math:`x_0` are parameters of both programs. Neither derivation minds: the explicit
dependence of p is the term :math:`\partial_\theta \log p` at fixed z, of :math:`\varphi` too, and only that of q is left out. What is lost
is the promise: where the explicit parts of q and p cancel, as they do for x_0 when p's posterior is q, the plain pathwise
gradient is the one without variance, and leaving out one of the two parts lets the other's noise stand.

**A fixed schedule.** The guide then has no parameters, z depends on none, and ``.sample()`` and ``.rsample()`` give the network the
same gradient, to the last bit; sticking and double reparameterisation change nothing. Notes that say a diffusion model is
trained by virtue of the reparameterisation trick are mistaken: it matters upstream of a draw, for a learned schedule, for an
x_0 that an encoder makes, and for gradients through samples of the reverse chain.

References:
    Gradient Estimation Using Stochastic Computation Graphs (Schulman et al., 2015). https://arxiv.org/abs/1506.05254
    Sticking the Landing (Roeder et al., 2017). https://arxiv.org/abs/1703.09194
    Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2019).
    https://arxiv.org/abs/1810.04152
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._tensor import check_event, seeded, take_rows, to_network
from ..diffusion import GaussianDiffusion
from ..elbo import TraceMeanField_ELBO
from ..errors import OptionError, ProgramError, ShapeError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Estimator", "Question", "compare_gradients", "gradient", "parameter_groups", "questions"]

LONGEST_CHAIN = 64
WARM_UP = 20  # draws for a decaying average of weight 0.9: what it started from is 12 % of it
DIRECTIONS = 4  # along which a bias is looked for

Program = Callable[[Tensor], Any]
Surrogate = Callable[[Tensor], Tensor]
Reward = Callable[[Tensor], Tensor]
Groups = dict[str, Sequence[Tensor]]
Exact = Callable[[str, int | None, str], Tensor | None]


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator: the gradient of what ``surrogate`` returns is one draw.

    Attributes:
        name: what the table calls it.
        surrogate: from x_0 ``[B, *event]`` to a scalar, the sum over the examples; None where it does not apply.
        evaluations: of the network per example and draw.
        loses: the groups whose gradient it is known to get wrong.
        warm_up: draws to be thrown away first.
        reason: why it does not apply.
    """

    name: str
    surrogate: Surrogate | None = None
    evaluations: int = 1
    loses: frozenset[str] = frozenset()
    warm_up: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Question:
    """What some estimators all estimate. The first that applies is the reference of the others.

    Attributes:
        where: ``"one timestep"``, ``"chain"``, ``"chain, K=4"`` (the importance-weighted bound) or ``"reverse samples"``.
        t: the timestep, if there is one.
        groups: the groups of parameters concerned.
        estimators: the candidates.
    """

    where: str
    t: int | None
    groups: tuple[str, ...]
    estimators: list[Estimator]


# ---------------------------------------------------------------------- Pyro handlers


class _Scored(dist.MaskedDistribution):
    """A law drawn from by ``.sample()``. The score is that of the law, whether or not its log-probability is masked."""

    has_rsample = False

    def score_parts(self, value: Tensor) -> ScoreParts:
        return ScoreParts(self.log_prob(value), self.base_dist.log_prob(value), 0)  # type: ignore[arg-type]


class _ScoreFunction(Messenger):
    """Latent sites are drawn by ``.sample()``, for Pyro's ELBOs to take their score.

    A one-timestep program masks its x_t, whose log-probability is no part of the bound. Its score is part of the gradient
    all the same, since x_s and x_0 depend on x_t: ``masked`` leaves it out, as ``has_rsample_(False)`` alone would.
    """

    def __init__(self, masked: bool = False, baseline: bool = False) -> None:
        super().__init__()
        self.masked, self.baseline = masked, baseline

    def _pyro_sample(self, msg: Any) -> None:
        law = msg["fn"]
        if msg["is_observed"] or not getattr(law, "has_rsample", False):
            return
        unmask = isinstance(law, dist.MaskedDistribution) and not self.masked
        msg["fn"] = _Scored(law.base_dist, False) if unmask else _Scored(law, True)
        if self.baseline:
            msg["infer"]["baseline"] = {"use_decaying_avg_baseline": True}


def _latents(trace: poutine.Trace) -> dict[str, Tensor]:
    """What a trace drew, in order, but for the rows that a plate picked."""
    drawn: dict[str, Any] = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    return {name: value for name, value in drawn.items() if isinstance(value, Tensor)}


def _values(program: Program, x0: Tensor) -> dict[str, Tensor]:
    return _latents(poutine.trace(program).get_trace(x0))


def _log_prob(program: Program, x0: Tensor, values: dict[str, Tensor]) -> Tensor:
    """Log-probability of all sites at these values, ``[B]``."""
    trace = poutine.trace(poutine.condition(program, data=values)).get_trace(x0)
    return _rows(trace)


def _rows(trace: poutine.Trace) -> Tensor:
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")  # type: ignore[return-value]


# ---------------------------------------------------------------------- the estimators


@dataclass(frozen=True)
class _Bound:
    """The two programs as functions of x_0, and again with parameters through which no gradient flows."""

    model: Program
    guide: Program
    stopped_model: Program
    stopped_guide: Program

    def pyros(self, elbo: Any, guide: Program) -> Surrogate:
        """The surrogate of one of Pyro's ELBOs."""
        if elbo is TraceGraph_ELBO:  # which shows it to no one but its own backward pass
            return lambda x0: elbo()._loss_and_surrogate_loss(self.model, guide, (x0,), {})[1]
        return lambda x0: elbo().differentiable_loss(self.model, guide, x0)

    def sticking_the_landing(self, x0: Tensor) -> Tensor:
        z = _values(self.guide, x0)
        return (_log_prob(self.stopped_guide, x0.detach(), z) - _log_prob(self.model, x0, z)).sum()

    def importance_weighted(self, x0: Tensor, k: int) -> Tensor:
        x0 = x0.repeat(k, *(1,) * (x0.dim() - 1))
        z = _values(self.guide, x0)
        log_w = _log_prob(self.model, x0, z) - _log_prob(self.guide, x0, z)
        return -(log_w.unflatten(0, (k, -1)).logsumexp(0) - math.log(k)).sum()

    def doubly_reparameterised(self, x0: Tensor, k: int) -> Tensor:
        x0 = x0.repeat(k, *(1,) * (x0.dim() - 1))
        z = _values(self.guide, x0)
        at_z = {name: value.detach() for name, value in z.items()}
        log_w = _log_prob(self.stopped_model, x0.detach(), z) - _log_prob(self.stopped_guide, x0.detach(), z)
        weight = log_w.detach().unflatten(0, (k, -1)).softmax(0).flatten()
        return -(weight * _log_prob(self.model, x0, at_z) + weight.square() * log_w).sum()

    def estimators(self, evaluations: int) -> list[Estimator]:
        """Those of the ELBO."""
        make = partial(Estimator, evaluations=evaluations)
        plain, baselines = _ScoreFunction()(self.guide), _ScoreFunction(baseline=True)(self.guide)
        return [
            make("pathwise, Monte Carlo KL", self.pyros(Trace_ELBO, self.guide)),
            make("pathwise, analytic KL", self.pyros(TraceMeanField_ELBO, self.guide)),
            make("score function", self.pyros(Trace_ELBO, plain)),
            make("score function, TraceGraph", self.pyros(TraceGraph_ELBO, plain)),
            make("score function, TraceGraph, baselines", self.pyros(TraceGraph_ELBO, baselines), warm_up=WARM_UP),
            make("sticking the landing", self.sticking_the_landing),
            Estimator(
                "sticking the landing, analytic KL",
                reason="nothing to stick to: an analytic KL evaluates log q at no draw, so that there is no score to leave out",
            ),
        ]


def _of_rewards(model: Program, reward: Reward, evaluations: int, discrete: bool) -> list[Estimator]:
    """Estimators of the gradient of E[reward(x_0)], x_0 from the reverse chain."""
    program = poutine.uncondition(model)

    def rewards(x_0: Tensor) -> Tensor:
        found = reward(x_0)
        if found.shape != x_0.shape[:1]:
            raise ShapeError(f"reward returns shape {list(found.shape)}, not one number per example {[len(x_0)]}")
        return found

    def pathwise(x0: Tensor) -> Tensor:
        return rewards([*_values(program, x0).values()][-1]).sum()

    def score_function(x0: Tensor, leave_one_out: bool) -> Tensor:
        trace = poutine.trace(_ScoreFunction()(program)).get_trace(x0)
        gain = rewards([*_latents(trace).values()][-1]).detach()
        if leave_one_out:
            gain = gain - (gain.sum() - gain) / (len(gain) - 1)
        return (gain * _rows(trace)).sum()

    make = partial(Estimator, evaluations=evaluations)
    no_path = "x_0 is drawn from a grid: the draw has no derivative"
    return [
        Estimator("pathwise", reason=no_path) if discrete else make("pathwise", pathwise),
        make("score function", partial(score_function, leave_one_out=False)),
        make("score function, leave-one-out baseline", partial(score_function, leave_one_out=True)),
    ]


def questions(
    diffusion: GaussianDiffusion,
    groups: Groups,
    batch: int,
    *,
    timesteps: Sequence[int] | None = None,
    chain: bool | None = None,
    reward: Reward | None = None,
    iwae: Sequence[int] = (4,),
    **cond: Tensor,
) -> list[Question]:
    """What :func:`compare_gradients` asks, and the estimators that answer; arguments as there, ``batch`` being B."""
    # The same parameters in programs that are the bound whatever the objective, in nats per example whatever data_size.
    steps = diffusion.schedule.length
    twin = diffusion.respace(range(1, steps + 1))
    twin.objective, twin.data_size = "elbo", None
    stopped = copy.deepcopy(twin).requires_grad_(False)
    prefix = f"{twin.name}_" if twin.name else ""

    def bound(hide: Sequence[str], t: int | None = None, copies: int = 1) -> _Bound:
        def runs(program: nn.Module) -> Program:
            def run(x0: Tensor) -> Any:
                part = take_rows(twin.net, cond, torch.arange(copies * batch, device=x0.device) % batch, batch)
                one_step = {} if t is None else {"t": torch.full((len(x0),), t, device=x0.device), "weight": 1.0}
                return program(x0, **one_step, **part)

            return poutine.block(run, hide=[prefix + site for site in hide])

        return _Bound(*(runs(program) for of in (twin, stopped) for program in (of.model, of.guide)))

    found = []
    upstream = frozenset(groups) - {"net"}
    if timesteps is None:
        timesteps = torch.linspace(1, steps, 6, device="cpu").round().long().unique().tolist()
    for t in timesteps:
        # L_{t-1} alone: neither L_T nor, at t = 1, the masked x_s, whose score would be noise.
        one_step = bound(["x_T", "x_s"] if t == 1 else ["x_T"], t)
        masked = one_step.pyros(Trace_ELBO, _ScoreFunction(masked=True)(one_step.guide))
        estimators = [
            *one_step.estimators(1),
            Estimator("score function, x_t masked", masked, loses=upstream),
            Estimator(
                "doubly reparameterised",
                reason="one timestep has no importance weight: its x_t is masked out of both programs",
            ),
        ]
        found.append(Question("one timestep", t, tuple(groups), estimators))

    found.append(Question("chain", None, tuple(groups), bound([]).estimators(steps)))
    for k in iwae:
        copies = bound([], copies=k)
        pathwise, doubly = (partial(f, k=k) for f in (copies.importance_weighted, copies.doubly_reparameterised))
        weighted = [
            Estimator("pathwise", pathwise, k * steps),
            Estimator("doubly reparameterised", doubly, 2 * k * steps),
        ]
        found.append(Question(f"chain, K={k}", None, tuple(groups), weighted))
    discrete = twin.reverse_kernel.bins is not None
    rewarded = _of_rewards(bound([]).model, reward, steps, discrete)  # type: ignore[arg-type]
    found.append(Question("reverse samples", None, tuple(g for g in groups if g in ("net", "schedule")), rewarded))

    def why_not(question: Question, estimator: Estimator) -> str:
        if question.where == "reverse samples" and reward is None:
            return "no reward was given"
        if question.t is None and not (steps <= LONGEST_CHAIN if chain is None else chain):
            return f"chain={chain}: chains of T={steps} steps are run if T <= {LONGEST_CHAIN}, or with chain=True"
        if "leave-one-out" in estimator.name and batch < 2:
            return "a single example leaves no other out"
        return estimator.reason

    def judged(question: Question, estimator: Estimator) -> Estimator:
        why = why_not(question, estimator)
        return replace(estimator, surrogate=None, reason=why) if why else estimator

    return [replace(q, estimators=[judged(q, e) for e in q.estimators]) for q in found]


def parameter_groups(diffusion: GaussianDiffusion, x0: Tensor | nn.Module) -> tuple[Groups, Callable[[], Tensor]]:
    """The groups of parameters that have any, and a function that makes x_0; see :func:`compare_gradients`."""
    schedule = [p for p in diffusion.schedule.parameters() if p.requires_grad]
    rest = [p for p in diffusion.parameters() if p.requires_grad and all(p is not s for s in schedule)]
    groups: Groups = {"net": rest, "schedule": schedule}
    if isinstance(x0, nn.Module):
        return _filled(groups | {"encoder": [p for p in x0.parameters() if p.requires_grad]}), x0
    data = x0.detach().requires_grad_(x0.requires_grad)
    return _filled(groups | {"x0": [data] if data.requires_grad else []}), lambda: data


def _filled(groups: Groups) -> Groups:
    return {name: tensors for name, tensors in groups.items() if tensors}


def gradient(estimator: Estimator, source: Callable[[], Tensor], groups: Groups) -> dict[str, Tensor]:
    """One draw: per group the flat gradient, float64 ``[P]`` on the CPU, of the mean over the examples.

    The parameters' ``.grad`` is left alone.
    """
    if estimator.surrogate is None:
        raise OptionError(f"estimator {estimator.name!r} does not apply: {estimator.reason}")
    if torch.is_inference_mode_enabled():
        raise ProgramError("gradients cannot be had in torch.inference_mode(): leave it")
    with pyro.settings.context(module_local_params=True), torch.enable_grad():
        x0 = source()
        loss = estimator.surrogate(x0)
    tensors = [p for group in groups.values() for p in group]
    found: Sequence[Tensor | None] = [None] * len(tensors)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, tensors, allow_unused=True)
    # The division comes last: TraceGraph_ELBO adds its costs to a masked site's 0, which is a float32 tensor.
    parts = iter(torch.zeros_like(p) if g is None else g / len(x0) for p, g in zip(tensors, found, strict=True))
    return {name: torch.cat([next(parts).flatten().double().cpu() for _ in group]) for name, group in groups.items()}


# ---------------------------------------------------------------------- bias and variance


class _Moments:
    """Mean and total variance of vectors that come one by one; shifted by the first, so that equal ones have variance 0."""

    def __init__(self) -> None:
        self.count, self.squares, self.largest = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        if not self.count:
            self.first, self.sum = x, torch.zeros_like(x)
        shifted = x - self.first
        self.sum += shifted
        self.squares += shifted.square().sum().item()
        self.largest = max(self.largest, x.abs().max().item())
        self.count += 1

    @property
    def mean(self) -> Tensor:
        return self.first + self.sum / self.count

    @property
    def variance(self) -> float:
        return max(0.0, self.squares - self.sum.square().sum().item() / self.count) / (self.count - 1)


@dataclass
class _Tally:
    """What becomes of one estimator's draws for one group."""

    draws: _Moments
    from_reference: _Moments
    errors: _Moments
    along: list[Tensor]  # errors' coordinates along DIRECTIONS directions

    def bias(self) -> float:
        """Norm of the mean error, less what noise alone would add to its square."""
        square = self.errors.mean.square().sum().item() - self.errors.variance / self.errors.count
        return math.sqrt(max(0.0, square))

    def z(self, rounding: Tensor) -> float:
        """The largest of the t statistics along the directions."""
        along = torch.stack(self.along)
        mean, se = along.mean(0), (along.var(0) / len(along) + rounding.square()).sqrt()
        return torch.where(mean == 0, 0.0, mean / se).abs().max().item()


def compare_gradients(
    diffusion: GaussianDiffusion,
    x0: Tensor | nn.Module,
    *,
    timesteps: Sequence[int] | None = None,
    chain: bool | None = None,
    repeats: int = 64,
    reward: Reward | None = None,
    iwae: Sequence[int] = (4,),
    exact: Exact | None = None,
    seed: int = 0,
    progress: bool = False,
    **cond: Tensor,
) -> pd.DataFrame:
    r"""Measure gradient estimators of the bound: a row per question, group of parameters and estimator.

    Gradients are of minus the bound in nats, averaged over the examples; for reverse samples, of E[reward(x_0)]. A draw is
    one gradient of the whole batch; draw r of every estimator starts from the same seed. The network runs in evaluation mode.
    Parameters, their ``.grad``, Pyro's parameter store and torch's generators are left as they were.

    Groups of parameters: ``"net"``, the network and a learned decoder scale; ``"schedule"``, those of a learned schedule;
    ``"encoder"`` or ``"x0"``, see below. **With a fixed schedule and data as x_0 the guide has no parameters:** the network's
    gradients by ``.sample()`` and ``.rsample()`` are the same, ``same_noise`` is 0.0, and the refinements
    of either change nothing.

    Args:
        diffusion: the model.
        x0: data ``[B, *event]``; a tensor that requires grad is group ``"x0"``. Or a module, called without arguments, that
            returns ``[B, *event]``: group ``"encoder"``.
        timesteps: the t of "one timestep", where the question is the gradient of :math:`L_{t-1}` alone (no prior
            term, weight 1); default six spread over 1..T.
        chain: whether to run whole chains; default: if T <= 64.
        repeats: draws R.
        reward: from x_0 ``[B, *event]`` to ``[B]``; "reverse samples" are B of the model's.
        iwae: numbers of samples K of the importance-weighted bounds.
        exact: the true gradient of a question, ``exact(where, t, group)``, flat ``[P]``, or None where it is not known.
        seed: of all draws.
        progress: show a progress bar after two seconds.
        cond: passed to the network, a row per example.

    Returns:
        A table with columns

        * ``where``, ``t``: the question: ``"one timestep"``, ``"chain"``, ``"chain, K=4"``, ``"reverse samples"``. Only rows
          of the same question and group estimate the same gradient.
        * ``group``, ``estimator``; ``unbiased``: what the estimator claims.
        * ``norm``: of the mean gradient; ``variance``: of one draw, summed over coordinates (nats squared).
        * ``bias``: norm of the mean difference from what ``against`` names, ``"exact"`` or the reference, the question's first
          estimator that applies; the square is corrected for what noise adds, and cut off at 0. Differences from the reference are
          taken draw by draw. NaN for the reference itself.
        * ``z``: the largest of four t statistics of that difference, along the true (or a reference draw's) gradient
          and three random sign vectors, chosen without a look at the draws. An unbiased row exceeds z with probability at most
          :math:`4 P(|t_{R-1}| > z)`, as far as projections are normal: for R = 64, 7e-4 at z = 4 and 2e-5 at z = 5. Rounding,
          :math:`100\,\epsilon` of the gradient's norm, counts as standard error.
        * ``same_noise``: largest absolute difference from the reference at the same noise, over draws and coordinates.
        * ``evaluations``: of the network per example and draw; ``seconds`` per draw.
        * ``efficiency``: 1 / (variance x evaluations).
        * ``reason``: why an estimator does not apply; its numbers are NaN.

    Raises:
        OptionError, ShapeError: an argument outside its range.
    """
    import pandas as pd

    if isinstance(x0, Tensor):
        x0, cond = to_network(diffusion.net, x0, cond)
    groups, source = parameter_groups(diffusion, x0)
    if not groups:
        raise OptionError("nothing to differentiate: neither the diffusion nor x0 has a parameter that requires grad")
    if diffusion.reverse_kernel.bins is not None and not groups.keys() <= {"net", "schedule"}:
        raise OptionError("x0 has parameters, and bins: probabilities of a grid's points have no derivative along x0")
    if repeats < 2 or any(k < 1 for k in iwae) or any(not 1 <= t <= diffusion.steps for t in timesteps or ()):
        raise OptionError(
            f"repeats={repeats!r} must be at least 2, iwae={iwae!r} at least 1, timesteps={timesteps!r} in 1..{diffusion.steps}"
        )
    with seeded(torch.device("cpu"), seed), torch.no_grad():
        example = source()
    check_event("x0", example, diffusion.event_shape)
    diffusion.reverse_kernel.check_grid("x0", example)
    if example.dim() != len(diffusion.event_shape) + 1 or not len(example):
        raise ShapeError(f"x0 has shape {list(example.shape)}, not [B, *{list(diffusion.event_shape)}] with B >= 1")
    rows = []
    with diffusion.evaluating():
        asked = questions(
            diffusion, groups, len(example), timesteps=timesteps, chain=chain, reward=reward, iwae=iwae, **cond
        )
        draws = repeats * sum(e.surrogate is not None for q in asked for e in q.estimators)
        with tqdm(
            total=draws, desc="gradients", unit="draw", delay=2, disable=not progress, dynamic_ncols=True, leave=False
        ) as bar:
            for question in asked:
                with pyro.get_param_store().scope():  # where Pyro keeps the averages of its baselines
                    rows += _measure(question, source, groups, example.device, repeats, exact, seed, bar.update)
    frame = pd.DataFrame(rows)
    frame["t"] = frame["t"].astype("Int64")
    return frame


def _measure(
    question: Question,
    source: Callable[[], Tensor],
    groups: Groups,
    device: torch.device,
    repeats: int,
    exact: Exact | None,
    seed: int,
    advance: Callable[[], object],
) -> list[dict[str, Any]]:
    """The rows of one question."""
    asked = {name: groups[name] for name in question.groups}
    able = [e for e in question.estimators if e.surrogate is not None]
    tallies = {(e.name, group): _Tally(_Moments(), _Moments(), _Moments(), []) for e in able for group in asked}
    seconds = dict.fromkeys((e.name for e in able), 0.0)
    truth: dict[str, Tensor] = {}
    directions: dict[str, Tensor] = {}

    def draw(estimator: Estimator, *numbers: int) -> dict[str, Tensor]:
        with seeded(device, seed, *numbers):
            return gradient(estimator, source, asked)

    if able:
        pilot = draw(able[0], 0)
        generator = torch.Generator().manual_seed(seed)
        for group, along in pilot.items():
            known = None if exact is None else exact(question.where, question.t, group)
            if known is not None:
                truth[group] = along = known.detach().flatten().double().cpu()
            signs = torch.randint(0, 2, (DIRECTIONS - 1, len(along)), generator=generator, device="cpu") * 2 - 1
            directions[group] = torch.cat([along[None], signs.double()])
    for estimator in able:
        for r in range(estimator.warm_up):
            draw(estimator, 1, r)
    for r in range(repeats):
        reference: dict[str, Tensor] = {}
        for estimator in able:
            started = time.perf_counter()
            found = draw(estimator, 2, r)
            seconds[estimator.name] += (time.perf_counter() - started) / repeats
            reference = reference or found
            for group, g in found.items():
                tally, error = tallies[estimator.name, group], g - truth.get(group, reference[group])
                tally.draws.add(g)
                tally.from_reference.add(g - reference[group])
                tally.errors.add(error)
                tally.along.append(directions[group] @ error)
            advance()

    def row(estimator: Estimator, group: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "where": question.where,
            "t": question.t,
            "group": group,
            "estimator": estimator.name,
            "unbiased": group not in estimator.loses,
            **dict.fromkeys(("norm", "variance", "bias", "z"), math.nan),
            "against": "",
            **dict.fromkeys(("same_noise", "evaluations", "seconds", "efficiency"), math.nan),
            "reason": estimator.reason,
        }
        if estimator.surrogate is None:
            return found
        tally = tallies[estimator.name, group]
        variance, cost = tally.draws.variance, float(estimator.evaluations)
        found |= {
            "norm": tally.draws.mean.norm().item(),
            "variance": variance,
            "same_noise": tally.from_reference.largest,
            "evaluations": cost,
            "seconds": seconds[estimator.name],
            "efficiency": 1 / (variance * cost) if variance else math.inf,
        }
        if group in truth or estimator is not able[0]:
            middle = truth[group] if group in truth else tallies[able[0].name, group].draws.mean
            eps = max(torch.finfo(p.dtype).eps for p in asked[group])
            # a coordinate's rounding, along a direction of that length
            rounding = 100 * eps * middle.norm() * directions[group].norm(dim=1)
            found |= {
                "bias": tally.bias(),
                "z": tally.z(rounding),
                "against": "exact" if group in truth else able[0].name,
            }
        return found

    return [row(estimator, group) for group in asked for estimator in question.estimators]
