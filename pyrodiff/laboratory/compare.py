"""One call that compares the ways of estimating a model's bound: ``pyrodiff.compare_estimators``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import inference_data, plots
from .._tensor import check_event, to_network
from .._version import __version__
from ..diffusion import GaussianDiffusion
from ..draws import Draws
from ..elbo import ELBOTerms
from ..errors import OptionError, ShapeError
from .budget import ELBOEstimate, estimate_elbo
from .gradients import compare_gradients
from .values import by_timestep, value_estimators

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "compare_estimators"]

_COLUMNS = "path kl mean se_noise variance bias z evaluations seconds efficiency reason".split()
_GRADIENTS = "where t group estimator norm variance bias z evaluations seconds efficiency same_noise reason".split()


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_estimators` found; tables are pandas DataFrames, in nats per example.

    Attributes:
        values: a row per estimator of the bound. ``path`` and ``kl`` name it; ``unbiased`` is what it claims; ``target``
            ``"elbo"``, or ``"log p"`` for the tighter bounds; ``timesteps`` in one draw, ``evaluations`` of the network and
            ``seconds`` for one draw of one example; ``mean`` of minus the bound, ``se_noise`` given the examples,
            ``se_examples`` over them; ``variance`` of one draw for one example (for timesteps spread over the batch: of the
            batch's mean, times its size) and ``variance_se``; ``efficiency`` = 1 / (variance x evaluations); ``bias`` against
            ``against``, its standard error, and their quotient ``z``; ``reason`` why there is no number, or a remark.
        timesteps: a row per term of the bound: see :func:`~pyrodiff.laboratory.values.by_timestep`.
        gradients: a row per estimator of a gradient: see :func:`~pyrodiff.laboratory.gradients.compare_gradients`.
        bound: the bound of the whole pool to the standard error asked for; None if none was.
        terms: the ledger of the chains drawn, for :func:`~pyrodiff.to_datatree`.
        diffusion: the model.
        settings: what was asked for.
    """

    values: pandas.DataFrame
    timesteps: pandas.DataFrame
    gradients: pandas.DataFrame | None
    bound: ELBOEstimate | None
    terms: ELBOTerms = field(repr=False)
    diffusion: GaussianDiffusion = field(repr=False)
    settings: dict[str, Any]

    def tables(self) -> dict[str, pandas.DataFrame]:
        """The tables by name."""
        found = {"estimators": self.values, "timesteps": self.timesteps}
        return found if self.gradients is None else found | {"gradients": self.gradients}

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the tables (CSV), pictures (PNG, where matplotlib is installed), ``comparison.txt`` and ``comparison.nc``.

        Args:
            folder: made if it is missing; files of these names in it are replaced.

        Returns:
            The paths written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, table in self.tables().items():
            paths.append(folder / f"{name}.csv")
            table.to_csv(paths[-1], index=False)
        paths.append(folder / "comparison.txt")
        paths[-1].write_text(f"{self}\n", encoding="utf-8")
        paths.append(folder / "comparison.nc")
        tree = inference_data.to_datatree(
            self.terms, diffusion=self.diffusion, tables=self.tables(), chain=True, attrs={"settings": self.settings}
        )
        inference_data.write(tree, paths[-1])
        for name, table in self.tables().items():
            path = folder / f"{name}.png"
            try:
                plots.save(getattr(plots, name)(table), path)
            except (OptionError, ShapeError):  # without matplotlib, an extra; the numbers are all there
                continue
            paths.append(path)
        return paths

    def __str__(self) -> str:
        parts = [f"{k} {v}" for k, v in self.settings.items() if v is not None]
        lines = [", ".join(parts), "", "Minus the bound, nats per example", _text(self.values, _COLUMNS)]
        if self.gradients is not None:
            lines += ["", "Gradients of minus the bound per example", _text(self.gradients, _GRADIENTS)]
        if self.bound is not None:
            lines += ["", str(self.bound)]
        return "\n".join(lines)


