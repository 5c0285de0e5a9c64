r"""Results as a labelled tree of arrays, for ArviZ and whatever else reads netCDF.

The tree is written with xarray alone. Both generations of ArviZ read it, from a file by
``az.from_netcdf(path)``, from memory::

    tree = pyrodiff.to_datatree(terms, diffusion=diffusion, x0=x0)
    data = az.from_datatree(tree) if hasattr(az, "from_datatree") else tree   # 0.23, or 1.x
    az.summary(data, group="elbo", var_names=["elbo"], kind="stats")          # "diagnostics" need 2 chains

One function, :func:`to_datatree`, takes four kinds of result.

**Terms of the bound**, of :func:`~pyrodiff.elbo_terms`. Groups:

* ``elbo``: the ledger of :func:`~pyrodiff.elbo_terms`, in nats, one draw per repeat. Along chains a draw of the Monte Carlo
  ``elbo`` is also a log importance weight, :math:`\log p(x_{0:T}) - \log q(x_{1:T} \mid x_0)`; only there does
  ``log_weight`` stand beside it, the same numbers, so that what may be exponentiated has a name of its own.
* ``log_likelihood``: the bound on :math:`\log p(x_0)` per datum, ``elbo``, and along chains ``iwae``; never
  :math:`\log p(x_0 \mid x_1)`. It is a score for one fitted network, with a single draw and without
  a ``posterior`` group, so that ``az.loo``, which would be wrong here, refuses it: there is no
  posterior over parameters to leave a datum out of, and over the latents
  :math:`x_1, \dots, x_T`, which belong to one datum each, PSIS-LOO is far off.
* ``observed_data``, ``constant_data``: the data scored, and the schedule.
* ``prior_predictive``: unconditional samples.
* ``trajectories``: paths of the sampler, noisiest state first.
* tables, a group each, for example ``estimators``, ``timesteps`` and ``gradients``: a variable per column of numbers, a
  coordinate per column of text, along ``row``.

**Posteriors**: particles of :func:`~pyrodiff.inference.smc.smc`, chains of :func:`~pyrodiff.inference.gibbs.particle_gibbs`, and the
pair of programs that ``SVI`` was given. Groups:

* ``posterior``: draws of equal weight, which is all that ArviZ knows, with dims chain and draw. Particles are resampled, each repeat to
  a chain of its own, at the N midpoints of its weights' cumulative sum: copies stand side by side, and so do particles of one
  ancestor, so that ArviZ's effective sample size, which is made from autocorrelations, is not that of as many distinct draws.
  R-hat is between repeats. (Repeats count alike here; where their evidence differs, ``Posterior.mean`` weights them by it.)
  Draws of a guide are what they are, draws of the guide.
* ``particles``: the particles as they came, with their ``log_weight``; ``sample_stats.particle`` says which of them a draw is.
* ``sample_stats``: beside ``particle``, the ``log_weight`` of each draw of a guide against the joint.
* ``diagnostics``: by repeat and step ``ess`` and ``pareto_k``, by repeat ``families`` and ``log_evidence``; of a Gibbs chain
  ``moved``; of a guide whose draws have weights ``pareto_k``, ``ess``, ``log_evidence`` and ``elbo``.
* ``posterior_predictive``, ``log_likelihood``, ``observed_data``: from the program of the observation: the data drawn anew for
  each draw, the log-probability of the data by site and plate, and the data.
* ``constant_data``: the schedule, and what the network was conditioned on.

The attribute ``warnings`` of every group is a JSON list of what the reader must know.

Several models are compared by their bounds on the same held-out data, with :func:`compare_models`.

References:
    ArviZ InferenceData schema. https://python.arviz.org/en/stable/schema/schema.html
    Importance Weighted Autoencoders (Burda et al., 2015), eq. 8. https://arxiv.org/abs/1509.00519
    Using Stacking to Average Bayesian Predictive Distributions (Yao et al., 2018). https://arxiv.org/abs/1704.02030
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial, singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ._tensor import check_event
from ._version import __version__
from .diffusion import GaussianDiffusion
from .elbo import ELBOTerms
from .errors import DataError, OptionError, ShapeError, check_option
from .inference.gibbs import GibbsChain
from .inference.observe import observation
from .inference.predictive import Outlook, Plated, guide_draws, joined, known, outlook
from .inference.resampling import systematic
from .inference.smc import HEAVY, Posterior
from .likelihood.importance import effective_chains, pareto_k
from .schedules import Schedule

if TYPE_CHECKING:  # 0.6 s that `import pyrodiff` should not take
    import pandas
    import xarray

__all__ = ["compare_models", "replaced", "to_datatree", "write"]

# HDF5 keeps attributes in an object header of 64 KiB.
_MAX_ATTRIBUTE = 32_000
_NATS = {"units": "nats"}
# Of the columns of the laboratory's tables.
_UNITS = {
    **dict.fromkeys("kl mean se_noise se_examples bias bias_se norm same_noise".split(), "nats"),
    **dict.fromkeys("variance variance_se variance_analytic variance_monte_carlo variance_examples".split(), "nats^2"),
    **{"efficiency": "nats^-2 per network evaluation", "z": "standard errors", "seconds": "s"},
}


@singledispatch
def to_datatree(result: object, **options: Any) -> xarray.DataTree:
    """Label a result, and what belongs to it, with dims and coordinates; the groups are told at the head of this module.

    Of all results:

    * ``diffusion``: the model, for the schedule and the configuration;
    * ``attrs``: further attributes of the root, which replace ours; numbers and strings are kept, other values become JSON.

    Of :class:`~pyrodiff.ELBOTerms`: ``x0``, ``samples``, ``trajectories``, ``tables``, ``chain``: see :func:`_of_terms`.

    Of the posteriors:

    * ``cond``: what the network was conditioned on, for ``constant_data``.

    Of a :class:`~pyrodiff.inference.smc.Posterior`, and of one :class:`~pyrodiff.inference.gibbs.GibbsChain` or a list of them:

    * ``program``: the Pyro program of x_0 that made the observation (see :func:`~pyrodiff.inference.observe.observation`), for
      ``posterior_predictive``, ``log_likelihood`` and ``observed_data``.

    Of a pair ``(model, guide)``, as given to ``SVI`` (see :func:`~pyrodiff.inference.predictive.guide_draws`):

    * ``args``, ``kwargs``: of the programs;
    * ``draws`` (1000), and ``batch_size`` (1), how many of them one run of the programs makes.

    Args:
        result: one of these.
        options: those of its kind.

    Returns:
        The tree.

    Raises:
        OptionError: another kind of result; an attribute is no JSON, or longer than 32,000 characters; a site, plate or
            conditioning value with the name of a dim or variable of the tree's own, or with a slash in it.
        ShapeError: chains of other events or parameters than the first's.

    Example:
        >>> tree = to_datatree(bound(model, guide, {"x": prior}, chain=True), args=(y,), draws=400, batch_size=100)
        >>> az.summary(az.from_datatree(tree), var_names=["noise"])
        >>> float(tree["diagnostics"].pareto_k)  # of the guide
    """
    raise OptionError(
        f"{type(result).__name__} is no result that has a tree: terms of a bound, a Posterior, a GibbsChain or a list of them, or a "
        "pair (model, guide)"
    )


@to_datatree.register(ELBOTerms)
def _of_terms(
    terms: ELBOTerms,
    *,
    diffusion: GaussianDiffusion | None = None,
    x0: Tensor | None = None,
    samples: Tensor | None = None,
    trajectories: Tensor | None = None,
    tables: Mapping[str, pandas.DataFrame] | None = None,
    chain: bool = False,
    attrs: Mapping[str, Any] | None = None,
) -> xarray.DataTree:
    """Label the terms of the bound, and what belongs to them, with dims and coordinates.

    Group ``elbo`` has dims chain = 1, draw = R repeats, obs_id = B examples and timestep = C. Where
    every example has timesteps of its own, the last dim is ``column`` and the variable ``t`` says
    which timestep a column is. Terms are costs and add up to ``-elbo``: prior + the sum of
    ``weights * kl`` + reconstruction. A suffix ``_analytic`` marks analytic KLs; without it, and for
    ``kl``, ``prior`` and ``elbo`` alike, they are Monte Carlo, by the same draws.

    Args:
        terms: what :func:`~pyrodiff.elbo_terms` returned.
        diffusion: the model, for the schedule and the configuration. A schedule per element is
            averaged over the event.
        x0: the data that were scored, ``[B, *event]`` in model units.
        samples: unconditional samples, ``[N, *event]``.
        trajectories: what :func:`~pyrodiff.trajectory` returned, ``[K + 1, n, *event]``.
        tables: tables by the name of their group, such as the laboratory's ``estimators``, ``timesteps`` and ``gradients``.
            Missing numbers become NaN, missing text becomes "". ``tree[name].to_dataset().to_dataframe()`` gives one back.
        chain: say that each draw of the terms is one chain x_T, ..., x_1 of the guide, as ``elbo_terms(chain=True)`` makes
            them; the terms cannot tell. Adds ``log_weight``, and the importance-weighted bound ``iwae`` of all R chains.
        attrs: further attributes of the root, which replace ours; numbers and strings are kept,
            other values become JSON.

    Returns:
        The tree. The terms per step are float32, the sums over steps float64.

    Raises:
        ShapeError: a tensor does not fit the terms or the model.
        OptionError: an attribute is no JSON, or longer than 32,000 characters; a table has the name of another group, or a
            column of neither numbers nor text; ``chain`` for terms that do not have every timestep once.
    """
    groups = {"elbo": _elbo(terms, diffusion), "log_likelihood": _log_likelihood(terms)}
    if chain:
        _add_weights(terms, diffusion, groups["elbo"], groups["log_likelihood"])
    event = None if diffusion is None else diffusion.event_shape
    if samples is not None:
        _check("samples", samples, 1, event)
        groups["prior_predictive"] = _images("x_0", samples[None], ("chain", "draw"))
    if x0 is not None:
        _check("x0", x0, 1, event)
        if len(x0) != len(terms.elbo):
            raise ShapeError(f"x0 has {len(x0)} examples, the terms {len(terms.elbo)}")
        groups["observed_data"] = _images("x_0", x0, ("obs_id",))
    if diffusion is not None:
        groups["constant_data"] = _schedule(diffusion.schedule)
    if trajectories is not None:
        _check("trajectories", trajectories, 2, event)
        paths = _images("x_t", trajectories.transpose(0, 1)[None], ("chain", "draw", "state"))
        if diffusion is not None and len(trajectories) == diffusion.steps + 1:
            paths = paths.assign_coords(timestep=("state", range(diffusion.steps, -1, -1)))
        groups["trajectories"] = paths
    for name, table in (tables or {}).items():
        if name in groups:
            raise OptionError(f"a table cannot be named {name!r}: the tree has another group of that name")
        groups[name] = _table(name, table)
    about = {"kl": terms.kl, "dims_per_example": terms.dims, "network_evaluations": terms.network_evaluations}
    return _tree(groups, about, diffusion, attrs)


@to_datatree.register(Posterior)
def _of_particles(
    posterior: Posterior,
    *,
    diffusion: GaussianDiffusion | None = None,
    cond: Mapping[str, Any] | None = None,
    program: Callable[[Tensor], Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xarray.DataTree:
    """A chain for each repeat; see :func:`to_datatree`."""
    import xarray

    log_w = posterior.log_weights
    repeats, count = log_w.shape
    found = systematic(log_w.softmax(1), torch.full_like(log_w, 0.5))
    draws = torch.stack([x[i] for x, i in zip(posterior.particles, found, strict=True)])
    particles = _images("x_0", posterior.particles, ("chain", "particle"))
    particles["log_weight"] = (
        ("chain", "particle"),
        _numpy(log_w),
        {**_NATS, "long_name": "log weight, not normalised"},
    )
    by_step = ("chain", "timestep")
    diagnostics: dict[str, tuple[Any, ...]] = {
        "ess": (
            by_step,
            _numpy(posterior.ess),
            {"long_name": f"effective number of {count} weights, before resampling"},
        ),
        "pareto_k": (by_step, _numpy(posterior.pareto_k), {"long_name": "Pareto's k-hat of the weights"}),
        "families": (
            "chain",
            _numpy(posterior.families),
            {"long_name": "effective number of x_T that the weight descends from"},
        ),
    }
    about = {
        "method": posterior.method,
        "network_evaluations": posterior.network_evaluations,
        "seconds": posterior.seconds,
        "warnings": json.dumps(posterior.warnings),
    }
    if posterior.no_evidence:
        about["no_evidence"] = posterior.no_evidence
    else:
        estimate = {**_NATS, "long_name": "log of an unbiased estimate of p(y)"}
        diagnostics["log_evidence"] = ("chain", _numpy(posterior.log_evidence), estimate)
        about["log_evidence"], about["log_evidence_se"] = posterior.evidence
    last = posterior.ess.shape[1] - 1
    groups = {
        "posterior": _images("x_0", draws, ("chain", "draw")),
        "sample_stats": _dataset({"particle": Plated(found.flatten(), ())}, repeats),
        "particles": particles,
        "diagnostics": xarray.Dataset(diagnostics, {"chain": range(repeats), "timestep": range(last, -1, -1)}),
    }
    if program is not None:
        rows = draws.flatten(0, 1)
        with torch.no_grad():
            observation(program)(rows)  # refuses what would take pixels for draws
            seen = outlook(partial(program, rows), known({}), len(rows), -1)
        _add_outlook(groups, seen, repeats)
    _add_constants(groups, diffusion, cond)
    return _tree(groups, about, diffusion, attrs)


@to_datatree.register(GibbsChain)
def _of_gibbs_chain(chain: GibbsChain, **options: Any) -> xarray.DataTree:
    return _of_gibbs_chains([chain], **options)


@to_datatree.register(list)
def _of_gibbs_chains(
    chains: list[GibbsChain],
    *,
    diffusion: GaussianDiffusion | None = None,
    cond: Mapping[str, Any] | None = None,
    program: Callable[[Tensor], Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xarray.DataTree:
    """Chains of as many sweeps each; see :func:`to_datatree`."""
    import xarray

    if not chains or not all(isinstance(chain, GibbsChain) for chain in chains):
        raise OptionError(f"a list of {[type(chain).__name__ for chain in chains]} is not one of GibbsChain")
    if len({chain.x0.shape for chain in chains}) > 1:
        raise ShapeError(f"chains have x_0 of shapes {[list(chain.x0.shape) for chain in chains]}, not one")
    shapes = [{name: list(value.shape) for name, value in chain.parameters.items()} for chain in chains]
    if any(found != shapes[0] for found in shapes):
        raise ShapeError(f"chains have parameters of shapes {shapes}, not one set of them")
    names = chains[0].parameters
    values = {name: torch.cat([chain.parameters[name] for chain in chains]) for name in names}
    parameters = {
        name: Plated(value, tuple(f"{name}_dim_{i}" for i in range(value.dim() - 1))) for name, value in values.items()
    }
    x0 = torch.stack([chain.x0 for chain in chains])
    moved = ("chain", [chain.moved for chain in chains], {"long_name": "share of the sweeps in which x_0 changed"})
    groups = {
        "posterior": _merged(_images("x_0", x0, ("chain", "draw")), _dataset(parameters, len(chains))),
        "diagnostics": xarray.Dataset({"moved": moved}, {"chain": range(len(chains))}),
    }
    if program is not None:
        rows = x0.flatten(0, 1)
        with torch.no_grad():
            seen = [
                outlook(partial(program, rows[i : i + 1]), known({k: v[i] for k, v in values.items()}), 1, -1)
                for i in range(len(rows))
            ]
        _add_outlook(groups, joined(seen), len(chains))
    _add_constants(groups, diffusion, cond)
    about = {
        "method": "particle Gibbs",
        "network_evaluations": sum(chain.network_evaluations for chain in chains),
        "seconds": sum(chain.seconds for chain in chains),
        "warnings": json.dumps([text for chain in chains for text in chain.warnings]),
    }
    return _tree(groups, about, diffusion, attrs)


@to_datatree.register(tuple)
def _of_guide(
    pair: tuple[Callable[..., Any], Callable[..., Any]],
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    draws: int = 1000,
    batch_size: int = 1,
    diffusion: GaussianDiffusion | None = None,
    cond: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xarray.DataTree:
    """Draws of a guide, in one chain; see :func:`to_datatree`."""
    import xarray

    if len(pair) != 2 or not all(callable(program) for program in pair):
        raise OptionError(
            f"a tuple of {[type(one).__name__ for one in pair]} is not a pair of programs, (model, guide)"
        )
    found = guide_draws(*pair, args, kwargs, draws=draws, batch_size=batch_size)
    groups = {"posterior": _dataset(found.outlook.latents, 1)}
    about: dict[str, Any] = {"method": "variational: draws of the guide"}
    cautions: list[str] = []
    if found.log_weights is None:
        about["no_weights"] = found.no_weights
        cautions.append(found.no_weights)
    else:
        w = found.log_weights
        k = float(pareto_k(w[:, None])[0])
        log_evidence = torch.logsumexp(w, 0) - math.log(len(w))
        groups["sample_stats"] = _dataset({"log_weight": Plated(w, ())}, 1)
        groups["sample_stats"]["log_weight"].attrs = {**_NATS, "long_name": "log p(latents, data) - log q(latents)"}
        groups["diagnostics"] = xarray.Dataset(
            {
                "pareto_k": ((), k, {"long_name": "Pareto's k-hat of the weights"}),
                "ess": (
                    (),
                    float(effective_chains(w[:, None])[0]),
                    {"long_name": f"effective number of {len(w)} draws"},
                ),
                "log_evidence": ((), float(log_evidence), {**_NATS, "long_name": "log of the mean weight"}),
                "elbo": ((), float(w.mean()), {**_NATS, "long_name": "mean of the log weight"}),
            }
        )
        if k > HEAVY:
            cautions.append(
                f"Pareto's k-hat of the guide against the joint is {k:.2f}, above {HEAVY}: its draws are not those of the posterior, "
                "and no weights make them so"
            )
        if math.isnan(k):
            cautions.append(f"Pareto's k-hat takes 25 draws, {len(w)} were made: how good the guide is is not known")
    about["warnings"] = json.dumps(cautions)
    _add_outlook(groups, found.outlook, 1)
    _add_constants(groups, diffusion, cond)
    return _tree(groups, about, diffusion, attrs)


def _add_outlook(groups: dict[str, xarray.Dataset], found: Outlook, chains: int) -> None:
    """What a program says of the draws, of all chains one after another."""
    computed = {name: value for name, value in found.latents.items() if name not in groups["posterior"]}
    groups["posterior"] = _merged(groups["posterior"], _dataset(computed, chains))
    for name, values in (("log_likelihood", found.log_likelihood), ("posterior_predictive", found.replicated)):
        if values:
            groups[name] = _dataset(values, chains)
    if found.observed:
        groups["observed_data"] = _dataset(found.observed, 1).isel(chain=0, draw=0, drop=True)
    for variable in groups.get("log_likelihood", {}).values():
        variable.attrs = {**_NATS, "comment": "by plate; PSIS-LOO is not for data that have a latent of their own each"}


def _add_constants(
    groups: dict[str, xarray.Dataset], diffusion: GaussianDiffusion | None, cond: Mapping[str, Any] | None
) -> None:
    """The schedule and the conditioning values."""
    import xarray

    constants = xarray.Dataset() if diffusion is None else _schedule(diffusion.schedule)
    for name, value in (cond or {}).items():
        if name in constants:
            raise OptionError(f"cond cannot be named {name!r}: the schedule has a variable of that name")
        _check_names([name], (), "cond")
        try:
            values = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"cond has a {type(value).__name__} as {name!r}, not a tensor or a number") from error
        constants[name] = (
            tuple(f"{name}_dim_{i}" for i in range(values.dim())),
            _numpy(values),
            {"role": "conditioning"},
        )
    if len(constants):
        groups["constant_data"] = constants


def write(tree: xarray.DataTree, path: str | os.PathLike[str]) -> None:
    """Write a tree as netCDF; a file under ``path`` is replaced at once, or left as it was.

    Args:
        tree: what :func:`to_datatree` returned.
        path: file to write.

    Raises:
        OSError: the folder is missing, or cannot be written to.
    """
    with replaced(path) as temporary:
        tree.to_netcdf(temporary, engine="h5netcdf")


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path``, which takes its place when the block ends, and is deleted if the block fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def compare_models(scores: Mapping[str, Tensor], *, bound: str = "elbo") -> pandas.DataFrame:
    r"""Models by their bounds on the same held-out images, as ArviZ's comparison table, with paired standard errors.

    The scores are bounds on :math:`\log p(x_0)` by fixed networks on data that they were not fitted to. Nothing is left out
    and re-weighted: this is not PSIS-LOO, and the tighter of two bounds need not belong to the better of two models. Noise
    of the scores themselves is in the standard errors, as it varies from image to image like the images do.

    Args:
        scores: model to bounds per image, ``[B]``, nats; the same images in the same order for each.
        bound: ``"elbo"`` or ``"iwae"`` (of one K), the name of the column.

    Returns:
        A row for each model, best first, in nats over all B images, the same under either generation of ArviZ: ``rank``;
        ``elbo`` or ``iwae``, the sum, and its standard error over images ``se``; ``elpd_diff``, the difference from the best
        model, never above 0, and its paired standard error ``dse`` = :math:`\sqrt{B \operatorname{var}_i d_i}` with
        :math:`d_i` the difference at image i; ``weight``, by stacking: the mixture :math:`\sum_k w_k p_k` of the models
        with the highest bound :math:`\sum_i \log \sum_k w_k \exp(\mathrm{bound}_{ki})` on these images.

    Raises:
        OptionError: fewer than two models, or an unknown bound.
        ShapeError: scores are not ``[B]`` with one B >= 2.
        DataError: a score is not finite.
    """
    check_option("bound", bound, ("elbo", "iwae"))
    if len(scores) < 2:
        raise OptionError(f"{len(scores)} model is nothing to compare: give the scores of at least two")
    found = {name: torch.as_tensor(score).detach().double().cpu() for name, score in scores.items()}
    first = next(iter(found))
    for name, score in found.items():
        if score.dim() != 1 or len(score) < 2:
            raise ShapeError(f"scores of {name!r} have shape {list(score.shape)}, not [B] with B >= 2")
        if len(score) != len(found[first]):
            raise ShapeError(
                f"{name!r} has scores of {len(score)} images, {first!r} of {len(found[first])}; not the same images"
            )
        if not score.isfinite().all():
            where = int((~score.isfinite()).nonzero()[0])
            raise DataError(f"the score of {name!r} at image {where} is {float(score[where])}")
    return _compare({name: _numpy(score) for name, score in found.items()}, bound)


def _compare(scores: Mapping[str, np.ndarray], bound: str) -> pandas.DataFrame:
    """ArviZ's table of scores per datum, float64 ``[B]``: of ELPDs computed before, which is how it takes foreign ones."""
    import pandas
    import xarray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.0, once a day
        import arviz as az
    # Stacking takes exp of the scores, which is 0 below -745 nats. What a datum adds to every model's score changes neither
    # differences nor weights.
    best = np.max(list(scores.values()), axis=0)
    newer = getattr(az, "ELPDDataLOO", None)  # 1.x
    elpds: dict[str, Any] = {}
    for name, score in scores.items():
        per_datum = xarray.DataArray(score - best, dims="obs_id")
        total, n = float(per_datum.sum()), len(score)
        fields = {"se": math.nan, "n_samples": 1, "n_data_points": n, "warning": False, "scale": "log"}
        if newer is not None:
            elpds[name] = newer(elpd=total, p=math.nan, elpd_i=per_datum, good_k=math.nan, **fields)
        else:
            elpds[name] = az.ELPDData({"elpd_loo": total, "p_loo": math.nan, "loo_i": per_datum, **fields})
    options: dict[str, Any] = {"round_to": "none"} if newer is not None else {"ic": "loo", "scale": "log"}
    # The logarithm of 0 is right for a mixture without the one model that explains a datum.
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", DeprecationWarning)  # 0.23 uses what pandas 3 will drop
        compared = az.compare(elpds, method="stacking", **options)
    table = compared[["rank", "elpd_diff", "dse", "weight"]]
    table = table.assign(elpd_diff=0.0 - table["elpd_diff"].abs())  # 0.23: best - model; 1.x: model - best
    errors = {name: math.sqrt(len(score) * score.var()) for name, score in scores.items()}
    table.insert(1, bound, pandas.Series({name: score.sum() for name, score in scores.items()}))
    table.insert(2, "se", pandas.Series(errors))
    return table


