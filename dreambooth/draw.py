"""Draws with a finished run's model, or with any diffusers folder: pictures, a grid, seeds in their names."""

import json
import math
import re
from pathlib import Path
from typing import Any

from dreambooth import files, sampling
from dreambooth.console import Console
from dreambooth.errors import UserError
from dreambooth.sheet import grid


def draw(
    run: str | None, *, prompt: str | None, num_images: int, batch_size: int, seed: int, num_inference_steps: int,
    guidance_scale: float | None, out: str | None
) -> Path:
    """Write `num_images` pictures with seeds from `seed` up, and their grid; returns the grid's path.

    Raises:
        UserError: there is no model at `run`, or no prompt.
    """
    import torch

    folder, model = _find(run)
    settings = _settings(folder)
    if not prompt and (several := json.loads(settings.get("dataset.concepts", "[]"))):
        known = " or ".join(f'prompt="{subject["instance_prompt"]}"' for subject in several)
        raise UserError(f"this run has several subjects: type {known}")
    prompt = prompt or settings.get("dataset.instance_prompt")
    if not prompt:
        raise UserError('the prompt is missing: type prompt="a photo of a zwx toy"')
    scale = float(settings.get("sample.guidance_scale", 7.5)) if guidance_scale is None else guidance_scale
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = sampling.open_pipeline(model, device)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    sampler = sampling.Sampler(num_inference_steps, scale, int(settings.get("model.resolution", side)))

    target = Path(out) if out else folder / "generated"
    console, pictures = Console(), []
    with console.bar("pictures", num_images) as bar:
        seeds = [seed + i for i in range(num_images)]
        for batch in sampling.generate(pipeline, [prompt] * num_images, seeds, sampler, batch_size):
            pictures += batch
            bar.tick(len(batch))
    return _write(target, prompt, seeds, pictures, console)


def _find(run: str | None) -> tuple[Path, Path]:
    """The folder that was asked for and the model in it."""
    if not run:
        raise UserError("the run is missing: type run=runs/NAME, a folder that python -m dreambooth.train made")
    folder = Path(run)
    for model in (folder / "model", folder):
        if (model / "model_index.json").is_file():
            return folder, model
    if (folder / "run.json").is_file():
        raise UserError(f"the run in {run} is not finished: repeat its command first, python -m dreambooth.train ...")
    raise UserError(f"there is no model in {run}: type run=runs/NAME, a folder that python -m dreambooth.train made")


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        return {}
    return settings


def _write(target: Path, prompt: str, seeds: list[int], pictures: list[Any], console: Console) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    for number, picture in zip(seeds, pictures, strict=True):
        with files.whole_file(target / f"{slug}-seed{number}.png") as aside:
            picture.save(aside, format="PNG")
    sheet = target / f"{slug}-grid.png"
    with files.whole_file(sheet) as aside:
        grid(pictures, math.ceil(math.sqrt(len(pictures)))).save(aside, format="PNG")
    console.say(f"{len(pictures)} pictures of {prompt!r} in {target}, all on {sheet}")
    return sheet
