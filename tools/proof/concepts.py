"""Two subjects in one run: `python -m tools.proof.concepts` trains them, draws each trigger and their class, measures
which photos the pictures resemble, and writes its part of docs/data.md. What is done already is not done again."""

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
from tools.proof import page
from tools.proof.__main__ import BASE, DEMO, ROOT, SAMPLER, VIEWS, Bench

SUBJECTS = {"zwx": DEMO, "ohwx": VIEWS / "tuning"}  # rare word -> photos
CLASS = "a photo of a toy"
COUNT, FIRST = 16, 9500  # pictures a prompt; their first seed, used nowhere else
SHOWN = 6
STEPS = 800  # twice those of the single subject in docs/proof.md: each photo is seen as often
PAGE, SHEET = ROOT / "docs/data.md", ROOT / "docs/images/two-concepts.png"
BEGIN, END = "<!-- two subjects: written by python -m tools.proof.concepts -->", "<!-- end of two subjects -->"


def prompt(word: str) -> str:
    return f"a photo of a {word} toy"


def overrides() -> list[str]:
    """The run's settings."""
    listed = ",".join(f"{{instance_dir: {photos}, instance_prompt: {prompt(word)}, class_prompt: {CLASS}}}"
                      for word, photos in SUBJECTS.items())
    return ["dataset=concepts", f"dataset.concepts=[{listed}]", f"train.max_train_steps={STEPS}", "train.seed=11"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.concepts", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof")
    folder = parser.parse_args().folder
    model, seconds = Bench(folder, FIRST).train(overrides())
    made = {"base": drawn(folder, BASE), "trained": drawn(folder, model)}
    similar = {name: {text: resemblance(pictures) for text, pictures in rows.items()} for name, rows in made.items()}
    sheet(made)
    write(similar, seconds)
    print(json.dumps(similar, indent=2))


def drawn(folder: Path, model: Path) -> dict[str, list[Image.Image]]:
    """Pictures of each trigger and of the class."""
    pipeline = open_pipeline(model, "cpu")
    found = {}
    for number, text in enumerate([*map(prompt, SUBJECTS), CLASS]):
        seeds = [FIRST + 100 * number + i for i in range(COUNT)]
        found[text] = next(generate_images(pipeline, [text] * COUNT, seeds, SAMPLER, COUNT))
    return found


def resemblance(pictures: list[Image.Image]) -> dict[str, float]:
    """Rare word -> mean similarity of the pictures to that subject's photos."""
    encoder = open_encoder("efficientnet_lite0")
    seen = encoder.embed_images(to_pixels(pictures))
    return {word: float(metrics.mean_similarity(seen, encoder.embed_images(to_pixels(photos(word))))) for word in SUBJECTS}


def photos(word: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(SUBJECTS[word].glob("*.png"))]


def sheet(made: dict[str, dict[str, list[Image.Image]]]) -> None:
    """A row the photos of a subject, then what its word gives before and after; last the class."""
    rows = []
    for word in SUBJECTS:
        rows.append((f"photos of {word}", photos(word)[:SHOWN]))
        rows += [(f"{prompt(word)}: {name}", made[name][prompt(word)][:SHOWN]) for name in made]
    rows += [(f"{CLASS}: {name}", made[name][CLASS][:SHOWN]) for name in made]
    strips = [grid(row, SHOWN) if len(row) == SHOWN else grid([*row, Image.new("RGB", row[0].size, "white")], SHOWN)
              for _, row in rows]
    title, width = 16, max(strip.width for strip in strips)
    whole = Image.new("RGB", (width, sum(strip.height + title for strip in strips)), "white")
    y = 0
    for (text, _), strip in zip(rows, strips, strict=True):
        ImageDraw.Draw(whole).text((2, y + 1), text, fill="#222222", font=ImageFont.load_default(11))
        whole.paste(strip, (0, y + title))
        y += strip.height + title
    whole.quantize(256, dither=Image.Dither.NONE).save(SHEET, optimize=True)  # a third of the bytes


def write(similar: dict[str, dict[str, dict[str, float]]], seconds: float) -> None:
    """The part of the page between its two marks."""
    rows = [f"| {text} | {name} | " + " | ".join(f"{found[word]:.3f}" for word in SUBJECTS) + " |"
            for text in similar["base"] for name, found in ((name, similar[name][text]) for name in similar)]
    words = " | ".join(f"like {word}'s photos" for word in SUBJECTS)
    page.put(PAGE, BEGIN, END, f"""
Trained on {time.strftime("%Y-%m-%d")} with the tiny base on a CPU, one run of {STEPS} steps, {seconds:.0f} s:
five drawings each of the demo's toy (`zwx`) and of [another](../tools/proof/views) (`ohwx`), both "a toy"; the rest
is the demo's default. {COUNT} pictures a prompt, seeds from {FIRST} that were used nowhere else. The figures are mean
cosines of ImageNet EfficientNet-Lite0 features with a subject's photos, as in [the proof](proof.md).

| prompt | model | {words} |
|---|---|{"---|" * len(SUBJECTS)}
{chr(10).join(rows)}

![two subjects](images/{SHEET.name})
""")


if __name__ == "__main__":
    main()
