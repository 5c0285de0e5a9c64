"""Sequential Monte Carlo: closed forms of the chain's own law, quadrature over its noise, enumeration of its uniforms."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from monte_carlo import any_seed, assert_estimate, assert_mean, assert_moments, assert_proportion, state
from oracles import DDPM, GaussianDenoiser, LinearModel, MixtureDenoiser, linear_betas
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyrodiff import GaussianDiffusion, LogLinearSchedule, TableSchedule, nets
from pyrodiff.errors import DataError, OptionError, ProgramError, ShapeError
from pyrodiff.inference.gibbs import particle_gibbs, slice_sample
from pyrodiff.inference.guidance import guided, mmps, pigdm
from pyrodiff.inference.observe import observation
from pyrodiff.inference.operators import LinearGaussian, blur, downsample, mask, matrix, separable
from pyrodiff.inference.resampling import RESAMPLING, multinomial
from pyrodiff.inference.smc import Source, prepare, smc, walk

F64 = torch.float64
GAIN, BIAS = 0.15, -0.1  # a denoiser that is not the exact one: nothing cancels by luck


def chain(steps: int, dims: int = 1, variance: str = "fixed_large", **error) -> tuple[GaussianDiffusion, LinearModel]:
    """A linear denoiser of Gaussian data, and the closed forms of its chain."""
    betas = linear_betas(steps)
    ddpm = DDPM(betas)
    options = {"gain": GAIN, "bias": BIAS} | error
    net = GaussianDenoiser("x0", betas, **options)
    net.unused = nn.Parameter(torch.zeros((), dtype=F64))  # says that particles are float64
    diffusion = GaussianDiffusion(net, TableSchedule(torch.tensor(betas)), (dims,), prediction="x0", variance=variance)
    return diffusion, LinearModel(ddpm, ddpm.variances(variance), ddpm.decoder_variance("vdm"), **options)


def conditioned(closed: LinearModel, a: Tensor, y: Tensor, noise_std: float) -> tuple[float, Tensor, Tensor]:
    """Log p(y), the mean and the covariance of x_0 given y, where x_0 has the chain's own law."""
    mu, V = closed.marginal()
    dims = a.shape[1]
    prior_mean, S = torch.full((dims,), mu, dtype=F64), V * torch.eye(dims, dtype=F64)
    total = a @ S @ a.T + noise_std**2 * torch.eye(len(a), dtype=F64)
    K = S @ a.T @ torch.linalg.inv(total)
    log_z = MultivariateNormal(a @ prior_mean, total).log_prob(y)
    return float(log_z), prior_mean + K @ (y - a @ prior_mean), S - K @ a @ S


A = torch.tensor([[1.0, 0.5]], dtype=F64)
Y = torch.tensor([0.9], dtype=F64)


def observed(noise_std: float = 0.6) -> LinearGaussian:
    return LinearGaussian(matrix(A), Y, noise_std)


def far(x0: Tensor) -> Tensor:
    """Log-density of y = x_0^3 / 2 + noise: not linear."""
    return -((0.4 - x0.pow(3).sum(1) / 2) ** 2) / (2 * 0.8**2)


PROPOSALS = {
    "bootstrap": lambda o: {"proposal": "bootstrap"},
    "twisted": lambda o: {"proposal": "twisted"},
    "pigdm": lambda o: {"proposal": "twisted", "twist": pigdm(o, 0.7)},
    "mmps": lambda o: {"proposal": "twisted", "twist": mmps(o)},
    "mcgdiff": lambda o: {"proposal": "mcgdiff"},
    "mcgdiff, scaled": lambda o: {"proposal": "mcgdiff", "data_std": 0.7},
}
every_proposal = pytest.mark.parametrize("proposal", PROPOSALS)
# mcgdiff's weights, if it is not told the data's scale, have a tail index of about 1: no standard error means anything
light_tails = pytest.mark.parametrize("proposal", [name for name in PROPOSALS if name != "mcgdiff"])


# ---------------------------------------------------------------------- resampling


@pytest.mark.parametrize("scheme", RESAMPLING)
def test_offspring_are_right_on_average(scheme: str):
    """The mean over a grid of uniforms, exact where the weights' sums are multiples of the grid's spacing."""
    weights = torch.tensor([5, 0, 1, 8, 2], dtype=F64) / 16
    n, grid = len(weights), 16 * 5 * 2
    uniforms = ((torch.arange(grid) + 0.5) / grid).double()[:, None].expand(grid, n)  # each draw sees the whole grid
    drawn = RESAMPLING[scheme](weights.expand(grid, n), uniforms)
    counts = nn.functional.one_hot(drawn, n).sum(1).double()
    torch.testing.assert_close(counts.mean(0), n * weights, rtol=0, atol=1e-12)
    assert counts[:, 1].sum() == 0
    if scheme in ("systematic", "residual"):
        assert (counts >= (n * weights).floor()).all()
    if scheme == "systematic":
        assert (counts <= (n * weights).ceil()).all()


@pytest.mark.parametrize("scheme", RESAMPLING)
def test_resampling_at_the_edges(scheme: str):
    n = 1000
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=F64)[:, None].expand(2, n)
    for hot in (0, 7, n - 1):
        certain = torch.zeros(2, n, dtype=F64)
        certain[:, hot] = 1
        assert (RESAMPLING[scheme](certain, ends) == hot).all()
    even = torch.full((2, n), 1 / n, dtype=F64)
    if scheme != "multinomial":
        assert torch.equal(RESAMPLING[scheme](even, torch.rand(2, n, dtype=F64)), torch.arange(n).expand(2, n))
    assert RESAMPLING[scheme](even, ends).max() < n


# ---------------------------------------------------------------------- the evidence


class Tape(Source):
    """Noise that is given: the generator is an iterator over columns of nodes."""

    def normal(self) -> Tensor:
        return next(self.generator).reshape(self.like.shape)


def grid(dims: int, step: float, reach: float) -> tuple[Tensor, Tensor]:
    """Nodes ``[n, dims]`` of standard normal noise and their weights; the trapezoidal rule, exact to exp(-19.7 width^2 / step^2)."""
    x = np.arange(-reach, reach + step / 2, step)
    w = step * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    points = np.stack([z.ravel() for z in np.meshgrid(*[x] * dims, indexing="ij")], -1)
    weights = np.prod(np.stack([z.ravel() for z in np.meshgrid(*[w] * dims, indexing="ij")], -1), -1)
    return torch.tensor(points), torch.tensor(weights)


