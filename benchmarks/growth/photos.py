"""Measures the growth of a run's cost with photos, captions and steps: python -m benchmarks.growth.photos [--write]

For each number of photos n, a folder with n JPEGs of 12 megapixels and a metadata.jsonl with n captions is made. Three
processes then prepare the same run of the tiny base model, with latents on disk, up to its first step:

- first: nothing is known about the photos;
- second: the same command again;
- killed: the first half of the latents is missing, as after a kill.

The phases are functions of `training/setup.py`, timed from outside. The first process also draws batches as the
training loop does. Times are CPU seconds of all threads, and wall time: a busy machine changes the latter.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed_table import describe_machine, write_section

SIZES = (10, 100, 1000)
DISTINCT = 8  # pictures, from which the others are made, see `recolor`
BATCHES = 100  # batches that the first process draws, half of them to warm up
PHASES = ("hash", "decode", "check", "prompts", "latents")
KINDS = ("first", "second", "killed")
PAGE = "growth.md"
Results = dict[int, dict[str, dict[str, float]]]  # number of photos -> kind of the start -> measure -> value


def recolor(jpeg: bytes, luma: int, chroma: int) -> bytes:
    """Return a JPEG of other brightness and colours: with these steps of quantisation of the mean of each block.

    Encoding a picture of 12 megapixels would take much longer.
    """
    content = bytearray(jpeg)
    start = 0
    while (start := content.find(b"\xff\xdb", start)) >= 0:
        end = start + 2 + int.from_bytes(content[start + 2:start + 4], "big")
        for table in range(start + 4, end, 65):  # the number of the table, then 64 values, that of the mean first
            content[table + 1] = chroma if content[table] & 15 else luma
        start = end
    return bytes(content)


def make_photos(folder: Path, count: int) -> None:
    """Write `count` JPEGs of 4000 x 3000 pixels, with captions of their own."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    pictures = []
    for number in range(min(count, DISTINCT)):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        path = folder / f"{number}.tmp"
        coarse.resize((4000, 3000), Image.Resampling.BICUBIC).save(path, format="JPEG", quality=40)
        pictures.append(path.read_bytes())
        path.unlink()
    for number in range(count):
        variant, picture = divmod(number, len(pictures))
        jpeg = recolor(pictures[picture], 10 + variant % 40, 10 + variant // 40)
        (folder / f"{number:05d}.jpg").write_bytes(jpeg)
    lines = (json.dumps({"file_name": f"{number:05d}.jpg", "text": f"a photo of a zwx toy, number {number}"})
             for number in range(count))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare(photos: Path, run_root: Path, batches: int) -> dict[str, float]:
    """Prepare a run up to its first step, in this process, and return seconds, counts and the peak of its memory."""
    from dreambooth.models import loading

    loading.import_libraries()
    from hydra import compose, initialize_config_dir

    from dreambooth.config.compose import conf_dir, load
    from dreambooth.config.recipe import resolve
    from dreambooth.data import photos as photo_files
    from dreambooth.data.index import file_hashes
    from dreambooth.runtime.engine import create_engine
    from dreambooth.runtime.memory_meter import MemoryMeter
    from dreambooth.training import setup
    from dreambooth.utils.console import Console

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = load(compose("config", [
            f"run_root={run_root}", "hardware=cpu", "tracking=none", "train.use_ema=false",
            "train.max_train_steps=1000",
            f"dataset.instance_dir={photos}", "prior.with_prior_preservation=false", "memory.latent_cache=disk",
            "sample.every=null", "evaluate.encoder=none", "train.train_batch_size=4"]))
    recipe = resolve(config, run_root / "run")
    engine, accelerator = create_engine(recipe.device, recipe.precision.dtype)
    spent: dict[str, float] = {}
    decoded = 0

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - cpu
                spent[f"{name} wall"] = spent.get(f"{name} wall", 0.0) + time.perf_counter() - wall
        return call

    decode = photo_files._decode

    def counted(*args: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(*args)

    photo_files._decode = counted
    setup.subjects.load_subject_photos = timed("decode", setup.subjects.load_subject_photos)
    setup.photo_report.describe_photos = timed("check", setup.photo_report.describe_photos)
    setup._check_prompts = timed("prompts", setup._check_prompts)
    setup._build_prompt_encoder = timed("prompts", setup._build_prompt_encoder)
    setup._build_latents = timed("latents", setup._build_latents)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timed("hash", file_hashes.fingerprint)(photos, run_root=run_root)
    made = timed("all", setup.assemble)(recipe, engine, accelerator, Console(quiet=True), MemoryMeter(engine.device))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if batches:
        for step in range(batches):
            if step == batches // 2:
                start = time.process_time()
            made.batches(step)
        spent["batch"] = (time.process_time() - start) / (batches - batches // 2)
    return spent | {"decoded": decoded, "peak_mib": after / 1024, "grown_mib": (after - before) / 1024}


def in_process(photos: Path, run_root: Path, batches: int = 0) -> dict[str, float]:
    """Run `prepare` in a new process."""
    command = [sys.executable, "-m", "benchmarks.growth.photos", "--prepare", str(photos), str(run_root), str(batches)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    measured: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    return measured


def measure(count: int, folder: Path) -> dict[str, dict[str, float]]:
    """Measure the three processes for a number of photos."""
    photos, run_root = folder / "photos", folder / "runs"
    run_root.mkdir(parents=True)
    make_photos(photos, count)
    time.sleep(3)  # the hashes of files that have just been written are not stored
    found = {"first": in_process(photos, run_root, BATCHES)}
    files = [path for path in run_root.rglob("*") if path.is_file()]
    found["first"] |= {"files": len(files), "kib": sum(path.stat().st_size for path in files) / 1024,
                       "photo_kib": sum(path.stat().st_size for path in photos.iterdir()) / 1024 / count}
    found["second"] = in_process(photos, run_root)
    latents = sorted((run_root / "latents").iterdir())
    for path in latents[len(latents) // 2:]:
        path.unlink()
    found["killed"] = in_process(photos, run_root)
    return found


def photo_rows(results: Results) -> Iterator[str]:
    """Yield the table of the section `photos`: a row per number of photos, and what each more photo costs.

    The latter is the difference between the two largest numbers of photos, divided by the difference of the numbers.
    """
    names = " | ".join(f"{name}, s" for name in PHASES)
    yield f"| start | photos | decoded | {names} | all, s | wall, s | peak RSS, MiB |"
    yield "|---|---|---|" + "---|" * (len(PHASES) + 3)
    for kind in KINDS:
        for count, found in results.items():
            one = found[kind]
            phases = " | ".join(f"{value:.2f}" for value in _cpu_seconds(one))
            wall = one["hash wall"] + one["all wall"]
            yield f"| {kind} | {count:,} | {one['decoded']:,.0f} | {phases} | {wall:.1f} | {one['peak_mib']:.0f} |"
        *_, (fewer, less), (more, many) = ((count, found[kind]) for count, found in results.items())
        each = [1000 * (after - before) / (more - fewer)
                for before, after in zip(_cpu_seconds(less), _cpu_seconds(many), strict=True)]
        memory = 1024 * (many["peak_mib"] - less["peak_mib"]) / (more - fewer)
        yield f"| {kind} | each more | | {' | '.join(f'{value:.2f} ms' for value in each)} | | {memory:.1f} KiB |"


def _cpu_seconds(one: dict[str, float]) -> list[float]:
    return [*(one[name] for name in PHASES), one["hash"] + one["all"]]


def step_rows(results: Results) -> Iterator[str]:
    """Yield the table of the section `steps`."""
    yield "| photos and captions | batch of 4, ms | files in the run root | KiB in the run root |"
    yield "|---|---|---|---|"
    for count, found in results.items():
        first = found["first"]
        yield f"| {count:,} | {1000 * first['batch']:.2f} | {first['files']:.0f} | {first['kib']:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of photos; 10000 need 4 GB")
    parser.add_argument("--write", action="store_true", help=f"write the tables to docs/{PAGE}")
    parser.add_argument("--prepare", nargs=3, metavar=("PHOTOS", "RUN_ROOT", "BATCHES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        photos, run_root, batches = options.prepare
        print(json.dumps(prepare(Path(photos), Path(run_root), int(batches))))
        return
    import torch

    results = {}
    for count in sorted(options.sizes):
        with tempfile.TemporaryDirectory() as folder:
            results[count] = measure(count, Path(folder))
        print(count, results[count], flush=True)
    machine = describe_machine(torch.get_num_threads())
    size = results[max(results)]["first"]["photo_kib"]
    sections = {"photos": [f"{machine} Files of {size:.0f} KiB.", "", *photo_rows(results)],
                "steps": [machine, "", *step_rows(results)]}
    for name, rows in sections.items():
        print("\n".join(rows))
        if options.write:
            write_section(name, rows, PAGE)


if __name__ == "__main__":
    main()
