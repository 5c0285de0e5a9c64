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

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from ._tensor import append_dims, check_event, like_of, take_rows, to_network
from .diffusion import GaussianDiffusion
from .distributions import Gaussian
from .errors import OptionError, ShapeError, check_option
from .forward import ForwardProcess
from .reverse import Prediction, ReverseKernel
from .schedules import RespacedSchedule

__all__ = [
    "METHODS",
    "Move",
    "ancestral",
    "ddim",
    "dpm_2m",
    "heun",
    "invert",
    "rsample",
    "sample",
    "step_log_probs",
    "trajectory",
]

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
        law = self.kernel.law(self.predictions(x_t, t, cond)[1], x_t, t)
        gradient = self._gradient(x_t, t)
        if gradient is None:
            return law
        small = self.forward_process.posterior_terms(x_t, t)[3].to(law.mean)
        variance = small if self.kernel.variance == "fixed_small" else law.variance
        return Gaussian(law.mean + variance * gradient, law.stddev)

    def denoise(self, x_t: Tensor, t: int, **cond: Any) -> Tensor:
        """The estimate of x_0 from a score to which a classifier's gradient is added (by Tweedie's formula)."""
        x0_hat = self.kernel.clipped(self.predictions(x_t, t, cond)[1].x0_hat)
        gradient = self._gradient(x_t, t)
        if gradient is None:
            return x0_hat
        alpha, sigma = _scales(self.forward_process, x_t, t)
        return x0_hat + (sigma**2 / alpha).to(x0_hat) * gradient

    def predictions(self, x_t: Tensor, t: int, cond: dict[str, Any]) -> tuple[Prediction, Prediction]:
        """What the network says given ``cond``, and what classifier-free guidance makes of it: one call or, guided, two."""
        if self.scale == 1:
            given = self.kernel.predict(x_t, t, **cond)
            return given, given
        if missing := [name for name in self.null if name not in cond]:
            raise OptionError(f"guidance_scale={self.scale!r} guides towards {missing[0]}, which is not given")
        null = {name: torch.as_tensor(value).to(cond[name]).expand_as(cond[name]) for name, value in self.null.items()}
        # Every coordinate is affine in x0_hat with what both calls share: guiding eps or v is the same.
        given, free = self.kernel.predict(x_t, t, **cond), self.kernel.predict(x_t, t, **(cond | null))
        mean = None if given.mean is None or free.mean is None else torch.lerp(free.mean, given.mean, self.scale)
        return given, given._replace(x0_hat=torch.lerp(free.x0_hat, given.x0_hat, self.scale), mean=mean)

    def _gradient(self, x_t: Tensor, t: int) -> Tensor | None:
        if self.classifier is None:
            return None
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x_t if differentiable and x_t.requires_grad else x_t.detach().requires_grad_()
            steps = torch.full((len(x),), self.own_t[t - 1], device=x.device)
            log_prob = self.classifier(x, steps)
            if log_prob.shape != steps.shape:
                raise ShapeError(f"classifier returns shape {list(log_prob.shape)}, not one value for each of {len(x)}")
            return torch.autograd.grad(log_prob.sum(), x, create_graph=differentiable)[0]


Kernel = ReverseKernel | Guided


class Move(NamedTuple):
    """The law of x_s given x_t, and what the next step may want to know.

    Attributes:
        mean: ``[B, *event]``.
        std: its standard deviation, which broadcasts to the mean's shape; 0 where the step is deterministic.
        x0_hat: the estimate of x_0 at x_t, of a method that looks back.
    """

    mean: Tensor
    std: Tensor
    x0_hat: Tensor | None = None


Step = Callable[[Kernel, Tensor, int, Tensor | None, float, dict[str, Any]], Move]
"""``step(p, x_t, t, before, eta, cond)``; ``before`` is the last step's x0_hat."""


# ---------------------------------------------------------------------- the methods: x_s from x_t, s = t - 1


