"""The flow base model: the architecture of Z-Image in small, its loss, and its pipeline."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from dreambooth.models.families.z_image import FAMILY
from dreambooth.models.flow_matching import FlowSchedule, logit_normal, quantiles
from tools.tiny_base.tokenizer import CHAT_LENGTH

EMBEDDING_STD = 0.3  # so large that words which occur in no caption have a direction of their own


def new_transformer() -> ZImageTransformer2DModel:
    """Create a transformer with random weights. Modulation and output begin at zero (adaLN-Zero, arXiv:2212.09748)."""
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=256, n_layers=3, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=128,
        axes_dims=[16, 24, 24], axes_lens=[128, 32, 32])
    for name, parameter in transformer.named_parameters():
        if "adaLN_modulation" in name or (name.startswith("all_final_layer") and ".linear." in name):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2 and "embedder" not in name:
            nn.init.xavier_uniform_(parameter)
    return transformer


def new_text_encoder(tokenizer: PreTrainedTokenizerBase) -> Qwen3Model:
    encoder = Qwen3Model(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CHAT_LENGTH, initializer_range=0.05,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id))
    nn.init.normal_(encoder.embed_tokens.weight, std=EMBEDDING_STD)
    return encoder


class FlowBase:
    """The models of the flow base and their loss: the error of the predicted velocity at logit-normal noise levels."""

    rate = 1e-3  # learning rate

    def __init__(self, folder: Path) -> None:
        """Load the weights in `folder`/start-flow, or create random weights."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer-flow")
        self.token_ids: dict[str, Tensor] = {}
        start = folder / "start-flow"
        self.models = nn.ModuleDict({
            "transformer": ZImageTransformer2DModel.from_pretrained(start / "transformer", torch_dtype=torch.float32)
            if start.is_dir() else new_transformer(),
            "text_encoder": Qwen3Model.from_pretrained(start / "text_encoder", dtype=torch.float32)
            if start.is_dir() else new_text_encoder(self.tokenizer),
        })
        encoder = self.models["text_encoder"]
        for unused in (encoder.layers[-1], encoder.norm):  # the transformer reads the states before the last layer
            unused.requires_grad_(False)
        self.schedule = FlowSchedule(logit_normal(quantiles(), mean=0.0, std=1.0))

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
        states = FAMILY.text([self.models["text_encoder"]], torch.cat([self._tokens(text) for text in texts]))
        predicted = FAMILY.predict(
            self.models["transformer"], self.schedule.add_noise(clean, epsilon, timesteps),
            self.schedule.denoiser_timesteps(timesteps), states, vae_scale=4)
        errors = (predicted.float() - self.schedule.target(clean, epsilon, timesteps)).square().mean((1, 2, 3))
        return errors, torch.ones_like(errors)

    def _tokens(self, text: str) -> Tensor:
        """Return token ids and mask (1, 2, L). Each caption is tokenised only once."""
        if text not in self.token_ids:
            self.token_ids[text] = FAMILY.tokens([self.tokenizer], text)
        return self.token_ids[text]


def assemble(folder: Path) -> Path:
    """Write tiny-flow, a ZImagePipeline in fp16 safetensors; return its folder."""
    transformer = ZImageTransformer2DModel.from_pretrained(folder / "trained-flow/transformer")
    transformer.register_to_config(_name_or_path="tiny-flow/transformer")
    vae = AutoencoderKL.from_pretrained(folder / "vae-tuned")
    vae.register_to_config(_name_or_path="tiny-flow/vae", shift_factor=0.0)  # the pipeline subtracts the shift
    pipeline = ZImagePipeline(
        vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        text_encoder=Qwen3Model.from_pretrained(folder / "trained-flow/text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer-flow"),
        transformer=transformer)
    base = folder / "tiny-flow"
    pipeline.to(dtype=torch.float16).save_pretrained(base, safe_serialization=True)
    print(f"wrote {base}")
    return base
