"""Loads the parts of a base model and prepares them for training: precision, attention, checkpointing, adapters."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dreambooth.config.enums import BaseWeights, Dtype
from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models import families, hub, lora, text_encoders, vae
from dreambooth.models.adapters import selection
from dreambooth.models.block_swap import BlockSwap
from dreambooth.models.components import Components as Components
from dreambooth.models.components import disable_vae_autocast, training_scheduler
from dreambooth.models.families.family import Family
from dreambooth.models.layers.pointwise_conv import use_matrix_products
from dreambooth.models.quantization import quantise
from dreambooth.utils.imports import without_bitsandbytes, without_garbage_collection

TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}


class TrainedModel(nn.Module):
    """One module with everything that is trained: the denoiser and, with train.train_text_encoder, the text encoders.

    Gradient accumulation, data parallelism, EMA and checkpoints therefore cover every trained weight. The family gives
    each part a name, which is the prefix of the names of its weights: `unet.`, `text_encoder.`, ... The embeddings of
    new tokens are parameters of this module itself: `text_encoder_new_tokens`, ...
    """

    def __init__(self, family: Family, modules: dict[str, nn.Module], vae_scale: int,
                 frozen_encoders: Sequence[Any] = (), new_rows: Mapping[str, nn.Parameter] | None = None) -> None:
        """Args:
            family: the family of the base model.
            modules: the trained modules by part name, as `trained_modules` returns them.
            vae_scale: image side in pixels divided by latent side.
            frozen_encoders: text encoders that are not trained and that compute in each step, because the embeddings
                of new tokens are trained; they are no submodules.
            new_rows: the embeddings of new tokens, which are parameters of the text encoders, too, by encoder name.
        """
        super().__init__()
        self.family = family
        self.vae_scale = vae_scale
        self.encoder_names = [name for name in modules if name != family.denoiser.name]
        for name, module in modules.items():
            self.add_module(name, module)
        self._frozen_encoders = tuple(frozen_encoders)
        for name, rows in (new_rows or {}).items():
            self.register_parameter(f"{name}_new_tokens", rows)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, size_and_crop: Tensor | None = None) -> Tensor:
        """Return the denoiser's prediction (N, C, h, w).

        Args:
            latents: noisy latents (N, C, h, w).
            timesteps: (N,).
            text: (P, ...): the token ids of P prompts if the text encoders or embeddings of new tokens are trained,
                else the encoders' output. The first prompt belongs to the first N / P samples, the second prompt to the
                next N / P, and so on. A prompt that samples share is encoded once; its gradient is the sum of the
                gradients of these samples.
            size_and_crop: (N, 6), see Family.predict.
        """
        if encoders := [getattr(self, name) for name in self.encoder_names] or self._frozen_encoders:
            text = self.family.text(encoders, text)
        if len(text) < len(latents):
            text = text.repeat_interleave(len(latents) // len(text), 0)
        denoiser = getattr(self, self.family.denoiser.name)
        return self.family.predict(denoiser, latents, timesteps, text, self.vae_scale, size_and_crop)

    @property
    def new_rows(self) -> dict[str, nn.Parameter]:
        """The embeddings of new tokens, by parameter name."""
        return dict(self.named_parameters(recurse=False))

    def add_adapters(self, recipe: Recipe) -> None:
        """Add the adapters of a recipe. Afterwards only they and the embeddings of new tokens require gradients."""
        lora.inject(self, recipe.method, self.family.adapter_targets, recipe.train.seed, recipe.precision.dtype)
        for rows in self.new_rows.values():
            rows.requires_grad_(True)


def trained_model(parts: Components, recipe: Recipe) -> TrainedModel:
    """Return a TrainedModel that contains the trained modules of `parts` themselves, not copies."""
    frozen = parts.encoders if recipe.encodes_in_step and not recipe.train.train_text_encoder else ()
    return TrainedModel(parts.family, trained_modules(parts, recipe), parts.vae_scale, frozen,
                        parts.new_tokens.rows if parts.new_tokens else None)


def trained_modules(parts: Components, recipe: Recipe) -> dict[str, nn.Module]:
    """Return the modules that are trained or get adapters, as a dictionary from part name to module."""
    encoders = parts.encoders_by_name if recipe.train.train_text_encoder else {}
    return {parts.family.denoiser.name: parts.denoiser} | encoders


def idle_modules(parts: Components, recipe: Recipe) -> list[nn.Module]:
    """Return the modules that can leave the device during training steps, because their outputs are cached."""
    text_is_cached = recipe.memory.cache_text and not recipe.encodes_in_step
    return [parts.vae] * recipe.memory.cache_latents + list(parts.encoders) * text_is_cached


def part_dtypes(recipe: Recipe, frozen: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Return the precision of the denoiser and that of the text encoders: fp32 if they are trained, else `frozen`.

    With an adapter, the base model is frozen. If `frozen` is the compute precision, matrices and convolutions give the
    same results as if they were stored in fp32, because autocast would cast them to this precision at every use. Norms
    and embeddings are also stored in this precision. They are rounded once if the base model's files have a higher
    precision.
    """
    trained = frozen if recipe.method.low_rank else torch.float32
    return trained, trained if recipe.train.train_text_encoder else frozen


