"""Hyperparameters, channels and the machine become the overrides of one run: the blog's names, strictly read."""

import errno
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dreambooth import entrypoint
from dreambooth.config.compose import load
from dreambooth.container import blog_hyperparameters, cluster, hyperparameter_values
from dreambooth.container.hyperparameters import Request, understand
from dreambooth.container.publish_model import BESIDE, publish
from dreambooth.container.sagemaker_paths import Places
from dreambooth.errors import ConfigError, DoesNotFit, UserError
from dreambooth.storage import manifest
from tests.support.configs import BLOG, made

ML = Places(Path("/opt/ml"))
SLOWLY = settings(deadline=None)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]))


def asked(hyperparameters: dict[str, str], channels: dict[str, Path] | None = None, hardware: str | None = None,
          places: Places = ML) -> Request:
    return understand(hyperparameters, channels or {}, hardware, places, entrypoint.GRAMMAR)


def config(hyperparameters: dict[str, str], **more: Any) -> dict[str, Any]:
    return asdict(entrypoint.composed(asked(hyperparameters, **more).words())[0])


def refused(hyperparameters: dict[str, str], **more: Any) -> str:
    with pytest.raises(ConfigError) as error:
        asked(hyperparameters, **more)
    return str(error.value)


# -- the blog's names -------------------------------------------------------------------------------------------------

def test_every_name_of_the_blog_has_its_place() -> None:
    assert len(BLOG) == 28
    assert set(BLOG) == set(blog_hyperparameters.NAMES)


@pytest.mark.parametrize("plain", [False, True], ids=["encoded", "plain"])
def test_the_blogs_hyperparameters_are_experiment_blog_g4dn(plain: bool) -> None:
    sent = {name: str(json.loads(raw)) if plain else raw for name, raw in BLOG.items()}
    wanted = asdict(load(made("experiment=blog_g4dn", "dataset.instance_dir=/opt/ml/input/data/images",
                              "name=aws-trained-dreambooth-model")))
    assert config(sent) == wanted
    assert asked(sent).upload == "s3://bucket/dreambooth/trained_models"


def test_every_name_of_the_blog_changes_something() -> None:
    """Against the golden above, a name that is read and dropped would pass."""
    other = {
        "model_name": "x", "mixed_precision": "bf16", "pretrained_model_name_or_path": "x/y", "instance_data_dir": "/x",
        "class_data_dir": str(Path(__file__).parents[2] / "dreambooth/assets/demo"), "with_prior_preservation": "false",
        "manul_upload_model_path": "s3://x/y", "instance_prompt": "a x", "class_prompt": "a y", "resolution": "256",
        "train_batch_size": "2", "sample_batch_size": "2", "gradient_accumulation_steps": "2", "learning_rate": "1",
        "lr_scheduler": "cosine", "lr_warmup_steps": "2", "num_class_images": "7", "max_train_steps": "7",
        "save_steps": "7", "attention": "default", "prior_loss_weight": "1", "use_ema": "false",
        "train_text_encoder": "true", "not_cache_latents": "false", "gradient_checkpointing": "false",
        "save_use_epochs": "true", "use_8bit_adam": "true",
    }
    assert set(BLOG) - set(other) == {"models_path"}
    base = asked(BLOG)
    for name, value in other.items():
        changed = asked(BLOG | {name: value})
        assert (changed.overrides, changed.epochs, changed.upload) != (base.overrides, base.epochs, base.upload), name


@pytest.mark.parametrize("raw", ['"photo\\\\ of\\\\ a\\\\ cat toy"', "photo\\ of\\ a\\ cat toy", "photo of a cat toy",
                                 '"photo of a cat toy"', '"photo\\ of a\\ cat toy"'])
def test_a_prompt_with_escaped_blanks_is_the_prompt(raw: str) -> None:
    assert hyperparameter_values.text(raw) == "photo of a cat toy"


def test_a_withdrawn_model_goes_to_its_successor_and_says_so() -> None:
    request = asked({"pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5"})
    assert request.overrides["model.source"] == "'stable-diffusion-v1-5/stable-diffusion-v1-5'"
    assert [notice for notice in request.notices if "withdrawn" in notice]


