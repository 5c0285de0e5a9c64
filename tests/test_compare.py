"""``compare_estimators`` and ``pyrodiff compare``: one call, every table, files that open elsewhere."""

import copy
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray
from monte_carlo import any_seed, assert_estimate

import pyrodiff
from pyrodiff import cli
from pyrodiff.errors import OptionError, PyrodiffError, ShapeError
from pyrodiff.inference_data import to_datatree

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def diffusion():
    torch.manual_seed(0)
    net = pyrodiff.nets.MLP(3, width=16, depth=1)
    for parameter in net.parameters():  # a fresh network returns 0: nothing would depend on x
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    schedule = pyrodiff.LogLinearSchedule(12, -5.0, 5.0)
    return pyrodiff.GaussianDiffusion(net, schedule, (3,), prediction="v", bins=(17, -1.0, 1.0))


@pytest.fixture(scope="module")
def x0():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 17, (40, 3), generator=generator) / 8 - 1


@pytest.fixture(scope="module")
def comparison(diffusion, x0):
    options = {"repeats": 8, "timesteps": (1, 4), "iwae": (1, 2, 64), "controls": True, "gradients": 2}
    return pyrodiff.compare_estimators(diffusion, x0[:4], **options)


def test_one_call_answers(comparison, diffusion, x0):
    assert {"chain", "independent", "uniform, 1", "importance, low discrepancy, 4"} <= set(comparison.values.path)
    assert {"analytic", "k1", "k2", "k3", "analytic + c N", "IWAE 2"} <= set(comparison.values.kl)
    assert len(comparison.timesteps) == 13 and len(comparison.gradients) > 0 and comparison.bound is None
    # The ledger and the table are of the same chains.
    row = comparison.values.set_index(["path", "kl"]).loc[("chain", "analytic")]
    assert -float(comparison.terms.elbo.mean()) == pytest.approx(row["mean"], rel=1e-9)
    mc = comparison.values.set_index(["path", "kl"]).loc[("chain", "k1")]
    assert -float(comparison.terms.by("monte_carlo").elbo.mean()) == pytest.approx(mc["mean"], rel=1e-9)
    text = str(comparison)
    assert "two groups of 64 chains need repeats=128, not 8" in text and "T 12" in text


@pytest.mark.monte_carlo
def test_its_bound_is_that_of_the_ledger(diffusion, x0):
    options = {"repeats": 64, "timesteps": (1,), "iwae": (1,), "gradients": None}
    values = pyrodiff.compare_estimators(diffusion, x0[:4], **options, seed=any_seed()).values
    row = values.set_index(["path", "kl"]).loc[("chain", "analytic")]
    reference = pyrodiff.elbo_terms(diffusion, x0[:4], repeats=200)
    exact = pyrodiff.bits_per_dim(reference)
    unit = -float(reference.elbo.mean()) / exact.mean
    assert_estimate(row["mean"], math.hypot(row["se_noise"], unit * exact.se_noise), unit * exact.mean, detects=6.0)


def test_efficiency_is_what_it_says(comparison):
    table = comparison.values.dropna(subset="mean")
    np.testing.assert_allclose(table.efficiency, 1 / (table.variance * table.evaluations))
    z = table.dropna(subset="bias")
    np.testing.assert_allclose(z.z, z.bias / z.bias_se)


def test_everything_is_written(comparison, tmp_path):
    paths = comparison.save(tmp_path / "new" / "folder")
    names = {path.name for path in paths}
    tables = {"estimators.csv", "timesteps.csv", "gradients.csv"}
    assert tables | {"comparison.txt", "comparison.nc", "estimators.png", "timesteps.png", "gradients.png"} == names
    again = pd.read_csv(tmp_path / "new" / "folder" / "estimators.csv")
    np.testing.assert_allclose(again["mean"], comparison.values["mean"])
    with xarray.open_datatree(tmp_path / "new" / "folder" / "comparison.nc", engine="h5netcdf") as tree:
        assert {"elbo", "estimators", "timesteps", "gradients", "log_likelihood", "constant_data"} <= set(tree.children)


