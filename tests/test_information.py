"""The information identity: against closed forms, by quadrature over the noise and over log-SNR."""

import itertools
import math

import numpy as np
import pytest
import torch
from monte_carlo import any_seed, assert_mean
from oracles import DDPM, MEAN, VAR, GaussianDenoiser, GridDenoiser, LinearModel, MixtureDenoiser, hermite

import pyrodiff
from pyrodiff.errors import OptionError
from pyrodiff.likelihood.information import Density, denoising_error, information

F64 = torch.float64
GAIN, BIAS = 0.15, -0.1  # a denoiser that is not the exact one: nothing cancels by luck
MIXTURE = ([0.5, 0.3, 0.2], [-1.0, 0.2, 1.5], [0.09, 0.25, 0.04])


def make(net, steps=2, ends=(-6.0, 6.0), **options):
    schedule = pyrodiff.LogLinearSchedule(steps, *ends)
    return pyrodiff.GaussianDiffusion(net, schedule, (1,), **{"prediction": net.prediction} | options)


def legendre(low, high, nodes):
    """Nodes and weights of Gauss-Legendre quadrature, panels of one unit or so."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    edges = np.linspace(low, high, max(1, round(high - low)) + 1)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (x + 1)).ravel(), (half * w).ravel()


def trapezoid(step=0.02, reach=9.0):
    """Nodes of the noise for what is not a polynomial."""
    z = np.arange(-reach, reach + step / 2, step)
    return z, step * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def error_by_quadrature(diffusion, x0, log_snr, noise=None):
    """e(x_0, lambda) of the library at each lambda: ``[L]``."""
    z, w = hermite(40) if noise is None else noise
    lam = torch.tensor(np.repeat(log_snr, len(z)))
    tape = torch.tensor(np.tile(z, len(log_snr)))[:, None]
    x0 = torch.full((len(lam), 1), float(x0), dtype=F64)
    found = denoising_error(diffusion, x0, lam, lambda like: tape)
    return found.numpy().reshape(len(log_snr), len(z)) @ w


class Linear:
    """A linear denoiser of N(mean, var) at continuous log-SNR, ``x0_hat = (1 + gain) E[x_0 | x] + bias``, in closed form."""

    def __init__(self, mean=MEAN, var=VAR, gain=0.0, bias=0.0):
        self.mean, self.var, self.gain, self.bias = mean, var, gain, bias

    def coefficients(self, lam):
        a2, s2 = 1 / (1 + np.exp(-lam)), 1 / (1 + np.exp(lam))
        k = np.sqrt(a2) * self.var / (a2 * self.var + s2)
        return (1 + self.gain) * k, (1 + self.gain) * self.mean * (1 - k * np.sqrt(a2)) + self.bias, a2, s2

    def error(self, x0, lam):
        """e(x_0, lambda)."""
        A, B, a2, s2 = self.coefficients(lam)
        return 0.5 * np.exp(lam) * ((x0 - A * np.sqrt(a2) * x0 - B) ** 2 + A**2 * s2)

    def second_moment(self, x0, lam):
        """E of the square of a draw of e."""
        A, B, a2, s2 = self.coefficients(lam)
        m, v = x0 - A * np.sqrt(a2) * x0 - B, A**2 * s2
        return 0.25 * np.exp(2 * lam) * (m**4 + 6 * m**2 * v + 3 * v**2)

    def integral(self, x0, low, high):
        lam, w = legendre(low, high, 12)
        return float(self.error(x0, lam) @ w)

    def prior(self, x0, low):
        a2, s2 = 1 / (1 + math.exp(-low)), 1 / (1 + math.exp(low))
        return 0.5 * (a2 * x0**2 + s2 - 1 - math.log(s2))

    def reconstruction(self, x0, high):
        """VDM's Normal decoder of variance exp(-lambda_1)."""
        return 0.5 * (math.log(2 * math.pi) - high) + float(self.error(x0, high))

    def estimate(self, x0, low, high):
        return self.prior(x0, low) + self.integral(x0, low, high) + self.reconstruction(x0, high)


def log_density(x, alpha2=1.0, parts=MIXTURE):
    """Log-density of alpha x_0 + sigma eps for data from the mixture."""
    w, m, v = (np.array(z) for z in parts)
    var = alpha2 * v + 1 - alpha2
    off = np.asarray(x)[..., None] - math.sqrt(alpha2) * m
    terms = np.log(w) - 0.5 * (np.log(2 * math.pi * var) + off**2 / var)
    top = terms.max(-1, keepdims=True)
    return (top + np.log(np.exp(terms - top).sum(-1, keepdims=True)))[..., 0]


