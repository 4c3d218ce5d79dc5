"""Rules that involve several config groups. Imports neither torch nor Hydra."""

import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dreambooth.config import evaluate
from dreambooth.config.dataset import Dataset, Subject, concept_problems
from dreambooth.config.enums import (
    FP8_CAPABILITY,
    AttentionKind,
    BaseWeights,
    Dtype,
    LrSchedule,
    MethodKind,
    OptimizerKind,
    PriorKind,
    Rounding,
    Weights,
)
from dreambooth.config.hardware import budget_problems
from dreambooth.config.memory import sharding_problems
from dreambooth.config.method import LYCORIS, prompt_problems
from dreambooth.config.schema import Config, StopWhen, Tracking, batch_problems
from dreambooth.utils import quoting
from dreambooth.utils.assets import ASSET_SCHEME
from dreambooth.utils.hardware import Machine

MIN_PRODIGY_RATE, MAX_PRODIGY_RATE = 0.1, 10.0  # diffusers' DreamBooth scripts warn of rates up to 0.1
WITH_BETA3 = (OptimizerKind.came, OptimizerKind.ademamix8bit, OptimizerKind.prodigy)


def problems(config: Config, device: str, machine: Machine | None) -> Iterator[str]:
    """Yield one sentence per broken rule. Each sentence ends with the overrides that the user should type.

    Args:
        device: cpu or cuda.
        machine: this machine if it will execute the run, or None if another machine will execute the run.
    """
    yield from _device_problems(config, device, machine)
    yield from _data_problems(config)
    yield from _training_problems(config)
    yield from _held_out_problems(config)
    validate_every = config.train.validate_every if config.dataset.holds_out_photos else None
    yield from evaluate.problems(config.evaluate, config.dataset.subjects[0].class_prompt or "", config.model.source,
                                 validate_every, config.train.stop_when.measure)
    yield from _memory_problems(config, device)
    yield from _optimizer_problems(config)
    if config.evaluate.promote and len(evaluate.split_objectives(config.evaluate.objective)) > 1:
        yield ("evaluate.promote=true compares one objective, and evaluate.objective has several: type "
               "evaluate.promote=false, and promote the sweep by a rule")
    if config.evaluate.promote and not config.tracking.kind.uses_mlflow:
        yield "evaluate.promote=true registers in MLflow: type tracking=mlflow"
    yield from _tracking_problems(config.tracking, machine)
    yield from budget_problems(config.budget, config.hardware)
    yield from _adapter_problems(config, device, machine)
    if config.method.low_rank:
        yield from _new_token_problems(config)


def _tracking_problems(tracking: Tracking, machine: Machine | None) -> Iterator[str]:
    if machine is None:
        return
    kind = tracking.kind
    if missing := [name for name in kind.backends if name != "mlflow" and find_spec(name) is None]:
        yield (f"tracking={kind.value} needs {'packages' if missing[1:] else 'a package'}: type pip install "
               f"'dreambooth[{','.join(missing)}]', or tracking=mlflow")
    managed = kind.uses_mlflow and (tracking.uri or "").startswith("arn:")
    if managed and find_spec("sagemaker_mlflow") is None:
        yield "tracking.uri=ARN needs a package: type pip install 'dreambooth[managed-mlflow]'"


def name_problems(config: Config, run_dir: Path) -> Iterator[str]:
    """Yield one sentence per name that cannot be part of the name of a folder, a file and a registered model.

    A run that an earlier version started under such a name is not refused, so that it can be resumed and evaluated.
    """
    if not (run_dir / "run.json").is_file():
        yield from name_problem("name", config.name)
        yield from name_problem("tracking.sweep", config.tracking.sweep)


def name_problem(key: str, name: str | None) -> Iterator[str]:
    """Yield a sentence if `name`, the value of a key, has a slash or a colon."""
    if name and re.search("[/:]", name):
        plain = re.sub("[/:]+", "-", name).strip("-") or "NAME"
        yield (f"{key}={name} has a slash or a colon, which names of runs, sweeps and models cannot have: type "
               f"{quoting.override(key, plain)}")


