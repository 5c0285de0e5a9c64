"""Bad input of every kind, generated: what `test_bad_input.py` hands to the command line, and `fuzz/` starts from.

Each generator yields cases by name. A case is what to do in an empty folder (files to write) and the arguments of a command
that then reads them; whether an input turns out to be good does not matter, since good ones must be read as cleanly.
"""

from __future__ import annotations

import gzip
import io
import itertools
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# ---------------------------------------------------------------------- damage


def cut(content: bytes, times: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """A file's beginnings: of no byte, of all but one, and of lengths in between."""
    lengths = {0, 1, len(content) - 1, *(rng.randrange(len(content)) for _ in range(times))}
    for length in sorted(lengths):
        yield f"cut to {length}", content[:length]


def flipped(content: bytes, times: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """A file with one to eight bits flipped, most of them early, where headers are."""
    for i in range(times):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[int(len(content) * rng.random() ** 2)] ^= 1 << rng.randrange(8)
        yield f"flip {i}", bytes(changed)


def spliced(content: bytes, other: bytes, times: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """The beginning of one file and the end of another, a repeated part, and extreme numbers in the middle."""
    extremes = (b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00")
    for i in range(times):
        at = rng.randrange(len(content))
        yield f"splice {i}", content[:at] + other[rng.randrange(len(other)) :]
        yield f"repeat {i}", content[:at] + content[at // 2 : at] + content[at:]
        yield f"extreme {i}", content[:at] + rng.choice(extremes) + content[at + 4 :]


def damaged(
    content: bytes, rng: random.Random, *, times: int = 1, other: bytes | None = None
) -> Iterator[tuple[str, bytes]]:
    """All of the above."""
    yield from cut(content, 8 * times, rng)
    yield from flipped(content, 20 * times, rng)
    yield from spliced(content, content if other is None else other, 4 * times, rng)


# ---------------------------------------------------------------------- images

MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBa",
    "La",
    "RGBX",
    "I;16",
    "I;16B",
)
FORMATS = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "GIF": ".png",
    "TIFF": ".bmp",
    "PPM": ".png",
    "TGA": ".bmp",
    "ICO": ".png",
    "JPEG2000": ".jpg",
    "AVIF": ".webp",
    "PCX": ".bmp",
    "PDF": ".png",
}
SIZES = ((1, 1), (6, 4))


def pixels(mode: str, size: tuple[int, int], seed: int = 0) -> Any:
    """An image of a mode, from random bytes; None where Pillow has no such image."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    depth = {"I;16": 2, "I;16B": 2, "I": 4, "F": 4}.get(mode) or len(Image.new(mode, (1, 1)).getbands())
    if mode in ("1", "LAB"):
        return Image.fromarray(noise[..., 0]).convert("1") if mode == "1" else Image.new("LAB", size, (100, 130, 120))
    return Image.frombytes(mode, size, noise[..., :depth].tobytes())


def encoded(image: Any, kind: str, **options: Any) -> bytes | None:
    """A file's bytes; None where the format cannot hold the image."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, data: bytes, *extra: bytes) -> bytes:
    """A PNG file by hand, of anything that a header can say."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def image_files() -> Iterator[tuple[str, str, bytes]]:
    """Whole image files of every mode, format, size and trimming: name, suffix, content."""
    for mode, (kind, suffix), size in itertools.product(MODES, FORMATS.items(), SIZES):
        content = encoded(pixels(mode, size), kind)
        if content is not None:
            yield f"{mode} {kind} {size[0]}x{size[1]}", suffix, content
    from PIL import Image

    rgb, grey, frames = pixels("RGB", (6, 4)), pixels("L", (6, 4)), [pixels("L", (6, 4), i) for i in range(3)]
    for orientation in (*range(10), 255, 65535):
        tags = Image.Exif()
        tags[0x0112] = orientation
        for kind in ("PNG", "JPEG", "WEBP"):
            yield f"EXIF {orientation} {kind}", FORMATS[kind], encoded(rgb, kind, exif=tags) or b""
    for kind in ("PNG", "WEBP", "GIF", "TIFF"):
        yield (
            f"animated {kind}",
            FORMATS[kind],
            encoded(frames[0], kind, save_all=True, append_images=frames[1:]) or b"",
        )
    for kind, options in (
        ("PNG", {"transparency": 3}),
        ("PNG", {"icc_profile": b"rubbish" * 20}),
        ("PNG", {"dpi": (1, 10**6)}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": b"Exif\0\0rubbish"}),
        ("JPEG", {"icc_profile": b"x" * 70000}),
        ("JPEG", {"quality": 1, "subsampling": 2}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"rubbish"}),
        ("PNG", {"exif": b"Exif\0\0" + bytes(range(99))}),
    ):
        for label, image in (("grey", grey), ("RGB", rgb), ("palette", rgb.quantize(5))):
            if content := encoded(image, kind, **options):
                yield f"{label} {kind} with {', '.join(options)}", FORMATS[kind], content
    for depth, colour in itertools.product((1, 2, 3, 4, 8, 16, 32), (0, 2, 3, 4, 6, 7)):  # most of them no PNG
        bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4, 7: 1}[colour]
        rows = (b"\0" + bytes(range((6 * bits + 7) // 8))) * 4
        palette = [chunk(b"PLTE", bytes(range(48)))] if colour == 3 else []
        yield f"PNG depth {depth} colour {colour}", ".png", png(6, 4, depth, colour, zlib.compress(rows), *palette)


def image_bombs() -> Iterator[tuple[str, str, bytes]]:
    """Small files that claim to be large."""
    nothing = zlib.compress(b"")
    for width, height in (
        (8001, 8000),
        (10_000, 10_000),
        (2**31 - 1, 2**31 - 1),
        (2**31, 1),
        (2**32 - 1, 1),
        (0, 5),
        (1, 10**9),
    ):
        for depth, colour in ((1, 0), (8, 0), (8, 6), (16, 2)):
            yield (
                f"PNG {width}x{height} depth {depth} colour {colour}",
                ".png",
                png(width, height, depth, colour, nothing),
            )
    megabytes = zlib.compress(bytes(40_000_000))
    yield "PNG whose rows never end", ".png", png(6, 4, 8, 0, megabytes)
    for kind in (b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tEXt"):
        data = {b"zTXt": b"a\0\0" + megabytes, b"iTXt": b"a\0\1\0\0\0" + megabytes, b"iCCP": b"a\0\0" + megabytes}
        yield (
            f"PNG with a {kind.decode()} bomb",
            ".png",
            png(6, 4, 8, 0, nothing, chunk(kind, data.get(kind, bytes(9_000_000)))),
        )
    for width, height in ((9000, 9000), (2**31 - 1, 1), (1, -(2**31)), (-5, 5), (0, 0)):
        fields = (b"BM", 62, 0, 54, 40, width, height, 1, 24, *[0] * 6)
        yield f"BMP {width}x{height}", ".bmp", struct.pack("<2sIIIIiiHHIIiiII", *fields)
    jpeg = encoded(pixels("L", (6, 4)), "JPEG") or b""
    at = jpeg.index(b"\xff\xc0") + 5
    for height, width in ((65535, 65535), (0, 6), (4, 0)):
        yield f"JPEG {width}x{height}", ".jpg", jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]
    webp = encoded(pixels("RGB", (6, 4)), "WEBP") or b""
    at = webp.index(b"VP8 ") + 14
    yield "WEBP 16383x16383", ".webp", webp[:at] + struct.pack("<HH", 16383, 16383) + webp[at + 4 :]


# ---------------------------------------------------------------------- arrays

DTYPES = (
    "?",
    "i1",
    "i2",
    "i4",
    "i8",
    "u1",
    "u2",
    "u4",
    "u8",
    "f2",
    "f4",
    "f8",
    "g",
    "F",
    "D",
    "G",
    "O",
    "S3",
    "U2",
    "V4",
    "m8[s]",
    "M8[D]",
    ">i2",
    ">i8",
    ">u2",
    ">u4",
    ">f2",
    ">f4",
    ">f8",
    ">c8",
    ">U2",
    "f4,i2",
    "(2,)f4",
    "S0",
    "M8",
)
SHAPES = (
    (),
    (1,),
    (12,),
    (0,),
    (12, 3),
    (12, 0),
    (0, 3),
    (9, 3),
    (1, 1),
    (12, 4, 5),
    (12, 4, 3),
    (12, 5, 1),
    (12, 4, 0),
    (12, 1, 4, 5),
    (12, 4, 5, 3),
    (12, 3, 4, 5),
    (12, 2, 4, 5),
    (12, 1, 1, 1),
    (12, 1, 2, 2, 2),
    (12, 1, 1, 1, 1, 1),
    (12, 400),
)
VALUES = {
    "zeros": 0.0,
    "ones": 1.0,
    "large": 3e38,
    "huge": 1e300,
    "NaN": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "1e30": 1e30,
    "negative": -7.0,
    "255": 255.0,
    "tiny": 1e-42,
}


def npy(array: np.ndarray[Any, Any], version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    return buffer.getvalue()


def header(text: str, version: int = 1) -> bytes:
    """The beginning of a .npy file with any text for its header."""
    content = text.encode("utf-8", "surrogatepass") + b"\n"
    return (
        b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(content) % 2**16) + content
    )


def array_files() -> Iterator[tuple[str, bytes]]:
    """Files of every dtype, shape and range, and headers that say what is not so."""
    rng = np.random.default_rng(0)
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        kind = np.dtype(dtype)
        if kind.hasobject or kind.kind in "SUVmM":
            array = np.zeros(shape, kind)
        else:
            array = rng.integers(0, 2, shape).astype(kind)
        yield f"{dtype} {shape}", npy(array)
    for (name, value), dtype in itertools.product(VALUES.items(), ("f2", "f4", "f8", ">f8", "g")):
        array = rng.normal(size=(12, 3))
        with np.errstate(over="ignore"):
            array[5, 1] = value
            yield f"one value of {name} as {dtype}", npy(array.astype(dtype))
            yield f"all {name} as {dtype}", npy(np.asfortranarray(np.full((12, 3), value).astype(dtype)))
    for version in ((1, 0), (2, 0), (3, 0)):
        yield f"version {version}", npy(np.zeros((12, 3)), version)
    said = "{'descr': %s, 'fortran_order': %s, 'shape': %s, }"
    shapes = (
        "(12, 3)",
        "(2**40,)",
        "(1099511627776, 8)",
        "(-1, 3)",
        "(12, -3)",
        "(0,)",
        "()",
        "(12.0, 3)",
        "(True, 3)",
        "[12, 3]",
        "12",
        "None",
        "(" + "1, " * 3000 + ")",
        f"({10**30}, 0)",
        "('a',)",
        "(12, 3, 10000000000)",
    )
    descrs = (
        "'<f4'",
        "'|u1'",
        "'|O'",
        "'|O8'",
        "'<f3'",
        "'<f99'",
        "''",
        "None",
        "[('a', '<f4')]",
        "[('a', '|O')]",
        "('<f4', (2,))",
        "'<U1000000000'",
        "'V2147483647'",
        "{'names': ['a'], 'formats': ['O']}",
        "[('a', [('b', [('c', '<f4')])])]",
        "'float32'",
        "'M8[7s/3]'",
        "'\\udcff'",
    )
    for descr, order, shape in itertools.product(descrs, ("False", "True", "3"), shapes):
        if "(12, 3)" in (shape, "(12, 3)") and (shape == "(12, 3)" or descr in descrs[:3]):
            yield f"header {descr} {order} {shape[:40]}", header(said % (descr, order, shape)) + bytes(144)
    for text in (
        "",
        "{}",
        "[]",
        "1",
        "{'descr': '<f4'}",
        "(" * 200,
        "-" * 9000 + "1",
        "#" * 70000,
        "\0",
        "{1: 2}",
        "{'a': {}}" * 3,
        "__import__('os')",
        "[" * 90 + "]" * 90,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (12, 3), 'x': 1}",
        "'" * 99,
        "f'{1}'",
        "\udcff",
        "1if 1else 2",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (12, 3), }\n\n\n#",
        "0x" + "f" * 9000,
        "1e999",
        "9" * 5000,
        "lambda: 0",
    ):
        for version in (1, 2, 3, 4, 255):
            yield f"header text {text[:60]!r} version {version}", header(text, version) + bytes(144)


def zipped(files: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # of duplicate names, which are the point
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def archive_files() -> Iterator[tuple[str, bytes]]:
    """Archives with the wrong names, twice the same name, the wrong sizes, bombs, and what is no archive."""
    x, labels, words = (
        np.zeros((12, 3), "u1"),
        np.arange(12),
        ("x", "y", "images", "labels", "x_train", "x_test", "x_validation", "y_train", "y_test"),
    )
    arrays = {
        "x": npy(x),
        "y": npy(labels),
        "f": npy(x / 2),
        "o": npy(np.array([None] * 12)),
        "s": npy(np.array(["a"] * 12)),
        "e": b"",
        "k": b"\x80\x04N.",
    }
    rng = random.Random(0)
    for i in range(120):
        chosen = [rng.choice(words) for _ in range(rng.randrange(5))]
        files = [
            (f"{word}.npy", arrays[rng.choice("xxxyfosek") if word[0] in "xi" else rng.choice("yyyxfek")])
            for word in chosen
        ]
        yield f"names {i}: {' '.join(chosen)}", zipped(files, rng.choice((0, 8, 8, 12, 14)))
    for name in (
        "x",
        "x.npy.npy",
        "../x.npy",
        "/x.npy",
        "a/b/x.npy",
        ".npy",
        "x.NPY",
        "é.npy",
        "x\n.npy",
        "x" * 60000,
        "x.npy/",
        "\x1b[31m.npy",
    ):
        yield f"member {name[:20]!r}", zipped([(name, npy(x))])
    yield "the same name twice", zipped([("x.npy", npy(x)), ("x.npy", npy(labels))])
    yield "x.npy and x", zipped([("x.npy", npy(x)), ("x", npy(x))])
    yield "bomb behind a small header", zipped([("x.npy", npy(x) + bytes(50_000_000))])
    big = header("{'descr': '|u1', 'fortran_order': False, 'shape': (50000000, 4), }")
    yield "small behind a large header", zipped([("x.npy", big + bytes(1000))])
    claims = zipped([("x.npy", big)])
    yield "claims 2 GB", claims.replace(struct.pack("<I", len(big)), struct.pack("<I", 2**31))
    yield "claims 200 MB", claims.replace(struct.pack("<I", len(big)), struct.pack("<I", len(big) + 200_000_000))
    yield "ten thousand members", zipped([(f"{i}.npy", b"") for i in range(10_000)], 0)
    yield "an archive in an archive", zipped([("x.npy", zipped([("x.npy", npy(x))]))])
    good = zipped([("x.npy", npy(x)), ("y.npy", npy(labels))])
    for flag in (1, 0x40, 0x800, 0x2000):
        at = good.index(b"PK\x01\x02") + 8
        yield (
            f"flags {flag}",
            good[:6] + struct.pack("<H", flag) + good[8:at] + struct.pack("<H", flag) + good[at + 2 :],
        )
    yield "a comment before", b"#!/bin/sh\n" + good
    yield "two archives", good + good


def idx(shape: tuple[int, ...], kind: int = 8, data: bytes | None = None) -> bytes:
    """An IDX file that announces a shape."""
    content = bytes(int(np.prod(shape, dtype=object)) % 2**20) if data is None else data
    return bytes((0, 0, kind, len(shape) % 256)) + struct.pack(f">{len(shape)}I", *shape) + content


def mnist_files() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Folders of the four files of MNIST, one of them wrong."""
    names = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    good = dict(zip(names, (idx((5010, 2, 2)), idx((5010,)), idx((12, 2, 2)), idx((12,))), strict=True))
    rng = random.Random(0)
    yield "good", good
    for name in names:
        yield f"without {name}", {k: v for k, v in good.items() if k != name}
        for change, content in (
            *cut(good[name], 3, rng),
            *flipped(good[name][:16], 6, rng),
            ("gzip in place of plain", gzip.compress(good[name])),
            ("wrong kind", idx((12, 2, 2), 13)),
            ("4-D", idx((12, 1, 2, 2))),
            ("0-D", idx(())),
            ("announces TiB", idx((2**32 - 1,) * 3, data=b"")),
            ("zero size", idx((5010, 0, 2))),
            ("one more byte", good[name] + b"\0"),
            ("fewer", idx((12,))),
        ):
            yield f"{name} {change}", good | {name: content}
        packed = gzip.compress(good[name])
        others = {k: v for k, v in good.items() if k != name}
        for change, content in (
            ("good", packed),
            *cut(packed, 3, rng),
            *flipped(packed, 6, rng),
            ("bomb", gzip.compress(good[name] + bytes(30_000_000))),
            ("many members", packed + packed),
            ("rubbish after", packed + b"rubbish"),
        ):
            yield f"{name}.gz {change}", others | {f"{name}.gz": content}


# ---------------------------------------------------------------------- configurations

YAMLS: dict[str, str | bytes] = {
    **{
        f"tag {tag}": f"data: {tag}"
        for tag in (
            "!!python/object/apply:os.system [touch hacked]",
            "!!python/object/new:os.system [touch hacked]",
            "!!python/name:os.system",
            "!!python/module:os",
            "!!python/tuple [1]",
            "!!binary aGVsbG8=",
            "!!set {a, b}",
            "!!timestamp 2001-01-01",
            "!!omap [a: 1]",
            "!x y",
            "!!int x",
            "!!float x",
            "!!bool 3",
            "!!null 3",
            "!!str [1]",
            "!!map 3",
            "!!seq 3",
            "!!merge 3",
            "!!python/long 1",
            "!!python/complex 1j",
        )
    },
    "laughs": "a: &a [1, 1]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrstuvwxyz")),
    "merged laughs": "a: &a {x: 1}\n"
    + "".join(f"{b}: &{b} {{<<: [*{a}, *{a}, *{a}, *{a}]}}\n" for a, b in itertools.pairwise("abcdefghijklmn")),
    "cycle": "&a [*a]",
    "cycle in a group": "net: &a {width: *a}",
    "cycle of merges": "net: &a {<<: *a}",
    "alias of nothing": "data: *x",
    "merge of a number": "net: {<<: 3}",
    "merge of a list": "<<: [{data: a}, {data: b}]",
    "merge": "net: {<<: {width: 8}}",
    **{f"{depth} deep {pair}": pair[0] * depth for depth in (100, 5000, 1_000_000) for pair in ("[]", "{}")},
    **{
        f"{depth} deep and closed {pair}": "net: " + pair[0] * depth + pair[1] * depth
        for depth in (100, 5000, 300_000)
        for pair in ("[]", "{}")
    },
    "deep by indentation": "".join(" " * i + "a:\n" for i in range(900)),
    "deep by dashes": "- " * 5000,
    "deep by questions": "? " * 5000,
    "deep aliases in keys": "? &a [a]\n: *a",
    "a list for a key": "? [a, b]\n: c",
    "a mapping for a key": "? {a: b}\n: c",
    "tabs": "net:\n\twidth: 3",
    "twice the same key": "data: a\ndata: b\n",
    "twice the same group": "net: {width: 8}\nnet: {width: 9}\n",
    "unknown key": "dta: x",
    "unknown in a group": "net: {widht: 3}",
    "no mapping": "3",
    "a list": "- 1",
    "text": "hello",
    "empty": "",
    "null": "null",
    "only a comment": "# hello",
    "two documents": "data: a\n---\ndata: b",
    "a marker": "---",
    "end": "...",
    "directive": "%YAML 9.9\n---\ndata: a",
    "tag directive": "%TAG ! tag:x,2000:\n---\ndata: !y z",
    "unclosed": "data: [x",
    "unclosed quote": "data: 'x",
    "unclosed brace": "{",
    "bad escape": 'data: "\\q"',
    "surrogate": 'data: "\\udcff"',
    "NUL escape": 'data: "a\\0b"',
    "big escape": 'data: "\\UFFFFFFFF"',
    "NUL": "data: a\0b",
    "bell": "data: \a",
    "a number of 5000 digits": "seed: " + "9" * 5000,
    "a number of 5000 digits for a float": "training: {lr: " + "9" * 5000 + "}",
    "sexagesimal": "seed: 1:2:3",
    "a key of a megabyte": "a" * 1_000_000 + ": 1",
    "a value of a megabyte": "data: " + "a" * 1_000_000,
    "a long key": "a" * 90_000 + ": 1",
    "a long value": "data: " + "a" * 90_000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(8_000)),
    "a megabyte of keys": "".join(f"k{i}: 1\n" for i in range(80_000)),
    "a line without end": "#" * 2_000_000,
    "latin-1": "data: é".encode("latin-1"),
    "UTF-16": "data: x".encode("utf-16"),
    "UTF-32": "data: x".encode("utf-32"),
    "byte order mark": "\ufeffdata: x",
    "binary": bytes(range(256)),
    "zeros": bytes(5000),
    "gzip": gzip.compress(b"data: x"),
    "long anchor": "&" + "a" * 100_000 + " 1",
    "windows line ends": "data: x\r\nseed: 1\r\n",
    "line separators": "data: x\u2028seed: 1\x85",
    "key null": "null: 1",
    "key number": "1: 1",
    "key bool": "true: 1",
    "config in config": "config: other.yaml",
    "debug in config": "debug: true",
    "print_config": "print_config: 1",
    "dots in keys": "net.width: 8",
    "json": '{"data": "x", "net": {"width": 8}}',
    "class_path": "net: {class_path: os.system, init_args: {command: touch hacked}}",
    "dict_kwargs": "net: {dict_kwargs: {x: 1}}",
    "env": "data: ${HOME}",
    "subcommand": "command: info",
    "a subcommand's group": "train: {data: x}",
    "include": "data: !include /etc/passwd",
}

