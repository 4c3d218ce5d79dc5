"""Config -> Recipe: every decision of a run made, every rule between groups checked. Pure, no torch.

`resolve` reports all broken rules together. A Recipe cannot be changed: what it says is what runs.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from dreambooth.config import eval_prompts, evaluate, validation
from dreambooth.config.dataset import Subject
from dreambooth.config.enums import Device, OptimizerKind, Weights
from dreambooth.config.evaluate import Evaluate
from dreambooth.config.schema import (
    Attention,
    Checkpoint,
    Config,
    Dataset,
    Hardware,
    Memory,
    Method,
    Model,
    Optimizer,
    Precision,
    Prior,
    Sample,
    Tracking,
    Train,
)
from dreambooth.config.section import Section
from dreambooth.errors import ConfigError
from dreambooth.utils.assets import asset
from dreambooth.utils.hardware import Machine

HEADLINE = ("train.learning_rate", "prior.prior_loss_weight")  # a line of these is as wide as MLflow makes a picture


@dataclass(frozen=True)
class Recipe:
    """A run, decided. The sections are sealed copies of the config's."""

    name: str
    run_root: Path
    run_dir: Path
    device: str  # cpu or cuda
    source: str  # hub id or folder of the base model
    vae_source: str | None  # the same of a VAE to use in place of the base's
    instance_dir: Path
    class_dir: Path | None
    sample_prompts: tuple[str, ...]
    evaluate_prompts: tuple[str, ...]  # as the model reads them
    evaluate_texts: tuple[str, ...]  # the same with the class in place of the subject, as an encoder knows it
    reference_dir: Path  # photos that pictures are compared with
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
    sample: Sample
    checkpoint: Checkpoint
    evaluate: Evaluate
    tracking: Tracking
    typed: tuple[str, ...] = ()  # Hydra overrides

    @property
    def instance_prompt(self) -> str:
        """Of the first subject, if there are several."""
        return self.dataset.subjects[0].instance_prompt or ""

    @property
    def class_prompt(self) -> str:
        """Of the first subject, if there are several."""
        return self.dataset.subjects[0].class_prompt or ""

    @property
    def subjects(self) -> tuple["Recipe", ...]:
        """The run of each subject as if it were the only one: its folders, its prompts."""
        return tuple(map(self._alone, self.dataset.subjects))

    @property
    def classes(self) -> tuple["Recipe", ...]:
        """The subjects with a class of its own each: two toys share the class images of "a photo of a toy"."""
        found: dict[tuple[str, Path | None], Recipe] = {}
        for one in self.subjects:
            found.setdefault((one.class_prompt, one.class_dir), one)
        return tuple(found.values())

    @property
    def two_passes(self) -> bool:
        """Whether photos and class images go through the model one after the other."""
        return self.memory.split_pass or (self.with_prior and self.dataset.buckets)

    def among(self, processes: int) -> "Recipe":
        """The same run where so many processes train together, whatever hardware.gpus says."""
        return replace(self, hardware=self.hardware.changed(gpus=processes))

    @property
    def may_step_in_backward(self) -> bool:
        """Whether memory.optimizer_in_backward can be asked for: one process, one pass a step, not compiled."""
        train, alone = self.train, self.hardware.gpus == 1
        return (alone and train.gradient_accumulation_steps == 1 and not self.two_passes and not train.compile
                and not self.memory.offload_optimizer)

    @property
    def may_offload(self) -> bool:
        """Whether memory.offload_optimizer can be asked for."""
        return (self.hardware.gpus == 1 and self.memory.weights is Weights.full and not self.train.channels_last
                and self.optimizer.kind is not OptimizerKind.paged_adamw8bit)

    @property
    def with_prior(self) -> bool:
        return self.prior.with_prior_preservation

    @property
    def measured(self) -> dict[str, str]:
        """name -> role of what this run measures; empty: it does not evaluate."""
        return evaluate.known(self.evaluate, self.class_prompt)

    def _alone(self, subject: Subject) -> "Recipe":
        if not self.dataset.concepts:
            return self
        own = {item.name: getattr(subject, item.name) for item in fields(subject) if item.name != "repeats"}
        return replace(self, dataset=self.dataset.changed(concepts=[], **own), **_folders(subject))  # type: ignore[arg-type]

    def headline(self) -> dict[str, str]:
        """The settings that runs are told apart by: the usual few and whatever was typed. MLflow writes every parameter
        above every picture, so all of them would hide the pictures; `settings` goes along as a file."""
        typed = [word.lstrip("+~").partition("=")[0] for word in self.typed]
        chosen = {*HEADLINE, *typed, *(f"{group}.name" for group in typed)}
        return {key: value for key, value in self.settings().items() if key in chosen}

    def settings(self) -> dict[str, str]:
        """Every setting as text by its override key, such as train.learning_rate; the tracking server left out,
        since its address may hold a password."""
        flat = {"name": self.name, "device": self.device, "sample_prompts": json.dumps(self.sample_prompts)}
        for item in fields(self):
            section = getattr(self, item.name)
            if isinstance(section, Section) and not isinstance(section, Tracking):
                flat |= {f"{item.name}.{key}": _text(value) for key, value in vars(section).items() if key[0] != "_"}
        return flat


