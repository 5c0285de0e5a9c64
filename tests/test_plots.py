"""Pictures: they show the numbers they were given, need no display, and are the same bytes every time."""

from __future__ import annotations

import builtins
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrodiff
from pyrodiff import plots
from pyrodiff.errors import OptionError, ProgramError, ShapeError
from pyrodiff.inference.smc import Posterior

pytest.importorskip("matplotlib")
from matplotlib.image import imread

R, B, STEPS = 3, 12, 20


def make_terms(
    t: Tensor | None = None, weights: Tensor | None = None, reconstruction: float = 2.0
) -> pyrodiff.ELBOTerms:
    if t is None:
        t = torch.arange(2, STEPS + 1)
    if weights is None:
        weights = torch.full(t.shape, (STEPS - 1) / t.shape[-1], dtype=torch.float64)
    kl = (5.0 / t.double()).expand(R, B, t.shape[-1])

    def noisy(x: Tensor, scale: float) -> Tensor:
        return x + scale * torch.randn(x.shape, dtype=torch.float64)

    flat = torch.ones(R, B, dtype=torch.float64)
    draws = {
        kind: (noisy(0.5 * flat, scale), noisy(kl, scale), noisy(reconstruction * flat, scale))
        for kind, scale in (("analytic", 0.01), ("monte_carlo", 0.3))
    }
    return pyrodiff.ELBOTerms("analytic", 16, t, weights, draws, 1)


def schedule(steps: int = STEPS) -> pyrodiff.schedules.Schedule:
    return pyrodiff.LogLinearSchedule(steps, -8.0, 6.0)


def lines(axes: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): tuple(map(np.asarray, line.get_data())) for line in axes.get_lines()}


def totals(terms: pyrodiff.ELBOTerms) -> dict[str, float]:
    return {
        "analytic KL": pyrodiff.bits_per_dim(terms.by("analytic")).mean,
        "Monte Carlo KL": pyrodiff.bits_per_dim(terms.by("monte_carlo")).mean,
    }


