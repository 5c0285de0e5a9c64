"""A diffusion as the prior of a site: against closed forms, enumeration of timesteps, quadrature and grids."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from monte_carlo import any_seed, assert_estimate, assert_mean, assert_moments
from oracles import DDPM, GaussianDenoiser, LinearModel, hermite
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer import TraceMeanField_ELBO as StockMeanField
from pyro.infer.autoguide import AutoGaussian, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.infer.mcmc.util import initialize_model
from pyro.optim import Adam, ClippedAdam
from torch import nn

import pyrodiff
from pyrodiff import GaussianDiffusion, LogLinearSchedule, nets
from pyrodiff.errors import OptionError, ProgramError, ShapeError
from pyrodiff.inference import DenoiserGuide, DiffusionPrior, FlowReparam, bound, steps_bias
from pyrodiff.likelihood.flow import log_density

LOW, HIGH = -8.0, 8.0
NOISE_VARIANCE = 0.25


class Conditional(nn.Module):
    """Exact for data N(means[y], var), or N(theta, var): ``net(x, log_snr, y=...)`` or ``theta=...``."""

    def __init__(self, var: float = 1.0, means: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.var, self.means = var, torch.tensor(means)

    def forward(self, x, log_snr, y=None, theta=None):
        def shaped(value):
            return value.reshape(-1, *(1,) * (x.dim() - 1))

        mean = shaped(self.means[y] if theta is None else theta).to(x.dtype)
        alpha, var = shaped(log_snr.sigmoid().sqrt()), shaped((-log_snr).sigmoid())
        return mean + alpha * self.var / (alpha**2 * self.var + var) * (x - alpha * mean)


def schedule(steps):
    return LogLinearSchedule(steps, LOW, HIGH)


def gaussian(steps, mean=0.0, var=1.0, event=(1,), **options):
    return GaussianDiffusion(GaussianDenoiser("x0", mean=mean, var=var), schedule(steps), event, "x0", **options)


def conditional(steps, event=(1,), **options):
    return GaussianDiffusion(Conditional(**options), schedule(steps), event, "x0")


def oracle(steps, mean=0.0, var=1.0, rule="fixed_small"):
    ddpm = DDPM(schedule(steps).betas.numpy())
    variances = ddpm.variances(rule) if steps > 1 else np.ones(1)
    return LinearModel(ddpm, variances, ddpm.decoder_variance("vdm"), mean=mean, var=var)


def quadratic(steps, mean=0.0, var=1.0):
    """The bound as a prior is exp(-(P / 2) (x - a)^2): P and a."""
    below, at, above = oracle(steps, mean, var).nelbo(np.array([mean - 1, mean, mean + 1]))
    precision = below + above - 2 * at
    return precision, mean - (above - below) / 2 / precision


def continuous_nelbo(x, mean=0.0, var=1.0):
    """T to infinity: the error is a series in 1 / (T - 1), whose first term cancels (the next is 1e-5 here)."""
    coarse, fine = (oracle(steps, mean, var).nelbo(x) for steps in (4001, 8001))
    return 2 * fine - coarse


def fit(model, guide, *args, particles=400, steps=300, lr=0.05, nesting=0, elbo=Trace_ELBO, last=100):
    """Stock SVI; afterwards the parameters are the averages of the last steps'."""
    optim = ClippedAdam({"lr": lr, "lrd": 0.02 ** (1 / steps)})
    svi = SVI(model, guide, optim, elbo(num_particles=particles, vectorize_particles=True, max_plate_nesting=nesting))
    sums: dict[str, torch.Tensor] = {}
    for step in range(steps):
        svi.step(*args)
        if step >= steps - last:
            for name, value in pyro.get_param_store()._params.items():
                sums[name] = sums.get(name, 0) + value.detach() / last
    with torch.no_grad():
        for name, value in pyro.get_param_store()._params.items():
            value.copy_(sums[name])


SCATTER = 0.005  # standard deviation, or more, of the parameters that `fit` finds


def best_normal(log_joint, start=(0.0, -1.0)):
    """Mean and standard deviation of the Normal q with the least KL from exp(log_joint), by 40 Hermite nodes."""
    nodes, weights = (torch.from_numpy(z) for z in hermite(40))
    q = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([q], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimiser.zero_grad()
        loss = -(weights * log_joint(q[0] + q[1].exp() * nodes)).sum() - q[1]
        loss.backward()
        return loss

    optimiser.step(closure)
    return q[0].item(), q[1].exp().item()


def given_values(**values):
    """A trace to replay a model against."""
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return trace


def problem(prior, scale=NOISE_VARIANCE**0.5):
    """The model of the module's table: y observed with noise of a known scale."""

    def model(y):
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    return model


Y = torch.tensor([1.0])


# ---------------------------------------------------------------------- the distribution


@pytest.mark.parametrize("law", ["chain", "flow"])
def test_shapes_where_all_sizes_are_equal(law):
    """B == C == H == W: a dim taken for another one would not show by its size, but by what is independent of what."""
    prior = DiffusionPrior(gaussian(3, event=(2, 2, 2)), law, **({"steps": 4} if law == "flow" else {}))
    assert (prior.batch_shape, prior.event_shape, prior.event_dim) == ((), (2, 2, 2), 3)
    assert prior.sample().shape == (2, 2, 2) and prior().shape == (2, 2, 2)
    two = prior.expand([2])
    assert two.expand([2, 2]).sample([2]).shape == (2, 2, 2, 2, 2, 2)
    draws = two.sample()
    assert len(draws.unique()) == 16  # nothing is repeated
    with pytest.raises(ShapeError, match=r"\[2\] cannot be expanded to \[3\]"):
        two.expand([3])
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1):
        x = pyro.sample("x", prior)
    assert x.shape == (2, 2, 2, 2, 2) and len(x.unique()) == 32
    if law == "flow":
        log_prob = prior.expand([2, 2]).log_prob(x)
        for i, j in itertools.product(range(2), repeat=2):
            torch.testing.assert_close(log_prob[i, j], prior.log_prob(x[i, j]))
        assert prior.to_event(0).log_prob(x).shape == two.log_prob(x).shape == (2, 2)
        assert two.to_event(1).log_prob(x).shape == (2,)
        assert prior.mask(False).log_prob(x).sum() == 0


def test_conditioning_values_broadcast():
    diffusion = conditional(3, means=(-5.0, 0.0, 5.0), event=(3,))
    for law in ("chain", "flow"):
        prior = DiffusionPrior(diffusion, law)
        assert prior.given(y=1).batch_shape == () and prior.given(y=1).sample().shape == (3,)
        every = prior.given(y=torch.arange(3)[:, None]).expand([3, 4])
        x = every.sample([3])
        assert x.shape == (3, 3, 4, 3)
        means = x.mean((0, 2, 3))  # five standard deviations between classes
        assert means[0] < -3 < means[1] < 3 < means[2]
        assert prior.cond == {} and prior.batch_shape == ()
    log_prob = prior.given(y=torch.arange(3)[:, None]).log_prob(x[0, 0])
    assert log_prob.shape == (3, 4)
    torch.testing.assert_close(log_prob[2], prior.given(y=2).log_prob(x[0, 0]))


