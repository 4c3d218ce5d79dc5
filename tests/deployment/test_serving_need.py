"""What a server on an instance will need, with the options that the container gets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dreambooth.config.hardware import Hardware
from dreambooth.deployment.endpoint_requests import Artifact
from dreambooth.deployment.model_artifact import DeployedModel, adapter_sizes
from dreambooth.deployment.options import Deploy
from dreambooth.deployment.serving_need import predict_with_planner, read_server_options
from dreambooth.errors import ConfigError
from dreambooth.inference.model_sources import Source
from dreambooth.serving.options import Serve
from tests.cloud.jobs import ROOT
from tests.deployment.conftest import OPTIONS

TINY = ROOT / "dreambooth/assets/tiny-sd"
PREFIX = "DREAMBOOTH_SERVE_"


def test_the_options_of_the_server_are_read_as_the_container_reads_them() -> None:
    found = read_server_options({f"{PREFIX}MAX_BATCH": "2", f"{PREFIX}MEMORY_OPTIONS": "[vae_slicing,int8]", "X": "1",
                                 f"{PREFIX}MAX_ADAPTERS": "", f"{PREFIX}TOKEN": "short"})
    assert found == replace(Serve(), max_batch=2, memory_options=["vae_slicing", "int8"])


@pytest.mark.parametrize("environment, sentence", [
    ({"MAX_BATCH": "abc"}, "+environment.DREAMBOOTH_SERVE_MAX_BATCH: max_batch must be a whole number, not abc"),
    ({"MAX_BATCH": "0"}, "+environment.DREAMBOOTH_SERVE_MAX_BATCH: max_batch must be from 1 to 256, not 0"),
    ({"MEMORY_OPTIONS": "[int3]"}, "memory_options must be auto, or a list of vae_slicing"),
    ({"MAX_BACH": "2"}, "+environment.DREAMBOOTH_SERVE_MAX_BACH sets no option of the server"),
])
def test_an_option_that_the_server_would_refuse_is_refused_before(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_server_options({PREFIX + key: value for key, value in environment.items()})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_adapters_of_a_folder_are_those_that_the_server_finds() -> None:
    sizes = {"a/pytorch_lora_weights.safetensors": 10, "b/model/pytorch_lora_weights.safetensors": 20,
             "c.safetensors": 5, "b/run.json": 100, "readme.txt": 100, "d/model/other.safetensors": 100,
             ".trash/pytorch_lora_weights.safetensors": 100}
    assert adapter_sizes(sizes) == (20, 10, 5)


@pytest.mark.slow
def test_the_plan_is_that_of_the_servers_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth.planner import serving_plan

    plans: list[Any] = []
    plan = serving_plan.plan_serving

    def recorded(model: Any, hardware: Hardware, memory: Any = None) -> Any:
        plans.append((model, memory))
        return plan(model, hardware, memory)

    monkeypatch.setattr(serving_plan, "plan_serving", recorded)
    source = Source(Path(), str(TINY), None, {"model.name": "tiny", "model.source": str(TINY)})
    model = DeployedModel(Artifact("s3://b/m"), (), source, adapter_bytes=1000, other_adapters=(30, 20, 10))
    machine = Hardware(name="g4dn", gpu="T4", usable_vram_gib=14.6, compute_capability=7.5)
    words = {f"{PREFIX}MAX_BATCH": "2", f"{PREFIX}MAX_ADAPTERS": "2", f"{PREFIX}MEMORY_OPTIONS": "[vae_tiling]"}
    options = Deploy(**OPTIONS | {"size": "96x64", "environment": words})
    need = predict_with_planner(model, options)(machine)
    [(served, memory)] = plans
    assert (served.batch, served.adapter_bytes, served.size, memory.vae_tiling) == (2, 1050, (64, 96), True)
    assert need is not None and need.memory == ("vae_tiling",) and not need.exact
