"""Generates, stores and tracks sample images during training, from the same prompts and seeds each time."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.config.recipe import Recipe
from dreambooth.data.photos import Photo, crop_to_size
from dreambooth.models.pipeline import Sampler, generate_images
from dreambooth.runtime.engine import Engine
from dreambooth.storage import manifest
from dreambooth.tracking.tracker import Tracker
from dreambooth.utils import atomic_files
from dreambooth.utils.image_grid import SHEET_PHOTOS, contact_sheet, grid, is_intact_png, read_samples, square_columns
from dreambooth.utils.signals import StopRequest


class SampleRecorder:
    """Generates the sample images of a run and writes them to the run folder.

    `samples/step-000100/prompt-0-1.png` is the second image of the first prompt, `samples/step-000100/grid-0.png` shows
    all images of the first prompt, and `contact_sheet.png` shows the samples of all steps.
    """

    def __init__(self, recipe: Recipe, photos: Sequence[Photo], tracker: Tracker) -> None:
        self.folder = recipe.run_dir / "samples"
        self.sheet = recipe.run_dir / "contact_sheet.png"
        self.prompts, self.spec, self.side = recipe.sample_prompts, recipe.sample, recipe.model.resolution
        self.sampler = Sampler(self.spec.num_inference_steps, self.spec.guidance_scale, self.side)
        self.batch_size = max(self.spec.images_per_prompt, recipe.prior.sample_batch_size)
        self.tracker = tracker
        square = self.side, self.side
        # Read before the first step, so that a photo may be edited or deleted while the run trains.
        self._crops = [Image.fromarray(crop_to_size(photo.pixels, photo.size or square, None, False))
                       for photo in photos[:SHEET_PHOTOS]]

    def record(self, step: int, pipeline: Any, engine: Engine, stop: StopRequest) -> None:
        """Generate, write and track the samples of every prompt after `step` completed steps; update the contact sheet.

        If the samples of this step exist already and none of them is damaged, they are not generated again. All
        processes generate samples. Only the main process writes files.

        Raises:
            Interrupted: a process received a stop request while samples were generated. Nothing was written.
        """
        target = self.folder / f"step-{step:06d}"
        if engine.run_on_main(lambda: not _are_intact(target)):
            count = self.spec.images_per_prompt
            jobs = [(prompt, self.spec.seed + i) for prompt in self.prompts for i in range(count)]
            batches = generate_images(
                pipeline, [prompt for prompt, _ in jobs], [seed for _, seed in jobs], self.sampler,
                self.batch_size, engine.autocast, map_batches=partial(engine.map_shared, stop=stop))
            images = [image for batch in batches for image in batch]
            if engine.is_main_process:
                self._write(target, images)
        if engine.is_main_process:
            for number in range(len(self.prompts)):
                self.tracker.log_image(step, f"samples/prompt_{number}", target / f"grid-{number}.png")
            self._draw_contact_sheet()

    def _write(self, target: Path, images: Sequence[Image.Image]) -> None:
        count = self.spec.images_per_prompt
        with manifest.write_folder(target) as temporary:
            for number in range(len(self.prompts)):
                row = images[number * count:(number + 1) * count]
                for i, image in enumerate(row):
                    image.save(temporary / f"prompt-{number}-{i}.png")
                grid(row, square_columns(count)).save(temporary / f"grid-{number}.png")

    def _draw_contact_sheet(self) -> None:
        if samples := read_samples(self.folder, len(self.prompts)):
            with atomic_files.write_file(self.sheet) as temporary:
                contact_sheet(self._crops, samples, self.prompts).save(temporary, format="PNG")


def _are_intact(folder: Path) -> bool:
    """Return whether the samples of a step exist and none of them is damaged."""
    return folder.is_dir() and not manifest.find_damage(folder) and all(map(is_intact_png, folder.glob("*.png")))
