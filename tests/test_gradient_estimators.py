"""The laboratory's gradient estimators.

Their means are sums over Gauss-Hermite nodes put in the place of the noise, exact where every integrand is a polynomial (a
linear denoiser's), and are compared with finite differences of closed forms.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from monte_carlo import assert_proportion
from oracles import DDPM, GaussianDenoiser, LinearModel, hermite
from torch import nn

from pyrodiff import CosineSchedule, GaussianDiffusion
from pyrodiff.distributions import Gaussian
from pyrodiff.errors import OptionError, ProgramError, ShapeError
from pyrodiff.laboratory import gradients
from pyrodiff.laboratory.gradients import Estimator, Question, compare_gradients, gradient, parameter_groups, questions
from pyrodiff.schedules import Schedule

F64 = torch.float64
DROPS = (0.8, 1.4, 0.5)
GAIN = 0.3
CONTROL = "score function, x_t masked"
# A row that has no bias exceeds this with probability 4 P(|t_63| > 5) = 2e-5 at 64 draws.
FLAGGED = 5.0


class LearnedSchedule(Schedule):
    """Log-SNR falls from 3 by the softplus of a parameter in each step."""

    def __init__(self, drops=DROPS):
        super().__init__()
        self.steps = len(drops)
        self.drops = nn.Parameter(torch.tensor(drops, dtype=F64))

    def log_snr(self, t):
        values = 3.0 - nn.functional.softplus(self.drops).cumsum(0)
        return torch.cat([values.new_tensor([math.inf]), values])[torch.as_tensor(t)]


def linear(drops=DROPS, event=(1,)):
    """A denoiser that is exact for N(0.3, 0.25) but for a gain, which is its one parameter."""
    net = GaussianDenoiser("x0")
    net.gain = nn.Parameter(torch.tensor(GAIN, dtype=F64))
    return GaussianDiffusion(net, LearnedSchedule(drops), event, prediction="x0", variance="fixed_large")


def oracle(gain, drops):
    ab = 1 / (1 + np.exp(-(3.0 - np.log1p(np.exp(drops)).cumsum())))
    ddpm = DDPM(1 - ab / np.concatenate([[1.0], ab[:-1]]))
    return LinearModel(ddpm, ddpm.variances("fixed_large"), ddpm.decoder_variance("vdm"), gain=gain)


def reward(x):
    return x.square().sum(1) + x.sum(1)


def closed_form(where, t, gain, drops, x0):
    """What a question's gradient is the gradient of."""
    model = oracle(gain, drops)
    if where == "reverse samples":
        mean, variance = model.marginal()
        return mean**2 + variance + mean
    cost = (
        model.nelbo(x0) if where == "chain" else model.reconstruction(x0) if t == 1 else model.diffusion(x0)[..., t - 2]
    )
    return cost.mean()


def differences(value, start, h=1e-5):
    """Central differences of a function of an array."""
    start = np.atleast_1d(np.asarray(start, dtype=np.float64))
    steps = h * np.eye(start.size).reshape(-1, *start.shape)
    return torch.tensor([(value(start + s) - value(start - s)) / (2 * h) for s in steps], dtype=F64)


def exact_gradient(where, t, group, drops, x0, value=closed_form):
    drops, x0 = np.asarray(drops), np.asarray(x0)
    return {
        "net": lambda: differences(lambda v: value(where, t, v[0], drops, x0), GAIN),
        "schedule": lambda: differences(lambda v: value(where, t, GAIN, v, x0), drops),
        "x0": lambda: differences(lambda v: value(where, t, GAIN, drops, v), x0),
    }[group]()


def ask(diffusion, x0, where, t=None, **options):
    """One question about it, its groups of parameters and its source of x_0."""
    groups, source = parameter_groups(diffusion, x0)
    asked = questions(diffusion, groups, len(source()), timesteps=[t or 1], **{"iwae": ()} | options)
    question = next(q for q in asked if q.where == where)
    return question, {name: groups[name] for name in question.groups}, source


