"""Setting up a run: only what the run uses can stop it."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dreambooth.config.dataset import Dataset
from dreambooth.config.enums import EncoderKind, MethodKind, PriorKind
from dreambooth.config.evaluate import Evaluate
from dreambooth.config.method import Method
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config, Prior, Sample
from dreambooth.data import class_images
from dreambooth.data.photos import Photo
from dreambooth.errors import UserError
from dreambooth.models import loading
from dreambooth.runtime.engine import Engine
from dreambooth.training import setup
from tests.support.configs import demo_recipe

DATA = Dataset(instance_dir="package:demo", instance_prompt="a zwx toy", class_prompt="a toy")
PHOTOS = [Photo(Path("a.png"), np.zeros((8, 8, 3), np.uint8), "a caption")]


class EnoughSeen(Exception):
    """Ends a command before it loads the base model."""


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


def test_class_prompts_are_encoded_for_a_run_that_preserves_output() -> None:
    recipe = resolve(Config(
        dataset=DATA, sample=Sample(every=None), prior=Prior(kind=PriorKind.output),
        method=Method("lora", MethodKind.lora), evaluate=Evaluate(encoder=EncoderKind.none)), Path("run"))
    assert setup._prompts(recipe, PHOTOS) == {"a caption", "a toy"}
    encoded: list[str] = []
    parts: Any = SimpleNamespace(frozen_text=encoded.append)
    setup._build_prompt_encoder(recipe, parts, [setup._build_photo_set(recipe, "instance", PHOTOS)])
    assert encoded == ["a caption", "a toy"]


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_process_of_a_host_encodes_the_prompts_of_class_images(
        local_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it, and load no text encoders."""
    def load(*args: object) -> None:
        raise EnoughSeen

    seen: list[str] = []
    engine = Engine(local_rank=local_rank, local_world_size=2, barrier=lambda: seen.append("barrier"))
    monkeypatch.setattr(setup, "create_engine", lambda *args: (engine, None))
    monkeypatch.setattr(loading, "encode_prompts", lambda *args: seen.append("encode"))
    monkeypatch.setattr(loading, "load", load)
    with pytest.raises(EnoughSeen):
        setup.make_class_images(replace(demo_recipe(prior__with_prior_preservation=True), run_root=tmp_path))
    assert seen == ["encode"] * (local_rank == 0) + ["barrier"]


def test_captions_are_not_read_ahead_if_the_text_encoders_stay_in_memory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object) -> None:
        raise EnoughSeen

    monkeypatch.setattr(class_images, "captions", lambda recipe: pytest.fail("captions are read for nothing"))
    monkeypatch.setattr(loading, "load", load)
    recipe = replace(demo_recipe(prior__with_prior_preservation=True, evaluate__encoder=EncoderKind.none),
                     run_root=tmp_path)
    unused: Any = SimpleNamespace(say=lambda text: None, phase=lambda name: nullcontext())
    with pytest.raises(EnoughSeen):
        setup.assemble(recipe, Engine(), unused, unused, unused)


def test_a_step_has_a_photo_for_every_process() -> None:
    recipe = demo_recipe(train__global_batch_size=2)
    setup._check_processes(recipe, Engine(world_size=2))
    with pytest.raises(UserError, match=r"type train\.global_batch_size=3, or start at most 2 processes"):
        setup._check_processes(recipe, Engine(world_size=3))


def test_old_leftovers_of_a_killed_process_leave_the_photo_index(tmp_path: Path) -> None:
    folder = tmp_path / "photo_index"
    folder.mkdir()
    for name in (".writing-1234-files.jsonl", "files.jsonl"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    setup.remove_shared_leftovers(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["files.jsonl"]
