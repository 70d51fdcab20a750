"""The wheel works without the checkout: commands, data files, public names, with declared packages only."""

import importlib
import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from export.sampler import Sampler

ROOT = Path(__file__).parents[1]
PACKAGES = ("diffusion", "export", "workflows")
MODEL = ROOT / "tests/workflows/storage/format_1/finished-sweep/champion"
COMMANDS = (
    "export.sampler", "export.to_onnx", "workflows.tune", "workflows.train", "workflows.generate",
    "workflows.evaluate", "workflows.ui", "workflows.cluster", "workflows.cluster init",
    "workflows.cluster check",
)  # fmt: skip
# Runs commands one after another, as `python -m` does, in one process: most of their time is imports.
RUN_ALL = """
import contextlib, io, json, os, runpy, sys
results = []
for command in json.loads(sys.argv[1]):
    sys.argv, output, status = command, io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            status = exit.code or 0
    results.append((status, output.getvalue()))
print(json.dumps(results), flush=True)
os._exit(0)  # each command has asked for an exit with its own status
"""


def run(*command, folder, status=0, timeout=600):
    """Output of a command that ends with a status; the folder is not in the checkout."""
    result = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == status, f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout + result.stderr


def build(source, target, folder):
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder, folder=source)
    (file,) = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def required(wheel: Distribution, extras: tuple[str, ...]) -> dict[str, Distribution]:
    """The distributions that the wheel's metadata and theirs require, by name, as installed here."""
    found, seen = {}, set()
    pending = [(wheel, frozenset(extras))]
    while pending:
        parent, wanted = pending.pop()
        for requirement in map(Requirement, parent.requires or []):
            environments = [{"extra": extra} for extra in ("", *wanted)]
            if requirement.marker and not any(requirement.marker.evaluate(each) for each in environments):
                continue
            name, key = canonicalize_name(requirement.name), (requirement.name, frozenset(requirement.extras))
            if name == "ray-ddpm":  # one of its extras includes others
                pending.append((wheel, key[1]))
            elif key not in seen:
                seen.add(key)
                found[name] = distribution(name)
                pending.append((found[name], key[1]))
    return found


class Environment:
    """A virtual environment with the wheel's files, and links to the packages that it requires."""

    def __init__(self, folder: Path, wheel: Path, extras: tuple[str, ...] = ()) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        zipfile.ZipFile(wheel).extractall(site)
        (metadata,) = site.glob("ray_ddpm-*.dist-info")
        self.python, self.metadata = folder / "bin" / "python", PathDistribution(metadata)
        for each in required(self.metadata, extras).values():
            for part in {file.parts[0] for file in each.files or []} - {"..", "__pycache__"}:
                if not (site / part).exists():
                    (site / part).symlink_to(Path(str(each.locate_file(part))))
        self.folder = folder / "elsewhere"
        self.folder.mkdir()

    def run(self, *arguments, **options):
        """Output of this environment's Python."""
        return run(self.python, "-I", *arguments, folder=self.folder, **options)

    def evaluate(self, program, *arguments):
        """What a program prints as JSON."""
        return json.loads(self.run("-c", program, *arguments))

    def run_all(self, *commands):
        """Exit status and output of each command, a module and its arguments, in one process."""
        return self.evaluate(RUN_ALL, json.dumps([[str(part) for part in command] for command in commands]))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """Without extras: only what samples."""
    return Environment(tmp_path_factory.mktemp("bare"), wheel)


@pytest.fixture(scope="module")
def full(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("full"), wheel, ("train", "cluster"))


def test_a_file_is_sampled_without_training_packages(bare):
    absent = bare.evaluate(
        "import importlib.util, json; print(json.dumps([name for name in "
        "('torch', 'ray', 'mlflow', 'onnx', 'pandas', 'yaml', 'tyro') if importlib.util.find_spec(name)]))"
    )
    assert absent == []
    model, options = MODEL / "sampler.onnx", ("--num-samples", 5, "--seed", 3)
    bare.run("-m", "export.sampler", model, *options, "--output", "samples.npy")
    picture, doctor = bare.run_all(
        ("export.sampler", model, *options, "--output", "samples.png"), ("export.sampler", "--doctor")
    )
    assert picture[0] == doctor[0] == 0 and "ONNX Runtime" in doctor[1]
    assert (bare.folder / "samples.png").is_file()
    expected = Sampler(model).sample(5, seed=3)
    actual = np.load(bare.folder / "samples.npy")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


def test_every_command_has_help(full):
    results = full.run_all(*([*command.split(), "--help"] for command in COMMANDS))
    for command, (status, output) in zip(COMMANDS, results, strict=True):
        assert status == 0 and command.split()[-1].split(".")[-1] in output, output


