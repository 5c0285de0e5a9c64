"""The UNet against guided-diffusion: outputs on stored weights, and sizes of published networks."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from pyrodiff.errors import CheckpointError
from pyrodiff.interop.guided_diffusion import load_unet, parameter_names, unet_arguments
from pyrodiff.nets import UNet

DATA = pathlib.Path(__file__).parent / "data"
NAMES = ("u1", "u2", "u3")


def arguments(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"unet_{name}.json").read_text())


def weights(name: str) -> dict[str, torch.Tensor]:
    return torch.load(DATA / f"unet_{name}.pt", weights_only=True)


def io(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    with np.load(DATA / f"unet_{name}_io.npz") as file:
        x, t, out = (torch.from_numpy(file[key]) for key in ("x", "t", "out"))
        cond = {"y": torch.from_numpy(file["y"])} if "y" in file else {}
    return x, t, cond, out


@pytest.mark.reliability("Q7")
@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_guided_diffusion(name, figure):
    net = load_unet(DATA / f"unet_{name}.pt", **arguments(name))
    x, t, cond, expected = io(name)
    with torch.no_grad():
        out = net(x, index=t, **cond)
    assert not net.training
    assert out.dtype == torch.float32
    assert expected.abs().max() > 0.1, "a figure this small would not tell a wrong network"
    assert out.shape == expected.shape
    figure("Q7", "guided-diffusion's UNet, its weights", (out - expected).abs().max().item(), at_most=1e-5)


@pytest.mark.parametrize("wrong", [{"use_new_attention_order": True}, {"num_heads": 2}])
def test_what_the_file_does_not_tell_matters(wrong):
    """Negative control: arguments that fit the weights' shapes and still are the wrong ones."""
    net = load_unet(DATA / "unet_u1.pt", **{**arguments("u1"), **wrong})
    x, t, cond, expected = io("u1")
    with torch.no_grad():
        out = net(x, index=t, **cond)
    assert (out - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_reaches_the_same_index(name):
    table = torch.linspace(9.0, -11.0, 1000).tolist()
    net = load_unet(DATA / f"unet_{name}.pt", log_snr_table=table, **arguments(name))
    x, t, cond, expected = io(name)
    log_snr = torch.tensor([table[int(i)] for i in t])
    with torch.no_grad():
        torch.testing.assert_close(net(x, log_snr, **cond), expected, atol=1e-5, rtol=0)


def test_index_step_rescales_the_index():
    table = torch.linspace(9.0, -11.0, 4000).tolist()
    net = load_unet(DATA / "unet_u3.pt", log_snr_table=table, index_step=0.25, **arguments("u3"))
    x, t, _, expected = io("u3")
    log_snr = torch.tensor([table[4 * int(i)] for i in t])
    with torch.no_grad():
        torch.testing.assert_close(net(x, log_snr), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_key_mapping_is_one_to_one(name):
    foreign = arguments(name)
    net = UNet(**unet_arguments(**foreign))
    names = parameter_names(net)
    assert list(names) == list(net.state_dict())
    assert sorted(names.values()) == sorted(weights(name))


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ({}, {"heads": 1, "decoder_heads": None, "head_channels": None, "resample": "conv"}),
        ({}, {"attention_order": "heads_first", "scale_shift": False, "classes": None}),
        ({"num_heads": 4, "num_heads_upsample": 2}, {"heads": 4, "decoder_heads": 2}),
        (
            {"num_heads": 4, "num_heads_upsample": 2, "num_head_channels": 8},
            {"decoder_heads": None, "head_channels": 8},
        ),
        ({"conv_resample": False}, {"resample": "fixed"}),
        ({"conv_resample": False, "resblock_updown": True}, {"resample": "residual"}),
        ({"attention_resolutions": (1, 8, 16)}, {"attention": [0, 3]}),
        ({"dims": 1}, {"dims": 1, "resample_axes": 1}),
        ({"use_checkpoint": True, "use_fp16": True, "image_size": 64}, {"checkpointing": True}),
    ],
)
def test_translation_of_arguments(foreign, ours):
    required = {
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
    }
    config = unet_arguments(**{**required, **foreign})
    assert {key: config[key] for key in ours} == ours
    assert UNet(**config).config.items() >= json.loads(json.dumps(config)).items()


