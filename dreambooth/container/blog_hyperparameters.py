"""Translates blog hyperparameters to configuration keys.

Blog hyperparameters are the hyperparameters in the notebook of an AWS blog post. This project started from this
notebook, see docs/container.md.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from dreambooth.config.storage import is_s3_folder
from dreambooth.container import hyperparameter_values
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.errors import ConfigError
from dreambooth.models import families
from dreambooth.utils.quoting import hydra_string

PRECISIONS = {"no": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
ATTENTIONS = {"default": "sdpa", "sdpa": "sdpa", "xformers": "xformers", "sliced": "sliced", "eager": "eager"}


@dataclass
class BlogSettings:
    """Configuration settings, translated from a job's blog hyperparameters (names from an AWS blog post's notebook)."""

    overrides: dict[str, str] = field(default_factory=dict)  # key -> value in Hydra's grammar
    names: dict[str, str] = field(default_factory=dict)  # key -> name of the hyperparameter that sets it
    paths: dict[str, str] = field(default_factory=dict)  # key -> folder or hub id
    notices: list[str] = field(default_factory=list)  # messages for the log
    save_by_epochs: bool = False  # whether checkpoint.every counts epochs instead of steps
    upload_uri: str | None = None  # S3 folder for a copy of the model


Converter = Callable[[str], str]  # raw hyperparameter -> value in Hydra's grammar


def _format_text(raw: str) -> str:
    return hydra_string(hyperparameter_values.parse_text(raw))


def _format_bool(raw: str) -> str:
    return str(hyperparameter_values.parse_bool(raw)).lower()


def _format_negated_bool(raw: str) -> str:
    return str(not hyperparameter_values.parse_bool(raw)).lower()


def _format_int(raw: str) -> str:
    return str(hyperparameter_values.parse_int(raw))


def _format_float(raw: str) -> str:
    return repr(hyperparameter_values.parse_float(raw))


def _choose_from(options: Mapping[str, str]) -> Converter:
    def choose(raw: str) -> str:
        text = hyperparameter_values.parse_text(raw)
        if text not in options:
            raise ValueError(f"must be one of {', '.join(options)}, not {text!r}")
        return options[text]
    return choose


def _choose_optimizer(raw: str) -> str:
    return "adamw8bit" if hyperparameter_values.parse_bool(raw) else "adamw"


ALIASES: dict[str, tuple[str, Converter]] = {  # blog hyperparameter -> configuration key, value converter
    "model_name": ("name", _format_text),
    "mixed_precision": ("precision", _choose_from(PRECISIONS)),
    "with_prior_preservation": ("prior.with_prior_preservation", _format_bool),
    "instance_prompt": ("dataset.instance_prompt", _format_text),
    "class_prompt": ("dataset.class_prompt", _format_text),
    "resolution": ("model.resolution", _format_int),
    "train_batch_size": ("train.train_batch_size", _format_int),
    "sample_batch_size": ("prior.sample_batch_size", _format_int),
    "gradient_accumulation_steps": ("train.gradient_accumulation_steps", _format_int),
    "learning_rate": ("train.learning_rate", _format_float),
    "lr_scheduler": ("train.lr_scheduler", _format_text),
    "lr_warmup_steps": ("train.lr_warmup_steps", _format_int),
    "num_class_images": ("prior.num_class_images", _format_int),
    "max_train_steps": ("train.max_train_steps", _format_int),
    "save_steps": ("checkpoint.every", _format_int),
    "attention": ("attention", _choose_from(ATTENTIONS)),
    "prior_loss_weight": ("prior.prior_loss_weight", _format_float),
    "use_ema": ("train.use_ema", _format_bool),
    "train_text_encoder": ("train.train_text_encoder", _format_bool),
    "not_cache_latents": ("memory.cache_latents", _format_negated_bool),
    "gradient_checkpointing": ("memory.gradient_checkpointing", _format_bool),
    "use_8bit_adam": ("optimizer", _choose_optimizer),
}
PATH_ALIASES = {  # blog hyperparameter -> configuration key of a folder or hub id
    "pretrained_model_name_or_path": "model.source",
    "instance_data_dir": "dataset.instance_dir",
    "class_data_dir": "dataset.class_dir",
}
# Hyperparameters without a configuration key of their own. The misspelling "manul" is the blog's.
KEYLESS = ("models_path", "manul_upload_model_path", "save_use_epochs")
NAMES = (*ALIASES, *PATH_ALIASES, *KEYLESS)


def parse(hyperparameters: Mapping[str, str], paths: SageMakerPaths) -> BlogSettings:
    """Return the settings for the hyperparameters whose names come from the AWS blog post. Ignore all others.

    Raises:
        ConfigError: a value is not valid. The error lists one problem per invalid hyperparameter.
    """
    settings = BlogSettings()
    problems: list[str] = []
    for name, raw in hyperparameters.items():
        try:
            if name in ALIASES:
                key, convert = ALIASES[name]
                settings.overrides[key], settings.names[key] = convert(raw), name
            elif name in PATH_ALIASES:
                key = PATH_ALIASES[name]
                path = _resolve_path(settings, hyperparameter_values.parse_text(raw), paths)
                settings.paths[key], settings.names[key] = path, name
            elif name in KEYLESS:
                problems += _parse_keyless(settings, name, raw, paths)
        except ValueError as error:
            problems.append(f"{name} {error}")
    if problems:
        raise ConfigError(*problems)
    return settings


def _resolve_path(settings: BlogSettings, path: str, paths: SageMakerPaths) -> str:
    if renamed := families.renamed_hub_id(path):
        settings.notices.append(f"{path} was withdrawn from the hub: using {renamed}, the same model")
    return paths.relocate(renamed or path)


def _parse_keyless(settings: BlogSettings, name: str, raw: str, paths: SageMakerPaths) -> Iterator[str]:
    if name == "save_use_epochs":
        settings.save_by_epochs = hyperparameter_values.parse_bool(raw)
    elif name == "manul_upload_model_path":
        settings.upload_uri = hyperparameter_values.parse_text(raw) or None
        if settings.upload_uri and not is_s3_folder(settings.upload_uri):
            yield f"{name} must be a folder in S3, such as s3://BUCKET/PREFIX, not {settings.upload_uri!r}"
    else:
        path = hyperparameter_values.parse_text(raw)
        if paths.relocate(path).rstrip("/") != str(paths.model):
            yield f"{name} must be {paths.model}, the folder that SageMaker uploads, not {path!r}"
