"""optimizer=muon: Muon for the matrices inside blocks, and AdamW for all other weights.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
orthogonal matrix, computed by five Newton-Schulz iterations. It is defined for the matrices of hidden layers.
torch.optim.Muon accepts matrices only, and its documentation asks for AdamW for all other weights: embeddings, biases,
normalisation layers, convolutions, and the first and the last layer. Jordan also flattens the kernels of convolutions
to matrices; torch.optim.Muon does not, and this project follows it.

Muon's steps are scaled by 0.2 * sqrt(max(rows, columns)), so that they are as large as AdamW's, and both use the same
learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982, equation 4).
"""

from typing import Any

import torch
from torch import Tensor, nn

ITERATIONS = 5  # of Newton-Schulz; torch.optim.Muon's default
_MARK = "is_hidden_matrix"


class MuonWithAdamW(torch.optim.Optimizer):
    """An optimizer with one parameter group, whose marked weights are updated by Muon, and all others by AdamW.

    The state of a weight is that of torch.optim.Muon (momentum_buffer) or of torch.optim.AdamW (exp_avg, exp_avg_sq,
    step).

    Args:
        parameters: the trained weights; see `mark_hidden_matrices`.
        betas, eps: of AdamW. Muon's momentum is 0.95.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float],
                 eps: float) -> None:
        # `fused` makes `load_state_dict` move the step counts to the device, where fused AdamW expects them.
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps,
                                      "fused": True})
        matrices, others = [p for p in parameters if is_hidden(p)], [p for p in parameters if not is_hidden(p)]
        self._inner: list[torch.optim.Optimizer] = []
        if matrices:
            self._inner.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, ns_steps=ITERATIONS,
                                                adjust_lr_fn="match_rms_adamw"))
        if others:
            self._inner.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps,
                                                 fused=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for optimizer in self._inner:
            optimizer.state = self.state  # `load_state_dict` replaces it
            optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


def mark_hidden_matrices(model: nn.Module) -> None:
    """Mark the weights that Muon updates: matrices of linear layers in lists of blocks (nn.ModuleList).

    The blocks of transformers and UNets are in such lists. Their embeddings and their first and last layers are not.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    setattr(layer.weight, _MARK, True)


def is_hidden(weight: Tensor) -> bool:
    """Return whether a weight is marked, so that Muon updates it."""
    return getattr(weight, _MARK, False)


def copy_mark(weight: Tensor, copy: nn.Parameter) -> nn.Parameter:
    """Mark `copy`, which takes the place of `weight` in an optimizer, if `weight` is marked. Return `copy`."""
    setattr(copy, _MARK, is_hidden(weight))
    return copy
