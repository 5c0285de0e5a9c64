"""The structure of the library: what imports what, what an import does, what is never written."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pyrodiff

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyrodiff"
FILES = sorted(PACKAGE.rglob("*.py"))

# The level table. A module may import from rows above its own, and leftward within its row.
ROWS = (
    ("errors", "_tensor", "_files", "_version"),
    ("schedules", "distributions", "nets"),
    ("forward",),
    ("reverse",),
    ("diffusion",),
    ("timesteps", "elbo", "draws", "sample", "likelihood", "classifier"),
    ("inference",),
    ("training",),
    ("interop", "inference_data", "plots", "laboratory", "report", "cli", "__main__"),
)
POSITION = {name: (r, c) for r, row in enumerate(ROWS) for c, name in enumerate(row)}

# Optional or slow to import, or both: only inside the functions that use them.
LAZY = frozenset(
    "arviz diffusers graphviz lightning lightning_fabric matplotlib pandas PIL sklearn torchdiffeq".split()
)
# These may be either: core dependencies that cost a noticeable part of a second.
LAZY_OR_NOT = frozenset("h5netcdf jsonargparse safetensors tqdm xarray yaml".split())

PICKLES = frozenset("pickle cPickle _pickle dill cloudpickle joblib shelve marshal".split())


def unit(path: Path) -> str:
    """The entry of ROWS that a file belongs to: 'forward', 'nets' for nets/unet.py, '__init__'."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.Module, package: list[str]) -> Iterator[tuple[str, bool, int]]:
    """Yield (dotted name, whether it runs when the module is imported, line) for every import.

    ``package`` is the package of the module, which relative imports start from. ``from a import b``
    yields ``a.b``: b may be a module.
    """

    def walk(node: ast.AST, eager: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, eager, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            for alias in node.names:
                yield ".".join([*base, alias.name]), eager, node.lineno
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from walk(child, eager and not lazy)

    yield from walk(tree, True)


def misplaced_imports(source: str, here: str, package: list[str]) -> list[str]:
    """What is wrong with the imports of a module that belongs to the entry ``here``."""
    found = []
    for name, eager, line in imports(ast.parse(source), package):
        top, _, rest = name.partition(".")
        if top == "pyrodiff":
            there = rest.split(".")[0]
            if here in ("__init__", there):
                continue
            if there not in POSITION:
                found.append(f"line {line}: {name!r}: import the module that defines it")
            elif not eager and there == "interop":
                continue
            elif not eager and POSITION[there][0] <= POSITION[here][0]:
                continue
            elif POSITION[there] >= POSITION[here]:
                found.append(f"line {line}: {here} imports {there}, which is not below it")
        elif top in LAZY and eager:
            found.append(f"line {line}: {top} is imported at module level")
        elif top not in LAZY | LAZY_OR_NOT and not eager:
            found.append(f"line {line}: {top} is imported lazily: move it to the top")
        elif top == "pyro" and here == "nets":
            found.append(f"line {line}: networks know nothing of Pyro")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_level_table(path: Path):
    here = unit(path)
    assert here == "__init__" or here in POSITION, f"{path.name} has no place in ROWS: give it one"
    package = list(path.relative_to(ROOT).parent.parts)
    assert misplaced_imports(path.read_text("utf-8"), here, package) == []


@pytest.mark.parametrize(
    "here, source",
    [
        ("forward", "from .reverse import ReverseKernel"),
        ("forward", "import pyrodiff.reverse"),
        ("forward", "from pyrodiff import reverse"),
        ("forward", "from . import reverse"),
        ("forward", "from pyrodiff import GaussianDiffusion"),
        ("forward", "def f():\n    from .reverse import ReverseKernel"),
        ("forward", "class A:\n    from .reverse import ReverseKernel"),
        ("schedules", "from .distributions import DiscretizedNormal"),  # rightward
        ("training", "from . import interop"),
        ("elbo", "import arviz as az"),
        ("plots", "try:\n    import matplotlib.pyplot as plt\nexcept ImportError:\n    plt = None"),
        ("plots", "def f():\n    import numpy"),
        ("nets", "from pyro.nn import PyroModule"),
    ],
)
def test_misplaced_imports_are_found(here: str, source: str):
    assert len(misplaced_imports(source, here, ["pyrodiff"])) == 1


# What makes a tensor of numbers: on torch's default device, unless it is told where.  Parameters and buffers follow that
# default, as torch.nn's do; anything else would be on the CPU in most tests, and elsewhere for those who set another default.
MAKERS = {*"arange empty eye full linspace logspace ones rand randint randn randperm tensor zeros".split()}
MODULE_STATE = {"Parameter", "PyroParam", "register_buffer"}


def without_a_device(source: str) -> list[str]:
    """Calls that make a tensor, and do not say where, outside of the constructors of modules."""

    def walk(node: ast.AST) -> Iterator[ast.Call]:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
            if not any(keyword.arg == "device" for keyword in node.keywords):
                yield node
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in MODULE_STATE:
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return [f"line {call.lineno}: {ast.unparse(call)}" for call in walk(ast.parse(source))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_tensor_is_made_where_it_says(path: Path):
    found = without_a_device(path.read_text("utf-8"))
    assert found == []  # device=x0.device, device="cpu", x0.new_zeros(...)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.zeros(3)", 1),
        ("torch.zeros(torch.arange(3).sum(), device=x.device)", 1),
        ("torch.rand(3, device='cpu') + x.new_zeros(3) + torch.full_like(x, 2.0)", 0),
        ("self.scale = nn.Parameter(torch.zeros(3))", 0),
        ("self.register_buffer('scale', torch.zeros(3))", 0),
    ],
)
def test_tensors_made_anywhere_are_found(source: str, count: int):
    assert len(without_a_device(source)) == count


