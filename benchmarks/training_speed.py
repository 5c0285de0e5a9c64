"""Training steps per second, of the demo's network and of a larger one, through ``fit``.

    python benchmarks/training_speed.py [--threads 2] [--precision bf16]

A step is everything: batch, timesteps, bound, backward pass, clipping, optimiser, average of the weights.
"""

from __future__ import annotations

import argparse
import platform

import torch

import pyrodiff

NETS = {
    "8x8, the demo's": (
        (1, 8, 8),
        {"width": 24, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "resample": "conv"},
    ),
    "28x28": ((1, 28, 28), {"width": 32, "multipliers": (1, 2, 2), "blocks": 1, "attention": (2,), "resample": "conv"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{where}, {options.threads} thread(s), torch {torch.__version__}, {options.precision}, batch {options.batch}"
    )
    for name, (event, arguments) in NETS.items():
        torch.manual_seed(0)
        net = pyrodiff.nets.UNet(1, **arguments)
        schedule = pyrodiff.LogLinearSchedule(1000, -6.0, 6.5)
        diffusion = pyrodiff.GaussianDiffusion(net, schedule, event, prediction="v", bins=(17, -1.0, 1.0))
        data = torch.randint(0, 17, (1024, *event)) / 8 - 1

        def seconds(steps: int, diffusion=diffusion, data=data) -> float:
            options_of_fit = {"batch_size": options.batch, "device": options.device, "precision": options.precision}
            return pyrodiff.fit(diffusion, data, steps=steps, progress=False, **options_of_fit).seconds

        seconds(5)  # the first steps carry checks and allocations
        # The difference of two lengths leaves out what a run costs once.
        rate = options.steps / (seconds(options.steps + 5) - seconds(5))
        parameters = sum(p.numel() for p in net.parameters())
        print(f"{name:18s}{parameters:>12,} parameters{rate:10.2f} steps/s{rate * options.batch:12.0f} images/s")


if __name__ == "__main__":
    main()
