"""Reading data: documented kinds give the documented numbers, anything else one clear line."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pyrodiff.errors import DataError, OptionError
from pyrodiff.training import data as data_module
from pyrodiff.training.data import ImageData, load_data, to_levels

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

N = 12


def grey(shape: tuple[int, ...] = (N, 4, 5), dtype: str = "u1", top: int = 256) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) * 7 % top).astype(dtype)


def everything(data: ImageData) -> torch.Tensor:
    return torch.cat([data.train, data.validation, data.test])


def check_message(error: Exception, *words: str) -> None:
    message = str(error)
    assert message.isprintable() and len(message) < 1000, message
    for word in words:
        assert word in message, message


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file by hand, for the depths that Pillow reads but cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def folder_of(path: Path, content: bytes, suffix: str = ".png", count: int = N) -> Path:
    path.mkdir(parents=True)
    for i in range(count):
        (path / f"{i:02d}{suffix}").write_bytes(content)
    return path


# The fixed sets


def test_digits() -> None:
    from sklearn.datasets import load_digits

    data, again = load_data("digits"), load_data("digits", seed=5)
    assert data.event_shape == (1, 8, 8) and data.bins == (17, -1.0, 1.0)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [1437, 120, 240]
    assert data.train.dtype == torch.float32
    levels = torch.linspace(-1, 1, 17)
    assert torch.isin(everything(data), levels).all()
    # a permutation of all images, labels included: the parts are disjoint
    original = load_digits()
    rows = np.column_stack([original.images.reshape(1797, 64), original.target])
    labels = torch.cat([data.train_labels, data.validation_labels, data.test_labels])
    ours = torch.cat([to_levels(everything(data), 17).flatten(1), labels[:, None]], 1).numpy()
    assert np.array_equal(*(r[np.lexsort(r.T)] for r in (rows, ours.astype(float))))
    assert torch.equal(everything(again), everything(data))
    # the documented split must never change: results are compared across versions
    assert zlib.crc32(data.train_labels.numpy().tobytes()) == 14971509
    words = ("digits", "1797", "1 channel", "8x8", "17 levels", "0 to 16", "1437/120/240")
    assert all(word in repr(data) for word in words)


def idx(array: np.ndarray, magic: bytes | None = None) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) if magic is None else magic
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype("u1").tobytes()


def write_mnist(folder: Path, train: int = 5010, test: int = 7, zipped: bool = True) -> Path:
    folder.mkdir()
    for split, count in (("train", train), ("t10k", test)):
        images, labels = grey((count, 3, 2)), np.arange(count) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            name = f"{split}-{kind}-ubyte" + ".gz" * zipped
            (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist(tmp_path: Path, zipped: bool) -> None:
    data = load_data("mnist", data_dir=write_mnist(tmp_path / "d", zipped=zipped))
    assert data.bins == (256, -1.0, 1.0) and data.event_shape == (1, 3, 2)
    images = torch.from_numpy(grey((5010, 3, 2)))[:, None]
    assert torch.equal(to_levels(data.train), images[:10])
    assert torch.equal(to_levels(data.validation), images[10:])
    assert torch.equal(to_levels(data.test), images[:7])
    assert data.test_labels.tolist() == list(range(7)) and data.name == "mnist"


def test_mnist_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("pyrodiff.training.data._DEBIAN_FASHION", str(tmp_path / "none"))
    (tmp_path / "pyrodiff").mkdir()
    with pytest.raises(DataError) as raised:
        load_data("fashion-mnist")
    check_message(raised.value, "apt-get install dataset-fashion-mnist", "none", "t10k-images-idx3")
    with pytest.raises(DataError) as raised:
        load_data("mnist")
    assert "apt-get" not in str(raised.value)
    write_mnist(tmp_path / "pyrodiff" / "fashion-mnist")
    assert len(load_data("fashion-mnist").test) == 7


def test_fashion_mnist() -> None:
    try:
        data = load_data("fashion-mnist")
    except DataError as error:
        if "apt-get" not in str(error):
            raise
        pytest.skip("the files of Fashion-MNIST are not installed")
    assert [len(x) for x in (data.train, data.validation, data.test)] == [55000, 5000, 10000]
    assert data.event_shape == (1, 28, 28)
    counts = data.train_labels.bincount() + data.validation_labels.bincount()
    assert counts.tolist() == [6000] * 10 and data.test_labels.bincount().tolist() == [1000] * 10


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
IDX_BAD: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "empty": (IMAGES, lambda b: b""),
    "not gzip": (IMAGES, lambda b: b"hello, world"),
    "truncated gzip": (IMAGES, lambda b: b[: len(b) // 2]),
    "damaged gzip": (IMAGES, lambda b: b[:40] + b"\xff" * 40 + b[80:]),
    "wrong crc": (IMAGES, lambda b: b[:-8] + b"\0" * 8),
    "short": (IMAGES, lambda b: gzip.compress(gzip.decompress(b)[:-1])),
    "long": (IMAGES, lambda b: gzip.compress(gzip.decompress(b) + b"\0")),
    "bomb": (IMAGES, lambda b: gzip.compress(gzip.decompress(b) + bytes(5_000_000))),
    "header only": (IMAGES, lambda b: gzip.compress(gzip.decompress(b)[:10])),
    "labels as images": (IMAGES, lambda b: gzip.compress(idx(grey((9,))))),
    "images as labels": (LABELS, lambda b: gzip.compress(idx(grey((9, 2, 2))))),
    "floats": (IMAGES, lambda b: gzip.compress(idx(grey((9, 2, 2)), b"\0\0\x0d\x03"))),
    "no images": (IMAGES, lambda b: gzip.compress(idx(grey((0, 2, 2))))),
    "huge": (IMAGES, lambda b: gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12)),
    "fewer labels": (LABELS, lambda b: gzip.compress(idx(grey((9,))))),
    "small": ("", lambda b: b),
    "other size in test": (
        "t10k-images-idx3-ubyte.gz",
        lambda b: gzip.compress(idx(grey((7, 4, 2)))),
    ),
}


@pytest.mark.reliability("F18", "F20")
@pytest.mark.parametrize("case", IDX_BAD)
def test_idx_refused(tmp_path: Path, case: str) -> None:
    name, change = IDX_BAD[case]
    folder = write_mnist(tmp_path / "d", train=5010 if name else 5000)
    if name:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(DataError) as raised:
        load_data("mnist", data_dir=folder)
    check_message(raised.value, str(tmp_path))


@pytest.mark.reliability("F18")
def test_missing_file_of_idx(tmp_path: Path) -> None:
    folder = write_mnist(tmp_path / "d")
    (folder / LABELS).unlink()
    with pytest.raises(DataError) as raised:
        load_data("mnist", data_dir=folder)
    check_message(raised.value, repr(str(folder)), LABELS[:-3])


# Arrays

ARRAYS: dict[str, tuple[np.ndarray, int | None, tuple[int, ...], int | None]] = {
    # array, levels=, event shape, levels found
    "uint8": (grey(), None, (1, 4, 5), 256),
    "uint8, one channel": (grey((N, 1, 4, 5)), None, (1, 4, 5), 256),
    "uint8, three channels": (grey((N, 3, 4, 5)), None, (3, 4, 5), 256),
    "uint8, four channels": (grey((N, 4, 4, 5)), None, (4, 4, 5), 256),
    "uint8 vectors": (grey((N, 6)), None, (6,), 256),
    "uint8, 1x1": (grey((N, 1, 1, 1)), None, (1, 1, 1), 256),
    "uint8, 16 levels": (grey(top=16), 16, (1, 4, 5), 16),
    "bool": (grey(top=2).astype(bool), None, (1, 4, 5), 2),
    "uint16": (grey(dtype="u2", top=65536), None, (1, 4, 5), 65536),
    "uint16, big-endian": (grey(dtype=">u2", top=65536) * 30, None, (1, 4, 5), 65536),
    "int64, 17 levels": (grey(dtype="i8", top=17), 17, (1, 4, 5), 17),
    "int16, big-endian": (grey(dtype=">i2", top=10), 10, (1, 4, 5), 10),
    "uint8, Fortran order": (np.asfortranarray(grey()), None, (1, 4, 5), 256),
    "float32": (grey(dtype="f4") / 9, None, (1, 4, 5), None),
    "float64 in 0..255": (grey(dtype="f8"), None, (1, 4, 5), None),
    "float16": (grey(dtype="f2"), None, (1, 4, 5), None),
    "float64, big-endian": (grey(dtype=">f8") / 9, None, (1, 4, 5), None),
    "float vectors": (grey((N, 2), "f4"), None, (2,), None),
}


@pytest.mark.reliability("F15")
@pytest.mark.parametrize("case", ARRAYS)
def test_array(tmp_path: Path, case: str) -> None:
    array, given, event_shape, levels = ARRAYS[case]
    np.save(tmp_path / "a.npy", array)
    data = load_data(tmp_path / "a.npy", levels=given, seed=3)
    assert data.event_shape == event_shape and data.name == "a.npy"
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 1, 1)
    assert data.bins == (levels and (levels, -1.0, 1.0))
    x = everything(data)
    assert x.dtype == torch.float32 and x.is_contiguous()
    back = x if levels is None else to_levels(x, levels)
    expected = array.reshape(N, -1).astype(np.float32 if levels is None else np.int64)
    assert sorted(back.flatten(1).tolist()) == sorted(expected.tolist())
    assert f"values {float(array.min()):.6g} to {float(array.max()):.6g}" in data.description
    assert ("continuous" if levels is None else f"{levels} levels") in data.description


def object_array() -> np.ndarray:
    array = np.empty((N, 2), dtype=object)
    array[:] = 1
    return array


def poisoned(value: float, dtype: str = "f4") -> np.ndarray:
    array = grey(dtype=dtype)
    array[7, 2, 1] = value
    return array


ARRAYS_BAD: dict[str, tuple[np.ndarray, dict[str, object], str]] = {
    "0-D": (np.float32(1), {}, "[N, F]"),
    "1-D": (grey((N,)), {}, "[N, F]"),
    "5-D": (grey((N, 1, 2, 2, 2)), {}, "[N, F]"),
    "channels last, RGB": (grey((N, 4, 5, 3)), {}, "np.moveaxis(x, 3, 1)"),
    "channels last, grey": (grey((N, 4, 5, 1)), {}, "np.moveaxis(x, 3, 1)"),
    "one RGB image": (grey((N, 5, 3)), {}, "x[:, None]"),
    "no examples": (grey((0, 4, 5)), {}, "no values"),
    "no pixels": (grey((N, 0, 5)), {}, "no values"),
    "too few": (grey((9, 4, 5)), {}, "at least 10"),
    "NaN": (poisoned(np.nan), {}, "nan at (7, 0, 2, 1)"),
    "inf": (poisoned(np.inf), {}, "inf at (7, 0, 2, 1)"),
    "-inf": (poisoned(-np.inf, "f2"), {}, "-inf at"),
    "all NaN": (np.full((N, 3), np.nan), {}, "nan at (0, 0)"),
    "1e30": (poisoned(1e30), {}, "1e+30 at"),
    "1e300": (poisoned(1e300, "f8"), {}, "1e+300 at"),
    "int64": (grey(dtype="i8"), {}, "levels="),
    "int8": (grey(dtype="i1", top=100), {}, "levels="),
    "uint32": (grey(dtype="u4"), {}, "levels="),
    "above the levels": (grey(), {"levels": 16}, "0..15"),
    "below zero": (-grey(dtype="i4"), {"levels": 256}, "-255..0"),
    "complex": (grey(dtype="c8"), {}, "complex64"),
    "text": (np.full((N, 2), "a"), {}, "dtype <U1"),
    "dates": (grey((N, 2), "i8").view("M8[s]"), {}, "datetime64"),
    "structured": (np.zeros((N, 2), dtype=[("a", "f4")]), {}, "dtype"),
    "objects": (object_array(), {}, "objects"),
}


@pytest.mark.reliability("F13", "F15", "F20")
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("case", ARRAYS_BAD)
def test_array_refused(tmp_path: Path, case: str, suffix: str) -> None:
    array, options, word = ARRAYS_BAD[case]
    path = tmp_path / f"a{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez(path, x=array)
    with pytest.raises(DataError) as raised:
        load_data(path, **options)
    check_message(raised.value, repr(str(path)), word)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(text: str, version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(text) + 1)
    return b"\x93NUMPY" + bytes((version, 0)) + size + text.encode() + b"\n"


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s,), }"
FILES_BAD: dict[str, bytes] = {
    "empty": b"",
    "text": b"not an array at all",
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
    "header cut": npy(grey())[:40],
    "data cut": npy(grey())[:-1],
    "data too long": npy(grey()) + b"\0",
    "claims 1 TB": header(HUGE % "1000000000, 1000"),
    "claims 500 MB": header(HUGE % "500000000, 1"),
    "claims 200 MB": header(HUGE % "200000000, 1"),
    "overflow": header(HUGE % (f"{2**33}, {2**33}")),
    "negative": header(HUGE % "-4, -3") + bytes(12),
    "nonsense": header("(" * 500),
    "deep": header("-" * 5000 + "1"),
    "long header": header("#" * 200_000, 2),
    "version 9": header(HUGE % "12", 9),
    "code": header("__import__('os')"),
}


@pytest.mark.reliability("F15", "F19")
@pytest.mark.parametrize("case", FILES_BAD)
def test_npy_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(FILES_BAD[case])
    with pytest.raises(DataError) as raised:
        load_data(path)
    check_message(raised.value, repr(str(path)))


def test_npz(tmp_path: Path) -> None:
    path, x, y = tmp_path / "a.npz", grey((20, 2, 2)), np.arange(20)
    variants = [
        {"x": x, "y": y},
        {"images": x, "labels": y.astype(">i2")},
        {"anything": x},
        {"x": x},
    ]
    for save, arrays in itertools.product([np.savez, np.savez_compressed], variants):
        save(path, **arrays)
        data = load_data(path, seed=1)
        assert (len(data.train), len(data.validation), len(data.test)) == (16, 2, 2)
        if len(arrays) == 1:
            assert data.train_labels is None and data.test_labels is None
        else:
            assert data.train_labels.dtype == torch.int64
            assert torch.equal(to_levels(data.train), torch.from_numpy(x)[data.train_labels, None])


def test_npz_with_splits(tmp_path: Path) -> None:
    path, x, y = tmp_path / "a.npz", grey((30, 2, 2)), np.arange(30)
    arrays = {"x_test": x[20:], "y_test": y[20:], "y_train": y[:20], "x_train": x[:20]}
    np.savez(path, **arrays)
    data = load_data(path)
    assert data.test_labels.tolist() == list(range(20, 30))
    held = data.train_labels.tolist() + data.validation_labels.tolist()
    assert sorted(held) == list(range(20)) and len(data.validation) == 2
    assert torch.equal(to_levels(data.validation)[:, 0], torch.from_numpy(x)[data.validation_labels])
    np.savez(path, **arrays, x_validation=x[:3], y_validation=y[:3])
    data = load_data(path)
    assert data.train_labels.tolist() == list(range(20))
    assert data.validation_labels.tolist() == [0, 1, 2]
    assert data.test_labels.tolist() == list(range(20, 30))


X, Y = grey((N, 2, 2)), np.arange(N)
NPZ_BAD: dict[str, dict[str, np.ndarray]] = {
    "no arrays": {},
    "unknown arrays": {"a": X, "b": X},
    "x and images": {"x": X, "images": X},
    "x and more": {"x": X, "y": Y, "mean": X},
    "labels only": {"y": Y},
    "no x_test": {"x_train": X},
    "no x_train": {"x_test": X, "x_validation": X},
    "x and x_train": {"x": X, "x_train": X, "x_test": X},
    "y without x": {"x_train": X, "x_test": X, "y_validation": Y},
    "some labels": {"x_train": X, "x_test": X, "y_test": Y},
    "other size": {"x_train": X, "x_test": grey((N, 2, 4))},
    "other depth": {"x_train": X, "x_test": X > 0},
    "few": {"x_train": X[:9], "x_test": X},
    "labels too long": {"x": X, "y": np.arange(N + 1)},
    "labels one-hot": {"x": X, "y": np.eye(N, dtype=int)},
    "float labels": {"x": X, "y": Y / 2},
    "negative labels": {"x": X, "y": Y - 1},
    "huge labels": {"x": X, "y": Y.astype("u8") + 2**63},
    "long names": {"z" * 5000: X, "x": X},
}


@pytest.mark.reliability("F15")
@pytest.mark.parametrize("case", NPZ_BAD)
def test_npz_refused(tmp_path: Path, case: str) -> None:
    np.savez(tmp_path / "a.npz", **NPZ_BAD[case])
    with pytest.raises(DataError) as raised:
        load_data(tmp_path / "a.npz")
    check_message(raised.value, repr(str(tmp_path / "a.npz")))


def zipped(content: bytes, method: int = zipfile.ZIP_DEFLATED, name: str = "x.npy") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def patched_size(content: bytes, old: int, new: int) -> bytes:
    return content.replace(struct.pack("<I", old), struct.pack("<I", new))


BIG = header(HUGE % "60000000, 4") + bytes(1000)
ZIP_BAD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "not zip": lambda: npy(X),
    "cut": lambda: zipped(npy(X))[:-30],
    "damaged": lambda: zipped(npy(X), 0).replace(b"NUMPY", b"NUMPX"),
    "wrong sum": lambda: zipped(npy(X), 0).replace(bytes(X[1]), bytes(X[2])),
    "lzma": lambda: zipped(npy(X), zipfile.ZIP_LZMA),
    "not an array": lambda: zipped(b"hello", name="x.txt"),
    "claims much": lambda: zipped(BIG),
    "claims much twice": lambda: patched_size(zipped(BIG), len(BIG), len(BIG) - 1000 + 240_000_000),
    "bomb": lambda: zipped(npy(X) + bytes(3_000_000)),
    "encrypted": lambda: patched_flags(zipped(npy(X))),
    "pickle": lambda: zipped(b"\x80\x04N."),
    "twice the same name": lambda: zipped_twice("x.npy", "x.npy"),
    "twice nearly the same name": lambda: zipped_twice("x.npy", "x"),
}


def zipped_twice(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same name, which is the point
        for name in names:
            archive.writestr(name, npy(X))
    return buffer.getvalue()


def patched_flags(content: bytes) -> bytes:
    at = content.index(b"PK\x01\x02") + 8
    return content[:6] + b"\x01\x00" + content[8:at] + b"\x01\x00" + content[at + 2 :]


@pytest.mark.reliability("F19")
@pytest.mark.parametrize("case", ZIP_BAD)
def test_zip_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(ZIP_BAD[case]())
    with pytest.raises(DataError) as raised:
        load_data(path)
    check_message(raised.value, repr(str(path)))


# Folders of images

G, W = grey((4, 6)), grey((4, 6), "u2", 65536) * 300
RGB = grey((4, 6, 3))
GREY_IMAGE, RGB_IMAGE = Image.fromarray(G), Image.fromarray(RGB)
PALETTE_IMAGE = RGB_IMAGE.quantize(4)
CHW = RGB.transpose(2, 0, 1)
IMAGES_GOOD: dict[str, tuple[bytes, str, int, np.ndarray | None]] = {
    # content, suffix, levels, expected levels [C, H, W] (None where the format is lossy)
    "grey PNG": (encoded(GREY_IMAGE, "PNG"), ".png", 256, G[None]),
    "RGB PNG": (encoded(RGB_IMAGE, "PNG"), ".PNG", 256, CHW),
    "16-bit PNG": (encoded(Image.fromarray(W), "PNG"), ".png", 65536, W[None]),
    "1-bit PNG": (encoded(Image.fromarray(G > 99), "PNG"), ".png", 2, (G > 99)[None]),
    "2-bit PNG": (png(4, 1, 2, 0, b"\0\x1b"), ".png", 4, np.array([[[0, 1, 2, 3]]])),
    "4-bit PNG": (png(4, 1, 4, 0, b"\0\x0f\x5a"), ".png", 16, np.array([[[0, 15, 5, 10]]])),
    "palette PNG": (
        *(encoded(PALETTE_IMAGE, "PNG"), ".png", 256),
        np.asarray(PALETTE_IMAGE.convert("RGB")).transpose(2, 0, 1),
    ),
    "grey BMP": (encoded(GREY_IMAGE, "BMP"), ".bmp", 256, G[None]),
    "RGB BMP": (encoded(RGB_IMAGE, "BMP"), ".bmp", 256, CHW),
    "1-bit BMP": (encoded(Image.fromarray(G > 99), "BMP"), ".bmp", 2, (G > 99)[None]),
    "grey JPEG": (encoded(GREY_IMAGE, "JPEG"), ".jpg", 256, None),
    "RGB JPEG": (encoded(RGB_IMAGE, "JPEG"), ".jpeg", 256, None),
    "WEBP": (encoded(RGB_IMAGE, "WEBP", lossless=True), ".webp", 256, CHW),
    "1x1": (encoded(Image.new("L", (1, 1), 9), "PNG"), ".png", 256, np.array([[[9]]])),
}


@pytest.mark.reliability("F16")
@pytest.mark.parametrize("case", IMAGES_GOOD)
def test_image(tmp_path: Path, case: str, figure) -> None:
    content, suffix, levels, expected = IMAGES_GOOD[case]
    data = load_data(folder_of(tmp_path / "d", content, suffix))
    assert data.bins == (levels, -1.0, 1.0) and data.train_labels is None
    assert len(data.train) == 10 and len(data.test) == 1
    if expected is not None:
        assert data.event_shape == expected.shape
        read = to_levels(data.test[0], levels).numpy().astype(int)
        figure("F16", "largest error of a level, of up to 65536", np.abs(read - expected.astype(int)).max(), at_most=0)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.reliability("F16")
@pytest.mark.parametrize("image", [GREY_IMAGE, RGB_IMAGE, Image.fromarray(W)], ids=["L", "RGB", "16"])
def test_exif_rotation_is_applied(tmp_path: Path, image: Image.Image) -> None:
    data = load_data(folder_of(tmp_path / "d", encoded(image, "PNG", exif=exif(6))))
    u = to_levels(data.test[0], data.bins[0]).numpy()
    expected = np.rot90(np.asarray(image), -1)
    assert np.array_equal(u, np.moveaxis(np.atleast_3d(expected), 2, 0))


def rgb16() -> bytes:
    return png(2, 1, 16, 2, b"\0" + bytes(range(12)))


def bomb_bmp() -> bytes:
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 62, 0, 0, 54, 40, 9000, 9000, 1, 24, *[0] * 6)


FRAMES = [Image.new("L", (4, 4), 90 * i) for i in range(3)]
IMAGES_BAD: dict[str, tuple[bytes, str]] = {
    "RGBA": (encoded(Image.new("RGBA", (4, 4)), "PNG"), "transparency (mode RGBA)"),
    "LA": (encoded(Image.new("LA", (4, 4)), "PNG"), "transparency (mode LA)"),
    "palette with tRNS": (encoded(PALETTE_IMAGE, "PNG", transparency=0), "transparency (mode P)"),
    "grey with tRNS": (encoded(GREY_IMAGE, "PNG", transparency=0), "transparency (mode L)"),
    "RGBA WEBP": (encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 4)), "WEBP"), "transparency"),
    "16-bit RGB": (rgb16(), "RGB;16B"),
    "16-bit RGBA": (png(2, 1, 16, 6, b"\0" + bytes(range(16))), "RGBA"),
    "16-bit BMP": (
        struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 58, 0, 0, 54, 40, 2, 1, 1, 16, *[0] * 6) + bytes(4),
        "BGR;15",
    ),
    "CMYK": (encoded(Image.new("CMYK", (4, 4)), "JPEG"), "CMYK"),
    "APNG": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "frames"),
    "animated WEBP": (
        encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
        "frames",
    ),
    "GIF": (encoded(GREY_IMAGE, "GIF"), "cannot read image"),
    "TIFF": (encoded(GREY_IMAGE, "TIFF"), "cannot read image"),
    "empty": (b"", "cannot read image"),
    "text": (b"hello", "cannot read image"),
    "cut PNG": (encoded(RGB_IMAGE, "PNG")[:-40], "cannot read image"),
    "cut JPEG": (encoded(RGB_IMAGE.resize((64, 64)), "JPEG")[:700], "truncated"),
    "cut BMP": (encoded(RGB_IMAGE, "BMP")[:-40], "truncated"),
    "cut WEBP": (encoded(RGB_IMAGE, "WEBP")[:-40], "cannot read image"),
    "wrong sum": (encoded(GREY_IMAGE, "PNG").replace(b"IDAT", b"IDAS"), "cannot read image"),
    "81 megapixels": (bomb_bmp(), "64 million"),
    "100 megapixels": (png(10_000, 10_000, 8, 0, b"\0"), "64 million"),
    "40 gigapixels": (png(200_000, 200_000, 1, 0, b"\0"), "decompression bomb"),
    "63 megapixels": (png(9_000, 7_000, 8, 0, b"\0"), "truncated"),
    "no pixels": (png(0, 4, 8, 0, b""), "cannot read image"),
    "text bomb": (
        encoded(GREY_IMAGE, "PNG")[:33]
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000)))
        + encoded(GREY_IMAGE, "PNG")[33:],
        "too large",
    ),
}


@pytest.mark.reliability("F16", "F18", "F19")
@pytest.mark.parametrize("case", IMAGES_BAD)
def test_image_refused(tmp_path: Path, case: str) -> None:
    content, word = IMAGES_BAD[case]
    folder = folder_of(tmp_path / "d", content, ".png")
    with pytest.raises(DataError) as raised:
        load_data(folder)
    check_message(raised.value, repr(str(folder / "00.png")), word)


@pytest.mark.reliability("F19")
def test_too_many_large_images(tmp_path: Path) -> None:
    zeros = png(5000, 5000, 1, 0, bytes(626 * 5000))
    with pytest.raises(DataError) as raised:
        load_data(folder_of(tmp_path / "d", zeros))
    check_message(raised.value, repr(str(tmp_path / "d")), "above 1073741824 bytes")


@pytest.mark.reliability("F18")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".npy", ".npz"])
def test_any_damage_is_a_data_error(tmp_path: Path, suffix: str) -> None:
    """Cut and changed files either load or raise a DataError of one line."""
    image, rng = Image.fromarray(grey((9, 9, 3))), np.random.default_rng(0)
    kinds = {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
    if suffix in kinds:
        good = encoded(image, kinds[suffix], exif=exif(6))
    else:
        good = npy(X) if suffix == ".npy" else zipped(npy(X))
    path = tmp_path / f"a{suffix}"
    refused = 0
    for i in range(200):
        content = bytearray(good[: len(good) * i // 100] if i < 100 else good)
        for _ in range(0 if i < 100 else 1 + i % 3):
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(content)
        try:
            load_data(tmp_path if suffix in kinds else path)
        except DataError as error:
            check_message(error)
            refused += "at least 10 are needed" not in str(error)
    assert refused > 80


def test_classes_and_order(tmp_path: Path) -> None:
    for c, name in enumerate(["zebra", "Ärger", "a b", "new\nline"]):
        for i in range(5):
            folder_of(tmp_path / "d" / name, b"", count=0) if i == 0 else None
            Image.new("L", (2, 3), 10 * c + i).save(tmp_path / "d" / name / f"{i}.png")
    (tmp_path / "d" / ".hidden").mkdir()
    (tmp_path / "d" / "a b" / "notes.txt").write_text("x")
    data = load_data(tmp_path / "d", seed=4)
    assert data.classes == ("a b", "new\nline", "zebra", "Ärger") and len(data.train) == 16
    written = torch.tensor([2, 3, 0, 1])  # the order of the list above
    assert torch.equal(to_levels(data.train)[:, 0, 0, 0] // 10, written[data.train_labels])
    assert "1 other file ignored" in data.description
    again, other = load_data(tmp_path / "d", seed=4), load_data(tmp_path / "d", seed=5)
    assert torch.equal(everything(again), everything(data))
    assert not torch.equal(everything(other), everything(data))


def one(folder: Path, name: str = "a.png", image: Image.Image = GREY_IMAGE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(encoded(image, "PNG"))
    return folder


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def make(path: Path) -> None:
    path.mkdir(parents=True)


FOLDERS_BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: None, "cannot read"),
    "empty": (lambda d: make(d), "no images"),
    "text only": (lambda d: (make(d), (d / "a.txt").write_text("x")), "no images"),
    "folder named x.png": (lambda d: make(d / "x.png"), "x.png"),
    "two sizes": (lambda d: one(one(d), "b.png", Image.new("L", (9, 8))), "[1, 4, 6]"),
    "two modes": (lambda d: one(one(d), "b.png", RGB_IMAGE), "[3, 4, 6]"),
    "two depths": (lambda d: one(one(d), "b.png", Image.fromarray(W)), "65536"),
    "images and folders": (lambda d: (one(d), make(d / "c")), "beside the folder 'c'"),
    "empty class": (lambda d: (one(d / "b"), make(d / "c")), "holds no images"),
    "nested": (lambda d: (one(d / "b" / "c"), one(d / "b")), "holds the folder 'c'"),
    "split folders": (lambda d: (one(d / "train"), one(d / "test")), "give one of them"),
    "too few": (lambda d: one(d), "at least 10"),
    "dangling link": (lambda d: link(d / "a.png", "nowhere"), "a.png"),
    "link loop": (lambda d: link(d / "a.png", "a.png"), "a.png"),
    "named pipe": (lambda d: (make(d), os.mkfifo(d / "a.png")), "not a regular file"),
    "folder loop": (lambda d: link(d / "c" / "c", "../c"), "holds the folder 'c'"),
}


@pytest.mark.reliability("F17", "F18", "F20")
@pytest.mark.parametrize("case", FOLDERS_BAD)
def test_folder_refused(tmp_path: Path, case: str) -> None:
    build, word = FOLDERS_BAD[case]
    build(tmp_path / "d")
    with pytest.raises(DataError) as raised:
        load_data(tmp_path / "d")
    check_message(raised.value, str(tmp_path / "d"), word)


@pytest.mark.reliability("F17")
def test_mixed_sizes_name_both_files(tmp_path: Path) -> None:
    one(one(tmp_path / "d"), "b.png", Image.new("L", (9, 8)))
    with pytest.raises(DataError) as raised:
        load_data(tmp_path / "d")
    check_message(raised.value, "a.png' is [1, 4, 6]", "b.png' is [1, 8, 9]")


@pytest.mark.reliability("F18")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("target", ["d", "d/00.png"])
def test_unreadable(tmp_path: Path, target: str) -> None:
    folder_of(tmp_path / "d", encoded(GREY_IMAGE, "PNG"))
    (tmp_path / target).chmod(0)
    try:
        with pytest.raises(DataError) as raised:
            load_data(tmp_path / "d")
    finally:
        (tmp_path / target).chmod(0o700)
    check_message(raised.value, str(tmp_path / target), "Permission denied")


@pytest.mark.reliability("F18")
def test_a_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between being listed and being read; later no file is needed, all are in memory."""
    folder = folder_of(tmp_path / "d", encoded(GREY_IMAGE, "PNG"))
    read = data_module._read_image

    def read_and_delete(path: str, *modules: object) -> object:
        (folder / "05.png").unlink(missing_ok=True)
        return read(path, *modules)

    monkeypatch.setattr(data_module, "_read_image", read_and_delete)
    with pytest.raises(DataError) as raised:
        load_data(folder)
    check_message(raised.value, repr(str(folder / "05.png")), "No such file")


