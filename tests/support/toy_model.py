"""A model of a few weights, and photos, batches and training state for it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dreambooth.data.batches import Batches, Latents
from dreambooth.data.photo_set import PhotoSet
from dreambooth.data.photos import Photo
from dreambooth.models.new_tokens.embedding_table import ExtendedEmbedding
from dreambooth.models.new_tokens.training import NewTokens
from dreambooth.models.noise_schedule import DiffusionSchedule
from dreambooth.optim.ema import Ema
from dreambooth.runtime.engine import Engine
from dreambooth.training.step import Objective, TrainState, train_step


class ToyModel(nn.Module):
    """A convolution in place of the UNet and an embedding in place of the text encoder, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)
        self.text_encoder = nn.Embedding(10, 1, dtype=torch.float64)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return self.unet(latents) + self.text_encoder(text).view(-1, 1, 1, 1)


class ToyTokens(nn.Module):
    """The same with a frozen embedding of five tokens and trained ones of five new tokens, as in TrainedModel."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)
        self.text_encoder_new_tokens = nn.Parameter(torch.empty(5, 1, dtype=torch.float64))
        known = nn.Embedding(5, 1, _weight=torch.linspace(-1, 1, 5, dtype=torch.float64).view(5, 1), _freeze=True)
        self.frozen = (ExtendedEmbedding(known, self.text_encoder_new_tokens),)  # a tuple: no submodule

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return self.unet(latents) + self.frozen[0](text).view(-1, 1, 1, 1)


def make_schedule(kind: str = "epsilon", zero_snr: bool = False) -> DiffusionSchedule:
    """The noise schedule of Stable Diffusion 1.x, with prediction type `kind`."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              rescale_betas_zero_snr=zero_snr, prediction_type=kind)
    return DiffusionSchedule(scheduler.alphas_cumprod.double(), kind)


def make_photo_set(name: str = "instance", count: int = 5, center_crop: bool = True, flip: bool = False) -> PhotoSet:
    """Random photos of 8 x 12 pixels, with the captions "caption 0", "caption 1" and so on."""
    generator = np.random.default_rng(0)
    photos = [Photo(Path(f"{i}.png"), generator.integers(0, 256, (8, 12, 3), dtype=np.uint8), f"caption {i}")
              for i in range(count)]
    return PhotoSet(name, photos, center_crop, flip)


def encode_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """In place of the VAE: the mean over the channels, with a standard deviation of 1/4."""
    mean = pixels.double().mean(1, keepdim=True)
    return mean, torch.full_like(mean, 0.25)


def make_batches(batch: int = 2, accumulation: int = 1, world_size: int = 1, rank: int = 0, cache: bool = False,
                 scale: float = 0.5, photo_sets: list[PhotoSet] | None = None, **more: object) -> Batches:
    """Batches of 8 x 8 latents with one channel. A prompt's token is its last digit."""
    photo_sets = photo_sets or [make_photo_set(), make_photo_set("class", 7)]
    latents = Latents(encode_pixels, 8, scale)
    if cache:
        for photo_set in photo_sets:
            latents.fill(photo_set, lambda count: None, 16)
    return Batches(
        photo_sets=photo_sets, latents=latents, encode_prompt=lambda prompt: torch.tensor([[int(prompt[-1])]]),
        latent_shape=(1, 8, 8), num_timesteps=1000, seed=3, batch_size=batch, accumulation=accumulation,
        device=torch.device("cpu"), rank=rank, world_size=world_size, dtype=torch.float64,
        **more)  # type: ignore[arg-type]


def make_state(model: nn.Module, lr: float = 1e-2) -> TrainState:
    """A training state at step 0, with seeded weights."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    after_step = None
    if isinstance(model, ToyTokens):
        rows = {"text_encoder": model.text_encoder_new_tokens}
        stds = {"text_encoder": torch.tensor(0.7, dtype=torch.float64)}
        after_step = NewTokens({"zwx": 5}, rows, stds, [], 2).after_step
    return TrainState(model, optimizer, schedule, Ema(model, 0.9999), after_step=after_step)


def train_steps(model: nn.Module, batches: Batches, count: int) -> TrainState:
    """Train a model for `count` steps from step 0."""
    state = make_state(model)
    for _ in range(count):
        train_step(state, batches(state.step), Objective(make_schedule(), 0.5), Engine(), 1.0).check()
    return state
