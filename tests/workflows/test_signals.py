"""SIGTERM and SIGHUP do what Ctrl-C does, once for each request."""

import contextlib
import os
import signal
import threading

import pytest

from workflows import signals
from workflows.signals import remember_interrupts, treat_as_interrupt

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@pytest.fixture(autouse=True)
def _handlers(monkeypatch):
    """The handlers that a command begins with, and afterwards those of the tests."""
    monkeypatch.setattr(signals, "_last_request", float("-inf"))
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in NAMES[1:]:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("of_ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_they_interrupt_also_where_ctrl_c_is_ignored(number, of_ctrl_c):
    signal.signal(signal.SIGINT, of_ctrl_c)
    treat_as_interrupt()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_they_call_the_handler_of_ctrl_c_and_once_if_they_come_together(monkeypatch):
    calls, now = [], [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    treat_as_interrupt()
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGHUP)  # systemd's and `timeout`'s second one
    assert calls == [signal.SIGINT]
    now[0] += 10.0
    os.kill(os.getpid(), signal.SIGTERM)
    assert calls == [signal.SIGINT] * 2


def test_what_nohup_ignores_stays_ignored_and_other_threads_set_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    treat_as_interrupt()
    os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    thread = threading.Thread(target=treat_as_interrupt)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interrupt_that_is_lost_is_remembered():
    """As by a destructor, whose exceptions Python prints and ignores."""
    before = signal.getsignal(signal.SIGINT)
    with remember_interrupts() as check:
        check()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is before
