"""The documentation's sources: pages and links. (`make docs` executes the course.)"""

import importlib
import inspect
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page.relative_to(DOCS) for page in DOCS.rglob("*.md") if "_build" not in page.parts)
README = DOCS.parent / "README.md"
CHINESE = {DOCS / page: DOCS / "course" / page.name for page in PAGES if page.parts[0] == "zh"}
CHINESE[DOCS.parent / "README.zh.md"] = README
SEEN = {"course": "*What to see:", "zh": "*看点："}  # what the text of a picture begins with, by folder
MODULES = sorted(
    ".".join(path.relative_to(DOCS.parent).with_suffix("").parts)
    for path in (DOCS.parent / "pyrodiff").rglob("[!_]*.py")
)
# Whose docstrings name tensors of other functions, which give the shapes, or tensors of any shape.
SHAPES_ELSEWHERE = {
    "pyrodiff.draws": {"independent"},  # chain
    "pyrodiff.inference.predictive": {"known"},  # any
    "pyrodiff.inference.proposals": {"MCGDiff", "Replacement", "Twisted"},  # Bootstrap
    "pyrodiff.laboratory.gradients": {"parameter_groups", "questions"},  # compare_gradients
    "pyrodiff.laboratory.values": {"value_estimators"},  # compare_estimators
    "pyrodiff.likelihood.estimate": {"seeded"},  # any
    "pyrodiff.sample": {"ancestral", "ddim", "dpm_2m", "heun"},  # Move
    "pyrodiff.schedules": {"Curve", "LogLinearSchedule", "RespacedSchedule"},  # Schedule
    "pyrodiff.training.ema": {"EMA"},  # a module's parameters
}


def cells(page: Path) -> list[str]:
    return re.findall(
        r"```\{code-cell\} ipython3\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL
    )


def test_every_page_is_in_one_table_of_contents():
    listed = ["index"]
    for page in PAGES:
        for toctree in re.findall(
            r"```\{toctree\}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL
        ):
            entries = [line for line in toctree.split("\n") if line and not line.startswith(":")]
            listed += [(page.parent / entry).as_posix() for entry in entries]
    assert sorted(listed) == sorted(page.with_suffix("").as_posix() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?:path:)?([^)\s#]+)(?:#[^)\s]*)?\)", text):
        if "://" not in target:
            assert (DOCS / page.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.parts[0] in SEEN], ids=str)
