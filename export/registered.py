"""Downloads a sampler.onnx from MLflow's model registry. Needs mlflow, unlike the sampler itself.

from export import Sampler

sampler = Sampler.from_registry("models:/ray-ddpm-digits@champion")  # in the store of MLFLOW_TRACKING_URI
samples = sampler.sample(64, seed=0)
"""

import contextlib
import io
import tempfile
from pathlib import Path

from diffusion.errors import InputError
from export.cascade import cascade_files

REGISTRY = "models:/"  # how the URI of a registered model begins
_MAX_MESSAGE = 200


def download_sampler(uri: str) -> bytes:
    """Download the sampler.onnx of a registered model.

    Args:
        uri: URI of the model, such as models:/NAME@champion or models:/NAME/3, in the registry that MLflow
            is configured to use.

    Returns:
        The file's bytes.

    Raises:
        InputError: MLflow is not installed, the model does not exist, or it contains no sampler.onnx.
    """
    models = download_models(uri)
    if len(models) != 1:
        raise InputError(
            f"{uri} is a cascade of {len(models)} models: open it by "
            "Cascade([Sampler(each) for each in export.registered.download_models(URI)])"
        )
    return models[0]


def download_models(uri: str) -> list[bytes]:
    """Download the sampler.onnx of a registered model, or the files of a registered cascade in their order.

    Arguments and errors as for `download_sampler`.
    """
    if not uri.startswith(REGISTRY):
        raise InputError(f"{uri!r}: give {REGISTRY}NAME@ALIAS or {REGISTRY}NAME/VERSION")
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise InputError(f"{uri}: MLflow is not installed; install it, or give the file's path") from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # hides its progress bar
                mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
        except (MlflowException, OSError, ValueError) as error:
            first_line = str(error).splitlines()[0][:_MAX_MESSAGE]
            raise InputError(
                f"{uri} cannot be downloaded from {mlflow.get_tracking_uri()}: {first_line}"
            ) from error
        files = sorted(Path(folder).rglob("sampler.onnx"))
        if len(files) == 1:
            return [files[0].read_bytes()]
        first = next(iter(Path(folder).rglob("1.onnx")), None)
        if files or first is None:
            raise InputError(
                f"{uri} contains {len(files)} files named sampler.onnx instead of one: "
                "give a model that a sweep registered"
            )
        return [path.read_bytes() for path in cascade_files(first.parent)]
