"""memory.rounding: lets half-precision weights learn from small updates, by stochastic rounding or Kahan summation.

An update is often smaller than half the distance between a half-precision weight and the next representable value.
Rounding to nearest then loses the update every time (Zamirai et al. 2021, arXiv:2010.06192).
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from dreambooth.config.enums import Rounding
from dreambooth.utils import rng

# For each dtype: the number of significant bits, and the exponent of the smallest distance between neighbouring values.
# In bf16, distances below 2**-126 would need fp32 subnormals, which devices flush to zero.
HALF_FORMATS = {torch.float16: (11, -24), torch.bfloat16: (8, -126)}

CHUNK_SIZE = 2**20  # elements rounded at a time; rounding temporarily takes seven times the memory of its operand


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round `values` (fp32) to `dtype`, up or down at random, so that the expected result is the value itself.

    The step is the distance between neighbouring values of `dtype`. A value is rounded down to a multiple of the step,
    or, with the probability remainder / step, up to the next multiple (Gupta et al. 2015, arXiv:1502.02551, section 3).
    The computation is exact in fp32, because a step is a power of two. The error |result - value| is less than one
    step. A step is at most 2**-7 * |value| in bf16, and at most max(2**-24, 2**-10 * |value|) in fp16. Values beyond
    the range of `dtype` are clamped to its largest number.
    """
    digits, smallest = HALF_FORMATS[dtype]
    exponent = torch.frexp(values).exponent
    step = torch.ldexp(torch.ones_like(values), (exponent - digits).clamp(min=smallest))
    chance = torch.rand(values.shape, generator=generator, device=values.device)
    limit = torch.finfo(dtype).max
    return torch.floor(values / step + chance).mul_(step).clamp_(-limit, limit).to(dtype)


class Rounder:
    """Stores fp32 values in half-precision parameters, by stochastic rounding or Kahan summation.

    - stochastic: the random numbers are a function of (seed, step, name of the parameter), so that a resumed run rounds
      in the same way.
    - kahan: values are rounded to nearest. The rounding error is stored in half precision, as `kahan` in the
      optimizer's state, and is added to the weight before the next step. Weight and error together have a relative
      precision of 2**-16 (bf16) or 2**-22 (fp16).
    """

    def __init__(self, kind: Rounding | None, seed: int) -> None:
        self.kind = kind
        self.seed = seed

    def to_fp32(self, parameter: Tensor, state: MutableMapping[str, Any]) -> Tensor:
        """Return the value of `parameter` in fp32. If `state` contains a Kahan error, the error is added."""
        value = parameter.detach().float()
        return value + state["kahan"].float() if "kahan" in state else value

    def store(self, parameter: Tensor, value: Tensor, state: MutableMapping[str, Any], step: int, name: str) -> None:
        """Store `value` (fp32) in `parameter`, rounded as `kind` says.

        Args:
            state: the optimizer state of the parameter, in which Kahan summation stores the rounding error.
            step, name: number of completed steps and name of the parameter; they seed stochastic rounding.
        """
        if self.kind is Rounding.kahan:
            parameter.copy_(value)
            state["kahan"] = (value - parameter.float()).to(parameter.dtype)
            return
        generator = torch.Generator(parameter.device).manual_seed(rng.seed(self.seed, step, name, "rounding"))
        chunks = (torch.split(flat, CHUNK_SIZE) for flat in (parameter.view(-1), value.reshape(-1)))
        for rounded, exact in zip(*chunks, strict=True):
            rounded.copy_(round_stochastically(exact, parameter.dtype, generator))