def test_pictures_of_the_course_say_what_to_see(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    pictures = [m.end() for m in re.finditer(r"(?:plt\.show|display)\(.*\)\n```\n\n", text)]
    assert all(text[end:].startswith(SEEN[page.parts[0]]) for end in pictures)
    for cell in cells(page):
        compile(re.sub(r"^:tags:.*", "", cell), str(page), "exec")


def split(page: Path) -> tuple[list[str], str]:
    """A page's blocks of code, and its prose."""
    text = page.read_text(encoding="utf-8")
    block = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
    return block.findall(text), block.sub("", text)


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_a_chinese_page_has_the_code_formulas_and_headings_of_the_english_one(page):
    (code, prose), (english_code, english_prose) = split(page), split(CHINESE[page])
    assert code == english_code
    for part in (r"\$\$.*?\$\$", r"^#+ ", r"^\|", r"^!\[", r"^<!-- "):  # formulas, headings, rows, pictures, marks
        found, expected = (re.findall(part, text, flags=re.DOTALL | re.MULTILINE) for text in (prose, english_prose))
        assert found == expected, part
    inline, expected = (set(re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", text)) for text in (prose, english_prose))
    assert inline == expected


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_links_of_a_chinese_page_stay_in_chinese_where_there_is_a_page(page):
    english = {target.resolve() for target in CHINESE.values()}
    targets = {(page.parent / target).resolve() for target in re.findall(r"\]\(([^)\s#]+)", split(page)[1])}
    assert targets & english == {CHINESE[page]}  # the link to its original


@pytest.mark.parametrize("page", [README, README.with_suffix(".zh.md")], ids=lambda page: page.name)
def test_links_of_the_readmes_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s#]+)", split(page)[1]):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.parts[0] in SEEN], ids=str)
def test_a_chapter_ends_with_a_link_to_the_next(page):
    """The last one: to the pages on its matter; the last in Chinese: to the English next one."""
    chapters = [chapter.name for chapter in sorted((DOCS / "course").glob("*.md"))]
    after = [*chapters, "../inference.md"][chapters.index(page.name) + 1]
    last = (DOCS / page).read_text(encoding="utf-8").rstrip().rsplit("\n\n", 1)[1]
    assert re.match(r"(Next|More|下一章(（英文）)?)[:：]\s?\[", last) and after in last


def test_the_picture_of_the_programs_is_pyros():
    """Of the chapter on model and guide."""
    (cell,) = [cell for cell in cells(Path("course/04_model_and_guide.md")) if "display(" in cell]
    assert "pyro.render_model(program" in cell


def test_the_reference_has_every_public_module():
    listed = re.findall(
        r"automodule:: (\S+)\n   :members:", "".join(p.read_text("utf-8") for p in (DOCS / "reference").glob("*.md"))
    )
    assert sorted(listed) == MODULES
    assert all(importlib.import_module(name).__all__ for name in MODULES)


def tells_shapes(item: object) -> bool:
    """Whether a function's docstring, or one of a class and of its public methods, names a shape; or no signature names a tensor."""
    parts = [item]
    if inspect.isclass(item):
        own = [part for name, part in vars(item).items() if name in ("__init__", "__new__") or not name.startswith("_")]
        parts = [part.fget if isinstance(part, property) else part for part in own]
    parts = [part for part in parts if inspect.isfunction(part)]
    if not any(re.search("Tensor|ndarray|Distribution", str(inspect.signature(part))) for part in parts):
        return True
    # [B, *event], [N] and the like; neither an interval from 0 nor a link
    return any(re.search(r"\[(?!0)[^\]\n]+\](?!\()", inspect.getdoc(part) or "") for part in [item, *parts])


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_of_the_reference_say_shapes(name):
    module = importlib.import_module(name)
    items = {key: getattr(module, key) for key in module.__all__}
    items = {key: item for key, item in items.items() if inspect.isclass(item) or inspect.isfunction(item)}
    assert all(inspect.getdoc(item) for item in items.values())
    silent = {key for key, item in items.items() if item.__module__ == name and not tells_shapes(item)}
    assert silent == SHAPES_ELSEWHERE.get(name, set())


# What quantities with a unit are called, what is a number, and what tells the unit.
QUANTITY = re.compile(
    r"log_(prob|z|evidence|weight|likelihood|snr|twist)|evidence|elbo|bits|(^|_)kl($|_)|bound|densit|nats|loss|entropy|divergence"
    r"|(^|_)se_|standard_error|(^|_)(error|noise_std)$|information|distance|variance"
)
NUMBER = re.compile(r"Tensor|float|Estimate|BitsPerDim|LogLikelihood|ELBOTerms|Evidence")
UNIT = re.compile(r"\bnats?\b|\bbits?\b|\bseconds?\b|\bunits?\b|\blevels?\b|log-SNR|logarithm")


def told(item: object) -> list[tuple[str, str]]:
    """Quantities that a function or class returns or has: each name, and the text that is to say its unit."""
    text = inspect.getdoc(item) or ""
    returns = getattr(item, "__annotations__", {}).get("return", "")
    if inspect.isfunction(item):
        return [(item.__name__, text)] if QUANTITY.search(item.__name__) and NUMBER.search(str(returns)) else []
    found = []
    for name, member in vars(item).items():
        function = getattr(member, "fget", member)
        kind = str(getattr(function, "__annotations__", {}).get("return", ""))
        if inspect.isfunction(function) and name[0] != "_" and QUANTITY.search(name) and NUMBER.search(kind):
            said = [getattr(kind, name, None) for kind in inspect.getmro(item)]  # "See" that of a class before
            found.append((name, text + " ".join(inspect.getdoc(getattr(m, "fget", m)) or "" for m in said if m)))
    opening = re.split(r"\n *(?:Attributes|Args):\n", text)[0]
    for name, kind in getattr(item, "__annotations__", {}).items():
        if name[0] != "_" and QUANTITY.search(name) and NUMBER.search(str(kind)):
            entry = re.search(rf"^ +(?:\w+, )*{name}\b[^:\n]*:(.*(?:\n {{8,}}.*)*)", text, flags=re.MULTILINE)
            found.append((name, opening + (entry[1] if entry else "")))
    return found


def test_docstrings_of_the_reference_say_units():
    """Of what is a number with a unit: a property by its own words or its class's, an attribute by its entry or the class's opening."""
    checked, silent = 0, set()
    for name in MODULES:
        module = importlib.import_module(name)
        for item in (getattr(module, key) for key in module.__all__):
            if getattr(item, "__module__", "") == name and (inspect.isclass(item) or inspect.isfunction(item)):
                quantities = told(item)
                checked += len(quantities)
                silent |= {f"{name}.{item.__name__}: {q}" for q, text in quantities if not UNIT.search(text)}
    assert checked >= 40 and not silent


def test_the_page_on_architecture_names_what_there_is():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\.py` \| (.*?) \|", page, flags=re.MULTILINE)
    assert len(rows) > 15
    for file, names in rows:
        for name in re.findall(r"`([\w.]+)`", names):
            item: object = importlib.import_module(f"pyrodiff.{file}")
            for part in name.split("."):
                item = getattr(item, part)
