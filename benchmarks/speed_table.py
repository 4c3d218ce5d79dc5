"""Formats the measurements of speed.py as a table, and writes sections of pages in docs/."""

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
    note: str = ""  # what else is to be said in the table
    peer: bool = False  # whether another trainer ran
    steps: int = 0
    threads: int = 0
    seconds: float = 0.0  # duration of all processes of the trial


def read_trials(path: Path) -> list[Trial]:
    """Read the trials from a file of JSON lines; return an empty list if there is no file."""
    return [Trial(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def append_trial(path: Path, trial: Trial) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(trial)) + "\n")


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
    """Yield the lines of a Markdown table with one row per case, and then the names of the best peers, and notes.

    A row has medians and ranges over the trials of its case. "x diffusers" and "x best peer" are quotients within a
    round: median and range. The best peer is the one with the highest median. The images per second count training
    images, or generated class images in the cases that generate them. A case that never finished has its error in place
    of measurements.
    """
    yield ("| case | runs | images/s | range | x diffusers | x best peer | images per CPU second | x diffusers | "
           "x best peer | first step, s | first step, CPU s | peak RSS, GiB | checkpoint, MB | resumed, s | settings |")
    yield "|---" * 15 + "|"
    for case in dict.fromkeys(t.case for t in trials):
        of_case = [t for t in trials if t.case == case and not t.error]
        if not of_case:
            yield f"| {case} | 0 | {trials_error(trials, case)} |{' |' * 12}"
            continue
        kind = "class_images" if case in CLASS_IMAGE_CASES else "images"
        row = [case, f"{len(of_case)}"]
        for field in (f"{kind}_per_second", f"{kind}_per_cpu"):
            rates = [rate for t in of_case if (rate := getattr(t, field)) is not None]
            row.append(format_number(_median(rates)))
            if field.endswith("second"):
                row.append(f"{min(rates):.2f}-{max(rates):.2f}" if rates else "-")
            row += [_format_quotients(trials, case, other, field) for other in (
                CLASS_BASELINE if case in CLASS_IMAGE_CASES else BASELINE, best_peer(trials, field))]
        row += [format_number(_median([getattr(t, field) for t in of_case]))
                for field in ("first_step_s", "first_step_cpu", "peak_rss_gib")]
        size = _median([t.checkpoint_bytes for t in of_case])
        row += ["-" if size is None else f"{size / 1e6:.1f}", format_number(_median([t.resume_s for t in of_case])),
                f"{_median([t.settings for t in of_case]) or 0:.0f}"]
        yield f"| {' | '.join(row)} |"
    yield ""
    by_wall, by_cpu = best_peer(trials, "images_per_second"), best_peer(trials, "images_per_cpu")
    if by_wall and by_cpu:
        yield f"Best peer by wall time: {by_wall}; by CPU time: {by_cpu}."
    for case, note in dict.fromkeys((t.case, t.note) for t in trials if t.note and not t.error):
        yield f"{case}: {note}"


def best_peer(trials: list[Trial], field: str) -> str | None:
    """Return the peer with the highest median of a field; None: no peer finished."""
    medians = {case: _median([getattr(t, field) for t in trials if t.case == case])
               for case in dict.fromkeys(t.case for t in trials if t.peer)}
    return max((case for case, value in medians.items() if value is not None),
               key=lambda case: medians[case] or 0.0, default=None)


def trials_error(trials: list[Trial], case: str) -> str:
    """Return the newest error of a case."""
    return [t.error for t in trials if t.case == case][-1]


def _format_quotients(trials: list[Trial], case: str, other: str | None, field: str) -> str:
    """Return the median and the range of a field of `case` divided by that of `other`, over the rounds with both."""
    values = {t.round: getattr(t, field) for t in trials if t.case == other and getattr(t, field)}
    quotients = [getattr(t, field) / values[t.round] for t in trials
                 if t.case == case and getattr(t, field) and t.round in values]
    if not quotients:
        return "-"
    spread = f" ({min(quotients):.2f}-{max(quotients):.2f})" if len(quotients) > 1 and case != other else ""
    return f"{median(quotients):.2f}x{spread}"


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