@pytest.mark.parametrize(
    "here, source",
    [
        ("reverse", "from .forward import ForwardProcess\nimport torch"),
        ("distributions", "from .schedules import Schedule"),  # leftward
        ("elbo", "def f():\n    from .sample import sample"),  # lazily within the row
        ("training", "def f():\n    from .interop import guided_diffusion"),
        ("plots", "def f():\n    import matplotlib.pyplot as plt"),
        ("plots", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("cli", "from . import sample, training"),
    ],
)
def test_imports_in_place_are_accepted(here: str, source: str):
    assert misplaced_imports(source, here, ["pyrodiff"]) == []


def offences(source: str) -> list[str]:
    """What a file of the library never contains: pickle, its disguises, assert, bare except."""
    found = []

    def has(call: ast.Call, keyword: str, value: bool) -> bool:
        return any(
            k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords
        )

    for node in ast.walk(ast.parse(source)):
        what = None
        if isinstance(node, ast.Import):
            if any(a.name.split(".")[0] in PICKLES for a in node.names):
                what = "pickle"
        elif isinstance(node, ast.ImportFrom):
            top = (node.module or "").split(".")[0]
            if top in PICKLES:
                what = "pickle"
            elif top in ("numpy", "torch", "yaml") and any(a.name == "load" for a in node.names):
                what = f"load taken out of {top}: call {top}.load, so that this test sees how"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, method = ast.unparse(node.func.value), node.func.attr
            if owner == "torch" and method == "load" and not has(node, "weights_only", True):
                what = "torch.load without weights_only=True"
            elif owner in ("np", "numpy") and method == "load":
                given = [k for k in node.keywords if k.arg == "allow_pickle" or k.arg is None]
                if len(node.args) > 2 or (given and not has(node, "allow_pickle", False)):
                    what = "np.load with allow_pickle"
            elif owner == "yaml" and method.endswith("load") and method != "safe_load":
                what = f"yaml.{method}: use yaml.safe_load"
            elif owner == "yaml" and method.endswith("load_all") and method != "safe_load_all":
                what = f"yaml.{method}: use yaml.safe_load_all"
            elif method in ("load", "save") and any(s in owner for s in ("param_store", "ParamStore", "_PARAM_STORE")):
                what = "a parameter store's file is a pickle"
        elif isinstance(node, ast.Assert):
            what = "assert: python -O removes it"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            what = "bare except"
        if what:
            found.append(f"line {node.lineno}: {what}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_library_never_contains(path: Path):
    assert offences(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle as jp",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "from torch import load",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "np.load(f, None, True)",
        "np.load(f, **options)",
        "yaml.load(f, Loader)",
        "yaml.unsafe_load(f)",
        "yaml.full_load_all(f)",
        "pyro.get_param_store().load(f)",
        "ParamStoreDict().save(f)",
        "assert x",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_offences_are_found(source: str):
    assert len(offences(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f, map_location=m, weights_only=True)",
        "np.load(f)",
        "np.load(f, allow_pickle=False)",
        "yaml.safe_load(f)",
        "json.load(f)",
        "try:\n    f()\nexcept Exception:\n    raise",
    ],
)
def test_sound_code_is_no_offence(source: str):
    assert offences(source) == []


def test_importing_is_silent_and_changes_nothing():
    program = textwrap.dedent(
        """
        import random, sys, warnings
        import numpy as np
        import pyro, torch

        def state():
            return {
                "torch default dtype": torch.get_default_dtype(),
                "torch default device": torch.get_default_device(),
                "torch threads": torch.get_num_threads(),
                "gradient mode": torch.is_grad_enabled(),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "distributions validate": torch.distributions.Distribution._validate_args,
                "pyro settings": pyro.settings.get(),
                "param store": list(pyro.get_param_store()),
                "random": random.getstate(),
                "numpy": repr(np.random.get_state(legacy=False)),
                "torch rng": torch.get_rng_state().tolist(),
                "warning filters": list(warnings.filters),
            }

        before, modules = state(), set(sys.modules)
        import pyrodiff
        after = state()
        changed = [k for k in before if before[k] != after[k]]
        # what is new: Pyro itself imports graphviz where it is installed
        heavy = sorted((set(sys.modules) - modules) & set(sys.argv[1].split()))
        if changed or heavy:
            sys.exit(f"changed: {changed}; imported: {heavy}")
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, " ".join(LAZY)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_all_is_sorted_and_lists_every_public_name():
    names = getattr(pyrodiff, "__all__", [])
    assert list(names) == sorted(names)
    missing = [name for name in names if not hasattr(pyrodiff, name)]
    assert missing == []
    # a submodule is an attribute as soon as anything imports it; it is public if __all__ says so
    public = {
        name
        for name, value in vars(pyrodiff).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"  # from __future__
    }
    assert public - set(names) == set()
