"""The files of a registered model are those of the run that registered it."""

import pytest
from mlflow import MlflowClient

from diffusion.errors import InputError
from workflows.tracking.mlflow_tracker import MlflowTracker
from workflows.tracking.registered_files import download_model


@pytest.fixture
def client(database_uri, tmp_path):
    """Client of a store with the model m: version 1 has a champion's files, version 2 has none."""
    client = MlflowClient(database_uri)
    client.create_registered_model("m")
    files = tmp_path / "files"
    files.mkdir()
    for name in ("config.json", "model.safetensors"):
        (files / name).write_text(name)
    for has_files in (True, False):
        tracker = MlflowTracker(database_uri, "shapes")
        run_id = tracker.start("sweep", {})
        if has_files:
            tracker.log_files(files, "champion")
        tracker.close("finished")
        client.create_model_version("m", "x", run_id)
    client.set_registered_model_alias("m", "champion", "1")
    return client


@pytest.mark.parametrize("uri", ["models:/m@champion", "models:/m/1"])
def test_config_and_weights_are_downloaded(client, database_uri, uri):
    folder = download_model(uri, database_uri)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        name: name for name in ("config.json", "model.safetensors")
    }


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models:/m/latest", "has no model's files"),
        ("models:/m@other", "cannot be read from sqlite"),
        ("models:/m/9", "cannot be read from sqlite"),
        ("models:/n/latest", "no model of that name"),
        ("models:/m", "give models:/NAME@ALIAS"),
    ],
)
def test_what_is_not_registered_is_refused_in_one_line(client, database_uri, uri, words):
    with pytest.raises(InputError, match=words) as caught:
        download_model(uri, database_uri)
    assert "\n" not in str(caught.value)
