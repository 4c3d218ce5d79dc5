"""Samples during training: the same prompts and seeds each time, from the EMA weights, as files and on a sheet."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from dreambooth.config.recipe import Recipe
from dreambooth.data.photos import Photo, crop_to_size
from dreambooth.models.pipeline import Sampler, generate_images
from dreambooth.tracking.tracker import Tracker
from dreambooth.utils import atomic_files
from dreambooth.utils.image_grid import square_columns, contact_sheet, grid, read_samples


class SampleBook:
    """The `samples` folder of a run: `step-000100/prompt-0-1.png`, one row a prompt, `contact_sheet.png`."""

    def __init__(self, recipe: Recipe, photos: Sequence[Photo], tracker: Tracker) -> None:
        self.folder = recipe.run_dir / "samples"
        self.sheet = recipe.run_dir / "contact_sheet.png"
        self.prompts, self.spec, side = recipe.sample_prompts, recipe.sample, recipe.model.resolution
        self.sampler = Sampler(self.spec.num_inference_steps, self.spec.guidance_scale, side)
        self.batch_size = max(self.spec.images_per_prompt, recipe.prior.sample_batch_size)
        self.photos = [Image.fromarray(crop_to_size(photo.pixels, photo.size or (side, side), None, False)) for photo in photos]
        self.tracker = tracker

    def add(self, step: int, pipeline: Any, autocast: Callable[[], Any]) -> None:
        """Sample every prompt after `step` completed steps, unless that was done already; log and redraw the sheet."""
        target = self.folder / f"step-{step:06d}"
        if not target.is_dir():
            count = self.spec.images_per_prompt
            jobs = [(prompt, self.spec.seed + i) for prompt in self.prompts for i in range(count)]
            batches = generate_images(
                pipeline, [prompt for prompt, _ in jobs], [seed for _, seed in jobs], self.sampler,
                self.batch_size, autocast)
            made = [image for batch in batches for image in batch]
            with atomic_files.write_folder(target) as aside:
                for number in range(len(self.prompts)):
                    row = made[number * count:(number + 1) * count]
                    for i, image in enumerate(row):
                        image.save(aside / f"prompt-{number}-{i}.png")
                    grid(row, square_columns(count)).save(aside / f"grid-{number}.png")
        for number in range(len(self.prompts)):
            self.tracker.image(step, f"samples/prompt_{number}", target / f"grid-{number}.png")
        self._redraw()

    def _redraw(self) -> None:
        if found := read_samples(self.folder, len(self.prompts)):
            with atomic_files.write_file(self.sheet) as aside:
                contact_sheet(self.photos, found, self.prompts).save(aside, format="PNG")
