"""What loads what: the sampler needs numpy, Pillow and ONNX Runtime, and nothing of training."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import export

FILES = sorted(Path(export.__file__).parent.rglob("*.py"))
HEAVY = [
    "torch", "torchvision", "mlflow", "ray", "onnx", "onnxscript", "pandas", "sklearn", "scipy",
    "safetensors", "optuna", "tyro", "rich", "diffusers",
]  # fmt: skip
# All that `pip install ray-ddpm` runs.
LIGHT = ["device_loop", "doctor", "noise", "registered", "sampler", "session", "spec"]


def imported(path):
    """The modules of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def run_python(program, repository, folder):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_package_was_found():
    assert {*LIGHT, "serving", "parity", "to_onnx", "__init__"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_module_imports_what_stands_beside_or_above_it(path):
    """Ray and MLflow belong to workflows; but a registered model is fetched by MLflow's own client."""
    forbidden = {"ray", "mlflow", "workflows", "tests"} - ({"mlflow"} if path.stem == "registered" else set())
    assert not forbidden & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_onnx_and_torch_are_for_the_export_alone(path):
    if path.stem not in ("to_onnx", "parity", "sample_parity", "precision", "step_graph"):
        assert not {"onnx", "torch"} & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_module_says_what_it_is(path):
    module = importlib.import_module("export" if path.stem == "__init__" else f"export.{path.stem}")
    assert module.__doc__


def heavy_libraries_loaded_by(module, repository, folder):
    program = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = run_python(program, repository, folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("name", LIGHT)
def test_the_sampler_loads_nothing_of_training(name, repository, tmp_path):
    assert heavy_libraries_loaded_by(f"export.{name}", repository, tmp_path) == []


def test_serving_loads_nothing_of_training(repository, tmp_path):
    """pandas comes with MLflow, whose requests are its tables."""
    assert set(heavy_libraries_loaded_by("export.serving", repository, tmp_path)) <= {"pandas"}


def test_sampling_works_where_nothing_of_training_is_installed(image_file, repository, tmp_path):
    """Every such import fails, and a picture is drawn all the same."""
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from export.sampler import main
sys.exit(main([{str(image_file)!r}, "--num-samples", "2", "--output", "grid.png"]))
"""
    result = run_python(program, repository, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


def test_modules_do_not_need_each_other_in_a_circle():
    needs = {
        f"export.{path.stem}": {name for name in imported(path) if name.startswith("export.")}
        for path in FILES
    }
    done = set()
    while ready := {name for name, wanted in needs.items() if name not in done and wanted <= done}:
        done |= ready
    assert done == set(needs)
