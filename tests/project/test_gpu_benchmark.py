"""benchmarks/gpu.py: the choice of configurations, the page, and the command itself on the CPU with tiny models."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/support/golden/gpu_page.md"
T4 = {"device": "cuda", "name": "Tesla T4", "capability": 7.5, "memory_gib": 14.56, "host_gib": 15.4, "driver": "550.1",
      "cuda": "13.0", "cudnn": 91200, "python": "3.12.3", "cores": 4, "missing": [],
      "versions": {"torch": "2.13.0", "diffusers": "0.42.1", "xformers": None}}
PHASES = {"load": 1.9, "prompts": 2.5, "forward": 3.0, "backward": 4.0, "step": 4.25}
FITS = {"fits": True, "card_gib": 5.0, "usable_vram_gib": 14.6, "shortfall": "", "step_seconds": 0.5,
        "by_phase": {phase: {"reserved_gib": size} for phase, size in PHASES.items()}}
LARGE = FITS | {"fits": False, "card_gib": 24.7, "shortfall": "this run needs 24.7 GiB"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def results(gpu: ModuleType) -> dict[str, Any]:
    """What a session stores after one run of each outcome."""
    measured = {"status": "measured", "plan": FITS, "finished_steps": 20, "step_seconds": 0.4, "host_gib": 3.21,
                "outside_gib": 0.7, "class_images_per_second": 1.5,
                "peaks": {"vram/step/reserved_gib": 4.0, "vram/step/allocated_gib": 3.5, "vram/load/reserved_gib": 2.5}}
    failed = measured | {"status": "failed: stopped at its limit of 75 s", "step_seconds": None, "finished_steps": 1,
                         "peaks": {}, "class_images_per_second": None, "outside_gib": None, "host_gib": None}
    refused = {"error": "method.base_weights=nf4 needs a package: pip install 'dreambooth[cuda]'", "expected": True}
    cases = [{"title": title, **row} for title, row in (
        ("SD 1.5, LoRA", measured), ("SDXL, LoRA", failed),
        ("Z-Image, LoRA", {"plan": LARGE, "status": gpu.reason_not_to_run(LARGE)}),
        ("Z-Image, nf4", {"plan": refused, "status": gpu.reason_not_to_run(refused)}))]
    rows = {"the same run again": {"equal": True, "largest": 0.0, "relative": 0.0},
            "optimizer on the host": {"equal": False, "largest": 1e-6, "relative": 0.00123},
            "stopped": {"error": "RuntimeError: a | b"}}
    return {"date": "2026-12-01", "seconds": 431, "card": T4, "cases": cases,
            "checks": [{"title": "tiny base model", "steps": 4, "rows": rows, "status": "measured"}]}


def test_the_page_has_a_row_for_each_outcome(gpu: ModuleType) -> None:
    """After an intended change of the page: write the new text to GOLDEN, and read its difference."""
    assert gpu.page.render(results(gpu)) == GOLDEN.read_text("utf-8")


@pytest.mark.parametrize(("plan", "reason"), [
    (FITS, None), (LARGE, "does not fit (predicted): 24.7 of 14.6 GiB"),
    (LARGE | {"card_gib": 9.0, "shortfall": "this run needs 40.0 GiB of host memory"},
     "does not fit (predicted): this run needs 40.0 GiB of host memory"),
    ({"error": "type attention=sdpa", "expected": True}, "refused: type attention=sdpa"),
    ({"error": "KeyError: 'x'", "expected": False}, "no plan: KeyError: 'x'")])
def test_a_configuration_runs_if_the_planner_says_that_it_fits(gpu: ModuleType, plan: dict[str, Any],
                                                               reason: str | None) -> None:
    assert gpu.reason_not_to_run(plan) == reason


def test_the_precision_follows_the_card_and_tiny_models_replace_large_ones_on_a_cpu(gpu: ModuleType) -> None:
    [case] = [case for case in gpu.CASES if case.name == "z_image_lora"]
    on_t4, on_a100, on_cpu = (gpu.overrides(case, card, Path("/data")) for card in (
        T4, T4 | {"capability": 8.0}, {"device": "cpu"}))
    assert "precision=fp16" in on_t4 and "precision=bf16" in on_a100 and "precision=fp32" in on_cpu
    assert {"model=z_image", "model.source=/data/base/z_image", "hardware=local"} < set(on_t4)
    assert {"model=tiny_flow", "model.source=/data/base/tiny_flow", "hardware=cpu"} < set(on_cpu)


def test_there_are_at_least_twelve_configurations_with_names_of_their_own(gpu: ModuleType) -> None:
    names = [case.name for case in gpu.CASES]
    assert len(set(names)) == len(names) and sum(isinstance(case, gpu.Case) for case in gpu.CASES) >= 12


def test_a_process_that_crashes_or_hangs_is_one_row(gpu: ModuleType, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    session = gpu.Session(tmp_path, tmp_path, 99.0, "cpu")
    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys, time; print('before'); sys.stdout.flush(); os.abort()")
    monkeypatch.setattr(gpu, "WORKER", worker)
    crashed = session.work_on("a", {"do": "run"}, 60)
    assert crashed["error"] == "the process ended with signal 6" and crashed["log"] == ["before"]
    worker.write_text("import time; time.sleep(60)")
    assert session.work_on("b", {"do": "run"}, 0.1)["error"] == "stopped at its limit of 1 s"


def test_the_rest_is_not_run_when_the_time_is_over(gpu: ModuleType, tmp_path: Path) -> None:
    session = gpu.Session(tmp_path, tmp_path, gpu.SHORTEST - 1, "cpu")
    case = next(case for case in gpu.CASES if isinstance(case, gpu.Case))
    assert gpu.measure(session, case, T4, FITS, 2)["status"] == "not run: the time was over"


def test_the_page_of_a_gpu_is_not_overwritten_by_a_cpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--out DIR" in capsys.readouterr().err


def test_random_weights_are_the_same_in_every_process_and_keep_the_variance(gpu: ModuleType) -> None:
    import torch

    bases = importlib.import_module("gpu_runs.bases")
    with torch.device("meta"):
        layers = [torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.LayerNorm(64)).half() for _ in range(2)]
    layers[0][0].weight = layers[0][0].weight  # one parameter
    for layer in layers:
        bases.fill(layer)
    weight = layers[0][0].weight
    assert weight.equal(layers[1][0].weight) and weight.dtype is torch.float16
    assert weight.float().std().item() == pytest.approx(1 / 16, rel=0.05)
    assert layers[0][1].weight.eq(1).all() and layers[0][0].bias.eq(0).all()


@pytest.mark.slow
def test_the_command_runs_on_a_cpu(tmp_path: Path) -> None:
    """A run that is timed, a check of exactness, and a configuration that needs a GPU."""
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--out", str(tmp_path / "out"), "--work",
               str(tmp_path / "work"), "--steps", "2", "--limit", "1000", "--cases", "sd15_lora", "swap_exact",
               "z_image_nf4"]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "out/gpu.json").read_text("utf-8"))
    timed, refused = found["cases"]
    assert (timed["status"], timed["finished_steps"]) == ("measured", 2), timed
    assert timed["step_seconds"] > 0 and timed["class_images_per_second"] > 0
    assert refused["status"].startswith("refused: method.base_weights=nf4 needs a CUDA GPU")
    [check] = found["checks"]
    assert [row["equal"] for row in check["rows"].values()] == [True, True], check
    assert "| tiny flow base model, LoRA | 2 | two swapped blocks | yes |" in (tmp_path / "out/gpu.md").read_text()
