"""One contract for every network, then what each of them adds."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
from monte_carlo import assert_estimate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.nets import MLP, REGISTRY, Classifier, UNet, build
from pyrodiff.nets.embeddings import index_features, interpolate_index, log_snr_features
from pyrodiff.nets.layers import GroupNorm

TABLE = torch.linspace(9.0, -11.0, 50).tolist()
SMALL: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2}

# name -> registered name, arguments, event shape of the input
NETS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "1d": ("UNet", {**SMALL, "channels": 2, "dims": 1, "attention": (0,)}, (2, 8)),
    "2d": ("UNet", {**SMALL, "channels": 3, "attention": (0, 1), "classes": 5}, (3, 4, 6)),
    "2d-square": ("UNet", {**SMALL, "channels": 4, "out_channels": 8}, (4, 4, 4)),
    "2d-64": ("UNet", {"channels": 1, "width": 32, "multipliers": (2, 2), "blocks": 1}, (1, 4, 4)),
    "2d-additive": (
        "UNet",
        {
            **SMALL,
            "channels": 1,
            "scale_shift": False,
            "resample": "conv",
            "attention": (1,),
            "attention_order": "heads_first",
            "decoder_heads": 4,
        },
        (1, 4, 4),
    ),
    "2d-fixed": (
        "UNet",
        {
            **SMALL,
            "channels": 2,
            "multipliers": (0.5, 1, 1.5),
            "resample": "fixed",
            "head_channels": 4,
            "fourier_features": (0, 2),
            "dropout": 0.3,
        },
        (2, 8, 4),
    ),
    "2d-index": (
        "UNet",
        {**SMALL, "channels": 1, "time_embedding": "index", "log_snr_table": TABLE, "classes": 3},
        (1, 4, 4),
    ),
    "2d-null": ("UNet", {**SMALL, "channels": 1, "classes": 3, "label_dropout": 0.2}, (1, 4, 4)),
    "2d-classifier": (
        "Classifier",
        {**SMALL, "channels": 3, "classes": 5, "size": (4, 6), "attention": (1,)},
        (3, 4, 6),
    ),
    "1d-classifier": ("Classifier", {**SMALL, "channels": 2, "classes": 3, "dims": 1}, (2, 8)),
    "3d": ("UNet", {**SMALL, "channels": 4, "dims": 3, "attention": (1,)}, (4, 4, 4, 4)),
    "3d-frames": ("UNet", {**SMALL, "channels": 1, "dims": 3, "resample_axes": 2}, (1, 3, 4, 4)),
    "mlp": ("MLP", {"features": 4, "width": 16}, (4,)),
    "mlp-labels": (
        "MLP",
        {"features": 2, "width": 16, "depth": 1, "out_features": 4, "classes": 3, "label_dropout": 0.2},
        (2,),
    ),
}
UNETS = [name for name in NETS if NETS[name][0] != "MLP"]  # whole or half

each_net = pytest.mark.parametrize("name", NETS)
each_unet = pytest.mark.parametrize("name", UNETS)


def fresh(name: str, **changes: Any) -> nn.Module:
    kind, arguments, _ = NETS[name]
    return build(kind, {**arguments, **changes})


def awake(name: str, **changes: Any) -> nn.Module:
    """A network whose zero-initialised layers are not zero, in evaluation mode."""
    net = fresh(name, **changes).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.5 / parameter[0].numel() ** 0.5)
    return net


def inputs(net: nn.Module, name: str, batch: int = 4) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = torch.randn(batch, *NETS[name][2])
    log_snr = torch.linspace(-12, 12, batch)
    cond = {"y": torch.arange(batch) % net.config["classes"]} if "y" in net.cond_event_dims else {}
    return x, log_snr, cond


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(net: nn.Module, other: Any, args: tuple[Tensor, Tensor], cond: Any) -> None:
    """Outputs and gradients of a call that should be equivalent."""
    out, out_other = net(*args, **cond), other(*args, **cond)
    torch.testing.assert_close(out_other, out, atol=1e-5, rtol=0, check_stride=False)
    module = other if isinstance(other, nn.Module) and not hasattr(other, "_orig_mod") else net
    expected = gradients(net, out.square().mean())
    actual = gradients(module, out_other.square().mean())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# The contract.


@each_net
@pytest.mark.parametrize("batch", [1, 4])
def test_shape_and_dtype(name, batch):
    net = awake(name)
    x, log_snr, cond = inputs(net, name, batch)
    outputs = net.config.get("out_channels", net.config.get("out_features")) or x.shape[1]
    out = net(x, log_snr, **cond)
    expected = (net.config["classes"],) if isinstance(net, Classifier) else (outputs, *x.shape[2:])
    assert out.shape == (batch, *expected)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@each_net
def test_a_fresh_network_returns_zero(name):
    net = fresh(name)
    x, log_snr, cond = inputs(net, name)
    assert not net(x, log_snr, **cond).any()


@each_net
def test_every_parameter_gets_a_gradient(name):
    net = awake(name)
    x, log_snr, cond = inputs(net, name, 7)
    grads = gradients(net, net(x, log_snr, **cond).square().mean())
    # Exact zeros are what a disconnected parameter gives; a gradient may well be small.
    assert [key for key, grad in grads.items() if grad.abs().max() < 1e-9] == []


@each_net
def test_gradient_reaches_x_and_log_snr(name):
    net = awake(name)
    x, log_snr, cond = inputs(net, name)
    log_snr = log_snr / 2  # inside the table, where the index depends on it
    x.requires_grad_()
    log_snr.requires_grad_()
    net(x, log_snr, **cond).square().sum().backward()
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()
    assert (log_snr.grad.abs() > 0).all()


@each_net
def test_examples_do_not_see_each_other(name):
    net = awake(name)
    x, log_snr, cond = inputs(net, name, 5)
    out = net(x, log_snr, **cond)
    for i in range(5):
        one = net(x[i : i + 1], log_snr[i : i + 1], **{k: v[i : i + 1] for k, v in cond.items()})
        torch.testing.assert_close(one, out[i : i + 1], atol=1e-5, rtol=0)


@each_net
def test_every_input_matters(name):
    net = awake(name)
    x, log_snr, cond = inputs(net, name)
    out = net(x, log_snr, **cond)
    changed = [net(x + 0.1, log_snr, **cond), net(x, log_snr / 2, **cond)]
    changed += [net(x, log_snr, y=(y + 1) % net.config["classes"]) for y in cond.values()]
    for other in changed:
        assert ((other - out).flatten(1).abs().amax(1) > 1e-4).all()


@each_net
def test_config_rebuilds_the_network(name):
    net = awake(name)
    x, log_snr, cond = inputs(net, name)
    config = json.loads(json.dumps(net.config))
    assert config == net.config
    twin = build(NETS[name][0], config).eval()
    twin.load_state_dict(net.state_dict())
    assert twin.config == net.config
    assert torch.equal(twin(x, log_snr, **cond), net(x, log_snr, **cond))
    assert list(net.cond_event_dims) == list(cond)


@each_net
def test_deep_copy_is_independent(name):
    net = awake(name)
    twin = copy.deepcopy(net)
    x, log_snr, cond = inputs(net, name)
    before = net(x, log_snr, **cond)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(net(x, log_snr, **cond), before)


class CreatedOn(TorchDispatchMode):
    """Record the devices of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.devices.add(value.device.type)
        return out


