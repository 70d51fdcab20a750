"""Opening and closing a run: one writer, an end that the tracker knows, nothing left of a failed start."""

from types import SimpleNamespace

import pytest
from PIL import Image

from diffusion.data.dataset import load_dataset
from diffusion.errors import InputError
from workflows.cli.parsing import parse_train_options
from workflows.storage.run_lock import RunLock
from workflows.storage.run_record import read_record
from workflows.training import run_training
from workflows.training.events import CheckpointDamaged, Evaluated, Started
from workflows.training.run_logger import RunLogger
from workflows.training.worker import picture_name

METRICS = {"objective": 0.5, "train/mse": 0.1, "val/mse": 0.2}


class ListTracker:
    """Lists what it is told.

    Attributes:
        calls: names of methods and what they were told, of all trackers.
        error: what `log_dataset`, the last step of opening a run, raises.
        steps: steps that the store has already.
    """

    name, unsent, refused, location = "MLflow", 0, (), "nowhere"
    calls, error, steps = [], None, frozenset()

    def __init__(self, uri, experiment):
        self.run_id = ""

    def keep_entries(self, folder):
        pass

    def start(self, name, params, folder=None, *, reuse=False):
        self.run_id = "0" * 32

    def resume(self, run_id):
        self.run_id = run_id
        return set(self.steps)

    def tag(self, tags):
        pass

    def log_dataset(self, dataset):
        if self.error is not None:
            raise self.error

    def log(self, metrics, step):
        self.calls.append(("metrics", step))

    def log_picture(self, picture, step):
        self.calls.append(("picture", step))

    def close(self, status):
        self.calls.append(("close", status))


@pytest.fixture(name="tracker")
def _tracker(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("workflows.training.base_logger.open_tracker", ListTracker)
    for name, value in (("calls", []), ("error", None), ("steps", frozenset())):
        monkeypatch.setattr(ListTracker, name, value)
    return ListTracker


def open_run(*arguments):
    command_line = parse_train_options(["--data", "heart", "--name", "mine", *arguments])
    (_, options), record = command_line.open_data(), command_line.record
    dataset = load_dataset(options.config().data)
    return RunLogger.open(options, options.config(), dataset, record, "sqlite:////there/mlflow.db")


def assert_is_free(folder):
    RunLock(folder).release()


def test_nobody_else_writes_to_a_run_until_it_is_closed(tracker):
    log = open_run()
    with pytest.raises(InputError, match="--name mine: another process runs it"):
        RunLock(log.folder.path)
    log.close("stopped")
    assert_is_free(log.folder.path)


def test_a_run_is_recorded_as_ended_after_the_tracker_knows(tracker, monkeypatch):
    """A run that is killed in between can be resumed, which ends it in the tracker as well."""
    log, recorded = open_run(), []
    monkeypatch.setattr(log.tracker, "close", lambda status: recorded.append(read_record(log.folder).status))
    log.close("finished")
    assert recorded == ["running"] and read_record(log.folder).status == "finished"


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt()])
def test_a_run_that_cannot_be_opened_leaves_nothing_open(tracker, tmp_path, error):
    tracker.error = error
    with pytest.raises(type(error)):
        open_run()
    assert tracker.calls == [("close", "stopped")] and not list((tmp_path / "runs").iterdir())
    tracker.error = None
    open_run().close("stopped")


def test_a_run_that_cannot_be_resumed_keeps_its_files_and_is_free(tracker, tmp_path):
    open_run().close("stopped")
    record, tracker.error = (tmp_path / "runs/mine/run.json").read_bytes(), InputError("no")
    with pytest.raises(InputError, match="^no$"):
        open_run("--resume")
    assert (tmp_path / "runs/mine/run.json").read_bytes() == record
    assert_is_free(tmp_path / "runs/mine")


def test_a_resumed_run_sends_an_evaluation_that_the_store_has_not_and_its_metrics_last(tracker, tmp_path):
    """The steps of the metrics tell what the store has: a picture that came after them could be lost."""
    open_run().close("stopped")
    tracker.steps = {10}
    log = open_run("--resume")
    Image.new("L", (4, 4)).save(tmp_path / "samples.png")
    picture = (tmp_path / "samples.png").read_bytes()
    for update in (10, 20):
        log.pictures.write_bytes(picture_name(update), picture)
    tracker.calls.clear()
    history = [{"update": update, "metrics": METRICS} for update in (10, 20)]
    log.on_event(Started(20, 1, history, "cpu", 1))
    log.on_event(Evaluated(30, METRICS, {"samples.png": picture}))
    assert tracker.calls == [("picture", 20), ("metrics", 20), ("picture", 30), ("metrics", 30)]
    log.close("stopped")


@pytest.mark.parametrize(
    ("updates", "words"), [(0, "the training starts from scratch"), (10, "Resuming from update 10")]
)
def test_a_run_with_a_damaged_checkpoint_says_where_it_begins(tracker, updates, words, capsys):
    log = open_run()
    log.checkpoint_damaged(CheckpointDamaged("checkpoints/000000020 is damaged"))
    log.started(Started(updates, 1, [], "cpu", 1))
    first, last = capsys.readouterr().out.splitlines()
    assert "000000020 is damaged" in first and words in last
    log.close("stopped")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone")])
def test_a_training_that_fails_right_after_it_was_opened_is_closed(tracker, monkeypatch, error):
    """Its run in MLflow and its lock would stay."""

    def fail(*_arguments):
        raise error

    monkeypatch.setattr(run_training, "run_lines", fail)
    log = open_run()
    dataset = load_dataset(log._record.config.data)
    plan = SimpleNamespace(config=log._record.config, data=SimpleNamespace(dataset=dataset))
    plan.resources = plan.weights = None
    with pytest.raises(type(error)):
        run_training._train(log, plan, parse_train_options(["--data", "heart"]).options, is_resumed=False)
    status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
    assert tracker.calls == [("close", status)] and read_record(log.folder).status == status
    assert_is_free(log.folder.path)
