"""The search space: searched and fixed parameters, and values to start from."""

import json

import pytest

from diffusion.config import Config
from diffusion.errors import InputError
from workflows.cli.search_space import SearchSpace, contains, is_range, search_flag_for, start_values


def test_one_value_is_fixed_and_more_are_searched():
    space = SearchSpace(num_train_timesteps=(50,), beta_end=(0.1, 0.1))
    fixed, searched = space.fixed_and_searched(Config(), "points")
    assert fixed == {"schedule.num_train_timesteps": 50, "schedule.beta_end": 0.1}
    assert set(searched) == {
        "schedule.beta_start",
        "network.time_embedding_size",
        "network.data_embedding_size",
        "training.learning_rate",
    }


def test_unused_parameters_are_not_searched():
    _, images = SearchSpace().fixed_and_searched(Config(), "image")
    assert "network.data_embedding_size" not in images
    cosine = Config().with_values({"schedule.kind": "cosine"})
    fixed, searched = SearchSpace().fixed_and_searched(cosine, "points")
    assert not {name for name in (*fixed, *searched) if "beta" in name}


def test_every_searched_name_is_a_parameter_of_the_config():
    fixed, searched = SearchSpace().fixed_and_searched(Config(), "points")
    assert set(fixed) | set(searched) <= set(Config().flat())


def test_the_corners_of_the_default_space_are_valid_configs():
    _, searched = SearchSpace().fixed_and_searched(Config(), "points")
    for index in (0, -1):
        point = {name: values[index] for name, values in searched.items()}
        flat = Config().with_values(point).flat()
        assert {name: flat[name] for name in point} == point


def test_betas_whose_ranges_overlap_are_refused():
    with pytest.raises(InputError, match=r"0\.01.*0\.005"):
        SearchSpace(beta_start=(1e-5, 0.01), beta_end=(0.005, 0.3))


def test_ordinary_flags_of_searched_parameters_point_to_their_search_flag():
    assert search_flag_for("--schedule.beta-start") == "--search.beta-start"
    assert search_flag_for("--schedule.kind") is None
    assert is_range("training.learning_rate") and not is_range("schedule.num_train_timesteps")


def test_parameters_without_values_keep_those_of_the_config():
    fixed, searched = SearchSpace().fixed_and_searched(Config(), "points")
    assert not {"schedule.kind", "network.hidden_size", "network.prediction_type"} & {*fixed, *searched}
    space = SearchSpace(
        schedule_kind=("linear", "cosine"), hidden_size=(32, 64), num_blocks=(2,), prediction_type=("sample",)
    )
    fixed, searched = space.fixed_and_searched(Config(), "points")
    assert searched["schedule.kind"] == ("linear", "cosine")
    assert searched["network.hidden_size"] == (32, 64)
    assert (fixed["network.num_blocks"], fixed["network.prediction_type"]) == (2, "sample")


def test_betas_are_searched_if_any_kind_of_schedule_uses_them():
    for kinds, used in ((("cosine", "linear"), True), (("cosine", "constant"), False), (("cosine",), False)):
        _, searched = SearchSpace(schedule_kind=kinds).fixed_and_searched(Config(), "points")
        assert ("schedule.beta_end" in searched) is used


def test_parameters_of_the_other_kind_of_network_are_refused():
    with pytest.raises(InputError, match="--search.base-channels.*mlp"):
        SearchSpace(base_channels=(8, 16)).fixed_and_searched(Config(), "image")


@pytest.fixture
def searched():
    return {"schedule.beta_end": (0.01, 0.3), "schedule.num_train_timesteps": (50, 100)}


def test_a_space_contains_points_within_its_ranges_and_choices(searched):
    inside = {"schedule.beta_end": 0.02, "schedule.num_train_timesteps": 100, "seed": 3}
    assert contains(searched, inside)
    assert not contains(searched, inside | {"schedule.beta_end": 0.4})
    assert not contains(searched, inside | {"schedule.num_train_timesteps": 75})


def test_a_sweep_starts_from_a_trials_config(searched, tmp_path):
    values = {"schedule.beta_end": 0.2, "schedule.num_train_timesteps": 50}
    tree = Config().with_values(values).to_dict()
    for content in (tree, {"config": tree, "data": {}}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        for path in (tmp_path, tmp_path / "config.json"):
            assert start_values(str(path), searched) == values


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["--start-from", "config.json"]),
        ("{", ["--start-from", "cannot be read"]),
        ("[1]", ["--start-from"]),
        ('{"schedule": {"beta_end": 7}}', ["--start-from", "beta-end"]),
        ('{"schedule": {"beta_end": 0.5}}', ["--start-from", "schedule.beta_end 0.5", "--search.beta-end"]),
    ],
)
def test_a_bad_start_from_is_refused_in_one_line(content, words, searched, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        start_values(str(tmp_path), searched)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)
