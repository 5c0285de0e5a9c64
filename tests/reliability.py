"""What must hold, and the report that says what did: `make reliability`.

A test that is evidence for a row of `ROWS` is marked with it, and reports what it measured:

    @pytest.mark.reliability("Q16", "F4")
    def test_bit_flips(figure, ...):
        ...
        figure("Q16", "flipped files accepted", accepted, at_most=0)       # held against the bar here and now
        figure.count("Q16", "flipped files", len(flips), at_least=10_000)  # summed over tests, held at the end

The report has no figure of its own: a row whose tests were skipped says so, and one without any test fails.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ROWS = {
    "Q1": "schedules against mpmath",
    "Q2": "closed forms of the bound, float64, no Monte Carlo",
    "Q3": "stock SVI's bound against the closed form",
    "Q4": "discretised likelihood: values, gradients, sums, to the far tails",
    "Q5": "KL of two Gaussians, element by element",
    "Q6": "bound in float32 against float64, same noise, D = 3072, T = 1000",
    "Q7": "parity with guided-diffusion and diffusers",
    "Q8": "mistakes in models and guides raise, naming the site",
    "Q9": "every public function against a loop over examples, all sizes equal and all different",
    "Q10": "formula mutants killed, each by a named test",
    "Q11": "small trained nets recover known data",
    "Q12": "samples by the exact denoiser have the exact moments",
    "Q13": "posterior samplers calibrated, wrong ones rejected",
    "Q14": "killed while saving: nothing lost",
    "Q15": "resumed training equals uninterrupted training, bit for bit",
    "Q16": "damaged checkpoints refused",
    "Q17": "bad input: exit 0 or 2, one line, no traceback, no hang",
    "Q18": "faults F1 to F30 automated",
    "Q19": "NaN or infinity in training: step skipped, then stopped, nothing spoilt",
    "Q20": "gradient of several processes equals that of one",
    "Q21": "same command, same bytes; noise of a sample whatever the batch",
    "Q22": "no change of global state, any order of tests",
    "Q23": "other seeds: no failure; error rates stated",
    "Q24": "time of the suite",
    "Q25": "cost of Pyro",
    "Q26": "coverage of lines and branches",
    "F1": "kill -9 during a save",
    "F2": "power cut, lost pages",
    "F3": "disk full, quota, read-only folder",
    "F4": "bit flip anywhere in a checkpoint",
    "F5": "truncated, empty or foreign file",
    "F6": "malicious pickle",
    "F7": "resource bombs",
    "F8": "wrong content of a well-formed checkpoint",
    "F9": "half-written set of files",
    "F10": "resume, bit for bit",
    "F11": "load and save without a step",
    "F12": "older and newer format versions",
    "F13": "NaN or infinity in the data",
    "F14": "NaN or infinity in a loss or gradient",
    "F15": "wrong dtype, shape or range of arrays",
    "F16": "every mode and depth of image",
    "F17": "images of several sizes",
    "F18": "unreadable, missing or vanishing files",
    "F19": "decompression bomb",
    "F20": "no data, or less than a batch",
    "F21": "odd paths and locales",
    "F22": "Ctrl-C and SIGTERM, once and twice",
    "F23": "out of memory",
    "F24": "dead process of several",
    "F25": "processes that disagree",
    "F26": "two runs in one folder",
    "F27": "clock jumps, no terminal, closed stdout, read-only home",
    "F28": "the same seed, the same files",
    "F29": "rubbish in the configuration",
    "F30": "children end with their parent",
}


class Figures:
    """The fixture `figure`: numbers that this test measured, for rows that it is marked with."""

    def __init__(self, node: pytest.Item) -> None:
        self.node = node

    def __call__(self, row: str, what: str, value: float, *, at_most: float = math.inf, at_least: float = -math.inf):
        """Record a measured number, and assert its bar."""
        self._record(row, what, float(value), at_most, at_least, summed=False)
        assert at_least <= value <= at_most, f"{row}, {what}: {value:g} is not within [{at_least:g}, {at_most:g}]"

    def count(self, row: str, what: str, n: int, *, at_least: int) -> None:
        """Record a number of cases; their sum over all tests has the bar, at the end of the run."""
        self._record(row, what, int(n), math.inf, at_least, summed=True)

    def _record(self, row: str, what: str, value: float, at_most: float, at_least: float, summed: bool) -> None:
        if row not in marked(self.node):
            raise ValueError(f"{self.node.name} is not marked with {row}")
        self.node.user_properties.append(("figure", [row, what, value, at_most, at_least, summed]))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figures:
    return Figures(request.node)


def marked(item: pytest.Item) -> set[str]:
    """The rows that a test is evidence for."""
    rows = {row for mark in item.iter_markers("reliability") for row in mark.args}
    if unknown := rows - ROWS.keys():
        raise pytest.UsageError(f"{item.nodeid} is marked with {sorted(unknown)}; the rows are in tests/reliability.py")
    return rows


@dataclass
class Figure:
    """One measured number, over all the tests that reported it."""

    value: float
    at_most: float
    at_least: float

    @property
    def holds(self) -> bool:
        return self.at_least <= self.value <= self.at_most

    def __str__(self) -> str:
        bars = [f"<= {self.at_most:.6g}"] * (self.at_most < math.inf)
        bars += [f">= {self.at_least:.6g}"] * (self.at_least > -math.inf)
        return f"{self.value:.4g}" + (f" ({', '.join(bars)})" if bars else "")


class Report:
    """What the tests that ran said, row by row: a plugin of pytest, printed and written at its end."""

    def __init__(self, file: str, coverage: bool) -> None:
        self.file, self.coverage = Path(file), coverage
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, set[str]] = defaultdict(set)  # of skipped tests
        self.figures: dict[str, dict[str, Figure]] = defaultdict(dict)
        self.seconds: Counter[str] = Counter()  # by tier

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        rows = dict(report.user_properties).get("rows", [])
        if report.when == "call" or not report.passed:
            for row in rows:
                self.outcomes[row][report.outcome] += 1
                if report.skipped and isinstance(report.longrepr, tuple):
                    self.reasons[row].add(report.longrepr[2].removeprefix("Skipped: "))
        self.seconds["slow" if "slow" in report.keywords else "fast"] += report.duration
        if report.when == "call":
            for name, recorded in report.user_properties:
                if name == "figure":
                    self.merge(*recorded)

    def merge(self, row: str, what: str, value: float, at_most: float, at_least: float, summed: bool) -> None:
        if old := self.figures[row].get(what):
            worst = max if at_most < math.inf else min
            values = sorted((old.value, value), key=math.isnan)  # a NaN is worst of all
            value = old.value + value if summed else values[1] if math.isnan(values[1]) else worst(values)
        self.figures[row][what] = Figure(value, at_most, at_least)

    def status(self, row: str) -> str:
        tests, figures = self.outcomes[row], self.figures[row].values()
        if tests["failed"] or not all(figure.holds for figure in figures):
            return "FAILED"
        return "holds" if tests["passed"] else "not run" if tests["skipped"] else "NO TEST"

    def of_the_run(self) -> None:
        """The rows that are about the whole run: its faults, its time, its coverage."""
        faults = Counter(self.status(row) for row in ROWS if row.startswith("F"))
        self.outcomes["Q18"] = +Counter(passed=faults["holds"], failed=faults["FAILED"] + faults["NO TEST"])
        self.figures["Q18"] = {"faults that hold": Figure(faults["holds"], math.inf, -math.inf)}
        fast, slow = (self.seconds[tier] / 60 / 2 for tier in ("fast", "slow"))  # the bars are for two cores
        self.merge("Q24", "minutes of `make test`", fast, 6, -math.inf, summed=False)
        self.merge("Q24", "minutes of both tiers", fast + slow, 45, -math.inf, summed=False)
        self.outcomes["Q24"] = Counter(passed=1)
        if self.coverage:
            import coverage

            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                measured = coverage.Coverage()
                measured.load()
                measured.json_report(outfile=file.name)
                totals = json.loads(Path(file.name).read_text())["totals"]
            for covered, n in (("covered_lines", "num_statements"), ("covered_branches", "num_branches")):
                percent = 100 * totals[covered] / totals[n]
                self.merge("Q26", f"% of {n.removeprefix('num_')}", percent, math.inf, 95, summed=False)
            self.outcomes["Q26"] = Counter(passed=1)

    def lines(self) -> list[str]:
        """A table in Markdown, with a line for every row of `ROWS`."""
        lines = ["| row | what must hold | | measured (required) | tests |", "|---|---|---|---|---|"]
        for row, what in ROWS.items():
            status = self.status(row)
            said = [f"{label} {figure}" for label, figure in self.figures[row].items()]
            said += sorted(self.reasons[row]) if status == "not run" else []
            tests = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes[row].items()))
            measured = "; ".join(said).replace("|", r"\|")
            lines.append(f"| {row} | {what} | {status} | {measured} | {tests} |")
        return lines

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.of_the_run()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join(self.lines()) + "\n", encoding="utf-8")
        if any(self.status(row) in ("FAILED", "NO TEST") for row in ROWS):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("measured against required")
        for line in self.file.read_text(encoding="utf-8").splitlines():
            terminalreporter.line(line)
        terminalreporter.line(f"\nwritten to {self.file}")