def measured(question, groups, source, names, repeats=64):
    """Rows of the table for some of a question's estimators: (estimator, group) to row."""
    some = replace(question, estimators=[e for e in question.estimators if e.name in names])
    with pyro.get_param_store().scope():
        rows = gradients._measure(some, source, groups, torch.device("cpu"), repeats, None, 0, lambda: None)
    return {(row["estimator"], row["group"]): row for row in rows}


def moments(monkeypatch, estimator, source, groups, noises, n, skipped=0):
    """Mean, and mean square norm, of an estimator's draws over n nodes for each number of noise.

    ``noises``: a shape for each draw that matters; ``skipped`` draws before them, and all after, get no noise.
    """
    nodes, weights = hermite(n)
    sizes = [math.prod(shape) for shape in noises]
    queue = iter(())

    def rsample(self, sample_shape=()):
        noise = next(queue, None)
        return self.mean if noise is None else self.mean + self.stddev * noise

    monkeypatch.setattr(Gaussian, "rsample", rsample)
    store = pyro.get_param_store()
    with store.scope() as scope:
        # a baseline is an average of earlier draws: any constant, the same at all nodes
        for node in ([0.3] * sum(sizes), [-1.1] * sum(sizes)):
            queue = iter([None] * skipped + [torch.full(s, node[0], dtype=F64) for s in noises])
            gradient(estimator, source, groups)
    means = {name: 0.0 for name in groups}
    squares = {name: 0.0 for name in groups}
    for index in itertools.product(range(n), repeat=sum(sizes)):
        index = list(index)
        numbers = torch.tensor(nodes[index], dtype=F64).split(sizes)
        queue = iter([None] * skipped + [z.reshape(s) for z, s in zip(numbers, noises, strict=True)])
        with store.scope({k: dict(v) for k, v in scope.items()}):
            drawn = gradient(estimator, source, groups)
        weight = weights[index].prod()
        for name, g in drawn.items():
            means[name] = means[name] + weight * g
            squares[name] += weight * g.square().sum().item()
    monkeypatch.undo()
    return means, squares


# ---------------------------------------------------------------------- means, by quadrature


@pytest.mark.parametrize("t", [1, 2, 3])
def test_the_mean_gradient_of_one_timestep(monkeypatch, t):
    diffusion, x0 = linear(), torch.tensor([[0.9]], dtype=F64, requires_grad=True)
    question, groups, source = ask(diffusion, x0, "one timestep", t)
    expected = {group: exact_gradient("one timestep", t, group, DROPS, [0.9]) for group in groups}
    noises = [(1, 1)] if t == 1 else [(1, 1), (1, 1)]  # x_t and x_s, after x_T
    checked = []
    for estimator in question.estimators:
        if estimator.surrogate is None:
            continue
        means, _ = moments(monkeypatch, estimator, source, groups, noises, 4, skipped=1)
        for group, mean in means.items():
            if group in estimator.loses:
                assert estimator.name == CONTROL
                # what is lost is a good part of it
                assert (mean - expected[group]).norm() > 0.1 * expected[group].norm(), (estimator.name, group)
            else:
                torch.testing.assert_close(mean, expected[group], rtol=1e-7, atol=1e-8, msg=f"{estimator.name} {group}")
        checked.append(estimator.name)
    assert len(checked) == 7 and checked[0].startswith("pathwise")


def test_the_mean_gradient_of_the_chain(monkeypatch):
    diffusion, x0 = linear(), torch.tensor([[-0.6]], dtype=F64, requires_grad=True)
    question, groups, source = ask(diffusion, x0, "chain")
    expected = {group: exact_gradient("chain", None, group, DROPS, [-0.6]) for group in groups}
    for estimator in question.estimators:
        if estimator.surrogate is not None:
            means, _ = moments(monkeypatch, estimator, source, groups, [(1, 1)] * 3, 3)
            for group, mean in means.items():
                torch.testing.assert_close(mean, expected[group], rtol=1e-7, atol=1e-8, msg=f"{estimator.name} {group}")


