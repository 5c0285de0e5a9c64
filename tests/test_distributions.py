"""Tests of pyrodiff.distributions.

Errors of gradients are stated for the scale-free quantities ``scale * d/dloc`` and
``scale * d/dscale`` (the gradient by log scale), as ``|error| <= rel * |true| + floor``.
"""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import mpmath as mp
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from monte_carlo import assert_accepted, assert_rejected
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyrodiff.distributions import DiscretizedNormal, Gaussian, OnGrid, _tanh_cdf, _tanh_icdf
from pyrodiff.errors import OptionError, ShapeError

F32, F64 = torch.float32, torch.float64
# bin_width, low, high
GRIDS = {
    "8bit": (2 / 255, -1.0, 1.0),
    "17": (1 / 8, -1.0, 1.0),
    "2": (2.0, -1.0, 1.0),
    "0..255": (1.0, 0.0, 255.0),
}
VALUE_TOL = {F32: 1e-6, F64: 1e-14}
GRAD_TOL = {F32: (2e-5, 4e-7), F64: (1e-12, 1e-14)}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hard_cases(n: int, grid: tuple[float, float, float], dtype: torch.dtype, seed: int):
    """x, loc, scale, level: four kinds of offset (any, up to 1e6 sigma, at a bin edge, inside)."""
    bin_width, low, high = grid
    g = torch.Generator().manual_seed(seed)

    def uniform():
        return torch.rand(n, generator=g, dtype=F64)

    top = round((high - low) / bin_width)
    level = torch.randint(0, top + 1, (n,), generator=g)
    x = low + (high - low) * level.double() / top
    scale = 10 ** (6 * uniform() - 4)
    kind, u = torch.randint(0, 4, (n,), generator=g), 2 * uniform() - 1
    offsets = torch.stack(
        [
            u * (high - low),
            u.sign() * scale * 10 ** (8 * u.abs() - 2),
            u.sign() * bin_width / 2 + 5 * scale * u,
            u * bin_width,
        ]
    )
    offset = offsets.gather(0, kind[None])[0]
    x = x.to(dtype)
    return x, (x.double() + offset).to(dtype), scale.to(dtype), level


def evaluate(x: Tensor, loc: Tensor, scale: Tensor, grid, dtype=None) -> Tensor:
    """Rows: value, scale * d/dloc, scale * d/dscale; float64 [3, n]."""
    dtype = dtype or loc.dtype
    loc = loc.detach().to(dtype).requires_grad_()
    scale = scale.detach().to(dtype).requires_grad_()
    value = DiscretizedNormal(loc, scale, *grid).log_prob(x.to(dtype))
    assert value.dtype == dtype
    by_loc, by_scale = torch.autograd.grad(value.sum(), (loc, scale))
    s = scale.detach().double()
    return torch.stack([value.detach().double(), by_loc.double() * s, by_scale.double() * s])


def exact(x: float, loc: float, scale: float, half: mp.mpf, level: int, top: int):
    """The same three numbers to 60 digits."""
    x, loc, scale = mp.mpf(x), mp.mpf(loc), mp.mpf(scale)
    a, b = (x - loc - half) / scale, (x - loc + half) / scale

    def ndtr(z):
        return mp.erfc(-z / mp.sqrt(2)) / 2

    phi_a, phi_b = mp.npdf(a), mp.npdf(b)
    if level == 0:
        mass, phi_a = ndtr(b), 0
    elif level == top:
        mass, phi_b = ndtr(-a), 0
    else:
        mass = ndtr(b) - ndtr(a) if a + b < 0 else ndtr(-a) - ndtr(-b)
    return float(mp.log(mass)), float((phi_a - phi_b) / mass), float((a * phi_a - b * phi_b) / mass)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, figure) -> None:
    name = str(dtype).removeprefix("torch.")
    figure("Q4", "values and gradients not finite", int((~torch.isfinite(got)).sum()), at_most=0)
    figure.count("Q4", "points", got.shape[1], at_least=20_000)
    value_error = (got[0] - want[0]).abs() / (1 + want[0].abs())
    figure("Q4", f"value error / (1 + |log p|), {name}", value_error.max().item(), at_most=VALUE_TOL[dtype])
    rel, floor = GRAD_TOL[dtype]
    gradient_error = ((got[1:] - want[1:]).abs() - floor) / want[1:].abs().clamp(min=1e-300)
    figure("Q4", f"gradient's relative error, {name}", gradient_error.max().item(), at_most=rel)


