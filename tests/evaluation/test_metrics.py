"""The measures on hand-made embeddings with known results, to 1e-6."""

import math

import pytest
import torch
from PIL import Image

from dreambooth.evaluation import metrics, scoring
from dreambooth.evaluation.lpips import CHANNELS, Lpips, weight_shapes

E, N = torch.eye(4), pytest.approx


def unit_vectors(*degrees: float) -> torch.Tensor:
    """Unit vectors in a plane, at the given angles."""
    angles = torch.tensor(degrees).double().deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_similarity_is_the_mean_over_all_pairs() -> None:
    """cos 0, cos 60, cos 90, cos 30: every generated image is compared with every real one, not row by row."""
    similarity = metrics.mean_similarity(unit_vectors(0, 90), unit_vectors(0, 60))
    assert float(similarity) == N((1 + 0.5 + 0 + math.sqrt(3) / 2) / 4, abs=1e-6)


def test_similarity_ignores_the_length_of_embeddings() -> None:
    assert float(metrics.mean_similarity(1e3 * unit_vectors(0), 1e-3 * unit_vectors(60))) == N(0.5, abs=1e-6)


def test_equal_images_have_similarity_1_and_opposite_ones_minus_1() -> None:
    assert float(metrics.mean_similarity(unit_vectors(20, 20), unit_vectors(20))) == N(1, abs=1e-6)
    assert float(metrics.mean_similarity(unit_vectors(0), unit_vectors(180))) == N(-1, abs=1e-6)


def test_an_image_is_compared_with_its_own_prompt_only() -> None:
    """All pairs would give (1 + 0 + 0 + 1) / 4."""
    assert float(metrics.prompt_similarity(unit_vectors(0, 90), unit_vectors(0, 90))) == N(1, abs=1e-6)
    assert float(metrics.prompt_similarity(unit_vectors(0, 90), unit_vectors(60, 150))) == N(0.5, abs=1e-6)


def test_retrieval_counts_the_images_whose_nearest_prompt_is_their_own() -> None:
    """Prompt 0 is at 0 and 20 degrees, prompt 7 at 90 and 110, so that the border between them is at 55 degrees."""
    references, numbers = unit_vectors(0, 20, 90, 110), torch.tensor([0, 0, 7, 7])
    images, prompts = unit_vectors(10, 50, 60, 100), torch.tensor([0, 0, 0, 7])
    assert float(metrics.retrieval_accuracy(images, prompts, references, numbers)) == N(3 / 4)


def test_retrieval_compares_differences_from_the_mean_of_the_references() -> None:
    """A large component that all images share does not hide the small one in which they differ."""
    shared = torch.tensor([100.0, 0, 0, 0])
    image = shared + E[1:2] + 0.9 * E[2:3] - 0.5 * E[0:1]
    references = torch.stack([shared + E[1], 2 * shared + E[2], shared + E[3]])
    accuracy = metrics.retrieval_accuracy(image, torch.tensor([1]), references, torch.tensor([1, 2, 3]))
    assert float(accuracy) == 1


def test_mean_distance_excludes_the_diagonal() -> None:
    matrix = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 6.0], [2.0, 6.0, 0.0]])
    assert float(metrics.mean_distance(matrix)) == N(3, abs=1e-6)


def test_cosine_distances_of_known_angles() -> None:
    matrix = metrics.cosine_distances(unit_vectors(0, 60, 90))
    assert matrix.tolist() == [N(row, abs=1e-6) for row in (
        [0, 0.5, 1], [0.5, 0, 1 - math.sqrt(3) / 2], [1, 1 - math.sqrt(3) / 2, 0])]
    assert float(metrics.mean_distance(matrix)) == N((0.5 + 1 + 1 - math.sqrt(3) / 2) / 3, abs=1e-6)


def test_drift_is_between_mean_directions() -> None:
    """The mean directions are at 45 and at 105 degrees; the length of a vector does not matter."""
    scaled = torch.tensor([[5.0], [1.0]]) * unit_vectors(0, 90)
    assert float(metrics.class_drift(scaled, unit_vectors(60, 150))) == N(0.5, abs=1e-6)


