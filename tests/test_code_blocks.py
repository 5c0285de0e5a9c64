"""Every block of code in the documents: Python runs, commands have the options they are given, every public name has an example."""

import ast
import doctest
import importlib
import inspect
import math
import re
import shlex
from pathlib import Path

import _common
import pytest

from pyrodiff import cli

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    if "_build" not in path.parts and path.name != "CHANGELOG.md"  # which tells of former commands
}
BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
PYTHON = [page for page, text in PAGES.items() if "```python" in text and not page.endswith(".zh.md")]
# {code-cell}s run where the course is built, by `make docs`; a block without a name is no code
LANGUAGES = {"", "python", "sh", "text", "{code-cell} ipython3", "{eval-rst}", "{toctree}"}
# What stands in a page's code for a size, and the size that runs here.
SMALLER = {
    "README.md": {"steps=2500": "steps=2"},
    "docs/score_a_checkpoint.md": {"num_channels=64": "num_channels=32", "t=40": "t=2"},
}
# What is true after a page's code, in its names.
HOLDS = {
    "README.md": [
        "images.shape == (16, 1, 8, 8) and draws.shape == (3, 1, 1, 8, 8) and sevens.shape == (2, 1, 8, 8)",
        "best.efficiency.iloc[0] >= best.efficiency.iloc[1] > 0",
        "posterior.particles.shape == (2, 50, 1, 8, 8) and loss == loss",
        "[n for n in trace.nodes if n.startswith('x_')] == [f'x_{t}' for t in range(10, 0, -1)]",
    ],
    "docs/continuous_time.md": ["math.isfinite(loss) and images.shape == (4, 1, 8, 8) and chain.steps == 100"],
    "docs/diffusers.md": [
        "all(again.config[k] == diffusion.config[k] for k in ('event_shape', 'prediction', 'variance', 'clip'))"
    ],
    "docs/inference.md": [
        "math.isfinite(log_evidence) and model_.unbiased is False and all(program.unbiased for program in whole)"
    ],
    "docs/inference_smc.md": ["found.parameters['sigma'].shape == (10,)"],
    "docs/likelihood.md": ["probed.shape == (16, 4) and gap.shape == (4, 4)", "(back - x0).abs().max() < 1e-3"],
}
PRINTS = {
    "README.md": "bits/dim (±",
    "docs/calibration.md": "SBC: 40 simulations",
    "docs/inference.md": "100 steps: the bound is",
    "docs/likelihood.md": "over images",
}


# What a page takes for given.
GIVEN = {
    "docs/course/07_images.md": """
import torch
import pyrodiff

digits = pyrodiff.load_data("digits")
net = pyrodiff.nets.UNet(channels=1, width=8, multipliers=(1,), blocks=1)
diffusion = pyrodiff.GaussianDiffusion(net, pyrodiff.CosineSchedule(10), (1, 8, 8), bins=digits.bins)
""",
    "docs/score_a_checkpoint.md": """
import torch
import pyrodiff
from pyrodiff.interop import guided_diffusion
from pyrodiff.interop.cards import Card

card = Card(
    image_size=32, num_channels=32, num_res_blocks=2, learn_sigma=True, diffusion_steps=1000, noise_schedule="cosine"
)
table = card.schedule.log_snr(torch.arange(1, 1001)).tolist()
net = pyrodiff.nets.UNet(
    **guided_diffusion.unet_arguments(**card.unet), log_snr_table=table, index_step=card.index_step
)
theirs = pyrodiff.GaussianDiffusion(
    net, card.schedule, (3, 32, 32), variance="learned_range", decoder="openai", bins=(256, -1.0, 1.0)
)
guided_diffusion.save("model_ema.pt", theirs)
images = torch.randint(256, (2, 3, 32, 32)) / 127.5 - 1
""",
}
SLOW = {
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("calibration", "continuous_time", "index", "inference", "inference_smc", "likelihood")
    ),
}


def blocks(page: str, *languages: str) -> list[re.Match[str]]:
    return [block for block in BLOCK.finditer(PAGES[page]) if block[1] in languages]