@each_net
def test_forward_stays_on_the_device_of_its_input(name):
    for net in (fresh(name).to("meta"), fresh(name).to_empty(device="meta")):
        x, log_snr, cond = inputs(net, name)
        cond = {key: value.to("meta") for key, value in cond.items()}
        x, log_snr = x.to("meta"), log_snr.to("meta")
        with CreatedOn() as created:
            out = net(x, log_snr, **cond)
        assert out.device.type == "meta"
        assert created.devices == {"meta"}


@each_net
def test_weights_assigned_to_a_network_built_without_storage(name):
    net = awake(name)
    with torch.device("meta"):
        twin = build(NETS[name][0], net.config).eval()
    twin.load_state_dict(net.state_dict(), assign=True)
    x, log_snr, cond = inputs(net, name)
    assert torch.equal(twin(x, log_snr, **cond), net(x, log_snr, **cond))


@each_net
def test_double_precision(name):
    net = awake(name)
    x, log_snr, cond = inputs(net, name)
    single = net(x, log_snr, **cond)
    double = net.double()(x.double(), log_snr, **cond)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-4)


@each_net
def test_autocast(name):
    net = awake(name)
    x, log_snr, cond = inputs(net, name)
    expected = net(x, log_snr, **cond)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, log_snr, **cond)
    assert out.dtype == torch.bfloat16
    error = (out.float() - expected).square().mean().sqrt()
    assert error < 0.05 * expected.square().mean().sqrt()
    if name.startswith("3d"):
        return  # torch 2.13's bfloat16 conv3d writes garbage into weight gradients at size 2 on CPU
    grads = gradients(net, out.float().square().mean())
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("name", ["2d", "2d-index", "2d-classifier", "mlp"])
def test_half_precision_weights(name):
    net = awake(name)
    x, log_snr, cond = inputs(net, name)
    expected = net(x, log_snr, **cond)
    out = net.bfloat16()(x.bfloat16(), log_snr, **cond)
    assert out.dtype == torch.bfloat16
    assert (out - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


# Options that must not change the result.


@each_unet
def test_checkpointing_changes_nothing(name):
    net = awake(name)
    twin = build(NETS[name][0], {**net.config, "checkpointing": True}).eval()
    twin.load_state_dict(net.state_dict())
    x, log_snr, cond = inputs(net, name)
    assert_same(net, twin, (x, log_snr), cond)


def test_checkpointing_draws_the_same_dropout():
    net = awake("2d-fixed").train()
    twin = build("UNet", {**net.config, "checkpointing": True}).train()
    twin.load_state_dict(net.state_dict())
    x, log_snr, _ = inputs(net, "2d-fixed")
    results = []
    for one in (net, twin):
        torch.manual_seed(0)
        results.append(gradients(one, one(x, log_snr).square().mean()))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in UNETS if name.startswith("2d")])