def importance_bound(where, t, gain, drops, x0, n=24, k=2):
    """Minus the importance-weighted bound at T = 1, by quadrature over the K numbers of noise."""
    model = oracle(gain, drops)
    nodes, weights = hermite(n)
    alpha, sigma = math.sqrt(model.ddpm.ab[0]), math.sqrt(model.ddpm.om[0])
    x_1 = alpha * x0[0] + sigma * nodes
    log_w = (
        -0.5 * x_1**2
        - 0.5 * np.log(model.decoder_variance)
        - 0.5 * (x0[0] - model.A[0] * x_1 - model.B[0]) ** 2 / model.decoder_variance
        + 0.5 * nodes**2
        + math.log(sigma)
        - 0.5 * math.log(2 * math.pi)
    )
    bound = np.logaddexp(log_w[:, None], log_w) - math.log(k)
    return -(weights[:, None] * weights * bound).sum()


def test_importance_weighted_gradients_have_the_same_mean(monkeypatch):
    drops, x0 = (3.5,), torch.tensor([[0.7]], dtype=F64, requires_grad=True)
    question, groups, source = ask(linear(drops), x0, "chain, K=2", iwae=(2,))
    for estimator in question.estimators:
        means, _ = moments(monkeypatch, estimator, source, groups, [(2, 1)], 16)
        for group, mean in means.items():
            expected = exact_gradient("", None, group, drops, [0.7], importance_bound)
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5, msg=f"{estimator.name} {group}")


def test_the_mean_gradient_of_rewards(monkeypatch):
    drops = DROPS[:2]
    question, groups, source = ask(linear(drops), torch.zeros(1, 1, dtype=F64), "reverse samples", reward=reward)
    assert question.estimators[2].surrogate is None and "leaves no other" in question.estimators[2].reason
    for estimator in question.estimators[:2]:
        means, _ = moments(monkeypatch, estimator, source, groups, [(1, 1)] * 3, 3)
        for group, mean in means.items():
            expected = exact_gradient("reverse samples", None, group, drops, [0.0])
            torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-8, msg=f"{estimator.name} {group}")


def test_a_leave_one_out_baseline_has_no_bias(monkeypatch):
    drops = DROPS[:1]
    question, groups, source = ask(linear(drops), torch.zeros(2, 1, dtype=F64), "reverse samples", reward=reward)
    estimator = question.estimators[2]
    assert "leave-one-out" in estimator.name
    means, _ = moments(monkeypatch, estimator, source, groups, [(2, 1)] * 2, 3)
    for group, mean in means.items():
        expected = exact_gradient("reverse samples", None, group, drops, [0.0])
        torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-8)


# ---------------------------------------------------------------------- variances


def test_a_learned_schedule_is_where_pathwise_is_better(monkeypatch):
    """Exact variances: the square of a gradient is a polynomial too."""
    diffusion = linear()
    question, groups, source = ask(diffusion, torch.tensor([[0.9]], dtype=F64), "one timestep", 2)
    variance = {}
    for estimator in question.estimators:
        if estimator.name in ("pathwise, Monte Carlo KL", "pathwise, analytic KL", "score function"):
            means, squares = moments(monkeypatch, estimator, source, groups, [(1, 1)] * 2, 5, skipped=1)
            variance[estimator.name] = {g: squares[g] - means[g].square().sum().item() for g in groups}
    pathwise, analytic, score = (v["schedule"] for v in variance.values())
    assert analytic < pathwise < score / 5
    # the network's gradients are the same draws, and so is their variance
    assert variance["score function"]["net"] == variance["pathwise, Monte Carlo KL"]["net"]


def test_moments_of_vectors_that_come_one_by_one():
    vectors, moments = 1e6 + torch.randn(20, 5, dtype=F64), gradients._Moments()
    for vector in vectors:
        moments.add(vector)
    torch.testing.assert_close(moments.mean, vectors.mean(0))
    assert moments.variance == pytest.approx(vectors.var(0).sum().item())
    assert moments.largest == vectors.abs().max()


@pytest.mark.parametrize("where", ["one timestep", "chain", "reverse samples"])
def test_baselines_reduce_the_variance_of_a_score(where):
    x0 = torch.full((4, 16), 2.0, dtype=F64)  # far from the data: costs are large beside their spread
    question, groups, source = ask(linear(DROPS[:2], (16,)), x0, where, 2, reward=lambda x: 10 + x.mean(1))
    plain = "score function" if where == "reverse samples" else "score function, TraceGraph"
    better = plain + (", leave-one-out baseline" if where == "reverse samples" else ", baselines")
    rows = measured(question, groups, source, [plain, better], 40)
    assert rows[better, "schedule"]["variance"] < rows[plain, "schedule"]["variance"] / 2


