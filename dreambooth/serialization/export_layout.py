"""The contents of a run's folder `model/`: a whole pipeline, or an adapter's files. Imports no torch.

With method=lora or dora and without method.merge, the folder contains an adapter alone.
"""

from pathlib import Path

INDEX = "model_index.json"  # exists if the folder holds a whole pipeline
ADAPTER = "pytorch_lora_weights.safetensors"  # in diffusers' layout; load_lora_weights opens this name


def adapter_only(kind: str, merge: bool) -> bool:
    """Return whether a run with these values of method.kind and method.merge exports an adapter and no pipeline."""
    return kind != "full" and not merge


def is_exported(folder: Path, kind: str, merge: bool) -> bool:
    """Return whether `folder` contains the exported result of a run with these values of method.kind and method.merge.

    An export is atomic: if one of its files exists, all exist. This function therefore looks for one file only.
    """
    return (folder / (ADAPTER if adapter_only(kind, merge) else INDEX)).is_file()
