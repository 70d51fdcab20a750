"""Kill trainings and sweeps at random moments, let them go on, and count what was lost.

    python -m benchmarks.kills                             # 20 kills of each: an hour or more on 2 cores
    python -m benchmarks.kills sweep --kills 5 --seed 7    # single ones

Each work first runs undisturbed. Then it is started again and killed (SIGKILL) at a moment drawn uniformly
from the time that the undisturbed one took; every second time its workers and Ray's processes are killed with
it, as when a machine loses power. It goes on with `--start-or-resume`, is killed again, and so forth; when it
ends before its next kill, it is compared with the undisturbed one, and a new one is started. Prints the table
of benchmarks/results/reliability.md, and ends with status 1 if anything was lost.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil

from benchmarks.options import at_least_one, one_of
from diffusion.metrics import OBJECTIVE, VAL_ELBO_WINDOW, VAL_SAMPLE_PREFIX

ROOT = Path(__file__).parents[1]
NAME = "run"
LONGEST = 1200.0  # seconds for one command, before it counts as hung
_PARAMETERS = ("schedule.", "network.", "training.")  # of trials.csv
_SMALL = (
    "--data heart --training.batch-size 64 --network.hidden-size 32 --metrics.num-samples 200 "
    "--metrics.num-examples 128 --sampler.num-steps 10"
)
TRAINING = (
    f"train.py {_SMALL} --training.num-updates 3000 --training.num-evaluations 10 --keep-checkpoints 100"
)
SWEEP = (
    f"tune.py {_SMALL} --num-trials 4 --early-stopping off "
    "--training.num-updates 1200 --training.num-evaluations 4"
)


@dataclass(frozen=True)
class Work:
    """What is killed.

    Attributes:
        title: in the table.
        arguments: the script of workflows/ and its arguments.
        snapshot: function from a run's folder to what must never change again, by name.
        result: function from the working folder to what must equal that of the undisturbed run, by name.
    """

    title: str
    arguments: str
    snapshot: Callable[[Path], dict[str, str]]
    result: Callable[[Path], dict[str, object]]


@dataclass
class Found:
    """What the kills of one work did.

    Attributes:
        kills: number of kills.
        runs: number of runs that were compared at their end.
        losses: what differed or was lost, in words.
        slowest: longest time in seconds until the processes of a killed driver had ended.
    """

    kills: int = 0
    runs: int = 0
    losses: list[str] = field(default_factory=list)
    slowest: float = 0.0


def finished_trials(run: Path) -> dict[str, str]:
    """What trials.csv says of each finished trial, without what compares it with the others.

    That is added when the champion is chosen, and again if a resumed sweep has to choose again.
    """
    path = run / "trials.csv"
    if not path.exists():
        return {}
    table = (
        pd.read_csv(path, dtype=str).set_index("trial_id").drop(columns=["rank", "decision"], errors="ignore")
    )
    over = table[table["status"] == "finished"]
    over = over.drop(columns=[name for name in over if name.startswith(VAL_SAMPLE_PREFIX)])
    return {
        f"{trial} {name}": value for trial, row in over.iterrows() for name, value in row.dropna().items()
    }


def evaluations(run: Path) -> dict[str, str]:
    """Checksums of the weights of each checkpoint, by update."""
    from hashlib import sha256

    found = {}
    for path in sorted((run / "checkpoints").glob("*/*.safetensors")):
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that is just being moved into place
            found[f"{path.parent.name}/{path.name}"] = sha256(path.read_bytes()).hexdigest()
    return found


def mlflow_runs(folder: Path) -> dict[str, object]:
    """Number of runs in MLflow, their statuses, and the steps of their objective."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments)
    steps = sorted(
        [entry.step for entry in client.get_metric_history(run.info.run_id, name)]
        for run in runs
        for name in (OBJECTIVE, VAL_ELBO_WINDOW)
        if name in run.data.metrics
    )
    return {
        "runs in MLflow": len(runs),
        "their statuses": sorted({run.info.status for run in runs}),
        "steps of the objective in MLflow": steps,
    }


def training_result(folder: Path) -> dict[str, object]:
    """Final weights and MLflow's runs of a training."""
    return {"weights": evaluations(folder / "runs" / NAME)} | mlflow_runs(folder)


def sweep_result(folder: Path) -> dict[str, object]:
    """Objectives of the trials by their parameters, the champion's file, and MLflow's runs."""
    run = folder / "runs" / NAME
    table = pd.read_csv(run / "trials.csv")
    params = [name for name in table if name.startswith(_PARAMETERS)]
    return {
        "different trials": table["trial_id"].nunique(),
        "champion's file": (run / "champion" / "sampler.onnx").exists(),
        **{f"objective of {row[params].to_dict()}": round(row[OBJECTIVE], 12) for _, row in table.iterrows()},
    } | mlflow_runs(folder)


WORKS = {
    "training": Work("training, 1 worker", f"{TRAINING} --num-workers 1", evaluations, training_result),
    "training_2": Work("training, 2 workers", f"{TRAINING} --num-workers 2", evaluations, training_result),
    "sweep": Work("sweep of 4 trials", SWEEP, finished_trials, sweep_result),
}


