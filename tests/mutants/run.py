"""Put each known bug into a copy of the code and show that the test it names fails: `make mutants`.

A mutant is a table in one of the .toml files beside this one: the trap, the test, and edits that replace a text which
stands once in its file. The test must pass on an unbroken copy first: one that fails anyway would find every mutant.

    python tests/mutants/run.py [--seen-green | --check] [NAME ...]

--seen-green: all tests have just passed here, so that they are not run on unbroken code again.
--check: only look whether every text stands once in its file.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("dreambooth", "hydra_plugins", "conf", "tests", "tools", "benchmarks", "workflows", "pyproject.toml")
# What most tests import: loaded once here, and shared by every process that is forked for a mutant.
PRELOADED = ("torch", "pytest", "hypothesis", "hydra", "PIL.Image", "safetensors.torch", "peft", "accelerate",
             "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
             "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "mlflow", "boto3")
TIMEOUT = 600  # seconds of one test


@dataclass(frozen=True)
class Mutant:
    """A bug that was made on purpose, and the test that finds it."""

    name: str
    test: str
    edits: tuple[tuple[str, str, str], ...]  # file, text, what it becomes


def mutants() -> list[Mutant]:
    """All of them, by name.

    Raises:
        SystemExit: a text to replace does not stand exactly once in its file.
    """
    found = []
    for file in sorted(Path(__file__).parent.glob("*.toml")):
        for name, table in tomllib.loads(file.read_text(encoding="utf-8")).items():
            edits = tuple((edit["file"], edit["before"], edit["after"]) for edit in table["edits"])
            found.append(Mutant(name, table["test"], edits))
    stale = [f"{mutant.name}: its text stands {count} times in {file}" for mutant in found
             for file, before, _ in mutant.edits if (count := _count(before, ROOT / file)) != 1]
    if stale:
        raise SystemExit("\n".join(stale))
    return sorted(found, key=lambda mutant: mutant.name)


def _count(text: str, file: Path) -> int:
    return file.read_text(encoding="utf-8").count(text) if file.is_file() else 0


def results(jobs: Iterable[tuple[str, Mutant | None]]) -> Iterator[tuple[str, Mutant | None, int, str]]:
    """Run (test, mutant) pairs, one process per core; yields each with pytest's exit code and output as it ends."""
    running: dict[int, tuple[str, Mutant | None, Path]] = {}
    waiting = iter(jobs)
    while True:
        while len(running) < (os.cpu_count() or 1) and (job := next(waiting, None)) is not None:
            folder = Path(tempfile.mkdtemp(prefix="mutant-"))
            if not (process := os.fork()):
                os._exit(_test(*job, folder))
            running[process] = (*job, folder)
        if not running:
            return
        process, status = os.wait()
        test, mutant, folder = running.pop(process)
        output = (folder / "output").read_text(encoding="utf-8", errors="replace")
        shutil.rmtree(folder)
        yield test, mutant, os.waitstatus_to_exitcode(status), output


def _test(test: str, mutant: Mutant | None, folder: Path) -> int:
    """In a forked process: run the test on a copy of the code, with the mutant's bug in it."""
    signal.alarm(TIMEOUT)
    with (folder / "output").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    ignore = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, copy_function=os.link, ignore=ignore)
        else:
            shutil.copy(ROOT / part, folder / part)
    for name, before, after in mutant.edits if mutant else ():
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).unlink()  # a link to the original until now
        (folder / name).write_text(text.replace(before, after), encoding="utf-8")
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    code = int(import_module("pytest").main(["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", test]))
    sys.stdout.flush()
    return code


def main() -> None:
    seen_green, names = "--seen-green" in sys.argv[1:], {word for word in sys.argv[1:] if not word.startswith("-")}
    chosen = [mutant for mutant in mutants() if not names or mutant.name in names]
    if "--check" in sys.argv[1:]:
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    for module in PRELOADED:
        with contextlib.suppress(ImportError):
            import_module(module)
    green = [] if seen_green else [(test, None) for test in sorted({mutant.test for mutant in chosen})]
    alive, broken = [], []
    for test, mutant, code, output in results([*green, *((mutant.test, mutant) for mutant in chosen)]):
        if mutant and code in (0, 1):
            print(f"{'red' if code else 'SURVIVED'}  {mutant.name}", flush=True)
            alive += [mutant.name] * (not code)
        elif code:
            broken.append(test)
            print(f"{mutant.name if mutant else 'unbroken code'}: {test} cannot be run, or fails\n{output[-3000:]}",
                  flush=True)
    print(f"{len(chosen) - len(alive) - len(broken)} of {len(chosen)} mutants found")
    sys.exit(bool(alive or broken))


if __name__ == "__main__":
    main()
