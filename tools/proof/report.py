"""What `make proof` measured, as a page."""

# ruff: noqa: E501  lines of the page
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from tools.proof.measured import Measured

ADAPTERS = "<!-- tools.proof.adapters -->", "<!-- end adapters -->"

HEAD = """| run | plain | gap closed | scenes | gap closed | class prompt | class drift | training |
|---|---|---|---|---|---|---|---|"""  # above what `line` writes

PAGE = """# Proof

Written by `make proof` on {date}: {versions}, Python {python}, {cores} CPU cores, {minutes} minutes. Nothing here is
edited by hand; what fails a bar says so.

Every number is of the shipped tiny base and the demo subject, on the demo's default settings with {recipe},
but for the training seed and what an arm changes. The recipe is the best of thirteen by scenes on another
subject (tools/proof/views/tuning; `python -m tools.proof --tune` and settings). Training and sampling seeds (from {fresh}) were not
used before. Samples: {sampler}.

**Similarity** is the mean pairwise cosine of ImageNet EfficientNet-Lite0 features with the five photos, which is what the
paper does with DINO: it is not DINO, and its numbers compare with nothing outside this page. **Gap closed** is the way from the
untrained base's samples of the same prompts and seeds to the reference, which is three held-out views of the subject
through the VAE: what a perfect UNet could reach. **Class drift** is 1 - cosine between the mean feature of 32 pictures of
"a photo of a toy" and that of the base's, same seeds.

| | plain prompt | scenes | class prompt |
|---|---|---|---|
| base, untrained | {base_plain:.3f} | {base_scenes:.3f} | {base_class:.3f} |
| reference | {reference:.3f} | {reference:.3f} | - |

## Three training seeds, with and without prior preservation

{head}
{rows}

| bar | measured | holds |
|---|---|---|
{bars}

![samples]({sheet})

*Rows: the untrained base; three seeds with prior preservation; three without. Columns: the plain prompt (4 pictures), on the
beach, in the snow, on the grass, at night, and the class prompt (4).*

## Half-precision weights

`memory.weights=half` keeps the trained weights in bf16; nothing is left of most AdamW updates unless they are rounded
stochastically or compensated (Kahan). One seed each, same settings otherwise.

{head}
{half}
"""


def gap(value: float, base: float, reference: float) -> float:
    """The share of the way from base to reference."""
    return (value - base) / (reference - base)


def line(name: str, run: Measured, base: Measured, reference: float,
         drift: Callable[[Measured, Measured], float]) -> str:
    """A row of a table."""
    return (f"| {name}, seed {run.seed} | {run.plain:.3f} | {gap(run.plain, base.plain, reference):.0%} "
            f"| {run.scenes:.3f} | {gap(run.scenes, base.scenes, reference):.0%} | {run.class_similarity:.3f} "
            f"| {drift(run, base):.3f} | {run.seconds:.0f} s |")


def write(path: Path, base: Measured, reference: float, runs: Mapping[str, list[Measured]],
          drift: Callable[[Measured, Measured], float], sheet: Path, facts: dict[str, str]) -> None:
    """Write the page; the section of tools.proof.adapters stays."""
    lines = {name: [line(name, run, base, reference, drift) for run in measured] for name, measured in runs.items()}
    main = ("with prior preservation", "without")
    kept, lost = runs[main[0]], runs[main[1]]
    plain = statistics.mean(gap(run.plain, base.plain, reference) for run in kept)
    scenes = statistics.mean(gap(run.scenes, base.scenes, reference) for run in kept)
    ratio = statistics.mean(drift(run, base) for run in kept) / statistics.mean(drift(run, base) for run in lost)
    slowest = max(run.seconds for run in kept)
    bars = [("subject closes at least 65 % of the gap, plain prompt", f"{plain:.0%}", plain >= 0.65),
            ("subject closes at least 35 % of the gap, scenes", f"{scenes:.0%}", scenes >= 0.35),
            ("class drift with prior preservation at most 30 % of that without", f"{ratio:.0%}", ratio <= 0.30),
            ("training at most 180 s on two cores", f"{slowest:.0f} s", slowest <= 180)]
    _, begin, rest = path.read_text("utf-8").partition(ADAPTERS[0])
    path.write_text(PAGE.format(
        head=HEAD, **facts, cores=os.cpu_count(), base_plain=base.plain, base_scenes=base.scenes, base_class=base.class_similarity,
        reference=reference, sheet=f"images/{sheet.name}", rows="\n".join(lines[main[0]] + lines[main[1]]),
        bars="\n".join(f"| {what} | {value} | {'yes' if holds else '**no**'} |" for what, value, holds in bars),
        half="\n".join(line for name, some in lines.items() if name not in main for line in some))
        + (f"\n{begin}{rest}" if begin else ""))
