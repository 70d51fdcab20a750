"""Draws the samples of a request batch by batch. Loads no torch."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError
from diffusion.process.given import Given
from export.contract import SamplerSpec
from export.engine import Engine
from export.gpu_loop import State
from export.limits import OutOfMemory, RequestGuard
from export.request import Request


class RequestState(NamedTuple):
    """A request after a network call: the calls done and in total, and the batch in progress."""

    rows_done: int
    num_rows: int
    first: int  # index of the batch's first sample
    estimate: Callable[[], NDArray[np.float32]]  # of the batch's finished samples; valid until the next call


def draw_batches(
    engine: Engine, request: Request, guard: RequestGuard, threads: int
) -> Iterator[RequestState]:
    """Fill `request.samples` batch by batch, yielding after each network call.

    Args:
        engine: runs the network.
        request: what is drawn. A batch that does not fit into memory is halved, and so are those after it.
        guard: guard of the request.
        threads: number of threads that may make noise.

    Raises:
        InputError: the samples are not finite, or one of them does not fit into memory.
        InputError, Cancelled: as for `RequestGuard.run`.
    """
    spec, samples, given, batch_size = engine.spec, request.samples, request.given, request.batch_size
    num_calls = request.num_calls
    samples_done = batches_done = 0
    while samples_done < len(samples):
        batch = slice(samples_done, min(samples_done + batch_size, len(samples)))
        table, noise = given.rows(request.table, request.noise(batch, spec.shape, threads), batch)
        states = engine.states(
            table,
            noise,
            None if request.labels is None else request.labels[batch],
            {name: values[batch] for name, values in request.conditions.items()},
            request.guidance_scale,
            guard,
            given.inpainting(batch),
            request.noise_keys(batch, table),
        )
        num_batches = batches_done + math.ceil((len(samples) - samples_done) / batch_size)
        num_rows = num_batches * num_calls
        try:
            for row, state in enumerate(_without_warnings(states), start=1):
                if row == num_calls:
                    samples[batch] = given.restore(_finished(spec, state.x()), batch)
                rows_done = batches_done * num_calls + row
                estimate = partial(_estimate, spec, state.x0, given, batch)
                yield RequestState(rows_done, num_rows, batch.start, estimate)
        except OutOfMemory as error:
            if batch.stop - batch.start == 1:
                raise InputError(f"one sample does not fit into memory: {error}") from error
            batch_size = (batch.stop - batch.start) // 2
            continue
        samples_done, batches_done = batch.stop, batches_done + 1


def _finished(spec: SamplerSpec, x: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore", invalid="ignore"):
        samples = spec.denormalise(x)
        finite = np.isfinite(samples.astype(np.float32)).all()
    if not finite:
        raise InputError(
            "the samples are not finite: the model is broken or diverges with this sampler; "
            "choose another sampler or more steps"
        )
    return samples


def _estimate(
    spec: SamplerSpec, x0: Callable[[], NDArray[np.float64]], given: Given, batch: slice
) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        return given.restore(spec.denormalise(x0()), batch).astype(np.float32)


def _without_warnings(states: Iterator[State]) -> Iterator[State]:
    """Iterate without numpy's warnings: samples that are not finite raise an error of their own."""
    while True:
        # Not around the whole loop: the caller's code runs at each yield.
        with np.errstate(over="ignore", invalid="ignore"):
            state = next(states, None)
        if state is None:
            return
        yield state
