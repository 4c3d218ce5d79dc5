"""The command prepare on 40 awkward photos: remarks, copies, and a source folder that stays as it is."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.data import photo_report
from dreambooth.data.photos import list_photos, load_photos
from dreambooth.errors import UserError
from dreambooth.preparation import annotation, captioners, crop, prepare_folder
from dreambooth.preparation.options import CaptionOptions, Prepare
from dreambooth.preparation.progress import Entry, Progress, is_due
from dreambooth.utils.signals import StopRequest
from tests.data.noise_photos import save_noise
from tests.preparation.awkward_photos import RAW, SIDE, make_awkward_photos, snapshot

LEFT_OUT = """\
left out of 40 files:
  bomb.png is too large: scale it down to less than 178 megapixels
  broken link.png is not a file (a broken link?)
  camera.dng is a camera raw file, which is not supported: export it as JPEG
  line.png is too narrow (60000 x 1 pixels): crop it closer to a square
  photo.heic is HEIC, which is damaged: export it as JPEG, for example: magick photo.heic photo.jpg
  text.jpg is not a readable image of a known format (JPEG, PNG, WEBP, GIF, BMP, TIFF, HEIF)
  truncated.jpg is damaged or truncated (image file is truncated (15 bytes not processed)): copy it again, or save it \
again as PNG
  truncated.png is damaged or truncated (image file is truncated): copy it again, or save it again as PNG
  video.mp4 is a video, which is not supported: export it as JPEG, for example: magick video.mp4 video.jpg
  z copy.png is the same picture as original.png
  z link inside.png is the same picture as original.png
  z same pixels.png is the same picture as original.png
  zero.jpg is empty (0 bytes): copy it again
not read:
  nested/deep/ has 1 photo, and subfolders are not searched: move them into IN, or type in=IN/nested/deep
  notes.txt: no photo has this name, and the caption of photo.jpg is in photo.txt or photo.caption
  tags.json: captions are read from text files, and from metadata.jsonl or metadata.csv with file_name and text
"""
REMARKS = """\
remarks:
  animated.gif has 3 frames, and only the first is used: save the others that you need as files of their own
  animated.webp has 2 frames, and only the first is used: save the others that you need as files of their own
  animated.webp is copied as animated-2.webp, because another photo has the same name up to its suffix
  blown out.jpg is overexposed: darken it, or take another one
  blurred.jpg is blurred: take a sharp one, because blur is learned too
  dark.jpg is very dark: brighten it, or take another one
  flat.png has almost no contrast: take another one, because nothing can be seen in it
  grey.png has a caption that does not name the subject: write zwx into it
  panorama.jpg (640 x 128 pixels) loses 80.0% of its area when it is cropped to 128 x 128: crop it around the subject, \
or type dataset.buckets=true
  same stem.webp is copied as same stem-2.webp, because another photo has the same name up to its suffix
  soft.jpg is much softer than the other photos: look whether the subject is sharp
  tiny.png (24 x 24 pixels) is enlarged 5 times to 128 x 128: use the original photo in its full size
  original.png, reencoded.jpg, resized.png look alike: keep one of them, because a photo that is used more often is \
