import math

import pytest
import torch

from diffusion.config import TrainingConfig
from diffusion.errors import InputError
from diffusion.learner import Learner, check_precision, ema_decay, learning_rate_factor
from diffusion.objectives import Objective
from diffusion.ranks import Ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_updates", "warmup"), [(1000, 100), (1000, 0), (50, 100), (5, 100), (1, 0)])
def test_the_learning_rate_rises_then_falls_to_zero_and_never_exceeds_its_peak(num_updates, warmup):
    training = TrainingConfig(num_updates=num_updates, warmup_updates=warmup, num_evaluations=1)
    factors = [learning_rate_factor(training, done) for done in range(num_updates + 1)]
    assert all(0.0 < factor <= 1.0 for factor in factors[:-1])
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
    peak = factors.index(max(factors))
    assert peak <= min(warmup, num_updates // 10)
    assert factors[peak] == pytest.approx(1.0)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_the_learning_rate_is_a_half_cosine_after_a_linear_warm_up():
    training = TrainingConfig(num_updates=1100, warmup_updates=100)
    assert learning_rate_factor(training, 0) == pytest.approx(1 / 101)
    assert learning_rate_factor(training, 49) == pytest.approx(50 / 101)
    assert learning_rate_factor(training, 350) == pytest.approx(0.5 * (1.0 + 0.5**0.5))
    assert learning_rate_factor(training, 600) == pytest.approx(0.5)
    assert learning_rate_factor(training, 1100) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("num_updates", [1, 10, 30, 100, 2500, 20_000])
@pytest.mark.parametrize("decay", [0.9999, 0.99, 0.0])
def test_the_averaged_weights_forget_the_start(num_updates, decay):
    """Trap 1 of design.md: a constant 0.9999 would leave 78% of the start after 2,500 updates."""
    training = TrainingConfig(num_updates=num_updates, ema_decay=decay, num_evaluations=1)
    decays = [ema_decay(training, done) for done in range(num_updates)]
    assert all(0.0 <= value <= decay for value in decays)
    assert decays == sorted(decays)
    share_of_start = math.prod(decays)
    assert share_of_start < (0.11 if num_updates == 1 else 1e-3)
    if num_updates == 2500:
        assert math.prod([0.9999] * 2500) == pytest.approx(0.78, abs=0.01)


@pytest.mark.parametrize("num_updates", [40, 1000, 20_000])
def test_the_final_average_reaches_back_over_a_small_part_of_the_training(num_updates):
    """All but a hundredth of its weight lies in the last quarter of the updates, however few they are."""
    training = TrainingConfig(num_updates=num_updates, ema_decay=0.9999)
    last_quarter = range(num_updates - num_updates // 4, num_updates)
    assert math.prod(ema_decay(training, done) for done in last_quarter) < 0.01


def test_the_first_averagings_follow_1_plus_n_over_10_plus_n():
    training = TrainingConfig(num_updates=100_000)
    assert [ema_decay(training, done) for done in range(4)] == pytest.approx([1 / 10, 2 / 11, 3 / 12, 4 / 13])


def batch(size=16):
    generator = torch.Generator().manual_seed(3)
    x_0 = torch.randn(size, 2, generator=generator)
    return x_0, torch.arange(size) % 10, torch.randn(size, 2, generator=generator)


def test_a_restored_learner_takes_the_same_next_step(small_config):
    config = small_config(training={"batch_size": 16})
    learner = Learner(config, (2,), Ranks(0, 1, CPU))
    for update in range(5):
        learner.step(update, *batch())
    state = {key: _copied(value) for key, value in learner.state().items()}
    averaged = _copied(learner.averaged_network.state_dict())
    other = Learner(small_config(seed=9, training={"batch_size": 16}), (2,), Ranks(0, 1, CPU))
    other.restore(state, averaged)
    losses = [each.step(5, *batch()) for each in (learner, other)]
    assert torch.equal(*losses)
    for one, two in ((learner.network, other.network), (learner.averaged_network, other.averaged_network)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_half_precision_learns_what_full_precision_learns(small_config):
    networks = []
    for precision in ("fp32", "bf16"):
        config = small_config(training={"batch_size": 16, "precision": precision, "num_updates": 50})
        learner = Learner(config, (2,), Ranks(0, 1, CPU))
        losses = [float(learner.step(update, *batch())) for update in range(50)]
        assert losses[-1] < 0.9 * losses[0]
        assert all(weight.dtype == torch.float32 for weight in learner.network.parameters())
        networks.append(torch.cat([weight.flatten() for weight in learner.network.parameters()]))
    full, half = networks
    assert not torch.equal(full, half)
    assert (full - half).norm() < 0.1 * full.norm()


def test_a_processor_has_no_fp16():
    with pytest.raises(InputError, match="only GPUs"):
        check_precision(TrainingConfig(precision="fp16"), CPU)
    check_precision(TrainingConfig(precision="bf16"), CPU)


@pytest.mark.parametrize(
    ("prediction_type", "training"),
    [
        ("epsilon", {}),
        ("sample", {"loss": "l1"}),
        ("v_prediction", {"weighting": "min_snr", "min_snr_gamma": 0.3}),
        ("epsilon", {"weighting": "vlb"}),
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_minimised_is_the_configs_objective(small_config, prediction_type, training, parts):
    """A fresh network predicts 0: each example's loss is that of its target, and the gradient of the last
    layer's bias, which adds to the output alone, is what autograd makes of the objective."""
    values = {"batch_size": 16, "accumulation_steps": parts, "max_gradient_norm": 1e9, **training}
    config = small_config(network={"prediction_type": prediction_type}, training=values)
    learner = Learner(config, (2,), Ranks(0, 1, CPU))
    objective = Objective(
        config.schedule.build(),
        prediction_type=prediction_type,
        loss=config.training.loss,
        weighting=config.training.weighting,
        min_snr_gamma=config.training.min_snr_gamma,
    )
    importance = torch.linspace(0.5, 2.0, 16)
    expected = objective(lambda x, t: 0.0 * x, *batch(), importance=importance)
    mse = learner.step(0, *batch(), importance=importance)
    torch.testing.assert_close(learner.last_losses, expected.per_example)
    torch.testing.assert_close(mse, expected.mse)
    bias = torch.zeros(2, requires_grad=True)
    objective(lambda x, t: 0.0 * x + bias, *batch(), importance=importance).loss.backward()
    # AdamW's first moment is a tenth of the gradient.
    moment = learner.state()["optimizer"]["state"]
    names = [name for name, _ in learner.network.named_parameters()]
    torch.testing.assert_close(10.0 * moment[names.index("outward.bias")]["exp_avg"], bias.grad)


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
