"""The command line: what it writes, what it refuses and how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import pyrodiff
from pyrodiff import cli, report
from pyrodiff.errors import OptionError
from pyrodiff.training import checkpoint

TINY = {
    "net.width": 8, "schedule.steps": 6, "training.steps": 4, "training.batch_size": 8,
    "scoring.timesteps": 3, "scoring.repeats": 2, "scoring.samples": 8, "scoring.sample_steps": 3,
}  # fmt: skip
VECTORS = {"config.json", "elbo.nc", "elbo_by_timestep.png", "ledger.json", "ledger.txt", "metrics.jsonl",
           "model.safetensors", "resume.safetensors", "resume.previous.safetensors",
           "run.yaml", "training.png"}  # fmt: skip
IMAGES = VECTORS | {"samples.png", "denoising.png"}


def flags(**changes: object) -> list[str]:
    options = {**TINY, **{k.replace("__", "."): v for k, v in changes.items()}}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in argv])
    return caught.value.code


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files, and one trained run: vectors.npy, images/, labelled/, run/."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    np.save(folder / "vectors.npy", rng.normal(size=(60, 3)).astype(np.float32))
    np.save(folder / "levels.npy", rng.integers(0, 5, size=(60, 3)))
    bad = rng.normal(size=(60, 3))
    bad[7, 1] = np.nan
    np.save(folder / "nan.npy", bad)
    np.save(folder / "empty.npy", np.zeros((0, 3), dtype=np.float32))
    np.save(folder / "strings.npy", np.array(["a", "b"]))
    (folder / "text.npy").write_text("not an array")
    image = pytest.importorskip("PIL.Image")
    for kind in ("images", "labelled/zero", "labelled/one"):
        (folder / kind).mkdir(parents=True)
        for i in range(24 if kind == "images" else 12):
            pixels = rng.integers(0, 256, size=(8, 8)).astype(np.uint8)
            image.fromarray(pixels).save(folder / kind / f"{i}.png")
    (folder / "mixed").mkdir()
    for size in (8, 9):
        for i in range(10):
            image.fromarray(np.zeros((size, size), np.uint8)).save(folder / "mixed" / f"{size}-{i}.png")
    (folder / "no-images").mkdir()
    assert run("train", folder / "vectors.npy", "--out", folder / "run", *flags(), "--progress", "false") == 0
    return folder


def names(folder: Path) -> set[str]:
    """What a person sees; but the best model before the last is there only if a validation bettered another."""
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")} - {"model.previous.safetensors"}


# ---------------------------------------------------------------------- what it does


def test_training_leaves_the_documented_files(data: Path):
    folder = data / "run"
    assert names(folder) == VECTORS
    assert all(path.stat().st_size > 0 for path in folder.iterdir() if path.name != ".lock")
    saved = yaml.safe_load((folder / "run.yaml").read_text())
    assert saved["net"]["width"] == 8 and saved["schedule"]["steps"] == 6 and saved["training"]["lr"] == 3e-3
    config = json.loads((folder / "config.json").read_text())
    assert config["network"]["name"] == "MLP" and config["bins"] is None
    rows = json.loads((folder / "ledger.json").read_text())
    assert {(row["kl"], row["part"]) for row in rows} >= {("analytic", "total"), ("monte_carlo", "prior")}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_arviz_opens_the_report(data: Path):
    xarray = pytest.importorskip("xarray")
    az = pytest.importorskip("arviz")
    with xarray.open_datatree(data / "run" / "elbo.nc", engine="h5netcdf") as tree:
        assert tree.groups
    assert az.from_netcdf(str(data / "run" / "elbo.nc")) is not None


def test_images_train_and_are_drawn(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("train", data / "images", "--out", tmp_path / "run", *flags(), "--net.multipliers", "[1]",
               "--net.attention", "[]", "--net.fourier_features", "[]") == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert names(tmp_path / "run") == IMAGES
    assert "24 images" in out and "bits/dim" in out and str(tmp_path / "run" / "samples.png") in out
    # no terminal: a line per validation, no bar
    assert [line.split(":")[0] for line in err.splitlines()] == [f"step {i} of 4" for i in (1, 2, 3, 4)]
    assert run("sample", tmp_path / "run", "--n", 4, "--out", tmp_path / "new" / "x.png", "--method", "ddim") == 0
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_upsampler_is_trained_scored_and_sampled_on_smaller_images(data: Path, tmp_path: Path, capsys):
    options = [*flags(), "--net.multipliers", "[1]", "--net.attention", "[]", "--net.fourier_features", "[]"]
    options += ["--progress", "false", "--net.conditional", "true", "--net.label_dropout", "0.2"]
    folder = tmp_path / "run"
    assert run("train", data / "labelled", "--out", folder, *options, "--net.low_res", 4) == 0
    diffusion = pyrodiff.load(folder)
    assert diffusion.net.config["low_res_channels"] == 1 and diffusion.net.null_cond == {"y": 2}
    # the run knows the size; another may be given, and a model without a run needs one
    for extra in ([], ["--low_res", 2], ["--label", 1, "--guidance_scale", 2]):
        assert run("sample", folder, "--n", 3, "--out", tmp_path / "x.npy", *extra) == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 1, 8, 8)
    assert run("elbo", folder, "--timesteps", 2) == 0
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    capsys.readouterr()
    assert run("elbo", tmp_path, "--data", data / "labelled", "--timesteps", 2) == 2
    assert "low_res=4 or so" in capsys.readouterr().err
    assert run("elbo", tmp_path, "--data", data / "labelled", "--timesteps", 2, "--low_res", 4) == 0
    assert run("elbo", folder, "--timesteps", 2, "--low_res", 9) == 2
    assert run("train", data / "vectors.npy", "--out", tmp_path / "v", *flags(), "--net.low_res", 4) == 2
    assert not (tmp_path / "v").exists()


def test_smaller_images_are_averages_of_pixels():
    """As guided-diffusion shrinks what its upsamplers are trained on; not smaller ones are refused."""
    net = pyrodiff.nets.UNet(1, width=8, multipliers=(1,), blocks=1, low_res_channels=1)
    diffusion = pyrodiff.GaussianDiffusion(net, pyrodiff.CosineSchedule(5), (1, 8, 8))
    x0 = torch.randn(2, 1, 8, 8)
    told = report.conditioning(diffusion, x0, None, 4)
    torch.testing.assert_close(told["low_res"], x0.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5)))
    for size in (0, 8, None):
        with pytest.raises(OptionError, match="low_res"):
            report.conditioning(diffusion, x0, None, size)


def test_continuous_time_and_a_learned_schedule(data: Path, tmp_path: Path, capsys):
    continuous = ["--schedule.kind", "learned", "--schedule.steps", "inf"]
    folder = tmp_path / "run"
    assert run("train", data / "vectors.npy", "--out", folder, *flags(), *continuous) == 2
    assert "low_discrepancy" in capsys.readouterr().err
    options = [*continuous, "--training.timesteps", "low_discrepancy", "--scoring.sample_steps", 3]
    assert run("train", data / "vectors.npy", "--out", tmp_path / "a", *flags(), *options, "--progress", "false") == 0
    assert "1000 steps of continuous time" in capsys.readouterr().out
    diffusion = pyrodiff.load(tmp_path / "a")
    assert diffusion.schedule.continuous and float(diffusion.schedule.log_snr_max.detach()) != 6.5
    again = ["--config", tmp_path / "a" / "run.yaml", "--out", tmp_path / "b", "--progress", "false"]
    assert run("train", *again) == 0
    assert run("elbo", tmp_path / "a", "--timesteps", 2) == 0
    assert run("sample", tmp_path / "a", "--n", 2, "--steps", 4, "--out", tmp_path / "x.npy") == 0
    for wrong in ("linear", "cosine"):
        assert run("train", data / "vectors.npy", "--schedule.kind", wrong, "--schedule.steps", "inf") == 2


def test_elbo_by_every_method_prints_the_same_table(data: Path, capsys):
    for method, options in (
        ("elbo", ["--timesteps", 2]),
        ("iwae", ["--options.chains", 4]),
        ("ode", ["--options.solver_steps", 3]),
        ("immse", ["--options.points", 3, "--options.pilot", 2]),
    ):
        assert run("elbo", data / "run", "--images", 3, "--repeats", 2, "--method", method, *options) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[3:7]] == ["-log", "nats", "bits/dim", "3"] and method in lines[2]
    for wrong, said in (
        (["--method", "iwae", "--options.points", 3], "an option of iwae='points' is not one of 'chains', 'alpha'"),
        (["--options.chains", 3], "name it with --method"),
        (["--method", "vlb"], "'elbo', 'iwae', 'ode', 'immse'"),
    ):
        assert run("elbo", data / "run", *wrong) == 2
        assert said in capsys.readouterr().err


def test_a_classifier_guides_from_the_command_line(data: Path, tmp_path: Path, capsys):
    options = [*flags(), "--net.multipliers", "[1]", "--net.attention", "[]", "--net.fourier_features", "[]"]
    assert run("train", data / "images", "--out", tmp_path / "run", *options, "--progress", "false") == 0
    schedule = pyrodiff.load(tmp_path / "run").schedule
    net = pyrodiff.nets.Classifier(1, classes=3, width=8, multipliers=(1,), blocks=1)
    torch.nn.init.normal_(net.pool.out.weight)
    pyrodiff.save(tmp_path / "classifier", pyrodiff.NoisyClassifier(net, schedule, (1, 8, 8)))

    def drawn(*extra: object) -> np.ndarray:
        assert run("sample", tmp_path / "run", "--n", 2, "--out", tmp_path / "x.npy", *extra) == 0
        return np.load(tmp_path / "x.npy")

    guide = ["--classifier", tmp_path / "classifier", "--label", 2]
    assert np.array_equal(drawn(), drawn(*guide, "--classifier_scale", 0))
    assert not np.array_equal(drawn(), drawn(*guide))
    capsys.readouterr()
    for mistake, said in (
        (guide[:2], "towards a label"),
        ([*guide[:2], "--label", 3], "label=3 is not in 0..2"),
        (["--classifier", tmp_path / "run", "--label", 1], "kind 'model', not 'classifier'"),
    ):
        assert run("sample", tmp_path / "run", "--n", 2, "--out", tmp_path / "x.npy", *mistake) == 2
        assert said in capsys.readouterr().err


def test_labelled_images_train_a_conditional_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [*flags(), "--net.multipliers", "[1]", "--net.attention", "[]", "--net.fourier_features", "[]"]
    folder = tmp_path / "run"
    assert (
        run("train", data / "labelled", "--out", folder, *options, "--net.conditional", "true", "--progress", "false")
        == 0
    )
    assert names(folder) == IMAGES | {"samples.json"}
    assert json.loads((folder / "samples.json").read_text())["class_shares"]
    assert run("elbo", folder, "--timesteps", 2, "--repeats", 1) == 0
    assert run("sample", folder, "--n", 3, "--label", 1, "--out", tmp_path / "x.npy") == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 1, 8, 8)
    capsys.readouterr()
    for bad in (["--label", "2"], ["--label", "-1"], []):
        assert run("sample", folder, "--n", 3, "--out", tmp_path / "y.npy", *bad) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "y.npy").exists()


def test_digits_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("sklearn")
    options = [*flags(), "--net.multipliers", "[1]", "--net.attention", "[]", "--scoring.images", "16"]
    assert run("train", "digits", "--out", tmp_path / "run", *options, "--progress", "false") == 0
    out = capsys.readouterr().out
    assert "1437/120/240" in out and "digits-Fréchet" in out
    assert names(tmp_path / "run") == IMAGES | {"samples.json"}


def test_integer_vectors_have_a_grid(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        run("train", data / "levels.npy", "--levels", 5, "--out", tmp_path / "run", *flags(), "--progress", "false")
        == 0
    )
    assert pyrodiff.load(tmp_path / "run").reverse_kernel.bins == (5, -1.0, 1.0)
    assert run("elbo", tmp_path / "run", "--timesteps", 2) == 0
    assert run("elbo", tmp_path / "run", "--data", data / "levels.npy", "--levels", 5) == 0
    capsys.readouterr()
    # another grid or none would give a number that means nothing
    for other in (["--data", data / "levels.npy", "--levels", "6"], ["--data", data / "vectors.npy"]):
        assert run("elbo", tmp_path / "run", *other) == 2
        assert "the model on 5 levels" in capsys.readouterr().err


def test_a_runs_own_yaml_reproduces_it_byte_for_byte(data: Path, tmp_path: Path):
    folder = tmp_path / "again"
    assert run("train", "--config", data / "run" / "run.yaml", "--out", folder, "--progress", "false") == 0
    for name in ("model.safetensors", "run.yaml", "config.json", "ledger.txt", "ledger.json"):
        assert (folder / name).read_bytes() == (data / "run" / name).read_bytes(), name
    # ... and another seed does not
    other = tmp_path / "other"
    assert run("train", "--config", data / "run" / "run.yaml", "--out", other, "--seed", 1, "--progress", "false") == 0
    assert (other / "model.safetensors").read_bytes() != (data / "run" / "model.safetensors").read_bytes()


def test_flags_override_yaml_and_print_config_shows_it(data: Path, capsys: pytest.CaptureFixture[str]):
    config = data / "run" / "run.yaml"
    assert run("train", "--config", config, "--net.width", 4, "--training.lr", "0.5", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["net"]["width"] == 4 and printed["training"]["lr"] == 0.5
    assert printed["schedule"]["steps"] == 6  # the file's, not the default


def test_elbo_prints_the_ledger(data: Path, capsys: pytest.CaptureFixture[str]):
    assert run("elbo", data / "run", "--timesteps", 0, "--split", "train", "--images", 5) == 0
    first = capsys.readouterr().out
    for word in ("analytic", "monte_carlo", "reconstruction", "± noise", "5 images of the train split", "bits/dim"):
        assert word in first
    assert run("elbo", data / "run" / "model.safetensors", "--timesteps", 0, "--split", "train", "--images", 5) == 0
    assert capsys.readouterr().out == first  # the run's data is found beside the file, and the noise is the seed's
    assert run("elbo", data / "run", "--chain", "false", "--timesteps", 0, "--seed", 1) == 0


def test_samples_depend_on_seed_and_index_alone(data: Path, tmp_path: Path):
    for name, n, seed in (("a", 5, 0), ("b", 3, 0), ("c", 3, 1)):
        assert run("sample", data / "run", "--n", n, "--seed", seed, "--out", tmp_path / f"{name}.npy") == 0
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    np.testing.assert_allclose(a[:3], b, atol=1e-5)
    assert a.shape == (5, 3) and not np.allclose(b, c)


def test_info(data: Path, capsys: pytest.CaptureFixture[str]):
    for path in (data / "run", data / "run" / "model.safetensors"):
        assert run("info", path) == 0
        out = capsys.readouterr().out
        assert "MLP" in out and "prediction: v" in out and '"step": 4' in out


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_teaches(command: str | None, capsys: pytest.CaptureFixture[str]):
    assert run(*[command] if command else [], "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    expected = {
        None: ["train", "elbo", "sample", "info", "diffusion models"],
        "train": ["digits", "mnist", "fashion-mnist", ".npy", "--config", "--training.lr", "low_discrepancy", "importance",
                  "--net.width", "analytic or monte_carlo", "--print_config", "bf16", "--resume"],
        "elbo": ["--split", "standard error", "--timesteps", "--repeats", "--se", "--over"],
        "compare": ["--examples", "--steps", "--iwae", "--controls", "--gradients", "comparison.nc"],
        "convert": ["diffusers", "guided-diffusion", "--card"],
        "sample": ["ancestral", "--steps", "--label", "--seed"],
        "info": ["model.safetensors"],
    }  # fmt: skip
    for word in expected[command]:
        assert word in out, word


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert pyrodiff.__version__ in capsys.readouterr().out


# ---------------------------------------------------------------------- resume


def test_a_run_is_neither_overwritten_nor_lost(data: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # without --out a taken folder gets a number
        assert run("train", data / "vectors.npy", *flags(), "--progress", "false") == 0
    assert names(tmp_path / "runs") == {"vectors.npy", "vectors.npy-2"}
    folder = tmp_path / "runs" / "vectors.npy"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    again = ["train", data / "vectors.npy", "--out", folder, *flags()]
    refused = [
        again,
        [*again, "--resume", "true", "--training.lr", "0.5"],
        [*again, "--resume", "true", "--net.width", "16"],
        [*again, "--resume", "true", "--scoring.samples", "0"],
    ]
    for argv in refused:
        assert run(*argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    with checkpoint.lock(folder):
        assert run(*again, "--resume", "true") == 2
        assert "in use" in capsys.readouterr().err
    empty = tmp_path / "empty"
    with checkpoint.lock(empty):  # a run that has just begun: nothing of it is saved yet
        assert run("train", data / "vectors.npy", "--out", empty, *flags()) == 2
    assert names(empty) == set()
    assert run(*again[:3], tmp_path / "nowhere", *flags(), "--resume", "true") == 2
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.reliability("F22")
def test_ctrl_c_saves_says_how_to_go_on_and_the_result_is_the_same(data: Path, tmp_path: Path, monkeypatch, capsys):
    loop = sys.modules["pyrodiff.training.fit"]
    original = loop._Run.step

    def step(self, *args):
        if self.result.steps == 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(loop._Run, "step", step)
    folder = tmp_path / "run"
    assert run("train", data / "vectors.npy", "--out", folder, *flags()) == 130
    monkeypatch.undo()
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    argv = out.splitlines()[-1].split("go on with: pyrodiff ")[1].split()
    assert run(*argv) == 0
    for name in ("model.safetensors", "ledger.txt", "run.yaml"):
        assert (folder / name).read_bytes() == (data / "run" / name).read_bytes(), name


# ---------------------------------------------------------------------- mistakes

BAD = [
    "", "fly", "--bogus", "train", "train {d}/vectors.npy --bogus 1", "train {d}/vectors.npy extra",
    "train {d}/nope.npy", "train {d}/nan.npy", "train {d}/empty.npy", "train {d}/strings.npy", "train {d}/text.npy",
    "train {d}/no-images", "train {d}/mixed", "train {d}/levels.npy", "train {d}/vectors.npy --levels 4",
    "train digits --data_dir {d}", "train mnist --data_dir {d}",
    "train {d}/vectors.npy --seed -1", "train {d}/vectors.npy --seed 1.5", "train {d}/vectors.npy --seed 99999999999999999999",
    "train {d}/vectors.npy --net.width x", "train {d}/vectors.npy --net.width 0", "train {d}/images --net.multipliers []",
    "train {d}/vectors.npy --net.conditional true", "train {d}/vectors.npy --net.nothing 3",
    "train {d}/images --net.resample foo", "train {d}/images --net.dropout 2",
    "train {d}/vectors.npy --schedule.kind foo", "train {d}/vectors.npy --schedule.steps 0",
    "train {d}/vectors.npy --schedule.steps -1", "train {d}/vectors.npy --schedule.steps 1000000000",
    "train {d}/vectors.npy --schedule.log_snr_min 5 --schedule.log_snr_max 1",
    "train {d}/vectors.npy --schedule.kind linear --schedule.steps 5",
    "train {d}/vectors.npy --model.prediction foo", "train {d}/vectors.npy --model.variance foo",
    "train {d}/vectors.npy --model.decoder foo", "train {d}/vectors.npy --model.objective foo",
    *(f"train {{d}}/vectors.npy --training.batch_size 8 --training.{option}" for option in (
        "steps 0", "batch_size 49", "batch_size 0", "accumulate 3", "lr nan", "lr 0", "lr_schedule foo", "clip_norm 0",
        "warmup -1", "weight_decay -1", "ema_decay 1", "kl foo", "timesteps foo", "precision fp8", "validate_every 0")),
    *(f"train {{d}}/vectors.npy --training.batch_size 8 --scoring.{option}" for option in (
        "timesteps -1", "repeats 0", "samples 1", "images 0", "sample_steps foo", "sample_steps 0")),
    "train {d}/vectors.npy --training.batch_size 8 --schedule.steps 1",
    "train {d}/vectors.npy --training.batch_size 8 --device abacus",
    "train {d}/vectors.npy --training.batch_size 8 --device meta",
    "train {d}/vectors.npy --training.batch_size 8 --device cuda:99",
    "train {d}/vectors.npy --resume true", "train {d}/vectors.npy --resume perhaps",
    "train --config {d}/nope.yaml",
    "elbo", "elbo {d}/nope", "elbo {d}/run --split foo", "elbo {d}/run --images 0", "elbo {d}/run --timesteps -1",
    "elbo {d}/run --repeats 0", "elbo {d}/run --data digits", "elbo {d}/run --data {d}/nope.npy", "elbo {d}/run --device abacus",
    "elbo {d}/run --seed -1", "elbo {d}/run/resume.safetensors", "elbo {d}/vectors.npy",
    "sample {d}/run --n 0 --out {d}/x.npy", "sample {d}/run --n 999999999999 --out {d}/x.npy",
    "sample {d}/run --out {d}/x.gif", "sample {d}/run --out {d}/x.png", "sample {d}/run --method foo --out {d}/x.npy",
    "sample {d}/run --eta 2 --out {d}/x.npy", "sample {d}/run --last foo --out {d}/x.npy",
    "sample {d}/run --label 0 --out {d}/x.npy", "sample {d}/run --steps 7 --out {d}/x.npy",
    "sample {d}/run --out {d}/vectors.npy/x.npy",
    "sample {d}/run --guidance_scale nan --out {d}/x.npy", "sample {d}/run --classifier_scale inf --out {d}/x.npy",
    "train {d}/vectors.npy --net.width 100000000", "train {d}/vectors.npy --net.width 99999999999999999998",
    "train {d}/vectors.npy --net.blocks 1001", "train {d}/images --net.multipliers [1,nan]", "train {d}/images --net.fourier_features [99]",
    "train {d}/vectors.npy --scoring.samples 1000001", "train {d}/vectors.npy --scoring.repeats 1000000000",
    "elbo {d}/run --repeats 1000001", "elbo {d}/run --timesteps 1000000000", "compare {d}/run --gradients 1000001",
    "compare {d}/run --timesteps [1,1000000000]",
    "info", "info {d}/nope", "info {d}/run/run.yaml", "info {d}/vectors.npy", "info {d}",
]  # fmt: skip


@pytest.mark.reliability("Q17", "F13", "F15", "F17", "F20", "F29")
@pytest.mark.parametrize("line", BAD)
def test_a_mistake_costs_one_line(line: str, data: Path, tmp_path: Path, monkeypatch, capsys, figure):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*") if path.is_file()}
    code = run(*line.format(d=data).split())
    out, err = capsys.readouterr()
    assert code == 2, err
    assert len(err.splitlines()) == 1 and err.startswith("pyrodiff: ") and len(err) > 20
    assert "Traceback" not in out + err
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*") if path.is_file()}
    assert not list(tmp_path.rglob("*.safetensors"))
    figure.count("Q17", "bad inputs", 1, at_least=2000)


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "broken": b"data: [x\nnet: {",
    "unknown key": b"data: {d}/vectors.npy\nnet:\n  widht: 3\n",
    "unknown section": b"data: {d}/vectors.npy\nnets: {width: 3}\n",
    "wrong type": b"data: {d}/vectors.npy\nnet: {width: wide}\n",
    "a section that is none": b"data: {d}/vectors.npy\nnet: 3\n",
    "tag": b'data: !!python/object/apply:os.system ["touch {d}/hacked"]\n',
    "new tag": b"data: !!python/object/new:os.system [touch {d}/hacked]\n",
    "bomb": BOMB.encode() + b"net: *i\n",
    "deep": b"[" * 5000,
    "deep and closed": b"net: " + b"[" * 3000 + b"]" * 3000,
    "not text": b"\xff\xfe\x00\x01",
    "empty": b"",
    "a list": b"- 1\n- 2\n",
    "a number": b"3\n",
    "null bytes": b"data: \x00\n",
}


@pytest.mark.reliability("Q17", "F29")
@pytest.mark.parametrize("name", BAD_YAML)
@pytest.mark.timeout(30)
def test_a_config_file_from_anywhere_is_safe(name: str, data: Path, tmp_path: Path, monkeypatch, capsys, figure):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(BAD_YAML[name].replace(b"{d}", str(data).encode()))
    code = run("train", "--config", "bad.yaml")
    out, err = capsys.readouterr()
    assert code == 2, err
    assert len(err.splitlines()) == 1 and "Traceback" not in out + err
    assert not (data / "hacked").exists() and names(tmp_path) == {"bad.yaml"}
    figure.count("Q17", "bad inputs", 1, at_least=2000)


@pytest.mark.parametrize(
    "text", ["", "[x", "- 1", "data: 3", "data: /nope", "data: {d}/vectors.npy\nseed: x", "net: {}", "\x00"]
)
@pytest.mark.reliability("F29")
def test_a_spoiled_run_yaml_is_said_to_be_so(text: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "model.safetensors").write_bytes((data / "run" / "model.safetensors").read_bytes())
    (tmp_path / "run.yaml").write_text(text.replace("{d}", str(data)))
    assert run("elbo", tmp_path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run("elbo", tmp_path, "--data", data / "vectors.npy", "--timesteps", 2) == 0
    (tmp_path / "metrics.jsonl").write_text("")
    assert run("info", tmp_path) == 0


def test_failures_have_a_code_of_their_own_and_debug_shows_where(data: Path, tmp_path: Path, monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(cli, "fit", fail)
    argv = ["train", data / "vectors.npy", "--out", tmp_path / "run", *flags()]
    assert run(*argv) == 1
    assert capsys.readouterr().err == "pyrodiff: RuntimeError: two lines (--debug shows where)\n"
    with pytest.raises(RuntimeError, match="two"):
        cli.main([*map(str, argv), "--debug"])


def test_what_the_machine_cannot_hold_is_refused(data: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(cli.os, "sysconf", lambda name: 10)  # 10 pages of 10 bytes
    assert run("train", data / "vectors.npy", "--out", tmp_path / "run", *flags()) == 2
    assert "parameters would take" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert run("sample", data / "run", "--n", 9, "--out", tmp_path / "x.npy") == 2
    assert "n=9 would take" in capsys.readouterr().err
    assert run("sample", data / "run", "--n", 8, "--out", tmp_path / "x.npy") == 0  # 96 bytes of 3 floats each
    assert run("elbo", data / "run", "--timesteps", 2, "--repeats", 1, "--images", 4) == 2  # 128 bytes
    assert "timesteps=2 and repeats=1 of 4 images would take" in capsys.readouterr().err


def test_samples_that_are_not_numbers_are_not_saved(data: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "draw", lambda *args, **options: torch.tensor([[1.0, 2, 3], [1, 2, float("nan")]]))
    assert run("sample", data / "run", "--n", 2, "--out", tmp_path / "x.npy") == 1
    assert "1 of 2 samples are not finite" in capsys.readouterr().err and names(tmp_path) == set()


def test_divergence_is_a_failure_and_says_where_the_state_is(data: Path, tmp_path: Path, capsys):
    argv = ["train", data / "vectors.npy", "--out", tmp_path / "run", *flags(training__steps=60)]
    loop = sys.modules["pyrodiff.training.fit"]
    original = loop._Run._loss
    loop._Run._loss = lambda self, *args: original(self, *args) * float("nan")
    try:
        assert run(*argv) == 1
    finally:
        loop._Run._loss = original
    err = capsys.readouterr().err.splitlines()[-1]
    assert "20 steps in a row" in err and str(tmp_path / "run") in err
    assert (tmp_path / "run" / "resume.safetensors").exists()


def test_one_repeat_has_no_standard_error_and_json_says_null(data: Path, tmp_path: Path):
    argv = ["train", data / "vectors.npy", "--out", tmp_path / "run", *flags(scoring__repeats=1)]
    assert run(*argv, "--progress", "false") == 0

    def refuse(constant):
        raise AssertionError(constant)

    for name in ("ledger.json", "metrics.jsonl"):
        for text in (
            (tmp_path / "run" / name).read_text().splitlines()
            if name.endswith("l")
            else [(tmp_path / "run" / name).read_text()]
        ):
            json.loads(text, parse_constant=refuse)


def test_without_matplotlib_training_ends_cleanly_and_says_so(data: Path, tmp_path: Path, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = tmp_path / "run"
    assert run("train", data / "images", "--out", folder, *flags(), "--net.multipliers", "[1]",
               "--net.attention", "[]", "--progress", "false") == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "no pictures" in out and "matplotlib" in out
    assert names(folder) == {name for name in IMAGES if not name.endswith(".png")}
    assert run("sample", folder, "--n", 2, "--out", tmp_path / "x.png") == 2
    assert "matplotlib" in capsys.readouterr().err


def test_the_random_state_is_left_alone(data: Path, tmp_path: Path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert run("train", data / "vectors.npy", "--out", tmp_path / "run", *flags(), "--progress", "false") == 0
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- real processes


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "pyrodiff", *map(str, argv)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.reliability("F27")
def test_a_reader_that_leaves_early_is_no_error(data: Path):
    reader, writer = os.pipe()
    process = subprocess.Popen(
        command("info", data / "run"), stdout=writer, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    os.close(writer)
    os.close(reader)  # gone before a line is written: the hardest case of `| head -1`
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@pytest.mark.reliability("F22")
def test_ctrl_c_of_a_process(data: Path, tmp_path: Path):
    folder = tmp_path / "run"
    options = flags(training__steps=100000, training__validate_every=50)
    process = subprocess.Popen(
        command("train", data / "vectors.npy", "--out", folder, *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    for _ in range(600):
        if (folder / "resume.safetensors").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "go on with" in out
    steps = checkpoint.read(folder / "resume.safetensors", kind="resume")["result"]["steps"]
    assert f"stopped at step {steps} of 100000" in out
    assert pyrodiff.load(folder).steps == 6


@pytest.mark.reliability("F21")
def test_streams_that_cannot_hold_every_character(data: Path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run("elbo", data / "run", "--timesteps", 2) == 0
    assert b"\\xb1 images" in stream.buffer.getvalue()  # ±
