"""Reads what a command line gives of the samples: images, masks and tables. Needs only numpy and Pillow."""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.array_file import read_array
from diffusion.data.image_reading import channels_of, read_pixels, to_array
from diffusion.errors import InputError, nearest
from diffusion.files import path_kind, user_path
from diffusion.memory_limit import check_memory
from diffusion.process.given import check_strength
from export.contract import SamplerSpec

DEFAULT_NUM_SAMPLES, DEFAULT_NUM_FRAMES = 64, 8

_WHITE = 128  # of 255: a mask's pixels from here on are white
_FLAGS = ("known", "mask", "start_from_image", "interpolate", "resampling", "jump_length", "strength")


@dataclass(frozen=True, eq=False)
class GivenFiles:
    """What the files of a command line say about the samples.

    Attributes:
        num_samples: number of samples, or of frames between two.
        arguments: keyword arguments of `export.sampler.Sampler.sample`, or, with `ends`, of `interpolate`.
        ends: the two samples between which a path is drawn, or None.
        notes: lines about the files, for the user.
    """

    num_samples: int
    arguments: dict[str, Any]
    ends: tuple[NDArray[np.float64], NDArray[np.float64]] | None
    notes: list[str]


def check_given_flags(options: argparse.Namespace) -> None:
    """Check the flags about known parts and samples to start from, before the model is opened.

    Raises:
        InputError: a flag is given without the one that it belongs to or beside one that excludes it, a
            number is out of range, or a file does not exist.
    """
    given = {name for name in _FLAGS if getattr(options, name) is not None}
    for name, needed in (
        ("mask", ("known",)),
        ("resampling", ("known",)),
        ("jump_length", ("resampling",)),
        ("strength", ("start_from_image", "interpolate")),
    ):
        if name in given and not given.intersection(needed):
            needs = " or ".join(map(_flag, needed))
            raise InputError(f"{_flag(name)}: it needs {needs}; give that too, or leave {_flag(name)} out")
    if "interpolate" in given and (others := given & {"known", "start_from_image"}):
        raise InputError(f"--interpolate: it does not go with {_flag(min(others))}; give one of them")
    if options.strength is not None:
        check_strength(options.strength)
    files = [options.known, options.mask, options.start_from_image, *(options.interpolate or ())]
    for path in files:
        if path is not None and (kind := path_kind(user_path(path))) != "file":
            reason = "does not exist" if kind is None else "is no file"
            raise InputError(f"{path} {reason}: give an image, a .npy array or, for points, a .csv table")


def read_given(options: argparse.Namespace, spec: SamplerSpec) -> GivenFiles:
    """Read the files that a command line gives for the samples of a model.

    A file of several rows gives `--num-samples` samples for each of them, 1 by default.

    Raises:
        InputError: a file cannot be read, does not fit the model, or has empty cells where none may be.
    """
    if options.interpolate is not None:
        first, last = (_end(path, spec) for path in options.interpolate)
        num_frames = _or(options.num_samples, DEFAULT_NUM_FRAMES)
        return GivenFiles(num_frames, _strength(options), (first, last), [])
    found: dict[str, NDArray[np.float64]] = {}
    notes, arguments = [], _strength(options)
    if options.known is not None:
        known = _read(options.known, spec)
        if options.mask is not None:
            known = np.where(_read_mask(options.mask, spec), np.nan, known)
        found["known"] = known
        notes.append(_known_note(known, options.known, options.mask, spec))
        arguments |= {
            name: getattr(options, name)
            for name in ("resampling", "jump_length")
            if getattr(options, name) is not None
        }
    if options.start_from_image is not None:
        path = options.start_from_image
        found["start_from"] = _complete(_read(path, spec), path, "--start-from-image")
    num_rows = {len(array) for array in found.values() if array.ndim > len(spec.shape)}
    if len(num_rows) > 1:
        raise InputError(
            f"--known {options.known} has {len(found['known'])} rows and --start-from-image "
            f"{options.start_from_image} {len(found['start_from'])}: give as many in both"
        )
    if not num_rows:
        return GivenFiles(_or(options.num_samples, DEFAULT_NUM_SAMPLES), arguments | found, None, notes)
    if spec.classes and options.label is None and _scale(options, spec) != 0.0:
        raise InputError(
            "the rows to complete or vary need a class, since otherwise each gets another one: give --label, "
            "or --guidance-scale 0 for no class"
        )
    each = _or(options.num_samples, 1)
    if each < 1:
        raise InputError(f"--num-samples {each}: give 1 or more")
    count = num_rows.pop() * each
    check_memory(16.0 * count * spec.size, f"{count} samples", "give fewer rows, or a smaller --num-samples")
    arrays = {
        name: np.repeat(array, each, axis=0) if array.ndim > len(spec.shape) else array
        for name, array in found.items()
    }
    return GivenFiles(count, arguments | arrays, None, notes)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _or(number: int | None, default: int) -> int:
    return default if number is None else number


