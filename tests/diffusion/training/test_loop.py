import dataclasses
import itertools
import math

import pytest
import torch

from diffusion.data.dataset import Dataset, Split
from diffusion.evaluation.evaluator import Evaluator
from diffusion.training.checkpoints import TrainedModel, read_checkpoint, write_checkpoint
from diffusion.training.loop import Request, Training, TrainingDiverged, TrainingStopped, train
from diffusion.training.train_step import learning_rate_factor
from tests.diffusion.conftest import make_gaussian_dataset, make_small_config


def run(config, dataset):
    """The result of each evaluation, with a copy of its averaged weights."""
    history = []
    Training(config, dataset, lambda result: history.append((result, weights_of(result)))).run()
    return history


def weights_of(result):
    return {name: value.clone() for name, value in result.model.network.state_dict().items()}


def same_weights(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("num_updates", "num_evaluations"), [(1, 1), (12, 3), (10, 8), (7, 7), (11, 4)])
def test_evaluations_are_evenly_spaced_with_the_last_at_the_end(
    small_config, gaussian_dataset, num_updates, num_evaluations
):
    config = small_config(training={"num_updates": num_updates, "num_evaluations": num_evaluations})
    updates = [result.updates for result, _ in run(config, gaussian_dataset(num_train=64, num_val=16))]
    assert len(updates) == num_evaluations
    assert updates[-1] == num_updates
    assert all(later > earlier for earlier, later in itertools.pairwise(updates))
    gap = num_updates / num_evaluations
    assert all(abs(update - gap * (index + 1)) <= 0.5 for index, update in enumerate(updates))


def test_train_returns_the_model_of_the_training_and_leaves_the_generators_alone(
    small_config, gaussian_dataset
):
    config, dataset = small_config(), gaussian_dataset(num_train=128, num_val=64)
    expected = run(config, dataset)[-1][1]
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    updates = []
    model = train(config, dataset, lambda result: updates.append(result.updates))
    assert torch.equal(torch.rand(3), first)
    assert updates[-1] == config.training.num_updates
    assert same_weights(model.network.state_dict(), expected)
    assert not model.network.training
    assert not any(weight.requires_grad for weight in model.network.parameters())
    samples = model.sample(5, seed=1)
    assert samples.shape == (5, *dataset.spec.shape) and samples.dtype == "float32"


def test_train_converts_epochs(small_config, gaussian_dataset):
    config = small_config(training={"num_epochs": 2, "batch_size": 32})
    model = train(config, gaussian_dataset(num_train=64, num_val=16))
    assert (model.config.training.num_updates, model.config.training.num_epochs) == (4, None)


def test_with_more_evaluations_than_updates_every_update_is_evaluated(small_config, gaussian_dataset):
    config = small_config(training={"num_updates": 3, "num_evaluations": 8})
    history = run(config, gaussian_dataset(num_train=64, num_val=16))
    assert [result.updates for result, _ in history] == [1, 2, 3]


def test_each_result_has_validation_metrics_and_the_last_one_sample_metrics(small_config, gaussian_dataset):
    history = [result for result, _ in run(small_config(), gaussian_dataset(num_train=128, num_val=64))]
    for result in history:
        assert {
            "train/mse",
            "val/mse",
            "val/elbo_window",
            "schedule/alphas_cumprod_T",
        } <= result.metrics.keys()
        assert all(math.isfinite(value) for value in result.metrics.values())
        assert result.elbo.value == result.metrics["val/elbo_window"]
        assert not result.model.network.training
    for name in ("sample/distance", "val/nats_per_dim", "val/nats_per_dim_se"):
        assert [name in result.metrics for result in history] == [False, False, True]


def test_reported_metrics_are_those_of_the_reported_averaged_model(small_config, gaussian_dataset):
    config, dataset = small_config(), gaussian_dataset(num_train=128, num_val=64)
    seen = []

    def report(result):
        metrics, bound = Evaluator(config, dataset).held_out_losses(result.model.network)
        seen.append((metrics["val/mse"] == result.metrics["val/mse"], bound.value == result.elbo.value))

    Training(config, dataset, report).run()
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


