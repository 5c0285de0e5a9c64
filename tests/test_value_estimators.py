"""Estimators of the bound against quadrature and closed forms: means where they claim to be unbiased, and variances."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from monte_carlo import any_seed, assert_estimate
from oracles import DDPM, GaussianDenoiser, LinearModel, hermite, linear_betas

import pyrodiff
from pyrodiff import draws
from pyrodiff.distributions import Gaussian
from pyrodiff.draws import Terms
from pyrodiff.laboratory import values

X0 = 0.7
GAIN, BIAS = 0.15, -0.1  # a denoiser that is not the exact one: nothing cancels by luck


def make(steps, gain=GAIN, bias=BIAS, variance="fixed_small"):
    """A linear denoiser of Gaussian data, as a program and in closed form."""
    betas = linear_betas(steps)
    ddpm = DDPM(betas)
    net = GaussianDenoiser("x0", betas, gain=gain, bias=bias)
    schedule = pyrodiff.TableSchedule(torch.tensor(betas))
    diffusion = pyrodiff.GaussianDiffusion(net, schedule, (1,), prediction="x0", variance=variance)
    return diffusion, LinearModel(ddpm, ddpm.variances(variance), ddpm.decoder_variance("vdm"), gain=gain, bias=bias)


def grid(dims, nodes):
    """Nodes of Gauss-Hermite quadrature in ``dims`` dimensions, ``[n, dims]``, and their weights."""
    x, w = hermite(nodes)
    points = np.stack([z.ravel() for z in np.meshgrid(*[x] * dims, indexing="ij")], -1)
    weights = np.prod(np.stack([z.ravel() for z in np.meshgrid(*[w] * dims, indexing="ij")], -1), -1)
    return torch.tensor(points), torch.tensor(weights)


def tape(*columns):
    """Noise that is given: one column of nodes per call."""
    left = iter(columns)
    return lambda like: next(left).reshape(like.shape).to(like)


# ---------------------------------------------------------------------- means, by quadrature


# Not k3 under the larger variance: there p / q grows like the exponential of a square, and quadrature does not converge.
@pytest.mark.parametrize(
    ("kl", "variance"),
    [(kl, v) for kl in values.KLS for v in ("fixed_small", "fixed_large") if (kl, v) != ("k3", "fixed_large")],
)
def test_means_along_the_chain(kl, variance):
    diffusion, closed = make(2, variance=variance)
    z, w = grid(2, 90)
    drawn = draws.chain(
        diffusion, torch.full((len(z), 1), X0, dtype=torch.float64), 1, tape(z[:, 0], z[:, 1]), batch_size=len(z)
    )
    mean = float((values.total(drawn.terms, kl)[0] * w).sum())
    exact = float(closed.nelbo(np.array(X0)))
    if values.UNBIASED[kl]:
        assert mean == pytest.approx(exact, abs=1e-9)
    else:
        assert abs(mean - exact) > 1e-2


@pytest.mark.parametrize("kl", ["analytic", "k1", "k3"])
def test_means_of_states_drawn_apart(kl):
    diffusion, closed = make(3)
    z, w = grid(2, 90)  # the terms are apart: each may use the same nodes
    noise = itertools.chain.from_iterable([(z[:, 0], z[:, 1])] * 3 + [(z[:, 0],)])
    drawn = draws.independent(
        diffusion, torch.full((len(z), 1), X0, dtype=torch.float64), 1, tape(*noise), batch_size=len(z)
    )
    assert float((values.total(drawn.terms, kl)[0] * w).sum()) == pytest.approx(
        float(closed.nelbo(np.array(X0))), abs=1e-9
    )


def test_columns_are_the_terms_of_the_bound():
    diffusion, closed = make(4)
    z, w = grid(1, 60)
    noise = itertools.chain.from_iterable([(z[:, 0], z[:, 0])] * 4 + [(z[:, 0],)])
    drawn = draws.independent(
        diffusion, torch.full((len(z), 1), X0, dtype=torch.float64), 1, tape(*noise), batch_size=len(z)
    )
    x0 = np.array(X0)
    expected = [closed.reconstruction(x0), *closed.diffusion(x0), closed.prior(x0)]
    torch.testing.assert_close((drawn.terms.analytic[0] * w[:, None]).sum(0), torch.tensor(np.array(expected)))


def test_antithetic_pairs_are_unbiased():
    diffusion, closed = make(3)
    z, w = grid(1, 20)
    sums = []
    for sign in (1, -1):
        noise = itertools.chain.from_iterable([(sign * z[:, 0], sign * z[:, 0])] * 3 + [(sign * z[:, 0],)])
        x0 = torch.full((len(z), 1), X0, dtype=torch.float64)
        sums.append(values.total(draws.independent(diffusion, x0, 1, tape(*noise), 999).terms, "analytic")[0])
    exact = float(closed.nelbo(np.array(X0)))
    assert float((torch.stack(sums).mean(0) * w).sum()) == pytest.approx(exact, abs=1e-9)
    assert float((sums[0] * (z[:, 0] > 0) * 2 * w).sum()) != pytest.approx(exact, abs=1e-3)  # half of the noise is not


@pytest.mark.parametrize("c", [-0.7, 0.0, 0.4, 1.0, 2.0])
def test_the_control_variate_is_unbiased_for_every_coefficient(c):
    diffusion, closed = make(2)
    z, w = grid(2, 12)
    drawn = draws.chain(
        diffusion, torch.full((len(z), 1), X0, dtype=torch.float64), 1, tape(z[:, 0], z[:, 1]), batch_size=len(z)
    )
    kl, k1 = (values.total(drawn.terms, name)[0] for name in ("analytic", "k1"))
    assert float(((kl + c * (k1 - kl)) * w).sum()) == pytest.approx(float(closed.nelbo(np.array(X0))), abs=1e-9)


def test_either_half_has_the_coefficient_of_the_other():
    torch.manual_seed(0)
    terms = Terms(torch.randn(8, 3, 5).double(), torch.randn(8, 3, 5).double())
    before, _ = values.control_variate(terms)
    change = torch.zeros(8, 3, 5).double()
    change[:4] = torch.randn(4, 3, 5)
    after, _ = values.control_variate(Terms(terms.analytic, terms.log_ratio + change))
    first = values.total(terms, "k1") - values.total(terms, "analytic")
    ratio = (after - values.total(terms, "analytic"))[4:] / first[4:]
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))  # one number for the second half, from the first
    moved = values.total(Terms(terms.analytic, terms.log_ratio + change), "k1") - values.total(terms, "analytic")
    same = (after - values.total(terms, "analytic"))[:4] / moved[:4]
    torch.testing.assert_close(same, ((before - values.total(terms, "analytic"))[:4] / first[:4]))


P = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kl", ["analytic", "k1", "k3"])
def test_means_over_drawn_timesteps(kl, normalise):
    """Every pair of timesteps of three, every node of the noise: the expectation, enumerated."""
    diffusion, closed = make(3)
    z, w = grid(2, 60)
    n = len(z)
    pairs = torch.tensor(list(itertools.product((1, 2, 3), repeat=2)))
    total = torch.zeros((), dtype=torch.float64)
    x0 = torch.full((n, 1), X0, dtype=torch.float64)
    for pair in pairs:
        t = pair.expand(1, n, 2)
        both = torch.stack([z, z], 1).flatten(0, 1)  # rows of sampled_terms: example-major, then the timesteps
        noise = tape(both[:, 0], both[:, 1], z[:, 0])
        terms = values.sampled_terms(diffusion, x0, t, noise, batch_size=10**6)
        total += P[pair - 1].prod() * (values.weighted_total(terms, t, P, kl, normalise)[0] * w).sum()
    exact = float(closed.nelbo(np.array(X0)))
    if normalise:
        assert abs(float(total) - exact) > 0.1
    else:
        assert float(total) == pytest.approx(exact, abs=1e-8)


def test_systematic_timesteps_have_their_probabilities():
    edges = torch.cat([torch.zeros(1), P.cumsum(0)])
    for count in (1, 2, 5):
        # The offsets between which no timestep changes, enumerated: over them, each t has count * p(t) expected draws.
        breaks = torch.cat([(edges - j / count) % (1 / count) for j in range(count)] + [torch.tensor([0.0, 1 / count])])
        breaks = breaks.double().clamp(0, 1 / count).sort().values
        expected = torch.zeros(3, dtype=torch.float64)
        for a, b in itertools.pairwise(breaks.tolist()):
            if b - a > 1e-12:
                t = values.systematic(P, (a + b) / 2 + torch.arange(count, dtype=torch.float64) / count)
                expected += (b - a) * count * torch.bincount(t - 1, minlength=3)
        torch.testing.assert_close(expected, count * P, atol=1e-6, rtol=0)


def test_spread_points_are_even_for_the_batch_and_for_each_example():
    u = values._spread(7, 5, 4, torch.Generator().manual_seed(0))
    assert u.shape == (7, 5, 4) and 0 <= float(u.min()) and float(u.max()) < 1
    gaps = u.flatten(1).sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 20))
    each = u.sort(-1).values.diff(dim=-1)
    torch.testing.assert_close(each, torch.full_like(each, 1 / 4))


@pytest.mark.parametrize("k", [1, 2])
def test_importance_weighted_bounds_lie_between_the_elbo_and_the_evidence(k):
    diffusion, closed = make(1)
    z, w = grid(k, 80)
    chains = [
        values.total(
            draws.chain(diffusion, torch.full((len(z), 1), X0, dtype=torch.float64), 1, tape(z[:, j]), 10**6).terms,
            "k1",
        )
        for j in range(k)
    ]
    mean = float((values.importance_weighted(torch.cat(chains), k)[0] * w).sum())
    elbo, evidence = float(closed.nelbo(np.array(X0))), -float(closed.log_density(np.array(X0)))
    assert mean == pytest.approx(elbo, abs=1e-9) if k == 1 else evidence < mean < elbo - 1e-3


# ---------------------------------------------------------------------- variances, in closed form


def quadratic_forms(closed, x0):
    """The whole sums along the chain as [1, z]' M [1, z]: by analytic KLs, and by log-ratios.

    Every state is affine in the noise z_1, ..., z_T: a row of coefficients of (1, z_1, ..., z_T). Every term is a weighted
    square of such rows.
    """
    ddpm, T = closed.ddpm, closed.ddpm.steps
    unit = np.eye(T + 1)
    one = unit[0]
    squares = {"analytic": [], "log_ratio": []}

    def add(form, weight, row):
        squares[form].append(math.sqrt(abs(weight)) * row * (1 if weight >= 0 else 1j))

    x = math.sqrt(ddpm.ab[-1]) * x0 * one + math.sqrt(ddpm.om[-1]) * unit[T]
    add("analytic", float(closed.prior(np.array(x0))), one)
    add("log_ratio", 0.5, x)
    add("log_ratio", -0.5, unit[T])
    add("log_ratio", -0.5 * math.log(ddpm.om[-1]), one)
    for t in range(T, 1, -1):
        i = t - 1
        error = x0 * one - closed.A[i] * x - closed.B[i] * one
        bt, var, c1, c2 = ddpm.bt[i], closed.variance[i], ddpm.c1[i], ddpm.c2[i]
        add("analytic", 0.5 * (math.log(var / bt) + bt / var - 1), one)
        add("analytic", c1**2 / (2 * var), error)
        add("log_ratio", 0.5 / var, math.sqrt(bt) * unit[t - 1] + c1 * error)  # x_s less the model's mean
        add("log_ratio", -0.5, unit[t - 1])
        add("log_ratio", 0.5 * math.log(var / bt), one)
        x = c1 * x0 * one + c2 * x + math.sqrt(bt) * unit[t - 1]
    error = x0 * one - closed.A[0] * x - closed.B[0] * one
    for form in squares:
        add(form, 0.5 * math.log(2 * math.pi * closed.decoder_variance), one)
        add(form, 0.5 / closed.decoder_variance, error)
    return [(np.array(rows).T @ np.array(rows)).real for rows in squares.values()]


def moments(M):
    """Mean and variance of [1, z]' M [1, z]."""
    Q, line = M[1:, 1:], 2 * M[0, 1:]
    return M[0, 0] + np.trace(Q), 2 * (Q**2).sum() + (line**2).sum()


