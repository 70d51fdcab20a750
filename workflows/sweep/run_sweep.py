"""Entry point of a sweep: runs the trials, selects and publishes the champion, prints a summary.

`run_sweep` checks the options, loads the data and opens the sweep's folder and tracker (`SweepLogger`). It
then runs the trials on Ray Tune (`tuner.run_trials`), each of which trains one config (`trial`) and is stored
in the `TrialRecords`. `choose_champion` chooses one of the best trials, and `publish_champion` exports it;
`record_decision` records why it was chosen, and `write_report` writes report.html. Finally the champion is
uploaded to the tracker and registered there.
"""

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from diffusion.config import Config
from diffusion.data.sources import DataSource
from diffusion.devices import default_device
from diffusion.files import os_reason
from diffusion.metrics import (
    AUC,
    BEST_OBJECTIVE,
    DISTANCE,
    FEATURES_ACCURACY,
    RANK,
    RUNG_SPEARMAN,
    SAMPLE_PREFIX,
    STANDARD_ERROR,
    VAL_ELBO_WINDOW,
    VAL_MSE,
    VAL_SAMPLE_PREFIX,
    Objective,
)
from diffusion.registry import OBJECTIVES
from diffusion.training.train_step import check_precision
from export.to_onnx import ParityError
from workflows.cli.process import on_interrupt
from workflows.cli.search_space import contains, format_values, start_values
from workflows.cli.tune_options import UNLIMITED, TuneOptions
from workflows.data.load import LoadedData, check_fits, load_or_stream, no_notice, prepare_data
from workflows.environment import ray_address
from workflows.publishing.deployed_sampler import sampler_curves
from workflows.publishing.provenance import provenance
from workflows.publishing.registration import register_model, upload_model
from workflows.publishing.summary import file_lines, next_lines, quality_lines, schedule_lines
from workflows.ray_runtime.session import start_ray, stop_ray
from workflows.status import Outcome, Status
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import is_storage_error
from workflows.sweep.champion import Champion, choose_champion, publish_champion
from workflows.sweep.decision import TRAINING_SEED_ERRORS
from workflows.sweep.final_training import FinalTraining
from workflows.sweep.report.write_report import REPORT, write_report
from workflows.sweep.searcher import Search
from workflows.sweep.sweep_logger import FINAL_CHECKPOINTS, RUNNING_TRIALS, TEMPORARY, SweepLogger
from workflows.sweep.trial import TrialContext
from workflows.sweep.trial_records import TrialRecords
from workflows.sweep.tuner import SweepCallback, remaining_seconds, run_trials
from workflows.terminal import display_path, waiting
from workflows.tracking.tracker import Tracker, resolve_tracking_uri, tracker_class
from workflows.training.dry_run import describe_sweep, run_lines
from workflows.training.worker_group import WorkerResources, max_concurrent_groups, plan_workers


