"""Trained models on disk (`config.json` and `model.safetensors`), and checkpoints to resume training from."""

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.config import Config
from diffusion.data.dataset import DataSpec
from diffusion.data.low_resolution import LowResolution, noised_by_seed
from diffusion.errors import InputError
from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.files import FormatError, check_format, path_kind, read_json, replacing, user_path
from diffusion.json_values import check_types
from diffusion.manifest import DamagedError, read_manifest, write_manifest
from diffusion.metrics import OBJECTIVE
from diffusion.networks.build import build_network
from diffusion.process.generate import cycling_condition, generate
from diffusion.process.given import GivenOptions, resolve_given
from diffusion.process.samplers import SamplerTable
from diffusion.process.schedules import NoiseSchedule
from diffusion.seeding import seed_of
from diffusion.training.best_evaluation import BestEvaluation

FORMAT_VERSION = 1
# Types of the parts of a model's provenance that are read, if they are there.
_PROVENANCE_HINTS = {
    "run_id": str | None,
    "trial_id": str | None,
    "update": int | None,
    "metrics": dict[str, float],
    "decision": list[str] | None,
    "samplers": dict[str, Any] | None,
    "command": str,
    "packages": dict[str, str | None],
    "hardware": dict[str, Any],
    "git_revision": str | None,
    "git_clean": bool | None,
}