def test_channels_last_changes_nothing(name):
    net = awake(name)
    twin = copy.deepcopy(net).to(memory_format=torch.channels_last)
    x, log_snr, cond = inputs(net, name)
    assert_same(net, twin, (x.to(memory_format=torch.channels_last), log_snr), cond)


@pytest.fixture
def dynamo():
    """Compile from scratch, and undo that torch.compile switches the validation of all laws off."""
    validation = torch.distributions.Distribution._validate_args
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.distributions.Distribution.set_default_validate_args(validation)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ from version to version
@pytest.mark.parametrize("name", ["2d", "2d-index", "2d-classifier", "mlp"])
def test_capturing_one_graph_changes_nothing(name):
    net = awake(name)
    x, log_snr, cond = inputs(net, name)
    assert_same(net, torch.compile(net, backend="aot_eager", fullgraph=True), (x, log_snr), cond)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.filterwarnings("ignore")
def test_compiling_changes_nothing():
    net = awake("2d", multipliers=(1,), attention=())
    x, log_snr, cond = inputs(net, "2d")
    assert_same(net, torch.compile(net), (x, log_snr), cond)


def test_dropout_is_off_in_evaluation():
    net = awake("2d-fixed")
    x, log_snr, _ = inputs(net, "2d-fixed")
    assert torch.equal(net(x, log_snr), net(x, log_snr))
    net.train()
    assert not torch.allclose(net(x, log_snr), net(x, log_snr))


