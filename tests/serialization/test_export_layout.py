"""A model that changed since its export is refused by every command that uses it, in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from dreambooth.config.compose import load
from dreambooth.config.enums import MethodKind
from dreambooth.config.generate import Generate
from dreambooth.config.method import Method
from dreambooth.config.recipe import resolve
from dreambooth.errors import UserError
from dreambooth.evaluate import compose_from_run
from dreambooth.evaluation import evaluate_run
from dreambooth.inference.loras import find_loras
from dreambooth.inference.model_sources import find_source
from dreambooth.models import families
from dreambooth.serialization import convert, export_layout, lora_files
from dreambooth.storage import manifest
from tests.support.configs import NONE, compose_config
from tests.support.runs import flip_bit

DOORS: dict[str, Callable[[Path], object]] = {
    "generate run": lambda run: find_source(Generate(run=str(run))),
    "generate base": lambda run: find_source(Generate(base=str(run / "model"))),
    "convert": convert._find_model,
    "evaluate": lambda run: evaluate_run._load_trained(as_recipe(run), None),  # type: ignore[arg-type]
}


def as_recipe(run: Path) -> Any:
    return SimpleNamespace(run_dir=run, evaluated_prompts=set(), method=Method("lora", MethodKind.lora),
                           trigger_words=())


def write_run(run: Path) -> Path:
    with manifest.write_folder(run / "model") as aside:
        (aside / "unet").mkdir()
        (aside / "unet/diffusion_pytorch_model.safetensors").write_bytes(bytes(99))
        (aside / "README.md").write_text("card")
        (aside / "model_index.json").write_text("{}")
    (run / "run.json").write_text(json.dumps({"settings": {"name": "x"}}))
    return run / "model"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", ["bit", "gone", "manifest"])
def test_a_damaged_model_is_an_error(damage: str, door: str, tmp_path: Path) -> None:
    model = write_run(tmp_path)
    weights = model / "unet/diffusion_pytorch_model.safetensors"
    if damage == "manifest":
        (model / manifest.NAME).write_text("[")
    else:
        flip_bit(weights) if damage == "bit" else weights.unlink()
    with pytest.raises(UserError, match=rf"the model in {model} is damaged \(.*\): repeat the command of its run"):
        DOORS[door](tmp_path)


def test_a_changed_model_card_is_no_damage(tmp_path: Path) -> None:
    model = write_run(tmp_path)
    (model / "README.md").write_text("my own card")
    (model / "notes.txt").write_text("my own notes")
    export_layout.check_intact(model)
    assert find_source(Generate(run=str(tmp_path))).setting("name") == "x"
    assert export_layout.is_exported(model, "full", merge=False)


@pytest.mark.parametrize("name", [export_layout.ADAPTER, "pytorch_lora_weights.safetensors"])
def test_an_adapter_is_found_by_its_name_and_by_the_name_of_earlier_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = tmp_path / "model", torch.arange(6.0).view(2, 3)
    with manifest.write_folder(model) as aside:
        (aside / "webui").mkdir()
        (aside / "webui/toy.safetensors").touch()
        save_file({"unet.x" + lora_files.DOWN: weights, "unet.x" + lora_files.UP: weights.T.contiguous()}, aside / name)
    assert export_layout.is_exported(model, "lora", merge=False)
    assert find_source(Generate(run=str(tmp_path), base="base")).adapter == str(model / name)
    assert [lora.name for lora in find_loras([str(tmp_path), str(model)], [1.0, 1.0])] == ["toy", "toy"]
    found: list[Any] = []
    parts = SimpleNamespace(family=families.FAMILIES[0], new_tokens=None)
    monkeypatch.setattr(evaluate_run.loading, "encode_prompts", lambda recipe, device, prompts: None)
    monkeypatch.setattr(evaluate_run.loading, "load", lambda recipe, device: parts)
    monkeypatch.setattr(evaluate_run.loading, "prepare", lambda parts, recipe: None)
    monkeypatch.setattr(evaluate_run.lora, "load_adapter_weights", lambda model, weights, _: found.append(weights))
    evaluate_run._load_trained(as_recipe(tmp_path), torch.device("cpu"))
    assert found[0]["unet.x"].down.equal(weights)
    flip_bit(model / name)
    with pytest.raises(UserError, match="is damaged"):
        find_loras([str(tmp_path)], [1.0])


@pytest.mark.parametrize("content", ["[]", "{", '{"settings": []}', ""])
def test_a_damaged_run_json_has_no_settings(content: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "run.json").write_text(content)
    assert find_source(Generate(run=str(tmp_path))).settings == {}
    assert convert._find_model(tmp_path)[1] == {}


@pytest.mark.parametrize("content", [b"a: [1\n", b"- 1", b"\xff\xfe", b"x"])
def test_a_damaged_record_of_the_configuration_is_an_error(content: bytes, tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"\.hydra cannot be read .*repeat the run's command"):
        compose_from_run(tmp_path, {})


def test_a_run_that_stops_early_by_a_measure_of_pictures_can_be_evaluated(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / ".hydra").mkdir()
    recorded = compose_config("evaluate.every=2", "train.stop_when.measure=class_similarity",
                              "train.stop_when.patience=1", "train.stop_when.mode=max")
    (tmp_path / ".hydra/config.yaml").write_text(OmegaConf.to_yaml(recorded))
    recipe = resolve(load(compose_from_run(tmp_path, {}, downloaded=True)), tmp_path, NONE)
    assert recipe.train.stop_when.measure is None and recipe.evaluate.every is None


@pytest.mark.parametrize("content", [
    "hydra:", "{}", "hydra: {runtime: {cwd: /, output_dir: /runs/a/b/c/d/e/f/g/h/i/j/k}}"])
def test_a_damaged_record_of_the_run_root_is_an_error(content: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text("run_root: runs")
    (tmp_path / ".hydra/hydra.yaml").write_text(content)
    with pytest.raises(UserError, match=r"\.hydra cannot be read .*repeat the run's command"):
        compose_from_run(tmp_path, {})
    assert compose_from_run(tmp_path, {}, downloaded=True).run_root == "runs", "a copy from S3 is in no run root"


def test_settings_name_a_converted_file_where_it_is_after_its_run_root_was_moved(tmp_path: Path) -> None:
    run, converted = tmp_path / "new/run", tmp_path / "new/converted/base-1234"
    settings = {"model.source": "/old/converted/base-1234", "model.vae": "/old/converted/gone", "model.name": "sd15"}
    converted.mkdir(parents=True)
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"settings": settings}))
    assert export_layout.read_settings(run) == settings | {"model.source": str(converted)}
    adapter = run / "model" / export_layout.ADAPTER
    adapter.parent.mkdir()
    save_file({"a": torch.zeros(1)}, adapter, {"base_model": settings["model.source"]})
    assert lora_files.read_base_model(adapter) == str(converted)


@pytest.mark.parametrize(("recorded", "output_dir", "expected"), [
    ("runs", "/cwd/runs/NAME", "HERE"), ("../runs", "/runs/NAME", "HERE"), ("/old/runs", "/old/runs/NAME", "HERE"),
    ("/old/runs", "/old/runs/a/NAME", "HERE/.."), ("/old/runs", "/elsewhere/NAME", "/old/runs")])
def test_an_evaluation_uses_the_run_root_in_which_the_run_is(
        tmp_path: Path, recorded: str, output_dir: str, expected: str) -> None:
    """Otherwise it would make the old folder anew, for MLflow's database."""
    run = tmp_path / "NAME"
    (run / ".hydra").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / ".hydra/config.yaml").write_text(f"run_root: {recorded}")
    (run / ".hydra/hydra.yaml").write_text(f"hydra: {{runtime: {{cwd: /cwd, output_dir: {output_dir}}}}}")
    expected = expected.replace("HERE/..", str(tmp_path.parent)).replace("HERE", str(tmp_path))
    assert compose_from_run(run, {}).run_root == expected
