import math

import pytest
import torch

from diffusion.config import TrainingConfig
from diffusion.errors import InputError
from diffusion.training.distributed import DistributedContext
from diffusion.training.loss import DenoisingLoss
from diffusion.training.train_step import TrainStep, check_precision, ema_decay, learning_rate_factor

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
def test_the_averaged_weights_forget_the_initial_ones(num_updates, decay):
    """A constant decay of 0.9999 would leave 78% of the initial weights after 2,500 updates."""
    training = TrainingConfig(num_updates=num_updates, ema_decay=decay, num_evaluations=1)
    decays = [ema_decay(training, done) for done in range(num_updates)]
    assert all(0.0 <= value <= decay for value in decays)
    assert decays == sorted(decays)
    initial_fraction = math.prod(decays)
    assert initial_fraction < (0.11 if num_updates == 1 else 1e-3)
    if num_updates == 2500:
        assert math.prod([0.9999] * 2500) == pytest.approx(0.78, abs=0.01)


@pytest.mark.parametrize("num_updates", [40, 1000, 20_000])
def test_the_final_average_reaches_back_over_a_small_part_of_the_training(num_updates):
    """The last quarter of the updates has 99% of the weight, however few updates there are."""
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


def test_a_restored_train_step_makes_the_same_next_update(small_config):
    config = small_config(training={"batch_size": 16})
    train_step = TrainStep(config, (2,), DistributedContext(0, 1, CPU))
    for update in range(5):
        train_step.run(update, *batch())
    state = {key: _clone(value) for key, value in train_step.state().items()}
    averaged = _clone(train_step.averaged_network.state_dict())
    other = TrainStep(small_config(seed=9, training={"batch_size": 16}), (2,), DistributedContext(0, 1, CPU))
    other.restore(state, averaged)
    losses = [each.run(5, *batch()) for each in (train_step, other)]
    assert torch.equal(*losses)
    for one, two in (
        (train_step.network, other.network),
        (train_step.averaged_network, other.averaged_network),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_half_precision_learns_what_full_precision_learns(small_config):
    networks = []
    for precision in ("fp32", "bf16"):
        config = small_config(training={"batch_size": 16, "precision": precision, "num_updates": 50})
        train_step = TrainStep(config, (2,), DistributedContext(0, 1, CPU))
        losses = [float(train_step.run(update, *batch())) for update in range(50)]
        assert losses[-1] < 0.9 * losses[0]
        assert all(weight.dtype == torch.float32 for weight in train_step.network.parameters())
        networks.append(torch.cat([weight.flatten() for weight in train_step.network.parameters()]))
    full, half = networks
    assert not torch.equal(full, half)
    assert (full - half).norm() < 0.1 * full.norm()


def test_fp16_is_refused_on_the_cpu():
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
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_the_loss_of_the_config_is_minimised(small_config, prediction_type, training, accumulation_steps):
    """A new network predicts 0, so each example's loss is that of its target. The last layer's bias only
    adds to the output, so its gradient is that of the loss with respect to a constant output."""
    values = {
        "batch_size": 16,
        "accumulation_steps": accumulation_steps,
        "max_gradient_norm": 1e9,
        **training,
    }
    config = small_config(network={"prediction_type": prediction_type}, training=values)
    train_step = TrainStep(config, (2,), DistributedContext(0, 1, CPU))
    loss_function = DenoisingLoss(
        config.schedule.build(),
        prediction_type=prediction_type,
        loss=config.training.loss,
        weighting=config.training.weighting,
        min_snr_gamma=config.training.min_snr_gamma,
    )
    importance = torch.linspace(0.5, 2.0, 16)
    expected = loss_function(lambda x, t: 0.0 * x, *batch(), importance=importance)
    mse = train_step.run(0, *batch(), importance=importance)
    torch.testing.assert_close(train_step.last_losses, expected.per_example)
    torch.testing.assert_close(mse, expected.mse)
    bias = torch.zeros(2, requires_grad=True)
    loss_function(lambda x, t: 0.0 * x + bias, *batch(), importance=importance).loss.backward()
    # AdamW's first moment is a tenth of the gradient.
    moment = train_step.state()["optimizer"]["state"]
    names = [name for name, _ in train_step.network.named_parameters()]
    torch.testing.assert_close(10.0 * moment[names.index("outward.bias")]["exp_avg"], bias.grad)


def _clone(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    return value
