r"""Sequential Monte Carlo over the reverse chain: the posterior :math:`p(x_0 \mid y)` and the evidence :math:`Z = p(y)`.

Particles start at x_T and move to x_0 by one of :mod:`~pyrodiff.inference.proposals`, each with a weight w. Where the weights'
effective number falls below a share of the particles, they are resampled, after which each carries the mean weight. So at the end

.. math:: \hat Z = \frac1N \sum_{n=1}^N w_n, \qquad E\, \hat Z = p(y) = \int p(x_0)\, p(y \mid x_0)\, dx_0,

where p(x_0) is the chain's own law with the Normal behind its decoder as the last step (with bins: before rounding).

**What tells a collapse.** The effective number of weights, step by step; Pareto's k-hat of the weights at each step; and
families, the effective number of x_T from which the final weight descends. Resampling makes weights equal, not particles
different: one ancestor of all is a family of 1, however even the weights are. The square of :math:`\hat Z`'s relative error is
about 1 / families (Lee and Whiteley, 2018).

References:
    Feynman-Kac Formulae (Del Moral, 2004), section 2.4.2 (the evidence is unbiased).
    Sequential Monte Carlo Samplers (Del Moral, Doucet and Jasra, 2006), section 3. https://doi.org/10.1111/j.1467-9868.2006.00553.x
    Variance Estimation in the Particle Filter (Lee and Whiteley, 2018), section 3. https://arxiv.org/abs/1509.00394
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._tensor import batch_dims, like_of
from ..diffusion import GaussianDiffusion
from ..errors import DataError, OptionError, ProgramError, ShapeError, check_option
from ..likelihood.importance import effective_chains, pareto_k
from .operators import LinearGaussian
from .proposals import PROPOSALS, Bootstrap, Likelihood, Look, MCGDiff, Twist
from .resampling import RESAMPLING, Resampling

__all__ = ["Evidence", "Posterior", "Source", "Walk", "prepare", "smc", "walk"]

HEAVY = 0.7  # Pareto's k above which averages mislead (Vehtari et al., 2024)
FEW = 0.1  # of the particles: fewer effective ones at the end are a collapse
FAMILIES = 10  # fewer: Z-hat's relative error is above a third
VANISHING = 700.0  # nats below the largest: of a weight of 0, as far as a tail goes


class Evidence(NamedTuple):
    """The log of the mean of Z-hat over repeats, nats.

    Attributes:
        log_z: log p(y).
        standard_error: the relative standard error of that mean, which is log_z's to first order; NaN from one repeat.
    """

    log_z: float
    standard_error: float


@dataclass(frozen=True)
class Posterior:
    """Weighted particles of p(x_0 | y), from R independent repeats of N.

    Attributes:
        method: how they were made.
        particles: ``[R, N, *event]``.
        log_weights: ``[R, N]``, nats, float64, not normalised: their mean weight is Z-hat.
        ess: effective number of weights before any resampling at t = T, ..., 1 and at x_0, ``[R, T + 1]``.
        pareto_k: Pareto's k-hat of the same weights, ``[R, T + 1]``; NaN for N < 25.
        families: effective number of x_T that the weight descends from, ``[R]``.
        network_evaluations: forward passes of one particle, over all repeats.
        seconds: wall time.
        warnings: what the reader must know, in words.
        no_evidence: why there is none; empty where there is.
    """

    method: str
    particles: Tensor = field(repr=False)
    log_weights: Tensor = field(repr=False)
    ess: Tensor = field(repr=False)
    pareto_k: Tensor = field(repr=False)
    families: Tensor = field(repr=False)
    network_evaluations: int
    seconds: float
    warnings: tuple[str, ...] = ()
    no_evidence: str = ""

    @property
    def log_evidence(self) -> Tensor:
        """Log Z-hat of each repeat, ``[R]``, nats.

        Raises:
            ProgramError: the method gives no evidence; it says why.
        """
        if self.no_evidence:
            raise ProgramError(self.no_evidence)
        return torch.logsumexp(self.log_weights, 1) - math.log(self.log_weights.shape[1])

    @property
    def evidence(self) -> Evidence:
        """Log p(y) with its standard error: the mean over repeats is Z-hat's own, not its logarithm's, which is too low."""
        log_z = self.log_evidence
        repeats = len(log_z)
        mean = torch.logsumexp(log_z, 0) - math.log(repeats)
        spread = (log_z - mean).exp().std() if repeats > 1 else log_z.new_tensor(math.nan)
        return Evidence(float(mean), float(spread) / math.sqrt(repeats))

    @property
    def weights(self) -> Tensor:
        """Of all particles, ``[R, N]``, adding up to 1: a repeat counts by its Z-hat."""
        return self.log_weights.flatten().softmax(0).view_as(self.log_weights)

    def mean(self, function: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """The posterior mean of a function of x_0.

        Args:
            function: ``[R N, *event]`` to ``[R N, *value]``; default: x_0 itself.

        Returns:
            ``[*value]``, float64.
        """
        values = function(self.particles.flatten(0, 1)).double()
        return torch.tensordot(self.weights.flatten(), values, 1)

    def sample(self, n: int, seed: int | None = None) -> Tensor:
        """Particles drawn by their weights, ``[n, *event]``; ``seed`` None: from torch's generator."""
        if n < 1:
            raise OptionError(f"n={n!r} is not at least 1")
        generator = None if seed is None else torch.Generator(self.log_weights.device).manual_seed(seed)
        found = self.weights.flatten().multinomial(n, replacement=True, generator=generator)
        return self.particles.flatten(0, 1)[found]

    def __str__(self) -> str:
        repeats, particles = self.log_weights.shape
        lines = [f"{self.method}: {particles:,} particles, {repeats:,} repeats"]
        if self.no_evidence:
            lines += [f"{'log p(y)':12s}none: {self.no_evidence}"]
        else:
            log_z, error = self.evidence
            told = "over repeats"
            if repeats == 1:
                error, told = float(self.families[0]) ** -0.5, "by families"
            lines += [f"{'log p(y)':12s}{log_z:.4f} ± {error:.4f} nats, {told}"]
            least, final = self.ess.min(1).values.median(), self.ess[:, -1].median()
            lines += [
                f"{'effective':12s}{final:.1f} at x_0, {least:.1f} at the least, {self.families.median():.1f} families"
            ]
            lines += [f"{'Pareto k':12s}{self.pareto_k.max():.2f} at the most"]
        lines += [f"{self.network_evaluations:,} network evaluations, {self.seconds:.1f} s"]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def smc(
    diffusion: GaussianDiffusion,
    log_likelihood: Likelihood,
    particles: int,
    *,
    proposal: str = "twisted",
    twist: Twist | None = None,
    data_std: float | None = None,
    guidance_scale: float | None = None,
    resampling: str = "systematic",
    threshold: float = 0.5,
    steps: str | int | Sequence[int] | None = None,
    seed: int | None = None,
    repeats: int = 1,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Any,
) -> Posterior:
    """Weighted particles of p(x_0 | y), and an unbiased estimate of p(y).

    All R N particles move together, on the network's device. Memory: some copies of them, and one network call's activations
    of ``batch_size`` rows. The numbers do not depend on ``batch_size`` but for the network's rounding.

    Args:
        diffusion: the prior; its network runs in evaluation mode.
        log_likelihood: log p(y | x_0) of ``[N, *event]``, ``[N]``: any function, such as
            :func:`~pyrodiff.inference.observe.observation` makes of a Pyro program, or a
            :class:`~pyrodiff.inference.operators.LinearGaussian`.
        particles: N.
        proposal: ``"bootstrap"``; ``"twisted"`` (TDS), for a differentiable likelihood; ``"mcgdiff"`` or ``"replacement"``, for a
            ``LinearGaussian``.
        twist: of ``"twisted"``, ``twist(x_t, x0_hat, log_snr)``, the log of a guess of p(y | x_t); None: the likelihood at
            x0_hat; :mod:`~pyrodiff.inference.guidance` has better ones for linear observations.
        data_std: of ``"mcgdiff"`` and ``"replacement"``: the data's standard deviation about 0, from which their twist is; None:
            infinite (the paper's), and 1.
        guidance_scale: of ``"bootstrap"`` and ``"twisted"``: moves as classifier-free guidance of this scale has them, two network
            calls each. The target is the chain given ``cond`` for every scale; None: 1, its own moves.
        resampling: ``"multinomial"``, ``"residual"``, ``"stratified"`` or ``"systematic"``.
        threshold: resample where fewer than this share of the weights is effective; 0 never, 1 at (nearly) every step.
        steps: a respacing (see :meth:`~pyrodiff.schedules.Schedule.respace`), whose chain is another prior; None: all T.
        seed: None: drawn from torch's generator, which is otherwise neither used nor changed.
        repeats: R, independent; the standard error of the evidence takes two or more.
        batch_size: particles per network call.
        progress: show a progress bar after two seconds.
        cond: passed to the network, values without batch dim.

    Returns:
        The posterior.

    Raises:
        OptionError: an option outside its set or range, or that does not go with another.
        ShapeError: the likelihood does not return one number per particle, or ``cond`` has rows.
        DataError: all weights of a repeat are 0, or one is NaN; the message names the step.
    """
    check_option("resampling", resampling, RESAMPLING)
    if not 0 <= threshold <= 1:
        raise OptionError(f"threshold={threshold!r} is not in [0, 1]")
    started = time.perf_counter()
    options = {"twist": twist, "data_std": data_std, "guidance_scale": guidance_scale}
    moves, source = prepare(
        diffusion, log_likelihood, particles, proposal, options, steps, seed, repeats, batch_size, cond
    )
    found = walk(diffusion, moves, source, repeats, RESAMPLING[resampling], threshold, batch_size, progress=progress)
    return Posterior(
        method=f"smc, {proposal}",
        particles=found.x0.unflatten(0, (repeats, particles)),
        log_weights=found.log_weights,
        ess=found.ess,
        pareto_k=found.pareto_k,
        families=found.families,
        network_evaluations=repeats * particles * moves.kernel.schedule.length * moves.calls,
        seconds=time.perf_counter() - started,
        warnings=tuple(_cautions(found, particles)),
    )


