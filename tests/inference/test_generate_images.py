"""The door generate by its keys: LoRAs and their scales, pictures to begin with, prompts, grids, what a PNG says."""

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth.config.generate import Generate
from dreambooth.inference.png_metadata import parameters
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.utils.assets import resolve_asset
from tests.support.faults import call, train
from tests.support.runs import the_run

BASE = resolve_asset("package:tiny-sd")
FEW = ["num_images=2", "num_inference_steps=3", "seed=5", "guidance_scale=4"]
PROMPT = "prompt=a photo of a zwx toy"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run whose adapter changes pictures."""
    root = tmp_path_factory.mktemp("lora")
    assert train(root, "method=lora", "train.learning_rate=1e-2", "sample.every=null", "train.use_ema=false") == 0
    return the_run(root)


def drawn(out: Path, *words: str) -> list[np.ndarray]:
    """The pictures of one call in the order of their names, the grid left out."""
    assert call("generate", [*FEW, *words, f"out={out}"], log=out.with_suffix(".log")) == 0, \
        out.with_suffix(".log").read_text()
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*seed*.png"))]


def said(tmp_path: Path, *words: str) -> str:
    assert call("generate", list(words), log=tmp_path / "log") == 1
    return (tmp_path / "log").read_text()


def far(ours: list[np.ndarray], theirs: list[np.ndarray]) -> int:
    return max(int(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_the_scale_of_a_runs_own_lora(run: Path, tmp_path: Path) -> None:
    base = drawn(tmp_path / "base", f"base={BASE}", PROMPT)
    whole = drawn(tmp_path / "whole", f"run={run}", PROMPT)
    half = drawn(tmp_path / "half", f"run={run}", PROMPT, "lora_scale=0.5")
    none = drawn(tmp_path / "none", f"run={run}", PROMPT, "lora_scale=0")
    assert far(whole, base) > 20, "the adapter was not used"
    assert far(none, base) <= 1
    assert far(half, base) > 5 and far(half, whole) > 5


@pytest.mark.slow
def test_several_loras_add_up(run: Path, tmp_path: Path) -> None:
    whole = drawn(tmp_path / "whole", f"run={run}", PROMPT)
    file = next((run / "model/webui").glob("*.safetensors"))
    both = drawn(tmp_path / "both", f"run={run}", f"lora=[{file}]", "lora_scale=[0.25,0.75]", PROMPT)
    assert far(both, whole) <= 1, "a quarter and three quarters of one LoRA are not the LoRA"
    alone = drawn(tmp_path / "alone", f"base={BASE}", f"lora={run}", PROMPT)
    assert far(alone, whole) <= 1


@pytest.mark.slow
def test_a_picture_to_begin_with_is_kept_as_far_as_strength_says(run: Path, tmp_path: Path) -> None:
    photo = resolve_asset("package:demo/00.png")
    if not Path(photo).is_file():
        photo = str(sorted(Path(resolve_asset("package:demo")).glob("*.png"))[0])
    words = [f"base={BASE}", PROMPT, f"image={photo}", "num_inference_steps=10"]
    begin = np.asarray(Image.open(photo).convert("RGB").resize((64, 64))).astype(int)
    little, much = (drawn(tmp_path / name, *words, f"strength={strength}")
                    for name, strength in (("little", 0.2), ("much", 1.0)))
    assert np.abs(little[0] - begin).mean() < 0.6 * np.abs(much[0] - begin).mean()


@pytest.mark.slow
def test_what_stands_beside_the_picture_to_begin_with_is_not_read(tmp_path: Path) -> None:
    """An empty caption, or a line of metadata.jsonl for a photo that is gone, is of training."""
    shutil.copyfile(sorted(Path(resolve_asset("package:demo")).glob("*.png"))[0], tmp_path / "sketch.png")
    (tmp_path / "sketch.txt").write_text("")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a toy"}\n')
    assert drawn(tmp_path / "out", f"base={BASE}", PROMPT, f"image={tmp_path / 'sketch.png'}")
    (tmp_path / "sketch.png").write_bytes(b"")
    (tmp_path / "said").mkdir()
    assert "sketch.png is empty (0 bytes)" in said(
        tmp_path / "said", f"base={BASE}", PROMPT, f"image={tmp_path / 'sketch.png'}")


@pytest.mark.slow
def test_prompts_of_a_file_are_the_rows_of_one_grid(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# scenes\na {subject} in the snow\n\na {subject} at night\n")
    pictures = drawn(tmp_path / "out", f"run={run}", f"prompts={tmp_path / 'prompts.txt'}")
    assert len(pictures) == 4
    assert [path.name for path in sorted((tmp_path / "out").glob("*seed5.png"))] == [
        "000-a-zwx-toy-in-the-snow-seed5.png", "001-a-zwx-toy-at-night-seed5.png"]
    sheet = Image.open(tmp_path / "out/prompts-grid.png")
    assert sheet.size == (2 * 66 - 2, 2 * 66 - 2)
    drawn(tmp_path / "wide", f"run={run}", f"prompts={tmp_path / 'prompts.txt'}", "columns=4")
    assert Image.open(tmp_path / "wide/prompts-grid.png").size == (4 * 66 - 2, 64)


ENDS: dict[str, tuple[int, int, str]] = {  # fault -> exit code, pictures on disk, what is said
    "generation_stopped": (
        5, 4, "SIGINT: stopped after 4 of 8 pictures, which are in {out}; repeat the command to draw all"),
    "generation_stopped_twice": (5, 2, "interrupted; repeat the command\n"),
    "full_disk": (3, 0, "dreambooth: the disk is full ([Errno 28] No space left on device: '{out}/000-a-toy-in-the-"
                  "snow-seed0.png'): free some space and repeat the command\n"),
    "no_memory_to_generate": (4, 2, "; pictures made before are in {out}: type batch_size=1\n"),
}


@pytest.mark.parametrize("fault", ENDS)
def test_pictures_that_were_made_outlive_an_end_before_the_last(fault: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a toy in the snow\na toy at night\n")
    out, log = tmp_path / "out", tmp_path / "log"
    code, count, words = ENDS[fault]
    assert call("generate", [f"base={BASE}", f"prompts={tmp_path / 'prompts.txt'}", "num_images=4", "batch_size=2",
                             "num_inference_steps=2", f"out={out}"], fault=fault, log=log) == code
    text = log.read_text()
    assert words.format(out=out) in text and "checkpoint" not in text and "Traceback" not in text, text
    assert sorted(path.name for path in out.iterdir()) == [
        f"000-a-toy-in-the-snow-seed{seed}.png" for seed in range(count)]


@pytest.mark.parametrize("device, ask, typed", [
    ("cuda", Generate(num_images=8), "batch_size=1"), ("cuda", Generate(num_images=1), "CUDA_VISIBLE_DEVICES="),
    ("cuda", Generate(num_images=8, batch_size=1), "CUDA_VISIBLE_DEVICES="),
    ("cpu", Generate(num_images=1), "more memory")])
def test_what_to_type_when_memory_runs_out(device: str, ask: Generate, typed: str) -> None:
    from dreambooth.inference.generate_images import _advice

    assert typed in _advice("drawing", ask, device)
    assert "batch_size" not in _advice("loading", ask, device)


def test_names_tell_prompts_apart() -> None:
    from dreambooth.inference.generate_images import slug

    assert slug("a photo of a zwx toy, at night!") == "a-photo-of-a-zwx-toy-at-night"
    long = "a photo of a zwx toy " * 4
    prompts = ["ein Hund 犬", "ein Hund 猫", "犬", "猫", "!", "?", f"{long} a", f"{long} b", "a dog 🐶", "a dog"]
    names = [slug(prompt) for prompt in prompts]
    assert len(set(names)) == len(prompts) and all(names)
    assert names[2] == sha256("犬".encode()).hexdigest()[:8]
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and len(name) <= 70 for name in names)


@pytest.mark.slow
def test_a_file_of_prompts_names_the_subject_of_a_run_of_several(tmp_path: Path) -> None:
    """run.json has the text null for the prompt of one."""
    words = ["dataset=concepts", "name=demo-two"]
    for number, name in enumerate(("zwx", "qpr")):
        words += [f"dataset.concepts.{number}.{word}" for word in (
            f"instance_dir={resolve_asset('package:demo')}", f"instance_prompt=a photo of a {name} toy",
            "class_prompt=a photo of a toy")]
    assert train(tmp_path, *words, "train.max_train_steps=1", "sample.every=null", log=tmp_path / "log") == 0, \
        (tmp_path / "log").read_text()
    run, file = the_run(tmp_path), tmp_path / "prompts.txt"
    file.write_text("a {subject} in the snow\n")
    (tmp_path / "said").mkdir()
    assert "this run has several subjects: write the subject itself" in said(
        tmp_path / "said", f"run={run}", f"prompts={file}")
    file.write_text("a zwx toy in the snow\n")
    assert len(drawn(tmp_path / "out", f"run={run}", f"prompts={file}")) == 2


@pytest.mark.slow
def test_a_png_says_how_it_was_made(run: Path, tmp_path: Path) -> None:
    drawn(tmp_path / "out", f"run={run}", PROMPT, "lora_scale=0.5", "negative_prompt=red")
    text = Image.open(tmp_path / "out/a-photo-of-a-zwx-toy-seed6.png").text
    lines = text["parameters"].splitlines()
    assert lines[0] == "a photo of a zwx toy <lora:demo-tiny-lora:0.5>"
    assert lines[1] == "Negative prompt: red"
    assert lines[2].startswith("Steps: 3, Sampler: DPM++ 2M, CFG scale: 4, Seed: 6, Size: 64x64, Model: tiny-sd")
    found = json.loads(text["dreambooth"])
    assert (found["prompt"], found["seed"], found["loras"]) == (
        "a photo of a zwx toy", 6, [{"name": "demo-tiny-lora", "scale": 0.5}])
    drawn(tmp_path / "bare", f"run={run}", PROMPT, "metadata=false")
    assert "parameters" not in Image.open(tmp_path / "bare/a-photo-of-a-zwx-toy-seed6.png").text


def test_parameters_of_a_picture_from_a_picture() -> None:
    text = parameters("a dog", 3, (512, 512), [], {
        "num_inference_steps": 25, "sampler": "DPM++ 2M", "guidance_scale": 7.5, "negative_prompt": None,
        "model": "sd15", "strength": 0.6})
    first, second = text.splitlines()
    assert first == "a dog"
    assert second.startswith("Steps: 25, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 3, Size: 512x512, Model: sd15, "
                             "Denoising strength: 0.6, Version: dreambooth ")


@pytest.mark.slow
def test_a_negative_prompt_changes_the_picture(run: Path, tmp_path: Path) -> None:
    plain = drawn(tmp_path / "plain", f"base={BASE}", PROMPT)
    without = drawn(tmp_path / "without", f"base={BASE}", PROMPT, "negative_prompt=a red ball")
    assert far(plain, without) > 5


def test_what_is_wrong_is_a_sentence(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "alone")
    wrong: dict[str, list[str]] = {
        "lora_scale is of LoRAs": [f"base={BASE}", PROMPT, "lora_scale=0.5"],
        "does not say of which model: type base=DIR": [f"run={tmp_path / 'alone'}", PROMPT],
        "there is no LoRA in": [f"base={BASE}", PROMPT, f"lora={tmp_path / 'no'}"],
        "lora_scale has 3 numbers and there are 1 LoRAs": [f"run={run}", PROMPT, "lora_scale=[1,1,1]"],
        "there is no picture at": [f"run={run}", PROMPT, "image=nothing.png"],
        "cannot be read: type prompts=FILE": [f"run={run}", "prompts=nothing.txt"],
        "prompts must be null": [f"run={run}", PROMPT, "prompts=some.txt"],
        "tokens and the prompt has 42: shorten 'toy toy": [f"base={BASE}", "prompt=" + "toy " * 40],
        "tokens and the prompt has 52: shorten 'red red": [f"base={BASE}", PROMPT, "negative_prompt=" + "red " * 50],
    }
    for number, (sentence, words) in enumerate(wrong.items()):
        (tmp_path / str(number)).mkdir()
        text = said(tmp_path / str(number), *words)
        assert sentence in text and "Traceback" not in text, text


def test_a_dora_in_kohyas_layout_is_refused_rather_than_half_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1), "lora_unet_x.dora_scale": torch.zeros(1)},
              tmp_path / "dora.safetensors")
    assert "diffusers would leave a part out" in said(
        tmp_path, f"base={BASE}", PROMPT, f"lora={tmp_path / 'dora.safetensors'}")


OTHERS = {  # keys of LoRAs of other models, as diffusers and kohya's trainer write them
    "type base=DIR": ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
                                   "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight"],
    "does not fit this base": ["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
                               "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight",
                               "lora_unet_double_blocks_0_img_attn_proj.alpha"],
    "nothing for a layer": ["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
                            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
                            "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"],
}


@pytest.mark.parametrize("words", OTHERS)
def test_a_lora_of_another_model_is_a_sentence(words: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    file = tmp_path / "other.safetensors"
    save_file({key: torch.tensor(4.0) if key.endswith("alpha") else torch.zeros(4, 4) for key in OTHERS[words]}, file)
    text = said(tmp_path, f"base={BASE}", PROMPT, f"lora={file}")
    assert words in text and str(file) in text and "Traceback" not in text, text


@pytest.mark.parametrize("values", [{"lora": [1]}, {"lora_scale": "much"}, {"strength": 0.0}, {"columns": 0},
                                    {"image": "x", "strength": 0.1, "num_inference_steps": 2}])
def test_each_key_has_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values)) if "image" not in values else "no step"):
        Generate(**values)


@pytest.mark.slow
def test_a_run_that_evaluates_reads_its_own_adapter(run: Path, tmp_path: Path) -> None:
    """What `evaluate` draws with an adapter's run is what the run itself drew at its end."""
    words = ["method=lora", "evaluate.encoder=efficientnet_lite0", "evaluate.images_per_prompt=1",
             "evaluate.class_images=1", "sample.every=null", "train.max_train_steps=2", "train.learning_rate=1e-2"]
    assert train(tmp_path, *words, log=tmp_path / "train.log") == 0
    made = the_run(tmp_path)
    [folder] = (made / "evaluation").iterdir()
    first = {path.name: path.read_bytes() for path in (folder / "step-000002").glob("*.png")}
    base = {path.name: path.read_bytes() for path in (folder / "step-000000").glob("*.png")}
    assert first and first != base
    shutil.rmtree(made / "evaluation")
    assert call("evaluate", [f"run={made}"], log=tmp_path / "evaluate.log") == 0
    [folder] = (made / "evaluation").iterdir()
    assert {path.name: path.read_bytes() for path in (folder / "step-000000").glob("*.png")} == base
    again = {path.name: path.read_bytes() for path in (folder / "step-000002").glob("*.png")}
    assert again == first


