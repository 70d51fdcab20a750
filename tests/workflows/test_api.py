"""run_sweep and run_training on data in memory, in the session's Ray; two tiny runs serve most tests."""

import base64
import contextlib
import io
import json
import os
import signal
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from mlflow import MlflowClient

from diffusion import Config, InputError
from export import Sampler
from workflows import RunFailed, SweepResult, TrainingResult, run_sweep, run_training
from workflows.storage.run_record import read_record
from workflows.storage.storage import Storage

pytestmark = pytest.mark.usefixtures("small_reference")

SMALL = {
    "network": {"hidden_size": 16, "num_blocks": 1},
    "metrics": {"num_samples": 40, "num_examples": 40, "features": "random"},
    "sampler": {"num_steps": 5},
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FRAME = pd.DataFrame(
    np.random.default_rng(0).normal(size=(200, 2)) + [[10.0, 0.0]], columns=["mass", "charge"]
).assign(kind=["up", "down"] * 100)
IMAGES = np.random.default_rng(1).integers(0, 256, (120, 4, 4), dtype=np.uint8)


def process_state():
    """What a call must leave as it was."""
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(("RAY_", "MLFLOW_", "TUNE_"))
    }
    return variables, [signal.getsignal(number) for number in SIGNALS], list(warnings.filters)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    return {"output_dir": folder / "runs", "tracking_uri": f"sqlite:///{folder}/mlflow.db"}


@pytest.fixture(scope="module")
def sweep(ray_here, small_reference, store):
    """A sweep in another thread than the main one, as in a server; and what it printed."""
    results = []

    def sweep_table():
        results.append(
            run_sweep(
                FRAME,
                label_column="kind",
                name="table",
                num_trials=2,
                progress=False,
                search={"num_train_timesteps": 20, "beta_end": 0.3, "time_embedding_size": 8},
                training={"num_updates": 30, "num_evaluations": 2, "batch_size": 32},
                **SMALL,
                **store,
            )
        )

    thread = threading.Thread(target=sweep_table)
    thread.start()
    thread.join()
    return results[0]


def test_a_sweep_returns_its_trials_as_trials_csv_has_them(sweep):
    assert (sweep.name, sweep.status, sweep.interrupted) == ("table", "finished", False)
    pd.testing.assert_frame_equal(sweep.trials, pd.read_csv(sweep.path / "trials.csv"))
    assert len(sweep.trials) == 2 and set(sweep.trials["data.name"]) == {"memory://dataframe"}
    assert (sweep.trials["training.num_updates"] == 30).all()


def test_the_champion_is_one_of_the_trials_and_is_what_was_exported(sweep):
    champion = sweep.champion
    (row,) = sweep.trials[sweep.trials["trial_id"] == champion.trial_id].to_dict("records")
    assert champion.config == sweep.config and champion.path == sweep.model_dir == sweep.path / "champion"
    assert champion.config.training.learning_rate == row["training.learning_rate"]
    assert sweep.metrics["test/elbo_window"] > 0.0
    assert sweep.model.data.columns == ("mass", "charge")


def test_its_sampler_draws_the_classes_in_the_units_of_the_table(sweep):
    assert isinstance(sweep.sampler, Sampler) and sweep.sampler is sweep.sampler
    points = sweep.sampler.sample(64, seed=0, labels="up")
    assert points.shape == (64, 2) and list(sweep.sampler.spec.classes) == ["down", "up"]
    assert np.abs(points.mean(axis=0) - [10.0, 0.0]).max() < 3.0
    assert sweep.model.sample(3, labels=[0, 1, 0]).shape == (3, 2)


def test_its_representation_names_the_numbers_and_shows_the_picture(sweep):
    text, html = repr(sweep), sweep._repr_html_()
    for part in ("SweepResult table", "trials=2", sweep.champion.trial_id, "test/elbo_window="):
        assert part in text
    assert "\n" not in text
    picture = html.split("data:image/png;base64,")[1].split('"')[0]
    assert base64.b64decode(picture) == (sweep.model_dir / "samples.png").read_bytes()
    assert sweep.champion.trial_id in html and "<script" not in html


def test_it_can_be_read_again_from_its_folder(sweep):
    again = SweepResult.load(sweep.path)
    assert repr(again) == repr(sweep) and again.metrics == sweep.metrics
    with pytest.raises(InputError, match="there is no run of train.py"):
        TrainingResult.load(sweep.path)
    with pytest.raises(InputError, match="there is no run of tune.py"):
        SweepResult.load(sweep.path / "nowhere")


def test_the_callers_ray_is_left_running(sweep):
    assert ray.is_initialized() and ray.get(ray.put(3)) == 3


def test_a_name_that_is_taken_is_refused_before_anything_runs(sweep, store):
    with pytest.raises(InputError, match="name table: .* exists; choose another name"):
        run_sweep(FRAME, label_column="kind", name="table", **store)