@dataclass(frozen=True)
class TrainedModel:
    """A denoiser with everything that is needed to sample from it.

    Attributes:
        config: the config that it was trained with.
        data: normalisation, shape and range of its data.
        network: the denoiser with averaged weights, in evaluation mode.
        provenance: plain values such as the run id and metrics.
    """

    config: Config
    data: DataSpec
    network: nn.Module
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> "TrainedModel":
        """Copy on another device."""
        return replace(self, network=copy.deepcopy(self.network).to(device))

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the network was trained on."""
        return self.config.schedule.build()

    @cached_property
    def table(self) -> SamplerTable:
        """The sampler of the config."""
        return self.config.sampler.build(self.schedule, self.data.clip, self.config.prediction_type)

    def sample(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        labels: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        low_resolution: NDArray[Any] | None = None,
        **given: Unpack[GivenOptions],
    ) -> NDArray[np.float32]:
        """Draw samples with PyTorch, on the network's device, by the sampler of the config.

        The noise is PyTorch's: the exported `sampler.onnx` draws other samples from the same seed.

        Args:
            num_samples: number of samples, at least 1.
            seed: seed of the noise.
            labels: for a conditional model, the class number of each sample; None cycles through them.
            guidance_scale: for a conditional model, strength of classifier-free guidance; None: the config's.
            low_resolution: for a super-resolution model, the image of each sample, [num_samples, C, H, W] in
                data units. Noise is added as the config says.
            given: `known`, `mask`, `resampling`, `jump_length`, `start_from` and `strength`, in data units
                and as for `export.Sampler.sample`: a known part of the samples, or samples to start from.

        Returns:
            float32 [num_samples, *shape] in data units.

        Raises:
            InputError: labels, guidance or low-resolution images are given for a model that takes none, they
                do not fit, or what is given of the samples does not fit the data or is out of range.
        """
        num_classes = self.data.num_classes
        if num_samples < 1:
            raise InputError(f"num_samples {num_samples}: give 1 or more")
        if not num_classes and not (labels is None and guidance_scale is None):
            raise InputError("labels and guidance_scale: this model has no classes; leave them out")
        if labels is not None and (
            len(labels) != num_samples or not all(0 <= label < num_classes for label in labels)
        ):
            raise InputError(f"labels: give {num_samples} numbers from 0 to {num_classes - 1}")
        scale = self.config.sampler.guidance_scale if guidance_scale is None else guidance_scale
        condition = cycling_condition(num_samples, num_classes, scale)
        if condition is not None and labels is not None:
            condition = replace(condition, labels=torch.tensor(labels))
        device = next(self.network.parameters()).device
        inputs = self._low_resolution_inputs(low_resolution, num_samples, seed)
        checked = resolve_given(num_samples, self.data.units, **given)
        every = slice(num_samples)
        inpainting = checked.inpainting(every)
        samples = generate(
            self.network,
            self.table,
            self.data.shape,
            num_samples,
            seed=seed,
            device=device,
            condition=condition,
            inputs=[each.to(device) for each in inputs],
            inpainting=None if inpainting is None else inpainting.map(partial(_float32, device=device)),
            x_0=None if checked.x_0 is None else _float32(checked.x_0, device),
            strength=checked.strength,
        )
        data = self.data.denormalise(samples.cpu().numpy())
        return checked.restore(data, every).astype(np.float32)

    def _low_resolution_inputs(
        self, images: NDArray[Any] | None, num_samples: int, seed: int
    ) -> tuple[Tensor, ...]:
        side = self.config.data.low_resolution
        if side is None:
            if images is not None:
                raise InputError("low_resolution: this is no super-resolution model; leave it out")
            return ()
        low_resolution = LowResolution(self.data, side)
        shape = (num_samples, *low_resolution.shape)
        if images is None or images.shape != shape:
            raise InputError(f"low_resolution: this is a super-resolution model; give images {list(shape)}")
        return noised_by_seed(
            low_resolution.normalised(images), self.config.sampler.low_resolution_noise, seed_of(seed, 1)
        )

    def with_weights(self, weights: Mapping[str, Tensor]) -> "TrainedModel":
        """A copy with a network of its own that has these weights, on the CPU."""
        network = build_network(self.config, self.data.shape, self.data.num_classes)
        network.load_state_dict(weights)
        return replace(self, network=network.eval().requires_grad_(False))

    def save(self, directory: Path) -> None:
        """Write both files into a folder, which is created if missing; each is written atomically."""
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
    def load(cls, directory: str | Path) -> "TrainedModel":
        """Load the model that `save` wrote, onto the CPU.

        Args:
            directory: folder with config.json and model.safetensors, such as runs/NAME/champion.

        Raises:
            InputError: a file is missing or damaged.
            FormatError: only another version of ray-ddpm can read the model.
        """
        directory = user_path(directory)
        for name in ("config.json", "model.safetensors"):
            if path_kind(directory / name) != "file":
                raise InputError(
                    f"{directory} holds no {name}: give a folder with config.json and model.safetensors, "
                    "such as runs/NAME/champion or runs/NAME/trials/ID"
                )
        try:
            tree = read_json(directory / "config.json", "the folder of a model")
            check_types(tree, {"provenance": dict[str, Any], "data": dict[str, Any]}, "")
            writer = dict(tree["provenance"].get("packages", {})).get("ray-ddpm")
            check_format(directory / "config.json", tree["format_version"], [FORMAT_VERSION], writer)
            check_types(tree["provenance"], _PROVENANCE_HINTS, "provenance.")
            config = Config.from_dict(tree["config"])
            data = DataSpec.from_dict(tree["data"])
            provenance = dict(tree["provenance"])
            network = build_network(config, data.shape, data.num_classes)
            network.load_state_dict(load_file(directory / "model.safetensors"))
            model = cls(config, data, network.eval().requires_grad_(False), provenance)
            _ = model.table  # fails if the clip interval is invalid
        except FormatError:
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            OSError,
            SafetensorError,
        ) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{directory} holds no usable model ({first_line}): train or copy it again"
            ) from error
        return model


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Everything, in addition to the averaged weights, that a training needs to resume exactly.

    Attributes:
        update: number of optimizer steps done.
        network: weights that the optimizer updates, by name.
        optimizer: state dict of the optimizer.
        scaler: state dict of the gradient scaler; None without one.
        ema_updates: number of averaging steps done.
        random: state from which the random draws continue; numbers, strings, tensors, and lists, tuples
            and dicts of these.
        history: one dict {"update", "metrics"} per evaluation; plain values.
        loss_sum: sum of the losses of the updates since the last evaluation.
        losses: number of the updates since the last evaluation.
        best: the best evaluation so far; None before the first one, and in checkpoints of earlier versions.
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
    best: BestEvaluation | None = None


# Fields stored in state.pt as they are; the weights and the history have their own files.
_BEST_WEIGHTS = "best.safetensors"
_STATE_FIELDS = ("update", "optimizer", "scaler", "ema_updates", "random", "loss_sum", "losses")


def write_checkpoint(
    directory: Path, model: TrainedModel, state: TrainingState, facts: Mapping[str, Any]
) -> None:
    """Write a checkpoint into an empty folder, created if missing; it is synced to disk on return.

    Files: config.json and model.safetensors (the averaged weights, as written by `TrainedModel.save`),
    network.safetensors (the weights that the optimizer updates), best.safetensors (the averaged weights at
    the best evaluation, unless that is the last and nothing has been trained since), state.pt, history.json,
    and finally manifest.json.

    Args:
        directory: the folder.
        model: the denoiser with averaged weights.
        state: the rest of the training's state.
        facts: plain values for the manifest, such as the objective.

    Raises:
        OSError: the disk is full or failing.
        TypeError: the state contains a value that could not be read back, such as a numpy number.
    """
    model.save(directory)
    _save_tensors(directory / "network.safetensors", state.network)
    best = state.best
    if best is not None and best.update != state.update:
        _save_tensors(directory / _BEST_WEIGHTS, best.weights)
    fields = {name: getattr(state, name) for name in _STATE_FIELDS}
    _save_state(directory / "state.pt", fields | {"best": best and _best_to_plain(best)})
    with replacing(directory / "history.json") as part:
        part.write_text(json.dumps(state.history, indent=2) + "\n")
    write_manifest(directory, facts)


def read_checkpoint(directory: Path) -> tuple[TrainedModel, TrainingState, dict[str, Any]]:
    """The model, the state of its training, and the manifest's facts, on the CPU.

    Raises:
        DamagedError: a file is missing or differs from what was written, or the folder is no checkpoint.
        FormatError: only another version of ray-ddpm can read the checkpoint.
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
            raise TypeError("not a list")
        name = "state.pt"
        rest = torch.load(directory / name, map_location="cpu", weights_only=True)
        fields = {field: rest[field] for field in _STATE_FIELDS}
        best = None
        if rest.get("best") is not None:
            is_newest = rest["best"]["update"] == fields["update"]
            name = "model.safetensors" if is_newest else _BEST_WEIGHTS
            best = _best_from_plain(rest["best"], load_file(directory / name))
        state = TrainingState(network=network, history=history, best=best, **fields)
    except (MemoryError, FormatError):
        raise
    except Exception as error:  # wrong content with a right sha256 can raise anything
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(
            f"{directory} holds no training to resume from ({name}: {first_line}): give a checkpoint"
        ) from error
    return model, state, facts


