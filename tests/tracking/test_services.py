"""A team's MLflow server with PostgreSQL, S3 and a browser: four runs side by side, and a kill of the server."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dreambooth.tracking.journal import EXPERIMENT, read
from dreambooth.tracking.run_tracker import trials_link
from tests.support.services import TrackingServer, browser, team

pytestmark = pytest.mark.services
SHOTS = os.environ.get("DREAMBOOTH_SHOTS")  # folder for screenshots; those in docs/images are of a longer sweep
SHORT = ["hardware=cpu", "prior.num_class_images=4", "prior.num_inference_steps=2", "sample.num_inference_steps=4",
         "sample.every=10", "sample.images_per_prompt=1", "train.max_train_steps=20", "evaluate.images_per_prompt=1",
         "evaluate.class_images=2"]
PAGE = trials_link("four").replace(EXPERIMENT, "1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with team(tmp_path_factory.mktemp("team")) as server:
        yield server


def train(root: Path, server: TrackingServer, *words: str, sweep: bool = False,
          **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dreambooth.train", *(["-m"] if sweep else []), f"run_root={root}",
         f"tracking.uri={server.url}", *SHORT, *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def finished(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def runs(server: TrackingServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run root of a sweep of four trials."""
    root = tmp_path_factory.mktemp("runs")
    finished(train(root, server, "tracking.sweep=four", "evaluate.promote=true",
                   "train.learning_rate=1e-4,3e-4", "prior.prior_loss_weight=0,1", sweep=True))
    return root


def client(server: TrackingServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.url)


def trials(server: TrackingServer, sweep: str = "four", kind: str = "trial") -> list[Any]:
    return list(client(server).search_runs(["1"], f"tags.sweep = '{sweep}' and tags.kind = '{kind}'"))


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png")


def test_the_server_requires_a_login(server: TrackingServer) -> None:
    import requests

    search = f"{server.url}/api/2.0/mlflow/experiments/search?max_results=1"
    assert requests.get(search, timeout=30).status_code == 401
    assert requests.get(search, timeout=30, auth=("admin", server.password)).status_code == 200
    assert requests.get(f"{server.url}/health", timeout=30).status_code == 200


def test_a_second_person_adds_runs_to_the_teams_experiment(server: TrackingServer, runs: Path) -> None:
    import requests

    login = ("second", "a-password-of-theirs")
    created = requests.post(f"{server.url}/api/2.0/mlflow/users/create", timeout=30, auth=("admin", server.password),
                            json=dict(zip(("username", "password"), login, strict=True)))
    assert created.status_code == 200, created.text
    output = finished(train(runs, server, "train.seed=11", "train.max_train_steps=1", "evaluate.encoder=none",
                            "sample.every=null", "tracking.required=true", "tracking.sweep=second",
                            MLFLOW_TRACKING_USERNAME=login[0], MLFLOW_TRACKING_PASSWORD=login[1]))
    assert "refuses" not in output
    [run] = trials(server, "second")
    assert run.info.status == "FINISHED"


def test_trials_are_named_by_what_differs_and_carry_everything(server: TrackingServer, runs: Path) -> None:
    sweep_trials = trials(server)
    assert {run.info.run_name for run in sweep_trials} == {
        f"learning_rate={rate} prior_loss_weight={weight}" for rate in ("1e-4", "3e-4") for weight in (0, 1)}
    for run in sweep_trials:
        assert run.info.status == "FINISHED" and run.info.artifact_uri.startswith("mlflow-artifacts:")
        assert "mlflow.parentRunId" not in run.data.tags
        note = run.data.tags["mlflow.note.content"]
        assert "(#/experiments/1/runs?" in note and "dreambooth.generate run=" in note
        artifacts = {file.path for file in client(server).list_artifacts(run.info.run_id)}
        assert {"contact_sheet.png", "curves.svg", "images", "run.json"} <= artifacts
        [photos] = run.inputs.dataset_inputs
        assert photos.dataset.name == "demo" and '"photos": 5' in photos.dataset.profile
        assert photos.tags[0].value == "training"


def test_the_sweep_has_a_run_of_its_own(server: TrackingServer, runs: Path) -> None:
    [own] = trials(server, kind="sweep")
    assert own.info.run_name == "sweep-four" and own.data.metrics["jobs"] == 4
    artifacts = {file.path for file in client(server).list_artifacts(own.info.run_id)}
    assert artifacts == {"results-four.csv", "parallel_coordinates.json"}
    assert len((runs / "results-four.csv").read_text().splitlines()) == 5


