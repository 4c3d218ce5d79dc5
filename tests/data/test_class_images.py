"""Class images: reused by prompt, model and sampler; only missing ones are generated."""

import dataclasses
import os
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.config.compose import load
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.data import class_images
from tests.support.configs import compose_config
from tests.support.runs import flip_bit


def make_recipe(root: Path, *overrides: str) -> Recipe:
    return resolve(load(compose_config(f"run_root={root}", "prior.sample_batch_size=2", *overrides)), root / "run")


def generate_all(recipe: Recipe, rank: int = 0, world_size: int = 1) -> list[int]:
    """Generate the missing images; returns the seeds that were used."""
    seeds: list[int] = []

    def generate(batch: list[int]) -> list[Image.Image]:
        seeds.extend(batch)
        return [Image.new("RGB", (4, 4), (seed % 256, 0, 0)) for seed in batch]

    class_images.generate_missing(class_images.find(recipe), recipe, generate, lambda count: None, rank, world_size)
    return seeds


def test_more_class_images_add_only_the_missing_ones(tmp_path: Path) -> None:
    three, five, six = (make_recipe(tmp_path, f"prior.num_class_images={count}") for count in (3, 5, 6))
    first = generate_all(three)
    times = {path: path.stat().st_mtime_ns for path in class_images.find(three).paths}
    more = generate_all(five)
    assert (len(first), len(more), len(set(first + more))) == (3, 3, 5), "a batch is generated as a whole"
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    assert str(class_images.find(six)) == "6 class images: 5 existing, 1 to generate"


