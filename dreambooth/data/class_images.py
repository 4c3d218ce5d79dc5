"""Class images for prior preservation: the user's own first, the rest made by the base and kept.

Generated images live under a key of prompt, model and sampler, so that another prompt or base never finds them;
image i has a seed of its own, so that asking for more tops up and never makes one again.
"""

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from PIL.Image import Image

from dreambooth.config.recipe import Recipe
from dreambooth.data.photos import list_photos
from dreambooth.models.pipeline import Sampler
from dreambooth.utils import atomic_files, rng


@dataclass(frozen=True)
class ClassImages:
    """What to use and what is missing. `missing` are (path, seed)."""

    own: list[Path]
    kept: list[Path]
    missing: list[tuple[Path, int]]
    folder: Path

    @property
    def paths(self) -> list[Path]:
        return self.own + self.kept + [path for path, _ in self.missing]

    def __str__(self) -> str:
        made = f"{len(self.own)} own, " if self.own else ""
        return f"{len(self.paths)} class images: {made}{len(self.kept)} kept, {len(self.missing)} to make"


def sampler_of(recipe: Recipe) -> Sampler:
    """How class images are made."""
    return Sampler(recipe.prior.num_inference_steps, recipe.prior.guidance_scale, recipe.model.resolution)


def find(recipe: Recipe) -> ClassImages:
    """Look what is there: the user's folder, then images that an earlier run made from the same things."""
    own = list_photos(recipe.class_dir) if recipe.class_dir else []
    origin = _origin(recipe)
    key = sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:10]
    slug = re.sub(r"[^a-z0-9]+", "-", recipe.class_prompt.lower()).strip("-")[:40]
    folder = recipe.run_root / "class_images" / f"{slug}-{key}"
    wanted = [(folder / f"{i:05d}.png", rng.seed(key, i))
              for i in range(max(0, recipe.prior.num_class_images - len(own)))]
    return ClassImages(
        own=own, folder=folder,
        kept=[path for path, _ in wanted if path.is_file()],
        missing=[(path, seed) for path, seed in wanted if not path.is_file()])


def make(
    images: ClassImages,
    recipe: Recipe,
    generate: Callable[[list[int]], list[Image]],
    tick: Callable[[int], None],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Make this process's share of the missing images; each file is whole or not there.

    Shares go by an image's number: what is missing is another list for a process that looks a little later.

    What another run has made meanwhile is passed over: runs that begin at once in one run_root begin at different
    images, and so share the work.

    Args:
        generate: seeds -> pictures of the class prompt.
        tick: told how many were made.
    """
    share = [(path, seed) for path, seed in images.missing if int(path.stem) % world == rank]
    if share and rank == 0:
        atomic_files.write_json(images.folder / "origin.json", _origin(recipe))
    size = recipe.prior.sample_batch_size
    chunks = [share[start:start + size] for start in range(0, len(share), size)]
    first = secrets.randbelow(len(chunks)) if chunks else 0
    for chunk in chunks[first:] + chunks[:first]:
        lacking = [(path, seed) for path, seed in chunk if not path.is_file()]
        pictures = generate([seed for _, seed in lacking]) if lacking else []
        for (path, _), picture in zip(lacking, pictures, strict=True):
            with atomic_files.whole_file(path) as aside:
                picture.save(aside, format="PNG")
        tick(len(chunk))


def _origin(recipe: Recipe) -> dict[str, object]:
    more = {"vae": recipe.model.vae, "zero_terminal_snr": recipe.model.zero_terminal_snr,
            "vae_weights": atomic_files.weights_digest(Path(recipe.vae_source)) if recipe.vae_source else None}
    return {key: value for key, value in more.items() if value} | {
        "prompt": recipe.class_prompt,
        "source": recipe.model.source,
        "revision": recipe.model.revision,
        "variant": recipe.model.variant,
        "weights": atomic_files.weights_digest(Path(recipe.source)),
        "precision": recipe.precision.label,
        "sampler": {"name": "dpmsolver++", **asdict(sampler_of(recipe))},
    }
