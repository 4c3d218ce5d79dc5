"""The options that `serve` as the argument of the image gives the server: from folder, environment, arguments."""

from pathlib import Path

import pytest

from dreambooth.container.hosting import serving_overrides
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.serialization.export_layout import ADAPTER, INDEX

KEYS = ("run", "base", "adapters", "port", "host", "max_batch", "token", "cache")


def chosen(base: Path, *arguments: str, **environment: str) -> dict[str, str]:
    words = serving_overrides(SageMakerPaths(base), arguments, environment, KEYS)
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize("file", [INDEX, f"model/{INDEX}", ADAPTER, f"model/{ADAPTER}"])
def test_the_model_folder_is_served_on_sagemakers_port(tmp_path: Path, file: str) -> None:
    path = tmp_path / "model" / file
    path.parent.mkdir(parents=True)
    path.touch()
    options = chosen(tmp_path, SAGEMAKER_BIND_TO_PORT="9001")
    assert (options["run"], options["host"], options["port"]) == (f"{tmp_path}/model", "0.0.0.0", "9001")
    assert "adapters" not in options and chosen(tmp_path)["port"] == "8080"


def test_adapters_beside_the_model_are_served_with_a_base_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "model/adapters").mkdir(parents=True)
    options = chosen(tmp_path, "max_batch=2", DREAMBOOTH_SERVE_BASE="s3://bucket/base", DREAMBOOTH_SERVE_MAX_BATCH="8",
                     DREAMBOOTH_SERVE_TOKEN="a-token-of-sixteen-characters", DREAMBOOTH_SERVE_OTHER="1")
    assert options.keys() == {"base", "adapters", "host", "port", "max_batch", "cache"}
    assert (options["base"], options["adapters"]) == ("s3://bucket/base", f"{tmp_path}/model/adapters")
    assert options["max_batch"] == "2", "an argument takes precedence"


def test_without_a_model_the_command_says_which_folder_lacks_it(tmp_path: Path) -> None:
    assert chosen(tmp_path)["run"] == f"{tmp_path}/model"
    assert "run" not in chosen(tmp_path, "base=package:tiny-sd")
