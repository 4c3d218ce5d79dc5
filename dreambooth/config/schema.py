"""The schema of a run: one dataclass per config group, with types, defaults and rules for single fields.

Larger groups have their own files in this folder. The YAML files in conf/ set the values and explain each key. Imports
neither torch nor Hydra.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from dreambooth.config.dataset import Dataset as Dataset
from dreambooth.config.enums import (
    AttentionKind,
    Direction,
    Dtype,
    LossWeighting,
    LrSchedule,
    OptimizerKind,
    PlanFormat,
    PriorKind,
    TimestepSampling,
    TrackingKind,
)
from dreambooth.config.evaluate import Evaluate
from dreambooth.config.hardware import Hardware as Hardware
from dreambooth.config.hardware import RunBudget as RunBudget
from dreambooth.config.memory import Memory as Memory
from dreambooth.config.method import Method as Method
from dreambooth.config.section import Section, finite, require
from dreambooth.config.storage import Storage as Storage


@dataclass
class Model(Section):
    """The base model: the source of its weights, and the training resolution."""

    name: str = "tiny"
    source: str = "package:tiny-sd"
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    zero_terminal_snr: bool = False
    resolution: int = 64
    adapter_learning_rate: float = 1e-4
    offline: bool = True

    def __post_init__(self) -> None:
        require("model", {
            "source": (bool(self.source.strip()), "a hub id, a folder or a file"),
            "resolution": (8 <= self.resolution <= 2048 and self.resolution % 8 == 0,
                           f"a multiple of 8 from 8 to 2048 pixels, not {self.resolution}"),
            "adapter_learning_rate": (finite(self.adapter_learning_rate, 0) and self.adapter_learning_rate > 0,
                                      f"above 0, not {self.adapter_learning_rate}"),
        })


@dataclass
class Precision(Section):
    """Precision of computations.

    By default, trained weights, optimizer state and EMA are fp32, whatever the precision of computations is.
    """

    dtype: Dtype = Dtype.fp32
    tf32: bool = False

    @property
    def label(self) -> str:
        """The precision as a string, such as "fp32, tf32".

        Records of generated images contain this string, because the precision changes the images.
        """
        return f"{self.dtype.value}, tf32" if self.tf32 else self.dtype.value


@dataclass
class Attention(Section):
    """The implementation that computes attention."""

    kind: AttentionKind = AttentionKind.sdpa


@dataclass
class Optimizer(Section):
    """The optimizer (AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101) and its hyperparameters.

    Only CAME, AdEMAMix and Prodigy use `beta3`, and only Prodigy uses `d_coef`.
    """

    kind: OptimizerKind = OptimizerKind.adamw
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    beta3: float | None = None
    d_coef: float = 1.0

    def __post_init__(self) -> None:
        require("optimizer", {
            "beta1": (0 <= self.beta1 < 1, f"in [0, 1), not {self.beta1}"),
            "beta2": (0 <= self.beta2 < 1, f"in [0, 1), not {self.beta2}"),
            "eps": (finite(self.eps, 0) and self.eps > 0, f"above 0, not {self.eps}"),
            "weight_decay": (finite(self.weight_decay, 0), f"0 or more, not {self.weight_decay}"),
            "beta3": (self.beta3 is None or 0 <= self.beta3 < 1,
                      f"in [0, 1), or null for the optimizer's default, not {self.beta3}"),
            "d_coef": (finite(self.d_coef, 0) and self.d_coef > 0, f"above 0, not {self.d_coef}"),
        })


@dataclass
class Prior(Section):
    """Prior preservation (Ruiz et al. 2023, arXiv:2208.12242, section 3.3), with class images or without any."""

    with_prior_preservation: bool = True
    kind: PriorKind = PriorKind.class_images
    prior_loss_weight: float = 1.0
    num_class_images: int = 100
    sample_batch_size: int = 4
    num_inference_steps: int = 20
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        require("prior", {
            "prior_loss_weight": (finite(self.prior_loss_weight, 0),
                                  f"0 or more, not {self.prior_loss_weight}"),
            "num_class_images": (self.num_class_images >= 0, f"0 or more, not {self.num_class_images}"),
            "sample_batch_size": (self.sample_batch_size >= 1, f"1 or more, not {self.sample_batch_size}"),
            "num_inference_steps": (1 <= self.num_inference_steps <= 1000,
                                    f"from 1 to 1000, not {self.num_inference_steps}"),
            "guidance_scale": (finite(self.guidance_scale, 0), f"0 or more, not {self.guidance_scale}"),
        })


@dataclass
class StopWhen(Section):
    """When a run ends before train.max_train_steps: early stopping by a measure (Prechelt 1998, section 2).

    The fields except `measure` and `bound` have the names, the meaning and the defaults of PyTorch Lightning's callback
    EarlyStopping, where `measure` is named monitor and `bound` stopping_threshold.
    """

    measure: str | None = None
    patience: int | None = 3
    min_delta: float = 0.0
    mode: Direction | None = None
    bound: float | None = None

    def __post_init__(self) -> None:
        require("train.stop_when", {
            "patience": (self.patience is None or self.patience >= 1,
                         f"1 or more measurements, or null for no patience rule, not {self.patience}"),
            "min_delta": (finite(self.min_delta, 0), f"0 or more, not {self.min_delta}"),
            "bound": (self.bound is None or finite(self.bound, -math.inf),
                      f"a finite number, or null for no bound, not {self.bound}"),
        })


@dataclass
class Train(Section):
    """Settings of training. A step is one step of the optimizer, and `step` counts completed steps."""

    max_train_steps: int = 800
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None
    learning_rate: float = 5e-6
    lr_scheduler: LrSchedule = LrSchedule.constant
    lr_warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    seed: int = 0
    train_text_encoder: bool = False
    text_encoder_learning_rate: float | None = None
    use_ema: bool = True
    ema_decay: float = 0.9999
    snr_gamma: float | None = None
    debiased_estimation: bool = False
    huber_delta: float | None = None
    noise_offset: float = 0.0
    multires_noise: float = 0.0
    compile: bool = False
    compile_cache: str | None = None
    channels_last: bool = False
    validate_every: int | None = 50
    stop_when: StopWhen = field(default_factory=StopWhen)

    def __post_init__(self) -> None:
        require("train", {
            "max_train_steps": (self.max_train_steps >= 1, f"1 or more, not {self.max_train_steps}"),
            "train_batch_size": (self.train_batch_size >= 1, f"1 or more, not {self.train_batch_size}"),
            "gradient_accumulation_steps": (self.gradient_accumulation_steps >= 1,
                                            f"1 or more, not {self.gradient_accumulation_steps}"),
            "global_batch_size": (self.global_batch_size is None or self.global_batch_size >= 1,
                                  f"1 or more photos, or null, not {self.global_batch_size}"),
            "learning_rate": (finite(self.learning_rate, 0) and self.learning_rate > 0,
                              f"above 0, not {self.learning_rate}"),
            "text_encoder_learning_rate": (
                self.text_encoder_learning_rate is None or (finite(self.text_encoder_learning_rate, 0)
                                                            and self.text_encoder_learning_rate > 0),
                f"above 0, or null for train.learning_rate, not {self.text_encoder_learning_rate}"),
            "lr_warmup_steps": (self.lr_warmup_steps >= 0, f"0 or more, not {self.lr_warmup_steps}"),
            "max_grad_norm": (self.max_grad_norm is None or self.max_grad_norm > 0,
                              f"above 0, or null for no clipping, not {self.max_grad_norm}"),
            "seed": (0 <= self.seed < 2**63, f"from 0 to 2**63 - 1, not {self.seed}"),
            "ema_decay": (0 <= self.ema_decay < 1, f"in [0, 1), not {self.ema_decay}"),
            "snr_gamma": (self.snr_gamma is None or self.snr_gamma > 0,
                          f"above 0, or null for no weighting, not {self.snr_gamma}"),
            "huber_delta": (self.huber_delta is None or 0 < self.huber_delta <= 1,
                            f"above 0 and at most 1, or null for the mean squared error, not {self.huber_delta}"),
            "multires_noise": (0 <= self.multires_noise < 1, f"in [0, 1), not {self.multires_noise}"),
            "noise_offset": (finite(self.noise_offset, 0), f"0 or more, not {self.noise_offset}"),
            "compile_cache": (self.compile_cache is None or "://" not in self.compile_cache,
                              f"a local folder, or null, not {self.compile_cache}"),
            "validate_every": (self.validate_every is None or self.validate_every >= 1,
                               f"1 or more, or null for never, not {self.validate_every}"),
        })


def batch_problems(train: Train, prior: Prior) -> Iterator[str]:
    """Yield one sentence per setting that contradicts train.global_batch_size."""
    if train.global_batch_size is None:
        return
    key = f"train.global_batch_size={train.global_batch_size}"
    if train.gradient_accumulation_steps > 1:
        yield (f"{key} and the processes determine the number of micro-batches: type "
               "train.gradient_accumulation_steps=1, or train.global_batch_size=null")
    if train.compile:
        yield (f"{key} may give micro-batches of two sizes, and train.compile=true compiles for one size: type "
               "train.compile=false, or train.global_batch_size=null")
    if prior.with_prior_preservation and prior.kind is PriorKind.output:
        yield (f"{key} fixes the number of class images, and prior.kind=output has none: type "
               "prior.kind=class_images, or train.global_batch_size=null")


@dataclass
class Flow(Section):
    """Timestep sampling, shift and loss weighting of flow matching (Esser et al. 2024, arXiv:2403.03206, sec. 3.1).

    Other models, which are trained to predict noise or v, do not use these settings.
    """

    timestep_sampling: TimestepSampling = TimestepSampling.logit_normal
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float | None = None
    loss_weighting: LossWeighting = LossWeighting.none

    def __post_init__(self) -> None:
        require("flow", {
            "logit_mean": (finite(self.logit_mean, -10, 10), f"from -10 to 10, not {self.logit_mean}"),
            "logit_std": (finite(self.logit_std, 0, 10) and self.logit_std > 0,
                          f"above 0 and at most 10, not {self.logit_std}"),
            "mode_scale": (finite(self.mode_scale, -1, 1.75), f"from -1 to 1.75, not {self.mode_scale}"),
            "shift": (self.shift is None or (finite(self.shift, 0, 100) and self.shift > 0),
                      f"above 0 and at most 100, or null for the base model's, not {self.shift}"),
        })

    @property
    def changed_keys(self) -> list[str]:
        """The keys, such as flow.shift, whose values differ from the defaults."""
        default = Flow()
        return [f"flow.{field.name}" for field in fields(self)
                if getattr(self, field.name) != getattr(default, field.name)]


@dataclass
class Sample(Section):
    """Sample images generated during training, with the same prompts and seeds each time."""

    prompts: list[str] | None = None
    every: int | None = 100
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0
    images_per_prompt: int = 2

    def __post_init__(self) -> None:
        require("sample", {
            "every": (self.every is None or self.every >= 1, f"1 or more, or null for none, not {self.every}"),
            "num_inference_steps": (1 <= self.num_inference_steps <= 1000,
                                    f"from 1 to 1000, not {self.num_inference_steps}"),
            "guidance_scale": (finite(self.guidance_scale, 0), f"0 or more, not {self.guidance_scale}"),
            "seed": (0 <= self.seed < 2**63, f"from 0 to 2**63 - 1, not {self.seed}"),
            "images_per_prompt": (self.images_per_prompt >= 1, f"1 or more, not {self.images_per_prompt}"),
            "prompts": (self.prompts is None or all(p.strip() for p in self.prompts), "a list without empty prompts"),
        })


@dataclass
class Checkpoint(Section):
    """Checkpoints: saved training state, from which a run resumes bit for bit."""

    every: int | None = 100
    keep: int = 2
    resume: str = "auto"

    def __post_init__(self) -> None:
        require("checkpoint", {
            "every": (self.every is None or self.every >= 1,
                      f"1 or more, or null for the end only, not {self.every}"),
            "keep": (self.keep >= 1, f"1 or more, not {self.keep}"),
            "resume": (bool(self.resume), "auto, never, or the path of a checkpoint"),
        })


@dataclass
class Tracking(Section):
    """The tracking server, to which metrics and images are sent in addition to the run folder."""

    kind: TrackingKind = TrackingKind.mlflow
    uri: str | None = None
    experiment: str = "dreambooth"
    required: bool = False
    sweep: str | None = None
    run_name: str | None = None


@dataclass
class Plan(Section):
    """Settings for the output of `python -m dreambooth.plan`. Training does not read them."""

    format: PlanFormat = PlanFormat.table
    plot: str | None = None
    larger_batch: bool = True


@dataclass
class Config:
    """The whole configuration of a run, as the user composed it."""

    run_root: str = "runs"
    name: str = "demo-tiny-full"
    hardware: Hardware = field(default_factory=Hardware)
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    precision: Precision = field(default_factory=Precision)
    attention: Attention = field(default_factory=Attention)
    memory: Memory = field(default_factory=Memory)
    optimizer: Optimizer = field(default_factory=Optimizer)
    dataset: Dataset = field(default_factory=Dataset)
    prior: Prior = field(default_factory=Prior)
    train: Train = field(default_factory=Train)
    flow: Flow = field(default_factory=Flow)
    sample: Sample = field(default_factory=Sample)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    tracking: Tracking = field(default_factory=Tracking)
    storage: Storage = field(default_factory=Storage)
    budget: RunBudget = field(default_factory=RunBudget)
    plan: Plan = field(default_factory=Plan)
