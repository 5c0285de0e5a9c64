"""The tests marked gpu, on a CUDA device that is simulated in the CPU's memory: in a process of its own, where there is a compiler."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
MARKED = sorted(
    path for path in TESTS.glob("test_*.py") if "mark.gpu" in path.read_text("utf-8") and path != Path(__file__)
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch has CUDA of its own: make gpu")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.skipif(not Path(sysconfig.get_paths()["include"], "Python.h").exists(), reason="needs Python's headers")
def test_the_gpu_tests_pass_on_a_simulated_device():
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "simulated_cuda",
        "-p",
        "no:cacheprovider",
        "-q",
        "-m",
        "gpu",
        *MARKED,
    ]
    found = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]
    passed = re.search(r"(\d+) passed", found.stdout)
    assert passed and int(passed[1]) > 80
    assert "skipped" not in found.stdout
