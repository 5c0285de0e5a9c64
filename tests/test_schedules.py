"""Noise schedules against mpmath, against guided-diffusion's tables, and at their limits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

from pyrodiff import (
    CosineSchedule,
    ForwardProcess,
    GaussianDiffusion,
    LinearSchedule,
    LogLinearSchedule,
    TableSchedule,
)
from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.schedules import RespacedSchedule, from_config

DATA = Path(__file__).parent / "data"
RESPACING = json.loads((DATA / "respacing.json").read_text())
CLASSES = {"linear": LinearSchedule, "cosine": CosineSchedule}
SCHEDULES = {
    "linear": LinearSchedule(100),
    "cosine": CosineSchedule(100),
    "loglinear": LogLinearSchedule(100, -10.0, 8.0),
    "table": TableSchedule([0.1, 0.02, 0.5, 0.3]),
    "respaced": LinearSchedule(100).respace("7,3"),
    "twice": LinearSchedule(100).respace("ddim50").respace([1, 3, 50]),
}


# ---------------------------------------------------------------------- reference figures


@pytest.mark.reliability("Q7")
@pytest.mark.parametrize("steps", [50, 100, 1000, 4000])
@pytest.mark.parametrize("name", CLASSES)
def test_betas_are_guided_diffusions(name, steps, figure):
    with np.load(DATA / "schedules.npz") as reference:
        betas = reference[f"{name}_{steps}"]
    schedule = CLASSES[name](steps)
    # its cosine betas are 1 - ratio, of two cos^2 whose angle is rounded: what mpmath says of both is below
    angle = np.minimum((np.arange(1, steps + 1) / steps + 0.008) / 1.008 * math.pi / 2, 1.57)
    slack = 2.0**-52 * (2 + 4 * angle * np.tan(angle)) if name == "cosine" else 0
    assert (np.abs(schedule.betas.numpy() - betas) <= 1e-12 * betas + slack).all()
    figure("Q7", "guided-diffusion's betas, float64", np.abs(schedule.betas.numpy() - betas).max(), at_most=1e-12)
    alpha_bar = np.cumprod(1 - betas)  # what it computes from them
    got = schedule.alpha(torch.arange(1, steps + 1)).numpy() ** 2
    np.testing.assert_allclose(got, alpha_bar, rtol=1e-11)
    # a perturbed formula is seen: the next step's beta, or one part in 10^9 of it
    for wrong in (np.roll(betas, 1), betas * (1 + 1e-9)):
        assert not (np.abs(schedule.betas.numpy() - wrong) <= 1e-12 * wrong + slack).all()


@pytest.mark.parametrize("case", RESPACING)
def test_respacing_is_guided_diffusions(case):
    steps, spec = case.split(":")
    expected = RESPACING[case]
    schedule = LogLinearSchedule(int(steps), -5.0, 5.0)
    if expected == "ValueError":
        with pytest.raises(OptionError):
            schedule.respace(spec)
        return
    got = schedule.respace(spec)
    assert got.kept == [index + 1 for index in expected]  # its indices count from 0
    assert got.steps == len(expected)


def test_the_respacing_figures_hold_both_outcomes():
    assert len(RESPACING) >= 10
    assert "ValueError" in RESPACING.values()


# ---------------------------------------------------------------------- fifty digits


def mp_betas(name, steps):
    """The schedule's definition, in mpmath."""
    if name == "linear":
        scale = mpmath.mpf(1000) / steps
        # the library's end points are the doubles nearest to 1e-4 and 0.02 times the scale
        first, last = mpmath.mpf(1) / 10000 * scale, mpmath.mpf(1) / 50 * scale
        return [first + (last - first) * i / (steps - 1) for i in range(steps)]
    f = [
        mpmath.cos((mpmath.mpf(i) / steps + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2
        for i in range(steps + 1)
    ]
    return [min(1 - f[i + 1] / f[i], mpmath.mpf("0.999")) for i in range(steps)]


def mp_alpha_bars(name, steps):
    """alpha-bar at t = 1..T."""
    if name == "loglinear":
        low, high = mpmath.mpf(-10), mpmath.mpf(8)
        snr = [high + (low - high) * (mpmath.mpf(i) / (steps - 1) if steps > 1 else 1) for i in range(steps)]
        return [1 / (1 + mpmath.exp(-z)) for z in snr]
    if name == "respaced":  # every third step
        return mp_alpha_bars("cosine", 3 * steps)[::3]
    found, product = [], mpmath.mpf(1)
    betas = mp_betas(name, steps) if name in CLASSES else [mpmath.mpf(b) for b in table(name, steps)]
    for beta in betas:
        product *= 1 - beta
        found.append(product)
    return found


def table(name, steps):
    """Betas between 1e-4 and 0.02, times 1000 / T: tables of doubles, exact as they are given."""
    share = np.linspace(0, 1, steps) if steps > 1 else np.ones(1)
    ends = np.minimum(np.array([1e-4, 0.02]) * 1000 / steps, [0.5, 0.9])
    if name == "quadratic":
        return (np.sqrt(ends[0]) + (np.sqrt(ends[1]) - np.sqrt(ends[0])) * share) ** 2
    return ends[0] + (ends[1] - ends[0]) / (1 + np.exp(6 - 12 * share))


MP_SCHEDULES = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "loglinear": lambda steps: LogLinearSchedule(steps, -10.0, 8.0),
    "quadratic": lambda steps: TableSchedule(table("quadratic", steps).tolist()),
    "sigmoid": lambda steps: TableSchedule(table("sigmoid", steps).tolist()),
    "respaced": lambda steps: CosineSchedule(3 * steps).respace(list(range(1, 3 * steps + 1, 3))),
}


def largest_relative_error(got, expected):
    return max(float(abs(mpmath.mpf(g) - e) / abs(e)) for g, e in zip(got, expected, strict=True))


@pytest.mark.reliability("Q1")
@pytest.mark.parametrize(
    "steps", [1, 2, 10, 100, 1000, *(pytest.param(n, marks=pytest.mark.slow) for n in (4000, 10_000))]
)
@pytest.mark.parametrize("name", MP_SCHEDULES)
def test_every_derived_quantity_against_mpmath(name, steps, figure):
    """In float64, and as the laws of q hold it in float32: rounded once."""
    figure.count("Q1", "schedules x T", 1, at_least=6 * 7)
    if name == "linear" and steps <= 20:
        with pytest.raises(OptionError):
            LinearSchedule(steps)
        return
    schedule = MP_SCHEDULES[name](steps)
    t = torch.arange(1, steps + 1)
    q = ForwardProcess(schedule, event_dim=0)
    one = torch.ones(steps)
    marginal, transition = q.marginal(one, t), q.transition(one, t - 1, t)
    with mpmath.workdps(50):
        alpha_bar = mp_alpha_bars(name, steps)
        before = [mpmath.mpf(1), *alpha_bar[:-1]]
        pairs = list(zip(before, alpha_bar, strict=True))
        beta = [1 - a / s for s, a in pairs]
        double = {
            "alpha^2": (schedule.alpha(t) ** 2, alpha_bar),
            "sigma^2": (schedule.sigma(t) ** 2, [1 - a for a in alpha_bar]),
            "snr": (schedule.log_snr(t).exp(), [a / (1 - a) for a in alpha_bar]),
            "beta": (schedule.betas, beta),
        }
        single = {
            "alpha": (marginal.mean, [mpmath.sqrt(a) for a in alpha_bar]),
            "sigma": (marginal.stddev, [mpmath.sqrt(1 - a) for a in alpha_bar]),
            "sqrt(1 - beta)": (transition.mean, [mpmath.sqrt(a / s) for s, a in pairs]),
            "sqrt(beta)": (transition.stddev, [mpmath.sqrt(b) for b in beta]),
        }
        if steps > 1:
            _, a, b, small, large = q.posterior_terms(one[1:], t[1:])
            posterior = q.posterior(one[1:], one[1:], t[1:])
            rows = list(zip(pairs[1:], beta[1:], strict=True))
            variance = [y * (1 - s) / (1 - z) for (s, z), y in rows]
            double |= {"beta-tilde": (small, variance), "beta again": (large, beta[1:])}
            single |= {
                "c1": (a, [y * mpmath.sqrt(s) / (1 - z) for (s, z), y in rows]),
                "c2": (b, [mpmath.sqrt(z / s) * (1 - s) / (1 - z) for (s, z), _ in rows]),
                "sqrt(beta-tilde)": (posterior.stddev, [mpmath.sqrt(v) for v in variance]),
            }
        for what, (got, reference) in double.items():
            assert got.dtype == torch.float64
            error = largest_relative_error(got.tolist(), reference)
            assert error <= 1e-11, f"{what}: {error:.1e}"
            figure("Q1", "relative error, float64", error, at_most=1e-11)
        for what, (got, reference) in single.items():
            assert got.dtype == torch.float32
            error = largest_relative_error(got.tolist(), reference)
            assert error <= 6e-8, f"{what}: {error:.1e}"
            figure("Q1", "relative error, float32", error, at_most=6e-8)
        # negative control: the same comparison, one step out
        if steps > 1:
            assert largest_relative_error(schedule.betas.roll(1).tolist(), beta) > 1e-6


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedules_identities(name):
    schedule = SCHEDULES[name]
    t = torch.arange(schedule.steps + 1)
    log_snr = schedule.log_snr(t)
    assert log_snr.dtype == schedule.alpha(t).dtype == schedule.sigma(t).dtype == torch.float64
    assert schedule.betas.dtype == torch.float64
    assert schedule.betas.shape == (schedule.steps,)
    assert log_snr[0] == math.inf
    assert schedule.alpha(0) == 1
    assert schedule.sigma(0) == 0
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(len(t)).double())
    torch.testing.assert_close(schedule.betas, 1 - (schedule.alpha(t)[1:] / schedule.alpha(t)[:-1]) ** 2)
    square = t[1:].reshape(1, -1, 1)  # any shape of t
    assert torch.equal(schedule.log_snr(square), log_snr[1:].reshape(1, -1, 1))
    assert schedule.log_snr(1).shape == ()


