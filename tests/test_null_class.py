"""Label dropout: how often, what the network then sees and learns, and guidance from the null class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monte_carlo import assert_proportion
from torch import Tensor, nn

import pyrodiff
from pyrodiff.nets import MLP, UNet


def awake(net: Any) -> Any:
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return net


def unet(**options: Any) -> Any:
    return awake(UNet(1, width=8, multipliers=(1,), blocks=1, classes=3, **{"label_dropout": 0.4, **options}))


def mlp(**options: Any) -> Any:
    return awake(MLP(2, width=8, depth=1, classes=3, **{"label_dropout": 0.4, **options}))


each_net = pytest.mark.parametrize(("make", "event"), [(unet, (1, 4, 4)), (mlp, (2,))], ids=["unet", "mlp"])


def labels_seen(net: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the labels that reached the embedding."""
    seen = []
    handle = net.embedding.label.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = net(x, torch.zeros(len(x)), y=y)
    handle.remove()
    return out, seen[0]


@pytest.mark.monte_carlo
def test_labels_are_dropped_as_often_as_asked():
    n, p = 20_000, 0.1
    net, y = mlp(label_dropout=p).train(), torch.arange(n) % 3
    _, seen = labels_seen(net, torch.zeros(n, 2), y)
    dropped = seen == 3
    assert_proportion(dropped.sum(), n, p, detects=0.025)
    assert torch.equal(seen[~dropped], y[~dropped])
    # independently of the label, and of the neighbour
    for part in (dropped[y == 0], dropped[1:][dropped[:-1]]):
        assert_proportion(part.sum(), len(part), p, detects=0.1)


@each_net
def test_dropped_labels_follow_the_seed(make, event):
    net, y = make().train(), torch.zeros(64, dtype=torch.int64)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(labels_seen(net, torch.zeros(64, *event), y)[1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@each_net
def test_in_evaluation_labels_are_as_given(make, event):
    net, y = make().eval(), torch.arange(64) % 4  # the null class included
    state = torch.get_rng_state()
    assert torch.equal(labels_seen(net, torch.randn(64, *event, generator=torch.Generator()), y)[1], y)
    assert torch.equal(torch.get_rng_state(), state)


@each_net
def test_without_dropout_there_is_no_null_class(make, event):
    net = make(label_dropout=0.0).train()
    assert net.null_cond == {} and net.embedding.label.num_embeddings == 3
    state = torch.get_rng_state()
    labels_seen(net, torch.zeros(4, *event), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), state)
    assert MLP(2).null_cond == {}


@each_net
def test_the_null_class_learns_from_the_dropped(make, event):
    """A training step is one in which some were labelled with the null class: the same output, the same gradients."""
    net, x = make().train(), torch.randn(16, *event)
    out, seen = labels_seen(net, x, torch.zeros(16, dtype=torch.int64))
    assert seen.unique().tolist() == [0, 3]
    grads = torch.autograd.grad(out.square().mean(), list(net.parameters()))
    net.eval()
    expected = torch.autograd.grad(net(x, torch.zeros(16), y=seen).square().mean(), list(net.parameters()))
    torch.testing.assert_close(grads, expected)
    of_rows = dict(zip([name for name, _ in net.named_parameters()], grads, strict=True))["embedding.label.weight"]
    assert of_rows.abs().sum(1).gt(0).tolist() == [True, False, False, True]


@each_net
def test_the_null_class_is_saved(make, event, tmp_path):
    net = make().eval()
    assert net.null_cond == {"y": 3} and net.config["label_dropout"] == 0.4
    pyrodiff.save(tmp_path, pyrodiff.GaussianDiffusion(net, pyrodiff.CosineSchedule(3), event))
    back = pyrodiff.load(tmp_path).net.eval()
    assert back.null_cond == net.null_cond and back.config == net.config
    x, y = torch.randn(4, *event), torch.arange(4)
    assert torch.equal(back(x, torch.zeros(4), y=y), net(x, torch.zeros(4), y=y))


@each_net
def test_guidance_extrapolates_from_the_null_class(make, event):
    """A chain of one step is the denoiser: x0_hat = null + w (given - null), from two calls of the network."""
    diffusion = pyrodiff.GaussianDiffusion(make(), pyrodiff.CosineSchedule(5), event, prediction="v")
    x, y = torch.randn(4, *event), torch.tensor([0, 1, 2, 1])
    guided = pyrodiff.sample(diffusion, 4, "ddim", steps=[3], x_T=x, guidance_scale=3.0, y=y)
    with torch.no_grad(), diffusion.evaluating():
        given, null = (diffusion.reverse_kernel.denoise(x, 3, y=labels) for labels in (y, torch.full_like(y, 3)))
    torch.testing.assert_close(guided, null + 3 * (given - null))
    assert (given - null).abs().max() > 0.01


def test_it_trains_as_a_pyro_program():
    diffusion = pyrodiff.GaussianDiffusion(mlp(), pyrodiff.CosineSchedule(5), (2,))
    loss = pyrodiff.TraceMeanField_ELBO().differentiable_loss(
        diffusion.model, diffusion.guide, torch.randn(8, 2), torch.tensor([2] * 8), y=torch.zeros(8, dtype=torch.int64)
    )
    loss.backward()
    assert (diffusion.net.embedding.label.weight.grad.abs().sum(1) > 0).tolist() == [True, False, False, True]
