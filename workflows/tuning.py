"""Ray Tune: the search, the early stopping, and what is done with each trial's reports."""

import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from PIL import Image
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from diffusion.training import evaluation_points
from workflows.console import SweepView
from workflows.group import groups_at_once
from workflows.places import free_place, open_places
from workflows.records import TrialRecord, TrialRecords
from workflows.search_space import is_range
from workflows.tracking import Tracker
from workflows.trial import TrialContext, WorkersTrial, run_trial

_REDUCTION_FACTOR = 2
_HEAD_NODE = "node:__internal_head__"  # which Ray gives every head node one of


class SweepCallback(tune.Callback):
    """Turns Tune's events into records, MLflow runs and the live table.

    Args:
        flat_config: the sweep's parameters under dotted names, before a trial's own are put in.
        num_updates: of a whole training.

    Attributes:
        places: where the workers of trials stand, see `workflows.places`; None where they have none.
    """

    def __init__(
        self,
        records: TrialRecords,
        tracker: Tracker,
        view: SweepView,
        flat_config: Mapping[str, Any],
        num_updates: int,
    ) -> None:
        self._records, self._tracker, self._view = records, tracker, view
        self._flat_config, self._num_updates = flat_config, num_updates
        self._started: dict[str, float] = {}
        self.places: Any = None

    def __reduce__(self) -> Any:
        """Tune pickles its callbacks with its own state; open connections stay here."""
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        if _id(trial) in self._started:
            return
        self._started[_id(trial)] = time.monotonic()
        params = {**self._flat_config, **trial.config}
        self._records.add(TrialRecord(_id(trial), params))
        self._tracker.start_trial(_id(trial), params)
        self._view.started(_id(trial), trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial was evaluated, or says why it cannot go on."""
        record = self._records[_id(trial)]
        record.status, record.reason = result["status"], result["reason"]
        if record.status != "running":
            return
        record.updates, record.objective, record.metrics = (
            result["updates"],
            result["objective"],
            result["metrics"],
        )
        figures = {**record.metrics, "objective": record.objective}
        self._tracker.log(figures, record.updates, _id(trial))
        self._view.progressed(_id(trial), record.updates, record.objective, record.metrics)

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """A trial's model and picture are on disk."""
        if self._records[_id(trial)].status != "running":
            return  # one that was pruned or diverged has none
        self._records.keep_files(_id(trial), Path(checkpoint.path))
        with Image.open(self._records.folder(_id(trial)) / "samples.png") as file:
            picture = file.copy()
        self._tracker.log_picture(picture, self._records[_id(trial)].updates, _id(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself or was stopped early."""
        record = self._records[_id(trial)]
        if record.status == "running":
            record.status = "finished" if record.updates >= self._num_updates else "stopped"
        self._end(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial raised or its process died."""
        record = self._records[_id(trial)]
        record.status = "failed"
        record.reason = _why_it_failed(trial)
        if self.places is not None:
            free_place(self.places, trial.trial_id)
        self._end(record)

    def end_interrupted(self) -> bool:
        """Close what still ran when the sweep was interrupted, and say whether anything did.

        What was evaluated counts as stopped.
        """
        interrupted = False
        for record in self._records:
            if record.status == "running":
                interrupted = True
                record.status = "stopped" if record.updates else "failed"
                record.reason = "the sweep was interrupted"
                self._end(record)
        return interrupted

    def _end(self, record: TrialRecord) -> None:
        record.seconds = time.monotonic() - self._started[record.trial_id]
        self._records.write_csv()
        self._tracker.end_trial(record.trial_id, record.status, record.reason)
        self._view.ended(record.trial_id, record.status, record.reason)


def run_trials(
    context: TrialContext,
    searched: Mapping[str, tuple[Any, ...]],
    directory: Path,
    callback: SweepCallback,
    *,
    num_trials: int,
    seed: int,
    verbose: bool,
) -> bool:
    """Run the sweep's trials to their end, or until Ctrl-C; the callback sees everything.

    Args:
        context: what the trials share.
        searched: dotted names with choices, or the two ends of a range.
        directory: the sweep's folder; Tune's own files go to `tune` in it.
        callback: receives every event.
        num_trials: trials to run, pruned ones included.
        seed: of the search.
        verbose: let Tune print.

    Returns:
        Whether the sweep was interrupted.
    """
    if not verbose:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's reason is shown and kept
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    # With several workers the trial is only their driver: were it to hold a processor, it could take the
    # one that its own workers wait for. It stands on the head node, which is not pre-empted.
    in_process = context.layout.num_workers == 1
    resources = {name.lower(): amount for name, amount in context.layout.resources.items()}
    if not in_process:
        callback.places = open_places()
        context = replace(context, places=callback.places)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial if in_process else WorkersTrial, context=context),
        resources if in_process else {_HEAD_NODE: 0.001},
    )
    config = context.config
    tuner = tune.Tuner(
        trainable,
        param_space={name: _domain(name, values) for name, values in searched.items()},
        tune_config=tune.TuneConfig(
            num_samples=num_trials,
            search_alg=_search(config.flat(), searched, seed),
            scheduler=_scheduler(evaluation_points(config.training)),
            metric=None if searched else "objective",
            mode=None if searched else "min",
            reuse_actors=in_process,
            max_concurrent_trials=None if in_process else groups_at_once(context.layout),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(directory),
            callbacks=[callback],
            verbose=1 if verbose else 0,
            # Functions say themselves when there is something to keep.
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=1,
                **({} if in_process else {"checkpoint_frequency": 1, "checkpoint_at_end": True}),
            ),
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    tuner.fit()
    return callback.end_interrupted()


def _domain(name: str, values: tuple[Any, ...]) -> Any:
    return tune.loguniform(*values) if is_range(name) else tune.choice(list(values))


def _search(
    flat: Mapping[str, Any], searched: Mapping[str, tuple[Any, ...]], seed: int
) -> OptunaSearch | None:
    if not searched:
        return None
    # The config's own values make the first trial where the space holds them all.
    start = {name: flat[name] for name in searched}
    inside = all(
        values[0] <= start[name] <= values[-1] if is_range(name) else start[name] in values
        for name, values in searched.items()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna calls its multivariate option experimental
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    return OptunaSearch(
        metric="objective", mode="min", sampler=sampler, points_to_evaluate=[start] if inside else None
    )


def _scheduler(points: list[int]) -> TrialScheduler:
    if len(points) == 1:
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="updates",
        metric="objective",
        mode="min",
        max_t=points[-1],
        grace_period=points[0],
        reduction_factor=_REDUCTION_FACTOR,
    )


def _id(trial: Any) -> str:
    """Tune's id behind a letter: eight digits, or digits and an e, would pass for a number in a table."""
    return f"t{trial.trial_id}"


def _why_it_failed(trial: Any) -> str:
    """The last line of the error that Tune wrote down for a trial."""
    try:
        lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
    except (OSError, TypeError):
        lines = []
    return lines[-1][:500] if lines else "the trial's process died"
