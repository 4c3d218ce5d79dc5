"""Formats the measurements of speed.py as a table, and writes sections of docs/benchmarks.md."""

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

SAME_GUIDANCE = "class images, the script's guidance"
BASELINE, CLASS_BASELINE = "diffusers", "diffusers class images"  # cases with which the others are compared
CLASS_IMAGE_CASES = {CLASS_BASELINE, "class images", SAME_GUIDANCE}  # generate class images and train one step
BEGIN, END = "<!-- benchmarks/speed.py {} -->\n", "<!-- end {} -->\n"


@dataclass
class Trial:
    """The measurements of one process."""

    case: str
    model: str
    round: int = 0  # every case runs once per round; quotients compare cases of the same round
    images_per_second: float | None = None
    images_per_cpu: float | None = None  # per CPU second
    first_step_s: float | None = None  # from the start of the process to the end of its first step
    first_step_cpu: float | None = None  # CPU seconds of the same period
    peak_rss_gib: float = 0.0
    cpu_seconds: float = 0.0
    class_images_per_second: float | None = None
    class_images_per_cpu: float | None = None
    checkpoint_bytes: int | None = None
    resume_s: float | None = None  # from the start of a process that resumes to the end of its first step
    settings: int | None = None  # settings that a user writes: options, overrides, or lines of configuration files
    error: str = ""  # why the trainer did not finish; it then has no measurements


def read_trials(path: Path) -> list[Trial]:
    """Read the trials from a file of JSON lines; return an empty list if there is no file."""
    return [Trial(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def describe_machine(threads: int) -> str:
    """Return one line with the date, the processor, the number of threads and the versions of a measurement."""
    import diffusers
    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text("utf-8").splitlines() if "model name" in line]
    versions = ", ".join(f"{m.__name__} {m.__version__.partition('+')[0]}" for m in (torch, diffusers, transformers))
    return (f"{datetime.now(UTC):%Y-%m-%d}, {names[0] if names else platform.machine()}, {os.cpu_count()} cores, "
            f"{threads} thread{'s' * (threads > 1)}; Python {platform.python_version()}, {versions}.")


def format_table(trials: list[Trial]) -> Iterator[str]:
    """Yield the rows of a Markdown table, one per case: medians and ranges over its trials, and speed-ups.

    A speed-up is the median of the quotients within a round. The images per second count training images, or generated
    class images in the cases that generate them. A case that never finished has its error in place of measurements.
    """
    yield ("| case | runs | images/s | range | speed-up | images per CPU second | speed-up | first step, s | "
           "first step, CPU s | peak RSS, GiB | checkpoint, MB | resumed, s | settings |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for case in dict.fromkeys(t.case for t in trials):
        of_case = [t for t in trials if t.case == case and not t.error]
        if not of_case:
            yield f"| {case} | 0 | {trials_error(trials, case)} |{' |' * 10}"
            continue
        kind = "class_images" if case in CLASS_IMAGE_CASES else "images"
        row = [case, f"{len(of_case)}"]
        for field in (f"{kind}_per_second", f"{kind}_per_cpu"):
            rates = [rate for t in of_case if (rate := getattr(t, field)) is not None]
            row.append(format_number(_median(rates)))
            if field.endswith("second"):
                row.append(f"{min(rates):.2f}-{max(rates):.2f}" if rates else "-")
            quotients = _quotients(trials, case, field)
            row.append(f"{median(quotients):.2f}x" if quotients else "-")
        row += [format_number(_median([getattr(t, field) for t in of_case]))
                for field in ("first_step_s", "first_step_cpu", "peak_rss_gib")]
        size = _median([t.checkpoint_bytes for t in of_case])
        row += ["-" if size is None else f"{size / 1e6:.1f}", format_number(_median([t.resume_s for t in of_case])),
                f"{_median([t.settings for t in of_case]) or 0:.0f}"]
        yield f"| {' | '.join(row)} |"


def trials_error(trials: list[Trial], case: str) -> str:
    """Return the newest error of a case."""
    return [t.error for t in trials if t.case == case][-1]


def _quotients(trials: list[Trial], case: str, field: str) -> list[float]:
    """Return a field of this case divided by the field of diffusers' script, for each round that has both."""
    script_case = CLASS_BASELINE if case in CLASS_IMAGE_CASES else BASELINE
    script = {t.round: getattr(t, field) for t in trials if t.case == script_case}
    return [getattr(t, field) / script[t.round] for t in trials
            if t.case == case and getattr(t, field) and script.get(t.round)]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_section(name: str, rows: list[str], page_name: str = "benchmarks.md") -> None:
    """Write rows into section `name` of a page in docs/."""
    page = Path(__file__).parents[1] / "docs" / page_name
    page.write_text(replace_section(page.read_text("utf-8"), name, rows), encoding="utf-8")


def replace_section(text: str, name: str, rows: list[str]) -> str:
    """Return the text of a page with `rows` between the marks of section `name`.

    Raises:
        SystemExit: the page has no such section.
    """
    begin, end = BEGIN.format(name), END.format(name)
    head, _, rest = text.partition(begin)
    if not rest or end not in rest:
        raise SystemExit(f"the page has no section between {begin.strip()} and {end.strip()}")
    return head + begin + "\n".join(rows) + "\n" + end + rest.partition(end)[2]
