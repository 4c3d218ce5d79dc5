"""Optimizer, fp32 weights and (with them) the EMA in host memory; the device computes with a copy.

Each gradient goes to the host as soon as it is there and is added up in fp32. The copy holds in half precision exactly
what autocast would cast to it anyway, so that the numbers are those of the plain optimizer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.optim.optimizers import Make
from dreambooth.optim.streaming_optimizer import Levered, on_gradient, settings, wide
from dreambooth.runtime.engine import Engine

HOST = torch.device("cpu")


class Offloaded(Levered):
    """`make`'s optimizer over fp32 copies, in host memory, of the trained parameters of `model`."""

    def __init__(self, model: nn.Module, make: Make, half: torch.dtype) -> None:
        self.masters = {name: nn.Parameter(wide(p.detach()).to(HOST, copy=True))
                        for name, p in model.named_parameters() if p.requires_grad}
        narrow(model, half)
        self.copies = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, copy in self.copies.items():
            on_gradient(copy, partial(_stream, self.masters[name]))
        self.inner = make(list(self.masters.values()))
        super().__init__(list(self.masters.values()), settings(self.inner.param_groups[0]))
        self._share()

    def update(self, run: Callable[[], Tensor], engine: Engine, limit: float | None,
               step: int) -> tuple[Tensor, Tensor, bool]:
        self._opt_called = True  # else the schedule warns that nobody called `step`
        losses = run()
        norm = engine.clip(self.inner, self.masters.values(), limit)
        taken = engine.step(self.inner)
        self.inner.zero_grad(set_to_none=True)
        if taken:
            self.loaded()
        return losses, norm, taken

    def weights(self) -> dict[str, Tensor]:
        return dict(self.masters)

    @torch.no_grad()
    def loaded(self) -> None:
        """Send the weights to the device."""
        for name, copy in self.copies.items():
            copy.copy_(self.masters[name])

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Schedules write the learning rate here; the optimizer inside reads it."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


def narrow(model: nn.Module, half: torch.dtype, embeddings: bool = False) -> None:
    """Put the trained weights of linear and convolution layers into `half`; norms stay as they are.

    These are what autocast casts at every use. Parameters are replaced, not changed: optimizers come after.

    Args:
        embeddings: theirs too; what they look up is handed on in fp32, so that the sums after it stay fp32.
    """
    for module in model.modules():
        looks_up = embeddings and isinstance(module, nn.Embedding)
        if (looks_up or isinstance(module, (nn.Linear, nn.Conv2d))) and half.itemsize < 4:
            if looks_up:
                module.register_forward_hook(lambda _, given, found: found.float())
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    setattr(module, name, nn.Parameter(parameter.detach().to(half)))


@torch.no_grad()
def _stream(master: nn.Parameter, copy: Tensor) -> None:
    assert copy.grad is not None
    gradient = wide(copy.grad.to(HOST))
    copy.grad = None
    if master.grad is None:
        master.grad = gradient
    else:
        master.grad += gradient