def _elbo(terms: ELBOTerms, diffusion: GaussianDiffusion | None) -> xarray.Dataset:
    import xarray

    shared = terms.t.dim() == 1
    draws = ("chain", "draw", "obs_id")
    columns = "timestep" if shared else "column"
    variables: dict[str, tuple[Any, ...]] = {}
    for kl, suffix in (("monte_carlo", ""), ("analytic", "_analytic")):
        prior, steps, _ = terms.draws[kl]
        name = kl.replace("_", " ")
        variables[f"kl{suffix}"] = (
            (*draws, columns),
            _numpy(steps[None].float()),
            {**_NATS, "long_name": f"KL of a reverse step, {name}"},
        )
        variables[f"prior{suffix}"] = (
            draws,
            _numpy(prior[None]),
            {**_NATS, "long_name": f"KL of the noisiest state from the prior, {name}"},
        )
        variables[f"elbo{suffix}"] = (
            draws,
            -_numpy(terms.by(kl).parts()["total"][None]),
            {**_NATS, "long_name": f"evidence lower bound on log p(x_0), {name}"},
        )
    variables["reconstruction"] = (
        draws,
        _numpy(terms.draws[terms.kl][2][None]),
        {**_NATS, "long_name": "minus log p(x_0 | x_1) under q"},
    )
    t_dims = (*draws, columns)[-terms.t.dim() :]
    weights = {"long_name": "what a column is multiplied by in the sum over timesteps"}
    variables["weights"] = ((*draws, columns)[-terms.weights.dim() :], _numpy(terms.weights), weights)
    repeats, examples = terms.draws[terms.kl][0].shape
    coords: dict[str, Any] = {"chain": [0], "draw": range(repeats), "obs_id": range(examples)}
    if shared:
        coords["timestep"] = _numpy(terms.t)
    else:
        about = {"long_name": "timestep of a column"}
        variables["t"] = (t_dims, _numpy(terms.t), about)
    if diffusion is not None:
        of_t = _of_schedule(diffusion.schedule, terms.t)
        coords |= {name: (t_dims, of_t[name]) for name in ("snr", "log_snr", "sigma")}
    return xarray.Dataset(variables, coords)


