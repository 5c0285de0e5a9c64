"""Examples: each runs, says what it shows and how long it takes; and the one-file re-telling agrees with the library."""

import ast
import importlib
import inspect
import re
import runpy
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import _common
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyrodiff

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))
TIME = r"\b(?:second|minute|hour)s?\b"
# What a smoke test writes: files, and of texts a part. What writes no file prints it.
WRITES = {
    "deblur": {"out/results.txt": "width in its 90 % interval", "out/patches.csv": "psnr_wiener", "out/patches.png": ""},
    "digits_bound": {"results.txt": "\nimmse: ", "metrics.jsonl": "bits"},
    "glucose": {"out/results.txt": "all 3 days", "out/gaps.csv": "crps", "out/days.png": ""},
    "guided_digits": {"guided_digits.png": ""},
    "inpaint_digits": {"out/results.txt": "lower half: 2 digits", "out/cases.csv": "random half", "out/digits.png": ""},
    "kl_study": {"study.md": "## At one random timestep, take the analytic KL", "study/gradients.csv": "variance"},
    "learned_schedule": {"variance.csv": "(least possible)", "finite_T.csv": "inf", "schedules.png": ""},
    "mini": {"": "whole chain"},
    "model_comparison": {"out/results.txt": "truth: outliers, 2 data sets", "out/cases.csv": "", "out/log_ratios.png": ""},
}  # fmt: skip
SLOW = {"deblur", "digits_bound", "guided_digits", "inpaint_digits", "kl_study", "learned_schedule"}

every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


@pytest.fixture
def command(monkeypatch):
    """An example as the command line runs it."""

    def run(path: Path, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")

    return run


def kept() -> dict[Path, int]:
    """When each file was written of the folders that scripts write to, when they are no smoke tests."""
    files = [path for folder in ("docs", "examples", "runs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files if not {"__pycache__", "_build"} & set(path.parts)}


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in SLOW), id=p.stem) for p in EXAMPLES]
)
def test_an_example_runs(command, monkeypatch, tmp_path, capsys, path):
    """The whole path, on a tiny setting; and nothing is written but into the temporary folder."""
    here, temporary, before = tmp_path / "here", tmp_path / "temporary", kept()
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(_common, "tempfile", SimpleNamespace(TemporaryDirectory=lambda: nullcontext(str(temporary))))
    command(path, "--smoke-test")
    printed = capsys.readouterr().out
    assert kept() == before and not list(here.iterdir())
    for name, text in WRITES[path.stem].items():
        if name.endswith(".png"):
            assert (temporary / name).read_bytes().startswith(b"\x89PNG")
        else:
            assert text in ((temporary / name).read_text(encoding="utf-8") if name else printed)
    for page in temporary.glob("*.md"):
        assert all(
            (temporary / link).is_file() for link in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text(encoding="utf-8"))
        )


def test_a_smoke_test_writes_where_told_or_to_a_folder_that_does_not_stay(monkeypatch, tmp_path):
    used: list[tuple[Path, int]] = []

    def main(out: Path = ROOT, steps: int = 1000) -> None:
        used.append((out, steps))
        (out / "written").touch()

    def smoke(folder: Path) -> dict[str, object]:
        return {"out": folder, "steps": 2}

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for arguments in (["--smoke-test"], ["--smoke-test", f"--out={tmp_path}"], [f"--out={tmp_path}", "--steps=3"]):
        monkeypatch.setattr(sys, "argv", ["example.py", *arguments])
        _common.command_line(main, smoke)
    (temporary, tiny), *told = used
    assert told == [(tmp_path, 2), (tmp_path, 3)] and tiny == 2
    assert temporary.parent == tmp_path and not temporary.exists()


