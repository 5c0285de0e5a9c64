"""What Pyro costs: a training step through Pyro's SVI against the same loss written by hand, on the same UNet.

Four ways to take one step on the same batch: the loss by hand with torch's Adam; ``TraceMeanField_ELBO()(model, guide)``
with the same Adam (what ``fit`` does); ``SVI.step`` with the same Adam as a ``JointOptim``; and ``SVI.step`` with Pyro's own
ELBO and Adam, which keeps one optimiser per tensor.

    python benchmarks/svi_overhead.py                 # 28x28 images, batch 64: the ratio
    python benchmarks/svi_overhead.py --absolute      # a network of the same tensors that computes nothing: milliseconds

Steps are interleaved, so that a machine whose speed drifts slows both alike; the interval is that of the median by
order statistics. The hand-written step draws x_t, calls the network once, and adds the same three terms of the bound.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import kl_divergence
from tqdm import tqdm

import pyrodiff
from pyrodiff import timesteps
from pyrodiff.training.optim import JointOptim


class Idle(nn.Module):
    """As many parameter tensors as the network, and no work."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in like.parameters()])

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return x * torch.cat(list(self.tensors)).sum()


def loss_by_hand(diffusion: pyrodiff.GaussianDiffusion, x0: Tensor, t: Tensor) -> Tensor:
    """DDPM's bound at one random timestep, as one writes it without Pyro."""
    q, p, steps = diffusion.forward_process, diffusion.reverse_kernel, diffusion.steps
    x_t = q.marginal(x0, t).rsample()
    prior = kl_divergence(q.marginal(x0, steps), q.prior(x0.shape, x0))
    law_of_x_s, law_of_x_0 = p.both(x_t, t)
    kl = kl_divergence(q.posterior(x0, x_t, t.clamp(min=2)), law_of_x_s)
    return (prior + steps * torch.where(t > 1, kl, -law_of_x_0.log_prob(x0))).sum()


def step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of an optimiser."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def synchronize(device: str) -> None:
    """Wait for a GPU to finish what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and its 95 % interval by order statistics."""
    ordered, n = sorted(values), len(values)
    k = max(0, int((n - 1.96 * n**0.5) / 2))
    return statistics.median(ordered), ordered[k], ordered[n - 1 - k]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--absolute", action="store_true", help="time an idle network: Pyro's own milliseconds")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    unet = pyrodiff.nets.UNet(1, width=options.width, multipliers=(1, 2, 2), blocks=1, attention=(2,), resample="conv")
    net = Idle(unet) if options.absolute else unet
    event, schedule = (1, options.size, options.size), pyrodiff.LinearSchedule(1000)
    diffusion = pyrodiff.GaussianDiffusion(net, schedule, event, bins=(256, -1.0, 1.0)).to(options.device)
    x0 = (torch.randint(0, 256, (options.batch, *event)) / 127.5 - 1).to(options.device)
    adam = torch.optim.Adam(diffusion.parameters(), lr=1e-6)
    elbo = pyrodiff.TraceMeanField_ELBO()
    bound = elbo(diffusion.model, diffusion.guide)
    svi = SVI(diffusion.model, diffusion.guide, JointOptim(torch.optim.Adam, {"lr": 1e-6}), elbo)
    stock = SVI(diffusion.model, diffusion.guide, Adam({"lr": 1e-6}), TraceMeanField_ELBO())

    def by_elbo(x0: Tensor, t: Tensor) -> None:
        with pyro.settings.context(module_local_params=True):
            loss = bound(x0, t)
        step(loss, adam)

    ways: dict[str, Callable[[Tensor, Tensor], object]] = {
        "by hand": lambda x0, t: step(loss_by_hand(diffusion, x0, t), adam),
        "ELBO()(model, guide)": by_elbo,
        "SVI.step, JointOptim": svi.step,
        "SVI.step, all stock": stock.step,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in tqdm(range(options.pairs + 3), delay=2):
        for name, way in ways.items():
            t = timesteps.low_discrepancy(options.batch, 1000, device=options.device)
            synchronize(options.device)
            start = time.perf_counter()
            elbo.strict = i < 3
            with pyro.validation_enabled(i < 3):  # as `fit` does: the first steps are checked, the rest trusted
                way(x0, t)
            synchronize(options.device)
            if i >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {options.threads} thread(s), torch {torch.__version__}, {options.pairs} interleaved rounds")
    print(f"{type(net).__name__}, {len(list(net.parameters()))} tensors, batch {options.batch}, {event}")
    print(
        f"{'a step':22s}{'ms':>9s}{'- by hand, ms':>16s}{'95 % interval':>18s}{'/ by hand':>12s}{'95 % interval':>20s}"
    )
    for name, values in times.items():
        extra = interval([b - a for a, b in zip(times["by hand"], values, strict=True)])
        ratio = interval([b / a for a, b in zip(times["by hand"], values, strict=True)])
        line = f"{name:22s}{statistics.median(values):9.2f}"
        if name != "by hand":
            line += (
                f"{extra[0]:16.2f}{extra[1]:9.2f} ..{extra[2]:6.2f}{ratio[0]:12.4f}{ratio[1]:11.4f} ..{ratio[2]:7.4f}"
            )
        print(line)


if __name__ == "__main__":
    main()