def test_second_derivatives_with_the_plain_attention_kernel():
    net = awake("2d", classes=None)
    x, log_snr, _ = inputs(net, "2d", 1)
    x.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(net(x, log_snr).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all()
    assert second.any()


# The noise level.


def test_log_snr_features_resolve_and_are_smooth():
    grid = torch.linspace(-15, 15, 3001)  # 0.01 nats apart
    features = log_snr_features(grid, 64)
    assert features.shape == (3001, 64)
    step = (features[1:] - features[:-1]).norm(dim=1)
    assert step.min() > 0.01
    assert step.max() < 0.5
    distance = torch.cdist(features[::50], features[::50]) + 9 * torch.eye(61)
    assert distance.min() > 0.5, "two noise levels half a nat apart look the same"


def test_index_features_are_those_of_the_formula():
    index = torch.tensor([0, 1, 250, 999])
    features = index_features(index, 8)
    for i, t in enumerate(index.tolist()):
        phases = [t * 10000 ** (-k / 4) for k in range(4)]
        expected = [math.cos(p) for p in phases] + [math.sin(p) for p in phases]
        torch.testing.assert_close(features[i], torch.tensor(expected), atol=1e-4, rtol=0)


def test_table_is_exact_at_entries_linear_between_and_clamped():
    table = torch.cumsum(-torch.rand(4000) - 1e-3, 0) / 100 + 9
    assert torch.equal(interpolate_index(table, table), torch.arange(4000.0))
    # Halfway in log-SNR is halfway in index, up to the rounding of log-SNR itself.
    halfway = (table[1:].double() + table[:-1].double()) / 2
    exact = torch.arange(3999) + 0.5
    spacing = (table[:-1] - table[1:]).min()
    tolerance = float(2e-6 / spacing)
    assert tolerance < 0.25
    torch.testing.assert_close(interpolate_index(halfway, table), exact, atol=tolerance, rtol=0, check_dtype=False)
    ends = torch.tensor([math.inf, 50.0, -1e4, -math.inf])
    assert interpolate_index(ends, table).tolist() == [0, 0, 3999, 3999]


def test_index_can_be_fed_directly():
    net = awake("2d-index")
    x, _, cond = inputs(net, "2d-index")
    index = torch.tensor([0, 7, 20, 49])
    log_snr = torch.tensor(TABLE)[index]
    torch.testing.assert_close(net(x, index=index, **cond), net(x, log_snr, **cond))
    assert torch.equal(net(x, index=index.float(), **cond), net(x, index=index, **cond))


def test_the_table_keeps_its_precision():
    net = awake("2d-index")
    x, _, cond = inputs(net, "2d-index")
    log_snr = torch.tensor(TABLE[20:24])
    index = torch.arange(20, 24)
    net.bfloat16()
    assert torch.equal(net(x.bfloat16(), log_snr, **cond), net(x.bfloat16(), index=index, **cond))


# Layers.


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (96, 32), (32, 32), (48, 4), (16, 4), (8, 2), (6, 1)])
def test_normalisation_groups(channels, groups):
    assert GroupNorm(channels).num_groups == groups


def test_normalisation_is_computed_in_single_precision():
    norm = GroupNorm(8)
    # Mean and spread that bfloat16 arithmetic cannot separate.
    x = (1000 + 8 * torch.randn(2, 8, 16)).bfloat16()
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16())
    torch.testing.assert_close(norm.bfloat16()(x), GroupNorm(8)(x.float()).bfloat16())


def test_fourier_features_are_channels_of_the_input():
    seen = {}
    net = UNet(2, width=8, multipliers=(1,), blocks=1, fourier_features=(0, 3))
    net.conv_in.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    x = torch.rand(1, 2, 4, 4)
    net(x, torch.zeros(1))
    expected = [x] + [wave(2**n * math.pi * x) for wave in (torch.sin, torch.cos) for n in (0, 3)]
    torch.testing.assert_close(seen["x"], torch.cat(expected, 1))


def test_only_the_named_axes_change_resolution():
    net = awake("3d-frames")
    for frames in (1, 3, 5):
        x = torch.randn(2, 1, frames, 4, 8)
        assert net(x, torch.zeros(2)).shape == x.shape


# Training.


def denoising_losses(net: nn.Module, data: Any, steps: int, rate: float) -> list[float]:
    """Mean squared errors of the predicted noise, at noise levels of -6 to 6 nats."""
    optimiser = torch.optim.Adam(net.parameters(), rate)
    losses = []
    for _ in range(steps):
        x0 = data(64)
        log_snr = 12 * torch.rand(64) - 6
        shape = (64, *(1,) * (x0.dim() - 1))
        eps = torch.randn_like(x0)
        x = log_snr.sigmoid().sqrt().view(shape) * x0 + (-log_snr).sigmoid().sqrt().view(shape) * eps
        loss = (net(x, log_snr) - eps).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def waves(n: int) -> Tensor:
    phase = 2 * math.pi * torch.rand(n, 1, 1)
    return math.sqrt(2) * torch.sin(phase + math.pi / 4 * torch.arange(16))