def _log_likelihood(terms: ELBOTerms) -> xarray.Dataset:
    import xarray

    about = {
        **_NATS,
        "bound": "elbo",
        "kl": terms.kl,
        "comment": "lower bound on log p(x_0) by one fitted network, averaged over its draws; "
        "not the log-likelihood of a posterior draw, so PSIS-LOO and WAIC do not apply",
    }
    elbo = _numpy(terms.elbo)[None, None]
    coords = {"chain": [0], "draw": [0], "obs_id": range(elbo.shape[-1])}
    return xarray.Dataset({"elbo": (("chain", "draw", "obs_id"), elbo, about)}, coords)


def _add_weights(
    terms: ELBOTerms, diffusion: GaussianDiffusion | None, elbo: xarray.Dataset, log_likelihood: xarray.Dataset
) -> None:
    """The log importance weight of every chain, and the bound of all chains of an example."""
    steps = terms.t.shape[-1] + 1 if diffusion is None else diffusion.steps
    if not torch.equal(terms.t, torch.arange(2, steps + 1, device="cpu")) or not (terms.weights == 1).all():
        raise OptionError(f"chain=True needs terms with every timestep 2..{steps} once and weights of 1")
    log_weight = -terms.by("monte_carlo").parts()["total"]
    about = {**_NATS, "long_name": "log p(x_0, ..., x_T) - log q(x_1, ..., x_T | x_0)"}
    elbo["log_weight"] = (("chain", "draw", "obs_id"), _numpy(log_weight[None]), about)
    repeats = len(log_weight)
    iwae = torch.logsumexp(log_weight, 0) - math.log(repeats)
    of_bound = {**log_likelihood["elbo"].attrs, "bound": "iwae", "kl": "monte_carlo", "K": repeats}
    log_likelihood["iwae"] = (("chain", "draw", "obs_id"), _numpy(iwae)[None, None], of_bound)


