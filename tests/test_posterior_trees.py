"""Trees of posteriors: the numbers are the tensors', ArviZ reads them, and a guide's weights are the closed form's."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from monte_carlo import assert_mean, assert_moments
from oracles import GaussianDenoiser
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyrodiff
from pyrodiff import GaussianDiffusion, LogLinearSchedule
from pyrodiff.errors import OptionError, ProgramError, ShapeError
from pyrodiff.inference import DiffusionPrior, FlowReparam, bound
from pyrodiff.inference.gibbs import GibbsChain, particle_gibbs
from pyrodiff.inference.guidance import guided
from pyrodiff.inference.operators import LinearGaussian, mask
from pyrodiff.inference.predictive import guide_draws
from pyrodiff.inference.smc import Posterior, smc
from pyrodiff.inference_data import to_datatree, write
from pyrodiff.likelihood.importance import pareto_k

xarray = pytest.importorskip("xarray")


def particles(repeats: int = 2, count: int = 50, event: tuple[int, ...] = (2, 3), **fields: Any) -> Posterior:
    """Weighted particles of no model."""
    log_weights = torch.randn(repeats, count, dtype=torch.float64) * 1.5 - 3
    steps = 4
    given = {
        "ess": torch.rand(repeats, steps + 1).double(),
        "pareto_k": torch.rand(repeats, steps + 1).double(),
        "families": torch.rand(repeats).double(),
        "warnings": ("mind the ä", "and this"),
    } | fields
    return Posterior(
        "smc, test", torch.randn(repeats, count, *event), log_weights, network_evaluations=7, seconds=0.5, **given
    )


def model_and_chain(steps: int = 3, event: tuple[int, ...] = (2,)) -> GaussianDiffusion:
    return GaussianDiffusion(GaussianDenoiser("x0"), LogLinearSchedule(steps, -6.0, 6.0), event, "x0")


def saved(tree: Any, path: Path) -> Any:
    """The tree written to a file and read by ArviZ; every number and attribute is found again."""
    az = pytest.importorskip("arviz")
    write(tree, path)
    data = az.from_netcdf(path)
    for name, group in tree.children.items():
        for key, variable in group.data_vars.items():
            found = data[name][key]
            assert found.dims == variable.dims and found.dtype == variable.dtype
            np.testing.assert_array_equal(found.values, variable.values)
            assert found.attrs == variable.attrs
        assert set(group.attrs) <= set(data[name].attrs)
        assert all(data[name].attrs[key] == value or value != value for key, value in group.attrs.items())
    return az, data


def test_particles_are_where_they_belong(tmp_path: Path):
    posterior, label = particles(), torch.tensor([3, 1])
    tree = to_datatree(posterior, diffusion=model_and_chain(), cond={"y": label, "scale": 2.5}, attrs={"seed": 4})
    raw, draws = tree["particles"], tree["posterior"].x_0
    np.testing.assert_array_equal(raw.x_0, posterior.particles)
    np.testing.assert_array_equal(raw.log_weight, posterior.log_weights)
    assert raw.x_0.dims == ("chain", "particle", "channel", "length") and draws.dims[:2] == ("chain", "draw")
    which = tree["sample_stats"].particle
    for r in range(2):
        np.testing.assert_array_equal(draws[r], posterior.particles[r, which.values[r]])
    found = tree["diagnostics"]
    for name in ("ess", "pareto_k", "families", "log_evidence"):
        np.testing.assert_array_equal(found[name], getattr(posterior, name))
    assert found.timestep.values.tolist() == [4, 3, 2, 1, 0]
    assert found.log_evidence.attrs["units"] == raw.log_weight.attrs["units"] == "nats"
    assert json.loads(tree.attrs["warnings"]) == ["mind the ä", "and this"]
    assert tree["posterior"].attrs["warnings"] == tree.attrs["warnings"]
    assert (tree.attrs["log_evidence"], tree.attrs["log_evidence_se"]) == tuple(posterior.evidence)
    assert (tree.attrs["method"], tree.attrs["network_evaluations"], tree.attrs["seed"]) == ("smc, test", 7, 4)
    np.testing.assert_array_equal(tree["constant_data"].y, label)
    assert float(tree["constant_data"].scale) == 2.5 and tree["constant_data"].betas.shape == (3,)
    saved(tree, tmp_path / "a.nc")


def test_what_is_drawn_has_the_weights_moments():
    """Koksma's inequality: N midpoints of [0, 1] have discrepancy 1 / 2N, so that a mean is off by the variation over 2N at most."""
    posterior = particles(repeats=3, count=200, event=(2,))
    tree = to_datatree(posterior)
    draws = torch.from_numpy(tree["posterior"].x_0.values)
    weights = posterior.log_weights.softmax(1)[..., None]
    mass = torch.nn.functional.pad(weights[..., 0].cumsum(1), (1, 0))
    which = torch.from_numpy(tree["sample_stats"].particle.values)
    places = (torch.arange(200) + 0.5) / 200  # each in the share of its particle
    assert ((mass.gather(1, which) <= places + 1e-12) & (places <= mass.gather(1, which + 1) + 1e-12)).all()
    for power in (1, 2):
        values = posterior.particles.double() ** power
        error = (draws.double() ** power).mean(1) - (weights * values).sum(1)
        variation = values.diff(dim=1).abs().sum(1)
        assert (error.abs() <= variation / 400).all()
        assert error.abs().max() > 0  # resampled, not weighted


