"""Bad input costs one line: no traceback, no hang, no file changed; whatever is read, and whichever command reads it."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bad_input
import fuzz
import numpy as np
import pytest

from pyrodiff import cli
from pyrodiff.errors import DataError, DivergenceError

pytest.importorskip("PIL.Image")

SECONDS = 10  # what counts as a hang
LINE = 1100  # characters of a message that a person still reads
SOME, MOST = 20, 1000  # cases of each kind in the default suite, and with the slow ones; drawn where there are more
SEED = int(os.environ.get("PYRODIFF_TEST_SEED", "0"))
TINY = [
    "--net.width=4", "--net.multipliers=[1]", "--net.attention=[]", "--net.fourier_features=[]", "--schedule.steps=3",
    "--training.steps=1", "--training.batch_size=4", "--scoring.timesteps=2", "--scoring.repeats=1", "--scoring.samples=2",
    "--scoring.sample_steps=2", "--progress=false",
]  # fmt: skip
QUICK = ["--timesteps=2", "--repeats=1"]


class Case(NamedTuple):
    """Bad input: a command, and what makes the files that it reads, in the present folder, which is empty."""

    name: str
    argv: list[str]
    build: Callable[[], object] = bool  # nothing


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data, and runs trained on them; nothing of it may ever change."""
    folder = tmp_path_factory.mktemp("world")
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32))
    image = bad_input.encoded(bad_input.pixels("L", (6, 4)), "PNG")
    for data in ("images", "classes/a", "classes/b"):
        bad_input.folder_of(folder / data, image)
    upsampler = ["--net.conditional=true", "--net.label_dropout=0.1", "--net.low_res=2"]
    with in_a_hurry():
        for name, data, extra in (("v", "vectors.npy", []), ("i", "images", []), ("c", "classes", upsampler)):
            assert run(["train", str(folder / data), f"--out={folder / name}", *TINY, *extra]).code == 0
    return folder


