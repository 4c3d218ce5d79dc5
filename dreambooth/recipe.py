"""Config -> Recipe: every decision of a run made, every rule between groups checked. Pure, no torch.

`resolve` reports all broken rules together. A Recipe cannot be changed: what it says is what runs.
"""

import json
import os
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

from dreambooth.choices import AttentionKind, Device, Dtype, LrSchedule, OptimizerKind, Rounding, Weights
from dreambooth.errors import ConfigError
from dreambooth.machine import Machine
from dreambooth.packaged import asset
from dreambooth.schema import (
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
from dreambooth.section import Section


@dataclass(frozen=True)
class Recipe:
    """A run, decided. The sections are sealed copies of the config's."""

    name: str
    run_root: Path
    run_dir: Path
    device: str  # cpu or cuda
    source: str  # hub id or folder of the base model
    instance_dir: Path
    class_dir: Path | None
    sample_prompts: tuple[str, ...]
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
    tracking: Tracking

    @property
    def instance_prompt(self) -> str:
        return self.dataset.instance_prompt or ""

    @property
    def class_prompt(self) -> str:
        return self.dataset.class_prompt or ""

    @property
    def with_prior(self) -> bool:
        return self.prior.with_prior_preservation

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
    return "null" if value is None else str(value.value if isinstance(value, Enum) else value)


def resolve(config: Config, run_dir: Path, machine: Machine | None = None) -> Recipe:
    """Decide a run.

    Args:
        config: what the user composed.
        run_dir: the run's own folder.
        machine: the machine that will run it; None when it will run elsewhere (only the declared hardware counts).

    Raises:
        ConfigError: rules are broken; one sentence each, all of them.
    """
    config = deepcopy(config)
    hardware = config.hardware
    if machine is not None and machine.cuda and hardware.device is not Device.cpu:
        _describe(hardware, machine)
    device = "cuda" if hardware.device is Device.cuda or (hardware.gpu and hardware.device is Device.local) else "cpu"
    if problems := list(_problems(config, device, machine)):
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
        instance_dir=Path(asset(config.dataset.instance_dir or "")).absolute(),
        class_dir=Path(asset(config.dataset.class_dir)).absolute() if config.dataset.class_dir else None,
        sample_prompts=tuple(config.sample.prompts or _default_prompts(config)),
        **{item.name: getattr(config, item.name) for item in fields(config)
           if isinstance(getattr(config, item.name), Section)},
    )


def _describe(hardware: Hardware, machine: Machine) -> None:
    """The card that is there replaces what `hardware=local` leaves open, and every declared capability."""
    hardware.gpu = machine.gpu
    hardware.compute_capability = machine.compute_capability
    if hardware.usable_vram_gib is None:
        hardware.usable_vram_gib = machine.vram_gib


def _default_prompts(config: Config) -> list[str]:
    subject = config.dataset.instance_prompt or ""
    return [subject, f"{subject} on the beach", *([config.dataset.class_prompt] if config.dataset.class_prompt else [])]


def _problems(config: Config, device: str, machine: Machine | None) -> Iterator[str]:
    yield from _device_problems(config, device, machine)
    yield from _data_problems(config)
    yield from _training_problems(config)
    yield from _memory_problems(config)


def _device_problems(config: Config, device: str, machine: Machine | None) -> Iterator[str]:
    hardware, dtype = config.hardware, config.precision.dtype
    if device == "cuda" and machine is not None and not machine.cuda:
        yield f"hardware={hardware.name} needs a CUDA GPU and this machine has none: type hardware=cpu"
    capability = hardware.compute_capability
    if device == "cuda" and dtype is Dtype.bf16 and capability is not None and capability < 8:
        yield (f"precision=bf16 needs a GPU of compute capability 8.0 and the {hardware.gpu} has {capability}: "
               "type precision=fp16")
    if device == "cpu" and dtype is Dtype.fp16:
        yield "precision=fp16 needs a CUDA GPU: type precision=fp32, or precision=bf16 for speed"
    if config.attention.kind is AttentionKind.xformers:
        if device == "cpu":
            yield "attention=xformers needs a CUDA GPU: type attention=sdpa"
        elif machine is not None and find_spec("xformers") is None:
            yield "attention=xformers needs a package: pip install 'dreambooth[cuda]', or type attention=sdpa"
    kind = config.optimizer.kind
    if kind in (OptimizerKind.adamw8bit, OptimizerKind.paged_adamw8bit):
        if machine is not None and find_spec("bitsandbytes") is None:
            yield f"optimizer={kind.value} needs a package: pip install 'dreambooth[cuda]', or type optimizer=adamw"
        if kind is OptimizerKind.paged_adamw8bit and (device == "cpu" or config.memory.offload_optimizer):
            yield ("optimizer=paged_adamw8bit pages between a CUDA GPU and host memory: type optimizer=adamw8bit "
                   "for a state in host memory")


