r"""Samplers: from noise to data along the reverse chain, or along some of its steps.

A sampler is one step, :math:`(x_t, t) \to x_s`; the loop, the noise and the last step are shared. The noise of example i is a
stream of its own, made of the seed and i, so that it is the same whatever the batch size or the device.

**The probability flow.** Where :math:`\hat x_0(x_t) = E[x_0 \mid x_t]`, the states of the chain have the law of a deterministic
flow, in the coordinates :math:`\bar x = x_t / \alpha_t` and :math:`\bar\sigma = \sigma_t / \alpha_t`

.. math:: \frac{d \bar x}{d \bar\sigma} = \frac{\bar x - \hat x_0}{\bar\sigma},

which ``"ddim"`` integrates to first order in the spacing of the steps, ``"dpm++2m"`` to second at the same cost, and ``"heun"``
to second with two network calls for a step.

**The last step.** x_0 is by default the mean of the Normal behind the decoder, as in guided-diffusion, whose last step adds
no noise; with bins it lies off the grid, and may lie a little outside of it. ``last="sample"`` draws from that Normal instead,
rounded to the grid, as the Pyro program, ``poutine.uncondition(diffusion.model)``, and ``Predictive`` always do.

**Guidance** changes what the network says: :math:`\hat x_0`, by two calls, with and without its conditioning; or, by the gradient
of a classifier's log p(y | x_t), the mean of :math:`p(x_s \mid x_t)` (``"ancestral"``), or the score and so :math:`\hat x_0`.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), algorithm 2. https://arxiv.org/abs/2006.11239
    Denoising Diffusion Implicit Models (Song et al., 2020), eq. 12, 16; section 4.3 (inversion). https://arxiv.org/abs/2010.02502
    DPM-Solver++ (Lu et al., 2022), algorithm 2 and section 5 (2M, SDE form). https://arxiv.org/abs/2211.01095
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), algorithm 1 (Heun).
    https://arxiv.org/abs/2206.00364
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), algorithms 1, 2. https://arxiv.org/abs/2105.05233
    Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), eq. 6. https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from tqdm.auto import tqdm

from ._tensor import append_dims, check_event, take_rows
from .diffusion import GaussianDiffusion
from .distributions import Gaussian
from .errors import OptionError, ShapeError, check_option
from .forward import ForwardProcess
from .reverse import Prediction, ReverseKernel
from .schedules import RespacedSchedule

__all__ = ["METHODS", "ancestral", "ddim", "dpm_2m", "heun", "invert", "sample", "trajectory"]

Classifier = Callable[..., Tensor]
"""``log_prob(x_t, t, **told)``: log p(y | x_t) up to a constant, ``[B]``, for states ``[B, *event]`` at steps ``[B]``."""


class Guided:
    """A reverse kernel under guidance, which samplers take as one: its law's mean is guided, or its x0_hat.

    Args:
        kernel: without guidance.
        scale: of classifier-free guidance.
        classifier: None, or log p(y | x_t), told all it needs but x_t and t.
        own_t: the step that the classifier is told at t = 1, 2, ...
    """

    def __init__(
        self, kernel: ReverseKernel, scale: float, classifier: Classifier | None, own_t: Sequence[int]
    ) -> None:
        self.kernel, self.forward_process = kernel, kernel.forward_process
        self.scale, self.classifier, self.own_t = scale, classifier, own_t
        self.null: dict[str, Any] = getattr(kernel.net, "null_cond", None) or {}
        if scale != 1 and not self.null:
            name = type(kernel.net).__name__
            raise OptionError(
                f"guidance_scale={scale!r} needs a network with a null class, its null_cond; {name} has none"
            )

    def __call__(self, x_t: Tensor, t: int, **cond: Any) -> TorchDistribution:
        """The law of x_{t-1}; to its mean a classifier adds variance times gradient (0 for ``"fixed_small"`` at t = 1)."""
        law = self.kernel.law(self._predict(x_t, t, cond), x_t, t)
        gradient = self._gradient(x_t, t)
        if gradient is None:
            return law
        small = self.forward_process.posterior_terms(x_t, t)[3].to(law.mean)
        variance = small if self.kernel.variance == "fixed_small" else law.variance
        return Gaussian(law.mean + variance * gradient, law.stddev)

    def denoise(self, x_t: Tensor, t: int, **cond: Any) -> Tensor:
        """The estimate of x_0 from a score to which a classifier's gradient is added (by Tweedie's formula)."""
        x0_hat = self.kernel.clipped(self._predict(x_t, t, cond).x0_hat)
        gradient = self._gradient(x_t, t)
        if gradient is None:
            return x0_hat
        alpha, sigma = _scales(self.forward_process, x_t, t)
        return x0_hat + (sigma**2 / alpha).to(x0_hat) * gradient

    def _predict(self, x_t: Tensor, t: int, cond: dict[str, Any]) -> Prediction:
        if self.scale == 1:
            return self.kernel.predict(x_t, t, **cond)
        if missing := [name for name in self.null if name not in cond]:
            raise OptionError(f"guidance_scale={self.scale!r} guides towards {missing[0]}, which is not given")
        null = {name: torch.as_tensor(value).to(cond[name]).expand_as(cond[name]) for name, value in self.null.items()}
        # Every coordinate is affine in x0_hat with what both calls share: guiding eps or v is the same.
        given, free = self.kernel.predict(x_t, t, **cond), self.kernel.predict(x_t, t, **(cond | null))
        mean = None if given.mean is None or free.mean is None else torch.lerp(free.mean, given.mean, self.scale)
        return given._replace(x0_hat=torch.lerp(free.x0_hat, given.x0_hat, self.scale), mean=mean)

    def _gradient(self, x_t: Tensor, t: int) -> Tensor | None:
        if self.classifier is None:
            return None
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            steps = torch.full((len(x),), self.own_t[t - 1], device=x.device)
            log_prob = self.classifier(x, steps)
            if log_prob.shape != steps.shape:
                raise ShapeError(f"classifier returns shape {list(log_prob.shape)}, not one value for each of {len(x)}")
            return torch.autograd.grad(log_prob.sum(), x)[0]


Kernel = ReverseKernel | Guided
Step = Callable[[Kernel, Tensor, int, Tensor, float, dict[str, Any]], Tensor]


# ---------------------------------------------------------------------- the methods: x_s from x_t, s = t - 1


def ancestral(p: Kernel, x_t: Tensor, t: int, noise: Tensor, eta: float, cond: dict[str, Any]) -> Tensor:
    r"""A draw from :math:`p(x_{t-1} \mid x_t)`: DDPM's algorithm 2, line 4 (``eta`` is not used)."""
    law = p(x_t, t, **cond)
    return law.mean + law.stddev * noise


