"""The MLflow model draws what the renderer draws: rows, gaps, errors, the base of an adapter; and MLflow serves it."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from pandas import DataFrame
from PIL import Image

from dreambooth.errors import UserError
from dreambooth.inference import mlflow_model
from dreambooth.inference.mlflow_model import PictureModel
from dreambooth.inference.model_sources import Source, fetch_base
from dreambooth.inference.picture_request import PictureRequest
from dreambooth.models import hub
from dreambooth.tracking.mlflow_model import linked_model
from tests.support.runs import trial
from tests.tracking.test_registered_models import TINY, add_adapter

FEW = {"prompt": "a zwx toy", "num_inference_steps": 2, "size": "32x32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PictureModel:
    run = trial(tmp_path_factory.mktemp("registered"), "a", 0.2, **TINY)
    add_adapter(run)
    with linked_model(run, run / "model") as folder:
        return mlflow_model._load_pyfunc(str(folder), {"base": None, "device": None})


def test_threads_take_turns_also_with_the_tokenizer() -> None:
    """Fast tokenizers must not be used by two threads at a time, and `check` counts tokens."""
    class Toy:
        def check(self, request: PictureRequest) -> None:
            assert model._lock.locked()
            raise UserError("checked")

    model = PictureModel(Toy())  # type: ignore[arg-type]
    with pytest.raises(MlflowException, match="checked"):
        model.predict([{"prompt": "a"}])
    assert not model._lock.locked()


def test_a_row_is_the_pictures_of_one_request(model: PictureModel) -> None:
    frame = DataFrame([FEW | {"seed": 3, "num_images": 2, "adapter_scale": 0.5}, FEW | {"negative_prompt": "red"}])
    found = model.predict(frame)
    assert [(one["seed"], one["loras"][0]["scale"], one["negative_prompt"]) for one in found.metadata] == [
        (3, 0.5, None), (4, 0.5, None), (0, 1.0, "red")]
    assert (found.metadata[0]["guidance_scale"], found.metadata[0]["model"]) == (4.0, "tiny-sd")
    requests = [PictureRequest("a zwx toy", None, seed, 2, width=32, height=32, adapter_scale=0.5) for seed in (3, 4)]
    assert [base64.b64decode(image) for image in found.image[:2]] == model.renderer.draw(requests)
    assert Image.open(io.BytesIO(base64.b64decode(found.image[2]))).size == (32, 32)
    assert model.predict([FEW | {"negative_prompt": "red"}]).image[0] == found.image[2]


def test_a_wrong_value_is_status_400(model: PictureModel) -> None:
    for values, sentence in (({"num_images": 17}, "num_images must be a whole number from 1 to 16, not 17"),
                             ({"seed": 2.5}, "not 2.5"), ({"seed": float(2**60)}, "not 1.15"),
                             ({"prompt": "\ud800"}, "^prompt must be text that UTF-8 can express"),
                             ({"negative_prompt": "\ud800"}, "^negative_prompt must be text that UTF-8 can express"),
                             ({"size": "33x32"}, "33x32"), ({"steps": 3}, "there is no field 'steps'")):
        with pytest.raises(MlflowException, match=sentence) as caught:
            model.predict([FEW | values])
        assert caught.value.get_http_status_code() == 400


def test_a_base_that_is_not_on_this_machine_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trial(tmp_path, "a", 0.2, **TINY | {"model__source": str(tmp_path / "gone")})
    add_adapter(run)
    with linked_model(run, run / "model") as folder:
        with pytest.raises(UserError, match="gone is not on this machine: set the environment variable "
                                            "DREAMBOOTH_BASE to its folder or hub id, or promote the run again"):
            mlflow_model._load_pyfunc(str(folder))
        monkeypatch.setenv("DREAMBOOTH_BASE", "package:tiny-sd")
        assert mlflow_model._load_pyfunc(str(folder)).renderer.info.model == "tiny-sd"


def test_the_base_on_the_hub_is_downloaded_in_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(hub, "unresolved", lambda: None)
    monkeypatch.setattr(hub, "download_pipeline", lambda *arguments: asked.append(arguments))
    adapter = Source(Path("a"), "org/model", "a/lora.safetensors", {"model.revision": "abc", "model.variant": "null"})
    assert fetch_base(adapter) == adapter and fetch_base(replace(adapter, adapter=None)).model == "org/model"
    assert asked == [("org/model", "abc", None, False)], "a whole model needs no download"
    monkeypatch.setattr(hub, "download_pipeline", lambda *arguments: Path("gone").stat())
    with pytest.raises(UserError, match=r"org/model could not be downloaded \(.*\): type base=DIR"):
        fetch_base(adapter)
