"""Coverage-guided fuzzing of everything that reads files: `make fuzz`, or  python tests/fuzz.py SECONDS [READER ...]

Each reader runs in a process of its own, for so many seconds, from a corpus made on the fly. Anything but an error of the
library's own is a finding: its input is kept under build/fuzz, and belongs into `FOUND` below once it is mended.
Needs atheris (pip install -e ".[fuzz]"); `test_bad_input.py` runs the readers on their corpora without it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_input

ARTEFACTS = Path("build") / "fuzz"
LIMITS = (
    "-max_len=4096",
    "-timeout=30",
    "-rss_limit_mb=6000",
    "-print_final_stats=1",
    f"-artifact_prefix={ARTEFACTS}/",
)
# What is watched for new branches: the readers, and what they read with.
INSTRUMENTED = [
    "pyrodiff.cli",
    "pyrodiff.training",
    "numpy.lib",
    "PIL",
    "zipfile",
    "gzip",
    "yaml",
    "json",
    "jsonargparse",
]

# Inputs that were findings, and what came of them.
FOUND: dict[str, list[bytes]] = {}


def image(suffix: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        from pyrodiff.training.data import load_data

        bad_input.touch(folder / f"x{suffix}", data)
        load_data(folder)

    return read


def array(suffix: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        from pyrodiff.training.data import load_data

        load_data(bad_input.touch(folder / f"x{suffix}", data))

    return read


def idx(suffix: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        from pyrodiff.training.data import load_data

        for split in ("train", "t10k"):
            bad_input.touch(folder / f"{split}-images-idx3-ubyte{suffix}", data)
            bad_input.touch(folder / f"{split}-labels-idx1-ubyte", bad_input.idx((12,)))
        load_data("mnist", data_dir=folder)

    return read


def saved(data: bytes, folder: Path) -> None:
    """A checkpoint whose digest is taken for right: else no change of one would ever be read further."""
    from pyrodiff.training import checkpoint

    class Digest:
        def __init__(self, data: bytes) -> None: ...
        def update(self, data: bytes) -> None: ...
        def hexdigest(self) -> str:
            return checkpoint._NO_DIGEST

    path, original = bad_input.touch(folder / "model.safetensors", data), checkpoint.hashlib
    checkpoint.hashlib = type("hashlib", (), {"sha256": Digest})  # type: ignore[assignment]
    try:
        checkpoint.load(path)
    finally:
        checkpoint.hashlib = original


def configuration(data: bytes, folder: Path) -> None:
    from pyrodiff import cli

    path = bad_input.touch(folder / "x.yaml", data)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):  # print_config
        cli._parse(["train", f"--config={path}"])


def saved_model() -> bytes:
    import pyrodiff
    from pyrodiff.training import checkpoint

    net = pyrodiff.nets.MLP(2, width=2, depth=1)
    diffusion = pyrodiff.GaussianDiffusion(net, pyrodiff.CosineSchedule(3), (2,))
    with tempfile.TemporaryDirectory() as folder:
        pyrodiff.save(folder, diffusion)
        content = (Path(folder) / checkpoint.MODEL).read_bytes()
    digest = re.search(rb'"sha256":"([0-9a-f]{64})"', content)
    assert digest
    return content.replace(digest[1], checkpoint._NO_DIGEST.encode())


def images(suffix: str) -> Callable[[], list[bytes]]:
    return lambda: [content for _, its, content in bad_input.image_files() if its == suffix and len(content) < 4096]


# Reader: what it does with a file's bytes in an empty folder, and files to start from.
READERS: dict[str, tuple[Callable[[bytes, Path], Any], Callable[[], list[bytes]]]] = {
    **{suffix[1:]: (image(suffix), images(suffix)) for suffix in (".png", ".jpg", ".webp", ".bmp")},
    "npy": (array(".npy"), lambda: [content for _, content in bad_input.array_files()][::7]),
    "npz": (array(".npz"), lambda: [content for _, content in bad_input.archive_files() if len(content) < 4096]),
    "idx": (idx(""), lambda: [bad_input.idx((12, 2, 2)), bad_input.idx((12, 2, 0)), bad_input.idx((2**32 - 1,) * 3, data=b"")]),
    "idx.gz": (idx(".gz"), lambda: [bad_input.gzip.compress(bad_input.idx((12, 2, 2)))]),
    "checkpoint": (saved, lambda: [saved_model()]),
    "yaml": (configuration, lambda: [t if isinstance(t, bytes) else t.encode("utf-8", "surrogatepass") for t in bad_input.YAMLS.values()]),
}  # fmt: skip


def once(reader: str, data: bytes, folder: Path) -> None:
    """Let a reader read; raises only what it should not."""
    from pyrodiff.errors import PyrodiffError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with contextlib.suppress(PyrodiffError):
        READERS[reader][0](data, folder)


def fuzz(reader: str, arguments: list[str]) -> None:
    """In a process of its own: this never returns."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

        import pyrodiff.cli
        import pyrodiff.training.data  # noqa: F401
    folder = Path(arguments[-1]).with_name("in")  # beside the corpus
    atheris.Setup([sys.argv[0], *arguments], lambda data: once(reader, data, folder))
    atheris.Fuzz()


def main(seconds: str, *readers: str) -> int:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    findings = 0
    for reader in readers or READERS:
        with tempfile.TemporaryDirectory() as scratch:
            corpus = Path(scratch) / "corpus"
            for i, content in enumerate(READERS[reader][1]() + FOUND.get(reader, [])):
                bad_input.touch(corpus / str(i), content)
            command = [sys.executable, __file__, "--fuzz", reader, f"-max_total_time={seconds}", *LIMITS, str(corpus)]
            ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        runs = re.search(r"number_of_executed_units: (\d+)", ended.stderr)
        print(
            f"{reader:12s} {int(runs[1]) if runs else 0:10,d} executions, {'a finding' if ended.returncode else 'no finding'}",
            flush=True,
        )
        if ended.returncode:
            findings += 1
            print(ended.stderr[-3000:])
    return findings


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main(*sys.argv[1:]))
