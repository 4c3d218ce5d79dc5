"""Draws with a run's model, any diffusers folder and LoRAs: pictures with their settings inside, and a grid."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth.config.eval_prompts import fill, noun
from dreambooth.config.generate import Generate
from dreambooth.data import photos
from dreambooth.errors import Interrupted, UserError
from dreambooth.inference import loras, png_metadata
from dreambooth.inference.model_sources import Source, find
from dreambooth.models.pipeline import Sampler, from_images, generate_images, open_pipeline
from dreambooth.models.text_conditioning import check_length
from dreambooth.runtime.memory_meter import Meter
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console
from dreambooth.utils.image_grid import grid
from dreambooth.utils.signals import Stop


@dataclass(frozen=True)
class Album:
    """Where pictures go, and what each says of itself."""

    folder: Path
    many: bool  # prompts, by whose numbers names begin
    inside: Callable[[str, int, tuple[int, int]], PngInfo | None]  # of prompt, seed, size

    def add(self, number: int, prompt: str, seed: int, made: Image.Image) -> None:
        """Write a picture; one of that name is replaced."""
        begin = f"{number:03d}-" * self.many + slug(prompt)
        with atomic_files.whole_file(self.folder / f"{begin}-seed{seed}.png") as aside:
            made.save(aside, format="PNG", pnginfo=self.inside(prompt, seed, made.size))

    def close(self, prompt: str, rows: Sequence[Sequence[Image.Image]], columns: int | None) -> Path:
        """Write the grid of all."""
        count = len(rows[0])
        columns = columns or (count if self.many else math.ceil(math.sqrt(count)))
        sheet = self.folder / ("prompts-grid.png" if self.many else f"{slug(prompt)}-grid.png")
        with atomic_files.whole_file(sheet) as aside:
            grid([made for row in rows for made in row], columns).save(aside, format="PNG")
        return sheet


def draw(ask: Generate, stop: Stop) -> Path:
    """Write `num_images` pictures of each prompt with seeds from `seed` up, each batch as it is made, and in the end
    their grid; returns the grid's path.

    Raises:
        UserError: there is no model, no prompt, or something that does not fit it.
        OutOfMemory, Interrupted: pictures that were made before are kept.
    """
    import torch

    source = find(ask)
    prompts = _prompts(ask, source)
    chosen = _loras(ask, source)
    scale = ask.guidance_scale
    if scale is None:
        scale = float(source.settings.get("sample.guidance_scale", 7.5))
    target = Path(ask.out) if ask.out else source.folder / "generated"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = Meter(device, partial(_advice, ask=ask, device=device.type), kept=f"pictures made before are in {target}")
    with meter.phase("loading"):
        pipeline = open_pipeline(source.model, device.type, source.revision, source.variant, source.vae,
                                          source.zero_terminal_snr)
        _check_lengths(pipeline, [*prompts, ask.negative_prompt or ""])
        loras.apply(pipeline, chosen)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    sampler = Sampler(ask.num_inference_steps, scale, int(source.settings.get("model.resolution", side)))
    start = _start(ask.image, sampler.resolution)
    if start is not None:
        pipeline = from_images(pipeline)
    settings = {"num_inference_steps": ask.num_inference_steps, "guidance_scale": scale,
                "negative_prompt": ask.negative_prompt, "model": Path(source.model).name if source.own or ask.base
                else source.folder.name, "strength": ask.strength if ask.image else None}
    used = [(lora.name, lora.scale) for lora in chosen]
    album = Album(target, len(prompts) > 1, lambda prompt, seed, size: png_metadata.info(
        prompt, seed, size, used, settings) if ask.metadata else None)
    seeds = [ask.seed + number for number in range(ask.num_images)]
    console, total = Console(), len(prompts) * len(seeds)
    rows: list[list[Image.Image]] = [[] for _ in prompts]
    with meter.phase("drawing"), console.bar("pictures", total) as bar:
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            _check(stop, bar.done, total, target)
            for batch in generate_images(pipeline, [prompt] * len(seeds), seeds, sampler, ask.batch_size,
                                           negative_prompt=ask.negative_prompt, start=start, strength=ask.strength):
                for seed, made in zip(seeds[len(row):], batch, strict=False):
                    album.add(number, prompt, seed, made)
                row += batch
                bar.tick(len(batch))
                _check(stop, bar.done, total, target)
    written = album.close(prompts[0], rows, ask.columns)
    what = repr(prompts[0]) if len(prompts) == 1 else f"{len(prompts)} prompts"
    console.say(f"{total} pictures of {what} in {target}, all on {written}")
    return written


def slug(prompt: str) -> str:
    """A prompt as the beginning of a file's name; where words are lost in it, with a digest of the prompt."""
    plain = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    if prompt.isascii() and 0 < len(plain) <= 60:
        return plain
    return "-".join(filter(None, [plain[:60].strip("-"), sha256(prompt.encode()).hexdigest()[:8]]))