def kl_of_mixture(x0, lam):
    """KL(q(x_lambda | x_0) || p_lambda)."""
    a2, s2 = 1 / (1 + math.exp(-lam)), 1 / (1 + math.exp(lam))
    z, w = trapezoid()
    log_p = log_density(math.sqrt(a2) * x0 + math.sqrt(s2) * z, a2)
    return -0.5 * (1 + math.log(2 * math.pi * s2)) - float(log_p @ w)


# ---------------------------------------------------------------------- the integrand


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_the_error_in_every_coordinate(prediction):
    diffusion = make(GaussianDenoiser(prediction, gain=GAIN, bias=BIAS))
    closed, lam = Linear(gain=GAIN, bias=BIAS), np.array([-7.3, -0.2, 1.7, 5.9])  # no step of the chain
    for x0 in (0.7, -2.0):
        np.testing.assert_allclose(error_by_quadrature(diffusion, x0, lam), closed.error(x0, lam), rtol=1e-9)


def test_the_error_adds_up_over_the_event_and_clips():
    net = GaussianDenoiser("x0", gain=2.0)
    plain, clipped = (
        pyrodiff.GaussianDiffusion(net, pyrodiff.CosineSchedule(9), (2, 3), "x0", clip=clip) for clip in (False, True)
    )
    x0, lam = torch.randn(4, 2, 3, dtype=F64).clamp(-1, 1), torch.tensor([-1.0, 0.0, 2.0, 3.0], dtype=F64)
    noise = torch.randn(4, 2, 3, dtype=F64)
    alpha, sigma = lam.sigmoid().sqrt()[:, None, None], (-lam).sigmoid().sqrt()[:, None, None]
    x0_hat = net(alpha * x0 + sigma * noise, lam)
    assert (x0_hat.abs() > 1).any()
    for diffusion, estimate in ((plain, x0_hat), (clipped, x0_hat.clamp(-1, 1))):
        expected = 0.5 * lam.exp() * (x0 - estimate).square().sum((1, 2))
        torch.testing.assert_close(denoising_error(diffusion, x0, lam, lambda like: noise), expected)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_between_steps_and_at_them_the_denoiser_is_one(prediction):
    diffusion = make(GaussianDenoiser(prediction, gain=GAIN), steps=7)
    p, x = diffusion.reverse_kernel, torch.randn(5, 1, dtype=F64)
    for t in (1, 4, 7):
        at = p.denoise_at(x, float(diffusion.schedule.log_snr(t)))
        torch.testing.assert_close(at, p.denoise(x, t), rtol=0, atol=0)
    t = torch.tensor([1, 7, 3, 2, 5])
    torch.testing.assert_close(p.denoise_at(x, diffusion.schedule.log_snr(t)), p.denoise(x, t), rtol=0, atol=0)
    bare = pyrodiff.ReverseKernel(p.net, p.schedule, prediction)  # event dims from the shapes
    torch.testing.assert_close(bare.denoise_at(x, diffusion.schedule.log_snr(t)), p.denoise(x, t), rtol=0, atol=0)


# ---------------------------------------------------------------------- the identity, for exact denoisers


@pytest.mark.parametrize("x0", [-1.4, 0.35, 3.0])
def test_the_integral_is_a_difference_of_kls(x0):
    """For every x_0, far out ones too; Legendre by 8 nodes in a unit of log-SNR, trapezoid in the noise."""
    diffusion = make(MixtureDenoiser(*MIXTURE, "x0"))
    low, high = -6.0, 6.0
    lam, w = legendre(low, high, 8)
    integral = float(error_by_quadrature(diffusion, x0, lam, trapezoid(0.05)) @ w)
    assert integral == pytest.approx(kl_of_mixture(x0, high) - kl_of_mixture(x0, low), abs=1e-8)


@pytest.mark.parametrize("x0", [-1.4, 0.35, 3.0])
def test_against_a_gaussian_it_is_the_log_density(x0):
    """Kong et al.'s form over all log-SNR: what is left beyond -30 and 20 is below 1e-8."""
    diffusion = make(MixtureDenoiser(*MIXTURE, "x0"))
    weights, means, variances = (np.array(z) for z in MIXTURE)
    v = float(weights @ (variances + means**2) - (weights @ means) ** 2)
    lam, w = legendre(-30.0, 20.0, 8)
    gap = 0.5 * np.exp(lam) / (1 / v + np.exp(lam)) - error_by_quadrature(diffusion, x0, lam, trapezoid(0.05))
    found = 0.5 * math.log(2 * math.pi * math.e * v) - float(gap @ w)
    assert found == pytest.approx(-float(log_density(x0)), abs=1e-6)


