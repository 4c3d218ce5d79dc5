"""The blocks of a model whose weights memory.fully_shard gathers together, and their memory."""

from torch import nn


def sharded_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks whose weights are gathered together, inner blocks first.

    They are the modules that diffusers and transformers must not split between devices (`_no_split_modules`). Weights
    outside of them are gathered for the whole step.
    """
    names: set[str] = set().union(*(getattr(module, "_no_split_modules", None) or () for module in model.modules()))
    return [module for module in reversed(list(model.modules())) if type(module).__name__ in names]


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of whole weights and gradients that a process has during a training step, an estimate.

    These are the weights and gradients outside of the blocks, and five times the largest block: the weights of the
    block that computes, those of the next one, the gradients of one block, and a buffer each to receive and to send.
    """
    sizes: list[int] = []
    counted: set[int] = set()
    for block in [*sharded_blocks(model), model]:  # inner blocks first; an outer one has the rest
        own = [p for p in block.parameters() if p.requires_grad and id(p) not in counted]
        counted |= {id(parameter) for parameter in own}
        sizes.append(sum(parameter.nbytes for parameter in own))
    return 2 * sizes[-1] + 5 * max(sizes[:-1], default=0)
