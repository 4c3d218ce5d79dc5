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
| CAME | as Adafactor, twice if not one-dimensional, and one moment | fp32 update and its deviation |
| Prodigy | two moments, a sum of gradients, a copy of the first weights (one number if they are 0) | one weight |
| Schedule-free AdamW | the weights z and a moment | one weight |
| Lion | one moment | one weight |
| AdEMAMix8bit | three uint8 moments, each with an fp32 maximum per 256 elements; fp32 moments if n < 4096 | none |
| Muon | one moment; as AdamW for weights that are no matrices of blocks | Newton-Schulz: four bf16 matrices |
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.enums import OptimizerKind
from dreambooth.optim.muon import ITERATIONS, is_hidden
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
        elif self.kind is OptimizerKind.muon:
            for parameter in filter(is_hidden, trained):
                assert parameter.grad is not None
                _orthogonalise(parameter.grad + parameter)
        elif self.kind in (OptimizerKind.came, OptimizerKind.prodigy, OptimizerKind.schedule_free, OptimizerKind.lion):
            for parameter in trained:
                assert parameter.grad is not None
                update = parameter.grad.square()
                if self.kind is OptimizerKind.came:
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


def _confident(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of CAME: Adafactor's for the squared gradients and for the squared deviations, and a mean."""
    state = _factored(parameter) | {"exp_avg": torch.empty_like(parameter)}
    if parameter.dim() >= 2:
        state |= {key.replace("sq", "res"): torch.empty_like(value) for key, value in state.items() if "_sq_" in key}
    return state


def _two_mixed(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of AdEMAMix8bit: that of AdamW8bit, with two means of gradients instead of one."""
    return {key: torch.cat([value, value]) if key.endswith("1") else value
            for key, value in _eight_bit(parameter).items()}


def _estimating(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of Prodigy. The first weights of an adapter's second matrices are zero; they count as others."""
    names = ("exp_avg", "exp_avg_sq", "s", "p0")
    return {name: torch.empty_like(parameter) for name in names}


def _averaging(parameter: Tensor) -> dict[str, Tensor]:
    return {name: torch.empty_like(parameter) for name in ("z", "exp_avg_sq")}


def _signed(parameter: Tensor) -> dict[str, Tensor]:
    return {"exp_avg": torch.empty_like(parameter)}


def _orthogonal(parameter: Tensor) -> dict[str, Tensor]:
    return {"momentum_buffer": torch.empty_like(parameter)} if is_hidden(parameter) else _moments(parameter)


def _orthogonalise(matrix: Tensor) -> None:
    """Allocate the tensors, and perform the matrix products, of Muon's Newton-Schulz iterations."""
    update = matrix.bfloat16()
    update = update.T if update.size(0) > update.size(1) else update
    for _ in range(ITERATIONS):
        gram = update @ update.T
        update = torch.addmm(update, torch.addmm(gram, gram, gram), update)


_STATE = {OptimizerKind.adamw: _moments, OptimizerKind.adamw8bit: _eight_bit,
          OptimizerKind.paged_adamw8bit: _eight_bit, OptimizerKind.adafactor: _factored,
          OptimizerKind.prodigy: _estimating, OptimizerKind.schedule_free: _averaging, OptimizerKind.lion: _signed,
          OptimizerKind.came: _confident, OptimizerKind.ademamix8bit: _two_mixed, OptimizerKind.muon: _orthogonal}
