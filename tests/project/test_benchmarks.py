"""The benchmarks: parsing of logs, tables, commands and written sections. Nothing is timed here."""

import argparse
import importlib
import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("speed")


@pytest.fixture
def speed_table(speed: ModuleType) -> ModuleType:
    return sys.modules["speed_table"]


@pytest.fixture
def timings(speed: ModuleType) -> ModuleType:
    return sys.modules["timings"]


@pytest.fixture
def monitor(speed: ModuleType) -> ModuleType:
    return sys.modules["process_monitor"]


def write_lines(path: Path, entries: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_step_end_times_are_read_from_metrics_and_from_progress_bars(timings: ModuleType, tmp_path: Path) -> None:
    ours = write_lines(tmp_path / "a", [
        {"time": 1000, "params": {}}, {"time": 2500, "step": 1, "metrics": {"loss": 1.0}},
        {"time": 3000, "step": 1, "metrics": {"objective": 1.0}}])
    peer = write_lines(tmp_path / "b", [{"bar": "Generating class images", "time": 1.0}, {"bar": "Steps", "time": 4.5}])
    assert (timings.step_end_times(ours), timings.step_end_times(peer)) == ([2.5], [4.5])


def test_class_images_are_counted_from_the_end_of_the_first_batch(timings: ModuleType, tmp_path: Path) -> None:
    for number, moment in enumerate([10.0, 10.1, 20.0, 20.1, 30.0, 30.1]):
        path = tmp_path / f"{number}.png"
        path.touch()
        os.utime(path, (moment, moment))
    assert timings.class_rate(tmp_path) == pytest.approx(4 / 20)


def test_one_batch_of_class_images_has_no_rate(timings: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "0.png").touch()
    assert timings.class_rate(tmp_path) is None


def test_a_rate_excludes_warm_up_steps(timings: ModuleType) -> None:
    assert timings.step_rate([10.0, 15.0, 19.0, 22.0, 23.0, 24.0], 8) == 8.0
    assert timings.step_rate([10.0, 15.0, 19.0], 8) == 8 / 4
    assert timings.step_rate([10.0], 8) is None


def test_cpu_time_of_a_monitored_process_is_known_for_every_moment(monitor: ModuleType, tmp_path: Path) -> None:
    """The process sleeps, works and sleeps: it uses CPU time only in the middle."""
    code = "import time; time.sleep(0.3); t = time.time()\nwhile time.process_time() < 0.6: pass\nprint(t, time.time())"
    usage = monitor.run_monitored([sys.executable, "-c", code], tmp_path, dict(os.environ), tmp_path / "log")
    begin, end = map(float, (tmp_path / "log").read_text().split())
    assert usage.cpu_seconds_until(begin) < 0.3 < 0.5 < usage.cpu_seconds_until(end) < 0.8
    assert usage.cpu_seconds_until(0.0) == usage.cpu_samples[0][1]
    assert usage.cpu_seconds_until(end + 99) == usage.cpu_samples[-1][1]
    # Linux counts the memory that this process had when it started the other one.
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
    assert 0 < usage.peak_rss_gib <= max(0.1, own_peak) and usage.cpu_seconds > 0.5


def test_a_process_that_fails_ends_the_benchmark(monitor: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)ended with exit code 1.*not so"):
        command = [sys.executable, "-c", "raise SystemExit('not so')"]
        monitor.run_monitored(command, tmp_path, dict(os.environ), tmp_path / "log")


def test_a_process_that_takes_too_long_is_ended_with_its_children(monitor: ModuleType, tmp_path: Path) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with pytest.raises(SystemExit, match=r"did not end within 0\.0 minutes"):
        monitor.run_monitored([sys.executable, "-c", f"{child}; print(p.pid, flush=True); time.sleep(60)"], tmp_path,
                              dict(os.environ), tmp_path / "log", 1.0)
    stat = Path(f"/proc/{(tmp_path / 'log').read_text().strip()}/stat")
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.05)


def test_the_table_has_medians_and_the_median_quotient_within_a_round(speed_table: ModuleType) -> None:
    """The machine is three times as fast in round 3, which must not change the quotients."""
    trials = [speed_table.Trial(case, "tiny", number, rate) for case, rates in
              [("diffusers", [2.0, 4.0, 12.0]), ("caches", [3.0, 8.0, 18.0])] for number, rate in enumerate(rates)]
    rows = list(speed_table.format_table(trials))
    assert "| diffusers | 3 | 4.00 | 2.00-12.00 | 1.00x |" in rows[2]
    assert "| caches | 3 | 8.00 | 3.00-18.00 | 1.50x (1.50-2.00) |" in rows[3]


