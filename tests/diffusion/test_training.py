import itertools
import math

import pytest
import torch

from diffusion.config import TrainingConfig
from diffusion.evaluation import Evaluator
from diffusion.training import Diverged, ema_decay, learning_rate_factor, shuffled_batches, train


def run(config, dataset):
    """All progress, with a copy of the averaged weights at each report."""
    history = []
    train(
        config,
        dataset,
        lambda progress: history.append(
            (progress, {name: value.clone() for name, value in progress.model.network.state_dict().items()})
        ),
    )
    return history


def same_weights(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("num_updates", "num_evaluations"), [(1, 1), (12, 3), (10, 8), (7, 7), (11, 4)])
def test_reports_come_as_often_as_planned_rising_and_last_at_the_end(
    small_config, gaussian_dataset, num_updates, num_evaluations
):
    config = small_config(training={"num_updates": num_updates, "num_evaluations": num_evaluations})
    updates = [progress.updates for progress, _ in run(config, gaussian_dataset(num_train=64, num_val=16))]
    assert len(updates) == num_evaluations
    assert updates[-1] == num_updates
    assert all(later > earlier for earlier, later in itertools.pairwise(updates))
    gap = num_updates / num_evaluations
    assert all(abs(update - gap * (index + 1)) <= 0.5 for index, update in enumerate(updates))


def test_fewer_updates_than_evaluations_are_judged_after_every_update(small_config, gaussian_dataset):
    config = small_config(training={"num_updates": 3, "num_evaluations": 8})
    history = run(config, gaussian_dataset(num_train=64, num_val=16))
    assert [progress.updates for progress, _ in history] == [1, 2, 3]


def test_each_report_holds_the_judgements_and_the_last_one_the_samples(small_config, gaussian_dataset):
    history = [progress for progress, _ in run(small_config(), gaussian_dataset(num_train=128, num_val=64))]
    for progress in history:
        assert {
            "train/mse",
            "val/mse",
            "val/elbo_window",
            "schedule/alphas_cumprod_T",
        } <= progress.metrics.keys()
        assert all(math.isfinite(value) for value in progress.metrics.values())
        assert progress.elbo.value == progress.metrics["val/elbo_window"]
        assert not progress.model.network.training
    assert ["sample/distance" in progress.metrics for progress in history] == [False, False, True]


def test_reported_metrics_are_those_of_the_reported_averaged_model(small_config, gaussian_dataset):
    config, dataset = small_config(), gaussian_dataset(num_train=128, num_val=64)
    seen = []

    def report(progress):
        metrics, bound = Evaluator(config, dataset).held_out_losses(progress.model.network)
        seen.append((metrics["val/mse"] == progress.metrics["val/mse"], bound.value == progress.elbo.value))

    train(config, dataset, report)
    assert seen == [(True, True)] * 3


def test_the_same_seed_gives_identical_weights_and_another_seed_does_not(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=128, num_val=16)
    dropout = {"dropout": 0.2}
    weights = []
    for seed, before in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(before)
        weights.append(run(small_config(seed=seed, network=dropout), dataset)[-1][1])
    assert same_weights(weights[0], weights[1])
    assert not same_weights(weights[0], weights[2])


def test_how_often_a_model_is_judged_does_not_change_its_training(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=128, num_val=16)
    often, once = (
        run(small_config(network={"dropout": 0.2}, training={"num_evaluations": number}), dataset)[-1][1]
        for number in (12, 1)
    )
    assert same_weights(often, once)


