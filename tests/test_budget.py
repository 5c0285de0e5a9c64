r"""The cheap bound against closed forms: unbiased by enumeration and quadrature, intervals that cover.

The model is the exact denoiser of a mixture, with an error; minus its ELBO at a datum is a Gauss-Hermite sum over the
noise for each t. Offsets of systematic sampling are enumerated: between the breakpoints of c F(t) mod 1 nothing changes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monte_carlo import any_seed, assert_estimate, assert_proportion
from oracles import DDPM, LinearModel, MixtureDenoiser, hermite

from pyrodiff import GaussianDiffusion, TableSchedule, draws
from pyrodiff.errors import DataError, OptionError, ShapeError
from pyrodiff.laboratory import budget
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


DDPM_TABLES = DDPM(np.linspace(2e-3, 0.12, T))  # short enough for a prior term that shows
EXACT = MixtureModel(DDPM_TABLES)


def diffusion(ddpm=DDPM_TABLES):
    net = MixtureDenoiser(*MIXTURE, gain=GAIN, bias=BIAS)
    return GaussianDiffusion(net, TableSchedule(ddpm.beta), EVENT, prediction="x0")


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


def expectation(c, estimate, with_prior=True):
    """E Y for two images: offsets enumerated, noise by quadrature, on the estimator's own path."""
    model, design, x0 = diffusion(), ragged(c), pool(2, 0)
    wiener = Wiener.of(model, pool(50, 1))
    u, weight = offsets(design)
    t = design.steps(u)  # [U, c]
    nodes, node_weights = (torch.as_tensor(z) for z in hermite(24))
    eps = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    node_weights = torch.outer(node_weights, node_weights).flatten()
    every = torch.arange(1, T + 1).expand(len(eps), -1)  # a node is shared by all t: means of sums are sums of means

    def noise(shape):
        return eps.repeat_interleave(T, 0).reshape(shape)

    found = []
    with torch.no_grad():
        priors = draws.prior(model, x0, torch.zeros_like)[1].analytic * with_prior
        for row, prior in enumerate(priors):
            term, h = budget.terms(model, x0, torch.tensor(row), every, wiener, noise, batch_size=10**6)
            y = prior + estimate(design, t.expand(len(eps), -1, -1), term[:, t - 1], h[:, t - 1])  # [nodes, U]
            found.append((node_weights @ y @ weight).item())
    return np.array(found), EXACT.nelbo(x0.numpy()).sum(-1)


@pytest.mark.parametrize("c", [1, 3])
def test_an_estimate_is_unbiased_whatever_the_design(c):
    found, exact = expectation(c, Design.estimate)
    np.testing.assert_allclose(found, exact, rtol=2e-6)


def without_p(design, t, term, h):
    return design._replace(p=torch.ones(T, dtype=F64)).estimate(t, term, h)


def without_c(design, t, term, h):
    return design.mean.sum() + design.c * (design.estimate(t, term, h) - design.mean.sum())


def without_the_curve(design, t, term, h):
    return design.estimate(t, term, h) - design.mean.sum()


@pytest.mark.parametrize("wrong", [without_p, without_c, without_the_curve])
def test_a_wrong_weight_is_noticed(wrong):
    found, exact = expectation(3, wrong)
    assert (np.abs(found / exact - 1) > 1e-2).all()


def test_a_missing_prior_is_noticed():
    found, exact = expectation(1, Design.estimate, with_prior=False)
    assert (np.abs(found / exact - 1) > 1e-4).all()


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


@pytest.mark.monte_carlo
def test_the_whole_is_the_sum_of_all_three_terms():
    """A chain too short to forget its data: the prior term is half a bit per dimension, and a quarter of it would be seen."""
    ddpm = DDPM(np.linspace(2e-3, 0.05, 20))
    model, x0 = MixtureModel(ddpm), pool(100, 4)
    found = estimate_elbo(diffusion(ddpm), x0, 0.005, "noise", seed=any_seed())
    assert model.prior(x0.numpy()).sum(-1).mean() / UNIT > 0.5
    exact = model.nelbo(x0.numpy()).sum(-1).mean() / UNIT
    assert_estimate(found.mean, found.se_noise, exact, detects=0.15)


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
    for seed in torch.randint(2**31, (repetitions,)).tolist():
        x0 = pool(n, 0 if over == "noise" else seed)
        found = estimate_elbo(model, x0, se, over, seed=seed, batch_size=10**6)
        targets = {"examples": population, "noise": exact(x0[found.rows]).mean()}
        inside = {k: low <= targets[k] <= high for k in targets for low, high in [found.interval(k)]}
        covered.append([inside["examples"], inside["noise"]])
        reached.append((found.se_noise if over == "noise" else found.se_examples) / se)
    examples, noise = np.mean(covered, 0)
    return {"examples": examples, "noise": noise}, np.array(reached)


@pytest.mark.monte_carlo
def test_intervals_cover_their_own_target(exact):
    found, _ = coverage(exact, "examples", 250, 0.08, 3000)
    for target in ("noise", "examples"):
        assert_proportion(250 * found[target], 250, (0.94, 0.96), detects=0.25)


@pytest.mark.monte_carlo
@pytest.mark.slow
@pytest.mark.parametrize("over, se, n", [("examples", 0.08, 3000), ("noise", 0.05, 300)])
def test_intervals_cover_of_1000(exact, over, se, n):
    found, reached = coverage(exact, over, 1000, se, n)
    for target in {"noise", over}:
        assert_proportion(1000 * found[target], 1000, (0.94, 0.96), detects=0.1)
    assert 0.85 < reached.mean() < 1.05 and reached.std() < 0.15


