"""`python -m tools.proof.flow`: measures whether DreamBooth training works on the tiny flow base.

It trains the demo subject with all weights and with LoRA, and writes a section of docs/proof.md. The text encoder is
frozen, as in the training of large models of this kind. Runs and samples in the folder are reused.
"""

# ruff: noqa: E501  long lines of the page template

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from dreambooth.evaluation.scene_borders import SceneBorders
from dreambooth.models.pipeline import Sampler
from tools.proof.experiment import DEMO, FIRST_SEED, ROOT, SCENES, VIEWS, Experiment, Measurement, Variant, drift, gap

BASE = ROOT / "dreambooth/assets/tiny-flow"
SAMPLER = Sampler(num_inference_steps=20, guidance_scale=3.0, resolution=64)
RECIPE = ("model=tiny_flow", "precision=bf16")  # otherwise the defaults of the base model
LORA, NO_PRIOR = ("method=lora", "method.merge=true"), ("prior.with_prior_preservation=false",)
VARIANTS = (
    Variant("all weights"),
    Variant("LoRA", LORA),
    Variant("all weights, without prior preservation", NO_PRIOR, seeds=(11,)),
    Variant("LoRA, without prior preservation", (*LORA, *NO_PRIOR), seeds=(11,)),
)
WITHOUT = {"all weights": "all weights, without prior preservation", "LoRA": "LoRA, without prior preservation"}
MARKS = "<!-- tools.proof.flow -->", "<!-- end flow -->"
SHEET, SCENE_SHEET = ROOT / "docs/images/proof-flow.png", ROOT / "docs/images/proof-flow-scenes.png"
SECTION = """{begin}
## Flow matching

Written by `python -m tools.proof.flow` on {date}. The base model is the shipped flow base, `model=tiny_flow`; its text encoder is
frozen. The settings are {recipe} and otherwise the defaults of the base model with `method=full` and `method=lora`; the
learning rates were chosen on the tuning subject. Samples: {steps} Euler steps, guidance {guidance} of this family's pipeline. Prompts, sampling seeds and
similarity are those of the sections above. **Scenes kept** is the share of the {count} pictures in scenes whose border shows the scene
of the prompt; the similarity **in kept scenes** is measured on these pictures only, because a picture that has lost its scene is more similar
to the photos.

| | plain prompt | scenes | class prompt | scenes kept |
|---|---|---|---|---|
| base model before training | {base_plain:.3f} | {base_scenes:.3f} | {base_class:.3f} | {base_kept:.0%} |
| reference | {reference:.3f} | {reference:.3f} | - | - |

| run | plain | gap closed | scenes kept | in kept scenes | gap closed | class drift | training |
|---|---|---|---|---|---|---|---|
{rows}

| target, for each seed | lowest and highest | met |
|---|---|---|
{targets}

![samples](images/{sheet})

*Rows: the base model before training; three seeds with all weights; three seeds with LoRA; without prior preservation, all weights and
LoRA. Columns: the plain prompt (4 pictures), on the beach, in the snow, on the grass, at night, and the class prompt (4).*

![scenes](images/{scene_sheet})

*All pictures in scenes with seed 11. Left: all weights. Right: LoRA. A red frame marks a picture that has lost its scene.*
{end}
"""


@dataclass(frozen=True)
class Scenes:
    """What the pictures in scenes of one model show."""

    kept: float  # share of pictures that show the scene of their prompt
    similarity: float  # of these pictures to the photos; NaN: there are none


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.flow", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof-flow")
    experiment = Experiment(parser.parse_args().folder, FIRST_SEED, BASE, SAMPLER, RECIPE)
    base, reference = experiment.measure("base", BASE, DEMO), experiment.reference(DEMO, VIEWS / "demo-held-out")
    runs = {variant.name: [experiment.run_variant(variant, seed) for seed in variant.seeds] for variant in VARIANTS}
    experiment.draw_sheet([base, *(run for some in runs.values() for run in some)], SHEET)
    draw_scenes([runs["all weights"][0], runs["LoRA"][0]], SCENE_SHEET)
    write(experiment, base, reference, runs)
    print("wrote docs/proof.md")