def cubes(n: int) -> Tensor:
    return (torch.randint(0, 2, (n, 1, 1, 1, 1)) * 2.0 - 1).expand(n, 1, 4, 4, 4)


def ring(n: int) -> Tensor:
    phase = 2 * math.pi * torch.rand(n, 1)
    return math.sqrt(2) * torch.cat([phase.cos(), phase.sin()], 1)


@pytest.mark.monte_carlo
@pytest.mark.parametrize(
    ("net", "data", "steps", "bound"),
    [
        pytest.param({"channels": 1, "dims": 1}, waves, 100, 0.25, id="1d"),
        pytest.param({"channels": 1, "dims": 3}, cubes, 40, 0.25, id="3d"),
        pytest.param({"features": 2}, ring, 200, 0.55, id="mlp"),
    ],
)
def test_learns_to_denoise(net, data, steps, bound):
    if "features" in net:
        module: nn.Module = MLP(**net, width=64, depth=2)
    else:
        module = UNet(**net, width=16, multipliers=(1, 2), blocks=1)
    losses = denoising_losses(module, data, steps, 3e-3)
    # A fresh network returns 0: the mean square of the noise itself
    assert_estimate(losses[0], math.sqrt(2 / data(64).numel()), 1.0, detects=1.3)
    assert sum(losses[-10:]) / 10 < bound


# Errors.


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": 4}, "dims=4"),
        ({"resample_axes": 3}, "resample_axes=3"),
        ({"resample": "magic"}, "'residual', 'conv', 'fixed'"),
        ({"attention_order": "qvk"}, "'qkv_first', 'heads_first'"),
        ({"time_embedding": "fourier"}, "'sinusoidal', 'index'"),
        ({"attention": (3,)}, "levels are 0 to 2"),
        ({"attention": (-1,)}, "levels are 0 to 2"),
        ({"heads": 3}, "3 attention heads"),
        ({"heads": 0}, "0 attention heads"),
        ({"head_channels": 48}, "head_channels=48"),
        ({"width": 7}, "width=7"),
        ({"width": 0}, "width=0"),
        ({"blocks": 0}, "blocks=0"),
        ({"channels": 0}, "channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (0.01, 1)}, "multipliers"),
        ({"dropout": 1.0}, "dropout"),
        ({"classes": 0}, "classes=0"),
        ({"classes": 3, "label_dropout": 1.0}, "label_dropout=1.0"),
        ({"classes": 3, "label_dropout": -0.1}, "label_dropout=-0.1"),
        ({"classes": 3, "label_dropout": math.nan}, "label_dropout=nan"),
        ({"label_dropout": 0.1}, "needs classes"),
        ({"log_snr_table": [1.0, 0.0]}, "time_embedding='index'"),
        ({"time_embedding": "index", "log_snr_table": [0.0, 1.0]}, "decreasing"),
        ({"time_embedding": "index", "log_snr_table": [0.0]}, "decreasing"),
        ({"time_embedding": "index", "log_snr_table": [math.inf, 1.0]}, "finite"),
        ({"time_embedding": "index", "log_snr_table": [1.0, math.nan]}, "finite"),
    ],
)
def test_bad_arguments_of_the_unet(arguments, message):
    with pytest.raises(OptionError) as error:
        UNet(**{"channels": 1, **arguments})
    assert message in one_line(error)


