"""A LoKr on a pipeline for generating pictures. diffusers attaches it to the denoiser of some pipelines only."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.models.adapters.factors import LoKr, kronecker_output
from dreambooth.models.families.family import Family


class AttachedLoKr:
    """Forward hooks that add the outputs of a LoKr to the outputs of a pipeline's layers.

    Attributes:
        scale: 1: as strong as in training; 0: no effect.
    """

    def __init__(self, pipeline: Any, family: Family, adapters: Mapping[str, LoKr]) -> None:
        """Args:
            pipeline: a diffusers pipeline, with or without LoRAs.
            adapters: the LoKr of each layer by the module name in LoRA files (Family.published_name).

        Raises:
            ValueError: the pipeline lacks a layer, or a layer has another size.
        """
        self.scale = 0.0
        layers = _layers(pipeline, family)
        for name, adapter in adapters.items():
            if name not in layers:
                raise ValueError(f"it has no layer {name}")
            left, right = adapter.matrices
            size = (left.shape[0] * right.shape[0], left.shape[1] * right[0].numel())
            if size != _size(layers[name]):
                raise ValueError(f"{name} has another size")
        self._hooks = [layers[name].register_forward_hook(_Hook(self, adapter)) for name, adapter in adapters.items()]

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


class _Hook:
    """The forward hook of one layer. The factors move to the device of the layer at the first call."""

    def __init__(self, owner: AttachedLoKr, adapter: LoKr) -> None:
        self.owner, self.left, self.right = owner, adapter.left, adapter.right

    @torch.no_grad()
    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.owner.scale == 0:
            return None
        self.left, self.right = (tuple(matrix.to(output) for matrix in matrices)
                                 for matrices in (self.left, self.right))
        return output + self.owner.scale * kronecker_output(layer, inputs[0].to(output.dtype), self.left, self.right)


def _layers(pipeline: Any, family: Family) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions of the denoiser and the text encoders, by their names in LoRA files.

    If diffusers has attached a LoRA to a layer, the layer is the attribute `base_layer` of another module.
    """
    parts = {part.name: getattr(pipeline, part.name, None) for part in (family.denoiser, *family.encoders)}
    return {family.published_name(f"{part}.{name.removesuffix('.base_layer')}"): layer
            for part, module in parts.items() if module is not None for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)}


def _size(layer: Any) -> tuple[int, int]:
    """Return the number of rows and columns of a layer's weight as a matrix."""
    return ((layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else
            (layer.out_channels, layer.in_channels * prod(layer.kernel_size)))
