"""What a sweep searches and what it holds fixed."""

import pytest

from diffusion.config import Config
from diffusion.errors import InputError
from workflows.search_space import SearchSpace, flag_of_searched, is_range


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


def test_parameters_that_nothing_uses_are_not_searched():
    _, images = SearchSpace().fixed_and_searched(Config(), "image")
    assert "network.data_embedding_size" not in images
    cosine = Config().with_values({"schedule.kind": "cosine"})
    fixed, searched = SearchSpace().fixed_and_searched(cosine, "points")
    assert not {name for name in (*fixed, *searched) if "beta" in name}


def test_every_searched_name_is_a_parameter_of_the_config():
    fixed, searched = SearchSpace().fixed_and_searched(Config(), "points")
    assert set(fixed) | set(searched) <= set(Config().flat())


def test_each_combination_of_the_default_space_is_a_valid_config():
    _, searched = SearchSpace().fixed_and_searched(Config(), "points")
    for pick in (0, -1):
        picked = {name: values[pick] for name, values in searched.items()}
        flat = Config().with_values(picked).flat()
        assert {name: flat[name] for name in picked} == picked


def test_betas_whose_ranges_overlap_are_refused():
    with pytest.raises(InputError, match=r"0\.01.*0\.005"):
        SearchSpace(beta_start=(1e-5, 0.01), beta_end=(0.005, 0.3))


def test_ordinary_flags_of_searched_parameters_point_to_their_search_flag():
    assert flag_of_searched("--schedule.beta-start") == "--search.beta-start"
    assert flag_of_searched("--schedule.kind") is None
    assert is_range("training.learning_rate") and not is_range("schedule.num_train_timesteps")
