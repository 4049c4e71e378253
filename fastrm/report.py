"""Show runs on one page: what was trained, how it went, and how runs differ.

    python -m fastrm.report runs/weight0 runs/weight1 --out report

The page is one HTML file that needs no network. It also shows contact sheets, such as views and nearest neighbours, and
maps of images that lie in the run folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fastrm import own
from fastrm.errors import UsageError
from fastrm.reports.page import write
from fastrm.reports.runs import read_run
from fastrm.settings import command_line
from fastrm.settings.kinds import checked
from fastrm.settings.of_run import given
from fastrm.terminal import shell


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a page about one run, or a comparison of several."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]] = ()
    """Run folders."""
    checkpoint: Path | None = None
    """One run, in the same way as RUN."""
    out: Path | None = None
    """Folder to write the page to.
    If not given, report in the folder of the run or, for several runs, in the current folder."""


def report(options: ReportConfig) -> Path:
    """Write the page and its pictures, and return the page's path.

    Raises:
        UsageError: there is no such run, or the folder cannot be written.
    """
    options = checked(options)
    folders = [path.parent if path.is_file() else path for path in given(options.runs, options.checkpoint)]
    runs = [read_run(folder) for folder in folders]
    out = options.out or (folders[0] / "report" if len(runs) == 1 else Path("report"))
    if own.run(out):
        raise UsageError(f"--out {out} is a run folder itself; give another")
    return write(runs, out)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    print(report(command_line.parse(ReportConfig, argv, prog="python -m fastrm.report")))


if __name__ == "__main__":
    shell.run(main)
