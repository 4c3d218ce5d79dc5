"""Resident memory of weights that are mapped from files."""

import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dreambooth.runtime.mapped_weights import release_pages
from dreambooth.runtime.module_offload import ModuleOffload

SIDE = 1024  # the weight has 4 MiB
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system keeps and frees pages in its own way")


@pytest.fixture
def mapped(tmp_path: Path) -> nn.Linear:
    """A layer whose weight is mapped from a file and was read."""
    save_file({"weight": torch.randn(SIDE, SIDE)}, tmp_path / "layer.safetensors")
    layer = nn.Linear(SIDE, SIDE, bias=False, device="meta")
    layer.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    layer.weight.sum()
    return layer


def resident_bytes(folder: Path) -> int:
    """Bytes of the files in `folder` that are in the resident memory of this process."""
    return sum(area.rss for area in psutil.Process().memory_maps(grouped=False) if area.path.startswith(str(folder)))


def test_idle_weights_leave_the_resident_memory_until_they_are_read_again(mapped: nn.Linear, tmp_path: Path) -> None:
    expected = mapped.weight.clone()
    assert resident_bytes(tmp_path) >= 4 * SIDE**2
    ModuleOffload([mapped], torch.device("cpu")).to_host()
    assert resident_bytes(tmp_path) == 0
    assert mapped.weight.equal(expected)
    assert resident_bytes(tmp_path) >= 4 * SIDE**2


def test_released_bytes_are_returned(mapped: nn.Linear, tmp_path: Path) -> None:
    resident = resident_bytes(tmp_path)
    assert release_pages([mapped]) == resident > 0


def test_changed_weights_stay_as_they_are(mapped: nn.Linear, tmp_path: Path) -> None:
    with torch.no_grad():
        mapped.weight[0, 0] = 5.0
    expected = mapped.weight.clone()
    assert release_pages([mapped]) == 0
    assert mapped.weight.equal(expected)
    assert mapped.weight[0, 0] == 5.0


def test_files_of_other_modules_are_left_alone(mapped: nn.Linear, tmp_path: Path) -> None:
    assert release_pages([nn.Linear(SIDE, SIDE)]) == 0
    assert resident_bytes(tmp_path) >= 4 * SIDE**2


@pytest.mark.parametrize("error", [psutil.AccessDenied, ValueError, AttributeError])  # psutil has it only with smaps
def test_an_unreadable_memory_map_releases_nothing(
    error: type[Exception], mapped: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> list[object]:
        raise error

    monkeypatch.setattr(psutil.Process, "memory_maps", refuse)
    assert release_pages([mapped]) == 0


@pytest.mark.parametrize("counters", [{"rss": 0}, {"rss": 4096, "swap": 4096}])  # huge pages, and changed pages in swap
def test_memory_that_is_no_copy_of_a_file_is_kept(counters: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(SIDE, SIDE)
    expected, address = layer.weight.clone(), layer.weight.data_ptr() & -mmap.PAGESIZE
    area = SimpleNamespace(addr=f"{address:x}-{address + mmap.PAGESIZE:x}", path="/anon_hugepage",
                           **{"anonymous": 0, "swap": 0} | counters)
    monkeypatch.setattr(psutil.Process, "memory_maps", lambda *_, **options: [area])
    assert release_pages([layer]) == 0
    assert layer.weight.equal(expected)
