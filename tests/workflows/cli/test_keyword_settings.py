"""Settings from Python give the options of the same command line; bad ones are refused in one line."""

from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from diffusion import Config, InputError, NetworkConfig, preset
from workflows import api
from workflows.cli.keyword_settings import (
    in_python,
    section_types,
    setting_hints,
    train_request,
    tune_request,
)
from workflows.cli.parsing import parse_train_options, parse_tune_options
from workflows.cli.run_options import TrainOptions
from workflows.cli.search_space import SearchSpace
from workflows.cli.tune_options import TuneOptions


def tune_options(data, settings):
    return tune_request(data, None, settings).open_data()[1]


def train_options(data, settings, config=None):
    return train_request(data, None, config, settings).open_data()[1]


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, ""),
        ({"num_trials": np.int64(3), "output_dir": Path("x")}, "--num-trials 3 --output-dir x"),
        ({"time_budget": "1h30m"}, "--time-budget 1h30m"),
        ({"time_budget": 90}, "--time-budget 90s"),
        ({"training": {"num_epochs": 2, "batch_size": 8}}, "--training.num-epochs 2 --training.batch-size 8"),
        ({"training.num_updates": 5, "sampler": {"eta": 0}}, "--training.num-updates 5 --sampler.eta 0"),
        ({"search": {"beta_end": 0.1, "num_train_timesteps": [10, 20]}, "conditional": True},
         "--search.beta-end 0.1 --search.num-train-timesteps 10 20 --conditional"),
        ({"network": {"hidden_size": 8, "raw_coordinates": False}},
         "--network.hidden-size 8 --network.no-raw-coordinates"),
        ({"search": SearchSpace(learning_rate=(0.001,))}, "--search.learning-rate 0.001"),
        ({"progress": False, "objective": "val/mse"}, "--no-progress --objective val/mse"),
    ],
)  # fmt: skip
def test_a_sweep_has_the_options_of_the_same_command_line(settings, arguments):
    expected = parse_tune_options(["--data", "heart", *arguments.split()]).open_data()[1]
    assert tune_options("heart", settings) == expected


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"num_workers": "2:8", "seed": 4}, "--num-workers 2:8 --seed 4"),
        (
            {"schedule": {"kind": "cosine"}, "keep_checkpoints": 1},
            "--schedule.kind cosine --keep-checkpoints 1",
        ),
    ],
)
def test_a_training_has_the_options_of_the_same_command_line(settings, arguments):
    expected = parse_train_options(["--data", "digits", *arguments.split()]).open_data()[1]
    assert train_options("digits", settings) == expected


def test_a_whole_section_sets_all_its_values():
    network = NetworkConfig(hidden_size=8)  # other defaults than the preset's
    assert train_options("heart", {"network": network}).network == network
    assert tune_options("heart", {"network": network}).network == network, (
        "what is searched is left at its default"
    )


def test_a_config_replaces_the_presets_except_for_the_data():
    config = preset("digits").with_values({"training.num_updates": 7, "seed": 3, "data.val_fraction": 0.3})
    options = train_options("heart", {"training": {"batch_size": 9}}, config)
    expected = config.with_values({"training.batch_size": 9}).flat()
    for name, value in options.config().flat().items():
        assert value == (preset("heart").flat() if name.startswith("data.") else expected)[name], name


def test_a_number_of_updates_replaces_the_configs_number_of_epochs():
    config = preset("digits").with_values({"training.num_epochs": 7.0})
    assert train_options("digits", {}, config).training.num_epochs == 7.0
    training = train_options("digits", {"training": {"num_updates": 9}}, config).training
    assert (training.num_updates, training.num_epochs) == (9, None)


def test_data_in_memory_have_their_own_preset():
    source, options = tune_request(np.zeros((50, 8, 8), np.uint8), None, {}).open_data()
    assert (options.data, source.kind) == ("memory://array", "image")
    assert options.network == preset("digits").network and options.num_trials == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_trails": 3}, "num_trails: no setting has that name; did you mean num_trials?"),
        ({"hidden_size": 3}, "it is network={'hidden_size': ...} or search={'hidden_size': ...}"),
        ({"network": {"hiden_size": 3}}, "network.hiden_size: no setting has that name; did you mean net"),
        ({"num_trials": "four"}, "num_trials 'four': give a whole number"),
        ({"num_trials": True}, "num_trials True: give a whole number"),
        ({"num_trials": 0}, "num_trials 0: give 1 or more"),
        ({"training": {"batch_size": 0.5}}, "training.batch_size 0.5: give a whole number"),
        ({"training": 3}, "training 3: give a mapping, such as {'num_updates': ...}, or a TrainingConfig"),
        ({"sampler": {"spacing": "odd"}}, "sampler.spacing 'odd': give one of 'leading', "),
        ({"schedule": {"beta_end": 0.1}}, "use search.beta_end with one value"),
        ({"search": {"beta_end": (0.2, 0.1)}}, "search.beta_end 0.2 0.1: give one value"),
        ({"training": {"num_updates": 3, "num_epochs": 2}}, "both set the length"),
        ({"time_budget": -3}, "time_budget -3s: give hours"),
        ({"dry_run": True}, "dry_run: no setting has that name"),
        ({"resume": True, "name": "none", "output_dir": "nowhere"}, "resume name none: no such run"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line_without_flags(settings, message):
    with pytest.raises(InputError) as caught:
        api.run_sweep("heart", **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "--" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("data", ["no-such-set", Path("nowhere.csv"), 7])
def test_data_that_do_not_exist_are_refused(data):
    with pytest.raises(InputError, match="data"):
        api.run_training(data)


def test_labels_are_for_data_in_memory():
    with pytest.raises(InputError, match="labels: data digits are not in memory"):
        api.run_training("digits", labels=[1])


def test_flags_in_texts_become_settings():
    assert (
        in_python("--num-workers 2:1 (--network.hidden-size): a-b --x")
        == "num_workers 2:1 (network.hidden_size): a-b --x"
    )


@pytest.mark.parametrize(
    ("function", "settings", "options"),
    [(api.run_sweep, api.SweepSettings, TuneOptions), (api.run_training, api.TrainingSettings, TrainOptions)],
)
def test_every_setting_is_typed_and_documented(function, settings, options):
    extra = {"labels"} | ({"config"} if options is TrainOptions else set())
    assert set(get_type_hints(settings)) == {*setting_hints(options), *section_types(options), *extra}
    documented = function.__doc__.splitlines()
    for name in (*setting_hints(options), *extra):
        assert any(line.strip().startswith(f"{name}: ") for line in documented), name
    for section, part in section_types(options).items():
        start = documented.index(f"    {section}: a mapping of these, or {part.__name__}(...)")
        for field in fields(part):
            assert any(line.startswith(f"        {field.name}: ") for line in documented[start:]), field.name
    assert {name.split(".")[0] for name in Config().flat()} - {"data", "seed"} <= set(section_types(options))
