"""`python -m tools.tiny_base`: creates the tiny base model, a StableDiffusionPipeline trained on emoji art, in stages.

Repeat the command to continue after an interruption: a stage whose output exists is skipped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tools.tiny_base import autoencoder, emoji, pictures, pretrain, scenes, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/tiny-base"),
                        help="folder for the output of all stages")
    parser.add_argument("--start", type=Path, help="base model to start from; its tokenizer and VAE are reused")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=15_000, help="training steps of UNet and text encoder")
    parser.add_argument("--decoder-steps", type=int, default=6_000)
    parser.add_argument("--rate", type=float, default=pretrain.RATE)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    draw(options.folder, options.pictures)
    prepare(options.folder, options.start)
    train(options.folder, options.steps, options.rate, options.processes)
    decode(options.folder, options.decoder_steps)
    assemble(options.folder)


def draw(folder: Path, count: int) -> None:
    """Compose training pictures, with every sprite about equally often; write pictures.npy and meanings.json."""
    if (folder / "meanings.json").is_file():
        return
    emoji.fetch((emoji.NAMES, *emoji.TRAINED_ON), folder / "packages")
    sprites = emoji.sprites(emoji.TRAINED_ON, folder / "packages")
    print(f"{len(sprites)} sprites of {len(emoji.concepts())} concepts in {len(emoji.vocabulary()['classes'])} classes")
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(sprites)) for _ in range(count // len(sprites) + 1)])[:count]
    composed = [pictures.compose(sprites[i], rng) for i in order]
    np.save(folder / "pictures.npy", np.stack([picture for picture, _ in composed]))
    (folder / "meanings.json").write_text(json.dumps([asdict(meaning) for _, meaning in composed]))


def prepare(folder: Path, start: Path | None) -> None:
    """Write the tokenizer, the VAE with an untrained decoder, and the latents of all pictures (latents.npy)."""
    if (folder / "latents.npy").is_file():
        return
    drawn = np.load(folder / "pictures.npy", mmap_mode="r")
    if start:
        shutil.copytree(start, folder / "start", dirs_exist_ok=True)
        shutil.copytree(start / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        vae = AutoencoderKL.from_pretrained(start / "vae", torch_dtype=torch.float32)
    else:
        tokenizer.build(folder / "tokenizer")
        vae = autoencoder.analytic(drawn)
    vae.save_pretrained(folder / "vae")
    latents = autoencoder.encode(vae, np.asarray(drawn)) * vae.config.scaling_factor
    np.save(folder / "latents.npy", latents.numpy())


def train(folder: Path, steps: int, rate: float, processes: int) -> None:
    """Train UNet and text encoder in separate processes."""
    if (folder / "trained").is_dir():
        return
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                    "-m", "tools.tiny_base.pretrain", str(folder), f"--steps={steps}", f"--rate={rate}"],
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def decode(folder: Path, steps: int) -> None:
    """Train the VAE's decoder on the latents of the pictures."""
    if (folder / "vae-tuned").is_dir():
        return
    drawn = np.load(folder / "pictures.npy", mmap_mode="r")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    print(f"decoder before: {autoencoder.psnr(vae, np.asarray(drawn[:64])):.2f} dB on 64 pictures")
    autoencoder.tune_decoder(vae, drawn, torch.from_numpy(np.load(folder / "latents.npy")), steps)
    print(f"decoder after: {autoencoder.psnr(vae, np.asarray(drawn[:64])):.2f} dB on 64 pictures")
    vae.save_pretrained(folder / "vae-tuned")


def assemble(folder: Path) -> None:
    """Write tiny-sd: the pipeline in fp16 safetensors, and the borders of its scenes (scenes.py)."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae-tuned"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "trained/text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "trained/unet"),
        scheduler=PNDMScheduler(**pretrain.BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "tiny-sd", safe_serialization=True)
    scenes.write(folder, folder / "tiny-sd")
    print(f"wrote {folder / 'tiny-sd'}")


if __name__ == "__main__":
    main()