@pytest.mark.parametrize(
    "arguments", [{"features": 0}, {"depth": 0}, {"out_features": 0}, {"width": 5}, {"label_dropout": 0.1}], ids=str
)
def test_bad_arguments_of_the_mlp(arguments):
    with pytest.raises(OptionError) as error:
        MLP(**{"features": 1, **arguments})
    assert next(iter(arguments)) in one_line(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "classes=0"),
        ({"size": [4]}, "2 positive numbers"),
        ({"size": [4, 0]}, "2 positive numbers"),
        ({"size": [4, 6]}, "divisible by 4"),
        ({"heads": 3}, "3 attention heads"),
        ({"head_channels": 48}, "head_channels=48"),
        ({"width": 7}, "width=7"),
    ],
)
def test_bad_arguments_of_the_classifier(arguments, message):
    with pytest.raises(OptionError) as error:
        build("Classifier", {"channels": 1, "classes": 2, "size": [4, 4], **arguments})
    assert message in one_line(error)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Transformer", {}, "'UNet', 'MLP'"),
        ("UNet", {}, "channels"),
        ("MLP", {"features": 2, "colour": 1}, "colour"),
    ],
)
def test_build_names_what_is_wrong(name, arguments, message):
    with pytest.raises(OptionError) as error:
        build(name, arguments)
    assert message in one_line(error)


def test_registry():
    assert REGISTRY == {"UNet": UNet, "MLP": MLP, "Classifier": Classifier}


@each_net
def test_inputs_of_the_wrong_shape(name):
    net = fresh(name)
    x, log_snr, cond = inputs(net, name)
    more_channels = x.repeat(1, 2, *(1,) * (x.dim() - 2))
    bad: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = [
        (more_channels, log_snr, cond),
        (x[0], log_snr, cond),
        (x[..., None], log_snr, cond),
        (x.long(), log_snr, cond),
        (x, log_snr[:3], cond),
        (x, log_snr[0], cond),
        (x, log_snr[:, None], cond),
        (x, log_snr.long(), cond),
    ]
    if "y" in cond:
        bad += [(x, log_snr, {"y": y}) for y in (cond["y"][:3], cond["y"].float())]
    for args in bad:
        with pytest.raises(ShapeError) as error:
            net(args[0], args[1], **args[2])
        one_line(error)


@each_unet
def test_sizes_that_do_not_halve(name):
    net = fresh(name)
    x, log_snr, cond = inputs(net, name)
    for size in (0, 1):
        with pytest.raises(ShapeError) as error:
            net(x[..., : x.shape[-1] - 1 if size else 0], log_snr, **cond)
        assert "divisible by" in one_line(error)


@pytest.mark.parametrize("name", [name for name in NETS if NETS[name][0] != "Classifier"])
def test_labels_go_with_classes(name):
    net = fresh(name)
    x, log_snr, cond = inputs(net, name)
    wrong = {} if cond else {"y": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(OptionError, match="classes=") as error:
        net(x, log_snr, **wrong)
    one_line(error)


def test_ways_to_give_the_noise_level():
    x, t = torch.zeros(2, 1, 4, 4), torch.zeros(2)
    plain = UNet(1, **SMALL)
    indexed = UNet(1, **SMALL, time_embedding="index")
    for net, arguments, message in (
        (plain, {}, "log_snr is missing"),
        (plain, {"index": t}, "time_embedding='index'"),
        (indexed, {"log_snr": t}, "log_snr_table"),
        (indexed, {"log_snr": t, "index": t}, "give one"),
    ):
        with pytest.raises(OptionError) as error:
            net(x, **arguments)
        assert message in one_line(error)
    with pytest.raises(ShapeError, match="index has shape"):
        indexed(x, index=t[:1])


# Devices.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "autocast"), list(itertools.product(["1d", "2d", "2d-index", "2d-classifier", "3d", "mlp"], [0, 1]))
)
def test_cuda_equals_cpu(name, autocast):
    net = awake(name)
    x, log_snr, cond = inputs(net, name)
    expected = net(x, log_snr, **cond)
    net.cuda()
    cond = {key: value.cuda() for key, value in cond.items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=bool(autocast)):
        out = net(x.cuda(), log_snr.cuda(), **cond)
    scale = expected.square().mean().sqrt()
    error = (out.float().cpu() - expected).square().mean().sqrt()
    assert error < (0.05 if autocast else 2e-3) * scale
    assert all(grad.is_cuda for grad in gradients(net, out.float().square().mean()).values())
