"""LoRA and DoRA: what trains, what is kept, what comes out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dreambooth.config.enums import BaseWeights, Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.models import families, lora
from dreambooth.models.lora import LowRank, adapter_weights, inject, merge
from dreambooth.models.quantization import quantise
from dreambooth.models.sample_dropout import Dropout, sample_keys, set_keys_before_forward
from dreambooth.serialization.export_layout import ADAPTER
from tests.support.faults import train
from tests.support.runs import KILLED, assert_same, losses, the_run

KINDS = [MethodKind.lora, MethodKind.dora]
U = 2.0**-24
FAMILY = families.of_architecture("sd15")
TARGETS = FAMILY.adapter_targets


class Toy(nn.Module):
    """A linear layer and a convolution, named as in a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.ModuleDict({"to_q": nn.Linear(40, 24), "proj_in": nn.Conv2d(6, 10, 3, padding=1)})


def method(kind: MethodKind, **more: Any) -> Method:
    return Method(name=kind.value, kind=kind, **{"rank": 4, "alpha": 6.0, "targets": Targets.all} | more)


def taught(kind: MethodKind, **more: Any) -> tuple[Toy, Toy]:
    """The base, and the same with an adapter that is far from where it began."""
    torch.manual_seed(0)
    base, model = Toy(), Toy()
    model.load_state_dict(base.state_dict())
    inject(model, method(kind, **more), TARGETS, seed=1, dtype=Dtype.fp32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return base, model


@torch.no_grad()
def test_the_scale_over_the_base_gives_the_merged_weight_as_comfyui_and_forge_compute_it() -> None:
    base, model = taught(MethodKind.dora)
    known = adapter_weights(model)
    scales = lora.base_scales(model, known)
    assert scales.keys() == known.keys() == {"unet.to_q", "unet.proj_in"}
    for name, low in known.items():
        weight = base.get_submodule(name).weight
        rows = (scales[name] / weight.flatten(1).norm(dim=1)).view(-1, *[1] * (weight.dim() - 1))
        assert torch.allclose((weight + low.delta) * rows, low.merged(weight), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(scales[name], low.magnitude, rtol=1e-2), "the adapter changes no length"
    _, model = taught(MethodKind.lora)
    assert lora.base_scales(model, adapter_weights(model)) == {}


def gamma(k: int) -> float:
    return k * U / (1 - k * U)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_is_the_base_exactly(kind: MethodKind) -> None:
    torch.manual_seed(0)
    base, model = Toy(), Toy()
    model.load_state_dict(base.state_dict())
    inject(model, method(kind), TARGETS, seed=1, dtype=Dtype.fp32)
    x = torch.randn(3, 40)
    assert model.unet["to_q"](x).equal(base.unet["to_q"](x))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == (4 if kind is MethodKind.lora else 6)
    assert all("lora_" in name for name in names), "something of the base trains"


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_applied_within_the_bound_of_the_docstring(kind: MethodKind) -> None:
    base, model = taught(kind)
    known = adapter_weights(model)
    merge(base, known)
    with torch.no_grad():
        for name, x in (("to_q", torch.randn(50, 40)), ("proj_in", torch.randn(5, 6, 9, 9))):
            low, layer = known[f"unet.{name}"], model.unet[name].base_layer
            weight, inputs = layer.weight, layer.weight[0].numel()
            size = LowRank(low.down.abs(), low.up.abs()).delta + weight.abs()
            run = nn.functional.linear if name == "to_q" else lambda a, b: nn.functional.conv2d(a, b, padding=1)
            scale = torch.ones(len(weight))
            k = inputs + 4 + 2
            if low.magnitude is not None:
                scale, k = low.magnitude.abs() / (weight + low.delta).flatten(1).norm(dim=1), 2 * inputs + 4 + 10
            bound = 2 * gamma(k) * run(x.abs(), size) * (scale if name == "to_q" else scale.view(-1, 1, 1))
            bound = bound + 2 * U * base.unet[name].bias.abs().max()  # adding it rounds once on either side
            difference = (base.unet[name](x) - model.unet[name](x)).abs()
            assert (difference <= bound + 2 * U * difference.max()).all()
            assert difference.max() > 0, "nothing was computed twice"


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_weights_are_those_of_the_adapter(kind: MethodKind) -> None:
    _, model = taught(kind)
    other = Toy()
    inject(other, method(kind), TARGETS, seed=2, dtype=Dtype.fp32)
    known = {FAMILY.published_name(name): low for name, low in adapter_weights(model).items()}
    lora.load_adapter_weights(other, known)
    for name, low in adapter_weights(other).items():
        for ours, theirs in zip(vars(low).values(), vars(known[name]).values(), strict=True):
            assert ours is theirs or torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="rank"):
        inject(another := Toy(), method(kind, rank=2), TARGETS, seed=2, dtype=Dtype.fp32)
        lora.load_adapter_weights(another, known)


def test_absent_is_the_base_and_comes_back() -> None:
    base, model = taught(MethodKind.dora)
    x = torch.randn(3, 40)
    before = model.unet["to_q"](x)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # of a layer that is not trained
    with lora.disabled(model):
        assert model.unet["to_q"](x).equal(base.unet["to_q"](x))
    assert model.unet["to_q"](x).equal(before)
    assert sum(p.requires_grad for p in model.parameters()) == 5


def test_matrices_and_convolutions_in_half_change_no_number_under_autocast() -> None:
    torch.manual_seed(0)
    whole, half = Toy(), Toy()
    half.load_state_dict(whole.state_dict())
    half.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for name, x in (("to_q", torch.randn(3, 40)), ("proj_in", torch.randn(2, 6, 5, 5))):
            assert whole.unet[name](x).equal(half.unet[name](x))


@pytest.mark.parametrize("weights", BaseWeights)
@pytest.mark.parametrize("text", [True, False])
def test_all_of_a_frozen_base_is_in_the_compute_precision_and_the_planner_knows(
        text: bool, weights: BaseWeights) -> None:
    """Norms and embeddings too: what is loaded, what is planned and what the docs say are one thing."""
    from dreambooth.models.loading import load
    from dreambooth.planner.fake_cuda import fake_tensors
    from dreambooth.planner.skeleton_models import build_skeleton
    from tests.support.configs import small_recipe

    if weights is BaseWeights.nf4:
        pytest.importorskip("bitsandbytes")
    asked = small_recipe(method__kind=MethodKind.lora, precision__dtype=Dtype.bf16, train__train_text_encoder=text)
    asked = replace(asked, method=replace(asked.method, base_weights=weights))  # on a CPU no run may
    loaded = load(asked, torch.device("cpu"))
    with fake_tensors():
        planned = build_skeleton(asked)
    for ours, theirs in zip(loaded.modules, planned.modules, strict=True):
        found = {name: (parameter.dtype, parameter.shape) for name, parameter in ours.named_parameters()}
        assert found == {name: (parameter.dtype, parameter.shape) for name, parameter in theirs.named_parameters()}
        assert {dtype for dtype, _ in found.values()} <= {torch.bfloat16, torch.int8, torch.uint8}
    norms = [module for module in loaded.denoiser.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)]
    assert norms and all(module.weight.dtype is torch.bfloat16 for module in norms)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_an_adapter_of_every_layer_trains_beside_norms_in_half(kind: str, tmp_path: Path) -> None:
    words = [f"method={kind}", "method.targets=all", "precision=bf16", "train.max_train_steps=2", "sample.every=null",
             "prior.with_prior_preservation=false"]
    assert train(tmp_path, *words, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_base_in_half_is_fp32_and_begins_as_the_base(kind: MethodKind) -> None:
    torch.manual_seed(0)
    base, model = Toy(), Toy()
    model.load_state_dict(base.state_dict())
    model.to(torch.bfloat16)
    inject(model, method(kind), TARGETS, seed=1, dtype=Dtype.bf16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        x, picture = torch.randn(3, 40), torch.randn(2, 6, 5, 5)
        assert model.unet["to_q"](x).equal(base.unet["to_q"](x))
        assert model.unet["proj_in"](picture).equal(base.unet["proj_in"](picture))


def test_what_an_adapter_begins_with_is_a_function_of_seed_and_name() -> None:
    first, second, third = Toy(), Toy(), Toy()
    before = torch.get_rng_state()
    inject(first, method(MethodKind.lora), TARGETS, seed=1, dtype=Dtype.fp32)
    assert torch.get_rng_state().equal(before), "the process's random numbers were used"
    inject(second, method(MethodKind.lora, targets=Targets.attention), TARGETS, seed=1, dtype=Dtype.fp32)
    inject(third, method(MethodKind.lora), TARGETS, seed=2, dtype=Dtype.fp32)
    ours, alike, other = (adapter_weights(model)["unet.to_q"].down for model in (first, second, third))
    assert ours.equal(alike) and not ours.equal(other)
    assert float(ours.abs().max()) <= 40**-0.5


def test_targets_are_chosen_by_their_names() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1 = nn.ModuleDict({"to_k": nn.Linear(2, 2), "to_out": nn.ModuleList([nn.Linear(2, 2)])})
            self.ff = nn.ModuleDict({"net": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(2, 2)}), nn.Identity(),
                                                          nn.Linear(2, 2)])})
            self.conv_in, self.norm = nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)

    attention = ["attn1.to_k", "attn1.to_out.0"]
    transformer = [*attention, "ff.net.0.proj", "ff.net.2"]
    assert lora.target_layers(Part(), TARGETS[Targets.attention]) == attention
    assert lora.target_layers(Part(), TARGETS[Targets.transformer]) == transformer
    assert lora.target_layers(Part(), TARGETS[Targets.all]) == [*transformer, "conv_in"]


