"""Compares the planner's predictions with published memory figures: python benchmarks/planner.py [--write]

Every row is predicted by the same code with the same constants; no setting is specific to a row. The only fitted number
is the memory of a T4 that a process uses in addition to PyTorch's. For each row of the T4 table, this number is fitted
again on the other eight rows. The tables also show how long each prediction takes. `--write` writes them to
docs/planner.md.
"""

import sys
import time
from pathlib import Path
from statistics import mean, stdev

import planner_flow

from dreambooth.config.enums import Device, Dtype, EmaDevice, EncoderKind, OptimizerKind, Rounding, Weights
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.config.schema import Config
from dreambooth.models.loading import import_libraries
from dreambooth.planner.gpu_specs import CARDS
from dreambooth.planner.prediction import STEP_PHASES
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.time_and_cost import step_seconds
from dreambooth.utils.hardware import GIB

DOCS = Path(__file__).parents[1] / "docs" / "planner.md"
BEGIN, END = "<!-- benchmarks/planner.py -->\n", "<!-- end -->\n"
ADAMW8BIT, ADAMW = OptimizerKind.adamw8bit, OptimizerKind.adamw
PUBLISHED_T4 = [  # decimal GB, steps per second, batch size, accumulation, checkpointing, precision, optimizer
    (9.92, 0.93, 1, 1, True, Dtype.fp16, ADAMW8BIT), (10.08, 0.42, 1, 1, True, Dtype.fp32, ADAMW8BIT),
    (10.4, 0.66, 2, 1, True, Dtype.fp16, ADAMW8BIT), (11.17, 1.14, 1, 1, False, Dtype.fp16, ADAMW8BIT),
    (11.17, None, 1, 1, False, Dtype.fp32, ADAMW8BIT), (11.56, None, 1, 2, True, Dtype.fp16, ADAMW8BIT),
    (13.67, 0.82, 2, 1, False, Dtype.fp16, ADAMW8BIT), (13.7, None, 1, 2, False, Dtype.fp16, ADAMW8BIT),
    (15.79, 0.77, 1, 1, True, Dtype.fp16, ADAMW)]
LOWEST_MEMORY = {"memory__gradient_checkpointing": True, "memory__optimizer_in_backward": True,
          "memory__autocast_cache": False, "memory__ema_device": EmaDevice.cpu, "memory__expandable_segments": True}
BUDGETS = [  # GiB, name, settings; UNet and text encoder are trained, with EMA of both and prior preservation
    (13.9, "fp32 AdamW, memory=lowest", {}),
    (11.1, "AdamW8bit, lowest with EMA on the card", {
        "optimizer__kind": ADAMW8BIT, "memory__ema_device": EmaDevice.same}),
    (7.4, "AdamW8bit, memory=lowest", {"optimizer__kind": ADAMW8BIT}),
    (4.9, "AdamW8bit, lowest, split prior, half weights", {
        "optimizer__kind": ADAMW8BIT, "memory__weights": Weights.half, "memory__rounding": Rounding.stochastic,
        "memory__split_prior": True})]

SDXL = {"model__name": "sdxl", "model__source": "stabilityai/stable-diffusion-xl-base-1.0", "model__resolution": 1024,
        "hardware__gpu": None, "hardware__compute_capability": 8.9, "prior__with_prior_preservation": False,
        "memory__gradient_checkpointing": True, "memory__optimizer_in_backward": True, "memory__autocast_cache": False,
        "train__max_grad_norm": None, "optimizer__kind": OptimizerKind.adafactor}
PUBLISHED_SDXL = [  # decimal GB, name, settings; UNet, batch 1, 1024 px, latents and text cached;
    # from kohya-ss/sd-scripts, pull request 1259 and README
    (10.0, "bf16 weights (--full_bf16)", {"precision__dtype": Dtype.bf16, "memory__weights": Weights.half,
                                          "memory__rounding": Rounding.stochastic}),
    (17.0, "fp32", {"precision__dtype": Dtype.fp32})]


def make_recipe(**overrides: object) -> Recipe:
    """Build a recipe: SD 1.5 at 512 px on a T4, with existing class images, cached latents and text, and no sampling.

    Args:
        overrides: changes to the configuration, as `section__key=value`.
    """
    config = Config()
    config.model.name, config.model.resolution, config.model.source = "sd15", 512, "runwayml/stable-diffusion-v1-5"
    config.hardware.device, config.hardware.gpu, config.hardware.compute_capability = Device.cuda, "T4", 7.5
    config.dataset.instance_dir, config.dataset.instance_prompt = "photos", "a photo of a zwx dog"
    config.dataset.class_dir, config.dataset.class_prompt = "dogs", "a photo of a dog"
    config.prior.num_class_images, config.sample.every = 0, None
    config.precision.dtype, config.train.use_ema = Dtype.fp16, False
    config.evaluate.encoder = EncoderKind.none
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
    return resolve(config, Path("runs/plan"))


