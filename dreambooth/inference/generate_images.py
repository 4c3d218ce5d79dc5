"""Generates pictures for `python -m dreambooth.generate`, with a run's model or any diffusers model, and with LoRAs.

Each picture is a PNG file with its settings as metadata. One more PNG file, the grid, shows all pictures side by side.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from PIL import Image

from dreambooth.config.eval_prompts import extract_subject, fill_templates
from dreambooth.config.generate import Generate, parse_size
from dreambooth.data import photos
from dreambooth.errors import Interrupted, UserError
from dreambooth.inference import loras
from dreambooth.inference.model_sources import Source, fetch_base, find_source
from dreambooth.inference.picture_request import PictureRequest
from dreambooth.inference.renderer import Renderer
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console
from dreambooth.utils.image_grid import grid
from dreambooth.utils.plurals import counted
from dreambooth.utils.signals import StopRequest


@dataclass(frozen=True)
class PictureFolder:
    """Writes pictures and their grid to a folder."""

    folder: Path
    several_prompts: bool  # if true, file names begin with the prompt's number

    def write(self, number: int, request: PictureRequest, png: bytes) -> None:
        """Write a PNG file; `number` is the index of its prompt. An existing file with the same name is replaced."""
        start = f"{number:03d}-" * self.several_prompts + slug(request.prompt)
        with atomic_files.write_file(self.folder / f"{start}-seed{request.seed}.png") as aside:
            aside.write_bytes(png)

    def write_grid(self, prompt: str, rows: Sequence[Sequence[Image.Image]], columns: int | None) -> Path:
        """Write the grid of all pictures; return its path.

        Args:
            rows: the pictures of each prompt.
            columns: pictures per row of the grid; None: one row per prompt, or a square grid for a single prompt.
        """
        count = len(rows[0])
        columns = columns or (count if self.several_prompts else math.ceil(math.sqrt(count)))
        path = self.folder / ("prompts-grid.png" if self.several_prompts else f"{slug(prompt)}-grid.png")
        with atomic_files.write_file(path) as aside:
            grid([picture for row in rows for picture in row], columns).save(aside, format="PNG")
        return path


def draw(config: Generate, stop: StopRequest) -> Path:
    """Generate and write the pictures that `config` describes, and their grid; return the path of the grid.

    For each prompt there are `config.num_images` pictures, with the seeds `config.seed`, `config.seed` + 1, and so on.
    Each batch is written as soon as it is generated.

    Raises:
        UserError: there is no model or no prompt; a prompt is too long for the model; the model cannot draw the size;
            or a LoRA or the VAE does not fit the model.
        OutOfMemory, Interrupted: memory ran out, or a stop was requested. Pictures that were already written are kept.
    """
    import torch

    source = find_source(config)
    if source.run:  # a registered model, whose base model may never have been on this machine
        source = fetch_base(source)
    prompts = _read_prompts(config, source)
    used_loras = _find_loras(config, source)
    target = Path(config.out) if config.out else source.folder / "generated"
    atomic_files.check_writable(target, "type out=DIR, a folder that you can write to")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = MemoryMeter(device, partial(_advice, config=config, device=device.type),
                        saved_notice=f"pictures made before are in {target}")
    rows = [_requests(config, prompt) for prompt in prompts]
    with meter.phase("loading"):
        renderer = Renderer(source, device.type, used_loras=used_loras)
        for row in rows:
            renderer.check(row[0])
    start = _load_start(config.image, renderer.info.resolution)
    if start is not None:
        renderer.start_from(start, config.strength)
    folder = PictureFolder(target, len(prompts) > 1)
    console, total = Console(), len(prompts) * config.num_images
    drawn: list[list[Image.Image]] = [[] for _ in prompts]
    with meter.phase("drawing"), console.bar("pictures", total) as bar:
        for number, row in enumerate(rows):
            for first in range(0, len(row), config.batch_size):
                _check_stop(stop, bar.done, total, target)
                batch = row[first:first + config.batch_size]
                pictures = renderer.pictures(batch)
                for request, picture in zip(batch, pictures, strict=True):
                    folder.write(number, request, renderer.png(request, picture, config.metadata))
                drawn[number] += pictures
                bar.tick(len(batch))
    grid_path = folder.write_grid(prompts[0], drawn, config.columns)
    what = repr(prompts[0]) if len(prompts) == 1 else f"{len(prompts)} prompts"
    console.say(f"{counted(total, 'picture')} of {what} in {target}, all on {grid_path}")
    return grid_path


def _requests(config: Generate, prompt: str) -> list[PictureRequest]:
    """Return a request for each picture of a prompt."""
    width, height = parse_size(config.size) if config.size else (None, None)
    return [PictureRequest(prompt, config.negative_prompt, config.seed + number, config.num_inference_steps,
                           config.guidance_scale, width, height) for number in range(config.num_images)]


def slug(prompt: str) -> str:
    """Return a prompt in a form for file names: lower-case ASCII letters and digits, with hyphens between words.

    This form is cut after 60 characters. If something was cut off, or the prompt is not ASCII or has no letters and
    digits, a hash of the prompt is appended.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    if prompt.isascii() and 0 < len(plain) <= 60:
        return plain
    return "-".join(filter(None, [plain[:60].strip("-"), sha256(prompt.encode()).hexdigest()[:8]]))


