"""The public surface: exactly these names, each documented and typed, and nothing heavy loaded by asking."""

import ast
import inspect
import re
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = {
    "diffusion": """
        Condition Config DATA_SOURCES DataConfig DataSpec Dataset ElboWindow EvaluationResult
        Inpainting InputError JointMLP MetricsConfig NETWORKS NetworkConfig NoiseSchedule OBJECTIVES Registry
        SAMPLERS SAMPLE_METRICS SCHEDULES SamplerConfig SamplerTable ScheduleConfig TrainedModel
        Training TrainingConfig UNet VariationalBound build_network constant_betas cosine_betas
        dataset_from_memory draw_samples elbo_window generate linear_betas load_dataset preset
        q_posterior q_sample q_step quadratic_betas respaced_timesteps sampler_table
        scaled_linear_betas sigmoid_betas sinusoidal_embedding step to_epsilon to_score to_v to_x_0
        train variational_bound zero_terminal_snr
    """,
    "export": "Cancelled Cascade ParityCase ParityError Preview Sampler export_onnx export_whole_loop",
    "workflows": "Champion RunFailed SearchSpace SweepResult TrainingResult run_sweep run_training",
}
# Names of which each loads no library but numpy, Pillow and, for Sampler, ONNX Runtime.
LIGHT = {
    "diffusion": """
        Config DATA_SOURCES Inpainting InputError NoiseSchedule SAMPLERS SamplerTable constant_betas
        cosine_betas
        draw_samples linear_betas preset quadratic_betas respaced_timesteps sampler_table scaled_linear_betas
        sigmoid_betas step zero_terminal_snr dataset_from_memory
    """,
    "export": "Cancelled Cascade Sampler",
    "workflows": "RunFailed SearchSpace SweepResult TrainingResult run_sweep run_training",
}
# Their values are those of config files and of JSON: of a type that differs from one parameter to the next.
JSON = {
    "Config.flat", "Config.from_dict", "Config.to_dict", "Config.with_values", "DataSpec.from_dict",
    "DataSpec.to_dict", "DataSpec.mean", "DataSpec.std", "TrainedModel.provenance",
    "SearchSpace.fixed_and_searched",
}  # fmt: skip
PUBLIC = [(package, name) for package, names in NAMES.items() for name in names.split()]
DEFINED = [pair for pair in PUBLIC if not pair[1].isupper()]


@pytest.mark.parametrize("package", NAMES)
def test_a_package_exports_exactly_these_names(package):
    module = import_module(package)
    assert sorted(module.__all__) == sorted(NAMES[package].split())
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'linear_beta'"):
        module.linear_beta  # noqa: B018


