"""The interface of a model family: everything in which one family of base models differs from another.

A family is one file in this folder: a subclass of `Family` and one instance of it. Code outside this folder never names
a family. It asks `parts.family` (see components.py), or the functions of `dreambooth.models.families`.

To add a family:

1. `models/families/NAME.py`: a subclass of `Family`, its instance, and the instance in `families.FAMILIES`. A family
   with a UNet, an AutoencoderKL and CLIP text encoders inherits from `latent_unet.LatentUNet`, as sdxl.py shows.
2. `conf/model/NAME.yaml`: the defaults of a run. `assets/architectures/NAME/`: the configurations of its published
   model, from which `python -m dreambooth.plan` builds it without weights.
3. A tiny model of it in tests/support/tiny_models.py; the tests of models/ then train, resume, convert and sample it.

What the interface leaves to a family:

- A transformer in place of the UNet: `denoiser` is a part named `transformer`. Its name is the subfolder, the argument
  of the pipeline and the prefix of weights in checkpoints. `predict` packs latents into tokens and back, and
  `set_attention` and `recompute_activations` do what its blocks need.
- A text encoder that does not fit on the card beside the denoiser: text encoders are used only through `tokens` and
  `text`. While a run caches what they return, the denoiser is in host memory (training/setup.py, phase `caching`);
  during the steps the encoders are (`loading.idle_modules`). Such a family sets memory.cache_text=true and
  train.train_text_encoder=false in its YAML. Two functions would have to change for it: `loading.load` moves all parts
  to the device at once, and `ModuleOffload.on_device` brings all idle modules back to draw samples.
- Flow matching: `noise_schedule` returns any `NoiseSchedule`, and `sampling_scheduler` the scheduler that draws.
- Text of another shape: the rest of a run handles one tensor per prompt, `text` (P, ...), of equal shape for all
  prompts. A family packs into it what its denoiser needs, masks included, and unpacks it in `predict`.
- Latents with a shift beside a scale: `encode` subtracts the shift, since `scaling_factor` is applied to its result.

Imports no torch: the container asks this folder about hub ids before a run starts.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.config.enums import AttentionKind, Targets
from dreambooth.errors import UserError
from dreambooth.models.families.file_format import SingleFileFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dreambooth.models.noise_schedule import NoiseSchedule


@dataclass(frozen=True)
class Part(ABC):
    """A module with weights: how it is called and loaded."""

    name: str  # of its subfolder, of the pipeline's argument, and the prefix of its weights in checkpoints
    module: str  # that defines its class
    class_name: str

    @property
    def type(self) -> Any:
        """Its class, imported on first use."""
        return getattr(import_module(self.module), self.class_name)

    @abstractmethod
    def load(self, source: str, dtype: torch.dtype, **options: Any) -> Any:
        """Load it with weights.

        Args:
            source: a folder or hub id.
            options: subfolder, revision, variant, local_files_only.

        Raises:
            OSError, ValueError, SafetensorError: it is not there, or is damaged.
        """

    @abstractmethod
    def configuration(self, source: str | Path, **options: Any) -> dict[str, Any]:
        """Read its configuration.

        Raises:
            OSError, ValueError: there is none.
        """

    @abstractmethod
    def build(self, configuration: Mapping[str, Any]) -> Any:
        """Build it from a configuration alone, with random weights."""


class DiffusersPart(Part):
    """A part whose class is one of diffusers."""

    def load(self, source: str, dtype: torch.dtype, **options: Any) -> Any:
        return self.type.from_pretrained(source, torch_dtype=dtype, **options)

    def configuration(self, source: str | Path, **options: Any) -> dict[str, Any]:
        return dict(self.type.load_config(source, **options))

    def build(self, configuration: Mapping[str, Any]) -> Any:
        return self.type.from_config(configuration)


class TransformersPart(Part):
    """A part whose class is one of transformers."""

    def load(self, source: str, dtype: torch.dtype, **options: Any) -> Any:
        return self.type.from_pretrained(source, dtype=dtype, **options)

    def configuration(self, source: str | Path, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.type.config_class.from_pretrained(source, **options).to_dict()
        return found

    def build(self, configuration: Mapping[str, Any]) -> Any:
        return self.type(self.type.config_class(**configuration))


@dataclass(frozen=True)
class Layout:
    """What a diffusers folder or hub id says about itself, without its weights."""

    parts: Collection[str]  # names of its parts
    configuration: Callable[[str], Mapping[str, Any]]  # name of a part -> its config.json; empty if there is none


class Family(ABC):
    """A family of base models. Instances have no state: everything that they need is passed to them."""

    # -- names -----------------------------------------------------------------------------------------------------

    title: str  # in messages to users
    architecture: str  # its published model: a folder of assets/architectures
    hub_ids: tuple[str, ...]  # under which that model is published
    renamed_hub_ids: Mapping[str, str] = {}  # id that was withdrawn from the hub -> id of the same model
    tags: tuple[str, ...] = ()  # of a model card

    @abstractmethod
    def matches(self, layout: Layout) -> bool:
        """Whether a diffusers folder holds a model of this family. At most one family matches."""

    # -- parts -----------------------------------------------------------------------------------------------------

    denoiser: Part  # the module that predicts noise
    vae: Part
    encoders: tuple[Part, ...]  # text encoders, in order
    tokenizers: tuple[str, ...]  # names of their tokenizers, in order

    @abstractmethod
    def load_tokenizer(self, name: str, source: str | Path, **options: Any) -> Any:
        """Load a tokenizer from a folder or hub id.

        Raises:
            OSError, ValueError: it is not there.
        """

    @abstractmethod
    def packaged_tokenizer(self, name: str) -> Any:
        """Build the tokenizer of the published model from the package; single files hold none."""

    @abstractmethod
    def save_tokenizer(self, tokenizer: Any, folder: Path) -> None:
        """Write a tokenizer's files."""

    def load_extras(self, source: str, layout: Layout, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
        """Load what is exported with the model and never trained, by the pipeline's argument: a safety checker."""
        return {}

    def current_name(self, name: str, names: Collection[str]) -> str:
        """Return a weight's name as libraries call it now, for a folder that an older version has written.

        Args:
            names: all weights of the part.
        """
        return name

    # -- prompts to conditions -------------------------------------------------------------------------------------

    @abstractmethod
    def check_prompt(self, tokenizers: Sequence[Any], prompt: str) -> None:
        """Check a prompt's length.

        Raises:
            UserError: it has more tokens than the model reads.
        """

    @abstractmethod
    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        """Return the token ids of a prompt, with a first dimension of 1.

        Raises:
            UserError: the prompt has more tokens than the model reads.
        """

    @abstractmethod
    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        """Return token ids of `count` prompts with the right shape and any values."""

    @abstractmethod
    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        """Return what the text encoders compute from token ids (P, ...): one tensor (P, ...)."""

    @abstractmethod
    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        """Return a tensor of the shape of `text` for `count` prompts, fp32, without computing it."""

    def untrainable(self, encoders: Sequence[Any]) -> list[nn.Module]:
        """Return the modules of the encoders that `text` does not depend on: they get no gradient."""
        return []

    # -- the denoiser ----------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, text: Tensor, vae_scale: int) -> Tensor:
        """Return the denoiser's prediction (N, C, h, w).

        Args:
            latents: (N, C, h, w), noisy.
            timesteps: (N,), or 0-d for all rows.
            text: (N, ...), as `text` returns it.
            vae_scale: pixels per latent along one side.
        """

    @abstractmethod
    def set_attention(self, denoiser: Any, kind: AttentionKind) -> None:
        """Choose the denoiser's attention kernels."""

    @abstractmethod
    def recompute_activations(self, denoiser: Any, groups: int) -> None:
        """Switch gradient checkpointing on.

        Args:
            groups: parts of a batch that are recomputed one after the other.
        """

    @abstractmethod
    def latent_channels(self, denoiser: Any) -> int:
        """Channels of the latents that the denoiser reads."""

    @abstractmethod
    def levels(self, denoiser: Any) -> int:
        """Number of resolutions at which the denoiser works, each with half the side of the one before."""

    @abstractmethod
    def native_side(self, denoiser: Any, vae_scale: int) -> int:
        """Pixels of a side of the pictures that the base was trained on."""

    @abstractmethod
    def with_native_side(self, configuration: Mapping[str, Any], latent_side: int) -> dict[str, Any]:
        """Return the denoiser's configuration for a base that was trained on latents of another side."""

    # -- pixels to latents -----------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (N, C, h, w), fp32, of the latents of pixels (N, 3, H, W) in [-1, 1].

        The denoiser sees a sample of that distribution times `scaling_factor`.
        """

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Return pixels (N, 3, H, W) of unscaled latents (N, C, h, w)."""

    @abstractmethod
    def vae_scale(self, vae_configuration: Mapping[str, Any]) -> int:
        """Pixels per latent along one side."""

    @abstractmethod
    def scaling_factor(self, vae_configuration: Mapping[str, Any]) -> float:
        """Factor between the VAE's latents and those that the denoiser sees."""

    @abstractmethod
    def vae_channels(self, vae_configuration: Mapping[str, Any]) -> int:
        """Channels of the latents that the VAE makes."""

    def half_overflows(self, vae_configuration: Mapping[str, Any]) -> bool:
        """Whether the VAE gives NaN in fp16, and must compute in fp32."""
        return False

    def is_half_safe(self, source: str) -> bool:
        """Whether the name of a VAE (a hub id or a single file) says that fp16 does not overflow in it."""
        return False

    def mark_half_safe(self, vae_configuration: Mapping[str, Any], safe: bool) -> dict[str, Any]:
        """Return the configuration of a VAE in which fp16 does not overflow, or does."""
        return dict(vae_configuration)

    # -- noise -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def noise_schedule(self, scheduler_config: Mapping[str, Any]) -> NoiseSchedule:
        """Return the forward process and target that the base was trained with."""

    def rescale_to_zero_snr(self, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of the same scheduler with zero terminal SNR.

        Raises:
            UserError: the family's noise schedule cannot be rescaled.
        """
        raise UserError(f"the noise schedule of {self.title} has no terminal SNR to rescale: type "
                        "model.zero_terminal_snr=false")

    @abstractmethod
    def sampling_scheduler(self, scheduler_config: Mapping[str, Any]) -> Any:
        """Return the scheduler that draws pictures, for the noise schedule of this scheduler configuration."""

    # -- pipelines -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def pipeline_type(self) -> Any:
        """The class of diffusers that draws from text, imported on first use."""

    @abstractmethod
    def build_pipeline(self, parts: Mapping[str, Any], scheduler: Any) -> Any:
        """Return a pipeline of diffusers over the parts; nothing is copied.

        Args:
            parts: modules, tokenizers and extras by the pipeline's argument.
        """

    @abstractmethod
    def image_to_image(self, pipeline: Any) -> Any:
        """Return a pipeline over the parts of `pipeline` that starts from a picture."""

    # -- adapters --------------------------------------------------------------------------------------------------

    adapter_targets: Mapping[Targets, re.Pattern[str]]  # -> names, inside a part, of layers that get an adapter

    def published_name(self, name: str) -> str:
        """Return a module's name (`PART.NAME`) as LoRA files have it, where libraries have renamed it since."""
        return name

    @abstractmethod
    def kohya_name(self, name: str) -> str:
        """Return the key of a module (`PART.NAME`) in kohya's LoRA layout, without the tensor's own suffix."""

    # -- the planner -----------------------------------------------------------------------------------------------

    # GiB of activations that the forward pass keeps per image of 512 x 512 pixels, by whether it recomputes
    # activations: a lower bound, which spares memory=auto a rehearsal of what cannot fit.
    activations_gib: Mapping[bool, float]

    # -- single files ----------------------------------------------------------------------------------------------

    single_file: SingleFileFormat

    def parts(self) -> Iterator[Part]:
        """All parts with weights: denoiser, VAE, text encoders."""
        yield self.denoiser
        yield self.vae
        yield from self.encoders