def test_every_console_script_has_help(full):
    for script in full.metadata.entry_points.select(group="console_scripts"):
        program = f"import sys; from {script.module} import {script.attr} as main; sys.exit(main())"
        assert script.name in full.run("-c", program, "--help")


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    """Templates, styles and graphs too."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert file.relative_to(ROOT).as_posix() in names


@pytest.fixture(scope="module")
def public_names(full):
    """File and names of `__all__` of each package. The names are loaded when they are first used."""
    return full.evaluate(
        f"import importlib, json; packages = [importlib.import_module(name) for name in {PACKAGES}]; "
        "names = [sorted(getattr(package, '__all__', ())) for package in packages]; "
        "assert all(getattr(p, name) is not None for p, each in zip(packages, names) for name in each); "
        "print(json.dumps({p.__name__: [p.__file__, each] for p, each in zip(packages, names)}))"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_names_are_the_wheels(full, public_names, package):
    file, names = public_names[package]
    assert full.python.parents[1] in Path(file).parents
    assert names == sorted(getattr(importlib.import_module(package), "__all__", ()))


@pytest.fixture(scope="module")
def project(full):
    """The folder that `init` writes."""
    (status, output), again = full.run_all(*[("workflows.cluster", "init", "mine")] * 2)
    assert status == 0 and "cd mine" in output
    assert again == [2, "error: mine is not empty: give the path of a new folder\n"]
    return full.folder / "mine"


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "cluster/on-prem.yaml"])
def test_everything_that_a_cluster_copies_is_in_the_wheel(project, name):
    config = yaml.safe_load((project / name).read_text())
    local = [each for each in config["file_mounts"].values() if not each.startswith("~")]
    assert {*PACKAGES, "cluster"} < set(local)
    for each in local:
        for file in [ROOT / each] if (ROOT / each).is_file() else (ROOT / each).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert (project / file.relative_to(ROOT)).read_bytes() == file.read_bytes(), file
    assert not list(project.rglob("__pycache__")) and not list(project.rglob("shipped"))


def test_a_written_cluster_file_passes_once_its_values_are_set(full, project, tmp_path):
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray" / "auth_token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    text = (project / "ray_cluster.yaml").read_text().replace("ami-YOUR-IMAGE", "ami-0123456789abcdef0")
    text = text.replace("sg-YOUR-GROUP", "sg-0123456789abcdef0").replace("YOUR-BUCKET", "mine")
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    command = (full.python, "-I", "-m", "workflows.cluster", "check", file)
    output = run("env", f"HOME={tmp_path}", *command, folder=project)
    assert "USD per hour" in output and "prices.csv" in output and "is in order" in output


def contents(wheel):
    files = zipfile.ZipFile(wheel)
    return {name: files.read(name) for name in files.namelist()}


def test_the_machines_of_a_cluster_can_install_what_they_get(project, wheel, tmp_path):
    """What they get has all that the build needs, and gives the same wheel again."""
    assert contents(build(project, "wheel", tmp_path)) == contents(wheel)


def test_the_source_distribution_is_complete(wheel, tmp_path):
    """The wheel that it makes is the same as the checkout's."""
    archive = build(ROOT, "sdist", tmp_path)
    run("tar", "xzf", archive, folder=tmp_path)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert contents(build(source, "wheel", tmp_path)) == contents(wheel)
    for name in ("tests/test_wheel.py", "docs/extending.md", "benchmarks/judgement.py", "CHANGELOG.md"):
        assert (source / name).is_file(), name


def test_the_description_has_no_relative_link(bare):
    """An index page shows it, where the repository's files are not."""
    text = bare.metadata.metadata.get_payload()
    assert "pip install" in text and "](" not in text.replace("](https://", "")


@pytest.mark.faults  # takes minutes, so it is not among the slow tests
def test_the_wheel_trains_exports_and_samples_many(full):
    training = ("--training.num-updates", 20, "--training.num-evaluations", 1, "--metrics.num-samples", 100)
    full.run("-m", "workflows.train", "--data", "heart", "--name", "one", *training, timeout=600)
    full.run("-m", "export.to_onnx", "runs/one/model", "--output", "again.onnx", timeout=600)
    command = ("-m", "workflows.generate", "--model", "again.onnx", "--num-samples", 30, "--num-actors", 1)
    full.run(*command, "--output", "many", timeout=600)
    assert sum(len(np.load(file)) for file in (full.folder / "many").glob("*.npy")) == 30


@pytest.mark.slow
def test_pip_installs_the_wheel(wheel, tmp_path):
    """From the package index, without extras: no training package comes with it."""
    python, pip = tmp_path / "empty" / "bin" / "python", ("-m", "pip", "--disable-pip-version-check")
    run(sys.executable, "-m", "venv", "empty", folder=tmp_path)
    run(python, *pip, "install", "-c", ROOT / "constraints.txt", wheel, folder=tmp_path, timeout=600)
    installed = {line.split("==")[0].lower() for line in run(python, *pip, "freeze", folder=tmp_path).split()}
    assert not {"torch", "ray", "mlflow", "onnx", "pandas", "torchvision"} & installed
    run(python, "-I", "-m", "export.sampler", MODEL / "sampler.onnx", "--output", "it.npy", folder=tmp_path)
    assert np.load(tmp_path / "it.npy").shape[0] == 64
