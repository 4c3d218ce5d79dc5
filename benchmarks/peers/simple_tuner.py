"""bghira/SimpleTuner: simpletuner/train.py with config.json and a file of its data."""

import shutil
import sys
from pathlib import Path
from typing import Any

from peers.tasks import (
    CLASS,
    INSTANCE,
    LEARNING_RATE,
    RANK,
    Call,
    Job,
    Trainer,
    launched,
    newest,
    write_json,
)

FAMILIES = {"sd": "sd1x", "sdxl": "sdxl", "z_image": "z_image"}


class SimpleTuner(Trainer):
    """Training with cached latents and text. Class images are regularisation data."""

    name = "SimpleTuner"
    python = (3, 12)

    def __init__(self, checkout: Path, interpreter: Path | None = None) -> None:
        python = interpreter or Path(sys.executable)
        self.checkout, self.interpreter = checkout, Path(shutil.which(python) or python).absolute()
        self.packages = ("torchvision", f"{checkout}[cpu]", "transformers==5.15.1")  # it imports names that 5.24 lacks

    def call(self, job: Job) -> Call:
        job.out.mkdir(parents=True, exist_ok=True)
        data = job.out / "data.json"
        settings = write_json(data, self._data(job)) + write_json(job.out / "config.json", self._settings(job, data))
        return launched(job, self.checkout / "simpletuner" / "train.py", [], settings, self.checkout, (self.checkout,),
                        CONFIG_BACKEND="json", CONFIG_PATH=str(job.out / "config"), ACCELERATE_USE_CPU="true",
                        DISABLE_UPDATES="true")

    def checkpoint(self, out: Path) -> Path | None:
        return newest(out / "model", "checkpoint-*")

    def _settings(self, job: Job, data: Path) -> dict[str, Any]:
        task = job.task
        settings: dict[str, Any] = {
            "model_family": FAMILIES[task.family], "model_type": "lora" if task.lora else "full",
            "pretrained_model_name_or_path": str(job.base), "output_dir": str(job.out / "model"),
            "data_backend_config": str(data), "resolution": task.resolution, "resolution_type": "pixel",
            "train_batch_size": task.images, "max_train_steps": job.steps, "num_train_epochs": 0,
            "learning_rate": LEARNING_RATE, "lr_scheduler": "constant", "lr_warmup_steps": 0,
            "optimizer": "optimi-adamw", "mixed_precision": "no",
            "base_model_precision": "no_change", "seed": 0, "max_grad_norm": 1.0, "report_to": "none",
            "checkpoint_step_interval": job.save_at or 1_000_000, "validation_disable": True,
            "gradient_checkpointing": False, "use_ema": False, "ignore_final_epochs": True}
        if task.lora:
            settings |= {"lora_type": "standard", "lora_rank": RANK, "lora_alpha": RANK}
        else:
            settings["train_text_encoder"] = True
        if job.resume:
            settings["resume_from_checkpoint"] = "latest"
        return settings

    def _data(self, job: Job) -> list[dict[str, Any]]:
        common = {"type": "local", "resolution": job.task.resolution, "resolution_type": "pixel", "crop": True,
                  "crop_style": "center", "crop_aspect": "square", "minimum_image_size": 0, "repeats": 1000,
                  "caption_strategy": "instanceprompt"}
        photos = [common | {
            "id": kind, "instance_data_dir": str(job.work / kind), "instance_prompt": prompt,
            "cache_dir_vae": str(job.out / "cache" / kind), "is_regularisation_data": kind == "class"}
            for kind, prompt in (("photos", INSTANCE), ("class", CLASS)) if kind == "photos" or job.task.class_images]
        return [*photos, {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True,
                          "cache_dir": str(job.out / "cache" / "text")}]
