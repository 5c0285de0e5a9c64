"""What the README names is there. (Its Python runs with that of all pages.)"""

import re
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

import pyrodiff

README = Path(__file__).parents[1] / "README.md"


def test_every_name_the_readme_uses_exists():
    text = README.read_text(encoding="utf-8")
    for name in set(re.findall(r"pyrodiff\.(\w+)", text)) - {"yaml"}:
        assert hasattr(pyrodiff, name), name
    for link in re.findall(r"\]\(((?:docs|examples|pyrodiff|[A-Z]+\.md)[^)#]*)\)", text):
        assert (README.parent / link).exists(), link


def test_the_known_good_versions_are_for_every_python_3_11():
    """Where one asks for 3.11.5, pip on an older one looks for another solution, for hours."""
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (README.parent / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    asked = {
        (d.name.lower().replace("_", "-"), d.version): d.metadata["Requires-Python"] for d in metadata.distributions()
    }
    found = {pin: asked[key] for pin in pins if (key := (pin[0].lower().replace("_", "-"), pin[1])) in asked}
    assert len(found) > 50
    assert [(pin, python) for pin, python in found.items() if python and "3.11.0" not in SpecifierSet(python)] == []
