"""The options that our networks have for the sake of weights trained elsewhere, against what they are said to mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import pyrodiff
from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.nets import UNet
from pyrodiff.nets.embeddings import ConditionEmbedding, index_features
from pyrodiff.nets.layers import Attention, Downsample, GroupNorm

SMALL: dict[str, Any] = {"width": 16, "multipliers": [1, 2], "blocks": 1, "norm_groups": 4}
TABLE = [3.0, 1.0, -2.0]


@pytest.mark.parametrize(("dims", "axes"), [(1, 1), (2, 2), (2, 1), (3, 2)])
def test_padding_after_an_axis(dims, axes):
    """Output i of a halved axis looks at inputs 2 i, 2 i + 1, 2 i + 2; what is beyond the end is 0."""
    layer = Downsample(1, dims=dims, axes=axes, learned=True, padding="after")
    x = torch.randn(1, 1, *(4,) * dims)
    out = layer(x)
    assert out.shape[2:] == (4,) * (dims - axes) + (2,) * axes
    # one output by hand: the first, or the second where an axis keeps its size (there it looks at 0, 1, 2 as well)
    at = (0, 0) + (1,) * (dims - axes) + (0,) * axes
    window = x[(0, 0) + (slice(0, 3),) * dims]
    torch.testing.assert_close(out[at], (layer.conv.weight[0, 0] * window).sum() + layer.conv.bias[0])


@pytest.mark.parametrize("padding", ["both", "after"])
def test_only_where_it_pads_differs(padding):
    layer = Downsample(2, dims=1, axes=1, learned=True, padding=padding)
    x = torch.randn(1, 2, 6)
    first = -1 if padding == "both" else 0
    shifted = F.conv1d(F.pad(x, (2, 2)), layer.conv.weight, layer.conv.bias)  # output j looks at j - 2, j - 1, j
    torch.testing.assert_close(layer(x), shifted[..., 2 + first :: 2][..., :3])


def test_groups_and_eps_of_the_normalisation():
    norm = GroupNorm(6, groups=2, eps=0.5)
    x = torch.randn(2, 6, 5)
    groups = x.reshape(2, 2, 15)
    expected = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(norm(x), expected.reshape(x.shape))


def test_every_normalisation_of_a_network_has_them():
    net = UNet(1, **SMALL, norm_eps=0.01, attention=[1])
    norms = [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(4, 0.01)}
    assert sum(isinstance(m, GroupNorm) for m in net.modules()) == len(norms)


@pytest.mark.parametrize(("kind", "attentions", "normalised"), [("normalised", 1, 1), ("plain", 1, 0), ("none", 0, 0)])
def test_attention_in_the_middle(kind, attentions, normalised):
    net = UNet(1, **SMALL, middle_attention=kind)
    found = [m for m in net.modules() if isinstance(m, Attention)]
    assert len(found) == attentions
    assert sum(isinstance(m.norm, GroupNorm) for m in found) == normalised
    assert net(torch.randn(2, 1, 4, 4), torch.zeros(2)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_frequencies_of_the_index(shift):
    features = index_features(torch.tensor([7.0]), 8, shift)
    frequencies = [10000 ** (-i / (4 - shift)) for i in range(4)]
    expected = [math.cos(7 * f) for f in frequencies] + [math.sin(7 * f) for f in frequencies]
    torch.testing.assert_close(features, torch.tensor([expected]), atol=1e-6, rtol=0)


def test_learned_features_are_the_rows_and_linear_between_them():
    embedding = ConditionEmbedding(4, 8, time_embedding="learned", log_snr_table=TABLE, index_step=10.0)
    rows = embedding.rows.weight
    x = torch.zeros(5, 1)
    log_snr = torch.tensor([3.0, 1.0, -2.0, 2.5, -0.5])
    expected = torch.stack([rows[0], rows[1], rows[2], 0.75 * rows[0] + 0.25 * rows[1], 0.5 * (rows[1] + rows[2])])
    torch.testing.assert_close(embedding.time_features(x, log_snr), expected)
    index = torch.tensor([0.0, 10.0, 20.0, 2.5, 15.0])
    torch.testing.assert_close(embedding.time_features(x, None, index), expected)


def test_learned_features_are_saved_and_trained(tmp_path):
    net = UNet(1, **SMALL, time_embedding="learned", log_snr_table=TABLE)
    x = torch.randn(3, 1, 4, 4)
    torch.nn.init.normal_(net.conv_out.weight)
    for block in (*net.encoder[0].blocks, *net.decoder[0].blocks):
        torch.nn.init.normal_(block.residual.conv_out.weight)
    net(x, torch.tensor(TABLE)).square().sum().backward()
    assert (net.embedding.rows.weight.grad.abs().sum(1) > 0).all()
    diffusion = pyrodiff.GaussianDiffusion(net, pyrodiff.CosineSchedule(3), (1, 4, 4))
    pyrodiff.save(tmp_path, diffusion)
    assert torch.equal(pyrodiff.load(tmp_path).net(x, torch.tensor(TABLE)), net(x, torch.tensor(TABLE)))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_smaller_image_joins_the_input(dims):
    net = UNet(1, **SMALL, dims=dims, low_res_channels=2)
    assert net.cond_event_dims == {"low_res": dims + 1}
    assert net.conv_in.weight.shape[1] == 3
    torch.nn.init.normal_(net.conv_out.weight)
    x, low_res = torch.randn(2, 1, *(8,) * dims), torch.randn(2, 2, *(2,) * dims)
    seen = []
    net.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(x, torch.zeros(2), low_res=low_res)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
    torch.testing.assert_close(seen[0], torch.cat([x, F.interpolate(low_res, scale_factor=4, mode=mode)], 1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"norm_groups": 3}, "norm_groups=3"),
        ({"norm_groups": 0}, "norm_groups=0"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"middle_attention": "some"}, "middle_attention"),
        ({"downsample_padding": "before"}, "downsample_padding"),
        ({"low_res_channels": -1}, "low_res_channels"),
        ({"time_embedding": "learned"}, "log_snr_table"),
        ({"time_embedding": "index", "index_shift": 8}, "index_shift"),
        ({"time_embedding": "index", "index_shift": math.nan}, "index_shift"),
    ],
    ids=str,
)
def test_options_outside_their_range(options, named):
    with pytest.raises(OptionError, match=named):
        UNet(1, **{**SMALL, **options})


def test_smaller_images_that_do_not_fit():
    net, x, log_snr = UNet(1, **SMALL, low_res_channels=2), torch.randn(2, 1, 4, 4), torch.zeros(2)
    with pytest.raises(OptionError, match="low_res is missing"):
        net(x, log_snr)
    for shape in ((2, 1, 2, 2), (1, 2, 2, 2), (2, 2, 2)):
        with pytest.raises(ShapeError, match="low_res"):
            net(x, log_snr, low_res=torch.zeros(shape))
    with pytest.raises(OptionError, match="low_res is given"):
        UNet(1, **SMALL)(x, log_snr, low_res=torch.zeros(2, 1, 2, 2))