def measure_scenes(experiment: Experiment, measurement: Measurement, photos: Path = DEMO) -> Scenes:
    """Measure the pictures in scenes of one model."""
    pictures = [picture for prompt in SCENES for picture in measurement.pictures[prompt]]
    kept = [picture for picture, shown in zip(pictures, shows_scene(measurement), strict=True) if shown]
    similarity = experiment.similarity(kept, photos) if kept else float("nan")
    return Scenes(len(kept) / len(pictures), similarity)


def shows_scene(measurement: Measurement) -> list[bool]:
    """Return whether each picture in a scene shows the scene of its prompt."""
    borders = SceneBorders.read(BASE)
    assert borders is not None
    return [borders.scene_of(picture) == borders.named_in(prompt)
            for prompt in SCENES for picture in measurement.pictures[prompt]]


def draw_scenes(measurements: list[Measurement], path: Path) -> None:
    """Write a picture with all pictures in scenes: one row per scene, the models side by side."""
    side, frame = 64, 3
    cell, columns = side + 2 * frame, max(SCENES.values())
    sheet = Image.new("RGB", (len(measurements) * (columns * cell + cell // 2) - cell // 2, len(SCENES) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for number, measurement in enumerate(measurements):
        shown = iter(shows_scene(measurement))
        for row, prompt in enumerate(SCENES):
            for column, picture in enumerate(measurement.pictures[prompt]):
                left, top = number * (columns * cell + cell // 2) + column * cell, row * cell
                if not next(shown):
                    pen.rectangle((left, top, left + cell - 1, top + cell - 1), fill="red")
                sheet.paste(picture, (left + frame, top + frame))
    sheet.save(path)


def write(experiment: Experiment, base: Measurement, reference: float, runs: dict[str, list[Measurement]]) -> None:
    """Write the section of docs/proof.md."""
    scenes = {name: [measure_scenes(experiment, run) for run in some] for name, some in runs.items()}

    def row(name: str, run: Measurement, found: Scenes) -> str:
        return (f"| {name}, seed {run.seed} | {run.plain:.3f} | {gap(run.plain, base.plain, reference):.0%} "
                f"| {found.kept:.0%} | {found.similarity:.3f} | {gap(found.similarity, base.scenes, reference):.0%} "
                f"| {drift(run, base):.3f} | {run.seconds:.0f} s |")

    targets = []
    for name, without in WITHOUT.items():
        worst = statistics.mean(drift(run, base) for run in runs[without])
        for text, values, met in (
                ("closes at least 75 % of the gap, plain prompt",
                 [gap(run.plain, base.plain, reference) for run in runs[name]], lambda value: value >= 0.75),
                ("keeps at least 90 % of the scenes", [found.kept for found in scenes[name]], lambda value: value >= 0.9),
                ("closes at least 30 % of the gap in kept scenes",
                 [gap(found.similarity, base.scenes, reference) for found in scenes[name]], lambda value: value >= 0.3),
                ("class drift at most 15 % of that without prior preservation",
                 [drift(run, base) / worst for run in runs[name]], lambda value: value <= 0.15)):
            targets.append(f"| {name} {text} | {min(values):.0%} to {max(values):.0%} | "
                           f"{'yes' if all(map(met, values)) else '**no**'} |")
    text = SECTION.format(
        begin=MARKS[0], end=MARKS[1], date=time.strftime("%Y-%m-%d"), recipe=" ".join(RECIPE),
        steps=SAMPLER.num_inference_steps, guidance=SAMPLER.guidance_scale, count=sum(SCENES.values()),
        base_plain=base.plain, base_scenes=base.scenes, base_class=base.class_similarity, reference=reference,
        base_kept=statistics.mean(shows_scene(base)), sheet=SHEET.name, scene_sheet=SCENE_SHEET.name,
        rows="\n".join(row(name, run, found) for name, some in runs.items()
                       for run, found in zip(some, scenes[name], strict=True)),
        targets="\n".join(targets))
    page = ROOT / "docs/proof.md"
    before, _, rest = page.read_text("utf-8").partition(MARKS[0])
    page.write_text(before.rstrip() + "\n\n" + text + rest.partition(MARKS[1])[2].lstrip("\n"), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
