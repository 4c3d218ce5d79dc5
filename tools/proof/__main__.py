"""`make proof`: measures whether DreamBooth training works, and writes docs/proof.md.

It trains the demo subject with several seeds, with and without prior preservation, and measures new samples of each
model. Runs and samples in build/proof are reused when the command is repeated.
"""

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path

from tools.proof import report
from tools.proof.experiment import (
    BASE,
    CLASS_PROMPT,
    DEMO,
    FIRST_SEED,
    FIRST_TUNING_SEED,
    RECIPE,
    ROOT,
    SAMPLER,
    SUBJECT_PROMPT,
    VIEWS,
    Experiment,
    Variant,
    drift,
    gap,
    sample_folder,
)

HALF_WEIGHTS = ("precision=bf16", "memory.weights=half")
VARIANTS = (
    Variant("with prior preservation"),
    Variant("without", ("prior.with_prior_preservation=false",)),
    Variant("half weights, stochastic rounding", (*HALF_WEIGHTS, "memory.rounding=stochastic"), seeds=(11,)),
    Variant("half weights, Kahan summation", (*HALF_WEIGHTS, "memory.rounding=kahan"), seeds=(11,)),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof")
    parser.add_argument("--tune", nargs="*", metavar="KEY=VALUE",
                        help="instead of the proof, train the tuning subject with these settings and print the result")
    options = parser.parse_args()
    if options.tune is None:
        prove(Experiment(options.folder, FIRST_SEED))
    else:
        tune(Experiment(options.folder, FIRST_TUNING_SEED), options.tune)


def prove(experiment: Experiment) -> None:
    """Train and measure all variants, and write docs/proof.md."""
    start = time.monotonic()
    base = experiment.measure("base", BASE, DEMO)
    reference = experiment.reference(DEMO, VIEWS / "demo-held-out")
    runs = {variant.name: [experiment.run_variant(variant, seed) for seed in variant.seeds] for variant in VARIANTS}
    sheet = ROOT / "docs/images/proof.png"
    experiment.draw_sheet([base, *runs["with prior preservation"], *runs["without"]], sheet)
    report.write(ROOT / "docs/proof.md", base, reference, runs, sheet, {
        "minutes": f"{(time.monotonic() - start) / 60:.0f}", "date": time.strftime("%Y-%m-%d"),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")),
        "python": platform.python_version(), "sampler": f"{SAMPLER.num_inference_steps} DPM-Solver++ steps, "
        f"guidance {SAMPLER.guidance_scale}", "first_seed": str(FIRST_SEED), "recipe": " ".join(RECIPE)})
    print("wrote docs/proof.md")


def tune(experiment: Experiment, overrides: list[str]) -> None:
    """Train the tuning subject with `overrides`, and print the result in one line."""
    photos = VIEWS / "tuning"
    base = experiment.measure("base", BASE, photos)
    reference = experiment.reference(photos, VIEWS / "tuning-held-out")
    model, seconds = experiment.train([
        "dataset=folder", f"dataset.instance_dir={photos}", f"dataset.instance_prompt={SUBJECT_PROMPT}",
        f"dataset.class_prompt={CLASS_PROMPT}", *overrides])
    trained = experiment.measure(sample_folder(model), model, photos)
    plain, scenes = gap(trained.plain, base.plain, reference), gap(trained.scenes, base.scenes, reference)
    in_kept = gap(trained.kept_scenes, base.scenes, reference)
    print(f"plain {plain:.0%}  scenes {scenes:.0%}  kept {trained.scenes_kept:.0%} (gap {in_kept:.0%})  "
          f"drift {drift(trained, base):.3f}  {seconds:.0f} s  "
          f"{' '.join(overrides)}", flush=True)


if __name__ == "__main__":
    main()
