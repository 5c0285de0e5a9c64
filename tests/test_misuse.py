"""Legal uses that must not go silently wrong, and mistakes that must be named."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer import TraceMeanField_ELBO as StockMeanField
from pyro.optim import Adam
from torch import nn

import pyrodiff
from pyrodiff import CosineSchedule, GaussianDiffusion, LogLinearSchedule, elbo_terms, sample, timesteps
from pyrodiff.errors import DataError, OptionError, ProgramError, ShapeError


def make(net=None, event=(2,), schedule=None, **options):
    net = net or pyrodiff.nets.MLP(2, width=8, depth=1)
    return GaussianDiffusion(net, schedule or LogLinearSchedule(5, -5.0, 5.0), event, **options)


class Labelled(nn.Module):
    """Predicts x_0 from the label alone."""

    def forward(self, x, log_snr, y):
        return 0 * x + 0.3 * y[:, None].to(x)


def labels(n):
    return pyro.sample("y", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_enumerated_labels_are_summed_out_per_example(batch):
    """In the plate of the labels the examples stay theirs: Pyro's ELBO equals log-sum-exp by hand at the same draws."""
    diffusion = make(Labelled(), schedule=LogLinearSchedule(2, -1.0, 1.0), prediction="x0")
    x0 = torch.randn(batch, 2)

    def model(x0):
        with pyro.plate("data", len(x0), dim=-1):
            diffusion.model(x0, y=labels(len(x0)))

    torch.manual_seed(0)
    found = TraceEnum_ELBO(max_plate_nesting=1).loss(model, diffusion.guide, x0)
    torch.manual_seed(0)
    guide = poutine.trace(diffusion.guide).get_trace(x0)
    log_q = sum(guide.nodes[s]["fn"].log_prob(guide.nodes[s]["value"]) for s in ("x_2", "x_1"))
    x_2, x_1 = guide.nodes["x_2"]["value"], guide.nodes["x_1"]["value"]
    p, log_p = diffusion.reverse_kernel, []
    for y in range(3):
        label = torch.full((batch,), y)
        log_p.append(p(x_2, 2, y=label).log_prob(x_1) + p.decode(x_1, y=label).log_prob(x0) - np.log(3))
    prior = diffusion.forward_process.prior(x0.shape, x0).log_prob(x_2)
    by_hand = -(prior + torch.stack(log_p).logsumexp(0) - log_q).sum()
    assert found == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_plate_of_another_size_is_refused():
    diffusion = make()
    with pytest.raises(ProgramError, match="'rows' at dim -1 holds 3 rows for 4"), pyro.plate("rows", 3, dim=-1):
        diffusion.model(torch.zeros(4, 2))
    scaled = make(data_size=100)
    with pytest.raises(ProgramError, match="data_size=100"), pyro.plate("rows", 4, dim=-1):
        scaled.model(torch.zeros(4, 2))


def test_a_callers_subsampling_plate_scales_the_examples():
    diffusion, x0 = make(), torch.randn(4, 2)

    def inside(program):
        def run(x0):
            with pyro.plate("data", 100, subsample=torch.arange(len(x0)), dim=-1):
                program(x0)

        return run

    losses = []
    for model, guide in ((diffusion.model, diffusion.guide), (inside(diffusion.model), inside(diffusion.guide))):
        torch.manual_seed(0)
        losses.append(StockMeanField().loss(model, guide, x0))
    assert losses[1] == pytest.approx(25 * losses[0], rel=1e-5)


def test_data_size_below_the_batch_is_refused():
    with pytest.raises(ShapeError, match="data_size=2 is less than the batch of 8"):
        make(data_size=2).model(torch.zeros(8, 2))


