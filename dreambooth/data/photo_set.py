"""A set of photos, and the random choice of the photo, crop and flip of each sample of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dreambooth.data.aspect_buckets import Size
from dreambooth.data.bucket_schedule import bucket_at
from dreambooth.data.photos import Photo
from dreambooth.utils import rng


@dataclass(frozen=True)
class View:
    """One random view of a photo: the index of the photo, the flip, the crop, and whether the prompt is dropped."""

    photo: int  # index into PhotoSet.photos
    flip: bool  # mirror the photo left to right
    crop: tuple[float, float] | None  # offsets (vertical, horizontal) in [0, 1), see `crop_to_size`; None: the centre
    drop_prompt: bool = False  # use the empty prompt instead of the caption


@dataclass(frozen=True)
class PhotoSet:
    """The instance photos or the class images of a run, and the settings for drawing samples from them."""

    name: str  # "instance" or "class": part of the key of every random stream, so that the two sets differ
    photos: Sequence[Photo]
    center_crop: bool
    random_flip: bool
    repeats: Sequence[int] | None = None  # how often each photo is used per epoch; None: each photo once
    prompt_dropout: float = 0.0  # probability of the empty prompt

    def view(self, seed: int, step: int, index: int, batch: int) -> View:
        """Return the View (photo, flip, crop) that sample `index` of a step uses.

        An epoch contains each photo as often as `repeats` says. Each epoch has a new random order of the photos. All
        photos of this set that a step uses have the same size.

        Args:
            batch: number of samples of this set per step, over all micro-batches and processes.
        """
        bucket, steps = bucket_at([len(photos) for photos in self._rounds.values()], step, seed, self.name)
        size, photos = list(self._rounds.items())[bucket]
        epoch, position = divmod(steps * batch + index, len(photos))
        order = rng.permutation(len(photos), seed, epoch, self.name, "order", *(size or ()))
        generator = rng.stream(seed, step, index, self.name, "view")
        up, left, mirror = generator.random(3)
        # "untold" names the random stream: another name would change which prompts existing runs drop.
        dropout = rng.stream(seed, step, index, self.name, "untold").random() if self.prompt_dropout else 1.0
        return View(
            photo=photos[order[position]],
            flip=self.random_flip and bool(mirror < 0.5),
            crop=None if self.center_crop else (float(up), float(left)),
            drop_prompt=dropout < self.prompt_dropout,
        )

    @cached_property
    def has_masks(self) -> bool:
        """Whether at least one photo has a mask."""
        return any(photo.mask is not None for photo in self.photos)

    @cached_property
    def _rounds(self) -> dict[Size | None, list[int]]:
        """Dictionary from bucket size to the indices of the bucket's photos in one epoch.

        The index of a photo occurs as often as the photo is used per epoch.
        """
        rounds: dict[Size | None, list[int]] = {}
        for number, (photo, times) in enumerate(zip(self.photos, self.repeats or [1] * len(self.photos), strict=True)):
            rounds.setdefault(photo.size, []).extend([number] * times)
        return rounds