# Flags of the published checkpoints; attention as downsampling factors.
ADM: dict[str, Any] = {
    "in_channels": 3,
    "model_channels": 256,
    "out_channels": 6,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "num_classes": 1000,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
IDDPM: dict[str, Any] = {
    "in_channels": 3,
    "model_channels": 128,
    "out_channels": 6,
    "num_res_blocks": 3,
    "num_heads": 4,
    "use_scale_shift_norm": True,
}
PUBLISHED: dict[str, tuple[dict[str, Any], float, int]] = {
    "ADM-64": (
        {
            **ADM,
            "model_channels": 192,
            "num_res_blocks": 3,
            "channel_mult": (1, 2, 3, 4),
            "attention_resolutions": (2, 4, 8),
            "dropout": 0.1,
            "use_new_attention_order": True,
        },
        295.9,
        541,
    ),
    "ADM-128": (
        {
            **ADM,
            "num_heads": 4,
            "num_head_channels": -1,
            "channel_mult": (1, 1, 2, 3, 4),
            "attention_resolutions": (4, 8, 16),
        },
        421.5,
        493,
    ),
    "ADM-256": (
        {**ADM, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (8, 16, 32)},
        553.8,
        567,
    ),
    "ADM-256-unconditional": (
        {
            **ADM,
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "attention_resolutions": (8, 16, 32),
            "num_classes": None,
        },
        552.8,
        566,
    ),
    "ADM-512": (
        {**ADM, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_resolutions": (16, 32, 64)},
        559.0,
        645,
    ),
    "iDDPM-ImageNet-64": (
        {**IDDPM, "channel_mult": (1, 2, 3, 4), "attention_resolutions": (4, 8)},
        121.1,
        450,
    ),
    "iDDPM-CIFAR-10": (
        {**IDDPM, "channel_mult": (1, 2, 2, 2), "attention_resolutions": (2, 4)},
        52.5,
        446,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_networks(name):
    foreign, millions, tensors = PUBLISHED[name]
    with torch.device("meta"):
        net = UNet(**unet_arguments(**foreign))
    count = sum(parameter.numel() for parameter in net.parameters())
    assert round(count / 1e6, 1) == millions
    assert len(net.state_dict()) == tensors


def save(tmp_path, content) -> pathlib.Path:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    return path


def one_line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_file_that_does_not_fit_is_described(tmp_path):
    state = weights("u3")
    del state["out.2.bias"]
    state["ghost.weight"] = torch.zeros(1)
    state["out.0.weight"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        load_unet(save(tmp_path, state), **arguments("u3"))
    message = one_line(error)
    assert "1 missing (out.2.bias)" in message
    assert "1 unexpected (ghost.weight)" in message
    assert "1 of the wrong shape (out.0.weight [7] for [32])" in message


def test_wrong_arguments_are_described():
    with pytest.raises(CheckpointError) as error:
        load_unet(DATA / "unet_u3.pt", **{**arguments("u3"), "num_res_blocks": 2})
    assert "missing" in one_line(error)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(2)])
def test_other_content_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="no state dict"):
        load_unet(save(tmp_path, content), **arguments("u3"))


def test_unreadable_files_are_refused(tmp_path):
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"not a checkpoint")
    for path in (garbage, tmp_path / "absent.pt"):
        with pytest.raises(CheckpointError) as error:
            load_unet(path, **arguments("u3"))
        assert str(path) in one_line(error)


def test_three_dimensional_networks_keep_their_first_axis():
    foreign = {**arguments("u3"), "dims": 3}
    net = UNet(**unet_arguments(**foreign))
    assert net(torch.zeros(1, 1, 3, 4, 4), index=torch.zeros(1)).shape == (1, 1, 3, 4, 4)
