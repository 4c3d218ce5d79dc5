"""What a run's folder `model/` holds: a whole pipeline, or an adapter's files. Imports no torch.

It is an adapter's with method=lora or dora and without method.merge.
"""

from pathlib import Path

INDEX = "model_index.json"  # of a whole pipeline
ADAPTER = "pytorch_lora_weights.safetensors"  # in diffusers' layout; load_lora_weights(folder) looks for this name


def adapter_only(kind: str, merge: bool) -> bool:
    """Whether a run of this method.kind and method.merge exports an adapter and no pipeline."""
    return kind != "full" and not merge


def is_exported(folder: Path, kind: str, merge: bool) -> bool:
    """Return whether the folder holds the exported result of a run with this `kind` and `merge`.

    An export appears all at once, so the presence of one of its files is enough.
    """
    return (folder / (ADAPTER if adapter_only(kind, merge) else INDEX)).is_file()
