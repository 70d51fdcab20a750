"""Many samples, block by block, by Ray Data's actors; a block that is there is not made again."""

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
from diffusion.sampling import SamplerName
from diffusion.schedules import Spacing
from export.labels import chosen_labels
from export.sampler import Sampler
from export.session import Provider
from export.spec import SamplerSpec
from workflows.nodes import possible_nodes
from workflows.progress import BlockView
from workflows.ray_session import start_ray
from workflows.storage import Storage

_RECORD = "generation.json"
_MOST_SAMPLES = 2**32  # of one seed
_MOST_A_BLOCK, _MOST_VALUES_A_BLOCK = 1024, 2**22


@dataclass(frozen=True)
class Choices:
    """What a sample depends on besides the model and its index; see `export.sampler.Sampler.sample`."""

    seed: int = 0
    sampler: SamplerName | None = None
    num_steps: int | None = None
    eta: float | None = None
    spacing: Spacing | None = None
    labels: str | None = None
    guidance_scale: float | None = None


def generate(
    model: Path,
    output: str,
    num_samples: int,
    choices: Choices,
    *,
    provider: Provider = "auto",
    num_actors: int | None = None,
    block_size: int | None = None,
    verbose: bool = False,
) -> int:
    """Draw samples 0 to `num_samples` - 1 of a seed into `output`, or what is missing of them there.

    A block is drawn in one go whatever the number of actors, so every sample is the same to the last bit.

    Args:
        model: path of a sampler.onnx.
        output: a folder or bucket for .npy files [samples, *shape] float32 in data units, named by their
            first index; where its name ends in .parquet, for Parquet files with `index`, the `class` if
            there is one, and a column a coordinate, or `sample` with a tensor of the shape.
        num_samples: in all.
        choices: how they are drawn.
        provider: "auto" is CUDA on actors that have a GPU.
        num_actors: sessions at a time; None is one a GPU, or one a processor.
        block_size: samples a file; None is by their size.
        verbose: show Ray's logs.

    Returns:
        Exit status 0.

    Raises:
        InputError: a number out of range, no such model, an output that holds something else, or samples that
            cannot be drawn.
    """
    for flag, value, most in (
        ("--num-samples", num_samples, _MOST_SAMPLES),
        ("--num-actors", num_actors, 100_000),
        ("--block-size", block_size, 2**20),
    ):
        if value is not None and not 1 <= value <= most:
            raise InputError(f"{flag} {value}: give 1 to {most}")
    sampler = Sampler(model, "cpu", threads=1)
    sampler.sample(1, **asdict(choices))  # to be told now of choices that it does not allow
    size = block_size or max(1, min(_MOST_A_BLOCK, _MOST_VALUES_A_BLOCK // sampler.spec.size))
    content = model.read_bytes()
    record = {
        "model_sha256": hashlib.sha256(content).hexdigest(),
        "num_samples": num_samples,
        "block_size": size,
        **asdict(choices),
    }
    folder = Storage(output)
    names = _claim(folder, output, record)
    suffix = ".parquet" if output.rstrip("/").endswith(".parquet") else ".npy"
    starts = range(0, num_samples, size)
    missing = [start for start in starts if _name(start, suffix) not in names]
    view = BlockView(num_samples, sum(min(size, num_samples - start) for start in missing))
    if missing:
        start_ray(verbose)
        try:
            with view:
                for start, file in _draw(content, missing, record, choices, suffix, provider, num_actors):
                    folder.write_bytes(_name(start, suffix), file)
                    view.drawn(min(size, num_samples - start))
        except KeyboardInterrupt:
            view.say(f"{folder} keeps what is drawn; the same command goes on with the rest")
            raise
        finally:
            ray.shutdown()
    view.say(f"{folder}: {num_samples} samples in {len(starts)} files of {size}, in data units")
    return 0


class BlockMaker:
    """Draws blocks; one session, on an actor of its own.

    Args:
        content: of the sampler.onnx, in Ray's object store.
        record: what is drawn: `num_samples`, `block_size`.
        choices: how.
        suffix: of the files.
        provider: what the session runs on.
    """

    def __init__(
        self,
        content: "ray.ObjectRef[bytes]",
        record: Mapping[str, Any],
        choices: Choices,
        suffix: str,
        provider: Provider,
    ) -> None:
        self._sampler = Sampler(ray.get(content), provider, threads=1)
        self._record, self._choices, self._suffix = record, choices, suffix

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """The files of some blocks.

        Args:
            batch: `start`, the first index of each.

        Returns:
            `start`, and `file`, the content of each; or `refusal`, why there is none.
        """
        made: dict[str, list[Any]] = {"start": [], "file": [], "refusal": []}
        for start in map(int, batch["start"]):
            count = min(self._record["block_size"], self._record["num_samples"] - start)
            file, refusal = b"", ""
            try:
                samples = self._sampler.sample(count, first_index=start, **asdict(self._choices))
                file = file_of(samples, start, self._sampler.spec, self._choices.labels, self._suffix)
            except InputError as error:
                refusal = str(error)
            for name, value in (("start", start), ("file", file), ("refusal", refusal)):
                made[name].append(value)
        return made


def file_of(
    samples: NDArray[np.float32], start: int, spec: SamplerSpec, labels: str | None, suffix: str
) -> bytes:
    """The content of a file with samples.

    Args:
        samples: [batch, *shape].
        start: index of the first.
        spec: of their sampler.
        labels: the class that was asked for, or None for every class in turn.
        suffix: .npy or .parquet.
    """
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, samples)
        return buffer.getvalue()
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {"index": pa.array(np.arange(start, start + len(samples)))}
    numbers = chosen_labels(labels, len(samples), spec.classes, start)
    if numbers is not None:
        columns["class"] = pa.array([spec.classes[number] for number in numbers])
    if spec.data["kind"] == "points":
        names = spec.data.get("columns") or [f"x{place}" for place in range(samples.shape[1])]
        columns |= {name: pa.array(samples[:, place]) for place, name in enumerate(names)}
    else:
        columns["sample"] = pa.FixedShapeTensorArray.from_numpy_ndarray(samples)
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _draw(
    content: bytes,
    starts: list[int],
    record: Mapping[str, Any],
    choices: Choices,
    suffix: str,
    provider: Provider,
    num_actors: int | None,
) -> Iterable[tuple[int, bytes]]:
    """The blocks as they are ready, by first index."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False  # there is one of our own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    places, resources = _places(provider)
    actors = min(num_actors or places, len(starts))
    blocks = ray.data.from_items(
        [{"start": start} for start in starts],
        override_num_blocks=len(starts),  # each on its own, to be kept as soon as it is drawn
    ).map_batches(
        BlockMaker,
        batch_size=1,
        compute=ActorPoolStrategy(size=actors),
        fn_constructor_args=(ray.put(content), dict(record), choices, suffix, provider),
        **resources,
    )
    for row in blocks.iter_rows():
        if row["refusal"]:
            raise InputError(row["refusal"])
        yield int(row["start"]), row["file"]


def _places(provider: Provider) -> tuple[int, dict[str, float]]:
    """How many actors the cluster holds, and what each asks for."""
    nodes = possible_nodes()
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus and provider != "cpu":
        return gpus, {"num_cpus": 1, "num_gpus": 1}
    return max(1, sum(int(node.get("CPU", 0)) for node in nodes)), {"num_cpus": 1}


def _claim(folder: Storage, output: str, record: Mapping[str, Any]) -> set[str]:
    """Say in the output what is drawn there, and return the files that are there already.

    Raises:
        InputError: it holds something else.
    """
    names = set(folder.names())
    text = folder.read_text(_RECORD)
    if text is None:
        if names:
            raise InputError(f"--output {output} holds other files ({min(names)}): give a new folder")
        folder.write_text(_RECORD, json.dumps(record, indent=2) + "\n")
        return set()
    try:
        before = json.loads(text)
    except ValueError:
        before = {}
    for name, value in record.items():
        if before.get(name) != value:
            raise InputError(
                f"--output {output} holds samples that were drawn with {name} {before.get(name)}, not {value}"
                ": give the same, or another folder"
            )
    return names


def _name(start: int, suffix: str) -> str:
    return f"{start:010d}{suffix}"
