"""Are our class images as good as the script's? python benchmarks/class_quality.py WORK [--write]

Scores what `speed.py --cases "peer class images" "class images"` left in WORK, as `evaluate` does: how unlike each
other pictures of the class are (diversity), how like photos of the subject (class_similarity), how far their mean is
from that of pictures by DDIM (Song et al. 2021, arXiv:2010.02502) in 150 steps, guided as the script's (class_drift).
Those are as near to the exact solution as is cheap, and neither sampler under test; their halves are compared too.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from speed import CLASS, INSTANCE
from speed_table import SAME_GUIDANCE, put

from dreambooth.evaluation.encoders import open_encoder
from dreambooth.evaluation.scoring import Pictures, score

ROLES = ("diversity", "class_similarity", "class_drift")


def opened(folder: Path) -> list[Image.Image]:
    """The pictures of a folder, by name."""
    found = [Image.open(path).convert("RGB") for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg")]
    if len(found) < 4:
        raise SystemExit(f"{folder} holds {len(found)} pictures: run speed.py with both class image cases first")
    return found


def exact(work: Path, count: int) -> list[Image.Image]:
    """Pictures of the class by DDIM, kept in WORK."""
    folder = work / "exact"
    folder.mkdir(exist_ok=True)
    if len(list(folder.glob("*.png"))) < count:
        pipe = StableDiffusionPipeline.from_pretrained(work / "base", local_files_only=True, safety_checker=None)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
        for start in range(0, count, 32):
            seeds = [torch.Generator().manual_seed(90000 + start + number) for number in range(min(32, count - start))]
            for number, picture in enumerate(pipe([CLASS] * len(seeds), num_inference_steps=150, guidance_scale=7.5,
                                                  height=64, width=64, generator=seeds).images):
                picture.save(folder / f"{start + number:04d}.png")
    return opened(folder)[:count]


def rows(photos: Pictures, script: Pictures, known: Pictures, ours: dict[str, Pictures]) -> list[str]:
    """A table with a row for each set of pictures."""
    encoder, half = open_encoder("efficientnet_lite0"), len(known) // 2
    found = [f"| pictures | number | {' | '.join(ROLES)} |", "|---|---|---|---|---|"]
    for name, pictures, base in (("DDIM, first half", known[:half], known[half:]),
                                 ("DDIM, second half", known[half:], known[:half]), ("the script's", script, known),
                                 *((name, pictures, known) for name, pictures in ours.items())):
        values = score(photos, {CLASS: pictures}, [encoder], class_images=pictures, base_class_images=base)
        told = [next(value for key, value in values.items() if key.startswith(role)) for role in ROLES]
        found.append(f"| {name} | {len(pictures)} | {' | '.join(f'{value:z.3f}' for value in told)} |")
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("work", type=Path, help=f"folder of speed.py, whose photos are of {INSTANCE!r}")
    ask.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = ask.parse_args()
    ours = {name: opened(given.work / name) for name in ("class images", SAME_GUIDANCE) if (given.work / name).is_dir()}
    script = opened(given.work / "peer class images")
    found = rows(opened(given.work / "photos"), script, exact(given.work, len(script)), ours)
    print("\n".join(found))
    if given.write:
        put("class", found)


if __name__ == "__main__":
    main()