@contextlib.contextmanager
def in_a_hurry() -> Iterator[None]:
    """Without pictures, and with one parser for all commands, which would take most of the time of so small a run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setattr(cli, "_parser", functools.cache(cli._parser))
        yield


class Ended(NamedTuple):
    code: object
    out: str
    err: str
    seconds: float


def run(argv: list[str]) -> Ended:
    """A command, on streams as strict as any: those of a process that was told LANG=C."""
    code, started = None, time.process_time()  # a case that waits, without working, is stopped with its test
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(argv)
        except SystemExit as exit:
            code = exit.code
    said, complained = (stream.buffer.getvalue().decode("ascii") for stream in (out, err))
    return Ended(code, said, complained, time.process_time() - started)


def fault(ended: Ended) -> str:
    """What is wrong with the way a command ended, or ''."""
    if ended.code not in (0, 2):
        return f"code {ended.code}: {ended.err[:300]}"
    if "Traceback" in ended.out + ended.err:
        return f"a traceback: {ended.err[-300:]}"
    line, end = ended.err[:-1], ended.err[-1:]
    if ended.code == 2 and not (
        line.startswith("pyrodiff: ") and line.isprintable() and 20 < len(line) < LINE and end == "\n"
    ):
        return f"not one line of at most {LINE} characters: {len(ended.err)}, {ended.err[:300]!r}"
    return ""


def contents(folder: Path) -> dict[str, object]:
    """What lies in a folder: bytes of files, targets of links."""
    return {
        str(path): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else path.stat().st_mode
        for path in folder.rglob("*")
    }


# ---------------------------------------------------------------------- the cases, by what is read


def train(data: str) -> list[str]:
    return ["train", *TINY, "--out=run", "--", data]


def images(world: Path, rng: random.Random) -> Iterator[Case]:
    for name, suffix, content in bad_input.image_files():
        yield Case(name, train("d"), partial(bad_input.folder_of, Path("d"), content, suffix))


def bombs(world: Path, rng: random.Random) -> Iterator[Case]:
    for name, suffix, content in bad_input.image_bombs():
        yield Case(name, train("d"), partial(bad_input.folder_of, Path("d"), content, suffix))


def damaged_images(world: Path, rng: random.Random) -> Iterator[Case]:
    kinds = [
        ("PNG", "L"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("PNG", "I;16"),
        ("JPEG", "L"),
        ("JPEG", "RGB"),
        ("BMP", "L"),
        ("BMP", "P"),
    ]
    good = {kind: bad_input.encoded(bad_input.pixels(kind[1], (6, 4)), kind[0]) for kind in [*kinds, ("WEBP", "RGB")]}
    for (kind, mode), content in good.items():
        suffix = bad_input.FORMATS[kind]
        for change, damaged in bad_input.damaged(content, rng, other=rng.choice(list(good.values()))):
            build = partial(bad_input.one_among, Path("d"), content, damaged, suffix)
            yield Case(f"{kind} {mode} {change}", ["elbo", str(world / "i"), "--data=d", *QUICK], build)


def arrays(world: Path, rng: random.Random) -> Iterator[Case]:
    for name, content in bad_input.array_files():
        levels = rng.choice(([], [], ["--levels=2"], ["--levels=256"]))
        yield Case(f"{name} {levels}", ["train", *TINY, "--out=run", *levels, "x.npy"], touch("x.npy", content))
    good = bad_input.npy(np.zeros((12, 3), "f4"))
    for change, content in bad_input.damaged(good, rng, times=3):
        yield Case(change, train("x.npy"), touch("x.npy", content))


def archives(world: Path, rng: random.Random) -> Iterator[Case]:
    for name, content in bad_input.archive_files():
        yield Case(name, train("x.npz"), touch("x.npz", content))
    files = [("x.npy", bad_input.npy(np.zeros((12, 3), "u1"))), ("y.npy", bad_input.npy(np.arange(12)))]
    for method in (0, 8):
        for change, content in bad_input.damaged(bad_input.zipped(files, method), rng, times=3):
            yield Case(f"{method} {change}", train("x.npz"), touch("x.npz", content))


def mnist(world: Path, rng: random.Random) -> Iterator[Case]:
    for name, files in bad_input.mnist_files():
        build = partial(bad_input.touch_all, Path("d"), files)
        yield Case(name, ["elbo", str(world / "i"), "--data=mnist", "--data_dir=d", *QUICK], build)


def folders(world: Path, rng: random.Random) -> Iterator[Case]:
    for name, build in bad_input.folders().items():
        yield Case(name, train("d"), partial(build, Path("d")))


def paths(world: Path, rng: random.Random) -> Iterator[Case]:
    image, vectors, v = (
        (world / "images" / "00.png").read_bytes(),
        (world / "vectors.npy").read_bytes(),
        str(world / "v"),
    )
    for name in bad_input.NAMES:
        short = os.fsdecode(os.fsencode(name)[:200])  # there is room for a suffix
        yield Case(f"a folder named {name!r}", train(name), partial(bad_input.folder_of, Path(name), image))
        yield Case(f"a run for {name!r}", ["train", *TINY, "--", name], partial(bad_input.folder_of, Path(name), image))
        yield Case(f"a bad image in {name!r}", train(name), partial(bad_input.folder_of, Path(name), b"hello"))
        yield Case(f"an array named {name!r}", train(f"{short}.npy"), touch(f"{short}.npy", vectors))
        yield Case(f"missing {name!r}", train(name))
        yield Case(f"missing {name!r}.npz", train(f"{name}.npz"))
        yield Case(f"a run named {name!r}", ["train", f"{v}ectors.npy", *TINY, f"--out={name}"])
        yield Case(f"info of {name!r}", ["info", "--", name])
        yield Case(f"elbo of a run named {name!r}", ["elbo", *QUICK, "--", name], partial(shutil.copytree, v, name))
        yield Case(f"samples for {name!r}", ["sample", v, "--n=2", f"--out={short}.npy"])
        yield Case(f"samples in {name!r}", ["sample", v, "--n=2", f"--out={name}/x.npy"])
        yield Case(f"convert to {name!r}", ["convert", v, name, "pyrodiff"])
        yield Case(f"data_dir {name!r}", ["train", "mnist", f"--data_dir={name}"])
        yield Case(f"config {name!r}", ["train", f"--config={short}.yaml"], touch(f"{short}.yaml", b"net: {width: x}"))
    devices = ("/proc/self/mem", "/dev/zero", "/dev/null", "/dev/stdin", "/dev/tty", "/proc/self/environ")
    for name in (
        "",
        "a\0b",
        "a" * 5000,
        "a/" * 3000,
        "\ud800",
        "/" * 5000,
        "a/" * 2000 + "..",
        *devices,
        "//",
        ".",
        "..",
    ):
        reading = [
            ["train", *TINY, "--out=run", "--", name], ["train", f"--config={name}"], ["train", "mnist", f"--data_dir={name}"],
            ["info", "--", name], ["elbo", "--", name], ["elbo", v, f"--data={name}"], ["compare", "--", name], ["sample", "--", name],
            ["sample", str(world / "i"), "--n=2", "--out=x.npy", "--label=0", f"--classifier={name}"], ["convert", name, "out", "pyrodiff"],
            ["info", f"--card={name}", "--", v], ["convert", "x.pt", "out", "pyrodiff", f"--card={name}"],
        ]  # fmt: skip
        writing = [
            ["train", f"{v}ectors.npy", *TINY, f"--out={name}"], ["sample", v, "--n=2", f"--out={name}"],
            ["sample", v, "--n=2", f"--out={name}/x.npy"], ["sample", v, "--n=2", f"--out={name}.npy"],
            ["convert", v, name, "pyrodiff"], ["convert", str(world / "i"), name, "diffusers"],
        ]  # fmt: skip
        for argv in reading if outside(name) else reading + writing:
            yield Case(f"{name[:20]!r} ({len(name)}) in {' '.join(argv)[-6000:]}", argv)


def outside(path: str) -> bool:
    """Whether what is written there would not be in the test's own folder."""
    return path.startswith(("/", "..")) or ".." in path