def test_the_oracle_of_variances_has_the_right_means():
    for steps in (1, 2, 50):
        _, closed = make(steps)
        for form in quadratic_forms(closed, X0):
            assert moments(form)[0] == pytest.approx(float(closed.nelbo(np.array(X0))), rel=1e-9)


@pytest.mark.parametrize(
    ("steps", "variance", "measured"),
    [(100, "fixed_small", (2.39, 3.72)), (1000, "fixed_small", (1.26, 3.34)), (1000, "fixed_large", (0.047, 2.46))],
)
def test_along_the_chain_the_log_ratio_varies_less(steps, variance, measured):
    """Standard deviation of the bound of one datum under the exact denoiser, by log-ratios and by analytic KLs.

    ``measured`` are sample figures of an independent program, good to about a tenth.
    """
    _, closed = make(steps, 0.0, 0.0, variance)
    exact = LinearModel(closed.ddpm, closed.variance, closed.decoder_variance, mean=0.0)
    analytic, log_ratio = (math.sqrt(moments(form)[1]) for form in quadratic_forms(exact, 0.3))
    assert (log_ratio, analytic) == pytest.approx(measured, rel=0.1)


@pytest.mark.monte_carlo
def test_variances_in_the_table_are_those_of_the_closed_form():
    steps, repeats = 12, 3000
    diffusion, closed = make(steps)
    x0 = torch.tensor([[X0]], dtype=torch.float64)
    table, _, _ = values.value_estimators(
        diffusion, x0, repeats=repeats, timesteps=(1, 3), iwae=(), seed=any_seed(), batch_size=10**5
    )
    found = table.set_index(["path", "kl"])
    analytic, log_ratio = quadratic_forms(closed, X0)
    cov = (moments(analytic + log_ratio)[1] - moments(analytic)[1] - moments(log_ratio)[1]) / 2
    var_a, var_k = moments(analytic)[1], moments(log_ratio)[1]
    best = var_a - (cov - var_a) ** 2 / (var_a + var_k - 2 * cov)
    ddpm, x = closed.ddpm, np.array(X0)
    # A term alone is a quadratic of one normal number.
    first = X0 - closed.A * np.sqrt(ddpm.ab) * X0 - closed.B
    scale = np.concatenate([[0.5 / closed.decoder_variance], (ddpm.c1**2 / (2 * closed.variance))[1:]])
    of_t = scale**2 * (2 * (closed.A**2 * ddpm.om) ** 2 + 4 * first**2 * closed.A**2 * ddpm.om)
    mean = np.concatenate([[closed.reconstruction(x)], closed.diffusion(x)])
    second = of_t + mean**2
    expected = {
        ("chain", "analytic"): var_a,
        ("chain", "k1"): var_k,
        ("chain", "analytic + c N"): best,
        ("independent", "analytic"): of_t.sum(),
        ("uniform, 1", "analytic"): steps * second.sum() - mean.sum() ** 2,
        ("uniform, 3", "analytic"): (steps * second.sum() - mean.sum() ** 2) / 3,
    }
    for key, value in expected.items():
        row = found.loc[key]
        assert_estimate(row.variance, row.variance_se, value, detects=2.5 * value)
    # For p in proportion to the root of the second moment the single draw's variance is this; p comes from a pilot.
    ideal = np.sqrt(second).sum() ** 2 - mean.sum() ** 2
    row = found.loc[("importance, 1", "analytic")]
    assert_estimate(row.variance, row.variance_se, (ideal, 1.2 * ideal), detects=2.5 * ideal)
    assert row.efficiency == pytest.approx(1 / row.variance)
    low, uniform = (found.loc[(f"{path}, 3", "analytic")] for path in ("low discrepancy", "uniform"))
    error = math.hypot(low.variance_se, uniform.variance_se)
    assert_estimate(low.variance, error, (0.0, uniform.variance), detects=2.5 * uniform.variance)


