"""Block swap on a CPU: the schedule, equal results, and that no block computes from host memory."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth.config.enums import BaseWeights, Dtype, MethodKind
from dreambooth.config.method import Method
from dreambooth.errors import UserError
from dreambooth.models import families, lora
from dreambooth.models.block_swap import BlockSwap, next_visitor, swapped_numbers
from dreambooth.models.loading import TrainedModel
from dreambooth.models.quantization import quantise

BLOCKS = 6
SIZES: dict[str, dict[str, Any]] = {
    "z_image": {"n_layers": BLOCKS}, "sd35_medium": {"num_layers": BLOCKS, "dual_attention_layers": [0, 1, 2]},
    "flux2_klein": {"num_layers": 2, "num_single_layers": BLOCKS - 2}, "qwen_image": {"num_layers": BLOCKS}}
READS_NOTHING = ("copy_", "slice", "view", "detach", "alias", "t", "transpose")


class NoHostReads(TorchDispatchMode):
    """Fails if an operator other than a copy reads the host memory of a swapped block."""

    def __init__(self, swap: BlockSwap) -> None:
        super().__init__()
        self.hosts = {host.memory.untyped_storage().data_ptr() for host in swap.hosts}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") not in READS_NOTHING:
            tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            read = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            assert not read & self.hosts, f"{func} reads a block in host memory"
        return func(*args, **(kwargs or {}))


def test_swapped_blocks_are_spread_evenly() -> None:
    assert swapped_numbers(30, 10) == list(range(1, 30, 3))
    assert swapped_numbers(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_schedule_prefetches_the_block_that_comes_next(count: int) -> None:
    """Two training steps and two forward passes without gradient: after the first, no block is late."""
    forward = [(position, True) for position in range(count)]
    inference = [(position, False) for position in range(count)]
    visits = (forward + forward[::-1]) * 2 + inference * 2
    present, previous, copies = {0}, None, 1
    for position, with_gradient in visits:
        late = position not in present
        assert not late or (position, with_gradient) == (0, False), (position, present)
        following = next_visitor(position, previous, count, with_gradient)
        copies += len({position, following} - present)
        present = {position, following} | ({previous} & present if following in present else set())
        assert len(present - {None}) <= 2
        previous = position
    if count > 2:
        assert copies == count + 3 * (count - 2) + 2 * count - 1


def build(family_name: str, config: Mapping[str, Any], base: BaseWeights) -> TrainedModel:
    """A model of a family with BLOCKS blocks, frozen and with gradient checkpointing."""
    family = families.of_architecture(family_name)
    assert family is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = family.denoiser.build(config)
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.05)
    denoiser.enable_gradient_checkpointing()
    if base is not BaseWeights.half:
        quantise(denoiser, torch.float32, base)
    return TrainedModel(family, {family.denoiser.name: denoiser}, 2).requires_grad_(False)


def add_adapter(model: TrainedModel) -> None:
    lora.inject(model, Method("lora", MethodKind.lora, rank=2), model.family.adapter_targets, 0, Dtype.fp32)
    for _, layer in lora.layers(model):
        generator = torch.Generator().manual_seed(1)
        layer.lora_B[lora.NAME].weight.data.normal_(generator=generator)
    for module in model.family.untrainable(getattr(model, model.family.denoiser.name), []):
        module.requires_grad_(False)
    model.train()


def passes(model: TrainedModel, text: Tensor, channels: int) -> list[Tensor]:
    """The results of two training passes, each followed by an update, and of two passes without gradient."""
    latents = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(2))
    times, results = torch.tensor([0.3, 0.8]), []
    for _ in range(2):
        model(latents, times, text).square().mean().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            assert parameter.grad is not None
            results.append(parameter.grad.clone())
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
    with torch.no_grad():
        return [*results, model(latents, times, text), model(latents / 2, times, text)]


@pytest.mark.parametrize("name, base, count", [
    ("z_image", BaseWeights.int8, BLOCKS), ("flux2_klein", BaseWeights.half, 4), ("sd35_medium", BaseWeights.fp8, 3),
    pytest.param("qwen_image", BaseWeights.int8, 4, marks=pytest.mark.slow)])
def test_results_are_equal_and_no_block_computes_from_host_memory(
        name: str, base: BaseWeights, count: int, flow_bases: dict[str, Path]) -> None:
    family = families.of_architecture(name)
    assert family is not None
    config = family.denoiser.configuration(flow_bases[name], subfolder="transformer") | SIZES[name]
    channels = config["in_channels"] // (4 if name == "qwen_image" else 1)  # its tokens are 2 x 2 latents
    masked = name in ("z_image", "qwen_image")
    width = config.get("cap_feat_dim") or config["joint_attention_dim"]
    text = torch.randn(2, 9, width + masked, generator=torch.Generator().manual_seed(3))
    if masked:
        text[..., -1] = 1
    plain = build(name, config, base)
    swapped = deepcopy(plain)
    add_adapter(plain)
    denoiser = getattr(swapped, family.denoiser.name)
    swap = BlockSwap(family.blocks(denoiser), count, torch.device("cpu"))
    add_adapter(swapped)
    swapped.to("cpu")
    expected = passes(plain, text, channels)
    with NoHostReads(swap):
        found = passes(swapped, text, channels)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    # Each slot has the weights of one block, and all other swapped blocks are in host memory.
    slots = [slot.untyped_storage().data_ptr() for slot in swap.slots]
    for position, host in enumerate(swap.hosts):
        at = slots[swap.resident.index(position)] if swap.is_present(position) else (
            host.memory.untyped_storage().data_ptr())
        assert {tensor.untyped_storage().data_ptr() for tensor in host.tensors} == {at}
    assert swap.copies == count + 3 * (count - 2) + 2 * count - 1
    swap.enter = lambda position, with_gradient: None  # type: ignore[method-assign]
    with NoHostReads(swap), pytest.raises(AssertionError, match="reads a block in host memory"):
        passes(swapped, text, channels)


def test_moving_the_model_leaves_swapped_blocks_and_moves_their_adapters() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))).requires_grad_(False)
    swap = BlockSwap(list(blocks), 1, torch.device("cpu"))
    blocks[1].add_module("adapter", nn.Linear(4, 1))
    blocks.to(torch.float64)
    assert {str(p.dtype) for p in swap.hosts[0].tensors} == {"torch.float32"}
    assert blocks[1].adapter.weight.dtype is blocks[0][0].weight.dtype is torch.float64


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"has 2 blocks and memory\.swap_blocks=3: type memory\.swap_blocks=2 or fewer"):
        BlockSwap([nn.Linear(2, 2), nn.Linear(2, 2)], 3, torch.device("cpu"))


class FakeStreams:
    """Stands for torch.cuda: records what each copy and each block waits for, without a GPU."""

    def __init__(self) -> None:
        self.computed = 0  # number of blocks that are queued on the stream that computes
        self.waited_for: list[object] = []  # events that this stream waits for
        self.copy_follows = -1  # number of queued blocks that the copying stream waits for
        self.copies: list[int] = []  # number of queued blocks that each copy waits for

    def Stream(self, device: torch.device) -> "FakeStreams":
        return self

    def Event(self) -> Any:
        return SimpleNamespace(record=lambda stream: self.copies.append(self.copy_follows))

    def current_stream(self, device: torch.device) -> "FakeStreams":
        return self

    def stream(self, stream: "FakeStreams") -> AbstractContextManager[None]:
        return nullcontext()

    def wait_stream(self, stream: "FakeStreams") -> None:
        self.copy_follows = self.computed

    def wait_event(self, event: object) -> None:
        self.waited_for.append(event)


def test_on_a_gpu_copies_and_blocks_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits for the last use of its slot, a block waits for its copy, and the next copy is queued before it."""
    blocks = [nn.Linear(4, 4).requires_grad_(False) for _ in range(5)]
    swap = BlockSwap(blocks, 5, torch.device("cpu"))
    streams = FakeStreams()
    monkeypatch.setattr("dreambooth.models.block_swap.torch.cuda", streams)
    swap.cuda, swap._stream = True, streams
    last_use = [0, 0]  # number of blocks that were queued when a block in this slot was queued
    visits = [*range(5), *range(4, -1, -1)] * 2
    for visit, (position, following) in enumerate(pairwise([*visits, 0]), start=1):
        before = list(swap._arrived)
        swap.enter(position, with_gradient=True)
        slot = swap.resident.index(position)
        assert streams.waited_for[-1] is swap._arrived[slot] is not None
        for number in range(2):
            assert swap._arrived[number] is before[number] or streams.copies[-1] >= last_use[number]
        assert swap.is_present(following), "it is copied while this block computes"
        streams.computed = last_use[slot] = visit
    assert len(streams.copies) == swap.copies == 5 + 3 * 3
