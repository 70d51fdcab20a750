"""Runs a sweep's trials on Ray Tune.

`run_trials` sets up a Tuner: Optuna suggests parameters, `asha.SuccessiveHalving` stops trials that fall
behind, and Tune calls `trial.run_trial` (or a `trial.WorkersTrial`) with each suggestion. `SweepCallback`
receives Tune's events in the driver and passes them to the trial records, the tracker and the live table.
When a sweep is resumed, trials that did not finish run first, under the IDs they had before.
"""

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from PIL import Image
from ray import tune

from diffusion.training.loop import evaluation_points
from workflows.ray_runtime.placement_groups import remove_placement_groups
from workflows.ray_runtime.session import restored_signal_handlers
from workflows.status import OUT_OF_MEMORY, TrialStatus
from workflows.storage.storage import Storage, retry
from workflows.sweep.asha import make_scheduler
from workflows.sweep.searcher import Search, build_searcher, completed_trials
from workflows.sweep.table_view import SweepTable
from workflows.sweep.trial import TrialContext, WorkersTrial, run_trial
from workflows.sweep.trial_records import INTERRUPTED, TrialRecord, TrialRecords
from workflows.tracking.tracker import Tracker
from workflows.training.evaluation_files import PICTURE, UNTRAINED
from workflows.training.worker_group import MAX_RESTARTS, max_concurrent_groups, one_line

OUT_OF_TIME = "the time budget was used up"  # reason of a trial that it cut
_SECONDS_BETWEEN_CLEANUPS = 2.0
_SECONDS_BETWEEN_WORDS = 15.0  # while running trials are being ended
_HEAD_NODE = "node:__internal_head__"  # Ray adds one such resource to each head node


