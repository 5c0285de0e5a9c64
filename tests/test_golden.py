"""guided-diffusion's own figures (see ``data/README.md``): moments, model laws, bounds and losses.

Its timestep index counts from 0 and ours from 1. Its stub network takes s = index / 1000, ours
log-SNR: the stub below looks log-SNR up in the schedule.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

from pyrodiff import CosineSchedule, DiscretizedNormal, GaussianDiffusion, LinearSchedule
from pyrodiff.elbo import site_terms
from pyrodiff.timesteps import ImportanceSampler

DATA = Path(__file__).parent / "data"
SHAPE = (3, 4, 4)
DIMS = math.prod(SHAPE)
SCHEDULES = {"linear_1000": LinearSchedule(1000), "cosine_100": CosineSchedule(100)}
MEANS = {"PREVIOUS_X": "previous", "START_X": "x0", "EPSILON": "eps"}
VARIANCES = {
    "LEARNED": "learned",
    "FIXED_SMALL": "fixed_small",
    "FIXED_LARGE": "fixed_large",
    "LEARNED_RANGE": "learned_range",
}
every_chain = pytest.mark.parametrize("chain", SCHEDULES)
every_mean = pytest.mark.parametrize("mean_type", MEANS)
every_variance = pytest.mark.parametrize("variance_type", VARIANCES)


@functools.cache
def figures() -> dict[str, torch.Tensor]:
    with np.load(DATA / "gaussian.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive}


class Stub(nn.Module):
    """The network of the figures, in the dtype of its input."""

    def __init__(self, schedule, variance):
        super().__init__()
        self.table = schedule.log_snr(torch.arange(1, schedule.steps + 1))
        self.learned = variance.startswith("learned")

    def forward(self, x, log_snr):
        distance = (self.table - log_snr.double()[:, None]).abs()
        assert distance.min(1).values.max() < 1e-5
        s = (distance.argmin(1) / 1000).to(x.dtype).reshape(-1, 1, 1, 1)
        out = torch.tanh(0.9 * x + 0.3 * s - 0.1) + 0.2 * torch.sin(3 * x)
        return torch.cat([out, torch.cos(2 * x + s)], 1) if self.learned else out


def build(chain, mean_type="EPSILON", variance_type="FIXED_SMALL", **options):
    schedule, variance = SCHEDULES[chain], VARIANCES[variance_type]
    return GaussianDiffusion(
        Stub(schedule, variance),
        schedule,
        SHAPE,
        prediction=MEANS[mean_type],
        variance=variance,
        decoder="openai",
        **options,
    )


def inputs(chain, dtype=torch.float32):
    """x0, x_t and our t; in float64 x_t is remade, for theirs is rounded to float32."""
    f = figures()
    x0, noise, t = f[f"{chain}/x0"].to(dtype), f[f"{chain}/noise"].to(dtype), f[f"{chain}/t"] + 1
    if dtype == torch.float32:
        return x0, f[f"{chain}/x_t"], t
    # x0 was rounded as well, and has to be on the grid of 256 levels: u / 127.5 - 1
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    beta = SCHEDULES[chain].betas
    alpha_bar = torch.cumprod(1 - beta, 0)[t - 1].reshape(-1, 1, 1, 1)
    return x0, alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, t


LAWS = "guided-diffusion's q: means and variances, float32"


def assert_near(got, expected, relative=1e-5, absolute=0.0):
    """Within ``relative`` of each example's largest entry; returns the largest share of it."""
    got, expected = got.double().expand(expected.shape), expected.double()
    error = (got - expected).abs().flatten(1).amax(1)
    largest = expected.abs().flatten(1).amax(1)
    assert (error <= relative * largest + absolute).all(), f"{error.tolist()} of {largest.tolist()}"
    return ((error - absolute) / largest).max().item()


def assert_near_log_variance(law, expected):
    """The log of a standard deviation that float32 rounds is off by up to 1.2e-7, absolutely."""
    absolute = 0.0 if law.stddev.dtype == torch.float64 else 5e-7
    assert_near(2 * law.stddev.double().log(), expected, absolute=absolute)


def assert_not_near(got, expected):
    with pytest.raises(AssertionError):
        assert_near(got, expected)


# ---------------------------------------------------------------------- laws


