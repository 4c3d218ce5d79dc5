"""What a step need not do: convolutions of one pixel by way of oneDNN, and a prompt that rows share more than once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth.config.compose import load
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.data.batches import Batch
from dreambooth.models import loading
from dreambooth.models.layers.pointwise_conv import MAX_CHANNELS_PER_PIXEL, PointwiseConv2d, use_matrix_products
from tests.support.configs import compose_config
from tests.support.tiny_models import make
from tests.support.toy_model import make_batches, make_photo_set

UNIT = 2.0**-24


def recipe(*overrides: str) -> Recipe:
    return resolve(load(compose_config(*overrides)), Path("runs/x"))


def convolution(count: int, side: int, before: int = 24, after: int = 40, bias: bool = True) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return nn.Conv2d(before, after, 1, bias=bias), torch.randn(count, before, side, side)


# -- convolutions of one pixel --------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_convolution_but_for_the_order_of_its_sums(bias: bool) -> None:
    layer, pixels = convolution(3, 8, bias=bias)
    plain, inputs = layer(pixels), layer.in_channels
    use_matrix_products(layer)
    assert type(layer) is PointwiseConv2d
    found = layer(pixels)
    gamma = (inputs + 1) * UNIT / (1 - (inputs + 1) * UNIT)
    whole = torch.einsum("oi,nihw->nohw", layer.weight[..., 0, 0].abs(), pixels.abs())
    whole = whole + layer.bias.abs().view(1, -1, 1, 1) if bias else whole
    assert ((found - plain).abs() <= 2 * gamma * whole).all()
    assert found.is_contiguous() and found.shape == plain.shape


def test_its_gradients_are_the_convolutions() -> None:
    layer, pixels = convolution(3, 8)
    layer, pixels = layer.double(), pixels.double().requires_grad_()
    goal = torch.randn(3, 40, 8, 8, dtype=torch.float64)
    seen = []
    for _ in range(2):
        (layer(pixels) * goal).sum().backward()
        seen.append([pixels.grad, layer.weight.grad, layer.bias.grad])
        pixels.grad = layer.weight.grad = layer.bias.grad = None
        use_matrix_products(layer)
    for plain, product in zip(*seen, strict=True):
        torch.testing.assert_close(product, plain, rtol=1e-13, atol=1e-13)


def test_more_channels_than_pixels_stay_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a product")

    layer, pixels = convolution(2, 2, after=4 * MAX_CHANNELS_PER_PIXEL + 1)
    plain = layer(pixels)
    use_matrix_products(layer)
    monkeypatch.setattr(torch, "baddbmm", refuse)
    assert torch.equal(layer(pixels), plain)
    with pytest.raises(AssertionError, match="a product"):
        layer(torch.zeros(2, 24, 3, 3))


@pytest.mark.parametrize("given", [
    {"kernel_size": 3}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 1, "padding": 1},
    {"kernel_size": 1, "groups": 2}])
def test_other_convolutions_stay_as_they_are(given: dict[str, int]) -> None:
    layer = nn.Conv2d(8, 8, **given)  # type: ignore[arg-type]
    use_matrix_products(layer)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("words, products", [
    (("hardware=cpu",), True), (("hardware=cpu", "train.channels_last=true"), False),
    (("hardware=cpu", "precision=bf16"), False), (("hardware=g4dn", "model=tiny", "precision=fp32"), False)])
def test_a_cpu_run_in_fp32_computes_them_as_products(words: tuple[str, ...], products: bool) -> None:
    asked = recipe(*words)
    parts = loading.load(replace(asked, device="cpu"), torch.device("cpu"))
    names = list(parts.denoiser.state_dict())
    denoiser = loading.prepare(parts, asked)
    pointwise = [module for module in denoiser.unet.modules() if isinstance(module, PointwiseConv2d)]
    assert len(pointwise) == (22 if products else 0)
    assert list(parts.denoiser.state_dict()) == names


# -- prompts that rows share ----------------------------------------------------------------------------------------

def test_a_prompt_of_all_rows_of_a_half_is_given_once() -> None:
    photo_sets = [make_photo_set(), make_photo_set("class", 7)]
    same = [replace(one, photos=[replace(photo, caption=f"prompt {number}") for photo in one.photos])
            for number, one in enumerate(photo_sets)]
    [once] = make_batches(batch=3, photo_sets=same, share_prompts=True)(0)
    [rows] = make_batches(batch=3, photo_sets=same)(0)
    assert once.text.tolist() == [[0], [1]]
    assert rows.text.tolist() == [[0]] * 3 + [[1]] * 3
    for half, whole in zip(once.halves(), rows.halves(), strict=True):
        assert half.text.tolist() == whole.text[:1].tolist()
        assert torch.equal(half.latents, whole.latents) and torch.equal(half.timesteps, whole.timesteps)


@pytest.mark.parametrize("change", [
    {"prompt_dropout": 0.5}, {"photos": [replace(photo, caption=f"a {number}") for number, photo
                                         in enumerate(make_photo_set().photos)]}])
def test_prompts_that_differ_are_given_row_by_row(change: dict[str, Any]) -> None:
    """In every step, though rows of some agree by chance: a compiled model takes one shape only."""
    plain = replace(make_photo_set(), photos=[replace(photo, caption="a 1") for photo in make_photo_set().photos])
    photo_sets = [replace(plain, **change), replace(plain, name="class")]
    batches = make_batches(batch=3, photo_sets=photo_sets, share_prompts=True)
    batches.encode_prompt = lambda prompt: torch.zeros(1, 1)
    assert {len(batches(step)[0].text) for step in range(4)} == {6}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_shared_prompt_trains_the_encoder_as_its_rows_would(family: str, tmp_path: Path) -> None:
    """The gradient of a sum is the sum of gradients: in fp64, equal but for rounding."""
    asked = recipe("hardware=cpu", f"model.source={make(family, tmp_path)}", "model.resolution=16",
                   "train.train_text_encoder=true", "dataset.allow_drawings=true")
    parts = loading.load(asked, torch.device("cpu"))
    denoiser = loading.prepare(parts, asked).double()
    torch.manual_seed(0)
    latents, goal = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    steps = torch.tensor([3, 500, 70, 999])
    prompts = torch.cat([parts.tokens(prompt) for prompt in ("a zwx toy", "a toy")])
    seen = []
    for text in (prompts, prompts.repeat_interleave(2, 0)):
        prediction = denoiser(latents, steps, text)
        (prediction * goal).sum().backward()
        seen.append([prediction.detach()] + [p.grad.clone() for p in denoiser.parameters() if p.grad is not None])
        denoiser.zero_grad()
    assert len(seen[0]) == len(seen[1]) > 50
    for once, rows in zip(*seen, strict=True):
        torch.testing.assert_close(once, rows, rtol=1e-9, atol=1e-9)


def test_the_encoder_reads_each_prompt_once(tmp_path: Path) -> None:
    from dreambooth.runtime.engine import create_engine
    from dreambooth.runtime.memory_meter import MemoryMeter
    from dreambooth.training.setup import assemble
    from dreambooth.utils.console import Console

    for words, prompts in (("train.train_text_encoder=true",), 2), (
            ("method=lora", "method.dropout=0.1", "train.train_text_encoder=true"), 6):
        asked = resolve(load(compose_config(
            "hardware=cpu", "tracking=none", "train.train_batch_size=3", "prior.num_class_images=3",
            "prior.num_inference_steps=1", "evaluate.encoder=none", f"run_root={tmp_path}", *words)), tmp_path / "run")
        engine, accelerator = create_engine(asked.device, asked.precision.dtype)
        found = assemble(asked, engine, accelerator, Console(quiet=True), MemoryMeter(engine.device))
        seen: list[int] = []
        found.parts.encoders[0].register_forward_pre_hook(lambda _, given, to=seen: to.append(len(given[0])))
        batch: Batch
        [batch] = found.batches(0)
        assert batch.num_samples == 6
        found.objective(found.trained, batch)
        assert seen == [prompts]
