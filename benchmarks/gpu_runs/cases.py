"""The configurations that gpu.py measures, and the choice of those that fit a card."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY_BASES = {"tiny_sd": "package:tiny-sd", "tiny_flow": "package:tiny-flow"}  # shipped, with trained weights
STAND_INS = {"z_image": "tiny_flow", "flux2_klein": "tiny_flow", "sd35_medium": "tiny_flow"}  # on a CPU
BF16_CAPABILITY = 8.0
LORA, HALF, NO_PRIOR = "method=lora", "precision={half}", "prior.with_prior_preservation=false"
CHECKPOINTING = "memory.gradient_checkpointing=true"
# prior.num_class_images and its batches are small: three batches give a rate.
CLASS_IMAGES = ("prior.num_class_images=12", "prior.sample_batch_size=4")


@dataclass(frozen=True)
class Case:
    """A training run that is timed. Its overrides are those of `python -m dreambooth.train`.

    Attributes:
        title: the words of its row in the table.
        base: name of the base model's architecture, see bases.py.
        steps: training steps; a median of the steps after the first three is reported.
        seconds: limit of the whole process, in seconds.
        class_images: whether the run generates class images, whose rate is reported. Otherwise it gets some files.
    """

    name: str
    title: str
    base: str
    overrides: tuple[str, ...]
    steps: int = 8
    seconds: float = 75.0
    class_images: bool = False


@dataclass(frozen=True)
class Check:
    """A comparison of trained weights: a reference run, and variants of it that should give the same weights.

    Attributes:
        variants: overrides by the words of the table. The words RESUMED stand for a run that is stopped in the middle
            and continued.
    """

    name: str
    title: str
    base: str
    overrides: tuple[str, ...]
    variants: Mapping[str, tuple[str, ...]]
    steps: int = 4
    seconds: float = 75.0


REPEATED, RESUMED = "the same run again", "stopped after half of the steps and resumed"
CASES: tuple[Case | Check, ...] = (
    Case("sd15_lora", "SD 1.5, LoRA", "sd15", (
        LORA, "precision={fp16}", *CLASS_IMAGES, "sample.every=1000", "sample.images_per_prompt=1",
        "sample.num_inference_steps=10", "sample.prompts=[a photo of a zwx toy]"), 20, class_images=True),
    Check("tiny_exact", "tiny base model, all weights", "tiny_sd", ("precision={fp16}", "train.use_ema=true"), {
        REPEATED: (), RESUMED: (), "gradient checkpointing": (CHECKPOINTING,),
        "optimizer in the backward pass": ("memory.optimizer_in_backward=true",),
        "optimizer on the host": ("memory.offload_optimizer=true",)}),
    Check("swap_exact", "tiny flow base model, LoRA", "tiny_flow", (LORA, HALF, CHECKPOINTING), {
        REPEATED: (), "two swapped blocks": ("memory.swap_blocks=2",)}),
    Case("sd15_8bit", "SD 1.5, UNet, 8-bit AdamW, checkpointing", "sd15", (
        "precision={fp16}", "optimizer=adamw8bit", CHECKPOINTING), 12),
    Case("z_image_nf4", "Z-Image, LoRA, nf4, checkpointing", "z_image", (
        LORA, HALF, "method.base_weights=nf4", CHECKPOINTING, NO_PRIOR), seconds=90),
    Case("sdxl_lora", "SDXL, LoRA, checkpointing", "sdxl", (LORA, HALF, CHECKPOINTING, NO_PRIOR), 10),
    Case("sd15_lowest", "SD 1.5, UNet and text encoder, EMA, memory=lowest", "sd15", (
        "memory=lowest", "precision={fp16}", "train.train_text_encoder=true", "train.use_ema=true")),
    Case("sd15_offload", "SD 1.5, UNet, optimizer on the host", "sd15", (
        "precision={fp16}", CHECKPOINTING, "memory.offload_optimizer=true")),
    Case("z_image_lora", "Z-Image, LoRA, checkpointing", "z_image", (LORA, HALF, CHECKPOINTING, NO_PRIOR), seconds=90),
    Case("z_image_swap", "Z-Image, LoRA, 16 swapped blocks", "z_image", (
        LORA, HALF, CHECKPOINTING, NO_PRIOR, "memory.swap_blocks={swapped}"), seconds=90),
    Case("flux2_klein_lora", "FLUX.2 klein, LoRA, checkpointing", "flux2_klein", (
        LORA, HALF, CHECKPOINTING, NO_PRIOR), seconds=90),
    Case("sd35_lora", "SD 3.5 medium, LoRA, checkpointing", "sd35_medium", (LORA, HALF, CHECKPOINTING, NO_PRIOR),
         seconds=90),
    Case("sdxl_full", "SDXL, UNet, half weights, Adafactor in the backward pass", "sdxl", (
        "memory=lowest", "memory.weights=half", "memory.rounding=stochastic", "optimizer=adafactor",
        "train.max_grad_norm=null", HALF, NO_PRIOR), seconds=90),
    Check("sd15_exact", "SD 1.5, LoRA, 512 px", "sd15", (LORA, "precision={fp16}"), {
        REPEATED: (), RESUMED: (), "gradient checkpointing": (CHECKPOINTING,)}),
    Case("sd15_xformers", "SD 1.5, LoRA, xformers", "sd15", (LORA, "precision={fp16}", "attention=xformers"), 20),
    Case("sd15_compiled", "SD 1.5, LoRA, compiled", "sd15", (LORA, "precision={fp16}", "train.compile=true"), 20,
         seconds=150),
)


def overrides(case: Case | Check, card: Mapping[str, Any], work: Path) -> list[str]:
    """Return all overrides of a run, without its number of steps.

    Args:
        card: the description of the device that worker.py gives.
        work: folder with the photos and the base models. On a CPU, tiny models replace the large ones.
    """
    cuda = card["device"] == "cuda"
    base = base_name(case, cuda)
    half = "bf16" if (card.get("capability") or 0) >= BF16_CAPABILITY else "fp16"
    words = {"half": half if cuda else "fp32", "fp16": "fp16" if cuda else "fp32", "swapped": "16" if cuda else "2"}
    own = [word.format(**words) for word in case.overrides]
    classes = [] if getattr(case, "class_images", False) else [f"dataset.class_dir={work / 'class'}",
                                                               "prior.num_class_images=4"]
    model = {"tiny_sd": "tiny"}.get(base, base)
    source = TINY_BASES[base] if isinstance(case, Check) and base in TINY_BASES else work / "base" / base
    groups = [word for word in own if "." not in word.partition("=")[0]]
    return [
        f"hardware={'local' if cuda else 'cpu'}", f"model={model}", "memory=fast", *groups, "tracking=none",
        f"model.source={source}", "model.offline=true", f"dataset.instance_dir={work / 'photos'}",
        "dataset.instance_prompt=a photo of a zwx toy", "dataset.class_prompt=a photo of a toy",
        "dataset.allow_drawings=true", *classes, "train.train_batch_size=1", "train.use_ema=false", "sample.every=null",
        "checkpoint.every=null", "evaluate.encoder=none", *(word for word in own if word not in groups)]


def base_name(case: Case | Check, cuda: bool) -> str:
    """Return the base model of a case on this device."""
    return case.base if cuda or case.base in TINY_BASES else STAND_INS.get(case.base, "tiny_sd")


def reason_not_to_run(plan: Mapping[str, Any]) -> str | None:
    """Return why a case is not run, in the words of the table; None: it is run.

    Args:
        plan: what worker.py found out about the case: the figures of `python -m dreambooth.plan`, or an "error".
    """
    if "error" in plan:
        return f"refused: {plan['error']}" if plan.get("expected") else f"no plan: {plan['error']}"
    if plan["fits"]:
        return None
    limit = plan.get("usable_vram_gib")
    if limit is not None and plan["card_gib"] > limit:
        return f"does not fit (predicted): {plan['card_gib']:.1f} of {limit:.1f} GiB"
    return f"does not fit (predicted): {plan['shortfall']}"