def test_ends_that_move_out_leave_the_log_density():
    """The library's own end terms, by quadrature: the difference falls with both ends, in closed form for Gaussian data."""
    exact = Linear()
    for x0 in (0.3, 1.9):
        log_p = -0.5 * (math.log(2 * math.pi * VAR) + (x0 - MEAN) ** 2 / VAR)
        for low, high in ((-4.0, 4.0), (-8.0, 8.0), (-16.0, 16.0)):
            a2, s2 = 1 / (1 + math.exp(-low)), 1 / (1 + math.exp(low))
            v, m = a2 * VAR + s2, math.sqrt(a2) * (x0 - MEAN)
            kl_exact = 0.5 * (math.log(v / s2) + (s2 + m**2) / v - 1)
            posterior = 1 / (1 / VAR + math.exp(high))  # variance of p(x_0 | x_1); its mean is x0_hat
            off = 2 * math.exp(-high) * float(exact.error(x0, high))
            log_posterior = -0.5 * (math.log(2 * math.pi * posterior) + off / posterior)
            ends = exact.prior(x0, low) - kl_exact + exact.reconstruction(x0, high) + log_posterior
            found = exact.estimate(x0, low, high)
            assert found == pytest.approx(-log_p + ends, abs=1e-9)
        assert found == pytest.approx(-log_p, abs=1e-6)


@pytest.mark.parametrize("value", [0, 1, 3])
def test_discrete_data_have_their_probability(value):
    """Four levels 2/3 apart: between log-SNR -16 and 9 the end terms are below 1e-6 together."""
    grid = torch.linspace(-1, 1, 4, dtype=F64)
    pmf = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=F64)
    diffusion = make(GridDenoiser(grid, pmf, "x0"), ends=(-16.0, 9.0), bins=(4, -1.0, 1.0))
    x0, (z, weights) = grid[value], trapezoid(0.02)
    lam, w = legendre(-16.0, 9.0, 8)
    integral = float(error_by_quadrature(diffusion, x0, lam, (z, weights)) @ w)
    alpha, sigma = diffusion.schedule.alpha(1), diffusion.schedule.sigma(1)
    law = diffusion.reverse_kernel.decode(alpha * x0 + sigma * torch.tensor(z)[:, None])
    reconstruction = -float(law.log_prob(x0.expand(len(z), 1)).numpy() @ weights)
    prior = Linear().prior(float(x0), -16.0)
    assert prior + integral + reconstruction == pytest.approx(-math.log(pmf[value]), abs=1e-6)


# ---------------------------------------------------------------------- what it bounds, for any denoiser


def test_on_average_it_exceeds_the_entropy_by_three_terms():
    low, high = -5.0, 5.0
    off, exact = Linear(gain=GAIN, bias=BIAS), Linear()
    z, w = hermite(3)  # averages over data of squares
    nodes = MEAN + math.sqrt(VAR) * z
    average = float(w @ [off.estimate(x, low, high) for x in nodes])
    a2, s2 = 1 / (1 + math.exp(-low)), 1 / (1 + math.exp(low))
    v, m = a2 * VAR + s2, math.sqrt(a2) * MEAN
    of_prior = 0.5 * (v + m**2 - 1 - math.log(v))

    def excess(lam):
        """Half e^lambda times the mean of |E[x_0 | x] - x0_hat|^2."""
        A, B, a2, s2 = off.coefficients(lam)
        A_exact, B_exact, _, _ = exact.coefficients(lam)
        mean = (A - A_exact) * np.sqrt(a2) * MEAN + B - B_exact
        return 0.5 * np.exp(lam) * (mean**2 + (A - A_exact) ** 2 * (a2 * VAR + s2))

    lam, w = legendre(low, high, 12)
    posterior = 1 / (1 / VAR + math.exp(high))
    ratio = posterior * math.exp(high)
    of_decoder = 0.5 * (ratio - 1 - math.log(ratio)) + float(excess(high))
    parts = [of_prior, float(excess(lam) @ w), of_decoder]
    assert min(parts) > 1e-6
    assert average == pytest.approx(0.5 * math.log(2 * math.pi * math.e * VAR) + sum(parts), abs=1e-9)


