"""Terminal output of a running sweep."""

import io

from rich.console import Console

from workflows.sweep.table_view import SweepTable


def rendered(view: SweepTable) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(view.render())
    return console.file.getvalue()


def test_the_table_shows_each_trial_with_its_progress():
    view = SweepTable("sweep", 2, 100)
    view.add("aaa", {"schedule.num_train_timesteps": 50, "training.learning_rate": 1e-3})
    view.add("bbb", {"schedule.num_train_timesteps": 200, "training.learning_rate": 2e-3})
    view.update("aaa", 40, 1.25, {"val/mse": 0.5})
    view.finish("bbb", "pruned")
    text = rendered(view)
    assert "1/2 trials done" in text
    row = next(line for line in text.splitlines() if "aaa" in line)
    assert all(word in row for word in ("50", "0.001", "40/100", "1.25", "0.5", "running"))
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
    assert "trial 1/2 finished after 10 updates: objective 1.5 (beta_end 0.25)" in line
    assert "\n" not in line


def test_searched_words_are_shown_as_they_are(capsys):
    view = SweepTable("sweep", 1, 10)
    with view:
        view.add("aaa", {"schedule.kind": "cosine", "network.prediction_type": "v_prediction"})
        view.finish("aaa", "failed", "no reason")
    assert "(kind cosine, prediction_type v_prediction)" in capsys.readouterr().out
    assert "cosine" in rendered(view)


def test_a_narrow_terminal_shows_fewer_columns_and_names_the_others():
    names = ("schedule.beta_end", "network.hidden_size", "network.num_blocks", "training.learning_rate")
    view = SweepTable("sweep", 1, 10_000)
    view.add("t1697d50a", dict.fromkeys(names, 0.0123))
    view.update("t1697d50a", 7500, 2.7311, {"val/mse": 0.2167, "sample/distance": 0.0456})
    view.console.width = 80
    text = rendered(view)
    assert "…" not in text and "beta_end" in text and "0.0456" in text
    assert "trials.csv also has width, blocks, val MSE" in " ".join(text.split())
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    view.console.width = 200
    text = rendered(view)
    assert "val MSE" in text and "blocks" in text and "trials.csv" not in text
