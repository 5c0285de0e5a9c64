r"""Samplers: from noise to data along the reverse chain, or along some of its steps.

A sampler is one step, :math:`(x_t, t) \to x_s`; the loop, the noise and the last step are shared. The noise of example i is a
stream of its own, made of the seed and i, so that it is the same whatever the batch size or the device.

**The last step.** x_0 is by default the mean of the Normal behind the decoder, as in guided-diffusion, whose last step adds
no noise; with bins it lies off the grid, and may lie a little outside of it.
``last="sample"`` draws from the decoder instead, which is the law of the Pyro program: ``poutine.uncondition(diffusion.model)``
and ``Predictive`` always draw.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), algorithm 2. https://arxiv.org/abs/2006.11239
    Denoising Diffusion Implicit Models (Song et al., 2020), eq. 12, 16. https://arxiv.org/abs/2010.02502
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._tensor import append_dims, take_rows
from .diffusion import GaussianDiffusion
from .errors import OptionError, check_option
from .reverse import ReverseKernel

__all__ = ["METHODS", "ancestral", "ddim", "sample", "trajectory"]

Step = Callable[[ReverseKernel, Tensor, int, Tensor, float, dict[str, Tensor]], Tensor]


def ancestral(p: ReverseKernel, x_t: Tensor, t: int, noise: Tensor, eta: float, cond: dict[str, Tensor]) -> Tensor:
    r"""A draw from :math:`p(x_{t-1} \mid x_t)`: DDPM's algorithm 2, line 4 (``eta`` is not used)."""
    law = p(x_t, t, **cond)
    return law.mean + law.stddev * noise


def ddim(p: ReverseKernel, x_t: Tensor, t: int, noise: Tensor, eta: float, cond: dict[str, Tensor]) -> Tensor:
    r"""DDIM eq. 12: keep the noise that :math:`\hat x_0` implies, but for a share eta of the posterior's variance.

    eta = 0 is deterministic; eta = 1 has the posterior's variance, which is ``"fixed_small"``.
    """
    q = p.forward_process
    event_dim, _, _, small, _ = q.posterior_terms(x_t, t)
    log_snr_s, log_snr_t = (append_dims(q.schedule.log_snr(u), event_dim - q.schedule.event_dim) for u in (t - 1, t))
    std = eta * small.sqrt()
    alpha_s, along = log_snr_s.sigmoid().sqrt(), ((-log_snr_s).sigmoid() - std**2).sqrt()
    alpha_t, sigma_t = log_snr_t.sigmoid().sqrt(), (-log_snr_t).sigmoid().sqrt()
    x0_hat = p.denoise(x_t, t, **cond)
    eps_hat = (x_t - alpha_t.to(x_t) * x0_hat) / sigma_t.to(x_t)
    return alpha_s.to(x_t) * x0_hat + along.to(x_t) * eps_hat + std.to(x_t) * noise


METHODS: dict[str, Step] = {"ancestral": ancestral, "ddim": ddim}


