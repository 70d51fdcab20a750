"""Log sampler.onnx to MLflow and register it there, as a pyfunc model whose predict draws samples."""

import contextlib
import importlib.metadata
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

import diffusion
import export
from diffusion.metrics import is_detail
from export.cascade import Cascade
from export.pyfunc import PARAMETERS, open_model
from workflows.tracking.tracker import PublishedModel, RegistrationError

# Where there is a build of ONNX Runtime for GPUs. It runs on CPUs too; the two use the same folder, so that
# installing the other one over it would remove CUDA.
_HAS_GPU_BUILD = (
    "(sys_platform == 'linux' or sys_platform == 'win32') and "
    "(platform_machine == 'x86_64' or platform_machine == 'AMD64')"
)
_HAS_NO_GPU_BUILD = (
    "(sys_platform != 'linux' and sys_platform != 'win32') or "
    "(platform_machine != 'x86_64' and platform_machine != 'AMD64')"
)
_PARAMETER_TYPES = {str: DataType.string, int: DataType.long, float: DataType.double}
_ALIAS = "champion"
_NAME = "sampler"  # of the model in its run


def register(
    client: MlflowClient,
    tracking_uri: str,
    run_id: str,
    name: str,
    model: PublishedModel,
    tags: Mapping[str, object],
    *,
    may_promote: bool,
) -> tuple[int, bool, str]:
    """Log a model to a run and register it as a new version of a model.

    The new version gets the alias `champion` if no version has it yet, or if its test distance is smaller
    and was measured in the same way on the same data.

    Args:
        client: client of the MLflow store.
        tracking_uri: URI of the MLflow store.
        run_id: id of the sweep's parent run.
        name: name of the registered model.
        model: the model.
        tags: tags of the version: `test_distance`, and everything that two versions must have in common for
            their test distances to be comparable.
        may_promote: whether the version may get the alias at all.

    Returns:
        The number of the version, whether it got the alias, and the id of the model for `link_metrics`.

    Raises:
        RegistrationError: the store refused the model or cannot be reached.
    """
    with _using(tracking_uri):
        _delete_earlier_version(client, run_id, name, keep_champion=not may_promote)
        version, model_id = log_model(client, run_id, model, name)
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, str(value))
        promoted = may_promote and _beats_champion(client, name, tags)
        if promoted:
            client.set_registered_model_alias(name, _ALIAS, version)
    return int(version), promoted, model_id


def requirements() -> list[str]:
    """What a registered model needs, in the versions of this process: with those its file was checked."""
    runtime = onnxruntime.__version__
    return [
        *(f"{name}=={importlib.metadata.version(name)}" for name in ("numpy", "pillow")),
        f"onnxruntime-gpu=={runtime}; {_HAS_GPU_BUILD}",
        f"onnxruntime=={runtime}; {_HAS_NO_GPU_BUILD}",
    ]


def log_only(
    client: MlflowClient,
    tracking_uri: str,
    run_id: str,
    model: PublishedModel,
) -> str:
    """Log a model to a run without registering it, see `register`, and return its id for `link_metrics`.

    Raises:
        RegistrationError: the store refused the model or cannot be reached.
    """
    with _using(tracking_uri):
        return log_model(client, run_id, model)[1]


@contextlib.contextmanager
def _using(tracking_uri: str) -> Iterator[None]:
    """Make this MLflow's store, and raise what it raises as RegistrationError."""
    mlflow.set_tracking_uri(tracking_uri)
    try:
        yield
    except (MlflowException, OSError) as error:
        raise RegistrationError(str(error).splitlines()[0][:200]) from error


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


def log_model(
    client: MlflowClient,
    run_id: str,
    model: PublishedModel,
    registered_name: str | None = None,
) -> tuple[str, str]:
    """Log a model to a run, with its parameters, in place of an earlier session's.

    MLflow's tracking URI must be that of the client.

    Args:
        client: client of the MLflow store.
        run_id: id of the run.
        model: the model.
        registered_name: name under which to register it as well.

    Returns:
        The number of the registered version, empty if it is not registered, and the id of the model.
    """
    _delete_earlier_models(client, run_id)
    opened = open_model(model.sampler_file, provider="cpu")
    spec = opened.spec
    classes = opened.classes if isinstance(opened, Cascade) else spec.classes
    columns = [ColSpec(DataType.long, "num_samples"), ColSpec(DataType.long, "seed", required=False)]
    if classes:
        columns.append(ColSpec(DataType.string, "label", required=False))
    params = [
        ParamSpec(name, _PARAMETER_TYPES[kind], default=None)
        for name, kind in PARAMETERS.items()
        if classes or name != "guidance_scale"
    ]
    signature = ModelSignature(
        inputs=Schema(columns),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *spec.shape))]),
        params=ParamSchema(params),
    )
    # MLflow prints the version on standard error.
    with contextlib.redirect_stderr(io.StringIO()), mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name=_NAME,
            loader_module="export.pyfunc",
            data_path=str(model.sampler_file),
            code_paths=[str(Path(package.__path__[0])) for package in (diffusion, export)],
            signature=signature,
            input_example=pd.DataFrame({"num_samples": [4], "seed": [0]}),
            pip_requirements=requirements(),
            registered_model_name=registered_name,
            params={name: str(value) for name, value in model.params.items()},
        )
    return str(info.registered_model_version or ""), str(info.model_id)


def link_metrics(
    client: MlflowClient,
    run_id: str,
    model_id: str,
    metrics: Mapping[str, float],
    dataset: DatasetEntity | None,
) -> None:
    """Make metrics of a run those of its model as well, at the steps at which the run has these values.

    MLflow does this for metrics that are logged with a model's id, and ignores that the run has them already.
    When a model is logged, it does so by itself for those of step 0 that the run has by then, and a database
    refuses to do it twice.

    Args:
        client: client of the MLflow store.
        run_id: id of the run, which has been sent its metrics.
        model_id: id of the model.
        metrics: metrics of the model.
        dataset: the data that the model was trained and tested on, as its run has them.
    """
    data = {"dataset_name": dataset.name, "dataset_digest": dataset.digest} if dataset else {}
    known = {each.key for each in client.get_logged_model(model_id).metrics or ()}
    linked = []
    for name, value in metrics.items():
        logged = [] if is_detail(name) or name in known else client.get_metric_history(run_id, name)
        for each in [entry for entry in logged if entry.value == value][-1:]:
            linked.append(
                Metric(name, value, each.timestamp, each.step, model_id=model_id, run_id=run_id, **data)
            )
    if linked:
        client.log_batch(run_id, metrics=linked)


def newest_model(client: MlflowClient, experiment_id: str, run_id: str) -> str:
    """Id of the newest model that was logged to a run; empty if there is none."""
    models = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    return max(models, key=lambda model: model.creation_timestamp).model_id if models else ""


def _delete_earlier_models(client: MlflowClient, run_id: str) -> None:
    """Delete the models that earlier sessions logged to a run, except those of registered versions."""
    registered = {version.model_id for version in client.search_model_versions(f"run_id = '{run_id}'")}
    experiment_id = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"):
        if model.model_id not in registered:
            client.delete_logged_model(model.model_id)


def _beats_champion(client: MlflowClient, name: str, tags: Mapping[str, object]) -> bool:
    """Whether there is no champion, or a comparable one with a larger test distance."""
    if _ALIAS not in client.get_registered_model(name).aliases:
        return True
    champion = client.get_model_version_by_alias(name, _ALIAS).tags
    if any(champion.get(key) != str(value) for key, value in tags.items() if key != "test_distance"):
        return False
    return float(str(tags["test_distance"])) < float(champion["test_distance"])
