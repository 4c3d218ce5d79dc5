"""Around the levers: latent cache, idle parts, allocator settings, what to type when memory runs out."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreambooth import cli
from dreambooth.config import validation
from dreambooth.config.enums import Dtype, EmaDevice, LatentCache, MethodKind, OptimizerKind, Rounding, Weights
from dreambooth.config.schema import Memory
from dreambooth.data.batches import Latents
from dreambooth.data.latent_cache import Keep, digest
from dreambooth.errors import UserError
from dreambooth.runs.checkpoint_files import latest
from dreambooth.runtime import oom_advice
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.memory_meter import Meter
from dreambooth.runtime.module_offload import Idle
from dreambooth.training import setup
from tests.support.configs import T4, decided
from tests.support.faults import train
from tests.support.runs import the_run
from tests.support.toy_model import batches, concept, encode

CPU = torch.device("cpu")


def filled(keep: Keep, seen: list[int] | None = None, flip: bool = True) -> Latents:
    latents = Latents(encode, 8, 0.5, keep)
    latents.fill(concept(flip=flip), lambda count: (seen if seen is not None else []).append(count))
    return latents


def drawn(latents: Latents) -> Tensor:
    views = [concept(flip=True).view(0, step, 0, 1) for step in range(9)]
    return latents.sample(concept(), views, torch.linspace(-1, 1, 9).double().view(9, 1, 1, 1).expand(9, 1, 8, 8))


@pytest.mark.parametrize("where", LatentCache)
def test_latents_are_the_uncached_ones_wherever_they_are_kept(where: LatentCache, tmp_path: Path) -> None:
    kept = filled(Keep(where, CPU, tmp_path, "vae"))
    assert drawn(kept).equal(drawn(Latents(encode, 8, 0.5)))


def test_latents_on_disk_are_encoded_once_for_all_runs(tmp_path: Path) -> None:
    first, again, other = [], [], []
    filled(Keep(LatentCache.disk, CPU, tmp_path, "vae"), first)
    filled(Keep(LatentCache.disk, CPU, tmp_path, "vae"), again)
    filled(Keep(LatentCache.disk, CPU, tmp_path, "another vae"), other)
    assert (sum(first), sum(again), sum(other)) == (10, 0, 10)
    filled(Keep(LatentCache.disk, CPU, tmp_path, "vae"), other, flip=False)
    assert len(list(tmp_path.iterdir())) == 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_an_encoder_is_known_by_its_weights_and_their_precision() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert digest(one) == digest(other)
    assert digest(one) != digest(other.half())


def test_batches_are_the_same_from_every_cache() -> None:
    assert batches(cache=True)(3)[0].latents.equal(batches()(3)[0].latents)


class Moved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moves: list[str] = []

    def to(self, device: torch.device) -> "Moved":  # type: ignore[override]
        self.moves.append(str(device))
        return self


def test_idle_parts_come_back_for_sampling_and_leave_even_if_it_fails() -> None:
    part = Moved()
    idle = Idle([part], torch.device("meta"))
    idle.rest()
    with pytest.raises(ZeroDivisionError), idle.present():
        assert part.moves == ["cpu", "meta"]
        raise ZeroDivisionError
    assert part.moves == ["cpu", "meta", "cpu"]


def test_idle_parts_make_room_for_others_and_come_back() -> None:
    part = Moved()
    with Idle([part], torch.device("meta")).absent():
        assert part.moves == ["cpu"]
    assert part.moves == ["cpu", "meta"]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    kept = dict(os.environ)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.pop(name, None)
    yield os.environ  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(kept)


def test_allocator_settings_are_set_unless_the_user_has_set_some(environment: dict[str, str]) -> None:
    cli.allocator(Memory())
    assert "PYTORCH_ALLOC_CONF" not in environment
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:64"
    cli.allocator(Memory(expandable_segments=True))
    assert "PYTORCH_ALLOC_CONF" not in environment
    del environment["PYTORCH_CUDA_ALLOC_CONF"]
    cli.allocator(Memory(expandable_segments=True, max_split_size_mb=128))
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True,max_split_size_mb:128"


# -- out of memory ------------------------------------------------------------------------------------------------

ALL = {"memory__gradient_checkpointing": True, "memory__ema_device": EmaDevice.cpu,
       "memory__autocast_cache": False, "memory__optimizer_in_backward": True}


def test_advice_is_what_the_recipe_does_not_use_yet_what_changes_no_number_first() -> None:
    half = {"precision__dtype": Dtype.fp16}
    assert oom_advice.advice("step", decided(T4, **half)) == (
        "memory.gradient_checkpointing=true memory.ema_device=cpu memory.autocast_cache=false "
        "memory.optimizer_in_backward=true")
    assert oom_advice.advice("step", decided(T4, **half, **ALL)) == "optimizer=adamw8bit"
    used = ALL | {"optimizer__kind": OptimizerKind.adafactor}
    assert "memory.offload_optimizer=true" in oom_advice.advice("step", decided(T4, **half, **used))
    accumulating = decided(T4, train__gradient_accumulation_steps=2)
    assert "optimizer_in_backward=true" not in oom_advice.advice("step", accumulating)


RUNS: list[dict[str, object]] = [
    {}, {"dataset__buckets": True}, {"train__compile": True}, {"memory__split_prior": True},
    {"memory__weights": Weights.half, "memory__rounding": Rounding.stochastic},
    {"optimizer__kind": OptimizerKind.paged_adamw8bit}, {"train__channels_last": True},
    {"train__gradient_accumulation_steps": 2}, {"method__kind": MethodKind.lora, "method__name": "lora"},
]


@pytest.mark.parametrize("values", RUNS, ids=str)
def test_what_is_advised_is_taken_when_it_is_typed(values: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, until only a larger machine is left."""
    monkeypatch.setattr(validation, "find_spec", lambda name: True)
    values = {"precision__dtype": Dtype.fp16} | values
    seen: list[str] = []
    while (typed := oom_advice.advice("step", decided(T4, **values))) not in seen:
        seen.append(typed)
        if "machine" in typed:
            return
        for word in typed.split():
            key, _, value = word.partition("=")
            key = "optimizer.kind" if key == "optimizer" else key
            if key.startswith("memory.ema_device"):
                values[key.replace(".", "__")] = EmaDevice(value)
            elif key == "optimizer.kind":
                values["optimizer__kind"] = OptimizerKind(value)
            else:
                values[key.replace(".", "__")] = {"true": True, "false": False}.get(value) if value in (
                    "true", "false") else int(value)
    pytest.fail(f"{typed} is advised for ever")


