"""A sweep from start to end: trials, records, champion, registered model, summary."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from diffusion.config import Config
from diffusion.data import Dataset
from diffusion.learner import check_precision
from diffusion.networks import build_network
from export.to_onnx import ParityError
from workflows.champion import Champion, crown
from workflows.console import readable
from workflows.dry_run import describe_sweep
from workflows.final_training import FinalTraining
from workflows.group import Layout, groups_at_once, plan_layout
from workflows.preparation import prepare
from workflows.product import copying
from workflows.provenance import provenance
from workflows.ray_session import start_ray
from workflows.records import TrialRecords
from workflows.registry import RegistrationError, register
from workflows.report import write_report
from workflows.runs import RunRecord, Status
from workflows.search_space import holds, start_values
from workflows.sweep_log import SweepLog
from workflows.tracking import Tracker, open_store, redact, resolve_tracking_uri, runs_page
from workflows.trial import TrialContext
from workflows.tune_options import UNLIMITED, TuneOptions
from workflows.tuning import Search, SweepCallback, run_trials

_FINALISTS = 3
_FINAL_CHECKPOINTS = "final"
_MSE_MISLEADS = (
    "warning: val/mse cannot be compared across schedules: one that spends more steps at high noise scores "
    "lower with a worse model. Leave out --objective to judge by val/elbo_window."
)


def run_sweep(options: TuneOptions, record: RunRecord | None) -> int:
    """Run a sweep, or go on with one, and return the exit status: 0 with a champion, 1 without.

    Args:
        options: of the command line.
        record: of the sweep to go on with, or None for a new one.

    Raises:
        InputError: the tracking store or the data cannot be used, the network does not fit them, or the
            sweep to go on with is another one.
    """
    uri = resolve_tracking_uri(options.tracking_uri)
    if not options.dry_run:
        open_store(uri)  # the first thing to know, before data are loaded
    asked, dataset = prepare(options.config(), verbose=options.verbose)
    fixed, searched = options.search.fixed_and_searched(asked, dataset.spec.kind)
    config = asked.with_values(fixed)
    search = Search(
        searched,
        options.search.algorithm,
        options.seed,
        options.num_trials,
        options.budget_seconds(),
        _first_points(options, config, searched),
    )
    build_network(config, dataset.spec.shape, dataset.spec.num_classes)
    start_ray(options.verbose)
    layout = _layout(options)
    if not layout.uses_gpus:
        check_precision(config.training, torch.device("cpu"))
    if options.final_epochs is not None:
        plan_layout(options.final_workers, "--final-workers")  # to be told now, not hours later
    if options.dry_run:
        describe_sweep(
            config, dataset, layout, searched, options.num_trials, groups_at_once(layout), search.seconds
        )
        ray.shutdown()
        return 0
    own = {name: value for name, value in config.flat().items() if name not in searched}
    params = own | {f"search.{name}": each for name, each in searched.items()}
    log = SweepLog.open(options, asked, params, dataset, record, uri)
    return _sweep(log, options, search, config, dataset, layout)


def _sweep(
    log: SweepLog, options: TuneOptions, search: Search, config: Config, dataset: Dataset, layout: Layout
) -> int:
    records, tracker, view = log.records, log.tracker, log.view
    status: Status = "failed"
    try:
        view.say(f"Sweep {log.directory.name}: {_budget(options)} on {options.data}")
        if config.metrics.objective == "val/mse":
            view.say(_MSE_MISLEADS)
        if dataset.features is not None and dataset.features.accuracy is not None:
            tracker.log({"features/accuracy": dataset.features.accuracy}, 0)
        for each in records:
            if not each.unfinished:
                view.known(each, search.searched)
        origin = provenance(tracker.run_id, dataset)
        shared = dataset if layout.num_workers == 1 else ray.put(dataset)
        with view:
            interrupted, correlations = run_trials(
                TrialContext(config, shared, layout, origin),
                search,
                records,
                log.shared,
                SweepCallback(records, tracker, view, config.flat(), config.training.num_updates),
                verbose=options.verbose,
            )
        ray.shutdown()
        records.add_paired_errors()
        records.write_csv()
        tracker.log({f"rung/spearman_at_{rung}": value for rung, value in correlations.items()}, 0)
        if interrupted:
            view.say(f"Interrupted after {len(records)} of {options.num_trials} trials; going on with those.")
        if not records.ranked():
            view.say(f"No trial came to a usable end: {log.directory / 'trials.csv'} holds the reasons.")
            return 1
        champion = _crown(log, options, dataset, origin)
        write_report(log.directory, records, search.searched, champion, correlations)
        for line in _hand_over(log, champion, dataset, may_lead=not interrupted):
            view.say(line)
        status = "stopped" if interrupted else "finished"
    except ParityError as error:
        view.say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        ray.shutdown()
        log.close(status)
    return 0


def _budget(options: TuneOptions) -> str:
    parts = [f"{options.num_trials} trials"] if options.num_trials < UNLIMITED else []
    return ", ".join([*parts, *([f"at most {options.time_budget}"] if options.time_budget else [])])


def _crown(log: SweepLog, options: TuneOptions, dataset: Dataset, origin: dict[str, Any]) -> Champion:
    """Find the champion and put it into `champion/`."""
    records = log.records
    finalists = {record.trial_id: records.folder(record.trial_id) for record in records.ranked()[:_FINALISTS]}
    champion = crown(
        finalists, dataset, log.directory / "champion", origin, log.view.say, _final_training(options, log)
    )
    for trial_id, distance in champion.confirmations.items():
        records[trial_id].figures["val/confirmed_distance"] = distance
    records.write_csv()
    return champion


def _hand_over(log: SweepLog, champion: Champion, dataset: Dataset, *, may_lead: bool) -> list[str]:
    """Put the champion and the report into MLflow, and say what was made."""
    records, tracker = log.records, log.tracker
    tracker.log(champion.metrics, 0)
    tracker.tag({"champion": champion.trial_id})
    tracker.log_files(champion.directory, "champion")
    tracker.log_file(log.directory / "report.html")
    tracker.describe((champion.directory / "model_card.md").read_text())
    registered = _register(f"ray-ddpm-{log.experiment}", champion, dataset, tracker, may_lead=may_lead)
    # Each trial's newest model stands in trials/ as well.
    for folder in ("tune", _FINAL_CHECKPOINTS):
        with suppress(OSError):  # what stays is only in the way
            log.shared.delete(folder)
    return _summary(champion, records, tracker, registered)


def _first_points(
    options: TuneOptions, config: Config, searched: dict[str, tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """What --start-from names, then the config's own values where the space holds them."""
    given = [start_values(path, searched) for path in options.start_from]
    flat = config.flat()
    own = {name: flat[name] for name in searched}
    return [*given, *([own] if holds(searched, own) and own not in given else [])]


