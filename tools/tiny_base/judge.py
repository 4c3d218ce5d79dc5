"""`python -m tools.tiny_base.judge BASE...`: measures how often the class of a base model's samples is recognised.

Two independent judges choose the class from a fixed list. The first is a classifier over ImageNet features, which
learns the classes from emoji sets that no base model was trained on (emoji.HELD_OUT). The second is a reader: a person
or a vision language model. For the reader this program writes a numbered, shuffled sheet of samples, and a separate
file with the answers.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dreambooth.evaluation.encoders import open_encoder
from dreambooth.models.pipeline import Sampler, generate_images, open_pipeline
from tools.tiny_base import autoencoder, emoji
from tools.tiny_base.pictures import SIDE, compose

# "animal" and "toy" are not among the choices, because both also fit pictures of many other classes.
CHOICES = [name for name in emoji.vocabulary()["classes"] if name not in ("animal", "toy")]
VIEWS = 8  # training pictures of the classifier per held-out sprite
PER_CLASS = 8  # samples per class for the classifier; the reader sees half of them
STEPS, GUIDANCE = 20, 3.0  # of sampling; guidance g: u + (1 + g) (c - u), where 0 is no guidance
COLUMNS = 12

Bytes = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base.judge", description=__doc__)
    parser.add_argument("bases", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("build/tiny-base"))
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(2)
    emoji.fetch((emoji.NAMES, *emoji.TRAINED_ON, *emoji.HELD_OUT), options.folder / "packages")
    judge = Classifier(options.folder / "packages", options.bases[0])
    print(f"accuracy of the classifier on the sprites that the base models were trained on: {judge.ceiling:.1%}")
    for base in options.bases:
        samples = draw(base, PER_CLASS, options.seed)
        report(base, judge, samples)
        write_sheet(samples, options.folder / f"blind-{base.parent.name}-{base.name}", options.seed)


class Classifier:
    """Logistic regression over EfficientNet-Lite0 features, trained on held-out sprites.

    The sprites are encoded and decoded by the VAE, so that they look like samples.

    Attributes:
        ceiling: accuracy on the sprites that the base models were trained on.
    """

    def __init__(self, packages: Path, base: Path) -> None:
        self.encoder = open_encoder("efficientnet_lite0")
        self.vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32)
        training_pictures, names = self._pictures(emoji.HELD_OUT, packages, VIEWS)
        self.model = make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=400))
        self.model.fit(self._features(training_pictures), names)
        pictures, truth = self._pictures(emoji.TRAINED_ON, packages, 1)
        self.ceiling = float(np.mean(self(pictures) == np.array(truth)))

    def __call__(self, pictures: Bytes) -> NDArray[np.str_]:
        """Return the predicted class of each picture (N, 64, 64, 3)."""
        return np.asarray(self.model.predict(self._features(pictures)))

    def _features(self, pictures: Bytes) -> NDArray[np.float32]:
        chunks = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).split(32)
        return np.concatenate([self.encoder.embed_images(chunk).numpy() for chunk in chunks])

    @torch.no_grad()
    def _pictures(self, packages: tuple[emoji.Package, ...], folder: Path, views: int) -> tuple[Bytes, list[str]]:
        """Return pictures of all sprites with exactly one class, on white and decoded by the VAE, and their classes."""
        rng, composed, names = np.random.default_rng(0), [], []
        for sprite in emoji.sprites(packages, folder):
            [*classes] = (name for name in emoji.concepts()[sprite.concept] if name in CHOICES)
            if len(classes) == 1:
                composed += [compose(sprite, rng, "white")[0] for _ in range(views)]
                names += classes * views
        chunks = [autoencoder.pixels(np.stack(composed[i:i + 64])) for i in range(0, len(composed), 64)]
        decoded = [self.vae.decode(self.vae.encode(chunk).latent_dist.mean).sample for chunk in chunks]
        pixels = ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return pixels.numpy(), names


def draw(base: Path, count: int, seed: int) -> list[tuple[str, Bytes]]:
    """Generate `count` samples of "a photo of a CLASS" per class, each with its own seed; return (class, picture)."""
    pipeline, family = open_pipeline(base, "cpu")
    sampler = Sampler(STEPS, family.no_guidance + GUIDANCE, SIDE)
    samples = []
    for number, name in enumerate(CHOICES):
        article = "an" if name[0] in "aeiou" else "a"
        seeds = [seed + number * count + i for i in range(count)]
        for pictures in generate_images(pipeline, [f"a photo of {article} {name}"] * count, seeds, sampler, count):
            samples += [(name, np.asarray(picture)) for picture in pictures]
    return samples


def report(base: Path, judge: Classifier, samples: list[tuple[str, Bytes]]) -> None:
    """Print the accuracy of the classifier on the samples, and its errors for each class."""
    truth = np.array([name for name, _ in samples])
    predicted = judge(np.stack([picture for _, picture in samples]))
    print(f"{base}: {np.mean(predicted == truth):.1%} of {len(truth)} samples of {len(CHOICES)} classes")
    for name in CHOICES:
        wrong = Counter(predicted[(truth == name) & (predicted != name)])
        share = np.mean(predicted[truth == name] == name)
        print(f"  {name:11} {share:4.0%}  {', '.join(f'{other} {n}' for other, n in wrong.most_common())}")


def write_sheet(samples: list[tuple[str, Bytes]], stem: Path, seed: int) -> None:
    """Write STEM.png for the reader, and STEM.json with the class of each number."""
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
