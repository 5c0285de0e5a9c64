"""UNet2DModel folders from stored files: figures of diffusers, and what is refused. The package is not needed."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyrodiff
from pyrodiff import GaussianDiffusion
from pyrodiff.errors import CheckpointError, OptionError, ShapeError
from pyrodiff.interop import diffusers as interop
from pyrodiff.nets import UNet

DATA = pathlib.Path(__file__).parent / "data"
NAMES = ("ddpm", "adm")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a stored folder, to be spoilt."""
    return pathlib.Path(shutil.copytree(DATA / "diffusers_ddpm", tmp_path / "folder"))


def io(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    with np.load(DATA / f"diffusers_{name}" / "io.npz") as file:
        x, t, out = (torch.from_numpy(file[key]) for key in ("x", "t", "out"))
        return x, t, {"y": torch.from_numpy(file["y"])} if "y" in file else {}, out


def edit(path: pathlib.Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------------- stored figures


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_theirs(name):
    diffusion = interop.load(DATA / f"diffusers_{name}")
    x, timestep, cond, expected = io(name)
    assert expected.abs().max() > 0.1, "a figure this small would not tell a wrong network"
    log_snr = diffusion.schedule.log_snr(timestep + 1).float()
    with torch.no_grad():
        torch.testing.assert_close(diffusion.net(x, index=timestep, **cond), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(diffusion.net(x, log_snr, **cond), expected, atol=1e-5, rtol=0)
    assert not diffusion.training
    assert {p.dtype for p in diffusion.parameters()} == {torch.float32}, "stored in half precision"


def test_what_the_schedulers_say():
    ddpm, adm = (interop.load(DATA / f"diffusers_{name}") for name in NAMES)
    assert ddpm.config["schedule"] == pyrodiff.LinearSchedule(1000).config
    assert adm.config["schedule"] == pyrodiff.CosineSchedule(500).config
    options = [(d.config["prediction"], d.config["variance"], d.config["clip"]) for d in (ddpm, adm)]
    assert options == [("eps", "fixed_large", True), ("v", "learned_range", True)]


@pytest.mark.parametrize("name", NAMES)
def test_saving_gives_their_weights_back(tmp_path, name):
    interop.save(tmp_path, interop.load(DATA / f"diffusers_{name}"))
    theirs, back = (load_file(path / interop.WEIGHTS) for path in (DATA / f"diffusers_{name}", tmp_path))
    if name == "ddpm":  # cosines first, here
        weight = theirs["time_embedding.linear_1.weight"]
        theirs["time_embedding.linear_1.weight"] = torch.cat(weight.chunk(2, 1)[::-1], 1)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key].float()) for key in theirs)
    for file in ("config.json", "scheduler_config.json"):
        before, after = (json.loads((path / file).read_text()) for path in (DATA / f"diffusers_{name}", tmp_path))
        # what is said in another way, or not at all because it is the default
        ways = {"flip_sin_to_cos", "attn_norm_num_groups", "downsample_type", "upsample_type", "_diffusers_version"}
        assert {k: before[k] for k in after if k not in ways} == {k: v for k, v in after.items() if k not in ways}


def test_widths_survive_as_multiples():
    """int(multiple * first) is the width again, though the multiple is rounded: 1 / 49 * 49 < 1."""
    assert int(1 / 49 * 49) == 0
    for first in range(1, 130):
        for width in range(1, 130):
            assert int(interop._multiplier(width, first) * first) == width