def test_each_case_is_compared_with_the_fastest_peer_that_trains(speed_table: ModuleType) -> None:
    """By wall time and by CPU time it can be another peer."""
    rates = {"diffusers": (2.0, 2.0), "kohya": (4.0, 1.0), "caches": (6.0, 3.0)}
    trials = [speed_table.Trial(case, "tiny", number, wall * number, cpu, peer=case != "caches")
              for number in (1, 2) for case, (wall, cpu) in rates.items()]
    rows = list(speed_table.format_table([*trials, speed_table.Trial("OneTrainer", "tiny", 1, error="no", peer=True)]))
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in rows[2:6]}
    assert cells["caches"][4:6] == ["3.00x (3.00-3.00)", "1.50x (1.50-1.50)"] and cells["caches"][8].startswith("1.50x")
    assert (cells["kohya"][5], cells["kohya"][8]) == ("1.00x", "0.50x (0.50-0.50)")
    assert (cells["diffusers"][5], cells["diffusers"][8]) == ("0.50x (0.50-0.50)", "1.00x")
    assert rows[7] == "Best peer by wall time: kohya; by CPU time: diffusers."


def test_what_a_peer_cannot_do_beside_training_is_said_below_the_table(speed_table: ModuleType) -> None:
    trial = speed_table.Trial("kohya", "tiny", 1, 2.0, 1.0, note="does not resume: KeyError: 'x'", peer=True)
    assert list(speed_table.format_table([trial]))[-1] == "kohya: does not resume: KeyError: 'x'"


def test_class_images_are_compared_with_those_of_the_script(speed_table: ModuleType) -> None:
    trials = [speed_table.Trial(case, "tiny", 1, 9.0, class_images_per_second=rate) for case, rate in
              [("diffusers", None), ("diffusers class images", 0.5), ("class images", 2.0)]]
    assert "| class images | 1 | 2.00 | 2.00-2.00 | 4.00x |" in list(speed_table.format_table(trials))[4]


def test_only_the_named_section_of_a_page_is_replaced(speed: ModuleType, speed_table: ModuleType) -> None:
    begin, end = speed_table.BEGIN.format("tiny"), speed_table.END.format("tiny")
    text = f"above\n{begin}old\n{end}below\n"
    assert speed_table.replace_section(text, "tiny", ["new"]) == f"above\n{begin}new\n{end}below\n"
    with pytest.raises(SystemExit, match="no section"):
        speed_table.replace_section("nothing\n", "tiny", [])