def test_another_prompt_sampler_or_base_model_does_not_reuse_them(tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        return class_images.find(make_recipe(tmp_path, *overrides)).folder.name.rsplit("-", 1)[1]

    others = ["dataset.class_prompt=a photo  of a toy", "prior.guidance_scale=2", "prior.num_inference_steps=3",
              "model.resolution=128", "precision=bf16", "model.revision=x", "prior.sample_batch_size=7"]
    assert len({key(), *map(key, others)}) == len(others) + 1
    for same in ("train.seed=5", "dataset.instance_prompt=a zwx"):
        assert key(same) == key()


def test_other_weights_of_the_model_do_not_reuse_them(tmp_path: Path) -> None:
    keys = set()
    for content in (b"one", b"two"):
        (tmp_path / "unet.safetensors").write_bytes(content)
        other = dataclasses.replace(make_recipe(tmp_path), source=str(tmp_path))
        keys.add(class_images.find(other).folder)
    assert len(keys) == 2


def test_other_weights_of_the_vae_do_not_reuse_them(tmp_path: Path) -> None:
    keys = set()
    for content in (b"one", b"two"):
        (tmp_path / "vae.safetensors").write_bytes(content)
        keys.add(class_images.find(make_recipe(tmp_path, f"model.vae={tmp_path}")).folder)
    assert len(keys) == 2


def test_processes_share_the_work(tmp_path: Path) -> None:
    override = "prior.num_class_images=5"
    alone = generate_all(make_recipe(tmp_path / "a", override))
    missing = class_images.find(make_recipe(tmp_path / "b", override)).missing
    assert sorted(alone) == sorted(seed for _, seed in missing[0::2] + missing[1::2])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_process_that_looks_later_still_generates_its_whole_share(
        batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process has generated some by then, so the second one finds a shorter list of missing images."""
    monkeypatch.setattr("secrets.randbelow", lambda count: 0)
    recipe = make_recipe(tmp_path, "prior.num_class_images=7", f"prior.sample_batch_size={batch}")
    later: list[int] = []

    def generate(seeds: list[int]) -> list[Image.Image]:
        if class_images.find(recipe).existing and not later:
            later.extend(generate_all(recipe, rank=1, world_size=2))
        return [Image.new("RGB", (4, 4), (seed % 256, 0, 0)) for seed in seeds]

    class_images.generate_missing(class_images.find(recipe), recipe, generate, lambda count: None, rank=0, world_size=2)
    assert len(later) == 3
    assert not class_images.find(recipe).missing


def test_the_users_own_images_come_first(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (9, 9)).save(own / "mine.png")
    recipe = make_recipe(tmp_path, f"dataset.class_dir={own}", "prior.num_class_images=3")
    images = class_images.find(recipe)
    assert images.paths[0] == own / "mine.png"
    assert str(images) == "3 class images: 1 own, 0 existing, 2 to generate"
    generate_all(recipe)
    assert class_images.find(recipe).paths == images.paths
    assert str(class_images.find(recipe)) == "3 class images: 1 own, 2 existing, 0 to generate"


def test_existing_images_stay_unchanged_and_only_missing_ones_are_generated(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "prior.num_class_images=5")
    batch_of_2 = [seed for _, seed in class_images.find(recipe).missing[2:4]]
    generate_all(recipe)
    paths = class_images.find(recipe).paths
    Image.new("RGB", (5, 5)).save(paths[0])
    mine = paths[0].read_bytes()
    paths[2].unlink()
    assert class_images.find(recipe).paths == paths, "the order of the images is the order of training"
    assert generate_all(recipe) == batch_of_2
    assert paths[0].read_bytes() == mine
    assert generate_all(recipe) == [], "an image was generated again"


@pytest.mark.parametrize("damage", ["cut", "empty", "bit"])
def test_a_damaged_image_is_generated_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = make_recipe(tmp_path, "prior.num_class_images=5")
    batch_of_2 = [seed for _, seed in class_images.find(recipe).missing[2:4]]
    generate_all(recipe)
    paths = class_images.find(recipe).paths
    before = [path.read_bytes() for path in paths]
    if damage == "bit":
        flip_bit(paths[2], 0.7)
    else:
        paths[2].write_bytes(before[2][:40] if damage == "cut" else b"")
    assert generate_all(recipe) == batch_of_2
    assert f"{paths[2]} is damaged and is generated again" in caplog.text
    assert [path.read_bytes() for path in paths] == before
    assert class_images.find(recipe).paths == paths


def test_an_image_has_the_same_seed_for_any_batch_size_and_number_of_processes(tmp_path: Path) -> None:
    pictures = []
    for batch, world_size in [(1, 1), (2, 1), (3, 2), (2, 3), (4, 9)]:
        recipe = make_recipe(tmp_path / f"{batch}-{world_size}", "prior.num_class_images=7",
                             f"prior.sample_batch_size={batch}")
        missing, seeds = class_images.find(recipe), []

        def generate(chunk: list[int], seen: list[int] = seeds, limit: int = batch) -> list[Image.Image]:
            assert len(chunk) <= limit
            seen += chunk
            return [Image.new("RGB", (1, 1), (s % 251, s % 241, s % 239)) for s in chunk]

        for rank in range(world_size):
            class_images.generate_missing(missing, recipe, generate, lambda count: None, rank, world_size)
        assert sorted(seeds) == sorted(seed for _, seed in missing.missing), "shares overlap or leave a gap"
        pictures.append([path.read_bytes() for path in class_images.find(recipe).existing])
    assert len(pictures[0]) == len(set(pictures[0])) == 7
    assert all(others == pictures[0] for others in pictures)


def test_runs_that_start_at_the_same_time_share_the_work(tmp_path: Path) -> None:
    """As trials of a search on several nodes do: an image of one run is not generated again by the other."""
    recipe = make_recipe(tmp_path, "prior.num_class_images=8")
    both = [class_images.find(recipe), class_images.find(recipe)]
    drawn: list[int] = []

    def generate(seeds: list[int]) -> list[Image.Image]:
        drawn.extend(seeds)
        if len(drawn) == 4:  # half way, the other run generates all the rest
            other = class_images.find(recipe).missing
            class_images.generate_missing(both[1], recipe, generate, lambda count: None)
            assert set(drawn) >= {seed for _, seed in other}
        return [Image.new("RGB", (4, 4), (seed % 256, 0, 0)) for seed in seeds]

    ticks: list[int] = []
    class_images.generate_missing(both[0], recipe, generate, ticks.append)
    assert sorted(set(drawn)) == sorted(seed for _, seed in both[0].missing)
    assert len(drawn) == 10, "only images that both runs were generating are generated twice"
    assert sum(ticks) == 8 and not class_images.find(recipe).missing


@pytest.mark.parametrize("killed_after", range(5))
def test_images_after_a_kill_equal_those_of_an_undisturbed_run(
        killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a batch changes the last bits of its images, so that an image always comes from a whole batch."""
    written: list[str] = []

    class Killed(Exception):
        pass

    class Picture(Image.Image):
        def save(self, fp: object, format: str | None = None, **more: object) -> None:
            if len(written) == killed_after:
                raise Killed
            written.append(str(fp))
            self.picture.save(str(fp), format=format)

    def generate(seeds: list[int]) -> list[Image.Image]:
        pictures = [Picture() for _ in seeds]
        for picture, seed in zip(pictures, seeds, strict=True):
            picture.picture = Image.new("RGB", (4, 4), (seed % 256, len(seeds), 0))  # type: ignore[attr-defined]
        return pictures

    found = []
    for name, first in (("killed", 1), ("straight", 0)):
        recipe = make_recipe(tmp_path / name, "prior.num_class_images=5")
        images = class_images.find(recipe)
        monkeypatch.setattr("secrets.randbelow", lambda count, first=first: first)
        if name == "killed":
            with pytest.raises(Killed):
                class_images.generate_missing(images, recipe, generate, lambda count: None)
            killed_after = 99
            images = class_images.find(recipe)
        class_images.generate_missing(images, recipe, generate, lambda count: None)
        found.append([(path.name, path.read_bytes()) for path in images.paths])
    assert found[0] == found[1]


def test_old_leftovers_of_killed_runs_are_removed_from_shared_folders(tmp_path: Path) -> None:
    from dreambooth.training.setup import remove_shared_leftovers

    for folder in ("class_images/a-dog-1", "latents"):
        for name in (".writing-old-1.png", ".writing-new-1.png", "00000.png"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
            if "new" not in name:
                os.utime(tmp_path / folder / name, (1, 1))
    remove_shared_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*.png")} == {".writing-new-1.png", "00000.png"}
    remove_shared_leftovers(tmp_path / "missing")


def test_a_partly_written_image_does_not_count_as_existing(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "prior.num_class_images=2")

    class Interrupted(Image.Image):
        def save(self, fp: object, format: str | None = None, **more: object) -> None:
            Path(str(fp)).write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        class_images.generate_missing(
            class_images.find(recipe), recipe, lambda seeds: [Interrupted() for _ in seeds], lambda count: None)
    (class_images.find(recipe).folder / ".writing-99-00000.png").write_bytes(b"half, killed")
    assert len(class_images.find(recipe).missing) == 2
    assert len(generate_all(recipe)) == 2


def test_with_enough_own_images_none_are_generated(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in ("b.png", "a.png", "c.png"):
        Image.new("RGB", (9, 9)).save(own / name)
    images = class_images.find(make_recipe(tmp_path, f"dataset.class_dir={own}", "prior.num_class_images=2"))
    assert [path.name for path in images.paths] == ["a.png", "b.png", "c.png"]
    assert str(images) == "3 class images: 3 own, 0 existing, 0 to generate"


def test_the_class_images_command_uses_the_precision_that_is_in_the_key(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """precision=tf32 is part of the key; images computed in fp32 must not be stored under it."""
    from dreambooth.models import loading
    from dreambooth.runtime.engine import Engine
    from dreambooth.training import setup

    class EnoughSeen(Exception):
        pass

    def load(*args: object) -> None:
        raise EnoughSeen

    recipe = make_recipe(tmp_path, "memory.autocast_cache=false")
    recipe = dataclasses.replace(recipe, precision=dataclasses.replace(recipe.precision, tf32=True))
    seen: list[object] = []
    monkeypatch.setattr(setup, "create_engine", lambda *args: (seen.append(args), (
        Engine(set_autocast_cache=seen.append), None))[1])
    monkeypatch.setattr(loading, "load", load)
    with pytest.raises(EnoughSeen):
        setup.make_class_images(recipe)
    assert seen == [("cpu", recipe.precision.dtype, True), False]
