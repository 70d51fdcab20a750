import warnings

import numpy as np
import pandas as pd
import pytest

from diffusion.errors import InputError
from export.serving import _load_pyfunc


@pytest.fixture(scope="module", name="served")
def _served(point_file, tmp_path_factory):
    """sampler.onnx saved as MLflow saves a model, and loaded from there."""
    folder = tmp_path_factory.mktemp("mlflow") / "model"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        warnings.simplefilter("ignore")  # MLflow's own
        import mlflow

        mlflow.pyfunc.save_model(
            folder,
            loader_module="export.serving",
            data_path=str(point_file),
            pip_requirements=["numpy", "onnxruntime"],
        )
        return mlflow.pyfunc.load_model(str(folder))


def test_one_request_gives_the_samplers_samples(served, point_sampler):
    found = served.predict(pd.DataFrame({"num_samples": [6], "seed": [4]}))
    assert found.dtype == np.float32
    expected = point_sampler.sample(6, seed=4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.std())


def test_each_row_is_a_request_and_the_results_are_joined(served, point_sampler):
    found = served.predict(pd.DataFrame({"num_samples": [2, 1, 3], "seed": [7, 8, 7]}))
    expected = np.concatenate([point_sampler.sample(n, seed=s) for n, s in ((2, 7), (1, 8), (3, 7))])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.std())
    np.testing.assert_array_equal(found[:2], found[3:5])  # the same seed, the same samples


def test_the_order_of_the_columns_does_not_matter(served, point_sampler):
    found = served.predict(pd.DataFrame({"seed": [3], "num_samples": [2]}))
    np.testing.assert_allclose(found, point_sampler.sample(2, seed=3), rtol=1e-5, atol=1e-5)


def test_the_saved_model_holds_the_file_itself(served):
    """MLflow copies it, so the model does not depend on where it was exported."""
    flavor = served.metadata.flavors["python_function"]
    assert flavor["loader_module"] == "export.serving"
    assert not flavor["data"].startswith("/")


def test_images_keep_their_shape(image_file, image_sampler):
    found = _load_pyfunc(str(image_file)).predict(pd.DataFrame({"num_samples": [2], "seed": [0]}))
    np.testing.assert_allclose(found, image_sampler.sample(2), rtol=1e-5, atol=1e-4)


def test_a_request_that_cannot_be_met_is_refused(served):
    with pytest.raises(InputError, match="num_samples 0"):
        served.predict(pd.DataFrame({"num_samples": [0], "seed": [0]}))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.onnx").write_bytes(b"other")
    with pytest.raises(InputError, match="other.onnx"):
        _load_pyfunc(str(tmp_path / "other.onnx"))
