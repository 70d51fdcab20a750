"""Folders of images that are larger than memory: prepared once, then decoded batch by batch.

A streamed folder gives the same splits, figures and batches as one in memory, bit by bit.
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

from diffusion import data
from diffusion.config import DataConfig
from diffusion.data import Dataset, Examples
from diffusion.errors import InputError
from diffusion.image_folder import checked_size, class_names, image_files
from diffusion.moments import clip_interval, pixel_moments
from diffusion.sources import PIXEL_RANGE, Source, needs_streaming, number_labels
from diffusion.splits import split
from workflows.decoding import Rows, inspect
from workflows.image_stream import TASK_IMAGES, ImageStream, mapped, num_processors

# An execution of Ray Data starts in some tenths of a second, so it is given many examples.
_CHUNK = 32_768


def load_dataset(config: DataConfig, say: Callable[[str], None] = print) -> Dataset:
    """Load data into memory, or prepare a folder that does not fit there for streaming.

    Ray must have been started, and where it runs on several machines, all must see the folder.

    Args:
        config: which data, and `memory_limit_gb`.
        say: told what takes long.

    Raises:
        InputError: see `diffusion.data.load_dataset`.
    """
    return _prepare(config, say) if needs_streaming(config) else data.load_dataset(config)


@dataclass(frozen=True, eq=False)
class StreamedExamples:
    """The training split of a folder that stays on disk.

    Attributes:
        paths: of the images, as the file system spells them.
        digests: uint8 [N, 32], the sha256 of each image's pixels.
        first: the first examples, in memory, with the mean and deviation of all.
        labels: int64 [N], or None.
    """

    paths: list[bytes]
    digests: NDArray[np.uint8]
    first: Examples
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def device(self) -> torch.device:
        """Where batches are handed out."""
        return self.first.device

    def to(self, device: str | torch.device) -> "StreamedExamples":
        """The same with its batches on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, first=self.first.to(device), labels=labels)

    def __getitem__(self, index: slice) -> Tensor:
        """Examples from the front; what is not in memory is read now.

        Raises:
            ValueError: the slice starts elsewhere.
        """
        start, stop, step = index.indices(len(self))
        if (start, step) != (0, 1):
            raise ValueError(f"{index}: streamed examples are sliced from the front only")
        kept = self.first[:stop]
        if stop <= len(kept):
            return kept
        rest = iter([torch.arange(len(kept), stop)])
        return torch.cat([kept, *self.batches(rest)])

    def batches(self, indices: Iterator[Tensor]) -> Generator[Tensor, None, None]:
        """The examples of each index tensor, strictly in that order.

        The indices are read ahead by some ten thousands, in the thread that asks for the batches. Closing
        the generator ends the decoding.

        Raises:
            InputError: a file is gone, broken or another than when the data were prepared.
        """
        chunks = _chunks(indices)
        running: tuple[list[Tensor], ImageStream] | None = None
        following: tuple[list[Tensor], ImageStream] | None = None
        try:
            running = self._next_stream(chunks)
            while running is not None:
                chunk, stream = running
                for number, index in enumerate(chunk):
                    if number == len(chunk) // 2:  # in time, and not while this chunk needs all processors
                        following = self._next_stream(chunks)
                    pixels = torch.from_numpy(stream.take(len(index)))
                    yield self.first.normalised(pixels.to(self.device))
                stream.close()
                running, following = following, None
        finally:
            for each in (running, following):
                if each is not None:
                    each[1].close()

    def _next_stream(self, chunks: Iterator[list[Tensor]]) -> tuple[list[Tensor], ImageStream] | None:
        """The next chunk of index tensors and its images, on their way; None after the last."""
        for chunk in chunks:
            places = torch.cat(chunk).cpu().numpy()
            paths = [self.paths[place] for place in places.tolist()]
            return chunk, ImageStream(paths, self.digests[places], tuple(self.first.values.shape[1:]))
        return None


def _chunks(indices: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive index tensors together, each time with at least `_CHUNK` examples, but for the last."""
    chunk, count = [], 0
    for index in indices:
        chunk.append(index)
        count += len(index)
        if count >= _CHUNK:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Dataset:
    """Read every image once, divide the folder, and load into memory what must be there."""
    folder = Path(config.name)
    size = checked_size(folder, config.image_size)
    files = image_files(folder)
    say(
        f"{len(files):,} images of {size} x {size} pixels are more than --memory-limit-gb "
        f"{config.memory_limit_gb:g}: they are streamed from disk, and now read once to be checked"
    )
    facts = _inspected(files, size, say)
    bad = np.flatnonzero(facts["error"] != "")
    if bad.size and not config.skip_bad_images:
        more = f" ({bad.size - 1} more cannot be read either)" if bad.size > 1 else ""
        raise InputError(facts["error"][bad[0]] + more)
    good = np.flatnonzero(facts["error"] == "")
    if not good.size:
        raise InputError(f"{folder}: not one of its images can be read")
    files = [files[place] for place in good]
    facts = {name: fact[good] for name, fact in facts.items()}
    channels = 3 if facts["colour"].any() else 1
    paths, digests = [os.fsencode(path) for path in files], facts["rgb" if channels == 3 else "grey"]
    classes, labels = number_labels(class_names(folder, files))
    source = Source(value_range=PIXEL_RANGE, classes=classes, labels=labels)

    shape = (channels, size, size)
    splits = split(len(files), channels * size**2, config)
    mean, std = pixel_moments(facts["sums"][splits.train, :channels], size**2)
    data.check_spread(config, None, std)

    def loaded(places: NDArray[np.int64]) -> Examples:
        some = None if labels is None else labels[places]
        stream = ImageStream([paths[place] for place in places.tolist()], digests[places], shape)
        with contextlib.closing(stream):
            return data.stored_examples(stream.take(len(places)), mean, std, some)

    first = loaded(splits.train[: data.num_first(shape)])
    spec = data.describe(
        config,
        source,
        (len(files), *shape),
        splits,
        (digest.tobytes() for digest in digests),
        (mean, std),
        clip_interval(first.values.numpy(), PIXEL_RANGE, mean, std),
        first.values.numpy(),
    )
    train = StreamedExamples(
        [paths[place] for place in splits.train],
        digests[splits.train],
        first,
        None if labels is None else torch.from_numpy(labels[splits.train]),
    )
    return Dataset(spec, train, loaded(splits.val), loaded(splits.test))


def _inspected(files: Sequence[Path], size: int, say: Callable[[str], None]) -> Rows:
    """`decoding.inspect` of all files, in their order."""
    rows = [{"path": os.fsencode(path)} for path in files]
    blocks, done, said = [], 0, time.monotonic()
    for block in mapped(rows, partial(inspect, size=size), TASK_IMAGES, num_processors()):
        blocks.append(block)
        done += len(block["error"])
        if time.monotonic() - said > 10.0:
            said = time.monotonic()
            say(f"  {done:,} of {len(files):,} images read")
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