@pytest.mark.monte_carlo
def test_draws_of_the_chain_have_its_law():
    mean, var = oracle(20, 0.3, 0.25).marginal()
    x = DiffusionPrior(gaussian(20, 0.3, 0.25)).sample([4000])
    assert_moments(x, mean, var, detects=0.25)


@pytest.mark.parametrize("options", [{}, {"probes": 2}, {"solver": "heun", "steps": 400}])
def test_draws_and_density_of_the_flow_are_one_closed_form(options):
    """For Gaussian data the flow keeps x's place in standard deviations. One dim: probes of +-1 are exact."""
    mean, var = 0.3, 0.25
    prior = DiffusionPrior(gaussian(5, mean, var), "flow", **options)
    alpha, sigma = schedule(5).alpha(torch.tensor([1, 5])), schedule(5).sigma(torch.tensor([1, 5]))
    v = alpha**2 * var + sigma**2
    slope = (v[0] / v[1]).sqrt() / alpha[0]
    z = torch.randn(6, 1, dtype=torch.float64)
    x = mean + slope * (z - alpha[1] * mean)
    # 64 steps of RK4 and 400 of Heun's
    torch.testing.assert_close(prior.decode(z), x, rtol=0, atol=2e-5)
    torch.testing.assert_close(prior.encode(x), z, rtol=0, atol=2e-5)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - slope.log()
    torch.testing.assert_close(prior.log_prob(x), expected, rtol=0, atol=2e-5)
    torch.manual_seed(3)
    drawn = prior.sample([6])
    torch.manual_seed(3)
    noise = torch.randn(6, 1)
    torch.testing.assert_close(drawn, (mean + slope * (noise - alpha[1] * mean)).float(), rtol=0, atol=2e-5)


def net(features=4, **options):
    made = nets.MLP(features, width=16, depth=1, **options)
    for parameter in made.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return made


