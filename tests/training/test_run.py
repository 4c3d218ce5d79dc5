"""Whole runs of the real command, two to eight steps each: output, files, resuming and errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dreambooth.tracking.journal import read
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.provenance import origin
from tests.support.faults import FAST, call, train
from tests.support.runs import assert_same, flip_bit, losses, the_run

TWO = ["train.max_train_steps=2", "sample.every=2", "checkpoint.every=2"]
BARE = [*TWO, "sample.every=null", "prior.with_prior_preservation=false"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with MLflow."""
    root = tmp_path_factory.mktemp("short_run")
    assert train(root, *TWO, "tracking=mlflow", log=root / "out.txt") == 0
    return root


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def entries(run: Path, kind: str) -> list[dict[str, object]]:
    return [entry for entry, _ in read(run / "metrics.jsonl") if kind in entry]


def test_the_result_loads_with_diffusers_and_has_a_model_card(short_run: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run = the_run(short_run)
    pipeline = StableDiffusionPipeline.from_pretrained(run / "model")
    trained = load_file(run / "checkpoints/step-000002/ema.safetensors")
    assert pipeline.unet.conv_in.weight.equal(trained["unet.conv_in.weight"]), "exported weights are not the EMA"
    for part in ("unet", "text_encoder"):
        base = next(Path(resolve_asset("package:tiny-sd"), part).glob("*.safetensors"))
        ours = load_file(next((run / "model" / part).glob("*.safetensors")))
        changed = [name for name, theirs in load_file(base).items() if not ours[name].equal(theirs.to(ours[name]))]
        assert len(changed) > len(ours) * 0.9, f"{part} was not trained"
    card = (run / "model/README.md").read_text()
    assert "a photo of a zwx toy" in card
    assert (run / "model/contact_sheet.png").is_file()
    assert json.loads((run / "result.json").read_text())["step"] == 2


def test_metrics_images_and_settings_are_in_mlflow(short_run: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{short_run}/mlflow.db")
    [found] = client.search_runs([client.get_experiment_by_name("dreambooth").experiment_id])
    assert found.info.status == "FINISHED"
    for name in ("loss", "loss_instance", "loss_prior", "grad_norm", "learning_rate", "images_per_second"):
        assert len(client.get_metric_history(found.info.run_id, name)) == 2, name
    assert {"process_rss/load_gib", "process_rss/step_gib", "process_rss/sample_gib", "process_rss/save_gib",
            "process_rss/class_images_gib", "objective"} <= found.data.metrics.keys()
    assert found.data.params["train.learning_rate"] == "0.0003"
    assert len(found.data.params) < 20  # MLflow shows all of them above each image
    artifact = client.download_artifacts(found.info.run_id, "run.json", str(tmp_path))
    assert json.loads(Path(artifact).read_text())["settings"]["dataset.instance_prompt"] == "a photo of a zwx toy"
    assert {"version", "git_revision", "command", "model"} <= found.data.tags.keys()
    names = [item.path for item in client.list_artifacts(found.info.run_id, "images")]
    for prompt in range(3):
        steps = {name.split("step")[1][:2] for name in names if f"prompt_{prompt}" in name}
        assert len(steps) >= 1
        assert sum(f"prompt_{prompt}" in name and name.endswith(".png") for name in names) == 2
    assert {"contact_sheet.png", "run.json"} <= {item.path for item in client.list_artifacts(found.info.run_id)}


def test_the_terminal_shows_plan_progress_and_results(short_run: Path) -> None:
    output = (short_run / "out.txt").read_text()
    for words in ("a photo of a zwx toy", "2 class images: 0 existing, 2 to generate", "training 2/2",
                  "contact_sheet.png", "python -m dreambooth.generate"):
        assert words in output
    assert "Warning" not in output
    assert "\x1b" not in output, "control characters in a pipe"
    assert "Loading" not in output


def test_contact_sheet_shows_prompts_by_steps(short_run: Path) -> None:
    run = the_run(short_run)
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["step-000000", "step-000002"]
    with Image.open(run / "contact_sheet.png") as sheet:
        assert sheet.width > 200
        assert sheet.height > 600


def test_repeating_a_finished_run_reports_that_it_is_finished(short_run: Path) -> None:
    before = (the_run(short_run) / "result.json").stat().st_mtime_ns
    log = short_run / "again.txt"
    assert train(short_run, *TWO, "tracking=mlflow", log=log) == 0
    assert "this run is finished: 2 steps" in log.read_text()
    assert (the_run(short_run) / "result.json").stat().st_mtime_ns == before


def test_generate_uses_the_run(short_run: Path) -> None:
    log = short_run / "draw.txt"
    run = the_run(short_run)
    arguments = [f"run={run}", "prompt=a photo of a zwx toy", "num_images=3", "batch_size=2", "num_inference_steps=2"]
    assert call("generate", arguments, log=log) == 0, log.read_text()
    found = sorted(p.name for p in (run / "generated").iterdir())
    assert found == ["a-photo-of-a-zwx-toy-grid.png", *(f"a-photo-of-a-zwx-toy-seed{i}.png" for i in range(3))]
    images = [pixels(run / f"generated/a-photo-of-a-zwx-toy-seed{i}.png") for i in range(3)]
    assert all(np.abs(images[i] - images[i - 1]).max() > 100 for i in range(3))
    for seed in (1, 2):
        single = [*arguments[:2], "num_images=1", f"seed={seed}", "num_inference_steps=2", f"out={short_run}/o"]
        assert call("generate", single) == 0
        image = pixels(short_run / f"o/a-photo-of-a-zwx-toy-seed{seed}.png")
        assert np.abs(image - images[seed]).max() <= 2, "an image depends on more than its seed"


def test_more_steps_extend_a_finished_run(tmp_path: Path, uninterrupted: Path) -> None:
    assert train(tmp_path, "train.max_train_steps=4") == 0
    assert train(tmp_path) == 0
    assert_same(the_run(tmp_path), uninterrupted)


@pytest.mark.parametrize("how", ["sigterm", pytest.param("ctrl_c", marks=pytest.mark.slow)])
def test_a_stopped_run_saves_and_can_be_resumed(how: str, tmp_path: Path, uninterrupted: Path) -> None:
    log = tmp_path / "out.txt"
    assert train(tmp_path, fault=how, log=log) == 5
    run = the_run(tmp_path)
    assert (run / "checkpoints/step-000003/state.json").is_file()
    assert "stopped and saved after step 3" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert entries(run, "status")[-1]["status"] == "KILLED"
    assert train(tmp_path) == 0
    assert losses(run) == losses(uninterrupted)
    last = "checkpoints/step-000008/trained.safetensors"
    ours, theirs = load_file(run / last), load_file(uninterrupted / last)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_resume_never_starts_over_and_keeps_the_old_files(tmp_path: Path) -> None:
    assert train(tmp_path, *BARE) == 0
    assert train(tmp_path, *BARE, "checkpoint.resume=never") == 0
    run = the_run(tmp_path)
    [aside] = run.glob("earlier-*")
    assert (aside / "result.json").is_file()
    assert (run / "result.json").is_file()
    assert losses(run) == losses(aside)


@pytest.mark.slow
def test_resume_from_a_path(tmp_path: Path, uninterrupted: Path) -> None:
    start = uninterrupted / "checkpoints/step-000006"
    assert train(tmp_path, f"checkpoint.resume={start}") == 0
    last = "checkpoints/step-000008/trained.safetensors"
    ours, theirs = load_file(the_run(tmp_path) / last), load_file(uninterrupted / last)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow  # its fast counterpart: test_identity_changes_with_the_result
def test_a_changed_setting_is_another_run(tmp_path: Path) -> None:
    assert train(tmp_path, *BARE) == 0
    assert train(tmp_path, *BARE, "train.seed=1") == 0
    assert len(list(tmp_path.glob("demo-*"))) == 2


@pytest.mark.slow
def test_sampling_and_saving_do_not_change_training(tmp_path: Path) -> None:
    assert train(tmp_path / "a", *BARE, "sample.every=1", "checkpoint.every=1") == 0
    assert train(tmp_path / "b", *BARE, "checkpoint.every=null") == 0
    for part in ("trained", "ema"):
        ours, theirs = (load_file(the_run(tmp_path / r) / f"checkpoints/step-000002/{part}.safetensors") for r in "ab")
        assert all(ours[name].equal(theirs[name]) for name in theirs), part
    assert not (the_run(tmp_path / "b") / "samples").exists()


def test_a_sweep_makes_runs_side_by_side_and_shares_class_images(empty_db: Path, tmp_path: Path) -> None:
    shutil.copy(empty_db, tmp_path / "mlflow.db")
    log, sweep = tmp_path / "out.txt", ["sample.every=null", "prior.prior_loss_weight=0,1", "-m"]
    assert train(tmp_path, *TWO, "tracking=mlflow", *sweep, log=log) == 0, log.read_text()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("dreambooth").experiment_id])
    assert len({run.data.tags["sweep"] for run in found}) == 1
    trials = [run for run in found if run.data.tags.get("kind") != "sweep"]
    assert len(found) == len(trials) + 1
    assert sorted(run.data.params["prior.prior_loss_weight"] for run in trials) == ["0.0", "1.0"]
    assert all("mlflow.parentRunId" not in run.data.tags for run in found)
    assert len(list((tmp_path / "class_images").iterdir())) == 1


