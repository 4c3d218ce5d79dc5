"""Writes the page docs/gpu.md from the results of gpu.py."""

from collections.abc import Iterator, Mapping
from typing import Any

HEAD = """# GPU measurements

{date}, {card}. Written by `python benchmarks/gpu.py`, which took
{seconds} s; all numbers are in gpu.json.

The base models have the true architectures and random weights, and the photos are those of the demo. Each configuration
ran in a process of its own. *predicted* is what the [planner](planner.md) says before the run. GiB are those that
PyTorch's allocator reserves. *CUDA itself* is the other memory of the process and of other processes on the card.
"""
STEP_PHASES = ("forward", "backward", "step", "ema")  # of a plan; a run measures them as one phase, step
PHASES = ("load", "class_images", "caching", "state", "step", "sample")


def render(results: Mapping[str, Any]) -> str:
    """Return the page."""
    card = results["card"]
    lines = [HEAD.format(date=results["date"], card=describe_card(card), seconds=results["seconds"])]
    lines += ["## Training steps", "", *step_table(results["cases"]), ""]
    if phases := list(phase_table(results["cases"])):
        lines += ["## Peaks of all phases", "", *phases, ""]
    if results["checks"]:
        lines += ["## Exactness", "", EXACTNESS, "", *check_table(results["checks"]), ""]
    if reasons := list(reason_list(results)):
        lines += ["## Not measured", "", *reasons, ""]
    return "\n".join(lines)


EXACTNESS = """Trained weights after the last step, compared with those of a reference run, with PyTorch's deterministic
algorithms. *difference* is the largest difference of two weights, divided by the largest change of a weight in the
second half of the reference run. [Memory](memory.md) says which options are meant to be exact."""


def describe_card(card: Mapping[str, Any]) -> str:
    """Return the device, its driver and the versions in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items() if version)
    absent = [name for name, version in card["versions"].items() if not version]
    missing = f"; not installed: {', '.join(absent)}" if absent else ""
    if card["device"] == "cpu":
        return (f"{card['name']} (no GPU, tiny models), {card['cores']} cores; Python {card['python']}, "
                f"{versions}{missing}")
    return (f"{card['name']}, {card['memory_gib']:.1f} GiB, compute capability {card['capability']}, driver "
            f"{card['driver'] or 'unknown'}, CUDA {card['cuda']}, cuDNN {card['cudnn']}; Python {card['python']}, "
            f"{versions}{missing}")


def step_table(cases: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table with one row per configuration: seconds and peak of a step, beside their predictions."""
    yield ("| configuration | steps | s per step | predicted | error | GiB in a step | predicted | error | "
           "CUDA itself, GiB | host, GiB | class images/s | result |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        plan = case["plan"]
        phases = plan.get("by_phase", {})
        expected = [phases[phase]["reserved_gib"] for phase in STEP_PHASES if phase in phases]
        reserved = case.get("peaks", {}).get("vram/step/reserved_gib")
        yield row([
            case["title"], str(case.get("finished_steps", 0)),
            *beside(case.get("step_seconds"), plan.get("step_seconds"), 3),
            *beside(reserved, max(expected, default=None) if plan.get("card_gib") else None, 2),
            number(case.get("outside_gib")), number(case.get("host_gib"), 1),
            number(case.get("class_images_per_second")), short(case["status"])])


def phase_table(cases: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table with one row per configuration and phase. It is empty if no run measured a card."""
    rows = []
    for case in cases:
        peaks, planned = case.get("peaks", {}), case["plan"].get("by_phase", {})
        for phase in PHASES:
            reserved = peaks.get(f"vram/{phase}/reserved_gib")
            if reserved is None:
                continue
            names = {"step": STEP_PHASES, "load": ("load", "prompts")}.get(phase, (phase,))
            expected = [planned[name]["reserved_gib"] for name in names if name in planned]
            rows.append(row([case["title"], phase.replace("_", " "),
                             *beside(reserved, max(expected, default=None), 2),
                             number(peaks.get(f"vram/{phase}/allocated_gib"))]))
    if rows:
        yield "| configuration | phase | GiB reserved | predicted | error | GiB allocated |"
        yield "|---|---|---|---|---|---|"
        yield from rows


def check_table(checks: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table with one row per variant of a check."""
    yield "| reference | steps | variant | equal, bit for bit | difference |"
    yield "|---|---|---|---|---|"
    for check in checks:
        for name, found in check["rows"].items():
            if "error" in found:
                cells = [short(found["error"]), "-"]
            else:
                relative = found["relative"]
                cells = ["yes" if found["equal"] else "no", "-" if relative is None else f"{relative:.1e}"]
            yield row([check["title"], str(check["steps"]), name, *cells])
        if not check["rows"]:
            yield row([check["title"], str(check["steps"]), "-", short(check["status"]), "-"])


def reason_list(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each configuration without complete measurements, with the whole reason."""
    for case in (*results["cases"], *results["checks"]):
        if case["status"] != "measured":
            yield f"- {case['title']}: {' '.join(case['status'].split())}"


def beside(measured: float | None, predicted: float | None, digits: int) -> list[str]:
    """Return the cells of a measured value, its prediction, and the error of the prediction."""
    error = f"{predicted / measured - 1:+.0%}" if measured and predicted else "-"
    return [number(measured, digits), number(predicted, digits), error]


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def short(text: str) -> str:
    """Return the beginning of a text in one line, without the separator of cells."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 90 else f"{line[:87]}..."


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
