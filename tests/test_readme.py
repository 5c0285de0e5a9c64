"""What the README names is there. (Its Python runs with that of all pages.)"""

import re
from pathlib import Path

import pyrodiff

README = Path(__file__).parents[1] / "README.md"


def test_every_name_the_readme_uses_exists():
    text = README.read_text(encoding="utf-8")
    for name in set(re.findall(r"pyrodiff\.(\w+)", text)) - {"yaml"}:
        assert hasattr(pyrodiff, name), name
    for link in re.findall(r"\]\(((?:docs|examples|pyrodiff|[A-Z]+\.md)[^)#]*)\)", text):
        assert (README.parent / link).exists(), link