def ddim(p: Kernel, x_t: Tensor, t: int, noise: Tensor, eta: float, cond: dict[str, Any]) -> Tensor:
    r"""DDIM eq. 12: keep the noise that :math:`\hat x_0` implies, but for a share eta of the posterior's variance.

    eta = 0 is deterministic, and the flow's first-order solver; eta = 1 has the posterior's variance, which is
    ``"fixed_small"``.
    """
    return _keep_noise(p, x_t, t, t - 1, p.denoise(x_t, t, **cond), noise, eta)


def dpm_2m() -> Step:
    r"""DPM-Solver++(2M): DDIM's step from :math:`\hat x_0` extrapolated, linearly in log-SNR, to the middle of the step.

    eta = 0 solves the flow; eta = 1 the reverse SDE (SDE-DPM-Solver++), in law. The first step is DDIM's. Returns the step
    of one walk, which remembers the last :math:`\hat x_0`.
    """
    before: Tensor | None = None

    def step(p: Kernel, x_t: Tensor, t: int, noise: Tensor, eta: float, cond: dict[str, Any]) -> Tensor:
        nonlocal before
        x0_hat = middle = p.denoise(x_t, t, **cond)
        if before is not None:
            earlier, now, later = (_log_snr(p.forward_process, x_t, u) for u in (t + 1, t, t - 1))
            middle = x0_hat + ((later - now) / (2 * (now - earlier))).to(x_t) * (x0_hat - before)
        before = x0_hat
        return _keep_noise(p, x_t, t, t - 1, middle, noise, eta)

    return step