class SweepCallback(tune.Callback):
    """Passes Tune's events to the trial records, to the tracker and to the live table.

    Trials have IDs of their own: Tune gives a trial that runs again a new ID, the sweep does not.

    Args:
        records: records of the sweep's trials.
        tracker: tracker of the sweep.
        view: live table.
        flat_config: the sweep's parameters by dotted name, which each trial's own values override.
        num_updates: optimizer steps of a complete training.
        storage_retry_seconds: how long to try to read a trial's files if their storage does not answer.
    """

    def __init__(
        self,
        records: TrialRecords,
        tracker: Tracker,
        view: SweepTable,
        flat_config: Mapping[str, Any],
        num_updates: int,
        storage_retry_seconds: float = 0.0,
    ) -> None:
        self._records, self._tracker, self._view = records, tracker, view
        self._flat_config, self._num_updates = flat_config, num_updates
        self._storage_retry_seconds = storage_retry_seconds
        self._repeated: set[str] = set()  # trials whose last report is one that they had sent before
        self._trial_ids: dict[str, str] = {}  # by Tune's ID
        self._unfinished_params: dict[str, dict[str, Any]] = {}
        self._start_times: dict[str, float] = {}
        self._failed_tune_ids: set[str] = set()
        self._last_cleanup = 0.0
        self._announces_interrupt = False
        self._trials_over = threading.Event()

    def __reduce__(self) -> Any:
        """Pickle as an empty callback: Tune saves its callbacks, and open connections cannot be pickled."""
        return tune.Callback, ()

    def match_unfinished_trials(self) -> None:
        """From now on, give a trial with the parameters of an unfinished one that one's ID."""
        self._unfinished_params = {
            record.trial_id: record.params for record in self._records if record.unfinished
        }

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial started."""
        if trial.trial_id in self._trial_ids:
            return
        params = {**self._flat_config, **trial.config}
        trial_id = self._trial_ids[trial.trial_id] = self._assign_id(trial, params)
        self._start_times[trial_id] = time.monotonic()
        self._records.start(trial_id, params)
        self._tracker.start_trial(trial_id, params)
        self._view.add(trial_id, trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an evaluation, or why a trial cannot continue."""
        trial_id, updates = self._trial_ids[trial.trial_id], result["updates"]
        record = self._records[trial_id]
        record.status, record.reason = result["status"], result["reason"]
        if record.status != "running":
            return
        # A trial that goes on from a checkpoint repeats the evaluations after it, with the same results.
        if updates in record.evaluations:
            self._repeated.add(trial_id)
            return
        self._repeated.discard(trial_id)
        metrics = dict(result["metrics"])
        self._records.add_evaluation(trial_id, updates, metrics)
        self._tracker.log(metrics, updates, trial_id)
        self._view.update(trial_id, updates, record.objective, record.metrics)

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """Log pictures of a trial's samples, and copy them, and its model if no earlier one is better."""
        trial_id = self._trial_ids[trial.trial_id]
        record = self._records[trial_id]
        if record.status != "running" or trial_id in self._repeated:
            return  # the checkpoint of a pruned or diverged trial is empty
        retry(lambda: self._take_files(record, checkpoint), self._storage_retry_seconds)

    def _take_files(self, record: TrialRecord, checkpoint: Any) -> None:
        trial_id = record.trial_id
        with checkpoint.as_directory() as folder:  # downloads it if trials store checkpoints in a bucket
            self._records.save_files(trial_id, Path(folder))
            for name, step in ((UNTRAINED, 0), (PICTURE, record.updates)):
                if (Path(folder) / name).exists():
                    with Image.open(Path(folder) / name) as file:
                        self._tracker.log_picture(file.copy(), step, trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial ended by itself or was stopped early."""
        record = self._records[self._trial_ids[trial.trial_id]]
        if record.status == OUT_OF_MEMORY:
            return  # it runs again, with a GPU to itself
        status: TrialStatus = "finished" if record.updates >= self._num_updates else "stopped"
        self._end(record, status if record.status == "running" else record.status, record.reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial raised or that its process died.

        Raises:
            OSError: the storage cannot be written to, which would fail the next trials as well. The trial is
                left to run again.
        """
        self._failed_tune_ids.add(trial.trial_id)
        reason = failure_reason(trial)
        if error := storage_failure(reason):
            raise error
        self._end(self._records[self._trial_ids[trial.trial_id]], "failed", reason)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial goes on elsewhere."""
        trial_id = self._trial_ids[trial.trial_id]
        self._view.print(f"Trial {trial_id} lost its node or process ({failure_reason(trial)}); it goes on.")

    def setup(self, *_args: Any, **_info: Any) -> None:
        """Forget the handler of an earlier Tuner's Ctrl-C."""
        self._announces_interrupt = False
        self._trials_over.clear()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Say what Ctrl-C does when it is pressed first: Tune, whose handler is called, does not."""
        if self._announces_interrupt or threading.current_thread() is not threading.main_thread():
            return
        self._announces_interrupt = True
        handler = signal.getsignal(signal.SIGINT)

        def announce(number: int, frame: FrameType | None) -> None:
            self._view.print(
                "Ending the trials; then the best model so far is exported. Press Ctrl-C again to stop now."
            )
            threading.Thread(target=self._say_that_trials_are_ending, daemon=True).start()
            if callable(handler):
                handler(number, frame)

        signal.signal(signal.SIGINT, announce)

    def trials_over(self) -> None:
        """Say no more that trials are being ended."""
        self._trials_over.set()

    def _say_that_trials_are_ending(self) -> None:
        started = time.monotonic()
        while not self._trials_over.wait(_SECONDS_BETWEEN_WORDS):
            seconds = time.monotonic() - started
            self._view.print(f"Still ending the trials ({seconds:.0f} s). Press Ctrl-C again to stop now.")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Free what failed trials reserved, repeatedly: their workers may have been about to start.

        Bring trials.csv up to date, too, if that was put off when a trial ended.
        """
        self._records.refresh_csv()
        if self._failed_tune_ids and time.monotonic() > self._last_cleanup + _SECONDS_BETWEEN_CLEANUPS:
            remove_placement_groups(self._failed_tune_ids)
            self._last_cleanup = time.monotonic()

    def end_running_trials(self, reason: str) -> bool:
        """End all running trials: as "stopped" if they were evaluated, else as "failed".

        Args:
            reason: reason to record.

        Returns:
            Whether there were any.
        """
        running = [record for record in self._records if record.status == "running"]
        for record in running:
            if record.trial_id not in self._start_times:  # of an earlier session, and not started again
                self._tracker.start_trial(record.trial_id, record.params)
                self._view.add(record.trial_id, {})
            self._end(record, "stopped" if record.updates else "failed", reason)
        return bool(running)

    def _assign_id(self, trial: Any, params: Mapping[str, Any]) -> str:
        """ID of an unfinished trial with these parameters, or else a new one.

        A new ID is Tune's with a letter in front: Tune's may consist of digits alone, or of digits and an
        "e", and would pass for a number in trials.csv.
        """
        for trial_id, unfinished in self._unfinished_params.items():
            if all(unfinished[key] == params[key] for key in trial.config):
                del self._unfinished_params[trial_id]
                return trial_id
        trial_id = f"t{trial.trial_id}"
        while trial_id in self._records.ids:
            trial_id += "x"
        return trial_id

    def _end(self, record: TrialRecord, status: TrialStatus, reason: str) -> None:
        seconds = time.monotonic() - self._start_times.get(record.trial_id, time.monotonic())
        self._records.end(record.trial_id, status, reason, seconds)
        self._records.refresh_csv()
        self._tracker.end_trial(record.trial_id, status, reason)
        self._view.finish(record.trial_id, status, reason)


def run_trials(
    context: TrialContext,
    search: Search,
    records: TrialRecords,
    storage: Storage,
    callback: SweepCallback,
    *,
    verbose: bool,
) -> tuple[bool, dict[int, float]]:
    """Run the remaining trials, until all are done, the time is up or the user presses Ctrl-C.

    Args:
        context: what all trials share.
        search: search to run.
        records: records of the sweep's trials so far; unfinished ones run first.
        storage: storage that all machines can access; Tune's own files go to `tune` in it.
        callback: receives all of Tune's events.
        verbose: whether Tune and Optuna print their logs.

    Returns:
        Whether the sweep was interrupted, and the rank correlation between the objectives at each rung and
        the final ones, by the rung's updates.
    """
    if not verbose:
        for name in ("ray.tune", "ray.train"):  # the records hold why a trial failed
            logging.getLogger(name).setLevel(logging.CRITICAL)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    correlations = _run(context, search, records, storage, callback, verbose)
    if any(record.status == OUT_OF_MEMORY for record in records):
        whole_gpu = replace(context, resources=replace(context.resources, gpus_per_worker=1.0))
        correlations = _run(whole_gpu, search, records, storage, callback, verbose)
    within_budget = search.time_budget is None or records.elapsed < search.time_budget
    callback.end_running_trials(INTERRUPTED if within_budget else OUT_OF_TIME)
    return within_budget and len(completed_trials(records)) < search.num_trials, correlations


def remaining_seconds(search: Search, elapsed: float) -> float | None:
    """Seconds that are left for the trials, at least 1; None if time is unlimited.

    Args:
        search: the search.
        elapsed: seconds that all sessions of the sweep took so far.
    """
    return None if search.time_budget is None else max(search.time_budget - elapsed, 1.0)


def _run(
    context: TrialContext,
    search: Search,
    records: TrialRecords,
    storage: Storage,
    callback: SweepCallback,
    verbose: bool,
) -> dict[int, float]:
    config, completed = context.config, completed_trials(records)
    callback.match_unfinished_trials()
    scheduler = make_scheduler(search.early_stopping, evaluation_points(config.training))
    for record in completed:
        scheduler.observe(record.trial_id, record.evaluations)
    # With several workers, the trial's own process only drives them. It reserves no CPU, which might be the
    # one that its workers wait for, and it runs on the head node, which is never preempted.
    in_process = context.resources.num_workers == 1
    resources = {name.lower(): amount for name, amount in context.resources.per_worker.items()}
    trainable = tune.with_resources(
        tune.with_parameters(run_trial if in_process else WorkersTrial, context=context),
        resources if in_process else {_HEAD_NODE: 0.001},
    )
    path, files = storage.for_ray()
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=search.num_trials - len(completed),
            time_budget_s=remaining_seconds(search, records.elapsed),
            search_alg=build_searcher(search, records, config) if search.space else None,
            scheduler=scheduler,
            reuse_actors=in_process,
            max_concurrent_trials=None if in_process else max_concurrent_groups(context.resources),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=files,
            callbacks=[callback],
            verbose=1 if verbose else 0,
            # A function trainable decides by itself when to save a checkpoint; a class does not.
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=1,
                **({} if in_process else {"checkpoint_frequency": 1, "checkpoint_at_end": True}),
            ),
            # With several workers per trial the trial's own process is on the head node.
            failure_config=tune.FailureConfig(
                max_failures=MAX_RESTARTS if in_process and context.checkpoints else 0
            ),
        ),
    )
    try:
        with restored_signal_handlers():  # Tune leaves its own, which ignores the next Ctrl-C
            tuner.fit()
    except tune.TuneError as error:  # it has the text of what a callback raised
        if failure := storage_failure(one_line(error)):
            raise failure from error
        raise
    finally:
        callback.trials_over()
    return scheduler.rank_correlations()


def failure_reason(trial: Any) -> str:
    """Why a trial failed: the last line of the error file that Tune wrote for it."""
    try:
        lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
    except (OSError, TypeError):
        lines = []
    return lines[-1][:500] if lines else "the trial's process died"


def storage_failure(reason: str) -> OSError | None:
    """The error by which a trial failed if its storage is full or silent, as it is for all trials, else None.

    Args:
        reason: why it failed, see `failure_reason`.
    """
    found = re.match(
        r"(?:OSError|PermissionError|TimeoutError): (?:\[Errno (\d+)\] )?(.*?)(?:: '(.*)')?$", reason
    )
    if found is None:
        return None
    return OSError(int(found[1]), os.strerror(int(found[1])), found[3]) if found[1] else OSError(found[2])