def test_the_best_is_champion_and_promote_agrees(server: TrackingServer, runs: Path) -> None:
    version = client(server).get_model_version_by_alias("demo-tiny-full", "champion")
    output = finished(subprocess.Popen(
        [sys.executable, "-m", "dreambooth.promote", "sweep=four", f"run_root={runs}", "max_class_similarity=1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    best = min(trials(server), key=lambda run: run.data.metrics["objective"])
    version = client(server).get_model_version_by_alias("demo-tiny-full", "champion")
    assert version.run_id == best.info.run_id and f"version {version.version} is champion" in output
    folder = version.source.removeprefix(f"{best.info.artifact_uri}/")
    assert folder == "model-20-20"
    files = {file.path for file in client(server).list_artifacts(best.info.run_id, folder)}
    assert f"{folder}/model_index.json" in files


def test_a_killed_server_loses_no_metric(server: TrackingServer, runs: Path) -> None:
    words = ["tracking.sweep=killed", "train.seed=7", "evaluate.encoder=none", "sample.every=null",
             "train.max_train_steps=60"]
    process, end = train(runs, server, *words), time.monotonic() + 200

    def steps() -> dict[Path, list[int]]:
        return {journal: [entry["step"] for entry, _ in read(journal) if "loss" in entry.get("metrics", ())]
                for journal in runs.glob("*/metrics.jsonl") if '"sweep":"killed"' in journal.read_text()}

    while not any(len(logged) >= 10 for logged in steps().values()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    server.kill()
    output = finished(process)
    assert "does not answer" in output and "repeat the command" in output
    server.start()
    for _ in range(5):  # each command waits at its end for the server, for a bounded time
        if "not in MLflow yet" not in finished(train(runs, server, *words)):
            break
    [run] = trials(server, "killed")
    points = client(server).get_metric_history(run.info.run_id, "loss")
    assert sorted(point.step for point in points) == list(range(1, 61)) and run.info.status == "FINISHED"
    [(journal, logged)] = steps().items()
    assert logged == list(range(1, 61))
    losses = {entry["step"]: entry["metrics"]["loss"] for entry, _ in read(journal)
              if "loss" in entry.get("metrics", ())}
    assert {point.step: point.value for point in points} == losses


def opened(page: Any, address: str) -> None:
    """Open a page of MLflow and close the assistant, which opens by itself."""
    page.goto(address)
    close = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    with suppress(Exception):
        close.click(timeout=10_000)
    close.wait_for(state="hidden")


def card(page: Any, server: TrackingServer, name: str) -> Any:
    """Find a chart in MLflow's view of the trials."""
    opened(page, f"{server.url}/{PAGE}")
    page.get_by_placeholder("Search metric charts").fill(name)
    chart = page.locator("[data-testid='experiment-view-compare-runs-card']").filter(
        has=page.get_by_text(name, exact=True))
    page.locator("[data-testid='experiment-view-compare-runs-chart-area']").hover()
    for turn in range(80):  # MLflow draws a chart when it comes into view
        if chart.count():
            break
        page.mouse.wheel(0, 300 if turn < 40 else -300)
        page.wait_for_timeout(300)
    chart.scroll_into_view_if_needed(timeout=20_000)
    return chart


def test_the_runs_are_listed_in_a_browser(server: TrackingServer, runs: Path) -> None:
    with browser(server) as page:
        opened(page, f"{server.url}/{PAGE}".replace("&compareRunsMode=CHART", ""))
        page.get_by_text("matching runs").wait_for()
        for run in trials(server):
            page.get_by_text(run.info.run_name, exact=True).first.wait_for()
        shot(page, "team-runs")


def test_the_charts_show_the_loss_of_all_four(server: TrackingServer, runs: Path) -> None:
    with browser(server) as page:
        chart = card(page, server, "loss_instance")
        chart.locator(".js-plotly-plot .scatterlayer .trace").nth(3).wait_for()
        for run in trials(server):
            assert f"{run.info.run_name} (loss_instance)" in chart.inner_text()
        lines = chart.locator(".scatterlayer .trace path.js-line")
        shapes = lines.evaluate_all("all => all.map(line => line.getAttribute('d'))")
        assert len(set(shapes)) == 4  # MLflow chooses colours at random: two runs may share one
        shot(page, "team-charts")


def test_the_image_grid_has_four_runs_and_a_slider_of_steps(server: TrackingServer, runs: Path) -> None:
    with browser(server) as page:
        card(page, server, "samples/prompt_1").locator("[data-component-id='fullscreen_button_chartcard']").click()
        window = page.get_by_role("dialog")
        window.locator("img").nth(3).wait_for()
        pictures, slider = window.locator("img"), window.get_by_role("slider")
        until = time.monotonic() + 20  # the dialog is laid out first, then the pictures
        while len(boxes := [picture.bounding_box() for picture in pictures.all()]) != 4 \
                or len({box["y"] for box in boxes}) != 1:
            assert time.monotonic() < until, f"not side by side: {boxes}"
            page.wait_for_timeout(200)
        before = [picture.get_attribute("src") for picture in pictures.all()]
        slider.press("ArrowRight" if slider.get_attribute("aria-valuenow") == "0" else "ArrowLeft")
        page.wait_for_function("old => [...document.querySelectorAll('[role=dialog] img')].filter(i => "
                               "!old.includes(i.getAttribute('src'))).length == 4", arg=before, timeout=30_000)
        shot(page, "team-images")


def test_the_compare_page_works_in_a_browser_without_a_network(runs: Path) -> None:
    subprocess.run([sys.executable, "-m", "dreambooth.compare", "sweep=four", f"run_root={runs}"], check=True)
    with browser() as page:
        schemes: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: schemes.append(request.url.partition(":")[0]))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{runs}/compare-four.html")
        pictures = page.locator("img[data-trial]")
        assert pictures.count() == 12, "three prompts, four trials"
        assert page.locator("tr[data-row]").count() == 4 and page.locator("em:not(.warn)").inner_text() == "best"
        assert page.locator("figure svg").count() == 3
        assert page.locator("figure").first.locator("[data-series]").count() == 4
        assert page.locator("#at").inner_text() == "step 20"
        last = pictures.first.get_attribute("src")
        shot(page, "team-compare")
        page.locator("#step").press("Home")
        assert page.locator("#at").inner_text() == "step 0"
        first = {picture.get_attribute("src") for picture in page.locator("img[data-prompt='0']").all()}
        assert len(first) == 1 and last not in first, "before training, all trials equal the base"
        page.locator("[data-toggle='0']").uncheck()
        assert not pictures.first.is_visible() and pictures.nth(1).is_visible()
        assert not errors and set(schemes) <= {"file", "data"}
