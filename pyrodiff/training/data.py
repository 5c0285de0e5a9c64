"""Read example data: handwritten digits, MNIST-like files, folders of images and NumPy arrays.

Channels, size, bit depth and range are read from the data and never silently rescaled.

Discrete data with levels ``0..L-1`` become ``x = 2 u / (L - 1) - 1``: 8-bit images
``u / 127.5 - 1``, the digits (17 levels) ``u / 8 - 1``. Their ``bins`` are ``(L, -1.0, 1.0)``: the
number of levels and the outermost bin centres. Floating-point arrays are continuous: used as they
are, with ``bins=None``.

Images (PNG, JPEG, WEBP, BMP):

=========================  =====================================================================
1-, 2- or 4-bit grey       one channel, 2, 4 or 16 levels
8- or 16-bit grey          one channel, 256 or 65536 levels
8-bit RGB                  three channels, 256 levels (what WEBP always holds)
palette                    three channels: every pixel's palette colour
EXIF orientation           applied, so that the model sees what an image viewer shows
ICC profiles, gamma        ignored: the stored values are used
anything else              refused by name (transparency, CMYK, 16-bit or 5-bit colour, several
                           frames, ...)
=========================  =====================================================================

Arrays: ``[N, F]`` vectors, ``[N, H, W]`` (a channel is added) or ``[N, C, H, W]``; ``bool`` has 2
levels, ``uint8`` 256 and ``uint16`` 65536, other integers need ``levels=``. Nothing is unpickled.

A file that cannot be read, or a value that is not finite, is refused by name and never skipped: an
example less changes the split, and with it every figure that is compared.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import math
import operator
import os
import stat
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pyrodiff.errors import DataError, OptionError

__all__ = ["ImageData", "load_data", "to_levels"]

_MAX_BYTES = 1 << 30  # of float32 data, and of any file that is opened
_MAX_PIXELS = 64_000_000  # per image; Pillow alone only warns between 89 and 179 megapixels
_MAX_VALUE = 1e18  # the square of anything larger comes close to overflowing float32
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
_IDX_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
_DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"
# What a damaged file makes the standard library, NumPy or Pillow raise while they parse it.
_PARSE_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, EOFError, SyntaxError, TypeError, LookupError, ArithmeticError),
    *(RuntimeError, MemoryError, AssertionError, AttributeError),
    *(struct.error, tokenize.TokenError, zlib.error),
    zipfile.BadZipFile,
)


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Train, validation and test examples in model units.

    Attributes:
        name: Name of the data set, or of the file or folder (escaped if it is not printable).
        description: One line: count, channels, size, bit depth, range and sizes of the splits.
        train: Float32 tensor of shape ``[N, *event_shape]``.
        validation: Likewise.
        test: Likewise.
        bins: ``(levels, low, high)`` with the outermost bin centres in model units, or None for
            continuous data.
        train_labels: Int64 tensor of shape ``[N]``, or None.
        validation_labels: Likewise.
        test_labels: Likewise.
        classes: Names of the classes if the data name them.
    """

    name: str
    description: str
    train: Tensor
    validation: Tensor
    test: Tensor
    bins: tuple[int, float, float] | None
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None
    classes: tuple[str, ...] | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example: ``(C, H, W)``, or ``(F,)`` for vectors."""
        return tuple(self.train.shape[1:])

    def __repr__(self) -> str:
        return f"ImageData({self.description})"


class _Examples(NamedTuple):
    x: Tensor  # [N, *event_shape], model units
    levels: int | None
    low: float  # the observed range, in the units of the source
    high: float
    y: Tensor | None = None  # [N], int64
    classes: tuple[str, ...] | None = None
    note: str = ""


def load_data(
    source: str | os.PathLike[str],
    *,
    seed: int = 0,
    levels: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> ImageData:
    """Read a data set and split it.

    Args:
        source: ``"digits"`` (scikit-learn's 8x8 digits), ``"mnist"``, ``"fashion-mnist"``, a folder
            of images (or of one sub-folder of images per class), or a ``.npy`` or ``.npz`` file. An
            ``.npz`` holds ``x`` (or ``images``, or a single array) and perhaps ``y`` (or
            ``labels``); or ``x_train``, ``x_test`` and perhaps ``x_validation``, with ``y_train``
            and so on.
        seed: Seed of the 80/10/10 split; where only ``x_validation`` is missing, of the tenth of
            ``x_train`` that takes its place. The named sets have fixed splits: the digits
            1437/120/240, the others their own test set and the last 5000 of their training images
            for validation.
        levels: Number of levels of an integer array, 2 to 65536; its values are ``0..levels-1``.
        data_dir: Folder with the four IDX files of ``"mnist"`` or ``"fashion-mnist"``, plain or
            ``.gz``; by default ``~/.cache/pyrodiff/<name>`` (or under ``XDG_CACHE_HOME``), and
            before it the folder of Debian's package dataset-fashion-mnist.

    Returns:
        The splits, float32 of shape ``[N, *event_shape]`` in model units, with labels and a
        description.

    Raises:
        OptionError: An option has a wrong value or does not apply to this source.
        DataError: The data are missing, unreadable, not of a documented kind, or too large (above
            1 GiB as float32, or 64 megapixels an image).
    """
    path = _check_path("source", source)
    seed = _check_integer("seed", seed, 0, 2**63 - 1)
    known = path if isinstance(source, str) else None
    is_mnist = known in ("mnist", "fashion-mnist")
    if data_dir is not None:
        data_dir = _check_path("data_dir", data_dir)
        if not is_mnist:
            raise OptionError(f"data_dir={data_dir!r} is for 'mnist' and 'fashion-mnist' only")
    if levels is not None:
        levels = _check_integer("levels", levels, 2, 65536)
        if not path.lower().endswith((".npy", ".npz")):
            raise OptionError(f"levels={levels} is for .npy and .npz files only, not {path!r}")

    if known == "digits":
        digits = _demo_module("sklearn.datasets", "'digits'", "scikit-learn").load_digits()
        data = _to_units(digits.images.astype(np.uint8), "'digits'", 17)
        data = data._replace(y=torch.from_numpy(digits.target.astype(np.int64)))
        parts: Sequence[Tensor] = _permutation(len(data.x), 0).split([1437, 120, 240])
    elif is_mnist:
        data, parts = _read_mnist(path, data_dir)
    else:
        data, parts = _read_path(path, seed, levels)
    # repr() keeps names and messages printable and on one line whatever bytes a file name holds.
    name = path if is_mnist else repr(os.path.basename(os.path.abspath(path)))[1:-1]
    splits = [(data.x[part], None if data.y is None else data.y[part]) for part in parts]
    (train, train_y), (validation, validation_y), (test, test_y) = splits
    return ImageData(
        name=name,
        description=_describe(name, data, parts),
        train=train,
        validation=validation,
        test=test,
        bins=None if data.levels is None else (data.levels, -1.0, 1.0),
        train_labels=train_y,
        validation_labels=validation_y,
        test_labels=test_y,
        classes=data.classes,
    )


def to_levels(x: Tensor, levels: int = 256) -> Tensor:
    """Go from model units to levels, the inverse of what :func:`load_data` does.

    Args:
        x: Floating-point tensor of any shape in model units; values outside [-1, 1] are clamped.
        levels: Number of levels L. The data's own (``bins[0]``) gives them back exactly; 256 gives
            8-bit pictures of any data.

    Returns:
        Tensor of ``x``'s shape with values in ``0..L-1``: uint8 up to 256 levels, int32 above.

    Raises:
        OptionError: ``levels`` is not an integer in 2..65536.
        DataError: ``x`` holds NaN.
    """
    levels = _check_integer("levels", levels, 2, 65536)
    if x.isnan().any():
        raise DataError(f"x holds {int(x.isnan().sum())} NaN values, which have no level")
    u = ((x.float().clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return u.to(torch.uint8 if levels <= 256 else torch.int32)


# Options and files


def _check_integer(name: str, value: object, low: int, high: int) -> int:
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise OptionError(f"{name}={_brief(value)} is not an integer in {low}..{high}")
    return number


def _check_path(name: str, value: object) -> str:
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise OptionError(f"{name}={_brief(value)} is not a path")
    return path


def _brief(value: object) -> str:
    return " ".join(repr(value).split())[:80]


@contextlib.contextmanager
def _reading(where: str, *more: type[Exception]) -> Iterator[None]:
    """Turn whatever reading ``where`` raises into a DataError of one line."""
    try:
        yield
    except (DataError, OptionError):  # both are ValueErrors too
        raise
    except _PARSE_ERRORS + more as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"cannot read {where}: {' '.join(reason.split())}") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    with _reading(repr(path)):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a named pipe would block for ever
            raise DataError(f"{path!r} is not a regular file")
        if status.st_size > _MAX_BYTES:
            raise DataError(f"{path!r} has {status.st_size} bytes, more than {_MAX_BYTES}")
        with open(path, "rb") as file:
            yield file


def _demo_module(module: str, what: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f'{what} needs {package}: pip install "pyrodiff[demo]"') from error


def _check_size(shape: Sequence[int], where: str) -> None:
    if any(n <= 0 for n in shape):
        raise DataError(f"{where} has shape {tuple(shape)}: it holds no values")
    if 4 * math.prod(shape) > _MAX_BYTES:
        raise DataError(f"{where} has shape {tuple(shape)}: above {_MAX_BYTES} bytes as float32")


# Model units and splits


def _to_units(array: np.ndarray[Any, Any], where: str, levels: int | None) -> _Examples:
    """Check layout, dtype and range of an array ``[N, ...]`` and convert it to model units."""
    kind, shape = array.dtype.kind, array.shape
    has = f"{where} has shape {shape}"
    if array.ndim not in (2, 3, 4):
        raise DataError(f"{has}: expected [N, F], [N, H, W] or [N, C, H, W]")
    if array.ndim == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3):
        raise DataError(f"{has}, channels last: save np.moveaxis(x, 3, 1) instead")
    if array.ndim == 3 and shape[2] in (1, 3):
        raise DataError(f"{has}, like one [H, W, C] image: if it is [N, H, W], save x[:, None]")
    _check_size(shape, where)
    if array.ndim == 3:
        array = array[:, None]
    if kind == "f":
        if levels is not None:
            raise OptionError(f"levels={levels} is for integers, but {where} is {array.dtype}")
        with np.errstate(over="ignore"):
            x = np.array(array, dtype=np.float32, order="C")
        good = np.abs(x) <= _MAX_VALUE  # false for NaN too
        if not good.all():
            index = tuple(int(i) for i in np.unravel_index(np.argmin(good), good.shape))
            raise DataError(f"{where} holds {array[index]!s} at {index}: expected finite, < 1e18")
        return _Examples(torch.from_numpy(x), None, float(x.min()), float(x.max()))
    if levels is None:
        levels = {"b1": 2, "u1": 256, "u2": 65536}.get(f"{kind}{array.dtype.itemsize}")
    if levels is None:
        raise DataError(f"{where} is {array.dtype}: pass levels=, the number of its levels")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= levels:
        raise DataError(f"{where} holds values {low}..{high}: expected 0..{levels - 1}")
    x = np.array(array, dtype=np.float32, order="C")
    # 2 u - (L - 1) is exact in float32: one division, correctly rounded, and a symmetric grid.
    x *= 2
    x -= levels - 1
    x /= levels - 1
    return _Examples(torch.from_numpy(x), levels, low, high)


def _with_labels(data: _Examples, labels: np.ndarray[Any, Any], where: str) -> _Examples:
    count, has = len(data.x), f"{where} is {labels.dtype} of shape {labels.shape}"
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(f"{has}: expected integer labels of shape ({count},)")
    if labels.min() < 0 or labels.max() >= 2**31:
        raise DataError(f"{where} holds labels {labels.min()}..{labels.max()}: expected 0..2**31-1")
    return data._replace(y=torch.from_numpy(labels.astype(np.int64)))


def _join(pieces: Sequence[_Examples], where: str) -> tuple[_Examples, list[int]]:
    """Concatenate splits that came as separate arrays; also returns their sizes."""
    first, sizes = pieces[0], [len(piece.x) for piece in pieces]
    for piece in pieces[1:]:
        if (piece.x.shape[1:], piece.levels) != (first.x.shape[1:], first.levels):
            a, b = (f"{list(p.x.shape[1:])} with levels {p.levels}" for p in (first, piece))
            raise DataError(f"the splits of {where} differ: {a} and {b}")
    labels = [piece.y for piece in pieces if piece.y is not None]
    if 0 < len(labels) < len(pieces):
        raise DataError(f"in {where} some splits have labels and some have none")
    _check_size((sum(sizes), *first.x.shape[1:]), where)
    low, high = min(piece.low for piece in pieces), max(piece.high for piece in pieces)
    x, y = torch.cat([piece.x for piece in pieces]), torch.cat(labels) if labels else None
    return _Examples(x, first.levels, low, high, y), sizes


def _permutation(n: int, seed: int) -> Tensor:
    # NumPy promises to keep a bit generator's raw stream for ever, but not Generator.permutation.
    return torch.from_numpy(np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable"))


def _random_split(n: int, seed: int, tenths: int, where: str) -> list[Tensor]:
    """Indices of the rest and of ``tenths`` (1 or 2) tenths of ``n`` examples."""
    if n < 10:
        raise DataError(f"{where} holds {n} training examples: at least 10 are needed to split")
    sizes = [n - tenths * (n // 10)] + [n // 10] * tenths
    return list(_permutation(n, seed).split(sizes))


def _describe(name: str, data: _Examples, parts: Sequence[Tensor]) -> str:
    count, *event = data.x.shape
    what = f"{count} vectors of {event[0]} features"
    if len(event) == 3:
        channels = f"{event[0]} channel{'s' * (event[0] > 1)}"
        what = f"{count} images, {channels}, {event[1]}x{event[2]} (height x width)"
    depth = "continuous"
    if data.levels is not None:
        bits = math.log2(data.levels)
        depth = f"{data.levels} levels" + (f" ({bits:.0f} bit)" if bits.is_integer() else "")
    span = f"values {data.low:.6g} to {data.high:.6g}"
    splits = "/".join(str(len(part)) for part in parts)
    return f"{name}: {what}, {depth}, {span}, train/validation/test {splits}{data.note}"


def _read_path(path: str, seed: int, levels: int | None) -> tuple[_Examples, Sequence[Tensor]]:
    where, suffix = repr(path), os.path.splitext(path)[1].lower()
    with _reading(f"{where} (not 'digits', 'mnist' or 'fashion-mnist', so a path)"):
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    if is_folder:
        data = _read_folder(path)
    elif suffix == ".npy":
        with _open(path) as file:
            data = _to_units(_read_npy(file, os.stat(path).st_size, where), where, levels)
    elif suffix == ".npz":
        pieces = _read_npz(path, levels)
        data, sizes = _join(pieces, where)
        if len(sizes) == 3:
            return data, torch.arange(sum(sizes), device="cpu").split(sizes)
        if len(sizes) == 2:
            test = torch.arange(sizes[0], sum(sizes), device="cpu")
            return data, [*_random_split(sizes[0], seed, 1, where), test]
    elif suffix in _SUFFIXES:
        raise DataError(f"{where} is one image: give the folder of images")
    else:
        raise DataError(f"{where} is neither a folder nor a .npy or .npz file")
    return data, _random_split(len(data.x), seed, 2, where)


# NumPy files


def _read_npy(file: IO[bytes], size: int, where: str) -> np.ndarray[Any, Any]:
    """Read an open .npy file of ``size`` bytes, checking its header before allocating anything."""
    with _reading(where):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers written by Python 2, which are fine
            if np.lib.format.read_magic(file) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        if dtype.hasobject:
            raise DataError(f"{where} holds Python objects, never unpickled: save a numeric array")
        if dtype.kind not in "biuf":
            raise DataError(f"{where} has dtype {dtype}: expected bool, integers or floats")
        _check_size(shape, where)
        needed, found = math.prod(shape) * dtype.itemsize, size - file.tell()
        if needed != found:
            raise DataError(f"{where} announces {needed} bytes of data, but holds {found}")
        order: Any = "F" if fortran else "C"
        return np.frombuffer(file.read(needed), dtype).reshape(shape, order=order)


def _read_npz(path: str, levels: int | None) -> list[_Examples]:
    """Read an .npz file: one array to split, or (train, test), or (train, validation, test)."""
    with _open(path) as file, _reading(repr(path)), zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise DataError(f"{path!r} holds two arrays of one name")
        total = sum(info.file_size for info in members.values())
        if total > 2 * _MAX_BYTES:  # float64 data take twice what they take as float32
            raise DataError(f"{path!r} unpacks to {total} bytes, more than {2 * _MAX_BYTES}")
        if "x_train" in members:
            splits = [s for s in ("train", "validation", "test") if f"x_{s}" in members]
            pairs = [(f"x_{split}", f"y_{split}") for split in splits]
            required = {"x_train", "x_test"}
        else:
            x = "images" if "images" in members else "x"
            pairs = [(x, "labels" if "labels" in members else "y")]
            if len(members) == 1:
                pairs = [(next(iter(members)), "y")]
            required = {pairs[0][0]}
        if not required <= set(members) <= {key for pair in pairs for key in pair}:
            names = ", ".join(repr(key[:40]) for key in sorted(members)[:8]) or "none"
            expected = "x (perhaps y), or x_train and x_test (perhaps x_validation, y_train, ...)"
            raise DataError(f"{path!r} holds the arrays {names}: expected {expected}")

        def where(key: str) -> str:
            return f"{path!r} array {key[:40]!r}"

        def read(key: str) -> np.ndarray[Any, Any]:
            info = members[key]
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"{where(key)} has compression {info.compress_type}, not deflate")
            with archive.open(info) as member:
                return _read_npy(member, info.file_size, where(key))

        pieces = []
        for x, y in pairs:
            piece = _to_units(read(x), where(x), levels)
            pieces.append(_with_labels(piece, read(y), where(y)) if y in members else piece)
        return pieces


# IDX files


def _read_mnist(name: str, data_dir: str | None) -> tuple[_Examples, Sequence[Tensor]]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folders, debian = [os.path.join(cache, "pyrodiff", name)], ""
    if name == "fashion-mnist":
        folders.insert(0, _DEBIAN_FASHION)
        debian = "; on Debian: apt-get install dataset-fashion-mnist"
    if data_dir is not None:
        folders = [data_dir]
    files = [f"{split}-{kind}" for split in ("train", "t10k") for kind in _IDX_KINDS]
    for folder in folders:
        paths = [os.path.join(folder, file) for file in files]
        paths = [path if os.path.exists(path) else f"{path}.gz" for path in paths]
        if all(map(os.path.exists, paths)):
            break
    else:
        looked = f"looked in {', '.join(map(repr, folders))}"
        raise DataError(f"{name} needs {', '.join(files)} (plain or .gz); {looked}{debian}")
    pieces = []
    for images, labels in (paths[:2], paths[2:]):
        piece = _to_units(_read_idx(images, 3), repr(images), 256)
        pieces.append(_with_labels(piece, _read_idx(labels, 1), repr(labels)))
    data, (train, test) = _join(pieces, repr(folder))
    if train <= 5000:
        raise DataError(f"{paths[0]!r} holds {train} images: the last 5000 are for validation")
    return data, torch.arange(train + test, device="cpu").split([train - 5000, 5000, test])


def _read_idx(path: str, ndim: int) -> np.ndarray[Any, Any]:
    """Read a uint8 array of ``ndim`` dimensions from an IDX file, plain or gzipped."""
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(_open(path))
        stack.enter_context(_reading(repr(path)))
        if path.endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        header = file.read(4 + 4 * ndim)
        if len(header) != 4 + 4 * ndim or header[:4] != bytes((0, 0, 8, ndim)):
            raise DataError(f"{path!r} is not an IDX file of bytes in {ndim} dimensions")
        shape = struct.unpack(f">{ndim}I", header[4:])
        _check_size(shape, repr(path))
        # One byte more than announced tells a longer file, and bounds what a gzip bomb unpacks to.
        needed, data = math.prod(shape), file.read(math.prod(shape) + 1)
        if len(data) != needed:
            found = "more" if len(data) > needed else f"only {len(data)}"
            raise DataError(f"{path!r} announces {needed} bytes of data, but holds {found}")
        return np.frombuffer(data, np.uint8).reshape(shape)


# Folders of images


def _list_folder(folder: str) -> tuple[list[str], list[str], int]:
    """Sorted image files and sub-folders, and the number of other files; skips hidden ones."""
    files, folders, others = [], [], 0
    with _reading(repr(folder)):
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    for name in names:
        path, is_image = os.path.join(folder, name), name.lower().endswith(_SUFFIXES)
        if os.path.isdir(path):
            if is_image:
                raise DataError(f"{path!r} is a folder with the name of an image")
            folders.append(name)
        elif is_image:
            files.append(path)
        else:
            others += 1
    return files, folders, others


def _read_folder(folder: str) -> _Examples:
    files, classes, others = _list_folder(folder)
    if files and classes:
        raise DataError(f"{folder!r} holds images beside the folder {classes[0]!r}: expected either")
    if classes and _SPLIT_NAMES.issuperset(name.lower() for name in classes):
        raise DataError(f"{folder!r} has the folders {classes}: give one of them, seed splits it")
    labels: list[int] = []
    for label, name in enumerate(classes):
        path = os.path.join(folder, name)
        inner, nested, more = _list_folder(path)
        if nested or not inner:
            fault = f"holds the folder {nested[0]!r}" if nested else "holds no images"
            raise DataError(f"{path!r} {fault}: expected the images of one class")
        files, labels, others = files + inner, labels + [label] * len(inner), others + more
    if not files:
        raise DataError(f"{folder!r} holds no images: expected names in {', '.join(_SUFFIXES)}")

    pil = _demo_module("PIL.Image", "a folder of images", "Pillow")
    ops = _demo_module("PIL.ImageOps", "a folder of images", "Pillow")
    stack, stack_levels = np.empty(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large sizes and damaged metadata
        progress = tqdm(files, desc="reading images", delay=2, leave=False, disable=None)
        for i, file in enumerate(progress):
            pixels, levels = _read_image(file, pil, ops)
            if i == 0:
                _check_size((len(files), *pixels.shape), repr(folder))
                stack, stack_levels = np.empty((len(files), *pixels.shape), pixels.dtype), levels
            if (pixels.shape, levels) != (stack.shape[1:], stack_levels):
                a = f"{files[0]!r} is {list(stack.shape[1:])} with {stack_levels} levels"
                b = f"{file!r} is {list(pixels.shape)} with {levels}"
                raise DataError(f"images differ in [channels, height, width] or levels: {a}, {b}")
            stack[i] = pixels
    data = _to_units(stack, repr(folder), stack_levels)
    if others:
        data = data._replace(note=f", {others} other file{'s' * (others > 1)} ignored")
    if classes:
        data = data._replace(y=torch.tensor(labels, device="cpu"), classes=tuple(classes))
    return data


def _read_image(path: str, pil: Any, ops: Any) -> tuple[np.ndarray[Any, Any], int]:
    """Read one image as ``[C, H, W]`` (bool, uint8 or uint16) with its number of levels."""
    with _open(path) as file, _reading(f"image {path!r}", pil.DecompressionBombError):
        image = pil.open(file, formats=("PNG", "JPEG", "WEBP", "BMP"))
        if math.prod(image.size) > _MAX_PIXELS:
            raise DataError(f"{path!r} has {image.size} pixels, above {_MAX_PIXELS // 10**6} million")
        if getattr(image, "is_animated", False):
            raise DataError(f"{path!r} has several frames: expected a still image")
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            raise DataError(f"{path!r} has transparency (mode {image.mode}): save it without")
        levels, stored = _image_levels(image)
        if levels is None:
            kind = f"mode {image.mode}, stored as {stored}"
            raise DataError(f"{path!r} has {kind}: expected up to 16-bit grey, 8-bit RGB or palette")
        image = ops.exif_transpose(image.convert("RGB") if image.mode == "P" else image)
        pixels = np.asarray(image)
    if levels in (4, 16):
        pixels = pixels // (255 // (levels - 1))  # Pillow spreads 2- and 4-bit grey over 0..255
    elif levels == 65536:
        pixels = pixels.astype(np.uint16)  # big-endian, or int32 from older versions of Pillow
    return (pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)), levels


def _image_levels(image: Any) -> tuple[int | None, str]:
    # The raw mode of the file's data is the only trace of 16-bit colour (which Pillow would cut
    # to 8 bits) and of 2-bit grey: image.mode says RGB and L.
    args = image.tile[0][3] if image.tile else image.mode
    stored = args if isinstance(args, str) else str(args[0])
    if image.mode == "L":
        return {"L": 256, "L;4": 16, "L;2": 4}.get(stored), stored
    if image.mode == "1":
        return 2, stored
    if image.mode == "P" or (image.mode == "RGB" and ";" not in stored):
        return 256, stored
    is_16_bit_grey = image.mode.startswith("I") and stored.startswith("I;16")
    return 65536 if is_16_bit_grey else None, stored
