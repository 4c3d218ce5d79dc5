"""The planner's predictions for adapters: few trained weights and a frozen base in half precision."""

import re
from dataclasses import replace

import pytest

from dreambooth.config.enums import BaseWeights, Dtype, EmaDevice, MethodKind, PriorKind, Targets
from dreambooth.errors import DoesNotFit
from dreambooth.planner import auto_memory, report
from dreambooth.planner.auto_memory import Choice
from dreambooth.planner.gpu_specs import cuda_overhead_gib
from dreambooth.planner.memory_options import list_memory_options
from dreambooth.planner.prediction import STEP_PHASES
from dreambooth.planner.rehearsal import predict, rehearse
from dreambooth.planner.skeleton_models import count_trained_weights
from dreambooth.planner.time_and_cost import PROCESS_GIB, host_gib
from dreambooth.utils.hardware import GIB
from tests.support.configs import demo_recipe, small_recipe

LORA: dict[str, object] = {"method__kind": MethodKind.lora, "method__name": "lora"}
DORA: dict[str, object] = {"method__kind": MethodKind.dora, "method__name": "dora", "method__targets": Targets.all}
LOKR: dict[str, object] = {"method__kind": MethodKind.lokr, "method__targets": Targets.all}
LOHA: dict[str, object] = {"method__kind": MethodKind.loha, "method__rank": 4, "memory__gradient_checkpointing": True}


@pytest.mark.slow
@pytest.mark.parametrize("changed", [LORA, pytest.param(DORA | {"memory__gradient_checkpointing": True},
                                                         marks=pytest.mark.slow),
                                     LORA | {"method__dropout": 0.1, "train__train_text_encoder": True},
                                     LORA | {"prior__kind": PriorKind.output, "train__train_text_encoder": True},
                                     LOKR | {"method__rank_pattern": {"to_k": 2}}, LOHA])
def test_fake_and_real_tensors_give_the_same_trace_byte_for_byte(changed: dict[str, object]) -> None:
    fake, real = predict(small_recipe(**changed)).trace, rehearse(small_recipe(**changed)).trace
    assert fake.events == real.events
    assert fake.category == real.category


def test_only_the_adapter_has_gradients_state_and_ema() -> None:
    full, adapter = predict(small_recipe()), predict(small_recipe(**LORA))
    assert adapter.trained_parameters < 0.1 * full.trained_parameters
    assert adapter.trained_parameters == count_trained_weights(small_recipe(**LORA))
    peaks = {kind: max(usage.by_category.get(kind, 0) for usage in adapter.by_phase.values())
             for kind in ("gradients", "optimizer", "ema")}
    assert peaks["gradients"] == peaks["ema"] == 4 * adapter.trained_parameters
    assert peaks["optimizer"] < 9 * adapter.trained_parameters


def test_output_preservation_is_planned_as_one_more_forward_pass_and_no_class_images() -> None:
    """Without recomputation a forward and backward pass of frozen layers is about two forward passes per row.

    With a batch of one, every second step has a class row: 2 + 2 + 1 passes, and then 2, in place of 4 and 4.
    """
    images, output = (predict(small_recipe(**LORA, prior__kind=kind)) for kind in PriorKind)
    assert "class_images" in images.by_phase and "class_images" not in output.by_phase
    assert 0.83 < output.step_flops / images.step_flops < 0.93
    step = [prediction.peak_over(*STEP_PHASES).allocated for prediction in (images, output)]
    assert step[1] < 1.05 * step[0], "the pass without gradients keeps no activations"


@pytest.mark.slow
def test_a_frozen_base_is_in_half_precision() -> None:
    fp32, bf16 = (predict(small_recipe(**LORA, precision__dtype=dtype)) for dtype in (Dtype.fp32, Dtype.bf16))
    weights = [prediction.by_phase["step"].by_category["weights"] for prediction in (fp32, bf16)]
    assert weights[1] < 0.55 * weights[0]


@pytest.mark.slow
def test_sd15_with_an_adapter_fits_a_t4_and_auto_adds_nothing() -> None:
    """Predicted, not measured: 9.4 GiB. With checkpointing 7.4, of which all but 4 are for sampling four images."""
    recipe = demo_recipe("sd15", **LORA, train__train_text_encoder=True, memory__auto=True)
    assert recipe.method.rank == 16
    choice = auto_memory.choose_memory_options(recipe)
    assert choice.added == ()
    assert count_trained_weights(recipe) == 9_437_184  # of 983 million
    assert auto_memory.card_gib(choice.recipe, choice.prediction) < 9.5
    checkpointed = replace(recipe, memory=replace(recipe.memory, gradient_checkpointing=True))
    assert predict(checkpointed).peak_over(*STEP_PHASES).reserved / GIB + cuda_overhead_gib("T4") < 4
    assert all(option.exact for option in list_memory_options(choice.recipe, choice.prediction))


@pytest.mark.slow
def test_the_options_of_a_full_run_that_does_not_fit_include_an_adapter() -> None:
    recipe = demo_recipe("sd15", prior__num_class_images=1, sample__every=None)
    options = {option.overrides: option for option in list_memory_options(recipe, predict(recipe))}
    lora = options["method=lora"]
    assert lora.saved_gib > 12 and lora.extra_seconds is not None and lora.extra_seconds < 0


@pytest.mark.slow
def test_four_bits_are_a_quarter_of_sixteen_for_linear_layers() -> None:
    pytest.importorskip("bitsandbytes")
    half, nf4 = (predict(demo_recipe("sd15", **LORA, method__base_weights=weights, prior__num_class_images=1,
                                     sample__every=None)).by_phase["step"].by_category["weights"]
                 for weights in (BaseWeights.half, BaseWeights.nf4))
    linear = 2 * 2.6e8  # a lower bound of the bytes of the UNet's linear layers in half precision
    assert nf4 < half - 0.7 * linear


@pytest.mark.slow
def test_too_little_host_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = demo_recipe("sd15", method__kind=MethodKind.lora, hardware__host_ram_gib=1)
    plan = report.Plan(recipe, predict(recipe), (), "")
    expected = r"this run needs [\d.]+ GiB of host memory and the machine has 1: type hardware\.instance_type"
    assert re.match(expected, plan.shortfall)
    choice = Choice(recipe, plan.prediction, (), "")
    monkeypatch.setattr(auto_memory, "choose_memory_options", lambda recipe, processes: choice)
    with pytest.raises(DoesNotFit, match=expected):  # a run is refused as its plan is
        auto_memory.apply_auto_memory(demo_recipe("sd15", memory__auto=True, hardware__host_ram_gib=1))


@pytest.mark.slow
def test_each_process_needs_host_memory_of_its_own() -> None:
    one, four = (demo_recipe("sd15", memory__ema_device=EmaDevice.cpu, hardware__gpus=gpus) for gpus in (1, 4))
    prediction = predict(one)
    assert prediction.host_bytes > 3 * GIB  # the EMA
    assert host_gib(four, prediction) == pytest.approx(4 * host_gib(one, prediction))
    encoders = replace(prediction, encoder_bytes=200 * GIB)  # one process encodes the prompts
    assert host_gib(four, encoders) - host_gib(one, encoders) == pytest.approx(3 * PROCESS_GIB)
