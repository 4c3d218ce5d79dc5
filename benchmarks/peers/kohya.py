"""kohya-ss/sd-scripts: train_db.py, train_network.py and sdxl_train_network.py, with the packages that it pins."""

from pathlib import Path

from peers.tasks import (
    CLASS,
    INSTANCE,
    LEARNING_RATE,
    PRIOR_WEIGHT,
    RANK,
    Call,
    Job,
    NotSupported,
    Trainer,
    launched,
    newest,
)

SCRIPTS = {("sd", False): "train_db.py", ("sd", True): "train_network.py", ("sdxl", True): "sdxl_train_network.py"}
TOKENIZERS = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")  # folders of its cache


class Kohya(Trainer):
    """The script of a task, with cached latents. It builds UNets of the published sizes only."""

    name = "kohya"
    packages = ("torchvision", "transformers==4.54.1", "tokenizers<0.22", "diffusers==0.32.1",
                "huggingface-hub==0.34.3", "accelerate==1.6.0", "opencv-python-headless==4.10.0.84", "einops", "toml",
                "voluptuous", "imagesize", "ftfy")

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout

    def call(self, job: Job) -> Call:
        task = job.task
        if (script := SCRIPTS.get((task.family, task.lora))) is None:
            raise NotSupported("has no script for Z-Image")
        photos, classes = self._write_inputs(job)
        options = [
            f"--pretrained_model_name_or_path={job.base}", f"--train_data_dir={photos}", f"--reg_data_dir={classes}",
            f"--tokenizer_cache_dir={job.work / 'kohya_tokenizers'}", f"--output_dir={job.out / 'model'}",
            "--output_name=result", "--save_model_as=safetensors", f"--resolution={task.resolution}",
            f"--train_batch_size={task.images}", f"--max_train_steps={job.steps}",
            f"--learning_rate={LEARNING_RATE}", "--optimizer_type=AdamW", "--lr_scheduler=constant", "--seed=0",
            f"--prior_loss_weight={PRIOR_WEIGHT}", "--mixed_precision=no", "--sdpa", "--cache_latents",
            "--max_data_loader_n_workers=0", "--caption_extension=.none"]
        if task.lora:
            options += ["--network_module=networks.lora", f"--network_dim={RANK}", f"--network_alpha={RANK}",
                        "--network_train_unet_only"]
        if job.save_at:
            options += ["--save_state", f"--save_every_n_steps={job.save_at}"]
        if job.resume:
            options.append(f"--resume={self.checkpoint(job.out)}")
        return launched(job, self.checkout / script, options, folder=self.checkout)

    def checkpoint(self, out: Path) -> Path | None:
        return newest(out / "model", "*-state")

    def _write_inputs(self, job: Job) -> tuple[Path, Path]:
        """Link the photos to folders whose names contain the number of repeats and the prompt.

        Write the tokenizers, which it would fetch from the hub otherwise.
        """
        folders = []
        for kind, prompt in (("photos", INSTANCE), ("class", CLASS)):
            target = job.work / f"kohya_{kind}" / f"1_{prompt}"
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                target.symlink_to(job.work / kind)
            folders.append(target.parent)
        for name in TOKENIZERS:
            folder = job.work / "kohya_tokenizers" / name
            if not folder.is_dir():
                from dreambooth.models.families import clip_tokenizer

                folder.mkdir(parents=True)
                clip_tokenizer.save(clip_tokenizer.build(), folder)
        return folders[0], folders[1]
