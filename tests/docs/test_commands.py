"""Every command, flag and program of the documentation is one that exists, as the real parsers see it."""

import argparse
import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import tomllib
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from diffusion.config import Config
from diffusion.errors import InputError
from docs.blocks import ROOT, Block, commands, pages, read_blocks
from docs.command_reference import COMMANDS, command_help, subcommands
from docs.pictures import PICTURES, by_command
from docs.run_blocks import shorten
from export.parser import OneLineParser
from workflows.api import SweepSettings, TrainingSettings
from workflows.cli import parsing, resume
from workflows.cli.process import exit_status
from workflows.cli.search_space import SearchSpace

PAGES = pages()
SAVED_MODEL = ROOT / "tests" / "workflows" / "storage" / "format_1" / "finished-sweep" / "champion"
BLOCKS = [block for path in PAGES for block in read_blocks(path)]
# Programs of others, and flags of theirs that the text names.
EXTERNAL = {
    "./whole_loop",
    "aws",
    "cat",
    "cd",
    "chmod",
    "cut",
    "g++",
    "mlflow",
    "npm",
    "printf",
    "python3",
    "ray",
    "source",
}
EXTERNAL_FLAGS = {"--address", "--app-name", "--env-manager", "--generate", "--no-wait", "--region"}
LANGUAGES = {
    "",
    "bash",
    "csharp",
    "ini",
    "java",
    "javascript",
    "python",
    "text",
    "toml",
    "{eval-rst}",
    "{include}",
    "{toctree}",
}


def place(block: Block) -> str:
    return f"{block.path.relative_to(ROOT)}:{block.line}"


class Parsed(Exception):
    """The arguments are those of the command, which need not be run."""


@pytest.fixture(autouse=True)
def _reader(tmp_path, monkeypatch):
    """The folder of a reader who has followed all pages: data of their own, and earlier runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    for name in ("flowers.csv", "measurements.csv", "samples.npy", "samples.csv", "more.parquet"):
        (tmp_path / name).touch()
    for name in ("runs/one-heart/model", "runs/hearts/champion", "runs/digits/champion"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(SAVED_MODEL / "config.json", tmp_path / name)
        (tmp_path / name / "model.safetensors").touch()
    monkeypatch.setattr(resume, "run_to_resume", lambda *_, **__: None)

    def parse_args(parser, arguments=None, namespace=None):
        argparse.ArgumentParser.parse_args(parser, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(OneLineParser, "parse_args", parse_args)


def check(words: list[str]) -> None:
    """Parse a command without running it.

    Raises:
        InputError, SystemExit, AssertionError: there is no such command or flag, or a value is not allowed.
    """
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *arguments = words
    if "|" in arguments:
        arguments = arguments[: arguments.index("|")]
    if program == "ray-ddpm":
        if arguments[0].startswith("-"):
            assert arguments in (["--help"], ["--version"])
            return
        assert arguments[0] in COMMANDS, arguments[0]
        parse(COMMANDS[arguments[0]].module, arguments[1:])
    elif program == "python" and arguments[0] == "-m":
        parse(arguments[1], arguments[2:])
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
        parse(arguments[0].removesuffix(".py").replace("/", "."), arguments[1:])
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {each for each in arguments if "=" not in each} <= targets, arguments
    elif program in ("pip", ".venv/bin/pip"):
        extras = re.findall(r"\[([\w,-]+)\]", " ".join(arguments))
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {name for group in extras for name in group.split(",")} <= set(known), extras
    elif program == "node":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
    else:
        assert program in EXTERNAL or (ROOT / program).exists() or program.startswith(".venv/bin/"), program
        for word in arguments:
            assert not re.fullmatch(r"[\w/-]+\.(yaml|py)", word) or (ROOT / word).exists(), word
        if program == "ray" and "--" in arguments:  # a command that Ray runs on the head node
            inner = arguments[arguments.index("--") + 1 :]
            script = next((each for each in arguments if each.startswith("workflows/")), None)
            check(["python", script, *inner] if script else [w.removeprefix("ray-ddpm/") for w in inner])


def parse(module: str, arguments: list[str]) -> None:
    """Parse the arguments of a module that is run by `python -m`."""
    if module in ("workflows", "workflows.cli.main"):
        return check(["ray-ddpm", *arguments])
    if module in ("workflows.tune", "workflows.train"):
        parser = getattr(parsing, f"parse_{module.rpartition('.')[2]}_options")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            parser(arguments)
        return None
    module = {"workflows.cluster": "workflows.cluster.__main__"}.get(module, module)
    if module.startswith(("benchmarks.", "docs.")):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        return None
    with pytest.raises(Parsed):
        import_module(module).main(arguments)
    return None


SHELL = [block for block in BLOCKS if block.is_shell]


@pytest.mark.parametrize("block", SHELL, ids=place)
def test_every_command_is_one(block):
    for words in commands(block.text):
        check(words)


def test_the_commands_of_readmes_table_are_commands_and_have_drawn_its_pictures():
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and "`python " in line]
    assert len(rows) == 6
    shown = set()
    for row in rows:
        check(shlex.split(row.split("`")[1]))
        for name in re.findall(r"\(docs/(\w+\.png)\)", row):
            assert 0 < (ROOT / "docs" / name).stat().st_size < 60_000
            shown.add(name)
    assert shown == {name for name, draw in PICTURES.items() if draw is by_command}


@pytest.mark.parametrize(
    "command",
    [
        "python workflows/tune.py --dat heart",
        "python workflows/tune.py --data nothing",
        "python workflows/train.py --training.batches 3",
        "python -m export.sampler sampler.onnx --num-sampels 3",
        "ray-ddpm tuen",
        "ray-ddpm evaluate",
        "make demos",
        "pip install 'ray-ddpm[trian]'",
        "ray submit ray_cluster.yaml workflows/tune.py -- --num-trails 3",
        "ray up clusters.yaml",
        "wget there",
    ],
)
def test_what_is_no_command_is_found(command, capsys):
    with pytest.raises((AssertionError, InputError, SystemExit, pytest.fail.Exception)):
        check(shlex.split(command))


def test_the_documentation_has_commands_programs_and_outputs():
    assert len(SHELL) > 30 and sum(block.language == "python" for block in BLOCKS) > 10
    assert {block.kind for block in BLOCKS} >= {"", "not run", "printed", "checked"}
    assert {block.language for block in BLOCKS} <= LANGUAGES
    for block in BLOCKS:
        if block.kind == "not run":
            assert block.note, f"{place(block)} does not say why it is not run"
        elif block.language == "text":  # what is printed, or a layout that no command prints
            assert block.kind or "$" not in block.text, place(block)
        if block.kind.startswith("printed"):
            assert block.text.strip(), f"{place(block)} is empty: run python -m docs.run_blocks"
        if block.kind == "printed":
            assert shorten(block.text, block.note) == block.text, place(block)


def test_every_flag_that_the_text_names_exists():
    assert subcommands("cluster") == ["init", "check", "mlflow", "backup"] and subcommands("sample") == []
    calls = [(name, *inner) for name in COMMANDS for inner in ((), *zip(subcommands(name), strict=True))]
    known = {flag for call in calls for flag in re.findall(r"--[a-z][\w.-]*", command_help(*call))}
    known |= {"--help-all", "--version"} | EXTERNAL_FLAGS
    known |= {
        re.sub(r"(?<=\.)no-|(?<=^--)no-", "", flag) for flag in known
    }  # of a value that is true by default
    for path in PAGES:
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", text):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code):
                group = any(each.startswith(f"{flag}.") for each in known)  # as in "a `--search` flag"
                assert flag in known or group, f"{path.name}: {code}"
                if re.search(r"[-.]no-", flag) and flag not in EXTERNAL_FLAGS:
                    parse("workflows.train", ["--data", "heart", flag])


PYTHON = [block for block in BLOCKS if block.language == "python" and block.path.name != "extending.md"]


@pytest.mark.parametrize("block", PYTHON, ids=place)
def test_every_program_uses_names_and_settings_that_exist(block):
    check_program(block.text)


def check_program(text: str) -> None:
    """Look up what a program imports from the project, and the settings that it gives to runs."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
            "diffusion",
            "export",
            "workflows",
        ):
            for alias in node.names:
                assert hasattr(import_module(node.module), alias.name), alias.name
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("run_sweep", "run_training"):
            kind = SweepSettings if node.func.id == "run_sweep" else TrainingSettings
            for keyword in node.keywords:
                assert keyword.arg in kind.__annotations__, keyword.arg
                check_section(keyword.arg, keyword.value)


