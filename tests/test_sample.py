"""Samplers: the law of the program, streams of each example's own, respacing."""

import math

import pyro
import pytest
import torch
from monte_carlo import any_seed, assert_estimate, assert_mean, assert_moments
from pyro import poutine
from pyro.infer import Predictive

import pyrodiff
from pyrodiff import CosineSchedule, GaussianDiffusion, LogLinearSchedule, sample, trajectory
from pyrodiff.errors import OptionError, ShapeError


class Linear(torch.nn.Module):
    """The exact denoiser of N(0.5, 0.2^2) per dim, as x0-prediction."""

    def forward(self, x, log_snr):
        alpha2, sigma2 = log_snr.sigmoid()[:, None], (-log_snr).sigmoid()[:, None]
        gain = alpha2.sqrt() * 0.04 / (alpha2 * 0.04 + sigma2)
        return 0.5 + gain * (x - alpha2.sqrt() * 0.5)


def exact(steps=200, **options):
    return GaussianDiffusion(Linear(), LogLinearSchedule(steps, -9.0, 9.0), (2,), prediction="x0", **options)


def unet(steps=6):
    net = pyrodiff.nets.UNet(1, width=8, multipliers=(1, 2), blocks=1, classes=3)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return GaussianDiffusion(net, CosineSchedule(steps), (1, 8, 8), prediction="v", bins=(17, -1.0, 1.0))


@pytest.mark.reliability("Q21")
@pytest.mark.parametrize("options", [{"method": "ancestral"}, {"method": "ddim"}, {"method": "ddim", "eta": 0.7}])
@pytest.mark.parametrize("last", ["mean", "sample"])
def test_a_sample_does_not_depend_on_the_batch_size(options, last, figure):
    diffusion, y = unet(), torch.arange(7) % 3
    draws = [sample(diffusion, 7, seed=3, last=last, batch_size=b, y=y, **options) for b in (1, 4, 7)]
    for other in draws[1:]:
        figure("Q21", "images by another batch size", (other - draws[0]).abs().max().item(), at_most=1e-5)
    more = sample(diffusion, 9, seed=3, last=last, y=torch.arange(9) % 3, **options)
    torch.testing.assert_close(more[:7], draws[0], rtol=0, atol=1e-5)
    assert (sample(diffusion, 7, seed=4, last=last, y=y, **options) - draws[0]).abs().max() > 1e-2
    assert len({tuple(x.flatten().tolist()) for x in draws[0]}) == 7


@pytest.mark.reliability("Q21")
def test_the_noise_is_bit_equal_for_any_batch(figure):
    diffusion = exact(5)  # elementwise: no rounding of a network's own
    draws = [sample(diffusion, 64, seed=0, batch_size=b) for b in (64, 1, 5, 7)]
    figure(
        "Q21",
        "samples of other noise by another batch size",
        sum(not torch.equal(x, draws[0]) for x in draws),
        at_most=0,
    )


def test_without_seed_torch_decides():
    diffusion = exact(5)
    torch.manual_seed(1)
    a, b = sample(diffusion, 3), sample(diffusion, 3)
    torch.manual_seed(1)
    assert torch.equal(sample(diffusion, 3), a) and not torch.equal(a, b)


def test_a_seed_leaves_the_global_stream_alone():
    state = torch.get_rng_state()
    sample(exact(5), 3, seed=0, last="sample")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.monte_carlo
@pytest.mark.parametrize("method", ["ancestral", "ddim"])
def test_law_of_the_samples(method):
    """Exact Gaussian denoiser: mean 0.5, sd 0.2, but for a hundredth, the chain's own error."""
    x = sample(exact(), 4000, method, last="sample" if method == "ancestral" else "mean").double()
    assert_moments(x, 0.5, 0.2**2, bias=0.01, detects=0.16)
    with pytest.raises(AssertionError, match="beyond"):  # a fifth of a standard deviation
        assert_moments(x + 0.04, 0.5, 0.2**2, bias=0.01, detects=0.16)


