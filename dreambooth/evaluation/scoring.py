"""Pictures -> measures: what a run, the door `evaluate` and a proof call to score pictures."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth.config.evaluate import name
from dreambooth.evaluation import metrics
from dreambooth.evaluation.encoders import Encoder
from dreambooth.evaluation.lpips import Lpips

Pictures = Sequence[Image.Image]


def score(
    reference: Pictures, generated: Mapping[str, Pictures], encoders: Sequence[Encoder], *,
    class_images: Pictures = (), base_class_images: Pictures = (), lpips: Lpips | None = None,
) -> dict[str, float]:
    """Measure pictures of a subject; names and definitions are in measures.py and metrics.py.

    Args:
        reference: real pictures of the subject.
        generated: prompt -> pictures of the subject made from it; the prompt in words that an encoder can know, that
            is with "toy" for "zwx toy". Two or more pictures a prompt for diversity.
        encoders: from encoders.open_encoder, on the device that is to compute.
        class_images: pictures made from the class prompt, without the subject's word; none: class measures left out.
        base_class_images: the same prompt and seeds before training; none: class_drift left out.
        lpips: measures DIV; None: diversity is 1 - cosine of the encoders' embeddings, and is named so.

    Returns:
        name -> value, such as {"dino": 0.61, ...} or {"subject_similarity_efficientnet_lite0": 0.7, ...}.
    """
    found: dict[str, float] = {}
    texts = [prompt for prompt, pictures in generated.items() for _ in pictures]
    several = [pictures for pictures in generated.values() if len(pictures) > 1]
    for encoder in encoders:
        known = _Embeddings(encoder)
        photos, subject = known(reference), known([image for pictures in generated.values() for image in pictures])
        values = {"subject_similarity": metrics.mean_similarity(subject, photos)}
        if (prompts := encoder.texts(list(generated))) is not None:
            rows = [list(generated).index(text) for text in texts]
            values["text_similarity"] = metrics.prompt_similarity(subject, prompts.cpu()[rows])
        if several:
            values["diversity"] = _mean([metrics.cosine_distances(known(pictures)) for pictures in several])
        if class_images:
            values["class_similarity"] = metrics.mean_similarity(known(class_images), photos)
        if class_images and base_class_images:
            values["class_drift"] = metrics.class_drift(known(class_images), known(base_class_images))
        found |= {name(role, encoder.name): float(value) for role, value in values.items()}
    if lpips is not None and several:
        found[name("diversity", "lpips")] = float(_mean(
            [lpips.distances(to_pixels(pictures)) for pictures in several]))
    return found


def to_pixels(pictures: Pictures) -> Tensor:
    """Equal RGB pictures as (N, 3, H, W), fp32 in [0, 1]."""
    stacked = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


class _Embeddings:
    """Pictures through an encoder, each once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[int, Tensor] = {}

    def __call__(self, pictures: Pictures) -> Tensor:
        new = [picture for picture in pictures if id(picture) not in self._known]
        if new:
            rows = self._encoder.images(to_pixels(new)).cpu()
            self._known |= {id(picture): row for picture, row in zip(new, rows, strict=True)}
        return torch.stack([self._known[id(picture)] for picture in pictures])


def _mean(tables: Sequence[Tensor]) -> Tensor:
    """Mean over prompts of the mean distance within a prompt."""
    return torch.stack([metrics.mean_distance(table) for table in tables]).mean()
