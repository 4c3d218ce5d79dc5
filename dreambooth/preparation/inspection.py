"""Inspects a folder of photos: which files can be used, what a run does with each, and what should be improved.

The checks of single photos are those that a run prints before training (data/photo_checks.py). This module adds what
needs the whole set or only helps before a run: exact copies, sharpness relative to the set, exposure and variety.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from dreambooth.data import color_profiles, image_formats, photo_checks, photos
from dreambooth.data.photos import Photo
from dreambooth.preparation.progress import digest
from dreambooth.utils.plurals import counted

SOFT = 0.1  # fraction of the median detail of the set, below which a photo is softer than the others
DARK, BRIGHT = 48, 208  # grey levels (0 to 255) that 95 % of a dark or bright photo are below or above
EXPOSURE_SHARE = 95  # percent
FEW = 3  # photos; DreamBooth needs 3 to 5 (Ruiz et al. 2023, abstract)
MIN_VARIETY = 12  # mean number of different bits of two hashes; two unrelated pictures differ in 32 of 64
ORIENTATION = 0x0112  # EXIF tag


@dataclass
class SourcePhoto:
    """One file of the folder, and what was found out about it."""

    path: Path
    digest: str = ""  # SHA-256 of the file
    photo: Photo | None = None  # decoded at the model's resolution; None if the file cannot be used
    problem: str | None = None  # why the file cannot be used; a sentence that starts with its name
    copy_of: str | None = None  # name of an earlier file with the same picture
    file_format: str = ""  # by Pillow's name, such as JPEG
    mode: str = ""  # of the pixels in the file, by Pillow's name, such as CMYK
    orientation: int = 1  # of EXIF; 1: upright
    profile: str | None = None  # name of the colour profile, if its colours are converted to sRGB
    detail: float | None = None  # see photo_checks.detail; None without contrast
    remarks: list[str] = field(default_factory=list)  # sentences that start with the file's name

    @property
    def usable(self) -> bool:
        """Whether the photo is a picture of its own that can be used."""
        return self.photo is not None and self.copy_of is None

    @property
    def notes(self) -> list[str]:
        """What is done with the photo without anybody's help, such as "turned upright"."""
        notes = [f"turned upright (EXIF orientation {self.orientation})"] * (self.orientation != 1)
        notes += [f"converted to sRGB from {self.profile}"] * (self.profile is not None)
        if self.path.is_symlink():
            notes.append(f"is a link to {self.path.resolve()}")
        return notes


@dataclass
class Inspection:
    """The files of a folder, and remarks about all of them together."""

    files: list[SourcePhoto]
    resolution: int  # side of the model's square crop in pixels
    remarks: list[str] = field(default_factory=list)  # about several photos, or about the set
    alike: list[list[SourcePhoto]] = field(default_factory=list)  # groups of photos that look alike
    variety: float | None = None  # mean number of different bits of two hashes of 64 bits; None for less than 2 photos

    @property
    def usable(self) -> list[SourcePhoto]:
        """The photos that can be used, without exact copies."""
        return [file for file in self.files if file.usable]


def inspect_file(path: Path, resolution: int) -> SourcePhoto:
    """Read and decode one file. Never raises for a file that cannot be used."""
    found, problems = SourcePhoto(path), list[str]()
    photo = photos.load_photo(path, resolution, problems)
    if photo is None:
        found.problem = problems[0]
        return found
    found.photo = photo
    content = path.read_bytes()
    found.digest = digest(content)
    with suppress(Exception), warnings.catch_warnings():  # the header is only described
        warnings.simplefilter("ignore")
        with Image.open(BytesIO(content), formats=image_formats.readable_formats()) as image:
            found.file_format, found.mode = image.format or "", image.mode
            found.orientation = int(image.getexif().get(ORIENTATION, 1))
            if color_profiles.is_converted(content):
                opened = ImageCms.ImageCmsProfile(BytesIO(image.info["icc_profile"]))
                found.profile = " ".join(ImageCms.getProfileDescription(opened).split()) or "its colour profile"
    return found


