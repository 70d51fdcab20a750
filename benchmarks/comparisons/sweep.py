"""A sweep of 32 tiny trials beside the same trials in a bare loop of Optuna that logs to MLflow.

A trial trains the heart for 300 updates and is evaluated twice. The loop trains by the same code, one trial
after another in one process, suggests by the same sampler from the same space, and logs parameters and
metrics to an SQLite store; it writes no models, pictures, tables or reports. Seconds per trial are those
from the start of the process to the end of the last trial, divided by the trials. What follows the last
trial (the choice of the champion and its sampler, export with its check, report, registration) has no
counterpart in the loop; it is compared with the time of the trials.
"""

import statistics

from benchmarks.comparison import Comparison, Options, Report
from benchmarks.contender import CPU_SECONDS, Contender
from benchmarks.sweeps import A_TRIAL, AFTERWARDS
from benchmarks.table import Unit, row

TITLE = "Tiny trials"
NUM_TRIALS = 32
TRIALS, REST = f"a sweep of {NUM_TRIALS} tiny trials", f"after a sweep of {NUM_TRIALS} tiny trials"
WORKS = (TRIALS, REST)
BARE, ITS_TRIALS = "a bare Optuna loop with MLflow", "its trials"


def run(options: Options) -> Report:
    report = Report()
    arguments = {"num_trials": NUM_TRIALS}
    measured = report.add(
        Comparison(
            TRIALS,
            {"tune.py": Contender("benchmarks.sweeps:tune", arguments)},
            {BARE: {BARE: Contender("benchmarks.sweeps:optuna_loop", arguments, fresh=True)}},
            [Unit(A_TRIAL, goals={BARE: "at most 0.5 s more"}), Unit(CPU_SECONDS)],
        ),
        options.repeats,
    )
    if ours := measured.get("tune.py"):
        after, trials = [each[AFTERWARDS] for each in ours], [NUM_TRIALS * each[A_TRIAL] for each in ours]
        report.rows.append(row(REST, ITS_TRIALS, Unit("s"), after, trials, goal="6.7"))
        if bare := measured.get(BARE):
            more = [own[A_TRIAL] - its[A_TRIAL] for own, its in zip(ours, bare, strict=True)]
            text = f"Of a trial {statistics.median(more):.2f} s more than in the bare loop"
            report.lines += ["", f"{text} ({min(more):.2f} to {max(more):.2f})."]
    return report
