"""memory.fully_shard: the numbers and the checkpoints of a run of one process, with weights split over two or four."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreambooth.runtime.engine import Engine
from dreambooth.training import checkpoint
from tests.training.processes.sharded_worker import build, train

ROOT = Path(__file__).parents[3]
FILES = ("trained.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.mark.slow
def test_two_and_four_processes_with_shards_equal_one_process_in_fp64(tmp_path: Path) -> None:
    """Two processes train two steps and four go on from their checkpoint; the files are those of one process.

    Both sum 10 x 64 fp64 terms per gradient, in different order: the error is 640 eps. AdamW with lr 1e-2 turns it
    into less than 1e-9 per step, for gradients above 1e-6. The EMA is rounded to fp32 in each of the four steps.
    """
    state, model = build(Engine(), shard=False)
    train(state, Engine(), 2)
    expected = checkpoint.save(tmp_path / "one", state, model, Engine().scaler, 2)
    run(2, tmp_path / "two", "-", 2)
    compare(expected, tmp_path / "two/step-000002")
    train(state, Engine(), 4)
    expected = checkpoint.save(tmp_path / "one", state, model, Engine().scaler, 2)
    run(4, tmp_path / "four", str(tmp_path / "two/step-000002"), 4)
    compare(expected, tmp_path / "four/step-000004")
    resumed, other = build(Engine(), shard=False)  # and one process reads what four have written
    checkpoint.restore(tmp_path / "four/step-000004", resumed, other, Engine().scaler)
    assert resumed.step == 4


def run(processes: int, folder: Path, start: str, last: int) -> None:
    command = [sys.executable, "-m", "dreambooth.container.torchrun", "--standalone", f"--nproc-per-node={processes}",
               str(ROOT / "tests/training/processes/sharded_worker.py"), str(folder), start, str(last)]
    result = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=600,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr[-3000:]


def compare(expected: Path, found: Path) -> None:
    """Compare all tensors and numbers of two checkpoints."""
    for name in FILES:
        tensors, others = load_file(expected / name), load_file(found / name)
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            rounding = 4 * 2**-24 if tensor.dtype == torch.float32 else 0
            assert torch.allclose(tensor, others[key], atol=4e-9, rtol=rounding), (name, key)