@pytest.mark.monte_carlo
def test_last_sample_has_the_programs_law_and_last_mean_has_less_variance():
    diffusion = exact(3)
    seed = any_seed()
    drawn = sample(diffusion, 6000, seed=seed, last="sample").double()
    mean = sample(diffusion, 6000, seed=seed).double()
    program = poutine.uncondition(diffusion.model)(torch.zeros(6000, 2)).double()
    predictive = Predictive(diffusion.model, num_samples=6000, parallel=True)()["x_0"].double()
    for other in (program, predictive):
        x, other = drawn.flatten(), other.flatten()  # normal, and independent
        assert_mean(x - other, 0.0, detects=0.2 * float(x.std()))
        # in log, each variance of 12,000 has deviation sqrt(2 / 12000)
        assert_estimate((x.var() / other.var()).log(), math.sqrt(4 / 12000), 0.0, detects=0.2)
    extra = (drawn.var() - mean.var()).item()
    assert extra == pytest.approx((-diffusion.schedule.log_snr(1)).exp().item(), rel=0.5)


def test_draws_lie_on_the_grid_and_means_do_not():
    diffusion, y = unet(), torch.zeros(4, dtype=torch.int64)
    drawn = sample(diffusion, 4, seed=0, last="sample", y=y)
    assert torch.equal(drawn, (drawn * 8).round() / 8) and drawn.abs().max() <= 1
    mean = sample(diffusion, 4, seed=0, y=y)
    assert not torch.equal(mean, (mean * 8).round() / 8)


def test_trajectory_ends_where_sample_does():
    diffusion = unet()
    y = torch.zeros(5, dtype=torch.int64)
    path = trajectory(diffusion, 5, seed=2, batch_size=2, y=y)
    assert path.shape == (7, 5, 1, 8, 8)
    torch.testing.assert_close(path[-1], sample(diffusion, 5, seed=2, y=y), rtol=0, atol=1e-5)
    assert abs(path[0].std() - 1) < 0.2


@pytest.mark.parametrize(("steps", "length"), [(10, 10), ("ddim50", 50), ("3,4,5", 12), ([1, 7, 200], 3)])
def test_respaced_chains(steps, length):
    assert len(trajectory(exact(), 2, "ddim", steps=steps, seed=0)) == length + 1


def test_respacing_by_every_step_changes_nothing():
    diffusion = exact(12)
    assert torch.equal(sample(diffusion, 3, seed=0), sample(diffusion, 3, seed=0, steps=12))


def test_respacing_keeps_a_learned_decoder():
    diffusion = exact(12, decoder="learned")
    diffusion.reverse_kernel.log_scale.data.fill_(-1.0)
    scale = diffusion.reverse_kernel.respace(3)(torch.zeros(1, 2), 1).stddev[0, 0].item()
    assert scale == pytest.approx(torch.tensor(-1.0).exp().item())


def test_the_network_runs_in_evaluation_mode_and_is_left_as_it_was():
    net = pyrodiff.nets.UNet(1, width=8, multipliers=(1,), blocks=1, dropout=0.5)
    diffusion = GaussianDiffusion(net, CosineSchedule(3), (1, 8, 8))
    modes = []
    net.register_forward_hook(lambda module, args, out: modes.append(module.training))
    net.train()
    sample(diffusion, 2, seed=0)
    pyrodiff.elbo_terms(diffusion, torch.zeros(2, 1, 8, 8))
    assert not any(modes) and net.training and all(m.training for m in net.modules())


def test_one_label_for_all_or_one_each():
    diffusion = unet()
    one = sample(diffusion, 4, seed=0, y=torch.tensor(2))
    each = sample(diffusion, 4, seed=0, y=torch.full((4,), 2))
    torch.testing.assert_close(one, each, rtol=0, atol=1e-5)
    with pytest.raises(ShapeError, match="y has 3 rows for n=4"):
        sample(diffusion, 4, y=torch.zeros(3, dtype=torch.int64))


def test_bad_options_name_the_allowed_set():
    diffusion = exact(5)
    for options, message in (
        ({"method": "euler"}, "'ancestral', 'ddim'"),
        ({"last": "median"}, "'mean', 'sample'"),
        ({"eta": 2.0}, r"\[0, 1\]"),
        ({"steps": "ddim4"}, "stride"),
        ({"steps": "7"}, "asks for 7"),
        ({"steps": "fast"}, "'ddimN'"),
    ):
        with pytest.raises(OptionError, match=message):
            sample(diffusion, 2, **options)
    with pytest.raises(OptionError):
        sample(diffusion, 0)


def test_float64_and_meta():
    assert sample(unet().double(), 2, seed=0, y=torch.tensor(0)).dtype == torch.float64
    with pyro.validation_enabled(False):
        assert sample(unet().to("meta"), 2, seed=0, y=torch.zeros(2, dtype=torch.int64, device="meta")).shape == (
            2,
            1,
            8,
            8,
        )