def ancestral(p: Kernel, x_t: Tensor, t: int, before: Tensor | None, eta: float, cond: dict[str, Any]) -> Move:
    r"""The law :math:`p(x_{t-1} \mid x_t)`: DDPM's algorithm 2, line 4 (``eta`` is not used)."""
    law = p(x_t, t, **cond)
    return Move(law.mean, law.stddev)


def ddim(p: Kernel, x_t: Tensor, t: int, before: Tensor | None, eta: float, cond: dict[str, Any]) -> Move:
    r"""DDIM eq. 12: keep the noise that :math:`\hat x_0` implies, but for a share eta of the posterior's variance.

    eta = 0 is deterministic, and the flow's first-order solver; eta = 1 has the posterior's variance, which is
    ``"fixed_small"``.
    """
    return _keep_noise(p, x_t, t, t - 1, p.denoise(x_t, t, **cond), eta)


def dpm_2m(p: Kernel, x_t: Tensor, t: int, before: Tensor | None, eta: float, cond: dict[str, Any]) -> Move:
    r"""DPM-Solver++(2M): DDIM's step from :math:`\hat x_0` extrapolated, linearly in log-SNR, to the middle of the step.

    eta = 0 solves the flow; eta = 1 the reverse SDE (SDE-DPM-Solver++), in law. The first step is DDIM's.
    """
    x0_hat = middle = p.denoise(x_t, t, **cond)
    if before is not None:
        earlier, now, later = (_log_snr(p.forward_process, x_t, u) for u in (t + 1, t, t - 1))
        middle = x0_hat + ((later - now) / (2 * (now - earlier))).to(x_t) * (x0_hat - before)
    return _keep_noise(p, x_t, t, t - 1, middle, eta)._replace(x0_hat=x0_hat)


def heun(p: Kernel, x_t: Tensor, t: int, before: Tensor | None, eta: float, cond: dict[str, Any]) -> Move:
    r"""Heun's method in :math:`x_t / \alpha_t` as a function of :math:`\sigma_t / \alpha_t`: EDM's algorithm 1, second order.

    Two network calls for a step but the last, which is the denoiser (``eta`` is not used). A first step from where alpha is next
    to 0, as at T of the cosine schedule, is a long one: leave that end out (``steps="ddim10"``).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (_scales(p.forward_process, x_t, u) for u in (t, t - 1))
    noise_t, noise_s = sigma_t / alpha_t, sigma_s / alpha_s
    x, length = x_t / alpha_t.to(x_t), (noise_s - noise_t).to(x_t)
    slope = (x - p.denoise(x_t, t, **cond)) / noise_t.to(x)
    ahead = x + length * slope  # Euler's step, which is DDIM's
    slope_ahead = (ahead - p.denoise(alpha_s.to(x) * ahead, t - 1, **cond)) / noise_s.to(x)
    return Move(alpha_s.to(x) * (x + length * (slope + slope_ahead) / 2), x.new_zeros(()))


def _keep_noise(p: Kernel, x_t: Tensor, t: int, s: int, x0_hat: Tensor, eta: float) -> Move:
    """DDIM's eq. 12; without eta s may be later than t too."""
    q = p.forward_process
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(q, x_t, t), _scales(q, x_t, s)
    std = eta * q.posterior_terms(x_t, t)[3].sqrt()
    eps_hat = (x_t - alpha_t.to(x_t) * x0_hat) / sigma_t.to(x_t)
    return Move(alpha_s.to(x_t) * x0_hat + (sigma_s**2 - std**2).sqrt().to(x_t) * eps_hat, std.to(x_t))


def _log_snr(q: ForwardProcess, x: Tensor, t: int) -> Tensor:
    """Log-SNR at t, float64, shaped to broadcast over ``x``."""
    event_dim = x.dim() if q.event_dim is None else q.event_dim
    return append_dims(q.schedule.log_snr(torch.as_tensor(t, device=x.device)), event_dim - q.schedule.event_dim)


