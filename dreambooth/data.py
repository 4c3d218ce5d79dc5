"""Photos and prompts -> batches. A batch is a function of (seed, step, process), nothing else.

Sample `index` of step `step` is the same photo, crop, flip, noise and timestep whether it is computed in one
batch, in micro-batches or on another process; a resumed run needs no state from here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from dreambooth import rng
from dreambooth.latents import Keep, Moments
from dreambooth.photos import Photo, square, to_model_range


@dataclass(frozen=True)
class Batch:
    """One micro-batch: instance rows first, then as many class rows, on the training device."""

    latents: Tensor  # (N, C, h, w), scaled
    noise: Tensor  # (N, C, h, w)
    timesteps: Tensor  # (N,) int64
    text: Tensor  # (N, L) token ids, or (N, L, D) hidden states when text is cached
    instances: int

    def rows(self, part: slice) -> "Batch":
        """Some of the rows, all of one concept."""
        latents, noise, timesteps, text = (
            tensor[part] for tensor in (self.latents, self.noise, self.timesteps, self.text))
        return Batch(latents, noise, timesteps, text, instances=len(timesteps))


@dataclass(frozen=True)
class View:
    """One look at a photo. `crop` is None for the centre, else fractions of the free range, (vertical, horizontal)."""

    photo: int
    flip: bool
    crop: tuple[float, float] | None


@dataclass(frozen=True)
class Concept:
    """Photos of one thing; `stream` keeps its random numbers apart from the other concept's."""

    stream: str
    photos: Sequence[Photo]
    center_crop: bool
    random_flip: bool

    def view(self, seed: int, step: int, index: int, batch: int) -> View:
        """Sample `index` of `batch` samples of a step. Photos come in a new random order each time round."""
        epoch, position = divmod(step * batch + index, len(self.photos))
        order = rng.stream(seed, epoch, self.stream, "order").permutation(len(self.photos))
        dice = rng.stream(seed, step, index, self.stream, "view")
        up, left, mirror = dice.random(3)
        return View(
            photo=int(order[position]),
            flip=self.random_flip and bool(mirror < 0.5),
            crop=None if self.center_crop else (float(up), float(left)),
        )


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
        self._kept: dict[str, Callable[[list[int]], Moments]] = {}

    def fill(self, concept: Concept, tick: Callable[[int], None], size: int | None = None) -> None:
        """Encode every photo of a centre-cropped concept once, mirrored too if it may be mirrored."""
        size = size or at_a_time(self.resolution)
        views = [View(i, flip, None) for i in range(len(concept.photos))
                 for flip in ((False, True) if concept.random_flip else (False,))]
        self._rows |= {(concept.stream, view.photo, view.flip): row for row, view in enumerate(views)}

        def encoded() -> Iterator[Moments]:
            for start in range(0, len(views), size):
                chunk = views[start:start + size]
                yield self.encode(self._pixels(concept, chunk))
                tick(len(chunk))

        content = [f"{self.resolution}", *(sha256(concept.photos[v.photo].pixels.tobytes()).hexdigest() + str(v.flip)
                                           for v in views)]
        self._kept[concept.stream] = self.keep(content, encoded)

    def sample(self, concept: Concept, views: Sequence[View], noise: Tensor) -> Tensor:
        """Draw latents (N, C, h, w) for `views`; the cache keeps the distribution, so each draw differs."""
        if self._kept:
            mean, std = self._kept[concept.stream]([self._rows[concept.stream, v.photo, v.flip] for v in views])
        else:
            mean, std = self.encode(self._pixels(concept, views))
        return (mean + std * noise.to(mean)) * self.scaling_factor

    def _pixels(self, concept: Concept, views: Sequence[View]) -> Tensor:
        squares = [square(concept.photos[v.photo].pixels, self.resolution, v.crop, v.flip) for v in views]
        return torch.from_numpy(np.stack([to_model_range(pixels) for pixels in squares]))


@dataclass
class Batches:
    """Makes the micro-batches of a step for one process."""

    concepts: Sequence[Concept]  # the subject, then its class if there is prior preservation
    latents: Latents
    text: Callable[[str], Tensor]  # prompt -> (1, L) ids or (1, L, D) hidden states on the device
    latent_shape: tuple[int, int, int]
    timesteps: int  # T of the noise schedule
    seed: int
    batch_size: int
    accumulation: int
    device: torch.device
    rank: int = 0
    world: int = 1
    noise_offset: float = 0.0
    dtype: torch.dtype = torch.float32

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of the step that follows `step` completed ones."""
        return [self._micro(step, micro) for micro in range(self.accumulation)]

    def _micro(self, step: int, micro: int) -> Batch:
        start = (micro * self.world + self.rank) * self.batch_size
        indices = range(start, start + self.batch_size)
        parts = [self._half(concept, step, indices) for concept in self.concepts]
        latents, noise, timesteps, text = (torch.cat(part) for part in zip(*parts, strict=True))
        return Batch(latents, noise, timesteps, text, instances=self.batch_size)

    def _half(self, concept: Concept, step: int, indices: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = self.batch_size * self.accumulation * self.world
        views = [concept.view(self.seed, step, index, total) for index in indices]
        keys = [(self.seed, step, index, concept.stream) for index in indices]
        spread = torch.stack([rng.normal(self.latent_shape, *key, "latents") for key in keys])
        noise = torch.stack([self._noise(key) for key in keys])
        timesteps = torch.tensor([int(rng.stream(*key, "timestep").integers(self.timesteps)) for key in keys])
        text = torch.cat([self.text(concept.photos[view.photo].caption) for view in views])
        latents = self.latents.sample(concept, views, spread)
        return (latents.to(self.device, self.dtype), noise.to(self.device, self.dtype),
                timesteps.to(self.device), text)

    def _noise(self, key: rng.Key) -> Tensor:
        noise = rng.normal(self.latent_shape, *key, "noise")
        if self.noise_offset:
            noise += self.noise_offset * rng.normal((self.latent_shape[0], 1, 1), *key, "offset")
        return noise
