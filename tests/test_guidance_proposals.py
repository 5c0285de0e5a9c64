"""Guidance as proposals: closed forms of linear chains, quadrature over their noise, and laws of heuristics known by recursion."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from monte_carlo import assert_moments
from oracles import DDPM, GaussianDenoiser, LinearModel, MixtureDenoiser, linear_betas
from test_smc import A, Tape, Y, chain, conditioned, far, grid, observed, unbiased
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from pyrodiff import GaussianDiffusion, NoisyClassifier, TableSchedule
from pyrodiff.errors import DataError, OptionError, ProgramError
from pyrodiff.inference.guidance import class_label, guided, pigdm, repaint
from pyrodiff.inference.operators import LinearGaussian, mask, matrix
from pyrodiff.inference.resampling import multinomial
from pyrodiff.inference.smc import prepare, smc, walk

F64 = torch.float64


def nothing(x0: Tensor) -> Tensor:
    """Log-likelihood of no observation."""
    return x0.new_zeros(len(x0))


def evidence_by_quadrature(
    diffusion: GaussianDiffusion, likelihood, proposal: str, options: dict, step: float, **cond
) -> float:
    """Log of the mean weight of one particle in one dim, over the noise of x_T, ..., x_0."""
    nodes, weights = grid(diffusion.steps + 1, step, 9.0)
    moves, _ = prepare(diffusion, likelihood, 1, proposal, options, None, 0, len(nodes), 1, cond)
    source = Tape(torch.zeros(len(nodes), 1, dtype=F64), iter(nodes.T))
    found = walk(diffusion, moves, source, len(nodes), multinomial, 0.0, len(nodes)).log_weights[:, 0]
    return math.log(float((found.exp() * weights).sum()))


# ---------------------------------------------------------------------- two dims that depend on each other

COVARIANCE = torch.tensor([[0.8, 0.6], [0.6, 0.9]], dtype=F64)
KEEP = mask(torch.tensor([True, False]))


class Coupled(nn.Module):
    """E[x_0 | x_t] for data N(0, COVARIANCE), times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=F64), requires_grad=False)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        ab = log_snr.sigmoid()[:, None, None]
        gain = self.factor * ab.sqrt() * COVARIANCE @ torch.linalg.inv(ab * COVARIANCE + (1 - ab) * torch.eye(2))
        return (gain @ x[..., None])[..., 0]


def coupled(steps: int, factor: float = 1.0, variance: str = "fixed_large") -> tuple[GaussianDiffusion, list]:
    """The chain, and the matrix and the variance of its steps from t = 1, ..., T by DDPM's formulas."""
    ddpm = DDPM(linear_betas(steps))
    diffusion = GaussianDiffusion(
        Coupled(factor), TableSchedule(torch.tensor(ddpm.beta)), (2,), "x0", variance=variance
    )
    variances, data, found = ddpm.variances(variance), COVARIANCE.numpy(), []
    for i in range(steps):
        ab, om = ddpm.ab[i], ddpm.om[i]
        gain = factor * math.sqrt(ab) * data @ np.linalg.inv(ab * data + om * np.eye(2))
        found.append((ddpm.c1[i] * gain + ddpm.c2[i] * np.eye(2), variances[i] if i else ddpm.decoder_variance("vdm")))
    return diffusion, found


def own_law(steps: list) -> Tensor:
    """The covariance of the chain's x_0, whose mean is 0."""
    covariance = np.eye(2)
    for M, v in steps[::-1]:
        covariance = M @ covariance @ M.T + v * np.eye(2)
    return torch.tensor(covariance)


# ---------------------------------------------------------------------- replacement


