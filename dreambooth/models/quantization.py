"""Quantisation of a frozen base model: its linear layers are stored in 4 or 8 bits per weight.

- nf4: 4 bits, by bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section 3).
- int8 and fp8: 8 bits, and one scale per output row, by `QuantisedLinear`. Each use of a layer dequantises its weight,
  so that only the weight is rounded. LLM.int8 of bitsandbytes also rounds activations to fp16 and to 8 bits, and the
  activations of some transformers exceed fp16. Layerwise casting of diffusers has no scale, and its casts to the
  compute precision stay in memory until the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth.config.enums import BaseWeights

# Largest number of the 8-bit format, to which the largest weight of a row is mapped.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
FORMATS = {BaseWeights.int8: torch.int8, BaseWeights.fp8: torch.float8_e4m3fn}


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight W is stored as 8-bit numbers q and one scale s per output row: W' = s q.

    The scale is s = max |W| / m for each row, rounded to the compute precision, with m = 127 for int8 and m = 448 for
    fp8 (4 bits of exponent, 3 of mantissa). Let u be the unit roundoff of the compute precision. For each weight,

        int8:  |W' - W| <= s / 2 + 2 u |W'|
        fp8:   |W' - W| <= max(2**-4 |W|, 2**-10 s) + 2 u |W'|

    because q is rounded to the nearest number of its format: the distance of neighbours is 1 in int8. In fp8 it is at
    most 2**-3 of the smaller one, or 2**-9 below 2**-6. The product s q is rounded (u |W'|), and if s was rounded down,
    the largest weight of a row is cut to m s (u |W'|).

    Attributes:
        quantised: q, (out, in), int8. In fp8, these are the bytes of the numbers, so that no code takes them for
            weights.
        scale: s, (out, 1), in the compute precision.
    """

    def __init__(self, layer: nn.Linear, stored: torch.dtype, compute_dtype: torch.dtype) -> None:
        """Args:
            layer: the layer to replace.
            stored: torch.int8 or torch.float8_e4m3fn.
            compute_dtype: precision of the dequantised weight and of the output.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.stored, self.compute_dtype = stored, compute_dtype
        with torch.no_grad():
            quantised, scale = quantise_rows(layer.weight, stored, compute_dtype)
        self.quantised = nn.Parameter(quantised.view(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", layer.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight W', (out, in), computed at each access."""
        return dequantise(self.quantised, self.scale, self.stored)

    def forward(self, input: Tensor) -> Tensor:
        """Return input W'^T + bias, in the compute precision."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        output: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            input.to(self.compute_dtype), self.quantised, self.scale, bias, self.stored)
        return output


class _Linear(torch.autograd.Function):
    """x W'^T + bias, whose backward pass dequantises W' again, so that no dequantised weight is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantised: Tensor, scale: Tensor, bias: Tensor | None,
                stored: torch.dtype) -> Tensor:
        ctx.save_for_backward(quantised, scale)
        ctx.stored = stored
        return F.linear(x, dequantise(quantised, scale, stored), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        quantised, scale = ctx.saved_tensors
        return gradients[0] @ dequantise(quantised, scale, ctx.stored), None, None, None, None


def quantise_rows(weight: Tensor, stored: torch.dtype, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return q (out, in) in the format `stored`, and s (out, 1) in the compute precision; see `QuantisedLinear`."""
    values, largest = weight.float(), LARGEST[stored]
    scale = (values.abs().amax(1, keepdim=True) / largest).to(compute_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = (values / scale.float()).clamp(-largest, largest)
    return (scaled.round() if stored is torch.int8 else scaled).to(stored), scale


def dequantise(quantised: Tensor, scale: Tensor, stored: torch.dtype) -> Tensor:
    """Return W' = s q in the precision of `scale`. The conversion of q is exact; the product is rounded once."""
    return quantised.view(stored).to(scale.dtype) * scale


def quantise(part: nn.Module, compute_dtype: torch.dtype, base_weights: BaseWeights = BaseWeights.nf4) -> None:
    """Convert the linear layers of a frozen module to a format of fewer bits. Other layers do not change.

    nf4 has 4 bits per weight, and one fp32 maximum per 64 weights. bitsandbytes quantises and packs the weights when
    the module is moved to its device, after this function. int8 and fp8 are quantised by this function.

    Args:
        compute_dtype: precision to which each forward pass dequantises the weights.
    """
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, _nf4(child, compute_dtype) if base_weights is BaseWeights.nf4 else
                        QuantisedLinear(child, FORMATS[base_weights], compute_dtype))


def _nf4(layer: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    import bitsandbytes.nn

    layers: Any = bitsandbytes.nn
    quantised: Any = layers.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                       compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=False,
                                       device="meta")
    quantised.weight = layers.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4",
                                         compress_statistics=False)
    quantised.bias = layer.bias
    module: nn.Module = quantised
    return module
