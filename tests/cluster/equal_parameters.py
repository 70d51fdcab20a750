"""Run on the head: two workers train together; each writes its host and a digest of its parameters."""

import hashlib
import json
import socket
import sys
from pathlib import Path

import ray
from ray.train import ScalingConfig, get_context
from ray.train.torch import TorchTrainer

from diffusion.data.dataset import load_dataset
from diffusion.presets import preset
from diffusion.training.loop import Training
from workflows.ray_runtime.session import start_ray


def train(arguments):
    training = Training(arguments["config"], ray.get(arguments["dataset"]), lambda progress: None)
    training.run()
    digest = hashlib.sha256()
    for name, value in sorted(training.train_step.network.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    path = Path(arguments["folder"]) / f"{get_context().get_world_rank()}.json"
    path.write_text(json.dumps({"host": socket.gethostname(), "digest": digest.hexdigest()}))


def main(folder):
    Path(folder).mkdir(parents=True)
    start_ray(verbose=False)
    config = preset("heart").with_values({"training.num_updates": 40})
    dataset = load_dataset(config.data)
    config = config.resolve_epochs(len(dataset.train))
    TorchTrainer(
        train,
        train_loop_config={"config": config, "dataset": ray.put(dataset), "folder": folder},
        scaling_config=ScalingConfig(
            num_workers=2, resources_per_worker={"CPU": 1}, placement_strategy="STRICT_SPREAD"
        ),
    ).fit()
    print("both trained")


if __name__ == "__main__":
    main(sys.argv[1])
