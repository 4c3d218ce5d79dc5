"""What a person sees in the terminal: a short plan, one progress bar, a summary. Plain lines when piped."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console as Rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

EVERY = 60.0  # seconds after which a pipe gets another line: SageMaker reads step and loss there


class Bar:
    """Progress of one thing. On a terminal a bar; elsewhere a line at every tenth, every minute and the end."""

    def __init__(self, rich: Rich, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done = title, total, done
        self._rich, self._start, self._line = rich, done, done * 10 // max(total, 1)
        self._started = self._told = time.monotonic()
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
        """`count` more are done; `note` is shown beside them."""
        self.done += count
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self.done, note=note)
            return
        tenth, now = self.done * 10 // max(self.total, 1), time.monotonic()
        if tenth > self._line or self.done == self.total or now - self._told >= EVERY:
            self._line, self._told = tenth, now
            speed = (self.done - self._start) / max(now - self._started, 1e-9)
            self._rich.print(f"{self.title} {self.done}/{self.total}  {speed:.1f}/s  {note}".rstrip(), highlight=False,
                             markup=False)


class Console:
    """Writes to stdout. `quiet` for every process but the first."""

    def __init__(self, quiet: bool = False) -> None:
        self._rich = Rich(file=sys.stdout, quiet=quiet, soft_wrap=not sys.stdout.isatty())

    def say(self, text: str) -> None:
        """One line."""
        self._rich.print(Text(text))

    def table(self, rows: Mapping[str, str]) -> None:
        """Names and values, two columns; a path stays in one piece where there is no terminal to fold it."""
        if not self._rich.is_terminal:
            width = max(map(len, rows), default=0)
            for key, value in rows.items():
                self.say("\n".join(f"{first:<{width}}  {line}" for first, line in
                                   zip([key, *[""] * value.count("\n")], value.split("\n"), strict=True)))
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in rows.items():
            table.add_row(Text(key), Text(value))
        self._rich.print(table)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A progress bar for `total` things, `done` of which were done before."""
        with Bar(self._rich, title, total, done) as bar:
            yield bar