def test_without_matplotlib_the_numbers_are_there(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    names = {path.name for path in comparison.save(tmp_path)}
    assert names == {"estimators.csv", "timesteps.csv", "gradients.csv", "comparison.txt", "comparison.nc"}


def test_the_bound_of_a_pool(diffusion, x0):
    options = {"repeats": 2, "iwae": (), "timesteps": (), "gradients": None}
    pool = torch.cat([x0] * 30)
    found = pyrodiff.compare_estimators(diffusion, x0[:2], pool=pool, se=0.2, **options)
    assert found.bound.se_examples < 0.25 and found.gradients is None
    assert str(found.bound) in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 1}, "repeats=1"),
        ({"gradients": 1}, "gradients=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"timesteps": (0,)}, "timesteps"),
        ({"iwae": (0,)}, "iwae"),
        ({"se": 0.1}, "pool and se"),
        ({"seed": -1}, "seed=-1"),
        ({"exact": torch.zeros(3)}, "exact has shape"),
        ({"exact_log_prob": torch.zeros(2, 1)}, "exact_log_prob has shape"),
    ],
)
def test_mistakes_cost_one_line(diffusion, x0, options, message):
    with pytest.raises((OptionError, ShapeError), match=message) as caught:
        pyrodiff.compare_estimators(diffusion, x0[:2], **options)
    assert "\n" not in str(caught.value)


def test_data_off_the_grid_are_refused(diffusion, x0):
    with pytest.raises(PyrodiffError, match="x0"):
        pyrodiff.compare_estimators(diffusion, x0[:2] + 0.01)


@pytest.mark.slow
def test_the_command(tmp_path, capsys, x0):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 5, size=(80, 3)))
    train = [
        "train",
        tmp_path / "x.npy",
        "--levels",
        5,
        "--out",
        tmp_path / "run",
        "--net.width",
        8,
        "--schedule.steps",
        8,
    ]
    train += ["--training.steps", 3, "--scoring.samples", 4, "--scoring.timesteps", 2, "--scoring.sample_steps", 4]

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in (*arguments, "--progress", "false")])
        return ended.value.code

    assert run(*train) == 0
    capsys.readouterr()
    options = [
        "--examples",
        2,
        "--repeats",
        8,
        "--gradients",
        2,
        "--steps",
        4,
        "--timesteps",
        "[1,2]",
        "--controls",
        "true",
    ]
    assert run("compare", tmp_path / "run", *options) == 0
    printed = capsys.readouterr().out
    assert (
        "T 4" in printed
        and "forward order" in printed
        and str(tmp_path / "run" / "comparison" / "estimators.png") in printed
    )
    assert run("compare", tmp_path / "run", "--examples", 0) == 2
    assert "examples=0" in capsys.readouterr().err
    assert run("elbo", tmp_path / "run", "--se", 0.5, "--over", "noise", "--split", "train") == 0
    assert "bits/dim" in capsys.readouterr().out
    assert run("elbo", tmp_path / "run", "--se", 0.5, "--over", "pixels") == 2
    assert "over='pixels'" in capsys.readouterr().err


def test_the_tree_takes_tables(comparison, diffusion):
    tree = to_datatree(comparison.terms, diffusion=diffusion, tables={"estimators": comparison.values})
    assert tree["estimators"].dataset.sizes and "variance" in tree["estimators"].dataset


def test_one_image_without_its_batch_and_a_frozen_model_are_refused(diffusion, x0):
    with pytest.raises(ShapeError, match="with B >= 1"):
        pyrodiff.compare_estimators(diffusion, x0[0])
    frozen = copy.deepcopy(diffusion).requires_grad_(False)
    with pytest.raises(OptionError, match="no parameter of the diffusion requires a gradient"):
        pyrodiff.compare_estimators(frozen, x0[:2])
