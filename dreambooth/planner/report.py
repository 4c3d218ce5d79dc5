"""Presents plans: as a table of 80 columns, as a comparison of several machines, as JSON, and as a plot."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from dreambooth.config.recipe import Recipe
from dreambooth.planner import auto_memory
from dreambooth.planner.gpu_specs import cuda_overhead_gib, find_card
from dreambooth.planner.memory_options import list_memory_options
from dreambooth.planner.prediction import STEP_PHASES, Prediction
from dreambooth.planner.serving_plan import ServingPlan, format_serving, serving_as_dicts
from dreambooth.planner.skeleton_models import describe_adapter
from dreambooth.planner.time_and_cost import Estimate, budgeted, disk_gib, estimate, host_gib
from dreambooth.planner.trace_replay import memory_curve
from dreambooth.runs.report import describe_trained_weights
from dreambooth.utils.hardware import GIB

CATEGORIES = ("weights", "gradients", "optimizer", "ema", "activations", "temporaries")
WIDTH = 80  # columns of a table
PHASES = ("prompts", "load", "class_images", "caching", *STEP_PHASES, "validation", "sample", "evaluate", "save")


@dataclass(frozen=True)
class Plan:
    """The plan of one run: its recipe, its predicted memory, and the options that memory=auto chose."""

    recipe: Recipe
    prediction: Prediction
    added: tuple[str, ...]  # overrides that memory=auto chose
    why: str  # explanation of the choice of memory=auto; empty without memory=auto
    serving: Sequence[ServingPlan] = ()  # for each GPU: serving the model that the run makes
    larger_sample_batch: int | None = None  # a larger prior.sample_batch_size that fits, for the table

    @property
    def card_gib(self) -> float | None:
        """GiB of the card that the run needs; None for a run on a CPU."""
        return auto_memory.card_gib(self.recipe, self.prediction) if self.recipe.device == "cuda" else None

    @property
    def fits(self) -> bool:
        """Whether card, host memory and disk suffice, as far as their sizes are known."""
        return not self.shortfall

    @property
    def shortfall(self) -> str:
        """An error message that names the insufficient resource and the overrides to type; empty if the run fits.

        If several resources are insufficient, the message names the first: card, host memory, disk, then the budget.
        """
        recipe, hardware = self.recipe, self.recipe.hardware
        if _exceeds(self.card_gib, hardware.usable_vram_gib):
            return auto_memory.describe_shortfall(recipe, self.prediction)
        if problem := auto_memory.host_shortfall(recipe, self.prediction):
            return problem
        if _exceeds(needed := disk_gib(recipe, self.prediction), hardware.disk_gib):
            return (f"this run needs {needed:.1f} GiB of disk and the machine has {hardware.disk_gib:g}: type "
                    "checkpoint.keep=1, or hardware.instance_type and hardware.disk_gib of a machine with a larger "
                    "disk")
        return recipe.budget.shortfall("run", [self.budgeted[0]], [self.budgeted[1]])

    @property
    def budgeted(self) -> tuple[float | None, float | None]:
        """The cost in US dollars and the hours of the run that count for its budget; None: unknown."""
        return budgeted(self.recipe, self.estimate)

    @property
    def estimate(self) -> Estimate:
        """The time and price of the run."""
        return estimate(self.recipe, self.prediction, find_card(self.recipe.hardware.gpu))


def _exceeds(needed: float | None, available: float | None) -> bool:
    return needed is not None and available is not None and needed > available


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Return the figures of a plan as JSON values, in GiB, seconds and US dollars.

    A figure that depends on an unknown card or price is None.
    """
    recipe, prediction, time = plan.recipe, plan.prediction, plan.estimate
    return {
        "hardware": recipe.hardware.name, "fits": plan.fits, "card_gib": _round(plan.card_gib),
        "reserved_gib": round(prediction.reserved / GIB, 3),
        "allocated_gib": round(prediction.peak.allocated / GIB, 3),
        "usable_vram_gib": recipe.hardware.usable_vram_gib,
        "host_gib": round(host_gib(recipe, prediction), 3), "disk_gib": round(disk_gib(recipe, prediction), 3),
        "by_phase": {phase: {"allocated_gib": round(usage.allocated / GIB, 3),
                             "reserved_gib": round(usage.reserved / GIB, 3)}
                     for phase, usage in prediction.by_phase.items()},
        "by_category": {kind: round(size / GIB, 3) for kind, size in prediction.peak.by_category.items()},
        "levers": {"chosen": list(plan.added), "why": plan.why, "could_type": [
            {"overrides": option.overrides, "saves_gib": round(option.saved_gib, 2),
             "seconds_a_step": _round(option.extra_seconds), "changes_numbers": not option.exact}
            for option in list_memory_options(recipe, prediction)]},
        "step_flops": prediction.step_flops, "step_seconds": _round(time.step_seconds),
        "run_seconds": _round(time.run_seconds), "price_usd": _round(time.price_usd),
        "spot_price_usd": _round(time.spot_price_usd), "spot_seconds": _round(time.spot_seconds),
        "serving": serving_as_dicts(plan.serving),
    }


