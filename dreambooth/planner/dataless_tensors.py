"""Tensors without data: plain CPU tensors whose storages report their size but use no memory.

A dispatch mode returns an empty result of the right shape, strides and dtype for every operator. Autograd, autocast and
hooks run as usual, but no operator computes values. PyTorch's FakeTensorMode infers the result of the first call of an
operator. A later call of the operator uses a cached template of this result, if its tensors have the same shapes,
strides and dtypes and its other arguments are equal. The tensors themselves are not FakeTensors. A FakeTensor runs
Python code for every call and for every access to `.device`, so with FakeTensors the rehearsal of a step would take
several times as long.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CPU = torch.device("cpu")
_templates: dict[Any, Any] = {}  # key of a call -> template of its result
_runs_as_is: dict[Any, bool] = {}  # operator -> whether the real operator can run, because it reads no data


class _NewStorage:
    """Template of a result tensor whose storage is new.

    `size` is the size of this storage in bytes. `number` is its index among the storages that the call allocates.
    """

    def __init__(self, tensor: Tensor, number: int) -> None:
        self.number = number
        self.size = tensor.untyped_storage().nbytes()
        self.layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        self.empty = torch.empty(0, dtype=tensor.dtype)


class _ArgumentStorage:
    """Template of a result tensor that is an argument of the call, or a view into an argument's storage."""

    def __init__(self, tensor: Tensor, index: int, is_argument: bool) -> None:
        self.index = index  # position of the argument among the tensor arguments of the call
        self.is_argument = is_argument
        self.layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


class DatalessTensorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which every new tensor has no data.

    Reading a number is an error. Reading a boolean gives False: transformers asks in this way whether a prompt fills
    all token positions, so that it needs no attention mask.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise a guard against torch.compile, which is not used here, slows down every call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return False
        runs_as_is = _runs_as_is.get(func)
        if runs_as_is is None:
            runs_as_is = _runs_as_is[func] = _reads_no_data(func)
        if runs_as_is:
            return func(*args, **(kwargs or {}))
        tensors: list[Tensor] = []
        key = [func]
        _describe(args, tensors, key)
        if kwargs:
            for name in kwargs:
                key.append(name)
                _describe((kwargs[name],), tensors, key)
        call = tuple(key)
        template = _templates.get(call)
        if template is None:
            template = _templates[call] = _infer_template(func, args, kwargs or {}, tensors)
        return _build(template[0], tensors, [None] * template[1])


def _reads_no_data(func: Any) -> bool:
    """Return whether an operator only creates a view of an argument, or is an operator of the profiler."""
    if func.namespace == "profiler":
        return True
    aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _works_in_place(func: Any) -> bool:
    """Return whether an operator writes to its first argument and returns this argument."""
    arguments, results = func._schema.arguments, func._schema.returns
    if not arguments or len(results) != 1:
        return False
    first = arguments[0]
    return (first.alias_info is not None and first.alias_info.is_write
            and str(first.type) == "Tensor" and results[0].alias_info is not None)


def _describe(arguments: Any, tensors: list[Tensor], key: list[Any]) -> None:
    """Append everything that determines a call's result to `key`, and the call's tensor arguments to `tensors`."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            key += (argument.dtype, argument.shape, argument.stride())
        elif isinstance(argument, (list, tuple)):
            key.append(len(argument))
            _describe(argument, tensors, key)
        elif isinstance(argument, torch.Generator):
            key.append(torch.Generator)
        else:
            key += (type(argument), argument)


def _infer_template(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[Any, int]:
    """Infer a call's result with FakeTensorMode. Return its template and the number of storages the call allocates."""
    if _works_in_place(func):
        return _ArgumentStorage(tensors[0], 0, is_argument=True), 0
    fake = FakeTensorMode()
    fake.cache_enabled = False  # this function runs only once per kind of call
    with fake:
        stand_ins = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CPU) for t in tensors]
        remaining = iter(stand_ins)
        args, kwargs = tree_map_only(Tensor, lambda _: next(remaining), (args, kwargs))
        result = func(*args, **kwargs)
        result = _with_real_strides(func, args, stand_ins, result)
    argument_indices = {t.untyped_storage()._cdata: index for index, t in reversed(list(enumerate(stand_ins)))}
    new_storages: dict[int, int] = {}  # storage address -> number of the new storage

    def template(tensor: Tensor) -> Any:
        for index, stand_in in enumerate(stand_ins):
            if tensor is stand_in:
                return _ArgumentStorage(tensor, index, is_argument=True)
        storage = tensor.untyped_storage()._cdata
        if storage in argument_indices:
            return _ArgumentStorage(tensor, argument_indices[storage], is_argument=False)
        return _NewStorage(tensor, new_storages.setdefault(storage, len(new_storages)))

    return tree_map_only(Tensor, template, result), len(new_storages)


def _with_real_strides(func: Any, args: Any, tensors: list[Tensor], result: Any) -> Any:
    """Return `result`, a fake tensor, with the strides that the real result of the call has.

    The strides of the fake and the real result differ only if `func` is a pointwise operator that combines a tensor
    with a number, and only in dimensions of size 1. There the real result has the stride of the input, and the fake
    tensor has an arbitrary stride. This stride has no effect on the position of elements. However, later operators use
    the stride to decide whether the layout is channels_last and whether to copy the tensor.
    """
    with_number = any(isinstance(argument, (int, float)) for argument in args[1:2])
    if not (torch.Tag.pointwise in func.tags and with_number and len(tensors) == 1 and isinstance(result, Tensor)):
        return result
    dimensions = zip(result.shape, result.stride(), tensors[0].stride(), strict=False)
    if result.shape != tensors[0].shape or any(size > 1 and ours != theirs for size, ours, theirs in dimensions):
        return result
    return torch.empty_strided(result.shape, tensors[0].stride(), dtype=result.dtype)


def _build(template: Any, tensors: list[Tensor], storages: list[Any]) -> Any:
    """Build the result of a call from its template.

    Args:
        tensors: the tensor arguments of the call.
        storages: the new storages of the call; None for a storage that this function still has to create.
    """
    if isinstance(template, _NewStorage):
        storage = storages[template.number]
        if storage is None:
            make_storage: Any = torch._C._construct_storage_from_data_pointer
            storage = storages[template.number] = make_storage(0, CPU, template.size)
        return template.empty.new_empty(0).set_(storage, *template.layout)
    if isinstance(template, _ArgumentStorage):
        if template.is_argument:
            return tensors[template.index]
        argument = tensors[template.index]
        return argument.new_empty(0).set_(argument.untyped_storage(), *template.layout)
    if isinstance(template, (list, tuple)):
        return type(template)([_build(part, tensors, storages) for part in template])
    return template
