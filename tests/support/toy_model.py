"""A model of a few weights, and batches for it."""

import numpy as np
import torch
from torch import Tensor, nn

from dreambooth.data.batches import Batches, Concept, Latents
from dreambooth.data.photos import Photo
from dreambooth.models.noise_schedule import Schedule
from dreambooth.optim.ema import Ema
from dreambooth.runtime.engine import Engine
from dreambooth.training.step import Objective, TrainState, train_step


def schedule(kind: str = "epsilon", zero_snr: bool = False) -> Schedule:
    from diffusers import DDPMScheduler

    made = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         rescale_betas_zero_snr=zero_snr, prediction_type=kind)
    return Schedule(made.alphas_cumprod.double(), kind)


def concept(stream: str = "instance", count: int = 5, center_crop: bool = True, flip: bool = False) -> Concept:
    from pathlib import Path

    dice = np.random.default_rng(0)
    photos = [Photo(Path(f"{i}.png"), dice.integers(0, 256, (8, 12, 3), dtype=np.uint8), f"caption {i}")
              for i in range(count)]
    return Concept(stream, photos, center_crop, flip)


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = pixels.double().mean(1, keepdim=True)
    return mean, torch.full_like(mean, 0.25)


def batches(batch: int = 2, accumulation: int = 1, world: int = 1, rank: int = 0, cache: bool = False,
            scale: float = 0.5, concepts: list[Concept] | None = None, **more: object) -> Batches:
    concepts = concepts or [concept(), concept("class", 7)]
    latents = Latents(encode, 8, scale)
    if cache:
        for item in concepts:
            latents.fill(item, lambda count: None)
    return Batches(
        concepts=concepts, latents=latents, text=lambda prompt: torch.tensor([[int(prompt[-1])]]),
        latent_shape=(1, 8, 8), timesteps=1000, seed=3, batch_size=batch, accumulation=accumulation,
        device=torch.device("cpu"), rank=rank, world=world, dtype=torch.float64, **more)  # type: ignore[arg-type]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)
        self.text_encoder = nn.Embedding(10, 1, dtype=torch.float64)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return self.unet(latents) + self.text_encoder(text).view(-1, 1, 1, 1)


def state(model: nn.Module, lr: float = 1e-2) -> TrainState:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
                      Ema(model, 0.9999))


def steps(model: nn.Module, made: Batches, count: int) -> TrainState:
    found = state(model)
    for _ in range(count):
        train_step(found, made(found.step), Objective(schedule(), 0.5), Engine(), 1.0).check()
    return found
