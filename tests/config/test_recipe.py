"""Tests of `resolve`: rules between config groups, detected hardware, immutability, and bounds of single fields."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dreambooth.config import validation
from dreambooth.config.compose import load
from dreambooth.config.enums import (
    AttentionKind,
    BaseWeights,
    Device,
    Dtype,
    EncoderKind,
    LrSchedule,
    MethodKind,
    OptimizerKind,
    PriorKind,
    Rounding,
    TrackingKind,
    Weights,
)
from dreambooth.config.overrides import setting_keys
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config, StopWhen
from dreambooth.config.section import Section
from dreambooth.errors import ConfigError
from dreambooth.runs.identity import identity
from dreambooth.utils.hardware import Machine
from tests.support.configs import A10G, NONE, T4, compose_config, demo_config, resolve_demo

NOT_IN_RECIPES = ("run_root", "name", "plan", "storage")  # fields of a Config that are no section of a Recipe
SECTIONS = [item.name for item in dataclasses.fields(Config) if item.name not in NOT_IN_RECIPES]


def problems(machine: Machine | None = None, **values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(demo_config(**values), Path("runs/x"), machine)
    return list(caught.value.problems)


@pytest.fixture
def no_packages(monkeypatch):
    """Neither xformers nor bitsandbytes is installed."""
    monkeypatch.setattr(validation, "find_spec", lambda name: None)


PRODIGY = {"optimizer__kind": OptimizerKind.prodigy, "train__learning_rate": 1.0}
SCHEDULE_FREE = {"optimizer__kind": OptimizerKind.schedule_free, "train__use_ema": False}
HALF = {"memory__weights": Weights.half, "memory__rounding": Rounding.stochastic, "precision__dtype": Dtype.fp16}
SHARDS, SIX = {"memory__fully_shard": True}, {"train__global_batch_size": 6}
BROKEN = {  # broken rule -> (machine, values by key, what the message says to type)
    "shards of an adapter": (NONE, SHARDS | {"method__kind": MethodKind.lora}, "method=full"),
    "shards and Adafactor": (NONE, SHARDS | {"optimizer__kind": OptimizerKind.adafactor}, "optimizer=adamw"),
    "shards and loss scaling": (T4, SHARDS | {"precision__dtype": Dtype.fp16}, "precision=bf16"),
    "shards and offloading": (NONE, SHARDS | {"memory__offload_optimizer": True}, "offload_optimizer=false"),
    "a fixed batch": (NONE, SIX | {"train__gradient_accumulation_steps": 2}, "accumulation_steps=1"),
    "a fixed batch and compilation": (NONE, SIX | {"train__compile": True}, "compile=false"),
    "a fixed batch and output preservation": (
        NONE, SIX | {"prior__kind": PriorKind.output, "method__kind": MethodKind.lora}, "prior.kind=class_images"),
    "several micro-batches": (NONE, SIX | {"memory__optimizer_in_backward": True}, "train.train_batch_size=6"),
    "a GPU is required and there is none": (NONE, {"hardware__device": Device.cuda}, "hardware=cpu"),
    "bf16 on a T4": (T4, {"precision__dtype": Dtype.bf16}, "precision=fp16"),
    "fp16 on a CPU": (NONE, {"precision__dtype": Dtype.fp16}, "precision=fp32"),
    "xformers on a CPU": (NONE, {"attention__kind": AttentionKind.xformers}, "attention=sdpa"),
    "xformers is not installed": (T4, {"attention__kind": AttentionKind.xformers}, "pip install 'dreambooth[cuda]'"),
    "bitsandbytes is not installed": (NONE, {"optimizer__kind": OptimizerKind.adamw8bit}, "optimizer=adamw"),
    "TF32 on a T4": (T4, {"precision__tf32": True}, "precision=fp32"),
    "TF32 on a CPU": (NONE, {"precision__tf32": True}, "precision=fp32"),
    "no photos": (None, {"dataset__instance_dir": None}, "dataset.instance_dir=DIR"),
    "no instance prompt": (None, {"dataset__instance_prompt": " "}, "dataset.instance_prompt="),
    "drawings for a hub model": (None, {"model__source": "me/model"}, "dataset.allow_drawings=true"),
    "no class prompt": (None, {"dataset__class_prompt": None}, "dataset.class_prompt="),
    "equal prompts": (None, {"dataset__instance_prompt": " A Toy", "dataset__class_prompt": "a  toy"},
                      "prior.with_prior_preservation=false"),
    "no class images": (None, {"prior__num_class_images": 0}, "prior.num_class_images=100"),
    "the output of a base that is trained": (
        None, {"prior__kind": PriorKind.output}, "method=lora, or prior.kind=class_images"),
    "class images beside the output of the base": (
        None, {"prior__kind": PriorKind.output, "method__kind": MethodKind.lora, "dataset__class_dir": "photos"},
        "dataset.class_dir=null, or prior.kind=class_images"),
    "the output of the base without prior preservation": (
        None, {"prior__kind": PriorKind.output, "method__kind": MethodKind.lora,
               "prior__with_prior_preservation": False}, "prior.with_prior_preservation=true"),
    "two weights by the SNR": (None, {"train__debiased_estimation": True, "train__snr_gamma": 5.0},
                               "train.snr_gamma=null, or train.debiased_estimation=false"),
    "a frozen random crop": (None, {"dataset__center_crop": False}, "memory.cache_latents=false"),
    "warm-up of a constant rate": (None, {"train__lr_warmup_steps": 5}, "train.lr_scheduler=constant_with_warmup"),
    "a warm-up longer than the run": (
        None, {"train__lr_warmup_steps": 900, "train__lr_scheduler": LrSchedule.cosine}, "train.lr_warmup_steps=800"),
    "accumulation with the optimizer in backward": (
        None, {"memory__optimizer_in_backward": True, "train__gradient_accumulation_steps": 2},
        "train.gradient_accumulation_steps=1"),
    "a split prior pass with the optimizer in backward and nothing recomputed": (
        None, {"memory__optimizer_in_backward": True, "memory__split_prior": True},
        "memory.gradient_checkpointing=true"),
    "offload with the optimizer in backward": (
        None, {"memory__optimizer_in_backward": True, "memory__offload_optimizer": True},
        "memory.offload_optimizer=false"),
    "half weights in fp32": (
        None, {"memory__weights": Weights.half, "memory__rounding": Rounding.kahan}, "precision=bf16"),
    "half weights rounded to nearest": (
        None, {"memory__weights": Weights.half, "precision__dtype": Dtype.bf16}, "memory.rounding=stochastic"),
    "half weights and offload": (
        None, {"memory__weights": Weights.half, "precision__dtype": Dtype.bf16, "memory__rounding": Rounding.kahan,
               "memory__offload_optimizer": True}, "memory.weights=full"),
    "rounding of full weights": (None, {"memory__rounding": Rounding.kahan}, "memory.weights=half"),
    "an EMA that misses the last steps": (None, {"memory__ema_every": 3}, "memory.ema_every=1"),
    "paging on a CPU": (None, {"optimizer__kind": OptimizerKind.paged_adamw8bit}, "optimizer=adamw8bit"),
    "Prodigy with AdamW's learning rate": (None, {"optimizer__kind": OptimizerKind.prodigy}, "train.learning_rate=1"),
    "Prodigy in the backward pass": (
        None, PRODIGY | {"memory__optimizer_in_backward": True}, "memory.optimizer_in_backward=false"),
    "half weights and Prodigy": (T4, PRODIGY | HALF, "memory.weights=full"),
    "half weights and schedule-free AdamW": (T4, SCHEDULE_FREE | HALF, "memory.weights=full"),
    "half weights and Muon": (T4, {"optimizer__kind": OptimizerKind.muon} | HALF, "memory.weights=full"),
    "Muon and an adapter": (
        None, {"optimizer__kind": OptimizerKind.muon, "method__kind": MethodKind.lora}, "method=full"),
    "schedule-free AdamW with a schedule": (
        None, SCHEDULE_FREE | {"train__lr_scheduler": LrSchedule.cosine}, "train.lr_scheduler=constant"),
    "schedule-free AdamW with an EMA": (None, SCHEDULE_FREE | {"train__use_ema": True}, "train.use_ema=false"),
    "schedule-free AdamW that divides by 0": (None, SCHEDULE_FREE | {"optimizer__beta1": 0.0}, "optimizer.beta1=0.9"),
    "Prodigy's coefficient without Prodigy": (None, {"optimizer__d_coef": 2.0}, "optimizer=prodigy"),
    "a third beta without an optimizer that uses it": (None, {"optimizer__beta3": 0.99}, "optimizer.beta3=null"),
    "a quantised base on a CPU": (
        NONE, {"method__kind": MethodKind.lora, "method__base_weights": BaseWeights.nf4}, "method.base_weights=half"),
    "a quantised base without its package": (
        T4, {"method__kind": MethodKind.lora, "method__base_weights": BaseWeights.nf4}, "pip install"),
    "fp8 on a card without it": (
        A10G, {"method__kind": MethodKind.lora, "method__base_weights": BaseWeights.fp8}, "method.base_weights=int8"),
    "swapped blocks that are trained": (None, {"memory__swap_blocks": 2, "memory__gradient_checkpointing": True},
                                        "method=lora, or memory.swap_blocks=null"),
    "swapped blocks without checkpointing": (
        None, {"memory__swap_blocks": 2, "method__kind": MethodKind.lora}, "memory.gradient_checkpointing=true, or"),
    "dropout in a compiled step": (
        None, {"method__kind": MethodKind.lora, "method__dropout": 0.1, "train__compile": True}, "train.compile=false"),
    "half weights of an adapter": (
        T4, {"method__kind": MethodKind.lora, "memory__weights": Weights.half, "memory__rounding": Rounding.stochastic,
             "precision__dtype": Dtype.fp16}, "memory.weights=full"),
    "the small optimizer of an adapter in host memory": (
        None, {"method__kind": MethodKind.dora, "memory__offload_optimizer": True}, "memory.offload_optimizer=false"),
    "the rank of an adapter without an adapter": (None, {"method__rank": 64}, "method=lora"),
    "several settings of an adapter without an adapter": (
        NONE, {"method__base_weights": BaseWeights.nf4, "method__merge": True, "method__alpha": 8.0}, "method=lora"),
    "a name with a slash": (None, {"name": "pets/rex"}, "name=pets-rex"),
    "a name with a colon, above the root": (None, {"name": "../a: b"}, 'name="..-a- b"'),
    "a sweep with a slash": (None, {"tracking__sweep": "pets/rex"}, "tracking.sweep=pets-rex"),
    "trackers without their packages": (NONE, {"tracking__kind": TrackingKind.all},
                                        "'dreambooth[tensorboard,wandb]'"),
    "a managed server without its package": (
        NONE, {"tracking__uri": "arn:aws:sagemaker:x"}, "'dreambooth[managed-mlflow]'"),
    "held-out photos from two places": (
        None, {"dataset__validation_count": 1, "dataset__validation_dir": "held"}, "dataset.validation_count=0"),
    "early stopping without held-out photos": (
        None, {"train__stop_when": StopWhen("validation_loss")}, "dataset.validation_count=1"),
    "early stopping by held-out photos that are never measured": (
        None, {"train__stop_when": StopWhen("validation_loss"), "dataset__validation_count": 1,
               "train__validate_every": None}, "train.validate_every=50"),
    "early stopping by pictures that are never measured": (
        None, {"train__stop_when": StopWhen("class_drift")}, "evaluate.every=50"),
    "a sum of measures of different steps": (
        None, {"train__stop_when": StopWhen("class_drift+validation_loss"), "dataset__validation_count": 1,
               "evaluate__every": 75}, "train.validate_every=75"),
    "a rule of early stopping without a measure": (
        None, {"train__stop_when": StopWhen(bound=0.1)}, "train.stop_when.measure=validation_loss"),
    "early stopping that never stops": (
        None, {"train__stop_when": StopWhen("class_drift", patience=None), "evaluate__every": 50},
        "train.stop_when.patience=3"),
    "the best weights by held-out photos without any": (
        None, {"evaluate__select": "validation_loss"}, "dataset.validation_count=1"),
    "a missing checkpoint": (None, {"checkpoint__resume": "/nowhere"}, "checkpoint.resume=auto"),
}


def test_swapped_blocks_in_4_bits_are_refused():
    found = problems(T4, memory__swap_blocks=2, memory__gradient_checkpointing=True, method__kind=MethodKind.lora,
                     method__base_weights=BaseWeights.nf4)
    assert any("memory.swap_blocks cannot move weights of bitsandbytes: type" in sentence for sentence in found)


@pytest.mark.parametrize("what", BROKEN)
def test_each_broken_rule_is_one_sentence_that_says_what_to_type(what, no_packages):
    machine, values, typed = BROKEN[what]
    [sentence] = problems(machine, **values)
    assert typed in sentence.partition(": ")[2]
    assert "\n" not in sentence


def test_a_run_that_an_earlier_version_started_under_a_name_with_a_slash_is_not_refused(tmp_path):
    config = demo_config(name="pets/rex", tracking__sweep="a/b")
    with pytest.raises(ConfigError, match="name=pets/rex has a slash or a colon"):
        resolve(config, tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert resolve(config, tmp_path).name == "pets/rex"


def test_settings_of_an_adapter_without_one_are_named():
    assert problems(method__dropout=0.1) == [
        "method.dropout applies to adapters only, and method=full trains every weight: type method=lora"]
    [sentence] = problems(method__rank=8, method__merge=True)
    assert sentence.startswith("method.rank and method.merge apply to adapters only, and")
    assert not resolve_demo(method__rank=16, method__dropout=0.0).method.low_rank, "defaults are allowed"


def test_the_file_of_the_full_method_has_what_the_schema_has():
    assert resolve_demo().method == resolve(load(compose_config()), Path("runs/x")).method


def test_all_broken_rules_are_reported_together(no_packages):
    together = ["bf16 on a T4", "xformers is not installed", "no photos", "no instance prompt", "no class prompt",
                "no class images", "a frozen random crop", "a missing checkpoint",
                "bitsandbytes is not installed", "warm-up of a constant rate"]
    values = {key: value for what in together for key, value in BROKEN[what][1].items()}
    assert len(problems(T4, **values)) == len(together)


def test_precision_follows_the_cards_capability():
    assert resolve_demo(A10G, precision__dtype=Dtype.bf16).device == "cuda"
    assert resolve_demo(NONE, precision__dtype=Dtype.bf16).device == "cpu"
    assert resolve_demo(T4, precision__dtype=Dtype.fp16).hardware.gpu == "T4"
    declared = {"hardware__device": Device.cuda, "hardware__gpu": "T4", "hardware__compute_capability": 7.5}
    assert problems(None, precision__dtype=Dtype.bf16, **declared), "a run for a T4 of another machine"
    assert resolve_demo(A10G, precision__dtype=Dtype.bf16, **declared), "the detected GPU counts"


def test_hardware_cpu_uses_no_card():
    assert resolve_demo(T4, hardware__device=Device.cpu).device == "cpu"
    assert resolve_demo(T4).device == "cuda"
    assert resolve_demo(NONE).device == "cpu"


def test_declared_vram_stays_and_the_rest_is_detected():
    assert resolve_demo(T4).hardware.usable_vram_gib == 14.6
    assert resolve_demo(T4, hardware__usable_vram_gib=8.0).hardware.usable_vram_gib == 8.0


def test_drawings_may_train_the_shipped_model_or_with_allow_drawings():
    assert resolve_demo().source.endswith("assets/tiny-sd")
    assert resolve_demo(model__source="me/model", dataset__allow_drawings=True).source == "me/model"
    assert resolve_demo(model__source="me/model", dataset__instance_dir="/photos").instance_dir == Path("/photos")


def test_without_prior_preservation_no_class_settings_are_needed():
    recipe = resolve_demo(prior__with_prior_preservation=False, prior__num_class_images=0, dataset__class_prompt=None)
    assert (recipe.with_prior, recipe.class_prompt) == (False, "")
    assert recipe.sample_prompts == ("a zwx toy", "a zwx toy on the beach")


def test_own_class_images_need_no_generated_ones(tmp_path):
    assert resolve_demo(prior__num_class_images=0, dataset__class_dir=str(tmp_path)).class_dir == tmp_path


def test_sample_prompts_are_the_usual_three_or_the_users():
    assert resolve_demo().sample_prompts == ("a zwx toy", "a zwx toy on the beach", "a toy")
    assert resolve_demo(sample__prompts=["one", "two"]).sample_prompts == ("one", "two")


def test_a_recipe_and_its_sections_are_frozen_and_the_config_is_not():
    config = demo_config()
    recipe = resolve(config, Path("runs/x"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"
    for name in SECTIONS:
        section = getattr(recipe, name)
        for key in vars(getattr(Config(), name)):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(section, key, None)
    config.train.seed = 5
    assert recipe.train.seed == 0


def test_settings_hold_every_key_but_nothing_of_the_tracking_server():
    recipe = resolve_demo(tracking__uri="https://user:secret@host", checkpoint__every=None)
    keys = {key for key in setting_keys(Config) if key.partition(".")[0] in {*SECTIONS} - {"tracking", "budget"}}
    assert recipe.settings().keys() == keys | {"name", "device", "sample_prompts"}
    assert "secret" not in str(recipe.settings())
    assert recipe.settings()["checkpoint.every"] == "null"
    assert recipe.settings()["precision.dtype"] == "fp32"
    assert all(isinstance(value, str) for value in recipe.settings().values())


NAN, INF = math.nan, math.inf
below_0 = st.one_of(st.integers(max_value=-1), st.sampled_from([NAN, INF, -INF]), st.floats(-1e9, -1e-9))
not_above_0 = below_0 | st.just(0.0)
positive = st.floats(max_value=0) | st.just(NAN)
outside_0_1 = st.floats(max_value=-1e-9) | st.floats(min_value=1) | st.just(NAN)
less_than_1 = st.integers(max_value=0)
negative = st.integers(max_value=-1)
no_seed = st.integers(max_value=-1) | st.integers(min_value=2**63)
no_steps = st.integers(max_value=0) | st.integers(min_value=1001)
BOUNDS = {
    "budget.max_usd": positive, "budget.max_hours": positive,
    "budget.interruptions_per_hour": st.floats(max_value=-1e-9) | st.floats(min_value=60.1),
    "model.resolution": st.integers(max_value=7) | st.integers(min_value=2049) | st.sampled_from([9, 100, 513]),
    "optimizer.beta1": outside_0_1, "optimizer.beta2": outside_0_1, "optimizer.eps": not_above_0,
    "optimizer.weight_decay": below_0, "optimizer.beta3": outside_0_1, "optimizer.d_coef": not_above_0,
    "model.adapter_learning_rate": not_above_0, "method.rank": less_than_1, "method.alpha": not_above_0,
    "method.decompose_factor": st.integers(max_value=-2) | st.just(0) | st.integers(min_value=1025),
    "train.text_encoder_learning_rate": not_above_0,
    "method.dropout": outside_0_1, "method.new_tokens": negative, "method.token_learning_rate": not_above_0,
    "method.token_train_share": st.floats(max_value=0) | st.floats(min_value=1.1),
    "dataset.prompt_dropout": outside_0_1, "dataset.validation_count": negative,
    "prior.prior_loss_weight": below_0, "prior.num_class_images": negative, "prior.sample_batch_size": less_than_1,
    "prior.num_inference_steps": no_steps, "prior.guidance_scale": below_0,
    "train.max_train_steps": less_than_1, "train.train_batch_size": less_than_1,
    "train.gradient_accumulation_steps": less_than_1, "train.learning_rate": not_above_0,
    "train.lr_warmup_steps": negative, "train.max_grad_norm": positive, "train.seed": no_seed,
    "train.validate_every": less_than_1,
    "train.ema_decay": outside_0_1, "train.snr_gamma": positive, "train.huber_delta": positive,
    "train.noise_offset": below_0, "train.multires_noise": outside_0_1,
    "flow.logit_mean": st.floats(min_value=10.1), "flow.logit_std": not_above_0, "flow.shift": positive,
    "flow.mode_scale": st.floats(min_value=1.76),
    "sample.every": less_than_1, "sample.num_inference_steps": no_steps, "sample.guidance_scale": below_0,
    "sample.seed": no_seed, "sample.images_per_prompt": less_than_1,
    "memory.ema_every": less_than_1, "memory.max_split_size_mb": st.integers(max_value=20),
    "memory.swap_blocks": less_than_1,
    "train.global_batch_size": less_than_1,
    "checkpoint.every": less_than_1, "checkpoint.keep": less_than_1,
    "evaluate.every": less_than_1, "evaluate.images_per_prompt": less_than_1, "evaluate.class_images": less_than_1,
    "evaluate.seed": no_seed, "evaluate.max_class_similarity": st.floats(min_value=1.1, max_value=9),
    "evaluate.min_prompt_fidelity": st.floats(min_value=1.1, max_value=9),
}
BASE = OmegaConf.structured(Config)


def test_every_number_has_bounds():
    """Every number in the schema is in BOUNDS, except the facts about the hardware."""
    numbers = {f"{name}.{item.name}" for name in SECTIONS if name != "hardware"
               for item in dataclasses.fields(getattr(Config(), name))
               if item.type in (int, float, int | None, float | None)}
    assert numbers == BOUNDS.keys()


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_numbers_out_of_bounds_are_each_named_in_a_sentence(data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(BOUNDS)), min_size=1, max_size=4, unique=True))
    broken = BASE.copy()
    for key in chosen:
        OmegaConf.update(broken, key, data.draw(BOUNDS[key], label=key))
    with pytest.raises(ConfigError) as caught:
        load(broken)
    lines = str(caught.value).splitlines()
    assert sorted(line.split(" must be ")[0] for line in lines) == sorted(chosen)


@pytest.mark.parametrize("key, edge", [
    ("model.resolution", 8), ("model.resolution", 2048), ("optimizer.beta1", 0.0), ("prior.num_class_images", 0),
    ("prior.prior_loss_weight", 0.0), ("train.max_grad_norm", None), ("train.snr_gamma", None),
    ("train.seed", 2**63 - 1), ("train.ema_decay", 0.0), ("sample.every", None), ("sample.num_inference_steps", 1000),
    ("checkpoint.every", None),
])
def test_values_on_the_bounds_are_allowed(key, edge):
    allowed = BASE.copy()
    OmegaConf.update(allowed, key, edge)
    assert OmegaConf.select(OmegaConf.structured(load(allowed)), key) == edge


def test_every_section_of_the_config_can_be_sealed():
    assert all(isinstance(getattr(Config(), name), Section) for name in SECTIONS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve_demo().train.stop_when.patience = 1


def test_the_best_weights_by_held_out_photos_need_no_evaluation():
    recipe = resolve_demo(dataset__validation_count=1, evaluate__select="validation_loss",
                          evaluate__objective="validation_loss", evaluate__encoder=EncoderKind.none)
    assert recipe.measure_roles == {"validation_loss": "validation_loss"}
    assert recipe.settings()["train.stop_when.patience"] == "3"


def test_held_out_photos_and_early_stopping_are_part_of_the_identity_only_if_they_change_the_result(tmp_path):
    """validate_every decides nothing unless the run stops, or chooses its weights, by validation_loss."""
    def named(*overrides: str) -> str:
        return identity(compose_config(*overrides))

    held, stop = "dataset.validation_count=1", "train.stop_when.measure=validation_loss"
    assert named("train.validate_every=7") == named() != named(held) == named(held, "train.validate_every=7")
    for chosen in (stop, "evaluate.select=validation_loss"):
        assert named(held, chosen) != named(held) != named(held, chosen, "train.validate_every=7") != named(
            held, chosen)
    assert named(held, stop, "evaluate.seed=1") == named(held, stop)
    by_pictures = "train.stop_when.measure=class_drift"
    assert named(by_pictures, "evaluate.seed=1") != named(by_pictures) != named()
    assert named("dataset=concepts") == "8e3ad5572f", "a run of an earlier version gets another folder"


def test_an_unknown_key_is_refused_even_with_a_plus():
    """Hydra's own message about a misspelt key suggests a + before it."""
    with pytest.raises(ConfigError, match=r"^there is no setting train\.learnig_rate: did you mean") as caught:
        load(compose_config("+train.learnig_rate=1", "train.seed=-1"))
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match=r"^there is no setting other: type --help"):
        load(compose_config("+other.key=1"))
    load(compose_config("+hardware.node_selector.pool=gpu"))
