"""Saves the best weights of a run so far in the folder `best/` of the run, beside the folder `checkpoints/`.

The setting evaluate.select defines a weighted sum of scores. The best weights are those with the greatest sum. They are
saved in fp32: the EMA, or the trained weights if there is no EMA. Checkpoint rotation never removes them.

Candidates are every `evaluate.every`-th step, and the last step. If the last step is the best, its weights are exported
from memory, not from `best/`. They are saved in `best/` only if the step is also a multiple of `evaluate.every`. When a
run is extended, its former last step remains a candidate only if the step is such a multiple. The extended run
therefore selects the same step as a run that had the larger number of steps from the start.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth.config.evaluate import weighted_sum
from dreambooth.optim.ema import swap_weights
from dreambooth.storage import manifest
from dreambooth.utils import atomic_files

log = logging.getLogger(__name__)
WEIGHTS, STATE = "weights.safetensors", "state.json"


def best_step(scores: Mapping[int, Mapping[str, float]], weights: Mapping[str, float], every: int,
              last: int) -> int | None:
    """Return the candidate step with the greatest weighted sum of scores, or None if there is no candidate.

    Of steps with equal sums, return the earliest.

    Args:
        scores: the value of each measure, by step and name of the measure.
        weights: the weight of each measure in the sum.
        every: evaluate.every.
        last: the last candidate, even if it is not a multiple of `every`. Step 0, the base model, is not a candidate.
    """
    steps = sorted(step for step in scores if 0 < step <= last and (step % every == 0 or step == last))
    return max(steps, key=lambda step: weighted_sum(weights, scores[step]), default=None)


def saved_step(folder: Path) -> int | None:
    """Return the step whose weights are in `folder`, or None if the folder has no complete, undamaged weights."""
    state = atomic_files.read_object(folder / STATE) or {}
    try:
        complete = (folder / WEIGHTS).stat().st_size == state["size"]
        step = int(state["step"]) if complete else None
    except PermissionError:
        raise
    except (OSError, KeyError, ValueError, TypeError):
        return None
    if damage := manifest.find_damage(folder):
        log.warning("the best weights in %s are damaged (%s)", folder, damage)
        return None
    return step


def save(folder: Path, step: int, weights: Mapping[str, Tensor]) -> None:
    """Replace the contents of `folder` with the weights after `step` completed steps.

    Args:
        weights: the trained weights or their averages, by name. They are not put into the module, because
            DistributedDataParallel no longer sums the gradients of a parameter whose dtype or device has changed.

    Raises:
        DoesNotFit: the disk is full; the previous contents are kept.
    """
    try:
        with manifest.write_folder(folder) as temporary:
            save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, temporary / WEIGHTS)
            state = {"step": step, "size": (temporary / WEIGHTS).stat().st_size}
            (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError, which is not an OSError
        raise atomic_files.write_failure(f"the best weights so far, of step {step}, in {folder}", error,
                                         "make the folder writable and repeat the command") from error


def needed_bytes(model: nn.Module) -> int:
    """Return the bytes that `best/` needs: two sets of fp32 weights, since `save` removes the old set after writing."""
    return 2 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextmanager
def swap_into(folder: Path, model: nn.Module, exact: bool = False) -> Iterator[None]:
    """Replace a module's weights by those in `folder` in a `with` block; on exit, restore the former weights exactly.

    Args:
        exact: whether the weights in `folder` keep their precision and stay in host memory; see `ema.swap_weights`.
    """
    weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
    with swap_weights(model, weights, exact):
        yield
