"""Checks that find photos from which a subject is learned badly. They warn only: a run trains on every readable photo.

Each check returns sentences that start with the names of the photos and end with what to do. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dreambooth.data import aspect_buckets
from dreambooth.data.index.ordered_map import ordered_map
from dreambooth.data.photos import Facts, Photo, crop_to_size

if TYPE_CHECKING:
    from PIL import Image

MAX_ENLARGEMENT = 4  # a photo that is enlarged by more has less than a quarter of the resolution
MAX_CROPPED = 0.5  # fraction of a photo's area that a crop may lose
MAX_HASH_DISTANCE = 6  # different bits of two perceptual hashes of 64 bits, up to which two photos look alike
MIN_DETAIL = 0.003  # see `detail`; sharp photos have 0.08 and more, also with a blurred background
MIN_CONTRAST = 8  # standard deviation of grey levels (0 to 255), below which detail and hashes mean nothing
MAX_NAMES = 5  # photos that one sentence names


@dataclass(frozen=True)
class Finding:
    """One fault of one photo, or of a group of photos."""

    kind: str  # file, enlarged, cropped, contrast, blurred, alike, package
    numbers: tuple[int, ...]  # indices of the photos
    sentence: str  # starts with the names of the photos


def warn(photos: Sequence[Photo], resolution: int) -> list[str]:
    """Return one warning per photo and fault, and one per group of photos that look alike.

    Args:
        resolution: side of the square crop in pixels; used for photos without an aspect-ratio bucket.
    """
    return [finding.sentence for finding in find_faults(photos, resolution)]


def find_faults(photos: Sequence[Photo], resolution: int) -> list[Finding]:
    """Return one finding per photo and fault, and one per group of photos that look alike. Arguments are as in `warn`.
    """
    findings: list[Finding] = []
    for number, photo in enumerate(photos):
        findings += [Finding("file", (number,), f"{photo.path.name} {remark}") for remark in photo.remarks]
        findings += [Finding(kind, (number,), sentence)
                     for kind, sentence in _size_warnings(photo, photo.size or (resolution, resolution))]
    facts = list(ordered_map(partial(measure, resolution=resolution), photos))
    findings += [Finding("contrast", (number,), f"{photo.path.name} has almost no contrast: take another one, because "
                         "nothing can be seen in it")
                 for number, photo in enumerate(photos) if not facts[number].contrast]
    findings += [Finding("blurred", (number,), f"{photos[number].path.name} is blurred: take a sharp one, because blur "
                         "is learned too")
                 for number, photo in enumerate(photos) if enlargement(photo) <= MAX_ENLARGEMENT
                 and (of_photo := facts[number].detail) is not None and of_photo < MIN_DETAIL]
    if find_spec("imagehash") is None:  # after an update of the code alone
        return [*findings, Finding("package", (), "photos that look alike are not found without a package: type pip "
                                   "install imagehash")]
    for group in _groups_alike({number: one.hash for number, one in enumerate(facts) if one.hash is not None}):
        names = join_names([photos[number].path.name for number in group])
        findings.append(Finding("alike", tuple(group), f"{names} look alike: keep one of them, because a photo that is "
                                "used more often is memorised"))
    return findings


def join_names(names: Sequence[str]) -> str:
    """Return a text with the first MAX_NAMES names and the number of the others, such as "a.jpg, b.jpg and 3 more"."""
    others = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {others} more" if others > 0 else "")


def enlargement(photo: Photo) -> float:
    """Return the factor by which a photo was enlarged to the resolution. It is below 1 for a photo that was reduced."""
    return float(photo.pixels.shape[0] / photo.original_size[0])


def _size_warnings(photo: Photo, size: aspect_buckets.Size) -> Iterator[tuple[str, str]]:
    """Yield the kind and the sentence of each fault of the size."""
    height, width = photo.original_size
    described = f"{photo.path.name} ({width} x {height} pixels)"
    if enlargement(photo) > MAX_ENLARGEMENT:
        yield "enlarged", (f"{described} is enlarged {enlargement(photo):.0f} times to {size[1]} x {size[0]}: use the "
                           "original photo in its full size")
    cropped = aspect_buckets.cropped_fraction(height, width, size)
    if cropped > MAX_CROPPED:
        yield "cropped", (f"{described} loses {cropped:.1%} of its area when it is cropped to {size[1]} x {size[0]}: "
                          "crop it around the subject" + ("" if photo.size else ", or type dataset.buckets=true"))


def measure(photo: Photo, resolution: int) -> Facts:
    """Return the facts about a photo's pixels, which are measured unless the photo has them already.

    Args:
        resolution: side of the square crop in pixels; used for photos without an aspect-ratio bucket.
    """
    if photo.facts:
        return photo.facts
    grey = grey_crop(photo, resolution)
    contrast = has_contrast(grey)
    mask = None if photo.mask is None else crop_to_size(photo.mask, photo.size or (resolution, resolution), None, False)
    hashed = contrast and find_spec("imagehash") is not None
    return Facts(photo.digest, contrast, detail(grey) if contrast else None, perceptual_hash(grey) if hashed else None,
                 mask is None or bool(mask.any()))


def grey_crop(photo: Photo, resolution: int) -> Image.Image:
    """Return the central crop of a photo that is trained on, as a grey image of 8 bits."""
    from PIL import Image

    return Image.fromarray(crop_to_size(photo.pixels, photo.size or (resolution, resolution), None, False)).convert("L")


def has_contrast(grey: Image.Image) -> bool:
    """Return whether something can be seen in a grey image, see MIN_CONTRAST."""
    from PIL import ImageStat

    return ImageStat.Stat(grey).stddev[0] >= MIN_CONTRAST


def detail(grey: Image.Image) -> float:
    """Return the variance of an image's Laplacian, divided by the variance of the image.

    The variance of the Laplacian is a common measure of focus (Pech-Pacheco et al. 2000). The division makes the
    result independent of contrast. Photos are compared at the size to which they are resized for training.
    """
    import numpy as np

    pixels = np.asarray(grey, dtype=np.float32)
    laplacian = (pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:] - 4 * pixels[1:-1, 1:-1])
    return float(laplacian.var() / max(pixels.var(), 1e-9))


def perceptual_hash(crop: Image.Image) -> int:
    """Return the perceptual hash of a grey image: pHash, a number of 64 bits (Zauner 2010)."""
    import imagehash
    import numpy as np

    return int.from_bytes(np.packbits(imagehash.phash(crop).hash).tobytes(), "big")


def _groups_alike(hashes: Mapping[int, int]) -> list[list[int]]:
    """Return groups of two or more images, as keys of `hashes`. Each image looks like the first one of its group.

    Every image is compared with every other, 64 bits at a time: 10,000 images take a tenth of a second.
    """
    import numpy as np

    numbers, values = np.array(list(hashes), dtype=np.int64), np.array(list(hashes.values()), dtype=np.uint64)
    groups: list[list[int]] = []
    while len(values):
        alike = np.bitwise_count(values ^ values[0]) <= MAX_HASH_DISTANCE
        if alike.sum() > 1:
            groups.append(numbers[alike].tolist())
            numbers, values = numbers[~alike], values[~alike]
        else:
            numbers, values = numbers[1:], values[1:]
    return groups
