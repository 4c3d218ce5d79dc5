"""Trains UNet and text encoder from captions and latents, in as many processes as torchrun starts.

    python -m torch.distributed.run --nproc-per-node 2 -m tools.tiny_base.pretrain FOLDER --steps 15000

Each process trains independently in one thread, and the weights are averaged every few steps (local SGD, Stich 2019,
arXiv:1805.09767). On a shared machine two processes are faster than two threads in one process. Noise, timesteps,
pictures and captions are a function of (step, process), so an interrupted run continues with the same numbers.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth import cli
from dreambooth.models.noise_schedule import DiffusionSchedule
from tools.tiny_base.pictures import Meaning, caption

BATCH = 24  # pictures per step and process
RATE = 1.2e-3  # learning rate
AVERAGE_EVERY = 8  # steps between averaging of the processes' weights, and between EMA updates
EMA_DECAY = 0.985  # per EMA update
MIN_SNR_GAMMA = 5.0
NO_CAPTION = 0.1  # share of empty captions, for classifier-free guidance
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)


def new_text_encoder(vocabulary_size: int) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary_size, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, hidden_act="quick_gelu", projection_dim=128,
        bos_token_id=vocabulary_size - 2, eos_token_id=vocabulary_size - 1, pad_token_id=vocabulary_size - 1))


def noise_schedule() -> DiffusionSchedule:
    scheduler = DDPMScheduler(**BETAS, num_train_timesteps=1000)
    return DiffusionSchedule(scheduler.alphas_cumprod, "epsilon")


def saved_step(path: Path) -> int:
    """Return the number of completed steps of a saved state; 0: there is no saved state."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


class Captions:
    """Converts captions to token ids, and tokenises each caption only once."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self.token_ids: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        for text in texts:
            if text not in self.token_ids:
                self.token_ids[text] = self.tokenizer(text, padding="max_length", truncation=True).input_ids
        return torch.tensor([self.token_ids[text] for text in texts])


class Trainer:
    """The training state of one process: weights, their EMA, the optimizer and the number of completed steps."""

    def __init__(self, folder: Path, steps: int, rate: float) -> None:
        self.folder, self.steps, self.rate = folder, steps, rate
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.captions = Captions(tokenizer)
        start = folder / "start"
        torch.manual_seed(0)
        self.model = nn.ModuleDict({
            "unet": UNet2DConditionModel.from_pretrained(start / "unet", torch_dtype=torch.float32)
            if start.is_dir() else new_unet(),
            "text_encoder": CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32)
            if start.is_dir() else new_text_encoder(len(tokenizer)),
        }).train()
        self.parameters = list(self.model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.schedule = noise_schedule()
        self.step = 0
        weights = self.schedule.min_snr_weights(torch.arange(self.schedule.length), MIN_SNR_GAMMA)
        self.weights = weights / weights.mean()

    def train_step(self, latents: Tensor, meanings: list[Meaning]) -> float:
        """Train one step on the pictures of this process; return the unweighted error of the predicted noise."""
        rng = np.random.default_rng([self.step, self.rank])
        caption_rng, noise = random.Random(self.step * self.world + self.rank), torch.Generator()
        noise.manual_seed(self.step * self.world + self.rank)
        chosen = rng.integers(0, len(meanings), BATCH)
        texts = ["" if caption_rng.random() < NO_CAPTION else caption(meanings[i], caption_rng) for i in chosen]
        clean, timesteps = latents[chosen], torch.from_numpy(rng.integers(0, self.schedule.length, BATCH))
        epsilon = torch.randn(clean.shape, generator=noise)
        with torch.autocast("cpu", torch.bfloat16):
            states = self.model["text_encoder"](self.captions(texts))[0]
            predicted = self.model["unet"](self.schedule.add_noise(clean, epsilon, timesteps), timesteps, states).sample
        errors = (predicted.float() - epsilon).square().mean((1, 2, 3))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        (errors * self.weights[timesteps]).mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % AVERAGE_EVERY == 0:
            self._average()
        return float(errors.detach().mean())

    def learning_rate(self) -> float:
        """Return the learning rate: warm-up over 200 steps, constant until 40 % of the run, cosine down to 2 %."""
        progress = self.step / self.steps
        decay = 1.0 if progress < 0.4 else 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, (progress - 0.4) / 0.6)))
        return self.rate * min(1.0, (self.step + 1) / 200) * decay

    @torch.no_grad()
    def _average(self) -> None:
        """Average the weights over the processes, and update the EMA."""
        flat = torch.cat([p.view(-1) for p in self.parameters])
        dist.all_reduce(flat)
        for parameter, piece in zip(self.parameters, (flat / self.world).split([p.numel() for p in self.parameters]),
                                    strict=True):
            parameter.copy_(piece.view_as(parameter))
        updates = self.step // AVERAGE_EVERY
        decay = min(EMA_DECAY, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def save(self) -> None:
        """Write the state of this process. Call it right after the weights were averaged."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{i}": tensor for i, tensor in enumerate(self.average)}
        tensors |= {f"optimizer.{i}.{name}": tensor for i, held in moments.items() for name, tensor in held.items()}
        path = self.folder / f"state-{self.rank}.safetensors"
        save_file(tensors, path.with_suffix(".new"), metadata={"step": str(self.step)})
        path.with_suffix(".new").replace(path)

    def resume(self) -> None:
        """Resume from the saved states, if every process has a state of the same step."""
        path = self.folder / f"state-{self.rank}.safetensors"
        step = saved_step(path)
        steps: list[int] = [0] * self.world
        dist.all_gather_object(steps, step)
        if step == 0 or len(set(steps)) > 1:
            return
        tensors, moments = load_file(path), self.optimizer.state_dict()
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        moments["state"] = {i: {name: tensors[f"optimizer.{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
                            for i in range(len(self.parameters))}
        self.optimizer.load_state_dict(moments)
        self.average, self.step = [tensors[f"average.{i}"] for i in range(len(self.average))], step

    def export(self) -> None:
        """Write the EMA of the weights to folders in the formats of diffusers and transformers."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=True):
                parameter.copy_(mean)
        for name, module in self.model.items():
            module.save_pretrained(self.folder / "trained" / name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="training steps of the whole run")
    parser.add_argument("--rate", type=float, default=RATE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    latents = torch.from_numpy(np.load(options.folder / "latents.npy"))
    meanings = [Meaning(**entry) for entry in json.loads((options.folder / "meanings.json").read_text())]
    trainer = Trainer(options.folder, options.steps, options.rate)
    trainer.resume()
    start, errors = time.monotonic(), []
    while trainer.step < trainer.steps:
        errors.append(trainer.train_step(latents, meanings))
        if trainer.step % 200 == 0 and trainer.rank == 0:
            print(f"pretrain {trainer.step}/{trainer.steps}  error {np.mean(errors[-200:]):.4f}  "
                  f"{(time.monotonic() - start) / len(errors):.3f} s per step", flush=True)
        if trainer.step % 400 == 0 or trainer.step >= trainer.steps:
            trainer.save()
    if trainer.rank == 0:
        trainer.export()
    dist.destroy_process_group()
    cli.exit_process()


if __name__ == "__main__":
    main()
