"""Upload, registration and the last lines of a run, with a tracker that records what it is asked for."""

import pytest

from workflows.publishing.registration import log_model, register_model, upload_model
from workflows.publishing.summary import file_lines, next_lines, quality_lines
from workflows.tracking.tracker import PublishedModel, Registration, RegistrationError

METRICS = {
    "test/elbo_window": 1.25,
    "test/sample_distance": 0.5,
    "test/sample_distance_floor": 0.125,
    "test/sample_num_samples": 200.0,
    "test/sample_num_reference": 100.0,
}


class Recorder:
    """Stands for a tracker; `outcome` is what a registration returns or raises."""

    name = "MLflow"

    def __init__(self, outcome=None):
        self.outcome, self.calls = outcome, []

    def log_files(self, *values):
        self.calls.append(values)

    def describe(self, markdown):
        self.calls.append(markdown)

    def log_model(self, model):
        self.calls.append(model)
        if self.outcome:
            raise self.outcome

    def register(self, *values, **flags):
        self.calls.append((values, flags))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def location_hint(self):
        return "make ui"


def test_the_folder_is_uploaded_and_its_card_describes_the_run(tmp_path):
    (tmp_path / "model_card.md").write_text("# A model")
    tracker = Recorder()
    upload_model(tracker, tmp_path, "champion")
    assert tracker.calls == [(tmp_path, "champion"), "# A model"]


def registered(tmp_path, outcome, *, interrupted=False):
    """The line about a registration, and what was registered."""
    tracker = Recorder(outcome)
    line = register_model(
        tracker, "ray-ddpm-x", tmp_path, {"seed": 1}, METRICS, "f" * 64, "none", interrupted=interrupted
    )
    return line, tracker.calls[0]


def test_a_better_model_is_registered_with_what_makes_versions_comparable(tmp_path):
    line, (values, flags) = registered(tmp_path, Registration(3, True))
    assert line == "registered in MLflow as ray-ddpm-x version 3"
    assert values[:2] == ("ray-ddpm-x", PublishedModel(tmp_path / "sampler.onnx", {"seed": 1}, METRICS))
    assert values[2] == {
        "data_fingerprint": "f" * 64,
        "test_distance": 0.5,
        "test_num_samples": 200,
        "test_num_reference": 100,
        "test_features": "none",
        "test_metric": "kernel",
    }
    assert flags == {"may_promote": True}


@pytest.mark.parametrize(
    ("interrupted", "reason"), [(False, "its test distance is smaller"), (True, "was interrupted")]
)
def test_the_line_says_why_the_alias_stays(tmp_path, interrupted, reason):
    line, (_, flags) = registered(tmp_path, Registration(2, False), interrupted=interrupted)
    assert "version 2; the alias champion stays" in line and reason in line
    assert flags == {"may_promote": not interrupted}


def test_a_failed_registration_is_a_warning(tmp_path):
    line, _ = registered(tmp_path, RegistrationError("the store refused it"))
    assert line == "warning: MLflow did not register the model (the store refused it)"


def test_the_model_of_a_training_is_logged_and_a_failure_is_a_warning(tmp_path):
    tracker = Recorder()
    assert log_model(tracker, tmp_path, {"seed": 1}, METRICS) == []
    assert tracker.calls == [PublishedModel(tmp_path / "sampler.onnx", {"seed": 1}, METRICS)]
    refusing = Recorder(RegistrationError("the store refused it"))
    assert log_model(refusing, tmp_path, {}, METRICS) == [
        "warning: MLflow did not log the model (the store refused it)"
    ]


def test_the_last_lines_name_the_quality_the_files_and_the_next_commands():
    quality = "\n".join(quality_lines(METRICS))
    assert "ELBO window 1.2500 nats/dim, sample distance 0.5 with 200 samples (0.125 with as many" in quality
    assert "copies training examples was not measured" in quality
    assert [line.split()[0] for line in file_lines("runs/one/model")] == [
        f"runs/one/model/{name}" for name in ("samples.png", "animation.gif", "sampler.onnx")
    ]
    local = next_lines("runs/one/model", Recorder(), is_local=True)
    assert local[0].startswith("next: make ui") and "runs/one/model/sampler.onnx" in local[1]
    second = next_lines("runs/one/model", Recorder(), is_local=True, low_resolution=7)[1]
    assert "MODEL_OF_7_PIXELS.onnx --then runs/one/model/sampler.onnx" in second


def test_a_run_in_a_bucket_gets_no_command_to_sample():
    assert next_lines("s3://b/model", Recorder(), is_local=False) == ["next: make ui"]
