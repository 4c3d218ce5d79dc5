"""Qwen-Image (Qwen team 2025, arXiv:2508.02324): a dual-stream transformer with 20 billion weights.

Its text encoder is Qwen2.5-VL-7B. The VAE has 16 channels and reads videos; a picture is a video of one frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.config.enums import Targets
from dreambooth.errors import UserError
from dreambooth.models.families import qwen_text
from dreambooth.models.families.family import Layout
from dreambooth.models.families.flow_transformer import layer_pattern
from dreambooth.models.families.part import DiffusersPart, TransformersPart
from dreambooth.models.families.transformer_file import TransformerFile

if TYPE_CHECKING:
    from torch import Tensor, nn

# The text around a prompt, as in the training of the base model. Its first tokens have no row in the encoded prompt.
TEMPLATE = ("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
            "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
            "<|im_start|>assistant\n")
ATTENTION = r"attn\.to_[qkv]", r"attn\.to_out\.0", r"attn\.add_[qkv]_proj", r"attn\.to_add_out"


class QwenImageFile(TransformerFile):
    """Single files of Qwen-Image's transformer. Their keys are the names of the weights in diffusers."""

    denoiser_key = "txt_norm.weight"
    required_keys = frozenset({denoiser_key, "img_in.weight", "transformer_blocks.0.img_mod.1.weight"})
    top_names = frozenset({"transformer_blocks", "img_in", "txt_in", "txt_norm", "time_text_embed", "norm_out",
                           "proj_out"})
    architecture = "Qwen-Image"
    implementation = "https://github.com/QwenLM/Qwen-Image"
    stacks: Mapping[str, str] = {}
    rules = ()