def test_probed_density_is_a_function_of_x_alone():
    diffusion = GaussianDiffusion(net(), LogLinearSchedule(4, -6.0, 4.0), (4,), prediction="v")
    prior = DiffusionPrior(diffusion, "flow", probes=3, steps=4)
    x = torch.randn(5, 4, requires_grad=True)
    together = prior.log_prob(x)
    torch.testing.assert_close(prior.log_prob(x.flip(0)), together.flip(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prior.expand([5]).log_prob(x[2])[4], together[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(prior.log_prob(x), together)
    assert torch.equal(DiffusionPrior(diffusion, "flow", probes=3, steps=4).log_prob(x), together)
    probes = prior._probes[:, None].expand(-1, 5, -1)
    expected = log_density(diffusion, x, probes=probes, steps=4).log_prob.mean(0)
    torch.testing.assert_close(together, expected.float(), rtol=1e-5, atol=1e-5)
    exact = DiffusionPrior(diffusion, "flow", steps=4).log_prob(x)
    assert (exact - together).abs().max() > 1e-3  # an estimate, and not the density
    (gradient,) = torch.autograd.grad(together[1], x)
    assert gradient[1].abs().min() > 0 and gradient[[0, 2, 3, 4]].abs().max() == 0


def test_a_discretised_decoder_becomes_normal():
    options = {"prediction": "v", "decoder": "openai_tanh", "bins": (3, 0.0, 1.0), "clip": True}
    diffusion = GaussianDiffusion(net(), LogLinearSchedule(4, -6.0, 9.0), (4,), **options)
    prior = DiffusionPrior(diffusion)
    x = prior.sample([50])
    grid = torch.tensor([0.0, 0.5, 1.0])
    assert (x[..., None] - grid).abs().min() > 0  # off the grid, ...
    # ... but around the clipped mean: nothing else than [0, 1], but for the decoder's noise
    small = diffusion.reverse_kernel(torch.zeros(4), 1).stddev.max()
    assert -6 * small < x.min() < x.max() < 1 + 6 * small
    assert diffusion.reverse_kernel.bins == (3, 0.0, 1.0) and diffusion.reverse_kernel.decoder == "openai_tanh"


@pytest.mark.parametrize("law", ["chain", "flow"])
def test_frozen_network(law):
    diffusion = GaussianDiffusion(net(), LogLinearSchedule(3, -6.0, 4.0), (4,), prediction="v").train()
    prior = DiffusionPrior(diffusion, law, **({"steps": 4} if law == "flow" else {}))
    theirs, ours = list(diffusion.parameters()), list(prior.diffusion.parameters())
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(theirs, ours, strict=True))  # the same values, ...
    assert all(p.requires_grad for p in theirs) and not any(q.requires_grad for q in ours)  # ... without gradient
    assert diffusion.training and not prior.diffusion.training
    assert not prior.rsample().requires_grad
    programs = bound(problem(prior), AutoNormal(problem(prior)), {"x": prior}) if law == "chain" else None
    model, guide = programs or (problem(prior), AutoNormal(problem(prior)))
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(torch.ones(4))
    assert set(pyro.get_param_store()) == {"AutoNormal.locs.x", "AutoNormal.scales.x"}
    assert all(p.grad is None for p in theirs + ours)


@pytest.mark.parametrize("law", ["chain", "flow"])
def test_a_network_that_is_not_frozen_is_learned(law):
    diffusion = GaussianDiffusion(net(), LogLinearSchedule(3, -6.0, 4.0), (4,), prediction="v")
    prior = DiffusionPrior(diffusion, law, frozen=False, **({"steps": 4} if law == "flow" else {}))
    assert prior.rsample().requires_grad
    before = [p.detach().clone() for p in diffusion.parameters()]
    model, guide = problem(prior), AutoNormal(problem(prior))
    if law == "chain":
        model, guide = bound(model, guide, {"x": prior})
        svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO(num_particles=10, vectorize_particles=True))
        for _ in range(2):
            svi.step(torch.ones(4))
        assert sum(name.startswith("diffusion_") for name in pyro.get_param_store()) == len(before)
    else:
        prior.log_prob(torch.ones(4)).backward()
        torch.optim.SGD(diffusion.parameters(), lr=0.1).step()
    moved = [not torch.equal(p, old) for p, old in zip(diffusion.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("law", ["chain", "flow"])
def test_gradients_reach_the_conditioning_values(law):
    prior = DiffusionPrior(conditional(4, var=0.25), law)
    theta = torch.tensor(0.7, requires_grad=True)

    def draws(theta):
        torch.manual_seed(0)
        return prior.given(theta=theta).expand([3]).rsample().sum()

    (found,) = torch.autograd.grad(draws(theta), theta)
    # linear in theta: a difference quotient is exact but for float32
    expected = (draws(theta.detach() + 1) - draws(theta.detach() - 1)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found > 1
    assert not prior.given(theta=theta).sample().requires_grad
    if law == "flow":
        x = torch.tensor([[0.2], [0.9]], dtype=torch.float64)  # asks for no gradient itself
        for law_of_x in (prior.given(theta=theta), prior.given(theta=theta.expand(2))):
            (found,) = torch.autograd.grad(law_of_x.log_prob(x).sum(), theta)
            around = [prior.given(theta=theta.detach() + h).log_prob(x).sum() for h in (-0.01, 0.01)]
            # quadratic in theta
            torch.testing.assert_close(found.double(), (around[1] - around[0]) / 0.02, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("law", "options", "message"),
    [
        ("sde", {}, "law='sde' is not one of 'chain', 'flow'"),
        ("chain", {"probes": 1}, 'probes=1.*belong to law="flow"'),
        ("chain", {"steps": 5}, 'belong to law="flow"'),
        ("flow", {"probes": 0}, "probes=0"),
        ("flow", {"solver": "dopri5"}, "'dopri5' is not one of 'heun', 'rk4': adaptive"),
    ],
)
def test_options(law, options, message):
    with pytest.raises(OptionError, match=message):
        DiffusionPrior(gaussian(3), law, **options)


# ---------------------------------------------------------------------- the bound, exactly


def enumerated_bound(diffusion, x):
    """What one timestep of the model adds, averaged over t by enumeration and over x_t by Hermite nodes: ``[N]``."""
    prior, steps = DiffusionPrior(diffusion), diffusion.steps
    nodes, weights = (torch.from_numpy(z) for z in hermite(3))  # exact: the terms are quadratic in the noise
    t = torch.arange(1, steps + 1)[:, None, None].expand(steps, 3, len(x))
    x = x.expand(steps, 3, *x.shape)
    alpha, sigma = diffusion.schedule.alpha(t)[..., None], diffusion.schedule.sigma(t)[..., None]
    x_t = alpha * x + sigma * nodes[:, None, None]
    model, _ = bound(lambda: pyro.sample("x", prior.expand(x.shape[:-1])), lambda: None, {"x": prior})
    trace = poutine.trace(poutine.replay(model, given_values(x=x, x_step=t, x_t=x_t))).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].abs().max() == 0
    found = trace.nodes["x_T"]["log_prob"] + trace.nodes["x_s"]["log_prob"]
    return torch.einsum("tnb,n->b", found, weights) / steps


@pytest.mark.parametrize("rule", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_one_timestep_is_the_bound_on_average(steps, rule):
    x = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64, requires_grad=True)
    found = enumerated_bound(gaussian(steps, 0.3, 0.25, variance=rule), x)
    expected = oracle(steps, 0.3, 0.25, rule if steps > 1 else "fixed_small").nelbo(x.detach().numpy())[:, 0]
    # log-SNR goes to the network in float64: rounding of T terms alone
    np.testing.assert_allclose(-found.detach(), expected, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    h = 1e-3  # quadratic in x: central differences are exact but for rounding
    around = [
        oracle(steps, 0.3, 0.25, rule if steps > 1 else "fixed_small").nelbo(x.detach().numpy() + d) for d in (-h, h)
    ]
    np.testing.assert_allclose(-gradient, (around[1] - around[0]) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "mean", "variance"),
    # prior N(0, 1), y = 1, noise variance 0.25; the exact posterior is N(0.8, 0.2). 21 steps are 20 intervals of log-SNR.
    [(20, 0.7183, 0.1796), (21, 0.7231, 0.1808), (100, 0.7866, 0.1966), (1000, 0.7987, 0.1997)],
)
def test_posterior_under_the_bound(steps, mean, variance):
    """The program's own bound, at three points: the posterior that SVI tends to, in closed form."""
    below, at, above = (-enumerated_bound(gaussian(steps), torch.tensor([[-1.0], [0.0], [1.0]]).double())).tolist()
    precision, slope = below + above - 2 * at, (above - below) / 2
    found = (1 / NOISE_VARIANCE - slope) / (precision + 1 / NOISE_VARIANCE), 1 / (precision + 1 / NOISE_VARIANCE)
    assert found == pytest.approx((mean, variance), abs=6e-5)


def test_continuous_time_has_no_bias():
    """The integral over t of the program's integrand, by Gauss-Legendre, is the limit of T steps; t = 0 the reconstruction."""
    x = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64)
    diffusion, (nodes, weights) = gaussian(math.inf, 0.3, 0.25), np.polynomial.legendre.leggauss(60)
    prior = DiffusionPrior(diffusion)
    t = torch.cat([torch.zeros(1), torch.from_numpy(nodes + 1) / 2]).double()
    noise, noise_weights = (torch.from_numpy(z) for z in hermite(3))
    t = t[:, None, None].expand(-1, 3, 3)
    alpha, sigma = diffusion.schedule.alpha(t)[..., None], diffusion.schedule.sigma(t)[..., None]
    values = {"x": x.expand(61, 3, 3, 1), "x_step": t, "x_t": alpha * x + sigma * noise[:, None, None]}
    model, _ = bound(lambda: pyro.sample("x", prior.expand([61, 3, 3])), lambda: None, {"x": prior})
    trace = poutine.trace(poutine.replay(model, given_values(**values))).get_trace()
    trace.compute_log_prob()
    of_t = torch.einsum("tnb,n->tb", trace.nodes["x_s"]["unscaled_log_prob"], noise_weights)
    found = of_t[0] + (torch.from_numpy(weights) / 2) @ of_t[1:] + trace.nodes["x_T"]["log_prob"][0, 0]
    np.testing.assert_allclose(-found, continuous_nelbo(x.numpy(), 0.3, 0.25)[:, 0], rtol=0, atol=3e-5)
    scale = trace.nodes["x_s"]["scale"]
    assert (scale[0] == 8).all() and torch.allclose(scale[1:], torch.tensor(8 / 7).double())  # 1 / p(t)


def test_chain_of_sites_is_that_of_the_diffusion():
    """The same terms at the same states as diffusion.model and diffusion.guide, whose own tests are elsewhere."""
    diffusion = GaussianDiffusion(net(), LogLinearSchedule(3, -6.0, 4.0), (4,), prediction="v")
    prior, x = DiffusionPrior(diffusion), torch.randn(2, 4)
    theirs = poutine.trace(diffusion.guide).get_trace(x)
    states = {name: theirs.nodes[name]["value"] for name in ("x_3", "x_2", "x_1")}
    theirs_model = poutine.trace(poutine.replay(diffusion.model, theirs)).get_trace(x)

    def model():
        with pyro.plate("rows", 2):
            pyro.sample("z", prior)

    def guide():
        with pyro.plate("rows", 2):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    model, guide = bound(model, guide, {"z": prior}, chain=True)
    values = given_values(z=x, **{name.replace("x", "z"): value for name, value in states.items()})
    for program, reference in ((guide, theirs), (model, theirs_model)):
        trace = poutine.trace(poutine.replay(program, values)).get_trace()
        trace.compute_log_prob()
        reference.compute_log_prob()
        for name, node in reference.nodes.items():
            if node["type"] == "sample" and name.startswith("x_"):
                torch.testing.assert_close(trace.nodes[name.replace("x", "z")]["log_prob"], node["log_prob"])
    assert trace.nodes["z_0"]["is_observed"]


@pytest.mark.monte_carlo
def test_weights_of_whole_chains_are_unbiased_for_the_evidence():
    """p(y) of the chain's own Gaussian marginal, and its posterior mean, by stock importance sampling."""
    between = LogLinearSchedule(4, -3.0, 2.0)
    ddpm = DDPM(between.betas.numpy())
    chain = LinearModel(ddpm, ddpm.variances("fixed_large"), ddpm.decoder_variance("vdm"), 0.3, 0.25)
    mean, var = chain.marginal()
    evidence = dist.Normal(mean, math.sqrt(var + NOISE_VARIANCE)).log_prob(Y).exp().item()
    net = GaussianDenoiser("x0", mean=0.3, var=0.25)
    prior = DiffusionPrior(GaussianDiffusion(net, between, (1,), "x0", "fixed_large"))

    def guide(y):
        pyro.sample("x", dist.Normal(0.6 * y, 0.5).to_event(1))

    model, guide = bound(problem(prior), guide, {"x": prior}, chain=True)
    draws = 40_000

    def many(program):
        def run(y):
            with pyro.plate("draws", draws):
                program(y)

        return run

    guide_trace = poutine.trace(many(guide)).get_trace(Y)
    model_trace = poutine.trace(poutine.replay(many(model), guide_trace)).get_trace(Y)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
    log_w = sum(n["log_prob"] for n in model_trace.nodes.values() if n["type"] == "sample" and n["name"] != "draws")
    log_w = log_w - sum(
        n["log_prob"] for n in guide_trace.nodes.values() if n["type"] == "sample" and n["name"] != "draws"
    )
    w, x = log_w.exp().double(), guide_trace.nodes["x"]["value"][:, 0].double()
    # in the linear domain; the largest weight is a small part of the sum, so that the error is near normal
    assert w.max() / w.sum() < 5e-3
    assert_mean(w, evidence, detects=0.15 * evidence)
    posterior_mean = (mean / var + Y.item() / NOISE_VARIANCE) / (1 / var + 1 / NOISE_VARIANCE)
    assert_mean(w * (x - posterior_mean), 0.0, detects=0.15 * evidence)


# ---------------------------------------------------------------------- SVI


@pytest.mark.monte_carlo
@pytest.mark.parametrize(("steps", "elbo"), [(1000, Trace_ELBO), (21, StockMeanField), (math.inf, Trace_ELBO)])
def test_svi_meets_the_closed_form(steps, elbo):
    prior = DiffusionPrior(gaussian(steps))
    model = problem(prior)
    guide = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"x": torch.zeros(1)}))
    fit(*bound(model, guide, {"x": prior}), Y, elbo=elbo)
    precision, mean = quadratic(steps, 0.0) if steps < math.inf else (1.0, 0.0)
    variance = 1 / (precision + 1 / NOISE_VARIANCE)
    found = guide.locs.x.item(), guide.scales.x.item() ** 2
    optimum = np.array([variance * (precision * mean + 1 / NOISE_VARIANCE), variance])
    assert_estimate(found, SCATTER, optimum, detects=0.05)


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_one_estimate_by_each_elbo():
    """Stock ELBOs and the strict mean-field one agree, at one seed, but for the entropy of q(x): exact, or of the draw."""
    prior = DiffusionPrior(gaussian(10))

    def guide(y):
        pyro.sample("x", dist.Normal(0.5 * y, 0.7).to_event(1))

    model, guide = bound(problem(prior), guide, {"x": prior})
    values, options = {}, {"num_particles": 7, "vectorize_particles": True, "max_plate_nesting": 0}
    for elbo in (Trace_ELBO, StockMeanField, pyrodiff.TraceMeanField_ELBO, TraceEnum_ELBO):
        torch.manual_seed(0)
        values[elbo] = elbo(**options).loss(model, guide, Y)
    assert values[Trace_ELBO] == pytest.approx(values[TraceEnum_ELBO], rel=1e-5)
    assert values[StockMeanField] == values[pyrodiff.TraceMeanField_ELBO]
    torch.manual_seed(0)
    x = poutine.trace(pyro.plate("particles", 7)(guide)).get_trace(Y).nodes["x"]["value"]
    law = dist.Normal(0.5 * Y, 0.7)
    difference = (law.entropy() + law.log_prob(x)).mean().item()
    assert values[Trace_ELBO] - values[StockMeanField] == pytest.approx(difference, abs=1e-4)