def test_arviz_sees_that_copies_are_copies():
    """Of i.i.d. particles in runs of n_i copies the mean has the variance of N^2 / sum n_i^2 draws."""
    az = pytest.importorskip("arviz")
    posterior = particles(repeats=4, count=2000, event=(1,))
    tree = to_datatree(posterior)
    counts = [np.bincount(row) for row in tree["sample_stats"].particle.values]
    exact = sum(2000**2 / (c.astype(float) ** 2).sum() for c in counts)
    assert exact < 0.35 * 8000
    found = float(az.ess(tree["posterior"].to_dataset(), method="mean").x_0[0])
    # az.ess sums autocorrelations of rho ~ 1 lag and noise of 1 / sqrt(8000) each: within a third
    assert exact / 1.5 < found < exact * 1.5
    assert float(az.rhat(tree["posterior"].to_dataset()).x_0[0]) < 1.1


@pytest.mark.monte_carlo
def test_particles_of_a_chain_with_the_program_of_the_observation(tmp_path: Path):
    diffusion, y = model_and_chain(), torch.tensor([[0.4], [0.1], [-0.3]])

    def program(x0: Tensor) -> None:
        total = pyro.deterministic("total", x0.sum(1))
        with pyro.plate("exposures", 3, dim=-2):
            pyro.sample("y", dist.Normal(total, 0.5), obs=y)

    from pyrodiff.inference.observe import observation

    posterior = smc(diffusion, observation(program), 40, proposal="bootstrap", repeats=2)
    tree = to_datatree(posterior, program=program)
    x = torch.from_numpy(tree["posterior"].x_0.values)
    np.testing.assert_array_equal(tree["posterior"].total, x.sum(2))
    log_likelihood = tree["log_likelihood"].y
    assert log_likelihood.dims == ("chain", "draw", "exposures")
    expected = dist.Normal(x.sum(2, keepdim=True), 0.5).log_prob(y[:, 0])
    np.testing.assert_allclose(log_likelihood, expected, rtol=1e-6)
    assert tree["observed_data"].y.dims == ("exposures",)
    np.testing.assert_array_equal(tree["observed_data"].y, y[:, 0])
    again = tree["posterior_predictive"].y
    assert again.dims == ("chain", "draw", "exposures")
    z = (torch.from_numpy(again.values) - x.sum(2, keepdim=True)) / 0.5  # 240 of them
    assert_moments(z, 0.0, 1.0, detects=1.0)
    az, data = saved(tree, tmp_path / "a.nc")
    table = az.summary(data)
    assert {"x_0[0]", "x_0[1]"} <= set(table.index) and table[["ess_bulk", "r_hat"]].notna().all().all()


def test_a_heuristic_keeps_its_word(tmp_path: Path):
    seen = LinearGaussian(mask(torch.tensor([True, False])), torch.tensor([0.7]), 0.1)
    diffusion = GaussianDiffusion(pyrodiff.nets.MLP(2), LogLinearSchedule(3, -6.0, 6.0), (2,), "v")
    posterior = guided(diffusion, seen, 6, seed=0)
    tree = to_datatree(posterior)
    np.testing.assert_array_equal(tree["posterior"].x_0, posterior.particles)
    assert "log_evidence" not in tree["diagnostics"] and "log_evidence" not in tree.attrs
    assert "heuristic" in tree.attrs["no_evidence"] and "heuristic" in json.loads(tree.attrs["warnings"])[0]
    saved(tree, tmp_path / "a.nc")


