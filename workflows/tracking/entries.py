"""What a run sends to its tracking store: a dataclass for each kind of entry.

Their names and fields are those of the lines that runs have on disk (`workflows.tracking.outbox`). In all of
them `trial_id` is the ID of a trial, or None for the run itself; `time` is in milliseconds since 1970; paths
are absolute, or relative to the run's folder.
"""

from dataclasses import dataclass
from typing import Any

from workflows.status import Status, TrialStatus
from workflows.storage.tagged_records import TaggedRecords


@dataclass(frozen=True)
class Start:
    """The run starts.

    Attributes:
        name: its name.
        params: its parameters by dotted name.
        folder: folder of the run, if it has one.
        time: when it started.
        reuse: whether to continue an unfinished run with the same folder, if there is one.
        store: where it was started first; empty before that.
    """

    name: str
    params: dict[str, str]
    folder: str | None
    time: int
    reuse: bool = False
    store: str = ""


@dataclass(frozen=True)
class End:
    """The run ends, with a status."""

    status: Status
    time: int


@dataclass(frozen=True)
class StartTrial:
    """A trial starts, with the parameters in which it differs from the run."""

    trial_id: str
    params: dict[str, str]
    time: int


@dataclass(frozen=True)
class EndTrial:
    """A trial ends, with a status and, unless it finished, a reason."""

    trial_id: str
    status: TrialStatus
    reason: str
    time: int


@dataclass(frozen=True)
class Metrics:
    """Metrics of a step, of those that have a chart."""

    trial_id: str | None
    metrics: dict[str, float]
    step: int
    time: int


@dataclass(frozen=True)
class Table:
    """Newest values of metrics, with those that have no chart, for the run's table."""

    trial_id: str | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Data:
    """The data of the run and of trials that start later, see `workflows.tracking.dataset_input`."""

    dataset: dict[str, str]
    context: str


@dataclass(frozen=True)
class View:
    """The prepared view of a sweep's trials, see `workflows.tracking.prepared_view`.

    Attributes:
        searched: dotted names of the searched parameters.
        num_updates: number of updates of a trial that finishes.
        decided: whether the champion is known.
        time: when the view was made.
    """

    searched: list[str]
    num_updates: int
    decided: bool
    time: int


@dataclass(frozen=True)
class Picks:
    """Why trials stand out, by trial ID, such as "champion"."""

    picks: dict[str, str]


@dataclass(frozen=True)
class Picture:
    """A picture of samples at a step, a PNG file."""

    trial_id: str | None
    file: str
    step: int
    time: int


@dataclass(frozen=True)
class Tags:
    """Tags by name."""

    trial_id: str | None
    tags: dict[str, str]


@dataclass(frozen=True)
class Folder:
    """A folder whose files are uploaded."""

    folder: str
    artifact_path: str


@dataclass(frozen=True)
class File:
    """A file that is uploaded."""

    file: str


@dataclass(frozen=True)
class Model:
    """A model of the run: its sampler.onnx, its parameters and its metrics."""

    file: str
    params: dict[str, str]
    metrics: dict[str, float]


@dataclass(frozen=True)
class RegisteredModel:
    """A new version of a registered model, see `workflows.tracking.registry.register`."""

    name: str
    file: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, Any]
    may_promote: bool


@dataclass(frozen=True)
class ModelMetrics:
    """The run's newest model has these metrics, which the run has been sent before."""

    metrics: dict[str, float]


Entry = (
    Start
    | End
    | StartTrial
    | EndTrial
    | Metrics
    | Table
    | Data
    | View
    | Picks
    | Picture
    | Tags
    | Folder
    | File
    | Model
    | RegisteredModel
    | ModelMetrics
)

ENTRIES = TaggedRecords[Entry](
    "kind",
    {
        "start": Start,
        "end": End,
        "start_trial": StartTrial,
        "end_trial": EndTrial,
        "metrics": Metrics,
        "table": Table,
        "dataset": Data,
        "view": View,
        "picks": Picks,
        "picture": Picture,
        "tags": Tags,
        "files": Folder,
        "file": File,
        "model": Model,
        "registered_model": RegisteredModel,
        "model_metrics": ModelMetrics,
    },
)
