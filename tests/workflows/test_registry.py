"""When the alias `champion` moves."""

import pytest
from mlflow import MlflowClient

from workflows import registry
from workflows.registry import RegistrationError, register
from workflows.tracking import Tracker

FIGURES = {"data_fingerprint": "f", "test_num_samples": 100, "test_distance": 1.0}


@pytest.fixture
def versions(tmp_path, monkeypatch):
    """A way to register a model of given figures, without the model itself."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(uri, "shapes")
    client = MlflowClient(uri)
    client.create_registered_model("model")

    def logged(run_id, *_arguments) -> str:
        return str(client.create_model_version("model", str(tmp_path), run_id).version)

    monkeypatch.setattr(registry, "_log_model", logged)

    def add(*, may_lead: bool = True, run_id: str | None = None, **changes) -> bool:
        file = tmp_path / "sampler.onnx"
        run_id = run_id or tracker.start("sweep", {})
        figures = FIGURES | changes
        return register(client, uri, run_id, "model", file, figures, may_lead=may_lead)[1]

    add.client, add.start = client, lambda: tracker.start("sweep", {})
    yield add
    tracker.close("FINISHED")


def test_the_first_version_leads_and_a_better_one_takes_over(versions):
    assert versions()
    assert not versions(test_distance=1.5)
    assert versions(test_distance=0.5)
    assert not versions(test_distance=0.5), "equal is not better"


@pytest.mark.parametrize("other", [{"data_fingerprint": "g"}, {"test_num_samples": 50}])
def test_figures_measured_otherwise_do_not_move_the_alias(versions, other):
    assert versions()
    assert not versions(test_distance=0.1, **other)


def test_a_sweep_that_is_handed_over_again_stays_one_version(versions):
    assert versions(test_distance=0.8)
    mine = versions.start()
    assert versions(run_id=mine, test_distance=0.5)
    assert versions(run_id=mine, test_distance=0.5), "nothing of its own stands in its way"
    found = versions.client.search_model_versions("name = 'model'")
    assert sorted(version.run_id == mine for version in found) == [False, True]


def test_a_sweep_cut_short_never_leads(versions):
    assert not versions(may_lead=False)
    assert versions()
    assert not versions(may_lead=False, test_distance=0.1)


def test_a_store_that_is_gone_is_an_error_of_one_line(tmp_path, monkeypatch):
    def gone(*_arguments) -> str:
        raise ConnectionRefusedError("nobody there\nat all")

    monkeypatch.setattr(registry, "_log_model", gone)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(RegistrationError, match="nobody there") as caught:
        register(client, f"sqlite:///{tmp_path}/mlflow.db", "r", "m", tmp_path, FIGURES, may_lead=True)
    assert "\n" not in str(caught.value)
