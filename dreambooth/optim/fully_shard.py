"""memory.fully_shard: each process stores a part of every trained weight, of its gradient, optimizer state and EMA.

This is PyTorch's `fully_shard` (FSDP2), after Zhao et al. 2023 (arXiv:2304.11277): the weights of a block are gathered
from all processes before the block computes, and its gradients are averaged and split again after its backward pass
(stage 3 of ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3). The sums of a step are those of data
parallelism.

The model that pipelines, exports and validation use stays an ordinary module. While training steps run, its trained
weights have no memory. `FullyShardedModel.gathered` returns whole weights for it.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dreambooth.optim.sharded_blocks import sharded_blocks
from dreambooth.runtime.engine import Engine


class FullyShardedModel:
    """A trained model whose weights are split over all processes, and the ordinary model that it was made from.

    Every method is a collective operation, except `weights`, `shards` and `shard_optimizer_state`.

    Attributes:
        module: the sharded module, which the training step calls. Its parameters are DTensors.
        trained: the trained parameters of `module`, by name.
        engine: the engine of this process.
    """

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        """Split the weights of `model`, and release the memory of its own trained weights.

        Args:
            model: the TrainedModel, on the device of the process, with the same weights in every process.
        """
        self.engine = engine
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.module: nn.Module = deepcopy(model, shared)
        mesh = init_device_mesh(engine.device.type, (engine.world_size,))
        for block in [*sharded_blocks(self.module), self.module]:
            fully_shard(block, mesh=mesh)
        self.trained: dict[str, Any] = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.new_zeros(1).expand(parameter.shape)  # a shape without memory
        self._result: dict[str, Tensor] | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return this process's part of the trained weights, by name. The tensors share the memory of the weights."""
        return {name: p.detach().to_local().requires_grad_() for name, p in self.trained.items()}

    def gathered(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors on the device of the process, by name.

        Args:
            shards: this process's part of the trained weights, or of their averages, by name.
        """
        if self._result is not None:
            return {name: tensor.to(self.engine.device) for name, tensor in self._result.items()}
        return dict(self._gather(shards))

    def store_result(self, shards: Mapping[str, Tensor]) -> None:
        """Gather whole tensors in the host memory of the main process, which then needs no other process to export."""
        self._result = self.collect(shards)

    def collect(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors in host memory, by name. In all processes but the main one, return {}."""
        return {name: tensor.cpu() for name, tensor in self._gather(shards) if self.engine.is_main_process}

    def collect_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state of the optimizer with whole tensors in host memory, as in a run of one process.

        In all processes but the main one, the state has no such tensors.
        """
        saved: dict[str, Any] = optimizer.state_dict()  # its dictionaries are those of the optimizer
        return saved | {"state": {index: {name: self._on_main(value) for name, value in entries.items()}
                                  for index, entries in saved["state"].items()}}

    def shards(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this process's part of whole tensors of trained weights, by name. Unknown tensors are left whole."""
        return {name: split(tensor, self.trained[name]).to_local() if name in self.trained else tensor
                for name, tensor in tensors.items()}

    def shard_optimizer_state(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, as `collect_optimizer_state` returns it, with this process's parts."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {index: {name: split(value, parameters[index])
                         if isinstance(value, Tensor) and value.shape == parameters[index].shape else value
                         for name, value in entries.items()} for index, entries in saved["state"].items()}
        return saved | {"state": state}

    def _on_main(self, value: Any) -> Any:
        """Return a DTensor as a whole tensor in host memory, in other processes than the main one None."""
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.engine.is_main_process else None

    def _gather(self, shards: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each tensor, and the whole tensor, one after the other."""
        for name, shard in shards.items():
            like = self.trained[name]
            part = DTensor.from_local(shard.detach().to(like.device), like.device_mesh, like.placements,
                                      run_check=False, shape=like.shape, stride=like.stride())
            yield name, part.full_tensor()


def split(tensor: Tensor, like: Any) -> DTensor:
    """Split a whole tensor as the DTensor `like`, without communication: every process has the whole tensor.

    Raises:
        ValueError: the shapes differ.
    """
    if tensor.shape != like.shape:
        raise ValueError(f"a weight of shape {tuple(tensor.shape)} does not match {tuple(like.shape)}")
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