def _advice(phase: str, config: Generate, device: str) -> str:
    """Return what the user can type if memory ran out. The error message ends with this text.

    Args:
        phase: what the command did when memory ran out: loading or drawing.
    """
    if phase == "drawing" and min(config.batch_size, config.num_images) > 1:
        return "batch_size=1"
    if device == "cuda":
        return "CUDA_VISIBLE_DEVICES= before the command, which then draws on the CPU"
    return "the same on a machine with more memory"


def _check_stop(stop: StopRequest, done: int, total: int, target: Path) -> None:
    if stop.signal_name and done < total:
        drawn = f"after {done} of {counted(total, 'picture')}, which are in {target}"
        when = drawn if done else "before the first picture"
        raise Interrupted(f"{stop.signal_name}: stopped {when}; repeat the command to draw all of them")


def _read_prompts(config: Generate, source: Source) -> list[str]:
    """Return the prompts to draw.

    If `config.prompts` names a file, they are the lines of this file. In these lines, the run's subject, such as
    "zwx toy", replaces {subject}.

    If `config.prompts` is None, there is one prompt: `config.prompt` if it is set, and the instance prompt of the run
    if not.
    """
    subject = source.setting("dataset.instance_prompt")
    concepts = json.loads(source.setting("dataset.concepts") or "[]")
    if config.prompts is None:
        if not config.prompt and concepts:
            choices = " or ".join(f'prompt="{concept["instance_prompt"]}"' for concept in concepts)
            raise UserError(f"this run has several subjects: type {choices}")
        if not (prompt := config.prompt or subject):
            raise UserError('the prompt is missing: type prompt="a photo of a zwx toy"')
        return [prompt]
    try:
        lines = [line.strip() for line in Path(config.prompts).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompts in {config.prompts} cannot be read: type prompts=FILE, a text file with one "
                        "prompt per line") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"there is no prompt in {config.prompts}: write one per line")
    has_templates = any("{subject}" in line for line in lines)
    if concepts and has_templates:
        raise UserError(f"{config.prompts} contains {{subject}} and this run has several subjects: write the subject "
                        "itself")
    if not subject and has_templates:
        raise UserError(f"{config.prompts} contains {{subject}} and there is no run.json that names it: write the "
                        "subject itself")
    return fill_templates(lines, extract_subject(subject)) if subject else lines


def _find_loras(config: Generate, source: Source) -> list[loras.Lora]:
    sources = [*([source.adapter] if source.adapter else []), *config.loras]
    if not sources and config.lora_scale != 1.0:
        raise UserError("lora_scale is of LoRAs and there is none: type lora=FILE, or leave lora_scale out; a run with "
                        "method.merge=true has its adapter inside its model")
    try:
        return loras.find_loras(sources, config.scales(len(sources)))
    except ValueError as error:
        raise UserError(str(error)) from error


def _load_start(path: str | None, side: int) -> Image.Image | None:
    """Return the start picture for image-to-image generation, as a square of `side` pixels; None without a path.

    The picture is resized and centre-cropped.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"there is no picture at {path}: type image=FILE")
    return Image.fromarray(photos.crop_to_square(photos.load_image(Path(path), side), side, None, False))
