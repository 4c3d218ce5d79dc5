"""A trained weight and its optimizer. A large one in half precision is stepped a piece at a time.

A step needs the weight and its gradient in fp32 for a moment: 0.22 GiB for the largest convolution of SD 1.5, more than
the activations of its backward pass. Adam treats each element by itself, and its 8-bit form each block of 256 elements
(Dettmers et al. 2022, arXiv:2110.02861), so that pieces of whole blocks give the same numbers. Adafactor's factors are
of whole matrices: its weights stay whole.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.optim.optimizers import BLOCK, Make, separable
from dreambooth.optim.stochastic_rounding import Rounder
from dreambooth.optim.streaming_optimizer import settings

PIECE = 2**22  # elements at a time, at most; 16 MiB in fp32
SHARED = {"step", "qmap1", "qmap2"}  # of an optimizer's state: the same for each piece


class Slot:
    """`parameter` and what steps it. Half weights are stepped on fp32 scratch that exists only meanwhile."""

    def __init__(self, name: str, parameter: nn.Parameter, make: Make, rounder: Rounder | None) -> None:
        self.name = name
        self.parameter = parameter
        self.rounder = rounder if parameter.element_size() < 4 else None
        self.targets = [parameter]
        if self.rounder is not None:
            self.targets = [_scratch(parameter)]
        self.optimizers = [make(self.targets)]
        self.spans = _spans(parameter) if self.rounder is not None and separable(self.optimizers[0]) else [None]
        for _ in self.spans[1:]:
            self.targets.append(_scratch(parameter))
            self.optimizers.append(make(self.targets[-1:]))

    def gradients(self) -> Iterator[Tensor]:
        """The gradient, as a whole or in its pieces."""
        assert self.parameter.grad is not None
        whole = self.parameter.grad
        yield from (whole if span is None else whole.reshape(-1)[span] for span in self.spans)

    @torch.no_grad()
    def step(self, ready: Callable[[Tensor], Tensor], learning_rate: Any, step: int) -> None:
        """Step with the gradient, which `ready` turns into what the optimizer is to see (fp32), and release it."""
        if len(self.spans) == 1:
            gradient = ready(next(self.gradients()))
            self.parameter.grad = None
            self._step(0, gradient, learning_rate, step)
            return
        for number, piece in enumerate(self.gradients()):
            self._step(number, ready(piece), learning_rate, step)
        self.parameter.grad = None

    def state(self) -> dict[str, Any]:
        """The optimizer's state as that of one weight; {} before the first step."""
        states = [optimizer.state_dict()["state"].get(0, {}) for optimizer in self.optimizers]
        if len(states) == 1 or not states[0]:
            return dict(states[0])
        return {key: _joined([state[key] for state in states], key, self.parameter) for key in states[0]}

    def load(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        """The reverse of `state`, with an optimizer's settings."""
        for optimizer, span in zip(self.optimizers, self.spans, strict=True):
            part = {key: value if span is None else _part(value, key, span, self.parameter)
                    for key, value in state.items()}
            optimizer.load_state_dict({"state": {0: part} if part else {},
                                       "param_groups": [settings(dict(group)) | {"params": [0]}]})

    def _step(self, number: int, gradient: Tensor, learning_rate: Any, step: int) -> None:
        target, optimizer, span = self.targets[number], self.optimizers[number], self.spans[number]
        optimizer.param_groups[0]["lr"] = learning_rate
        if self.rounder is None:
            target.grad = gradient
            optimizer.step()
            target.grad = None
            return
        stored = self.parameter if span is None else self.parameter.view(-1)[span]
        target.data = self.rounder.widened(stored, optimizer.state.get(target, {}))
        target.grad = gradient
        optimizer.step()
        target.grad = None
        name = self.name if not number else f"{self.name}[{number}]"
        self.rounder.store(stored, target.detach(), optimizer.state[target], step, name)
        target.data = torch.empty(0, dtype=torch.float32, device=self.parameter.device)


def _scratch(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(0, dtype=torch.float32, device=parameter.device))


def _spans(parameter: Tensor) -> list[slice | None]:
    """Pieces of about the same size, of whole blocks."""
    count = -(-parameter.numel() // PIECE)
    if count == 1 or not parameter.is_contiguous():
        return [None]
    length = -(-parameter.numel() // count // BLOCK) * BLOCK
    return [slice(begin, min(begin + length, parameter.numel())) for begin in range(0, parameter.numel(), length)]


def _joined(parts: list[Any], key: str, parameter: Tensor) -> Any:
    """Of tensors with an entry an element, or an entry a block; bitsandbytes wraps its own in a dict."""
    if key in SHARED:
        return parts[0]
    if isinstance(parts[0], dict):
        return {name: _joined([part[name] for part in parts], name, parameter) for name in parts[0]}
    joined = torch.cat([part.reshape(-1) for part in parts])
    return joined.view(parameter.shape) if joined.numel() == parameter.numel() else joined


def _part(value: Any, key: str, span: slice, parameter: Tensor) -> Any:
    """The reverse."""
    if key in SHARED:
        return value
    if isinstance(value, dict):
        return {name: _part(inner, name, span, parameter) for name, inner in value.items()}
    flat = value.reshape(-1)
    return flat[span] if flat.numel() == parameter.numel() else flat[span.start // BLOCK:-(-span.stop // BLOCK)]
