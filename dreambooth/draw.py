"""Draws with a run's model, any diffusers folder and LoRAs: pictures with their settings inside, and a grid."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth import files, loras, pngtext, sampling
from dreambooth.conditions import check_length
from dreambooth.console import Console
from dreambooth.drawable import Source, find
from dreambooth.errors import UserError
from dreambooth.photos import picture, square
from dreambooth.prompts import fill, noun
from dreambooth.schema_generate import Generate
from dreambooth.sheet import grid


def draw(ask: Generate) -> Path:
    """Write `num_images` pictures of each prompt with seeds from `seed` up, and their grid; returns the grid's path.

    Raises:
        UserError: there is no model, no prompt, or something that does not fit it.
    """
    import torch

    source = find(ask)
    prompts = _prompts(ask, source)
    chosen = _loras(ask, source)
    scale = ask.guidance_scale
    if scale is None:
        scale = float(source.settings.get("sample.guidance_scale", 7.5))
    pipeline = sampling.open_pipeline(
        source.model, "cuda" if torch.cuda.is_available() else "cpu", source.revision, source.variant, source.vae,
        source.zero_terminal_snr)
    _check_lengths(pipeline, [*prompts, ask.negative_prompt or ""])
    loras.apply(pipeline, chosen)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    sampler = sampling.Sampler(ask.num_inference_steps, scale, int(source.settings.get("model.resolution", side)))
    start = _start(ask.image, sampler.resolution)
    if start is not None:
        pipeline = sampling.from_images(pipeline)
    seeds = [ask.seed + number for number in range(ask.num_images)]
    console, rows = Console(), []
    with console.bar("pictures", len(prompts) * len(seeds)) as bar:
        for prompt in prompts:
            row: list[Image.Image] = []
            for batch in sampling.generate(pipeline, [prompt] * len(seeds), seeds, sampler, ask.batch_size,
                                           negative_prompt=ask.negative_prompt, start=start, strength=ask.strength):
                row += batch
                bar.tick(len(batch))
            rows.append(row)
    settings = {"num_inference_steps": ask.num_inference_steps, "guidance_scale": scale,
                "negative_prompt": ask.negative_prompt, "model": Path(source.model).name if source.own or ask.base
                else source.folder.name, "strength": ask.strength if ask.image else None}
    target = Path(ask.out) if ask.out else source.folder / "generated"
    written = _write(target, prompts, seeds, rows, chosen, settings, ask)
    what = repr(prompts[0]) if len(prompts) == 1 else f"{len(prompts)} prompts"
    console.say(f"{len(prompts) * len(seeds)} pictures of {what} in {target}, all on {written}")
    return written


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
    return Image.fromarray(square(picture(Path(path), side), side, None, False))


def _write(target: Path, prompts: Sequence[str], seeds: Sequence[int], rows: Sequence[Sequence[Image.Image]],
           chosen: Sequence[loras.Lora], settings: dict[str, Any], ask: Generate) -> Path:
    many = len(prompts) > 1
    used = [(lora.name, lora.scale) for lora in chosen]
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        begin = f"{number:03d}-" * many + _slug(prompt)
        for seed, picture in zip(seeds, row, strict=True):
            inside = pngtext.info(prompt, seed, picture.size, used, settings) if ask.metadata else None
            with files.whole_file(target / f"{begin}-seed{seed}.png") as aside:
                picture.save(aside, format="PNG", pnginfo=inside)
    columns = ask.columns or (len(seeds) if many else math.ceil(math.sqrt(len(seeds))))
    sheet = target / ("prompts-grid.png" if many else f"{_slug(prompts[0])}-grid.png")
    with files.whole_file(sheet) as aside:
        grid([picture for row in rows for picture in row], columns).save(aside, format="PNG")
    return sheet


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