def format_plan(plan: Plan) -> str:
    """Return one plan as text of at most 80 columns."""
    recipe, prediction = plan.recipe, plan.prediction
    lines = [_title(recipe), "", *_phase_table(prediction), "", *_resource_lines(plan), "", *_cost_lines(plan)]
    if recipe.method.chooses_layers:
        lines += ["", *describe_adapter(recipe)]
    if plan.why:
        lines += ["", f"memory=auto: {plan.why}", *(f"  {override}" for override in plan.added)]
    if recipe.device == "cuda" and (options := list_memory_options(recipe, prediction)):
        lines += ["", "options to save memory on the card (approximate); * changes the results",
                  f"{'GiB':>5} {'s/step':>6}"]
        lines += [f"{option.saved_gib:>5.1f} {_format_number(option.extra_seconds, '{:+z.1f}'):>6} "
                  f"{' ' if option.exact else '*'} {option.overrides}" for option in options]
    if batch := plan.larger_sample_batch:
        lines += ["", f"prior.sample_batch_size={batch} fits, too (another run, with new class images)"]
    if plan.serving:
        lines += ["", *format_serving(plan.serving)]
    return "\n".join(fill(line, WIDTH, subsequent_indent="  ") if len(line) > WIDTH else line for line in lines)


def format_comparison(plans: Sequence[Plan]) -> str:
    """Return several plans as a table with one row per plan."""
    rows = [("hardware", "card", "needs", "of", "fits", "s/step", "run", "price", "options added")]
    for plan in plans:
        time, hardware = plan.estimate, plan.recipe.hardware
        rows.append((
            hardware.name, hardware.gpu or "-", _format_number(plan.card_gib, "{:.1f}"),
            _format_number(hardware.usable_vram_gib, "{:g}"),
            "yes" if plan.fits else "NO", _format_number(time.step_seconds, "{:.1f}"),
            _format_duration(time.run_seconds), _format_number(time.price_usd, "${:.2f}"), str(len(plan.added))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "GiB are predicted, not measured; time and price are estimated: docs/planner.md"])


