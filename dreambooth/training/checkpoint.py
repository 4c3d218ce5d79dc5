"""Checkpoints of the training state in `checkpoints/step-000100/`: written atomically, rotated, resumed bit for bit.

Tensors are stored as safetensors and the rest as JSON; there is no pickle. `_collect` and `_numbers` list the
contents of a checkpoint. The order of the data and all random numbers are functions of (seed, step), so a checkpoint
does not contain them.
"""

import json
import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth.errors import UserError
from dreambooth.optim.optimizers import estimated_step_size
from dreambooth.optim.state_layout import load_state
from dreambooth.optim.streaming_optimizer import StreamingOptimizer, group_state, hyperparameters
from dreambooth.runs import budget_file
from dreambooth.runs.checkpoint_files import STATE_FILE, latest, rotate
from dreambooth.runtime.engine import Engine
from dreambooth.storage import manifest
from dreambooth.training.checkpoint_transfer import share
from dreambooth.training.step import History, TrainState
from dreambooth.utils import atomic_files
from dreambooth.utils.plurals import counted

FORMAT = 1
log = logging.getLogger(__name__)


def save(folder: Path, state: TrainState, model: nn.Module, scaler: torch.amp.GradScaler, keep: int) -> Path:
    """Write a checkpoint of `state`, and return its folder. Then remove all but the newest `keep` checkpoints.

    With memory.fully_shard this is a collective operation: all processes send their parts to the main process, which
    writes the same files as a run of one process. Otherwise only the main process calls it.

    Args:
        folder: the `checkpoints` folder of the run.
        model: the trained module itself, unwrapped.

    Raises:
        DoesNotFit: the disk is full; earlier checkpoints are unchanged.
    """
    target = folder / f"step-{state.step:06d}"
    contents = _collect(state, model)
    if state.sharded is not None and not state.sharded.engine.is_main_process:
        return target
    try:
        with manifest.write_folder(target) as temporary:  # replaces a checkpoint of this step that was not loaded
            _write(temporary, state, scaler, *contents, budget_file.checkpoint_entry(folder.parent))
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError, which is not an OSError
        raise atomic_files.write_failure(f"the checkpoint of step {state.step} in {folder}", error,
                                         "make the folder writable and repeat the command") from error
    rotate(folder, keep, target)
    return target


def restore_newest(newest: Path, state: TrainState, model: nn.Module, engine: Engine, resume: str) -> Path:
    """Load a checkpoint into `state` in every process, and return its path.

    If a process cannot load the checkpoint and `resume` is auto, log a warning and load the newest earlier one instead.

    Args:
        newest: the checkpoint to load.
        model: the trained module itself, unwrapped.
        resume: checkpoint.resume.

    Raises:
        UserError: `newest` cannot be loaded, and `resume` is not auto or no earlier checkpoint can be loaded.
    """
    first_error: UserError | None = None
    path: Path | None = newest
    while path is not None:
        error: UserError | None = None
        try:
            restore(path, state, model, engine.scaler)
        except UserError as caught:
            error = caught
        if engine.reduce_flag(error is not None).read()[0] == 0:
            return path
        error = error or UserError(f"checkpoint {path} cannot be resumed in another process: type "
                                   "checkpoint.resume=never")
        first_error = first_error or error
        earlier = partial(latest, path.parent, path)
        path = share(engine.run_on_main(earlier), path.parent, engine) if resume == "auto" else None
        if path is not None:
            log.warning("%s, but %s is used instead", str(error).partition(": type ")[0], path.name)
    assert first_error is not None
    raise first_error


