"""Exceptions and warnings of pyrodiff.

::

    PyrodiffError
    ├── OptionError      (also ValueError)    an option outside its allowed set or range
    ├── ShapeError       (also ValueError)    a tensor whose shape or dtype does not fit
    ├── DataError        (also ValueError)    data that cannot be read or is not what it should be
    ├── CheckpointError  (also RuntimeError)  a file that is not a sound checkpoint of ours
    │   └── SaveError                         a file that cannot be written
    ├── ProgramError     (also RuntimeError)  a Pyro program used in a way that would be silently wrong
    ├── DivergenceError  (also RuntimeError)  training produced non-finite numbers repeatedly
    ├── OutOfMemoryError (also MemoryError)   a single example, or a training step, does not fit into memory
    └── ProcessError     (also RuntimeError)  another process of the same training run died, or hangs

Everything the library raises on purpose derives from :class:`PyrodiffError`; the message is one line that names the
offending value and what would be accepted.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergenceError",
    "OptionError",
    "OutOfMemoryError",
    "ProcessError",
    "ProgramError",
    "PyrodiffError",
    "SaveError",
    "ShapeError",
    "check_option",
]


class PyrodiffError(Exception):
    """Base class of every error the library raises on purpose."""


class OptionError(PyrodiffError, ValueError):
    """An option has a value outside its allowed set or range."""


class ShapeError(PyrodiffError, ValueError):
    """A tensor has a shape or dtype that does not fit."""


class DataError(PyrodiffError, ValueError):
    """Data cannot be read, or is not what it is declared to be."""


class CheckpointError(PyrodiffError, RuntimeError):
    """A file is not a sound checkpoint of this library."""


class SaveError(CheckpointError):
    """A checkpoint cannot be written: the disk is full, the folder read-only, ..."""


class ProgramError(PyrodiffError, RuntimeError):
    """A Pyro program is used in a way that would give a silently wrong number."""


class DivergenceError(PyrodiffError, RuntimeError):
    """Training produced non-finite losses or gradients too many times in a row."""


class OutOfMemoryError(PyrodiffError, MemoryError):
    """A single example, or a training step as it was asked for, does not fit into memory."""


class ProcessError(PyrodiffError, RuntimeError):
    """Another process of the same training run died, or does not answer."""


def check_option(name: str, value: str, allowed: Iterable[str], where: str = "") -> None:
    """Raise :class:`OptionError` naming the value, the allowed set and where it holds unless ``value`` is in ``allowed``."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise OptionError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{where}")
