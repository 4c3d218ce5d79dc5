"""Layers with a LoKr or LoHa adapter: weights and state as in peft, with a forward pass of their own.

The forward pass of peft draws a random number per layer, which fails on the planner's fake tensors, and computes the
change of the whole weight, which is kept for the backward pass. The layers here compute the output without it
(factors.py). Import this file only if a run has such an adapter, because peft takes long to import.
"""

import math
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from torch import Tensor, nn

from dreambooth.config.enums import MethodKind
from dreambooth.config.method import Method
from dreambooth.models.adapters.factors import LoHa, LoKr, kronecker_output, low_rank_output, pairwise_products
from dreambooth.models.adapters.selection import Choice
from dreambooth.utils import rng


class _OwnForward(nn.Module):
    """Adds the output of an adapter, times its scale, to the output of the frozen layer.

    Attributes:
        input_dropout: applied to the adapter's input in training.
    """

    adapter: str  # name of the adapter in the dictionaries of peft

    def forward(self, values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        result: Tensor = layer.base_layer(values, *args, **kwargs)
        if layer.disable_adapters:
            return result
        change = self.change(layer.input_dropout(values)) * layer.scaling[self.adapter]
        changed: Tensor = result + change.to(result.dtype)
        return changed

    def change(self, values: Tensor) -> Tensor:
        """Return what the adapter adds to the output, before the scale."""
        raise NotImplementedError


class _LoKrForward(_OwnForward):
    def change(self, values: Tensor) -> Tensor:
        layer: Any = self
        return kronecker_output(layer.get_base_layer(), values, *lokr_matrices(layer))

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: LoKrConfig, **kwargs: Any) -> None:
        """Create the weights; called by the constructor of peft."""
        layer: Any = super()
        self.decompose_both = config.decompose_both
        layer.update_layer(adapter_name, r, alpha, config, **kwargs)

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: Any, use_w1: bool, use_w2: bool,
                                  use_effective_conv2d: bool) -> None:
        """Create the weights with the smaller of two factors in C, as LyCORIS does. Its loader refuses others.

        peft gives C the side method.decompose_factor also where the other factor is smaller.
        """
        layer: Any = super()
        (rows, k), (columns, n) = sorted(shape[0]), sorted(shape[1])
        use_w1, use_w2 = not (self.decompose_both and r < max(rows, columns) / 2), r >= max(k, n) / 2
        layer.create_adapter_parameters(adapter_name, r, ((rows, k), (columns, n), *shape[2:]), use_w1, use_w2, False)


class _LoHaForward(_OwnForward):
    def change(self, values: Tensor) -> Tensor:
        layer: Any = self
        down, up = pairwise_products(*loha_matrices(layer))
        return low_rank_output(layer.get_base_layer(), values, down, up)


class LoKrLinear(_LoKrForward, lokr.Linear):  # type: ignore[misc]
    """A linear layer with a LoKr."""


class LoKrConv2d(_LoKrForward, lokr.Conv2d):  # type: ignore[misc]
    """A convolution with a LoKr."""


class LoHaLinear(_LoHaForward, loha.Linear):  # type: ignore[misc]
    """A linear layer with a LoHa."""


class LoHaConv2d(_LoHaForward, loha.Conv2d):  # type: ignore[misc]
    """A convolution with a LoHa."""


