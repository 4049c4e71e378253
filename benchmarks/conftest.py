"""Shows benchmarks in pytest-benchmark's table: a group per case, a row per contender, ratios in brackets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from benchmarks._timing import COPY, Row, table

Enter = Callable[..., None]
Seconds = Mapping[str, Sequence[float]]

_NOTES = pytest.StashKey[list[str]]()


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that shows text below pytest-benchmark's table, for values without a column."""
    notes: list[str] = request.config.stash.setdefault(_NOTES, [])
    return notes.append


@pytest.fixture
def enter(benchmark: Any) -> Enter:
    """``enter(case, seconds, figures)`` adds a row for each name in ``seconds``; ``figures`` go into the JSON file.

    pytest-benchmark times one function per test. Here, contenders are timed in turn instead, so that other work on the
    machine slows all of them alike, and their times are added to pytest-benchmark's results.
    """
    test = benchmark.fullname

    def add(case: str, seconds: Seconds, figures: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        benchmark._mode, benchmark.group = "in turn", case
        for name, times in seconds.items():
            benchmark.name, benchmark.fullname = name, f"{test}::{name}"
            benchmark.extra_info = dict((figures or {}).get(name, {}))
            if benchmark.enabled:
                stats = benchmark._make_stats(1)
                for time in times:
                    stats.update(time)

    return add


@pytest.fixture
def enter_rows(enter: Enter, note: Callable[[str], None]) -> Callable[[Sequence[Row]], None]:
    """Return a function that enters the rows of :func:`benchmarks._timing.compare`; a note has the copy and GB/s."""

    def add(rows: Sequence[Row]) -> None:
        note(table(rows))
        own = [row for row in rows if row.name != COPY]
        enter(rows[0].case, {row.name: row.seconds for row in own}, {row.name: row.figures for row in own})

    return add


def pytest_configure(config: pytest.Config) -> None:
    """Show the columns that fit a terminal, unless others are requested."""
    if "--benchmark-columns" not in " ".join(config.invocation_params.args) and hasattr(
        config.option, "benchmark_columns"
    ):
        config.option.benchmark_columns = ["median", "min", "max", "ops", "rounds"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show the notes."""
    for text in config.stash.get(_NOTES, []):
        terminalreporter.write_line("\n" + text)