def test_a_trained_denoiser_comes_near_the_loss_floor(small_config, gaussian_dataset):
    """For N(0, I) data no denoiser beats epsilon_hat = sqrt(1 - abar_t) x_t, whose error at t is abar_t."""
    config = small_config(
        schedule={"num_train_timesteps": 10, "beta_start": 0.02, "beta_end": 0.5},
        network={"hidden_size": 32, "num_blocks": 1, "data_embedding_scale": 1.0},
        training={"num_updates": 1500, "batch_size": 256, "learning_rate": 5e-3, "num_evaluations": 2},
        metrics={"num_examples": 4096, "num_samples": 1000},
        sampler={"name": "ddpm", "num_steps": 10},
    )
    dataset = gaussian_dataset(num_train=20_000, num_val=4096)
    floor = config.schedule.build().alphas_cumprod.mean()
    assert floor < 0.5  # a network that predicts nothing has 1
    last = run(config, dataset)[-1][0].metrics
    assert last["val/mse"] == pytest.approx(floor, rel=0.05)
    assert last["train/mse"] == pytest.approx(floor, rel=0.05)
    assert abs(last["sample/distance"] - last["sample/distance_floor"]) < 0.02


def test_data_that_are_not_numbers_raise_diverged(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=64, num_val=16)
    dataset.train[3, 0] = float("nan")
    with pytest.raises(Diverged, match="after 4 updates"):
        run(small_config(training={"batch_size": 64}), dataset)


def test_training_that_explodes_raises_diverged_with_the_updates(small_config, gaussian_dataset):
    """AdamW multiplies the weights by 1 - rate * decay: by -1e12 an update here."""
    config = small_config(
        training={"learning_rate": 1.0, "weight_decay": 1e12, "warmup_updates": 0, "max_gradient_norm": 1e30}
    )
    with pytest.raises(Diverged, match="after 4 updates"):
        run(config, gaussian_dataset(num_train=64, num_val=16))


def test_gradients_are_scaled_down_to_the_given_norm(small_config, gaussian_dataset):
    """AdamW does not see a gradient's size until it is small beside 1e-8: then nothing moves."""
    dataset = gaussian_dataset(num_train=64, num_val=16)
    moved = [
        run(small_config(training={"max_gradient_norm": norm}), dataset)[-1][1]["outward.weight"].abs().max()
        for norm in (1.0, 1e-20)
    ]
    assert moved[0] > 1e-3  # the last layer starts at zero
    assert moved[1] < 1e-8


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


def test_the_rate_in_use_is_the_one_reported(small_config, gaussian_dataset):
    history = run(small_config(training={"learning_rate": 0.01}), gaussian_dataset(num_train=64, num_val=16))
    training = small_config(training={"learning_rate": 0.01}).training
    for progress, _ in history:
        assert progress.metrics["training/learning_rate"] == pytest.approx(
            0.01 * learning_rate_factor(training, progress.updates - 1), abs=1e-12
        )


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


def test_averaged_weights_without_decay_are_the_last_ones_and_with_it_they_lag(
    small_config, gaussian_dataset
):
    dataset = gaussian_dataset(num_train=64, num_val=16)
    weights = [
        run(small_config(training={"num_updates": 200, "ema_decay": decay, "num_evaluations": 1}), dataset)[
            -1
        ][1]
        for decay in (0.0, 0.9)
    ]
    name = "outward.bias"
    assert weights[0][name].abs().max() > 0.0
    assert not torch.equal(weights[0][name], weights[1][name])


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 3), (10, 10), (5, 12), (7, 1)])
def test_batches_show_every_example_once_an_epoch_without_a_gap(num_examples, batch_size):
    batches = shuffled_batches(num_examples, batch_size, torch.Generator().manual_seed(0))
    drawn = [next(batches) for _ in range(4 * num_examples)]
    assert all(batch.shape == (batch_size,) for batch in drawn)
    stream = torch.cat(drawn)
    epochs = stream[: len(stream) // num_examples * num_examples].reshape(-1, num_examples)
    assert len(epochs) >= 4
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(num_examples).expand_as(epochs))
    assert num_examples < 7 or not torch.equal(epochs[0], epochs[1])


def test_batches_of_the_same_generator_seed_are_the_same():
    one, other, third = (shuffled_batches(50, 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    first = [next(one) for _ in range(10)]
    assert all(torch.equal(batch, next(other)) for batch in first)
    assert not all(torch.equal(batch, next(third)) for batch in first)