def gibbs(seed: int, sweeps: int = 6) -> tuple[GibbsChain, Any]:
    y = torch.tensor([0.7, -0.2])

    def program(x0: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x0 + shift, sigma).to_event(1), obs=y)

    return particle_gibbs(model_and_chain(), program, sweeps, particles=4, seed=seed), program


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning")  # ArviZ 0.23's
def test_gibbs_chains(tmp_path: Path):
    (first, program), (second, _) = gibbs(0), gibbs(1)
    for result, chains in (([first, second], (first, second)), (first, (first,))):
        tree = to_datatree(result, program=program)
        for c, chain in enumerate(chains):
            np.testing.assert_array_equal(tree["posterior"].x_0[c], chain.x0)
            for name, values in chain.parameters.items():
                np.testing.assert_array_equal(tree["posterior"][name][c], values)
            law = dist.Normal(chain.x0 + chain.parameters["shift"], chain.parameters["sigma"][:, None]).to_event(1)
            np.testing.assert_allclose(tree["log_likelihood"].y[c], law.log_prob(torch.tensor([0.7, -0.2])), rtol=1e-5)
        assert tree["posterior"].shift.dims == ("chain", "draw", "shift_dim_0")
        assert tree["posterior_predictive"].y.dims == ("chain", "draw", "y_feature")
        np.testing.assert_array_equal(tree["observed_data"].y, np.array([0.7, -0.2], dtype=np.float32))
        assert tree["diagnostics"].moved.values.tolist() == [chain.moved for chain in chains]
        assert tree.attrs["network_evaluations"] == sum(chain.network_evaluations for chain in chains)
    az, data = saved(to_datatree([first, second]), tmp_path / "a.nc")
    table = az.summary(data, var_names=["sigma", "shift"])
    assert list(table.index) == ["sigma", "shift[0]", "shift[1]"] and table["r_hat"].notna().all()
    axes = az.plot_trace(data, var_names=["sigma"], compact=False)
    assert axes.shape == (1, 2)
    import matplotlib.pyplot as plt

    plt.close(axes[0, 0].figure)
    with pytest.raises(ShapeError, match=r"\[\[6, 2\], \[5, 2\]\], not one"):
        to_datatree([first, gibbs(2, 5)[0]])


# ---------------------------------------------------------------------- a guide

NOISE = 0.5


def conjugate(prior: Any, y: Tensor) -> Any:
    """Theta ~ N(0, 1), then x around it for each group, and y around x."""

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        twice = pyro.deterministic("twice", 2 * theta)
        with pyro.plate("groups", len(y)):
            x = pyro.sample("x", prior(theta))
            pyro.sample("y", dist.Normal(x + 0 * twice[..., None], NOISE).to_event(1), obs=y)

    return model


