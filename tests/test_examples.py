"""Examples run, and the one-file re-telling agrees with the library."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyrodiff

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def mini(monkeypatch):
    spec = importlib.util.spec_from_file_location("mini_ddpm", EXAMPLES / "mini_ddpm.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mini_ddpm", module)
    spec.loader.exec_module(module)
    return module


class Adapter(nn.Module):
    """The example's network, which takes t, as one that takes log-SNR and predicts x_0."""

    def __init__(self, net, schedule):
        super().__init__()
        self.net = net
        self.table = schedule.log_snr(torch.arange(1, schedule.steps + 1)).float()

    def forward(self, x, log_snr):
        return self.net(x, (log_snr[:, None] - self.table).abs().argmin(1) + 1)


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("t", [None, torch.tensor([1, 2, 30, 50, 7])])
def test_the_example_agrees_with_the_library(mini, elbo, t):
    schedule = pyrodiff.LinearSchedule(mini.T)
    diffusion = pyrodiff.GaussianDiffusion(Adapter(mini.net, schedule), schedule, (2,), prediction="x0")
    x0 = mini.two_moons(5)
    losses = []
    for model, guide in ((mini.model, mini.guide), (diffusion.model, diffusion.guide)):
        torch.manual_seed(0)
        losses.append(elbo().loss(model, guide, x0, t))
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


def test_the_example_runs(mini, capsys):
    mini.main(steps=3)
    assert "whole chain" in capsys.readouterr().out


def test_the_example_stands_alone():
    text = (EXAMPLES / "mini_ddpm.py").read_text()
    assert "import pyrodiff" not in text and text.count("\n") <= 150


def test_guidance_of_digits_runs(tmp_path, capsys):
    net = pyrodiff.nets.UNet(1, width=8, multipliers=(1,), blocks=1)
    diffusion = pyrodiff.GaussianDiffusion(net, pyrodiff.CosineSchedule(20), (1, 8, 8), bins=(17, -1.0, 1.0))
    pyrodiff.save(tmp_path / "run", diffusion)
    spec = importlib.util.spec_from_file_location("guided_digits", EXAMPLES / "guided_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(str(tmp_path / "run"), str(tmp_path / "x.png"), steps=2, per_class=4, chain="3")
    assert "scale 3:" in capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_bound_on_digits_runs(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("digits_bound", EXAMPLES / "digits_bound.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    right, up = module.MOVES[0](x), module.MOVES[3](x)
    assert torch.equal(right[..., 1:], x[..., :-1]) and (right[..., 0] == -1).all()
    assert torch.equal(up[..., :-1, :], x[..., 1:, :]) and (up[..., -1, :] == -1).all()
    schedule = pyrodiff.LogLinearSchedule
    monkeypatch.setattr(pyrodiff, "LogLinearSchedule", lambda steps, low, high: schedule(10, low, high))
    module.main(steps=1, images=3, out=tmp_path)
    text = (tmp_path / "results.txt").read_text()
    assert all(f"{method}: " in text for method in ("elbo", "immse", "ode", "iwae"))
