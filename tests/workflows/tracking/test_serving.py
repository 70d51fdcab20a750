"""A registered champion, served by MLflow and loaded as a sampler."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from packaging.requirements import Requirement

from diffusion.config import SamplerConfig
from diffusion.errors import InputError
from export.sampler import Sampler
from export.to_onnx import export_onnx
from tests.diffusion.conftest import make_gaussian_dataset
from tests.export.conftest import POINTS, make_model
from workflows.tracking.mlflow_tracker import MlflowTracker
from workflows.tracking.tracker import PublishedModel, Registration

TAGS = {"data_fingerprint": "f", "test_num_samples": 100, "test_distance": 1.0}


@pytest.fixture(scope="module", name="registered")
def _registered(tmp_path_factory):
    """URI of a store with a champion, and the path of its sampler.onnx."""
    folder = tmp_path_factory.mktemp("store")
    file = folder / "sampler.onnx"
    file.write_bytes(export_onnx(make_model(POINTS, SamplerConfig(name="ddim", num_steps=4)))[0])
    uri = f"sqlite:///{folder}/mlflow.db"
    tracker = MlflowTracker(uri, "points")
    tracker.start("sweep", {})
    tracker.log_dataset(make_gaussian_dataset())
    metrics = {"test/mse": 0.5, "val/mse": 0.25, "test/elbo_window_se": 0.1, "test/auc": 0.7}
    tracker.log({"val/mse": 0.25}, 10)
    tracker.log({"val/mse": 0.75, "test/mse": 0.5, "test/elbo_window_se": 0.1}, 20)
    tracker.log({"test/auc": 0.7}, 0)
    tracker.flush()  # MLflow itself links metrics of step 0 that have arrived
    model = PublishedModel(file, {"sampler.num_steps": 4}, metrics)
    assert tracker.register("points", model, TAGS, may_promote=True) == Registration(1, True)
    tracker.close("finished")
    assert tracker.unsent == 0
    return uri, file


@pytest.fixture(autouse=True)
def _store(registered, monkeypatch):
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    mlflow.set_tracking_uri(registered[0])


def test_the_model_has_a_signature_and_an_example(registered):
    model = mlflow.pyfunc.load_model("models:/points@champion")
    assert model.metadata.signature.inputs.input_names() == ["num_samples", "seed"]
    assert model.metadata.signature.outputs.inputs[0].shape == (-1, 2)
    parameters = [each.name for each in model.metadata.signature.params.params]
    assert parameters == ["sampler", "num_steps", "eta", "spacing", "time_limit"], (
        "no guidance without classes"
    )
    assert model.predict(model.input_example).shape == (4, 2)
    samples = model.predict(pd.DataFrame({"num_samples": [3], "seed": [1]}))
    expected = Sampler(registered[1], provider="cpu").sample(3, seed=1)
    np.testing.assert_allclose(samples, expected, rtol=0, atol=1e-5 * expected.std())
    without_a_seed = model.predict(pd.DataFrame({"num_samples": [3]}))
    np.testing.assert_allclose(
        without_a_seed, Sampler(registered[1], provider="cpu").sample(3), rtol=1e-5, atol=1e-5
    )


def test_the_requirements_are_pinned_and_keep_the_build_for_gpus(registered):
    """The markers are this project's own, so that exactly one build of ONNX Runtime is installed anywhere."""
    path = mlflow.pyfunc.get_model_dependencies("models:/points@champion")
    lines = [Requirement(line) for line in Path(path).read_text().splitlines() if line.strip()]
    found = {each.name: each for each in lines if each.name != "mlflow"}
    assert set(found) == {"numpy", "pillow", "onnxruntime", "onnxruntime-gpu"}
    assert all(str(each.specifier).startswith("==") for each in found.values())
    with open(Path(__file__).parents[3] / "pyproject.toml", "rb") as file:
        own = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
    for requirement in own:
        assert requirement.specifier.contains(next(iter(found[requirement.name].specifier)).version)
        assert requirement.marker == found[requirement.name].marker


def test_the_models_page_has_its_parameters_and_metrics(registered):
    client = MlflowClient(registered[0])
    version = client.get_model_version_by_alias("points", "champion")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.source_run_id == version.run_id and model.params == {"sampler.num_steps": "4"}
    linked = {each.key: (each.value, each.step) for each in model.metrics}
    assert linked == {"test/auc": (0.7, 0), "test/mse": (0.5, 20), "val/mse": (0.25, 10)}, (
        "those that the run has"
    )
    history = client.get_metric_history(version.run_id, "val/mse")
    assert [each.step for each in history] == [10, 20], "no step twice"


@pytest.mark.parametrize("uri", ["models:/points@champion", "models:/points/1", "models:/points/latest"])
def test_a_sampler_is_loaded_from_the_registry(registered, uri):
    sampler = Sampler.from_registry(uri, provider="cpu")
    np.testing.assert_array_equal(sampler.sample(3), Sampler(registered[1], provider="cpu").sample(3))


@pytest.mark.parametrize(
    "uri",
    ["models:/none@champion", "models:/points@other", "models:/points/9", "models:/", "points", "runs:/a/b"],
)
def test_a_missing_model_is_refused_in_one_line(uri):
    with pytest.raises(InputError) as caught:
        Sampler.from_registry(uri)
    assert uri in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_mlflow_serves_the_champion(registered, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/points@champion"]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        server = subprocess.Popen(
            [*command, "--env-manager", "local", "--port", str(port), "--host", "127.0.0.1"],
            cwd=tmp_path,
            env=os.environ
            | {
                "MLFLOW_TRACKING_URI": registered[0],
                "MLFLOW_DISABLE_TELEMETRY": "true",
                # MLflow finds uvicorn through PATH.
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            },
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        request = invocation(port, {"dataframe_records": [{"num_samples": 3, "seed": 1}]})
        response = wait_for_response(request, server, log)
        records = {"dataframe_records": [{"num_samples": 2}]}
        params = {"sampler": "dpmpp_2m", "num_steps": 3, "time_limit": 50.0}
        with urllib.request.urlopen(invocation(port, {**records, "params": params}), timeout=120) as answer:
            chosen = json.load(answer)
        refusals = [
            refusal(invocation(port, {"dataframe_records": [{"num_samples": 0}]})),
            refusal(invocation(port, {"dataframe_records": [{"num_samples": 2**40}]})),
            refusal(invocation(port, {**records, "params": {"num_steps": 1000}})),
            refusal(invocation(port, {**records, "params": {"num_steps": "ten"}})),
            refusal(invocation(port, {**records, "params": {"time_limit": 1e-9}})),
        ]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(timeout=120)
    expected = Sampler(registered[1], provider="cpu").sample(3, seed=1)
    np.testing.assert_allclose(response["predictions"], expected, rtol=0, atol=1e-5 * expected.std())

    expected = Sampler(registered[1], provider="cpu").sample(2, sampler="dpmpp_2m", num_steps=3)
    np.testing.assert_allclose(chosen["predictions"], expected, rtol=0, atol=1e-5 * expected.std())
    for (status, body), words in zip(
        refusals,
        ["num_samples 0", "num_samples 1099511627776", "num_inference_steps 1000", "num_steps", "time_limit"],
        strict=True,
    ):
        assert status == 400 and words in body, body
        assert "Traceback" not in body and "stack_trace" not in body and ".py" not in body, body


def invocation(port, content):
    return urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )


def refusal(request):
    """Status and body of an answer that is an error."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=120)
    return caught.value.code, caught.value.read().decode()


def wait_for_response(request, server, log):
    deadline = time.monotonic() + 300.0
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:2000]) from error
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server does not respond")
