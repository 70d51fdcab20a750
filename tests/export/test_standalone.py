"""The file alone is enough: a program of about thirty lines samples from it without this project."""

import inspect
import shutil
import subprocess
import sys

import numpy as np
import pytest


def draw(path, num_samples, seed):
    """Draw samples in data units from a sampler.onnx with numpy and onnxruntime alone."""
    import base64
    import json

    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    data = json.loads(metadata["ray_ddpm.spec"])["data"]
    timesteps = np.frombuffer(base64.b64decode(metadata["ray_ddpm.timesteps"]), "<i8")
    table = np.frombuffer(base64.b64decode(metadata["ray_ddpm.table"]), "<f8").reshape(-1, 9)
    size, mask = int(np.prod(data["shape"])), np.uint64(2**32 - 1)

    def noise(k):
        pairs, samples = np.meshgrid(np.arange((size + 1) // 2), np.arange(num_samples))
        keys = [np.uint64(seed % 2**32), samples.astype(np.uint64)]
        keys.append(keys[0] ^ keys[1] ^ np.uint64(0x1BD11BDA))
        x, y = (np.uint64(k) + keys[0]) & mask, (pairs.astype(np.uint64) + keys[1]) & mask
        for i in range(20):
            left = np.uint64([13, 15, 26, 6, 17, 29, 16, 24][i % 8])
            x = (x + y) & mask
            y = (((y << left) | (y >> (np.uint64(32) - left))) & mask) ^ x
            if i % 4 == 3:
                j = i // 4 + 1
                x, y = (x + keys[j % 3]) & mask, (y + keys[(j + 1) % 3] + np.uint64(j)) & mask
        r, theta = np.sqrt(-2 * np.log((x + 0.5) / 2**32)), 2 * np.pi * (y + 0.5) / 2**32
        z = np.stack([r * np.cos(theta), r * np.sin(theta)], axis=-1).reshape(num_samples, -1)
        return z[:, :size].reshape(num_samples, *data["shape"])

    x = noise(0)
    x0 = np.zeros_like(x)
    for i, (t, (a, b, c, d, e, f, s, lo, hi)) in enumerate(zip(timesteps, table, strict=True)):
        inputs = {"x": x.astype(np.float32), "t": np.full(num_samples, t)}
        out = session.run(["model_output"], inputs)[0].astype(np.float64)
        previous, x0 = x0, np.clip(a * x + b * out, lo, hi)
        x = c * x0 + d * x + e * previous + f * out + s * noise(i + 1)
    x = x * np.array(data["std"]) + np.array(data["mean"])
    return x if data["range"] is None else np.clip(x, *data["range"])


PROGRAM = (
    inspect.getsource(draw)
    + """
import sys
samples = draw("sampler.onnx", int(sys.argv[1]), int(sys.argv[2]))
project = {"diffusion", "export", "workflows", "torch", "onnx", "mlflow", "ray"} & set(sys.modules)
assert not project, project
sys.stdout.buffer.write(samples.astype("<f8").tobytes())
"""
)


@pytest.fixture(name="file_and_sampler", params=["image", "points"])
def _file_and_sampler(request, image_file, image_sampler, point_file, point_sampler):
    return (image_file, image_sampler) if request.param == "image" else (point_file, point_sampler)


@pytest.mark.parametrize("seed", [0, 2**32 + 9])
def test_the_metadata_alone_are_enough_to_sample(file_and_sampler, seed):
    path, sampler = file_and_sampler
    expected = draw(str(path), 12, seed)
    assert expected.std() > 0.1
    np.testing.assert_allclose(sampler.sample(12, seed=seed), expected, rtol=0, atol=1e-5 * expected.std())


def test_the_file_is_enough_without_this_project(file_and_sampler, tmp_path):
    """In an isolated interpreter (-I), in a folder that contains only sampler.onnx."""
    path, sampler = file_and_sampler
    shutil.copy(path, tmp_path / "sampler.onnx")
    result = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, "5", "3"], cwd=tmp_path, capture_output=True, timeout=300
    )
    assert result.returncode == 0, result.stderr.decode()
    expected = np.frombuffer(result.stdout, "<f8").reshape(5, *sampler.spec.shape)
    np.testing.assert_allclose(sampler.sample(5, seed=3), expected, rtol=0, atol=1e-5 * expected.std())
    assert [entry.name for entry in tmp_path.iterdir()] == ["sampler.onnx"]
