r"""Terms of the bound and samples as a labelled tree of arrays, for ArviZ and whatever else reads netCDF.

The tree is written with xarray alone. Both generations of ArviZ read it, from a file by
``az.from_netcdf(path)``, from memory::

    tree = pyrodiff.to_datatree(terms, diffusion=diffusion, x0=x0)
    data = az.from_datatree(tree) if hasattr(az, "from_datatree") else tree   # 0.23, or 1.x
    az.summary(data, group="elbo", var_names=["elbo"], kind="stats")          # "diagnostics" need 2 chains

Groups:

* ``elbo``: the ledger of :func:`~pyrodiff.elbo_terms`, in nats, one draw per repeat.
* ``log_likelihood``: the bound on :math:`\log p(x_0)` per datum, ``elbo``, never
  :math:`\log p(x_0 \mid x_1)`. It is a score for one fitted network, with a single draw and without
  a ``posterior`` group, so that ``az.loo``, which would be wrong here, refuses it: there is no
  posterior over parameters to leave a datum out of, and over the latents
  :math:`x_1, \dots, x_T`, which belong to one datum each, PSIS-LOO is far off.
* ``observed_data``, ``constant_data``: the data scored, and the schedule.
* ``prior_predictive``: unconditional samples.
* ``trajectories``: paths of the sampler, noisiest state first.

References:
    ArviZ InferenceData schema. https://python.arviz.org/en/stable/schema/schema.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from ._tensor import check_event
from ._version import __version__
from .diffusion import GaussianDiffusion
from .elbo import ELBOTerms
from .errors import OptionError, ShapeError
from .schedules import Schedule

if TYPE_CHECKING:  # 0.6 s that `import pyrodiff` should not take
    import xarray

__all__ = ["to_datatree", "write"]

# HDF5 keeps attributes in an object header of 64 KiB.
_MAX_ATTRIBUTE = 32_000
_NATS = {"units": "nats"}


def to_datatree(
    terms: ELBOTerms,
    *,
    diffusion: GaussianDiffusion | None = None,
    x0: Tensor | None = None,
    samples: Tensor | None = None,
    trajectories: Tensor | None = None,
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
        attrs: further attributes of the root, which replace ours; numbers and strings are kept,
            other values become JSON.

    Returns:
        The tree. The terms per step and all images are float32, the sums over steps float64.

    Raises:
        ShapeError: a tensor does not fit the terms or the model.
        OptionError: an attribute is no JSON, or longer than 32,000 characters.
    """
    import xarray

    groups = {"elbo": _elbo(terms, diffusion), "log_likelihood": _log_likelihood(terms)}
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
    root = _root_attrs(terms, diffusion)
    for name, value in (attrs or {}).items():
        root[name] = _attribute(name, value)
    for group in groups.values():  # ArviZ looks at the groups, not at the root
        group.attrs = root | group.attrs
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=root), **groups})


def write(tree: xarray.DataTree, path: str | os.PathLike[str]) -> None:
    """Write a tree as netCDF; a file under ``path`` is replaced at once, or left as it was.

    Args:
        tree: what :func:`to_datatree` returned.
        path: file to write.

    Raises:
        OSError: the folder is missing, or cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tree.to_netcdf(temporary, engine="h5netcdf")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _schedule(schedule: Schedule) -> xarray.Dataset:
    import xarray

    t = torch.arange(1, schedule.steps + 1)
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
    """A variable of float32 events, with an index for every batch dim."""
    import xarray

    event_dim = x.dim() - len(dims)
    names = {1: ("feature",), 3: ("channel", "height", "width")}
    event = names.get(event_dim, tuple(f"event_dim_{i}" for i in range(event_dim)))
    coords = {dim: range(size) for dim, size in zip(dims, x.shape, strict=False)}
    values = _numpy(x.float())
    return xarray.Dataset({name: ((*dims, *event), values, {"units": "model units"})}, coords)


def _check(name: str, x: Tensor, batch_dim: int, event: torch.Size | None) -> None:
    check_event(name, x, torch.Size() if event is None else event)
    if x.dim() < batch_dim or (event is not None and x.dim() != batch_dim + len(event)):
        wanted = {1: "[N, *event]", 2: "[K + 1, n, *event]"}[batch_dim]
        of_event = "" if event is None else f" with event {list(event)}"
        raise ShapeError(f"{name} has shape {list(x.shape)}, not {wanted}{of_event}")


def _numpy(x: Tensor) -> Any:
    return x.detach().cpu().numpy()


def _root_attrs(terms: ELBOTerms, diffusion: GaussianDiffusion | None) -> dict[str, Any]:
    attrs: dict[str, Any] = {
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "creation_library": "pyrodiff",
        "creation_library_version": __version__,
        "torch_version": str(torch.__version__),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "kl": terms.kl,
        "dims_per_example": terms.dims,
        "network_evaluations": terms.network_evaluations,
    }
    if diffusion is None:
        return attrs
    config = diffusion.config
    if len(json.dumps(config)) > _MAX_ATTRIBUTE:  # a long table of betas, which constant_data has
        config = {**config, "schedule": {"schedule": type(diffusion.schedule).__name__}}
    attrs["diffusion"] = _attribute("diffusion", config)
    attrs["network"] = type(diffusion.net).__name__
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
