"""MLflow's pyfunc interface to sampler.onnx or the files of a cascade; the `loader_module` of logged models.

import mlflow
import pandas as pd

mlflow.set_tracking_uri("sqlite:///mlflow.db")  # or the address of a server
model = mlflow.pyfunc.load_model("models:/ray-ddpm-digits@champion")
samples = model.predict(pd.DataFrame({"num_samples": [64]}))  # float32 [64, 1, 8, 8], in data units
samples = model.predict(pd.DataFrame({"num_samples": [64]}), params={"sampler": "ddim", "num_steps": 20})
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffusion.errors import InputError
from export.cascade import Cascade, cascade_files
from export.sampler import Sampler
from export.session import Provider
from export.values import real_number

# Parameters of a request, with their types, beside the columns of its table. `guidance_scale` is only for
# models with classes.
PARAMETERS: dict[str, type] = {
    "sampler": str,
    "num_steps": int,
    "eta": float,
    "spacing": str,
    "guidance_scale": float,
    "time_limit": float,
}

# Environment variables of MLflow: set to "true" in `mlflow models serve`, and the seconds after which it
# answers a request with an error, whether or not the model has finished.
_SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"
_SERVERS_LIMIT, _SERVERS_DEFAULT = "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "60"


class _SamplerModel:
    def __init__(self, sampler: Sampler | Cascade) -> None:
        self._sampler = sampler

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Draw samples. Each row of the input is one request; the results are concatenated.

        Args:
            model_input: table with the column `num_samples` and, optionally, `seed` and, for a conditional
                model, `label`, the name of a class. Requests without a seed draw the samples of seed 0, each
                request those that follow the one before, so that no two of a table are equal.
            params: of all requests: `sampler`, `num_steps`, `eta`, `spacing` and `guidance_scale`, as for
                `export.Sampler.sample`, and `time_limit`, in seconds for the whole table. One that is missing
                or None is the file's. Without a time limit there is none, but in `mlflow models serve` it is
                that server's own, after which nobody waits for the answer.

        Returns:
            float32 [sum of num_samples, *shape] in data units.

        Raises:
            InputError: a value is invalid, or the time limit was exceeded. It is an MlflowException too, and
                MLflow's server answers with status 400 and the message, without a stack trace.
        """
        try:
            return self._predict(model_input, params or {})
        except InputError as error:
            # Here, since a sampler without MLflow never gets here.
            from mlflow.exceptions import MlflowException
            from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

            class InvalidRequest(MlflowException, InputError):
                """An InputError that MLflow's server takes for a fault of the request."""

            # mypy sees InputError's arguments alone, since MLflow is not typed.
            raise InvalidRequest(str(error), INVALID_PARAMETER_VALUE) from None  # type: ignore[call-arg]

    def _predict(self, model_input: pd.DataFrame, params: dict[str, Any]) -> NDArray[np.float32]:
        unknown = [name for name in params if name not in PARAMETERS]
        if unknown:
            raise InputError(f"params {', '.join(map(str, unknown))}: give {', '.join(PARAMETERS)}")
        if "num_samples" not in model_input or not len(model_input):
            raise InputError("the table needs at least one row, and the column num_samples")
        options = {name: value for name, value in params.items() if value is not None}
        deadline = _deadline(options.pop("time_limit", None))
        seeds, labels = (
            model_input[name] if name in model_input else [None] * len(model_input)
            for name in ("seed", "label")
        )
        samples, next_index = [], 0
        for num_samples, seed, label in zip(model_input["num_samples"], seeds, labels, strict=True):
            follows = _is_missing(seed)
            drawn = self._sampler.sample(
                _whole(num_samples),
                seed=0 if follows else _whole(seed),
                first_index=next_index if follows else 0,
                labels=None if _is_missing(label) else str(label),
                time_limit=None if deadline is None else max(deadline - time.monotonic(), 1e-9),
                **options,
            )
            samples.append(drawn)
            if follows:
                next_index += len(drawn)
        return np.concatenate(samples)


def _deadline(time_limit: Any) -> float | None:
    """When a request has to be finished, in time.monotonic's seconds."""
    if time_limit is None and os.environ.get(_SERVING) == "true":
        time_limit = float(os.environ.get(_SERVERS_LIMIT) or _SERVERS_DEFAULT)
    if time_limit is None:
        return None
    seconds = real_number("time_limit", time_limit)
    if not seconds > 0.0:
        raise InputError(f"time_limit {seconds:g}: give a number of seconds greater than 0")
    return time.monotonic() + seconds


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or bool(value != value)  # NaN and NaT differ from themselves


def _whole(value: Any) -> Any:
    """A cell of a table as the sampler takes it: pandas makes whole numbers beside missing ones floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _load_pyfunc(data_path: str) -> _SamplerModel:
    """Load the model; MLflow calls this with the path of the logged sampler.onnx or of a folder of files."""
    return _SamplerModel(open_model(Path(data_path)))


def open_model(path: Path, provider: Provider = "auto") -> Sampler | Cascade:
    """Open a logged model.

    Args:
        path: path of a sampler.onnx, or of a folder with the files of a cascade, see `cascade_files`.
        provider: where the networks run, as for `export.Sampler`.
    """
    if not path.is_dir():
        return Sampler(path, provider)
    return Cascade([Sampler(each, provider) for each in cascade_files(path)])