class Command:
    """A command in a session of its own, with all the processes that it starts.

    Args:
        folder: its working folder.
        arguments: the script of workflows/ and its arguments.
    """

    def __init__(self, folder: Path, arguments: str) -> None:
        script, *rest = arguments.split()
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "RAY"))
        }
        with (folder / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "workflows" / script),
                    *rest,
                    "--name",
                    NAME,
                    "--start-or-resume",
                ],
                cwd=folder,
                env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._children: set[psutil.Process] = set()

    def wait(self, seconds: float) -> int | None:
        """Wait for its end; returns its exit status, or None after so many seconds."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(psutil.Error):
                self._children.update(psutil.Process(self._process.pid).children(recursive=True))
            time.sleep(0.25)
        return self._process.returncode

    def kill(self, *, everything: bool) -> float:
        """Kill it, with all that it started or alone; returns the seconds until all of it had ended.

        Raises:
            TimeoutError: something was still running after two minutes; it is killed.
        """
        self._process.kill()
        self._process.wait()
        if everything:
            self._kill_children()
        started = time.monotonic()
        while alive := [each for each in self._children if _is_running(each)]:
            if time.monotonic() > started + 120.0:
                names = ", ".join(
                    sorted({" ".join(each.cmdline())[:60] for each in alive if each.is_running()})
                )
                self._kill_children()
                raise TimeoutError(names)
            time.sleep(0.1)
        return time.monotonic() - started

    def _kill_children(self) -> None:
        for each in self._children:
            with contextlib.suppress(psutil.Error):
                each.send_signal(signal.SIGKILL)


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def differences(expected: dict[str, object], actual: dict[str, object]) -> list[str]:
    """What of a result differs, in words."""
    return [
        f"{name}: {_short(actual.get(name))} instead of {_short(value)}"
        for name, value in expected.items()
        if actual.get(name) != value
    ]


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What was there before and is gone or different, in words."""
    return [
        f"{name} {'is gone' if name not in after else 'has changed'}"
        for name, value in before.items()
        if after.get(name) != value
    ]


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."


def kill_often(work: Work, kills: int, rng: random.Random, folder: Path) -> Found:
    """Run a work undisturbed, then kill others like it so often, and compare.

    Raises:
        RuntimeError: the undisturbed run failed.
    """
    undisturbed, found = folder / "undisturbed", Found()
    undisturbed.mkdir(parents=True)
    started = time.monotonic()
    status = Command(undisturbed, work.arguments).wait(LONGEST)
    if status != 0:
        raise RuntimeError(f"undisturbed run: status {status}, see {undisturbed / 'output.txt'}")
    expected, duration = work.result(undisturbed), time.monotonic() - started
    print(f"{work.title}: {duration:.0f} s undisturbed", flush=True)
    while found.kills < kills:
        here = folder / f"run {found.runs}"
        here.mkdir()
        kept: dict[str, str] = {}
        while True:
            command, moment = Command(here, work.arguments), rng.uniform(0.0, duration)
            status = command.wait(moment if found.kills < kills else LONGEST)
            if status is not None or found.kills == kills:
                break
            found.kills += 1
            everything = found.kills % 2 == 0
            try:
                found.slowest = max(found.slowest, command.kill(everything=everything))
            except TimeoutError as error:
                found.losses.append(f"left running two minutes after kill {found.kills}: {error}")
            now = work.snapshot(here / "runs" / NAME)
            lost = changed(kept, now)
            kept = now
            print(
                f"  kill {found.kills} after {moment:.1f} s{', with its processes' if everything else ''}: "
                f"{len(kept)} kept, {len(lost)} lost",
                flush=True,
            )
            found.losses += lost
        found.runs += 1
        if status != 0:
            command.kill(everything=True)
            found.losses.append(f"run {found.runs}: status {status}, see {here / 'output.txt'}")
            continue
        found.losses += changed(kept, work.snapshot(here / "runs" / NAME))
        found.losses += [f"run {found.runs}: {each}" for each in differences(expected, work.result(here))]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Kill the works that are named, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        type=one_of(WORKS),
        metavar="NAME",
        help=f"any of {', '.join(WORKS)} (default: all)",
    )
    parser.add_argument("--kills", type=at_least_one, default=20, help="kills of each (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--folder", type=Path, help="where to run them, and keep them (default: a temporary one)"
    )
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    rows, losses = (
        [
            "| work | kills | runs | slowest end of what a killed driver leaves | lost |",
            "|---|---|---|---|---|",
        ],
        [],
    )
    with (
        tempfile.TemporaryDirectory()
        if options.folder is None
        else contextlib.nullcontext(options.folder) as at
    ):
        for name in options.names or WORKS:
            found = kill_often(WORKS[name], options.kills, rng, Path(at) / name)
            losses += found.losses
            lost = "; ".join(found.losses) or "nothing"
            rows.append(
                f"| {WORKS[name].title} | {found.kills} | {found.runs} | {found.slowest:.1f} s | {lost} |"
            )
    print("\n".join(rows))
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
