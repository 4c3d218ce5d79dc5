"""Adapters: a few trained weights beside a frozen base model, implemented with peft.

This file adds adapters of all kinds to a model. LoRA and DoRA are described here, LoKr and LoHa in adapters/factors.py.

LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3) replaces the weight W of a layer, a matrix (out, in), by W':

    W' = W + s B A,  A (rank, in), B (out, rank), s = alpha / rank

With method.use_rslora, s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2), for all kinds.

DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5) also trains m, the Euclidean norm of each row of W':

    W' = m V / |V|,  V = W + s B A

|V| is the norm of each row of V; no gradient flows through it (section 4.3). B is initialised to 0 and m to |W|, so an
untrained adapter does not change the base model. The weight of a convolution is flattened to a matrix (out, in * height
* width). A module's name is its name in the TrainedModel (loading.py): `PART.NAME`, such as `unet.mid_block...to_q` or
`text_encoder...q_proj`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.enums import Dtype, MethodKind, Targets
from dreambooth.config.method import LYCORIS, Method
from dreambooth.models.adapters import selection
from dreambooth.models.adapters.factors import LoHa, LoKr
from dreambooth.models.adapters.selection import Choice
from dreambooth.models.adapters.selection import target_layers as target_layers
from dreambooth.models.sample_dropout import Dropout, set_keys_before_forward
from dreambooth.utils import rng
from dreambooth.utils.imports import without_bitsandbytes

NAME = "default"  # peft's name of the one adapter that trains


@dataclass(frozen=True)
class LowRank:
    """The adapter of one layer: W' = W + `up` `down` (a matrix product).

    DoRA also scales each row of W' to the norm that `magnitude` contains for this row.

    Attributes:
        down: A, (rank, in) or (rank, in, height, width).
        up: s B, (out, rank) or (out, rank, 1, 1).
        magnitude: m, (out,); None without DoRA.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """The matrix product of `up` and `down`, in the shape of the layer's weight."""
        return torch.mm(self.up.flatten(1), self.down.flatten(1)).reshape((len(self.up), *self.down.shape[1:]))

    def merged(self, weight: Tensor) -> Tensor:
        """Return the layer's weight with the adapter merged into it.

        The output of a layer with a merged adapter differs from the output with a separate adapter by rounding alone.
        Let u be the unit roundoff (2**-24 in fp32), gamma_k = k u / (1 - k u), n the number of inputs of an output
        value, and r the rank. The rounding error of a sum of k products, in any order, is at most gamma_k times the sum
        of the magnitudes of the products (Higham 2002, eq. 3.5).

        - With a separate adapter, the error of W x has the factor gamma_n, and the error of up (down x) has the factor
          gamma_(n + r). Adding the two products adds one u.
        - With a merged adapter, the error of the matrix product P = up down has the factor gamma_r. Adding W and P adds
          one u, and multiplying their sum by x adds gamma_n.

        Both errors are at most gamma_(n + r + 2) c with c = (|W| + |up| |down|) |x|. Therefore, for every output value,

            |merged - separate| <= 2 gamma_(n + r + 2) c

        With DoRA, both outputs are also multiplied by m / |V|, which adds three roundings, and the relative error of
        each |V| is at most gamma_(n + 3). The bound is then (m / |V|) * 2 gamma_(2 n + r + 10) c.
        """
        whole = weight + self.delta.to(weight)
        if self.magnitude is None:
            return whole
        factor = self.magnitude.to(weight) / torch.linalg.vector_norm(whole.flatten(1), dim=1)
        scaled: Tensor = whole.flatten(1) * factor.view(-1, 1)
        return scaled.view_as(weight)

    def base_scale(self, weight: Tensor) -> Tensor:
        """Return m |W| / |V| of a DoRA for each row, (out,), in fp32 on the CPU. V is W + s B A.

        Some programs read one number per row from a LoRA file. They multiply the row of V by this number / |W|. If the
        number is the returned value, the row is multiplied by m / |V|, as in DoRA.

        Args:
            weight: W, the layer's weight in the base model.
        """
        assert self.magnitude is not None, "a LoRA without DoRA has no scale"
        weight = weight.float()
        base, changed = (torch.linalg.vector_norm(matrix.flatten(1), dim=1)
                         for matrix in (weight, weight + self.delta.to(weight)))
        scale: Tensor = self.magnitude * (base / changed).cpu()
        return scale


Adapter = LowRank | LoKr | LoHa  # the adapter of one layer


