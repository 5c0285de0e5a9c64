"""The contract of q and p: any batch shape gives what a loop over examples gives, in any dtype, on any event."""

import pytest
import torch
from torch import nn

import pyrodiff
from pyrodiff import CosineSchedule, DiscretizedNormal, ForwardProcess, ReverseKernel
from pyrodiff.errors import OptionError, ProgramError, ShapeError
from pyrodiff.reverse import PREDICTIONS, VARIANCES

SHAPES = [((3,), (3, 3, 3)), ((5,), (2, 4, 3)), ((2, 3), (3,)), ((1,), (1, 1, 1)), ((4, 1, 2), (2,))]


class Wavy(nn.Module):
    """Elementwise, smooth, depends on everything; twice the channels where variances are learned."""

    def __init__(self, twice):
        super().__init__()
        self.twice = twice

    def forward(self, x, log_snr, shift=None):
        assert x.dim() >= 2 and log_snr.shape == x.shape[:1] and log_snr.dtype == x.dtype
        s = (log_snr / 10).reshape((-1,) + (1,) * (x.dim() - 1))
        if shift is not None:
            assert shift.shape == x.shape[:1]
            s = s + shift.reshape(s.shape)
        out = 1.5 * torch.tanh(0.9 * x + s)
        return torch.cat([out, torch.cos(x + s)], 1) if self.twice else out


def kernel(prediction="eps", variance="fixed_small", steps=9, **options):
    return ReverseKernel(Wavy(variance.startswith("learned")), CosineSchedule(steps), prediction, variance, **options)


def moments(law):
    return law.mean, law.stddev