def _device_problems(config: Config, device: str, machine: Machine | None) -> Iterator[str]:
    hardware, dtype = config.hardware, config.precision.dtype
    if device == "cuda" and machine is not None and not machine.cuda:
        yield f"hardware={hardware.name} needs a CUDA GPU and this machine has none: type hardware=cpu"
    capability = hardware.compute_capability
    if device == "cuda" and dtype is Dtype.bf16 and capability is not None and capability < 8:
        yield (f"precision=bf16 needs a GPU of compute capability 8.0 and the {hardware.gpu} has {capability}: "
               "type precision=fp16")
    if config.precision.tf32 and (device == "cpu" or (capability is not None and capability < 8)):
        available = f"the {hardware.gpu} has {capability}" if device == "cuda" else "this run is on a CPU"
        yield f"precision=tf32 needs a GPU of compute capability 8.0 and {available}: type precision=fp32"
    if device == "cpu" and dtype is Dtype.fp16:
        yield "precision=fp16 needs a CUDA GPU: type precision=fp32, or precision=bf16 for speed"
    if config.attention.kind is AttentionKind.xformers:
        if device == "cpu":
            yield "attention=xformers needs a CUDA GPU: type attention=sdpa"
        elif machine is not None and machine.cuda and find_spec("xformers") is None:
            yield "attention=xformers needs a package: pip install 'dreambooth[cuda]', or type attention=sdpa"
    kind = config.optimizer.kind
    if kind.is_of_bitsandbytes:
        if machine is not None and find_spec("bitsandbytes") is None:
            yield f"optimizer={kind.value} needs a package: pip install 'dreambooth[cuda]', or type optimizer=adamw"
        if kind is OptimizerKind.paged_adamw8bit and (device == "cpu" or config.memory.offload_optimizer):
            yield ("optimizer=paged_adamw8bit pages its state between a CUDA GPU and host memory: type "
                   "optimizer=adamw8bit for a state in host memory")


def _data_problems(config: Config) -> Iterator[str]:
    data, prior = config.dataset, config.prior
    for prefix, subject in data.keyed_subjects:
        yield from _subject_problems(config, prefix, subject)
    yield from concept_problems(data)
    if prior.kind is PriorKind.output:
        yield from _output_preservation_problems(config)
    if data.buckets and prior.with_prior_preservation and config.memory.optimizer_in_backward:
        yield ("dataset.buckets=true needs one backward pass for photos and one for class images, and "
               "memory.optimizer_in_backward=true steps the optimizer in one: type "
               "memory.optimizer_in_backward=false, or dataset.buckets=false")
    if data.buckets and config.train.compile:
        yield ("dataset.buckets=true has photos of several sizes, and train.compile=true compiles for one size: type "
               "train.compile=false, or dataset.buckets=false")
    if config.memory.cache_latents and not data.center_crop:
        yield ("memory.cache_latents=true would repeat one random crop in every epoch: type "
               "memory.cache_latents=false, or dataset.center_crop=true")