def inject(model: nn.Module, method: Method, targets: Mapping[Targets, re.Pattern[str]], seed: int,
           dtype: Dtype) -> None:
    """Add adapters to the parts of `model` (a TrainedModel). Afterwards only the adapters require gradients.

    Args:
        targets: a pattern of layer names for each value of method.targets (Family.adapter_targets).
        seed: seed of the start values of the adapters. They depend on this seed and the module's name alone, and on no
            other random numbers.
        dtype: the precision of autocast. With fp16 or bf16, autocast itself casts the input of a LoRA layer, so peft's
            own cast to fp32 is disabled. The cast stays enabled for DoRA, which computes its norms in fp32.

    Raises:
        UserError: a pattern of `method` matches no layer.
    """
    choices = selection.select(model, method, targets)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft also draws; this keeps the global random state
        if method.kind in LYCORIS:
            _inject_lycoris(model, method, choices, seed)
        else:
            _inject_lora(model, method, choices)
    dropouts = []
    for name, layer in layers(model):
        if method.kind not in LYCORIS:
            _make_exact(layer)
            _draw(layer.lora_A[NAME].weight, seed, name)
            layer.cast_input_dtype_enabled = method.kind is MethodKind.dora or dtype is Dtype.fp32
        if method.dropout:
            dropout = Dropout(method.dropout, rng.seed(name, "dropout"))
            if method.kind in LYCORIS:
                layer.input_dropout = dropout
            else:
                layer.lora_dropout[NAME] = dropout
            dropouts.append(dropout)
    if dropouts:
        set_keys_before_forward(model, dropouts)


