"""A trained model on disk, `config.json` and `model.safetensors`, and a training that can go on from it."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.config import Config
from diffusion.data import DataSpec
from diffusion.errors import InputError
from diffusion.files import replacing
from diffusion.generation import deployed_table
from diffusion.manifest import Damaged, read_manifest, write_manifest
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
        _save_tensors(directory / "model.safetensors", self.network.state_dict())
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
            network = build_network(config, data.shape, data.num_classes)
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


@dataclass(frozen=True, eq=False)
class TrainingState:
    """All that a training needs, beside its averaged weights, to go on as if it had not stopped.

    Attributes:
        update: optimizer steps done.
        network: live weights by name.
        optimizer: its state dict.
        scaler: the gradient scaler's; None without one.
        ema_updates: averagings done.
        random: how the randomness of every rank and the order of the data continue; numbers, texts,
            tensors, and lists, tuples and dicts of these.
        history: one dict an evaluation, {"update", "metrics"}; plain values.
        loss_sum: of the updates since the last evaluation.
        losses: how many these are.
    """

    update: int
    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    ema_updates: int
    random: dict[str, Any]
    history: list[dict[str, Any]]
    loss_sum: float
    losses: int


# What stands in state.pt: the live weights and the history have files of their own.
_STATE = ("update", "optimizer", "scaler", "ema_updates", "random", "loss_sum", "losses")


def write_checkpoint(
    directory: Path, model: TrainedModel, state: TrainingState, facts: Mapping[str, Any]
) -> None:
    """Write a training into an empty folder, made if need be; the disk holds it when this returns.

    Files: config.json and model.safetensors (the averaged weights, as `TrainedModel.save` writes them),
    network.safetensors (the live ones), state.pt, history.json, and last manifest.json.

    Args:
        directory: where.
        model: the denoiser with averaged weights.
        state: the rest.
        facts: plain values for the manifest, such as the objective.

    Raises:
        OSError: the disk is full or failing.
        TypeError: the state holds what could not be read again, such as a numpy number.
    """
    model.save(directory)
    _save_tensors(directory / "network.safetensors", state.network)
    _save_state(directory / "state.pt", {name: getattr(state, name) for name in _STATE})
    with replacing(directory / "history.json") as part:
        part.write_text(json.dumps(state.history, indent=2) + "\n")
    write_manifest(directory, facts)


def read_checkpoint(directory: Path) -> tuple[TrainedModel, TrainingState, dict[str, Any]]:
    """The model, the rest of its training, and the manifest's facts, on the CPU.

    Raises:
        Damaged: a file is missing or not as it was written, or the folder holds something else.
    """
    facts = read_manifest(directory)
    name = "config.json and model.safetensors"
    try:
        model = TrainedModel.load(directory)
        name = "network.safetensors"
        network = load_file(directory / name)
        name = "history.json"
        history = json.loads((directory / name).read_text())
        if not isinstance(history, list):
            raise TypeError("no list")
        name = "state.pt"
        rest = torch.load(directory / name, map_location="cpu", weights_only=True)
        state = TrainingState(network=network, history=history, **{field: rest[field] for field in _STATE})
    except MemoryError:
        raise
    except Exception as error:  # a file of the right sha256 but of something else may lead to any
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(
            f"{directory} holds no training to go on from ({name}: {first_line}): give a checkpoint"
        ) from error
    return model, state, facts


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: the disk is full or failing.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        try:
            save_file(on_cpu, part)
        except SafetensorError as error:  # its own exception hides the system's
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _save_state(path: Path, tree: Mapping[str, Any]) -> None:
    """Write what is no plain table of tensors, such that it can be read without running any code.

    Raises:
        OSError: the disk is full or failing.
        TypeError: a value of a type that needs code.
    """
    with replacing(path) as part:
        try:
            with part.open("wb") as file:
                torch.save(dict(tree), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides it behind one of its own
                raise error.__context__ from None
            raise
        if types := torch.serialization.get_unsafe_globals_in_checkpoint(part):
            raise TypeError(
                f"a training's state holds {', '.join(types)}: make plain values or tensors of it"
            )