@every_proposal
@pytest.mark.parametrize(("steps", "step"), [(1, 0.02), (2, 0.2)])
def test_the_mean_weight_of_one_particle_is_the_evidence(steps: int, step: float, proposal: str):
    """By quadrature over the noise of x_T, ..., x_0."""
    diffusion, closed = chain(steps)
    seen = LinearGaussian(matrix(torch.ones(1, 1, dtype=F64)), Y, 0.6)
    nodes, weights = grid(steps + 1, step, 9.0)
    options = PROPOSALS[proposal](seen)
    moves, _ = prepare(diffusion, seen, 1, options.pop("proposal"), options, None, 0, len(nodes), 1, {})
    source = Tape(torch.zeros(len(nodes), 1, dtype=F64), iter(nodes.T))
    found = walk(diffusion, moves, source, len(nodes), multinomial, 0.0, len(nodes)).log_weights[:, 0]
    log_z, *_ = conditioned(closed, torch.ones(1, 1, dtype=F64), Y, 0.6)
    assert math.log(float((found.exp() * weights).sum())) == pytest.approx(log_z, abs=1e-8)


DETECTS = 0.2


def unbiased(posterior, log_z: float, moments: list[tuple], bias: float = 0.0, detects: float = DETECTS) -> None:
    """E Z-hat = Z, and E [Z-hat (mean of f - E[f | y])] = 0 for each f and its exact mean, over the repeats; in shares of Z."""
    weights = (posterior.log_weights - log_z).exp()
    columns = [weights.mean(1) - 1]
    for function, exact in moments:
        values = function(posterior.particles.flatten(0, 1).flatten(1)).unflatten(0, weights.shape) - exact
        columns += list((weights[..., None] * values.flatten(2)).mean(1).T)
    assert_mean(torch.stack(columns, 1), (-bias, bias), detects=detects)


@pytest.mark.monte_carlo
@pytest.mark.parametrize("resampling", RESAMPLING)
@light_tails
def test_evidence_mean_and_covariance_under_resampling_at_every_step(proposal: str, resampling: str):
    diffusion, closed = chain(4, dims=2)
    log_z, mean, covariance = conditioned(closed, A, Y, 0.6)
    posterior = smc(
        diffusion, observed(), 4, resampling=resampling, threshold=1.0, repeats=12_000, batch_size=10**6,
        **PROPOSALS[proposal](observed()),
    )  # fmt: skip
    unbiased(
        posterior, log_z, [(lambda x: x, mean), (lambda x: (x - mean)[:, :, None] * (x - mean)[:, None], covariance)]
    )
    assert_estimate(*posterior.evidence, log_z, detects=DETECTS)


@pytest.mark.monte_carlo
@pytest.mark.parametrize("threshold", [0.0, 0.9])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_evidence_with_adaptive_resampling(threshold: float, variance: str):
    diffusion, closed = chain(5, dims=2, variance=variance)
    log_z, mean, _ = conditioned(closed, A, Y, 0.6)
    posterior = smc(diffusion, observed(), 8, proposal="twisted", threshold=threshold, repeats=8_000, batch_size=10**6)
    unbiased(posterior, log_z, [(lambda x: x, mean)])
    resampled = posterior.families < posterior.ess[:, -1] * 0.99
    assert resampled.any() == (threshold > 0)
    assert not resampled.all()  # some repeats resample and others do not


@pytest.mark.monte_carlo
def test_evidence_without_noise():
    """mcgdiff: y = A x_0 exactly; the evidence is the density of A x_0 under the chain's law."""
    diffusion, closed = chain(4, dims=2)
    log_z, mean, covariance = conditioned(closed, A, Y, 0.0)
    posterior = smc(
        diffusion, observed(0.0), 4, proposal="mcgdiff", data_std=0.7, threshold=1.0, repeats=8_000, batch_size=10**6
    )
    torch.testing.assert_close(posterior.particles @ A[0], Y.expand(8_000, 4), rtol=0, atol=1e-12)
    unbiased(
        posterior,
        log_z,
        [(lambda x: x[:, :1], mean[:1]), (lambda x: (x[:, 0] - mean[0])[:, None] ** 2, covariance[0, 0])],
    )


@pytest.mark.monte_carlo
def test_a_likelihood_that_is_not_linear():
    """The evidence by quadrature over the chain's Gaussian law of x_0, whose decoder's last step is part of it."""
    diffusion, closed = chain(4, dims=1)
    mu, V = closed.marginal()
    nodes, weights = grid(1, 0.01, 9.0)
    x0 = mu + math.sqrt(V) * nodes
    log_z = math.log(float((far(x0).exp() * weights).sum()))
    mean = float((far(x0).exp() * weights * x0[:, 0]).sum()) / math.exp(log_z)
    for proposal in ("bootstrap", "twisted"):
        posterior = smc(diffusion, far, 8, proposal=proposal, threshold=0.9, repeats=8_000, batch_size=10**6)
        unbiased(posterior, log_z, [(lambda x: x, mean)])


def test_a_respaced_chain_is_the_respaced_model():
    diffusion, _ = chain(12, dims=2)
    options = {"seed": 0, "proposal": "mcgdiff"}
    one, other = (
        smc(diffusion, observed(), 64, steps=4, **options),
        smc(diffusion.respace(4), observed(), 64, **options),
    )
    assert torch.equal(one.log_weights, other.log_weights)


# ---------------------------------------------------------------------- the posterior


def one_dimension(steps: int) -> tuple[GaussianDiffusion, LinearGaussian, LinearModel]:
    """Data N(0, 1), y = 1 with noise variance 1/4: the posterior is N(0.8, 0.2)."""
    diffusion, closed = chain(steps, gain=0.0, bias=0.0, mean=0.0, var=1.0)
    return diffusion, LinearGaussian(matrix(torch.ones(1, 1, dtype=F64)), torch.ones(1, dtype=F64), 0.5), closed


