"""What float32 costs: the bound, KLs, schedules, and what bfloat16 autocast must leave alone."""

from __future__ import annotations

import importlib
import math

import mpmath
import pyro
import pytest
import torch
from oracles import GaussianDenoiser
from pyro import poutine
from test_closed_forms import gaussian, linear_betas
from torch import nn
from torch.distributions import kl_divergence

import pyrodiff
from pyrodiff import (
    CosineSchedule,
    ForwardProcess,
    GaussianDiffusion,
    LinearSchedule,
    LogLinearSchedule,
    elbo_terms,
    nets,
)
from pyrodiff.distributions import Gaussian
from pyrodiff.elbo import site_terms
from pyrodiff.training.ema import EMA

sampling = importlib.import_module("pyrodiff.sample")
F32, F64 = torch.float32, torch.float64

# ---------------------------------------------------------------------- the bound


def single_noise(monkeypatch):
    """Draws in any dtype from the same float32 numbers."""

    def rsample(self, sample_shape=()):
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=F32)
        return self.mean + self.stddev * noise.to(self.loc.dtype)

    monkeypatch.setattr(Gaussian, "rsample", rsample)


CHAINS = {
    "linear, eps": (LinearSchedule(1000), "eps", "fixed_small"),
    "cosine, x0": (CosineSchedule(1000), "x0", "fixed_small"),
    "log-linear, v": (LogLinearSchedule(1000, -12.0, 12.0), "v", "fixed_small"),
    "linear, v": (LinearSchedule(1000), "v", "fixed_large"),
    "log-linear, previous": (LogLinearSchedule(1000, -6.0, 6.5), "previous", "fixed_large"),
}
FAST = list(CHAINS)[:3]


@pytest.mark.reliability("Q6")
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CHAINS])
def test_the_bound_of_an_image_in_float32(name, monkeypatch, figure):
    """32x32x3 pixels, 1000 steps, both KLs, through ``elbo_terms``: 1e-5 bits/dim, or 0.02 nats of some thousands."""
    single_noise(monkeypatch)
    schedule, prediction, variance = CHAINS[name]
    net = GaussianDenoiser(prediction, schedule.betas.numpy(), mean=0.1, var=0.2)
    diffusion = GaussianDiffusion(
        net, schedule, (3, 32, 32), prediction=prediction, variance=variance, bins=(256, -1.0, 1.0)
    )
    x0 = (0.5 * torch.randn(1, 3, 32, 32, dtype=F64)).clamp(-1, 1)
    x0 = ((x0 * 127.5 + 127.5).round() / 127.5 - 1).float()
    found = {}
    for dtype in (F32, F64):
        torch.manual_seed(0)
        found[dtype] = elbo_terms(diffusion, x0.to(dtype))
    for kl in ("analytic", "monte_carlo"):
        off = (found[F32].by(kl).elbo - found[F64].by(kl).elbo).abs().item() / (3072 * math.log(2))
        assert found[F64].by(kl).elbo.abs() > 1000  # nats
        figure("Q6", f"bits/dim, {kl} KL", off, at_most=1e-5)


# ---------------------------------------------------------------------- KL of two Gaussians


def exact_kl(q_loc, q_scale, p_loc, p_scale):
    r = (mpmath.mpf(q_scale) / p_scale) ** 2
    return (r - 1 - mpmath.log(r) + ((mpmath.mpf(q_loc) - p_loc) / p_scale) ** 2) / 2


GAPS = (0.0, 1e-5, 3e-5, 1e-4, 1e-3, 4e-3, 6e-3, 0.03, 0.3, 1.0, 10.0)


@pytest.mark.reliability("Q5")
@pytest.mark.parametrize(("dtype", "bar"), [(F32, 1e-6), (F64, 1e-12)], ids=["float32", "float64"])
def test_kl_element_by_element(dtype, bar, figure):
    """Means apart by 0 to 10 sigma, scales by factors of 1 to 11, at scales of 1e-3 to 10: against mpmath, given rounded inputs."""
    rows = [
        (loc, s, loc + sign * gap * s, s * (1 + a) ** power)
        for loc in (0.0, -0.7)
        for s in (1e-3, 0.3, 10.0)
        for gap in GAPS
        for sign in (1, -1)
        for a in GAPS
        for power in (1, -1)
    ]
    q_loc, q_scale, p_loc, p_scale = torch.tensor(rows, dtype=F64).T.to(dtype)
    got = kl_divergence(Gaussian(q_loc, q_scale), Gaussian(p_loc, p_scale))
    assert got.dtype == dtype
    columns = (z.tolist() for z in (q_loc, q_scale, p_loc, p_scale))
    with mpmath.workdps(60):
        exact = [exact_kl(*row) for row in zip(*columns, strict=True)]
        errors = [abs(g - e) / e if e else mpmath.mpf(g) for g, e in zip(got.tolist(), exact, strict=True)]
    figure("Q5", f"smallest KL, {dtype}", got.min().item(), at_least=0.0)
    figure("Q5", f"relative error, {dtype}", float(max(errors)), at_most=bar)
    # torch's own is what this is for
    stock = kl_divergence(torch.distributions.Normal(q_loc, q_scale), torch.distributions.Normal(p_loc, p_scale))
    if dtype == F32:
        assert max(abs(g - e) / e for g, e in zip(stock.tolist(), exact, strict=True) if e) > 0.9