@pytest.mark.reliability("Q4")
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", GRIDS)
def test_value_and_gradient_against_mpmath(name, dtype, figure):
    grid = GRIDS[name]
    x, loc, scale, level = hard_cases(300, grid, dtype, seed=1)
    top = round((grid[2] - grid[1]) / grid[0])
    with mp.workdps(60):
        rows = zip(x.tolist(), loc.tolist(), scale.tolist(), level.tolist(), strict=True)
        half = mp.mpf(grid[0]) / 2
        want = torch.tensor([exact(*row[:3], half, row[3], top) for row in rows], dtype=F64).T
    assert want[0].min() < -1e10  # the cases are as hard as they say
    assert_close(evaluate(x, loc, scale, grid), want, dtype, figure)


@pytest.mark.reliability("Q4")
@pytest.mark.parametrize("name", GRIDS)
def test_float32_against_float64_on_20000_cases(name, figure):
    x, loc, scale, _ = hard_cases(20_000, GRIDS[name], F32, seed=2)
    want = evaluate(x, loc, scale, GRIDS[name], dtype=F64)
    assert_close(evaluate(x, loc, scale, GRIDS[name]), want, F32, figure)


def test_difference_of_cdfs_fails_where_ours_does_not():
    # Negative control: were the cases easy, the tests above would prove nothing.
    x, loc, scale, _ = hard_cases(2_000, GRIDS["8bit"], F32, seed=2)
    loc.requires_grad_()
    normal, half = dist.Normal(loc, scale), 1 / 255
    naive = torch.log(normal.cdf(x + half) - normal.cdf(x - half))
    naive.sum().backward()
    assert (~torch.isfinite(naive)).float().mean() > 0.2
    assert torch.isnan(loc.grad).any()


def test_torch_log_ndtr_gradient_fails_where_ours_does_not():
    # Negative control for the closed-form gradient: outermost bin, z = -10,000.
    z = torch.tensor(-1e4, requires_grad=True)
    torch.special.log_ndtr(z).backward()
    assert abs(z.grad.item() / 1e4 - 1) > 1
    loc = torch.tensor(1e4, requires_grad=True)
    DiscretizedNormal(loc, 1.0, 2.0, -1.0, 1.0).log_prob(torch.tensor(-1.0)).backward()
    assert abs(loc.grad.item() / -1e4 - 1) < 1e-6


@pytest.mark.reliability("Q4")
@pytest.mark.parametrize("exponent", [6, 9, 12])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_far_tails_follow_the_asymptote(exponent, dtype):
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype)
    scale = torch.full_like(x, 1e-3)
    loc = x + 10.0**exponent * scale
    got = evaluate(x, loc, scale, GRIDS["17"])
    edge = (loc.double() - x.double() - 1 / 16) / scale.double()
    want = torch.stack([-0.5 * edge.square(), -edge, edge.square()])
    # All that far mass belongs to the highest bin.
    want[:, 2] = 0
    rel = 1e-6 if dtype == F32 else 1e-10  # log(edge) of the value is beyond the asymptote
    assert torch.allclose(got, want, rtol=rel, atol=0)


