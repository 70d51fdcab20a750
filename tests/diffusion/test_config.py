import dataclasses
import json

import pytest

from diffusion.config import (
    Config,
    DataConfig,
    MetricsConfig,
    NetworkConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from diffusion.errors import InputError
from diffusion.presets import preset

REFUSED = [
    (DataConfig, {"name": "mnits"}, "--data", "mnits"),
    (DataConfig, {"val_fraction": 0.5}, "--data.val-fraction", "0.5"),
    (DataConfig, {"val_fraction": -0.1}, "--data.val-fraction", "-0.1"),
    (DataConfig, {"test_fraction": 0.0}, "--data.test-fraction", "0.0"),
    (DataConfig, {"test_fraction": float("nan")}, "--data.test-fraction", "nan"),
    (ScheduleConfig, {"kind": "cubic"}, "--schedule.kind", "cubic"),
    (ScheduleConfig, {"num_train_timesteps": 0}, "--schedule.num-train-timesteps", "0"),
    (ScheduleConfig, {"num_train_timesteps": -5}, "--schedule.num-train-timesteps", "-5"),
    (ScheduleConfig, {"num_train_timesteps": 100_001}, "--schedule.num-train-timesteps", "100001"),
    (ScheduleConfig, {"num_train_timesteps": 10.5}, "--schedule.num-train-timesteps", "10.5"),
    (ScheduleConfig, {"beta_start": 0.0}, "--schedule.beta-start", "0.0"),
    (ScheduleConfig, {"beta_start": -0.25}, "--schedule.beta-start", "-0.25"),
    (ScheduleConfig, {"beta_end": 1.0}, "--schedule.beta-end", "1.0"),
    (ScheduleConfig, {"beta_end": 1.5}, "--schedule.beta-end", "1.5"),
    (ScheduleConfig, {"beta_end": float("nan")}, "--schedule.beta-end", "nan"),
    (ScheduleConfig, {"beta_start": 0.3, "beta_end": 0.02}, "--schedule.beta-start", "0.3"),
    (ScheduleConfig, {"beta_start": 0.3, "beta_end": 0.02}, "--schedule.beta-end", "0.02"),
    (NetworkConfig, {"hidden_size": 0}, "--network.hidden-size", "0"),
    (NetworkConfig, {"num_blocks": 0}, "--network.num-blocks", "0"),
    (NetworkConfig, {"dropout": 1.0}, "--network.dropout", "1.0"),
    (NetworkConfig, {"dropout": -0.1}, "--network.dropout", "-0.1"),
    (NetworkConfig, {"time_embedding_size": 1}, "--network.time-embedding-size", "1"),
    (NetworkConfig, {"data_embedding_size": 1}, "--network.data-embedding-size", "1"),
    (NetworkConfig, {"data_embedding_scale": 0.0}, "--network.data-embedding-scale", "0.0"),
    (NetworkConfig, {"data_embedding_scale": float("inf")}, "--network.data-embedding-scale", "inf"),
    (NetworkConfig, {"prediction_type": "score"}, "--network.prediction-type", "score"),
    (TrainingConfig, {"loss": "l3"}, "--training.loss", "l3"),
    (TrainingConfig, {"weighting": "snr"}, "--training.weighting", "snr"),
    (TrainingConfig, {"weighting": "vlb", "loss": "huber"}, "--training.loss", "huber"),
    (TrainingConfig, {"min_snr_gamma": 0.0}, "--training.min-snr-gamma", "0.0"),
    (TrainingConfig, {"min_snr_gamma": float("nan")}, "--training.min-snr-gamma", "nan"),
    (TrainingConfig, {"timestep_sampling": "even"}, "--training.timestep-sampling", "even"),
    (
        ScheduleConfig,
        {"num_train_timesteps": 1, "zero_terminal_snr": True},
        "--schedule.num-train-timesteps",
        "2 or more",
    ),
    (Config, {"schedule": ScheduleConfig(zero_terminal_snr=True)}, "--schedule.zero-terminal-snr", "v_pred"),
    (TrainingConfig, {"num_updates": 0}, "--training.num-updates", "0"),
    (TrainingConfig, {"batch_size": 0}, "--training.batch-size", "0"),
    (TrainingConfig, {"learning_rate": 0.0}, "--training.learning-rate", "0.0"),
    (TrainingConfig, {"learning_rate": 2.0}, "--training.learning-rate", "2.0"),
    (TrainingConfig, {"learning_rate": float("nan")}, "--training.learning-rate", "nan"),
    (TrainingConfig, {"weight_decay": -1.0}, "--training.weight-decay", "-1.0"),
    (TrainingConfig, {"warmup_updates": -1}, "--training.warmup-updates", "-1"),
    (TrainingConfig, {"max_gradient_norm": 0.0}, "--training.max-gradient-norm", "0.0"),
    (TrainingConfig, {"ema_decay": 1.0}, "--training.ema-decay", "1.0"),
    (TrainingConfig, {"ema_decay": -0.1}, "--training.ema-decay", "-0.1"),
    (TrainingConfig, {"num_evaluations": 0}, "--training.num-evaluations", "0"),
    (SamplerConfig, {"name": "euler"}, "--sampler.name", "euler"),
    (SamplerConfig, {"variance": "learned"}, "--sampler.variance", "learned"),
    (SamplerConfig, {"spacing": "even"}, "--sampler.spacing", "even"),
    (SamplerConfig, {"num_steps": 0}, "--sampler.num-steps", "0"),
    (SamplerConfig, {"eta": 1.5}, "--sampler.eta", "1.5"),
    (SamplerConfig, {"eta": -0.5}, "--sampler.eta", "-0.5"),
    (SamplerConfig, {"name": "ddpm", "eta": 0.5}, "--sampler.eta", "0.5"),
    (TrainingConfig, {"batch_size": 10**20}, "--training.batch-size", "100000000000000000000"),
    (MetricsConfig, {"seed": 2**32}, "--metrics.seed", "4294967296"),
    (MetricsConfig, {"num_samples": 1}, "--metrics.num-samples", "1"),
    (MetricsConfig, {"num_examples": 1}, "--metrics.num-examples", "1"),
]


def case_name(case):
    section, values, _, _ = case
    return f"{section.__name__}-{'-'.join(f'{name}={value}' for name, value in values.items())}"


@pytest.mark.parametrize(("section", "values", "flag", "value"), REFUSED, ids=map(case_name, REFUSED))
def test_an_invalid_value_is_refused_at_construction_in_one_line_with_flag_and_value(
    section, values, flag, value
):
    with pytest.raises(InputError) as caught:
        section(**values)
    message = str(caught.value)
    assert flag in message
    assert value in message
    assert "\n" not in message


def test_the_smallest_and_largest_allowed_values_pass():
    ScheduleConfig(num_train_timesteps=1, beta_start=0.5, beta_end=0.5)
    NetworkConfig(hidden_size=1, num_blocks=1, time_embedding_size=2, data_embedding_size=2, dropout=0.0)
    TrainingConfig(num_updates=1, num_evaluations=1, batch_size=1, warmup_updates=0, ema_decay=0.0)
    SamplerConfig(name="ddim", num_steps=1, eta=1.0)
    assert SamplerConfig(eta=0.0).eta == 0.0


@pytest.mark.parametrize("data_name", ["digits", "heart"])
def test_presets_name_their_data_and_can_be_trained(data_name):
    config = preset(data_name)
    assert config.data.name == data_name
    assert config.schedule.infeasible_reason() is None
    assert config.sampler.num_steps <= config.schedule.num_train_timesteps


def test_an_unknown_preset_is_refused_by_name():
    with pytest.raises(InputError, match="mnits"):
        preset("mnits")


@pytest.mark.parametrize("data_name", ["digits", "heart"])
def test_dict_and_json_round_trips_are_the_identity(data_name):
    config = preset(data_name).with_values({"seed": 7, "schedule.beta_end": 0.05, "sampler.clip": False})
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_flat_names_every_leaf_and_sets_it_again():
    config = preset("heart")
    flat = config.flat()
    assert flat["schedule.beta_start"] == config.schedule.beta_start
    assert flat["seed"] == config.seed
    leaves = sum(
        len(dataclasses.fields(value)) if dataclasses.is_dataclass(value) else 1
        for value in (getattr(config, field.name) for field in dataclasses.fields(config))
    )
    assert len(flat) == leaves
    assert not any(isinstance(value, dict) for value in flat.values())
    assert preset("digits").with_values(flat) == config


def test_with_values_changes_the_named_leaves_alone_and_leaves_the_original():
    config = Config()
    changed = config.with_values({"schedule.num_train_timesteps": 77, "training.learning_rate": 0.01})
    difference = {name for name, value in changed.flat().items() if value != config.flat()[name]}
    assert difference == {"schedule.num_train_timesteps", "training.learning_rate"}
    assert config == Config()
    assert config.with_values({}) == config


@pytest.mark.parametrize(
    "name", ["schedule.bata_start", "shcedule.beta_start", "sede", "seed.x", "schedule.kind.x"]
)
def test_with_values_refuses_an_unknown_name_and_repeats_it(name):
    with pytest.raises(InputError) as caught:
        Config().with_values({name: 1})
    assert name.split(".")[-1] in str(caught.value) or name.split(".")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_with_values_validates():
    with pytest.raises(InputError, match="--schedule.beta-end 1.5"):
        Config().with_values({"schedule.beta_end": 1.5})


@pytest.mark.parametrize(
    "tree",
    [{"shcedule": {}}, {"schedule": {"bata_start": 0.1}}, {"schedule": 5}, {"training": {"batch_size": "x"}}],
)
def test_from_dict_refuses_malformed_trees_in_one_line(tree):
    with pytest.raises(InputError) as caught:
        Config.from_dict(tree)
    assert "\n" not in str(caught.value)


def test_configs_are_frozen_and_equal_by_value():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.schedule.beta_end = 0.5
    assert config == Config()
    assert hash(config) == hash(Config())


def test_the_built_schedule_is_the_one_described():
    linear = ScheduleConfig(kind="linear", num_train_timesteps=30, beta_start=0.001, beta_end=0.3).build()
    assert linear.num_train_timesteps == 30
    assert (linear.betas[0], linear.betas[-1]) == (0.001, 0.3)
    cosine = ScheduleConfig(kind="cosine", num_train_timesteps=30).build()
    assert cosine.num_train_timesteps == 30
    assert cosine.betas[-1] == 0.999


def test_a_schedule_that_leaves_no_signal_is_infeasible_and_the_reason_names_alphas_cumprod():
    reason = ScheduleConfig(num_train_timesteps=1000, beta_start=0.5, beta_end=0.9).infeasible_reason()
    assert "alphas_cumprod_T" in reason
    assert ScheduleConfig(num_train_timesteps=1000).infeasible_reason() is None
    assert ScheduleConfig(kind="cosine", num_train_timesteps=1000).infeasible_reason() is None


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_with_zero_terminal_snr_sample_and_v_prediction_are_feasible(prediction_type):
    config = Config(
        schedule=ScheduleConfig(zero_terminal_snr=True),
        network=NetworkConfig(prediction_type=prediction_type),
    )
    assert config.prediction_type == prediction_type
    assert config.schedule.build().alphas_cumprod[-1] == 0.0
    assert config.infeasible_reason() is None
    assert "v_prediction" in config.schedule.infeasible_reason()


def test_betas_that_cannot_be_rescaled_are_infeasible_with_a_reason():
    schedule = ScheduleConfig(beta_start=1e-20, beta_end=1e-20, zero_terminal_snr=True)
    assert "alphas_cumprod goes from" in schedule.infeasible_reason("v_prediction")


def test_a_config_of_an_older_version_is_read_with_the_defaults_it_was_trained_with():
    """Older files lack these fields; their models predict epsilon, trained by L_simple at uniform t."""
    tree = preset("digits").to_dict()
    for section, name in (
        ("network", "prediction_type"),
        ("training", "loss"),
        ("training", "weighting"),
        ("training", "min_snr_gamma"),
        ("training", "timestep_sampling"),
        ("schedule", "zero_terminal_snr"),
    ):
        del tree[section][name]
    config = Config.from_dict(tree)
    assert config == preset("digits")
    tree["network"] = {
        name: value
        for name, value in tree["network"].items()
        if name not in ("input_activation", "output_norm")
    }
    network = Config.from_dict(tree).network
    assert (network.input_activation, network.output_norm) == (False, False), "but new models have both"
    assert config.prediction_type == "epsilon"
    training = config.training
    assert (training.loss, training.weighting, training.timestep_sampling) == ("l2", "simple", "uniform")


def test_schedules_that_keep_some_signal_are_feasible():
    """Schedules with alphas_cumprod_T of 0.2 to 0.4 can produce the best models of a sweep."""
    config = ScheduleConfig(num_train_timesteps=100, beta_start=1e-4, beta_end=0.025)
    assert 0.2 < config.build().alphas_cumprod[-1] < 0.4
    assert config.infeasible_reason() is None


def test_a_schedule_with_coefficients_that_are_not_finite_is_refused_or_infeasible():
    """Betas below the float64 resolution make 1 - alphas_cumprod 0, and the posterior 0/0."""
    try:
        reason = ScheduleConfig(num_train_timesteps=10, beta_start=1e-20, beta_end=1e-20).infeasible_reason()
    except InputError as error:
        reason = str(error)
    assert reason


def test_only_presets_have_a_finished_models_sampler_measured():
    """A config that somebody has written keeps the sampler that it names."""
    assert not Config().metrics.choose_sampler
    assert all(preset(name).metrics.choose_sampler for name in ("heart", "digits"))
