"""Plans inference: the GPU memory and the seconds per picture that a model needs, and memory_options=auto.

`plan_serving` plans one machine, and chooses memory options if the user chose none. `plan_presets` plans every GPU of
conf/hardware. Memory is predicted (serving_rehearsal.py). The time is an estimate:

    seconds per batch = operations / (peak rate x EFFICIENCY), but at least the launches of all kernels of a step
                        + dequantised weights / memory bandwidth, in each denoising step
                        + copies of cpu_offload / speed of the link to the host

memory_options=auto takes the first set of CANDIDATES that fits: first the sets that change no picture, each group
ordered by its time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreambooth.config.enums import BaseWeights, Device
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
    WEIGHT_BYTES,
    flops_per_second,
)
from dreambooth.serialization.export_layout import locate_adapter
from dreambooth.utils.hardware import GIB, detect_machine
from dreambooth.utils.plurals import counted

STEPS = 25  # denoising steps of a picture, the default of generate and of serve
LAUNCH_SECONDS = 44e-6  # between two kernels that are shorter; fitted to one speed: SD 1.5 on an A100, batch 1
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
    memory: InferenceMemory
    is_auto: bool  # whether memory_options=auto chose the memory options
    peak_gib: float  # of the card: PyTorch's reserved memory and the overhead of the process; 0 on a CPU
    host_gib: float  # of host memory, through which all weights are loaded
    seconds_per_picture: float | None  # None: the speed of the card is unknown
    footprint: Footprint

    @property
    def explanation(self) -> str:
        """What the server needs, and the memory options of the plan."""
        names = f" with {' and '.join(self.memory.names)}" if self.memory.names else ""
        changes = "" if self.memory.exact else ", which changes pictures"
        of = "" if self.hardware.usable_vram_gib is None else f" of {self.hardware.usable_vram_gib:.1f}"
        pictures = counted(self.model.batch, "picture")
        return f"about {self.peak_gib:.1f}{of} GiB of the GPU for {pictures}{names}{changes}"

    @property
    def fits(self) -> bool:
        """Whether the card and the host memory suffice, as far as their sizes are known."""
        return not self.shortfall

    @property
    def shortfall(self) -> str:
        """One sentence that says what is too small and what the user can type; empty if serving fits."""
        hardware, batch = self.hardware, self.model.batch
        if _exceeds(self.peak_gib, hardware.usable_vram_gib):
            less = [f"max_batch=1 instead of {batch}"] * (batch > 1)
            less += ["memory_options=auto"] * (not self.is_auto)
            advice = f"type {', '.join(less)}, or take a larger card" if less else "take a larger card"
            return (f"serving {counted(batch, 'picture')} at a time needs {self.peak_gib:.1f} GiB, and "
                    f"{hardware.gpu or 'the card'} has {hardware.usable_vram_gib:.4g}: {advice}")
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
        memory: memory options; None: memory_options=auto. If no set fits, the plan is that of the smallest that was
            predicted. Sets whose weights alone do not fit are not predicted.
        steps: denoising steps of a picture.

    Raises:
        UserError: the architecture of the model is unknown.
    """
    if memory is not None:
        return replace(_plan(model, hardware, memory, steps), is_auto=False)
    limit = hardware.usable_vram_gib
    if hardware.gpu is None or limit is None:
        return _plan(model, hardware, InferenceMemory(), steps)
    allowed, smallest = MAX_CARD_SHARE * limit, _plan(model, hardware, CANDIDATES[0], steps)
    plain = smallest.footprint
    for candidate in CANDIDATES:
        if candidate == InferenceMemory(vae_slicing=True) and model.batch == 1:
            continue
        bound = _minimum_gib(plain, candidate) + cuda_overhead_gib(hardware.gpu)
        if bound > allowed or _exceeds(_host_gib(plain, candidate), hardware.host_ram_gib):
            continue
        plan = _plan(model, hardware, candidate, steps)
        if plan.fits and plan.peak_gib <= allowed:
            return plan
        smallest = min(smallest, plan, key=lambda plan: plan.peak_gib)
    return smallest


def plan_this_machine(source: Source, batch: int, adapters: Sequence[Path], max_adapters: int,
                      servers: int = 1) -> ServingPlan:
    """Plan serving on this machine's first CUDA GPU with memory_options=auto.

    Pictures have the model's own resolution. An architecture that is unknown is not possible here, because the model is
    on this machine.

    Args:
        source: the model and, if there is one, its own adapter.
        batch: pictures at a time.
        adapters: run folders, other folders or files of the adapters that requests may name.
        max_adapters: number of them that are on the card at a time.
        servers: processes that share the GPU in equal parts, each with the model.
    """
    machine = detect_machine()
    files = map(locate_adapter, adapters)
    largest = sorted((file for file in files if file is not None), key=lambda file: -file.stat().st_size)
    share = None if machine.vram_gib is None else machine.vram_gib / servers
    hardware = Hardware(name="local", device=Device.cuda, gpu=machine.gpu, usable_vram_gib=share,
                        compute_capability=machine.compute_capability)
    return plan_serving(model_of_source(source, batch, adapters=largest[:max_adapters]), hardware)


