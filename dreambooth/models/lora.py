"""LoRA and DoRA: a few weights beside a frozen base, by peft.

LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3) adds to a layer of weight W, seen as a matrix (out, in):

    W' = W + s B A,  A (rank, in), B (out, rank), s = alpha / rank

DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5) learns the length m of each row of it too:

    W' = m V / |V|,  V = W + s B A, |V| the length of each of its rows, a constant to the gradient (section 4.3)

B begins at 0 and m at |W|: the untrained adapter is the base. A convolution is the same with (in, height, width) as one
dimension. Modules are named as in the Denoiser, `unet.mid_block...to_q` or `text_encoder...q_proj`: what is trained,
and how many text encoders there are, is the Denoiser's affair.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.enums import Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.models.sample_dropout import Dropout, follow
from dreambooth.utils import rng

NAME = "default"  # peft's name of the one adapter that trains
ATTENTION = r"to_[qkv]|to_out\.0|[qkv]_proj|out_proj"
TARGETS = {  # by the end of a module's name: UNet of diffusers, text encoders of transformers
    Targets.attention: re.compile(rf"(.*\.)?({ATTENTION})"),
    Targets.transformer: re.compile(rf"(.*\.)?({ATTENTION}|ff\.net\.(0\.proj|2)|proj_in|proj_out|fc[12])"),
    Targets.all: re.compile(".*"),
}


@dataclass(frozen=True)
class LowRank:
    """What a layer has learned, scale included: W' is W + up down, or of that direction with rows of length magnitude.

    down (rank, in) or (rank, in, height, width); up (out, rank) or (out, rank, 1, 1); magnitude (out,), DoRA only.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """up down, of the weight's shape."""
        return torch.mm(self.up.flatten(1), self.down.flatten(1)).reshape((len(self.up), *self.down.shape[1:]))

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with what was learned in it.

        Merged and applied beside, they differ by rounding alone. With u the unit roundoff of the computation (2**-24 in
        fp32), n inputs of an output value and gamma_k = k u / (1 - k u), a sum of k products in any order is off by at
        most gamma_k times the sum of their magnitudes (Higham 2002, eq. 3.5). Beside it: W x by gamma_n; up (down x) by
        gamma_(n + r); their sum by one more u. Merged: up down by gamma_r, W + up down by one more u, times x by
        gamma_n. Each is off by at most gamma_(n + r + 2) c, c = (|W| + |up| |down|) |x|, so, for every output value,

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


def inject(model: nn.Module, method: Method, seed: int, dtype: Dtype) -> None:
    """Put adapters into the modules of `model` (a Denoiser); after it only they require gradients.

    Args:
        seed: A is drawn from (seed, module's name), so that what trains does not depend on what else was drawn.
        dtype: of autocast, which casts a layer's input itself.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    dora = method.kind is MethodKind.dora
    for part in model.children():
        config = LoraConfig(r=method.rank, lora_alpha=method.scale_alpha,  # type: ignore[arg-type]
                            use_dora=dora,
                            target_modules=targets(part, method.targets))
        with torch.random.fork_rng(devices=[]):  # peft draws too, in an order of its own
            inject_adapter_in_model(config, part, adapter_name=NAME)
    dropouts = []
    for name, layer in layers(model):
        _whole(layer)
        _draw(layer.lora_A[NAME].weight, seed, name)
        layer.cast_input_dtype_enabled = dora or dtype is Dtype.fp32  # DoRA's lengths are computed in fp32
        if method.dropout:
            layer.lora_dropout[NAME] = Dropout(method.dropout, rng.seed(name, "dropout"))
            dropouts.append(layer.lora_dropout[NAME])
    if dropouts:
        follow(model, dropouts)


def targets(part: nn.Module, kind: Targets) -> list[str]:
    """The names of the linear and convolution layers of a UNet or text encoder that get an adapter."""
    return [name for name, module in part.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and TARGETS[kind].fullmatch(name)]


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of every adapter in the module."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@contextmanager
def absent(model: nn.Module) -> Iterator[None]:
    """The base for a while: adapters do nothing."""
    found = [layer for _, layer in layers(model)]
    try:
        for layer in found:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in found:
            layer.enable_adapters(True)


@torch.no_grad()
def learned(model: nn.Module) -> dict[str, LowRank]:
    """What each layer has learned, by module name, fp32 on the CPU."""
    return {name: LowRank(
        _plain(layer.lora_A[NAME].weight), _plain(layer.lora_B[NAME].weight) * layer.scaling[NAME],
        _plain(layer.lora_magnitude_vector[NAME].weight).flatten() if NAME in layer.lora_magnitude_vector else None)
        for name, layer in layers(model)}


@torch.no_grad()
def teach(model: nn.Module, known: Mapping[str, LowRank]) -> None:
    """Give adapters that were injected what others have learned, modules named as in files (see `published`).

    Raises:
        ValueError: they are of other layers or another rank.
    """
    found = {published(name): layer for name, layer in layers(model)}
    if found.keys() != known.keys():
        raise ValueError("it was trained on other layers")
    for name, layer in found.items():
        low = known[name]
        pairs = [(layer.lora_A[NAME].weight, low.down), (layer.lora_B[NAME].weight, low.up / layer.scaling[NAME])]
        if low.magnitude is not None:
            length = layer.lora_magnitude_vector[NAME].weight
            pairs.append((length, low.magnitude.view(length.shape)))
        for weight, value in pairs:
            if weight.shape != value.shape:
                raise ValueError("it has another rank")
            weight.copy_(value)


@torch.no_grad()
def merge(model: nn.Module, known: Mapping[str, LowRank]) -> None:
    """Put what was learned into the plain weights of `model`, modules named as in `known`; see LowRank.merged."""
    for name, low in known.items():
        layer: Any = model.get_submodule(name)
        layer.weight.copy_(low.merged(layer.weight))


def published(name: str) -> str:
    """A module's name as files have it: older transformers called the inside of a text encoder `text_model`."""
    part, _, rest = name.partition(".")
    if part.startswith("text_encoder") and rest.startswith(("encoder.", "embeddings.")):
        return f"{part}.text_model.{rest}"
    return name


def _whole(layer: Any) -> None:
    """The adapter of a layer in fp32; peft makes it in the precision of the base, lengths of rows included."""
    from peft.utils.integrations import dequantize_module_weight

    for thin in (layer.lora_A[NAME], layer.lora_B[NAME]):
        thin.weight = nn.Parameter(thin.weight.detach().float())
    if NAME in layer.lora_magnitude_vector:
        lengths = layer.lora_magnitude_vector[NAME]
        lengths.get_weight_norm = partial(_lengths, lengths)
        weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
        lengths.weight = nn.Parameter(lengths.get_weight_norm(weight, torch.zeros_like(weight), 1.0))


def _lengths(lengths: Any, weight: Tensor, lora_weight: Tensor, scaling: float, **_: Any) -> Tensor:
    """|V| in fp32; of a convolution peft would compute it in the precision of the base."""
    found: Tensor = type(lengths).get_weight_norm(lengths, weight.float(), lora_weight.float(), scaling)
    return found


def _draw(weight: nn.Parameter, seed: int, name: str) -> None:
    """Evenly within 1 / sqrt(inputs), as a linear layer begins; the same on every device."""
    bound = 1 / math.sqrt(weight[0].numel())
    numbers = rng.stream(seed, name, "adapter").uniform(-bound, bound, tuple(weight.shape))
    with torch.no_grad():
        weight.copy_(torch.from_numpy(numbers))


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu()
