"""The resolved run: `resolve` checks every rule of a Config, decides every default, and returns a Recipe.

A Recipe is immutable, and determines the run completely. Imports neither torch nor Hydra.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from dreambooth.config import eval_prompts, evaluate, validation
from dreambooth.config.dataset import Subject
from dreambooth.config.enums import BaseWeights, Device, OptimizerKind, PriorKind, Weights
from dreambooth.config.evaluate import Evaluate
from dreambooth.config.method import trigger_word
from dreambooth.config.schema import (
    Attention,
    Checkpoint,
    Config,
    Dataset,
    Flow,
    Hardware,
    Memory,
    Method,
    Model,
    Optimizer,
    Precision,
    Prior,
    RunBudget,
    Sample,
    Tracking,
    Train,
)
from dreambooth.config.section import Section
from dreambooth.errors import ConfigError
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.hardware import Machine
from dreambooth.utils.masking import mask_urls

TRACKED_KEYS = ("train.learning_rate", "prior.prior_loss_weight")  # MLflow has room for two above an image


@dataclass(frozen=True)
class Recipe:
    """A resolved run. Its sections are read-only copies of the sections of the Config.

    Attributes:
        device: cpu or cuda.
        source: hub id or folder of the base model.
        vae_source: hub id or folder of a VAE that replaces the VAE of the base model; None if there is no such VAE.
        instance_dir: folder of the first subject's photos.
        class_dir: folder of the user's own class images for the first subject; None if all class images are generated.
        validation_dir: folder of the first subject's photos that do not train; None if there is no such folder.
        evaluate_prompts: prompts from which the model generates evaluation images.
        evaluate_texts: the evaluation prompts with the class in place of the subject. The text encoder that scores the
            images gets these prompts, because it does not know the rare word that names the subject.
        reference_dir: folder of the photos that generated images are compared with.
        overrides: the Hydra overrides that the run was composed with.
        fixed_length: whether the run belongs to a sweep that sets train.max_train_steps: more steps are another run.
    """

    name: str
    run_root: Path
    run_dir: Path
    device: str
    source: str
    vae_source: str | None
    instance_dir: Path
    class_dir: Path | None
    sample_prompts: tuple[str, ...]
    evaluate_prompts: tuple[str, ...]
    evaluate_texts: tuple[str, ...]
    reference_dir: Path
    hardware: Hardware
    model: Model
    method: Method
    precision: Precision
    attention: Attention
    memory: Memory
    optimizer: Optimizer
    dataset: Dataset
    prior: Prior
    train: Train
    flow: Flow
    sample: Sample
    checkpoint: Checkpoint
    evaluate: Evaluate
    tracking: Tracking
    overrides: tuple[str, ...] = ()
    fixed_length: bool = False
    validation_dir: Path | None = None
    budget: RunBudget = field(default_factory=RunBudget)

    @property
    def instance_prompt(self) -> str:
        """The instance prompt of the first subject."""
        return self.dataset.subjects[0].instance_prompt or ""

    @property
    def class_prompt(self) -> str:
        """The class prompt of the first subject."""
        return self.dataset.subjects[0].class_prompt or ""

    @property
    def subject_recipes(self) -> tuple["Recipe", ...]:
        """One recipe per subject, with the folders and prompts of the subject, as if there were no other subject."""
        return tuple(map(self._for_subject, self.dataset.subjects))

    @property
    def class_recipes(self) -> tuple["Recipe", ...]:
        """One recipe per class. Subjects with the same class prompt and class_dir share one class and its images."""
        recipes: dict[tuple[str, Path | None], Recipe] = {}
        for recipe in self.subject_recipes:
            recipes.setdefault((recipe.class_prompt, recipe.class_dir), recipe)
        return tuple(recipes.values())

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """The words of prompts that new tokens replace (method.new_tokens), one per subject; empty without them."""
        words = (trigger_word(self.method, subject) for subject in self.dataset.subjects)
        return tuple(dict.fromkeys(filter(None, words))) if self.method.new_tokens else ()

    @property
    def encodes_in_step(self) -> bool:
        """Whether each step encodes prompts, because their encodings change while text encoder or embeddings train."""
        return self.train.train_text_encoder or self.method.new_tokens > 0

    @property
    def picture_prompts(self) -> set[str]:
        """All prompts from which the run generates pictures: class images, samples and evaluation."""
        prompts = set(self.sample_prompts) if self.sample.every is not None else set()
        if self.with_prior:
            prompts.update(one.class_prompt for one in self.class_recipes)
        return prompts | (self.evaluated_prompts if self.evaluate.encoders else set())

    @property
    def evaluated_prompts(self) -> set[str]:
        """All prompts from which an evaluation generates pictures, of the trained model and of the base model."""
        return {*self.evaluate_prompts, *self.evaluate_texts, self.class_prompt}

    @property
    def base_image_texts(self) -> list[str]:
        """The texts from which the base model generates images for prompt_fidelity, without duplicates.

        The list is empty if there is no evaluation, no class prompt, or only one text.
        """
        texts = list(dict.fromkeys(self.evaluate_texts))
        return texts if self.evaluate.encoders and self.class_prompt.strip() and len(texts) > 1 else []

    @property
    def two_passes(self) -> bool:
        """Whether a step passes the instance rows and the class rows through the model one after the other."""
        return self.memory.split_pass or (self.with_prior and self.dataset.buckets)

    def with_processes(self, processes: int) -> "Recipe":
        """Return a copy in which hardware.gpus equals `processes`, the number of processes that train together."""
        return replace(self, hardware=self.hardware.copy_with(gpus=processes))

    @property
    def allows_optimizer_in_backward(self) -> bool:
        """Whether memory.optimizer_in_backward=true is possible.

        The option requires one process, one pass per step, an uncompiled model, an optimizer on the device that updates
        each weight by itself, and one learning rate: new tokens have another than the adapter, and text encoders may.
        """
        train, one_process = self.train, self.hardware.gpus == 1
        return (one_process and self.micro_batches[1] == 1 and not self.two_passes and not train.compile
                and not self.memory.fully_shard
                and not self.memory.offload_optimizer and self.optimizer.kind.steps_each_weight_alone
                and not self.method.new_tokens and self.train.text_encoder_learning_rate is None)

    @property
    def allows_swapped_blocks(self) -> bool:
        """Whether memory.swap_blocks is possible, if the denoiser's family has blocks that can be swapped.

        The option requires an adapter, weights that bitsandbytes has not packed, one process, and an uncompiled model.
        """
        return (self.method.low_rank and self.method.base_weights is not BaseWeights.nf4
                and self.hardware.gpus == 1 and not self.train.compile)

    @property
    def allows_offload_optimizer(self) -> bool:
        """Whether memory.offload_optimizer=true is possible.

        The option requires one process, fp32 weights, one learning rate, no channels_last, and an optimizer other than
        paged_adamw8bit.
        """
        return (self.hardware.gpus == 1 and self.train.text_encoder_learning_rate is None
                and not self.memory.fully_shard and self.memory.weights is Weights.full and not self.train.channels_last
                and self.optimizer.kind is not OptimizerKind.paged_adamw8bit)

    @property
    def with_prior(self) -> bool:
        """Whether prior preservation is on: a step has class rows beside its instance rows."""
        return self.prior.with_prior_preservation

    @property
    def with_class_images(self) -> bool:
        """Whether prior preservation is on and trains on class images."""
        return self.with_prior and self.prior.kind is PriorKind.class_images

    @property
    def preserves_output(self) -> bool:
        """Whether prior preservation is on and trains on the base model's predictions for the class prompt."""
        return self.with_prior and self.prior.kind is PriorKind.output

    @property
    def micro_batches(self) -> tuple[int, int]:
        """Photos of the largest micro-batch, and the largest number of micro-batches that a process has in a step.

        The processes share a global batch size as StepShares does.
        """
        train = self.train
        if train.global_batch_size is None:
            return train.train_batch_size, train.gradient_accumulation_steps
        photos = -(-train.global_batch_size // self.hardware.gpus)  # of the process with the most photos
        number = -(-photos // train.train_batch_size)
        return -(-photos // number), number

    @property
    def class_rows(self) -> int:
        """Number of class rows per micro-batch: as many as photos.

        With prior.kind=output, half as many are enough, because their targets have no noise. The forward pass of the
        base model then costs about as much as the class rows that are left out. See also `class_row_interval`.
        """
        photos, _ = self.micro_batches
        return (max(1, photos // 2) if self.preserves_output else photos) * self.with_prior

    @property
    def class_row_interval(self) -> int:
        """Number of steps per step with class rows: 2 with prior.kind=output and one photo, which is half a class row
        per photo; otherwise 1."""
        return 2 if self.preserves_output and self.train.train_batch_size == 1 else 1

    @property
    def measure_roles(self) -> dict[str, str]:
        """What each measure of this run measures (its role, such as subject_similarity), by the measure's name.

        The dictionary is empty if there is no evaluation.
        """
        return evaluate.measure_roles(self.evaluate, self.class_prompt, self.source, self.validates)

    @property
    def validates(self) -> bool:
        """Whether the run measures the loss on photos that it does not train on."""
        return self.dataset.holds_out_photos and self.train.validate_every is not None

    def _for_subject(self, subject: Subject) -> "Recipe":
        if not self.dataset.concepts:
            return self
        values = {item.name: getattr(subject, item.name) for item in fields(subject) if item.name != "repeats"}
        dataset = self.dataset.copy_with(concepts=[], **values)
        return replace(self, dataset=dataset, **_subject_folders(subject))  # type: ignore[arg-type]

    def tracked_settings(self) -> dict[str, str]:
        """Return the settings that are sent to MLflow as parameters, by key.

        These are the settings in TRACKED_KEYS and all settings that the user has overridden. MLflow shows all
        parameters above each image. Sending every setting would therefore hide the images. The file run.json contains
        every setting.
        """
        overridden = [word.lstrip("+~").partition("=")[0] for word in self.overrides]
        tracked = {*TRACKED_KEYS, *overridden, *(f"{group}.name" for group in overridden)}
        return {key: value for key, value in self.settings().items() if key in tracked}

    def settings(self) -> dict[str, str]:
        """Return every setting as a string, by its key in overrides, such as train.learning_rate.

        User info and queries of URLs are masked. The group tracking is left out, because the address of the MLflow
        server may contain a password. The group budget is left out, because it says nothing about the result.
        """
        flat = {"name": self.name, "device": self.device, "sample_prompts": json.dumps(self.sample_prompts)}
        for item in fields(self):
            section = getattr(self, item.name)
            if isinstance(section, Section) and not isinstance(section, Tracking | RunBudget):
                flat |= _flatten(item.name, section)
        return {key: value if "prompt" in key else mask_urls(value) for key, value in flat.items()}


def _flatten(prefix: str, section: Section) -> dict[str, str]:
    """Return the settings of a section and of the sections inside it, by key."""
    flat: dict[str, str] = {}
    for key, value in vars(section).items():
        if isinstance(value, Section):
            flat |= _flatten(f"{prefix}.{key}", value)
        elif key[0] != "_":
            flat[f"{prefix}.{key}"] = _text(value)
    return flat


def _text(value: object) -> str:
    if isinstance(value, list):
        return json.dumps([asdict(item) if is_dataclass(item) else item for item in value])  # type: ignore[arg-type]
    return "null" if value is None else str(value.value if isinstance(value, Enum) else value)


def _subject_folders(subject: Subject) -> dict[str, Path | None]:
    return {"instance_dir": Path(resolve_asset(subject.instance_dir or "")).absolute(),
            **{key: Path(resolve_asset(folder)).absolute() if (folder := getattr(subject, key)) else None
               for key in ("class_dir", "validation_dir")}}


def resolve(config: Config, run_dir: Path, machine: Machine | None = None,
            overrides: Sequence[str] = ()) -> Recipe:
    """Resolve a run: decide every default and check every rule.

    Args:
        config: the configuration that the user composed. It is not changed.
        run_dir: the folder of the run.
        machine: this machine, if it will execute the run. None if another machine will execute the run; the group
            hardware describes that other machine.
        overrides: the overrides that the run was composed with.

    Raises:
        ConfigError: rules are broken; the message has one line per rule.
    """
    config = deepcopy(config)
    hardware = config.hardware
    if machine is not None and machine.cuda and hardware.device is not Device.cpu:
        _use_detected_gpu(hardware, machine)
    device = "cuda" if hardware.device is Device.cuda or (hardware.gpu and hardware.device is Device.local) else "cpu"
    if problems := [*validation.name_problems(config, run_dir), *validation.problems(config, device, machine)]:
        raise ConfigError(*problems)
    for item in fields(config):
        if isinstance(section := getattr(config, item.name), Section):
            section.seal()
    return Recipe(
        name=config.name,
        run_root=Path(config.run_root).absolute(),
        run_dir=run_dir.absolute(),
        device=device,
        source=resolve_asset(config.model.source),
        vae_source=resolve_asset(config.model.vae) if config.model.vae else None,
        overrides=tuple(overrides),
        sample_prompts=tuple(config.sample.prompts or _default_prompts(config)),
        **_subject_folders(config.dataset.subjects[0]),  # type: ignore[arg-type]
        **_evaluation_inputs(config),
        **{item.name: getattr(config, item.name) for item in fields(config)
           if isinstance(getattr(config, item.name), Section) and item.name not in ("plan", "storage")},
    )


def _use_detected_gpu(hardware: Hardware, machine: Machine) -> None:
    """Set the fields gpu and compute_capability of `hardware` to the values that were detected on this machine.

    Set the usable VRAM to the detected value only if it was None: the user may have set it.
    """
    hardware.gpu = machine.gpu
    hardware.compute_capability = machine.compute_capability
    if hardware.usable_vram_gib is None:
        hardware.usable_vram_gib = machine.vram_gib


def _default_prompts(config: Config) -> list[str]:
    """Return up to three prompts per subject, without duplicates.

    These are the instance prompt, the instance prompt followed by " on the beach", and the class prompt.
    """
    prompts: list[str] = []
    for subject in config.dataset.subjects:
        prompt = subject.instance_prompt or ""
        prompts += [prompt, f"{prompt} on the beach", *([subject.class_prompt] if subject.class_prompt else [])]
    return list(dict.fromkeys(prompts))


def _evaluation_inputs(config: Config) -> dict[str, Any]:
    first, templates = config.dataset.subjects[0], eval_prompts.read_templates(config.evaluate.prompts)
    subject = eval_prompts.extract_subject(first.instance_prompt or "")
    class_name = eval_prompts.extract_subject(first.class_prompt or "") or subject
    return {
        "evaluate_prompts": tuple(eval_prompts.fill_templates(templates, subject)),
        "evaluate_texts": tuple(eval_prompts.fill_templates(templates, class_name)),
        "reference_dir": Path(resolve_asset(config.evaluate.reference_dir or first.instance_dir or "")).absolute(),
    }
