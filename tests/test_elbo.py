"""The ledger: its two errors, its chunks, its subsampled timesteps. (Closed forms: test_closed_forms.py.)"""

import math

import numpy as np
import pytest
import torch
from monte_carlo import assert_accepted, assert_estimate, assert_rejected
from scipy import stats
from test_sample import exact, unet

import pyrodiff
from pyrodiff import bits_per_dim, elbo_terms
from pyrodiff.elbo import Estimate
from pyrodiff.errors import OptionError, ShapeError


def data(n=40):
    return 0.5 + 0.2 * torch.randn(n, 2)


def test_shapes_and_signs():
    terms = elbo_terms(exact(7), data(5), repeats=3)
    assert terms.prior.shape == terms.reconstruction.shape == terms.elbo.shape == (5,)
    assert terms.diffusion.shape == (5, 6) and terms.t.tolist() == [2, 3, 4, 5, 6, 7]
    total = terms.prior + terms.diffusion.sum(-1) + terms.reconstruction
    torch.testing.assert_close(terms.elbo, -total)
    assert terms.network_evaluations == 3 * 5 * 7
    assert (terms.diffusion >= 0).all() and (terms.prior >= 0).all()
    assert bits_per_dim(terms).mean == pytest.approx(-terms.elbo.mean().item() / (2 * math.log(2)))


def test_one_step_has_no_diffusion_columns():
    for chain in (True, False):
        terms = elbo_terms(exact(1), data(5), chain=chain)
        assert terms.diffusion.shape == (5, 0) and terms.t.shape == (0,)
        torch.testing.assert_close(terms.elbo, -(terms.prior + terms.reconstruction))


@pytest.mark.monte_carlo
def test_every_estimator_has_the_same_mean():
    """Chain, independent and subsampled timesteps, by both KLs: within their own standard errors."""
    diffusion, x0 = exact(20), data(60)
    ways = {
        "chain": {"repeats": 20},
        "independent": {"repeats": 20, "chain": False},
        "subsampled": {"repeats": 40, "t": 5},
    }
    found = []
    for options in ways.values():
        terms = elbo_terms(diffusion, x0, **options)
        found += [bits_per_dim(terms.by(kl)) for kl in ("analytic", "monte_carlo")]
    reference = min(found, key=lambda b: b.se_noise)
    for estimate in found:
        if estimate is not reference:
            assert_estimate(
                estimate.mean, math.hypot(estimate.se_noise, reference.se_noise), reference.mean, detects=2.0
            )
    # The comparison of the best would see one timestep too few.
    largest = elbo_terms(diffusion, x0, repeats=20).diffusion.mean(0).max().item() / (2 * math.log(2))
    assert largest > 10 * reference.se_noise


def test_subsampled_columns_enumerate_to_the_whole_sum():
    """With the same noise, sum over t of p(t) x weight x L_t is the sum over t: stratified columns are exact at C = T - 1."""
    terms = elbo_terms(exact(9), data(6), t=8, repeats=2)
    assert terms.t.shape == (2, 6, 8) and terms.weights.unique().tolist() == [1.0]
    assert torch.equal(terms.t.sort(-1).values, torch.arange(2, 10).expand(2, 6, 8))
    assert terms.diffusion.shape == (6, 16)
    only = elbo_terms(exact(2), data(6), t=1)  # the shortest chain that has a column to draw
    assert (only.t == 2).all() and (only.weights == 1).all()


def test_the_two_standard_errors():
    draws = torch.tensor([[1.0, 2.0, 4.0], [3.0, 2.0, 6.0]])  # [R, B]
    estimate = Estimate.of(draws)
    assert estimate.mean == pytest.approx(3.0)
    per_image = torch.tensor([2.0, 2.0, 5.0])
    assert estimate.se_examples == pytest.approx(per_image.std().item() / math.sqrt(3))
    # var of each image's mean over 2 repeats: 2 / 2, 0, 2 / 2; their sum / 9
    assert estimate.se_noise == pytest.approx(math.sqrt(2 / 9))
    assert math.isnan(Estimate.of(draws[:1]).se_noise)
    assert math.isnan(Estimate.of(draws[:, :1]).se_examples)


@pytest.mark.monte_carlo
def test_se_noise_is_the_spread_over_seeds():
    """The claimed error over noise against the actual one of 150 estimates, by chi-square; half of it and twice are rejected."""
    diffusion, x0 = exact(20), data(30)
    found = [bits_per_dim(elbo_terms(diffusion, x0, t=3, repeats=3)) for _ in range(150)]
    squares = np.var([b.mean for b in found]) / np.mean([b.se_noise**2 for b in found]) * 150

    def p_value(claimed: float) -> float:
        law = stats.chi2(149)
        return 2 * min(law.cdf(squares / claimed**2), law.sf(squares / claimed**2))

    assert_accepted(p_value(1.0))
    assert_rejected([p_value(0.5), p_value(2.0)], misses=1e-3)
    fine = bits_per_dim(elbo_terms(diffusion, x0, t=19, repeats=30))
    assert fine.se_noise < 0.6 * fine.se_examples  # and it is not the one over images