def best_model(model: TrainedModel, state: TrainingState) -> TrainedModel:
    """The trained model of a checkpoint: that of the best evaluation so far.

    Args:
        model: the model of the checkpoint, with the averaged weights of its last update. It is returned
            as it is if they are the best, and if the checkpoint is one of an earlier version.
        state: the state of the checkpoint.
    """
    best = state.best
    return model if best is None or best.update == state.update else model.with_weights(best.weights)


def _float32(values: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)  # copies, since views are read-only


def _best_to_plain(best: BestEvaluation) -> dict[str, Any]:
    """A best evaluation as plain values and tensors, without its weights."""
    lowest, per_example = best.lowest, best.lowest.per_example
    return {
        "update": best.update,
        OBJECTIVE: best.objective,
        "lowest": lowest.value,
        "lowest_se": lowest.standard_error,
        "lowest_per_example": None if per_example is None else torch.from_numpy(per_example),
    }


def _best_from_plain(tree: Mapping[str, Any], weights: dict[str, Tensor]) -> BestEvaluation:
    per_example = tree["lowest_per_example"]
    lowest = MeasuredObjective(
        tree["lowest"], tree["lowest_se"], None if per_example is None else per_example.numpy()
    )
    return BestEvaluation(tree["update"], tree[OBJECTIVE], weights, lowest)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: the disk is full or failing.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        part.touch()
        mode = part.stat().st_mode  # that of other new files; save_file lets nobody else read its own
        try:
            save_file(on_cpu, part)
            part.chmod(mode)
        except SafetensorError as error:  # it hides the OSError behind its own exception
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _save_state(path: Path, tree: Mapping[str, Any]) -> None:
    """Write nested plain values and tensors, so that reading them runs no code.

    Raises:
        OSError: the disk is full or failing.
        TypeError: the type of a value needs code to be read.
    """
    with replacing(path) as part:
        try:
            with part.open("wb") as file:
                torch.save(dict(tree), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides it behind its own exception
                raise error.__context__ from None
            raise
        if types := torch.serialization.get_unsafe_globals_in_checkpoint(part):
            raise TypeError(
                f"a training's state contains {', '.join(types)}: convert it to plain values or tensors"
            )