@pytest.mark.monte_carlo
@pytest.mark.parametrize(
    ("proposal", "steps"), [("bootstrap", 250), ("twisted", 10), ("pigdm", 250), ("mcgdiff, scaled", 250)]
)
def test_the_posterior_is_not_that_of_dps(proposal: str, steps: int):
    """By the median of a hundred repeats: the weights of DPS's own moves have heavy tails (k-hat 0.5 to 0.7), a repeat's side has none."""
    diffusion, seen, closed = one_dimension(steps)
    _, mean, covariance = conditioned(closed, torch.ones(1, 1, dtype=F64), seen.y, 0.5)
    assert (float(mean), float(covariance)) == pytest.approx((0.8, 0.2), abs=1e-4)
    particles, repeats = (1000, 100) if proposal == "twisted" else (200, 100)
    posterior = smc(diffusion, seen, particles, repeats=repeats, batch_size=10**6, **PROPOSALS[proposal](seen))
    weights, x = posterior.log_weights.softmax(1), posterior.particles[..., 0]
    means = (weights * x).sum(1)
    variances = (weights * (x - means[:, None]) ** 2).sum(1)
    state(means)
    # DPS's own N(0.9818, 0.1255), and half way to it
    for values, exact, wrong in ((means, 0.8, 0.9818), (variances, 0.2, 0.1255)):
        near = int(((values - exact).abs() < (values - wrong).abs()).sum())
        assert_proportion(near, repeats, (0.75, 1.0), detects=0.5)


@pytest.mark.monte_carlo
def test_dps_is_what_it_is_known_to_be():
    """The control: its linear recursion in closed form, N(0.9818, 0.1255), and the samples."""
    diffusion, seen, closed = one_dimension(1000)
    mu, V = 0.0, 1.0
    for (a, b, variance), k in zip(closed.steps_of_the_chain()[::-1], closed.A[::-1], strict=True):
        pull = variance * k / 0.25  # variance times the gradient of log N(y; k x, 1/4), which is k (y - k x) / (1/4)
        mu, V = (a - pull * k) * mu + b + pull, (a - pull * k) ** 2 * V + variance
    assert (mu, V) == pytest.approx((0.9818, 0.1255), abs=5e-5)
    n = 8_000
    samples = guided(diffusion, seen, n, batch_size=n)
    assert_moments(samples.particles, mu, V, detects=0.2)
    with pytest.raises(ProgramError, match="heuristic"):
        _ = samples.log_evidence
    assert "log p(y)    none" in str(samples)


def test_mmps_is_exact_for_gaussian_data():
    """Its twist is p(y | x_t): of the exact denoiser, in closed form; so is PiGDM's, told the data's scale."""
    diffusion, _ = chain(10, dims=2, gain=0.0, bias=0.0, mean=0.3, var=0.25)
    x_t, t = torch.randn(5, 2, dtype=F64, requires_grad=True), 6
    x0_hat, log_snr = diffusion.reverse_kernel.denoise(x_t, t), diffusion.schedule.log_snr(t)
    ab = log_snr.sigmoid()
    spread = 0.25 * (1 - ab) / (ab * 0.25 + 1 - ab)
    law = MultivariateNormal(x0_hat @ A.T, spread * A @ A.T + 0.6**2 * torch.eye(1, dtype=F64))
    for twist in (mmps(observed()), pigdm(observed(), 0.5)):
        torch.testing.assert_close(twist(x_t, x0_hat, log_snr), law.log_prob(Y), rtol=1e-12, atol=1e-12)


@pytest.mark.monte_carlo
def test_the_modes_of_a_mixture():
    """Two dims, each a mixture of two, coupled by A: four modes of known posterior weight.

    T = 100 steps of the exact denoiser: their law of x_0 is not quite the mixture, which is 0.01 in log Z and in the weights
    (32,000 particles; less at T = 200 and 400).
    """
    w, m, S = [0.3, 0.7], [-0.8, 0.6], [0.01, 0.02]
    diffusion = GaussianDiffusion(
        MixtureDenoiser(w, m, S), TableSchedule(torch.tensor(linear_betas(100))), (2,), "x0", variance="fixed_large"
    )
    a, y, std = torch.tensor([[1.0, 0.7]], dtype=F64), torch.tensor([-0.2], dtype=F64), 0.4
    log_parts = torch.stack([
        MultivariateNormal(
            a @ torch.tensor([m[i], m[j]]).double(), a @ torch.diag(torch.tensor([S[i], S[j]])).double() @ a.T + std**2 * torch.eye(1)
        ).log_prob(y) + math.log(w[i] * w[j])
        for i in range(2) for j in range(2)
    ])  # fmt: skip
    exact = log_parts.softmax(0)
    seen = LinearGaussian(matrix(a), y, std)
    posterior = smc(diffusion, seen, 40, twist=pigdm(seen), repeats=200, batch_size=8000)
    # the mode that a point is nearest to; half way to the next are five standard deviations
    corner = partial(nearest, torch.tensor(m))
    log_z = float(torch.logsumexp(log_parts, 0))
    unbiased(posterior, log_z, [(lambda x: nn.functional.one_hot(corner(x), 4), exact)], bias=0.015)


def nearest(means: Tensor, x: Tensor) -> Tensor:
    part = (x[..., None] - means).abs().argmin(-1)
    return 2 * part[:, 0] + part[:, 1]


# ---------------------------------------------------------------------- operators


