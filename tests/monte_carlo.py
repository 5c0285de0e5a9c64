"""Assertions on random draws, each of which states how often it is wrong: a plugin of pytest.

A test whose verdict depends on draws is marked `monte_carlo` and judges them with the functions of this module alone. Each
states two rates: of false alarms, right code that fails, and of misses, wrong code that passes, where the test also says how
wrong. The second is an assertion on the number of draws: a test too small to see what it claims to see fails.

A marked test that states nothing fails, and so does one that is not marked but states. `--seeds N` runs the marked tests
N times, each time with other seeds, and a test whose statistics were the same in all of them (five or more) fails.
"""

from __future__ import annotations

import math
import re
import time
import zlib
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

FALSE_ALARM = MISS = 1e-6
STATED: list[dict[str, Any]] = []  # by the test that runs
SPENT: dict[str, float] = defaultdict(float)  # CPU seconds of a test in all of its runs


def state(statistic: Any, **rates: float) -> None:
    """What the running test found, a number or several, and with which rates of error.

    Without rates: draws themselves, where what is made of them, say a count of all, may come out the same for any seed.
    """
    rates = {name: float(rate) for name, rate in rates.items()}  # NumPy's numbers do not travel between processes
    STATED.append({"statistic": zlib.crc32(numbers(statistic).tobytes()), **rates})


def any_seed() -> int:
    """A seed of the running test's own, for what would else take 0."""
    import torch

    return int(torch.randint(2**31, ()))


def demand(holds: Any, message: str) -> None:
    if not np.all(holds):
        raise AssertionError(message)


