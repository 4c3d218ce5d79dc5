"""The result of a run: a diffusers folder, an adapter's files, or both, with a model card; whole or not at all."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

import dreambooth
from dreambooth.config.recipe import Recipe
from dreambooth.errors import DoesNotFit
from dreambooth.models import lora
from dreambooth.models.components import zero_snr
from dreambooth.models.loading import Components, exact_frozen, trained_modules
from dreambooth.models.pipeline import pipeline_over
from dreambooth.serialization import lora_files
from dreambooth.utils import atomic_files

CARD = """---
tags:
- stable-diffusion
- text-to-image
- dreambooth
- diffusers
{tags}instance_prompt: {quoted}
base_model: {source}
---
# {name}

{source}, taught a new subject with [DreamBooth](https://arxiv.org/abs/2208.12242).
Say **{instance_prompt}** to get it. The weights are {weights} after {step} steps.
{picture}
```python
{opening}
pipeline({quoted}, num_inference_steps=25).images[0].save("subject.png")
```

| setting | value |
|---|---|
{settings}

Licence and limits of use are those of the base model. Made with dreambooth {version}.
"""


def export(parts: Components, recipe: Recipe, step: int, sheet: Path) -> Path:
    """Write `model/`, that DiffusionPipeline.from_pretrained opens, or its load_lora_weights (method=lora, dora).

    Args:
        parts: all parts, the trained ones with the weights to keep; the base's scheduler and safety checker go along.
        step: completed steps of these weights.
        sheet: the contact sheet, if there is one.

    Raises:
        DoesNotFit: the disk is full; the last checkpoint is kept.
    """
    target = recipe.run_dir / "model"
    try:
        with atomic_files.whole_folder(target) as aside:
            if not recipe.method.low_rank or recipe.method.merge:
                whole_pipeline(exact_frozen(parts, recipe)).save_pretrained(aside, safe_serialization=True)
            if recipe.method.low_rank:
                known = lora.learned(nn.ModuleDict(trained_modules(parts, recipe)))
                lora_files.write(aside, known, re.sub(r"[^\w.-]+", "-", recipe.name), _facts(recipe))
            if sheet.is_file():
                shutil.copyfile(sheet, aside / "contact_sheet.png")
            (aside / "README.md").write_text(_card(recipe, step, sheet.is_file()), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a class of its own
        raise DoesNotFit(f"the model could not be written to {target} ({error}): its checkpoint is kept; "
                         "free some space and repeat the command") from error
    return target


def size_bytes(parts: Components, recipe: Recipe) -> int:
    """Disk that the exported folder takes, about."""
    if recipe.method.low_rank and not recipe.method.merge:
        trained = nn.ModuleDict(trained_modules(parts, recipe)).parameters()
        return 2 * sum(4 * p.numel() for p in trained if p.requires_grad)  # two layouts
    modules = [*parts.modules, *([parts.safety_checker] if parts.safety_checker is not None else [])]
    return sum(4 * p.numel() for module in modules for p in module.parameters())


def whole_pipeline(parts: Components) -> Any:
    """The pipeline that is kept: with the base's own scheduler and safety checker."""
    import diffusers

    scheduler = getattr(diffusers, parts.scheduler_config.get("_class_name", "PNDMScheduler"))
    return pipeline_over(parts, scheduler.from_config(parts.scheduler_config))


def _base(recipe: Recipe) -> dict[str, str]:
    """What else was chosen of the base, beside its source."""
    model = recipe.model
    found = {"revision": model.revision, "variant": model.variant, "vae": model.vae,
             "zero_terminal_snr": "true" if model.zero_terminal_snr else None}
    return {key: value for key, value in found.items() if value is not None}


def _facts(recipe: Recipe) -> dict[str, str]:
    """Metadata of an adapter's files; the keys that begin with modelspec are those of the ModelSpec standard."""
    return {"base_model": recipe.model.source, "method": recipe.method.kind.value, "modelspec.title": recipe.name,
            "modelspec.trigger_phrase": recipe.instance_prompt} | {
                lora_files.OF_BASE + key: value for key, value in _base(recipe).items()}


def _opening(recipe: Recipe) -> str:
    """The lines that open the result: of an adapter, beside its base as it was trained."""
    if not recipe.method.low_rank or recipe.method.merge:
        return ("from diffusers import DiffusionPipeline\n\n"
                'pipeline = DiffusionPipeline.from_pretrained("model")  # this folder')
    names, before, after = ["DiffusionPipeline"], "", ""
    more = "".join(f", {key}={json.dumps(value)}" for key, value in _base(recipe).items()
                   if key in ("revision", "variant"))
    if recipe.vae_source:
        inside = ', subfolder="vae"' if (Path(recipe.vae_source) / "vae/config.json").is_file() else ""
        names.append("AutoencoderKL")
        before = f"vae = AutoencoderKL.from_pretrained({json.dumps(recipe.vae_source)}{inside})\n"
        more += ", vae=vae"
    if recipe.model.zero_terminal_snr:
        rescaled = zero_snr({})
        names.append(kind := rescaled.pop("_class_name"))
        told = "".join(f", {key}={value!r}" for key, value in rescaled.items())
        after = f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config{told})\n"
    return (f"from diffusers import {', '.join(sorted(names))}\n\n{before}"
            f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(recipe.model.source)}{more})\n{after}"
            'pipeline.load_lora_weights("model")  # this folder; webui/ has the file for AUTOMATIC1111 and ComfyUI')


def _card(recipe: Recipe, step: int, pictured: bool) -> str:
    train, prior = recipe.train, recipe.prior
    settings = {
        "photos": recipe.dataset.name, "class prompt": ", ".join(
            one.class_prompt for one in recipe.classes) if recipe.with_prior else "none",
        "prior_loss_weight": prior.prior_loss_weight if recipe.with_prior else "none",
        "class images": prior.num_class_images if recipe.with_prior else "none",
        "learning_rate": train.learning_rate, "train_batch_size": train.train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps, "seed": train.seed,
        "text encoder": "trained" if train.train_text_encoder else "frozen", "resolution": recipe.model.resolution,
        "precision": recipe.precision.label,
    } | {f"base's {key}": value for key, value in _base(recipe).items()}
    if recipe.method.low_rank:
        method = recipe.method
        settings |= {"method": method.kind.value, "rank": method.rank, "alpha": method.scale_alpha,
                     "targets": method.targets.value, "dropout": method.dropout}
    return CARD.format(
        name=recipe.name, source=recipe.model.source, step=step,
        instance_prompt="** or **".join(one.instance_prompt for one in recipe.subjects),
        quoted=json.dumps(recipe.instance_prompt), opening=_opening(recipe),
        tags="- lora\n" * recipe.method.low_rank, version=dreambooth.__version__,
        weights=("an exponential moving average" if train.use_ema else "as trained")
        + (f", the best of the run by {recipe.evaluate.select}," if recipe.evaluate.select else ""),
        picture="\n![contact sheet](contact_sheet.png)\n" if pictured else "",
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()))
