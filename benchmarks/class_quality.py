"""Are our class images as good as the script's? python benchmarks/class_quality.py WORK [--write]

Scores what `speed.py --cases "peer class images" "class images"` left in WORK, as `evaluate` does: how unlike each
other pictures of the class are (diversity), how like photos of the subject (class_similarity), how far their mean is
from the script's (class_drift). The last says little by itself, so the halves of the script's own are compared too.
"""

import argparse
from pathlib import Path

from PIL import Image
from speed import CLASS, INSTANCE
from speed_table import SAME_GUIDANCE, put

from dreambooth.encoders import open_encoder
from dreambooth.scoring import Pictures, score

ROLES = ("diversity", "class_similarity", "class_drift")


def opened(folder: Path) -> list[Image.Image]:
    """The pictures of a folder, by name."""
    found = [Image.open(path).convert("RGB") for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg")]
    if len(found) < 4:
        raise SystemExit(f"{folder} holds {len(found)} pictures: run speed.py with both class image cases first")
    return found


def rows(photos: Pictures, script: Pictures, ours: dict[str, Pictures]) -> list[str]:
    """A table with a row for each set of pictures."""
    encoder, half = open_encoder("efficientnet_lite0"), len(script) // 2
    found = [f"| pictures | number | {' | '.join(ROLES)} |", "|---|---|---|---|---|"]
    for name, pictures, base in (("the script's, first half", script[:half], script[half:]),
                                 ("the script's, second half", script[half:], script[:half]),
                                 *((name, pictures, script) for name, pictures in ours.items())):
        values = score(photos, {CLASS: pictures}, [encoder], class_images=pictures, base_class_images=base)
        known = [next(value for key, value in values.items() if key.startswith(role)) for role in ROLES]
        found.append(f"| {name} | {len(pictures)} | {' | '.join(f'{value:.3f}' for value in known)} |")
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("work", type=Path, help=f"folder of speed.py, whose photos are of {INSTANCE!r}")
    ask.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = ask.parse_args()
    ours = {name: opened(given.work / name) for name in ("class images", SAME_GUIDANCE) if (given.work / name).is_dir()}
    found = rows(opened(given.work / "photos"), opened(given.work / "peer class images"), ours)
    print("\n".join(found))
    if given.write:
        put("class", found)


if __name__ == "__main__":
    main()
