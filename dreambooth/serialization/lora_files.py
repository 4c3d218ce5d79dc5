"""Reads and writes the files of a LoRA or DoRA adapter, in diffusers' layout and in kohya's layout.

| | diffusers | kohya (AUTOMATIC1111, ComfyUI, Forge) |
|---|---|---|
| UNet | `unet.mid_block.attentions.0.proj_in` | `lora_unet_mid_block_attentions_0_proj_in` |
| text encoder | `text_encoder.text_model.encoder...` | `lora_te_text_model_encoder...` |
| down, up | `.lora_A.weight`, `.lora_B.weight` | `.lora_down.weight`, `.lora_up.weight` |
| DoRA | `.lora_magnitude_vector.weight` (out,), (1, out, 1, 1) | `.dora_scale` (out, 1), (out, 1, 1, 1) |
| alpha | none: `lora_B` contains the scale | `.alpha` = rank: `lora_up` contains the scale |

The row of DoRA gives two shapes per layout: the first for linear layers, the second for convolutions. The family gives
the names of modules in both layouts (Family.published_name, Family.kohya_entries); the table shows the usual names.

In families with a transformer, the kohya file describes the model as ComfyUI loads it (Entry.form). There, query, key
and value of attention are one layer. The adapters of these three layers become one adapter without an approximation:
its `lora_down` contains those of the three layers one below the other, and its `lora_up` is the block-diagonal matrix
of theirs. Its rank is three times method.rank. musubi-tuner writes such layers for ComfyUI in the same way. Where the
rows of a layer are swapped, the rows of `lora_up` and `dora_scale` are swapped, too.

DoRA replaces the weight W of a layer by W' = m V / |V|, where V is W with the low-rank product added, and m and |V|
have one value per row (models/lora.py). The file in diffusers' layout contains m. ComfyUI and Forge compute
V dora_scale / |W| from a `dora_scale` with one value per row. The file in kohya's layout therefore contains
m |W| / |V| as `dora_scale`, which gives W' in both programs. AUTOMATIC1111 divides by norms of columns, kohya's trainer
reads no DoRA, and diffusers 0.42 ignores `dora_scale`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.models.components import Components
from dreambooth.models.families.family import Family
from dreambooth.models.families.file_format import Entry, Form
from dreambooth.models.lora import LowRank
from dreambooth.serialization.export_layout import ADAPTER, find_converted
from dreambooth.serialization.single_file import to_file

# Prefix of the metadata keys that hold settings of the base model: revision, variant, vae and zero_terminal_snr.
BASE_KEY_PREFIX = "base_model_"
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"


def diffusers_layout(weights: Mapping[str, LowRank], family: Family) -> dict[str, Tensor]:
    """Return the tensors of an adapter file in diffusers' layout, by key.

    Args:
        weights: the adapter of each layer, by module name in the TrainedModel.
    """
    tensors: dict[str, Tensor] = {}
    for module, low in weights.items():
        name = family.published_name(module)
        tensors |= {name + DOWN: low.down, name + UP: low.up}
        if low.magnitude is not None:
            shape = (-1,) if low.down.dim() == 2 else (1, -1, 1, 1)
            tensors[name + MAGNITUDE] = low.magnitude.view(shape)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def kohya_layout(weights: Mapping[str, LowRank], base_scales: Mapping[str, Tensor], parts: Components
                 ) -> dict[str, Tensor]:
    """Return the tensors of an adapter file in kohya's layout, by key.

    Args:
        weights: the adapter of each layer, by module name in the TrainedModel.
        base_scales: LowRank.base_scale of each layer that has a DoRA, shape (out,), by module name.
        parts: the base model.
    """
    tensors: dict[str, Tensor] = {}
    for entry in parts.family.kohya_entries(weights, parts.denoiser.config):
        down, up = _file_adapter(entry, [weights[module] for module in entry.names])
        tensors |= {f"{entry.key}.lora_down.weight": down, f"{entry.key}.lora_up.weight": up,
                    f"{entry.key}.alpha": torch.tensor(float(down.shape[0]))}
        if entry.names[0] in base_scales:
            scale = to_file(entry, [base_scales[module] for module in entry.names])
            tensors[f"{entry.key}.dora_scale"] = scale.view(-1, *[1] * (down.dim() - 1))
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _file_adapter(entry: Entry, adapters: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Return `down` and `up` of the layer that `entry` describes, from the adapters of the modules `entry.names`."""
    if entry.form is Form.stacked:
        up: Tensor = torch.block_diag(*[low.up for low in adapters])  # type: ignore[no-untyped-call]
        return torch.cat([low.down for low in adapters]), up
    [low] = adapters
    return low.down, to_file(entry, [low.up])


def write(folder: Path, weights: Mapping[str, LowRank], base_scales: Mapping[str, Tensor], parts: Components,
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
    rank = next(iter(weights.values())).down.shape[0]
    save_file(kohya_layout(weights, base_scales, parts), folder / "webui" / f"{title}.safetensors", kohya | common | {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)),
        "ss_output_name": title})


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


def read(file: Path) -> dict[str, LowRank]:
    """Read an adapter file in diffusers' layout.

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
    try:
        return {name: LowRank(
            tensors[name + DOWN], tensors[name + UP],
            tensors[name + MAGNITUDE].flatten() if name + MAGNITUDE in tensors else None) for name in names}
    except KeyError as error:
        raise UserError(f"the LoRA {file} lacks {error.args[0]}: repeat the command of the run that made it"
                        ) from error