# -- dropout ------------------------------------------------------------------------------------------------------

class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = Dropout(0.25, 7)
        set_keys_before_forward(self, [self.dropout])

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return self.dropout(text)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    kept = Dropping()(torch.randn(8, 4, 8, 8), torch.arange(8), torch.ones(8, 5000))
    share = (kept == 0).double().mean()
    assert abs(float(share) - 0.25) < 5 * (0.25 * 0.75 / 40_000) ** 0.5
    assert kept.max() == pytest.approx(1 / 0.75)
    assert Dropping().eval()(torch.randn(2, 4), torch.arange(2), torch.ones(2, 9)).equal(torch.ones(2, 9))


def test_what_is_dropped_belongs_to_the_sample_whatever_it_is_computed_with() -> None:
    latents, timesteps, values = torch.randn(6, 4, 8, 8), torch.arange(6), torch.ones(6, 7, 9)
    whole = Dropping()(latents, timesteps, values)
    torch.manual_seed(3)
    parts = torch.cat([Dropping()(latents[i:i + 2], timesteps[i:i + 2], values[:2]) for i in (0, 2, 4)])
    assert whole.equal(parts)
    masks = whole.flatten(1)
    assert len({tuple(mask.tolist()) for mask in masks}) == 6, "two samples were dropped alike"
    again = Dropping()(latents, timesteps + 1, values)
    assert not again.equal(whole), "another timestep drops the same"