# The address is interpolated, as if it came from an environment variable.
UNREACHABLE = "tracking.uri='${oc.env:NOT_SET_HERE,\"http://user:secret@127.0.0.1:9\"}'"


def test_an_unreachable_mlflow_server_is_a_warning(tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    assert train(tmp_path, *BARE, "tracking=mlflow", UNREACHABLE, log=log) == 0
    assert "does not answer" in log.read_text()
    assert "secret" not in log.read_text()
    assert "secret" not in (the_run(tmp_path) / "metrics.jsonl").read_text()
    assert len(losses(the_run(tmp_path))) == 2


def test_an_unreachable_required_mlflow_server_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    required = ["tracking=mlflow", "tracking.uri=http://127.0.0.1:9", "tracking.required=true"]
    assert train(tmp_path, *BARE, *required, log=log) == 1
    assert "tracking.required=false" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("word", [
    "tracking.uri=http://user:se@cret@host:5000", "tracking.uri=postgresql://host/db?password=se@cret"])
def test_the_recorded_command_has_no_credentials(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dreambooth/train.py", word])
    assert "cret" not in (command := origin()["command"]) and "host" in command


@pytest.mark.slow
def test_a_typed_password_is_not_stored(tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    assert train(tmp_path / "runs", *BARE) == 0
    assert train(tmp_path / "runs", *BARE, "tracking=mlflow", "tracking.uri='http://me:cret@host'", log=log) == 1
    assert "MLFLOW_TRACKING_PASSWORD" in log.read_text()
    leaks = [path for path in (tmp_path / "runs").rglob("*") if path.is_file() and b"cret" in path.read_bytes()]
    assert not leaks


@pytest.mark.slow
def test_no_secret_of_a_refused_command_is_shown_or_kept(tmp_path: Path) -> None:
    signed = "'https://host/model.safetensors?X-Amz-Signature=zq9w'"
    for word, several in (("tracking.uri='http://me:zq9w@host','http://zq9w@host'", ["-m", "tracking=mlflow"]),
                          (f"model.source={signed}", []), (f"evaluate.reference_dir={signed}", ["-m"])):
        log = tmp_path / "out.txt"
        arguments = [*several, f"run_root={tmp_path / 'runs'}", *FAST, *BARE, word, "train.max_train_steps=1"]
        assert call("train", arguments, log=log) == 1
        assert "zq9w" not in log.read_text() and "Traceback" not in log.read_text()
    leaks = [path for path in (tmp_path / "runs").rglob("*") if path.is_file() and b"zq9w" in path.read_bytes()]
    assert not leaks


@pytest.mark.slow  # its fast counterpart: the identities of tests/config/test_compose.py
def test_a_sweep_over_steps_makes_one_run_per_value(tmp_path: Path) -> None:
    arguments = ["-m", f"run_root={tmp_path}", *FAST, *BARE]
    assert call("train", [word for word in arguments if "max_train" not in word] + ["train.max_train_steps=1,2"]) == 0
    found = [json.loads(path.read_text())["step"] for path in sorted(tmp_path.glob("*/result.json"))]
    assert sorted(found) == [1, 2]


@pytest.mark.parametrize("how, code, words", [
    ("no_memory", 4, "out of memory during step"), ("no_disk", 3, "run_root=DIR")])
def test_running_out_of_memory_or_disk_has_its_own_exit_code(how: str, code: int, words: str, tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    assert train(tmp_path, *BARE, fault=how, log=log) == code
    assert words in log.read_text()
    assert "Traceback" not in log.read_text()


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    settings = [*BARE, "train.max_train_steps=8", "train.learning_rate=1e12", "checkpoint.every=1"]
    assert train(tmp_path, *settings, log=log) == 6
    assert "the run diverged" in log.read_text()
    assert "Traceback" not in log.read_text()
    run = the_run(tmp_path)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert all(t.isfinite().all() for t in load_file(newest / "trained.safetensors").values())
    assert entries(run, "status")[-1]["status"] == "FAILED"


@pytest.mark.slow
def test_the_update_of_the_last_step_is_checked(tmp_path: Path) -> None:
    """Its loss is finite, and no later step has a loss that is not."""
    log = tmp_path / "out.txt"
    assert train(tmp_path, *BARE, "train.max_train_steps=1", "train.learning_rate=1e38", log=log) == 6
    assert "is not finite: the run diverged" in log.read_text()
    assert "Traceback" not in log.read_text()
    run = the_run(tmp_path)
    assert not [path for name in ("model", "result.json", "checkpoints/step-000001") if (path := run / name).exists()]


@pytest.mark.slow
def test_a_damaged_result_is_refused_and_made_again(tmp_path: Path) -> None:
    assert train(tmp_path, *BARE) == 0
    run, log = the_run(tmp_path), tmp_path / "out.txt"
    weights = run / "model/unet/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    flip_bit(weights, 0.9)
    assert call("generate", [f"run={run}", "num_images=1"], log=log) == 1
    assert "unet/diffusion_pytorch_model.safetensors has other content): repeat the command" in log.read_text()
    flip_bit(sorted((run / "checkpoints").iterdir())[-1] / "optimizer.safetensors")
    assert train(tmp_path, *BARE, log=log) == 0
    assert "optimizer.safetensors has other content" in log.read_text()
    assert weights.read_bytes() == before
    assert "Traceback" not in log.read_text()


def test_an_internal_error_keeps_its_traceback(tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    assert train(tmp_path, *BARE, fault="bug", log=log) == 1
    assert "AssertionError: a simulated bug" in log.read_text()


def base_with(folder: Path, part: str, **changes: object) -> Path:
    """A copy of the tiny base with changes in the config of one part."""
    base = folder / "base"
    shutil.copytree(resolve_asset("package:tiny-sd"), base)
    file = next((base / part).glob("*config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return base


def test_the_prediction_type_of_the_base_is_used_and_exported(tmp_path: Path) -> None:
    base = base_with(tmp_path, "scheduler", prediction_type="v_prediction")
    assert train(tmp_path / "runs", *BARE, f"model.source={base}", "dataset.allow_drawings=true") == 0
    saved = json.loads((the_run(tmp_path / "runs") / "model/scheduler/scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    assert saved["_class_name"] == "PNDMScheduler"


@pytest.mark.slow
def test_the_safety_checker_of_the_base_is_exported(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(CLIPConfig(
        text_config=small, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8))
    pipeline = StableDiffusionPipeline.from_pretrained(resolve_asset("package:tiny-sd"))
    pipeline.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))
    pipeline.save_pretrained(tmp_path / "base")
    assert train(tmp_path / "runs", *BARE, f"model.source={tmp_path}/base", "dataset.allow_drawings=true") == 0
    exported = StableDiffusionPipeline.from_pretrained(the_run(tmp_path / "runs") / "model")
    assert exported.safety_checker is not None
    assert exported.safety_checker.concept_embeds.equal(checker.concept_embeds)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


FOLDER = ["dataset=folder", "dataset.instance_prompt=a photo of a zwx toy", "dataset.class_prompt=a photo of a toy"]


@pytest.mark.parametrize("overrides, words", [
    (["hardware=g4dn"], "hardware=cpu"),
    ([*FOLDER, "dataset.instance_dir={photos}/texts"], "text.jpg"),
    (["model.source=/no/such/model", "dataset.allow_drawings=true"], "model.source=DIR"),
    (["dataset.instance_prompt=" + "toy " * 40], "shorten"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (  # told without a process in tests/config and tests/data
        (["train.max_train_stepz=3"], "max_train_stepz"),
        (["train.max_train_steps=abc"], "abc"),
        (["train.train_batch_size=0"], "train.train_batch_size must be 1 or more"),
        (["train.learning_rate=-1"], "train.learning_rate must be above 0"),
        (["precision=fp8"], "fp8"),
        (["precision.dtype=fp8"], "fp8"),
        (["precision=fp16"], "precision=fp32"),
        (["attention=xformers"], "attention=sdpa"),
        ([*FOLDER, "dataset.instance_dir={photos}"], "holds no photo"),
        ([*FOLDER, "dataset.instance_dir={photos}/none"], "does not exist"),
        (["model.source=nobody/no-such-model", "dataset.allow_drawings=true"], "model.source=DIR"),
        (["prior.num_class_images=0"], "prior.num_class_images=100"),
        (["checkpoint.resume=/no/such/checkpoint"], "checkpoint.resume=auto"),
        (["train.train_text_encoder=maybe"], "maybe"),
    )),
])
def test_wrong_input_is_an_error_without_traceback(
        overrides: list[str], words: str, photos: Path, tmp_path: Path) -> None:
    (photos / "texts").mkdir()
    (photos / "texts" / "text.jpg").write_text("not a photo")
    log = tmp_path / "out.txt"
    fast = [item for item in FAST if not item.startswith("hardware") or not overrides[0].startswith("hardware")]
    code = call("train", [f"run_root={tmp_path}/runs", *fast, *(o.format(photos=photos) for o in overrides)], log=log)
    output = log.read_text()
    assert code == 1, output
    assert words in output
    assert "Traceback" not in output
    assert "Error executing job" not in output
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*-*")), "an empty run is left behind"


@pytest.mark.slow
def test_startup_imports_neither_bitsandbytes_nor_the_compiler_of_torch() -> None:
    """They would take most of a second at every start, and only some optimizers and settings need them."""
    code = ("import sys; from dreambooth.models import loading; loading.import_libraries();"
            "print([name for name in ('bitsandbytes', 'torch._inductor.compile_fx') if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert result.stdout == "[]\n"
