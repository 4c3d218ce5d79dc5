"""An adapter's files: diffusers' layout and kohya's.

| | diffusers | kohya (AUTOMATIC1111, ComfyUI) |
|---|---|---|
| UNet | `unet.mid_block.attentions.0.proj_in` | `lora_unet_mid_block_attentions_0_proj_in` |
| SDXL's size and pooled text | `unet.add_embedding.linear_1`, `_2` | `lora_unet_label_emb_0_0`, `_0_2` |
| text encoder | `text_encoder.text_model.encoder...` | `lora_te_text_model_encoder...`; of two: `lora_te1_`, ... |
| down, up | `.lora_A.weight`, `.lora_B.weight` | `.lora_down.weight`, `.lora_up.weight` |
| row lengths (DoRA) | `.lora_magnitude_vector.weight` (out,), (1, out, 1, 1) | `.dora_scale` (out, 1), (out, 1, 1, 1) |
| alpha | - : `lora_B` holds the scale | `.alpha` = rank: `lora_up` holds the scale |

diffusers 0.42 leaves `dora_scale` out when it reads the kohya layout: a DoRA is read there in diffusers' own. It takes
both `lora_unet_add_embedding_linear_` for one `add.embedding.linear`, which is no layer: these are named as by kohya's
trainer.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.models.lora import LowRank, published
from dreambooth.serialization.export_layout import ADAPTER

OF_BASE = "base_model_"  # how keys of an adapter's metadata begin that say which of a base's files it belongs to
DIFFUSERS = ADAPTER  # the file in that layout
LABELS = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # of kohya's UNet
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"


def diffusers_layout(known: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Tensors by key."""
    found: dict[str, Tensor] = {}
    for name, low in known.items():
        name = published(name)
        found |= {name + DOWN: low.down, name + UP: low.up}
        if low.magnitude is not None:
            found[name + MAGNITUDE] = low.magnitude.view(-1) if low.down.dim() == 2 else low.magnitude.view(1, -1, 1, 1)
    return {key: tensor.contiguous() for key, tensor in found.items()}


def kohya_layout(known: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Tensors by key."""
    two = any(name.startswith("text_encoder_2.") for name in known)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_"}
    found: dict[str, Tensor] = {}
    for name, low in known.items():
        part, _, rest = published(name).partition(".")
        key = prefixes[part] + LABELS.get(rest, rest).replace(".", "_")
        found |= {f"{key}.lora_down.weight": low.down, f"{key}.lora_up.weight": low.up,
                  f"{key}.alpha": torch.tensor(float(low.down.shape[0]))}
        if low.magnitude is not None:
            found[f"{key}.dora_scale"] = low.magnitude.view(-1, *[1] * (low.down.dim() - 1))
    return {key: tensor.contiguous() for key, tensor in found.items()}


def write(folder: Path, known: Mapping[str, LowRank], title: str, facts: Mapping[str, str]) -> None:
    """`folder`/pytorch_lora_weights.safetensors and `folder`/webui/`title`.safetensors, whose name is what a user
    of a web UI types.

    Args:
        facts: metadata of both files, texts.
    """
    (folder / "webui").mkdir(exist_ok=True)
    plain = {"format": "pt"} | dict(facts)
    save_file(diffusers_layout(known), folder / DIFFUSERS, plain)
    rank = next(iter(known.values())).down.shape[0]
    save_file(kohya_layout(known), folder / "webui" / f"{title}.safetensors", plain | {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)),
        "ss_output_name": title})


def base_of(file: Path) -> str:
    """The base of an adapter that a run has written."""
    with safe_open(file, "pt") as opened:
        return str((opened.metadata() or {})["base_model"])


def read(file: Path) -> dict[str, LowRank]:
    """What a file in diffusers' layout holds, by published module name.

    Raises:
        UserError: it is not such a file.
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