@pytest.mark.monte_carlo
@pytest.mark.parametrize("batch_size", [1, 7])
def test_draws_of_a_guide_by_site_and_plate(batch_size: int, tmp_path: Path):
    """Three groups of events of 3: a dim taken for another one is told by names and by what the values are."""
    y = torch.randn(3, 3)
    model = conjugate(lambda theta: dist.Normal(theta[..., None] * torch.ones(3), 1.0).to_event(1), y)
    guide = AutoNormal(model)
    tree = to_datatree((model, guide), args=(), draws=16, batch_size=batch_size)
    posterior = tree["posterior"]
    assert set(posterior.data_vars) == {"theta", "twice", "x"}
    assert posterior.theta.dims == ("chain", "draw") and posterior.x.dims == ("chain", "draw", "groups", "x_feature")
    np.testing.assert_array_equal(posterior.twice, 2 * posterior.theta)
    x, theta = (torch.from_numpy(posterior[name].values[0]) for name in ("x", "theta"))
    assert len(theta.unique()) == 16 and len(x.unique()) == 16 * 9
    log_likelihood = dist.Normal(x, NOISE).log_prob(y).sum(-1)
    assert tree["log_likelihood"].y.dims == ("chain", "draw", "groups")
    np.testing.assert_allclose(tree["log_likelihood"].y[0], log_likelihood, rtol=1e-5)
    assert tree["observed_data"].y.dims == ("groups", "y_feature")
    np.testing.assert_array_equal(tree["observed_data"].y, y)
    z = (torch.from_numpy(tree["posterior_predictive"].y.values[0]) - x) / NOISE  # 144 of them
    assert_moments(z, 0.0, 1.0, detects=1.2)
    # AutoNormal starts at scale 0.1: the weights by hand
    locs = {name: guide.median()[name] for name in ("theta", "x")}
    log_q = dist.Normal(locs["theta"], 0.1).log_prob(theta) + dist.Normal(locs["x"], 0.1).log_prob(x).sum((1, 2))
    log_p = dist.Normal(0.0, 1.0).log_prob(theta) + dist.Normal(theta[:, None, None], 1.0).log_prob(x).sum((1, 2))
    w = (log_p + log_likelihood.sum(1) - log_q).detach().double()
    found = tree["sample_stats"].log_weight.values[0]
    np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-4)
    assert float(tree["diagnostics"].elbo) == pytest.approx(found.mean())
    assert float(tree["diagnostics"].log_evidence) == pytest.approx(np.log(np.exp(found - 50).mean()) + 50)
    assert math.isnan(tree["diagnostics"].pareto_k) and "takes 25 draws" in tree.attrs["warnings"]
    az, data = saved(tree, tmp_path / "a.nc")
    assert len(az.summary(data, kind="stats")) == 2 + 9


def exact_guide(scale: float) -> Any:
    """Of x ~ N(0, 1), y = 1 observed with variance 1/4: the posterior N(0.8, 0.2), its spread multiplied."""
    return lambda: pyro.sample("x", dist.Normal(torch.tensor([0.8]), scale * math.sqrt(0.2)).to_event(1))


