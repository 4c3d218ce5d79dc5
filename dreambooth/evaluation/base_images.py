"""Images that the base model generates from the evaluation prompts with the class, for the measure prompt_fidelity.

    base_images/<key>/text-0-1.png    image 1 of the first text in Recipe.evaluate_texts
    base_images/<key>/origin.json

The key is a hash of everything that determines the images. All runs of a run_root share them, like class images, so
that each base model generates them once.
"""

import logging
from functools import cached_property
from pathlib import Path

from PIL import Image

from dreambooth.config.recipe import Recipe
from dreambooth.data.class_images import digest, origin
from dreambooth.models.pipeline import Sampler
from dreambooth.utils import atomic_files
from dreambooth.utils.image_grid import is_intact_png

log = logging.getLogger(__name__)


class BaseImages:
    """The base model's images of a run's evaluation texts, on the disk and in memory."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.needed = bool(recipe.base_image_texts)
        self.images: dict[str, list[Image.Image]] | None = None  # by text; None until they are loaded or stored

    @cached_property
    def origin(self) -> dict[str, object]:
        """Everything that determines the images. Reads parts of the base model's weight files."""
        evaluate = self.recipe.evaluate
        return origin(self.recipe, list(self.recipe.evaluate_texts), sampler_settings(self.recipe)) | {
            "seed": evaluate.seed, "images_per_prompt": evaluate.images_per_prompt}

    @cached_property
    def folder(self) -> Path:
        """The folder of the images. All runs with the same origin share it."""
        return self.recipe.run_root / "base_images" / digest(self.origin)

    @cached_property
    def paths(self) -> dict[str, list[Path]]:
        """The paths of all images, by text."""
        return {text: [self.folder / f"text-{number}-{i}.png" for i in range(self.recipe.evaluate.images_per_prompt)]
                for number, text in enumerate(self.recipe.evaluate_texts)}

    def load(self) -> bool:
        """Load the images, unless they are in memory. Return False if an image is missing or damaged."""
        if self.images is None and all(is_intact_png(path) for row in self.paths.values() for path in row):
            self.images = {text: [Image.open(path).convert("RGB") for path in row] for text, row in self.paths.items()}
        return self.images is not None

    def store(self, images: dict[str, list[Image.Image]]) -> None:
        """Keep the images in memory, and write them to the disk for later evaluations.

        If another user owns the folder, write nothing and log a warning.

        Args:
            images: by text.
        """
        self.images = images
        try:
            atomic_files.write_json(self.folder / "origin.json", self.origin)
            for text, row in self.paths.items():
                for path, image in zip(row, images[text], strict=True):
                    if not is_intact_png(path):
                        with atomic_files.write_file(path) as temporary:
                            image.save(temporary, format="PNG")
        except PermissionError as error:
            log.warning("the base model's images of the evaluation prompts are not stored for other runs: %s", error)


def sampler_settings(recipe: Recipe) -> Sampler:
    """Return the sampler settings of all images of an evaluation."""
    return Sampler(recipe.sample.num_inference_steps, recipe.sample.guidance_scale, recipe.model.resolution)
