"""Models the memory of each optimizer: its persistent state and the temporary tensors of its step.

A rehearsal trains with ModelledOptimizer, because most real optimizers have kernels that do not run on fake tensors.
ModelledOptimizer computes no updates. tests/planner/test_optimizer_memory.py compares its state with the state of the
real optimizers, byte by byte.

| optimizer | state of a parameter with n elements | temporary tensors of a step |
|---|---|---|
| AdamW, fused | two moments in the parameter's dtype, a 4-byte step count | none |
| AdamW, foreach | as AdamW, fused | the square roots of all second moments |
| AdamW, one parameter at a time | as AdamW, fused | the square root of one second moment |
| AdamW8bit | two uint8 moments, each with an fp32 maximum per 256 elements; fp32 moments if n < 4096 | none |
| paged AdamW8bit | as AdamW8bit, in pageable memory, which moves to the host if the card is full | none |
| Adafactor | fp32: one value per row and column of the last two dimensions; n values if one-dimensional | fp32 update |
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.enums import OptimizerKind
from dreambooth.optim.optimizers import BLOCK_SIZE

MIN_8BIT = 4096  # elements; bitsandbytes keeps fp32 moments for smaller parameters (its min_8bit_size)
MIN_PAGED = 100_000  # elements; bitsandbytes does not page the state of smaller parameters
CODEBOOK_BYTES = 2 * 256 * 4  # the two quantisation maps, once per optimizer


class ModelledOptimizer(torch.optim.Optimizer):
    """An optimizer that allocates the same memory as the real optimizer of `kind`, but computes no updates.

    Attributes:
        form: the implementation of AdamW: fused, foreach, or single (one parameter at a time).
        on_state: a callback for each new state tensor; its second argument is True for a paged tensor.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], kind: OptimizerKind, learning_rate: float = 1e-6,
                 form: str = "fused") -> None:
        super().__init__(list(parameters), {"lr": learning_rate})
        self.kind = kind
        self.form = form
        self.on_state: Callable[[Tensor, bool], None] = lambda tensor, paged: None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Allocate state for each parameter that has a gradient but no state, then the temporary tensors of a step."""
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in trained:
            self._allocate_state(parameter)
        if self.kind is OptimizerKind.adamw and self.form == "foreach":
            torch._foreach_sqrt([self.state[parameter]["exp_avg_sq"] for parameter in trained])
        elif self.kind is OptimizerKind.adamw and self.form == "single":
            for parameter in trained:
                self.state[parameter]["exp_avg_sq"].sqrt()
        elif self.kind is OptimizerKind.adafactor:
            for parameter in trained:
                assert parameter.grad is not None
                update = parameter.grad.square()  # fp32, like the gradients of all trained weights
                update.add(1e-30)

    def _allocate_state(self, parameter: nn.Parameter) -> None:
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
