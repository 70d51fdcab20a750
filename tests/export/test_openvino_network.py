"""The same samples by OpenVINO, an optional engine."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffusion.errors import InputError
from export.sampler import Sampler


@pytest.mark.parametrize("kind", ["image", "point"])
def test_openvino_draws_the_same_samples(kind, request):
    """In float32, for several batch sizes and from several threads."""
    pytest.importorskip("openvino")
    content = request.getfixturevalue(f"{kind}_onnx")
    sampler, expected_of = Sampler(content, "openvino", 1), Sampler(content, "cpu")
    assert sampler.runs_on == "OpenVINO"
    expected = expected_of.sample(5, seed=3)
    for batch_size in (5, 2):
        actual = sampler.sample(5, seed=3, batch_size=batch_size)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * expected.std())
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda seed: sampler.sample(2, seed=seed), range(3)))
    for seed, samples in enumerate(drawn):
        np.testing.assert_allclose(
            samples, expected_of.sample(2, seed=seed), rtol=0, atol=1e-4 * expected.std()
        )


def test_every_kind_of_model_runs_in_openvino(version_2):
    pytest.importorskip("openvino")
    _, spec, content = version_2
    conditions = {each.name: np.full(each.shape, 2.0) for each in spec.conditions}
    expected = Sampler(content, "cpu").sample(3, conditions=conditions)
    actual = Sampler(content, "openvino").sample(3, conditions=conditions)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * expected.std())


def test_without_its_package_it_is_refused_in_a_line(point_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="provider openvino: it is not installed; pip install"):
        Sampler(point_onnx, "openvino")


@pytest.mark.parametrize("provider", ["tensorrt", "coreml"])
def test_a_provider_that_is_not_available_is_refused_in_a_line(point_onnx, provider):
    with pytest.raises(InputError, match=f"provider {provider}: .*; use provider auto or cpu") as caught:
        Sampler(point_onnx, provider)
    assert "\n" not in str(caught.value)
