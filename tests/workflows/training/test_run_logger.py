"""The log of a training: what it prints at the end resumes the run."""

import re
import shlex

import pytest

from diffusion.data.dataset import load_dataset
from workflows.cli.parsing import parse_train_options
from workflows.training.run_logger import RunLogger


class SilentTracker:
    """Replaces the connection to MLflow."""

    name, unsent, refused, run_id = "MLflow", 0, (), "0" * 32

    def __init__(self, uri, experiment):
        self.uri = uri

    def keep_entries(self, folder):
        pass

    def start(self, name, params, folder=None, *, reuse=False):
        return self.run_id

    def tag(self, tags):
        pass

    def log_dataset(self, dataset):
        pass

    def close(self, status):
        pass


@pytest.mark.parametrize("store", ["", "sqlite:///store/mlflow.db"])
@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_the_printed_command_resumes_the_run_with_the_same_options(
    monkeypatch, tmp_path, capsys, store, status
):
    """That includes its folder, its MLflow store and the number of workers, on which the weights depend."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("workflows.training.base_logger.open_tracker", SilentTracker)
    given = "--data heart --num-workers 2 --keep-checkpoints 50 --output-dir elsewhere --name cut".split()
    given += ["--storage-retry-minutes", "5"]
    _, options = parse_train_options([*given, *(["--tracking-uri", store] if store else [])]).open_data()
    dataset = load_dataset(options.config().data)
    log = RunLogger.open(options, options.config(), dataset, None, store or "sqlite:////somewhere/mlflow.db")
    capsys.readouterr()
    log.close(status)
    command = re.search(r"next: python -m workflows\.train (.*)", capsys.readouterr().out)[1]
    command_line = parse_train_options(shlex.split(command))
    resumed, record = command_line.options, command_line.record
    assert record is not None and record.run_id == SilentTracker.run_id and resumed.resume
    assert resumed.config() == options.config()
    for name in (
        "name",
        "num_workers",
        "keep_checkpoints",
        "storage_retry_minutes",
        "output_dir",
        "tracking_uri",
    ):
        assert getattr(resumed, name) == getattr(options, name), name
