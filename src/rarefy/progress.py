"""Progress of long work, on stderr: a bar on a terminal, a line for every epoch elsewhere."""

from __future__ import annotations

import time


class EpochDisplay:
    """Shows the epochs of a training run; a context manager.

    Args:
        title: what is running, such as ``"distill"``.
        epochs: how many there will be.
        length: batches of an epoch; 0 where that is not known.
        shown: False shows nothing at all.
    """

    def __init__(self, title: str, epochs: int, length: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.title, self.epochs, self.length = title, epochs, length
        self.console = Console(stderr=True, quiet=not shown)
        self.live = shown and self.console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task(title, total=epochs * max(length, 1))
        self.begin = self.shown_at = time.monotonic()
        self.noted: set[str] = set()
        self.last, self.first = "", 0

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def go_on(self, epoch: int) -> None:
        """Begin with another epoch than the first; those before took no time."""
        self.first = epoch

    def step(self, epoch: int, index: int, loss: float) -> None:
        """Move the bar, at most ten times a second."""
        now = time.monotonic()
        if self.live and now - self.shown_at > 0.1:
            self.shown_at = now
            done = epoch * self.length + index + 1 if self.length else epoch
            text = f"{self.title}  epoch {epoch + 1}/{self.epochs}  loss {loss:.4f}{self.last}"
            self.bar.update(self.task, completed=done, description=text)

    def epoch(self, epoch: int, loss: float, val: str | None) -> None:
        """Show the end of an epoch, with the metric on other data where there is one."""
        self.last = "" if val is None else f"  val {val}"
        text = f"{self.title}  epoch {epoch + 1}/{self.epochs}  loss {loss:.4f}{self.last}"
        if self.live:
            done = (epoch + 1) * max(self.length, 1)
            self.bar.update(self.task, completed=done, description=text)
        else:
            spent = time.monotonic() - self.begin
            left = spent / (epoch + 1 - self.first) * (self.epochs - epoch - 1)
            self._print(f"{text}  {spent:.0f} s, {left:.0f} s left")

    def note(self, text: str) -> None:
        """Show a remark."""
        self._print(f"{self.title}  {text}")

    def once(self, text: str) -> None:
        """Show a remark the first time it is made."""
        if text not in self.noted:
            self.noted.add(text)
            self.note(text)

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)


class Bar:
    """Shows how many steps of a known number are done, on a terminal; a context manager.

    Args:
        title: what is running.
        total: number of steps.
        shown: False shows nothing at all.
    """

    def __init__(self, title: str, total: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = Console(stderr=True)
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), Remaining())
        self.bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self.task = self.bar.add_task(title, total=total)

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, by: int = 1) -> None:
        """One more is done, or so many."""
        self.bar.advance(self.task, by)
