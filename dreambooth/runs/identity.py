"""The identity of a run: a hash of everything that changes the result. The hash is part of the run folder's name.

A run that was started with an earlier version of this package must keep its hash. Otherwise the run folder would not be
found, and the run would not be resumed. Some config keys did not exist in earlier versions. Such a key has one value
that gives the same results as the earlier versions. With this value, the key is left out of the hash (LATER_KEYS,
NEUTRAL_VALUES and the calls of `pop` in `identity`). Do not remove or reorder these constants and calls. This file
imports no torch.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dreambooth.config import eval_prompts
from dreambooth.config.dataset import ALPHA, FOLDERS
from dreambooth.config.enums import LrSchedule
from dreambooth.config.evaluate import VALIDATION_LOSS
from dreambooth.config.model_defaults import sample_batch_size_if_changed
from dreambooth.config.overrides import escape_prompts
from dreambooth.config.storage import is_remote
from dreambooth.data.index.file_hashes import fingerprint
from dreambooth.serialization import export_layout
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.atomic_files import weights_digest

LATER_KEYS: dict[str, Any] = {  # keys that were added later; a key with this value is left out of the hash
    "dataset.mask": None, "dataset.concepts": [], "dataset.buckets": False, "dataset.prompt_dropout": 0.0,
    "dataset.validation_dir": None, "dataset.validation_count": 0, "precision.tf32": False,
    "prior.kind": "class_images", "train.debiased_estimation": False, "train.huber_delta": None,
    "train.multires_noise": 0.0, "train.global_batch_size": None,
    "optimizer.beta3": None, "optimizer.d_coef": 1.0,
    "method.new_tokens": 0, "method.trigger_word": None, "method.token_initializer": None,
    "method.token_learning_rate": None, "method.token_train_share": 1.0,
    "method.use_rslora": False, "method.decompose_factor": -1, "method.decompose_both": False,
    "method.target_modules": None, "method.exclude_modules": [], "method.rank_pattern": None,
    "method.alpha_pattern": None, "train.text_encoder_learning_rate": None}
NEUTRAL_VALUES = {"ema_every": 1, "weights": "full", "rounding": None}  # memory values that leave results unchanged
DEFAULT_FLOW = {"timestep_sampling": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29,
                "shift": None, "loss_weighting": "none"}  # flow values that are left out of the hash
NOT_SELECTING = ("offline", "objective", "promote", "max_class_similarity",
                 "min_prompt_fidelity")  # evaluate keys that select no weights


def register_resolver() -> None:
    """Register the resolver of ${identity:} and ${identity:sweep} with OmegaConf, before a run's config is composed."""
    OmegaConf.register_new_resolver("identity", _identity_resolver, replace=True)


def _identity_resolver(kind: str = "", *, _root_: DictConfig) -> str:
    """Return the value of ${identity:} for a run, or of ${identity:sweep} for a trial (one run) of a sweep.

    Args:
        kind: the text after the colon.
    """
    overrides = _root_.hydra.overrides.task if kind == "sweep" else []
    return identity(_root_, swept=sweeps_length(overrides))


def sweeps_length(overrides: Iterable[str]) -> bool:
    """Return whether the overrides of a trial set train.max_train_steps, which is then a part of its identity."""
    return any(word.lstrip("+").startswith("train.max_train_steps=") for word in overrides)


def has_fixed_length(hydra: Any) -> bool:
    """Return whether a run is a trial whose folder is named after its number of steps, so that it is not extended.

    Args:
        hydra: Hydra's own configuration of the run. The workflow of Katib names the folder of a single run like that
            of a trial.
    """
    folder = hydra.sweep if hydra.mode is RunMode.MULTIRUN else hydra.run
    return "identity:sweep" in str(OmegaConf.to_container(folder, resolve=False)) and sweeps_length(
        hydra.overrides.task)


