"""The sampler loads numpy, Pillow and ONNX Runtime, but no library that only training needs."""

import os
import subprocess
import sys

HEAVY = [
    "torch", "torchvision", "mlflow", "ray", "onnx", "onnxscript", "pandas", "sklearn", "scipy",
    "safetensors", "optuna", "tyro", "rich", "diffusers",
]  # fmt: skip


def run_python(program, repository, folder):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def heavy_libraries_loaded_by(module, repository, folder):
    program = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = run_python(program, repository, folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_serving_loads_no_training_libraries(repository, tmp_path):
    """pandas is allowed: MLflow depends on it, and requests arrive as its tables."""
    assert set(heavy_libraries_loaded_by("export.pyfunc", repository, tmp_path)) <= {"pandas"}


def test_sampling_works_without_training_libraries(image_file, repository, tmp_path):
    """A picture is drawn even though every import of such a library fails."""
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