@pytest.mark.reliability("Q5")
def test_kl_of_one_law_and_its_gradient_are_zero(figure):
    loc, scale = torch.randn(50, requires_grad=True), torch.rand(50).requires_grad_()
    kl = kl_divergence(Gaussian(loc, scale), Gaussian(loc.detach(), scale.detach()))
    gradients = torch.autograd.grad(kl.sum(), (loc, scale))
    figure("Q5", "KL of one law", kl.abs().max().item(), at_most=0.0)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("gap", [0.0049, 0.0051, 1e-4, 0.5])
def test_derivatives_of_the_kl_across_its_series(gap):
    q = (
        torch.tensor([0.1], dtype=F64, requires_grad=True),
        torch.tensor([0.7 * (1 + gap)], dtype=F64, requires_grad=True),
    )
    p = (torch.tensor([0.3], dtype=F64, requires_grad=True), torch.tensor([0.7], dtype=F64, requires_grad=True))

    def kl(*x):
        return kl_divergence(Gaussian(*x[:2]), Gaussian(*x[2:]))

    assert torch.autograd.gradcheck(kl, q + p)
    assert torch.autograd.gradgradcheck(kl, q + p)


# ---------------------------------------------------------------------- bfloat16


class Watch(nn.Module):
    """A network with weights, that notes what it is shown and in what dtype it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nets.UNet(1, width=8, multipliers=(1, 2), blocks=1)
        for parameter in self.inner.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        self.seen: list[tuple[torch.dtype, ...]] = []
        self.log_snr: list[torch.Tensor] = []

    def forward(self, x, log_snr):
        out = self.inner(x, log_snr)
        self.seen.append((x.dtype, log_snr.dtype, out.dtype))
        self.log_snr.append(log_snr)
        return out


def watched(**options):
    return GaussianDiffusion(Watch(), LinearSchedule(1000), (1, 8, 8), bins=(17, -1.0, 1.0), **options)


def images(n=4):
    return torch.randint(0, 17, (n, 1, 8, 8)) / 8 - 1


@pytest.mark.reliability("Q21")
@pytest.mark.parametrize("options", [{}, {"decoder": "learned"}, {"objective": "simple"}], ids=str)
def test_autocast_reaches_the_network_alone(options, figure):
    """Log-probabilities and KLs, given what the network said, are those without autocast, bit for bit."""
    diffusion = watched(**options)
    x0, t = images(), torch.tensor([1, 2, 500, 1000])

    def terms(kl):
        torch.manual_seed(0)
        guide = poutine.trace(diffusion.guide).get_trace(x0, t)
        model = poutine.trace(poutine.replay(diffusion.model, guide)).get_trace(x0, t)
        return guide, site_terms(model, guide, kl)

    said = []
    handle = diffusion.net.register_forward_hook(lambda module, args, out: said.append(out))
    wrong = 0
    for kl in ("analytic", "monte_carlo"):
        with torch.autocast("cpu", torch.bfloat16):
            guide, inside = terms(kl)
        handle.remove()
        assert diffusion.net.seen[-1] == (F32, F32, torch.bfloat16)
        # the network's own words again, without autocast
        handle = diffusion.net.register_forward_hook(lambda module, args, out: said[-1])
        _, outside = terms(kl)
        handle.remove()
        wrong += sum(not torch.equal(inside[name], outside[name]) for name in inside)
        wrong += sum(value.dtype != F32 for value in inside.values())
        wrong += sum(guide.nodes[name]["value"].dtype != F32 for name in ("x_T", "x_t", "x_s"))
        handle = diffusion.net.register_forward_hook(lambda module, args, out: said.append(out))
    handle.remove()
    figure("Q21", "terms that autocast changed", wrong, at_most=0)


@pytest.mark.reliability("Q21")
def test_autocast_leaves_the_ledger_and_the_average_alone(figure):
    diffusion = watched(decoder="learned")
    with torch.autocast("cpu", torch.bfloat16):
        terms = elbo_terms(diffusion.respace(3), images())
    assert all(value.dtype == F64 for value in (terms.prior, terms.diffusion, terms.reconstruction, terms.elbo))
    shown = {value.item() for log_snr in diffusion.net.log_snr for value in log_snr.unique()}
    assert shown == set(diffusion.respace(3).schedule.log_snr(torch.arange(1, 4)).float().tolist())
    with torch.autocast("cpu", torch.bfloat16):
        ema = EMA(diffusion.to(torch.bfloat16), 0.9999)
        start = [e.clone() for e in ema.state_dict()["average"]]
        for parameter in diffusion.parameters():
            parameter.data.add_(1)
        for _ in range(100):
            ema.update()
    # e_n = theta + (e_0 - theta) prod d_n, in float32: a bfloat16 average would lose steps below 2^-8 of itself
    product = math.prod(min(0.9999, (1 + n) / (10 + n)) for n in range(1, 101))
    worst = 0.0
    for e, e0, parameter in zip(ema.state_dict()["average"], start, diffusion.parameters(), strict=True):
        assert e.dtype == F32
        theta = parameter.double()
        expected = theta + (e0.double() - theta) * product
        worst = max(worst, ((e.double() - expected).abs() / (1 + expected.abs())).max().item())
    figure("Q21", "EMA of bfloat16 weights", worst, at_most=1e-5)
    # every step of the schedule is a step of its own, whatever the module was cast to
    assert diffusion.schedule.log_snr(torch.arange(1, 1001)).unique().numel() == 1000


@pytest.mark.reliability("Q21")
@pytest.mark.parametrize("schedule", [LinearSchedule(1000), CosineSchedule(1000)], ids=["linear", "cosine"])
def test_the_first_step_adds_noise_under_autocast(schedule, figure):
    """In bfloat16 1 - alpha-bar is 0 for the first ten steps of a thousand; here its root is right to rounding."""
    x0 = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        law = ForwardProcess(schedule, 3).marginal(x0, torch.ones(4, dtype=torch.int64))
        x_1 = law.rsample()
    assert x_1.dtype == F32 and (x_1 != x0).float().mean() > 0.99
    sigma = schedule.sigma(1).item()
    figure("Q21", "sigma_1 under autocast", abs(law.stddev.double() / sigma - 1).max().item(), at_most=6e-8)


@pytest.mark.reliability("Q21")
@pytest.mark.parametrize("method", list(sampling.METHODS))
def test_samples_of_any_batch_have_the_same_bits(method, figure):
    """An elementwise network has no rounding of its own: what is left is the noise."""
    diffusion = GaussianDiffusion(GaussianDenoiser("v"), LogLinearSchedule(3, -6.0, 6.0), (2, 5), prediction="v")
    whole = pyrodiff.sample(diffusion, 64, method, seed=3, batch_size=64)
    different = 0
    for batch in (1, 7):
        different += int((pyrodiff.sample(diffusion, 64, method, seed=3, batch_size=batch) != whole).sum())
    for n in (1, 7):
        different += int((pyrodiff.sample(diffusion, n, method, seed=3, batch_size=64) != whole[:n]).sum())
    figure("Q21", "numbers that depend on the batch", different, at_most=0)
    assert (pyrodiff.sample(diffusion, 64, method, seed=4) != whole).all()


# ---------------------------------------------------------------------- samples of the exact denoiser


@pytest.mark.reliability("Q12")
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_hundred_thousand_samples_of_the_program(variance, figure):
    """Mean and variance against the linear recursion: |z| < 4.89, one false alarm in a million; 5 % of the variance is seen."""
    n = 100_000
    diffusion, oracle = gaussian(linear_betas(20), "eps", variance, 0.02, -0.01, event_shape=(1,))
    with pyro.validation_enabled(False):
        x = poutine.uncondition(diffusion.model)(torch.zeros(n, 1, dtype=F64))
    mu, V = oracle.marginal()
    z_mean = (x.mean().item() - mu) / math.sqrt(V / n)
    z_variance = (x.var().item() / V - 1) / math.sqrt(2 / n)
    for what, z in (("mean", z_mean), ("variance", z_variance)):
        figure("Q12", f"|z| of the {what}, n = 1e5", abs(z), at_most=4.89)
    assert 2 * 4.89 * math.sqrt(2 / n) < 0.05
