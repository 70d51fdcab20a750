"""Ray Tune: the search, the early stopping, and what is done with each trial's reports."""

import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler, TPESampler
from PIL import Image
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from diffusion.training import evaluation_points
from workflows.console import SweepView
from workflows.group import groups_at_once
from workflows.halving import SuccessiveHalving
from workflows.places import end_cleaners, free_places
from workflows.records import INTERRUPTED, OUT_OF_MEMORY, TrialRecord, TrialRecords
from workflows.search_space import is_range
from workflows.storage import Storage
from workflows.tracking import Tracker
from workflows.trial import TrialContext, WorkersTrial, run_trial

_SECONDS_BETWEEN_LOOKS = 2.0
_HEAD_NODE = "node:__internal_head__"  # which Ray gives every head node one of


class SweepCallback(tune.Callback):
    """Turns Tune's events into records, MLflow runs and the live table.

    Args:
        flat_config: the sweep's parameters under dotted names, before a trial's own are put in.
        num_updates: of a whole training.
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
        self._names: dict[str, str] = {}
        self._waiting: dict[str, dict[str, Any]] = {}
        self._started: dict[str, float] = {}
        self._killed: set[str] = set()
        self._looked_at = 0.0

    def __reduce__(self) -> Any:
        """Tune pickles its callbacks with its own state; open connections stay here."""
        return tune.Callback, ()

    def expect_unfinished(self) -> None:
        """From now on trials with the parameters of one that did not come to its end are that one."""
        self._waiting = {record.trial_id: record.params for record in self._records if record.unfinished}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        if trial.trial_id in self._names:
            return
        params = {**self._flat_config, **trial.config}
        name = self._names[trial.trial_id] = self._name(trial, params)
        self._started[name] = time.monotonic()
        self._records.begin(name, params)
        self._tracker.start_trial(name, params)
        self._view.started(name, trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial was evaluated, or says why it cannot go on."""
        name, updates = self._names[trial.trial_id], result["updates"]
        record = self._records[name]
        record.status, record.reason = result["status"], result["reason"]
        if record.status != "running":
            return
        self._records.evaluated(name, updates, result["metrics"])
        self._tracker.log(result["metrics"], updates, name)
        self._view.progressed(name, updates, record.objective, record.metrics)

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """A trial's model and picture are on disk."""
        name = self._names[trial.trial_id]
        if self._records[name].status != "running":
            return  # one that was pruned or diverged has none
        with checkpoint.as_directory() as folder:  # fetched, where trials leave it in a bucket
            self._records.keep_files(name, Path(folder))
        with Image.open(self._records.folder(name) / "samples.png") as file:
            picture = file.copy()
        self._tracker.log_picture(picture, self._records[name].updates, name)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself or was stopped early."""
        record, status = self._records[self._names[trial.trial_id]], "stopped"
        if record.status == OUT_OF_MEMORY:
            return  # it is run again, alone
        if record.updates >= self._num_updates:
            status = "finished"
        self._end(record, status if record.status == "running" else record.status, record.reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial raised or its process died."""
        self._killed.add(trial.trial_id)
        self._end(self._records[self._names[trial.trial_id]], "failed", _why_it_failed(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Again and again: workers of a trial that was killed may have been about to take their place."""
        if self._killed and time.monotonic() > self._looked_at + _SECONDS_BETWEEN_LOOKS:
            free_places(self._killed)
            end_cleaners()
            self._looked_at = time.monotonic()

    def end_running(self, reason: str) -> bool:
        """Close what still runs, for a reason, and say whether anything did.

        What was evaluated counts as stopped.
        """
        running = [record for record in self._records if record.status == "running"]
        for record in running:
            if record.trial_id not in self._started:  # it was cut off before, and not run again
                self._tracker.start_trial(record.trial_id, record.params)
                self._view.started(record.trial_id, {})
            self._end(record, "stopped" if record.updates else "failed", reason)
        return bool(running)

    def _name(self, trial: Any, params: Mapping[str, Any]) -> str:
        """Of a trial that did not come to its end before and has these parameters, or else a new one.

        Tune's id behind a letter: eight digits, or digits and an e, would pass for a number in a table.
        """
        for name, waiting in self._waiting.items():
            if all(waiting[key] == params[key] for key in trial.config):
                del self._waiting[name]
                return name
        name = f"t{trial.trial_id}"
        while name in self._records.ids:
            name += "x"
        return name

    def _end(self, record: TrialRecord, status: str, reason: str) -> None:
        seconds = time.monotonic() - self._started.get(record.trial_id, time.monotonic())
        self._records.end(record.trial_id, status, reason, seconds)
        self._records.write_csv()
        self._tracker.end_trial(record.trial_id, status, reason)
        self._view.ended(record.trial_id, status, reason)


@dataclass(frozen=True)
class Search:
    """What is searched, how, and for how long.

    Attributes:
        searched: dotted names with choices, or the two ends of a range.
        algorithm: tpe or random.
        seed: of the search.
        num_trials: trials to run in all, pruned ones included.
        seconds: after which trials that run are stopped, or None.
        first: points that are tried first.
    """

    searched: Mapping[str, tuple[Any, ...]]
    algorithm: str
    seed: int
    num_trials: int
    seconds: float | None = None
    first: Sequence[Mapping[str, Any]] = ()


def run_trials(
    context: TrialContext,
    search: Search,
    records: TrialRecords,
    exchange: Storage,
    callback: SweepCallback,
    *,
    verbose: bool,
) -> tuple[bool, dict[int, float]]:
    """Run the trials that are still to be run, to their end or until Ctrl-C; the callback sees everything.

    Args:
        context: what the trials share.
        search: what is searched.
        records: of this sweep's trials so far; those without an end are run first.
        exchange: what all trials' machines see; Tune's own files go to `tune` in it.
        callback: receives every event.
        verbose: let Tune print.

    Returns:
        Whether the sweep was interrupted, and how well the rungs foretold the end, by updates.
    """
    if not verbose:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's reason is shown and kept
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    correlations = _run(context, search, records, exchange, callback, verbose)
    if any(record.status == OUT_OF_MEMORY for record in records):
        alone = replace(context, layout=replace(context.layout, gpus_per_worker=1.0))
        correlations = _run(alone, search, records, exchange, callback, verbose)
    in_time = search.seconds is None or records.elapsed < search.seconds
    callback.end_running(INTERRUPTED if in_time else "the time was over")
    return in_time and len(_over(records)) < search.num_trials, correlations


def _run(
    context: TrialContext,
    search: Search,
    records: TrialRecords,
    exchange: Storage,
    callback: SweepCallback,
    verbose: bool,
) -> dict[int, float]:
    config, over = context.config, _over(records)
    callback.expect_unfinished()
    scheduler = SuccessiveHalving(evaluation_points(config.training))
    for record in over:
        scheduler.observe(record.trial_id, record.evaluations)
    # With several workers the trial is only their driver: were it to hold a processor, it could take the
    # one that its own workers wait for. It stands on the head node, which is not pre-empted.
    in_process = context.layout.num_workers == 1
    resources = {name.lower(): amount for name, amount in context.layout.resources.items()}
    trainable = tune.with_resources(
        tune.with_parameters(run_trial if in_process else WorkersTrial, context=context),
        resources if in_process else {_HEAD_NODE: 0.001},
    )
    path, files = exchange.for_ray()
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=search.num_trials - len(over),
            time_budget_s=None if search.seconds is None else max(search.seconds - records.elapsed, 1.0),
            search_alg=_searcher(search, records) if search.searched else None,
            scheduler=scheduler,
            reuse_actors=in_process,
            max_concurrent_trials=None if in_process else groups_at_once(context.layout),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=files,
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
    return scheduler.rank_correlations()


def _over(records: TrialRecords) -> list[TrialRecord]:
    return [record for record in records if not record.unfinished]


def _searcher(search: Search, records: TrialRecords) -> OptunaSearch:
    """Optuna's search, which knows what earlier sessions found."""
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(*values, log=True) if is_range(name) else CategoricalDistribution(values)
        for name, values in search.searched.items()
    }
    # Another seed each session, or its first draws would be those of the one before.
    seed = (search.seed + len(records)) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna calls its multivariate option experimental
        sampler = (
            RandomSampler(seed) if search.algorithm == "random" else TPESampler(seed=seed, multivariate=True)
        )

    def point(record: TrialRecord) -> dict[str, Any]:
        return {name: record.params[name] for name in search.searched}

    waiting = [point(record) for record in records if record.unfinished]
    searcher = OptunaSearch(
        space,
        metric="objective",
        mode="min",
        sampler=sampler,
        points_to_evaluate=waiting or ([] if len(records) else [dict(each) for each in search.first]),
    )
    for record in records:
        if not record.unfinished:
            usable = math.isfinite(record.objective) and record.status in ("finished", "stopped")
            searcher.add_evaluated_point(point(record), record.objective, error=not usable)
    return searcher


def _why_it_failed(trial: Any) -> str:
    """The last line of the error that Tune wrote down for a trial."""
    try:
        lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
    except (OSError, TypeError):
        lines = []
    return lines[-1][:500] if lines else "the trial's process died"