def _data_problems(config: Config) -> Iterator[str]:
    data, prior = config.dataset, config.prior
    if not data.instance_dir:
        yield "the photos are missing: type dataset.instance_dir=DIR"
    if not (data.instance_prompt or "").strip():
        yield 'the instance prompt is missing: type dataset.instance_prompt="a photo of a zwx dog"'
    drawings = (data.instance_dir or "").startswith("package:")
    if drawings and not config.model.source.startswith("package:") and not data.allow_drawings:
        yield (f"model={config.model.name} makes photos and dataset={data.name} is a few drawings: type dataset=folder "
               "dataset.instance_dir=DIR for your photos, or dataset.allow_drawings=true if you mean it")
    if prior.with_prior_preservation:
        if not (data.class_prompt or "").strip():
            yield ('prior preservation needs a class prompt: type dataset.class_prompt="a photo of a dog", '
                   "or prior.with_prior_preservation=false")
        if prior.num_class_images == 0 and not data.class_dir:
            yield ("prior preservation needs class images: type prior.num_class_images=100, "
                   "or prior.with_prior_preservation=false")
    if config.memory.cache_latents and not data.center_crop:
        yield ("cached latents would freeze the random crop: type memory.cache_latents=false, "
               "or dataset.center_crop=true")


def _training_problems(config: Config) -> Iterator[str]:
    train, resume = config.train, config.checkpoint.resume
    if train.lr_scheduler is LrSchedule.constant and train.lr_warmup_steps:
        yield ("train.lr_scheduler=constant has no warm-up: type train.lr_scheduler=constant_with_warmup, "
               "or train.lr_warmup_steps=0")
    if train.lr_warmup_steps > train.max_train_steps:
        yield (f"train.lr_warmup_steps={train.lr_warmup_steps} is longer than the run: "
               f"type at most train.lr_warmup_steps={train.max_train_steps}")
    yield from _speed_problems(config)
    if resume not in ("auto", "never") and not (Path(resume) / "state.json").is_file():
        yield f"there is no checkpoint at {resume}: type checkpoint.resume=auto, never, or checkpoints/step-..."


def _speed_problems(config: Config) -> Iterator[str]:
    train, memory = config.train, config.memory
    if train.compile and memory.optimizer_in_backward:
        yield ("train.compile=true makes all gradients at once, and memory.optimizer_in_backward saves nothing then: "
               "type train.compile=false, or memory.optimizer_in_backward=false")
    if train.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield "train.compile=true needs a C++ compiler: install g++, or type train.compile=false"
    if train.channels_last and (memory.weights is Weights.half or memory.offload_optimizer):
        yield ("train.channels_last=true was not tried with half weights or an optimizer in host memory: "
               "type train.channels_last=false")


def _memory_problems(config: Config) -> Iterator[str]:
    memory, train = config.memory, config.train
    for needed, other in ((train.gradient_accumulation_steps > 1, "train.gradient_accumulation_steps=1"),
                          (memory.split_prior, "memory.split_prior=false"),
                          (memory.offload_optimizer, "memory.offload_optimizer=false")):
        if memory.optimizer_in_backward and needed:
            yield ("memory.optimizer_in_backward steps after one backward pass and has its gradients to itself: "
                   f"type memory.optimizer_in_backward=false, or {other}")
    half = memory.weights is Weights.half
    if half and config.precision.dtype is Dtype.fp32:
        yield ("memory.weights=half takes the compute precision: type precision=bf16, precision=fp16 "
               "or memory.weights=full")
    if half and memory.rounding is None:
        yield ("memory.weights=half loses small updates when it rounds to nearest: type memory.rounding=stochastic "
               "or memory.rounding=kahan")
    if half and memory.offload_optimizer:
        yield ("memory.offload_optimizer computes with half weights and keeps fp32 ones in host memory: "
               "type memory.weights=full memory.rounding=null")
    if half and memory.rounding is Rounding.kahan and config.optimizer.kind is OptimizerKind.adafactor:
        yield "memory.rounding=kahan was not tried with optimizer=adafactor: type memory.rounding=stochastic"
    if memory.rounding is not None and not half:
        yield "memory.rounding is of half weights: type memory.weights=half, or memory.rounding=null"
    if train.use_ema and train.max_train_steps % memory.ema_every:
        yield (f"memory.ema_every={memory.ema_every} would leave the last steps out of the average: type a "
               "train.max_train_steps that is a multiple of it, or memory.ema_every=1")
