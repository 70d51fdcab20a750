"""The command ray-ddpm: the commands, their help, and one line for what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.errors import InputError
from workflows import train, tune
from workflows.cli import main as console

ROOT = Path(__file__).parents[3]
# What `pip install ray-ddpm` without extras does not install.
ABSENT = ["torch", "ray", "mlflow", "tyro", "rich", "pandas", "onnx", "yaml", "pyarrow", "sklearn"]


def run_bare(*arguments, module="workflows"):
    """Run a module in a process in which the packages of the extras cannot be imported."""
    program = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
runpy.run_module({module!r}, run_name="__main__")
"""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_help_lists_every_command_and_needs_no_extra():
    result = run_bare("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for name in ("tune", "train", "generate", "sample", "evaluate", "runs", "export", "ui", "cluster"):
        assert f"\n  {name} " in result.stdout


def test_sampling_needs_no_extra():
    result = run_bare("sample", "--doctor", "--provider", "cpu")
    assert result.returncode == 0, result.stderr
    assert run_bare("sample", "--help").stdout.startswith("usage: ray-ddpm sample ")


def test_the_report_on_the_installation_needs_no_extra():
    result = run_bare("doctor")
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    for name in ("PyTorch", "Ray", "MLflow"):
        assert f"\n{name:14}not installed: pip install 'ray-ddpm[train]'\n" in result.stdout


def test_a_missing_extra_is_named_with_the_remedy():
    for line, extra in (("tune x", "train"), ("export x", "train"), ("cluster check x", "train,cluster")):
        name, *arguments = line.split()
        result = run_bare(name, *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: ray-ddpm {name} needs ")
        assert (
            result.stderr.endswith(f": pip install 'ray-ddpm[{extra}]'\n") and result.stderr.count("\n") == 1
        )


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("workflows.tune", ["--data", "digits"]),
        ("workflows.train", ["--help"]),
        ("workflows.runs", ["list"]),
        ("workflows.evaluate", [".", "--data", "heart"]),
        ("workflows.ui", []),
        ("workflows.cluster", ["check", "x"]),
        ("export.to_onnx", ["x"]),
    ],
)
def test_a_module_that_is_run_without_its_extra_names_it(module, arguments):
    result = run_bare(*arguments, module=module)
    assert (result.returncode, result.stdout) == (2, "")
    extra = "train,cluster" if module == "workflows.cluster" else "train"
    assert result.stderr.startswith("error: this command needs ") and result.stderr.count("\n") == 1
    assert result.stderr.endswith(f": pip install 'ray-ddpm[{extra}]'\n")


def test_an_unknown_command_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="ray-ddpm tunee: no such command; did you mean tune"):
        console.main(["tunee"])
    with pytest.raises(InputError, match="give one of tune, train, "):
        console.main(["xyz"])


def test_the_version_is_that_of_the_package(capsys):
    from importlib.metadata import version

    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ray-ddpm {version('ray-ddpm')}\n"


@pytest.mark.parametrize(("name", "module"), [("tune", tune), ("train", train)])
def test_a_commands_help_is_that_of_its_script(name, module, capsys):
    texts = []
    for call in (lambda: console.main([name, "--help"]), lambda: module.main(["--help"])):
        with pytest.raises(SystemExit) as caught:
            call()
        assert caught.value.code == 0
        texts.append(capsys.readouterr().out.replace(f"ray-ddpm {name}", f"{name}.py"))
    assert texts[0].split() == texts[1].split()
    assert "--num-" in texts[0]


def test_every_command_is_a_main_function_that_takes_its_name():
    import inspect
    from importlib import import_module

    for command in console._COMMANDS.values():
        assert "prog" in inspect.signature(import_module(command.module).main).parameters


def test_the_package_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "workflows", "tunee"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stderr) == (
        2,
        "error: ray-ddpm tunee: no such command; did you mean tune?\n",
    )
