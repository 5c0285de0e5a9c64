"""The statistical assertions themselves, wrong code that they must reject, and runs with other seeds and in other orders."""

from __future__ import annotations

import ast
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import monte_carlo
import numpy as np
import pytest
import test_closed_forms
import torch
from monte_carlo import (
    FALSE_ALARM,
    assert_accepted,
    assert_estimate,
    assert_mean,
    assert_moments,
    assert_proportion,
    assert_rejected,
    state,
)
from oracles import DDPM, MEAN, VAR, GaussianDenoiser, LinearModel, MixtureDenoiser, hermite, linear_betas
from scipy import stats
from test_closed_forms import exact_terms, mixture_data, mixture_entropy
from test_smc import conditioned
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyrodiff import GaussianDiffusion, TableSchedule, elbo_terms, fit, nets, sample
from pyrodiff.inference import guided, smc
from pyrodiff.inference.calibration import sbc, tarp
from pyrodiff.inference.operators import LinearOperator, blur, downsample, mask

F64 = torch.float64
TESTS = Path(__file__).parent


# ---------------------------------------------------------------------- the assertions


@pytest.fixture
def unstated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assertions on numbers that are no draws: none of their rates counts."""
    monkeypatch.setattr(monte_carlo, "state", lambda statistic, **rates: None)


def spread(n: int) -> np.ndarray:
    """Standard normal numbers whose mean is 0, and variance nearly 1, without chance."""
    return stats.norm.ppf((np.arange(n) + 0.5) / n)


def test_a_mean_is_judged_at_the_stated_rate(unstated):
    """Student's t of 100 numbers, either side of the bar; and of 20 elements together, at a twentieth of the rate."""
    x = spread(100)
    se = x.std(ddof=1) / 10
    for elements in (1, 20):
        bar = stats.t.isf(FALSE_ALARM / (2 * elements), 99) * se
        rows = np.repeat(x[:, None], elements, 1)
        off = np.eye(1, elements)[0]
        assert_mean(rows + 0.999 * bar * off, 0.0, detects=2.0)
        for sign in (-1, 1):
            with pytest.raises(AssertionError, match="beyond"):
                assert_mean(rows + 1.001 * sign * bar * off, 0.0, detects=2.0)
    bar = stats.t.isf(FALSE_ALARM / 2, 99) * se
    assert_mean(x + 0.999 * bar + 1, (-1.0, 1.0), detects=2.0)  # an interval
    assert_mean(torch.from_numpy(x) - 50, (-math.inf, 1.0), detects=2.0)


def test_what_is_stated_to_be_seen_is_seen(unstated):
    """A mean off by `detects` is missed with probability `misses`: the power of the test, by the normal law."""
    for false_alarm, misses in ((1e-6, 1e-6), (1e-4, 1e-2)):
        rates = {"false_alarm": false_alarm, "misses": misses}
        least = stats.norm.isf(false_alarm / 2) + stats.norm.isf(misses)
        assert stats.norm.cdf(stats.norm.isf(false_alarm / 2) - least) == pytest.approx(misses)
        assert_estimate(0.0, 1.0, 0.0, detects=1.001 * least, **rates)
        with pytest.raises(AssertionError, match="too few draws"):
            assert_estimate(0.0, 1.0, 0.0, detects=0.999 * least, **rates)
    for estimate, se in ((math.nan, 1.0), (0.0, math.nan), (1.0, 0.0)):
        with pytest.raises(AssertionError):
            assert_estimate(estimate, se, 0.0, detects=100.0)


def test_proportions_are_judged_by_the_binomial_law(unstated):
    n, p = 1000, 0.3
    law = stats.binom(n, p)
    rejected = []
    for hits in range(n + 1):
        try:
            assert_proportion(hits, n, p, detects=0.2)
        except AssertionError:
            rejected.append(hits)
    assert 0 < sum(law.pmf(hits) for hits in rejected) <= FALSE_ALARM
    with pytest.raises(AssertionError, match="missed with probability"):
        assert_proportion(300, n, p, detects=0.1)
    assert_proportion(50, 50, (0.9, 1.0), detects=0.6)


