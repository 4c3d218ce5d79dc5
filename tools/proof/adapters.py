"""`python -m tools.proof.adapters`: measures whether LoRA and DoRA learn the demo subject.

It trains and measures in the same way as `python -m tools.proof` does for full training, and writes a section of
docs/proof.md.
"""

# ruff: noqa: E501  long lines of the page template

import argparse
import statistics
import time
from pathlib import Path

from tools.proof.docs_section import write_section
from tools.proof.experiment import BASE, DEMO, FIRST_SEED, RECIPE, ROOT, VIEWS, Experiment, Variant, gap
from tools.proof.report import ADAPTERS_SECTION, TABLE_HEAD, format_row

VARIANTS = (
    Variant("LoRA", ("method=lora", "method.merge=true"), seeds=(11, 12)),
    Variant("DoRA", ("method=dora", "method.merge=true"), seeds=(11, 12)),
)
TUNING = "47 %; with adapters in attention layers only, 36 % (1e-3), 46 % (2e-3, DoRA) and 42 % (3e-3); with all weights trained, 59 %"
SECTION = """
## Adapters

Written by `python -m tools.proof.adapters` on {date}. The settings are {recipe} and otherwise the defaults of
`method=lora` and `method=dora`: adapters of rank 16 in the transformers of UNet and text encoder. An adapter has {share:.0%} of
the number of weights that the sections above train. The learning rate of 2e-3 was chosen on the tuning subject. Gap closed in scenes
on that subject: {tuning}.
The merged model is measured with the prompts and sampling seeds of the sections above.

{head}
{rows}

The percentages below are means over both seeds.

| target | measured | met |
|---|---|---|
{targets}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.adapters", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof-adapters")
    experiment = Experiment(parser.parse_args().folder, FIRST_SEED)
    base, reference = experiment.measure("base", BASE, DEMO), experiment.reference(DEMO, VIEWS / "demo-held-out")
    runs = {variant.name: [experiment.run_variant(variant, seed) for seed in variant.seeds] for variant in VARIANTS}

    def target(name: str, field: str, minimum: float) -> str:
        share = statistics.mean(gap(getattr(run, field), getattr(base, field), reference) for run in runs[name])
        prompts = "plain prompt" if field == "plain" else field
        return (f"| {name} closes at least {minimum:.0%} of the gap, {prompts} | {share:.0%} | "
                f"{'yes' if share >= minimum else '**no**'} |")

    text = SECTION.format(
        head=TABLE_HEAD, date=time.strftime("%Y-%m-%d"), recipe=" ".join(RECIPE), tuning=TUNING, share=_trained_share(),
        rows="\n".join(format_row(name, run, base, reference) for name, some in runs.items() for run in some),
        targets="\n".join(target(name, field, minimum) for name in ("LoRA", "DoRA")
                          for field, minimum in (("plain", 0.65), ("scenes", 0.35))))
    write_section(ROOT / "docs/proof.md", *ADAPTERS_SECTION, text)
    print("wrote docs/proof.md")


def _trained_share() -> float:
    """Return the number of weights that the LoRA trains, divided by the number that `method=full` trains."""
    from hydra import compose, initialize_config_dir

    from dreambooth.config.compose import conf_dir, load
    from dreambooth.config.recipe import resolve
    from dreambooth.planner.skeleton_models import count_trained_weights

    def count(*overrides: str) -> int:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = load(compose("config", [*overrides, "hardware=cpu", "name=x"]))
        return count_trained_weights(resolve(config, Path("x")))

    return count(*VARIANTS[0].overrides) / count()


if __name__ == "__main__":
    main()
