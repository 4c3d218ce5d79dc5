"""Memory options of inference: what of a model is on the card, in which format, and how the VAE decodes.

The planner chooses them for memory_options=auto (planner/serving_plan.py). Importing this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreambooth.config.enums import BaseWeights

if TYPE_CHECKING:
    from torch import nn

AUTO = "auto"
SWITCHES = ("vae_slicing", "vae_tiling", "cpu_offload")
FORMATS = tuple(kind.value for kind in BaseWeights if kind is not BaseWeights.half)
NAMES = (*SWITCHES, *FORMATS)  # what the user can type in memory_options=[...]
TILE = 512  # side of a tile in pixels; the VAE's own value is not used if it is larger


@dataclass(frozen=True)
class InferenceMemory:
    """Options that reduce the GPU memory of inference.

    Raises:
        ValueError: the options exclude each other.
    """

    vae_slicing: bool = False  # decode one picture of a batch at a time; the pictures stay the same
    vae_tiling: bool = False  # decode pictures in tiles of TILE pixels; the pictures change a little
    cpu_offload: bool = False  # keep in host memory what does not compute; the pictures stay the same
    base_weights: BaseWeights = BaseWeights.half  # format of the denoiser's linear layers; fewer bits change pictures

    def __post_init__(self) -> None:
        if self.cpu_offload and self.base_weights is BaseWeights.nf4:
            raise ValueError("memory_options must not have both cpu_offload and nf4, whose weights stay on the card: "
                             "leave one of them out, or take int8")

    @property
    def exact(self) -> bool:
        """Whether the options change no picture."""
        return not self.vae_tiling and self.base_weights is BaseWeights.half

    @property
    def names(self) -> list[str]:
        """The options that are on, as the user types them in memory_options=[...]."""
        return [name for name in NAMES if getattr(self, name, False) or name == self.base_weights.value]


PLAIN = InferenceMemory()  # no option


def read_memory(value: Any) -> InferenceMemory | None:
    """Return the options that the user typed; None for "auto", which lets the planner choose.

    Args:
        value: "auto", a name of NAMES, or a list of names; an empty list or null: no option.

    Raises:
        ValueError: a name is unknown, or options exclude each other.
    """
    if value == AUTO:
        return None
    names = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value] if value else []
    unknown = [name for name in names if name not in NAMES]
    formats = [BaseWeights(name) for name in names if name in FORMATS]
    if unknown or len(formats) > 1:
        raise ValueError(f"memory_options must be auto, or a list of {', '.join(SWITCHES)} and one of "
                         f"{', '.join(FORMATS)}, not {value}")
    switches = {name: True for name in SWITCHES if name in names}
    return InferenceMemory(**switches, base_weights=formats[0] if formats else BaseWeights.half)


def prepare(module: nn.Module, memory: InferenceMemory, is_denoiser: bool) -> nn.Module:
    """Return a part of a model as it is kept for inference, in host memory. The part itself is changed.

    Args:
        is_denoiser: whether the part is the denoiser. Only its linear layers are quantised.
    """
    if is_denoiser and memory.base_weights is not BaseWeights.half:
        from dreambooth.models.quantization import quantise

        quantise(module, next(module.parameters()).dtype, memory.base_weights)
    return module


def decode_in_parts(vae: Any, memory: InferenceMemory) -> None:
    """Switch on slicing and tiling of a VAE, as far as `memory` asks for them."""
    if memory.vae_slicing:
        vae.enable_slicing()
    if memory.vae_tiling:
        vae.enable_tiling()
        if not hasattr(vae, "tile_sample_min_size"):
            return  # VAEs of video models; their tiles have fewer pixels
        scale = vae.tile_sample_min_size // vae.tile_latent_min_size
        vae.tile_sample_min_size = min(vae.tile_sample_min_size, TILE)
        vae.tile_latent_min_size = vae.tile_sample_min_size // scale
