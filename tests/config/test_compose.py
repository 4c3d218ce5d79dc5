"""Tests of the shipped configuration: every file composes and resolves, precedence, and the identity of a run."""

import copy
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import dreambooth
from dreambooth.config.compose import conf_dir, load
from dreambooth.config.model_defaults import default_sample_batch_size
from dreambooth.config.schema import Config
from dreambooth.errors import ConfigError
from dreambooth.kubernetes.workflow_spec import TRIAL_RUN_DIR
from dreambooth.runs.identity import has_fixed_length, identity, register_resolver
from dreambooth.utils.hardware import Machine
from tests.support.configs import compose_config, compose_recipe

PHOTOS = ["dataset.instance_dir=/photos", "dataset.instance_prompt=a photo of a zwx dog",
          "dataset.class_prompt=a photo of a dog"]
STEPS = "train.max_train_steps=9"
FILES = sorted((path.parent.name, path.stem) for path in conf_dir().glob("*/*.yaml"))


@pytest.mark.parametrize("group, name", FILES)
def test_every_file_composes_and_resolves(group: str, name: str) -> None:
    extra = ["hardware=g4dn"] if name in ("fp16", "xformers", "paged_adamw8bit") else []
    extra = ["hardware=g5"] if name == "tf32" else extra
    of_each = [word.replace("dataset.", f"dataset.concepts.{i}.").replace("zwx", f"zwx{i}")
               for i in (0, 1) for word in PHOTOS]
    compose_recipe(f"{group}={name}", *extra, *(of_each if name == "concepts" else PHOTOS))


@pytest.mark.parametrize("hardware", [name for group, name in FILES if group == "hardware"])
@pytest.mark.parametrize("preset", ["person", "pet", "object", "style"])
def test_a_preset_goes_with_every_machine_and_keeps_its_numbers(preset: str, hardware: str) -> None:
    resolved = compose_recipe(f"experiment={preset}", f"hardware={hardware}", *PHOTOS)
    assert (resolved.model.name, resolved.hardware.name) == ("sd15", hardware)
    rate, steps = {"person": (1e-6, 1200), "pet": (5e-6, 800), "object": (5e-6, 400), "style": (1e-6, 2000)}[preset]
    assert (resolved.train.learning_rate, resolved.train.max_train_steps) == (rate, steps)


@pytest.mark.parametrize("group, name", FILES)
def test_every_key_of_a_group_has_a_comment(group: str, name: str) -> None:
    check_comments(conf_dir() / group / f"{name}.yaml")


@pytest.mark.parametrize("name", ["config", "generate", "evaluate", "convert"])
def test_every_key_of_an_entry_file_has_a_comment(name: str) -> None:
    check_comments(conf_dir() / f"{name}.yaml")


def check_comments(path: Path) -> None:
    own, _, _ = path.read_text().partition("\nhydra:")  # Hydra's own keys are in Hydra's documentation
    lines = own.splitlines()
    keys = [line for line in lines if ": " in line and not line.lstrip().startswith(("#", "-"))]
    plain = [line for line in keys if "#" not in line and line.split(":")[0].strip() not in ("name", "device")]
    assert plain == []


def test_default_is_the_demo_on_the_tiny_base() -> None:
    resolved = compose_recipe()
    assert (resolved.model.name, resolved.dataset.name, resolved.device) == ("tiny", "demo", "cpu")
    train = resolved.train
    assert (train.learning_rate, train.max_train_steps, train.train_text_encoder) == (3e-4, 200, True)


@pytest.mark.parametrize("overrides, rate", [
    (["optimizer=prodigy"], 1.0), (["optimizer=prodigy", "method=lora"], 1.0),
    (["optimizer=prodigy", "train.learning_rate=0.5"], 0.5), (["optimizer=prodigy", "experiment=person", *PHOTOS], 1.0),
    (["optimizer=lion"], 9e-5), (["optimizer=lion", "method=lora"], 6e-4), (["optimizer=muon"], 3e-4),
    (["optimizer=lion", "hardware=g4dn", *PHOTOS], 1.5e-6),
])
def test_an_optimizer_has_a_learning_rate_of_its_own(overrides: list[str], rate: float) -> None:
    assert compose_recipe(*overrides).train.learning_rate == pytest.approx(rate, rel=1e-9)


