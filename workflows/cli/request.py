"""What a command line or a program asks for: options, and the run that they resume.

`parsing` makes a request from command-line arguments, `keyword_settings` from the settings of
`workflows.api`.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from diffusion.config import Config, TrainingConfig
from diffusion.data.sources import DataSource, open_source
from diffusion.errors import InputError
from diffusion.files import path_kind, user_path
from diffusion.json_values import read_json
from workflows.cli.run_options import RunOptions, TrainOptions
from workflows.cli.tune_options import UNLIMITED, TuneOptions
from workflows.storage.run_record import RunRecord

OptionsT = TypeVar("OptionsT", bound=RunOptions)

# Before the data are opened, the default batch size is not known: checks against it must pass until then.
_ANY_BATCH = TrainingConfig(batch_size=10**9)


@dataclass(frozen=True, eq=False)
class RunRequest(Generic[OptionsT]):
    """Options of a run whose data have not been opened, so that errors in the options come first.

    Attributes:
        options: options in which the defaults that depend on the data are not filled in yet, unless a run
            is resumed.
        given: values that those defaults do not replace, by dotted name.
        record: record of the run to resume, or None.
        source: data in memory, or None for those that the options name.
    """

    options: OptionsT
    given: Mapping[str, Any]
    record: RunRecord | None
    source: DataSource | None = None

    def open_data(self) -> tuple[DataSource, OptionsT]:
        """Open the data, and fill in the defaults that depend on them.

        Returns:
            The opened data and the complete options.

        Raises:
            InputError: the data cannot be opened, or an option does not fit their defaults.
        """
        source = self.source or open_source(self.options.data_config())
        if self.record is not None:
            return source, self.options
        return source, self.options.with_preset(source, self.given)


def tune_defaults(record: RunRecord | None, *, limits_time: bool) -> tuple[TuneOptions, dict[str, Any]]:
    """Default options of a sweep, and those of their values that the preset of the data does not replace.

    Args:
        record: record of the sweep to resume, or None.
        limits_time: whether a time budget is given; the number of trials is then unlimited.
    """
    if record is not None:
        names = {"name": record.name, "experiment": record.experiment}
        return TuneOptions.for_run(record.config, record.options, **names), {}
    defaults = TuneOptions(training=_ANY_BATCH)
    if not limits_time:
        return defaults, {}
    return replace(defaults, num_trials=UNLIMITED), {"num_trials": UNLIMITED}


def train_defaults(record: RunRecord | None, init_from: str | None) -> tuple[TrainOptions, dict[str, Any]]:
    """Default options of a training, and those of their values that the preset of the data does not replace.

    Args:
        record: record of the run to resume, whose config is kept, or None.
        init_from: model whose weights a new training starts from, which sets the network, or None.

    Raises:
        InputError: there is no such model.
    """
    if record is not None:
        return TrainOptions.for_config(record.config, name=record.name, experiment=record.experiment), {}
    defaults = TrainOptions(training=_ANY_BATCH)
    if init_from is None:
        return defaults, {}
    if not init_from.strip():
        raise InputError("--init-from is empty: give the folder of a run or a model, or leave the flag out")
    file = model_folder(init_from) / "config.json"
    tree = read_json(file, "the folder of a model for --init-from")
    try:
        config = Config.from_dict({"network": tree["config"]["network"]})
    except (KeyError, TypeError, InputError) as error:
        raise InputError(
            f"--init-from {init_from}: {file} describes no network ({error}); give another model"
        ) from error
    kept = {name: value for name, value in config.flat().items() if name.startswith("network.")}
    return replace(defaults, network=config.network), kept


def model_folder(path: str) -> Path:
    """Find the folder of the model that `--init-from` refers to.

    Args:
        path: folder of a model, of a checkpoint or of a run. A run gives its final model or champion, or else
            its newest checkpoint.

    Raises:
        InputError: there is no model.
    """
    root = user_path(path)
    checkpoints: list[Path] = []
    if path_kind(root) == "folder":
        with suppress(OSError):  # of a folder that cannot be listed
            checkpoints = sorted(root.glob("checkpoints/[0-9]*"), reverse=True)
    for folder in (root, root / "model", root / "champion", *checkpoints):
        if all(path_kind(folder / name) == "file" for name in ("config.json", "model.safetensors")):
            return folder
    raise InputError(
        f"--init-from {path}: no model there; give a run's folder, its model/, or one of its checkpoints/"
    )
