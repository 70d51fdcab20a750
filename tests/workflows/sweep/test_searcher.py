"""The search: what the next trial tries, in new sweeps and in resumed ones."""

import numpy as np
import pytest

from diffusion.config import Config
from diffusion.process.schedule_checks import wasted_fraction
from workflows.sweep.searcher import Search, build_searcher
from workflows.sweep.trial_records import TrialRecords

SPACE = {"training.learning_rate": (1e-4, 1e-2), "schedule.num_train_timesteps": (50, 100)}


def searcher(records, algorithm="tpe", initial_points=()):
    return build_searcher(Search(SPACE, algorithm, 0, 8, None, initial_points), records, Config())


def test_the_initial_points_are_tried_before_the_search_suggests_its_own(tmp_path):
    points = [{"training.learning_rate": 1e-3 * n, "schedule.num_train_timesteps": 50} for n in (1, 2)]
    search = searcher(TrialRecords(tmp_path), initial_points=points)
    suggested = [search.suggest(str(number)) for number in range(4)]
    assert suggested[:2] == points
    assert all(1e-4 <= point["training.learning_rate"] <= 1e-2 for point in suggested)


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_a_resumed_search_uses_earlier_results_and_repeats_no_draw(tmp_path, algorithm):
    records = TrialRecords(tmp_path)
    before = searcher(records, algorithm)
    for number in range(12):
        point = before.suggest(str(number))
        records.start(f"t{number}", point)
        if number < 11:
            records.add_evaluation(f"t{number}", 10, {"objective": point["training.learning_rate"]})
            records.end(f"t{number}", "finished", "", 1.0)
    after = searcher(TrialRecords(tmp_path), algorithm, initial_points=[{"never": 0}])
    assert after.suggest("a") == {name: records["t11"].params[name] for name in SPACE}, (
        "the unfinished trial runs first"
    )
    suggested = [after.suggest(str(number))["training.learning_rate"] for number in range(6)]
    assert not set(suggested) & {record.params["training.learning_rate"] for record in records}
    if algorithm == "tpe":  # in the eleven completed trials, lower was better
        assert np.median(suggested) < 2e-3


def test_failed_trials_give_the_search_no_objective(tmp_path):
    records = TrialRecords(tmp_path)
    for number, status in enumerate(("failed", "pruned", "diverged")):
        records.start(f"t{number}", {"training.learning_rate": 1e-3, "schedule.num_train_timesteps": 50})
        records.end(f"t{number}", status, "", 0.0)
    study = searcher(records)._ot_study
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3


def test_ranges_are_searched_on_a_logarithmic_scale(tmp_path):
    """From 1e-4 to 1e-2 the median is 1e-3 on a logarithmic scale, and 5e-3 on a linear one."""
    search = searcher(TrialRecords(tmp_path), "random")
    drawn = [search.suggest(str(number))["training.learning_rate"] for number in range(60)]
    assert 5e-4 < np.median(drawn) < 2e-3
    assert min(drawn) >= 1e-4 and max(drawn) <= 1e-2


SCHEDULES = {"schedule.num_train_timesteps": (50, 500, 1000), "schedule.beta_end": (5e-3, 0.3)}


def suggestions(tmp_path, space, count, algorithm="random", initial_points=()):
    records = TrialRecords(tmp_path)
    search = build_searcher(Search(space, algorithm, 0, 99, None, initial_points), records, Config())
    found = [search.suggest(f"t{number}") for number in range(count)]
    assert [search.suggest(f"t{number}") for number in range(count)] == found, "a trial keeps its values"
    for number in range(count):
        search.on_trial_complete(f"t{number}", {"objective": 1.0})
    assert sum(trial.state.name == "COMPLETE" for trial in search._ot_study.trials) == count
    return [wasted_fraction(Config().with_values(values).schedule.build()) for values in found], found


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_schedules_that_waste_most_timesteps_are_not_suggested(tmp_path, algorithm):
    wasted, found = suggestions(tmp_path, SCHEDULES, 60, algorithm)
    assert (
        max(wasted)
        <= 0.5
        < wasted_fraction(
            Config().with_values({name: values[-1] for name, values in SCHEDULES.items()}).schedule.build()
        )
    )
    assert {values["schedule.num_train_timesteps"] for values in found} == {50, 500, 1000}
    assert max(wasted) > 0.3 and max(values["schedule.beta_end"] for values in found) > 0.2


def test_a_space_of_such_schedules_alone_is_searched_nevertheless(tmp_path):
    wasted, _ = suggestions(
        tmp_path, {"schedule.num_train_timesteps": (900, 1000), "schedule.beta_end": (0.2, 0.3)}, 3
    )
    assert min(wasted) > 0.5


def test_given_points_are_tried_as_they_are(tmp_path):
    point = {"schedule.num_train_timesteps": 1000, "schedule.beta_end": 0.3}
    wasted, found = suggestions(tmp_path, SCHEDULES, 8, initial_points=[point])
    assert found[0] == point and wasted[0] > 0.5 >= max(wasted[1:])