# ---------------------------------------------------------------------- the table


@pytest.mark.monte_carlo
def test_the_bias_column_finds_what_is_biased_and_nothing_else():
    diffusion, closed = make(10)
    x0 = torch.tensor([[X0], [-0.2], [0.1]], dtype=torch.float64)
    exact = torch.tensor(closed.nelbo(x0.numpy()[:, 0]))
    options = {"repeats": 2000, "timesteps": (1, 5), "controls": True, "batch_size": 10**5, "iwae": (1, 8)}
    table, _, _ = values.value_estimators(diffusion, x0, exact=exact, seed=any_seed(), **options)
    k3 = table.kl == "k3"  # heavy tails: its standard error is not to be trusted here; quadrature has tested it
    unbiased = table[table.unbiased & ~k3]
    assert len(unbiased) >= 20
    assert_estimate(unbiased.bias, unbiased.bias_se, 0.0, detects=2.5)
    biased = table[~table.unbiased & (table.target == "elbo")]
    assert {"chain, forward order", "importance, 5, normalised"} <= set(biased.path)
    # 4.89 a false alarm in a million; the least expectation here is about 9, with a deviation of 1, so one miss in 10^4 or 10^5
    assert (biased.z.abs() > 4.89).all(), biased[["path", "kl", "bias", "z"]]
    assert (table.against[table.target == "elbo"] == "exact").all()


