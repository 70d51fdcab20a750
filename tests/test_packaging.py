"""pyproject.toml and constraints.txt agree with each other and with the environment."""

import re
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)={2,3}(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
}


def requirements() -> list[Requirement]:
    """Those of all extras but gpu."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in extras if name != "gpu" for line in extras[name])]
    return [Requirement(line) for line in lines if not line.startswith("ray-ddpm")]


def installed_requirements() -> list[Requirement]:
    """The same without those of `make docs`, unless it has installed them, as CI does before the tests."""
    if find_spec("sphinx"):
        return requirements()
    docs = {Requirement(line).name for line in PROJECT["optional-dependencies"]["docs"]}
    return [requirement for requirement in requirements() if requirement.name not in docs]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_within_its_range(requirement):
    linux = default_environment() | {"sys_platform": "linux", "platform_machine": "x86_64"}
    if requirement.marker and not requirement.marker.evaluate(linux):
        return
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_every_line_of_the_constraints_is_an_exact_pin():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+={2,3}[\w.]+", line) for line in lines if not line.startswith("#"))
    assert "torch===2.13.0" in lines, "with == pip may choose a local CPU build"


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_an_environment_without_cuda_differs_in_the_builds_of_pytorch_only(torch, tmp_path):
    (tmp_path / f"torch-{torch}.stamp").touch()  # as if the environment had been created
    for flags in ([f"TORCH={torch}"], []):  # other commands keep what it was created with
        (tmp_path / "constraints.txt").unlink(missing_ok=True)
        command = [
            "make",
            "-s",
            "-C",
            str(ROOT),
            f"VENV={tmp_path}",
            *flags,
            str(tmp_path / "constraints.txt"),
        ]
        subprocess.run(command, check=True, timeout=300)
        lines = (tmp_path / "constraints.txt").read_text().splitlines()
        own = (ROOT / "constraints.txt").read_text().splitlines()
        changed = {new: old for new, old in zip(lines, own, strict=True) if new != old}
        expected = {f"{name}==={PINS[name]}+cpu": name for name in ("torch", "torchvision")}
        assert set(changed) == (set(expected) if torch == "cpu" else set())


def test_another_build_of_pytorch_is_refused():
    result = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "TORCH=gpu", "demo"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0 and "TORCH=gpu: give cpu or cuda" in result.stderr


def test_the_constraints_name_every_transitive_package():
    """All packages that the requirements need on this platform are pinned too."""
    from importlib.metadata import requires

    pending = [(requirement.name, frozenset(requirement.extras)) for requirement in installed_requirements()]
    seen = set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) in seen or name in ("onnxruntime", "pip"):
            continue
        seen.add((name, extras))
        assert canonicalize_name(name) in PINS, f"{name} has no pin: regenerate constraints.txt"
        for line in requires(name) or []:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *extras)]
            if not requirement.marker or any(requirement.marker.evaluate(each) for each in environments):
                pending.append((requirement.name, frozenset(requirement.extras)))
    assert len(seen) > 100


def test_the_environment_runs_the_pinned_versions():
    from importlib.metadata import version

    for requirement in installed_requirements():
        if not requirement.marker or requirement.marker.evaluate():
            name = canonicalize_name(requirement.name)
            assert version(name).split("+")[0] == PINS[name], (
                f"{name}: run make test, which installs the pins"
            )


def test_each_platform_gets_exactly_one_onnxruntime():
    runtimes = [Requirement(line) for line in PROJECT["dependencies"] if line.startswith("onnxruntime")]
    platforms = [("linux", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64"), ("darwin", "arm64")]
    for sys_platform, machine in platforms:
        environment = default_environment() | {"sys_platform": sys_platform, "platform_machine": machine}
        chosen = [each.name for each in runtimes if each.marker and each.marker.evaluate(environment)]
        gpu = sys_platform in ("linux", "win32") and machine in ("x86_64", "AMD64")
        assert chosen == ["onnxruntime-gpu" if gpu else "onnxruntime"]


def test_the_sampler_needs_no_training_packages():
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names == {"numpy", "pillow", "onnxruntime", "onnxruntime-gpu"}
