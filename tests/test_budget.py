r"""The cheap bound against closed forms: unbiased by enumeration and quadrature, intervals that cover.

The model is the exact denoiser of a mixture, with an error; minus its ELBO at a datum is a Gauss-Hermite sum over the
noise for each t. Offsets of systematic sampling are enumerated: between the breakpoints of c F(t) mod 1 nothing changes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import DDPM, LinearModel, MixtureDenoiser, hermite, linear_betas

from pyrodiff import GaussianDiffusion, TableSchedule
from pyrodiff.errors import DataError, OptionError, ShapeError
from pyrodiff.laboratory import budget, draws
from pyrodiff.laboratory.budget import Design, Wiener, estimate_elbo, t_quantile

F64 = torch.float64
T = 60
EVENT = (2,)
UNIT = 2 * math.log(2)  # nats of one bit per dim
MIXTURE = ([0.35, 0.65], [-0.7, 0.8], [0.3, 0.15])
GAIN, BIAS = 0.02, -0.02
NODES = 80


class MixtureModel(LinearModel):
    """DDPM's terms with the squared error of the mixture's denoiser; per element of x0."""

    def __init__(self, ddpm):
        super().__init__(ddpm, ddpm.variances("fixed_small"), ddpm.decoder_variance("vdm"))
        self.denoiser = MixtureDenoiser(*MIXTURE, gain=GAIN, bias=BIAS)

    def squared_error(self, x0):
        x0 = torch.as_tensor(np.asarray(x0))[..., None, None]
        nodes, weights = (torch.as_tensor(z) for z in hermite(NODES))
        alpha, var = (torch.as_tensor(z)[:, None] for z in (np.sqrt(self.ddpm.ab), self.ddpm.om))
        x_t = alpha * x0 + var.sqrt() * nodes
        x0_hat = (1 + GAIN) * self.denoiser.posterior_mean(x_t, alpha.expand(x_t.shape), var.expand(x_t.shape)) + BIAS
        return ((x0 - x0_hat) ** 2 @ weights).numpy()

    def population(self):
        """Minus the ELBO averaged over the mixture, per element."""
        nodes, weights = hermite(40)
        at = [self.nelbo(m + math.sqrt(v) * nodes) @ weights for _, m, v in zip(*MIXTURE, strict=True)]
        return np.dot(MIXTURE[0], at)


DDPM_TABLES = DDPM(linear_betas(T))
EXACT = MixtureModel(DDPM_TABLES)


def diffusion(**options):
    net = MixtureDenoiser(*MIXTURE, gain=GAIN, bias=BIAS)
    return GaussianDiffusion(net, TableSchedule(DDPM_TABLES.beta), EVENT, prediction="x0", **options)


def pool(n, seed):
    rng = np.random.default_rng([7, seed])
    which = (rng.random((n, *EVENT)) < MIXTURE[0][1]).astype(int)
    mean, var = (np.array(z)[which] for z in MIXTURE[1:])
    return torch.from_numpy(mean + np.sqrt(var) * rng.standard_normal((n, *EVENT)))


def ragged(c):
    """A design that no pilot would choose."""
    rng = np.random.default_rng(c)
    p = torch.from_numpy(rng.random(T) ** 3 + 0.01)
    mean, slope = torch.from_numpy(rng.standard_normal((2, T)))
    return Design(p / p.sum(), c, mean, slope)


def offsets(design):
    """Every case of the offset: representatives and probabilities."""
    edges = (design.c * design.p.cumsum(0)[:-1]) % 1
    edges = torch.cat([torch.zeros(1, dtype=F64), edges, torch.ones(1, dtype=F64)]).sort().values
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


# ---------------------------------------------------------------------- without bias


@pytest.mark.parametrize("c", [1, 2, 7, 100])
def test_a_step_is_drawn_c_p_times_on_average(c):
    design = ragged(c)
    u, weight = offsets(design)
    t = design.steps(u)
    assert t.shape == (len(u), c) and (t.diff() >= 0).all()
    drawn = (torch.nn.functional.one_hot(t - 1, T).sum(1) * weight[:, None]).sum(0)
    torch.testing.assert_close(drawn, c * design.p, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("c", [1, 3])
def test_an_estimate_is_unbiased_whatever_the_design(c):
    """Offsets enumerated, noise by quadrature; the estimator's own path, control variate included."""
    model, design, x0 = diffusion(), ragged(c), pool(3, 0)
    wiener = Wiener.of(model, pool(50, 1))
    u, weight = offsets(design)
    t = design.steps(u)  # [U, c]
    nodes, node_weights = (torch.as_tensor(z) for z in hermite(24))
    eps = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    node_weights = torch.outer(node_weights, node_weights).flatten()
    every = torch.arange(1, T + 1).expand(len(eps), -1)  # a node is shared by all t: means of sums are sums of means

    def noise(shape):
        assert shape == (len(eps) * T, *EVENT)
        return eps.repeat_interleave(T, 0)

    for row in range(len(x0)):
        with torch.no_grad():
            term, h = budget.terms(model, x0, torch.tensor(row), every, wiener, noise, batch_size=10**6)
            prior = draws.prior(model, x0, torch.zeros_like)[1].analytic[row]
        y = prior + design.estimate(t.expand(len(eps), -1, -1), term[:, t - 1], h[:, t - 1])  # [nodes, U]
        exact = EXACT.nelbo(x0[row].numpy()).sum()
        assert (node_weights @ y @ weight).item() == pytest.approx(exact, rel=2e-6)


