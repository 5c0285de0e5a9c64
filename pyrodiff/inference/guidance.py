r"""Twists: guesses of :math:`p(y \mid x_t)`; and guidance by their gradients alone, without weights.

Where x_0 given x_t were :math:`N(\hat x_0, V_t)`, a linear observation would have the law

.. math:: p(y \mid x_t) = N(y;\ A \hat x_0,\ A V_t A^\top + \sigma_y^2).

Methods differ in V_t: 0 (DPS), a number (:func:`pigdm`), or what Tweedie's formula says, :math:`V_t = \frac{\sigma_t^2}{\alpha_t}
\frac{\partial \hat x_0}{\partial x_t}` (:func:`mmps`, exact for Gaussian data). As twists of :func:`~pyrodiff.inference.smc.smc` all
of them are consistent. As guidance, which :func:`guided` is, none is: for data N(0, 1), y = 1 and noise variance 1/4 the posterior
is N(0.8, 0.2) and DPS's N(0.98, 0.126).

References:
    Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2022), eq. 11. https://arxiv.org/abs/2209.14687
    Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023), section 3.
    https://openreview.net/forum?id=9_gsMA8MRKQ
    Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al., 2024), section 4.2 (MMPS).
    https://arxiv.org/abs/2405.13712
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion import GaussianDiffusion
from ..errors import OptionError, ShapeError
from .operators import LinearGaussian
from .proposals import Likelihood, Twist
from .smc import Posterior, prepare

__all__ = ["guided", "mmps", "pigdm"]


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


def guided(
    diffusion: GaussianDiffusion,
    log_likelihood: Likelihood,
    n: int,
    *,
    twist: Twist | None = None,
    steps: str | int | Sequence[int] | None = None,
    seed: int | None = None,
    batch_size: int = 256,
    **cond: Any,
) -> Posterior:
    """Samples guided by a twist's gradient: DPS, or with a twist PiGDM and MMPS. A heuristic, and a control for what is none.

    These are the moves of :func:`~pyrodiff.inference.smc.smc` with ``proposal="twisted"``, without their weights. (DPS's own code
    divides the gradient by the residual's norm, and the last step has no noise.)

    Args:
        diffusion, log_likelihood, twist, steps, seed, batch_size, cond: of :func:`~pyrodiff.inference.smc.smc`.
        n: number of samples.

    Returns:
        The samples, with equal weights; its ``log_evidence`` raises, and says why.
    """
    started = time.perf_counter()
    moves, source = prepare(diffusion, log_likelihood, n, "twisted", {"twist": twist}, steps, seed, 1, batch_size, cond)
    T, x = moves.kernel.schedule.length, source.normal()
    with diffusion.evaluating(), torch.no_grad():
        for t in range(T, 0, -1):
            looks, e = (moves.look(part, t) for part in x.split(batch_size)), source.normal()
            x = torch.cat(
                [moves.move(look, part, t - 1)[0] for look, part in zip(looks, e.split(batch_size), strict=True)]
            )
    wild = int((~x.isfinite()).flatten(1).any(1).sum())
    none = torch.full((1, T + 1), math.nan, dtype=torch.float64)
    why = "guidance without weights is a heuristic, whose samples have another law than p(x_0 | y); smc weights the same moves"
    return Posterior(
        method="guided",
        particles=x[None],
        log_weights=x.new_zeros(1, n, dtype=torch.float64),
        ess=none,
        pareto_k=none,
        families=none[:, 0],
        network_evaluations=n * T,
        seconds=time.perf_counter() - started,
        warnings=(why, *([f"{wild} of {n} samples are not finite: the guidance has diverged"] * (wild > 0))),
        no_evidence=why,
    )


def _one(log_snr: Tensor) -> None:
    if log_snr.dim():
        raise ShapeError(
            "a schedule per element has no one variance of x_0 given x_t: take the likelihood as the twist"
        )
