"""What every test gets: one thread, its own seeds, a check that no global state changed."""

from __future__ import annotations

import os
import random
import tempfile
import warnings
import zlib
from pathlib import Path

# Before torch, matplotlib and ArviZ are imported: they read these once. Threads of parallel workers
# would fight for the cores; caches go to a folder of this run, so that a test neither depends on
# nor changes the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="pyrodiff-tests-", ignore_cleanup_errors=True)
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["MPLCONFIGDIR"] = str(Path(_CACHE.name) / "matplotlib")

import numpy as np
import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK
from reliability import Report, figure, marked  # noqa: F401  (a fixture)

pytest_plugins = ["monte_carlo"]

torch.set_num_threads(1)

try:
    import hypothesis
except ImportError:  # a GPU machine's bare pytest: tests that need it skip themselves
    hypothesis = None
else:
    # derandomize: like every other test, a property test is the same from run to run
    hypothesis.settings.register_profile("pyrodiff", deadline=None, derandomize=True, database=None, print_blob=True)
    hypothesis.settings.load_profile("pyrodiff")

# Shifts every test's seeds, to see that no statistical test was tuned to one draw.
SEED_OFFSET = int(os.environ.get("PYRODIFF_TEST_SEED", "0"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-validation", action="store_true", help="run with Pyro's validation switched off")
    parser.addoption("--report", metavar="FILE", help="what was measured against what is required, as a table")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-randomly shuffles the tests; the seeds inside them are ours (its own would come later)
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False
    # the default follows __debug__; here the option alone decides, also under `python -O`
    pyro.enable_validation(not config.getoption("--no-validation"))
    if (file := config.getoption("--report")) and not hasattr(config, "workerinput"):  # a worker's reports come here
        config.pluginmanager.register(Report(file, coverage=bool(config.getoption("cov_source", None))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if rows := marked(item):
            item.user_properties.append(("rows", sorted(rows)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver older than torch's CUDA: no device, like none at all
        available = torch.cuda.is_available()
    if available:
        return
    no_cuda = pytest.mark.skip(reason="needs CUDA, and torch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)


def seed_everything(name: str) -> None:
    seed = (zlib.crc32(name.encode()) + SEED_OFFSET) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest):
    """Seed a fixture that tests share by its own name, not by that of the test that came first."""
    if fixturedef.scope == "function":
        return (yield)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]")
    try:
        return (yield)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def global_state() -> dict[str, object]:
    """What a library must leave as it found it."""
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's threads": torch.get_num_threads(),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "depth of Pyro's handler stack": len(_PYRO_STACK),
        # all of Pyro's validation flags, and module_local_params
        **{f"pyro.settings {name}": value for name, value in pyro.settings.get().items()},
    }


def restore(state: dict[str, object]) -> None:
    torch.set_default_dtype(state["torch's default dtype"])
    torch.set_default_device(None)
    torch.set_grad_enabled(state["gradient mode"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])
    torch.set_num_threads(state["torch's threads"])
    torch.distributions.Distribution._validate_args = state["validation of distributions"]
    del _PYRO_STACK[state["depth of Pyro's handler stack"] :]
    prefix = "pyro.settings "
    pyro.settings.set(**{k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


@pytest.fixture(autouse=True)
def clean_slate(request: pytest.FixtureRequest):
    """Seeds from the test's name, an empty parameter store; afterwards, unchanged global state."""
    seed_everything(request.node.nodeid)
    pyro.clear_param_store()
    before = global_state()
    yield
    after = global_state()
    pyro.clear_param_store()
    changed = [f"{k} ({before[k]} -> {after[k]})" for k in before if before[k] != after[k]]
    if changed:
        restore(before)  # the tests after this one are not to blame
        pytest.fail("the test left global state changed: " + ", ".join(changed), pytrace=False)


@pytest.fixture(autouse=True)
def full_precision(request: pytest.FixtureRequest):
    """TensorFloat-32, cuDNN's default, keeps ten bits of a product: no ground for comparing with a CPU, or two batch sizes."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = products.fp32_precision, convolutions.fp32_precision
    products.fp32_precision = convolutions.fp32_precision = "ieee"
    yield
    products.fp32_precision, convolutions.fp32_precision = before