@pytest.mark.reliability("Q7")
@every_chain
def test_q_marginal(chain, figure):
    f = figures()
    x0, x_t, t = inputs(chain)
    q = build(chain).forward_process
    law = q.marginal(x0, t)
    figure("Q7", LAWS, assert_near(law.mean, f[f"{chain}/q_mean"]), at_most=1e-6)
    figure("Q7", LAWS, assert_near(law.variance, f[f"{chain}/q_var"]), at_most=1e-6)
    assert_near_log_variance(law, f[f"{chain}/q_logvar"])
    assert_near(law.mean + law.stddev * f[f"{chain}/noise"], x_t)
    assert_not_near(q.marginal(x0, (t + 1).clamp(max=q.schedule.steps)).variance, f[f"{chain}/q_var"])


@pytest.mark.reliability("Q7")
@every_chain
def test_q_posterior(chain, figure):
    f = figures()
    x0, x_t, t = inputs(chain)
    later = t > 1  # at their index 0 the law is a point mass
    assert int(later.sum()) == 4
    law = build(chain).forward_process.posterior(x0[later], x_t[later], t[later])
    figure("Q7", LAWS, assert_near(law.mean, f[f"{chain}/post_mean"][later]), at_most=1e-6)
    figure("Q7", LAWS, assert_near(law.variance, f[f"{chain}/post_var"][later]), at_most=1e-6)
    assert_near_log_variance(law, f[f"{chain}/post_logvar_clipped"][later])
    # their clipped log-variance at index 0 is that of index 1, which decoder="openai" takes
    small = build(chain).reverse_kernel(x_t[~later], t[~later])
    assert_near_log_variance(small, f[f"{chain}/post_logvar_clipped"][~later])
    swapped = build(chain).forward_process.posterior(x_t[later], x0[later], t[later])
    assert_not_near(swapped.mean, f[f"{chain}/post_mean"][later])


@pytest.mark.reliability("Q7")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [False, True])
@every_variance
@every_mean
@every_chain
def test_the_models_law(chain, mean_type, variance_type, clip, dtype, figure):
    f = figures()
    _, x_t, t = inputs(chain)
    x_t = x_t.to(dtype)
    kernel = build(chain, mean_type, variance_type, clip=clip).reverse_kernel
    key = f"{chain}/{mean_type}/{variance_type}/clip{int(clip)}"
    law = kernel(x_t, t)
    assert law.mean.dtype == dtype
    figure("Q7", "guided-diffusion's p: mean, float32", assert_near(law.mean, f[f"{key}/mean"]), at_most=1e-5)
    assert_near_log_variance(law, f[f"{key}/log_variance"])
    variance = f[f"{key}/variance"].clone()
    if variance_type == "FIXED_SMALL":
        # at their index 0 the variance returned is the point mass's, which they never use: bound
        # and sampler go by the clipped log-variance
        assert (variance[t == 1] == 0).all()
        variance[t == 1] = f[f"{key}/log_variance"][t == 1].exp()
    assert_near(law.variance, variance)
    # what float32 loses of x_t / alpha - eps sigma / alpha where alpha is 5e-5, in theirs
    alpha = float(kernel.schedule.alpha(int(t.max())))
    lost = 2.0**-22 * float(x_t.abs().max()) / alpha if mean_type == "EPSILON" and clip else 0.0
    x0_hat = kernel.denoise(x_t, t)
    assert_near(x0_hat, f[f"{key}/pred_xstart"], absolute=lost)
    assert_near(x0_hat[:-1], f[f"{key}/pred_xstart"][:-1])  # the last one alone is of that kind
    # one network call for mixed timesteps gives the same two laws
    of_s, of_0 = kernel.both(x_t, t)
    assert_near(of_s.mean[t > 1], f[f"{key}/mean"][t > 1])
    assert_near(of_s.variance.expand_as(x_t)[t > 1], variance[t > 1])
    assert_near(of_0.mean[t == 1], f[f"{key}/mean"][t == 1])
    assert_near(of_0.variance.expand_as(x_t)[t == 1], variance[t == 1])
    # negative control: the step before
    wrong = kernel(x_t, (t - 1).clamp(min=1))
    assert_not_near(wrong.variance, variance)


# ---------------------------------------------------------------------- bounds


