"""A roll-out against a local HTTP server that answers as the API of Kubernetes does; no pods run."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from dreambooth import stage
from dreambooth.deployment import kubernetes_rollout, smoke_test
from dreambooth.deployment.kubernetes_rollout import PREVIOUS, Deployment, roll_out
from dreambooth.errors import UserError
from dreambooth.kubernetes.serving import NAME
from tests.kubernetes.workflow_files import documents
from tests.support.configs import compose_config, demo_recipe

OLD, NEW = "models:/toy/1", "models:/toy/2"


class Api(HTTPServer):
    """The Deployment of the committed file. Its pods are ready at once, unless its model is in `broken`."""

    def __init__(self) -> None:
        self.object: dict[str, Any] = next(iter(documents("serving/deployment.yaml")))
        self.object["metadata"]["generation"] = 1
        self.broken: set[str] = set()
        self.models: list[str] = []  # all models that were set
        self.tokens: set[str] = set()
        self.failures, self.lost = 0, False  # number of requests that fail with 503; whether all do
        self.variable["value"] = OLD
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def variable(self) -> dict[str, str]:
        variables: list[dict[str, str]] = self.object["spec"]["template"]["spec"]["containers"][0]["env"]
        return next(one for one in variables if one["name"] == "MODEL")

    def answer(self) -> dict[str, Any]:
        broken = self.variable["value"] in self.broken
        count = 0 if broken else 1
        return self.object | {"status": {
            "observedGeneration": self.object["metadata"]["generation"], "replicas": 1 + broken,
            "updatedReplicas": 1, "availableReplicas": count, "conditions": [
                {"type": "Progressing", "status": "False" if broken else "True", "message": "deadline exceeded"}]}}

    def patch(self, patch: dict[str, Any]) -> None:
        [container] = patch["spec"]["template"]["spec"]["containers"]
        assert container["name"] == "serve"
        [variable] = container["env"]
        self.variable.update(variable)
        self.models.append(variable["value"])
        self.object["metadata"].setdefault("annotations", {}).update(patch["metadata"]["annotations"])
        self.object["metadata"]["generation"] += 1


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        assert self.headers["Content-Type"] == "application/strategic-merge-patch+json"
        self.server.patch(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer()

    def _answer(self) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        known = self.path == f"/apis/apps/v1/namespaces/team/deployments/{NAME}"
        failing, self.server.failures = self.server.failures > 0 or self.server.lost, max(0, self.server.failures - 1)
        self.send_response(503 if failing else 200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.answer()).encode() if known else b"{}")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def deployment(api: Api) -> Deployment:
    return Deployment(NAME, f"http://127.0.0.1:{api.server_port}", "team", "secret", None)


def fails(url: str) -> str:
    raise UserError(f"the pictures of {url} do not show the subject: check the base model")


def test_a_champion_whose_pictures_are_good_is_served(api: Api, deployment: Deployment) -> None:
    seen: list[str] = []

    def check(url: str) -> str:
        seen.append(url)
        return "similarity 0.7"

    assert roll_out(deployment, NEW, None, check) == f"{NAME} serves {NEW}: similarity 0.7"
    assert (api.models, seen, api.tokens) == ([NEW], [f"http://{NAME}.team.svc"], {"Bearer secret"})


@pytest.mark.parametrize("check, broken, reason", [
    (fails, set(), "do not show the subject"), (lambda url: "good", {NEW}, "did not become ready .deadline exceeded.")])
def test_a_champion_that_fails_is_replaced_by_the_model_before(
        check: Callable[[str], str], broken: set[str], reason: str, api: Api, deployment: Deployment) -> None:
    api.broken = broken
    with pytest.raises(UserError, match=f"{reason}.*; {NAME} serves {OLD} again$"):
        roll_out(deployment, NEW, None, check)
    assert api.models == [NEW, OLD]


def test_an_interrupted_roll_out_still_knows_the_model_before(api: Api, deployment: Deployment) -> None:
    deployment.set_model(NEW, OLD)  # and the pod of the stage was lost
    with pytest.raises(UserError, match=f"serves {OLD} again"):
        roll_out(deployment, NEW, None, fails)
    assert api.models == [NEW, OLD]
    assert api.object["metadata"]["annotations"][PREVIOUS] == OLD


@pytest.mark.parametrize("replaced, models, end", [
    ("models:/toy/1", [NEW, OLD], f"serves {OLD} again"), (None, [NEW], "because there is no earlier version")])
def test_an_alias_that_names_the_new_model_by_now_is_not_gone_back_to(
        replaced: str | None, models: list[str], end: str, api: Api, deployment: Deployment) -> None:
    """The rendered file serves models:/NAME@champion, and a promotion has moved the alias already."""
    api.variable["value"] = "models:/toy@champion"
    for _ in range(2):  # the second time after an interruption
        with pytest.raises(UserError, match=f"{end}$"):
            roll_out(deployment, NEW, replaced, fails)
        api.variable["value"] = NEW
    assert api.models == [*models, *models[1:]]


def test_a_fault_of_the_measurement_goes_back_too(api: Api, deployment: Deployment) -> None:
    with pytest.raises(ZeroDivisionError):
        roll_out(deployment, NEW, None, lambda url: str(1 / 0))
    assert api.models == [NEW, OLD]


def test_a_roll_back_that_fails_says_both(
        api: Api, deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_the_api(url: str) -> str:
        api.lost = True
        return fails(url)

    monkeypatch.setattr(kubernetes_rollout, "RETRIES", 0)
    fragile = Deployment(NAME, f"http://127.0.0.1:{api.server_port}", "team", "secret", None)
    with pytest.raises(UserError, match=rf"do not show the subject.*; going back to {OLD} has failed \(.*rollout undo"):
        roll_out(fragile, NEW, None, lose_the_api)


def test_a_lost_request_is_repeated(api: Api, deployment: Deployment) -> None:
    api.failures = 2
    assert deployment.read()["kind"] == "Deployment"
    assert api.failures == 0


def test_what_the_cluster_refuses_is_one_sentence(
        api: Api, deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Deployment("other", f"http://127.0.0.1:{api.server_port}", "team", "secret", None)
    with pytest.raises(UserError, match=r"the Deployment other cannot be read \(404 .*: apply workflows/base"):
        roll_out(other, NEW, None, fails)
    monkeypatch.setattr(kubernetes_rollout, "ACCOUNT", tmp_path)
    with pytest.raises(UserError, match="runs in a pod with a service account, and this is none: type kubectl set env"):
        Deployment.of_this_cluster(NAME)
    monkeypatch.setattr(kubernetes_rollout, "TIMEOUT", -1.0)
    api.broken, api.object["metadata"]["generation"] = {OLD}, 2
    monkeypatch.setattr(Api, "answer", lambda self: self.object)  # Kubernetes has not seen the change yet
    with pytest.raises(UserError, match="are not ready after"):
        deployment.wait()


def test_the_stage_deploys_only_the_champion_of_its_own_sweep(tmp_path: Path) -> None:
    (tmp_path / "promoted.json").write_text(json.dumps({"sweep": "earlier", "run_dir": str(tmp_path)}))
    with pytest.raises(UserError, match=r"the sweep mine has no champion in .*promoted.json"):
        stage._deploy(NAME, ["sweep=mine", f"run_root={tmp_path}"])


def test_the_stage_deploys_the_champion_and_tests_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run := tmp_path / "toy").mkdir()
    (run / ".hydra").mkdir()
    (run / "run.json").write_text("{}")
    (run / ".hydra/config.yaml").write_text(OmegaConf.to_yaml(compose_config()))
    (run / ".hydra/hydra.yaml").write_text(
        f"hydra: {{runtime: {{cwd: {tmp_path}, output_dir: {run}}}}}")
    champion = {"sweep": "mine", "run_dir": str(run), "name": "toy", "version": 3, "replaced": 2}
    (tmp_path / "promoted.json").write_text(json.dumps(champion))
    monkeypatch.setattr(kubernetes_rollout.Deployment, "of_this_cluster", lambda name: name)
    monkeypatch.setattr(smoke_test, "check", lambda url, recipe: f"{url} shows {recipe.instance_prompt}")
    monkeypatch.setattr(kubernetes_rollout, "roll_out", lambda *found: (*found[:-1], found[-1]("http://pod")))
    assert stage._deploy(NAME, ["sweep=mine", f"run_root={tmp_path}"]) == (
        NAME, "models:/toy/3", "models:/toy/2", "http://pod shows a photo of a zwx toy")


# -- the smoke test ----------------------------------------------------------------------------------------------------

class Answer:
    def __init__(self, picture: Image.Image | None) -> None:
        self.ok, self.status_code, self.text = picture is not None, 200 if picture else 503, "starting"
        file = io.BytesIO()
        (picture or Image.new("RGB", (8, 8))).save(file, "PNG")
        self._content = file.getvalue()

    def json(self) -> dict[str, Any]:
        return {"data": [{"b64_json": base64.b64encode(self._content).decode()}]}


@pytest.mark.slow
def test_pictures_of_the_subject_pass_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = demo_recipe()
    subject = Image.open(next(Path(recipe.reference_dir).glob("*.png"))).convert("RGB").resize((64, 64))
    posted: list[dict[str, Any]] = []

    def post(url: str, json: dict[str, Any], timeout: float, headers: dict[str, str]) -> Answer:
        posted.append({"url": url, **json, **headers})
        return Answer(drawn)

    class MeasuredTrial:
        def score(self, role: str) -> tuple[str, float, float]:
            return f"{role}_efficientnet_lite0", 0.7, 0.4

    monkeypatch.setattr(smoke_test, "load_trial", lambda folder: MeasuredTrial())
    monkeypatch.setattr(smoke_test.requests, "post", post)
    monkeypatch.setenv("DREAMBOOTH_SERVE_TOKEN", "a-token-of-the-team")
    drawn: Image.Image | None = subject
    assert "is 0." in smoke_test.check("http://serve", recipe)
    assert [one["prompt"] for one in posted] == list(recipe.evaluate_prompts)
    assert {(one["seed"], one["num_inference_steps"], one["Authorization"]) for one in posted} == {
        (recipe.evaluate.seed, recipe.sample.num_inference_steps, "Bearer a-token-of-the-team")}
    drawn = Image.new("RGB", (64, 64), "gray")
    with pytest.raises(UserError, match=r"do not show the subject: .* and at least 0.550 is required"):
        smoke_test.check("http://serve", recipe)
    drawn = None
    with pytest.raises(UserError, match=r"refused a picture with status 503 \(starting\)"):
        smoke_test.check("http://serve", recipe)
