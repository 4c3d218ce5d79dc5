"""New tokens in place of the rare word: what trains, what stays, and how prompts are read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dreambooth.config.enums import MethodKind
from dreambooth.config.method import Method
from dreambooth.config.recipe import Recipe
from dreambooth.data.batches import Batch
from dreambooth.errors import UserError
from dreambooth.models import families, loading
from dreambooth.models.components import Components
from dreambooth.models.new_tokens import prompts, training
from dreambooth.models.new_tokens.attach import attach
from dreambooth.optim.ema import Ema
from dreambooth.optim.memory_levers import build_training_optimizer
from dreambooth.optim.optimizers import build_lr_scheduler, optimizer_factory
from dreambooth.planner.rehearsal import predict, rehearse
from dreambooth.planner.skeleton_models import count_trained_weights
from dreambooth.runtime.engine import Engine
from dreambooth.training.parameter_groups import parameter_groups
from dreambooth.training.step import Objective, TrainState, train_step
from tests.support.configs import small_recipe
from tests.support.faults import call, train
from tests.support.runs import assert_same, the_run
from tests.support.tiny_models import FLOW_FAMILIES, HIDDEN, SECOND

CPU = torch.device("cpu")
FEWER = ["sd15", pytest.param("sd21", marks=pytest.mark.slow), "sdxl"]
LORA = Method(name="lora", kind=MethodKind.lora, rank=2, new_tokens=2)


def recipe_of(family: str, folder: Path, method: Method = LORA, **values: Any) -> Recipe:
    values = {"train__train_text_encoder": False, "train__max_train_steps": 4, "train__learning_rate": 1e-2,
              "optimizer__weight_decay": 0.1} | values
    recipe = small_recipe(model__source=str(folder), model__name=family, model__resolution=16, **values)
    return replace(recipe, method=method)


def opened(recipe: Recipe) -> Components:
    parts = loading.load(recipe, CPU)
    attach(parts, recipe)
    return parts


def begin(parts: Components, recipe: Recipe) -> TrainState:
    """The training state as training/setup.py builds it."""
    model = loading.prepare(parts, recipe)
    optimizer = build_training_optimizer(
        model, optimizer_factory(recipe.optimizer, recipe.train.learning_rate), recipe.memory, torch.float32, 0,
        parameter_groups(model, recipe))
    scheduler = build_lr_scheduler(optimizer, recipe.train)
    assert parts.new_tokens is not None
    parts.new_tokens.stop_in(scheduler)
    return TrainState(model, optimizer, scheduler, Ema(model, 0.9), after_step=parts.new_tokens.after_step)


def step(state: TrainState, parts: Components, recipe: Recipe) -> None:
    generator = torch.Generator().manual_seed(state.step)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    text = torch.cat([parts.tokens(prompt) for prompt in ("a zwx toy", "a toy")])
    train_step(state, [Batch(latents, noise, torch.tensor([100, 900]), text, 1)],
               Objective(parts.noise_schedule(recipe)), Engine(), 1.0).check()


def copies(*modules: Any) -> list[dict[str, Tensor]]:
    return [{name: weight.detach().clone() for name, weight in module.named_parameters()} for module in modules]


@pytest.mark.parametrize("family", FEWER)
def test_only_the_new_rows_and_the_adapter_train(family: str, bases: dict[str, Path]) -> None:
    recipe = recipe_of(family, bases[family])
    parts = opened(recipe)
    state = begin(parts, recipe)
    before = copies(*parts.encoders, parts.denoiser)
    for _ in range(2):
        step(state, parts, recipe)
    moved = {name for old, new in zip(before, copies(*parts.encoders, parts.denoiser), strict=True)
             for name in old if not old[name].equal(new[name])}
    assert {name for name in moved if "lora" not in name} == {
        name for encoder in before[:-1] for name in encoder if name.endswith("new_rows")}
    assert any("lora_B" in name for name in moved)
    assert parts.new_tokens is not None and state.ema is not None
    widths = [HIDDEN[family], SECOND][:len(parts.encoders)]
    assert [tuple(rows.shape) for rows in parts.new_tokens.rows.values()] == [(2, width) for width in widths]
    names = {f"{name}_new_tokens" for name in parts.encoders_by_name}
    assert names == {name for name in state.weights(state.model) if "lora" not in name}
    assert names < state.ema.average.keys()


def test_a_trained_text_encoder_gets_adapters_and_its_table_stays(bases: dict[str, Path]) -> None:
    recipe = recipe_of("sdxl", bases["sdxl"], train__train_text_encoder=True)
    parts = opened(recipe)
    state = begin(parts, recipe)
    before = copies(*parts.encoders)
    step(state, parts, recipe), step(state, parts, recipe)
    for old, new in zip(before, copies(*parts.encoders), strict=True):
        moved = {name for name in old if not old[name].equal(new[name])}
        assert any("lora_B" in name for name in moved)
        assert all("lora" in name or name.endswith("new_rows") for name in moved)
    assert len(state.weights(state.model)) == len({id(weight) for weight in state.weights(state.model).values()})


@pytest.mark.parametrize("family", FEWER)
def test_prompts_without_the_word_are_encoded_as_by_the_base(family: str, bases: dict[str, Path]) -> None:
    recipe = recipe_of(family, bases[family])
    base, parts = loading.load(recipe, CPU), opened(recipe)
    for prompt in ("a toy", "", "a zwxy toy"):
        assert parts.tokens(prompt).equal(base.tokens(prompt))
        assert parts.frozen_text(prompt).equal(base.frozen_text(prompt))
    assert not parts.frozen_text("a zwx toy").equal(base.frozen_text("a zwx toy"))
    alone, beside = parts.tokens("a toy"), torch.cat([parts.tokens("a zwx toy"), parts.tokens("a toy")])
    assert torch.allclose(parts.text(beside)[1:], parts.text(alone), atol=1e-6)


def test_sdxls_pooled_state_is_that_of_the_end_and_not_of_a_new_token(bases: dict[str, Path]) -> None:
    """Published configurations say 2 for the end, for which transformers takes the highest id of the prompt."""
    recipe = recipe_of("sdxl", bases["sdxl"])
    parts = loading.load(recipe, CPU)
    parts.encoders[1].text_model.eos_token_id = 2
    base = parts.frozen_text("a toy")
    attach(parts, recipe)
    assert parts.frozen_text("a toy").equal(base)
    ids = parts.tokens("a zwx toy")
    end = ids[0, 1].tolist().index(1802)
    with torch.no_grad():
        states = parts.encoders[1].text_model(ids[:, 1]).last_hidden_state
        pooled = parts.encoders[1].text_projection(states[:, end])
    assert parts.frozen_text("a zwx toy")[0, -1, :SECOND].allclose(pooled[0], atol=1e-6)


def test_the_word_is_read_as_its_tokens_whatever_its_case(bases: dict[str, Path]) -> None:
    plain = loading.load(recipe_of("sd15", bases["sd15"]), CPU).tokenizers[0]
    tokenizer = prompts.extended(plain, {"zwx": 3, "ohwx": 1})
    assert prompts.new_words(tokenizer) == {"zwx": 3, "ohwx": 1} and prompts.new_words(plain) == {}
    for prompt, expected in (("A ZWX toy", "A zwx zwx_1 zwx_2 toy"), ("zwx's", "zwx zwx_1 zwx_2's"),
                             ("zwxy toy, ohwx", "zwxy toy, ohwx"), ("a toy", "a toy")):
        assert prompts.expand(tokenizer, prompt) == expected and prompts.expand(plain, prompt) == prompt
    assert tokenizer("zwx zwx_1 zwx_2", add_special_tokens=False).input_ids == [1803, 1804, 1805]
    assert tokenizer("zwxy").input_ids == plain("zwxy").input_ids
    with pytest.raises(UserError, match="write another rare word in place of ohwx"):
        prompts.extended(tokenizer, {"ohwx": 1})


def test_initial_rows_have_the_size_of_the_table_or_are_known_ones(bases: dict[str, Path]) -> None:
    recipe = recipe_of("sd15", bases["sd15"], replace_method(new_tokens=16))
    first, again = (opened(recipe).new_tokens for _ in range(2))
    other = opened(replace(recipe, train=recipe.train.copy_with(seed=1))).new_tokens
    assert first and again and other
    for name, rows in first.rows.items():
        assert rows.equal(again.rows[name]) and not rows.equal(other.rows[name])
        assert abs(float(rows.detach().std() / first.stds[name]) - 1) < 0.1
    recipe = recipe_of("sd15", bases["sd15"], replace_method(new_tokens=3, token_initializer="red toy"))
    parts = opened(recipe)
    known = parts.tokenizers[0]("red toy", add_special_tokens=False).input_ids
    for encoder, rows in zip(parts.encoders, parts.new_tokens.rows.values(), strict=True):  # type: ignore[union-attr]
        assert rows.equal(encoder.get_input_embeddings().weight[[known[0], known[1], known[0]]])


@pytest.mark.parametrize("family", FLOW_FAMILIES)
def test_families_whose_text_encoder_leaves_are_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"leaves the memory before training begins.*: type method\.new_tokens=0"):
        families.of_architecture(family).check_training(replace(small_recipe(), method=LORA))


def replace_method(**values: Any) -> Method:
    return LORA.copy_with(**values)


def test_rows_are_drawn_to_the_size_of_the_table_and_stop_with_their_share(bases: dict[str, Path]) -> None:
    recipe = recipe_of("sd15", bases["sd15"], replace_method(token_train_share=0.3, token_learning_rate=0.5))
    parts = opened(recipe)
    state, tokens = begin(parts, recipe), parts.new_tokens
    assert tokens is not None and tokens.last_step == 2
    assert [group["lr"] for group in state.optimizer.param_groups] == [1e-2, 0.5]
    seen = []
    for _ in range(4):
        step(state, parts, recipe)
        seen.append(tokens.rows["text_encoder"].detach().clone())
    assert not seen[0].equal(seen[1]) and seen[1].equal(seen[2]) and seen[2].equal(seen[3])
    before = torch.full((2, 3), 1.0) * torch.tensor([[3.0], [-3.0]])
    shrunk = training.NewTokens({"zwx": 2}, {"one": torch.nn.Parameter(before.clone())}, {"one": torch.tensor(0.1)},
                                [], 1)
    shrunk.after_step(1)
    assert shrunk.rows["one"].allclose(before * (0.1 / before.std()) ** 0.1)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_every_command_reads_the_word(bases: dict[str, Path], tmp_path: Path) -> None:
    """Samples and evaluations are the pictures of generate; those of step 0 are the base model's, with its tokens."""
    ask = ["model=sdxl", f"model.source={bases['sdxl']}", "model.offline=true", "model.resolution=16", "name=demo-x",
           "dataset.allow_drawings=true", "train.max_train_steps=4", "train.train_text_encoder=false", "method=lora",
           "method.new_tokens=2", "method.token_learning_rate=0.5", "sample.prompts=[a zwx toy]",
           "sample.num_inference_steps=4", "prior.with_prior_preservation=false", "method.token_train_share=0.75"]
    few = ["images_per_prompt=1", "class_images=1", "encoder=efficientnet_lite0"]
    assert train(tmp_path / "straight", *ask, *(f"evaluate.{one}" for one in few), "evaluate.seed=0") == 0
    assert train(tmp_path / "killed", *ask, fault="checkpoint_rename") == -9
    assert train(tmp_path / "killed", *ask) == 0
    run = the_run(tmp_path / "straight")
    assert_same(the_run(tmp_path / "killed"), run)
    saved, average = (load_file(run / f"checkpoints/step-000004/{name}.safetensors") for name in ("trained", "ema"))
    words = load_file(run / "model/embeddings/zwx.safetensors")
    for key, name in (("clip_l", "text_encoder_new_tokens"), ("clip_g", "text_encoder_2_new_tokens")):
        assert words[key].equal(average[name]) and not words[key].equal(saved[name])
    assert call("evaluate", [f"run={run}", *few, "seed=1"]) == 0
    drawn = {}
    for name, source in (("run", f"run={run}"), ("base", f"base={bases['sdxl']}")):
        assert call("generate", [source, "prompt=a photo of a zwx toy", "num_images=2", f"out={tmp_path / name}",
                                 "num_inference_steps=4", "size=16x16"]) == 0
        drawn[name] = [read(tmp_path / name / f"a-photo-of-a-zwx-toy-seed{seed}.png") for seed in (0, 1)]
    evaluated = {json.loads((folder / "made_with.json").read_text())["seed"]: [
        read(folder / f"step-{step:06d}/prompt-0-0.png") for step in (0, 4)] for folder in run.glob("evaluation/*")}
    for seed, pictures in evaluated.items():
        for picture, name in zip(pictures, ("base", "run"), strict=True):
            assert np.abs(picture - drawn[name][seed]).max() <= 2, f"{name}, seed {seed}"
    assert sorted(evaluated) == [0, 1] and np.abs(drawn["base"][0] - drawn["run"][0]).max() > 10
    assert call("generate", [f"run={run}", "prompt=a ZWX toy", "num_images=1", "num_inference_steps=4"]) == 0
    assert np.abs(read(run / "generated/a-zwx-toy-seed0.png")
                  - read(run / "samples/step-000004/prompt-0-0.png")).max() <= 2


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl"])
def test_the_planner_records_the_very_step_with_new_tokens(family: str, bases: dict[str, Path]) -> None:
    recipe = recipe_of(family, bases[family], memory__gradient_checkpointing=True)
    fake, real = predict(recipe), rehearse(recipe)
    assert fake.trace.events == real.trace.events and fake.trace.category == real.trace.category
    state = begin(parts := opened(recipe), recipe)
    trained = sum(weight.numel() for weight in state.weights(state.model).values())
    assert fake.trained_parameters == trained == count_trained_weights(recipe)
    without = predict(replace(recipe, method=replace_method(new_tokens=0)))
    assert fake.step_flops > without.step_flops, "the text encoder costs nothing"
    assert trained - without.trained_parameters == sum(rows.numel() for rows in parts.new_tokens.rows.values())
