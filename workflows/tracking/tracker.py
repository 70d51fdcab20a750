"""The interface to experiment trackers, `Tracker`, and the registry of its implementations.

Everything that trainings and sweeps log goes through a `Tracker`. MLflow is one implementation
(`mlflow_tracker`) and the default; another package can add others, see docs/extending.md.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from diffusion.data.dataset import Dataset
from diffusion.registry import Registry
from workflows.redaction import remember
from workflows.status import Status, TrialStatus
from workflows.tracking.local_database import store_uri

_DEFAULT = "mlflow"


class RegistrationError(RuntimeError):
    """The tracker did not register the model; the message is one line without passwords."""


@dataclass(frozen=True)
class Registration:
    """A model's entry in the model registry of a tracker.

    Attributes:
        version: number of the model's version.
        is_champion: whether the version got the alias `champion`.
    """

    version: int
    is_champion: bool


@dataclass(frozen=True)
class PublishedModel:
    """A published model as a tracker gets it.

    Attributes:
        sampler_file: path of its sampler.onnx, or of a folder with the files of a cascade, see
            `export.cascade.cascade_files`.
        params: its parameters by dotted name.
        metrics: its metrics, which have been logged.
    """

    sampler_file: Path
    params: Mapping[str, Any]
    metrics: Mapping[str, float]


class Tracker(Protocol):
    """Logs one run: a training, or a sweep with a child run per trial.

    Only the driver uses it, from one thread at a time. A lost connection must not disturb the training: only
    `resolve`, `check_store`, the constructor, `start`, `resume` and `resume_sweep` may raise InputError, and
    `register` RegistrationError; every other method returns quickly and raises nothing.

    Args:
        uri: URI of the store, as returned by `resolve`.
        experiment: name of the experiment, which is created if missing.

    Attributes:
        name: name of the tracker in messages, such as "MLflow".
        run_id: id of the run, empty before `start` or `resume`.
        unsent: number of entries that could not be sent; final after `close`.
        has_test_metrics: whether a resumed run already has its metrics on the test split.

    Raises:
        InputError: the store cannot be reached or used.
    """

    name: str
    run_id: str
    unsent: int
    has_test_metrics: bool

    def __init__(self, uri: str, experiment: str) -> None: ...

    @classmethod
    def resolve(cls, uri: str) -> str:
        """Return the URI that does not depend on the working directory, which differs in Ray's processes.

        Raises:
            InputError: the tracker cannot use such a URI.
        """
        ...

    @classmethod
    def check_store(cls, uri: str, *, may_create: bool) -> None:
        """Check within seconds that a store can be used.

        Args:
            uri: URI of the store, as returned by `resolve`.
            may_create: whether the check may create a store that does not exist yet.

        Raises:
            InputError: the store cannot be reached or used.
        """
        ...

    @property
    def location(self) -> str:
        """URI of the store, without passwords."""
        ...

    @property
    def refused(self) -> Sequence[str]:
        """Why the store refused entries for good, one line each. Optional: always empty."""
        return ()

    def location_hint(self) -> str:
        """Return where users find their runs: a command or a URL, without passwords."""
        ...

    def keep_entries(self, folder: Path) -> None:
        """Keep what is to be sent in a run's folder, so that it can be sent later. Optional: does nothing.

        Called before `start` or `resume`.
        """

    def start(
        self, name: str, params: dict[str, Any], folder: str | None = None, *, reuse: bool = False
    ) -> str:
        """Create the run and return its id.

        Args:
            name: name of the run.
            params: parameters by dotted name.
            folder: folder of the run.
            reuse: whether to continue an unfinished run with the same folder, if there is one. An earlier
                session may have been killed after it created the run, but before it wrote to the folder.
        """
        ...

    def resume(self, run_id: str) -> set[int]:
        """Continue an existing run, and return the steps for which it has metrics.

        Raises:
            InputError: the store has no such run.
        """
        ...

    def resume_sweep(self, run_id: str, trial_ids: Container[str]) -> set[str]:
        """Continue an existing sweep's run; delete the child runs of unknown trials and duplicates.

        Args:
            run_id: id of the sweep's run.
            trial_ids: ids of the trials that the sweep has recorded.

        Returns:
            Ids of the trials whose child runs have ended, and are therefore complete.

        Raises:
            InputError: the store has no such run.
        """
        ...

    def send_kept(self, run_id: str, *, to_other_store: bool = False) -> None:
        """Send what `keep_entries` has kept of a run, until `close`. Optional: does nothing.

        Args:
            run_id: id of the run.
            to_other_store: whether it may be sent to another store than the one in which it was started.

        Raises:
            InputError: the store cannot be used.
        """

    def start_trial(self, trial_id: str, params: dict[str, Any]) -> None:
        """Start the child run of a trial, or continue it if it exists."""
        ...

    def end_trial(self, trial_id: str, status: TrialStatus, reason: str) -> None:
        """End the child run of a trial, with its status and reason as in trials.csv."""
        ...

    def log(self, metrics: dict[str, float], step: int, trial_id: str | None = None) -> None:
        """Log metrics of the run or of a trial, unless an earlier session has logged those of this step."""
        ...

    def log_dataset(self, dataset: Dataset) -> None:
        """Log which data the run uses, and every trial that starts after this. Optional: does nothing."""

    def show_trials(
        self, searched: Sequence[str], num_updates: int, picks: Mapping[str, str] | None = None
    ) -> None:
        """Prepare the page on which users look at a sweep's trials, best first. Optional: does nothing.

        Called when a sweep starts or resumes, and again when its champion is chosen.

        Args:
            searched: names of the parameters that the sweep searches.
            num_updates: updates of a complete trial.
            picks: what trials were picked as, such as "champion", by trial ID, the best first; None while
                trials run.
        """

    def log_picture(self, picture: Image.Image, step: int, trial_id: str | None = None) -> None:
        """Log a picture of samples, of the run or of a trial."""
        ...

    def log_files(self, folder: Path, artifact_path: str) -> None:
        """Upload a folder, which must exist until `flush` or `close` returns."""
        ...

    def log_file(self, path: Path) -> None:
        """Upload a file, which must exist until `flush` or `close` returns."""
        ...

    def tag(self, tags: dict[str, str], trial_id: str | None = None) -> None:
        """Set tags of the run or of a trial, which may have ended."""
        ...

    def describe(self, markdown: str, trial_id: str | None = None) -> None:
        """Set the description of the run or of a trial, which may have ended."""
        ...

    def flush(self) -> None:
        """Wait until everything is sent, for at most about 30 seconds."""
        ...

    def log_model(self, model: PublishedModel) -> None:
        """Log the model that a training has made, without registering it. Optional: does nothing.

        Raises:
            RegistrationError: the store refused the model or cannot be reached.
        """

    def register(
        self, name: str, model: PublishedModel, tags: Mapping[str, object], *, may_promote: bool
    ) -> Registration | None:
        """Register sampler.onnx as a new version of a model.

        The version gets the alias `champion` if no version has it yet, or if its test distance is smaller and
        was measured in the same way on the same data.

        Args:
            name: name of the registered model.
            model: the model.
            tags: tags of the version: `test_distance`, and everything that two versions must have in common
                for their test distances to be comparable.
            may_promote: whether the version may get the alias at all.

        Returns:
            The registered version, or None if the tracker has no model registry.

        Raises:
            RegistrationError: the store refused the model or cannot be reached.
        """
        ...

    def close(self, status: Status | None) -> None:
        """End the run with this status; send what is left, and give up after about 30 seconds.

        Args:
            status: status of the run; None leaves it as it is in the tracker.
        """
        ...


TRACKERS: Registry[type[Tracker]] = Registry(
    "tracker", "ray_ddpm.trackers", {_DEFAULT: "workflows.tracking.mlflow_tracker:MlflowTracker"}
)
"""Trackers by the scheme of their URIs. Every URI with another scheme, or none, is MLflow's."""


def tracker_class(uri: str) -> type[Tracker]:
    """Return the tracker that uses a URI.

    Raises:
        InputError: the package with that tracker cannot be imported.
    """
    scheme, separator, _ = uri.partition("://")
    return TRACKERS[scheme if separator and scheme in TRACKERS else _DEFAULT]


def open_tracker(uri: str, experiment: str) -> Tracker:
    """Open the tracker that uses a URI.

    Args:
        uri: URI of the store, as returned by `resolve_tracking_uri`.
        experiment: name of the experiment, which is created if missing.

    Raises:
        InputError: the store cannot be reached or used.
    """
    return tracker_class(uri)(uri, experiment)


def resolve_tracking_uri(given: str | None) -> str:
    """Return the complete URI of the store to use.

    Args:
        given: value of --tracking-uri, or None for the one in the environment or the default.

    Raises:
        InputError: the tracker cannot use such a URI.
    """
    uri = store_uri(given)
    remember(uri)
    return tracker_class(uri).resolve(uri)
