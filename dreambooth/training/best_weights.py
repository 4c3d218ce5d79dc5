"""The best weights of a run so far, by evaluate.select: `best/` in the run folder, beside the checkpoints.

Only what is sampled and exported is kept there (the EMA where there is one), fp32, and rotation never touches it. Steps
that evaluate.every names are candidates, and the last one; the last is never taken from here, so that a run that is
extended later chooses as one that had all its steps from the start.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth.config.evaluate import weighted_sum
from dreambooth.errors import DoesNotFit
from dreambooth.optim.ema import swap_weights
from dreambooth.utils import atomic_files

WEIGHTS, STATE = "weights.safetensors", "state.json"


def best_step(scores: Mapping[int, Mapping[str, float]], weights: Mapping[str, float], every: int,
              last: int) -> int | None:
    """The evaluated step with the greatest weighted sum, the earliest of equals; never step 0, none after `last`."""
    steps = sorted(step for step in scores if 0 < step <= last and (step % every == 0 or step == last))
    return max(steps, key=lambda step: weighted_sum(weights, scores[step]), default=None)


def kept_step(folder: Path) -> int | None:
    """The step whose weights are in `folder`, or None."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return int(state["step"]) if (folder / WEIGHTS).stat().st_size == state["size"] else None
    except (OSError, ValueError, KeyError):
        return None


def keep(folder: Path, step: int, model: nn.Module) -> None:
    """Replace what is in `folder` by the trained weights of the module as they are now.

    Raises:
        DoesNotFit: the disk is full; what was there stays.
    """
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    try:
        with atomic_files.write_folder(folder) as aside:
            save_file(weights, aside / WEIGHTS)
            state = {"step": step, "size": (aside / WEIGHTS).stat().st_size}
            (aside / STATE).write_text(json.dumps(state), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a class of its own
        raise DoesNotFit(f"the best weights so far, of step {step}, could not be written to {folder} ({error}): "
                         "free some space and repeat the command") from error


def needed_bytes(model: nn.Module) -> int:
    """Disk that the kept weights take, and once more while better ones are written."""
    return 2 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextmanager
def swapped_into(folder: Path, model: nn.Module, exact: bool = False) -> Iterator[None]:
    """Let the module compute with the kept weights, or hold them exactly to be written; its own come back untouched."""
    weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
    with swap_weights(model, weights, exact):
        yield
