"""A run's identity: ten hex digits over everything that changes its result, by which its folder is named. No torch."""

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
from dreambooth.utils.assets import asset
from dreambooth.utils.atomic_files import weights_digest

NEWER: dict[str, Any] = {
    "dataset.mask": None, "dataset.concepts": [], "dataset.buckets": False, "dataset.prompt_dropout": 0.0,
    "precision.tf32": False}  # keys that came later, and where they change nothing: runs keep their folders
UNCHANGED = {"ema_every": 1, "weights": "full", "rounding": None}  # levers that change numbers, and when they do not
UNSEEN = ("offline", "objective", "promote", "max_class_similarity")  # of evaluate: they choose no weights


def register_resolver() -> None:
    """Let configurations say ${identity:} and ${identity:sweep}; every command that composes a run calls this once."""
    OmegaConf.register_new_resolver("identity", _identity_resolver, replace=True)


def identity(root: DictConfig, swept: bool = False) -> str:
    """Ten hex digits over everything that changes the result of a run, the photos' content included.

    Left out: how it is computed (hardware, and of memory what changes no number), what is only looked at (sample,
    tracking, checkpoint, evaluate as long as it does not select what is exported), and `max_train_steps` as long as the
    learning rate does not depend on it, so that more steps extend a run. In a sweep that chooses `max_train_steps` each
    choice is a run of its own.
    """
    def plain(section: str) -> dict[str, Any]:
        found: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            root[section], resolve=True, enum_to_str=True)
        return found

    chosen = {name: plain(name) for name in (
        "model", "method", "precision", "attention", "optimizer", "dataset", "prior", "train")}
    if changed := {key: value for key, value in plain("memory").items() if value != UNCHANGED.get(key, value)}:
        chosen["memory"] = changed
    chosen["prior"].pop("sample_batch_size")
    for key in ("compile", "channels_last"):  # they round differently: only a run that has them is told apart
        if not chosen["train"][key]:
            chosen["train"].pop(key)
    if not swept and chosen["train"]["lr_scheduler"] in ("constant", "constant_with_warmup"):
        chosen["train"].pop("max_train_steps")
    for key in ("offline", "adapter_learning_rate"):  # the latter is in train.learning_rate, where it is used
        chosen["model"].pop(key)
    for key in ("vae", "zero_terminal_snr"):  # younger than the first runs
        if not chosen["model"][key]:
            chosen["model"].pop(key)
    if (vae := chosen["model"].get("vae")) and (digest := weights_digest(Path(asset(vae)))):
        chosen["model"]["vae_weights"] = digest
    chosen["method"].pop("merge")
    if chosen["method"]["kind"] == "full":
        chosen["method"] = {key: chosen["method"][key] for key in ("name", "kind")}
    chosen["model"]["weights"] = weights_digest(Path(asset(chosen["model"]["source"])))
    for place, value in NEWER.items():
        section, _, key = place.partition(".")
        if chosen[section][key] == value:
            chosen[section].pop(key)
    for subject in (chosen["dataset"], *chosen["dataset"].get("concepts", ())):
        for key in FOLDERS:
            if (folder := subject.get(key)) and folder != ALPHA:
                subject[key] = _photos(folder)
    if (evaluate := plain("evaluate"))["select"] is not None:
        chosen["evaluate"] = _selection(evaluate) | {
            key: root.sample[key] for key in ("num_inference_steps", "guidance_scale")}
    return sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _selection(evaluate: dict[str, Any]) -> dict[str, Any]:
    """What decides which weights are exported, once evaluate.select does."""
    kept = {key: value for key, value in evaluate.items() if key not in UNSEEN}
    if folder := kept["reference_dir"]:
        kept["reference_dir"] = _photos(folder)
    with suppress(ValueError):  # said when the run is resolved
        kept["prompts"] = eval_prompts.read(kept["prompts"])
    return kept


def _photos(folder: str) -> str:
    """A folder by its content; by its address where that would have to be fetched first, see remote.py."""
    return folder if is_remote(folder) else fingerprint(Path(asset(folder)))


def _identity_resolver(place: str = "", *, _root_: DictConfig) -> str:
    """${identity:} of a run, ${identity:sweep} of a trial."""
    task = _root_.hydra.overrides.task if place == "sweep" else []
    return identity(_root_, swept=any(word.lstrip("+").startswith("train.max_train_steps=") for word in task))
