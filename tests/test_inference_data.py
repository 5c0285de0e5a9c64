"""The labelled tree: every number where it belongs, and both generations of ArviZ able to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn

import pyrodiff
from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.inference_data import to_datatree, write

xarray = pytest.importorskip("xarray")
EVENT = (1, 4, 4)


class Shrink(nn.Module):
    """A stand-in network with some error."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return self.scale * x


def make(steps: int = 6) -> pyrodiff.GaussianDiffusion:
    return pyrodiff.GaussianDiffusion(
        Shrink(), pyrodiff.LogLinearSchedule(steps, -8.0, 6.0), EVENT, bins=(17, -1.0, 1.0)
    )


def levels(n: int) -> Tensor:
    return torch.randint(0, 17, (n, *EVENT)) / 8 - 1


def read_with_arviz(path: Path) -> Any:
    az = pytest.importorskip("arviz")
    return az, az.from_netcdf(path)


def test_every_number_is_where_it_belongs():
    diffusion, x0 = make(), levels(5)
    terms = pyrodiff.elbo_terms(diffusion, x0, repeats=3)
    samples, paths = pyrodiff.sample(diffusion, 7), pyrodiff.trajectory(diffusion, 2)
    tree = to_datatree(
        terms, diffusion=diffusion, x0=x0, samples=samples, trajectories=paths, attrs={"seed": 3, "extra": [1, None]}
    )
    elbo = tree["elbo"]
    assert dict(elbo.sizes) == {"chain": 1, "draw": 3, "obs_id": 5, "timestep": 5}
    for kl, suffix in (("monte_carlo", ""), ("analytic", "_analytic")):
        prior, steps, reconstruction = terms.draws[kl]
        assert elbo[f"kl{suffix}"].dims == ("chain", "draw", "obs_id", "timestep")
        assert elbo[f"kl{suffix}"].dtype == np.float32
        np.testing.assert_array_equal(elbo[f"kl{suffix}"].values[0], steps.float())
        np.testing.assert_array_equal(elbo[f"prior{suffix}"].values[0], prior)
        np.testing.assert_array_equal(elbo["reconstruction"].values[0], reconstruction)
        total = elbo[f"prior{suffix}"] + (elbo.weights * elbo[f"kl{suffix}"]).sum("timestep") + elbo.reconstruction
        np.testing.assert_allclose(elbo[f"elbo{suffix}"], -total, rtol=1e-6)
        np.testing.assert_allclose(elbo[f"elbo{suffix}"].mean("draw").values[0], terms.by(kl).elbo, rtol=1e-12)
    for name in ("kl", "kl_analytic", "prior", "prior_analytic", "reconstruction", "elbo", "elbo_analytic"):
        assert elbo[name].attrs["units"] == "nats"
    assert elbo.timestep.values.tolist() == [2, 3, 4, 5, 6]
    schedule = diffusion.schedule
    np.testing.assert_array_equal(elbo.log_snr, schedule.log_snr(terms.t))
    np.testing.assert_allclose(elbo.sigma, schedule.sigma(terms.t), rtol=1e-14)
    np.testing.assert_allclose(elbo.snr, schedule.log_snr(terms.t).exp(), rtol=1e-14)
    constant = tree["constant_data"]
    assert constant.timestep.values.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(constant.betas, schedule.betas)
    np.testing.assert_allclose(constant.alpha_bar, (1 - schedule.betas).cumprod(0), rtol=1e-12)
    np.testing.assert_array_equal(tree["observed_data"].x_0, x0)
    assert tree["observed_data"].x_0.dims == ("obs_id", "channel", "height", "width")
    np.testing.assert_array_equal(tree["prior_predictive"].x_0.values[0], samples)
    path = tree["trajectories"].x_t
    assert path.dims == ("chain", "draw", "state", "channel", "height", "width")
    assert path.timestep.values.tolist() == [6, 5, 4, 3, 2, 1, 0]
    np.testing.assert_array_equal(path.sel(chain=0, draw=1), paths[:, 1])
    attrs = tree.attrs
    assert attrs["inference_library"] == "pyro" and attrs["inference_library_version"] == pyro.__version__
    assert attrs["creation_library_version"] == pyrodiff.__version__ and attrs["created_at"].endswith("+00:00")
    assert json.loads(attrs["diffusion"]) == diffusion.config and attrs["network"] == "Shrink"
    assert attrs["seed"] == 3 and json.loads(attrs["extra"]) == [1, None]


