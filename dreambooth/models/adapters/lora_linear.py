"""Linear layers with a LoRA, whose output is computed with fewer passes over memory than in peft.

Import this file only if a run has such an adapter, because peft takes long to import.
"""

from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


class LoraLinear(Linear):
    """A linear layer with a LoRA: y = W x + b + s B A x, where one matrix product adds s B (A x) to W x + b in place.

    peft computes B (A x), multiplies it by s and adds it, in three passes over tensors of the size of the output. The
    terms and the order of their sums are the same, except that a product may be fused with the addition that follows.

    The layer has one adapter, without DoRA.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            unchanged: Tensor = super().forward(x, *args, **kwargs)
            return unchanged
        layer: Any = self
        [name] = layer.lora_A
        down, up, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        # Two dimensions: an addition in place to a view would copy the gradient of the whole tensor.
        rows = x.flatten(0, -2)
        result: Tensor = layer.base_layer(rows)
        dropout = layer.lora_dropout[name]
        kept = rows if isinstance(dropout, nn.Identity) else dropout(x).flatten(0, -2)
        low = F.linear(layer._cast_input_dtype(kept, down.dtype), down)
        if low.dtype == result.dtype:
            result.addmm_(low, up.to(low.dtype).t(), alpha=scale)
        else:
            result = (result + F.linear(low, up) * scale).to(result.dtype)
        return result.view(*x.shape[:-1], -1)


def add_in_place(layer: nn.Module) -> None:
    """Make a layer with a LoRA add the adapter's output in place, if it is a linear layer without DoRA.

    The names of its weights do not change. Layers in 4 bits are layers of other classes, which stay as they are.
    """
    if type(layer) is Linear and not layer.lora_variant:
        layer.__class__ = LoraLinear
