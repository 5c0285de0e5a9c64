"""Files that a crash leaves old or new, never half, and folders that one run holds.

Used by everything that writes what must not be lost. A temporary file of a killed process is removed by the next writer: the
lock on it, which is gone with its process, says whether the process lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import OptionError, SaveError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock", "make_folder", "one_line", "reason", "replace", "write", "write_json"]


def replace(path: Path, fill: Callable[[IO[bytes]], object], previous: str | None = None) -> None:
    """Put what ``fill`` writes in the place of ``path``, so that a crash leaves the old or the new file.

    The old one stays under the name ``previous``, if that is given.

    Raises:
        SaveError: the file cannot be written; it is then as it was.
    """
    folder = path.parent
    temporary, link = (folder / f".pyrodiff-{secrets.token_hex(8)}.tmp" for _ in range(2))
    try:
        _remove_strays(folder)
        with _temporary(temporary) as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            if previous is not None:
                # By way of a link of its own: the file is there under its own name at every moment.
                with contextlib.suppress(OSError):  # there is none, or no links in this file system
                    os.link(path, link)
                    os.replace(link, previous)
            if fcntl is None:
                file.close()  # Windows renames no open file; elsewhere its lock must last until it has its name
            os.replace(temporary, path)
        _sync(folder)
    except OSError as error:
        why = reason(error)
        with contextlib.suppress(OSError):
            why += f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB free there)"
        raise SaveError(f"cannot write {str(path)!r}: {why}") from None
    finally:
        for stray in (temporary, link):
            with contextlib.suppress(OSError):
                stray.unlink()


def _temporary(path: Path) -> IO[bytes]:
    """A new file whose lock says that its writer lives."""
    while True:
        file = open(path, "xb")
        # Another process may take it for a stray between the two calls, and remove it.
        if _locked(file) and os.path.exists(path):
            return file
        file.close()
        path.unlink(missing_ok=True)


def _remove_strays(folder: Path) -> None:
    """Remove temporary files of processes that were killed."""
    for stray in folder.glob(".pyrodiff-*.tmp"):
        with contextlib.suppress(OSError):
            if fcntl is None:  # Windows, which refuses to remove a file that anyone has open
                stray.unlink()
                continue
            with open(stray, "rb+") as file:
                if _locked(file):
                    stray.unlink()


def write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file, and the folder it is in: all of it, or the file that was there before stays as it is.

    Raises:
        SaveError: the file cannot be written.
    """
    path = Path(path)
    make_folder(path.parent)
    replace(path, lambda file: file.write(data.encode() if isinstance(data, str) else data))


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """:func:`write` for a mapping."""
    write(path, json.dumps(content, indent=2) + "\n")


def make_folder(folder: Path) -> None:
    """Create a folder and what it lies in, for good; :class:`~pyrodiff.errors.SaveError` if that cannot be."""
    try:
        _make(folder)
    except OSError as error:
        raise SaveError(f"cannot create {str(folder)!r}: {reason(error)}") from None


def _make(folder: Path) -> None:
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in new:
        _sync(each.parent)


def _sync(folder: Path) -> None:
    """Make new names in a folder survive a power cut."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for the length of a ``with`` block, so that no second run writes to it.

    The lock is advisory, of the process, and gone with it however it ends; the file ``.lock``
    stays, and says who holds it. Where the system or the file system has no such locks, nothing is
    locked.

    Args:
        folder: created if need be.

    Raises:
        OptionError: another run holds the folder, or it cannot be written to.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        try:
            _make(folder)
            file = stack.enter_context(open(folder / ".lock", "a+b", buffering=0))
        except OSError as error:
            raise OptionError(f"folder {str(folder)!r} cannot be used: {reason(error)}") from None
        if not _locked(file):
            file.seek(0)
            holder = file.read(200).decode(errors="replace")
            told = f" ({holder})" if holder.isprintable() and holder else ""
            raise OptionError(f"folder {str(folder)!r} is in use by another run{told}")
        _write_holder(file, f"process {os.getpid()} on {platform.node()}")
        _held.add(file)
        try:
            yield
        finally:
            if file in _held:  # not in a fork of the holder
                _held.remove(file)
                _write_holder(file, "")


_held: set[IO[bytes]] = set()


def _disown() -> None:
    """In a fork: the lock is the parent's, and must not outlive it in the child."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)


def _write_holder(file: IO[bytes], text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock itself needs no room
        file.truncate(0)
        file.write(text.encode())


def _locked(file: IO[bytes]) -> bool:
    """Try to lock an open file; False if someone else holds it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks (some network ones)
            return True
    return True


def reason(error: OSError) -> str:
    return error.strerror or one_line(error)


def one_line(error: BaseException) -> str:
    """An error's message, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
