"""Writes the result of a run: a diffusers folder, the files of an adapter, or both. A model card is always added."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

import dreambooth
from dreambooth.config.enums import MethodKind
from dreambooth.config.recipe import Recipe
from dreambooth.models import lora, text_encoders
from dreambooth.models.components import Components
from dreambooth.models.families.family import Family
from dreambooth.models.loading import exact_frozen, trained_modules
from dreambooth.models.pipeline import pipeline_over
from dreambooth.serialization import embedding_files, lora_files
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.storage import manifest
from dreambooth.utils import atomic_files, markdown
from dreambooth.utils.masking import mask_urls

CARD = """---
tags:
{family_tags}- text-to-image
- dreambooth
- diffusers
{tags}instance_prompt: {quoted}
base_model: {base_model}
{license}---
# {name}

{shown_source}, taught a new subject with [DreamBooth](https://arxiv.org/abs/2208.12242).
Say **{instance_prompt}** to get it. The weights are {weights} after {step} steps.
{picture}
```python
{code}
pipeline(prompt={quoted}, num_inference_steps={steps}, {guidance}).images[0].save("subject.png")
```

| setting | value |
|---|---|
{settings}

Licence and limits of use are those of the base model{published}. Made with dreambooth {version}.
"""


# Settings of an adapter that a card names only if they are not the defaults.
SHOWN_IF_CHANGED = tuple(f"method.{key}" for key in (
    "use_rslora", "decompose", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"))


def export(parts: Components, recipe: Recipe, step: int, sheet: Path) -> Path:
    """Write the folder `model/` atomically, and return its path.

    With an adapter and without method.merge, the folder holds an adapter alone, which load_lora_weights opens.
    Otherwise it holds a whole pipeline, which DiffusionPipeline.from_pretrained opens; with method.merge, it also holds
    the adapter's files.

    Args:
        parts: all parts of the model; the trained parts contain the weights to write. The scheduler and the safety
            checker of the base model are parts of a whole pipeline, too.
        step: number of completed training steps.
        sheet: path of the contact sheet, which is copied into the folder; the file may be missing.

    Raises:
        DoesNotFit: the disk is full; the last checkpoint is kept.
    """
    target = recipe.run_dir / "model"
    try:
        with manifest.write_folder(target) as aside:
            if not recipe.method.low_rank or recipe.method.merge:
                whole_pipeline(exact_frozen(parts, recipe)).save_pretrained(aside, safe_serialization=True)
            if recipe.method.low_rank:
                model = nn.ModuleDict(trained_modules(parts, recipe))
                weights = lora.adapter_weights(model)
                title = re.sub(r"[^\w.-]+", "-", recipe.name)
                metadata = _adapter_metadata(recipe)
                if parts.new_tokens is not None:
                    words = parts.new_tokens.by_word()
                    embedding_files.write(aside, words, parts.family, metadata)
                    metadata |= embedding_files.adapter_metadata(words, parts.family)
                lora_files.write(aside, weights, lora.base_scales(model, weights), parts, title, metadata)
            if sheet.is_file():
                shutil.copyfile(sheet, aside / "contact_sheet.png")
            (aside / "README.md").write_text(_card(recipe, parts.family, step, sheet.is_file()), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors raises SafetensorError if the disk is full
        raise atomic_files.write_failure(f"the model in {target}, whose checkpoint is kept,", error,
                                         "make the folder writable and repeat the command") from error
    return target


def size_bytes(parts: Components, recipe: Recipe) -> int:
    """Return an estimate of the exported folder's size in bytes."""
    if recipe.method.low_rank and not recipe.method.merge:
        trained = nn.ModuleDict(trained_modules(parts, recipe)).parameters()
        return 2 * sum(4 * p.numel() for p in trained if p.requires_grad)  # in two layouts
    extras = [extra for extra in parts.extras.values() if isinstance(extra, nn.Module)]
    released = 0 if parts.encodings is None else text_encoders.file_bytes(recipe, parts.family)
    weights = sum(p.numel() for module in (*parts.modules, *extras) for p in module.parameters())
    return released + 4 * int(weights)


def whole_pipeline(parts: Components) -> Any:
    """Return the pipeline to export. It has the scheduler class and the safety checker of the base model."""
    import diffusers

    scheduler = getattr(diffusers, parts.scheduler_config.get("_class_name", "PNDMScheduler"))
    return pipeline_over(parts, scheduler.from_config(parts.scheduler_config))


def _base_choices(recipe: Recipe) -> dict[str, str]:
    """Return the settings that, together with model.source, determine the base model. Unset settings are left out."""
    model = recipe.model
    choices = {"revision": model.revision, "variant": model.variant, "vae": model.vae,
               "zero_terminal_snr": "true" if model.zero_terminal_snr else None}
    return {key: value for key, value in choices.items() if value is not None}


def _adapter_metadata(recipe: Recipe) -> dict[str, str]:
    """Return the metadata of an adapter's files. Keys that begin with `modelspec.` follow the ModelSpec standard."""
    side = recipe.model.resolution
    metadata = {"base_model": recipe.model.source, "method": recipe.method.kind.value, "modelspec.title": recipe.name,
                "modelspec.resolution": f"{side}x{side}", "modelspec.trigger_phrase": recipe.instance_prompt} | {
                lora_files.BASE_KEY_PREFIX + key: value for key, value in _base_choices(recipe).items()}
    return {key: mask_urls(value) for key, value in metadata.items()}


def _literal(text: str) -> str:
    """Return a quoted string that Python, YAML and JSON read as `text`."""
    return json.dumps(text, ensure_ascii=False)  # Python reads the two escapes of an emoji as two characters


def _code(recipe: Recipe, family: Family) -> str:
    """Return Python code that opens the exported folder.

    For an adapter, the code first opens the base model with the settings of the training.
    """
    if not recipe.method.low_rank or recipe.method.merge:
        return ("from diffusers import DiffusionPipeline\n\n"
                'pipeline = DiffusionPipeline.from_pretrained("model")  # this folder')
    programs = "webui/ has the file for " + family.lora_programs[recipe.method.kind]
    if recipe.method.kind is MethodKind.lokr and not family.loads_lokr:
        return ("from diffusers import DiffusionPipeline\n\n"
                "# diffusers opens no LoKr of this base. First: python -m dreambooth.convert in=model out=merged\n"
                f'pipeline = DiffusionPipeline.from_pretrained("merged")  # or: {programs}')
    imports, before, after = ["DiffusionPipeline"], "", ""
    arguments = "".join(f", {key}={_literal(value)}" for key, value in _base_choices(recipe).items()
                        if key in ("revision", "variant"))
    if recipe.vae_source:
        inside = ', subfolder="vae"' if (Path(recipe.vae_source) / "vae/config.json").is_file() else ""
        imports.append(family.vae.class_name)
        before = f"vae = {family.vae.class_name}.from_pretrained({_literal(recipe.vae_source)}{inside})\n"
        arguments += ", vae=vae"
    if recipe.model.zero_terminal_snr:
        rescaled = family.rescale_to_zero_snr({})
        imports.append(scheduler := rescaled.pop("_class_name"))
        changes = "".join(f", {key}={value!r}" for key, value in rescaled.items())
        after = f"pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config{changes})\n"
    return (f"from diffusers import {', '.join(sorted(imports))}\n\n{before}"
            f"pipeline = DiffusionPipeline.from_pretrained({_literal(recipe.model.source)}{arguments})\n{after}"
            f'pipeline.load_lora_weights("model", weight_name="{ADAPTER}")  # this folder; {programs}'
            + embedding_files.loading_code(recipe.trigger_words, family))


def _card(recipe: Recipe, family: Family, step: int, pictured: bool) -> str:
    train, prior, source = recipe.train, recipe.prior, recipe.model.source
    license_id, license_title = family.license
    settings = {
        "family": family.title, "photos": recipe.dataset.name, "class prompt": ", ".join(
            one.class_prompt for one in recipe.class_recipes) if recipe.with_prior else "none",
        "prior_loss_weight": prior.prior_loss_weight if recipe.with_prior else "none",
        "class images": prior.num_class_images if recipe.with_class_images else
        "none; the base model's output is preserved" if recipe.preserves_output else "none",
        "learning_rate": train.learning_rate, "train_batch_size": train.train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        **({"global_batch_size": train.global_batch_size} if train.global_batch_size else {}), "seed": train.seed,
        "text encoder": "trained" if train.train_text_encoder else "frozen", "resolution": recipe.model.resolution,
        "precision": recipe.precision.label,
    } | {f"base's {key}": value for key, value in _base_choices(recipe).items()}
    if recipe.method.low_rank:
        method = recipe.method
        settings |= {"method": method.kind.value, "rank": method.rank, "alpha": method.scale_alpha,
                     "targets": method.targets.value, "dropout": method.dropout} | {
                         key.removeprefix("method."): getattr(method, key.removeprefix("method."))
                         for key in method.changed_keys if key.startswith(SHOWN_IF_CHANGED)}
        if recipe.trigger_words:
            settings["new tokens"] = f"{method.new_tokens} for {' and '.join(recipe.trigger_words)}"
    return mask_urls(CARD.format(
        name=recipe.name, step=step, shown_source=markdown.escape(source),
        base_model=source if re.fullmatch(r"[\w./:-]*[\w./-]", source) else _literal(source),
        instance_prompt="** or **".join(markdown.escape(one.instance_prompt) for one in recipe.subject_recipes),
        quoted=_literal(recipe.instance_prompt), code=_code(recipe, family),
        license=f"license: {license_id}\n" if source in family.hub_ids else "",
        published=f", {license_title}" if source in family.hub_ids else "; the published models of "
        f"{family.title} are under {license_title}",
        steps=recipe.sample.num_inference_steps,
        guidance=", ".join(f"{key}={value!r}" for key, value in family.guidance_arguments(
            recipe.sample.guidance_scale, 1).items()),
        family_tags="".join(f"- {tag}\n" for tag in family.tags), tags="- lora\n" * recipe.method.low_rank,
        version=dreambooth.__version__,
        weights=("an exponential moving average" if train.use_ema else
                 "the average of schedule-free AdamW" if recipe.optimizer.kind.averages_weights else "as trained")
        + (f", the best of the run by {recipe.evaluate.select}," if recipe.evaluate.select else ""),
        picture="\n![contact sheet](contact_sheet.png)\n" if pictured else "",
        settings="\n".join(f"| {key} | {markdown.escape(str(value))} |" for key, value in settings.items())))
