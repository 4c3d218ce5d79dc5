"""The interface of a model family: everything in which one family of base models differs from another.

A family is one file in this folder: a subclass of `Family` and one instance of it. Code outside this folder never names
a family. It uses `parts.family` (components.py), or the functions of `dreambooth.models.families`.

To add a family:

1. Write `models/families/NAME.py` with a subclass of `Family` and an instance of it. Add the instance to the list
   `families.FAMILIES`. For a family with a UNet, an AutoencoderKL and CLIP text encoders, derive the subclass from
   `latent_unet.LatentUNet`, as sdxl.py does.
2. Write `conf/model/NAME.yaml` with the defaults of a run. Copy the configurations of the family's published model to
   `assets/architectures/NAME/`. `python -m dreambooth.plan` builds the model from them, without weights.
3. Add a tiny model of the family to tests/support/tiny_models.py. The tests of models/ then train it, resume training,
   convert it and generate pictures.

How the interface supports other architectures:

- A transformer in place of the UNet: `denoiser` is a part named `transformer`. This name is the part's subfolder, its
  argument name in the pipeline, and the prefix of its weights in checkpoints. `predict` packs latents into tokens and
  unpacks the prediction. `set_attention` and `recompute_activations` configure the transformer's blocks.
- A text encoder that does not fit on the card beside the denoiser: the family sets `encodes_ahead` and defines
  `prompt_arguments`. With memory.cache_text=true, a run then encodes all its prompts before it loads the denoiser
  (`loading.encode_prompts`), and its pipelines get the encodings in place of prompts.
- Flow matching: `flow_transformer.FlowTransformer` is the base class of such families, and `qwen_text.QwenTransformer`
  of those whose text encoder is a Qwen language model.
- Text embeddings of another shape: outside the family, a run handles one tensor `text` (P, ...) for P prompts, with the
  same shape for every prompt. The family packs all inputs that its denoiser needs, masks included, into this tensor,
  and unpacks it in `predict`.
- Latents that are shifted before they are scaled: `encode` subtracts the shift. The run multiplies the result of
  `encode` by `scaling_factor`.

Imports no torch, because the container looks up hub ids in this folder before a run starts.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.config.enums import AttentionKind, MethodKind, Targets
from dreambooth.errors import UserError
from dreambooth.models.families.file_format import Entry, SingleFileFormat
from dreambooth.models.families.part import Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dreambooth.config.recipe import Recipe
    from dreambooth.config.schema import Flow
    from dreambooth.models.noise_schedule import NoiseSchedule


@dataclass(frozen=True)
class Layout:
    """The part names and configurations of a diffusers folder or hub id; they determine the family of the model."""

    parts: Collection[str]  # names of the parts
    configuration: Callable[[str], Mapping[str, Any]]  # part name -> config.json; empty if missing


class Family(ABC):
    """A family of base models. An instance has no state: its methods receive all models and settings as arguments."""

    # -- names -----------------------------------------------------------------------------------------------------

    title: str  # the family's name in messages to users
    architecture: str  # name of the folder in assets/architectures with the configurations of the published model
    hub_ids: tuple[str, ...]  # ids of the published model on the hub
    renamed_hub_ids: Mapping[str, str] = {}  # withdrawn hub id -> current hub id of the same model
    tags: tuple[str, ...] = ()  # tags for model cards
    license: tuple[str, str]  # of the published model: its identifier in model cards on the hub, and its title
    lora_programs: Mapping[MethodKind, str] = dict.fromkeys(  # programs that read adapters in kohya's layout
        MethodKind, "AUTOMATIC1111, ComfyUI and Forge") | {MethodKind.dora: "ComfyUI and Forge"}

    @abstractmethod
    def matches(self, layout: Layout) -> bool:
        """Return whether a diffusers model with this layout belongs to the family. At most one family matches."""

    # -- parts -----------------------------------------------------------------------------------------------------

    denoiser: Part  # the module that predicts noise
    vae: Part
    encoders: tuple[Part, ...]  # text encoders, in the order of all `encoders` arguments
    tokenizers: tuple[str, ...]  # names of the tokenizers, in the order of all `tokenizers` arguments
    embedding_keys: tuple[str, ...] = ()  # keys of embedding files, one per text encoder; (): no new tokens

    @abstractmethod
    def load_tokenizer(self, name: str, source: str | Path, **options: Any) -> Any:
        """Load a tokenizer from a folder or hub id.

        Raises:
            OSError, ValueError: `source` does not contain the tokenizer.
        """

    @abstractmethod
    def packaged_tokenizer(self, name: str) -> Any:
        """Build the published model's tokenizer from files of this package. Single files contain no tokenizer.

        Raises:
            ValueError: this package does not contain the family's tokenizer.
        """

    @abstractmethod
    def save_tokenizer(self, tokenizer: Any, folder: Path) -> None:
        """Write the files of a tokenizer to `folder`."""

    def load_extras(self, source: str, layout: Layout, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
        """Return the parts that a run exports but does not use, such as a safety checker, by pipeline argument name."""
        return {}

    def current_name(self, name: str, names: Collection[str]) -> str:
        """Return the current name of a weight. Older library versions wrote some weights under other names.

        Args:
            name: the weight's name in a diffusers folder.
            names: the current names of all weights of the part.
        """
        return name

    # -- prompts to conditions -------------------------------------------------------------------------------------

    @abstractmethod
    def check_prompt(self, tokenizers: Sequence[Any], prompt: str) -> None:
        """Check that the text encoders can read the whole prompt.

        Raises:
            UserError: the prompt has more tokens than the model reads.
        """

    @abstractmethod
    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        """Return the token ids of one prompt, (1, ...).

        Raises:
            UserError: the prompt has more tokens than the model reads.
        """

    @abstractmethod
    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        """Return a tensor with the shape and type of the token ids of `count` prompts; its values have no meaning."""

    @abstractmethod
    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        """Return the text encoders' output for token ids (P, ...) of P prompts: one tensor (P, ...)."""

    @abstractmethod
    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        """Return an uninitialised fp32 tensor with the shape that `text` returns for `count` prompts."""

    encodes_ahead: bool = False  # whether runs encode all prompts, and release the encoders, before the denoiser loads

    def prompt_arguments(self, pipeline: Any, text: Tensor, negative: Tensor) -> dict[str, Any]:
        """Return the arguments of the pipeline that take the place of its prompts, if the prompts are encoded already.

        Only families with `encodes_ahead` define this method.

        Args:
            text: the text encoders' output for the prompts, (N, ...); see the method `text`.
            negative: the same for the negative prompts, which are empty by default.
        """
        raise NotImplementedError(f"{self.title} generates pictures with its text encoders")

    def untrainable(self, denoiser: Any, encoders: Sequence[Any]) -> list[nn.Module]:
        """Return the modules that do not affect the output of `predict` or `text`. They get no gradient.

        Args:
            encoders: the text encoders; empty if they have been released.
        """
        return []

    # -- the denoiser ----------------------------------------------------------------------------------------------

    overflows_in_fp16: bool = False  # whether activations of the published model are known to overflow in fp16
    uses_size_and_crop: bool = False  # whether the denoiser uses the argument `size_and_crop` of `predict`

    @abstractmethod
    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, text: Tensor, vae_scale: int,
                size_and_crop: Tensor | None = None) -> Tensor:
        """Return the denoiser's prediction (N, C, h, w).

        Args:
            latents: noisy latents (N, C, h, w).
            timesteps: (N,), or 0-d: one timestep for all samples.
            text: the text encoders' output, (N, ...); see the method `text`.
            vae_scale: image side in pixels divided by latent side.
            size_and_crop: the original size, crop position and crop size of each image, (N, 6) in pixels, see
                `Batches.size_and_crop`; None: uncropped images of the size of the latents.
        """

    @abstractmethod
    def set_attention(self, denoiser: Any, kind: AttentionKind) -> None:
        """Set the attention implementation of the denoiser."""

    @abstractmethod
    def recompute_activations(self, denoiser: Any, groups: int) -> None:
        """Enable gradient checkpointing in the denoiser.

        Args:
            groups: number of parts into which a batch is split. Activations are recomputed for one part at a time.
        """

    def blocks(self, denoiser: Any) -> Sequence[nn.Module]:
        """Return the blocks of the denoiser that compute one after the other and can be swapped; see block_swap.py."""
        return []

    @abstractmethod
    def latent_channels(self, denoiser: Any) -> int:
        """Return the number of input channels of the denoiser."""

    @abstractmethod
    def levels(self, denoiser: Any) -> int:
        """Return the number of resolutions inside the denoiser; each has half the side of the previous one."""

    @abstractmethod
    def native_side(self, denoiser: Any, vae: Any, vae_scale: int) -> int:
        """Return the side, in pixels, of the square pictures that the base model was trained on."""

    @abstractmethod
    def with_native_side(self, configuration: Mapping[str, Any], latent_side: int) -> dict[str, Any]:
        """Return the denoiser's configuration, changed as if the model was trained on latents of side `latent_side`."""

    # -- pixels to latents -----------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of the latents of `pixels`.

        The denoiser receives a sample of the normal distribution with these parameters, multiplied by `scaling_factor`.

        Args:
            pixels: (N, 3, H, W), in [-1, 1].

        Returns:
            Two fp32 tensors (N, C, h, w).
        """

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w), already divided by `scaling_factor`, to pixels (N, 3, H, W)."""

    def vae_scale(self, vae_configuration: Mapping[str, Any]) -> int:
        """Return the image side in pixels divided by the latent side: 8 for most published VAEs."""
        return int(2 ** (len(vae_configuration["block_out_channels"]) - 1))

    def scaling_factor(self, vae_configuration: Mapping[str, Any]) -> float:
        """Return the factor by which the VAE's latents are multiplied before the denoiser receives them."""
        return float(vae_configuration["scaling_factor"])

    def vae_channels(self, vae_configuration: Mapping[str, Any]) -> int:
        """Return the number of channels of the VAE's latents."""
        return int(vae_configuration["latent_channels"])

    def half_overflows(self, vae_configuration: Mapping[str, Any]) -> bool:
        """Return whether the VAE outputs NaN in fp16 and must therefore compute in fp32."""
        return False

    def is_half_safe(self, source: str) -> bool:
        """Return whether the name of a VAE (hub id or single file) indicates that it does not overflow in fp16."""
        return False

    def mark_half_safe(self, vae_configuration: Mapping[str, Any], safe: bool) -> dict[str, Any]:
        """Return the VAE's configuration, marked as not overflowing in fp16 if `safe`, else as overflowing."""
        return dict(vae_configuration)

    # -- noise -----------------------------------------------------------------------------------------------------

    def check_training(self, recipe: Recipe) -> None:
        """Check that the base model can be trained with the settings of a recipe.

        Raises:
            UserError: a setting has no meaning for this family.
        """
        if changed := recipe.flow.changed_keys:
            raise UserError(f"{changed[0]} is a setting of flow matching, which {self.title} does not use: leave "
                            f"{' and '.join(changed)} out")
        if recipe.memory.swap_blocks:
            raise UserError(f"{self.title} has no blocks to swap: type memory.swap_blocks=null")

    @abstractmethod
    def noise_schedule(self, scheduler_config: Mapping[str, Any], flow: Flow, latent_side: int) -> NoiseSchedule:
        """Return the forward process and training target of the base model.

        Args:
            flow: the noise levels to train; only families of flow matching use them.
            latent_side: side of the latents of a square picture of the training resolution.
        """

    def rescale_to_zero_snr(self, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a scheduler configuration with the same noise schedule, rescaled to zero terminal SNR.

        Raises:
            UserError: the family's noise schedule cannot be rescaled.
        """
        raise UserError(f"the noise schedule of {self.title} has no terminal SNR to rescale: type "
                        "model.zero_terminal_snr=false")

    @abstractmethod
    def sampling_scheduler(self, scheduler_config: Mapping[str, Any]) -> Any:
        """Return the scheduler for generating pictures, with the noise schedule of `scheduler_config`."""

    # -- pipelines -------------------------------------------------------------------------------------------------

    pipeline_module: str  # the Python module that defines the text-to-image pipeline of diffusers
    pipeline_name: str  # its class
    sampler_title = "DPM++ 2M"  # name of the sampling scheduler in the metadata of generated pictures
    no_guidance = 1.0  # highest guidance_scale at which the pipeline does not compute the unconditional prediction

    def sampling_arguments(self, pipeline: Any) -> dict[str, Any]:
        """Return arguments of the pipeline, beside prompts and sampling settings, that every call needs."""
        return {}

    def guidance_arguments(self, scale: float, count: int) -> dict[str, Any]:
        """Return the pipeline's arguments for `count` pictures with classifier-free guidance of this scale."""
        return {"guidance_scale": scale}

    @abstractmethod
    def side_multiple(self, pipeline: Any) -> int:
        """Return the number of pixels of which the pipeline requires both sides of a picture to be multiples."""

    @property
    def pipeline_type(self) -> Any:
        """The text-to-image pipeline class of diffusers, imported on first use."""
        return getattr(import_module(self.pipeline_module), self.pipeline_name)

    @abstractmethod
    def build_pipeline(self, parts: Mapping[str, Any], scheduler: Any) -> Any:
        """Return a text-to-image pipeline with the parts themselves, not copies.

        Args:
            parts: modules, tokenizers and extras by the pipeline's argument names.
        """

    def image_to_image(self, pipeline: Any) -> Any:
        """Return an image-to-image pipeline that shares the parts of `pipeline`.

        It follows SDEdit (Meng et al. 2021, arXiv:2108.01073).

        Raises:
            UserError: diffusers has no such pipeline for this family.
        """
        import diffusers

        checks = {key: pipeline.config[key] for key in ("requires_safety_checker",) if key in pipeline.config}
        kind = self.pipeline_name.replace("Pipeline", "Img2ImgPipeline")
        return getattr(diffusers, kind)(**pipeline.components, **checks)

    # -- adapters --------------------------------------------------------------------------------------------------

    adapter_targets: Mapping[Targets, re.Pattern[str]]  # -> pattern of the layer names inside a part

    diffusers_lacks: re.Pattern[str] = re.compile("(?!)")  # keys in kohya's layout that diffusers does not read: none
    loads_lokr = False  # whether load_lora_weights of diffusers' pipeline opens a LoKr

    def published_name(self, name: str) -> str:
        """Return the name (`PART.NAME`) that LoRA files use for a module; `name` is its name in current libraries."""
        return name

    @abstractmethod
    def kohya_entries(self, names: Collection[str], denoiser_config: Any, separate: bool = False) -> Iterator[Entry]:
        """Yield an entry for each layer of an adapter in kohya's LoRA layout.

        The key of an entry lacks the suffix that names the tensor, such as `.alpha`. The names of an entry are module
        names. Its form says how the weights of these modules become the weight of the layer in the file's model.

        Args:
            names: the names (`PART.NAME`) of all modules with an adapter.
            denoiser_config: the configuration of the denoiser (`module.config`).
            separate: whether each module has an entry of its own, of form plain.
        """

    @abstractmethod
    def kohya_metadata(self, prediction_type: str) -> dict[str, str]:
        """Return the metadata by which other programs recognise the base model of a LoRA file in kohya's layout.

        Args:
            prediction_type: the prediction_type of diffusers.
        """

    # -- the planner -----------------------------------------------------------------------------------------------

    # GiB of activations that the forward pass keeps per image of 512 x 512 pixels, with (True) and without (False)
    # gradient checkpointing. With this lower bound, memory=auto excludes options that cannot fit without a rehearsal.
    activations_gib: Mapping[bool, float]
    extra_parts: Mapping[str, int] = {}  # other parts of the published model's pipeline: name -> number of weights

    # -- single files ----------------------------------------------------------------------------------------------

    single_file: SingleFileFormat

    def parts(self) -> Iterator[Part]:
        """Yield all parts with weights: the denoiser, the VAE, the text encoders."""
        yield self.denoiser
        yield self.vae
        yield from self.encoders
