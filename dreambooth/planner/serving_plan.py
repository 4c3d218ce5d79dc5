"""Plans inference: the GPU memory and the seconds per picture that a model needs, and memory=auto for serving.

`plan_serving` plans one machine, and chooses memory options if the user chose none. `plan_presets` plans every GPU of
conf/hardware. Memory is predicted (serving_rehearsal.py). The time is an estimate:

    seconds per batch = operations / (peak rate x EFFICIENCY), but at least LAUNCH_SECONDS for each denoising step
                        + dequantised weights / memory bandwidth, in each denoising step
                        + copies of cpu_offload / speed of the link to the host

memory=auto takes the first set of CANDIDATES that fits: first the sets that change no picture, each group ordered by
its time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dreambooth.config.enums import BaseWeights
from dreambooth.config.hardware import Hardware, presets
from dreambooth.config.recipe import Recipe
from dreambooth.inference.model_sources import Source
from dreambooth.models.inference_memory import InferenceMemory
from dreambooth.planner.auto_memory import MAX_CARD_SHARE
from dreambooth.planner.gpu_specs import Card, cuda_overhead_gib, find_card
from dreambooth.planner.serving_rehearsal import Footprint, ServedModel, predict_serving
from dreambooth.planner.time_and_cost import (
    BANDWIDTH_SHARE,
    DEQUANTISED,
    HOST_LINK,
    PROCESS_GIB,
    flops_per_second,
)
from dreambooth.utils.hardware import GIB

STEPS = 25  # denoising steps of a picture, the default of generate and of serve
LAUNCH_SECONDS = 0.02  # of a denoising step whose kernels are shorter than their launches; an assumption
TF32_CAPABILITY = 8.0
CANDIDATES = (
    InferenceMemory(), InferenceMemory(vae_slicing=True), InferenceMemory(cpu_offload=True),
    InferenceMemory(vae_slicing=True, cpu_offload=True),
    InferenceMemory(vae_slicing=True, vae_tiling=True),
    InferenceMemory(vae_slicing=True, base_weights=BaseWeights.int8),
    InferenceMemory(vae_slicing=True, vae_tiling=True, base_weights=BaseWeights.int8),
    InferenceMemory(vae_slicing=True, vae_tiling=True, base_weights=BaseWeights.nf4),
    InferenceMemory(vae_slicing=True, vae_tiling=True, cpu_offload=True),
    InferenceMemory(vae_slicing=True, vae_tiling=True, cpu_offload=True, base_weights=BaseWeights.int8),
)


@dataclass(frozen=True)
class ServingPlan:
    """What serving a model needs on one machine."""

    model: ServedModel
    hardware: Hardware
    memory: InferenceMemory  # chosen by the user or by memory=auto
    peak_gib: float  # of the card: PyTorch's reserved memory and the overhead of the process; 0 on a CPU
    host_gib: float  # of host memory, through which all weights are loaded
    seconds_per_picture: float | None  # None: the speed of the card is unknown
    footprint: Footprint

    @property
    def fits(self) -> bool:
        """Whether the card and the host memory suffice, as far as their sizes are known."""
        return not self.shortfall

    @property
    def shortfall(self) -> str:
        """One sentence that says what is too small and what the user can type; empty if serving fits."""
        hardware, batch = self.hardware, self.model.batch
        if _exceeds(self.peak_gib, hardware.usable_vram_gib):
            fewer = f"max_batch=1 instead of {batch}, " if batch > 1 else ""
            return (f"serving {batch} pictures at a time needs {self.peak_gib:.1f} GiB, and "
                    f"{hardware.gpu or 'the card'} has {hardware.usable_vram_gib:g}: type {fewer}memory=auto, or take "
                    "a larger card")
        if _exceeds(self.host_gib, hardware.host_ram_gib):
            return (f"serving needs {self.host_gib:.1f} GiB of host memory to load the model, and the machine has "
                    f"{hardware.host_ram_gib:g}: take a larger machine with the same card")
        return ""


def model_of_recipe(recipe: Recipe, trained_parameters: int, batch: int) -> ServedModel:
    """Return the model that a recipe trains, with pictures as in its samples.

    Args:
        trained_parameters: number of weights that the recipe trains.
        batch: pictures at a time.
    """
    adapter = 2 * trained_parameters if recipe.method.low_rank and not recipe.method.merge else 0
    return ServedModel(recipe.source, recipe.model.name, recipe.vae_source, adapter, recipe.sample.guidance_scale,
                       batch, (recipe.model.resolution,) * 2)


def model_of_source(source: Source, batch: int, size: tuple[int, int] | None = None,
                    adapters: Sequence[Path] = ()) -> ServedModel:
    """Return the model that a server opens.

    Args:
        source: the model and, if there is one, its own adapter.
        batch: pictures at a time.
        size: height and width of the largest picture in pixels; None: those of the run, or the model's own resolution.
        adapters: files of the other adapters that are on the card at a time.
    """
    files = [*adapters, *([Path(source.adapter)] if source.adapter else [])]
    side = int(source.settings.get("model.resolution", 0))
    guidance_scale = float(source.settings.get("sample.guidance_scale", 7.5))
    return ServedModel(source.model, source.setting("model.name"), source.vae,
                       sum(path.stat().st_size for path in files), guidance_scale, batch,
                       size or ((side, side) if side else None))


def plan_serving(model: ServedModel, hardware: Hardware, memory: InferenceMemory | None = None,
                 steps: int = STEPS) -> ServingPlan:
    """Plan serving on one machine.

    Args:
        hardware: the machine; one GPU of it is used.
        memory: memory options; None: memory=auto. If no set fits, the plan is that of the last one.
        steps: denoising steps of a picture.

    Raises:
        UserError: the architecture of the model is unknown.
    """
    if memory is not None:
        return _plan(model, hardware, memory, steps)
    limit = hardware.usable_vram_gib
    if hardware.gpu is None or limit is None:
        return _plan(model, hardware, InferenceMemory(), steps)
    for candidate in CANDIDATES:
        if not _is_useful(candidate, model):
            continue
        plan = _plan(model, hardware, candidate, steps)
        if plan.fits and plan.peak_gib <= MAX_CARD_SHARE * limit:
            return plan
    return plan


def plan_presets(model: ServedModel, memory: InferenceMemory | None = None, steps: int = STEPS) -> list[ServingPlan]:
    """Plan serving on each GPU of conf/hardware, in order of the price of a machine; see `plan_serving`."""
    machines = {machine.gpu: machine for machine in sorted(
        presets().values(), key=lambda machine: machine.price_usd_hour or 0, reverse=True) if machine.gpu}
    return [plan_serving(model, machine, memory, steps) for machine in reversed(machines.values())]


def format_serving(plans: Sequence[ServingPlan]) -> list[str]:
    """Return the lines of a table with one row per machine."""
    model = plans[0].model
    height, width = plans[0].footprint.size
    lines = [f"serving {width} x {height} px, {model.batch} at a time, {STEPS} steps",
             f"{'card':<6}{'GiB':>5} {'of':<6}{'host':>5} {'s/picture':>9}  memory (* changes pictures)"]
    for plan in plans:
        names = ("* " * (not plan.memory.exact) + " ".join(plan.memory.names)) if plan.fits else "DOES NOT FIT"
        seconds = "-" if plan.seconds_per_picture is None else f"{plan.seconds_per_picture:.1f}"
        lines.append(f"{plan.hardware.gpu or 'CPU':<6}{plan.peak_gib:>5.1f} {plan.hardware.usable_vram_gib or 0:<6g}"
                     f"{plan.host_gib:>5.1f} {seconds:>9}  {names or '-'}")
    return lines


def _plan(model: ServedModel, hardware: Hardware, memory: InferenceMemory, steps: int) -> ServingPlan:
    cuda = hardware.gpu is not None
    footprint = predict_serving(model, memory, (hardware.compute_capability or 0) if cuda else None)
    peak = footprint.reserved / GIB + cuda_overhead_gib(hardware.gpu) if cuda else 0.0
    # Parts are loaded one after the other; on a CPU, and with cpu_offload, all of them stay in host memory.
    in_host = footprint.largest_part if cuda else footprint.reserved
    host = PROCESS_GIB + (footprint.weight_bytes if memory.cpu_offload else in_host) / GIB
    card = find_card(hardware.gpu)
    seconds = None if card is None else _batch_seconds(footprint, card, hardware, memory, steps) / model.batch
    return ServingPlan(model, hardware, memory, peak, host, seconds, footprint)


def _batch_seconds(footprint: Footprint, card: Card, hardware: Hardware, memory: InferenceMemory, steps: int) -> float:
    """Estimate the seconds of one batch."""
    rate = flops_per_second(card, footprint.half)
    vae_rate = flops_per_second(card, footprint.vae_half, (hardware.compute_capability or 0) >= TF32_CAPABILITY)
    dequantised = footprint.quantised * DEQUANTISED[memory.base_weights] / (card.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE)
    step = max(footprint.flops["denoise"] / rate, LAUNCH_SECONDS) + dequantised
    copies = 2 * footprint.weight_bytes / HOST_LINK if memory.cpu_offload else 0.0  # to the card and back
    return footprint.flops["prompts"] / rate + steps * step + footprint.flops["decode"] / vae_rate + copies


def _is_useful(candidate: InferenceMemory, model: ServedModel) -> bool:
    """Return whether the options of a candidate can have an effect."""
    return not (candidate == InferenceMemory(vae_slicing=True) and model.batch == 1)


def _exceeds(needed: float, available: float | None) -> bool:
    return available is not None and needed > available
