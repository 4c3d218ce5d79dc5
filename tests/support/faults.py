"""Runs a command in a process of its own and kills it with SIGKILL, or makes it fail, at a chosen point.

The processes are forked by tests/support/warm_python.py, so that a run takes one second instead of ten.
The product code has no hooks for this: each fault replaces one of its functions inside the process.
"""

import errno
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

from tests.support import moments
from tests.support.warm_python import PYTHON

ROOT = Path(__file__).parents[2]
FAST = [
    "hardware=cpu", "tracking=none", "train.max_train_steps=8", "train.train_batch_size=1", "checkpoint.every=2",
    "prior.num_class_images=2", "prior.sample_batch_size=1", "prior.num_inference_steps=2",
    "sample.every=4", "sample.num_inference_steps=2", "sample.images_per_prompt=1",
    "evaluate.encoder=none",
]


def train(run_root: Path, *overrides: str, fault: str | None = None, seed: int = 0, log: Path | None = None) -> int:
    """Run `python -m dreambooth.train` with FAST settings. Returns the exit code, -9 if it was killed."""
    return call("train", [f"run_root={run_root}", *FAST, *overrides], fault, seed, log)


def call(command: str, arguments: Sequence[str], fault: str | None = None, seed: int = 0,
         log: Path | None = None) -> int:
    """Run `python -m dreambooth.COMMAND` with exactly these arguments. Returns the exit code; output goes to `log`."""
    words = [PYTHON, "-m", "tests.support.faults", command, fault or "", str(seed), json.dumps(list(arguments))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if log is None:
        return subprocess.run(words, env=environment, timeout=600, check=False).returncode
    with log.open("ab") as file:
        return subprocess.run(words, env=environment, timeout=600, check=False, stdout=file, stderr=file).returncode


def main(command: str, fault: str, seed: str, arguments: str) -> None:
    """Inside the process: install the fault, or the moment of a signal, and run the command."""
    sys.argv = [f"dreambooth/{command}.py", *json.loads(arguments)]
    if fault:
        (FAULTS | EVALUATING | OTHERS | moments.FAULTS)[fault](int(seed))
    importlib.import_module(f"dreambooth.{command}").main()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(module: Any, name: str, act: Callable[..., None], after: int = 0) -> None:
    """Replace module.name so that call number `after` + 1 passes its arguments to `act` and then kills the process."""
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

    _die_at(Image.Image, "save", lambda image, path, **_: Path(path).write_bytes(b"\x89PNG half"), after=seed % 2)


def _checkpoint_write(seed: int) -> None:
    from dreambooth.training import checkpoint

    _die_at(checkpoint, "save_file", lambda tensors, path: Path(path).write_bytes(b"half"), after=1 + 3 * (seed % 3))


def _checkpoint_fsync(seed: int) -> None:
    from dreambooth.training import checkpoint
    from dreambooth.utils import atomic_files

    save = checkpoint.save

    def saving(*args: Any, **kwargs: Any) -> Any:
        _die_at(atomic_files, "sync", _nothing, after=seed % 4)
        return save(*args, **kwargs)

    checkpoint.save = saving


def _checkpoint_rename(seed: int) -> None:
    from dreambooth.training import checkpoint
    from dreambooth.utils import atomic_files

    save, saves = checkpoint.save, iter(range(10**9))

    def saving(*args: Any, **kwargs: Any) -> Any:
        if next(saves) == 1 + seed % 2:
            _die_at(atomic_files, "publish", _nothing)
        return save(*args, **kwargs)

    checkpoint.save = saving


def _checkpoint_rotate(seed: int) -> None:
    from dreambooth.training import checkpoint
    from dreambooth.utils import atomic_files

    def half_removed(path: Path, **_: Any) -> None:
        next(iter(sorted(path.iterdir()))).unlink()

    rotate = checkpoint.rotate

    def rotating(*args: Any) -> None:
        _die_at(atomic_files.shutil, "rmtree", lambda path, **kw: None if kw else half_removed(path), after=1)
        rotate(*args)

    checkpoint.rotate = rotating


def _sample(seed: int) -> None:
    from dreambooth.training import sample_images

    _die_at(sample_images, "grid", _nothing, after=seed % 5)


def _export(seed: int) -> None:
    from dreambooth.serialization import export

    _die_at(export.shutil, "copyfile", _nothing)


def _result(seed: int) -> None:
    from dreambooth.runs.run_folder import Result

    _die_at(Result, "write", _nothing)


def _metrics_flush(seed: int) -> None:
    from dreambooth.tracking import journal

    class HalfWriting:
        """The module os, but one write of a line stops halfway and kills the process."""

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

    step, generator = run.train_step, random.Random(seed)
    first, delay = generator.randrange(1, 8), generator.random() * 0.4

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


def _return_freed_memory() -> None:
    """Make malloc return freed tensors of 128 KiB or more to the system, so that later steps cannot reuse them."""
    import ctypes
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)  # set by the user, so that the product sets nothing itself
    m_mmap_threshold = -3  # of <malloc.h>
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**17) == 1


