"""Photos and prompts -> batches. A batch is a function of (seed, step, process), nothing else.

Sample `index` of step `step` is the same photo, crop, flip, noise and timestep whether it is computed in one
batch, in micro-batches or on another process; a resumed run needs no state from here.

A batch is made in two parts: `draw` is chance, on the host, and may run in a thread ahead of its step (ahead.py);
`place` is what needs the device, in the step's own thread.
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
        order = rng.order(len(self.photos), seed, epoch, self.stream, "order")
        dice = rng.stream(seed, step, index, self.stream, "view")
        up, left, mirror = dice.random(3)
        return View(
            photo=order[position],
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
                yield self.encode(self.pixels(concept, chunk))
                tick(len(chunk))

        content = [f"{self.resolution}", *(sha256(concept.photos[v.photo].pixels.tobytes()).hexdigest() + str(v.flip)
                                           for v in views)]
        self._kept[concept.stream] = self.keep(content, encoded)

    @property
    def cached(self) -> bool:
        return bool(self._kept)

    def sample(self, concept: Concept, views: Sequence[View], noise: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Draw latents (N, C, h, w) for `views`; the cache keeps the distribution, so each draw differs.

        Args:
            pixels: of `views`, to encode where nothing is cached; None: made here.
        """
        if self._kept:
            mean, std = self._kept[concept.stream]([self._rows[concept.stream, v.photo, v.flip] for v in views])
        else:
            mean, std = self.encode(self.pixels(concept, views) if pixels is None else pixels)
        return (mean + std * noise.to(mean)) * self.scaling_factor

    def pixels(self, concept: Concept, views: Sequence[View]) -> Tensor:
        """(N, 3, H, W) in [-1, 1], on the host."""
        squares = [square(concept.photos[v.photo].pixels, self.resolution, v.crop, v.flip) for v in views]
        return torch.from_numpy(np.stack([to_model_range(pixels) for pixels in squares]))


@dataclass(frozen=True)
class Drawn:
    """What chance decides for the samples of one concept in a micro-batch; tensors are on the host."""

    views: Sequence[View]
    pixels: Tensor | None  # (n, 3, H, W) to encode; None: their latents are cached
    spread: Tensor  # (n, C, h, w) standard normal: where in its distribution a latent is drawn
    noise: Tensor  # (n, C, h, w)
    timesteps: Tensor  # (n,) int64


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
        return self.place(self.draw(step))

    def draw(self, step: int) -> list[list[Drawn]]:
        """The host's part of a step's batches: for each micro-batch, each concept's samples."""
        starts = [(micro * self.world + self.rank) * self.batch_size for micro in range(self.accumulation)]
        return [[self._draw(concept, step, range(start, start + self.batch_size)) for concept in self.concepts]
                for start in starts]

    def place(self, drawn: Sequence[Sequence[Drawn]]) -> list[Batch]:
        """The device's part: copy, encode what is not cached. The copies do not wait for the device."""
        made = []
        for micro in drawn:
            parts = [self._place(concept, part) for concept, part in zip(self.concepts, micro, strict=True)]
            latents, noise, timesteps, text = (torch.cat(part) for part in zip(*parts, strict=True))
            made.append(Batch(latents, noise, timesteps, text, instances=self.batch_size))
        return made

    def _draw(self, concept: Concept, step: int, indices: range) -> Drawn:
        total = self.batch_size * self.accumulation * self.world
        views = [concept.view(self.seed, step, index, total) for index in indices]
        keys = [(self.seed, step, index, concept.stream) for index in indices]
        spread = torch.stack([rng.normal(self.latent_shape, *key, "latents") for key in keys])
        noise = torch.stack([self._noise(key) for key in keys])
        timesteps = torch.tensor([int(rng.stream(*key, "timestep").integers(self.timesteps)) for key in keys])
        pixels = None if self.latents.cached else self._pinned(self.latents.pixels(concept, views))
        return Drawn(views, pixels, self._pinned(spread), self._pinned(noise.to(self.dtype)), self._pinned(timesteps))

    def _place(self, concept: Concept, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pixels, spread, noise, timesteps = (
            None if tensor is None else tensor.to(self.device, non_blocking=True)
            for tensor in (drawn.pixels, drawn.spread, drawn.noise, drawn.timesteps))
        assert spread is not None and noise is not None and timesteps is not None
        latents = self.latents.sample(concept, drawn.views, spread, pixels).to(self.device, self.dtype)
        text = torch.cat([self.text(concept.photos[view.photo].caption) for view in drawn.views])
        return latents, noise, timesteps, text

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _noise(self, key: rng.Key) -> Tensor:
        noise = rng.normal(self.latent_shape, *key, "noise")
        if self.noise_offset:
            noise += self.noise_offset * rng.normal((self.latent_shape[0], 1, 1), *key, "offset")
        return noise
