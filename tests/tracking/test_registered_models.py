"""The registered model: what is uploaded, models:/ addresses, and versions that an earlier package registered."""

import json
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dreambooth.errors import UserError
from dreambooth.models import hub
from dreambooth.runs.report import promotion_message
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.sweeps.promotion import PromotionOptions, promote
from dreambooth.tracking import mlflow_model
from dreambooth.tracking.model_registry import Registry
from dreambooth.tracking.registered_models import is_registered, local_path
from dreambooth.utils.assets import resolve_asset
from tests.support.runs import trial

TINY = {"method__kind": "lora", "method__merge": "False", "model__source": "package:tiny-sd", "model__resolution": "64",
        "sample__guidance_scale": "4.0", "dataset__instance_prompt": "a photo of a zwx toy"}


def add_adapter(run: Path) -> None:
    """Give a trial of tests.support.runs an adapter of one layer that fits tiny-sd."""
    torch.manual_seed(0)
    save_file({f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v.lora_{side}.weight": torch.randn(
        (4, 128) if side == "A" else (128, 4)) for side in "AB"}, run / "model" / ADAPTER,
        {"base_model": "package:tiny-sd", "base_model_revision": "abc"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    run = trial(tmp_path, "a", 0.2, **TINY)
    add_adapter(run)
    return run


def test_the_folder_of_a_registered_adapter(adapter: Path) -> None:
    with mlflow_model.linked_model(adapter, adapter / "model") as folder:
        description = yaml.safe_load((folder / "MLmodel").read_text())
        assert (folder / ADAPTER).resolve() == adapter / "model" / ADAPTER, "a copy of the weights"
        assert (folder / "base/tiny-sd/model_index.json").is_file()
        assert json.loads((folder / "run.json").read_text())["run"] == "a"
        names = {path.name for path in folder.iterdir()}
        code = zipfile.ZipFile(folder / mlflow_model.CODE).namelist()
        wanted = (folder / "requirements.txt").read_text().split()
    assert {"conda.yaml", "python_env.yaml", "input_example.json", "serving_input_example.json"} <= names
    assert description["flavors"]["python_function"]["loader_module"] == mlflow_model.LOADER_MODULE
    assert description["flavors"]["diffusers"]["weight_name"] == ADAPTER
    assert [(one["name"], one["required"]) for one in json.loads(description["signature"]["inputs"])] == [
        (name, name == "prompt") for name in mlflow_model.COLUMNS]
    assert "dreambooth/inference/mlflow_model.py" in code and all(name.endswith(".py") for name in code)
    assert {name.partition("==")[0] for name in wanted} == {"mlflow", *mlflow_model.REQUIREMENTS}
    assert not {path.name for path in (adapter / "model").iterdir()} - {ADAPTER}, "the run's own model was changed"


def test_a_local_base_is_named_or_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "bases/mine"
    shutil.copytree(resolve_asset("package:tiny-sd"), base)
    run = trial(tmp_path, "a", 0.2, **TINY | {"model__source": str(base)})
    assert mlflow_model.find_reference(run, include_base=False) == str(base)
    assert mlflow_model.find_reference(run, include_base=True) is None
    with mlflow_model.linked_model(run, run / "model") as folder:
        assert not (folder / "base").exists()
    with mlflow_model.linked_model(run, run / "model", include_base=True) as folder:
        assert (folder / "base/mine/model_index.json").is_file()
    hub_run = trial(tmp_path, "b", 0.2, **TINY | {"model__source": "org/model", "model__revision": "abc",
                                              "model__vae": "org/sharp-vae"})
    assert mlflow_model.find_reference(hub_run, include_base=False) is None
    pipelines = {("org/model", "abc", None): base}
    monkeypatch.setattr(hub, "download_pipeline", lambda *arguments, **options: pipelines[arguments])
    monkeypatch.setattr(hub, "download", lambda source, *arguments, **options: {"org/sharp-vae": base / "vae"}[source])
    with mlflow_model.linked_model(hub_run, hub_run / "model", include_base=True) as folder:
        assert (folder / "base/model/model_index.json").is_file(), "the name that pictures have in their metadata"
        assert (folder / "base_vae/sharp-vae/config.json").is_file(), "a VAE of the hub is no pipeline"
    shutil.rmtree(base)
    with pytest.raises(UserError, match="is not on this machine: type include_base=false"), \
            mlflow_model.linked_model(run, run / "model", include_base=True):
        pass


def test_a_models_address_is_downloaded_once(
        empty_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(empty_db, tmp_path / "mlflow.db")
    add_adapter(trial(tmp_path, "a", 0.2, **TINY))
    plain = Registry.register
    with monkeypatch.context() as patch:  # as an earlier version of this package registered
        patch.setattr(Registry, "_lacking", lambda *_: None)
        patch.setattr(Registry, "register", lambda self, name, run_id, folder, tags, _: plain(
            self, name, run_id, folder, tags, lambda: nullcontext(folder)))
        promote("s", tmp_path, PromotionOptions())
    old = Path(str(local_path("models:/demo-tiny-full@champion", run_root=tmp_path)))
    assert json.loads((old / "run.json").read_text()) == {"run": "a", "settings": {
        "model.source": "package:tiny-sd", "model.revision": "abc", "dataset.instance_prompt": "a photo of a zwx toy"}}
    record = promote("s", tmp_path, PromotionOptions())
    assert record["version"] == 1, "the same version becomes an MLflow model"
    new = Path(str(local_path("models:/demo-tiny-full/1", f"sqlite:///{tmp_path}/mlflow.db", tmp_path)))
    assert new == old and (new / "MLmodel").is_file() and (new / "base/tiny-sd").is_dir()
    monkeypatch.setattr(Registry, "download", lambda *_: pytest.fail("downloaded twice"))
    assert local_path("models:/demo-tiny-full@champion", run_root=tmp_path) == str(new)
    for address, sentence in {
            "models:/demo-tiny-full/7": "has no model models:/demo-tiny-full/7: .* versions of demo-tiny-full are 1",
            "models:/demo-tiny-full@best": "has no model", "models:/other@champion": "versions of other are none",
            "models:/demo-tiny-full": "is not the address of a registered model"}.items():
        with pytest.raises(UserError, match=sentence):
            local_path(address, run_root=tmp_path)


def test_other_addresses_need_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert [local_path(one) for one in (None, "runs/a", "stable-diffusion-v1-5/x")] == [
        None, "runs/a", "stable-diffusion-v1-5/x"]
    assert [is_registered(one) for one in (None, "runs/a", "models:/a/1")] == [False, False, True]
    with pytest.raises(UserError, match=r"there is no MLflow database .*mlflow\.db that knows models:/a/1: type uri="):
        local_path("models:/a/1", run_root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base, sentence", [(None, ""), ("/bases/mine", "set DREAMBOOTH_BASE to its folder there")])
def test_the_message_says_what_the_model_lacks(base: Any, sentence: str) -> None:
    text = promotion_message({
        "name": "n", "version": 1, "alias": "champion", "run": "r", "objective_name": "o", "objective": 1.0,
        "replaced": None, "class_similarity": None, "prompt_fidelity": None, "model_uri": "models:/n@champion",
        "server": "here", "referenced_base": base})
    assert sentence in text and ("base model" in text) == bool(base)


def test_a_folder_in_s3_is_downloaded_to_the_folder_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreambooth.storage.run_inputs.download_if_remote", lambda *arguments: arguments)
    assert local_path("s3://bucket/run", run_root="cache") == ("s3://bucket/run", "cache/s3")
