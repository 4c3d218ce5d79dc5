"""A Python that has imported the libraries already: `subprocess.run([PYTHON, "-m", "dreambooth.train", ...])`.

A command of the package spends some five CPU seconds on imports. PYTHON takes the place of sys.executable and starts in
a tenth of a second: it asks a server, which imports the libraries once per test session, to fork. The forked process
has the caller's arguments, environment, working directory and standard streams; it receives the signals that PYTHON
receives, and PYTHON ends as it does. Commands that this process starts with sys.executable are forked as well.

Use sys.executable itself where the fact depends on a fresh interpreter (what is imported when, settings that libraries
read at import, the parent of a process), and in one test of each command.
"""

import atexit
import copy
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "DREAMBOOTH_WARM_PYTHON"
PYTHON = os.environ.get(VARIABLE, sys.executable)
# No command of the package: a command's module is imported anew in each process, as its state is that of a process.
LIBRARIES = ("torch", "accelerate", "hydra.main", "hydra._internal.hydra", "PIL.Image", "safetensors.torch",
             "boto3", "dreambooth.run")
TRACKING = ("mlflow", "mlflow.diffusers", "mlflow.store.tracking.sqlalchemy_store")
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# Run by an isolated interpreter without site-packages, which is up in 20 ms.
CLIENT = """
import json, os, signal, socket, struct, sys

python, server, words = sys.argv[1], sys.argv[2], sys.argv[3:]
if words[:1] not in (["-m"], ["-c"]):
    os.execv(python, [python, *words])
connection = socket.socket(socket.AF_UNIX)
connection.connect(server)
request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [struct.pack("q", len(request))], [0, 1, 2])
connection.sendall(request)
for number in {signals}:
    signal.signal(number, lambda number, frame: connection.send(bytes([number])))
if not (answer := connection.recv(4)):
    sys.exit("the warm Python's server has ended: " + open(server + ".log").read())
[status] = struct.unpack("i", answer)
code = os.waitstatus_to_exitcode(status)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def share_files() -> None:
    """Read once, in this process and for those forked from it, the files that libraries would read again and again.

    These are the descriptions of AWS's services, megabytes of JSON that botocore reads for each session: each client of
    the package would cost a tenth of a CPU second, one for SageMaker two. And the files in conf/ and of Hydra itself,
    which are a quarter of the time of composing a configuration.
    """
    from botocore.loaders import JSONFileLoader
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource

    for source in (FileConfigSource, ImportlibResourcesConfigSource):
        _share_configs(source)

    read, contents = JSONFileLoader.load_file, dict[str, Any]()

    def read_once(self: Any, file_path: str) -> Any:
        if file_path not in contents:
            contents[file_path] = read(self, file_path)
        return contents[file_path]

    JSONFileLoader.load_file = read_once


def _share_configs(source: Any) -> None:
    """Let a kind of Hydra's config sources copy what it has read of a file that did not change."""
    read, contents = source.load_config, dict[Any, Any]()

    def read_once(self: Any, config_path: str) -> Any:
        with suppress(OSError):
            file = Path(self.path, self._normalize_file_name(config_path)).absolute()
            key = file, self.path, self.provider, file.stat().st_mtime_ns if self.scheme() == "file" else 0
            if key not in contents:
                contents[key] = read(self, config_path)
            return copy.deepcopy(contents[key])
        return read(self, config_path)

    source.load_config = read_once


def start() -> None:
    """Fork the server, which imports nothing before the first command, and put PYTHON's path into the environment.

    The server ends with the process that called this.
    """
    global PYTHON
    folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
    client, python = folder / "client.py", folder / "python"
    client.write_text(CLIENT.format(signals=tuple(map(int, PASSED_ON))), encoding="utf-8")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "{sys.executable}" "{folder}/server" "$@"\n',
                      encoding="utf-8")
    python.chmod(0o755)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "server"))
    listening.listen(64)
    alive, held = os.pipe()
    PYTHON = os.environ[VARIABLE] = str(python)
    if server := os.fork():
        os.close(alive)
        listening.close()
        atexit.register(_stop, server, held, folder, os.getpid())
        return
    os.close(held)
    try:
        Server(listening, alive, str(python)).serve(folder / "server.log")
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _stop(server: int, held: int, folder: Path, owner: int) -> None:
    if os.getpid() != owner:
        return
    os.close(held)
    os.waitpid(server, 0)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