def configurations(world: Path, rng: random.Random) -> Iterator[Case]:
    good = f"data: {world / 'vectors.npy'}\n".encode()
    argv = ["train", "--config=x.yaml", *TINY, "--out=run"]
    for name, text in bad_input.YAMLS.items():
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        yield Case(name, argv, touch("x.yaml", content))
        yield Case(f"{name}, after the data", argv, touch("x.yaml", good + content))
        yield Case(f"{name}, of a run", READING[1], spoilt(world / "v", "run.yaml", content))
    saved = (world / "v" / "run.yaml").read_bytes()
    for change, content in bad_input.damaged(saved, rng, times=3):
        yield Case(change, argv, touch("x.yaml", content))
        yield Case(f"{change}, of a run", READING[1], spoilt(world / "v", "run.yaml", content))


READING = (
    ["info", "r"], ["elbo", "r", *QUICK], ["sample", "r", "--n=2", "--out=x.npy"], ["convert", "r", "out", "pyrodiff"],
    ["convert", "r", "out", "diffusers"], ["convert", "r", "out.pt", "guided-diffusion"],
)  # fmt: skip


def runs(world: Path, rng: random.Random) -> Iterator[Case]:
    """Checkpoints, logs and options of a run, damaged; read by every command that reads runs."""
    files = ("model.safetensors", "run.yaml", "metrics.jsonl", "config.json")
    others = {
        "pickle": b"\x80\x04N.",
        "zip": bad_input.zipped([("a", b"b")]),
        "zeros": bytes(100),
        "huge header": b"\xff" * 8 + b"{}",
        "text": b"hello",
    }
    for name, file in itertools.product("vic", files):
        good = (world / name / file).read_bytes()
        for change, content in (*bad_input.damaged(good, rng), *others.items()):
            argv = rng.choice(READING)
            yield Case(f"{argv} of {name}/{file} {change}", argv, spoilt(world / name, file, content))
    for value in ("x", "9", "-1", "[1]", "1.5", "null", "true", ".nan", "{}"):
        text = f"data: {world / 'classes'}\nnet: {{low_res: {value}}}".encode()
        yield Case(f"a run of low_res={value}", READING[1], spoilt(world / "c", "run.yaml", text))
    for key, value in itertools.product(
        ("data", "seed", "levels", "data_dir", "net"),
        ("[1]", "-1", "x", "{}", "1.5", ".nan", "true", "mnist", "''", "/dev/zero", '"a\\0b"'),
    ):
        options = {"data": str(world / "vectors.npy"), key: value}
        text = "".join(f"{name}: {value}\n" for name, value in options.items()).encode()
        yield Case(f"a run of {key}: {value}", READING[1], spoilt(world / "v", "run.yaml", text))
    for argv in READING:
        yield Case(f"{argv} of nothing", argv)
        yield Case(f"{argv} of an empty folder", argv, partial(os.mkdir, "r"))
        yield Case(f"{argv} of a pipe", argv, partial(os.mkfifo, "r"))
        for file, make in itertools.product(files, (os.mkfifo, os.mkdir)):
            yield Case(f"{argv}, and {make.__name__} {file}", argv, spoilt(world / "v", file, make))


def touch(file: str, content: bytes) -> Callable[[], object]:
    return partial(bad_input.touch, Path(file), content)


