"""What imports what: downward only, no circles, and nothing heavy where little is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("diffusion", "export", "workflows")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
# A package imports only from those before it in its line: sub-packages and files of its folder, bottom up.
LAYERS = {
    "diffusion": (
        "lazy", "errors", "files", "json_values", "memory_limit", "array_file", "devices", "plots",
        "normalisation", "seeding", "metrics", "registry",
        "manifest", "process", "config", "networks", "data", "presets", "evaluation", "training",
    ),
    "workflows": (
        "redaction", "environment", "installation", "terminal", "status", "signals", "storage", "data",
        "ray_runtime", "tracking", "publishing", "cli", "cluster", "evaluation", "bulk_sampling",
        "training", "sweep", "results", "api", "run_management", "sync", "doctor", "ui", "generate",
        "evaluate", "register", "runs", "train", "tune", "__main__",
    ),
}  # fmt: skip
ABOVE = {
    "diffusion": {"export", "workflows", "ray", "mlflow", "onnx", "onnxscript", "onnxruntime"},
    "export": {"workflows", "ray"},
    "workflows": set(),
}
HEAVY = (
    "torch", "torchvision", "ray", "mlflow", "onnx", "onnxscript", "pandas", "sklearn", "scipy",
    "safetensors", "optuna", "diffusers", "matplotlib", "plotly", "jinja2",
)  # fmt: skip
# What the exported sampler runs, and what a command line loads before its input is known to be good.
NUMPY_ONLY = (
    "diffusion.errors", "diffusion.metrics", "diffusion.files", "diffusion.manifest",
    "diffusion.json_values", "diffusion.memory_limit", "diffusion.array_file",
    "diffusion.normalisation", "diffusion.plots",
    "diffusion.config", "diffusion.registry", "diffusion.process.schedules",
    "diffusion.process.posterior", "diffusion.process.prediction_types",
    "diffusion.process.sampling_methods", "diffusion.process.samplers", "diffusion.process.inpainting",
    "diffusion.process.image_start", "diffusion.process.given", "export.known_files",
    "diffusion.process.schedule_checks", "diffusion.data.image_reading",
    "diffusion.data.image_folder", "diffusion.data.tables", "diffusion.data.sources", "diffusion.data.named",
    "diffusion.data.memory", "diffusion.lazy",
    "diffusion.presets",
    "export.sampler", "export.cli", "export.conditions", "export.contract", "export.doctor",
    "export.gpu_loop", "export.noise", "export.registered", "export.session",
    "workflows.environment", "workflows.cli.parsing", "workflows.cli.main", "workflows.api",
    "workflows.cli.model_reference", "workflows.runs",
    "workflows.data.image_decoding", "workflows.evaluate", "workflows.evaluation.candidates",
)  # fmt: skip


def imports(module):
    """Modules of the project that a module imports, those imported inside its functions included.

    `from package import module` counts as that module.
    """
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)


def part_of(module):
    """Sub-package or file of its package that a module belongs to: diffusion.data.tables -> data."""
    return module.split(".")[1]


def test_every_file_and_sub_package_has_its_layer():
    for package, layers in LAYERS.items():
        parts = {part_of(name) for name in FILES if name.startswith(f"{package}.")} - {"__init__"}
        assert parts == set(layers), package


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_upward(module):
    package = module.split(".")[0]
    found = set(imports(module))
    assert not ABOVE[package] & {name.split(".")[0] for name in found}
    if package not in LAYERS or module.endswith("__init__"):
        return
    layers = LAYERS[package]
    for name in found:
        if name.startswith(f"{package}.") and part_of(name) != part_of(module):
            assert layers.index(part_of(name)) < layers.index(part_of(module)), f"{module} imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package):
    """They can be put in an order in which each needs only earlier ones."""
    own = {name for name in FILES if name.startswith(package) and not name.endswith("__init__")}
    needs = {module: set(imports(module)) & own for module in own}
    done = set()
    while ready := {name for name, needed in needs.items() if name not in done and needed <= done}:
        done |= ready
    assert done == own


def test_environment_variables_are_read_in_one_module():
    """Others at most hand all of them on to a process; the sampler, which runs alone, has its own."""
    for module, path in FILES.items():
        if module == "workflows.environment" or module.startswith("export."):
            continue
        tree = ast.parse(path.read_text())
        handed_on = {id(node.left) for node in ast.walk(tree) if isinstance(node, ast.BinOp)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                assert id(node) in handed_on, f"{module}, line {node.lineno}"


def test_mlflow_is_for_tracking_and_the_registry():
    """Of export, one module fetches registered models, and one is what MLflow loads and serves."""
    users = {name for name in FILES if "mlflow" in {each.split(".")[0] for each in imports(name)}}
    assert users == {
        "export.pyfunc",
        "export.registered",
        "workflows.tracking.dataset_input",
        "workflows.tracking.deletion",
        "workflows.tracking.local_database",
        "workflows.tracking.mlflow_app",
        "workflows.tracking.mlflow_sender",
        "workflows.tracking.mlflow_store",
        "workflows.tracking.mlflow_tracker",
        "workflows.tracking.prepared_view",
        "workflows.tracking.registered_files",
        "workflows.tracking.registry",
        "workflows.tracking.system_metrics",
    }


def test_onnx_and_torch_are_for_the_export_alone():
    exporting = {
        f"export.{name}"
        for name in (
            "exporter", "graph_builder", "parity", "precision", "step_graph", "torch_sampler", "whole_loop"
        )
    }  # fmt: skip
    for name in FILES:
        if name.startswith("export.") and name not in exporting:
            assert not {"onnx", "torch"} & {each.split(".")[0] for each in imports(name)}, name


@pytest.mark.parametrize("module", FILES)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(ast.parse(FILES[module].read_text()))


def loaded_by(modules):
    """Heavy libraries that a fresh process has loaded after importing each of the modules, by module."""
    program = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    print(module, *(name for name in {HEAVY} if name in sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    return {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}


def test_light_modules_load_no_heavy_library():
    assert loaded_by(NUMPY_ONLY) == {module: [] for module in NUMPY_ONLY}


def test_packages_load_nothing_heavy():
    packages = [name.removesuffix(".__init__") for name in FILES if name.endswith("__init__")]
    assert len(packages) > 15
    assert loaded_by(packages) == {package: [] for package in packages}
