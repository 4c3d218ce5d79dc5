"""Hollow tensors: plain CPU tensors whose storages have their size and no memory.

A dispatch mode answers every operator with empty results of the right shape, so autograd, autocast and hooks run as
always and nothing is computed. What an operator gives is asked of PyTorch's FakeTensorMode once for each combination of
shapes, strides, dtypes and numbers, and remembered. FakeTensor itself goes through Python for every call and every
`.device`: several times the work of a step's rehearsal.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CPU = torch.device("cpu")
_known: dict[Any, Any] = {}  # what an operator gives: key of the call -> form of its result
_harmless: dict[Any, bool] = {}  # operators that look at no data


class _New:
    """A result: a tensor over the `number`-th storage that the call makes, of `size` bytes."""

    def __init__(self, tensor: Tensor, number: int) -> None:
        self.number = number
        self.size = tensor.untyped_storage().nbytes()
        self.layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        self.blank = torch.empty(0, dtype=tensor.dtype)


class _Same:
    """A result that is an argument, or over an argument's storage."""

    def __init__(self, tensor: Tensor, place: int, whole: bool) -> None:
        self.place = place  # of the argument, among the call's tensors
        self.whole = whole
        self.layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


class HollowTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every new tensor is hollow. Reading a value is an error."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each call pays for a guard against a compiler that is not there

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        harmless = _harmless.get(func)
        if harmless is None:
            harmless = _harmless[func] = _looks_at_no_data(func)
        if harmless:
            return func(*args, **(kwargs or {}))
        tensors: list[Tensor] = []
        key = [func]
        _describe(args, tensors, key)
        if kwargs:
            for name in kwargs:
                key.append(name)
                _describe((kwargs[name],), tensors, key)
        call = tuple(key)
        form = _known.get(call)
        if form is None:
            form = _known[call] = _asked(func, args, kwargs or {}, tensors)
        return _made(form[0], tensors, [None] * form[1])


def _looks_at_no_data(func: Any) -> bool:
    """A view of an argument, or nothing with tensors, such as the profiler's."""
    if func.namespace == "profiler":
        return True
    aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _works_in_place(func: Any) -> bool:
    """It writes to its first argument and returns it."""
    arguments, results = func._schema.arguments, func._schema.returns
    if not arguments or len(results) != 1:
        return False
    first = arguments[0]
    return (first.alias_info is not None and first.alias_info.is_write
            and str(first.type) == "Tensor" and results[0].alias_info is not None)


def _describe(things: Any, tensors: list[Tensor], key: list[Any]) -> None:
    """Add all that decides the result to `key`, and the tensors among `things` to `tensors`."""
    for thing in things:
        if isinstance(thing, Tensor):
            tensors.append(thing)
            key += (thing.dtype, thing.shape, thing.stride())
        elif isinstance(thing, (list, tuple)):
            key.append(len(thing))
            _describe(thing, tensors, key)
        elif isinstance(thing, torch.Generator):
            key.append(torch.Generator)
        else:
            key += (type(thing), thing)


def _asked(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[Any, int]:
    """The form of a call's result, and how many storages it makes."""
    if _works_in_place(func):
        return _Same(tensors[0], 0, whole=True), 0
    fake = FakeTensorMode()
    fake.cache_enabled = False  # no call comes here twice
    with fake:
        stand_ins = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CPU) for t in tensors]
        left = iter(stand_ins)
        args, kwargs = tree_map_only(Tensor, lambda _: next(left), (args, kwargs))
        result = func(*args, **kwargs)
        result = _as_laid_out(func, args, stand_ins, result)
    places = {t.untyped_storage()._cdata: place for place, t in reversed(list(enumerate(stand_ins)))}
    numbers: dict[int, int] = {}

    def form(tensor: Tensor) -> Any:
        for place, stand_in in enumerate(stand_ins):
            if tensor is stand_in:
                return _Same(tensor, place, whole=True)
        storage = tensor.untyped_storage()._cdata
        if storage in places:
            return _Same(tensor, places[storage], whole=False)
        return _New(tensor, numbers.setdefault(storage, len(numbers)))

    return tree_map_only(Tensor, form, result), len(numbers)


def _as_laid_out(func: Any, args: Any, given: list[Tensor], result: Any) -> Any:
    """The result of tensor and number with the strides that real ones have.

    Where a dimension has size 1, PyTorch keeps the tensor's stride and a fake tensor makes one up. Its value moves
    nothing, but decides whether a later operator takes the layout for channels_last or makes a copy.
    """
    numbers = any(isinstance(argument, (int, float)) for argument in args[1:2])
    if not (torch.Tag.pointwise in func.tags and numbers and len(given) == 1 and isinstance(result, Tensor)):
        return result
    pairs = zip(result.shape, result.stride(), given[0].stride(), strict=False)
    if result.shape != given[0].shape or any(size > 1 and ours != theirs for size, ours, theirs in pairs):
        return result
    return torch.empty_strided(result.shape, given[0].stride(), dtype=result.dtype)


def _made(form: Any, tensors: list[Tensor], storages: list[Any]) -> Any:
    if isinstance(form, _New):
        storage = storages[form.number]
        if storage is None:
            make: Any = torch._C._construct_storage_from_data_pointer
            storage = storages[form.number] = make(0, CPU, form.size)
        return form.blank.new_empty(0).set_(storage, *form.layout)
    if isinstance(form, _Same):
        if form.whole:
            return tensors[form.place]
        found = tensors[form.place]
        return found.new_empty(0).set_(found.untyped_storage(), *form.layout)
    if isinstance(form, (list, tuple)):
        return type(form)([_made(part, tensors, storages) for part in form])
    return form