# loc offsets and scales that lie on a boundary between two formulas, for half-width 1/4.
BOUNDARIES = {
    "narrow|wide": (0.0, 1.0, 1.0),
    "narrow|wide, other side": (0.0, -1.0, 1.0),
    "edge at the mean": (0.0, 0.25, 0.25),
    "edge at the mean, other side": (0.0, -0.25, 0.25),
    "centre, narrow": (0.0, 0.0, 1.0),
    "centre, wide": (0.0, 0.0, 0.1),
    "centre, narrow|wide": (0.0, 0.0, 0.5),
    "lowest, edge at the mean": (-4.0, 0.25, 1.0),
    "highest, edge at the mean": (4.0, -0.25, 1.0),
    "lowest, tail": (-4.0, 9.0, 1.0),
    "highest, tail": (4.0, -9.0, 1.0),
    "interior, tail": (1.0, 9.0, 0.7),
}


@pytest.mark.reliability("Q4")
@pytest.mark.parametrize("name", BOUNDARIES)
def test_first_and_second_derivatives_at_branch_boundaries(name):
    x, offset, scale = BOUNDARIES[name]
    loc = x + offset + torch.tensor([-1e-3, 0.0, 1e-3], dtype=F64)
    inputs = (loc.requires_grad_(), torch.full_like(loc, scale, requires_grad=True))
    value = torch.full_like(loc, x)

    def log_prob(loc, scale):
        return DiscretizedNormal(loc, scale, 0.5, -4.0, 4.0).log_prob(value)

    assert gradcheck(log_prob, inputs)
    assert gradgradcheck(log_prob, inputs)


def test_boundary_cases_really_straddle():
    # d * (|z| + 1) is 1/2 at the first case, and the branch changes at it.
    c, s = torch.tensor([-0.999, -1.0, -1.001], dtype=F64), torch.ones(3, dtype=F64)
    assert ((0.25 / s) * (c.abs() / s + 1) < 0.5).tolist() == [True, False, False]


@pytest.mark.reliability("Q4")
def test_hard_second_derivatives_are_finite():
    x, loc, scale, _ = hard_cases(5_000, GRIDS["8bit"], F32, seed=3)
    loc.requires_grad_()
    scale.requires_grad_()
    value = DiscretizedNormal(loc, scale, *GRIDS["8bit"]).log_prob(x)
    first = torch.autograd.grad(value.sum(), (loc, scale), create_graph=True)
    second = torch.autograd.grad(first[0].sum() + first[1].sum(), (loc, scale))
    assert all(torch.isfinite(g).all() for g in second)


def test_gradient_by_log_scale_and_broadcasting():
    log_scale = torch.tensor([-2.0, 0.5], dtype=F64, requires_grad=True)
    loc = torch.tensor([[0.1], [0.4], [-0.2]], dtype=F64, requires_grad=True)
    x = torch.tensor([-1.0, 0.25], dtype=F64)

    def log_prob(loc, log_scale):
        return DiscretizedNormal(loc, log_scale.exp(), 1 / 8, -1.0, 1.0).log_prob(x)

    assert log_prob(loc, log_scale).shape == (3, 2)
    assert gradcheck(log_prob, (loc, log_scale))


def test_vmap_of_grad_agrees_with_autograd():
    x, loc, scale, _ = hard_cases(20, GRIDS["17"], F64, seed=4)

    def one(loc, scale, x):
        d = DiscretizedNormal(loc, scale, *GRIDS["17"], validate_args=False)
        return d.log_prob(x)

    grad = torch.func.vmap(torch.func.grad(one))(loc, scale, x)
    assert torch.allclose(grad * scale, evaluate(x, loc, scale, GRIDS["17"])[1], rtol=1e-13)


