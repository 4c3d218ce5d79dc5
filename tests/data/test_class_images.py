"""Class images: found by what they were made from, topped up, never made again."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.config.compose import load
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.data import class_images
from tests.support.configs import made


def recipe(root: Path, *overrides: str) -> Recipe:
    return resolve(load(made(f"run_root={root}", "prior.sample_batch_size=2", *overrides)), root / "run")


def fill(asked: Recipe, rank: int = 0, world: int = 1) -> list[int]:
    """Make what is missing; returns the seeds that were drawn."""
    seeds: list[int] = []

    def generate(batch: list[int]) -> list[Image.Image]:
        seeds.extend(batch)
        return [Image.new("RGB", (4, 4), (seed % 256, 0, 0)) for seed in batch]

    class_images.make(class_images.find(asked), asked, generate, lambda count: None, rank, world)
    return seeds


def test_topped_up_not_made_again(tmp_path: Path) -> None:
    first = fill(recipe(tmp_path, "prior.num_class_images=3"))
    before = {p: p.stat().st_mtime_ns for p in class_images.find(recipe(tmp_path, "prior.num_class_images=3")).paths}
    more = fill(recipe(tmp_path, "prior.num_class_images=5"))
    assert (len(first), len(more), len(set(first + more))) == (3, 2, 5)
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())
    assert str(class_images.find(recipe(tmp_path, "prior.num_class_images=6"))) == "6 class images: 5 kept, 1 to make"


def test_another_prompt_or_base_never_finds_them(tmp_path: Path) -> None:
    usual = class_images.find(recipe(tmp_path)).folder.name.rsplit("-", 1)[1]
    others = ["dataset.class_prompt=a photo  of a toy", "prior.guidance_scale=2", "prior.num_inference_steps=3",
              "model.resolution=128", "precision=bf16", "model.revision=x"]
    keys = {class_images.find(recipe(tmp_path, other)).folder.name.rsplit("-", 1)[1] for other in others}
    assert len(keys | {usual}) == len(others) + 1
    for same in ("train.seed=5", "prior.sample_batch_size=7", "dataset.instance_prompt=a zwx"):
        assert class_images.find(recipe(tmp_path, same)).folder.name.rsplit("-", 1)[1] == usual


def test_another_models_weights_never_find_them(tmp_path: Path) -> None:
    keys = set()
    for content in (b"one", b"two"):
        (tmp_path / "unet.safetensors").write_bytes(content)
        other = dataclasses.replace(recipe(tmp_path), source=str(tmp_path))
        keys.add(class_images.find(other).folder)
    assert len(keys) == 2


def test_another_vaes_weights_never_find_them(tmp_path: Path) -> None:
    keys = set()
    for content in (b"one", b"two"):
        (tmp_path / "vae.safetensors").write_bytes(content)
        keys.add(class_images.find(recipe(tmp_path, f"model.vae={tmp_path}")).folder)
    assert len(keys) == 2


def test_processes_share_the_work(tmp_path: Path) -> None:
    asked = "prior.num_class_images=5"
    alone = fill(recipe(tmp_path / "a", asked))
    missing = class_images.find(recipe(tmp_path / "b", asked)).missing
    assert sorted(alone) == sorted(seed for _, seed in missing[0::2] + missing[1::2])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_process_that_looks_later_leaves_no_gap(
        batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has made some by then, so the later one sees another list of what is missing."""
    monkeypatch.setattr("secrets.randbelow", lambda count: 0)
    asked = recipe(tmp_path, "prior.num_class_images=7", f"prior.sample_batch_size={batch}")
    later: list[int] = []

    def generate(seeds: list[int]) -> list[Image.Image]:
        if class_images.find(asked).kept and not later:
            later.extend(fill(asked, rank=1, world=2))
        return [Image.new("RGB", (4, 4), (seed % 256, 0, 0)) for seed in seeds]

    class_images.make(class_images.find(asked), asked, generate, lambda count: None, rank=0, world=2)
    assert len(later) == 3
    assert not class_images.find(asked).missing


def test_own_images_come_first(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (9, 9)).save(own / "mine.png")
    asked = recipe(tmp_path, f"dataset.class_dir={own}", "prior.num_class_images=3")
    found = class_images.find(asked)
    assert found.paths[0] == own / "mine.png"
    assert str(found) == "3 class images: 1 own, 0 kept, 2 to make"
    fill(asked)
    assert class_images.find(asked).paths == found.paths
    assert str(class_images.find(asked)) == "3 class images: 1 own, 2 kept, 0 to make"


