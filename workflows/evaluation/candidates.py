"""What `ray-ddpm evaluate` judges: samples that a model draws, or that another program made."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffusion.array_file import read_array
from diffusion.config import DataConfig
from diffusion.data.image_folder import ImageFolder
from diffusion.data.memory import raw_from_array
from diffusion.data.sources import RawData
from diffusion.data.tables import read_frame, table_from_frame
from diffusion.errors import InputError
from diffusion.files import path_kind, user_path
from export.registered import REGISTRY
from export.sampler import Sampler
from workflows.cli.model_reference import MODEL_FOLDERS, describe_examples

if TYPE_CHECKING:
    from diffusion.data.dataset import DataSpec

MIN_SAMPLES = 20
_TABLES = (".csv", ".parquet")


@dataclass(frozen=True, eq=False)
class Candidate:
    """Samples to judge.

    Attributes:
        name: what the user called it.
        samples: float64 [samples, *shape] in data units.
        trained_on: fingerprint of the data and split that its model was trained on; None if it is unknown.
    """

    name: str
    samples: NDArray[np.float64]
    trained_on: str | None = None


@dataclass(frozen=True)
class Draw:
    """How models draw samples: their number, and arguments of `export.Sampler.sample`."""

    num_samples: int
    options: dict[str, Any]
    provider: Any = "auto"


def open_candidate(name: str) -> Callable[["DataSpec", Draw], Candidate]:
    """Find out what a candidate is, without reading it.

    Args:
        name: path of a sampler.onnx, of a folder with one or of a run, of a table, a .npy array, a folder of
            images or of .npy arrays; or the URI of a model in MLflow's registry.

    Returns:
        Function that reads or draws its samples.

    Raises:
        InputError: there is no such file or folder, or it is none of these.
    """
    if name.startswith(REGISTRY):
        return lambda spec, draw: _drawn(name, Sampler.from_registry(name, draw.provider), spec, draw)
    path = user_path(name)
    kind = path_kind(path)
    if (model := _model_file(path)) is not None:
        return lambda spec, draw: _drawn(name, Sampler(model, draw.provider), spec, draw)
    if (path.suffix in _TABLES and kind is not None) or (path.suffix == ".npy" and kind == "file"):
        return lambda spec, draw: _read(name, [path], spec)
    if kind == "folder":
        arrays = sorted(path.glob("*.npy"))
        return lambda spec, draw: _read(name, arrays or [path], spec)
    problem = "there is no such file or folder" if kind is None else "this file is none of these"
    raise InputError(
        f"{name}: {problem}; give a sampler.onnx, the folder of a run, samples as .csv, .parquet, .npy or a "
        f"folder of images, or {REGISTRY}NAME@ALIAS"
    )


def _model_file(path: Path) -> Path | None:
    if path.suffix == ".onnx" and path_kind(path) == "file":
        return path
    files = [path / folder / "sampler.onnx" for folder in MODEL_FOLDERS]
    return next((file for file in files if path_kind(file) == "file"), None)


def _drawn(name: str, sampler: Sampler, spec: "DataSpec", draw: Draw) -> Candidate:
    """Samples of a model."""
    theirs = sampler.spec
    if theirs.data["kind"] != spec.kind or tuple(theirs.shape) != spec.shape:
        raise InputError(
            f"{name} draws {describe_examples(theirs.data['kind'], theirs.shape)}, and the data are "
            f"{describe_examples(spec.kind, spec.shape)}: give the data that it was trained on"
        )
    samples = sampler.sample(draw.num_samples, **draw.options).astype(np.float64)
    fingerprint = theirs.provenance.get("data_fingerprint")
    return Candidate(name, samples, None if fingerprint is None else str(fingerprint))


def _read(name: str, paths: list[Path], spec: "DataSpec") -> Candidate:
    """Samples of files."""
    read = _read_points if spec.kind == "points" else _read_images
    samples = np.concatenate([read(path, spec) for path in paths])
    if samples.shape[1:] != spec.shape:
        raise InputError(
            f"{name} holds {describe_examples(spec.kind, samples.shape[1:])}, and the data are "
            f"{describe_examples(spec.kind, spec.shape)}: give samples of the same shape"
        )
    if len(samples) < MIN_SAMPLES:
        raise InputError(f"{name} holds {len(samples)} samples: too few to judge; give {MIN_SAMPLES} or more")
    return Candidate(name, samples)


def _read_points(path: Path, spec: "DataSpec") -> NDArray[np.float64]:
    """Rows of a table, in the order of the data's columns."""
    if path.is_dir() and path.suffix not in _TABLES:
        raise InputError(f"{path} is a folder of no arrays, and the data are points: give a table")
    frame = read_frame(path)
    columns = list(spec.columns or ())
    if path.suffix == ".npy":  # its columns have no names
        return table_from_frame(frame, str(path)).values
    missing = [column for column in columns if column not in map(str, frame.columns)]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]}, which the data have: give samples with the columns "
            f"{', '.join(columns)}"
        )
    frame.columns = [str(column) for column in frame.columns]
    return table_from_frame(frame[columns], str(path)).values


def _read_images(path: Path, spec: "DataSpec") -> NDArray[np.float64]:
    """Images of a folder, which are resized like those of the data, or of an array."""
    assert spec.range is not None
    raw: RawData
    if path.is_dir():
        config = DataConfig(name=str(path.absolute()), image_size=spec.shape[-1])
        raw = ImageFolder(config).load()
    elif path.suffix in _TABLES:
        raise InputError(f"{path} is a table, and the data are images: give a folder of images, or .npy")
    else:
        raw = raw_from_array(read_array(path, "samples as numpy.save writes them"), float_range=spec.range)
    if raw.value_range is None:
        raise InputError(f"{path} holds points, and the data are images: give images")
    (low, high), (from_low, from_high) = spec.range, raw.value_range
    values = low + (raw.values.astype(np.float64) - from_low) * ((high - low) / (from_high - from_low))
    return values if values.shape[1] == spec.shape[0] or values.shape[1] > 1 else values.repeat(3, axis=1)