# What an option of any type may be given: of these some are right for some, and most are wrong for most.
RUBBISH = (
    "",
    " ",
    "x",
    "nan",
    "inf",
    "-inf",
    ".nan",
    "-.inf",
    "-1",
    "0",
    "1",
    "2",
    "3.5",
    "-0.0",
    "1e-300",
    "1e300",
    "1e400",
    "1000000000",
    "-1000000000",
    "99999999999999999999",
    "9" * 5000,
    "true",
    "false",
    "null",
    "None",
    "~",
    "[]",
    "[0]",
    "[-1]",
    "[1.5]",
    "[x]",
    "[nan]",
    "[null]",
    "[1000000000]",
    "[[1]]",
    "{}",
    "{a: 1}",
    "{1: 2}",
    "[",
    "{",
    "'",
    "é",
    "\udcff",
    "a\nb",
    "\x1b[31m",
    "-",
    "--",
    "---",
    "&a [*a]",
    "!!python/name:os.system",
    "0x10",
    "0b1",
    "1_0",
    "1:30",
    "2001-01-01",
    ",",
    "1,2",
    "1 2",
    "=",
    "%s",
    "{0}",
    "*",
    "..",
    "/",
    "/dev/null",
    "/dev/zero",
    "a" * 300,
    "a" * 70000,
    "\\",
    "\t",
    "$HOME",
    "@x",
    "#",
)