def vb_bits(diffusion, x0, x_t, t):
    """guided-diffusion's ``_vb_terms_bpd``: bits/dim, with its tanh decoder at t = 1.

    KLs in the inputs' dtype, but the decoder in float32, as theirs: its difference of two CDFs has
    steps of 6e-8 there, and where the mass is smaller the log follows the rounding.
    """
    nats = torch.zeros(len(t), dtype=torch.float64)
    later = t > 1
    q = diffusion.forward_process.posterior(x0[later], x_t[later], t[later])
    nats[later] = kl_divergence(q, diffusion.reverse_kernel(x_t[later], t[later])).double()
    normal = diffusion.reverse_kernel(x_t[~later].float(), t[~later])
    decoder = DiscretizedNormal(normal.mean, normal.stddev.expand_as(normal.mean), 2 / 255, -1.0, 1.0, cdf="tanh")
    nats[~later] = -decoder.log_prob(x0[~later].float()).flatten(1).sum(1).double()
    return nats / (DIMS * math.log(2))


@pytest.mark.reliability("Q7")
@every_chain
def test_prior_bits(chain):
    f = figures()
    for dtype in (torch.float32, torch.float64):
        x0, _, _ = inputs(chain, dtype)
        q = build(chain).forward_process
        prior = kl_divergence(q.marginal(x0, q.schedule.steps), q.prior(x0.shape, x0))
        got = prior.double() / (DIMS * math.log(2))
        expected = f[f"{chain}/prior_bpd"].double()
        # their float32 KL of two nearly equal laws cancels to an absolute 1e-7 or so
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-7)
    one_early = kl_divergence(q.marginal(x0, q.schedule.steps - 1), q.prior(x0.shape, x0))
    if chain == "cosine_100":  # T = 1000 has next to nothing left at either step
        assert (one_early / (DIMS * math.log(2)) - expected).abs().min() > 1e-5


@pytest.mark.reliability("Q7")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_variance
@every_mean
@every_chain
def test_bound_terms(chain, mean_type, variance_type, dtype):
    f, steps = figures(), SCHEDULES[chain].steps
    key = f"{chain}/{mean_type}/{variance_type}"
    got = vb_bits(build(chain, mean_type, variance_type), *inputs(chain, dtype))

    def near(value, expected):
        return bool(((value - expected).abs() <= 1e-5 * expected.abs() + 5e-7).all())

    found = {f"{key}/KL/loss": 1.0, f"{key}/RESCALED_KL/loss": steps}
    if variance_type.startswith("LEARNED"):
        found |= {f"{key}/MSE/vb": 1.0, f"{key}/RESCALED_MSE/vb": steps / 1000}
    else:
        assert f"{key}/MSE/vb" not in f
    for name, factor in found.items():
        theirs = f[name].double() / factor
        assert near(got, theirs), f"{name}: {got.tolist()} for {theirs.tolist()}"
        assert not near(got * math.log(2), theirs)  # nats for bits
        assert not near(got.roll(1), theirs)


# ---------------------------------------------------------------------- training losses


def program_traces(diffusion, x0, x_t, t, weight=None):
    """The one-timestep programs, with their x_t put in the place of the guide's draw."""
    fixed = poutine.trace(diffusion.guide).get_trace(x0, t, weight=weight)
    fixed.nodes["x_t"]["value"] = x_t
    guide = poutine.trace(poutine.replay(diffusion.guide, trace=fixed)).get_trace(x0, t, weight=weight)
    model = poutine.trace(poutine.replay(diffusion.model, trace=guide)).get_trace(x0, t, weight=weight)
    return model, guide


@pytest.mark.reliability("Q7")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_variance
@every_mean
@every_chain
def test_simple_objective_is_their_mse(chain, mean_type, variance_type, dtype):
    f = figures()
    x0, x_t, t = inputs(chain, dtype)
    diffusion = build(chain, mean_type, variance_type, objective="simple")
    model, _ = program_traces(diffusion, x0, x_t, t)
    factor = model.nodes["x_objective"]
    got = -factor["fn"].log_prob(factor["value"]).double() / DIMS
    theirs = f[f"{chain}/{mean_type}/{variance_type}/MSE/mse"].double()
    torch.testing.assert_close(got, theirs, rtol=1e-5, atol=0)
    # the factor is the whole of the ELBO: the chain's sites are masked out
    others = site_terms(*program_traces(diffusion, x0, x_t, t))
    assert all((value == 0).all() for name, value in others.items() if name != "x_objective")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got.roll(1), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variance_type", ["LEARNED", "LEARNED_RANGE"])