KERNEL = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
KEEP = torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 0]]], dtype=torch.bool)
OPERATORS = {
    "matrix": (lambda: matrix(torch.arange(24.0).view(3, 1, 2, 4).sin().double()), None),
    "tall matrix": (lambda: matrix(torch.arange(80.0).view(10, 1, 2, 4).sin().double()), None),
    "mask": (lambda: mask(KEEP), lambda x: x[:, KEEP]),
    "blur": (
        lambda: blur((1, 2, 4), KERNEL),
        lambda x: nn.functional.conv2d(x, (KERNEL[:, None] * KERNEL)[None, None], padding=1),
    ),
    "downsample": (lambda: downsample((1, 2, 4), 2), lambda x: nn.functional.avg_pool2d(x, 2)),
    "channels": (lambda: downsample((2, 2, 2), 2), lambda x: x.mean((2, 3), keepdim=True)),
    "separable": (
        lambda: separable((2, 2, 2), torch.ones(3, 2).double().cumsum(0), torch.eye(2).double()),
        lambda x: torch.ones(3, 2).double().cumsum(0) @ x,
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_its_decomposition(name: str):
    make, plain = OPERATORS[name]
    operator = make()
    size, K = operator.event_shape.numel(), len(operator.singular_values)
    x = torch.eye(size, dtype=F64).view(size, *operator.event_shape)
    dense = operator(x).flatten(1).T  # [M, D]
    if plain is not None:
        assert operator(x).shape[1:] == operator.observed_shape
        torch.testing.assert_close(operator(x), plain(x), rtol=0, atol=1e-14)
    else:
        torch.testing.assert_close(
            dense, torch.arange(float(dense.numel())).sin().double().view_as(dense), rtol=0, atol=1e-13
        )
    V = operator.from_rows(torch.eye(K, dtype=F64)).flatten(1).T
    U = operator.from_columns(torch.eye(K, dtype=F64)).flatten(1).T
    for basis in (V, U):
        torch.testing.assert_close(basis.T @ basis, torch.eye(K, dtype=F64), rtol=0, atol=1e-13)
    torch.testing.assert_close(U @ operator.singular_values.diag() @ V.T, dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(operator.to_rows(x), V, rtol=0, atol=1e-13)
    y = torch.randn(3, *operator.observed_shape, dtype=F64)
    torch.testing.assert_close(operator.to_columns(y), y.flatten(1) @ U, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_likelihood_of_a_linear_observation(name: str):
    operator = OPERATORS[name][0]()
    y, x0 = torch.randn(operator.observed_shape, dtype=F64), torch.randn(6, *operator.event_shape, dtype=F64)
    seen = LinearGaussian(operator, y, 0.3)
    torch.testing.assert_close(
        seen(x0), dist.Normal(operator(x0), 0.3).to_event(y.dim()).log_prob(y), rtol=1e-12, atol=1e-12
    )
    size = operator.event_shape.numel()
    dense = operator(torch.eye(size, dtype=F64).view(size, *operator.event_shape)).flatten(1).T
    law = MultivariateNormal(operator(x0).flatten(1), 0.7 * dense @ dense.T + 0.09 * torch.eye(len(dense), dtype=F64))
    torch.testing.assert_close(seen.log_prob(x0, 0.7), law.log_prob(y.flatten()), rtol=1e-11, atol=1e-11)


@pytest.mark.monte_carlo
@pytest.mark.parametrize("name", OPERATORS)
def test_mcgdiff_and_a_dense_matrix_agree(name: str):
    """The evidence of an operator by mcgdiff with many particles, against the closed form.

    With the data's scale, for moderate weights: without it Pareto's k-hat is about 1 here, and a standard error means nothing.
    """
    operator = OPERATORS[name][0]()
    betas = linear_betas(6)
    ddpm = DDPM(betas)
    diffusion = GaussianDiffusion(
        GaussianDenoiser("x0", betas, gain=GAIN, bias=BIAS),
        TableSchedule(torch.tensor(betas)),
        operator.event_shape,
        "x0",
    )
    closed = LinearModel(ddpm, ddpm.variances("fixed_small"), ddpm.decoder_variance("vdm"), gain=GAIN, bias=BIAS)
    size = operator.event_shape.numel()
    dense = operator(torch.eye(size, dtype=F64).view(size, *operator.event_shape)).flatten(1).T
    y = operator(torch.full((1, *operator.event_shape), 0.4, dtype=F64))[0]
    log_z, mean, _ = conditioned(closed, dense, y.flatten(), 0.5)
    posterior = smc(
        diffusion,
        LinearGaussian(operator, y, 0.5),
        50,
        proposal="mcgdiff",
        data_std=0.6,
        repeats=400,
        batch_size=10**5,
    )
    unbiased(posterior, log_z, [(lambda x: x, mean)])


# ---------------------------------------------------------------------- Pyro programs


def test_a_pyro_program_is_a_likelihood():
    def program(x0: Tensor, y: Tensor) -> None:
        rate = x0.exp()
        pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=y)
        with pyro.plate("again", 3, dim=-2):
            pyro.sample("sums", dist.Normal(x0.sum(-1), 0.5), obs=torch.tensor([[0.1], [0.2], [0.3]]))

    x0, y = torch.randn(4, 4), torch.tensor([0.0, 1.0, 2.0, 0.0])  # as many particles as dims
    expected = dist.Poisson(x0.exp()).log_prob(y).sum(1)
    expected = expected + sum(dist.Normal(x0.sum(1), 0.5).log_prob(torch.tensor(z)) for z in (0.1, 0.2, 0.3))
    torch.testing.assert_close(observation(program, y)(x0), expected)
    diffusion, _ = chain(4, dims=4)
    posterior = smc(diffusion, observation(program, y), 50, proposal="twisted", seed=0)
    assert posterior.particles.shape == (1, 50, 4)


def test_a_program_that_is_no_observation_is_refused():
    def no_event(x0: Tensor) -> None:
        pyro.sample("y", dist.Normal(x0, 1.0), obs=torch.zeros(4))

    def latent(x0: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(x0, scale).to_event(1), obs=torch.zeros(4))

    def subsampled(x0: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0), obs=None if unknown else torch.zeros(()))
        with pyro.plate("rows", 4, subsample_size=2, dim=-2):
            pyro.sample("y", dist.Normal(x0.sum(1) + shift, 1.0), obs=torch.zeros(2, 1))

    def fixed(x0: Tensor) -> None:
        with pyro.plate("rows", 4, subsample=torch.tensor([0, 3]), dim=-2):
            pyro.sample("y", dist.Normal(x0.sum(1), 1.0), obs=torch.zeros(2, 1))

    unknown = False
    with pytest.raises(ProgramError, match="plate 'rows' draws 2 of 4 rows"):
        observation(subsampled)(torch.randn(4, 4))
    unknown = True
    with pytest.raises(ProgramError, match="plate 'rows' draws 2 of 4 rows"):
        particle_gibbs(chain(2)[0], subsampled, 2)
    x0 = torch.randn(4, 4)
    torch.testing.assert_close(observation(fixed)(x0), 4 * dist.Normal(x0.sum(1), 1.0).log_prob(torch.zeros(())))
    with pytest.raises(ShapeError, match=r"'y' has log-probabilities of shape \[4, 4\] for 4 particles"):
        observation(no_event)(torch.randn(4, 4))
    with pytest.raises(ProgramError, match="'scale' is not observed"):
        observation(latent)(torch.randn(4, 4))


# ---------------------------------------------------------------------- particle Gibbs


@pytest.mark.monte_carlo
@pytest.mark.parametrize("proposal", ["bootstrap", "twisted", "mcgdiff"])
def test_conditional_smc_leaves_the_posterior_invariant(proposal: str):
    """One sweep with two particles from exact draws of x_2, x_1, x_0 given y: their nine moments must not move."""
    steps, repeats = 2, 40_000
    diffusion, closed = chain(steps)
    seen = LinearGaussian(matrix(torch.ones(1, 1, dtype=F64)), Y, 0.6)
    L = torch.eye(3, dtype=F64)  # (x_2, x_1, x_0) = L e + offset, e independent with the chain's variances
    offset, variances = torch.zeros(3, dtype=F64), [1.0]
    for i, (a, b, v) in enumerate(closed.steps_of_the_chain()[::-1]):
        L[i + 1] += a * L[i]
        offset[i + 1] = a * offset[i] + b
        variances.append(v)
    prior = L @ torch.diag(torch.tensor(variances, dtype=F64)) @ L.T
    gain = prior[:, 2] / (prior[2, 2] + 0.36)
    mean, covariance = offset + gain * (Y - offset[2]), prior - torch.outer(gain, prior[2])
    law = MultivariateNormal(mean, covariance)
    reference = law.sample((repeats,)).T[..., None]  # [T + 1, R, 1]
    seed = any_seed()
    moves, source = prepare(diffusion, seen, 2, proposal, {}, None, seed, repeats, 10**6, {})
    found = walk(diffusion, moves, source, repeats, multinomial, 1.0, 10**6, reference=reference, keep_path=True)
    path = found.path[..., 0].T
    moved = (path != reference[..., 0].T).any(1).double().mean()
    assert 0.2 < moved < 0.9
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (path - mean).T, upper=False)  # N(0, 1)
    products = z[:, None] * z - torch.eye(3)[..., None]
    assert_mean(torch.cat([z, products.flatten(0, 1)]).T, 0, detects=0.08)


@pytest.mark.monte_carlo
def test_slice_sampling_of_a_normal():
    """Moments after one update each of exact draws: the level of the slice matters, as it does not for a uniform density."""
    start = torch.randn(4000, 1, dtype=F64)
    found = torch.stack([slice_sample(lambda x: -0.5 * float(x @ x), x, torch.default_generator) for x in start])[:, 0]
    moments = torch.stack([found, found**2], dim=-1)
    assert_mean(moments, torch.tensor([0.0, 1.0]), detects=torch.tensor([0.17, 0.24]))


@pytest.mark.monte_carlo
def test_slice_sampling_leaves_its_density():
    """Uniform over [0, 1] and [1.5, 1.7] in each of two dims, from exact draws, one update each: a gap that steps of 1 may cross."""
    n = 4000
    start = 1.2 * torch.rand(n, 2, dtype=F64)
    start = torch.where(start < 1, start, start + 0.5)

    def log_density(x: Tensor) -> float:
        return 0.0 if all(0 < v < 1 or 1.5 < v < 1.7 for v in x.tolist()) else -math.inf

    found = torch.stack([slice_sample(log_density, x, torch.default_generator) for x in start])
    assert (found != start).all()
    above = (found > 1.25).double()
    within = found - 1.5 * above  # uniform over [0, 1] or [0, 0.2]
    for values, exact in ((above, 1 / 6), (above * within, 0.1 / 6), ((1 - above) * within, 0.5 * 5 / 6)):
        assert_mean(values, exact, detects=0.1)
    assert ((found > 1.25) != (start > 1.25)).double().mean() > 0.05
    with pytest.raises(DataError, match="log-density is -inf at the chain's state"):
        slice_sample(log_density, torch.tensor([1.2, 0.5]), torch.default_generator)


@pytest.mark.monte_carlo
@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["bootstrap", "twisted"])
def test_particle_gibbs_finds_the_noise(proposal: str):
    """sigma ~ HalfNormal(1), y_j = x_j + sigma e_j for six dims: the posterior of sigma by quadrature."""
    diffusion, closed = chain(4, dims=6)
    y = torch.tensor([1.4, -0.9, 0.6, -0.2, 2.0, 0.1], dtype=F64)

    def program(x0: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(torch.ones((), dtype=F64)))
        pyro.sample("y", dist.Normal(x0, sigma).to_event(1), obs=y)

    mu, V = closed.marginal()
    sigma = torch.linspace(1e-3, 6, 6000, dtype=F64)
    log_p = -(sigma**2) / 2 + dist.Normal(mu, (V + sigma**2).sqrt()).log_prob(y[:, None]).sum(0)
    p = log_p.softmax(0)
    mean = float((p * sigma).sum())
    sd = math.sqrt(float((p * (sigma - mean) ** 2).sum()))
    shrink = V / (V + sigma**2)
    x_mean = mu + float((p * shrink).sum()) * (y - mu)
    found = particle_gibbs(diffusion, program, 1700, particles=24, proposal=proposal)
    kept = found.parameters["sigma"][200:]
    for values, exact, size in (
        (kept, mean, sd),
        (((kept - mean) / sd) ** 2, 1.0, 1.0),
        (found.x0[200:, 4], float(x_mean[4]), 1.0),
    ):
        # batch means tell the error of dependent draws
        assert_mean(values.view(30, 50).mean(1), exact, detects=size, misses=1e-3)
    assert found.moved > 0.2 and not found.warnings