@pytest.mark.filterwarnings("ignore:Found auxiliary vars")
def test_the_entropy_of_a_point_is_counted():
    """An autoguide that draws elsewhere gives x as a point with a density: no KL may lose it."""
    prior = DiffusionPrior(gaussian(10))
    guide = AutoGaussian(problem(prior))
    guide(Y)  # makes its parameters, from draws
    pair, values = bound(problem(prior), guide, {"x": prior}), []
    for elbo in (Trace_ELBO, StockMeanField):
        torch.manual_seed(0)
        values.append(elbo(num_particles=3, vectorize_particles=True, max_plate_nesting=0).loss(*pair, Y))
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.monte_carlo
def test_whole_chain_by_each_elbo():
    """Analytic KLs of the chain, given x: the mean-field condition holds, and means agree with those by log-ratios."""
    prior = DiffusionPrior(gaussian(5, 0.3, 0.25))

    def guide(y):
        pyro.sample("x", dist.Normal(0.5 * y, 0.5).to_event(1))

    programs = bound(problem(prior), guide, {"x": prior}, chain=True)
    precision, centre = quadratic(5, 0.3, 0.25)
    at_centre = oracle(5, 0.3, 0.25).nelbo(np.array([centre]))[0]
    expected = (
        at_centre + precision / 2 * ((0.5 - centre) ** 2 + 0.25) - dist.Normal(0.0, 0.5).entropy()
        + 0.5 * math.log(2 * math.pi * NOISE_VARIANCE) + (0.5**2 + 0.25) / (2 * NOISE_VARIANCE)
    ).item()  # fmt: skip
    for elbo in (Trace_ELBO, StockMeanField, pyrodiff.TraceMeanField_ELBO):
        loss = elbo(num_particles=1000, vectorize_particles=True, max_plate_nesting=0).loss
        losses = torch.tensor([loss(*programs, Y) for _ in range(40)], dtype=torch.float64)
        assert_mean(losses, (expected - 1e-4, expected + 1e-4), detects=4.0)


