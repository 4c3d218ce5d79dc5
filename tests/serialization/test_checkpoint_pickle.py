"""What a .ckpt may contain beside tensors, and how much of it is unpacked."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreambooth.errors import UserError
from dreambooth.serialization import checkpoint_pickle
from dreambooth.serialization.detect_format import open_model_file

WEIGHTS = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}


@pytest.mark.parametrize(("archive", "module"), [  # the module in NumPy 2 and 1
    (True, b"numpy._core"), (False, b"numpy._core"), (False, b"numpy.core")])
def test_numbers_of_numpy_beside_the_weights_are_read(archive: bool, module: bytes, tmp_path: Path) -> None:
    numbers = {"global_step": np.int64(875000), "loss": np.float32(0.5), "best": np.float64(-1.25),
               "done": np.bool_(True), "big": np.array(7, ">u2")[()], "half": np.float16(2)}
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": WEIGHTS, **numbers}, path, _use_new_zipfile_serialization=archive)
    if not archive:
        path.write_bytes(path.read_bytes().replace(b"numpy._core", module))
    assert open_model_file(path).metadata == {"global_step": "875000"}
    content = checkpoint_pickle.read(path)
    assert {name: content[name] for name in numbers} == {name: number.item() for name, number in numbers.items()}


@pytest.mark.parametrize("value", [np.array(b"12345678", "V8")[()], np.array("text")[()], np.complex128(1),
                                   np.array((1, 2), "i4,i4")[()], np.zeros(2), np.datetime64("2020-01-01")])
def test_other_objects_of_numpy_are_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": WEIGHTS, "more": value}, path)
    with pytest.raises(UserError, match=r"wants more than weights .*nothing of it was run: type a"):
        open_model_file(path)


@pytest.mark.parametrize(("name", "size"), [("archive/data.pkl", 9), ("archive/data/0", 20)])
def test_an_archive_that_unpacks_to_much_more_is_refused_before_it_is_unpacked(
    name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(name, bytes(size * 2**20))
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match=rf"would take {size} MiB .*nothing of it was unpacked: type a"):
        open_model_file(path)
