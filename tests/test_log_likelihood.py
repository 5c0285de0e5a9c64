"""One function for every method: the same table, and no option that is silently ignored."""

import math
import time

import pytest
import torch
from oracles import GaussianDenoiser

import pyrodiff
from pyrodiff.elbo import BitsPerDim, Estimate
from pyrodiff.errors import DataError, OptionError, ProgramError, ShapeError
from pyrodiff.likelihood.estimate import LogLikelihood
from pyrodiff.likelihood.methods import METHODS, options_of

F64 = torch.float64
FEW = {"elbo": {}, "iwae": {"chains": 30}, "ode": {"solver_steps": 4}, "immse": {"points": 4, "pilot": 2}}


class Shifted(torch.nn.Module):
    """An exact denoiser of data moved by ``shift``, which is given with each example."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = GaussianDenoiser("x0"), torch.nn.Dropout(0.5)

    def forward(self, x, log_snr, shift):
        shift = shift[:, None]
        return self.drop(self.inner(x - log_snr.sigmoid().sqrt()[:, None] * shift, log_snr)) + shift


def make(net=None, steps=12, dims=2, **options):
    return pyrodiff.GaussianDiffusion(
        GaussianDenoiser("x0") if net is None else net,
        pyrodiff.LogLinearSchedule(steps, -6.0, 6.0),
        (dims,),
        **{"prediction": "x0"} | options,
    )


def data(n=5, dims=2):
    return 0.3 + 0.5 * torch.randn(n, dims, dtype=F64)


@pytest.mark.parametrize("method", METHODS)
def test_the_table_is_the_same_whatever_the_method(method):
    began = time.perf_counter()
    found = pyrodiff.log_likelihood(make(), data(), method, repeats=3, **FEW[method])
    assert 0 < found.seconds < time.perf_counter() - began
    assert (found.method, found.dims) == (method, 2) and found.draws.shape == (3, 5) and found.draws.dtype == F64
    torch.testing.assert_close(found.log_prob, found.draws.mean(0))
    assert found.nats == Estimate.of(-found.draws)
    assert found.bits_per_dim == BitsPerDim.of(-found.draws / (2 * math.log(2)))
    lines = str(found).splitlines()
    assert lines[0].startswith(f"{method}: lower bound")
    assert lines[1].split() == ["-log", "p", "±", "images", "±", "noise"]
    for line, name, estimate, digits in (
        (lines[2], "nats", found.nats, 3),
        (lines[3], "bits/dim", found.bits_per_dim, 4),
    ):
        assert line.split() == [name, *(f"{value:.{digits}f}" for value in estimate)]
    assert lines[4].startswith(f"5 images, 3 repeats, {found.network_evaluations:,} network evaluations, ")
    assert lines[5:] == [f"warning: {text}" for text in found.warnings]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("elbo", {}),
        ("iwae", {"chains": 64, "alpha": 0.0}),
        ("ode", {"probes": 1}),
        ("immse", {"points": 16, "pilot": 16}),
    ],
)
def test_defaults_are_the_documented_ones(method, options):
    diffusion, x0 = make(), data(2)
    documented = {"repeats": 2, "seed": 0, **options}
    assert torch.equal(METHODS[method](diffusion, x0).draws, METHODS[method](diffusion, x0, **documented).draws)


def test_warnings_stand_below_the_table():
    found = LogLikelihood("m", "something", True, -torch.ones(2, 3, dtype=F64), 4, 1200, 1.5, {}, ("careful", "slowly"))
    assert str(found) == "\n".join(
        [
            "m: something",
            "                  -log p    ± images     ± noise",
            "nats               1.000       0.000       0.000",
            "bits/dim          0.3607      0.0000      0.0000",
            "3 images, 2 repeats, 1,200 network evaluations, 1.5 s",
            "warning: careful",
            "warning: slowly",
        ]
    )


def test_evaluations_are_those_of_the_network():
    class Counting(GaussianDenoiser):
        rows = 0

        def forward(self, x, log_snr):
            self.rows += len(x)
            return super().forward(x, log_snr)

    for method, options in FEW.items():
        net = Counting("x0")
        found = pyrodiff.log_likelihood(make(net), data(), method, repeats=3, batch_size=7, **options)
        assert net.rows == found.network_evaluations


def test_the_elbo_is_that_of_the_ledger():
    diffusion, x0 = make(), data()
    torch.manual_seed(4)
    terms = pyrodiff.elbo_terms(diffusion, x0, repeats=2)
    found = pyrodiff.log_likelihood(diffusion, x0, seed=4)
    torch.testing.assert_close(found.log_prob, terms.elbo, rtol=0, atol=1e-12)
    assert found.bits_per_dim == pytest.approx(pyrodiff.bits_per_dim(terms))
    for name, value in found.diagnostics.items():
        assert torch.equal(value, terms.parts()[name])
    sampled = pyrodiff.log_likelihood(diffusion, x0, seed=4, kl="monte_carlo")
    torch.testing.assert_close(sampled.log_prob, terms.by("monte_carlo").elbo, rtol=0, atol=1e-12)
    few = pyrodiff.log_likelihood(diffusion, x0, timesteps=3, kl="monte_carlo")
    assert few.network_evaluations == 2 * 5 * 4
    assert [z.unbiased for z in (found, sampled, few)] == [False, True, False]


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_repeats_itself_and_leaves_the_generator_alone(method):
    diffusion, x0 = make(), data()
    state = torch.random.get_rng_state()
    first, again, other = (
        pyrodiff.log_likelihood(diffusion, x0, method, seed=seed, **FEW[method]).draws for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # repeats have noise of their own


@pytest.mark.parametrize("method", METHODS)
def test_conditioning_goes_with_its_example(method):
    """Data moved by what the network is told are as likely, but for the prior; in evaluation mode, in batches."""
    diffusion, x0, shift = make(Shifted()), data(), torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0], dtype=F64)
    options = {"repeats": 4, "batch_size": 7, **FEW[method]}
    moved = pyrodiff.log_likelihood(diffusion, x0 + shift[:, None], method, shift=shift, **options)
    plain = pyrodiff.log_likelihood(make(), x0, method, **options)
    # At one seed all states move by alpha_t shift. log N(x_T; 0, 1) moves with alpha_T = 0.05: by less than 0.3 |x_T|.
    torch.testing.assert_close(moved.draws[:, 0], plain.draws[:, 0], rtol=1e-9, atol=1e-9)
    assert (plain.draws - moved.draws).abs().max() < 1
    wrong = pyrodiff.log_likelihood(diffusion, x0 + shift[:, None], method, shift=shift.flip(0), **options)
    assert (plain.log_prob - wrong.log_prob).max() > 1
    with pytest.raises(ShapeError, match="shift has 3 rows"):
        pyrodiff.log_likelihood(diffusion, x0, method, shift=shift[:3], **FEW[method])
    assert diffusion.net.drop.training


def test_options_of_other_methods_are_refused_by_name():
    assert {m: options_of(m) for m in METHODS} == {
        "elbo": ["timesteps", "kl"],
        "iwae": ["chains", "alpha"],
        "ode": ["dequantisation", "samples", "probes", "solver", "solver_steps", "tolerance"],
        "immse": ["points", "pilot"],
    }
    diffusion, x0 = make(), data()
    with pytest.raises(
        OptionError, match=r"chains=4 belongs to method='iwae'; the options of 'elbo' are timesteps, kl"
    ):
        pyrodiff.log_likelihood(diffusion, x0, chains=4)
    with pytest.raises(OptionError, match=r"kl='analytic' belongs to method='elbo'"):
        pyrodiff.log_likelihood(diffusion, x0, "immse", kl="analytic")
    with pytest.raises(OptionError, match=r"method='vlb' is not one of 'elbo', 'iwae', 'ode', 'immse'"):
        pyrodiff.log_likelihood(diffusion, x0, "vlb")
    with pytest.raises(TypeError, match="chian"):  # the network's own
        pyrodiff.log_likelihood(diffusion, x0, "iwae", chian=4)


@pytest.mark.parametrize("method", METHODS)
def test_what_no_method_takes(method):
    diffusion = make()
    for options, name in (
        ({"repeats": 0}, "repeats=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(OptionError, match=name):
            pyrodiff.log_likelihood(diffusion, data(), method, **options)
    for x0 in (data(3, 3), data()[0], data(0)):
        with pytest.raises(ShapeError, match="x0 has shape"):
            pyrodiff.log_likelihood(diffusion, x0, method)
    with pytest.raises(DataError, match="NaN"):
        pyrodiff.log_likelihood(diffusion, data() / 0, method)
    with pytest.raises(DataError, match="off the grid"):
        pyrodiff.log_likelihood(make(bins=(3, -1.0, 1.0)), data(), method)


@pytest.mark.parametrize("method", METHODS)
def test_an_approximate_decoder_is_called_no_bound(method):
    x0 = torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=F64)
    found = {
        decoder: pyrodiff.log_likelihood(make(bins=(3, -1.0, 1.0), decoder=decoder), x0, method, **FEW[method])
        for decoder in ("vdm", "openai_tanh")
    }
    assert not any("no bound" in text for text in found["vdm"].warnings)
    assert any("no bound" in text for text in found["openai_tanh"].warnings)


@pytest.mark.parametrize("method", ["iwae", "immse"])
def test_continuous_time_has_no_chain_to_weigh(method):
    diffusion = pyrodiff.GaussianDiffusion(
        GaussianDenoiser(), pyrodiff.LogLinearSchedule(math.inf, -4.0, 4.0), (2,), "x0"
    )
    with pytest.raises(ProgramError, match=r"respace\(T\)"):
        pyrodiff.log_likelihood(diffusion, data(), method)


def test_one_chain_is_unbiased_whatever_alpha():
    assert pyrodiff.log_likelihood(make(), data(), "iwae", chains=1, alpha=0.5).unbiased
    assert not pyrodiff.log_likelihood(make(), data(), "iwae", chains=2, alpha=0.5).unbiased
    for options in ({"chains": 2.5}, {"repeats": 2.0}):
        with pytest.raises(OptionError, match="is not an integer"):
            pyrodiff.log_likelihood(make(), data(), "iwae", **options)
