"""Z-Image (Tongyi-MAI 2025, arXiv:2511.22699): a single-stream transformer with 6 billion weights.

Its text encoder is Qwen3-4B. The VAE is that of FLUX.1, with 16 channels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.config.enums import Targets
from dreambooth.errors import UserError
from dreambooth.models.families import qwen_text
from dreambooth.models.families.family import Layout
from dreambooth.models.families.flow_transformer import layer_pattern
from dreambooth.models.families.part import DiffusersPart
from dreambooth.models.families.transformer_file import TransformerFile

if TYPE_CHECKING:
    from torch import Tensor

    from dreambooth.config.recipe import Recipe

ATTENTION = r"attention\.to_[qkv]", r"attention\.to_out\.0"


class ZImageFile(TransformerFile):
    """Single files of Z-Image's transformer. Query, key and value of attention are one matrix."""

    denoiser_key = "cap_embedder.1.weight"
    required_keys = frozenset({denoiser_key, "x_embedder.weight", "layers.0.attention.qkv.weight"})
    top_names = frozenset({"layers", "noise_refiner", "context_refiner", "x_embedder", "t_embedder", "cap_embedder",
                           "final_layer", "x_pad_token", "cap_pad_token"})
    architecture = "Z-Image"
    implementation = "https://github.com/Tongyi-MAI/Z-Image"
    stacks = {"attention.to_q.": "attention.qkv."}
    rules = (
        (r"all_final_layer\.2-1\.(.*)", r"final_layer.\1"), (r"all_x_embedder\.2-1\.(.*)", r"x_embedder.\1"),
        (r"(.*\.attention)\.to_out\.0\.(.*)", r"\1.out.\2"),
        (r"(.*\.attention)\.norm_([qk])\.(.*)", r"\1.\2_norm.\3"))


class ZImage(qwen_text.QwenTransformer):
    """Z-Image, and models with the same architecture and other sizes.

    The output of `text` has the shape (P, L, D + 1): the hidden states before the last layer of the text
    encoder, and the mask as the last column. The transformer reads only the rows of the prompt's tokens.
    """

    title = "Z-Image"
    architecture = "z_image"
    hub_ids = ("Tongyi-MAI/Z-Image",)
    loads_lokr = True
    license = ("apache-2.0", "Apache-2.0")
    denoiser = DiffusersPart("transformer", "diffusers.models.transformers.transformer_z_image",
                             "ZImageTransformer2DModel")
    encoders = (qwen_text.QWEN3,)
    thinking = True
    tags = ("z-image",)
    activations_gib = {True: 0.4, False: 12.0}  # the planner predicts 0.5 and 14 at 512 px, 0.26 and 8.7 with a LoRA
    adapter_targets = {
        Targets.attention: layer_pattern(*ATTENTION),
        Targets.transformer: layer_pattern(*ATTENTION, r"feed_forward\.w[123]"),
        Targets.all: layer_pattern(".*"),
    }
    pipeline_module = "diffusers.pipelines.z_image.pipeline_z_image"
    pipeline_name = "ZImagePipeline"
    block_lists = ("layers",)
    overflows_in_fp16 = True  # github.com/Tongyi-MAI/Z-Image/issues/14, github.com/kohya-ss/musubi-tuner/issues/897
    kohya_version = "z_image"
    diffusers_lacks = re.compile(r"lora_unet_(x_embedder|final_layer)")
    single_file = ZImageFile()
    no_guidance = 0.0  # the pipeline computes c + g (c - u), with the conditional c and the unconditional u

    def check_training(self, recipe: Recipe) -> None:
        super().check_training(recipe)
        if recipe.method.low_rank and recipe.method.dropout and recipe.method.targets is Targets.all:
            raise UserError("dropout is drawn for each sample, and the first layers of Z-Image read the tokens of all "
                            "samples as one: type method.targets=transformer, or method.dropout=0")

    def matches(self, layout: Layout) -> bool:
        return "cap_feat_dim" in layout.configuration("transformer")

    # -- prompts to conditions -------------------------------------------------------------------------------------

    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        import torch

        states = encoders[0](input_ids=tokens[:, 0], attention_mask=tokens[:, 1],
                             output_hidden_states=True).hidden_states[-2]
        return torch.cat([states, tokens[:, 1].unsqueeze(-1).to(states.dtype)], -1)

    def prompt_arguments(self, pipeline: Any, text: Tensor, negative: Tensor) -> dict[str, Any]:
        return {"prompt_embeds": _prompt_rows(text), "negative_prompt_embeds": _prompt_rows(negative)}

    # -- the denoiser ----------------------------------------------------------------------------------------------

    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, text: Tensor, vae_scale: int,
                size_and_crop: Tensor | None = None) -> Tensor:
        """Return the velocity, noise - x_0.

        The transformer reads 1 - t, where t is the noise level, and predicts x_0 - noise.
        """
        import torch

        states = [rows.to(latents.dtype) for rows in _prompt_rows(text)]
        times = (1 - timesteps).expand(len(latents))
        images = list(latents.unsqueeze(2))
        prediction = denoiser(images, times, states, return_dict=False)[0]
        return -torch.stack(list(prediction)).squeeze(2)


def _prompt_rows(text: Tensor) -> list[Tensor]:
    """Return the hidden states of the tokens of each prompt, without padding: P tensors (L_i, D)."""
    return [rows[:length, :-1] for rows, length in zip(text, qwen_text.lengths(text), strict=True)]


FAMILY = ZImage()