def test_a_finished_sweep_is_extended_without_running_a_trial_again(sweep, store, capsys):
    earlier = [json.loads(line) for line in (sweep.path / "journal.jsonl").read_text().splitlines()]
    settings = {"name": "table", "resume": True, "progress": False}
    same = run_sweep(FRAME, label_column="kind", **settings, **store)
    assert same.trials.equals(sweep.trials), "without a larger budget there is nothing to do"
    extended = run_sweep(FRAME, label_column="kind", num_trials=3, **settings, **store)
    events = [json.loads(line) for line in (sweep.path / "journal.jsonl").read_text().splitlines()]
    assert events[: len(earlier)] == earlier
    added = {event["trial_id"] for event in events[len(earlier) :]}
    assert len(added) == 1 and not added & set(sweep.trials["trial_id"])
    assert extended.status == "finished" and set(extended.trials["trial_id"]) == added | set(
        sweep.trials["trial_id"]
    )
    decision = json.loads((extended.model_dir / "decision.json").read_text())
    assert set(decision["finalists"]) == set(extended.trials["trial_id"]), "all of them are judged anew"
    assert read_record(Storage(str(sweep.path))).options["num_trials"] == 3


class Pairs(torch.utils.data.Dataset):
    """Images with labels; its class is of this module, which the workers cannot import."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(self.images[index]).float() / 255.0, index % 3


TRAINING = {
    "name": "pairs",
    "conditional": True,
    "training": {"num_updates": 400, "num_evaluations": 40, "batch_size": 16},
    "schedule": {"num_train_timesteps": 20},
    **SMALL,
}


@pytest.fixture(scope="module")
def interrupted(ray_here, store):
    """A training that is interrupted once after its first checkpoint, and the process before and after."""
    checkpoints = store["output_dir"] / "pairs" / "checkpoints"

    def interrupt():
        while not (checkpoints.is_dir() and any(name.isdecimal() for name in os.listdir(checkpoints))):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    before = process_state()
    thread.start()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = run_training(Pairs(IMAGES), progress=False, **TRAINING, **store)
    assert printed.getvalue() == "", "progress=False prints nothing"
    return result, before, process_state()


@pytest.mark.slow
def test_ctrl_c_stops_a_training_after_a_checkpoint_and_returns_what_there_is(interrupted, store):
    result, _, _ = interrupted
    assert result.interrupted and result.status == "stopped"
    assert 0 < result.history["update"].iloc[-1] < 400 and "val/elbo_window" in result.history
    assert "status=stopped" in repr(result) and "img" not in result._repr_html_()
    with pytest.raises(InputError, match="resume=True"):
        result.sampler  # noqa: B018
    client = MlflowClient(store["tracking_uri"])
    (run,) = client.search_runs(
        [client.get_experiment_by_name("Pairs").experiment_id], "attributes.run_name = 'pairs'"
    )
    assert run.info.status == "KILLED"


@pytest.mark.slow
def test_a_run_leaves_the_process_as_it_was(interrupted):
    _, before, after = interrupted
    assert before == after


@pytest.mark.slow
def test_other_data_cannot_resume_it(interrupted, store):
    with pytest.raises(
        InputError, match="the data of memory://Pairs have changed since the run pairs"
    ) as caught:
        run_training(Pairs(IMAGES[::-1].copy()), name="pairs", resume=True, **store)
    assert "--" not in str(caught.value)


@pytest.mark.slow
def test_the_same_data_resume_it_to_the_end(interrupted, store, capsys):
    newest = max(os.listdir(interrupted[0].path / "checkpoints"))
    result = run_training(Pairs(IMAGES), name="pairs", resume=True, **store)
    assert f"Resuming from update {int(newest)} " in capsys.readouterr().out
    assert result.status == "finished" and result.history["update"].tolist() == list(range(10, 401, 10))
    images = result.sampler.sample(6)
    assert images.shape == (6, 1, 4, 4) and images.min() >= 0.0 and images.max() <= 1.0
    assert list(result.sampler.spec.classes) == ["0", "1", "2"]
    assert isinstance(result.config, Config) and result.metrics["test/sample_distance"] is not None
    assert TrainingResult.load(result.path).metrics == result.metrics
    capsys.readouterr()
    again = run_training(Pairs(IMAGES), name="pairs", start_or_resume=True, **store)
    assert again.metrics == result.metrics and "pairs is finished" in capsys.readouterr().out


def test_a_training_that_diverges_raises_with_the_reason(ray_here, store, monkeypatch):
    settings = TRAINING | {"name": "wild", "training": {"num_updates": 20, "learning_rate": 1.0}}
    monkeypatch.setattr("workflows.training.run_training.run_worker_group", _diverge)
    with pytest.raises(RunFailed, match="the loss is no longer a finite number") as caught:
        run_training(IMAGES, progress=False, **(settings | {"conditional": False}), **store)
    assert TrainingResult.load(caught.value.path).status == "failed"


def _diverge(job, resources, on_event, *rest):
    from workflows.training.events import Failed

    on_event(Failed("the loss is no longer a finite number after 3 updates"))