def restore(path: Path, state: TrainState, model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """Load a checkpoint into `state`. Hyperparameters such as the learning rate keep the values of the current run.

    Args:
        model: the trained module itself, unwrapped.

    Raises:
        UserError: the checkpoint belongs to another model or optimizer, or is not readable.
    """
    try:
        numbers = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if numbers["format"] != FORMAT:
            raise ValueError(f"it has format {numbers['format']}, this version reads {FORMAT}")
        counts = [int(numbers[key]) for key in ("step", "skipped", "skipped_in_row")]
        history = _read_history(numbers.get("history", {}))
        own = state.sharded.shards if state.sharded is not None else dict[str, Tensor]  # the part of this process
        _load_weights(own(load_file(path / "trained.safetensors")), state.weights(model), path)
        if state.ema is not None:
            _load_weights(own(load_file(path / "ema.safetensors")), state.ema.average, path)
            state.ema.updates = numbers["ema_updates"]
        groups = _use_current_hyperparameters(numbers["optimizer"]["param_groups"], state.optimizer)
        numbers["optimizer"]["param_groups"] = groups
        saved = _unflatten(load_file(path / "optimizer.safetensors"), numbers["optimizer"])
        if state.sharded is not None:
            saved = state.sharded.shard_optimizer_state(saved, state.optimizer)
        load_state(state.optimizer, saved)
        if isinstance(state.optimizer, StreamingOptimizer):
            state.optimizer.sync_weights()
        _restore_lr_scheduler(state, numbers["schedule"])
        if numbers["scaler"]:  # empty if the checkpoint's run had no loss scaling; the scale then has its initial value
            scaler.load_state_dict(numbers["scaler"])
    except (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} cannot be resumed here ({error}): type checkpoint.resume=never") from error
    state.step, state.skipped, state.skipped_in_row = counts
    state.history = history
    _compare_batches(numbers.get("samples_per_step"), state.samples_per_step)


def _compare_batches(saved: int | None, current: int | None) -> None:
    """Log a warning if the steps before a checkpoint had another number of photos than those after it."""
    if saved is not None and current is not None and saved != current:
        log.warning("this checkpoint was trained with %s per step, and with this number of processes the run continues "
                    "with %d. A new run keeps its batch with any number of processes: type train.global_batch_size=%d "
                    "train.gradient_accumulation_steps=1", counted(saved, "photo"), current, saved)


def needed_bytes(state: TrainState, model: nn.Module, keep: int) -> int:
    """Return the bytes of disk space for `keep` checkpoints and one more.

    One more is needed because a new checkpoint is written before the oldest is removed. A checkpoint contains fp32
    weights, two Adam moments or Prodigy's four numbers per weight, and the EMA if there is one.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = 2 if estimated_step_size(state.optimizer) is None else 4
    return (keep + 1) * 4 * trained * (1 + moments + (state.ema is not None))


def _write(folder: Path, state: TrainState, scaler: torch.amp.GradScaler, files: dict[str, dict[str, Tensor]],
           optimizer_state: dict[str, Any], more: dict[str, float]) -> None:
    flat, optimizer = _flatten(optimizer_state)
    for name, tensors in (files | {"optimizer.safetensors": flat}).items():
        save_file(tensors, folder / name)
    sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir()}
    numbers = _numbers(state, scaler) | {"optimizer": optimizer, "sizes": sizes} | more
    (folder / STATE_FILE).write_text(json.dumps(numbers), encoding="utf-8")


def _collect(state: TrainState, model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors of a checkpoint by file, except those of the optimizer, and the optimizer's state."""
    files = {"trained.safetensors": state.weights(model)} | (
        {"ema.safetensors": state.ema.average} if state.ema is not None else {})
    if state.sharded is not None:
        return ({name: state.sharded.collect(tensors) for name, tensors in files.items()},
                state.sharded.collect_optimizer_state(state.optimizer))
    files["trained.safetensors"] = {name: w.detach().contiguous() for name, w in files["trained.safetensors"].items()}
    return files, state.optimizer.state_dict()


def _numbers(state: TrainState, scaler: torch.amp.GradScaler) -> dict[str, Any]:
    return {
        "format": FORMAT, "step": state.step, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row,
        "ema_updates": state.ema.updates if state.ema is not None else 0,
        "schedule": state.lr_scheduler.state_dict(), "scaler": scaler.state_dict(),
    } | ({"samples_per_step": state.samples_per_step} if state.samples_per_step else {}) | (
        {"history": asdict(state.history)} if state.history != History() else {})


def _read_history(saved: dict[str, Any]) -> History:
    """Return the history that a checkpoint contains. JSON has made the steps, which are its keys, texts."""
    return History(**saved | {"scores": {int(step): values for step, values in saved.get("scores", {}).items()}})


def _flatten(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON values. The key of parameter 0's tensor exp_avg is '0.exp_avg'.

    bitsandbytes nests part of a parameter's state in a dict. It can also load the state without the nesting, so the
    nesting is removed. The states of all parameters share one tensor, bitsandbytes' table of 8-bit values. safetensors
    does not write shared tensors, so each state gets a copy.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {"param_groups": state_dict["param_groups"], "state": {}}
    seen: set[int] = set()
    for index, entries in state_dict["state"].items():
        inner = [item for value in entries.values() if isinstance(value, dict) for item in value.items()]
        outer = [item for item in entries.items() if not isinstance(item[1], dict)]
        for name, value in outer + inner:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()._cdata
                tensors[f"{index}.{name}"] = value.detach().clone() if storage in seen else value.detach().contiguous()
                seen.add(storage)
            else:
                rest["state"].setdefault(str(index), {})[name] = value
    return tensors, rest


def _unflatten(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state, rebuilt from the two parts that `_flatten` returned."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["state"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    return {"param_groups": rest["param_groups"], "state": state}


def _use_current_hyperparameters(saved: list[dict[str, Any]],
                                 optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the saved parameter groups, with their state, and with the hyperparameters of the current run.

    Raises:
        ValueError: `saved` was written by another kind of optimizer.
    """
    current = [hyperparameters(group) for group in optimizer.param_groups]
    if [hyperparameters(group).keys() for group in saved] != [group.keys() for group in current]:
        raise ValueError("it was trained with another optimizer")
    return [group | group_state(old) | {"params": old["params"]} for group, old in zip(current, saved, strict=True)]


def _restore_lr_scheduler(state: TrainState, saved: dict[str, Any]) -> None:
    """Continue the learning-rate schedule at the saved step, with the base learning rate of the current run."""
    scheduler: Any = state.lr_scheduler
    scheduler.load_state_dict(saved | {"base_lrs": scheduler.base_lrs})
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):  # every schedule of diffusers is a LambdaLR
        scheduler._last_lr = [rate * factor(scheduler.last_epoch)
                              for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(state.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate


@torch.no_grad()
def _load_weights(saved: dict[str, Tensor], into: dict[str, Any], path: Path) -> None:
    """Copy the tensors of the checkpoint `path` into the trained tensors.

    Args:
        saved: the tensors of the checkpoint, by name.
        into: the tensors to overwrite, by name. Parameters that do not require gradients are ignored.

    Raises:
        ValueError: `saved` and `into` have tensors with different names or shapes.
    """
    trained = {name: t for name, t in into.items() if not isinstance(t, nn.Parameter) or t.requires_grad}
    if mismatched := [name for name in saved.keys() | trained.keys()
                      if name not in saved or name not in trained or saved[name].shape != trained[name].shape]:
        raise ValueError(f"{len(mismatched)} weights of {path.name} do not match this model")
    for name, tensor in saved.items():
        trained[name].copy_(tensor)
