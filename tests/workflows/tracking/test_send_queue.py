"""Entries are sent in order, again if that can help, and nobody waits for ever."""

import threading

import pytest

from workflows.tracking import send_queue
from workflows.tracking.entries import Metrics
from workflows.tracking.outbox import Outbox, read_entries
from workflows.tracking.send_queue import Refused, SendQueue


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(send_queue, "_PATIENCE", 0.3)
    monkeypatch.setattr(send_queue, "_SECONDS_BETWEEN_ATTEMPTS", 0.01)
    monkeypatch.setattr(send_queue, "_SECONDS_BETWEEN_LOOKS", 0.01)


def entry(number):
    return Metrics(None, {"loss": 0.5}, number, 0)


def test_an_entry_that_fails_is_sent_again_before_those_behind_it(tmp_path):
    sent, failures = [], [OSError("locked")] * 3

    def send(entry):
        if entry.step == 1 and failures:
            raise failures.pop()
        sent.append(entry.step)
        return -entry.step

    sending = SendQueue(send, Outbox(tmp_path))
    futures = [sending.put(entry(number)) for number in range(3)]
    assert sending.flush() and sending.close() == 0
    assert sent == [0, 1, 2] and [future.result() for future in futures] == [0, -1, -2]
    assert read_entries(tmp_path) == ([entry(number) for number in range(3)], 3)


def test_an_entry_that_is_refused_is_left_out(tmp_path):
    def send(entry):
        if entry.step == 0:
            raise Refused("never")

    sending = SendQueue(send, Outbox(tmp_path))
    first, second = sending.put(entry(0)), sending.put(entry(1))
    assert sending.wait_for(second) and isinstance(first.exception(), Refused)
    assert sending.close() == 0 and sending.refused == ["never"]
    assert read_entries(tmp_path)[1] == 2, "it is not sent again later, either"


def test_a_store_that_takes_nothing_keeps_nobody_waiting_and_the_outbox_has_the_rest(tmp_path):
    def send(entry):
        if entry.step:
            raise OSError("full")

    sending = SendQueue(send, Outbox(tmp_path))
    futures = [sending.put(entry(number)) for number in range(3)]
    assert not sending.wait_for(futures[2]) and not sending.flush()
    assert sending.close() == 2
    assert read_entries(tmp_path) == ([entry(number) for number in range(3)], 1)


def test_abandoning_does_not_wait_for_the_attempt_in_progress(tmp_path):
    go_on = threading.Event()
    sending = SendQueue(lambda entry: go_on.wait(60), Outbox(tmp_path))
    for number in range(2):
        sending.put(entry(number))
    assert sending.abandon() == 2
    go_on.set()


def test_an_attempt_that_ends_after_its_queue_was_abandoned_leaves_the_outbox_to_the_next(tmp_path):
    """Which counts what is done by itself: an entry that nobody has sent could be taken for sent."""
    started, go_on = threading.Event(), threading.Event()

    def send(entry):
        started.set()
        return go_on.wait(60)

    sending = SendQueue(send, Outbox(tmp_path))
    future = sending.put(entry(0))
    assert started.wait(60)
    sending.abandon()
    go_on.set()
    assert future.result(60) and read_entries(tmp_path) == ([entry(0)], 0)


def test_a_store_that_answers_again_gets_all_its_time_for_the_next_request(monkeypatch):
    monkeypatch.setattr(send_queue, "_PATIENCE", 0.0)
    failures, go_on = [OSError("locked")], threading.Event()

    def send(entry):
        if failures:
            raise failures.pop()
        assert entry.step == 0 or go_on.wait(60)

    sending = SendQueue(send)
    sending.put(entry(0)).result(60)
    upload = sending.put(entry(1))
    threading.Timer(0.1, go_on.set).start()
    assert sending.wait_for(upload) and sending.close() == 0