def _table(name: str, table: pandas.DataFrame) -> xarray.Dataset:
    """Columns of numbers as variables, columns of text as coordinates, of dtypes that netCDF can hold."""
    import pandas
    import xarray

    variables: dict[str, tuple[Any, ...]] = {}
    coords: dict[str, Any] = {"row": range(len(table))}
    for key, column in table.items():
        column = column.infer_objects()
        missing = column.isna()
        present = column[~missing]
        numeric = pandas.api.types.is_numeric_dtype(column)
        if numeric and not missing.any():
            values = column.to_numpy()
        elif not numeric and all(isinstance(value, str) for value in present):
            coords[str(key)] = ("row", column.where(~missing, "").to_numpy(dtype=str))
            continue
        elif all(isinstance(value, int | float | np.number) for value in present):
            values = column.to_numpy(dtype=float, na_value=math.nan)
        else:
            raise OptionError(f"column {key!r} of table {name!r} holds neither numbers nor text alone")
        about = {"units": _UNITS[key]} if key in _UNITS else {}
        variables[str(key)] = ("row", values, about)
    return xarray.Dataset(variables, coords)


def _schedule(schedule: Schedule) -> xarray.Dataset:
    import xarray

    t = torch.arange(1, schedule.length + 1, device="cpu")
    values = {name: ("timestep", value) for name, value in _of_schedule(schedule, t).items()}
    betas = schedule.betas.detach()
    values["betas"] = ("timestep", _numpy(betas.flatten(1).mean(1) if betas.dim() > 1 else betas))
    return xarray.Dataset(values, {"timestep": _numpy(t)})


