"""Trains denoiser and text encoder from captions and latents, in as many processes as torchrun starts.

    python -m torch.distributed.run --nproc-per-node 2 -m tools.tiny_base.pretrain FOLDER --kind unet --steps 15000

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth import cli
from tools.tiny_base.flow import FlowBase
from tools.tiny_base.pictures import Meaning, caption
from tools.tiny_base.unet import UNetBase

BATCH = 24  # pictures per step and process
AVERAGE_EVERY = 8  # steps between averaging of the processes' weights, and between EMA updates
EMA_DECAY = 0.985  # per EMA update
NO_CAPTION = 0.1  # share of empty captions, for classifier-free guidance
SUFFIX = {"unet": "", "flow": "-flow"}  # of the names of the files of each kind of base model


def saved_step(path: Path) -> int:
    """Return the number of completed steps of a saved state; 0: there is no saved state."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


class Trainer:
    """The training state of one process: weights, their EMA, the optimizer and the number of completed steps."""

    def __init__(self, folder: Path, kind: str, steps: int, rate: float | None) -> None:
        """Create or load the models.

        Args:
            kind: key of SUFFIX.
            steps: training steps of the whole run.
            rate: learning rate; None: the default of the kind.
        """
        self.folder, self.suffix, self.steps = folder, SUFFIX[kind], steps
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(0)
        self.base = UNetBase(folder) if kind == "unet" else FlowBase(folder)
        self.rate = rate or self.base.rate
        self.model = self.base.models.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.rate, betas=(0.9, 0.99), weight_decay=1e-3,
                                           fused=True)
        self.step = 0

    def train_step(self, latents: Tensor, meanings: list[Meaning]) -> float:
        """Train one step on the pictures of this process; return the unweighted error of the prediction."""
        rng = np.random.default_rng([self.step, self.rank])
        caption_rng, noise = random.Random(self.step * self.world + self.rank), torch.Generator()
        noise.manual_seed(self.step * self.world + self.rank)
        chosen = rng.integers(0, len(meanings), BATCH)
        texts = ["" if caption_rng.random() < NO_CAPTION else caption(meanings[i], caption_rng) for i in chosen]
        with torch.autocast("cpu", torch.bfloat16):
            errors, weights = self.base.errors(latents[chosen], texts, rng, noise)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        (errors * weights).mean().backward()
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
        path = self.folder / f"state{self.suffix}-{self.rank}.safetensors"
        save_file(tensors, path.with_suffix(".new"), metadata={"step": str(self.step)})
        path.with_suffix(".new").replace(path)

    def resume(self) -> None:
        """Resume from the saved states, if every process has a state of the same step."""
        path = self.folder / f"state{self.suffix}-{self.rank}.safetensors"
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
            module.save_pretrained(self.folder / f"trained{self.suffix}" / name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=SUFFIX, default="unet")
    parser.add_argument("--steps", type=int, required=True, help="training steps of the whole run")
    parser.add_argument("--rate", type=float, help="learning rate; default: that of the kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    latents = torch.from_numpy(np.load(options.folder / "latents.npy"))
    meanings = [Meaning(**entry) for entry in json.loads((options.folder / "meanings.json").read_text())]
    trainer = Trainer(options.folder, options.kind, options.steps, options.rate)
    trainer.resume()
    start, errors = time.monotonic(), []
    while trainer.step < trainer.steps:
        errors.append(trainer.train_step(latents, meanings))
        if trainer.step % 200 == 0 and trainer.rank == 0:
            print(f"{options.kind} {trainer.step}/{trainer.steps}  error {np.mean(errors[-200:]):.4f}  "
                  f"{(time.monotonic() - start) / len(errors):.3f} s per step", flush=True)
        if trainer.step % 400 == 0 or trainer.step >= trainer.steps:
            trainer.save()
    if trainer.rank == 0:
        trainer.export()
    dist.destroy_process_group()
    cli.exit_process()


if __name__ == "__main__":
    main()
