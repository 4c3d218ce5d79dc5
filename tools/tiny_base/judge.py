"""Can one see what the base draws? `python -m tools.tiny_base.judge BASE...` asks by forced choice among the classes.

Two judges that did not train it: a classifier over ImageNet features that learned the classes from emoji sets which the
base has never seen (art.JUDGED_WITH), and a reader, for whom it writes a shuffled, numbered sheet and, apart, the key.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dreambooth.evaluation.encoders import open_encoder
from tools.tiny_base import art, autoencoder
from tools.tiny_base.pictures import compose

# Left out of the choice: "animal", which is right for a dog too, and "toy", which is anything in a toy shop.
CHOICES = [name for name in art.vocabulary()["classes"] if name not in ("animal", "toy")]
VIEWS = 8  # pictures of a held-out sprite that the classifier learns from
PER_CLASS = 8  # samples of a class that the classifier judges; the reader sees half of them
COLUMNS = 12

Bytes = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base.judge", description=__doc__)
    parser.add_argument("bases", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("build/tiny-base"))
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(2)
    art.fetch((art.NAMES, *art.TRAINED_ON, *art.JUDGED_WITH), options.folder / "packages")
    judge = Classifier(options.folder / "packages", options.bases[0])
    print(f"classifier on the sprites that the bases were trained on: {judge.ceiling:.1%}")
    for base in options.bases:
        samples = draw(base, PER_CLASS, options.seed)
        report(base, judge, samples)
        write_sheet(samples, options.folder / f"blind-{base.parent.name}-{base.name}", options.seed)


class Classifier:
    """Logistic regression over EfficientNet-Lite0 features of held-out sprites, seen through the VAE as samples are."""

    def __init__(self, packages: Path, base: Path) -> None:
        self.encoder = open_encoder("efficientnet_lite0")
        self.vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32)
        learned, names = self._pictures(art.JUDGED_WITH, packages, VIEWS)
        self.model = make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=400))
        self.model.fit(self._features(learned), names)
        seen, truth = self._pictures(art.TRAINED_ON, packages, 1)
        self.ceiling = float(np.mean(self(seen) == np.array(truth)))

    def __call__(self, pictures: Bytes) -> NDArray[np.str_]:
        """The class of each picture (N, 64, 64, 3)."""
        return np.asarray(self.model.predict(self._features(pictures)))

    def _features(self, pictures: Bytes) -> NDArray[np.float32]:
        chunks = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).split(32)
        return np.concatenate([self.encoder.embed_images(chunk).numpy() for chunk in chunks])

    @torch.no_grad()
    def _pictures(self, packages: tuple[art.Package, ...], folder: Path, views: int) -> tuple[Bytes, list[str]]:
        """Each sprite of one class on white, through the VAE."""
        dice, made, names = np.random.default_rng(0), [], []
        for sprite in art.sprites(packages, folder):
            [*classes] = (name for name in art.concepts()[sprite.concept] if name in CHOICES)
            if len(classes) == 1:
                made += [compose(sprite, dice, "white")[0] for _ in range(views)]
                names += classes * views
        chunks = [autoencoder.pixels(np.stack(made[i:i + 64])) for i in range(0, len(made), 64)]
        decoded = [self.vae.decode(self.vae.encode(chunk).latent_dist.mean).sample for chunk in chunks]
        through = ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return through.numpy(), names


def draw(base: Path, count: int, seed: int) -> list[tuple[str, Bytes]]:
    """(class, picture): `count` samples of "a photo of a CLASS" for each class; every seed is used once."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for number, name in enumerate(CHOICES):
        article = "an" if name[0] in "aeiou" else "a"
        generators = [torch.Generator().manual_seed(seed + number * count + i) for i in range(count)]
        pictures = pipeline([f"a photo of {article} {name}"] * count, num_inference_steps=20, guidance_scale=4.0,
                            generator=generators).images
        made += [(name, np.asarray(picture)) for picture in pictures]
    return made


def report(base: Path, judge: Classifier, samples: list[tuple[str, Bytes]]) -> None:
    """Accuracy, and by class what was taken for what."""
    truth = np.array([name for name, _ in samples])
    said = judge(np.stack([picture for _, picture in samples]))
    print(f"{base}: {np.mean(said == truth):.1%} of {len(truth)} samples of {len(CHOICES)} classes")
    for name in CHOICES:
        wrong = Counter(said[(truth == name) & (said != name)])
        share = np.mean(said[truth == name] == name)
        print(f"  {name:11} {share:4.0%}  {', '.join(f'{other} {n}' for other, n in wrong.most_common())}")


def write_sheet(samples: list[tuple[str, Bytes]], stem: Path, seed: int) -> None:
    """STEM.png for a reader, STEM.json with what each number is."""
    half = [samples[i + j] for i in range(0, len(samples), PER_CLASS) for j in range(PER_CLASS // 2)]
    random.Random(seed).shuffle(half)
    side, rows = 110, -(-len(half) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * side, rows * (side + 14)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (_, picture) in enumerate(half):
        left, top = i % COLUMNS * side, i // COLUMNS * (side + 14)
        sheet.paste(Image.fromarray(picture).resize((side - 10, side - 10), Image.Resampling.BICUBIC), (left, top + 13))
        pen.text((left + 2, top + 1), str(i + 1), fill="black")
    sheet.save(stem.with_suffix(".png"))
    stem.with_suffix(".json").write_text(json.dumps({i + 1: name for i, (name, _) in enumerate(half)}, indent=0))


if __name__ == "__main__":
    main()