def encode_prompts(recipe: Recipe, device: torch.device, prompts: Callable[[], Iterable[str]]) -> None:
    """Encode and store prompts, if the run must release its text encoders before it loads the denoiser.

    Call this function before `load`. The text encoders are loaded only if a prompt has no stored encoding. Afterwards
    they are released. The empty prompt is encoded too, because it is the default negative prompt.

    Args:
        prompts: returns the prompts; called only if they are encoded.

    Raises:
        UserError: there is no model at recipe.source, or a prompt has more tokens than the model reads.
    """
    options = _options(recipe)
    with _name_what_is_missing(recipe):
        family, _ = families.of_source(recipe.source, **options)
        if not text_encoders.encodes_ahead(family, recipe):
            return
        family.check_training(recipe)
        tokenizers = [family.load_tokenizer(name, recipe.source, **options) for name in family.tokenizers]
        _, dtype = part_dtypes(recipe, TORCH_DTYPE[recipe.precision.dtype])
        encodings = text_encoders.open_encodings(recipe, family, tokenizers, dtype, device,
                                                 variant=recipe.model.variant, **options)
    texts = {*prompts(), ""}
    with _name_what_is_missing(recipe):
        encodings.ensure(texts)


def load(recipe: Recipe, device: torch.device, frozen: torch.dtype | None = None) -> Components:
    """Load the base model: trained parts in fp32, frozen parts in the precision `frozen`.

    Text encoders are not loaded if their outputs are stored (`encode_prompts`).

    Args:
        frozen: precision of the frozen parts; None: the compute precision of the recipe.

    Raises:
        UserError: there is no model at recipe.source, or the model belongs to no supported family or lacks a part.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    base_weights = recipe.method.base_weights if frozen is None else BaseWeights.half
    swap_blocks = recipe.memory.swap_blocks if frozen is None else None
    frozen = frozen or TORCH_DTYPE[recipe.precision.dtype]
    denoiser_dtype, text_dtype = part_dtypes(recipe, frozen)
    options = _options(recipe)
    weights = options | {"variant": recipe.model.variant}
    with _name_what_is_missing(recipe):
        family, layout = families.of_source(recipe.source, **options)
        scheduler_config = dict(DDPMScheduler.load_config(recipe.source, subfolder="scheduler", **options))
        ahead = text_encoders.encodes_ahead(family, recipe)
        tokenizers = [family.load_tokenizer(name, recipe.source, **options) for name in family.tokenizers]
        parts = Components(
            family=family,
            denoiser=family.denoiser.load(recipe.source, denoiser_dtype, subfolder=family.denoiser.name, **weights),
            encoders=[] if ahead else text_encoders.load(recipe.source, family, text_dtype, **weights),
            vae=vae.load_for_run(recipe, family, frozen, weights),
            tokenizers=tokenizers,
            scheduler_config=training_scheduler(family, scheduler_config, recipe),
            extras=family.load_extras(recipe.source, layout, frozen, **weights),
            encodings=text_encoders.open_encodings(recipe, family, tokenizers, text_dtype, device, **weights)
            if ahead else None)
    if recipe.method.low_rank and base_weights is not BaseWeights.half:
        for module in trained_modules(parts, recipe).values():
            quantise(module, frozen, base_weights)
    if recipe.method.low_rank:  # before class images are generated: a pattern that matches no layer is an error
        selection.select(nn.ModuleDict(trained_modules(parts, recipe)), recipe.method, family.adapter_targets)
    if swap_blocks:
        parts.swap = BlockSwap(family.blocks(parts.denoiser), swap_blocks, device)
    for module in parts.modules:
        module.requires_grad_(False).eval().to(device)
    disable_vae_autocast(parts)
    vae.check_channels(family, parts.denoiser, parts.vae, vae.another_base(recipe))
    _check_resolution(recipe, parts)
    return parts


def exact_frozen(parts: Components, recipe: Recipe) -> Components:
    """Return the parts to export: trained parts unchanged, frozen parts loaded from the base model again, in fp32.

    A run may have loaded the frozen parts in half precision; the export contains their original values. An adapter is
    merged into the base model.
    """
    if parts.encodings is not None:  # written in the precision of their files
        encoders = text_encoders.load(recipe.source, parts.family, "auto", variant=recipe.model.variant,
                                      **_options(recipe))
        parts = replace(parts, encoders=encoders, encodings=None)
    if recipe.precision.dtype is Dtype.fp32 and not recipe.method.low_rank:
        return parts
    whole = load(recipe, torch.device("cpu"), frozen=torch.float32)
    if whole.encodings is not None:
        whole = replace(whole, encoders=parts.encoders, encodings=None)
    if recipe.method.low_rank:
        weights = lora.adapter_weights(nn.ModuleDict(trained_modules(parts, recipe)))
        lora.merge(nn.ModuleDict(trained_modules(whole, recipe)), weights)
        if parts.new_tokens is not None:
            parts.new_tokens.write_into(whole.encoders_by_name, parts.tokenizers)
            whole.tokenizers = parts.tokenizers
        return whole
    return replace(parts, vae=whole.vae, extras=whole.extras,
                   encoders=parts.encoders if recipe.train.train_text_encoder else whole.encoders)


def prepare(parts: Components, recipe: Recipe) -> TrainedModel:
    """Prepare the parts for training and return the module to train.

    Set the attention kernels and gradient checkpointing, add adapters, and set `requires_grad` of all weights.
    """
    family, denoiser = parts.family, parts.denoiser
    family.set_attention(denoiser, recipe.attention.kind)
    if recipe.device == "cpu":  # not yet measured on a GPU
        from dreambooth.models.layers.rms_norm import use_lean_norms  # imports diffusers, see import_libraries

        use_lean_norms(denoiser)
    if recipe.train.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    elif recipe.device == "cpu" and recipe.precision.dtype is Dtype.fp32:
        use_matrix_products(denoiser)
    if recipe.memory.gradient_checkpointing:
        apart = recipe.memory.split_prior and recipe.memory.optimizer_in_backward and recipe.with_prior
        family.recompute_activations(denoiser, groups=2 if apart else 1)
        for encoder in parts.encoders if recipe.encodes_in_step else ():
            encoder.gradient_checkpointing_enable()
            encoder.train()  # transformers recomputes in this mode alone; CLIP's text encoders have no dropout
    model = trained_model(parts, recipe)
    if recipe.method.low_rank:
        model.add_adapters(recipe)
        if recipe.device == "cpu":
            from dreambooth.models.adapters.lora_linear import add_in_place

            add_in_place(model)
        if parts.swap is not None:
            model.to(parts.swap.device)  # peft has put the adapters of swapped blocks into host memory
    else:
        model.requires_grad_(True)
    for module in family.untrainable(denoiser, parts.encoders):
        module.requires_grad_(False)
    return model.train()


def import_libraries() -> None:
    """Import the libraries that loading a model needs, and disable their progress bars, except for downloads.

    All these imports are in one function, which pauses the garbage collector and hides bitsandbytes while they run.
    Both make the imports faster (utils/imports.py).
    """
    with without_garbage_collection():
        import diffusers
        import transformers

        for library, variable in ((diffusers, "DIFFUSERS_VERBOSITY"), (transformers, "TRANSFORMERS_VERBOSITY")):
            library.utils.logging.disable_progress_bar()
            if variable not in os.environ:
                library.utils.logging.set_verbosity_error()  # warnings that this project's users cannot act on
        # bitsandbytes warns about missing 4-bit kernels, which most runs do not use.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with without_bitsandbytes():
            families.import_common_classes()


def _options(recipe: Recipe) -> dict[str, Any]:
    return {"revision": recipe.model.revision,
            "local_files_only": hub.local_files_only(recipe.source, recipe.model.offline)}


@contextmanager
def _name_what_is_missing(recipe: Recipe) -> Iterator[None]:
    """Raise a UserError in place of an error of a library that loads files of the base model."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_missing(recipe, error)) from error


