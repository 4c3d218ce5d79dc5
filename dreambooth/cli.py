"""Helpers that all commands use: arguments, error messages on stderr, and exit codes."""

import argparse
import atexit
import codecs
import errno
import io
import logging
import math
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dreambooth.config.schema import Memory
from dreambooth.errors import EXIT_REPORT_DIR, DoesNotFit, DreamBoothError, Interrupted, LostProcess, UserError
from dreambooth.runtime import cpu_tuning, srun
from dreambooth.utils import atomic_files, masking, permissions, quoting
from dreambooth.utils.suggestions import closest

# Hydra arguments for a command that writes no run folder, and with -m no table of trials.
_NO_RUN_FOLDER = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none",
                  "~hydra.callbacks.sweep")

# Errors of the system that a user can act on, and what to do. Others, such as a file that is missing although this
# package wrote it, are internal faults.
SYSTEM_ERRORS = {
    errno.EACCES: "type another path, or change its permissions", errno.EPERM: "type another path",
    errno.EROFS: "type a path on a disk that can be written", errno.ENAMETOOLONG: "type a shorter path",
    errno.ELOOP: "its links form a circle: type another path", errno.EMFILE: "type ulimit -n 4096, then the command",
    errno.ENFILE: "close other programs, then repeat the command"}

# Keys of .hydra/config.yaml that the command evaluate reads again: prompts, and the address of MLflow. A run whose
# address contains a password or token is refused, and the file is removed.
_READ_AGAIN = re.compile(r"uri|\w*prompts?")

_intercepted: dict[str, str] = {}  # key -> value of overrides that are hidden from Hydra
Outcome = TypeVar("Outcome")  # what a job returns
_exit_codes: list[int] = []  # one per failed job; a sweep runs several jobs
_last_failure: list[str] = []  # the reason if the last job has failed, otherwise empty


class ArgumentParser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one sentence, and exits with the exit code of UserError."""

    def error(self, message: str) -> NoReturn:
        """Print one sentence that is made from argparse's `message`, and exit with the exit code of UserError."""
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = closest(found[1], re.findall(r"[\w-]+", found[2]), 1)
            message = f"{found[1]} is not known: " + (f"did you mean {near[0]}?" if near else f"type one of {found[2]}")
        else:
            message = f"{message}: type {self.prog} --help"
        print(f"dreambooth: {masking.mask_urls(message)}", file=sys.stderr)
        sys.exit(UserError.exit_code)


def run_hydra(command: Callable[[], Any], kind: type) -> None:
    """Run a command with the arguments in sys.argv. Wrong input ends in one sentence instead of Hydra's own messages.

    Args:
        command: a function that `hydra.main` decorates.
        kind: dataclass of the command's configuration.
    """
    use_utf8()
    _report_failure(lambda: _run_hydra(command, kind))


def run_hydra_without_folder(command: Callable[[], Any], kind: type, name: str) -> None:
    """Run a command as `run_hydra` does, but leave no file of Hydra behind, even with -m.

    Args:
        name: name of the command's help text in conf/hydra/help/.
    """
    with tempfile.TemporaryDirectory() as folder:  # Hydra writes files for every sweep
        sys.argv[1:] += [*_NO_RUN_FOLDER, f"hydra/help={name}", f"hydra.sweep.dir={folder}"]
        run_hydra(command, kind)


def _run_hydra(command: Callable[[], Any], kind: type) -> None:
    from dreambooth.config import overrides
    from dreambooth.sweeps import hydra_callbacks

    words, options = _parse_arguments(kind)
    prepared = overrides.prepare(words, kind)
    sys.argv[1:] = [*options, *prepared]  # options first: argparse refuses overrides on both sides of an option
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises its errors instead of printing them
    try:
        hydra_callbacks.call_command(command)
    except Exception as error:
        if known := overrides.explain(error, kind, prepared):
            raise known from error
        raise


def _parse_arguments(kind: type) -> tuple[list[str], list[str]]:
    """Parse sys.argv with Hydra's parser. Return two lists: the overrides, and the options with their values.

    Args:
        kind: dataclass of the command's configuration. Its keys are suggested if an option is not known.

    Raises:
        UserError: an option is not known, or options contradict each other.
    """
    from hydra._internal.utils import get_args_parser

    from dreambooth.config.overrides import setting_keys

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}: type --help for all options")

    parser.error = refuse  # type: ignore[method-assign]
    options, rest = parser.parse_known_args()
    if unknown := next((word for word in rest if word.startswith("-")), None):
        name, equals, value = unknown.lstrip("-").partition("=")
        if near := closest(unknown, [f"--{action.dest.replace('_', '-')}" for action in parser._actions], 1):
            raise UserError(f"there is no option {unknown}: did you mean {near[0]}?")
        if near := closest(name.replace("-", "_"), setting_keys(kind), 1, cutoff=0.8):
            key = quoting.shell_line([f"{near[0]}={value if equals else 'VALUE'}"])
            raise UserError(f"there is no option {unknown}: did you mean {key}, without dashes?")
        refuse(f"there is no option {unknown}")
    if options.resolve and not (options.cfg or options.help):
        raise UserError("--resolve shows nothing by itself: type --cfg job --resolve")
    if sum(map(bool, (options.run, options.multirun, options.cfg, options.info, options.shell_completion))) > 1:
        raise UserError("only one of --run, --multirun, --cfg, --info and --shell-completion is possible: type one")
    words = [*options.overrides, *rest]
    return words, [word for word in sys.argv[1:] if word not in words]


