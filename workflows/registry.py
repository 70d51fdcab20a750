"""The registered model: sampler.onnx as an MLflow pyfunc whose predict draws samples."""

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


class RegistrationError(RuntimeError):
    """MLflow did not take the model; the message is its own first line."""


_REQUIREMENTS = ("numpy", "onnxruntime", "pillow")
_ALIAS = "champion"


def register(
    client: MlflowClient,
    tracking_uri: str,
    run_id: str,
    name: str,
    sampler_file: Path,
    figures: Mapping[str, object],
    *,
    may_lead: bool,
) -> tuple[int, bool]:
    """Log sampler.onnx under a run and register it as a new version.

    The alias `champion` moves to it when no version has it, or when the new model's test distance
    is smaller and was measured in the same way on the same data.

    Args:
        client: of the store.
        tracking_uri: of the store.
        run_id: the sweep's parent run.
        name: of the registered model.
        sampler_file: the sampler.onnx.
        figures: `test_distance`, and what two of them must share to be compared; kept as tags.
        may_lead: whether the alias may move at all.

    Returns:
        The version, and whether the alias is on it.

    Raises:
        RegistrationError: the store refused or cannot be reached.
    """
    mlflow.set_tracking_uri(tracking_uri)
    try:
        _forget(client, run_id, name)
        version = _log_model(run_id, name, sampler_file)
        for key, value in figures.items():
            client.set_model_version_tag(name, version, key, str(value))
        best = may_lead and _beats_champion(client, name, figures)
        if best:
            client.set_registered_model_alias(name, _ALIAS, version)
    except (MlflowException, OSError) as error:
        raise RegistrationError(str(error).splitlines()[0][:200]) from error
    return int(version), best


def _forget(client: MlflowClient, run_id: str, name: str) -> None:
    """Delete what an earlier session of the same sweep registered: a sweep is one version."""
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == run_id:
            client.delete_model_version(name, version.version)


def _log_model(run_id: str, name: str, sampler_file: Path) -> str:
    """Log and register; returns the version."""
    spec = Sampler(sampler_file, provider="cpu").spec
    columns = [ColSpec(DataType.long, "num_samples"), ColSpec(DataType.long, "seed")]
    if spec.classes:
        columns.append(ColSpec(DataType.string, "label", required=False))
    signature = ModelSignature(
        inputs=Schema(columns), outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *spec.shape))])
    )
    # MLflow announces the version on standard error.
    with contextlib.redirect_stderr(io.StringIO()), mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="sampler",
            loader_module="export.serving",
            data_path=str(sampler_file),
            code_paths=[str(Path(package.__path__[0])) for package in (diffusion, export)],
            signature=signature,
            input_example=pd.DataFrame({"num_samples": [4], "seed": [0]}),
            pip_requirements=list(_REQUIREMENTS),
            registered_model_name=name,
        )
    return str(info.registered_model_version)


def _beats_champion(client: MlflowClient, name: str, figures: Mapping[str, object]) -> bool:
    if _ALIAS not in client.get_registered_model(name).aliases:
        return True
    tags = client.get_model_version_by_alias(name, _ALIAS).tags
    if any(tags.get(key) != str(value) for key, value in figures.items() if key != "test_distance"):
        return False
    return float(str(figures["test_distance"])) < float(tags["test_distance"])
