"""Commands of the report can be pasted and do what they say."""

import shlex
from pathlib import Path

import pytest

from diffusion.config import Config
from diffusion.presets import preset
from workflows.cli.parsing import parse_train_options, parse_tune_options
from workflows.sweep.report.commands import next_commands, recorded_command, training_command


def parsed(command):
    interpreter, module, program, *arguments = shlex.split(command)
    assert (interpreter, module, program) == ("python", "-m", "workflows.train")
    return parse_train_options(arguments).open_data()[1].config()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"training.learning_rate": 0.0012345678901234567, "schedule.num_train_timesteps": 50, "seed": 7},
        {"sampler.num_steps": 7, "network.raw_coordinates": False, "network.channel_multipliers": (1, 3)},
        {"sampler.name": "ddim", "metrics.choose_sampler": False},
        {"metrics.choose_sampler": False, "training.ema_decay": 0.0},
    ],
)
def test_the_training_command_gives_exactly_the_champions_config(values):
    config = preset("heart").with_values(values)
    assert parsed(training_command(config)) == config


def test_the_training_command_of_images_gives_exactly_the_champions_config(tmp_path):
    config = preset("digits").with_values({"data.conditional": True, "sampler.guidance_scale": 2.0})
    assert parsed(training_command(config)) == config


def test_data_that_are_gone_or_were_in_memory_do_not_stop_the_report(tmp_path):
    gone = Config().with_values({"data.name": str(tmp_path / "no folder")})
    command = training_command(gone)
    assert f"--data '{tmp_path}/no folder'" in command and "--training.num-updates 8000" in command
    assert training_command(Config().with_values({"data.name": "memory://points"})) is None


def commands(directory, name="heart", **options):
    config = Config().with_values({"data.name": name, "data.conditional": name == "digits"})
    return {
        each.purpose: each.text
        for each in next_commands(directory, config, 12, "http://server", **{"interrupted": False, **options})
    }


def test_the_next_commands_name_the_champion_and_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = commands(Path.cwd() / "runs" / "my sweep", name="digits")
    assert found["Draw samples, without PyTorch"] == (
        "python -m export.sampler 'runs/my sweep/champion/sampler.onnx' --num-samples 64 --output samples.png"
    )
    assert found["See every run in the tracker"] == "http://server"
    search = shlex.split(found["Search on from its parameters"])
    assert search[3:] == [
        *("--data", "digits", "--conditional", "--start-from", "runs/my sweep/champion/config.json"),
        *("--num-trials", "12"),
    ]
    assert parse_tune_options(search[3:]).options.start_from == ("runs/my sweep/champion/config.json",)
    assert not any("--resume" in text for text in found.values())


def test_an_interrupted_sweep_is_resumed_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = commands(Path.cwd() / "runs" / "s", interrupted=True)
    assert next(iter(found.values())) == "python -m workflows.tune --resume --name s"
    elsewhere = commands(Path("/data/s"), interrupted=True)
    assert next(iter(elsewhere.values())).endswith("--resume --name s --output-dir /data")


def test_data_in_memory_have_no_command_that_would_need_them(tmp_path):
    assert len(commands(tmp_path / "s", name="memory://points")) == 2


def test_a_recorded_script_has_its_interpreter():
    assert recorded_command("workflows/tune.py --data x") == "python workflows/tune.py --data x"
    assert recorded_command("/bin/ray-ddpm tune") == "/bin/ray-ddpm tune"
