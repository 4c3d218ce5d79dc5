"""Hyperparameters become the overrides of a run."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dreambooth import entrypoint
from dreambooth.config.compose import load
from dreambooth.container import blog_hyperparameters, hyperparameter_values
from dreambooth.errors import UserError
from dreambooth.utils.quoting import hydra_string
from tests.container.run_requests import NO_DEADLINE, TEXTS, build, build_config, error_of
from tests.support.configs import BLOG, compose_config

# -- the blog's names -------------------------------------------------------------------------------------------------

def test_every_blog_name_is_known() -> None:
    assert len(BLOG) == 28
    assert set(BLOG) == set(blog_hyperparameters.NAMES)


@pytest.mark.parametrize("plain", [False, True], ids=["encoded", "plain"])
def test_the_blogs_hyperparameters_are_experiment_blog_g4dn(plain: bool) -> None:
    hyperparameters = {name: str(json.loads(raw)) if plain else raw for name, raw in BLOG.items()}
    expected = asdict(load(compose_config("experiment=blog_g4dn", "dataset.instance_dir=/opt/ml/input/data/images",
                                          "name=aws-trained-dreambooth-model")))
    assert build_config(hyperparameters) == expected
    assert build(hyperparameters).upload_uri == "s3://bucket/dreambooth/trained_models"


def test_every_blog_name_changes_something() -> None:
    """The comparison with the golden file above would not notice a name that is parsed and then dropped."""
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
    base = build(BLOG)
    for name, value in other.items():
        changed = build(BLOG | {name: value})
        assert (changed.overrides, changed.save_by_epochs, changed.upload_uri) != (
            base.overrides, base.save_by_epochs, base.upload_uri), name


@pytest.mark.parametrize("raw", ['"photo\\\\ of\\\\ a\\\\ cat toy"', "photo\\ of\\ a\\ cat toy", "photo of a cat toy",
                                 '"photo of a cat toy"', '"photo\\ of a\\ cat toy"'])
def test_a_prompt_with_escaped_blanks_is_the_prompt(raw: str) -> None:
    assert hyperparameter_values.parse_text(raw) == "photo of a cat toy"


def test_a_withdrawn_model_is_replaced_by_its_successor_with_a_notice() -> None:
    request = build({"pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5"})
    assert request.overrides["model.source"] == "'stable-diffusion-v1-5/stable-diffusion-v1-5'"
    assert [notice for notice in request.notices if "withdrawn" in notice]


def test_all_wrong_values_are_reported_together_by_name() -> None:
    message = error_of({"use_ema": "maybe", "max_train_steps": "3.5", "learning_rate": "fast", "attention": "flash",
                        "manul_upload_model_path": "s3://bucket", "models_path": "/tmp/y",
                        "with_prior_preservation": "1"})
    assert "use_ema must be true or false, not 'maybe'" in message
    for name in ("max_train_steps", "learning_rate", "attention", "manul_upload_model_path", "models_path",
                 "with_prior_preservation"):
        assert f"{name} must be" in message


def test_an_unknown_name_is_reported_with_the_most_similar_one() -> None:
    message = error_of({"max_train_step": "3", "train.max_train_stepz": "3"})
    assert "hyperparameter max_train_step is not known: did you mean max_train_steps?" in message
    assert "hyperparameter train.max_train_stepz is not known: did you mean train.max_train_steps?" in message


def test_names_that_the_sdk_adds_are_ignored() -> None:
    assert build({"sagemaker_program": '"train.py"', "sagemaker_region": '"us-east-1"'}).overrides == {}


# -- overrides ----------------------------------------------------------------------------------------------------

def test_every_hyperparameter_is_an_override() -> None:
    config = build_config({
        "hardware": "g4dn", "train.max_train_steps": "300", "sample.prompts": '["a zwx, on a hill", "b"]',
        "sample.every": "null", "train.use_ema": '"False"'})
    assert config["model"]["name"] == "sd15"
    assert config["train"]["max_train_steps"] == 300
    assert config["sample"]["prompts"] == ["a zwx, on a hill", "b"]
    assert config["sample"]["every"] is None
    assert config["train"]["use_ema"] is False


def test_an_override_beats_a_blog_name() -> None:
    assert build_config(BLOG | {"train.max_train_steps": "4"})["train"]["max_train_steps"] == 4


def test_a_wrong_value_of_an_override_fails_with_one_sentence() -> None:
    with pytest.raises(UserError) as error:
        build_config({"train.use_ema": "maybe"})
    assert "maybe" in str(error.value)
    assert "\n" not in str(error.value)


def test_hardware_cpu_and_model_tiny_supersede_blog_names_with_a_notice() -> None:
    request = build(BLOG | {"hardware": "cpu", "model": "tiny"})
    for name in ("mixed_precision", "attention", "pretrained_model_name_or_path", "resolution"):
        assert [notice for notice in request.notices if notice.startswith(f"{name} is ignored: ")], name
    config = asdict(entrypoint.compose_run(request.to_args())[0])
    assert config["model"] == asdict(load(compose_config("model=tiny")).model)
    assert config["precision"] == asdict(load(compose_config()).precision)


def test_checkpoint_every_beats_save_use_epochs() -> None:
    request = build(BLOG | {"save_use_epochs": "true", "checkpoint.every": "7"})
    assert not request.save_by_epochs
    assert "save_use_epochs is ignored: checkpoint.every decides instead" in request.notices


def test_an_explicit_override_beats_a_superseding_option() -> None:
    config = build_config(BLOG | {"hardware": "cpu", "model": "tiny", "model.resolution": "32", "precision": "fp16"})
    assert (config["model"]["resolution"], config["precision"]["dtype"].value) == (32, "fp16")


@pytest.mark.parametrize("instance_type, option", [
    ("ml.g4dn.xlarge", "g4dn"), ("ml.g5.12xlarge", "g5_12xlarge"), ("ml.g5.2xlarge", "g5"), ("ml.g6.2xlarge", "g6"),
    ("ml.m5.xlarge", None),
    ("local_gpu", None), (None, None)])
def test_hardware_follows_the_instance_type(instance_type: str | None, option: str | None) -> None:
    assert entrypoint._find_hardware_option(instance_type) == option


def test_a_chosen_hardware_or_experiment_beats_the_instance_type() -> None:
    assert build({}, hardware="g5").overrides == {"hardware": "g5"}
    assert build({"hardware": "g4dn"}, hardware="g5").overrides == {"hardware": "g4dn"}
    assert "hardware" not in build({"experiment": "blog_g4dn"}, hardware="g5").overrides


# -- properties ----------------------------------------------------------------------------------------------------

@given(TEXTS.filter(lambda text: "\\" not in text))
def test_any_json_encoded_text_is_parsed(text: str) -> None:
    assert hyperparameter_values.parse_text(json.dumps(text)) == text
    assert hyperparameter_values.parse_text(json.dumps(text, ensure_ascii=False).replace(" ", "\\\\ ")) == text


@NO_DEADLINE
@given(TEXTS)
@example("it's $\\${x} 'a\\' ${y}\\\\")
def test_hydra_parses_a_quoted_text_as_itself(text: str) -> None:
    parsed = OverridesParser.create().parse_override(f"dataset.instance_prompt={hydra_string(text)}")
    assert OmegaConf.create({"prompt": parsed.value()}).prompt == text


@NO_DEADLINE
@given(TEXTS.filter(lambda text: hyperparameter_values.decode_json(text) is None and text.strip()))
def test_a_prompt_as_an_override_is_one_value(text: str) -> None:
    """Commas, brackets and quotes in it do not make it a sweep. A text in Hydra's grammar keeps its meaning there."""
    override = build({"dataset.instance_prompt": text}).to_args()[-1]
    assert not OverridesParser.create().parse_override(override).is_sweep_override()


@given(st.text())
def test_only_true_and_false_are_booleans(text: str) -> None:
    if hyperparameter_values.parse_text(text).strip().lower() in ("true", "false"):
        expected = hyperparameter_values.parse_text(text).strip().lower() == "true"
        assert hyperparameter_values.parse_bool(text) is expected
    else:
        with pytest.raises(ValueError, match="true or false"):
            hyperparameter_values.parse_bool(text)


@given(st.integers())
def test_any_whole_number_is_parsed(number: int) -> None:
    texts = str(number), json.dumps(str(number))
    assert [hyperparameter_values.parse_int(text) for text in texts] == [number] * 2


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_is_parsed(number: float) -> None:
    texts = repr(number), json.dumps(repr(number))
    assert [hyperparameter_values.parse_float(text) for text in texts] == [number] * 2


@pytest.mark.parametrize("raw", ["nan", "NaN", "inf", "1e999", "0x10", "1_000", "", "١"])
def test_a_text_that_is_not_a_number_is_rejected(raw: str) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        hyperparameter_values.parse_float(raw)
    with pytest.raises(ValueError, match="must be a whole number"):
        hyperparameter_values.parse_int(raw)
