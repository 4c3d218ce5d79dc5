"""Loads the instance photos of all subjects of a run into one list."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from dreambooth.config.recipe import Recipe
from dreambooth.data import aspect_buckets
from dreambooth.data.captions import class_caption
from dreambooth.data.photos import Photo, crop_to_size, list_photos, load_photos
from dreambooth.errors import UserError


def load_subject_photos(recipe: Recipe) -> tuple[list[Photo], list[int]]:
    """Load the instance photos of all subjects, in the order of the subjects.

    With prior.kind=output, each photo has a class caption.

    Returns:
        The photos, and for each photo the `repeats` of its subject: how often the photo is used per epoch.

    Raises:
        UserError: a folder or file cannot be used, or a photo's mask is empty inside the centre crop.
    """
    photos: list[Photo] = []
    repeats: list[int] = []
    for subject_recipe, subject in zip(recipe.subject_recipes, recipe.dataset.subjects, strict=True):
        loaded = load_photos(
            list_photos(subject_recipe.instance_dir), subject_recipe.instance_prompt, recipe.model.resolution,
            recipe.dataset.buckets, subject_recipe.dataset.mask)
        if recipe.preserves_output:
            loaded = [replace(photo, class_caption=class_caption(
                photo.caption, subject_recipe.instance_prompt, subject_recipe.class_prompt)) for photo in loaded]
        photos += loaded
        repeats += [subject.repeats] * len(loaded)
    if recipe.dataset.center_crop:
        _check_masks(photos, recipe.model.resolution)
    return photos, repeats


def _check_masks(photos: Sequence[Photo], resolution: int) -> None:
    outside = [photo.path.name for photo in photos if photo.mask is not None
               and not crop_to_size(photo.mask, photo.size or (resolution, resolution), None, False).any()]
    if outside:
        raise UserError(f"the mask of {', '.join(outside)} is outside the centre that is trained on: crop the photo "
                        "around the subject, or type dataset.buckets=true to keep its shape")


def describe_buckets(photos: Sequence[Photo]) -> str:
    """Return a message with the number of photos in each bucket, and the largest fraction cropped away from a photo."""
    counts = Counter(photo.size for photo in photos if photo.size)
    buckets = ", ".join(f"{count} of {size[1]} x {size[0]}" for size, count in counts.most_common())
    most = max(aspect_buckets.cropped_fraction(photo.pixels.shape[0], photo.pixels.shape[1], photo.size)
               for photo in photos if photo.size)
    return f"buckets: {buckets}; at most {most:.1%} of a photo is cropped"