def heun(p: Kernel, x_t: Tensor, t: int, noise: Tensor, eta: float, cond: dict[str, Any]) -> Tensor:
    r"""Heun's method in :math:`x_t / \alpha_t` as a function of :math:`\sigma_t / \alpha_t`: EDM's algorithm 1, second order.

    Two network calls for a step but the last, which is the denoiser (``eta`` and the noise are not used).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (_scales(p.forward_process, x_t, u) for u in (t, t - 1))
    noise_t, noise_s = sigma_t / alpha_t, sigma_s / alpha_s
    x, length = x_t / alpha_t.to(x_t), (noise_s - noise_t).to(x_t)
    slope = (x - p.denoise(x_t, t, **cond)) / noise_t.to(x)
    ahead = x + length * slope  # Euler's step, which is DDIM's
    slope_ahead = (ahead - p.denoise(alpha_s.to(x) * ahead, t - 1, **cond)) / noise_s.to(x)
    return alpha_s.to(x) * (x + length * (slope + slope_ahead) / 2)


def _keep_noise(p: Kernel, x_t: Tensor, t: int, s: int, x0_hat: Tensor, noise: Tensor | float, eta: float) -> Tensor:
    """x_s of DDIM's eq. 12; without eta s may be later than t too."""
    q = p.forward_process
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(q, x_t, t), _scales(q, x_t, s)
    std = eta * q.posterior_terms(x_t, t)[3].sqrt()
    eps_hat = (x_t - alpha_t.to(x_t) * x0_hat) / sigma_t.to(x_t)
    return alpha_s.to(x_t) * x0_hat + (sigma_s**2 - std**2).sqrt().to(x_t) * eps_hat + std.to(x_t) * noise


def _log_snr(q: ForwardProcess, x: Tensor, t: int) -> Tensor:
    """Log-SNR at t, float64, shaped to broadcast over ``x``."""
    event_dim = x.dim() if q.event_dim is None else q.event_dim
    return append_dims(q.schedule.log_snr(torch.as_tensor(t, device=x.device)), event_dim - q.schedule.event_dim)


