from contextlib import nullcontext

import pytest
import torch

from diffusion.config import TrainingConfig
from diffusion.errors import InputError
from diffusion.training import train_step as train_step_module
from diffusion.training.distributed import DistributedContext
from diffusion.training.loss import DenoisingLoss
from diffusion.training.train_step import TrainStep, check_precision, learning_rate_factor

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


def test_half_precision_learns_what_full_precision_learns(small_config, monkeypatch):
    monkeypatch.setattr(train_step_module, "cpu_has_bf16", lambda: True)  # slow, and as exact
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


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_refused_where_it_would_be_slower(monkeypatch, supported):
    monkeypatch.setattr(train_step_module, "cpu_has_bf16", lambda: supported)
    refused = nullcontext() if supported else pytest.raises(InputError, match="this CPU has no instructions")
    with refused:
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


@pytest.mark.parametrize("max_gradient_norm", [1e-3, 1e3])
def test_gradients_are_clipped_to_their_joint_norm(small_config, max_gradient_norm):
    moments = []
    for limit in (max_gradient_norm, 1e9):
        config = small_config(training={"batch_size": 16, "max_gradient_norm": limit})
        train_step = TrainStep(config, (2,), DistributedContext(0, 1, CPU))
        train_step.run(0, *batch())
        # AdamW's first moment is a tenth of the gradient.
        states = train_step.state()["optimizer"]["state"].values()
        moments.append(torch.cat([10.0 * state["exp_avg"].flatten() for state in states]))
    clipped, gradient = moments
    expected = gradient * min(1.0, max_gradient_norm / float(gradient.norm()))
    torch.testing.assert_close(clipped, expected, rtol=1e-5, atol=0.0)


def _clone(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    return value
