"""Progress on the screen: a bar with tokens/s and time left on a terminal, else plain lines."""

import os
import sys
import time
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from ..stage import Progress, Worker

_LINE_EVERY_S = 10.0


def make_progress(worker: "Worker | None" = None) -> "Progress":
    """A bar when standard error is a terminal, lines when it is not, or when others may write there
    too; one rank of many speaks."""
    if os.environ.get("RANK", "0") != "0":
        from ..stage import Silent

        return Silent()
    if worker is not None and worker.count > 1:
        return Lines(f"[{worker.index}/{worker.count}] ")
    return Bar() if sys.stderr.isatty() else Lines()


class Bar:
    """A live bar."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None

    def begin(self, title: str, total: int, unit: str) -> None:
        """Show a bar."""
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[tokens_per_s]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(title, total=total, tokens_per_s=0.0)
        self._tokens, self._began = 0, time.monotonic()
        self._bar.start()

    def advance(self, units: int, tokens: int) -> None:
        """Move the bar."""
        assert self._bar is not None
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._bar.update(self._task, advance=units, tokens_per_s=rate)

    def spent(self, on: str, seconds: float) -> None:
        """Not shown."""

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Lines:
    """A line now and then.

    Args:
        who: what a line begins with.
    """

    def __init__(self, who: str = "") -> None:
        self._who = who

    def begin(self, title: str, total: int, unit: str) -> None:
        """Remember what is counted."""
        self._title, self._total, self._unit = title, total, unit
        self._done = self._tokens = 0
        self._began = self._said = time.monotonic()

    def advance(self, units: int, tokens: int) -> None:
        """Print when the work is complete, or the last line is old."""
        self._done += units
        self._tokens += tokens
        now = time.monotonic()
        if self._done < self._total and now - self._said < _LINE_EVERY_S:
            return
        self._said, elapsed = now, max(now - self._began, 1e-9)
        left = elapsed / max(self._done, 1) * (self._total - self._done)
        rate = f", {self._tokens:,} tokens, {self._tokens / elapsed:,.0f} tokens/s"
        self.say(
            f"{self._title}: {self._done}/{self._total} {self._unit}"
            f"{rate if self._tokens else ''}"
            f"{f', {left:.0f} s left' if left else ''}"
        )

    def spent(self, on: str, seconds: float) -> None:
        """Not shown."""

    def say(self, text: str) -> None:
        """Print a line."""
        click.echo(self._who + text, err=True)

    def end(self) -> None:
        """Nothing."""
