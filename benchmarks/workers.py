"""Throughput of the same training loop under Ray Train and under torchrun.

    python -m benchmarks.workers            # a few minutes on 2 cores

Times the updates between the first and the second-last evaluation, so that neither the start nor the sampling
at the end counts; the two evaluations in between do, in both cases. Writes benchmarks/results/workers.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffusion.config import Config
from diffusion.presets import preset

RESULTS = Path(__file__).parent / "results" / "workers.md"
ROUNDS = 3
LOOPS = {
    "MLP on digits": {"training.num_updates": 800, "training.batch_size": 256},
    "U-Net on digits": {
        "network.kind": "unet",
        "network.channel_multipliers": (1, 2),
        "training.num_updates": 48,
        "training.batch_size": 128,
    },
}


def config_of(loop: str) -> Config:
    small = {
        "training.num_evaluations": 4,
        "metrics.num_examples": 16,
        "metrics.num_samples": 16,
        "sampler.num_steps": 4,
    }
    return preset("digits").with_values({**LOOPS[loop], **small})


def rate(times: list[float], config: Config) -> float:
    """Training examples per second between the first and the second-last evaluation: half of all updates."""
    return config.training.batch_size * config.training.num_updates / 2 / (times[2] - times[0])


def under_torchrun(loop: str) -> None:
    """Entry point of each of torchrun's processes."""
    import torch
    from torch import distributed

    from diffusion.data.dataset import load_dataset
    from diffusion.training.loop import EvaluationResult, Training
    from workflows.training.evaluation_files import write_evaluation

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    config, times = config_of(loop), []

    def report(progress: EvaluationResult) -> None:
        with tempfile.TemporaryDirectory() as folder:  # as under Ray Train, with a picture of samples
            write_evaluation(progress, {}, Path(folder))
        times.append(time.monotonic())

    Training(config, load_dataset(config.data), report).run()
    if distributed.get_rank() == 0:
        print(json.dumps(rate(times, config)), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


def torchrun(loop: str, num_workers: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_workers)]
    command += ["-m", "benchmarks.workers", "--loop", loop]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Gloo sometimes aborts a process whose peer closes the connection first; by then all is measured.
    if not done.stdout.strip():
        raise SystemExit(done.stderr[-2000:])
    return float(json.loads(done.stdout.splitlines()[-1]))


def ray_train(loop: str, num_workers: int) -> float:
    import ray

    from diffusion.data.dataset import load_dataset
    from workflows.data.load import LoadedData
    from workflows.training.events import Evaluated, Event
    from workflows.training.worker import TrainingJob
    from workflows.training.worker_group import WorkerResources, run_worker_group

    config, times = config_of(loop), []

    def on_event(event: Event) -> None:
        if isinstance(event, Evaluated):
            times.append(time.monotonic())

    job = TrainingJob(config, ray.put(LoadedData(load_dataset(config.data))), 1, {})
    run_worker_group(job, WorkerResources(num_workers, 1, uses_gpus=False), on_event)
    return rate(times, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        under_torchrun(options.loop)
        return
    from workflows.environment import set_defaults

    set_defaults(verbose=False)
    from workflows.ray_runtime.session import start_ray

    start_ray(verbose=False)
    lines = [
        "# Training examples per second under Ray Train and under torchrun",
        "",
        f"The same loop, gloo, one thread a worker, {os.cpu_count()} cores; median of {ROUNDS} runs that "
        "take turns. `python -m benchmarks.workers`.",
        "",
        "| loop | workers | torchrun | Ray Train | ratio |",
        "|---|---|---|---|---|",
    ]
    for loop in LOOPS:
        for num_workers in (1, 2):
            found: dict[str, list[float]] = {"torchrun": [], "ray": []}
            for _ in range(ROUNDS):
                found["torchrun"].append(torchrun(loop, num_workers))
                found["ray"].append(ray_train(loop, num_workers))
            native, ours = (statistics.median(values) for values in found.values())
            lines.append(f"| {loop} | {num_workers} | {native:.0f} | {ours:.0f} | {ours / native:.3f} |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
