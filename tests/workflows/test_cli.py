"""Command lines: what is accepted, and one clear line for what is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.errors import InputError
from workflows.cli import parse_tune_options, run

ROOT = Path(__file__).parents[2]


def test_a_searched_parameter_takes_one_value_a_range_or_choices():
    options = parse_tune_options(
        "--search.num-train-timesteps 10 20 30 --search.beta-end 0.1 0.2 --search.learning-rate 0.002".split()
    )
    assert options.search.num_train_timesteps == (10, 20, 30)
    assert options.search.beta_end == (0.1, 0.2)
    assert options.search.learning_rate == (0.002,)


def test_dotted_flags_reach_the_config():
    options = parse_tune_options(
        "--data heart --training.num-updates 7 --sampler.name ddim --seed 5 --network.hidden-size 8".split()
    )
    config = options.config()
    assert (config.data.name, config.training.num_updates, config.sampler.name) == ("heart", 7, "ddim")
    assert (config.seed, config.network.hidden_size) == (5, 8)


def test_each_data_set_brings_its_own_defaults():
    heart, digits = (parse_tune_options(["--data", name]) for name in ("heart", "digits"))
    assert heart.network != digits.network
    assert parse_tune_options([]) == digits


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
    options = parse_tune_options(["--name", "mine", "--output-dir", str(tmp_path)])
    with pytest.raises(InputError, match="mine exists; choose another name"):
        options.run_directory()
    assert (tmp_path / "mine" / "trials.csv").read_text() == "precious"


def test_an_output_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in ("file", "file/below"):
        with pytest.raises(InputError, match="is a file"):
            parse_tune_options(["--output-dir", str(tmp_path / folder)]).run_directory()


def test_without_a_name_a_fresh_one_is_made_each_time(tmp_path):
    options = parse_tune_options(["--output-dir", str(tmp_path)])
    first = options.run_directory()
    first.mkdir()
    second = options.run_directory()
    assert first != second and second.name.startswith("digits-") and not second.exists()


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
