"""Loads the instance photos of all subjects of a run into one list, and the photos that are held out of training."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dreambooth.config.recipe import Recipe
from dreambooth.data import aspect_buckets
from dreambooth.data.photo_checks import measure
from dreambooth.data.photos import Load, Photo, list_photos, load_photos
from dreambooth.errors import UserError
from dreambooth.utils.plurals import counted

MIN_TRAINING_PHOTOS = 3  # photos of a subject that must remain; the paper trains with 3 to 5 (Ruiz et al. 2023, sec. 4)


def instance_paths(subject_recipe: Recipe) -> tuple[list[Path], list[Path]]:
    """Return the photos of one subject that train, and those of its instance_dir that are held out.

    Of n photos, sorted by name, the held-out photo i of k is the photo floor((i + 1/2) n / k). The choice therefore
    depends on nothing but the names, and neighbours, which are often alike, are rarely held out together.

    Raises:
        UserError: the folder cannot be used, or too few photos would remain for training.
    """
    paths, count = list_photos(subject_recipe.instance_dir), subject_recipe.dataset.validation_count
    if count and len(paths) - count < MIN_TRAINING_PHOTOS:
        most = len(paths) - MIN_TRAINING_PHOTOS
        raise UserError(f"dataset.validation_count={count} of the {counted(len(paths), 'photo')} in "
                        f"{subject_recipe.instance_dir} would leave fewer than {MIN_TRAINING_PHOTOS} to train on: type "
                        + (f"dataset.validation_count={most}, or " if most > 0 else "dataset.validation_count=0, or ")
                        + "add photos")
    held_out = [paths[(2 * i + 1) * len(paths) // (2 * count)] for i in range(count)]
    left_out = set(held_out)
    return [path for path in paths if path not in left_out], held_out


def load_held_out_photos(recipe: Recipe, training: Sequence[Photo], load: Load | None = None) -> list[Photo]:
    """Load the photos of all subjects that do not train, in the order of the subjects; [] if there are none.

    They are those that dataset.validation_count takes out of each instance_dir, or those in each validation_dir.

    Args:
        training: the photos that train.
        load: see `load_photos`.

    Raises:
        UserError: a folder or file cannot be used, a photo's mask is empty inside the centre crop, or a held-out photo
            has the same pixels as one that trains.
    """
    photos: list[Photo] = []
    for subject_recipe in recipe.subject_recipes:
        folder = subject_recipe.validation_dir
        paths = list_photos(folder, "dataset.validation_dir") if folder else instance_paths(subject_recipe)[1]
        photos += _load(recipe, subject_recipe, paths, load)
    _check_masks(photos, recipe.model.resolution)
    trained = {(photo.pixels.shape, photo.digest): photo for photo in training}
    for photo in photos:
        if twin := trained.get((photo.pixels.shape, photo.digest)):
            raise UserError(f"{photo.path.name} is held out of training, and {twin.path} is the same photo: remove one "
                            "of the two, because the loss on a photo that trains says nothing about others")
    return photos


def _load(recipe: Recipe, subject_recipe: Recipe, paths: Sequence[Path], load: Load | None) -> list[Photo]:
    return load_photos(paths, subject_recipe.instance_prompt, recipe.model.resolution, recipe.dataset.buckets,
                       subject_recipe.dataset.mask, load) if paths else []


def load_subject_photos(recipe: Recipe, load: Load | None = None) -> tuple[list[Photo], list[int]]:
    """Load the instance photos of all subjects that train, in the order of the subjects.

    Args:
        load: see `load_photos`.

    Returns:
        The photos, and for each photo the `repeats` of its subject: how often the photo is used per epoch.

    Raises:
        UserError: a folder or file cannot be used, or a photo's mask is empty inside the centre crop.
    """
    photos: list[Photo] = []
    repeats: list[int] = []
    for subject_recipe, subject in zip(recipe.subject_recipes, recipe.dataset.subjects, strict=True):
        loaded = _load(recipe, subject_recipe, instance_paths(subject_recipe)[0], load)
        photos += loaded
        repeats += [subject.repeats] * len(loaded)
    if recipe.dataset.center_crop:
        _check_masks(photos, recipe.model.resolution)
    return photos, repeats


def _check_masks(photos: Sequence[Photo], resolution: int) -> None:
    outside = [photo.path.name for photo in photos if photo.mask is not None
               and not measure(photo, resolution).mask_in_centre]
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