def run_sweep(options: TuneOptions, source: DataSource, record: RunRecord | None) -> Outcome:
    """Run or resume a sweep.

    Args:
        options: options from the command line.
        source: the opened data.
        record: record of the sweep to resume, or None to start a new one.

    Raises:
        InputError: the tracking store or the data cannot be used, the network does not fit the data, or the
            options differ from those of the sweep to resume.
    """
    try:
        with on_interrupt("Interrupted before the first trial: nothing was written."):
            plan = _plan(options, source)
            if options.dry_run:
                _describe(plan, options)
                return Outcome("finished")
            searched = plan.search.space
            fixed_params = {name: value for name, value in plan.config.flat().items() if name not in searched}
            params = fixed_params | {f"search.{name}": values for name, values in searched.items()}
            with waiting("opening the sweep's folder and MLflow", quiet=not options.progress):
                log = SweepLogger.open(options, plan.base_config, plan.data.dataset, record, plan.uri, params)
        return _sweep(log, options, plan)
    finally:
        stop_ray()


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a sweep is going to run.

    Attributes:
        uri: URI of the tracker's store.
        base_config: config of the sweep, without the values that the search fixes.
        config: config into which each trial puts the values that it tries.
        data: the loaded data.
        search: the search.
        resources: workers of each trial.
    """

    uri: str
    base_config: Config
    config: Config
    data: LoadedData
    search: Search
    resources: WorkerResources


def _plan(options: TuneOptions, source: DataSource) -> _Plan:
    """Check the options, load the data and start Ray; nothing is written.

    Raises:
        InputError: see `run_sweep`.
    """
    uri = resolve_tracking_uri(options.tracking_uri)
    quiet = not options.progress
    if not options.dry_run:
        with waiting("looking for MLflow", quiet=quiet):  # fail early: loading the data can take long
            tracker_class(uri).check_store(uri, may_create=True)
    with waiting(f"reading {options.data}", quiet=quiet):
        dataset = load_or_stream(source, start_ray=partial(start_ray, options.verbose))
    fixed, searched = options.search.fixed_and_searched(options.config(), dataset.spec.kind)
    check_fits(options.config().with_values(fixed), dataset)
    with waiting("preparing the data", quiet=quiet):
        notify = no_notice if quiet else print
        base_config, data = prepare_data(options.config(), dataset, notify=notify)
    config = base_config.with_values(fixed)
    search = make_search(options, config, searched)
    start_ray(options.verbose)
    resources = _plan_resources(options)
    if not resources.uses_gpus:
        check_precision(config.training, default_device(use_cuda=False, num_workers=resources.num_workers))
    if options.final_epochs is not None:
        plan_workers(options.final_workers, "--final-workers")  # fail now rather than after hours of trials
    return _Plan(uri, base_config, config, data, search, resources)


def _describe(plan: _Plan, options: TuneOptions) -> None:
    with waiting("measuring a few steps"):
        describe_sweep(
            plan.config,
            plan.data,
            plan.resources,
            plan.search.space,
            options.num_trials,
            max_concurrent_groups(plan.resources),
            plan.search.time_budget,
        )


def _sweep(log: SweepLogger, options: TuneOptions, plan: _Plan) -> Outcome:
    records, tracker, view = log.records, log.tracker, log.view
    search, config, data, resources = plan.search, plan.config, plan.data, plan.resources
    status: Status = "failed"
    try:
        view.print(f"Sweep {log.directory.name} in {display_path(log.folder)}: {_budget(options)}")
        space = (f"{name} {format_values(values)}" for name, values in search.space.items())
        for line in (*run_lines(config, data.dataset, resources), f"search    {', '.join(space)}"):
            view.print(f"  {line}")
        objective: Objective = OBJECTIVES[config.metrics.objective]
        if objective.warning is not None:
            view.print(objective.warning)
        tracker.show_trials(list(search.space), config.training.num_updates)
        if not any(name.startswith("schedule.") for name in search.space):
            for line in schedule_lines(config, data.dataset.spec):
                view.print(line.strip())
        if data.features is not None and data.features.accuracy is not None:
            tracker.log({FEATURES_ACCURACY: data.features.accuracy}, 0)
        for record in records:
            if not record.unfinished:
                view.restore(record, search.space)
        origin = provenance(tracker.run_id, data.dataset)
        shared_data = data if resources.num_workers == 1 else ray.put(data)
        view.limit_time(search.time_budget and remaining_seconds(search, records.elapsed))
        with view:
            interrupted, correlations = run_trials(
                TrialContext(
                    config,
                    shared_data,
                    resources,
                    origin,
                    log.shared.child(RUNNING_TRIALS) if ray_address() else None,
                    60.0 * options.storage_retry_minutes,
                ),
                search,
                records,
                log.shared,
                SweepCallback(
                    records,
                    tracker,
                    view,
                    config.flat(),
                    config.training.num_updates,
                    60.0 * options.storage_retry_minutes,
                ),
                verbose=options.verbose,
            )
        view.step("choosing the finalists")
        stop_ray()
        for line in records.leave_out_damaged():
            view.print(f"warning: {line}")
        records.add_paired_errors()
        records.write_csv()
        tracker.log({f"{RUNG_SPEARMAN}{rung}": value for rung, value in correlations.items()}, 0)
        if interrupted:
            planned = f" of {options.num_trials}" if options.num_trials < UNLIMITED else ""
            view.print(
                f"Interrupted after {len(records)}{planned} trials; selecting the champion among those."
            )
        finalists = records.finalists(
            training_seed_error(options, config.metrics.objective, data.dataset.spec.kind)
        )
        if not finalists:
            status = "stopped" if interrupted else "failed"
            reason = f"no trial produced a usable model; see the reasons in {log.folder}/trials.csv"
            view.print(f"{reason[0].upper()}{reason[1:]}.")
            return Outcome(status, str(log.folder), reason=reason)
        device = default_device(use_cuda=resources.uses_gpus)  # the trials have ended, so it is free
        champion = _select_champion(log, options, config, data, origin, finalists, search.space, device)
        view.step("writing the report")
        _write_report(log, champion, search.space, correlations, interrupted=interrupted)
        view.step(f"sending the champion to {tracker.name}")
        for line in _publish(log, champion, data, interrupted=interrupted):
            view.print(line)
        status = "stopped" if interrupted else "finished"
    except ParityError as error:
        view.print(f"error: {error}")
        return Outcome(status, str(log.folder), reason=str(error))
    except OSError as error:
        if not is_storage_error(error):
            raise
        reason = (
            f"{error.filename or log.folder} cannot be used ({os_reason(error)}): free space there or fix "
            "that location"
        )
        view.print(f"error: {reason}")
        return Outcome(status, str(log.folder), reason=reason)
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        try:
            log.end_running_trials()
            stop_ray()
        finally:  # also after one more Ctrl-C
            log.close(status)
    return Outcome(status, str(log.folder), has_model=True)


def _budget(options: TuneOptions) -> str:
    parts = [f"{options.num_trials} trials"] if options.num_trials < UNLIMITED else []
    return ", ".join([*parts, *([f"at most {options.time_budget}"] if options.time_budget else [])])


def _select_champion(
    log: SweepLogger,
    options: TuneOptions,
    config: Config,
    data: LoadedData,
    origin: dict[str, Any],
    finalists: Mapping[str, Path],
    searched: Collection[str],
    device: torch.device,
) -> Champion:
    """Select the champion, write it to `champion/`, and record why it was chosen."""
    records = log.records
    by_mse = records.picked_by_mse()
    choice = choose_champion(
        finalists,
        data,
        origin,
        log.view.step,
        _final_training(options, log),
        seed_error=training_seed_error(options, config.metrics.objective, data.dataset.spec.kind),
        also_measured=records.model_folders({by_mse} - set(finalists)),
        device=device,
    )
    directory = log.directory / "champion"
    champion = publish_champion(choice, data, directory, origin, log.view.step, by_mse, device)
    record_decision(champion, records, log.tracker)
    picks = trial_picks(champion.trial_id, by_mse)
    log.tracker.show_trials(list(searched), config.training.num_updates, picks)
    records.write_csv()
    return champion


def _write_report(
    log: SweepLogger,
    champion: Champion,
    searched: Mapping[str, tuple[Any, ...]],
    correlations: dict[int, float],
    *,
    interrupted: bool,
) -> None:
    """Write report.html; without it the champion must still be registered, so nothing is raised."""
    hint = log.tracker.location_hint()
    try:
        write_report(
            log.directory,
            log.records,
            dict(searched),
            champion,
            correlations,
            interrupted=interrupted,
            location_hint=hint,
            bucket=None if log.folder.is_local else str(log.folder),
        )
    except Exception as error:
        log.view.print(f"warning: {REPORT} could not be written ({type(error).__name__}: {os_reason(error)})")


def _publish(log: SweepLogger, champion: Champion, data: LoadedData, *, interrupted: bool) -> list[str]:
    """Upload the champion and the report, register the model, and return the summary's lines."""
    records, tracker = log.records, log.tracker
    tracker.log(champion.metrics, 0)
    for evaluations, metrics in sampler_curves(champion.samplers).items():
        tracker.log(metrics, evaluations)
    upload_model(tracker, champion.directory, "champion")
    if (log.directory / REPORT).exists():
        tracker.log_file(log.directory / REPORT)
    registered = register_model(
        tracker,
        f"ray-ddpm-{log.experiment}",
        champion.directory,
        records[champion.trial_id].params,
        {BEST_OBJECTIVE: champion.objective, **champion.metrics},
        champion.data_fingerprint,
        data.features.name if data.features else "none",
        interrupted=interrupted,
    )
    # Tune's checkpoints are no longer needed: trials/ contains a copy of each trial's newest model.
    for folder in TEMPORARY:
        with suppress(OSError):  # best-effort cleanup
            log.shared.delete(folder)
    config = Config().with_values(records[champion.trial_id].params)
    warnings = schedule_lines(config, data.dataset.spec)
    return _summary(champion, log, registered, warnings)