def test_a_machine_of_four_cards_is_not_paid_for_one() -> None:
    asked = decided(T4, hardware__gpus=4, memory__auto=False)
    card = torch.device("cuda")
    with pytest.raises(UserError, match=r"nproc-per-node=4 .* or hardware\.gpus=1"):
        setup._check_processes(asked, Engine(device=card))
    setup._check_processes(asked, Engine(device=card, world=8, local_world=4))
    setup._check_processes(asked, Engine())


def test_several_processes_are_not_told_of_levers_for_one() -> None:
    asked = decided(T4, precision__dtype=Dtype.fp16)
    assert "in_backward=true" in oom_advice.advice("step", asked)
    assert "in_backward=true" not in oom_advice.advice("step", asked.among(2))


def test_advice_for_pictures_is_to_make_fewer_at_a_time() -> None:
    assert oom_advice.advice("class_images", decided(T4)) == "prior.sample_batch_size=1"
    assert "sample.images_per_prompt=1" in oom_advice.advice("sample", decided(T4))
    one = {"sample__images_per_prompt": 1, "prior__sample_batch_size": 1}
    assert oom_advice.advice("sample", decided(T4, **one)).startswith("memory.")


def test_the_sentence_has_the_phase_both_peaks_and_what_to_type() -> None:
    from dreambooth.errors import OutOfMemory

    meter = Meter(CPU, lambda phase: f"less={phase}", {"step": 12.5})
    words = r"during step \(predicted 12.50 GiB, seen process_rss/step_gib .*type less=step"
    with pytest.raises(OutOfMemory, match=words), meter.phase("step"):
        torch.empty(2**45)


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc")])
def test_every_way_of_saying_so_is_out_of_memory(error: Exception) -> None:
    from dreambooth.errors import OutOfMemory, UserError

    with pytest.raises(OutOfMemory), Meter(CPU).phase("load"):
        raise error
    with pytest.raises(OutOfMemory), Meter(CPU).phase("load"):
        raise UserError("could not be loaded") from error


@pytest.mark.parametrize("full", [True, False])
def test_what_onednn_cannot_create_is_out_of_memory_only_where_there_is_none(
        full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says the same of a shape that it cannot compute; that is a fault, and keeps its traceback."""
    from dreambooth.errors import OutOfMemory
    from dreambooth.runtime import memory_meter

    monkeypatch.setattr(memory_meter, "PROBE", 2**62 if full else 2**20)
    with pytest.raises(OutOfMemory if full else RuntimeError), Meter(CPU).phase("step"):
        raise RuntimeError("could not create a primitive")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), Meter(CPU).phase("step"):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("fault, phase, kept", [
    ("little_memory_in_step_3", "step", 2), ("little_memory_in_class_images", "class_images", None)])
def test_memory_that_really_runs_out_ends_in_a_sentence_and_keeps_the_checkpoint(
    fault: str, phase: str, kept: int | None, tmp_path: Path
) -> None:
    """The child's address space is limited to what it has: the system itself refuses the next large allocation."""
    log = tmp_path / "out.txt"
    more = ["train.train_batch_size=64", "sample.every=null"] if phase == "step" else ["prior.sample_batch_size=64",
                                                                                     "prior.num_class_images=64"]
    assert train(tmp_path, "checkpoint.every=2", *more, fault=fault, log=log) == 4
    said = log.read_text()
    assert f"out of memory during {phase} (seen process_rss/{phase}_gib" in said
    assert "type memory.gradient_checkpointing=true" in said or "type prior.sample_batch_size=1" in said
    assert "Traceback" not in said
    found = latest(the_run(tmp_path) / "checkpoints") if kept else None
    assert (found and found.name) == (kept and f"step-{kept:06d}")


def test_a_run_under_every_exact_lever_gives_the_same_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = []
    for number, levers in enumerate((["memory=fast"], ["memory=lowest", "memory.latent_cache=disk"])):
        root = tmp_path / str(number)
        assert train(root, "train.max_train_steps=3", *levers, log=tmp_path / "out.txt") == 0
        run = the_run(root)
        weights.append([load_file(path) for path in sorted((run / "model").rglob("*.safetensors"))]
                       + [load_file(path) for path in sorted((run / "checkpoints/step-000003").glob("*.safetensors"))])
    for one, other in zip(*weights, strict=True):
        assert one.keys() == other.keys()
        assert [key for key in one if not one[key].equal(other[key])] == []


def test_half_weights_and_offload_run_end_to_end_and_resume(tmp_path: Path) -> None:
    for number, levers in enumerate((["memory.weights=half", "memory.rounding=stochastic"],
                                     ["memory.offload_optimizer=true", "memory.split_prior=true"])):
        root = tmp_path / str(number)
        for steps in (2, 4):
            assert train(root, f"train.max_train_steps={steps}", "precision=bf16", "sample.every=null", *levers,
                         log=tmp_path / "out.txt") == 0
