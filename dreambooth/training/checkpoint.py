"""Training state on disk: `checkpoints/step-000100/`, written atomically, rotated, resumed bit for bit.

No pickle: tensors are safetensors, the rest is JSON. What a checkpoint holds is listed once, in `_tensors` and
`_numbers`; the data order and all random numbers are functions of (seed, step) and need no state.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth.errors import DoesNotFit, UserError
from dreambooth.optim.streaming_optimizer import StreamingOptimizer, hyperparameters
from dreambooth.runs.checkpoint_files import STATE, intact, rotate
from dreambooth.training.step import TrainState
from dreambooth.utils import atomic_files

FORMAT = 1


def save(folder: Path, state: TrainState, model: nn.Module, scaler: torch.amp.GradScaler, keep: int) -> Path:
    """Write the state of `state.step` completed steps, then rotate to the newest `keep`.

    Args:
        folder: the run's `checkpoints` folder.
        model: the trained module itself, unwrapped.

    Raises:
        DoesNotFit: the disk is full; earlier checkpoints are untouched.
    """
    target = folder / f"step-{state.step:06d}"
    if not intact(target):
        try:
            with atomic_files.write_folder(target) as aside:
                _write(aside, state, model, scaler)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a class of its own
            raise DoesNotFit(f"the checkpoint of step {state.step} could not be written to {folder} "
                             f"({error}): free some space and repeat the command") from error
    rotate(folder, keep)
    return target


def restore(path: Path, state: TrainState, model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """Load a checkpoint into `state`. Learning rate, betas and the like stay those of `state`'s own run.

    Raises:
        UserError: the checkpoint belongs to another model or optimizer, or is not readable.
    """
    try:
        numbers = json.loads((path / STATE).read_text(encoding="utf-8"))
        if numbers["format"] != FORMAT:
            raise ValueError(f"it has format {numbers['format']}, this version reads {FORMAT}")
        _load_weights(load_file(path / "trained.safetensors"), state.weights(model), path)
        if state.ema is not None:
            _load_weights(load_file(path / "ema.safetensors"), state.ema.average, path)
            state.ema.updates = numbers["ema_updates"]
        numbers["optimizer"]["param_groups"] = _own_settings(numbers["optimizer"]["param_groups"], state.optimizer)
        state.optimizer.load_state_dict(
            _unflatten(load_file(path / "optimizer.safetensors"), numbers["optimizer"]))
        _laid_out(state.optimizer)
        if isinstance(state.optimizer, StreamingOptimizer):
            state.optimizer.sync_weights()
        _go_on(state, numbers["schedule"])
        if numbers["scaler"]:  # empty: trained without loss scaling, so that its scale begins here
            scaler.load_state_dict(numbers["scaler"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} cannot be resumed here ({error}): type checkpoint.resume=never") from error
    state.step, state.skipped, state.skipped_in_row = (
        numbers[key] for key in ("step", "skipped", "skipped_in_row"))


def needed_bytes(state: TrainState, model: nn.Module, keep: int) -> int:
    """Disk that `keep` checkpoints take, and one more while it is written: fp32 weights, EMA, two Adam moments."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (keep + 1) * 4 * trained * (3 + (state.ema is not None))


def _write(folder: Path, state: TrainState, model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    flat, optimizer = _flatten(state.optimizer.state_dict())
    for name, tensors in _tensors(state, model, flat).items():
        save_file(tensors, folder / name)
    sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir()}
    numbers = _numbers(state, scaler) | {"optimizer": optimizer, "sizes": sizes}
    (folder / STATE).write_text(json.dumps(numbers), encoding="utf-8")


def _tensors(state: TrainState, model: nn.Module, optimizer: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    trained = {name: weight.detach().contiguous() for name, weight in state.weights(model).items()}
    parts = {"trained.safetensors": trained, "optimizer.safetensors": optimizer}
    return parts | ({"ema.safetensors": state.ema.average} if state.ema is not None else {})


def _numbers(state: TrainState, scaler: torch.amp.GradScaler) -> dict[str, Any]:
    return {
        "format": FORMAT, "step": state.step, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row,
        "ema_updates": state.ema.updates if state.ema is not None else 0,
        "schedule": state.schedule.state_dict(), "scaler": scaler.state_dict(),
    }


def _flatten(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by 'parameter.name', and the rest as JSON.

    bitsandbytes puts part of a parameter's state into a dict of its own, and reads it back without; its table of 8-bit
    values is one tensor for all parameters, which safetensors does not take.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {"param_groups": state_dict["param_groups"], "state": {}}
    seen: set[int] = set()
    for index, entries in state_dict["state"].items():
        inner = [item for value in entries.values() if isinstance(value, dict) for item in value.items()]
        outer = [item for item in entries.items() if not isinstance(item[1], dict)]
        for name, value in outer + inner:
            if isinstance(value, Tensor):
                place = value.untyped_storage()._cdata
                tensors[f"{index}.{name}"] = value.detach().clone() if place in seen else value.detach().contiguous()
                seen.add(place)
            else:
                rest["state"].setdefault(str(index), {})[name] = value
    return tensors, rest


def _unflatten(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["state"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    return {"param_groups": rest["param_groups"], "state": state}


def _own_settings(saved: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The saved groups' parameters with the settings that this run was given."""
    own = [hyperparameters(group) for group in optimizer.param_groups]
    if [group.keys() - {"params"} for group in saved] != [group.keys() for group in own]:
        raise ValueError("it was trained with another optimizer")
    return [group | {"params": kept["params"]} for group, kept in zip(own, saved, strict=True)]


def _go_on(state: TrainState, saved: dict[str, Any]) -> None:
    """The schedule at the saved step, from this run's own learning rate."""
    schedule: Any = state.schedule
    schedule.load_state_dict(saved | {"base_lrs": schedule.base_lrs})
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):  # all of diffusers' are
        schedule._last_lr = [rate * factor(schedule.last_epoch)
                             for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(state.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate


def _laid_out(optimizer: torch.optim.Optimizer) -> None:
    """Files are contiguous; fused kernels walk weights and state side by side as they lie in memory."""
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


@torch.no_grad()
def _load_weights(found: dict[str, Tensor], into: dict[str, Any], path: Path) -> None:
    wanted = {name: t for name, t in into.items() if not isinstance(t, nn.Parameter) or t.requires_grad}
    if other := [name for name in found.keys() | wanted.keys()
                 if name not in found or name not in wanted or found[name].shape != wanted[name].shape]:
        raise ValueError(f"{len(other)} weights of {path.name} do not match this model")
    for name, tensor in found.items():
        wanted[name].copy_(tensor)