def _text(value: object) -> str:
    if isinstance(value, list):
        return json.dumps([asdict(item) if is_dataclass(item) else item for item in value])  # type: ignore[arg-type]
    return "null" if value is None else str(value.value if isinstance(value, Enum) else value)


def _folders(subject: Subject) -> dict[str, Path | None]:
    return {"instance_dir": Path(asset(subject.instance_dir or "")).absolute(),
            "class_dir": Path(asset(subject.class_dir)).absolute() if subject.class_dir else None}


def resolve(config: Config, run_dir: Path, machine: Machine | None = None, typed: Sequence[str] = ()) -> Recipe:
    """Decide a run.

    Args:
        config: what the user composed.
        run_dir: the run's own folder.
        typed: the overrides that it was composed with, kept to tell runs apart.
        machine: the machine that will run it; None when it will run elsewhere (only the declared hardware counts).

    Raises:
        ConfigError: rules are broken; one sentence each, all of them.
    """
    config = deepcopy(config)
    hardware = config.hardware
    if machine is not None and machine.cuda and hardware.device is not Device.cpu:
        _describe(hardware, machine)
    device = "cuda" if hardware.device is Device.cuda or (hardware.gpu and hardware.device is Device.local) else "cpu"
    if problems := list(validation.problems(config, device, machine)):
        raise ConfigError(*problems)
    for item in fields(config):
        if isinstance(section := getattr(config, item.name), Section):
            section.seal()
    return Recipe(
        name=config.name,
        run_root=Path(config.run_root).absolute(),
        run_dir=run_dir.absolute(),
        device=device,
        source=asset(config.model.source),
        vae_source=asset(config.model.vae) if config.model.vae else None,
        typed=tuple(typed),
        sample_prompts=tuple(config.sample.prompts or _default_prompts(config)),
        **_folders(config.dataset.subjects[0]),  # type: ignore[arg-type]
        **_evaluation(config),
        **{item.name: getattr(config, item.name) for item in fields(config)
           if isinstance(getattr(config, item.name), Section) and item.name not in ("plan", "storage")},
    )


def _describe(hardware: Hardware, machine: Machine) -> None:
    """The card that is there replaces what `hardware=local` leaves open, and every declared capability."""
    hardware.gpu = machine.gpu
    hardware.compute_capability = machine.compute_capability
    if hardware.usable_vram_gib is None:
        hardware.usable_vram_gib = machine.vram_gib


def _default_prompts(config: Config) -> list[str]:
    found: list[str] = []
    for one in config.dataset.subjects:
        subject = one.instance_prompt or ""
        found += [subject, f"{subject} on the beach", *([one.class_prompt] if one.class_prompt else [])]
    return list(dict.fromkeys(found))


def _evaluation(config: Config) -> dict[str, Any]:
    data, templates = config.dataset.subjects[0], eval_prompts.read(config.evaluate.prompts)
    subject = eval_prompts.noun(data.instance_prompt or "")
    return {
        "evaluate_prompts": tuple(eval_prompts.fill(templates, subject)),
        "evaluate_texts": tuple(eval_prompts.fill(templates, eval_prompts.noun(data.class_prompt or "") or subject)),
        "reference_dir": Path(asset(config.evaluate.reference_dir or data.instance_dir or "")).absolute(),
    }