def test_the_number_of_evaluations_does_not_change_the_training(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=128, num_val=16)
    often, once = (
        run(small_config(network={"dropout": 0.2}, training={"num_evaluations": number}), dataset)[-1][1]
        for number in (12, 1)
    )
    assert same_weights(often, once)


def test_a_trained_denoiser_comes_close_to_the_loss_floor(small_config, gaussian_dataset):
    """For N(0, I) data the best denoiser is epsilon_hat = sqrt(1 - abar_t) x_t, with error abar_t at t."""
    config = small_config(
        schedule={"num_train_timesteps": 10, "beta_start": 0.02, "beta_end": 0.5},
        network={"hidden_size": 32, "num_blocks": 1, "data_embedding_scale": 1.0},
        training={"num_updates": 800, "batch_size": 256, "learning_rate": 5e-3, "num_evaluations": 2},
        metrics={"num_examples": 2048, "num_samples": 1000},
        sampler={"name": "ddpm", "num_steps": 10},
    )
    dataset = gaussian_dataset(num_train=20_000, num_val=2048)
    floor = config.schedule.build().alphas_cumprod.mean()
    assert floor < 0.5  # the error of predicting 0 is 1
    last = run(config, dataset)[-1][0].metrics
    assert last["val/mse"] == pytest.approx(floor, rel=0.05)
    assert last["train/mse"] == pytest.approx(floor, rel=0.05)
    assert abs(last["sample/distance"] - last["sample/distance_floor"]) < 0.05


@pytest.mark.parametrize(
    ("prediction_type", "training"),
    [
        ("epsilon", {"timestep_sampling": "stratified"}),
        ("epsilon", {"timestep_sampling": "importance"}),
        ("epsilon", {"weighting": "vlb", "timestep_sampling": "importance"}),
        ("epsilon", {"weighting": "min_snr", "min_snr_gamma": 1.0}),
        ("sample", {"weighting": "min_snr"}),
        ("v_prediction", {}),
        ("v_prediction", {"weighting": "vlb"}),
        ("v_prediction", {"loss": "huber"}),
        ("epsilon", {"loss": "l1"}),
    ],
)
def test_every_target_weighting_and_timestep_sampling_reaches_the_same_floor(
    small_config, gaussian_dataset, prediction_type, training
):
    """For N(0, I) data the floor of the epsilon error is mean(abar_t), and the minimum of l1, the
    conditional median, is the mean. train/mse estimates the error for uniform t however t was drawn."""
    config = small_config(
        network={
            "prediction_type": prediction_type,
            "hidden_size": 32,
            "num_blocks": 1,
            "data_embedding_scale": 1.0,
        },
        training={"num_updates": 500, "batch_size": 256, "learning_rate": 5e-3, "num_evaluations": 2}
        | training,
        metrics={"num_examples": 1024, "num_samples": 100},
    )
    floor = config.schedule.build().alphas_cumprod.mean()
    last = run(config, gaussian_dataset(num_train=20_000, num_val=1024))[-1][0].metrics
    assert last["val/mse"] == pytest.approx(floor, rel=0.06)
    assert last["train/mse"] == pytest.approx(floor, rel=0.06)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_a_schedule_that_ends_in_pure_noise_trains_samples_and_saves(
    small_config, gaussian_dataset, tmp_path, prediction_type
):
    config = small_config(schedule={"zero_terminal_snr": True}, network={"prediction_type": prediction_type})
    last = run(config, gaussian_dataset(num_train=128, num_val=32))[-1][0]
    assert all(math.isfinite(value) for value in last.metrics.values())
    last.model.save(tmp_path)
    again = TrainedModel.load(tmp_path)
    assert again.config.prediction_type == prediction_type
    assert again.table.alphas_cumprod[0] == 0.0


def test_a_checkpoint_contains_the_losses_for_importance_sampling(small_config, gaussian_dataset):
    saved = []
    for timestep_sampling in ("importance", "uniform"):
        training = {"timestep_sampling": timestep_sampling, "num_updates": 30}
        Training(
            small_config(training=training),
            gaussian_dataset(num_train=64, num_val=16),
            lambda result: None,
            save=lambda model, state: saved.append(state.random),
        ).run()
    assert saved[2]["loss_history"]["counts"].sum() == 30 * 16
    assert "loss_history" not in saved[-1]