def lokr_matrices(layer: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the attributes `left` and `right` of factors.LoKr, before the scale."""
    name = layer.adapter
    left = (layer.lokr_w1,) if name in layer.lokr_w1 else (layer.lokr_w1_a, layer.lokr_w1_b)
    right = (layer.lokr_w2,) if name in layer.lokr_w2 else (layer.lokr_w2_a, layer.lokr_w2_b)
    return tuple(one[name] for one in left), tuple(one[name] for one in right)


def loha_matrices(layer: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the attributes `first` and `second` of factors.LoHa, before the scale."""
    name = layer.adapter
    return (layer.hada_w1_a[name], layer.hada_w1_b[name]), (layer.hada_w2_a[name], layer.hada_w2_b[name])


def wrap(layer: nn.Module, adapter: str, method: Method, choice: Choice) -> Any:
    """Return a linear layer or convolution with an adapter.

    Args:
        adapter: name of the adapter in peft.
        method: the settings of the run, of kind lokr or loha.
        choice: rank and alpha of this layer.
    """
    is_linear = isinstance(layer, nn.Linear)
    if method.kind is MethodKind.lokr:
        config: Any = LoKrConfig(decompose_factor=method.decompose_factor, decompose_both=method.decompose_both)
        kind: Any = LoKrLinear if is_linear else LoKrConv2d
    else:
        config, kind = LoHaConfig(), LoHaLinear if is_linear else LoHaConv2d
    wrapped = kind(layer, adapter, config, r=choice.rank, alpha=choice.alpha)
    wrapped.adapter, wrapped.input_dropout = adapter, nn.Identity()
    wrapped.scaling[adapter] = method.scaling(choice.rank, choice.alpha)
    return wrapped


@torch.no_grad()
def set_start_values(layer: Any, seed: int, name: str) -> None:
    """Give an adapter its start values, in fp32. They are those of LyCORIS, and the same on every device.

    LyCORIS (lycoris/modules/lokr.py and loha.py) sets one matrix to 0, so that an untrained adapter does not change the
    base model: the last factor of B in LoKr, A2 in LoHa. In LoKr the others are uniform in [-b, b], b = 1 / sqrt(number
    of columns). In LoHa they are normal, with standard deviation 0.1 for A1, and 1 for B1 and B2.

    Args:
        seed, name: the random numbers depend on this seed, the layer's name and the matrix alone.
    """
    for factor in layer.adapter_layer_names:
        if layer.adapter not in getattr(layer, factor):
            continue
        weight = nn.Parameter(getattr(layer, factor)[layer.adapter].detach().float())
        getattr(layer, factor)[layer.adapter] = weight
        stream, shape = rng.stream(seed, name, factor, "adapter"), tuple(weight.shape)
        if factor in ("lokr_w2", "lokr_w2_b", "hada_w2_a"):
            weight.zero_()
        elif isinstance(layer, lokr.LoKrLayer):
            bound = 1 / math.sqrt(weight[0].numel())
            weight.copy_(torch.from_numpy(stream.uniform(-bound, bound, shape)))
        else:
            weight.copy_(torch.from_numpy(stream.normal(0, 0.1 if factor == "hada_w1_a" else 1, shape)))


def read_weights(layer: Any) -> LoKr | LoHa:
    """Return the adapter of a layer, which contains the scale, in fp32 on the CPU."""
    base, scale = layer.get_base_layer(), layer.scaling[layer.adapter]
    kernel = tuple(base.kernel_size) if isinstance(base, nn.Conv2d) else ()
    if isinstance(layer, lokr.LoKrLayer):
        left, right = (tuple(map(_exact, matrices)) for matrices in lokr_matrices(layer))
        return LoKr((left[0] * scale, *left[1:]), right, kernel)
    (a1, b1), (a2, b2) = (map(_exact, matrices) for matrices in loha_matrices(layer))
    return LoHa((a1, b1), (a2 * scale, b2), kernel)


def weight_pairs(layer: Any, adapter: LoKr | LoHa) -> list[tuple[Tensor, Tensor]]:
    """Return each weight of the adapter in `layer`, and the tensor of `adapter` to copy into it, without the scale.

    Raises:
        ValueError: `layer` has an adapter of another kind, or with factors where `adapter` has none.
    """
    if isinstance(adapter, LoKr) and isinstance(layer, lokr.LoKrLayer):
        left, right = lokr_matrices(layer)
        ours = (adapter.left[0] / layer.scaling[layer.adapter], *adapter.left[1:], *adapter.right)
        if (len(left), len(right)) != (len(adapter.left), len(adapter.right)):
            raise ValueError("it has another rank")
        return list(zip((*left, *right), ours, strict=True))
    if isinstance(adapter, LoHa) and isinstance(layer, loha.LoHaLayer):
        first, second = loha_matrices(layer)
        ours = (*adapter.first, adapter.second[0] / layer.scaling[layer.adapter], adapter.second[1])
        return list(zip((*first, *second), ours, strict=True))
    raise ValueError("it is of another kind")


def _exact(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu()
