r"""What the tests compare the library with: closed forms, written from DDPM's formulas and not from ours.

Everything here is numpy in float64 and starts from :math:`\beta_t`; nothing imports a formula from
the library. Arrays over time have T entries, index ``t - 1`` for step t. Notation of the comments:
``ab`` is alpha-bar, ``om = 1 - ab``, a subscript ``_s`` is step t - 1 (``ab = 1``, ``om = 0`` at
step 0), ``c1`` and ``c2`` are DDPM's posterior coefficients (eq. 7), ``bt`` its beta-tilde.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

MEAN, VAR = 0.3, 0.25  # the Gaussian data of the printed reference figures


def linear_betas(steps: int, scale: float | None = None) -> np.ndarray:
    """DDPM's linear betas scaled by 1000 / T, kept inside (0, 1) so that short chains exist too."""
    scale = 1000 / steps if scale is None else scale
    return np.linspace(min(scale * 1e-4, 0.5), min(scale * 0.02, 0.999), steps)


class DDPM:
    """The tables of Ho et al. (2020), from betas."""

    def __init__(self, betas: np.ndarray) -> None:
        self.beta = np.asarray(betas, dtype=np.float64)
        self.steps = len(self.beta)
        log_ab = np.cumsum(np.log1p(-self.beta))
        self.ab, self.om = np.exp(log_ab), -np.expm1(log_ab)
        self.ab_s = np.concatenate([[1.0], self.ab[:-1]])
        self.om_s = np.concatenate([[0.0], self.om[:-1]])
        self.c1 = self.beta * np.sqrt(self.ab_s) / self.om
        self.c2 = np.sqrt(1 - self.beta) * self.om_s / self.om
        self.bt = self.beta * self.om_s / self.om
        self.log_snr = log_ab - np.log(self.om)

    def variances(self, rule: str, output: np.ndarray | None = None) -> np.ndarray:
        """The model's variance at t = 2..T under a rule (entry 0 is a placeholder, 1)."""
        small, large = self.bt.copy(), self.beta
        small[0] = 1.0
        found = {
            "fixed_small": lambda: small,
            "fixed_large": lambda: large,
            "learned": lambda: np.exp(output),
            # Improved DDPM eq. 15: exp(v log beta + (1 - v) log beta-tilde), v = (output + 1) / 2
            "learned_range": lambda: large ** ((output + 1) / 2) * small ** ((1 - output) / 2),
        }[rule]()
        return np.concatenate([[1.0], found[1:]])

    def decoder_variance(self, decoder: str, rule: str = "", output: np.ndarray | None = None) -> float:
        """Variance of p(x_0 | x_1): VDM's om_1 / ab_1, or guided-diffusion's."""
        if decoder == "vdm":
            return float(self.om[0] / self.ab[0])
        if rule == "learned":
            return float(np.exp(output[0]))
        if rule == "learned_range":
            share = (output[0] + 1) / 2
            return float(self.beta[0] ** share * self.bt[1] ** (1 - share))
        return float(self.bt[1])


