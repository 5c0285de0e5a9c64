r"""A classifier of noisy examples, :math:`p(y \mid x_t)`, as two Pyro programs: what classifier guidance asks.

::

    guide:  x_t ~ q(x_t | x_0)
    model:  y ~ Categorical(net(x_t, log_snr_t)), observed

With a timestep per example the ELBO of this pair is minus the cross-entropy at that timestep: x_t is masked out in both, as in a
diffusion's one-timestep programs, and :func:`~pyrodiff.fit` trains it as it trains a diffusion.

References:
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), section 4. https://arxiv.org/abs/2105.05233
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from ._tensor import check_event, in_parts, to_network
from .diffusion import GaussianDiffusion, Program, register
from .elbo import Estimate
from .errors import DataError, OptionError, ProgramError
from .forward import ForwardProcess
from .schedules import Schedule

__all__ = ["NoisyClassifier"]


class NoisyClassifier(nn.Module):
    r"""A classifier of noisy examples: :attr:`model` and :attr:`guide`, two Pyro programs.

    Both have the signature ``(x0, t, *, weight=None, y)``: data ``[B, *event]``, steps 1..T ``[B]``, 1 / p(t) ``[B]`` (default T, for
    uniform t) and class labels ``[B]``. Minus their ELBO is the cross-entropy in nats, its mean over timesteps: the site ``y`` has
    the scale ``weight`` / T.

    Args:
        net: ``net(x, log_snr)``, logits ``[N, classes]`` for x ``[N, *event]`` and log_snr ``[N]``; such as
            :class:`pyrodiff.nets.Classifier`.
        schedule: the noise schedule of the diffusion that it is to guide; a learned one is taken as it is now, and not trained:
            a cross-entropy would fall by leaving out noise.
        event_shape: shape of one example.

    Example:
        >>> classifier = NoisyClassifier(pyrodiff.nets.Classifier(1, classes=10), diffusion.schedule, (1, 8, 8))
        >>> fit(classifier, images, cond={"y": labels})
        >>> sample(diffusion, 64, classifier=classifier.log_prob, classifier_cond={"y": 3})
    """

    objective = "cross_entropy"
    data_size = None
    name = ""

    def __init__(self, net: nn.Module, schedule: Schedule, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.event_shape = torch.Size(event_shape)
        frozen = copy.deepcopy(schedule).requires_grad_(False)
        self.forward_process = ForwardProcess(frozen, len(self.event_shape))
        # Not children: their parameters are this module's, and a state dict should hold each once.
        self.__dict__.update(model=Model(self), guide=Guide(self))

    model: Model
    guide: Guide

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "schedule" or (name == "forward_process" and name in self._modules):
            raise ProgramError(f"{name} cannot be exchanged: make a new NoisyClassifier around the network")
        super().__setattr__(name, value)
        if name == "net" and "model" in self.__dict__:
            self.model.net = value

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.forward_process.schedule

    @property
    def steps(self) -> int:
        """Number of steps T; a classifier has no continuous time."""
        return self.schedule.length

    evaluating = GaussianDiffusion.evaluating

    @property
    def config(self) -> dict[str, object]:
        """Constructor arguments but for the network, as JSON-able values."""
        return {"schedule": self.schedule.config, "event_shape": list(self.event_shape)}

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.Categorical:
        r"""The law :math:`p(y \mid x_t)`.

        Args:
            x_t: ``[*batch, *event]``.
            t: step(s) in 1..T, broadcasting with ``batch``.
        """
        check_event("x_t", x_t, self.event_shape)
        batch = x_t.shape[: x_t.dim() - len(self.event_shape)]
        log_snr = self.schedule.log_snr(torch.as_tensor(t, device=x_t.device).expand(batch)).to(x_t.dtype)
        if self.schedule.event_dim:  # a schedule per element: the network sees its mean
            log_snr = log_snr.flatten(-self.schedule.event_dim).mean(-1)
        x, log_snr = x_t.reshape(-1, *self.event_shape), log_snr.reshape(-1)
        if torch.is_grad_enabled() or self.net.training:
            logits = self.net(x, log_snr)
        else:
            logits, _ = in_parts(lambda rows: self.net(x[rows], log_snr[rows]), len(x))
        return dist.Categorical(logits=logits.to(x_t.dtype).reshape(*batch, -1))

    def log_prob(self, x_t: Tensor, t: int | Tensor, y: Tensor) -> Tensor:
        """Log p(y | x_t), nats, ``[*batch]``: what :func:`~pyrodiff.sample` takes as its ``classifier``; see :meth:`forward`.

        The network is in evaluation mode. ``t`` is a step of this classifier's schedule, which must be the diffusion's.
        """
        with self.evaluating():
            return self(x_t, t).log_prob(y)

    def check_labels(self, name: str, y: Tensor, n: int) -> None:
        """Raise :class:`~pyrodiff.errors.DataError` unless ``y`` holds a class for each of ``n`` examples."""
        if not isinstance(y, Tensor) or y.shape != (n,) or y.is_floating_point() or y.dtype == torch.bool:
            kind = f"{y.dtype} of shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise DataError(f"the labels y of {name} are {kind}, not integers of shape [{n}]")
        config = getattr(self.net, "config", None)
        classes = config.get("classes") if isinstance(config, dict) else None
        if n and (y.min() < 0 or (classes is not None and y.max() >= classes)):
            raise DataError(
                f"the labels y of {name} are in {int(y.min())}..{int(y.max())}, not in 0..{(classes or 0) - 1}"
            )

    @torch.no_grad()
    def score(
        self, x0: Tensor, y: Tensor, count: int = 8, *, repeats: int = 2, batch_size: int = 256
    ) -> tuple[Estimate, float]:
        """Cross-entropy and accuracy on noisy examples, over all timesteps.

        Args:
            x0: data, ``[B, *event]``.
            y: class labels, ``[B]``.
            count: timesteps per example and repeat, stratified over 1..T.
            repeats: independent repeats, for the standard error over noise.
            batch_size: examples per network call.

        Returns:
            The cross-entropy in nats per example, with its standard errors; and the share of right guesses.
        """
        self.check_labels("x0", y, len(x0))
        if count < 1 or repeats < 1 or batch_size < 1:
            raise OptionError(f"count={count!r}, repeats={repeats!r} and batch_size={batch_size!r} must be at least 1")
        x0, labels = to_network(self.net, x0, {"y": y})
        y, found, right = labels["y"], [], 0
        with self.evaluating():
            for _ in range(repeats):
                rows = []
                for x0_part, y_part in zip(x0.split(batch_size), y.split(batch_size), strict=True):
                    strata = (
                        (torch.rand(len(x0_part), count, device="cpu") + torch.arange(count, device="cpu"))
                        / count
                        * self.steps
                    )
                    costs = []
                    for t in (strata.long().clamp(max=self.steps - 1) + 1).T.to(x0.device):
                        law = self(self.forward_process.marginal(x0_part, t).sample(), t)
                        costs.append(-law.log_prob(y_part).double().cpu())
                        right += int((law.logits.argmax(-1) == y_part).sum())
                    rows.append(torch.stack(costs).mean(0))
                found.append(torch.cat(rows))
        return Estimate.of(torch.stack(found)), right / (repeats * count * len(x0))


class Model(Program):
    """See :class:`NoisyClassifier`. Returns y."""

    def __init__(self, classifier: NoisyClassifier) -> None:
        super().__init__(cast(GaussianDiffusion, classifier))
        self.net, self.forward_process = classifier.net, classifier.forward_process

    def forward(self, x0: Tensor, t: Tensor, *, weight: Tensor | float | None = None, y: Tensor) -> Tensor:
        """Runs the program."""
        register(self.diffusion, self)
        classifier = cast(NoisyClassifier, self.diffusion)
        with self._plate(self._batch(x0, {})):
            x0, t, weight = self._one_step(x0, t, weight)
            x_t = pyro.sample(self._site("t"), self._q.prior(x0.shape, x0).mask(False))
            self._check_batch(t, x_t)
            with poutine.scale(scale=weight / classifier.steps):
                return pyro.sample("y", classifier(x_t, t), obs=y)


class Guide(Program):
    """See :class:`NoisyClassifier`. Returns x_t."""

    def __init__(self, classifier: NoisyClassifier) -> None:
        super().__init__(cast(GaussianDiffusion, classifier))
        self.forward_process = classifier.forward_process

    def forward(self, x0: Tensor, t: Tensor, *, weight: Tensor | float | None = None, y: Tensor) -> Tensor:
        """Runs the program."""
        register(self.diffusion, self)
        with self._plate(self._batch(x0, {})):
            x0, t, _ = self._one_step(x0, t, weight)
            return pyro.sample(self._site("t"), self._q.marginal(x0, t).mask(False))
