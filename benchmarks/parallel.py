"""Jobs of a benchmark in several processes."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any


def run_jobs(
    run: Callable[..., object],
    jobs: Sequence[tuple[Any, ...]],
    processes: int | None,
    after: Callable[..., object] = lambda *job: None,
) -> None:
    """Run a function once for each job, and print a line when one is done.

    Args:
        run: function of the arguments of a job; its errors end the benchmark.
        jobs: arguments of each call.
        processes: number of processes; None is one per core.
        after: called here with the arguments of each job that is done.
    """
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, *job): job for job in jobs}
        for place, future in enumerate(as_completed(futures), start=1):
            future.result()
            job = futures[future]
            print(f"{place}/{len(jobs)}: {', '.join(map(str, job))}", flush=True)
            after(*job)
