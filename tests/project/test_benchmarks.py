"""The benchmarks: parsing of logs, tables, commands and written sections. Nothing is timed here."""

import importlib
import json
import os
import resource
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("speed")


@pytest.fixture
def speed_table(speed: ModuleType) -> ModuleType:
    return sys.modules["speed_table"]


def write_lines(path: Path, entries: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_step_end_times_are_read_from_metrics_and_from_progress_bars(speed: ModuleType, tmp_path: Path) -> None:
    ours = write_lines(tmp_path / "a", [
        {"time": 1000, "params": {}}, {"time": 2500, "step": 1, "metrics": {"loss": 1.0}},
        {"time": 3000, "step": 1, "metrics": {"objective": 1.0}}])
    peer = write_lines(tmp_path / "b", [{"bar": "Generating class images", "time": 1.0}, {"bar": "Steps", "time": 4.5}])
    assert (speed.step_end_times(ours), speed.step_end_times(peer)) == ([2.5], [4.5])


def test_class_images_are_counted_from_the_end_of_the_first_batch(speed: ModuleType, tmp_path: Path) -> None:
    for number, time in enumerate([10.0, 10.1, 20.0, 20.1, 30.0, 30.1]):
        path = tmp_path / f"{number}.png"
        path.touch()
        os.utime(path, (time, time))
    assert speed.class_rate(tmp_path) == pytest.approx(4 / 20)


def test_one_batch_of_class_images_has_no_rate(speed: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "0.png").touch()
    assert speed.class_rate(tmp_path) is None


def test_a_rate_excludes_warm_up_steps(speed: ModuleType) -> None:
    assert speed.step_rate([10.0, 15.0, 19.0, 22.0, 23.0, 24.0], 8) == 8.0
    assert speed.step_rate([10.0, 15.0, 19.0], 8) == 8 / 4
    assert speed.step_rate([10.0], 8) is None


def test_cpu_time_of_a_monitored_process_is_known_for_every_moment(speed: ModuleType, tmp_path: Path) -> None:
    """The process sleeps, works and sleeps: it uses CPU time only in the middle."""
    code = "import time; time.sleep(0.3); t = time.time()\nwhile time.process_time() < 0.6: pass\nprint(t, time.time())"
    usage = speed.run_monitored([sys.executable, "-c", code], tmp_path, dict(os.environ), tmp_path / "log")
    begin, end = map(float, (tmp_path / "log").read_text().split())
    assert usage.cpu_seconds_until(begin) < 0.3 < 0.5 < usage.cpu_seconds_until(end) < 0.8
    assert usage.cpu_seconds_until(0.0) == usage.cpu_samples[0][1]
    assert usage.cpu_seconds_until(end + 99) == usage.cpu_samples[-1][1]
    # Linux counts the memory that this process had when it started the other one.
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
    assert 0 < usage.peak_rss_gib <= max(0.1, own_peak) and usage.cpu_seconds > 0.5


def test_a_process_that_fails_ends_the_benchmark(speed: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)ended with exit code 1.*not so"):
        command = [sys.executable, "-c", "raise SystemExit('not so')"]
        speed.run_monitored(command, tmp_path, dict(os.environ), tmp_path / "log")


def test_the_table_has_medians_and_the_median_quotient_within_a_round(speed: ModuleType) -> None:
    """The machine is three times as fast in round 3, which must not change the quotients."""
    trials = [speed.Trial(case, "tiny", number, rate) for case, rates in
              [("peer", [2.0, 4.0, 12.0]), ("caches", [3.0, 8.0, 18.0])] for number, rate in enumerate(rates)]
    rows = list(speed.format_table(trials))
    assert "| peer | 3 | 4.00 | 2.00-12.00 | 1.00x |" in rows[2]
    assert "| caches | 3 | 8.00 | 3.00-18.00 | 1.50x |" in rows[3]


def test_class_images_are_compared_with_those_of_the_script(speed: ModuleType) -> None:
    trials = [speed.Trial(case, "tiny", 1, 9.0, class_images_per_second=rate) for case, rate in
              [("peer", None), ("peer class images", 0.5), ("class images", 2.0)]]
    assert "| class images | 1 | 2.00 | 2.00-2.00 | 4.00x |" in list(speed.format_table(trials))[4]


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

    (tmp_path / "class").mkdir()
    for model, size in speed.SIZES.items():
        for case in ["class images", *speed.OUR_CASES]:
            new_class_images = 4 if case in speed.CLASS_IMAGE_CASES else 0
            command = speed.our_command(tmp_path / model, size, speed.OUR_CASES.get(case, []), new_class_images)
            assert command[:3] == [sys.executable, "-m", "dreambooth.train"]
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                resolve(load(compose("config", command[3:])), tmp_path / "run")


def test_the_page_has_a_section_for_each_benchmark(speed: ModuleType, speed_table: ModuleType) -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in [*speed.SIZES, "loop", "class", "pointwise"]:
        assert speed_table.BEGIN.format(name) in text and speed_table.END.format(name) in text


@pytest.mark.slow
def test_each_1x1_convolution_is_measured_and_those_kept_as_convolutions_are_marked(speed: ModuleType) -> None:
    pointwise = importlib.import_module("pointwise")
    rows = list(pointwise.table_rows(1, 1))[2:]
    tiny, full = ([row for row in rows if row.startswith(f"| {name} ")] for name in ("tiny", "sd15"))
    layers = pointwise.count_layers("tiny", 64)
    assert sum(layers.values()) == 22 and len(tiny) == len(layers) + 1
    assert not any("x 4 *" in row or "x 8 *" in row for row in tiny)
    assert [row for row in full if "| 1280 to 1280 | 8 x 8 * |" in row]


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


def test_the_torchvision_replacement_crops_and_scales_as_torchvision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from PIL import Image

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for module in ("torchvision", "torchvision.transforms"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    module = importlib.import_module("run_diffusers_script")
    transform = module.Compose([module.Resize(8, module.InterpolationMode.BILINEAR), module.CenterCrop(8),
                                module.ToTensor(), module.Normalize([0.5], [0.5])])
    pixels = transform(Image.new("RGB", (32, 16), (255, 0, 0)))
    assert pixels.shape == (3, 8, 8)
    assert pixels[0].eq(1).all() and pixels[1].eq(-1).all() and pixels.dtype is torch.float32


def test_a_proof_finds_the_model_of_a_run_that_was_finished_before(tmp_path: Path) -> None:
    from dreambooth.runs import report
    from dreambooth.runs.run_folder import Result
    from tests.support.configs import demo_recipe
    from tools.proof.experiment import find_model

    run = tmp_path / "demo-tiny-full-1"
    message = report.already_finished(Result(400, 0.1, 1.0, str(run), "model"), demo_recipe())
    assert find_model(f"subject 'a toy'\n{message}\n") == run / "model"
    assert find_model("photos  5\nmodel   runs/demo/model\n") == Path("runs/demo/model")
