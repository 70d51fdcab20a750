"""Command lines: what is accepted, and one clear line for what is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.errors import InputError
from workflows.cli import parse_train_options, parse_tune_options, run
from workflows.runs import RunRecord
from workflows.storage import Storage

ROOT = Path(__file__).parents[2]


def test_a_searched_parameter_takes_one_value_a_range_or_choices():
    options, _ = parse_tune_options(
        "--search.num-train-timesteps 10 20 30 --search.beta-end 0.1 0.2 --search.learning-rate 0.002".split()
    )
    assert options.search.num_train_timesteps == (10, 20, 30)
    assert options.search.beta_end == (0.1, 0.2)
    assert options.search.learning_rate == (0.002,)


def test_dotted_flags_reach_the_config():
    options, _ = parse_tune_options(
        "--data heart --training.num-updates 7 --sampler.name ddim --seed 5 --network.hidden-size 8".split()
    )
    config = options.config()
    assert (config.data.name, config.training.num_updates, config.sampler.name) == ("heart", 7, "ddim")
    assert (config.seed, config.network.hidden_size) == (5, 8)


def test_workers_are_a_number_or_the_fewest_and_the_most():
    found = [parse_train_options(["--num-workers", value])[0].workers for value in ("3", "2:8", "2:2")]
    assert found == [(3, 3), (2, 8), (2, 2)]


def test_each_data_set_brings_its_own_defaults():
    heart, digits = (parse_tune_options(["--data", name])[0] for name in ("heart", "digits"))
    assert heart.network != digits.network
    assert parse_tune_options([]) == (digits, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data nope", ["--data", "nope", "digits", "heart"]),
        ("--data", ["--data"]),
        ("--dat heart", ["--dat", "--help-all"]),
        ("--num-trials 0", ["--num-trials", "0", "1 or more"]),
        ("--num-trials many", ["--num-trials", "many", "whole number"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--search.num-train-timesteps 0", ["--search.num-train-timesteps", "0", "from 1"]),
        ("--search.beta-start 0.1 --search.beta-end 0.01", ["--search.beta-start", "0.1", "0.01"]),
        ("--search.beta-end 0.3 0.1", ["--search.beta-end", "0.3 0.1", "lower"]),
        ("--search.beta-end 1.5", ["--search.beta-end", "1.5", "between 0 and 1"]),
        ("--search.beta-start 0", ["--search.beta-start", "0", "between 0 and 1"]),
        ("--search.beta-start", ["--search.beta-start", "give"]),
        ("--search.beta-start 1e-4 1e-3 1e-2", ["--search.beta-start", "range"]),
        ("--search.time-embedding-size 1", ["--search.time-embedding-size", "1", "2 to 4096"]),
        ("--search.learning-rate nan", ["--search.learning-rate", "nan"]),
        ("--schedule.beta-end 0.1", ["--schedule.beta-end", "--search.beta-end"]),
        (
            "--network.time-embedding-size=8",
            ["--network.time-embedding-size", "--search.time-embedding-size"],
        ),
        ("--network.hidden-size 0", ["--network.hidden-size", "0"]),
        ("--sampler.name euler", ["--sampler.name", "euler", "ddpm", "ddim"]),
        ("--sampler.eta 2", ["--sampler.eta", "2", "0 to 1"]),
        ("--name a/b", ["--name", "a/b", "letters"]),
        ("--name .hidden", ["--name", ".hidden"]),
        (f"--name {'x' * 65}", ["--name", "64"]),
        ("--experiment ../up", ["--experiment", "../up"]),
        ("--output-dir s3://bucket/runs", ["--output-dir", "s3://bucket/runs"]),
        ("--output-dir=", ["--output-dir", "empty"]),
        ("--tracking-uri=", ["--tracking-uri", "empty"]),
        ("--data=", ["--data", "empty"]),
        ("--seed 4294967296", ["--seed", "4294967296"]),
        ("--sampler.eta 0.5", ["--sampler.eta", "ddim"]),
        ("--search.num-train-timesteps 1e3", ["--search.num-train-timesteps", "1e3", "numbers"]),
        ("--search.schedule-kind wavy", ["--search.schedule-kind", "wavy", "cosine"]),
        ("--search.hidden-size 64 0", ["--search.hidden-size", "0"]),
        ("--search.algorithm grid", ["--search.algorithm", "grid", "tpe", "random"]),
        ("--objective train/mse", ["--objective", "train/mse", "val/elbo_window"]),
        ("--time-budget soon", ["--time-budget", "soon", "30m"]),
        ("--time-budget 0m", ["--time-budget", "0m", "30m"]),
        ("--gpus-per-worker 2", ["--gpus-per-worker", "2", "at most 1"]),
        ("--gpus-per-worker 0.5 --workers-per-trial 2", ["--gpus-per-worker", "--workers-per-trial"]),
        ("--final-epochs -1", ["--final-epochs", "-1"]),
        ("--final-workers 2", ["--final-workers", "--final-epochs"]),
        ("--metrics.features eyes", ["--metrics.features", "eyes", "inception"]),
        ("--resume --output-dir /nowhere/at/all", ["--resume", "/nowhere/at/all"]),
    ],
)
def test_bad_input_is_one_line_that_names_flag_value_and_remedy(arguments, words):
    with pytest.raises(InputError) as caught:
        parse_tune_options(arguments.split())
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_name_that_exists_is_refused_and_nothing_is_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "trials.csv").write_text("precious")
    options, _ = parse_tune_options(["--name", "mine", "--output-dir", str(tmp_path)])
    with pytest.raises(InputError, match="mine exists; choose another name"):
        options.run_directory()
    assert (tmp_path / "mine" / "trials.csv").read_text() == "precious"


def test_an_output_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in ("file", "file/below"):
        with pytest.raises(InputError, match="is a file"):
            parse_tune_options(["--output-dir", str(tmp_path / folder)])[0].run_directory()


def test_without_a_name_a_fresh_one_is_made_each_time(tmp_path):
    options, _ = parse_tune_options(["--output-dir", str(tmp_path)])
    first = options.run_directory()
    first.mkdir()
    second = options.run_directory()
    assert first != second and second.name.startswith("digits-") and not second.exists()


def test_a_time_budget_may_be_hours_minutes_and_seconds_and_then_alone_limits_the_sweep():
    for text, seconds in (("90s", 90.0), ("30m", 1800.0), ("1h30m", 5400.0), ("1.5h", 5400.0)):
        options, _ = parse_tune_options(["--time-budget", text])
        assert options.budget_seconds() == seconds and options.num_trials >= 10_000
    both, _ = parse_tune_options(["--time-budget", "30m", "--num-trials", "7"])
    assert both.num_trials == 7
    assert parse_tune_options([])[0].budget_seconds() is None


def test_a_sweep_to_be_resumed_brings_its_own_choices(tmp_path):
    given = (
        "--data heart --num-trials 7 --search.beta-end 0.1 0.2 --training.num-updates 50 --objective val/mse"
    )
    options, _ = parse_tune_options(given.split())
    record = RunRecord(
        "mine", "e", "id", options.config().to_dict(), "f", command="tune", options=options.kept()
    )
    folder = tmp_path / "mine"
    folder.mkdir()
    record.write(Storage(str(folder)), "running")
    there = ["--output-dir", str(tmp_path), "--resume"]
    for arguments in (there, [*there, "--name", "mine"], [*there, "--data", "heart", "--experiment", "e"]):
        found, again = parse_tune_options(arguments)
        assert again is not None and again.run_id == "id"
        assert found.config() == options.config() and found.search == options.search
        assert found.num_trials == 7 and found.name == "mine" and found.run_directory() == folder
    assert parse_tune_options([*there, "--num-trials", "9"])[0].num_trials == 9
    for arguments in ([*there, "--data", "digits"], [*there, "--name", "other"]):
        with pytest.raises(InputError, match="no (unfinished|such) run"):
            parse_tune_options(arguments)
    with pytest.raises(InputError, match="run of tune.py"):
        parse_train_options([*there, "--name", "mine"])
    record.write(Storage(str(folder)), "finished")
    with pytest.raises(InputError, match="finished"):
        parse_tune_options([*there, "--name", "mine"])


def test_bad_input_leaves_with_status_2_and_one_line(monkeypatch, capsys):
    def main(_arguments):
        raise InputError("--x 1: give 2")

    monkeypatch.setattr(sys, "argv", ["tune.py"])
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --x 1: give 2\n"


def test_help_is_short_and_help_all_shows_the_tree(capsys):
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            parse_tune_options([flag])
        assert caught.value.code in (0, None)
        texts.append(capsys.readouterr().out)
    short, whole = texts
    assert "--num-trials" in short and "--schedule." not in short and "--help-all" in short
    assert "--search.beta-end" in whole and "--training.batch-size" in whole


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['tune.py', '--help']\n"
        "from workflows import tune\n"
        "try: tune.run(tune.main)\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--num-workers 0", ["--num-workers", "0", "1 or more"]),
        ("--num-workers two", ["--num-workers", "two", "such as 2:8"]),
        ("--num-workers 8:2", ["--num-workers 8:2", "the fewest come first"]),
        ("--num-workers 2:300", ["--training.batch-size", "--num-workers 300"]),
        (
            "--num-workers 8 --training.batch-size 4",
            ["--training.batch-size 4", "--num-workers 8", "8 or more"],
        ),
        (
            "--num-workers 2 --training.batch-size 6 --training.accumulation-steps 4",
            ["--training.batch-size 6", "--num-workers 2", "4 accumulation steps", "8 or more"],
        ),
        ("--keep-checkpoints 0", ["--keep-checkpoints", "0", "1 or more"]),
        (
            "--training.num-epochs 3 --training.num-updates 4",
            ["--training.num-epochs", "--training.num-updates"],
        ),
        (
            "--training.num_updates=4 --training.num-epochs=3",
            ["--training.num-epochs", "--training.num-updates"],
        ),
        ("--training.num-epochs 0", ["--training.num-epochs", "0", "above 0"]),
        ("--training.num-updates 0", ["--training.num-updates", "0", "from 1"]),
        ("--training.precision fp8", ["--training.precision", "fp8", "fp32", "bf16", "fp16"]),
        ("--training.checkpoint-minutes 0", ["--training.checkpoint-minutes", "0", "above 0"]),
        ("--training.learning-rate nan", ["--training.learning-rate", "nan"]),
        ("--image-size 4", ["--image-size", "4", "from 8"]),
        ("--image-size big", ["--image-size", "big", "whole number"]),
        ("--memory-limit-gb 0", ["--memory-limit-gb", "0", "above 0"]),
        ("--init-from nowhere", ["--init-from", "nowhere", "no model there"]),
        ("--resume", ["--resume", "no unfinished run"]),
        ("--resume --name nope", ["--resume", "--name nope", "no such run"]),
        ("--resume --data nope", ["--data", "nope", "digits"]),
        ("--search.beta-end 0.1", ["--search.beta-end", "--help-all"]),
        ("--num-trials 3", ["--num-trials", "--help-all"]),
        ("--name a/b", ["--name", "a/b", "letters"]),
        ("--output-dir=", ["--output-dir", "empty"]),
        ("--data", ["--data"]),
    ],
)
def test_bad_input_of_a_training_is_one_line_too(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        parse_train_options(arguments.split())[0].config()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_a_training_takes_the_whole_tree_and_its_own_flags():
    options, record = parse_train_options(
        "--data heart --num-workers 2 --keep-checkpoints 5 --schedule.kind cosine --training.num-epochs 2 "
        "--sampler.name dpmpp_2m --seed 5 --dry-run --output-dir s3://bucket/runs".split()
    )
    config = options.config()
    assert record is None and options.dry_run and not options.resume
    assert (options.num_workers, options.keep_checkpoints) == (2, 5)
    assert (config.schedule.kind, config.sampler.name, config.seed) == ("cosine", "dpmpp_2m", 5)
    assert config.for_examples(1000).training.num_updates == 8, "two passes in batches of 256"


def test_a_training_and_a_sweep_start_from_the_same_config():
    for data in ("heart", "digits"):
        assert (
            parse_train_options(["--data", data])[0].config()
            == parse_tune_options(["--data", data])[0].config()
        )


def test_help_of_a_training_is_short_and_help_all_shows_the_tree(capsys):
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            parse_train_options([flag])
        assert caught.value.code in (0, None)
        texts.append(capsys.readouterr().out)
    short, whole = texts
    for flag in ("--num-workers", "--resume", "--init-from", "--keep-checkpoints", "--dry-run", "--help-all"):
        assert flag in short
    assert (
        "--schedule." not in short and "--schedule.kind" in whole and "--training.accumulation-steps" in whole
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--num-workers", "0"], ["--resume", "--name", "nope"]])
def test_a_training_loads_nothing_heavy_before_it_knows_what_to_do(arguments, tmp_path):
    code = (
        f"import sys; sys.argv = ['train.py', *{arguments}]\n"
        "from workflows import train\n"
        "try: train.run(train.main)\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