@pytest.mark.parametrize("page", PAGES)
def test_a_block_of_code_is_of_a_kind_that_is_tested(page):
    """And none is left out by a mark."""
    assert {block[1] for block in BLOCK.finditer(PAGES[page]) if not block[1].startswith("{image}")} <= LANGUAGES
    assert "~~~" not in PAGES[page] and "skip -->" not in PAGES[page]
    assert PAGES[page].count("```python") == len(blocks(page, "python"))


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW), id=p) for p in PYTHON])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    """Its blocks in their order, in one scope; and prints what it says it prints."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": page}
    exec(GIVEN.get(page, ""), scope)
    printed = ""
    for block in blocks(page, "python"):
        code, line = block[2], PAGES[page].count("\n", 0, block.start(2))
        for size, here in SMALLER.get(page, {}).items():
            code = code.replace(size, here)
        if code.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(code, scope, page, page, line)
            failed = doctest.DocTestRunner(verbose=False).run(test, clear_globs=False).failed
            assert not failed, capsys.readouterr().out
            scope |= test.globs
        else:
            exec(compile("\n" * line + code, page, "exec"), scope)  # errors show the line of the page
        new = capsys.readouterr().out
        said = BLOCK.match(PAGES[page], block.end() + 2)
        if said and said[1] == "text":
            assert new == said[2]
        printed += new
    assert PRINTS.get(page, "") in printed
    for claim in HOLDS.get(page, []):
        assert eval(claim, {**scope, "math": math}), claim


def commands(page: str) -> list[list[str]]:
    """Of its blocks of shell and of its text, the words of every command that is ours; without its redirections and comments."""
    lines = [line for block in blocks(page, "sh") for line in block[2].replace("\\\n", " ").splitlines()]
    text = BLOCK.sub("", PAGES[page])
    lines += re.findall(r"`((?:pyrodiff (?:[a-z]+)|python (?:examples|benchmarks)/) ?[^`\n]*)`", text)
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


OURS = [
    pytest.param(words, id=f"{page}: {' '.join(words)}")
    for page in PAGES
    if not page.endswith(".zh.md")
    for words in commands(page)
]


@pytest.mark.parametrize("words", OURS)
def test_a_command_has_the_options_it_is_given(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("{}")
    first = next(i for i, word in enumerate(words) if "=" not in word)  # after settings of the environment
    program, *rest = words[first:]
    if program == "torchrun":
        program, *rest = rest[rest.index("-m") + 1 :]
    if program == "pyrodiff":
        cli._parse(rest)  # "RUN" stands for a folder
    elif program == "python" and rest[0].startswith("examples/"):
        assert (ROOT / rest[0]).is_file()
        if rest[0] != "examples/mini.py":  # which stands alone, and has no options
            _common.parser(importlib.import_module(Path(rest[0]).stem).main).parse_args(rest[1:])
    elif program == "python" and rest[0].startswith("benchmarks/"):
        text = (ROOT / rest[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in rest[1:] if word.startswith("--"))
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(rest) <= set(targets)
    else:
        assert program in {".", "pip", "curl", "git", "cd", "python", "ruff"}, "a command that is not known here"


# ---------------------------------------------------------------------- every public name in an example

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "pyrodiff").rglob("[!_]*.py")
)
# Inner parts of functions that have examples, public because another module takes them.
WITHIN = {
    "pyrodiff.errors": {"OutOfMemoryError", "ProcessError"},  # of a machine, not of what it was asked for
    "pyrodiff.inference.predictive": {"joined", "known", "outlook"},  # guide_draws
    "pyrodiff.inference.proposals": {"per_particle"},  # smc
    "pyrodiff.inference.smc": {"Source", "Walk", "prepare", "walk"},  # smc
    "pyrodiff.interop.guided_diffusion": {"load_classifier"},  # of a file of theirs
    "pyrodiff.laboratory.budget": {"Design", "Wiener", "terms"},  # estimate_elbo
    "pyrodiff.laboratory.gradients": {"Estimator", "Question", "gradient", "questions"},  # compare_gradients
    "pyrodiff.nets.encoder": {"Block", "Encoder", "Layers", "Level"},  # UNet
    "pyrodiff.report": {"report"},  # the command's train
}


def public() -> dict[int, tuple[str, str, object]]:
    """By id: the module that defines a public object, its name, and itself."""
    found: dict[int, tuple[str, str, object]] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for key in module.__all__:
            item = getattr(module, key)
            if getattr(item, "__module__", name) == name:
                found.setdefault(id(item), (name, key, item))
    return found


def named(code: str) -> set[int]:
    """Ids of what code names of the library, however it is imported."""
    tree, known = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "pyrodiff":
                    whole, top = importlib.import_module(alias.name), importlib.import_module("pyrodiff")
                    known |= {alias.asname: whole} if alias.asname else {"pyrodiff": top}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pyrodiff":
            module = importlib.import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}

    def object_of(node: ast.expr) -> object:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        owner = object_of(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(owner, node.attr, None) if inspect.ismodule(owner) or inspect.isclass(owner) else None

    return {id(object_of(node)) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}


def returned(item: object) -> set[str]:
    """Names of the classes that a function returns, or a class's methods and properties."""
    members = (
        [value for kind in inspect.getmro(item) for value in vars(kind).values()] if inspect.isclass(item) else [item]
    )
    functions = [getattr(member, "fget", None) or getattr(member, "__func__", member) for member in members]
    notes = [str(getattr(function, "__annotations__", {}).get("return", "")) for function in functions]
    notes += [str(note) for note in getattr(item, "__annotations__", {}).values()] if inspect.isclass(item) else []
    return set(re.findall(r"\w+", " ".join(notes)))


def test_every_public_name_has_an_example_that_runs():
    """In the documents, the course or examples/: it is named there, or its objects come from what is."""
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    for page in PAGES:
        parts = [block[2] for block in blocks(page, "python", "{code-cell} ipython3")]
        tags = re.compile(r"^:tags:.*$", flags=re.MULTILINE)
        plain = [doctest.script_from_examples(p) if p.startswith(">>> ") else tags.sub("", p) for p in parts]
        code.append("\n".join(plain))
    items = public()
    classes = {name: key for key, (_, name, item) in items.items() if inspect.isclass(item)}
    shown: set[int] = set()
    new = set().union(*map(named, code)) & set(items)
    while new:
        shown |= new
        new = {classes[name] for key in new for name in returned(items[key][2]) if name in classes} - shown
    lacking: dict[str, set[str]] = {}
    for key, (module, name, _) in items.items():
        if key not in shown:
            lacking.setdefault(module, set()).add(name)
    assert lacking == WITHIN
