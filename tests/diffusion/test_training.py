import dataclasses
import itertools
import math

import pytest
import torch

from diffusion.checkpoints import TrainedModel, read_checkpoint, write_checkpoint
from diffusion.data import Dataset, Examples
from diffusion.evaluation import Evaluator
from diffusion.learner import learning_rate_factor
from diffusion.training import Diverged, Request, Stopped, Training


def run(config, dataset):
    """All progress, with a copy of the averaged weights at each report."""
    history = []
    Training(config, dataset, lambda progress: history.append((progress, weights_of(progress)))).run()
    return history


def weights_of(progress):
    return {name: value.clone() for name, value in progress.model.network.state_dict().items()}


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
    for name in ("sample/distance", "val/nats_per_dim", "val/nats_per_dim_se"):
        assert [name in progress.metrics for progress in history] == [False, False, True]


def test_reported_metrics_are_those_of_the_reported_averaged_model(small_config, gaussian_dataset):
    config, dataset = small_config(), gaussian_dataset(num_train=128, num_val=64)
    seen = []

    def report(progress):
        metrics, bound = Evaluator(config, dataset).held_out_losses(progress.model.network)
        seen.append((metrics["val/mse"] == progress.metrics["val/mse"], bound.value == progress.elbo.value))

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
def test_every_target_weighting_and_draw_of_t_reaches_the_same_floor(
    small_config, gaussian_dataset, prediction_type, training
):
    """For N(0, I) data the floor of the epsilon error is mean(abar_t), and the conditional median, at
    which l1 aims, is the mean. train/mse estimates uniform t's error however t was drawn."""
    config = small_config(
        network={
            "prediction_type": prediction_type,
            "hidden_size": 32,
            "num_blocks": 1,
            "data_embedding_scale": 1.0,
        },
        training={"num_updates": 1000, "batch_size": 256, "learning_rate": 5e-3, "num_evaluations": 4}
        | training,
        metrics={"num_examples": 4096, "num_samples": 100},
    )
    floor = config.schedule.build().alphas_cumprod.mean()
    last = run(config, gaussian_dataset(num_train=20_000, num_val=4096))[-1][0].metrics
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


def test_a_checkpoint_holds_the_losses_that_importance_is_made_of(small_config, gaussian_dataset):
    saved = []
    for timestep_sampling in ("importance", "uniform"):
        training = {"timestep_sampling": timestep_sampling, "num_updates": 30}
        Training(
            small_config(training=training),
            gaussian_dataset(num_train=64, num_val=16),
            lambda progress: None,
            save=lambda model, state: saved.append(state.random),
        ).run()
    assert saved[2]["loss_history"]["counts"].sum() == 30 * 16
    assert "loss_history" not in saved[-1]


def test_data_that_are_not_numbers_raise_diverged(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=64, num_val=16)
    dataset.train.values[3, 0] = float("nan")
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


def test_the_rate_in_use_is_the_one_reported(small_config, gaussian_dataset):
    history = run(small_config(training={"learning_rate": 0.01}), gaussian_dataset(num_train=64, num_val=16))
    training = small_config(training={"learning_rate": 0.01}).training
    for progress, _ in history:
        assert progress.metrics["training/learning_rate"] == pytest.approx(
            0.01 * learning_rate_factor(training, progress.updates - 1), abs=1e-12
        )


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


# A network with dropout, batches that do not divide the data, a rate that changes: all must line up.
INTERRUPTED = {
    "network": {"dropout": 0.2},
    "training": {"num_updates": 40, "num_evaluations": 4, "batch_size": 24},
}