class LinearModel:
    r"""Closed forms for a linear denoiser :math:`\hat x_0 = A_t x_t + B_t`, per dimension.

    Args:
        ddpm: the tables.
        mean, var: the data's law, N(mean, var).
        gain, bias: an error of the denoiser: ``x0_hat = (1 + gain) E[x_0 | x_t] + bias``.
        variance: the model's variance at each t (index 0 unused).
        decoder_variance: that of p(x_0 | x_1).
    """

    def __init__(
        self,
        ddpm: DDPM,
        variance: np.ndarray,
        decoder_variance: float,
        mean: float = MEAN,
        var: float = VAR,
        gain: float = 0.0,
        bias: float = 0.0,
    ) -> None:
        self.ddpm, self.variance, self.decoder_variance = ddpm, variance, decoder_variance
        self.mean, self.var = mean, var
        self.v = ddpm.ab * var + ddpm.om  # variance of q(x_t)
        k = np.sqrt(ddpm.ab) * var / self.v
        self.A = (1 + gain) * k
        self.B = (1 + gain) * (mean - k * np.sqrt(ddpm.ab) * mean) + bias

    def prior(self, x0: np.ndarray) -> np.ndarray:
        """KL(q(x_T | x_0) || N(0, 1)), per element of x0."""
        ab, om = self.ddpm.ab[-1], self.ddpm.om[-1]
        return 0.5 * (ab * np.asarray(x0) ** 2 + om - 1 - np.log(om))

    def squared_error(self, x0: np.ndarray) -> np.ndarray:
        """E[(x_0 - x0_hat(x_t))^2 | x_0] for every t: ``x0.shape + [T]``."""
        x0 = np.asarray(x0)[..., None]
        bias = x0 - self.A * np.sqrt(self.ddpm.ab) * x0 - self.B
        return bias**2 + self.A**2 * self.ddpm.om

    def diffusion(self, x0: np.ndarray) -> np.ndarray:
        """L_{t-1} for t = 2..T: ``x0.shape + [T - 1]``."""
        bt, c1, var = (z[1:] for z in (self.ddpm.bt, self.ddpm.c1, self.variance))
        error = self.squared_error(x0)[..., 1:]
        return 0.5 * (np.log(var / bt) + bt / var - 1 + c1**2 * error / var)

    def reconstruction(self, x0: np.ndarray) -> np.ndarray:
        """L_0 of a Normal decoder."""
        var = self.decoder_variance
        return 0.5 * np.log(2 * np.pi * var) + self.squared_error(x0)[..., 0] / (2 * var)

    def nelbo(self, x0: np.ndarray) -> np.ndarray:
        return self.prior(x0) + self.diffusion(x0).sum(-1) + self.reconstruction(x0)

    def data_average(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Mean over the data's law of a quadratic function (three Hermite nodes are exact)."""
        nodes, weights = hermite(3)
        return np.tensordot(weights, function(self.mean + math.sqrt(self.var) * nodes), 1)

    @property
    def entropy(self) -> float:
        return 0.5 * math.log(2 * math.pi * math.e * self.var)

    @property
    def exact_variance(self) -> np.ndarray:
        """Variance of the exact reverse kernel q(x_{t-1} | x_t), data averaged out."""
        v_s = np.concatenate([[self.var], self.v[:-1]])
        return self.ddpm.beta * v_s / self.v

    @property
    def gap(self) -> float:
        """NELBO minus entropy by path KL: right for the exact denoiser only."""
        m_T, v_T = math.sqrt(self.ddpm.ab[-1]) * self.mean, self.v[-1]
        ratio = self.exact_variance / np.concatenate([[self.decoder_variance], self.variance[1:]])
        return float(0.5 * (v_T + m_T**2 - 1 - np.log(v_T)) + 0.5 * (ratio - 1 - np.log(ratio)).sum())

    def steps_of_the_chain(self) -> list[tuple[float, float, float]]:
        """(A, B, variance) of x_{t-1} = A x_t + B + noise, for t = 1..T; t = 1 is the decoder."""
        A = self.ddpm.c1 * self.A + self.ddpm.c2
        B = self.ddpm.c1 * self.B
        var = np.concatenate([[self.decoder_variance], self.variance[1:]])
        return list(zip(A.tolist(), B.tolist(), var.tolist(), strict=True))

    def marginal(self, last_variance: float | None = None) -> tuple[float, float]:
        """The model's own law of x_0, N(mu_0, V_0), by running its linear recursion."""
        mu, V = 0.0, 1.0
        chain = self.steps_of_the_chain()
        for t in range(self.ddpm.steps, 0, -1):
            A, B, var = chain[t - 1]
            if t == 1 and last_variance is not None:
                var = last_variance
            mu, V = A * mu + B, A**2 * V + var
        return mu, V

    def log_density(self, x0: np.ndarray) -> np.ndarray:
        """log p_theta(x_0), exactly."""
        mu, V = self.marginal()
        return -0.5 * (np.log(2 * np.pi * V) + (np.asarray(x0) - mu) ** 2 / V)


def hermite(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (adding up to 1) for the mean over N(0, 1); exact to degree 2n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / weights.sum()


# ---------------------------------------------------------------------- networks


class Denoiser(nn.Module):
    """A network ``net(x, log_snr)`` with a known E[x_0 | x_t], told in one of five coordinates.

    Args:
        prediction: the coordinate.
        betas: needed by ``"previous"`` and by a variance output: log-SNR is looked up in them.
        variance_output: numbers ``[T]``: the second half of the channels at each t.
        gain, bias: an error, ``x0_hat = (1 + gain) E[x_0 | x_t] + bias``.
    """

    def __init__(
        self,
        prediction: str = "x0",
        betas: np.ndarray | None = None,
        variance_output: np.ndarray | None = None,
        gain: float = 0.0,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.prediction, self.gain, self.bias = prediction, gain, bias
        self.ddpm = None if betas is None else DDPM(betas)
        self.variance_output = variance_output

    def posterior_mean(self, x: Tensor, alpha: Tensor, var: Tensor) -> Tensor:
        """E[x_0 | x_t = x] where x_t = alpha x_0 + N(0, var)."""
        raise NotImplementedError

    def index(self, log_snr: Tensor) -> np.ndarray:
        """t - 1 of each row; float32 log-SNR is near enough."""
        seen, table = log_snr.detach().double().numpy(), self.ddpm.log_snr
        between = (table[1:] + table[:-1]) / 2
        found = np.searchsorted(-between, -seen)
        assert np.abs(table[found] - seen).max() < 1e-3, "the network is shown a log-SNR of no step"
        return found

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        def shaped(values: Tensor | np.ndarray) -> Tensor:
            values = torch.as_tensor(values, dtype=x.dtype)
            return values.reshape(-1, *(1,) * (x.dim() - 1))

        alpha2, var = shaped(torch.sigmoid(log_snr)), shaped(torch.sigmoid(-log_snr))
        alpha, sigma = alpha2.sqrt(), var.sqrt()
        x0 = (1 + self.gain) * self.posterior_mean(x, alpha, var) + self.bias
        eps = (x - alpha * x0) / sigma
        if self.prediction == "previous":
            i = self.index(log_snr)
            output = shaped(self.ddpm.c1[i]) * x0 + shaped(self.ddpm.c2[i]) * x
        else:
            output = {"x0": x0, "eps": eps, "score": -eps / sigma, "v": alpha * eps - sigma * x0}[self.prediction]
        if self.variance_output is None:
            return output
        more = shaped(self.variance_output[self.index(log_snr)]).expand(output.shape)
        return torch.cat([output, more], dim=1)


class GaussianDenoiser(Denoiser):
    """Exact for data N(mean, var) in each dimension."""

    def __init__(self, *args: object, mean: float = MEAN, var: float = VAR, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.mean, self.var = mean, var

    def posterior_mean(self, x: Tensor, alpha: Tensor, var: Tensor) -> Tensor:
        k = alpha * self.var / (alpha**2 * self.var + var)
        return self.mean + k * (x - alpha * self.mean)


class MixtureDenoiser(Denoiser):
    """Exact for data from a mixture of Gaussians, independently in each dimension."""

    def __init__(self, weights: list[float], means: list[float], variances: list[float], *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts = [torch.tensor(z, dtype=torch.float64) for z in (weights, means, variances)]

    def posterior_mean(self, x: Tensor, alpha: Tensor, var: Tensor) -> Tensor:
        w, m, S = self.parts
        alpha, var, off = alpha[..., None], var[..., None], x[..., None] - alpha[..., None] * m
        C = alpha**2 * S + var
        r = torch.softmax(w.log() - 0.5 * off**2 / C - 0.5 * C.log(), -1)
        return (r * (m + alpha * S / C * off)).sum(-1)


class GridDenoiser(Denoiser):
    """Exact for discrete data: ``values`` with probabilities ``pmf``."""

    def __init__(self, values: Tensor, pmf: Tensor, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.values, self.log_pmf = values, pmf.log()

    def posterior_mean(self, x: Tensor, alpha: Tensor, var: Tensor) -> Tensor:
        # log of N(x; alpha v, var) up to what all v share
        v = self.values
        score = (alpha / var)[..., None] * (x[..., None] - 0.5 * alpha[..., None] * v) * v
        return torch.softmax(self.log_pmf + score, -1) @ v