def _missing(recipe: Recipe, error: Exception) -> str:
    """Return the error message for a base model that could not be loaded. It ends with what the user can type."""
    reason = hub.failure_reason(error, recipe.source, recipe.model.offline)
    if hub.is_local(recipe.source):
        denoisers = {family.denoiser.name for family in families.FAMILIES}
        half = any(any(Path(recipe.source).glob(f"{name}/*.fp16.safetensors")) for name in denoisers)
        hint = "type model.variant=fp16" if half and not recipe.model.variant else (
            "type model.source=DIR, a diffusers folder (model_index.json and a folder for each part)")
    elif recipe.model.offline:
        hint = "type model.offline=false to ask the hub, or model.source=DIR"
    elif hub.is_gated(error):
        hint = (f"accept its license on https://huggingface.co/{recipe.source}, then type hf auth login (in a job, set "
                "HF_TOKEN)")
    else:
        hint = "check the id and the network, or type model.source=DIR for a folder on this machine"
    return f"the base model {recipe.source} could not be loaded ({reason}): {hint}"


def _check_resolution(recipe: Recipe, parts: Components) -> None:
    side = parts.vae_scale
    if recipe.model.resolution % side:
        raise UserError(f"this model works on multiples of {side} pixels: type model.resolution="
                        f"{max(side, recipe.model.resolution // side * side)}")