@pytest.mark.parametrize("noise_std", [0.0, 0.6])
@pytest.mark.parametrize(("steps", "step"), [(1, 0.04), (2, 0.3)])
def test_the_mean_weight_of_replacement_is_the_evidence(steps: int, step: float, noise_std: float):
    diffusion, closed = chain(steps)
    one = torch.ones(1, 1, dtype=F64)
    log_z, *_ = conditioned(closed, one, Y, noise_std)
    seen = LinearGaussian(matrix(one), Y, noise_std)
    for data_std in (0.7, 1.4):
        found = evidence_by_quadrature(diffusion, seen, "replacement", {"data_std": data_std}, step)
        assert found == pytest.approx(log_z, abs=1e-8)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_weights_of_replacement_are_the_model_over_the_bridge(variance: str):
    """Without noise or resampling: p(z_s | x_t) / q(z_s | z_t, y) down the path, and the decoder's density of y at its end."""
    diffusion, _ = coupled(5, 0.8, variance)
    y = torch.tensor([0.7], dtype=F64)
    moves, source = prepare(diffusion, LinearGaussian(KEEP, y, 0.0), 1, "replacement", {}, None, 0, 6, 6, {})
    found = walk(diffusion, moves, source, 6, multinomial, 0.0, 6, keep_path=True)
    q, p, (x, *rest) = diffusion.forward_process, diffusion.reverse_kernel, found.path
    observed_part = y.expand(6, 1).clone()
    expected = Normal(0, 1).log_prob(x[:, 0]) - _at(q.marginal(_both(observed_part), 5), x)
    for t, x_s in zip(range(5, 1, -1), rest, strict=False):
        expected += _at(p(x, t), x_s) - _at(q.posterior(_both(observed_part), x, t), x_s)
        x = x_s
    expected += _at(p(x, 1), rest[-1])
    torch.testing.assert_close(rest[-1][:, :1], observed_part, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.log_weights[:, 0], expected, rtol=0, atol=1e-9)


def _both(part: Tensor) -> Tensor:
    return torch.cat([part, torch.zeros_like(part)], 1)


def _at(law, x: Tensor) -> Tensor:
    """The log-density of the first element."""
    return Normal(law.mean[:, 0], law.stddev.expand(law.mean.shape)[:, 0]).log_prob(x[:, 0])


@pytest.mark.monte_carlo
@pytest.mark.parametrize("noise_std", [0.0, 0.6])
@pytest.mark.parametrize("operator", ["mask", "matrix"])
def test_replacement_under_resampling_at_every_step(operator: str, noise_std: float):
    """By the exact denoiser: of a wrong one the weights' tail is so heavy that a standard error says little."""
    diffusion, steps = coupled(4)
    a = torch.tensor([[1.0, 0.0]], dtype=F64) if operator == "mask" else A
    y, S = torch.tensor([0.7], dtype=F64), own_law(steps)
    total = a @ S @ a.T + noise_std**2
    gain = S @ a.T / total
    log_z, mean, variance = float(MultivariateNormal(torch.zeros(1), total).log_prob(y)), gain @ y, S - gain @ a @ S
    seen = LinearGaussian(KEEP if operator == "mask" else matrix(a), y, noise_std)
    posterior = smc(
        diffusion, seen, 6, proposal="replacement", data_std=0.7, threshold=1.0, repeats=12_000, batch_size=10**6
    )
    if not noise_std:
        torch.testing.assert_close(posterior.particles @ a[0], y.expand(12_000, 6), rtol=0, atol=1e-12)
    unbiased(
        posterior,
        log_z,
        [(lambda x: x[:, 1:], mean[1:]), (lambda x: (x[:, 1] - mean[1])[:, None] ** 2, variance[1, 1])],
    )


