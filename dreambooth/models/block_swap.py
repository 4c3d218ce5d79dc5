"""Block swap: some frozen blocks of a transformer live in host memory and visit the device when they compute.

The blocks of a transformer compute one after the other. With memory.swap_blocks=N, the frozen weights of N of them are
in pinned host memory. The device has two slots for visiting blocks: while the block in one slot computes, the next
swapped block is copied to the other slot, on a stream of its own. Frozen weights never change, so that nothing is
copied back. Adapters of swapped blocks stay on the device.

In the forward pass the blocks visit in order. With gradient checkpointing, the backward pass recomputes each block just
before it computes the block's gradients, so that the blocks visit in reverse order. At the turn, the last two blocks
are in the slots already. A forward and backward pass copies 2 (N - 2) blocks, a forward pass without gradient N blocks.

Group offloading of diffusers is not used, because it is made for inference. Its hooks also move the adapters of a
block, and with a stream they restore the values that the adapters had at the start. It brings blocks in the order of
the forward pass only. A recomputation stops early, before the hook that moves the block away, so that all blocks stay
on the device.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.errors import UserError

SLOTS = 2  # number of swapped blocks on the device at a time
ALIGNMENT = 256  # bytes; a tensor in a slot begins at a multiple of it


def swapped_numbers(blocks: int, count: int) -> list[int]:
    """Return the numbers of the `count` swapped blocks out of `blocks`, evenly spread.

    With blocks that stay on the device between them, a copy has the time of several blocks.
    """
    return [(2 * number + 1) * blocks // (2 * count) for number in range(count)]


def next_visitor(position: int, previous: int | None, count: int, with_gradient: bool) -> int:
    """Return the position, among the swapped blocks, of the block that is needed after the block at `position`.

    Args:
        position: the block that is about to compute.
        previous: the block that computed before it; None: none yet.
        count: number of swapped blocks.
        with_gradient: whether a backward pass follows the forward pass.
    """
    if position == 0:
        return min(1, count - 1)  # a forward pass begins, or a backward pass ends and leaves this block in its slot
    if position == count - 1:
        return count - 2 if with_gradient else 0
    backward = previous is not None and position < previous
    return position - 1 if backward else position + 1


class BlockSwap:
    """Moves the frozen weights of the swapped blocks between host memory and the slots on the device.

    Attributes:
        resident: for each slot, the position of the block whose weights it has; None: none yet.
        copies: number of copies from the host so far.
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device) -> None:
        """Move the frozen weights of `count` blocks to host memory, and register the hooks that bring them back.

        Args:
            blocks: the frozen blocks of a transformer in the order in which they compute, in host memory.
            count: number of blocks to swap.
            device: device on which the transformer computes. On a CPU, the slots are in host memory too.

        Raises:
            UserError: the transformer has fewer blocks.
        """
        if count > len(blocks):
            raise UserError(f"the transformer has {len(blocks)} blocks and memory.swap_blocks={count}: type "
                            f"memory.swap_blocks={len(blocks)} or fewer")
        self.device, self.cuda = device, device.type == "cuda"
        self.hosts = [_HostBlock(blocks[number], self.cuda) for number in swapped_numbers(len(blocks), count)]
        size = max(host.size for host in self.hosts)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(SLOTS, count))]
        self.resident: list[int | None] = [None] * len(self.slots)
        self.copies = 0
        self._previous: int | None = None
        self._stream: Any = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]
        self._arrived: list[Any] = [None] * len(self.slots)  # event of each slot: its last copy is complete
        for position, host in enumerate(self.hosts):
            host.block.register_forward_pre_hook(partial(self._before_forward, position))

    def is_present(self, position: int) -> bool:
        """Return whether the weights of a swapped block are in a slot on the device."""
        return position in self.resident

    def enter(self, position: int, with_gradient: bool) -> None:
        """Make a swapped block ready to compute, and begin to copy the block that is needed after it.

        Args:
            position: number of the block among the swapped blocks.
            with_gradient: whether gradients are computed for this pass.
        """
        if not self.is_present(position):  # the first block, or a pass in an unexpected order
            self._copy(position, keep=None)
        slot = self.resident.index(position)
        if self._arrived[slot] is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])
        following = next_visitor(position, self._previous, len(self.hosts), with_gradient)
        self._previous = position
        if not self.is_present(following):
            self._copy(following, keep=slot)

    def _before_forward(self, position: int, block: nn.Module, inputs: Any) -> None:
        self.enter(position, torch.is_grad_enabled())

    def _copy(self, position: int, keep: int | None) -> None:
        """Copy a block to a slot other than `keep`. The block that was in this slot returns to its host memory."""
        slot = next(number for number in range(len(self.slots)) if number != keep)
        if keep is None and None in self.resident:
            slot = self.resident.index(None)
        before = self.resident[slot]
        if before is not None:
            self.hosts[before].use(self.hosts[before].memory)
        host, target = self.hosts[position], self.slots[slot][:self.hosts[position].size]
        if self.cuda:
            # All work that uses the slot has been queued: the block in it has finished before another one was entered.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                target.copy_(host.memory, non_blocking=True)
                self._arrived[slot] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._arrived[slot].record(self._stream)
        else:
            target.copy_(host.memory)
        host.use(target)
        self.resident[slot] = position
        self.copies += 1


class _HostBlock:
    """The frozen weights of one block, one after the other in one buffer of host memory."""

    def __init__(self, block: nn.Module, pinned: bool) -> None:
        self.block = block
        self.tensors = list(_frozen_tensors(block))
        self.offsets, self.size = [], 0
        for tensor in self.tensors:
            self.offsets.append(self.size)
            self.size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.memory = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned)
        for view, tensor in zip(self._views(self.memory), self.tensors, strict=True):
            view.copy_(tensor.data)
        self.use(self.memory)
        for module in block.modules():
            module._apply = partial(_apply_to_children, module)  # type: ignore[method-assign]

    def use(self, memory: Tensor) -> None:
        """Make the block compute with the weights in `memory`: the host buffer, or a slot with a copy of it."""
        for view, tensor in zip(self._views(memory), self.tensors, strict=True):
            tensor.data = view

    def _views(self, memory: Tensor) -> Iterator[Tensor]:
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            yield memory[offset:offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _frozen_tensors(block: nn.Module) -> Iterator[Tensor]:
    yield from block.parameters()
    yield from block.buffers()


def _apply_to_children(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """Take the place of Module._apply, which `to` calls: move adapters inside `module`, but not its own weights."""
    for child in module.children():
        child._apply(function)  # type: ignore[no-untyped-call]
    return module
