"""Calibration: the law of the ranks by enumeration, and posteriors in closed form, right and wrong."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from monte_carlo import any_seed, assert_accepted, assert_mean, assert_proportion, assert_rejected
from oracles import GaussianDenoiser, linear_betas
from scipy import stats
from torch import Tensor, nn

from pyrodiff import GaussianDiffusion, TableSchedule, plots, sample
from pyrodiff.errors import DataError, OptionError, ShapeError
from pyrodiff.inference.calibration import Calibration, band, sbc, tarp, uniformity
from pyrodiff.inference.guidance import guided, pigdm
from pyrodiff.inference.operators import LinearGaussian, matrix
from pyrodiff.inference.smc import smc

F64 = torch.float64
NEVER = 1e-8
RARE = {"false_alarm": 1e-5}  # p-values are exact, to 1e-13
SEEN = RARE | {"misses": 1e-2}  # as rare as this precision can tell
S, L = 600, 31


# ---------------------------------------------------------------------- the law of the ranks


def every_outcome(simulations: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """All vectors of ranks, ``[(L + 1)^S, S]``, equally likely; and the least two-sided tail of each, by scipy."""
    ranks = np.array(list(itertools.product(range(draws + 1), repeat=simulations)))
    counts = (ranks[:, :, None] < np.arange(1, draws + 1)).sum(1)
    law = stats.binom(simulations, np.arange(1, draws + 1) / (draws + 1))
    return ranks, 2 * np.minimum(law.cdf(counts), law.sf(counts - 1)).min(1)


@pytest.mark.parametrize(("simulations", "draws"), [(5, 3), (3, 6), (8, 1), (1, 4)])
def test_p_values_are_exact(simulations: int, draws: int):
    ranks, least = every_outcome(simulations, draws)
    found = uniformity(torch.tensor(ranks).mT, draws).numpy()
    exact = np.array([(least <= value * (1 + 1e-9)).mean() for value in least])
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-12)
    for p in np.unique(exact):  # at most a with probability at most a, and equal where a is attained
        assert (found <= p + 1e-12).mean() == pytest.approx(p, abs=1e-12)


def test_the_band_is_left_where_the_p_value_is_small():
    """At every p-value that is attained, and just below it."""
    ranks, _ = every_outcome(6, 3)
    p = uniformity(torch.tensor(ranks).mT, 3)
    coverage = Calibration("SBC", tuple("q" * len(ranks)), torch.tensor(ranks).mT, 3, p).coverage
    for attained in p[p < 1 - 1e-9].unique().tolist():
        for alpha in (attained - 1e-9, attained + 1e-9):
            low, high = band(6, 3, alpha)
            left = ((coverage < low - 1e-12) | (coverage > high + 1e-12)).any(1)
            assert torch.equal(left, p <= alpha) and left.double().mean() <= alpha


def test_many_simulations():
    """As many as would overflow a matrix of counts, or a factorial: uniform ranks, and ranks one in a hundred of which is 0."""
    even = torch.arange(10000).remainder(101)[:, None]
    off = even.where(torch.arange(10000)[:, None] % 100 > 0, 0)
    p = uniformity(torch.cat([even, off], 1), 100)
    assert p[0] > 1 - 1e-9 and p[1] < NEVER


# ---------------------------------------------------------------------- posteriors in closed form

A = torch.tensor([[1.0, 0.8], [0.0, 0.7]], dtype=F64)
NOISE = 0.5


def posterior(y: Tensor, draws: int, width: float = 1.0, shift: float = 0.0) -> Tensor:
    """Draws of p(x | y) for x ~ N(0, I) and y = A x + noise, ``[S, L, 2]``; or wrong ones, by a share of its deviation."""
    covariance = torch.linalg.inv(torch.eye(2, dtype=F64) + A.T @ A / NOISE**2)
    root = torch.linalg.cholesky(covariance)
    mean = y @ (covariance @ A.T / NOISE**2).T + shift * covariance.diagonal().sqrt()
    return mean[:, None] + width * torch.randn(len(y), draws, 2, dtype=F64) @ root.T


def log_likelihood(x: Tensor, y: Tensor) -> Tensor:
    return -(y - x @ A.T).square().sum(-1) / (2 * NOISE**2)


def simulated(simulations: int = S) -> tuple[Tensor, Tensor]:
    x = torch.randn(simulations, 2, dtype=F64)
    return x, x @ A.T + NOISE * torch.randn(simulations, 2, dtype=F64)


def both(x: Tensor, y: Tensor, draws: Tensor) -> tuple[dict[str, float], float]:
    """P-values of SBC by quantity, and of TARP with references that depend on y."""
    told = {"x": x, "log p(y)": log_likelihood(x, y)}, {"x": draws, "log p(y)": log_likelihood(draws, y[:, None])}
    found = sbc(*told)
    near = {"x": y @ torch.linalg.inv(A).T + 0.5 * torch.randn_like(x)}
    return dict(zip(found.names, found.p_values.tolist(), strict=True)), tarp({"x": x}, {"x": draws}, near).p_value


@pytest.mark.monte_carlo
def test_the_exact_posterior_passes_and_the_prior_does_not():
    x, y = simulated()
    p, accuracy = both(x, y, posterior(y, L))
    assert [*p] == ["x[0]", "x[1]", "log p(y)"]
    assert_accepted([*p.values(), accuracy], **RARE)
    p, accuracy = both(x, y, torch.randn(S, L, 2, dtype=F64))
    assert_rejected([p["log p(y)"], accuracy], **SEEN)


@pytest.mark.monte_carlo
def test_false_alarms_are_as_frequent_as_told():
    """200 calibrations of 40 simulations: the number of p-values up to 0.1 is binomial, but for the jumps of a discrete law."""
    x, y = simulated(40 * 200)
    draws = posterior(y, 15)
    ours, distance = [], []
    for rows in torch.arange(len(x)).split(40):
        ours.append(sbc({"x": x[rows, 0]}, {"x": draws[rows, :, 0]}).p_value)
        points = {"x": y[rows] + torch.randn(40, 2, dtype=F64)}
        distance.append(tarp({"x": x[rows]}, {"x": draws[rows]}, points).p_value)
    for p in (np.array(ours), np.array(distance)):
        assert_proportion((p <= 0.1).sum(), 200, (0.07, 0.1), detects=0.3)


@pytest.mark.monte_carlo
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        ({"width": 0.8}, {"x[0]", "x[1]", "log p(y)"}),
        ({"width": 1.25}, {"x[0]", "x[1]", "log p(y)"}),
        ({"shift": 0.5}, {"x[0]", "x[1]"}),
    ],
)
def test_wrong_posteriors_are_seen(error: dict[str, float], seen: set[str]):
    x, y = simulated(6000)
    p, accuracy = both(x, y, posterior(y, L, **error))
    assert_rejected([*(p[name] for name in seen), accuracy], **SEEN)


@pytest.mark.monte_carlo
def test_the_prior_is_seen_by_functions_of_y_alone():
    x, y = simulated()
    prior = torch.randn(S, L, 2, dtype=F64)
    p, accuracy = both(x, y, prior)
    assert_rejected([p["log p(y)"], accuracy], **SEEN)
    assert_accepted([p["x[0]"], p["x[1]"]], **RARE)
    blind = tarp({"x": x}, {"x": prior}, {"x": torch.randn(S, 2, dtype=F64)})  # references that know nothing of y
    assert_accepted(blind.p_value, **RARE)


@pytest.mark.monte_carlo
def test_an_error_of_the_correlation_alone():
    """Each coordinate has the right law; the log-likelihood sees that the two do not go together."""
    x, y = simulated(6000)
    draws = torch.stack([posterior(y, L)[..., 0], posterior(y, L)[..., 1]], 2)
    p, _ = both(x, y, draws)
    assert_accepted([p["x[0]"], p["x[1]"]], **RARE)
    assert_rejected(p["log p(y)"], **SEEN)


# ---------------------------------------------------------------------- draws that are equal, or depend on each other


@pytest.mark.monte_carlo
def test_equal_values_are_put_in_random_order():
    """x is 0, 1 or 2 and y is x or noise; draws of the exact posterior are equal to the truth more often than not."""
    x = torch.randint(3, (4000,))
    y = torch.where(torch.rand(4000) < 0.5, x, torch.randint(3, (4000,)))
    law = 0.5 * nn.functional.one_hot(y, 3) + 0.5 / 3
    draws = law.multinomial(9, replacement=True)
    assert_accepted(sbc({"x": x}, {"x": draws}).p_value, **RARE)
    assert_rejected(sbc({"x": x}, {"x": draws.flip(0)}).p_value, **SEEN)
    # the order is the seed's of sbc
    ranks = sbc({"x": torch.zeros(4000)}, {"x": torch.zeros(4000, 9)}, seed=any_seed()).ranks
    assert_proportion(ranks[:, 0].bincount(minlength=10), 4000, 0.1, detects=0.06)


@pytest.mark.monte_carlo
def test_ranks_among_few_particles_spread():
    """L draws, by weight, of M equal particles: the variance of the rank in closed form, and a false alarm where M is few."""
    x, y = simulated(4000)
    for particles in (10, 1000):
        held = posterior(y, particles)[..., 0]
        draws = held.gather(1, torch.randint(particles, (4000, L)))
        found = sbc({"x": x[:, 0]}, {"x": draws})
        ranks = found.ranks[:, 0].double()
        among = L**2 * (particles + 2) / (12 * particles) + L * (particles - 1) / (6 * particles)
        assert_mean((ranks - L / 2) ** 2, among, detects=0.2 * among)
        share = 12 * among / (L * (L + 2)) - 1
        assert share == pytest.approx(2 / particles, rel=0.1)
        if particles == 10:
            assert_rejected(found.p_value, **SEEN)
        else:
            assert_accepted(found.p_value, **RARE)


# ---------------------------------------------------------------------- samplers of a diffusion


@pytest.mark.monte_carlo
@pytest.mark.slow
def test_weighted_particles_are_calibrated_and_guidance_is_not():
    """y = x + noise of six dims, T = 20; the truth is drawn from the chain itself. DPS's law of one dim is N(0.99 y, 0.16), not
    N(0.8 y, 0.2).
    """
    betas, simulations, dims = linear_betas(20), 200, 6
    net = GaussianDenoiser("x0", betas, mean=0.0, var=1.0)
    net.like = nn.Parameter(torch.zeros((), dtype=F64))
    diffusion = GaussianDiffusion(net, TableSchedule(torch.tensor(betas)), (dims,), "x0", variance="fixed_large")
    x = sample(diffusion, simulations, last="sample", batch_size=simulations)
    y = x + NOISE * torch.randn_like(x)

    def judge(draws: Tensor) -> Calibration:
        def told(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"x": x, "log p(y)": -(x - y).square().sum(-1)}

        return sbc(told(x, y), told(draws, y[:, None]))

    weighted, moved = [], []
    for row in y:
        seen = LinearGaussian(matrix(torch.eye(dims, dtype=F64)), row, NOISE)
        weighted.append(smc(diffusion, seen, 200, twist=pigdm(seen)).sample(19))
        moved.append(guided(diffusion, seen, 19).particles[0])
    assert_accepted(judge(torch.stack(weighted)).p_value, **RARE)
    assert_rejected(judge(torch.stack(moved)).p_value, **SEEN)


# ---------------------------------------------------------------------- numbers and words


def test_ranks_by_hand():
    truth = {"x": torch.tensor([[0.0, 5.0], [2.0, 5.5]]), "s": torch.tensor([1.0, 4.0])}
    draws = {
        "x": torch.tensor([[[-1.0, 6.0], [1.0, 7.0], [-2.0, 4.0]], [[3.0, 4.0], [5.0, 4.0], [6.0, 6.0]]]),
        "s": torch.tensor([[2.0, 3.0, 4.0], [1.0, 2.0, 3.0]]),
    }
    found = sbc(truth, draws)
    assert found.names == ("x[0]", "x[1]", "s") and found.draws == 3
    assert found.ranks.tolist() == [[2, 1, 0], [0, 2, 3]]
    assert found.coverage[0].tolist() == [0, 0.5, 0.5, 1, 1]
    assert found.deviation[0].item() == pytest.approx(0.25)
    assert found.p_value == min(1, 3 * float(found.p_values.min()))
    # the standard deviations are sqrt(2), sqrt(2) / 4 and sqrt(4.5); squared distances from 0 times 2 are, of the first simulation,
    # 0 + 16 * 25 + 4 / 9, and of its draws 1 + 16 * 36, 1 + 16 * 49, 4 + 16 * 16: one is nearer
    origin = {name: torch.zeros_like(value) for name, value in truth.items()}
    assert tarp(truth, draws, origin).ranks.tolist() == [[1], [2]]
    text = str(found)
    assert text.startswith("SBC: 2 simulations, 3 draws each: p = 1, 3 times the least of 3")
    assert "x[1]  p = " in text and "off by at most" in text
    assert str(tarp(truth, draws, origin)).count("\n") == 0


def test_mistakes_are_named():
    x, y = simulated(20)
    draws = posterior(y, 5)
    with pytest.raises(ShapeError, match="not the same"):
        sbc({"x": x}, {"z": draws})
    with pytest.raises(ShapeError, match=r"x: truth \[20, 2\] and draws \[20, 5\]"):
        sbc({"x": x}, {"x": draws[..., 0]})
    for value, told in (([0.5] * 20, "list"), (x.numpy(), "ndarray"), (x.to(torch.complex64), "complex64")):
        with pytest.raises(ShapeError, match=f"x is a .*{told}, not a torch.Tensor of real numbers"):
            sbc({"x": value}, {"x": draws})
    with pytest.raises(ShapeError, match="a Tensor and a Tensor are not two mappings"):
        sbc(x, draws)
    with pytest.raises(ShapeError, match=r"x: truth \[20, 0\]"):
        sbc({"x": x[:, :0]}, {"x": draws[..., :0]})
    for values in ((x, draws / 0, x), (x, draws, x / 0), (x / 0, draws, x)):
        with pytest.raises(DataError, match=r"^infinite values among"):
            tarp(*({"x": value} for value in values))
    with pytest.raises(DataError, match="same in all simulations"):
        tarp({"x": x[:1]}, {"x": draws[:1]}, {"x": x[:1]})
    with pytest.raises(ShapeError, match="s: truth"):
        sbc({"x": x, "s": x[:, 0]}, {"x": draws, "s": draws[:, :4, 0]})
    with pytest.raises(ShapeError, match="x: truth"):
        sbc({"x": x[:10]}, {"x": draws})
    with pytest.raises(DataError, match="NaN"):
        sbc({"x": x}, {"x": draws.where(draws < 1, math.nan)})
    with pytest.raises(DataError, match="same in all simulations"):
        tarp({"x": 0 * x}, {"x": draws}, {"x": x})
    with pytest.raises(DataError, match=r"0\.\.9, not in 0\.\.8"):
        uniformity(torch.arange(10)[:, None], 8)
    with pytest.raises(ShapeError, match="draws=0"):
        uniformity(torch.zeros(3, 1, dtype=torch.long), 0)
    with pytest.raises(ShapeError, match="float32, among draws=9: not whole numbers"):
        uniformity(torch.full((3, 1), 2.5), 9)
    with pytest.raises(ShapeError, match=r"\[3, 0\]"):
        uniformity(torch.zeros(3, 0, dtype=torch.long), 9)
    with pytest.raises(OptionError, match=r"alpha=1\.0"):
        band(10, 5, 1.0)


def test_the_picture_names_what_leaves_the_band():
    x, y = simulated()
    wrong = torch.cat([posterior(y, L)[..., :1], posterior(y, L, shift=1.0)[..., 1:]], 2)
    result = sbc({"x": x}, {"x": wrong})
    axes = plots.calibration(result, 0.001).axes[0]
    labels = axes.get_legend_handles_labels()[1]
    assert labels[0] == "within, but for 0.1 %" and [label.split(",")[0] for label in labels[1:]] == ["x[1]"]
    named = next(line for line in axes.lines if line.get_label().startswith("x[1]"))
    share = np.linspace(0, 1, L + 2)
    np.testing.assert_allclose(named.get_ydata(), result.coverage[1].numpy() - share, atol=1e-12)
    with pytest.raises(OptionError, match="alpha"):
        plots.calibration(result, 0.0)
