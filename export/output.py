"""Samples written to files: pictures, arrays and tables. Needs numpy and Pillow alone."""

import csv
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.files import replacing
from diffusion.plots import draw_samples
from export.spec import SamplerSpec


def save_samples(
    samples: NDArray[np.float32], spec: SamplerSpec, path: Path, *, in_turn: bool = True
) -> None:
    """Write samples by the suffix of `path`: .png (grid or scatter), .npy, or .csv (points).

    Args:
        samples: [batch, *shape] in data units.
        spec: of the sampler that drew them.
        path: the file.
        in_turn: whether they are of every class in turn, where the model is conditional.

    Raises:
        InputError: another suffix, .csv for images, or a place that cannot be written.
    """
    suffix = check_suffix(path, spec)
    try:
        with replacing(path) as part:
            _write(samples, spec, part, suffix, len(spec.classes) if in_turn else 0)
    except OSError as error:
        raise InputError(
            f"--output {path} cannot be written ({error.strerror}): choose another place"
        ) from error


def _write(
    samples: NDArray[np.float32], spec: SamplerSpec, path: Path, suffix: str, num_classes: int
) -> None:
    if suffix == ".npy":
        np.save(path, samples)
    elif suffix == ".csv":
        columns = spec.data.get("columns") or [f"x{index}" for index in range(samples.shape[1])]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(samples.tolist())
    else:
        title = f"{len(samples)} samples"
        draw_samples(samples, spec.data["range"], title=title, num_classes=num_classes).save(path)


def check_suffix(path: Path, spec: SamplerSpec) -> str:
    """The suffix of a path that samples can be written to.

    Raises:
        InputError: another suffix, or a place that cannot be written.
    """
    allowed = [".png", ".npy"] if spec.data["kind"] == "image" else [".png", ".npy", ".csv"]
    if path.suffix not in allowed:
        raise InputError(f"--output {path}: give a file ending in {', '.join(allowed)}")
    check_output(path)
    return path.suffix


def check_output(path: Path) -> None:
    """Find out before the work whether a file can be written.

    Raises:
        InputError: it cannot.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"--output {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: give the name of a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"--output {path} must not be written: choose another place")