def test_wrong_values_are_told_by_their_names_all_together() -> None:
    told = refused({"use_ema": "maybe", "max_train_steps": "3.5", "learning_rate": "fast", "attention": "flash",
                    "manul_upload_model_path": "/tmp/x", "models_path": "/tmp/y", "with_prior_preservation": "1"})
    assert "use_ema must be true or false, not 'maybe'" in told
    for name in ("max_train_steps", "learning_rate", "attention", "manul_upload_model_path", "models_path",
                 "with_prior_preservation"):
        assert f"{name} must be" in told


def test_an_unknown_name_is_told_with_the_nearest_one() -> None:
    told = refused({"max_train_step": "3", "train.max_train_stepz": "3"})
    assert "hyperparameter max_train_step is not known: did you mean max_train_steps?" in told
    assert "hyperparameter train.max_train_stepz is not known: did you mean train.max_train_steps?" in told


def test_names_that_the_sdk_adds_are_passed_over() -> None:
    assert asked({"sagemaker_program": '"train.py"', "sagemaker_region": '"us-east-1"'}).overrides == {}


# -- overrides ----------------------------------------------------------------------------------------------------

def test_every_hyperparameter_is_an_override() -> None:
    found = config({"hardware": "g4dn", "train.max_train_steps": "300", "sample.prompts": '["a zwx, on a hill", "b"]',
                    "sample.every": "null", "train.use_ema": '"False"'})
    assert found["model"]["name"] == "sd15"
    assert found["train"]["max_train_steps"] == 300
    assert found["sample"]["prompts"] == ["a zwx, on a hill", "b"]
    assert found["sample"]["every"] is None
    assert found["train"]["use_ema"] is False


def test_an_override_beats_the_blogs_name() -> None:
    assert config(BLOG | {"train.max_train_steps": "4"})["train"]["max_train_steps"] == 4


def test_a_wrong_value_of_an_override_is_one_sentence() -> None:
    with pytest.raises(UserError) as error:
        config({"train.use_ema": "maybe"})
    assert "maybe" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cpu_and_the_tiny_model_make_names_idle_and_say_so() -> None:
    request = asked(BLOG | {"hardware": "cpu", "model": "tiny"})
    for name in ("mixed_precision", "attention", "pretrained_model_name_or_path", "resolution"):
        assert [notice for notice in request.notices if notice.startswith(f"{name} is not used: ")], name
    found = asdict(entrypoint.composed(request.words())[0])
    assert found["model"] == asdict(load(made("model=tiny")).model)
    assert found["precision"] == asdict(load(made()).precision)


def test_a_number_of_steps_beats_epochs() -> None:
    request = asked(BLOG | {"save_use_epochs": "true", "checkpoint.every": "7"})
    assert not request.epochs
    assert "save_use_epochs is not used: checkpoint.every decides that" in request.notices


def test_an_override_that_an_option_would_decide_is_kept() -> None:
    found = config(BLOG | {"hardware": "cpu", "model": "tiny", "model.resolution": "32", "precision": "fp16"})
    assert (found["model"]["resolution"], found["precision"]["dtype"].value) == (32, "fp16")


@pytest.mark.parametrize("instance_type, option", [
    ("ml.g4dn.xlarge", "g4dn"), ("ml.g5.12xlarge", "g5_12xlarge"), ("ml.g5.2xlarge", "g5"), ("ml.g6.2xlarge", "g6"),
    ("ml.m5.xlarge", None),
    ("local_gpu", None), (None, None)])
def test_hardware_follows_the_instance_type(instance_type: str | None, option: str | None) -> None:
    assert entrypoint._hardware_of(instance_type) == option


def test_a_chosen_hardware_or_experiment_beats_the_instance_type() -> None:
    assert asked({}, hardware="g5").overrides == {"hardware": "g5"}
    assert asked({"hardware": "g4dn"}, hardware="g5").overrides == {"hardware": "g4dn"}
    assert "hardware" not in asked({"experiment": "blog_g4dn"}, hardware="g5").overrides


# -- properties ----------------------------------------------------------------------------------------------------

