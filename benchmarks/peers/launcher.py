"""Runs a script of a peer unchanged, and logs the times at which steps and class images are completed.

    python benchmarks/peers/launcher.py LOG.jsonl SCRIPT.py ARGUMENTS...

The times come from the script's own progress bars (tqdm). The peers import torchvision. If its compiled operators do
not fit the installed PyTorch, the operators that its import needs are declared without an implementation; the peers use
only its transforms, which are Python code. Without an accelerator, pinning memory does nothing.
"""

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def bar_name(description: str) -> str | None:
    """Return the name of a progress bar in the log; None: the bar is not logged.

    The bars of steps are called step, steps, Steps, "Epoch 1/9 Steps" and "Epoch 1/9, Steps".
    """
    words = description.lower().strip(": ")
    if words == "generating class images":
        return "Generating class images"
    return "Steps" if words == "step" or (words.endswith("steps") and "validation" not in words) else None


def import_torchvision() -> None:
    """Import torchvision, also if it was built for another PyTorch.

    Its import then ends in an error about an operator that is missing. The operators are declared, and it is imported
    again.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.append(library)
        import torchvision  # noqa: F401


def ignore_pinning() -> None:
    """Let Tensor.pin_memory return the tensor on a machine without an accelerator, where it is an error otherwise."""
    import torch

    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]


declared: list[Any] = []  # operators exist as long as their libraries


def log_progress_bars(log: Path) -> None:
    """Make the script's progress bars write one JSON line per update: the bar's name, the time and the increment."""
    import tqdm
    import tqdm.auto

    file = log.open("a", buffering=1)

    def logging_bar(kind: Any) -> Any:
        class LoggingBar(kind):  # type: ignore[misc]
            def update(self, n: float | None = 1) -> Any:
                displayed = super().update(n)
                name = bar_name(str(getattr(self, "desc", "") or ""))  # a disabled bar has none
                if name and not self.disable and n:
                    file.write(json.dumps({"bar": name, "time": time.time(), "done": n}) + "\n")
                return displayed

            def __iter__(self) -> Any:
                for item in self.iterable:
                    yield item
                    self.update()

        return LoggingBar

    tqdm.auto.tqdm = logging_bar(tqdm.auto.tqdm)
    tqdm.tqdm = logging_bar(tqdm.tqdm)  # type: ignore[misc]


def main() -> None:
    log, script, *arguments = sys.argv[1:]
    import_torchvision()
    ignore_pinning()
    log_progress_bars(Path(log))
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