NAMES = [
    "two words",
    "ünï☃",
    "new\nline",
    "-leading",
    "quote'\"",
    "digits",
    "é" * 120,
    "\udcff\udcfe",
]


@pytest.mark.reliability("F21")
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_awkward_names(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / name, encoded(GREY_IMAGE, "PNG"))
    data = load_data(folder)
    assert data.description.isprintable() and data.name.isprintable() and len(data.train) == 10
    (folder / "11.png").write_bytes(b"")
    with pytest.raises(DataError) as raised:
        load_data(str(folder))
    check_message(raised.value, "11.png")


@pytest.mark.reliability("F21")
def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_of(tmp_path / "d", encoded(GREY_IMAGE, "PNG")))
    assert load_data(".").name == "d" and load_data(f"..{os.sep}d").name == "d"
    folder_of(tmp_path / "d" / ".x" / "digits", encoded(GREY_IMAGE, "PNG"))
    monkeypatch.chdir(tmp_path / "d" / ".x")
    assert len(load_data("digits").train) == 1437 and len(load_data(Path("digits")).train) == 10


SOURCES_BAD: list[object] = ["", "a\0b", 3, None, b"digits", X, ["digits"]]
OPTIONS_BAD: list[dict[str, object]] = [
    {"seed": -1},
    {"seed": 1.5},
    {"seed": True},
    {"seed": None},
    {"seed": "0"},
    {"seed": 2**63},
    {"seed": X},
    {"levels": 17},
    {"levels": 1},
    {"levels": True},
    {"data_dir": "d"},
    {"data_dir": 3},
]


