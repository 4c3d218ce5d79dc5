"""What the planner says of adapters: the same step on fake tensors, few trained weights, a frozen base in half."""

import re
from dataclasses import replace

import pytest

from dreambooth.config.enums import BaseWeights, Dtype, MethodKind, Targets
from dreambooth.planner import auto_memory, report
from dreambooth.planner.gpu_specs import cuda_overhead_gib
from dreambooth.planner.memory_options import list_memory_options
from dreambooth.planner.prediction import STEP_PHASES
from dreambooth.planner.rehearsal import predict, rehearse
from dreambooth.planner.skeleton_models import trained_weights
from dreambooth.utils.hardware import GIB
from tests.support.configs import demo_recipe, small_recipe

LORA: dict[str, object] = {"method__kind": MethodKind.lora, "method__name": "lora"}
DORA: dict[str, object] = {"method__kind": MethodKind.dora, "method__name": "dora", "method__targets": Targets.all}


@pytest.mark.parametrize("changed", [LORA, DORA | {"memory__gradient_checkpointing": True},
                                     LORA | {"method__dropout": 0.1, "train__train_text_encoder": True}])
def test_fake_and_real_tensors_give_the_same_trace_byte_for_byte(changed: dict[str, object]) -> None:
    fake, real = predict(small_recipe(**changed)).trace, rehearse(small_recipe(**changed)).trace
    assert fake.events == real.events
    assert fake.category == real.category


def test_only_the_adapter_has_gradients_state_and_average() -> None:
    whole, found = predict(small_recipe()), predict(small_recipe(**LORA))
    assert found.trained_parameters < 0.1 * whole.trained_parameters
    assert found.trained_parameters == trained_weights(small_recipe(**LORA))
    category = {kind: max(u.by_category.get(kind, 0) for u in found.by_phase.values())
                for kind in ("gradients", "optimizer", "ema")}
    assert category["gradients"] == category["ema"] == 4 * found.trained_parameters
    assert category["optimizer"] < 9 * found.trained_parameters


def test_a_frozen_base_is_in_half_precision() -> None:
    fp32, bf16 = (predict(small_recipe(**LORA, precision__dtype=dtype)) for dtype in (Dtype.fp32, Dtype.bf16))
    weights = [found.by_phase["step"].by_category["weights"] for found in (fp32, bf16)]
    assert weights[1] < 0.55 * weights[0]


def test_sd15_with_an_adapter_is_small_on_a_t4_and_auto_adds_nothing() -> None:
    """Predicted, not measured: 9.4 GiB; with checkpointing 7.4, all of it but 4 for drawing four pictures at a time."""
    asked = demo_recipe("sd15", **LORA, train__train_text_encoder=True, memory__auto=True)
    assert asked.method.rank == 16
    choice = auto_memory.choose_memory_options(asked)
    assert choice.added == ()
    assert trained_weights(asked) == 9_437_184  # of 983 million
    assert auto_memory.card_gib(choice.recipe, choice.prediction) < 9.5
    lower = replace(asked, memory=replace(asked.memory, gradient_checkpointing=True))
    assert predict(lower).peak_over(*STEP_PHASES).reserved / GIB + cuda_overhead_gib("T4") < 4
    assert all(way.exact for way in list_memory_options(choice.recipe, choice.prediction))


def test_a_full_run_that_does_not_fit_is_told_of_adapters() -> None:
    asked = demo_recipe("sd15", prior__num_class_images=1, sample__every=None)
    found = {way.what: way for way in list_memory_options(asked, predict(asked))}
    assert found["method=lora"].saves > 12 and found["method=lora"].seconds < 0  # type: ignore[operator]


def test_four_bits_are_a_quarter_of_sixteen_for_linear_layers() -> None:
    pytest.importorskip("bitsandbytes")
    half, nf4 = (predict(demo_recipe("sd15", **LORA, method__base_weights=weights, prior__num_class_images=1,
                                sample__every=None)).by_phase["step"].by_category["weights"]
                 for weights in (BaseWeights.half, BaseWeights.nf4))
    linear = 2 * 2.6e8  # at least, bytes in half precision of the UNet's linear layers
    assert nf4 < half - 0.7 * linear


def test_host_memory_that_is_too_small_is_said_and_not_the_card() -> None:
    asked = demo_recipe("sd15", method__kind=MethodKind.lora, hardware__host_ram_gib=1)
    planned = report.Plan(asked, predict(asked), (), "")
    expected = r"this run needs [\d.]+ GiB of host memory and the machine has 1: type hardware\.instance_type"
    assert re.match(expected, planned.shortfall)
