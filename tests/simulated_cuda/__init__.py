"""A simulated CUDA device, for builds of PyTorch without CUDA: ``PYTHONPATH=tests python -m pytest -p simulated_cuda -m gpu``.

``device.cpp`` says what is simulated and what is not. It is compiled once for each version of PyTorch and Python, into ``build/``,
and loaded before PyTorch is: the first thing that asks PyTorch for CUDA settles what it gets.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAME = "simulated_cuda_device"


def compiled() -> Path:
    """The device's library, compiled unless it has been."""
    source = HERE / "device.cpp"
    tag = f"{version('torch')}-{sys.implementation.cache_tag}"
    library = HERE.parents[1] / "build" / f"{NAME}-{tag}.so"
    if library.exists() and library.stat().st_mtime >= source.stat().st_mtime:
        return library
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("the simulated CUDA device needs a C++ compiler")
    spec = importlib.util.find_spec("torch")
    root = Path(spec.submodule_search_locations[0])  # without importing it
    include = [root / "include", root / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    library.parent.mkdir(exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")
    print("compiling the simulated CUDA device, about a minute", file=sys.stderr)
    subprocess.run(
        [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-w", f"-DTORCH_EXTENSION_NAME={NAME}"]
        + [f"-I{folder}" for folder in include]
        + [source, "-o", part, f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
        + [f"-l{name}" for name in ("c10", "torch", "torch_cpu", "torch_python")],
        check=True,
    )  # fmt: skip
    part.rename(library)
    return library


library = compiled()
if "torch" in sys.modules:
    raise RuntimeError("simulated_cuda must be imported before torch")
ctypes.CDLL(str(library))

import torch  # noqa: E402

if torch.backends.cuda.is_built():
    raise RuntimeError("this PyTorch has CUDA of its own")
loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
device = importlib.util.module_from_spec(importlib.util.spec_from_loader(NAME, loader))
loader.exec_module(device)
generator = device.default_generator()


class OnlyDevice:
    """In the place of ``torch.cuda.device``."""

    def __init__(self, device: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


# What torch.cuda asks its own library, which this build has not.
for name, value in {
    "_is_in_bad_fork": lambda: False,
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "default_generators": (generator,),
    "device": OnlyDevice,
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_name": lambda device=None: "simulated",
    "get_rng_state": lambda device=None: generator.get_state(),
    "initial_seed": generator.initial_seed,
    "is_available": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "is_current_stream_capturing": lambda: False,
    "is_initialized": lambda: True,
    "manual_seed": generator.manual_seed,
    "manual_seed_all": generator.manual_seed,
    "set_device": lambda device: None,
    "set_rng_state": lambda state, device=None: generator.set_state(state),
    "synchronize": lambda device=None: None,
}.items():
    setattr(torch.cuda, name, value)
