"""What a person sees while a sweep runs."""

import io

from rich.console import Console

from workflows.console import SweepView


def rendered(view: SweepView) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(view._table())
    return console.file.getvalue()


def test_the_table_shows_each_trial_with_its_progress():
    view = SweepView("sweep", 2, 100)
    view.started("aaa", {"schedule.num_train_timesteps": 50, "training.learning_rate": 1e-3})
    view.started("bbb", {"schedule.num_train_timesteps": 200, "training.learning_rate": 2e-3})
    view.progressed("aaa", 40, 1.25, {"val/mse": 0.5})
    view.ended("bbb", "pruned")
    text = rendered(view)
    assert "1/2 trials over" in text
    row = next(line for line in text.splitlines() if "aaa" in line)
    assert all(word in row for word in ("50", "0.001", "40/100", "1.25", "0.5", "running"))
    assert "pruned" in next(line for line in text.splitlines() if "bbb" in line)


def test_a_long_sweep_shows_what_runs_and_the_best():
    view = SweepView("sweep", 100, 10)
    for number in range(100):
        view.started(f"t{number:03}", {})
        view.progressed(f"t{number:03}", 10, 100.0 - number, {})
        if number != 50:
            view.ended(f"t{number:03}", "finished")
    text = rendered(view)
    assert "t050" in text and "t099" in text and "t000" not in text


def test_without_a_terminal_each_ended_trial_is_a_line(capsys):
    view = SweepView("sweep", 2, 10)
    with view:
        view.started("aaa", {"schedule.beta_end": 0.25})
        view.progressed("aaa", 10, 1.5, {})
        view.ended("aaa", "finished")
    line = capsys.readouterr().out.strip()
    assert "trial 1/2 finished after 10 updates: objective 1.5 (beta_end 0.25)" in line
    assert "\n" not in line
