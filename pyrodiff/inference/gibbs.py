r"""Particle Gibbs: x_0 and unknown parameters of the likelihood, jointly.

A sweep draws, in turn, from two kernels that leave :math:`p(x_{0:T}, \theta \mid y)` invariant, whatever the number of particles:

1. :math:`\theta` given x_0, coordinate by coordinate, by slice sampling on the unconstrained scale, which has nothing to tune and
   no network to call;
2. the chain given :math:`\theta`, by conditional SMC: one particle follows the last sweep's chain, the others are free, and one
   of all is drawn by the final weights.

The second kernel takes any twist that is a function of :math:`\theta` (and of x_t): given :math:`\theta` it is the same at every step
and for every particle, the one that follows the last chain included.

References:
    Particle Markov chain Monte Carlo methods (Andrieu, Doucet and Holenstein, 2010), sections 2.4.3 and 4.3.
    https://doi.org/10.1111/j.1467-9868.2009.00736.x
    Slice sampling (Neal, 2003), figures 3 and 5. https://doi.org/10.1214/aos/1056562461
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from tqdm.auto import tqdm

from .._tensor import like_of
from ..diffusion import GaussianDiffusion
from ..errors import DataError, OptionError, ProgramError
from .observe import observation, unobserved
from .proposals import Twist
from .resampling import multinomial
from .smc import prepare, walk

__all__ = ["GibbsChain", "particle_gibbs", "slice_sample"]

STUCK = 0.1  # a chain that moves in fewer of its sweeps hardly moves
WIDTH, MOST = 1.0, 20  # of a slice's first interval, and how many of them it may grow to


@dataclass(frozen=True)
class GibbsChain:
    """A Markov chain whose law tends to p(x_0, theta | y); its first part remembers the start.

    Attributes:
        x0: ``[S, *event]``.
        parameters: each ``[S, *shape]``, by site.
        moved: share of the sweeps in which x_0 changed.
        network_evaluations: forward passes of one particle.
        seconds: wall time.
        warnings: what the reader must know, in words.
    """

    x0: Tensor = field(repr=False)
    parameters: dict[str, Tensor] = field(repr=False)
    moved: float
    network_evaluations: int
    seconds: float
    warnings: tuple[str, ...] = ()


def particle_gibbs(
    diffusion: GaussianDiffusion,
    program: Callable[[Tensor], Any],
    sweeps: int,
    *,
    particles: int = 32,
    proposal: str = "twisted",
    twist: Callable[[dict[str, Tensor]], Twist] | None = None,
    threshold: float = 0.5,
    steps: str | int | Sequence[int] | None = None,
    seed: int | None = None,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Any,
) -> GibbsChain:
    """A chain of ``sweeps`` draws of x_0 and of the program's unobserved sites.

    Args:
        diffusion: the prior of x_0.
        program: a Pyro program of x_0, ``[N, *event]``, as :func:`~pyrodiff.inference.observe.observation` takes, whose
            unobserved sites, continuous and outside of any plate, are the unknown parameters.
        sweeps: S.
        particles: N of conditional SMC, 2 or more; the more, the less a draw depends on the one before.
        proposal: ``"twisted"`` or ``"bootstrap"``.
        twist: of ``"twisted"``, made anew in every sweep: ``twist(parameters)``, where ``parameters`` has the unobserved sites'
            values by name, returns what :func:`~pyrodiff.inference.smc.smc` takes. It may depend on them and on what is known,
            on no earlier sweep. None: the likelihood at x0_hat, which overshoots where the noise is small.
        threshold, steps, batch_size, progress, cond: of :func:`~pyrodiff.inference.smc.smc`.
        seed: None: drawn from torch's generator.

    Returns:
        The chain.

    Raises:
        OptionError: a number outside its range; a twist of ``"bootstrap"``.
        ProgramError: the program has nothing unknown, a discrete unknown, or one whose support depends on another.
        DataError: see :func:`~pyrodiff.inference.smc.smc`; the program's density is 0 where the chain starts.

    Example:
        >>> def program(x0):
        ...     sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        ...     pyro.factor("y", LinearGaussian(operator, y, float(sigma))(x0))
        >>> def twist(parameters):
        ...     return pigdm(LinearGaussian(operator, y, float(parameters["sigma"])))
        >>> found = particle_gibbs(diffusion, program, 1000, twist=twist)
    """
    if sweeps < 1 or particles < 2:
        raise OptionError(f"sweeps={sweeps!r} is not at least 1, or particles={particles!r} not at least 2")
    if proposal == "mcgdiff":
        raise OptionError(
            'proposal="mcgdiff" takes a LinearGaussian observation, not a program: "bootstrap" or "twisted"'
        )
    started = time.perf_counter()
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    like = like_of(diffusion.net)
    generator = torch.Generator().manual_seed(seed)
    with poutine.seed(rng_seed=seed % 2**32):
        trace, other = (poutine.trace(program).get_trace(like.new_zeros(1, *diffusion.event_shape)) for _ in range(2))
    sites = unobserved(trace)
    if not sites:
        raise ProgramError("the program has no unobserved site: nothing is unknown but x_0, take smc")
    for name, site in sites.items():
        if site["fn"].support.is_discrete or site["cond_indep_stack"]:
            raise ProgramError(
                f"site {name!r} is discrete or in a plate: unknown parameters are continuous, and shared by all x_0"
            )
    transforms = {name: biject_to(site["fn"].support) for name, site in sites.items()}
    free = {name: transforms[name].inv(site["value"]).double() for name, site in sites.items()}
    shapes = {name: value.shape for name, value in free.items()}
    for name, value in free.items():
        u, law = value.to(sites[name]["value"]), unobserved(other)[name]["fn"]
        if not torch.equal(biject_to(law.support)(u), transforms[name](u)):
            raise ProgramError(
                f"the support of site {name!r} is another at each draw of the other unknowns: write it as a function of a site "
                "whose support is fixed, such as a share of the interval"
            )

    def constrained(flat: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values by site, and the log of the transforms' Jacobian."""
        found, log_volume, parts = {}, flat.new_zeros(()), flat.split([s.numel() for s in shapes.values()])
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            u = part.view(shape)
            value = transforms[name](u)
            log_volume = log_volume + transforms[name].log_abs_det_jacobian(u, value).sum()
            found[name] = value.to(like)
        return found, log_volume

    state = torch.cat([value.flatten() for value in free.values()]).cpu()
    path: Tensor | None = None
    xs: list[Tensor] = []
    values, moved, length = [], 0, 0
    bar = tqdm(range(sweeps), desc="sweeps", delay=2, disable=not progress, leave=False)
    for _ in bar:
        if path is not None:
            x0 = path[-1]

            def log_joint(flat: Tensor, x0: Tensor = x0) -> float:
                given, log_volume = constrained(flat)
                with torch.no_grad():
                    found = poutine.trace(poutine.condition(program, data=given)).get_trace(x0).log_prob_sum()
                return float(found) + float(log_volume)

            state = slice_sample(log_joint, state, generator)
        given, _volume = constrained(state)
        likelihood = observation(poutine.block(poutine.condition(program, data=given), hide=list(given)))
        own_seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        options = {} if twist is None else {"twist": twist(given)}
        moves, source = prepare(
            diffusion, likelihood, particles, proposal, options, steps, own_seed, 1, batch_size, cond
        )
        path = walk(
            diffusion, moves, source, 1, multinomial, threshold, batch_size, reference=path, keep_path=True
        ).path
        length = moves.kernel.schedule.length
        xs.append(path[-1][0])
        moved += len(xs) == 1 or not torch.equal(xs[-1], xs[-2])
        values.append(given)
    share = moved / sweeps
    texts = [f"x_0 changed in {100 * share:.1f} % of the sweeps: the chain hardly moves, take more particles"]
    return GibbsChain(
        x0=torch.stack(xs),
        parameters={name: torch.stack([value[name] for value in values]) for name in shapes},
        moved=share,
        network_evaluations=sweeps * particles * length,
        seconds=time.perf_counter() - started,
        warnings=tuple(texts if share < STUCK else ()),
    )