@pytest.mark.monte_carlo
def test_unknown_noise_is_inferred_jointly():
    """x and the scale of the noise: AutoMultivariateNormal's optimum, found by quadrature, and the posterior on a grid."""
    y = torch.tensor([1.4, 0.6, 1.9, 0.9, 1.1, 0.2, 1.6, 1.3])
    prior = DiffusionPrior(gaussian(1000))

    def model(y):
        x = pyro.sample("x", prior)
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(x.expand(*x.shape[:-1], 8), noise[..., None]).to_event(1), obs=y)

    precision, centre = quadratic(1000)

    def log_joint(x, u):  # u = log noise
        residual = (y.double() - x[..., None]).square().sum(-1)
        return -precision / 2 * (x - centre) ** 2 - (2 * u).exp() / 2 + u - 8 * u - residual / (2 * (2 * u).exp())

    nodes, weights = (torch.from_numpy(z) for z in hermite(20))
    z = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    w = torch.outer(weights, weights).reshape(-1)
    loc, raw = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([1.0, -0.7], [-1.5, 0.0, -1.5]))
    optimiser = torch.optim.LBFGS([loc, raw], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def cholesky():
        return torch.stack([torch.stack([raw[0].exp(), raw.new_zeros(())]), torch.stack([raw[1], raw[2].exp()])])

    def closure():
        optimiser.zero_grad()
        points = loc + z @ cholesky().T
        loss = -(w * log_joint(*points.T)).sum() - raw[0] - raw[2]
        loss.backward()
        return loss

    optimiser.step(closure)
    covariance = (cholesky() @ cholesky().T).detach()

    guide = AutoMultivariateNormal(model)
    fit(*bound(model, guide, {"x": prior}), y, steps=500)
    found = guide.get_posterior()
    assert_estimate(found.mean, SCATTER, loc, detects=0.05)
    assert_estimate(found.covariance_matrix, SCATTER / 2, covariance, detects=0.025)
    # and the family's own error: the posterior's means on a grid
    grid = torch.meshgrid(torch.linspace(-1, 3, 400).double(), torch.linspace(-2.5, 2.0, 400).double(), indexing="ij")
    p = log_joint(*grid).flatten().softmax(0)
    for i, axis in enumerate(grid):
        exact_mean = (p * axis.flatten()).sum()
        assert abs(exact_mean - loc[i]) < 0.2 * covariance[i, i].sqrt()


@pytest.mark.monte_carlo
def test_groups_under_a_hyperprior():
    """theta ~ N(0, 1); J groups x_j ~ p(x | theta) of one conditional prior; y_j. All Gaussian: the optimum is the posterior."""
    steps, y = 300, torch.tensor([1.2, 0.4, 2.0])
    prior = DiffusionPrior(conditional(steps, var=0.25))

    def model(y):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 3):
            x = pyro.sample("x", prior.given(theta=theta))
            pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)

    # minus the log joint is quadratic in (theta, x_1, x_2, x_3); the bound's own share from its closed form
    def cost(theta, x):
        return oracle(steps, theta, 0.25).nelbo(np.array([x]))[0]

    h = 0.5
    hessian = np.array([
        [cost(h, 0) + cost(-h, 0) - 2 * cost(0, 0), (cost(h, h) - cost(h, -h) - cost(-h, h) + cost(-h, -h)) / 4],
        [0, cost(0, h) + cost(0, -h) - 2 * cost(0, 0)],
    ]) / h**2  # fmt: skip
    precision = np.diag([1 + 3 * hessian[0, 0], *[hessian[1, 1] + 4] * 3])
    precision[0, 1:] = precision[1:, 0] = hessian[0, 1]
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.array([0, *(4 * y.numpy())])

    guide = AutoMultivariateNormal(model)
    fit(*bound(model, guide, {"x": prior}), y, steps=500, nesting=1)
    found = guide.get_posterior()
    # posterior standard deviations are 0.4
    assert_estimate(found.mean, SCATTER, mean, detects=0.06)
    assert_estimate(found.covariance_matrix, SCATTER, covariance, detects=0.06)


@pytest.mark.monte_carlo
def test_poisson_bernoulli_masked_and_heteroscedastic_likelihoods():
    """Four groups of one plate, one likelihood each; mean-field Normals factorise, so that each optimum is a quadrature's."""
    prior = DiffusionPrior(gaussian(300))

    def model():
        with pyro.plate("groups", 4):
            x = pyro.sample("x", prior)
        count, flag, two, own = (x[..., i : i + 1, :] for i in range(4))  # [..., 1, 1]: the groups' dim is kept
        pyro.sample("count", dist.Poisson(count.exp()).to_event(1), obs=torch.tensor([[4.0]]))
        pyro.sample("flag", dist.Bernoulli(logits=2 * flag).to_event(1), obs=torch.tensor([[1.0]]))
        masked = dist.Normal(two.expand(*two.shape[:-1], 2), 0.5).mask(torch.tensor([False, True]))
        pyro.sample("two", masked.to_event(1), obs=torch.tensor([[9.0, -0.7]]))
        pyro.sample("own", dist.Normal(own, torch.tensor([0.3, 0.8])).to_event(1), obs=torch.tensor([[1.0, 2.0]]))

    precision, centre = quadratic(300)
    likelihoods = (
        lambda x: 4 * x - x.exp(),
        lambda x: nn.functional.logsigmoid(2 * x),
        lambda x: -(((x + 0.7) / 0.5) ** 2) / 2,
        lambda x: -(((x - 1) / 0.3) ** 2 + ((x - 2) / 0.8) ** 2) / 2,
    )
    guide = AutoNormal(model)
    fit(*bound(model, guide, {"x": prior}), nesting=1)
    for i, log_likelihood in enumerate(likelihoods):
        mean, std = best_normal(lambda x, f=log_likelihood: f(x) - precision / 2 * (x - centre) ** 2)
        # posterior standard deviations are 0.3 to 0.8
        assert_estimate(
            [guide.locs.x[i].item(), guide.scales.x[i].item()], 2 * SCATTER, np.array([mean, std]), detects=0.1
        )


@pytest.mark.monte_carlo
def test_guide_made_of_the_denoiser():
    """Amortised over five y: the posterior's mean is the denoiser's answer at log-SNR log(4 / P), for every y."""
    prior, y = DiffusionPrior(gaussian(300)), torch.tensor([-2.0, -0.5, 0.3, 1.0, 2.5])

    def model(y):
        with pyro.plate("groups", 5):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y[:, None])

    denoiser = DenoiserGuide(prior, "x", lambda y: y[:, None])

    def guide(y):
        with pyro.plate("groups", 5):
            denoiser(y)

    precision, _ = quadratic(300)
    fit(*bound(model, guide, {"x": prior}), y, nesting=1)
    assert_estimate(denoiser.log_snr.item(), 4 * SCATTER, math.log(4 / precision), detects=0.2)
    assert_estimate(denoiser.scale.item() ** 2, SCATTER, 1 / (4 + precision), detects=0.05)
    with pytest.raises(ShapeError, match="the estimate has shape"):
        DenoiserGuide(prior, "x", lambda y: y[:, None, None].expand(5, 1, 2))(y)


def test_guide_made_of_a_denoiser_with_a_schedule_per_element():
    """The network is told the learned log-SNR: x0_hat is that of all elements at it."""

    class Shifted(LogLinearSchedule):
        event_dim = 2

        def log_snr(self, t):
            return super().log_snr(t)[..., None, None] + torch.tensor([[-1.0, 1.0]])

    net = GaussianDenoiser("x0", mean=0.3, var=0.25)
    prior = DiffusionPrior(GaussianDiffusion(net, Shifted(4, -4.0, 4.0), (2, 2), "x0"))
    rough = torch.tensor([[1.0, -0.5], [0.2, 2.0]])
    guide = DenoiserGuide(prior, "x", lambda: rough, log_snr=0.7, scale=1e-9)
    alpha2 = torch.tensor(0.7).sigmoid()
    expected = 0.3 + alpha2 * 0.25 / (alpha2 * 0.25 + 1 - alpha2) * (rough - 0.3)
    torch.testing.assert_close(guide()["x"].detach(), expected)


