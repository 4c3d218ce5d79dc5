"""What is measured of one model."""

from dataclasses import dataclass, field

import torch
from PIL import Image


@dataclass
class Measured:
    """Similarities to the photos, and the class's mean feature."""

    plain: float
    scenes: float
    class_similarity: float
    class_features: torch.Tensor
    seconds: float = 0.0
    seed: int = 0
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)
