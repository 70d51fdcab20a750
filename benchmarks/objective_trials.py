"""Trains the trials that `benchmarks.objective` judges objectives by.

    python -m benchmarks.objective_trials --data heart --output /tmp/trials/heart

24 configs, the first the seeds' defaults and the others drawn at random from the default search space,
each trained to its end; every fourth of them twice more with other seeds. What is there already is not
trained again, so the command can be interrupted. The whole takes about a quarter of an hour for heart and
for digits and an hour for a folder of 10,000 images at 14x14, on 2 cores.
"""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.config import Config
from diffusion.data import load_dataset
from diffusion.feature_fitting import with_features
from diffusion.presets import preset
from diffusion.training import Diverged, Progress, Training

NUM_TRIALS, NUM_REPEATED, NUM_SEEDS = 24, 6, 3
# What the seeds train with: DDPM's linear schedule.
DEFAULTS = {"schedule.num_train_timesteps": 1000, "schedule.beta_start": 1e-4, "schedule.beta_end": 0.02}


def base_config(data: str, num_updates: int | None) -> Config:
    """What all trials share. Folders of images: 14x14, a U-Net of 0.2M parameters, 20 steps of 2M."""
    path = Path(data)
    if not path.is_dir():
        config = preset(data)
    else:
        config = preset(data, 14).with_values(
            {
                "network.base_channels": 16,
                "sampler.name": "dpmpp_2m",
                "sampler.num_steps": 20,
                "training.num_updates": 1500,
                "metrics.num_samples": 256,
            }
        )
    return config.with_values({"training.num_updates": num_updates}) if num_updates else config


def draw_values(points: bool) -> list[dict[str, Any]]:
    """The trials' own values: the default search space of tune.py, at random."""
    rng = np.random.default_rng(0)
    drawn = [dict(DEFAULTS)]
    while len(drawn) < NUM_TRIALS:
        values: dict[str, Any] = {
            "schedule.num_train_timesteps": int(rng.choice([50, 100, 200, 500, 1000])),
            "schedule.beta_start": float(np.exp(rng.uniform(np.log(1e-5), np.log(1e-3)))),
            "schedule.beta_end": float(np.exp(rng.uniform(np.log(5e-3), np.log(0.3)))),
            "network.time_embedding_size": int(rng.choice([16, 32, 64, 128])),
            "training.learning_rate": float(np.exp(rng.uniform(np.log(3e-4), np.log(3e-3)))),
        }
        data_embedding_size = int(rng.choice([16, 32, 64]))
        if points:
            values["network.data_embedding_size"] = data_embedding_size
        drawn.append(values)
    return drawn


def train(config: Config, folder: Path) -> None:
    """Train a config and leave its model and the metrics of each evaluation in a folder."""
    torch.set_num_threads(1)
    history: list[dict[str, Any]] = []

    def report(progress: Progress) -> None:
        history.append({"update": progress.updates, **progress.metrics})
        progress.model.save(folder)

    folder.mkdir(parents=True, exist_ok=True)
    try:
        Training(config, with_features(load_dataset(config.data), "auto"), report).run()
    except Diverged:
        pass
    (folder / "history.json").write_text(json.dumps(history))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-updates", type=int)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    base = base_config(options.data, options.num_updates)
    dataset = with_features(load_dataset(base.data), "auto")  # trains the classifier once, for all
    jobs = []
    for number, values in enumerate(draw_values(dataset.spec.kind == "points")):
        repeated = number % (NUM_TRIALS // NUM_REPEATED) == 0
        jobs += [(number, seed, values) for seed in range(NUM_SEEDS if repeated else 1)]
    jobs.sort(key=lambda job: job[1])  # every config once before any is repeated
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        futures = []
        for number, seed, values in jobs:
            folder = options.output / f"{number:02d}-{seed}"
            if not (folder / "history.json").exists():
                futures.append(pool.submit(train, base.with_values({**values, "seed": seed}), folder))
        for place, future in enumerate(futures, start=1):
            future.result()
            print(f"{place}/{len(futures)}", flush=True)


if __name__ == "__main__":
    main()
