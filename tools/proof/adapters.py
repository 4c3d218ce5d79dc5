"""`python -m tools.proof.adapters`: do LoRA and DoRA learn the demo subject? Trains, measures as the proof does, and
writes the section of docs/proof.md that is between its marks."""

# ruff: noqa: E501  lines of the page

import argparse
import statistics
import time
from pathlib import Path

from tools.proof.__main__ import BASE, DEMO, FRESH, RECIPE, ROOT, VIEWS, Arm, Bench, drift
from tools.proof.report import ADAPTERS, HEAD, gap, line

SEEDS = (11, 12)  # of training
ARMS = (
    Arm("LoRA", ("method=lora", "method.merge=true"), SEEDS),
    Arm("DoRA", ("method=dora", "method.merge=true"), SEEDS),
)
TUNED = "scenes there: 47 %; attention alone with 1e-3, 2e-3 (DoRA), 3e-3: 36, 46, 42 %; every weight: 59 %"
SECTION = """{begin}
## Adapters

By `python -m tools.proof.adapters` on {date}: {recipe} and otherwise the defaults of `method=lora` and
`method=dora`: rank 16 beside the transformers of UNet and text encoder, {share:.0%} of the weights, learning rate 2e-3, chosen on the tuning
subject ({tuned}). Measured from the merged model, with the prompts and
sampling seeds of the sections above, where every weight trains.

{head}
{rows}

| bar | measured | holds |
|---|---|---|
{bars}
{end}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.adapters", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof-adapters")
    bench = Bench(parser.parse_args().folder, FRESH)
    base, reference = bench.measure("base", BASE, DEMO), bench.reference(DEMO, VIEWS / "demo-held-out")
    runs = {arm.name: [bench.run(arm, seed) for seed in arm.seeds] for arm in ARMS}

    def bar(name: str, of: str, least: float) -> str:
        values = [gap(getattr(run, of), getattr(base, of), reference) for run in runs[name]]
        found = statistics.mean(values)
        prompts = "plain prompt" if of == "plain" else of
        return (f"| {name} closes at least {least:.0%} of the gap, {prompts} | {found:.0%} | "
                f"{'yes' if found >= least else '**no**'} |")

    text = SECTION.format(
        head=HEAD, begin=ADAPTERS[0], end=ADAPTERS[1], date=time.strftime("%Y-%m-%d"), recipe=" ".join(RECIPE),
        tuned=TUNED, share=_share(),
        rows="\n".join(line(name, run, base, reference, drift) for name, some in runs.items() for run in some),
        bars="\n".join(bar(name, of, least) for name in ("LoRA", "DoRA")
                       for of, least in (("plain", 0.65), ("scenes", 0.35))))
    page = ROOT / "docs/proof.md"
    before, _, rest = page.read_text("utf-8").partition(ADAPTERS[0])
    page.write_text(before.rstrip() + "\n\n" + text + rest.partition(ADAPTERS[1])[2].lstrip("\n"), encoding="utf-8")
    print("wrote docs/proof.md")


def _share() -> float:
    """Trained weights of the LoRA, of all that `method=full` trains."""
    from hydra import compose, initialize_config_dir

    from dreambooth.config.compose import conf_dir, load
    from dreambooth.config.recipe import resolve
    from dreambooth.planner.skeleton_models import trained_weights

    def count(*words: str) -> int:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return trained_weights(resolve(load(compose("config", [*words, "hardware=cpu", "name=x"])), Path("x")))

    return count(*ARMS[0].overrides) / count()


if __name__ == "__main__":
    main()