@every_mean
@every_chain
def test_hybrid_objective_is_their_mse_and_bound(chain, mean_type, variance_type):
    """Their RESCALED_MSE loss, mse + vb T / 1000 with the bound in bits/dim.

    At t = 1 the program's decoder is exact where theirs is a tanh approximation; that term is
    replaced before the comparison.
    """
    f = figures()
    x0, x_t, t = inputs(chain, torch.float64)
    options = {"objective": "hybrid", "bins": (256, -1.0, 1.0)}
    diffusion = build(chain, mean_type, variance_type, **options)
    terms = site_terms(*program_traces(diffusion, x0, x_t, t))
    assert (terms["x_T"] == 0).all()
    first = t == 1
    steps = SCHEDULES[chain].steps
    tanh = vb_bits(diffusion, x0, x_t, t) * DIMS * (steps / 1000)
    bound = torch.where(first, tanh, terms["x_s"])
    if mean_type == "EPSILON":
        # near enough for the exact decoder to be near the approximate one (the tails are not):
        # this fixes the weight of the site at t = 1
        bits = vb_bits(diffusion, x0, x_t, t)[first] * DIMS
        torch.testing.assert_close(terms["x_0"][first], bits * steps * 1e-3, rtol=5e-3, atol=0)
    theirs = f[f"{chain}/{mean_type}/{variance_type}/RESCALED_MSE/loss"].double()
    got = (terms["x_objective"] + bound) / DIMS
    torch.testing.assert_close(got, theirs, rtol=1e-5, atol=5e-7)


# ---------------------------------------------------------------------- the resampler


def test_importance_sampler_is_their_second_moment_resampler():
    with np.load(DATA / "resampler.npz") as archive:
        f = {key: torch.from_numpy(archive[key]) for key in archive}
    steps = len(f["w_cold"])

    def normalised(weights):
        return weights / weights.sum()

    sampler = ImportanceSampler(steps, history=int(f["history_per_term"]), uniform_share=float(f["uniform_prob"]))
    seen = [normalised(f["w_cold"])]
    torch.testing.assert_close(sampler.probabilities, seen[0], rtol=1e-12, atol=0)
    matched = {"w_cold"}
    for t, loss in zip(f["ts"], f["losses"], strict=True):  # one after the other, as they came
        sampler.update(t.reshape(1) + 1, loss.reshape(1))
        for name in ("w_partial", "w_warm"):
            if torch.allclose(sampler.probabilities, normalised(f[name]), rtol=1e-12, atol=0):
                matched.add(name)
    torch.testing.assert_close(sampler.probabilities, normalised(f["w_warm"]), rtol=1e-12, atol=0)
    assert matched == {"w_cold", "w_partial", "w_warm"}
    # in one call the same, and a state dict carries it over
    again = ImportanceSampler(steps, history=3, uniform_share=float(f["uniform_prob"]))
    again.update(f["ts"] + 1, f["losses"])
    assert torch.equal(again.probabilities, sampler.probabilities)
    third = ImportanceSampler(steps, history=3, uniform_share=float(f["uniform_prob"]))
    third.load_state_dict(again.state_dict())
    assert torch.equal(third.probabilities, sampler.probabilities)
    # negative control: another history length gives other probabilities
    longer = ImportanceSampler(steps, history=2, uniform_share=float(f["uniform_prob"]))
    longer.update(f["ts"] + 1, f["losses"])
    assert not torch.allclose(longer.probabilities, sampler.probabilities, rtol=1e-3)
    pyro.clear_param_store()


def test_importance_sampler_waits_for_every_history_to_fill():
    sampler = ImportanceSampler(4, history=3)
    uniform, t = torch.full((4,), 0.25, dtype=torch.float64), torch.arange(1, 5)
    for _ in range(2):
        sampler.update(t, t.double())
        assert torch.equal(sampler.probabilities, uniform)
    sampler.update(t[:3], t[:3].double())
    assert torch.equal(sampler.probabilities, uniform)  # t = 4 has seen two losses
    sampler.update(t[3:], t[3:].double())
    expected = 0.999 * t.double() / 10 + 0.001 * uniform
    torch.testing.assert_close(sampler.probabilities, expected, rtol=1e-12, atol=0)