def make_search(options: TuneOptions, config: Config, searched: dict[str, tuple[Any, ...]]) -> Search:
    """The search that the options ask for.

    Args:
        options: options from the command line.
        config: the sweep's config.
        searched: choices, or ends of a range, by dotted name.
    """
    return Search(
        searched,
        options.search.algorithm,
        options.seed,
        options.num_trials,
        options.budget_seconds(),
        _initial_points(options, config, searched),
        options.early_stopping,
    )


def training_seed_error(options: TuneOptions, objective: str, kind: str) -> float:
    """Standard deviation of the objective over training seeds: as given, or as measured for the ELBO."""
    if options.training_seed_error is not None:
        return options.training_seed_error
    return TRAINING_SEED_ERRORS[kind] if objective == VAL_ELBO_WINDOW else 0.0


def record_decision(champion: Champion, records: TrialRecords, tracker: Tracker) -> None:
    """Add to the trials' records, and to the tracker, how the champion was chosen.

    Trials with a usable model get a rank. Finalists get `val/sample_distance` and `val/sample_auc` with their
    standard errors, and why each is the champion or is not. The sweep's own run gets the champion's metrics.
    """
    decision, reasons = champion.decision, " ".join(f"{reason}." for reason in champion.reasons)
    sentences = dict(zip(decision.ranking[1:], decision.sentences(), strict=False))
    others = [record.trial_id for record in records.ranked() if record.trial_id not in decision.ranking]
    for rank, trial_id in enumerate([*decision.ranking, *others], start=1):
        record = records[trial_id]
        record.rank = rank
        if trial_id == champion.trial_id:
            record.decision = f"champion: {reasons}"
        elif rank == 1:
            record.decision = "the best, but it cannot be exported"
        elif trial_id in sentences:
            record.decision = f"trial {decision.champion} was {sentences[trial_id]}"
        else:
            record.decision = "not among the finalists, since its objective is worse"
        metrics = {}
        if trial_id in decision.ranking:
            confirmed = champion.confirmations[trial_id]
            metrics = {
                f"{VAL_SAMPLE_PREFIX}{name}{suffix}": confirmed.get(
                    f"{SAMPLE_PREFIX}{name}{suffix}", math.nan
                )
                for name in (DISTANCE, AUC)
                for suffix in ("", STANDARD_ERROR)
            }
        record.extra_metrics |= metrics
        tracker.log(metrics | {RANK: rank}, 0, trial_id)
        tracker.tag({RANK: str(rank), "decision": record.decision}, trial_id)
        tracker.describe(record.decision, trial_id)
    tracker.log(records[champion.trial_id].metrics, 0)
    tracker.tag(
        {"champion": champion.trial_id, "picked_by_mse": records.picked_by_mse(), "decision": reasons}
    )


