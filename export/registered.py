"""Fetches a sampler.onnx from MLflow's model registry; needs mlflow, which the sampler does not."""

import contextlib
import io
import tempfile
from pathlib import Path

from diffusion.errors import InputError

_LARGEST_MESSAGE = 200


def registered_file(uri: str) -> bytes:
    """The sampler.onnx of a registered model.

    Args:
        uri: such as models:/NAME@champion or models:/NAME/3; of the store that MLflow is set to.

    Raises:
        InputError: MLflow is not installed, has no such model, or it holds no sampler.onnx.
    """
    if not uri.startswith("models:/"):
        raise InputError(f"{uri!r}: give models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise InputError(f"{uri}: MLflow is not installed; install it, or give the file's path") from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # for its bar
                mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
        except (MlflowException, OSError, ValueError) as error:
            first_line = str(error).splitlines()[0][:_LARGEST_MESSAGE]
            raise InputError(f"{uri} cannot be had from {mlflow.get_tracking_uri()}: {first_line}") from error
        found = sorted(Path(folder).rglob("sampler.onnx"))
        if len(found) != 1:
            raise InputError(f"{uri} holds {len(found)} files named sampler.onnx: a sweep registers one")
        return found[0].read_bytes()
