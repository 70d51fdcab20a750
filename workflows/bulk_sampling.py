"""Bulk sampling by Ray Data actors, one file per block of samples; existing blocks are not drawn again."""

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from diffusion.errors import InputError
from diffusion.files import parse_json, read_file, user_path
from diffusion.memory_limit import check_memory
from diffusion.process.schedules import Spacing
from export.contract import SamplerSpec
from export.labels import resolve_labels
from export.sampler import MAX_FILE_BYTES, Sampler
from export.session import Provider
from workflows.cluster.nodes import possible_nodes
from workflows.ray_runtime.session import start_ray, stop_ray
from workflows.signals import remember_interrupts
from workflows.storage.storage import Storage
from workflows.terminal import SamplingProgress

# Readers of a folder of Parquet files, such as pandas, skip names that begin with an underscore.
_RECORD = "_generation.json"
_FORMER_RECORD = "generation.json"  # in folders of earlier versions, which can be resumed
_MAX_SAMPLES = 2**32  # number of sample indices of one seed
_MAX_FILES = 1_000_000
_MAX_BLOCK_SAMPLES, _MAX_BLOCK_VALUES = 1024, 2**22  # of the default block size


@dataclass(frozen=True)
class SamplingOptions:
    """Arguments of `export.sampler.Sampler.sample` on which a sample depends, in addition to its index."""

    seed: int = 0
    sampler: str | None = None
    num_steps: int | None = None
    eta: float | None = None
    spacing: Spacing | None = None
    labels: str | None = None
    guidance_scale: float | None = None


