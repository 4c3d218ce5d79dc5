"""What a run's `model/` is: a whole pipeline, or (method=lora, dora without merge) an adapter's files. No torch."""

from pathlib import Path

WHOLE = "model_index.json"
ADAPTER = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights(folder) looks for


def adapter_only(kind: str, merge: bool) -> bool:
    """Whether a run of this method.kind and method.merge exports an adapter and no pipeline."""
    return kind != "full" and not merge


def whole(folder: Path, kind: str, merge: bool) -> bool:
    """Whether the folder holds the model that was asked for: it appears all at once, so one file tells."""
    return (folder / (ADAPTER if adapter_only(kind, merge) else WHOLE)).is_file()
