"""Comparison of sample quality. Separate from test_parity.py, since it needs data sets and models of them."""

import dataclasses

import numpy as np
import onnx
import pytest

from diffusion.config import DataConfig, SamplerConfig
from diffusion.data.dataset import load_dataset
from diffusion.evaluation.features import fit_features
from diffusion.registry import SAMPLERS
from export.parity import check_samples, num_compared_samples
from export.sampler import Sampler
from export.to_onnx import export_onnx, main
from export.torch_sampler import TorchSampler

pytestmark = pytest.mark.usefixtures("small_reference")


@pytest.fixture(scope="module", name="dataset", params=["heart", "digits"])
def _dataset(request):
    return load_dataset(DataConfig(name=request.param))


@pytest.fixture(scope="module", name="model")
def _model(make_model, dataset):
    model = make_model(dataset.spec, SamplerConfig(name="ddim", num_steps=5))
    data = dataclasses.replace(model.config.data, name=dataset.spec.name)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))


@pytest.fixture(scope="module", name="features")
def _features(model, dataset):
    return fit_features(dataset, model.config.metrics.features)


@pytest.fixture(scope="module", name="content")
def _content(model):
    return export_onnx(model)[0]


@pytest.fixture(scope="module", name="samples")
def _samples(model):
    sampler = TorchSampler.of(model)
    drawn = sampler.draw(num_compared_samples(sampler.spec)).samples
    return sampler.spec.denormalise(drawn)


def by_file(content, samples):
    return Sampler(content, provider="cpu").sample(len(samples), seed=0)


def test_samples_of_a_faithful_file_pass(samples, content, dataset, features):
    (case,) = check_samples(samples, by_file(content, samples), dataset, features)
    assert case.passed
    assert case.name == "distance of 256 samples"
    assert case.max_abs_error < 1e-3 * case.output_scale
    assert case.output_scale > 0.01  # an untrained model is far from the data


def test_worse_samples_fail(samples, content, dataset, features):
    """The same graph, but with outputs ten times as large."""
    proto = onnx.load_from_string(content)
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("outward."):
            values = 10.0 * onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
    worse = by_file(proto.SerializeToString(), samples)
    (case,) = check_samples(samples, worse, dataset, features)
    assert not case.passed


def test_the_command_compares_samples_if_the_data_are_available(
    model, content, give_graph, dataset, tmp_path, capsys
):
    give_graph(onnx.load_from_string(content))
    model.save(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--output", str(tmp_path / "a.onnx")]) == 0
    printed = capsys.readouterr().out
    assert f"{6 + 2 * len(SAMPLERS)} comparisons" in printed, "with and without clipping, each sampler"
    assert "not compared" not in printed

    elsewhere = dataclasses.replace(model.config.data, name=str(tmp_path / "none"))
    moved = dataclasses.replace(model, config=dataclasses.replace(model.config, data=elsewhere))
    moved.save(tmp_path / "moved")
    assert main([str(tmp_path / "moved"), "--output", str(tmp_path / "b.onnx")]) == 0
    printed = capsys.readouterr().out
    assert f"{5 + 2 * len(SAMPLERS)} comparisons" in printed
    assert "samples were not compared with the data" in printed
    assert str(tmp_path / "none") in printed