def generate(
    model: Path,
    output: str,
    num_samples: int,
    options: SamplingOptions,
    *,
    provider: Provider = "auto",
    num_actors: int | None = None,
    block_size: int | None = None,
    verbose: bool = False,
) -> int:
    """Draw samples 0 to `num_samples` - 1 of a seed into `output`, skipping those that are already there.

    Each block is drawn by one call, whatever the number of actors, so every sample is reproduced bit for bit.

    Args:
        model: path of a sampler.onnx.
        output: folder or bucket for .npy files, float32 [samples, *shape] in data units, named by the index
            of their first sample. If its name ends in .parquet, Parquet files with the columns `index`,
            `class` if the model is conditional, and either one column per coordinate of a point or
            `sample` with a tensor of the shape; `pandas.read_parquet(output)` reads them all.
        num_samples: number of samples in total.
        options: how the samples are drawn.
        provider: ONNX Runtime provider; "auto" is CUDA on actors that have a GPU.
        num_actors: number of concurrent sessions; None is one per GPU or, without GPUs, per CPU core.
        block_size: samples per file; None chooses it from the size of a sample.
        verbose: show Ray's logs.

    Returns:
        Exit status 0.

    Raises:
        InputError: a number is out of range, the model does not exist, the output holds something else, or
            the samples cannot be drawn.
    """
    for flag, value, maximum in (
        ("--num-samples", num_samples, _MAX_SAMPLES),
        ("--num-actors", num_actors, 100_000),
        ("--block-size", block_size, 2**20),
    ):
        if value is not None and not 1 <= value <= maximum:
            raise InputError(f"{flag} {value}: give 1 to {maximum}")
    sampler = Sampler(model, "cpu", threads=1)
    sampler.sample(1, **asdict(options))  # fails early if the model does not allow these options
    size = block_size or max(1, min(_MAX_BLOCK_SAMPLES, _MAX_BLOCK_VALUES // sampler.spec.size))
    if num_samples > _MAX_FILES * size:
        raise InputError(
            f"--block-size {size}: {num_samples} samples would make more than {_MAX_FILES:,} files; give "
            "a larger one"
        )
    check_memory(4.0 * size * sampler.spec.size, f"--block-size {size}", "give a smaller one")
    content = read_file(user_path(model), "the path of a sampler.onnx", MAX_FILE_BYTES)
    record = {
        "model_sha256": hashlib.sha256(content).hexdigest(),
        "num_samples": num_samples,
        "block_size": size,
        **asdict(options),
    }
    folder = Storage(output)
    names = _claim(folder, output, record)
    suffix = ".parquet" if output.rstrip("/").endswith(".parquet") else ".npy"
    starts = range(0, num_samples, size)
    missing = [start for start in starts if _file_name(start, suffix) not in names]
    view = SamplingProgress(num_samples, sum(min(size, num_samples - start) for start in missing))
    if missing:
        start_ray(verbose)
        try:
            # Ray Data runs callbacks in this thread, in which an interrupt is lost.
            with view, remember_interrupts() as check_interrupt:
                for start, file in draw_blocks(
                    content, missing, record, options, suffix, provider, num_actors
                ):
                    folder.write_bytes(_file_name(start, suffix), file)
                    view.drawn(min(size, num_samples - start))
                    check_interrupt()
        except KeyboardInterrupt:
            view.print(f"{folder} keeps the samples drawn so far; run the same command again to resume")
            raise
        finally:
            stop_ray()
    view.print(f"{folder}: {num_samples} samples in {len(starts)} files of {size}, in data units")
    return 0


class BlockSampler:
    """Ray Data callable that draws blocks of samples; each actor has a session of its own.

    Args:
        content: bytes of the sampler.onnx, in Ray's object store.
        record: record of the generation, with `num_samples` and `block_size`.
        options: how the samples are drawn.
        suffix: suffix of the files.
        provider: ONNX Runtime provider of the session.
    """

    def __init__(
        self,
        content: "ray.ObjectRef[bytes]",
        record: Mapping[str, Any],
        options: SamplingOptions,
        suffix: str,
        provider: Provider,
    ) -> None:
        self._sampler = Sampler(ray.get(content), provider, threads=1)
        self._record, self._options, self._suffix = record, options, suffix

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Draw blocks and encode them as files.

        Args:
            batch: column `start`, the index of the first sample of each block.

        Returns:
            Columns `start`; `file`, the content of each file; and `error`, empty if the block was drawn.
        """
        columns: dict[str, list[Any]] = {"start": [], "file": [], "error": []}
        for start in map(int, batch["start"]):
            count = min(self._record["block_size"], self._record["num_samples"] - start)
            file, message = b"", ""
            try:
                samples = self._sampler.sample(count, first_index=start, **asdict(self._options))
                file = encode_samples(samples, start, self._sampler.spec, self._options.labels, self._suffix)
            except InputError as error:
                message = str(error)
            for name, value in (("start", start), ("file", file), ("error", message)):
                columns[name].append(value)
        return columns


def encode_samples(
    samples: NDArray[np.float32], start: int, spec: SamplerSpec, labels: str | None, suffix: str
) -> bytes:
    """Encode samples as the content of a .npy or Parquet file.

    Args:
        samples: float32 [samples, *shape].
        start: index of the first sample.
        spec: metadata of the model that drew them.
        labels: the requested class, or None for cycling through all classes.
        suffix: .npy or .parquet.
    """
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, samples)
        return buffer.getvalue()
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {"index": pa.array(np.arange(start, start + len(samples)))}
    numbers = resolve_labels(labels, len(samples), spec.classes, start)
    if numbers is not None:
        columns["class"] = pa.array([spec.classes[number] for number in numbers])
    if spec.data["kind"] == "points":
        names = spec.data.get("columns") or [f"x{index}" for index in range(samples.shape[1])]
        columns |= {name: pa.array(samples[:, index]) for index, name in enumerate(names)}
    else:
        columns["sample"] = pa.FixedShapeTensorArray.from_numpy_ndarray(samples)
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def draw_blocks(
    content: bytes,
    starts: list[int],
    record: Mapping[str, Any],
    options: SamplingOptions,
    suffix: str,
    provider: Provider,
    num_actors: int | None,
) -> Iterable[tuple[int, bytes]]:
    """Draw blocks with Ray Data, and yield each as it is finished.

    Args:
        content: bytes of the sampler.onnx.
        starts: index of the first sample of each block.
        record: record of the generation, with `num_samples` and `block_size`.
        options: how the samples are drawn.
        suffix: suffix of the files.
        provider: ONNX Runtime provider.
        num_actors: number of actors; None is as many as the cluster has room for.

    Yields:
        Index of a block's first sample, and the content of its file.

    Raises:
        InputError: the samples cannot be drawn.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = (
        False  # `SamplingProgress` replaces them
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    max_actors, resources = _plan_actors(provider)
    num_actors = min(num_actors or max_actors, len(starts))
    blocks = ray.data.from_items(
        [{"start": start} for start in starts],
        override_num_blocks=len(starts),  # one row each, so that it can be saved as soon as it is drawn
    ).map_batches(
        BlockSampler,
        batch_size=1,
        compute=ActorPoolStrategy(size=num_actors),
        fn_constructor_args=(ray.put(content), dict(record), options, suffix, provider),
        **resources,
    )
    for row in blocks.iter_rows():
        if row["error"]:
            raise InputError(row["error"])
        yield int(row["start"]), row["file"]


def _plan_actors(provider: Provider) -> tuple[int, dict[str, float]]:
    """How many actors the cluster has room for, and the resources that each requests."""
    nodes = possible_nodes()
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus and provider != "cpu":
        return gpus, {"num_cpus": 1, "num_gpus": 1}
    return max(1, sum(int(node.get("CPU", 0)) for node in nodes)), {"num_cpus": 1}


def _claim(folder: Storage, output: str, record: Mapping[str, Any]) -> set[str]:
    """Write the record into a new output folder or check it in an existing one; return existing file names.

    Raises:
        InputError: the folder holds something else.
    """
    names = set(folder.names())
    text = folder.read_text(_RECORD) or folder.read_text(_FORMER_RECORD)
    if text is None:
        if names:
            raise InputError(f"--output {output} holds other files ({min(names)}): give a new folder")
        folder.write_text(_RECORD, json.dumps(record, indent=2) + "\n")
        return set()
    existing = parse_json(text, dict, f"{folder}/{_RECORD}", "give --output a new folder")
    for name, value in record.items():
        if existing.get(name) != value:
            raise InputError(
                f"--output {output} holds samples that were drawn with {name} {existing.get(name)}, not "
                f"{value}: give the same value, or another folder"
            )
    if _FORMER_RECORD in names:
        folder.write_text(_RECORD, text)
        folder.delete(_FORMER_RECORD)
    return names


def _file_name(start: int, suffix: str) -> str:
    return f"{start:010d}{suffix}"