def plot_step_memory(plan: Plan, path: Path) -> None:
    """Plot the memory of each category during the second training step, and write the picture to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trace = plan.prediction.trace
    moments = list(memory_curve(trace.events, trace.category, trace.marks))
    starts = [i for i, moment in enumerate(moments) if moment.phase == "forward" and moments[i - 1].phase == "idle"]
    begin = starts[-1]
    end = next((i for i in range(begin, len(moments)) if moments[i].phase == "idle"), len(moments))
    window = moments[begin:end:max(1, (end - begin) // 2000)]
    kinds = [kind for kind in CATEGORIES if any(moment.by_category.get(kind) for moment in window)]
    figure, axes = pyplot.subplots(figsize=(10, 5))
    axes.stackplot(range(len(window)), *([m.by_category.get(kind, 0) / GIB for m in window] for kind in kinds),
                   labels=kinds)
    if limit := plan.recipe.hardware.usable_vram_gib:
        available = limit - cuda_overhead_gib(plan.recipe.hardware.gpu)
        axes.axhline(available, color="black", linestyle="--", label="card")
    axes.set(xlabel="operators of one training step, in order", ylabel="GiB", title=_title(plan.recipe))
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def plans_as_json(plans: Sequence[Plan]) -> str:
    """Return JSON text: one object for one plan, a list of objects for several plans."""
    objects = [plan_as_dict(plan) for plan in plans]
    return json.dumps(objects[0] if len(objects) == 1 else objects, indent=2)


def _title(recipe: Recipe) -> str:
    """Describe the run in one line: model, resolution, card, trained parts, batch, precision and optimizer."""
    batch = str(recipe.micro_batches[0])
    if recipe.with_prior:
        batch += f"+{recipe.class_rows}" if recipe.class_row_interval == 1 else " and 1+1 in turn"
    return (f"{recipe.model.name} {recipe.model.resolution} px on {recipe.hardware.gpu or 'the CPU'}: "
            f"{describe_trained_weights(recipe)}, batch {batch}, "
            f"{recipe.precision.label}, {recipe.optimizer.kind.value}")


def _phase_table(prediction: Prediction) -> list[str]:
    """Return the lines of a table with the peak memory of each phase, by category."""
    heads = ("weights", "gradients", "optimizer", "EMA", "activ.", "other")
    lines = [f"{'GiB at peak':<14}{'total':>6}" + "".join(f"{head:>10}" for head in heads)]
    for phase in PHASES:
        if usage := prediction.by_phase.get(phase):
            parts = {kind: usage.by_category.get(kind, 0) for kind in CATEGORIES[:-1]}
            other = sum(usage.by_category.values()) - sum(parts.values())
            cells = "".join(f"{size / GIB:>10.2f}" if size > GIB / 200 else f"{'-':>10}"
                            for size in (*parts.values(), other))
            lines.append(f"{phase.replace('_', ' '):<14}{usage.allocated / GIB:>6.2f}{cells}")
    return lines


def _resource_lines(plan: Plan) -> list[str]:
    """Return one line each for card, host memory and disk: how much the run needs, and whether it fits."""
    recipe, prediction, hardware = plan.recipe, plan.prediction, plan.recipe.hardware
    rows: list[tuple[str, float, float | None, str]] = []
    if plan.card_gib is not None:
        rows = [("card", plan.card_gib, hardware.usable_vram_gib,
                 f"{prediction.reserved / GIB:.2f} reserved, {cuda_overhead_gib(hardware.gpu):g} CUDA")]
    rows += [("host memory", host_gib(recipe, prediction), hardware.host_ram_gib, ""),
             ("disk", disk_gib(recipe, prediction), hardware.disk_gib, "checkpoints, model, base")]
    return [f"{name:<12}{needed:>7.1f} GiB{_limit_text(needed, available)}" + (f"  ({note})" if note else "")
            for name, needed, available, note in rows]


def _limit_text(needed: float, available: float | None) -> str:
    return "" if available is None else f" of {available:g}: {'fits' if needed <= available else 'DOES NOT FIT'}"


def _cost_lines(plan: Plan) -> list[str]:
    """Return lines with the operations, time and price of the run."""
    time, hardware, card = plan.estimate, plan.recipe.hardware, find_card(plan.recipe.hardware.gpu)
    flops = f"{plan.prediction.step_flops / 1e12:.1f} TFLOP per step"
    if card is None or time.step_seconds is None:
        return [f"{flops}; no time estimate: the speed of {hardware.gpu or 'this CPU'} is unknown"]
    basis = f"based on published {card.name} speeds" if card.calibrated else "assuming the T4's shares of peak rates"
    lines = [f"{flops}, about {time.step_seconds:.1f} s per step, {_format_duration(time.run_seconds)} in total "
             f"(estimate: {basis})"]
    if time.price_usd is not None:
        lines.append(f"about ${time.price_usd:.2f} on {hardware.instance_type} at ${hardware.price_usd_hour:g}/h "
                     "(us-east-1, as quoted in 2026-11)")
    if time.spot_price_usd is not None:
        rate = plan.recipe.budget.interruptions_per_hour
        longer = f" and {rate:g} interruptions per hour, in {_format_duration(time.spot_seconds)}" if rate else ""
        lines.append(f"about ${time.spot_price_usd:.2f} at your spot price of ${hardware.spot_price_usd_hour:g}/h"
                     + longer)
    if plan.recipe.budget.limits:
        limits = ", ".join(f"{key}={value:g}" for key, value in plan.recipe.budget.limits.items())
        within = plan.recipe.budget.shortfall("run", [plan.budgeted[0]], [plan.budgeted[1]])
        lines.append(f"{limits}: {'DOES NOT FIT' if within else 'fits'}")
    return lines


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def _format_number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
