"""Drawing timesteps: the right law, less variance, no bias."""

import math

import pytest
import torch
from monte_carlo import assert_rejected
from scipy import stats

from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.timesteps import ImportanceSampler, low_discrepancy, uniform


@pytest.mark.parametrize("draw", [uniform, low_discrepancy])
def test_every_timestep_is_equally_likely(draw):
    steps, batch, rounds = 7, 5, 4000
    t = torch.stack([draw(batch, steps) for _ in range(rounds)])
    assert t.dtype == torch.int64 and t.min() == 1 and t.max() == steps
    # Each column alone is uniform: a chi-square on 6 degrees of freedom, false alarms below 1e-6 per column.
    for column in t.T:
        counts = torch.bincount(column, minlength=steps + 1)[1:].double()
        chi2 = ((counts - rounds / steps) ** 2 / (rounds / steps)).sum()
        assert chi2 < 40.0


def test_low_discrepancy_covers_the_range():
    for _ in range(50):
        t = low_discrepancy(10, 1000)
        assert torch.equal(((t - 1) // 100).sort().values, torch.arange(10))
        assert low_discrepancy(12, 6).bincount(minlength=7)[1:].tolist() == [2] * 6


@pytest.mark.monte_carlo
def test_low_discrepancy_has_less_variance():
    f = torch.linspace(3, 0, 100).exp()

    def spread(draw):
        return float(torch.stack([f[draw(16, 100) - 1].mean() for _ in range(1000)]).var())

    # means of 16 are near normal: that the deviation is 0.4 times that of uniform draws, or more, is rejected
    assert_rejected(stats.f.cdf(spread(low_discrepancy) / (0.16 * spread(uniform)), 999, 999))


def test_generators_reproduce():
    for draw in (uniform, low_discrepancy):
        a, b = (draw(9, 50, generator=torch.Generator().manual_seed(4)) for _ in range(2))
        assert torch.equal(a, b)


def test_importance_sampler_is_uniform_until_every_history_is_full():
    sampler = ImportanceSampler(3, history=2)
    assert sampler.probabilities.tolist() == [1 / 3] * 3
    sampler.update(torch.tensor([1, 1, 2, 2, 3]), torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0]))
    assert sampler.probabilities.tolist() == [1 / 3] * 3
    sampler.update(torch.tensor([3]), torch.tensor([3.0]))
    expected = 0.999 * torch.tensor([1, 2, 3]) / 6 + 0.001 / 3
    torch.testing.assert_close(sampler.probabilities, expected.double(), rtol=1e-6, atol=0)


def test_importance_weights_are_unbiased():
    """The expectation over t of weight x L_t, taken exactly, is the sum of the L_t (H31)."""
    sampler = ImportanceSampler(40, history=1)
    losses = torch.linspace(4, -2, 40).exp().double()
    sampler.update(torch.arange(1, 41), losses)
    p = sampler.probabilities
    assert p.sum() == pytest.approx(1, abs=1e-12)
    t, weight = sampler.sample(4000)
    torch.testing.assert_close(weight.double(), 1 / p[t - 1], rtol=1e-6, atol=0)
    assert (p * (1 / p) * losses).sum() == pytest.approx(losses.sum().item(), rel=1e-12)
    # What it is for: the weighted losses vary less than T x L_t at uniform t.
    assert (weight * losses[t - 1]).std() < 0.1 * (40 * losses[uniform(4000, 40) - 1]).std()


def test_importance_sampler_state_round_trips():
    a = ImportanceSampler(5, history=2)
    a.update(torch.tensor([1, 2, 3, 4, 5] * 3), torch.arange(15).double())
    b = ImportanceSampler(5, history=2)
    b.load_state_dict(a.state_dict())
    for s in (a, b):
        s.update(torch.tensor([2]), torch.tensor([100.0]))
    assert torch.equal(a.probabilities, b.probabilities)
    with pytest.raises(ShapeError, match=r"\[5, 2\], not \[6, 2\]"):
        ImportanceSampler(6, history=2).load_state_dict(a.state_dict())


def test_non_finite_and_zero_losses_do_not_poison_the_sampler():
    sampler = ImportanceSampler(2, history=1)
    sampler.update(torch.tensor([1, 2, 1]), torch.tensor([1.0, math.nan, math.inf]))
    assert sampler.probabilities.tolist() == [0.5, 0.5]
    zero = ImportanceSampler(2, history=1)
    zero.update(torch.tensor([1, 2]), torch.zeros(2))
    assert zero.probabilities.tolist() == [0.5, 0.5]


def test_bad_arguments():
    for call in (
        lambda: uniform(0, 5),
        lambda: low_discrepancy(5, 0),
        lambda: ImportanceSampler(0),
        lambda: ImportanceSampler(5, 0),
    ):
        with pytest.raises(OptionError):
            call()
    with pytest.raises(ShapeError):
        ImportanceSampler(5).update(torch.tensor([1, 2]), torch.tensor([1.0]))
