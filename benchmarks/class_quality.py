"""Compares the quality of our class images with those that diffusers' script generates.

    python benchmarks/class_quality.py WORK [--write]

It scores the images that `speed.py --cases "diffusers class images" "class images"` wrote to WORK, with the measures of
`evaluate`: the dissimilarity of class images to each other (diversity), their similarity to photos of the subject
(class_similarity), and the distance of their mean feature from that of reference images (class_drift). The reference is
DDIM (Song et al. 2021, arXiv:2010.02502) in 150 steps with the script's guidance. It approximates the exact solution of
the sampling ODE at a reasonable cost, and is neither of the samplers under test. The two halves of the reference
images are compared with each other too.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peers.tasks import CLASS, INSTANCE
from PIL import Image
from speed_table import CLASS_BASELINE, SAME_GUIDANCE, write_section

from dreambooth.evaluation.encoders import open_encoder
from dreambooth.evaluation.scoring import Images, score

MEASURES = ("diversity", "class_similarity", "class_drift")


def load_images(folder: Path) -> list[Image.Image]:
    """Load the images of a folder and its subfolders, sorted by path.

    Raises:
        SystemExit: the folder contains fewer than four images.
    """
    images = [Image.open(path).convert("RGB") for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg")]
    if len(images) < 4:
        raise SystemExit(f"{folder} contains {len(images)} images: run speed.py with both class image cases first")
    return images


def reference_images(work: Path, count: int) -> list[Image.Image]:
    """Load the class images by DDIM from the folder WORK/exact; generate them if they are missing."""
    folder = work / "exact"
    folder.mkdir(exist_ok=True)
    if len(list(folder.glob("*.png"))) < count:
        pipe = StableDiffusionPipeline.from_pretrained(work.parent / "bases" / "tiny", local_files_only=True,
                                                       safety_checker=None)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
        for start in range(0, count, 32):
            seeds = [torch.Generator().manual_seed(90000 + start + number) for number in range(min(32, count - start))]
            for number, image in enumerate(pipe([CLASS] * len(seeds), num_inference_steps=150, guidance_scale=7.5,
                                                height=64, width=64, generator=seeds).images):
                image.save(folder / f"{start + number:04d}.png")
    return load_images(folder)[:count]


def table_rows(photos: Images, script: Images, reference: Images, ours: dict[str, Images]) -> list[str]:
    """Score each set of images, and return the rows of a Markdown table, one row per set."""
    encoder, half = open_encoder("efficientnet_lite0"), len(reference) // 2
    rows = [f"| images | number | {' | '.join(MEASURES)} |", "|---|---|---|---|---|"]
    for name, images, base in (("DDIM, first half", reference[:half], reference[half:]),
                               ("DDIM, second half", reference[half:], reference[:half]),
                               ("the script's", script, reference),
                               *((name, images, reference) for name, images in ours.items())):
        scores = score(photos, {CLASS: images}, [encoder], class_images=images, base_class_images=base)
        values = [next(value for key, value in scores.items() if key.startswith(measure)) for measure in MEASURES]
        rows.append(f"| {name} | {len(images)} | {' | '.join(f'{value:z.3f}' for value in values)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help=f"folder that speed.py wrote; the prompt of its photos is {INSTANCE!r}")
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    ours = {name: load_images(options.work / name) for name in ("class images", SAME_GUIDANCE)
            if (options.work / name).is_dir()}
    script = load_images(options.work / CLASS_BASELINE)
    reference = reference_images(options.work, len(script))
    rows = table_rows(load_images(options.work / "photos"), script, reference, ours)
    print("\n".join(rows))
    if options.write:
        write_section("class", rows, "performance.md")


if __name__ == "__main__":
    main()
