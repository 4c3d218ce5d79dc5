"""Setting up a run: only what the run uses can stop it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dreambooth.config.dataset import Dataset
from dreambooth.config.enums import EncoderKind
from dreambooth.config.evaluate import Evaluate
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config, Prior, Sample
from dreambooth.data.photos import Photo
from dreambooth.training import setup

DATA = Dataset(instance_dir="package:demo", instance_prompt="a zwx toy", class_prompt="a toy")
PHOTOS = [Photo(Path("a.png"), np.zeros((8, 8, 3), np.uint8), "a caption")]


@pytest.mark.parametrize("every, prior, encoder, texts", [
    (None, False, "none", {"a caption"}), (2, False, "none", {"a caption", "a sample"}),
    (None, True, "none", {"a caption", "a toy"}),
    (None, False, "efficientnet_lite0", {"a caption", "a toy", "a toy on the beach", "a zwx toy on the beach"})])
def test_a_prompt_that_nobody_uses_may_be_too_long(
        tmp_path: Path, every: int | None, prior: bool, encoder: str, texts: set[str]) -> None:
    """Captions replace the instance prompt; the class prompt is for class images and for their evaluation."""
    (prompts := tmp_path / "prompts.txt").write_text("{subject} on the beach")
    recipe = resolve(Config(
        dataset=DATA, sample=Sample(every=every, prompts=["a sample"]), prior=Prior(with_prior_preservation=prior),
        evaluate=Evaluate(encoder=EncoderKind[encoder], prompts=str(prompts))), Path("run"))
    checked: set[str] = set()
    setup._check_prompts(SimpleNamespace(tokens=checked.add), recipe, PHOTOS)  # type: ignore[arg-type]
    assert checked == texts
