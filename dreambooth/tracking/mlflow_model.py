"""Makes an MLflow model of a run's exported model: the exported files, and the files that MLflow needs to open them.

| file | content |
|---|---|
| `MLmodel` | the flavours python_function and, for an adapter, diffusers; signature and metadata |
| `requirements.txt`, `conda.yaml`, `python_env.yaml` | what must be installed to draw |
| `input_example.json`, `serving_input_example.json` | a request |
| `dreambooth-code.zip` | the Python code of this package, so that the package need not be installed |
| `run.json` | the settings of the run that decide how pictures are drawn |
| `base/NAME`, `base_vae/NAME` | the base model of an adapter and its VAE, if they travel with the adapter |

The folder consists of symbolic links to the files of the run, so that no weights are copied before the upload.
"""

import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dreambooth
from dreambooth.errors import UserError
from dreambooth.serialization import export_layout
from dreambooth.utils import atomic_files
from dreambooth.utils.assets import ASSET_SCHEME, resolve_asset

LOADER_MODULE = "dreambooth.inference.mlflow_model"
MODEL_FILE = "MLmodel"
CODE = "dreambooth-code.zip"
# Packages that drawing imports, besides MLflow. The training extras, such as optuna or boto3, are not among them.
REQUIREMENTS = ("accelerate", "diffusers", "numpy", "pandas", "peft", "pillow", "rich", "safetensors", "torch",
                "transformers")
SETTINGS = ("name", "model.source", "model.revision", "model.variant", "model.vae", "model.zero_terminal_snr",
            "model.resolution", "sample.guidance_scale", "dataset.instance_prompt", "dataset.concepts", "method.kind")
# Fields of a request -> their types. In MLflow's signature, numbers have the type `any`, because MLflow refuses whole
# numbers in a column of type double, and missing values in one of type long. The metadata names their types.
COLUMNS = {"prompt": "string", "negative_prompt": "string", "seed": "integer", "num_inference_steps": "integer",
           "guidance_scale": "number", "size": "string", "width": "integer", "height": "integer",
           "num_images": "integer", "adapter_scale": "number"}


