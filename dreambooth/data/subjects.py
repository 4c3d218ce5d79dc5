"""The photos of all subjects of a run, as one list."""

from collections import Counter
from collections.abc import Sequence

from dreambooth.config.recipe import Recipe
from dreambooth.data import aspect_buckets
from dreambooth.data.photos import Photo, cut, list_photos, load_photos
from dreambooth.errors import UserError


def photos(recipe: Recipe) -> tuple[list[Photo], list[int]]:
    """Every photo, subject by subject, and how often each comes in a round.

    Raises:
        UserError: a folder or file cannot be used, or a mask has nothing of the centre that is trained on.
    """
    found: list[Photo] = []
    repeats: list[int] = []
    for one, subject in zip(recipe.subjects, recipe.dataset.subjects, strict=True):
        some = load_photos(list_photos(one.instance_dir), one.instance_prompt, recipe.model.resolution,
                           recipe.dataset.buckets, one.dataset.mask)
        found += some
        repeats += [subject.repeats] * len(some)
    side = recipe.model.resolution
    if recipe.dataset.center_crop:
        missed = [photo.path.name for photo in found
                  if photo.mask is not None and not cut(photo.mask, photo.size or (side, side), None, False).any()]
        if missed:
            raise UserError(f"the mask of {', '.join(missed)} is outside the centre that is trained on: crop the photo "
                            "around the subject, or type dataset.buckets=true to keep its shape")
    return found, repeats


def shapes(found: Sequence[Photo]) -> str:
    """How many photos are in which bucket, and how much of one is cropped at most."""
    counts = Counter(photo.size for photo in found if photo.size)
    told = ", ".join(f"{count} of {size[1]} x {size[0]}" for size, count in counts.most_common())
    most = max(aspect_buckets.lost(photo.pixels.shape[0], photo.pixels.shape[1], photo.size)
               for photo in found if photo.size)
    return f"buckets: {told}; at most {most:.1%} of a photo is cropped"