def _subject_problems(config: Config, prefix: str, subject: Subject | Dataset) -> Iterator[str]:
    """Yield the problems of one subject. Its keys begin with `prefix`, such as dataset.concepts.0."""
    data, prior = config.dataset, config.prior
    if not subject.instance_dir:
        yield f"the photos are missing: type {prefix}.instance_dir=DIR"
    if not (subject.instance_prompt or "").strip():
        yield f'the instance prompt is missing: type {prefix}.instance_prompt="a photo of a zwx dog"'
    drawings = (subject.instance_dir or "").startswith(ASSET_SCHEME)
    if drawings and not config.model.source.startswith(ASSET_SCHEME) and not data.allow_drawings:
        yield (f"model={config.model.name} generates photos and dataset={data.name} is a few drawings: type "
               "dataset=folder dataset.instance_dir=DIR for your photos, or dataset.allow_drawings=true if intended")
    if prior.with_prior_preservation:
        if not (subject.class_prompt or "").strip():
            yield (f'prior preservation needs a class prompt: type {prefix}.class_prompt="a photo of a dog", '
                   "or prior.with_prior_preservation=false")
        elif _normalized(subject.instance_prompt) == _normalized(subject.class_prompt):
            yield (f'the instance prompt and the class prompt are both "{subject.class_prompt}", so that prior '
                   'preservation would train the subject away: type '
                   f'{prefix}.instance_prompt="a photo of a zwx dog" with a rare word, or '
                   "prior.with_prior_preservation=false")
        if prior.kind is PriorKind.output and subject.class_dir:
            yield (f"{prefix}.class_dir has class images, and prior.kind=output uses none: type "
                   f"{prefix}.class_dir=null, or prior.kind=class_images")
        if prior.kind is PriorKind.class_images and prior.num_class_images == 0 and not subject.class_dir:
            yield ("prior preservation needs class images: type prior.num_class_images=100, "
                   "or prior.with_prior_preservation=false")


def _output_preservation_problems(config: Config) -> Iterator[str]:
    """Yield the problems of prior.kind=output, except those of its subjects."""
    if not config.prior.with_prior_preservation:
        # A global batch size does not go with it, see batch_problems.
        turn_on = "prior.with_prior_preservation=true, or " if config.train.global_batch_size is None else ""
        yield f"prior.kind=output is a kind of prior preservation, which is off: type {turn_on}prior.kind=class_images"
    if not config.method.low_rank:
        memory = config.memory  # these options do not work with an adapter
        has_lever = memory.fully_shard or memory.offload_optimizer or memory.weights is Weights.half
        adapter = "" if has_lever or config.optimizer.kind is OptimizerKind.muon else "method=lora, or "
        yield (f"prior.kind=output needs the base model's predictions, and method={config.method.name} changes the "
               f"base model itself: type {adapter}prior.kind=class_images")


def _held_out_problems(config: Config) -> Iterator[str]:
    """Yield one sentence per broken rule of held-out photos and of early stopping."""
    data, stop = config.dataset, config.train.stop_when
    for prefix, subject in data.keyed_subjects:
        if data.validation_count and subject.validation_dir:
            yield (f"{prefix}.validation_dir already has photos that do not train: type dataset.validation_count=0, or "
                   f"{prefix}.validation_dir=null")
    if stop.measure is None:
        changed = [key for key, value in vars(StopWhen()).items() if getattr(stop, key) != value]
        if changed:
            yield (f"train.stop_when.{changed[0]} says when to stop, and no measure is named: type "
                   f"train.stop_when.measure=validation_loss, or a measure of evaluate")
    elif stop.patience is None and stop.bound is None:
        yield "train.stop_when would never stop: type train.stop_when.patience=3, or train.stop_when.bound=NUMBER"


def _normalized(prompt: str | None) -> str:
    """Return a prompt as CLIP's tokenizer reads it: in lower case, with single spaces."""
    return " ".join((prompt or "").lower().split())


def _training_problems(config: Config) -> Iterator[str]:
    train, resume = config.train, config.checkpoint.resume
    if train.lr_scheduler is LrSchedule.constant and train.lr_warmup_steps:
        yield ("train.lr_scheduler=constant has no warm-up: type train.lr_scheduler=constant_with_warmup, "
               "or train.lr_warmup_steps=0")
    if train.lr_warmup_steps > train.max_train_steps:
        yield (f"train.lr_warmup_steps={train.lr_warmup_steps} is longer than the run: "
               f"type at most train.lr_warmup_steps={train.max_train_steps}")
    if train.debiased_estimation and train.snr_gamma is not None:
        yield ("train.debiased_estimation=true and train.snr_gamma both weight the loss by the signal-to-noise ratio: "
               "type train.snr_gamma=null, or train.debiased_estimation=false")
    yield from batch_problems(train, config.prior)
    yield from _speed_problems(config)
    if resume not in ("auto", "never") and not (Path(resume) / "state.json").is_file():
        yield f"there is no checkpoint at {resume}: type checkpoint.resume=auto, never, or checkpoints/step-..."