@pytest.mark.reliability("Q4")
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("cdf", ["exact", "tanh"])
def test_probabilities_sum_to_one(name, cdf, figure):
    bin_width, low, high = GRIDS[name]
    span = high - low
    loc = torch.tensor([low - span, low, low + 0.3 * span, high - bin_width / 2], dtype=F64)[:, None]
    scale = torch.tensor([1e-4, 1e-2, 0.1, 1.0, 100.0], dtype=F64)
    if cdf == "tanh":
        scale = scale[3:]  # its clamp at 1e-12 adds up over the empty bins of a narrow law
    d = DiscretizedNormal(loc, scale, bin_width, low, high, cdf=cdf)
    assert d.pmf().shape == (4, len(scale), d.levels)
    tolerance = 1e-12 if cdf == "exact" else 1e-9
    assert (d.pmf().sum(-1) - 1).abs().max() < tolerance
    if cdf == "exact":
        figure("Q4", "sum of probabilities less 1, float64", (d.pmf().sum(-1) - 1).abs().max().item(), at_most=1e-6)
        # float32 holds the points of the 8-bit grid to 6e-8, which moves the edges of a bin by that share of the scale
        single = DiscretizedNormal(loc.float(), scale[2:].float(), bin_width, low, high)
        off = (single.pmf().double().sum(-1) - 1).abs().max().item()
        figure("Q4", "sum of probabilities less 1, float32, scales of 0.1 and more", off, at_most=1e-6)


def test_pmf_adds_up_to_the_normal_cdf():
    d = DiscretizedNormal(torch.tensor(0.21, dtype=F64), 0.3, 2 / 255, -1.0, 1.0)
    edges = d.enumerate_support()[:-1] + d.bin_width / 2
    want = 0.5 * torch.special.erfc(-(edges - 0.21) / 0.3 / math.sqrt(2))
    assert torch.allclose(d.pmf().cumsum(-1)[:-1], want, rtol=0, atol=1e-13)


def chi_square_p_value(draws: Tensor, d: DiscretizedNormal, pmf: Tensor) -> float:
    """Pearson's test of one batch element; bins with fewer than 10 expected are pooled."""
    index = torch.round((draws.double() - d.low) / d.bin_width).long()
    counts = torch.bincount(index, minlength=d.levels).double()
    expected = pmf.double() * draws.numel()
    rare = expected < 10
    groups = [(counts[~rare], expected[~rare])]
    if expected[rare].sum() >= 10:
        groups.append((counts[rare].sum()[None], expected[rare].sum()[None]))
    observed, wanted = (torch.cat(parts) for parts in zip(*groups, strict=True))
    statistic = ((observed - wanted).square() / wanted).sum().item()
    return float(mp.gammainc((len(wanted) - 1) / 2, statistic / 2, mp.inf, regularized=True))


@pytest.mark.monte_carlo
@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize(
    ("grid", "loc", "scale"),
    [("8bit", 0.2, 0.05), ("8bit", -1.1, 0.5), ("17", 0.9, 0.3), ("2", 0.3, 1.0), ("0..255", 9, 4)],
)
def test_sample_frequencies(grid, loc, scale, cdf):
    d = DiscretizedNormal(torch.tensor(float(loc)), float(scale), *GRIDS[grid], cdf=cdf)
    draws = d.sample((100_000,))
    assert draws.dtype == F32
    assert not draws.requires_grad
    assert d.support.check(draws).all()
    assert_accepted(chi_square_p_value(draws, d, d.pmf()))
    # of two levels, which hardly depend on the scale, a law moved by a twentieth of it; of others, one 10 % wider
    wrong = (d.loc + 0.05 * d.scale, d.scale) if grid == "2" else (d.loc, 1.1 * d.scale)
    assert_rejected(chi_square_p_value(draws, d, DiscretizedNormal(*wrong, *GRIDS[grid], cdf=cdf).pmf()))


def test_sample_shape_and_seed():
    d = DiscretizedNormal(torch.zeros(3, 1), torch.ones(4), *GRIDS["17"])
    assert d.sample().shape == (3, 4)
    assert d.sample((5, 2)).shape == (5, 2, 3, 4)
    assert d().shape == (3, 4)
    torch.manual_seed(3)
    first = d.sample()
    torch.manual_seed(3)
    assert torch.equal(first, d.sample())
    with pytest.raises(NotImplementedError):
        d.rsample()


