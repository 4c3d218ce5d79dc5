"""Runs a command in a process of its own and kills it with SIGKILL, or makes it fail, at a chosen moment.

The processes are forked by tests/support/warm_python.py, so that a run costs a second, not ten.
The product code has no hooks for this: each fault replaces one function of it inside the process.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.warm_python import PYTHON

ROOT = Path(__file__).parents[2]
FAST = [
    "hardware=cpu", "tracking=none", "train.max_train_steps=8", "train.train_batch_size=1", "checkpoint.every=2",
    "prior.num_class_images=4", "prior.sample_batch_size=2", "prior.num_inference_steps=2",
    "sample.every=4", "sample.num_inference_steps=2", "sample.images_per_prompt=1",
    "evaluate.encoder=none",
]


def train(run_root: Path, *overrides: str, fault: str | None = None, seed: int = 0, log: Path | None = None) -> int:
    """Run `python -m dreambooth.train` with FAST settings; returns the exit code (-9 when it was killed)."""
    return call("train", [f"run_root={run_root}", *FAST, *overrides], fault, seed, log)


def call(
    door: str, arguments: Sequence[str], fault: str | None = None, seed: int = 0, log: Path | None = None
) -> int:
    """Run `python -m dreambooth.DOOR` with exactly these arguments; what it prints is appended to `log`."""
    command = [PYTHON, "-m", "tests.support.faults", door, fault or "", str(seed), json.dumps(list(arguments))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if log is None:
        return subprocess.run(command, env=environment, timeout=600, check=False).returncode
    with log.open("ab") as file:
        return subprocess.run(command, env=environment, timeout=600, check=False, stdout=file, stderr=file).returncode


def main(door: str, fault: str, seed: str, arguments: str) -> None:
    """In the process: put the fault in, then run the command."""
    sys.argv = [f"dreambooth/{door}.py", *json.loads(arguments)]
    if fault:
        (FAULTS | EVALUATING | OTHERS)[fault](int(seed))
    importlib.import_module(f"dreambooth.{door}").main()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _on(module: Any, name: str, act: Callable[..., None], after: int = 0) -> None:
    """Before call number `after` + 1 of module.name, act on its arguments and die."""
    original, calls = getattr(module, name), iter(range(10**9))

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            act(*args, **kwargs)
            die()
        return original(*args, **kwargs)

    setattr(module, name, replaced)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _class_image(seed: int) -> None:
    from PIL import Image

    _on(Image.Image, "save", lambda image, path, **_: Path(path).write_bytes(b"\x89PNG half"), after=seed % 4)


def _checkpoint_write(seed: int) -> None:
    from dreambooth.training import checkpoint

    _on(checkpoint, "save_file", lambda tensors, path: Path(path).write_bytes(b"half"), after=1 + 3 * (seed % 3))


def _checkpoint_fsync(seed: int) -> None:
    from dreambooth.training import checkpoint
    from dreambooth.utils import atomic_files

    save = checkpoint.save

    def saving(*args: Any, **kwargs: Any) -> Any:
        _on(atomic_files, "sync", _nothing, after=seed % 4)
        return save(*args, **kwargs)

    checkpoint.save = saving


def _checkpoint_rename(seed: int) -> None:
    from dreambooth.training import checkpoint
    from dreambooth.utils import atomic_files

    save, saves = checkpoint.save, iter(range(10**9))

    def saving(*args: Any, **kwargs: Any) -> Any:
        if next(saves) == 1 + seed % 2:
            _on(atomic_files, "publish", _nothing)
        return save(*args, **kwargs)

    checkpoint.save = saving


def _checkpoint_rotate(seed: int) -> None:
    from dreambooth.training import checkpoint
    from dreambooth.utils import atomic_files

    def half_removed(path: Path, **_: Any) -> None:
        next(iter(sorted(path.iterdir()))).unlink()

    rotate = checkpoint.rotate

    def rotating(*args: Any) -> None:
        _on(atomic_files.shutil, "rmtree", lambda path, **kw: None if kw else half_removed(path), after=1)
        rotate(*args)

    checkpoint.rotate = rotating


def _sample(seed: int) -> None:
    from dreambooth.training import sample_images

    _on(sample_images, "grid", _nothing, after=seed % 5)


def _export(seed: int) -> None:
    from dreambooth.serialization import export

    _on(export.shutil, "copyfile", _nothing)


def _result(seed: int) -> None:
    from dreambooth.runs.run_folder import Result

    _on(Result, "write", _nothing)


def _metrics_flush(seed: int) -> None:
    from dreambooth.tracking import journal

    class HalfWriting:
        """os, but the write of a line stops in its middle."""

        def __init__(self) -> None:
            self.lines = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, file: int, line: bytes) -> int:
            self.lines += 1
            if self.lines > 8 + seed % 6:
                os.write(file, line[:len(line) // 2])
                die()
            return os.write(file, line)

    journal.os = HalfWriting()


def _random_moment(seed: int) -> None:
    from dreambooth import run

    step, dice = run.train_step, random.Random(seed)
    first, delay = dice.randrange(1, 8), dice.random() * 0.4

    def stepping(state: Any, *args: Any, **kwargs: Any) -> Any:
        info = step(state, *args, **kwargs)
        if state.step == first:
            threading.Timer(delay, die).start()
        return info

    run.train_step = stepping


def _no_memory(seed: int) -> None:
    import torch

    from dreambooth.training import step

    def objective(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    step.Objective.__call__ = objective


def _freed_is_given_back() -> None:
    """A freed tensor of 128 KiB or more leaves the address space: what earlier steps freed is no reserve for later."""
    import ctypes

    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)  # the user's own choice: the product sets up nothing
    m_mmap_threshold = -3  # of <malloc.h>
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**17) == 1


def _limited(mib: int) -> None:
    """Give this process so much address space more than it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _little_memory_in_step_3(seed: int) -> None:
    from dreambooth import run

    step = run.train_step
    _freed_is_given_back()

    def stepping(state: Any, *args: Any, **kwargs: Any) -> Any:
        if state.step == 2:
            _limited(256)
        return step(state, *args, **kwargs)

    run.train_step = stepping


