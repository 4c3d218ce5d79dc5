"""Base models with the true architecture and random weights, which are made in memory and never written to a file.

A folder of gpu.py contains what a run reads of a base model, except weights: the package's config.json files, the
scheduler, the tokenizers and model_index.json. `install_random_weights` replaces the two functions that load weights.
The weights are made in host memory in the target precision, so that all later code is that of a real run: it moves the
parts to the card, quantises them, and its peaks of card memory are not changed by the making. A file of 24 GB would
take longer to write and to read than most configurations run.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dreambooth.models import families
from dreambooth.models.families import clip_tokenizer
from dreambooth.models.families.family import Family
from dreambooth.models.families.part import DiffusersPart, Part, TransformersPart
from dreambooth.planner.fake_cuda import to_dtype
from dreambooth.utils.assets import resolve_asset

SHIPPED = {"tiny_sd": "package:tiny-sd", "tiny_flow": "package:tiny-flow"}
BLOCK = 4_194_301  # numbers; a prime, so that no row of a matrix repeats at the same place
TOKENS = 512  # that a prompt of a Qwen text encoder has at most; T5 of SD 3.5 reads 256
STORED_IN = torch.bfloat16  # precision of the published files of large text encoders


def make_folder(name: str, folder: Path) -> Path:
    """Write the folder of base model `name` without weights, and return its path."""
    if folder.is_dir():
        return folder
    source = Path(resolve_asset(SHIPPED.get(name, f"package:architectures/{name}")))
    family = families.of_folder(source)
    assert family is not None, source
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    for tokenizer in family.tokenizers:
        if not (temporary / tokenizer).is_dir():
            _save_tokenizer(family, tokenizer, temporary / tokenizer)
    scheduler = json.loads((source / "scheduler" / "scheduler_config.json").read_text("utf-8"))["_class_name"]
    index = {"_class_name": family.pipeline_name, "scheduler": ["diffusers", scheduler]}
    index |= {part.name: ["diffusers" if isinstance(part, DiffusersPart) else "transformers", part.class_name]
              for part in family.parts()}
    index |= {tokenizer: ["transformers", "PreTrainedTokenizerFast"] for tokenizer in family.tokenizers}
    (temporary / "model_index.json").write_text(json.dumps(index), "utf-8")
    temporary.rename(folder)
    return folder


def _save_tokenizer(family: Family, name: str, folder: Path) -> None:
    """Write a tokenizer: CLIP's own where the package has it, else a tokenizer of a tiny base model.

    The tiny ones know few words, which changes the ids of tokens but not the length of the padded prompts.
    """
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    if name != "tokenizer_3" and any("CLIP" in part.class_name for part in family.encoders):
        clip_tokenizer.save(clip_tokenizer.build(), folder)
        return
    tiny = "tiny-sd" if name == "tokenizer_3" else "tiny-flow"
    tokenizer = AutoTokenizer.from_pretrained(resolve_asset(f"package:{tiny}"), subfolder="tokenizer")
    tokenizer.model_max_length = TOKENS
    tokenizer.save_pretrained(folder)


def install_random_weights() -> None:
    """Make every part of a base model get random weights, in place of those of files."""
    DiffusersPart.load = _load  # type: ignore[method-assign]
    TransformersPart.load = _load  # type: ignore[method-assign]


def _load(part: Part, source: str, dtype: torch.dtype | Literal["auto"], **options: Any) -> nn.Module:
    """Build a part with random weights in host memory: the same weights in every process."""
    from accelerate import init_empty_weights

    where = {key: value for key, value in options.items() if key != "variant"}
    configuration = {key: value for key, value in part.configuration(source, **where).items() if key != "dtype"}
    with init_empty_weights(include_buffers=False):  # buffers such as the frequencies of positions are computed
        module: nn.Module = part.build(configuration)
    to_dtype(module, STORED_IN if dtype == "auto" else dtype)
    fill(module)
    return module.eval()


def fill(module: nn.Module) -> None:
    """Give the parameters of a module, which have no data, random numbers in host memory.

    Matrices get a normal distribution that keeps the variance of their input, norms ones, and biases zeros, so that
    activations are finite in every precision. One block of random numbers is repeated: copying is several times faster
    than drawing billions of numbers.
    """
    numbers = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    scaled: dict[tuple[float, torch.dtype], torch.Tensor] = {}
    made: dict[int, nn.Parameter] = {}
    for submodule in module.modules():
        for name, parameter in list(submodule._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=parameter.dtype)
                if parameter.ndim < 2:
                    values.fill_(0.0 if "bias" in name else 1.0)
                else:
                    key = 1 / math.sqrt(max(1, parameter[0].numel())), parameter.dtype
                    if key not in scaled:
                        scaled[key] = (numbers * key[0]).to(key[1])
                    _repeat(scaled[key], values.view(-1), len(made) * 7919 % BLOCK)
                made[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
            submodule._parameters[name] = made[id(parameter)]


def _repeat(block: torch.Tensor, target: torch.Tensor, offset: int) -> None:
    """Fill the vector `target` with repetitions of `block`, from its element `offset` on."""
    start = 0
    while start < len(target):
        piece = block[offset:offset + len(target) - start]
        target[start:start + len(piece)] = piece
        start, offset = start + len(piece), 0
