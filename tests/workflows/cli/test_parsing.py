"""Command lines: accepted input, and one-line messages for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.config import Config
from diffusion.data.dataset import load_source
from diffusion.errors import InputError
from diffusion.presets import preset
from diffusion.registry import DATA_SOURCES
from workflows import train, tune
from workflows.cli.parsing import parse_train_options, parse_tune_options, with_hyphens
from workflows.cli.run_options import TrainOptions
from workflows.cli.short_help import SHORT_FORMS, SHORT_FORMS_OF_SWEEPS, all_flags
from workflows.cli.tune_options import UNLIMITED, TuneOptions
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import Storage

ROOT = Path(__file__).parents[3]


def tune_options(arguments):
    """Complete options of a sweep: those of the command line and of the data."""
    return parse_tune_options(arguments).open_data()[1]


def train_options(arguments):
    """Complete options of a training: those of the command line and of the data."""
    return parse_train_options(arguments).open_data()[1]


def test_a_searched_parameter_takes_one_value_a_range_or_choices():
    options = tune_options(
        "--search.num-train-timesteps 10 20 30 --search.beta-end 0.1 0.2 --search.learning-rate 0.002".split()
    )
    assert options.search.num_train_timesteps == (10, 20, 30)
    assert options.search.beta_end == (0.1, 0.2)
    assert options.search.learning_rate == (0.002,)


def test_dotted_flags_reach_the_config():
    options = tune_options(
        "--data heart --training.num-updates 7 --sampler.name ddim --seed 5 --network.hidden-size 8".split()
    )
    config = options.config()
    assert (config.data.name, config.training.num_updates, config.sampler.name) == ("heart", 7, "ddim")
    assert (config.seed, config.network.hidden_size) == (5, 8)


def test_num_workers_is_a_number_or_a_minimum_and_a_maximum():
    workers = [train_options(["--num-workers", value]).workers for value in ("3", "2:8", "2:2")]
    assert workers == [(3, 3), (2, 8), (2, 2)]


def test_each_data_set_brings_its_own_defaults():
    heart, digits = (tune_options(["--data", name]) for name in ("heart", "digits"))
    assert heart.network != digits.network
    assert tune_options([]) == digits and parse_tune_options([]).record is None


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
        ("--search.beta-end 1.5", ["--search.beta-end", "1.5", "above 0 and below 1"]),
        ("--search.beta-start 0", ["--search.beta-start", "0", "above 0 and below 1"]),
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
        ("--storage-retry-minutes -1", ["--storage-retry-minutes", "-1", "0 or more"]),
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
        ("--training-seed-error -1", ["--training-seed-error", "-1"]),
        ("--early-stopping never", ["--early-stopping", "never", "proven", "eager", "off"]),
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
    (tmp_path / "mine" / "trials.csv").write_text("results")
    options = tune_options(["--name", "mine", "--output-dir", str(tmp_path)])
    with pytest.raises(InputError, match="mine exists; choose another name"):
        options.run_directory()
    assert (tmp_path / "mine" / "trials.csv").read_text() == "results"


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in ("file", "file/below"):
        with pytest.raises(InputError, match="is a file"):
            tune_options(["--output-dir", str(tmp_path / folder)]).run_directory()


def test_without_a_name_each_run_gets_a_new_one(tmp_path):
    options = tune_options(["--output-dir", str(tmp_path)])
    first = options.run_directory()
    first.mkdir()
    second = options.run_directory()
    assert first != second and second.name.startswith("digits-") and not second.exists()


def test_a_time_budget_takes_hours_minutes_and_seconds_and_lifts_the_limit_on_trials():
    for text, seconds in (("90s", 90.0), ("30m", 1800.0), ("1h30m", 5400.0), ("1.5h", 5400.0)):
        options = tune_options(["--time-budget", text])
        assert options.budget_seconds() == seconds and options.num_trials >= 10_000
    both = tune_options(["--time-budget", "30m", "--num-trials", "7"])
    assert both.num_trials == 7
    assert tune_options([]).budget_seconds() is None


def test_a_resumed_sweep_keeps_its_options(tmp_path):
    flags = (
        "--data heart --num-trials 7 --search.beta-end 0.1 0.2 --training.num-updates 50 --objective val/mse"
    )
    options = tune_options(flags.split())
    record = RunRecord(
        "mine", "e", "id", options.config(), "f", command="tune", options=options.resume_options()
    )
    folder = tmp_path / "mine"
    folder.mkdir()
    record.write(Storage(str(folder)), "running")
    resume = ["--output-dir", str(tmp_path), "--resume"]
    for arguments in (resume, [*resume, "--name", "mine"], [*resume, "--data", "heart", "--experiment", "e"]):
        command_line = parse_tune_options(arguments)
        (_, resumed), found_record = command_line.open_data(), command_line.record
        assert found_record is not None and found_record.run_id == "id"
        assert resumed.config() == options.config() and resumed.search == options.search
        assert resumed.num_trials == 7 and resumed.name == "mine" and resumed.run_directory() == folder
    assert tune_options([*resume, "--num-trials", "9"]).num_trials == 9
    for arguments in ([*resume, "--data", "digits"], [*resume, "--name", "other"]):
        with pytest.raises(InputError, match="no (unfinished|such) run"):
            parse_tune_options(arguments)
    with pytest.raises(InputError, match="run of tune.py"):
        parse_train_options([*resume, "--name", "mine"])


@pytest.fixture
def saved_run(tmp_path):
    """Function (command line, status, command) that writes the record of a run named mine."""

    def save(flags, status, command="tune"):
        options = (tune_options if command == "tune" else train_options)(flags.split())
        saved = options.resume_options() if command == "tune" else {}
        record = RunRecord("mine", "e", "id", options.config(), "f", command=command, options=saved)
        (tmp_path / "mine").mkdir(exist_ok=True)
        record.write(Storage(str(tmp_path / "mine")), status)
        return ["--output-dir", str(tmp_path)]

    return save


@pytest.mark.parametrize("command", ["tune", "train"])
def test_a_finished_run_says_so_and_a_changed_config_is_refused(saved_run, command, tmp_path):
    parse = parse_tune_options if command == "tune" else parse_train_options
    resume = [*saved_run("--data heart --num-updates 50", "finished", command), "--name", "mine", "--resume"]
    request = parse(resume)
    assert request.is_finished
    first, then = request.finished_lines()
    assert "mine is finished" in first and f"{tmp_path}/mine/" in first
    assert ("--resume --name mine --num-trials 24" if command == "tune" else "--config") in then
    with pytest.raises(InputError, match="num-updates 60: .*was started with 50"):
        parse([*resume, "--num-updates", "60"]).finished_lines()
    main = tune.main if command == "tune" else train.main
    assert main(resume) == 0


@pytest.mark.parametrize(
    ("started", "resumed", "is_finished"),
    [
        ("--num-trials 7", "", True),
        ("--num-trials 7", "--num-trials 7", True),
        ("--num-trials 7", "--num-trials 40", False),
        ("--num-trials 7", "--num-trials 3", True),
        ("--time-budget 30m", "--time-budget 45m", False),
        ("--time-budget 30m", "--time-budget 1800s", True),
        ("--time-budget 30m --num-trials 9", "--num-trials 10", False),
        ("--num-trials 7", "--time-budget 2h", True),
    ],
)
def test_a_larger_budget_extends_a_finished_sweep(saved_run, started, resumed, is_finished):
    where = saved_run(f"--data heart {started}", "finished")
    request = parse_tune_options([*where, "--resume", "--name", "mine", *resumed.split()])
    assert request.is_finished == is_finished
    unnamed = [*where, "--resume", *resumed.split()]
    if resumed:
        assert parse_tune_options(unnamed).is_finished == is_finished
    else:
        with pytest.raises(InputError, match="no unfinished run"):
            parse_tune_options(unnamed)


def test_an_unfinished_sweep_is_never_finished_by_its_options(saved_run):
    where = saved_run("--data heart --num-trials 7", "stopped")
    assert not parse_tune_options([*where, "--resume", "--num-trials", "2"]).is_finished


@pytest.mark.parametrize("command", ["tune", "train"])
def test_start_or_resume_starts_then_resumes_then_says_that_it_is_done(saved_run, command, tmp_path):
    parse = parse_tune_options if command == "tune" else parse_train_options
    flags = "--data heart --num-updates 50 --name mine --start-or-resume"
    line = [*flags.split(), "--output-dir", str(tmp_path)]
    request = parse(line)
    assert request.record is None and request.open_data()[1].config().training.num_updates == 50
    (tmp_path / "mine").mkdir()  # as after a kill before the record was written
    assert parse(line).record is None
    saved_run("--data heart --num-updates 50", "running", command)
    request = parse(line)
    assert request.record is not None and not request.is_finished
    saved_run("--data heart --num-updates 50", "finished", command)
    assert parse(line).is_finished
    with pytest.raises(InputError, match="--start-or-resume: give --name"):
        parse(["--start-or-resume"])
    with pytest.raises(InputError, match="give one of them"):
        parse([*line, "--resume"])


def test_start_or_resume_takes_what_a_new_run_starts_from(saved_run, places, tmp_path):
    where = saved_run("--data heart --num-updates 50", "running", "train")
    model = str(places / "model")
    line = [*where, "--name", "mine", "--start-or-resume", "--init-from", model, "--config", model]
    request = parse_train_options(line)
    assert request.options.config().training.num_updates == 50, "the run keeps its own config"
    for flag in ("--init-from", "--config"):
        with pytest.raises(InputError, match=f"{flag} starts a new run"):
            parse_train_options([*where, "--name", "mine", "--resume", flag, model])


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--lr 0.01", "training.learning_rate", 0.01),
        ("--batch-size=9", "training.batch_size", 9),
        ("--batch_size 9", "training.batch_size", 9),
        ("--num-updates 8", "training.num_updates", 8),
        ("--num-epochs 2", "training.num_epochs", 2.0),
    ],
)
def test_the_most_used_flags_have_short_forms(flags, name, value):
    assert train_options(["--data", "heart", *flags.split()]).config().flat()[name] == value


def test_in_a_sweep_the_short_form_of_the_learning_rate_is_searched():
    for rates in ((0.01,), (0.001, 0.01)):
        arguments = ["--data", "heart", "--lr", *map(str, rates), "--num-updates", "8"]
        options = tune_options(arguments)
        assert options.search.learning_rate == rates and options.training.num_updates == 8


def test_both_lengths_of_a_training_are_refused_in_their_short_forms():
    with pytest.raises(InputError, match="give one of them"):
        parse_train_options(["--num-epochs", "3", "--training.num-updates", "4"])


@pytest.fixture
def champion(tmp_path):
    """config.json of a model of the heart whose sampler was chosen by measurement, and its config."""
    config = preset("heart").with_values(
        {
            "training.num_updates": 70,
            "schedule.beta_end": 0.1,
            "sampler.name": "dpmpp_2m",
            "sampler.num_steps": 10,
            "seed": 5,
        }
    )
    tree = {"config": config.to_dict(), "data": {"kind": "points", "shape": [2]}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    return tmp_path / "config.json", config


def test_a_config_gives_the_parameters_and_the_data_and_flags_replace_them(champion, places):
    file, config = champion
    assert train_options(["--config", str(file)]).config() == config
    longer = train_options(
        ["--config", str(file), "--num-updates", "700", "--num-workers", "2", "--seed", "6"]
    )
    assert longer.config() == config.with_values({"training.num_updates": 700, "seed": 6})
    assert longer.workers == (2, 2)
    others = train_options(["--config", str(file), "--data", str(places / "table.csv")])
    assert others.config() == config.with_values({"data.name": str(places / "table.csv")})
    epochs = train_options(["--config", str(file), "--num-epochs", "2"]).config()
    assert epochs.resolve_epochs(2560).training.num_updates == 20


def test_the_sampler_of_a_config_is_chosen_anew_unless_it_is_given(champion):
    file, _ = champion
    assert train_options(["--config", str(file)]).metrics.choose_sampler
    given = train_options(["--config", str(file), "--sampler.num-steps", "20"])
    assert not given.metrics.choose_sampler and given.sampler.name == "dpmpp_2m"


def test_a_config_of_images_keeps_their_size_with_another_folder(places, tmp_path):
    config = preset("digits").with_values({"metrics.features": "classifier"})
    tree = {"config": config.to_dict(), "data": {"kind": "image", "shape": [1, 8, 8]}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    options = train_options(["--config", str(tmp_path), "--data", str(places / "side28")])
    assert options.image_size == 8 and options.network == config.network
    assert options.metrics.features == "auto", "the other data may have no classes"


def test_help_is_short_and_help_all_shows_the_tree(capsys):
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            parse_tune_options([flag])
        assert caught.value.code in (0, None)
        texts.append(capsys.readouterr().out)
    short, full = texts
    assert "--num-trials" in short and "--schedule." not in short and "--help-all" in short
    assert "--search.beta-end" in full and "--training.batch-size" in full
    for flag in ("--num-updates", "--batch-size", "--lr", "--search.num-train-timesteps"):
        assert flag in short, "what everybody looks for"
    for default in ("50 100 200 500 1000", "0.0003 0.003", "larger images 1800"):
        assert default in " ".join(short.replace("│", " ").split())


def check_imports_nothing_heavy(command, arguments, folder):
    code = (
        "import sys\n"
        "from diffusion.errors import InputError\n"
        f"from workflows.{command} import main\n"
        f"try: main({arguments})\n"
        "except (SystemExit, InputError): pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment
    )


def test_help_imports_nothing_heavy(tmp_path):
    check_imports_nothing_heavy("tune", ["--help"], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--num-workers 0", ["--num-workers", "0", "1 or more"]),
        ("--num-workers two", ["--num-workers", "two", "such as 2:8"]),
        ("--num-workers 8:2", ["--num-workers 8:2", "the minimum comes first", "2:8"]),
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
        ("--image-size 3", ["--image-size", "3", "from 4"]),
        ("--image-size big", ["--image-size", "big", "whole number"]),
        ("--super-resolution 7:27", ["--super-resolution 7:27", "whole factor"]),
        ("--super-resolution 28:7", ["--super-resolution 28:7", "low and a high side such as 7:28"]),
        ("--super-resolution two:four", ["--super-resolution two:four", "LOW:HIGH"]),
        ("--super-resolution 7:28 --image-size 32", ["--image-size 32", "images of 28 pixels"]),
        ("--training.augment 2", ["--training.augment 2", "0 to 1"]),
        ("--training.low-resolution-noise nan", ["--training.low-resolution-noise nan", "0 to 10"]),
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
def test_bad_input_of_train_py_is_one_line_that_names_flag_value_and_remedy(
    arguments, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        train_options(arguments.split()).config()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_train_py_takes_the_dotted_flags_and_its_own():
    command_line = parse_train_options(
        "--data heart --num-workers 2 --keep-checkpoints 5 --schedule.kind cosine --training.num-epochs 2 "
        "--sampler.name dpmpp_2m --seed 5 --dry-run --output-dir s3://bucket/runs".split()
    )
    _, options = command_line.open_data()
    config = options.config()
    assert command_line.record is None and options.dry_run and not options.resume
    assert (options.num_workers, options.keep_checkpoints) == (2, 5)
    assert (config.schedule.kind, config.sampler.name, config.seed) == ("cosine", "dpmpp_2m", 5)
    assert config.resolve_epochs(1000).training.num_updates == 8, "two passes in batches of 256"


def test_a_training_and_a_sweep_start_from_the_same_config():
    for data in ("heart", "digits"):
        assert train_options(["--data", data]).config() == tune_options(["--data", data]).config()


def test_help_of_train_py_is_short_and_help_all_shows_the_tree(capsys):
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            parse_train_options([flag])
        assert caught.value.code in (0, None)
        texts.append(capsys.readouterr().out)
    short, full = texts
    for flag in ("--num-workers", "--resume", "--init-from", "--keep-checkpoints", "--dry-run", "--help-all"):
        assert flag in short
    for flag in ("--num-updates", "--batch-size", "--lr", "--schedule.num-train-timesteps"):
        assert flag in short, "what everybody looks for"
    assert "larger images 6000" in " ".join(short.replace("│", " ").split())
    assert "--network." not in short and "--network.kind" in full and "--training.accumulation-steps" in full


@pytest.mark.parametrize(
    ("command", "flag", "meant"),
    [
        ("tune", "--epochs", "did you mean --num-epochs"),
        ("tune", "--trials", "did you mean --num-trials?"),
        ("tune", "--learning-rate", "did you mean --lr?"),
        ("tune", "--beta-end", "did you mean --search.beta-end?"),
        ("tune", "--num-workers", "it is a flag of train.py"),
        ("train", "--epochs=5", "did you mean --num-epochs?"),
        ("train", "--learning_rate", "did you mean --lr?"),
        ("train", "--beta-end", "did you mean --schedule.beta-end?"),
        ("train", "--num-trials", "it is a flag of tune.py"),
        ("train", "--batchsize", "did you mean --batch-size?"),
        ("train", "--dat", "did you mean --data?"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_one_that_was_meant(command, flag, meant):
    parse = parse_tune_options if command == "tune" else parse_train_options
    with pytest.raises(InputError) as caught:
        parse([flag, "5"])
    assert meant in str(caught.value) and "--help-all" in str(caught.value)


@pytest.mark.parametrize("options", [TrainOptions, TuneOptions])
def test_every_flag_that_is_suggested_exists(options, capsys):
    parse = parse_tune_options if options is TuneOptions else parse_train_options
    with pytest.raises(SystemExit):
        parse(["--help-all"])
    full = capsys.readouterr().out
    forms = SHORT_FORMS_OF_SWEEPS if options is TuneOptions else SHORT_FORMS
    for flag in all_flags(options):
        section, _, name = forms.get(flag, flag).rpartition(".")
        negated = f"{section}.no-{name}" if section else f"--no-{flag.removeprefix('--')}"
        assert any(f"{each} " in full for each in (forms.get(flag, flag), negated)), flag


@pytest.mark.parametrize("arguments", [["--help"], ["--num-workers", "0"], ["--resume", "--name", "nope"]])
def test_train_py_imports_nothing_heavy_before_its_input_is_checked(arguments, tmp_path):
    check_imports_nothing_heavy("train", arguments, tmp_path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of images with sides of 8, 14 and 28 pixels, a table, an empty folder and a model."""
    root = tmp_path_factory.mktemp("places")
    for side in (3, 8, 14, 28):
        folder = root / f"side{side}"
        folder.mkdir()
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    np.savetxt(root / "table.csv", np.eye(20, 2), delimiter=",", header="x,y", comments="")
    for name in ("empty", "model"):
        (root / name).mkdir()
    network = {"network.hidden_size": 24, "network.raw_coordinates": False}
    config = Config().with_values(network).to_dict()
    (root / "model" / "config.json").write_text(json.dumps({"config": config}))
    (root / "model" / "model.safetensors").touch()
    return root


