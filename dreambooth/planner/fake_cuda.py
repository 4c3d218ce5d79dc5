"""A GPU that is not there: fake tensors that follow CUDA's rules for dtypes and attention.

Device `cpu` stands for the GPU, since a CPU build of PyTorch cannot run autograd on a fake `cuda` tensor. CUDA's
autocast rules are put on the CPU's autocast key for as long as the context lasts, and attention goes to the kernel
that the card would choose. A forward pass of SD 1.5 under real CUDA autocast dispatch and under this emulation gives
the same sequence of operators, shapes and dtypes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth.planner.hollow_tensors import HollowTensors

FLASH_CAPABILITY = 8.0  # PyTorch's flash kernel needs Ampere; a T4 (7.5) gets the memory-efficient one
_TO_FP32 = ("group_norm", "layer_norm", "native_layer_norm", "exp", "pow.Tensor_Scalar", "rsqrt", "upsample_nearest2d")
_FP32_RESULT = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList")
_EFFICIENT_BACKWARD = "aten::_scaled_dot_product_efficient_attention_backward"
_FLASH_BACKWARD = "aten::_scaled_dot_product_flash_attention_backward"


@contextmanager
def fake_gpu(capability: float | None) -> Iterator[None]:
    """Inside, tensors are fake and compute as on a CUDA card of that compute capability (None: as on a T4)."""
    with ExitStack() as stack:
        stack.enter_context(cuda_autocast())
        stack.enter_context(cuda_attention((capability or 0) >= FLASH_CAPABILITY))
        stack.enter_context(fake_tensors())
        yield


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, tensors have shapes and dtypes and no memory."""
    with HollowTensors():
        yield


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """CUDA's autocast policy on the CPU's autocast key."""
    make: Any = torch.library.Library
    library = make("aten", "IMPL")
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
    """F.scaled_dot_product_attention as CUDA dispatches it: flash where the card, dtype and mask allow it, else the
    memory-efficient kernel, which is also xformers'."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention(flash)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def workspace(name: str, args: tuple[Any, ...]) -> int:
    """Bytes that a CUDA attention kernel's backward pass takes for itself: its fp32 accumulators of dq (and of dk, dv
    for heads above 128 in the memory-efficient kernel); flash pads queries to 128 and heads to 32 or 64, and keeps
    a row sum."""
    if name not in (_EFFICIENT_BACKWARD, _FLASH_BACKWARD):
        return 0
    batch, heads, queries, width = args[1].shape
    if name == _EFFICIENT_BACKWARD:
        return int(4 * batch * heads * queries * width * (1 if width <= 128 else 3))
    unit = 32 if width <= 128 else 64
    rows = (queries + 127) // 128 * 128
    return int(4 * batch * heads * rows * ((width + unit - 1) // unit * unit + 1))


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """module.to(dtype) for fake parameters, which `Module.to` cannot swap: they are made anew."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                part._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.is_floating_point() and buffer.dtype != dtype:
                part._buffers[name] = buffer.to(dtype)
    return module


def rest(module: nn.Module) -> dict[str, torch.Size]:
    """Let a module's weights leave the device; returns what `wake` needs."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return shapes


def wake(module: nn.Module, shapes: dict[str, torch.Size]) -> nn.Module:
    """The weights are back, their values are not; returns the module."""
    for name, parameter in module.named_parameters():
        parameter.data = torch.empty(shapes[name], dtype=parameter.dtype)
    return module


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _below_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _raised(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype != torch.float32 else value
    return type(value)(map(_raised, value)) if isinstance(value, list | tuple) else value


def _to_fp32(operator: Any) -> Callable[..., Any]:
    def compute(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            return operator(*map(_raised, args), **{key: _raised(value) for key, value in kwargs.items()})

    return compute


def _fp32_result(operator: Any, softmax: bool) -> Callable[..., Any]:
    def compute(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            wanted = kwargs.get("dtype", args[2] if softmax and len(args) > 2 else None)
            if softmax and args[0].dtype == torch.half and wanted in (None, torch.float32):
                return torch.ops.aten._softmax.default(args[0], args[1], True)  # CUDA fuses: no fp32 copy of the input
            if wanted is None and args[0].is_floating_point():
                kwargs["dtype"] = torch.float32
            return operator(*args, **kwargs)

    return compute


def _attention(flash: bool) -> Callable[..., Tensor]:
    def compute(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                is_causal: bool = False, scale: float | None = None, **_: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        half = query.dtype in (torch.float16, torch.bfloat16)
        if flash and half and attn_mask is None:
            found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale)[0]
            return found
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, float("-inf"))
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, trains, dropout_p, is_causal, scale=scale)[0]
        return found

    return compute
