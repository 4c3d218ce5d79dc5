"""What an optimizer keeps and what its step needs for a moment: a stand-in that computes nothing.

The planner trains with it, because most real optimizers have kernels that fake tensors cannot run. Each model is held
against the real optimizer byte for byte in tests/test_vram.py.

| optimizer | state of a weight of n elements | for a moment in a step |
|---|---|---|
| AdamW, fused | two moments in its dtype, a 4-byte step count | nothing |
| AdamW, foreach | the same | the square root of every second moment, all at once |
| AdamW, one by one | the same | that of one weight |
| AdamW8bit | n uint8 twice, an fp32 maximum a block of 256 twice; below 4096 elements two fp32 moments | nothing |
| paged AdamW8bit | the same in pageable memory: on the host, if the card is full | nothing |
| Adafactor | fp32: rows and columns of the last two dimensions, or n if there is one dimension only | one fp32 update |
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.enums import OptimizerKind
from dreambooth.optim.optimizers import BLOCK_SIZE

MIN_8BIT = 4096  # elements; below, bitsandbytes keeps fp32 moments (its min_8bit_size)
MIN_PAGED = 100_000  # elements; below, bitsandbytes does not page
CODEBOOKS = 2 * 256 * 4  # bytes of the two quantisation maps, once an optimizer


class ModelledOptimizer(torch.optim.Optimizer):
    """Takes memory as an optimizer of `kind` does; `form` is AdamW's: fused, foreach or single."""

    def __init__(self, parameters: Iterable[nn.Parameter], kind: OptimizerKind, learning_rate: float = 1e-6,
                 form: str = "fused") -> None:
        super().__init__(list(parameters), {"lr": learning_rate})
        self.kind = kind
        self.form = form
        self.on_state: Callable[[Tensor, bool], None] = lambda tensor, paged: None  # told of each tensor of state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the state of weights that have a gradient, if it is not there, then the momentary tensors."""
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in trained:
            self._keep(parameter)
        if self.kind is OptimizerKind.adamw and self.form == "foreach":
            torch._foreach_sqrt([self.state[parameter]["exp_avg_sq"] for parameter in trained])
        elif self.kind is OptimizerKind.adamw and self.form == "single":
            for parameter in trained:
                self.state[parameter]["exp_avg_sq"].sqrt()
        elif self.kind is OptimizerKind.adafactor:
            for parameter in trained:
                assert parameter.grad is not None
                update = parameter.grad.square()  # in fp32, as the gradients of all our weights are
                update.add(1e-30)

    def _keep(self, parameter: nn.Parameter) -> None:
        if self.state[parameter]:
            return
        self.state[parameter] = _STATE[self.kind](parameter)
        paged = self.kind is OptimizerKind.paged_adamw8bit and parameter.numel() >= MIN_PAGED
        for tensor in self.state[parameter].values():
            self.on_state(tensor, paged)


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    return {"step": torch.empty((), dtype=torch.float32), "exp_avg": torch.empty_like(parameter),
            "exp_avg_sq": torch.empty_like(parameter)}


def _eight_bit(parameter: Tensor) -> dict[str, Tensor]:
    count = parameter.numel()
    if count < MIN_8BIT:
        return {name: torch.empty(count, dtype=torch.float32) for name in ("state1", "state2")}
    blocks = (count + BLOCK_SIZE - 1) // BLOCK_SIZE
    return {"state1": torch.empty(count, dtype=torch.uint8), "state2": torch.empty(count, dtype=torch.uint8),
            "absmax1": torch.empty(blocks, dtype=torch.float32), "absmax2": torch.empty(blocks, dtype=torch.float32)}


def _factored(parameter: Tensor) -> dict[str, Tensor]:
    size = {"RMS": torch.empty((), dtype=torch.float32)}
    if parameter.dim() < 2:
        return size | {"exp_avg_sq": torch.empty(parameter.shape, dtype=torch.float32)}
    *outer, rows, columns = parameter.shape
    return size | {"exp_avg_sq_row": torch.empty(*outer, rows, dtype=torch.float32),
                   "exp_avg_sq_col": torch.empty(*outer, columns, dtype=torch.float32)}


_STATE = {OptimizerKind.adamw: _moments, OptimizerKind.adamw8bit: _eight_bit,
          OptimizerKind.paged_adamw8bit: _eight_bit, OptimizerKind.adafactor: _factored}
