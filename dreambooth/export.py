"""The result of a run: a diffusers folder with a model card, written whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import dreambooth
from dreambooth import files
from dreambooth.errors import DoesNotFit
from dreambooth.model import Components
from dreambooth.recipe import Recipe

CARD = """---
tags:
- stable-diffusion
- text-to-image
- dreambooth
- diffusers
instance_prompt: {quoted}
base_model: {source}
---
# {name}

{source}, taught a new subject with [DreamBooth](https://arxiv.org/abs/2208.12242).
Say **{instance_prompt}** to get it. The weights are {weights} after {step} steps.
{picture}
```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("model")  # this folder
pipeline({quoted}, num_inference_steps=25).images[0].save("subject.png")
```

| setting | value |
|---|---|
{settings}

Licence and limits of use are those of the base model. Made with dreambooth {version}.
"""


def export(parts: Components, recipe: Recipe, step: int, sheet: Path) -> Path:
    """Write `model/`, which StableDiffusionPipeline.from_pretrained opens.

    Args:
        parts: all parts, the trained ones with the weights to keep; the base's scheduler and safety checker go along.
        step: completed steps of these weights.
        sheet: the contact sheet, if there is one.

    Raises:
        DoesNotFit: the disk is full; the last checkpoint is kept.
    """
    target = recipe.run_dir / "model"
    try:
        with files.whole_folder(target) as aside:
            _pipeline(parts).save_pretrained(aside, safe_serialization=True)
            if sheet.is_file():
                shutil.copyfile(sheet, aside / "contact_sheet.png")
            (aside / "README.md").write_text(_card(recipe, step, sheet.is_file()), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a class of its own
        raise DoesNotFit(f"the model could not be written to {target} ({error}): its checkpoint is kept; "
                         "free some space and repeat the command") from error
    return target


def size_bytes(parts: Components) -> int:
    """Disk that the exported folder takes, about."""
    modules = [m for m in (parts.unet, parts.text_encoder, parts.vae, parts.safety_checker) if m is not None]
    return sum(4 * p.numel() for module in modules for p in module.parameters())


def _pipeline(parts: Components) -> Any:
    import diffusers
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    scheduler = getattr(diffusers, parts.scheduler_config.get("_class_name", "PNDMScheduler"))
    return StableDiffusionPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=parts.unet,
        scheduler=scheduler.from_config(parts.scheduler_config),
        safety_checker=parts.safety_checker, feature_extractor=parts.feature_extractor,
        requires_safety_checker=parts.safety_checker is not None)


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
    }
    return CARD.format(
        name=recipe.name, source=recipe.model.source, step=step,
        instance_prompt="** or **".join(one.instance_prompt for one in recipe.subjects),
        quoted=json.dumps(recipe.instance_prompt), version=dreambooth.__version__,
        weights=("an exponential moving average" if train.use_ema else "as trained")
        + (f", the best of the run by {recipe.evaluate.select}," if recipe.evaluate.select else ""),
        picture="\n![contact sheet](contact_sheet.png)\n" if pictured else "",
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()))
