"""Trains the tiny base models, generates samples and measures them: the common part of the proofs of training."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from dreambooth.evaluation import metrics
from dreambooth.evaluation.encoders import open_encoder
from dreambooth.evaluation.scene_borders import SceneBorders
from dreambooth.evaluation.scoring import to_pixels
from dreambooth.models.pipeline import Sampler, generate_images, open_pipeline
from dreambooth.utils.image_grid import grid

ROOT = Path(__file__).parents[2]
BASE = ROOT / "dreambooth/assets/tiny-sd"
DEMO = ROOT / "dreambooth/assets/demo"
VIEWS = Path(__file__).with_name("views")
FIRST_SEED = 9000  # first sampling seed of the proof; this and higher seeds were not used before
FIRST_TUNING_SEED = 5000  # first sampling seed of the search for a recipe
SAMPLER = Sampler(num_inference_steps=20, guidance_scale=4.0, resolution=64)
SUBJECT_PROMPT, CLASS_PROMPT = "a photo of a zwx toy", "a photo of a toy"
PLAIN = {SUBJECT_PROMPT: 16}  # prompt -> number of samples
SCENES = {f"{SUBJECT_PROMPT} {place}": 6 for place in ("on the beach", "in the snow", "on the grass", "at night")}
CLASS_SAMPLES = {CLASS_PROMPT: 32}
RECIPE = ("train.max_train_steps=400",)  # otherwise the demo's defaults; chosen with --tune, see report.py


@dataclass(frozen=True)
class Variant:
    """One of the training settings that a proof compares, and its training seeds."""

    name: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (11, 12, 13)  # the recipe was chosen without these seeds


@dataclass
class Measurement:
    """Similarities of one model's samples to the photos, scenes that it keeps, and the features of its class images."""

    plain: float
    scenes: float
    kept_scenes: float  # similarity of the samples in SCENES that show the scene of their prompt; nan if none does
    scenes_kept: float  # share of these samples: prompt_fidelity, by the border
    class_similarity: float
    class_features: torch.Tensor
    seconds: float = 0.0  # duration of training
    seed: int = 0  # training seed
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)  # by prompt


def gap(value: float, base: float, reference: float) -> float:
    """Return the share of the gap between `base` and `reference` that `value` closes."""
    return (value - base) / (reference - base)


def drift(trained: Measurement, base: Measurement) -> float:
    """Return the class drift: 1 - cosine of the mean features of the class images."""
    return float(metrics.class_drift(trained.class_features, base.class_features))


