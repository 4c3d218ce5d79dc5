"""Terminal output with rich: lines, tables and progress bars. If stdout is no terminal, all output is plain lines."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dreambooth.utils.masking import mask_urls

LINE_INTERVAL = 60.0  # seconds between progress lines without a terminal; SageMaker parses their loss


class Bar:
    """Progress of one task, shown as a bar on a terminal.

    If stdout is not a terminal, print a line after each tenth of the items, after each minute, and at the end.

    Args:
        rich: the console to write to.
        title: name of the task.
        total: number of items.
        done: number of items that are already completed.
    """

    def __init__(self, rich: RichConsole, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done = title, total, done
        self._rich, self._start, self._last_tenth = rich, done, done * 10 // max(total, 1)
        self._start_time = self._last_line_time = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}"), console=rich,
        ) if rich.is_terminal else None
        self._task = self._progress.add_task(title, total=total, completed=done, note="") if self._progress else None

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def tick(self, count: int = 1, note: str = "") -> None:
        """Advance by `count` items, and show `note` beside the number of completed items."""
        self.done += count
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self.done, note=note)
            return
        tenth, now = self.done * 10 // max(self.total, 1), time.monotonic()
        if tenth > self._last_tenth or self.done == self.total or now - self._last_line_time >= LINE_INTERVAL:
            self._last_tenth, self._last_line_time = tenth, now
            speed = (self.done - self._start) / max(now - self._start_time, 1e-9)
            self._rich.print(f"{self.title} {self.done}/{self.total}  {speed:.1f}/s  {note}".rstrip(), highlight=False,
                             markup=False)


class Console:
    """Writes lines, tables and progress bars to stdout.

    Args:
        quiet: whether to write nothing; True in all processes of a run except the main process.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._rich = RichConsole(file=sys.stdout, quiet=quiet, soft_wrap=not sys.stdout.isatty())

    def say(self, text: str) -> None:
        """Print a line of plain text. User info and queries of URLs are masked, here and in tables."""
        self._rich.print(Text(mask_urls(text)))

    def list(self, title: str, lines: Sequence[str]) -> None:
        """Print a title and indented lines; nothing if there are no lines. On a terminal, wrapped lines keep it.
        """
        for line in (title, *lines) if lines else ():
            indent = 2 * (line is not title)
            if self._rich.is_terminal:
                self._rich.print(Padding(Text(mask_urls(line)), (0, 0, 0, indent), expand=False))
            else:
                self.say(" " * indent + line)

    def table(self, rows: Mapping[str, str]) -> None:
        """Print two columns: the keys of `rows`, and their values.

        On a terminal, long values are wrapped, but a command is one long line, so that it can be copied. Commands come
        after all other rows. If stdout is not a terminal, nothing is wrapped, so that paths are not broken.
        """
        rows = {key: mask_urls(value) for key, value in rows.items()}
        if not self._rich.is_terminal:
            width = max(map(len, rows), default=0)
            for key, value in rows.items():
                self.say("\n".join(f"{first:<{width}}  {line}" for first, line in
                                   zip([key, *[""] * value.count("\n")], value.split("\n"), strict=True)))
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        commands = {key: value for key, value in rows.items() if value.startswith("python -m ")}
        for key, value in rows.items():
            if key not in commands:
                table.add_row(Text(key), Text(value))
        self._rich.print(table)
        for key, value in commands.items():
            self._rich.print(Text.assemble((key, "bold"), "  ", value), soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Show a progress bar for `total` items, of which `done` are already completed."""
        with Bar(self._rich, title, total, done) as bar:
            yield bar
