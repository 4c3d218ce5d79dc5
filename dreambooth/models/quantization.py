"""A frozen base in 4 bits, by bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section 3)."""

from typing import Any

import torch
from torch import nn


def quantise(part: nn.Module, half: torch.dtype) -> None:
    """Put the linear layers of a frozen module into nf4: 4 bits a weight and an fp32 maximum for each 64 of them.

    They are computed with in `half`, a layer at a time. The codes are made when the module goes to its device.
    """
    import bitsandbytes.nn as layers

    four_bits: Any = layers
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                small = four_bits.Linear4bit(child.in_features, child.out_features, child.bias is not None,
                                             compute_dtype=half, quant_type="nf4", compress_statistics=False,
                                             device="meta")
                small.weight = four_bits.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4",
                                                     compress_statistics=False)
                small.bias = child.bias
                setattr(module, name, small)
