"""`python -m tools.proof.concepts`: trains two subjects in one run, and writes a section of docs/data.md.

It generates samples with the prompt of each subject and with the class prompt, and measures how similar they are to the
photos of each subject. An existing run in the folder is reused.
"""

import argparse
import json
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dreambooth.evaluation import metrics
from dreambooth.evaluation.encoders import open_encoder
from dreambooth.evaluation.scoring import to_pixels
from dreambooth.models.pipeline import generate_images, open_pipeline
from dreambooth.utils.image_grid import grid
from tools.proof.docs_section import write_section
from tools.proof.experiment import BASE, CLASS_PROMPT, DEMO, ROOT, SAMPLER, VIEWS, Experiment

SUBJECTS = {"zwx": DEMO, "ohwx": VIEWS / "tuning"}  # rare word -> photos
COUNT, FIRST_SEED = 16, 9500  # samples per prompt, and their first seed; these seeds are used nowhere else
COLUMNS = 6  # pictures per row of the sheet
STEPS = 800  # twice as many as for the single subject of docs/proof.md, so each photo is used as often
PAGE, SHEET = ROOT / "docs/data.md", ROOT / "docs/images/two-concepts.png"
BEGIN, END = "<!-- two subjects: written by python -m tools.proof.concepts -->", "<!-- end of two subjects -->"

Samples = dict[str, list[Image.Image]]  # prompt -> samples


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.concepts", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof")
    folder = parser.parse_args().folder
    model, seconds = Experiment(folder, FIRST_SEED).train(overrides())
    samples = {"base": draw_samples(BASE), "trained": draw_samples(model)}
    similarities = {name: {text: similarity_by_subject(pictures) for text, pictures in of_model.items()}
                    for name, of_model in samples.items()}
    draw_sheet(samples)
    write(similarities, seconds)
    print(json.dumps(similarities, indent=2))


def overrides() -> list[str]:
    """Return the overrides of the run."""
    subjects = ",".join(f"{{instance_dir: {photos}, instance_prompt: {prompt(word)}, class_prompt: {CLASS_PROMPT}}}"
                        for word, photos in SUBJECTS.items())
    return ["dataset=concepts", f"dataset.concepts=[{subjects}]", f"train.max_train_steps={STEPS}", "train.seed=11"]


def prompt(word: str) -> str:
    return f"a photo of a {word} toy"


def draw_samples(model: Path) -> Samples:
    """Generate samples with the prompt of each subject and with the class prompt."""
    pipeline, _ = open_pipeline(model, "cpu")
    samples = {}
    for number, text in enumerate([*map(prompt, SUBJECTS), CLASS_PROMPT]):
        seeds = [FIRST_SEED + 100 * number + i for i in range(COUNT)]
        samples[text] = next(generate_images(pipeline, [text] * COUNT, seeds, SAMPLER, COUNT))
    return samples


def similarity_by_subject(pictures: list[Image.Image]) -> dict[str, float]:
    """Return a dictionary: rare word -> mean similarity of the pictures to the photos of its subject."""
    encoder = open_encoder("efficientnet_lite0")
    features = encoder.embed_images(to_pixels(pictures))
    return {word: float(metrics.mean_similarity(features, encoder.embed_images(to_pixels(load_photos(word)))))
            for word in SUBJECTS}


def load_photos(word: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(SUBJECTS[word].glob("*.png"))]


def draw_sheet(samples: dict[str, Samples]) -> None:
    """Draw a sheet: photos of each subject, and samples of each prompt by the base model and the trained model."""
    rows = []
    for word in SUBJECTS:
        rows.append((f"photos of {word}", load_photos(word)[:COLUMNS]))
        rows += [(f"{prompt(word)}: {name}", samples[name][prompt(word)][:COLUMNS]) for name in samples]
    rows += [(f"{CLASS_PROMPT}: {name}", samples[name][CLASS_PROMPT][:COLUMNS]) for name in samples]
    strips = [grid(row if len(row) == COLUMNS else [*row, Image.new("RGB", row[0].size, "white")], COLUMNS)
              for _, row in rows]
    title_height, width = 16, max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height + title_height for strip in strips)), "white")
    y = 0
    for (title, _), strip in zip(rows, strips, strict=True):
        ImageDraw.Draw(sheet).text((2, y + 1), title, fill="#222222", font=ImageFont.load_default(11))
        sheet.paste(strip, (0, y + title_height))
        y += strip.height + title_height
    sheet.quantize(256, dither=Image.Dither.NONE).save(SHEET, optimize=True)  # 256 colours: a third of the bytes


def write(similarities: dict[str, dict[str, dict[str, float]]], seconds: float) -> None:
    """Write the section of docs/data.md.

    Args:
        similarities: model -> prompt -> rare word -> similarity.
    """
    rows = [f"| {text} | {name} | " + " | ".join(f"{of_model[text][word]:.3f}" for word in SUBJECTS) + " |"
            for text in similarities["base"] for name, of_model in similarities.items()]
    heads = " | ".join(f"similarity to {word}'s photos" for word in SUBJECTS)
    write_section(PAGE, BEGIN, END, f"""
Trained on {time.strftime("%Y-%m-%d")} with the tiny base model on a CPU, in one run of {STEPS} steps and
{seconds:.0f} s. The subjects are the demo's toy (`zwx`) and [another one](../tools/proof/views) (`ohwx`), with five
drawings each; both are "a toy". The other settings are the demo's defaults. There are {COUNT} pictures per prompt,
with seeds of {FIRST_SEED} and up, which were not used elsewhere. The figures are mean cosines of ImageNet
EfficientNet-Lite0 features with a subject's photos, as in [the proof](proof.md).

| prompt | model | {heads} |
|---|---|---|{"---|" * len(SUBJECTS)}
{chr(10).join(rows)}

![two subjects](images/{SHEET.name})
""")


if __name__ == "__main__":
    main()
