"""Tests of memory options: latent cache, module offload, allocator settings, out-of-memory messages and advice."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth import cli
from dreambooth.config import validation
from dreambooth.config.enums import (
    BaseWeights,
    Dtype,
    EmaDevice,
    LatentCache,
    MethodKind,
    OptimizerKind,
    Rounding,
    Weights,
)
from dreambooth.config.schema import Memory
from dreambooth.data import latent_cache
from dreambooth.data.batches import Latents
from dreambooth.data.latent_cache import LatentStore, digest
from dreambooth.errors import UserError
from dreambooth.runs.checkpoint_files import latest
from dreambooth.runtime import oom_advice
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.runtime.module_offload import ModuleOffload
from dreambooth.training import setup
from tests.support.configs import T4, resolve_demo
from tests.support.faults import train
from tests.support.runs import flip_bit, the_run
from tests.support.toy_model import encode_pixels, make_batches, make_photo_set

CPU = torch.device("cpu")


def filled(store: LatentStore, counts: list[int] | None = None, flip: bool = True) -> Latents:
    """A filled latent cache; `counts` receives the numbers of encoded images."""
    latents = Latents(encode_pixels, 8, 0.5, store)
    latents.fill(make_photo_set(flip=flip), lambda count: (counts if counts is not None else []).append(count), 16)
    return latents


def drawn(latents: Latents) -> Tensor:
    views = [make_photo_set(flip=True).view(0, step, 0, 1) for step in range(9)]
    noise = torch.linspace(-1, 1, 9).double().view(9, 1, 1, 1).expand(9, 1, 8, 8)
    return latents.sample(make_photo_set(), views, noise)


@pytest.mark.parametrize("where", LatentCache)
def test_cached_latents_are_the_uncached_ones_in_every_kind_of_cache(where: LatentCache, tmp_path: Path) -> None:
    cached = filled(LatentStore(where, CPU, tmp_path, "vae"))
    assert drawn(cached).equal(drawn(Latents(encode_pixels, 8, 0.5)))


def test_latents_on_disk_are_encoded_once_for_all_runs(tmp_path: Path) -> None:
    first, again, other = [], [], []
    filled(LatentStore(LatentCache.disk, CPU, tmp_path, "vae"), first)
    filled(LatentStore(LatentCache.disk, CPU, tmp_path, "vae"), again)
    filled(LatentStore(LatentCache.disk, CPU, tmp_path, "another vae"), other)
    assert (sum(first), sum(again), sum(other)) == (10, 0, 10)
    filled(LatentStore(LatentCache.disk, CPU, tmp_path, "vae"), other, flip=False)
    assert len(list(tmp_path.iterdir())) == 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


@pytest.mark.parametrize("at", [0.05, 0.6, 0.95])
def test_damaged_latents_on_disk_are_encoded_again(
    at: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, again, kept = LatentStore(LatentCache.disk, CPU, tmp_path, "vae"), [], []
    expected = drawn(filled(store))
    [path] = tmp_path.iterdir()
    flip_bit(path, at)
    assert drawn(filled(store, again)).equal(expected)
    assert (sum(again), f"{path} are damaged" in caplog.text) == (10, True)
    mean, std = load_file(path).values()
    save_file({"mean": mean, "std": std}, path)  # as earlier versions wrote it, without a checksum
    filled(store, kept)
    assert not kept


def fill_in_files_of_two(store: LatentStore, encode: Callable[[Tensor], tuple[Tensor, Tensor]] = encode_pixels,
                         ) -> tuple[Latents, list[int]]:
    """A latent cache that was filled in batches of 2, and the numbers of encoded images."""
    counts: list[int] = []
    latents = Latents(encode, 8, 0.5, store)
    latents.fill(make_photo_set(flip=True), counts.append, 2)
    return latents, counts


def test_many_latents_are_in_files_that_hold_few_and_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LatentStore(LatentCache.disk, CPU, tmp_path, "vae")
    expected = drawn(Latents(encode_pixels, 8, 0.5))
    monkeypatch.setattr(latent_cache, "FILE_ROWS", 5)
    latents, _ = fill_in_files_of_two(store)
    assert sorted(len(load_file(path)["mean"]) for path in tmp_path.iterdir()) == [2, 4, 4], "a multiple of the batch"
    assert drawn(latents).equal(expected)


def test_files_hold_whole_batches_of_every_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "FILE_ROWS", 6)
    latents = Latents(encode_pixels, 8, 0.5, LatentStore(LatentCache.disk, CPU, tmp_path, "vae"))
    counts: list[int] = []
    latents.fill(make_photo_set(flip=True), counts.append, 2, 4)
    assert counts == [2] * 5
    assert sorted(len(load_file(path)["mean"]) for path in tmp_path.iterdir()) == [2, 4, 4]


def test_a_killed_run_encodes_only_the_images_of_files_that_it_had_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, encoded = LatentStore(LatentCache.disk, CPU, tmp_path, "vae"), 0
    monkeypatch.setattr(latent_cache, "FILE_ROWS", 4)

    def dies(pixels: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal encoded
        if encoded == 6:
            raise SystemExit
        encoded += len(pixels)
        return encode_pixels(pixels)

    with pytest.raises(SystemExit):
        fill_in_files_of_two(store, dies)
    latents, counts = fill_in_files_of_two(store)
    assert sum(counts) == 6, "4 of 10 were in a file"
    assert drawn(latents).equal(drawn(Latents(encode_pixels, 8, 0.5)))


def test_one_large_file_of_an_earlier_version_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LatentStore(LatentCache.disk, CPU, tmp_path, "vae")
    fill_in_files_of_two(store)
    monkeypatch.setattr(latent_cache, "FILE_ROWS", 4)
    latents, counts = fill_in_files_of_two(store)
    assert not counts
    assert drawn(latents).equal(drawn(Latents(encode_pixels, 8, 0.5)))


def test_a_damaged_large_file_of_an_earlier_version_gives_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = LatentStore(LatentCache.disk, CPU, tmp_path, "vae")
    fill_in_files_of_two(store)
    [path] = tmp_path.iterdir()
    flip_bit(path, 0.6)
    monkeypatch.setattr(latent_cache, "FILE_ROWS", 4)
    fill_in_files_of_two(store)
    assert "are damaged" in caplog.text
    caplog.clear()
    _, counts = fill_in_files_of_two(store)
    assert (counts, caplog.text) == ([], "")


def test_the_digest_of_an_encoder_depends_on_its_weights_and_their_precision() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert digest(one) == digest(other)
    assert digest(one) != digest(other.half())


def test_batches_are_the_same_from_every_cache() -> None:
    assert make_batches(cache=True)(3)[0].latents.equal(make_batches()(3)[0].latents)


class RecordingModule(nn.Module):
    """Records the devices that it is moved to."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[str] = []

    def to(self, device: torch.device) -> "RecordingModule":  # type: ignore[override]
        self.moves.append(str(device))
        return self


