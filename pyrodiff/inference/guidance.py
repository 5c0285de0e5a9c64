r"""Twists: guesses of :math:`p(y \mid x_t)`; and guidance by their gradients alone, without weights.

Where x_0 given x_t were :math:`N(\hat x_0, V_t)`, a linear observation would have the law

.. math:: p(y \mid x_t) = N(y;\ A \hat x_0,\ A V_t A^\top + \sigma_y^2).

Methods differ in V_t: 0 (DPS), a number (:func:`pigdm`), or what Tweedie's formula says, :math:`V_t = \frac{\sigma_t^2}{\alpha_t}
\frac{\partial \hat x_0}{\partial x_t}` (:func:`mmps`, exact for Gaussian data). As twists of :func:`~pyrodiff.inference.smc.smc` all
of them are consistent, and so is what a classifier of noisy examples says (:func:`class_label`). As guidance, which :func:`guided`
and :func:`repaint` are, none is: for data N(0, 1), y = 1 and noise variance 1/4 the posterior is N(0.8, 0.2) and DPS's
N(0.98, 0.126).

References:
    Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2022), eq. 11. https://arxiv.org/abs/2209.14687
    Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023), section 3.
    https://openreview.net/forum?id=9_gsMA8MRKQ
    Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al., 2024), section 4.2 (MMPS).
    https://arxiv.org/abs/2405.13712
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), algorithms 1, 2. https://arxiv.org/abs/2105.05233
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..classifier import NoisyClassifier
from ..diffusion import GaussianDiffusion
from ..errors import OptionError, ShapeError, check_option
from ..sample import Kernel, ddim
from .operators import LinearGaussian
from .proposals import Likelihood, Replacement, Twist
from .smc import Posterior, prepare

__all__ = ["class_label", "guided", "mmps", "pigdm", "repaint"]


def pigdm(observation: LinearGaussian, data_std: float = 1.0) -> Twist:
    r"""The twist of PiGDM: :math:`V_t = r_t^2` is the variance of x_0 given x_t where data are :math:`N(0, \tau^2)`.

    Args:
        observation: y.
        data_std: :math:`\tau`; 1 is the paper's.
    """
    if not 0 < data_std < math.inf:
        raise OptionError(f"data_std={data_std!r} is not positive and finite")

    def twist(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        _one(log_snr)
        return observation.log_prob(x0_hat, float(1 / (1 / data_std**2 + log_snr.exp())))

    return twist


def mmps(observation: LinearGaussian) -> Twist:
    r"""The twist of MMPS: the covariance of x_0 given x_t by Tweedie's formula.

    It takes a backward pass for each of the K observed coordinates, and K^2 numbers per particle. The gradient is that of the
    mean; the covariance is held constant in it.

    Args:
        observation: y.
    """
    operator = observation.operator

    def twist(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        _one(log_snr)
        s = observation.singular_values
        observed = s * operator.to_rows(x0_hat).double()
        jacobian = [torch.autograd.grad(observed[:, i].sum(), x_t, retain_graph=True)[0] for i in range(len(s))]
        rows = torch.stack([s * operator.to_rows(row).double() for row in jacobian], 1)  # A J A^T, [N, K, K]
        scale = log_snr.sigmoid().sqrt() * (-log_snr).exp()  # sigma^2 / alpha
        values, vectors = torch.linalg.eigh(scale * (rows + rows.mT) / 2)
        variance = values.clamp(min=0) + observation.noise_std**2
        error = ((observation.target - observed)[:, None] @ vectors)[:, 0]
        return observation.outside - (error.square() / variance + (2 * math.pi * variance).log()).sum(1) / 2

    return twist


def class_label(classifier: NoisyClassifier, y: int) -> tuple[Likelihood, Twist]:
    r"""The observation that x_0 is of class y, by a classifier of noisy examples, and the twist of classifier guidance.

    The classifier knows no x_0, and :math:`p(y \mid x_0)` is what it says at t = 1 of that state's mean,
    :math:`p(y \mid x_1 = \alpha_1 x_0)`. That is the likelihood whose posterior :func:`~pyrodiff.inference.smc.smc` weighs, and whose
    evidence is log p(y). What it says at other steps is a guess of :math:`p(y \mid x_t)`, and may be wrong.

    Args:
        classifier: of the diffusion's schedule, or of one that comes near to each of its log-SNR.
        y: the class.

    Returns:
        The likelihood and the twist.

    Example:
        >>> log_likelihood, twist = class_label(classifier, 3)
        >>> posterior = smc(diffusion, log_likelihood, 500, twist=twist)
    """
    classifier.check_labels("class_label", torch.tensor([y], device="cpu"), 1)
    schedule = classifier.schedule

    def log_likelihood(x0: Tensor) -> Tensor:
        one = torch.tensor(1, device=x0.device)
        x_1 = classifier.forward_process.marginal(x0, one.expand(len(x0))).mean
        return classifier.log_prob(x_1, one, one.new_tensor(y))

    def twist(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        steps = torch.arange(1, schedule.length + 1, device=x_t.device)
        nearest = (schedule.log_snr(steps) - log_snr).abs().reshape(len(steps), -1).sum(1).argmin()
        return classifier.log_prob(x_t, steps[nearest], nearest.new_tensor(y))

    return log_likelihood, twist


def guided(
    diffusion: GaussianDiffusion,
    log_likelihood: Likelihood,
    n: int,
    *,
    proposal: str = "twisted",
    twist: Twist | None = None,
    data_std: float | None = None,
    guidance_scale: float | None = None,
    eta: float | None = None,
    steps: str | int | Sequence[int] | None = None,
    seed: int | None = None,
    batch_size: int = 256,
    **cond: Any,
) -> Posterior:
    """Samples guided by a twist's gradient: DPS, or with a twist PiGDM and MMPS. A heuristic, and a control for what is none.

    These are the moves of :func:`~pyrodiff.inference.smc.smc` without their weights: with ``proposal="bootstrap"`` and a
    ``guidance_scale`` those of classifier-free guidance. (DPS's own code divides the gradient by the residual's norm, and the
    last step has no noise.)

    Args:
        diffusion, log_likelihood, proposal, twist, data_std, guidance_scale, steps, seed, batch_size, cond: of
            :func:`~pyrodiff.inference.smc.smc`.
        n: number of samples.
        eta: None: the moves of the proposal; else DDIM's with that share of the noise, in [0, 1], along the same gradients and to
            the mean of the last step. At 0 nothing is drawn but x_T, and a move has no density that it could be weighted by.

    Returns:
        The samples, with equal weights; its ``log_evidence`` raises, and says why.
    """
    if eta is not None:
        check_option("proposal", proposal, ("bootstrap", "twisted"), " with eta")
        if not 0 <= eta <= 1:
            raise OptionError(f"eta={eta!r} is not in [0, 1]")
    started = time.perf_counter()
    options = {"twist": twist, "data_std": data_std, "guidance_scale": guidance_scale}
    moves, source = prepare(diffusion, log_likelihood, n, proposal, options, steps, seed, 1, batch_size, cond)

    def step(x: Tensor, noise: Tensor, t: int) -> Tensor:
        if eta is None:
            return moves.move(moves.look(x, t), noise, t - 1)[0]
        mean, std, _ = ddim(cast("Kernel", moves), x, t, None, eta, {})
        return mean + std * noise

    T, x = moves.kernel.schedule.length, source.normal()
    with diffusion.evaluating(), torch.no_grad():
        x = moves.move(moves.begin(x), x, T)[0]
        for t in range(T, 0, -1):
            parts = zip(x.split(batch_size), source.normal().split(batch_size), strict=True)
            x = torch.cat([step(*part, t) for part in parts])
    heuristic = "guidance without weights is a heuristic, whose samples have another law than p(x_0 | y)"
    why = f"{heuristic}; smc weights the same moves"
    if eta == 0:
        why = f"moves without noise have no density, and nothing to be weighted by; {heuristic}"
    elif eta is not None:
        why = f"{heuristic}; smc weights moves of the chain, without eta"
    return _unweighted("guided", x, n * T * moves.calls, T, started, why)


def repaint(
    diffusion: GaussianDiffusion,
    observation: LinearGaussian,
    n: int,
    *,
    jump: int = 10,
    times: int = 10,
    steps: str | int | Sequence[int] | None = None,
    seed: int | None = None,
    batch_size: int = 256,
    **cond: Any,
) -> Posterior:
    r"""RePaint: what y observes of each state is drawn from :math:`q(x_s \mid y)`, the rest from the model. A heuristic.

    The walk down goes back up by :math:`q(x_t \mid x_s)`, over and over, so that the two come to agree. (The last step draws
    x_0, where the paper's takes its mean.)

    Args:
        diffusion, steps, seed, batch_size, cond: of :func:`~pyrodiff.inference.smc.smc`.
        observation: y, which need not be a mask: what a singular vector of the operator sees is replaced. With
            noise the known part is that of data N(0, 1) given y.
        n: number of samples.
        jump: by how many steps the walk goes back, from t = 1, 1 + jump, ...; 1 is the paper's algorithm 1, 10 what it uses.
        times: how often it passes each of them; 1, or as few steps as a jump: no jumps, which is replacement without weights.

    Returns:
        The samples, with equal weights; its ``log_evidence`` raises, and says why.

    References:
        RePaint: Inpainting using Denoising Diffusion Probabilistic Models (Lugmayr et al., 2022), algorithm 1 and appendix B.
        https://arxiv.org/abs/2201.09865
    """
    if not all(isinstance(number, int) and number >= 1 for number in (jump, times)):
        raise OptionError(f"jump={jump!r} and times={times!r} must be whole numbers, at least 1")
    started = time.perf_counter()
    moves, source = prepare(diffusion, observation, n, "replacement", {}, steps, seed, 1, batch_size, cond)
    moves = cast(Replacement, moves)
    kernel, to_rows = moves.kernel, observation.operator.to_rows
    T, calls = kernel.schedule.length, 0
    zero = torch.zeros((), dtype=torch.float64, device=source.like.device)

    def down(x: Tensor, noise: Tensor, t: int) -> Tensor:
        law = kernel(x, t, **moves.cond)
        mean, variance = moves.observed(zero, moves.spread(t - 1, zero), t - 1)
        return moves.replace(law.mean + law.stddev * noise, mean + variance.sqrt() * to_rows(noise).double())

    with diffusion.evaluating(), torch.no_grad():
        x, t = source.normal(), T
        for s in _walk(T, jump, times):
            noise = source.normal()
            if s > t:
                law = kernel.forward_process.transition(x, t, s)
                x = law.mean + law.stddev * noise
            else:
                parts = zip(x.split(batch_size), noise.split(batch_size), strict=True)
                x = torch.cat([down(*part, t) for part in parts])
                calls += 1
            t = s
    why = (
        "RePaint is a heuristic, and its jumps have no density to be weighted by: x_0 is the end of many walks up and down, and "
        'its density an integral over all of them; smc with proposal="replacement" weights a walk without jumps'
    )
    if calls == T:  # one time, or a chain of no more steps than a jump
        why = 'replacement without weights is a heuristic; smc with proposal="replacement" weights it'
    return _unweighted("repaint", x, n * calls, T, started, why)


def _walk(T: int, jump: int, times: int) -> Iterator[int]:
    """The steps that RePaint visits, from T's successor to 0."""
    left, t = dict.fromkeys(range(1, T - jump + 1, jump), times - 1), T
    while t:
        t -= 1
        yield t
        if left.get(t, 0):
            left[t] -= 1
            yield from range(t + 1, t + jump + 1)
            t += jump


def _unweighted(method: str, x: Tensor, evaluations: int, steps: int, started: float, why: str) -> Posterior:
    """Samples that nothing weighs."""
    wild = int((~x.isfinite()).flatten(1).any(1).sum())
    none = torch.full((1, steps + 1), math.nan, dtype=torch.float64, device="cpu")
    return Posterior(
        method=method,
        particles=x[None],
        log_weights=x.new_zeros(1, len(x), dtype=torch.float64),
        ess=none,
        pareto_k=none,
        families=none[:, 0],
        network_evaluations=evaluations,
        seconds=time.perf_counter() - started,
        warnings=(why, *([f"{wild} of {len(x)} samples are not finite: the guidance has diverged"] * (wild > 0))),
        no_evidence=why,
    )


def _one(log_snr: Tensor) -> None:
    if log_snr.dim():
        raise ShapeError(
            "a schedule per element has no one variance of x_0 given x_t: take the likelihood as the twist"
        )
