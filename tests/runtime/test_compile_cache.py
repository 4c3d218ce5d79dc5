"""Tests of the folder of compiled code: where it is, who may write to it, and that a later run loads its code."""

import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from dreambooth.config.schema import Train
from dreambooth.errors import UserError
from dreambooth.runtime import compile_cache


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compile_cache.VARIABLE, "of this test")  # so that it has its value again after the test
    monkeypatch.delenv(compile_cache.VARIABLE)
    monkeypatch.setattr(compile_cache, "USER_FOLDER", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_the_default_is_a_folder_of_the_user_that_nobody_else_may_enter(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compile_cache.set_folder(None)
    assert folder.parent == tmp_path / ".cache/dreambooth/compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ[compile_cache.VARIABLE] == str(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert compile_cache.set_folder(None).parent == tmp_path / "caches/dreambooth/compiled"


def test_new_parents_are_private_whatever_the_umask_is() -> None:
    before = os.umask(0o002)
    try:
        folder = compile_cache.set_folder(None)
    finally:
        os.umask(before)
    assert {part.stat().st_mode & 0o777 for part in (folder, *list(folder.parents)[:3])} == {0o700}


def test_the_setting_comes_before_the_variable_and_the_variable_before_the_default(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "USER_FOLDER", str(tmp_path / "variable"))
    assert compile_cache.set_folder(str(tmp_path / "setting")).parent == tmp_path / "setting"
    assert compile_cache.set_folder(None).parent == tmp_path / "variable", "the setting of an earlier run has ended"


def test_another_cpu_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for flags in ("flags : avx2 fma", "flags : fma avx2", "flags : avx2 fma avx512f", "Features : asimd"):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n", "utf-8")
        monkeypatch.setattr(compile_cache, "CPU_INFO", tmp_path / "cpuinfo")
        folders.append(compile_cache.set_folder(None))
    assert folders[0] == folders[1] and len(set(folders)) == 3


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_change_is_refused(tmp_path: Path, mode: int) -> None:
    code = compile_cache.set_folder(str(tmp_path / "code"))
    code.chmod(mode)
    del os.environ[compile_cache.VARIABLE]
    with pytest.raises(UserError, match=rf"^other users can change {code}, .*type train.compile_cache=FOLDER"):
        compile_cache.set_folder(str(tmp_path / "code"))
    assert compile_cache.VARIABLE not in os.environ


@pytest.mark.parametrize("mode, refused", [(0o777, True), (0o1777, False), (0o755, False)])
def test_a_parent_in_which_others_can_replace_the_folder_is_refused(tmp_path: Path, mode: int, refused: bool) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(mode)
    (tmp_path / "link").symlink_to(parent)
    for name in ("parent", "link"):
        with pytest.raises(UserError, match=f"other users can change {parent}") if refused else nullcontext():
            compile_cache.set_folder(str(tmp_path / name / "code"))


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache.os, "geteuid", lambda: 4242)
    stat = Path.stat
    owned = SimpleNamespace(st_mode=0o700, st_uid=4343)
    monkeypatch.setattr(Path, "stat", lambda path, **more: owned if path.name == "theirs" else stat(path, **more))
    with pytest.raises(UserError, match=r"other users can change .*theirs, "):
        compile_cache.set_folder(str(tmp_path / "theirs"))


def test_a_path_that_cannot_be_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    for path in (tmp_path / "file" / "folder", "~nobody-has-this-name/folder"):
        with pytest.raises(UserError, match=r"cannot be the folder of compiled code .*type train.compile_cache=FOLDER"):
            compile_cache.set_folder(str(path))


def test_without_a_home_the_code_is_in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = compile_cache.set_folder(None)
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700


def test_the_folder_of_precompiled_headers_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compile_cache.set_folder(None)
    [headers] = tmp_path.glob("torchinductor_*")
    headers.chmod(0o777)
    with pytest.raises(UserError, match=f"other users can change {headers}, .*type export TMPDIR=FOLDER"):
        compile_cache.set_folder(None)


def test_only_a_run_that_compiles_has_a_folder(tmp_path: Path) -> None:
    assert compile_cache.prepare(Train()) == {} and compile_cache.VARIABLE not in os.environ
    row = compile_cache.prepare(Train(compile=True, compile_cache=str(tmp_path / "code")))["compiled"]
    assert row.startswith(f"in {tmp_path / 'code'}/") and "the first step takes minutes" in row
    assert os.environ[compile_cache.VARIABLE] in row


def test_an_address_is_no_folder() -> None:
    with pytest.raises(ValueError, match=r"train\.compile_cache must be a local folder, or null, not s3://b/x"):
        Train(compile_cache="s3://b/x")


SCRIPT = """
import os, sys
from dreambooth.models import loading
from dreambooth.runtime import compile_cache
loading.import_libraries()
assert compile_cache.USER_FOLDER is None, os.environ[compile_cache.VARIABLE]  # torch sets it
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
