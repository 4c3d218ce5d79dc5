"""The DreamBooth paper's measures, as pure functions of embeddings, features or distances.

Ruiz et al. 2023, arXiv:2208.12242, sections 4.1 (evaluation metrics) and 4.3 (ablation of prior preservation):

    DINO, CLIP-I  mean_similarity(generated, real)      subject fidelity, higher is better
    CLIP-T        prompt_similarity(images, prompts)    prompt fidelity, higher is better
    PRES          mean_similarity(class images, real)   collapse of the class onto the subject, lower is better
    DIV           mean_distance(LPIPS within a prompt)  diversity, higher is better

Two measures are not from the paper: class_drift and retrieval_accuracy.

These functions do not depend on the encoder; scoring.py calls them for each encoder, and names the measures. Embeddings
need not be normalised. All computation is in fp64, and every measure is a 0-d fp64 tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def mean_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean cosine similarity, in [-1, 1], over all pairs of a row of `a` (N, D) and a row of `b` (M, D).

    With DINO embeddings of generated and real images of the subject, this is the paper's measure DINO; with CLIP
    embeddings it is CLIP-I (section 4.1). With DINO embeddings of generated images of the class and real images of the
    subject, it is PRES (section 4.3).

    Raises:
        ValueError: an argument has no rows, or the widths differ.
    """
    _check(a, b)
    return (_unit(a) @ _unit(b).T).mean()


def prompt_similarity(images: Tensor, prompts: Tensor) -> Tensor:
    """Return the mean, over N images, of the cosine similarity of an image and its own prompt. It is in [-1, 1].

    With CLIP embeddings, this mean is CLIP-T (section 4.1).

    Args:
        images: embeddings of the images, (N, D).
        prompts: embedding of the prompt of each image, (N, D).

    Raises:
        ValueError: an argument has no rows, the widths differ, or the number of prompts is not the number of images.
    """
    _check(images, prompts)
    if len(images) != len(prompts):
        raise ValueError(f"one prompt per image is needed, not {len(prompts)} prompts for {len(images)} images")
    return (_unit(images) * _unit(prompts)).sum(1).mean()


def retrieval_accuracy(images: Tensor, prompts: Tensor, references: Tensor, reference_prompts: Tensor) -> Tensor:
    """Return the share of images whose nearest prompt, represented by reference images, is their own prompt.

    The nearest prompt is that with the highest mean cosine similarity of its references to the image. The mean of all
    references is subtracted from every embedding first, so that only their differences count. This measure is not from
    the paper. It needs no text encoder: images of the base model represent what a prompt means.

    Args:
        images: embeddings of the images, (N, D).
        prompts: the number of the prompt of each image, (N,).
        references: embeddings of reference images, (M, D).
        reference_prompts: the number of the prompt of each reference image, (M,). Every number in `prompts` occurs.

    Raises:
        ValueError: an argument has no rows, or the widths differ.
    """
    _check(images, references)
    centre = references.double().mean(0)
    similarities = _unit(images.double() - centre) @ _unit(references.double() - centre).T
    candidates = sorted(set(reference_prompts.tolist()))
    by_prompt = torch.stack([similarities[:, reference_prompts == number].mean(1) for number in candidates], 1)
    nearest = torch.tensor(candidates)[by_prompt.argmax(1)]
    return (nearest == prompts).double().mean()


def mean_distance(distances: Tensor) -> Tensor:
    """Return the mean distance over all pairs of different images, from a symmetric matrix (N, N), N >= 2.

    With LPIPS distances between images of the subject from one prompt, this mean is DIV (section 4.3). The paper calls
    DIV "average LPIPS cosine similarity", but LPIPS is a distance, and in the paper's table, as here, higher means more
    diverse.

    Raises:
        ValueError: the matrix is not square, or has fewer than two rows.
    """
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1] or len(distances) < 2:
        raise ValueError(f"a square matrix of at least two images is needed, not {tuple(distances.shape)}")
    rows, columns = torch.triu_indices(len(distances), len(distances), offset=1)
    return distances.double()[rows, columns].mean()


def cosine_distances(embeddings: Tensor) -> Tensor:
    """Return 1 - cosine similarity of every two rows of (N, D): a matrix (N, N) in [0, 2], for `mean_distance`.

    The mean of these distances is a measure of diversity that needs no LPIPS weights. It is not the paper's DIV.
    """
    unit = _unit(embeddings)
    return 1 - unit @ unit.T


def class_drift(now: Tensor, base: Tensor) -> Tensor:
    """Return how far training has moved the class images: 1 - cosine similarity of two mean embeddings.

    One is the mean over class images from the current model, the other over class images from the base model. Each
    embedding is normalised to length 1 before the mean is computed. The result is in [0, 2]. Lower is better; 0 means
    that the direction of the mean has not changed. This measure is not from the paper. Unlike PRES it needs no photo of
    the subject, and it also detects drift that is not towards the subject.

    Args:
        now: embeddings of class images from the current model, (N, D).
        base: embeddings of class images from the base model, (M, D).

    Raises:
        ValueError: an argument has no rows, or the widths differ.
    """
    _check(now, base)
    return (1 - normalize(_unit(now).mean(0), dim=0) @ normalize(_unit(base).mean(0), dim=0)).clamp(min=0)


def lpips(first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the LPIPS distance (N,) of N pairs of images (Zhang et al. 2018, arXiv:1801.03924, eq. 1).

    The distance between two equal images is 0.

        d(x, y) = sum over layers l of  mean over positions (h, w) of  w_l . (x_l / |x_l| - y_l / |y_l|)^2

    Args:
        first: features (N, C_l, H_l, W_l) of the first image of each pair, one tensor per layer.
        second: features of the second image of each pair, with the same shapes.
        weights: w_l of each layer, (C_l,), not negative.
    """
    return torch.stack([
        torch.einsum("nchw,c->nhw", (_unit(x) - _unit(y)).square(), weight.double()).mean((1, 2))
        for x, y, weight in zip(first, second, weights, strict=True)]).sum(0)


def _unit(vectors: Tensor) -> Tensor:
    """Return the vectors along dimension 1 in fp64, normalised to length 1."""
    return normalize(vectors.double(), dim=1, eps=1e-10)


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or not len(a) or not len(b) or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"two matrices of embeddings of equal width are needed, not {tuple(a.shape)} and {tuple(b.shape)}")