def _little_memory_in_class_images(seed: int) -> None:
    from dreambooth.data import class_images

    make = class_images.generate_missing
    _freed_is_given_back()

    def making(*args: Any, **kwargs: Any) -> Any:
        _limited(64)
        return make(*args, **kwargs)

    class_images.generate_missing = making


def _no_disk(seed: int) -> None:
    from dreambooth.runs import run_folder

    usage = run_folder.shutil.disk_usage(".")
    run_folder.shutil.disk_usage = lambda path: usage._replace(free=10**6)


def _bug(seed: int) -> None:
    from dreambooth import run

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a bug of ours")

    run.train_step = broken


def _signal_at_step(number: int) -> Callable[[int], None]:
    def fault(seed: int) -> None:
        from dreambooth import run

        step = run.train_step

        def stepping(state: Any, *args: Any, **kwargs: Any) -> Any:
            info = step(state, *args, **kwargs)
            if state.step == 3:
                os.kill(os.getpid(), number)
            return info

        run.train_step = stepping

    return fault


def _evaluation_between(seed: int) -> None:
    from dreambooth.evaluation.evaluator import Evaluator

    _on(Evaluator, "evaluate", _nothing, after=2)


def _evaluation_half(seed: int) -> None:
    from dreambooth.evaluation import evaluator

    _on(evaluator, "grid", _nothing, after=7)


def _evaluation_unkept(seed: int) -> None:
    from dreambooth.training import best_weights

    _on(best_weights, "save", _nothing)


def _evaluation_stopped(seed: int) -> None:
    from dreambooth.evaluation import evaluator

    generate, calls = evaluator.generate_images, iter(range(10**9))

    def generating(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:  # after the base and the first step that is measured
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*args, **kwargs)

    evaluator.generate_images = generating


def _second_batch(act: Callable[[], None]) -> Callable[[int], None]:
    """Before generate has the second batch of its pictures."""
    def fault(seed: int) -> None:
        from dreambooth.inference import generate_images as drawing

        generate = drawing.generate_images

        def generating(*args: Any, **kwargs: Any) -> Any:
            for number, batch in enumerate(generate(*args, **kwargs)):
                if number == 1:
                    act()
                yield batch

        drawing.generate_images = generating

    return fault


def _asked_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _asked_twice() -> None:
    _asked_to_stop()
    _asked_to_stop()


def _card_is_full() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


# Ends that are not kills.
OTHERS: dict[str, Callable[[int], None]] = {
    "no_memory": _no_memory,
    "no_disk": _no_disk,
    "little_memory_in_step_3": _little_memory_in_step_3,
    "little_memory_in_class_images": _little_memory_in_class_images,
    "bug": _bug,
    "sigterm": _signal_at_step(signal.SIGTERM),
    "ctrl_c": _signal_at_step(signal.SIGINT),
    "evaluation_stopped": _evaluation_stopped,
    "drawing_stopped": _second_batch(_asked_to_stop),
    "drawing_stopped_twice": _second_batch(_asked_twice),
    "no_memory_to_draw": _second_batch(_card_is_full),
}

# Kills in runs that evaluate.
EVALUATING: dict[str, Callable[[int], None]] = {
    "evaluation_between": _evaluation_between,
    "evaluation_half": _evaluation_half,
    "evaluation_unkept": _evaluation_unkept,
}

FAULTS: dict[str, Callable[[int], None]] = {
    "class_image": _class_image,
    "checkpoint_write": _checkpoint_write,
    "checkpoint_fsync": _checkpoint_fsync,
    "checkpoint_rename": _checkpoint_rename,
    "checkpoint_rotate": _checkpoint_rotate,
    "sample": _sample,
    "export": _export,
    "result": _result,
    "metrics_flush": _metrics_flush,
    "random_moment": _random_moment,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