def test_the_bound_is_named_a_bound_and_loo_refuses_it(tmp_path: Path):
    diffusion, x0 = make(), levels(5)
    terms = pyrodiff.elbo_terms(diffusion, x0, repeats=2)
    tree = to_datatree(terms)
    found = tree["log_likelihood"].elbo
    assert found.attrs["bound"] == "elbo" and found.attrs["kl"] == "analytic"
    np.testing.assert_array_equal(found.values[0, 0], terms.elbo)
    assert list(tree["log_likelihood"].data_vars) == ["elbo"] and "posterior" not in tree.children
    write(tree, tmp_path / "a.nc")
    az, data = read_with_arviz(tmp_path / "a.nc")
    with pytest.raises((TypeError, KeyError, ValueError, AttributeError)):
        az.loo(data, var_name="elbo")


def test_arviz_reads_summarises_and_plots(tmp_path: Path):
    diffusion, x0 = make(), levels(6)
    terms = pyrodiff.elbo_terms(diffusion, x0, repeats=4)
    tree = to_datatree(terms, diffusion=diffusion, x0=x0, samples=pyrodiff.sample(diffusion, 3))
    write(tree, tmp_path / "run.nc")
    az, data = read_with_arviz(tmp_path / "run.nc")
    groups = ("elbo", "log_likelihood", "observed_data", "prior_predictive", "constant_data")
    in_memory = az.from_datatree(tree) if hasattr(az, "from_datatree") else tree
    for source in (data, in_memory):
        for group in groups:
            for name, variable in tree[group].data_vars.items():
                np.testing.assert_array_equal(source[group][name].values, variable.values)
            assert source[group].attrs["inference_library"] == "pyro"
        assert source["elbo"]["kl"].attrs["units"] == "nats"
        assert source["elbo"]["snr"].dims == ("timestep",)
    table = az.summary(data, group="elbo", var_names=["elbo", "kl_analytic"], kind="stats")
    assert len(table) == 6 + 6 * 5
    first = float(table.loc["elbo[0]", "mean"])
    assert first == pytest.approx(float(terms.by("monte_carlo").elbo[0]), rel=0.01)
    if hasattr(az, "from_datatree"):  # 1.x has other names for its plots
        axes = az.plot_forest(data["elbo"], var_names=["elbo"], combined=True)
        figure = axes.ravel()[0].figure
        assert len(axes.ravel()[0].get_yticklabels()) == 6
        import matplotlib.pyplot as plt

        plt.close(figure)


def test_timesteps_of_their_own(tmp_path: Path):
    diffusion, x0 = make(), levels(5)
    terms = pyrodiff.elbo_terms(diffusion, x0, t=2)
    tree = to_datatree(terms, diffusion=diffusion)
    elbo = tree["elbo"]
    assert elbo.kl.dims == ("chain", "draw", "obs_id", "column")
    assert elbo.t.dims[-2:] == elbo.weights.dims[-2:] == elbo.snr.dims[-2:] == ("obs_id", "column")
    np.testing.assert_array_equal(elbo.t.values.reshape(5, 2), terms.t.reshape(5, 2))
    total = elbo.prior + (elbo.weights * elbo.kl).sum("column") + elbo.reconstruction
    np.testing.assert_allclose(elbo.elbo, -total, rtol=1e-6)
    write(tree, tmp_path / "a.nc")
    _, data = read_with_arviz(tmp_path / "a.nc")
    np.testing.assert_array_equal(data["elbo"]["t"].values, elbo.t.values)


def test_timesteps_of_every_draws_own():
    diffusion, t = make(), torch.randint(2, 7, (3, 5, 2))
    draws = (torch.rand(3, 5).double(), torch.rand(3, 5, 2).double(), torch.rand(3, 5).double())
    weights = torch.full(t.shape, 2.5, dtype=torch.float64)
    terms = pyrodiff.ELBOTerms("analytic", 16, t, weights, {"analytic": draws, "monte_carlo": draws}, 45)
    elbo = to_datatree(terms, diffusion=diffusion)["elbo"]
    assert elbo.t.dims == ("draw", "obs_id", "column")
    np.testing.assert_array_equal(elbo.t, t)