class Blind(nn.Module):
    """x_0 = w x_1, whatever the log-SNR."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=F64))

    def forward(self, x, log_snr):
        return self.w * x


def test_sticking_the_landing_lands():
    """Data N(0, 1) and T = 1: the model's posterior can be q itself, with a schedule that p knows nothing of."""
    schedule = LearnedSchedule((3.5,))
    alpha, sigma = (z(1).item() for z in (schedule.alpha, schedule.sigma))
    diffusion = GaussianDiffusion(Blind(alpha), schedule, (1,), prediction="x0", decoder="learned").double()
    with torch.no_grad():
        diffusion.reverse_kernel.log_scale.fill_(math.log(sigma))
    x0 = torch.tensor([[0.5], [-1.2]], dtype=F64, requires_grad=True)
    table = compare_gradients(diffusion, x0, timesteps=[], repeats=8, iwae=(3,)).set_index(
        ["where", "group", "estimator"]
    )
    variance = table.variance
    small = 1e-25
    assert variance["chain", "schedule", "sticking the landing"] < small
    assert variance["chain, K=3", "schedule", "doubly reparameterised"] < small
    assert variance["chain", "schedule", "pathwise, Monte Carlo KL"] > 1e-3
    assert variance["chain", "schedule", "pathwise, analytic KL"] > 1e-3
    # x_0 is p's too: the explicit parts of q and p cancel, unless one of them is left out
    assert variance["chain", "x0", "pathwise, Monte Carlo KL"] < small
    assert variance["chain", "x0", "sticking the landing"] > 1e-3
    # negative control: another decoder, another posterior
    with torch.no_grad():
        diffusion.reverse_kernel.log_scale.add_(0.2)
    table = compare_gradients(diffusion, x0, timesteps=[], repeats=8, iwae=(3,)).set_index(
        ["where", "group", "estimator"]
    )
    assert table.variance["chain", "schedule", "sticking the landing"] > 1e-3


# ---------------------------------------------------------------------- a fixed schedule


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, log_snr):
        return torch.tanh(torch.cat([x, log_snr[:, None] / 5], 1) @ self.weight.T)


def test_with_a_fixed_schedule_the_network_needs_no_reparameterisation():
    diffusion = GaussianDiffusion(Small(), CosineSchedule(4), (2,), variance="fixed_large", decoder="learned").double()
    x0 = torch.randn(5, 2, dtype=F64)
    table = compare_gradients(diffusion, x0, repeats=3, timesteps=[1, 3])
    assert set(table.group) == {"net"}  # the guide has no parameters
    bound = table[table["where"].isin(("one timestep", "chain")) & (table.reason == "")]
    assert len(bound) == 2 * 7 + 6
    same = bound[bound.estimator != "pathwise, analytic KL"]
    assert (same.same_noise == 0.0).all() and (same.norm > 0).all()
    # an analytic KL is another function of the noise
    assert (bound[(bound.estimator == "pathwise, analytic KL") & (bound.t != 1)].same_noise > 1e-3).all()
    weighted = table[table["where"] == "chain, K=4"]
    assert len(weighted) == 2 and (weighted.same_noise <= 1e-12).all()


# ---------------------------------------------------------------------- the bias column


EVERYTHING = {"timesteps": [1, 2], "chain": True, "reward": reward, "iwae": (2,)}