memorised
"""
COMMAND = ('python -m dreambooth.train dataset=folder dataset.instance_dir=OUT '
           'dataset.instance_prompt="a photo of a zwx toy" dataset.class_prompt="a photo of a toy"')


@dataclass
class Prepared:
    """One call of the command on the awkward photos."""

    source: Path
    out: Path
    before: dict[str, tuple[object, ...]]  # the source folder, and the folder outside it
    text: str


def call(source: Path, out: Path, **options: object) -> str:
    """Prepare a folder, and return what is printed."""
    settings = {"trigger": "zwx", "class_word": "toy", "resolution": SIDE} | options
    with redirect_stdout(io.StringIO()) as printed:
        prepare_folder.prepare(Prepare(source=str(source), out=str(out), **settings), StopRequest())
    lines = printed.getvalue().splitlines(True)
    return "".join(line for line in lines if not line.startswith(("photos ", "captions ")))  # the progress


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp("awkward")
    make_awkward_photos(root / "photos", root / "outside")
    before = snapshot(root)
    text = call(root / "photos", root / "prepared")
    return Prepared(root / "photos", root / "prepared", before, text)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        save_noise(tmp_path / "photos" / f"{number}.png", (64, 64), number)
    return tmp_path / "photos"


# -- 40 awkward photos -----------------------------------------------------------------------------------------------

def test_the_remarks_on_40_awkward_photos(awkward: Prepared) -> None:
    text = awkward.text.replace(str(awkward.source), "IN").replace(str(awkward.out), "OUT")
    assert text == LEFT_OUT + REMARKS + (
        "prepared  27 photos, 1 with a caption, 1 smaller than 128 pixels, 1 turned upright by EXIF, 2 converted to "
        "sRGB in OUT\nvariety   two photos differ in 32 of 64 bits of their hashes; unrelated ones in 32\n"
        f"review    OUT/review/contact-sheet.html\ntrain     {COMMAND}\n")


def test_nothing_changes_in_the_source_folder(awkward: Prepared) -> None:
    after = {name: facts for name, facts in snapshot(awkward.source.parent).items()
             if "/prepared" not in name and name != str(awkward.source.parent)}
    before = {name: facts for name, facts in awkward.before.items() if name != str(awkward.source.parent)}
    assert after == before and len(before) > 48


def test_the_copies_are_equal_and_can_be_trained_on(awkward: Prepared) -> None:
    copies = list_photos(awkward.out)
    assert len(copies) == len(load_photos(copies, "a zwx toy", SIDE)) == 27
    assert {os.fsencode(path.name) for path in copies} > {RAW, b"same stem.png", b"same stem-2.webp", b"read only.png"}
    assert {path.read_bytes() for path in copies} <= {path.read_bytes() for path in list_photos(awkward.source)
                                                      if path.exists()}
    assert not any(path.is_symlink() for path in copies)
    assert (awkward.out / "grey.txt").read_text() == "a grey toy\n"
    assert photo_report.describe_unused_files(awkward.out, copies) == [], "the review is no subfolder of photos"


def test_the_review_shows_names_as_text(awkward: Prepared) -> None:
    page = (awkward.out / "review" / "contact-sheet.html").read_text("utf-8")
    assert page.count("<img ") == 27 and "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;.png" in page
    assert "größe 猫 🧸.png" in page and "caf\\udce9.png" in page and "z copy.png is the same picture" in page
    with Image.open(awkward.out / "review" / "contact-sheet.png") as sheet:
        assert sheet.width > 6 * 224
    report = json.loads((awkward.out / "review" / "report.json").read_text())
    facts = {photo["file"]: photo for photo in report["photos"]}
    assert len(facts) == 27 and len(report["left_out"]) == 13
    assert (facts["rotated.jpg"]["width"], facts["rotated.jpg"]["height"], facts["rotated.jpg"]["orientation"]) == (
        160, 256, 6)
    assert facts["cmyk.jpg"]["mode"] == "CMYK" and facts["p3.jpg"]["profile"] and not facts["grey.png"]["profile"]
    assert facts["panorama.jpg"]["crop"] == [256, 0, 384, 128]


def test_a_repeated_call_writes_no_photo_again(awkward: Prepared) -> None:
    before = {path: path.stat().st_mtime_ns for path in list_photos(awkward.out)}
    record = (awkward.out / "review" / "progress.jsonl").read_bytes()
    assert call(awkward.source, awkward.out) == awkward.text
    assert {path: path.stat().st_mtime_ns for path in list_photos(awkward.out)} == before
    assert (awkward.out / "review" / "progress.jsonl").read_bytes() == record


# -- folders ---------------------------------------------------------------------------------------------------------

def refused(source: Path, out: Path) -> str:
    before = snapshot(source)
    with pytest.raises(UserError) as raised:
        call(source, out)
    assert snapshot(source) == before
    return str(raised.value)


@pytest.mark.parametrize("out", ["photos", "photos/prepared", "photos/a/b", "link", "link/inside", "./photos/../photos",
                                 "nested", "."])
def test_an_output_folder_that_would_change_the_photos_is_refused(photos: Path, out: str) -> None:
    root = photos.parent
    (root / "link").symlink_to("photos")
    (root / "nested").mkdir()
    (root / "nested" / "masks").symlink_to(photos)
    assert "type out=DIR with a folder" in refused(photos, root / out)


def test_a_folder_with_other_files_is_left_as_it_is(photos: Path) -> None:
    (photos.parent / "new").mkdir()
    mine = save_noise(photos.parent / "new" / "0.png").read_bytes()
    assert "has files that this command did not write" in refused(photos, photos.parent / "new")
    assert (photos.parent / "new" / "0.png").read_bytes() == mine


def test_photos_of_two_folders_are_not_mixed(photos: Path, tmp_path: Path) -> None:
    call(photos, tmp_path / "out")
    (tmp_path / "others").mkdir()
    save_noise(tmp_path / "others" / "a.png")
    assert f"was prepared from {photos}: type in={photos}" in refused(tmp_path / "others", tmp_path / "out")


def test_a_folder_without_a_usable_photo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("no picture")
    assert "can be used (1 file): type in=DIR" in refused(tmp_path / "photos", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_edited_copy_and_an_edited_caption_are_kept(photos: Path, tmp_path: Path) -> None:
    (photos / "1.txt").write_text("a zwx toy in the source")
    call(photos, tmp_path / "out")
    save_noise(tmp_path / "out" / "0.png", (48, 64), 9)
    edited = (tmp_path / "out" / "0.png").read_bytes()
    (tmp_path / "out" / "1.txt").write_text("my zwx toy")
    save_noise(photos / "2.png", (64, 64), 8)
    (photos / "2.txt").write_text("another zwx toy")
    text = call(photos, tmp_path / "out")
    assert "0.png was edited in" in text
    assert (tmp_path / "out" / "0.png").read_bytes() == edited
    assert (tmp_path / "out" / "1.txt").read_text() == "my zwx toy"
    assert (tmp_path / "out" / "2.png").read_bytes() == (photos / "2.png").read_bytes()
    assert (tmp_path / "out" / "2.txt").read_text() == "another zwx toy\n"


def test_similar_photos_are_dropped_if_that_is_typed(photos: Path, tmp_path: Path) -> None:
    with Image.open(photos / "0.png") as image:
        image.resize((128, 128), Image.Resampling.BICUBIC).save(photos / "larger.png")
    text = call(photos, tmp_path / "out", similar="drop")
    assert "  0.png looks like larger.png, which is larger or sharper\n" in text
    assert [path.name for path in list_photos(tmp_path / "out")] == ["1.png", "2.png", "larger.png"]


# -- captions, with a model that is none -----------------------------------------------------------------------------

class Fake:
    """A captioner that counts its calls, and is interrupted at one of them."""

    calls = 0
    stop_at: int | None = None

    def describe(self, image: Image.Image) -> str:
        Fake.calls += 1
        if Fake.calls == self.stop_at:
            raise KeyboardInterrupt
        return f"a red toy, number {Fake.calls}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fake]]:
    monkeypatch.setattr(captioners, "open_captioner", lambda *arguments: Fake())
    monkeypatch.setattr(annotation.Annotator, "_origin", lambda *arguments: None)
    monkeypatch.setattr(Fake, "calls", 0)
    yield Fake


def captions_of(out: Path) -> list[str]:
    return [path.read_text().strip() for path in sorted(out.glob("*.txt"))]


def test_finished_captions_are_not_made_again(photos: Path, tmp_path: Path, fake: type[Fake],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    options = CaptionOptions(model="a", overwrite=True)
    monkeypatch.setattr(Fake, "stop_at", 3)
    with pytest.raises(KeyboardInterrupt):
        call(photos, tmp_path / "out", captions=options)
    assert len(captions_of(tmp_path / "out")) == 2
    monkeypatch.setattr(Fake, "stop_at", None)
    call(photos, tmp_path / "out", captions=options)
    assert captions_of(tmp_path / "out") == [f"a red zwx toy, number {number}" for number in (1, 2, 4)]
    call(photos, tmp_path / "out", captions=options)
    assert fake.calls == 4


def test_existing_captions_are_kept_unless_asked(photos: Path, tmp_path: Path, fake: type[Fake]) -> None:
    (photos / "1.txt").write_text("mine")
    call(photos, tmp_path / "out", captions=CaptionOptions(model="a"))
    (tmp_path / "out" / "2.txt").write_text("edited")
    call(photos, tmp_path / "out", captions=CaptionOptions(model="b"))
    assert captions_of(tmp_path / "out") == ["a red zwx toy, number 1", "mine", "edited"]
    call(photos, tmp_path / "out", captions=CaptionOptions(model="b", overwrite=True))
    assert captions_of(tmp_path / "out") == [f"a red zwx toy, number {number}" for number in (3, 4, 5)]
    assert (photos / "1.txt").read_text() == "mine" and not (photos / "0.txt").exists()


@pytest.mark.parametrize("current, entry, overwrite, due", [
    (None, None, False, True), ("mine", None, False, False), ("mine", None, True, True),
    ("made", Entry("photo", "model", "made"), True, False), ("made", Entry("photo", "other", "made"), False, False),
    ("made", Entry("photo", "other", "made"), True, True), ("made", Entry("older", "model", "made"), False, True),
    ("edited", Entry("older", "model", "made"), False, False)])
def test_when_an_output_is_made(current: str | None, entry: Entry | None, overwrite: bool, due: bool) -> None:
    assert is_due(current, entry, "photo", "model", overwrite) is due


def test_a_torn_line_of_the_record_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "out" / "review" / "progress.jsonl"
    progress = Progress(path)
    progress.start(tmp_path)
    progress.add("caption", "a.png", Entry("photo", "model", "made"))
    path.write_bytes(path.read_bytes() + b'{"kind": "capt')
    Progress(path).add("caption", "b.png", Entry("photo", "model", "made"))
    again = Progress(path)
    again.start(tmp_path)
    assert again.find("caption", "a.png") == again.find("caption", "b.png") == Entry("photo", "model", "made")


# -- crops and prompts -----------------------------------------------------------------------------------------------

def test_the_suggested_square_contains_the_subject() -> None:
    assert crop.suggest_square(400, 200, None) == (100, 0, 300, 200)
    assert crop.suggest_square(400, 200, (0, 50, 60, 90)) == (0, 0, 200, 200)
    assert crop.suggest_square(200, 400, (0, 300, 200, 400)) == (0, 200, 200, 400)
    assert crop.loses_subject(400, 200, (0, 50, 60, 90)) and not crop.loses_subject(400, 200, (110, 0, 290, 200))


def test_the_command_has_only_prompts_that_are_known(photos: Path, tmp_path: Path) -> None:
    text = call(photos, tmp_path / "a b", trigger=None, class_word=None, resolution=512, base_model="sd15")
    assert ('train     python -m dreambooth.train model=sd15 dataset=folder '
            f'dataset.instance_dir="{tmp_path}/a b" prior.prior_loss_weight=0\n') in text
    assert "type trigger=zwx class_word=dog" in text
    options = {"resolution": None, "trigger": None, "class_word": None}
    assert "model=sdxl dataset=folder" in call(photos, tmp_path / "large", base_model="sdxl", **options)
    assert "model=sdxl model.resolution=512 dataset=folder" in call(
        photos, tmp_path / "small", base_model="sdxl", **options | {"resolution": 512})
    with pytest.raises(UserError, match="type base_model=NAME or resolution=512"):
        call(photos, tmp_path / "none", resolution=None)
