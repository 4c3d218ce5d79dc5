"""Reads and writes the files of an adapter, in diffusers' layout and in kohya's layout.

| | diffusers | kohya (AUTOMATIC1111, ComfyUI, Forge) |
|---|---|---|
| UNet | `unet.mid_block.attentions.0.proj_in` | `lora_unet_mid_block_attentions_0_proj_in` |
| text encoder | `text_encoder.text_model.encoder...` | `lora_te_text_model_encoder...` |
| down, up | `.lora_A.weight`, `.lora_B.weight` | `.lora_down.weight`, `.lora_up.weight` |
| DoRA | `.lora_magnitude_vector.weight` (out,), (1, out, 1, 1) | `.dora_scale` (out, 1), (out, 1, 1, 1) |
| alpha | none: `lora_B` contains the scale | `.alpha` = rank: `lora_up` contains the scale |
| LoKr | `.lokr_w1`, `.lokr_w2`, or with `_a` and `_b` the factors of each | as diffusers, and `.alpha` |
| LoHa | `.lora_A.weight`, `.lora_B.weight`, of rank r * r | `.hada_w1_a`, `.hada_w1_b`, `.hada_w2_a`, `.hada_w2_b` |

Because a tensor contains the scale, every program computes it alike: alpha / rank is 1, also with method.use_rslora,
where LyCORIS would adjust alpha. LoKr and LoHa have the keys of LyCORIS in kohya's layout; it is read by LyCORIS,
ComfyUI, Forge and AUTOMATIC1111. There, the two factors of a matrix of a convolution are multiplied. diffusers has no
LoHa, so its file contains the LoRA that a LoHa equals.

The row of DoRA gives two shapes per layout: the first for linear layers, the second for convolutions. The family gives
the names of modules in both layouts (Family.published_name, Family.kohya_entries); the table shows the usual names.

In families with a transformer, the kohya file describes the model as ComfyUI loads it (Entry.form). There, query, key
and value of attention are one layer. The adapters of these three layers become one adapter without an approximation:
its `lora_down` contains those of the three layers one below the other, and its `lora_up` is the block-diagonal matrix
of theirs. Its rank is three times method.rank. musubi-tuner writes such layers for ComfyUI in the same way. Where the
rows of a layer are swapped, the rows of `lora_up` and `dora_scale` are swapped, too. The same holds for both matrix
products of a LoHa. The adapters of three layers are no Kronecker product, so that layers with a LoKr stay separate, as
do layers of which not all three have an adapter. ComfyUI reads them under LyCORIS' names (Family.kohya_entries).

DoRA replaces the weight W of a layer by W' = m V / |V|, where V is W with the low-rank product added, and m and |V|
have one value per row (models/lora.py). The file in diffusers' layout contains m. ComfyUI and Forge compute
V dora_scale / |W| from a `dora_scale` with one value per row. The file in kohya's layout therefore contains
m |W| / |V| as `dora_scale`, which gives W' in both programs. AUTOMATIC1111 divides by norms of columns, kohya's trainer
reads no DoRA, and diffusers 0.42 ignores `dora_scale`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.models.adapters.factors import LoHa, LoKr, pairwise_products
from dreambooth.models.components import Components
from dreambooth.models.families.family import Family
from dreambooth.models.families.file_format import Entry, Form
from dreambooth.models.lora import Adapter, LowRank
from dreambooth.serialization.export_layout import ADAPTER, find_converted
from dreambooth.serialization.single_file import to_file

# Prefix of the metadata keys that hold settings of the base model: revision, variant, vae and zero_terminal_snr.
BASE_KEY_PREFIX = "base_model_"
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"
LEFT, RIGHT = ".lokr_w1", ".lokr_w2"  # with _a and _b added: the two matrices whose product this is


def diffusers_layout(weights: Mapping[str, Adapter], family: Family) -> dict[str, Tensor]:
    """Return the tensors of an adapter file in diffusers' layout, by key.

    Args:
        weights: the adapter of each layer, by module name in the TrainedModel.
    """
    tensors: dict[str, Tensor] = {}
    for module, adapter in weights.items():
        name = family.published_name(module)
        if isinstance(adapter, LoKr):
            tensors |= _named(name + LEFT, adapter.left) | _named(name + RIGHT, adapter.right)
            continue
        low = _equal_lora(adapter) if isinstance(adapter, LoHa) else adapter
        tensors |= {name + DOWN: low.down, name + UP: low.up}
        if low.magnitude is not None:
            shape = (-1,) if low.down.dim() == 2 else (1, -1, 1, 1)
            tensors[name + MAGNITUDE] = low.magnitude.view(shape)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _named(key: str, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the one or two matrices of a factor of a LoKr by their keys."""
    return {key: matrices[0]} if len(matrices) == 1 else {f"{key}_a": matrices[0], f"{key}_b": matrices[1]}