def numbers(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


def ends(truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """An interval that holds the truth: of one number, or between the two of a tuple."""
    low, high = truth if isinstance(truth, tuple) else (truth, truth)
    return numbers(low), numbers(high)


def assert_estimate(
    value: Any,
    se: Any,
    truth: Any,
    *,
    detects: Any,
    df: float = math.inf,
    false_alarm: float = FALSE_ALARM,
    misses: float = MISS,
) -> None:
    """An unbiased estimate of nearly normal law, against what it estimates.

    Args:
        value, se: the estimate and its standard error, of any shape: the rate of false alarms is that of all elements together.
        truth: what it estimates; or a tuple, the ends of an interval: a bound, or what is known of a bias.
        detects: the least error that is seen, in units of the estimate; a larger one is missed at most with probability `misses`.
        df: degrees of freedom of the standard error, of Student's t.
        false_alarm: how often a right estimate fails.
        misses: how often a wrong one passes.
    """
    from scipy import stats

    value, se = np.broadcast_arrays(numbers(value), numbers(se))
    low, high = ends(truth)
    bar = stats.t.isf(false_alarm / (2 * value.size), df)
    off = value - np.clip(value, low, high)
    z = np.divide(off, se, out=np.where(off == 0, 0.0, math.inf), where=se != 0)
    state(value, false_alarm=false_alarm, misses=misses)
    seen = (bar + stats.t.isf(misses, df)) * se  # beyond the interval
    demand(np.abs(z) <= bar, f"{value} ± {se} for {truth}: z = {z}, beyond {bar:.3g}")
    demand(seen <= numbers(detects), f"too few draws: errors from {seen} on are seen, not from {detects}")


def assert_mean(samples: Any, truth: Any, **rates: Any) -> None:
    """The mean of independent draws, ``[n, ...]``, of light tails, against their expectation: `assert_estimate`."""
    samples = numbers(samples)
    n = len(samples)
    assert_estimate(samples.mean(0), samples.std(0, ddof=1) / math.sqrt(n), truth, df=n - 1, **rates)


def assert_moments(
    samples: Any, mean: float, variance: float, *, detects: float, bias: float = 0.0, **rates: Any
) -> None:
    """Mean and variance of independent normal draws; `detects` and `bias` are in deviations, and a share of the variance."""
    samples = numbers(samples).ravel()
    n, scale = len(samples), math.sqrt(variance)
    z = (samples - mean) / scale
    known = np.array([1.0, math.sqrt(2)]) / math.sqrt(n)
    cube_root = np.cbrt((z**2).mean())  # of a chi-square: normal far into its tails (Wilson and Hilferty)
    assert_estimate([z.mean(), 3 * (cube_root - 1)], known, (-bias, bias), detects=bias + detects, **rates)


def assert_proportion(
    hits: Any, n: int, p: Any, *, detects: float, false_alarm: float = FALSE_ALARM, misses: float = MISS
) -> None:
    """A number of successes of n, against their probability, by the binomial law itself; `p` may be the ends of an interval."""
    from scipy import stats

    hits, (low, high) = numbers(hits), ends(p)
    tail = false_alarm / (2 * hits.size)
    least, most = stats.binom.ppf(tail, n, low), stats.binom.isf(tail, n, high)
    state(hits, false_alarm=false_alarm, misses=misses)
    demand((least <= hits) & (hits <= most), f"{hits} of {n} for {p}: not within [{least}, {most}]")
    for wrong in (low - detects, high + detects):
        law = stats.binom(n, np.clip(wrong, 0, 1))
        passes = np.where((wrong < 0) | (wrong > 1), 0, law.cdf(most) - law.cdf(least - 1))
        demand(passes <= misses, f"too few: {wrong} for {p} is missed with probability {passes}")


def assert_accepted(p_values: Any, *, false_alarm: float = FALSE_ALARM) -> None:
    """A p-value of what is right, or several. What it sees is stated by `assert_rejected`, of something wrong, in the same test."""
    p_values = numbers(p_values)
    state(p_values, false_alarm=false_alarm)
    demand(p_values > false_alarm / p_values.size, f"p = {p_values}: rejected at {false_alarm}")


def assert_rejected(p_values: Any, *, false_alarm: float = FALSE_ALARM, misses: float = MISS) -> None:
    """A p-value of what is wrong, or several: beyond the bar by so much that one more draw of it would hardly fall short.

    A p-value is taken for that of a normal score of variance 1, as it is of a mean; so `misses` is of this approximation.
    """
    from scipy import stats

    p_values = numbers(p_values)
    state(p_values, misses=misses)
    score, bar = stats.norm.isf(p_values / 2), stats.norm.isf(false_alarm / 2)
    demand(score >= bar + stats.norm.isf(misses), f"p = {p_values}: not beyond the bar of {false_alarm} by a margin")


# ---------------------------------------------------------------------- the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=0, metavar="N", help="run the tests marked monte_carlo N times")
    parser.addoption("--seconds", type=float, default=math.inf, help="... each until it has taken so long")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "monte_carlo: its verdict depends on draws, and it states its rates of error")
    if config.getoption("--seeds") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Seeds(config.getoption("--seeds")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test's seeds come from its name, of which the number of the run is then part."""
    if (runs := metafunc.config.getoption("--seeds")) and metafunc.definition.get_closest_marker("monte_carlo"):
        metafunc.fixturenames.append("run")
        metafunc.parametrize("run", [f"run {i}" for i in range(1, runs + 1)])


def unnumbered(nodeid: str) -> str:
    return re.sub(r"run \d+-?", "", nodeid)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if SPENT[unnumbered(item.nodeid)] > item.config.getoption("--seconds"):
        pytest.skip("it has had its time")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    STATED.clear()
    started = time.process_time()
    try:
        result = yield
    finally:
        SPENT[unnumbered(item.nodeid)] += time.process_time() - started
    if (item.get_closest_marker("monte_carlo") is not None) != bool(STATED):
        raise AssertionError("a test marked monte_carlo states its rates of error, and no other test does")
    if STATED and not any("misses" in stated for stated in STATED):
        raise AssertionError("the test does not state what it would miss")
    item.user_properties.append(("stated", list(STATED)))
    return result


class Seeds:
    """What the runs with other seeds found, at the end of them."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.statistics: dict[str, list[tuple[int, ...]]] = defaultdict(list)  # of every run that passed
        self.failed = self.assertions = 0
        self.false_alarms = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += report.failed
        stated = dict(report.user_properties).get("stated")
        if report.when == "call" and report.passed and stated:
            self.assertions += len(stated)
            self.false_alarms += sum(each.get("false_alarm", 0.0) for each in stated)
            self.statistics[unnumbered(report.nodeid)].append(tuple(each["statistic"] for each in stated))

    @property
    def fixed(self) -> list[str]:
        """Tests whose draws are the same in every run, of so many that counts do not coincide by chance."""
        return sorted(name for name, found in self.statistics.items() if len(found) >= 5 and len(set(found)) == 1)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.fixed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("other seeds")
        for name in self.fixed:
            terminalreporter.line(f"the same draws in every run: {name}")
        counts = [len(found) for found in self.statistics.values()]
        terminalreporter.line(
            f"tests {len(counts)}, of which {sum(n >= self.runs for n in counts)} ran {self.runs} times; passed {sum(counts)}, "
            f"failed {self.failed}, with fixed draws {len(self.fixed)}; assertions {self.assertions}, false alarms expected "
            f"{self.false_alarms:.3g}"
        )
