"""Records every storage that comes and goes while tensors compute: the raw material of a memory prediction.

Works the same on fake and on real tensors. A storage is known by what it turns out to be (weights, gradients,
activations, ...), so its category is the last one that it was given; when it lived is in `events`.
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

HOST = "host"  # category of what would be in host memory
TEMPORARIES, ACTIVATIONS = "temporaries", "activations"
Event = tuple[int, int]  # (serial, +bytes) comes, (serial, -bytes) goes, (MARK, n) the n-th mark is passed
MARK = -1
Workspace = Callable[[str, tuple[Any, ...]], int]  # operator's name and arguments -> bytes that its kernel takes
_DEVICE = torch.ops.prim.device.default


class StorageTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode; enter it around what is to be recorded.

    `events` are in the order of time, `category` is by serial number, `marks` are what `mark` was told. `flops` counts
    floating-point operations of matrix products, convolutions and attention, by mark (one multiply-add is two).
    """

    def __init__(self, workspace: Workspace | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.category: dict[int, str] = {}
        self.marks: list[str] = []
        self.flops: dict[str, int] = {}
        self._live: dict[int, tuple[int, int]] = {}  # address of the storage object -> (serial, bytes)
        self._references: dict[int, weakref.ref[Any]] = {}
        self._serial = 0
        self._phase = ""
        self._workspace = workspace

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._references.clear()  # what goes later is not recorded

    def mark(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        self.events.append((MARK, len(self.marks)))
        self.marks.append(phase)
        self._phase = phase

    def add(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what tensors are, whether they were seen before or not."""
        for tensor in tensors:
            serial = self._see(tensor)
            if serial is not None:
                self.category[serial] = category

    def add_module(self, module: nn.Module | None, category: str) -> None:
        """Parameters and buffers of a module."""
        if module is not None:
            self.add([*module.parameters(), *module.buffers()], category)

    def rename_live(self, old: str, new: str) -> None:
        """Whatever is alive and counted as `old` is `new` from its beginning."""
        for serial, _ in self._live.values():
            if self.category[serial] == old:
                self.category[serial] = new

    def repeat(self, start: int, end: int, marks: bool = True) -> None:
        """events[start:end] happen once more, without what is still alive after them: that is there already."""
        events, offset = self.events[start:end], self._serial
        dead = {serial for serial, size in events if serial != MARK and size < 0}
        born = {serial for serial, size in events if serial != MARK and size > 0}
        for serial, size in events:
            if serial == MARK and marks:
                self.events.append((MARK, size))
            elif serial in born and serial in dead:
                self.category[serial + offset] = self.category[serial]
                self.events.append((serial + offset, size))
        self._serial = 2 * offset

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @contextmanager
    def whole(self, phase: str) -> Iterator[None]:
        """A phase with an end: what comes after belongs to `idle`."""
        self.mark(phase)
        yield
        self.mark("idle")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each call pays for a guard against a compiler that is not there

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _DEVICE:
            return out
        for tensor in _tensors(out):
            self._see(tensor)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops[self._phase] = self.flops.get(self._phase, 0) + count(*args, **(kwargs or {}), out_val=out)
        if self._workspace is not None and (size := self._workspace(func._schema.name, args)):
            self._serial += 1
            self.category[self._serial] = TEMPORARIES
            self.events += [(self._serial, size), (self._serial, -size)]
        return out

    def _see(self, tensor: Tensor) -> int | None:
        """The serial number of a tensor's storage; None for one without bytes."""
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
        self._references[key] = weakref.ref(storage, partial(self._gone, key, serial))
        self.category[serial] = TEMPORARIES
        self.events.append((serial, size))
        return serial

    def _gone(self, key: int, serial: int, _: object) -> None:
        entry = self._live.get(key)
        if entry is not None and entry[0] == serial:
            del self._live[key], self._references[key]
            self.events.append((serial, -entry[1]))


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for part in out:
            yield from _tensors(part)
