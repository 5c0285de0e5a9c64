r"""The library's numbers against closed forms (``oracles.py``: DDPM's formulas in plain numpy).

Almost nothing here is Monte Carlo. Means over the noise are Gauss-Hermite sums, exact for the
quadratic terms of a linear denoiser; means over t enumerate t; moments of samplers come from
feeding them unit vectors as noise. Comparisons are also shown to fail when one formula of the
library is perturbed.
"""

from __future__ import annotations

import importlib
import math
import warnings

import numpy as np
import pyro
import pytest
import torch
from monte_carlo import any_seed, assert_estimate, assert_mean, assert_rejected
from oracles import (
    DDPM,
    MEAN,
    VAR,
    GaussianDenoiser,
    GridDenoiser,
    LinearModel,
    MixtureDenoiser,
    hermite,
    linear_betas,
)
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch import nn

import pyrodiff
from pyrodiff import (
    CosineSchedule,
    ForwardProcess,
    GaussianDiffusion,
    LinearSchedule,
    ReverseKernel,
    TableSchedule,
    elbo,
    elbo_terms,
    reverse,
)
from pyrodiff.diffusion import Program
from pyrodiff.errors import ProgramError
from pyrodiff.schedules import Schedule
from pyrodiff.timesteps import ImportanceSampler

sampling = importlib.import_module("pyrodiff.sample")  # pyrodiff.sample is its function

F64 = torch.float64
Z = 4.89  # |z| that a standard normal exceeds once in a million
ERROR = "error / (1 + |closed form|)"
PREDICTIONS = ("eps", "x0", "v", "score", "previous")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
X0 = np.array([[-0.4, 0.3], [1.1, 0.55], [0.05, -1.3]])  # three examples of two dimensions


def as_tensor(x):
    return torch.as_tensor(x, dtype=F64)


def variance_output(ddpm, rule):
    """What the network's variance channels say at each t: never constant, sometimes out of range."""
    wave = np.cos(ddpm.log_snr)
    return {"learned": np.log(ddpm.beta) - 0.3 + 0.1 * wave, "learned_range": 0.2 + 1.1 * wave}.get(rule)


def gaussian(betas, prediction="x0", variance="fixed_small", gain=0.0, bias=0.0, output=None, **options):
    """A diffusion with the exact denoiser of N(MEAN, VAR) (but for gain and bias), and its closed form."""
    ddpm = DDPM(betas)
    decoder = options.setdefault("decoder", "vdm")
    event_shape = options.pop("event_shape", (2,))
    data = {"mean": options.pop("mean", MEAN), "var": options.pop("var", VAR)}
    output = variance_output(ddpm, variance) if output is None else output
    net = GaussianDenoiser(prediction, betas, output, gain, bias, **data)
    diffusion = GaussianDiffusion(
        net, TableSchedule(betas.tolist()), event_shape, prediction=prediction, variance=variance, **options
    )
    oracle = LinearModel(
        ddpm,
        ddpm.variances(variance, output),
        ddpm.decoder_variance(decoder, variance, output),
        gain=gain,
        bias=bias,
        **data,
    )
    return diffusion, oracle


@torch.no_grad()
def exact_terms(diffusion, x0, nodes=3):
    """Prior [B], diffusion [B, T - 1] and reconstruction [B] of the library's laws, no Monte Carlo.

    The terms are sums over dims, so that one node may serve all dims at once.
    """
    q, p, steps = diffusion.forward_process, diffusion.reverse_kernel, diffusion.steps
    z, w = (as_tensor(a) for a in hermite(nodes))
    prior = elbo.kl_divergence(q.marginal(x0, steps), q.prior(x0.shape, x0))

    def noised(t):  # [K, *t's, B, *event]
        law = q.marginal(x0, t)
        return law.mean + law.stddev * z.reshape(-1, *(1,) * law.mean.dim())

    if steps > 1:
        t = torch.arange(2, steps + 1)[:, None]
        x_t = noised(t)
        kl = elbo.kl_divergence(q.posterior(x0, x_t, t), p(x_t, t))
        diffusion_terms = torch.tensordot(w, kl, 1).T
    else:
        diffusion_terms = x0.new_zeros(len(x0), 0)
    nll = -p.decode(noised(1)).log_prob(x0)
    return prior, diffusion_terms, torch.tensordot(w, nll, 1)


def closed_terms(oracle, x0):
    x0 = x0.flatten(1).numpy()
    return tuple(as_tensor(f(x0).sum(1)) for f in (oracle.prior, oracle.diffusion, oracle.reconstruction))


def excess(got, expected, tolerance=1e-8):
    """Largest error over tolerance * (1 + |expected|), of every term and of their sum."""
    got, expected = list(got), list(expected)
    for terms in (got, expected):
        terms.append(terms[0] + terms[1].sum(-1) + terms[2])
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        if a.numel():
            worst = max(worst, float(((a - b).abs() / (tolerance * (1 + b.abs()))).max()))
    assert math.isfinite(worst)
    return worst


# ---------------------------------------------------------------------- perturbations


