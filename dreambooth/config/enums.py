"""The values that named options of a run can take."""

from enum import Enum


class Device(Enum):
    cpu = "cpu"
    cuda = "cuda"
    local = "local"  # whatever this machine has


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


class Targets(Enum):
    attention = "attention"  # projections of queries, keys, values and outputs
    transformer = "transformer"  # also feed-forward layers and projections into and out of transformers
    all = "all"  # every linear layer and convolution


class BaseWeights(Enum):
    half = "half"  # the compute precision
    nf4 = "nf4"  # 4 bits, bitsandbytes


class OptimizerKind(Enum):
    adamw = "adamw"
    adamw8bit = "adamw8bit"
    paged_adamw8bit = "paged_adamw8bit"
    adafactor = "adafactor"


class PlanFormat(Enum):
    table = "table"
    json = "json"


class TrackingKind(Enum):
    mlflow = "mlflow"
    none = "none"


class EmaDevice(Enum):
    same = "same"  # beside the weights
    cpu = "cpu"


class EncoderKind(Enum):
    efficientnet_lite0 = "efficientnet_lite0"  # offline
    dino = "dino"
    clip = "clip"
    paper = "paper"  # dino and clip
    none = "none"


class LatentCache(Enum):
    device = "device"
    cpu = "cpu"
    disk = "disk"


class Weights(Enum):
    full = "full"  # fp32
    half = "half"  # the compute precision's format


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
