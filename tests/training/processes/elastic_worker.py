"""Started by test_elastic.py under PyTorch's launcher: trains six fp64 steps of seven photos in the folder argv[1].

Three processes stop after three steps and wait until one of them is killed. Fewer processes finish the run.
"""

import sys
import time
from pathlib import Path

import torch

from dreambooth.cli import exit_process, run_job
from dreambooth.config.enums import Dtype
from dreambooth.models.noise_schedule import DiffusionSchedule
from dreambooth.runtime.engine import create_engine
from dreambooth.runtime.lost_process import reporting_lost_process
from dreambooth.training import checkpoint
from dreambooth.training.checkpoint_transfer import resume_point
from dreambooth.training.step import Objective, train_step
from tests.support.toy_model import ToyModel, make_batches, make_state

STEPS, PHOTOS = 6, 7
SCHEDULE = DiffusionSchedule(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64), "epsilon")


def train(run_dir: Path) -> None:
    """Train until the last step, from the newest checkpoint, and write the weights."""
    engine, accelerator = create_engine("cpu", Dtype.fp32)
    model = ToyModel()
    state = make_state(model)
    batches = make_batches(batch=2, world_size=engine.world_size, rank=engine.rank, global_batch_size=PHOTOS)
    state.samples_per_step = batches.shares.samples_per_step
    if start := resume_point(run_dir, "auto", engine):
        checkpoint.restore_newest(start, state, model, engine, "auto")
    print(f"{engine.world_size} processes, after step {state.step}", flush=True)
    state.model = accelerator.prepare_model(model)
    while state.step < STEPS:
        info = train_step(state, batches(state.step), Objective(SCHEDULE, 0.5), engine, 1.0)
        info.check()
        assert info.images == 2 * PHOTOS
        if engine.is_main_process:
            checkpoint.save(run_dir / "checkpoints", state, model, engine.scaler, 2)
        while engine.world_size == 3 and state.step == STEPS // 2:
            time.sleep(0.1)
            engine.barrier()
    if engine.is_main_process:
        torch.save(model.state_dict(), run_dir / "weights.pt")  # a test's own file
    engine.barrier()


def job() -> None:
    with reporting_lost_process("auto"):
        train(Path(sys.argv[1]))


if __name__ == "__main__":
    run_job(job, sweep=False)
    exit_process()
