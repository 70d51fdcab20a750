"""Downloads the config and the weights of a registered model from the run in MLflow that registered it."""

import contextlib
import io
import tempfile
from pathlib import Path

from mlflow.exceptions import MlflowException

from diffusion.errors import InputError
from export.registered import REGISTRY
from workflows.redaction import redact
from workflows.tracking.mlflow_store import open_store
from workflows.tracking.tracker import resolve_tracking_uri

_FILES = ("config.json", "model.safetensors")
_FOLDERS = ("champion", "model")  # artifacts of a sweep and of a training


def download_model(uri: str, tracking_uri: str | None) -> Path:
    """Download config.json and model.safetensors of a registered model.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION, or models:/NAME/latest for the newest version.
        tracking_uri: value of --tracking-uri.

    Returns:
        A temporary folder with both files, which is removed when the process ends.

    Raises:
        InputError: the store cannot be used, there is no such model, or its run has no such files.
    """
    name, alias, number = _parts(uri)
    client = open_store(resolve_tracking_uri(tracking_uri))
    downloaded: list[str] = []
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        elif number != "latest":
            version = client.get_model_version(name, number)
        elif versions := client.search_model_versions(f"name = '{name}'"):
            version = max(versions, key=lambda each: int(each.version))
        else:
            raise InputError(f"{uri}: no model of that name is registered")
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


def _parts(uri: str) -> tuple[str, str, str]:
    """Name, alias and number of the version that a URI names; one of the last two is empty.

    Raises:
        InputError: it is no such URI.
    """
    name, has_alias, alias = uri.removeprefix(REGISTRY).partition("@")
    number = ""
    if not has_alias:
        name, _, number = name.partition("/")
    if not name or not (alias or number):
        raise InputError(f"{uri}: give {REGISTRY}NAME@ALIAS or {REGISTRY}NAME/VERSION")
    return name, alias, number


_temporary_folders: list["tempfile.TemporaryDirectory[str]"] = []


def _temporary_folder() -> str:
    """A folder that is removed when the process ends."""
    _temporary_folders.append(tempfile.TemporaryDirectory())
    return _temporary_folders[-1].name