def prepare(
    diffusion: GaussianDiffusion,
    log_likelihood: Likelihood,
    particles: int,
    proposal: str,
    options: dict[str, Any],
    steps: str | int | Sequence[int] | None,
    seed: int | None,
    repeats: int,
    batch_size: int,
    cond: dict[str, Any],
) -> tuple[Bootstrap, Source]:
    """Arguments of :func:`smc`, checked: the proposal, and where noise comes from."""
    check_option("proposal", proposal, PROPOSALS)
    options = {name: value for name, value in options.items() if value is not None}
    for name in options.keys() - {*PROPOSALS[proposal].OPTIONS}:
        raise OptionError(f"{name} is no option of proposal={proposal!r}")
    for name, number in (("particles", particles), ("repeats", repeats), ("batch_size", batch_size)):
        if number < 1:
            raise OptionError(f"{name}={number!r} is not at least 1")
    like = like_of(diffusion.net)
    if isinstance(log_likelihood, LinearGaussian):
        if log_likelihood.y.device != like.device:
            raise DataError(f"y is on {log_likelihood.y.device} and the network on {like.device}: move y")
        if log_likelihood.operator.event_shape != diffusion.event_shape:
            raise ShapeError(
                f"the operator is of events {list(log_likelihood.operator.event_shape)}, not {list(diffusion.event_shape)}"
            )
        if not log_likelihood.noise_std and not issubclass(PROPOSALS[proposal], MCGDiff):
            raise OptionError(
                f"noise_std=0: given x_0, y has no density to weight by; proposal={proposal!r} takes one: take "
                '"mcgdiff" or "replacement"'
            )
    cond = {
        k: torch.as_tensor(v, device=like.device) if isinstance(v, int | float | Sequence | Tensor) else v
        for k, v in cond.items()
    }
    rows = [name for name, dims in batch_dims(diffusion.net, cond).items() if dims]
    if rows:
        raise ShapeError(
            f"{rows[0]} has shape {list(cond[rows[0]].shape)}, a row per example: all particles are of one, give its value"
        )
    kernel = diffusion.reverse_kernel if steps is None else diffusion.reverse_kernel.respace(steps)
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    generator = torch.Generator(like.device).manual_seed(seed)
    moves = PROPOSALS[proposal](kernel, log_likelihood, cond, **options)
    return moves, Source(like.detach().new_zeros(()).expand(repeats * particles, *diffusion.event_shape), generator)


