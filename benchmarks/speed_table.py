"""What speed.py measured, as a table in docs/benchmarks.md."""

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

SAME_GUIDANCE = "class images, the script's guidance"
CLASSES = {"peer class images", "class images", SAME_GUIDANCE}  # cases that make class images, one training step
BEGIN, END = "<!-- benchmarks/speed.py {} -->\n", "<!-- end {} -->\n"


@dataclass
class Trial:
    """What one process showed."""

    case: str
    model: str
    round: int = 0  # in a round every case runs once; quotients are taken within it
    images_per_second: float | None = None
    images_per_cpu: float | None = None  # a CPU second
    first_step_s: float | None = None  # from the start of the process to the end of its first step
    first_step_cpu: float | None = None
    peak_rss_gib: float = 0.0
    cpu_seconds: float = 0.0
    class_images_per_second: float | None = None
    class_images_per_cpu: float | None = None


def trials_of(path: Path) -> list[Trial]:
    """What was measured so far."""
    return [Trial(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def machine(threads: int) -> str:
    """A line that says where and with what the figures were measured."""
    import diffusers
    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text("utf-8").splitlines() if "model name" in line]
    versions = ", ".join(f"{m.__name__} {m.__version__.partition('+')[0]}" for m in (torch, diffusers, transformers))
    return (f"{datetime.now(UTC):%Y-%m-%d}, {names[0] if names else platform.machine()}, {os.cpu_count()} cores, "
            f"{threads} thread{'s' * (threads > 1)}; Python {platform.python_version()}, {versions}.")


def table(trials: list[Trial]) -> Iterator[str]:
    """Markdown rows: medians over the trials of a case, the range, and the median quotients within a round.

    Images are what is trained on, or class images in the cases that make them.
    """
    yield ("| what | runs | images/s | range | quotient | images a CPU second | quotient | first step, s | its CPU | "
           "peak RSS, GiB |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for case in dict.fromkeys(t.case for t in trials):
        mine = [t for t in trials if t.case == case]
        kind = "class_images" if case in CLASSES else "images"
        row = [case, f"{len(mine)}"]
        for what in (f"{kind}_per_second", f"{kind}_per_cpu"):
            rates = [rate for t in mine if (rate := getattr(t, what)) is not None]
            row.append(text(_median(rates)))
            if what.endswith("second"):
                row.append(f"{min(rates):.2f}-{max(rates):.2f}" if rates else "-")
            quotients = _quotients(trials, case, what)
            row.append(f"{median(quotients):.2f}x" if quotients else "-")
        row += [text(_median([getattr(t, what) for t in mine]))
                for what in ("first_step_s", "first_step_cpu", "peak_rss_gib")]
        yield f"| {' | '.join(row)} |"


def _quotients(trials: list[Trial], case: str, what: str) -> list[float]:
    """Of `what`, this case by the script's, for each round that has both."""
    base = "peer class images" if case in CLASSES else "peer"
    script = {t.round: getattr(t, what) for t in trials if t.case == base}
    return [getattr(t, what) / script[t.round] for t in trials
            if t.case == case and getattr(t, what) and script.get(t.round)]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def put(name: str, rows: list[str]) -> None:
    """Write rows into section `name` of docs/benchmarks.md."""
    page = Path(__file__).parents[1] / "docs" / "benchmarks.md"
    page.write_text(written(page.read_text("utf-8"), name, rows), encoding="utf-8")


def written(text: str, name: str, rows: list[str]) -> str:
    """A page with `rows` between the marks of section `name`."""
    begin, end = BEGIN.format(name), END.format(name)
    head, _, rest = text.partition(begin)
    if not rest or end not in rest:
        raise SystemExit(f"the page has no section between {begin.strip()} and {end.strip()}")
    return head + begin + "\n".join(rows) + "\n" + end + rest.partition(end)[2]
