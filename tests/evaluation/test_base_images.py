"""The base model's images of the evaluation texts: generated once, whatever else of an evaluation is missing."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from dreambooth.config.enums import EncoderKind
from dreambooth.config.recipe import Recipe
from dreambooth.data.index.file_hashes import open_hashes
from dreambooth.data.index.photo_loader import PhotoLoader
from dreambooth.data.photos import load_photos
from dreambooth.evaluation import evaluator
from dreambooth.evaluation.evaluator import Evaluator, ReferencePhotos, Scorer
from dreambooth.runtime.engine import Engine
from dreambooth.utils.signals import StopRequest
from tests.data.noise_photos import save_noise
from tests.support.configs import resolve_demo

TEXTS = ["a toy", "a toy on the beach"]
FIDELITY = "prompt_fidelity_efficientnet_lite0"


class FakeScorer:
    """Scores nothing; records the base model's images that it gets."""

    def __init__(self) -> None:
        self.base_images: list[Any] = []

    def score(self, rows: Any, base_class_images: Any, base_images: Any, device: torch.device) -> dict[str, float]:
        self.base_images.append(base_images)
        return {"prompt_fidelity_border": 0.5} | ({FIDELITY: 0.75} if base_images else {})


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "prompts.txt").write_text("{subject}\n{subject} on the beach\n", encoding="utf-8")
    found = resolve_demo(evaluate__encoder=EncoderKind.efficientnet_lite0, evaluate__class_images=2,
                         evaluate__images_per_prompt=2, evaluate__prompts=str(tmp_path / "prompts.txt"))
    return replace(found, run_root=tmp_path, run_dir=tmp_path / "run")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts from which images are generated, in order. The colour of an image depends on prompt and seed."""
    prompts: list[str] = []

    def generate(pipeline: object, texts: list[str], seeds: list[int], *_: object, **__: object) -> Any:
        prompts.extend(texts)
        yield [Image.new("RGB", (8, 8), (len(text), seed % 256, 0)) for text, seed in zip(texts, seeds, strict=True)]

    monkeypatch.setattr(evaluator, "generate_images", generate)
    return prompts


def evaluator_of(recipe: Recipe, scorer: FakeScorer | None = None) -> Evaluator:
    tracker: Any = SimpleNamespace(log_metrics=lambda *_: True, log_image=lambda *_: True)
    fake: Any = scorer or FakeScorer()
    return Evaluator(recipe, fake, tracker, Engine(device=torch.device("cpu")), StopRequest())


def colours(recipe: Recipe) -> list[Any]:
    [folder] = (recipe.run_root / "base_images").iterdir()
    return [Image.open(path).getpixel((0, 0)) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("lost, again", [("prompt-1-0.png", TEXTS[1:]), ("class-0.png", TEXTS)])
def test_images_of_texts_are_stored_although_an_image_of_the_scored_base_is_gone(
        lost: str, again: list[str], recipe: Recipe, drawn: list[str]) -> None:
    evaluator_of(recipe).evaluate(0, None)
    complete = colours(recipe)
    for path in [*recipe.run_root.glob("base_images/*/*.png"), *recipe.run_dir.glob(f"evaluation/*/*/{lost}")]:
        path.unlink()
    later = evaluator_of(recipe)
    drawn.clear()
    assert later.needs_base_model()
    assert later.num_images(0) == 2 * len(again)
    later.evaluate(0, None)
    assert drawn == [text for text in again for _ in range(2)]
    assert not later.needs_base_model() and not evaluator_of(recipe).needs_base_model()
    assert colours(recipe) == complete


def test_a_scored_step_is_tracked_without_reading_its_images(
        recipe: Recipe, drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator_of(recipe).evaluate(0, None)
    later, checked = evaluator_of(recipe), []
    check = evaluator.is_intact_png
    monkeypatch.setattr(evaluator, "is_intact_png", lambda path: bool(checked.append(path)) or check(path))
    drawn.clear()
    assert later.evaluate(0, None) == {"prompt_fidelity_border": 0.5, FIDELITY: 0.75}
    assert checked == drawn == []


def test_the_base_model_is_identified_once(
        recipe: Recipe, drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each identification reads 2 MiB of every weight file."""
    from dreambooth.utils import atomic_files

    scorer, read, digest = FakeScorer(), [], atomic_files.weights_digest
    monkeypatch.setattr(atomic_files, "weights_digest", lambda path: (read.append(str(path)), digest(path))[1])
    one = evaluator_of(recipe, scorer)
    assert one.needs_base_model() and one.num_images(0) == 8
    one.evaluate(0, None)
    one.evaluate(4, None)
    assert read.count(recipe.source) == 1
    assert scorer.base_images[0] is scorer.base_images[1]
    assert list(scorer.base_images[0]) == TEXTS


class CountingEncoder:
    """An encoder whose embedding of an image is its mean colour. It records how many images it embeds."""

    name = "efficientnet_lite0"

    def __init__(self) -> None:
        self.embedded: list[int] = []

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.embedded.append(len(pixels))
        return pixels.mean((2, 3))

    def embed_texts(self, prompts: object) -> None:
        return None

    def to(self, device: torch.device) -> None:
        return None


def test_the_base_models_images_are_embedded_once_per_evaluator(
        recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def images(*colours: str) -> list[Image.Image]:
        return [Image.new("RGB", (64, 64), colour) for colour in colours]

    monkeypatch.setattr(evaluator, "open_encoder", lambda *_, **__: CountingEncoder())
    device, scorer = torch.device("cpu"), Scorer(recipe)
    encoder: Any = scorer.encoders[0]
    base = {TEXTS[0]: images("white", "white", "white"), TEXTS[1]: images("yellow", "orange", "gold")}
    rows = [images("white"), images("yellow", "orange"), images("white")]
    first, second = (scorer.score(rows, None, base, device) for _ in range(2))
    assert first == second == Scorer(recipe).score(rows, None, base, device)
    assert first[FIDELITY] == 1 and encoder.embedded.count(6) == 1
    exchanged = dict(zip(TEXTS, reversed(base.values()), strict=True))
    assert scorer.score(rows, None, exchanged, device)[FIDELITY] == 0  # other images: embedded again


def test_reference_photos_may_be_deleted_after_the_start(tmp_path: Path) -> None:
    photo = save_noise(tmp_path / "photo.png", (64, 64))
    expected = Image.open(photo).convert("RGB")
    for _ in range(2):  # the second start decodes photos when their pixels are read
        [loaded] = load_photos([photo], "a toy", 64, load=PhotoLoader(tmp_path, saved=True, memory_limit=0))
    reference = ReferencePhotos([loaded], 64)
    photo.unlink()
    assert reference[0].tobytes() == expected.tobytes()
    open_hashes.cache_clear()
