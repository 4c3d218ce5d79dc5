"""Stable Diffusion 3.5 medium (Esser et al. 2024, arXiv:2403.03206): a transformer (MMDiT-X) with 2.5 billion weights.

It has three text encoders: CLIP ViT-L, OpenCLIP ViT-bigG and T5-XXL.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.config.enums import AttentionKind, Targets
from dreambooth.errors import UserError
from dreambooth.models.families import clip_text
from dreambooth.models.families.family import Layout
from dreambooth.models.families.flow_transformer import FlowTransformer, layer_pattern
from dreambooth.models.families.part import DiffusersPart, TransformersPart
from dreambooth.models.families.transformer_file import TransformerFile

if TYPE_CHECKING:
    from torch import Tensor

T5_LENGTH = 256  # number of tokens that T5 reads
ATTENTION = r"attn2?\.to_[qkv]", r"attn2?\.to_out\.0", r"attn\.add_[qkv]_proj", r"attn\.to_add_out"


class Sd35File(TransformerFile):
    """Single files of Stable Diffusion 3.5's transformer, in the key names of Stability AI."""

    key_prefix = "model.diffusion_model."
    denoiser_key = "joint_blocks.0.x_block.attn.qkv.weight"
    required_keys = frozenset({denoiser_key, "joint_blocks.0.x_block.attn2.qkv.weight"})
    top_names = frozenset({"joint_blocks", "x_embedder", "t_embedder", "y_embedder", "context_embedder", "pos_embed",
                           "final_layer"})
    architecture = "stable-diffusion-v3.5-medium"
    implementation = "https://github.com/Stability-AI/sd3.5"
    stacks = {"attn.to_q.": "x_block.attn.qkv.", "attn.add_q_proj.": "context_block.attn.qkv.",
              "attn2.to_q.": "x_block.attn2.qkv."}
    rules = (
        (r"pos_embed\.pos_embed", "pos_embed"), (r"pos_embed\.proj\.(.*)", r"x_embedder.proj.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_1\.(.*)", r"t_embedder.mlp.0.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_2\.(.*)", r"t_embedder.mlp.2.\1"),
        (r"time_text_embed\.text_embedder\.linear_1\.(.*)", r"y_embedder.mlp.0.\1"),
        (r"time_text_embed\.text_embedder\.linear_2\.(.*)", r"y_embedder.mlp.2.\1"),
        (r"norm_out\.linear\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
        (r"proj_out\.(.*)", r"final_layer.linear.\1"),
        (r"transformer_blocks\.(\d+)\.(attn2?)\.norm_([qk])\.(.*)", r"joint_blocks.\1.x_block.\2.ln_\3.\4"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.(.*)", r"joint_blocks.\1.context_block.attn.ln_\2.\3"),
        (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0\.(.*)", r"joint_blocks.\1.x_block.\2.proj.\3"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out\.(.*)", r"joint_blocks.\1.context_block.attn.proj.\2"),
        (r"transformer_blocks\.(\d+)\.norm1\.linear\.(.*)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2"),
        (r"transformer_blocks\.(\d+)\.norm1_context\.linear\.(.*)",
         r"joint_blocks.\1.context_block.adaLN_modulation.1.\2"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.(.*)", r"joint_blocks.\1.x_block.mlp.fc1.\2"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2\.(.*)", r"joint_blocks.\1.x_block.mlp.fc2.\2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.(.*)", r"joint_blocks.\1.context_block.mlp.fc1.\2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.2\.(.*)", r"joint_blocks.\1.context_block.mlp.fc2.\2"),
        (r"transformer_blocks\.(.*)", r"joint_blocks.\1"))
    swapped = (r"norm_out\.linear\..*",)

    def is_swapped(self, name: str, config: Any) -> bool:
        """Return whether the halves are swapped: in the last norm, and in the last block's norm of the text."""
        last = f"transformer_blocks.{config.num_layers - 1}.norm1_context."
        return name.startswith(last) or super().is_swapped(name, config)


class StableDiffusion35(FlowTransformer):
    """Stable Diffusion 3.5 medium, and models with the same architecture and other sizes.

    The token ids of P prompts have the shape (P, 3, 256), one row per text encoder, padded with zeros. The output of
    `text` has the shape (P, 77 + 256 + 1, D). The first rows are the concatenated hidden states of both CLIP encoders
    before their last layers, padded with zeros to the width D of T5. Then follow the hidden states of T5, and one row
    with the pooled states of both CLIP encoders, padded with zeros.
    """

    title = "Stable Diffusion 3.5"
    architecture = "sd35_medium"
    hub_ids = ("stabilityai/stable-diffusion-3.5-medium",)
    license = ("other", "the Stability AI Community License")
    denoiser = DiffusersPart("transformer", "diffusers.models.transformers.transformer_sd3", "SD3Transformer2DModel")
    encoders = (TransformersPart("text_encoder", "transformers", "CLIPTextModelWithProjection"), clip_text.SECOND,
                TransformersPart("text_encoder_3", "transformers", "T5EncoderModel"))
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    tags = ("stable-diffusion-3.5",)
    attention_kinds = (AttentionKind.sdpa,)
    activations_gib = {True: 0.1, False: 4.0}  # the planner predicts 0.1 and 4.2 at 512 px, 0.1 and 3.0 with a LoRA
    adapter_targets = {
        Targets.attention: layer_pattern(*ATTENTION),
        Targets.transformer: layer_pattern(*ATTENTION, r"ff(_context)?\.net\.(0\.proj|2)"),
        Targets.all: layer_pattern(".*"),
    }
    pipeline_module = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"
    pipeline_name = "StableDiffusion3Pipeline"
    single_file = Sd35File()
    kohya_version = "sd35_medium"
    diffusers_lacks = re.compile(r"lora_unet_joint_blocks")

    def matches(self, layout: Layout) -> bool:
        configuration = layout.configuration("transformer")
        return "pooled_projection_dim" in configuration and "pos_embed_max_size" in configuration

    def set_attention(self, denoiser: Any, kind: AttentionKind) -> None:
        """Do nothing: the transformer always uses PyTorch's scaled_dot_product_attention."""

    # -- prompts to conditions -------------------------------------------------------------------------------------

    def check_prompt(self, tokenizers: Sequence[Any], prompt: str) -> None:
        for tokenizer in tokenizers[:2]:
            clip_text.check_length(tokenizer, prompt)
        count, limit = len(tokenizers[2](prompt).input_ids), _t5_length(tokenizers[2].model_max_length)
        if count > limit:
            raise UserError(f"this model reads {limit} tokens and the prompt has {count}: shorten {prompt!r}")

    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        import torch
        import torch.nn.functional as F

        self.check_prompt(tokenizers, prompt)
        limit = _t5_length(tokenizers[2].model_max_length)
        clip = [clip_text.tokenize(tokenizer, prompt) for tokenizer in tokenizers[:2]]
        t5 = tokenizers[2](prompt, padding="max_length", max_length=limit, return_tensors="pt").input_ids
        length = max(limit, clip[0].shape[1])
        return torch.stack([F.pad(ids, (0, length - ids.shape[1])) for ids in (*clip, t5)], 1)

    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        import torch

        return torch.zeros(count, len(encoders), T5_LENGTH, dtype=torch.long)

    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        length = encoders[0].config.max_position_embeddings
        first, second = (encoder(tokens[:, number, :length], output_hidden_states=True)
                         for number, encoder in enumerate(encoders[:2]))
        t5: Tensor = encoders[2](tokens[:, 2])[0]
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], -1).unsqueeze(1)
        rows = [F.pad(states, (0, t5.shape[-1] - states.shape[-1])).to(t5.dtype) for states in (clip, pooled)]
        return torch.cat([rows[0], t5, rows[1]], 1)

    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        import torch

        length = encoders[0].config.max_position_embeddings + T5_LENGTH + 1
        return torch.empty(count, length, encoders[2].config.d_model)

    def prompt_arguments(self, pipeline: Any, text: Tensor, negative: Tensor) -> dict[str, Any]:
        width = pipeline.transformer.config.pooled_projection_dim
        return {"prompt_embeds": text[:, :-1], "pooled_prompt_embeds": text[:, -1, :width],
                "negative_prompt_embeds": negative[:, :-1], "negative_pooled_prompt_embeds": negative[:, -1, :width]}

    def sampling_arguments(self, pipeline: Any) -> dict[str, Any]:
        """Return the number of tokens that T5 reads, as in `tokens`."""
        return {"max_sequence_length": _t5_length(pipeline.tokenizer_3.model_max_length)}

    # -- the denoiser ----------------------------------------------------------------------------------------------

    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, text: Tensor, vae_scale: int,
                size_and_crop: Tensor | None = None) -> Tensor:
        """Return the velocity. The transformer reads 1000 t, where t is the noise level."""
        pooled = text[:, -1, :denoiser.config.pooled_projection_dim].to(latents.dtype)
        times = (1000 * timesteps).expand(len(latents))
        prediction: Tensor = denoiser(
            hidden_states=latents, timestep=times, encoder_hidden_states=text[:, :-1].to(latents.dtype),
            pooled_projections=pooled, return_dict=False)[0]
        return prediction


def _t5_length(max_length: int) -> int:
    """Return the number of tokens that T5 reads, for a tokenizer of at most `max_length` tokens."""
    return min(T5_LENGTH, max_length)


FAMILY = StableDiffusion35()
