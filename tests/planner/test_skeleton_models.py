"""Skeleton models: the dtype of a replaced VAE, and unknown architectures."""

import json
from pathlib import Path

import pytest
import torch

from dreambooth.errors import UserError
from dreambooth.planner.fake_cuda import fake_tensors
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.skeleton_models import build_skeleton
from dreambooth.utils.assets import resolve_asset
from tests.support.configs import demo_recipe


@pytest.mark.parametrize("vae, dtype", [
    (None, torch.float32), ("madebyollin/sdxl-vae-fp16-fix", torch.float16), ("stabilityai/sdxl-vae", torch.float32),
    ("models/sdxl_vae.safetensors", torch.float32), ("models/sdxl-vae-fp16-fix.safetensors", torch.float16)])
def test_a_replaced_vae_is_planned_in_the_precision_in_which_it_is_loaded(
        vae: str | None, dtype: torch.dtype) -> None:
    """SDXL's VAE overflows in half precision, whoever publishes it; its fixed version is recognised by name."""
    with fake_tensors():
        assert build_skeleton(demo_recipe("sdxl", model__vae=vae)).vae.dtype is dtype


@pytest.mark.parametrize("upcast", [True, False])
def test_the_configuration_of_a_vae_states_whether_half_precision_overflows(upcast: bool, tmp_path: Path) -> None:
    packaged = Path(resolve_asset("package:architectures")) / "sdxl/vae/config.json"
    (tmp_path / "config.json").write_text(json.dumps(json.loads(packaged.read_text()) | {"force_upcast": upcast}))
    with fake_tensors():
        vae = build_skeleton(demo_recipe("sdxl", model__vae=str(tmp_path))).vae
    assert vae.dtype is (torch.float32 if upcast else torch.float16)


def test_a_model_of_unknown_architecture_is_refused_with_advice() -> None:
    recipe = demo_recipe("sd15", model__name="other", model__source="somebody/other")
    with pytest.raises(UserError, match=r"type model\.source=DIR"):
        predict(recipe)