def compare_estimators(
    diffusion: GaussianDiffusion,
    x0: Tensor,
    *,
    exact: Tensor | None = None,
    exact_log_prob: Tensor | None = None,
    repeats: int = 8,
    timesteps: Sequence[int] = (1, 16),
    iwae: Sequence[int] = (1, 4, 16, 64),
    controls: bool = False,
    gradients: int | None = 32,
    pool: Tensor | None = None,
    pool_cond: dict[str, Tensor] | None = None,
    se: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **cond: Tensor,
) -> Comparison:
    """Estimate one bound, and its gradient, in every way; measure each way's variance, bias and cost.

    Costs about 3 + len(timesteps) network evaluations per timestep, example and repeat, and the gradients.

    Args:
        diffusion: the model.
        x0: some examples, ``[B, *event]``, on any device; a few are enough.
        exact: minus the exact ELBO of each, nats ``[B]``, where it is known.
        exact_log_prob: log p(x_0) of each under the model, nats ``[B]``, where it is known.
        repeats: draws of every estimator that evaluates all timesteps; those of a few timesteps get a quarter of its network
            evaluations.
        timesteps: numbers of timesteps per draw to compare.
        iwae: numbers of chains K of importance-weighted bounds; they need ``2 K`` repeats.
        controls: add estimators known to be biased (the guide in forward order with analytic KLs; importance weights divided
            by their mean), to see that ``bias`` finds them.
        gradients: draws of every gradient; None: no gradients.
        pool: images ``[N, *event]`` whose mean bound is wanted, ...
        pool_cond: ... what the network is passed for them, a row per image, ...
        se: ... to this standard error, bits per dim: see :func:`~pyrodiff.estimate_elbo`.
        seed: of everything.
        batch_size: examples per network call.
        progress: show progress bars.
        cond: passed to the network, a row per example.

    Raises:
        OptionError, ShapeError: an argument outside its range.

    Example:
        >>> comparison = pyrodiff.compare_estimators(diffusion, images[:8])
        >>> comparison.values.sort_values("efficiency", ascending=False)
    """
    check_event("x0", x0, diffusion.event_shape)
    if x0.dim() != len(diffusion.event_shape) + 1 or not len(x0):
        raise ShapeError(f"x0 has shape {list(x0.shape)}, not [B, *{list(diffusion.event_shape)}] with B >= 1")
    diffusion.reverse_kernel.check_grid("x0", x0)
    x0, cond = to_network(diffusion.net, x0, cond)
    for name, value in (("exact", exact), ("exact_log_prob", exact_log_prob)):
        if value is not None and value.shape != (len(x0),):
            raise ShapeError(f"{name} has shape {list(value.shape)}, not one number per example, [{len(x0)}]")
    for name, number, least in (("repeats", repeats, 2), ("gradients", gradients, 2), ("batch_size", batch_size, 1)):
        if number is not None and number < least:
            raise OptionError(f"{name}={number!r} is not at least {least}")
    if any(k < 1 for k in (*timesteps, *iwae)):
        raise OptionError(f"timesteps={list(timesteps)} and iwae={list(iwae)} must hold numbers of at least 1")
    if (pool is None) != (se is None):
        raise OptionError(
            "pool and se belong together: the images, and the standard error of their bound in bits per dim"
        )
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed={seed!r} is not an integer in 0..2**63 - 1")
    if gradients is not None and not any(p.requires_grad for p in diffusion.parameters()):
        raise OptionError(
            f"gradients={gradients!r}, but no parameter of the diffusion requires a gradient: set it to None"
        )
    options: Any = {"seed": seed, "progress": progress}
    found, bound = None, None
    if pool is not None and se is not None:  # first, since it may find the pool too small
        bound = estimate_elbo(diffusion, pool, se, **options | {"batch_size": batch_size} | (pool_cond or {}))
    values, chains, loop = value_estimators(
        diffusion, x0, exact=exact, exact_log_prob=exact_log_prob, repeats=repeats, timesteps=timesteps, iwae=iwae,
        controls=controls, batch_size=batch_size, **options | cond,
    )  # fmt: skip
    if gradients is not None:
        found = compare_gradients(diffusion, x0, repeats=gradients, **options | cond)
    settings = {
        "examples": len(x0), "T": diffusion.steps, "dims": diffusion.event_shape.numel(), "repeats": repeats, "seed": seed,
        "gradients": gradients, "threads": torch.get_num_threads(), "device": str(x0.device), "torch": torch.__version__,
        "pyrodiff": __version__,
    }  # fmt: skip
    return Comparison(
        values, by_timestep(diffusion, loop), found, bound, _ledger(diffusion, chains), diffusion, settings
    )


def _ledger(diffusion: GaussianDiffusion, chains: Draws) -> ELBOTerms:
    """Chains as the ledger has them."""
    T = diffusion.steps
    t = torch.arange(2, T + 1, device="cpu")
    analytic, log_ratio = ((z[..., -1], z[..., 1:-1], z[..., 0]) for z in chains.terms)
    repeats, batch, _ = chains.terms.analytic.shape
    draws = {"analytic": analytic, "monte_carlo": log_ratio}
    ones = torch.ones_like(t, dtype=torch.float64)
    return ELBOTerms("analytic", diffusion.event_shape.numel(), t, ones, draws, repeats * batch * T)


def _text(table: pandas.DataFrame, columns: Sequence[str]) -> str:
    """The rows that have numbers, and below them why the others have none."""
    has = table["variance"].notna()
    shown = table.loc[has, [c for c in columns if c in table.columns]]
    lines = [str(shown.to_string(index=False, float_format=lambda v: f"{v:.4g}", na_rep=""))]
    for reason, rows in table[~has].groupby("reason", sort=False):
        names = rows[[c for c in ("path", "kl", "where", "estimator") if c in table.columns]].drop_duplicates()
        lines.append(f"no number: {'; '.join(', '.join(row) for row in names.itertuples(index=False))}: {reason}")
    return "\n".join(lines)
