"""Progress bars with time left, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..records import Progress as Told

console = Console(stderr=True, highlight=False)


class Bars:
    """A bar for each stage; on a terminal it moves, in a file each stage leaves one line."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    @contextmanager
    def stage(self, title: str) -> Iterator[Told]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, disable=self.quiet) as progress:
            task = progress.add_task(title, total=None)

            def told(done: int, of: int) -> None:
                progress.update(task, completed=done, total=of)

            yield told
            total = progress.tasks[0].total
            progress.update(task, total=total or 1, completed=total or 1)

    def say(self, text: str) -> None:
        if not self.quiet:
            console.print(text)