def test_without_an_exact_value_the_best_unbiased_estimator_is_the_reference():
    diffusion, _ = make(10)
    table, _, _ = values.value_estimators(
        diffusion, torch.tensor([[X0], [0.1]], dtype=torch.float64), repeats=400, iwae=(4,), controls=True
    )
    assert table[table.path == "chain, forward order"].iloc[0].z > 5
    (reference,) = set(table.against[table.target == "elbo"]) - {""}
    assert reference.startswith("importance") and table[table.target == "log p"].bias.isna().all()


def test_what_does_not_apply_says_why():
    diffusion, _ = make(4)
    table, _, _ = values.value_estimators(
        diffusion, torch.tensor([[X0]], dtype=torch.float64), repeats=4, timesteps=(1, 9), iwae=(1, 16)
    )
    refused = table[table["mean"].isna()].set_index("kl")
    assert "repeats=4 is below 8" in refused.loc["analytic + c N"].reason
    assert "repeats=32" in refused.loc["IWAE 16"].reason
    assert "T = 4" in refused.loc["analytic"].reason
    assert refused[["variance", "bias", "efficiency", "seconds"]].isna().all(axis=None)


def test_tables_repeat_themselves_and_leave_the_generator_alone():
    diffusion, _ = make(4)
    x0 = torch.tensor([[X0], [0.1]], dtype=torch.float64)
    state = torch.random.get_rng_state()
    first, second = (values.value_estimators(diffusion, x0, repeats=8, seed=3, controls=True)[0] for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.drop(columns="seconds").equals(second.drop(columns="seconds"))
    other = values.value_estimators(diffusion, x0, repeats=8, seed=4)[0]
    assert other["mean"][0] != first["mean"][0]


@pytest.mark.monte_carlo
def test_by_timestep_adds_up():
    diffusion, closed = make(6)
    x0 = torch.tensor([[X0], [0.1], [-0.5]], dtype=torch.float64)
    _, _, loop = values.value_estimators(diffusion, x0, repeats=500, timesteps=(), iwae=(), seed=any_seed())
    table = values.by_timestep(diffusion, loop)
    assert list(table.term) == ["reconstruction", *["diffusion"] * 5, "prior"] and list(table.t) == [
        1,
        2,
        3,
        4,
        5,
        6,
        6,
    ]
    assert (
        table.kl[0] < 0 and table.share.isna().all()
    )  # a density's reconstruction: parts have no share of a difference
    shifted = Terms(*(z + torch.eye(1, 7) * 5 for z in loop.terms))
    positive = values.by_timestep(diffusion, draws.Draws(shifted, loop.evaluations, loop.seconds))
    assert positive.share.sum() == pytest.approx(1) and (positive.share >= 0).all()
    np.testing.assert_allclose(table.log_snr[:6], closed.ddpm.log_snr, rtol=1e-9)
    x = x0.numpy()[:, 0]
    exact = np.concatenate([[closed.reconstruction(x).mean()], closed.diffusion(x).mean(0), [closed.prior(x).mean()]])
    assert_estimate(table.kl, table.se_noise, (exact - 1e-12, exact + 1e-12), detects=1.6)
    assert (table.variance_analytic[1:] <= table.variance_monte_carlo[1:] * 1.2).all()
    assert table.variance_analytic.iloc[-1] == 0  # the prior's KL does not depend on the noise


def test_controls_are_per_example_whatever_data_size():
    net, schedule = pyrodiff.nets.MLP(2, width=8, depth=1), pyrodiff.LogLinearSchedule(3, -4.0, 4.0)
    known, x0, found = len(pyro.get_param_store()), torch.randn(4, 2), []
    for data_size in (6, None):
        diffusion = pyrodiff.GaussianDiffusion(net, schedule, (2,), data_size=data_size)
        options = {"repeats": 64, "controls": True, "iwae": (), "timesteps": (1,)}
        table, _, _ = values.value_estimators(diffusion, x0, **options)
        found.append(table.set_index(["path", "kl"]).loc[("chain, forward order", "k1")])
    assert found[0]["mean"] == pytest.approx(found[1]["mean"], rel=1e-6)  # the same draws
    assert found[0].variance == pytest.approx(found[1].variance, rel=1e-6)
    assert len(pyro.get_param_store()) == known


def test_estimators_of_one_noise_are_compared_draw_by_draw():
    noise = torch.randn(50, 3, dtype=torch.float64)
    a = values.Estimator("a", "analytic", noise + 1, True, noise="n")
    b = values.Estimator("b", "k1", noise, True, noise="n")
    other = values.Estimator("c", "k1", noise, True, noise="m")
    assert values._se_of_difference(a, b, 3.0, 4.0) == pytest.approx(0, abs=1e-12)
    assert values._se_of_difference(a, other, 3.0, 4.0) == 5.0


@pytest.mark.parametrize("kl", ["analytic", "k1"])
def test_means_of_the_guide_in_forward_order(kl, monkeypatch):
    """Right by log-ratios, over every node of the noise; far off by analytic KLs."""
    diffusion, closed = make(3)
    z, w = grid(3, 8)  # of squares: exact
    noise = tape(*z.T)  # x_1, then x_2, then x_3
    monkeypatch.setattr(Gaussian, "rsample", lambda self, shape=(): self.mean + self.stddev * noise(self.mean))
    x0 = torch.full((len(z), 1), X0, dtype=torch.float64)
    found = {e.kl: e for e in values._forward_order(diffusion, x0, 1, 0, len(z), {})}
    off = abs(float((found[kl].draws[0] * w).sum()) - float(closed.nelbo(np.array(X0))))
    assert off < 1e-9 if found[kl].unbiased else off > 0.1
    assert found[kl].unbiased == (kl == "k1")


@pytest.mark.monte_carlo
def test_variance_between_examples_is_that_of_their_means():
    effect, noise = 2 * torch.randn(20_000, 3), 3 * torch.randn(2, 20_000, 3)
    terms = (effect + noise).double()  # of means of two draws: 4 between examples, 9 / 2 of noise
    table = values.by_timestep(make(2)[0], draws.Draws(Terms(terms, terms), 2, 0.0))
    # 20,000 means of variance 8.5 less half of as many differences of variance 9; and these alone
    assert_estimate(table.variance_examples, math.sqrt(2 * 8.5**2 + 2 * 4.5**2) / math.sqrt(20_000), 4.0, detects=1.0)
    assert_estimate(table.variance_analytic, 9 * math.sqrt(2 / 20_000), 9.0, detects=1.0)
