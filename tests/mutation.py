"""Runs tests on copies of the library with something changed, and says whether they notice.

A process that has imported what the tests import, but not the library, is forked for every mutant; the child puts its own copy of
the package first in `sys.path` and runs pytest, for a third of a second beside the test's own time.
"""

from __future__ import annotations

import compileall
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyrodiff"
MEMORY = 12 * 2**30  # bytes of address space: a mutant that asks for more has been noticed


class Job(NamedTuple):
    """A copy of the library, and the tests to run on it until one fails."""

    tests: Sequence[str]
    file: str = ""  # relative to the package; empty: nothing is changed
    source: str = ""  # its new text
    limit: float = 300.0  # seconds


class Outcome(NamedTuple):
    """What became of a job.

    Attributes:
        verdict: "survived" (every test passed), "killed" (one failed, when it was called), "broken" (one failed before that: in
            a fixture, in an import), "timeout", or "no test" (none ran).
        test: the one that failed.
        why: its error, in a line.
        passed: tests that passed.
        seconds: wall time.
    """

    verdict: str
    test: str
    why: str
    passed: int
    seconds: float


class Seen:
    """A plugin of pytest: the first failure, and how many passed."""

    def __init__(self) -> None:
        self.verdict, self.test, self.why, self.passed = "no test", "", "", 0

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.look(report, "broken")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.look(report, "killed" if report.when == "call" else "broken")
        if report.passed and report.when == "call":
            self.passed += 1
            self.verdict = "survived" if self.verdict == "no test" else self.verdict

    def look(self, report: Any, verdict: str) -> None:
        if report.failed and self.verdict not in ("killed", "broken"):
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else str(report.longrepr)
            self.verdict, self.test, self.why = verdict, report.nodeid, why.strip().split("\n")[0][:200]


def attempt(job: Job, package: Path, folder: Path) -> None:
    """In a child: run the job's tests, and leave a file that says what happened."""
    os.setsid()  # a group of its own, which ends with it
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(folder / "output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    shutil.copytree(package, folder / "copy" / "pyrodiff")
    if job.file:
        (folder / "copy" / "pyrodiff" / job.file).write_text(job.source, encoding="utf-8")
    os.environ["PYTHONPATH"] = str(folder / "copy")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    sys.path.insert(0, str(folder / "copy"))
    os.chdir(ROOT)
    seen, began = Seen(), time.perf_counter()
    plugins = ("randomly", "cacheprovider", "xdist")
    ignored = "-Wignore:Module already imported:pytest.PytestAssertRewriteWarning"  # plugins of pytest, by the parent
    pytest.main([*job.tests, "-x", "-q", "--tb=native", ignored, *(f"-pno:{name}" for name in plugins)], plugins=[seen])
    if not sys.modules["pyrodiff"].__file__.startswith(str(folder)):
        seen.verdict = "another copy of the library was imported"
    (folder / "imported").write_text(
        "\n".join(n for n, m in sys.modules.items() if "site-packages" in str(vars(m).get("__file__")))
    )
    outcome = Outcome(seen.verdict, seen.test, seen.why, seen.passed, time.perf_counter() - began)
    (folder / "outcome").write_text(json.dumps(outcome), encoding="utf-8")


def preload(names: Sequence[str]) -> None:
    """Imports what the tests of an unchanged library have imported, so that children need not."""
    with warnings.catch_warnings(action="ignore"):
        for name in names:
            with contextlib.suppress(Exception):  # some modules are there only as attributes of others
                importlib.import_module(name)
    gc.freeze()  # for the children's collector to pass over


def run(
    jobs: Sequence[Job], workers: int = 2, tell: Callable[[int, Outcome], None] = lambda i, out: None
) -> list[Outcome]:
    """The outcomes of the jobs, some at a time; ``tell`` hears of each when it is there. The first should change nothing."""
    if "pyrodiff" in sys.modules:
        raise RuntimeError("the library is imported already: its copies would not be")
    fork = multiprocessing.get_context("fork")
    found: dict[int, Outcome] = {}
    waiting, running = list(range(len(jobs)))[::-1], dict[int, tuple[BaseProcess, float]]()
    with tempfile.TemporaryDirectory(prefix="pyrodiff-mutants-") as name:
        folders = [Path(name) / str(i) for i in range(len(jobs))]
        package = Path(name) / "pyrodiff"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(package, quiet=2)  # copies keep the times, and so what is compiled
        while waiting or running:
            while waiting and len(running) < (workers if found else 1):
                i = waiting.pop()
                folders[i].mkdir()
                process = fork.Process(target=attempt, args=(jobs[i], package, folders[i]))
                process.start()
                running[i] = process, time.monotonic() + jobs[i].limit
            wait([process.sentinel for process, _ in running.values()], timeout=1.0)
            for i, (process, end) in list(running.items()):
                late = time.monotonic() > end
                if process.is_alive() and not late:
                    continue
                if process.is_alive():
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
                del running[i]
                found[i] = Outcome("timeout" if late else "crashed", "", "", 0, jobs[i].limit)
                if (folders[i] / "outcome").exists():
                    found[i] = Outcome(*json.loads((folders[i] / "outcome").read_text()))
                    if not jobs[i].file:
                        preload((folders[i] / "imported").read_text().split())
                shutil.rmtree(folders[i])
                tell(i, found[i])
    return [found[i] for i in range(len(jobs))]