def change(patch, owner, name, function):
    """Replace a method by ``function(self, its result, *its arguments)``."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda self, *a, **k: function(self, original(self, *a, **k), *a, **k))


def relocated(law, loc, scale):
    """The same kind of law elsewhere."""
    base = law.base_dist if law.event_dim else law
    return type(base)(loc, scale.expand(loc.shape)).to_event(law.event_dim)


def change_marginal(function):
    def new(q, law, x0, t):
        return relocated(law, *function(law.mean, law.stddev, x0))

    return lambda patch: change(patch, ForwardProcess, "marginal", new)


def change_posterior(function):
    """``function(a, b, small, large, alpha_t / alpha_s)``: new a, b, small, large."""

    def new(q, terms, x_t, t):
        event_dim, *rest = terms
        t = torch.as_tensor(t)
        ratio = (q.schedule.alpha(t) / q.schedule.alpha(t - 1)).reshape(t.shape + (1,) * event_dim)
        return event_dim, *function(*rest, ratio)

    return lambda patch: change(patch, ForwardProcess, "posterior_terms", new)


def change_prediction(function):
    def new(p, found, *args):
        mean = None if found.mean is None else function(found.mean)
        return found._replace(x0_hat=function(found.x0_hat), mean=mean)

    return lambda patch: change(patch, ReverseKernel, "_predict", new)


def change_scale(function):
    return lambda patch: change(patch, ReverseKernel, "_scale", lambda p, std, *_: function(std))


def change_decoder_scale(function):
    """``function(p, scale)``: the scale of p(x_0 | x_1)."""

    def new(p, terms, *_):
        loc, scale = terms
        return loc, function(p, scale)

    return lambda patch: change(patch, ReverseKernel, "_decoder_terms", new)


def interpolate_variances(patch):
    def scale(self, small, large, predicted):
        share = (predicted.variance_output + 1) / 2
        return (large * share + small * (1 - share)).abs().sqrt()

    patch.setattr(ReverseKernel, "_scale", scale)


def network_one_step_out(patch):
    original = ReverseKernel._call_net

    def call(self, x_t, log_snr, *rest):
        steps = self.schedule.steps
        t = torch.searchsorted(-self.schedule.log_snr(torch.arange(1, steps + 1)), -log_snr) + 1
        return original(self, x_t, self.schedule.log_snr(t % steps + 1), *rest)

    patch.setattr(ReverseKernel, "_call_net", call)


def wrong_sign(patch):
    for name, rule in reverse.COORDINATES.items():
        patch.setitem(reverse.COORDINATES, name, lambda a, s, rule=rule: (rule(a, s)[0], -rule(a, s)[1]))


# name: (what is wrong, the cells in which it makes a difference)
always = lambda **_: True  # noqa: E731
chain = lambda steps, **_: steps > 1  # noqa: E731
PERTURBATIONS = {
    "marginal: variance for standard deviation": (change_marginal(lambda m, s, x0: (m, s**2)), always),
    "marginal: alpha-bar for its root": (change_marginal(lambda m, s, x0: (m**2 / x0, s)), always),
    "prior of another scale": (
        lambda patch: change(patch, ForwardProcess, "prior", lambda q, p, *_: relocated(p, p.mean, p.stddev * 1.0001)),
        always,
    ),
    "denoiser: gain of 1e-4": (change_prediction(lambda x: x * (1 + 1e-4)), always),
    "denoiser: wrong sign": (wrong_sign, lambda prediction, **_: prediction != "previous"),
    "network is shown the next t": (network_one_step_out, chain),
    "decoder: scale of t = 2": (
        change_decoder_scale(lambda p, s: (-0.5 * p.schedule.log_snr(2)).exp().expand_as(s)),
        chain,
    ),
    "decoder: variance for standard deviation": (change_decoder_scale(lambda p, s: s**2), always),
    "posterior: beta for beta-tilde": (change_posterior(lambda a, b, small, large, r: (a, b, large, large)), chain),
    "posterior: beta-tilde for beta": (
        change_posterior(lambda a, b, small, large, r: (a, b, small, small)),
        lambda steps, variance, **_: steps > 1 and variance in ("fixed_large", "learned_range"),
    ),
    "posterior: alpha_t for alpha_s": (change_posterior(lambda a, b, small, large, r: (a * r, b, small, large)), chain),
    "posterior: alpha_t / alpha_s upside down": (  # else b is common to q and p, and cancels
        change_posterior(lambda a, b, small, large, r: (a, b * r**2, small, large)),
        lambda steps, prediction, **_: steps > 1 and prediction == "previous",
    ),
    "variance rule: 1e-4 off": (change_scale(lambda std: std * (1 + 1e-4)), chain),
    "variance rule: variance for standard deviation": (change_scale(lambda std: std**2), chain),
    "variance rule: interpolated without logs": (
        interpolate_variances,
        lambda steps, variance, **_: steps > 1 and variance == "learned_range",
    ),
}


# ---------------------------------------------------------------------- C1: Gaussian data


@pytest.mark.reliability("Q2", "Q3")
@pytest.mark.parametrize("steps", [1, 2, 5, 50, 1000])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_term_of_the_bound(prediction, variance, steps, monkeypatch, figure):
    betas, x0 = linear_betas(steps), as_tensor(X0)
    for gain, bias in ((0.0, 0.0), (0.05, -0.02)):
        diffusion, oracle = gaussian(betas, prediction, variance, gain, bias)
        expected = closed_terms(oracle, x0)
        figure("Q2", ERROR, 1e-8 * excess(exact_terms(diffusion, x0), expected), at_most=1e-8)
        figure.count("Q2", "configurations", 1, at_least=40)
        # NELBO >= E[-log p_theta(x_0)] >= H, all three exact, the first from the library's laws
        nodes, weights = hermite(3)
        data = as_tensor(MEAN + math.sqrt(VAR) * nodes)[:, None].expand(3, 2)
        prior, kl, nll = exact_terms(diffusion, data)
        nelbo = float(as_tensor(weights) @ (prior + kl.sum(1) + nll)) / 2
        cross = float(-oracle.data_average(oracle.log_density))
        figure("Q3", "-ELBO less E[-log p], nats", nelbo - cross, at_least=-1e-12)
        figure("Q3", "E[-log p] less entropy, nats", cross - oracle.entropy, at_least=-1e-12)
        # per datum the bound holds as well
        assert (sum((prior, kl.sum(1), nll)).numpy() >= -oracle.log_density(data.numpy()).sum(1) - 1e-12).all()
        if gain == 0:
            assert abs(nelbo - oracle.entropy - oracle.gap) <= 1e-8 * (1 + abs(nelbo))
    seen = 0
    for name, (perturb, applies) in PERTURBATIONS.items():
        if applies(prediction=prediction, variance=variance, steps=steps):
            with monkeypatch.context() as patch:
                perturb(patch)
                assert excess(exact_terms(diffusion, x0), expected) > 1, f"unnoticed: {name}"
            seen += 1
    assert seen >= 5
    assert excess(exact_terms(diffusion, x0), expected) <= 1  # and everything is as it was


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_sum_of_1000_terms_in_float32(prediction, variance):
    """Laws and KLs in float32 and sums in float64, as the ledger does it: 2e-5 bits/dim."""
    diffusion, oracle = gaussian(linear_betas(1000), prediction, variance)
    x0 = as_tensor(X0).float()
    z, w = hermite(3)
    q, p, t = diffusion.forward_process, diffusion.reverse_kernel, torch.arange(2, 1001)[:, None]
    law, total = q.marginal(x0, t), 0.0
    for node, weight in zip(z.tolist(), w.tolist(), strict=True):
        x_t = law.mean + law.stddev * node
        assert x_t.dtype == torch.float32
        total = total + weight * elbo.kl_divergence(q.posterior(x0, x_t, t), p(x_t, t)).double().sum(0)
    expected = as_tensor(oracle.diffusion(x0.double().numpy()).sum((1, 2)))
    assert (total - expected).abs().max() / (2 * math.log(2)) < 2e-5


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize("steps", [2, 50])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("decoder", ["openai", "learned"])
def test_every_term_with_other_decoders(decoder, variance, steps, monkeypatch, figure):
    x0 = as_tensor(X0)
    diffusion, oracle = gaussian(linear_betas(steps), "eps", variance, decoder=decoder)
    if decoder == "learned":
        assert abs(diffusion.reverse_kernel.log_scale.exp().item() ** 2 - oracle.ddpm.om[0] / oracle.ddpm.ab[0]) < 1e-7
        with torch.no_grad():
            diffusion.double().reverse_kernel.log_scale.fill_(-1.3)
        oracle.decoder_variance = math.exp(-2.6)
    figure("Q2", ERROR, 1e-8 * excess(exact_terms(diffusion, x0), closed_terms(oracle, x0)), at_most=1e-8)
    figure.count("Q2", "configurations", 1, at_least=40)
    with monkeypatch.context() as patch:
        change_decoder_scale(lambda p, s: (-0.5 * p.schedule.log_snr(1)).exp().expand_as(s))(patch)
        assert excess(exact_terms(diffusion, x0), closed_terms(oracle, x0)) > 1


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize(
    ("steps", "scale", "figures"),
    [
        (
            1000,
            1,
            {"small": (1.29571910, 0.72585094), "large": (0.72688542, 0.72579424), "exact": (0.72579317, 0.72579135)},
        ),
        (10, 100, {"small": (3.99905937,), "large": (0.80853426,), "exact": (0.72579139,)}),
    ],
    ids=["T=1000", "T=10"],
)
@pytest.mark.parametrize("rule", ["small", "large", "exact"])
def test_printed_figures(steps, scale, figures, rule):
    """DDPM's variance at t = 1 is beta-tilde_2, beta_1 or the exact one: decoder="openai" can say all three."""
    betas = linear_betas(steps, scale)
    ddpm = DDPM(betas)
    if rule == "small":
        diffusion, oracle = gaussian(betas, "eps", "fixed_small", decoder="openai", event_shape=(1,))
    else:
        exact = LinearModel(ddpm, np.ones(steps), 1.0).exact_variance
        output = np.log(exact if rule == "exact" else ddpm.beta)
        diffusion, oracle = gaussian(betas, "eps", "learned", output=output, decoder="openai", event_shape=(1,))
    nodes, weights = hermite(3)
    prior, kl, nll = exact_terms(diffusion, as_tensor(MEAN + math.sqrt(VAR) * nodes)[:, None])
    nelbo = float(as_tensor(weights) @ (prior + kl.sum(1) + nll))
    cross = float(-oracle.data_average(oracle.log_density))
    assert abs(oracle.entropy - 0.72579135) < 6e-9
    for got, printed in zip((nelbo, cross), figures[rule], strict=False):
        assert abs(got - printed) < 6e-9, f"{got:.9f} for {printed}"
    if rule == "exact":  # then the gap is the prior's KL alone
        expected = {1000: 1.816e-6}.get(steps)
        assert expected is None or abs(nelbo - oracle.entropy - expected) < 6e-10