def test_one_step_some_steps_and_vectors(tmp_path: Path):
    diffusion, x0 = make(1), levels(2)
    write(to_datatree(pyrodiff.elbo_terms(diffusion, x0), diffusion=diffusion), tmp_path / "one.nc")
    with xarray.open_datatree(tmp_path / "one.nc", engine="h5netcdf") as found:
        assert found["elbo"].sizes["timestep"] == 0 and found["elbo"].elbo.shape == (1, 1, 2)
    diffusion = pyrodiff.GaussianDiffusion(Shrink(), pyrodiff.CosineSchedule(5), (3,))
    terms = pyrodiff.elbo_terms(diffusion, torch.randn(2, 3), t=torch.tensor([5, 2]))
    tree = to_datatree(terms, diffusion=diffusion, samples=torch.randn(4, 3), trajectories=torch.randn(3, 2, 3))
    assert tree["elbo"].timestep.values.tolist() == [5, 2]
    assert tree["prior_predictive"].x_0.dims == ("chain", "draw", "feature")
    assert "timestep" not in tree["trajectories"].coords  # a path along some of the steps


class PerElement(pyrodiff.schedules.Schedule):
    """Two log-SNRs per step, learned."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.event_dim = 4, 1
        self.shift = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))

    def log_snr(self, t: int | Tensor) -> Tensor:
        t = torch.as_tensor(t)
        value = torch.where(t == 0, torch.inf, 6.0 - 3.0 * t.double())
        return value[..., None] + self.shift

    @property
    def config(self) -> dict[str, object]:
        return {"schedule": "PerElement"}


def test_a_learned_schedule_per_element_is_averaged():
    diffusion = pyrodiff.GaussianDiffusion(Shrink(), PerElement(), (2,))
    tree = to_datatree(pyrodiff.elbo_terms(diffusion, torch.randn(3, 2)), diffusion=diffusion)
    np.testing.assert_allclose(tree["elbo"].log_snr, [0.5, -2.5, -5.5])
    assert tree["constant_data"].betas.shape == (4,)


def test_size_and_long_tables(tmp_path: Path):
    draws = (torch.rand(4, 240).double(), torch.rand(4, 240, 49).double(), torch.rand(4, 240).double())
    t = torch.arange(2, 51)
    terms = pyrodiff.ELBOTerms("analytic", 64, t, torch.ones(49).double(), {"analytic": draws, "monte_carlo": draws}, 1)
    write(to_datatree(terms, x0=torch.rand(240, 1, 8, 8), samples=torch.rand(256, 1, 8, 8)), tmp_path / "a.nc")
    assert (tmp_path / "a.nc").stat().st_size < 1e6
    # the betas of this schedule are longer than a netCDF attribute may be
    schedule = pyrodiff.TableSchedule(pyrodiff.LinearSchedule(4000).betas)
    diffusion = pyrodiff.GaussianDiffusion(Shrink(), schedule, EVENT)
    write(to_datatree(terms, diffusion=diffusion), tmp_path / "b.nc")
    with xarray.open_datatree(tmp_path / "b.nc", engine="h5netcdf") as found:
        assert json.loads(found.attrs["diffusion"])["schedule"] == {"schedule": "TableSchedule"}
        np.testing.assert_array_equal(found["constant_data"].betas, schedule.betas)


def test_what_does_not_fit():
    diffusion = make()
    terms = pyrodiff.elbo_terms(diffusion, levels(3))
    for wrong in (
        {"x0": torch.rand(4, *EVENT)},
        {"x0": torch.rand(*EVENT)},
        {"samples": torch.rand(4, 1, 4, 5)},
        {"samples": torch.rand(2, 4, *EVENT)},
        {"samples": torch.zeros(2, *EVENT, dtype=torch.int64)},
        {"trajectories": torch.rand(4, *EVENT)},
    ):
        with pytest.raises(ShapeError):
            to_datatree(terms, diffusion=diffusion, **wrong)
    with pytest.raises(ShapeError):
        to_datatree(terms, trajectories=torch.rand(4))
    for attrs in ({"a": object()}, {"a": "x" * 40_000}):
        with pytest.raises(OptionError, match="'a'"):
            to_datatree(terms, attrs=attrs)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree = to_datatree(pyrodiff.elbo_terms(make(), levels(3)))
    path = tmp_path / "a.nc"
    write(tree, path)
    write(tree, path)
    before = path.read_bytes()

    def fail(self: Any, file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(xarray.DataTree, "to_netcdf", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tree, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
