"""The UNet base model: the architecture of Stable Diffusion 1.x in small, its loss, and its pipeline."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth.models.noise_schedule import DiffusionSchedule

MIN_SNR_GAMMA = 5.0
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


class UNetBase:
    """The models of the UNet base and their loss: the error of the predicted noise, with min-SNR weights."""

    rate = 1.2e-3  # learning rate

    def __init__(self, folder: Path) -> None:
        """Load the weights in `folder`/start, or create random weights."""
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.token_ids: dict[str, list[int]] = {}
        start = folder / "start"
        self.models = nn.ModuleDict({
            "unet": UNet2DConditionModel.from_pretrained(start / "unet", torch_dtype=torch.float32)
            if start.is_dir() else new_unet(),
            "text_encoder": CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32)
            if start.is_dir() else new_text_encoder(len(self.tokenizer)),
        })
        scheduler = DDPMScheduler(**BETAS, num_train_timesteps=1000)
        self.schedule = DiffusionSchedule(scheduler.alphas_cumprod, "epsilon")
        weights = self.schedule.min_snr_weights(torch.arange(self.schedule.length), MIN_SNR_GAMMA)
        self.weights = weights / weights.mean()

    def errors(self, clean: Tensor, texts: list[str], rng: np.random.Generator,
               noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the error of each picture and its loss weight, (B,) and (B,).

        Args:
            clean: latents (B, 4, 16, 16).
            texts: captions.
            rng: source of the timesteps.
            noise: source of the noise.
        """
        timesteps = torch.from_numpy(rng.integers(0, self.schedule.length, len(clean)))
        epsilon = torch.randn(clean.shape, generator=noise)
        states = self.models["text_encoder"](self._tokens(texts))[0]
        predicted = self.models["unet"](self.schedule.add_noise(clean, epsilon, timesteps), timesteps, states).sample
        return (predicted.float() - epsilon).square().mean((1, 2, 3)), self.weights[timesteps]

    def _tokens(self, texts: list[str]) -> Tensor:
        """Return token ids (B, L). Each caption is tokenised only once."""
        for text in texts:
            if text not in self.token_ids:
                self.token_ids[text] = self.tokenizer(text, padding="max_length", truncation=True).input_ids
        return torch.tensor([self.token_ids[text] for text in texts])


def assemble(folder: Path) -> Path:
    """Write tiny-sd, a StableDiffusionPipeline in fp16 safetensors; return its folder."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae-tuned"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "trained/text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "trained/unet"),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    base = folder / "tiny-sd"
    pipeline.to(dtype=torch.float16).save_pretrained(base, safe_serialization=True)
    print(f"wrote {base}")
    return base
