"""Tests of the folder of compiled code: where it is, who may write to it, and that a later run loads its code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.runtime import compile_cache


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compile_cache.VARIABLE, "")


def test_the_default_is_a_folder_of_the_user_that_nobody_else_may_enter(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder = compile_cache.set_folder(None)
    assert folder == tmp_path / ".cache/dreambooth/compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ[compile_cache.VARIABLE] == str(folder)
    monkeypatch.setenv(compile_cache.VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert compile_cache.set_folder(None) == tmp_path / "caches/dreambooth/compiled"


def test_the_setting_comes_before_the_variable_and_the_variable_before_the_default(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "variable"))
    assert compile_cache.set_folder(None) == tmp_path / "variable"
    assert compile_cache.set_folder(str(tmp_path / "setting")) == tmp_path / "setting"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_to_which_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "it's mine"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(UserError, match="other users may write") as caught:
        compile_cache.set_folder(str(folder))
    assert not os.environ[compile_cache.VARIABLE]
    command = str(caught.value).partition(": type ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    assert compile_cache.set_folder(str(folder)) == folder


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match=r"belongs to another user.*type train.compile_cache=FOLDER"):
        compile_cache.set_folder(str(tmp_path))


def test_a_path_that_cannot_be_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UserError, match=r"cannot be used .*type train.compile_cache=FOLDER"):
        compile_cache.set_folder(str(tmp_path / "file" / "folder"))


SCRIPT = """
import sys
from dreambooth.runtime import compile_cache
compile_cache.set_folder(sys.argv[1])
import torch
from torch._dynamo.utils import counters
class Model(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()
model = Model(3, 3)
model.compile(dynamic=False)
model(torch.ones(1, 3)).sum().backward()
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_loads_what_the_first_has_compiled(tmp_path: Path) -> None:
    found = [subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "compiled")], check=True, text=True,
                            capture_output=True).stdout.split() for _ in range(2)]
    assert found == [["0", "1"], ["1", "0"]]