# ---------------------------------------------------------------------- C0: algebra


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize(
    "schedule", [LinearSchedule(50), CosineSchedule(50), TableSchedule([0.3])], ids=["linear", "cosine", "one"]
)
def test_transitions_compose_and_bayes_rule(schedule, monkeypatch):
    betas = schedule.betas.tolist()
    q = ForwardProcess(schedule, event_dim=0)
    x0, x_t = as_tensor(1.3), as_tensor(-0.7)

    def check():
        m, v = 1.0, 0.0  # q(x_t | x_0 = 1), by iterating x_t = sqrt(1 - beta) x_s + sqrt(beta) eps
        for t, beta in enumerate(betas, 1):
            one = q.transition(x0, t - 1, t)
            close(one.mean, math.sqrt(1 - beta) * 1.3)
            close(one.variance, beta)
            m_s, v_s, m, v = m, v, math.sqrt(1 - beta) * m, (1 - beta) * v + beta
            law = q.marginal(x0, t)
            close(law.mean, 1.3 * m)
            close(law.variance, v)
            for s in range(0, t, 7):  # longer transitions: their composition with the marginal at s
                part, long = q.marginal(x0, s) if s else None, q.transition(x0, s, t)
                close(long.mean * (part.mean if part else x0) / x0, 1.3 * m)
                ratio = (long.mean / x0) ** 2
                close(ratio * (part.variance if part else 0) + long.variance, v)
            if t > 1:  # the product of two Gaussians in x_s
                precision = 1 / v_s + (1 - beta) / beta
                mean = (1.3 * m_s / v_s + math.sqrt(1 - beta) * -0.7 / beta) / precision
                law = q.posterior(x0, x_t, t)
                close(law.mean, mean)
                close(law.variance, 1 / precision)

    def close(got, expected):
        torch.testing.assert_close(got, as_tensor(expected), rtol=1e-9, atol=1e-11)

    check()
    wrong = [change_marginal(lambda m, s, x0: (m, s**2)), change_marginal(lambda m, s, x0: (m**2 / x0, s))]
    if schedule.steps > 1:
        wrong += [
            change_posterior(lambda a, b, small, large, r: (a, b * (1 + 1e-6), small, large)),
            change_posterior(lambda a, b, small, large, r: (a * r, b, small, large)),
            change_posterior(lambda a, b, small, large, r: (a, b, large, large)),
        ]
    for perturb in wrong:
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            perturb(patch)
            check()


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_coordinate_tells_the_same_x0(prediction, monkeypatch):
    """A network that knows x_0 and eps: the kernel must get x_0 back from any coordinate, at any t."""
    schedule = LinearSchedule(100)
    ddpm = DDPM(schedule.betas.numpy())
    x0, eps = torch.randn(100, 3, dtype=F64), torch.randn(100, 3, dtype=F64)
    t = torch.arange(1, 101)
    ab, om, c1, c2 = (as_tensor(z)[:, None] for z in (ddpm.ab, ddpm.om, ddpm.c1, ddpm.c2))
    x_t = ab.sqrt() * x0 + om.sqrt() * eps
    told = {
        "eps": eps,
        "x0": x0,
        "v": ab.sqrt() * eps - om.sqrt() * x0,
        "score": -(x_t - ab.sqrt() * x0) / om,
        "previous": c1 * x0 + c2 * x_t,
    }[prediction]

    class Net(nn.Module):
        def forward(self, x, log_snr):
            return told

    p = ReverseKernel(Net(), schedule, prediction)
    torch.testing.assert_close(p.denoise(x_t, t), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p(x_t, t).mean, c1 * x0 + c2 * x_t, rtol=1e-9, atol=1e-9)
    if prediction != "previous":
        with monkeypatch.context() as patch:
            wrong_sign(patch)
            assert (p.denoise(x_t, t) - x0).abs().max() > 1e-3


# ---------------------------------------------------------------------- one timestep at a time


def traces(diffusion, x0, *args, guide=None, seed=None, fixed=None, **kwargs):
    """The guide's trace and the model's replayed against it; ``fixed``: values put in the guide's place."""
    guide = diffusion.guide if guide is None else guide
    if seed is not None:
        torch.manual_seed(seed)
    guide_trace = poutine.trace(guide).get_trace(x0, *args, **kwargs)
    if fixed:
        for name, value in fixed.items():
            guide_trace.nodes[name]["value"] = value
        guide_trace = poutine.trace(poutine.replay(guide, trace=guide_trace)).get_trace(x0, *args, **kwargs)
    model_trace = poutine.trace(poutine.replay(diffusion.model, trace=guide_trace)).get_trace(x0, *args, **kwargs)
    return model_trace, guide_trace


def enumerated(diffusion, x0, probability, weight, nodes=3):
    """E over t and noise of the one-timestep program's sites, per example: one call, t along the batch."""
    steps, (z, w) = diffusion.steps, (as_tensor(a) for a in hermite(nodes))
    law = diffusion.forward_process.marginal(x0, torch.arange(1, steps + 1)[:, None])
    x_t = law.mean + law.stddev * z[:, None, None, None]  # [K, T, B, D]
    shape = x_t.shape[:3]
    flat = x_t.flatten(0, 2)
    t = torch.arange(1, steps + 1)[:, None].expand(shape).flatten()
    many = x0.expand(x_t.shape).flatten(0, 2)
    weights = None if weight is None else weight[t - 1]
    found = elbo.site_terms(*traces(diffusion, many, t, weight=weights, fixed={"x_t": flat}))
    assert (found.pop("x_t") == 0).all()
    total = sum(found.values()).reshape(shape)
    return torch.einsum("k,t,ktb->b", w, probability, total)


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_timestep_estimates_enumerate_to_the_chain(prediction, variance, steps, monkeypatch):
    x0 = as_tensor(X0)
    diffusion, oracle = gaussian(linear_betas(steps), prediction, variance, 0.05, -0.02)
    prior, kl, nll = exact_terms(diffusion, x0)
    chain_value = prior + kl.sum(1) + nll
    uniform = torch.full((steps,), 1 / steps, dtype=F64)
    got = enumerated(diffusion, x0, uniform, None)
    torch.testing.assert_close(got, chain_value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got, as_tensor(oracle.nelbo(X0).sum(1)), rtol=1e-8, atol=1e-8)
    # any p(t), with weight 1 / p(t); here the importance sampler's after some losses
    sampler = ImportanceSampler(steps, history=2)
    for _ in range(2):
        sampler.update(torch.arange(1, steps + 1), torch.rand(steps) + 0.01)
    p = sampler.probabilities
    if steps > 1:
        assert (p - uniform).abs().max() > 1e-3
    got = enumerated(diffusion, x0, p, 1 / p)
    torch.testing.assert_close(got, chain_value, rtol=1e-10, atol=1e-10)
    # the weights that it hands out are those, in float32
    t, weight = sampler.sample(64)
    torch.testing.assert_close(weight, (1 / p[t - 1]).float(), rtol=0, atol=0)
    wrong = {
        "kl doubled": lambda patch: patch.setattr(
            elbo, "kl_divergence", lambda q, p, f=elbo.kl_divergence: 2 * f(q, p)
        ),
        "weight T + 1": lambda patch: change(
            patch, Program, "_one_step", lambda self, r, *_: (*r[:-1], r[-1] * (1 + 1 / steps))
        ),
    }
    for name, perturb in wrong.items():
        with monkeypatch.context() as patch:
            perturb(patch)
            off = (enumerated(diffusion, x0, uniform, None) - chain_value).abs()
            assert (off > 1e-6).all(), name


def test_importance_weights_are_unbiased_to_rounding():
    """Sum over t of p(t) L_t / p(t), by enumeration, for probabilities of any shape."""
    steps = 1000
    losses = torch.rand(steps, dtype=F64) ** 4 * 100
    sampler = ImportanceSampler(steps, history=1)
    sampler.update(torch.arange(1, steps + 1), losses)
    p = sampler.probabilities
    assert p.min() >= 0.001 / steps
    assert abs(p.sum() - 1) < 1e-12
    torch.testing.assert_close((p * (losses / p)).sum(), losses.sum(), rtol=1e-12, atol=0)
    # self-normalised weights, the usual mistake, are biased
    assert abs((p * (losses / p)).sum() / (p * (1 / p)).sum() * steps - losses.sum()) < 1e-9 * losses.sum()
    pairs = p[:, None] * p[None, :]
    ratio = (losses / p)[:, None] + (losses / p)[None, :]
    normaliser = (1 / p)[:, None] + (1 / p)[None, :]
    assert abs((pairs * ratio / normaliser * steps).sum() - losses.sum()) > 0.01 * losses.sum()


