"""The memory levers: options in the section `memory` of a configuration that change how an optimizer step is computed.

Their purpose is to save GPU memory.

`build_training_optimizer` returns the optimizer that `training.step.train_step` uses. Its argument `factory` creates an
optimizer of a list of parameters:

| lever | optimizer |
|---|---|
| none | `factory(all trained parameters)` |
| optimizer_in_backward, or weights=half | PerParameterOptimizer: `factory([parameter])` for each parameter |
| offload_optimizer | OffloadedOptimizer: `factory(fp32 copies in host memory)` |

Training runs and the planner's rehearsals (training steps on fake tensors) both call
`build_training_optimizer(model, factory, ...)`, then `TrainState(model, optimizer, schedule, ema)`, then `train_step`.
A run gets its factory from optimizers.py. The planner's factory creates optimizers that allocate memory and update
nothing. A factory may create any torch.optim.Optimizer.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreambooth.config.enums import Weights
from dreambooth.config.schema import Memory
from dreambooth.optim.cpu_offload import OffloadedOptimizer, cast_to_half
from dreambooth.optim.muon import mark_hidden_matrices
from dreambooth.optim.optimizers import OptimizerFactory
from dreambooth.optim.per_parameter import PerParameterOptimizer
from dreambooth.optim.stochastic_rounding import Rounder


@dataclass(frozen=True)
class Group:
    """Trained parameters with optimizer options of their own, such as lr."""

    names: Collection[str]
    options: Mapping[str, Any]


def build_training_optimizer(model: nn.Module, factory: OptimizerFactory, memory: Memory, half: torch.dtype,
                             seed: int, groups: Sequence[Group] = ()) -> torch.optim.Optimizer:
    """Build the optimizer of the trained parameters of `model`, as selected by the levers in `memory`.

    With weights=half or offload_optimizer, this function also casts the model's trained matrices to `half`, as autocast
    would do at every use. Normalisation layers stay fp32, because autocast computes them in fp32. Embeddings stay fp32
    with offload_optimizer, and are cast with weights=half.

    Args:
        model: the TrainedModel itself (no wrapper), on the training device; its trained parameters have requires_grad.
        factory: creates an optimizer of a list of parameters.
        half: the compute precision; with fp32, no weight is cast.
        seed: seed of stochastic rounding.
        groups: parameters with optimizer options of their own. They form parameter groups after that of all others, in
            this order. Without any lever alone.
    """
    mark_hidden_matrices(model)
    if memory.offload_optimizer:
        return OffloadedOptimizer(model, factory, half)
    if memory.weights is Weights.half:
        cast_to_half(model, half, embeddings=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if memory.optimizer_in_backward or memory.weights is Weights.half:
        return PerParameterOptimizer(trained, factory, memory.optimizer_in_backward, Rounder(memory.rounding, seed))
    if groups:
        apart = {name for group in groups for name in group.names}
        return factory([{"params": [p for name, p in trained.items() if name not in apart]},
                        *({"params": [trained[name] for name in group.names], **group.options} for group in groups)])
    return factory(list(trained.values()))
