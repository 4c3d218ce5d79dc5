"""Photos and prompts -> batches. A batch is a function of (seed, step, process), nothing else.

Sample `index` of step `step` is the same photo, crop, flip, noise and timestep whether it is computed in one
batch, in micro-batches or on another process; a resumed run needs no state from here.

A batch is made in two parts: `draw` is chance, on the host, and may run in a thread ahead of its step (ahead.py);
`place` is what needs the device, in the step's own thread.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from dreambooth.data import masks
from dreambooth.data.aspect_buckets import Size
from dreambooth.data.batch import Batch, joined
from dreambooth.data.bucket_schedule import turn
from dreambooth.data.latent_cache import Keep, Moments
from dreambooth.data.photos import Photo, cut, to_model_range
from dreambooth.utils import rng


@dataclass(frozen=True)
class View:
    """One look at a photo. `crop` is None for the centre, else fractions of the free range, (vertical, horizontal)."""

    photo: int
    flip: bool
    crop: tuple[float, float] | None
    untold: bool = False  # the empty prompt in place of its caption


@dataclass(frozen=True)
class Concept:
    """The photos of one half of a batch: of subjects, or of classes. `stream` keeps its random numbers apart."""

    stream: str
    photos: Sequence[Photo]
    center_crop: bool
    random_flip: bool
    repeats: Sequence[int] | None = None  # how often each photo comes in a round; None: once
    prompt_dropout: float = 0.0  # probability of the empty prompt

    def view(self, seed: int, step: int, index: int, batch: int) -> View:
        """Sample `index` of `batch` samples of a step. Photos come in a new random order each time round; those of a
        step have one size."""
        group, steps = turn([len(photos) for photos in self._rounds.values()], step, seed, self.stream)
        size, photos = list(self._rounds.items())[group]
        epoch, position = divmod(steps * batch + index, len(photos))
        order = rng.order(len(photos), seed, epoch, self.stream, "order", *(size or ()))
        dice = rng.stream(seed, step, index, self.stream, "view")
        up, left, mirror = dice.random(3)
        untold = rng.stream(seed, step, index, self.stream, "untold").random() if self.prompt_dropout else 1.0
        return View(
            photo=photos[order[position]],
            flip=self.random_flip and bool(mirror < 0.5),
            crop=None if self.center_crop else (float(up), float(left)),
            untold=untold < self.prompt_dropout,
        )

    @cached_property
    def _rounds(self) -> dict[Size | None, list[int]]:
        """size -> its photos, each as often as it comes in a round."""
        found: dict[Size | None, list[int]] = {}
        for number, (photo, times) in enumerate(zip(self.photos, self.repeats or [1] * len(self.photos), strict=True)):
            found.setdefault(photo.size, []).extend([number] * times)
        return found


def at_a_time(resolution: int) -> int:
    """Photos that are encoded at a time: a million pixels, at most 16; the VAE's memory grows with them."""
    return max(1, min(16, 2**20 // resolution**2))


class Latents:
    """Latents of views, through `encode` each time or from a cache of the distribution's moments.

    The cache is keyed by photo and mirroring, never by step, and lives where `keep` puts it.
    """

    def __init__(self, encode: Callable[[Tensor], Moments], resolution: int, scaling_factor: float,
                 keep: Keep | None = None) -> None:
        self.encode = encode
        self.keep = keep or Keep()
        self.resolution = resolution
        self.scaling_factor = scaling_factor
        self._rows: dict[tuple[str, int, bool], int] = {}
        self._kept: dict[tuple[str, Size | None], Callable[[list[int]], Moments]] = {}

    def fill(self, concept: Concept, tick: Callable[[int], None], size: int | None = None) -> None:
        """Encode every photo of a centre-cropped concept once, mirrored too if it may be mirrored."""
        for shape in dict.fromkeys(photo.size for photo in concept.photos):
            self._fill(concept, tick, size or at_a_time(self.resolution), shape)

    def _fill(self, concept: Concept, tick: Callable[[int], None], size: int, shape: Size | None) -> None:
        views = [View(i, flip, None) for i, photo in enumerate(concept.photos) if photo.size == shape
                 for flip in ((False, True) if concept.random_flip else (False,))]
        self._rows |= {(concept.stream, view.photo, view.flip): row for row, view in enumerate(views)}

        def encoded() -> Iterator[Moments]:
            for start in range(0, len(views), size):
                chunk = views[start:start + size]
                yield self.encode(self.pixels(concept, chunk))
                tick(len(chunk))

        content = [f"{shape or self.resolution}", *(
            sha256(concept.photos[v.photo].pixels.tobytes()).hexdigest() + str(v.flip) for v in views)]
        self._kept[concept.stream, shape] = self.keep(content, encoded)

    @property
    def cached(self) -> bool:
        return bool(self._kept)

    def sample(self, concept: Concept, views: Sequence[View], noise: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Draw latents (N, C, h, w) for `views` of one size; the cache keeps the distribution, so each draw differs.

        Args:
            pixels: of `views`, to encode where nothing is cached; None: made here.
        """
        if self._kept:
            kept = self._kept[concept.stream, concept.photos[views[0].photo].size]
            mean, std = kept([self._rows[concept.stream, v.photo, v.flip] for v in views])
        else:
            mean, std = self.encode(self.pixels(concept, views) if pixels is None else pixels)
        return (mean + std * noise.to(mean)) * self.scaling_factor

    def pixels(self, concept: Concept, views: Sequence[View]) -> Tensor:
        """(N, 3, H, W) in [-1, 1], on the host."""
        crops = [cut(photo.pixels, self.size(photo), v.crop, v.flip)
                 for v in views for photo in (concept.photos[v.photo],)]
        return torch.from_numpy(np.stack([to_model_range(pixels) for pixels in crops]))

    def size(self, photo: Photo) -> Size:
        """Height and width in pixels that a photo is cropped to."""
        return photo.size or (self.resolution, self.resolution)


@dataclass(frozen=True)
class Drawn:
    """What chance decides for the samples of one concept in a micro-batch; tensors are on the host."""

    views: Sequence[View]
    pixels: Tensor | None  # (n, 3, H, W) to encode; None: their latents are cached
    spread: Tensor  # (n, C, h, w) standard normal: where in its distribution a latent is drawn
    noise: Tensor  # (n, C, h, w)
    timesteps: Tensor  # (n,) int64
    mask: Tensor | None = None  # (n, 1, h, w) of the loss


@dataclass
class Batches:
    """Makes the micro-batches of a step for one process."""

    concepts: Sequence[Concept]  # the subjects, then their classes if there is prior preservation
    latents: Latents
    text: Callable[[str], Tensor]  # prompt -> (1, L) ids or (1, L, D) hidden states on the device
    latent_shape: tuple[int, int, int]  # of the square
    timesteps: int  # T of the noise schedule
    seed: int
    batch_size: int
    accumulation: int
    device: torch.device
    rank: int = 0
    world: int = 1
    noise_offset: float = 0.0
    dtype: torch.dtype = torch.float32
    prompts_once: bool = False  # where all rows of each half have one prompt, text holds it once a half

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of the step that follows `step` completed ones."""
        return self.place(self.draw(step))

    def draw(self, step: int) -> list[list[Drawn]]:
        """The host's part of a step's batches: for each micro-batch, each concept's samples."""
        starts = [(micro * self.world + self.rank) * self.batch_size for micro in range(self.accumulation)]
        return [[self._draw(concept, step, range(start, start + self.batch_size)) for concept in self.concepts]
                for start in starts]

    def place(self, drawn: Sequence[Sequence[Drawn]]) -> list[Batch]:
        """The device's part: copy, encode what is not cached. The copies do not wait for the device."""
        return [joined([self._place(concept, part) for concept, part in zip(self.concepts, micro, strict=True)])
                for micro in drawn]

    def shape(self, photo: Photo) -> tuple[int, int, int]:
        """Of a photo's latents."""
        height, width = (side // self._scale for side in self.latents.size(photo))
        return self.latent_shape[0], height, width

    def mask(self, concept: Concept, views: Sequence[View]) -> Tensor | None:
        """(N, 1, h, w) of `views`, on the host: the share of each latent that counts; None: all of every photo."""
        inside = [None if photo.mask is None else cut(photo.mask, self.latents.size(photo), view.crop, view.flip)
                  for view in views for photo in (concept.photos[view.photo],)]
        if all(photo.mask is None for photo in concept.photos):
            return None
        whole = np.ones(self.shape(concept.photos[views[0].photo])[1:], dtype=np.float32)
        found = [whole if part is None else masks.at_latents(part, self._scale) for part in inside]
        return torch.from_numpy(np.stack(found)).unsqueeze(1).to(self.dtype)

    @cached_property
    def _one_prompt(self) -> bool:
        """Of each half, in every step: a compiled model takes one shape only."""
        alike = (len({photo.caption for photo in concept.photos}) == 1 and not concept.prompt_dropout
                 for concept in self.concepts)
        return self.prompts_once and all(alike)

    @property
    def _scale(self) -> int:
        return self.latents.resolution // self.latent_shape[1]

    def _draw(self, concept: Concept, step: int, indices: range) -> Drawn:
        total = self.batch_size * self.accumulation * self.world
        views = [concept.view(self.seed, step, index, total) for index in indices]
        keys = [(self.seed, step, index, concept.stream) for index in indices]
        shape = self.shape(concept.photos[views[0].photo])
        spread = torch.stack([rng.normal(shape, *key, "latents") for key in keys])
        noise = torch.stack([self._noise(shape, key) for key in keys])
        timesteps = torch.tensor([int(rng.stream(*key, "timestep").integers(self.timesteps)) for key in keys])
        pixels = None if self.latents.cached else self._pinned(self.latents.pixels(concept, views))
        mask = self.mask(concept, views)
        return Drawn(views, pixels, self._pinned(spread), self._pinned(noise.to(self.dtype)), self._pinned(timesteps),
                     None if mask is None else self._pinned(mask))

    def _place(self, concept: Concept, drawn: Drawn) -> Batch:
        pixels, spread, noise, timesteps, mask = (
            None if tensor is None else tensor.to(self.device, non_blocking=True)
            for tensor in (drawn.pixels, drawn.spread, drawn.noise, drawn.timesteps, drawn.mask))
        assert spread is not None and noise is not None and timesteps is not None
        latents = self.latents.sample(concept, drawn.views, spread, pixels).to(self.device, self.dtype)
        views = drawn.views[:1] if self._one_prompt else drawn.views
        text = torch.cat([self.text("" if view.untold else concept.photos[view.photo].caption) for view in views])
        return Batch(latents, noise, timesteps, text, len(timesteps), mask)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _noise(self, shape: tuple[int, int, int], key: rng.Key) -> Tensor:
        noise = rng.normal(shape, *key, "noise")
        if self.noise_offset:
            noise += self.noise_offset * rng.normal((shape[0], 1, 1), *key, "offset")
        return noise
