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


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
@pytest.mark.parametrize("begun", [0, 1, 3, 12, 13, 19])
def test_a_sweep_draws_the_same_however_often_it_is_resumed(tmp_path, algorithm, begun):
    points = [{"training.learning_rate": 1e-3 * n, "schedule.num_train_timesteps": 50} for n in (1, 2)]

    def run(folder, stops):
        """Parameters of 20 trials, one after the other, of a sweep that is resumed before some of them."""
        folder.mkdir()
        found, search = [], searcher(TrialRecords(folder), algorithm, points)
        for number in range(20):
            if number in stops:
                search = searcher(TrialRecords(folder), algorithm, points)
            records = TrialRecords(folder)
            found.append(search.suggest(f"t{number}"))
            objective = 1 + abs(np.log(found[-1]["training.learning_rate"] / 1e-3))
            records.start(f"t{number}", found[-1])
            records.add_evaluation(f"t{number}", 10, {"objective": objective})
            records.end(f"t{number}", "finished", "", 1.0)
            search.on_trial_complete(f"t{number}", {"objective": objective})
        return found

    uninterrupted = run(tmp_path / "a", ())
    assert run(tmp_path / "b", (begun,)) == uninterrupted
    assert run(tmp_path / "c", range(begun, 20)) == uninterrupted
    assert uninterrupted[:2] == points
    drawn = [point["training.learning_rate"] for point in uninterrupted[2:]]
    assert len(set(drawn)) == len(drawn)


def test_a_trial_that_had_not_ended_is_repeated_before_initial_points_that_had_not_begun(tmp_path):
    points = [{"training.learning_rate": 1e-3 * n, "schedule.num_train_timesteps": 50} for n in (1, 2, 3)]
    records = TrialRecords(tmp_path)
    for number in range(2):
        records.start(f"t{number}", points[number])
    records.add_evaluation("t0", 10, {"objective": 1.0})
    records.end("t0", "finished", "", 1.0)
    search = searcher(TrialRecords(tmp_path), initial_points=points)
    assert [search.suggest(str(number)) for number in range(2)] == points[1:]
    assert search.suggest("2") not in points


def test_sweeps_with_other_seeds_share_no_draw(tmp_path):
    drawn = []
    for seed in (0, 1, 2):
        search = build_searcher(Search(SPACE, "random", seed, 8), TrialRecords(tmp_path), Config())
        drawn += [search.suggest(str(number))["training.learning_rate"] for number in range(8)]
    assert len(set(drawn)) == 24


def test_failed_trials_give_the_search_no_objective(tmp_path):
    records = TrialRecords(tmp_path)
    for number, status in enumerate(("failed", "pruned", "diverged")):
        records.start(f"t{number}", {"training.learning_rate": 1e-3, "schedule.num_train_timesteps": 50})
        records.end(f"t{number}", status, "", 0.0)
    study = searcher(records)._ot_study
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3


def test_only_trials_that_were_trained_and_ended_well_give_the_search_an_objective(tmp_path):
    """A training that diverged has good objectives of earlier, which its parameters do not deserve."""
    records = TrialRecords(tmp_path)
    expected = {"finished": "COMPLETE", "stopped": "COMPLETE", "diverged": "FAIL", "failed": "FAIL"}
    for number, status in enumerate(expected):
        records.start(f"t{number}", {"training.learning_rate": 1e-3, "schedule.num_train_timesteps": 50})
        records.add_evaluation(f"t{number}", 10, {"objective": 1.0})
        records.end(f"t{number}", status, "", 1.0)
    study = searcher(records)._ot_study
    assert [trial.state.name for trial in study.trials] == list(expected.values())


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
    states = [trial.state.name for trial in search._ot_study.trials]
    assert states.count("COMPLETE") == count
    assert states.count("FAIL") == len(states) - count, "discarded draws are failed trials of Optuna's"
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
