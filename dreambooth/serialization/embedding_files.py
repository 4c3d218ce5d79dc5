"""Reads and writes the embeddings of new tokens: one file per word, in the folder `embeddings/` beside an adapter.

`embeddings/zwx.safetensors` holds the embeddings of the tokens of the word zwx, one row per token.

| program | keys of one text encoder | keys of two | the word in a prompt |
|---|---|---|---|
| diffusers | any single key | one tensor per call: `clip_l`, `clip_g` | `token=` of load_textual_inversion |
| AUTOMATIC1111, Forge | any single key | `clip_l`, `clip_g` | the name of the file |
| ComfyUI | the first key | `clip_l`, `clip_g` | `embedding:` and the name of the file |

The keys (Family.embedding_keys) are those of kohya's and diffusers' trainers: `emb_params`, or `clip_l` and `clip_g`.
The metadata of an adapter's files contain the words and a hash of their embeddings. An adapter is therefore never used
without its embeddings, or with those of another adapter.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth.config.method import WORD
from dreambooth.errors import UserError
from dreambooth.models.components import Components
from dreambooth.models.families.family import Family
from dreambooth.models.new_tokens import prompts
from dreambooth.models.new_tokens.embedding_table import table_of, write_into_table
from dreambooth.serialization.export_layout import EMBEDDINGS

WORDS_KEY = "new_tokens"  # key of the metadata of an adapter's files: word -> hash of its embeddings, as JSON
Words = Mapping[str, Mapping[str, Tensor]]  # word -> name of the text encoder -> embeddings (N, D)


def write(folder: Path, words: Words, family: Family, metadata: Mapping[str, str]) -> None:
    """Write the files FOLDER/embeddings/WORD.safetensors, with `metadata`."""
    (folder / EMBEDDINGS).mkdir(exist_ok=True)
    for word, rows in words.items():
        save_file(_tensors(rows, family), folder / EMBEDDINGS / f"{word}.safetensors",
                  {"format": "pt"} | dict(metadata))


def adapter_metadata(words: Words, family: Family) -> dict[str, str]:
    """Return the metadata of an adapter's files by which `find` knows its embeddings."""
    return {WORDS_KEY: json.dumps({word: _digest(_tensors(rows, family)) for word, rows in words.items()})}


def find(adapter: Path) -> dict[str, Path]:
    """Return the embedding files of an adapter file, by word; empty if it was trained without new tokens.

    They are in the folder `embeddings/` beside the adapter's file or one level above, as in a run.

    Raises:
        OSError, SafetensorError: a file cannot be read.
        UserError: a file is missing, or is that of another adapter.
    """
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata() or {}
    words = {}
    with suppress(ValueError):  # of another program, which uses the key for something else
        words = json.loads(metadata.get(WORDS_KEY, "{}"))
    found = {}
    for word, digest in words.items() if isinstance(words, dict) else ():
        name = f"{EMBEDDINGS}/{word}.safetensors"
        places = [folder / name for folder in (adapter.parent, adapter.parent.parent)] * bool(WORD.fullmatch(word))
        present = [path for path in places if path.is_file()]
        path = next((path for path in present if _digest(load_file(path)) == digest), None)
        if path is None:
            problem = f"{present[0]} is that of another" if present else f"there is no {adapter.parent / name}"
            raise UserError(f"the LoRA {adapter} was trained with embeddings of its own for the word {word}, and "
                            f"{problem}: put the file {name} of its run there, or name its run in place of the file")
        found[word] = path
    return found


