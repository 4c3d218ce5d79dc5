"""Class images for prior preservation: the user's images first, then images that the base model generates.

Later runs reuse generated images. The name of the folder of these images contains a hash of the prompt, the model and
the sampler settings, so that a run with another prompt or base model never uses the images. Each image has its own
seed. A later run that needs more class images therefore generates only the missing images.
"""

import json
import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from PIL.Image import Image

from dreambooth.config.model_defaults import sample_batch_size_if_changed
from dreambooth.config.recipe import Recipe
from dreambooth.data.captions import read_caption, read_metadata
from dreambooth.data.photos import list_photos
from dreambooth.models.pipeline import Sampler
from dreambooth.utils import atomic_files, rng
from dreambooth.utils.image_grid import is_intact_png
from dreambooth.utils.plurals import counted

log = logging.getLogger(__name__)

@dataclass(frozen=True)
class ClassImages:
    """The class images of a run: existing images, and images that must be generated."""

    user_paths: list[Path]  # images in the user's folder
    generated: list[tuple[Path, int]]  # (path, seed) of each other image, by number, whether it exists or not
    missing: list[tuple[Path, int]]  # those of them that must be generated
    folder: Path  # folder of the generated images

    @property
    def existing(self) -> list[Path]:
        """Paths of the images that earlier runs generated. The user's own images are not included."""
        missing = {path for path, _ in self.missing}
        return [path for path, _ in self.generated if path not in missing]

    @property
    def paths(self) -> list[Path]:
        """Paths of all class images, including missing ones. The order does not depend on which images are missing."""
        return self.user_paths + [path for path, _ in self.generated]

    def __str__(self) -> str:
        own = f"{len(self.user_paths)} own, " if self.user_paths else ""
        count = counted(len(self.paths), "class image")
        return f"{count}: {own}{len(self.existing)} existing, {len(self.missing)} to generate"


def sampler_settings(recipe: Recipe) -> Sampler:
    """Return the sampler settings for generating class images."""
    return Sampler(recipe.prior.num_inference_steps, recipe.prior.guidance_scale, recipe.model.resolution)


def find(recipe: Recipe) -> ClassImages:
    """Return the class images that a run needs, and which of them must be generated.

    The user's images come first. Images that earlier runs generated with the same prompt, model and sampler settings
    are reused. If one of these images is damaged, log a warning, and count the image as missing.
    """
    user_paths = list_photos(recipe.class_dir) if recipe.class_dir else []
    key, seed_key = digest(_origin(recipe)), digest(_origin(recipe, batch=False))
    slug = re.sub(r"[^a-z0-9]+", "-", recipe.class_prompt.lower()).strip("-")[:40]
    folder = recipe.run_root / "class_images" / f"{slug}-{key}"
    needed = [(folder / f"{i:05d}.png", rng.seed(seed_key, i))
              for i in range(max(0, recipe.prior.num_class_images - len(user_paths)))]
    images = ClassImages(user_paths, needed, [], folder)
    for path, seed in needed:
        if is_intact_png(path):
            continue
        images.missing.append((path, seed))
        if path.is_file():
            log.warning("the class image %s is damaged and is generated again", path)
    return images


def captions(recipe: Recipe) -> set[str]:
    """Return the captions of the class images of a recipe: the class prompt, and captions of the user's own images."""
    paths = list_photos(recipe.class_dir) if recipe.class_dir else []
    metadata = read_metadata(recipe.class_dir, []) if recipe.class_dir else {}
    found = {read_caption(path, recipe.class_prompt, metadata, []) for path in paths}
    return {recipe.class_prompt} | {caption for caption in found if caption is not None}


def generate_missing(
    images: ClassImages,
    recipe: Recipe,
    generate: Callable[[list[int]], list[Image]],
    tick: Callable[[int], None],
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Generate this process's share of the missing images. Files are written atomically.

    The number in an image's file name decides which process generates it. The position in `images.missing` would be
    wrong: each process has its own list from its own call of `find`, and a later call returns a shorter list if images
    have been generated in between. Batches that another run has generated meanwhile are skipped. Each run starts at a
    random batch, so that simultaneous runs in one run_root share the work.

    The number in the file name also decides the batch of an image. If any image of a batch is missing, the whole batch
    is generated, but only the missing images are written. The reason is that the size of a batch changes the last bits
    of its images: with smaller batches, an image would depend on when an earlier run was interrupted.

    Args:
        generate: takes a list of seeds, returns one image of the class prompt per seed.
        tick: called with the number of images generated or skipped since the previous call.
        rank: number of this process.
        world_size: number of processes that share the work.
    """
    share = [(path, seed) for path, seed in images.generated if int(path.stem) % world_size == rank]
    if images.missing and rank == 0:
        atomic_files.write_json(images.folder / "origin.json", _origin(recipe))
    size = recipe.prior.sample_batch_size
    missing = set(images.missing)
    chunks = [chunk for start in range(0, len(share), size) if missing.intersection(chunk := share[start:start + size])]
    first = secrets.randbelow(len(chunks)) if chunks else 0
    for chunk in chunks[first:] + chunks[:first]:
        if not all(is_intact_png(path) for path, _ in chunk):
            for (path, _), picture in zip(chunk, generate([seed for _, seed in chunk]), strict=True):
                if not is_intact_png(path):
                    with atomic_files.write_file(path) as temporary:
                        picture.save(temporary, format="PNG")
        tick(len(missing.intersection(chunk)))


def digest(origin: dict[str, object]) -> str:
    """Return a hash of settings, for the name of a folder."""
    return sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:10]


def _origin(recipe: Recipe, batch: bool = True) -> dict[str, object]:
    """Return the settings that determine the class images. The seeds are computed from them without `batch`."""
    return origin(recipe, recipe.class_prompt, sampler_settings(recipe), batch)


def origin(recipe: Recipe, prompt: object, sampler: Sampler, batch: bool = True) -> dict[str, object]:
    """Return the settings that determine images of the base model. If `batch` is false, leave out the size of batches.

    The names of the folders of class images and of evaluation/base_images.py contain a hash of these settings. Do not
    change a key or a value: otherwise later runs would not find the images of earlier runs.
    """
    optional = {"vae": recipe.model.vae, "zero_terminal_snr": recipe.model.zero_terminal_snr,
                "vae_weights": atomic_files.weights_digest(Path(recipe.vae_source)) if recipe.vae_source else None}
    size = sample_batch_size_if_changed(recipe.model.name, recipe.prior.sample_batch_size) if batch else {}
    return {key: value for key, value in optional.items() if value} | size | {
        "prompt": prompt,
        "source": recipe.model.source,
        "revision": recipe.model.revision,
        "variant": recipe.model.variant,
        "weights": atomic_files.weights_digest(Path(recipe.source)),
        "precision": recipe.precision.label,
        "sampler": {"name": "dpmsolver++", **asdict(sampler)},
    }
