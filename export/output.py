"""Writes samples to files: pictures, arrays and tables. Needs only numpy and Pillow."""

import csv
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.files import path_kind, replacing
from diffusion.plots import IMAGE_CHANNELS, draw_samples
from export.contract import SamplerSpec

_MAX_PATH_COLUMNS = 16


def save_samples(
    samples: NDArray[np.float32],
    spec: SamplerSpec,
    path: Path,
    *,
    labels_cycle: bool = True,
    is_path: bool = False,
) -> None:
    """Write samples in the format of the path's suffix: .png (grid or scatter plot), .npy or .csv (points).

    Args:
        samples: [batch, *shape] in data units.
        spec: spec of the sampler that drew them.
        path: path of the file.
        labels_cycle: for a conditional model, whether the samples' labels cycle through the classes; a
            picture then shows which class each sample has.
        is_path: whether the samples lead from one to another; a picture then has them in rows of up to 16.

    Raises:
        InputError: the suffix is another one, .csv is given for images, or the path cannot be written.
    """
    suffix = check_suffix(path, spec)
    try:
        with replacing(path) as part:
            if suffix == ".png":
                draw_samples(
                    samples,
                    spec.data["range"],
                    title=f"{len(samples)} samples",
                    num_classes=len(spec.classes) if labels_cycle else 0,
                    columns=min(len(samples), _MAX_PATH_COLUMNS) if is_path else None,
                ).save(part)
            else:
                _write_values(samples, spec, part, suffix)
    except OSError as error:
        raise InputError(
            f"--output {path} cannot be written ({error.strerror}): choose another path"
        ) from error


def _write_values(samples: NDArray[np.float32], spec: SamplerSpec, path: Path, suffix: str) -> None:
    if suffix == ".npy":
        np.save(path, samples)
        return
    columns = spec.data.get("columns") or [f"x{index}" for index in range(samples.shape[1])]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        # The shortest text of each float32: 1.4, where Python's float has 1.399999976158142.
        writer.writerows(row.astype(str) for row in samples)


def check_suffix(path: Path, spec: SamplerSpec) -> str:
    """Check that samples can be written to a path, and return its suffix.

    Raises:
        InputError: the suffix is not one for these samples, or the path cannot be written.
    """
    allowed = [".png", ".npy"] if spec.data["kind"] == "image" else [".png", ".npy", ".csv"]
    if path.suffix not in allowed:
        raise InputError(f"--output {path}: give a file ending in {', '.join(allowed)}")
    if path.suffix == ".png" and spec.data["kind"] == "image" and spec.shape[0] not in IMAGE_CHANNELS:
        raise InputError(
            f"--output {path}: images of {spec.shape[0]} channels are no pictures; give a file ending in .npy"
        )
    check_output(path)
    return path.suffix


def check_output(path: Path) -> None:
    """Check that a file can be written, so that the command fails before it does any work.

    Raises:
        InputError: the file cannot be written.
    """
    folder = path.absolute().parent
    if path_kind(folder) != "folder":
        raise InputError(f"--output {path}: the folder {path.parent} does not exist; create it first")
    kind = path_kind(path)
    if kind not in ("file", None):
        raise InputError(
            f"--output {path} is a {'folder' if kind == 'folder' else 'device'}: give the path of a file"
        )
    if not os.access(path if kind == "file" else folder, os.W_OK):
        raise InputError(f"--output {path} is not writable: choose another path")
