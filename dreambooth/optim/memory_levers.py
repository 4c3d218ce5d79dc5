"""The levers: how gradients become new weights in less memory. `equip` builds what `step.train_step` uses.

A run, and a prediction of it, call the same three things: `equip(model, make, ...)` for the optimizer, then
`TrainState(model, optimizer, schedule, ema)`, then `step.train_step`. `make` is the factory of the optimizer
(optim.py); a planner hands in one that returns a memory model: any torch.optim.Optimizer with `step`.

| lever | what `equip` returns |
|---|---|
| none | `make(all trained parameters)` |
| optimizer_in_backward, or weights=half | PerParameter: `make([parameter])` for each |
| offload_optimizer | Offloaded: `make(fp32 copies in host memory)` |
"""

import torch
from torch import nn

from dreambooth.config.enums import Weights
from dreambooth.config.schema import Memory
from dreambooth.optim.cpu_offload import Offloaded, narrow
from dreambooth.optim.optimizers import Make
from dreambooth.optim.per_parameter import PerParameter
from dreambooth.optim.stochastic_rounding import Rounder


def equip(model: nn.Module, make: Make, memory: Memory, half: torch.dtype, seed: int) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters of `model` under the levers of `memory`.

    With weights=half or offload_optimizer the model's matrices are put into `half` here: what a linear or convolution
    layer would be cast to under autocast anyway. Norms stay fp32, as autocast computes them, and so do embeddings under
    offload_optimizer; half weights have them in `half` too.

    Args:
        model: the Denoiser itself, with requires_grad set on what trains, on the training device.
        make: factory of the optimizer; called with a list of parameters.
        half: the compute precision; fp32 leaves weights as they are.
        seed: of stochastic rounding.
    """
    if memory.offload_optimizer:
        return Offloaded(model, make, half)
    if memory.weights is Weights.half:
        narrow(model, half, embeddings=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if memory.optimizer_in_backward or memory.weights is Weights.half:
        return PerParameter(trained, make, memory.optimizer_in_backward, Rounder(memory.rounding, seed))
    return make(list(trained.values()))
