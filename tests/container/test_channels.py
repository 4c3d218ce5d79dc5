"""Channels, paths and hosts of a job become settings of its run; the result is published completely."""

import errno
import json
from pathlib import Path

import pytest

from dreambooth import entrypoint
from dreambooth.container import cluster
from dreambooth.container.publish_model import RUN_FILES, publish
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.storage import manifest
from dreambooth.utils.quoting import hydra_string
from tests.container.run_requests import build, error_of
from tests.support.configs import BLOG

# -- paths, channels, hosts -------------------------------------------------------------------------------------------

def write_configs(folder: Path, **files: object) -> SageMakerPaths:
    """Write files of input/config."""
    for name, content in files.items():
        path = folder / f"input/config/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return SageMakerPaths(folder)


def test_channels_become_settings(tmp_path: Path) -> None:
    paths = write_configs(tmp_path, inputdataconfig={"images": {"TrainingInputMode": "File"}, "base_model": {}})
    overrides = build({}, channels=paths.channels()).overrides
    assert overrides == {"dataset": "folder", "dataset.instance_dir": f"'{tmp_path}/input/data/images'",
                         "model.source": f"'{tmp_path}/input/data/base_model'"}


def test_without_inputdataconfig_every_input_folder_is_a_channel(tmp_path: Path) -> None:
    (tmp_path / "input/data/images").mkdir(parents=True)
    assert SageMakerPaths(tmp_path).channels() == {"images": tmp_path / "input/data/images"}


def test_a_misspelt_channel_is_an_error() -> None:
    assert "channel image is not known" in error_of({}, channels={"image": Path("/x"), "code": Path("/y")})


def test_input_mode_pipe_is_an_error(tmp_path: Path) -> None:
    paths = write_configs(tmp_path, inputdataconfig={"images": {"TrainingInputMode": "Pipe"}})
    with pytest.raises(UserError, match="channel images has the input mode Pipe"):
        paths.channels()


def test_a_channel_beats_a_blog_path_with_a_notice() -> None:
    request = build(BLOG, channels={"base_model": Path("/opt/ml/input/data/base_model")})
    assert request.overrides["model.source"] == "'/opt/ml/input/data/base_model'"
    assert "pretrained_model_name_or_path is ignored: the channel base_model decides instead" in request.notices


def test_a_base_model_channel_beats_the_group_model() -> None:
    """Also if a blog name gives the same folder."""
    folder = Path("/opt/ml/input/data/base_model")
    for more in ({}, {"pretrained_model_name_or_path": str(folder)}):
        assert build({"model": "sd15", **more}, {"base_model": folder}).overrides["model.source"] == f"'{folder}'"


def test_another_dataset_option_supersedes_channels_and_paths_with_a_notice() -> None:
    request = build({"dataset": "demo", "class_data_dir": "/y"}, channels={"images": Path("/x")})
    assert request.overrides == {"hardware": "g4dn", "dataset": "demo"}
    assert set(request.notices) == {"the channel images is ignored: dataset=demo decides instead",
                                    "class_data_dir is ignored: dataset=demo decides instead"}


@pytest.mark.parametrize("hyperparameters, notice", [
    ({"max_train_steps": "300", "train.max_train_steps": "4"}, "max_train_steps is ignored: train.max_train_steps=4"),
    ({"instance_data_dir": "s3://b/p", "dataset": "s3"}, "instance_data_dir is ignored: dataset=s3"),
    ({"class_data_dir": "/x", "dataset.class_dir": "/y"}, "class_data_dir is ignored: dataset.class_dir=/y"),
    ({"dataset.instance_dir": "/y"}, "the channel images is ignored: dataset.instance_dir=/y")])
def test_every_ignored_name_gets_a_notice(hyperparameters: dict[str, str], notice: str) -> None:
    channels = {"images": Path("/x")} if notice.startswith("the channel") else {}
    assert build(hyperparameters, channels).notices == [f"{notice} decides instead"]


def test_two_channels_for_one_setting_are_an_error() -> None:
    message = error_of({}, channels={"images": Path("/x"), "train": Path("/y")})
    assert message == "channels images and train both set dataset.instance_dir: send one of them"


def test_downloads_from_s3_are_not_stored_with_the_checkpoints(tmp_path: Path) -> None:
    """SageMaker would upload them to S3 again, and download them before every start."""
    config, _ = entrypoint.compose_run(entrypoint.read_request(write_configs(tmp_path), [], None).to_args())
    assert config.storage.cache == str(tmp_path / "cache")
    request = entrypoint.read_request(write_configs(tmp_path), ["storage.cache=/x"], None)
    config, _ = entrypoint.compose_run(request.to_args())
    assert config.storage.cache == "/x"


def test_a_job_does_not_start_further_jobs(tmp_path: Path) -> None:
    paths = write_configs(tmp_path, hyperparameters={"hydra/launcher": "sagemaker"})
    request = entrypoint.read_request(paths, [], None)
    assert request.overrides["hydra/launcher"] == "basic"
    assert "hydra/launcher is ignored: a job is one run" in request.notices


def test_a_channel_with_the_result_of_a_run_is_a_base_model(tmp_path: Path) -> None:
    """The S3 folder of a result holds the model in a subfolder `model`, beside the pictures of the run."""
    (tmp_path / "result/model").mkdir(parents=True)
    (tmp_path / "base/unet").mkdir(parents=True)
    for name, source in (("result", "result/model"), ("base", "base")):
        request = build({}, channels={"model": tmp_path / name})
        assert request.overrides["model.source"] == hydra_string(str(tmp_path / source))
        assert request.notices == []