@pytest.mark.parametrize("name", GRIDS)
def test_mean_and_variance_against_brute_force(name):
    bin_width, low, high = GRIDS[name]
    loc = [low - 0.2 * (high - low), low + 0.37 * (high - low), high]
    scale = [0.3 * bin_width, 5 * bin_width, 2 * (high - low)]
    d = DiscretizedNormal(torch.tensor(loc, dtype=F64)[:, None], torch.tensor(scale, dtype=F64), bin_width, low, high)
    assert d.mean.shape == d.variance.shape == (3, 3)
    points = np.linspace(low, high, d.levels)
    for i, m in enumerate(loc):
        for j, s in enumerate(scale):
            upper = [math.erfc(-(p + bin_width / 2 - m) / s / math.sqrt(2)) / 2 for p in points]
            upper[-1] = 1.0
            pmf = np.diff([0.0, *upper])
            mean = (pmf * points).sum()
            variance = (pmf * (points - mean) ** 2).sum()
            assert d.mean[i, j].item() == pytest.approx(mean, rel=1e-12, abs=1e-12)
            assert d.variance[i, j].item() == pytest.approx(variance, rel=1e-10, abs=1e-12)
            assert d.stddev[i, j].item() == pytest.approx(variance**0.5, rel=1e-10, abs=1e-6)


def test_enumerate_support():
    d = DiscretizedNormal(torch.zeros(3, 2), 1.0, *GRIDS["8bit"])
    assert d.has_enumerate_support
    support = d.enumerate_support()
    assert support.shape == (256, 3, 2)
    assert d.enumerate_support(expand=False).shape == (256, 1, 1)
    want = (torch.arange(256, dtype=F64) / 127.5 - 1).float()
    assert torch.equal(support[:, 1, 1], want)
    assert d.support.check(support).all()
    assert d.log_prob(d.enumerate_support(expand=False)).shape == (256, 3, 2)


def test_expand_copy_and_pickle():
    d = DiscretizedNormal(torch.zeros(2), torch.ones(1), *GRIDS["17"], cdf="tanh")
    wide = d.expand((4, 3, 2))
    assert type(wide) is DiscretizedNormal
    assert wide.batch_shape == (4, 3, 2)
    assert wide.loc.stride()[:2] == (0, 0)
    assert (wide.cdf_rule, wide.levels, wide.low) == ("tanh", 17, -1.0)
    assert wide.log_prob(torch.tensor(0.5)).shape == (4, 3, 2)
    assert d.expand_by((5,)).batch_shape == (5, 2)
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert torch.equal(other.log_prob(torch.ones(2)), d.log_prob(torch.ones(2)))
    off = DiscretizedNormal(0.0, 1.0, *GRIDS["17"], validate_args=False)
    off.expand((2,)).log_prob(torch.tensor(0.01))  # validation stays off
    on = DiscretizedNormal(0.0, 1.0, *GRIDS["17"], validate_args=True)
    with pytest.raises(ValueError, match="OnGrid"):
        on.expand((2,)).log_prob(torch.tensor(0.01))  # and on


def test_in_a_pyro_program():
    loc = torch.linspace(-1, 1, 24).reshape(4, 3, 2)
    data = torch.round(loc * 8) / 8
    scale = torch.full((), 0.3, requires_grad=True)

    def model():
        with pyro.plate("images", 4):
            d = DiscretizedNormal(loc, scale, *GRIDS["17"]).to_event(2)
            return pyro.sample("x", d, obs=data)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["log_prob"].shape == (4,)
    flat = DiscretizedNormal(loc, scale, *GRIDS["17"])
    assert torch.allclose(site["log_prob"], flat.log_prob(data).sum((1, 2)))
    trace.log_prob_sum().backward()
    assert torch.isfinite(scale.grad)
    assert site["fn"].base_dist.support.is_discrete


