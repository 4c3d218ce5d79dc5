"""Writes a base model in fp32 for the trainers of speed.py: python benchmarks/make_base.py NAME FOLDER

`tiny` and `tiny_flow` are the shipped base models, converted from fp16. `tiny_sdxl` has the parts of SDXL in the size
of `tiny`, random weights, and the tokenizer of `tiny`. `full` has the architecture of Stable Diffusion 1.5 (the
published config.json files of UNet, VAE and text encoder) with random weights, and the tokenizer of the tiny base model
padded to 77 tokens.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth.utils.assets import resolve_asset

UNET: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
TEXT: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768, "vocab_size": 49408, "hidden_act": "quick_gelu"}


def build_full_size() -> StableDiffusionPipeline:
    """Build SD 1.5 as its config files describe it, with random weights from seed 0."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(resolve_asset("package:tiny-sd"), subfolder="tokenizer")
    tokenizer.model_max_length = 77
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    scheduler = PNDMScheduler.from_pretrained(resolve_asset("package:tiny-sd"), subfolder="scheduler")
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET), vae=AutoencoderKL(**VAE), tokenizer=tokenizer, scheduler=scheduler,
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT, **ids)), safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None, requires_safety_checker=False)  # type: ignore[arg-type]


def build_tiny_sdxl() -> StableDiffusionXLPipeline:
    """Build a small model with the parts of SDXL, with random weights from seed 0, and the VAE of the tiny base."""
    torch.manual_seed(0)
    tiny = StableDiffusionPipeline.from_pretrained(resolve_asset("package:tiny-sd"), dtype=torch.float32)
    width, second = tiny.text_encoder.config.hidden_size, 128
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), layers_per_block=2, cross_attention_dim=width + second,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=32, in_channels=4, out_channels=4,
        projection_class_embeddings_input_dim=second + 6 * 32)
    config = CLIPTextConfig.from_dict(tiny.text_encoder.config.to_dict() | {
        "hidden_size": second, "intermediate_size": 2 * second, "projection_dim": second})
    return StableDiffusionXLPipeline(
        vae=tiny.vae, text_encoder=tiny.text_encoder, text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tiny.tokenizer, tokenizer_2=tiny.tokenizer, unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))


def main() -> None:
    kind, folder = sys.argv[1:]
    if kind == "full":
        pipeline: DiffusionPipeline = build_full_size()
    elif kind == "tiny_sdxl":
        pipeline = build_tiny_sdxl()
    else:
        source = resolve_asset({"tiny": "package:tiny-sd", "tiny_flow": "package:tiny-flow"}[kind])
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=torch.float32)
    pipeline.to(dtype=torch.float32)
    pipeline.save_pretrained(Path(folder))
    for file in Path(folder).glob("tokenizer*/tokenizer.json"):
        write_published_files(file)
    for file in Path(folder).glob("text_encoder*/model.safetensors"):
        restore_published_names(file, "model." if kind == "tiny_flow" else "text_model.")


def write_published_files(file: Path) -> None:
    """Write vocab.json and merges.txt, which other programs need, beside a tokenizer.json."""
    model = json.loads(file.read_text("utf-8"))["model"]
    file.with_name("vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    file.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")


def restore_published_names(file: Path, prefix: str) -> None:
    """Give the weights of a text encoder the names of published files, which other programs need.

    Args:
        prefix: what their names begin with, unless they belong to a projection.
    """
    weights = load_file(file)
    save_file({name if name.startswith((prefix, "text_projection.")) else f"{prefix}{name}": weight
               for name, weight in weights.items()}, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
