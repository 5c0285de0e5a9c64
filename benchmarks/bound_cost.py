"""What a data set's bound costs: ``estimate_elbo`` against the loop over all T timesteps, at equal standard errors.

    python benchmarks/bound_cost.py runs/digits
    python benchmarks/bound_cost.py runs/fashion-mnist --loop-images 32

The loop (every x_t drawn on its own, as guided-diffusion's calc_bpd_loop does; analytic KLs) runs on a few images, twice, which
measures its variance over images and over noise, the v_t. Then, with images of one pool:

* over images: the estimate at the standard error that the loop would reach with --loop-size images, and the evaluations
  that the loop would take for what was reached;
* over noise: the estimate for the loop's own images, which must agree with the loop's mean.
"""

from __future__ import annotations

import argparse
import math
import platform
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

import pyrodiff
from pyrodiff import draws
from pyrodiff.laboratory.budget import estimate_elbo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/digits"), help="a run's folder")
    parser.add_argument(
        "--loop-images", type=int, default=48, help="images on which the loop is run, twice; 32 or more"
    )
    parser.add_argument("--loop-size", type=int, default=600, help="images of the loop whose error is to be equalled")
    parser.add_argument("--repeats", type=int, default=3, help="estimates, with seeds 0, 1, ...")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not (options.run / "run.yaml").is_file():
        parser.exit(0, f"{options.run} holds no run: make demo leaves one in runs/digits\n")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    diffusion = pyrodiff.load(options.run)
    name = yaml.safe_load((options.run / "run.yaml").read_text(encoding="utf-8"))["data"]
    data = pyrodiff.load_data(name)
    x0 = torch.cat([data.train, data.validation, data.test])
    x0 = x0[torch.randperm(len(x0))]
    T, unit = diffusion.steps, diffusion.event_shape.numel() * math.log(2)
    print(f"{platform.processor() or platform.machine()}, {options.threads} thread(s), torch {torch.__version__}")
    print(f"{name}: a pool of {len(x0):,} images, T = {T}; bits/dim throughout")

    few = x0[: options.loop_images]
    with tqdm(total=2 * T * len(few), desc="loop", unit="evaluation", delay=2, leave=False) as bar:
        terms = draws.independent(diffusion, few, repeats=2, advance=bar.update).terms.analytic / unit  # [2, M, T + 1]
    v = terms[..., :T].var(0).mean(0)
    totals = terms.sum(-1)
    between, over_noise = torch.cov(totals)[0, 1].item(), v.sum().item()
    loop_mean, loop_noise = totals.mean().item(), math.sqrt(over_noise / (2 * len(few)))
    limit = T * over_noise / v.sqrt().sum().item() ** 2
    print(f"\nthe loop on {len(few)} images, twice: {loop_mean:.4f} ± {loop_noise:.4f} over noise")
    print(
        f"  its variance per image: {between:.5f} between images (± {100 * math.sqrt(2 / len(few)):.0f} %) + {over_noise:.5f} over noise"
    )
    print(f"  limit of what choosing timesteps gains over noise, T sum(v) / (sum sqrt(v))^2: {limit:.1f}")

    se = math.sqrt((between + over_noise) / options.loop_size)
    print(
        f"\nover images, se {se:.4f}: as the loop over {options.loop_size} images ({options.loop_size * T:,} evaluations)"
    )
    for seed in range(options.repeats):
        found = estimate_elbo(diffusion, x0, se, seed=seed, progress=True)
        own = max(
            0.0, found.images * (found.se_examples**2 - found.se_noise**2)
        )  # between images, from many more of them
        loop = T * (own + over_noise) / found.se_examples**2
        apart = (found.mean - loop_mean) / math.hypot(found.se_examples, math.sqrt(between / len(few)), loop_noise)
        print(f"  {found}".replace("\n", "\n  "))
        print(
            f"  variance between images {own:.5f}: the loop takes {loop:,.0f} evaluations, {loop / found.network_evaluations:.0f} times as "
            f"many; means {apart:+.1f} standard errors apart; {found.timesteps:.1f} timesteps per image; {found.seconds:.0f} s"
        )

    print(f"\nover noise, the loop's {len(few)} images, se {loop_noise:.4f}")
    for seed in range(options.repeats):
        found = estimate_elbo(diffusion, few, loop_noise, "noise", seed=seed, progress=True)
        made = found.network_evaluations - found.pilot_evaluations
        gain = T * over_noise / found.se_noise**2 / made
        apart = (found.mean - loop_mean) / math.hypot(found.se_noise, loop_noise)
        print(
            f"  {found.mean:.4f} ± {found.se_noise:.4f}, {apart:+.1f} standard errors from the loop; {made:,} evaluations and "
            f"{found.pilot_evaluations:,} of the pilot; gain without the pilot {gain:.1f} (limit {limit:.1f})"
        )


if __name__ == "__main__":
    main()
