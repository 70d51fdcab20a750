"""A trained model on disk: `config.json` and `model.safetensors`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion.config import Config
from diffusion.data import DataSpec
from diffusion.errors import InputError
from diffusion.files import replacing
from diffusion.generation import deployed_table
from diffusion.networks import build_network
from diffusion.sampling import SamplerTable
from diffusion.schedules import NoiseSchedule

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TrainedModel:
    """A denoiser with all that is needed to sample from it.

    Attributes:
        config: what it was trained with.
        data: normalisation, shape and range of its data.
        network: the denoiser with averaged weights, in evaluation mode.
        provenance: where it comes from: run id, metrics and the like; plain values.
    """

    config: Config
    data: DataSpec
    network: nn.Module
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule it was trained on."""
        return self.config.schedule.build()

    @cached_property
    def table(self) -> SamplerTable:
        """The deployed sampler."""
        return deployed_table(self.config.sampler, self.schedule, self.data.clip, self.config.prediction_type)

    def save(self, directory: Path) -> None:
        """Write both files into a folder, made if need be; each appears whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()
        }
        with replacing(directory / "model.safetensors") as part:
            save_file(weights, part)
        tree = {
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "data": self.data.to_dict(),
            "provenance": dict(self.provenance),
        }
        with replacing(directory / "config.json") as part:
            part.write_text(json.dumps(tree, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "TrainedModel":
        """Read what `save` wrote, on the CPU.

        Raises:
            InputError: a file is missing, damaged, or of another format.
        """
        for name in ("config.json", "model.safetensors"):
            if not (directory / name).is_file():
                raise InputError(
                    f"{directory} holds no {name}: give a folder with config.json and model.safetensors, "
                    "such as runs/NAME/champion or runs/NAME/trials/ID"
                )
        try:
            tree = json.loads((directory / "config.json").read_text())
            if tree["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"format {tree['format_version']}, where this version reads format {FORMAT_VERSION}"
                )
            config = Config.from_dict(tree["config"])
            data = DataSpec.from_dict(tree["data"])
            provenance = dict(tree["provenance"])
            network = build_network(config, data.shape)
            network.load_state_dict(load_file(directory / "model.safetensors"))
            model = cls(config, data, network.eval().requires_grad_(False), provenance)
            _ = model.table  # a clip interval that is none fails here
            if data.denormalise(np.zeros((1, *data.shape)))[0].shape != data.shape:
                raise InputError("mean and std do not fit the shape")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{directory} holds no model that can be used ({first_line}): train or copy it again"
            ) from error
        return model