def test_an_unchanged_class_has_no_drift() -> None:
    assert float(metrics.class_drift(unit_vectors(10, 50), unit_vectors(50, 10))) == N(0, abs=1e-6)


def test_lpips_on_hand_made_features() -> None:
    """Layer 1: (1, 0) and (0, 1) at one of two positions, weights 1 and 3: (1 + 3) / 2. Layer 2: equal directions."""
    one = torch.tensor([[[[2.0, 1.0]], [[0.0, 0.0]]]])  # N=1, C=2, H=1, W=2
    other = torch.tensor([[[[0.0, 7.0]], [[5.0, 0.0]]]])
    same = torch.ones(1, 3, 2, 2)
    distances = metrics.lpips([one, same], [other, 4 * same], [torch.tensor([1.0, 3.0]), torch.ones(3)])
    assert distances.tolist() == [N(2, abs=1e-6)]


@pytest.mark.parametrize("broken", [
    lambda: metrics.mean_similarity(torch.zeros(0, 4), E),
    lambda: metrics.mean_similarity(E, torch.eye(3)),
    lambda: metrics.prompt_similarity(E, E[:3]),
    lambda: metrics.mean_distance(torch.zeros(1, 1)),
    lambda: metrics.mean_distance(torch.zeros(2, 3)),
    lambda: metrics.class_drift(E, torch.zeros(0, 4)),
])
def test_invalid_shapes_are_an_error(broken) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"needed|together"):
        broken()


# -- the network of LPIPS ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def alexnet() -> Lpips:
    """LPIPS in its real architecture with random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in weight_shapes().items()}
    return Lpips({key: tensor.abs() if key.startswith("lin") else tensor for key, tensor in weights.items()})


def test_lpips_of_images_is_a_matrix_of_distances(alexnet: Lpips) -> None:
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    matrix = alexnet.distances(torch.cat([pixels, pixels[:1]]))
    assert torch.equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == [0] * 4
    assert matrix[0, 3] == N(0, abs=1e-6)
    assert (matrix[:3, :3] + torch.eye(3) > 1e-3).all()


def test_lpips_has_the_layers_of_alexnet(alexnet: Lpips) -> None:
    features = alexnet.features(torch.rand(1, 3, 64, 64))
    assert [tuple(layer.shape[1:]) for layer in features] == [
        (CHANNELS[0], 15, 15), (CHANNELS[1], 7, 7), (CHANNELS[2], 3, 3), (CHANNELS[3], 3, 3), (CHANNELS[4], 3, 3)]
    alone = [tensor.numel() for key, tensor in alexnet.named_buffers() if not key.startswith("linear")]
    assert sum(alone) == 2_469_696  # the parameters of AlexNet's `features`


class CountingEncoder:
    """Embeds an image as its mean colour, and records how many images it gets at a time."""

    name = "dino"

    def __init__(self) -> None:
        self.counts: list[int] = []

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.counts.append(len(pixels))
        return pixels.mean((2, 3))

    def embed_texts(self, prompts: object) -> None:
        return None


def test_reference_photos_are_embedded_a_few_at_a_time_and_once_for_all_steps() -> None:
    encoder = CountingEncoder()
    reference = [Image.new("RGB", (2, 2), (number, 100, 255 - number)) for number in range(150)]
    generated = {"a prompt": [Image.new("RGB", (2, 2), (3, 100, 200))]}
    known: dict[str, torch.Tensor] = {}
    first, second = (scoring.score(reference, generated, [encoder], reference_embeddings=known)  # type: ignore
                     for _ in range(2))
    assert encoder.counts == [64, 64, 22, 1, 1]
    assert first == second
    whole = metrics.mean_similarity(CountingEncoder().embed_images(scoring.to_pixels(generated["a prompt"])),
                                    CountingEncoder().embed_images(scoring.to_pixels(reference)))
    assert first["dino"] == pytest.approx(float(whole), abs=1e-6)
