"""The differentiable reverse chain: gradients against finite differences, densities against the Pyro program, memory."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pyro
import pytest
import torch
from monte_carlo import assert_mean
from oracles import GaussianDenoiser
from pyro import poutine
from torch import Tensor, nn

import pyrodiff
from pyrodiff import CosineSchedule, GaussianDiffusion, LogLinearSchedule, rsample, sample, step_log_probs, trajectory
from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.nets import MLP

METHODS = [("ancestral", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("dpm++2m", 0.0), ("dpm++2m", 1.0), ("heun", 0.0)]
every_method = pytest.mark.parametrize(("method", "eta"), METHODS)
GUIDES = {
    "none": {},
    "classifier-free": {"guidance_scale": 2.0, "y": 0.4},
    "classifier": {"classifier": lambda x_t, t: -torch.log1p(x_t**2).sum(-1)},
}


class Small(nn.Module):
    """A smooth network of two parameters, with a null class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.6, -0.3], dtype=torch.float64))
        self.null_cond = {"y": 0.0}

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor | None = None) -> Tensor:
        shift = 0.1 * log_snr[:, None] + (0.0 if y is None else y[:, None])
        return torch.tanh(self.weight[0] * x + shift) + self.weight[1]


def small(steps: int = 5, net: nn.Module | None = None, **options) -> GaussianDiffusion:
    return GaussianDiffusion(net or Small(), LogLinearSchedule(steps, -2.0, 3.0), (2,), prediction="x0", **options)


@every_method
def test_the_same_numbers_as_sample(method: str, eta: float):
    diffusion = small(11, decoder="learned")
    for last in ("mean", "sample"):
        options = {"method": method, "eta": eta, "last": last, "seed": 4}
        assert torch.equal(rsample(diffusion, 5, batch_size=2, **options), sample(diffusion, 5, **options))


@pytest.mark.parametrize("guide", GUIDES)
@every_method
def test_gradients_are_those_of_finite_differences(method: str, eta: float, guide: str):
    diffusion = small()
    weight, x_T = diffusion.net.weight, torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 2, dtype=torch.float64)
    options = {"method": method, "eta": eta, "seed": 0, "x_T": x_T, **GUIDES[guide]}
    gradients = torch.autograd.grad((probe * rsample(diffusion, 2, **options)).sum(), [weight, x_T])
    step = 1e-5
    for tensor, gradient in zip((weight, x_T), gradients, strict=True):
        for i in range(tensor.numel()):
            values = []
            for sign in (1, -1, 0):  # the last one restores
                moved = tensor.detach().flatten()
                before = moved[i].clone()
                moved[i] += sign * step
                values.append(float((probe * sample(diffusion, 2, **options)).sum()))
                moved[i] = before
            # central differences: truncation of the order of step^2, rounding of 1e-16 / step
            difference = (values[0] - values[1]) / (2 * step)
            assert difference == pytest.approx(float(gradient.flatten()[i]), rel=1e-6, abs=1e-8)


def test_gradients_of_a_learned_decoder():
    diffusion = small(decoder="learned").double()
    scale = diffusion.reverse_kernel.log_scale
    x0 = rsample(diffusion, 3, seed=1, last="sample")
    (gradient,) = torch.autograd.grad(x0.sum(), scale)
    mean = sample(diffusion, 3, seed=1)
    assert gradient.item() == pytest.approx((x0 - mean).sum().item(), rel=1e-12)  # d/ds exp(s) z


@pytest.mark.parametrize("bins", [None, (5, -1.0, 1.0)])
def test_log_probs_are_those_of_the_programs_sites(bins):
    diffusion = small(6, bins=bins)
    path = trajectory(diffusion, 4, seed=0, last="sample", batch_size=3)
    found = step_log_probs(diffusion, path, last="sample", batch_size=3)
    sites = {f"x_{6 - i}": state for i, state in enumerate(path)}
    trace = poutine.trace(poutine.condition(diffusion.model, data=sites)).get_trace(x0=path[-1])
    trace.compute_log_prob()
    expected = torch.stack([trace.nodes[f"x_{t}"]["log_prob"] for t in range(5, -1, -1)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step_log_probs(diffusion, path), expected[:-1], rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x.sum(), diffusion.net.weight)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("method", "eta"), [("ddim", 0.5), ("dpm++2m", 1.0), ("ancestral", 0.0)])
