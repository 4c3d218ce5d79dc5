"""One process of gpu.py: python benchmarks/gpu_runs/worker.py JOB.json RESULT.json

The job is {"do": "card" | "plan" | "run" | "check", ...}. The result is a JSON object. If the work failed, it has the
key "error" with one line, and "expected": true if the line is a message of dreambooth to its user. A crash of this
process, or a lack of memory, ends no other configuration.
"""

import json
import os
import platform
import resource
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "hydra", "omegaconf", "safetensors", "PIL", "numpy",
          "psutil", "filelock", "yaml")
OPTIONAL = ("bitsandbytes", "xformers", "peft", "triton", "torchvision")
MAX_STORED = 2000  # characters of an error


def describe_card(job: dict[str, Any]) -> dict[str, Any]:
    """Return the device, its driver, the versions of the packages, and those that are missing."""
    found: dict[str, Any] = {
        "device": "cpu", "python": platform.python_version(), "cores": os.cpu_count(), "driver": None,
        "missing": [name for name in NEEDED if find_spec(name) is None], "versions": {}}
    for name in (*NEEDED[:4], *OPTIONAL):
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    if found["missing"]:
        return found
    import psutil
    import torch

    found["host_gib"] = psutil.virtual_memory().total / 2**30
    if job["device"] == "cpu" or (job["device"] == "auto" and not torch.cuda.is_available()):
        return found | {"name": platform.processor() or platform.machine()}
    torch.cuda.init()  # raises an error that says why there is no card
    card = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return found | {
        "device": "cuda", "name": card.name, "capability": card.major + card.minor / 10,
        "memory_gib": card.total_memory / 2**30, "free_gib": free / 2**30, "used_by_others_gib": (total - free) / 2**30,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": _driver()}


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, from the kernel module or from nvidia-smi; None: unknown."""
    import re
    import shutil
    import subprocess

    path = Path("/proc/driver/nvidia/version")
    if path.is_file() and (found := re.search(r"\d+\.\d+(\.\d+)?", path.read_text("utf-8", errors="replace"))):
        return found[0]
    if command := shutil.which("nvidia-smi"):
        answer = subprocess.run([command, "--query-gpu=driver_version", "--format=csv,noheader"], check=False,
                                capture_output=True, text=True, timeout=20)
        return answer.stdout.strip().split("\n")[0] or None
    return None


def resolve(overrides: list[str], run_dir: Path) -> Any:
    """Return the recipe of a run, and set the options of PyTorch's allocator that it needs."""
    from hydra import compose, initialize_config_dir

    from dreambooth import cli
    from dreambooth.config.compose import conf_dir, load
    from dreambooth.config.recipe import resolve as resolve_recipe
    from dreambooth.runs import identity
    from dreambooth.utils.hardware import detect_machine

    identity.register_resolver()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = load(compose("config", overrides))
    cli.configure_allocator(config.memory)  # before torch is imported
    return resolve_recipe(config, run_dir, detect_machine())


def plan(job: dict[str, Any]) -> dict[str, Any]:
    """Return the planner's figures for a run."""
    recipe = resolve(job["overrides"], Path(job["folder"]))
    from dreambooth.models.loading import import_libraries
    from dreambooth.planner import auto_memory, report

    import_libraries()
    choice = auto_memory.choose_memory_options(recipe)
    planned = report.Plan(choice.recipe, choice.prediction, choice.added, choice.why, [])
    figures = report.plan_as_dict(planned)
    names = ("fits", "card_gib", "reserved_gib", "usable_vram_gib", "host_gib", "disk_gib", "by_phase", "step_seconds",
             "step_flops")
    # The runs write neither checkpoints nor models, so that the size of the disk does not matter.
    shortfall = planned.shortfall or ""
    return {name: figures[name] for name in names} | {
        "fits": planned.fits or " GiB of disk" in shortfall, "shortfall": shortfall}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a configuration without writing checkpoints and models, and return its peaks."""
    from gpu_runs import bases

    recipe = resolve(job["overrides"], Path(job["folder"]))
    bases.install_random_weights()
    import torch

    from dreambooth import run as run_module
    from dreambooth.runtime.memory_meter import MemoryMeter
    from dreambooth.training import checkpoint, setup

    result: dict[str, Any] = {}
    meters: list[MemoryMeter] = []

    class StoredMeter(MemoryMeter):
        """A meter whose peaks are known after a failure, too."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            meters.append(self)

    def no_export(*_: Any) -> Path:
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            result["outside_gib"] = (total - free - torch.cuda.memory_reserved()) / 2**30
        return recipe.run_dir / "model"

    run_module.MemoryMeter = StoredMeter  # type: ignore[misc]
    run_module.export.export = no_export  # type: ignore[assignment]
    run_module.instance_loss = lambda *_: 0.0  # type: ignore[assignment]
    checkpoint.save = lambda *_: recipe.run_dir  # type: ignore[assignment]
    setup.run_folder.check_disk_space = lambda *_: None
    try:
        execute(recipe)
    except BaseException as error:
        result |= describe(error)
    return result | {"peaks": meters[0].peaks if meters else {},
                     "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def execute(recipe: Any) -> None:
    """Run a recipe as `python -m dreambooth.train` does."""
    from dreambooth.run import execute as execute_run
    from dreambooth.utils.signals import StopRequest

    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    execute_run(recipe, StopRequest())


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Run the reference and each variant, and compare the trained weights after the last step.

    All of them use PyTorch's deterministic algorithms. The variant REPEATED shows whether these are enough.
    """
    from gpu_runs import bases
    from gpu_runs.cases import RESUMED

    folder, steps = Path(job["folder"]), job["steps"]
    recipe = resolve([*job["overrides"], f"train.max_train_steps={steps}"], folder / "reference")
    if job["random_weights"]:
        bases.install_random_weights()
    import torch

    from dreambooth import run as run_module

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    run_module.export.export = lambda *_: folder / "model"  # type: ignore[assignment]
    rows: dict[str, Any] = {}
    execute(recipe)
    start = initial_weights(job, folder, steps)
    reference = trained_weights(folder / "reference")
    for name, own in job["variants"].items():
        try:
            target = folder / name.replace(" ", "_")
            for count in (steps // 2, steps) if name == RESUMED else (steps,):
                execute(resolve([*job["overrides"], *own, f"run_root={target}", f"train.max_train_steps={count}"],
                                target / "run"))
            rows[name] = compare(reference, trained_weights(target / "run"), start)
        except BaseException as error:
            rows[name] = describe(error)
            if isinstance(error, KeyboardInterrupt):
                raise
        Path(job["partial"]).write_text(json.dumps({"rows": rows}), "utf-8")
    return {"rows": rows}


def initial_weights(job: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """Return the trained weights after half of the steps: their distance from the last ones is the size of updates."""
    target = folder / "half"
    execute(resolve([*job["overrides"], f"run_root={target}", f"train.max_train_steps={max(1, steps // 2)}"],
                    target / "run"))
    return trained_weights(target / "run")


def trained_weights(run_dir: Path) -> dict[str, Any]:
    """Read the trained weights of the newest checkpoint of a run."""
    from safetensors.torch import load_file

    newest = max((run_dir / "checkpoints").glob("step-*"))
    return load_file(newest / "trained.safetensors")


def compare(reference: dict[str, Any], other: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return whether two sets of weights are equal, bit for bit, and their distance.

    The distance is the largest difference of two weights, divided by the largest difference between the reference and
    the weights of the reference's run at an earlier step.
    """
    if reference.keys() != other.keys():
        return {"error": "the runs trained different weights"}
    largest = max(float((reference[name] - other[name]).abs().max()) for name in reference)
    moved = max(float((reference[name] - earlier[name]).abs().max()) for name in reference)
    return {"equal": all(reference[name].equal(other[name]) for name in reference), "largest": largest,
            "relative": largest / moved if moved else None}


def describe(error: BaseException) -> dict[str, Any]:
    """Return the entries of a result that say how the work failed, and print the traceback of a fault."""
    from dreambooth.errors import DreamBoothError

    expected = isinstance(error, DreamBoothError)
    if not expected:
        traceback.print_exception(error)
    text = str(error).strip() or type(error).__name__
    return {"error": (text if expected else f"{type(error).__name__}: {text}")[:MAX_STORED], "expected": expected,
            "out_of_memory": type(error).__name__ in ("OutOfMemory", "OutOfMemoryError")}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    started = time.monotonic()
    do = {"card": describe_card, "plan": plan, "run": run, "check": check}[job["do"]]
    try:
        result = do(job)
    except BaseException as error:
        result = describe(error)
    result["seconds"] = time.monotonic() - started
    target = Path(sys.argv[2])
    temporary = target.with_suffix(".writing")
    temporary.write_text(json.dumps(result), "utf-8")
    temporary.replace(target)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the destructors of CUDA and of background threads, which may hang after an error


if __name__ == "__main__":
    main()
