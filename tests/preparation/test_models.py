"""Captions, masks and faces by models of transformers: tiny ones of the published architectures, with random weights.

The expected outputs come from transformers itself, used as its documentation describes, without this project's code.
"""

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.data.masks import mask_file
from dreambooth.data.photos import list_photos, load_photos
from dreambooth.errors import UserError
from dreambooth.models.loading import import_libraries
from dreambooth.preparation.captioners import FLORENCE_TASK, open_captioner, shorten
from dreambooth.preparation.face_detectors import open_face_detector, select_boxes
from dreambooth.preparation.options import CaptionOptions, FaceOptions, MaskOptions
from dreambooth.preparation.pretrained import Pretrained
from dreambooth.preparation.segmenters import matching_labels, open_segmenter
from tests.data.noise_photos import save_noise
from tests.preparation import tiny_annotators
from tests.preparation.awkward_photos import scene
from tests.preparation.test_prepare import call
from tests.support.warm_python import PYTHON

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from the name of a tiny model to its folder: to be read only."""
    import_libraries()
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: tiny_annotators.make(name, root / name))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        scene(number, (160, 96)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def origin(folder: Path, key: str = "captions.model", offline: bool = True) -> Pretrained:
    return Pretrained(str(folder), None, offline, key, "an id", torch.device("cpu"))


# -- captions -----------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, "a photo of"])
def test_blip_writes_what_transformers_generates(models: Any, prompt: str | None) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    folder, image = models("blip"), scene(1)
    network, processor = BlipForConditionalGeneration.from_pretrained(folder), BlipProcessor.from_pretrained(folder)
    tokens = network.generate(**processor(images=image, text=prompt, return_tensors="pt"), max_new_tokens=5)
    expected = processor.decode(tokens[0], skip_special_tokens=True)
    assert expected and open_captioner(origin(folder), prompt, 5).describe(image) in (expected, shorten(expected))


@pytest.mark.slow
def test_florence_writes_what_transformers_generates(models: Any) -> None:
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    folder, image = models("florence2"), scene(1)
    network = Florence2ForConditionalGeneration.from_pretrained(folder)
    processor = Florence2Processor.from_pretrained(folder)
    inputs = processor(images=image, text=FLORENCE_TASK, return_tensors="pt")
    tokens = network.generate(**inputs, max_new_tokens=5, forced_eos_token_id=None)
    expected = " ".join(processor.decode(tokens[0], skip_special_tokens=True).split())
    assert expected and open_captioner(origin(folder), None, 5).describe(image) in (expected, shorten(expected))


@pytest.mark.slow
def test_qwen_gets_one_token_per_patch_of_the_image(models: Any) -> None:
    """The caption is that of a call whose tokens are put together here: the processor itself needs torchvision."""
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    folder, image = models("qwen2_vl"), scene(1, (160, 96))
    network = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=image, return_tensors="pt")
    captioner: Any = open_captioner(origin(folder), "Describe the image.", 5)
    number = captioner.tokenizer.convert_tokens_to_ids
    patches = int(pixels["image_grid_thw"].prod()) // 4
    words = ["<|im_start|>", "<unk>", "<|vision_start|>", *["<|image_pad|>"] * patches, "<|vision_end|>", "Describe",
             "the", "image.", "<|im_end|>", "<|im_start|>", "<unk>"]  # user and assistant are no words of the tokenizer
    ids = torch.tensor([[number(word) for word in words]])
    tokens = network.generate(input_ids=ids, mm_token_type_ids=(ids == number("<|image_pad|>")).int(), **pixels,
                              max_new_tokens=5, do_sample=False)[0, len(words):]
    expected = captioner.tokenizer.decode(tokens, skip_special_tokens=True)
    assert patches > 1 and expected and captioner.describe(image) in (expected, shorten(expected))


def test_a_caption_that_was_cut_off_ends_at_a_sentence_a_clause_or_a_word() -> None:
    assert shorten("A brown dog on a sofa. It has a ba") == "A brown dog on a sofa."
    assert shorten("a dog on a sofa, with a") == "a dog on a sofa"
    assert shorten("a dog on a so") == "a dog on a"
    assert shorten("A. dog on a sofa with the blue ba") == "A. dog on a sofa with the blue"
    assert shorten("dog") == "dog"


# -- masks --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_clipseg_thresholds_the_probability_of_each_pixel(models: Any) -> None:
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    folder, image = models("clipseg"), scene(1, (64, 32))
    network, processor = CLIPSegForImageSegmentation.from_pretrained(folder), CLIPSegProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = network(**processor(text=["toy"], images=image, return_tensors="pt")).logits.reshape(32, 32)
    threshold = float(logits.sigmoid().median())
    mask = open_segmenter(origin(folder), "toy", threshold).segment(image)
    assert mask.shape == (32, 64) and mask.any() and not mask.all()
    columns = (logits.sigmoid() >= threshold).numpy()
    assert (mask[:, ::2] == columns).mean() > 0.8, "each pixel of the model covers two columns"


@pytest.mark.slow
def test_mask2former_joins_the_segments_of_the_class(models: Any) -> None:
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    folder, image = models("mask2former"), scene(1, (64, 48))
    network = Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        outputs = network(**processor(images=image, return_tensors="pt"))
    result = processor.post_process_panoptic_segmentation(outputs, threshold=0.5, target_sizes=[(48, 64)])[0]
    toys = [one["id"] for one in result["segments_info"] if one["label_id"] == 0]
    mask = open_segmenter(origin(folder), "toy", 0.5).segment(image)
    assert mask.any() and np.array_equal(mask, np.isin(result["segmentation"].numpy(), toys))
    assert not open_segmenter(origin(folder), "dog", 0.5).segment(image).any()
    with pytest.raises(UserError, match=r"knows no class cat, so type masks\.text with one of its classes"):
        open_segmenter(origin(folder, "masks.model"), "cat", 0.5)


def test_a_class_is_found_by_its_name_or_by_a_word_of_it() -> None:
    assert matching_labels(tiny_annotators.CLASSES, "Toy") == {0}
    assert matching_labels(tiny_annotators.CLASSES, "teddy bear") == matching_labels(
        tiny_annotators.CLASSES, "bear") == {2}
    assert matching_labels(tiny_annotators.CLASSES, "wall") == {3}
    assert matching_labels(tiny_annotators.CLASSES, "do") == set()


# -- faces --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", ["owlvit", "yolos"])
def test_faces_are_boxes_inside_the_photo(models: Any, name: str) -> None:
    boxes = open_face_detector(origin(models(name)), "face", 0.0).find(scene(1, (64, 48)))
    assert boxes and all(0 <= left < right <= 64 and 0 <= top < bottom <= 48 for left, top, right, bottom in boxes)
    assert open_face_detector(origin(models(name)), "face", 1.0).find(scene(1, (64, 48))) == []


def test_a_box_that_repeats_a_better_one_is_left_out() -> None:
    boxes = [[0.2, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [-5.0, 20.0, 5.0, 99.0], [3.0, 3.0, 3.1, 3.2]]
    assert select_boxes(boxes, [0.5, 0.9, 0.7, 0.6], (40, 40)) == [(1, 0, 11, 10), (0, 20, 5, 40)]


# -- models that cannot be used -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_models_that_cannot_be_used_are_refused_in_one_sentence(models: Any, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        tiny_annotators.make(name, tmp_path / name)
        return tmp_path / name

    def refusal(folder: Path | str) -> str:
        with pytest.raises(UserError) as raised:
            open_captioner(origin(Path(folder)), None, 5)
        return str(raised.value)

    assert "is a model of the type clipseg, and captions need one of blip" in refusal(models("clipseg"))
    assert "type captions.model=DIR" in refusal(tmp_path / "missing")
    tiny_annotators.remove_weight(copy("blip"))
    assert "1 of its weights do not fit BlipForConditionalGeneration" in refusal(tmp_path / "blip")
    pickled = copy("qwen2_vl")
    torch_file = pickled / "pytorch_model.bin"
    (pickled / "model.safetensors").rename(torch_file)
    assert "could not be loaded" in refusal(pickled)
    remote = copy("florence2")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "code.py").write_text("raise SystemExit('code of a model was run')")
    assert "could not be loaded" in refusal(remote)
    with pytest.raises(UserError, match="type offline=false to ask the hub"):
        open_captioner(Pretrained("nobody/nothing", None, True, "captions.model", "x", torch.device("cpu")), None, 5)


# -- the command --------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("captioner, segmenter, detector", [
    ("blip", "clipseg", "owlvit"), ("florence2", "mask2former", "yolos"), ("qwen2_vl", "clipseg", "yolos")])
def test_captions_masks_and_faces_are_written_once(
        models: Any, photos: Path, tmp_path: Path, captioner: str, segmenter: str, detector: str) -> None:
    out = tmp_path / "out"
    options = {"captions": CaptionOptions(model=str(models(captioner)), max_tokens=6),
               "masks": MaskOptions(model=str(models(segmenter)), threshold=0.3),
               "faces": FaceOptions(model=str(models(detector)), threshold=0.4)}
    text = call(photos, out, **options)
    loaded = load_photos(list_photos(out), "unused", 64, mask=str(out / "masks"))
    assert all(photo.caption.startswith("a photo of a zwx toy, ") or "zwx toy" in photo.caption for photo in loaded)
    assert all(photo.mask is not None and photo.mask.any() for photo in loaded)
    for photo in list_photos(out):
        with Image.open(mask_file(photo, str(out / "masks")) or "") as mask:
            assert mask.size == (160, 96) and mask.mode == "L" and set(np.unique(np.asarray(mask))) <= {0, 255}
    assert f"dataset.mask={out}/masks\n" in text and "3 with a caption, 3 with a mask" in text
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "review" not in str(path)}
    (out / "masks" / "0.png").unlink()
    again = call(photos, out, **options)
    changed = {path for path in out.rglob("*") if "review" not in str(path) and before[path] != path.stat().st_mtime_ns}
    assert changed - {out / "masks"} == {out / "masks" / "0.png"}
    assert [line for line in again.splitlines() if "/3  " not in line] == [
        line for line in text.splitlines() if "/3  " not in line]


KILLED = """
import os, signal, sys
from dreambooth import prepare
from dreambooth.preparation import captioners
describe, calls = captioners.Blip.describe, []
def die(self, image):
    calls.append(image)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return describe(self, image)
captioners.Blip.describe = die
prepare.main()
"""


@pytest.mark.slow
def test_after_a_kill_the_same_command_continues(models: Any, photos: Path, tmp_path: Path) -> None:
    save_noise(photos / "3.png")
    out = tmp_path / "out"
    words = [f"in={photos}", f"out={out}", "trigger=zwx", f"captions.model={models('blip')}", "captions.max_tokens=4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*start: str) -> int:
        return subprocess.run([*start, *words], cwd=tmp_path, env=environment, check=False, timeout=300).returncode

    assert run(sys.executable, "-c", KILLED) == -signal.SIGKILL
    first = {path: path.stat().st_mtime_ns for path in out.glob("*.txt")}
    assert len(first) == 2
    assert run(PYTHON, "-m", "dreambooth.prepare") == 0
    assert len(list(out.glob("*.txt"))) == 4
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert not list(out.rglob(".writing-*"))
