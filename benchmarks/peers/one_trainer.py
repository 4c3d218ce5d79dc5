"""Nerogar/OneTrainer, without its window: scripts/train.py with a JSON file of settings.

Its data loader, Nerogar/mgds, is not on PyPI and is read from a checkout, too. OneTrainer counts epochs, not steps:
photos are repeated so that one epoch has the steps of the task.
"""

from pathlib import Path
from typing import Any

from peers.tasks import (
    CLASS,
    INSTANCE,
    LEARNING_RATE,
    PRIOR_WEIGHT,
    RANK,
    Call,
    Job,
    Trainer,
    launched,
    newest,
    repeats,
    write_json,
)

OUTPUT_FORMATS = {(False, "sd"): "DIFFUSERS", (True, "sd"): "KOHYA_LORA", (True, "sdxl"): "KOHYA_LORA",
                  (True, "z_image"): "DIFFUSERS_LORA"}
ATTENTION = {"sd": "attn", "sdxl": "attn", "z_image": "attention"}  # part of the names of the trained layers
MODELS = {"sd": "STABLE_DIFFUSION_15", "sdxl": "STABLE_DIFFUSION_XL_10_BASE", "z_image": "Z_IMAGE"}


class OneTrainer(Trainer):
    """Training with cached latents and text."""

    name = "OneTrainer"
    packages = ("torchvision", "transformers==5.5.4", "tokenizers==0.22.2", "huggingface-hub==1.23.0",
                "diffusers==0.40.0", "gguf==0.17.1", "pooch==1.8.2", "open-clip-torch==2.32.0",
                "imagesize", "opencv-python-headless", "av==16.1.0", "scenedetect", "parse", "omegaconf",
                "dadaptation==3.2", "lion-pytorch", "prodigyopt==1.1.2", "schedulefree", "adv_optm==2.2.3",
                "prodigy-plus-schedule-free==2.0.1", "ftfy", "timm", "deepdiff", "orderly-set")

    def __init__(self, checkout: Path, mgds: Path) -> None:
        self.checkout, self.mgds = checkout, mgds

    def call(self, job: Job) -> Call:
        job.out.mkdir(parents=True, exist_ok=True)
        settings = write_json(job.out / "settings.json", self._settings(job))
        (job.out / "samples.json").write_text("[]", "utf-8")
        return launched(job, self.checkout / "scripts" / "train.py",
                        [f"--config-path={job.out / 'settings.json'}"], settings, self.checkout,
                        (self.checkout, self.mgds / "src"))

    def checkpoint(self, out: Path) -> Path | None:
        return newest(out / "workspace" / "backup", "*")

    def _settings(self, job: Job) -> dict[str, Any]:
        task = job.task
        own: dict[str, Any] = {"weight_dtype": "FLOAT_32"}
        denoiser = "transformer" if task.family == "z_image" else "unet"
        prompts = {"photos": (INSTANCE, 1.0)} | ({"class": (CLASS, PRIOR_WEIGHT)} if task.class_images else {})
        return {
            "__version": 11, "model_type": MODELS[task.family], "training_method": "LORA" if task.lora else "FINE_TUNE",
            "base_model_name": str(job.base), "output_model_destination": str(job.out / "model.safetensors"),
            "workspace_dir": str(job.out / "workspace"), "cache_dir": str(job.out / "cache"),
            "resolution": str(task.resolution), "batch_size": task.images, "epochs": 2 if job.resume else 1,
            "latent_caching": True,
            "learning_rate": LEARNING_RATE, "learning_rate_warmup_steps": 0.0, "train_device": "cpu",
            "temp_device": "cpu", "train_dtype": "FLOAT_32", "output_dtype": "FLOAT_32", "tensorboard": False,
            "output_model_format": OUTPUT_FORMATS[task.lora, task.family],
            "dataloader_threads": 1, "aspect_ratio_bucketing": False, "clip_grad_norm": 1.0, "lora_rank": RANK,
            "lora_alpha": float(RANK), "layer_filter": ATTENTION[task.family] if task.lora else "",
            "sample_after_unit": "NEVER", "offline_mode": True,
            "sample_definition_file_name": str(job.out / "samples.json"),
            "backup_after": job.save_at or 0, "backup_after_unit": "STEP" if job.save_at else "NEVER",
            "backup_before_save": False, "continue_last_backup": job.resume,
            "optimizer": {"optimizer": "ADAMW"}, denoiser: own | {"train": True},
            "text_encoder": own | {"train": not task.lora}, "text_encoder_2": own | {"train": False}, "vae": own,
            "concepts": [{
                "name": kind, "path": str(job.work / kind), "loss_weight": weight,
                "balancing": float(repeats(job, len(list((job.work / kind).iterdir())))),
                "balancing_strategy": "REPEATS", "image": {"enable_crop_jitter": False},
                "text": {"prompt_source": "concept", "prompt_path": str(_write_prompt(job, kind, prompt))}}
                for kind, (prompt, weight) in prompts.items()]}


def _write_prompt(job: Job, kind: str, prompt: str) -> Path:
    path = job.out / f"{kind}.txt"
    path.write_text(prompt, "utf-8")
    return path