def _of_schedule(schedule: Schedule, t: Tensor) -> dict[str, Any]:
    """SNR and what follows from it at ``t``, arrays of its shape."""
    log_snr = schedule.log_snr(t).detach()
    if schedule.event_dim:
        log_snr = log_snr.flatten(-schedule.event_dim).mean(-1)
    return {
        "log_snr": _numpy(log_snr),
        "snr": _numpy(log_snr.exp()),
        "alpha_bar": _numpy(log_snr.sigmoid()),
        "sigma": _numpy((-log_snr).sigmoid().sqrt()),
    }


def _images(name: str, x: Tensor, dims: Sequence[str]) -> xarray.Dataset:
    """A variable of events, with an index for every batch dim."""
    import xarray

    event = _event(x.dim() - len(dims))
    coords = {dim: range(size) for dim, size in zip(dims, x.shape, strict=False)}
    return xarray.Dataset({name: ((*dims, *event), _numpy(x), {"units": "model units"})}, coords)


def _dataset(variables: Mapping[str, Plated], chains: int) -> xarray.Dataset:
    """Sites by chain and draw, given all chains one after another; a site's event dims have its name before theirs."""
    import xarray

    found, draws = {}, 0
    for name, (values, plates) in variables.items():
        _check_names([name, *plates], ("chain", "draw"), "a site or plate")
        values = values.unflatten(0, (chains, -1))
        draws = values.shape[1]
        event = (f"{name}_{dim}" for dim in _event(values.dim() - 2 - len(plates)))
        found[name] = (("chain", "draw", *plates, *event), _numpy(values))
    return xarray.Dataset(found, {"chain": range(chains), "draw": range(draws)} if found else {})