def trial_picks(champion: str, picked_by_mse: str) -> dict[str, str]:
    """What trials were picked as, by trial ID, from the IDs of the champion and of the lowest `val/mse`."""
    if champion == picked_by_mse:
        return {champion: "champion, lowest MSE"}
    return {champion: "champion"} | ({picked_by_mse: "lowest MSE"} if picked_by_mse else {})


def _initial_points(
    options: TuneOptions, config: Config, searched: dict[str, tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """Points to try first: those of --start-from, then the config's own values if the space contains them."""
    given = [start_values(path, searched, options.tracking_uri) for path in options.start_from]
    flat = config.flat()
    own = {name: flat[name] for name in searched}
    return [*given, *([own] if contains(searched, own) and own not in given else [])]


def _final_training(options: TuneOptions, log: SweepLogger) -> FinalTraining | None:
    if options.final_epochs is None:
        return None
    return FinalTraining(
        options.final_epochs,
        options.final_workers,
        log.shared.child(FINAL_CHECKPOINTS),
        log.tracker.log,
        log.view.step,
        options.verbose,
    )


def _summary(champion: Champion, log: SweepLogger, registered: str, warnings: list[str]) -> list[str]:
    records, folder = log.records, log.shown("champion")
    objective = records[champion.trial_id].params["metrics.objective"]
    weights = "" if champion.update is None else f", weights of update {champion.update}"
    counts: dict[str, int] = {}
    for record in records:
        counts[record.status] = counts.get(record.status, 0) + 1
    return [
        "",
        f"{len(records)} trials: {', '.join(f'{count} {status}' for status, count in counts.items())}",
        f"champion: trial {champion.trial_id}, {champion.reasons[0]}",
        f"  objective ({objective}) {champion.objective:.4f}{weights}",
        *(f"  {reason}" for reason in champion.reasons[1:]),
        *_picked_by_mse(champion, records),
        *quality_lines(champion.metrics),
        *warnings,
        "",
        f"{log.shown('trials.csv')}    every trial with its parameters and metrics",
        f"{log.shown(REPORT)}    the sweep on one page",
        *file_lines(folder),
        registered,
        "",
        *next_lines(folder, log.tracker, is_local=log.folder.is_local),
    ]


def _picked_by_mse(champion: Champion, records: TrialRecords) -> list[str]:
    """What the mean squared error, which the champion is never chosen by, would have chosen."""
    picked = records.picked_by_mse()
    if not picked:
        return []
    if picked == champion.trial_id:
        return [f"  {VAL_MSE} would have picked the same trial"]
    return [
        f"  {VAL_MSE} would have picked trial {picked}, whose objective is {records[picked].objective:.4f}"
    ]


def _plan_resources(options: TuneOptions) -> WorkerResources:
    resources = plan_workers(options.workers_per_trial, "--workers-per-trial")
    if options.workers_per_trial > 1:
        return resources
    # Several single-threaded trials side by side use a machine better than threads within one trial.
    return replace(resources, threads=1, gpus_per_worker=options.gpus_per_worker)