def identity(root: DictConfig, swept: bool = False) -> str:
    """Return a hash (ten hex digits) of everything that changes a run's result, including the content of its photos.

    The hash does not include:
    - the hardware, and memory settings that do not change the result;
    - the sections sample, tracking and checkpoint, and `train.compile_cache`;
    - the section evaluate, unless evaluate.select or train.stop_when is set: this section then determines the exported
      weights, or when the run ends;
    - `train.validate_every`, unless evaluate.select or train.stop_when names validation_loss;
    - `max_train_steps`, unless the learning rate or the training of new tokens depends on it. A run with more steps
      therefore extends an earlier run.

    Args:
        root: the composed config.
        swept: True if a sweep varies `max_train_steps`: each value then gives a separate run.
    """
    escape_prompts(root)

    def section(name: str) -> dict[str, Any]:
        values: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            root[name], resolve=True, enum_to_str=True)
        return values

    hashed = {name: section(name) for name in (
        "model", "method", "precision", "attention", "optimizer", "dataset", "prior", "train")}
    if changed := {key: value for key, value in section("memory").items() if value != NEUTRAL_VALUES.get(key, value)}:
        hashed["memory"] = changed
    if changed := {key: value for key, value in section("flow").items() if value != DEFAULT_FLOW[key]}:
        hashed["flow"] = changed  # added later
    sample_batch_size = hashed["prior"].pop("sample_batch_size")
    with_class_images = hashed["prior"]["with_prior_preservation"] and hashed["prior"]["kind"] == "class_images"
    if hashed["prior"]["kind"] == "output":  # the other keys are about class images
        hashed["prior"] = {key: hashed["prior"][key] for key in (
            "with_prior_preservation", "kind", "prior_loss_weight")}
    if hashed["train"].get("global_batch_size") is not None:  # then train_batch_size is a limit, as options of memory
        hashed["train"].pop("train_batch_size")
    hashed["train"].pop("compile_cache")
    for key in ("compile", "channels_last"):  # added later; when on, they change rounding
        if not hashed["train"][key]:
            hashed["train"].pop(key)
    hashed["train"] |= _stop_rule(hashed["train"].pop("stop_when"), section("evaluate")["select"],
                                  hashed["train"].pop("validate_every"))
    depends_on_length = (LrSchedule[hashed["train"]["lr_scheduler"]].depends_on_length
                         or hashed["method"]["token_train_share"] != 1)
    if not swept and not depends_on_length:
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
        if hashed[name].get(key, value) == value:
            hashed[name].pop(key, None)
    for subject in (hashed["dataset"], *hashed["dataset"].get("concepts", ())):
        for key in FOLDERS:
            if (folder := subject.get(key)) and folder != ALPHA:
                subject[key] = _folder_content(folder, Path(root.run_root), masks=key == "mask")
        if subject.get("validation_dir", "") is None:
            subject.pop("validation_dir")  # added later
    if (evaluate := section("evaluate"))["select"] is not None or _names_images(hashed["train"].get("stop_when")):
        hashed["evaluate"] = _selection(evaluate, Path(root.run_root)) | {
            key: root.sample[key] for key in ("num_inference_steps", "guidance_scale")}
    earlier = _digest(hashed)
    if not (with_class_images or "evaluate" in hashed):  # nothing is generated in batches
        return earlier
    changed_size = sample_batch_size_if_changed(hashed["model"]["name"], sample_batch_size)
    if not changed_size or _was_started(root, earlier, sample_batch_size):
        return earlier
    hashed["prior"] |= changed_size
    return _digest(hashed)


def _stop_rule(stop_when: dict[str, Any], select: str | None, validate_every: int | None) -> dict[str, Any]:
    """Return the settings that decide when a run stops early and, with validation_loss, which weights it exports.

    The dictionary is empty if nothing stops the run early and evaluate.select does not name validation_loss.
    """
    rule = {} if stop_when["measure"] is None else {"stop_when": stop_when}
    if any(VALIDATION_LOSS in (text or "") for text in (stop_when["measure"], select)):
        rule["validate_every"] = validate_every  # type: ignore[assignment]
    return rule


def _names_images(stop_when: dict[str, Any] | None) -> bool:
    """Return whether a rule of early stopping reads measures of images, which the section evaluate determines."""
    return stop_when is not None and stop_when["measure"] != VALIDATION_LOSS


def _digest(hashed: dict[str, Any]) -> str:
    return sha256(json.dumps(hashed, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _was_started(root: DictConfig, digest: str, sample_batch_size: int) -> bool:
    """Return whether an earlier version of this package started this run.

    Earlier versions did not hash prior.sample_batch_size. A run of such a version keeps its hash, so that its folder
    is found and the run is resumed. However, the folder with this hash may belong to a run with another batch size.
    Therefore `sample_batch_size` is compared with the value in the run.json of the folder.

    Args:
        digest: the hash of the run without prior.sample_batch_size.
    """
    folder = Path(root.run_root) / f"{root.name}-{digest}"
    return bool(export_layout.read_settings(folder).get("prior.sample_batch_size") == str(sample_batch_size))


def _selection(evaluate: dict[str, Any], run_root: Path) -> dict[str, Any]:
    """Return the settings of the section `evaluate` that determine which weights evaluate.select chooses for export."""
    settings = {key: value for key, value in evaluate.items() if key not in NOT_SELECTING}
    if folder := settings["reference_dir"]:
        settings["reference_dir"] = _folder_content(folder, run_root)
    with suppress(ValueError):  # invalid prompts are reported when the run is resolved
        settings["prompts"] = eval_prompts.read_templates(settings["prompts"])
    return settings


def _folder_content(folder: str, run_root: Path, masks: bool = False) -> str:
    """Return a hash of the content of a local folder, or the address of a folder in S3.

    S3 folders have not been downloaded at this point. storage/run_inputs.py compares their content later.
    """
    return folder if is_remote(folder) else fingerprint(Path(resolve_asset(folder)), masks, run_root)
