"""containers/: the scripts and the Dockerfile pass their linters; build and push call docker and aws as documented."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreambooth import __version__
from tests.support.tools import tool

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "containers"
REGISTRY = "123456789012.dkr.ecr.us-east-1.amazonaws.com"

# Stands in for docker and aws: records its arguments, and the password on its standard input; prints a canned answer.
RECORDER = """#!/bin/sh
echo "$(basename "$0") $*" >> "$RECORD"
case "$*" in
    "login "*) sed 's/^/stdin: /' >> "$RECORD" ;;
    *get-caller-identity*) echo 123456789012 ;;
    *get-login-password*) echo a-password ;;
    *describe-repositories*) [ "$REPOSITORY" = exists ] || { echo "$REPOSITORY" >&2; exit 254; } ;;
    *describe-images*) echo sha256:0123 ;;
    "image inspect"*) [ "$BUILT" = yes ] ;;
    "push "*) [ "$PUSHES" = yes ] ;;
esac
"""

# Stands in for setpriv: becomes the user `nobody`, if the test runs as root.
DROP_TO_NOBODY = f"""#!{sys.executable}
import os, sys, warnings  # os.execvp imports warnings, which nobody may not be able to read
command = [word for word in sys.argv[1:] if not word.startswith("--")]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
os.execvp(command[0], command)
"""


def run_script(tmp_path: Path, script: str, *args: str, **environment: str) -> tuple[int, str, list[str]]:
    """The exit code, the output, and each call of docker and aws."""
    for name in ("docker", "aws"):
        (tmp_path / name).write_text(RECORDER, "utf-8")
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"
    record.write_text("")
    inherited = {key: value for key, value in os.environ.items()
                 if not key.startswith(("PIP_", "AWS_")) and not key.lower().endswith("_proxy")}
    stand_ins = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "AWS_REGION": "us-east-1",
                 "BUILT": "yes", "REPOSITORY": "exists", "PUSHES": "yes"}
    result = subprocess.run([FOLDER / script, *args], cwd="/", capture_output=True, text=True, check=False,
                            env=inherited | stand_ins | environment)
    return result.returncode, result.stdout + result.stderr, record.read_text().splitlines()


def test_the_scripts_pass_shellcheck() -> None:
    scripts = [path for path in FOLDER.iterdir() if path.read_bytes().startswith(b"#!")]
    assert {path.name for path in scripts} == {"build", "entrypoint", "push"}
    result = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_dockerfile_passes_hadolint() -> None:
    command = [tool("hadolint"), FOLDER / "train.Dockerfile"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_dockerfile_pins_torch_and_cuda_for_t4_a10g_and_l4() -> None:
    text = (FOLDER / "train.Dockerfile").read_text("utf-8")
    pins = dict(line.removeprefix("ARG ").split("=") for line in text.splitlines() if line.startswith("ARG ")
                and "=" in line)
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert pins["TORCH_VERSION"] == torch.removeprefix("torch==")
    assert pins["CUDA"] == "cu126"  # xformers' wheel is built for CUDA 12
    assert pins["BASE_IMAGE"].count(".") == 2
    assert "# syntax=" not in text.splitlines()[0]
    assert text.splitlines()[-1].startswith('ENTRYPOINT ["')


def test_a_build_is_tagged_and_labelled(tmp_path: Path) -> None:
    code, output, calls = run_script(tmp_path, "build", "cpu", "--network", "host")
    assert code == 0, output
    [build] = calls
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    for word in (f"--tag dreambooth:{__version__}-cpu", "--build-arg CUDA=cpu", f"--build-arg VERSION={__version__}",
                 f"--build-arg REVISION={revision.stdout[:12]}", "--network host"):
        assert word in build
    assert "PIP_" not in build


def test_pip_settings_become_build_arguments_and_a_pip_conf_a_secret(tmp_path: Path) -> None:
    _, _, [build] = run_script(tmp_path, "build", PIP_INDEX_URL="https://user:word@mirror.example/simple",
                               PIP_CONFIG_FILE="/etc/pip.conf", TORCH_INDEX="")
    assert "--build-arg PIP_INDEX_URL " in build
    assert "word" not in build  # docker reads the value from the environment
    assert "--secret id=pip_conf,src=/etc/pip.conf" in build
    assert "--build-arg TORCH_INDEX " in build
    assert "CUDA" not in build


def test_a_push_tags_by_version_and_revision_and_prints_the_digest(tmp_path: Path) -> None:
    code, output, calls = run_script(tmp_path, "push", "cpu")
    assert code == 0, output
    pushed = [call for call in calls if call.startswith("docker push")]
    assert pushed[0] == f"docker push {REGISTRY}/dreambooth:{__version__}-cpu"
    revision = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"], cwd=ROOT,
                              capture_output=True, text=True, check=True).stdout.strip()
    assert pushed[1:] == [f"docker push {REGISTRY}/dreambooth:{revision}-cpu"]
    assert output.splitlines()[-1] == f"pushed {REGISTRY}/dreambooth@sha256:0123"
    assert "stdin: a-password" in calls
    assert not [call for call in calls if "a-password" in call and not call.startswith("stdin: ")]
    assert not [call for call in calls if "create-repository" in call]


def test_a_missing_repository_is_created(tmp_path: Path) -> None:
    code, _, calls = run_script(tmp_path, "push", REPOSITORY="RepositoryNotFoundException")
    assert code == 0
    assert [call for call in calls if "create-repository" in call]


@pytest.mark.parametrize("environment, sentence", [
    ({"REPOSITORY": "AccessDeniedException"}, "cannot be accessed: AccessDeniedException"),
    ({"BUILT": "no"}, "type containers/build gpu"),
    ({"AWS_REGION": ""}, "no region is set"),
])
def test_a_push_that_cannot_start_fails_with_one_sentence(
    tmp_path: Path, environment: dict[str, str], sentence: str
) -> None:
    code, output, calls = run_script(tmp_path, "push", **environment)
    assert code == 1
    assert output.startswith("containers/push: ")
    assert sentence in output
    assert not [call for call in calls if "push" in call or "create" in call]


def test_a_failed_push_fails_the_script(tmp_path: Path) -> None:
    code, output, _ = run_script(tmp_path, "push", PUSHES="no")
    assert code != 0
    assert "pushed" not in output


# -- the entrypoint, with stand-ins for the commands that need root ---------------------------------------------------

@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user can read, as /opt/ml is."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def start_entrypoint(folder: Path, **commands: str) -> subprocess.Popen[str]:
    """Start containers/entrypoint as if by root, with stand-ins for the commands that it calls."""
    commands = {"id": "#!/bin/sh\necho 0\n", "chown": "#!/bin/sh\n", "python": '#!/bin/sh\necho "python $*"\n',
                "setpriv": DROP_TO_NOBODY, **commands}
    (folder / "bin").mkdir()
    for name, text in commands.items():
        (folder / "bin" / name).write_text(text, "utf-8")
        (folder / "bin" / name).chmod(0o755)
    (folder / "ml").mkdir(exist_ok=True)
    return subprocess.Popen([FOLDER / "entrypoint"], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={
        **os.environ, "SAGEMAKER_BASE_DIR": str(folder / "ml"), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"})


def test_an_unreadable_input_file_is_found_at_any_depth(readable: Path) -> None:
    weights = readable / "ml/input/data/base_model/model/unet/weights"
    weights.parent.mkdir(parents=True)
    weights.touch()
    weights.chmod(0)
    output, _ = start_entrypoint(readable).communicate(timeout=600)
    assert f"{weights} cannot be read by the user dreambooth: continuing as 0" in output
    assert "python -m dreambooth.entrypoint" in output


def test_sigterm_during_chown_is_not_lost(readable: Path) -> None:
    """Without a trap the shell would ignore SIGTERM, start training, and be killed before anything is saved."""
    job = start_entrypoint(readable, chown=f"#!/bin/sh\ntouch {readable}/started\nsleep 1\n")
    while not (readable / "started").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.terminate()
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 5
    assert output == "dreambooth: SIGTERM: stopped before the first step; start the job again to continue\n"
    assert output == f"dreambooth: {(readable / 'ml/output/failure').read_text('utf-8')}\n"