def _speed_problems(config: Config) -> Iterator[str]:
    train, memory = config.train, config.memory
    if train.compile and memory.optimizer_in_backward:
        yield ("train.compile=true computes all gradients at once, so that memory.optimizer_in_backward=true saves no "
               "memory: type train.compile=false, or memory.optimizer_in_backward=false")
    if train.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield "train.compile=true needs a C++ compiler: install g++, or type train.compile=false"
    if train.channels_last and (memory.weights is Weights.half or memory.offload_optimizer):
        yield ("train.channels_last=true is not tested with half weights or an optimizer in host memory: "
               "type train.channels_last=false")


def _memory_problems(config: Config, device: str) -> Iterator[str]:
    memory, train = config.memory, config.train
    yield from sharding_problems(memory, config.method.low_rank, config.precision.dtype, config.optimizer.kind,
                                 train.compile, train.channels_last)
    photos = train.global_batch_size or 1
    for conflict, alternative in ((train.gradient_accumulation_steps > 1, "train.gradient_accumulation_steps=1"),
                                  (photos > train.train_batch_size, f"train.train_batch_size={photos}"),
                                  (memory.offload_optimizer, "memory.offload_optimizer=false")):
        if memory.optimizer_in_backward and conflict:
            yield ("memory.optimizer_in_backward=true uses and frees each gradient during one backward pass: "
                   f"type memory.optimizer_in_backward=false, or {alternative}")
    if memory.optimizer_in_backward and memory.split_prior and not memory.gradient_checkpointing:
        yield ("memory.split_prior with memory.optimizer_in_backward splits only the recomputation of checkpointing: "
               "type memory.gradient_checkpointing=true, or memory.split_prior=false")
    half = memory.weights is Weights.half
    if half and config.precision.dtype is Dtype.fp32:
        on_gpu = ", precision=fp16" if device == "cuda" and not memory.fully_shard else ""
        yield (f"memory.weights=half stores weights in the compute precision: type precision=bf16{on_gpu}, or "
               "memory.weights=full memory.rounding=null")
    if half and memory.rounding is None:
        kahan = ", or memory.rounding=kahan" * (config.optimizer.kind is not OptimizerKind.adafactor)
        yield f"memory.weights=half loses small updates by rounding to nearest: type memory.rounding=stochastic{kahan}"
    if half and memory.offload_optimizer:
        yield ("memory.offload_optimizer=true computes with half weights already, and keeps fp32 weights on the host: "
               "type memory.weights=full memory.rounding=null")
    if half and memory.rounding is Rounding.kahan and config.optimizer.kind is OptimizerKind.adafactor:
        yield "memory.rounding=kahan is not tested with optimizer=adafactor: type memory.rounding=stochastic"
    if memory.swap_blocks:
        conflicts = {"method=lora": not config.method.low_rank, "train.compile=false": train.compile,
                     "memory.gradient_checkpointing=true": not memory.gradient_checkpointing}
        if needed := [override for override, conflict in conflicts.items() if conflict]:
            yield (f"memory.swap_blocks={memory.swap_blocks} moves frozen blocks between passes: type "
                   f"{' '.join(needed)}, or memory.swap_blocks=null")
    if memory.rounding is not None and not half:
        possible = not (memory.fully_shard or memory.offload_optimizer or config.method.low_rank or train.channels_last
                        or train.text_encoder_learning_rate is not None
                        or not config.optimizer.kind.allows_half_weights)
        to_half = "memory.weights=half" + " precision=bf16" * (config.precision.dtype is Dtype.fp32)
        yield ("memory.rounding applies to half weights only: type memory.rounding=null" + f", or {to_half}" * possible)
    if train.use_ema and train.max_train_steps % memory.ema_every:
        yield (f"memory.ema_every={memory.ema_every} would leave the last steps out of the EMA: type a "
               "train.max_train_steps that is a multiple of it, or memory.ema_every=1")


