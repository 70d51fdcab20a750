"""A data set as an input of MLflow's runs."""

import json
from typing import Any

import numpy as np
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

from diffusion.data.dataset import Dataset

_DIGEST_LENGTH = 12  # characters of the fingerprint; MLflow allows 36 and shows all


def dataset_fields(dataset: Dataset) -> dict[str, Any]:
    """The data of a run, named by their fingerprint, with the sizes of their splits and their schema.

    Returns:
        Fields of MLflow's entity under `dataset`, and what the data are used for under `context`.
    """
    spec = dataset.spec
    sizes = {
        name: len(split)
        for name, split in (("training", dataset.train), ("validation", dataset.val), ("test", dataset.test))
    }
    if spec.columns is None:
        features = Schema([TensorSpec(np.dtype(np.float32), (-1, *spec.shape))])
        schema = {"mlflow_tensorspec": {"features": features.to_json(), "targets": None}}
    else:
        columns = Schema([ColSpec(DataType.double, name) for name in spec.columns])
        schema = {"mlflow_colspec": columns.to_dict()}
    fields = {
        "name": spec.name,
        "digest": spec.fingerprint[:_DIGEST_LENGTH],
        "source_type": "ray-ddpm",
        "source": json.dumps({"name": spec.name, "fingerprint": spec.fingerprint}),
        "schema": json.dumps(schema),
        "profile": json.dumps({"num_rows": sum(sizes.values()), **sizes}),
    }
    return {"dataset": fields, "context": "training, validation, test"}
