import numpy as np
import pandas as pd
import pytest

from benchmarks import judgement_report
from benchmarks.judgement_data import POINTS, coloured
from benchmarks.judgement_report import (
    agreement,
    champion,
    finished,
    positions,
    recorded,
    resampled_sweeps,
    write_report,
)
from benchmarks.judgement_truth import DigitFeatures, of_pictures, of_points


def rows(count, seed, *, scale=1.0, weight=0.3, noise=0.05):
    """Two arcs; planted differences are those of their scale, of the weight of one, and of their noise."""
    rng = np.random.default_rng(seed)
    angle = np.pi * rng.random(count)
    side = np.where(rng.random(count) < weight, 1.0, -1.0)
    arcs = np.stack([np.cos(angle) + 0.5 * side, side * np.sin(angle)], axis=1)
    return scale * (arcs + noise * rng.standard_normal((count, 2)))


@pytest.fixture(scope="module", name="equal")
def _equal():
    return of_points(rows(1500, 2), rows(1500, 1))


@pytest.mark.parametrize(
    "difference",
    [{"scale": 1.1}, {"weight": 0.4}, {"noise": 0.1}, {"noise": 0.02}],
    ids=lambda difference: "{}={}".format(*next(iter(difference.items()))),
)
def test_every_yardstick_of_points_sees_planted_differences(difference, equal):
    planted = of_points(rows(1500, 2, **difference), rows(1500, 1))
    for name, value in planted.items():
        assert value > equal[name], name


def test_samples_that_are_not_finite_are_judged_as_far_away():
    fresh = rows(400, 1)
    broken = rows(400, 2)
    broken[:200] = np.nan
    found = of_points(broken, fresh)
    assert all(np.isfinite(value) for value in found.values())
    assert found["trees"] > 0.7


