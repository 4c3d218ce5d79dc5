"""Trains UNet and text encoder from captions and latents, on as many processes as torchrun starts.

    python -m torch.distributed.run --nproc-per-node 2 -m tools.tiny_base.pretrain FOLDER --steps 15000

Each process trains alone, one thread, and the weights are averaged every few steps (local SGD, Stich 2019,
arXiv:1805.09767): two threads in one process are slower than two processes on a machine that is shared.
Noise, timesteps, pictures and captions of a step are a function of (step, process): a stopped run goes on as it was.
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
from dreambooth.models.noise_schedule import Schedule, add_noise, min_snr_weights
from tools.tiny_base.pictures import Meaning, caption

BATCH = 24  # pictures a step and process
RATE = 1.2e-3
AVERAGE_EVERY = 8  # steps between averagings of the processes' weights, and EMA updates
EMA_DECAY = 0.985  # per averaging
GAMMA = 5.0  # min-SNR weighting
NO_CAPTION = 0.1  # share of empty captions, for classifier-free guidance
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)


def new_text_encoder(words: int) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=words, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, hidden_act="quick_gelu", projection_dim=128,
        bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1))


def noise_schedule() -> Schedule:
    scheduler = DDPMScheduler(**BETAS, num_train_timesteps=1000)
    return Schedule(scheduler.alphas_cumprod, "epsilon")


def saved_step(path: Path) -> int:
    """The completed steps of a saved state; 0: there is none."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


class Captions:
    """Token ids by caption, each caption tokenised once."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        for text in texts:
            if text not in self.known:
                self.known[text] = self.tokenizer(text, padding="max_length", truncation=True).input_ids
        return torch.tensor([self.known[text] for text in texts])


class Trainer:
    """The weights, their average, the optimizer and the number of completed steps."""

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
        weights = min_snr_weights(torch.arange(self.schedule.length), GAMMA, self.schedule)
        self.weights = weights / weights.mean()

    def train_step(self, latents: Tensor, meanings: list[Meaning]) -> float:
        """One step on this process's pictures; returns the plain error of epsilon."""
        dice = np.random.default_rng([self.step, self.rank])
        words, noise = random.Random(self.step * self.world + self.rank), torch.Generator()
        noise.manual_seed(self.step * self.world + self.rank)
        chosen = dice.integers(0, len(meanings), BATCH)
        texts = ["" if words.random() < NO_CAPTION else caption(meanings[i], words) for i in chosen]
        clean, timesteps = latents[chosen], torch.from_numpy(dice.integers(0, self.schedule.length, BATCH))
        epsilon = torch.randn(clean.shape, generator=noise)
        with torch.autocast("cpu", torch.bfloat16):
            states = self.model["text_encoder"](self.captions(texts))[0]
            made = self.model["unet"](add_noise(clean, epsilon, timesteps, self.schedule), timesteps, states).sample
        errors = (made.float() - epsilon).square().mean((1, 2, 3))
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
        """Warm-up over 200 steps, constant until 40 % of the run, then half a cosine down to 2 %."""
        done = self.step / self.steps
        fall = 1.0 if done < 0.4 else 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, (done - 0.4) / 0.6)))
        return self.rate * min(1.0, (self.step + 1) / 200) * fall

    @torch.no_grad()
    def _average(self) -> None:
        flat = torch.cat([p.view(-1) for p in self.parameters])
        dist.all_reduce(flat)
        for parameter, piece in zip(self.parameters, (flat / self.world).split([p.numel() for p in self.parameters]),
                                    strict=True):
            parameter.copy_(piece.view_as(parameter))
        updates = self.step // AVERAGE_EVERY
        decay = min(EMA_DECAY, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def save(self) -> None:
        """The state of this process; called when the weights were just averaged."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{i}": tensor for i, tensor in enumerate(self.average)}
        tensors |= {f"optimizer.{i}.{name}": tensor for i, held in moments.items() for name, tensor in held.items()}
        path = self.folder / f"state-{self.rank}.safetensors"
        save_file(tensors, path.with_suffix(".new"), metadata={"step": str(self.step)})
        path.with_suffix(".new").replace(path)

    def resume(self) -> None:
        """Go on from the saved states, if every process has one of the same step."""
        path = self.folder / f"state-{self.rank}.safetensors"
        step = saved_step(path)
        found: list[int] = [0] * self.world
        dist.all_gather_object(found, step)
        if step == 0 or len(set(found)) > 1:
            return
        tensors, moments = load_file(path), self.optimizer.state_dict()
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        moments["state"] = {i: {name: tensors[f"optimizer.{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
                            for i in range(len(self.parameters))}
        self.optimizer.load_state_dict(moments)
        self.average, self.step = [tensors[f"average.{i}"] for i in range(len(self.average))], step

    def export(self) -> None:
        """The averaged weights as diffusers and transformers folders."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=True):
                parameter.copy_(mean)
        for name, module in self.model.items():
            module.save_pretrained(self.folder / "trained" / name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="of the whole run; fewer bring its end nearer")
    parser.add_argument("--rate", type=float, default=RATE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    latents = torch.from_numpy(np.load(options.folder / "latents.npy"))
    meanings = [Meaning(**entry) for entry in json.loads((options.folder / "meanings.json").read_text())]
    trainer = Trainer(options.folder, options.steps, options.rate)
    trainer.resume()
    began, errors = time.monotonic(), []
    while trainer.step < trainer.steps:
        errors.append(trainer.train_step(latents, meanings))
        if trainer.step % 200 == 0 and trainer.rank == 0:
            print(f"pretrain {trainer.step}/{trainer.steps}  error {np.mean(errors[-200:]):.4f}  "
                  f"{(time.monotonic() - began) / len(errors):.3f} s a step", flush=True)
        if trainer.step % 400 == 0 or trainer.step >= trainer.steps:
            trainer.save()
    if trainer.rank == 0:
        trainer.export()
    dist.destroy_process_group()
    cli.leave()


if __name__ == "__main__":
    main()
