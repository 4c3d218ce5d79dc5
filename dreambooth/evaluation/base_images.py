"""Images that the base model generates from the evaluation prompts with the class, for the measure prompt_fidelity.

    base_images/<key>/text-0-1.png    image 1 of the first text in Recipe.evaluate_texts
    base_images/<key>/origin.json

The key is a hash of everything that determines the images. All runs of a run_root share them, like class images, so
that each base model generates them once.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from dreambooth.config.recipe import Recipe
from dreambooth.data.class_images import digest, origin
from dreambooth.models.pipeline import Sampler
from dreambooth.utils import atomic_files
from dreambooth.utils.image_grid import is_intact_png

log = logging.getLogger(__name__)


def are_needed(recipe: Recipe) -> bool:
    """Return whether the run compares with such images: it has a class prompt, and several evaluation prompts."""
    return bool(recipe.evaluate.encoders and recipe.class_prompt.strip()) and len(set(recipe.evaluate_texts)) > 1


def read(recipe: Recipe) -> dict[str, list[Image.Image]] | None:
    """Return the images by text, or None if an image is missing or damaged."""
    paths = _paths(recipe)
    if not all(is_intact_png(path) for row in paths.values() for path in row):
        return None
    return {text: [Image.open(path).convert("RGB") for path in row] for text, row in paths.items()}


def write(recipe: Recipe, images: Mapping[str, Sequence[Image.Image]]) -> None:
    """Write the images for later evaluations. If another user owns the folder, write nothing and log a warning.

    Args:
        images: by text.
    """
    try:
        atomic_files.write_json(_folder(recipe) / "origin.json", _origin(recipe))
        for text, row in _paths(recipe).items():
            for path, image in zip(row, images[text], strict=True):
                if not is_intact_png(path):
                    with atomic_files.write_file(path) as temporary:
                        image.save(temporary, format="PNG")
    except PermissionError as error:
        log.warning("the base model's images of the evaluation prompts are not stored for other runs: %s", error)


def sampler_settings(recipe: Recipe) -> Sampler:
    """Return the sampler settings of all images of an evaluation."""
    return Sampler(recipe.sample.num_inference_steps, recipe.sample.guidance_scale, recipe.model.resolution)


def _folder(recipe: Recipe) -> Path:
    return recipe.run_root / "base_images" / digest(_origin(recipe))


def _paths(recipe: Recipe) -> dict[str, list[Path]]:
    """Return the paths of all images, by text."""
    folder = _folder(recipe)
    return {text: [folder / f"text-{number}-{i}.png" for i in range(recipe.evaluate.images_per_prompt)]
            for number, text in enumerate(recipe.evaluate_texts)}


def _origin(recipe: Recipe) -> dict[str, object]:
    return origin(recipe, list(recipe.evaluate_texts), sampler_settings(recipe)) | {
        "seed": recipe.evaluate.seed, "images_per_prompt": recipe.evaluate.images_per_prompt}
