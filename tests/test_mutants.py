"""Every mutant of `mutants.py` is killed by the test that it names, and that test passes without it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS
from mutation import ROOT, Outcome


def test_every_mutant_changes_one_place_and_names_a_test():
    tests = {}
    for mutant in MUTANTS:
        ast.parse(mutant.source)  # raises unless the old text is there once
        file, name = mutant.killer.split("[")[0].split("::")
        if file not in tests:
            body = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
            tests[file] = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        assert name in tests[file], f"{mutant.name}: {mutant.killer} is no test"
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for every mutant")
@pytest.mark.reliability("Q10")
@pytest.mark.parametrize("half", [0, 1])
def test_every_mutant_is_killed_by_its_test(figure, half: int, tmp_path: Path):
    mutants, found = MUTANTS[half::2], tmp_path / "found.json"
    # A process of its own, because in this one the library is imported already; without this run's options.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    subprocess.run([sys.executable, ROOT / "tests" / "mutants.py", f"{half}::2", found], check=True, env=own)
    unchanged, *outcomes = (Outcome(*fields) for fields in json.loads(found.read_text()))
    assert unchanged.verdict == "survived", f"without any mutant: {unchanged}"
    assert unchanged.passed >= len({mutant.killer for mutant in mutants})
    killed = [outcome.verdict == "killed" for outcome in outcomes]
    alive = [f"{m.name}: {o}" for m, o, k in zip(mutants, outcomes, killed, strict=True) if not k]
    figure.count("Q10", "formula mutants killed by the test they name", sum(killed), at_least=60)
    assert not alive, "\n".join(alive)
