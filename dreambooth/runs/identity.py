"""A run's identity: a hash of everything that changes its result, which is part of its folder's name. Imports no torch.

The hash must stay the same for a run that was started with an earlier version: otherwise its folder would not be found
and it would not be resumed. Config keys that were added later are therefore left out of the hash while they have the
value that changes nothing (LATER_KEYS, NEUTRAL_VALUES and the pops in `identity`). Do not remove or reorder them.
"""

import json
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dreambooth.config import eval_prompts
from dreambooth.config.dataset import ALPHA, FOLDERS
from dreambooth.config.storage import is_remote
from dreambooth.data.photos import fingerprint
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.atomic_files import weights_digest

LATER_KEYS: dict[str, Any] = {
    "dataset.mask": None, "dataset.concepts": [], "dataset.buckets": False, "dataset.prompt_dropout": 0.0,
    "precision.tf32": False}  # keys added after the first runs, with the value at which they are left out
NEUTRAL_VALUES = {"ema_every": 1, "weights": "full", "rounding": None}  # memory settings that change no number
NOT_SELECTING = ("offline", "objective", "promote", "max_class_similarity")  # evaluate keys that select no weights


def register_resolver() -> None:
    """Register ${identity:} and ${identity:sweep} for configs. Every command that composes a run calls this once."""
    OmegaConf.register_new_resolver("identity", _identity_resolver, replace=True)


def _identity_resolver(kind: str = "", *, _root_: DictConfig) -> str:
    """Resolve ${identity:} of a run, and ${identity:sweep} of a trial."""
    overrides = _root_.hydra.overrides.task if kind == "sweep" else []
    return identity(_root_, swept=any(word.lstrip("+").startswith("train.max_train_steps=") for word in overrides))


def identity(root: DictConfig, swept: bool = False) -> str:
    """Return a hash (ten hex digits) of everything that changes a run's result, including the content of its photos.

    The hash does not include:
    - how the run is computed: hardware, and the memory settings that change no number;
    - settings that only observe: sample, tracking, checkpoint, and evaluate unless it selects the exported weights;
    - `max_train_steps`, unless the learning rate depends on it, so that more steps extend a run.

    Args:
        root: the composed config.
        swept: whether a sweep varies `max_train_steps`, so that each value is a run of its own.
    """
    def section(name: str) -> dict[str, Any]:
        values: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            root[name], resolve=True, enum_to_str=True)
        return values

    hashed = {name: section(name) for name in (
        "model", "method", "precision", "attention", "optimizer", "dataset", "prior", "train")}
    if changed := {key: value for key, value in section("memory").items() if value != NEUTRAL_VALUES.get(key, value)}:
        hashed["memory"] = changed
    hashed["prior"].pop("sample_batch_size")
    for key in ("compile", "channels_last"):  # added later; when on, they change rounding
        if not hashed["train"][key]:
            hashed["train"].pop(key)
    if not swept and hashed["train"]["lr_scheduler"] in ("constant", "constant_with_warmup"):
        hashed["train"].pop("max_train_steps")
    for key in ("offline", "adapter_learning_rate"):  # the latter sets train.learning_rate, which is hashed
        hashed["model"].pop(key)
    for key in ("vae", "zero_terminal_snr"):  # added later
        if not hashed["model"][key]:
            hashed["model"].pop(key)
    if (vae := hashed["model"].get("vae")) and (digest := weights_digest(Path(resolve_asset(vae)))):
        hashed["model"]["vae_weights"] = digest
    hashed["method"].pop("merge")
    if hashed["method"]["kind"] == "full":
        hashed["method"] = {key: hashed["method"][key] for key in ("name", "kind")}
    hashed["model"]["weights"] = weights_digest(Path(resolve_asset(hashed["model"]["source"])))
    for path, value in LATER_KEYS.items():
        name, _, key = path.partition(".")
        if hashed[name][key] == value:
            hashed[name].pop(key)
    for subject in (hashed["dataset"], *hashed["dataset"].get("concepts", ())):
        for key in FOLDERS:
            if (folder := subject.get(key)) and folder != ALPHA:
                subject[key] = _folder_content(folder)
    if (evaluate := section("evaluate"))["select"] is not None:
        hashed["evaluate"] = _selection(evaluate) | {
            key: root.sample[key] for key in ("num_inference_steps", "guidance_scale")}
    return sha256(json.dumps(hashed, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _selection(evaluate: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of evaluate that decide which weights are exported, if evaluate.select is set."""
    settings = {key: value for key, value in evaluate.items() if key not in NOT_SELECTING}
    if folder := settings["reference_dir"]:
        settings["reference_dir"] = _folder_content(folder)
    with suppress(ValueError):  # invalid prompts are reported when the run is resolved
        settings["prompts"] = eval_prompts.read_templates(settings["prompts"])
    return settings


def _folder_content(folder: str) -> str:
    """Return the fingerprint of a local folder, or the address of a folder in S3, which is not downloaded yet.

    storage/run_inputs.py checks the content of S3 folders.
    """
    return folder if is_remote(folder) else fingerprint(Path(resolve_asset(folder)))
