"""Solvers against the exact flow and the exact reverse SDE of Gaussian data; guidance against closed forms; inversion."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from oracles import GaussianDenoiser
from torch import nn

import pyrodiff
from pyrodiff import CosineSchedule, GaussianDiffusion, LogLinearSchedule, sample, trajectory
from pyrodiff.errors import OptionError, ShapeError
from pyrodiff.sample import METHODS, Guided, invert
from pyrodiff.schedules import Schedule

MEAN, VAR = 0.3, 0.25
every_method = pytest.mark.parametrize("method", METHODS)


class Uneven(Schedule):
    """Log-SNR from 4 down to -4 in steps whose lengths differ threefold, smoothly: refining keeps their proportions."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        u = torch.linspace(0, 1, steps, dtype=torch.float64)
        inner = 4 - 8 * (u + 0.08 * torch.sin(2 * math.pi * u))
        self.table = torch.cat([torch.tensor([math.inf], dtype=torch.float64), inner])

    def log_snr(self, t):
        return self.table[torch.as_tensor(t)]


def gaussian(schedule, mean=MEAN, var=VAR, dims=1, prediction="x0", **options):
    """The exact denoiser of N(mean, var) per dim, in float64."""
    net = GaussianDenoiser(prediction, mean=mean, var=var)
    net.register_parameter("float64", nn.Parameter(torch.zeros((), dtype=torch.float64)))
    return GaussianDiffusion(net, schedule, (dims,), prediction=prediction, **options)


def moments(diffusion, t):
    """Mean and standard deviation of q(x_t), and alpha_t."""
    alpha, sigma = diffusion.schedule.alpha(t), diffusion.schedule.sigma(t)
    return alpha * MEAN, (alpha**2 * VAR + sigma**2).sqrt(), alpha


def flow(diffusion, x, s, t):
    """The probability flow of Gaussian data, from x at s to t: the same number of standard deviations."""
    (m_s, sd_s, _), (m_t, sd_t, _) = moments(diffusion, s), moments(diffusion, t)
    return m_t + sd_t * (x - m_s) / sd_s


# ---------------------------------------------------------------------- orders of convergence

STEPS = (64, 128, 256)
X_T = 1.7


def assert_order(errors, order):
    """Halving the steps divides the error by 2^order, up to its next term: relative to it some h, at most 0.04 here."""
    assert len(errors) == len(STEPS) and errors[-1] > 1e-9  # else there is rounding to see, and no order
    for coarse, fine in itertools.pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.05, errors


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm++2m", 2), ("heun", 2)])
def test_order_of_convergence_to_the_flow(method, order):
    errors = []
    for steps in STEPS:
        diffusion, x_T = gaussian(Uneven(steps + 1)), torch.tensor([[X_T]], dtype=torch.float64)
        x_1 = trajectory(diffusion, 1, method, x_T=x_T)[-2]
        errors.append((x_1 - flow(diffusion, x_T, steps + 1, 1)).abs().item())
    assert_order(errors, order)
    with pytest.raises(AssertionError):
        assert_order(errors, 3 - order)


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm++2m", 2)])
def test_order_of_convergence_to_the_reverse_sde(method, order, monkeypatch):
    """With eta = 1 the law of x_1 given x_T tends to q(x_1 | x_T), which is Gaussian as all of q."""
    module = importlib.import_module("pyrodiff.sample")
    errors = []
    for steps in STEPS:
        # dim k has noise, 1, in step k alone: what it makes of x_1 is the step's share of the standard deviation
        diffusion = gaussian(Uneven(steps + 1), dims=steps + 1)
        x_T, unit = torch.full((1, steps + 1), X_T, dtype=torch.float64), torch.eye(steps + 1, dtype=torch.float64)
        noises = iter([unit[-1:], *unit.split(1)])
        monkeypatch.setattr(module, "_noise", lambda *args, noises=noises: noises)
        x_1 = trajectory(diffusion, 1, method, eta=1.0, x_T=x_T)[-2, 0]
        mean, variance = x_1[-1], (x_1[:-1] - x_1[-1]).square().sum()
        (m_1, sd_1, alpha_1), (m_T, sd_T, alpha_T) = moments(diffusion, 1), moments(diffusion, steps + 1)
        slope = alpha_T / alpha_1 * sd_1**2 / sd_T**2
        # along the mean x0_hat does not change (it is a martingale), and the steps are exact; some rounding
        assert abs(mean - m_1 - slope * (X_T - m_T)) < 1e-13
        errors.append((variance - sd_1**2 + slope**2 * sd_T**2).abs().item())
    assert_order(errors, order)


