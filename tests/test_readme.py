"""The Python of README and documents, verbatim."""

import re
from pathlib import Path

import pyro
import pytest

import pyrodiff

README = Path(__file__).parents[1] / "README.md"


def blocks(page: Path = README):
    text = page.read_text(encoding="utf-8")
    return re.findall(r"(?<!<!-- skip -->\n)```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_readme_runs(capsys):
    code = blocks()
    assert len(code) == 5
    scope = {}
    for block in code:
        exec(compile(block, str(README), "exec"), scope)
    assert "bits/dim (±" in capsys.readouterr().out
    assert scope["images"].shape == (16, 1, 8, 8)
    assert scope["draws"].shape == (3, 1, 1, 8, 8)
    assert scope["sevens"].shape == (2, 1, 8, 8)
    assert scope["best"].efficiency.iloc[0] >= scope["best"].efficiency.iloc[1] > 0
    assert scope["posterior"].particles.shape == (2, 50, 1, 8, 8)
    assert scope["loss"] == scope["loss"]  # no nan
    names = [n for n, s in scope["trace"].nodes.items() if n.startswith("x_")]
    assert names == [f"x_{t}" for t in range(10, 0, -1)]


def test_every_name_the_readme_uses_exists():
    text = README.read_text(encoding="utf-8")
    for name in set(re.findall(r"pyrodiff\.(\w+)", text)) - {"yaml"}:
        assert hasattr(pyrodiff, name), name
    for link in re.findall(r"\]\(((?:docs|examples|pyrodiff|[A-Z]+\.md)[^)#]*)\)", text):
        assert (README.parent / link).exists(), link


@pytest.mark.parametrize("name", ["reverse_chain"])
def test_a_page_runs(name):
    page = README.parent / "docs" / f"{name}.md"
    scope = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), scope)
    pyro.clear_param_store()