def slice_sample(log_density: Callable[[Tensor], float], x: Tensor, generator: torch.Generator) -> Tensor:
    """One update of every coordinate in turn, by Neal's univariate slice sampler with stepping out.

    Args:
        log_density: of a vector, up to a constant.
        x: ``[K]``.
        generator: of uniforms, on the CPU.

    Returns:
        ``[K]``.

    Raises:
        DataError: the density is 0 or not a number at x.
    """
    x = x.clone()

    def at(i: int, value: float) -> float:
        moved = x.clone()
        moved[i] = value
        return log_density(moved)

    def uniform() -> float:
        return float(torch.rand((), dtype=torch.float64, generator=generator, device="cpu"))

    for i in range(len(x)):
        here = float(x[i])
        level = at(i, here)
        if not math.isfinite(level):
            raise DataError(f"the program's log-density is {level} at the chain's state")
        level += math.log1p(-uniform())
        low = here - WIDTH * uniform()
        high = low + WIDTH
        left = math.floor(MOST * uniform())
        right = MOST - 1 - left
        while left > 0 and at(i, low) > level:
            low, left = low - WIDTH, left - 1
        while right > 0 and at(i, high) > level:
            high, right = high + WIDTH, right - 1
        while True:
            proposed = low + (high - low) * uniform()
            if at(i, proposed) > level or low == high:
                break
            low, high = (proposed, high) if proposed < here else (low, proposed)
        x[i] = proposed
    return x
