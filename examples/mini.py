"""The library re-told in one file of plain Pyro: a diffusion model is a (model, guide) pair.

    python examples/mini.py        # about 15 core-seconds

Nothing here imports pyrodiff. Two-dimensional data, T = 50 steps, a small network; the same bound four ways: analytic or Monte
Carlo KL, along the whole chain or at one random timestep per example. The names are DDPM's (Ho et al., 2020,
https://arxiv.org/abs/2006.11239): alpha_bar_t is the share of signal left at step t, and x_0 is data.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

T = 50
# Tables in float64, rounded once to the data's dtype: in float32 the first steps would lose their digits. beta[t] for t = 1..T.
beta = torch.cat([torch.zeros(1), torch.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T, dtype=torch.float64)]).double()
alpha_bar = (1 - beta).cumprod(0)  # alpha_bar[0] = 1: data


def at(table: Tensor, t: int | Tensor) -> Tensor:
    """table[t], one value per example, to broadcast over the example's dims."""
    return table[torch.as_tensor(t)][..., None]


def marginal(x0: Tensor, t: int | Tensor) -> dist.TorchDistribution:
    """q(x_t | x_0), the rule: eq. 4."""
    a_t = at(alpha_bar, t)
    return dist.Normal(a_t.sqrt().to(x0) * x0, (1 - a_t).sqrt().to(x0)).to_event(1)


def posterior_mean_std(x0: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
    """q(x_{t-1} | x_t, x_0), the answer key: eq. 7."""
    t = torch.as_tensor(t)
    a_t, a_s, b_t = at(alpha_bar, t), at(alpha_bar, t - 1), at(beta, t)
    of_x0, of_x_t = a_s.sqrt() * b_t / (1 - a_t), (1 - b_t).sqrt() * (1 - a_s) / (1 - a_t)
    return of_x0.to(x0) * x0 + of_x_t.to(x0) * x_t, (b_t * (1 - a_s) / (1 - a_t)).sqrt().to(x0)


class Denoiser(nn.Module):
    """Predicts the noise in x_t; from it, the data."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.time = nn.Embedding(T + 1, width)
        self.enter, self.leave = nn.Linear(2, width), nn.Linear(width, 2)
        self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        eps_hat = self.leave(self.hidden(self.enter(x_t) + self.time(torch.as_tensor(t))))
        a_t = at(alpha_bar, t)
        return x_t / a_t.sqrt().to(x_t) - ((1 - a_t) / a_t).sqrt().to(x_t) * eps_hat


net = Denoiser()


def guide(x0: Tensor, t: Tensor | None = None) -> None:
    """q, noisiest first: the order of the model, which an analytic KL needs."""
    with pyro.plate("data", len(x0)):
        x_T = pyro.sample(f"x_{T}", marginal(x0, T))
        if t is None:
            x_t = x_T
            for i in range(T, 1, -1):
                x_t = pyro.sample(f"x_{i - 1}", dist.Normal(*posterior_mean_std(x0, x_t, i)).to_event(1))
            return
        with poutine.mask(mask=False):  # x_t is drawn in one step, and is no term of the bound
            x_t = pyro.sample("x_t", marginal(x0, t))
        with poutine.scale(scale=float(T)), poutine.mask(mask=t > 1):  # one of T terms, T times as heavy
            pyro.sample("x_s", dist.Normal(*posterior_mean_std(x0, x_t, t.clamp(min=2))).to_event(1))


def model(x0: Tensor, t: Tensor | None = None) -> Tensor:
    """p: the guide's own posterior, with the network's estimate in the place of x_0."""
    pyro.module("net", net)
    with pyro.plate("data", len(x0)):
        x_t = pyro.sample(f"x_{T}", dist.Normal(torch.zeros_like(x0), 1.0).to_event(1))
        last_std = ((1 - alpha_bar[1]) / alpha_bar[1]).sqrt().to(x0)
        if t is None:
            for i in range(T, 1, -1):
                x_t = pyro.sample(f"x_{i - 1}", dist.Normal(*posterior_mean_std(net(x_t, i), x_t, i)).to_event(1))
            return pyro.sample("x_0", dist.Normal(net(x_t, 1), last_std).to_event(1), obs=x0)
        with poutine.mask(mask=False):
            x_t = pyro.sample("x_t", dist.Normal(torch.zeros_like(x0), 1.0).to_event(1))
        x0_hat = net(x_t, t)
        with poutine.scale(scale=float(T)), poutine.mask(mask=t > 1):
            pyro.sample("x_s", dist.Normal(*posterior_mean_std(x0_hat, x_t, t.clamp(min=2))).to_event(1))
        with poutine.scale(scale=float(T)), poutine.mask(mask=t == 1):
            return pyro.sample("x_0", dist.Normal(x0_hat, last_std).to_event(1), obs=x0)


def two_moons(n: int) -> Tensor:
    angle = torch.pi * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, y], -1) + 0.05 * torch.randn(n, 2)


def main(steps: int = 2000) -> None:
    svi = SVI(model, guide, Adam({"lr": 2e-3}), TraceMeanField_ELBO())
    for step in range(steps):
        loss = svi.step(two_moons(256), torch.randint(1, T + 1, (256,))) / 256
        if step % 250 == 0:
            print(f"step {step:5d}   -ELBO {loss:7.3f} nats")
    x0, pyro_seed = two_moons(2000), 0
    with torch.no_grad():
        for name, elbo in (("analytic", TraceMeanField_ELBO()), ("Monte Carlo", Trace_ELBO())):
            pyro.set_rng_seed(pyro_seed)
            chain = elbo.loss(model, guide, x0) / 2000
            one = elbo.loss(model, guide, x0, torch.randint(1, T + 1, (2000,))) / 2000
            print(f"{name:12s} KL: whole chain {chain:.3f}, one timestep per example {one:.3f} nats")
        samples = poutine.uncondition(model)(x0)
    print(f"samples: mean {samples.mean(0).tolist()}, sd {samples.std(0).tolist()}")
    print(f"data:    mean {x0.mean(0).tolist()}, sd {x0.std(0).tolist()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke-test", action="store_true", help="three training steps")
    main(steps=3 if parser.parse_args().smoke_test else 2000)
