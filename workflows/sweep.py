"""A sweep from start to end: trials, records, champion, registered model, summary."""

import shutil
import subprocess
from pathlib import Path

import ray

from diffusion.data import load_dataset
from diffusion.errors import InputError
from diffusion.networks import build_network
from diffusion.sources import short_name
from export.to_onnx import ParityError
from workflows.champion import Champion, crown
from workflows.console import SweepView
from workflows.options import TuneOptions
from workflows.records import TrialRecords
from workflows.registry import RegistrationError, register
from workflows.tracking import Tracker, open_store, redact, resolve_tracking_uri, runs_page
from workflows.trial import TrialContext
from workflows.tuning import SweepCallback, run_trials, start_ray, stop_at_sigterm

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
    dataset = load_dataset(config.data)
    fixed, searched = options.search.fixed_and_searched(config, dataset.spec.kind)
    config = config.with_values(fixed)
    build_network(config, dataset.spec.shape)
    tracker = Tracker(uri, experiment)
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{directory} cannot be made ({error.strerror}): give another --output-dir"
        ) from error

    own = {name: value for name, value in config.flat().items() if name not in searched}
    run_id = tracker.start_sweep(
        directory.name, own | {f"search.{name}": each for name, each in searched.items()}
    )
    provenance = {
        "run_id": run_id,
        "git_revision": _git_revision(),
        "data_fingerprint": dataset.spec.fingerprint,
    }
    records = TrialRecords(directory)
    view = SweepView(directory.name, options.num_trials, config.training.num_updates)
    status = "FAILED"
    stop_at_sigterm()
    try:
        view.say(f"Sweep {directory.name}: {options.num_trials} trials on {options.data}; starting Ray ...")
        start_ray(options.verbose)
        with view:
            interrupted = run_trials(
                TrialContext(config, dataset, threads=1, provenance=provenance),
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
        champion = crown(finalists, dataset, directory / "champion", provenance, view.say)
        for trial_id, distance in champion.confirmations.items():
            records[trial_id].metrics["val/confirmed_distance"] = distance
        records.write_csv()
        tracker.log_sweep(champion.metrics, {"champion": champion.trial_id})
        tracker.log_sweep_files(champion.directory, "champion")
        tracker.describe_sweep((champion.directory / "model_card.md").read_text())
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
            tracker.client, tracker.uri, tracker.parent_id, name, file, figures, may_lead=may_lead
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
    folder = _readable(champion.directory)
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
        f"{_readable(folder.parent / 'trials.csv')}    every trial with its parameters and metrics",
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


def _readable(path: Path) -> Path:
    """Relative to the working directory where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