MLP_OF_POINTS = {
    "network.hidden_size": 64,
    "network.num_blocks": 3,
    "training.num_updates": 10_000,
    "training.batch_size": 256,
    "metrics.num_samples": 4000,
}
MLP_OF_IMAGES = {
    "network.hidden_size": 384,
    "network.num_blocks": 3,
    "network.output_norm": False,
    "network.dropout": 0.05,
}
SMALL_UNET = {
    "network.kind": "unet",
    "network.output_norm": False,
    "network.channel_multipliers": (1, 2),
    "training.batch_size": 32,
    "training.num_evaluations": 4,
    "sampler.num_steps": 50,
    "metrics.num_samples": 256,
    "metrics.num_examples": 64,
}
UNET = {**SMALL_UNET, "network.channel_multipliers": (1, 2, 2)}
GIVEN = {
    "": {},
    "--training.batch-size 128 --network.hidden-size 256": {  # the general defaults, given on purpose
        "training.batch_size": 128,
        "network.hidden_size": 256,
    },
    "--training.num_updates=5 --training.accumulation-steps 32": {
        "training.num_updates": 5,
        "training.accumulation_steps": 32,
    },
    "--network.channel-multipliers 1 2 2 --network.no-raw-coordinates --network.dropout 0": {
        "network.channel_multipliers": (1, 2, 2),
        "network.raw_coordinates": False,
        "network.dropout": 0.0,
    },
    "--sampler.no-clip --sampler.name ddim --sampler.eta 0.5 --sampler.num-steps 100": {
        "sampler.clip": False,
        "sampler.name": "ddim",
        "sampler.eta": 0.5,
        "sampler.num_steps": 100,
    },
    "--schedule.zero-terminal-snr --network.prediction-type v_prediction --seed 3": {
        "schedule.zero_terminal_snr": True,
        "network.prediction_type": "v_prediction",
        "seed": 3,
    },
    "--conditional --memory-limit-gb 0.5 --skip-bad-images": {
        "data.conditional": True,
        "data.memory_limit_gb": 0.5,
        "data.skip_bad_images": True,
    },
}