def inspect_set(files: Sequence[SourcePhoto], resolution: int) -> Inspection:
    """Find exact copies, and add the remarks about each photo and about the set."""
    inspection = Inspection(list(files), resolution)
    _find_copies(inspection.files)
    usable = inspection.usable
    loaded = [file.photo for file in usable if file.photo is not None]
    for finding in photo_checks.find_faults(loaded, resolution):
        if len(finding.numbers) == 1:
            usable[finding.numbers[0]].remarks.append(finding.sentence)
        else:
            inspection.remarks.append(finding.sentence)
        if finding.kind == "alike":
            inspection.alike.append([usable[number] for number in finding.numbers])
    crops = {number: photo_checks.grey_crop(photo, resolution) for number, photo in enumerate(loaded)}
    crops = {number: crop for number, crop in crops.items() if photo_checks.has_contrast(crop)}
    for number, crop in crops.items():
        usable[number].detail = photo_checks.detail(crop)
        if exposure := _describe_exposure(crop):
            usable[number].remarks.append(f"{usable[number].path.name} {exposure}")
    _compare_sharpness([usable[number] for number in crops])
    inspection.variety = _measure_variety([photo_checks.perceptual_hash(crop) for crop in crops.values()])
    inspection.remarks += _describe_set(inspection)
    return inspection


def best_of(group: Sequence[SourcePhoto]) -> SourcePhoto:
    """Return the photo of a group to keep: the one with the most pixels, then with the most detail."""
    def rank(file: SourcePhoto) -> tuple[int, float]:
        assert file.photo is not None
        height, width = file.photo.original_size
        return height * width, file.detail or 0.0

    return max(group, key=rank)


def _find_copies(files: Sequence[SourcePhoto]) -> None:
    """Mark files whose upright picture in sRGB has the same size and pixels as that of an earlier file."""
    seen: dict[tuple[tuple[int, ...], str], str] = {}
    for file in files:
        if file.photo is not None:
            key = file.photo.original_size, digest(file.photo.pixels.tobytes())
            first = seen.setdefault(key, file.path.name)
            file.copy_of = None if first == file.path.name else first


def _describe_exposure(crop: Image.Image) -> str | None:
    """Return a remark if almost all of a grey image is dark or bright. A bright background alone gives no remark."""
    low, high = np.percentile(np.asarray(crop), [100 - EXPOSURE_SHARE, EXPOSURE_SHARE])
    if high < DARK:
        return "is very dark: brighten it, or take another one"
    return "is overexposed: darken it, or take another one" if low > BRIGHT else None


def _compare_sharpness(files: Sequence[SourcePhoto]) -> None:
    """Add a remark to photos that have far less detail than the others, but are not blurred by the fixed limit.

    Photos that are much enlarged have a remark of their own.
    """
    files = [file for file in files if file.photo is not None
             and photo_checks.enlargement(file.photo) <= photo_checks.MAX_ENLARGEMENT]
    details = [file.detail for file in files if file.detail is not None]
    if len(details) < FEW:
        return
    median = statistics.median(details)
    for file in files:
        if file.detail is not None and photo_checks.MIN_DETAIL <= file.detail < SOFT * median:
            file.remarks.append(f"{file.path.name} is much softer than the other photos: look whether the subject is "
                                "sharp")


def _measure_variety(hashes: Sequence[int]) -> float | None:
    """Return the mean number of different bits of two hashes, over all pairs; None if there is no pair."""
    count = len(hashes)
    ones = [sum(value >> bit & 1 for value in hashes) for bit in range(64)]
    different = sum(number * (count - number) for number in ones)  # pairs, counted once for each bit that differs
    return different / (count * (count - 1) / 2) if count > 1 else None


def _describe_set(inspection: Inspection) -> list[str]:
    count, remarks = len(inspection.usable), []
    if 0 < count < FEW:
        remarks.append(f"there {'is' if count == 1 else 'are'} only {counted(count, 'photo')}: take at least {FEW}, "
                       "from several sides and in different places")
    if count >= FEW and inspection.variety is not None and inspection.variety < MIN_VARIETY:
        remarks.append("the photos are much alike: take some from other sides and in other places, because what is the "
                       "same in all photos is learned too")
    return remarks