@given(TEXTS.filter(lambda text: "\\" not in text))
def test_any_text_comes_through_encoded(text: str) -> None:
    assert hyperparameter_values.text(json.dumps(text)) == text
    assert hyperparameter_values.text(json.dumps(text, ensure_ascii=False).replace(" ", "\\\\ ")) == text


@SLOWLY
@given(TEXTS)
@example("it's $\\${x} 'a\\' ${y}\\\\")
def test_a_quoted_text_means_itself_to_hydra(text: str) -> None:
    parsed = OverridesParser.create().parse_override(f"dataset.instance_prompt={hyperparameter_values.quoted(text)}")
    assert OmegaConf.create({"prompt": parsed.value()}).prompt == text


@SLOWLY
@given(TEXTS.filter(lambda text: hyperparameter_values.decoded(text) is None and text.strip()))
def test_a_prompt_as_an_override_is_one_value(text: str) -> None:
    """Whatever it holds: commas, brackets, quotes. What reads as Hydra's grammar keeps its meaning there."""
    word = asked({"dataset.instance_prompt": text}).words()[-1]
    assert not OverridesParser.create().parse_override(word).is_sweep_override()


@given(st.text())
def test_only_true_and_false_are_booleans(text: str) -> None:
    if hyperparameter_values.text(text).strip().lower() in ("true", "false"):
        assert hyperparameter_values.truth(text) is (hyperparameter_values.text(text).strip().lower() == "true")
    else:
        with pytest.raises(ValueError, match="true or false"):
            hyperparameter_values.truth(text)


@given(st.integers())
def test_any_whole_number_comes_through(number: int) -> None:
    assert hyperparameter_values.whole(str(number)) == hyperparameter_values.whole(json.dumps(str(number))) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_comes_through(number: float) -> None:
    texts = repr(number), json.dumps(repr(number))
    assert [hyperparameter_values.number(text) for text in texts] == [number] * 2


@pytest.mark.parametrize("raw", ["nan", "NaN", "inf", "1e999", "0x10", "1_000", "", "١"])
def test_what_is_no_number_is_refused(raw: str) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        hyperparameter_values.number(raw)
    with pytest.raises(ValueError, match="must be a whole number"):
        hyperparameter_values.whole(raw)


# -- places, channels, hosts ------------------------------------------------------------------------------------------

def job(folder: Path, **files: object) -> Places:
    for name, content in files.items():
        path = folder / f"input/config/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return Places(folder)


def test_channels_become_settings(tmp_path: Path) -> None:
    places = job(tmp_path, inputdataconfig={"images": {"TrainingInputMode": "File"}, "base_model": {}})
    overrides = asked({}, channels=places.channels()).overrides
    assert overrides == {"dataset": "folder", "dataset.instance_dir": f"'{tmp_path}/input/data/images'",
                         "model.source": f"'{tmp_path}/input/data/base_model'"}


def test_on_a_laptop_channels_are_the_folders_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "input/data/images").mkdir(parents=True)
    assert Places(tmp_path).channels() == {"images": tmp_path / "input/data/images"}


def test_a_misspelt_channel_is_told() -> None:
    assert "channel image is not known" in refused({}, channels={"image": Path("/x"), "code": Path("/y")})


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    places = job(tmp_path, inputdataconfig={"images": {"TrainingInputMode": "Pipe"}})
    with pytest.raises(UserError, match="channel images has the input mode Pipe"):
        places.channels()


def test_a_channel_beats_a_path_of_the_blogs_and_says_so() -> None:
    request = asked(BLOG, channels={"base_model": Path("/opt/ml/input/data/base_model")})
    assert request.overrides["model.source"] == "'/opt/ml/input/data/base_model'"
    assert "pretrained_model_name_or_path is not used: the channel base_model decides that" in request.notices


def test_a_base_model_that_was_sent_beats_an_option_of_model() -> None:
    """Also where one of the blog's names says the same folder."""
    folder = Path("/opt/ml/input/data/base_model")
    for more in ({}, {"pretrained_model_name_or_path": str(folder)}):
        assert asked({"model": "sd15", **more}, {"base_model": folder}).overrides["model.source"] == f"'{folder}'"