def sample(
    diffusion: GaussianDiffusion,
    n: int,
    method: str = "ancestral",
    steps: str | int | Sequence[int] | None = None,
    seed: int | None = None,
    last: str = "mean",
    *,
    eta: float = 0.0,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> Tensor:
    """Draw samples.

    Args:
        diffusion: the model; its network runs in evaluation mode, without gradients, on the device it is on.
        n: number of samples.
        method: ``"ancestral"`` or ``"ddim"``.
        steps: a respacing (see :meth:`~pyrodiff.schedules.Schedule.respace`): 50, ``"ddim50"``, ...; None: all T.
        seed: sample i depends on the seed and i alone, up to the network's rounding. None: drawn from torch's generator.
        last: ``"mean"``: x_0 is the decoder's mean, off the grid of discrete data; ``"sample"``: a draw from the decoder.
        eta: share of the noise that DDIM keeps, in [0, 1].
        batch_size: examples per network call.
        progress: show a progress bar after two seconds.
        cond: passed to the network: a row per sample, or values without batch dim for all.

    Returns:
        ``[n, *event]`` in model units.

    Raises:
        OptionError: an option outside its set.
    """
    states = _walk(diffusion, n, method, steps, seed, last, eta, batch_size, progress, cond)
    batches: list[Tensor] = []
    for first_of_batch, x in states:
        if first_of_batch:
            batches.append(x)
        else:
            batches[-1] = x
    return torch.cat(batches)


def trajectory(
    diffusion: GaussianDiffusion,
    n: int,
    method: str = "ancestral",
    steps: str | int | Sequence[int] | None = None,
    seed: int | None = None,
    last: str = "mean",
    *,
    eta: float = 0.0,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> Tensor:
    """The whole path of each sample, x_T, ..., x_0: ``[K + 1, n, *event]``; the last is what :func:`sample` returns."""
    batches: list[list[Tensor]] = []
    for first_of_batch, x in _walk(diffusion, n, method, steps, seed, last, eta, batch_size, progress, cond):
        if first_of_batch:
            batches.append([])
        batches[-1].append(x)
    return torch.cat([torch.stack(path) for path in batches], dim=1)


def _walk(
    diffusion: GaussianDiffusion,
    n: int,
    method: str,
    steps: str | int | Sequence[int] | None,
    seed: int | None,
    last: str,
    eta: float,
    batch_size: int,
    progress: bool,
    cond: dict[str, Tensor],
) -> Iterator[tuple[bool, Tensor]]:
    """Yields the states of each batch in turn, noisiest first, and whether a state is the first of its batch."""
    check_option("method", method, METHODS)
    check_option("last", last, ("mean", "sample"))
    if n < 1 or batch_size < 1:
        raise OptionError(f"n={n!r} and batch_size={batch_size!r} must be at least 1")
    if not 0 <= eta <= 1:
        raise OptionError(f"eta={eta!r} is not in [0, 1]")
    cond = {k: torch.as_tensor(v) if isinstance(v, int | float | Sequence | np.ndarray) else v for k, v in cond.items()}
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    p = diffusion.reverse_kernel if steps is None else diffusion.reverse_kernel.respace(steps)
    like = next(diffusion.net.parameters(), torch.zeros(()))
    length = p.schedule.steps
    batches = range(0, n, batch_size)
    bar = tqdm(
        total=length * len(batches),
        desc="sampling",
        unit="step",
        delay=2,
        disable=not progress,
        dynamic_ncols=True,
        leave=False,
    )
    with diffusion.evaluating(), torch.no_grad(), bar:
        for first in batches:
            indices = range(first, min(first + batch_size, n))
            rows = slice(first, first + len(indices))
            part = {
                k: v.to(like.device) if isinstance(v, Tensor) else v for k, v in take_rows(p.net, cond, rows, n).items()
            }
            noises = _noise(seed, indices, length + 1, diffusion.event_shape, like)
            x = next(noises)
            yield True, x
            for t, noise in zip(range(length, 1, -1), noises, strict=False):
                x = METHODS[method](p, x, t, noise, eta, part)
                yield False, x
                bar.update()
            law = p(x, 1, **part)
            x = law.mean
            if last == "sample":
                x = x + law.stddev * next(noises)
                if p.bins is not None:
                    x = p.law_of_x_0(law.mean, law.stddev, 0).snap(x)
            yield False, x
            bar.update()


def _noise(seed: int, indices: range, length: int, event_shape: torch.Size, like: Tensor) -> Iterator[Tensor]:
    """``length`` tensors ``[n, *event]`` of standard normal noise, each example from its own stream."""
    # torch's CPU generator keeps 32 bits of a seed: among 100,000 examples two would be twins. numpy's keep all.
    streams = [np.random.default_rng([seed % 2**64, i]) for i in indices]
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    size = max(1, 2**16 // max(1, event_shape.numel()))  # steps drawn at once: few calls, little memory
    for first in range(0, length, size):
        shape = (min(size, length - first), *event_shape)
        block = np.stack([stream.standard_normal(shape, dtype=dtype) for stream in streams], axis=1)
        yield from torch.from_numpy(block).to(like)