def _equal_lora(adapter: LoHa) -> LowRank:
    """Return the LoRA that equals a LoHa. Its rank is r * r, or the smaller side of the weight if this is less."""
    down, up = pairwise_products(adapter.first, adapter.second)
    (rows, rank), columns = up.shape, down.shape[1]
    if rank >= min(rows, columns):
        change = adapter.delta.flatten(1)
        down, up = (change, torch.eye(rows)) if rows <= columns else (torch.eye(columns), change)
    if not adapter.kernel:
        return LowRank(down, up)
    return LowRank(down.reshape(len(down), -1, *adapter.kernel), up.reshape(*up.shape, 1, 1))


def kohya_layout(weights: Mapping[str, Adapter], base_scales: Mapping[str, Tensor], parts: Components
                 ) -> dict[str, Tensor]:
    """Return the tensors of an adapter file in kohya's layout, by key.

    Args:
        weights: the adapter of each layer, by module name in the TrainedModel.
        base_scales: LowRank.base_scale of each layer that has a DoRA, shape (out,), by module name.
        parts: the base model.
    """
    tensors: dict[str, Tensor] = {}
    separate = any(isinstance(adapter, LoKr) for adapter in weights.values())
    for entry in parts.family.kohya_entries(weights, parts.denoiser.config, separate):
        adapters = [weights[module] for module in entry.names]
        for suffix, tensor in _file_adapter(entry, adapters).items():
            tensors[f"{entry.key}.{suffix}"] = tensor
        if entry.names[0] in base_scales:
            scale = to_file(entry, [base_scales[module] for module in entry.names])
            down = tensors[f"{entry.key}.lora_down.weight"]
            tensors[f"{entry.key}.dora_scale"] = scale.view(-1, *[1] * (down.dim() - 1))
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _file_adapter(entry: Entry, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the tensors of the layer that `entry` describes, from the adapters of the modules `entry.names`."""
    first = adapters[0]
    if isinstance(first, LoKr):
        left, right = first.left, first.right
        if any(side > 1 for side in first.kernel):  # LyCORIS misreads the sizes of a convolution from two factors
            left, right = ((matrix,) for matrix in first.matrices)
        rank = next((pair[1].shape[0] for pair in (right, left) if len(pair) == 2), 1)
        return _named("lokr_w1", left) | _named("lokr_w2", right) | {"alpha": torch.tensor(float(rank))}
    if isinstance(first, LoHa):
        halves = [[low.first for low in adapters if isinstance(low, LoHa)],
                  [low.second for low in adapters if isinstance(low, LoHa)]]
        (a1, b1), (a2, b2) = (_joined(entry, pairs) for pairs in halves)
        return {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2,
                "alpha": torch.tensor(float(b1.shape[0]))}
    up, down = _joined(entry, [(low.up, low.down) for low in adapters if isinstance(low, LowRank)])
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(down.shape[0]))}


def _joined(entry: Entry, products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the two matrices whose product is that of a layer of the file.

    Args:
        products: for each of the modules `entry.names`, the two matrices whose product changes its weight.
    """
    if entry.form is Form.stacked:
        up: Tensor = torch.block_diag(*[up for up, _ in products])  # type: ignore[no-untyped-call]
        return up, torch.cat([down for _, down in products])
    [(up, down)] = products
    return to_file(entry, [up]), down


def write(folder: Path, weights: Mapping[str, Adapter], base_scales: Mapping[str, Tensor], parts: Components,
          title: str, metadata: Mapping[str, str]) -> None:
    """Write an adapter in both layouts.

    The files are FOLDER/lora_for_diffusers.safetensors (diffusers) and FOLDER/webui/TITLE.safetensors (kohya). The
    kohya file also has the metadata by which web UIs sort LoRA files.

    Args:
        weights: the adapter of each layer, by module name in the TrainedModel.
        base_scales: LowRank.base_scale of each layer that has a DoRA, shape (out,), by module name.
        parts: the base model.
        title: name of the kohya file; users of web UIs type it in prompts.
        metadata: metadata for both files.
    """
    (folder / "webui").mkdir(exist_ok=True)
    kohya = parts.family.kohya_metadata(parts.scheduler_config.get("prediction_type", "epsilon"))
    modelspec = {key: value for key, value in kohya.items() if key.startswith("modelspec.")}
    common = {"format": "pt"} | dict(metadata)
    save_file(diffusers_layout(weights, parts.family), folder / ADAPTER,
              modelspec | {"modelspec.implementation": "diffusers"} | common)
    save_file(kohya_layout(weights, base_scales, parts), folder / "webui" / f"{title}.safetensors",
              kohya | common | _network_metadata(weights) | {"ss_output_name": title})


def _network_metadata(weights: Mapping[str, Adapter]) -> dict[str, str]:
    """Return the metadata by which kohya's trainer describes the kind, rank and alpha of an adapter."""
    first = next(iter(weights.values()))
    if isinstance(first, LowRank):
        ranks = {low.down.shape[0] for low in weights.values() if isinstance(low, LowRank)}
        module = {"ss_network_module": "networks.lora"}
    else:
        ranks = {_rank(adapter) for adapter in weights.values() if not isinstance(adapter, LowRank)}
        module = {"ss_network_module": "lycoris.kohya",
                  "ss_network_args": json.dumps({"algo": "lokr" if isinstance(first, LoKr) else "loha"})}
    if len(ranks) > 1:
        return module | {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    [rank] = ranks
    return module | {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}


def _rank(adapter: LoKr | LoHa) -> int:
    return int((adapter.second if isinstance(adapter, LoHa) else adapter.right)[-1].shape[0])


def is_lokr(file: Path) -> bool:
    """Return whether an adapter file contains a LoKr, not a LoRA, from its keys alone."""
    with safe_open(file, "pt") as opened:
        return any(".lokr_" in key for key in opened.keys())  # noqa: SIM118  it is no dictionary


def read_base_model(file: Path) -> str:
    """Return the hub id or folder of the base model that an adapter was trained on, from the adapter's metadata.

    Args:
        file: RUN/model/NAME.
    """
    with safe_open(file, "pt") as opened:
        return str(find_converted((opened.metadata() or {})["base_model"], file.absolute().parents[1]))


def read_base_settings(file: Path) -> dict[str, str]:
    """Return the settings of the base model in an adapter's metadata: revision, variant, vae, zero_terminal_snr.

    Settings that were not set are left out. A setting that is True is "True", as in run.json.
    """
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    return {key.removeprefix(BASE_KEY_PREFIX): "True" if value == "true" else value
            for key, value in metadata.items() if key.startswith(BASE_KEY_PREFIX)}


def read(file: Path) -> dict[str, Adapter]:
    """Read an adapter file in diffusers' layout. A LoHa is read as the LoRA that it equals.

    Returns:
        The adapter of each layer, by the module name that the file uses.

    Raises:
        UserError: the file cannot be read, or lacks a tensor of the layout.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the LoRA {file} cannot be read ({error}): repeat the command of the run that made it"
                        ) from error
    names = [key.removesuffix(DOWN) for key in tensors if key.endswith(DOWN)]
    kroneckers = dict.fromkeys(key.rpartition(".lokr_")[0] for key in tensors if ".lokr_" in key)
    try:
        adapters: dict[str, Adapter] = {name: LowRank(
            tensors[name + DOWN], tensors[name + UP],
            tensors[name + MAGNITUDE].flatten() if name + MAGNITUDE in tensors else None) for name in names}
        return adapters | {name: LoKr(_factor(tensors, name + LEFT), right := _factor(tensors, name + RIGHT),
                                      tuple(right[0].shape[2:])) for name in kroneckers}
    except KeyError as error:
        raise UserError(f"the LoRA {file} lacks {error.args[0]}: repeat the command of the run that made it"
                        ) from error


def _factor(tensors: Mapping[str, Tensor], key: str) -> tuple[Tensor, ...]:
    return (tensors[key],) if key in tensors else (tensors[f"{key}_a"], tensors[f"{key}_b"])
