"""Ray Train beside torchrun: the same training by one and by two workers.

One thread a worker, gloo. Timed are the updates between the first and the second-last evaluation.
"""

from benchmarks.comparison import Comparison, Options, Report
from benchmarks.contender import Contender
from benchmarks.table import Unit
from benchmarks.torchrun import EXAMPLES, LOOPS

TITLE = "Ray Train beside torchrun"
TORCHRUN = "torchrun"


def work(loop: str, num_workers: int) -> str:
    return f"{loop}, {num_workers} worker{'s' if num_workers > 1 else ''}"


WORKS = tuple(work(loop, num_workers) for loop in LOOPS for num_workers in (1, 2))


def run(options: Options) -> Report:
    report = Report()
    for loop in LOOPS:
        for num_workers in (1, 2):
            arguments = {"loop": loop, "num_workers": num_workers}
            ours = Contender("benchmarks.torchrun:by_ray_train", arguments)
            theirs = Contender("benchmarks.torchrun:by_torchrun", arguments)
            unit = Unit(EXAMPLES, higher_is_better=True, goals={TORCHRUN: "0.97"})
            works = Comparison(
                work(loop, num_workers), {"Ray Train": ours}, {TORCHRUN: {TORCHRUN: theirs}}, [unit]
            )
            report.add(works, options.repeats)
    return report