@pytest.mark.parametrize(
    ("data", "defaults"),
    [
        ("digits", MLP_OF_IMAGES),
        ("heart", MLP_OF_POINTS),
        ("mnist", UNET),
        ("side8", MLP_OF_IMAGES),
        ("side14", SMALL_UNET),
        ("side28", UNET),
        ("side28 --image-size 8", {**MLP_OF_IMAGES, "data.image_size": 8}),
        ("side8 --image-size 16", {**UNET, "data.image_size": 16}),
        ("table.csv", MLP_OF_POINTS),
    ],
)
def test_given_flags_win_over_the_defaults_of_the_data(data, defaults, places, monkeypatch):
    monkeypatch.chdir(places)
    name = data.split()[0]
    name = str(places / name) if (places / name).exists() else name
    unet = "network.kind" in defaults
    # All flags with one data set of each kind of defaults; with the others, the first flags only.
    given = list(GIVEN.items())[: None if data in ("heart", "side8", "side14") else 1]
    for flags, values in given:
        arguments = ["--data", *data.split(), *flags.split()]
        chooses = not any(value.startswith("sampler.") for value in values)
        expected = Config().with_values(
            {**defaults, "metrics.choose_sampler": chooses, "data.name": name, **values}
        )
        sweep = tune_options(arguments)
        updates = {} if not unet or "training.num_updates" in values else {"training.num_updates": 1800}
        assert sweep.config() == expected.with_values(updates)
        assert sweep.num_trials == (6 if unet else 12)
        updates = {} if not updates else {"training.num_updates": 6000}
        assert train_options(arguments).config() == expected.with_values(updates)