@pytest.mark.parametrize("timestep_sampling", ["uniform", "stratified", "importance"])
@pytest.mark.parametrize("stop_at", [10, 20, 30, 40])
def test_a_stopped_training_goes_on_to_the_very_weights_of_an_uninterrupted_one(
    small_config, gaussian_dataset, tmp_path, stop_at, timestep_sampling
):
    values = {**INTERRUPTED, "training": INTERRUPTED["training"] | {"timestep_sampling": timestep_sampling}}
    config, dataset = small_config(**values), gaussian_dataset(num_train=100, num_val=32)
    whole = run(config, dataset)
    seen, asked = [], []

    def save(model, state):
        if state.update == stop_at:
            write_checkpoint(tmp_path / f"{len(asked)}", model, state, {})
            asked.append(state.update)

    def request():
        return Request.STOP if training.updates == stop_at else Request.GO_ON

    def report(progress):
        seen.append((progress.updates, progress.metrics))

    training = Training(config, dataset, report, save=save, request=request)
    with pytest.raises(Stopped, match=f"after {stop_at} updates"):
        training.run()
    assert asked
    torch.manual_seed(999)  # a new process's generator stands elsewhere
    model, state, _ = read_checkpoint(tmp_path / f"{len(asked) - 1}")
    again = []
    Training(
        config,
        dataset,
        lambda progress: again.append((progress, weights_of(progress))),
        resume=(model, state),
    ).run()
    assert same_weights(again[-1][1], whole[-1][1])
    steps = [step for step, _ in seen] + [progress.updates for progress, _ in again]
    assert steps == [10, 20, 30, 40], "no evaluation twice, none missing"
    metrics = dict(seen) | {progress.updates: progress.metrics for progress, _ in again}
    for progress, _ in whole:
        assert metrics[progress.updates] == pytest.approx(progress.metrics, rel=1e-6, nan_ok=True)


def test_a_stop_breaks_off_an_evaluation_which_is_made_up_for_later(small_config, gaussian_dataset, tmp_path):
    config, dataset = small_config(), gaussian_dataset(num_train=64, num_val=32)
    calls, seen = [], []

    def request():
        calls.append(training.updates)
        # The first question after update 4 comes from the loop, the next ones from inside the evaluation.
        return Request.STOP if calls.count(4) > 2 else Request.GO_ON

    training = Training(
        config,
        dataset,
        lambda progress: seen.append(progress.updates),
        save=lambda model, state: write_checkpoint(tmp_path / f"{len(calls)}", model, state, {}),
        request=request,
    )
    with pytest.raises(Stopped):
        training.run()
    assert seen == []
    newest = max(tmp_path.iterdir(), key=lambda path: int(path.name))
    model, state, _ = read_checkpoint(newest)
    assert state.update == 4 and state.history == []
    Training(config, dataset, lambda progress: seen.append(progress.updates), resume=(model, state)).run()
    assert seen == [4, 8, 12]


def test_a_checkpoint_is_written_when_it_is_asked_for(small_config, gaussian_dataset):
    config = small_config(training={"num_updates": 30, "num_evaluations": 1})
    saved = []
    training = Training(
        config,
        gaussian_dataset(num_train=64, num_val=16),
        lambda progress: None,
        save=lambda model, state: saved.append((state.update, state.losses)),
        request=lambda: Request.CHECKPOINT if training.updates == 10 else Request.GO_ON,
    )
    training.run()
    assert saved == [(10, 10), (30, 0)]


def test_another_models_weights_are_where_a_training_starts(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=64, num_val=16)
    weights = run(small_config(), dataset)[-1][1]
    tiny = {"num_updates": 1, "learning_rate": 1e-12, "num_evaluations": 1, "warmup_updates": 0}
    started = []
    Training(
        small_config(training=tiny, seed=7),
        dataset,
        lambda progress: started.append(weights_of(progress)),
        initial_weights=weights,
    ).run()
    for name, value in weights.items():
        torch.testing.assert_close(started[0][name], value, atol=1e-9, rtol=0)


def test_accumulated_parts_make_the_same_update(small_config, gaussian_dataset):
    dataset = gaussian_dataset(num_train=64, num_val=16)
    whole, parts = (
        run(small_config(training={"accumulation_steps": steps, "learning_rate": 1e-2}), dataset)[-1][1]
        for steps in (1, 5)
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-3)


def test_flips_mirror_half_of_the_images(small_config, gaussian_dataset, monkeypatch):
    """Images of one side: what the network sees of them mirrored is on the other."""
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
    dataset = Dataset(spec, *(Examples(values) for _ in range(3)))
    seen = []
    config = small_config(network={"kind": "unet", "base_channels": 8, "channel_multipliers": (1,)})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, horizontal_flips=True))
    training = Training(config, dataset, lambda progress: None)
    step = training._learner.step
    monkeypatch.setattr(
        training._learner, "step", lambda update, x_0, *rest: seen.append(x_0) or step(update, x_0, *rest)
    )
    training.run()
    x_0 = torch.cat(seen)
    mirrored = x_0[:, 0, 0, -1] == 1.0
    assert torch.equal(mirrored, x_0[:, 0, 0, 0] == 0.0)
    assert 0.3 < mirrored.float().mean() < 0.7
