"""The same training by the workers of Ray Train and of torchrun, with gloo on the CPU.

Timed are the updates between the first and the second-last evaluation, so that neither the start nor the
sampling at the end counts; the two evaluations between them do, in both cases.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.contender import ContenderFailed, Figures, Measure
from diffusion.config import Config
from diffusion.presets import preset

EXAMPLES = "examples/s"
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


def rate(times: list[float], config: Config) -> Figures:
    """Training examples per second between the first and the second-last evaluation: half of all updates."""
    return {EXAMPLES: config.training.batch_size * config.training.num_updates / 2 / (times[2] - times[0])}


def by_torchrun(loop: str, num_workers: int) -> Measure:
    """The training by processes of `torch.distributed.run`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_workers)]

    def measure() -> Figures:
        done = subprocess.run(
            [*command, "-m", "benchmarks.torchrun", loop], capture_output=True, text=True, check=False
        )
        # Gloo sometimes aborts a process whose peer closes the connection first; by then all is measured.
        if not done.stdout.strip():
            raise ContenderFailed(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1])

    return measure


def by_ray_train(loop: str, num_workers: int) -> Measure:
    """The training by a worker group of Ray Train."""
    import ray

    from diffusion.data.dataset import load_dataset
    from workflows.data.load import LoadedData
    from workflows.environment import set_defaults
    from workflows.ray_runtime.session import start_ray
    from workflows.training.events import Evaluated, Event
    from workflows.training.worker import TrainingJob
    from workflows.training.worker_group import WorkerResources, run_worker_group

    set_defaults(verbose=False)
    start_ray(verbose=False)
    config = config_of(loop)
    job = TrainingJob(config, ray.put(LoadedData(load_dataset(config.data))), 1, {})

    def measure() -> Figures:
        times = []

        def on_event(event: Event) -> None:
            if isinstance(event, Evaluated):
                times.append(time.monotonic())

        run_worker_group(job, WorkerResources(num_workers, 1, uses_gpus=False), on_event)
        return rate(times, config)

    return measure


def main(loop: str) -> None:
    """Train as one of torchrun's processes; rank 0 prints the rate."""
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


if __name__ == "__main__":
    main(sys.argv[1])
