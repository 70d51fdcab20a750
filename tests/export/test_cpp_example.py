"""The example in C++ is built, and draws from a whole-loop file what `export.Sampler` draws."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.javascript_runs import JAVASCRIPT
from export.sampler import Sampler
from export.whole_loop import whole_loop

pytestmark = pytest.mark.slow
INCLUDE = Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"))
LIBRARY = JAVASCRIPT / "node_modules/onnxruntime-node/bin/napi-v6/linux/x64/libonnxruntime.so.1"


@pytest.fixture(scope="module", name="program")
def _program(node_packages, repository, tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if not (INCLUDE / "onnxruntime_cxx_api.h").exists():
        pytest.skip("needs the headers of ONNX Runtime: give their folder as ONNXRUNTIME_INCLUDE")
    if not LIBRARY.exists():
        pytest.skip("needs onnxruntime-node for Linux on x86-64")
    program = tmp_path_factory.mktemp("cpp") / "whole_loop"
    source = repository / "examples" / "whole_loop.cpp"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", INCLUDE, source, LIBRARY]
    subprocess.run([*command, f"-Wl,-rpath,{LIBRARY.parent}", "-o", program], check=True, timeout=300)
    return program


@pytest.mark.parametrize("kind", ["point_file", "image_file", "conditional_file"])
def test_it_draws_what_python_draws(program, kind, request, tmp_path):
    path = request.getfixturevalue(kind)
    labels = {"labels": 2} if kind == "conditional_file" else {}
    (tmp_path / "loop.onnx").write_bytes(whole_loop(path.read_bytes(), in_graph_noise=True))
    arguments = ["loop.onnx", "5", "3", "samples.npy", *map(str, labels.values())]
    result = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "samples.npy: 5 samples\n"), result.stderr
    actual = np.load(tmp_path / "samples.npy")
    expected = Sampler(path, provider="cpu").sample(5, seed=3, **labels)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-4 * expected.std()


def test_errors_are_one_line(program, tmp_path):
    for arguments, status in ((["missing.onnx", "1", "0", "samples.npy"], 1), (["missing.onnx"], 2)):
        result = subprocess.run(
            [program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == status and len(result.stderr.splitlines()) == 1