def test_what_is_kept_stays_byte_for_byte_and_only_the_missing_are_made(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "prior.num_class_images=5")
    seed_of_2 = class_images.find(asked).missing[2][1]
    fill(asked)
    paths = class_images.find(asked).paths
    paths[0].write_bytes(b"mine")
    paths[2].unlink()
    assert fill(asked) == [seed_of_2]
    assert paths[0].read_bytes() == b"mine"
    assert fill(asked) == [], "nothing is missing"


def test_an_image_has_the_same_seed_for_any_batch_size_and_number_of_processes(tmp_path: Path) -> None:
    pictures = []
    for batch, world in [(1, 1), (2, 1), (3, 2), (2, 3), (4, 9)]:
        asked = recipe(tmp_path / f"{batch}-{world}", "prior.num_class_images=7", f"prior.sample_batch_size={batch}")
        missing, seeds = class_images.find(asked), []

        def generate(chunk: list[int], seen: list[int] = seeds, most: int = batch) -> list[Image.Image]:
            assert len(chunk) <= most
            seen += chunk
            return [Image.new("RGB", (1, 1), (s % 251, s % 241, s % 239)) for s in chunk]

        for rank in range(world):
            class_images.make(missing, asked, generate, lambda count: None, rank, world)
        assert sorted(seeds) == sorted(seed for _, seed in missing.missing), "shares overlap or leave a gap"
        pictures.append([path.read_bytes() for path in class_images.find(asked).kept])
    assert len(pictures[0]) == len(set(pictures[0])) == 7
    assert all(others == pictures[0] for others in pictures)


def test_runs_that_begin_at_once_share_the_work(tmp_path: Path) -> None:
    """As trials of a search on several nodes do: what one has made, the other does not make again."""
    asked = recipe(tmp_path, "prior.num_class_images=8")
    both = [class_images.find(asked), class_images.find(asked)]
    drawn: list[int] = []

    def generate(seeds: list[int]) -> list[Image.Image]:
        drawn.extend(seeds)
        if len(drawn) == 4:  # half way, the other does everything that is left
            other = class_images.find(asked).missing
            class_images.make(both[1], asked, generate, lambda count: None)
            assert set(drawn) >= {seed for _, seed in other}
        return [Image.new("RGB", (4, 4), (seed % 256, 0, 0)) for seed in seeds]

    ticks: list[int] = []
    class_images.make(both[0], asked, generate, ticks.append)
    assert sorted(set(drawn)) == sorted(seed for _, seed in both[0].missing)
    assert len(drawn) == 10, "only what both were drawing is drawn twice"
    assert sum(ticks) == 8 and not class_images.find(asked).missing


def test_a_half_written_image_is_not_taken_for_one(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "prior.num_class_images=2")

    class Interrupted(Image.Image):
        def save(self, fp: object, format: str | None = None, **more: object) -> None:
            Path(str(fp)).write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        class_images.make(
            class_images.find(asked), asked, lambda seeds: [Interrupted() for _ in seeds], lambda count: None)
    (class_images.find(asked).folder / ".writing-99-00000.png").write_bytes(b"half, killed")
    assert len(class_images.find(asked).missing) == 2
    assert len(fill(asked)) == 2


def test_enough_own_images_need_no_others(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in ("b.png", "a.png", "c.png"):
        Image.new("RGB", (9, 9)).save(own / name)
    found = class_images.find(recipe(tmp_path, f"dataset.class_dir={own}", "prior.num_class_images=2"))
    assert [path.name for path in found.paths] == ["a.png", "b.png", "c.png"]
    assert str(found) == "3 class images: 3 own, 0 kept, 0 to make"


def test_class_images_made_alone_are_computed_as_their_key_says(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """precision=tf32 is in the key, and fp32 pictures would be kept under it."""
    from dreambooth.models import loading
    from dreambooth.runtime.engine import Engine
    from dreambooth.training import setup
    from dreambooth.utils.signals import Stop

    class EnoughSeen(Exception):
        pass

    def load(*args: object) -> None:
        raise EnoughSeen

    asked = recipe(tmp_path, "memory.autocast_cache=false")
    asked = dataclasses.replace(asked, precision=dataclasses.replace(asked.precision, tf32=True))
    seen: list[object] = []
    monkeypatch.setattr(setup, "accelerated", lambda *args: (seen.append(args), (
        Engine(cache_casts=seen.append), None))[1])
    monkeypatch.setattr(loading, "load", load)
    with pytest.raises(EnoughSeen):
        setup.class_images_alone(asked, Stop())
    assert seen == [("cpu", asked.precision.dtype, True), False]
