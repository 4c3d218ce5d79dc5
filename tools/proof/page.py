"""A part of a page in docs/, between two marks, that a proof writes anew."""

import platform
import time
from pathlib import Path


def put(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what is between the marks; the rest of the page stays."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}{text}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def table(what: str, columns: str, rows: list[str]) -> str:
    """Rows of Markdown below the date and what was measured."""
    head = f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {what}:"
    return "\n".join([head, "", columns, "|---" * columns.count(" | ") + "|---|", *rows]) + "\n"
