"""This project: python -m dreambooth.train, with the settings of the other trainers."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from peers.tasks import CLASS, INSTANCE, LEARNING_RATE, PRIOR_WEIGHT, RANK, Call, Job, Trainer, newest

ROOT = Path(__file__).parents[2]
MODELS = {"sd": "tiny", "sdxl": "sdxl", "z_image": "tiny_flow"}


class Ours(Trainer):
    """dreambooth without EMA, samples, evaluation and trackers."""

    def __init__(self, name: str, *overrides: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        """Args:
            name: the case in the tables.
            overrides: in addition to those of all cases.
            environment: variables that are set in addition to those of all cases.
        """
        self.name, self.overrides, self.environment = name, overrides, environment

    def call(self, job: Job) -> Call:
        own = self.words(job)
        environment = {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true",
                       "TORCHINDUCTOR_CACHE_DIR": str(job.out / "inductor")}  # empty for the first process of a trial
        return Call(["-m", "dreambooth.train", *own], len(own), ROOT, environment | self.environment)

    def words(self, job: Job) -> list[str]:
        """Return the overrides of the command."""
        task, new = job.task, job.new_class_images
        prior = [f"dataset.class_prompt={CLASS}", f"prior.num_class_images={new or task.class_images}",
                 f"prior.prior_loss_weight={PRIOR_WEIGHT}"]
        prior += [] if new else [f"dataset.class_dir={job.work / 'class'}"]
        lora = ["method=lora", f"method.rank={RANK}", "method.targets=attention", "train.train_text_encoder=false"]
        return [
            f"run_root={job.out}", "hardware=cpu", "tracking=none", f"model={MODELS[task.family]}",
            *(lora if task.lora else ["train.train_text_encoder=true"]), f"model.source={job.base}",
            f"model.resolution={task.resolution}", "model.offline=true", "dataset.allow_drawings=true",
            f"dataset.instance_dir={job.work / 'photos'}", f"dataset.instance_prompt={INSTANCE}",
            *(prior if new or task.class_images else ["prior.with_prior_preservation=false"]),
            f"train.train_batch_size={task.batch}",
            f"train.max_train_steps={job.steps}", f"train.learning_rate={LEARNING_RATE}", "sample.every=null",
            f"checkpoint.every={job.save_at or 'null'}", "evaluate.encoder=none", "train.use_ema=false",
            *self.overrides]

    def checkpoint(self, out: Path) -> Path | None:
        return newest(out, "*/checkpoints/step-*")

    def step_log(self, job: Job) -> Path:
        return next(job.out.glob("*/metrics.jsonl"), job.out / "metrics.jsonl")
