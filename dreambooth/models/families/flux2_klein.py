"""FLUX.2 klein base 4B (Black Forest Labs 2026): a transformer with 4 billion weights, not distilled.

Its text encoder is Qwen3-4B. The VAE has 32 channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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

ENCODER_LAYERS = 9, 18, 27  # the hidden states that are the transformer's condition
SIDE = 2  # side, in latents of the VAE, of the square that becomes one latent of the transformer
ATTENTION = (r"attn\.to_[qkv]", r"attn\.to_out(\.0)?", r"attn\.add_[qkv]_proj", r"attn\.to_add_out",
             r"attn\.to_qkv_mlp_proj")


class Flux2File(TransformerFile):
    """Single files of FLUX.2's transformer, in the key names of Black Forest Labs."""

    denoiser_key = "single_stream_modulation.lin.weight"
    required_keys = frozenset({denoiser_key, "double_blocks.0.img_attn.qkv.weight"})
    top_names = frozenset({"double_blocks", "single_blocks", "img_in", "txt_in", "time_in", "guidance_in",
                           "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
                           "final_layer"})
    architecture = "Flux.2-klein-4b"
    implementation = "https://github.com/black-forest-labs/flux2"
    stacks = {"attn.to_q.": "img_attn.qkv.", "attn.add_q_proj.": "txt_attn.qkv."}
    rules = (
        (r"x_embedder\.(.*)", r"img_in.\1"), (r"context_embedder\.(.*)", r"txt_in.\1"),
        (r"time_guidance_embed\.timestep_embedder\.linear_1\.(.*)", r"time_in.in_layer.\1"),
        (r"time_guidance_embed\.timestep_embedder\.linear_2\.(.*)", r"time_in.out_layer.\1"),
        (r"time_guidance_embed\.guidance_embedder\.linear_1\.(.*)", r"guidance_in.in_layer.\1"),
        (r"time_guidance_embed\.guidance_embedder\.linear_2\.(.*)", r"guidance_in.out_layer.\1"),
        (r"(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation)\.linear\.(.*)",
         r"\1.lin.\2"),
        (r"proj_out\.(.*)", r"final_layer.linear.\1"),
        (r"norm_out\.linear\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.(.*)", r"single_blocks.\1.linear1.\2"),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_out\.(.*)", r"single_blocks.\1.linear2.\2"),
        (r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0\.(.*)", r"double_blocks.\1.img_attn.proj.\2"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out\.(.*)", r"double_blocks.\1.txt_attn.proj.\2"),
        (r"transformer_blocks\.(\d+)\.ff\.linear_in\.(.*)", r"double_blocks.\1.img_mlp.0.\2"),
        (r"transformer_blocks\.(\d+)\.ff\.linear_out\.(.*)", r"double_blocks.\1.img_mlp.2.\2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_in\.(.*)", r"double_blocks.\1.txt_mlp.0.\2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_out\.(.*)", r"double_blocks.\1.txt_mlp.2.\2"),
        (r"transformer_blocks\.(.*)", r"double_blocks.\1"))
    swapped = (r"norm_out\.linear\..*",)

    def canonical_key(self, name: str) -> str:
        """Return the current form of a key. ComfyUI saves `scale` as `weight`."""
        return re.sub(r"(_blocks\..*\.norm\.(?:query|key)_norm)\.weight", r"\1.scale", super().canonical_key(name))


