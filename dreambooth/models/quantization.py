"""4-bit quantisation of a frozen base model by bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section 3).
"""

from typing import Any

import torch
from torch import nn


def quantise(part: nn.Module, compute_dtype: torch.dtype) -> None:
    """Convert the linear layers of a frozen module to nf4: 4 bits per weight, and one fp32 maximum per 64 weights.

    Each forward pass dequantises the weights to `compute_dtype`. bitsandbytes quantises and packs the weights when the
    module is moved to its device, after this function.
    """
    import bitsandbytes.nn

    layers: Any = bitsandbytes.nn
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                quantised = layers.Linear4bit(child.in_features, child.out_features, child.bias is not None,
                                              compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=False,
                                              device="meta")
                quantised.weight = layers.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4",
                                                     compress_statistics=False)
                quantised.bias = child.bias
                setattr(module, name, quantised)
