"""An embedding table of a text encoder with rows of its own for new tokens.

The new rows are a parameter beside the table. Training them cannot change the table: no gradient, weight decay,
optimizer state or EMA of it exists. A script that trains the whole table has to undo the changes of its old rows after
each step, as train_dreambooth_lora_sdxl_advanced.py of diffusers does (`retract_embeddings`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExtendedEmbedding(nn.Embedding):
    """An embedding table (V, D) whose ids from V on are rows of `new_rows`.

    It shares the weight of the table. The output has the precision of the table.
    """

    new_rows: nn.Parameter  # (N, D)

    def __init__(self, table: nn.Embedding, new_rows: nn.Parameter) -> None:
        nn.Module.__init__(self)  # nn.Embedding would allocate another table
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = table.weight
        self.new_rows = new_rows

    def forward(self, input: Tensor) -> Tensor:
        is_new = input >= self.num_embeddings
        known = F.embedding(input.masked_fill(is_new, 0), self.weight)
        new = F.embedding((input - self.num_embeddings).clamp(min=0), self.new_rows)
        return torch.where(is_new.unsqueeze(-1), new.to(known.dtype), known)

    @property
    def table(self) -> nn.Embedding:
        """The table alone, which shares its weight with this module."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=self.weight, _freeze=True)


def table_of(encoder: Any) -> nn.Embedding:
    """Return the embedding table of a text encoder, without new rows."""
    table: nn.Embedding = encoder.get_input_embeddings()
    return table.table if isinstance(table, ExtendedEmbedding) else table


def set_rows(encoder: Any, new_rows: nn.Parameter | None, end: int) -> None:
    """Give a text encoder the embeddings of new tokens in place of those that it has; None: none.

    transformers' CLIP finds the end of a prompt, whose state may be the pooled state, as the highest id if the
    configuration says 2 for the end, as in published models. New tokens have higher ids. The encoder is therefore told
    the id of the end; without new tokens, it is the highest one, so that nothing changes.

    Args:
        new_rows: (N, D).
        end: id of the token at the end of a prompt.
    """
    table = table_of(encoder)
    encoder.set_input_embeddings(table if new_rows is None else ExtendedEmbedding(table, new_rows))
    getattr(encoder, "text_model", encoder).eos_token_id = end


@torch.no_grad()
def write_into_table(encoder: Any, new_rows: Tensor, end: int) -> None:
    """Append rows to the embedding table of a text encoder, and update its configuration, to export the encoder."""
    table = table_of(encoder)
    encoder.set_input_embeddings(table)
    encoder.resize_token_embeddings(table.num_embeddings + len(new_rows), mean_resizing=False)
    weight = encoder.get_input_embeddings().weight
    weight[-len(new_rows):] = new_rows.to(weight)
    encoder.config.eos_token_id = getattr(encoder, "text_model", encoder).eos_token_id = end