class Flux2Klein(qwen_text.QwenTransformer):
    """FLUX.2 klein, and models with the same architecture and other sizes.

    The latents of a run are the VAE's latents, normalised by the VAE's batch norm, with each square of 2 x 2 latents as
    the channels of one: (N, 128, H / 16, W / 16). Each of them is one token of the transformer.

    The output of `text` has the shape (P, L, 3 D): three hidden states of the text encoder. The
    transformer also reads the rows of padding.
    """

    title = "FLUX.2 klein"
    architecture = "flux2_klein"
    hub_ids = ("black-forest-labs/FLUX.2-klein-base-4B",)
    loads_lokr = True
    license = ("apache-2.0", "Apache-2.0")
    denoiser = DiffusersPart("transformer", "diffusers.models.transformers.transformer_flux2",
                             "Flux2Transformer2DModel")
    vae = DiffusersPart("vae", "diffusers.models.autoencoders.autoencoder_kl_flux2", "AutoencoderKLFlux2")
    encoders = (qwen_text.QWEN3_LM,)
    thinking = False
    tags = ("flux2",)
    patch = 1
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    activations_gib = {True: 0.3, False: 7.0}  # the planner predicts 0.5 and 7.5 at 512 px, 0.24 and 5.9 with a LoRA
    adapter_targets = {
        Targets.attention: layer_pattern(*ATTENTION),
        Targets.transformer: layer_pattern(*ATTENTION, r"ff(_context)?\.linear_(in|out)"),
        Targets.all: layer_pattern(".*"),
    }
    pipeline_module = "diffusers.pipelines.flux2.pipeline_flux2_klein"
    pipeline_name = "Flux2KleinPipeline"
    single_file = Flux2File()
    kohya_version = "flux_2_klein_4b"
    diffusers_lacks = re.compile(r"lora_unet_(double_stream_mod|single_stream_mod|guidance_in|final_layer_adaLN)")

    def matches(self, layout: Layout) -> bool:
        return "timestep_guidance_channels" in layout.configuration("transformer")

    # -- prompts to conditions -------------------------------------------------------------------------------------

    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        import torch

        states = encoders[0](input_ids=tokens[:, 0], attention_mask=tokens[:, 1], output_hidden_states=True,
                             use_cache=False, logits_to_keep=1).hidden_states
        return torch.cat([states[number] for number in ENCODER_LAYERS], -1)

    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        import torch

        config = encoders[0].config
        return torch.empty(count, self.rows(config.max_position_embeddings), len(ENCODER_LAYERS) * config.hidden_size)

    def prompt_arguments(self, pipeline: Any, text: Tensor, negative: Tensor) -> dict[str, Any]:
        return {"prompt_embeds": text, "negative_prompt_embeds": negative}

    # -- the denoiser ----------------------------------------------------------------------------------------------

    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, text: Tensor, vae_scale: int,
                size_and_crop: Tensor | None = None) -> Tensor:
        """Return the velocity. The transformer reads the noise level and positions of its tokens in four dimensions."""
        import torch

        height, width = latents.shape[-2:]
        device = latents.device
        zero = torch.zeros(1, dtype=torch.long, device=device)
        rows, columns = (torch.arange(side, device=device) for side in (height, width))
        image_ids = torch.cartesian_prod(zero, rows, columns, zero)
        text_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(text.shape[1], device=device))
        prediction: Tensor = denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2), encoder_hidden_states=text.to(latents.dtype),
            timestep=timesteps.expand(len(latents)).to(latents.dtype), img_ids=image_ids, txt_ids=text_ids,
            guidance=None, return_dict=False)[0]
        return prediction.transpose(1, 2).reshape(len(latents), -1, height, width)

    # -- pixels to latents -----------------------------------------------------------------------------------------

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        with torch.no_grad():
            moments = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            mean, std = self._norm(vae)
            return (_merge(moments.mean.float()) - mean) / std, _merge(moments.std.float()) / std

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._norm(vae)
        pixels: Tensor = vae.decode(_split(latents * std + mean).to(vae.dtype), return_dict=False)[0]
        return pixels

    def vae_scale(self, vae_configuration: Mapping[str, Any]) -> int:
        """Return the image side in pixels divided by the side of the run's latents: 16 for the published VAE."""
        return SIDE * super().vae_scale(vae_configuration)

    def scaling_factor(self, vae_configuration: Mapping[str, Any]) -> float:
        return 1.0

    def vae_channels(self, vae_configuration: Mapping[str, Any]) -> int:
        return SIDE**2 * super().vae_channels(vae_configuration)

    def _norm(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's batch norm, each (1, 4 C, 1, 1) in fp32."""
        mean, variance = (value.float().view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    # -- pipelines -------------------------------------------------------------------------------------------------

    def image_to_image(self, pipeline: Any) -> Any:
        raise UserError(f"{self.title} has no image-to-image pipeline: leave image out")


def _merge(latents: Tensor) -> Tensor:
    """Return latents (N, C, h, w) as (N, 4 C, h / 2, w / 2)."""
    import torch.nn.functional as F

    return F.pixel_unshuffle(latents, SIDE)


def _split(latents: Tensor) -> Tensor:
    """Return latents (N, 4 C, h, w) as (N, C, 2 h, 2 w), the inverse of `_merge`."""
    import torch.nn.functional as F

    return F.pixel_shuffle(latents, SIDE)


FAMILY = Flux2Klein()
