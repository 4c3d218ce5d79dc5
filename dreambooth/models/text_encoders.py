"""Loads text encoders, and encodes the prompts of runs whose text encoders leave before the denoiser is loaded."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models import hub, prompt_encodings
from dreambooth.models.families.family import Family
from dreambooth.models.prompt_encodings import PromptEncodings
from dreambooth.utils.atomic_files import full_digest, weights_digest

FORMAT = 1  # of the files of encodings; a change of `Family.text` needs another number


def encodes_ahead(family: Family, recipe: Recipe) -> bool:
    """Return whether a run encodes all its prompts, and releases its text encoders, before it loads the denoiser."""
    return family.encodes_ahead and recipe.memory.cache_text and not recipe.encodes_in_step


def load(source: str, family: Family, dtype: torch.dtype | Literal["auto"], **options: Any) -> list[Any]:
    """Load the text encoders of a model into host memory.

    Args:
        source: folder or hub id of the model.
        dtype: precision of the loaded weights; "auto": that of the files.
        options: revision, variant and local_files_only, as in from_pretrained.

    Raises:
        OSError, ValueError, SafetensorError: a text encoder is missing or damaged.
    """
    return [part.load(source, dtype, subfolder=part.name, **options) for part in family.encoders]


def open_encodings(recipe: Recipe, family: Family, tokenizers: Sequence[Any], dtype: torch.dtype, device: torch.device,
                   **options: Any) -> PromptEncodings:
    """Return the stored encodings of prompts. The text encoders are loaded only if a prompt has not been encoded yet.

    Args:
        dtype: precision of the text encoders.
        device: device on which the text encoders compute, and of the encodings.
        options: revision, variant and local_files_only, as in from_pretrained.
    """
    def encode(prompts: Sequence[str]) -> Iterator[Tensor]:
        ids = [family.tokens(tokenizers, prompt) for prompt in prompts]
        # With fp32, layers are stored in the precision of their files: half of the memory, and the same results.
        stored: torch.dtype | Literal["auto"] = "auto" if dtype is torch.float32 else dtype
        encoders = [encoder.requires_grad_(False).eval().to(device) for encoder in load(
            recipe.source, family, stored, **options)]
        if dtype is torch.float32:
            for encoder in encoders:
                compute_in_fp32(encoder)
        for prompt, row in zip(prompts, ids, strict=True):
            with torch.no_grad():
                text = family.text(encoders, row.to(device))
            if not text.isfinite().all():
                raise UserError(f"the text encoder's output for {prompt!r} is not finite in {recipe.precision.label}: "
                                "type precision=bf16, or precision=fp32")
            yield text
        del encoders, text
        if device.type == "cuda":
            torch.cuda.empty_cache()  # otherwise the allocator keeps the freed memory, in blocks of the encoders' sizes

    return PromptEncodings(recipe.run_root / prompt_encodings.FOLDER, _key(recipe, family, dtype), encode, device)


def compute_in_fp32(encoder: nn.Module) -> None:
    """Make a text encoder compute in fp32, while its layers are stored in half precision.

    Each layer is converted to fp32 when it computes, and back afterwards, which changes no weight. The other parts,
    such as embeddings, are converted once. The results are those of a text encoder that was loaded in fp32.
    """
    layers = [layer for module in encoder.modules() if isinstance(module, nn.ModuleList) for layer in module]
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in encoder.modules():
        if id(module) not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.float()
    inner = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    for layer in layers:
        stored = next((p.dtype for p in layer.parameters()), torch.float32)
        if id(layer) not in inner and stored is not torch.float32:
            layer.register_forward_pre_hook(partial(_convert, torch.float32))
            layer.register_forward_hook(partial(_convert, stored))


def _convert(dtype: torch.dtype, module: nn.Module, *_: Any) -> None:
    module.to(dtype)


def file_bytes(recipe: Recipe, family: Family) -> int:
    """Return the size of the text encoders' weight files on this machine."""
    folder = _folder(recipe)
    return sum(path.stat().st_size for part in family.encoders for path in (folder / part.name).glob("*.safetensors"))


def _key(recipe: Recipe, family: Family, dtype: torch.dtype) -> str:
    """Return a text that identifies the text encoders, the tokenizers and the precision."""
    folder = _folder(recipe)
    names = [part.class_name for part in family.encoders]
    key = [FORMAT, family.architecture, *names, dtype, recipe.model.variant]
    if not hub.is_local(recipe.source):
        return "\n".join(map(str, [*key, recipe.source, folder.name]))  # the folder's name is the hub's commit
    weights = [weights_digest(folder / part.name) for part in family.encoders]
    others = [f"{path.relative_to(folder).as_posix()} {full_digest(path)}" for path in _other_files(folder, family)]
    return "\n".join(map(str, [*key, *weights, *others]))


def _other_files(folder: Path, family: Family) -> Iterable[Path]:
    """Yield the configurations of the text encoders and the files of the tokenizers."""
    for part in family.encoders:
        yield folder / part.name / "config.json"
    for name in family.tokenizers:
        yield from (path for path in sorted((folder / name).rglob("*")) if path.is_file())


def _folder(recipe: Recipe) -> Path:
    """Return the folder of the base model: a local one, or that of the downloaded commit of a hub id."""
    if hub.is_local(recipe.source):
        return Path(recipe.source)
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(recipe.source, "model_index.json", revision=recipe.model.revision)
    return Path(index).parent if isinstance(index, str) else Path(f"{recipe.source}@{recipe.model.revision}")
