"""Models behind MLflow's pyfunc interface. `_load_pyfunc` is the name that MLflow looks for."""

import warnings

import numpy as np
import pandas as pd
import pytest

from diffusion.errors import InputError
from export.pyfunc import _load_pyfunc, _SamplerModel


def save_and_load(sampler_file, folder, loader_module):
    """Save a sampler.onnx as an MLflow model, and load that model."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        warnings.simplefilter("ignore")  # raised by MLflow itself
        import mlflow

        mlflow.pyfunc.save_model(
            folder,
            loader_module=loader_module,
            data_path=str(sampler_file),
            pip_requirements=["numpy", "onnxruntime"],
        )
        return mlflow.pyfunc.load_model(str(folder))


@pytest.fixture(scope="module", name="served")
def _served(point_file, tmp_path_factory):
    return save_and_load(point_file, tmp_path_factory.mktemp("mlflow") / "model", "export.pyfunc")


def test_a_request_gives_the_same_samples_as_the_sampler(served, point_sampler):
    actual = served.predict(pd.DataFrame({"num_samples": [6], "seed": [4]}))
    assert actual.dtype == np.float32
    expected = point_sampler.sample(6, seed=4)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


def test_each_row_is_a_request_and_the_results_are_concatenated(served, point_sampler):
    actual = served.predict(pd.DataFrame({"num_samples": [2, 1, 3], "seed": [7, 8, 7]}))
    expected = np.concatenate([point_sampler.sample(n, seed=s) for n, s in ((2, 7), (1, 8), (3, 7))])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())
    np.testing.assert_array_equal(actual[:2], actual[3:5])  # the same seed, the same samples


def test_requests_without_a_seed_draw_one_after_the_other_from_seed_0(served, point_sampler):
    actual = served.predict(pd.DataFrame({"num_samples": [2, 3]}))
    np.testing.assert_allclose(actual, point_sampler.sample(5), rtol=1e-5, atol=1e-5)
    model = _SamplerModel(point_sampler)
    mixed = model.predict(pd.DataFrame({"num_samples": [2, 3, 1], "seed": [np.nan, 7, np.nan]}))
    expected = [point_sampler.sample(2), point_sampler.sample(3, seed=7), point_sampler.sample(3)[2:]]
    np.testing.assert_allclose(mixed, np.concatenate(expected), rtol=1e-5, atol=1e-5)


def test_the_order_of_the_columns_does_not_matter(served, point_sampler):
    actual = served.predict(pd.DataFrame({"seed": [3], "num_samples": [2]}))
    np.testing.assert_allclose(actual, point_sampler.sample(2, seed=3), rtol=1e-5, atol=1e-5)


def test_the_saved_model_contains_a_copy_of_the_file(served):
    """So the model does not depend on the folder that it was exported to."""
    flavor = served.metadata.flavors["python_function"]
    assert flavor["loader_module"] == "export.pyfunc"
    assert not flavor["data"].startswith("/")


def test_a_model_logged_with_the_former_loader_module_still_works(point_file, point_sampler, tmp_path):
    """Registered models keep naming export.serving, as export.pyfunc was called before."""
    served = save_and_load(point_file, tmp_path / "model", "export.serving")
    assert served.metadata.flavors["python_function"]["loader_module"] == "export.serving"
    actual = served.predict(pd.DataFrame({"num_samples": [3], "seed": [4]}))
    expected = point_sampler.sample(3, seed=4)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


def test_images_keep_their_shape(image_file, image_sampler):
    actual = _load_pyfunc(str(image_file)).predict(pd.DataFrame({"num_samples": [2], "seed": [0]}))
    np.testing.assert_allclose(actual, image_sampler.sample(2), rtol=1e-5, atol=1e-4)


def test_an_invalid_request_is_refused(served):
    with pytest.raises(InputError, match="num_samples 0"):
        served.predict(pd.DataFrame({"num_samples": [0], "seed": [0]}))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.onnx").write_bytes(b"other")
    with pytest.raises(InputError, match="other.onnx"):
        _load_pyfunc(str(tmp_path / "other.onnx"))