def test_offloaded_modules_are_on_the_device_for_sampling_and_leave_it_even_after_an_error() -> None:
    module = RecordingModule()
    offload = ModuleOffload([module], torch.device("meta"))
    offload.to_host()
    with pytest.raises(ZeroDivisionError), offload.on_device():
        assert module.moves == ["cpu", "meta"]
        raise ZeroDivisionError
    assert module.moves == ["cpu", "meta", "cpu"]


def test_modules_make_room_for_others_and_come_back() -> None:
    module = RecordingModule()
    with ModuleOffload([module], torch.device("meta")).on_host():
        assert module.moves == ["cpu"]
    assert module.moves == ["cpu", "meta"]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    saved = dict(os.environ)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.pop(name, None)
    yield os.environ  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(saved)


def test_allocator_settings_are_set_unless_the_user_has_set_some(environment: dict[str, str]) -> None:
    cli.configure_allocator(Memory())
    assert "PYTORCH_ALLOC_CONF" not in environment
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:64"
    cli.configure_allocator(Memory(expandable_segments=True))
    assert "PYTORCH_ALLOC_CONF" not in environment
    del environment["PYTORCH_CUDA_ALLOC_CONF"]
    cli.configure_allocator(Memory(expandable_segments=True, max_split_size_mb=128))
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True,max_split_size_mb:128"


# -- out of memory ------------------------------------------------------------------------------------------------

ALL = {"memory__gradient_checkpointing": True, "memory__ema_device": EmaDevice.cpu,
       "memory__autocast_cache": False, "memory__optimizer_in_backward": True}