def plan_presets(model: ServedModel, memory: InferenceMemory | None = None, steps: int = STEPS) -> list[ServingPlan]:
    """Plan serving on each GPU of conf/hardware, in order of the price of a machine; see `plan_serving`."""
    by_price = sorted(presets().values(), key=lambda machine: machine.price_usd_hour or 0, reverse=True)
    machines = {machine.gpu: machine for machine in by_price if machine.gpu}  # the cheapest machine of each GPU
    return [plan_serving(model, machine, memory, steps) for machine in sorted(
        machines.values(), key=lambda machine: (machine.usable_vram_gib or 0, machine.price_usd_hour or 0))]


def format_serving(plans: Sequence[ServingPlan]) -> list[str]:
    """Return the lines of a table with one row per machine."""
    model, (height, width) = plans[0].model, plans[0].footprint.size
    lines = [f"serving: {width} x {height} px, {model.batch} at a time, {STEPS} steps; * changes pictures",
             f"{'':<9}{'GiB':>5}{'of':>6}{'host':>6}{'of':>6} {'s/picture':>9}   memory"]
    for plan in plans:
        hardware = plan.hardware
        names = f"{' ' if plan.memory.exact else '*'} {' '.join(plan.memory.names) or '-'}"
        lines.append(
            f"{hardware.gpu or 'CPU':<9}{plan.peak_gib:>5.1f}{_format(hardware.usable_vram_gib, 'g'):>6}"
            f"{plan.host_gib:>6.1f}{_format(hardware.host_ram_gib, 'g'):>6} "
            f"{_format(plan.seconds_per_picture if plan.fits else None, '.1f'):>9} "
            f"{names if plan.fits else '  DOES NOT FIT'}")
    return lines


def serving_as_dicts(plans: Sequence[ServingPlan]) -> list[dict[str, Any]]:
    """Return the figures of plans as JSON values, in GiB and seconds."""
    return [{"hardware": plan.hardware.name, "gpu": plan.hardware.gpu, "fits": plan.fits,
             "peak_gib": round(plan.peak_gib, 3), "usable_vram_gib": plan.hardware.usable_vram_gib,
             "host_gib": round(plan.host_gib, 3), "batch": plan.model.batch, "size": list(plan.footprint.size),
             "seconds_per_picture": plan.seconds_per_picture and round(plan.seconds_per_picture, 3),
             "memory": plan.memory.names, "changes_pictures": not plan.memory.exact} for plan in plans]


def _plan(model: ServedModel, hardware: Hardware, memory: InferenceMemory, steps: int) -> ServingPlan:
    cuda = hardware.gpu is not None
    footprint = predict_serving(model, memory, (hardware.compute_capability or 0) if cuda else None)
    peak = footprint.reserved / GIB + cuda_overhead_gib(hardware.gpu) if cuda else 0.0
    host = _host_gib(footprint, memory) if cuda else PROCESS_GIB + footprint.reserved / GIB
    card = find_card(hardware.gpu)
    seconds = None if card is None else _batch_seconds(footprint, card, hardware, memory, steps) / model.batch
    return ServingPlan(model, hardware, memory, True, peak, host, seconds, footprint)


def _batch_seconds(footprint: Footprint, card: Card, hardware: Hardware, memory: InferenceMemory, steps: int) -> float:
    """Estimate the seconds of one batch."""
    rate = flops_per_second(card, footprint.half)
    vae_rate = flops_per_second(card, footprint.vae_half, (hardware.compute_capability or 0) >= TF32_CAPABILITY)
    dequantised = footprint.quantised * DEQUANTISED[memory.base_weights] / (card.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE)
    step = max(footprint.flops["denoise"] / rate, footprint.kernels * LAUNCH_SECONDS) + dequantised
    copies = 2 * footprint.weight_bytes / HOST_LINK if memory.cpu_offload else 0.0  # to the card and back
    return footprint.flops["prompts"] / rate + steps * step + footprint.flops["decode"] / vae_rate + copies


def _minimum_gib(plain: Footprint, memory: InferenceMemory) -> float:
    """Return a lower bound of the GiB that a set of memory options needs on the card, without a rehearsal.

    Args:
        plain: the footprint without options.
    """
    if memory.base_weights is BaseWeights.half and not memory.cpu_offload:  # the VAE's options change only `decode`
        return max(usage.reserved for phase, usage in plain.by_phase.items() if phase != "decode") / GIB
    share = 1.0
    if memory.base_weights is not BaseWeights.half:
        share = WEIGHT_BYTES[memory.base_weights] / (2 if plain.half else 4)
    sizes = [plain.part_bytes[0] * share, *plain.part_bytes[1:]]
    return (max(sizes) if memory.cpu_offload else sum(sizes)) / GIB


def _host_gib(footprint: Footprint, memory: InferenceMemory) -> float:
    """Return the GiB of host memory that loading needs: one part after the other, or with cpu_offload all of them."""
    return PROCESS_GIB + (footprint.weight_bytes if memory.cpu_offload else max(footprint.part_bytes)) / GIB


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _exceeds(needed: float, available: float | None) -> bool:
    return available is not None and needed > available
