"""The command line of an example: its options are the parameters of its ``main``, its help is what their docstrings say."""

from __future__ import annotations

import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

import pyrodiff


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The module's text as it stands."""


def parser(main: Callable[..., object]) -> ArgumentParser:
    """An option for each parameter of ``main``, and ``--smoke-test``."""
    found = ArgumentParser(description=main.__globals__["__doc__"], formatter_class=_Help)
    found.add_argument(
        "--smoke-test",
        action="store_true",
        help="run all of it on a tiny setting, in seconds; what it writes goes to a temporary folder, but for what an option names",
    )
    found.add_function_arguments(main)
    return found


def command_line(main: Callable[..., object], smoke: Callable[[Path], dict[str, Any]]) -> None:
    """Run ``main`` as the command line says; ``smoke(folder)`` are its arguments in a smoke test that writes there."""
    given = parser(main).parse_args(defaults=False).as_dict()
    with tempfile.TemporaryDirectory() as folder:
        tiny = smoke(Path(folder)) if given.pop("smoke_test", False) else {}
        main(**tiny | given)


def untrained(folder: Path, steps: int, **options: Any) -> Path:
    """A small diffusion of the digits, saved there untrained."""
    net = pyrodiff.nets.UNet(1, width=8, multipliers=(1, 2), blocks=1, **options)
    schedule = pyrodiff.LogLinearSchedule(steps, -4.0, 4.0)
    pyrodiff.save(folder, pyrodiff.GaussianDiffusion(net, schedule, (1, 8, 8), prediction="v", bins=(17, -1.0, 1.0)))
    return folder