def test_log_linear_ends():
    schedule = LogLinearSchedule(5, -6.0, 4.0)
    assert schedule.log_snr(torch.arange(1, 6)).tolist() == [4.0, 1.5, -1.0, -3.5, -6.0]
    assert LogLinearSchedule(1, -6.0, 4.0).log_snr(1) == -6.0  # the one step is the noisiest


# ---------------------------------------------------------------------- respacing


@pytest.mark.parametrize("spec", ["ddim50", "10,10,10", "7", [1, 2, 500, 1000], [1000], "1000"])
@pytest.mark.parametrize("base", [LinearSchedule(1000), CosineSchedule(1000)], ids=CLASSES)
def test_a_respaced_chain_has_the_same_marginals(base, spec):
    schedule = base.respace(spec)
    kept = torch.tensor(schedule.kept)
    assert torch.equal(schedule.log_snr(torch.arange(1, schedule.steps + 1)), base.log_snr(kept))
    # as an independent chain of betas it comes back to alpha-bar of the original at the kept steps
    # (absolutely: 1 - beta has no more digits where beta is near 1)
    alpha_bar = np.cumprod(1 - base.betas.numpy())[kept.numpy() - 1]
    rebuilt = np.cumprod(1 - schedule.betas.numpy())
    np.testing.assert_allclose(rebuilt, alpha_bar, rtol=0, atol=2e-15)
    ratio = alpha_bar / np.append(1, alpha_bar[:-1])
    np.testing.assert_allclose(schedule.betas.numpy(), 1 - ratio, rtol=0, atol=1e-14)


