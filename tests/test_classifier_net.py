"""The classifier of noisy data: half a UNet, its pools, what it learns, guidance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyrodiff
from pyrodiff.errors import ShapeError
from pyrodiff.nets import Classifier, UNet
from pyrodiff.nets.layers import AttentionPool, AveragePool

SMALL: dict[str, Any] = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "heads": 2}


def awake(net: Any) -> Any:
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return net


def test_it_is_the_first_half_of_a_unet():
    """Same names, same shapes, same activations; only the pool and its normalisation are its own."""
    unet, net = awake(UNet(2, **SMALL)), Classifier(2, classes=3, **SMALL)
    own = {name for name in net.state_dict() if name.startswith(("norm_out.", "pool."))}
    half = {
        name: value
        for name, value in unet.state_dict().items()
        if not name.startswith(("decoder.", "norm_out.", "conv_out."))
    }
    assert net.state_dict().keys() == half.keys() | own
    net.load_state_dict(half, strict=False)
    seen = []
    unet.middle[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    net.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, log_snr = torch.randn(2, 2, 8, 8), torch.tensor([1.0, -2.0])
    unet(x, log_snr)
    net(x, log_snr)
    assert torch.equal(seen[0], seen[1])


def test_pool_by_the_average():
    pool = awake(AveragePool(4, 3))
    x = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(pool(x), x.mean((2, 3)) @ pool.out.weight.T + pool.out.bias)


def test_pool_by_attention():
    """Token by token and head by head: softmax(q k / sqrt(d)) v, of the mean over the positions."""
    channels, heads, width = 6, 2, 3
    pool = awake(AttentionPool(channels, 5, positions=4, heads=heads))
    x = torch.randn(2, channels, 2, 2)
    out = pool(x)
    for i in range(2):
        columns = [x[i].mean((1, 2)), *x[i].reshape(channels, 4).T]
        tokens = [column + pool.positions[:, j] for j, column in enumerate(columns)]
        q, k, v = pool.qkv.weight.chunk(3)
        bq, bk, bv = pool.qkv.bias.chunk(3)
        parts = []
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            query = q[rows] @ tokens[0] + bq[rows]
            scores = torch.stack([query @ (k[rows] @ token + bk[rows]) for token in tokens]) / width**0.5
            parts.append(sum(w * (v[rows] @ t + bv[rows]) for w, t in zip(scores.softmax(0), tokens, strict=True)))
        torch.testing.assert_close(out[i], pool.out.weight @ torch.cat(parts) + pool.out.bias, atol=1e-5, rtol=1e-5)


def test_attention_has_a_size_and_the_average_has_none():
    average = awake(Classifier(1, classes=2, **SMALL))
    for size in (4, 8, 12):
        assert average(torch.randn(2, 1, size, 4), torch.zeros(2)).shape == (2, 2)
    attention = Classifier(1, classes=2, size=(8, 4), **SMALL)
    assert attention.pool.positions.shape == (32, 1 + 4 * 2)
    with pytest.raises(ShapeError, match=r"x has size \[4, 8\], not \[8, 4\]"):
        attention(torch.randn(2, 1, 4, 8), torch.zeros(2))
    video = Classifier(1, classes=2, size=(3, 4, 4), dims=3, resample_axes=2, **SMALL)
    assert video.pool.positions.shape == (32, 1 + 3 * 2 * 2)
    assert video(torch.randn(2, 1, 3, 4, 4), torch.zeros(2)).shape == (2, 2)


@pytest.mark.parametrize("size", [None, (8,)])
def test_it_learns_the_posterior_of_the_class(size):
    """x_0 = +-1 in all D places: log p(1 | x_t) - log p(0 | x_t) = 2 alpha / sigma^2 * sum of x_t (both classes as likely).

    The classifier's cross-entropy starts at log 2 and cannot fall below that of Bayes, but by the luck of 4000 examples.
    150 steps come within 5 % of the way, and to probabilities 0.05 off (root mean square): bounds of twice that.
    """
    net = Classifier(1, classes=2, size=size, dims=1, width=8, multipliers=(1, 1), blocks=1, heads=2)

    def batch(n):
        y, log_snr = torch.randint(2, (n,)), 8 * torch.rand(n) - 6
        alpha2, sigma2 = log_snr.sigmoid()[:, None, None], (-log_snr).sigmoid()[:, None, None]
        x = alpha2.sqrt() * (2.0 * y - 1)[:, None, None] + sigma2.sqrt() * torch.randn(n, 1, 8)
        return x, log_snr, y, (2 * alpha2.sqrt() / sigma2 * x).sum((1, 2))

    x, log_snr, y, bayes = batch(4000)
    fresh = F.cross_entropy(net(x, log_snr), y).item()
    assert fresh == pytest.approx(math.log(2), abs=1e-6)
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(150):
        inputs, levels, labels, _ = batch(128)
        loss = F.cross_entropy(net(inputs, levels), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    best = F.binary_cross_entropy_with_logits(bayes, y.float()).item()
    with torch.no_grad():
        logits = net(x, log_snr)
    assert F.cross_entropy(logits, y).item() - best < 0.1 * (fresh - best)
    assert (logits.softmax(1)[:, 1] - bayes.sigmoid()).square().mean().sqrt() < 0.1


def test_it_guides():
    """DDIM's x0_hat moves by sigma^2 / alpha times the gradient of log p(y | x_t), at the chain's step."""
    schedule = pyrodiff.CosineSchedule(10)
    diffusion = pyrodiff.GaussianDiffusion(awake(UNet(1, **SMALL)), schedule, (1, 4, 4))
    net = awake(Classifier(1, classes=3, size=(4, 4), **SMALL)).eval()
    nn.init.normal_(net.pool.out.weight, 0, 3)
    classifier = pyrodiff.NoisyClassifier(net, schedule, (1, 4, 4))
    x, y = torch.randn(2, 1, 4, 4), torch.tensor([2, 1])
    options = {"steps": [7], "x_T": x, "classifier": classifier.log_prob, "classifier_cond": {"y": y}}
    guided = pyrodiff.sample(diffusion, 2, "ddim", **options)
    x.requires_grad_()
    log_snr = schedule.log_snr(torch.tensor([7, 7])).float()
    (gradient,) = torch.autograd.grad(-F.cross_entropy(net(x, log_snr), y, reduction="sum"), x)
    with torch.no_grad():
        plain = diffusion.reverse_kernel.denoise(x, 7)
    alpha, sigma = schedule.alpha(7).float(), schedule.sigma(7).float()
    torch.testing.assert_close(guided, plain + sigma**2 / alpha * gradient, atol=1e-5, rtol=1e-5)
    assert (guided - plain).abs().max() > 1e-3