@contextmanager
def linked_model(run_dir: Path, model: Path, include_base: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that is the MLflow model of a run.

    Args:
        model: the exported model, a whole pipeline or an adapter.
        include_base: whether the base model of an adapter travels with it. A base model of this package always does.

    Raises:
        UserError: the base model is not on this machine, although it must travel with the adapter.
    """
    settings = export_layout.read_settings(run_dir)
    adapter = None if (model / export_layout.INDEX).is_file() else export_layout.find_adapter(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        _save_description(folder, run_dir.name, settings, adapter)
        _link(model, folder)
        if adapter:
            for key, place in (("model.source", "base"), ("model.vae", "base_vae")):
                if source := _base_folder(settings, key, include_base):
                    # Not source.name: the folder of a hub model is named by its revision, and pictures name the model.
                    _link(source, folder / place / Path(str(settings[key])).name.removeprefix(ASSET_SCHEME))
        kept = {key: settings[key] for key in SETTINGS if key in settings}
        subjects = json.loads(kept.get("dataset.concepts") or "[]")
        kept["dataset.concepts"] = json.dumps([{"instance_prompt": one["instance_prompt"]} for one in subjects])
        atomic_files.write_json(folder / "run.json", {
            "version": dreambooth.__version__, "run": run_dir.name, "settings": kept})
        yield folder


def find_reference(run_dir: Path, include_base: bool) -> str | None:
    """Return the base model of a run's adapter if it is a local path that does not travel with the adapter, else None.

    Such an adapter cannot be opened on another machine unless the user says where its base model is there.
    """
    from dreambooth.models import hub

    settings = export_layout.read_settings(run_dir)
    source = str(settings.get("model.source", ""))
    adapter_only = export_layout.adapter_only(str(settings.get("method.kind")), settings.get("method.merge") == "True")
    local = source and not source.startswith(ASSET_SCHEME) and hub.is_local(source)
    return source if adapter_only and local and not include_base else None


def _base_folder(settings: Mapping[str, Any], key: str, include_base: bool) -> Path | None:
    """Return the folder of a base model that travels with its adapter, or None if it does not."""
    source = export_layout.setting(settings, key)
    if not source or not (include_base or source.startswith(ASSET_SCHEME)):
        return None
    from dreambooth.models import hub

    path = Path(resolve_asset(source))
    try:
        if not hub.is_local(source) and not path.is_dir():
            path = _find_hub_files(settings, key)
    except (OSError, ValueError) as error:
        raise UserError(f"the base model {source} is not on this machine ({hub.first_line(error)}): type "
                        "include_base=false") from error
    if not path.is_dir():
        raise UserError(f"the base model {source} is not on this machine: type include_base=false")
    return path


def _find_hub_files(settings: Mapping[str, Any], key: str) -> Path:
    """Return the folder in the hub's cache of a run's base model, or of its VAE. OSError or ValueError: not there."""
    from dreambooth.models import hub

    source = str(settings[key])
    if key == "model.vae":  # no pipeline; and the run's revision and variant are those of the base model
        return hub.download(source, ["*.json", "*.safetensors*"], local_files_only=True)
    revision, variant = (export_layout.setting(settings, key) for key in ("model.revision", "model.variant"))
    return hub.download_pipeline(source, revision, variant, local_files_only=True)


def _link(source: Path, target: Path) -> None:
    """Make `target` a folder of symbolic links to all files of `source`."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_file() and not any(part.startswith(atomic_files.TEMPORARY_PREFIX) for part in place.parts):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())


def _save_description(folder: Path, run: str, settings: Mapping[str, Any], adapter: Path | None) -> None:
    """Write the files that MLflow needs into `folder`, which must not exist."""
    import mlflow.pyfunc
    import pandas
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType

    model = Model()
    any_type = AnyType()  # type: ignore[no-untyped-call]
    signature = ModelSignature(
        Schema([ColSpec(kind if kind == "string" else any_type, name, required=name == "prompt")
                for name, kind in COLUMNS.items()]),
        Schema([ColSpec("string", "image"), ColSpec(any_type, "metadata")]))
    example = {"prompt": str(settings.get("dataset.instance_prompt") or "a photo of a toy"), "seed": 0,
               "num_inference_steps": 25}
    metadata = {"dreambooth_version": dreambooth.__version__, "run": run, "holds": "adapter" if adapter else "model",
                "fields": COLUMNS,
                **{key: str(settings[key]) for key in ("model.source", "dataset.instance_prompt") if key in settings}}
    mlflow.pyfunc.save_model(
        str(folder), loader_module=LOADER_MODULE, mlflow_model=model, signature=signature, metadata=metadata,
        input_example=pandas.DataFrame([example]), pip_requirements=[
            f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        model_config={"base": None, "device": None})
    model.flavors["python_function"]["code"] = CODE
    if adapter and not _is_lokr(adapter):
        model.add_flavor("diffusers", **_diffusers_flavour(settings, adapter))
    model.save(str(folder / MODEL_FILE))
    write_code(folder / CODE)


def _is_lokr(adapter: Path) -> bool:
    from dreambooth.serialization.lora_files import is_lokr

    return is_lokr(adapter)


def _diffusers_flavour(settings: Mapping[str, Any], adapter: Path) -> dict[str, Any]:
    """Return the values that mlflow.diffusers.load_model reads."""
    import diffusers

    flavour = {"base_model": resolve_asset(str(settings.get("model.source", ""))), "adapter_type": "lora",
               "adapter_weights": ".", "weight_name": adapter.name, "diffusers_version": diffusers.__version__}
    revision = export_layout.setting(settings, "model.revision")
    return flavour if revision is None else flavour | {"base_model_revision": revision}


def write_code(path: Path) -> None:
    """Write a zip file with the Python code of this package, without its assets. Python can import from it."""
    package = Path(dreambooth.__file__).parent
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(package.rglob("*.py")):
            entry = zipfile.ZipInfo(file.relative_to(package.parent).as_posix())  # of 1980, so that zips are equal
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, file.read_bytes())