def test_svi_trains_under_module_local_params():
    with pyro.settings.context(module_local_params=True):
        diffusion = make()
        before = [p.detach().clone() for p in diffusion.parameters()]
        svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 0.1}), StockMeanField())
        for _ in range(2):
            svi.step(torch.randn(8, 2), timesteps.uniform(8, 5))
        moved = [not torch.equal(p, b) for p, b in zip(diffusion.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) // 2


def test_exchanging_the_network_reaches_every_part_and_the_rest_is_refused():
    diffusion = make()
    other = pyrodiff.nets.MLP(2, width=16, depth=1)
    diffusion.net = other
    assert diffusion.reverse_kernel.net is other and diffusion.model.reverse_kernel.net is other
    assert len(list(diffusion.parameters())) == len(list(other.parameters()))
    for name in ("schedule", "forward_process", "reverse_kernel"):
        with pytest.raises(ProgramError, match="cannot be exchanged"):
            setattr(diffusion, name, copy.deepcopy(getattr(diffusion, name)))
    with pytest.raises(ProgramError, match="cannot be exchanged"):
        diffusion.reverse_kernel.schedule = CosineSchedule(7)


class PerElement(pyrodiff.schedules.Schedule):
    def __init__(self, shape, steps=4):
        super().__init__()
        self.steps, self.event_dim = steps, len(shape)
        self.offset = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).double()

    def log_snr(self, t):
        t = torch.as_tensor(t)
        base = torch.where(t == 0, torch.inf, 5 - 10 * (t.double() - 1) / (self.steps - 1))
        return base.reshape(t.shape + (1,) * self.event_dim) + self.offset


def test_a_schedule_of_other_pixels_is_refused():
    for shape in ((4, 4), (2, 1, 1), (1, 4, 4, 1)):
        with pytest.raises(ShapeError, match="first dims of the event"):
            make(event=(1, 4, 4), schedule=PerElement(shape))
    for shape in ((1, 4, 4), (1,), (1, 4), ()):
        make(event=(1, 4, 4), schedule=PerElement(shape))


def test_fit_takes_a_schedule_of_the_users_own(tmp_path):
    diffusion = make(schedule=PerElement((2,)))
    result = pyrodiff.fit(diffusion, torch.randn(64, 2), steps=2, batch_size=8, progress=False)
    assert result.steps == 2


class Context(nn.Module):
    cond_event_dims = {"c": 1}  # noqa: RUF012

    def forward(self, x, log_snr, c):
        return x * c.mean(1, keepdim=True)


@pytest.mark.parametrize("chain", [True, False])
def test_shared_conditioning_is_not_cut_with_the_batch(chain):
    diffusion, x0, c = make(Context()), torch.randn(6, 2), torch.arange(6.0)
    seen = []
    diffusion.net.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["c"]), with_kwargs=True)
    elbo_terms(diffusion, x0, c=c, batch_size=2, chain=chain)
    sample(diffusion, 6, c=c, batch_size=3)
    sample(diffusion, 4, c=c)
    assert all(torch.equal(row, c) for value in seen for row in value)
    with pytest.raises(ShapeError, match="c has 5 rows for n=6"):
        elbo_terms(diffusion, x0, c=torch.zeros(5, 6))


def test_numbers_and_lists_are_conditioning_too():
    net = pyrodiff.nets.MLP(2, width=8, depth=1, classes=4)
    diffusion = make(net)
    same = sample(diffusion, 3, seed=0, y=torch.full((3,), 2))
    for y in (2, [2, 2, 2], np.array([2, 2, 2])):
        torch.testing.assert_close(sample(diffusion, 3, seed=0, y=y), same)


def test_conditioning_x_0_on_more_rows_than_chains_is_refused():
    diffusion = make()
    with pytest.raises(ProgramError, match="pass the data to the program"):
        poutine.condition(diffusion.model, {"x_0": torch.zeros(8, 2)})()