def predict_step(recipe: Recipe) -> tuple[float, float, float]:
    """Return the predicted reserved GiB of a step, its estimated seconds, and the CPU seconds of the prediction."""
    start = time.process_time()
    prediction = predict(recipe)
    usage = prediction.peak_over(*STEP_PHASES)
    return usage.reserved / GIB, step_seconds(recipe, prediction, CARDS["T4"]), time.process_time() - start


def published_tables() -> list[str]:
    """Return tables that compare published with predicted figures for SD 1.5."""
    rows, speeds = [], ["| T4, published | s per step | estimated | error |", "|---|---|---|---|"]
    for gigabytes, rate, batch, accumulation, checkpointing, dtype, kind in PUBLISHED_T4:
        value, step, seconds = predict_step(make_recipe(
            train__train_batch_size=batch, train__gradient_accumulation_steps=accumulation, optimizer__kind=kind,
            memory__gradient_checkpointing=checkpointing, precision__dtype=dtype))
        name = (f"{dtype.value}, batch {batch}, accumulation {accumulation}, "
                f"{'checkpointing, ' if checkpointing else ''}{kind.value}")
        rows.append((name, gigabytes * 1e9 / GIB, value, seconds))
        if rate is not None:
            speeds.append(f"| {name} | {1 / rate:.2f} | {step:.2f} | {step * rate - 1:+.0%} |")
        print(*rows[-1], flush=True)
    offsets = [published - value for _, published, value, _ in rows]
    lines = ["| T4, published | GiB | reserved | constant from the other 8 | predicted | error | CPU s |",
             "|---|---|---|---|---|---|---|"]
    for number, (name, published, value, seconds) in enumerate(rows):
        constant = mean(offsets[:number] + offsets[number + 1:])
        lines.append(f"| {name} | {published:.2f} | {value:.2f} | {constant:.2f} | {value + constant:.2f} | "
                     f"{(value + constant) / published - 1:+.1%} | {seconds:.1f} |")
    lines += ["", f"Mean of published minus reserved: {mean(offsets):.2f} GiB, standard deviation "
              f"{stdev(offsets):.2f}; the constant in use is {CARDS['T4'].cuda_overhead_gib}.", "",
              "| other cards, published | GiB | reserved | predicted | error |", "|---|---|---|---|---|"]
    text = {"train__train_text_encoder": True, "memory__gradient_checkpointing": True, "optimizer__kind": ADAMW8BIT,
            "prior__with_prior_preservation": False, "memory__cache_latents": False}
    for name, published, changed in (
            ("no checkpointing, fp32 AdamW; card not stated", 17.7e9 / GIB, {"optimizer__kind": ADAMW}),
            ("RTX 3060, text encoder too, no prior", 11124 / 1024, text),
            ("the same, batch 5", 11694 / 1024, text | {"train__train_batch_size": 5}),
            ("the same, 1024 px", 11598 / 1024, text | {"model__resolution": 1024})):
        value, *_ = predict_step(make_recipe(**changed))
        needed = value + CARDS["T4"].cuda_overhead_gib
        lines.append(f"| {name} | {published:.2f} | {value:.2f} | {needed:.2f} | {needed / published - 1:+.1%} |")
        print(lines[-1], flush=True)
    return [*lines, "", *speeds]


def sdxl_table() -> list[str]:
    """Return the table for training the whole UNet of SDXL.

    The overhead of the card and driver is unknown; the T4's constant is used instead.
    """
    lines = ["| SDXL's whole UNet, fused Adafactor, published | GiB | reserved | predicted | error | CPU s |",
             "|---|---|---|---|---|---|"]
    for gigabytes, name, changed in PUBLISHED_SDXL:
        value, _, seconds = predict_step(make_recipe(**(SDXL | changed)))
        published, needed = gigabytes * 1e9 / GIB, value + CARDS["T4"].cuda_overhead_gib
        error = f"{needed / published - 1:+.1%}"
        lines.append(f"| {name} | {published:.2f} | {value:.2f} | {needed:.2f} | {error} | {seconds:.1f} |")
        print(lines[-1], flush=True)
    return lines


def budget_table() -> list[str]:
    """Return a table that compares the memory of runs that train all weights with the targets of this project."""
    lines = ["| all weights trained, SD 1.5, fp16, T4 | target, GiB | with clipping | without clipping | CPU s |",
             "|---|---|---|---|---|"]
    for aim, name, changed in BUDGETS:
        predictions = [predict_step(make_recipe(**(LOWEST_MEMORY | changed | {
            "train__train_text_encoder": True, "train__use_ema": True, "train__max_grad_norm": limit})))
            for limit in (1.0, None)]
        cells = " | ".join(f"{value + CARDS['T4'].cuda_overhead_gib:.2f}" for value, *_ in predictions)
        lines.append(f"| {name} | {aim} | {cells} | {max(seconds for *_, seconds in predictions):.1f} |")
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    import_libraries()
    result = "\n".join([*budget_table(), "", *published_tables(), "", *sdxl_table(), "",
                        *planner_flow.flow_table(make_recipe)]) + "\n"
    print(result)
    if "--write" in sys.argv:
        before, rest = DOCS.read_text("utf-8").split(BEGIN)
        DOCS.write_text(before + BEGIN + result + END + rest.split(END)[1], "utf-8")