def _optimizer_problems(config: Config) -> Iterator[str]:
    """Yield one sentence per setting that does not fit the optimizer. Rules of the device are in `_device_problems`."""
    spec, train, memory = config.optimizer, config.train, config.memory
    kind, name = spec.kind, f"optimizer={spec.kind.value}"
    if kind is OptimizerKind.prodigy and not MIN_PRODIGY_RATE <= train.learning_rate <= MAX_PRODIGY_RATE:
        yield (f"{name} estimates the learning rate and multiplies it by train.learning_rate="
               f"{train.learning_rate:g}, which must be near 1: type train.learning_rate=1, with optimizer.d_coef=2 "
               "to learn faster or optimizer.d_coef=0.5 to learn slower")
    if memory.optimizer_in_backward and not kind.steps_each_weight_alone:
        yield (f"{name} computes one step size from the gradients of all weights, which never exist together with "
               "memory.optimizer_in_backward=true: type memory.optimizer_in_backward=false")
    if memory.weights is Weights.half and not kind.allows_half_weights:
        yield (f"{name} works with weights in fp32 only: type memory.weights=full memory.rounding=null, or "
               "optimizer=adamw8bit")
    if kind is OptimizerKind.muon and config.method.low_rank:
        yield (f"{name} orthogonalises the updates of whole weight matrices, and method={config.method.name} trains "
               "factors of them: type method=full, or optimizer=adamw")
    if kind.averages_weights:
        if train.lr_scheduler.depends_on_length:
            yield (f"{name} averages the weights instead of lowering the learning rate: type "
                   "train.lr_scheduler=constant, or train.lr_scheduler=constant_with_warmup")
        if train.use_ema:
            yield (f"{name} exports its own average of the weights, and an EMA would replace it: type "
                   "train.use_ema=false")
        if spec.beta1 == 0:
            yield f"{name} divides by optimizer.beta1: type optimizer.beta1=0.9"
    yield from _text_encoder_rate_problems(config)
    if spec.d_coef != 1 and kind is not OptimizerKind.prodigy:
        yield "optimizer.d_coef applies to optimizer=prodigy only: type optimizer.d_coef=1, or optimizer=prodigy"
    if spec.beta3 is not None and kind not in WITH_BETA3:
        yield (f"optimizer.beta3 applies to optimizer={', '.join(one.value for one in WITH_BETA3)} only: type "
               "optimizer.beta3=null")


def _text_encoder_rate_problems(config: Config) -> Iterator[str]:
    train, memory = config.train, config.memory
    if train.text_encoder_learning_rate is None:
        return
    if not train.train_text_encoder:
        yield ("train.text_encoder_learning_rate is of a text encoder, and none is trained: type "
               "train.train_text_encoder=true, or train.text_encoder_learning_rate=null")
    levers = {"memory.optimizer_in_backward=false": memory.optimizer_in_backward,
              "memory.weights=full memory.rounding=null": memory.weights is Weights.half,
              "memory.offload_optimizer=false": memory.offload_optimizer}
    if needed := [override for override, is_on in levers.items() if is_on]:
        yield ("train.text_encoder_learning_rate needs two learning rates, and these options of memory have one: type "
               f"{' '.join(needed)}, or train.text_encoder_learning_rate=null")
    if config.optimizer.kind is OptimizerKind.prodigy:
        yield ("optimizer=prodigy estimates one learning rate for all weights: type "
               "train.text_encoder_learning_rate=null, or optimizer=adamw")