def test_methods_are_exact_for_a_point_of_data():
    """Without variance x0_hat is constant, and every solver's step is exact but for rounding, however long."""
    point = gaussian(LogLinearSchedule(4, -4.0, 4.0), var=0.0)
    x_T = torch.randn(5, 1, dtype=torch.float64)
    q = point.schedule
    eps = (x_T - q.alpha(4) * MEAN) / q.sigma(4)
    for method in ("ddim", "dpm++2m", "heun"):
        path = trajectory(point, 5, method, x_T=x_T)
        for t, x_t in zip((4, 3, 2, 1), path, strict=False):
            torch.testing.assert_close(x_t, q.alpha(t) * MEAN + q.sigma(t) * eps, rtol=0, atol=1e-13)
        torch.testing.assert_close(path[-1], torch.full_like(x_T, MEAN), rtol=0, atol=1e-13)


def test_eta_1_is_the_ancestral_sampler_of_the_small_variance():
    diffusion = gaussian(LogLinearSchedule(12, -6.0, 6.0), dims=3)
    one, other = (sample(diffusion, 4, method, seed=0, eta=eta) for method, eta in (("ddim", 1.0), ("ancestral", 0.0)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    first_step = trajectory(diffusion, 4, "dpm++2m", seed=0, eta=1.0)[1]
    torch.testing.assert_close(first_step, trajectory(diffusion, 4, "ancestral", seed=0)[1], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- what all methods share


class Calls(nn.Module):
    """A network with classes, of which the last is the null class; counts its calls."""

    def __init__(self, learned=False, null=True):
        super().__init__()
        self.net = pyrodiff.nets.UNet(
            1, width=8, multipliers=(1,), blocks=1, classes=3, out_channels=2 if learned else 1
        )
        for p in self.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        self.double()
        self.cond_event_dims, self.count = self.net.cond_event_dims, 0
        if null:
            self.null_cond = {"y": 2}

    def forward(self, x, log_snr, **cond):
        self.count += 1
        return self.net(x, log_snr, **cond)


def labelled(steps=6, prediction="eps", variance="fixed_small", null=True, **options):
    net = Calls(variance.startswith("learned"), null)
    return GaussianDiffusion(net, CosineSchedule(steps), (1, 4, 4), prediction, variance, **options)


@every_method
@pytest.mark.parametrize("last", ["mean", "sample"])
def test_network_calls(method, last):
    diffusion, y = labelled(), torch.tensor(1)
    sample(diffusion, 2, method, seed=0, last=last, y=y)
    law = last == "sample" and method != "ancestral"  # one more call, for the scale of the decoder
    expected = (11 if method == "heun" else 6) + law  # heun: two for a step, one for the last
    assert diffusion.net.count == expected
    diffusion.net.count = 0
    sample(diffusion, 2, method, seed=0, last=last, y=y, guidance_scale=2.0)
    assert diffusion.net.count == 2 * expected


@every_method
def test_a_sample_does_not_depend_on_the_batch_size(method):
    diffusion, y = labelled(), torch.arange(7) % 2

    def towards_label(x, t, y):
        return -0.1 * (x.flatten(1).mean(1) - y.double()).square()

    for more in ({}, {"guidance_scale": 3.0}, {"classifier": towards_label}):
        draws = [sample(diffusion, 7, method, seed=3, batch_size=b, y=y, **more) for b in (2, 7)]
        torch.testing.assert_close(draws[1], draws[0], rtol=0, atol=1e-10)


@every_method
def test_a_chain_of_one_step_is_the_denoiser(method):
    diffusion, x_T = gaussian(LogLinearSchedule(3, -4.0, 4.0)), torch.randn(5, 1, dtype=torch.float64)
    got = sample(diffusion, 5, method, steps=[2], x_T=x_T)
    torch.testing.assert_close(got, diffusion.reverse_kernel.denoise(x_T, 2), rtol=0, atol=1e-14)


def test_starting_from_given_noise():
    diffusion = gaussian(LogLinearSchedule(5, -4.0, 4.0), dims=2)
    path = trajectory(diffusion, 4, "ancestral", seed=1)
    assert torch.equal(sample(diffusion, 4, "ancestral", seed=1, x_T=path[0], batch_size=3), path[-1])
    with pytest.raises(ShapeError, match=r"x_T has shape \[4, 2\], not \[3, 2\]"):
        sample(diffusion, 3, x_T=path[0])


@pytest.mark.parametrize("method", ["ancestral", "heun"])
def test_eta_where_it_would_do_nothing_is_refused(method):
    with pytest.raises(OptionError, match=f"'ddim', 'dpm\\+\\+2m', not to method='{method}'"):
        sample(gaussian(LogLinearSchedule(5, -4.0, 4.0)), 2, method, eta=0.5)


# ---------------------------------------------------------------------- classifier-free guidance


@every_method
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "score", "previous"])
def test_classifier_free_guidance_is_that_of_the_networks_output(prediction, variance, method):
    """Guiding x0_hat is guiding eps (their eq. 6), v, ...: a network that guides its own output gives the same samples."""
    diffusion, y = labelled(4, prediction, variance), torch.tensor([0, 1, 1])
    guided = sample(diffusion, 3, method, seed=0, last="sample", guidance_scale=2.5, y=y)

    class Inside(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, log_snr, y):
            given, free = self.net(x, log_snr, y=y), self.net(x, log_snr, y=torch.full_like(y, 2))
            if variance == "fixed_small":
                return free + 2.5 * (given - free)
            return torch.cat([free[:, :1] + 2.5 * (given - free)[:, :1], given[:, 1:]], 1)

    inside = GaussianDiffusion(Inside(diffusion.net), diffusion.schedule, (1, 4, 4), prediction, variance)
    expected = sample(inside, 3, method, seed=0, last="sample", y=y)
    # alpha_T is 7e-4 here: x0_hat of eps or a score is known to 1e-16 / alpha_T^2, and is of size 1 / alpha_T
    torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(guided, sample(diffusion, 3, method, seed=0, last="sample", y=y), rtol=1e-3)


def test_guidance_scales_0_and_1():
    diffusion, y = labelled(), torch.tensor([0, 1])
    null = sample(diffusion, 2, "ddim", seed=0, y=torch.tensor(2))
    torch.testing.assert_close(sample(diffusion, 2, "ddim", seed=0, guidance_scale=0.0, y=y), null, rtol=0, atol=1e-10)
    assert torch.equal(
        sample(diffusion, 2, seed=0, y=y, guidance_scale=1.0), sample(labelled_like(diffusion), 2, seed=0, y=y)
    )


def labelled_like(diffusion):
    """The same model without a null class: a scale of 1 needs none."""
    bare = GaussianDiffusion(diffusion.net.net, diffusion.schedule, (1, 4, 4))
    assert not bare.net.null_cond
    return bare


def test_clipping_comes_after_guidance():
    diffusion, y = labelled(clip=True), torch.tensor(1)
    assert sample(diffusion, 4, "ddim", seed=0, guidance_scale=50.0, y=y).abs().max() <= 1


def test_a_network_without_null_class_is_refused():
    with pytest.raises(OptionError, match=r"guidance_scale=2.0 needs .* null class, .* null_cond; Calls has none"):
        sample(labelled(null=False), 2, guidance_scale=2.0, y=torch.tensor(1))
    with pytest.raises(OptionError, match="guides towards y, which is not given"):
        sample(labelled(), 2, guidance_scale=2.0)


# ---------------------------------------------------------------------- classifier guidance


@pytest.mark.parametrize("method", ["ddim", "dpm++2m", "heun"])
def test_an_exact_classifier_turns_the_prior_into_the_posterior(method):
    """For y = x_0 + N(0, 0.1) log p(y | x_t) is Gaussian, and the guided denoiser is that of p(x_0 | y)."""
    y, noise = -0.8, 0.1
    target = torch.tensor(y, dtype=torch.float64)
    schedule = LogLinearSchedule(9, -4.0, 5.0)

    def log_prob(x_t, t):
        alpha, sigma = (z.reshape(-1, 1) for z in (schedule.alpha(t), schedule.sigma(t)))
        total = alpha**2 * VAR + sigma**2
        mean = MEAN + alpha * VAR / total * (x_t - alpha * MEAN)
        return torch.distributions.Normal(mean, (VAR * sigma**2 / total + noise).sqrt()).log_prob(target).sum(1)

    gain = VAR / (VAR + noise)
    posterior = gaussian(schedule, mean=MEAN + gain * (y - MEAN), var=VAR * (1 - gain), dims=2)
    prior = gaussian(schedule, dims=2)
    guided = trajectory(prior, 6, method, seed=0, classifier=log_prob)
    torch.testing.assert_close(guided, trajectory(posterior, 6, method, seed=0), rtol=0, atol=1e-10)
    halved = trajectory(prior, 6, method, seed=0, classifier=lambda x, t: 0.5 * log_prob(x, t))
    assert (halved[-1] - guided[-1]).abs().mean() > 0.05


def test_classifiers_see_the_conditioning_and_leave_no_graph():
    diffusion, seen = labelled(), []

    def classifier(x_t, t, y):
        assert x_t.requires_grad and torch.is_grad_enabled()
        seen.append(y.tolist())
        return (x_t.flatten(1).sum(1) * y).double()

    x = sample(diffusion, 3, "ddim", seed=0, batch_size=2, classifier=classifier, y=torch.tensor([0, 1, 1]))
    assert not x.requires_grad and all(p.grad is None for p in diffusion.parameters())
    assert seen[0] == [0, 1] and seen[-1] == [1]
    x_t = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    Guided(diffusion.reverse_kernel, 1.0, lambda x, t: x.flatten(1).sum(1), range(1, 99))(
        x_t, 2, y=torch.tensor([0, 1])
    )
    assert not x_t.requires_grad


def test_a_classifier_that_sums_the_batch_is_refused():
    with pytest.raises(ShapeError, match=r"classifier returns shape \[\], not one value for each of 2") as raised:
        sample(gaussian(LogLinearSchedule(3, -4.0, 4.0)), 2, classifier=lambda x, t: x.sum())
    # gradients are on again, even while the traceback keeps the frames alive
    assert raised.tb is not None and torch.is_grad_enabled()


# ---------------------------------------------------------------------- inversion


def test_inversion_converges_to_the_flow_and_back():
    """x_T of the flow from x_1 = x_0; and DDIM brings it back to x_1: both to first order."""
    there, back = [], []
    for steps in STEPS:
        diffusion = gaussian(Uneven(steps + 1))
        x_1 = torch.tensor([[-0.9]], dtype=torch.float64)
        x_T = invert(diffusion, x_1)
        there.append((x_T - flow(diffusion, x_1, 1, steps + 1)).abs().item())
        back.append((trajectory(diffusion, 1, "ddim", x_T=x_T)[-2] - x_1).abs().item())
    assert_order(there, 1)
    assert_order(back, 1)


def test_inversion_takes_conditioning_and_batches():
    diffusion, x0, y = labelled(), torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    whole = invert(diffusion, x0, y=y)
    torch.testing.assert_close(invert(diffusion, x0, batch_size=2, y=y), whole, rtol=0, atol=1e-9)
    each = torch.cat([invert(diffusion, x[None], y=label) for x, label in zip(x0, y, strict=True)])
    torch.testing.assert_close(each, whole, rtol=0, atol=1e-9)
    assert invert(diffusion, x0, steps=3, y=y).shape == x0.shape
    with pytest.raises(ShapeError, match="x0 has shape"):
        invert(diffusion, x0[:, 0], y=y)


def test_inverting_and_decoding_brings_images_back():
    diffusion = gaussian(LogLinearSchedule(200, -6.0, 8.0), dims=3)
    x0 = MEAN + 0.5 * torch.randn(4, 3, dtype=torch.float64)
    again = sample(diffusion, 4, "ddim", x_T=invert(diffusion, x0))
    assert (again - x0).abs().max() < 0.02 < 0.2 < (sample(diffusion, 4, "ddim", seed=0) - x0).abs().max()
