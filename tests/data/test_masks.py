"""Masks: no gradient outside, weights of latents, sources of a mask; and prompt dropout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreambooth.data import masks, subjects
from dreambooth.data.photo_set import PhotoSet
from dreambooth.data.photos import Photo, list_photos, load_photos
from dreambooth.errors import UserError
from dreambooth.runtime.engine import Engine
from dreambooth.training.loss import dreambooth_loss
from dreambooth.training.step import Objective, train_step
from tests.data.noise_photos import PROMPT, bucketed_set, loading_error, recipe, save_noise
from tests.support.toy_model import ToyModel, make_batches, make_schedule, make_state

# -- masks --------------------------------------------------------------------------------------------------------

def masked_set(count: int = 3, name: str = "instance") -> PhotoSet:
    """Photos of 8 x 12 whose mask is the left part of the image, without the last columns of its centre crop."""
    generator = np.random.default_rng(2)
    photos = []
    for i in range(count):
        mask = np.zeros((8, 12), dtype=np.uint8)
        mask[:, :5 + i] = 255
        pixels = generator.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        photos.append(Photo(Path(f"{i}.png"), pixels, f"caption {i}", None, mask))
    return PhotoSet(name, photos, True, False)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_gradient_of_the_prediction_is_exactly_zero_outside_the_mask(gamma: float | None) -> None:
    batch = make_batches(3, photo_sets=[masked_set(), bucketed_set("class", [(8, 8)] * 4)])(0)[0]
    assert batch.mask is not None
    seen: list[torch.Tensor] = []

    def model(latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        seen.append(torch.randn_like(latents).requires_grad_())
        return seen[0]

    Objective(make_schedule(), 0.5, gamma)(model, batch).total.backward()
    gradient = seen[0].grad
    assert gradient is not None
    outside = batch.mask.expand_as(gradient) == 0
    assert outside[:3].any() and not outside[3:].any()
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).all(), "zero inside a mask, or in class images, which have none"


@given(st.integers(0, 7), st.integers(1, 8), st.sampled_from([2, 4, 8]))
def test_a_latents_weight_is_its_share_of_the_mask_and_zero_outside(left: int, wide: int, scale: int) -> None:
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, left:left + wide] = 255
    weights = masks.downscale_to_latents(mask, scale)
    assert weights.shape == (16 // scale, 16 // scale)
    assert weights.sum() * scale**2 == pytest.approx((mask > 0).sum())
    touched = mask.reshape(16 // scale, scale, 16 // scale, scale).any((1, 3))
    assert ((weights > 0) == touched).all()


def test_a_white_mask_equals_no_mask() -> None:
    """Means of 64 fp64 terms, summed and divided in another order: a relative error of 64 eps."""
    p, g, w = torch.randn(6, 1, 8, 8).double(), torch.randn(6, 1, 8, 8).double(), torch.rand(6).double()
    plain, white = (dreambooth_loss(p, g, 3, 0.7, w, mask) for mask in (None, torch.ones(6, 1, 8, 8).double()))
    assert float(white.total) == pytest.approx(float(plain.total), rel=64 * 2.3e-16)


def test_a_small_masked_area_weighs_as_much_as_a_large_one() -> None:
    error, mask = torch.ones(2, 4, 8, 8), torch.ones(2, 1, 8, 8)
    mask[1, :, 1:, :] = 0
    losses = dreambooth_loss(error, torch.zeros_like(error), 2, 1.0, None, mask)
    assert float(losses.total) == 1.0


def test_a_crop_outside_the_mask_has_a_zero_gradient_and_no_nan() -> None:
    prediction = torch.randn(2, 1, 4, 4, requires_grad=True)
    dreambooth_loss(prediction, torch.zeros(2, 1, 4, 4), 2, 1.0, None, torch.zeros(2, 1, 4, 4)).total.backward()
    assert prediction.grad is not None and (prediction.grad == 0).all()


def test_a_mask_is_cropped_and_mirrored_with_its_photo() -> None:
    pixels = np.repeat(np.random.default_rng(0).integers(0, 2, (8, 12, 1), dtype=np.uint8) * 255, 3, axis=2)
    photo_set = PhotoSet("instance", [Photo(Path("a.png"), pixels, "caption 0", None, pixels[..., 0])], False, True)
    batches = make_batches(1, photo_sets=[photo_set], scale=1.0)
    for step in range(12):
        view = photo_set.view(3, step, 0, 1)
        mask = batches.loss_mask(photo_set, [view])
        assert mask is not None
        assert ((batches.latents.pixels(photo_set, [view])[0, 0] > 0).double() == mask[0, 0]).all()


def test_a_split_prior_pass_computes_the_same_with_masks_in_fp64() -> None:
    """The bound of step._halves: 2 n u times the sum of terms; n below 1000, u = 1.1e-16, gradients below 100."""
    weights = []
    for split in (False, True):
        model = ToyModel()
        state = make_state(model)
        parts = make_batches(3, photo_sets=[masked_set(), masked_set(4, "class")])(0)
        train_step(state, parts, Objective(make_schedule(), 0.5, None, split), Engine(), None)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-11, rtol=0) for a, b in zip(*weights, strict=True))


def test_masks_are_read_from_a_folder_or_from_transparency(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    save_noise(tmp_path / "a.jpg", (32, 24))
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 32, 48))
    mask.save(tmp_path / "masks" / "a.png")
    [photo] = load_photos(list_photos(tmp_path), PROMPT, 24, mask=str(tmp_path / "masks"))
    assert photo.mask is not None and photo.mask.shape == photo.pixels.shape[:2]
    assert (photo.mask[:, :16] == 255).all() and (photo.mask[:, 16:] == 0).all()
    (tmp_path / "a.jpg").unlink()
    cut_out = Image.new("RGBA", (32, 24), (9, 9, 9, 0))
    cut_out.paste((1, 2, 3, 255), (16, 0, 32, 24))
    cut_out.save(tmp_path / "b.png")
    [photo] = load_photos(list_photos(tmp_path), PROMPT, 24, mask="alpha")
    assert photo.mask is not None and (photo.mask[:, 16:] == 255).all() and (photo.mask[:, :16] == 0).all()


def test_a_photo_without_a_usable_mask_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name in ("none.png", "black.png", "other.png"):
        save_noise(tmp_path / name, (32, 24))
    Image.new("L", (32, 24)).save(tmp_path / "m" / "black.png")
    Image.new("L", (24, 32), 255).save(tmp_path / "m" / "other.png")
    sentence = loading_error(tmp_path, mask=str(tmp_path / "m"))
    assert "none.png has no mask: put none.png into" in sentence
    assert "black.png has an empty mask" in sentence
    assert "other.png has 32 x 24 pixels, but its mask other.png has 24 x 32" in sentence
    assert "none.png has no transparency" in loading_error(tmp_path, mask="alpha")


def test_a_mask_outside_the_centre_crop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_noise(tmp_path / "a.png", (256, 64))
    mask = Image.new("L", (256, 64))
    mask.paste(255, (0, 0, 20, 64))
    mask.save(tmp_path / "m" / "a.png")
    overrides = [f"dataset.instance_dir={tmp_path}", f"dataset.mask={tmp_path / 'm'}"]
    with pytest.raises(UserError, match=r"mask of a\.png is outside the centre"):
        subjects.load_subject_photos(recipe(*overrides))


# -- prompt dropout -----------------------------------------------------------------------------------------------

def test_prompts_are_dropped_with_the_given_probability_and_reproducibly() -> None:
    photo_set = bucketed_set(prompt_dropout=0.3)
    dropped = [photo_set.view(0, step, index, 4).drop_prompt for step in range(300) for index in range(4)]
    assert sum(dropped) / len(dropped) == pytest.approx(0.3, abs=0.04)  # 3 standard deviations of 1200 draws
    assert dropped == [photo_set.view(0, step, index, 4).drop_prompt for step in range(300) for index in range(4)]


def test_a_dropped_prompt_is_empty_and_changes_nothing_else() -> None:
    prompts: list[str] = []

    def encode_prompt(prompt: str) -> torch.Tensor:
        prompts.append(prompt)
        return torch.tensor([[0]])

    plain, dropped = (make_batches(4, photo_sets=[bucketed_set(prompt_dropout=p)]) for p in (0.0, 0.5))
    dropped.encode_prompt = encode_prompt
    for step in range(6):
        a, b = plain(step)[0], dropped(step)[0]
        assert a.latents.equal(b.latents) and a.noise.equal(b.noise) and a.timesteps.equal(b.timesteps)
    assert {"", "caption 0"} <= set(prompts)
