"""The model to deploy: found in every form, planned on real cards, and uploaded to a local S3."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreambooth.deployment import instances, model_artifact
from dreambooth.deployment.endpoint_requests import Artifact
from dreambooth.deployment.instances import Need
from dreambooth.deployment.model_artifact import DeployedModel, find_model
from dreambooth.deployment.options import Deploy
from dreambooth.deployment.serving_need import predict_with_planner
from dreambooth.errors import ConfigError, DoesNotFit, UserError
from dreambooth.inference.model_sources import Source
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.storage import folders, manifest
from dreambooth.utils.console import Console
from tests.cloud.jobs import ROOT
from tests.deployment.conftest import OPTIONS
from tests.support.s3_server import in_bucket, plain_client, serving

TINY = ROOT / "dreambooth/assets/tiny-sd"


def options(**words: Any) -> Deploy:
    return Deploy(**OPTIONS | words)


def write_run(folder: Path, *, adapter: bool = False, **settings: str) -> Path:
    """A folder like that of a finished run, with few bytes."""
    (folder / "model").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/state.safetensors").write_bytes(b"not to be uploaded")
    (folder / "run.json").write_text(json.dumps({"settings": {"model.source": "package:tiny-sd", **settings}}))
    (folder / "model" / (ADAPTER if adapter else "model_index.json")).write_text("{}")
    return folder


def names(model: DeployedModel) -> list[set[str]]:
    return [set(upload.entries) for upload in model.uploads]


def test_of_a_run_only_the_model_and_its_settings_are_uploaded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo_1")
    model = find_model(options(run=str(run)))
    assert names(model) == [{"run.json", "model/model_index.json"}]
    [upload] = model.uploads
    assert upload.uri == model.artifact.uri == f"s3://bucket/dreambooth/models/demo-1-{manifest.digest(upload.entries)}"
    (run / "checkpoints/more.safetensors").write_bytes(b"x")
    assert find_model(options(run=str(run))).artifact == model.artifact
    (run / "run.json").write_text("{}")
    assert find_model(options(run=str(run))).artifact != model.artifact, "the address tells the content"


def test_the_base_of_an_adapter_is_in_the_image_on_the_hub_or_uploaded(tmp_path: Path) -> None:
    base = tmp_path / "my-base"
    base.mkdir()
    (base / "model_index.json").write_text("{}")
    packaged = write_run(tmp_path / "a", adapter=True)
    hub = write_run(tmp_path / "b", adapter=True, **{"model.source": "org/model"})
    local = write_run(tmp_path / "c", adapter=True, **{"model.source": str(base)})
    for run in (packaged, hub):
        artifact = find_model(options(run=str(run))).artifact
        assert (artifact.base, artifact.hub_base) == (None, None), "the run's own settings lead the server there"
    model = find_model(options(run=str(local)))
    assert names(model)[1] == {"model_index.json"}
    assert model.artifact.base == model.uploads[1].uri
    assert model.artifact.base.startswith("s3://bucket/dreambooth/models/my-base-")
    assert find_model(options(run=str(packaged), base="org/other")).artifact.hub_base == "org/other"


def test_a_registered_adapter_is_uploaded_with_the_base_that_travels_with_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs/a", adapter=True)
    monkeypatch.setattr(model_artifact, "local_path", lambda address, uri: str(tmp_path / "registered/toy-1"))
    shutil.copytree(run / "model", tmp_path / "registered/toy-1")
    shutil.copy(run / "run.json", tmp_path / "registered/toy-1")
    (tmp_path / "registered/toy-1/base/mine").mkdir(parents=True)
    (tmp_path / "registered/toy-1/base/mine/model_index.json").write_text("{}")
    model = find_model(options(run="models:/toy@champion"))
    assert names(model) == [{"run.json", ADAPTER, "base/mine/model_index.json"}]
    assert (model.artifact.base, model.artifact.hub_base, model.artifact.source) == (None, None, "models:/toy@champion")
    shutil.rmtree(tmp_path / "registered/toy-1/base")
    (tmp_path / "registered/toy-1/run.json").write_text(json.dumps({"settings": {"model.source": "/bases/mine"}}))
    with pytest.raises(UserError, match="trained on /bases/mine, which is not on this machine: type base=s3://"):
        find_model(options(run="models:/toy@champion"))


@pytest.mark.parametrize("settings, words, sentence", [
    ({}, {"s3": None}, "the model has to be uploaded: type s3=s3://BUCKET/FOLDER, or set DREAMBOOTH_S3"),
    ({"model.vae": "vae"}, {}, "which an endpoint cannot read: repeat the command of its run with method.merge=true"),
    ({}, {"base": "model.safetensors"}, "is a single file: type base=DIR"),
])
def test_what_an_endpoint_could_not_read_is_refused(
        settings: dict[str, str], words: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    run = write_run(tmp_path / "run", adapter=True, **{key: str(tmp_path / value) for key, value in settings.items()})
    with pytest.raises(UserError, match=sentence):
        find_model(options(run=str(run), **words))


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the model is missing: type run=runs/NAME, run=s3://BUCKET/FOLDER or run=mod"):
        find_model(options(run=None))
    with pytest.raises(UserError, match="there is no model in"):
        find_model(options(run=str(tmp_path)))


@pytest.mark.parametrize("base, found", [
    ("models/sd15", "uploaded"), ("~/sd15", "uploaded"), ("./models/sd15", "uploaded"), ("package:tiny-sd", "hub"),
    ("org/sd15", "hub"), ("./missing", "missing"), ("~/missing", "missing"), ("/missing", "missing")])
@pytest.mark.parametrize("is_typed", [True, False])
def test_the_local_base_of_an_adapter_in_s3_is_uploaded(
        base: str, found: str, is_typed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("models/sd15", "home/sd15"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = {"settings": {"model.source": "org/other" if is_typed else base}}
    sizes = {"run.json": 10, f"model/{ADAPTER}": 10, f"model/{manifest.NAME}": 2}
    monkeypatch.setattr(folders, "inspect", lambda uri: folders.RemoteContent("0", True, True))
    monkeypatch.setattr(folders, "list_sizes", lambda uri: sizes)
    monkeypatch.setattr(folders, "read_json", {"s3://bucket/b/run.json": run}.__getitem__)
    typed = options(run="s3://bucket/b", base=base if is_typed else None)
    if found == "missing":
        with pytest.raises(UserError, match=rf"(model|on) {base}(, which)? is not on this machine: type base="):
            find_model(typed)
        return
    model = find_model(typed)
    assert names(model) == [{"model_index.json"}] * (found == "uploaded") and model.adapter_bytes == 10
    assert model.artifact.base == (model.uploads[0].uri if model.uploads else None)
    assert not model.uploads or model.uploads[0].uri.startswith("s3://bucket/dreambooth/models/sd15-")
    assert model.artifact.hub_base == (base if found == "hub" and is_typed else None)


# -- the instance ---------------------------------------------------------------------------------------------------

def test_the_cheapest_machine_that_holds_the_model_is_chosen() -> None:
    def need(gib: float, **more: Any) -> Callable[[Any], Need]:
        return lambda hardware: Need(gib, **more)

    kinds = [instances.choose(options(), need(gib)).type for gib in (1, 14.6, 14.7, 22.1)]
    assert kinds == ["ml.g4dn.xlarge", "ml.g4dn.xlarge", "ml.g6.xlarge", "ml.g6e.xlarge"]
    assert instances.choose(options(), need(1, host_gib=17)).type == "ml.g6e.xlarge", "16 GiB of host memory"
    small = instances.choose(options(), lambda machine: Need(1, exact=machine.gpu != "T4", memory=("nf4",)))
    assert small.type == "ml.g6.xlarge", "no option that changes the pictures, if another machine needs none"
    changed = instances.choose(options(), need(1, exact=False, memory=("vae_tiling", "nf4")))
    assert "with vae_tiling and nf4, which changes the pictures a little" in next(
        instances.describe_cost(options(), changed))
    with pytest.raises(DoesNotFit, match=r"needs 99.0 GiB and the largest card of conf/hardware, L40S, has") as caught:
        instances.choose(options(), need(99))
    assert caught.value.exit_code == 3
    with pytest.raises(DoesNotFit, match=r"needs 20.0 GiB and T4 of ml.g4dn.xlarge has 14.6: type instance=auto"):
        instances.choose(options(instance="ml.g4dn.xlarge"), need(20))
    with pytest.raises(ConfigError, match="cannot be predicted here: type instance=TYPE"):
        instances.choose(options(), lambda machine: None)
    typed = instances.choose(options(instance="ml.m5.xlarge"), lambda machine: None)
    assert (typed.usd_hour, typed.has_gpu, typed.has_own_disk) == (None, False, False)


def test_a_picture_that_takes_longer_than_a_request_may_is_told() -> None:
    def lines(seconds: float, **words: Any) -> str:
        chosen = instances.choose(options(**words), lambda machine: Need(1, seconds))
        return "\n".join(instances.describe_cost(options(**words), chosen))

    assert "AWS ends a request after 60 s, and one picture takes about 75 s: type kind=async" in lines(75)
    assert "AWS ends" not in lines(59) + lines(75, kind="async")


@pytest.mark.slow
def test_the_planner_chooses_the_instance_of_a_real_architecture() -> None:
    source = Source(Path(), str(TINY), None, {"model.name": "tiny", "model.source": str(TINY)})
    model, words = DeployedModel(Artifact("s3://b/m"), (), source, adapter_bytes=2**20), options(size="64x64")
    small = instances.choose(words, predict_with_planner(model, words))
    assert small.type == "ml.g4dn.xlarge" and small.need
    assert 0.74 < small.need.gib < 1.5 and small.need.picture_seconds and small.need.host_gib > 1
    unknown = DeployedModel(Artifact("s3://b/m"))
    assert predict_with_planner(unknown, options())(next(iter(instances.machines()))) is None


# -- S3 -------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_run_is_uploaded_once_and_deployed_from_s3(tmp_path: Path) -> None:
    run = tmp_path / "runs/toy"
    write_run(run)
    shutil.rmtree(run / "model")
    shutil.copytree(TINY, run / "model")
    with serving() as server:
        plain_client().create_bucket(Bucket="bucket")
        model = find_model(options(run=str(run)))
        for upload in model.uploads:
            upload.run(Console(quiet=True))
        prefix = model.artifact.uri.removeprefix("s3://bucket/")
        stored = in_bucket("bucket", prefix)
        assert stored.keys() == {*model.uploads[0].entries, manifest.NAME}
        assert stored["model/unet/config.json"] == (TINY / "unet/config.json").read_bytes()
        before = len(server.calls)
        model.uploads[0].run(Console(quiet=True))
        assert all(method in ("GET", "HEAD") for method, _ in server.calls[before:]), "nothing is sent again"
        found = find_model(options(run=model.artifact.uri))
        assert found.artifact.uri == model.artifact.uri and not found.uploads
        assert found.source and found.source.model.endswith("tiny-sd")
        s3 = plain_client()
        s3.put_object(Bucket="bucket", Key="half/model/model_index.json", Body=b"{}")
        s3.put_object(Bucket="bucket", Key="other/a.txt", Body=b"{}")
        for address, sentence in (("s3://bucket/half", f"has no {manifest.NAME}, so it may be half uploaded"),
                                  ("s3://bucket/other", "holds neither model_index.json nor"),
                                  ("s3://bucket/nothing", "there is no folder s3://bucket/nothing")):
            with pytest.raises(UserError, match=sentence):
                find_model(options(run=address))
        folders.upload(write_run(tmp_path / "b", adapter=True, **{"model.source": "/elsewhere/base"}), "s3://bucket/b")
        with pytest.raises(UserError, match="was trained on /elsewhere/base, which is not on this machine: type base="):
            find_model(options(run="s3://bucket/b"))
        artifact = find_model(options(run="s3://bucket/b", base=model.artifact.uri, adapters="s3://bucket/b")).artifact
        assert (artifact.base, artifact.adapters) == (model.artifact.uri, "s3://bucket/b")