@pytest.mark.slow
def test_the_command_of_each_of_our_cases_composes(speed: ModuleType, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from dreambooth.config.compose import conf_dir, load
    from dreambooth.config.recipe import resolve

    ours = importlib.import_module("peers.ours")
    (tmp_path / "class").mkdir()
    for task in speed.TASKS.values():
        for name, overrides in speed.OUR_CASES.items():
            new = 4 if name in speed.CLASS_IMAGE_CASES else 0
            words = ours.Ours(name, *overrides).words(job_of(task, tmp_path, new_class_images=new))
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                resolve(load(compose("config", words)), tmp_path / "run")


def job_of(task: Any, folder: Path, **values: Any) -> Any:
    return importlib.import_module("peers.tasks").Job(task, folder, folder / "out", folder / "log", 4, **values)


def test_each_peer_gets_the_settings_of_the_task(speed: ModuleType, tmp_path: Path) -> None:
    """The number of photos in a batch, of steps, and where a resumed run continues."""
    for name in ("photos", "class"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        (tmp_path / "kohya_tokenizers" / name).mkdir(parents=True)
    (tmp_path / "out/model/at-step00000002-state").mkdir(parents=True)
    options = argparse.Namespace(diffusers=tmp_path, kohya=tmp_path, onetrainer=tmp_path, mgds=tmp_path,
                                 simpletuner=tmp_path, simpletuner_python=None)
    trainers = speed.find_trainers(options)
    tiny = speed.TASKS["tiny"]
    new, resumed = (job_of(tiny, tmp_path, save_at=2, resume=resume) for resume in (False, True))
    calls = {name: [trainers[name].call(job) for job in (new, resumed)] for name in (
        "diffusers", "kohya", "OneTrainer", "SimpleTuner", "caches")}
    assert {"--train_batch_size=4", "--max_train_steps=4", "--checkpointing_steps=2"} < set(
        calls["diffusers"][0].command)
    assert set(calls["diffusers"][1].command) - set(calls["diffusers"][0].command) == {
        "--resume_from_checkpoint=latest"}
    assert {"--train_batch_size=8", "--max_train_steps=4", "--save_every_n_steps=2"} < set(calls["kohya"][0].command)
    assert f"--resume={tmp_path}/out/model/at-step00000002-state" in calls["kohya"][1].command
    one = json.loads((tmp_path / "out/settings.json").read_text())
    assert (one["batch_size"], one["epochs"], one["continue_last_backup"]) == (8, 2, True)
    assert [concept["balancing"] for concept in one["concepts"]] == [8.0, 8.0], "two steps per epoch with four photos"
    simple = json.loads((tmp_path / "out/config.json").read_text())
    assert (simple["train_batch_size"], simple["max_train_steps"], simple["resume_from_checkpoint"]) == (8, 4, "latest")
    assert all(call.settings > 10 for pair in calls.values() for call in pair)


def test_a_trainer_without_a_command_for_a_task_says_so(speed: ModuleType, tmp_path: Path) -> None:
    kohya = importlib.import_module("peers.kohya").Kohya(tmp_path)
    trial = speed.Trial("kohya", "flow_lora", 1, threads=1)
    trial = speed.run_trial(kohya, None, speed.TASKS["flow_lora"], trial, tmp_path, 60.0, True)
    assert trial.error == "has no script for Z-Image"
    assert list(speed.format_table([trial]))[2].startswith("| kohya | 0 | has no script for Z-Image |")


def test_a_repeated_command_makes_what_is_missing(speed: ModuleType, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished trials are kept. A case that failed is tried once per command, and the other cases go on."""
    calls: list[tuple[str, int]] = []
    broken = {"kohya"}

    def run(trainer: Any, environment: Any, task: Any, trial: Any, *_: Any) -> Any:
        calls.append((trial.case, trial.round))
        if trial.case == "same work" and trial.round == 2 and "stop" in broken:
            raise KeyboardInterrupt
        return replace(trial, error="no" if trial.case in broken else "", images_per_second=2.0)

    monkeypatch.setattr(speed, "run_trial", run)
    monkeypatch.setattr(speed, "prepare", lambda *_: (tmp_path / "tiny").mkdir(exist_ok=True))
    monkeypatch.setattr(speed, "make_environment", lambda *_: tmp_path)
    monkeypatch.setattr(speed, "describe_machine", lambda _: "this machine")
    command = ["speed.py", "--kohya", str(tmp_path), "--tasks", "tiny", "--rounds", "2", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    broken.add("stop")
    with pytest.raises(KeyboardInterrupt):
        speed.main()
    assert calls == [("kohya", 1), ("same work", 1), ("caches", 1), ("same work", 2)]
    calls.clear()
    broken.clear()
    speed.main()
    assert calls == [("kohya", 1), ("kohya", 2), ("same work", 2), ("caches", 2)]
    calls.clear()
    speed.main()
    assert calls == []
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "3", "--plan"])
    speed.main()
    assert calls == []


def test_the_expected_duration_comes_from_earlier_rounds(speed: ModuleType, tmp_path: Path) -> None:
    plan = importlib.import_module("peers.plan")
    task = replace(speed.TASKS["tiny"], rounds=2, steps=4)
    path = tmp_path / "trials.jsonl"
    first = plan.Plan("tiny", task, ("caches",), 1, path)
    assert first.seconds() == pytest.approx(2 * task.seconds * (1 + plan.RESUME_PART))
    measured = speed.Trial("caches", "tiny", 1, 2.0, steps=4, threads=1, seconds=100.0)
    for trial in (measured, replace(measured, steps=9, seconds=5.0), replace(measured, threads=2, seconds=5.0)):
        speed.append_trial(path, trial)
    again = plan.Plan("tiny", task, ("caches",), 1, path)
    assert again.pending == [("caches", 2)] and again.seconds() == pytest.approx(100.0)


def test_a_task_without_class_images_trains_photos_only(speed: ModuleType, tmp_path: Path) -> None:
    peers = {name: importlib.import_module(f"peers.{name}") for name in ("hf_scripts", "one_trainer", "ours")}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").touch()
    job = job_of(speed.TASKS["flow_lora"], tmp_path)
    words = peers["hf_scripts"].DiffusersScripts(tmp_path).call(job).command
    assert "--with_prior_preservation" not in words and "--train_batch_size=4" in words
    assert json.loads((tmp_path / "diffusers_photos/metadata.jsonl").read_text())["file_name"] == "0.png"
    peers["one_trainer"].OneTrainer(tmp_path, tmp_path).call(job)
    one = json.loads((tmp_path / "out/settings.json").read_text())
    assert (one["batch_size"], [concept["name"] for concept in one["concepts"]]) == (4, ["photos"])
    assert one["layer_filter"] == "attention"
    assert "prior.with_prior_preservation=false" in peers["ours"].Ours("caches").words(job)


def test_a_peer_that_needs_a_newer_python_gets_no_environment(speed: ModuleType, tmp_path: Path) -> None:
    kohya = importlib.import_module("peers.kohya").Kohya(tmp_path)
    kohya.python = (99, 1)
    with pytest.raises(speed.NotSupported, match=r"needs Python 99\.1 or newer, and .* is 3\."):
        speed.make_environment(kohya, tmp_path)


@pytest.mark.parametrize(("output", "reason"), [
    ("x\nValueError: no GPU | here\nwarning: later", "ValueError: no GPU / here"),
    ("Traceback\n  x()\nmodule.SomeError: why\n", "module.SomeError: why"), ("only words", "only words"),
    ("\x1b[0mTypeError\x1b[0m: \x1b[0mwhy\x1b[0m\n\x1b[0m\n", "TypeError: why")])
def test_the_reason_of_a_failure_is_the_line_of_the_error(speed: ModuleType, output: str, reason: str) -> None:
    assert importlib.import_module("peers.trials").reason_of(output) == reason


def test_the_pages_have_a_section_for_each_benchmark(speed: ModuleType, speed_table: ModuleType) -> None:
    for page, names in {"benchmarks.md": speed.TASKS, "growth.md": ("photos", "steps", "sweeps", "overhead"),
                        "performance.md": ("loop", "start", "tuning", "forms", "compiling", "class", "pointwise"),
                        }.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name in names:
            assert speed_table.BEGIN.format(name) in text and speed_table.END.format(name) in text


def test_class_images_are_scored_against_those_of_the_script(speed: ModuleType) -> None:
    import numpy as np
    from PIL import Image

    quality = importlib.import_module("class_quality")
    rng = np.random.default_rng(0)
    photos, script, ours = ([Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
                            for _ in range(3))
    rows = quality.table_rows(photos, script, script, {"ours": [script[0]] * 4})
    assert rows[0].split(" | ")[2:] == ["diversity", "class_similarity", "class_drift |"]
    assert rows[4].startswith("| the script's | 4 | ") and rows[4].endswith(" | 0.000 |")
    assert rows[5].startswith("| ours | 4 | 0.000 | ")
    assert not quality.table_rows(photos, script, script, {"ours": ours})[5].startswith("| ours | 4 | 0.000 | ")


def test_the_bars_of_steps_are_recognised_in_every_trainer(speed: ModuleType) -> None:
    name = importlib.import_module("peers.launcher").bar_name
    assert {name(words) for words in ("step", "steps", "Steps: ", "Epoch 1/2 Steps", "Epoch 1/2, Steps")} == {"Steps"}
    assert name("Generating class images") == "Generating class images"
    assert {name(words) for words in ("epoch", "validation steps", "Loading weights", "")} == {None}


def test_a_proof_finds_the_model_of_a_run_that_was_finished_before(tmp_path: Path) -> None:
    from dreambooth.runs import report
    from dreambooth.runs.run_folder import Result
    from tests.support.configs import demo_recipe
    from tools.proof.experiment import find_model

    run = tmp_path / "demo-tiny-full-1"
    message = report.already_finished(Result(400, 0.1, 1.0, str(run), "model"), demo_recipe())
    assert find_model(f"subject 'a toy'\n{message}\n") == run / "model"
    assert find_model("photos  5\nmodel   runs/demo/model\n") == Path("runs/demo/model")


def test_a_compiled_step_is_compared_with_the_eager_step_of_the_same_round(speed: ModuleType) -> None:
    compiling = importlib.import_module("compiling")

    def trial(case: str, first: float, rate: float) -> Any:
        return speed.Trial(case, "tiny", 1, 2 * rate, rate, first_step_s=first, first_step_cpu=2 * first)

    rows = compiling.rows("tiny", {"eager": [trial("eager", 4.0, 10.0), trial("eager", 6.0, 20.0)],
                                   "cold": [trial("cold", 90.0, 20.0), trial("cold", 110.0, 30.0)]}, 8)
    assert rows == ["| tiny | eager | 2 | 5.0 | 10.0 | 267 | 533 | 1 | |",
                    "| tiny | cold | 2 | 100.0 | 200.0 | 160 | 320 | 1.75x | 1.50-2.00 |"]
