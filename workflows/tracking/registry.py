"""Register sampler.onnx in MLflow, as a pyfunc model whose predict draws samples."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

import diffusion
import export
from export.sampler import Sampler
from workflows.tracking.tracker import RegistrationError

_REQUIREMENTS = ("numpy", "onnxruntime", "pillow")
_ALIAS = "champion"


def register(
    client: MlflowClient,
    tracking_uri: str,
    run_id: str,
    name: str,
    sampler_file: Path,
    tags: Mapping[str, object],
    *,
    may_promote: bool,
) -> tuple[int, bool]:
    """Log sampler.onnx to a run and register it as a new version of a model.

    The new version gets the alias `champion` if no version has it yet, or if its test distance is smaller
    and was measured in the same way on the same data.

    Args:
        client: client of the MLflow store.
        tracking_uri: URI of the MLflow store.
        run_id: id of the sweep's parent run.
        name: name of the registered model.
        sampler_file: path of sampler.onnx.
        tags: tags of the version: `test_distance`, and everything that two versions must have in common for
            their test distances to be comparable.
        may_promote: whether the version may get the alias at all.

    Returns:
        The number of the version, and whether it got the alias.

    Raises:
        RegistrationError: the store refused the model or cannot be reached.
    """
    mlflow.set_tracking_uri(tracking_uri)
    try:
        _delete_earlier_version(client, run_id, name, keep_champion=not may_promote)
        version = log_model(run_id, name, sampler_file)
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, str(value))
        promoted = may_promote and _beats_champion(client, name, tags)
        if promoted:
            client.set_registered_model_alias(name, _ALIAS, version)
    except (MlflowException, OSError) as error:
        raise RegistrationError(str(error).splitlines()[0][:200]) from error
    return int(version), promoted


def _delete_earlier_version(client: MlflowClient, run_id: str, name: str, *, keep_champion: bool) -> None:
    """Delete what an earlier session of the same sweep registered, so that each sweep has one version.

    Args:
        client: client of the MLflow store.
        run_id: id of the sweep's parent run.
        name: name of the registered model.
        keep_champion: whether the version with the alias champion stays: when a finished sweep is extended,
            and the extension is interrupted.
    """
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == run_id:
            aliases = client.get_model_version(name, version.version).aliases
            if keep_champion and _ALIAS in aliases:
                continue
            client.delete_model_version(name, version.version)


def log_model(run_id: str, name: str, sampler_file: Path) -> str:
    """Log sampler.onnx to a run as a pyfunc model, register it, and return the new version."""
    spec = Sampler(sampler_file, provider="cpu").spec
    columns = [ColSpec(DataType.long, "num_samples"), ColSpec(DataType.long, "seed", required=False)]
    if spec.classes:
        columns.append(ColSpec(DataType.string, "label", required=False))
    signature = ModelSignature(
        inputs=Schema(columns), outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *spec.shape))])
    )
    # MLflow prints the version on standard error.
    with contextlib.redirect_stderr(io.StringIO()), mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="sampler",
            loader_module="export.pyfunc",
            data_path=str(sampler_file),
            code_paths=[str(Path(package.__path__[0])) for package in (diffusion, export)],
            signature=signature,
            input_example=pd.DataFrame({"num_samples": [4], "seed": [0]}),
            pip_requirements=list(_REQUIREMENTS),
            registered_model_name=name,
        )
    return str(info.registered_model_version)


def _beats_champion(client: MlflowClient, name: str, tags: Mapping[str, object]) -> bool:
    """Whether there is no champion, or a comparable one with a larger test distance."""
    if _ALIAS not in client.get_registered_model(name).aliases:
        return True
    champion = client.get_model_version_by_alias(name, _ALIAS).tags
    if any(champion.get(key) != str(value) for key, value in tags.items() if key != "test_distance"):
        return False
    return float(str(tags["test_distance"])) < float(champion["test_distance"])