def test_two_layers_drop_differently() -> None:
    one, two = Dropout(0.5, 1), Dropout(0.5, 2)
    one.keys = two.keys = sample_keys(torch.randn(1, 4, 4), torch.zeros(1))
    a, b = one(torch.ones(1, 2000)) > 0, two(torch.ones(1, 2000)) > 0
    assert abs(float((a == b).float().mean()) - 0.5) < 0.06


# -- whole runs ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapters_run_is_small_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    words = [f"method={kind}", "method.dropout=0.1", "method.rank=4", "train.max_train_steps=4", "checkpoint.every=1",
             "sample.every=null"]
    assert train(tmp_path / "straight", *words) == 0
    straight = the_run(tmp_path / "straight")
    assert train(tmp_path / "killed", *words, fault="checkpoint_rename", seed=3) == KILLED
    assert train(tmp_path / "killed", *words) == 0
    assert_same(the_run(tmp_path / "killed"), straight)
    ours, theirs = (load_file(run / f"model/{ADAPTER}")
                    for run in (straight, the_run(tmp_path / "killed")))
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    trained = load_file(straight / "checkpoints/step-000004/trained.safetensors")
    assert all("lora_" in name for name in trained), "the base is in the checkpoint"
    assert {name.split(".")[0] for name in trained} == {"unet", "text_encoder"}
    size = sum(path.stat().st_size for path in (straight / "checkpoints/step-000004").iterdir())
    assert size < 5_000_000  # fp32 of the base alone: 24 MB; of 4 copies that a full checkpoint holds: 96 MB
    average = load_file(straight / "checkpoints/step-000004/ema.safetensors")
    name = next(name for name in average if "lora_A" in name)
    assert ours[name.replace(".default", "").replace("text_encoder.", "text_encoder.text_model.")].equal(average[name])


LEVERLESS = ["method=lora", "method.dropout=0.1", "train.max_train_steps=2", "sample.every=null", "memory=fast"]


@pytest.fixture(scope="module")
def without_levers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("without_levers")
    assert train(root, *LEVERLESS) == 0
    return the_run(root)


@pytest.mark.slow
@pytest.mark.parametrize("lever", ["memory.gradient_checkpointing=true", "memory.optimizer_in_backward=true",
                                   "memory.ema_device=cpu"])