@pytest.mark.monte_carlo
def test_how_good_a_guide_is_is_told():
    """The exact guide's weights are all p(y); one of less spread by a factor c has weights of tail index 1 - c^2."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.ones(1))

    log_z = float(dist.Normal(0.0, math.sqrt(1.25)).log_prob(torch.tensor(1.0)))
    exact = to_datatree((model, exact_guide(1.0)), draws=100, batch_size=100)
    np.testing.assert_allclose(exact["sample_stats"].log_weight, log_z, atol=1e-5)
    assert float(exact["diagnostics"].ess) == pytest.approx(100, rel=1e-4)
    assert float(exact["diagnostics"].pareto_k) < 0.5 and exact.attrs["warnings"] == "[]"
    # the one of nine with the median k-hat, whose law is wide: its standard deviation is 0.1 or so
    nine = [to_datatree((model, exact_guide(0.15)), draws=4000, batch_size=4000) for _ in range(9)]
    narrow = sorted(nine, key=lambda tree: float(tree["diagnostics"].pareto_k))[4]
    w = torch.from_numpy(narrow["sample_stats"].log_weight.values[0])
    assert float(narrow["diagnostics"].pareto_k) == float(pareto_k(w[:, None])[0])
    assert float(narrow["diagnostics"].pareto_k) > 0.7  # 0.98 in the limit
    assert "of the guide against the joint" in json.loads(narrow.attrs["warnings"])[0]
    draws = narrow["posterior"].x.values.ravel()  # of the guide, as they came
    assert_moments(draws, 0.8, 0.15**2 * 0.2, detects=0.3)


@pytest.mark.parametrize("name", ["x_0", "chain", "draw", "height", "a/b"])
def test_names_of_the_trees_own(name: str):
    """The error is ours, on one line, whatever xarray thinks of the name."""
    text = rf"^a site[a-z ]* cannot be named '{name}' in a tree: [^\n]*$"
    for shape in ((5,), (5, 3)):
        chain = GibbsChain(torch.zeros(5, 1, 2, 2), {name: torch.zeros(shape)}, 1.0, 1, 0.0)
        with pytest.raises(OptionError, match=text):
            to_datatree(chain)
    if name in ("x_0", "height"):  # those belong to no site of a pair
        return

    def model() -> None:
        pyro.sample(name, dist.Normal(0.0, 1.0))

    def plated() -> None:
        with pyro.plate(name, 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for program in (model, plated):
        with pytest.raises(OptionError, match=text):
            to_datatree((program, program), draws=3)


def test_a_scale_is_not_in_the_log_likelihood():
    prior = DiffusionPrior(model_and_chain())

    def model() -> None:
        x = pyro.sample("x", prior)
        with poutine.scale(scale=10.0):
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(2))

    tree = to_datatree(bound(model, AutoNormal(model), {"x": prior}), draws=3)
    expected = dist.Normal(torch.tensor(tree["posterior"].x.values), 1.0).log_prob(torch.zeros(2)).sum(-1)
    np.testing.assert_allclose(tree["log_likelihood"].y.values, expected, rtol=1e-5)


def test_chains_and_conditions_that_fit_no_tree():
    chains = [GibbsChain(torch.zeros(5, 2), {n: torch.zeros(5)}, 1.0, 1, 0.0) for n in "ab"]
    with pytest.raises(ShapeError, match=r"parameters of shapes \[{'a': \[5\]}, {'b': \[5\]}\]"):
        to_datatree(chains)
    for value, told in (("cat", "str"), (None, "NoneType")):
        with pytest.raises(OptionError, match=f"cond has a {told} as 'y'"):
            to_datatree(chains[0], cond={"y": value})
    with pytest.raises(OptionError, match="slash"):
        to_datatree(chains[0], cond={"a/y": 1})


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_point_mass_has_no_weights(batch_size: int):
    """Of AutoDelta the ratios are all log p(z, y) at one z: 50 effective draws and k-hat -inf would say that it is perfect."""

    def model() -> None:
        z, s = pyro.sample("z", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(z, s), obs=torch.tensor([0.5, 1.0, 1.2]))

    mixed = AutoGuideList(model)
    mixed.append(AutoNormal(poutine.block(model, expose=["s"])))
    mixed.append(AutoDelta(poutine.block(model, expose=["z"])))
    for guide, names in ((AutoDelta(model), "z, s"), (mixed, "z")):
        tree = to_datatree((model, guide), draws=50, batch_size=batch_size)
        assert "diagnostics" not in tree.children and "sample_stats" not in tree.children
        assert f"all of its mass on one value of {names}:" in tree.attrs["no_weights"]
        assert json.loads(tree.attrs["warnings"]) == [tree.attrs["no_weights"]]
    for guide in (AutoNormal(model), AutoMultivariateNormal(model)):  # whose sites are points given another site
        assert "pareto_k" in to_datatree((model, guide), draws=50, batch_size=batch_size)["diagnostics"]


@pytest.mark.monte_carlo
def test_a_pair_of_a_chain():
    """With the whole chain the weights' mean is p(y) under the chain's own law; with one timestep there are none."""
    diffusion, y = model_and_chain(4, (1,)), torch.ones(1)
    prior = DiffusionPrior(diffusion)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("x", dist.Normal(torch.full((1,), 0.5), 0.6).to_event(1))

    pair = bound(model, guide, {"x": prior}, chain=True)
    tree = to_datatree(pair, args=(y,), draws=4000, batch_size=4000)
    assert set(tree["posterior"].data_vars) == {"x"} and list(tree["log_likelihood"].data_vars) == ["y"]
    # p(y) by the chain's Gaussian law, its moments from the recursion of its steps at x_t = 0 and 1
    mean, var = torch.zeros(1), torch.ones(1)
    for t in range(4, 0, -1):
        at0, at1 = (prior.diffusion.reverse_kernel(torch.full((1, 1), v), t) for v in (0.0, 1.0))
        slope = (at1.mean - at0.mean).flatten()
        mean, var = slope * mean + at0.mean.flatten(), slope**2 * var + at0.stddev.flatten() ** 2
    log_z = float(dist.Normal(mean, (var + 0.25).sqrt()).log_prob(y))
    w = torch.from_numpy(tree["sample_stats"].log_weight.values[0])
    ratio = (w - log_z).exp()
    assert_mean(ratio, 1.0, detects=0.6)
    assert float(tree["diagnostics"].log_evidence) == pytest.approx(log_z + math.log(float(ratio.mean())))
    tree = to_datatree(bound(model, guide, {"x": prior}), args=(y,), draws=5)
    assert tree["posterior"].x.shape == (1, 5, 1)
    assert "sample_stats" not in tree.children and "diagnostics" not in tree.children
    assert json.loads(tree.attrs["warnings"]) == [tree.attrs["no_weights"]] and "bound" in tree.attrs["no_weights"]
    with pytest.raises(ProgramError, match="density of a chain is not known"):
        to_datatree((model, guide), args=(y,), draws=5)


def test_no_chain_is_walked(monkeypatch: pytest.MonkeyPatch):
    prior = DiffusionPrior(model_and_chain(3, (1,)))

    def model() -> None:
        pyro.sample("y", dist.Normal(pyro.sample("x", prior), 0.5).to_event(1), obs=torch.ones(1))

    monkeypatch.setattr(DiffusionPrior, "rsample", lambda self, shape=(): pytest.fail("drawn from the prior"))
    tree = to_datatree(bound(model, exact_guide(1.0), {"x": prior}), draws=3)
    assert tree["posterior_predictive"].y.shape == (1, 3, 1)


def test_what_is_computed_without_a_latent_is_the_same_in_every_draw():
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("fixed", torch.tensor([1.0, 2.0]))

    tree = to_datatree((model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0))), draws=3, batch_size=3)
    assert tree["posterior"].fixed.values[0].tolist() == [[1.0, 2.0]] * 3


def test_autoguides_of_noise_and_reparameterised_sites():
    """The flow's noise is the latent, x is computed from it; an auxiliary site of the guide is nobody's latent."""
    prior = DiffusionPrior(model_and_chain(3, (2,)), "flow", steps=4)

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.ones(2))
        pyro.factor("soft", -x.square().sum(-1))

    noisy = poutine.reparam(model, {"x": FlowReparam()})
    tree = to_datatree((noisy, AutoMultivariateNormal(noisy)), draws=30, batch_size=15)
    assert set(tree["posterior"].data_vars) == {"x", "x_T"}
    found = (torch.from_numpy(tree["posterior"][name].values[0]) for name in ("x", "x_T"))
    x, noise = found
    torch.testing.assert_close(prior.decode(noise), x)
    assert list(tree["observed_data"].data_vars) == list(tree["log_likelihood"].data_vars) == ["y"]
    assert math.isfinite(tree["diagnostics"].pareto_k)


def test_what_has_no_tree():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=3):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    for result in (3, torch.zeros(3), (1, 2), (guide,), [guide], []):
        with pytest.raises(OptionError, match=r"is no result|is not a pair|is not one of GibbsChain"):
            to_datatree(result)
    with pytest.raises(ProgramError, match="scaled or masked"):
        to_datatree((model, guide), draws=2)

    def part(x0: Tensor) -> None:
        with pyro.plate("data", 10, subsample_size=3, dim=-2):
            pyro.sample("y", dist.Normal(x0[:, 0], 1.0), obs=torch.zeros(3, 1))

    with pytest.raises(ProgramError, match=r"'data' draws 3 of 10"):
        to_datatree(particles(event=(1,)), program=part)
    with pytest.raises(ProgramError, match="'z' is not observed"):
        to_datatree(particles(event=(1,)), program=lambda x0: pyro.sample("z", dist.Normal(x0[:, 0], 1.0)))
    with pytest.raises(ShapeError, match="declare its event dims"):  # 100 draws of 100 pixels
        square = particles(event=(100,))
        to_datatree(square, program=lambda x0: pyro.sample("y", dist.Normal(x0, 1.0), obs=torch.zeros(100)))
    with pytest.raises(ProgramError, match="'z' of the model is latent"):
        to_datatree(gibbs(0)[0], program=lambda x0: pyro.sample("z", dist.Normal(x0[:, 0], 1.0)))
    with warnings.catch_warnings(), pytest.raises(ProgramError, match="not in the guide"):
        warnings.simplefilter("ignore", UserWarning)  # Pyro's own
        to_datatree((model, lambda: None), draws=2)

    def flat() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(z[..., None] * torch.ones(4), 1.0), obs=torch.zeros(4))

    assert to_datatree((flat, guide), draws=4)["log_likelihood"].y.shape == (1, 4, 4)
    with pytest.raises(ProgramError, match=r"'y' has batch shape \[4, 4, 4\]"):
        to_datatree((flat, guide), draws=4, batch_size=4)
    with pytest.raises(OptionError, match="draws=0"):
        guide_draws(model, guide, draws=0)
    with pytest.raises(OptionError, match="'betas'"):
        to_datatree(particles(), diffusion=model_and_chain(), cond={"betas": 1})