def _merged(group: xarray.Dataset, sites: xarray.Dataset) -> xarray.Dataset:
    """Variables of a group, and sites beside them."""
    shared = {"chain", "draw"}
    _check_names({*sites.variables, *sites.dims} - shared, {*group.variables, *group.dims} - shared, "a site or plate")
    return group.merge(sites)


def _check_names(names: Iterable[Any], taken: Collection[Any], whose: str) -> None:
    """Raise where a name is the tree's own, or a path in it."""
    for name in names:
        if name in taken or "/" in name:
            why = (
                "its name has a slash, which makes it a path"
                if "/" in name
                else "the tree has a variable or dim of that name"
            )
            raise OptionError(f"{whose} cannot be named {name!r} in a tree: {why}; rename it")


def _event(event_dim: int) -> tuple[str, ...]:
    """Names of an event's dims."""
    names = {1: ("feature",), 2: ("channel", "length"), 3: ("channel", "height", "width")}
    return names.get(event_dim, tuple(f"event_dim_{i}" for i in range(event_dim)))


def _check(name: str, x: Tensor, batch_dim: int, event: torch.Size | None) -> None:
    check_event(name, x, torch.Size() if event is None else event)
    if x.dim() < batch_dim or (event is not None and x.dim() != batch_dim + len(event)):
        wanted = {1: "[N, *event]", 2: "[K + 1, n, *event]"}[batch_dim]
        of_event = "" if event is None else f" with event {list(event)}"
        raise ShapeError(f"{name} has shape {list(x.shape)}, not {wanted}{of_event}")