def _scales(q: ForwardProcess, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Alpha and sigma at t, float64, shaped to broadcast over ``x``."""
    log_snr = _log_snr(q, x, t)
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


METHODS: dict[str, Callable[[], Step]] = {
    "ancestral": lambda: ancestral,
    "ddim": lambda: ddim,
    "dpm++2m": dpm_2m,
    "heun": lambda: heun,
}
_WITH_ETA = ("ddim", "dpm++2m")


# ---------------------------------------------------------------------- drawing


def sample(
    diffusion: GaussianDiffusion,
    n: int,
    method: str = "ancestral",
    steps: str | int | Sequence[int] | None = None,
    seed: int | None = None,
    last: str = "mean",
    *,
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    classifier: Classifier | None = None,
    classifier_cond: dict[str, Any] | None = None,
    x_T: Tensor | None = None,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> Tensor:
    """Draw samples.

    Args:
        diffusion: the model; its network runs in evaluation mode, without gradients, on the device it is on.
        n: number of samples.
        method: ``"ancestral"``, ``"ddim"``, ``"dpm++2m"`` or ``"heun"``.
        steps: a respacing (see :meth:`~pyrodiff.schedules.Schedule.respace`): 50, ``"ddim50"``, ...; None: all T.
        seed: sample i depends on the seed and i alone, up to the network's rounding. None: drawn from torch's generator.
        last: ``"mean"``: x_0 is the decoder's mean, off the grid of discrete data; ``"sample"``: a draw from the decoder
            (from the Normal behind it, rounded, whatever the approximation of its CDF).
        eta: share of the noise that ``"ddim"`` and ``"dpm++2m"`` keep, in [0, 1]; 1 is DPM-Solver++'s SDE form.
        guidance_scale: w of classifier-free guidance, x0_hat without conditioning plus w times what conditioning changes; 1
            is none. The network's attribute ``null_cond`` says what it was shown in training where it should know nothing,
            such as ``{"y": 10}``: a class label kept for that.
        classifier: ``log_prob(x_t, t, **classifier_cond)``, log p(y | x_t) of each of B states, ``[B]``, whose gradient guides
            the sampler, such as :meth:`~pyrodiff.NoisyClassifier.log_prob`; ``t`` ``[B]`` counts the diffusion's own steps,
            whatever the respacing. Times w for a guidance scale w.
        classifier_cond: what the classifier is told, as ``cond``; None: ``cond`` itself.
        x_T: ``[n, *event]``, where to start instead of at noise, such as what :func:`invert` returns.
        batch_size: examples per network call.
        progress: show a progress bar after two seconds.
        cond: passed to the network: a row per sample, or values without batch dim for all.

    Returns:
        ``[n, *event]`` in model units.

    Raises:
        OptionError: an option outside its set; guidance that the network has no null conditioning for.
        ShapeError: ``x_T``, ``cond`` or what the classifier returns has another shape.
    """
    ends = _walk(
        lambda path: deque(path, maxlen=1)[0], diffusion, n, method, steps, seed, last, eta=eta, guidance_scale=guidance_scale,
        classifier=classifier, classifier_cond=classifier_cond, x_T=x_T, batch_size=batch_size, progress=progress, **cond,
    )  # fmt: skip
    return torch.cat(ends)


def trajectory(diffusion: GaussianDiffusion, n: int, *args: Any, **options: Any) -> Tensor:
    """The whole path of each sample, x_T, ..., x_0: ``[K + 1, n, *event]``; arguments of :func:`sample`, which returns the last."""
    return torch.cat(_walk(lambda path: torch.stack(list(path)), diffusion, n, *args, **options), dim=1)


def invert(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    steps: str | int | Sequence[int] | None = None,
    *,
    batch_size: int = 256,
    **cond: Tensor,
) -> Tensor:
    """DDIM run backwards: the noise that ``sample(..., method="ddim", x_T=...)`` turns into ``x0``, to first order.

    ``x0`` is put in the place of x_1, whose noise is the least that the network knows, as from index 0 of
    guided-diffusion's ``ddim_reverse_sample``; each step then keeps the noise that x0_hat implies at the step's own start.

    Args:
        diffusion: the model.
        x0: data, ``[N, *event]``.
        steps: see :func:`sample`; take the same there.
        batch_size: examples per network call.
        cond: passed to the network, a row per example, or values without batch dim for all.

    Returns:
        x_T, ``[N, *event]``.
    """
    check_event("x0", x0, diffusion.event_shape)
    p = diffusion.reverse_kernel if steps is None else diffusion.reverse_kernel.respace(steps)
    found = []
    with diffusion.evaluating(), torch.no_grad():
        for rows in torch.arange(len(x0), device=x0.device).split(batch_size):
            part, x_t = take_rows(p.net, cond, rows, len(x0)), x0[rows]
            for t in range(1, p.schedule.steps):
                x_t = _keep_noise(p, x_t, t, t + 1, p.denoise(x_t, t, **part), 0.0, 0.0)
            found.append(x_t)
    return torch.cat(found)


def _walk(
    keep: Callable[[Iterator[Tensor]], Tensor],
    diffusion: GaussianDiffusion,
    n: int,
    method: str = "ancestral",
    steps: str | int | Sequence[int] | None = None,
    seed: int | None = None,
    last: str = "mean",
    *,
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    classifier: Classifier | None = None,
    classifier_cond: dict[str, Any] | None = None,
    x_T: Tensor | None = None,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Any,
) -> list[Tensor]:
    """What ``keep`` makes of the path of each batch, x_T, ..., x_0."""
    check_option("method", method, METHODS)
    check_option("last", last, ("mean", "sample"))
    if n < 1 or batch_size < 1:
        raise OptionError(f"n={n!r} and batch_size={batch_size!r} must be at least 1")
    if not 0 <= eta <= 1:
        raise OptionError(f"eta={eta!r} is not in [0, 1]")
    if eta and method not in _WITH_ETA:
        raise OptionError(f"eta={eta!r} belongs to {', '.join(map(repr, _WITH_ETA))}, not to method={method!r}")
    if x_T is not None and x_T.shape != (n, *diffusion.event_shape):
        raise ShapeError(f"x_T has shape {list(x_T.shape)}, not {[n, *diffusion.event_shape]}")
    if classifier is None and classifier_cond is not None:
        raise OptionError(f"classifier_cond={classifier_cond!r} is for a classifier, and there is none")
    told = cond if classifier_cond is None else classifier_cond
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    kernel = diffusion.reverse_kernel if steps is None else diffusion.reverse_kernel.respace(steps)
    like = next(diffusion.net.parameters(), torch.zeros(()))
    length = kernel.schedule.steps
    respaced = steps is not None and isinstance(kernel.schedule, RespacedSchedule)
    own_t = cast("RespacedSchedule", kernel.schedule).kept if respaced else range(1, length + 1)
    batches, kept = range(0, n, batch_size), []
    bar = tqdm(
        total=length * len(batches), desc="sampling", unit="step", delay=2, disable=not progress, dynamic_ncols=True,
        leave=False,
    )  # fmt: skip
    with diffusion.evaluating(), torch.no_grad(), bar:
        for first in batches:
            rows = slice(first, min(first + batch_size, n))
            given = _rows(kernel, cond, rows, n, like.device)
            p: Kernel = kernel
            if guidance_scale != 1 or classifier is not None:
                log_prob = classifier and partial(classifier, **_rows(kernel, told, rows, n, like.device))
                p = Guided(kernel, guidance_scale, log_prob, own_t)
            noises = _noise(seed, range(n)[rows], length + 1, diffusion.event_shape, like)
            x = next(noises)
            start = x if x_T is None else x_T[rows].to(x)
            kept.append(keep(_path(p, kernel, method, start, noises, eta, last, given, bar)))
    return kept


def _rows(kernel: ReverseKernel, cond: dict[str, Any], rows: slice, n: int, device: torch.device) -> dict[str, Any]:
    """A batch's part of conditioning values, which may be numbers or sequences, on the device."""
    cond = {k: torch.as_tensor(v) if isinstance(v, int | float | Sequence | np.ndarray) else v for k, v in cond.items()}
    taken = take_rows(kernel.net, cond, rows, n)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in taken.items()}


def _path(
    p: Kernel, kernel: ReverseKernel, method: str, x: Tensor, noises: Iterator[Tensor], eta: float, last: str,
    cond: dict[str, Any], bar: tqdm[NoReturn],
) -> Iterator[Tensor]:  # fmt: skip
    """The states of a batch."""
    yield x
    step = METHODS[method]()
    for t, noise in zip(range(kernel.schedule.steps, 1, -1), noises, strict=False):
        x = step(p, x, t, noise, eta, cond)
        yield x
        bar.update()
    if last == "sample" or method == "ancestral":
        law = p(x, 1, **cond)
    x = law.mean if method == "ancestral" else p.denoise(x, 1, **cond)
    if last == "sample":
        x = x + law.stddev * next(noises)
        if kernel.bins is not None:
            x = kernel.law_of_x_0(law.mean, law.stddev, 0).snap(x)
    yield x
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