def _inject_lora(model: nn.Module, method: Method, choices: Mapping[str, Choice]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    for part_name, part in model.named_children():
        chosen = {name.removeprefix(f"{part_name}."): choice for name, choice in choices.items()
                  if name.startswith(f"{part_name}.")}
        if not chosen:
            continue
        default = selection.Choice(method.rank, method.scale_alpha)
        other = {f"^{re.escape(name)}": choice for name, choice in chosen.items() if choice != default}
        config = LoraConfig(r=method.rank, lora_alpha=method.scale_alpha,  # type: ignore[arg-type]
                            use_dora=method.kind is MethodKind.dora, use_rslora=method.use_rslora,
                            rank_pattern={name: choice.rank for name, choice in other.items()},
                            alpha_pattern={name: choice.alpha for name, choice in other.items()},
                            target_modules=_exact_targets(part, list(chosen)))
        with without_bitsandbytes():  # does nothing for nf4 weights, which have imported it
            inject_adapter_in_model(config, part, adapter_name=NAME)


def _exact_targets(part: nn.Module, names: list[str]) -> list[str] | str:
    """Return names of layers as peft's target_modules, which matches exactly these layers.

    peft compares a list of names with the ends of all names. If this would match a layer that is not in the list, the
    result is a regular expression.
    """
    wanted, endings = set(names), tuple(f".{name}" for name in names)
    if not any(name not in wanted and name.endswith(endings) for name, _ in part.named_modules()):
        return names
    return "|".join(map(re.escape, names))


def _inject_lycoris(model: nn.Module, method: Method, choices: Mapping[str, Choice], seed: int) -> None:
    from dreambooth.models.adapters.layers import set_start_values, wrap

    for name, choice in choices.items():
        parent, _, child = name.rpartition(".")
        layer = wrap(model.get_submodule(name), NAME, method, choice)
        set_start_values(layer, seed, name)
        setattr(model.get_submodule(parent), child, layer)


def lora_like(weights: Mapping[str, Adapter], method: Method, model: nn.Module, file_name: Callable[[str], str]
              ) -> Method:
    """Return the settings of a LoRA with the layers and ranks of a file.

    Args:
        weights, file_name: see `load_adapter_weights`.
        method: the settings of the adapter that is in the file as a LoRA: those of its layers stay.
        model: the TrainedModel, without adapters.
    """
    ranks = {name: low.down.shape[0] for name, _ in model.named_modules()
             if isinstance(low := weights.get(file_name(name)), LowRank)}
    return method.copy_with(name="lora", kind=MethodKind.lora, rank_pattern=ranks, alpha=None, alpha_pattern=None,
                            use_rslora=False)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the module of every layer of `model` that has an adapter."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lycoris_utils import LycorisLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer | LycorisLayer):
            yield name, module


def describe(model: nn.Module, method: Method) -> list[str]:
    """Return lines that say how many layers of a TrainedModel have an adapter, with how many weights."""
    trained = {name: sum(weight.numel() for weight in layer.parameters() if weight.requires_grad)
               for name, layer in layers(model)}
    return list(selection.describe([name for name, _ in model.named_children()], method, trained))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Disable all adapters of `model` inside the context, so that `model` computes as the base model does."""
    with bypassed([layer for _, layer in layers(model)]):
        yield


@contextmanager
def bypassed(adapters: Sequence[Any]) -> Iterator[None]:
    """Disable adapters for forward passes without gradients.

    peft's `enable_adapters` also changes `requires_grad`. Afterwards, adapters of layers that are not trained
    (Family.untrainable) would require gradients, and would be saved in checkpoints.

    Args:
        adapters: layers with an adapter, from `layers`.
    """
    try:
        for layer in adapters:
            layer._disable_adapters = True  # what peft's property `disable_adapters` returns
        yield
    finally:
        for layer in adapters:
            layer._disable_adapters = False


@torch.no_grad()
def adapter_weights(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters as a dictionary from module name to adapter, in fp32 on the CPU. They contain the scale."""
    return {name: _adapter(layer) for name, layer in layers(model)}


def _adapter(layer: Any) -> Adapter:
    if hasattr(layer, "lora_A"):
        return LowRank(
            _exact(layer.lora_A[NAME].weight), _exact(layer.lora_B[NAME].weight) * layer.scaling[NAME],
            _exact(layer.lora_magnitude_vector[NAME].weight).flatten() if NAME in layer.lora_magnitude_vector else None)
    from dreambooth.models.adapters.layers import read_weights

    return read_weights(layer)


@torch.no_grad()
def base_scales(model: nn.Module, weights: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Return LowRank.base_scale of each layer of `model` that has a DoRA, by module name.

    The weight of the base model is the one that the run trains with. If the run stores the base model in half precision
    or in 4 bits, this weight is rounded.

    Args:
        weights: the adapters of `model`, as `adapter_weights` returns them.
    """
    return {name: low.base_scale(_base_weight(layer)) for name, layer in layers(model)
            if isinstance(low := weights[name], LowRank) and low.magnitude is not None}


@torch.no_grad()
def load_adapter_weights(model: nn.Module, weights: Mapping[str, Adapter],
                         file_name: Callable[[str], str] = str) -> None:
    """Load weights into the adapters of `model`.

    Args:
        weights: a dictionary from module name in LoRA files to adapter.
        file_name: function that converts a module's name in `model` to its name in LoRA files (Family.published_name).

    Raises:
        ValueError: the weights belong to other layers, or have another rank or kind.
    """
    adapters = {file_name(name): layer for name, layer in layers(model)}
    if adapters.keys() != weights.keys():
        raise ValueError("it was trained on other layers")
    for name, layer in adapters.items():
        pairs = _pairs(layer, weights[name])
        if any(weight.shape != value.shape for weight, value in pairs):
            raise ValueError("it has another rank")
        for weight, value in pairs:
            weight.copy_(value)


def _pairs(layer: Any, adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
    """Return each weight of the adapter in `layer`, and the tensor of `adapter` to copy into it, without the scale."""
    if not isinstance(adapter, LowRank):
        from dreambooth.models.adapters.layers import weight_pairs

        return weight_pairs(layer, adapter)
    if not hasattr(layer, "lora_A"):
        raise ValueError("it is of another kind")
    pairs = [(layer.lora_A[NAME].weight, adapter.down), (layer.lora_B[NAME].weight, adapter.up / layer.scaling[NAME])]
    if adapter.magnitude is not None:
        length = layer.lora_magnitude_vector[NAME].weight
        pairs.append((length, adapter.magnitude.view(length.shape)))
    return pairs


@torch.no_grad()
def merge(model: nn.Module, weights: Mapping[str, Adapter]) -> None:
    """Merge adapters into the weights of `model`, as LowRank.merged does. `model` must not contain adapters.

    Args:
        weights: a dictionary from module name in `model` to adapter.
    """
    for name, low in weights.items():
        layer: Any = model.get_submodule(name)
        layer.weight.copy_(low.merged(layer.weight))


def _make_exact(layer: Any) -> None:
    """Convert the adapter of a layer to fp32, including DoRA's magnitudes.

    peft creates adapters in the precision of the base model.
    """
    for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
        factor.weight = nn.Parameter(factor.weight.detach().float())
    if NAME in layer.lora_magnitude_vector:
        lengths = layer.lora_magnitude_vector[NAME]
        lengths.get_weight_norm = partial(_weight_norm, lengths)
        weight = _base_weight(layer)
        lengths.weight = nn.Parameter(lengths.get_weight_norm(weight, torch.zeros_like(weight), 1.0))


def _base_weight(layer: Any) -> Tensor:
    """Return the weight of the base model in a layer with an adapter, in fp32."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach().float()
    return weight


def _weight_norm(lengths: Any, weight: Tensor, lora_weight: Tensor, scaling: float, **_: Any) -> Tensor:
    """Return the norm of each row of V = W + s B A, the layer's weight with its adapter, computed in fp32.

    For a convolution, peft would compute the norms in the precision of the base model.
    """
    norms: Tensor = type(lengths).get_weight_norm(lengths, weight.float(), lora_weight.float(), scaling)
    return norms


def _draw(weight: nn.Parameter, seed: int, name: str) -> None:
    """Set `weight` to uniform random numbers in [-b, b], b = 1 / sqrt(inputs), as PyTorch initialises a linear layer.

    The numbers are the same on every device.
    """
    bound = 1 / math.sqrt(weight[0].numel())
    numbers = rng.stream(seed, name, "adapter").uniform(-bound, bound, tuple(weight.shape))
    with torch.no_grad():
        weight.copy_(torch.from_numpy(numbers))


def _exact(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu()
