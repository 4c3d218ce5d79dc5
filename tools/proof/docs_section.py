"""Writes a generated section of a page in docs/, between two marks."""

import platform
import time
from pathlib import Path


def write_section(page: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between the marks; the rest of the page does not change."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}{text}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def format_table(subject: str, columns: str, rows: list[str]) -> str:
    """Return a Markdown table below one line with the date, the Python version and the subject of the table."""
    head = f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {subject}:"
    return "\n".join([head, "", columns, "|---" * columns.count(" | ") + "|---|", *rows]) + "\n"