def check_section(name: str, value: ast.expr) -> None:
    """Compare the keys of a section's mapping with the fields of the section."""
    if not isinstance(value, ast.Dict):
        return
    section = SearchSpace if name == "search" else type(getattr(Config(), name))
    names = {field.name for field in fields(section)}
    assert {ast.literal_eval(key) for key in value.keys} <= names, name


@pytest.mark.parametrize(
    "program",
    [
        "from diffusion import linear_beta",
        "run_sweep('heart', num_trails=3)",
        "run_training('heart', training={'epochs': 3})",
        "run_sweep('heart', search={'betas': 3})",
    ],
)
def test_a_program_with_a_wrong_name_is_found(program):
    with pytest.raises(AssertionError):
        check_program(program)


CHECKED = [block for block in BLOCKS if block.kind == "checked"]


@pytest.mark.parametrize("block", CHECKED, ids=place)
def test_a_printed_block_is_what_its_command_prints(block, capsys, monkeypatch, tmp_path_factory):
    """Of the commands that take no time: help and errors."""
    monkeypatch.undo()  # they are run, in the reader's folder
    (words,) = commands(block.note)
    assert words[0] == "ray-ddpm"
    from workflows.cli.main import main

    with contextlib.chdir(tmp_path_factory.mktemp("reader")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        patch.setenv("NO_COLOR", "1")
        with contextlib.suppress(SystemExit):
            exit_status(main, words[1:])
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip() == block.text.strip()


def test_links_within_the_documentation_lead_somewhere():
    """Those of README.md and CONTRIBUTING.md, which are no pages of the site; Sphinx checks the others."""
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists() or (path.parent / target).suffix == "", target
    assert os.path.exists(ROOT / "docs" / "index.md")


def test_every_picture_of_the_documentation_is_made_by_a_command():
    from docs.pictures import PICTURES

    folder = Path(ROOT, "docs")
    assert {path.name for path in folder.iterdir() if path.suffix in (".png", ".gif", ".jpg", ".svg")} == set(
        PICTURES
    )


@pytest.mark.parametrize("package", ["diffusion", "export", "workflows"])
def test_the_reference_has_every_public_name(package):
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    described = set(re.findall(rf"::\s+{package}\.(\w+)$", page, re.MULTILINE))
    registries = set(re.findall(r"`([A-Z_]+)`", page))
    public = set(import_module(package).__all__)
    assert described | (registries & public) == public


def test_every_page_is_in_the_table_of_contents():
    """Sphinx finds this too, where it is installed."""
    folder = ROOT / "docs"
    index = (folder / "index.md").read_text()
    for path in PAGES:
        if path.parent != ROOT and path.name not in ("index.md", "package.md"):
            assert f"\n{path.relative_to(folder).with_suffix('')}\n" in index, path