def use_utf8() -> None:
    """Restart this process in Python's UTF-8 mode if the locale's encoding is ASCII.

    Without the restart, prompts and file names with non-ASCII characters could be neither read nor printed.

    If the encoding is not ASCII, it is kept. Characters that it cannot express are printed as escape sequences.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_job(job: Callable[[], Outcome], sweep: bool, resume_hint: str = "repeat the command") -> Outcome | float:
    """Run a job and return its result.

    If the job fails, print the reason, record the exit code for `exit_process`, and return NaN.

    After a failed job, a sweep continues with the next job. If a job of a sweep is interrupted, end the
    process, and with it the sweep.

    Args:
        job: the function that does the work of a command.
        sweep: whether the job is part of a sweep.
        resume_hint: how to resume the job. The hint is printed if Ctrl-C raises KeyboardInterrupt in the job.
    """
    for name, value in cpu_tuning.openmp_environment().items():
        os.environ.setdefault(name, value)  # the user's own settings take precedence
    return _report_failure(job, sweep, resume_hint)


def _report_failure(job: Callable[[], Outcome], sweep: bool = False,
                    resume_hint: str = "repeat the command") -> Outcome | float:
    """Call `job` as `run_job` describes, but set no environment variables.

    The variables that `run_job` sets depend on the load of the machine while Hydra composes the configuration, so they
    must not be set before.
    """
    for category in (FutureWarning, DeprecationWarning):  # warnings for library developers, not for users
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
    logging.raiseExceptions = False  # a full disk must not print a traceback for each line of train.log
    _last_failure.clear()
    masking.mask_log_records()
    try:
        with reporting_full_disk():
            _mask_hydra_record()
            return job()
    except DreamBoothError as error:
        sentence = masking.mask_urls(str(error))
        print(f"dreambooth: {sentence}", file=sys.stderr)
        _record_failure(error.exit_code, sentence, lost=isinstance(error, LostProcess))
    except OSError as error:
        _report_system_error(error)
    except KeyboardInterrupt:
        sentence = f"interrupted; {resume_hint}"
        print(f"dreambooth: {sentence}", file=sys.stderr)
        _record_failure(Interrupted.exit_code, sentence)
    except Exception as error:
        _report_fault(error)
    if sweep and _exit_codes[-1] == Interrupted.exit_code:
        sys.exit(Interrupted.exit_code)
    return math.nan


def _report_system_error(error: OSError) -> None:
    """Print an error of the operating system, and record the failure.

    Print the sentence of `describe_system_error`. If there is none, print the traceback.
    """
    if not (sentence := describe_system_error(error)):
        _report_fault(error)
        return
    print(f"dreambooth: {sentence}", file=sys.stderr)
    _record_failure(UserError.exit_code, sentence)


def describe_system_error(error: Exception) -> str | None:
    """Return one sentence about an error of the operating system. Return None if SYSTEM_ERRORS has no advice for it.

    SYSTEM_ERRORS has the errors that the name or the permissions of a path, or a limit on open files, has caused.
    """
    if not isinstance(error, OSError) or not (advice := SYSTEM_ERRORS.get(error.errno or 0)):
        return None
    reason = error.strerror
    if refusal := permissions.find_refusal(error):
        reason = f"{reason}; {refusal.describe(str(error.filename))}"
        advice = f"type another path, or {refusal.command()}"
    return masking.mask_urls(f"{error.filename or 'a file'} cannot be used ({reason}): {advice}")


def _report_fault(error: Exception) -> None:
    sys.stderr.write(masking.mask_urls(traceback.format_exc()))
    _record_failure(1, describe_fault(error), user_error=False)


@contextmanager
def reporting_full_disk() -> Iterator[None]:
    """Context manager that raises DoesNotFit, with one sentence, if a file cannot be written because a disk is full."""
    try:
        yield
    except Exception as error:
        if atomic_files.is_disk_full(error):
            raise DoesNotFit(f"the disk is full ({error}): free some space and repeat the command") from error
        raise


def describe_fault(error: Exception) -> str:
    """Return one sentence about an internal fault (a bug), for reports that do not include the traceback."""
    return masking.mask_urls(
        f"internal error in dreambooth, the traceback is in the log: {type(error).__name__}: {error}")


def _mask_hydra_record() -> None:
    """Mask the secrets in URLs in two kinds of files: `.hydra/*.yaml` and `multirun.yaml`.

    Hydra writes these files before it starts the job.
    """
    module = sys.modules.get("hydra.core.hydra_config")  # not imported by commands without Hydra
    if module is None or not module.HydraConfig.initialized():
        return
    hydra = module.HydraConfig.get()
    record = Path(hydra.runtime.output_dir) / hydra.output_subdir if hydra.output_subdir else None
    for path in [*(record.glob("*.yaml") if record else ()), Path(hydra.sweep.dir) / "multirun.yaml"]:
        if path.name == "config.yaml":
            _mask_config(path)
        else:
            masking.mask_file(path)


def _mask_config(path: Path) -> None:
    """Mask the URLs in the values of a YAML file, except those below the keys _READ_AGAIN."""
    from omegaconf import OmegaConf

    with suppress(OSError):
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if (masked := _mask_values(content)) != content:
            with atomic_files.write_file(path) as temporary:
                OmegaConf.save(OmegaConf.create(masked), temporary)


def _mask_values(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: value if _READ_AGAIN.fullmatch(str(key)) else _mask_values(value)
                for key, value in content.items()}
    if isinstance(content, list):
        return [_mask_values(value) for value in content]
    return masking.mask_urls(content) if isinstance(content, str) else content


def _record_failure(code: int, sentence: str, user_error: bool = True, lost: bool = False) -> None:
    """Record the exit code of a failed job, and a sentence with the reason.

    The constant EXIT_REPORT_DIR is the name of an environment variable. If this variable is set, its value is a
    folder. In this case, also write a report for the parent process into the folder.

    Args:
        user_error: True: the sentence is meant for the user. False: the reason is an internal fault (a bug).
        lost: whether the reason is that another process is gone, which has a reason of its own.
    """
    _exit_codes.append(code)
    _last_failure.append(sentence)
    if folder := os.environ.get(EXIT_REPORT_DIR):
        rank = int(os.environ.get("RANK", "0"))  # set by PyTorch's launcher
        report = {"rank": rank, "code": code, "sentence": sentence, "meant": user_error, "lost": lost}
        with suppress(OSError):  # a full disk must not hide the reason of the failure, which the log has too
            atomic_files.write_json(Path(folder) / f"{rank}.json", report)


def last_failure() -> str | None:
    """Return one sentence that says why the last job has failed. Return None if the last job has not failed."""
    return _last_failure[-1] if _last_failure else None


def exit_process() -> None:
    """End the process with the exit code of the first job that failed, or with 0 if no job failed.

    With several processes, end the process without finalising the interpreter. During finalisation, torch's
    communication threads may request the interpreter lock (GIL), which crashes the process: about one finished run in
    ten ended with SIGABRT or SIGSEGV (gloo, torch 2.13).
    """
    code = _exit_codes[0] if _exit_codes else 0
    if code == Interrupted.exit_code and srun.is_other_process():
        code = 0  # srun would kill the main process, which may still be writing
    elif code == Interrupted.exit_code and srun.has_other_processes():
        time.sleep(5)  # srun kills processes that still run, and then ends with their code in place of this one
    if "TORCHELASTIC_RUN_ID" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        sys.stdout.flush()
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def configure_allocator(memory: Memory) -> None:
    """Set the environment variable PYTORCH_ALLOC_CONF to the allocator options of `memory`, unless the user has set it.

    The variable holds the options of PyTorch's CUDA allocator. PyTorch reads it when torch is imported, so call this
    function before torch is imported.
    """
    options = {"expandable_segments": "True" if memory.expandable_segments else None,
               "max_split_size_mb": memory.max_split_size_mb}
    text = ",".join(f"{key}:{value}" for key, value in options.items() if value is not None)
    if text and not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = text


def parse_with_overrides(parser: ArgumentParser) -> argparse.Namespace:
    """Parse a command line that contains options and overrides KEY=VALUE.

    Return the namespace of the options. Its attribute `overrides` is the list of the overrides.
    """
    use_utf8()
    options, words = parser.parse_known_args()
    if invalid := [word for word in words if "=" not in word or word.startswith("-")]:
        parser.error(f"{invalid[0]} is neither an option nor KEY=VALUE")
    options.overrides = words
    return options


def intercept_override(key: str) -> None:
    """Remove the overrides of `key` from sys.argv before Hydra reads them, and store the value.

    If `key` is overridden several times, the last value is stored. A command must call this function if `key` is also
    the name of a config group: Hydra would take the value for the name of an option of the group. Another reason is a
    value that Hydra reads in quotes only.
    """
    from dreambooth.config.compose import unquote

    words = [word for word in sys.argv[1:] if word.startswith(f"{key}=")]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in words]
    _intercepted[key] = unquote(words[-1]) if words else ""


def intercepted_override(key: str) -> str | None:
    """Return the value of `key` that `intercept_override` stored, or None if `key` was not overridden."""
    return _intercepted.get(key) or None
