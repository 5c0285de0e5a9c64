"""What the laboratory's numbers are exported to: tables in the labelled tree, models compared, pictures of the tables."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pyrodiff
from pyrodiff import plots
from pyrodiff.errors import DataError, OptionError, ShapeError
from pyrodiff.inference_data import compare_models, to_datatree, write

pd = pytest.importorskip("pandas")
xarray = pytest.importorskip("xarray")
az = pytest.importorskip("arviz")
NAN = math.nan


class Shrink(nn.Module):
    """A stand-in network with some error."""

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return 0.3 * x


def make(steps: int = 6) -> pyrodiff.GaussianDiffusion:
    return pyrodiff.GaussianDiffusion(Shrink(), pyrodiff.LogLinearSchedule(steps, -8.0, 6.0), (2,))


def estimator_table() -> Any:
    """Four estimators on two paths, one refused, and one of another target."""
    rows = [
        ("chain", "analytic", True, "elbo", 20.0, 4.0, 0.5, 0.0125, -0.5, "exact", ""),
        ("chain", "k2", False, "elbo", 20.0, 900.0, 90.0, 5.6e-5, 25.0, "exact", ""),
        ("importance, low discrepancy, 8", "k1", True, "elbo", 8.0, 30.0, 3.0, 0.0042, 1.5, "exact", "a remark"),
        ("chain", "analytic + c N", True, "elbo", NAN, NAN, NAN, NAN, NAN, "", "repeats=4 is below 8"),
        ("chain", "IWAE 16", False, "log p", 320.0, 0.3, 0.05, 0.0104, NAN, "", ""),
    ]
    columns = "path kl unbiased target evaluations variance variance_se efficiency z against reason".split()
    return pd.DataFrame(rows, columns=columns)


def term_table(steps: int) -> Any:
    t = np.arange(1, steps + 1)
    kl = np.append(5.0 / t, 1e-4)
    return pd.DataFrame(
        {
            "term": ["reconstruction", *["diffusion"] * (steps - 1), "prior"],
            "t": np.append(t, steps),
            "log_snr": np.append(6.0 - t, 6.0 - steps),
            "kl": kl,
            "se_noise": 0.1 * kl,
            "variance_analytic": np.append(1.0 / t**2, 0.0),
            "variance_monte_carlo": np.append(2.0 / t**2, 1e-5),
            "share": kl / kl.sum(),
        }
    )


def gradient_table() -> Any:
    rows = []
    for group, (i, name) in itertools.product(("net", "x0"), enumerate(("pathwise", "score function", "masked"))):
        unbiased = name != "masked"
        rows += [("one timestep", t, group, name, unbiased, 10.0**i / t, "") for t in (9, 1, 3)]
        refused = name == "masked"
        rows.append(("chain", NAN, group, name, unbiased, NAN if refused else 10.0**i, "no chain" if refused else ""))
    rows.append(("reverse samples", NAN, "net", "score function", True, 50.0, ""))
    return pd.DataFrame(rows, columns=["where", "t", "group", "estimator", "unbiased", "variance", "reason"])


# ---------------------------------------------------------------------- the tree


def test_tables_survive_the_file_and_arviz_reads_them(tmp_path: Path):
    terms = pyrodiff.elbo_terms(make(), torch.randn(3, 2))
    tables = {
        "estimators": estimator_table(),
        "timesteps": term_table(6),
        "gradients": gradient_table(),
        "odd": pd.DataFrame(
            {
                "none": [None, None],
                "mixed": [1.5, None],
                "whole": pd.array([1, None], dtype="Int64"),
                "flag": [True, False],
                "text": ["", "é, \u2212"],
            },
            dtype=object,
        ).astype({"whole": "Int64"}),
        "nullable": pd.DataFrame({"a": pd.array([1, 2], dtype="Int64"), "b": pd.array([True, False], dtype="boolean")}),
        "empty": estimator_table()[:0],
    }
    write(to_datatree(terms, tables=tables), tmp_path / "a.nc")
    data = az.from_netcdf(tmp_path / "a.nc")
    with xarray.open_datatree(tmp_path / "a.nc", engine="h5netcdf") as tree:
        for name in ("estimators", "timesteps", "gradients"):
            found = tree[name].to_dataset().to_dataframe()
            wanted = tables[name].fillna({key: "" for key in ("against", "reason") if key in tables[name]})
            assert set(found.columns) == set(wanted.columns) and tree[name].sizes == {"row": len(wanted)}
            for key in wanted:
                expected = wanted[key].to_numpy()
                for source in (found[key].to_numpy(), data[name][key].values):
                    if expected.dtype == object or isinstance(wanted[key].dtype, pd.StringDtype):
                        assert [str(x) for x in source] == list(expected)
                    else:
                        assert source.dtype == expected.dtype
                        np.testing.assert_array_equal(source, expected)
        estimators = tree["estimators"].to_dataset()
        assert estimators["path"].dtype.kind == "U" and "path" in estimators.coords
        assert estimators["variance"].attrs["units"] == "nats^2" and estimators["z"].attrs["units"] == "standard errors"
        odd = tree["odd"].to_dataset()
        assert odd["none"].values.tolist() == ["", ""] and odd["text"].values.tolist() == ["", "é, \u2212"]
        np.testing.assert_array_equal(odd["mixed"], [1.5, NAN])
        np.testing.assert_array_equal(odd["whole"], [1.0, NAN])
        assert odd["flag"].dtype == bool and odd["flag"].values.tolist() == [True, False]
        nullable = tree["nullable"].to_dataset()
        assert nullable["a"].dtype == np.int64 and nullable["b"].dtype == bool
        assert tree["empty"].sizes == {"row": 0}


def test_a_log_weight_is_what_the_programs_say():
    diffusion, x0 = make(), torch.randn(5, 2)
    pyro.set_rng_seed(3)
    terms = pyrodiff.elbo_terms(diffusion, x0)
    pyro.set_rng_seed(3)
    with diffusion.evaluating(), torch.no_grad():
        guide = poutine.trace(diffusion.guide).get_trace(x0)
        model = poutine.trace(poutine.replay(diffusion.model, trace=guide)).get_trace(x0)

    def log_prob(trace: Any) -> Tensor:
        trace.compute_log_prob()
        sites = [
            s for s in trace.nodes.values() if s["type"] == "sample" and "_Subsample" not in type(s["fn"]).__name__
        ]
        return torch.stack([site["log_prob"] for site in sites]).sum(0)

    weight = to_datatree(terms, diffusion=diffusion, chain=True)["elbo"]["log_weight"]
    assert weight.dims == ("chain", "draw", "obs_id") and weight.attrs["units"] == "nats"
    np.testing.assert_allclose(weight.values[0, 0], log_prob(model) - log_prob(guide), rtol=1e-5)


def test_the_importance_weighted_bound_of_all_chains(tmp_path: Path):
    draws = [torch.rand(4, 3).double() for _ in range(2)]
    kl = torch.rand(4, 3, 5).double()
    both = {"analytic": (draws[0], kl, draws[1]), "monte_carlo": (draws[0] + 1, kl + 1, draws[1])}
    t, weights = torch.arange(2, 7), torch.ones(5).double()
    terms = pyrodiff.ELBOTerms("analytic", 2, t, weights, both, 1)
    write(to_datatree(terms, chain=True), tmp_path / "a.nc")
    data = az.from_netcdf(tmp_path / "a.nc")
    log_weight = -(draws[0] + 1 + (kl + 1).sum(-1) + draws[1]).numpy()
    np.testing.assert_allclose(data["elbo"]["log_weight"].values[0], log_weight, rtol=1e-12)
    iwae = data["log_likelihood"]["iwae"]
    np.testing.assert_allclose(iwae.values[0, 0], np.log(np.exp(log_weight).mean(0)), rtol=1e-12)
    assert iwae.attrs["bound"] == "iwae" and iwae.attrs["K"] == 4 and iwae.attrs["kl"] == "monte_carlo"
    assert "PSIS-LOO" in iwae.attrs["comment"] and data["log_likelihood"]["elbo"].attrs["bound"] == "elbo"
    for name in ("elbo", "iwae"):
        with pytest.raises((TypeError, KeyError, ValueError, AttributeError)):
            az.loo(data, var_name=name)
    # nothing is a log-weight unless the caller says so
    plain = to_datatree(terms)
    assert "log_weight" not in plain["elbo"] and "iwae" not in plain["log_likelihood"]


def test_what_the_tree_refuses():
    diffusion = make()
    x0 = torch.randn(3, 2)
    for t in (2, torch.tensor([2, 3, 4, 5, 5]), torch.tensor([2, 3, 4])):
        with pytest.raises(OptionError, match=r"every timestep 2\.\.6"):
            to_datatree(pyrodiff.elbo_terms(diffusion, x0, t=t), diffusion=diffusion, chain=True)
    terms = pyrodiff.elbo_terms(diffusion, x0)
    with pytest.raises(OptionError, match=r"2\.\.7"):
        to_datatree(terms, diffusion=make(7), chain=True)
    with pytest.raises(OptionError, match="'elbo'"):
        to_datatree(terms, tables={"elbo": estimator_table()})
    for values in ([1.0, "a"], ["1", 2], [{}, {}], [object(), None]):
        with pytest.raises(OptionError, match="column 'a' of table 'b' holds neither numbers nor text"):
            to_datatree(terms, tables={"b": pd.DataFrame({"a": pd.Series(values, dtype=object)})})


# ---------------------------------------------------------------------- comparing models


def test_differences_and_their_paired_errors_are_the_closed_forms():
    images = 50
    difficulty = 30 * torch.randn(images).double() - 7000  # common to the models, and beyond what exp can represent
    scores = {
        "bad": difficulty - 3 + torch.randn(images),
        "good": difficulty + 2 + torch.randn(images),
        "fair": difficulty + torch.randn(images),
    }
    table = compare_models(scores, bound="iwae")
    assert list(table.columns) == ["rank", "iwae", "se", "elpd_diff", "dse", "weight"]
    assert list(table.index) == ["good", "fair", "bad"] and table["rank"].tolist() == [0, 1, 2]
    for name, score in scores.items():
        d = score - scores["good"]
        row = table.loc[name]
        assert row["iwae"] == pytest.approx(float(score.sum()), rel=1e-12)
        assert row["se"] == pytest.approx(math.sqrt(images * float(score.var(correction=0))), rel=1e-9)
        assert row["elpd_diff"] == pytest.approx(float(d.sum()), rel=1e-9, abs=1e-9)
        assert row["dse"] == pytest.approx(math.sqrt(images * float(d.var(correction=0))), rel=1e-9, abs=1e-9)
    assert table["dse"].max() < 0.1 * table["se"].min()  # pairing takes the common difficulty out
    assert table["weight"].sum() == pytest.approx(1) and table["weight"].idxmax() == "good"


def test_weights_are_those_of_the_best_mixture():
    # One model is far better on 30 images, another on 10: sum log(w) over the 30 + sum log(1 - w) over the 10 has its
    # maximum at w = 3/4. The third is never better.
    first = torch.arange(40) < 30
    base = torch.randn(40).double() - 100
    scores = {"a": base + 2000 * first, "b": base + 2000 * ~first, "c": base - 1}
    weight = compare_models(scores)["weight"]
    assert weight["a"] == pytest.approx(0.75, abs=1e-3) and weight["b"] == pytest.approx(0.25, abs=1e-3)
    assert weight["c"] == pytest.approx(0, abs=1e-6)
    equal = compare_models({"a": base, "b": base.float()})
    assert equal["elpd_diff"].abs().max() < 1e-3


def test_what_cannot_be_compared():
    good = torch.randn(5)
    nan = good.clone()
    nan[3] = NAN
    for error, scores, message in (
        (OptionError, {"a": good}, "at least two"),
        (OptionError, {}, "at least two"),
        (ShapeError, {"a": good, "b": good[:4]}, "'b' has scores of 4 images, 'a' of 5"),
        (ShapeError, {"a": good[:1], "b": good[:1]}, "B >= 2"),
        (ShapeError, {"a": good[None], "b": good[None]}, r"\[1, 5\]"),
        (DataError, {"a": good, "b": nan}, "'b' at image 3 is nan"),
        (DataError, {"a": good, "b": nan.nan_to_num(-math.inf)}, "'b' at image 3 is -inf"),
    ):
        with pytest.raises(error, match=message):
            compare_models(scores)
    with pytest.raises(OptionError, match="bound='loo'"):
        compare_models({"a": good, "b": good}, bound="loo")


# ---------------------------------------------------------------------- pictures


def dots(axes: Any) -> list[tuple[float, str, bool]]:
    """x, colour and whether it is filled, of every dot, from the top."""
    found = [line for line in axes.get_lines() if line.get_marker() not in ("None", "")]
    found.sort(key=lambda line: line.get_ydata()[0])
    return [(line.get_xdata()[0], line.get_color(), line.get_markerfacecolor() == line.get_color()) for line in found]


def overlapping(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other, and texts outside of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    unseen = set()  # labels of ticks beyond the limits, which matplotlib keeps
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low <= tick.get_loc() <= high:
                unseen |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text not in unseen]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text().strip() and t.get_visible()]
    width, height = figure.canvas.get_width_height()
    found = [
        (a, b) for (a, p), (b, q) in itertools.combinations(boxes, 2) if p.shrunk(0.9, 0.9).overlaps(q.shrunk(0.9, 0.9))
    ]
    return found + [(a, "edge") for a, p in boxes if p.x0 < -1 or p.y0 < -1 or p.x1 > width + 1 or p.y1 > height + 1]


def test_estimators_are_shown_with_what_has_no_number(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    table = estimator_table()
    figure = plots.estimators(table)
    efficiency, variance, z = figure.axes
    order = [0, 1, 2, 4]  # the refused one is left out
    for axes, column in ((efficiency, "efficiency"), (variance, "variance")):
        assert axes.get_xscale() == "log"
        assert [x for x, _, _ in dots(axes)] == table[column][order].tolist()
        low, high = axes.get_xlim()
        assert low <= table[column].min() and table[column].max() <= high
    assert [filled for _, _, filled in dots(variance)] == [True, False, True, False]
    assert len({colour for _, colour, _ in dots(variance)}) == 4  # analytic, k2, k1, IWAE
    assert [x for x, _, _ in dots(z)] == [-0.5, 25.0, 1.5] and z.get_xscale() == "symlog"
    assert z.patches[0].get_x() == -2 and z.patches[0].get_width() == 4 and "against exact" in z.get_xlabel()
    names = [label.get_text() for label in efficiency.get_yticklabels()]
    assert names == ["analytic", "k2", "k1", "IWAE 16"]
    paths = [text.get_text().replace("\n", " ") for text in efficiency.texts]
    assert paths == ["chain", "importance, low discrepancy, 8", "chain, bounds log p"]
    below = figure.get_supxlabel()
    assert "chain, analytic + c N: repeats=4 is below 8." in below and "a remark" not in below
    whisker = next(line for line in variance.get_lines() if len(line.get_xdata()) == 2)
    assert math.log(whisker.get_xdata()[1] / 4.0) == pytest.approx(0.5 / 4.0)
    assert overlapping(figure) == []
    for name in ("a", "b"):
        plots.save(plots.estimators(table), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert imread(tmp_path / "a.png").shape[1] == 1950  # 6.5 inches at 300


def test_estimators_that_do_not_fit_the_axes(tmp_path: Path):
    pytest.importorskip("matplotlib")
    table = estimator_table()
    table.loc[0, ["variance", "efficiency", "z"]] = [0.0, math.inf, NAN]
    table.loc[[1, 2, 4], "z"] = NAN
    table["against"] = NAN  # as read back from a file
    figure = plots.estimators(table)
    efficiency, variance, z = figure.axes
    assert "∞" in [text.get_text() for text in efficiency.texts] and "0" in [t.get_text() for t in variance.texts]
    assert len(dots(variance)) == 3 and dots(z) == [] and "nothing to hold against" in z.get_xlabel()
    plots.save(figure, tmp_path / "a.png")
    plots.save(plots.estimators(table[:1]), tmp_path / "a.png")
    refused = plots.estimators(table[3:4])
    assert dots(refused.axes[0]) == [] and "repeats=4 is below 8" in refused.get_supxlabel()
    plots.save(refused, tmp_path / "a.png")
    many = pd.concat([estimator_table().assign(path=f"{i} of the paths, with a long name") for i in range(3)])
    for most in (1.0, 12.0, 900.0, 3e6):
        assert overlapping(plots.estimators(many.assign(z=most))) == []


@pytest.mark.parametrize(
    "steps, x", [(1, "timestep"), (2, "log_snr"), (20, "log_snr"), (20, "timestep"), (1000, "timestep")]
)
def test_the_terms_by_timestep(steps: int, x: str):
    pytest.importorskip("matplotlib")
    table = term_table(steps)
    figure = plots.timesteps(table, x)
    left, middle, right = figure.axes
    at = table["t" if x == "timestep" else "log_snr"].to_numpy(dtype=float)
    lines = {line.get_label(): line for line in left.get_lines()}
    np.testing.assert_array_equal(lines["reverse step"].get_xdata(), at[1:-1])
    np.testing.assert_array_equal(lines["reverse step"].get_ydata(), table["kl"][1:-1])
    assert lines["reconstruction"].get_ydata() == [5.0] and lines["prior"].get_ydata() == [1e-4]
    assert left.get_yscale() == middle.get_yscale() == "log"
    lines = {line.get_label(): line for line in middle.get_lines()}
    np.testing.assert_array_equal(lines["analytic"].get_ydata(), table["variance_analytic"][1:-1])
    np.testing.assert_array_equal(lines["Monte Carlo"].get_ydata(), table["variance_monte_carlo"][1:-1])
    share = right.get_lines()[1]
    np.testing.assert_array_equal(share.get_xdata(), at)
    np.testing.assert_allclose(share.get_ydata(), 100 * table["share"].cumsum())
    assert share.get_ydata()[-1] == pytest.approx(100) and (left.get_xlim()[0] > left.get_xlim()[1]) == (
        x != "timestep"
    )
    assert f"reverse steps {table['kl'][1:-1].sum():.3g} ±" in figure.get_supxlabel()
    assert overlapping(figure) == []


def test_terms_that_do_not_fit_the_axes(tmp_path: Path):
    pytest.importorskip("matplotlib")
    table = term_table(20)
    table.loc[0, "kl"], table.loc[19, "log_snr"], table.loc[5, "kl"] = -3.0, -math.inf, NAN
    figure = plots.timesteps(table, "log_snr")
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert "reconstruction (below 0)" in labels and "reconstruction −3 ±" in figure.get_supxlabel()
    plots.save(figure, tmp_path / "a.png")


def test_gradients_by_group():
    pytest.importorskip("matplotlib")
    table = gradient_table()
    figure = plots.gradients(table)
    assert [axes.get_title("left") for axes in figure.axes] == [
        "net: one timestep",
        "net: whole chains",
        "x0: one timestep",
        "x0: whole chains",
    ]
    by_t, chains = figure.axes[:2]
    for i, line in enumerate(by_t.get_lines()):
        assert line.get_xdata().tolist() == [1, 3, 9] and line.get_ydata().tolist() == [10.0**i / t for t in (1, 3, 9)]
        assert (line.get_markerfacecolor() == line.get_color()) == (i < 2)  # the third is biased
    assert [x for x, _, _ in dots(chains)] == [1.0, 10.0, 50.0] and by_t.get_yscale() == chains.get_xscale() == "log"
    assert [text.get_text() for text in chains.texts] == ["chain", "reverse samples"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["pathwise", "score function", "masked"]
    assert "chain, masked: no chain." in figure.get_supxlabel()
    assert overlapping(figure) == []


def test_no_two_estimators_of_a_gradient_look_alike(tmp_path: Path):
    pytest.importorskip("matplotlib")
    rows = [("one timestep", 1, "net", f"{i}", True, 1.0 + i, "") for i in range(20)]
    table = pd.DataFrame(rows, columns=gradient_table().columns)
    handles = plots.gradients(table).legends[0].legend_handles
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 20
    for where in ("one timestep", "chain"):  # one side alone; and nothing at all
        part = gradient_table()[gradient_table()["where"] == where]
        assert len(plots.gradients(part).axes) == 2
        plots.save(plots.gradients(part.assign(variance=NAN)), tmp_path / "a.png")


def test_pictures_say_what_a_table_lacks():
    for picture, table in (
        (plots.estimators, estimator_table()),
        (plots.timesteps, term_table(3)),
        (plots.gradients, gradient_table()),
    ):
        column = table.columns[0]
        with pytest.raises(OptionError, match=f"no column '{column}'"):
            picture(table.drop(columns=column))
        with pytest.raises(OptionError, match="no rows"):
            picture(table[:0])
    with pytest.raises(OptionError, match="x='time'"):
        plots.timesteps(term_table(3), "time")