def blobs(count, seed):
    """Bright squares at one of two places, as many classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.normal(20.0, 8.0, (count, 1, 14, 14))
    images[labels == 0, :, 2:6, 2:6] += 150.0
    images[labels == 1, :, 8:12, 8:12] += 150.0
    return images.clip(0, 255).astype(np.uint8), labels


def test_the_yardsticks_of_pictures_see_wrong_colours_and_noise():
    other, labels = blobs(120, 0)
    features = DigitFeatures(coloured(other, np.random.default_rng(3)), labels, epochs=1)
    equal, fresh = (coloured(blobs(120, seed)[0], np.random.default_rng(seed)) for seed in (1, 2))
    saturated = (equal.astype(float) * np.array([1.6, 1.0, 0.5])[:, None, None]).clip(0, 255).astype(np.uint8)
    noise = np.random.default_rng(4).integers(0, 256, equal.shape, dtype=np.uint8)
    same, wrong, worst = (of_pictures(each, fresh, features) for each in (equal, saturated, noise))
    for name in ("trees", "neighbours", "mean_colour"):
        assert same[name] < wrong[name], name
    for name in same:
        assert same[name] < worst[name], name


def test_every_law_gives_different_rows_for_different_seeds():
    for name, law in POINTS.items():
        one, other = (law(np.random.default_rng(seed), 300) for seed in (1, 2))
        assert one.shape == other.shape and np.isfinite(one).all() and len(one) == 300, name
        assert not np.array_equal(one, other), name


@pytest.fixture(name="table")
def _table():
    """Sixteen trials: objective and AUC are the truth, the distance is its opposite, the MSE is chance."""
    truth = np.random.default_rng(0).permutation(16) / 16.0
    return pd.DataFrame(
        {
            "trial": range(16),
            "seconds": 60.0,
            "window end": 9.0,
            "val/elbo_window": truth,
            "val/mse": np.random.default_rng(1).random(16),
            "sample/distance": -truth,
            "sample/precision": -truth,
            "sample/distance_se": 0.01,
            "sample/auc": truth,
            "sample/auc_se": 0.01,
            "sample/num_samples": 1000,
            "sample/network_evaluations": 100,
            "parameters": 10,
            **{f"paired {trial}": 0.001 for trial in range(16)},
            "rung 10": truth + 1.0,
            "rung 20": truth,
            "truth trees": truth,
            "truth cells": 2.0 * truth,
        }
    )


def test_early_stopping_is_replayed_in_the_order_of_the_rows(table):
    ends = finished(table)
    assert ends[0], "the first trial has nothing to be compared with"
    assert ends[int(table["val/elbo_window"].argmin())]
    assert 1 < ends.sum() < len(table)


def test_the_champion_is_that_of_the_objective_unless_both_distances_prefer_another(table):
    order = np.argsort(table["val/elbo_window"].to_numpy())
    assert champion(table) == order[0], "the two distances contradict each other"
    assert champion(table.assign(**{"sample/auc": table["sample/distance"]})) == order[3]
    assert champion(table.iloc[order[4:]]) == 0, "of a part of the trials"


def test_pairs_that_were_measured_with_more_samples_decide(table):
    """Both objectives are the same; trial 5 is cheaper, but the last round of samples prefers trial 7."""
    table = table.assign(**{"val/elbo_window": 0.1, "parameters": [10] * 5 + [1] + [10] * 10})
    errors = {"distance_se": 0.1, "auc_se": 0.1}
    pairs = pd.DataFrame(
        {"first": 5, "second": 7, "round": round, "num_samples": 100 * 2**round} | values | errors
        for round, values in enumerate([{"distance": 0.0, "auc": 0.0}] * 2 + [{"distance": 1.0, "auc": 1.0}])
    )
    for rows in ([5, 7], [7, 5]):
        assert rows[champion(table.iloc[rows])] == 5
        assert rows[champion(table.iloc[rows], recorded(pairs))] == 7
        one = recorded(pairs.assign(auc=0.0))
        assert rows[champion(table.iloc[rows], one)] == 7, "10 standard errors of one"
        neither = recorded(pairs.assign(auc=0.0, distance=0.25))
        assert rows[champion(table.iloc[rows], neither)] == 5


def test_what_was_not_measured_of_two_trials_is_answered_by_the_round_before(table):
    errors = {"distance_se": 0.1, "auc_se": 0.1}
    pairs = pd.DataFrame(
        [{"first": 3, "second": 1, "round": 1, "num_samples": 200, "distance": 0.5, "auc": 0.2} | errors]
    )
    distances = recorded(pairs)
    differences, count = distances("1", "3", 2)
    assert count == 200 and differences["distance"].value == -0.5 and differences["auc"].value == -0.2
    assert distances("3", "1", 1)[0]["distance"].value == 0.5
    assert distances("1", "3", 0) is None and distances("1", "2", 0) is None


def test_sweeps_are_drawn_alike_at_each_call_from_the_trials_that_did_not_diverge(table, monkeypatch):
    monkeypatch.setattr(judgement_report, "_NUM_SWEEPS", 3)
    table.loc[4, "val/elbo_window"] = np.nan
    one, other = (list(resampled_sweeps(table)) for _ in range(2))
    for (sweep, ends), (again, _) in zip(one, other, strict=True):
        pd.testing.assert_frame_equal(sweep, again)
        assert sweep["trial"].is_unique and 4 not in set(sweep["trial"]) and len(sweep) == 11
        assert np.flatnonzero(finished(sweep)).tolist() == ends.tolist()
    assert one[0][0]["trial"].tolist() != one[1][0]["trial"].tolist()
    assert list(resampled_sweeps(table.iloc[:4])) == []


def test_the_best_trial_by_all_yardsticks_together_lies_at_0_and_the_median_at_1():
    """No trial is the best by both yardsticks; their units do not matter."""
    truth = np.array([[1.0, 20.0], [2.0, 10.0], [3.0, 30.0], [4.0, 50.0], [9.0, 40.0]])
    each = np.array([[0.0, 0.5], [0.5, 0.0], [1.0, 1.0], [1.5, 2.0], [4.0, 1.5]]).mean(axis=1)
    found = positions(truth)
    np.testing.assert_allclose(found, (each - 0.25) / (1.0 - 0.25))
    assert found[:3].tolist() == [0.0, 0.0, 1.0]
    np.testing.assert_allclose(positions(truth * [100.0, 0.1]), found)


def test_yardsticks_that_rank_by_chance_do_not_agree():
    quality, rng = np.linspace(0.0, 1.0, 200), np.random.default_rng(0)
    assert agreement(np.stack([quality, quality**2, np.exp(quality)], axis=1)) == pytest.approx(1.0)
    assert abs(agreement(rng.random((2000, 4)))) < 0.05
    seen = quality[:, None] + quality.std() * rng.standard_normal((200, 4))
    assert agreement(seen) == pytest.approx(0.5**0.5 * 0.75**0.5, abs=0.1)


def test_the_report_says_what_was_measured_and_how_well(table, tmp_path, monkeypatch):
    monkeypatch.setattr(judgement_report, "FILE", tmp_path / "judgement.md")
    monkeypatch.setattr(judgement_report, "RESULTS", tmp_path / "judgement")
    monkeypatch.setattr(judgement_report, "_NUM_SWEEPS", 5)
    monkeypatch.setattr(judgement_report, "_BOOTSTRAPS", 20)
    (tmp_path / "judgement").mkdir()
    diverged = pd.DataFrame({"trial": [16], "seconds": [60.0]})
    pd.concat([table, diverged]).to_csv(tmp_path / "judgement" / "arcs-0.1.csv", index=False)
    (tmp_path / "judgement" / "seeds").mkdir()
    seeds = table.iloc[:3].assign(**{"val/elbo_window": [0.1, 0.2, 0.3]})
    seeds.to_csv(tmp_path / "judgement" / "seeds" / "arcs-1.csv", index=False)
    text = write_report()
    assert "| arcs-1 | 3 | 0.1 | " in text, "the standard deviation over seeds"
    assert text == (tmp_path / "judgement.md").read_text()
    assert "| arcs | 0.1 | 20 | 17 | 1 | 9.00 | 17 |" in text
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| `")}
    assert lines["| `val/elbo_window`"].count("+1.00 (+1.00..+1.00), +1.00") == 3
    assert "-1.00 (-1.00..-1.00), -1.00" in lines["| `sample/distance`"]
    assert "+1.00" in lines["| `sample/precision`"], "a higher precision is better"
    assert "sample/distance_se" not in text
    position = next(line for line in text.splitlines() if line.startswith("| arcs-0.1"))
    assert position.split(" | ")[1:4] == ["16", "12", "no"]
    assert "0.00 (0.00..0.00)" in position.split(" | ")[5], "the objective's pick is the best"
    short = [line for line in text.splitlines() if line.startswith("| arcs-0.1 | 16 | +1.00")]
    assert len(short) == 1 and short[0].split(" | ")[3].startswith("-1.00")
    assert short[0].split(" | ")[6].startswith("+1.00"), "both"