@pytest.mark.parametrize(
    ("known", "options"),
    [
        pytest.param(True, {"timesteps": [2]}, id="exact"),
        pytest.param(False, {"timesteps": [1]}, id="reference"),
        pytest.param(True, EVERYTHING, id="exact, everything", marks=pytest.mark.slow),
    ],
)
def test_the_bias_column_finds_the_biased_estimator(known, options):
    x0 = torch.linspace(-1.0, 1.5, 64, dtype=F64)[:, None].requires_grad_()

    def exact(where, t, group):
        return None if "K" in where else exact_gradient(where, t, group, DROPS, x0.detach()[:, 0].numpy())

    table = compare_gradients(linear(), x0, **{"chain": False, "iwae": (), "exact": exact if known else None} | options)
    table = table[table.reason == ""]
    biased, honest = table[~table.unbiased], table[table.unbiased]
    assert set(biased.estimator) == {CONTROL} and set(biased.group) == {"schedule", "x0"}
    assert (biased.z > FLAGGED).all() and (biased.bias > 0.2 * biased.norm).all()
    assert not (honest.z > FLAGGED).any()
    if known:
        table = table[~table["where"].str.contains("K")]
        assert (table.against == "exact").all() and (table.z > 0.1).all()  # a statistic, not a constant
    else:
        references = honest.groupby(["where", "t", "group"], dropna=False).head(1)
        assert references.z.isna().all() and (references.against == "").all()
        assert honest.drop(references.index).z.notna().all()


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(6, dtype=F64))


@pytest.mark.monte_carlo
def test_the_false_alarm_rate_is_as_stated():
    """A hundred unbiased estimators whose draws are normal, and one with a bias."""
    theta, R = Shift().theta, 32

    def noisy(shift):
        def surrogate(x0):
            return (theta * (torch.randn(6, dtype=F64) + shift)).sum()

        return Estimator("noisy", surrogate)

    def z(shift, seed):
        question = Question("chain", None, ("net",), [noisy(shift)])
        (row,) = gradients._measure(
            question, lambda: torch.zeros(1), {"net": [theta]}, torch.device("cpu"), R,
            lambda where, t, group: torch.zeros(6), seed, lambda: None,
        )  # fmt: skip
        return row["z"]

    # 4 P(|t_31| > 3) = 0.021
    seeds = torch.randint(2**31, (100,)).tolist()
    assert_proportion(sum(z(0.0, seed) > 3 for seed in seeds), 100, (0.0, 0.0211), detects=0.35)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.0, 1.0, 0.5], dtype=F64)
    assert_proportion(sum(z(shift, seed) > FLAGGED for seed in seeds[:50]), 50, (0.9, 1.0), detects=0.6)


# ---------------------------------------------------------------------- what it says, and what it leaves alone


def test_where_an_estimator_does_not_apply_it_says_why():
    diffusion = GaussianDiffusion(Small(), CosineSchedule(80), (2,))
    table = compare_gradients(diffusion, torch.randn(1, 2, dtype=F64), timesteps=[80], repeats=2)
    numbers = ["norm", "variance", "bias", "z", "same_noise", "evaluations", "seconds", "efficiency"]
    without = table[table.reason != ""]
    assert without[numbers].isna().all(axis=None)
    assert table[table.reason == ""][["norm", "variance", "same_noise", "seconds"]].notna().all(axis=None)
    reasons = without.set_index(["where", "estimator"]).reason
    assert "nothing to stick to" in reasons["one timestep", "sticking the landing, analytic KL"]
    assert "no importance weight" in reasons["one timestep", "doubly reparameterised"]
    assert "T=80" in reasons["chain", "pathwise, Monte Carlo KL"] and "T=80" in reasons["chain, K=4", "pathwise"]
    assert reasons["reverse samples", "pathwise"] == "no reward was given"
    short = GaussianDiffusion(Small(), CosineSchedule(2), (2,), bins=(3, -1.0, 1.0))
    table = compare_gradients(short, torch.zeros(2, 2, dtype=F64), timesteps=[], iwae=(), repeats=2, reward=reward)
    reasons = table.set_index(["where", "estimator"]).reason
    assert "no derivative" in reasons["reverse samples", "pathwise"]
    assert reasons["reverse samples", "score function"] == ""
    discrete = table.set_index(["where", "estimator"]).against
    assert discrete["reverse samples", "score function, leave-one-out baseline"] == "score function"
    question, _, _ = ask(short, torch.zeros(2, 2, dtype=F64), "chain")
    with pytest.raises(OptionError, match="does not apply: nothing to stick to"):
        gradient(question.estimators[-1], lambda: None, {})


