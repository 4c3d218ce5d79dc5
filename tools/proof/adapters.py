"""`python -m tools.proof.adapters`: do LoRA and DoRA learn the demo subject? Trains, measures as the proof does, and
writes the section of docs/proof.md that is between its marks."""

# ruff: noqa: E501  lines of the page

import argparse
import statistics
import time
from pathlib import Path

from tools.proof.__main__ import BASE, DEMO, FRESH, RECIPE, ROOT, VIEWS, Arm, Bench, drift
from tools.proof.report import ADAPTERS, gap, line

SEEDS = (11, 12)  # of training
ARMS = (
    Arm("every weight", (), SEEDS[:1]),
    Arm("LoRA", ("method=lora", "method.merge=true", "method.targets=transformer"), SEEDS),
    Arm("DoRA", ("method=dora", "method.merge=true", "method.targets=transformer"), SEEDS),
)
SECTION = """{begin}
## Adapters

By `python -m tools.proof.adapters` on {date}: {recipe} {words}, rank 16 beside UNet and text encoder, {rate} (best of seven
settings by scenes on the tuning subject). An adapter trains {share:.0%} of the weights. Measured from the merged model, with the samples of
the sections above.

| run | plain | gap closed | scenes | gap closed | class prompt | class drift | training |
|---|---|---|---|---|---|---|---|
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
        begin=ADAPTERS[0], end=ADAPTERS[1], date=time.strftime("%Y-%m-%d"), recipe=" ".join(RECIPE),
        words="method.targets=transformer", rate="model.adapter_learning_rate", share=_share(),
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

    from dreambooth.architecture import trained_weights
    from dreambooth.config import conf_dir, load
    from dreambooth.recipe import resolve

    def count(*words: str) -> int:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return trained_weights(resolve(load(compose("config", [*words, "hardware=cpu", "name=x"])), Path("x")))

    return count(*ARMS[1].overrides) / count()


if __name__ == "__main__":
    main()