def test_a_chain_that_hardly_moves_is_told():
    """Two particles, and y that no free one comes near: the best so far is kept, and beaten about log S times in S sweeps."""
    diffusion, _ = chain(2, dims=6)

    def program(x0: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=F64), 1e-4))
        pyro.sample("y", dist.Normal(x0 + shift, 1e-3).to_event(1), obs=torch.zeros(6, dtype=F64))

    found = particle_gibbs(diffusion, program, 120, particles=2, proposal="bootstrap", seed=0)
    changes = int((found.x0[1:] != found.x0[:-1]).any(1).sum())
    assert found.moved == (1 + changes) / 120 < 0.1
    assert "the chain hardly moves" in found.warnings[0]


def louder(factor: float):
    """y_j = gain x_j + sigma e_j for six dims with both unknown, and a twist that takes the noise to be ``factor`` times sigma."""
    y = torch.tensor([0.8, -0.3, 0.6, 0.2, 1.1, 0.1], dtype=F64)
    laws = {
        "gain": dist.LogNormal(torch.zeros((), dtype=F64), 0.15),
        "sigma": dist.LogNormal(torch.full((), math.log(0.3), dtype=F64), 0.4),
    }

    def seen(parameters: dict[str, Tensor], factor: float = 1.0) -> LinearGaussian:
        return LinearGaussian(
            matrix(parameters["gain"] * torch.eye(6, dtype=F64)), y, factor * float(parameters["sigma"])
        )

    def program(x0: Tensor) -> None:
        pyro.factor("y", seen({name: pyro.sample(name, law) for name, law in laws.items()})(x0))

    return y, laws, program, lambda parameters: pigdm(seen(parameters, factor), 0.7)


