"""Sphinx's settings: `make docs`. Warnings are errors, and every notebook of the course is executed."""

from __future__ import annotations

import os
import re

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
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = "pyrodiff"
html_static_path = ["_static"]
html_css_files = ["pyrodiff.css"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 240
nb_execution_raise_on_error = True
nb_merge_streams = True

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


def shapes(app: object, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """A shape such as [N, *event] in plain words of a docstring is no beginning of emphasis."""
    for i, line in enumerate(lines):
        words = line.split("`")  # every second part is code
        words[::2] = [re.sub(r"(?<![\w\\*])\*(?=\w)", r"\\*", part) for part in words[::2]]
        lines[i] = "`".join(words)


def setup(app) -> None:
    app.connect("source-read", links_to_files)
    app.connect("autodoc-process-docstring", shapes)