def test_respacing_in_order_without_repeats_and_of_integers():
    schedule = LinearSchedule(100)
    assert schedule.respace([50, 3, 3, 100]).kept == [3, 50, 100]
    assert schedule.respace(10).kept == schedule.respace("10").kept
    assert schedule.respace("100").kept == list(range(1, 101))
    assert schedule.respace(torch.tensor([2, 4]).tolist()).kept == [2, 4]


BAD_SPECS = ["", "ddim", "ddim0", "ddim101", "ddim-5", "5,", ",5", "5;5", "5.0", " 5", "-5", "0", "101", "99,99"]


@pytest.mark.parametrize("spec", [*BAD_SPECS, 0, -1, 101, [], [0], [101], [-1, 5]], ids=repr)
def test_a_bad_respacing_raises(spec):
    with pytest.raises(OptionError):
        LinearSchedule(100).respace(spec)


# ---------------------------------------------------------------------- errors


MAKERS = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "loglinear": lambda steps: LogLinearSchedule(steps, -5.0, 5.0),
}


@pytest.mark.parametrize("steps", [0, -1, 2.0, 100.5, "100", None, True, math.nan], ids=repr)
@pytest.mark.parametrize("name", MAKERS)
def test_steps_must_be_a_positive_integer(name, steps):
    with pytest.raises(OptionError, match="steps"):
        MAKERS[name](steps)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_short_linear_schedule_raises(steps):
    with pytest.raises(OptionError, match="beta reaches 1"):
        LinearSchedule(steps)