@pytest.mark.parametrize("x", ["timestep", "log_snr"])
def test_the_bound_by_timestep(tmp_path: Path, x: str):
    terms = make_terms()
    figure = plots.elbo_by_timestep(terms, schedule(), x)
    left, middle, _ = figure.axes
    for name, kl in (("analytic KL", "analytic"), ("Monte Carlo KL", "monte_carlo")):
        at, height = lines(left)[name]
        np.testing.assert_allclose(at, terms.t if x == "timestep" else schedule().log_snr(terms.t))
        per_image = terms.by(kl).diffusion
        np.testing.assert_allclose(height, per_image.mean(0))
        at, height = lines(middle)[name]
        assert height[-1] == pytest.approx(totals(terms)[name], rel=1e-6)
        assert height[0] == pytest.approx(pyrodiff.bits_per_dim(terms.by(kl), "reconstruction").mean)
        assert height[-1] - height[-2] == pytest.approx(pyrodiff.bits_per_dim(terms.by(kl), "prior").mean, abs=1e-6)
    bands = left.collections
    band = bands[1].get_datalim(left.transData)  # the analytic one is drawn last
    se = terms.diffusion.std(0) / math.sqrt(B)
    assert band.y1 == pytest.approx(float((terms.diffusion.mean(0) + se).max()))
    assert "timestep" in left.get_xlabel() if x == "timestep" else "SNR" in left.get_xlabel()
    title = figure.get_suptitle()
    for kl in ("analytic", "monte_carlo"):
        assert str(pyrodiff.bits_per_dim(terms.by(kl))) in title
    plots.save(figure, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[1] == 1800


def test_timesteps_of_their_own_go_into_bins():
    steps = 500
    t = torch.randint(2, steps + 1, (B, 40))
    terms = make_terms(t, torch.full(t.shape, (steps - 1) / 40, dtype=torch.float64))
    # one repeat: which timesteps the earlier ones had is not known
    draws = {kl: tuple(x[-1:] for x in values) for kl, values in terms.draws.items()}
    terms = pyrodiff.ELBOTerms("analytic", 16, terms.t, terms.weights, draws, 1)
    left, middle, _ = plots.elbo_by_timestep(terms, schedule(steps)).axes
    at, height = lines(left)["analytic KL"]
    assert 20 < len(at) <= 60
    size = math.ceil((int(t.max()) - int(t.min()) + 1) / 60)
    inside = (t - int(t.min())) // size == 0
    assert at[0] == pytest.approx(t[inside].double().mean())
    assert height[0] == pytest.approx(terms.diffusion[inside].mean())
    for name, total in totals(terms).items():
        assert lines(middle)[name][1][-1] == pytest.approx(total, rel=1e-6)


def test_timesteps_of_every_draws_own_and_unordered_ones():
    for t in (torch.randint(2, STEPS + 1, (R, B, 5)), torch.tensor([9, 3, 20, 3])):
        terms = make_terms(t)
        left, middle, _ = plots.elbo_by_timestep(terms, schedule()).axes
        at, height = lines(left)["analytic KL"]
        np.testing.assert_allclose(at, t.unique(), rtol=1e-12)
        np.testing.assert_allclose(height, 5 / at, atol=0.02)
        for name, total in totals(terms).items():
            assert lines(middle)[name][1][-1] == pytest.approx(total, rel=1e-6)


def test_repeats_with_timesteps_of_their_own_are_not_mixed_up():
    # elbo_terms draws the timesteps of every repeat afresh and keeps the last ones
    diffusion = pyrodiff.GaussianDiffusion(torch.nn.Identity(), schedule(), (1,), prediction="x0")
    diffusion.net.forward = lambda x, log_snr: 0 * x
    terms = pyrodiff.elbo_terms(diffusion, torch.ones(40, 1), t=2, repeats=5)
    left, _, _ = plots.elbo_by_timestep(terms, schedule()).axes
    at, height = lines(left)["analytic KL"]
    log_snr = schedule().log_snr(torch.arange(STEPS + 1))
    expected = 0.5 * (log_snr[:-1].exp() - log_snr[1:].exp())  # x0_hat = 0, x0 = 1
    np.testing.assert_allclose(height, expected[at.astype(int) - 1], rtol=1e-4)


def test_negative_parts_a_single_image_and_a_single_step(tmp_path: Path):
    terms = make_terms(reconstruction=-30.0)  # a density: the bound can be negative
    figure = plots.elbo_by_timestep(terms, schedule())
    assert len(figure.axes[1].child_axes) == 0  # no share of a negative bound
    plots.save(figure, tmp_path / "a.png")
    draws = {kl: tuple(x[:1, :1] for x in values) for kl, values in terms.draws.items()}
    one = pyrodiff.ELBOTerms("analytic", 16, terms.t, terms.weights, draws, 1)
    figure = plots.elbo_by_timestep(one, schedule())
    assert "nan" not in figure.get_suptitle()
    plots.save(figure, tmp_path / "a.png")
    empty = {kl: (prior, steps[..., :0], last) for kl, (prior, steps, last) in terms.draws.items()}
    one = pyrodiff.ELBOTerms("analytic", 16, terms.t[:0], terms.weights[:0], empty, 1)
    for x in ("timestep", "log_snr"):
        plots.save(plots.elbo_by_timestep(one, pyrodiff.CosineSchedule(1), x), tmp_path / "a.png")


def test_a_grid_shows_every_pixel_as_a_square(tmp_path: Path):
    x = torch.rand(5, 1, 8, 8) * 2 - 1
    x[0, 0, 0, 0], x[0, 0, 0, 1] = math.nan, 7.0
    figure = plots.image_grid(x)
    plots.save(figure, tmp_path / "grid.png")
    picture = (imread(tmp_path / "grid.png") * 255).round()
    scale, gap, margin = 9, 6, 10
    assert picture.shape[:2] == (2 * 72 + gap + 2 * margin, 3 * 72 + 2 * gap + 2 * margin)
    expected = ((x.nan_to_num(-1).clamp(-1, 1) + 1) / 2 * 255).round()
    for i in range(5):
        top, left = margin + i // 3 * (72 + gap), margin + i % 3 * (72 + gap)
        tile = picture[top : top + 72, left : left + 72, :3]
        big = expected[i, 0].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        np.testing.assert_allclose(tile, big.numpy()[..., None].repeat(3, -1), atol=1)
    assert (picture[margin + 72 + gap :, margin + 2 * (72 + gap) :] == 255).all()  # no sixth image


def test_colour_titles_and_columns(tmp_path: Path):
    figure = plots.image_grid(torch.rand(4, 3, 6, 5), (0, 1), columns=4, titles=list("abcd"))
    assert [text.get_text() for text in figure.axes[0].texts] == list("abcd")
    plots.save(figure, tmp_path / "a.png")
    assert plots.image_grid(torch.rand(2, 100, 90)).get_figwidth() < 3


def test_denoising_goes_from_noise_to_data():
    path = torch.rand(21, 3, 1, 8, 8)
    figure = plots.denoising(path, columns=5, rows=2)
    assert [text.get_text() for text in figure.axes[0].texts] == [f"$t = {t}$" for t in (20, 15, 10, 5, 0)]
    both = plots.denoising(path, x0_hat=path[:-1], columns=5, rows=2)
    assert both.get_figheight() > 1.7 * figure.get_figheight()
    kept = [1, 7, 20]
    respaced = plots.denoising(path[:4], [*reversed(kept), 0])
    assert [text.get_text() for text in respaced.axes[0].texts] == [f"$t = {t}$" for t in (20, 7, 1, 0)]


def test_training_curve(tmp_path: Path):
    records: list[dict[str, Any]] = [{"note": "no step"}, {"step": 3, "train_bits_per_dim": math.nan}]
    records += [{"step": 10 * i, "train_bits_per_dim": 1 + 50 / (1 + i)} for i in range(80)]
    validation = [(0, 9.0), (400, 2.0), (790, 1.5)]
    records += [
        {"step": step, "validation_bits_per_dim": value, "validation_bits_per_dim_se": 0.1}
        for step, value in validation
    ]
    figure = plots.training_curve(records)
    axes = figure.axes[0]
    at, height = lines(axes)["validation"]
    assert list(zip(at.tolist(), height.tolist(), strict=True)) == validation
    assert "train (running median)" in lines(axes) and "1.5000 bits/dim at step 790" in axes.get_title()
    assert axes.get_ylim()[1] < 40  # the first steps do not flatten the rest
    plots.save(figure, tmp_path / "a.png")
    few = plots.training_curve([{"step": 1, "train_bits_per_dim": 2.0}])
    assert list(lines(few.axes[0])) == ["train"]
    with pytest.raises(OptionError, match="train_bits_per_dim"):
        plots.training_curve([{"step": 1, "loss": 2.0}])


def particles(event: tuple[int, ...], repeats: int = 2, **fields: Any) -> Posterior:
    count = 30
    given = {
        "ess": torch.rand(repeats, 6).double() * count,
        "pareto_k": torch.rand(repeats, 6).double(),
        "families": torch.full((repeats,), 3.25).double(),
        "warnings": ("a collapse",),
    } | fields
    weights = 2 * torch.randn(repeats, count).double()
    return Posterior(
        "smc, test", torch.randn(repeats, count, *event), weights, network_evaluations=1, seconds=1.0, **given
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_posterior_of_images(tmp_path: Path, channels: int):
    found = particles((channels, 4, 5))
    observation = torch.rand(channels, 2, 2)
    observation[:, 0, 0] = math.nan
    figure = plots.posterior(found, observation, draws=3, data_range=(-2, 2), units="keV")
    panels = figure.axes[:6]
    assert [axes.get_title() for axes in panels] == [
        "observation",
        "mean",
        "standard deviation",
        "draw 1",
        "draw 2",
        "draw 3",
    ]
    shown = [torch.from_numpy(np.asarray(axes.images[0].get_array())) for axes in panels]
    mean = found.mean()
    deviation = found.mean(lambda x: (x - mean) ** 2).mean(0).sqrt()
    np.testing.assert_allclose(shown[2], deviation, rtol=1e-6)
    assert panels[2].images[0].get_clim() == (0, pytest.approx(float(deviation.max())))
    grey = ((mean + 2) / 4).clamp(0, 1).permute(1, 2, 0).expand(4, 5, 3)
    np.testing.assert_allclose(shown[1], grey, atol=1e-6)
    every = ((found.particles.flatten(0, 1) + 2) / 4).clamp(0, 1).permute(0, 2, 3, 1).expand(-1, 4, 5, 3)
    weights = found.weights.flatten()
    places = [int(((every - draw).abs() < 1e-6).flatten(1).all(1).nonzero()[0]) for draw in shown[3:]]
    for i, place in enumerate(places):  # the particle in whose share of the mass the place lies
        assert weights[:place].sum() <= (i + 0.5) / 3 <= weights[: place + 1].sum()
    np.testing.assert_allclose(shown[0][0, 0], plots._SAND)
    assert panels[0].get_xlabel() == "sand: not observed" and panels[1].get_xlabel() == ""
    bars = [axes.get_xlabel() for axes in figure.axes[6:] if axes.axison]
    assert bars == ["keV"] * (2 if channels == 1 else 1)
    assert figure.get_supxlabel() == "warning: a collapse"
    plots.save(figure, tmp_path / "a.png")
    plots.save(plots.posterior(torch.ones(2, 1, 3, 3), draws=0, data_range=(0, 1)), tmp_path / "a.png")  # no spread


def test_a_posterior_that_has_diverged_is_sand(tmp_path: Path):
    figure = plots.posterior(torch.full((3, 1, 4, 4), math.nan), draws=1)
    plots.save(figure, tmp_path / "a.png")
    assert [axes.get_xlabel() for axes in figure.axes].count("sand: not finite") == 2


def test_a_posterior_of_signals(tmp_path: Path):
    x = torch.randn(50, 2, 7)
    observation = torch.randn(2, 7)
    observation[0, 3] = math.nan
    figure = plots.posterior(x, observation, draws=2, units="mV")
    for c, axes in enumerate(figure.axes):
        drawn = lines(axes)
        np.testing.assert_allclose(drawn["mean"][1], x[:, c].mean(0), atol=1e-6)
        np.testing.assert_allclose(drawn["observation"][1], observation[c])
        outer = axes.collections[0].get_datalim(axes.transData)
        deviation = x[:, c].std(0, correction=0)
        assert outer.y1 == pytest.approx(float((x[:, c].mean(0) + 2 * deviation).max()))
        assert axes.get_ylabel() == f"channel {c} (mV)"
        np.testing.assert_allclose(drawn["draws"][1], x[12, c], rtol=1e-6)  # a quarter along 50
    plots.save(figure, tmp_path / "a.png")
    (axes,) = plots.posterior(particles((5,)), torch.zeros(5)).axes
    assert len(lines(axes)["mean"][1]) == 5


def test_diagnostics_of_particles(tmp_path: Path):
    found = particles((2,), ess=30 * torch.rand(2, 6).double())
    found.pareto_k[0, 2] = -math.inf
    figure = plots.smc_diagnostics(found)
    left, right = figure.axes
    at, height = left.lines[1].get_data()
    assert list(at) == [5, 4, 3, 2, 1, 0]
    np.testing.assert_allclose(height, 100 * found.ess[1] / 30)
    np.testing.assert_allclose(right.lines[1].get_ydata(), found.pareto_k[1])
    assert np.isnan(right.lines[0].get_ydata()).tolist() == [False, False, True, False, False, False]
    assert "families: 3.2, 3.2" in figure.get_suptitle() and "over repeats" in figure.get_suptitle()
    assert f"{found.evidence.log_z:.3f}".replace("-", "−") in figure.get_suptitle()
    assert figure.get_supxlabel() == "warning: a collapse"
    plots.save(figure, tmp_path / "a.png")
    one = plots.smc_diagnostics(particles((2,), 1, pareto_k=torch.full((1, 6), -math.inf).double()))
    assert "by families" in one.get_suptitle() and "no tail" in one.axes[1].texts[0].get_text()
    with pytest.raises(ProgramError, match="a heuristic"):
        plots.smc_diagnostics(particles((2,), no_evidence="a heuristic"))


def test_the_same_bytes_and_all_or_nothing(tmp_path: Path):
    for name in ("a", "b"):
        plots.save(plots.training_curve([{"step": 1, "train_bits_per_dim": 2.0}]), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    before = (tmp_path / "a.png").read_bytes()
    assert b"Software" not in before

    class Broken:
        def savefig(self, path: Path, **options: Any) -> None:
            path.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        plots.save(Broken(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_what_does_not_fit():
    terms = make_terms()
    for call in (
        lambda: plots.elbo_by_timestep(terms, schedule(5)),
        lambda: plots.image_grid(torch.zeros(3, 2, 8, 8)),
        lambda: plots.image_grid(torch.zeros(3, 64)),
        lambda: plots.image_grid(torch.zeros(0, 1, 8, 8)),
        lambda: plots.denoising(torch.zeros(3, 1, 8, 8)),
        lambda: plots.denoising(torch.zeros(3, 1, 1, 8, 8), [1, 0]),
        lambda: plots.denoising(torch.zeros(3, 1, 1, 8, 8), x0_hat=torch.zeros(3, 1, 1, 8, 8)),
        lambda: plots.posterior(torch.zeros(3)),
        lambda: plots.posterior(torch.zeros(3, 2, 8, 8)),
        lambda: plots.posterior(torch.zeros(0, 8)),
        lambda: plots.posterior(torch.zeros(3, 2, 8), torch.zeros(8)),
        lambda: plots.posterior(torch.zeros(3, 1, 8, 8), torch.zeros(3, 8, 8)),
    ):
        with pytest.raises(ShapeError):
            call()
    for call in (
        lambda: plots.elbo_by_timestep(terms, schedule(), "time"),
        lambda: plots.image_grid(torch.zeros(3, 1, 8, 8), (1, -1)),
        lambda: plots.image_grid(torch.zeros(3, 1, 8, 8), columns=0),
        lambda: plots.image_grid(torch.zeros(3, 1, 8, 8), titles=["a"]),
        lambda: plots.denoising(torch.zeros(3, 1, 1, 8, 8), columns=1),
        lambda: plots.posterior(torch.zeros(3, 1, 8, 8)),  # all the same: no scale
        lambda: plots.posterior(torch.zeros(3, 8), draws=-1),
    ):
        with pytest.raises(OptionError):
            call()


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match=r'pip install "pyrodiff\[demo\]"'):
        plots.image_grid(torch.zeros(3, 1, 8, 8))


def test_nothing_is_imported_early_and_pyplot_never():
    code = """
import sys, torch
from pyrodiff import inference_data, plots
heavy = {"matplotlib", "xarray", "arviz"} & set(sys.modules)
plots.image_grid(torch.zeros(3, 1, 8, 8))
print(sorted(heavy), "matplotlib.pyplot" in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert found.stdout.split("\n")[0] == "[] False"
