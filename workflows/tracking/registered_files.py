"""Downloads the config and the weights of a registered model from the run in MLflow that registered it."""

import contextlib
import io
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from diffusion.errors import InputError
from export.registered import REGISTRY
from workflows.redaction import redact

_FILES = ("config.json", "model.safetensors")
_FOLDERS = ("champion", "model")  # artifacts of a sweep and of a training


def download_model(client: MlflowClient, uri: str) -> Path:
    """Download config.json and model.safetensors of a registered model.

    Args:
        client: client of the MLflow store, see `workflows.tracking.mlflow_tracker.open_store`.
        uri: models:/NAME@ALIAS, models:/NAME/VERSION, or models:/NAME/latest for the newest version.

    Returns:
        A temporary folder with both files, which is removed when the process ends.

    Raises:
        InputError: there is no such model, or its run has no such files.
    """
    downloaded: list[str] = []
    try:
        version = _version(client, uri)
        # The progress bar of a download is written to standard error.
        with contextlib.redirect_stderr(io.StringIO()):
            artifacts = {each.path for each in client.list_artifacts(version.run_id)}
            source = next((name for name in _FOLDERS if name in artifacts), None)
            folder = _temporary_folder()
            for file in _FILES if source else ():
                downloaded.append(client.download_artifacts(version.run_id, f"{source}/{file}", folder))
    except (MlflowException, OSError) as error:
        reason = redact(str(error).splitlines()[0])[:200]
        raise InputError(
            f"{uri} cannot be read from {redact(client.tracking_uri)} ({reason}): give another model, or its "
            "folder"
        ) from error
    if not downloaded:
        raise InputError(
            f"{uri}: the run that registered it has no model's files; give the folder of the model"
        )
    return Path(downloaded[0]).parent


def _version(client: MlflowClient, uri: str) -> ModelVersion:
    """The version of a registered model that a URI names."""
    name, alias, word = uri.removeprefix(REGISTRY).partition("@")
    if alias:
        return client.get_model_version_by_alias(name, word)
    name, slash, word = name.partition("/")
    if not (name and slash and word):
        raise InputError(f"{uri}: give {REGISTRY}NAME@ALIAS or {REGISTRY}NAME/VERSION")
    if word != "latest":
        return client.get_model_version(name, word)
    versions = client.search_model_versions(f"name = '{name}'")
    if not versions:
        raise InputError(f"{uri}: no model of that name is registered")
    return max(versions, key=lambda version: int(version.version))


_temporary_folders: list["tempfile.TemporaryDirectory[str]"] = []


def _temporary_folder() -> str:
    """A folder that is removed when the process ends."""
    _temporary_folders.append(tempfile.TemporaryDirectory())
    return _temporary_folders[-1].name