def test_the_shortest_linear_schedule():
    assert 0.95 < LinearSchedule(21).betas.max() < 1


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf], ids=repr)
def test_betas_outside_0_1_raise_and_name_the_step(beta):
    with pytest.raises(OptionError, match=f"beta is {beta:.6g} at step 2 of 3"):
        TableSchedule([0.1, beta, 0.2])


@pytest.mark.parametrize("betas", [[1e-17], [1e-300, 0.1], [1 - 1e-16], [0.9] * 17, [0.999] * 6], ids=str)
def test_alpha_bar_that_rounds_to_0_or_1_raises(betas):
    with pytest.raises(OptionError, match="alpha-bar"):
        TableSchedule(betas)


def test_betas_too_small_to_change_alpha_bar_raise_and_name_the_first():
    with pytest.raises(OptionError, match="from step 1 to 2"):
        TableSchedule([0.5, 1e-20, 0.5, 1e-20])


@pytest.mark.parametrize("betas", [[], [[0.1]], 0.1], ids=str)
def test_a_table_of_another_shape_raises(betas):
    with pytest.raises(ShapeError):
        TableSchedule(betas)


@pytest.mark.parametrize(
    "ends", [(5.0, 5.0), (5.0, -5.0), (-math.inf, 5.0), (-5.0, math.nan), (-40.0, 5.0), (-5.0, 40.0)], ids=str
)
def test_log_linear_ends_that_are_refused(ends):
    with pytest.raises(OptionError):
        LogLinearSchedule(10, *ends)


@pytest.mark.parametrize(
    "t", [-1, 101, torch.tensor([1, 101]), torch.tensor([-1, 5]), 1.0, torch.tensor([1.5]), True], ids=str
)
@pytest.mark.parametrize("name", ["linear", "cosine", "loglinear", "respaced"])
def test_t_outside_0_T_or_no_integer_raises(name, t):
    for method in ("log_snr", "alpha", "sigma"):
        with pytest.raises(ShapeError):
            getattr(SCHEDULES[name], method)(t)


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("name", SCHEDULES)
def test_config_round_trip_through_json(name):
    schedule = SCHEDULES[name]
    again = from_config(json.loads(json.dumps(schedule.config)))
    assert type(again) is type(schedule)
    t = torch.arange(schedule.steps + 1)
    assert torch.equal(again.log_snr(t), schedule.log_snr(t))
    assert torch.equal(again.betas, schedule.betas)
    assert again.config == schedule.config


@pytest.mark.parametrize("name", ["Schedule", "os.system", None, "linear"])
def test_config_of_an_unknown_schedule_raises(name):
    with pytest.raises(OptionError, match="is not one of"):
        from_config({"schedule": name, "steps": 10})


def test_a_module_in_half_precision_keeps_its_schedule():
    diffusion = GaussianDiffusion(nn.Linear(2, 2), LinearSchedule(1000), (2,))
    t = torch.arange(1, 1001)
    before = diffusion.schedule.log_snr(t)
    # what a buffer would become, in this very dtype: the check below is not empty
    assert before.to(torch.bfloat16).unique().numel() < 1000
    diffusion.to(torch.bfloat16)
    assert diffusion.net.weight.dtype == torch.bfloat16
    after = diffusion.schedule.log_snr(t)
    assert torch.equal(after, before)
    assert after.unique().numel() == diffusion.schedule.sigma(t).unique().numel() == 1000


def test_a_table_is_a_copy():
    betas = torch.tensor([0.1, 0.2], dtype=torch.float64)
    schedule = TableSchedule(betas)
    betas.fill_(0.9)
    assert schedule.betas.tolist() == [0.1, 0.2]


def test_respacing_keeps_the_base():
    schedule = LinearSchedule(100).respace("ddim10")
    assert isinstance(schedule, RespacedSchedule)
    assert isinstance(schedule.base, LinearSchedule)