def test_guides_of_several_parts():
    prior = DiffusionPrior(gaussian(20))

    def model(y):
        x = pyro.sample("x", prior)
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(x, noise[..., None]).to_event(1), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["x"])))
    guide.append(DenoiserGuide(prior, "x", lambda y: y))
    svi = SVI(*bound(model, guide, {"x": prior}), Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        assert math.isfinite(svi.step(Y))
    draws = Predictive(model, guide=guide, num_samples=6)(Y)  # the plain programs: no site of the bound's
    assert draws["y"].shape == (6, 1) and set(draws) <= {"y", "x", "noise", "noise_unconstrained"}


def test_plates_masks_and_scales_hold_for_the_bound():
    prior = DiffusionPrior(gaussian(10, event=(2, 2)))
    rows = torch.tensor([4, 1])

    def model():
        with pyro.plate("rows", 6, subsample=rows), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("x", prior)

    def guide():
        with pyro.plate("rows", 6, subsample=rows), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("x", dist.Normal(torch.zeros(2, 2, 2), 1.0).to_event(2))

    model, guide = bound(model, guide, {"x": prior})
    guide_trace = poutine.trace(guide).get_trace()
    trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace()
    trace.compute_log_prob()
    assert guide_trace.nodes["x_step"]["value"].shape == (2,) and guide_trace.nodes["x_t"]["value"].shape == (2, 2, 2)
    assert trace.nodes["x_T"]["scale"] == 3 and trace.nodes["x_s"]["scale"] == 30
    for name in ("x_T", "x_s"):
        assert trace.nodes[name]["log_prob"].shape == (2,)
        assert trace.nodes[name]["log_prob"][0] != 0 == trace.nodes[name]["log_prob"][1]


@pytest.mark.parametrize("chain", [False, True])
def test_no_tensor_on_the_wrong_device(chain):
    """On the meta device an operation that mixes in a CPU tensor raises."""
    diffusion = GaussianDiffusion(net(), LogLinearSchedule(4, -6.0, 4.0), (4,), prediction="v").to("meta")
    prior = DiffusionPrior(diffusion)

    def guide():
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(torch.zeros(3, 4, device="meta"), 1.0).to_event(1))

    with pyro.validation_enabled(False):
        model, guide = bound(lambda: pyro.sample("x", prior.expand([3])), guide, {"x": prior}, chain=chain)
        guide_trace = poutine.trace(guide).get_trace()
        trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace()
        trace.compute_log_prob()
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            assert site["log_prob"].device.type == "meta", name


def test_a_torch_optimiser_finds_the_parameters():
    diffusion = GaussianDiffusion(net(), LogLinearSchedule(4, -6.0, 4.0), (4,), prediction="v")
    for frozen in (True, False):
        prior = DiffusionPrior(diffusion, frozen=frozen)
        with pyro.settings.context(module_local_params=True):
            guide = AutoNormal(problem(prior))
            elbo = Trace_ELBO()(*bound(problem(prior), guide, {"x": prior}))
            elbo(torch.ones(4))
            found = {id(p) for p in elbo.parameters()}
            expected = [*guide.parameters(), *([] if frozen else diffusion.parameters())]
            assert found == {id(p) for p in expected} and len(expected) >= 2
            elbo(torch.ones(4)).backward()
            assert all(p.grad is not None for p in guide.parameters())


def test_nothing_is_remembered_between_calls():
    """One pair, asked for plates of different sizes and for another conditioning in turn, is as good as new."""
    prior = DiffusionPrior(conditional(10, means=(-1.0, 2.0)))

    def model(y, label):
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", prior.given(y=label))
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    def guide(y, label):
        with pyro.plate("rows", len(y)):
            pyro.sample("x", dist.Normal(y, 0.3).to_event(1))

    def loss(pair, *args):
        torch.manual_seed(0)
        return Trace_ELBO().loss(*pair, *args)

    pair = bound(model, guide, {"x": prior})
    calls = [(torch.ones(3, 1), 0), (torch.zeros(2, 1), torch.tensor([0, 1])), (torch.ones(3, 1), 1)]
    one_after_another = [loss(pair, *args) for args in calls]
    assert one_after_another == [loss(bound(model, guide, {"x": prior}), *args) for args in reversed(calls)][::-1]
    assert len(set(one_after_another)) == 3


# ---------------------------------------------------------------------- labels by enumeration


MEANS, PARTS = (-1.0, 0.5, 2.0), torch.tensor([0.5, 0.2, 0.3])


def labelled(prior):
    @config_enumerate
    def model(data):
        with pyro.plate("rows", len(data)):
            label = pyro.sample("label", dist.Categorical(PARTS))
            x = pyro.sample("x", prior.given(y=label))
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=data)

    return model


def test_labels_enumerated_under_the_flow():
    """The posterior of each label given x, and the ELBO, of a mixture of Gaussians."""
    prior = DiffusionPrior(conditional(4, var=0.25, means=MEANS), "flow", steps=32)
    data = torch.tensor([[-0.7], [0.2], [1.5], [0.9]])

    def guide(data):
        with pyro.plate("rows", len(data)):
            pyro.sample("x", dist.Delta(data, event_dim=1))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    found = elbo.compute_marginals(labelled(prior), guide, data)["label"].probs
    # x_0 with the noise of t = 1; x_T is N(alpha_T m, .), not N(0, 1): alpha_T = 0.018 shifts a log-density by 1e-3 at most
    scale = math.sqrt(0.25 + math.exp(-HIGH))
    log_joint = PARTS.log() + dist.Normal(torch.tensor(MEANS), scale).log_prob(data)
    torch.testing.assert_close(found, log_joint.softmax(-1), rtol=0, atol=0.02)
    exact = torch.stack([prior.given(y=k).log_prob(data) for k in range(3)], -1) + PARTS.log()
    torch.testing.assert_close(found, exact.softmax(-1), rtol=0, atol=1e-5)
    expected = exact.logsumexp(-1).sum() + dist.Normal(data, 0.5).log_prob(data).sum()
    assert elbo.loss(labelled(prior), guide, data) == pytest.approx(-expected.item(), rel=1e-5)


def test_labels_enumerated_under_the_whole_chain():
    """log sum_y p(y) p(x, z | y): the weight of a chain with its label summed out."""
    diffusion = conditional(4, var=0.25, means=MEANS)
    prior, data = DiffusionPrior(diffusion), torch.tensor([[-0.7], [0.2], [1.5]])

    def guide(data):
        with pyro.plate("rows", len(data)):
            pyro.sample("x", dist.Normal(data, 0.3).to_event(1))

    model, guide = bound(labelled(prior), guide, {"x": prior}, chain=True)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    torch.manual_seed(1)
    found = elbo.loss(model, guide, data)
    torch.manual_seed(1)
    trace = poutine.trace(guide).get_trace(data)
    state = {k: trace.nodes[f"x_{k}" if k else "x"]["value"] for k in range(5)}
    p, labels = diffusion.reverse_kernel, torch.arange(3)[:, None]
    joint = PARTS.log()[:, None] + p(state[1], 1, y=labels).log_prob(state[0])
    joint = joint + sum(p(state[t], t, y=labels).log_prob(state[t - 1]) for t in (2, 3, 4))
    rest = dist.Normal(0.0, 1.0).log_prob(state[4]).sum(-1) + dist.Normal(state[0], 0.5).log_prob(data).sum(-1)
    expected = joint.logsumexp(0).sum() + rest.sum() - trace.log_prob_sum()
    assert found == pytest.approx(-expected.item(), rel=1e-5)


def test_labels_and_one_timestep():
    """Summed out of the model, a label would exponentiate the estimate: refused by Pyro. In the guide it is linear."""
    prior, data = DiffusionPrior(conditional(4, var=0.25, means=MEANS)), torch.tensor([[-0.7], [0.2]])

    def guide(data):
        with pyro.plate("rows", len(data)):
            pyro.sample("x", dist.Normal(data, 0.3).to_event(1))

    @config_enumerate
    def both(data):
        with pyro.plate("rows", len(data)):
            pyro.sample("label", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(data, 0.3).to_event(1))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    with pytest.raises(ValueError, match="share a common"):
        elbo.loss(*bound(labelled(prior), guide, {"x": prior}), data)
    assert math.isfinite(elbo.loss(*bound(labelled(prior), both, {"x": prior}), data))