def test_tracegraph_keeps_the_gradient_of_a_discretised_decoder():
    """Pyro marks tensors by a subclass that loses it, without a word, in an autograd.Function left to itself."""
    diffusion = GaussianDiffusion(Small(), CosineSchedule(2), (2,), bins=(3, -1.0, 1.0))
    x0 = torch.zeros(2, 2, dtype=F64)
    question, groups, source = ask(diffusion, x0, "one timestep", 1)
    torch.manual_seed(0)
    reference = gradient(question.estimators[0], source, groups)["net"]
    assert reference.norm() > 0
    for estimator in question.estimators:
        if estimator.name == "score function, TraceGraph":
            torch.manual_seed(0)
            with pyro.get_param_store().scope():
                torch.testing.assert_close(gradient(estimator, source, groups)["net"], reference)
            break
    else:
        pytest.fail("no TraceGraph estimator")


class Encoder(nn.Module):
    """Two examples, scaled by a parameter and jittered."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7, -0.4], dtype=F64))

    def forward(self):
        return self.scale[:, None] * (2 + torch.randn(2, 1, dtype=F64))


def test_an_encoders_gradient_is_that_of_x0_by_the_chain_rule():
    encoder, diffusion = Encoder(), linear()
    table = compare_gradients(diffusion, encoder, repeats=2, timesteps=[2], iwae=(2,))
    assert list(table.group.unique()) == ["net", "schedule", "encoder"]
    with torch.no_grad():
        jitter = encoder() / encoder.scale[:, None]
    fixed = nn.Module()
    fixed.scale = encoder.scale
    fixed.forward = lambda: encoder.scale[:, None] * jitter
    for where in ("one timestep", "chain", "chain, K=2"):
        question, groups, source = ask(diffusion, fixed, where, 2, iwae=(2,))
        _, of_x0, leaf = ask(diffusion, fixed.forward().detach().requires_grad_(), where, 2, iwae=(2,))
        for estimator in question.estimators:
            if estimator.surrogate is None:
                continue
            found = []
            for args in ((source, groups), (leaf, of_x0)):
                torch.manual_seed(3)
                with pyro.get_param_store().scope():
                    found.append(gradient(estimator, *args))
            torch.testing.assert_close(found[0]["encoder"], found[1]["x0"] * jitter[:, 0])
            torch.testing.assert_close(found[0]["schedule"], found[1]["schedule"])
            assert found[0]["encoder"].abs().min() > 0, estimator.name


def test_the_question_is_the_bound_whatever_the_training():
    """An objective or a data_size of the diffusion is no part of it; nor is the order of timesteps or a name."""
    x0, tables = torch.randn(3, 2, dtype=F64), []
    for options in ({}, {"objective": "simple", "data_size": 50, "name": "image"}):
        diffusion = GaussianDiffusion(Small(), CosineSchedule(3), (2,), variance="fixed_large", **options)
        tables.append(compare_gradients(diffusion, x0, repeats=2, timesteps=[2], iwae=(2,), reward=reward))
    for column in ("norm", "variance", "same_noise"):
        np.testing.assert_array_equal(*(table[column].to_numpy() for table in tables))


class Labelled(Small):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, dtype=F64))

    def forward(self, x, log_snr, y):
        return super().forward(x, log_snr) + self.shift[y][:, None]


def test_conditioning_goes_with_its_row():
    diffusion = GaussianDiffusion(Labelled(), CosineSchedule(2), (2,))
    x0, y = torch.randn(2, 2, dtype=F64), torch.tensor([0, 2])
    question, groups, source = ask(diffusion, x0, "chain, K=3", iwae=(3,), y=y)
    for estimator in question.estimators:
        shift = gradient(estimator, source, groups)["net"][-3:]
        assert shift[0] != 0 and shift[2] != 0 and shift[1] == 0
    table = compare_gradients(diffusion, x0, repeats=2, timesteps=[2], iwae=(), reward=reward, y=y)
    assert (table[table.reason == ""].norm > 0).all()


def test_nothing_is_left_behind():
    diffusion, encoder = linear(DROPS[:2]), Encoder()
    diffusion.train()
    parameters = [*diffusion.parameters(), *encoder.parameters()]
    for p in parameters:
        p.grad = torch.ones_like(p)
    pyro.param("mine", torch.tensor(2.0))
    before = {name: p.detach().clone() for name, p in diffusion.named_parameters()}
    state = torch.get_rng_state()
    options = {"repeats": 2, "timesteps": [2], "iwae": (), "reward": reward}
    first = compare_gradients(diffusion, encoder, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert diffusion.training and diffusion.net.training
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in parameters)
    assert dict(pyro.get_param_store()).keys() == {"mine"}
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in diffusion.named_parameters())
    # the numbers are the seed's
    again = compare_gradients(diffusion, encoder, **options)
    other = compare_gradients(diffusion, encoder, seed=1, **options)
    drop = ["seconds"]
    assert first.drop(columns=drop).equals(again.drop(columns=drop))
    assert not first.drop(columns=drop).equals(other.drop(columns=drop))


def test_efficiency_and_evaluations():
    table = compare_gradients(
        linear(), torch.zeros(2, 1, dtype=F64), repeats=3, timesteps=[2], iwae=(4,), reward=reward
    )
    table = table[table.reason == ""]
    np.testing.assert_allclose(table.efficiency, 1 / (table.variance * table.evaluations))
    evaluations = table.drop_duplicates(["where", "estimator"]).set_index(["where", "estimator"]).evaluations
    assert set(evaluations["one timestep"]) == {1} and set(evaluations["chain"]) == {3}
    assert evaluations["chain, K=4"].to_list() == [12, 24] and set(evaluations["reverse samples"]) == {3}


def test_evaluations_are_those_of_the_network():
    counted = []
    diffusion = linear()
    diffusion.net.register_forward_hook(lambda module, inputs, output: counted.append(len(output)))
    groups, source = parameter_groups(diffusion, torch.zeros(2, 1, dtype=F64))
    for question in questions(diffusion, groups, 2, iwae=(3,), reward=reward):
        for estimator in question.estimators:
            if estimator.surrogate is not None:
                counted.clear()
                gradient(estimator, source, {name: groups[name] for name in question.groups})
                assert sum(counted) == 2 * estimator.evaluations, (question.where, estimator.name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 1}, "repeats=1"),
        ({"iwae": (0,)}, r"iwae=\(0,\)"),
        ({"timesteps": [4]}, r"timesteps=\[4\] in 1..3"),
    ],
)
def test_misuse(options, message):
    with pytest.raises((OptionError, ShapeError), match=message):
        compare_gradients(linear(), torch.zeros(2, 1, dtype=F64), **{"repeats": 2, "timesteps": [1]} | options)


def test_a_reward_is_one_number_per_example():
    question, groups, source = ask(linear(), torch.zeros(2, 1, dtype=F64), "reverse samples", reward=lambda x: x)
    with pytest.raises(ShapeError, match=r"reward returns shape \[2, 1\], not one number per example \[2\]"):
        gradient(question.estimators[0], source, groups)


def test_nothing_to_differentiate():
    diffusion = GaussianDiffusion(GaussianDenoiser(), CosineSchedule(3), (1,), prediction="x0")
    with pytest.raises(OptionError, match="nothing to differentiate"):
        compare_gradients(diffusion, torch.zeros(2, 1))
    discrete = GaussianDiffusion(Small(), CosineSchedule(3), (2,), bins=(3, -1.0, 1.0))
    with pytest.raises(OptionError, match="no derivative along x0"):
        compare_gradients(discrete, torch.zeros(2, 2, dtype=F64, requires_grad=True))
    with pytest.raises(ShapeError, match="x0 has shape"):
        compare_gradients(linear(), torch.zeros(1, dtype=F64))


def test_gradients_are_had_under_no_grad_and_refused_in_inference_mode():
    diffusion, x0 = linear(), torch.zeros(2, 1, dtype=F64)
    with torch.no_grad():
        table = compare_gradients(diffusion, x0, repeats=2, timesteps=[2], iwae=(), chain=False)
    assert (table.norm.dropna() > 0).all()
    with torch.inference_mode(), pytest.raises(ProgramError, match="inference_mode"):
        compare_gradients(diffusion, x0, repeats=2, timesteps=[2], iwae=(), chain=False)