def chain(steps, low, high, **error):
    betas = pyrodiff.LogLinearSchedule(steps, low, high).betas.numpy()
    ddpm = DDPM(betas)
    return LinearModel(ddpm, ddpm.variances("fixed_small"), ddpm.decoder_variance("vdm"), **error)


@pytest.mark.parametrize("x0", [0.3, 1.9])
def test_it_is_the_limit_of_the_elbo(x0):
    low, high, error = -6.0, 6.0, {"gain": GAIN, "bias": BIAS}
    limit = Linear(**error).estimate(x0, low, high)
    off = [float(chain(steps, low, high, **error).nelbo(np.array(x0))) - limit for steps in (1001, 2001, 4001)]
    for a, b in itertools.pairwise(off):
        assert a / b == pytest.approx(2, rel=0.01)  # first order in the width of a step
    assert abs(2 * off[2] - off[1]) < 1e-4 < abs(off[2])  # what remains is of second order


def test_it_bounds_each_example_of_the_continuous_model_and_not_of_the_data():
    low, high, error = -3.0, 6.0, {"mean": 0.9, "gain": 0.02}  # a model to the right of the data
    model, found = chain(20_001, low, high, **error), Linear(**error)
    signs = set()
    for x0 in np.linspace(-2.5, 3.0, 23):
        bound = -found.estimate(x0, low, high)
        assert bound < float(model.log_density(x0)) - 1e-3
        signs.add(bool(bound < -0.5 * (math.log(2 * math.pi * VAR) + (x0 - MEAN) ** 2 / VAR)))
    assert signs == {True, False}


def test_the_tails_of_the_two_forms():
    """Below lambda_T the prior is N(0, 1)'s own denoiser; above lambda_1 the decoder is x / alpha, but for its end."""
    low, high, x0 = -1.3, 2.1, 0.8
    lam, w = legendre(-45.0, low, 12)
    assert float(Linear(0.0, 1.0).error(x0, lam) @ w) == pytest.approx(Linear().prior(x0, low), abs=1e-9)
    v, some = 0.7, Linear(gain=GAIN)
    lam, w = legendre(high, 45.0, 12)
    above = float((0.5 - 0.5 / (1 + np.exp(-lam) / v)) @ w)  # x / alpha errs by 1 / e^lambda: e is 1/2
    below = 0.5 * math.log1p(v * math.exp(high))  # Gaussian's, up to lambda_1
    tail = 0.5 * math.log(2 * math.pi * math.e * v) - below + above
    assert some.reconstruction(x0, high) == pytest.approx(tail + float(some.error(x0, high)) - 0.5, abs=1e-9)


# ---------------------------------------------------------------------- the estimator


@pytest.mark.monte_carlo
@pytest.mark.parametrize("pilot", [0, 8])
def test_estimates_have_the_mean_of_the_closed_form(pilot):
    diffusion = make(GaussianDenoiser("v", gain=GAIN, bias=BIAS), ends=(-5.0, 5.0))
    x0 = torch.tensor([[-0.9], [0.3], [1.6]], dtype=F64)
    closed = Linear(gain=GAIN, bias=BIAS)
    for points in (1, 7):
        found = information(diffusion, x0, points=points, pilot=pilot, repeats=3000, seed=any_seed(), batch_size=10**5)
        expected = -np.array([closed.estimate(x, -5.0, 5.0) for x in x0[:, 0].tolist()])
        torch.testing.assert_close(found.log_prob, found.draws.mean(0))
        assert_mean(found.draws, expected, detects=2.5)
        assert found.network_evaluations == 20 * pilot + 3 * 3000 * (points + 1)
        assert found.draws.shape == (3000, 3) and not found.unbiased and "on average over data" in found.meaning
        parts = [found.diagnostics[name] for name in ("prior", "integral", "reconstruction")]
        torch.testing.assert_close(-sum(parts), found.draws)
        np.testing.assert_allclose(parts[0], [closed.prior(x, -5.0) for x in x0[:, 0].tolist()], rtol=1e-9)


