"""Terminal output of a running sweep."""

import io
import math

import pytest
from rich.console import Console

from workflows.sweep.table_view import SweepTable


def rendered(view: SweepTable, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view.render())
    return console.file.getvalue()


def test_the_table_shows_each_trial_with_its_progress():
    view = SweepTable("sweep", 2, 100)
    view.add("aaa", {"schedule.num_train_timesteps": 50, "training.learning_rate": 1e-3})
    view.add("bbb", {"schedule.num_train_timesteps": 200, "training.learning_rate": 2e-3})
    view.update("aaa", 40, 1.25, {"val/mse": 0.5})
    view.finish("bbb", "pruned")
    text = rendered(view)
    assert "1/2 trials" in text
    row = next(line for line in text.splitlines() if "aaa" in line)
    assert all(word in row for word in ("50", "0.001", "40%", "1.25", "0.5", "running"))
    assert "pruned" in next(line for line in text.splitlines() if "bbb" in line)


def test_a_long_sweep_shows_running_trials_and_the_best_ones():
    view = SweepTable("sweep", 100, 10)
    for number in range(100):
        view.add(f"t{number:03}", {})
        view.update(f"t{number:03}", 10, 100.0 - number, {})
        if number != 50:
            view.finish(f"t{number:03}", "finished")
    text = rendered(view)
    assert "t050" in text and "t099" in text and "t000" not in text


def test_without_a_terminal_each_ended_trial_prints_one_line(capsys):
    view = SweepTable("sweep", 2, 10)
    with view:
        view.add("aaa", {"schedule.beta_end": 0.25})
        view.update("aaa", 10, 1.5, {})
        view.finish("aaa", "finished")
    line = capsys.readouterr().out.strip()
    assert "trial 1/2 aaa finished after 10 updates: objective 1.5 (beta_end 0.25)" in line
    assert "\n" not in line


def test_searched_words_are_shown_as_they_are(capsys):
    view = SweepTable("sweep", 1, 10)
    with view:
        view.add("aaa", {"schedule.kind": "cosine", "network.prediction_type": "v_prediction"})
        view.finish("aaa", "failed", "no reason")
    assert "(kind cosine, prediction_type v_prediction)" in capsys.readouterr().out
    assert "cosine" in rendered(view)


PARAMS = {
    "schedule.num_train_timesteps": 1000,
    "schedule.beta_start": 1.54e-05,
    "schedule.beta_end": 0.2417,
    "network.time_embedding_size": 64,
    "network.data_embedding_size": 32,
    "network.hidden_size": 128,
    "network.num_blocks": 6,
    "training.learning_rate": 0.000366,
}


@pytest.fixture
def search_of_points():
    """View of a sweep that searches everything; a trial runs, one was stopped, one is the best."""
    view = SweepTable("heart-20261130-0731", 12, 10_000, folder="runs/heart-20261130-0731")
    for trial_id, objective in (("t1697d50a", 2.7311), ("tcac44bb9", 1.0625), ("tdd5a9d32", 1.5)):
        view.add(trial_id, PARAMS)
        view.update(trial_id, 7500, objective, {"val/mse": 0.2167, "sample/distance": 0.0456})
    view.finish("t1697d50a", "stopped")
    view.finish("tcac44bb9", "finished")
    return view


@pytest.mark.parametrize("width", range(60, 201, 7))
def test_every_terminal_shows_whole_numbers_and_ids(search_of_points, width):
    search_of_points.console.width = width
    text = rendered(search_of_points, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    row = next(line for line in text.splitlines() if line.startswith("│ t1697d50a"))
    for cell in ("1000", "2.731", "stopped 75%"):
        assert f" {cell} " in row, "the columns that every terminal has"
    shown = text.split("trials.csv also has")[0]
    for heading, cell in (("lr", "0.000366"), ("betas", "1.54e-05–0.2417"), ("width x blocks", "128 x 6")):
        assert (f" {heading} " in shown) == (f" {cell} " in row)
        assert f" {heading} " in shown or heading in " ".join(text.split())


def test_the_most_important_columns_are_the_last_to_go(search_of_points):
    for width, headings in ((60, ["T", "lr"]), (80, ["T", "lr", "betas"]), (140, ["distance", "val MSE"])):
        search_of_points.console.width = width
        lines = rendered(search_of_points, width).splitlines()
        heading_line = next(line for line in lines if line.startswith("┃"))
        assert set(headings) <= {each.strip() for each in heading_line.split("┃")}


def test_the_table_says_which_trial_is_best_how_long_it_takes_and_where_previews_are(search_of_points):
    text = " ".join(rendered(search_of_points).split())
    assert "best so far: tcac44bb9, objective 1.062" in text
    assert "previews: runs/heart-20261130-0731/trials/ID/samples.png" in text
    assert "2/12 trials" in text and "left" in text


def test_a_trial_that_diverged_is_not_the_best():
    view = SweepTable("sweep", 3, 10)
    for trial_id, objective, status in (("a", 1.0, "diverged"), ("b", math.nan, "finished")):
        view.add(trial_id, {})
        view.update(trial_id, 10, objective, {})
        view.finish(trial_id, status)
    assert view.best() == ""
    view.add("c", {})
    view.update("c", 5, 2.0, {})
    assert view.best() == "c"


@pytest.mark.parametrize(
    ("num_trials", "limit", "expected"),
    [
        (2, None, "about 0:30 left"),  # 10 updates in 10 s; the running trial has 10 left, another one 20
        (None, None, ""),
        (None, 100.0, "about 1:30 left"),
        (2, 15.0, "about 0:05 left"),
        (1, None, "about 0:10 left"),
    ],
)
def test_the_time_left_follows_from_the_speed_and_the_budget(monkeypatch, num_trials, limit, expected):
    now = [0.0]
    monkeypatch.setattr("workflows.sweep.table_view.time.monotonic", lambda: now[0])
    view = SweepTable("sweep", num_trials, 20)
    view.limit_time(limit)
    view.add("a", {})
    view.update("a", 10, 1.0, {})
    now[0] = 10.0
    title = rendered(view).splitlines()[0].strip()
    assert title.partition("0:10")[2].removeprefix(", ") == expected
    assert view.finish("a", "finished") is None and ("left" in rendered(view)) == (
        num_trials != 1 and bool(expected)
    )