def test_a_number_of_trials_that_is_given_wins_over_that_of_a_u_net():
    for flags, num_trials in (("--num-trials 12", 12), ("--time-budget 1h", UNLIMITED), ("", 6)):
        assert tune_options(["--data", "mnist", *flags.split()]).num_trials == num_trials


def test_init_from_gives_the_network_and_the_data_give_the_rest(places, monkeypatch):
    monkeypatch.chdir(places)
    for flags, width, raw in (
        ("", 24, False),
        ("--network.hidden-size 9 --network.raw-coordinates", 9, True),
    ):
        options = train_options(f"--data heart --init-from model {flags}".split())
        expected = {"network.hidden_size": width, "network.num_blocks": 4, "network.raw_coordinates": raw}
        assert options.config() == preset("heart", alone=True).with_values(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data heart --num-workers 257", "--training.batch-size 256 is smaller than --num-workers 257"),
        ("--data side14 --training.accumulation-steps 33", "at most the batch size, which is 32"),
        ("--data empty", "empty holds no images"),
        ("--data side3", "--image-size 3: give 4 or more"),
        ("--data heart --horizontal-flips", "--horizontal-flips: --data heart holds points"),
        ("--data digits --label-column x", "--label-column x: only tables have columns"),
        ("--data heart --training.augment 0.1", "--training.augment 0.1: --data heart holds points"),
        ("--data table.csv --super-resolution 7:28", "holds points, and only images have a resolution"),
        ("--data digits --super-resolution 7:28", "--data digits has images of 8 pixels; give at most"),
        ("--data digits --super-resolution 4:8 --network.kind mlp", "only a U-Net receives low-resolution"),
        ("--data empty --seed -1", "--seed -1"),  # an error in a flag comes first
    ],
)
def test_what_only_the_data_show_is_refused_when_they_are_opened(arguments, message, places, monkeypatch):
    monkeypatch.chdir(places)
    with pytest.raises(InputError, match=message):
        train_options(arguments.split())
    assert train_options("--data heart --num-workers 256".split()).workers == (256, 256)


