"""The training scripts of huggingface/diffusers: examples/dreambooth, in the installed version of diffusers."""

import json
import shutil
from pathlib import Path

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
)

SCRIPTS = {("sd", False): "train_dreambooth.py", ("sd", True): "train_dreambooth_lora.py",
           ("sdxl", True): "train_dreambooth_lora_sdxl.py", ("z_image", True): "train_dreambooth_lora_z_image.py"}
PROMPT_LENGTH = 32  # tokens; the text encoder of the tiny flow base model reads no more


class DiffusersScripts(Trainer):
    """The script of a task. It encodes photos in every step, except for Z-Image with --cache_latents."""

    name = "diffusers"
    packages = ("torchvision", "ftfy", "datasets", "dill", "multiprocess", "xxhash")

    def __init__(self, checkout: Path) -> None:
        self.folder = checkout / "examples" / "dreambooth"

    def call(self, job: Job) -> Call:
        task, new = job.task, job.new_class_images
        classes = job.out / "class" if new else job.work / "class"
        options = [
            f"--pretrained_model_name_or_path={job.base}", *self._photos(job),
            f"--instance_prompt={INSTANCE}", f"--output_dir={job.out / 'model'}",
            f"--resolution={task.resolution}", "--center_crop",
            f"--train_batch_size={task.batch}", f"--max_train_steps={job.steps}", f"--learning_rate={LEARNING_RATE}",
            "--lr_scheduler=constant", "--lr_warmup_steps=0", "--seed=0",
            f"--checkpointing_steps={job.save_at or 1_000_000}"]
        if new or task.class_images:
            options += [
                f"--class_prompt={CLASS}", "--with_prior_preservation", f"--prior_loss_weight={PRIOR_WEIGHT}",
                f"--class_data_dir={classes}", f"--num_class_images={new or task.class_images}",
                f"--sample_batch_size={task.batch}"]
        options += [f"--rank={RANK}"] if task.lora else ["--train_text_encoder"]
        if task.family == "z_image":
            options += [f"--max_sequence_length={PROMPT_LENGTH}", "--cache_latents", "--skip_final_inference"]
        if job.resume:
            options.append("--resume_from_checkpoint=latest")
        return launched(job, self.folder / SCRIPTS[task.family, task.lora], options)

    def _photos(self, job: Job) -> list[str]:
        """Return the options for the photos.

        With one prompt for all photos and more than one photo per batch, the list of prompts of the script for Z-Image
        grows in every step. With captions it does not.
        """
        if job.task.family != "z_image":
            return [f"--instance_data_dir={job.work / 'photos'}"]
        captioned = job.work / "diffusers_photos"
        shutil.copytree(job.work / "photos", captioned, dirs_exist_ok=True)
        lines = [json.dumps({"file_name": path.name, "text": INSTANCE}) for path in sorted(captioned.glob("*.png"))]
        (captioned / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
        return [f"--dataset_name={captioned}", "--caption_column=text", f"--cache_dir={job.work / 'diffusers_cache'}"]

    def checkpoint(self, out: Path) -> Path | None:
        return newest(out / "model", "checkpoint-*")