# ---------------------------------------------------------------------- the same numbers by stock Pyro


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_both_factorisations_of_q(steps, monkeypatch):
    """The guide (noisiest first) and ``noising`` (forward) are one joint law of x_1..x_T."""
    diffusion, _ = gaussian(linear_betas(steps), event_shape=(2,))
    x0 = as_tensor(X0)

    def densities(first, second):
        trace = poutine.trace(first).get_trace(x0)
        other = poutine.trace(poutine.replay(second, trace=trace)).get_trace(x0)
        names = [f"x_{t}" for t in range(1, steps + 1)]
        return [sum(r.nodes[n]["fn"].log_prob(r.nodes[n]["value"]) for n in names) for r in (trace, other)]

    for order in ((diffusion.guide, diffusion.noising), (diffusion.noising, diffusion.guide)):
        a, b = densities(*order)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        if steps > 1:
            with monkeypatch.context() as patch:
                change_posterior(lambda a, b, small, large, r: (a, b * (1 + 1e-4), small, large))(patch)
                a, b = densities(*order)
                assert ((a - b).abs() > 1e-7).any()


@pytest.mark.parametrize("bins", [None, (256, -1.5, 1.5)], ids=["normal", "discretised"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_ledger_is_stock_pyros_loss(steps, variance, bins):
    diffusion, _ = gaussian(linear_betas(steps), "v", variance, 0.05, bins=bins)
    x0 = as_tensor(X0)
    if bins:
        levels, low, high = bins
        width = (high - low) / (levels - 1)
        x0 = ((x0 - low) / width).round() * width + low
    stock = {"analytic": TraceMeanField_ELBO, "monte_carlo": Trace_ELBO}
    for kl, stock_elbo in stock.items():
        torch.manual_seed(5)
        terms = elbo_terms(diffusion, x0, kl=kl)
        sites = elbo.site_terms(*traces(diffusion, x0, seed=5), kl=kl)
        close = {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close(terms.prior, sites[f"x_{steps}"], **close)
        torch.testing.assert_close(terms.reconstruction, sites["x_0"], **close)
        assert terms.diffusion.shape == (3, steps - 1)
        for j in range(steps - 1):
            torch.testing.assert_close(terms.diffusion[:, j], sites[f"x_{j + 1}"], **close)
        for make in [stock_elbo] + [pyrodiff.TraceMeanField_ELBO] * (kl == "analytic"):
            torch.manual_seed(5)
            loss = make().loss(diffusion.model, diffusion.guide, x0)
            assert abs(loss + terms.elbo.sum().item()) <= 1e-10 * abs(loss)
        torch.manual_seed(6)
        assert abs(stock_elbo().loss(diffusion.model, diffusion.guide, x0) - loss) > 1e-6 * abs(loss)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_timestep_loss_is_the_sum_of_its_sites(steps):
    diffusion, _ = gaussian(linear_betas(steps), "eps", "learned_range", 0.05)
    x0, t = as_tensor(X0).repeat(2, 1), torch.tensor([1, 2, 7, 1, 3, 2]).clamp(max=steps)
    for kl, stock_elbo in {"analytic": TraceMeanField_ELBO, "monte_carlo": Trace_ELBO}.items():
        sites = elbo.site_terms(*traces(diffusion, x0, t, seed=3), kl=kl)
        torch.manual_seed(3)
        loss = stock_elbo().loss(diffusion.model, diffusion.guide, x0, t)
        assert abs(loss - sum(sites.values()).sum().item()) <= 1e-10 * abs(loss)
        # model and guide mask alike: no example has both the site of t = 1 and that of t > 1
        assert (sites["x_t"] == 0).all()
        assert ((sites["x_0"] != 0) == (t == 1)).all()
        if steps > 1:
            assert ((sites["x_s"] != 0) == (t > 1)).all()
        if kl == "analytic":  # which reads the guide's scales and masks only; the strict one, both
            torch.manual_seed(3)
            assert pyrodiff.TraceMeanField_ELBO().loss(diffusion.model, diffusion.guide, x0, t) == loss


# ---------------------------------------------------------------------- SVI against the closed form


@pytest.mark.monte_carlo
@pytest.mark.reliability("Q3")
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize("steps", [1, 2, 5, 50, pytest.param(1000, marks=pytest.mark.slow)])
def test_svi_estimates_hit_the_closed_form(steps, variance, figure):
    """Sums of chi-squares have light tails. A denoiser with a gain of 1.3 would be seen."""
    copies = 3000
    diffusion, oracle = gaussian(linear_betas(steps), "v", variance, event_shape=(1,))
    data = np.array([-0.4, 0.3, 1.1])
    x0 = as_tensor(data).repeat_interleave(copies)[:, None]
    truth = oracle.nelbo(data)
    _, neighbour = gaussian(linear_betas(steps), variance=variance, gain=0.3)
    for kl, guide, stock_elbo in (
        ("analytic", diffusion.guide, TraceMeanField_ELBO),
        ("monte_carlo", diffusion.guide, Trace_ELBO),
        ("monte_carlo", diffusion.noising, Trace_ELBO),
    ):
        seed = any_seed()
        values = sum(elbo.site_terms(*traces(diffusion, x0, guide=guide, seed=seed), kl=kl).values())
        torch.manual_seed(seed)
        loss = stock_elbo().loss(diffusion.model, guide, x0)
        assert abs(loss - values.sum().item()) <= 1e-10 * abs(loss)
        values = values.reshape(3, copies).T
        se = values.std(0).numpy() / math.sqrt(copies)
        z = np.abs(values.mean(0).numpy() - truth) / se
        figure("Q3", f"|z| of the {kl} KL, {type(guide).__name__.lower()}", z.max(), at_most=Z)
        figure.count("Q3", "z-tests", z.size, at_least=3 * 5 * 3 * 3)
        change = np.abs(neighbour.nelbo(data) - truth)
        assert_mean(values, truth, detects=np.where(change / se == (change / se).max(), change, math.inf))


def test_an_analytic_kl_with_the_forward_chain_is_wrong_and_the_strict_elbo_says_so():
    diffusion, oracle = gaussian(linear_betas(5), "v", event_shape=(1,))
    x0 = torch.full((20_000, 1), 0.3, dtype=F64)
    values = sum(elbo.site_terms(*traces(diffusion, x0, guide=diffusion.noising, seed=1)).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro warns, if its validation is on, and goes on
        torch.manual_seed(1)
        loss = TraceMeanField_ELBO().loss(diffusion.model, diffusion.noising, x0)
        assert abs(loss - values.sum().item()) <= 1e-10 * abs(loss)
        z = (values.mean() - oracle.nelbo(0.3)) / (values.std() / math.sqrt(len(values)))
        assert abs(z) > 25
        with pytest.raises(ProgramError, match="noisiest first"):
            pyrodiff.TraceMeanField_ELBO().loss(diffusion.model, diffusion.noising, x0)


# ---------------------------------------------------------------------- Renyi and importance weighting


def test_renyi_on_one_timestep_exceeds_log_p_and_the_strict_one_raises():
    diffusion, oracle = gaussian(linear_betas(50), "eps", event_shape=(1,))
    x0 = as_tensor([[0.3]])
    log_p = float(oracle.log_density(0.3))
    particles = {"alpha": 0.0, "num_particles": 200, "vectorize_particles": True, "max_plate_nesting": 1}
    t = torch.arange(1, 51).repeat(4)[:, None]  # [K, 1]: every timestep four times
    bounds = [-RenyiELBO(**particles).loss(diffusion.model, diffusion.guide, x0, t) for _ in range(5)]
    assert min(bounds) > log_p + 3  # no bound at all
    with pytest.raises(ProgramError, match="scaled or masked"):
        pyrodiff.RenyiELBO(**particles).loss(diffusion.model, diffusion.guide, x0, t)
    scaled, _ = gaussian(linear_betas(5), "eps", event_shape=(1,), data_size=10)
    with pytest.raises(ProgramError, match="scaled or masked"):
        pyrodiff.RenyiELBO(**particles).loss(scaled.model, scaled.guide, x0)


@pytest.mark.monte_carlo
@pytest.mark.parametrize("make", [RenyiELBO, pyrodiff.RenyiELBO], ids=["stock", "strict"])
def test_importance_weighted_bound_on_the_whole_chain(make):
    """ELBO < E IWAE(K) <= log p(x_0), the ends in closed form."""
    diffusion, oracle = gaussian(linear_betas(5), "eps", "fixed_small", event_shape=(1,))
    x0 = as_tensor([[0.9]])
    elbo_value, log_p = -float(oracle.nelbo(0.9)), float(oracle.log_density(0.9))
    assert log_p - elbo_value > 0.5  # a gap worth crossing
    found = []
    for k, repeats in ((4, 100), (256, 30)):
        bound = make(alpha=0.0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
        values = np.array([-bound.loss(diffusion.model, diffusion.guide, x0) for _ in range(repeats)])
        assert_mean(values, (elbo_value, log_p), detects=log_p - elbo_value)
        found.append(values)
    # of four particles it is not the ELBO
    assert_rejected(stats.norm.sf((found[0].mean() - elbo_value) / (found[0].std() / 10)), misses=1e-2)


# ---------------------------------------------------------------------- C2: samplers, without randomness


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_every_step_of_the_models_law(steps, variance):
    """The sites of the unconditioned program, and the ancestral step, are A x + B + sigma z."""
    diffusion, oracle = gaussian(linear_betas(steps), "v", variance, 0.05, -0.02)
    trace = poutine.trace(diffusion.model).get_trace()
    x = {t: trace.nodes[f"x_{t}"]["value"] for t in range(steps + 1)}
    p = diffusion.reverse_kernel
    for t, (A, B, var) in enumerate(oracle.steps_of_the_chain(), 1):
        law = trace.nodes[f"x_{t - 1}"]["fn"]
        dtype = x[t].dtype  # the program without data runs in the network's dtype
        torch.testing.assert_close(law.mean, A * x[t] + B, rtol=1e-4, atol=1e-5)
        state = x[t].double()
        mean, std, _ = sampling.ancestral(p, state, t, None, 0.0, {})
        points = [mean + std * z for z in (-1.0, 0.0, 1.0)]
        torch.testing.assert_close(points[1], A * state + B, rtol=1e-9, atol=1e-9)
        for point, z in zip(points, (-1.0, 0.0, 1.0), strict=True):
            torch.testing.assert_close(
                point - points[1], torch.full_like(state, z * math.sqrt(var)), rtol=1e-9, atol=1e-9
            )
        assert dtype == torch.float32


class Unit(nn.Module):
    """Makes a network of parameter-free parts float64, which is the dtype samplers then use."""

    def __init__(self, net):
        super().__init__()
        self.net, self.dtype = net, nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, log_snr):
        return self.net(x, log_snr)


def impulse_responses(monkeypatch, diffusion, **options):
    """x_0 = c + sum_i c_i z_i of a linear sampler: the constant c, and c_i for z_T (x_T), ..., z_1.

    Each sample is fed zeros but for one of its noises, through the public ``sample``.
    """
    length = diffusion.steps if options.get("steps") is None else int(options["steps"])

    # one row of x_T, z_T, ..., z_1 is 1 in the sample of its number, and the last sample has none
    units = torch.eye(length + 1, length + 2, dtype=F64).reshape(
        length + 1, length + 2, *(1,) * len(diffusion.event_shape)
    )
    noises = iter(units.expand(-1, -1, *diffusion.event_shape))

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_noise", lambda *args: noises)
        x0 = pyrodiff.sample(diffusion, length + 2, batch_size=length + 2, **options)[:, 0]
    assert next(noises, None) is None
    return x0[-1], x0[:-1] - x0[-1]


@pytest.mark.reliability("Q12")
@pytest.mark.parametrize(
    ("steps", "variance"),
    [(steps, v) for steps in (1, 2, 5, 50) for v in VARIANCES] + [(1000, "fixed_small"), (1000, "learned_range")],
)
def test_moments_of_ancestral_samples(steps, variance, monkeypatch, figure):
    diffusion, oracle = gaussian(linear_betas(steps), "eps", variance, 0.02, -0.01, event_shape=(1,))
    diffusion.reverse_kernel.net = Unit(diffusion.net)
    mean, response = impulse_responses(monkeypatch, diffusion, last="sample")
    mu, V = oracle.marginal()
    figure("Q12", "error of the mean, by recursion", abs(mean.item() - mu), at_most=1e-9)
    figure("Q12", "error of the variance, by recursion", abs(response.square().sum().item() - V), at_most=1e-9)
    if steps == 1000:
        return
    # by default the last step adds no noise
    mean, response = impulse_responses(monkeypatch, diffusion)
    mu_mean, V_mean = oracle.marginal(last_variance=0.0)
    assert abs(mean.item() - mu_mean) < 1e-9
    assert response[-1].abs() < 1e-12
    assert abs(response.square().sum().item() - V_mean) < 1e-9
    assert abs(V - V_mean) > 1e-6
    if steps > 1:  # negative control: variance for standard deviation
        with monkeypatch.context() as patch:
            change_scale(lambda std: std**2)(patch)
            _, response = impulse_responses(monkeypatch, diffusion)
            assert abs(response.square().sum().item() - V_mean) > 1e-6


@pytest.mark.reliability("Q12")
def test_moments_of_respaced_ancestral_samples(monkeypatch):
    """Respacing to 10 steps is the chain of the 10 respaced betas."""
    diffusion, _ = gaussian(linear_betas(1000), "eps", event_shape=(1,))
    diffusion.reverse_kernel.net = Unit(GaussianDenoiser("eps"))
    short = diffusion.schedule.respace(10)
    _, oracle = gaussian(short.betas.numpy())
    mean, response = impulse_responses(monkeypatch, diffusion, steps=10, last="sample")
    mu, V = oracle.marginal()
    assert abs(mean.item() - mu) < 1e-9
    assert abs(response.square().sum().item() - V) < 1e-9


@pytest.mark.reliability("Q2")
def test_ddim_is_a_first_order_solver_of_the_ode(monkeypatch):
    errors = {}
    for steps, printed in ((10, -9.6e-2), (100, -1.42e-2), (1000, -1.51e-3)):
        betas = linear_betas(steps)
        diffusion, oracle = gaussian(betas, "eps", event_shape=(1,))
        diffusion.reverse_kernel.net = Unit(diffusion.net)
        constant, response = impulse_responses(monkeypatch, diffusion, method="ddim")
        assert response[1:].abs().max() < 1e-12  # deterministic but for x_T
        slope = response[0].item()
        # Song et al. eq. 12 with the exact denoiser, as a product of slopes
        d, k = oracle.ddpm, oracle.A
        product = np.prod(np.sqrt(d.ab_s) * k + np.sqrt(d.om_s / d.om) * (1 - np.sqrt(d.ab) * k))
        assert abs(slope - product) < 1e-9
        ode = math.sqrt(VAR / oracle.v[-1])
        errors[steps] = slope - ode
        assert abs(errors[steps] - printed) < 10.0 ** math.floor(math.log10(-printed) - 1) * 0.51
        # the mean of the data is a fixed line of the flow
        assert abs(constant.item() + slope * math.sqrt(d.ab[-1]) * MEAN - MEAN) < 1e-9
    assert 6 < errors[10] / errors[100] < 12
    assert 6 < errors[100] / errors[1000] < 12


@pytest.mark.reliability("Q12")
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise(eta, monkeypatch):
    """Variance of Song et al. eq. 12 with sigma = eta sqrt(beta-tilde); eta = 1 is fixed_small ancestral sampling."""
    diffusion, oracle = gaussian(linear_betas(50), "v", "fixed_small", event_shape=(1,))
    diffusion.reverse_kernel.net = Unit(diffusion.net)
    mean, response = impulse_responses(monkeypatch, diffusion, method="ddim", eta=eta)
    d, k, B = oracle.ddpm, oracle.A, oracle.B
    mu, V = 0.0, 1.0
    for i in range(49, -1, -1):
        along = np.sqrt(d.om_s[i] - eta**2 * d.bt[i]) / np.sqrt(d.om[i])
        slope = np.sqrt(d.ab_s[i]) * k[i] + along * (1 - np.sqrt(d.ab[i]) * k[i])
        mu = slope * mu + (np.sqrt(d.ab_s[i]) - along * np.sqrt(d.ab[i])) * B[i]
        V = slope**2 * V + eta**2 * d.bt[i]
    assert abs(mean.item() - mu) < 1e-9
    assert abs(response.square().sum().item() - V) < 1e-9
    if eta == 1:
        assert abs(V - oracle.marginal(last_variance=0.0)[1]) < 1e-9


# ---------------------------------------------------------------------- C3: mixture of Gaussians


MIXTURE = ([0.3, 0.7], [-0.6, 0.5], [0.01, 0.04])


def mixture_data(nodes):
    """Quadrature for means over the mixture: points and weights."""
    z, w = hermite(nodes)
    weights, means, variances = (np.array(a)[:, None] for a in MIXTURE)
    return (means + np.sqrt(variances) * z).ravel(), (weights * w).ravel()


def mixture_entropy():
    x = np.linspace(-3, 3, 400_001)
    p = sum(w * np.exp(-0.5 * (x - m) ** 2 / s) / math.sqrt(2 * math.pi * s) for w, m, s in zip(*MIXTURE, strict=True))
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum() * (x[1] - x[0]))


def test_mixture_denoiser_is_tweedies_formula():
    """The oracle itself, against quadrature over x_0, and its score coordinate."""
    x0, grid = np.linspace(-3, 3, 20_001), np.linspace(-1.5, 1.5, 7)
    prior = sum(w * np.exp(-0.5 * (x0 - m) ** 2 / s) / math.sqrt(s) for w, m, s in zip(*MIXTURE, strict=True))
    for log_snr in (9.0, 2.0, -1.0, -9.0):
        ab, om = 1 / (1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))
        log_p = -0.5 * (grid[:, None] - math.sqrt(ab) * x0) ** 2 / om
        p = np.exp(log_p - log_p.max(1, keepdims=True)) * prior
        x, lam = as_tensor(grid)[:, None], torch.full((7,), log_snr, dtype=F64)
        got = MixtureDenoiser(*MIXTURE)(x, lam)[:, 0]
        torch.testing.assert_close(got, as_tensor(p @ x0 / p.sum(1)), rtol=1e-9, atol=1e-9)
        score = MixtureDenoiser(*MIXTURE, "score")(x, lam)[:, 0]
        torch.testing.assert_close((x[:, 0] + om * score) / math.sqrt(ab), got, rtol=1e-9, atol=1e-9)


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize(("rule", "printed"), [("large", 0.2596556), ("small", 0.9647617)])
def test_mixture_bound(rule, printed):
    betas = linear_betas(200)
    data, weights = mixture_data(48)
    x0 = as_tensor(data)[:, None]

    def build(prediction, decoder):
        if rule == "small":
            net, variance = MixtureDenoiser(*MIXTURE, prediction, betas), "fixed_small"
        elif decoder == "vdm":
            net, variance = MixtureDenoiser(*MIXTURE, prediction, betas), "fixed_large"
        else:  # beta at t = 1 too: as a learned variance
            net, variance = MixtureDenoiser(*MIXTURE, prediction, betas, np.log(betas)), "learned"
        schedule = TableSchedule(betas.tolist())
        return GaussianDiffusion(net, schedule, (1,), prediction=prediction, variance=variance, decoder=decoder)

    prior, kl, nll = (as_tensor(weights) @ z for z in exact_terms(build("eps", "openai"), x0, 48))
    rest = float(prior + kl.sum())
    entropy = mixture_entropy()
    assert abs(entropy - 0.2120231) < 6e-8
    assert abs(rest + float(nll) - printed) < 6e-8
    # the same from another coordinate and with VDM's decoder, at some t
    other = build("v", "vdm")
    q, p, z = other.forward_process, other.reverse_kernel, as_tensor(hermite(48)[0])[:, None, None]
    for t in (2, 20, 200):
        law = q.marginal(x0, t)
        x_t = law.mean + law.stddev * z
        found = as_tensor(hermite(48)[1]) @ elbo.kl_divergence(q.posterior(x0, x_t, t), p(x_t, t))
        assert abs(as_tensor(weights) @ found - kl[t - 2]) < 1e-9
    law = q.marginal(x0, 1)
    found = as_tensor(hermite(48)[1]) @ -p.decode(law.mean + law.stddev * z).log_prob(x0)
    nll_vdm = float(as_tensor(weights) @ found)
    assert entropy < rest + nll_vdm
    # VDM's scale by the adapted formula: the same squared error at t = 1 under another variance
    d = DDPM(betas)
    var = {"large": d.beta[0], "small": d.bt[1]}[rule]
    error = 2 * var * (float(nll) - 0.5 * math.log(2 * math.pi * var))
    vdm = d.om[0] / d.ab[0]
    assert abs(nll_vdm - 0.5 * math.log(2 * math.pi * vdm) - error / (2 * vdm)) < 1e-8


# ---------------------------------------------------------------------- C4: discrete data


def discrete_case():
    values = torch.arange(256, dtype=F64) * 2 / 255 - 1
    generator = torch.Generator().manual_seed(0)
    pmf = torch.softmax(torch.randn(256, dtype=F64, generator=generator) * 1.5, 0)
    return values, pmf


def discrete_nelbo(steps, rule, decoder="openai"):
    """Minus the bound in bits, mean over the pmf, one t at a time: 32 Hermite nodes."""
    betas, (values, pmf) = linear_betas(steps), discrete_case()
    output = np.log(betas) if rule == "large" and decoder == "openai" else None
    variance = "learned" if output is not None else f"fixed_{rule}"
    net = GridDenoiser(values, pmf, "x0", betas, output)
    diffusion = GaussianDiffusion(
        net, TableSchedule(betas.tolist()), (1,), prediction="x0", variance=variance, decoder=decoder, bins=(256, -1, 1)
    )
    q, p, x0 = diffusion.forward_process, diffusion.reverse_kernel, values[:, None]
    z, w = (as_tensor(a) for a in hermite(32))
    total = pmf @ elbo.kl_divergence(q.marginal(x0, steps), q.prior(x0.shape, x0))
    for t in range(1, steps + 1):
        law = q.marginal(x0, t)
        x_t = law.mean + law.stddev * z[:, None, None]
        if t > 1:
            terms = elbo.kl_divergence(q.posterior(x0, x_t, t), p(x_t, t))
        else:
            decoder_law = p.decode(x_t)
            terms = -decoder_law.log_prob(x0)
            mass = decoder_law.base_dist.pmf().sum(-1)
            assert (mass - 1).abs().max() <= 1e-13
        total = total + w @ terms @ pmf
    return float(total) / math.log(2), float(-(pmf * pmf.log()).sum()) / math.log(2)


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize(
    ("steps", "rule", "printed"),
    [
        (50, "large", 7.920607),
        (200, "small", 8.654038),
        pytest.param(200, "large", 7.692277, marks=pytest.mark.slow),
    ],
)
def test_discrete_data(steps, rule, printed):
    nelbo, entropy = discrete_nelbo(steps, rule)
    assert abs(entropy - 6.403345) < 6e-7
    assert abs(nelbo - printed) < 6e-7, f"{nelbo:.7f}"
    assert nelbo > entropy


def test_discrete_data_with_vdms_decoder():
    nelbo, entropy = discrete_nelbo(10, "small", "vdm")
    assert entropy < nelbo


# ---------------------------------------------------------------------- C7: the zero network


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize("schedule", [LinearSchedule(100), CosineSchedule(7)], ids=["linear", "cosine"])
def test_a_zero_networks_simple_loss_is_one_per_dim(schedule):
    """E |eps - 0|^2 = D, exactly, at every t and with any data."""

    class Zero(nn.Module):
        def forward(self, x, log_snr):
            return torch.zeros_like(x)

    diffusion = GaussianDiffusion(Zero(), schedule, (2,), objective="simple")
    x0 = as_tensor(X0)
    probability = torch.full((schedule.steps,), 1 / schedule.steps, dtype=F64)
    got = enumerated(diffusion, x0, probability, None)
    torch.testing.assert_close(got, torch.full((3,), 2.0, dtype=F64), rtol=1e-9, atol=0)
    for t in range(schedule.steps):
        one = torch.zeros(schedule.steps, dtype=F64)
        one[t] = 1.0
        if t % 13 == 0:
            torch.testing.assert_close(enumerated(diffusion, x0, one, None), got, rtol=1e-8, atol=0)


@pytest.mark.parametrize("objective", ["simple", "min_snr", "p2", "hybrid"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_error_term_of_every_objective(prediction, objective):
    """``simple``: the network's output against the target it is told; the others: published weights of the x_0 error."""
    steps = 30
    betas = linear_betas(steps)
    diffusion, oracle = gaussian(betas, prediction, "fixed_small", 0.05, -0.02, objective=objective)
    d, t = oracle.ddpm, torch.arange(1, steps + 1)
    x0 = torch.randn(steps, 2, dtype=F64)
    eps = torch.randn(steps, 2, dtype=F64)
    ab, om, c1, c2 = (as_tensor(a)[:, None] for a in (d.ab, d.om, d.c1, d.c2))
    x_t = ab.sqrt() * x0 + om.sqrt() * eps
    x0_hat = as_tensor(oracle.A)[:, None] * x_t + as_tensor(oracle.B)[:, None]
    if objective in ("simple", "hybrid"):
        target = {
            "eps": eps,
            "x0": x0,
            "v": ab.sqrt() * eps - om.sqrt() * x0,
            "score": -eps / om.sqrt(),
            "previous": c1 * x0 + c2 * x_t,
        }[prediction]
        expected = (target - diffusion.net(x_t, as_tensor(d.log_snr))) ** 2
    else:
        weight = {"min_snr": (ab / om).clamp(max=5.0), "p2": ab}[objective]
        expected = weight * (x0 - x0_hat) ** 2
    for weight in (None, torch.rand(steps, dtype=F64) + 0.5):  # T p(t) = 1 is the default
        model, _ = traces(diffusion, x0, t, weight=weight, fixed={"x_t": x_t})
        factor = model.nodes["x_objective"]
        got = -factor["fn"].log_prob(factor["value"])
        share = 1.0 if weight is None else weight / steps
        torch.testing.assert_close(got, expected.sum(1) * share, rtol=1e-9, atol=1e-12)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(got.roll(1), expected.sum(1) * share, rtol=1e-9, atol=1e-12)


@pytest.mark.monte_carlo
def test_the_first_loss_of_a_fresh_unet():
    net = pyrodiff.nets.UNet(1, width=8, multipliers=(1, 2), blocks=1)
    diffusion = GaussianDiffusion(net, LinearSchedule(1000), (1, 8, 8), objective="simple")
    x0 = torch.rand(64, 1, 8, 8) * 2 - 1
    t = pyrodiff.timesteps.low_discrepancy(64, 1000)
    loss = TraceMeanField_ELBO().loss(diffusion.model, diffusion.guide, x0, t) / x0.numel()
    assert_estimate(loss, math.sqrt(2 / x0.numel()), 1.0, detects=0.3)  # of a network that returns 0: a chi-square


# ---------------------------------------------------------------------- C8: degenerate cases


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_constant_data(prediction, steps):
    """s -> 0: the denoiser says the mean whatever it sees, and the chain ends there."""
    betas = linear_betas(steps)
    diffusion, oracle = gaussian(betas, prediction, var=1e-300, event_shape=(1,))
    x0 = torch.full((2, 1), MEAN, dtype=F64)
    assert excess(exact_terms(diffusion, x0), closed_terms(oracle, x0)) <= 1
    _, kl, _ = exact_terms(diffusion, x0)
    assert kl.abs().max() < 1e-9 if steps > 1 else kl.numel() == 0  # q and p are the same law
    mu, _ = oracle.marginal()
    assert abs(mu - MEAN) < 1e-9
    if prediction == "x0":
        x = sampling.ancestral(diffusion.reverse_kernel, torch.randn(2, 1, dtype=F64), 1, None, 0.0, {}).mean
        torch.testing.assert_close(x, x0)


@pytest.mark.reliability("Q2")
@pytest.mark.parametrize("event_shape", [(1,), (1, 1, 1), (2, 1), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_event_shape_and_one_example(steps, batch, event_shape):
    diffusion, oracle = gaussian(linear_betas(steps), "v", "learned_range", 0.05, event_shape=event_shape)
    x0 = torch.randn(batch, *event_shape, dtype=F64)
    # a node per element at once would do for sums, but the shapes here are the point: three separate calls
    assert excess(exact_terms_any_shape(diffusion, x0), closed_terms(oracle, x0)) <= 1
    terms = elbo_terms(diffusion, x0)
    assert terms.diffusion.shape == (batch, steps - 1)
    assert terms.elbo.shape == (batch,)
    t = torch.full((batch,), steps)
    for loss in (TraceMeanField_ELBO(), Trace_ELBO()):
        assert math.isfinite(loss.loss(diffusion.model, diffusion.guide, x0, t))


@torch.no_grad()
def exact_terms_any_shape(diffusion, x0):
    q, p, steps = diffusion.forward_process, diffusion.reverse_kernel, diffusion.steps
    z, w = hermite(3)
    prior = elbo.kl_divergence(q.marginal(x0, steps), q.prior(x0.shape, x0))
    kl, nll = torch.zeros(len(x0), steps - 1, dtype=F64), torch.zeros(len(x0), dtype=F64)
    for node, weight in zip(z, w, strict=True):
        for t in range(2, steps + 1):
            ts = torch.full((len(x0),), t)
            law = q.marginal(x0, ts)
            x_t = law.mean + law.stddev * node
            kl[:, t - 2] += weight * elbo.kl_divergence(q.posterior(x0, x_t, ts), p(x_t, ts))
        law = q.marginal(x0, 1)
        nll += weight * -p.decode(law.mean + law.stddev * node).log_prob(x0)
    return prior, kl, nll


@pytest.mark.reliability("Q2")
def test_a_mixture_of_one_is_gaussian():
    betas = linear_betas(50)
    _, oracle = gaussian(betas, event_shape=(2,))
    net = MixtureDenoiser([1.0], [MEAN], [VAR], "eps", betas)
    diffusion = GaussianDiffusion(net, TableSchedule(betas.tolist()), (2,))
    x0 = as_tensor(X0)
    assert excess(exact_terms(diffusion, x0), closed_terms(oracle, x0)) <= 1


# ---------------------------------------------------------------------- gradients


class LearnedSchedule(Schedule):
    """Four steps whose log-SNR falls by softplus of a parameter each: monotone, differentiable."""

    def __init__(self, steps=4):
        super().__init__()
        self.steps = steps
        self.drops = nn.Parameter(torch.linspace(0.3, 1.2, steps, dtype=F64))

    def log_snr(self, t):
        values = 5.0 - nn.functional.softplus(self.drops).cumsum(0)
        table = torch.cat([values.new_tensor([math.inf]), values])
        return table[torch.as_tensor(t)]


@pytest.mark.parametrize("method", ["marginal", "transition", "posterior"])
def test_rsample_carries_gradients_and_sample_does_not(method):
    schedule = LearnedSchedule()
    q = ForwardProcess(schedule)
    x0 = torch.randn(3, 2, dtype=F64, requires_grad=True)
    t = torch.tensor([2, 3, 4])
    law = {
        "marginal": lambda: q.marginal(x0, t),
        "transition": lambda: q.transition(x0, t - 1, t),
        "posterior": lambda: q.posterior(x0, torch.ones(3, 2, dtype=F64), t),
    }[method]
    draw = law().rsample()
    gradients = torch.autograd.grad(draw.sum(), [x0, schedule.drops])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    expected = {
        "marginal": schedule.alpha(t),
        "transition": schedule.alpha(t) / schedule.alpha(t - 1),
        "posterior": schedule.alpha(t - 1) * -torch.expm1(schedule.log_snr(t) - schedule.log_snr(t - 1)),
    }[method]
    torch.testing.assert_close(gradients[0], expected.detach()[:, None].expand(3, 2))
    assert not law().sample().requires_grad

    # the noise is in it: finite differences at one seed
    def value(drops):
        with torch.no_grad():
            schedule.drops.copy_(drops)
        torch.manual_seed(2)
        return law().rsample().sum()

    start = schedule.drops.detach().clone()
    gradient = torch.autograd.grad(value(start), schedule.drops)[0]
    torch.testing.assert_close(gradient, finite_differences(value, start), rtol=1e-6, atol=1e-8)


def finite_differences(function, x, h=1e-5):
    rows = []
    for i in range(len(x)):
        step = torch.zeros_like(x)
        step[i] = h
        rows.append((function(x + step) - function(x - step)).item() / (2 * h))
    return torch.tensor(rows, dtype=F64)


class Small(nn.Module):
    """A little network that uses its log-SNR."""

    def __init__(self, channels=2, outputs=2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(outputs, channels + 1, dtype=F64, generator=generator) * 0.4)

    def forward(self, x, log_snr):
        return torch.tanh(torch.cat([x, log_snr[:, None] / 5], 1) @ self.weight.T)


def test_the_networks_gradient_does_not_need_rsample():
    diffusion = GaussianDiffusion(Small(), LinearSchedule(50), (2,))
    q, p = diffusion.forward_process, diffusion.reverse_kernel
    x0, t = as_tensor(X0).requires_grad_(), torch.tensor([2, 20, 50])
    gradients = {}
    for how in ("rsample", "sample"):
        torch.manual_seed(4)
        x_t = getattr(q.marginal(x0, t), how)()
        assert x_t.requires_grad == (how == "rsample")
        loss = elbo.kl_divergence(q.posterior(x0, x_t, t), p(x_t, t)).sum()
        gradients[how] = torch.autograd.grad(loss, diffusion.net.weight)[0]
    assert gradients["rsample"].abs().sum() > 0
    torch.testing.assert_close(gradients["rsample"], gradients["sample"], rtol=1e-12, atol=1e-14)


OPTIONS = [
    (prediction, variance, decoder)
    for prediction in PREDICTIONS
    for variance, decoder in (("fixed_small", "vdm"), ("fixed_large", "learned"), ("learned_range", "openai"))
]


@pytest.mark.parametrize(("prediction", "variance", "decoder"), OPTIONS)
def test_gradient_of_the_bound_with_a_learned_schedule(prediction, variance, decoder):
    """At fixed noise, against finite differences, for the schedule and the network, both programs."""
    schedule = LearnedSchedule()
    net = Small(outputs=4 if variance == "learned_range" else 2)
    diffusion = GaussianDiffusion(
        net, schedule, (2,), prediction=prediction, variance=variance, decoder=decoder
    ).double()
    x0 = as_tensor(X0).repeat(2, 1)
    for args in ((x0,), (x0, torch.tensor([1, 2, 3, 4, 1, 2]))):
        for make in (TraceMeanField_ELBO, Trace_ELBO):
            for parameter in (schedule.drops, net.weight):
                start = parameter.detach().clone()

                def value(flat, parameter=parameter, args=args, make=make):
                    with torch.no_grad():
                        parameter.copy_(flat.reshape(parameter.shape))
                    torch.manual_seed(8)
                    return make().differentiable_loss(diffusion.model, diffusion.guide, *args)

                gradient = torch.autograd.grad(value(start.flatten()), parameter)[0].flatten()
                expected = finite_differences(value, start.flatten())
                value(start.flatten())
                assert gradient.abs().max() > 1e-3
                torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# ---------------------------------------------------------------------- a schedule per pixel


class PixelSchedule(Schedule):
    """A table of log-SNR per element of the event."""

    def __init__(self, table):
        super().__init__()
        self.steps = len(table)
        self.event_dim = table.dim() - 1
        self.table = torch.cat([torch.full_like(table[:1], math.inf), table])

    def log_snr(self, t):
        return self.table[torch.as_tensor(t)]


class Blind(nn.Module):
    """Elementwise, and blind to the log-SNR: the same in one pixel as in many."""

    def __init__(self, learned=False):
        super().__init__()
        self.learned = learned

    def forward(self, x, log_snr):
        out = torch.tanh(0.8 * x - 0.1)
        return torch.cat([out, torch.cos(2 * x)], 1) if self.learned else out


@pytest.mark.parametrize(("prediction", "variance", "decoder"), OPTIONS)
def test_a_schedule_per_pixel_that_is_constant(prediction, variance, decoder):
    scalar = LinearSchedule(30)
    lam = scalar.log_snr(torch.arange(1, 31))
    pixels = PixelSchedule(lam[:, None, None].expand(30, 2, 3).clone())
    if decoder == "learned":  # its scale starts as a float32 number: the one below compares it
        decoder = "vdm"
    options = {"prediction": prediction, "variance": variance, "decoder": decoder}
    net = Blind(variance == "learned_range")
    x0 = torch.randn(4, 2, 3, dtype=F64)
    values = []
    for schedule in (scalar, pixels):
        diffusion = GaussianDiffusion(net, schedule, (2, 3), **options)
        torch.manual_seed(1)
        terms = elbo_terms(diffusion, x0)
        torch.manual_seed(1)
        loss = TraceMeanField_ELBO().loss(diffusion.model, diffusion.guide, x0, torch.tensor([1, 2, 15, 30]))
        values.append((terms.prior, terms.diffusion, terms.reconstruction, as_tensor(loss)))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("prediction", "variance", "decoder"), OPTIONS)
def test_a_schedule_per_pixel_against_a_loop_over_pixels(prediction, variance, decoder):
    """Blind networks see no other pixel: each is a diffusion of its own, with a scalar schedule."""
    if decoder == "learned":
        decoder = "vdm"
    steps, channels = 6, 3
    table = torch.stack([torch.linspace(6.0 - c, -5.0 + 0.5 * c, steps, dtype=F64) for c in range(channels)], 1)
    options = {"prediction": prediction, "variance": variance, "decoder": decoder}
    net = Blind(variance == "learned_range")
    x0 = torch.randn(4, channels, dtype=F64)
    whole = GaussianDiffusion(net, PixelSchedule(table), (channels,), **options)
    got = exact_terms(whole, x0, 8)
    parts = []
    for c in range(channels):
        part = GaussianDiffusion(net, PixelSchedule(table[:, c]), (1,), **options)
        parts.append(exact_terms(part, x0[:, c : c + 1], 8))
    expected = [sum(terms) for terms in zip(*parts, strict=True)]
    assert excess(got, expected, 1e-10) <= 1
    # one timestep at a time it is the same bound again
    uniform = torch.full((steps,), 1 / steps, dtype=F64)
    one_by_one = enumerated(whole, x0, uniform, None, 8)
    torch.testing.assert_close(one_by_one, got[0] + got[1].sum(1) + got[2], rtol=1e-10, atol=1e-10)
    # negative control: the pixels' schedules permuted
    permuted = GaussianDiffusion(net, PixelSchedule(table.roll(1, 1)), (channels,), **options)
    assert excess(exact_terms(permuted, x0, 8), expected, 1e-10) > 1
    # the samplers take it too
    for method in ("ancestral", "ddim"):
        assert pyrodiff.sample(whole, 2, method, seed=0).isfinite().all()


@pytest.mark.parametrize("event_shape", [(3, 2, 4), (3, 4, 3), (3,)], ids=str)
def test_a_schedule_per_channel(event_shape):
    """Fewer event dims than the data: the values belong to the first ones, whatever the size of the last."""
    steps = 6
    table = torch.stack([torch.linspace(6.0 - c, -5.0 + 0.5 * c, steps, dtype=F64) for c in range(3)], 1)
    x0 = torch.randn(4, *event_shape, dtype=F64)
    for variance, decoder in (("fixed_small", "vdm"), ("fixed_large", "learned"), ("learned_range", "openai")):
        options = {"variance": variance, "decoder": decoder}
        net = Blind(variance == "learned_range")
        whole = GaussianDiffusion(net, PixelSchedule(table), event_shape, **options)
        parts = []
        for c in range(3):
            part = GaussianDiffusion(net, PixelSchedule(table[:, c]), (1, *event_shape[1:]), **options)
            parts.append(exact_terms_any_shape(part, x0[:, c : c + 1]))
        expected = [sum(terms) for terms in zip(*parts, strict=True)]
        # a learned decoder starts at each channel's sigma_1 / alpha_1, rounded to float32
        tolerance = 1e-5 if decoder == "learned" else 1e-10
        assert excess(exact_terms_any_shape(whole, x0), expected, tolerance) <= 1, decoder


def test_the_network_sees_the_mean_of_a_schedule_per_pixel():
    seen = []

    class Watching(nn.Module):
        def forward(self, x, log_snr):
            seen.append(log_snr)
            return torch.zeros_like(x)

    table = torch.linspace(5.0, -5.0, 6 * 2 * 3, dtype=F64).reshape(6, 2, 3)
    t = torch.tensor([1, 2, 6])
    GaussianDiffusion(Watching(), PixelSchedule(table), (2, 3)).reverse_kernel.predict(
        torch.randn(3, 2, 3, dtype=F64), t
    )
    torch.testing.assert_close(seen[0], table[t - 1].mean((1, 2)), rtol=1e-14, atol=1e-14)


def test_bits_per_dim_is_the_only_change_of_unit():
    diffusion, oracle = gaussian(linear_betas(1), event_shape=(2,))
    terms = elbo_terms(diffusion, as_tensor(X0))
    expected = oracle.prior(X0).sum(1).mean() / (2 * math.log(2))
    assert abs(pyrodiff.bits_per_dim(terms, "prior").mean - expected) < 1e-12
    pyro.clear_param_store()