def test_advice_names_unused_options_first_those_that_leave_the_results_unchanged() -> None:
    half = {"precision__dtype": Dtype.fp16}
    assert oom_advice.suggest_overrides("step", resolve_demo(T4, **half)) == (
        "memory.gradient_checkpointing=true memory.ema_device=cpu memory.autocast_cache=false "
        "memory.optimizer_in_backward=true")
    assert oom_advice.suggest_overrides("step", resolve_demo(T4, **half, **ALL)) == "optimizer=adamw8bit"
    used = ALL | {"optimizer__kind": OptimizerKind.adafactor}
    assert "memory.offload_optimizer=true" in oom_advice.suggest_overrides("step", resolve_demo(T4, **half, **used))
    prodigy = {"optimizer__kind": OptimizerKind.prodigy, "train__learning_rate": 1.0}
    for other in ({"train__gradient_accumulation_steps": 2}, prodigy):
        advice = oom_advice.suggest_overrides("step", resolve_demo(T4, **other))
        assert "optimizer_in_backward=true" not in advice


RUNS: list[dict[str, object]] = [
    {}, {"dataset__buckets": True}, {"train__compile": True}, {"memory__split_prior": True},
    {"memory__weights": Weights.half, "memory__rounding": Rounding.stochastic},
    {"optimizer__kind": OptimizerKind.paged_adamw8bit}, {"train__channels_last": True},
    {"train__gradient_accumulation_steps": 2}, {"method__kind": MethodKind.lora, "method__name": "lora"},
    {"train__train_text_encoder": True, "train__text_encoder_learning_rate": 1e-6},
]


@pytest.mark.parametrize("values", RUNS, ids=str)
def test_advised_overrides_are_valid(values: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated until the advice is a larger machine."""
    monkeypatch.setattr(validation, "find_spec", lambda name: True)
    values = {"precision__dtype": Dtype.fp16} | values
    previous: list[str] = []
    while (typed := oom_advice.suggest_overrides("step", resolve_demo(T4, **values))) not in previous:
        previous.append(typed)
        if "machine" in typed:
            return
        for word in typed.split():
            key, _, value = word.partition("=")
            key = "optimizer.kind" if key == "optimizer" else key
            if key.startswith("memory.ema_device"):
                values[key.replace(".", "__")] = EmaDevice(value)
            elif key == "method.base_weights":
                values["method__base_weights"] = BaseWeights(value)
            elif key == "optimizer.kind":
                values["optimizer__kind"] = OptimizerKind(value)
            else:
                values[key.replace(".", "__")] = {"true": True, "false": False}.get(value) if value in (
                    "true", "false", "null") else int(value)
    pytest.fail(f"{typed} is advised again")


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("lever", ["optimizer_in_backward", "fully_shard"])
@pytest.mark.parametrize("photos", [None, 4, 5])
def test_the_advised_batch_size_is_accepted_with_a_global_batch_size(
        processes: int, lever: str, photos: int | None) -> None:
    if (processes > 1) is (lever == "optimizer_in_backward"):
        return  # it works in one process, or in several
    values: dict[str, object] = {
        "train__global_batch_size": photos, "train__train_batch_size": 5, "hardware__gpus": processes,
        "memory__auto": False, f"memory__{lever}": True}
    recipe = resolve_demo(**values)
    words = next(oom_advice._concessions(recipe)).split()
    assert words[0].startswith("train.train_batch_size=")
    for word in words:
        key, _, value = word.partition("=")
        values[key.replace(".", "__")] = int(value) if value.isdecimal() else value == "true"
    smaller = resolve_demo(**values)
    setup._check_processes(smaller, Engine(world_size=processes, local_world_size=processes))


def test_a_machine_with_four_gpus_is_not_used_for_one_process() -> None:
    recipe = resolve_demo(T4, hardware__gpus=4, memory__auto=False)
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match=r"nproc-per-node=4 .* or hardware\.gpus=1"):
        setup._check_processes(recipe, Engine(device=cuda))
    setup._check_processes(recipe, Engine(device=cuda, world_size=8, local_world_size=4))
    setup._check_processes(recipe, Engine())


def test_advice_for_several_processes_has_no_options_for_a_single_process() -> None:
    recipe = resolve_demo(T4, precision__dtype=Dtype.fp16)
    assert "in_backward=true" in oom_advice.suggest_overrides("step", recipe)
    assert "in_backward=true" not in oom_advice.suggest_overrides("step", recipe.with_processes(2))


def test_advice_for_generating_images_is_a_smaller_batch() -> None:
    assert oom_advice.suggest_overrides("class_images", resolve_demo(T4)) == "prior.sample_batch_size=1"
    assert "sample.images_per_prompt=1" in oom_advice.suggest_overrides("sample", resolve_demo(T4))
    one = {"sample__images_per_prompt": 1, "prior__sample_batch_size": 1}
    assert oom_advice.suggest_overrides("sample", resolve_demo(T4, **one)).startswith("memory.")


def test_the_message_has_the_phase_both_peaks_and_what_to_type() -> None:
    from dreambooth.errors import OutOfMemory

    meter = MemoryMeter(CPU, lambda phase: f"less={phase}", {"step": 12.5})
    words = r"during step \(predicted 12.50 GiB, measured process_rss/step_gib .*type less=step"
    with pytest.raises(OutOfMemory, match=words), meter.phase("step"):
        torch.empty(2**45)


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc")])
def test_every_kind_of_out_of_memory_error_is_recognised(error: Exception) -> None:
    from dreambooth.errors import OutOfMemory, UserError

    with pytest.raises(OutOfMemory), MemoryMeter(CPU).phase("load"):
        raise error
    with pytest.raises(OutOfMemory), MemoryMeter(CPU).phase("load"):
        raise UserError("could not be loaded") from error


@pytest.mark.parametrize("full", [True, False])
def test_a_primitive_error_of_onednn_is_out_of_memory_only_if_memory_is_exhausted(
        full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has the same message for a shape that it cannot compute, which is a fault and keeps its traceback."""
    from dreambooth.errors import OutOfMemory
    from dreambooth.runtime import memory_meter

    monkeypatch.setattr(memory_meter, "PROBE_BYTES", 2**62 if full else 2**20)
    with pytest.raises(OutOfMemory if full else RuntimeError), MemoryMeter(CPU).phase("step"):
        raise RuntimeError("could not create a primitive")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), MemoryMeter(CPU).phase("step"):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("fault, phase, kept", [
    pytest.param("little_memory_in_step_3", "step", 2, marks=pytest.mark.slow),
    ("little_memory_in_class_images", "class_images", None)])