@pytest.mark.slow
def test_mlflow_opens_a_runs_adapter_by_its_diffusers_flavour(
        empty_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.diffusers
    from mlflow import MlflowClient
    from safetensors.torch import load_file

    shutil.copy(empty_db, tmp_path / "mlflow.db")
    words = ["method=lora", "tracking=mlflow", "train.max_train_steps=2", "sample.every=null"]
    assert train(tmp_path, *words, log=tmp_path / "log") == 0
    made, uri = the_run(tmp_path), f"sqlite:///{tmp_path}/mlflow.db"
    run_id = json.loads((made / "mlflow.json").read_text())["run_id"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # set_tracking_uri would set it for later tests too
    found = mlflow.diffusers.load_model(f"runs:/{run_id}/lora")
    assert found.base_model == BASE
    [theirs] = Path(found.adapter_path).rglob("*.safetensors")
    ours = load_file(made / f"model/{ADAPTER}")
    assert {key: tensor.tolist() for key, tensor in load_file(theirs).items()} == {
        key: tensor.tolist() for key, tensor in ours.items()}
    assert MlflowClient(uri).get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_mlflow_pins_the_revision_that_the_run_has_pinned(tmp_path: Path) -> None:
    """MLflow itself pins the newest."""
    import torch
    import yaml
    from safetensors.torch import save_file

    from dreambooth.tracking import mlflow_logging

    facts = {"base_model": BASE, "base_model_revision": "0123abc", "base_model_variant": "fp16"}
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / mlflow_logging.ADAPTER, facts)

    class Client:
        def log_artifacts(self, run_id: str, folder: str) -> None:
            shutil.copytree(folder, tmp_path / run_id)

    mlflow_logging.log_artifact(Client(), "found", tmp_path / mlflow_logging.ADAPTER, None)
    found = yaml.safe_load((tmp_path / "found/lora/MLmodel").read_text())
    assert found["flavors"]["diffusers"]["base_model_revision"] == "0123abc"
    assert found["metadata"] == {key: facts[key] for key in ("base_model_revision", "base_model_variant")}