def test_replacement_is_exact_where_its_reverse_is_the_models():
    """Data N(0, tau^2), as told, with the variance that an exact chain has: every weight is p(y)."""
    betas, tau = linear_betas(4), 1.0
    net = GaussianDenoiser("x0", betas, mean=0.0, var=tau**2)
    net.like = nn.Parameter(torch.zeros((), dtype=F64))
    diffusion = GaussianDiffusion(net, TableSchedule(torch.tensor(betas)), (2,), "x0", variance="fixed_large")
    seen = LinearGaussian(mask(torch.tensor([True, False])), torch.tensor([0.7], dtype=F64), 0.3)
    moves, source = prepare(diffusion, seen, 50, "replacement", {}, None, 0, 1, 50, {})
    look = moves.begin(source.like)
    assert float(look.log_twist[0]) == pytest.approx(float(Normal(0, math.sqrt(1 + 0.3**2)).log_prob(seen.y)))
    x = source.normal()
    for s in (4, 3, 2, 1):  # the last step's variance is the decoder's own
        x, gain = moves.move(look, source.normal(), s)
        assert gain.abs().max() < 1e-12
        look = moves.look(x, s)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_noise_of_replacement_is_what_made_it(noise_std: float):
    diffusion, _ = coupled(4, 0.8)
    seen = LinearGaussian(matrix(A), Y, noise_std)
    moves, source = prepare(diffusion, seen, 8, "replacement", {}, None, 0, 1, 8, {})
    look, noise = moves.begin(source.like), source.normal()
    for s in range(4, -1 if noise_std else 0, -1):  # without noise the last move has none where y observes
        x, _ = moves.move(look, noise, s)
        torch.testing.assert_close(moves.noise(look, x, s), noise, rtol=0, atol=1e-10)
        look, noise = moves.look(x, s) if s else look, source.normal()


# ---------------------------------------------------------------------- RePaint


def route(T: int, jump: int, times: int) -> list[int]:
    """The states of the paper's appendix B, where indices count from 0 and x_0 is -1."""
    jumps = {j: times - 1 for j in range(0, T - jump, jump)}
    t, found = T, []
    while t >= 1:
        t -= 1
        found.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump):
                t += 1
                found.append(t)
    return [t + 1 for t in [*found, -1]]


@pytest.mark.monte_carlo
@pytest.mark.parametrize(("jump", "times"), [(1, 1), (1, 3), (3, 2)])
def test_the_law_of_repaint(jump: int, times: int):
    """The joint Gaussian recursion of both elements along the paper's route, and the samples; it is not the posterior's."""
    T, y = 12, 1.0
    diffusion, steps = coupled(T)
    ddpm = DDPM(linear_betas(T))
    states = route(T, jump, times)
    assert states[0] == T
    mean, covariance = np.zeros(2), np.eye(2)
    for t, s in pairwise(states):
        if s > t:
            keep = 1 - ddpm.beta[s - 1]
            mean, covariance = math.sqrt(keep) * mean, keep * covariance + ddpm.beta[s - 1] * np.eye(2)
            continue
        M, v = steps[t - 1]
        rest_mean, rest = (M @ mean)[1], (M @ covariance @ M.T)[1, 1] + v
        ab, om = (ddpm.ab_s[t - 1], ddpm.om_s[t - 1])
        mean, covariance = np.array([math.sqrt(ab) * y, rest_mean]), np.diag([om, rest])
    n = 20_000
    seen = LinearGaussian(KEEP, torch.tensor([y], dtype=F64), 0.0)
    found = repaint(diffusion, seen, n, jump=jump, times=times, batch_size=n)
    x = found.particles[0]
    assert (x[:, 0] == y).all()
    S = own_law(steps)
    wrong = abs(mean[1] - float(S[1, 0] / S[0, 0]) * y) / math.sqrt(covariance[1, 1])  # it is a heuristic
    assert_moments(x[:, 1], mean[1], covariance[1, 1], detects=max(wrong, 0.1))
    assert wrong > 0.1
    assert found.network_evaluations == n * sum(s < t for t, s in pairwise(states))
    with pytest.raises(ProgramError, match="jumps have no density" if times > 1 else "weights it"):
        _ = found.log_evidence
    assert "log p(y)    none" in str(found)


