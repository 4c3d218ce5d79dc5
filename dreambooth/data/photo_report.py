"""The report on the photos of a run that is printed before training: their number, unused files, and warnings.

Imports no torch.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from dreambooth.config.dataset import ALPHA
from dreambooth.config.recipe import Recipe
from dreambooth.data import captions, photo_checks
from dreambooth.data.photo_checks import join_names
from dreambooth.data.photos import IGNORED_NAMES, Photo, photos_in_subfolders
from dreambooth.data.subjects import instance_paths
from dreambooth.utils import quoting
from dreambooth.utils.plurals import counted


def describe_photos(recipe: Recipe, photos: Sequence[Photo]) -> str:
    """Return the report: for each subject the number of photos and the unused files, then all warnings.

    Args:
        photos: all photos that train, as `load_subject_photos` returns them.
    """
    lines: list[str] = []
    warnings = photo_checks.warn(photos, recipe.model.resolution)
    start = 0
    for subject in recipe.subject_recipes:
        folder, mask, (trained, held_out) = subject.instance_dir, subject.dataset.mask, instance_paths(subject)
        paths = [*trained, *held_out]
        mask_folder = Path(mask).absolute() if mask and mask != ALPHA else None
        unused = describe_unused_files(folder, paths, [path for path in (
            subject.class_dir, mask_folder, subject.validation_dir) if path])
        lines.append(f"{counted(len(paths), 'photo')} in {folder}{_describe_held_out(subject, held_out)}"
                     f"{'; left out:' * bool(unused)}")
        lines += [f"  {line}" for line in unused]
        warnings += _prompt_warnings(subject, photos[start:start + len(trained)])
        start += len(trained)
    if warnings:
        lines += ["warnings:", *(f"  {warning}" for warning in warnings)]
    return "\n".join(lines)


def _describe_held_out(subject: Recipe, held_out: Sequence[Path]) -> str:
    """Return the end of the line about a subject's photos: those that do not train; "" if all train."""
    if folder := subject.validation_dir:
        return f"; held out of training: those in {folder}"
    return f"; held out of training: {join_names([path.name for path in held_out])}" if held_out else ""


def describe_unused_files(folder: Path, used: Collection[Path], other_inputs: Collection[Path] = (),
                          key: str = "dataset.instance_dir") -> list[str]:
    """Return one line per subfolder of `folder` that has photos, and one line per kind of unused file in `folder`.

    Hidden files, and subfolders that belong to `other_inputs`, are not mentioned.

    Args:
        used: the photos of the folder that are used.
        other_inputs: folders that the run reads for another purpose, such as a folder of masks.
        key: the key of the configuration whose value is the folder.
    """
    lines = [f"{path.relative_to(folder)}/ has {counted(count, 'photo')}, and subfolders are not searched: "
             f"move them into {folder}, or type {quoting.override(key, str(path))}"
             for path, count in photos_in_subfolders(folder).items()
             if not any(path.is_relative_to(other) for other in other_inputs)]
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
                   and path.name.lower() not in {*IGNORED_NAMES, *captions.METADATA})
    photos = {path.stem for path in used}
    texts = [name for name in names if Path(name).suffix.lower() in captions.TEXT_SUFFIXES
             and Path(name).stem not in photos]
    if texts:
        lines.append(f"{join_names(texts)}: no photo has this name, and the caption of photo.jpg is in photo.txt or "
                     "photo.caption")
    if tables := [name for name in names if Path(name).suffix.lower() in (".json", ".jsonl")]:
        lines.append(f"{join_names(tables)}: captions are read from text files, and from metadata.jsonl or "
                     "metadata.csv with file_name and text")
    return lines


def _prompt_warnings(recipe: Recipe, photos: Sequence[Photo]) -> list[str]:
    """Return a warning if the instance prompt or captions of a subject do not name the subject.

    A text names the subject if it contains a word that is in the instance prompt but not in the class prompt.
    """
    if not recipe.class_prompt.strip():
        return []
    names = _words(recipe.instance_prompt) - _words(recipe.class_prompt)
    if not names:
        return [f'the prompt "{recipe.instance_prompt}" has only words of the class prompt "{recipe.class_prompt}": '
                'add a rare word that names the subject, such as "a photo of a zwx dog"']
    without = [photo.path.name for photo in photos if not names & _words(photo.caption)]
    if not without:
        return []
    return [f"{join_names(without)}: the caption does not name the subject: write {' or '.join(sorted(names))} into it"]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