def test_enumerated_by_pyro():
    @pyro.infer.config_enumerate
    def model():
        x = pyro.sample("x", DiscretizedNormal(0.3, 0.5, *GRIDS["17"]))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.2))

    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)
    loss = elbo.loss(model, lambda: None)
    d = DiscretizedNormal(torch.tensor(0.3), 0.5, *GRIDS["17"])
    likelihood = dist.Normal(d.enumerate_support(), 1.0).log_prob(torch.tensor(0.2))
    assert loss == pytest.approx(-torch.logsumexp(d.pmf().log() + likelihood, 0).item(), rel=1e-5)


def test_is_not_a_normal_for_the_kl_dispatch():
    d = DiscretizedNormal(0.0, 1.0, *GRIDS["17"])
    assert not isinstance(d, torch.distributions.Normal)
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(d, d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    loc = torch.tensor([0.5, -0.25, 1.0], dtype=dtype, requires_grad=True)
    scale = torch.tensor([0.01, 3.0, 0.5], dtype=dtype)
    x = torch.tensor([-1.0, 0.125, 1.0])
    d = DiscretizedNormal(loc, scale, *GRIDS["17"])
    value = d.log_prob(x)
    assert value.dtype == d.sample().dtype == d.mean.dtype == F32
    want = DiscretizedNormal(loc.float(), scale.float(), *GRIDS["17"]).log_prob(x)
    assert torch.equal(value, want)
    assert torch.equal(d.log_prob(x.to(dtype)), want)
    value.sum().backward()
    assert torch.isfinite(loc.grad).all()


def test_bfloat16_values_fall_in_their_bin():
    # bfloat16 cannot hold the 8-bit grid, but it does tell its points apart.
    grid = GRIDS["8bit"]
    d = DiscretizedNormal(torch.tensor(0.1), 0.2, *grid)
    points = d.enumerate_support()
    assert torch.equal(d.log_prob(points.bfloat16()), d.log_prob(points))


def test_inside_autocast():
    net = torch.nn.Linear(4, 4)
    x = torch.zeros(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loc = net(x)
        assert loc.dtype == torch.bfloat16
        value = DiscretizedNormal(loc, loc.exp(), *GRIDS["17"]).log_prob(x)
        assert value.dtype == F32
    value.sum().backward()
    assert torch.isfinite(net.bias.grad).all()


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
def test_meta_device(cdf):
    loc = torch.zeros(2, 3, device="meta", requires_grad=True)
    d = DiscretizedNormal(loc, 1.0, *GRIDS["8bit"], cdf=cdf, validate_args=False)
    value = d.log_prob(torch.zeros(5, 2, 3, device="meta"))
    assert value.device.type == "meta"
    assert value.shape == (5, 2, 3)
    value.sum().backward()
    assert loc.grad.shape == (2, 3)
    results = (d.sample(), d.mean, d.variance, d.enumerate_support())
    assert all(tensor.device.type == "meta" for tensor in results)


def test_memory_kept_for_backward_is_a_few_tensors():
    loc = torch.zeros(64, 32, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        d = DiscretizedNormal(loc, 1.0, *GRIDS["8bit"], validate_args=False)
        d.log_prob(torch.zeros(64, 32))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(storages.values()) <= 6 * loc.numel() * 4


@pytest.mark.parametrize("dtype", [F32, F64, torch.float16])
@pytest.mark.parametrize("name", GRIDS)
def test_support(name, dtype):
    bin_width, low, high = GRIDS[name]
    support = DiscretizedNormal(0.0, 1.0, bin_width, low, high).support
    points = torch.linspace(low, high, round((high - low) / bin_width) + 1, dtype=F64)
    assert support.check(points.to(dtype)).all()
    if dtype != torch.float16:
        assert not support.check((points + 0.01 * bin_width).to(dtype)).any()
        assert not support.check((points - 0.4 * bin_width).to(dtype)).any()
    bad = torch.tensor([low - bin_width, high + bin_width, math.nan, math.inf, -math.inf])
    assert not support.check(bad.to(dtype)).any()


def test_support_of_integers_and_repr():
    support = OnGrid(0.0, 255.0, 256)
    assert support.check(torch.tensor([0, 7, 255])).all()
    assert not support.check(torch.tensor([-1, 256])).any()
    assert repr(support) == "OnGrid(low=0, high=255, levels=256)"
    d = DiscretizedNormal(torch.zeros(2, 3), 1.0, *GRIDS["17"], cdf="tanh")
    assert repr(d) == ("DiscretizedNormal(loc: (2, 3), scale: (2, 3), low=-1, high=1, levels=17, cdf='tanh')")
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8)
    on_pixels = DiscretizedNormal(torch.full((3,), 100.0), 20.0, *GRIDS["0..255"])
    assert torch.equal(on_pixels.log_prob(pixels), on_pixels.log_prob(pixels.float()))


@pytest.mark.parametrize("value", [0.01, 1.125, -2.0, math.nan, math.inf])
def test_validation_rejects_values_off_the_grid(value):
    d = DiscretizedNormal(torch.zeros(2), 1.0, *GRIDS["17"], validate_args=True)
    with pytest.raises(ValueError, match=r"OnGrid\(low=-1, high=1, levels=17\)"):
        d.log_prob(torch.tensor([0.0, value]))


def test_validation_rejects_bad_parameters():
    with pytest.raises(ValueError, match="scale"):
        DiscretizedNormal(torch.zeros(2), torch.tensor([1.0, 0.0]), *GRIDS["17"], validate_args=True)
    with pytest.raises(ValueError, match="loc"):
        DiscretizedNormal(torch.tensor(math.nan), 1.0, *GRIDS["17"], validate_args=True)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.0, -1.0, 1.0), "bin_width=0.0 is not positive"),
        ((-0.5, -1.0, 1.0), "bin_width=-0.5"),
        ((0.5, 1.0, -1.0), "low=1.0 is not below high=-1.0"),
        ((0.5, 1.0, 1.0), "not below"),
        ((0.3, -1.0, 1.0), "whole number"),
        ((5.0, -1.0, 1.0), "whole number"),
        ((2 / 256, -1.0, 1.001), "whole number"),
        ((math.nan, -1.0, 1.0), "bin_width=nan"),
        ((0.5, -math.inf, 1.0), "low=-inf"),
    ],
)
def test_bad_grids(arguments, match):
    with pytest.raises(OptionError, match=match):
        DiscretizedNormal(0.0, 1.0, *arguments)


