"""The options of `python -m dreambooth.generate`. Imports neither torch nor Hydra."""

import re
from dataclasses import dataclass
from typing import Any

from dreambooth.config.section import Section, finite, require


@dataclass
class Generate(Section):
    """Options of `python -m dreambooth.generate`; conf/generate.yaml explains each key."""

    run: str | None = None
    base: str | None = None
    lora: Any = None  # a string, or a list of strings
    lora_scale: Any = 1.0  # a number, or a list of numbers
    prompt: str | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    image: str | None = None
    strength: float = 0.6
    size: str | None = None
    num_images: int = 4
    batch_size: int = 4
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    columns: int | None = None
    metadata: bool = True
    out: str | None = None
    uri: str | None = None

    def __post_init__(self) -> None:
        scales = self.lora_scale if isinstance(self.lora_scale, list) else [self.lora_scale]
        require("", {
            "lora": (all(isinstance(item, str) and item.strip() for item in self.loras), "a path, or a list of paths"),
            "lora_scale": (all(isinstance(scale, int | float) and finite(scale, -10, 10) for scale in scales),
                           f"a number from -10 to 10, or a list of them, not {self.lora_scale}"),
            "prompts": (self.prompt is None or self.prompts is None, "null if prompt is given"),
            "strength": (0 < self.strength <= 1, f"above 0 and at most 1, not {self.strength}"),
            "size": (self.size is None or self.image is None, "null if image is given, which is cropped to a square"),
            "num_images": (self.num_images >= 1, f"1 or more, not {self.num_images}"),
            "batch_size": (self.batch_size >= 1, f"1 or more, not {self.batch_size}"),
            "seed": (0 <= self.seed < 2**63, f"from 0 to 2**63 - 1, not {self.seed}"),
            "num_inference_steps": (1 <= self.num_inference_steps <= 1000,
                                    f"from 1 to 1000, not {self.num_inference_steps}"),
            "guidance_scale": (self.guidance_scale is None or finite(self.guidance_scale, 0),
                               f"0 or more, not {self.guidance_scale}"),
            "columns": (self.columns is None or self.columns >= 1, f"1 or more, or null, not {self.columns}"),
        })
        if self.size is not None:
            parse_size(self.size)
        if self.image is not None and round(self.num_inference_steps * self.strength) < 1:
            raise ValueError(f"strength={self.strength} of num_inference_steps={self.num_inference_steps} leaves no "
                             "step: type a higher strength, or more steps")

    @property
    def loras(self) -> list[str]:
        """The value of `lora` as a list of paths. The list does not contain the LoRA that the run itself trained."""
        return [] if self.lora is None else [*self.lora] if isinstance(self.lora, list) else [self.lora]

    def scales(self, count: int) -> list[float]:
        """Return the scale of each of `count` LoRAs. If `lora_scale` is one number, it is the scale of every LoRA.

        Raises:
            ValueError: `lora_scale` is a list whose length is not `count`.
        """
        scales = self.lora_scale
        if isinstance(scales, list) and len(scales) != count:
            raise ValueError(f"lora_scale has {len(scales)} numbers and there are {count} LoRAs, the run's own first: "
                             "type one number per LoRA, or one for all")
        return [float(scale) for scale in scales] if isinstance(scales, list) else [float(scales)] * count


def parse_size(text: str) -> tuple[int, int]:
    """Return the width and the height of a size such as "512x768".

    Raises:
        ValueError: `text` is no size.
    """
    if not (sides := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text, re.ASCII)):
        raise ValueError(f"size must be width x height in pixels, such as 512x768, not {text}")
    return int(sides[1]), int(sides[2])
