"""LoRA and DoRA: a few trained weights beside a frozen base, by peft.

LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3) adds to a layer of weight W, seen as a matrix (out, in):

    W' = W + s B A,  A (rank, in), B (out, rank), s = alpha / rank

DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5) also trains the length m of each row:

    W' = m V / |V|,  V = W + s B A, |V| the length of each of its rows, a constant to the gradient (section 4.3)

B starts at 0 and m at |W|: the untrained adapter is the base. A convolution is handled the same way, with (in, height,
width) as one dimension. Modules are named as in the TrainedModel: `PART.NAME`, such as `unet.mid_block...to_q` or
`text_encoder...q_proj`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.enums import Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.models.sample_dropout import Dropout, set_keys_before_forward
from dreambooth.utils import rng

NAME = "default"  # peft's name of the one adapter that trains


@dataclass(frozen=True)
class LowRank:
    """The adapter of one layer, scale included: W' is W + up down; with DoRA, its rows scaled to length `magnitude`.

    down (rank, in) or (rank, in, height, width); up (out, rank) or (out, rank, 1, 1); magnitude (out,), DoRA only.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """The product up down, in the shape of the layer's weight."""
        return torch.mm(self.up.flatten(1), self.down.flatten(1)).reshape((len(self.up), *self.down.shape[1:]))

    def merged(self, weight: Tensor) -> Tensor:
        """Return the layer's weight with the adapter merged into it.

        A merged adapter and one applied beside the layer differ by rounding alone. With u the unit roundoff of the
        computation (2**-24 in fp32), n inputs of an output value and gamma_k = k u / (1 - k u), a sum of k products in
        any order is off by at most gamma_k times the sum of their magnitudes (Higham 2002, eq. 3.5). Beside: W x by
        gamma_n; up (down x) by gamma_(n + r); their sum by one more u. Merged: up down by gamma_r, W + up down by one
        more u, times x by gamma_n. Each is off by at most gamma_(n + r + 2) c, c = (|W| + |up| |down|) |x|, so, for
        every output value,

            |merged - applied| <= 2 gamma_(n + r + 2) c

        and with DoRA, where both multiply by the same m / |V|, by three more roundings, and |V| is within
        gamma_(n + 3) of itself both times: at most (m / |V|) * 2 gamma_(2 n + r + 10) c.
        """
        whole = weight + self.delta.to(weight)
        if self.magnitude is None:
            return whole
        factor = self.magnitude.to(weight) / torch.linalg.vector_norm(whole.flatten(1), dim=1)
        scaled: Tensor = whole.flatten(1) * factor.view(-1, 1)
        return scaled.view_as(weight)


def inject(model: nn.Module, method: Method, targets: Mapping[Targets, re.Pattern[str]], seed: int,
           dtype: Dtype) -> None:
    """Put adapters into the parts of `model` (a TrainedModel); then only the adapters require gradients.

    Args:
        targets: the family's choice of layers, see Family.adapter_targets.
        seed: A is drawn from (seed, module's name), so that it does not depend on what else was drawn.
        dtype: of autocast, which casts a layer's input itself.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    dora = method.kind is MethodKind.dora
    for part in model.children():
        config = LoraConfig(r=method.rank, lora_alpha=method.scale_alpha,  # type: ignore[arg-type]
                            use_dora=dora,
                            target_modules=target_layers(part, targets[method.targets]))
        with torch.random.fork_rng(devices=[]):  # peft draws, too, in its own order
            inject_adapter_in_model(config, part, adapter_name=NAME)
    dropouts = []
    for name, layer in layers(model):
        _make_exact(layer)
        _draw(layer.lora_A[NAME].weight, seed, name)
        layer.cast_input_dtype_enabled = dora or dtype is Dtype.fp32  # DoRA's lengths are computed in fp32
        if method.dropout:
            layer.lora_dropout[NAME] = Dropout(method.dropout, rng.seed(name, "dropout"))
            dropouts.append(layer.lora_dropout[NAME])
    if dropouts:
        set_keys_before_forward(model, dropouts)


def target_layers(part: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    """Return the names of the linear and convolution layers of a part that get an adapter."""
    return [name for name, module in part.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and pattern.fullmatch(name)]


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and layer of every adapter in the module."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute as the base does inside the context: adapters have no effect."""
    adapters = [layer for _, layer in layers(model)]
    try:
        for layer in adapters:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in adapters:
            layer.enable_adapters(True)