@pytest.mark.parametrize("df, quantile", [(2, 4.303), (5, 2.5706), (30, 2.0423), (1e9, 1.95996)])
def test_quantiles_of_t(df, quantile):
    assert t_quantile(df) == pytest.approx(quantile, rel=1e-2 if df < 5 else 2e-4)


def test_what_is_reported_adds_up():
    x0 = pool(3000, 5)
    found = estimate_elbo(diffusion(), x0, 0.08)
    grid = len(found.moments.t)
    assert found.pilot_evaluations == 2 * 16 * grid
    assert found.network_evaluations == found.pilot_evaluations + round(found.timesteps * found.images)
    assert found.rows.unique().numel() == found.images  # each image at most once
    assert found.probabilities.shape == (T,) and found.probabilities.sum().item() == pytest.approx(1)
    assert found.interval() == found.interval("examples") and found.df_examples == found.images - 1
    assert found.gain == found.loop_evaluations / found.network_evaluations
    # the loop, by closed forms: variance between images and, from the pilot's few images, over noise
    between = EXACT.nelbo(x0.numpy()[::4]).sum(-1).var() / UNIT**2
    assert found.loop_evaluations > 0.5 * T * between / found.se_examples**2
    assert found.noise_gain > 1 and found.noise_gain_limit > 1
    assert "bits/dim" in str(found) and str(found).count("\n") == 1
    every = estimate_elbo(diffusion(), x0[:200], 0.1, "noise")
    assert sorted(every.rows.tolist()) == list(range(200)) and every.se_noise < 0.11


def test_the_evaluations_counted_are_those_made():
    class Counting(MixtureDenoiser):
        rows = 0

        def forward(self, x, log_snr):
            self.rows += len(x)
            return super().forward(x, log_snr)

    model = diffusion()
    model.reverse_kernel.net = Counting(*MIXTURE)
    found = estimate_elbo(model, pool(3000, 5), 0.1)
    assert model.reverse_kernel.net.rows == found.network_evaluations


def test_same_seed_same_estimate_whatever_the_batch_and_no_global_randomness():
    model, x0 = diffusion(), pool(3000, 6)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    a = estimate_elbo(model, x0, 0.1, seed=3)
    b = estimate_elbo(model, x0, 0.1, seed=3, batch_size=37)
    c = estimate_elbo(model, x0, 0.1, seed=4)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert (a.images, a.timesteps, a.network_evaluations) == (b.images, b.timesteps, b.network_evaluations)
    assert a.mean == pytest.approx(b.mean, rel=1e-9) and torch.equal(a.rows, b.rows)
    assert a.mean != c.mean and not torch.equal(a.rows, c.rows)


def test_conditioning_goes_with_its_image():
    """A network that answers with its label: terms are small where each image meets its own."""

    class Told(torch.nn.Module):
        @property
        def cond_event_dims(self):
            return {"y": 1}

        def forward(self, x, log_snr, y):
            return y

    model = GaussianDiffusion(Told(), TableSchedule(DDPM_TABLES.beta), EVENT, prediction="x0")
    x0 = pool(300, 8)
    right = estimate_elbo(model, x0, 0.1, "noise", y=x0)
    wrong = estimate_elbo(model, x0, 100.0, "noise", y=x0.roll(1, 0))
    assert right.mean < -2 and wrong.mean > 10
    assert right.se_noise < 1e-6  # nothing depends on the noise


@pytest.mark.slow
def test_a_pool_too_small_is_refused_with_what_it_reaches():
    with pytest.raises(
        DataError,
        match=r"^se=0.0001 takes about .* images .* the pool has 484 .* reach about 0\.\d+ bits/dim; .*over='noise'",
    ):
        estimate_elbo(diffusion(), pool(500, 9), 1e-4)
    x0 = pool(1000, 9)
    reached = EXACT.nelbo(x0.numpy()).sum(-1).std() / UNIT / math.sqrt(984)
    with pytest.raises(DataError, match="takes about"):  # by the first stage, not by the pilot
        estimate_elbo(diffusion(), x0, 0.8 * reached)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"se": 0.0}, OptionError, "se=0.0"),
        ({"se": math.nan}, OptionError, "se=nan"),
        ({"over": "images"}, OptionError, "over='images' is not one of 'examples', 'noise'"),
        ({"pilot": 3}, OptionError, "pilot=3 is not in 4..50"),
        ({"pilot": 51}, OptionError, "pilot=51"),
        ({"seed": -1}, OptionError, "seed=-1"),
        ({"batch_size": 0}, OptionError, "batch_size=0"),
        ({"x0": torch.zeros(2)}, ShapeError, r"x0 has shape \[2\]"),
        ({"x0": torch.zeros(5, 2)}, ShapeError, "N >= 8"),
        ({"x0": torch.zeros(100, 3)}, ShapeError, "x0 has shape"),
        ({"x0": torch.full((100, 2), math.nan)}, DataError, "x0 holds NaN"),
    ],
)
def test_bad_options_are_named_in_one_line(options, error, message):
    with pytest.raises(error, match=message) as caught:
        estimate_elbo(**{"diffusion": diffusion(), "x0": pool(100, 0), "se": 0.1, **options})
    assert "\n" not in str(caught.value)


def test_an_interval_of_nothing_known():
    found = estimate_elbo(diffusion(), pool(100, 0), 1.0, "noise")
    with pytest.raises(OptionError, match="over='both'"):
        found.interval("both")
