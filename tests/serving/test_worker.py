"""A worker's batch: memory that runs out, requests that cannot be drawn, a batch for which nobody waits."""

from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.errors import Interrupted, UserError
from dreambooth.inference.picture_request import InvalidRequest, PictureRequest
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.serving.channel import Channel
from dreambooth.serving.worker import Batch, find_model
from dreambooth.storage import folders


class ToyRenderer:
    """Draws prompts as files, at most `room` at a time."""

    def __init__(self, room: int = 99) -> None:
        self.room, self.sizes = room, []  # type: ignore[var-annotated]

    def check(self, request: PictureRequest) -> None:
        if request.prompt == "too long":
            raise InvalidRequest("prompt is too long")
        if request.prompt == "damaged":
            raise UserError("the adapter is damaged")

    def draw(self, requests: Sequence[PictureRequest], on_step: Callable[[int, int], bool]) -> list[bytes]:
        self.sizes.append(len(requests))
        if len(requests) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(request.prompt == "bug" for request in requests):
            raise RuntimeError("a secret detail")
        if not on_step(1, 2):
            raise Interrupted("stopped")
        return [request.prompt.encode() for request in requests]


def drawn(renderer: Any, *prompts: str, stop: bool = False) -> dict[str, Any]:
    """Prompt -> the file, or the status and the sentence of the refusal."""
    ours, theirs = map(Channel, Pipe())
    if stop:
        ours.send({"do": "stop"})
    Batch(renderer, MemoryMeter(torch.device("cpu")), theirs, [PictureRequest(prompt) for prompt in prompts]).draw()
    found: dict[str, Any] = {}
    while ours.has_message():
        message, files = ours.receive()
        if message["event"] == "drawn":
            found |= {prompts[job]: file for job, file in zip(message["jobs"], files, strict=True)}
        elif message["event"] == "failed":
            found |= {prompts[job]: (message["status"], message["sentence"]) for job in message["jobs"]}
    return found


def test_a_batch_that_does_not_fit_into_memory_is_drawn_in_halves() -> None:
    renderer = ToyRenderer(room=2)
    assert drawn(renderer, *"abcde") == {letter: letter.encode() for letter in "abcde"}
    assert renderer.sizes == [5, 3, 2, 1, 2]


def test_a_picture_that_does_not_fit_alone_is_refused() -> None:
    found = drawn(ToyRenderer(room=0), "a", "b")
    assert {status for status, _ in found.values()} == {507} and "ask for a smaller size" in found["a"][1]


@pytest.mark.parametrize(("prompt", "status", "sentence"), [
    ("too long", 422, "prompt is too long"), ("damaged", 422, "the adapter is damaged")])
def test_a_request_that_cannot_be_drawn_fails_alone(prompt: str, status: int, sentence: str) -> None:
    assert drawn(ToyRenderer(), "a", prompt) == {"a": b"a", prompt: (status, sentence)}


def test_a_bug_fails_the_batch_and_its_details_are_in_the_log_only(capsys: pytest.CaptureFixture[str]) -> None:
    [(status, sentence)] = set(drawn(ToyRenderer(), "a", "bug").values())
    assert status == 500 and "RuntimeError" in sentence and "secret" not in sentence
    assert "a secret detail" in capsys.readouterr().err


def test_a_batch_for_which_nobody_waits_is_stopped() -> None:
    assert drawn(ToyRenderer(), "a", stop=True) == {"a": (499, "nobody waits for the picture")}


def test_a_stop_also_ends_the_halves_of_a_batch() -> None:
    renderer = ToyRenderer(room=2)
    assert set(drawn(renderer, *"abcd", stop=True).values()) == {(499, "nobody waits for the picture")}
    assert renderer.sizes == [4, 2], "the second half is not begun"


def test_a_registered_model_is_downloaded_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth.tracking import registered_models

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(registered_models.TRACKING_URI, raising=False)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mlflow.db").touch()
    calls = []

    def download(registry: None, address: str, server: str, cache: Path) -> Path:
        calls.append((address, server, str(cache)))
        return tmp_path

    monkeypatch.setattr(registered_models, "Registry", lambda *_: None)
    monkeypatch.setattr(registered_models, "_find", lambda _, name, alias, number: f"models:/{name}@{alias}")
    monkeypatch.setattr(registered_models, "_download", download)
    assert find_model("models:/toy@champion", None, None, "cache").model == str(tmp_path)
    assert find_model("models:/toy@champion", None, "http://server", "cache").model == str(tmp_path)
    assert calls == [
        ("models:/toy@champion", f"sqlite:///{Path.cwd()}/runs/mlflow.db", "cache/registered"),
        ("models:/toy@champion", "http://server", "cache/registered")]


def test_the_base_in_s3_of_an_adapter_is_downloaded_to_the_cache(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.json").write_text('{"settings": {"model.source": "s3://bucket/base"}}')
    (tmp_path / ADAPTER).touch()
    asked = []

    def download(uri: str, cache: Path, console: object, complete: bool) -> Path:
        asked.append((uri, str(cache)))
        return tmp_path

    monkeypatch.setattr(folders, "download", download)
    assert find_model(str(tmp_path), None, None, "cache").model == str(tmp_path)
    assert find_model(str(tmp_path), "s3://bucket/other", None, "cache").model == str(tmp_path)
    assert asked == [("s3://bucket/base", "cache/s3"), ("s3://bucket/other", "cache/s3")]