def test_memory_that_really_runs_out_ends_in_a_sentence_and_keeps_the_checkpoint(
    fault: str, phase: str, kept: int | None, tmp_path: Path
) -> None:
    """The child limits its own address space to the present size, so that the system refuses the next large allocation.
    """
    log = tmp_path / "out.txt"
    more = ["train.train_batch_size=64", "sample.every=null"] if phase == "step" else ["prior.sample_batch_size=64",
                                                                                     "prior.num_class_images=64"]
    assert train(tmp_path, "checkpoint.every=2", *more, fault=fault, log=log) == 4
    output = log.read_text()
    assert f"out of memory during {phase} (measured process_rss/{phase}_gib" in output
    assert "type memory.gradient_checkpointing=true" in output or "type prior.sample_batch_size=1" in output
    assert "Traceback" not in output
    checkpoint = latest(the_run(tmp_path) / "checkpoints") if kept else None
    assert (checkpoint and checkpoint.name) == (kept and f"step-{kept:06d}")


@pytest.mark.slow
def test_a_run_with_every_exact_memory_option_gives_the_same_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = []
    for number, options in enumerate((["memory=fast"], ["memory=lowest", "memory.latent_cache=disk"])):
        root = tmp_path / str(number)
        assert train(root, "train.max_train_steps=3", "sample.every=null", *options, log=tmp_path / "out.txt") == 0
        run = the_run(root)
        weights.append([load_file(path) for path in sorted((run / "model").rglob("*.safetensors"))]
                       + [load_file(path) for path in sorted((run / "checkpoints/step-000003").glob("*.safetensors"))])
    for one, other in zip(*weights, strict=True):
        assert one.keys() == other.keys()
        assert [key for key in one if not one[key].equal(other[key])] == []


@pytest.mark.slow
def test_half_weights_and_offload_run_end_to_end_and_resume(tmp_path: Path) -> None:
    for number, options in enumerate((["memory.weights=half", "memory.rounding=stochastic"],
                                     ["memory.offload_optimizer=true", "memory.split_prior=true"])):
        root = tmp_path / str(number)
        for steps in (1, 2):
            assert train(root, f"train.max_train_steps={steps}", "precision=bf16", "sample.every=null",
                         "prior.num_class_images=1", *options, log=tmp_path / "out.txt") == 0