def test_the_density_of_a_step_is_that_of_its_noise(method: str, eta: float):
    """x_s = mean + std z, so that log p(x_s) = log N(z) - log std, with the sampler's own z and the posterior's std."""
    diffusion = small(7)
    options = {"method": method, "eta": eta, "steps": [1, 2, 4, 7]}
    path = trajectory(diffusion, 3, seed=5, **options)
    found = step_log_probs(diffusion, path, **options)
    streams = [np.random.default_rng([5, i]) for i in range(3)]
    z = torch.tensor(np.stack([stream.standard_normal((4, 2)) for stream in streams], axis=1))
    assert torch.equal(z[0], path[0])
    q = diffusion.reverse_kernel.respace([1, 2, 4, 7]).forward_process
    std = torch.stack([(eta or 1.0) * q.posterior(path[0], path[0], t).stddev for t in (4, 3, 2)])
    expected = (-(z[1:] ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_common_random_numbers():
    """Two linear denoisers: with the same noise all differences of samples are the same, with other noise they are noise."""
    one, other = (
        GaussianDiffusion(GaussianDenoiser(mean=mean), CosineSchedule(20), (1,), prediction="x0").double()
        for mean in (0.0, 0.01)
    )
    same = rsample(other, 50, seed=0) - rsample(one, 50, seed=0)
    assert same.std() < 1e-7 < 0.005 < same.mean() < 0.011
    assert (sample(other, 50, seed=1) - sample(one, 50, seed=0)).std() > 0.3


def test_activations_do_not_grow_with_the_chain():
    class Counting(MLP):
        """Counts how many of its hidden activations are alive."""

        def __init__(self) -> None:
            super().__init__(2, width=8, depth=1)
            self.alive: list[weakref.ref] = []
            self.most = self.calls = 0
            self.input.register_forward_hook(self.count)

        def count(self, module: nn.Module, arguments: object, output: Tensor) -> None:
            self.alive = [r for r in self.alive if r() is not None] + [weakref.ref(output)]
            self.most, self.calls = max(self.most, len(self.alive)), self.calls + 1

    most = {}
    for steps in (25, 100, 400):
        net = Counting()
        diffusion = GaussianDiffusion(net, CosineSchedule(steps), (2,))
        x0 = rsample(diffusion, 2, seed=0)
        assert net.calls == steps
        x0.sum().backward()
        # the whole chain once more, piece by piece, and each step once more
        assert net.calls <= 3 * steps
        most[steps] = net.most
    assert max(most.values()) <= 3, most


def test_the_backward_pass_is_in_evaluation_mode_too():
    class Dropping(Small):
        def forward(self, x: Tensor, log_snr: Tensor, y: Tensor | None = None) -> Tensor:
            assert not self.training
            return super().forward(x, log_snr, y)

    diffusion = small(net=Dropping())
    diffusion.train()
    rsample(diffusion, 2, seed=0).sum().backward()
    assert diffusion.net.training


@pytest.mark.slow
@pytest.mark.monte_carlo
def test_policy_gradients_point_where_the_reward_is():
    """REINFORCE with the steps' log-probabilities: of E[x_0] with respect to a bias, which shifts x_0 by a known amount."""

    n = 20_000

    class Shift(GaussianDenoiser):
        def __init__(self) -> None:
            super().__init__(mean=0.0, var=0.5)
            self.shift = nn.Parameter(torch.zeros(n, 1, dtype=torch.float64))  # an example's own, and so its gradient

        def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
            return super().forward(x, log_snr) + self.shift

    diffusion = GaussianDiffusion(Shift(), LogLinearSchedule(4, -2.0, 2.0), (1,), prediction="x0")
    (exact,) = torch.autograd.grad(rsample(diffusion, n, batch_size=n).sum(), diffusion.net.shift)
    torch.testing.assert_close(exact, exact[:1].expand(n, 1))  # linear: the same for all
    path = trajectory(diffusion, n, last="sample", batch_size=n)
    log_probs = step_log_probs(diffusion, path, last="sample", batch_size=n).sum(0)
    (scores,) = torch.autograd.grad((path[-1, :, 0] * log_probs).sum(), diffusion.net.shift)
    assert_mean(scores, exact[0], detects=0.6 * float(exact[0].abs()))


def test_mistakes_are_named():
    diffusion = small(5, bins=(5, -1.0, 1.0))
    with pytest.raises(OptionError, match="rounds to their grid"):
        rsample(diffusion, 2, last="sample")
    path = trajectory(diffusion, 2, "ddim", seed=0)
    with pytest.raises(OptionError, match="no density"):
        step_log_probs(diffusion, path, "ddim")
    net = pyrodiff.nets.UNet(1, width=8, multipliers=(1,), blocks=1, dropout=0.5, checkpointing=True)
    checkpointed = GaussianDiffusion(net, CosineSchedule(4), (1, 4, 4))
    with pytest.raises(OptionError, match=r"call .eval\(\) first"):
        rsample(checkpointed, 2)
    rsample(checkpointed.eval(), 2).sum().backward()
    with pytest.raises(ShapeError, match="path has shape"):
        step_log_probs(diffusion, path[..., :1])
    with pytest.raises(ShapeError, match="path has shape"):
        step_log_probs(diffusion, path.flatten())
    with pytest.raises(ShapeError, match="path has 6 states, and the chain 4"):
        step_log_probs(diffusion, path, steps=3)


def test_nothing_enters_pyros_store():
    rsample(small(), 2, seed=0).sum().backward()
    assert not list(pyro.get_param_store().keys())
