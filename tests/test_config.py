"""Every shipped configuration composes and resolves; what beats what; the seed blog's run."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dreambooth.config import conf_dir, identity, load
from dreambooth.errors import ConfigError
from dreambooth.machine import Machine
from dreambooth.recipe import Recipe, resolve

PHOTOS = ["dataset.instance_dir=/photos", "dataset.instance_prompt=a photo of a zwx dog",
          "dataset.class_prompt=a photo of a dog"]
FILES = sorted((path.parent.name, path.stem) for path in conf_dir().glob("*/*.yaml"))


def made(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(overrides))


def recipe(*overrides: str, machine: Machine | None = None) -> Recipe:
    return resolve(load(made(*overrides)), Path("runs/x"), machine)


@pytest.mark.parametrize("group, name", FILES)
def test_every_file_composes_and_resolves(group: str, name: str) -> None:
    extra = {"fp16": ["hardware=g4dn"], "xformers": ["hardware=g4dn"]}.get(name, [])
    recipe(f"{group}={name}", *extra, *PHOTOS)


@pytest.mark.parametrize("group, name", FILES)
def test_every_key_of_a_group_has_a_comment(group: str, name: str) -> None:
    lines = (conf_dir() / group / f"{name}.yaml").read_text().splitlines()
    keys = [line for line in lines if ": " in line and not line.lstrip().startswith(("#", "-"))]
    plain = [line for line in keys if "#" not in line and line.split(":")[0].strip() not in ("name", "device")]
    assert plain == []


def test_default_is_the_demo_on_the_tiny_base() -> None:
    found = recipe()
    assert (found.model.name, found.dataset.name, found.device) == ("tiny", "demo", "cpu")
    train = found.train
    assert (train.learning_rate, train.max_train_steps, train.train_text_encoder) == (3e-4, 200, True)


def test_g4dn_alone_is_sd15() -> None:
    found = recipe("hardware=g4dn", *PHOTOS)
    assert (found.model.name, found.model.resolution, found.precision.dtype.value) == ("sd15", 512, "fp16")
    assert (found.train.learning_rate, found.train.max_train_steps) == (5e-6, 800)


def test_command_line_beats_experiment_beats_config() -> None:
    assert recipe("experiment=blog_g4dn", *PHOTOS).train.max_train_steps == 300
    assert recipe("experiment=blog_g4dn", "train.max_train_steps=7", *PHOTOS).train.max_train_steps == 7
    assert recipe("hardware=g4dn", "model=tiny", "precision=fp32").model.name == "tiny"


def test_blog_g4dn_is_the_seed_blogs_run() -> None:
    r = recipe("experiment=blog_g4dn", "dataset.instance_dir=/photos")
    assert r.model.source == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (r.model.resolution, r.precision.dtype.value, r.attention.kind.value) == (512, "fp16", "xformers")
    t, p, m = r.train, r.prior, r.memory
    assert (t.learning_rate, t.lr_scheduler.value, t.lr_warmup_steps, t.max_train_steps) == (2e-6, "constant", 0, 300)
    assert (t.train_batch_size, t.gradient_accumulation_steps, t.use_ema, t.train_text_encoder) == (1, 1, True, False)
    assert (p.with_prior_preservation, p.prior_loss_weight) == (True, 0.5)
    assert (p.num_class_images, p.sample_batch_size) == (50, 1)
    assert (m.gradient_checkpointing, m.cache_latents, r.optimizer.kind.value) == (True, False, "adamw")
    assert (r.instance_prompt, r.class_prompt, r.checkpoint.every) == ("photo of zwx toy", "photo of a cat toy", 100)


@pytest.mark.parametrize("overrides, machine, words", [
    (["hardware=g4dn", "precision=bf16", *PHOTOS], None, "type precision=fp16"),
    (["hardware=g4dn", *PHOTOS], Machine(), "type hardware=cpu"),
    (["hardware=cpu", "precision=fp16"], None, "type precision=fp32"),
    (["hardware=g4dn"], None, "dataset.allow_drawings=true"),
    (["dataset=folder"], None, "type dataset.instance_dir=DIR"),
    (["prior.num_class_images=0"], None, "prior.num_class_images=100"),
    (["dataset.center_crop=false"], None, "memory.cache_latents=false"),
    (["train.lr_warmup_steps=5"], None, "constant_with_warmup"),
])
def test_broken_rules_say_what_to_type(overrides: list[str], machine: Machine | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe(*overrides, machine=machine)


def test_bf16_is_fine_on_an_a10g_and_all_problems_come_together() -> None:
    recipe("hardware=g5", *PHOTOS)
    with pytest.raises(ConfigError) as caught:
        load(made("train.learning_rate=-1", "train.train_batch_size=0", "checkpoint.keep=0"))
    assert len(caught.value.problems) == 3


def test_a_recipe_cannot_be_changed_and_its_settings_hold_no_server() -> None:
    found = recipe("tracking.uri=http://user:secret@host")
    with pytest.raises(AttributeError):
        found.train.seed = 1
    assert "secret" not in str(found.settings())
    assert found.settings()["train.seed"] == "0"


SAME = ["hardware=cpu", "memory=low", "tracking=none", "sample.every=7", "checkpoint.keep=9", "run_root=/x",
        "train.max_train_steps=9", "prior.sample_batch_size=1"]
OTHER = ["train.learning_rate=1", "train.seed=1", "dataset.instance_prompt=a zwx", "model.resolution=128",
         "precision=bf16", "prior.prior_loss_weight=9", "train.lr_scheduler=cosine", "optimizer.eps=1"]


@pytest.mark.parametrize("override", SAME)
def test_identity_is_that_of_the_result(override: str) -> None:
    assert identity(made(override)) == identity(made())


@pytest.mark.parametrize("override", OTHER)
def test_identity_changes_with_the_result(override: str) -> None:
    assert identity(made(override)) != identity(made())


def test_identity_counts_steps_only_where_the_schedule_does() -> None:
    cosine = "train.lr_scheduler=cosine"
    assert identity(made(cosine, "train.max_train_steps=9")) != identity(made(cosine))


def test_identity_follows_the_photos_content(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    before = identity(made(f"dataset.instance_dir={tmp_path}"))
    (tmp_path / "a.png").write_bytes(b"two")
    assert identity(made(f"dataset.instance_dir={tmp_path}")) != before


def test_nothing_is_hidden_in_the_schema() -> None:
    """Every key of the schema stands in a YAML file, where its comment is."""
    text = "\n".join(path.read_text() for path in conf_dir().rglob("*.yaml"))
    for section, node in OmegaConf.to_container(made(), resolve=False).items():  # type: ignore[union-attr]
        for key in node if isinstance(node, dict) else [section]:
            assert f"{key}:" in text, f"{section}.{key}"