def test_a_dataset_of_its_own_needs_no_channel_and_no_path_and_says_so() -> None:
    request = asked({"dataset": "demo", "class_data_dir": "/y"}, channels={"images": Path("/x")})
    assert request.overrides == {"hardware": "g4dn", "dataset": "demo"}
    assert set(request.notices) == {"the channel images is not used: dataset=demo decides that",
                                    "class_data_dir is not used: dataset=demo decides that"}


@pytest.mark.parametrize("raw, told", [
    ({"max_train_steps": "300", "train.max_train_steps": "4"}, "max_train_steps is not used: train.max_train_steps=4"),
    ({"instance_data_dir": "s3://b/p", "dataset": "s3"}, "instance_data_dir is not used: dataset=s3"),
    ({"class_data_dir": "/x", "dataset.class_dir": "/y"}, "class_data_dir is not used: dataset.class_dir=/y"),
    ({"dataset.instance_dir": "/y"}, "the channel images is not used: dataset.instance_dir=/y")])
def test_every_name_that_is_ignored_is_told(raw: dict[str, str], told: str) -> None:
    channels = {"images": Path("/x")} if told.startswith("the channel") else {}
    assert asked(raw, channels).notices == [f"{told} decides that"]


def test_two_channels_of_one_setting_are_told() -> None:
    told = refused({}, channels={"images": Path("/x"), "train": Path("/y")})
    assert told == "channels images and train are both dataset.instance_dir: send one of them"


def test_what_is_read_from_s3_is_not_kept_with_the_checkpoints(tmp_path: Path) -> None:
    """SageMaker would send it to S3 again, and fetch it before every start."""
    found, _ = entrypoint.composed(entrypoint.asked(job(tmp_path), [], None).words())
    assert found.storage.cache == str(tmp_path / "cache")
    elsewhere, _ = entrypoint.composed(entrypoint.asked(job(tmp_path), ["storage.cache=/x"], None).words())
    assert elsewhere.storage.cache == "/x"


def test_a_job_that_would_start_jobs_does_not_and_says_so(tmp_path: Path) -> None:
    request = entrypoint.asked(job(tmp_path, hyperparameters={"hydra/launcher": "sagemaker"}), [], None)
    assert request.overrides["hydra/launcher"] == "basic"
    assert "hydra/launcher is not used: a job is one run" in request.notices


def test_the_result_of_a_run_on_a_channel_is_a_base_model(tmp_path: Path) -> None:
    """s3://.../result-000800 holds the model in a folder beside the pictures of the run."""
    (tmp_path / "result/model").mkdir(parents=True)
    (tmp_path / "base/unet").mkdir(parents=True)
    for name, source in (("result", "result/model"), ("base", "base")):
        request = asked({}, channels={"model": tmp_path / name})
        assert request.overrides["model.source"] == hyperparameter_values.quoted(str(tmp_path / source))
        assert request.notices == []


def test_given_class_images_are_copied_aside_with_their_captions(tmp_path: Path) -> None:
    given_images = tmp_path / "input/data/class_images"
    given_images.mkdir(parents=True)
    (given_images / "a.png").write_bytes(b"a picture")
    (given_images / "a.txt").write_text("a caption", "utf-8")
    request = asked(BLOG, places=Places(tmp_path))
    copy = tmp_path / "checkpoints/given_class_images"
    assert request.overrides["dataset.class_dir"] == f"'{copy}'"
    assert {path.name: path.read_text("utf-8") for path in copy.iterdir()} == {"a.png": "a picture",
                                                                              "a.txt": "a caption"}


def test_a_folder_without_class_images_is_told_and_they_are_made(tmp_path: Path) -> None:
    request = asked(BLOG, places=Places(tmp_path))
    assert "dataset.class_dir" not in request.overrides
    assert [notice for notice in request.notices if "holds no class image" in notice]


def test_class_images_in_s3_are_used() -> None:
    request = asked(BLOG | {"class_data_dir": '"s3://bucket/class"'})
    assert request.overrides["dataset.class_dir"] == "'s3://bucket/class'"
    assert not [notice for notice in request.notices if "class image" in notice]


