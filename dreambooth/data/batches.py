"""Training batches: the photos, crops, noise and timesteps of each step, as a function of the seed and the step.

Sample `index` of step `step` always has the same photo, crop, flip, noise and timestep, whether the samples of the step
are computed in one batch, in micro-batches or by several processes. A checkpoint needs no state of the batches.

A batch is created in two stages. `Batches.draw` makes the random choices and prepares tensors on the host; it may run
in a background thread before the step starts (prefetch.py). `Batches.to_device` copies the tensors to the device and
encodes images with the VAE; it runs in the thread of the training loop.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from dreambooth.data import masks
from dreambooth.data.aspect_buckets import Size
from dreambooth.data.index.ordered_map import available_threads, ordered_map
from dreambooth.data.latent_cache import LatentStore, Moments, ReadRows, rows_per_file
from dreambooth.data.noise import draw_noise
from dreambooth.data.photo_set import PhotoSet, View
from dreambooth.data.photos import Photo, crop_position, crop_to_size, to_model_range
from dreambooth.data.step_shares import StepShares
from dreambooth.utils import rng


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the training device: tensors with N rows, one per sample, all of the same image size.

    An instance row is a sample of an instance photo, a class row is a sample of a class image, or of output
    preservation (training/output_preservation.py). There are three cases:

    - Without prior preservation, all N rows are instance rows.
    - With prior preservation, the first rows are instance rows and the last rows are class rows.
    - With prior preservation and class images whose size is not that of the instance photos, all N rows are instance
      rows. The class rows are in `class_batch`.
    """

    latents: Tensor  # (N, C, h, w), multiplied by the scaling factor of the VAE
    noise: Tensor  # (N, C, h, w)
    timesteps: Tensor  # (N,) int64
    text: Tensor  # prompts: (P, L) token ids or (P, L, D) cached hidden states; each applies to N / P consecutive rows
    num_instances: int  # number of instance rows
    mask: Tensor | None = None  # (N, 1, h, w) in [0, 1]: weight of each latent in the loss; None: all weights are 1
    class_batch: "Batch | None" = None  # class rows of another image size; this batch then has only instance rows
    size_and_crop: Tensor | None = None  # (N, 6), see `Batches.size_and_crop`; None: the model does not use it
    noisy: Tensor | None = None  # (N, C, h, w): the noisy latents; None: NoiseSchedule.add_noise makes them
    target: Tensor | None = None  # (N, C, h, w): what the model is trained to predict; None: see NoiseSchedule.target
    loss_divisor: float | None = None  # see StepShares.loss_divisor

    @property
    def num_samples(self) -> int:
        """Total number of instance rows and class rows, including the rows of `class_batch`."""
        return len(self.timesteps) + (self.class_batch.num_samples if self.class_batch else 0)

    @property
    def with_prior(self) -> bool:
        """Whether the batch has class rows."""
        return self.num_samples > self.num_instances

    @property
    def rows_per_text(self) -> int:
        """Number of consecutive rows to which each item of `text` applies."""
        return len(self.timesteps) // len(self.text)

    def halves(self) -> tuple["Batch", "Batch"]:
        """Return two batches: the first has the instance rows of this batch, the second has the class rows."""
        if self.class_batch is not None:
            return replace(self, class_batch=None), self.class_batch
        return self._rows(0, self.num_instances), self._rows(self.num_instances, len(self.timesteps))

    def _rows(self, start: int, end: int) -> "Batch":
        latents, noise, timesteps = (tensor[start:end] for tensor in (self.latents, self.noise, self.timesteps))
        mask, size_and_crop, noisy, target = (None if tensor is None else tensor[start:end] for tensor in (
            self.mask, self.size_and_crop, self.noisy, self.target))
        return Batch(latents, noise, timesteps, self.text[start // self.rows_per_text:end // self.rows_per_text],
                     len(timesteps), mask, size_and_crop=size_and_crop, noisy=noisy, target=target)


def join_batches(parts: Sequence[Batch]) -> Batch:
    """Return one Batch that contains the instance rows and the class rows of a micro-batch.

    Args:
        parts: a batch of the instance rows, and a batch of the class rows if there is prior preservation. If the image
            sizes differ, the second batch becomes the `class_batch` of the result.
    """
    first = parts[0]
    if len(parts) > 1 and parts[1].latents.shape[1:] != first.latents.shape[1:]:
        return replace(first, class_batch=parts[1])
    latents, noise, timesteps = (torch.cat([getattr(p, k) for p in parts]) for k in ("latents", "noise", "timesteps"))
    rows = math.gcd(*(part.rows_per_text for part in parts))
    counts = [part.rows_per_text // rows for part in parts]
    text = torch.cat([p.text if n == 1 else p.text.repeat_interleave(n, 0) for p, n in zip(parts, counts, strict=True)])
    mask = None
    if any(part.mask is not None for part in parts):
        mask = torch.cat([torch.ones_like(part.latents[:, :1]) if part.mask is None else part.mask for part in parts])
    crop, noisy, target = (None if getattr(first, name) is None else torch.cat([getattr(part, name) for part in parts])
                           for name in ("size_and_crop", "noisy", "target"))
    return Batch(latents, noise, timesteps, text, first.num_instances, mask, None, crop, noisy, target)


def encode_batch_size(resolution: int, device: str) -> int:
    """Return the number of photos per call of the VAE: 1 to 16, with at most about a million pixels in all.

    On a CPU they have at most 2^16 pixels, because larger batches take as much time per photo there, and encoding
    2^16 pixels takes 0.3 GiB at full size. The number for a CPU is a divisor of that for a GPU, so that cache files
    hold whole batches of both.

    Args:
        device: "cpu" or "cuda".
    """
    if device != "cpu":
        return max(1, min(16, 2**20 // resolution**2))
    return next(size for size in (16, 8, 4, 2, 1) if size * resolution**2 <= 2**16 or size == 1)


class Latents:
    """Computes the latents of `View` objects.

    Each view is encoded with the VAE. After a call of `fill`, latents are sampled from the cached distribution instead.
    The cache holds the mean and the standard deviation of the latents of each photo and flip, which are the same in
    every step.
    """

    def __init__(self, encode: Callable[[Tensor], Moments], resolution: int, scaling_factor: float,
                 store: LatentStore | None = None) -> None:
        """Args:
            encode: takes images (N, 3, H, W) in [-1, 1], returns the mean and standard deviation of their latents.
            resolution: side of the square crop in pixels.
            scaling_factor: the scaling factor of the VAE; latents are multiplied by it.
            store: of the cached latents; None: on the device.
        """
        self.encode = encode
        self.store = store or LatentStore()
        self.resolution = resolution
        self.scaling_factor = scaling_factor
        self._rows: dict[tuple[str, int, bool], int] = {}  # (photo set, photo, flip) -> row in the cache
        self._cached: dict[tuple[str, Size | None], ReadRows] = {}

    def fill(self, photo_set: PhotoSet, tick: Callable[[int], None], size: int, multiple: int | None = None) -> None:
        """Encode every photo of a PhotoSet, and add the means and standard deviations to the cache.

        The field `center_crop` of the set must be true. If its field `random_flip` is true, the mirror image of each
        photo is encoded, too.

        Args:
            tick: called with the number of images encoded since the previous call.
            size: number of images per call of the VAE.
            multiple: a multiple of `size`; cache files hold multiples of it. None: `size`.
        """
        for shape in dict.fromkeys(photo.size for photo in photo_set.photos):
            self._fill_bucket(photo_set, tick, size, multiple or size, shape)

    def _fill_bucket(self, photo_set: PhotoSet, tick: Callable[[int], None], size: int, multiple: int,
                     shape: Size | None) -> None:
        views = [View(i, flip, None) for i, photo in enumerate(photo_set.photos) if photo.size == shape
                 for flip in ((False, True) if photo_set.random_flip else (False,))]
        self._rows |= {(photo_set.name, view.photo, view.flip): row for row, view in enumerate(views)}

        def encode_chunks(rows: range) -> Iterator[Moments]:
            chunks = [views[start:min(start + size, rows.stop)] for start in range(rows.start, rows.stop, size)]
            threads = min(2, len(chunks), available_threads())  # the next images are prepared meanwhile
            images = ordered_map(partial(self.pixels, photo_set), chunks, threads)
            for chunk, pixels in zip(chunks, images, strict=True):
                yield self.encode(pixels)
                tick(len(chunk))

        content = [photo_set.photos[view.photo].digest + str(view.flip) for view in views]
        self._cached[photo_set.name, shape] = self.store(
            f"{shape or self.resolution}", content, encode_chunks, rows_per_file(multiple, self.resolution))

    @property
    def cached(self) -> bool:
        """Whether latents come from the cache, because `fill` has been called."""
        return bool(self._cached)

    def sample(self, photo_set: PhotoSet, views: Sequence[View], noise: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Sample latents (N, C, h, w) for `views` of one image size: (mean + std * noise) * scaling_factor.

        The cache holds the distribution, so different noise gives different latents of the same photo.

        Args:
            noise: standard normal, (N, C, h, w).
            pixels: the cropped images of `views`, ignored if there is a cache; None: crop the photos in this call.
        """
        if self._cached:
            read_rows = self._cached[photo_set.name, photo_set.photos[views[0].photo].size]
            mean, std = read_rows([self._rows[photo_set.name, v.photo, v.flip] for v in views])
        else:
            mean, std = self.encode(self.pixels(photo_set, views) if pixels is None else pixels)
        return (mean + std * noise.to(mean)) * self.scaling_factor

    def pixels(self, photo_set: PhotoSet, views: Sequence[View]) -> Tensor:
        """Return the cropped images of `views`, (N, 3, H, W) in [-1, 1], on the host."""
        crops = [crop_to_size(photo.pixels, self.size(photo), v.crop, v.flip)
                 for v in views for photo in (photo_set.photos[v.photo],)]
        return torch.from_numpy(np.stack([to_model_range(pixels) for pixels in crops]))

    def size(self, photo: Photo) -> Size:
        """Return the (height, width) in pixels to which a photo is cropped."""
        return photo.size or (self.resolution, self.resolution)


@dataclass(frozen=True)
class HostSamples:
    """The samples of one PhotoSet in a micro-batch, before the copy to the device. All tensors are on the host."""

    views: Sequence[View]
    pixels: Tensor | None  # (n, 3, H, W) images to encode; None: the latents are cached
    latent_noise: Tensor  # (n, C, h, w) standard normal, see `Latents.sample`
    noise: Tensor  # (n, C, h, w): the noise that is added to the latents
    timesteps: Tensor  # (n,) int64
    mask: Tensor | None = None  # (n, 1, h, w): weight of each latent in the loss
    size_and_crop: Tensor | None = None  # (n, 6), see `Batches.size_and_crop`


@dataclass
class Batches:
    """Callable that takes the number of completed steps, and returns this process's micro-batches of the next step."""

    photo_sets: Sequence[PhotoSet]  # instance photos, then class images if the run trains on them
    latents: Latents
    encode_prompt: Callable[[str], Tensor]  # prompt -> (1, L) ids or (1, L, D) hidden states on the device
    latent_shape: tuple[int, int, int]  # (C, h, w) of a square crop
    num_timesteps: int  # T of the noise schedule
    seed: int
    batch_size: int  # samples per photo set, micro-batch and process; with a global batch size, the largest number
    accumulation: int  # number of micro-batches per step
    device: torch.device
    rank: int = 0
    world_size: int = 1  # number of processes
    noise_offset: float = 0.0
    multires_noise: float = 0.0  # see noise.py
    dtype: torch.dtype = torch.float32
    with_size_and_crop: bool = False  # the model uses Batch.size_and_crop, see Family.uses_size_and_crop
    share_prompts: bool = False  # if every photo set always has a single prompt, Batch.text holds it once per set
    global_batch_size: int | None = None  # samples per photo set and step, see StepShares

    def __call__(self, step: int) -> list[Batch]:
        """Return the micro-batches of the next step, after `step` completed steps."""
        return self.to_device(self.draw(step))

    def draw(self, step: int) -> list[list[HostSamples]]:
        """Draw the samples of a step on the host.

        Args:
            step: number of completed steps before this one.

        Returns:
            One list per micro-batch, with one item per PhotoSet.
        """
        return [[self._draw_samples(photo_set, step, indices) for photo_set in self.photo_sets]
                for indices in self.shares.micro_batches]

    def to_device(self, samples: Sequence[Sequence[HostSamples]]) -> list[Batch]:
        """Return one Batch per micro-batch from the result of `draw`.

        Tensors are copied to the device asynchronously. Images that have no cached latents are encoded with the VAE.
        """
        return [replace(join_batches([self.make_batch(photo_set, part, self._one_prompt)
                                      for photo_set, part in zip(self.photo_sets, micro, strict=True)]),
                        loss_divisor=self.shares.loss_divisor(len(micro[0].views))) for micro in samples]

    @cached_property
    def shares(self) -> StepShares:
        """The samples of a step that this process computes."""
        return StepShares(self.batch_size, self.accumulation, self.rank, self.world_size, self.global_batch_size)

    def latent_shape_of(self, photo: Photo) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latents of a photo."""
        height, width = (side // self._scale for side in self.latents.size(photo))
        return self.latent_shape[0], height, width

    def loss_mask(self, photo_set: PhotoSet, views: Sequence[View]) -> Tensor | None:
        """Return the loss weight of each latent of `views` as a tensor (N, 1, h, w) on the host.

        Return None if no photo of the set has a mask. Otherwise all weights of a photo without a mask are 1.
        """
        if not photo_set.has_masks:
            return None
        photos = [photo_set.photos[view.photo] for view in views]
        crops = [None if photo.mask is None else crop_to_size(photo.mask, self.latents.size(photo), v.crop, v.flip)
                 for v, photo in zip(views, photos, strict=True)]
        ones = np.ones(self.latent_shape_of(photos[0])[1:], dtype=np.float32)
        weights = [ones if crop is None else masks.downscale_to_latents(crop, self._scale) for crop in crops]
        return torch.from_numpy(np.stack(weights)).unsqueeze(1).to(self.dtype)

    def size_and_crop(self, photo_set: PhotoSet, views: Sequence[View]) -> Tensor | None:
        """Return the original size, crop position and crop size of `views`, in pixels; None if the model ignores them.

        Returns:
            (N, 6) on the host: height and width of the photo before it was resized; row and column of the resized (and
            mirrored) photo at which the crop starts; height and width of the crop.
        """
        if not self.with_size_and_crop:
            return None
        rows = []
        for view in views:
            photo = photo_set.photos[view.photo]
            height, width = self.latents.size(photo)
            top, left = crop_position(photo.pixels, (height, width), view.crop)
            if view.flip:
                left = photo.pixels.shape[1] - width - left
            rows.append((*photo.original_size, top, left, height, width))
        return torch.tensor(rows, dtype=torch.float32)

    @cached_property
    def _one_prompt(self) -> bool:
        """Whether Batch.text holds one prompt per PhotoSet, not one per row. Compiled models need constant shapes."""
        alike = (len({photo.caption for photo in photo_set.photos}) == 1 and not photo_set.prompt_dropout
                 for photo_set in self.photo_sets)
        return self.share_prompts and all(alike)

    @property
    def _scale(self) -> int:
        """Pixels per latent along one side."""
        return self.latents.resolution // self.latent_shape[1]

    def _draw_samples(self, photo_set: PhotoSet, step: int, indices: range) -> HostSamples:
        views = [photo_set.view(self.seed, step, index, self.shares.samples_per_step) for index in indices]
        keys = [(self.seed, step, index, photo_set.name) for index in indices]
        timesteps = [int(rng.stream(*key, "timestep").integers(self.num_timesteps)) for key in keys]
        return self.draw_views(photo_set, views, keys, timesteps)

    def draw_views(self, photo_set: PhotoSet, views: Sequence[View], keys: Sequence[rng.Key],
                   timesteps: Sequence[int]) -> HostSamples:
        """Draw the samples of `views` on the host, with the random numbers of `keys`, one key per view."""
        shape = self.latent_shape_of(photo_set.photos[views[0].photo])
        latent_noise = torch.stack([rng.normal(shape, *key, "latents") for key in keys])
        noise = torch.stack([draw_noise(shape, key, self.noise_offset, self.multires_noise) for key in keys])
        pixels = None if self.latents.cached else self._pinned(self.latents.pixels(photo_set, views))
        mask, size_and_crop = self.loss_mask(photo_set, views), self.size_and_crop(photo_set, views)
        return HostSamples(views, pixels, self._pinned(latent_noise), self._pinned(noise.to(self.dtype)),
                           self._pinned(torch.tensor(timesteps)), None if mask is None else self._pinned(mask),
                           None if size_and_crop is None else self._pinned(size_and_crop))

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def make_batch(self, photo_set: PhotoSet, samples: HostSamples, one_prompt: bool) -> Batch:
        """Return a batch of the samples. If `one_prompt`, the prompt of the first sample is that of all."""
        pixels, latent_noise, noise, timesteps, mask, size_and_crop = (
            None if tensor is None else tensor.to(self.device, non_blocking=True)
            for tensor in (samples.pixels, samples.latent_noise, samples.noise, samples.timesteps, samples.mask,
                           samples.size_and_crop))
        assert latent_noise is not None and noise is not None and timesteps is not None
        latents = self.latents.sample(photo_set, samples.views, latent_noise, pixels).to(self.device, self.dtype)
        views = samples.views[:1] if one_prompt else samples.views
        text = torch.cat([self.encode_prompt("" if view.drop_prompt else photo_set.photos[view.photo].caption)
                          for view in views])
        return Batch(latents, noise, timesteps, text, len(timesteps), mask, size_and_crop=size_and_crop)