def _scale(options: argparse.Namespace, spec: SamplerSpec) -> float:
    scale = options.guidance_scale
    return float(spec.sampler["guidance_scale"] if scale is None else scale)


def _strength(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.strength is None else {"strength": options.strength}


def _known_note(known: NDArray[np.float64], path: Path, mask: Path | None, spec: SamplerSpec) -> str:
    """What is known, in a line; checks that something is known and something is not."""
    unknown = np.isnan(known)
    if mask is not None and (unknown.all() or not unknown.any()):
        colour, share = ("black", "all of it is drawn") if unknown.all() else ("white", "nothing is drawn")
        raise InputError(
            f"--mask {mask} has no {colour} pixel, so {share}: paint white what is to be drawn, and black "
            "what is known"
        )
    if not unknown.any():
        remedy = "leave the cells to draw empty" if spec.data["kind"] == "points" else "give --mask too"
        raise InputError(f"--known {path}: every value is known, so nothing is to be drawn; {remedy}")
    if unknown.all():
        raise InputError(f"--known {path}: every value is missing; leave --known out to draw whole samples")
    if mask is not None:
        pixels = ~unknown.reshape(-1, *spec.shape)[0, 0]
        return f"{path}: {pixels.sum()} of {pixels.size} pixels are known, those that are black in {mask}"
    num_rows = f"{len(known)} rows, " if known.ndim > len(spec.shape) else ""
    return f"{path}: {num_rows}{known.size - unknown.sum()} of {known.size} values are known"


def _end(path: Path, spec: SamplerSpec) -> NDArray[np.float64]:
    """The only sample of a file, [*shape]."""
    array = _complete(_read(path, spec), path, "--interpolate")
    if array.ndim == len(spec.shape):
        return array
    if len(array) != 1:
        raise InputError(f"--interpolate {path} has {len(array)} rows: give one")
    return array[0]


def _complete(array: NDArray[np.float64], path: Path, flag: str) -> NDArray[np.float64]:
    if np.isnan(array).any():
        raise InputError(f"{flag} {path} has empty cells or NaN: give every value")
    return array


def _read(path: Path, spec: SamplerSpec) -> NDArray[np.float64]:
    """Samples in data units, NaN where unknown: [*shape] of an image, else [rows, *shape]."""
    file = user_path(path)
    if file.suffix == ".npy":
        return _read_npy(file, spec)
    if spec.data["kind"] == "points":
        if file.suffix != ".csv":
            columns = ", ".join(_columns(spec)[:20])
            raise InputError(f"{path}: this model draws points with the columns {columns}; give a .csv table")
        return _read_csv(file, spec)
    if file.suffix in (".csv", ".parquet"):
        raise InputError(f"{path}: this model draws images; give an image or a .npy array")
    return _read_image(file, spec)


def _read_image(path: Path, spec: SamplerSpec) -> NDArray[np.float64]:
    channels, height, width = spec.shape
    if channels not in (1, 3):
        raise InputError(f"{path}: the model's images have {channels} channels; give a .npy array")
    image = read_pixels(path)
    _check_size(path, image.size, height, width)
    if channels == 1 and channels_of(image) == 3:
        colours = to_array(image, 3)
        if (colours != colours[:1]).any():
            raise InputError(
                f"{path} is in colour, but this model draws grey images: convert it to grey first"
            )
        return _data_units(colours[:1], spec)
    return _data_units(to_array(image, channels), spec)


def _data_units(pixels: NDArray[np.uint8], spec: SamplerSpec) -> NDArray[np.float64]:
    low, high = spec.data["range"]
    return low + pixels / 255.0 * (high - low)


def _read_mask(path: Path, spec: SamplerSpec) -> NDArray[np.bool_]:
    """Which pixels are drawn, [H, W]: those that are white."""
    if spec.data["kind"] != "image":
        raise InputError(f"--mask {path}: this model draws points; leave the cells to draw empty instead")
    image = read_pixels(user_path(path)).convert("L")
    _check_size(path, image.size, *spec.shape[1:])
    return np.asarray(image) >= _WHITE


def _check_size(path: Path, size: tuple[int, int], height: int, width: int) -> None:
    if size != (width, height):
        raise InputError(
            f"{path} has {size[0]} x {size[1]} pixels, but the model's images have {width} x {height}: "
            "resize or crop it first"
        )


def _read_npy(path: Path, spec: SamplerSpec) -> NDArray[np.float64]:
    array = read_array(path, "a file that numpy.save has written")
    if array.dtype.kind not in "biuf" or array.shape[-len(spec.shape) :] != spec.shape:
        raise InputError(
            f"{path} holds {array.dtype} {list(array.shape)}: give numbers of shape {list(spec.shape)} or "
            f"{['rows', *spec.shape]}".replace("'", "")
        )
    if array.ndim not in (len(spec.shape), len(spec.shape) + 1) or array.size == 0:
        raise InputError(f"{path} has shape {list(array.shape)}: give one sample, or rows of samples")
    return array.astype(np.float64)


def _columns(spec: SamplerSpec) -> list[str]:
    return spec.data.get("columns") or [f"x{index}" for index in range(spec.shape[0])]


def _read_csv(path: Path, spec: SamplerSpec) -> NDArray[np.float64]:
    """Points from a table, whose columns are matched by name; columns and cells that are missing are NaN."""
    check_memory(8.0 * path.stat().st_size, str(path), "give a part of it")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [line for line in csv.reader(file) if line] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a .csv table ({str(error)[:100]})") from error
    places = _places(path, header, spec)
    if not rows:
        raise InputError(f"{path} has no rows below its line of names: give one or more")
    values = np.full((len(rows), *spec.shape), np.nan)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise InputError(
                f"{path}: row {number} has {len(row)} cells, but the table has {len(header)} columns"
            )
        for place, name, cell in zip(places, header, row, strict=True):
            if cell.strip():
                values[number - 1, place] = _number(path, number, name, cell)
    return values


def _places(path: Path, header: Sequence[str], spec: SamplerSpec) -> list[int]:
    """Which column of the model each column of the table is."""
    columns = _columns(spec)
    places = []
    for name in header:
        found = name if name in columns else name.strip()
        if found not in columns:
            classes = "; classes are chosen with --label" if spec.classes else ""
            raise InputError(
                f"{path}: the model has no column {name[:60]!r}: {nearest(found, columns)[:200]}{classes}"
            )
        places.append(columns.index(found))
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise InputError(f"{path} has two columns called {columns[twice]}: give it once")
    return places


def _number(path: Path, row: int, column: str, cell: str) -> float:
    try:
        value = float(cell.replace("_", "?"))  # which float would ignore
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(
            f"{path}: row {row}, column {column} holds {cell[:40]!r}, not a finite number: fix the "
            "cell, or leave it empty to draw it"
        )
    return value
