"""Images that Ray Data decodes in a given order, ahead of their consumer."""

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ExecutionResources, TaskPoolStrategy

from diffusion.errors import InputError
from workflows.data.image_decoding import Rows, decode

# A task costs about 20 ms in addition to its images, so it gets many of them, but fewer if they are large.
MAX_TASK_IMAGES, _MAX_TASK_BYTES, _MIN_BLOCK_ROWS = 1024, 2**23, 64
# Limits per stream: concurrent tasks, decoded bytes in Ray's object store, and blocks in the queue.
_MAX_TASKS, _MAX_STORE_BYTES, _MAX_QUEUED_BLOCKS = 8, 2**28, 2


class ImageStream:
    """A sequence of images that one Ray Data execution decodes ahead of `take`.

    Args:
        paths: paths of the images, in the order in which they will be taken.
        digests: uint8 [images, 32], expected sha256 of the pixels of each image.
        shape: (C, H, W) of each image.
    """

    def __init__(self, paths: Sequence[bytes], digests: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
        self._paths, self._digests, self._shape = paths, digests, shape
        self._blocks: queue.Queue[Rows | BaseException] = queue.Queue(maxsize=_MAX_QUEUED_BLOCKS)
        # The current block, how many of its images are taken, and how many images of all blocks are checked.
        self._block, self._taken, self._checked = np.empty((0, *shape), dtype=np.uint8), 0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def take(self, count: int) -> NDArray[np.uint8]:
        """The next images, uint8 [count, C, H, W].

        Raises:
            InputError: an image in the same block cannot be read or has changed.
        """
        images = np.empty((count, *self._shape), dtype=np.uint8)
        done = 0
        while done < count:
            if self._taken == len(self._block):
                self._block, self._taken = self._next_block(), 0
            part = self._block[self._taken : self._taken + count - done]
            images[done : done + len(part)] = part
            done += len(part)
            self._taken += len(part)
        return images

    def close(self) -> None:
        """End the execution and its thread."""
        self._closed.set()
        self._thread.join(timeout=60.0)

    def _next_block(self) -> NDArray[np.uint8]:
        block = self._blocks.get()
        if isinstance(block, BaseException):
            raise block
        for row in np.flatnonzero(block["error"] != "").tolist():
            path = os.fsdecode(self._paths[self._checked + row])
            raise InputError(
                f"{path} has changed since the data were prepared ({block['error'][row]}): "
                "put the file back and resume the run, or start a new one"
            )
        self._checked += len(block["image"])
        return block["image"]

    def _run(self) -> None:
        """Queue the decoded blocks, or the error that ended the execution."""
        channels, size, _ = self._shape
        rows = [
            {"path": path, "digest": digest.tobytes()}
            for path, digest in zip(self._paths, self._digests, strict=True)
        ]
        images_per_task = max(1, min(MAX_TASK_IMAGES, _MAX_TASK_BYTES // (channels * size**2)))
        try:
            function = partial(decode, size=size, channels=channels)
            # Leave CPU cores to the training workers, each of which has a stream of its own.
            num_tasks = min(_MAX_TASKS, max(1, num_cluster_cpus() // 2))
            with contextlib.closing(map_in_order(rows, function, images_per_task, num_tasks)) as blocks:
                for block in blocks:
                    self._put(block)
                    if self._closed.is_set():
                        return
            self._put(RuntimeError("more images were taken than the stream has"))
        except BaseException as error:  # `take` raises it in the consumer's thread
            self._put(error)

    def _put(self, block: Rows | BaseException) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                return self._blocks.put(block, timeout=0.1)


def map_in_order(
    rows: Sequence[dict[str, bytes]], function: Callable[[Rows], Rows], rows_per_task: int, num_tasks: int
) -> Generator[Rows, None, None]:
    """Apply a function to blocks of rows with Ray Data, and yield its results in the order of the rows.

    The tasks reserve no CPU: they would never start if training workers held all of them.

    Args:
        rows: rows to process.
        function: function of a block of rows, which returns as many rows.
        rows_per_task: maximum number of rows in a block.
        num_tasks: maximum number of concurrent tasks.
    """
    if not rows:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Each block is one task: several per concurrent task, so that all end at about the same time, but not
    # tiny ones.
    num_blocks = max(
        _ceil_div(len(rows), rows_per_task), min(4 * num_tasks, _ceil_div(len(rows), _MIN_BLOCK_ROWS))
    )
    dataset = ray.data.from_items(list(rows), override_num_blocks=num_blocks)
    dataset = dataset.map_batches(
        function,
        batch_size=None,
        num_cpus=0,
        compute=TaskPoolStrategy(size=min(num_tasks, num_blocks)),  # Ray warns if there are more
        udf_modifying_row_count=False,
    )
    context = dataset.context
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_MAX_STORE_BYTES)
    blocks: Iterator[Any] = iter(
        dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
    )
    try:
        yield from blocks
    finally:
        blocks.close()  # type: ignore[attr-defined]


def num_cluster_cpus() -> int:
    """Number of CPU cores of all machines in the Ray cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _ceil_div(count: int, divisor: int) -> int:
    return -(-count // divisor)
