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
    results differ by rounding: in half precision, peft rounds after each pass, and this class once.

    A layer with several active adapters, and one whose adapter is disabled, computes as in peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if args or kwargs or layer.disable_adapters or layer.merged or len(names) != 1:
            unchanged: Tensor = super().forward(x, *args, **kwargs)
            return unchanged
        name = names[0]
        down, up, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        # Two dimensions: an addition in place to a view would copy the gradient of the whole tensor.
        rows = x.reshape(-1, x.shape[-1])
        result: Tensor = layer.base_layer(rows)
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, nn.Identity):
            kept = layer._cast_input_dtype(rows, down.dtype)
        else:
            kept = dropout(layer._cast_input_dtype(x, down.dtype)).reshape(rows.shape)
        low = F.linear(kept, down)
        if low.dtype == result.dtype:
            result.addmm_(low, up.to(low.dtype).t(), alpha=scale)
        else:
            result = (result + F.linear(low, up) * scale).to(result.dtype)
        return result.view(*x.shape[:-1], result.shape[-1])


def add_in_place(model: nn.Module) -> None:
    """Make the linear layers of `model` that have a LoRA without DoRA add the adapter's output in place.

    The layers may be quantised. The names of their weights do not change.
    """
    for layer in model.modules():
        if type(layer) is Linear and not layer.lora_variant:
            layer.__class__ = LoraLinear