@pytest.mark.monte_carlo
def test_batches_change_nothing_but_the_draws():
    diffusion, x0 = exact(15), data(50)
    whole = bits_per_dim(elbo_terms(diffusion, x0, repeats=40))
    parts = bits_per_dim(elbo_terms(diffusion, x0, repeats=40, batch_size=70))
    assert_estimate(whole.mean, math.hypot(whole.se_noise, parts.se_noise), parts.mean, detects=1.6)
    rows = []
    diffusion.net.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    for batch_size in (1, 3, 12, 1000):
        rows.clear()
        terms = elbo_terms(diffusion, x0[:5], chain=False, batch_size=batch_size)
        assert terms.diffusion.shape == (5, 14) and terms.network_evaluations == sum(rows) == 5 * 15
        assert max(rows) <= batch_size


def test_rows_stay_with_their_images():
    """A far image costs more in every term, whatever the batches: nothing is transposed."""
    x0 = data(6)
    x0[4] = 5.0
    for options in ({"batch_size": 4}, {"batch_size": 4, "chain": False}, {"t": 8, "batch_size": 2}):
        terms = elbo_terms(exact(15), x0, **options)
        assert terms.elbo.argmin() == 4
        assert (terms.diffusion * terms.weights).sum(-1).argmax() == 4 and terms.prior.argmax() == 4


def test_conditioning_is_cut_with_the_batch():
    diffusion = unet()
    x0, y = torch.randint(0, 17, (5, 1, 8, 8)) / 8 - 1, torch.tensor([0, 1, 2, 0, 1])
    seen = []
    diffusion.net.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["y"].clone()), with_kwargs=True)
    elbo_terms(diffusion, x0, batch_size=2, y=y)
    assert [len(s) for s in seen] == [2] * 6 + [2] * 6 + [1] * 6
    assert torch.equal(seen[6], y[2:4])


def test_explicit_timesteps_and_weights():
    diffusion, x0 = exact(9), data(4)
    terms = elbo_terms(diffusion, x0, t=torch.tensor([3, 8]))
    assert terms.diffusion.shape == (4, 2) and terms.weights.tolist() == [4.0, 4.0]
    weights = torch.tensor([[1.0, 3.0]]).expand(4, 2)
    own = elbo_terms(diffusion, x0, t=torch.tensor([[3, 8]]).expand(4, 2), weights=weights)
    torch.testing.assert_close(own.elbo, -(own.prior + (own.diffusion * weights).sum(-1) + own.reconstruction))


@pytest.mark.parametrize(
    "options",
    [
        {"kl": "both"},
        {"repeats": 0},
        {"batch_size": 0},
        {"t": 0},
        {"t": torch.tensor([1, 2])},
        {"t": torch.tensor([10])},
        {"t": torch.tensor([2.0])},
        {"t": torch.ones(3, 2, dtype=torch.int64)},
        {"t": torch.tensor([2, 3]), "weights": torch.ones(3)},
    ],
)
def test_bad_arguments_are_refused(options):
    with pytest.raises((OptionError, ShapeError)) as error:
        elbo_terms(exact(9), data(4), **options)
    assert "\n" not in str(error.value)


def test_bad_data_is_refused():
    for x0 in (torch.zeros(4, 3), torch.zeros(2), torch.zeros(0, 2), torch.zeros(4, 2).long()):
        with pytest.raises(ShapeError):
            elbo_terms(exact(9), x0)
    with pytest.raises(OptionError, match="'total'"):
        bits_per_dim(elbo_terms(exact(3), data(2)), "kl")


def test_the_table_prints_both_kls_and_their_errors():
    terms = elbo_terms(exact(5), data(), repeats=2)
    text = str(terms)
    assert text.count("\n") == 8 and "analytic" in text and "monte_carlo" in text and "nan" not in text
    rows = {(r["kl"], r["part"]): r for r in terms.table()}
    assert rows["analytic", "total"]["bits_per_dim_mean"] == pytest.approx(bits_per_dim(terms).mean)
    assert rows["monte_carlo", "total"]["nats_mean"] == pytest.approx(-terms.by("monte_carlo").elbo.mean().item())
    assert "bits/dim (±" in str(bits_per_dim(terms))


def test_scoring_leaves_no_graph_and_consumes_the_guides_noise_only():
    diffusion = unet()
    x0 = torch.randint(0, 17, (3, 1, 8, 8)) / 8 - 1
    terms = elbo_terms(diffusion, x0, y=torch.zeros(3, dtype=torch.int64))
    assert not terms.elbo.requires_grad and terms.elbo.dtype == torch.float64
    assert pyrodiff.ELBOTerms is type(terms)
