"""Recognises the scene of a picture by its border, for base models that draw few scenes, such as the shipped tiny ones.

The border is the outermost rows at the top and columns at both sides, where the subject is not. The file SCENE_BORDERS
of a base model contains, for each scene, the phrase that names it in a prompt, and the mean colour of each row of the
border over many training pictures of the base model (tools/tiny_base/scenes.py). A base model without this file is not
concerned. Imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreambooth.config.evaluate import SCENE_BORDERS
from dreambooth.errors import UserError


@dataclass(frozen=True)
class SceneBorders:
    """The borders of the scenes that a base model draws."""

    side: int  # width and height of the pictures, in pixels
    width: int  # width of the border, in pixels
    phrases: dict[str, str]  # by scene: the words that name the scene in a prompt
    rows: dict[str, NDArray[np.float64]]  # by scene: mean colour of each row of the border, (side, 3), from 0 to 255

    @classmethod
    def read(cls, base: Path) -> "SceneBorders | None":
        """Read the file of a base model. Return None if the base model has no such file.

        Raises:
            UserError: the file cannot be read.
        """
        path = base / SCENE_BORDERS
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            side, scenes = int(content["side"]), content["scenes"]
            return cls(side, int(content["width"]), {name: str(scene["phrase"]) for name, scene in scenes.items()},
                       {name: np.array(scene["rows"], float).reshape(side, 3) for name, scene in scenes.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): copy it from the base model again, or delete it") from error

    def scene_of(self, image: Image.Image) -> str:
        """Return the scene whose mean border is nearest to the border of an image, by the mean absolute difference."""
        resized = image.convert("RGB")
        if resized.size != (self.side, self.side):
            resized = resized.resize((self.side, self.side), Image.Resampling.BOX)
        pixels, mask = np.asarray(resized, float), border_mask(self.side, self.width)
        return min(self.rows, key=lambda name: float(np.abs(pixels - self.rows[name][:, None])[mask].mean()))

    def named_in(self, prompt: str) -> str | None:
        """Return the scene that a prompt names; None if it names none."""
        return next((name for name, phrase in self.phrases.items() if phrase in prompt), None)

    def fidelity(self, generated: Mapping[str, Sequence[Image.Image]]) -> float | None:
        """Return the share of images that show the scene that their prompt names; None if no prompt names a scene.

        Images of prompts that name no scene are not counted.

        Args:
            generated: images by prompt.
        """
        hits = [self.scene_of(image) == scene for prompt, images in generated.items()
                if (scene := self.named_in(prompt)) is not None for image in images]
        return sum(hits) / len(hits) if hits else None


def border_mask(side: int, width: int) -> NDArray[np.bool_]:
    """Return a mask (side, side) of the border: rows at the top, columns at both sides.

    The bottom is left out, because the subject stands there.
    """
    mask = np.zeros((side, side), bool)
    mask[:width] = mask[:, :width] = mask[:, -width:] = True
    return mask
