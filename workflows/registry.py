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
    test: Mapping[str, object],
) -> tuple[int, bool]:
    """Log sampler.onnx under a run and register it as a new version.

    The alias `champion` moves to it when no version has it, or when the new model's test distance
    is smaller on the same test data.

    Args:
        client: of the store.
        tracking_uri: of the store.
        run_id: the sweep's parent run.
        name: of the registered model.
        sampler_file: the sampler.onnx.
        test: `data_fingerprint` and `test_distance`, kept as tags of the version.

    Returns:
        The version, and whether the alias is on it.

    Raises:
        RegistrationError: the store refused or cannot be reached.
    """
    mlflow.set_tracking_uri(tracking_uri)
    try:
        version = _log_model(run_id, name, sampler_file)
        for key, value in test.items():
            client.set_model_version_tag(name, version, key, str(value))
        best = _beats_champion(client, name, test)
        if best:
            client.set_registered_model_alias(name, _ALIAS, version)
    except (MlflowException, OSError) as error:
        raise RegistrationError(str(error).splitlines()[0][:200]) from error
    return int(version), best


def _log_model(run_id: str, name: str, sampler_file: Path) -> str:
    """Log and register; returns the version."""
    shape = Sampler(sampler_file, provider="cpu").spec.shape
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "num_samples"), ColSpec(DataType.long, "seed")]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))]),
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


def _beats_champion(client: MlflowClient, name: str, test: Mapping[str, object]) -> bool:
    try:
        champion = client.get_model_version_by_alias(name, _ALIAS)
    except MlflowException:
        return True
    if champion.tags.get("data_fingerprint") != test["data_fingerprint"]:
        return False
    return float(str(test["test_distance"])) < float(champion.tags.get("test_distance", "inf"))
