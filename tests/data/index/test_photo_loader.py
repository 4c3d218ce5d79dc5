"""Many photos: each is decoded once, in any number of threads, pixels leave memory, and a second start decodes none."""

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import features

from dreambooth.data import image_formats, photo_checks, photos
from dreambooth.data.index.file_hashes import open_hashes
from dreambooth.data.index.ordered_map import ordered_map
from dreambooth.data.index.photo_loader import PhotoLoader
from dreambooth.data.index.pixel_store import StoredPixels
from dreambooth.data.photos import Photo, list_photos, load_photo, load_photos
from dreambooth.errors import UserError
from tests.data.noise_photos import save_noise

COUNT = 5


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was decoded."""
    counts: Counter[str] = Counter()
    decode = photos._decode

    def counted(path: Path, *args: object) -> object:
        counts[path.name] += 1
        return decode(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(photos, "_decode", counted)
    return counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of COUNT photos of different sizes."""
    path = tmp_path / "photos"
    path.mkdir()
    for number in range(COUNT):
        save_noise(path / f"{number}.png", (40 + number, 60), seed=number)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "runs"
    path.mkdir()
    yield path
    open_hashes.cache_clear()


def start(folder: Path, root: Path, mask: Path | None = None) -> list[Photo]:
    """The photos of a new process that reads and writes facts."""
    open_hashes.cache_clear()
    return load_photos(list_photos(folder), "a prompt", 16, True, str(mask) if mask else None,
                       PhotoLoader(root, saved=True, memory_limit=0))


def test_a_photo_is_decoded_once_whoever_needs_it(folder: Path, root: Path, decoded: Counter[str]) -> None:
    load = PhotoLoader(root, memory_limit=0)
    first = load_photos(list_photos(folder), "a prompt", 16, load=load)
    again = load_photos(list_photos(folder), "another prompt", 16, load=load)
    photo_checks.warn(first, 16)
    assert all(np.array_equal(one.pixels, other.pixels) for one, other in zip(first, again, strict=True))
    assert decoded == {f"{number}.png": 1 for number in range(COUNT)}


def test_a_second_start_decodes_no_photo_and_knows_the_same(folder: Path, root: Path, decoded: Counter[str]) -> None:
    first = start(folder, root)
    decoded.clear()
    second = start(folder, root)
    assert photo_checks.warn(first, 16) == photo_checks.warn(second, 16)
    for one, other in zip(first, second, strict=True):
        assert (one.facts, one.digest, one.size, one.original_size, one.remarks, one.pixels.shape) == (
            other.facts, other.digest, other.size, other.original_size, other.remarks, other.pixels.shape)
    assert not decoded


def test_one_process_of_a_host_stores_facts_that_all_read(folder: Path, root: Path, decoded: Counter[str]) -> None:
    list(PhotoLoader(root, saved=True, writes=False)(list_photos(folder), 16, True))
    assert list(root.iterdir()) == []
    start(folder, root)
    decoded.clear()
    list(PhotoLoader(root, saved=True, writes=False)(list_photos(folder), 16, True))
    assert not decoded


def test_pixels_that_a_second_start_needs_after_all_are_decoded_once(
    folder: Path, root: Path, decoded: Counter[str]
) -> None:
    expected = np.asarray(start(folder, root)[2].pixels)
    decoded.clear()
    photo = start(folder, root)[2]
    assert np.array_equal(photo.pixels[3:9, 2:], expected[3:9, 2:]) and np.array_equal(photo.pixels, expected)
    assert decoded == {"2.png": 1}


