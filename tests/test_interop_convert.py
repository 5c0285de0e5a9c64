"""From each format to the others."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest
import torch

import pyrodiff
from pyrodiff import GaussianDiffusion
from pyrodiff.errors import CheckpointError, OptionError
from pyrodiff.interop.convert import FORMATS, convert, format_of, load
from pyrodiff.nets import UNet


def diffusion(**options: Any) -> GaussianDiffusion:
    """A network that every format can hold."""
    schedule = pyrodiff.CosineSchedule(20)
    arguments = {
        "out_channels": 2,
        "width": 32,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention": [1],
        "head_channels": 16,
        "norm_groups": 32,
        "time_embedding": "index",
        "log_snr_table": schedule.log_snr(torch.arange(1, 21)).tolist(),
    }
    net = UNet(1, **{**arguments, **options}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    bins = (256, -1.0, 1.0)
    return GaussianDiffusion(net, schedule, (1, 8, 8), variance="learned_range", decoder="openai", bins=bins, clip=True)


def path_of(folder: pathlib.Path, format: str) -> pathlib.Path:
    return folder / (f"{format}.pt" if format == "guided-diffusion" else format)


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_every_format_becomes_every_other(tmp_path, first, second):
    original = diffusion()
    pyrodiff.save(tmp_path / "original", original)
    written = convert(tmp_path / "original", path_of(tmp_path, first), first)
    assert all(path.is_file() for path in written)
    convert(path_of(tmp_path, first), path_of(tmp_path / "second", second), second)
    back = load(path_of(tmp_path / "second", second))
    assert format_of(path_of(tmp_path / "second", second)) == second
    assert back.config == original.config
    x, index, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 7, 19]), torch.tensor([1, 8, 20])
    with torch.no_grad():
        expected = original.net(x, index=index)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(back.net(x, index=index), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            back.reverse_kernel.predict(x, t).x0_hat, original.reverse_kernel.predict(x, t).x0_hat, atol=1e-4, rtol=1e-4
        )


def test_converted_weights_are_bit_for_bit_the_same(tmp_path):
    original = diffusion()
    pyrodiff.save(tmp_path / "a", original)
    convert(tmp_path / "a", tmp_path / "b.pt", "guided-diffusion")
    convert(tmp_path / "b.pt", tmp_path / "c", "diffusers")
    convert(tmp_path / "c", tmp_path / "d", "pyrodiff")
    state = load(tmp_path / "d").state_dict()
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())


def test_a_file_of_weights_counts_as_its_folder(tmp_path):
    pyrodiff.save(tmp_path / "a", diffusion())
    assert format_of(tmp_path / "a" / "model.safetensors") == "pyrodiff"
    convert(tmp_path / "a" / "model.safetensors", tmp_path / "b", "diffusers")


def test_a_converted_model_is_scored_and_sampled(tmp_path):
    pyrodiff.save(tmp_path / "a", diffusion())
    convert(tmp_path / "a", tmp_path / "b", "diffusers")
    convert(tmp_path / "b", tmp_path / "c", "pyrodiff")
    model = pyrodiff.load(tmp_path / "c").respace("4")
    assert pyrodiff.sample(model, 2).shape == (2, 1, 8, 8)
    x0 = torch.randint(0, 256, (2, 1, 8, 8)) / 127.5 - 1
    assert torch.isfinite(pyrodiff.elbo_terms(model, x0).elbo).all()


def test_what_is_refused(tmp_path):
    pyrodiff.save(tmp_path / "a", diffusion())
    for arguments, named in (
        ((tmp_path / "a", tmp_path / "b", "onnx"), "format='onnx'"),
        ((tmp_path / "a", tmp_path / "a", "diffusers"), "exists already"),
        ((tmp_path / "a", tmp_path / "b", "guided-diffusion"), "suffix"),
        ((tmp_path / "a", tmp_path / "b", "pyrodiff", "lsun_cat"), "card='lsun_cat'"),
    ):
        with pytest.raises(OptionError, match=named):
            convert(*arguments)
    assert not (tmp_path / "b").exists()


def test_nothing_is_written_over(tmp_path):
    pyrodiff.save(tmp_path / "a", diffusion())
    (tmp_path / "b.json").write_text("mine")
    with pytest.raises(OptionError, match="exists already"):
        convert(tmp_path / "a", tmp_path / "b.pt", "guided-diffusion")
    assert (tmp_path / "b.json").read_text() == "mine"
    assert not (tmp_path / "b.pt").exists()


def test_what_is_no_model(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "text", "empty", "other", "pipe", "absent"):
        with pytest.raises((CheckpointError, OptionError)) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "my.pt").write_bytes(b"PK")
    with pytest.raises(OptionError, match="flags of"):
        load(tmp_path / "my.pt")