def test_systematic_points_are_unbiased_whatever_the_density():
    """Over every offset: the expectation of f / density is the integral of f."""
    heights = torch.rand(20, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.05
    edges = torch.linspace(-5, 5, 21, dtype=F64)
    density = Density(edges, heights / (heights * 0.5).sum())
    for points in (1, 5):
        u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
        lam, at = density.draw((torch.arange(points) + u[:, None]) / points)
        assert ((lam >= -5) & (lam <= 5)).all() and (lam.diff(dim=1) > 0).all() and (lam.diff(dim=0) > 0).all()
        assert float(((1 + lam.sin()) / at).mean()) == pytest.approx(10, rel=1e-5)  # 20 jumps in 200,000 midpoints
        bins = torch.bucketize(lam, edges[1:-1])
        torch.testing.assert_close(at, density.heights[bins])


def test_the_density_is_in_proportion_to_the_root_mean_square():
    errors = torch.arange(1.0, 21.0, dtype=F64)[:, None] * torch.tensor([1.0, 7.0], dtype=F64)  # roots: 5 g
    fitted = Density.uniform(-5.0, 5.0).fitted(errors)
    expected = 0.95 * torch.arange(1.0, 21.0, dtype=F64) / (210 * 0.5) + 0.05 / 10
    torch.testing.assert_close(fitted.heights, expected)
    spread = torch.ones(20, 2, dtype=F64)
    spread[3] = torch.tensor([0.0, math.sqrt(2)], dtype=F64)  # the same root mean square, another mean
    torch.testing.assert_close(Density.uniform(0.0, 1.0).fitted(spread).heights, torch.ones(20, dtype=F64))
    assert torch.equal(Density.uniform(0.0, 1.0).fitted(0 * spread).heights, torch.ones(20, dtype=F64))


def test_the_density_follows_the_error_and_the_gain_is_reported():
    """Gain over uniform log-SNR, of one draw: in closed form for the density that the pilot chose."""
    low, high = -9.0, 9.0
    diffusion = make(GaussianDenoiser("x0", var=0.01), ends=(low, high))
    x0 = torch.tensor([[0.2], [0.3], [0.45]], dtype=F64)
    found = information(diffusion, x0, points=4, pilot=64, repeats=20_000, batch_size=10**5)
    d, closed = found.diagnostics, Linear(var=0.01)
    lam, w = legendre(low, high, 12)
    bins = np.clip(np.searchsorted(d["edges"].numpy(), lam) - 1, 0, 19)
    heights = d["density"].numpy()[bins]
    assert float(heights @ w) == pytest.approx(1, abs=0.05)  # panels and bins do not meet
    variance = {"uniform": 0.0, "density": 0.0}
    for x in x0[:, 0].tolist():
        square = closed.integral(x, low, high) ** 2
        second = closed.second_moment(x, lam)
        variance["uniform"] += float(second @ w) * (high - low) - square
        variance["density"] += float((second / heights) @ w) - square
    expected = variance["uniform"] / variance["density"]
    assert expected > 1.5 and float(d["variance_ratio"]) == pytest.approx(expected, rel=0.1)
    means = [np.mean([closed.error(x, lam[bins == g]).mean() for x in x0[:, 0].tolist()]) for g in range(20)]
    np.testing.assert_allclose(d["error"].numpy(), means, rtol=0.15, atol=1e-3)
    uniform = information(diffusion, x0, points=1, pilot=0, repeats=50)
    assert float(uniform.diagnostics["variance_ratio"]) == pytest.approx(1)
    assert uniform.diagnostics["density"].tolist() == pytest.approx([1 / 18] * 20)


class PerElement(pyrodiff.schedules.Schedule):
    steps, event_dim = 4, 1

    def log_snr(self, t):
        return pyrodiff.LogLinearSchedule(4, -5.0, 5.0).log_snr(t)[..., None] + torch.tensor([0.0], dtype=F64)


def test_what_has_no_integral_is_refused():
    x0 = torch.zeros(2, 1)
    betas = pyrodiff.LogLinearSchedule(4, -5.0, 5.0).betas.numpy()
    with pytest.raises(OptionError, match="prediction='previous' is not one of 'eps', 'x0', 'v', 'score'"):
        information(make(GaussianDenoiser("previous", betas), steps=4, ends=(-5.0, 5.0)), x0)
    with pytest.raises(OptionError, match="schedule of 1 steps"):
        information(make(GaussianDenoiser("x0"), steps=1), x0)
    per_element = pyrodiff.GaussianDiffusion(GaussianDenoiser("x0"), PerElement(), (1,), "x0")
    with pytest.raises(OptionError, match="event_dim=1"):
        information(per_element, x0)
    lam = PerElement().log_snr(torch.tensor([2, 3]))
    at = per_element.reverse_kernel.denoise_at(x0, lam)
    torch.testing.assert_close(at, per_element.reverse_kernel.denoise(x0, torch.tensor([2, 3])))
    for options in ({"points": 0}, {"pilot": -1}):
        with pytest.raises(OptionError, match=f"{next(iter(options))}="):
            information(make(GaussianDenoiser("x0")), x0, **options)
