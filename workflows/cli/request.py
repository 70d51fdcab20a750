"""What a command line or a program asks for: options, and the run that they resume.

`parsing` makes a request from command-line arguments, `keyword_settings` from the settings of
`workflows.api`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from diffusion.config import Config, TrainingConfig
from diffusion.data.sources import DataSource, open_source, resolve
from workflows.cli.model_reference import read_network, read_saved_config
from workflows.cli.run_options import RunOptions, TrainOptions, sections
from workflows.cli.tune_options import UNLIMITED, TuneOptions
from workflows.storage.run_record import RunRecord, check_same_config

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

    @property
    def is_finished(self) -> bool:
        """Whether the run to resume is finished, and the options leave it nothing to do."""
        record = self.record
        return record is not None and record.status == "finished" and not self.options.extends(record.options)

    @property
    def finished_location(self) -> str:
        """Folder or bucket of the finished run that is resumed."""
        assert self.record is not None, "a finished run has a record"
        return f"{self.options.output_dir.rstrip('/')}/{self.record.name}"

    def finished_lines(self) -> list[str]:
        """What to say of a finished run that is resumed.

        Raises:
            InputError: the options ask for another config than the run was started with.
        """
        record, options = self.record, self.options
        assert record is not None, "a finished run has a record"
        given = options.config()
        if given.training.num_epochs is not None:  # only the data tell how many updates that is
            updates = record.config.training.num_updates
            given = given.with_values({"training.num_epochs": None, "training.num_updates": updates})
        check_same_config(given, record.config)
        folder = self.finished_location
        python = f"python -m workflows.{record.command}"
        if record.command == "tune":
            num_trials = record.options["num_trials"]
            planned = f" ({num_trials} trials)" if num_trials < UNLIMITED else ""
            more = 2 * num_trials if planned else "N --time-budget TIME"
            return [
                f"The sweep {record.name} is finished{planned}; its champion is in {folder}/champion",
                f"more trials: {python} --resume --name {record.name} --num-trials {more}",
            ]
        return [
            f"The training {record.name} is finished; its model is in {folder}/model",
            f"train it further: {python} --config {folder}/model/config.json --init-from {folder}",
        ]

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


def train_defaults(
    record: RunRecord | None,
    init_from: str | None,
    config: Config | None = None,
    tracking_uri: str | None = None,
) -> tuple[TrainOptions, dict[str, Any]]:
    """Default options of a training, and those of their values that the preset of the data does not replace.

    Args:
        record: record of the run to resume, whose config is kept, or None.
        init_from: model whose weights a new training starts from, which sets the network, or None.
        config: config that a new training has in place of the preset of its data, or None.
        tracking_uri: value of --tracking-uri.

    Raises:
        InputError: there is no such model.
    """
    if record is not None:
        return TrainOptions.for_config(record.config, name=record.name, experiment=record.experiment), {}
    defaults = TrainOptions(training=_ANY_BATCH)
    kept: dict[str, Any] = {}
    if config is not None:
        defaults = TrainOptions.for_config(config)
        parts = sections(config)
        kept = {name: value for name, value in config.flat().items() if name.partition(".")[0] in parts}
    if init_from is not None:
        of_model = read_network(init_from, tracking_uri)
        kept |= {name: value for name, value in of_model.flat().items() if name.startswith("network.")}
        defaults = replace(defaults, network=of_model.network)
    return defaults, kept


def saved_config(where: str, data: str | None, tracking_uri: str | None) -> Config:
    """The config that --config refers to, for its own data or for others of the same shape.

    Args:
        where: value of --config.
        data: value of --data, or None for the data of the config.
        tracking_uri: value of --tracking-uri.

    Raises:
        InputError: it cannot be read.
    """
    saved = read_saved_config("--config", where, tracking_uri)
    config = saved.config
    if data is None:
        return config
    values: dict[str, Any] = {"data.name": resolve(data)}
    if saved.kind == "image" and saved.shape and Path(values["data.name"]).is_dir():
        values["data.image_size"] = saved.shape[-1]
    if config.metrics.features in ("classifier", "degradations"):
        values["metrics.features"] = "auto"  # which of the two the other data allow is found out anew
    return config.with_values(values)


def keep(kept: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values that the preset of the data does not replace, by dotted name.

    Args:
        kept: those of another config.
        given: those that the user gives, which come first. If there are any of the sampler, it is not chosen
            by measurement.
    """
    if any(name.startswith("sampler.") for name in given):
        kept = {name: value for name, value in kept.items() if name != "metrics.choose_sampler"}
    return {**kept, **given}