def test_repaint_of_fewer_steps_than_a_jump_says_that_it_makes_none():
    diffusion, _ = coupled(12)
    seen = LinearGaussian(KEEP, torch.tensor([1.0], dtype=F64), 0.0)
    for options, jumps in (({"steps": 10}, False), ({"steps": 11}, True), ({"jump": 12}, False), ({"times": 1}, False)):
        found = repaint(diffusion, seen, 3, seed=0, **options)
        assert (found.network_evaluations > 3 * options.get("steps", 12)) == jumps
        assert ("jumps have no density" in found.no_evidence) == jumps


@pytest.mark.monte_carlo
def test_repaint_with_noise_and_batches():
    """The known part is y's own law in the coordinates of any operator."""
    diffusion, _ = coupled(6)
    seen = LinearGaussian(matrix(A), Y, 0.5)
    n = 20_000
    options = {"jump": 2, "times": 2}
    found = repaint(diffusion, seen, n, batch_size=n, **options)
    z, size = found.particles[0] @ A[0] / A.norm(), float(A.norm())
    precision = size**2 / 0.5**2 + 1  # data N(0, 1) before y
    mean, variance = size / 0.5**2 * float(Y) / precision, 1 / precision
    assert_moments(z, mean, variance, detects=0.1)
    few, again = (repaint(diffusion, seen, 9, batch_size=b, seed=0, **options).particles for b in (9, 4))
    torch.testing.assert_close(few, again, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- deterministic moves


@pytest.mark.monte_carlo
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_the_law_of_dps_along_ddim(eta: float):
    """x_s = alpha_s x0_hat' + sqrt(sigma_s^2 - std^2) eps_hat' + std noise, x0_hat' = x0_hat + sigma^2 / alpha times the gradient."""
    T = 40
    diffusion, closed = chain(T, gain=0.0, bias=0.0, mean=0.0, var=1.0)
    ddpm = closed.ddpm
    mu, V = 0.0, 1.0
    for i in range(T - 1, -1, -1):
        k, ab, om, ab_s, om_s = closed.A[i], ddpm.ab[i], ddpm.om[i], ddpm.ab_s[i], ddpm.om_s[i]
        pull = om / math.sqrt(ab) * k / 0.25
        slope, shift = k - pull * k, pull * 1.0
        variance = eta**2 * ddpm.bt[i]
        keep = math.sqrt(om_s - variance) / math.sqrt(om)
        a = (math.sqrt(ab_s) - keep * math.sqrt(ab)) * slope + keep
        mu, V = a * mu + (math.sqrt(ab_s) - keep * math.sqrt(ab)) * shift, a**2 * V + variance
    n = 20_000
    seen = LinearGaussian(matrix(torch.ones(1, 1, dtype=F64)), torch.ones(1, dtype=F64), 0.5)
    found = guided(diffusion, seen, n, eta=eta, batch_size=n)
    assert_moments(found.particles, mu, V, detects=0.1)
    with pytest.raises(ProgramError, match="heuristic" if eta else "moves without noise have no density"):
        _ = found.log_evidence


@pytest.mark.monte_carlo
def test_ddim_towards_an_exact_twist_has_the_posterior():
    """Of data N(0, 1) PiGDM's twist is p(y | x_t), and its flow's law N(0.8, 0.2), but for 3 % of the variance at 200 steps."""
    diffusion, _ = chain(200, gain=0.0, bias=0.0, mean=0.0, var=1.0)
    n, seen = 4_000, LinearGaussian(matrix(torch.ones(1, 1, dtype=F64)), torch.ones(1, dtype=F64), 0.5)
    x = guided(diffusion, seen, n, twist=pigdm(seen), eta=0.0, batch_size=n).particles
    assert_moments(x, 0.8, 0.2, bias=0.03, detects=0.25)


# ---------------------------------------------------------------------- classifier guidance


class Bayes(nn.Module):
    """Logits of the parts of a mixture of Gaussians, given x_t."""

    def __init__(self, weights: list[float], means: list[float], variances: list[float], sharper: float = 1.0) -> None:
        super().__init__()
        self.parts = [torch.tensor(z, dtype=F64) for z in (weights, means, variances)]
        self.sharper = sharper
        self.config = {"classes": len(weights)}

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        w, m, S = self.parts
        ab = log_snr.sigmoid()[:, None, None]
        law = Normal(ab.sqrt() * m, (ab * S + 1 - ab).sqrt())
        return self.sharper * (w.log() + law.log_prob(x[..., None]).sum(1))


PARTS = ([0.3, 0.7], [-0.8, 0.6], [0.04, 0.09])


def class_evidence(steps: int):
    """Chain, log p(y | x_0), twist, evidence and posterior mean of a class whose classifier is nobody's Bayes rule, by quadrature."""
    diffusion, closed = chain(steps)
    classifier = NoisyClassifier(Bayes(*PARTS, sharper=1.5), diffusion.schedule, (1,))
    mu, V = closed.marginal()
    nodes, weights = grid(1, 0.01, 9.0)
    x0 = mu + math.sqrt(V) * nodes
    ab = closed.ddpm.ab[0]
    w, m, S = (torch.tensor(z, dtype=F64) for z in PARTS)
    # p(y | x_1 = alpha_1 x_0) by Bayes' rule
    joint = 1.5 * (w.log() + Normal(math.sqrt(ab) * m, (ab * S + 1 - ab).sqrt()).log_prob(math.sqrt(ab) * x0))
    p = joint.softmax(1)[:, 0]
    z = float((p * weights).sum())
    log_likelihood, twist = class_label(classifier, 0)
    torch.testing.assert_close(log_likelihood(x0), p.log(), rtol=1e-10, atol=1e-10)
    return diffusion, log_likelihood, twist, math.log(z), float((p * weights * x0[:, 0]).sum()) / z


@pytest.mark.monte_carlo
def test_the_evidence_of_a_class():
    diffusion, log_likelihood, _, log_z, mean = class_evidence(4)
    options = {"proposal": "bootstrap", "threshold": 0.9, "repeats": 8_000, "batch_size": 10**6}
    unbiased(smc(diffusion, log_likelihood, 8, **options), log_z, [(lambda x: x, mean)])


@pytest.mark.parametrize(("steps", "step"), [(1, 0.02), (2, 0.15)])
def test_the_evidence_of_a_class_by_its_twist(steps: int, step: float):
    """By quadrature over the noise: the weights' tail is so heavy that no mean of draws would tell."""
    diffusion, log_likelihood, twist, log_z, _ = class_evidence(steps)
    found = evidence_by_quadrature(diffusion, log_likelihood, "twisted", {"twist": twist}, step)
    assert found == pytest.approx(log_z, abs=1e-6)


@pytest.mark.monte_carlo
def test_the_evidence_of_a_class_of_a_mixture_is_its_weight():
    """The exact denoiser's chain has nearly the mixture's law: log Z and means are off by up to 0.006 (T = 100, 16,000 particles)."""
    w, m, S = PARTS
    betas = linear_betas(100)
    diffusion = GaussianDiffusion(
        MixtureDenoiser(w, m, S), TableSchedule(torch.tensor(betas)), (1,), "x0", variance="fixed_large"
    )
    classifier = NoisyClassifier(Bayes(w, m, S), diffusion.schedule, (1,))
    for y in (0, 1):
        log_likelihood, twist = class_label(classifier, y)
        posterior = smc(diffusion, log_likelihood, 20, twist=twist, repeats=100, batch_size=2000)
        unbiased(posterior, math.log(w[y]), [(lambda x: x, m[y])], bias=0.01)


def test_a_classifier_is_asked_at_its_own_step():
    diffusion, _ = chain(12)
    classifier = NoisyClassifier(Bayes(*PARTS), diffusion.schedule, (1,))
    _, twist = class_label(classifier, 1)
    x = torch.randn(5, 1, dtype=F64)
    respaced = diffusion.reverse_kernel.respace(4).schedule
    for t, own in enumerate(respaced.kept, 1):
        expected = classifier.log_prob(x, own, torch.tensor(1))
        torch.testing.assert_close(twist(x, x, respaced.log_snr(t)), expected, rtol=0, atol=0)
    with pytest.raises(DataError, match="labels y of class_label"):
        class_label(classifier, 2)


# ---------------------------------------------------------------------- classifier-free guidance


class Labelled(GaussianDenoiser):
    """Another error of the denoiser for each label, of which 2 is none."""

    def __init__(self, betas: np.ndarray) -> None:
        super().__init__("x0", betas)
        self.like, self.null_cond = nn.Parameter(torch.zeros((), dtype=F64)), {"y": 2}

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor) -> Tensor:
        gain, bias = (torch.tensor(z, dtype=F64)[y][..., None] for z in (GAINS, BIASES))
        return (1 + gain) * super().forward(x, log_snr) + bias


