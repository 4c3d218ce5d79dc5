"""Which LoRAs a picture is drawn with: found, checked and put into a pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dreambooth.errors import UserError
from dreambooth.serialization.lora_files import DIFFUSERS


@dataclass(frozen=True)
class Lora:
    """A file, what it is called, and how much of it is used: 1 as it was trained, 0 not at all."""

    path: Path
    name: str
    scale: float


def found(sources: Sequence[str], scales: Sequence[float]) -> list[Lora]:
    """The LoRAs of runs, folders or files.

    Raises:
        UserError: there is none, or diffusers would read it without a part of it.
    """
    return [_found(Path(source), scale) for source, scale in zip(sources, scales, strict=True)]


def apply(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Put them into the pipeline, beside its weights.

    Raises:
        UserError: one does not belong to this base.
    """
    names = [f"lora{number}" for number in range(len(loras))]  # a name of ours: peft takes no dots
    for name, lora in zip(names, loras, strict=True):
        try:
            pipeline.load_lora_weights(lora.path.parent, weight_name=lora.path.name, adapter_name=name,
                                       local_files_only=True)
            if not any(name in known for known in pipeline.get_list_adapters().values()):  # diffusers only warns
                raise ValueError("it has nothing for a layer of it")
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
            raise UserError(f"the LoRA {lora.path} does not fit this base ({why}): type base=DIR, the model that "
                            "it was trained on") from error
    if loras:
        pipeline.set_adapters(names, [lora.scale for lora in loras])


def _found(source: Path, scale: float) -> Lora:
    files = [source] if source.is_file() else [source / "model" / DIFFUSERS, source / DIFFUSERS]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise UserError(f"there is no LoRA in {source}: type lora=FILE, a .safetensors file, or lora=runs/NAME of a "
                        "run with method=lora or dora")
    try:
        with safe_open(path, "pt") as file:
            if any(key.endswith(".dora_scale") for key in file.keys()):  # noqa: SIM118  it is no dict
                raise UserError(f"{path} is a DoRA in kohya's layout, of which diffusers would leave a part out: type "
                                f"lora=DIR, the folder with its {DIFFUSERS}")
            if any(key.startswith("transformer.") for key in file.keys()):  # noqa: SIM118
                raise UserError(f"{path} is a LoRA of a model without a UNet, such as Flux or SD3: type lora=FILE, one "
                                "of Stable Diffusion 1.x, 2.x or SDXL")
    except (SafetensorError, OSError) as error:
        raise UserError(f"the LoRA {path} cannot be read ({error}): type lora=FILE, a .safetensors file") from error
    return Lora(path, _name(path), scale)


def _name(path: Path) -> str:
    """What a web UI would call it: the file's name; of a run, that of the file made for web UIs."""
    made = sorted((path.parent / "webui").glob("*.safetensors")) if path.name == DIFFUSERS else []
    return (made[0] if made else path).stem
