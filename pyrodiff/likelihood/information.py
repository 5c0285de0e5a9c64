r"""The information identity (I-MMSE): minus log p(x_0) as an integral of the denoising error over log-SNR.

Let :math:`x_\lambda = \alpha x_0 + \sigma \epsilon` at log-SNR :math:`\lambda`, :math:`p_\lambda` its law, and

.. math:: e(x_0, \lambda) = \tfrac12\, e^\lambda\, E_\epsilon \lVert x_0 - \hat x_0(x_\lambda, \lambda) \rVert^2 .

For the exact denoiser :math:`\hat x_0 = E[x_0 \mid x_\lambda]` the identity holds for every :math:`x_0`,

.. math::

    \frac{d}{d\lambda} KL\big(q(x_\lambda \mid x_0) \,\|\, p_\lambda\big) = e(x_0, \lambda), \qquad
    -\log p(x_0) = KL\big(q(x_{\lambda_T} \mid x_0) \,\|\, p_{\lambda_T}\big)
        + \int_{\lambda_T}^{\lambda_1} e(x_0, \lambda)\, d\lambda
        - E \log p(x_0 \mid x_{\lambda_1}),

where :math:`p(x_0 \mid x_1)` is the exact posterior (the second is Bayes' rule, :math:`-\log p(x_0) = \log q(x_1 \mid x_0)`
:math:`- \log p_1(x_1) - \log p(x_0 \mid x_1)`, averaged over :math:`x_1`). The estimate takes the chain's own ends instead,
:math:`N(0, 1)` for :math:`p_{\lambda_T}` and the decoder for the posterior:

.. math::

    \text{estimate} = KL\big(q(x_T \mid x_0) \,\|\, N(0, 1)\big) + \int_{\lambda_T}^{\lambda_1} e(x_0, \lambda)\, d\lambda
        - E \log p_{\text{decoder}}(x_0 \mid x_1),

which is the limit of the bound as the chain between the same two ends gets more and more steps (VDM, section 5). So

* **for any network, on average over the data**, it exceeds the mean of -log p_data by three terms, none negative:
  :math:`KL(p_{\lambda_T} \| N(0, 1))`, :math:`\tfrac12 \int e^\lambda E \lVert E[x_0 \mid x_\lambda] - \hat x_0 \rVert^2 d\lambda`
  and :math:`E\, KL(p(x_0 \mid x_1) \| \text{decoder})`. For one example it may lie on either side of -log p_data;
* **for the exact denoiser**, the first and the last are all of the difference, and vanish as the ends move out;
* **for each example** it bounds -log p(x_0) of the continuous-time model, the reverse diffusion that this denoiser drives
  from N(0, 1) at :math:`\lambda_T` (Girsanov's theorem). The chain of T steps is another model: this is no bound of its own.

Kong et al.'s form, against a Gaussian with the data's variances :math:`v_d`, is the same integral with other ends:

.. math:: -\log p(x_0) = \tfrac12 \sum_d \log 2 \pi e v_d
    - \int_{-\infty}^{\infty} \Big( \tfrac12 \sum_d \frac{e^\lambda}{1 / v_d + e^\lambda} - e(x_0, \lambda) \Big) d\lambda .

N(0, 1)'s own denoiser :math:`\alpha x_\lambda` integrates over :math:`\lambda < \lambda_T` to the prior term, exactly; and
:math:`x_\lambda / \alpha` over :math:`\lambda > \lambda_1` to VDM's Normal decoder, but for the decoder's own error at its end,
:math:`e(x_0, \lambda_1) - D / 2`.

**Which log-SNR.** A pilot measures e in bins of equal width; a draw has the piecewise constant density
:math:`\pi \propto` the root of e's second moment there, and each example gets C log-SNRs by systematic sampling,
:math:`\lambda_j = F^{-1}((u + j - 1) / C)` with one uniform u. The mean of :math:`e / \pi` is unbiased whatever the pilot saw.

References:
    Mutual Information and Minimum Mean-Square Error in Gaussian Channels (Guo et al., 2005). https://arxiv.org/abs/cs/0412108
    Information-Theoretic Diffusion (Kong et al., 2023), section 2. https://arxiv.org/abs/2302.03792
    Variational Diffusion Models (Kingma et al., 2021), section 5. https://arxiv.org/abs/2107.00630
    Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), theorem 3.
    https://arxiv.org/abs/2101.09258
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import draws
from .._tensor import append_dims, sum_event, take_rows
from ..diffusion import GaussianDiffusion
from ..draws import Noise
from ..errors import OptionError
from .estimate import LogLikelihood, cautions, check, seeded

__all__ = ["Density", "denoising_error", "information"]

BINS = 20  # of the density over log-SNR
UNIFORM_SHARE = 0.05  # of the density: no weight exceeds its uniform value by more than 1 / this
MEANING = (
    "lower bound on the data's log p, on average over data and not for each example "
    "(for each, of the model with T to infinity)"
)


def information(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    *,
    points: int = 16,
    pilot: int = 16,
    repeats: int = 2,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> LogLikelihood:
    """The integral of the denoising error between the chain's ends, with its end terms.

    Takes ``points`` + 1 network evaluations per example and repeat, and 20 ``pilot`` in all.

    Args:
        diffusion: the model, of at least two steps, whose schedule is one for all elements of the event and whose network
            does not predict ``"previous"``; its network runs in evaluation mode, without gradients.
        x0: data, ``[B, *event]``.
        points: log-SNRs per example and repeat, C.
        pilot: draws of the error in each of 20 bins, from which the density over log-SNR comes; 0: uniform, no pilot.
        repeats: R, independent given the pilot.
        seed: of log-SNRs and noise; the global generators are neither used nor changed.
        batch_size: rows of a network call.
        progress: show a progress bar after two seconds.
        cond: passed to the network, a row per example, or values without batch dim for all.

    Returns:
        Minus the estimate above; in its diagnostics ``prior`` ``[B]``, ``integral`` and ``reconstruction`` ``[R, B]``, costs in
        nats; ``edges`` ``[21]`` of the bins in log-SNR, the ``density`` ``[20]`` and the mean ``error`` e ``[20]`` in each (NaN where
        no draw fell); and ``variance_ratio``: variance, given the example, of one uniform log-SNR over that of one drawn by the
        density.

    Raises:
        OptionError, ShapeError, DataError: an argument outside its range.
    """
    check(diffusion, x0, repeats, seed, batch_size)
    schedule, batch = diffusion.schedule, len(x0)
    if schedule.length < 2 or schedule.event_dim:
        raise OptionError(
            f"schedule of {diffusion.steps} steps with event_dim={schedule.event_dim!r}: the integral over log-SNR needs two "
            "steps or more, and one log-SNR for all elements (event_dim=0)"
        )
    if not (isinstance(points, int) and isinstance(pilot, int) and points >= 1 and pilot >= 0):
        raise OptionError(f"points={points!r} must be an integer of at least 1 and pilot={pilot!r} of at least 0")
    started, evaluations = time.perf_counter(), BINS * pilot + repeats * batch * (points + 1)
    choice, noise = np.random.default_rng(seed), seeded(seed, x0)
    bar = tqdm(
        total=evaluations, desc="log-SNR", unit="eval", unit_scale=True, delay=2, disable=not progress, leave=False
    )

    def uniform(*shape: int) -> Tensor:
        return torch.from_numpy(choice.random(shape))

    def each(rows: Tensor, column: Tensor, function: Callable[..., Tensor]) -> Tensor:
        """``function`` of examples and of a number for each, in batches."""
        found = []
        for part, own in zip(rows.split(batch_size), column.split(batch_size), strict=True):
            found.append(function(x0[part], own.to(x0.device), noise, **take_rows(diffusion.net, cond, part, batch)))
            bar.update(len(part))
        return torch.cat(found)

    def errors(rows: Tensor, log_snr: Tensor) -> Tensor:
        return each(rows.flatten(), log_snr.flatten(), partial(denoising_error, diffusion)).reshape(log_snr.shape)

    with diffusion.evaluating(), torch.no_grad(), bar:
        low, high = schedule.log_snr(torch.tensor([diffusion.steps, 1], device=x0.device)).tolist()
        density = Density.uniform(low, high)
        if pilot:
            rows = torch.from_numpy(choice.integers(batch, size=(BINS, pilot)))
            log_snr, _ = density.draw((torch.arange(BINS, device="cpu")[:, None] + uniform(BINS, pilot)) / BINS)
            density = density.fitted(errors(rows, log_snr))
        rows = torch.arange(batch, device="cpu").repeat(repeats)
        log_snr, at = density.draw((torch.arange(points, device="cpu") + uniform(repeats, batch, 1)) / points)
        e = errors(rows.repeat_interleave(points), log_snr)
        reconstruction = each(
            rows, torch.ones_like(rows), lambda *a, **k: draws.steps(diffusion, *a, **k).analytic
        ).unflatten(0, (repeats, batch))
        prior = torch.cat([draws.prior(diffusion, x, torch.zeros_like)[1].analytic for x in x0.split(batch_size)])
    integral = (e / at).mean(-1)
    square = integral.mean(0).square()
    by_uniform, by_density = ((e.square() * w).mean((0, 2)) - square for w in ((high - low) / at, at**-2))
    return LogLikelihood(
        method="immse",
        meaning=MEANING,
        unbiased=False,
        draws=-(prior + integral + reconstruction),
        dims=diffusion.event_shape.numel(),
        network_evaluations=evaluations,
        seconds=time.perf_counter() - started,
        diagnostics={
            "prior": prior,
            "integral": integral,
            "reconstruction": reconstruction,
            "edges": density.edges,
            "density": density.heights,
            "error": density.means(log_snr, e),
            "variance_ratio": by_uniform.sum() / by_density.sum(),
        },
        warnings=cautions(diffusion),
    )


def denoising_error(
    diffusion: GaussianDiffusion, x0: Tensor, log_snr: Tensor, noise: Noise = torch.randn_like, **cond: Tensor
) -> Tensor:
    r""":math:`\tfrac12 e^\lambda \lVert x_0 - \hat x_0 \rVert^2` at one draw of :math:`x_\lambda`: one network call.

    Args:
        x0: ``[N, *event]``.
        log_snr: float64 ``[N]``.
        noise: called once, for :math:`x_\lambda`.
        cond: passed to the network, ``[N, ...]``.

    Returns:
        Nats per unit of log-SNR: float64 ``[N]``, on the CPU.
    """
    event_dim = len(diffusion.event_shape)
    shaped = append_dims(log_snr, event_dim)
    alpha, sigma = shaped.sigmoid().sqrt(), (-shaped).sigmoid().sqrt()
    x = alpha.to(x0.dtype) * x0 + sigma.to(x0.dtype) * noise(x0)
    off = x0 - diffusion.reverse_kernel.denoise_at(x, log_snr, **cond)
    return (0.5 * log_snr.exp() * sum_event(off.double().square(), event_dim)).cpu()


class Density(NamedTuple):
    """A piecewise constant density over log-SNR, in bins of equal width; float64.

    Attributes:
        edges: of the bins, increasing, ``[G + 1]``.
        heights: the density in each, ``[G]``.
    """

    edges: Tensor
    heights: Tensor

    @classmethod
    def uniform(cls, low: float, high: float) -> Density:
        """Between two log-SNRs."""
        edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64, device="cpu")
        return cls(edges, torch.full((BINS,), 1 / (high - low), dtype=torch.float64, device="cpu"))

    def fitted(self, errors: Tensor) -> Density:
        """In proportion to the root mean square of draws in each bin, ``[G, n]``, and a share of the uniform density."""
        root, width = errors.square().mean(1).sqrt(), self.edges.diff()
        share = root / (root * width).sum() if root.any() else self.heights
        return self._replace(heights=(1 - UNIFORM_SHARE) * share + UNIFORM_SHARE / width.sum())

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log-SNRs by the inverse of the distribution function, and the density there: of the shape of ``u`` in [0, 1)."""
        p = self.heights * self.edges.diff()
        above = p.cumsum(0)
        bin_ = torch.searchsorted(above, u, right=True).clamp(max=len(p) - 1)
        return self.edges[bin_ + 1] - (above[bin_] - u) / self.heights[bin_], self.heights[bin_]

    def means(self, log_snr: Tensor, values: Tensor) -> Tensor:
        """Averages of ``values`` at ``log_snr`` in each bin, ``[G]``."""
        bin_ = torch.bucketize(log_snr.flatten(), self.edges[1:-1])
        sums = torch.zeros_like(self.heights).index_add(0, bin_, values.flatten())
        return sums / torch.bincount(bin_, minlength=len(self.heights))
