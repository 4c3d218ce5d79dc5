"""The names that the seed blog's notebook sends, and what each is called here: one table."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from dreambooth.config.storage import is_remote
from dreambooth.container import hyperparameter_values
from dreambooth.container.sagemaker_paths import Places
from dreambooth.errors import ConfigError

SUCCESSORS = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}  # withdrawn -> the same
PRECISIONS = {"no": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
ATTENTIONS = {"default": "sdpa", "sdpa": "sdpa", "xformers": "xformers", "sliced": "sliced", "eager": "eager"}


@dataclass
class Blog:
    """What the blog's names ask for."""

    overrides: dict[str, str] = field(default_factory=dict)  # key -> value in Hydra's grammar
    names: dict[str, str] = field(default_factory=dict)  # key -> the blog's name that asked for it
    paths: dict[str, str] = field(default_factory=dict)  # key -> a folder, or a hub id
    notices: list[str] = field(default_factory=list)
    epochs: bool = False  # checkpoint.every counts passes over the photos
    upload: str | None = None  # an S3 folder for a copy of the model


Reader = Callable[[str], str]  # as it came -> value in Hydra's grammar


def _word(raw: str) -> str:
    return hyperparameter_values.quoted(hyperparameter_values.text(raw))


def _truth(raw: str) -> str:
    return str(hyperparameter_values.truth(raw)).lower()


def _opposite(raw: str) -> str:
    return str(not hyperparameter_values.truth(raw)).lower()


def _whole(raw: str) -> str:
    return str(hyperparameter_values.whole(raw))


def _number(raw: str) -> str:
    return repr(hyperparameter_values.number(raw))


def _one_of(known: Mapping[str, str]) -> Reader:
    def read(raw: str) -> str:
        word = hyperparameter_values.text(raw)
        if word not in known:
            raise ValueError(f"must be one of {', '.join(known)}, not {word!r}")
        return known[word]
    return read


def _adam(raw: str) -> str:
    return "adamw8bit" if hyperparameter_values.truth(raw) else "adamw"


TABLE: dict[str, tuple[str, Reader]] = {  # the blog's name -> key here, how its value is read
    "model_name": ("name", _word),
    "mixed_precision": ("precision", _one_of(PRECISIONS)),
    "with_prior_preservation": ("prior.with_prior_preservation", _truth),
    "instance_prompt": ("dataset.instance_prompt", _word),
    "class_prompt": ("dataset.class_prompt", _word),
    "resolution": ("model.resolution", _whole),
    "train_batch_size": ("train.train_batch_size", _whole),
    "sample_batch_size": ("prior.sample_batch_size", _whole),
    "gradient_accumulation_steps": ("train.gradient_accumulation_steps", _whole),
    "learning_rate": ("train.learning_rate", _number),
    "lr_scheduler": ("train.lr_scheduler", _word),
    "lr_warmup_steps": ("train.lr_warmup_steps", _whole),
    "num_class_images": ("prior.num_class_images", _whole),
    "max_train_steps": ("train.max_train_steps", _whole),
    "save_steps": ("checkpoint.every", _whole),
    "attention": ("attention", _one_of(ATTENTIONS)),
    "prior_loss_weight": ("prior.prior_loss_weight", _number),
    "use_ema": ("train.use_ema", _truth),
    "train_text_encoder": ("train.train_text_encoder", _truth),
    "not_cache_latents": ("memory.cache_latents", _opposite),
    "gradient_checkpointing": ("memory.gradient_checkpointing", _truth),
    "use_8bit_adam": ("optimizer", _adam),
}
PATHS = {
    "pretrained_model_name_or_path": "model.source",
    "instance_data_dir": "dataset.instance_dir",
    "class_data_dir": "dataset.class_dir",
}
APART = ("models_path", "manul_upload_model_path", "save_use_epochs")  # no key here; the blog spells it so
NAMES = (*TABLE, *PATHS, *APART)


def read(hyperparameters: Mapping[str, str], places: Places) -> Blog:
    """What those hyperparameters ask for that have the blog's names.

    Raises:
        ConfigError: values are not what their names ask for; all of them, each by its name.
    """
    blog = Blog()
    problems: list[str] = []
    for name, raw in hyperparameters.items():
        try:
            if name in TABLE:
                key, reader = TABLE[name]
                blog.overrides[key], blog.names[key] = reader(raw), name
            elif name in PATHS:
                key = PATHS[name]
                blog.paths[key], blog.names[key] = _path(blog, hyperparameter_values.text(raw), places), name
            elif name in APART:
                problems += _apart(blog, name, raw, places)
        except ValueError as error:
            problems.append(f"{name} {error}")
    if problems:
        raise ConfigError(*problems)
    return blog


def _path(blog: Blog, path: str, places: Places) -> str:
    if path in SUCCESSORS:
        blog.notices.append(f"{path} was withdrawn from the hub: {SUCCESSORS[path]} is the same model, and is taken")
    return places.meant(SUCCESSORS.get(path, path))


def _apart(blog: Blog, name: str, raw: str, places: Places) -> Iterator[str]:
    if name == "save_use_epochs":
        blog.epochs = hyperparameter_values.truth(raw)
    elif name == "manul_upload_model_path":
        blog.upload = hyperparameter_values.text(raw) or None
        if blog.upload and not is_remote(blog.upload):
            yield f"{name} must be a folder in S3, such as s3://BUCKET/PREFIX, not {blog.upload!r}"
    elif places.meant(hyperparameter_values.text(raw)).rstrip("/") != str(places.model):
        yield f"{name} must be {places.model}, which SageMaker keeps, not {hyperparameter_values.text(raw)!r}"
