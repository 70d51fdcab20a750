"""`pip install ray-ddpm`, without extras, into an empty environment: the sampler works, and comes alone."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def run(*command, folder):
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_installed_wheel_samples(repository, point_file, point_sampler, tmp_path):
    pip = ["-m", "pip", "--disable-pip-version-check"]
    run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, repository, folder=tmp_path)
    (wheel,) = tmp_path.glob("ray_ddpm-*.whl")
    assert {"export/step.onnx", "export/guided_step.onnx"} <= set(zipfile.ZipFile(wheel).namelist())

    run(sys.executable, "-m", "venv", "empty", folder=tmp_path)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, *pip, "install", "-c", repository / "constraints.txt", wheel, folder=tmp_path)
    installed = {line.split("==")[0].lower() for line in run(python, *pip, "freeze", folder=tmp_path).split()}
    assert not {"torch", "ray", "mlflow", "onnx", "pandas", "torchvision"} & installed

    command = [python, "-I", "-m", "export.sampler", point_file, "--num-samples", 5, "--seed", 3]
    run(*command, "--output", "samples.npy", folder=tmp_path)
    run(*command, "--output", "samples.png", folder=tmp_path)
    expected = point_sampler.sample(5, seed=3)
    found = np.load(tmp_path / "samples.npy")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.std())
    assert "ONNX Runtime" in run(python, "-I", "-m", "export.sampler", "--doctor", folder=tmp_path)