GAINS, BIASES = (0.08, -0.06, 0.0), (0.04, -0.06, 0.0)


def labelled(steps: int, dims: int = 1, variance: str = "fixed_large"):
    ddpm = DDPM(linear_betas(steps))
    diffusion = GaussianDiffusion(
        Labelled(ddpm.beta), TableSchedule(torch.tensor(ddpm.beta)), (dims,), "x0", variance=variance
    )

    def closed(y: int, scale: float = 1.0) -> LinearModel:
        gain, bias = (free[2] + scale * (free[y] - free[2]) for free in (GAINS, BIASES))
        return LinearModel(ddpm, ddpm.variances(variance), ddpm.decoder_variance("vdm"), gain=gain, bias=bias)

    return diffusion, closed


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_of_nothing_observed_the_evidence_is_one(scale: float):
    """By quadrature: a scale of guidance changes weights, and not their mean."""
    diffusion, _ = labelled(2)
    found = evidence_by_quadrature(diffusion, nothing, "bootstrap", {"guidance_scale": scale}, 0.3, y=0)
    assert found == pytest.approx(0.0, abs=1e-8)
    posterior = smc(diffusion, nothing, 50, proposal="bootstrap", guidance_scale=scale, seed=0, y=0)
    assert posterior.network_evaluations == 50 * 2 * (1 if scale == 1 else 2)
    assert (posterior.log_weights.std() < 1e-12) == (scale == 1)


