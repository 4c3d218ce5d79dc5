"""The built CPU image, run in containers with SageMaker's layout of /opt/ml, and as other drivers run it."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from dreambooth import __version__
from tests.support.image import Image
from tests.support.sagemaker_job import PROMPTS, SHORT, failure, lay_out, steps, weights

pytestmark = pytest.mark.container

TRAINING = SHORT | {"train.max_train_steps": "30", "sample.every": "15", "sample.num_inference_steps": "2",
                    "sample.images_per_prompt": "1"}
PROCESSES = r"""for p in /proc/[0-9]*; do
    echo "$(sed -n 's/^Uid:\t\([0-9]*\).*/\1/p' $p/status) $(tr '\0' ' ' < $p/cmdline)"; done 2>/dev/null"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_folder(tmp_path, "ml")


def make_folder(parent: Path, name: str) -> Path:
    """A folder for /opt/ml with SageMaker's permissions: only the user who starts the container can write to it."""
    path = parent / name
    path.mkdir(mode=0o755)
    return path


@pytest.fixture(scope="module")
def trained_job(image: Image, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An uninterrupted job: its folder, its log, and the user id and command of each process while it trained."""
    base = make_folder(tmp_path_factory.mktemp("trained"), "ml")
    lay_out(base, TRAINING)
    name = image.start(base)
    try:
        wait_for(image, name, base, 2)
        processes = image.docker.must("exec", name, "sh", "-c", PROCESSES)
        code, log = image.wait(name), image.log(name)
    finally:
        image.docker("rm", "--force", name)
    assert code == 0, log
    return base, log, processes


def wait_for(image: Image, name: str, base: Path, step: int) -> None:
    until = time.monotonic() + 200
    while steps(base) < step:
        running = image.docker.must("inspect", "--format", "{{.State.Running}}", name).strip() == "true"
        assert running and time.monotonic() < until, image.log(name)
        time.sleep(0.2)


# -- contents ---------------------------------------------------------------------------------------------------

def test_its_labels_name_version_and_revision(image: Image) -> None:
    labels = image.labels()
    assert labels["org.opencontainers.image.version"] == __version__
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", labels["org.opencontainers.image.revision"])


def test_it_contains_the_wheel_but_no_source_sdk_or_pip_setting(image: Image) -> None:
    result = image.run("bash", "-lc", "python -c 'import dreambooth; print(dreambooth.__file__)'; pip list; "
                       "pip config list; ls /build /etc/pip.conf; find / -xdev -name tests -path '*dreambooth*'")
    module_path, *rest = result.stdout.splitlines()
    assert module_path == "/opt/venv/lib/python3.11/site-packages/dreambooth/__init__.py"
    assert not [line for line in rest if line.startswith("sagemaker ")]
    assert not [line for line in rest if "index-url" in line or "dreambooth/tests" in line]
    assert "/build" in result.stderr
    assert "/etc/pip.conf" in result.stderr
    history = image.docker.must("history", "--no-trunc", image.tag)
    assert not re.search(r"index-url|PIP_(INDEX|EXTRA|FIND)", history)


# -- commands ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", [("bash", "-lc", "exit 7"), ("python", "-c", "raise SystemExit(7)")])
def test_any_other_command_is_executed_as_given(image: Image, command: tuple[str, ...]) -> None:
    assert image.run(*command).returncode == 7


def test_a_login_shell_finds_the_environment(image: Image) -> None:
    result = image.run("bash", "-lc", "command -v torchrun && python -m dreambooth.train --cfg job")
    assert "max_train_steps: 200" in result.stdout


@pytest.mark.parametrize("args", [(), ("train",)], ids=["no argument", "train"])
def test_it_trains_without_arguments_and_with_train(image: Image, base: Path, args: tuple[str, ...]) -> None:
    lay_out(base, {"train.use_ema": "maybe"})
    result = image.run(*args, base=base)
    assert result.returncode == 1, result.stderr
    assert "maybe" in failure(base)


def test_diffusers_loads_a_trained_model(trained_job: tuple[Path, str, str]) -> None:
    from diffusers import StableDiffusionPipeline

    base, _, _ = trained_job
    assert json.loads((base / "model/result.json").read_text("utf-8"))["step"] == 30
    assert (base / "model/contact_sheet.png").stat().st_size > 1000
    pipeline = StableDiffusionPipeline.from_pretrained(base / "model/model")
    [picture] = pipeline(PROMPTS["dataset.instance_prompt"], num_inference_steps=1, height=64, width=64).images
    assert picture.size == (64, 64)


def test_the_processes_that_train_are_not_root(trained_job: tuple[Path, str, str]) -> None:
    base, _, processes = trained_job
    training = [line for line in processes.splitlines() if re.search(r"dreambooth\.(train|entrypoint)", line)]
    assert len(training) == 2, processes
    assert {line.split()[0] for line in training} == {"1000"}
    assert {path.stat().st_uid for path in (base / "model").rglob("*")} == {1000}
    assert (base.stat().st_uid, base.stat().st_mode & 0o777) == (base.parent.stat().st_uid, 0o755)


def test_a_stopped_job_saves_and_resumes_bit_for_bit(
    image: Image, base: Path, trained_job: tuple[Path, str, str]
) -> None:
    lay_out(base, TRAINING)
    name = image.start(base)
    try:
        wait_for(image, name, base, 3)
        start = time.monotonic()
        image.docker.must("stop", "--time", "120", name)
        duration = time.monotonic() - start
        code, log = image.wait(name), image.log(name)
    finally:
        image.docker("rm", "--force", name)
    assert code == 5, log
    assert "SIGTERM: stopped and saved after step" in failure(base)
    assert duration < 120
    resumed_run = image.run("train", base=base)
    assert resumed_run.returncode == 0, resumed_run.stderr
    assert "resuming after step" in resumed_run.stdout
    uninterrupted, resumed = weights(trained_job[0]), weights(base)
    assert resumed and resumed.keys() == uninterrupted.keys()
    assert {name for name in resumed if resumed[name] != uninterrupted[name]} == set()


def test_a_broken_photo_is_a_failure(image: Image, base: Path) -> None:
    lay_out(base, TRAINING, broken=True)
    result = image.run("train", base=base)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "broken.png is damaged or truncated" in failure(base)
    assert "Traceback" not in result.stdout + result.stderr
    assert not list((base / "model").iterdir())


# -- without the permissions of root --------------------------------------------------------------------------------

def test_without_permission_to_drop_root_it_trains_as_root_with_a_notice(image: Image, base: Path) -> None:
    lay_out(base, {"train.use_ema": "maybe"})
    result = image.run("train", base=base, options=("--cap-drop", "ALL"))
    assert result.returncode == 1
    assert re.search(r"dreambooth: .*(cannot change the owner|cannot drop root).*: continuing as root", result.stderr)
    assert "maybe" in failure(base)


def test_it_trains_as_another_user_on_a_read_only_root(image: Image, base: Path) -> None:
    lay_out(base, TRAINING | {"train.max_train_steps": "1"})
    subprocess.run(["chmod", "-R", "go+w", base], check=True)
    result = image.run("train", base=base, options=("--user", "1234:1234", "--cap-drop", "ALL", "--read-only",
                                                  "--tmpfs", "/tmp"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (base / "model/result.json").stat().st_uid == 1234