def test_levers_change_no_number_of_an_adapters_run(lever: str, without_levers: Path, tmp_path: Path) -> None:
    assert train(tmp_path, *LEVERLESS, lever) == 0
    plain, levered = without_levers, the_run(tmp_path)
    assert losses(plain) == losses(levered)
    ours, theirs = (load_file(run / "checkpoints/step-000002/trained.safetensors") for run in (plain, levered))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_merge_is_of_the_export_alone(tmp_path: Path) -> None:
    from dreambooth.utils.assets import resolve_asset

    words = ["method=lora", "train.max_train_steps=2", "sample.every=null", "prior.with_prior_preservation=false"]
    assert train(tmp_path, *words) == 0
    run = the_run(tmp_path)
    assert not (run / "model/model_index.json").exists()
    trained = losses(run)
    assert train(tmp_path, *words, "method.merge=true") == 0
    assert the_run(tmp_path) == run and losses(run) == trained, "it was trained again"
    known = {FAMILY.published_name(name): low for name, low in _lora(run).items()}
    base = load_file(next(Path(resolve_asset("package:tiny-sd"), "unet").glob("*.safetensors")))
    merged = load_file(next((run / "model/unet").glob("*.safetensors")))
    for name, weight in base.items():
        low = known.get(f"unet.{name.removesuffix('.weight')}")
        wanted = weight.float() if low is None or name.endswith("bias") else low.merged(weight.float())
        assert merged[name].equal(wanted), name
    result = json.loads((run / "result.json").read_text())
    assert result["step"] == 2


@pytest.mark.slow
def test_an_adapters_run_is_promoted_and_opened_from_the_registry(empty_db: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    from dreambooth.sweeps.promotion import PromotionOptions, promote
    from dreambooth.utils.assets import resolve_asset

    shutil.copy(empty_db, tmp_path / "mlflow.db")
    words = ["method=lora", "train.max_train_steps=2", "sample.every=null", "prior.with_prior_preservation=false"]
    assert train(tmp_path, *words, "tracking.sweep=s") == 0
    told = promote("s", tmp_path, PromotionOptions(allow_unmeasured=True))
    server = f"sqlite:///{tmp_path}/mlflow.db"
    pipeline = StableDiffusionPipeline.from_pretrained(resolve_asset("package:tiny-sd"))
    version = MlflowClient(server).get_model_version_by_alias(told["name"], "champion")
    assert (version.tags["holds"], version.tags["base"]) == ("adapter", "package:tiny-sd")
    pipeline.load_lora_weights(download_artifacts(version.source, tracking_uri=server, registry_uri=server))
    assert pipeline.get_active_adapters()


def _lora(run: Path) -> dict[str, LowRank]:
    from dreambooth.serialization import lora_files

    return lora_files.read(run / f"model/{ADAPTER}")


def test_a_quantised_base_is_refused_on_a_cpu(tmp_path: Path) -> None:
    assert train(tmp_path, "method=lora", "method.base_weights=nf4", log=tmp_path / "log") == 1
    assert "method.base_weights=nf4 needs a CUDA GPU: type method.base_weights=half" in (tmp_path / "log").read_text()
    assert BaseWeights.nf4.value == "nf4"


# -- a base in 4 bits ---------------------------------------------------------------------------------------------

def test_a_base_in_four_bits_trains_its_adapter_and_stays_as_it_is() -> None:
    """On a CPU, which bitsandbytes can do and a run is not allowed to: the path is the one that a card takes."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    model = nn.Module()
    model.unet = nn.ModuleDict({"to_q": nn.Linear(128, 64), "to_v": nn.Linear(64, 32)})
    exact = [parameter.detach().clone() for parameter in model.parameters()]
    quantise(model.unet.to(torch.bfloat16), torch.bfloat16)
    model.unet.to("cpu")
    assert isinstance(model.unet["to_q"], Linear4bit)
    assert model.unet["to_q"].weight.numel() == 128 * 64 // 2, "two weights a byte"
    inject(model, method(MethodKind.lora, targets=Targets.attention), TARGETS, seed=1, dtype=Dtype.bf16)
    codes = model.unet["to_q"].base_layer.weight.data.clone()
    x = torch.randn(5, 128)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all(parameter.dtype is torch.float32 for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            found = model.unet["to_v"](model.unet["to_q"](x))
            loss = (found.float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert model.unet["to_q"].base_layer.weight.data.equal(codes), "the base was trained"
    wanted = nn.functional.linear(x, exact[0], exact[1])
    with lora.disabled(model), torch.autocast("cpu", torch.bfloat16):
        error = (model.unet["to_q"](x).float() - wanted).norm() / wanted.norm()
    assert 0 < error < 0.15
