"""optimizer=schedule_free: the averaged weights, with which a run samples, evaluates and exports.

Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682, equations 3 to 5) has three sets of weights: z, which
AdamW's steps move; their weighted average x; and y = (1 - beta1) z + beta1 x, with which gradients are computed. The
model and the checkpoints contain y, and the optimizer's state contains z. The result of the training is x.

The package schedulefree replaces y by x in place (`eval`) and computes y again (`train`). Rounding makes the second y
differ from the first. This module computes x as a copy with the same operation, so that the numbers of a run do not
depend on when it was sampled, evaluated or saved.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dreambooth.optim.per_parameter import PerParameterOptimizer


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer, or the optimizer inside of a memory lever, is schedule-free."""
    return "weight_lr_power" in optimizer.param_groups[0]


@torch.no_grad()
def averaged_weights(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averages x of the trained weights, by name.

    Before the first step of a weight, its average is the weight itself.

    Args:
        optimizer: an optimizer for which `is_schedule_free` is True.
        weights: the tensors that the optimizer updates, by name (`TrainState.weights`).
    """
    beta1, _ = optimizer.param_groups[0]["betas"]
    states = optimizer.states() if isinstance(optimizer, PerParameterOptimizer) else optimizer.state
    averages = {}
    for name, y in weights.items():
        z = states[y].get("z") if y in states else None
        averages[name] = y.detach() if z is None else torch.lerp(y.detach(), z, 1 - 1 / beta1)
    return averages
