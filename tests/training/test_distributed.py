"""Two gloo processes through torch's launcher compute what one process computes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.support.toy_model import Toy, batches, steps


def test_two_processes_equal_one_in_fp64(tmp_path: Path) -> None:
    """Sums of 8 x 64 fp64 terms in another order: 512 eps a gradient, which AdamW at lr 1e-2 turns into less than
    1e-9 a step for gradients over 1e-6."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(root / "tests/support/two_processes.py"), str(tmp_path / "weights.pt")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200,
                         env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})
    assert ran.returncode == 0, ran.stderr[-3000:]
    alone = Toy()
    steps(alone, batches(batch=8), 3)
    for name, theirs in torch.load(tmp_path / "weights.pt", weights_only=True).items():
        assert torch.allclose(alone.state_dict()[name], theirs, atol=1e-9, rtol=0), name


def test_under_torchrun_the_interpreter_is_not_taken_down_under_running_threads() -> None:
    """Else about one run in ten ends in SIGABRT after its work is done; what is to happen at exit happens."""
    code = ("import atexit, dreambooth.cli as door\n"
            "class Last:\n    def __del__(self): print('taken down')\n"
            "last = Last()\natexit.register(print, 'at exit')\ndoor._codes.append(6)\ndoor.leave()")
    alone, torchrun = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                                      env=os.environ | extra) for extra in ({}, {"TORCHELASTIC_RUN_ID": "none"}))
    assert (alone.returncode, alone.stdout.split("\n")[:2]) == (6, ["at exit", "taken down"])
    assert (torchrun.returncode, torchrun.stdout) == (6, "at exit\n")