def test_moments_are_those_of_normal_draws(unstated):
    x = 2 + 3 * spread(4000)
    assert_moments(x, 2.0, 9.0, detects=0.25)
    for wrong in (x + 0.6, 2 + 0.9 * (x - 2), 2 + 1.1 * (x - 2)):  # a shift of 0.2, scales off by a tenth
        with pytest.raises(AssertionError, match="beyond"):
            assert_moments(wrong, 2.0, 9.0, detects=0.25)


def test_p_values(unstated):
    assert_accepted([0.5, 1e-6])
    with pytest.raises(AssertionError, match="rejected at"):
        assert_accepted([0.5, 1e-7])
    assert_rejected([0.0, 1e-22])
    with pytest.raises(AssertionError, match="margin"):
        assert_rejected([0.0, 1e-12])
    assert_rejected(1e-12, misses=0.05)


@pytest.mark.monte_carlo
def test_false_alarms_and_misses_are_as_frequent_as_stated(monkeypatch: pytest.MonkeyPatch):
    """Two hundred tests of right and of wrong numbers, at rates that two hundred can tell."""
    rates = {"detects": 0.5, "false_alarm": 0.05, "misses": 0.1}
    n = math.ceil(((1.96 + 1.2816) / 0.5) ** 2)

    def rejected(shift: float) -> int:
        count = 0
        for x in shift + np.random.standard_normal((200, n)):
            try:
                assert_estimate(x.mean(), 1 / math.sqrt(n), 0.0, **rates)
            except AssertionError:
                count += 1
        return count

    with monkeypatch.context() as within:  # these are draws, and not statements
        within.setattr(monte_carlo, "state", lambda statistic, **rates: None)
        found = rejected(0.0), rejected(0.5)
    assert_proportion(found[0], 200, 0.05, detects=0.25)
    assert_proportion(200 - found[1], 200, (0.0, 0.1), detects=0.3)


HOME_MADE = re.compile(
    r"[<>=] *[3-6](\.\d+)? \* [^<>]*(\bse\b|\.se_|error|sqrt|std)|FALSE_ALARM \*|(pvalue|p_value) *[<>] *[0-9R]|abs=[3-6](\.\d+)? \* "
)


def test_no_test_judges_draws_by_its_own_means():
    """Comparisons with so many standard errors, or of a p-value, outside the module that states their rates."""
    found = []
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assert) and HOME_MADE.search(text := ast.unparse(node.test)):
                found.append(f"{path.name}:{node.lineno}: {text}")
    assert not found, "\n".join(found)


# ---------------------------------------------------------------------- wrong code is rejected


def one_dimension(steps: int, variance: str = "fixed_large") -> tuple[GaussianDiffusion, LinearModel]:
    betas = linear_betas(steps)
    ddpm = DDPM(betas)
    net = GaussianDenoiser("x0", betas)
    net.unused = nn.Parameter(torch.zeros((), dtype=F64))
    diffusion = GaussianDiffusion(net, TableSchedule(torch.tensor(betas)), (1,), "x0", variance=variance)
    return diffusion, LinearModel(ddpm, ddpm.variances(variance), ddpm.decoder_variance("vdm"))


