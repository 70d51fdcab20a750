"""Sweeps that never ran: made-up records, decisions and pictures."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.config import Config
from diffusion.evaluation.distances import Estimate
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import Storage
from workflows.sweep.champion import Champion
from workflows.sweep.decision import Comparison, Decision, Finalist, Outcome
from workflows.sweep.report.standings import Standings
from workflows.sweep.report.write_report import write_report
from workflows.sweep.trial_records import TrialRecords

SPACE = {"schedule.kind": ("linear", "cosine"), "training.learning_rate": (1e-4, 1e-2)}
TEST_METRICS = {
    "test/sample_distance": 0.125,
    "test/sample_distance_se": 0.0625,
    "test/sample_distance_floor": 0.03125,
    "test/sample_distance_floor_se": 0.0625,
    "test/sample_auc": 0.75,
    "test/sample_auc_se": 0.01,
    "test/sample_auc_floor": 0.5,
    "test/sample_auc_floor_se": 0.01,
    "test/sample_num_samples": 1000.0,
    "test/sample_copied": 0.01,
    "test/sample_copied_floor": 0.01,
    "test/sample_copied_p": 0.5,
    "test/sample_copied_detectable": 0.05,
}


def picture(path: Path, frames: int = 1) -> None:
    """Write a small picture, an animation with more than one frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.new("RGB", (24, 24), (10 * index, 90, 200)) for index in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:]) if frames > 1 else images[0].save(path)


@dataclass
class Trial:
    """A trial to make up; its objective falls to `objective` in two evaluations."""

    objective: float | None
    mse: float | None = None
    status: str = "finished"
    reason: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 60.0


# The best by the objective has the second-lowest MSE; the lowest belongs to the worst that finished.
TRIALS = {
    "best": Trial(1.0, 0.2),
    "second": Trial(2.0, 0.3, params={"schedule.kind": "cosine"}),
    "lowmse": Trial(3.0, 0.1, metrics={"sample/distance": 0.5, "sample/distance_se": 0.02}),
    "cut": Trial(4.0, 0.4, status="stopped", reason="behind the others"),
    "broken": Trial(None, status="diverged", reason="the loss is nan"),
}


class Sweep:
    """A made-up sweep in a folder.

    Args:
        directory: folder of the sweep.
        trials: its trials by ID; the first is the champion and the second the runner-up.
        grounds: what decided between these two.
        data_name: name of the data.
    """

    def __init__(self, directory: Path, trials: dict[str, Trial], grounds: str, data_name: str) -> None:
        self.directory, self.champion_folder = directory, directory / "champion"
        self.champion_folder.mkdir(parents=True)
        self.records = TrialRecords(directory)
        for number, (trial_id, trial) in enumerate(trials.items()):
            params = {
                **Config().with_values({"data.name": "heart"}).flat(),
                "data.name": data_name,
                "training.learning_rate": 1e-4 * 2.0**number,
                **trial.params,
            }
            self.records.start(trial_id, json.loads(json.dumps(params)))
            if trial.objective is not None:
                mse = {} if trial.mse is None else {"val/mse": trial.mse}
                curve = {"val/mse_at_log_snr_-2": 0.5 + number, "val/mse_at_log_snr_0": 0.25}
                for updates, excess in ((10, 1.0), (20, 0.0)):
                    values = {"objective": trial.objective + excess, **mse, **curve, **trial.metrics}
                    self.records.add_evaluation(trial_id, updates, values)
                picture(self.records.folder(trial_id) / "samples.png")
            self.records.end(trial_id, trial.status, trial.reason, trial.seconds)
        ids = [trial_id for trial_id, trial in trials.items() if trial.objective is not None]
        for name, frames in (("samples.png", 1), ("animation.gif", 3)):
            picture(self.champion_folder / name, frames)
        self.champion = self.make_champion(ids[:2], grounds)

    def make_champion(self, ids, grounds):
        finalists = {
            each: Finalist(name=each, objective=1.0 + place, distances={}, copies=False, cost=1.0 + place)
            for place, each in enumerate(ids)
        }
        distances = {"distance": Estimate(-0.04, 0.01), "auc": Estimate(-0.02, 0.004)}
        comparison = Comparison(Estimate(-1.0, 0.25), distances, 1234)
        outcomes = tuple(Outcome(ids[0], each, grounds, comparison, "") for each in ids[1:])
        confirmed = {
            each: {"sample/distance": 0.1 * (1 + place), "sample/distance_se": 0.01}
            for place, each in enumerate(ids)
        }
        return Champion(
            trial_id=ids[0],
            objective=self.records[ids[0]].objective,
            update=20,
            metrics=dict(TEST_METRICS),
            decision=Decision(tuple(ids), finalists, outcomes),
            reasons=tuple(f"chosen over trial {each}, since it is" for each in ids[1:]),
            confirmations=confirmed,
            data_fingerprint="f00d",
            directory=self.champion_folder,
        )

    @property
    def standings(self) -> Standings:
        return Standings(self.records, self.champion)

    def write_run(self, sessions=(), num_trials=5):
        """Write run.json with the origin of each session."""
        record = RunRecord(
            self.directory.name,
            "heart",
            "run",
            Config(),
            "f00d",
            command="tune",
            options={"num_trials": num_trials},
            provenance=list(sessions),
        )
        record.write(Storage(str(self.directory)), "running")

    def write(self, space=SPACE, correlations=None, **options) -> str:
        """Write the report and return its text."""
        path = write_report(self.directory, self.records, space, self.champion, correlations or {}, **options)
        return path.read_text()


@pytest.fixture
def make_sweep(tmp_path):
    """Function (trials, grounds, name, data_name) -> a made-up sweep."""

    def make(trials=TRIALS, grounds="samples", name="a-sweep", data_name="heart"):
        return Sweep(tmp_path / name, trials, grounds, data_name)

    return make


@pytest.fixture
def many():
    """Thirty trials whose objective depends on the learning rate alone; MSE orders them in reverse."""
    generator = np.random.default_rng(0)
    trials = {}
    for number in range(30):
        rate, kind = float(np.exp(generator.uniform(np.log(1e-4), np.log(1e-2)))), "linear cosine".split()
        params = {"training.learning_rate": rate, "schedule.kind": kind[generator.integers(2)]}
        trials[f"t{number}"] = Trial(float(np.log(rate)), float(-np.log(rate)), params=params)
    return dict(sorted(trials.items(), key=lambda item: item[1].objective))