@dataclass(frozen=True)
class Source:
    """Where randomness comes from.

    Attributes:
        like: zeros of the particles' shape, ``[R N, *event]``, without memory.
        generator: on their device.
    """

    like: Tensor
    generator: torch.Generator

    def normal(self) -> Tensor:
        """Standard normal noise, ``[R N, *event]``."""
        return torch.randn(self.like.shape, dtype=self.like.dtype, device=self.like.device, generator=self.generator)

    def uniform(self, shape: torch.Size) -> Tensor:
        """In [0, 1), float64."""
        return torch.rand(shape, dtype=torch.float64, device=self.like.device, generator=self.generator)


class Walk(NamedTuple):
    """Where particles have come to; rows are repeat-major.

    Attributes:
        x0: ``[R N, *event]``.
        log_weights: ``[R, N]``, nats, float64.
        ess, pareto_k: ``[R, T + 1]``.
        families: ``[R]``.
        path: x_T, ..., x_0 of one particle of each repeat, drawn by the final weights, ``[T + 1, R, *event]``; empty if not asked.
    """

    x0: Tensor
    log_weights: Tensor
    ess: Tensor
    pareto_k: Tensor
    families: Tensor
    path: Tensor


def walk(
    diffusion: GaussianDiffusion,
    moves: Bootstrap,
    source: Source,
    repeats: int,
    resampling: Resampling,
    threshold: float,
    batch_size: int,
    *,
    reference: Tensor | None = None,
    keep_path: bool = False,
    progress: bool = False,
) -> Walk:
    """All particles from x_T to x_0: move, look, resample.

    Args:
        diffusion: whose network is evaluated.
        moves: the proposal.
        source: of R N particles.
        repeats: R.
        resampling: the scheme.
        threshold, batch_size, progress: see :func:`smc`.
        reference: x_T, ..., x_0, ``[T + 1, R, *event]``: the first particle of each repeat follows it (conditional SMC, for
            which the scheme must be multinomial).
        keep_path: whether to return a path; it takes the memory of T + 1 states.
    """
    T, rows = moves.kernel.schedule.length, torch.arange(len(source.like), device=source.like.device)
    roots, first = rows, rows.view(repeats, -1)[:, 0]  # x_T's own number; the first particle of each repeat
    signs, states, parents = [], [], []
    bar = tqdm(
        total=T * len(rows), desc="smc", unit="eval", unit_scale=True, delay=2, disable=not progress, leave=False
    )

    def in_batches(function: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Iterator[Tensor]:
        for parts in zip(*(function(part) for part in x.split(batch_size)), strict=True):
            yield torch.cat(parts)

    with bar, diffusion.evaluating(), torch.no_grad():
        look = moves.begin(source.like)
        log_w = look.log_twist.view(repeats, -1)
        for s in range(T, -1, -1):
            noise = source.normal()
            if reference is not None:
                noise[first] = moves.noise(look.take(first), reference[T - s], s)
            x, gain = moves.move(look, noise, s)
            log_w = log_w + gain.view_as(log_w)
            states += [x] * keep_path
            if s == 0:
                break
            look = Look(*in_batches(partial(moves.look, t=s), x))
            bar.update(len(x))
            log_w = log_w + look.log_twist.view_as(log_w)
            signs.append(_signs(log_w, f"t={s}"))
            parent = rows
            poor = signs[-1][0] < threshold * log_w.shape[1]
            if poor.any():
                log_w, parent = _resample(
                    log_w, poor, resampling(log_w.softmax(1), source.uniform(log_w.shape)), reference
                )
                look, roots = look.take(parent), roots[parent]
            parents += [parent] * keep_path
        (log_likelihood,) = in_batches(lambda part: [moves.finish(part)], x)
        log_w = log_w + log_likelihood.view_as(log_w)
        signs.append(_signs(log_w, "x_0"))
    weights = log_w.softmax(1)
    families = torch.zeros_like(weights.flatten()).index_add(0, roots, weights.flatten()).view_as(weights)
    ess, tails = (torch.stack(sign, 1) for sign in zip(*signs, strict=True))
    path = x.new_zeros(0, repeats, *x.shape[1:])
    if keep_path:
        path = _trace_back(states, parents, first + weights.multinomial(1, generator=source.generator)[:, 0])
    return Walk(x, log_w, ess, tails, 1 / families.square().sum(1), path)


def _resample(log_w: Tensor, poor: Tensor, drawn: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-weights and the particles' parents, of all repeats, where the poor ones are resampled: theirs share the mean weight."""
    repeats, particles = log_w.shape
    rows = torch.arange(repeats * particles, device=log_w.device).view(repeats, particles)
    if reference is not None:
        drawn = torch.cat([torch.zeros_like(drawn[:, :1]), drawn[:, 1:]], 1)
    mean = torch.logsumexp(log_w, 1, keepdim=True) - math.log(particles)
    poor = poor[:, None]
    return torch.where(poor, mean, log_w), torch.where(poor, rows[:, :1] + drawn, rows).flatten()


def _trace_back(states: list[Tensor], parents: list[Tensor], row: Tensor) -> Tensor:
    """The states, first to last, that lead to the given rows of the last; ``parents[i]``: rows of state i, of state i + 1."""
    found = [states[-1][row]]
    for state, parent in zip(states[-2::-1], parents[::-1], strict=True):
        row = parent[row]
        found.append(state[row])
    return torch.stack(found[::-1])


def _signs(log_w: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The effective number of each repeat's weights, and Pareto's k-hat of them, ``[R]``."""
    _check(log_w, where)
    floor = log_w.max(1, keepdim=True).values - VANISHING
    return effective_chains(log_w.mT), pareto_k(log_w.maximum(floor).mT)


def _check(log_weights: Tensor, where: str) -> None:
    """Raise where a repeat has no weight left."""
    worst = log_weights.max(1).values
    if worst.isfinite().all():
        return
    bad = int((~worst.isfinite()).nonzero()[0])
    if float(worst[bad]) == -math.inf:
        raise DataError(
            f"all {log_weights.shape[1]} weights of repeat {bad} are 0 at {where}: no particle can have made the observation"
        )
    raise DataError(
        f"repeat {bad} has a weight of {float(worst[bad])} at {where}: the likelihood, a twist or the network is not finite"
    )


def _cautions(found: Walk, particles: int) -> list[str]:
    """Warnings, where averages mislead."""
    repeats = len(found.families)
    texts = []
    collapsed = (found.ess[:, -1] < FEW * particles) | (found.families < FAMILIES)
    if collapsed.any():
        texts.append(
            f"particles have collapsed in {int(collapsed.sum())} of {repeats} repeats (medians of {particles:,}: "
            f"{float(found.ess[:, -1].median()):.1f} effective at x_0, {float(found.families.median()):.1f} families): the posterior "
            "is that of a few particles"
        )
    heavy = found.pareto_k > HEAVY
    if heavy.any():
        t = found.pareto_k.shape[1] - 1 - int(heavy.any(0).nonzero()[0])
        texts.append(
            f"Pareto's k-hat is above {HEAVY} in {int(heavy.any(1).sum())} of {repeats} repeats, first at "
            f"{f't={t}' if t else 'x_0'} (at the most {float(found.pareto_k.nan_to_num(-math.inf).max()):.2f}): a few weights decide, and "
            "log p(y) is probably higher than its estimate and standard error say"
        )
    if found.pareto_k.isnan().all():
        texts.append("Pareto's k-hat takes 25 particles: the weights' tail is not known")
    log_z = torch.logsumexp(found.log_weights, 1)
    if repeats > 1 and float(log_z.softmax(0).square().sum()) > 2 / repeats:
        texts.append(
            "Z-hat's standard deviation over repeats is above its mean: log p(y) is probably higher than its standard error says"
        )
    return texts
