"""containers/: the scripts and the Dockerfile pass their linters, and the scripts call what they say they call."""


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

# A client that writes down what it is called with and what it is told, and answers as `answers` says.
RECORDER = """#!/bin/sh
echo "$(basename "$0") $*" >> "$RECORD"
case "$*" in
    "login "*) sed 's/^/told: /' >> "$RECORD" ;;
    *get-caller-identity*) echo 123456789012 ;;
    *get-login-password*) echo a-password ;;
    *describe-repositories*) [ "$REPOSITORY" = there ] || { echo "$REPOSITORY" >&2; exit 254; } ;;
    *describe-images*) echo sha256:0123 ;;
    "image inspect"*) [ "$BUILT" = yes ] ;;
    "push "*) [ "$PUSHES" = yes ] ;;
esac
"""

NOBODY = f"""#!{sys.executable}
import os, sys, warnings  # which os.execvp asks for when nothing can be read any more
words = [word for word in sys.argv[1:] if not word.startswith("--")]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
os.execvp(words[0], words)
"""


def called(tmp_path: Path, script: str, *words: str, **environment: str) -> tuple[int, str, list[str]]:
    """The exit code, what it printed, and each call of docker and aws."""
    for name in ("docker", "aws"):
        (tmp_path / name).write_text(RECORDER, "utf-8")
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"
    record.write_text("")
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(("PIP_", "AWS_")) and not key.lower().endswith("_proxy")}
    told = subprocess.run([FOLDER / script, *words], cwd="/", capture_output=True, text=True, check=False, env=kept | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "AWS_REGION": "us-east-1", "BUILT": "yes",
        "REPOSITORY": "there", "PUSHES": "yes", **environment})
    return told.returncode, told.stdout + told.stderr, record.read_text().splitlines()


def test_the_scripts_pass_shellcheck() -> None:
    scripts = [path for path in FOLDER.iterdir() if path.read_bytes().startswith(b"#!")]
    assert {path.name for path in scripts} == {"build", "entrypoint", "push"}
    told = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout


def test_the_dockerfile_passes_hadolint() -> None:
    told = subprocess.run([tool("hadolint"), FOLDER / "train.Dockerfile"], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout


def test_the_dockerfile_is_made_for_t4_a10g_and_l4_as_pinned() -> None:
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
    code, told, calls = called(tmp_path, "build", "cpu", "--network", "host")
    assert code == 0, told
    [build] = calls
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    for word in (f"--tag dreambooth:{__version__}-cpu", "--build-arg CUDA=cpu", f"--build-arg VERSION={__version__}",
                 f"--build-arg REVISION={revision.stdout[:12]}", "--network host"):
        assert word in build
    assert "PIP_" not in build


def test_pips_settings_go_along_and_a_file_of_them_as_a_secret(tmp_path: Path) -> None:
    _, _, [build] = called(tmp_path, "build", PIP_INDEX_URL="https://user:word@mirror.example/simple",
                           PIP_CONFIG_FILE="/etc/pip.conf", TORCH_INDEX="")
    assert "--build-arg PIP_INDEX_URL " in build
    assert "word" not in build  # docker takes it from the environment
    assert "--secret id=pip_conf,src=/etc/pip.conf" in build
    assert "--build-arg TORCH_INDEX " in build
    assert "CUDA" not in build


def test_a_push_tags_by_version_and_revision_and_prints_the_digest(tmp_path: Path) -> None:
    code, told, calls = called(tmp_path, "push", "cpu")
    assert code == 0, told
    pushed = [call for call in calls if call.startswith("docker push")]
    assert pushed[0] == f"docker push {REGISTRY}/dreambooth:{__version__}-cpu"
    revision = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"], cwd=ROOT,
                              capture_output=True, text=True, check=True).stdout.strip()
    assert pushed[1:] == [f"docker push {REGISTRY}/dreambooth:{revision}-cpu"]
    assert told.splitlines()[-1] == f"pushed {REGISTRY}/dreambooth@sha256:0123"
    assert "told: a-password" in calls
    assert not [call for call in calls if "a-password" in call and not call.startswith("told: ")]
    assert not [call for call in calls if "create-repository" in call]


def test_a_missing_repository_is_made(tmp_path: Path) -> None:
    code, _, calls = called(tmp_path, "push", REPOSITORY="RepositoryNotFoundException")
    assert code == 0
    assert [call for call in calls if "create-repository" in call]


@pytest.mark.parametrize("environment, sentence", [
    ({"REPOSITORY": "AccessDeniedException"}, "cannot be looked at: AccessDeniedException"),
    ({"BUILT": "no"}, "type containers/build gpu"),
    ({"AWS_REGION": ""}, "no region is set"),
])
def test_what_stops_a_push_is_one_sentence(tmp_path: Path, environment: dict[str, str], sentence: str) -> None:
    code, told, calls = called(tmp_path, "push", **environment)
    assert code == 1
    assert told.startswith("containers/push: ")
    assert sentence in told
    assert not [call for call in calls if "push" in call or "create" in call]


def test_a_push_that_fails_fails(tmp_path: Path) -> None:
    code, told, _ = called(tmp_path, "push", PUSHES="no")
    assert code != 0
    assert "pushed" not in told


# -- the entrypoint, with clients that act in place of root's --------------------------------------------------------

@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user may look into, as /opt/ml is."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def entered(folder: Path, **clients: str) -> subprocess.Popen[str]:
    """The entrypoint as root sees it; what drops root there makes nobody of whoever runs the test, if that is root."""
    clients = {"id": "#!/bin/sh\necho 0\n", "chown": "#!/bin/sh\n", "python": '#!/bin/sh\necho "trains: $*"\n',
               "setpriv": NOBODY, **clients}
    (folder / "bin").mkdir()
    for name, text in clients.items():
        (folder / "bin" / name).write_text(text, "utf-8")
        (folder / "bin" / name).chmod(0o755)
    (folder / "ml").mkdir(exist_ok=True)
    return subprocess.Popen([FOLDER / "entrypoint"], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={
        **os.environ, "SAGEMAKER_BASE_DIR": str(folder / "ml"), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"})


def test_an_input_that_cannot_be_read_is_found_however_deep(readable: Path) -> None:
    weights = readable / "ml/input/data/base_model/model/unet/weights"
    weights.parent.mkdir(parents=True)
    weights.touch()
    weights.chmod(0)
    told, _ = entered(readable).communicate(timeout=60)
    assert f"{weights} cannot be read by the user dreambooth: goes on as 0" in told
    assert "trains: -m dreambooth.entrypoint" in told


def test_a_request_to_stop_while_folders_are_given_away_is_not_lost(readable: Path) -> None:
    """It trained, and was killed with nothing saved."""
    job = entered(readable, chown=f"#!/bin/sh\ntouch {readable}/began\nsleep 1\n")
    while not (readable / "began").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.terminate()
    told, _ = job.communicate(timeout=60)
    assert job.returncode == 5
    assert told == "dreambooth: SIGTERM: stopped before the first step; start it again to go on\n"
    assert told == f"dreambooth: {(readable / 'ml/output/failure').read_text('utf-8')}\n"