def test_bad_options_and_shapes():
    with pytest.raises(OptionError, match="cdf='erf' is not one of 'exact', 'tanh'"):
        DiscretizedNormal(0.0, 1.0, *GRIDS["17"], cdf="erf")
    with pytest.raises(ShapeError, match=r"bin_width has shape \(2,\)"):
        DiscretizedNormal(0.0, 1.0, torch.ones(2), -1.0, 1.0)


def test_grid_given_as_float32_tensors():
    width, low, high = (torch.tensor(value) for value in GRIDS["8bit"])
    d = DiscretizedNormal(torch.tensor(0.1), 0.3, width, low, high)
    same = DiscretizedNormal(torch.tensor(0.1), 0.3, *GRIDS["8bit"])
    assert d.levels == 256
    assert torch.equal(d.pmf(), same.pmf())


@pytest.mark.reliability("Q7")
def test_tanh_rule_equals_guided_diffusion(figure):
    golden = np.load(Path(__file__).parent / "data" / "decoder_tanh.npz")
    x, means = torch.from_numpy(golden["x"]), torch.from_numpy(golden["means"])
    assert {-1.0, 1.0} <= set(x.flatten().tolist())
    keys = [key for key in golden if key.startswith("ll_")]
    assert len(keys) == 4
    for key in keys:
        scale = torch.full_like(means, float(key[3:])).exp()
        got = DiscretizedNormal(means, scale, *GRIDS["8bit"], cdf="tanh").log_prob(x)
        want = torch.from_numpy(golden[key])
        # Relative: its clamp gives -27.6, whose float32 spacing is 1.9e-6.
        off = ((got - want).abs() / (1 + want.abs())).max().item()
        figure("Q7", "guided-diffusion's decoder, float32", off, at_most=1e-6)