class QwenImage(qwen_text.QwenTransformer):
    """Qwen-Image, and models with the same architecture and other sizes.

    The output of `text` has the shape (P, L, D + 1): the last hidden states of the text encoder after the first 34
    tokens, and the mask as the last column. The transformer reads no padding.
    """

    title = "Qwen-Image"
    architecture = "qwen_image"
    hub_ids = ("Qwen/Qwen-Image",)
    license = ("apache-2.0", "Apache-2.0")
    denoiser = DiffusersPart("transformer", "diffusers.models.transformers.transformer_qwenimage",
                             "QwenImageTransformer2DModel")
    vae = DiffusersPart("vae", "diffusers.models.autoencoders.autoencoder_kl_qwenimage", "AutoencoderKLQwenImage")
    encoders = (TransformersPart("text_encoder", "transformers", "Qwen2_5_VLForConditionalGeneration"),)
    dropped = 34  # number of tokens of the template before the prompt
    padding_side = "right"
    tags = ("qwen-image",)
    activations_gib = {True: 0.4, False: 18.0}  # the planner predicts 0.5 and 52 at 512 px, 0.39 and 9.9 with a LoRA
    adapter_targets = {
        Targets.attention: layer_pattern(*ATTENTION),
        Targets.transformer: layer_pattern(*ATTENTION, r"(img|txt)_mlp\.net\.(0\.proj|2)"),
        Targets.all: layer_pattern(".*"),
    }
    pipeline_module = "diffusers.pipelines.qwenimage.pipeline_qwenimage"
    pipeline_name = "QwenImagePipeline"
    overflows_in_fp16 = True  # github.com/Comfy-Org/ComfyUI/issues/10751, DiffSynth-Studio/issues/1379 of modelscope
    single_file = QwenImageFile()
    kohya_version = "qwen_image"

    def matches(self, layout: Layout) -> bool:
        """Return whether it is a model that draws from text alone. Models for editing have a processor of pictures."""
        transformer, vae = layout.configuration("transformer"), layout.configuration("vae")
        return ("joint_attention_dim" in transformer and "temperal_downsample" in vae
                and "processor" not in layout.parts)

    # -- prompts to conditions -------------------------------------------------------------------------------------

    def message(self, tokenizer: Any, prompt: str) -> str:
        return TEMPLATE.format(prompt)

    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        import torch

        states = encoders[0](input_ids=tokens[:, 0], attention_mask=tokens[:, 1], output_hidden_states=True,
                             use_cache=False, logits_to_keep=1).hidden_states[-1]
        return torch.cat([states, tokens[:, 1].unsqueeze(-1).to(states.dtype)], -1)[:, self.dropped:]

    def prompt_arguments(self, pipeline: Any, text: Tensor, negative: Tensor) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for name, encoded in (("prompt_embeds", text), ("negative_prompt_embeds", negative)):
            arguments[name], arguments[f"{name}_mask"] = _without_padding(encoded)
        return arguments

    def guidance_arguments(self, scale: float, count: int) -> dict[str, Any]:
        """Return the arguments. Without a negative prompt, the pipeline does not compute the unconditional prediction.

        The pipeline gives the guided prediction of each token the norm of the conditional one.
        """
        return {"true_cfg_scale": scale} | ({"negative_prompt": [""] * count} if scale > self.no_guidance else {})

    # -- the denoiser ----------------------------------------------------------------------------------------------

    def untrainable(self, denoiser: Any, encoders: Sequence[Any]) -> list[nn.Module]:
        """Return the layers that compute the text stream's output of the last block, which nothing reads."""
        block = denoiser.transformer_blocks[-1]
        return [block.attn.add_q_proj, block.attn.norm_added_q, block.attn.to_add_out, block.txt_mlp]

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels) // self.patch**2

    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, text: Tensor, vae_scale: int,
                size_and_crop: Tensor | None = None) -> Tensor:
        """Return the velocity. The transformer reads the noise level, and squares of 2 x 2 latents as tokens."""
        import torch.nn.functional as F

        height, width = (side // self.patch for side in latents.shape[-2:])
        states, mask = _without_padding(text)
        prediction: Tensor = denoiser(
            hidden_states=F.pixel_unshuffle(latents, self.patch).flatten(2).transpose(1, 2),
            encoder_hidden_states=states.to(latents.dtype), encoder_hidden_states_mask=mask,
            timestep=timesteps.expand(len(latents)).to(latents.dtype),
            img_shapes=[[(1, height, width)]] * len(latents), return_dict=False)[0]
        return F.pixel_shuffle(prediction.transpose(1, 2).reshape(len(latents), -1, height, width), self.patch)

    # -- pixels to latents -----------------------------------------------------------------------------------------

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        with torch.no_grad():
            moments = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist
        mean, std = _statistics(vae, moments.mean)
        return (moments.mean.squeeze(2).float() - mean) / std, moments.std.squeeze(2).float() / std

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae, latents)
        pixels: Tensor = vae.decode((latents * std + mean).to(vae.dtype).unsqueeze(2), return_dict=False)[0]
        return pixels.squeeze(2)

    def vae_scale(self, vae_configuration: Mapping[str, Any]) -> int:
        return int(2 ** len(vae_configuration["temperal_downsample"]))

    def scaling_factor(self, vae_configuration: Mapping[str, Any]) -> float:
        return 1.0

    def vae_channels(self, vae_configuration: Mapping[str, Any]) -> int:
        return int(vae_configuration["z_dim"])

    # -- pipelines -------------------------------------------------------------------------------------------------

    def image_to_image(self, pipeline: Any) -> Any:
        raise UserError(f"{self.title} is used with text alone here: leave image out")


def _without_padding(text: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the hidden states of P prompts up to the longest one, (P, L, D), and their mask (P, L).

    The mask is None if all prompts have the same length: attention without a mask has faster kernels.
    """
    lengths = qwen_text.lengths(text)
    text = text[:, :max(lengths)]
    return text[..., :-1], text[..., -1].bool() if len(set(lengths)) > 1 else None


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the VAE's latents, each (1, C, 1, 1) in fp32 on the device of `latents`."""
    import torch

    mean, std = (torch.tensor(values, dtype=torch.float32, device=latents.device).view(1, -1, 1, 1)
                 for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std


FAMILY = QwenImage()