@pytest.mark.reliability("F15")
@pytest.mark.parametrize("source", SOURCES_BAD, ids=repr)
def test_source_refused(source: object) -> None:
    with pytest.raises(OptionError) as raised:
        load_data(source)
    check_message(raised.value, "source")


@pytest.mark.reliability("F29")
@pytest.mark.parametrize("options", OPTIONS_BAD, ids=repr)
def test_option_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError) as raised:
        load_data("digits", **options)
    check_message(raised.value, next(iter(options)))


@pytest.mark.reliability("F29")
@pytest.mark.parametrize("levels", [0, 1, 65537, 2.0, "9"])
def test_levels_refused(tmp_path: Path, levels: object) -> None:
    np.save(tmp_path / "a.npy", X)
    for call in (
        lambda: load_data(tmp_path / "a.npy", levels=levels),
        lambda: to_levels(X, levels),
    ):
        with pytest.raises(OptionError) as raised:
            call()
        check_message(raised.value, f"levels={levels!r}")


@pytest.mark.reliability("F15")
def test_levels_of_floats_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X / 2)
    with pytest.raises(OptionError) as raised:
        load_data(tmp_path / "a.npy", levels=4)
    check_message(raised.value, "levels=4", "a.npy", "float64")


@pytest.mark.reliability("F21")
@pytest.mark.parametrize("source", ["Digits", "cifar10", "a" * 300, "x" * 5000, "\ud800", "tests", __file__, "a.npy/b"])
def test_path_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as raised:
        load_data(source)
    assert str(raised.value).isprintable() and repr(source)[:50] in str(raised.value)