def test_tanh_rule_is_not_a_bound():
    arguments = (torch.tensor(0.9), 0.01, *GRIDS["8bit"])
    x = torch.tensor(-1.0)
    assert DiscretizedNormal(*arguments, cdf="tanh").log_prob(x) > -28
    assert DiscretizedNormal(*arguments).log_prob(x) < -17_000


def test_the_ends_of_a_grid_are_its_own_ends():
    ends = OnGrid(0.1, 0.9, 100).points(torch.tensor([0.0, 99.0], dtype=F64))
    assert ends.tolist() == [0.1, 0.9]  # 0.9 * 99 / 99 is more


def test_the_tanh_rules_quantiles_are_those_of_its_cdf():
    u = torch.linspace(1e-6, 1 - 1e-6, 1001, dtype=F64)
    torch.testing.assert_close(_tanh_cdf(_tanh_icdf(u)), u, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------------- Gaussian


def test_a_gaussian_is_torchs_normal():
    loc, scale = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64) + 0.1
    ours, theirs = Gaussian(loc, scale), torch.distributions.Normal(loc, scale)
    x = torch.randn(4, 3, dtype=torch.float64)
    for got, expected in (
        (ours.log_prob(x), theirs.log_prob(x)),
        (ours.entropy(), theirs.entropy()),
        (ours.variance, theirs.variance),
        (ours.stddev, theirs.stddev),
        (ours.mode, theirs.mode),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    torch.manual_seed(0)
    drawn = ours.sample((5,))
    torch.manual_seed(0)
    noise = torch.randn(5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(drawn, loc + scale * noise, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kl_of_gaussians_keeps_its_digits(dtype):
    """Element by element against mpmath, gaps of 1e-6 to 3 standard deviations and 1e-6 to 3 in log-scale.

    The parameters are those of the dtype, so that what is measured is the formula. The quotient of scales is rounded next to 1,
    its logarithm d is off by eps and d^2 by 2 d eps; everything else is a relative error of some eps.
    """
    gaps = torch.tensor([0.0, 1e-6, 1e-4, 1e-2, 0.04, 0.06, 0.3, 3.0], dtype=F64)
    by_loc, by_scale = (z.flatten() for z in torch.meshgrid(gaps, gaps, indexing="ij"))
    q = Gaussian(torch.full_like(by_loc, 0.3).to(dtype), torch.full_like(by_loc, 0.7).to(dtype))
    p = Gaussian((0.3 + 0.7 * by_loc).to(dtype), (0.7 * by_scale.exp()).to(dtype))
    got = torch.distributions.kl_divergence(q, p)
    eps = torch.finfo(dtype).eps
    with mp.workdps(50):
        for i in range(len(got)):
            m, s, n, r = (mp.mpf(float(z[i])) for z in (q.loc, q.scale, p.loc, p.scale))
            d = 2 * mp.log(s / r)
            exact = float((mp.expm1(d) - d + ((m - n) / r) ** 2) / 2)
            assert abs(float(got[i]) - exact) <= 4 * eps * (exact + abs(float(d))), (
                by_loc[i],
                by_scale[i],
                got[i],
                exact,
            )