def read(path: Path, family: Family) -> dict[str, Tensor]:
    """Read an embedding file: the embeddings (N, D) by the name of the text encoder.

    Raises:
        UserError: the file cannot be read, or belongs to another model family.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the embeddings {path} cannot be read ({error}): repeat the command of the run that made them"
                        ) from error
    if tensors.keys() != set(family.embedding_keys) or not tensors:
        raise UserError(f"the embeddings {path} have the keys {', '.join(tensors)}, and {family.title} has "
                        f"{', '.join(family.embedding_keys) or 'none'}: type base=DIR, the model that they belong to")
    return {part.name: tensors[key] for key, part in zip(family.embedding_keys, family.encoders, strict=True)}


@torch.no_grad()
def load_into(parts: Components, adapter: Path) -> None:
    """Replace the embeddings of the new tokens of `parts` by those beside an adapter file.

    Raises:
        UserError: a file is missing or damaged.
    """
    if parts.new_tokens is None:
        return
    files = find(adapter)
    words = [read(path, parts.family) for word in parts.new_tokens.words if (path := files.get(word))]
    for name, rows in parts.new_tokens.rows.items():
        saved = torch.cat([word[name] for word in words]) if words else torch.empty(0)
        if rows.shape != saved.shape:
            raise UserError(f"the embeddings beside {adapter} are not those of this run: repeat its command")
        rows.copy_(saved)


def loading_code(words: Sequence[str], family: Family) -> str:
    """Return Python code that loads the embeddings of a run into a pipeline of diffusers; "" without new tokens."""
    lines = [""]
    for word in words:
        path = f"model/{EMBEDDINGS}/{word}.safetensors"
        if len(family.embedding_keys) == 1:
            lines.append(f'pipeline.load_textual_inversion("{path}", token="{word}")')
            continue
        lines.append(f'embeddings = safetensors.torch.load_file("{path}")')
        for key, part, tokenizer in zip(family.embedding_keys, family.encoders, family.tokenizers, strict=True):
            lines.append(f'pipeline.load_textual_inversion(embeddings["{key}"], token="{word}", '
                         f"text_encoder=pipeline.{part.name}, tokenizer=pipeline.{tokenizer})")
    if len(family.embedding_keys) > 1 and words:
        lines.insert(1, "import safetensors.torch")
        lines.append("# otherwise transformers takes a new token for the end of the prompt, because its id is higher")
        lines.append(f"pipeline.{family.encoders[-1].name}.text_model.eos_token_id = "
                     f"pipeline.{family.tokenizers[-1]}.eos_token_id")
    return "\n".join(lines)


def merge_into(parts: Components, adapter: Path) -> None:
    """Append the embeddings beside an adapter file to the tables of a base model, and its words to the tokenizers.

    Raises:
        UserError: a file is missing or damaged.
    """
    words = {word: read(path, parts.family) for word, path in find(adapter).items()}
    if not words:
        return
    for part, encoder, tokenizer in zip(parts.family.encoders, parts.encoders, parts.tokenizers, strict=True):
        rows = torch.cat([by_encoder[part.name] for by_encoder in words.values()])
        write_into_table(encoder, rows, tokenizer.eos_token_id)
    counts = {word: len(next(iter(by_encoder.values()))) for word, by_encoder in words.items()}
    parts.tokenizers = [prompts.extended(tokenizer, counts) for tokenizer in parts.tokenizers]


def split_off(parts: Components) -> dict[str, dict[str, Tensor]]:
    """Remove the embeddings of new tokens from the tables of text encoders, and return them.

    Other programs refuse a single file whose embedding table is longer than that of the base model.
    """
    words: dict[str, dict[str, Tensor]] = {}
    for part, encoder, tokenizer in zip(parts.family.encoders, parts.encoders, parts.tokenizers, strict=False):
        table = table_of(encoder).weight.detach()
        first = len(table)
        for word, count in prompts.new_words(tokenizer).items():
            ids = [tokenizer.convert_tokens_to_ids(name) for name in prompts.token_names(word, count)]
            words.setdefault(word, {})[part.name] = table[ids].float()
            first = min(first, *ids)
        if first < len(table):
            encoder.set_input_embeddings(nn.Embedding(first, table.shape[1], _weight=table[:first].clone()))
    return words


def _tensors(rows: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Return the tensors of an embedding file by key, in fp32."""
    return {key: rows[part.name].float().contiguous()
            for key, part in zip(family.embedding_keys, family.encoders, strict=True)}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()
