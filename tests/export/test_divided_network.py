"""Batches of convolutional networks, divided among threads."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffusion.errors import InputError
from export.divided_network import DividedNetwork
from export.limits import Cancelled, RequestGuard


class Session:
    """Doubles x; remembers the sizes of its batches and the threads that it ran in."""

    def __init__(self, before=lambda x, options: None):
        self.sizes, self.threads, self.before = [], set(), before

    def run(self, outputs, inputs, options):
        self.sizes.append(len(inputs["x"]))
        self.threads.add(threading.get_ident())
        self.before(inputs["x"], options)
        assert inputs["t"].tolist() == inputs["x"][:, 0].tolist(), "the parts of all inputs are the same rows"
        return [2.0 * inputs["x"] for _ in outputs]


class Whole:
    """Runs a session in the thread of the caller."""

    def __init__(self):
        self.session = Session()

    def run(self, outputs, inputs, guard):
        return guard.run(self.session.run, outputs, inputs)


def batch(count):
    x = np.arange(count, dtype=np.float32)
    return {"x": np.stack([x, x], axis=1), "t": x}


@pytest.mark.parametrize(
    ("count", "num_threads", "sizes"),
    [
        (1, 2, None),
        (2, 2, [1, 1]),
        (3, 2, None),  # one of the threads would have nothing to do in half of the time
        (5, 2, [2, 3]),
        (32, 2, [16, 16]),
        (3, 4, None),
        (4, 4, [1, 1, 1, 1]),
        (7, 4, [1, 2, 2, 2]),
        (5, 4, None),
        (5, 1, None),
    ],
)
def test_a_batch_is_divided_where_all_threads_are_busy(count, num_threads, sizes):
    whole, single = Whole(), Session()
    network = DividedNetwork(whole, lambda: single, num_threads)
    first, second = network.run(["a", "b"], batch(count), RequestGuard())
    np.testing.assert_array_equal(first, 2.0 * batch(count)["x"])
    np.testing.assert_array_equal(second, first)
    assert (sorted(single.sizes), whole.session.sizes) == ((sizes, []) if sizes else ([], [count]))


def test_the_parts_run_side_by_side_in_a_session_that_is_opened_once():
    opened, meeting = [], threading.Barrier(2, timeout=30.0)

    def open_single():
        opened.append(Session(lambda x, options: meeting.wait()))
        return opened[-1]

    network = DividedNetwork(Whole(), open_single, 2)
    assert not opened
    with ThreadPoolExecutor(2) as callers:
        list(callers.map(lambda count: network.run(["a"], batch(count), RequestGuard()), [2, 4, 6, 8]))
    assert len(opened) == 1 and len(opened[0].sizes) == 8 and len(opened[0].threads) == 2


def test_an_error_in_one_part_is_that_of_the_call():
    def fail(x, options):
        if x[0, 0] > 0.0:
            raise RuntimeError("this part")

    network = DividedNetwork(Whole(), lambda: Session(fail), 2)
    with pytest.raises(InputError, match="cannot run the model: this part"):
        network.run(["a"], batch(4), RequestGuard())


def test_a_request_ends_during_a_call_and_between_two():
    def until_it_is_ended(x, options):
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline:
            if options.terminate:
                raise RuntimeError("terminated")
            time.sleep(0.01)

    single = Session(until_it_is_ended)
    network, started = DividedNetwork(Whole(), lambda: single, 2), time.monotonic()
    with RequestGuard(time_limit=0.3) as guard, pytest.raises(InputError, match=r"time_limit 0\.3"):
        network.run(["a"], batch(2), guard)
    assert time.monotonic() - started < 20.0
    stop = threading.Event()
    stop.set()
    calls = len(single.sizes)
    with RequestGuard(stop=stop) as guard, pytest.raises(Cancelled):
        network.run(["a"], batch(2), guard)
    assert len(single.sizes) == calls


def test_the_threads_end_with_the_network():
    before = set(threading.enumerate())
    network = DividedNetwork(Whole(), Session, 3)
    network.run(["a"], batch(3), RequestGuard())
    started = set(threading.enumerate()) - before
    assert 1 <= len(started) <= 3
    del network
    gc.collect()
    for thread in started:
        thread.join(30.0)
        assert not thread.is_alive()
