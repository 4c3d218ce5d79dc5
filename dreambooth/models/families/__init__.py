"""Model families: one file per family (sd1.py, sd2.py, sd35.py, sdxl.py, z_image.py, flux2_klein.py, qwen_image.py).

family.py is their interface. The other files contain what several families share. The functions below find the family
of a model. Files of this folder import from each other, from the folders that models/ may import, and from three files
of models/: noise_schedule.py, flow_matching.py and gradient_checkpointing.py. Importing this folder does not import
torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.models.families import flux2_klein, qwen_image, sd1, sd2, sd35, sdxl, z_image
from dreambooth.models.families.family import Family, Layout

FAMILIES: tuple[Family, ...] = (sd1.FAMILY, sd2.FAMILY, sdxl.FAMILY, z_image.FAMILY, flux2_klein.FAMILY,
                                  sd35.FAMILY, qwen_image.FAMILY)


def titles() -> str:
    """Return the titles of all families for use in messages, as 'A, B or C'."""
    *others, last = (family.title for family in FAMILIES)
    return f"{', '.join(others)} or {last}"


def of_architecture(name: str) -> Family | None:
    """Return the family whose configurations are in assets/architectures/`name`, or None if no family has them."""
    return next((family for family in FAMILIES if family.architecture == name), None)


def of_layout(layout: Layout) -> Family | None:
    """Return the family of the diffusers model with this layout, or None if no supported family fits."""
    return next((family for family in FAMILIES if family.matches(layout)), None)


def of_folder(folder: Path) -> Family | None:
    """Return the family of the model in a diffusers folder, or None if no supported family fits.

    Only the config.json files of the parts are read.
    """
    parts = [path.parent.name for path in folder.glob("*/config.json")]
    return of_layout(Layout(parts, lambda part: _read(folder / part / "config.json")))


def of_source(source: str | Path, **options: Any) -> tuple[Family, Layout]:
    """Return the family and the layout of a diffusers folder or hub id, according to its model_index.json.

    Args:
        options: revision and local_files_only, as in from_pretrained.

    Raises:
        OSError, ValueError: there is no model_index.json, or the model belongs to no supported family.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from transformers import PreTrainedConfig

    index: Mapping[str, Any] = DiffusionPipeline.load_config(source, **options)  # type: ignore[assignment]
    parts = [name for name, value in index.items() if isinstance(value, list | tuple) and value[0] is not None]

    def configuration(part: str) -> Mapping[str, Any]:
        try:
            found: dict[str, Any] = PreTrainedConfig.get_config_dict(source, subfolder=part, **options)[0]
        except (OSError, ValueError):
            return {}  # loading the part will report what is missing
        return found

    layout = Layout(parts, configuration)
    if (family := of_layout(layout)) is None:
        raise ValueError(f"it is no model of {titles()}")
    return family, layout


def of_pipeline(pipeline: Any) -> Family:
    """Return the family of the model in a diffusers pipeline."""
    modules = {name: part for name, part in pipeline.components.items() if hasattr(part, "config")}

    def configuration(part: str) -> Mapping[str, Any]:
        config = modules[part].config if part in modules else {}
        return config if isinstance(config, Mapping) else config.to_dict()

    family = of_layout(Layout(list(modules), configuration))
    assert family is not None, f"{type(pipeline).__name__} belongs to no family"
    return family


def of_keys(names: frozenset[str]) -> Family | None:
    """Return the family of the model in a single file with these keys, or None if no supported family fits."""
    return next((family for family in FAMILIES if family.single_file.matches(names)), None)


def canonical_key(name: str) -> str:
    """Return the current form of a key in a single file. Older tools wrote some keys differently."""
    for family in FAMILIES:
        name = family.single_file.canonical_key(name)
    return name


def architecture_of(hub_id: str) -> str | None:
    """Return the folder name in assets/architectures of the published model `hub_id`, or None if it is unknown."""
    return next((family.architecture for family in FAMILIES if hub_id in family.hub_ids), None)


def renamed_hub_id(hub_id: str) -> str | None:
    """Return the current hub id of the same model if `hub_id` was withdrawn from the hub, else None."""
    return next((family.renamed_hub_ids[hub_id] for family in FAMILIES if hub_id in family.renamed_hub_ids), None)


def import_common_classes() -> None:
    """Import the diffusers classes that every run needs, so that no import runs while a progress bar is shown."""
    _ = FAMILIES[0].denoiser.type, FAMILIES[0].pipeline_type


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} contains no JSON object")
    return found