def spoilt(run: Path, file: str, content: bytes | Callable[[str], None]) -> Callable[[], object]:
    """Makes a copy of a run, `r`, with other content of a file, or with something in its place that is no file."""

    def build() -> None:
        shutil.copytree(run, "r")
        os.unlink(f"r/{file}")
        Path(f"r/{file}").write_bytes(content) if isinstance(content, bytes) else content(f"r/{file}")

    return build


# Orders for more work than a test has time for are no mistakes: of these any number will do.
PATIENCE = {"training.steps", "training.warmup", "training.validate_every"}
LARGE = ("1000000000", "99999999999999999999", "1e300", "1e400", "inf")


def options(world: Path, rng: random.Random) -> Iterator[Case]:
    """Every option of every command, as the parser has them, given rubbish; and some together."""
    data = {"v": "vectors.npy", "i": "images", "c": "classes"}
    compare = ["--out=out", "--examples=1", "--repeats=2", "--timesteps=[1]", "--iwae=[1]", "--gradients=0"]
    commands: dict[str, list[list[str]]] = {
        "train": [["train", str(world / name), *TINY, "--out=run"] for name in data.values()],
        "elbo": [["elbo", str(world / name), *QUICK] for name in data],
        "compare": [["compare", str(world / "v"), *compare]],
        "sample": [["sample", str(world / name), "--n=2", "--out=x.npy"] for name in data],
        "convert": [["convert", str(world / name), "out", "pyrodiff"] for name in data],
        "info": [["info", str(world / name)] for name in data],
    }
    assert commands.keys() == cli.COMMANDS.keys()
    for command, starts in commands.items():
        parser = next(action for action in cli._parser()._actions if command in (action.choices or {})).choices[command]
        flags = sorted({flag for action in parser._actions for flag in action.option_strings} - {"--debug"})
        given = [
            f"{flag}={value}" for flag, value in itertools.product(flags, bad_input.RUBBISH)
            if not ((flag[2:] in PATIENCE and value in LARGE) or (flag == "--out" and outside(value)))
        ]  # fmt: skip
        several = [rng.sample(given, 3) for _ in range(100)]
        for extra in ([word] for word in (*given, *flags, *bad_input.RUBBISH)):
            yield Case(named(command, extra), [*rng.choice(starts), *extra])
        for i, extra in enumerate(several):
            yield Case(f"{named(command, extra)}, {i}", [*rng.choice(starts), *extra])
        for word in bad_input.RUBBISH:
            yield Case(f"{named(command, [word])} alone", [command, word])
    for word in bad_input.RUBBISH:
        yield Case(named("command", [word]), [word])
    yield Case("nothing", [])


def named(command: str, words: list[str]) -> str:
    return f"{command} {', '.join(f'{word[:60]!r} of {len(word)}' for word in words)}"


KINDS: dict[Callable[[Path, random.Random], Iterator[Case]], list[str]] = {
    images: ["F16"],
    damaged_images: ["F16", "F18"],
    bombs: ["F19"],
    arrays: ["F13", "F15"],
    archives: ["F15", "F19"],
    mnist: ["F18", "F20"],
    folders: ["F17", "F18", "F20"],
    paths: ["F21"],
    configurations: ["F29"],
    runs: ["F18"],
    options: ["F29"],
}


@pytest.mark.parametrize("part", ["some", pytest.param("rest", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=kind.__name__, marks=pytest.mark.reliability("Q17", *rows)) for kind, rows in KINDS.items()],
)
def test_bad_input_costs_one_line(
    kind, part: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure
):
    cases = list(kind(world, random.Random(SEED)))
    random.Random(SEED).shuffle(cases)
    cases = cases[:SOME] if part == "some" else cases[SOME:MOST]
    before, slowest, good, faults = contents(world), 0.0, 0, []
    with in_a_hurry():
        for case in cases:
            print(case.name)  # the last line of a test that was stopped is the case that hung
            here = tmp_path / "here"
            here.mkdir()
            monkeypatch.chdir(here)
            case.build()
            given = contents(here)
            ended = run(case.argv)
            slowest, good = max(slowest, ended.seconds), good + (ended.code == 0)
            found = fault(ended)
            if not found and not given.items() <= contents(here).items():
                found = "the input is not as it was"
            if found:
                faults.append(f"{case.name}: {found}")
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(os.fsencode(here))
    if contents(world) != before:
        faults.append("good data or a run beside has changed")
    print(f"{len(cases)} cases, {good} of them good, the slowest {slowest:.2g} s")
    for row in ("Q17", *KINDS[kind]):
        figure.count(row, "bad inputs", len(cases), at_least=2000 if row == "Q17" else SOME)
    figure("Q17", "slowest case, s", slowest, at_most=SECONDS)
    assert not faults, "\n".join(faults)
    figure("Q17", "cases that went wrong", len(faults), at_most=0)