class Server:
    """Forks a process per connection. A byte from the client is a signal for it; the answer is its wait status."""

    def __init__(self, listening: socket.socket, alive: int, python: str) -> None:
        self.listening, self.alive, self.python = listening, alive, python
        self.children: dict[int, socket.socket] = {}
        self.imported: set[str] = set()

    def serve(self, log: Path) -> None:
        """Until the tests' process ends."""
        nothing, out = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        for number, stream in enumerate((nothing, out, out)):
            os.dup2(stream, number)
        _open_streams()
        atexit._clear()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C of a terminal reaches the tests, which then end
        signal.signal(signal.SIGCHLD, lambda *_: None)
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        self.ready = selectors.DefaultSelector()
        self.ready.register(self.alive, selectors.EVENT_READ, self._end)
        self.ready.register(woken, selectors.EVENT_READ, lambda: self._reap(woken))
        self.ready.register(self.listening, selectors.EVENT_READ, self._begin)
        while True:
            for key, _ in self.ready.select():
                key.data()

    def _end(self) -> None:
        for child in self.children:
            os.kill(child, signal.SIGKILL)
        os._exit(0)

    def _reap(self, woken: int) -> None:
        os.read(woken, 4096)
        with suppress(ChildProcessError):
            while True:
                child, status = os.waitpid(-1, os.WNOHANG)
                if not child:
                    return
                with suppress(OSError), self.children.pop(child) as connection:
                    with suppress(KeyError):
                        self.ready.unregister(connection)
                    connection.sendall(status.to_bytes(4, sys.byteorder))

    def _begin(self) -> None:
        connection, _ = self.listening.accept()
        try:
            header, streams, *_ = socket.recv_fds(connection, 8, 3)
            with connection.makefile("rb") as file:
                words, folder, environment = json.loads(file.read(int.from_bytes(header, sys.byteorder)))
        except (OSError, ValueError):  # the client was killed before it had sent its request
            connection.close()
            return
        self._import("\n".join(words))
        if not (child := os.fork()):
            self.ready.close()
            self.listening.close()
            _run(words, folder, environment, streams, self.python)
        for stream in streams:
            os.close(stream)
        self.children[child] = connection
        self.ready.register(connection, selectors.EVENT_READ, lambda: self._signal(child, connection))

    def _signal(self, child: int, connection: socket.socket) -> None:
        if child not in self.children:  # it ended in this very round
            return
        try:
            numbers = connection.recv(64)
        except OSError:
            numbers = b""
        if not numbers:  # the client was killed
            self.ready.unregister(connection)
        for number in numbers or bytes([signal.SIGKILL]):
            os.kill(child, number)  # not reaped yet: it is there, or a zombie

    def _import(self, command: str) -> None:
        """Import what this command and later ones use: MLflow takes two CPU seconds, and most runs do without it."""
        tracked = "mlflow" in command or "tracking=none" not in command
        missing = [name for name in (*LIBRARIES, *(TRACKING if tracked else ())) if name not in self.imported]
        self.imported.update(missing)
        for library in missing:
            with suppress(Exception):  # the command fails as it would in a fresh interpreter
                importlib.import_module(library)
        if "dreambooth.run" in missing:
            with suppress(Exception):
                _prepare()
        if missing:
            gc.collect()
            gc.freeze()


def _prepare() -> None:
    """What most commands do once and keep in memory: Hydra's parsers, image formats, the description of S3."""
    import boto3
    from hydra import compose, initialize_config_dir
    from PIL import Image

    from dreambooth.config.compose import conf_dir
    from dreambooth.models.loading import import_libraries

    import_libraries()
    importlib.import_module("peft")
    Image.init()
    boto3.client("s3", region_name="us-east-1")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose("config", ["hardware=cpu", "train.max_train_steps=8", "sample.every=null", "run_root=/a/folder"])


def _run(words: list[str], folder: str, environment: dict[str, str], streams: list[int], python: str) -> None:
    """In the forked process: become `python WORDS`. Does not return."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    _open_streams()
    code = 1
    try:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = python
        sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)
        code = _executed(words)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _open_streams() -> None:
    """Python's own, of the descriptors 0, 1 and 2: pytest has put others in their place."""
    sys.stdin = os.fdopen(0, "r", -1, "utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", -1, "utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, "utf-8", "backslashreplace", closefd=False)


def _executed(words: list[str]) -> int:
    """Run `-m MODULE ...` or `-c CODE ...` and return the exit code."""
    option, what, *arguments = words
    sys.argv = [option, *arguments]
    main: Any = type(sys)("__main__")
    try:
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = main
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
