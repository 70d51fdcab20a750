"""A sweep from start to end: trials, records, champion, registered model, summary."""

import shutil
from dataclasses import replace
from pathlib import Path

import ray
import torch

from diffusion.errors import InputError
from diffusion.learner import check_precision
from diffusion.networks import build_network
from diffusion.sources import needs_streaming, short_name
from export.to_onnx import ParityError
from workflows.champion import Champion, crown
from workflows.console import SweepView, readable
from workflows.dry_run import describe_sweep
from workflows.group import Layout, groups_at_once, plan_layout
from workflows.options import TuneOptions
from workflows.provenance import provenance
from workflows.ray_session import start_ray
from workflows.records import TrialRecords
from workflows.registry import RegistrationError, register
from workflows.streaming import load_dataset
from workflows.tracking import Tracker, open_store, redact, resolve_tracking_uri, runs_page
from workflows.trial import TrialContext
from workflows.tuning import SweepCallback, run_trials

_FINALISTS = 3


def run_sweep(options: TuneOptions, directory: Path) -> int:
    """Run a sweep and return the exit status: 0 with a champion, 1 without.

    Raises:
        InputError: the tracking store or the data cannot be used, or the network does not fit them.
    """
    config = options.config()
    experiment = options.experiment or short_name(config.data)
    uri = resolve_tracking_uri(options.tracking_uri)
    open_store(uri)  # the first thing to know, before data are loaded
    if needs_streaming(config.data):
        start_ray(options.verbose)
    dataset = load_dataset(config.data)
    fixed, searched = options.search.fixed_and_searched(config, dataset.spec.kind)
    config = config.with_values(fixed).for_examples(len(dataset.train))
    build_network(config, dataset.spec.shape, dataset.spec.num_classes)
    start_ray(options.verbose)
    layout = _layout(options.workers_per_trial)
    if not layout.uses_gpus:
        check_precision(config.training, torch.device("cpu"))
    if options.dry_run:
        describe_sweep(config, dataset, layout, searched, options.num_trials, groups_at_once(layout))
        ray.shutdown()
        return 0
    tracker = Tracker(uri, experiment)
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{directory} cannot be made ({error.strerror}): give another --output-dir"
        ) from error

    own = {name: value for name, value in config.flat().items() if name not in searched}
    run_id = tracker.start(directory.name, own | {f"search.{name}": each for name, each in searched.items()})
    origin = provenance(run_id, dataset)
    records = TrialRecords(directory)
    view = SweepView(directory.name, options.num_trials, config.training.num_updates)
    status = "FAILED"
    in_process = layout.num_workers == 1
    try:
        view.say(f"Sweep {directory.name}: {options.num_trials} trials on {options.data}")
        with view:
            interrupted = run_trials(
                TrialContext(config, dataset if in_process else ray.put(dataset), layout, origin),
                searched,
                directory,
                SweepCallback(records, tracker, view, config.flat(), config.training.num_updates),
                num_trials=options.num_trials,
                seed=options.seed,
                verbose=options.verbose,
            )
        ray.shutdown()
        interrupted |= len(records) < options.num_trials
        records.add_paired_errors()
        records.write_csv()
        if interrupted:
            view.say(f"Interrupted after {len(records)} of {options.num_trials} trials; going on with those.")
        finalists = {
            record.trial_id: records.folder(record.trial_id) for record in records.ranked()[:_FINALISTS]
        }
        if not finalists:
            view.say(f"No trial came to a usable end: {directory / 'trials.csv'} holds the reasons.")
            return 1
        champion = crown(finalists, dataset, directory / "champion", origin, view.say)
        for trial_id, distance in champion.confirmations.items():
            records[trial_id].metrics["val/confirmed_distance"] = distance
        records.write_csv()
        tracker.log(champion.metrics, 0)
        tracker.tag({"champion": champion.trial_id})
        tracker.log_files(champion.directory, "champion")
        tracker.describe((champion.directory / "model_card.md").read_text())
        registered = _register(f"ray-ddpm-{experiment}", champion, tracker, may_lead=not interrupted)
        # Each trial's newest model stands in trials/ as well.
        shutil.rmtree(directory / "tune", ignore_errors=True)
        status = "KILLED" if interrupted else "FINISHED"
    except ParityError as error:
        view.say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        ray.shutdown()
        tracker.close(status)
    for line in _summary(champion, records, tracker, registered):
        view.say(line)
    return 0


def _register(name: str, champion: Champion, tracker: Tracker, *, may_lead: bool) -> str:
    """Register the champion and say in a line what became of it."""
    figures = {
        "data_fingerprint": champion.data_fingerprint,
        "test_distance": champion.metrics["test/sample_distance"],
        "test_num_samples": int(champion.metrics["test/sample_num_samples"]),
        "test_num_reference": int(champion.metrics["test/sample_num_reference"]),
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
        f"champion: trial {champion.trial_id}, objective (val/elbo_window) {record.objective:.4f} nats/dim",
        f"  test split: ELBO window {metrics['test/elbo_window']:.4f} nats/dim, distance of "
        f"{metrics['test/sample_num_samples']:.0f} samples {metrics['test/sample_distance']:.4g} "
        f"(as many training examples: {metrics['test/sample_distance_floor']:.4g})",
        "",
        f"{readable(folder.parent / 'trials.csv')}    every trial with its parameters and metrics",
        f"{folder / 'samples.png'}    drawn by PyTorch; samples_onnx.png beside it by ONNX Runtime",
        f"{folder / 'animation.gif'}    noise becoming samples",
        f"{folder / 'sampler.onnx'}    the file to ship, checked against PyTorch (parity.json)",
        registered,
    ]
    if tracker.unsent:
        lines.append(
            f"warning: {tracker.unsent} entries could not be sent to MLflow at {redact(tracker.uri)}"
        )
    lines += [
        "",
        "next: make ui        # every run in MLflow"
        if tracker.uri.startswith("sqlite:")
        else f"next: {redact(tracker.uri)}{runs_page(tracker.experiment_id)}",
        f"      python -m export.sampler {folder / 'sampler.onnx'} --num-samples 64 --output samples.png",
    ]
    return lines


def _layout(workers_per_trial: int) -> Layout:
    layout = plan_layout(workers_per_trial, "--workers-per-trial")
    # Trials of one thread beside each other use a machine better than threads within one trial.
    return layout if workers_per_trial > 1 else replace(layout, threads=1)
