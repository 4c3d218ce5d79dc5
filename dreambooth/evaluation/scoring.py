"""Scores generated images: computes named measures from images, prompts and encoders.

Used by training runs, the evaluate command and tools.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth.config.evaluate import measure_name
from dreambooth.evaluation import metrics
from dreambooth.evaluation.encoders import Encoder
from dreambooth.evaluation.lpips import Lpips

Images = Sequence[Image.Image]


def score(
    reference: Images, generated: Mapping[str, Images], encoders: Sequence[Encoder], *,
    class_images: Images = (), base_class_images: Images = (), lpips: Lpips | None = None,
) -> dict[str, float]:
    """Score images of a subject. config/evaluate.py has the names of the measures and metrics.py their definitions.

    Args:
        reference: real images of the subject.
        generated: prompt -> images of the subject generated from it. Prompts use words that encoders know, such as
            "toy" instead of "zwx toy". Diversity needs two or more images per prompt.
        encoders: encoders from encoders.open_encoder, already on the device that computes.
        class_images: images generated from the class prompt, without the rare word; empty: no class measures.
        base_class_images: images of the same prompt and seeds before training; empty: no class_drift.
        lpips: measures DIV. Without it, there are only the diversity measures of the encoders, by cosine distance and
            with other names.

    Returns:
        name -> value, such as {"dino": 0.61, ...} or {"subject_similarity_efficientnet_lite0": 0.7, ...}.
    """
    scores: dict[str, float] = {}
    prompt_of_image = [prompt for prompt, images in generated.items() for _ in images]
    groups = [images for images in generated.values() if len(images) > 1]  # for diversity
    for encoder in encoders:
        embed = _CachedEmbeddings(encoder)
        photos, subject = embed(reference), embed([image for images in generated.values() for image in images])
        values = {"subject_similarity": metrics.mean_similarity(subject, photos)}
        if (prompts := encoder.embed_texts(list(generated))) is not None:
            rows = [list(generated).index(prompt) for prompt in prompt_of_image]
            values["text_similarity"] = metrics.prompt_similarity(subject, prompts.cpu()[rows])
        if groups:
            values["diversity"] = _mean_diversity([metrics.cosine_distances(embed(images)) for images in groups])
        if class_images:
            values["class_similarity"] = metrics.mean_similarity(embed(class_images), photos)
        if class_images and base_class_images:
            values["class_drift"] = metrics.class_drift(embed(class_images), embed(base_class_images))
        scores |= {measure_name(role, encoder.name): float(value) for role, value in values.items()}
    if lpips is not None and groups:
        distances = [lpips.distances(to_pixels(images)) for images in groups]
        scores[measure_name("diversity", "lpips")] = float(_mean_diversity(distances))
    return scores


def to_pixels(images: Images) -> Tensor:
    """Convert images of equal size to a tensor (N, 3, H, W), fp32 in [0, 1]."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


class _CachedEmbeddings:
    """Embeds images with an encoder, each image object only once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._cache: dict[int, Tensor] = {}

    def __call__(self, images: Images) -> Tensor:
        new = [image for image in images if id(image) not in self._cache]
        if new:
            rows = self._encoder.embed_images(to_pixels(new)).cpu()
            self._cache |= {id(image): row for image, row in zip(new, rows, strict=True)}
        return torch.stack([self._cache[id(image)] for image in images])


def _mean_diversity(distances: Sequence[Tensor]) -> Tensor:
    """Return the mean over prompts of the mean distance between the images of a prompt."""
    return torch.stack([metrics.mean_distance(matrix) for matrix in distances]).mean()