@pytest.mark.parametrize("package", NAMES)
def test_type_checkers_see_the_same_names(package):
    """What is imported `as` itself under TYPE_CHECKING is what they take for exported."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package}."):
            imported |= {alias.name: node.module for alias in node.names if alias.asname == alias.name}
    assert set(imported) == set(NAMES[package].split())
    for name, module in imported.items():
        assert getattr(import_module(module), name) is getattr(import_module(package), name)


def functions(public, name):
    """The functions of a public name: itself, or its own public methods and properties, by name."""
    if not inspect.isclass(public):
        return {name: public}
    found = {}
    for key, member in vars(public).items():
        if key.startswith("_") and key != "__init__":
            continue
        member = getattr(member, "fget", None) or getattr(member, "func", None) or member
        member = getattr(member, "__func__", member)
        if inspect.isfunction(member) and member.__module__ == public.__module__:
            found[f"{name}.{key}"] = member
    return found


@pytest.mark.parametrize(("package", "name"), DEFINED)
def test_every_name_is_documented(package, name):
    public = getattr(import_module(package), name)
    assert inspect.getdoc(public) and not public.__doc__.startswith(f"{name}("), "a dataclass's own signature"
    for function_name, function in functions(public, name).items():
        assert function_name.endswith("__init__") or inspect.getdoc(function), function_name


@pytest.mark.parametrize(("package", "name"), DEFINED)
def test_every_parameter_and_result_has_a_type(package, name):
    for function_name, function in functions(getattr(import_module(package), name), name).items():
        function = inspect.unwrap(function)
        hints = resolved_hints(function)
        parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
        assert parameters <= set(hints), function_name
        assert function_name.endswith("__init__") or "return" in hints, function_name


@pytest.mark.parametrize(("package", "name"), DEFINED)
def test_types_that_can_be_named_are(package, name):
    """No public annotation says Any, except for arrays of any dtype and for values of configs and JSON."""
    (definition,) = ast.parse(inspect.getsource(getattr(import_module(package), name))).body
    members = definition.body if isinstance(definition, ast.ClassDef) else [definition]
    for member in members:
        if isinstance(member, ast.FunctionDef):
            arguments = member.args
            annotated = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            types, own_name = [each.annotation for each in annotated] + [member.returns], member.name
        elif isinstance(member, ast.AnnAssign):
            types, own_name = [member.annotation], member.target.id
        else:
            continue
        if own_name.startswith("_") and own_name != "__init__":
            continue
        text = " ".join(ast.unparse(each) for each in types if each is not None)
        is_json = f"{name}.{own_name}" in JSON
        assert is_json == bool(re.search(r"\bAny\b", text.replace("NDArray[Any]", ""))), (own_name, text)


def resolved_hints(function):
    """Type hints, also of names that are imported under TYPE_CHECKING only."""
    import pandas
    import torch

    from diffusion.data.dataset import Dataset
    from diffusion.process.generate import Condition
    from diffusion.training.checkpoints import TrainedModel

    local = {"pd": pandas, "Dataset": Dataset, "Condition": Condition, "TrainedModel": TrainedModel}
    local["Tensor"] = torch.Tensor
    return typing.get_type_hints(function, localns=local)


def test_the_packages_are_marked_as_typed():
    assert all((ROOT / package / "py.typed").is_file() for package in NAMES)


def test_light_names_load_no_heavy_library():
    heavy = "torch torchvision ray mlflow onnx pandas sklearn scipy safetensors optuna matplotlib".split()
    program = f"""
import sys
for package, names in {LIGHT}.items():
    for name in names.split():
        exec(f"from {{package}} import {{name}}")
        assert not {{*{heavy}}} & {{*sys.modules}}, (package, name, {{*{heavy}}} & {{*sys.modules}})
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300)


@pytest.mark.slow
def test_mypy_accepts_what_a_user_writes_and_refuses_what_is_wrong(tmp_path):
    """In a strict check, names are exported, results are not Any, and misspelled names are errors."""
    (tmp_path / "user.py").write_text("""
import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

from diffusion import NoiseSchedule, TrainedModel, linear_betas, sampler_table, step
from export import Sampler
from workflows import SearchSpace, SweepResult, run_sweep, run_training

schedule = NoiseSchedule(linear_betas(100, 1e-4, 0.02))
row = sampler_table(schedule, "ddim", 10).coefficients[0]
x = np.zeros((2, 2))
assert_type(step(row, x, x, 0.0, 0.0)[0], "np.ndarray[tuple[int, int], np.dtype[np.float64]]")
assert_type(Sampler("sampler.onnx").sample(4, seed=0), NDArray[np.float32])
result = run_sweep(x, num_trials=3, search=SearchSpace(beta_end=(0.1,)), training={"num_updates": 5})
assert_type(result, SweepResult)
assert_type(result.metrics, dict[str, float])
assert_type(run_training("digits", config=result.champion.config).model, TrainedModel)
""")
    (tmp_path / "wrong.py").write_text("""
import diffusion
from diffusion import linear_beta
from workflows import run_sweep

diffusion.linear_betas("100", 1e-4, 0.02)
run_sweep("digits", num_trails=3)
run_sweep("digits", num_trials="3")
run_sweep(3)
""")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    result = subprocess.run(
        [*command, str(tmp_path / "user.py"), str(tmp_path / "wrong.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert not [line for line in lines if "wrong.py" not in line], result.stdout
    assert [int(line.split(":")[1]) for line in lines] == [3, 6, 7, 8, 9], result.stdout
