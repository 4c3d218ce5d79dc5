"""Updates one trained parameter with its own optimizers. A large parameter in half precision is updated in pieces.

A step temporarily needs the weight and its gradient in fp32. For the largest convolution of SD 1.5, they take 0.22 GiB
together, more than the activations of this layer's backward pass. Adam updates each element independently of the
others. 8-bit Adam updates each quantization block of 256 elements independently (Dettmers et al. 2022,
arXiv:2110.02861). Updating a parameter in pieces that consist of whole quantization blocks therefore gives the same
results. Adafactor and CAME factorise whole matrices, so weights are never split with them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.optim.optimizers import BLOCK_SIZE, OptimizerFactory, can_step_in_pieces
from dreambooth.optim.state_layout import load_state
from dreambooth.optim.stochastic_rounding import Rounder
from dreambooth.optim.streaming_optimizer import group_state

PIECE_SIZE = 2**22  # maximum number of elements of a piece; 16 MiB in fp32
SHARED_STATE = {"step", "qmap1", "qmap2"}  # entries of an optimizer's state that are the same for each piece


class ParameterUpdater:
    """Updates `parameter` with its own optimizers: one for the whole parameter, or one per piece.

    Full-precision parameters are updated in place. Half-precision parameters are updated through fp32 copies,
    `targets`, which occupy memory only during the step.
    """

    def __init__(self, name: str, parameter: nn.Parameter, factory: OptimizerFactory, rounder: Rounder | None) -> None:
        self.name = name
        self.parameter = parameter
        self.rounder = rounder if parameter.element_size() < 4 else None
        self.targets = [parameter]
        if self.rounder is not None:
            self.targets = [_empty_copy(parameter)]
        self.optimizers = [factory(self.targets)]
        splits = self.rounder is not None and can_step_in_pieces(self.optimizers[0])
        self.spans = _spans(parameter) if splits else [None]
        for _ in self.spans[1:]:
            self.targets.append(_empty_copy(parameter))
            self.optimizers.append(factory(self.targets[-1:]))

    def gradients(self) -> Iterator[Tensor]:
        """Yield the gradient of each piece, or the whole gradient if the parameter is not split."""
        assert self.parameter.grad is not None
        whole = self.parameter.grad
        yield from (whole if span is None else whole.reshape(-1)[span] for span in self.spans)

    @torch.no_grad()
    def step(self, prepare: Callable[[Tensor], Tensor], learning_rate: Any, step: int) -> None:
        """Update the parameter with its gradient, and release the gradient.

        Args:
            prepare: converts a piece of the gradient to the fp32 tensor that the optimizer receives.
            step: number of completed steps; it seeds the stochastic rounding.
        """
        if len(self.spans) == 1:
            gradient = prepare(next(self.gradients()))
            self.parameter.grad = None
            self._step_piece(0, gradient, learning_rate, step)
            return
        for number, piece in enumerate(self.gradients()):
            self._step_piece(number, prepare(piece), learning_rate, step)
        self.parameter.grad = None

    def state(self) -> dict[str, Any]:
        """Return the optimizer state of the whole parameter, joined from its pieces; {} before the first step."""
        states = [optimizer.state_dict()["state"].get(0, {}) for optimizer in self.optimizers]
        if len(states) == 1 or not states[0]:
            return dict(states[0])
        return {key: _join([state[key] for state in states], key, self.parameter) for key in states[0]}

    def group_state(self) -> dict[str, Any]:
        """Return the state in the parameter group, which is the same in the optimizers of all pieces."""
        return group_state(self.optimizers[0].param_groups[0])

    def load(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        """Load a state that `state` returned, with the hyperparameters and the state of the parameter group `group`."""
        for optimizer, span in zip(self.optimizers, self.spans, strict=True):
            piece = {key: value if span is None else _cut(value, key, span, self.parameter)
                     for key, value in state.items()}
            load_state(optimizer, {"state": {0: piece} if piece else {},
                                   "param_groups": [dict(group) | {"params": [0]}]})

    def _step_piece(self, number: int, gradient: Tensor, learning_rate: Any, step: int) -> None:
        target, optimizer, span = self.targets[number], self.optimizers[number], self.spans[number]
        optimizer.param_groups[0]["lr"] = learning_rate
        if self.rounder is None:
            target.grad = gradient
            optimizer.step()
            target.grad = None
            return
        stored = self.parameter if span is None else self.parameter.view(-1)[span]
        target.data = self.rounder.to_fp32(stored, optimizer.state.get(target, {}))
        target.grad = gradient
        optimizer.step()
        target.grad = None
        name = self.name if not number else f"{self.name}[{number}]"
        self.rounder.store(stored, target.detach(), optimizer.state[target], step, name)
        target.data = torch.empty(0, dtype=torch.float32, device=self.parameter.device)


def _empty_copy(parameter: nn.Parameter) -> nn.Parameter:
    """Return an fp32 parameter without elements, on the device of `parameter`. A training step sets its data."""
    return nn.Parameter(torch.empty(0, dtype=torch.float32, device=parameter.device))


def _spans(parameter: Tensor) -> list[slice | None]:
    """Return the ranges of elements that are the pieces of a parameter; [None] if it is not split.

    The pieces have about the same size and consist of whole quantization blocks of an 8-bit optimizer (BLOCK_SIZE
    elements).
    """
    count = -(-parameter.numel() // PIECE_SIZE)
    if count == 1 or not parameter.is_contiguous():
        return [None]
    length = -(-parameter.numel() // count // BLOCK_SIZE) * BLOCK_SIZE
    return [slice(begin, min(begin + length, parameter.numel())) for begin in range(0, parameter.numel(), length)]


def _join(pieces: list[Any], key: str, parameter: Tensor) -> Any:
    """Return one state entry of the whole parameter, joined from the same entry of its pieces.

    State tensors have one number per element or one per quantization block. bitsandbytes nests its tensors in a dict.
    """
    if key in SHARED_STATE:
        return pieces[0]
    if isinstance(pieces[0], dict):
        return {name: _join([piece[name] for piece in pieces], name, parameter) for name in pieces[0]}
    joined = torch.cat([piece.reshape(-1) for piece in pieces])
    return joined.view(parameter.shape) if joined.numel() == parameter.numel() else joined


def _cut(value: Any, key: str, span: slice, parameter: Tensor) -> Any:
    """Return the part of an optimizer state entry that belongs to one piece of the parameter: the range `span`.

    This is the inverse of `_join`.
    """
    if key in SHARED_STATE:
        return value
    if isinstance(value, dict):
        return {name: _cut(inner, name, span, parameter) for name, inner in value.items()}
    flat = value.reshape(-1)
    if flat.numel() == parameter.numel():
        return flat[span]
    return flat[span.start // BLOCK_SIZE:-(-span.stop // BLOCK_SIZE)]