def _adapter_problems(config: Config, device: str, machine: Machine | None) -> Iterator[str]:
    method, memory = config.method, config.memory
    if not method.low_rank:
        if changed := method.changed_keys:
            yield (f"{' and '.join(changed)} {'apply' if changed[1:] else 'applies'} to adapters only, and "
                   f"method={method.name} trains every weight: type method=lora")
        return
    if method.kind is not MethodKind.lokr and (changed := [
            key for key in method.changed_keys if key.startswith("method.decompose")]):
        yield (f"{' and '.join(changed)} {'apply' if changed[1:] else 'applies'} to method=lokr only: type "
               f"method=lokr, or leave {' and '.join(changed)} out")
    if method.kind in LYCORIS and config.train.compile:
        yield f"method={method.name} is not tested with train.compile=true: type train.compile=false"
    if method.base_weights is BaseWeights.nf4 and device == "cpu":
        yield "method.base_weights=nf4 needs a CUDA GPU: type method.base_weights=half"
    elif method.base_weights is BaseWeights.nf4 and find_spec("bitsandbytes") is None:
        yield ("method.base_weights=nf4 needs a package: pip install 'dreambooth[cuda]', or type "
               "method.base_weights=half")
    capability = config.hardware.compute_capability
    if (method.base_weights is BaseWeights.fp8 and device == "cuda" and capability is not None
            and capability < FP8_CAPABILITY):
        yield (f"method.base_weights=fp8 needs a GPU of compute capability {FP8_CAPABILITY} and the "
               f"{config.hardware.gpu} has {capability}: type method.base_weights=int8")
    if memory.swap_blocks and method.base_weights is BaseWeights.nf4:
        yield ("memory.swap_blocks cannot move weights of bitsandbytes: type method.base_weights=int8, or "
               "memory.swap_blocks=null")
    if method.dropout and config.train.compile:
        yield "method.dropout is not tested with train.compile=true: type method.dropout=0, or train.compile=false"
    if memory.weights is Weights.half:
        yield (f"memory.weights=half would round the few weights of method={method.name} and save no memory: type "
               "memory.weights=full memory.rounding=null")
    if memory.offload_optimizer:
        yield (f"memory.offload_optimizer=true saves no memory with the few weights of method={method.name}: type "
               "memory.offload_optimizer=false")


def _new_token_problems(config: Config) -> Iterator[str]:
    """Yield the problems of method.new_tokens: of the keys that belong to it, and of the prompts of the subjects."""
    method = config.method
    if not method.new_tokens:
        if changed := [f"method.{key}" for key in ("trigger_word", "token_initializer", "token_learning_rate")
                       if getattr(method, key) is not None] + ["method.token_train_share"] * (
                           method.token_train_share != 1):
            yield (f"{' and '.join(changed)} {'apply' if changed[1:] else 'applies'} to new tokens only: type "
                   "method.new_tokens=2")
        return
    yield from prompt_problems(method, config.dataset.keyed_subjects)
    if config.memory.optimizer_in_backward:
        yield ("memory.optimizer_in_backward=true has one learning rate, and method.new_tokens needs another for the "
               "tokens: type memory.optimizer_in_backward=false")
    if config.optimizer.kind.averages_weights:
        yield (f"optimizer={config.optimizer.kind.value} keeps a second copy of the weights, which the normalization "
               "of new tokens would not change: type optimizer=adamw, or method.new_tokens=0")
    if config.optimizer.kind is OptimizerKind.prodigy and method.token_learning_rate is not None:
        yield ("optimizer=prodigy estimates one learning rate for all weights: type method.token_learning_rate=null, "
               "or optimizer=adamw")
    if config.train.compile:
        yield ("method.new_tokens is not tested with train.compile=true: type train.compile=false, or "
               "method.new_tokens=0")