def _final_training(options: TuneOptions, log: SweepLog) -> FinalTraining | None:
    if options.final_epochs is None:
        return None
    return FinalTraining(
        options.final_epochs,
        options.final_workers,
        log.shared.child(_FINAL_CHECKPOINTS),
        log.tracker.log,
        log.view.say,
        options.verbose,
    )


def _register(name: str, champion: Champion, dataset: Dataset, tracker: Tracker, *, may_lead: bool) -> str:
    """Register the champion and say in a line what became of it."""
    figures = {
        "data_fingerprint": champion.data_fingerprint,
        "test_distance": champion.metrics["test/sample_distance"],
        "test_num_samples": int(champion.metrics["test/sample_num_samples"]),
        "test_num_reference": int(champion.metrics["test/sample_num_reference"]),
        "test_features": dataset.features.name if dataset.features else "none",
    }
    file = champion.directory / "sampler.onnx"
    try:
        version, is_best = register(
            tracker.client, tracker.uri, tracker.run_id, name, file, figures, may_lead=may_lead
        )
    except RegistrationError as error:
        return f"warning: MLflow did not register the model ({redact(str(error))})"
    line = f"registered in MLflow as {name} version {version}"
    if is_best:
        return line
    reason = (
        "its test figure is better, or was measured otherwise" if may_lead else "this sweep was cut short"
    )
    return f"{line}; the alias champion stays where it is: {reason}"


def _summary(champion: Champion, records: TrialRecords, tracker: Tracker, registered: str) -> list[str]:
    folder = Path(readable(champion.directory))
    record = records[champion.trial_id]
    metrics = champion.metrics
    counts: dict[str, int] = {}
    for each in records:
        counts[each.status] = counts.get(each.status, 0) + 1
    lines = [
        "",
        f"{len(records)} trials: {', '.join(f'{number} {status}' for status, number in counts.items())}",
        f"champion: trial {champion.trial_id}, objective ({record.params['metrics.objective']}) "
        f"{record.objective:.4f}",
        f"  test split: ELBO window {metrics['test/elbo_window']:.4f} nats/dim, distance of "
        f"{metrics['test/sample_num_samples']:.0f} samples {metrics['test/sample_distance']:.4g} "
        f"(as many training examples: {metrics['test/sample_distance_floor']:.4g})",
        f"  {copying(metrics)}",
        "",
        f"{readable(folder.parent / 'trials.csv')}    every trial with its parameters and metrics",
        f"{readable(folder.parent / 'report.html')}    the sweep on one page",
        f"{folder / 'samples.png'}    drawn by PyTorch; samples_onnx.png beside it by ONNX Runtime",
        f"{folder / 'animation.gif'}    noise becoming samples",
        f"{folder / 'sampler.onnx'}    the file to ship, checked against PyTorch (parity.json)",
        registered,
    ]
    lines += [
        "",
        "next: make ui        # every run in MLflow"
        if tracker.uri.startswith("sqlite:")
        else f"next: {redact(tracker.uri)}{runs_page(tracker.experiment_id)}",
        f"      python -m export.sampler {folder / 'sampler.onnx'} --num-samples 64 --output samples.png",
    ]
    return lines


def _layout(options: TuneOptions) -> Layout:
    layout = plan_layout(options.workers_per_trial, "--workers-per-trial")
    if options.workers_per_trial > 1:
        return layout
    # Trials of one thread beside each other use a machine better than threads within one trial.
    return replace(layout, threads=1, gpus_per_worker=options.gpus_per_worker)