def test_g4dn_alone_is_sd15() -> None:
    resolved = compose_recipe("hardware=g4dn", *PHOTOS)
    assert (resolved.model.name, resolved.model.resolution, resolved.precision.dtype.value) == ("sd15", 512, "fp16")
    assert (resolved.train.learning_rate, resolved.train.max_train_steps) == (5e-6, 800)


def test_command_line_beats_experiment_beats_config() -> None:
    assert compose_recipe("experiment=blog_g4dn", *PHOTOS).train.max_train_steps == 300
    assert compose_recipe("experiment=blog_g4dn", "train.max_train_steps=7", *PHOTOS).train.max_train_steps == 7
    assert compose_recipe("hardware=g4dn", "model=tiny", "precision=fp32").model.name == "tiny"


def test_blog_g4dn_is_the_seed_blogs_run() -> None:
    r = compose_recipe("experiment=blog_g4dn", "dataset.instance_dir=/photos")
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
        compose_recipe(*overrides, machine=machine)


def test_bf16_is_fine_on_an_a10g_and_all_problems_come_together() -> None:
    compose_recipe("hardware=g5", *PHOTOS)
    with pytest.raises(ConfigError) as caught:
        load(compose_config("train.learning_rate=-1", "train.train_batch_size=0", "checkpoint.keep=0"))
    assert len(caught.value.problems) == 3


def test_a_recipe_cannot_be_changed_and_its_settings_hold_no_server() -> None:
    resolved = compose_recipe("tracking.uri='${oc.env:NOT_SET_HERE,\"http://user:secret@host\"}'")
    with pytest.raises(AttributeError):
        resolved.train.seed = 1
    assert "secret" not in str(resolved.settings())
    assert resolved.settings()["train.seed"] == "0"


SAME = ["hardware=cpu", "memory=low", "tracking=none", "sample.every=7", "checkpoint.keep=9", "run_root=/x",
        "train.compile_cache=/x", "train.max_train_steps=9",
        "prior.sample_batch_size=32", "memory=lowest", "memory.offload_optimizer=true"]
OTHER = ["train.learning_rate=1", "train.seed=1", "dataset.instance_prompt=a zwx", "model.resolution=128",
         "precision=bf16", "prior.prior_loss_weight=9", "train.lr_scheduler=cosine", "optimizer.eps=1",
         "memory.weights=half", "memory.rounding=kahan", "memory.ema_every=2", "prior.sample_batch_size=1"]


@pytest.mark.parametrize("override", SAME)
def test_identity_is_that_of_the_result(override: str) -> None:
    assert identity(compose_config(override)) == identity(compose_config())


def test_identity_of_output_preservation_knows_no_class_images() -> None:
    output = ["method=lora", "prior.kind=output"]
    assert identity(compose_config(*output)) != identity(compose_config("method=lora"))
    for changed in ("prior.num_class_images=9", "prior.guidance_scale=9", "prior.sample_batch_size=1"):
        assert identity(compose_config(*output, changed)) == identity(compose_config(*output))
    assert identity(compose_config(*output, "prior.prior_loss_weight=9")) != identity(compose_config(*output))


@pytest.mark.parametrize("override", OTHER)
def test_identity_changes_with_the_result(override: str) -> None:
    assert identity(compose_config(override)) != identity(compose_config())


def test_a_run_with_another_batch_of_class_images_is_found_under_its_earlier_name(tmp_path: Path) -> None:
    """Earlier versions did not hash the batch size, which changes the last bits of class images."""
    ask = [f"run_root={tmp_path}", "prior.sample_batch_size=1"]
    folder = tmp_path / f"demo-tiny-full-{identity(compose_config())}"
    folder.mkdir()
    others = {identity(compose_config(*ask))}
    for content in ("[]", '{"settings": {"prior.sample_batch_size": "2"}}'):
        (folder / "run.json").write_text(content)
        others.add(identity(compose_config(*ask)))
    assert len(others) == 1 and others != {identity(compose_config())}
    (folder / "run.json").write_text('{"settings": {"prior.sample_batch_size": "1"}}')
    assert identity(compose_config(*ask)) == identity(compose_config())
    off = "prior.with_prior_preservation=false"
    assert identity(compose_config(off, "prior.sample_batch_size=3")) == identity(compose_config(off))