def test_data_with_nan_raise_diverged(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=64, num_val=16)
    dataset.train.values[3, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match="after 4 updates"):
        run(small_config(training={"batch_size": 64}), dataset)


def test_training_that_explodes_raises_diverged_with_the_updates(small_config, gaussian_dataset):
    """AdamW multiplies the weights by 1 - rate * decay, here -1e12, in each update."""
    config = small_config(
        training={"learning_rate": 1.0, "weight_decay": 1e12, "warmup_updates": 0, "max_gradient_norm": 1e30}
    )
    with pytest.raises(TrainingDiverged, match="after 4 updates"):
        run(config, gaussian_dataset(num_train=64, num_val=16))


def test_gradients_are_scaled_down_to_the_given_norm(small_config, gaussian_dataset):
    """AdamW's step does not depend on a gradient's size, unless it is small compared with 1e-8."""
    dataset = gaussian_dataset(num_train=64, num_val=16)
    max_weights = [
        run(small_config(training={"max_gradient_norm": norm}), dataset)[-1][1]["outward.weight"].abs().max()
        for norm in (1.0, 1e-20)
    ]
    assert max_weights[0] > 1e-3  # the last layer starts at zero
    assert max_weights[1] < 1e-8


def test_the_reported_learning_rate_is_the_one_used(small_config, gaussian_dataset):
    history = run(small_config(training={"learning_rate": 0.01}), gaussian_dataset(num_train=64, num_val=16))
    training = small_config(training={"learning_rate": 0.01}).training
    for result, _ in history:
        assert result.metrics["training/learning_rate"] == pytest.approx(
            0.01 * learning_rate_factor(training, result.updates - 1), abs=1e-12
        )


def test_averaged_weights_depend_on_the_decay(small_config, gaussian_dataset):
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


# With dropout, batches that do not divide the data, a changing learning rate, and stops between evaluations.
INTERRUPTED = {
    "network": {"dropout": 0.2},
    "training": {"num_updates": 40, "num_evaluations": 2, "batch_size": 24},
}


@pytest.fixture(scope="module", params=["uniform", "stratified", "importance"])
def uninterrupted(request, small_reference):
    """A config, its data, and the results of its training, which is not interrupted."""
    values = {**INTERRUPTED, "training": INTERRUPTED["training"] | {"timestep_sampling": request.param}}
    config, dataset = make_small_config(**values), make_gaussian_dataset(num_train=100, num_val=32)
    return config, dataset, run(config, dataset)


@pytest.mark.parametrize("stop_at", [10, 20, 30, 40])
def test_a_resumed_training_ends_with_exactly_the_weights_of_an_uninterrupted_one(
    uninterrupted, tmp_path, stop_at
):
    config, dataset, whole = uninterrupted
    reported, saved = [], []

    def save(model, state):
        if state.update == stop_at:
            write_checkpoint(tmp_path / f"{len(saved)}", model, state, {})
            saved.append(state.update)

    def request():
        return Request.STOP if training.updates == stop_at else Request.CONTINUE

    def report(result):
        reported.append((result.updates, result.metrics))

    training = Training(config, dataset, report, save=save, request=request)
    with pytest.raises(TrainingStopped, match=f"after {stop_at} updates"):
        training.run()
    assert saved
    torch.manual_seed(999)  # the global generator of a new process has another state
    model, state, _ = read_checkpoint(tmp_path / f"{len(saved) - 1}")
    resumed = []
    Training(
        config,
        dataset,
        lambda result: resumed.append((result, weights_of(result))),
        resume=(model, state),
    ).run()
    assert same_weights(resumed[-1][1], whole[-1][1])
    updates = [update for update, _ in reported] + [result.updates for result, _ in resumed]
    assert updates == [20, 40], "no evaluation is repeated or missing"
    metrics = dict(reported) | {result.updates: result.metrics for result, _ in resumed}
    for result, _ in whole:
        assert metrics[result.updates] == pytest.approx(result.metrics, rel=1e-6, nan_ok=True)