def _numpy(x: Tensor) -> Any:
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()


def _tree(
    groups: Mapping[str, xarray.Dataset],
    about: Mapping[str, Any],
    diffusion: GaussianDiffusion | None,
    attrs: Mapping[str, Any] | None,
) -> xarray.DataTree:
    """The groups below a root, with attributes: of the library, the result, the model, and the user."""
    import xarray

    root = {
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "creation_library": "pyrodiff",
        "creation_library_version": __version__,
        "torch_version": str(torch.__version__),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
        **_of_model(diffusion),
    }
    for name, value in (attrs or {}).items():
        root[name] = _attribute(name, value)
    for group in groups.values():  # ArviZ looks at the groups, not at the root
        group.attrs = root | group.attrs
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=root), **groups})


def _of_model(diffusion: GaussianDiffusion | None) -> dict[str, Any]:
    if diffusion is None:
        return {}
    config = diffusion.config
    if len(json.dumps(config)) > _MAX_ATTRIBUTE:  # a long table of betas, which constant_data has
        config = {**config, "schedule": {"schedule": type(diffusion.schedule).__name__}}
    attrs = {"diffusion": _attribute("diffusion", config), "network": type(diffusion.net).__name__}
    if isinstance(net_config := getattr(diffusion.net, "config", None), Mapping):
        attrs["network_config"] = _attribute("network_config", dict(net_config))
    return attrs


def _attribute(name: str, value: Any) -> str | int | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise OptionError(f"attribute {name!r} of type {type(value).__name__} is no JSON: {error}") from error
    if isinstance(value, str) and len(value.encode()) > _MAX_ATTRIBUTE:
        raise OptionError(f"attribute {name!r} has {len(value)} characters; netCDF keeps {_MAX_ATTRIBUTE}")
    return value
