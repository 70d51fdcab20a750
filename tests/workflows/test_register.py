"""A cascade in MLflow's registry: one model with both files, drawn from by pyfunc."""

import re

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from diffusion.errors import InputError
from export.cascade import Cascade
from export.registered import download_models, download_sampler
from export.sampler import Sampler
from tests.export.test_cascade import file_of, spec_of
from workflows.register import main
from workflows.tracking.mlflow_tracker import MlflowTracker

CLASSES = ["a", "b"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/low/model").mkdir(parents=True)
    low, second = (file_of(spec_of(*sides, classes=CLASSES)) for sides in ((2,), (4, 2)))
    (tmp_path / "runs/low/model/sampler.onnx").write_bytes(low)
    (tmp_path / "second.onnx").write_bytes(second)
    return low, second


@pytest.mark.long
def test_both_files_are_one_model_that_draws_by_both(files, tmp_path, monkeypatch, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = ["runs/low", "second.onnx", "--experiment", "shapes-cascade", "--tracking-uri", uri]
    assert main(arguments) == 0
    model = re.search(r"as (models:/\S+):", capsys.readouterr().out)[1]
    assert model == "models:/ray-ddpm-shapes-cascade/1"
    version = MlflowClient(uri).get_model_version("ray-ddpm-shapes-cascade", "1")
    assert MlflowClient(uri).get_run(version.run_id).info.status == "FINISHED"
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    mlflow.set_tracking_uri(uri)
    cascade = Cascade([Sampler(each, provider="cpu") for each in files])
    served = mlflow.pyfunc.load_model(model)
    drawn = served.predict(pd.DataFrame({"num_samples": [3], "seed": [5], "label": ["b"]}))
    np.testing.assert_allclose(drawn, cascade.sample(3, seed=5, labels="b"), atol=1e-4)
    assert download_models(model) == list(files)
    with pytest.raises(InputError, match="is a cascade of 2 models"):
        download_sampler(model)


@pytest.mark.long
def test_an_interrupt_leaves_no_run_open(files, tmp_path, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowTracker, "register", interrupt)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(KeyboardInterrupt):
        main(["runs/low", "second.onnx", "--experiment", "shapes", "--tracking-uri", uri])
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("shapes").experiment_id])
    assert run.info.status == "KILLED"


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ("runs/low", "a cascade of 1: give at least two models"),
        ("runs/low runs/low", "receives no low-resolution image"),
        ("runs/low runs/none", "runs/none: no sampler.onnx there"),
        ("second.onnx runs/low", "receives no low-resolution image"),
    ],
)
def test_models_that_make_no_cascade_are_refused(files, models, words):
    with pytest.raises(InputError, match=words):
        main([*models.split(), "--experiment", "shapes"])
