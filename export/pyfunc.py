"""MLflow's pyfunc interface to sampler.onnx; the `loader_module` of logged models.

import mlflow
import pandas as pd

mlflow.set_tracking_uri("sqlite:///mlflow.db")  # or the address of a server
model = mlflow.pyfunc.load_model("models:/ray-ddpm-digits@champion")
samples = model.predict(pd.DataFrame({"num_samples": [64]}))  # float32 [64, 1, 8, 8], in data units
"""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from export.sampler import Sampler


class _SamplerModel:
    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Draw samples. Each row of the input is one request; the results are concatenated.

        Args:
            model_input: table with the column `num_samples` and, optionally, `seed` and, for a conditional
                model, `label`, the name of a class. Requests without a seed draw the samples of seed 0, each
                request those that follow the one before, so that no two of a table are equal.
            params: ignored; part of MLflow's interface.

        Returns:
            float32 [sum of num_samples, *shape] in data units.
        """
        seeds, labels = (
            model_input[name] if name in model_input else [None] * len(model_input)
            for name in ("seed", "label")
        )
        samples, next_index = [], 0
        for num_samples, seed, label in zip(model_input["num_samples"], seeds, labels, strict=True):
            first_index = next_index if pd.isna(seed) else 0
            samples.append(
                self._sampler.sample(
                    int(num_samples),
                    seed=0 if pd.isna(seed) else int(seed),
                    first_index=first_index,
                    labels=None if pd.isna(label) else str(label),
                )
            )
            if pd.isna(seed):
                next_index += int(num_samples)
        return np.concatenate(samples)


def _load_pyfunc(data_path: str) -> _SamplerModel:
    """Load the model; MLflow calls this with the path of the logged sampler.onnx."""
    return _SamplerModel(Sampler(data_path))