def test_channels_last_weights_name_the_way_that_works():
    net = pyrodiff.nets.UNet(1, width=8, multipliers=(1, 2), blocks=1).to(memory_format=torch.channels_last)
    diffusion = make(net, event=(1, 8, 8))
    x0, t = torch.randn(4, 1, 8, 8), timesteps.uniform(4, 5)
    with pytest.raises(ProgramError, match="channels_last"):
        SVI(diffusion.model, diffusion.guide, Adam({"lr": 0.1}), StockMeanField()).step(x0, t)
    with pyro.settings.context(module_local_params=True):
        StockMeanField()(diffusion.model, diffusion.guide)(x0, t).backward()
    assert all(p.grad is not None for p in diffusion.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_samples_follow_the_networks_dtype(dtype):
    diffusion = make(pyrodiff.nets.MLP(2, width=8, depth=1).to(dtype), decoder="learned")
    assert sample(diffusion, 4).dtype == dtype and diffusion.model().dtype == dtype


def test_timesteps_follow_the_data_to_its_device():
    net = pyrodiff.nets.MLP(2, width=8, depth=1).to("meta")
    diffusion = make(net)
    x0, t, weight = torch.zeros(4, 2, device="meta"), timesteps.uniform(4, 5), torch.full((4,), 5.0)
    with pyro.validation_enabled(False):
        guide = poutine.trace(diffusion.guide).get_trace(x0, t, weight=weight)
        model = poutine.trace(poutine.replay(diffusion.model, guide)).get_trace(x0, t, weight=weight)
        terms = pyrodiff.elbo.site_terms(model, guide)
    assert {value.device.type for value in terms.values()} == {"meta"}


def test_the_strict_elbo_takes_normals_beside_gaussians():
    diffusion, x0 = make(schedule=LogLinearSchedule(1, 0.0, 1.0)), torch.randn(4, 2)

    def guide(x0):
        with pyro.plate("data", len(x0), dim=-1):
            pyro.sample("x_1", dist.Normal(0.5 * x0, 0.8).to_event(1))

    torch.manual_seed(0)
    strict = pyrodiff.TraceMeanField_ELBO().loss(diffusion.model, guide, x0)
    torch.manual_seed(0)
    assert strict == StockMeanField().loss(diffusion.model, guide, x0)
    torch.manual_seed(0)
    losses = [Trace_ELBO().loss(diffusion.model, guide, x0) for _ in range(400)]
    assert abs(sum(losses) / 400 - strict) < 2


class Normal(dist.Normal):
    """Not Pyro's, whatever its name."""


def test_a_users_normal_is_not_pyros():
    with pytest.raises(ProgramError, match="no KL is registered for site 'z'"):
        pyrodiff.TraceMeanField_ELBO().loss(
            lambda: pyro.sample("z", Normal(0.0, 1.0)), lambda: pyro.sample("z", dist.Normal(0.0, 1.0))
        )


def test_weights_without_their_timesteps_are_refused():
    diffusion, x0 = make(), torch.randn(4, 2)
    with pytest.raises(ProgramError, match="weight belongs to t"):
        diffusion.model(x0, weight=torch.zeros(4))
    with pytest.raises(OptionError, match="weights belong to a tensor t"):
        elbo_terms(diffusion, x0, t=2, weights=torch.ones(2))
    with pytest.raises(ShapeError, match=r"weight has shape \[4, 1\]"):
        diffusion.model(x0, timesteps.uniform(4, 5), weight=torch.ones(4, 1))


def test_lists_of_timesteps_and_stored_weights():
    terms = elbo_terms(make(), torch.randn(4, 2), t=[2, 3])
    assert terms.diffusion.shape == (4, 2)
    drawn = elbo_terms(make(), torch.randn(4, 2), t=2, repeats=3)
    assert drawn.weights.shape == drawn.t.shape == (3, 4, 2)


def test_data_off_the_grid_are_refused_by_the_ledger():
    diffusion = make(bins=(17, -1.0, 1.0))
    x0 = torch.zeros(3, 2)
    x0[1, 0] = 0.3
    for validation in (True, False):
        with pyro.validation_enabled(validation), pytest.raises(DataError, match=r"x0\[1\] has values off the grid"):
            elbo_terms(diffusion, x0)


def test_transitions_go_forward_in_time():
    with pytest.raises(ProgramError, match="from 3 to 2"):
        make().forward_process.transition(torch.zeros(1, 2), 3, 2)


def test_respacing_to_one_step_has_no_openai_decoder():
    with pytest.raises(OptionError, match="respacing to 1"):
        sample(make(decoder="openai"), 2, steps=1)


def test_respace_shares_every_parameter():
    diffusion = make(decoder="learned")
    diffusion.reverse_kernel.log_scale.data.fill_(-1.0)
    short = diffusion.respace(3)
    assert short.steps == 3 and short.net is diffusion.net
    assert short.reverse_kernel.log_scale is diffusion.reverse_kernel.log_scale
    torch.testing.assert_close(sample(short, 4, seed=0), sample(diffusion, 4, seed=0, steps=3))


def test_importance_sampler_refuses_step_0():
    with pytest.raises(ShapeError, match=r"0\.\.0"):
        timesteps.ImportanceSampler(5).update(torch.tensor([0]), torch.tensor([1.0]))