# ---------------------------------------------------------------------- what is refused


def test_a_bound_never_poses_as_a_density():
    prior = DiffusionPrior(gaussian(3))
    model = problem(prior)

    def guide(y):
        pyro.sample("x", dist.Normal(y, 1.0).to_event(1))

    with pytest.raises(ProgramError, match=r"inference.bound.*law=\"flow\""):
        prior.log_prob(Y)
    for elbo in (Trace_ELBO(), StockMeanField(), pyrodiff.RenyiELBO(num_particles=2)):
        with pytest.raises(ProgramError, match=r"inference.bound"):
            elbo.loss(model, guide, Y)
    with pytest.raises(ProgramError, match=r"inference.bound"):
        Importance(model, guide, num_samples=2).run(Y)
    with pytest.raises(ProgramError, match=r"inference.bound"):
        MCMC(NUTS(model), num_samples=1, warmup_steps=0, disable_progbar=True).run(Y)


def test_one_timestep_is_refused_as_an_importance_weight():
    prior = DiffusionPrior(gaussian(3))

    def guide(y):
        pyro.sample("x", dist.Normal(y, 1.0).to_event(1))

    programs = bound(problem(prior), guide, {"x": prior})
    with pytest.raises(ProgramError, match="scaled or masked"):
        pyrodiff.RenyiELBO(num_particles=2).loss(*programs, Y)
    whole = bound(problem(prior), guide, {"x": prior}, chain=True)
    assert len(Importance(*whole, num_samples=2).run(Y).log_weights) == 2
    assert math.isfinite(pyrodiff.RenyiELBO(num_particles=2).loss(*whole, Y))
    # one step has a scale of 1: the mask alone gives it away
    prior = DiffusionPrior(gaussian(1))
    with pytest.raises(ProgramError, match="scaled or masked"):
        pyrodiff.RenyiELBO(num_particles=2).loss(*bound(problem(prior), guide, {"x": prior}), Y)


def test_half_a_pair_is_refused():
    prior = DiffusionPrior(gaussian(3))
    guide = AutoNormal(problem(prior))
    for chain in (False, True):
        model, _ = bound(problem(prior), guide, {"x": prior}, chain=chain)
        with pytest.raises(ProgramError, match="without its guide"):
            model(Y)
        with pytest.raises(ProgramError, match="without its guide"):
            MCMC(NUTS(model), num_samples=1, warmup_steps=0, disable_progbar=True).run(Y)
        with pytest.raises(ProgramError, match="'x' is observed"):
            poutine.condition(model, {"x": Y})(Y)
    with pytest.raises(ProgramError, match="without its guide"):  # x is given, its timestep is not
        poutine.replay(bound(problem(prior), guide, {"x": prior})[0], given_values(x=Y))(Y)


def test_a_pair_that_does_not_fit_is_refused():
    prior, other = DiffusionPrior(gaussian(3)), DiffusionPrior(gaussian(3))
    guide = AutoNormal(problem(prior))
    for law in (
        prior.expand([1]).to_event(1),
        prior.mask(torch.tensor(True)),
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
    ):
        with pytest.raises(ProgramError, match=r"'x' has a .* as its law, and not its prior itself"):
            Trace_ELBO().loss(*bound(problem(law), guide, {"x": prior}), Y)
    with pytest.raises(ProgramError, match=r"'x' has a diffusion as its prior.*\['z'\]"):
        Trace_ELBO().loss(*bound(problem(prior), guide, {"z": prior}), Y)
    with pytest.raises(ProgramError, match="another prior than bound was given"):
        Trace_ELBO().loss(*bound(problem(prior), guide, {"x": other}), Y)
    with pytest.raises(OptionError, match="'x' has law='flow'"):
        bound(problem(prior), guide, {"x": DiffusionPrior(gaussian(3), "flow")})
    with pytest.raises(OptionError, match="AutoNormalMessenger"):
        bound(problem(prior), AutoNormalMessenger(problem(prior)), {"x": prior})
    with pytest.raises(ShapeError, match="site 'x' has shape"):
        bound(problem(prior), lambda y: pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1)), {"x": prior})[
            1
        ](Y)


# ---------------------------------------------------------------------- NUTS


def noisy_problem(prior):
    def model(y):
        x = pyro.sample("x", prior)
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(x.mean(-1, keepdim=True).expand(len(y)), noise).to_event(1), obs=y)

    return model


def test_what_nuts_sees_of_the_flow():
    """Potential energy and its gradient: the closed form's, in x; and in the flow's noise, the same less the Jacobian's log."""
    mean, var, event = 0.3, 0.25, 2
    prior = DiffusionPrior(gaussian(4, mean, var, (event,)).double(), "flow", steps=32)
    y = torch.tensor([1.4, 0.6, 1.9], dtype=torch.float64)
    x = torch.tensor([0.4, -0.2], dtype=torch.float64)
    log_noise = torch.tensor(-0.3, dtype=torch.float64)
    alpha, sigma = schedule(4).alpha(torch.tensor([1, 4])), schedule(4).sigma(torch.tensor([1, 4]))
    v = alpha**2 * var + sigma**2
    slope = (v[0] / v[1]).sqrt() / alpha[0]

    def expected(x):
        z = (x - mean) / slope + alpha[1] * mean
        prior_part = dist.Normal(0.0, 1.0).log_prob(z).sum() - event * slope.log()
        noise = log_noise.exp()
        likelihood = dist.Normal(x.mean(), noise).log_prob(y).sum()
        return -(prior_part + dist.HalfNormal(1.0).log_prob(noise) + log_noise + likelihood)

    def potential(model, **at):
        start = dict.fromkeys(at, None) | at
        _, energy, _, _ = initialize_model(model, (y,), initial_params={k: v.clone() for k, v in start.items()})
        at = {k: v.clone().requires_grad_() for k, v in at.items()}
        value = energy(at)
        return value, torch.autograd.grad(value, at[next(iter(at))])[0]

    x_ = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(expected(x_), x_)
    found = potential(noisy_problem(prior), x=x, noise=log_noise)
    # 32 steps of RK4: 3e-5 measured
    torch.testing.assert_close(found, (expected(x), gradient), rtol=0, atol=1e-4)
    z = (x - mean) / slope + alpha[1] * mean
    reparameterised = poutine.reparam(noisy_problem(prior), {"x": FlowReparam()})
    found = potential(reparameterised, x_T=z, noise=log_noise)
    torch.testing.assert_close(found, (expected(x) - event * slope.log(), gradient * slope), rtol=0, atol=1e-4)


def test_flow_reparam_refuses_what_is_no_map():
    for prior in (DiffusionPrior(gaussian(3)), dist.Normal(torch.zeros(1), 1.0).to_event(1)):
        with pytest.raises(OptionError, match="'x' is not a DiffusionPrior with law"):
            poutine.reparam(problem(prior), {"x": FlowReparam()})(Y)
    observed = poutine.reparam(
        lambda: pyro.sample("x", DiffusionPrior(gaussian(3), "flow"), obs=Y), {"x": FlowReparam()}
    )
    with pytest.raises(ProgramError, match="'x' is observed"):
        observed()


