"""What a command line or a program asks for: options, and the run that they resume.

`parsing` makes a request from command-line arguments, `keyword_settings` from the settings of
`workflows.api`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from diffusion.data.sources import DataSource, open_source
from workflows.cli.run_options import RunOptions
from workflows.cli.tune_options import UNLIMITED
from workflows.storage.run_record import RunRecord, check_same_config

OptionsT = TypeVar("OptionsT", bound=RunOptions)


@dataclass(frozen=True, eq=False)
class RunRequest(Generic[OptionsT]):
    """Options of a run whose data have not been opened, so that errors in the options come first.

    Attributes:
        options: options in which the defaults that depend on the data are not filled in yet, unless a run
            is resumed.
        kept: values of another config or run that those defaults do not replace, by dotted name.
        given: values that the user gives, which nothing replaces, by dotted name.
        record: record of the run to resume, or None.
        source: data in memory, or None for those that the options name.
    """

    options: OptionsT
    kept: Mapping[str, Any]
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
        return source, self.options.with_preset(source, keep(self.kept, self.given))


def keep(kept: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values that the preset of the data does not replace, by dotted name.

    Args:
        kept: those of another config.
        given: those that the user gives, which come first. If there are any of the sampler, it is not chosen
            by measurement; a number of updates replaces one of epochs.
    """
    replaced = {"metrics.choose_sampler"} if any(name.startswith("sampler.") for name in given) else set()
    if "training.num_updates" in given:
        replaced.add("training.num_epochs")
    return {name: value for name, value in kept.items() if name not in replaced} | dict(given)