def test_the_control_variate_has_mean_0_and_follows_the_error_of_a_linear_denoiser():
    model, x0 = diffusion(), pool(4000, 2)
    wiener = Wiener.of(model, x0)
    nodes, weights = (torch.as_tensor(z) for z in hermite(5))
    eps = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    weights = torch.outer(weights, weights).flatten()
    cov = torch.cov(x0.T)
    for t in (1, 13, T):
        at = torch.full((len(eps),), t)
        alpha, var = math.sqrt(DDPM_TABLES.ab[t - 1]), DDPM_TABLES.om[t - 1]
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + var * torch.eye(2, dtype=F64))
        found, squares = [], []
        for x in x0[:50]:
            h = wiener(x.expand_as(eps), eps, at)
            x_t = alpha * (x - x0.mean(0)) + math.sqrt(var) * eps
            error = (x - x0.mean(0) - x_t @ gain.T).square().sum(-1)
            assert (weights @ h).item() == pytest.approx(0, abs=1e-10)
            deviation = error - weights @ error
            found.append((weights @ (h * deviation)) ** 2 / ((weights @ h**2) * (weights @ deviation**2)))
            squares.append(weights @ h**2)
        assert torch.stack(found).min() > 1 - 1e-9  # correlation 1
        assert torch.stack(squares).mean() == pytest.approx(1, abs=0.35)  # of 50 images: near unit variance


# ---------------------------------------------------------------------- honest


@pytest.fixture(scope="module")
def exact():
    """Minus the ELBO of images ``[n, 2]``, bits per dim, from a fine table: 1e-5 from the quadrature."""
    table = np.linspace(-5, 5, 2001)
    values = np.concatenate([EXACT.nelbo(part) for part in np.split(table[:-1], 8)] + [EXACT.nelbo(table[-1:])])
    return lambda x0: np.interp(x0.numpy(), table, values).sum(-1) / UNIT


def coverage(exact, over, repetitions, se, n):
    """Share of intervals that cover, by target; and reached over requested standard errors.

    Over examples each repetition has a pool of its own; over noise all have one, so that the population is no target.
    """
    model, population = diffusion(), EXACT.population() * EVENT[0] / UNIT
    covered, reached = [], []
    for seed in range(repetitions):
        x0 = pool(n, 0 if over == "noise" else seed)
        found = estimate_elbo(model, x0, se, over, seed=seed, batch_size=10**6)
        targets = {"examples": population, "noise": exact(x0[found.rows]).mean()}
        inside = {k: low <= targets[k] <= high for k in targets for low, high in [found.interval(k)]}
        covered.append([inside["examples"], inside["noise"]])
        reached.append((found.se_noise if over == "noise" else found.se_examples) / se)
    examples, noise = np.mean(covered, 0)
    return {"examples": examples, "noise": noise}, np.array(reached)


CASES = [("examples", 0.08, 1000), ("noise", 0.05, 300)]


@pytest.mark.parametrize("over, se, n", CASES)
def test_intervals_cover_their_own_target(exact, over, se, n):
    """250 repetitions; the limits are three standard deviations of a share of 0.95."""
    found, _ = coverage(exact, over, 250, se, n)
    for target in {"noise", over}:
        assert 0.909 <= found[target] <= 0.991, found


@pytest.mark.slow
@pytest.mark.parametrize("over, se, n", CASES)
def test_intervals_cover_in_93_to_97_percent_of_1000(exact, over, se, n):
    found, reached = coverage(exact, over, 1000, se, n)
    print(over, found, f"reached / requested {reached.mean():.3f} ± {reached.std():.3f}")
    for target in {"noise", over}:
        assert 0.93 <= found[target] <= 0.97, found
    assert 0.85 < reached.mean() < 1.05 and reached.std() < 0.15
