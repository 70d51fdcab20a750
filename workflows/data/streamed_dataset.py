"""Image folders that are larger than memory: inspected once, then decoded batch by batch.

A streamed folder gives bit for bit the same splits, metrics and batches as the same folder in memory.
"""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data import dataset as data
from diffusion.data.dataset import Dataset, Split
from diffusion.data.image_folder import ImageFolder, class_names, folder_sides
from diffusion.data.sources import PIXEL_RANGE, DatasetInfo, encode_labels
from diffusion.data.splits import split_indices
from diffusion.errors import InputError
from diffusion.normalisation import clip_interval, pixel_moments
from workflows.data.image_decoding import Rows, inspect
from workflows.data.image_stream import MAX_TASK_IMAGES, ImageStream, map_in_order, num_cluster_cpus

# Examples per Ray Data execution: many, since starting an execution takes a few tenths of a second.
CHUNK_EXAMPLES = 32_768


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """Training split of an image folder that stays on disk; implements `TrainingSplit`.

    Attributes:
        paths: paths of the images, as the file system spells them.
        digests: uint8 [N, 32], sha256 of each image's pixels.
        first: the first examples, in memory, with the mean and standard deviation of all.
        labels: int64 [N], or None.
    """

    paths: list[bytes]
    digests: NDArray[np.uint8]
    first: Split
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def device(self) -> torch.device:
        """Device on which batches are returned."""
        return self.first.device

    def to(self, device: str | torch.device) -> "StreamedSplit":
        """Copy that returns its batches on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, first=self.first.to(device), labels=labels)

    def __getitem__(self, index: slice) -> Tensor:
        """The first examples; those that are not in memory are read from disk.

        Raises:
            ValueError: the slice does not start at 0 or has a step.
        """
        start, stop, step = index.indices(len(self))
        if (start, step) != (0, 1):
            raise ValueError(f"{index}: streamed examples are sliced from the front only")
        in_memory = self.first[:stop]
        if stop <= len(in_memory):
            return in_memory
        rest = iter([torch.arange(len(in_memory), stop)])
        return torch.cat([in_memory, *self.batches(rest)])

    def batches(self, indices: Iterator[Tensor]) -> Generator[Tensor, None, None]:
        """Yield the examples of each index tensor, strictly in order.

        Tens of thousands of indices are read ahead, in the thread that consumes the batches. Closing the
        generator ends the decoding.

        Raises:
            InputError: a file is missing, broken or different from when the data were prepared.
        """
        chunks = _chunks(indices)
        current: tuple[list[Tensor], ImageStream] | None = None
        following: tuple[list[Tensor], ImageStream] | None = None
        try:
            current = self._next_stream(chunks)
            while current is not None:
                chunk, stream = current
                for number, index in enumerate(chunk):
                    # Early enough, but after this chunk's decoding has had the CPU cores to itself.
                    if number == len(chunk) // 2:
                        following = self._next_stream(chunks)
                    pixels = torch.from_numpy(stream.take(len(index)))
                    yield self.first.normalised(pixels.to(self.device))
                stream.close()
                current, following = following, None
        finally:
            for pair in (current, following):
                if pair is not None:
                    pair[1].close()

    def _next_stream(self, chunks: Iterator[list[Tensor]]) -> tuple[list[Tensor], ImageStream] | None:
        """Start decoding the next chunk; return its index tensors and the stream, or None after the last."""
        for chunk in chunks:
            indices = torch.cat(chunk).cpu().numpy()
            paths = [self.paths[index] for index in indices.tolist()]
            return chunk, ImageStream(paths, self.digests[indices], tuple(self.first.values.shape[1:]))
        return None


def _chunks(indices: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive index tensors into chunks of at least `CHUNK_EXAMPLES`, except the last one."""
    chunk, count = [], 0
    for index in indices:
        chunk.append(index)
        count += len(index)
        if count >= CHUNK_EXAMPLES:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk


def stream_folder(source: ImageFolder, notify: Callable[[str], None] = print) -> Dataset:
    """Read every image once, split the folder, and load the held-out and first examples into memory.

    Ray must be started; if it runs on several machines, all of them must see the folder.

    Args:
        source: the opened folder.
        notify: callback that receives lines about slow steps.

    Raises:
        InputError: see `diffusion.data.dataset.load_source`.
    """
    config, size, files = source.config, source.image_side, source.files
    notify(
        f"{len(files):,} images of {size} x {size} pixels exceed --memory-limit-gb "
        f"{config.memory_limit_gb:g}: they are streamed from disk; first, each is read once to check it"
    )
    columns = _inspect_all(files, size, notify)
    bad = np.flatnonzero(columns["error"] != "")
    if bad.size and not config.skip_bad_images:
        more = f" ({bad.size - 1} more cannot be read either)" if bad.size > 1 else ""
        raise InputError(columns["error"][bad[0]] + more)
    good = np.flatnonzero(columns["error"] == "")
    if not good.size:
        raise source.no_readable_image()
    files = [files[index] for index in good]
    columns = {name: column[good] for name, column in columns.items()}
    channels = 3 if columns["colour"].any() else 1
    paths, digests = [os.fsencode(path) for path in files], columns["rgb" if channels == 3 else "grey"]
    classes, labels = encode_labels(class_names(source.folder, files))
    sides = folder_sides(source.folder, files)
    info = DatasetInfo(value_range=PIXEL_RANGE, classes=classes, labels=labels, sides=sides)

    shape = (channels, size, size)
    example_digests = [digest.tobytes() for digest in digests]
    splits = split_indices(
        len(files), channels * size**2, config, sides=sides, example_digests=example_digests
    )
    for note in splits.notes:
        notify(f"--data {config.name}: {note}")
    mean, std = pixel_moments(columns["sums"][splits.train, :channels], size**2)
    data.check_std(config, None, std)

    def load_split(indices: NDArray[np.int64]) -> Split:
        split_labels = None if labels is None else labels[indices]
        stream = ImageStream([paths[index] for index in indices.tolist()], digests[indices], shape)
        with contextlib.closing(stream):
            return data.make_split(stream.take(len(indices)), mean, std, split_labels)

    first = load_split(splits.train[: data.num_window_examples(shape)])
    spec = data.make_spec(
        source,
        info,
        (len(files), *shape),
        splits,
        example_digests,
        (mean, std),
        clip_interval(first.values.numpy(), PIXEL_RANGE, mean, std),
        first.values.numpy(),
    )
    train = StreamedSplit(
        [paths[index] for index in splits.train],
        digests[splits.train],
        first,
        None if labels is None else torch.from_numpy(labels[splits.train]),
    )
    return Dataset(spec, train, load_split(splits.val), load_split(splits.test))


def _inspect_all(files: Sequence[Path], size: int, notify: Callable[[str], None]) -> Rows:
    """Columns of `image_decoding.inspect` for all files, in the order of the files."""
    rows = [{"path": os.fsencode(path)} for path in files]
    blocks, done, last_notified = [], 0, time.monotonic()
    for block in map_in_order(rows, partial(inspect, size=size), MAX_TASK_IMAGES, num_cluster_cpus()):
        blocks.append(block)
        done += len(block["error"])
        if time.monotonic() - last_notified > 10.0:
            last_notified = time.monotonic()
            notify(f"  {done:,} of {len(files):,} images read")
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
