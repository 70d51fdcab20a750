"""Models behind MLflow's pyfunc interface. `_load_pyfunc` is the name that MLflow looks for."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

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


def test_parameters_choose_the_sampler(point_sampler):
    model = _SamplerModel(point_sampler)
    options = {"sampler": "dpmpp_2m", "num_steps": 5, "spacing": "linspace"}
    actual = model.predict(
        pd.DataFrame({"num_samples": [4]}), {**options, "eta": None, "guidance_scale": None}
    )
    np.testing.assert_array_equal(actual, point_sampler.sample(4, **options))
    own = point_sampler.sample(4)
    assert np.abs(actual - own).max() > 1e-3 * own.std()
    np.testing.assert_array_equal(model.predict(pd.DataFrame({"num_samples": [4]}), {"time_limit": 600}), own)


@pytest.mark.parametrize(
    ("table", "params", "named"),
    [
        ({"num_samples": [0]}, {}, "num_samples 0"),
        ({"num_samples": [2.5]}, {}, "num_samples 2.5: give a whole number"),
        ({"num_samples": [np.nan]}, {}, "num_samples nan"),
        ({"num_samples": ["2"]}, {}, "num_samples '2'"),
        ({"seed": [1]}, {}, "the column num_samples"),
        ({"num_samples": []}, {}, "at least one row"),
        ({"num_samples": [1], "seed": [1.5]}, {}, "seed 1.5"),
        ({"num_samples": [1], "label": ["cat"]}, {}, "has no classes"),
        ({"num_samples": [1]}, {"sampler": "euler"}, "'euler'"),
        ({"num_samples": [1]}, {"num_steps": 2.5}, "num_steps 2.5"),
        ({"num_samples": [1]}, {"guidance_scale": 2.0}, "guidance_scale 2"),
        ({"num_samples": [1]}, {"time_limit": 0}, "time_limit 0"),
        ({"num_samples": [1]}, {"time_limit": "soon"}, "time_limit 'soon'"),
        ({"num_samples": [1]}, {"steps": 3}, "params steps"),
    ],
    ids=str,
)
def test_an_invalid_request_is_refused_in_a_line(point_sampler, table, params, named):
    """For Python an InputError; for MLflow's server a fault of the request, whose message alone it sends."""
    with pytest.raises(InputError) as caught:
        _SamplerModel(point_sampler).predict(pd.DataFrame(table), params)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, MlflowException) and caught.value.get_http_status_code() == 400
    assert caught.value.__cause__ is None
    assert "stack_trace" not in json.loads(caught.value.serialize_as_json())


def test_the_time_limit_is_for_the_whole_table(point_sampler, monkeypatch):
    """In MLflow's server it is by default the time for which that waits."""
    model, table = _SamplerModel(point_sampler), pd.DataFrame({"num_samples": [1] * 500})
    with pytest.raises(InputError, match="time_limit"):
        model.predict(table, {"time_limit": 0.02})
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "0.02")
    assert len(model.predict(table[:10])) == 10, "not outside of it"
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    with pytest.raises(InputError, match="time_limit"):
        model.predict(table)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.onnx").write_bytes(b"other")
    with pytest.raises(InputError, match="other.onnx"):
        _load_pyfunc(str(tmp_path / "other.onnx"))