def test_single_image_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        load_data(one(tmp_path / "d") / "a.png")
    check_message(raised.value, "a.png", "give the folder")


@pytest.mark.parametrize("module", ["sklearn.datasets", "PIL.Image"])
def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError) as raised:
        load_data("digits" if "sk" in module else one(tmp_path / "d"))
    check_message(raised.value, 'pip install "pyrodiff[demo]"')


@pytest.mark.reliability("F15", "F16")
@pytest.mark.parametrize("levels", [2, 3, 17, 256, 257, 65536])
def test_every_level_comes_back(tmp_path: Path, levels: int) -> None:
    u = np.arange(levels * 10, dtype="i8").reshape(10, levels) % levels
    np.save(tmp_path / "a.npy", u)
    x = everything(load_data(tmp_path / "a.npy", levels=levels))
    exact = torch.linspace(-1, 1, levels, dtype=torch.float64).float()
    assert torch.equal(x, exact.expand(10, -1)) or (x - exact).abs().max() < 1e-7
    assert torch.equal(x, -x.flip(1)) and x.min() == -1 and x.max() == 1
    back = to_levels(x, levels)
    assert back.dtype == (torch.uint8 if levels <= 256 else torch.int32)
    assert torch.equal(back.long(), torch.from_numpy(np.sort(u)))


def test_to_levels_clamps_and_refuses_nan() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, float("inf")], dtype=torch.bfloat16)
    assert to_levels(x).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(DataError, match="1 NaN"):
        to_levels(torch.tensor([0.0, float("nan")]))
