"""Which evaluation's weights a training ships, also after it was resumed."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.metrics import BY_ELBO_WINDOW, BY_MSE, metrics_of_best
from diffusion.training.best_evaluation import best_evaluation
from diffusion.training.checkpoints import best_model, read_checkpoint, write_checkpoint
from diffusion.training.loop import Request, Training, TrainingStopped


def best_of(objectives):
    """The best evaluation of a training whose network at evaluation u has the bias u."""
    best, network = None, nn.Linear(1, 1)
    for update, objective in enumerate(objectives):
        with torch.no_grad():
            network.bias.fill_(update)
        best = best_evaluation(best, update, objective, network)
    assert best.weights["bias"].item() == best.update
    return best.update


def per_example(*means, spread=0.0, count=100):
    """Objectives with these means; `spread` is the standard deviation of their differences' examples."""
    rng = np.random.default_rng(0)
    common = 10.0 * rng.normal(size=count)
    noise = rng.normal(size=(len(means), count))
    noise = spread / math.sqrt(2.0) * (noise - noise.mean(axis=1, keepdims=True))
    return [
        MeasuredObjective(mean, per_example=mean + common - common.mean() + own)
        for mean, own in zip(means, noise, strict=True)
    ]


def test_without_errors_the_lowest_objective_is_the_best():
    assert best_of(per_example(0.9, 0.5, 0.7, 0.6)) == 1
    assert best_of([MeasuredObjective(value) for value in (0.9, 0.5, 0.7)]) == 1
    assert best_of([MeasuredObjective(value) for value in (0.9, 0.5, 0.5)]) == 2, "of equal ones the latest"


def test_a_rise_within_its_error_does_not_give_up_the_later_weights():
    """100 examples whose differences have a deviation of 1: the standard error is 0.1."""
    assert best_of(per_example(0.9, 0.5, 0.55, spread=1.0)) == 2
    assert best_of(per_example(0.9, 0.5, 0.65, spread=1.0)) == 1


def test_a_slow_rise_ends_at_the_error_of_the_lowest():
    rises = [0.5 + 0.04 * step for step in range(10)]
    assert best_of(per_example(*rises, spread=1.0)) == 2, "0.08 above the lowest, with an error of 0.1"


def test_a_fall_after_a_rise_does_not_hide_the_lowest():
    """0.54 is lower than the evaluation before it; 0.62 is within an error of it, but not of the lowest."""
    assert best_of(per_example(0.5, 0.58, 0.54, 0.62, spread=1.0)) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_objective_that_is_not_finite_is_never_the_best(bad):
    assert best_of([MeasuredObjective(value) for value in (bad, 0.5, bad)]) == 1
    assert best_of([MeasuredObjective(value) for value in (0.5, bad)]) == 0


def test_only_the_elbo_is_known_per_example():
    metrics = {"objective": 2.0, "val/elbo_window_se": 0.5}
    examples = np.array([1.0, 3.0])
    assert MeasuredObjective.of(BY_ELBO_WINDOW, metrics, examples).per_example is examples
    assert MeasuredObjective.of(BY_MSE, metrics, examples).per_example is None
    unpaired = MeasuredObjective.of(BY_ELBO_WINDOW, metrics, None)
    assert unpaired.minus(unpaired).standard_error == pytest.approx(math.sqrt(0.5))


def test_the_models_metrics_are_those_of_the_best_evaluation_and_what_only_the_last_has():
    evaluations = {
        10: {"objective": 0.5, "best_update": 10},
        20: {"objective": 0.9, "best_update": 10, "sample/distance": 0.1},
    }
    assert metrics_of_best(evaluations) == {"objective": 0.5, "best_update": 10, "sample/distance": 0.1}
    assert metrics_of_best({}) == {}
    assert metrics_of_best({10: {"objective": 0.5}, 20: {"objective": 0.9}}) == {"objective": 0.9}


OBJECTIVES = {10: 0.9, 20: 0.5, 30: 0.7, 40: 0.6}  # by updates


@pytest.fixture
def overfitting(small_config, gaussian_dataset, monkeypatch):
    """Config and data of a training whose measured objective is the lowest after 20 of 40 updates."""
    config = small_config(training={"num_updates": 40, "num_evaluations": 4})
    measure, sample = Evaluator.held_out_losses, Evaluator.sample_metrics
    sampled = []

    def measured(self, network):
        metrics, elbo = measure(self, network)
        value = OBJECTIVES[training.updates]
        elbo = dataclasses.replace(elbo, per_example=np.full(8, value))
        return metrics | {"val/elbo_window": value}, elbo

    def sample_metrics(self, network, *arguments, **settings):
        sampled.append({name: weight.clone() for name, weight in network.state_dict().items()})
        return sample(self, network, *arguments, **settings)

    monkeypatch.setattr(Evaluator, "held_out_losses", measured)
    monkeypatch.setattr(Evaluator, "sample_metrics", sample_metrics)
    dataset = gaussian_dataset(num_train=64, num_val=16)
    training = None

    def make(report, **arguments):
        nonlocal training
        training = Training(config, dataset, report, **arguments)
        return training

    return make, sampled


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stop_at", [10, 20, 30, 40])
def test_the_best_weights_survive_a_stop(overfitting, tmp_path, stop_at):
    make, sampled = overfitting
    at_update, metrics = {}, {}

    def report(result):
        weights = result.model.network.state_dict()
        at_update[result.updates] = {name: value.clone() for name, value in weights.items()}
        metrics[result.updates] = result.metrics

    saved = []

    def save(model, state):
        saved.append(tmp_path / f"{len(saved)}-{state.update}")
        write_checkpoint(saved[-1], model, state, {})

    make(report, save=save).run()
    whole = dict(metrics)
    assert [whole[update]["best_update"] for update in OBJECTIVES] == [10, 20, 20, 20]
    assert [whole[update]["best_objective"] for update in OBJECTIVES] == [0.9, 0.5, 0.5, 0.5]
    assert same_weights(sampled[0], at_update[20]), "samples are drawn from the best weights"
    assert [(folder / "best.safetensors").exists() for folder in saved] == [False, False, True, True]

    request = lambda: Request.STOP if training.updates == stop_at else Request.CONTINUE  # noqa: E731
    training = make(report, save=save, request=request)
    with pytest.raises(TrainingStopped):
        training.run()
    model, state, _ = read_checkpoint(saved[-1])
    # The stop interrupts the evaluation that is due, which is then repeated.
    assert (state.best and state.best.update) == {10: None, 20: 10, 30: 20, 40: 20}[stop_at]
    make(report, resume=(model, state), save=save).run()
    assert metrics == {
        update: pytest.approx(expected, rel=1e-6, nan_ok=True) for update, expected in whole.items()
    }
    assert same_weights(sampled[-1], at_update[20])
    model, state, _ = read_checkpoint(saved[-1])
    shipped = best_model(model, state)
    assert same_weights(shipped.network.state_dict(), at_update[20])
    assert same_weights(model.network.state_dict(), at_update[40]), "the last weights stay, to resume from"


def test_a_checkpoint_of_an_earlier_version_ships_its_own_weights(overfitting, tmp_path):
    make, _ = overfitting
    states = []
    make(lambda _: None, save=lambda model, state: states.append((model, state))).run()
    model, state = states[-1]
    write_checkpoint(tmp_path / "old", model, dataclasses.replace(state, best=None), {})
    model, state, _ = read_checkpoint(tmp_path / "old")
    assert state.best is None and best_model(model, state) is model
