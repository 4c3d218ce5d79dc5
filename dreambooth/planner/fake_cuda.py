"""Emulates a CUDA GPU on tensors without data: CUDA's rules for autocast dtypes and the choice of attention kernel.

The device of the tensors is `cpu`, because a CPU build of PyTorch cannot run autograd on a fake `cuda` tensor. Inside
the context `fake_gpu`, the CPU's autocast key has CUDA's autocast rules, and attention is dispatched to the kernel that
the card would choose. A forward pass of SD 1.5 under this emulation has the same sequence of operators, shapes and
dtypes as under real CUDA autocast dispatch.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth.planner.dataless_tensors import DatalessTensorMode

FLASH_CAPABILITY = 8.0  # PyTorch's flash kernel needs Ampere; a T4 (7.5) uses the memory-efficient kernel
_TO_FP32 = ("group_norm", "layer_norm", "native_layer_norm", "exp", "pow.Tensor_Scalar", "rsqrt", "upsample_nearest2d")
_FP32_RESULT = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList")
_EFFICIENT_BACKWARD = "aten::_scaled_dot_product_efficient_attention_backward"
_FLASH_BACKWARD = "aten::_scaled_dot_product_flash_attention_backward"


@contextmanager
def fake_gpu(capability: float | None) -> Iterator[None]:
    """Emulate a CUDA card in a `with` block: new tensors have no data; operators have the card's dtypes and kernels.

    Args:
        capability: CUDA compute capability of the card; None: as on a T4.
    """
    with ExitStack() as stack:
        stack.enter_context(cuda_autocast())
        stack.enter_context(cuda_attention((capability or 0) >= FLASH_CAPABILITY))
        stack.enter_context(fake_tensors())
        yield


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Give new tensors in a `with` block a shape, a dtype and a storage size, but no memory."""
    with DatalessTensorMode():
        yield


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Give the CPU's autocast key the autocast rules of CUDA in a `with` block."""
    make_library: Any = torch.library.Library
    library = make_library("aten", "IMPL")
    try:
        for name in _TO_FP32:
            library.impl(name, _to_fp32(_operator(name)), "AutocastCPU")
        for name in _FP32_RESULT:
            library.impl(name, _fp32_result(_operator(name), name == "softmax.int"), "AutocastCPU")
        yield
    finally:
        library._destroy()


@contextmanager
def cuda_attention(flash: bool) -> Iterator[None]:
    """Make F.scaled_dot_product_attention in a `with` block choose the kernel that CUDA would choose.

    The flash kernel runs if card, dtype and mask allow it. Otherwise the memory-efficient kernel runs, which xformers
    also uses.

    Args:
        flash: whether the card supports the flash kernel.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention(flash)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def attention_workspace_bytes(name: str, args: tuple[Any, ...]) -> int:
    """Return the bytes of the temporary workspace of a CUDA attention kernel's backward pass; 0 for other operators.

    dq, dk and dv are the gradients of query, key and value. The memory-efficient kernel needs an fp32 accumulator for
    dq, and for head dimensions above 128 also for dk and dv. The flash kernel needs an fp32 accumulator for dq. In this
    accumulator, the number of queries is rounded up to a multiple of 128. The head dimension is rounded up to a
    multiple of 32 if it is at most 128, and to a multiple of 64 otherwise. The flash kernel also needs one fp32 sum per
    query, for the rounded number of queries.

    Args:
        name: the operator's schema name.
        args: the operator's arguments; the second is the query (batch, heads, queries, head dimension).
    """
    if name not in (_EFFICIENT_BACKWARD, _FLASH_BACKWARD):
        return 0
    batch, heads, queries, width = args[1].shape
    if name == _EFFICIENT_BACKWARD:
        return int(4 * batch * heads * queries * width * (1 if width <= 128 else 3))
    unit = 32 if width <= 128 else 64
    rows = (queries + 127) // 128 * 128
    return int(4 * batch * heads * rows * ((width + unit - 1) // unit * unit + 1))


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a module to `dtype` with new parameters, because `Module.to` cannot swap the data of fake parameters.

    A parameter that belongs to several submodules remains one parameter. If `dtype` is fp16, the modules that
    transformers loads in fp32 nevertheless, such as the output layers of T5's feed-forward layers, remain in fp32.
    """
    converted: dict[int, nn.Parameter] = {}
    in_fp32 = set(getattr(module, "_keep_in_fp32_modules", None) or () if dtype is torch.float16 else ())
    for path, submodule in module.named_modules():
        if in_fp32.intersection(path.split(".")):
            continue
        for name, parameter in list(submodule._parameters.items()):
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                if (key := id(parameter)) not in converted:
                    converted[key] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                submodule._parameters[name] = converted[key]
        for name, buffer in list(submodule._buffers.items()):
            if buffer is not None and buffer.is_floating_point() and buffer.dtype != dtype:
                submodule._buffers[name] = buffer.to(dtype)
    return module