@every_example
def test_an_example_says_what_it_shows_and_how_long_it_takes(command, capsys, path):
    """To --help too; the table in the documents says the same."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert len(text.splitlines()[0]) > 40 and re.search(TIME, text)
    with pytest.raises(SystemExit) as ended:
        command(path, "--help")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "--smoke-test" in shown and text.splitlines()[0] in " ".join(shown.split())
    rows = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    (time,) = re.findall(rf"^\| \[{path.stem}\]\(\.\./examples/{path.name}\) \|.*\| (.*) \|$", rows, flags=re.MULTILINE)
    assert re.search(TIME, time) and time in " ".join(text.split())


@every_example
def test_the_smoke_test_of_an_example_sets_what_there_is(tmp_path, path):
    """And every place to write to, or to read a model from, is in the temporary folder."""
    module = importlib.import_module(path.stem)
    if path.stem == "mini":  # which stands alone, and writes nothing
        return
    options, tiny = inspect.signature(module.main).parameters, module.smoke(tmp_path)
    assert set(tiny) <= set(options)
    assert "Args:" in inspect.getdoc(module.main)
    places = {name for name, option in options.items() if isinstance(option.default, Path)}
    assert "out" in places and all(tiny[name].is_relative_to(tmp_path) for name in places)
    assert _common.parser(module.main).parse_args(["--smoke-test"]).smoke_test


def test_the_study_links_to_the_functions_that_wrote_it():
    study = importlib.import_module("kl_study")
    page = (ROOT / "docs" / "kl_study.md").read_text(encoding="utf-8")
    found = re.findall(r"\[`(\w+)`\]\(\.\./examples/kl_study\.py#L(\d+)\)", page)
    assert {name: inspect.getsourcelines(getattr(study, name))[1] for name, _ in found} == {
        n: int(at) for n, at in found
    }
    assert len(found) == len(study.CLAIMS)


# ---------------------------------------------------------------------- the library in one file


@pytest.fixture
def mini(monkeypatch):
    """In double precision."""
    module = importlib.import_module("mini")
    monkeypatch.setattr(module, "net", module.Denoiser().double())
    return module


class Adapter(nn.Module):
    """The example's network, which takes t, as one that takes log-SNR and predicts x_0."""

    def __init__(self, net, schedule):
        super().__init__()
        self.net = net
        self.table = schedule.log_snr(torch.arange(1, schedule.steps + 1)).float()

    def forward(self, x, log_snr):
        return self.net(x, (log_snr[:, None] - self.table).abs().argmin(1) + 1)


def library(mini):
    """The same diffusion in the library."""
    schedule = pyrodiff.LinearSchedule(mini.T)
    return pyrodiff.GaussianDiffusion(Adapter(mini.net, schedule), schedule, (2,), prediction="x0")


def test_the_library_in_one_file_has_its_schedule_and_its_laws(mini):
    """To rounding, in float64."""
    ours, steps = library(mini), torch.arange(1, mini.T + 1)
    torch.testing.assert_close(mini.beta[1:], ours.schedule.betas, rtol=1e-12, atol=0)
    torch.testing.assert_close(mini.alpha_bar[1:], ours.schedule.log_snr(steps).sigmoid(), rtol=1e-12, atol=0)
    x0, x_t = mini.two_moons(mini.T).double(), torch.randn(mini.T, 2).double()
    q = ours.forward_process
    for theirs, law in (
        (mini.marginal(x0, steps), q.marginal(x0, steps)),
        (
            mini.dist.Normal(*mini.posterior_mean_std(x0[1:], x_t[1:], steps[1:])),
            q.posterior(x0[1:], x_t[1:], steps[1:]),
        ),
    ):
        torch.testing.assert_close(theirs.mean, law.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(theirs.stddev, law.stddev, rtol=1e-9, atol=0)


def test_the_library_in_one_file_has_each_term_of_its_bound(mini):
    """Site by site, from the same noise: the KLs, the Monte Carlo KLs and the reconstruction."""
    ours, x0, terms = library(mini), mini.two_moons(5).double(), []
    for model, guide in ((mini.model, mini.guide), (ours.model, ours.guide)):
        torch.manual_seed(0)
        q = poutine.trace(guide).get_trace(x0)
        p = poutine.trace(poutine.replay(model, q)).get_trace(x0)
        q.compute_log_prob()
        p.compute_log_prob()
        names = [f"x_{t}" for t in range(mini.T, 0, -1)]
        kl = [kl_divergence(q.nodes[name]["fn"], p.nodes[name]["fn"]) for name in names]
        ratio = [q.nodes[name]["log_prob"] - p.nodes[name]["log_prob"] for name in names]
        terms.append([torch.stack(kl), torch.stack(ratio), -p.nodes["x_0"]["log_prob"]])
    for theirs, here in zip(*terms, strict=True):
        torch.testing.assert_close(theirs, here, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("t", [None, torch.tensor([1, 2, 30, 50, 7])])
def test_the_library_in_one_file_has_its_bound(mini, elbo, t):
    ours, x0, losses = library(mini), mini.two_moons(5).double(), []
    for model, guide in ((mini.model, mini.guide), (ours.model, ours.guide)):
        torch.manual_seed(0)
        losses.append(elbo().loss(model, guide, x0, t))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_the_library_in_one_file_stands_alone(mini):
    text = Path(mini.__file__).read_text(encoding="utf-8")
    names = {name.split(".")[0] for name in re.findall(r"^ *(?:from|import) (\S+)", text, flags=re.MULTILINE)}
    assert names <= {"__future__", "argparse", "pyro", "torch"} and text.count("\n") < 200


def test_moved_digits():
    moves = importlib.import_module("digits_bound").MOVES
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    right, up = moves[0](x), moves[3](x)
    assert torch.equal(right[..., 1:], x[..., :-1]) and (right[..., 0] == -1).all()
    assert torch.equal(up[..., :-1, :], x[..., 1:, :]) and (up[..., -1, :] == -1).all()