class Experiment:
    """Trains models, generates samples and measures them. A repeated call reuses the runs and samples in its folder."""

    def __init__(self, folder: Path, first_seed: int, base: Path = BASE, sampler: Sampler = SAMPLER,
                 recipe: Sequence[str] = RECIPE) -> None:
        """Load the encoder.

        Args:
            folder: contains runs and samples.
            first_seed: first seed of sampling.
            base: the base model.
            sampler: settings of sampling.
            recipe: settings of every training.
        """
        self.folder, self.first_seed = folder, first_seed
        self.base, self.sampler, self.recipe = base, sampler, recipe
        self.encoder = open_encoder("efficientnet_lite0")
        borders = SceneBorders.read(base)
        assert borders is not None
        self.borders = borders

    def run_variant(self, variant: Variant, seed: int) -> Measurement:
        """Train the demo subject and measure the result."""
        model, seconds = self.train([*self.recipe, f"train.seed={seed}", *variant.overrides])
        measurement = self.measure(sample_folder(model), model, DEMO)
        measurement.seconds, measurement.seed = seconds, seed
        print(f"{variant.name}, seed {seed}: plain {measurement.plain:.3f}, scenes {measurement.scenes:.3f}, "
              f"{measurement.scenes_kept:.0%} of them kept, {seconds:.0f} s", flush=True)
        return measurement

    def train(self, overrides: list[str]) -> tuple[Path, float]:
        """Train with `python -m dreambooth.train`; return the folder of the model and the seconds of training."""
        command = [sys.executable, "-m", "dreambooth.train", f"run_root={self.folder / 'runs'}", "hardware=cpu",
                   "tracking=none", "sample.every=null", "checkpoint.every=null", *overrides]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        run = find_model(output).parent
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return run / "model", float(json.loads((run / "result.json").read_text())["seconds"])

    def measure(self, name: str, model: Path, photos: Path) -> Measurement:
        """Generate samples with a model, and compare them with the photos.

        Args:
            name: name of the folder for the samples.
        """
        pictures = self._samples(name, model)
        photo_features = self._features([Image.open(path) for path in sorted(photos.glob("*.png"))])

        def features(prompts: dict[str, int]) -> torch.Tensor:
            return self._features([picture for prompt in prompts for picture in pictures[prompt]])

        similarity = {key: float(metrics.mean_similarity(features(prompts), photo_features))
                      for key, prompts in (("plain", PLAIN), ("scenes", SCENES), ("class", CLASS_SAMPLES))}
        scenes = {prompt: pictures[prompt] for prompt in SCENES}
        kept = [picture for prompt, some in scenes.items() for picture in some
                if self.borders.scene_of(picture) == self.borders.named_in(prompt)]
        kept_similarity = float(metrics.mean_similarity(self._features(kept), photo_features)) if kept else math.nan
        return Measurement(similarity["plain"], similarity["scenes"], kept_similarity,
                           len(kept) / sum(map(len, scenes.values())), similarity["class"],
                           features(CLASS_SAMPLES), pictures=pictures)

    def reference(self, photos: Path, held_out: Path) -> float:
        """Return the similarity that a perfect denoiser could reach: of held-out views, decoded by the VAE."""
        vae = open_pipeline(self.base, "cpu")[0].vae
        views = to_pixels([Image.open(path) for path in sorted(held_out.glob("*.png"))])
        with torch.no_grad():
            decoded = vae.decode(vae.encode(views * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
        photo_features = self._features([Image.open(path) for path in sorted(photos.glob("*.png"))])
        return float(metrics.mean_similarity(self.encoder.embed_images(decoded), photo_features))

    def draw_sheet(self, measurements: list[Measurement], path: Path) -> None:
        """Write one picture with samples of all prompts, one row per measurement."""
        def row(measurement: Measurement) -> list[Image.Image]:
            return [picture for prompt, count in (PLAIN | SCENES | CLASS_SAMPLES).items()
                    for picture in measurement.pictures[prompt][:4 if count > 6 else 1]]

        strips = [grid(pictures, len(pictures)) for pictures in map(row, measurements)]
        sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
        for i, strip in enumerate(strips):
            sheet.paste(strip, (0, i * strip.height))
        sheet.save(path)

    def _samples(self, name: str, model: Path) -> dict[str, list[Image.Image]]:
        """Return samples of every prompt, each with its own seed; existing files are reused."""
        samples: dict[str, list[Image.Image]] = {}
        pipeline = None
        for number, (prompt, count) in enumerate((PLAIN | SCENES | CLASS_SAMPLES).items()):
            paths = [self.folder / "samples" / name / f"{number}-{i:02d}.png" for i in range(count)]
            if not all(path.is_file() for path in paths):
                pipeline = pipeline or open_pipeline(model, "cpu")[0]
                seeds = [self.first_seed + 100 * number + i for i in range(count)]
                batches = generate_images(pipeline, [prompt] * count, seeds, self.sampler, 16)
                pictures = [picture for batch in batches for picture in batch]
                paths[0].parent.mkdir(parents=True, exist_ok=True)
                for path, picture in zip(paths, pictures, strict=True):
                    picture.save(path)
            samples[prompt] = [Image.open(path).convert("RGB") for path in paths]
        return samples

    def _features(self, pictures: list[Image.Image]) -> torch.Tensor:
        return self.encoder.embed_images(to_pixels(pictures))


def find_model(output: str) -> Path:
    """Return the folder of the model that a training command names at its end, also if the run was finished before."""
    found = re.search(r"^(?:model +|this run is finished: .*, model in )(.+?/model)(?:\.|$)", output, re.MULTILINE)
    assert found, output[-500:]
    return Path(found[1])


def sample_folder(model: Path) -> str:
    """Return the name of the folder for a run's samples. It contains the step, because a run can be extended."""
    return f"{model.parent.name}-{json.loads((model.parent / 'result.json').read_text())['step']}"