def nested(value: str, dotted: str) -> str:
    """One option in YAML."""
    *groups, last = dotted.split(".")
    return "".join(f"{group}: {{" for group in groups) + f"{last}: {value}" + "}" * len(groups)


# ---------------------------------------------------------------------- folders and paths


def touch(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def folder_of(path: Path, content: bytes, suffix: str = ".png", count: int = 12) -> Path:
    for i in range(count):
        touch(path / f"{i:02d}{suffix}", content)
    return path


def touch_all(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        touch(folder / name, content)


def one_among(folder: Path, good: bytes, bad: bytes, suffix: str) -> None:
    """A folder of good files and a bad one."""
    touch(folder_of(folder, good, suffix) / f"x{suffix}", bad)


NAMES = (
    "two words",
    "ünï☃",
    "new\nline",
    "-leading",
    "--help",
    "quote'\"",
    "é" * 120,
    "a" * 255,
    "\udcff\udcfe",
    "\x1b[31mred",
    "a\tb",
    "*?[x]",
    "~",
    "$HOME",
    "%s{0}",
    "#",
    "\u202eright",
    "a:b",
    "a,b",
    "[1]",
    "{a}",
    "null",
    "true",
    "1",
    "0x10",
    "'",
    "\\",
    "C:\\x",
    "a=b",
    "=",
    "!",
    "&a",
    "nan",
    "é\u0301",
    "\U0001f600",
)


def folders() -> dict[str, Callable[[Path], object]]:
    """Folders of images that something is wrong with, by what builds them at a path."""
    small, other = encoded(pixels("L", (6, 4)), "PNG") or b"", encoded(pixels("RGB", (5, 4)), "PNG") or b""

    def link(path: Path, target: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def fifo(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)

    def both(*builders: Callable[[Path], object]) -> Callable[[Path], object]:
        return lambda d: [build(d) for build in builders]

    good: Callable[[Path], object] = lambda d: folder_of(d, small)  # noqa: E731
    one_of = {
        "nothing": lambda d: touch(d / "x.png"),
        "a text": lambda d: touch(d / "x.png", b"hello"),
        "another size": lambda d: touch(d / "x.png", other),
        "a folder named x.png": lambda d: (d / "x.png").mkdir(parents=True),
        "a dangling link": lambda d: link(d / "x.png", "nowhere"),
        "a link to itself": lambda d: link(d / "x.png", "x.png"),
        "a link to a folder": lambda d: link(d / "x.png", "."),
        "a pipe": lambda d: fifo(d / "x.png"),
        "a device": lambda d: link(d / "x.png", "/dev/zero"),
        "a terminal": lambda d: link(d / "x.png", "/dev/tty"),
        "a folder": lambda d: (d / "c").mkdir(parents=True),
        "a link to the folder": lambda d: link(d / "c", "."),
        "a pipe of another name": lambda d: fifo(d / "pipe"),
        "a hidden image": lambda d: touch(d / ".x.png", b"hello"),
        "another file": lambda d: touch(d / "x.txt"),
        "a link to a good one": lambda d: link(d / "x.png", "00.png"),
        "a file of /proc": lambda d: link(d / "x.png", "/proc/self/mem"),
        "an odd name": lambda d: touch(d / "\udcff\n\x1b[31m.png", b"hello"),
    }
    found: dict[str, Callable[[Path], object]] = {
        f"good and {name}": both(good, build) for name, build in one_of.items()
    }
    found |= {f"only {name}": build for name, build in one_of.items()}
    for names in (("train", "test"), ("a", "b"), ("Train", "VAL"), ("a", ".b"), ("é", "\udcff"), ("x.png", "a")):
        for inner, build in {"good": good, **one_of}.items():
            found[f"classes {names!r} of {inner}"] = both(
                lambda d, n=names: good(d / n[0]), lambda d, n=names, b=build: b(d / n[1])
            )  # type: ignore[misc]
    found["an empty folder"] = lambda d: d.mkdir(parents=True)
    found["empty folders"] = lambda d: [(d / n).mkdir(parents=True) for n in "ab"]
    found["deep"] = lambda d: folder_of(d / "/".join("a" * 200), small)
    found["nine images"] = lambda d: folder_of(d, small, count=9)
    return found
