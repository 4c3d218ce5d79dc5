"""Records when each tensor storage is allocated and released. Memory predictions are computed from these records.

StorageTrace records fake and real tensors in the same way. The category of a storage is its purpose (weights,
gradients, activations, ...), which is often known only after the allocation. A storage can therefore be assigned
several categories; the last one counts.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

HOST = "host"  # category of storages that a real run keeps in host memory
TEMPORARIES, ACTIVATIONS = "temporaries", "activations"
Event = tuple[int, int]  # (serial, +bytes): allocated; (serial, -bytes): released; (MARK, n): the n-th mark
MARK = -1
Workspace = Callable[[str, tuple[Any, ...]], int]  # from operator name and arguments to bytes of the kernel's workspace
# Operator -> function that counts its operations. PyTorch's registry lacks products that are added in place.
_FLOPS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
_DEVICE = torch.ops.prim.device.default
_FOUR_BITS = "bitsandbytes::gemm_4bit"  # multiplies a matrix by the transpose of a quantised one, whose shape it gets


class StorageTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that records allocations, releases and operations inside its `with` block.

    Attributes:
        events: allocations, releases and marks in the order in which they happened. A mark is the start of a phase.
        category: the category of each storage, by serial number.
        marks: the names of the phases, one for each mark, in the order of the marks.
        flops: floating-point operations of matrix products, convolutions and attention, by phase. One multiply-add
            counts as two operations.
    """

    def __init__(self, workspace: Workspace | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.category: dict[int, str] = {}
        self.marks: list[str] = []
        self.flops: dict[str, int] = {}
        self._live: dict[int, tuple[int, int]] = {}  # storage address -> (serial, bytes)
        self._references: dict[int, weakref.ref[Any]] = {}
        self._serial = 0
        self._phase = ""
        self._workspace = workspace

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._references.clear()  # later releases are not recorded

    def mark(self, phase: str) -> None:
        """Begin a phase. All events until the next mark belong to this phase."""
        self.events.append((MARK, len(self.marks)))
        self.marks.append(phase)
        self._phase = phase

    def add(self, tensors: Iterable[Tensor], category: str) -> None:
        """Assign a category to the storages of tensors, and record the storages that were not recorded before."""
        for tensor in tensors:
            serial = self._record(tensor)
            if serial is not None:
                self.category[serial] = category

    def add_module(self, module: nn.Module | None, category: str) -> None:
        """Assign a category to the parameters and buffers of a module.

        bitsandbytes keeps the maxima of its 4-bit weights beside the parameters.
        """
        if module is not None:
            states = [getattr(parameter, "quant_state", None) for parameter in module.parameters()]
            maxima = [state.absmax for state in states if state is not None]
            self.add([*module.parameters(), *module.buffers(), *maxima], category)

    def recategorize_live(self, old: str, new: str) -> None:
        """Change the category of all live (allocated and not yet released) storages of the category `old` to `new`.

        The new category also applies to events of these storages that are already recorded.
        """
        for serial, _ in self._live.values():
            if self.category[serial] == old:
                self.category[serial] = new

    def repeat(self, start: int, end: int, marks: bool = True) -> None:
        """Append a copy of events[start:end], as if the same code ran again.

        Only the events of storages that are both allocated and released in this range are repeated. A storage that is
        still live at `end` exists already, so it is not allocated again.

        Args:
            marks: also repeat the marks.
        """
        events, offset = self.events[start:end], self._serial
        released = {serial for serial, size in events if serial != MARK and size < 0}
        allocated = {serial for serial, size in events if serial != MARK and size > 0}
        for serial, size in events:
            if serial == MARK and marks:
                self.events.append((MARK, size))
            elif serial in allocated and serial in released:
                self.category[serial + offset] = self.category[serial]
                self.events.append((serial + offset, size))
        self._serial = 2 * offset

    def serial_of(self, tensor: Tensor) -> int | None:
        """Return the serial number of a tensor's storage; None if it is not recorded, or is released."""
        serial, _ = self._live.get(tensor.untyped_storage()._cdata, (None, 0))
        return serial

    @property
    def total_flops(self) -> int:
        """Floating-point operations of all phases so far."""
        return sum(self.flops.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark a phase that ends with the `with` block; events after the block belong to the phase `idle`."""
        self.mark(name)
        yield
        self.mark("idle")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise a guard against torch.compile, which is not used here, slows down every call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _DEVICE:
            return out
        for tensor in _tensors(out):
            self._record(tensor)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops[self._phase] = self.flops.get(self._phase, 0) + count(*args, **(kwargs or {}), out_val=out)
        elif func._schema.name == _FOUR_BITS:
            self.flops[self._phase] = self.flops.get(self._phase, 0) + 2 * args[0].numel() * args[2][0]
        if self._workspace is not None and (size := self._workspace(func._schema.name, args)):
            self._serial += 1
            self.category[self._serial] = TEMPORARIES
            self.events += [(self._serial, size), (self._serial, -size)]
        return out

    def _record(self, tensor: Tensor) -> int | None:
        """Return the serial number of a tensor's storage, or None for a storage of 0 bytes.

        If the storage is new, record its allocation.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return self._live[key][0]
        size = storage.nbytes()
        if not size:
            return None
        self._serial += 1
        serial = self._serial
        self._live[key] = serial, size
        self._references[key] = weakref.ref(storage, partial(self._record_release, key, serial))
        self.category[serial] = TEMPORARIES
        self.events.append((serial, size))
        return serial

    def _record_release(self, key: int, serial: int, _: object) -> None:
        entry = self._live.get(key)
        if entry is not None and entry[0] == serial:
            del self._live[key], self._references[key]
            self.events.append((serial, -entry[1]))


def _tensors(out: Any) -> Iterator[Tensor]:
    """Yield the tensors in the output of an operator."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for part in out:
            yield from _tensors(part)
