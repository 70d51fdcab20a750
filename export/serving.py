"""sampler.onnx behind MLflow's pyfunc interface; named by `loader_module` in the logged model."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from export.sampler import Sampler


class _SamplerModel:
    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Draw samples: one row of `num_samples` and `seed` is one request, results joined.

        Args:
            model_input: a DataFrame with columns `num_samples` and `seed`; for a conditional model, if
                you like, `label`: a class's name.
            params: not used.

        Returns:
            float32 [sum of num_samples, *shape] in data units.
        """
        labels = model_input["label"] if "label" in model_input else [None] * len(model_input)
        requests = zip(model_input["num_samples"], model_input["seed"], labels, strict=True)
        return np.concatenate(
            [
                self._sampler.sample(
                    int(count), seed=int(seed), labels=None if pd.isna(label) else str(label)
                )
                for count, seed, label in requests
            ]
        )


def _load_pyfunc(data_path: str) -> _SamplerModel:
    """MLflow calls this with the path of the logged sampler.onnx."""
    return _SamplerModel(Sampler(data_path))
