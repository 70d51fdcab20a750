"""Our training as a contender: `diffusion.training.loop.Training`, as every run and trial uses it."""

import threading
from typing import Any

import torch

from benchmarks import training_data
from benchmarks.contender import Figures, Measure, since_start
from benchmarks.sharpness import MEAN_DISTANCE, NUM_SAMPLES, mean_distance
from benchmarks.training_data import held_out_loss, updates_in_blocks
from diffusion.config import Config, DataConfig
from diffusion.data.dataset import Dataset, load_dataset
from diffusion.evaluation.evaluator import Evaluator
from diffusion.training.loop import Request, Training

# Of an evaluation no more than what the loop cannot do without.
NO_EVALUATION = {
    "training.num_evaluations": 1,
    "metrics.num_examples": 2,
    "metrics.num_samples": 2,
    "sampler.num_steps": 1,
}


class PausedTraining:
    """A training that goes on for so many updates whenever it is told to.

    Args:
        config: what is trained.
        dataset: the data.

    Attributes:
        training: the training.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.training = Training(config, dataset, lambda result: None, request=self._pause)
        self._until, self._go, self._paused = 0, threading.Semaphore(0), threading.Semaphore(0)
        # The thread waits while others are measured; a daemon does not hold up the end of the process.
        threading.Thread(target=self._run, daemon=True).start()
        self._paused.acquire()

    def run(self, num_updates: int) -> None:
        """Update this often: a multiple of the updates between two polls of `request`.

        Raises:
            RuntimeError: the training failed, or did not pause after that many.
        """
        self._until = self.training.updates + num_updates
        self._go.release()
        self._paused.acquire()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.training.updates != self._until:
            raise RuntimeError(f"{self.training.updates} updates done instead of {self._until}")

    def _run(self) -> None:
        try:
            self.training.run()
        finally:
            self._paused.release()

    def _pause(self) -> Request:
        if self.training.updates == self._until:
            self._paused.release()
            self._go.acquire()
        return Request.CONTINUE


def train_heart(num_updates: int, seed: int, values: dict[str, Any]) -> Measure:
    """Train on the heart from the start of the process; then, off the clock, the samples' sharpness.

    Args:
        num_updates: all updates.
        seed: of weights, batches and noise.
        values: of the config, by dotted name.
    """
    torch.set_num_threads(1)  # as in a sweep's trial of points

    def measure() -> Figures:
        config = Config(data=DataConfig(name="heart"), seed=seed).with_values(
            {"training.num_updates": num_updates} | NO_EVALUATION | values
        )
        dataset = load_dataset(config.data)
        finished: list[Figures] = []

        def request() -> Request:  # first asked after the last update before the evaluation
            if training.updates == num_updates:
                finished.append(since_start())
            return Request.CONTINUE

        training = Training(config, dataset, lambda result: None, request=request)
        training.run()
        judged = config.with_values({"sampler.num_steps": config.schedule.num_train_timesteps})
        drawn = Evaluator(judged, dataset).samples(training.model.network, num_samples=NUM_SAMPLES, seed=seed)
        return finished[0] | {MEAN_DISTANCE: mean_distance(dataset.raw(drawn))}

    return measure


def train_images(
    data: str, num_updates: int, horizon: int, values: dict[str, Any], device: str = "cpu"
) -> Measure:
    """Updates on images, a block of them at each measurement; the first block is over before.

    Args:
        data: as for `training_data.load`.
        num_updates: of a block.
        horizon: updates over which the learning rate decays.
        values: of the config, by dotted name.
        device: "cpu" or "cuda".
    """
    config = Config().with_values({"training.num_updates": horizon} | NO_EVALUATION | values)
    dataset = training_data.load(data).to(torch.device(device))
    paused = PausedTraining(config, dataset)
    alphas_cumprod = torch.tensor(config.schedule.build().alphas_cumprod, dtype=torch.float32)
    network = paused.training.model.network
    return updates_in_blocks(paused.run, num_updates, lambda: held_out_loss(network, dataset, alphas_cumprod))