def _scales(q: ForwardProcess, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Alpha and sigma at t, float64, shaped to broadcast over ``x``."""
    log_snr = _log_snr(q, x, t)
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


METHODS: dict[str, Step] = {"ancestral": ancestral, "ddim": ddim, "dpm++2m": dpm_2m, "heun": heun}
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
            the sampler, such as :meth:`~pyrodiff.NoisyClassifier.log_prob` of one with the same schedule; ``t`` ``[B]`` counts
            the diffusion's own steps, whatever the respacing. Times w for a guidance scale w.
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
    walks = _walks(
        diffusion, n, method, steps, seed, last, eta=eta, guidance_scale=guidance_scale, classifier=classifier,
        classifier_cond=classifier_cond, x_T=x_T, batch_size=batch_size, progress=progress, **cond,
    )  # fmt: skip
    with torch.no_grad():
        return torch.cat([deque(walk.path(), maxlen=1)[0] for walk in walks])


def trajectory(diffusion: GaussianDiffusion, n: int, *args: Any, **options: Any) -> Tensor:
    """The whole path of each sample, x_T, ..., x_0: ``[K + 1, n, *event]``; arguments of :func:`sample`, which returns the last."""
    with torch.no_grad():
        return torch.cat([torch.stack(list(walk.path())) for walk in _walks(diffusion, n, *args, **options)], dim=1)


def rsample(diffusion: GaussianDiffusion, n: int, *args: Any, **options: Any) -> Tensor:
    """:func:`sample` with gradients: with respect to the network, ``x_T``, ``cond``, a learned schedule or decoder.

    The same numbers at the same seed, which makes differences between two models, or two values of a parameter, those of
    common random numbers. The backward pass walks the chain again, in pieces of sqrt(T) steps: what is kept is 2 sqrt(T) states
    and one network call's activations, for three calls a step instead of one.

    Args:
        diffusion, n, args, options: of :func:`sample`.

    Returns:
        ``[n, *event]``, on the autograd graph.

    Raises:
        OptionError: also ``last="sample"`` with bins, which would round.
    """
    return torch.cat([walk.end() for walk in _walks(diffusion, n, *args, **options)])


def step_log_probs(diffusion: GaussianDiffusion, path: Tensor, *args: Any, **options: Any) -> Tensor:
    """Log-probability of every step of a path, given the state before it: what a policy gradient needs.

    A reverse chain is a policy whose action at x_t is x_s (Black et al., 2023, https://arxiv.org/abs/2305.13301); this is the
    log-density of its actions, differentiable with respect to the model that is asked, which need not be the one that drew them.
    The activations of one step are kept at a time.

    Args:
        diffusion: the model.
        path: x_T, ..., x_0, ``[K + 1, n, *event]``, such as :func:`trajectory` returns.
        args, options: those that the path was drawn with, of :func:`sample`, method first; seed, ``x_T`` and ``progress`` say nothing.

    Returns:
        Nats, ``[K, n]`` with ``last="sample"``: x_{K-1} given x_K, ..., x_0 given x_1 (with bins: of its level); ``[K - 1, n]``
        with ``last="mean"``, where the last step is deterministic.

    Raises:
        OptionError: a method whose steps are deterministic.
        ShapeError: the path has another number of states.
    """
    n, found = path.shape[1] if path.dim() > 1 else 1, []
    if len(args) < 3:  # method, steps, seed
        options["seed"] = 0  # nothing is drawn here: not a seed either, from torch's generator
    first = 0
    for walk in _walks(diffusion, n, *args, **options):
        check_event("path", path, diffusion.event_shape)
        if len(path) != walk.length + 1:
            raise ShapeError(f"path has {len(path)} states, and the chain {walk.length + 1}")
        found.append(walk.log_probs(path[:, first : first + len(walk.x)].to(walk.x)))
        first += len(walk.x)
    return torch.cat(found, dim=1)


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
        x0: data, ``[N, *event]``, on any device.
        steps: see :func:`sample`; take the same there.
        batch_size: examples per network call.
        cond: passed to the network, a row per example, or values without batch dim for all.

    Returns:
        x_T, ``[N, *event]``, on the network's device.
    """
    check_event("x0", x0, diffusion.event_shape)
    x0, cond = to_network(diffusion.net, x0, cond)
    p = diffusion.reverse_kernel if steps is None else diffusion.reverse_kernel.respace(steps)
    found = []
    with diffusion.evaluating(), torch.no_grad():
        for rows in torch.arange(len(x0), device=x0.device).split(batch_size):
            part, x_t = take_rows(p.net, cond, rows, len(x0)), x0[rows]
            for t in range(1, p.schedule.length):
                x_t = _keep_noise(p, x_t, t, t + 1, p.denoise(x_t, t, **part), 0.0).mean
            found.append(x_t)
    return torch.cat(found)


def _walks(
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
) -> Iterator[Walk]:
    """The walks of the batches, one after the other."""
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
        seed = int(torch.randint(2**62, (), device="cpu"))
    kernel = diffusion.reverse_kernel if steps is None else diffusion.reverse_kernel.respace(steps)
    like = like_of(diffusion.net)
    length = kernel.schedule.length
    respaced = steps is not None and isinstance(kernel.schedule, RespacedSchedule)
    own_t = cast("RespacedSchedule", kernel.schedule).kept if respaced else range(1, length + 1)
    batches = range(0, n, batch_size)
    bar = tqdm(
        total=length * len(batches), desc="sampling", unit="step", delay=2, disable=not progress, dynamic_ncols=True,
        leave=False,
    )  # fmt: skip
    with bar:
        for first in batches:
            rows = slice(first, min(first + batch_size, n))
            given = _rows(kernel, cond, rows, n, like.device)
            p: Kernel = kernel
            if guidance_scale != 1 or classifier is not None:
                log_prob = classifier and partial(classifier, **_rows(kernel, told, rows, n, like.device))
                p = Guided(kernel, guidance_scale, log_prob, own_t)
            # torch's CPU generator keeps 32 bits of a seed: among 100,000 examples two would be twins. numpy's keep all.
            streams = [np.random.default_rng([seed % 2**64, i]) for i in range(n)[rows]]
            x = next(_noise(streams, 1, diffusion.event_shape, like))
            start = x if x_T is None else x_T[rows].to(x)
            yield Walk(diffusion, p, kernel, METHODS[method], eta, last, given, start, streams, bar)


@dataclass
class Walk:
    """A batch on its way from x_T to x_0.

    Attributes:
        diffusion: whose network is evaluated.
        p: the kernel, perhaps guided.
        kernel: the kernel.
        step, eta, last, cond: of :func:`sample`.
        x: x_T.
        streams: a generator of noise for each example.
        bar: what shows the progress.
    """

    diffusion: GaussianDiffusion
    p: Kernel
    kernel: ReverseKernel
    step: Step
    eta: float
    last: str
    cond: dict[str, Any]
    x: Tensor
    streams: list[np.random.Generator]
    bar: tqdm[NoReturn]

    @property
    def length(self) -> int:
        """Number of steps."""
        return self.kernel.schedule.length

    def move(self, x_t: Tensor, t: int, before: Tensor | None) -> Move:
        """One step but the last."""
        with self.diffusion.evaluating():
            return self.step(self.p, x_t, t, before, self.eta, self.cond)

    def decode(self, x_1: Tensor) -> Move:
        """The last step, before any rounding; its standard deviation is 0 where the decoder's mean is asked for."""
        with self.diffusion.evaluating():
            guided, drawn = self.step is ancestral, self.last == "sample"
            law = self.p(x_1, 1, **self.cond) if guided or drawn else None
            mean = law.mean if law is not None and guided else self.p.denoise(x_1, 1, **self.cond)
            return Move(mean, law.stddev if law is not None and drawn else x_1.new_zeros(()))

    def path(self) -> Iterator[Tensor]:
        """The states x_T, ..., x_0."""
        noises = _noise(self.streams, self.length, self.diffusion.event_shape, self.x)
        x, before = self.x, None
        yield x
        for t in range(self.length, 1, -1):
            mean, std, before = self.move(x, t, before)
            x = mean + std * next(noises)
            yield x
            self.bar.update()
        mean, std, _ = self.decode(x)
        x = mean + std * next(noises)
        if self.last == "sample" and self.kernel.bins is not None:
            x = self.kernel.law_of_x_0(mean, std, 0).snap(x)
        yield x
        self.bar.update()

    def end(self) -> Tensor:
        """x_0 on the autograd graph; the chain is checkpointed in pieces of sqrt(T) steps, and these by step."""
        self._check_modes()
        if self.last == "sample" and self.kernel.bins is not None:
            raise OptionError('last="sample" with bins rounds to their grid, which has no gradient: take last="mean"')
        shape, size = self.diffusion.event_shape, math.isqrt(self.length) + 1
        x, before = self.x, None
        steps = range(self.length, 1, -1)
        for piece in (steps[i : i + size] for i in range(0, len(steps), size)):
            # The backward pass walks the piece again, with the same noise.
            streams = copy.deepcopy(self.streams)
            x, before = _checkpoint(self._walk, x, before, piece, streams)
            deque(_noise(self.streams, len(piece), shape, self.x), maxlen=0)
            self.bar.update(len(piece))
        mean, std, _ = _checkpoint(self.decode, x)
        return mean + std * next(_noise(self.streams, 1, shape, self.x))

    def _check_modes(self) -> None:
        net = self.kernel.net
        if torch.is_grad_enabled() and net.training and getattr(net, "checkpointing", False):
            raise OptionError(
                "a network with checkpointing=True walks its own way back in training mode: call .eval() first"
            )

    def _walk(
        self, x: Tensor, before: Tensor | None, steps: range, streams: list[np.random.Generator]
    ) -> tuple[Tensor, Tensor | None]:
        noises = _noise(copy.deepcopy(streams), len(steps), self.diffusion.event_shape, self.x)
        for t, noise in zip(steps, noises, strict=True):
            mean, std, before = _checkpoint(self.move, x, t, before)
            x = mean + std * noise
        return x, before

    def log_probs(self, path: Tensor) -> Tensor:
        """Of each step of a path ``[T + 1, B, *event]``: ``[T, B]``, or ``[T - 1, B]`` where the last step is deterministic."""
        self._check_modes()
        before, found = None, []
        event_dim = len(self.diffusion.event_shape)
        for x_t, x_s, t in zip(path, path[1:], range(self.length, 1, -1), strict=False):
            mean, std, before = _checkpoint(self.move, x_t, t, before)
            if not std.all():
                raise OptionError(
                    "steps without noise have no density: take ancestral, or ddim or dpm++2m with eta above 0"
                )
            found.append(Gaussian(mean, std.expand(mean.shape)).to_event(event_dim).log_prob(x_s))
            self.bar.update()
        if self.last == "sample":
            mean, std, _ = _checkpoint(self.decode, path[-2])
            found.append(self.kernel.law_of_x_0(mean, std.expand(mean.shape), event_dim).log_prob(path[-1]))
        return torch.stack(found) if found else self.x.new_zeros(0, len(self.x))


def _checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """The function's value, its activations computed again in the backward pass; it draws nothing from torch's generators."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _rows(kernel: ReverseKernel, cond: dict[str, Any], rows: slice, n: int, device: torch.device) -> dict[str, Any]:
    """A batch's part of conditioning values, which may be numbers or sequences, on the device."""
    cond = {k: torch.as_tensor(v) if isinstance(v, int | float | Sequence | np.ndarray) else v for k, v in cond.items()}
    taken = take_rows(kernel.net, cond, rows, n)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in taken.items()}


def _noise(streams: list[np.random.Generator], length: int, event_shape: torch.Size, like: Tensor) -> Iterator[Tensor]:
    """``length`` tensors ``[n, *event]`` of standard normal noise, each example from its own stream."""
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    size = max(1, 2**16 // max(1, event_shape.numel()))  # steps drawn at once: few calls, little memory
    for first in range(0, length, size):
        shape = (min(size, length - first), *event_shape)
        block = np.stack([stream.standard_normal(shape, dtype=dtype) for stream in streams], axis=1)
        yield from torch.from_numpy(block).to(like)
