r"""The bound of a data set to a requested standard error, with few network evaluations.

Minus the ELBO of an image is :math:`L_T + \sum_{t=1}^{T} L_{t-1}`, the expected terms of DDPM's bound. The loop over all t
spends T network evaluations on an image, where most of the variance is often between images, or at a few t. Here an image
gets few timesteps, drawn by systematic sampling from a density p over 1..T, and the rest is arithmetic that costs no network:

.. math::

    Y = L_T + \sum_{t=1}^{T} m_t + \sum_{j=1}^{c} \frac{L_{t_j - 1} - \beta_{t_j} h - m_{t_j}}{c\, p_{t_j}},
    \qquad t_j = F^{-1}\big((u + j - 1) / c\big), \quad u \sim U(0, 1)

:math:`m_t`, the mean curve, makes Y a difference estimator; h is a control variate, a Wiener filter's squared error minus its
expectation (:class:`Wiener`); :math:`p_t \propto` the root mean square of what is left (Neyman's allocation). A pilot
estimates :math:`m, \beta, p`; Y is unbiased whatever it says, because E h = 0 and a step is drawn c p_t times on average.

Each image gets two independent Y, from which the two standard errors come, and their mean is the image's estimate:

* ``se_examples``, from the spread over images: the error about the population that the pool was drawn from;
* ``se_noise``, from the differences between the two: the error about the mean of these very images.

The sample shares neither images (over the population) nor noise with the pilot. It comes in two stages: the pilot sizes the
first, a quarter, and the first sizes the second, once. Sampling until the error looks small enough would favour samples that
underestimate it. The one look leaves the mean of given images unbiased, since their number is fixed; about the population the
bias is at most the skewness of Y over :math:`\sqrt n` in standard errors, and intervals cover (``tests/test_budget.py``).

The cost of se^2 is c (S^2 + V_c), S^2 between images and V_c of an image's estimate. With independent timesteps V_c = V_1 / c,
so that c = 1 is the cheapest; systematic ones fall faster, but seldom by enough. c grows when the pool runs out of images.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 5. https://arxiv.org/abs/2006.11239
    Sampling Techniques (Cochran, 3rd ed., 1977), sections 5.5 (allocation), 7.2 (difference estimator), 8.1 (systematic).
    Improved DDPM (Nichol and Dhariwal, 2021), eq. 18 (importance sampling of t). https://arxiv.org/abs/2102.09672
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import draws
from .._tensor import check_event, take_rows, to_network
from ..diffusion import GaussianDiffusion
from ..errors import DataError, OptionError, ShapeError, check_option

__all__ = ["Design", "ELBOEstimate", "Moments", "Wiener", "estimate_elbo", "t_quantile", "terms"]

OVER = ("examples", "noise")
REPLICATES = 2  # independent estimates per image: the fewest from which an error over noise can be told
UNIFORM_SHARE = 0.05  # of p: no weight exceeds T / this, however wrong the pilot; costs at most so much of the variance
MIN_PILOT = 4
MIN_IMAGES = 64  # a t interval over fewer skewed values covers too little
TINY = 1e-280  # against 0 / 0 where nothing varies
HOPELESS = 4  # a pool this many times too small, by the pilot, is refused before the first stage
FIRST_STAGE = 0.25  # of the sample: enough to measure its variance, little enough that the pilot's error does no harm

Noise = Callable[[Sequence[int]], Tensor]
"""Standard normal noise of a shape."""


class Moments(NamedTuple):
    """What the pilot saw of the terms L_{t-1}, in nats; each ``[G]``.

    Attributes:
        t: the timesteps.
        mean: averages.
        noise: variance over noise, given the image, averaged over images: v_t.
        residual: the same of what the control variate leaves.
        images: variance over images of the expectation over noise (an unbiased estimate, which can be negative).
    """

    t: Tensor
    mean: Tensor
    noise: Tensor
    residual: Tensor
    images: Tensor


class Design(NamedTuple):
    """How an image's bound is estimated: the constants of Y; nats.

    Attributes:
        p: density over timesteps, ``[T]``.
        c: timesteps per estimate.
        mean: m, ``[T]``.
        slope: beta, ``[T]``.
    """

    p: Tensor
    c: int
    mean: Tensor
    slope: Tensor

    def steps(self, u: Tensor) -> Tensor:
        """Systematic sampling: the timesteps of offsets ``u`` in [0, 1): int64 ``[*u.shape, c]``, values in 1..T."""
        points = (u[..., None] + torch.arange(self.c, device="cpu")) / self.c
        return torch.searchsorted(self.p.cumsum(0), points, right=True).clamp(max=len(self.p) - 1) + 1

    def estimate(self, t: Tensor, term: Tensor, h: Tensor) -> Tensor:
        """Y less the prior term, from terms and control variates at timesteps t: ``[..., c]`` to ``[...]``."""
        i = t - 1
        return self.mean.sum() + ((term - self.slope[i] * h - self.mean[i]) / (self.c * self.p[i])).sum(-1)


@dataclass(frozen=True)
class ELBOEstimate:
    r"""Minus the ELBO of a data set, in bits per dim.

    Attributes:
        mean: the estimate.
        se_examples: standard error about the mean of the population that the pool was drawn from.
        se_noise: standard error, over timesteps and noise, about the mean of the images ``rows``.
        df_examples, df_noise: degrees of freedom of the two (Satterthwaite's for the second).
        se: the standard error asked for, in bits per dim.
        over: which of the two it was asked of.
        rows: the images used, as rows of the pool, ``[n]``.
        timesteps: timesteps per image, on average: twice c, which may differ between the stages.
        network_evaluations: of one image at one timestep, those of the pilot included.
        pilot_evaluations: those of the pilot.
        probabilities: p_t, ``[T]``.
        moments: of the terms at the pilot's timesteps.
        loop_evaluations: what the loop over all T steps would take for the same ``se_examples``, by these estimates.
        noise_gain: what that loop would take for the same ``se_noise``, over the evaluations of the sample (without the
            pilot).
        noise_gain_limit: :math:`T \sum v_t / (\sum \sqrt{v_t})^2`, the most that the choice of timesteps alone can gain
            (Cauchy-Schwarz); the control variate goes beyond it.
        seconds: wall time.
    """

    mean: float
    se_examples: float
    se_noise: float
    df_examples: float
    df_noise: float
    se: float
    over: str
    rows: Tensor = field(repr=False)
    timesteps: float
    network_evaluations: int
    pilot_evaluations: int
    probabilities: Tensor = field(repr=False)
    moments: Moments = field(repr=False)
    loop_evaluations: float
    noise_gain: float
    noise_gain_limit: float
    seconds: float

    @property
    def images(self) -> int:
        """Number of images used, n."""
        return len(self.rows)

    @property
    def gain(self) -> float:
        """Network evaluations of the T-step loop at the same ``se_examples``, over those made, pilot included."""
        return self.loop_evaluations / self.network_evaluations

    def interval(self, over: str | None = None) -> tuple[float, float]:
        """The 95 % interval, bits per dim: about the population (``"examples"``) or about these images (``"noise"``).

        Args:
            over: which; default: what the estimate was made for.
        """
        over = self.over if over is None else over
        check_option("over", over, OVER)
        se, df = (self.se_examples, self.df_examples) if over == "examples" else (self.se_noise, self.df_noise)
        half = t_quantile(df) * se
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        return (
            f"{self.mean:.4f} bits/dim (± {self.se_examples:.4f} over images, ± {self.se_noise:.4f} over noise), "
            f"{self.images:,} images, {self.network_evaluations:,} network evaluations ({self.pilot_evaluations:,} of the pilot)\n"
            f"the T-step loop: about {self.loop_evaluations:,.0f} ({self.gain:.0f} times as many); "
            f"gain over noise about {self.noise_gain:.0f} (by choice of t alone at most about {self.noise_gain_limit:.0f})"
        )


def estimate_elbo(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    se: float,
    over: str = "examples",
    *,
    pilot: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> ELBOEstimate:
    """Minus the ELBO of a data set, to a standard error.

    The sample is planned for ``se``; what it reaches is reported, and differs by a few per cent.

    Args:
        diffusion: the model; its network runs in evaluation mode, without gradients.
        x0: the pool, ``[N, *event]``, on any device.
        se: the standard error to reach, in bits per dim.
        over: ``"examples"``: as few images and timesteps as reach ``se_examples``. Each image is used at most once, and none
            of the pilot's, so that they are a random sample of the population that the pool was drawn from. ``"noise"``: all
            images, and as few timesteps as reach ``se_noise`` (at least two per image).
        pilot: images of the pilot, each evaluated twice at some 16 timesteps; default 16, or half of a smaller pool.
        seed: of the images, timesteps and noise; the global generators are neither used nor changed.
        batch_size: rows of a network call; the estimate does not depend on it, up to the network's rounding.
        progress: show a progress bar after two seconds.
        cond: passed to the network: a row per image of the pool, or values without batch dim for all.

    Raises:
        OptionError: an option outside its set.
        ShapeError: images of another shape than the model's, or fewer than 8.
        DataError: the pool is too small for ``se``, or holds values that are not the model's.
    """
    started, T = time.perf_counter(), diffusion.schedule.length
    check_option("over", over, OVER)
    check_event("x0", x0, diffusion.event_shape)
    if x0.dim() != 1 + len(diffusion.event_shape) or len(x0) < 2 * MIN_PILOT:
        raise ShapeError(
            f"x0 has shape {list(x0.shape)}, not [N, *{list(diffusion.event_shape)}] with N >= {2 * MIN_PILOT}"
        )
    if not 0 < se < math.inf:
        raise OptionError(f"se={se!r} is not a positive number of bits per dim")
    if pilot is None:
        pilot = min(16, len(x0) // 2)
    if not MIN_PILOT <= pilot <= len(x0) // 2:
        raise OptionError(f"pilot={pilot!r} is not in {MIN_PILOT}..{len(x0) // 2}, half of the pool")
    if not 0 <= seed < 2**63 or batch_size < 1 or T < 2:
        raise OptionError(
            f"seed={seed!r} is not in 0..2**63 - 1, or batch_size={batch_size!r} not >= 1, or T={T} not >= 2"
        )
    diffusion.reverse_kernel.check_grid("x0", x0)
    if not x0.isfinite().all():
        raise DataError("x0 holds NaN or infinite values")
    x0, cond = to_network(diffusion.net, x0, cond)
    choice, stream = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    dtype = np.float64 if x0.dtype == torch.float64 else np.float32
    unit = diffusion.event_shape.numel() * math.log(2)
    order = torch.from_numpy(choice.permutation(len(x0)))
    wiener = Wiener.of(diffusion, x0[order[:1024].to(x0.device)])
    bar = tqdm(total=0, desc="bound", unit="evaluation", delay=2, disable=not progress, dynamic_ncols=True, leave=False)

    def noise(shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(stream.standard_normal(tuple(shape), dtype=dtype)).to(x0)

    def evaluate(rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        bar.total = bar.n + t.numel()
        return terms(diffusion, x0, rows, t, wiener, noise, batch_size, bar.update, **cond)

    def sample(rows: Tensor, design: Design) -> Tensor:
        t = design.steps(torch.from_numpy(choice.random((REPLICATES, len(rows)))))
        return prior[rows] + design.estimate(t, *evaluate(rows[:, None], t))

    with diffusion.evaluating(), torch.no_grad(), bar:
        grid = _grid(T)
        prior = torch.cat([draws.prior(diffusion, x, torch.zeros_like)[1].analytic for x in x0.split(batch_size)])
        at = grid.expand(REPLICATES, pilot, -1)
        plan = _Plan.of(T, grid, *evaluate(order[:pilot, None], at), prior[order[:pilot]])
        pool = order[pilot:] if over == "examples" else order
        size = partial(_size, over=over, target=(se * unit) ** 2, available=len(pool))
        n, c = size(plan)
        _check_size(n, len(pool), HOPELESS, se)
        least = MIN_IMAGES // 2 if over == "examples" else MIN_PILOT
        first = min(len(pool), max(least, math.ceil(FIRST_STAGE * min(n, len(pool)))))
        design = plan.design._replace(c=c)
        y = sample(pool[:first], design)
        n, more = size(plan.revised(y, c), spent=first, c_spent=c)
        _check_size(n, len(pool), 1, se)
        if n > first:
            y = torch.cat([y, sample(pool[first:n], design._replace(c=more))], 1)
    y = y / unit
    made = REPLICATES * (first * c + (n - first) * more)
    per_image, given = y.mean(0), y.var(0) / REPLICATES
    variance, noise_variance = per_image.var() / n + TINY, given.sum() / n**2 + TINY
    v = plan.noise / unit**2
    loop_variance = (n * (variance - noise_variance)).clamp(min=0) + v.sum()  # between images, and over noise
    return ELBOEstimate(
        mean=per_image.mean().item(),
        se_examples=variance.sqrt().item(),
        se_noise=noise_variance.sqrt().item(),
        df_examples=n - 1,
        df_noise=2 * n * ((given.mean() ** 2 + TINY) / (given.var() + TINY)).item(),
        se=se,
        over=over,
        rows=pool[:n],
        timesteps=made / n,
        network_evaluations=made + at.numel(),
        pilot_evaluations=at.numel(),
        probabilities=design.p,
        moments=plan.moments,
        loop_evaluations=T * (loop_variance / variance).item(),
        noise_gain=T * (v.sum() / (noise_variance * made)).item(),
        noise_gain_limit=T * (v.sum() / v.sqrt().sum() ** 2).item(),
        seconds=time.perf_counter() - started,
    )


# ---------------------------------------------------------------------- the terms and their control variate


def terms(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    rows: Tensor,
    t: Tensor,
    wiener: Wiener,
    noise: Noise,
    batch_size: int = 256,
    advance: Callable[[int], object] = lambda n: None,
    **cond: Tensor,
) -> tuple[Tensor, Tensor]:
    """A draw of L_{t-1}, with its analytic KL, and of h: one network evaluation for each element of ``t``.

    Args:
        diffusion: the model.
        x0: the pool, ``[N, *event]``.
        rows: images, broadcasting with ``t``.
        t: timesteps, integers 1..T.
        wiener: the control variate.
        noise: called with the shape of each batch of x_t.
        batch_size: rows of a network call.
        advance: called with the number of evaluations just made.
        cond: passed to the network, a row per image of the pool.

    Returns:
        The terms, nats, and h, each of the shape of ``t``, float64.
    """
    shape, q = t.shape, diffusion.forward_process
    rows, t = (z.flatten().to(x0.device) for z in (rows.expand(shape), t))
    found = []
    for part, at in zip(rows.split(batch_size), t.split(batch_size), strict=True):
        x, eps = x0[part], noise((len(part), *x0.shape[1:]))
        law = q.marginal(x, at)
        x_t = law.mean + law.stddev * eps
        own = take_rows(diffusion.net, cond, part, len(x0))
        found.append((draws.steps(diffusion, x, at, torch.zeros_like, x_t, **own).analytic, wiener(x, eps, at)))
        advance(len(part))
    term, h = (torch.cat(z).reshape(shape) for z in zip(*found, strict=True))
    return term, h


class Wiener(NamedTuple):
    r"""The squared error of the best linear denoiser of the pool, less its expectation over noise, in units of its deviation.

    In the principal axes of the pool, with variances :math:`\lambda` and :math:`x_t = \alpha x_0 + \sigma e`, the denoiser
    multiplies by :math:`k = \alpha \lambda / (\alpha^2 \lambda + \sigma^2)`, and

    .. math:: h \propto \sum_d k_d^2 \sigma^2 (e_d^2 - 1) - 2 (1 - k_d \alpha)\, k_d \sigma\, x_{0,d}\, e_d .

    Its mean over e is 0 whatever the axes and variances are; they decide only how closely it follows a network's error.

    Attributes:
        mean: of the pool, ``[D]``.
        axes: ``[D, K]``.
        variances: along the axes, ``[K]``.
        log_snr: of steps 1..T (averaged over the event, as networks see it), ``[T]``.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    log_snr: Tensor

    @classmethod
    def of(cls, diffusion: GaussianDiffusion, x0: Tensor) -> Wiener:
        """From images ``[n, *event]``."""
        flat = x0.flatten(1).double().cpu()
        _, singular, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        log_snr = diffusion.schedule.log_snr(torch.arange(1, diffusion.steps + 1, device=x0.device)).detach()
        log_snr = log_snr.double().cpu().reshape(diffusion.steps, -1).mean(1)
        return cls(flat.mean(0), axes.T, singular**2 / (len(flat) - 1), log_snr)

    def __call__(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The variate of images and noise ``[b, *event]`` at steps ``[b]``: ``[b]``, float64."""
        e, z = eps.flatten(1).double().cpu() @ self.axes, (x0.flatten(1).double().cpu() - self.mean) @ self.axes
        log_snr = self.log_snr[t.cpu() - 1, None]
        alpha2, sigma2 = log_snr.sigmoid(), (-log_snr).sigmoid()
        signal = alpha2 * self.variances
        kept = signal / (signal + sigma2)  # k alpha
        square, cross = kept**2 * sigma2 / alpha2, (1 - kept) * kept * (sigma2 / alpha2).sqrt()
        h = (square * (e**2 - 1) - 2 * cross * z * e).sum(-1)
        return h / (2 * square**2 + 4 * cross**2 * self.variances).sum(-1).clamp(min=TINY).sqrt()


# ---------------------------------------------------------------------- planning


def _grid(T: int) -> Tensor:
    """The pilot's timesteps: 1, 2, T, and others in arithmetic and in geometric progression."""
    every = np.concatenate([[1], np.linspace(2, T, 9), np.geomspace(2, T, 9)])
    return torch.from_numpy(np.unique(every.round().astype(np.int64)))


class _Plan(NamedTuple):
    """What the pilot says; nats.

    Attributes:
        design: the design, but for c.
        moments: at the pilot's timesteps.
        noise: v_t, ``[T]``.
        images: variance of minus the ELBO over images.
        variances: of Y given the image, by c up to T.
    """

    design: Design
    moments: Moments
    noise: Tensor
    images: float
    variances: dict[int, float]

    @classmethod
    def of(cls, T: int, grid: Tensor, term: Tensor, h: Tensor, prior: Tensor) -> _Plan:
        """From the pilot's terms and control variates ``[R, M, G]``, and its images' prior terms ``[M]``."""
        every = np.arange(1, T + 1)
        along = torch.from_numpy(np.stack([np.interp(every, grid, e) for e in np.eye(len(grid))]))  # [G, T]

        def spread(variance: Tensor) -> Tensor:
            """None is 0: what is interpolated is its logarithm."""
            return variance.clamp(min=1e-8 * variance.max().item() + TINY)

        def interpolated(variance: Tensor) -> Tensor:
            return (spread(variance).log() @ along).exp()

        total = term.var((0, 1))
        slope = ((term - term.mean((0, 1))) * h).mean((0, 1)) / (h.square().mean((0, 1)) + TINY)
        left = term - slope * h
        mean, residual = left.mean((0, 1)), left.var(0).mean(0)
        moments = Moments(
            grid, term.mean((0, 1)), term.var(0).mean(0), residual, left.mean(0).var(0) - residual / REPLICATES
        )
        p = interpolated(left.var((0, 1))).sqrt()
        p = (1 - UNIFORM_SHARE) * p / p.sum() + UNIFORM_SHARE / T
        design = Design(p, 1, mean @ along, (slope / spread(total).sqrt()) @ along * interpolated(total).sqrt())
        curves = (left - mean) @ along
        images = torch.cov(curves.sum(-1) + prior)[0, 1].clamp(min=0).item()
        noise = (interpolated(residual) / p).sum().item()
        variances = {c: _between_offsets(design._replace(c=c), curves) + noise / c for c in _counts(T)}
        return cls(design, moments, interpolated(moments.noise), images, variances)

    def revised(self, y: Tensor, c: int) -> _Plan:
        """By the variances of a first sample ``[R, n]``, drawn at c."""
        noise = y.var(0).mean().item()
        images = max(0.0, y.mean(0).var().item() - noise / REPLICATES)
        scale = noise / self.variance(c)
        return self._replace(images=images, variances={k: scale * v for k, v in self.variances.items()})

    def variance(self, c: int) -> float:
        """Variance of Y given the image; beyond T nothing but noise is left."""
        largest = max(self.variances)
        return self.variances[c] if c <= largest else self.variances[largest] * largest / c


def _size(plan: _Plan, over: str, target: float, available: int, spent: int = 0, c_spent: int = 1) -> tuple[int, int]:
    """Images in all and timesteps per estimate of those to come, for a squared standard error ``target``.

    Over noise, all images with the fewest timesteps. Over examples the cheapest pair that fits into those available; where
    none does, a c with which images are about as few as with any. ``spent`` images have had ``c_spent`` timesteps.
    """
    used = plan.variance(c_spent) / REPLICATES
    if over == "noise":
        left = (target * available**2 - spent * used) / max(1, available - spent)
        if spent:  # the first stage may have used up the target
            left = max(left, used / 8)
        return available, next(c for c in _counts() if plan.variance(c) <= REPLICATES * left)
    sizes = []
    for c in plan.variances:
        each = plan.images + plan.variance(c) / REPLICATES  # (spent (images + used) + (n - spent) each) / n^2 = target
        root = math.sqrt(max(0.0, each**2 + 4 * target * spent * (plan.images + used - each)))
        sizes.append((max(spent, min(MIN_IMAGES, available), math.ceil((each + root) / (2 * target))), c))
    fewest, _ = min(sizes)
    fitting = [(n, c) for n, c in sizes if n <= available] or [(n, c) for n, c in sizes if n <= 1.1 * fewest]
    return min(fitting, key=lambda nc: (nc[0] - spent) * nc[1])


def _check_size(n: int, available: int, factor: float, se: float) -> None:
    if n > factor * available:
        raise DataError(
            f"se={se:.3g} takes about {n:,} images at any number of timesteps, and the pool has {available:,} beside the "
            f"pilot's, which reach about {se * math.sqrt(n / available):.3g} bits/dim; ask for that, bring more images, or ask "
            "for the error over='noise', of these images alone"
        )


def _between_offsets(design: Design, curves: Tensor) -> float:
    """Variance over the offset of systematic sampling, averaged over images.

    Args:
        design: the design.
        curves: the terms less the mean curve, ``[R, M, T]``; noise is not shared between the R = 2, so that their product
            has none.
    """
    t = design.steps((torch.arange(32, dtype=torch.float64, device="cpu") + 0.5) / 32)
    a, b = (curves[..., t - 1] / (design.c * design.p[t - 1])).sum(-1)
    return ((a * b).mean(-1) - a.mean(-1) * b.mean(-1)).mean().clamp(min=0).item()


def _counts(largest: float = math.inf) -> Iterator[int]:
    """1, 2, 3, ..., in steps of a tenth from 20 on, up to ``largest``."""
    c = 1
    while c <= largest:
        yield c
        c += max(1, c // 10)


def t_quantile(df: float) -> float:
    """The 97.5 % quantile of Student's t, to 1 % from 2 degrees of freedom on, to 2e-4 from 5.

    References:
        Handbook of Mathematical Functions (Abramowitz and Stegun, 1964), 26.7.5.
    """
    z = NormalDist().inv_cdf(0.975)
    return z + sum(
        float(np.polyval(coefficients, z * z)) * z / (divisor * df**k)
        for k, (divisor, coefficients) in enumerate(
            [(4, [1, 1]), (96, [5, 16, 3]), (384, [3, 19, 17, -15]), (92160, [79, 776, 1482, -1920, -945])], start=1
        )
    )