def _limit_memory(mib: int) -> None:
    """Limit the address space of this process to `mib` MiB more than it uses now."""
    import resource

    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _little_memory_in_step_3(seed: int) -> None:
    from dreambooth import run

    step = run.train_step
    _return_freed_memory()

    def stepping(state: Any, *args: Any, **kwargs: Any) -> Any:
        if state.step == 2:
            _limit_memory(256)
        return step(state, *args, **kwargs)

    run.train_step = stepping


def _little_memory_in_class_images(seed: int) -> None:
    from dreambooth.data import class_images

    make = class_images.generate_missing
    _return_freed_memory()

    def making(*args: Any, **kwargs: Any) -> Any:
        _limit_memory(64)
        return make(*args, **kwargs)

    class_images.generate_missing = making


def _few_file_handles(count: int) -> None:
    """Limit the open files to `count` more than now."""
    import resource

    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    while os.dup(0) <= highest:  # leave no free number below the highest one
        pass
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2 + count,) * 2)


def _no_disk(seed: int) -> None:
    from dreambooth.runs import run_folder

    usage = run_folder.shutil.disk_usage(".")
    run_folder.shutil.disk_usage = lambda path: usage._replace(free=10**6)


def _full_disk(seed: int) -> None:
    """The disk is full from image number `seed` + 1 on."""
    from PIL import Image

    calls = iter(range(10**9))

    def failing(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(one, Path) and one.suffix == ".png" for one in args) and next(calls) >= seed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*args, **kwargs)
        return call

    setattr(Image.Image, "save", failing(Image.Image.save))  # noqa: B010
    setattr(Path, "write_bytes", failing(Path.write_bytes))  # noqa: B010


def _bug(seed: int) -> None:
    from dreambooth import run

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a simulated bug")

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

    _die_at(Evaluator, "evaluate", _nothing, after=2)


def _evaluation_half(seed: int) -> None:
    from dreambooth.evaluation import evaluator

    _die_at(evaluator, "grid", _nothing, after=7)


def _evaluation_unsaved(seed: int) -> None:
    from dreambooth.training import best_weights

    _die_at(best_weights, "save", _nothing)


def _evaluation_stopped(seed: int) -> None:
    from dreambooth.evaluation import evaluator

    generate, calls = evaluator.generate_images, iter(range(10**9))

    def generating(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:  # after the base, its images of the evaluation texts, and the first evaluated step
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*args, **kwargs)

    evaluator.generate_images = generating


def _before_second_batch(act: Callable[[], None]) -> Callable[[int], None]:
    """A fault that calls `act` before the command generate receives its second batch of images."""
    def fault(seed: int) -> None:
        from dreambooth.inference.renderer import Renderer

        original, calls = Renderer.pictures, iter(range(10**9))

        def pictures(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs), next(calls) == 1 and act()

        setattr(Renderer, "pictures", lambda *args: pictures(*args)[0])  # noqa: B010
    return fault


def _request_stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _request_stop_twice() -> None:
    _request_stop()
    _request_stop()


def _fill_gpu() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


# Failures and stop requests other than SIGKILL.
OTHERS: dict[str, Callable[[int], None]] = {
    "no_memory": _no_memory,
    "no_disk": _no_disk,
    "few_file_handles": _few_file_handles,
    "full_disk": _full_disk,
    "little_memory_in_step_3": _little_memory_in_step_3,
    "little_memory_in_class_images": _little_memory_in_class_images,
    "bug": _bug,
    "sigterm": _signal_at_step(signal.SIGTERM),
    "ctrl_c": _signal_at_step(signal.SIGINT),
    "evaluation_stopped": _evaluation_stopped,
    "generation_stopped": _before_second_batch(_request_stop),
    "generation_stopped_twice": _before_second_batch(_request_stop_twice),
    "no_memory_to_generate": _before_second_batch(_fill_gpu),
}

# Kills during evaluation.
EVALUATING: dict[str, Callable[[int], None]] = {
    "evaluation_between": _evaluation_between,
    "evaluation_half": _evaluation_half,
    "evaluation_unsaved": _evaluation_unsaved,
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
