"""What the bound costs against T: the ledger, stock Pyro along the whole chain, and subsampled timesteps.

    python benchmarks/elbo_cost.py

All three bound the same 64 images with the same network; times are ratios to one network call on the batch, measured in the
same run, so that the table means the same on another machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO

import pyrodiff


def median_seconds(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ledger_of_the_chain(diffusion: pyrodiff.GaussianDiffusion, x0: torch.Tensor) -> object:
    return pyrodiff.elbo_terms(diffusion, x0)


def ledger_of_20_timesteps(diffusion: pyrodiff.GaussianDiffusion, x0: torch.Tensor) -> object:
    return pyrodiff.elbo_terms(diffusion, x0, t=20)


def stock_pyro(diffusion: pyrodiff.GaussianDiffusion, x0: torch.Tensor) -> object:
    return TraceMeanField_ELBO().loss(diffusion.model, diffusion.guide, x0)


WAYS = (ledger_of_the_chain, ledger_of_20_timesteps, stock_pyro)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    net = pyrodiff.nets.UNet(1, width=24, multipliers=(1, 2), blocks=1, resample="conv")
    x0 = torch.randint(0, 17, (64, 1, 8, 8)) / 8 - 1
    print(f"{platform.processor() or platform.machine()}, {options.threads} thread(s), torch {torch.__version__}")
    print("64 images of 8x8; in units of one network call on them, and network calls in brackets")
    print(f"{'T':>6s}{'one call, ms':>14s}{'ledger, chain':>20s}{'ledger, t=20':>20s}{'stock Pyro, chain':>20s}")
    for steps in options.steps:
        schedule = pyrodiff.LogLinearSchedule(steps, -6.0, 6.5)
        diffusion = pyrodiff.GaussianDiffusion(net, schedule, (1, 8, 8), prediction="v", bins=(17, -1.0, 1.0)).eval()
        rounds = 3 if steps > 100 else 9
        with torch.no_grad(), pyro.validation_enabled(False):
            unit = median_seconds(lambda: net(x0, torch.zeros(64)), 30)
            chain, some, stock = (median_seconds(partial(way, diffusion, x0), rounds) for way in WAYS)
        cells = [f"{chain / unit:.1f} ({steps})", f"{some / unit:.1f} (21)", f"{stock / unit:.1f} ({steps})"]
        print(f"{steps:6d}{1e3 * unit:14.2f}" + "".join(f"{cell:>20s}" for cell in cells))


if __name__ == "__main__":
    main()
