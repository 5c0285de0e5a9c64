"""Sphinx's settings: `make docs`. Warnings are errors, and every notebook of the course is executed."""

from __future__ import annotations

import os
import re

from docutils import nodes

import pyrodiff

project = "pyrodiff"
version = release = pyrodiff.__version__
author = "the pyrodiff developers"
copyright = "2026, the pyrodiff developers"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # its files, so that formulas need no network
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = "pyrodiff"
html_static_path = ["_static"]
html_css_files = ["pyrodiff.css"]
html_domain_indices = False  # the reference's own contents list the modules

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 600  # seconds a cell, on a machine that does other things too
nb_execution_raise_on_error = True
nb_merge_streams = True

add_module_names = False
python_maximum_signature_line_length = 110  # of a longer one each parameter has a line
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes are listed once

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the notebooks' kernels
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, of a notebook without widgets

BESIDE = re.compile(
    r"(?<!!)(\[[^\[\]]*\])\((\.\./(?:\.\./)*(?:examples|benchmarks|pyrodiff)/[^)#]+)(?:#L\d+)?\)"
)  # no picture


def links_to_files(app: object, name: str, source: list[str]) -> None:
    """Scripts beside the documents, linked as a repository's reader would: here they are downloads."""
    source[0] = BESIDE.sub(r"\1(path:\2)", source[0])


def docstrings(app: object, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """A shape such as [N, *event] in plain words is no beginning of emphasis; references, up to their address, are a list."""
    for i, line in enumerate(lines):
        parts = re.split("(`+[^`]+`+)", line)  # every second one is code
        parts[::2] = [re.sub(r"(?<![\w\\*])\*(?=\w)", r"\\*", part) for part in parts[::2]]
        lines[i] = "".join(parts)
    if ".. rubric:: References" in lines:
        start, first = lines.index(".. rubric:: References") + 2, True
        for i in range(start, lines.index("", start)):
            mark, first = "* " if first else "  ", "://" in lines[i]
            lines[i] = mark + lines[i]


def texts_of_pictures(app: object, doctree: nodes.document) -> None:
    """A picture that a cell draws is described by the paragraph below it, which says what to see."""
    for picture in doctree.findall(lambda node: isinstance(node, nodes.image) and "alt" not in node):
        cell = picture
        while "cell" not in cell.get("classes", []):
            cell = cell.parent
        picture["alt"] = cell.next_node(nodes.paragraph, descend=False, siblings=True).astext()


def languages(app: object, name: str, template: str, context: dict[str, object], doctree: object) -> None:
    """The language a page is in, for screen readers, hyphenation and the choice of fonts."""
    context["language"] = "zh-Hans" if name.startswith("zh/") else "en"


def setup(app) -> None:
    app.connect("source-read", links_to_files)
    app.connect("doctree-read", texts_of_pictures)
    app.connect("html-page-context", languages)
    app.connect("autodoc-process-docstring", docstrings)
