"""Finds and deletes what MLflow has of a run: the run, those of its trials, and its registered versions."""

from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from diffusion.errors import InputError
from workflows.redaction import redact
from workflows.tracking.mlflow_sender import runs_with_tag
from workflows.tracking.mlflow_store import open_store
from workflows.tracking.mlflow_tracker import MlflowTracker
from workflows.tracking.tracker import tracker_class


@dataclass(frozen=True, eq=False)
class MlflowRecords:
    """What an MLflow store has of a run.

    Attributes:
        uri: URI of the store.
        run_id: ID of the run.
        experiment_id: ID of its experiment.
        trials: IDs of the runs of its trials.
        versions: name, version and aliases of the models that it registered.
    """

    uri: str
    run_id: str
    experiment_id: str
    trials: tuple[str, ...]
    versions: tuple[tuple[str, str, tuple[str, ...]], ...]

    def description(self) -> str:
        """What it is, in one line, without passwords."""
        parts = [f"run {self.run_id}"]
        if self.trials:
            parts.append(f"the runs of {len(self.trials)} trials")
        for name, version, aliases in self.versions:
            alias = f" ({', '.join(aliases)})" if aliases else ""
            parts.append(f"{name} version {version}{alias}")
        return f"MLflow, {redact(self.uri)}: {', '.join(parts)}"

    def delete(self) -> None:
        """Delete all of it; MLflow keeps deleted runs and their files until `mlflow gc`.

        Raises:
            InputError: the store refuses.
        """
        client = open_store(self.uri)
        try:
            for name, version, aliases in self.versions:
                for alias in aliases:
                    client.delete_registered_model_alias(name, alias)
                client.delete_model_version(name, version)
                if not client.search_model_versions(f"name = '{name}'"):
                    client.delete_registered_model(name)
            models = client.search_logged_models(
                [self.experiment_id], filter_string=f"source_run_id = '{self.run_id}'"
            )
            for model in models:
                client.delete_logged_model(model.model_id)
            for run_id in (*self.trials, self.run_id):
                client.delete_run(run_id)
        except MlflowException as error:
            reason = redact(str(error).splitlines()[0])[:200]
            raise InputError(
                f"{redact(self.uri)} did not delete run {self.run_id} ({reason}); nothing else was deleted"
            ) from error


def find_records(uri: str, run_id: str) -> MlflowRecords | None:
    """What the store has of a run, or None if it has no such run, or is none of MLflow.

    Raises:
        InputError: the store cannot be reached.
    """
    if not issubclass(tracker_class(uri), MlflowTracker):
        return None
    client = open_store(uri)
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    if run.info.lifecycle_stage != "active":
        return None
    experiment_id = run.info.experiment_id
    trials = runs_with_tag(client, experiment_id, MLFLOW_PARENT_RUN_ID, run_id)
    ids = tuple(each.info.run_id for each in trials)
    return MlflowRecords(uri, run_id, experiment_id, ids, _versions(client, run_id))


def _versions(client: MlflowClient, run_id: str) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Models that a run registered: name, version and aliases."""
    return tuple(
        (each.name, str(each.version), tuple(client.get_model_version(each.name, each.version).aliases))
        for each in client.search_model_versions(f"run_id = '{run_id}'")
    )