def _advice(phase: str, ask: Generate, device: str) -> str:
    """What to type after memory ran out."""
    if phase == "drawing" and min(ask.batch_size, ask.num_images) > 1:
        return "batch_size=1"
    if device == "cuda":
        return "CUDA_VISIBLE_DEVICES= before the command, which then draws on the CPU"
    return "the same on a machine with more memory"


def _check(stop: Stop, done: int, total: int, target: Path) -> None:
    if stop.requested and done < total:
        told = f"after {done} of {total} pictures, which are in {target}" if done else "before the first picture"
        raise Interrupted(f"{stop.requested}: stopped {told}; repeat the command to draw all of them")


def _prompts(ask: Generate, source: Source) -> list[str]:
    """One prompt, or those of a file; {subject} in it stands for the run's subject."""
    subject, several = source.setting("dataset.instance_prompt"), json.loads(source.setting("dataset.concepts") or "[]")
    if ask.prompts is None:
        if not ask.prompt and several:
            known = " or ".join(f'prompt="{one["instance_prompt"]}"' for one in several)
            raise UserError(f"this run has several subjects: type {known}")
        if not (prompt := ask.prompt or subject):
            raise UserError('the prompt is missing: type prompt="a photo of a zwx toy"')
        return [prompt]
    try:
        lines = [line.strip() for line in Path(ask.prompts).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompts in {ask.prompts} cannot be read: type prompts=FILE, a text file with a prompt a "
                        "line") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"there is no prompt in {ask.prompts}: write one a line")
    open_lines = any("{subject}" in line for line in lines)
    if several and open_lines:
        raise UserError(f"{ask.prompts} speaks of {{subject}} and this run has several subjects: write the subject "
                        "itself")
    if not subject and open_lines:
        raise UserError(f"{ask.prompts} speaks of {{subject}} and run.json, which names it, is not there: write the "
                        "subject itself")
    return fill(lines, noun(subject)) if subject else lines


def _check_lengths(pipeline: Any, prompts: Sequence[str]) -> None:
    """Pipelines cut what a text encoder does not read."""
    for name in ("tokenizer", "tokenizer_2"):
        for prompt in prompts if getattr(pipeline, name, None) is not None else ():
            check_length(getattr(pipeline, name), prompt)


def _loras(ask: Generate, source: Source) -> list[loras.Lora]:
    asked = [*([source.own] if source.own else []), *ask.loras]
    if not asked and ask.lora_scale != 1.0:
        raise UserError("lora_scale is of LoRAs and there is none: type lora=FILE, or leave lora_scale out; a run with "
                        "method.merge=true has its adapter inside its model")
    try:
        return loras.found(asked, ask.scales(len(asked)))
    except ValueError as error:
        raise UserError(str(error)) from error


def _start(path: str | None, side: int) -> Image.Image | None:
    """The picture to begin with, its centre as a square of `side` pixels."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"there is no picture at {path}: type image=FILE")
    return Image.fromarray(photos.square(photos.picture(Path(path), side), side, None, False))