@pytest.mark.parametrize(("batch", "event"), SHAPES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_batch_equals_a_loop(prediction, variance, batch, event):
    for decoder in ("vdm", "learned", "openai"):
        p = kernel(prediction, variance, decoder=decoder, event_dim=len(event))
        x = torch.randn(*batch, *event, dtype=torch.float64)
        t = torch.randint(1, 10, batch)
        t.view(-1)[0] = 1
        law = p(x, t)
        assert law.batch_shape == torch.Size(batch) and law.event_shape == torch.Size(event)
        law_s, law_0 = p.both(x, t)
        for index in torch.cartesian_prod(*[torch.arange(n) for n in batch]).reshape(-1, len(batch)).tolist():
            i = tuple(index)
            one = p(x[i][None], t[i][None])
            torch.testing.assert_close(law.mean[i], one.mean[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(law.stddev[i], one.stddev[0], rtol=1e-12, atol=1e-12)
            part = law_0 if t[i] == 1 else law_s
            torch.testing.assert_close(part.mean[i], one.mean[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(part.stddev[i], one.stddev[0], rtol=1e-12, atol=1e-12)
            if t[i] == 1:
                decoded = p.decode(x[i][None])
                torch.testing.assert_close(decoded.mean, one.mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("batch", "event"), SHAPES)
def test_forward_laws_equal_a_loop(batch, event):
    q = ForwardProcess(CosineSchedule(9), len(event))
    x0, x_t = torch.randn(2, *batch, *event, dtype=torch.float64)
    t = torch.randint(2, 10, batch)
    laws = {
        "marginal": lambda i: q.marginal(x0[i], t[i]),
        "transition": lambda i: q.transition(x0[i], t[i] - 1, t[i]),
        "posterior": lambda i: q.posterior(x0[i], x_t[i], t[i]),
    }
    for make in laws.values():
        whole = make(...)
        assert whole.batch_shape == torch.Size(batch) and whole.event_shape == torch.Size(event)
        for index in torch.cartesian_prod(*[torch.arange(n) for n in batch]).reshape(-1, len(batch)).tolist():
            i = tuple(index)
            for a, b in zip(moments(whole), moments(make(i)), strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-14, atol=1e-14)


def test_event_dim_none_takes_all_dims_beyond_those_of_t():
    q, x = ForwardProcess(CosineSchedule(9)), torch.randn(3, 2, 2)
    assert q.marginal(x, torch.tensor([1, 2, 3])).event_shape == (2, 2)
    assert q.marginal(x, 3).event_shape == (3, 2, 2)
    p = kernel()
    assert p(x, torch.tensor([1, 2, 3])).event_shape == (2, 2)
    fixed = kernel(event_dim=2)
    torch.testing.assert_close(p(x, torch.tensor([1, 2, 3])).mean, fixed(x, torch.tensor([1, 2, 3])).mean)
    log_snr = torch.tensor([3.0, 1.0, -2.0])
    torch.testing.assert_close(p.denoise_at(x, log_snr), fixed.denoise_at(x, log_snr))


def test_scalar_and_lower_rank_timesteps_broadcast():
    p = kernel(event_dim=1)
    x = torch.randn(4, 5, 2)
    whole = p(x, 3)
    torch.testing.assert_close(whole.mean, p(x, torch.full((4, 5), 3)).mean)
    row = p(x, torch.tensor([1, 2, 3, 4, 5]))
    torch.testing.assert_close(row.mean[:, 2], whole.mean[:, 2])


def test_conditioning_broadcasts_like_a_distribution():
    p = kernel(event_dim=1)
    x, shift = torch.randn(5, 2), torch.randn(7, 1)
    law = p(x, 3, shift=shift)
    assert law.batch_shape == (7, 5)
    for j in range(7):
        torch.testing.assert_close(law.mean[j], p(x, 3, shift=shift[j]).mean)
    with pytest.raises(ShapeError, match=r"batch shapes of x_t, t and shift differ: \[5\], \[\], \[4\]"):
        p(x, 3, shift=torch.zeros(4))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_are_one_network_in_five_coordinates(prediction):
    """A network that knows x_0 says it in each coordinate; every kernel must then be the posterior (eq. 7)."""
    schedule, x0 = CosineSchedule(9), torch.randn(6, 2, dtype=torch.float64)
    t = torch.tensor([2, 3, 5, 9, 4, 2])
    q = ForwardProcess(schedule, 1)
    x_t = q.marginal(x0, t).sample()
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    eps = (x_t - alpha * x0) / sigma
    said = {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "previous": q.posterior(x0, x_t, t).mean,
    }[prediction]

    class Oracle(nn.Module):
        def forward(self, x, log_snr):
            return said

    p = ReverseKernel(Oracle(), schedule, prediction, event_dim=1)
    for a, b in zip(moments(p(x_t, t)), moments(q.posterior(x0, x_t, t)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(p.denoise(x_t, t), x0, rtol=1e-9, atol=1e-9)


def test_clipping_moves_x0_hat_and_the_mean_but_not_a_predicted_mean():
    x = 3 * torch.randn(50, 2)
    for prediction in PREDICTIONS:
        free, clipped = kernel(prediction, event_dim=1), kernel(prediction, event_dim=1, clip=True)
        assert free.denoise(x, 5).abs().max() > 1
        assert clipped.denoise(x, 5).abs().max() <= 1
        same = torch.equal(free(x, 5).mean, clipped(x, 5).mean)
        assert same is (prediction == "previous")  # as in guided-diffusion, gaussian_diffusion.py
    wide = kernel("x0", event_dim=1, clip=True, bins=(11, 0.0, 0.5))
    assert wide.denoise(x, 5).min() >= 0 and wide.denoise(x, 5).max() <= 0.5


def test_bins_choose_the_decoders_family():
    p = kernel(event_dim=1, bins=(17, -1.0, 1.0))
    decoder = p.decode(torch.randn(4, 2))
    assert isinstance(decoder.base_dist, DiscretizedNormal) and decoder.base_dist.levels == 17
    assert isinstance(p(torch.randn(4, 2), 1).base_dist, torch.distributions.Normal)


def test_learned_range_interpolates_and_is_not_clamped():
    q_small, q_large = kernel(variance="fixed_small", event_dim=1), kernel(variance="fixed_large", event_dim=1)

    class Constant(nn.Module):
        def forward(self, x, log_snr):
            return torch.cat([x, torch.full_like(x, self.v)], 1)

    net = Constant()
    p = ReverseKernel(net, CosineSchedule(9), variance="learned_range", event_dim=1)
    x = torch.randn(3, 2, dtype=torch.float64)
    small, large = q_small(x, 4).stddev, q_large(x, 4).stddev
    for v, expected in ((-1, small), (1, large), (0, (small * large).sqrt()), (3, large**2 / small)):
        net.v = v
        torch.testing.assert_close(p(x, 4).stddev, expected, rtol=1e-12, atol=0)


def test_gradients_reach_x_t_and_the_network():
    p = ReverseKernel(pyrodiff.nets.MLP(2, width=8, depth=1), CosineSchedule(9), "v", event_dim=1)
    for parameter in p.parameters():
        parameter.data.normal_()
    x = torch.randn(4, 2, requires_grad=True)
    p(x, torch.tensor([1, 2, 5, 9])).rsample().sum().backward()
    assert x.grad.abs().min() > 0 and all(q.grad is not None for q in p.parameters())


def test_steps_1_has_a_decoder_only():
    p = ReverseKernel(Wavy(False), pyrodiff.LogLinearSchedule(1, -1.0, 5.0), event_dim=1)
    x = torch.randn(3, 2)
    torch.testing.assert_close(p(x, 1).mean, p.decode(x).mean)
    with pytest.raises(ProgramError, match="decode"):
        p.both(x, 1)
    two = ReverseKernel(Wavy(False), pyrodiff.LogLinearSchedule(2, -1.0, 5.0), event_dim=1)
    law_of_x_1, law_of_x_0 = two.both(x, torch.tensor([1, 2, 2]))
    torch.testing.assert_close(law_of_x_1.mean[1:], two(x[1:], 2).mean)
    torch.testing.assert_close(law_of_x_0.mean[:1], two.decode(x[:1]).mean)
    with pytest.raises(OptionError, match="t = 2"):
        ReverseKernel(Wavy(False), pyrodiff.LogLinearSchedule(1, -1.0, 5.0), decoder="openai")


def test_posterior_at_1_is_refused():
    q = ForwardProcess(CosineSchedule(9), 1)
    with pytest.raises(ProgramError, match="point mass"):
        q.posterior(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([2, 1]))


def test_prior_follows_a_tensors_dtype():
    q = ForwardProcess(CosineSchedule(9), 1)
    like = torch.zeros(1, dtype=torch.float64)
    law = q.prior((4, 2), like)
    assert law.batch_shape == (4,) and law.event_shape == (2,) and law.rsample().dtype == torch.float64
    assert ForwardProcess(CosineSchedule(9)).prior((4, 2)).event_shape == (4, 2)
