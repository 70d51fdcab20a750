"""MLflow's pyfunc interface to sampler.onnx; the `loader_module` of logged models."""

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
            model_input: table with the columns `num_samples` and `seed` and, for a conditional model,
                optionally `label`, the name of a class.
            params: ignored; part of MLflow's interface.

        Returns:
            float32 [sum of num_samples, *shape] in data units.
        """
        labels = model_input["label"] if "label" in model_input else [None] * len(model_input)
        requests = zip(model_input["num_samples"], model_input["seed"], labels, strict=True)
        return np.concatenate(
            [
                self._sampler.sample(
                    int(num_samples), seed=int(seed), labels=None if pd.isna(label) else str(label)
                )
                for num_samples, seed, label in requests
            ]
        )


def _load_pyfunc(data_path: str) -> _SamplerModel:
    """Load the model; MLflow calls this with the path of the logged sampler.onnx."""
    return _SamplerModel(Sampler(data_path))