@torch.no_grad()
def adapter_weights(model: nn.Module) -> dict[str, LowRank]:
    """Return each layer's adapter by module name, fp32 on the CPU."""
    return {name: LowRank(
        _exact(layer.lora_A[NAME].weight), _exact(layer.lora_B[NAME].weight) * layer.scaling[NAME],
        _exact(layer.lora_magnitude_vector[NAME].weight).flatten() if NAME in layer.lora_magnitude_vector else None)
        for name, layer in layers(model)}


@torch.no_grad()
def load_adapter_weights(model: nn.Module, weights: Mapping[str, LowRank],
                         file_name: Callable[[str], str] = str) -> None:
    """Put weights into the adapters of `model`.

    Args:
        weights: by module name as in files.
        file_name: module name in `model` -> module name in files, see Family.published_name.

    Raises:
        ValueError: the weights are of other layers or of another rank.
    """
    adapters = {file_name(name): layer for name, layer in layers(model)}
    if adapters.keys() != weights.keys():
        raise ValueError("it was trained on other layers")
    for name, layer in adapters.items():
        low = weights[name]
        pairs = [(layer.lora_A[NAME].weight, low.down), (layer.lora_B[NAME].weight, low.up / layer.scaling[NAME])]
        if low.magnitude is not None:
            length = layer.lora_magnitude_vector[NAME].weight
            pairs.append((length, low.magnitude.view(length.shape)))
        for weight, value in pairs:
            if weight.shape != value.shape:
                raise ValueError("it has another rank")
            weight.copy_(value)


@torch.no_grad()
def merge(model: nn.Module, weights: Mapping[str, LowRank]) -> None:
    """Merge adapters into the plain weights of `model`, see LowRank.merged.

    Args:
        weights: by module name in `model`.
    """
    for name, low in weights.items():
        layer: Any = model.get_submodule(name)
        layer.weight.copy_(low.merged(layer.weight))


def _make_exact(layer: Any) -> None:
    """Convert the adapter of a layer to fp32, including DoRA's magnitudes.

    peft creates it in the precision of the base model.
    """
    from peft.utils.integrations import dequantize_module_weight

    for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
        factor.weight = nn.Parameter(factor.weight.detach().float())
    if NAME in layer.lora_magnitude_vector:
        lengths = layer.lora_magnitude_vector[NAME]
        lengths.get_weight_norm = partial(_weight_norm, lengths)
        weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
        lengths.weight = nn.Parameter(lengths.get_weight_norm(weight, torch.zeros_like(weight), 1.0))


def _weight_norm(lengths: Any, weight: Tensor, lora_weight: Tensor, scaling: float, **_: Any) -> Tensor:
    """Compute |V| in fp32; for a convolution peft would compute it in the precision of the base."""
    norms: Tensor = type(lengths).get_weight_norm(lengths, weight.float(), lora_weight.float(), scaling)
    return norms


def _draw(weight: nn.Parameter, seed: int, name: str) -> None:
    """Draw initial weights uniformly within 1 / sqrt(inputs), as for a linear layer; the same on every device."""
    bound = 1 / math.sqrt(weight[0].numel())
    numbers = rng.stream(seed, name, "adapter").uniform(-bound, bound, tuple(weight.shape))
    with torch.no_grad():
        weight.copy_(torch.from_numpy(numbers))


def _exact(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu()