def test_class_images_that_are_there_and_cannot_be_read_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path)
    places.data.mkdir(parents=True)
    (places.data / "class_images").write_text("a file", "utf-8")
    with pytest.raises(UserError, match="class_images is a file, not a folder"):
        asked(BLOG, places=places)
    (places.data / "class_images").unlink()
    (places.data / "class_images").mkdir()

    def stale(folder: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "iterdir", stale)
    with pytest.raises(UserError, match="class_images cannot be read"):
        asked(BLOG, places=places)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file", "utf-8")
    with pytest.raises(UserError, match="model cannot be written by user"):
        Places(tmp_path).check()


def test_a_path_below_opt_ml_is_meant_below_the_base_folder(tmp_path: Path) -> None:
    assert asked(BLOG, places=Places(tmp_path)).overrides["dataset.instance_dir"] == f"'{tmp_path}/input/data/images'"
    assert Places(tmp_path).meant("/opt/mlx/a") == "/opt/mlx/a"


HOSTS = {"hosts": ["algo-2", "algo-1"], "current_host": "algo-2", "network_interface_name": "eth0",
         "current_instance_type": "ml.g4dn.12xlarge"}


def test_one_process_needs_no_launcher() -> None:
    assert cluster.cluster({}, 1).command(["a=1"], {})[1:] == ["-m", "dreambooth.train", "a=1"]


def test_several_cards_and_hosts_start_through_pytorchs_launcher() -> None:
    found = cluster.cluster(HOSTS, 4)
    command = found.command(["a=1"], {})
    assert found.world == 8
    assert not found.first
    assert command[1:3] == ["-m", "dreambooth.container.torchrun"]
    for option, value in (("--nproc-per-node", "4"), ("--nnodes", "2"), ("--node-rank", "1"),
                          ("--master-addr", "algo-1")):
        assert command[command.index(option) + 1] == value
    assert found.environment() == {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    assert "--standalone" in cluster.cluster({}, 2).command([], {})
    assert cluster.on_cpu(found).world == 2


@pytest.mark.parametrize("names, told, count", [
    (["nvidia2", "nvidia3", "nvidiactl"], {}, 2), (["nvidiactl", "nvidia-uvm"], {}, 0),
    ([], {"SM_NUM_GPUS": "4"}, 4), (["nvidia0"], {"SM_NUM_GPUS": "0"}, 0)])
def test_cards_are_counted_whatever_their_numbers(
    names: list[str], told: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(cluster, "COUNT", "print(2)")  # what PyTorch would say
    assert cluster.gpus(told, tmp_path) == count


# -- what is kept ----------------------------------------------------------------------------------------------------

def test_a_run_is_published_whole_and_its_result_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, target = tmp_path / "run", tmp_path / "model"
    (run / "model/unet").mkdir(parents=True)
    for name in ("model/unet/weights", "model/model_index.json", "result.json", "contact_sheet.png", "metrics.jsonl"):
        (run / name).write_text(name, "utf-8")
    publish(run, target)
    told = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert told == {"model/unet/weights", "model/model_index.json", f"model/{manifest.NAME}", "result.json",
                    "contact_sheet.png"}
    listed = json.loads((target / "model" / manifest.NAME).read_text("utf-8"))["files"]
    assert set(listed) == {"unet/weights", "model_index.json"}

    def full(source: str, to: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("dreambooth.container.publish_model._take", full)
    with pytest.raises(DoesNotFit, match=r"kept in .*run"):
        publish(run, target)
    assert not (target / "result.json").exists()


def test_what_tells_of_an_earlier_run_is_not_left_beside_another_model(tmp_path: Path) -> None:
    evaluated, other, target = tmp_path / "evaluated", tmp_path / "other", tmp_path / "model"
    for run in (evaluated, other):
        (run / "model").mkdir(parents=True)
        for name in ("model/model_index.json", "result.json", *(BESIDE if run == evaluated else ())):
            (run / name).write_text(run.name, "utf-8")
        publish(run, target)
    told = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert told == {"model/model_index.json", f"model/{manifest.NAME}", "result.json"}
    assert (target / "result.json").read_text("utf-8") == "other"
