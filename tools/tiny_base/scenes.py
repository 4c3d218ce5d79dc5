"""Computes the borders of the scenes that a tiny base model draws, for the measure prompt_fidelity_border.

    python -m tools.tiny_base.scenes build/tiny-base dreambooth/assets/tiny-sd

The first argument is a folder with the pictures of the stage `draw`; the file is written to the second. The command
also says how many pictures that did not contribute to the means are recognised.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth.config.evaluate import SCENE_BORDERS
from dreambooth.evaluation.scene_borders import SceneBorders, border_mask
from tools.tiny_base.pictures import COLOURS, SCENES, SIDE

WIDTH = 5  # pixels of the border; sprites seldom reach it
PICTURES = 20_000  # the means are computed from the first pictures, the others are held out
PHRASES = {**SCENES, **{colour: f"on a {colour} background" for colour in ("white", *COLOURS)}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base.scenes", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("base", type=Path)
    options = parser.parse_args()
    write(options.folder, options.base)
    for scene, (right, count) in held_out(options.folder, options.base, 200).items():
        print(f"{scene}: {right} of {count}")


def write(folder: Path, base: Path) -> None:
    """Write SCENE_BORDERS to a base model.

    Args:
        folder: contains pictures.npy and meanings.json.
    """
    pictures, grounds = _read(folder)
    mask = border_mask(SIDE, WIDTH)[..., None]
    scenes = {}
    for scene, phrase in PHRASES.items():
        chosen = [i for i, ground in enumerate(grounds[:PICTURES]) if ground == scene]
        mean = np.mean([pictures[i] for i in chosen], 0)
        rows = (mean * mask).sum(1) / mask.sum(1)
        scenes[scene] = {"phrase": phrase, "rows": rows.round().astype(int).tolist()}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(scene, separators=(',', ':'))}"
                       for name, scene in scenes.items())
    (base / SCENE_BORDERS).write_text(
        f'{{"side": {SIDE}, "width": {WIDTH}, "scenes": {{\n{lines}\n}}}}\n', encoding="utf-8")


def held_out(folder: Path, base: Path, count: int, scenes: Iterable[str] = PHRASES) -> dict[str, tuple[int, int]]:
    """Return, by scene, how many of at most `count` pictures that were not used for the means are recognised."""
    pictures, grounds = _read(folder)
    borders = SceneBorders.read(base)
    assert borders is not None
    found = {}
    for scene in scenes:
        chosen = [i for i in range(PICTURES, len(grounds)) if grounds[i] == scene][:count]
        found[scene] = sum(borders.scene_of(Image.fromarray(pictures[i])) == scene for i in chosen), len(chosen)
    return found


def _read(folder: Path) -> tuple[np.ndarray, list[str]]:
    meanings = json.loads((folder / "meanings.json").read_text())
    return np.load(folder / "pictures.npy", mmap_mode="r"), [meaning["ground"] for meaning in meanings]


if __name__ == "__main__":
    main()