def test_parsing_a_command_line_opens_no_data(places, monkeypatch):
    opened = []
    scandir, open_image = os.scandir, Image.open
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(path) or scandir(path))
    monkeypatch.setattr(Image, "open", lambda file, *args: opened.append(file) or open_image(file, *args))
    for parse in (parse_train_options, parse_tune_options):
        parse(["--data", str(places / "side28"), "--image-size", "16"])
    assert opened == []


def test_help_all_shows_the_defaults_of_the_data(places, capsys):
    with pytest.raises(SystemExit):
        parse_train_options(["--data", str(places / "side14"), "--help-all"])
    assert "6000" in capsys.readouterr().out


def test_a_data_source_of_an_installed_package_works_from_the_flag_to_the_dataset(tmp_path, monkeypatch):
    (tmp_path / "spirals.py").write_text(
        "import numpy as np\n"
        "from diffusion.data.sources import DataSource, RawData\n"
        "class Spiral(DataSource):\n"
        "    kind = 'points'\n"
        "    def load(self):\n"
        "        a = np.linspace(0.0, 6.0, 200)\n"
        "        return RawData(values=np.stack([a * np.cos(a), a * np.sin(a)], axis=1))\n"
    )
    metadata = tmp_path / "spirals-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: spirals\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ray_ddpm.data_sources]\nspiral = spirals:Spiral\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(DATA_SOURCES, "_loaded", {})
    source, options = parse_train_options(["--data", "spiral", "--training.batch-size", "7"]).open_data()
    expected = preset("heart", alone=True).with_values({"data.name": "spiral", "training.batch_size": 7})
    assert options.config() == expected
    assert load_source(source).spec.name == "spiral"


