"""Models that find the subject of a photo pixel by pixel, loaded with transformers.

- CLIPSeg (Lüddecke and Ecker 2022, arXiv:2112.10003) finds what a text describes.
- Mask2Former (Cheng et al. 2022, arXiv:2112.01527) divides the photo into segments of the classes that it knows; the
  segments of the subject's class make the mask.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dreambooth.preparation.pretrained import Pretrained
from dreambooth.utils.suggestions import closest

EXAMPLES = "CIDAS/clipseg-rd64-refined"


class Segmenter(Protocol):
    """The interface of a model that makes masks."""

    def segment(self, image: Image.Image) -> NDArray[np.bool_]:
        """Return a mask (H, W) of an RGB image of this size; True where the subject is."""


class ClipSeg:
    """CLIPSeg: a pixel belongs to the mask if its probability is at least the threshold."""

    def __init__(self, origin: Pretrained, text: str, threshold: float) -> None:
        """Args:
            origin: the model.
            text: what to find, such as "dog".
            threshold: from 0 to 1.
        """
        from transformers import AutoProcessor, CLIPSegForImageSegmentation

        self.text, self.threshold = text, threshold
        self.processor = origin.load(AutoProcessor)
        self.network: Any = origin.load_network(CLIPSegForImageSegmentation)

    def segment(self, image: Image.Image) -> NDArray[np.bool_]:
        inputs = self.processor(text=[self.text], images=image, return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            logits = self.network(**inputs.to(self.network.device)).logits
        low = logits.reshape(logits.shape[-2:]).sigmoid().float().cpu().numpy()
        resized = Image.fromarray(low).resize(image.size, Image.Resampling.BILINEAR)
        return np.asarray(np.asarray(resized) >= self.threshold)


class Mask2Former:
    """Mask2Former with a list of classes, for panoptic or instance segmentation."""

    def __init__(self, origin: Pretrained, text: str, threshold: float) -> None:
        """Args are those of ClipSeg. The text must be the name of a class of the model; names of several words match
        if one of their words is the text.

        Raises:
            UserError: the model knows no such class, or cannot be loaded.
        """
        from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

        self.threshold = threshold
        self.processor = origin.load(AutoImageProcessor, backend="pil")
        self.network: Any = origin.load_network(AutoModelForUniversalSegmentation)
        labels = {int(number): str(name) for number, name in self.network.config.id2label.items()}
        self.labels = matching_labels(labels, text)
        if not self.labels:
            near = closest(text, labels.values()) or sorted(labels.values())[:8]
            raise origin.refuse(f"knows no class {text}, so type masks.text with one of its classes, such as "
                                f"{', '.join(near)}, or use a model that reads text")

    def segment(self, image: Image.Image) -> NDArray[np.bool_]:
        inputs = self.processor(images=image, return_tensors="pt")
        with torch.no_grad():
            outputs = self.network(**inputs.to(self.network.device))
        result = self.processor.post_process_panoptic_segmentation(
            outputs, threshold=self.threshold, target_sizes=[image.size[::-1]])[0]
        wanted = [segment["id"] for segment in result["segments_info"] if segment["label_id"] in self.labels]
        return np.isin(result["segmentation"].cpu().numpy(), wanted)


KINDS: dict[str, type[ClipSeg | Mask2Former]] = {"clipseg": ClipSeg, "mask2former": Mask2Former}


def open_segmenter(origin: Pretrained, text: str, threshold: float) -> Segmenter:
    """Load a model that makes masks. Arguments are as in `ClipSeg`.

    Raises:
        UserError: the model cannot be loaded, or is of another architecture, or does not know the class.
    """
    kind = KINDS.get(model_type := origin.model_type())
    if kind is None:
        raise origin.refuse(f"is a model of the type {model_type}, and masks need one of {', '.join(KINDS)}")
    return kind(origin, text, threshold)


def matching_labels(labels: dict[int, str], text: str) -> set[int]:
    """Return the numbers of the classes whose name is `text`; if there is none, of those with a word that is `text`.

    Published lists have several names per class, such as "wall-other-merged" or "car, auto".
    """
    wanted = text.casefold().strip()
    exact = {number for number, name in labels.items() if name.casefold() == wanted}
    return exact or {number for number, name in labels.items()
                     if wanted in name.casefold().replace("-", " ").replace(",", " ").split()}
