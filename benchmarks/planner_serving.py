"""Compares predictions of inference with published figures: python benchmarks/planner_serving.py [--write]

No setting and no constant is specific to a row. `--write` writes the tables to docs/planner.md.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from dreambooth.config.hardware import presets
from dreambooth.models.inference_memory import PLAIN, InferenceMemory
from dreambooth.models.loading import import_libraries
from dreambooth.planner.serving_plan import plan_serving
from dreambooth.planner.serving_rehearsal import ServedModel, predict_serving
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.hardware import GIB

DOCS = Path(__file__).parents[1] / "docs" / "planner.md"
BEGIN, END = "<!-- benchmarks/planner_serving.py -->\n", "<!-- end of serving -->\n"
OFFLOAD, SLICING = InferenceMemory(cpu_offload=True), InferenceMemory(vae_slicing=True)
SDXL = ServedModel("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", guidance_scale=5.0, batch=4)
SD3 = "sd3_medium"  # the folder that make_sd3 writes
PASCAL, AMPERE = 6.0, 8.0  # compute capability
SMALL = {"size": (512, 512)}
PUBLISHED = [  # name, model, options, capability, published GiB
    ("SDXL, 1024 px, 4 pictures, A100", SDXL, PLAIN, AMPERE, 21.72),
    ("the same, vae_slicing", SDXL, SLICING, AMPERE, 15.40),
    ("the same, cpu_offload", SDXL, OFFLOAD, AMPERE, 20.21),
    ("SD 3 medium, 1024 px, A100", ServedModel(SD3, guidance_scale=7.0), PLAIN, AMPERE, 18.765),
    ("the same, H100", ServedModel(SD3, guidance_scale=7.0), PLAIN, AMPERE, 16.403),
    ("SD 3 medium, 1024 px, A100, cpu_offload", ServedModel(SD3, guidance_scale=7.0), OFFLOAD, AMPERE, 12.0645),
    ("SD 3.5 medium, 512 px, P100, cpu_offload", ServedModel(
        "stabilityai/stable-diffusion-3.5-medium", guidance_scale=7.0, **SMALL), OFFLOAD, PASCAL, 12352.5 / 1024),
    ("SDXL, 512 px, P100", ServedModel(SDXL.source, guidance_scale=5.0, **SMALL), PLAIN, PASCAL, 7663.1 / 1024),
    ("the same, cpu_offload", ServedModel(SDXL.source, guidance_scale=5.0, **SMALL), OFFLOAD, PASCAL, 5472.6 / 1024),
    ("SD 1.4, 512 px, P100", ServedModel("CompVis/stable-diffusion-v1-4"), PLAIN, PASCAL, 3519.1 / 1024),
    ("the same, cpu_offload", ServedModel("CompVis/stable-diffusion-v1-4"), OFFLOAD, PASCAL, 2707.8 / 1024),
    ("SD 2.1 base, 512 px, P100", ServedModel("sd21", "sd21", **SMALL), PLAIN, PASCAL, 3361.6 / 1024),
    ("the same, cpu_offload", ServedModel("sd21", "sd21", **SMALL), OFFLOAD, PASCAL, 2138.6 / 1024)]
SPEEDS = [  # option of hardware, pictures in a batch, published steps per second; SD 1.5, 512 px, fp16, no compiler
    ("p4d", 1, 21.66), ("p4d", 4, 11.6), ("p4d", 16, 3.04), ("g4dn", 1, 6.9), ("g4dn", 4, 1.79), ("g4dn", 16, 1 / 2.34)]


def make_sd3(folder: Path) -> Path:
    """Write the configuration of Stable Diffusion 3 medium, which has neither second attention nor norms of queries."""
    shutil.copytree(Path(resolve_asset("package:architectures")) / "sd35_medium", folder)
    config = folder / "transformer" / "config.json"
    changed = {"dual_attention_layers": [], "qk_norm": None, "pos_embed_max_size": 192}
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changed), "utf-8")
    return folder


def memory_table(sd3: Path) -> list[str]:
    """Return a table of peaks of allocated memory."""
    lines = ["| inference in fp16, published | GiB | predicted | error |", "|---|---|---|---|"]
    for name, model, memory, capability, published in PUBLISHED:
        source = str(sd3) if model.source == SD3 else model.source
        footprint = predict_serving(ServedModel(**(vars(model) | {"source": source})), memory, capability)
        peak = max(usage.allocated for usage in footprint.by_phase.values()) / GIB
        lines.append(f"| {name} | {published:.2f} | {peak:.2f} | {peak / published - 1:+.1%} |")
        print(lines[-1], flush=True)
    return lines


def speed_table() -> list[str]:
    """Return a table of the time of a denoising step."""
    lines = ["| SD 1.5, 512 px, published | ms per step | estimated | error |", "|---|---|---|---|"]
    for option, batch, rate in SPEEDS:
        model, machine = ServedModel("stable-diffusion-v1-5/stable-diffusion-v1-5", batch=batch), presets()[option]
        one, two = (plan_serving(model, machine, PLAIN, steps).seconds_per_picture or 0 for steps in (1, 2))
        step = (two - one) * batch
        lines.append(f"| {machine.gpu}, {batch} at a time | {1000 / rate:.0f} | {1000 * step:.0f} | "
                     f"{step * rate - 1:+.0%} |")
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    import_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        result = "\n".join([*memory_table(make_sd3(Path(scratch) / SD3)), "", *speed_table()]) + "\n"
    if "--write" in sys.argv:
        before, rest = DOCS.read_text("utf-8").split(BEGIN)
        DOCS.write_text(before + BEGIN + result + END + rest.split(END)[1], "utf-8")
