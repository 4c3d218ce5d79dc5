"""`python -m tools.tiny_base`: creates the tiny base models, pipelines trained on emoji art, in stages.

The UNet base is a StableDiffusionPipeline, the flow base a ZImagePipeline. Pictures and VAE are the same.

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
from diffusers import AutoencoderKL

from tools.tiny_base import autoencoder, emoji, flow, pictures, pretrain, scenes, tokenizer, unet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/tiny-base"),
                        help="folder for the output of all stages")
    parser.add_argument("--start", type=Path, help="UNet base model to start from; its tokenizer and VAE are reused")
    parser.add_argument("--flow-start", type=Path, help="flow base model to start from; its tokenizer is reused")
    parser.add_argument("--only", choices=pretrain.SUFFIX, help="create only this kind of base model; default: both")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=15_000, help="training steps of denoiser and text encoder")
    parser.add_argument("--decoder-steps", type=int, default=6_000)
    parser.add_argument("--rate", type=float, help="learning rate; default: that of each kind")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    draw(options.folder, options.pictures)
    prepare(options.folder, options.start)
    prepare_flow(options.folder, options.flow_start)
    kinds = [options.only] if options.only else list(pretrain.SUFFIX)
    for kind in kinds:
        train(options.folder, kind, options.steps, options.rate, options.processes)
    decode(options.folder, options.decoder_steps)
    for kind in kinds:
        scenes.write(options.folder, (unet if kind == "unet" else flow).assemble(options.folder))


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


def prepare_flow(folder: Path, start: Path | None) -> None:
    """Write the tokenizer of the flow base."""
    if (folder / "tokenizer-flow").is_dir():
        return
    if start:
        shutil.copytree(start, folder / "start-flow", dirs_exist_ok=True)
        shutil.copytree(start / "tokenizer", folder / "tokenizer-flow")
    else:
        tokenizer.build_chat(folder / "tokenizer-flow")


def train(folder: Path, kind: str, steps: int, rate: float | None, processes: int) -> None:
    """Train denoiser and text encoder in separate processes."""
    if (folder / f"trained{pretrain.SUFFIX[kind]}").is_dir():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", "tools.tiny_base.pretrain", str(folder), f"--kind={kind}", f"--steps={steps}"]
    subprocess.run(command + ([f"--rate={rate}"] if rate else []), env=os.environ | {"OMP_NUM_THREADS": "1"},
                   check=True)


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


if __name__ == "__main__":
    main()