@pytest.mark.monte_carlo
@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_particle_gibbs_with_a_twist_of_the_parameters(factor: float):
    """Noise and operator by quadrature; a twist that takes the noise to be another is as right."""
    diffusion, closed = chain(3, dims=6)
    y, laws, program, twist = louder(factor)
    mu, V = closed.marginal()
    gain = torch.linspace(0.4, 2.2, 301, dtype=F64)[:, None]
    sigma = torch.linspace(0.02, 2.4, 500, dtype=F64)[None]
    log_p = laws["gain"].log_prob(gain) + laws["sigma"].log_prob(sigma)
    log_p = log_p + dist.Normal(gain * mu, (gain**2 * V + sigma**2).sqrt()).log_prob(y[:, None, None]).sum(0)
    p = log_p.flatten().softmax(0).view_as(log_p)
    x_mean = float((p * (mu + gain * V / (gain**2 * V + sigma**2) * (y[4] - gain * mu))).sum())
    found = particle_gibbs(diffusion, program, 1550, particles=8, twist=twist)
    kept = {name: value[50:] for name, value in found.parameters.items()}
    for values, exact in (
        (kept["gain"], float((p * gain).sum())),
        (kept["gain"] ** 2, float((p * gain**2).sum())),
        (kept["sigma"], float((p * sigma).sum())),
        (kept["sigma"] ** 2, float((p * sigma**2).sum())),
        (kept["gain"] * kept["sigma"], float((p * gain * sigma).sum())),
        (found.x0[50:, 4], x_mean),
    ):
        # batch means tell the error of dependent draws
        assert_mean(values.view(30, 50).mean(1), exact, detects=float(values.std()), misses=1e-3)
    assert found.moved > 0.3 and not found.warnings


def test_the_twist_is_of_the_same_sweeps_parameters():
    diffusion, _ = chain(3, dims=6)
    _, _, program, twist = louder(1.0)
    told = []

    def at_x0_hat(parameters: dict[str, Tensor]):
        told.append(parameters)
        likelihood = observation(pyro.poutine.condition(program, data=parameters))
        return lambda x_t, x0_hat, log_snr: likelihood(x0_hat)

    default, same, other = (
        particle_gibbs(diffusion, program, 6, particles=8, twist=own, seed=3) for own in (None, at_x0_hat, twist)
    )
    assert torch.equal(default.x0, same.x0) and not torch.equal(default.x0, other.x0)
    for name, values in same.parameters.items():
        assert torch.equal(values, torch.stack([parameters[name] for parameters in told]))
    assert other.network_evaluations == default.network_evaluations == 6 * 8 * 3
    with pytest.raises(OptionError, match="twist is no option"):
        particle_gibbs(diffusion, program, 2, proposal="bootstrap", twist=twist)


def test_a_twist_starts_where_the_likelihood_at_x0_hat_diverges():
    """Noise of 0.05, twenty steps: the first draw, in standard deviations of p(x_0 | y, sigma)."""
    diffusion, closed = chain(20, dims=6)
    y, *_ = louder(1.0)
    mu, V = closed.marginal()

    def seen(sigma: Tensor) -> LinearGaussian:
        return LinearGaussian(matrix(torch.eye(6, dtype=F64)), y, float(sigma))

    def program(x0: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(torch.full((), math.log(0.05), dtype=F64), 0.1))
        pyro.factor("y", seen(sigma)(x0))

    def distance(twist) -> float:
        found = particle_gibbs(diffusion, program, 1, particles=8, twist=twist, seed=0)
        noise = found.parameters["sigma"] ** 2
        error = found.x0 - mu - V / (V + noise) * (y - mu)
        return float((error / (V * noise / (V + noise)).sqrt()).square().mean().sqrt())

    assert distance(lambda parameters: pigdm(seen(parameters["sigma"]), 0.7)) < 2 < 1000 < distance(None)


