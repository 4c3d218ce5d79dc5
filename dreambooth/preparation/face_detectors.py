"""Models that find faces, loaded with transformers.

Two kinds of models can be used: those that find what a text describes (OWL-ViT, Minderer et al. 2022, arXiv:2205.06230,
and OWLv2), and those with a list of classes of which one is a face (DETR, YOLOS and others).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from dreambooth.preparation.pretrained import Pretrained
from dreambooth.preparation.segmenters import matching_labels

EXAMPLES = "google/owlv2-base-patch16-ensemble"
MAX_OVERLAP = 0.5  # intersection over union, above which two boxes are the same face

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class FaceDetector(Protocol):
    """The interface of a model that finds faces."""

    def find(self, image: Image.Image) -> list[Box]:
        """Return the boxes of the faces in an RGB image, the most certain first."""


class TextDetector:
    """A model that finds what a text describes."""

    def __init__(self, origin: Pretrained, label: str, threshold: float) -> None:
        """Args:
            origin: the model.
            label: what to find, such as "face".
            threshold: the lowest score of a box, from 0 to 1.
        """
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self.label, self.threshold = label, threshold
        self.processor = origin.load(AutoProcessor)
        self.network: Any = origin.load_network(AutoModelForZeroShotObjectDetection)

    def find(self, image: Image.Image) -> list[Box]:
        length = getattr(getattr(self.network.config, "text_config", None), "max_position_embeddings", None)
        inputs = self.processor(text=[[f"a {self.label}"]], images=image, return_tensors="pt", max_length=length)
        with torch.no_grad():
            outputs = self.network(**inputs.to(self.network.device))
        found = self.processor.post_process_grounded_object_detection(
            outputs, threshold=self.threshold, target_sizes=[image.size[::-1]])[0]
        return select_boxes(found["boxes"].tolist(), found["scores"].tolist(), image.size)


class ClassDetector:
    """A model with a list of classes, of which one is a face."""

    def __init__(self, origin: Pretrained, label: str, threshold: float) -> None:
        """Args are those of TextDetector. The label must be the name of a class of the model.

        Raises:
            UserError: the model knows no such class, or cannot be loaded.
        """
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.threshold = threshold
        self.processor = origin.load(AutoImageProcessor, backend="pil")
        self.network: Any = origin.load_network(AutoModelForObjectDetection)
        names = {int(number): str(name) for number, name in self.network.config.id2label.items()}
        self.labels = matching_labels(names, label)
        if not self.labels:
            raise origin.refuse(f"knows no class {label}, only {', '.join(list(names.values())[:8])} and others, so "
                                "type faces.label with one of them, or use a model that reads text")

    def find(self, image: Image.Image) -> list[Box]:
        inputs = self.processor(images=image, return_tensors="pt")
        with torch.no_grad():
            outputs = self.network(**inputs.to(self.network.device))
        found = self.processor.post_process_object_detection(
            outputs, threshold=self.threshold, target_sizes=[image.size[::-1]])[0]
        kept = [(box, score) for box, score, label in zip(
            found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
            if label in self.labels]
        return select_boxes([box for box, _ in kept], [score for _, score in kept], image.size)


def open_face_detector(origin: Pretrained, label: str, threshold: float) -> FaceDetector:
    """Load a model that finds faces. Arguments are as in `TextDetector`.

    Raises:
        UserError: the model cannot be loaded, or detects no objects.
    """
    from transformers.models.auto import modeling_auto

    model_type = origin.model_type()
    if model_type in modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES:
        return TextDetector(origin, label, threshold)
    if model_type in modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        return ClassDetector(origin, label, threshold)
    raise origin.refuse(f"is a model of the type {model_type}, which detects no objects")


def select_boxes(boxes: Sequence[Sequence[float]], scores: Sequence[float], size: tuple[int, int]) -> list[Box]:
    """Return boxes in whole pixels inside the image, the best first, without boxes that repeat a better one.

    Args:
        boxes: (left, top, right, bottom) of each box.
        size: (width, height) of the image.
    """
    kept: list[Box] = []
    for index in sorted(range(len(boxes)), key=lambda number: -scores[number]):
        left, top, right, bottom = boxes[index]
        box = (max(0, round(left)), max(0, round(top)), min(size[0], round(right)), min(size[1], round(bottom)))
        if box[0] < box[2] and box[1] < box[3] and all(_overlap(box, other) <= MAX_OVERLAP for other in kept):
            kept.append(box)
    return kept


def _overlap(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)