def test_what_counts_as_a_fault(monkeypatch: pytest.MonkeyPatch):
    """The judge itself: each of these is one."""

    def ends(text: str, error: BaseException) -> str:
        def command(run: str) -> None:
            """Fail."""
            print(text)
            raise error

        monkeypatch.setitem(cli.COMMANDS, "info", command)
        return fault(run(["info", "x"]))

    assert ends("", DataError("a message of some length")) == ""
    assert "code 1" in ends("", RuntimeError("not one of ours"))
    assert "code 1" in ends("", DivergenceError("a failure"))
    assert "traceback" in ends("Traceback (most recent call last)", DataError("a message of some length"))
    assert "not one line" in ends("", DataError("short"))


@pytest.mark.reliability("Q17", "F21")
def test_a_message_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]):
    for value in ("\x1b[31mred", "a\nb\r\nc\u2028d", "\u202eright to left", "\udcff", "x" * 10**6):
        with pytest.raises(SystemExit) as exit:
            cli.main(["info", value, "extra"])
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.endswith("\n") and err[:-1].isprintable() and len(err) < LINE


@pytest.mark.reliability("Q17", "F21")
def test_the_present_folder_is_gone(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure):
    here = tmp_path / "here"
    commands = (
        (2, ["train", "d", *TINY]),
        (2, ["train", str(world / "vectors.npy"), *TINY]),  # there is nowhere for runs/
        (2, ["sample", str(world / "v"), "--n=2", "--out=x.npy"]),
        (2, ["train", "--config=x.yaml"]),
        (2, ["info", "."]),
        (0, ["info", str(world / "v")]),
        (0, ["elbo", str(world / "v"), *QUICK]),
    )
    for code, argv in commands:
        here.mkdir()
        monkeypatch.chdir(here)
        here.rmdir()
        ended = run(argv)
        monkeypatch.chdir(tmp_path)
        assert ended.code == code and not fault(ended), (argv, ended)
    figure.count("Q17", "bad inputs", len(commands), at_least=2000)


LOCALES = {
    "C, coerced by Python": {"LC_ALL": "C"},
    "C, as it is": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": "C"},
    "ASCII streams": {"PYTHONIOENCODING": "ascii:strict"},
    "none": {"LC_ALL": "", "LANG": "", "LC_CTYPE": "no_such_LOCALE"},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.reliability("Q17", "F21")
@pytest.mark.parametrize("locale", LOCALES)
def test_odd_names_in_odd_locales(locale: str, world: Path, tmp_path: Path, figure):
    """Real processes, whose arguments are bytes that are no text in any encoding."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **LOCALES[locale]}
    name = b"\xff\xfe \xc3\xa9\n\x1b[31m"
    folder = os.fsencode(tmp_path) + b"/" + name
    shutil.copytree(os.fsencode(world / "i"), folder)
    missing = os.fsencode(tmp_path) + b"/missing " + name
    cases = (
        (0, [b"sample", folder, b"--n=2", b"--out=" + folder + b"/" + name + b".npy"]),
        (0, [b"elbo", folder, b"--timesteps=2"]),
        (2, [b"train", missing]),
        (2, [b"elbo", folder, b"--data=" + missing + b".npz"]),
    )
    for code, argv in cases:
        ended = subprocess.run(
            [os.fsencode(sys.executable), b"-m", b"pyrodiff", *argv], capture_output=True, env=environment
        )
        assert ended.returncode == code and b"Traceback" not in ended.stdout + ended.stderr, ended
        assert ended.stderr.count(b"\n") == (code == 2), ended.stderr
    figure.count("Q17", "bad inputs", len(cases), at_least=2000)


@pytest.mark.reliability("Q17")
@pytest.mark.parametrize("reader", fuzz.READERS)
def test_fuzzed_readers(reader: str, tmp_path: Path, figure):
    """What `make fuzz` starts from, and what it has found: read, or refused by an error of the library's own."""
    corpus = fuzz.READERS[reader][1]()
    corpus = corpus[:: 1 + len(corpus) // SOME] + fuzz.FOUND.get(reader, [])
    for data in corpus:
        fuzz.once(reader, data, tmp_path / "in")
    figure.count("Q17", "bad inputs", len(corpus), at_least=2000)
