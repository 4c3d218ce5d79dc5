"""Values that are NaN or infinite are found in tensors of any precision, in pictures, and before a file is written."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from dreambooth.errors import Diverged, UserError
from dreambooth.models.finite import first_not_finite
from dreambooth.models.pipeline import Sampler, generate_images
from dreambooth.serialization import single_file


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_tensor_that_is_not_finite_is_named(dtype: torch.dtype, value: float) -> None:
    tensors = {name: torch.linspace(-9, 9, 35).to(dtype).view(5, 7).T for name in "abc"}
    others = {"empty": torch.empty(0, dtype=dtype), "ids": torch.arange(3), "0-d": torch.zeros((), dtype=dtype),
              "largest": torch.full((3,), torch.finfo(dtype).max if dtype.itemsize < 8 else 1e30, dtype=dtype)}
    assert first_not_finite(tensors | others) is None
    tensors["b"][3, 2] = value
    assert first_not_finite(tensors | others) == "b"


def test_numbers_of_eight_bits_are_checked() -> None:
    weights = torch.linspace(-9, 9, 35).to(torch.float8_e4m3fn)
    assert first_not_finite({"a": weights}) is None
    weights[3] = math.nan
    assert first_not_finite({"a": weights}) == "a"


def pictures_of(pixels: np.ndarray) -> Any:
    """The first batch of a pipeline that returns `pixels`."""
    class Pipeline(SimpleNamespace):
        def __call__(self, **inputs: Any) -> Any:
            return SimpleNamespace(images=pixels)

    pipeline = Pipeline(components={"unet": SimpleNamespace(config={})}, image_processor=VaeImageProcessor())
    return next(generate_images(pipeline, ["a toy"], [0], Sampler(1, 1.0, 8), 1))


def test_a_picture_that_is_not_finite_is_not_drawn() -> None:
    pixels = np.full((1, 8, 8, 3), 0.25, np.float32)
    [picture] = pictures_of(pixels)
    assert picture.getpixel((0, 0)) == (64, 64, 64)
    pixels[0, 3, 3, 1] = math.nan
    with pytest.raises(Diverged, match=r"pictures of 'a toy' are not finite.*type .*precision=fp32"):
        pictures_of(pixels)


def test_a_weight_that_exceeds_fp16_is_not_converted_silently() -> None:
    weights = {"unet.a": torch.ones(2), "unet.b": torch.tensor([1.0, 70_000.0])}
    single_file.check_finite(weights)
    with pytest.raises(UserError, match=r"the weight unet\.b is not finite in float16: type dtype=fp32"):
        single_file.check_finite({name: weight.half() for name, weight in weights.items()})