def test_class_images_of_the_input_are_copied_with_their_captions(tmp_path: Path) -> None:
    input_folder = tmp_path / "input/data/class_images"
    input_folder.mkdir(parents=True)
    (input_folder / "a.png").write_bytes(b"a picture")
    (input_folder / "a.txt").write_text("a caption", "utf-8")
    request = build(BLOG, paths=SageMakerPaths(tmp_path))
    copy = tmp_path / "checkpoints/given_class_images"
    assert request.overrides["dataset.class_dir"] == f"'{copy}'"
    assert {path.name: path.read_text("utf-8") for path in copy.iterdir()} == {"a.png": "a picture",
                                                                              "a.txt": "a caption"}


def test_an_empty_class_image_folder_is_dropped_with_a_notice(tmp_path: Path) -> None:
    request = build(BLOG, paths=SageMakerPaths(tmp_path))
    assert "dataset.class_dir" not in request.overrides
    assert [notice for notice in request.notices if "holds no class images" in notice]


def test_class_images_in_s3_are_used() -> None:
    request = build(BLOG | {"class_data_dir": '"s3://bucket/class"'})
    assert request.overrides["dataset.class_dir"] == "'s3://bucket/class'"
    assert not [notice for notice in request.notices if "class image" in notice]


def test_unreadable_class_images_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = SageMakerPaths(tmp_path)
    paths.data.mkdir(parents=True)
    (paths.data / "class_images").write_text("a file", "utf-8")
    with pytest.raises(UserError, match="class_images is a file, not a folder"):
        build(BLOG, paths=paths)
    (paths.data / "class_images").unlink()
    (paths.data / "class_images").mkdir()

    def raise_stale(folder: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "iterdir", raise_stale)
    with pytest.raises(UserError, match="class_images cannot be read"):
        build(BLOG, paths=paths)


def test_an_output_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file", "utf-8")
    with pytest.raises(UserError, match="model cannot be written by user"):
        SageMakerPaths(tmp_path).check_writable()


def test_a_path_below_opt_ml_is_relocated_to_the_base_folder(tmp_path: Path) -> None:
    paths = SageMakerPaths(tmp_path)
    assert build(BLOG, paths=paths).overrides["dataset.instance_dir"] == f"'{tmp_path}/input/data/images'"
    assert paths.relocate("/opt/mlx/a") == "/opt/mlx/a"


RESOURCE_CONFIG = {"hosts": ["algo-2", "algo-1"], "current_host": "algo-2", "network_interface_name": "eth0",
                   "current_instance_type": "ml.g4dn.12xlarge"}


def test_one_process_needs_no_launcher() -> None:
    assert cluster.parse_resource_config({}, 1).train_command(["a=1"], {})[1:] == ["-m", "dreambooth.train", "a=1"]


def test_several_gpus_and_hosts_use_pytorchs_launcher() -> None:
    two_hosts = cluster.parse_resource_config(RESOURCE_CONFIG, 4)
    command = two_hosts.train_command(["a=1"], {})
    assert two_hosts.world_size == 8
    assert not two_hosts.is_first_host
    assert command[1:3] == ["-m", "dreambooth.container.torchrun"]
    for option, value in (("--nproc-per-node", "4"), ("--nnodes", "2"), ("--node-rank", "1"),
                          ("--master-addr", "algo-1")):
        assert command[command.index(option) + 1] == value
    assert two_hosts.network_environment() == {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    assert "--standalone" in cluster.parse_resource_config({}, 2).train_command([], {})
    assert cluster.limit_to_one_process(two_hosts).world_size == 2


@pytest.mark.parametrize("devices, environment, count", [
    (["nvidia2", "nvidia3", "nvidiactl"], {}, 2), (["nvidiactl", "nvidia-uvm"], {}, 0),
    ([], {"SM_NUM_GPUS": "4"}, 4), (["nvidia0"], {"SM_NUM_GPUS": "0"}, 0)])
def test_gpus_are_counted_whatever_their_device_numbers(
    devices: list[str], environment: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(cluster, "COUNT_GPUS", "print(2)")  # in place of PyTorch
    assert cluster.count_gpus(environment, tmp_path) == count


# -- the published model ---------------------------------------------------------------------------------------------

def test_a_run_is_published_completely_and_result_json_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, target = tmp_path / "run", tmp_path / "model"
    (run / "model/unet").mkdir(parents=True)
    for name in ("model/unet/weights", "model/model_index.json", "result.json", "contact_sheet.png", "metrics.jsonl"):
        (run / name).write_text(name, "utf-8")
    publish(run, target)
    published = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert published == {"model/unet/weights", "model/model_index.json", f"model/{manifest.NAME}", "result.json",
                         "contact_sheet.png"}
    listed = json.loads((target / "model" / manifest.NAME).read_text("utf-8"))["files"]
    assert set(listed) == {"unet/weights", "model_index.json"}

    def fail_to_copy(source: str, target: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("dreambooth.container.publish_model._link_or_copy", fail_to_copy)
    with pytest.raises(DoesNotFit, match=r"kept in .*run"):
        publish(run, target)
    assert not (target / "result.json").exists()


def test_publishing_removes_the_files_of_an_earlier_run(tmp_path: Path) -> None:
    evaluated, other, target = tmp_path / "evaluated", tmp_path / "other", tmp_path / "model"
    for run in (evaluated, other):
        (run / "model").mkdir(parents=True)
        for name in ("model/model_index.json", "result.json", *(RUN_FILES if run == evaluated else ())):
            (run / name).write_text(run.name, "utf-8")
        publish(run, target)
    published = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert published == {"model/model_index.json", f"model/{manifest.NAME}", "result.json"}
    assert (target / "result.json").read_text("utf-8") == "other"
