"""Enums of the values that settings of a run accept. The files in conf/ explain each value."""

from enum import Enum


class Device(Enum):
    cpu = "cpu"
    cuda = "cuda"
    local = "local"  # cuda if this machine has a CUDA GPU, else cpu


class Dtype(Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class AttentionKind(Enum):
    sdpa = "sdpa"
    xformers = "xformers"
    sliced = "sliced"
    eager = "eager"


class MethodKind(Enum):
    full = "full"
    lora = "lora"
    dora = "dora"
    lokr = "lokr"
    loha = "loha"


class Targets(Enum):
    attention = "attention"  # query, key, value and output projections of attention
    transformer = "transformer"  # also feed-forward layers and the input and output projections of transformer blocks
    all = "all"  # all linear layers and convolutions


class BaseWeights(Enum):
    half = "half"  # stored in the compute precision
    int8 = "int8"  # 8 bits per weight of linear layers, and one scale per row
    fp8 = "fp8"  # the same with floating-point numbers of 8 bits (e4m3)
    nf4 = "nf4"  # quantised to 4 bits by bitsandbytes


FP8_CAPABILITY = 8.9  # lowest compute capability with BaseWeights.fp8


class OptimizerKind(Enum):
    adamw = "adamw"
    adamw8bit = "adamw8bit"
    paged_adamw8bit = "paged_adamw8bit"
    adafactor = "adafactor"
    prodigy = "prodigy"
    schedule_free = "schedule_free"
    lion = "lion"
    came = "came"
    ademamix8bit = "ademamix8bit"
    muon = "muon"

    @property
    def is_of_bitsandbytes(self) -> bool:
        """Whether the package bitsandbytes implements the optimizer."""
        return self.value.endswith("8bit")

    @property
    def steps_each_weight_alone(self) -> bool:
        """Whether the update of a weight depends on no other weight's gradient."""
        return self is not OptimizerKind.prodigy

    @property
    def allows_sharding(self) -> bool:
        """Whether memory.fully_shard=true is supported: the update of a number depends on no other number."""
        return self in (OptimizerKind.adamw, OptimizerKind.lion)

    @property
    def allows_half_weights(self) -> bool:
        """Whether memory.weights=half is supported."""
        return self not in (OptimizerKind.prodigy, OptimizerKind.schedule_free, OptimizerKind.muon)

    @property
    def averages_weights(self) -> bool:
        """Whether the optimizer maintains an average of the weights, which takes the place of an EMA."""
        return self is OptimizerKind.schedule_free


class TimestepSampling(Enum):
    uniform = "uniform"
    logit_normal = "logit_normal"
    mode = "mode"


class LossWeighting(Enum):
    none = "none"
    sigma_sqrt = "sigma_sqrt"
    cosmap = "cosmap"


class PriorKind(Enum):
    class_images = "class_images"  # class images, made by the base model or given by the user
    output = "output"  # the base model's prediction for the class prompt, with the adapter disabled


class PlanFormat(Enum):
    table = "table"
    json = "json"


class TrackingKind(Enum):
    mlflow = "mlflow"
    tensorboard = "tensorboard"
    wandb = "wandb"
    all = "all"
    none = "none"

    @property
    def backends(self) -> tuple[str, ...]:
        """Where the journal of a run is sent: to mlflow, tensorboard and wandb, or to some of them."""
        several = {TrackingKind.none: (), TrackingKind.all: ("mlflow", "tensorboard", "wandb")}
        return several.get(self, (self.value,))

    @property
    def uses_mlflow(self) -> bool:
        """Whether metrics and images are sent to MLflow."""
        return "mlflow" in self.backends


class Direction(Enum):
    min = "min"
    max = "max"


class EmaDevice(Enum):
    same = "same"  # on the device of the weights
    cpu = "cpu"


class EncoderKind(Enum):
    efficientnet_lite0 = "efficientnet_lite0"  # installed with the package, works offline
    dino = "dino"
    clip = "clip"
    paper = "paper"  # both dino and clip
    none = "none"


class LatentCache(Enum):
    device = "device"
    cpu = "cpu"
    disk = "disk"


class Weights(Enum):
    full = "full"  # fp32
    half = "half"  # the format of the compute precision


class Rounding(Enum):
    stochastic = "stochastic"
    kahan = "kahan"


class LrSchedule(Enum):
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    linear = "linear"
    cosine = "cosine"
    cosine_with_restarts = "cosine_with_restarts"
    polynomial = "polynomial"

    @property
    def depends_on_length(self) -> bool:
        """Whether the learning rate of a step depends on train.max_train_steps."""
        return self not in (LrSchedule.constant, LrSchedule.constant_with_warmup)
