r"""The ELBO ledger: every term of the bound, with its standard error; and ELBOs that refuse to be silently wrong.

.. math::

    -\log p(x_0) \le
    \underbrace{KL(q(x_T \mid x_0) \,\|\, p(x_T))}_{\text{prior}}
    + \sum_{t=2}^{T} \underbrace{E\, KL(q(x_{t-1} \mid x_t, x_0) \,\|\, p(x_{t-1} \mid x_t))}_{\text{diffusion}}
    \underbrace{-\, E \log p(x_0 \mid x_1)}_{\text{reconstruction}}

Terms are in nats per example, summed over the event; :func:`bits_per_dim` changes the unit, at the edge. In continuous time the
sum is :math:`\int_0^1 -\tfrac12 \frac{d\,\mathrm{SNR}}{dt} E|x_0 - \hat x_0|^2 dt`, and a column is its integrand at a t.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 5. https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), eq. 11. https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import pyro.distributions as dist
import pyro.infer
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import torch_item
from pyro.poutine import Trace
from pyro.poutine.util import is_validation_enabled, prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.kl import _KL_REGISTRY
from tqdm.auto import tqdm

from ._tensor import check_event, sum_event, take_rows, to_network
from .diffusion import PARTICLES, GaussianDiffusion
from .errors import OptionError, ProgramError, ShapeError, check_option
from .schedules import Schedule

__all__ = [
    "BitsPerDim",
    "ELBOTerms",
    "RenyiELBO",
    "TraceMeanField_ELBO",
    "bits_per_dim",
    "elbo_terms",
    "site_terms",
]

KLS = ("analytic", "monte_carlo")


@dataclass(frozen=True)
class ELBOTerms:
    r"""The terms of the bound for B examples, in nats; all three are costs, and add up to ``-elbo``.

    Attributes:
        kl: ``"analytic"`` or ``"monte_carlo"``: how the prior and diffusion terms were computed.
        dims: number of dims D of an example.
        t: the timesteps of the diffusion columns: int64 (float64 in continuous time) ``[C]``, or ``[B, C]`` where each
            example has its own, or ``[R, B, C]`` where each repeat drew afresh. All of 2..T unless subsampled.
        weights: what each column is multiplied by in the sum over t, shape of ``t``: 1 for all timesteps, about
            (T - 1) / C for subsampled ones (1 / C in continuous time).
        draws: the terms by KL, before averaging over the R repeats: prior ``[R, B]``, diffusion ``[R, B, C]`` and
            reconstruction ``[R, B]``, float64.
        network_evaluations: forward passes of one example that it took.
    """

    kl: str
    dims: int
    t: Tensor
    weights: Tensor
    draws: dict[str, tuple[Tensor, Tensor, Tensor]]
    network_evaluations: int

    @property
    def prior(self) -> Tensor:
        """KL of the noisiest state from the prior, ``[B]``."""
        return self.draws[self.kl][0].mean(0)

    @property
    def diffusion(self) -> Tensor:
        """KL of each reverse step, unweighted: ``[B, C]``; with all timesteps, column j is t = j + 2.

        Repeats are averaged; where each drew its own timesteps, they stand side by side: ``[B, R * C]``, as
        ``t.movedim(0, 1).flatten(1)`` does.
        """
        diffusion = self.draws[self.kl][1]
        return diffusion.movedim(0, 1).flatten(1) if self.t.dim() == 3 else diffusion.mean(0)

    @property
    def reconstruction(self) -> Tensor:
        """Minus the decoder's log-probability of the data, ``[B]``."""
        return self.draws[self.kl][2].mean(0)

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound on log p(x_0), ``[B]``."""
        return -self.parts()["total"].mean(0)

    def by(self, kl: str) -> ELBOTerms:
        """The same draws under the other KL: both come from the same network calls."""
        check_option("kl", kl, KLS)
        return replace(self, kl=kl)

    def parts(self) -> dict[str, Tensor]:
        """Prior, diffusion (its weighted sum), reconstruction and total, each ``[R, B]``, nats."""
        prior, diffusion, reconstruction = self.draws[self.kl]
        diffusion = (diffusion * self.weights).sum(-1)
        total = prior + diffusion + reconstruction
        return {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction, "total": total}

    def table(self) -> list[dict[str, float | str]]:
        """The ledger: a row per part and KL, with nats and bits/dim and their standard errors."""
        rows: list[dict[str, float | str]] = []
        for kl in KLS:
            for part, value in self.by(kl).parts().items():
                nats = Estimate.of(value)
                bits = bits_per_dim(self.by(kl), part)
                rows.append(
                    {"kl": kl, "part": part}
                    | {f"nats_{k}": v for k, v in nats._asdict().items()}
                    | {f"bits_per_dim_{k}": v for k, v in bits._asdict().items()}
                )
        return rows

    def __str__(self) -> str:
        head = f"{'KL':12s}{'part':16s}{'nats':>10s}{'± images':>10s}{'± noise':>10s}{'bits/dim':>12s}{'± images':>10s}{'± noise':>10s}"
        lines = [head]
        for row in self.table():
            numbers = (
                "".join(f"{row[f'nats_{k}']:10.3f}" for k in Estimate._fields)
                + f"{row['bits_per_dim_mean']:12.4f}"
                + "".join(f"{row[f'bits_per_dim_{k}']:10.4f}" for k in Estimate._fields[1:])
            )
            lines.append(f"{row['kl']:12s}{row['part']:16s}{numbers}")
        return "\n".join(lines)


class Estimate(NamedTuple):
    """A mean over images, with the two standard errors that must not be mixed up.

    Attributes:
        mean: the estimate.
        se_examples: standard error over images (as drawn from the data's law), what remains of the noise included.
        se_noise: standard error over timesteps and noise, given these images; NaN from a single repeat.
    """

    mean: float
    se_examples: float
    se_noise: float

    @classmethod
    def of(cls, draws: Tensor) -> Self:
        """From ``[R, B]`` independent repeats for each of B images."""
        repeats, examples = draws.shape
        per_example = draws.mean(0)
        se_examples = per_example.std().item() / math.sqrt(examples) if examples > 1 else math.nan
        se_noise = math.nan
        if repeats > 1:
            se_noise = math.sqrt(draws.var(0).sum().item() / repeats) / examples
        return cls(per_example.mean().item(), se_examples, se_noise)

    def __str__(self) -> str:
        return f"{self.mean:.4f} (± {self.se_examples:.4f} over images, ± {self.se_noise:.4f} over noise)"


class BitsPerDim(Estimate):
    """An :class:`Estimate` in bits per dim."""

    def __str__(self) -> str:
        return f"{self.mean:.4f} bits/dim (± {self.se_examples:.4f} over images, ± {self.se_noise:.4f} over noise)"


def bits_per_dim(terms: ELBOTerms, part: str = "total") -> BitsPerDim:
    """Nats per example to bits per dim: divided by D ln 2.

    Args:
        terms: what :func:`elbo_terms` returned.
        part: ``"total"`` (minus the ELBO), ``"prior"``, ``"diffusion"`` or ``"reconstruction"``.

    Returns:
        ``(mean, se_examples, se_noise)``; see :class:`Estimate`. ``se_noise`` needs ``elbo_terms(..., repeats=2)`` or more.
    """
    parts = terms.parts()
    check_option("part", part, parts)
    return BitsPerDim.of(parts[part] / (terms.dims * math.log(2)))


# ---------------------------------------------------------------------- estimating the terms


def elbo_terms(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    t: Tensor | int | None = None,
    kl: str = "analytic",
    chain: bool = True,
    *,
    weights: Tensor | None = None,
    repeats: int = 1,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> ELBOTerms:
    """Estimate every term of the bound, for each example.

    Read off the same distributions as the programs' sites: at one seed and in one batch, equal to the site terms of stock
    Pyro's ELBO. Nothing is kept on the autograd graph; memory grows with the result alone, two float64
    numbers per image, timestep and repeat.

    Args:
        diffusion: the model.
        x0: data, ``[B, *event]``; like ``cond`` moved to the network's device, should it be elsewhere.
        t: None for all timesteps. An integer C: that many per example, low-discrepancy over 2..T, fresh in every
            repeat. A tensor ``[C]`` or ``[B, C]`` of steps in 2..T (then ``weights`` says how they were drawn). The
            reconstruction, t = 1, is always evaluated. Continuous time needs C or a tensor, of floats in (0, 1].
        kl: which KL the result shows; both are computed (see :meth:`ELBOTerms.by`).
        chain: walk the guide's one chain x_T, ..., x_1 per example; False draws each x_t independently, as
            guided-diffusion's ``calc_bpd_loop`` does, and as subsampled timesteps always are.
        weights: 1 / (C p(t)) of the tensor t, of its shape; default (T - 1) / C (1 / C in continuous time), right for
            uniform draws.
        repeats: independent repetitions R; from 2 on the estimates have a standard error over noise.
        batch_size: examples per network call.
        progress: show a progress bar after two seconds.
        cond: passed to the network, a row per example.

    Raises:
        OptionError, ShapeError: an argument outside its range.
        ProgramError: all timesteps of continuous time.
    """
    check_option("kl", kl, KLS)
    check_event("x0", x0, diffusion.event_shape)
    if x0.dim() != len(diffusion.event_shape) + 1 or not len(x0):
        raise ShapeError(f"x0 has shape {list(x0.shape)}, not [B, *{list(diffusion.event_shape)}] with B >= 1")
    if repeats < 1 or batch_size < 1:
        raise OptionError(f"repeats={repeats!r} and batch_size={batch_size!r} must be at least 1")
    diffusion.reverse_kernel.check_grid("x0", x0)
    if isinstance(t, Sequence | np.integer | np.ndarray):
        t = torch.as_tensor(t) if not isinstance(t, np.integer) else int(t)
    if weights is not None and not isinstance(t, Tensor):
        raise OptionError("weights belong to a tensor t: all timesteps weigh 1, and drawn ones (T - 1) / C")
    x0, cond = to_network(diffusion.net, x0, cond)
    batch = len(x0)
    columns = _columns(t, diffusion.schedule, batch, weights)
    bar = tqdm(
        total=repeats * batch,
        desc="scoring",
        unit="image",
        delay=2,
        disable=not progress,
        dynamic_ncols=True,
        leave=False,
    )
    draws: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in KLS}
    used: list[Tensor] = []
    evaluations = 0
    with diffusion.evaluating(), torch.no_grad(), bar:
        for _ in range(repeats):
            repeat_t, used_weights = columns()
            used.append(repeat_t)
            rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in KLS}
            for first in range(0, batch, batch_size):
                part = slice(first, first + batch_size)
                walk = _chain_terms if t is None and chain else _independent_terms
                part_t = repeat_t[part] if repeat_t.dim() == 2 else repeat_t
                part_cond = take_rows(diffusion.net, cond, part, batch)
                found, calls = walk(diffusion, x0[part], part_t, part_cond, batch_size)
                evaluations += calls
                for name in KLS:
                    rows[name].append(found[name])
                bar.update(len(x0[part]))
            for name in KLS:
                draws[name].append(tuple(torch.cat(parts) for parts in zip(*rows[name], strict=True)))  # type: ignore[arg-type]
    stacked = {name: tuple(torch.stack(parts) for parts in zip(*draws[name], strict=True)) for name in KLS}
    dims = diffusion.event_shape.numel()
    used_t = torch.stack(used) if isinstance(t, int) else used[0]
    return ELBOTerms(kl, dims, used_t, used_weights.expand(used_t.shape), stacked, evaluations)  # type: ignore[arg-type]


def _columns(
    t: Tensor | int | None, schedule: Schedule, batch: int, weights: Tensor | None
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that gives the timesteps of one repeat, ``[C]`` or ``[B, C]``, and their weights."""
    if t is None:
        every = torch.arange(2, schedule.length + 1, device="cpu")
        return lambda: (every, torch.ones_like(every, dtype=torch.float64))
    steps, continuous = schedule.steps, schedule.continuous
    total = 1 if continuous else steps - 1  # of the weights
    if isinstance(t, int):
        if not (1 <= t and steps >= 2):
            raise OptionError(f"t={t!r} timesteps per example is not at least 1, or T={steps} has none to draw from")
        even = torch.full((batch, t), total / t, dtype=torch.float64, device="cpu")

        def draw() -> tuple[Tensor, Tensor]:
            # One offset per example, so that examples are independent; stratified within each.
            offset = torch.rand(batch, 1, dtype=torch.float64, device="cpu")
            u = (torch.arange(t, dtype=torch.float64, device="cpu") + offset) / t
            if continuous:
                return 1 - u, even  # in (0, 1]
            return (u * (steps - 1)).long().clamp(max=steps - 2) + 2, even

        return draw
    kind = "floats" if continuous else "integers"
    bad_kind = t.is_floating_point() != continuous
    if bad_kind or t.dim() not in (1, 2) or (t.dim() == 2 and len(t) != batch) or not t.numel():
        raise ShapeError(f"t has shape {list(t.shape)} and dtype {t.dtype}; it must be {kind} [C] or [{batch}, C]")
    if not schedule.first < t.min() <= t.max() <= schedule.last:
        raise ShapeError(
            f"t has values in {t.min():.6g}..{t.max():.6g}; columns of the diffusion term have "
            f"{schedule.first} < t <= {schedule.last}"
        )
    if weights is None:
        weights = torch.full_like(t, total / t.shape[-1], dtype=torch.float64)
    elif weights.shape != t.shape:
        raise ShapeError(f"weights have shape {list(weights.shape)}, not that of t, {list(t.shape)}")
    fixed = (t.cpu(), weights.double().cpu())
    return lambda: fixed


Terms = dict[str, tuple[Tensor, Tensor, Tensor]]


def _chain_terms(
    diffusion: GaussianDiffusion, x0: Tensor, t: Tensor, cond: dict[str, Tensor], rows: int
) -> tuple[Terms, int]:
    """Along one chain of the guide; draws in the guide's order."""
    q, p, steps = diffusion.forward_process, diffusion.reverse_kernel, diffusion.steps
    x_t, prior = _draw(q.marginal(x0, steps), q.prior(x0.shape, x0))
    columns = []
    for step in range(steps, 1, -1):
        x_t, terms = _draw(q.posterior(x0, x_t, step), p(x_t, step, **cond))
        columns.append(terms)
    reconstruction = -p.decode(x_t, **cond).log_prob(x0).double().cpu()
    empty = reconstruction.new_zeros(len(x0), 0)
    found = {}
    for i, name in enumerate(KLS):
        diffusion_terms = torch.stack([c[i] for c in reversed(columns)], dim=-1) if columns else empty
        found[name] = (prior[i], diffusion_terms, reconstruction)
    return found, steps * len(x0)


def _independent_terms(
    diffusion: GaussianDiffusion, x0: Tensor, t: Tensor, cond: dict[str, Tensor], rows: int
) -> tuple[Terms, int]:
    """Every x_t drawn on its own, from the marginal."""
    q, p, schedule = diffusion.forward_process, diffusion.reverse_kernel, diffusion.schedule
    batch = len(x0)
    _, prior = _draw(q.marginal(x0, schedule.last), q.prior(x0.shape, x0))
    t = t.expand(batch, t.shape[-1]).to(x0.device)
    columns = []
    width = max(1, rows // batch)  # columns per network call: as many examples as the caller asked for
    for first in range(0, t.shape[-1], width):
        t_part = t[:, first : first + width].T  # [c, B]
        x_t = q.marginal(x0, t_part).sample()
        columns.append(_draw(q.posterior(x0, x_t, t_part), p(x_t, t_part, **cond))[1])
    x_1 = q.marginal(x0, schedule.first).sample()
    reconstruction = -p.decode(x_1, **cond).log_prob(x0).double().cpu()
    empty = reconstruction.new_zeros(batch, 0)
    found = {}
    for i, name in enumerate(KLS):
        diffusion_terms = torch.cat([c[i] for c in columns]).T if columns else empty
        found[name] = (prior[i], diffusion_terms, reconstruction)
    return found, (t.shape[-1] + 1) * batch


def _draw(q: dist.TorchDistribution, p: dist.TorchDistribution) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A draw from q; and KL(q || p), analytic and by that draw, in float64 on the CPU."""
    x = q.sample()
    # element by element: both sums are thousands of nats, of which float32 would keep four digits after the point
    elements = (law.base_dist if law.event_dim else law for law in (q, p))
    of_q, of_p = (law.log_prob(x) for law in elements)
    log_ratio = sum_event((of_q - of_p).double(), q.event_dim)
    return x, (kl_divergence(q, p).double().cpu(), log_ratio.cpu())


# ---------------------------------------------------------------------- Pyro's own terms, and strict ELBOs


def site_terms(model_trace: Trace, guide_trace: Trace, kl: str = "analytic") -> dict[str, Tensor]:
    """Each site's share of minus the ELBO, per example: what stock Pyro sums, before it sums.

    Args:
        model_trace, guide_trace: a guide's trace, and the model's replayed against it.
        kl: ``"analytic"`` as ``TraceMeanField_ELBO``, ``"monte_carlo"`` as ``Trace_ELBO``.

    Returns:
        Site name to a tensor of its batch shape, ``[*plates, B]``, nats, scaled and masked as the site is.

    Raises:
        ProgramError: an analytic KL that is not registered; nothing is estimated in its place.
    """
    check_option("kl", kl, KLS)

    def log_prob(site: dict[str, Any]) -> Tensor:
        if "log_prob" in site:
            return site["log_prob"]
        return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])

    terms, guides = {}, _sites(guide_trace)
    for name, site in _sites(model_trace).items():
        if site["is_observed"]:
            terms[name] = -log_prob(site)
        elif kl == "analytic":
            q = guides[name]
            try:
                value = kl_divergence(q["fn"], site["fn"])
            except NotImplementedError:
                raise _no_kl(name, q["fn"], site["fn"]) from None
            if not isinstance(value, Tensor):  # Pyro's for a law masked out
                value = q["value"].new_tensor(value).expand(q["fn"].batch_shape)
            terms[name] = scale_and_mask(value, q["scale"], q["mask"])
        else:
            terms[name] = log_prob(guides[name]) - log_prob(site)
    return terms


def _sites(trace: Trace) -> dict[str, Any]:
    """The sample sites, without those by which plates pick their indices."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    }


def _same(a: Any, b: Any) -> bool:
    """Whether two scales or masks are equal; no mask is a mask of True."""
    if a is b:
        return True
    a, b = (True if x is None else x for x in (a, b))
    if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        return bool(a == b)
    device = a.device if isinstance(a, Tensor) else b.device
    a, b = torch.as_tensor(a, device=device), torch.as_tensor(b, device=device)
    try:
        return bool((a == b).all())
    except RuntimeError:  # shapes that do not broadcast
        return False


def _base(fn: Any) -> tuple[Any, list[Any]]:
    """A distribution without the wrappers that KLs see through, and the masks among these."""
    masks = []
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append(fn._mask)
        fn = fn.base_dist
    return fn, masks


def _registered(cls: type) -> set[type]:
    """The class itself, and the torch class that Pyro's class of the same name merely wraps."""
    pyros = cls.__module__.startswith("pyro.distributions")
    return {cls} | {base for base in cls.__mro__[1:] if pyros and base.__name__ == cls.__name__}


def _no_kl(name: str, q: Any, p: Any) -> ProgramError:
    q, p = (type(_base(fn)[0]).__name__ for fn in (q, p))
    return ProgramError(
        f"no KL is registered for site {name!r}, {q} from {p} in these wrappers (a parent class's does not count): Pyro would "
        "be silently wrong or noisy; register_kl it, or take Trace_ELBO"
    )


class TraceMeanField_ELBO(pyro.infer.TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO``, refusing what it would get silently wrong.

    Raises :class:`~pyrodiff.errors.ProgramError`, naming the site, when

    * a latent site of the model is missing from the guide, or the other way round;
    * the sites of the guide come in another order than the model's (for a chain: the mean-field condition is violated, and
      the value can be several times off);
    * a site has a batch dim that is no plate's, or model and guide disagree about its event dims or its batch;
    * an observation is not finite, off its law's support, of another event shape, or shared by the rows of a plate;
    * a guide site is not reparameterised;
    * no KL is registered for the very classes at a site (Pyro falls back to Monte Carlo, or takes a parent class's KL);
    * model and guide carry different scales or masks at a site (Pyro reads the guide's only).

    Whatever Pyro's validation flag says, and under ``python -O``. With that flag off it costs less than Pyro's own, which
    computes every log-probability to add up KLs.

    Attributes:
        strict: False to trust programs that have been checked once.
    """

    strict = True

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        if is_validation_enabled() or isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
            # Past the parent's own check of the order, which warns where this one raises.
            model_trace, guide_trace = pyro.infer.Trace_ELBO._get_trace(self, model, guide, args, kwargs)
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
            model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        if self.strict:
            check_mean_field(model_trace, guide_trace)
        model_trace.compute_log_prob(lambda name, site: site["is_observed"])
        return model_trace, guide_trace

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[float, Tensor]:
        loss = sum(term.sum() for term in site_terms(model_trace, guide_trace).values())
        return torch_item(loss), loss  # type: ignore[return-value]


def check_mean_field(model_trace: Trace, guide_trace: Trace) -> None:
    """The checks of :class:`TraceMeanField_ELBO`."""
    latents = {name: site for name, site in _sites(model_trace).items() if not site["is_observed"]}
    guides = _sites(guide_trace)
    _check_names(list(latents), list(guides))
    _check_shapes(model_trace, guide_trace)
    if list(latents) != list(guides):
        i = next(i for i, (a, b) in enumerate(zip(latents, guides, strict=True)) if a != b)
        raise ProgramError(
            f"site {list(guides)[i]!r} comes where the model has {list(latents)[i]!r}: with the guide in another order than "
            "the model the analytic KL is wrong; run the guide noisiest first, or take Trace_ELBO"
        )
    for name, site in latents.items():
        guide_site = guides[name]
        (q, q_masks), (p, p_masks) = _base(guide_site["fn"]), _base(site["fn"])
        if not q.has_rsample:
            raise ProgramError(f"guide site {name!r} ({type(q).__name__}) is not reparameterised; take Trace_ELBO")
        pairs = ((a, b) for a in _registered(type(q)) for b in _registered(type(p)))
        if not any(pair in _KL_REGISTRY for pair in pairs):
            raise _no_kl(name, q, p)
        same_masks = len(q_masks) == len(p_masks) and all(map(_same, q_masks, p_masks))
        for what, same in (
            ("scale", _same(guide_site["scale"], site["scale"])),
            ("mask", same_masks and _same(guide_site["mask"], site["mask"])),
        ):
            if not same:
                raise ProgramError(
                    f"model and guide have different {what}s at site {name!r}: the model's would be ignored"
                )


class RenyiELBO(pyro.infer.RenyiELBO):
    """Pyro's ``RenyiELBO``, refusing scaled or masked sites.

    Pyro exponentiates the scaled log-weights, so that with any scale but 1 (one timestep per example, ``data_size``, a mask)
    the result is no bound: it can exceed log p(x_0) by tens of nats. Use it on the whole chain, without ``data_size``.

    References:
        Importance Weighted Autoencoders (Burda et al., 2015). https://arxiv.org/abs/1509.00519
        Renyi Divergence Variational Inference (Li and Turner, 2016). https://arxiv.org/abs/1602.02311
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        latents = [name for name, site in _sites(model_trace).items() if not site["is_observed"]]
        # Auxiliary sites, such as an autoguide's unconstrained values, are the guide's alone.
        _check_names(latents, [k for k, site in _sites(guide_trace).items() if not site["infer"].get("is_auxiliary")])
        _check_shapes(model_trace, guide_trace)
        for trace in (model_trace, guide_trace):
            for name, site in _sites(trace).items():
                if not _same(site["scale"], 1.0) or not (site["mask"] is None or site["mask"] is True):
                    raise ProgramError(
                        f"site {name!r} is scaled or masked: a Renyi bound exponentiates the scale and would exceed "
                        "log p(x_0); run the whole chain (no t), without data_size"
                    )
        return model_trace, guide_trace


def _check_names(latents: list[str], guides: list[str]) -> None:
    if missing := [name for name in latents if name not in guides]:
        raise ProgramError(
            f"model site {missing[0]!r} is not in the guide, whose sites are {', '.join(guides) or 'none'}"
        )
    if extra := [name for name in guides if name not in latents]:
        raise ProgramError(f"guide site {extra[0]!r} is not in the model, whose latent sites are {', '.join(latents)}")


def _check_shapes(model_trace: Trace, guide_trace: Trace) -> None:
    """Batch dims are plates, event dims agree, and every row has its own observation.

    Pyro looks at some of this if its validation is on. It never does at an observation that broadcasts: one value for all dims
    of an event, or one for all rows of a plate, which a ``to_event`` too many makes of the whole batch.
    """
    guides = _sites(guide_trace)
    for site in (*_sites(model_trace).values(), *guides.values()):
        name, fn, value = site["name"], site["fn"], torch.as_tensor(site["value"])
        plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        event_dim = fn.event_dim
        batch = value.shape[: value.dim() - event_dim]
        for dim in range(-max(len(fn.batch_shape), len(batch)), 0):
            sizes = {shape[dim] for shape in (fn.batch_shape, batch) if -dim <= len(shape)} - {1}
            expected = plates[dim].size if dim in plates else 1
            if sizes - {expected}:
                where = f"plate {plates[dim].name!r} has {expected}" if dim in plates else "no plate is"
                raise ProgramError(
                    f"site {name!r} has batch shape {list(fn.batch_shape)} and a value of {list(value.shape)}, where at dim {dim} "
                    f"{where}: put to_event on what is one event, and a plate around independent rows"
                )
        if name in guides and name in model_trace.nodes:
            other = guides[name]["fn"]
            if (other.event_dim, other.event_shape) != (event_dim, fn.event_shape):
                raise ProgramError(
                    f"model and guide have events of different shapes at site {name!r}: {list(fn.event_shape)}, and "
                    f"{list(other.event_shape)}"
                )
        if not site["is_observed"] or not value.numel():  # a factor observes nothing
            continue
        if value.shape[value.dim() - event_dim :] != fn.event_shape:
            raise ProgramError(
                f"site {name!r} has events of shape {list(fn.event_shape)}, and observes a value of {list(value.shape)}"
            )
        for dim, plate in plates.items():
            if plate.name != PARTICLES and (-dim > len(batch) or batch[dim] != plate.size):
                raise ProgramError(
                    f"site {name!r} observes a value of shape {list(value.shape)}, which all {plate.size} rows of plate "
                    f"{plate.name!r} would share: to_event of too many dims, or a value too few"
                )
        if value.device.type != "meta" and not (value.isfinite().all() and _in_support(fn, value)):
            raise ProgramError(
                f"site {name!r} observes values that are NaN, infinite or outside the support of its law, {type(_base(fn)[0]).__name__}"
            )


def _in_support(fn: Any, value: Tensor) -> bool:
    """Whether all values are, as far as the law says what its support is."""
    try:
        return bool(fn.support.check(value).all())
    except NotImplementedError:
        return True