def test_flow_reparam_keeps_the_dims_of_the_event():
    """Rows made event dims, as many as particles and elements: one draw each, and the noise's site has x's event dims."""
    prior = DiffusionPrior(gaussian(3, event=(3,)), "flow", steps=2)
    model = poutine.reparam(lambda: pyro.sample("x", prior.expand([3]).to_event(1)), {"x": FlowReparam()})
    with pyro.plate("particles", 3):
        trace = poutine.trace(model).get_trace()
    for name in ("x_T", "x"):
        assert trace.nodes[name]["fn"].event_shape == (3, 3)
        assert trace.nodes[name]["value"].shape == (3, 3, 3) and len(trace.nodes[name]["value"].unique()) == 27


@pytest.mark.monte_carlo
def test_svi_in_the_noise_of_the_flow():
    """An autoguide of the reparameterised model; started at a value of x."""
    prior = DiffusionPrior(gaussian(3), "flow", steps=2)
    model = poutine.reparam(problem(prior), {"x": FlowReparam()})
    init = pyro.infer.autoguide.init_to_value(values={"x": torch.tensor([0.5])})
    guide = AutoNormal(model, init_loc_fn=init)
    fit(model, guide, Y, particles=200, steps=200)
    # N(0, 1) data: x = x_T / alpha_1
    slope = 1 / schedule(3).alpha(1).item()
    precision = 1 + slope**2 / NOISE_VARIANCE
    found = guide.locs.x_T.item(), guide.scales.x_T.item() ** 2
    assert_estimate(found, SCATTER, np.array([slope / NOISE_VARIANCE / precision, 1 / precision]), detects=0.05)


@pytest.mark.monte_carlo
@pytest.mark.slow
@pytest.mark.parametrize("reparam", [False, True])
def test_nuts_with_unknown_noise(reparam):
    """Means and standard deviations of x and of the noise, against a grid."""
    y = torch.tensor([1.4, 0.6, 1.9, 0.9])
    prior = DiffusionPrior(gaussian(3), "flow", steps=2)  # N(0, 1) data: dx_t / d lambda = 0, and two steps are exact
    model = noisy_problem(prior)
    if reparam:
        model = poutine.reparam(model, {"x": FlowReparam()})
    mcmc = MCMC(NUTS(model, jit_compile=False), num_samples=300, warmup_steps=150, disable_progbar=True)
    mcmc.run(y)
    draws = mcmc.get_samples()
    x = draws["x_T"] / schedule(3).alpha(1) if reparam else draws["x"]
    var = 1 / schedule(3).alpha(1) ** 2
    grid_x, grid_n = torch.meshgrid(torch.linspace(-3, 4, 700), torch.linspace(0.02, 4, 700), indexing="ij")
    log_p = (
        -(grid_x**2) / (2 * var) - grid_n**2 / 2 + dist.Normal(grid_x[..., None], grid_n[..., None]).log_prob(y).sum(-1)
    )
    p = log_p.flatten().double().softmax(0)
    for drawn, grid in ((x[:, 0], grid_x), (draws["noise"], grid_n)):
        mean = (p * grid.flatten()).sum()
        std = ((p * (grid.flatten() - mean) ** 2).sum()).sqrt()
        # an effective sample of 100 of 300, at least
        assert_estimate((drawn.mean() - mean) / std, 0.1, 0.0, detects=1.0)
        assert_estimate((drawn.std() / std).log(), math.sqrt(1 / 200), 0.0, detects=1.0)


# ---------------------------------------------------------------------- the bias of finitely many steps


@pytest.mark.monte_carlo
@pytest.mark.parametrize(("steps", "timesteps", "rule"), [(20, None, "fixed_small"), (20, 7, "fixed_large")])
def test_bias_of_finitely_many_steps(steps, timesteps, rule):
    """The gap at draws of a posterior, and the shift of its mean, against closed forms at the same draws."""
    x = 0.7 + 0.4 * torch.randn(300, 1, dtype=torch.float64)
    prior = DiffusionPrior(gaussian(steps, 0.3, 0.25, variance=rule))
    seed, before = any_seed(), torch.get_rng_state()
    found = steps_bias(prior, x, timesteps=timesteps, repeats=8, seed=seed, batch_size=5000)
    assert torch.equal(torch.get_rng_state(), before)
    gap = oracle(steps, 0.3, 0.25, rule).nelbo(x.numpy())[:, 0] - continuous_nelbo(x.numpy(), 0.3, 0.25)[:, 0]
    assert_estimate(
        found.nats.mean, found.nats.se_noise, gap.mean(), detects=math.inf if timesteps else 0.5 * gap.mean()
    )
    noise = (found.gap.std(0) / math.sqrt(8) * (x[:, 0] - x.mean())).square().sum().sqrt() / (len(x) - 1)
    exact = np.cov(x[:, 0].numpy(), gap)[0, 1]
    assert found.shift.item() == pytest.approx(np.cov(x[:, 0].numpy(), found.gap.mean(0).numpy())[0, 1], rel=1e-9)
    assert_estimate(found.shift.item(), noise, exact, detects=math.inf if timesteps else 2 * abs(exact))
    assert "20 steps: the bound is" in str(found)
    if timesteps is None:  # the noise is small enough to see gap and shift
        assert found.shift_se > noise  # which has the posterior's draws' part too


@pytest.mark.monte_carlo
def test_bias_of_steps_is_of_each_element_and_condition():
    """B == D == 3: rows are draws, columns elements; each draw has the gap of its own conditioning value."""
    prior, x = (
        DiffusionPrior(conditional(20, (3,), means=(-3.0, 0.0, 3.0))),
        torch.tensor([[-3.0] * 3, [0.0] * 3, [3.0] * 3]),
    )
    x = x + torch.tensor([0.0, 0.5, 1.0])
    found = steps_bias(prior.given(y=torch.arange(3)), x, repeats=40, seed=any_seed(), batch_size=5000)
    away = np.array([0.0, 0.5, 1.0])
    gap = np.stack([(oracle(20, m).nelbo(m + away) - continuous_nelbo(m + away, m)).sum() for m in (-3.0, 0.0, 3.0)])
    assert_mean(found.gap, gap, detects=10 * found.gap.std(0))
    assert found.shift.shape == (3,)
    still = torch.cat([x[:, :1], torch.ones(3, 2)], 1)  # elements that do not vary
    assert "nan" not in str(steps_bias(prior.given(y=torch.arange(3)), still))
    torch.testing.assert_close(found.shift, found.shift[[1, 2, 0]])  # the elements differ by a constant


def test_bias_of_steps_refuses():
    for diffusion in (gaussian(math.inf), gaussian(1)):
        with pytest.raises(OptionError, match="schedule of"):
            steps_bias(DiffusionPrior(diffusion), torch.zeros(3, 1))
    with pytest.raises(OptionError, match="law='flow'"):
        steps_bias(DiffusionPrior(gaussian(3), "flow"), torch.zeros(3, 1))
    with pytest.raises(ShapeError, match="B >= 2"):
        steps_bias(DiffusionPrior(gaussian(3)), torch.zeros(1, 1))
    with pytest.raises(OptionError, match="timesteps=0"):
        steps_bias(DiffusionPrior(gaussian(3)), torch.zeros(2, 1), timesteps=0)
