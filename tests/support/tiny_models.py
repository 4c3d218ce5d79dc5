"""Tiny models of the architecture of each family, with random weights and the tokenizer of the tiny base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.utils.assets import resolve_asset

FAMILIES = ("sd15", "sd21", "sdxl")
FLOW_FAMILIES = ("z_image", "flux2_klein", "sd35_medium", "qwen_image")
FEWER_FAST = (*FLOW_FAMILIES[:3], pytest.param("qwen_image", marks=pytest.mark.slow))  # for tests that take a second
HIDDEN = {"sd15": 32, "sd21": 40, "sdxl": 32}
SECOND = 48  # SDXL's second text encoder


def text_config(width: int, act: str, layers: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=1803, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, projection_dim=width,
        num_attention_heads=4, max_position_embeddings=16, hidden_act=act, bos_token_id=1801, eos_token_id=1802,
        pad_token_id=1802)


def unet_config(family: str) -> dict[str, Any]:
    """One resolution with attention and one without, as the real ones have; SDXL's attention is in the deeper one."""
    two = family == "sdxl"
    across = HIDDEN[family] + SECOND * two
    config: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 8,
        "block_out_channels": [16, 32], "cross_attention_dim": across,
        "attention_head_dim": 2 if family == "sd15" else [2, 4],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"] if two else ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"] if two else ["UpBlock2D", "CrossAttnUpBlock2D"],
        "use_linear_projection": family != "sd15"}
    if two:
        config |= {"transformer_layers_per_block": [1, 2], "addition_embed_type": "text_time",
                   "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": SECOND + 6 * 8}
    return config


def shifted_vae(scaling_factor: float, shift_factor: float) -> Any:
    """A VAE whose latents are shifted and scaled, with 4 channels in place of the 16 of published ones."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        scaling_factor=scaling_factor, shift_factor=shift_factor, use_quant_conv=False, use_post_quant_conv=False)


def make_z_image(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers folder of Z-Image's architecture with random weights; the same every time."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vae = shifted_vae(0.3611, 0.1159)
        transformer = ZImageTransformer2DModel(
            in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
            axes_dims=[8, 8, 8], axes_lens=[128, 32, 32])
        for name in ("x_pad_token", "cap_pad_token"):
            torch.nn.init.normal_(getattr(transformer, name))
        encoder = Qwen3Model(Qwen3Config(
            vocab_size=1803, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64))
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae, text_encoder=encoder,
        tokenizer=chat_tokenizer(), transformer=transformer)
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder


def make_flux2_klein(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers folder of FLUX.2 klein's architecture with random weights; the same every time."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        transformer = Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * 16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False)
        encoder = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=1803, hidden_size=16, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = Flux2KleinPipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=chat_tokenizer(),
                                  transformer=transformer)
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder


def make_sd35_medium(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers folder of Stable Diffusion 3.5's architecture with random weights; the same every time.

    The tokenizer of T5 is that of the tiny base, with 24 tokens, because T5's own is not on this machine.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        vae = shifted_vae(1.5305, 0.0609)
        transformer = SD3Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=96, caption_projection_dim=32, pooled_projection_dim=40 + 48, pos_embed_max_size=12,
            dual_attention_layers=(0,), qk_norm="rms_norm")
        clip = [CLIPTextModelWithProjection(text_config(width, "gelu", 3)) for width in (40, 48)]
        t5 = T5EncoderModel(T5Config(vocab_size=1803, d_model=96, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                                     feed_forward_proj="gated-gelu"))
    tokenizers = [CLIPTokenizer.from_pretrained(resolve_asset("package:tiny-sd"), subfolder="tokenizer")
                  for _ in range(3)]
    tokenizers[2].model_max_length = 24
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=clip[0], text_encoder_2=clip[1], text_encoder_3=t5,
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], tokenizer_3=tokenizers[2])
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder


def make_qwen_image(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers folder of Qwen-Image's architecture with random weights; the same every time.

    The tokenizer is that of the tiny flow base, with 128 tokens: the template of a prompt has 88 of them.
    """
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
            latents_mean=[-0.5, 0.1, 0.9, -0.2], latents_std=[0.5, 1.5, 2.0, 0.8])
        transformer = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6))
        encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
            text_config={"vocab_size": 1115, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}},
            vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
                           "out_hidden_size": 32, "fullatt_block_indexes": [0]}))
    tokenizer = AutoTokenizer.from_pretrained(resolve_asset("package:tiny-flow"), subfolder="tokenizer")
    tokenizer.model_max_length = 128
    scheduler = FlowMatchEulerDiscreteScheduler(max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02,
                                                use_dynamic_shifting=True)
    pipeline = QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer,
                                 transformer=transformer)
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder


def chat_tokenizer() -> Any:
    """The tokenizer of the tiny base with a chat template and 64 tokens."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(resolve_asset("package:tiny-sd"), subfolder="tokenizer")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.model_max_length = 64
    return tokenizer


def make_flow(family: str, folder: Path) -> Path:
    """A diffusers folder of one of FLOW_FAMILIES."""
    makers = {"z_image": make_z_image, "flux2_klein": make_flux2_klein, "sd35_medium": make_sd35_medium,
              "qwen_image": make_qwen_image}
    return makers[family](folder)


def make(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers folder of the family; the same every time."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from dreambooth.models import families
    from dreambooth.models.components import Components
    from dreambooth.serialization.export import whole_pipeline

    known = Path(resolve_asset("package:architectures")) / family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FAMILIES.index(family))
        vae = AutoencoderKL(
            sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=json.loads((known / "vae/config.json").read_text()).get("scaling_factor", 0.18215))
        unet = UNet2DConditionModel(**unet_config(family))
        encoders = [CLIPTextModel(text_config(
            HIDDEN[family], "gelu" if family == "sd21" else "quick_gelu", 2 + (family == "sdxl")))]
        if family == "sdxl":
            encoders.append(CLIPTextModelWithProjection(text_config(SECOND, "gelu", 3)))
    tokenizer = CLIPTokenizer.from_pretrained(resolve_asset("package:tiny-sd"), subfolder="tokenizer")
    parts = Components(
        family=families.of_architecture(family), denoiser=unet, vae=vae, encoders=encoders,
        tokenizers=[tokenizer] * len(encoders),
        scheduler_config=json.loads((known / "scheduler/scheduler_config.json").read_text()))
    for module in parts.modules:
        module.to(dtype)
    whole_pipeline(parts).save_pretrained(folder)
    return folder
