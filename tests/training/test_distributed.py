"""Two gloo processes under PyTorch's launcher give the weights of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.toy_model import ToyModel, ToyTokens, make_batches, train_steps


def test_two_processes_equal_one_in_fp64(tmp_path: Path) -> None:
    """Both sum 8 x 64 fp64 terms, in different order: the error is 512 eps per gradient.

    AdamW with lr 1e-2 turns it into less than 1e-9 per step, for gradients above 1e-6.
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(root / "tests/training/two_processes.py"), str(tmp_path / "weights.pt")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})
    assert result.returncode == 0, result.stderr[-3000:]
    expected = {}
    for prefix, single in (("", ToyModel()), ("tokens.", ToyTokens())):
        train_steps(single, make_batches(batch=8), 3)
        expected |= {prefix + name: weight for name, weight in single.state_dict().items()}
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert weights.keys() == expected.keys() and "tokens.text_encoder_new_tokens" in weights
    for name, weight in weights.items():
        assert torch.allclose(expected[name], weight, atol=1e-9, rtol=0), name


def test_under_torchrun_the_interpreter_is_not_torn_down_while_threads_run() -> None:
    """Otherwise about one run in ten ends with SIGABRT after its work is done. Exit handlers run in any case."""
    code = ("import atexit, dreambooth.cli as cli\n"
            "class Last:\n    def __del__(self): print('torn down')\n"
            "last = Last()\natexit.register(print, 'at exit')\ncli._exit_codes.append(6)\ncli.exit_process()")
    plain, torchrun = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
                                      env=os.environ | extra) for extra in ({}, {"TORCHELASTIC_RUN_ID": "none"}))
    assert (plain.returncode, plain.stdout.split("\n")[:2]) == (6, ["at exit", "torn down"])
    assert (torchrun.returncode, torchrun.stdout) == (6, "at exit\n")


@pytest.mark.slow
def test_two_processes_go_on_training_after_the_best_weights_were_saved(tmp_path: Path) -> None:
    """The averages have another dtype than half weights, and must not be put into them while processes train."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "dreambooth.train", f"run_root={tmp_path}", "precision=bf16", "memory.weights=half",
               "memory.rounding=stochastic", "train.max_train_steps=3", "evaluate.every=2", "sample.every=null",
               "evaluate.select=subject_similarity", "evaluate.images_per_prompt=1", "evaluate.class_images=4",
               "prior.num_class_images=4", "tracking=none"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    [best] = tmp_path.glob("*/best/state.json")
    assert json.loads(best.read_text())["step"] == 2
