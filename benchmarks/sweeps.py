"""Tiny trials: a sweep of ours, and the same trials in a bare loop of Optuna that logs to MLflow."""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contender import CPU_SECONDS, SECONDS, Figures, Measure, since_start
from benchmarks.programs import Watched, watch
from diffusion.metrics import OBJECTIVE

ROOT = Path(__file__).parents[1]
# A trial of the heart that takes a fraction of a second.
TINY: dict[str, Any] = {
    "training.num_updates": 300,
    "training.num_evaluations": 2,
    "metrics.num_samples": 256,
    "metrics.num_examples": 256,
}
A_TRIAL, AFTERWARDS, FIRST_QUARTER, LAST_QUARTER, DRIVER = (
    "s per trial",
    "s after the last trial",
    "s per trial, first quarter",
    "s per trial, last quarter",
    "MB of the driver at most",
)
_OVER = re.compile(r"\] trial (\d+)/")


def sweep_command(num_trials: int) -> list[str]:
    """The command of a sweep of tiny trials."""
    flags = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(ROOT / "workflows" / "tune.py"), "--data", "heart", "--name", "many"]
    return [*command, "--num-trials", str(num_trials), "--early-stopping", "off", *flags]


def trial_ends(seen: Watched) -> list[float]:
    """Seconds from a sweep's start to the end of each trial."""
    return [second for second, line in seen.lines if _OVER.search(line)]


def tune(num_trials: int) -> Measure:
    """`workflows/tune.py`, until its last line."""

    def measure() -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            seen = watch(sweep_command(num_trials), Path(folder))
        ends = trial_ends(seen)
        quarter = max(1, len(ends) // 4)
        return {
            A_TRIAL: ends[-1] / num_trials,
            SECONDS: seen.seconds,
            CPU_SECONDS: seen.cpu_seconds,
            AFTERWARDS: seen.seconds - ends[-1],
            FIRST_QUARTER: (ends[quarter] - ends[0]) / quarter,
            LAST_QUARTER: (ends[-1] - ends[-1 - quarter]) / quarter,
            DRIVER: max(memory for _, memory in seen.memory),
        }

    return measure


def optuna_loop(num_trials: int) -> Measure:
    """Optuna's default sampler over the same space, one trial after another, each a run of MLflow."""

    def measure() -> Figures:
        import mlflow
        import optuna

        from diffusion.data.dataset import load_dataset
        from diffusion.errors import InputError
        from diffusion.presets import preset
        from diffusion.training.loop import EvaluationResult, Training, TrainingDiverged
        from workflows.cli.search_space import SearchSpace
        from workflows.cli.tune_options import SIZES_FOR_POINTS

        base = preset("heart").with_values(TINY)
        dataset = load_dataset(base.data)
        _, space = SearchSpace(**SIZES_FOR_POINTS).fixed_and_searched(base, dataset.spec.kind)

        def objective(trial: optuna.Trial) -> float:
            values = {name: suggest(trial, name, allowed) for name, allowed in space.items()}
            results: list[EvaluationResult] = []

            def report(result: EvaluationResult) -> None:
                results.append(result)
                mlflow.log_metrics(result.metrics, step=result.updates)

            with mlflow.start_run(nested=True):
                mlflow.log_params(values)
                try:
                    config = base.with_values(values)
                    if config.infeasible_reason():
                        raise optuna.TrialPruned
                    Training(config, dataset, report).run()
                except (InputError, TrainingDiverged) as error:
                    raise optuna.TrialPruned from error
            return results[-1].metrics[OBJECTIVE]

        with tempfile.TemporaryDirectory() as folder:
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
            mlflow.set_experiment("bare")
            with mlflow.start_run():
                study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
                study.optimize(objective, n_trials=num_trials)
        figures = since_start()
        return figures | {A_TRIAL: figures[SECONDS] / num_trials}

    return measure


def suggest(trial: Any, name: str, allowed: tuple[Any, ...]) -> Any:
    """A value of the search space: one of several, or of a range of floats."""
    if len(allowed) == 2 and isinstance(allowed[0], float):
        return trial.suggest_float(name, *allowed, log=True)
    return trial.suggest_categorical(name, allowed)
