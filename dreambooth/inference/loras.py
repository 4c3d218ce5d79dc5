"""Finds and checks the LoRA files for generating pictures, and attaches them to a pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dreambooth.errors import UserError
from dreambooth.models import families
from dreambooth.serialization.export_layout import ADAPTER, OLD_ADAPTER, check_intact, find_adapter


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its name in the pictures' metadata, and its scale (1: as strong as in training; 0: no effect)."""

    path: Path
    name: str
    scale: float


def find_loras(sources: Sequence[str], scales: Sequence[float]) -> list[Lora]:
    """Find and check the LoRA file of each source.

    Args:
        sources: paths of run folders, other folders or files.
        scales: one scale per source.

    Raises:
        UserError: a source contains no LoRA; a LoRA file is damaged, cannot be read, or belongs to no supported model
            family; or diffusers would apply only a part of a LoRA.
    """
    return [_find_lora(Path(source), scale) for source, scale in zip(sources, scales, strict=True)]


def apply(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Attach LoRAs to the pipeline. The weights of the base model do not change.

    Raises:
        UserError: a LoRA does not fit this base model.
    """
    names = [f"lora{number}" for number in range(len(loras))]  # not the file names: peft allows no dots
    for name, lora in zip(names, loras, strict=True):
        try:
            pipeline.load_lora_weights(lora.path.parent, weight_name=lora.path.name, adapter_name=name,
                                       local_files_only=True)
            if not any(name in attached for attached in pipeline.get_list_adapters().values()):  # diffusers only warns
                raise ValueError("it has nothing for a layer of it")
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
            raise UserError(f"the LoRA {lora.path} does not fit this base ({reason}): type base=DIR, the model that "
                            "it was trained on") from error
    if loras:
        pipeline.set_adapters(names, [lora.scale for lora in loras])


def _find_lora(source: Path, scale: float) -> Lora:
    path = source if source.is_file() else find_adapter(source / "model") or find_adapter(source)
    if path is None:
        raise UserError(f"there is no LoRA in {source}: type lora=FILE, a .safetensors file, or lora=runs/NAME of a "
                        "run with method=lora or dora")
    if source.is_dir():
        check_intact(path.parent)
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"the LoRA {path} cannot be read ({error}): type lora=FILE, a .safetensors file") from error
    if any(key.endswith(".dora_scale") for key in keys):
        raise UserError(f"{path} is a DoRA in kohya's layout, of which diffusers would leave a part out: type "
                        f"lora=DIR, the folder with its {ADAPTER}")
    if any(family.diffusers_lacks.match(key) for family in families.FAMILIES for key in keys):
        raise UserError(f"{path} is a LoRA in ComfyUI's layout, of which diffusers would leave a part out: type "
                        f"lora=DIR, the folder with its {ADAPTER}")
    return Lora(path, _name(path), scale)


def _name(path: Path) -> str:
    """Return the name that a web UI would show for a LoRA: a file name without the suffix.

    A run exports its LoRA twice: as `path`, and as a file for web UIs in the folder `webui/` beside `path`. If the
    second file exists, its name is returned, otherwise the name of `path`.
    """
    webui_files = sorted((path.parent / "webui").glob("*.safetensors")) if path.name in (ADAPTER, OLD_ADAPTER) else []
    return (webui_files[0] if webui_files else path).stem
