"""azula's samplers on the problems of posterior.py: the same denoiser, the same noise levels, as many network calls.

    pip install --target peer --no-deps azula einops    # without --no-deps it also fetches torchvision and gdown
    PYTHONPATH=peer python benchmarks/posterior.py --azula

What azula leaves to its user is set so as to serve it: TDS's twist is PiGDM's with the data's true scale, MMPS's linear system is
solved exactly (d_y iterations), and each particle of DPS has a residual of its own (azula's takes one norm of the whole batch).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance.dps import DPSSampler
from azula.guidance.mmps import MMPSDenoiser
from azula.guidance.pgdm import PGDMSampler
from azula.guidance.tds import TDSSampler
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import Schedule
from azula.sample import DDPMSampler, Sampler
from torch import Tensor

from pyrodiff.inference.operators import LinearGaussian
from pyrodiff.reverse import ReverseKernel


class Steps(Schedule):
    """The noise levels of a chain's steps 0..T at times 0, 1/T, ..., 1; those of step 0 are 1 and 0."""

    def __init__(self, kernel: ReverseKernel) -> None:
        log_snr = kernel.schedule.log_snr(torch.arange(1, kernel.schedule.steps + 1))
        self.log_snr = torch.cat([log_snr.new_full((1,), torch.inf), log_snr])

    def at(self, t: Tensor) -> Tensor:
        return self.log_snr[(t * (len(self.log_snr) - 1)).round().long()]

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.at(t)
        return log_snr.sigmoid().sqrt().float(), (-log_snr).sigmoid().sqrt().float()


class Exact(Denoiser):
    def __init__(self, kernel: ReverseKernel) -> None:
        super().__init__()
        self.net, self.schedule = kernel.net, Steps(kernel)

    def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
        return DiracPosterior(self.net(x_t, self.schedule.at(t).float().expand(len(x_t))))


def peers(kernel: ReverseKernel, seen: LinearGaussian, n: int, scale: float) -> dict[str, Callable[[], Tensor]]:
    """Samples ``[n, d]`` by each; ``scale``: the data's standard deviation."""
    operator, noise, y = seen.operator, seen.noise_std, seen.y.float()
    denoiser, T = Exact(kernel), kernel.schedule.steps
    pseudo = operator.singular_values.reciprocal()

    def twist(x0_hat: Tensor, sigma: Tensor) -> Tensor:
        return seen.log_prob(x0_hat, float(1 / (scale**-2 + sigma**-2))).to(x0_hat)

    def residuals(x0_hat: Tensor) -> Tensor:
        return torch.linalg.vector_norm(y - operator(x0_hat), dim=1).sum()[None]

    def pseudo_inverse(v: Tensor) -> Tensor:
        v = v.expand(n, -1)
        return operator.from_rows(pseudo.to(v) * operator.to_columns(v))

    moments = MMPSDenoiser(denoiser, y, operator, IsotropicCovariance(noise**2), iterations=len(y))
    options = {"steps": T, "silent": True}
    samplers: dict[str, Sampler] = {
        "azula TDS": TDSSampler(denoiser, twist, **options),
        "azula MMPS": DDPMSampler(moments, **options),
        "azula DPS": DPSSampler(denoiser, torch.zeros(1), residuals, **options),
        "azula PiGDM": PGDMSampler(denoiser, y, operator, pseudo_inverse, eta=1.0, **options),
    }
    return {
        name: lambda sampler=sampler: sampler(sampler.init((n, *operator.event_shape)))
        for name, sampler in samplers.items()
    }
