"""UNet2DModel folders, both ways, against the installed package: skipped without it."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import pytest
import torch

import pyrodiff
from pyrodiff import GaussianDiffusion
from pyrodiff.errors import OptionError
from pyrodiff.interop import diffusers as interop
from pyrodiff.nets import UNet

peer = pytest.importorskip("diffusers")


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """It imports its classes when they are first asked for, some of them not without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("UNet2DModel", "DDPMPipeline", "DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):
            getattr(peer, name)


TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
ATTENTION = {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
RESNET = {
    "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {**ATTENTION, "layers_per_block": 2},
    "one head": {**ATTENTION, "attention_head_dim": None},
    "original DDPM": {
        **ATTENTION,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    "residual resampling": RESNET,
    "scale and shift": {**ATTENTION, "resnet_time_scale_shift": "scale_shift"},
    "scale and shift, normalised": {
        **ATTENTION,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
    },
    "classes": {**ATTENTION, "num_class_embeds": 3},
    "no attention in the middle": {"add_attention": False},
    "three levels, not square": {
        "sample_size": [8, 12],
        "block_out_channels": [16, 24, 40],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
    },
    "one level": {
        "block_out_channels": [16],
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"],
    },
    "learned variance": {"out_channels": 4},
    "learned features": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
}


def foreign(folder: pathlib.Path, scheduler: Any = None, **options: Any) -> Any:
    """A random network of diffusers, saved by diffusers."""
    net = peer.UNet2DModel(**{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    net.save_pretrained(folder)
    (scheduler or peer.DDPMScheduler(**scheduler_options(options))).save_pretrained(folder)
    return net


def scheduler_options(options: dict[str, Any]) -> dict[str, Any]:
    learned = options.get("out_channels", 2) == 4
    return {"variance_type": "learned_range"} if learned else {}


def inputs(options: dict[str, Any], batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    size = {**TINY, **options}["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    y = torch.arange(batch) if "num_class_embeds" in options else None
    return torch.randn(batch, 2, height, width), torch.tensor([0, 499, 999])[:batch], y


def output(net: Any, x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        out = net(x, timestep, class_labels=y).sample
    assert out.abs().max() > 0.1, "a figure this small would not tell a wrong network"
    return out


# ---------------------------------------------------------------------- theirs to ours


@pytest.mark.reliability("Q7")
@pytest.mark.parametrize("name", NETWORKS)
def test_their_networks_give_their_outputs_here(tmp_path, name, figure):
    options = NETWORKS[name]
    net = foreign(tmp_path, **options)
    diffusion = interop.load(tmp_path)
    x, timestep, y = inputs(options)
    expected = output(net, x, timestep, y)
    cond = {} if y is None else {"y": y}
    log_snr = diffusion.schedule.log_snr(timestep + 1).float()
    with torch.no_grad():
        out = diffusion.net(x, index=timestep, **cond)
        assert out.shape == expected.shape
        off = ((out - expected).abs() / (1 + expected.abs())).max().item()
        figure("Q7", "diffusers' UNet, its weights", off, at_most=1e-5)
        torch.testing.assert_close(diffusion.net(x, log_snr, **cond), expected, atol=1e-5, rtol=1e-5)
    assert not diffusion.training


def test_a_pipelines_folder(tmp_path):
    net = foreign(tmp_path / "plain")
    pipeline = peer.DDPMPipeline(net, peer.DDPMScheduler(num_train_timesteps=50))
    pipeline.save_pretrained(tmp_path / "pipeline")
    for path in ("pipeline", "pipeline/unet"):
        assert interop.load(tmp_path / path).steps == 50


# ---------------------------------------------------------------------- schedulers


@pytest.mark.reliability("Q7")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_train_timesteps": 40},
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.3, "num_train_timesteps": 30},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 64},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 64},
        {"trained_betas": [0.1, 0.2, 0.4, 0.5]},
    ],
    ids=str,
)
def test_schedules(tmp_path, options):
    scheduler = peer.DDPMScheduler(**options)
    foreign(tmp_path, scheduler)
    schedule = interop.load(tmp_path).schedule
    expected = scheduler.alphas_cumprod.double()
    t = torch.arange(1, schedule.steps + 1)
    # their cumulative product of T float32 numbers
    torch.testing.assert_close(schedule.alpha(t) ** 2, expected, rtol=2e-7 * schedule.steps, atol=1e-9)


@pytest.mark.reliability("Q7")
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
@pytest.mark.parametrize("clip", [True, False])
def test_a_step_of_their_chain(tmp_path, prediction, variance, clip):
    """The law of x_{t-1}: its mean and standard deviation are the offset and slope of their step in the noise."""
    options = {"prediction_type": prediction, "variance_type": variance, "clip_sample": clip}
    scheduler = peer.DDPMScheduler(num_train_timesteps=50, beta_end=0.3, **options)
    outputs = 4 if variance == "learned_range" else 2
    net = foreign(tmp_path, scheduler, out_channels=outputs)
    kernel = interop.load(tmp_path).reverse_kernel
    x_t, t = torch.randn(1, 2, 8, 8), 20
    out = output(net, x_t, torch.tensor([t - 1]), None)
    steps = []
    with torch.no_grad():
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            steps.append(scheduler.step(out, t - 1, x_t, generator=generator).prev_sample)
        law = kernel(x_t, torch.tensor([t]))
    mean, deviation = law.base_dist.loc, law.base_dist.scale
    for seed, step in enumerate(steps):
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(step, mean + deviation * noise, atol=1e-4, rtol=1e-4)


def test_ddim_scheduler(tmp_path):
    foreign(tmp_path, peer.DDIMScheduler(prediction_type="v_prediction", num_train_timesteps=30, clip_sample=False))
    diffusion = interop.load(tmp_path)
    kernel = diffusion.reverse_kernel
    assert (diffusion.steps, kernel.prediction, kernel.variance, kernel.clip) == (30, "v", "fixed_small", False)


def test_other_schedulers_are_refused(tmp_path):
    foreign(tmp_path, peer.PNDMScheduler())
    with pytest.raises(OptionError, match="PNDMScheduler"):
        interop.load(tmp_path)


# ---------------------------------------------------------------------- ours to theirs

OURS: dict[str, dict[str, Any]] = {
    "log-SNR": {"attention": [1], "heads": 2},
    "conv": {"attention": [1], "heads": 1, "resample": "conv", "scale_shift": False},
    "classes": {"classes": 3, "head_channels": 8, "attention": [0, 1]},
    "null class": {"classes": 2, "label_dropout": 0.1},
    "heads first": {"attention": [1], "heads": 2, "attention_order": "heads_first"},
    "after": {"resample": "conv", "downsample_padding": "after", "norm_eps": 1e-6, "middle_attention": "none"},
    "plain": {"middle_attention": "plain"},
    "learned variance": {"out_channels": 4},
    "index": {"time_embedding": "index", "index_shift": 1},
    "rescaled index": {"time_embedding": "index", "index_step": 10.0},
}


def own(name: str, steps: int = 100, **options: Any) -> GaussianDiffusion:
    arguments = {"width": 16, "multipliers": [1, 2], "blocks": 1, "norm_groups": 4, **OURS[name]}
    schedule = pyrodiff.CosineSchedule(steps)
    if "time_embedding" in arguments:
        arguments["log_snr_table"] = schedule.log_snr(torch.arange(1, steps + 1)).tolist()
    net = UNet(2, **arguments).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    if name == "learned variance":
        options["variance"] = "learned_range"
    return GaussianDiffusion(net, schedule, (2, 8, 8), decoder="openai", bins=(256, -1.0, 1.0), **options)


@pytest.mark.parametrize("name", OURS)
def test_our_networks_give_our_outputs_there(tmp_path, name):
    diffusion = own(name)
    interop.save(tmp_path, diffusion)
    net = peer.UNet2DModel.from_pretrained(tmp_path).eval()
    x, t = torch.randn(4, 2, 8, 8), torch.tensor([1, 2, 57, 100])
    y = torch.tensor([0, 2, 1, 1]) if "class" in name else None  # 2 is the null class, of two classes
    cond = {} if y is None else {"y": y}
    with torch.no_grad():
        expected = diffusion.net(x, diffusion.schedule.log_snr(t).float(), **cond)
    torch.testing.assert_close(output(net, x, t - 1, y), expected, atol=1e-5, rtol=1e-5)
    positional = net.config.time_embedding_type == "positional"
    assert positional == (name == "index"), "a table of features only where it is needed"

    back = interop.load(tmp_path)
    with torch.no_grad():
        again = back.net(x, back.schedule.log_snr(t).float(), **cond)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    kept = ("schedule", "event_shape", "prediction", "variance", "clip")
    assert {k: back.config[k] for k in kept} == {k: diffusion.config[k] for k in kept}


@pytest.mark.parametrize(
    "options", [{"prediction": "v", "clip": True}, {"prediction": "x0", "variance": "fixed_large"}], ids=str
)
def test_our_chain_there(tmp_path, options):
    diffusion = own("log-SNR", **options)
    interop.save(tmp_path, diffusion.respace([3, 20, 60, 90]))
    scheduler = peer.DDPMScheduler.from_pretrained(tmp_path)
    net = peer.UNet2DModel.from_pretrained(tmp_path)
    x_t = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        law = diffusion.respace([3, 20, 60, 90]).reverse_kernel(x_t, torch.tensor([3, 3]))
        step = scheduler.step(net(x_t, 2).sample, 2, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(step, law.base_dist.loc + law.base_dist.scale * noise, atol=1e-5, rtol=1e-5)