def test_particle_gibbs_refuses():
    diffusion, _ = chain(3)

    def nothing(x0: Tensor) -> None:
        pyro.sample("y", dist.Normal(x0, 1.0).to_event(1), obs=torch.zeros(1))

    def discrete(x0: Tensor) -> None:
        k = pyro.sample("k", dist.Poisson(1.0))
        pyro.sample("y", dist.Normal(x0, 1 + k).to_event(1), obs=torch.zeros(1))

    def moving(x0: Tensor) -> None:
        top = pyro.sample("top", dist.HalfNormal(torch.ones((), dtype=F64)))
        scale = pyro.sample("scale", dist.Uniform(torch.zeros(2, dtype=F64), top).to_event(1))
        pyro.sample("y", dist.Normal(x0, scale[:1]).to_event(1), obs=torch.zeros(1))

    def still(x0: Tensor) -> None:
        scale = pyro.sample("scale", dist.Uniform(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=F64)))
        pyro.sample("y", dist.Normal(x0 * weights[0], scale[:1]).to_event(1), obs=torch.zeros(1))

    with pytest.raises(ProgramError, match="the support of site 'scale' is another"):
        particle_gibbs(diffusion, moving, 2)
    assert particle_gibbs(diffusion, still, 2, particles=2).parameters["weights"].shape == (2, 3)

    def unknown(x0: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("y", dist.Normal(x0 + shift, 0.1).to_event(1), obs=torch.full((1,), 0.3, dtype=F64))

    with pytest.raises(ProgramError, match="nothing is unknown"):
        particle_gibbs(diffusion, nothing, 2)
    with pytest.raises(ProgramError, match="'k' is discrete"):
        particle_gibbs(diffusion, discrete, 2)
    with pytest.raises(OptionError, match="mcgdiff"):
        particle_gibbs(diffusion, unknown, 2, proposal="mcgdiff")
    with pytest.raises(OptionError, match="particles=1"):
        particle_gibbs(diffusion, unknown, 2, particles=1)
    before = torch.get_rng_state()
    one, other = (particle_gibbs(diffusion, unknown, 5, seed=1, particles=4) for _ in range(2))
    assert torch.equal(one.x0, other.x0) and torch.equal(one.parameters["shift"], other.parameters["shift"])
    assert torch.equal(torch.get_rng_state(), before)
    assert one.x0.shape == (5, 1) and one.parameters["shift"].shape == (5,)


# ---------------------------------------------------------------------- contracts


@every_proposal
def test_nothing_leaks_and_batches_do_not_matter(proposal: str):
    diffusion, _ = chain(5, dims=2)
    diffusion.train()
    options = {"seed": 7, "repeats": 3, **PROPOSALS[proposal](observed())}
    before = torch.get_rng_state()
    one = smc(diffusion, observed(), 20, batch_size=7, **options)
    other = smc(diffusion, observed(), 20, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert diffusion.net.training and diffusion.net.unused.grad is None
    torch.testing.assert_close(one.log_weights, other.log_weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.particles, other.particles, rtol=1e-12, atol=1e-12)
    assert one.particles.shape == (3, 20, 2) and one.ess.shape == one.pareto_k.shape == (3, 6)
    assert one.network_evaluations == 3 * 20 * 5
    assert torch.equal(one.sample(9, seed=0), one.sample(9, seed=0)) and one.sample(9).shape == (9, 2)
    assert not torch.equal(one.particles, smc(diffusion, observed(), 20, **options | {"seed": 8}).particles)


@every_proposal
def test_a_batch_as_long_as_every_dim(proposal: str):
    """B == C == H == W: the numbers are those of the same event as a vector."""
    betas, shape = linear_betas(4), (4, 4, 4)
    net = GaussianDenoiser("x0", betas, gain=GAIN, bias=BIAS)
    a = torch.arange(4 * 64.0).sin().double()
    found = []
    for event in (shape, (64,)):
        diffusion = GaussianDiffusion(net, TableSchedule(torch.tensor(betas)), event, "x0")
        seen = LinearGaussian(matrix(a.view(4, *event)), torch.ones(4, dtype=F64), 0.5)
        found.append(smc(diffusion, seen, 4, repeats=4, seed=0, threshold=1.0, **PROPOSALS[proposal](seen)))
    assert found[0].particles.shape == (4, 4, *shape)
    # float32 particles, a likelihood of 64 dims
    torch.testing.assert_close(found[0].particles.flatten(2), found[1].particles, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0].log_weights, found[1].log_weights, rtol=1e-3, atol=1e-3)


def test_memory_is_that_of_a_batch():
    class Counting(nets.MLP):
        largest = 0

        def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
            Counting.largest = max(Counting.largest, len(x))
            return super().forward(x, log_snr)

    diffusion = GaussianDiffusion(Counting(2, width=8, depth=1), LogLinearSchedule(3, -4.0, 4.0), (2,))
    seen = LinearGaussian(matrix(A.float()), Y.float(), 0.6)
    posterior = smc(diffusion, seen, 100, batch_size=16, seed=0, repeats=2)
    assert Counting.largest == 16 and posterior.particles.dtype == torch.float32


def test_conditioning_is_one_value_for_all():
    class Labelled(nn.Module):
        def forward(self, x: Tensor, log_snr: Tensor, y: Tensor) -> Tensor:
            return x / 2 + y[:, None]

    diffusion = GaussianDiffusion(Labelled(), LogLinearSchedule(3, -4.0, 4.0), (2,), "x0")
    seen = LinearGaussian(matrix(A.float()), Y.float(), 0.6)
    one, other = (smc(diffusion, seen, 10, seed=0, y=y).log_weights for y in (1, torch.tensor(2)))
    assert not torch.equal(one, other)
    with pytest.raises(ShapeError, match="y has shape"):
        smc(diffusion, seen, 10, seed=0, y=torch.zeros(10, dtype=torch.long))


def test_collapse_is_told():
    """Sixteen dims observed a thousand times more precisely than the prior says: a few particles of the bootstrap decide."""
    diffusion, _ = chain(3, dims=16)
    seen = LinearGaussian(mask(torch.ones(16, dtype=torch.bool)), torch.linspace(-1, 1, 16).double(), 0.02)
    posterior = smc(diffusion, seen, 200, proposal="bootstrap", seed=0, repeats=4)
    assert posterior.families.max() < 10 and posterior.pareto_k[:, -1].max() > 0.7
    text = str(posterior)
    assert "collapsed in 4 of 4 repeats" in text and "k-hat is above 0.7" in text and "first at x_0" in text
    assert "above its mean" in text
    few = smc(diffusion, seen, 24, proposal="bootstrap", seed=0)
    assert few.pareto_k.isnan().all() and "takes 25 particles" in str(few)
    quiet, _ = chain(20, dims=1, gain=0.0, bias=0.0)
    easy = LinearGaussian(matrix(torch.ones(1, 1, dtype=F64)), Y, 1.0)
    assert smc(quiet, easy, 500, proposal="bootstrap", seed=0).warnings == ()


def test_families_are_counted_through_resampling():
    """With every weight on one particle all descend from it, however even the weights are afterwards."""

    def one_alone(x0: Tensor) -> Tensor:
        return 40.0 * (x0 > x0.max() - 1e-9).double().flatten()

    diffusion, _ = chain(2)

    def twist(x_t: Tensor, x0_hat: Tensor, log_snr: Tensor) -> Tensor:
        top = (x_t > x_t.max() - 1e-9).double().flatten()
        return 40.0 * top * (log_snr < -1) + 0.0 * x_t.sum(1)

    posterior = smc(diffusion, lambda x0: 0 * x0.sum(1), 100, twist=twist, seed=0)
    assert float(posterior.families) == pytest.approx(1.0)
    assert "collapsed" in str(posterior)


def test_what_cannot_have_been_is_an_error():
    diffusion, _ = chain(3, dims=2)
    with pytest.raises(DataError, match="all 10 weights of repeat 0 are 0 at x_0"):
        smc(diffusion, lambda x0: torch.full((len(x0),), -math.inf), 10, proposal="bootstrap")
    with pytest.raises(DataError, match="weight of nan at x_0"):
        smc(diffusion, lambda x0: torch.full((len(x0),), math.nan), 10, proposal="bootstrap")
    with pytest.raises(DataError, match="weight of nan at t=3"):
        smc(diffusion, lambda x0: (x0.sum(1) - x0.sum(1)) / 0, 10, proposal="twisted")
    with pytest.raises(DataError, match=r"twist is 0 for \d of 10 particles at t=\d"):
        smc(diffusion, lambda x0: torch.where(x0[:, 0] > 0, x0[:, 0], -math.inf), 10, proposal="twisted", seed=0)
    with pytest.raises(ProgramError, match="not differentiable"):
        smc(diffusion, lambda x0: torch.zeros(len(x0)), 10, proposal="twisted")


@pytest.mark.monte_carlo
def test_zero_weights_are_weights():
    """A likelihood with gaps, by the bootstrap: the evidence is the chance of x_0 > 0.5."""
    diffusion, closed = chain(3)
    mu, V = closed.marginal()
    chance = 0.5 * math.erfc((0.5 - mu) / math.sqrt(2 * V))
    posterior = smc(
        diffusion, lambda x0: torch.where(x0[:, 0] > 0.5, 0.0, -math.inf), 40, proposal="bootstrap", repeats=500
    )
    n = 500 * 40
    assert_proportion(round(n * math.exp(posterior.evidence.log_z)), n, chance, detects=0.04)
    assert (posterior.sample(100) > 0.5).all()


def test_singular_and_contradictory_observations():
    twice = matrix(torch.ones(2, 1, dtype=F64))
    with pytest.raises(DataError, match="contradictory"):
        LinearGaussian(twice, torch.tensor([1.0, 2.0], dtype=F64), 0.0)
    with pytest.raises(DataError, match="rank 1 of 2"):
        LinearGaussian(twice, torch.tensor([1.0, 1.0], dtype=F64), 0.0)
    with pytest.raises(DataError, match="contradictory"):
        LinearGaussian(matrix(torch.zeros(1, 2, dtype=F64)), torch.ones(1, dtype=F64), 0.0)
    LinearGaussian(twice, torch.tensor([1.0, 2.0], dtype=F64), 0.1)
    with pytest.raises(DataError, match="NaN"):
        LinearGaussian(twice, torch.tensor([1.0, math.nan], dtype=F64), 0.1)
    with pytest.raises(OptionError, match="noise_std"):
        LinearGaussian(twice, torch.ones(2, dtype=F64), -1.0)
    with pytest.raises(ShapeError, match="y has shape"):
        LinearGaussian(twice, torch.ones(3, dtype=F64), 1.0)
    with pytest.raises(ShapeError, match="one observation"):
        LinearGaussian(twice, torch.ones(5, 2, dtype=F64), 1.0)
    diffusion, _ = chain(3, dims=2)
    for proposal in ("bootstrap", "twisted"):
        with pytest.raises(OptionError, match="noise_std=0"):
            smc(diffusion, observed(0.0), 10, proposal=proposal)
    with pytest.raises(OptionError, match="no density given x_0"):
        observed(0.0)(torch.zeros(1, 2))


def test_mistakes_are_named():
    diffusion, _ = chain(3, dims=2)
    seen = observed()
    for options, match in (
        ({"proposal": "dps"}, "proposal='dps'"),
        ({"resampling": "none"}, "resampling='none'"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"repeats": 0}, "repeats=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"proposal": "bootstrap", "twist": pigdm(seen)}, "twist is no option"),
        ({"data_std": 1.0}, "data_std is no option"),
        ({"proposal": "mcgdiff", "data_std": -1.0}, "data_std=-1.0"),
    ):
        with pytest.raises(OptionError, match=match):
            smc(diffusion, seen, 10, **options)
    with pytest.raises(OptionError, match="particles=0"):
        smc(diffusion, seen, 0)
    with pytest.raises(OptionError, match="data_std"):
        pigdm(seen, 0.0)
    with pytest.raises(ShapeError, match="a schedule per element has no one variance"):
        pigdm(seen)(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(OptionError, match="LinearGaussian"):
        smc(diffusion, far, 10, proposal="mcgdiff")
    with pytest.raises(ShapeError, match="operator is of events"):
        smc(diffusion, LinearGaussian(matrix(torch.ones(1, 3)), torch.ones(1), 1.0), 10)
    for proposal in ("bootstrap", "twisted"):
        with pytest.raises(ShapeError, match="not a float for each of 10 particles"):
            smc(diffusion, lambda x0: x0.sum(), 10, proposal=proposal)
    learned = GaussianDiffusion(nets.MLP(2, out_features=4), LogLinearSchedule(3, -4.0, 4.0), (2,), variance="learned")
    with pytest.raises(OptionError, match="one variance"):
        smc(learned, observed(), 10, proposal="mcgdiff")
    with pytest.raises(OptionError, match="n=0"):
        smc(diffusion, seen, 10, seed=0).sample(0)


def test_mistakes_of_operators():
    with pytest.raises(ShapeError, match="a has shape"):
        matrix(torch.ones(3))
    with pytest.raises(DataError, match="NaN"):
        matrix(torch.full((1, 2), math.nan))
    with pytest.raises(ShapeError, match="boolean"):
        mask(torch.ones(3))
    with pytest.raises(DataError, match="keeps nothing"):
        mask(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="last two dims"):
        separable((1, 4, 4), torch.eye(4), torch.eye(3))
    with pytest.raises(ShapeError, match="odd"):
        blur((1, 4, 4), torch.ones(2))
    for make in (
        lambda: blur((4,), torch.ones(3)),
        lambda: downsample((4,), 2),
        lambda: separable((4,), *[torch.eye(4)] * 2),
    ):
        with pytest.raises(ShapeError, match=r"\[4\] are no images"):
            make()
    with pytest.raises(DataError, match="NaN"):
        blur((1, 4, 4), torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(OptionError, match="factor=3"):
        downsample((1, 4, 4), 3)