@pytest.mark.parametrize("model", sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml")))
def test_the_default_batch_size_of_a_model_is_that_of_its_file(model: str) -> None:
    assert default_sample_batch_size(model) == compose_config(f"model={model}").prior.sample_batch_size
    assert default_sample_batch_size("somebodys") == 4


def test_identity_counts_steps_only_where_the_schedule_does() -> None:
    cosine = "train.lr_scheduler=cosine"
    assert identity(compose_config(cosine, "train.max_train_steps=9")) != identity(compose_config(cosine))
    assert identity(compose_config("train.max_train_steps=9"), swept=True) != identity(compose_config(), swept=True)


@pytest.mark.parametrize(("words", "fixed"), [
    (["tracking.sweep=team", STEPS], False), (["hydra.mode=MULTIRUN", STEPS], True), ([TRIAL_RUN_DIR, STEPS], True),
    (["hydra.mode=MULTIRUN"], False)])
def test_a_run_is_of_fixed_length_if_its_folder_is_named_after_its_steps(words: list[str], fixed: bool) -> None:
    """The name of a sweep alone does not change the folder of a run."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert has_fixed_length(compose("config", words, return_hydra_config=True).hydra) is fixed


def test_identity_tells_places_in_s3_apart() -> None:
    """The identity uses the address: naming a run downloads nothing."""
    select = ("evaluate.select=subject_similarity", "evaluate.reference_dir=")
    for words in (("dataset.instance_dir=",), ("dataset.class_dir=",), select):
        one, other = (identity(compose_config(*words[:-1], f"{words[-1]}s3://bucket/{name}")) for name in ("a", "b"))
        assert one != other


def test_identity_follows_the_photos_content(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    before = identity(compose_config(f"dataset.instance_dir={tmp_path}"))
    (tmp_path / "a.png").write_bytes(b"two")
    assert identity(compose_config(f"dataset.instance_dir={tmp_path}")) != before


def test_every_key_of_the_schema_is_in_a_yaml_file() -> None:
    """Every key of the schema is in a YAML file, which has a comment for it."""
    text = "\n".join(path.read_text() for path in conf_dir().rglob("*.yaml"))
    for section, node in OmegaConf.to_container(compose_config(), resolve=False).items():  # type: ignore[union-attr]
        for key in node if isinstance(node, dict) else [section]:
            assert f"{key}:" in text, f"{section}.{key}"


def yaml_keys(node: object, prefix: str = "") -> set[str]:
    """The keys of nested dictionaries, joined with dots."""
    if not isinstance(node, dict):
        return set()
    return {f"{prefix}{key}" for key in node}.union(
        *(yaml_keys(value, f"{prefix}{key}.") for key, value in node.items()))


@pytest.mark.parametrize("group, name", [file for file in FILES if file[0] not in ("experiment", "sweep")])
def test_every_key_of_its_section_is_in_every_file_of_a_group(group: str, name: str) -> None:
    """Otherwise the schema's default would apply, without being visible in the file."""
    keys = yaml_keys(OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"), resolve=False))
    own = {key.removeprefix(f"{group}.") for key in keys}
    assert {item.name for item in fields(getattr(Config(), group))} <= own


def test_every_key_without_a_group_is_in_config_yaml() -> None:
    keys = yaml_keys(OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"), resolve=False))
    schema = yaml_keys(OmegaConf.to_container(OmegaConf.structured(Config), resolve=False))
    groups = {group for group, _ in FILES}
    assert {key for key in schema if key.partition(".")[0] not in groups} <= keys


def test_an_experiment_beats_model_files_too() -> None:
    """num_class_images is 100 in config.yaml and 200 in sd15.yaml."""
    assert compose_config("hardware=g4dn").prior.num_class_images == 200
    assert compose_config("experiment=blog_g4dn").prior.num_class_images == 50
    assert compose_config("experiment=blog_g4dn", "prior.num_class_images=7").prior.num_class_images == 7


def test_the_command_line_beats_what_hardware_chooses() -> None:
    assert compose_config("hardware=g4dn").memory.auto
    cfg = compose_config("hardware=g4dn", "model=tiny", "precision=fp32", "memory=fast")
    assert (cfg.hardware.name, cfg.model.name, cfg.precision.dtype.value) == ("g4dn", "tiny", "fp32")
    assert not cfg.memory.auto


@pytest.mark.parametrize("text, truth", [("False", False), ("'False'", False), ("false", False), ("True", True)])
def test_false_is_false(text: str, truth: bool) -> None:
    assert load(compose_config(f"train.use_ema={text}")).train.use_ema is truth


def test_a_bad_interpolation_is_a_sentence_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"train\.max_train_steps"):
        load(compose_config("train.max_train_steps=${name}"))


@pytest.mark.parametrize("override", ["tracking.uri=http://x", "checkpoint.resume=never", "hardware.gpu=T4",
                                      "checkpoint.every=3", "sample.prompts=[a]", "model.offline=false"])
def test_identity_leaves_out_what_does_not_change_the_result(override: str) -> None:
    assert identity(compose_config(override)) == identity(compose_config())


def test_identity_does_not_depend_on_where_the_photos_lie(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "a.png").write_bytes(b"one")
    first, second = (identity(compose_config(f"dataset.instance_dir={tmp_path / name}")) for name in "ab")
    assert first == second
    (tmp_path / "b/a.txt").write_text("a caption")
    assert identity(compose_config(f"dataset.instance_dir={tmp_path / 'b'}")) != first


def test_the_run_folder_carries_the_identity() -> None:
    register_resolver()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", return_hydra_config=True)
    assert cfg.hydra.run.dir == f"runs/demo-tiny-full-{identity(cfg)}"
    assert f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}" == cfg.hydra.run.dir


def test_identity_knows_the_weights_in_a_local_base(tmp_path: Path) -> None:
    identities = set()
    for content in (b"one", b"two"):
        (tmp_path / "unet.safetensors").write_bytes(content)
        identities.add(identity(compose_config(f"model.source={tmp_path}")))
    assert len(identities) == 2


def test_identity_knows_the_weights_in_a_local_vae(tmp_path: Path) -> None:
    file = tmp_path / "vae.safetensors"
    identities = {identity(compose_config()), identity(compose_config("model.vae=somebody/vae"))}
    for content in (b"one", b"two"):
        file.write_bytes(content)
        identities |= {identity(compose_config(f"model.vae={path}")) for path in (file, tmp_path)}
    assert len(identities) == 6


@pytest.mark.parametrize("uri", ["http://me:secret@host:5000", "postgresql://me:se@cret@host/db",
                                 "mysql://host/db?password=secret", "http://a-token@host"])
def test_a_password_in_an_address_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        load(compose_config(f"tracking.uri='{uri}'"))


@pytest.mark.parametrize("uri", ["http://host:5000", "postgresql://me@host/db", "'${oc.env:MLFLOW_TRACKING_URI}'"])
def test_an_address_without_a_typed_password_is_fine(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    assert "host" in str(load(compose_config(f"tracking.uri={uri}")).tracking.uri)


def test_each_command_has_its_own_headline() -> None:
    """`plan` and `class_images` compose the configuration of train, but they do not train."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        headlines = {name: compose("config", [f"hydra/help={name}"], return_hydra_config=True).hydra.help.header
                     for name in ("dreambooth", "plan", "class_images")}
    assert [headlines[name].split()[0] for name in ("dreambooth", "plan", "class_images")] == [
        "DreamBooth:", "Predict", "Generate"]
    for name in ("plan", "class_images"):
        code = (Path(dreambooth.__file__).parent / f"{name}.py").read_text("utf-8")
        assert f'run_hydra_without_folder({name}, Config, "{name}")' in code


def test_a_cpu_stays_a_cpu() -> None:
    assert compose_recipe("hardware=cpu", "hardware.gpu=T4").device == "cpu"


def test_hydras_store_of_schemas_is_not_copied_and_what_is_loaded_from_it_is() -> None:
    """For --help, Hydra would copy it about a hundred times, which took longer than all the rest."""
    store = ConfigStore.instance()
    assert copy.deepcopy(store) is store
    assert store.load("schema.yaml").node is not store.load("schema.yaml").node
