"""Register models as one: `python -m workflows.register runs/low runs/second --experiment mnist-cascade`."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from diffusion.errors import InputError
from diffusion.files import path_kind, user_path
from export.cascade import Cascade
from export.parser import OneLineParser
from export.sampler import Sampler
from workflows.cli.model_reference import MODEL_FOLDERS
from workflows.cli.process import run
from workflows.environment import set_defaults


def main(arguments: Sequence[str], prog: str = "python -m workflows.register") -> int:
    """Register the models that the arguments name, and return the exit status.

    Args:
        arguments: command-line arguments.
        prog: name of the command in its help.

    Raises:
        InputError: there is no such model, the models make no cascade, or the store cannot be used.
    """
    parser = OneLineParser(
        prog=prog, description="Put the models of a cascade into MLflow's registry as one model."
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="sampler.onnx, or the folder of a run, in their order"
    )
    parser.add_argument(
        "--experiment",
        required=True,
        help="MLflow experiment of the cascade; ray-ddpm-EXPERIMENT is the name of the registered model",
    )
    parser.add_argument("--name", default="cascade", help="name of the run (default: cascade)")
    parser.add_argument(
        "--tracking-uri",
        help="MLflow server or database (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    options = parser.parse_args(arguments)
    files = [_sampler_file(each) for each in options.models]
    cascade = Cascade([Sampler(each, provider="cpu") for each in files])
    set_defaults(verbose=False)

    from workflows.terminal import waiting

    with waiting("loading MLflow"):
        from workflows.cli.run_options import RunFlags
        from workflows.tracking.tracker import (
            PublishedModel,
            RegistrationError,
            open_tracker,
            resolve_tracking_uri,
        )

    flags = RunFlags(name=options.name, experiment=options.experiment)  # checks both
    params = {f"model.{number}": each for number, each in enumerate(options.models, start=1)}
    tracker = open_tracker(resolve_tracking_uri(options.tracking_uri), options.experiment)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cascade"
        folder.mkdir()
        for number, file in enumerate(files, start=1):
            shutil.copyfile(file, folder / f"{number}.onnx")
        tracker.start(options.name, params)
        try:
            with waiting(f"sending the models to {tracker.name}"):
                registered = tracker.register(
                    f"ray-ddpm-{flags.experiment}",
                    PublishedModel(folder, params, {}),
                    {"data_fingerprint": cascade.spec.provenance.get("data_fingerprint")},
                    may_promote=False,
                )
        except RegistrationError as error:
            tracker.close("failed")
            raise InputError(f"{tracker.name} did not register the models ({error}): try again") from error
        except BaseException:
            tracker.close("stopped")  # nobody would end it
            raise
        tracker.close("finished")
    if registered is None:
        print(f"the models are not registered: {tracker.name} has no model registry")
        return 1
    uri = f"models:/ray-ddpm-{flags.experiment}/{registered.version}"
    print(f"registered in {tracker.name} as {uri}: {len(files)} models, one after another")
    print(f'next: mlflow.pyfunc.load_model("{uri}").predict(pandas.DataFrame({{"num_samples": [64]}}))')
    return 0


def _sampler_file(name: str) -> Path:
    """The sampler.onnx of a file's path, or of the folder of a model or a run.

    Raises:
        InputError: there is none.
    """
    path = user_path(name)
    if path_kind(path) == "file":
        return path
    files = [path / folder / "sampler.onnx" for folder in MODEL_FOLDERS]
    found = next((each for each in files if path_kind(each) == "file"), None)
    if found is None:
        raise InputError(f"{name}: no sampler.onnx there; give one, or the folder of a run")
    return found


if __name__ == "__main__":
    run(main, extra="train")
