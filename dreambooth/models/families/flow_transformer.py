"""The base class of families with a diffusion transformer that is trained by flow matching. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.config.enums import AttentionKind, Dtype, MethodKind
from dreambooth.errors import UserError
from dreambooth.models.families.family import Family
from dreambooth.models.families.file_format import Entry
from dreambooth.models.families.part import DiffusersPart
from dreambooth.models.families.transformer_file import TransformerFile

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dreambooth.config.recipe import Recipe
    from dreambooth.config.schema import Flow
    from dreambooth.models.noise_schedule import NoiseSchedule

KOHYA_PREFIX = "lora_unet_"  # of all keys in kohya's LoRA layout
LYCORIS_PREFIX = "lycoris_"  # of the keys that contain the names of diffusers
# Names in diffusers.models.attention_dispatch. xformers needs query, key and value in one precision: the norms of query
# and key, which autocast computes in fp32, do not give it.
ATTENTION_BACKENDS = {AttentionKind.sdpa: "native", AttentionKind.eager: "_native_math"}


class FlowTransformer(Family):
    """Base class: a transformer predicts the velocity of the latents of an AutoencoderKL.

    The text encoders are language models. They are frozen, as in the training of the base models.
    """

    vae = DiffusersPart("vae", "diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL")
    sampler_title = "Euler"
    lora_programs = {kind: "ComfyUI" for kind in MethodKind if kind is not MethodKind.full}
    encodes_ahead = True
    single_file: TransformerFile
    block_lists: tuple[str, ...] = ("transformer_blocks",)  # the transformer's lists of blocks, in order
    patch = 2  # side of a token of the transformer, in latents of the run
    attention_kinds: tuple[AttentionKind, ...] = tuple(ATTENTION_BACKENDS)
    kohya_version: str  # kohya's name of the base model, in the metadata of LoRA files

    # -- parts -----------------------------------------------------------------------------------------------------

    def check_training(self, recipe: Recipe) -> None:
        train = recipe.train
        undefined = {
            "train.snr_gamma=null": train.snr_gamma is not None,
            "train.debiased_estimation=false": train.debiased_estimation,
            "train.huber_delta=null": train.huber_delta is not None,
            "train.noise_offset=0": train.noise_offset != 0,
            "train.multires_noise=0": train.multires_noise != 0,
            "model.zero_terminal_snr=false": recipe.model.zero_terminal_snr,
        }
        if needed := [override for override, is_used in undefined.items() if is_used]:
            raise UserError(f"{self.title} is trained by flow matching, for which weights and thresholds by "
                            "the signal-to-noise ratio, noise that is not white and zero terminal SNR are not "
                            f"defined: type {' '.join(needed)}")
        if train.train_text_encoder:
            raise UserError(f"the text encoder of {self.title} is a language model, which is not trained: type "
                            "train.train_text_encoder=false")
        if recipe.method.new_tokens:
            raise UserError(f"the text encoder of {self.title} leaves the memory before training begins, so that no "
                            "embeddings of new tokens can be trained: type method.new_tokens=0, which keeps the rare "
                            "word as it is")
        if self.overflows_in_fp16 and recipe.precision.dtype is Dtype.fp16:
            raise UserError(f"activations of {self.title} exceed the largest number of fp16: type precision=bf16 on a "
                            "GPU of compute capability 8.0 or higher, or precision=fp32 method=lora "
                            "method.base_weights=int8")
        if recipe.attention.kind not in self.attention_kinds:
            raise UserError(f"{self.title} has no attention={recipe.attention.kind.value}: type attention=sdpa")

    def load_tokenizer(self, name: str, source: str | Path, **options: Any) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, subfolder=name, **options)

    def save_tokenizer(self, tokenizer: Any, folder: Path) -> None:
        tokenizer.save_pretrained(folder)

    def packaged_tokenizer(self, name: str) -> Any:
        raise ValueError(f"it contains no {name}, which {self.title} needs")

    # -- the denoiser ----------------------------------------------------------------------------------------------

    def set_attention(self, denoiser: Any, kind: AttentionKind) -> None:
        denoiser.set_attention_backend(ATTENTION_BACKENDS[kind])

    def recompute_activations(self, denoiser: Any, groups: int) -> None:
        """Enable gradient checkpointing: each block of the transformer is recomputed from its input.

        `groups` has no effect, because the tensors inside one block are small compared with those between the blocks.
        """
        denoiser.enable_gradient_checkpointing()

    def blocks(self, denoiser: Any) -> Sequence[nn.Module]:
        return [block for name in self.block_lists for block in getattr(denoiser, name)]

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels)

    def levels(self, denoiser: Any) -> int:
        """Return the side of a token: sides of pictures are multiples of it."""
        return self.patch

    def native_side(self, denoiser: Any, vae: Any, vae_scale: int) -> int:
        side = getattr(vae.config, "sample_size", None)  # the transformer itself accepts all sides
        return int(side or 1024)

    def with_native_side(self, configuration: Mapping[str, Any], latent_side: int) -> dict[str, Any]:
        """Return the configuration unchanged. It contains no side, because the transformer accepts all sides."""
        return dict(configuration)

    # -- pixels to latents -----------------------------------------------------------------------------------------

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        with torch.no_grad():
            moments = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return moments.mean.float() - (vae.config.shift_factor or 0.0), moments.std.float()

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        latents = latents + (vae.config.shift_factor or 0.0)
        pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return pixels

    # -- noise -----------------------------------------------------------------------------------------------------

    def noise_schedule(self, scheduler_config: Mapping[str, Any], flow: Flow, latent_side: int) -> NoiseSchedule:
        from dreambooth.models.flow_matching import build_schedule

        return build_schedule(flow, self.shift(scheduler_config, (latent_side // self.patch) ** 2))

    def shift(self, scheduler_config: Mapping[str, Any], image_tokens: int) -> float:
        """Return the shift of the base model's noise levels for pictures of `image_tokens` tokens."""
        from dreambooth.models.flow_matching import dynamic_shift

        config = scheduler_config
        if not config.get("use_dynamic_shifting", False):
            return float(config.get("shift", 1.0))
        return dynamic_shift(image_tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
                             config.get("base_shift", 0.5), config.get("max_shift", 1.15))

    def sampling_scheduler(self, scheduler_config: Mapping[str, Any]) -> Any:
        """Return the Euler scheduler of flow matching (Esser et al. 2024, arXiv:2403.03206)."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)

    # -- pipelines -------------------------------------------------------------------------------------------------

    def side_multiple(self, pipeline: Any) -> int:
        return 2 * int(pipeline.vae_scale_factor)  # a token has the side of two latents of the VAE, in all families

    def build_pipeline(self, parts: Mapping[str, Any], scheduler: Any) -> Any:
        return self.pipeline_type(**parts, scheduler=scheduler)

    # -- adapters --------------------------------------------------------------------------------------------------

    def kohya_entries(self, names: Collection[str], denoiser_config: Any, separate: bool = False) -> Iterator[Entry]:
        """Yield the entries. The keys are derived from the names of the layers in single files, as ComfyUI reads them.

        ComfyUI (comfy/lora.py) reads all layers under these names. Under diffusers' names it does not know the
        modulation layers of FLUX.2, and scales the rows of a swapped DoRA in the wrong order.

        A layer that is a part of a stacked layer in the file, and has an entry of its own, has the name of LyCORIS for
        diffusers models, such as lycoris_layers_0_attention_to_q. ComfyUI reads it as a slice of the stacked layer.
        With `separate`, layers with swapped rows have such names, too, because ComfyUI then swaps the rows itself.
        """
        part, layout = self.denoiser.name, self.single_file
        weights = [f"{name.removeprefix(f'{part}.')}.weight" for name in names]
        alone = {weight for weight in weights
                 if (stack := layout.stack(weight)) and (separate or not set(stack) <= set(weights))}
        if separate:
            alone |= {weight for weight in weights if layout.is_swapped(weight, denoiser_config)}
        for weight in (weight for weight in weights if weight in alone):
            module = weight.removesuffix(".weight")
            yield Entry(LYCORIS_PREFIX + module.replace(".", "_"), part, (f"{part}.{module}",))
        for entry in layout.entries(part, [weight for weight in weights if weight not in alone], denoiser_config):
            key = entry.key.removeprefix(layout.key_prefix).removesuffix(".weight")
            modules = tuple(f"{part}.{weight.removesuffix('.weight')}" for weight in entry.names)
            yield Entry(KOHYA_PREFIX + key.replace(".", "_"), part, modules, entry.form)

    def kohya_metadata(self, prediction_type: str) -> dict[str, str]:
        modelspec = self.single_file.modelspec(prediction_type)
        return modelspec | {"modelspec.architecture": modelspec["modelspec.architecture"] + "/lora",
                            "ss_base_model_version": self.kohya_version}


def layer_pattern(*names: str) -> re.Pattern[str]:
    """Return a pattern for layers whose names end with one of `names`, which are regular expressions."""
    return re.compile(rf"(.*\.)?({'|'.join(names)})")
