"""Several subjects in a run, and a run with every data option."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.data import subjects
from dreambooth.data.photo_set import PhotoSet
from dreambooth.errors import ConfigError, UserError
from dreambooth.runs.identity import identity
from tests.data.noise_photos import TWO, recipe, save_noise, write_metadata
from tests.support.configs import compose_config

# -- several subjects ---------------------------------------------------------------------------------------------

def test_each_subject_has_its_own_folder_prompts_and_class() -> None:
    resolved = recipe(*TWO, "dataset.concepts.1.repeats=3", "dataset.concepts.1.class_dir=C")
    first, second = resolved.subject_recipes
    assert [first.instance_prompt, second.instance_prompt] == ["a photo of a zwx dog", "a photo of a ohwx dog"]
    assert [first.instance_dir.name, second.instance_dir.name] == ["A", "B"]
    assert first.class_dir is None and second.class_dir is not None and second.class_dir.name == "C"
    assert "a photo of a ohwx dog on the beach" in resolved.sample_prompts
    assert len(resolved.class_recipes) == 2


def test_subjects_of_one_class_share_its_images() -> None:
    assert len(recipe(*TWO).class_recipes) == 1
    assert len(recipe(*TWO, "dataset.concepts.1.class_prompt=a photo of a cup").class_recipes) == 2


def test_with_one_subject_its_recipe_is_that_of_the_run() -> None:
    resolved = recipe()
    assert resolved.subject_recipes == (resolved,)


def test_photos_of_all_subjects_have_their_own_captions_and_repeats(tmp_path: Path) -> None:
    for folder, count in (("A", 3), ("B", 1)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            save_noise(tmp_path / folder / f"{i}.png", seed=i)
    loaded, repeats = subjects.load_subject_photos(recipe(
        *TWO, f"dataset.concepts.0.instance_dir={tmp_path / 'A'}", f"dataset.concepts.1.instance_dir={tmp_path / 'B'}",
        "dataset.concepts.1.repeats=3"))
    assert [photo.caption for photo in loaded] == ["a photo of a zwx dog"] * 3 + ["a photo of a ohwx dog"]
    assert repeats == [1, 1, 1, 3]
    photo_set = PhotoSet("instance", loaded, True, False, repeats)
    seen = Counter(photo_set.view(0, step, 0, 1).photo for step in range(12))
    assert seen == {0: 2, 1: 2, 2: 2, 3: 6}


def held_out(folder: Path, count: int, *overrides: str) -> tuple[list[str], list[str]]:
    """The names of the photos that train, and of those that do not."""
    resolved = recipe(f"dataset.instance_dir={folder}", f"dataset.validation_count={count}",
                      "dataset.allow_drawings=true", *overrides)
    training, _ = subjects.load_subject_photos(resolved)
    return ([photo.path.name for photo in training],
            [photo.path.name for photo in subjects.load_held_out_photos(resolved, training)])


def test_held_out_photos_are_spread_over_the_names_and_do_not_train(tmp_path: Path) -> None:
    for i in range(7):
        save_noise(tmp_path / f"{i}.png", seed=i)
    assert held_out(tmp_path, 0) == ([f"{i}.png" for i in range(7)], [])
    assert held_out(tmp_path, 2) == (["0.png", "2.png", "3.png", "4.png", "6.png"], ["1.png", "5.png"])
    assert held_out(tmp_path, 4) == (["1.png", "3.png", "5.png"], ["0.png", "2.png", "4.png", "6.png"])
    with pytest.raises(UserError, match=r"fewer than 3 to train on: type dataset\.validation_count=4, or add photos"):
        held_out(tmp_path, 5)


def test_a_held_out_photo_that_also_trains_is_refused(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    for i in range(4):
        save_noise(tmp_path / f"{i}.png", seed=i)
    save_noise(tmp_path / "held/new.png", seed=9)
    other = f"dataset.validation_dir={tmp_path / 'held'}"
    assert held_out(tmp_path, 0, other) == ([f"{i}.png" for i in range(4)], ["new.png"])
    save_noise(tmp_path / "held/copy.png", seed=2)
    with pytest.raises(UserError, match=r"copy.png is held out of training, and .*2.png is the same photo"):
        held_out(tmp_path, 0, other)
    save_noise(tmp_path / "4.png", seed=1)
    with pytest.raises(UserError, match=r"1.png is held out of training, and .*4.png is the same photo"):
        held_out(tmp_path, 2)


def test_each_subject_has_held_out_photos_of_its_own(tmp_path: Path) -> None:
    for name, first in (("A", 0), ("B", 10), ("C", 20)):
        (tmp_path / name).mkdir()
        for i in range(5):
            save_noise(tmp_path / name / f"{name}{i}.png", seed=first + i)
    folders = [f"dataset.concepts.{i}.instance_dir={tmp_path / name}" for i, name in enumerate("AB")]
    both = recipe(*TWO, *folders, "dataset.validation_count=1")
    assert [photo.path.name for photo in subjects.load_held_out_photos(both, [])] == ["A2.png", "B2.png"]
    second = recipe(*TWO, *folders, f"dataset.concepts.1.validation_dir={tmp_path / 'C'}")
    loaded = subjects.load_held_out_photos(second, [])
    assert [photo.path.name for photo in loaded] == [f"C{i}.png" for i in range(5)]
    assert {photo.caption for photo in loaded} == {"a photo of a ohwx dog"}


@pytest.mark.parametrize("override, typed", [
    ("dataset.concepts.1.instance_dir=null", "dataset.concepts.1.instance_dir=DIR"),
    ("dataset.concepts.1.instance_prompt=' '", "dataset.concepts.1.instance_prompt="),
    ("dataset.concepts.0.class_prompt=null", "dataset.concepts.0.class_prompt="),
    ("dataset.instance_dir=A", "dataset.instance_dir=null"),
    ("dataset.concepts.1.instance_prompt=a photo of a zwx dog", "type another word"),
    ("memory.optimizer_in_backward=true dataset.buckets=true", "memory.optimizer_in_backward=false"),
    ("train.compile=true dataset.buckets=true", "train.compile=false"),
])
def test_an_error_in_a_subject_is_one_sentence_that_says_what_to_type(override: str, typed: str) -> None:
    words = override.split(" d") if override.count("=") > 1 else [override]
    with pytest.raises(ConfigError) as raised:
        recipe(*TWO, *(word if word.startswith(("dataset", "memory", "train")) else f"d{word}" for word in words))
    [sentence] = raised.value.problems
    assert typed in sentence


@pytest.mark.parametrize("override", [
    "dataset.mask=alpha", "dataset.buckets=true", "dataset.prompt_dropout=0.1", "precision=tf32"])
def test_identity_changes_with_later_keys(override: str) -> None:
    assert identity(compose_config(override)) != identity(compose_config())


def test_identity_follows_the_content_of_every_subjects_folder(tmp_path: Path) -> None:
    for folder in "AB":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"one")
    overrides = [*TWO, f"dataset.concepts.0.instance_dir={tmp_path}/A",
                 f"dataset.concepts.1.instance_dir={tmp_path}/B"]
    before = identity(compose_config(*overrides))
    (tmp_path / "B/a.png").write_bytes(b"two")
    assert identity(compose_config(*overrides)) != before


def test_settings_contain_the_subjects() -> None:
    assert json.loads(recipe(*TWO).settings()["dataset.concepts"])[1]["instance_prompt"] == "a photo of a ohwx dog"


@pytest.mark.parametrize("on", [True, False])
def test_tf32_applies_to_matrix_products_and_convolutions(on: bool) -> None:
    from dreambooth.config.enums import Dtype
    from dreambooth.runtime.engine import create_engine

    torch.backends.cudnn.allow_tf32 = not on
    create_engine("cpu", Dtype.fp32, on)
    try:
        assert torch.backends.cuda.matmul.allow_tf32 is on
        assert torch.backends.cudnn.allow_tf32 is on
    finally:
        create_engine("cpu", Dtype.fp32)


# -- whole runs ---------------------------------------------------------------------------------------------------

def write_full_project(folder: Path) -> list[str]:
    """Write photos of two subjects in several shapes, one subject with transparency.

    Returns the overrides of a run that uses them with every data option on."""
    for name, sizes in (("A", [(64, 64), (80, 48)]), ("B", [(48, 80), (64, 64), (64, 60)])):
        (folder / name).mkdir()
        for i, (width, height) in enumerate(sizes):
            noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(noise)
            if name == "B":
                image = image.convert("RGBA")
                image.putalpha(Image.new("L", image.size, 0))
                image.paste((200, 30, 90, 255), (8, 8, 40, 40))
            image.save(folder / name / f"{i}.png")
    write_metadata(folder / "A", {"file_name": "0.png", "text": "a photo of a zwx toy on the beach"})
    first, second = "dataset.concepts.0", "dataset.concepts.1"
    return ["name=demo", "dataset=concepts", f"{first}.instance_dir={folder}/A", f"{second}.instance_dir={folder}/B",
            f"{first}.instance_prompt=a photo of a zwx toy", f"{first}.class_prompt=a photo of a toy",
            f"{second}.instance_prompt=a photo of a ohwx car", f"{second}.class_prompt=a photo of a car",
            f"{second}.mask=alpha", f"{first}.repeats=2", "dataset.buckets=true", "dataset.prompt_dropout=0.3"]


@pytest.mark.slow
def test_a_run_with_every_data_option_resumes_bit_for_bit(tmp_path: Path) -> None:
    from tests.support.faults import train
    from tests.support.runs import assert_same, the_run

    overrides, whole, resumed = write_full_project(tmp_path), tmp_path / "whole", tmp_path / "resumed"
    overrides += ["sample.every=null", "prior.num_class_images=2"]
    assert train(whole, *overrides, "train.max_train_steps=6", log=tmp_path / "out.txt") == 0
    assert train(resumed, *overrides, "train.max_train_steps=2") == 0
    assert train(resumed, *overrides, "train.max_train_steps=6") == 0
    assert_same(the_run(resumed), the_run(whole))
    output = (tmp_path / "out.txt").read_text()
    assert "of 80 x 48" in output and "% of a photo is cropped" in output and "a photo of a ohwx car" in output
    assert "a photo of a zwx toy** or **a photo of a ohwx car" in (the_run(whole) / "model/README.md").read_text()
    assert len(list((whole / "class_images").iterdir())) == 2
