"""When the alias `champion` moves to a new version."""

import pytest
from mlflow import MlflowClient

from workflows.tracking import registry
from workflows.tracking.mlflow_tracker import MlflowTracker
from workflows.tracking.registry import register
from workflows.tracking.tracker import PublishedModel, RegistrationError

TAGS = {"data_fingerprint": "f", "test_num_samples": 100, "test_distance": 1.0}


@pytest.fixture
def versions(database_uri, tmp_path, monkeypatch):
    """A function that registers a version with given tags, without a real model."""
    uri = database_uri
    tracker = MlflowTracker(uri, "shapes")
    client = MlflowClient(uri)
    client.create_registered_model("model")

    def log_model(_client, run_id, *_arguments) -> tuple[str, str]:
        return str(client.create_model_version("model", str(tmp_path), run_id).version), "m"

    monkeypatch.setattr(registry, "log_model", log_model)

    def add(*, may_promote: bool = True, run_id: str | None = None, **changes) -> bool:
        model = PublishedModel(tmp_path / "sampler.onnx", {}, {})
        run_id = run_id or tracker.start("sweep", {})
        return register(client, uri, run_id, "model", model, TAGS | changes, may_promote=may_promote)[1]

    add.client, add.start = client, lambda: tracker.start("sweep", {})
    yield add
    tracker.close("finished")


def test_the_first_version_is_champion_until_there_is_a_better_one(versions):
    assert versions()
    assert not versions(test_distance=1.5)
    assert versions(test_distance=0.5)
    assert not versions(test_distance=0.5), "equal is not better"


@pytest.mark.parametrize("other", [{"data_fingerprint": "g"}, {"test_num_samples": 50}])
def test_a_distance_measured_differently_does_not_move_the_alias(versions, other):
    assert versions()
    assert not versions(test_distance=0.1, **other)


def test_a_sweep_registered_again_has_one_version(versions):
    assert versions(test_distance=0.8)
    mine = versions.start()
    assert versions(run_id=mine, test_distance=0.5)
    assert versions(run_id=mine, test_distance=0.5), "it is not compared with its own earlier version"
    remaining = versions.client.search_model_versions("name = 'model'")
    assert sorted(version.run_id == mine for version in remaining) == [False, True]


def test_an_interrupted_extension_leaves_the_champion_of_the_finished_sweep(versions):
    mine = versions.start()
    assert versions(run_id=mine)
    assert not versions(run_id=mine, test_distance=0.5, may_promote=False)
    champion = versions.client.get_model_version_by_alias("model", "champion")
    assert champion.tags["test_distance"] == "1.0"
    assert versions(run_id=mine, test_distance=0.7), "at its end, the sweep has one version again"
    (version,) = versions.client.search_model_versions("name = 'model'")
    assert version.tags["test_distance"] == "0.7"


def test_an_interrupted_sweep_never_becomes_champion(versions):
    assert not versions(may_promote=False)
    assert versions()
    assert not versions(may_promote=False, test_distance=0.1)


def test_an_unreachable_store_is_a_one_line_error(tmp_path, monkeypatch):
    def refuse(*_arguments) -> str:
        raise ConnectionRefusedError("connection refused\nsecond line")

    monkeypatch.setattr(registry, "log_model", refuse)
    client, model = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), PublishedModel(tmp_path, {}, {})
    with pytest.raises(RegistrationError, match="connection refused") as caught:
        register(client, f"sqlite:///{tmp_path}/mlflow.db", "r", "m", model, TAGS, may_promote=True)
    assert "\n" not in str(caught.value)