@pytest.mark.monte_carlo
@pytest.mark.parametrize("proposal", ["bootstrap", "twisted"])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_guided_moves_have_the_conditional_chain_as_target(proposal: str, scale: float):
    diffusion, closed = labelled(4, dims=2)
    for y in (0, 1):
        log_z, mean, covariance = conditioned(closed(y), A, Y, 0.6)
        posterior = smc(
            diffusion, observed(), 8, proposal=proposal, guidance_scale=scale, threshold=1.0, repeats=6_000,
            batch_size=10**6, y=y,
        )  # fmt: skip
        unbiased(
            posterior,
            log_z,
            [(lambda x: x, mean), (lambda x, m=mean: (x[:, 0] - m[0])[:, None] ** 2, covariance[0, 0])],
        )


@pytest.mark.monte_carlo
def test_classifier_free_guidance_without_weights_is_another_law():
    diffusion, closed = labelled(4)
    n, scale = 20_000, 3.0
    mu, V = closed(1, scale).marginal()
    options = {"proposal": "bootstrap", "guidance_scale": scale, "batch_size": n}
    found = guided(diffusion, nothing, n, y=1, **options)
    assert_moments(found.particles, mu, V, detects=0.1)
    target, _ = closed(1).marginal()
    assert abs(mu - target) > 0.1
    # weighted, at a scale whose weights have light tails
    posterior = smc(diffusion, nothing, n // 200, y=1, repeats=200, **options | {"guidance_scale": 1.5})
    unbiased(posterior, 0.0, [(lambda x: x, target)], detects=0.1)
    with pytest.raises(ProgramError, match="heuristic"):
        _ = found.log_evidence


# ---------------------------------------------------------------------- contracts


def test_mistakes_of_guidance_are_named():
    diffusion, _ = chain(3, dims=2)
    seen = observed()
    for options, match in (
        ({"proposal": "mcgdiff", "guidance_scale": 2.0}, "guidance_scale is no option of proposal='mcgdiff'"),
        ({"proposal": "bootstrap", "guidance_scale": 2.0}, "needs a network with a null class"),
        ({"proposal": "replacement", "data_std": math.inf}, "data_std=inf"),
        ({"proposal": "replacement", "data_std": 0.0}, "data_std=0.0"),
        ({"proposal": "replacement", "twist": pigdm(seen)}, "twist is no option"),
    ):
        with pytest.raises(OptionError, match=match):
            smc(diffusion, seen, 10, **options)
    with pytest.raises(OptionError, match="LinearGaussian"):
        smc(diffusion, far, 10, proposal="replacement")
    with pytest.raises(OptionError, match=r"eta=1\.5"):
        guided(diffusion, seen, 10, eta=1.5)
    with pytest.raises(OptionError, match=r"proposal='mcgdiff'.* with eta"):
        guided(diffusion, seen, 10, proposal="mcgdiff", eta=0.0)
    with pytest.raises(OptionError, match="jump=0"):
        repaint(diffusion, seen, 10, jump=0)
    with pytest.raises(OptionError, match=r"times=1\.5 must be whole"):  # which would jump for ever
        repaint(diffusion, seen, 10, times=1.5)
    free, _ = labelled(3)
    with pytest.raises(OptionError, match="guides towards y, which is not given"):
        smc(free, nothing, 10, proposal="bootstrap", guidance_scale=2.0)


def test_nothing_leaks_and_batches_do_not_matter():
    diffusion, _ = labelled(5, dims=2)
    diffusion.train()
    classifier = NoisyClassifier(Bayes(*PARTS), diffusion.schedule, (2,)).train()
    log_likelihood, twist = class_label(classifier, 1)
    before = torch.get_rng_state()
    for likelihood, options in (
        (observed(), {"proposal": "replacement"}),
        (log_likelihood, {"twist": twist, "guidance_scale": 2.0}),
    ):
        one, other = (smc(diffusion, likelihood, 20, batch_size=b, seed=7, repeats=3, y=0, **options) for b in (7, 60))
        torch.testing.assert_close(one.log_weights, other.log_weights, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.particles, other.particles, rtol=1e-12, atol=1e-12)
    for options in ({"eta": 0.0}, {"proposal": "replacement"}, {"proposal": "mcgdiff"}):
        one, other = (guided(diffusion, observed(), 20, batch_size=b, seed=7, y=0, **options) for b in (7, 20))
        torch.testing.assert_close(one.particles, other.particles, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), before)
    assert diffusion.net.training and classifier.net.training and diffusion.net.like.grad is None


@pytest.mark.parametrize("shape", [(4, 4, 4), (64,)])
def test_a_batch_as_long_as_every_dim(shape: tuple[int, ...]):
    """B == C == H == W: what is observed is replaced there, and nowhere else."""
    betas = linear_betas(4)
    net = GaussianDenoiser("x0", betas)
    diffusion = GaussianDiffusion(net, TableSchedule(torch.tensor(betas)), shape, "x0")
    keep = (torch.arange(64) % 3 == 0).view(shape)
    y = torch.linspace(-1, 1, int(keep.sum()))
    seen = LinearGaussian(mask(keep), y, 0.0)
    posterior = smc(diffusion, seen, 4, repeats=4, seed=0, threshold=1.0, proposal="replacement")
    samples = repaint(diffusion, seen, 4, jump=1, times=2, seed=0)
    for x in (posterior.particles.flatten(0, 1), samples.particles[0]):
        torch.testing.assert_close(x[:, keep], y.expand(len(x), -1), rtol=0, atol=1e-6)
        assert (x[:, ~keep].std(0) > 0).all()