def offload_weights(module: nn.Module, kept: Collection[Tensor] = ()) -> dict[str, torch.Size]:
    """Free a module's weights, as if they were moved to the host; return their shapes for `reload_weights`.

    Args:
        kept: parameters that do not move.
    """
    skipped = set(map(id, kept))
    parameters = {name: parameter for name, parameter in module.named_parameters() if id(parameter) not in skipped}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return shapes


def reload_weights(module: nn.Module, shapes: dict[str, torch.Size]) -> nn.Module:
    """Allocate the weights of a module again, with undefined values; return the module.

    Args:
        shapes: the shapes that `offload_weights` returned.
    """
    for name, parameter in module.named_parameters():
        if name in shapes:
            parameter.data = torch.empty(shapes[name], dtype=parameter.dtype)
    return module


def _operator(name: str) -> Any:
    """Return an ATen operator by name. The name may include an overload (`softmax.int`) or not (`exp`)."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _without_autocast() -> Any:
    """Return a guard that excludes the autocast key, so that operators run without autocast."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _cast_to_fp32(value: Any) -> Any:
    """Cast floating-point tensors to fp32, including those in lists and tuples; return other values unchanged."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype != torch.float32 else value
    return type(value)(map(_cast_to_fp32, value)) if isinstance(value, list | tuple) else value


def _to_fp32(operator: Any) -> Callable[..., Any]:
    """Return an autocast rule that casts the inputs of an operator to fp32."""
    def compute(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return operator(*map(_cast_to_fp32, args), **{key: _cast_to_fp32(value) for key, value in kwargs.items()})

    return compute


def _fp32_result(operator: Any, softmax: bool) -> Callable[..., Any]:
    """Return an autocast rule that computes the result in fp32, unless the caller passes a dtype.

    Args:
        softmax: whether the operator is `softmax.int`, which CUDA computes without an fp32 copy of an fp16 input.
    """
    def compute(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            dtype = kwargs.get("dtype", args[2] if softmax and len(args) > 2 else None)
            if softmax and args[0].dtype == torch.half and dtype in (None, torch.float32):
                # CUDA's softmax converts inside its kernel: there is no fp32 copy of the input.
                return torch.ops.aten._softmax.default(args[0], args[1], True)
            if dtype is None and args[0].is_floating_point():
                kwargs["dtype"] = torch.float32
            return operator(*args, **kwargs)

    return compute


def _attention(flash: bool) -> Callable[..., Tensor]:
    """Return a replacement of F.scaled_dot_product_attention that calls the CUDA kernels' operators."""
    def compute(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                is_causal: bool = False, scale: float | None = None, **_: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        half = query.dtype in (torch.float16, torch.bfloat16)
        if flash and half and attn_mask is None:
            output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale)[0]
            return output
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, float("-inf"))
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        output = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0]
        return output

    return compute
