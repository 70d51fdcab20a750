"""Imports point downward only, and light modules stay light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import diffusion

FOLDER = Path(diffusion.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
ABOVE = {"ray", "mlflow", "onnx", "onnxscript", "onnxruntime", "workflows", "export", "diffusers", "tests"}
# What the exported sampler or a command line's --help loads.
LIGHT = ["schedules", "sampling", "reverse", "preflight", "config", "errors", "normalisation", "plots"]


def imported(tree):
    """Top-level names of every import in a file, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module.split(".")[0]


def test_the_package_was_found():
    assert {"schedules.py", "sampling.py", "config.py", "training.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_module_imports_what_stands_above_it(path):
    assert not ABOVE & set(imported(ast.parse(path.read_text())))


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_no_heavy_library(name):
    heavy = ["torch", "ray", "mlflow", "sklearn", "scipy", "onnx", "onnxruntime", "pandas"]
    program = f"import sys, diffusion.{name}; print(*(name for name in {heavy} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=FOLDER.parent
    )
    assert result.stdout.split() == []


def test_no_module_imports_another_in_a_circle():
    """Every module of the package can be reached in an order in which each needs only earlier ones."""
    needs = {}
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text()))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        needs[f"diffusion.{path.stem}"] = {module for module in modules if module.startswith("diffusion.")}
    done = set()
    while ready := {name for name, wanted in needs.items() if name not in done and wanted <= done}:
        done |= ready
    assert done == set(needs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_module_can_be_imported_and_says_what_it_is(path):
    module = importlib.import_module("diffusion" if path.stem == "__init__" else f"diffusion.{path.stem}")
    assert module.__doc__