def test_a_killed_start_leaves_facts_and_at_most_a_part_of_a_line(
    folder: Path, root: Path, decoded: Counter[str]
) -> None:
    start(folder, root)
    [path] = (root / "photo_index").glob("decoded.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    decoded.clear()
    start(folder, root)
    start(folder, root)
    assert decoded == {f"{COUNT - 1}.png": 1}


def test_a_photo_that_changed_is_decoded_again(folder: Path, root: Path, decoded: Counter[str]) -> None:
    start(folder, root)
    save_noise(folder / "1.png", (41, 60), seed=99)
    decoded.clear()
    second = start(folder, root)
    assert decoded == {"1.png": 1}
    [expected] = load_photos([folder / "1.png"], "a prompt", 16, True)
    assert np.array_equal(second[1].pixels, expected.pixels)


def test_a_photo_that_changes_during_a_run_stops_it(folder: Path, root: Path) -> None:
    start(folder, root)
    photo = start(folder, root)[1]
    save_noise(folder / "1.png", (41, 60), seed=99)
    with pytest.raises(UserError, match=r"1\.png has changed since the run read it: restore the file"):
        photo.pixels[:1]


def test_a_photo_that_is_deleted_during_a_run_stops_it(folder: Path, root: Path) -> None:
    start(folder, root)
    photo = start(folder, root)[1]
    photo.path.unlink()
    with pytest.raises(UserError, match=r"1\.png cannot be used any more \(.*\): restore the file"):
        photo.pixels[:1]


def test_a_mask_that_changes_during_a_run_stops_it(folder: Path, root: Path) -> None:
    masks = root / "masks"
    masks.mkdir()
    for number in range(COUNT):
        save_noise(masks / f"{number}.png", (40 + number, 60), seed=50 + number)
    start(folder, root, masks)
    mask = start(folder, root, masks)[1].mask
    save_noise(masks / "1.png", (41, 60), seed=99)
    with pytest.raises(UserError, match=r"1\.png, or its mask, has changed since the run read it: restore the file"):
        np.asarray(mask)


def test_a_wrong_record_is_not_taken_for_a_changed_photo(folder: Path, root: Path) -> None:
    [digest] = {photo.digest for photo in start(folder, root)[1:2]}
    [path] = (root / "photo_index").glob("decoded.jsonl")
    path.write_text(path.read_text().replace(digest, "0" * 64))
    photo = start(folder, root)[1]
    with pytest.raises(UserError, match=r"1\.png is decoded to other pixels .* remove this folder, and repeat"):
        photo.pixels[:1]


def test_records_of_other_decoders_are_not_used(
    folder: Path, root: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder, root)
    decoded.clear()
    image_formats.decoder_versions.cache_clear()
    version = features.version
    monkeypatch.setattr(features, "version", lambda name: "99" if name == "webp" else version(name))
    start(folder, root)
    monkeypatch.undo()
    image_formats.decoder_versions.cache_clear()
    assert len(decoded) == COUNT


def test_large_photos_are_decoded_one_at_a_time(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "LARGE_PIXELS", 100)
    meeting, flatten = threading.Barrier(2), photos._flatten

    def flatten_beside_another(*args: object) -> object:
        with suppress(threading.BrokenBarrierError):
            meeting.wait(0.1)
            raise AssertionError("two photos are decoded at the same time")
        return flatten(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(photos, "_flatten", flatten_beside_another)
    loaded = list(PhotoLoader(root, threads=2)(list_photos(folder)[:2], 16))
    assert [problems for _, problems in loaded] == [[], []]


def test_decoding_beside_a_block_of_other_warnings_leaves_no_filter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    turn = photos._turn_upright
    monkeypatch.setattr(photos, "_turn_upright", lambda image: (started.set(), go_on.wait(5), turn(image)))
    thread = threading.Thread(target=load_photo, args=(folder / "1.png", 16, []))
    thread.start()
    started.wait(5)
    with warnings.catch_warnings():
        go_on.set()
        thread.join()
    assert ("ignore", None, Warning, None, 0) not in warnings.filters


def test_masks_are_read_again_only_if_they_changed(folder: Path, root: Path, decoded: Counter[str]) -> None:
    masks = root / "masks"
    masks.mkdir()
    for number in range(COUNT):
        save_noise(masks / f"{number}.png", (40 + number, 60), seed=50 + number)
    first = start(folder, root, masks)
    save_noise(masks / "3.png", (43, 60), seed=77)
    decoded.clear()
    second = start(folder, root, masks)
    assert decoded == {"3.png": 1}
    same = [np.array_equal(one.mask, other.mask) for one, other in zip(first, second, strict=True)  # type: ignore
            ]
    assert same == [True, True, True, False, True]


@pytest.mark.parametrize("limit", [0, 5000, 10**9])
def test_only_pixels_up_to_the_limit_stay_in_memory(folder: Path, root: Path, limit: int) -> None:
    loaded = load_photos(list_photos(folder), "a prompt", 16, load=PhotoLoader(root, memory_limit=limit))
    in_memory = [photo.pixels for photo in loaded if not isinstance(photo.pixels, StoredPixels)]
    assert sum(pixels.nbytes for pixels in in_memory) <= limit
    assert len(in_memory) == {0: 0, 5000: 4, 10**9: COUNT}[limit]
    for photo, expected in zip(loaded, load_photos(list_photos(folder), "a prompt", 16), strict=True):
        assert np.array_equal(photo.pixels, expected.pixels)
    assert list(root.iterdir()) == [], "the file of pixels has no name"


def test_one_and_four_threads_give_the_same_photos_and_problems(folder: Path, root: Path) -> None:
    (folder / "2.png").write_bytes(b"no image")
    (folder / "4.png").write_bytes(b"")
    found = [list(PhotoLoader(root, threads=threads)(list_photos(folder), 16, True)) for threads in (1, 4)]
    for (one, problems), (other, same_problems) in zip(*found, strict=True):
        assert problems == same_problems
        assert (one is None) == (other is None) == bool(problems)
        if one is not None and other is not None:
            assert np.array_equal(one.pixels, other.pixels) and one.facts == other.facts


def test_a_map_over_threads_keeps_the_order_and_takes_few_items_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    for done, result in enumerate(ordered_map(lambda number: number**2, items(), 4)):
        assert result == done**2
        assert taken <= done + 8


def test_an_error_in_a_thread_is_raised_in_its_turn() -> None:
    results = ordered_map(lambda number: 1 // number, [1, 1, 0, 1], 4)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_photos_alike_are_those_of_a_comparison_of_all_pairs() -> None:
    generator = np.random.default_rng(0)
    hashes = {number: int(value) for number, value in enumerate(generator.integers(0, 2**63, 40))}
    for number in range(40, 80):  # near copies, some at the limit of 6 bits and some beyond
        bits = generator.choice(64, generator.integers(0, 10), replace=False)
        hashes[number] = hashes[int(generator.integers(0, 40))] ^ sum(1 << int(bit) for bit in bits)
    remaining, expected = dict(hashes), []
    while remaining:
        first = next(iter(remaining.values()))
        group = [number for number, other in remaining.items() if (first ^ other).bit_count() <= 6]
        remaining = {number: value for number, value in remaining.items() if number not in group}
        expected += [group] if len(group) > 1 else []
    assert expected and photo_checks._groups_alike(hashes) == expected