def test_a_stop_at_the_last_update_leaves_a_finished_training(small_config, gaussian_dataset):
    config, dataset = small_config(), gaussian_dataset(num_train=64, num_val=32)
    calls, reported = [], []

    def request():
        calls.append(training.updates)
        return Request.STOP if calls.count(config.training.num_updates) == 1 else Request.CONTINUE

    training = Training(config, dataset, reported.append, request=request)
    training.run()
    assert reported[-1].updates == training.updates == config.training.num_updates


def test_a_stop_interrupts_an_evaluation_which_is_repeated_on_resume(
    small_config, gaussian_dataset, tmp_path
):
    config, dataset = small_config(), gaussian_dataset(num_train=64, num_val=32)
    calls, seen = [], []

    def request():
        calls.append(training.updates)
        # The first call after update 4 comes from the loop, the next ones from inside the evaluation.
        return Request.STOP if calls.count(4) > 2 else Request.CONTINUE

    training = Training(
        config,
        dataset,
        lambda result: seen.append(result.updates),
        save=lambda model, state: write_checkpoint(tmp_path / f"{len(calls)}", model, state, {}),
        request=request,
    )
    with pytest.raises(TrainingStopped):
        training.run()
    assert seen == []
    newest = max(tmp_path.iterdir(), key=lambda path: int(path.name))
    model, state, _ = read_checkpoint(newest)
    assert state.update == 4 and state.history == []
    Training(config, dataset, lambda result: seen.append(result.updates), resume=(model, state)).run()
    assert seen == [4, 8, 12]


def test_a_checkpoint_is_written_on_request(small_config, gaussian_dataset):
    config = small_config(training={"num_updates": 30, "num_evaluations": 1})
    saved = []
    training = Training(
        config,
        gaussian_dataset(num_train=64, num_val=16),
        lambda result: None,
        save=lambda model, state: saved.append((state.update, state.losses)),
        request=lambda: Request.CHECKPOINT if training.updates == 10 else Request.CONTINUE,
    )
    training.run()
    assert saved == [(10, 10), (30, 0)]


def test_training_starts_from_given_initial_weights(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=64, num_val=16)
    weights = run(small_config(), dataset)[-1][1]
    tiny = {"num_updates": 1, "learning_rate": 1e-12, "num_evaluations": 1, "warmup_updates": 0}
    started = []
    Training(
        small_config(training=tiny, seed=7),
        dataset,
        lambda result: started.append(weights_of(result)),
        initial_weights=weights,
    ).run()
    for name, value in weights.items():
        torch.testing.assert_close(started[0][name], value, atol=1e-9, rtol=0)


def test_gradient_accumulation_makes_the_same_update(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=64, num_val=16)
    whole, accumulated = (
        run(small_config(training={"accumulation_steps": steps, "learning_rate": 1e-2}), dataset)[-1][1]
        for steps in (1, 5)
    )
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, atol=1e-5, rtol=1e-3)


def test_flips_mirror_half_of_the_images(small_config, gaussian_dataset, monkeypatch):
    """All images are bright on the left side, so mirrored ones are bright on the right."""
    spec = dataclasses.replace(
        gaussian_dataset().spec,
        kind="image",
        shape=(1, 8, 8),
        mean=[[[0.0]]],
        std=[[[1.0]]],
        range=(-6.0, 6.0),
    )
    values = torch.zeros(64, 1, 8, 8)
    values[..., 0] = 1.0
    dataset = Dataset(spec, *(Split(values) for _ in range(3)))
    seen = []
    config = small_config(
        network={"kind": "unet", "base_channels": 8, "channel_multipliers": (1,)},
        training={"num_evaluations": 1},
        metrics={"num_examples": 8, "num_samples": 8},
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, horizontal_flips=True))
    training = Training(config, dataset, lambda result: None)
    run = training.train_step.run
    monkeypatch.setattr(
        training.train_step, "run", lambda update, x_0, *rest: seen.append(x_0) or run(update, x_0, *rest)
    )
    training.run()
    x_0 = torch.cat(seen)
    mirrored = x_0[:, 0, 0, -1] == 1.0
    assert torch.equal(mirrored, x_0[:, 0, 0, 0] == 0.0)
    assert 0.3 < mirrored.float().mean() < 0.7
