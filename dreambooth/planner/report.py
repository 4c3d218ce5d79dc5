"""The words and figures of a plan: a table of 80 columns, one of several cards, JSON, a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from dreambooth.config.recipe import Recipe
from dreambooth.planner import auto_memory
from dreambooth.planner.gpu_specs import card_of, fixed_gib
from dreambooth.planner.memory_options import ways
from dreambooth.planner.prediction import STEP, Prediction
from dreambooth.planner.time_and_cost import Estimate, disk_gib, estimate, host_gib
from dreambooth.planner.trace_replay import curve
from dreambooth.runs.report import trained
from dreambooth.utils.hardware import GIB

CATEGORIES = ("weights", "gradients", "optimizer", "ema", "activations", "temporaries")
WIDTH = 80  # columns
PHASES = ("load", "class_images", "caching", *STEP, "sample", "evaluate", "save")


@dataclass(frozen=True)
class Planned:
    """A recipe, what it will take and what that costs."""

    recipe: Recipe
    prediction: Prediction
    added: tuple[str, ...]  # overrides that memory=auto chose
    why: str

    @property
    def card(self) -> float | None:
        """GiB; None for a run without a card."""
        return auto_memory.card_gib(self.recipe, self.prediction) if self.recipe.device == "cuda" else None

    @property
    def fits(self) -> bool:
        """Card, host memory and disk, as far as they are known."""
        return not self.lacks

    @property
    def lacks(self) -> str:
        """One sentence about what does not fit, and what to type; empty: all does."""
        recipe, hardware = self.recipe, self.recipe.hardware
        if _above(self.card, hardware.usable_vram_gib):
            return auto_memory.does_not_fit(recipe, self.prediction)
        for what, need, there, typed in (
                ("host memory", host_gib(recipe, self.prediction), hardware.host_ram_gib,
                 "a larger machine of the same card by hardware.instance_type, hardware.host_ram_gib and "
                 "hardware.price_usd_hour"),
                ("disk", disk_gib(recipe, self.prediction), hardware.disk_gib,
                 "checkpoint.keep=1, or a machine with more by hardware.instance_type and hardware.disk_gib")):
            if _above(need, there):
                return f"this run needs {need:.1f} GiB of {what} and the machine has {there:g}: type {typed}"
        return ""

    @property
    def estimate(self) -> Estimate:
        return estimate(self.recipe, self.prediction, card_of(self.recipe.hardware.gpu))


def _above(need: float | None, there: float | None) -> bool:
    return need is not None and there is not None and need > there


def as_json(planned: Planned) -> dict[str, Any]:
    """Figures for programs: GiB, seconds, US dollars; null where a card or price is unknown."""
    recipe, prediction, time = planned.recipe, planned.prediction, planned.estimate
    return {
        "hardware": recipe.hardware.name, "fits": planned.fits, "card_gib": _rounded(planned.card),
        "reserved_gib": round(prediction.reserved / GIB, 3),
        "allocated_gib": round(prediction.peak.allocated / GIB, 3),
        "usable_vram_gib": recipe.hardware.usable_vram_gib,
        "host_gib": round(host_gib(recipe, prediction), 3), "disk_gib": round(disk_gib(recipe, prediction), 3),
        "by_phase": {phase: {"allocated_gib": round(usage.allocated / GIB, 3),
                             "reserved_gib": round(usage.reserved / GIB, 3)}
                     for phase, usage in prediction.by_phase.items()},
        "by_category": {kind: round(size / GIB, 3) for kind, size in prediction.peak.by_category.items()},
        "levers": {"chosen": list(planned.added), "why": planned.why, "could_type": [
            {"overrides": way.what, "saves_gib": round(way.saves, 2), "seconds_a_step": _rounded(way.seconds),
             "changes_numbers": not way.exact} for way in ways(recipe, prediction)]},
        "step_flops": prediction.step_flops, "step_seconds": _rounded(time.step_seconds),
        "run_seconds": _rounded(time.run_seconds), "price_usd": _rounded(time.price_usd),
        "spot_price_usd": _rounded(time.spot_price_usd),
    }


def table(planned: Planned) -> str:
    """One plan, at most 80 columns."""
    recipe, prediction = planned.recipe, planned.prediction
    lines = [_title(recipe), "", *_phases(prediction), "", *_verdict(planned), "", *_cost(planned)]
    if planned.why:
        lines += ["", f"memory=auto: {planned.why}", *(f"  {override}" for override in planned.added)]
    if recipe.device == "cuda" and (known := ways(recipe, prediction)):
        lines += ["", "would save on the card, about; * changes the run's numbers", f"{'GiB':>5} {'s/step':>6}"]
        lines += [f"{way.saves:>5.1f} {_number(way.seconds, '{:+z.1f}'):>6} {' ' if way.exact else '*'} {way.what}"
                  for way in known]
    return "\n".join(fill(line, WIDTH, subsequent_indent="  ") if len(line) > WIDTH else line for line in lines)


def comparison(plans: Sequence[Planned]) -> str:
    """Several plans, a row each."""
    rows = [("hardware", "card", "needs", "of", "fits", "s/step", "run", "price", "levers added")]
    for planned in plans:
        time, hardware = planned.estimate, planned.recipe.hardware
        rows.append((
            hardware.name, hardware.gpu or "-", _number(planned.card, "{:.1f}"),
            _number(hardware.usable_vram_gib, "{:g}"),
            "yes" if planned.fits else "NO", _number(time.step_seconds, "{:.1f}"), _clock(time.run_seconds),
            _number(time.price_usd, "${:.2f}"), str(len(planned.added))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "GiB predicted, never measured; time and price are estimates: see docs/planner.md"])


def plot(planned: Planned, path: Path) -> None:
    """Memory over the second step, by category, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trace = planned.prediction.trace
    moments = list(curve(trace.events, trace.category, trace.marks))
    starts = [i for i, moment in enumerate(moments) if moment.phase == "forward" and moments[i - 1].phase == "idle"]
    begin = starts[-1]
    end = next((i for i in range(begin, len(moments)) if moments[i].phase == "idle"), len(moments))
    window = moments[begin:end:max(1, (end - begin) // 2000)]
    kinds = [kind for kind in CATEGORIES if any(moment.by_category.get(kind) for moment in window)]
    figure, axes = pyplot.subplots(figsize=(10, 5))
    axes.stackplot(range(len(window)), *([m.by_category.get(kind, 0) / GIB for m in window] for kind in kinds),
                   labels=kinds)
    if limit := planned.recipe.hardware.usable_vram_gib:
        axes.axhline(limit - fixed_gib(planned.recipe.hardware.gpu), color="black", linestyle="--", label="card")
    axes.set(xlabel="a training step, operator by operator", ylabel="GiB", title=_title(planned.recipe))
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def dumped(plans: Sequence[Planned]) -> str:
    """One object, or a list of them for several cards."""
    found = [as_json(planned) for planned in plans]
    return json.dumps(found[0] if len(found) == 1 else found, indent=2)


def _title(recipe: Recipe) -> str:
    size = recipe.train.train_batch_size
    return (f"{recipe.model.name} {recipe.model.resolution} px on {recipe.hardware.gpu or 'the CPU'}: "
            f"{trained(recipe)}, batch {size}{f'+{size}' if recipe.with_prior else ''}, {recipe.precision.label}, "
            f"{recipe.optimizer.kind.value}")


def _phases(prediction: Prediction) -> list[str]:
    heads = ("weights", "gradients", "optimizer", "EMA", "activ.", "other")
    lines = [f"{'GiB, fullest':<14}{'total':>6}" + "".join(f"{head:>10}" for head in heads)]
    for phase in PHASES:
        if usage := prediction.by_phase.get(phase):
            parts = {kind: usage.by_category.get(kind, 0) for kind in CATEGORIES[:-1]}
            other = sum(usage.by_category.values()) - sum(parts.values())
            cells = "".join(f"{size / GIB:>10.2f}" if size > GIB / 200 else f"{'-':>10}"
                            for size in (*parts.values(), other))
            lines.append(f"{phase.replace('_', ' '):<14}{usage.allocated / GIB:>6.2f}{cells}")
    return lines


def _verdict(planned: Planned) -> list[str]:
    recipe, prediction, hardware = planned.recipe, planned.prediction, planned.recipe.hardware
    rows: list[tuple[str, float, float | None, str]] = []
    if planned.card is not None:
        rows = [("card", planned.card, hardware.usable_vram_gib,
                 f"{prediction.reserved / GIB:.2f} reserved, {fixed_gib(hardware.gpu):g} CUDA")]
    rows += [("host memory", host_gib(recipe, prediction), hardware.host_ram_gib, ""),
             ("disk", disk_gib(recipe, prediction), hardware.disk_gib, "checkpoints, model, base")]
    return [f"{name:<12}{need:>7.1f} GiB{_of(need, there)}" + (f"  ({note})" if note else "")
            for name, need, there, note in rows]


def _of(need: float, there: float | None) -> str:
    return "" if there is None else f" of {there:g}: {'fits' if need <= there else 'DOES NOT FIT'}"


def _cost(planned: Planned) -> list[str]:
    time, hardware, card = planned.estimate, planned.recipe.hardware, card_of(planned.recipe.hardware.gpu)
    flops = f"{planned.prediction.step_flops / 1e12:.1f} TFLOP a step"
    if card is None or time.step_seconds is None:
        return [f"{flops}; no estimate of time: nothing is known of {hardware.gpu or 'this CPU'}'s speed"]
    told = "on published T4 speeds" if card.calibrated else "shares of its peak taken over from the T4"
    lines = [f"{flops}, about {time.step_seconds:.1f} s a step, {_clock(time.run_seconds)} in all (estimate: {told})"]
    if time.price_usd is not None:
        lines.append(f"about ${time.price_usd:.2f} on {hardware.instance_type} at ${hardware.price_usd_hour:g}/h "
                     "(us-east-1, as quoted in 2026-11)")
    if time.spot_price_usd is not None:
        lines.append(f"about ${time.spot_price_usd:.2f} at your spot price of ${hardware.spot_price_usd_hour:g}/h")
    return lines


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)

