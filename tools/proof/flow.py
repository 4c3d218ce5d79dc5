"""`python -m tools.proof.flow`: measures whether DreamBooth training works on the tiny flow base.

It trains the demo subject with all weights, with masks of the subject, and with LoRA, and writes a section of
docs/proof.md. The text encoder is frozen, as in the training of large models of this kind. Runs and samples in the
folder are reused.
"""

# ruff: noqa: E501  long lines of the page template

import argparse
import statistics
import time
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from dreambooth.models.pipeline import Sampler
from tools.proof.docs_section import write_section
from tools.proof.experiment import DEMO, FIRST_SEED, ROOT, SCENES, VIEWS, Experiment, Measurement, Variant, drift, gap
from tools.proof.report import TABLE_HEAD, format_row

BASE = ROOT / "dreambooth/assets/tiny-flow"
SAMPLER = Sampler(num_inference_steps=20, guidance_scale=3.0, resolution=64)
RECIPE = ("model=tiny_flow", "precision=bf16", "evaluate.encoder=none")  # otherwise the defaults of the base model
FULL, LORA = ("train.max_train_steps=1200", "train.lr_scheduler=cosine"), ("method=lora", "method.merge=true")
NO_PRIOR = ("prior.with_prior_preservation=false",)
WITHOUT = {name: f"{name}, without prior preservation" for name in ("all weights", "LoRA")}
MARKS = "<!-- tools.proof.flow -->", "<!-- end flow -->"
SHEET, SCENE_SHEET = ROOT / "docs/images/proof-flow.png", ROOT / "docs/images/proof-flow-scenes.png"
FRAME = 3  # pixels around each picture of SCENE_SHEET
SECTION = """
## Flow matching

Written by `python -m tools.proof.flow` on {date}. The base model is the shipped flow base, `model=tiny_flow`; its text encoder is
frozen. The settings are {recipe}, for all
weights also {full} and masks of the subject, and otherwise the defaults of the base
model with `method=full` and `method=lora`. {tuning}
Samples: {steps} Euler steps, guidance {guidance} of this family's pipeline. Prompts, sampling seeds and
measures are those of the sections above.

| | plain prompt | scenes | scenes kept | class prompt |
|---|---|---|---|---|
| base model before training | {base.plain:.3f} | {base.scenes:.3f} | {base.scenes_kept:.0%} | {base.class_similarity:.3f} |
| reference | {reference:.3f} | {reference:.3f} | - | - |

{head}
{rows}

The table has the mean of the three seeds, and the lowest and the highest value. Class drift is compared with that of the run without
prior preservation.

| target | mean | met | each seed | met |
|---|---|---|---|---|
{targets}

![samples](images/{sheet})

*Rows: the base model before training; three seeds with all weights; three seeds with LoRA; without prior preservation, all weights and
LoRA. Columns: the plain prompt (4 pictures), on the beach, in the snow, on the grass, at night, and the class prompt (4).*

![scenes](images/{scene_sheet})

*All pictures in scenes. From left to right: all weights with seeds 11 and 12, LoRA with seeds 11 and 12. A red frame marks a picture that has lost its scene.*

### Other recipes

These recipes were tried on the demo subject, with other training seeds and other sampling seeds (5000 and up) than above. A recipe
has 600 steps, a constant learning rate (5e-4; LoRA: 2.5e-3) and no masks, except for what its row says. Measured on 8 pictures of the
plain prompt and 24 in scenes:

| recipe | training seed | guidance | plain, gap closed | scenes kept | gap closed in these |
|---|---|---|---|---|---|
{tried}

Most of these settings exchange one for the other: the subject is learned well and scenes are lost, or scenes are kept and the subject
fades in them. For all weights, masks and a learning rate that falls in more steps give both. A lower guidance shows more of the subject
and loses more scenes.

With all weights, the defaults of the base model and no masks, seeds 11, 12 and 13 closed 84 %, 88 % and 84 % of the gap with the plain
prompt, kept 100 %, 50 % and 100 % of the scenes, and closed 28 %, 40 % and 29 % of the gap in these.
"""
TRIED = (  # recipe, training seed, guidance, share of the gap (plain), scenes kept, share of the gap in kept scenes
    ("all weights, flow.logit_mean=-1", 1, 3, 0.77, 0.92, 0.335),
    ("LoRA, flow.logit_mean=-1", 1, 3, 0.76, 0.75, 0.234),
    ("all weights, masks of the subject", 1, 3, 0.82, 1.00, 0.375),
    ("LoRA, masks of the subject", 2, 3, 0.77, 0.92, 0.326),
    ("LoRA, masks with 25 % grey instead of black", 2, 3, 0.83, 0.62, 0.342),
    ("LoRA, captions of the photos that all end with \"on a white background\"", 2, 3, 0.81, 0.75, 0.39),
    ("LoRA, captions with the true background: white, pale blue or beige", 2, 3, 0.84, 0.75, 0.16),
    ("LoRA, 16 of 112 class images in the four scenes, with captions", 2, 3, 0.79, 1.00, 0.16),
    ("the same, and captions that end with \"on a white background\"", 2, 3, 0.83, 1.00, 0.205),
    ("LoRA, 64 of 160 class images in scenes, and captions with the true background", 2, 3, 0.83, 1.00, 0.10),
    ("all weights, masks, 900 steps", 1, 3, 0.83, 0.46, 0.44),
    ("all weights, masks, 900 steps", 2, 3, 0.87, 0.50, 0.43),
    ("all weights, masks, cosine schedule, 900 steps", 1, 3, 0.86, 1.00, 0.35),
    ("all weights, masks, cosine schedule, 900 steps", 2, 3, 0.81, 1.00, 0.26),
    ("LoRA, masks, cosine schedule, 900 steps", 1, 3, 0.83, 0.25, 0.18),
    ("LoRA, masks, cosine schedule, 900 steps", 2, 3, 0.76, 0.92, 0.32),
    ("LoRA, cosine schedule, 900 steps", 1, 3, 0.73, 1.00, 0.375),
    ("LoRA, cosine schedule, 900 steps", 2, 3, 0.79, 0.75, 0.301),
    ("all weights, masks, cosine schedule, 1,200 steps (chosen)", 1, 3, 0.84, 1.00, 0.36),
    ("all weights, masks, cosine schedule, 1,200 steps (chosen)", 2, 3, 0.85, 1.00, 0.31),
    ("all weights, masks, cosine schedule, 1,200 steps", 1, 1.5, 0.90, 1.00, 0.377),
    ("all weights, masks, cosine schedule, 1,200 steps", 2, 1.5, 0.90, 1.00, 0.361),
    ("all weights at 3.5e-4, masks, cosine schedule, 1,200 steps", 2, 3, 0.79, 1.00, 0.202),
    ("LoRA at 2e-3, masks, cosine schedule, 1,200 steps", 1, 3, 0.81, 0.71, 0.362),
    ("LoRA at 2e-3, masks, cosine schedule, 1,200 steps", 2, 3, 0.75, 0.92, 0.336),
    ("LoRA at 2e-3, masks, cosine schedule, 1,200 steps", 1, 2, 0.86, 0.58, 0.361),
    ("LoRA at 2e-3, masks, cosine schedule, 1,200 steps", 2, 2, 0.78, 0.79, 0.357),
    ("LoRA at 1.5e-3, masks, cosine schedule, 1,200 steps", 1, 3, 0.77, 1.00, 0.36),
    ("LoRA at 1.5e-3, masks, cosine schedule, 1,200 steps", 2, 3, 0.70, 1.00, 0.322),
    ("LoRA at 1.5e-3, masks, cosine schedule, 1,200 steps", 1, 5, 0.69, 1.00, 0.338),
    ("LoRA at 1.5e-3, masks, cosine schedule, 1,200 steps", 1, 2, 0.80, 1.00, 0.369),
    ("LoRA at 1.5e-3, masks, cosine schedule, 1,200 steps", 2, 2, 0.74, 1.00, 0.332),
    ("LoRA at 1.5e-3, masks, cosine schedule, 1,200 steps", 1, 1.5, 0.82, 1.00, 0.373),
    ("LoRA at 1.5e-3, masks, cosine schedule, 1,200 steps", 2, 1.5, 0.78, 1.00, 0.344),
    ("the same, and prior.prior_loss_weight=1", 1, 3, 0.75, 1.00, 0.324),
    ("the same, and method.rank=64", 2, 3, 0.80, 0.54, 0.389),
    ("the same with 1,800 steps", 2, 3, 0.74, 0.83, 0.319),
)
TUNING = """The
number of steps and the schedule for all weights were chosen on the demo subject with the runs below, and thus without the seeds 11, 12
and 13. The guidance is the default of the base model. LoRA has the defaults of the base model; their rate was lowered from 3e-3 after a
measurement with these three seeds, which are therefore not new for LoRA. With the three seeds, two other settings were measured. LoRA with masks, a
cosine schedule, 1,200 steps and a rate of 1.5e-3, at guidance 1.5, kept all scenes and closed 18 %, 28 % and 29 % of the gap in them.
All weights as in the table, at guidance 1.5, kept 100 %, 79 % and 96 % of the scenes and closed 31 %, 35 % and 33 % of the gap in these,
and 92 %, 89 % and 94 % with the plain prompt. A mask is all of a photo but its background, which is connected to the corners by its
colour, less 2 pixels. The mean logit of the noise level was chosen on the tuning subject. The runs shared two cores with many other
programs, so their times say nothing about a free machine."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.flow", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof-flow")
    folder = parser.parse_args().folder.resolve()
    draw_masks(DEMO, folder / "masks")
    experiment = Experiment(folder, FIRST_SEED, BASE, SAMPLER, RECIPE)
    full = (*FULL, f"dataset.mask={folder / 'masks'}")
    variants = (Variant("all weights", full), Variant("LoRA", LORA),
                Variant(WITHOUT["all weights"], (*full, *NO_PRIOR), seeds=(11,)),
                Variant(WITHOUT["LoRA"], (*LORA, *NO_PRIOR), seeds=(11,)))
    base, reference = experiment.measure("base", BASE, DEMO), experiment.reference(DEMO, VIEWS / "demo-held-out")
    runs = {variant.name: [experiment.run_variant(variant, seed) for seed in variant.seeds] for variant in variants}
    experiment.draw_sheet([base, *(run for some in runs.values() for run in some)], SHEET)
    draw_scenes(experiment, [run for name in WITHOUT for run in runs[name][:2]], SCENE_SHEET)
    write(base, reference, runs)
    print("wrote docs/proof.md")


def draw_masks(photos: Path, folder: Path) -> None:
    """Write the masks of photos: all but the background, which is connected to the corners by its colour, less 2 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(photos.glob("*.png")):
        photo = Image.open(path).convert("RGB")
        filled, right, bottom = photo.copy(), photo.width - 1, photo.height - 1
        for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom)):
            ImageDraw.floodfill(filled, corner, (255, 0, 255), thresh=24)
        key = Image.new("RGB", photo.size, (255, 0, 255))
        different = ImageChops.difference(filled, key).convert("L").point(lambda value: 255 * (value > 0))
        different.filter(ImageFilter.MaxFilter(5)).save(folder / path.name)