# Configurations of the original DDPM's networks as diffusers has them; their sizes are from the paper, appendix B.
ORIGINAL: dict[str, Any] = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
CIFAR10 = {
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBA_HQ = {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}


@pytest.mark.parametrize(("config", "millions"), [(CIFAR10, 35.7), (CELEBA_HQ, 114)])
def test_sizes_of_the_original_networks(config, millions):
    arguments = interop._arguments({**interop._UNET, **ORIGINAL, **config}, pyrodiff.LinearSchedule(1000))
    with torch.device("meta"):
        net = UNet(**arguments)
    count = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert round(count, 1 if millions < 100 else None) == millions


@pytest.mark.parametrize(
    "wrong", [{"flip_sin_to_cos": True}, {"freq_shift": 0}, {"norm_eps": 0.1}, {"downsample_padding": 1}]
)
def test_what_the_weights_do_not_tell_matters(folder, wrong):
    """Negative control: a configuration that fits the weights' shapes and still is the wrong one."""
    edit(folder / "config.json", **wrong)
    x, timestep, _, expected = io("ddpm")
    with torch.no_grad():
        assert (interop.load(folder).net(x, index=timestep) - expected).abs().max() > 1e-3


def test_names_of_older_releases(folder):
    expected = interop.load(folder).net.state_dict()
    weights = folder / interop.WEIGHTS
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(weights).items():
        for new, name in old.items():
            key = key.replace(new, name)
        state[key] = value
    save_file(state, weights)
    assert all(torch.equal(value, expected[key]) for key, value in interop.load(folder).net.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"thresholding": True},
        {"rescale_betas_zero_snr": True},
        {"set_alpha_to_one": False},
        {"prediction_type": "flow"},
        {"variance_type": "learned"},
        {"variance_type": "fixed_large_log"},
        {"beta_schedule": "laplace"},
        {"clip_sample_range": 2.0},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**9},
        {"surprise": 1},
    ],
    ids=str,
)
def test_schedulers_that_are_refused(folder, changes):
    edit(folder / "scheduler_config.json", **changes)
    with pytest.raises(OptionError, match=next(iter(changes))) as error:
        interop.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("network", "options", "named"),
    [
        ({"fourier_features": [3]}, {}, "fourier_features"),
        ({"resample": "fixed"}, {}, "resample"),
        ({"norm_groups": None, "width": 24}, {}, "norm_groups"),
        ({"attention": [0, 1], "heads": 2}, {}, "attention head"),
        ({"multipliers": [0.5, 1]}, {}, "multipliers"),
        ({"middle_attention": "plain", "scale_shift": False}, {}, "middle_attention"),
        ({"low_res_channels": 2}, {}, "low_res_channels"),
        ({}, {"prediction": "score"}, "prediction"),
        ({"out_channels": 4}, {"variance": "learned"}, "variance"),
        ({}, {"clip": True, "bins": (17, 0, 16)}, "clip"),
    ],
    ids=str,
)
def test_what_diffusers_cannot_hold_is_named(tmp_path, network, options, named):
    net = UNet(2, **{"width": 16, "multipliers": [1, 2], "blocks": 1, "norm_groups": 4, **network})
    diffusion = GaussianDiffusion(net, pyrodiff.CosineSchedule(10), (2, 8, 8), **options)
    with pytest.raises(OptionError, match=named) as error:
        interop.save(tmp_path / "out", diffusion)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_null_class_is_their_last_class(tmp_path):
    net = UNet(2, width=16, multipliers=[1, 2], blocks=1, norm_groups=4, classes=3, label_dropout=0.2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    diffusion = GaussianDiffusion(net.eval(), pyrodiff.CosineSchedule(10), (2, 8, 8))
    interop.save(tmp_path, diffusion)
    assert json.loads((tmp_path / "config.json").read_text())["num_class_embeds"] == 4
    back = interop.load(tmp_path).net
    assert (back.config["classes"], back.null_cond, net.null_cond) == (4, {}, {"y": 3})
    x, log_snr = torch.randn(4, 2, 8, 8), diffusion.schedule.log_snr(torch.arange(1, 5)).float()
    with torch.no_grad():
        expected = net(x, log_snr, y=torch.arange(4))
        torch.testing.assert_close(back(x, log_snr, y=torch.arange(4)), expected, atol=1e-6, rtol=1e-6)
        assert (back(x, log_snr, y=torch.zeros(4, dtype=torch.int64)) - expected)[3].abs().max() > 1e-3


def test_vectors_have_no_unet(tmp_path):
    diffusion = GaussianDiffusion(pyrodiff.nets.MLP(2), pyrodiff.CosineSchedule(10), (2,))
    with pytest.raises(OptionError, match="MLP"):
        interop.save(tmp_path, diffusion)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "changes",
    [
        {"center_input_sample": True},
        {"time_embedding_type": "fourier"},
        {"time_embedding_dim": 17},
        {"mid_block_type": None},
        {"mid_block_scale_factor": 2},
        {"downsample_padding": 2},
        {"act_fn": "relu"},
        {"attn_norm_num_groups": 8},
        {"resnet_time_scale_shift": "spatial"},
        {"class_embed_type": "timestep"},
        {"norm_num_groups": None},
        {"norm_num_groups": 3},
        {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]},
        {"up_block_types": ["UpBlock2D", "KUpBlock2D"]},
        {"out_channels": 3},
        {"sample_size": None},
        {"surprise": 1},
    ],
    ids=str,
)
def test_networks_that_are_refused(folder, changes):
    edit(folder / "config.json", **changes)
    named = next(iter(changes)).replace("norm_num_groups", "norm_(num_)?groups")
    with pytest.raises(OptionError, match=named) as error:
        interop.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "attention at other levels"),
        ({"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}, "changing the resolution"),
        ({"block_out_channels": [16, 32, 64]}, "entries"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 10}, "num_train_timesteps"),
    ],
)
def test_combinations_that_are_refused(folder, changes, named):
    edit(folder / "config.json", **changes)
    with pytest.raises(OptionError, match=named):
        interop.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": "abc"},
        {"block_out_channels": []},
        {"block_out_channels": [0, 1]},
        {"block_out_channels": None},
        {"layers_per_block": 10**9},
        {"layers_per_block": "2"},
        {"layers_per_block": -1},
        {"in_channels": {}},
        {"sample_size": [1, 2, 3]},
        {"norm_eps": "x"},
        {"dropout": None},
        {"num_class_embeds": -4},
        {"down_block_types": None},
        {"freq_shift": [1]},
        {"freq_shift": 8},
    ],
    ids=str,
)
def test_hostile_configurations_end_in_one_line(folder, changes):
    edit(folder / "config.json", **changes)
    with pytest.raises((CheckpointError, OptionError)) as error:
        interop.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"trained_betas": "abc"},
        {"trained_betas": [[0.1]]},
        {"trained_betas": [float("nan")]},
        {"trained_betas": []},
        {"beta_start": None},
        {"beta_start": -1.0, "beta_schedule": "scaled_linear"},
        {"clip_sample": "yes"},
        {"clip_sample": []},
        {"num_train_timesteps": True},
    ],
    ids=str,
)
def test_hostile_schedulers_end_in_one_line(folder, changes):
    edit(folder / "scheduler_config.json", **changes)
    with pytest.raises((CheckpointError, OptionError, ShapeError)) as error:
        interop.load(folder)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_described(folder):
    weights = folder / interop.WEIGHTS
    state = load_file(weights)
    del state["conv_out.bias"]
    state["ghost.weight"] = torch.zeros(1)
    state["conv_in.bias"] = torch.zeros(7)
    state["conv_norm_out.bias"][0] = torch.nan
    save_file(state, weights)
    with pytest.raises(CheckpointError) as error:
        interop.load(folder)
    assert "1 missing (conv_out.bias)" in str(error.value)
    assert "1 unexpected (ghost.weight)" in str(error.value)
    assert "1 of the wrong shape (conv_in.bias [7] for [16])" in str(error.value)
    assert "1 not finite (conv_norm_out.bias)" in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights(folder, keep):
    weights = folder / interop.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        interop.load(folder)


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", interop.WEIGHTS])
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        interop.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1', "[" * 100_000, "\xff"], ids=range(6))
def test_files_that_are_no_json(folder, text):
    (folder / "scheduler_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError) as error:
        interop.load(folder)
    assert "\n" not in str(error.value)


def test_the_package_is_not_needed(tmp_path):
    program = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from pyrodiff.interop import diffusers\n"
        "diffusers.save(sys.argv[2], diffusers.load(sys.argv[1]))"
    )
    arguments = [sys.executable, "-W", "error", "-c", program, str(DATA / "diffusers_adm"), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=DATA.parents[1])
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert (tmp_path / interop.WEIGHTS).is_file()
