"""Weights in half precision that still learn: stochastic rounding, or Kahan's compensation.

An update of a weight is often smaller than half the distance to its neighbour in half precision: rounded to nearest
it is lost every time (Zamirai et al. 2021, arXiv:2010.06192).
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from dreambooth.config.enums import Rounding
from dreambooth.utils import rng

# Significant bits and the exponent of the smallest step. bf16 could go below 2**-126 only through fp32's subnormals,
# which devices flush to zero.
FORMATS = {torch.float16: (11, -24), torch.bfloat16: (8, -126)}

CHUNK = 2**20  # elements rounded at a time: rounding takes seven times its operand for a moment


def stochastic(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`values` (fp32) in `dtype`, up or down by chance so that the expectation is the value itself.

    Down to a multiple of the step between neighbours, and one step up with the probability of the remainder
    (Gupta et al. 2015, arXiv:1502.02551, section 3). Exact in fp32: a step is a power of two. |result - value| is below
    one step: 2**-7 of the value for bf16 and 2**-10 for fp16, or 2**-24 if that is more. Too large: the largest number.
    """
    digits, smallest = FORMATS[dtype]
    exponent = torch.frexp(values).exponent
    step = torch.ldexp(torch.ones_like(values), (exponent - digits).clamp(min=smallest))
    chance = torch.rand(values.shape, generator=generator, device=values.device)
    limit = torch.finfo(dtype).max
    return torch.floor(values / step + chance).mul_(step).clamp_(-limit, limit).to(dtype)


class Rounder:
    """Keeps fp32 results in half-precision parameters.

    Stochastic: chance is a function of (seed, step, parameter's name), so a resumed run rounds alike. Kahan: what
    rounding to nearest lost is kept in half precision beside the weight, as `kahan` in the optimizer's state, and is
    added to it before the next step; together they hold a weight to 2**-16 (bf16) or 2**-22 (fp16) of itself.
    """

    def __init__(self, kind: Rounding | None, seed: int) -> None:
        self.kind = kind
        self.seed = seed

    def widened(self, parameter: Tensor, state: MutableMapping[str, Any]) -> Tensor:
        """What `parameter` stands for, fp32."""
        value = parameter.detach().float()
        return value + state["kahan"].float() if "kahan" in state else value

    def store(self, parameter: Tensor, value: Tensor, state: MutableMapping[str, Any], step: int, name: str) -> None:
        """Put `value` (fp32), the result of step `step`, into `parameter`."""
        if self.kind is Rounding.kahan:
            parameter.copy_(value)
            state["kahan"] = (value - parameter.float()).to(parameter.dtype)
            return
        generator = torch.Generator(parameter.device).manual_seed(rng.seed(self.seed, step, name, "rounding"))
        chunks = (torch.split(flat, CHUNK) for flat in (parameter.view(-1), value.reshape(-1)))
        for rounded, exact in zip(*chunks, strict=True):
            rounded.copy_(stochastic(exact, parameter.dtype, generator))
