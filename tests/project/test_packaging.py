"""The package works from a wheel, an editable install and a checkout, from any directory."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY_RUN = ["train.max_train_steps=1", "prior.with_prior_preservation=false", "sample.every=null", "tracking=none"]

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path | str = "/") -> str:
    """Run a command as a user would, without what this process has in its environment for Python and pip."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def environment(folder: Path, *requirement: str | Path) -> Path:
    """A new environment with the project in it, and all else from this one. Returns its bin folder."""
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # A folder named in a .pth file is searched last, and its own .pth files (an editable install) are not read.
    (folder / "lib" / version / "site-packages" / "here.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    python = folder / "bin" / "python"
    call(sys.executable, "-m", "pip", "--isolated", "--python", python, "install", "--quiet", "--no-index", "--no-deps",
         "--no-build-isolation", *requirement)  # fmt: skip
    return folder / "bin"


def where(python: Path) -> tuple[Path, Path]:
    """The folders of the package and of conf/, as that interpreter finds them from the root of the disk."""
    code = "import dreambooth, dreambooth.config.compose as c; print(dreambooth.__file__); print(c.conf_dir())"
    package, conf = call(python, "-c", code).split("\n")[:2]
    return Path(package).parent, Path(conf)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("installed"), wheel)


def files(folder: str, pattern: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern) if path.is_file()}


def test_the_wheel_holds_code_conf_assets_and_plug_ins_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assets = {name for name in files("dreambooth/assets", "*") if not name.endswith(".DS_Store")}
    conf = {f"dreambooth/{name}" for name in files("conf", "*.yaml")}
    assert len(conf) > 20
    assert any(name.endswith("unet/diffusion_pytorch_model.safetensors") for name in assets)
    assert "hydra_plugins/dreambooth_sagemaker/__init__.py" in names
    assert "hydra_plugins/__init__.py" not in names
    expected = files("dreambooth", "*.py") | files("hydra_plugins", "*.py") | assets | conf
    assert expected - names == set()
    others = {name for name in names - expected if ".dist-info/" not in name}
    assert others <= {"dreambooth/py.typed"}
    assert {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_a_wheel_finds_its_own_conf(installed: Path) -> None:
    package, conf = where(installed / "python")
    assert package.is_relative_to(installed.parent)
    assert conf == package / "conf"


def test_a_wheel_runs_from_anywhere(installed: Path) -> None:
    assert "max_train_steps: 200" in call(installed / "python", "-m", "dreambooth.train", "--cfg", "job")
    assert "max_train_steps: 200" in call(installed / "dreambooth-train", "--cfg", "job")
    for script in ("dreambooth-train", "dreambooth-generate", "dreambooth-evaluate", "dreambooth-convert",
                   "dreambooth-prepare"):
        assert call(installed / script, "--help").strip()


def test_a_wheel_trains_the_tiny_base_that_it_ships(installed: Path, tmp_path: Path) -> None:
    call(installed / "dreambooth-train", *TINY_RUN, "hardware=cpu", f"run_root={tmp_path}/runs", cwd=tmp_path)
    assert list(tmp_path.glob("runs/*/result.json"))


def test_an_editable_install_runs_from_anywhere(tmp_path: Path) -> None:
    binaries = environment(tmp_path / "venv", "-e", ROOT)
    assert where(binaries / "python") == (ROOT / "dreambooth", ROOT / "conf")
    assert "max_train_steps: 200" in call(binaries / "python", "-m", "dreambooth.train", "--cfg", "job")
    assert call(binaries / "dreambooth-train", "--help").strip()
    assert not list((tmp_path / "venv").rglob("site-packages/dreambooth"))  # no copy that would go stale


def test_a_checkout_runs_without_an_install() -> None:
    assert "max_train_steps: 200" in call(sys.executable, "-m", "dreambooth.train", "--cfg", "job", cwd=ROOT)