def draw_scenes(experiment: Experiment, measurements: list[Measurement], path: Path) -> None:
    """Write a picture with all pictures in scenes: one row per scene, the models side by side."""
    cell, columns = SAMPLER.resolution + 2 * FRAME, max(SCENES.values())
    stride = columns * cell + cell // 2
    sheet = Image.new("RGB", (len(measurements) * stride - cell // 2, len(SCENES) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for number, measurement in enumerate(measurements):
        for row, prompt in enumerate(SCENES):
            for column, picture in enumerate(measurement.pictures[prompt]):
                left, top = number * stride + column * cell, row * cell
                if experiment.borders.scene_of(picture) != experiment.borders.named_in(prompt):
                    pen.rectangle((left, top, left + cell - 1, top + cell - 1), fill="red")
                sheet.paste(picture, (left + FRAME, top + FRAME))
    sheet.save(path)


def write(base: Measurement, reference: float, runs: dict[str, list[Measurement]]) -> None:
    """Write the section of docs/proof.md.

    Args:
        reference: similarity of the held-out views.
        runs: variant -> its measurements.
    """
    text = SECTION.format(
        date=time.strftime("%Y-%m-%d"), recipe=" ".join(RECIPE), full=" ".join(FULL), tuning=TUNING,
        steps=SAMPLER.num_inference_steps, guidance=SAMPLER.guidance_scale, base=base, reference=reference, head=TABLE_HEAD,
        rows="\n".join(format_row(name, run, base, reference) for name, some in runs.items() for run in some),
        targets="\n".join(row for name in WITHOUT for row in target_rows(name, base, reference, runs)),
        tried="\n".join(f"| {recipe} | {seed} | {guidance:g} | {plain:.0%} | {kept:.0%} | {in_kept:.0%} |"
                        for recipe, seed, guidance, plain, kept, in_kept in TRIED),
        sheet=SHEET.name, scene_sheet=SCENE_SHEET.name)
    write_section(ROOT / "docs/proof.md", *MARKS, text)


def target_rows(name: str, base: Measurement, reference: float, runs: dict[str, list[Measurement]]) -> list[str]:
    """Return the rows of one method for the table of targets."""
    without = statistics.mean(drift(run, base) for run in runs[WITHOUT[name]])
    rows = []
    for target, minimum, maximum, values in (
            ("at least 75 % of the gap, plain prompt", 0.75, None,
             [gap(run.plain, base.plain, reference) for run in runs[name]]),
            ("at least 90 % of the scenes kept", 0.9, None, [run.scenes_kept for run in runs[name]]),
            ("at least 30 % of the gap in kept scenes", 0.3, None,
             [gap(run.kept_scenes, base.scenes, reference) for run in runs[name]]),
            ("class drift at most 15 % of that without prior preservation", None, 0.15,
             [drift(run, base) / without for run in runs[name]])):
        mean = statistics.mean(values)
        met = ["yes" if all((minimum is None or value >= minimum) and (maximum is None or value <= maximum)
                            for value in some) else "**no**" for some in ([mean], values)]
        rows.append(f"| {name}: {target} | {mean:.0%} | {met[0]} | {min(values):.0%} to {max(values):.0%} | {met[1]} |")
    return rows


if __name__ == "__main__":
    main()
