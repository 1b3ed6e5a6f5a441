"""How results and progress look on the command line."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from kvr_partition.cli.options import on_terminal

if TYPE_CHECKING:
    from kvr_partition.machine.findings import Finding


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Aligned columns on stdout: the first ``left`` ones to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left or column == len(widths) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    print(line(header))
    print("  ".join("─" * width for width in widths))
    for row in rows:
        print(line(row))


def print_findings(found: Sequence[tuple[int, Sequence[Finding]]]) -> None:
    """What measurements of some contexts showed that their schedules do not, a line each."""
    if any(findings for _, findings in found):
        print("\nNoticed:")
        for context, findings in found:
            for finding in findings:
                print(f"  {context:>7}  {finding.text}")


def seconds(value: float) -> str:
    """A time as people read it."""
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.3f} s"


class Progress:
    """What a long command is doing: a bar with the time left on a terminal, plain lines otherwise.

    Work is counted in tokens to read, since that is known beforehand and roughly proportional to time.
    """

    def __init__(self, total: float, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._began: float | None = None
        self._done = 0.0
        self._total = total

    def __enter__(self) -> Progress:
        if not self._quiet and on_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def doing(self, what: str) -> None:
        """What is under way now."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)
        else:
            self.say(what)

    def say(self, line: str) -> None:
        """A line worth keeping."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            left = ""
            if self._began is not None and self._done > 0.02 * self._total:
                spent = time.monotonic() - self._began
                left = f"  [about {max(0.0, spent / self._done * (self._total - self._done)):.0f} s left]"
            print(line + left, file=sys.stderr, flush=True)

    def advance(self, work: float) -> None:
        """That much work is done."""
        # Starting up says nothing about how long measuring takes; the first sample starts the clock.
        self._began = self._began or time.monotonic()
        self._done += work
        if self._bar is not None:
            self._bar.advance(self._task, work)

    def reach(self, done: float) -> None:
        """Work up to here is done or turned out not to be needed."""
        self._done = max(self._done, done)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
