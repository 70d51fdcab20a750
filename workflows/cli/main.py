"""The command `ray-ddpm`: `ray-ddpm tune --data digits`; `python -m workflows` is the same.

Each command is imported when it is called, so `sample` works where only the sampler is installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from diffusion.errors import InputError, nearest
from diffusion.files import package_version
from workflows.cli.process import extra_named, run


@dataclass(frozen=True)
class _Command:
    """A command: its module, whose `main` takes arguments and `prog`; the extra it needs; what it does."""

    module: str
    extra: str | None
    summary: str


_COMMANDS = {
    "tune": _Command("workflows.tune", "train", "run a sweep and export the best model"),
    "train": _Command("workflows.train", "train", "train one model and export it"),
    "sample": _Command("export.sampler", None, "draw samples from a sampler.onnx"),
    "generate": _Command("workflows.generate", "train", "draw many samples on all cores, GPUs or machines"),
    "evaluate": _Command("workflows.evaluate", "train", "judge samples of models or of other programs"),
    "register": _Command("workflows.register", "train", "put several models into the registry as a cascade"),
    "runs": _Command("workflows.runs", "train", "list, compare and delete runs"),
    "export": _Command("export.to_onnx", "train", "export a trained model to ONNX"),
    "sync": _Command("workflows.sync", "train", "send to MLflow what it has missed"),
    "ui": _Command("workflows.ui", "train", "show the runs in MLflow's web interface"),
    "doctor": _Command("workflows.doctor", None, "report on this installation, for a bug report"),
    "cluster": _Command("workflows.cluster.__main__", "train,cluster", "check a cluster's YAML"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names, and return its exit status.

    Raises:
        InputError: there is no such command, its own arguments are invalid, or an extra is not installed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"ray-ddpm {package_version('ray-ddpm') or 'of an unknown version'}")
        return 0
    if name not in _COMMANDS:
        raise InputError(f"ray-ddpm {name}: no such command; {nearest(name, _COMMANDS)}")
    command = _COMMANDS[name]
    with extra_named(f"ray-ddpm {name}", command.extra):
        status: int = import_module(command.module).main(rest, prog=f"ray-ddpm {name}")
    return status


def script() -> None:
    """Entry point of the console command."""
    run(main)


def _help() -> str:
    width = max(map(len, _COMMANDS))
    return "\n".join(
        [
            "usage: ray-ddpm COMMAND ...",
            "",
            "Denoising diffusion models: sweeps and training on Ray, samplers in ONNX.",
            "",
            *(f"  {name:{width}}  {command.summary}" for name, command in _COMMANDS.items()),
            "",
            "ray-ddpm COMMAND --help shows the flags of a command, ray-ddpm --version the version.",
        ]
    )
