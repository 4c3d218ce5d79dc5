"""The contents of a run's folder `model/`: a whole pipeline, or an adapter's files. Imports no torch.

With an adapter and without method.merge, the folder contains an adapter alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.storage import manifest
from dreambooth.utils import atomic_files, quoting

DESCRIPTIONS = ("README.md", "contact_sheet.png")  # files that a user may change without damage to the model
CONVERTED = "converted"  # folder in run_root of the single files that were converted to diffusers folders
INDEX = "model_index.json"  # exists if the folder holds a whole pipeline
# The adapter in diffusers' layout. ComfyUI would silently leave out half of this file, so its name says whom it is for.
ADAPTER = "lora_for_diffusers.safetensors"
EMBEDDINGS = "embeddings"  # folder of the embeddings of new tokens, beside the adapter
OLD_ADAPTER = "pytorch_lora_weights.safetensors"  # the name of this file in earlier runs
ADAPTER_FILES = (ADAPTER, EMBEDDINGS)


def adapter_only(kind: str, merge: bool) -> bool:
    """Return whether a run with these values of method.kind and method.merge exports an adapter and no pipeline."""
    return kind != "full" and not merge


def find_adapter(folder: Path) -> Path | None:
    """Return the path of the adapter in diffusers' layout in `folder`, or None if `folder` contains none."""
    return next((path for name in (ADAPTER, OLD_ADAPTER) if (path := folder / name).is_file()), None)


def locate_adapter(path: Path) -> Path | None:
    """Return the adapter file that `path` names: a file, or a run folder or other folder that contains an adapter."""
    return path if path.is_file() else find_adapter(path / "model") or find_adapter(path)


def is_exported(folder: Path, kind: str, merge: bool) -> bool:
    """Return whether `folder` contains the exported result of a run with these values of method.kind and method.merge.

    Only the sizes of the files are compared with the manifest; `check_intact` also compares their contents. Earlier
    versions of this package wrote no manifest. Therefore this function also checks that each part with a config.json
    has weights.
    """
    exists = find_adapter(folder) is not None if adapter_only(kind, merge) else (folder / INDEX).is_file()
    if not exists or find_damage(folder, contents=False):
        return False
    parts = [folder / name for name in atomic_files.read_object(folder / INDEX) or {}]
    return all(any(part.glob("*.safetensors")) for part in parts if (part / "config.json").is_file())


def find_damage(folder: Path, contents: bool = True) -> str | None:
    """Return a description of the damage to an exported model, or None if there is no damage or no manifest.

    Args:
        contents: whether to read and hash the files; False: compare only their sizes.
    """
    return manifest.find_damage(folder, contents, lambda name: name not in DESCRIPTIONS)


def check_intact(folder: Path) -> None:
    """Compare the files of an exported model with its manifest, before the model is used.

    Raises:
        UserError: a file has changed since the export.
    """
    if damage := find_damage(folder):
        raise UserError(f"the model in {folder} is damaged ({damage}): repeat the command of its run, which writes the "
                        f"model again, or, if you changed the model yourself, type rm "
                        f"{quoting.shell_word(str(folder / manifest.NAME))}")


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Return the settings in the run.json of a run folder; {} if the file is missing or damaged.

    The paths of converted single files are those in the run's present run_root, see `find_converted`.
    """
    settings = (atomic_files.read_object(run_dir / "run.json") or {}).get("settings")
    if not isinstance(settings, dict):
        return {}
    return {key: find_converted(value, run_dir) if key in ("model.source", "model.vae") else value
            for key, value in settings.items()}


def setting(settings: Mapping[str, Any], key: str) -> str | None:
    """Return the setting `key` of a run, such as model.vae, from the settings in its run.json.

    Return None if the setting is missing, or if it is the string 'null', which stands for None.
    """
    text = settings.get(key)
    return None if text in (None, "null") else str(text)


def read_run_name(folder: Path) -> str:
    """Return the name of the run whose model was registered in MLflow, from the run.json of the registered folder.

    Return "" for other folders: the folder of a run has the run's name.
    """
    return str((atomic_files.read_object(folder / "run.json") or {}).get("run") or "")


def find_converted(path: Any, run_dir: Path) -> Any:
    """Return where a converted single file is now, if run_root was moved or copied since the run; else `path`.

    Args:
        path: the value of model.source or model.vae of the run. A converted single file is RUN_ROOT/converted/NAME.
    """
    if not isinstance(path, str) or Path(path).parent.name != CONVERTED or not Path(path).is_absolute():
        return path
    moved = run_dir.absolute().parent / CONVERTED / Path(path).name
    return str(moved) if moved.is_dir() else path