def c2st(x: Tensor, y: Tensor) -> float:
    """Accuracy of a quadratic logistic regression that tells two samples apart, by five folds; 1/2 for equal laws."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model_selection = pytest.importorskip("sklearn.model_selection")
    both = torch.cat([x, y]).double()
    both = (both - both.mean(0)) / both.std(0)
    i, j = torch.triu_indices(both.shape[1], both.shape[1])
    features = torch.cat([both, both[:, i] * both[:, j]], 1).numpy()
    label = np.repeat([0, 1], [len(x), len(y)])
    folds = model_selection.StratifiedKFold(5, shuffle=True, random_state=0)
    return float(model_selection.cross_val_score(linear_model.LogisticRegression(), features, label, cv=folds).mean())


@pytest.mark.monte_carlo
@pytest.mark.reliability("Q12")
@pytest.mark.parametrize("variance", ["fixed_small", pytest.param("fixed_large", marks=pytest.mark.slow)])
def test_samples_have_the_moments_of_the_recursion(variance, figure):
    """A hundred thousand, of fifty steps; and samplers with the other variance, a scale of 0.8 and a shift of 0.2 are rejected."""
    n = 100_000
    diffusion, closed = one_dimension(50, variance)
    x = sample(diffusion, n, last="sample", batch_size=n)
    mu, V = closed.marginal()
    assert_moments(x, mu, V, detects=0.05)
    figure("Q12", "|z| of the mean", abs(float(x.mean()) - mu) / math.sqrt(V / n), at_most=4.89)
    figure("Q12", "|z| of the variance", abs(float(x.var()) / V - 1) / math.sqrt(2 / n), at_most=4.89)
    many, few = 50_000, 5_000  # by so few, the accuracy for a wrong shift is 0.54 ± 0.005
    exact = mu + math.sqrt(V) * torch.randn(many, 1, dtype=F64)
    figure("Q12", "C2ST accuracy less 0.5", abs(c2st(x[:few], exact[:few]) - 0.5), at_most=0.03)
    other, _ = one_dimension(50, "fixed_small" if variance == "fixed_large" else "fixed_large")
    wrong = {
        "the other variance": sample(other, n, last="sample", batch_size=n),
        "a scale of 0.8": mu + 0.8 * (x - mu),
        "a shift of 0.2": x + 0.2 * math.sqrt(V),
    }
    for name, draws in wrong.items():
        with pytest.raises(AssertionError, match="beyond"):
            assert_moments(draws, mu, V, detects=0.05)
        figure.count("Q12", "wrong samplers rejected", 1, at_least=6)
        if name != "the other variance":
            figure("Q12", "C2ST accuracy of a wrong scale or shift", c2st(draws[:many], exact), at_least=0.53)


@pytest.mark.monte_carlo
def test_standard_errors_of_the_ledger_cover():
    """The bound of one image within 1.96 of its own standard errors over noise, in 95 % of 300 ledgers; half of them do not do."""
    diffusion, closed = one_dimension(20)
    x0 = torch.full((300, 1), 0.6, dtype=F64)
    draws = elbo_terms(diffusion, x0, repeats=40).parts()["total"]
    error = draws.std(0) / math.sqrt(40)
    off = (draws.mean(0) - float(closed.nelbo(0.6))).abs() / error
    assert_proportion((off < stats.t.isf(0.025, 39)).sum(), 300, (0.93, 0.95), detects=0.22)
    with pytest.raises(AssertionError, match="not within"):
        assert_proportion((off < stats.t.isf(0.025, 39) / 2).sum(), 300, (0.93, 0.95), detects=0.22)


# ---------------------------------------------------------------------- trained networks


@pytest.mark.slow
@pytest.mark.reliability("Q11")
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_trained_networks_recover_known_data(kind: str, variance: str, figure):
    """The bound of what was learned, by quadrature, against that of the exact denoiser: none is better, for its variance."""
    steps, nodes = 20, 48
    schedule = TableSchedule(torch.tensor(linear_betas(steps)))
    if kind == "gaussian":
        net, (z, w) = GaussianDenoiser("v"), hermite(nodes)
        data, entropy = MEAN + math.sqrt(VAR) * z, 0.5 * math.log(2 * math.pi * math.e * VAR)
        many = MEAN + math.sqrt(VAR) * spread(4096)
    else:
        net, (data, w), entropy = (
            MixtureDenoiser(*test_closed_forms.MIXTURE, "v"),
            mixture_data(nodes),
            mixture_entropy(),
        )
        parts = [(round(4096 * w), m, v) for w, m, v in zip(*test_closed_forms.MIXTURE, strict=True)]
        many = np.concatenate([m + math.sqrt(v) * spread(n) for n, m, v in parts])
    x0 = torch.from_numpy(many).float()[:, None]
    x0 = x0[torch.randperm(len(x0))]

    def bound(diffusion: GaussianDiffusion) -> float:
        terms = exact_terms(diffusion, torch.from_numpy(data)[:, None], nodes)
        return sum(float(torch.from_numpy(w) @ term.reshape(len(data), -1).sum(1)) for term in terms)

    options = {"event_shape": (1,), "prediction": "v", "variance": variance}
    optimum = bound(GaussianDiffusion(net, schedule, **options))
    diffusion = GaussianDiffusion(nets.MLP(1, width=64, depth=2), schedule, **options)
    fit(diffusion, x0[256:], x0[:256], steps=3000, batch_size=1024, lr=3e-3, progress=False, device="cpu")
    found = bound(diffusion.double())
    figure("Q11", "nats above the optimum", found - optimum, at_most=0.02)
    figure("Q11", "nats above the optimum, least", found - optimum, at_least=-1e-6)  # of the quadrature
    figure("Q11", "optimum above the entropy", optimum - entropy, at_least=0.0)


# ---------------------------------------------------------------------- posteriors

SIMULATIONS, DRAWS, PARTICLES, EVENT, NOISE = 2000, 99, 400, (1, 2, 2), 0.5
OPERATORS = {
    "mask": lambda: mask(torch.tensor([[[True, False], [False, True]]])),
    "blur": lambda: blur(EVENT, torch.tensor([0.2, 0.6, 0.2], dtype=F64)),
    "downsample": lambda: downsample(EVENT, 2),
}
GAIN = {"mask": 2.0, "blur": 4.0, "downsample": 4.0}  # so much that what DPS leaves out matters
MIXTURE = ([0.4, 0.6], [-0.8, 0.7], [0.04, 0.09])


def prior(kind: str, steps: int = 12) -> GaussianDiffusion:
    betas = linear_betas(steps)
    net = GaussianDenoiser("x0", betas, mean=0.0, var=1.0) if kind == "gaussian" else MixtureDenoiser(*MIXTURE)
    net.unused = nn.Parameter(torch.zeros((), dtype=F64))
    return GaussianDiffusion(net, TableSchedule(torch.tensor(betas)), EVENT, "x0", variance="fixed_large")


def dense(name: str) -> Tensor:
    """What is observed, as a matrix."""
    operator: LinearOperator = OPERATORS[name]()
    size = operator.event_shape.numel()
    return GAIN[name] * operator(torch.eye(size, dtype=F64).view(size, *operator.event_shape)).flatten(1).T


def log_normal(a: Tensor, y: Tensor, x0: Tensor, variance: Tensor | float) -> Tensor:
    """Log N(y; A x_0, variance A A' + noise), a row of y for so many rows of x_0."""
    total = variance * a @ a.T + NOISE**2 * torch.eye(len(a), dtype=F64)
    rows = y.repeat_interleave(len(x0) // len(y), 0)
    return MultivariateNormal(x0.flatten(1) @ a.T, total).log_prob(rows)


P_BAR, Z_BAR = 1e-4, 4.5  # Q13's own, less strict than those of `monte_carlo`


def beyond(x: Tensor, y: Tensor, draws: Tensor, a: Tensor, score: dict[str, float]) -> float:
    """By how many deviations SBC rejects the draws ``[S, L, D]``, of its three bars the farthest; more is in ``score``."""

    def log_p(x: Tensor) -> Tensor:
        return log_normal(a, y, x.reshape(-1, x.shape[-1]), 0.0).view(x.shape[:-1])

    found = sbc({"x": x, "log p(y)": log_p(x)}, {"x": draws, "log p(y)": log_p(draws)})
    ranks, L = found.ranks.double(), draws.shape[1]
    S, Q = ranks.shape
    spread = ((L + 1) ** 2 - 1) / 12
    bins = torch.stack([(20 * ranks[:, q] // (L + 1)).long().bincount(minlength=20) for q in range(Q)])
    score["p"] = float(min(1.0, Q * stats.chisquare(bins.numpy(), axis=1).pvalue.min()))
    score["z of the mean"] = float(((ranks.mean(0) - L / 2).abs() / math.sqrt(spread / S)).max())
    # the fourth moment of a uniform law is 9/5 of the square of its second
    score["z of the variance"] = float(((((ranks - L / 2) ** 2).mean(0) / spread - 1).abs() / math.sqrt(0.8 / S)).max())
    inside = ((ranks >= 5) & (ranks < L + 1 - 5)).double().mean(0)
    score["coverage"] = float((inside - 0.9).abs().max())
    near = {"x": y @ torch.linalg.pinv(a).T + 0.5 * torch.randn_like(x)}
    score["TARP"] = float(tarp({"x": x}, {"x": draws}, near).deviation.max())
    by_bins = stats.norm.isf(score["p"] / 2) - stats.norm.isf(P_BAR / 2)
    return max(by_bins, score["z of the mean"] - Z_BAR, score["z of the variance"] - Z_BAR)


@pytest.mark.monte_carlo
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.reliability("Q13")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_posteriors_are_calibrated_and_wrong_ones_are_rejected(kind: str, operator: str, figure):
    """2000 simulations in one walk: a repeat for each, with its own y. The truth is drawn from the chain's own law."""
    diffusion, a = prior(kind), dense(operator)
    x = sample(diffusion, SIMULATIONS, last="sample", batch_size=10**6).flatten(1)
    y = x @ a.T + NOISE * torch.randn(SIMULATIONS, len(a), dtype=F64)
    scale = 1.0 if kind == "gaussian" else 0.75

    def twist(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        return log_normal(a, y, x0_hat, float(1 / (1 / scale**2 + log_snr.exp())))

    likelihood = partial(log_normal, a, y, variance=0.0)
    found = smc(diffusion, likelihood, PARTICLES, twist=twist, repeats=SIMULATIONS, batch_size=10**7)
    which = found.log_weights.softmax(1).multinomial(DRAWS, replacement=True)
    draws = found.particles.flatten(2).gather(1, which[..., None].expand(-1, -1, 4))
    score: dict[str, float] = {}
    assert beyond(x, y, draws, a, score) < 0, score
    quantities = 5  # four coordinates and log p(y)
    state(score["p"], false_alarm=P_BAR + 4 * quantities * stats.norm.sf(Z_BAR))
    figure("Q13", "chi-square p of SBC, times its quantities", score["p"], at_least=1e-4)
    figure("Q13", "|z| of the ranks' mean", score["z of the mean"], at_most=4.5)
    figure("Q13", "|z| of the ranks' variance", score["z of the variance"], at_most=4.5)
    figure("Q13", "coverage of 90 % intervals, off by", score["coverage"], at_most=0.03)
    figure("Q13", "TARP, off by", score["TARP"], at_most=0.05)
    figure.count("Q13", "posteriors calibrated (prior x operator)", 1, at_least=6)

    centre, sd = draws.mean(1, keepdim=True), draws.std(1, keepdim=True)

    def without_variance(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        return log_normal(a, y, x0_hat, 0.0)

    dps = guided(diffusion, likelihood, SIMULATIONS * DRAWS, twist=without_variance, batch_size=10**7)
    wrong = {
        "DPS without its variance": dps.particles.view(SIMULATIONS, DRAWS, 4),
        "a scale of 0.8": centre + 0.8 * (draws - centre),
        "a shift of 0.2": draws + 0.2 * sd,
    }
    for other in wrong.values():
        margin = beyond(x, y, other, a, score)
        state(margin, misses=stats.norm.sf(margin))
        figure("Q13", "probability to miss a wrong posterior, by its margin", stats.norm.sf(margin), at_most=0.01)
        figure.count("Q13", "wrong posteriors rejected", 1, at_least=18)


@pytest.mark.monte_carlo
@pytest.mark.slow
@pytest.mark.reliability("Q13")
@pytest.mark.parametrize("operator", OPERATORS)
def test_posteriors_of_one_observation(operator: str, figure):
    """Against the closed form: log p(y) within its standard error, draws that a classifier cannot tell from exact ones."""
    betas = linear_betas(12)
    diffusion, a = prior("gaussian"), dense(operator)
    ddpm = DDPM(betas)
    closed = LinearModel(ddpm, ddpm.variances("fixed_large"), ddpm.decoder_variance("vdm"), mean=0.0, var=1.0)
    y = (a @ torch.tensor([1.0, -0.5, 0.3, 0.8], dtype=F64))[None]
    log_z, mean, covariance = conditioned(closed, a, y[0], NOISE)

    def twist(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        return log_normal(a, y, x0_hat, float(1 / (1 + log_snr.exp())))

    n = 5000
    found = smc(diffusion, partial(log_normal, a, y, variance=0.0), 50, twist=twist, repeats=n, batch_size=10**7)
    assert_estimate(*found.evidence, log_z, detects=0.1)
    value, error = found.evidence
    figure("Q13", "log-evidence, standard errors off", abs(value - log_z) / error, at_most=4.89)
    which = found.log_weights.softmax(1).multinomial(1)
    draws = found.particles.flatten(2).gather(1, which[..., None].expand(-1, -1, 4))[:, 0]
    exact = MultivariateNormal(mean, covariance).sample((n,))
    figure("Q13", "C2ST accuracy", c2st(draws, exact), at_most=0.53)
    figure(
        "Q13", "C2ST accuracy of a shift of 0.2", c2st(draws + 0.2 * covariance.diagonal().sqrt(), exact), at_least=0.53
    )


# ---------------------------------------------------------------------- the suite


def pytest_run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *args]
    environment = {k: v for k, v in os.environ.items() if k != "PYRODIFF_TEST_SEED" and not k.startswith("PYTEST_")}
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)


FAST = [
    "test_elbo.py",
    "test_kernels.py",
    "test_null_class.py",
    "test_sample.py",
    "test_schedules.py",
    "test_timesteps.py",
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.reliability("Q22")
def test_any_order_of_tests(figure):
    """Ten orders of a few hundred tests of the core, each under the fixture that fails a test which changes global state."""
    failures, tests = 0, 0
    for order in range(1, 11):
        found = pytest_run("-m", "not slow", f"--randomly-seed={order}", *(str(TESTS / name) for name in FAST))
        passed = re.search(r"(\d+) passed", found.stdout)
        failures += found.returncode != 0
        tests += int(passed[1]) if passed else 0
        figure.count("Q22", "random orders", 1, at_least=10)
    figure("Q22", "orders with a failure", failures, at_most=0)
    figure("Q22", "tests in each order", tests / 10, at_least=200)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.reliability("Q23")
def test_other_seeds(figure):
    """The fast Monte Carlo tests fifty times with other seeds; one that costs more than five seconds, as often as that pays."""
    found = pytest_run("-m", "monte_carlo and not slow", "--seeds", "50", "--seconds", "5", str(TESTS))
    said = re.search(
        r"tests (\d+), of which (\d+) ran 50 times; passed (\d+), failed (\d+), with fixed draws (\d+); .*"
        r"false alarms expected (\S+)",
        found.stdout,
    )
    assert said, found.stdout[-3000:]
    print(*re.findall(r"the same draws .*|^FAILED .*", found.stdout, re.MULTILINE), sep="\n")
    tests, fifty, passed, failed, fixed = map(int, said.groups()[:5])
    figure("Q23", "failures with other seeds", failed, at_most=0)
    figure("Q23", "tests with the same draws at every seed", fixed, at_most=0)
    figure("Q23", "Monte Carlo tests, all of which state their rates", tests, at_least=150)
    figure("Q23", "of which ran 50 times", fifty, at_least=50)
    figure("Q23", "runs that passed", passed, at_least=3000)
    figure("Q23", "stated rates of false alarms, summed over all runs", float(said[6]), at_most=0.1)
