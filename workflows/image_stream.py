"""Images decoded by Ray Data in the order asked for, ahead of who takes them."""

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
from workflows.decoding import Rows, decode

# A task costs some 20 ms besides its images: it gets so many at most, fewer where they are large.
TASK_IMAGES, _FEWEST_ROWS, _TASK_BYTES = 1024, 64, 2**23
# Of one stream: its decoded images wait in Ray's object store, and those of a few tasks beside it.
_MOST_TASKS, _STORE_BYTES, _WAITING = 8, 2**28, 2


class ImageStream:
    """Some images being decoded in an execution of Ray Data, ahead of who takes them.

    Args:
        paths: of the images, in the order in which they will be taken.
        digests: uint8 [images, 32], of what must be found there.
        shape: (C, H, W) of each.
    """

    def __init__(self, paths: Sequence[bytes], digests: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
        self._paths, self._digests, self._shape = paths, digests, shape
        self._blocks: queue.Queue[Rows | BaseException] = queue.Queue(maxsize=_WAITING)
        self._block, self._taken, self._checked = np.empty((0, *shape), dtype=np.uint8), 0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def take(self, count: int) -> NDArray[np.uint8]:
        """The next images, uint8 [count, C, H, W].

        Raises:
            InputError: one of the next few is not what it was.
        """
        images = np.empty((count, *self._shape), dtype=np.uint8)
        done = 0
        while done < count:
            if self._taken == len(self._block):
                self._block, self._taken = self._next_block(), 0
            some = self._block[self._taken : self._taken + count - done]
            images[done : done + len(some)] = some
            done += len(some)
            self._taken += len(some)
        return images

    def close(self) -> None:
        """End the execution and the thread that follows it."""
        self._closed.set()
        self._thread.join(timeout=60.0)

    def _next_block(self) -> NDArray[np.uint8]:
        block = self._blocks.get()
        if isinstance(block, BaseException):
            raise block
        for row in np.flatnonzero(block["error"] != "").tolist():
            path = os.fsdecode(self._paths[self._checked + row])
            raise InputError(
                f"{path} is not what it was when the data were prepared ({block['error'][row]}): "
                "put the file back and resume the run, or start a new one"
            )
        self._checked += len(block["image"])
        return block["image"]

    def _run(self) -> None:
        channels, size, _ = self._shape
        rows = [
            {"path": path, "digest": digest.tobytes()}
            for path, digest in zip(self._paths, self._digests, strict=True)
        ]
        images_a_task = max(1, min(TASK_IMAGES, _TASK_BYTES // (channels * size**2)))
        try:
            work = partial(decode, size=size, channels=channels)
            # Those who train need processors too, and each has a stream.
            tasks = min(_MOST_TASKS, max(1, num_processors() // 2))
            with contextlib.closing(mapped(rows, work, images_a_task, tasks)) as blocks:
                for block in blocks:
                    self._put(block)
                    if self._closed.is_set():
                        return
            self._put(RuntimeError("more images were taken than were asked for"))
        except BaseException as error:  # whoever takes images must hear of it
            self._put(error)

    def _put(self, block: Rows | BaseException) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                return self._blocks.put(block, timeout=0.1)


def mapped(
    rows: Sequence[dict[str, bytes]], work: Callable[[Rows], Rows], rows_a_task: int, tasks: int
) -> Generator[Rows, None, None]:
    """Ray Data's blocks of `work` done on the rows, in their order.

    The tasks ask for no processor of their own: where training workers hold all of them, they would
    never start.
    """
    if not rows:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # At least so many blocks, one a task, that the tasks end at about the same time; but no tiny ones.
    blocks_wanted = max(_ceil(len(rows), rows_a_task), min(4 * tasks, _ceil(len(rows), _FEWEST_ROWS)))
    dataset = ray.data.from_items(list(rows), override_num_blocks=blocks_wanted)
    dataset = dataset.map_batches(
        work,
        batch_size=None,
        num_cpus=0,
        compute=TaskPoolStrategy(size=min(tasks, blocks_wanted)),  # it warns of more
        udf_modifying_row_count=False,
    )
    context = dataset.context
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_STORE_BYTES)
    blocks: Iterator[Any] = iter(
        dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
    )
    try:
        yield from blocks
    finally:
        blocks.close()  # type: ignore[attr-defined]


def num_processors() -> int:
    """Of all machines that Ray runs on."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _ceil(count: int, divisor: int) -> int:
    return -(-count // divisor)
