"""The numerical core on toy models: objective, sampling of data, accumulation, EMA, loss scaling, fake tensors."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dreambooth.data.batches import Batch
from dreambooth.data.noise import draw_noise
from dreambooth.errors import Diverged
from dreambooth.models.noise_schedule import DiffusionSchedule
from dreambooth.optim.ema import Ema
from dreambooth.runtime.engine import Engine
from dreambooth.training.instance_loss import instance_loss, measured_photos
from dreambooth.training.loop import fit
from dreambooth.training.loss import dreambooth_loss, pseudo_huber, scheduled_deltas
from dreambooth.training.step import Objective, TrainState, train_step
from dreambooth.utils import rng
from dreambooth.utils.console import Console
from tests.support.configs import resolve_demo
from tests.support.toy_model import ToyModel, make_batches, make_photo_set, make_schedule, make_state, train_steps

KINDS = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_target_are_those_of_diffusers(kind: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    x, noise, t = torch.randn(9, 1, 2, 2).double(), torch.randn(9, 1, 2, 2).double(), torch.arange(0, 999, 111)
    schedule = make_schedule(kind)
    assert torch.allclose(schedule.add_noise(x, noise, t), theirs.add_noise(x, noise, t), atol=1e-12)
    expected = {"epsilon": noise, "sample": x, "v_prediction": theirs.get_velocity(x, noise, t)}[kind]
    assert torch.allclose(schedule.target(x, noise, t), expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_min_snr_by_prediction_type(kind: str, zero_snr: bool) -> None:
    schedule = make_schedule(kind, zero_snr)
    times = torch.tensor([1, 100, 500, 999])
    for weight, t in zip(schedule.min_snr_weights(times, 5.0).tolist(), times.tolist(), strict=True):
        a = float(schedule.alphas_cumprod[t])
        snr = a / (1 - a)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[kind]
        assert weight == pytest.approx(min(snr, 5.0) / divisor if divisor else 1.0, rel=1e-12)


def test_loss_is_instance_mean_plus_lambda_times_prior_mean_and_both_halves_are_weighted() -> None:
    p, g, w = torch.randn(6, 1, 4, 4).double(), torch.randn(6, 1, 4, 4).double(), torch.rand(6).double()
    rows = [float(((p[i] - g[i]) ** 2).mean() * w[i]) for i in range(6)]
    losses = dreambooth_loss(p, g, 3, 0.7, w)
    assert float(losses.instance) == pytest.approx(sum(rows[:3]) / 3, rel=1e-12)
    assert float(losses.prior) == pytest.approx(sum(rows[3:]) / 3, rel=1e-12)  # type: ignore[arg-type]
    assert float(losses.total) == pytest.approx(sum(rows[:3]) / 3 + 0.7 * sum(rows[3:]) / 3, rel=1e-12)


def test_objective_weights_the_class_half_by_its_own_timesteps() -> None:
    batch = make_batches(batch=3)(0)[0]
    model = ToyModel()
    make_state(model)
    with torch.no_grad():
        plain, weighted = (Objective(make_schedule(), 1.0, gamma)(model, batch) for gamma in (None, 0.05))
        noisy = make_schedule().add_noise(batch.latents, batch.noise, batch.timesteps)
        errors = (model(noisy, batch.timesteps, batch.text) - batch.noise).square().flatten(1).mean(1)
    assert weighted.prior is not None and plain.prior is not None
    weights = make_schedule().min_snr_weights(batch.timesteps, 0.05)
    assert float(weighted.prior) == pytest.approx(float((errors * weights)[3:].mean()), rel=1e-12)
    assert float(weighted.prior) != pytest.approx(float(plain.prior), rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50))
def test_samples_do_not_depend_on_how_a_step_is_divided(batch: int, accumulation: int, world: int, step: int) -> None:
    whole = make_batches(batch=batch * accumulation * world)(step)[0]
    parts = [micro for rank in range(world) for micro in make_batches(batch, accumulation, world, rank)(step)]
    for field in ("latents", "noise", "timesteps", "text"):
        for half in (slice(None, batch), slice(batch, None)):
            divided = torch.cat([getattr(part, field)[half] for part in parts])
            divided = divided.flatten(1) if divided.dim() > 1 else divided.unsqueeze(1)
            full = getattr(whole, field)
            expected = full[:len(full) // 2] if half.start is None else full[len(full) // 2:]
            expected = expected.flatten(1) if expected.dim() > 1 else expected.unsqueeze(1)
            assert sorted(map(tuple, divided.tolist())) == sorted(map(tuple, expected.tolist()))


def test_each_round_uses_every_photo_once_in_a_new_order() -> None:
    photo_set = make_photo_set()
    rounds = [[photo_set.view(0, step, 0, 1).photo for step in range(r * 5, r * 5 + 5)] for r in range(4)]
    assert all(sorted(photos) == list(range(5)) for photos in rounds)
    assert len({tuple(photos) for photos in rounds}) > 1


def test_a_round_of_photos_may_end_in_the_middle_of_a_step() -> None:
    """5 photos and 8 micro-batches: the next round starts within the same step."""
    batches = make_batches(batch=1, accumulation=8, photo_sets=[make_photo_set(count=5)])
    drawn = [micro.text for step in range(5) for micro in batches(step)]
    assert len(drawn) == 40
    rounds = torch.cat(drawn).view(8, 5)
    assert all(sorted(photos) == list(range(5)) for photos in rounds.tolist())


def test_crop_and_flip_differ_between_steps() -> None:
    photo_set = make_photo_set(count=1, center_crop=False, flip=True)
    views = [photo_set.view(0, step, 0, 1) for step in range(20)]
    assert len({view.crop for view in views}) == 20
    assert {view.flip for view in views} == {True, False}


def test_cached_latents_equal_uncached_ones_and_differ_in_each_draw() -> None:
    flipped = [make_photo_set(flip=True)]
    cached, plain = make_batches(cache=True, photo_sets=flipped), make_batches(photo_sets=flipped)
    for step in range(6):
        assert cached(step)[0].latents.equal(plain(step)[0].latents)
    single = [make_photo_set(count=1)]
    draws = torch.stack([make_batches(batch=1, cache=True, photo_sets=single)(s)[0].latents for s in range(200)])
    assert float(draws.std(0).mean()) == pytest.approx(0.25 * 0.5, rel=0.05)


def test_latents_are_scaled_by_the_models_factor() -> None:
    a, b = (make_batches(scale=scale)(0)[0].latents for scale in (0.18215, 0.13025))
    assert torch.allclose(a / 0.18215, b / 0.13025, atol=1e-12)


def test_offset_noise_is_one_number_per_channel() -> None:
    difference = make_batches(noise_offset=0.1)(0)[0].noise - make_batches()(0)[0].noise
    assert torch.allclose(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6)
    assert float(difference.abs().min()) > 0


def test_multi_resolution_noise_has_unit_variance_and_neighbours_that_are_alike() -> None:
    shape, key = (4, 16, 16), (1, 2, "instance")
    white, noise = draw_noise(shape, key), torch.stack([draw_noise(shape, (*key, i), multires=0.3) for i in range(50)])
    assert white.equal(draw_noise(shape, key)) and not draw_noise(shape, key, multires=0.3).equal(white)
    assert torch.allclose(noise.std((1, 2, 3)), torch.ones(50), atol=1e-5)
    for axis in (2, 3):
        alike = (noise.narrow(axis, 0, 15) * noise.narrow(axis, 1, 15)).mean()
        assert float(alike) > 0.03, "white noise has 0, with a standard error of 0.005"
    assert draw_noise((4, 8, 16), key, multires=0.3).shape == (4, 8, 16)


def test_a_step_draws_multi_resolution_noise_for_photos_and_class_images() -> None:
    plain, batch = (make_batches(multires_noise=discount)(0)[0] for discount in (0.0, 0.3))
    assert all(not one.equal(other) for one, other in zip(plain.noise, batch.noise, strict=True))
    assert batch.noise[2].float().equal(draw_noise((1, 8, 8), (3, 0, 0, "class"), multires=0.3))


def test_accumulation_equals_one_batch_in_fp64() -> None:
    """Sums of at most 8 x 64 fp64 terms are reordered: an error of 512 eps per gradient.

    AdamW divides a gradient by its magnitude, so a step with lr = 1e-2 differs by about lr x 512 eps / |g|, below 1e-9
    for gradients above 1e-6.
    """
    whole, accumulated = ToyModel(), ToyModel()
    a = train_steps(whole, make_batches(batch=8), 3)
    b = train_steps(accumulated, make_batches(batch=1, accumulation=8), 3)
    assert a.lr_scheduler.last_epoch == b.lr_scheduler.last_epoch == 3, "one scheduler step per step"
    for x, y in zip(whole.parameters(), accumulated.parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-9, rtol=0)
    assert b.ema is not None and b.ema.updates == 3, "one EMA update per step"


def test_accumulated_gradient_is_the_mean_not_the_sum() -> None:
    """Compares the norm before clipping, as AdamW hides the size of a gradient: 512 reordered fp64 terms, 1e-12."""
    objective = Objective(make_schedule(), 0.5)
    norms = [float(train_step(make_state(ToyModel()), batches(0), objective, Engine(), None).grad_norm)
             for batches in (make_batches(batch=8), make_batches(batch=1, accumulation=8))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


def test_every_trained_part_learns() -> None:
    before, after = ToyModel(), ToyModel()
    make_state(before)
    train_steps(after, make_batches(), 1)
    assert all(not x.equal(y) for x, y in zip(before.parameters(), after.parameters(), strict=True))


def test_ema_decay_and_precision() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    ema, expected = Ema(model, 0.9999), float(model.weight.detach())
    for t in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(1 + t / 256)
        ema.update(model)
        decay = min(0.9999, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * float(model.weight.detach())
    assert ema.average["weight"].dtype is torch.float32
    assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-5)
    assert Ema(model, 0.5).decay_at(1000) == 0.5


def test_swapping_in_the_ema_restores_the_weights() -> None:
    model = ToyModel()
    state = train_steps(model, make_batches(), 2)
    before = [p.clone() for p in model.parameters()]
    assert state.ema is not None
    with pytest.raises(KeyError), state.ema.swap_into(model):
        assert not model.unet.weight.equal(before[0])
        raise KeyError
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


def test_skipped_steps_are_not_counted_and_ten_in_a_row_stop_the_run() -> None:
    model = ToyModel()
    state = make_state(model)
    before = [p.clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)

    def overflow(loss: Tensor) -> None:
        (scaler.scale(loss) * math.inf).backward()

    engine = Engine(backward=overflow, scaler=scaler)
    with pytest.raises(Diverged, match="10 steps in a row, the last is step 10"):
        step = partial(train_step, objective=Objective(make_schedule()), engine=engine, max_grad_norm=1.0)
        for info in fit(state, make_batches(), step, 50):
            assert info.skipped
    assert state.skipped == 10
    assert state.lr_scheduler.last_epoch == 0
    assert state.ema is not None and state.ema.updates == 0
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_first_non_finite_number_stops_the_run_and_names_its_step(where: str) -> None:
    state, seen = make_state(ToyModel()), []

    def diverge(state: TrainState, batches: list[Batch]) -> object:
        if state.step == 2 and where == "loss":
            batches[0].latents.fill_(math.nan)
        is_broken = state.step == 2 and where == "gradient"
        engine = Engine(backward=lambda loss: (loss * math.inf).backward()) if is_broken else Engine()
        return train_step(state, batches, Objective(make_schedule()), engine, 1.0)

    with pytest.raises(Diverged, match=f"{where} of step 3 is"):
        for info in fit(state, make_batches(), diverge, 9):  # type: ignore[arg-type]
            seen.append(info.step)
    assert seen == [1, 2]


def test_the_training_step_runs_on_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = ToyModel()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        state = TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0))
        x = torch.empty(4, 1, 8, 8, dtype=torch.float64)
        batch = Batch(x, x.clone(), torch.zeros(4, dtype=torch.long), torch.zeros(4, 1, dtype=torch.long), 2)
        schedule = DiffusionSchedule(torch.full((1000,), 0.5, dtype=torch.float64), "epsilon")
        info = train_step(state, [batch, batch], Objective(schedule), Engine(), None)
    assert isinstance(info.losses, FakeTensor)
    assert info.losses.shape == (3,)


def test_the_default_sweep_objective_does_not_depend_on_the_loss() -> None:
    model = ToyModel()
    make_state(model)
    objectives = (Objective(make_schedule(), 1.0, gamma, debiased=debiased, huber_delta=delta)
                  for gamma, debiased, delta in ((None, False, None), (5.0, False, None), (None, True, 0.1)))
    losses = [instance_loss(SimpleNamespace(batches=make_batches(), objective=objective, trained=model))
              for objective in objectives]  # type: ignore[arg-type]
    assert losses[0] == losses[1] == losses[2] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_debiased_weights_amount_to_the_root_of_the_snr_for_the_error_of_x0(kind: str) -> None:
    """An error d of the prediction is an error of x_0: d / sqrt(snr), sqrt(1 - a) d or d."""
    schedule, times = make_schedule(kind), torch.tensor([0, 300, 999])
    alpha = schedule.alphas_cumprod[times]
    snr = alpha / (1 - alpha)
    of_x0 = {"epsilon": snr.rsqrt(), "v_prediction": (1 - alpha).sqrt(), "sample": torch.ones(3)}[kind]
    assert torch.allclose(schedule.debiased_weights(times), snr.sqrt() * of_x0.square(), rtol=1e-12)
    if kind == "epsilon":
        assert torch.allclose(schedule.debiased_weights(times), snr.rsqrt(), rtol=1e-12), "Yu et al. 2023"
        assert float(make_schedule(kind, zero_snr=True).debiased_weights(torch.tensor([999]))) == 1


def test_pseudo_huber_is_the_square_of_small_errors_and_grows_linearly_with_large_ones() -> None:
    errors, delta = torch.tensor([1e-6, 0.3, 50.0]), torch.tensor(0.1)
    small, middle, large = pseudo_huber(errors.square(), delta).tolist()
    assert small == pytest.approx(1e-12, rel=1e-5)
    assert middle == pytest.approx(2 * 0.01 * (math.sqrt(1 + 9) - 1), rel=1e-5)
    assert large == pytest.approx(2 * 0.1 * 50, rel=0.01)


def test_the_delta_falls_from_one_without_noise_to_that_of_pure_noise() -> None:
    snr = torch.tensor([1e12, 1.0, 0.0])
    assert scheduled_deltas(snr, 0.1).tolist() == pytest.approx([1.0, 0.9 / 4 + 0.1, 0.1], rel=1e-5)


def test_the_objective_uses_the_loss_of_its_settings() -> None:
    batch = make_batches(batch=3)(0)[0]
    model, schedule = ToyModel(), make_schedule()
    make_state(model)
    with torch.no_grad():
        found = Objective(schedule, 0.7, debiased=True, huber_delta=0.1)(model, batch)
        noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        squares = (model(noisy, batch.timesteps, batch.text) - batch.noise).square()
    deltas = scheduled_deltas(schedule.snr(batch.timesteps), 0.1)
    rows = pseudo_huber(squares, deltas.view(-1, 1, 1, 1)).flatten(1).mean(1) * schedule.snr(batch.timesteps).rsqrt()
    assert float(found.total) == pytest.approx(float(rows[:3].mean() + 0.7 * rows[3:].mean()), rel=1e-12)


def test_a_run_has_the_objective_of_its_recipe() -> None:
    recipe = resolve_demo(train__huber_delta=0.2, train__debiased_estimation=True, prior__prior_loss_weight=0.3)
    objective = Objective.of(recipe, make_schedule())
    assert (objective.huber_delta, objective.debiased, objective.prior_loss_weight) == (0.2, True, 0.3)
    assert Objective.of(resolve_demo(train__snr_gamma=5.0), make_schedule()).snr_gamma == 5.0


def test_the_default_sweep_objective_uses_a_bounded_number_of_photos(capsys: pytest.CaptureFixture[str]) -> None:
    model, calls = ToyModel(), []
    make_state(model)
    forward = model.forward
    model.forward = lambda *inputs: (calls.append(1), forward(*inputs))[1]  # type: ignore[method-assign]
    setup = SimpleNamespace(batches=make_batches(photo_sets=[make_photo_set(count=100)]), trained=model,
                            objective=Objective(make_schedule()))
    assert instance_loss(setup, Console()) > 0  # type: ignore[arg-type]
    assert len(calls) == 32
    assert "instance loss 32/32" in capsys.readouterr().out
    assert measured_photos(5) == list(range(5)) and measured_photos(64) == list(range(0, 64, 2))


def test_random_streams_are_independent_and_repeatable() -> None:
    assert rng.normal((4,), 1, 2, "noise").equal(rng.normal((4,), 1, 2, "noise"))
    assert not rng.normal((4,), 1, 2, "noise").equal(rng.normal((4,), 1, 2, "latents"))
    assert not rng.normal((4,), 1, 2, "instance").equal(rng.normal((4,), 1, 2, "class"))