def test_a_data_source_added_to_the_projects_own_works_from_the_flag_to_the_dataset(monkeypatch):
    own = {**DATA_SOURCES._own, "hearts": "diffusion.data.named:Heart"}
    monkeypatch.setattr(DATA_SOURCES, "_own", own)
    monkeypatch.setattr(DATA_SOURCES, "_loaded", {})
    source, options = parse_tune_options(["--data", "hearts"]).open_data()
    assert options.config() == preset("heart").with_values({"data.name": "hearts"})
    assert load_source(source).spec.shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "hidden_size", "num_blocks"),
    [
        ("--data heart", (64, 128), (3, 6)),
        ("--data heart --network.hidden-size 32", (), (3, 6)),
        ("--data heart --search.hidden-size 32 --network.num-blocks 2", (32,), ()),
        ("--data digits", (), ()),
    ],
)
def test_sweeps_of_points_search_the_size_of_the_network_unless_it_is_given(
    arguments, hidden_size, num_blocks
):
    search = tune_options(arguments.split()).search
    assert (search.hidden_size, search.num_blocks) == (hidden_size, num_blocks)


@pytest.mark.parametrize("join", [False, True])
def test_flags_with_underscores_are_those_with_hyphens(tmp_path, places, join):
    """Every look at the arguments finds them: defaults, the run to resume, and what was given."""
    given = {"--image_size": "16", "--output_dir": str(tmp_path), "--training.num_updates": "7"}
    words = (
        [f"{name}={value}" for name, value in given.items()] if join else sum(map(list, given.items()), [])
    )
    options = train_options(["--data", str(places / "side28"), *words])
    assert options.config().data.image_size == 16 and options.output_dir == str(tmp_path)
    assert options.training.num_updates == 7
    assert options.network.channel_multipliers == (1, 2, 2)  # the preset of 16 pixels, not of 8
    with pytest.raises(InputError, match="no unfinished run of train.py in .*elsewhere"):
        parse_train_options(["--resume", "--output_dir", str(tmp_path / "elsewhere")])
    with pytest.raises(InputError, match="use --search.beta-end"):
        parse_tune_options(["--schedule.beta_end", "0.1"])


def test_the_value_of_a_flag_keeps_its_underscores():
    arguments = ["--label_column", "my_label", "--name=my_run", "-x_y", "a_b"]
    assert with_hyphens(arguments) == ["--label-column", "my_label", "--name=my_run", "-x_y", "a_b"]


FLAGS = (
    "--data --image-size --image_size --seed --name --num-workers --output-dir --training.num-updates "
    "--network.hidden-size --schedule.kind --schedule.beta-end --sampler.eta --training.loss --init-from "
    "--network.channel-multipliers --resume --conditional --no-progress --x"
).split()
WORDS = st.sampled_from(
    [
        "0",
        "-1",
        "5",
        "1e400",
        "nan",
        "x",
        "",
        "~nosuchuser",
        "a\nb",
        "\x1b[31m",
        "--",
        "heart",
        "digits",
        "1:2",
        "a=b",
    ]
)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(WORDS, max_size=2), st.booleans()), max_size=3))
def test_any_flags_give_options_or_one_line(parts):
    arguments = []
    for flag, values, join in parts:
        arguments += [f"{flag}={values[0]}"] if join and values else [flag, *values]
    try:
        parse_train_options(arguments)
    except InputError as error:
        assert str(error).isprintable() and str(error)
