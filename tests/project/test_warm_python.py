"""The Python of the tests behaves like a fresh one: arguments, streams, exit codes, signals."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.warm_python import PYTHON

PROCESS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PYTHON, *words], capture_output=True, text=True, check=False, timeout=600, **options)


def test_a_process_has_the_callers_arguments_environment_folder_and_streams(tmp_path: Path) -> None:
    code = ("import os, sys; print(sys.argv, os.getcwd(), os.environ['X'], sys.stdin.read(), sys.executable)\n"
            "print('error', file=sys.stderr)")
    result = python("-c", code, "a", "b c", cwd=tmp_path, env=os.environ | {"X": "x"}, input="input")
    assert (result.returncode, result.stderr) == (0, "error\n")
    assert result.stdout == f"['-c', 'a', 'b c'] {tmp_path} x input {PYTHON}\n"


@pytest.mark.parametrize("code, returncode, error", [
    ("import sys; sys.exit(3)", 3, ""), ("import sys; sys.exit('text')", 1, "text\n"), ("", 0, ""),
    ("raise ValueError", 1, "ValueError\n"), ("import os; os.kill(os.getpid(), 9)", -9, "")])
def test_it_ends_as_a_fresh_python_ends(code: str, returncode: int, error: str) -> None:
    result = python("-c", code)
    assert (result.returncode, result.stderr[-len(error):] if error else result.stderr) == (returncode, error)


def test_functions_registered_at_exit_run_and_modules_are_those_of_a_process() -> None:
    assert python("-c", "import atexit; atexit.register(print, 'at exit')").stdout == "at exit\n"
    assert python("-m", "dreambooth.train", "--cfg", "job").stdout.startswith("run_root: ")
    code = "import sys; print([name for name in ('dreambooth.train', 'dreambooth.cli') if name in sys.modules])"
    assert python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_reaches_the_process(number: signal.Signals) -> None:
    process = subprocess.Popen([PYTHON, "-c", PROCESS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    forked = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(600) == -number
    until = time.monotonic() + 600
    while psutil.pid_exists(forked):
        assert time.monotonic() < until
        time.sleep(0.01)
