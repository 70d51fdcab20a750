"""What workers and their driver tell each other, and what a worker does when it is told to end."""

import os
import signal
import threading
import time

import pytest
import ray

from workflows import preemption, worker
from workflows.checkpoint_store import CheckpointStore
from workflows.mailbox import Mailbox, open_mailbox
from workflows.worker import Preempted, Stopped, run_worker


def test_events_are_taken_once_and_in_order():
    mailbox = Mailbox()
    for number in range(3):
        mailbox.post({"kind": "evaluated", "updates": number})
    events, _ = mailbox.take()
    assert [event["updates"] for event in events] == [0, 1, 2]
    mailbox.post({"kind": "finished"})
    assert [event["kind"] for event in mailbox.take()[0]] == ["finished"]
    assert mailbox.take()[0] == []


def test_the_updates_are_those_that_were_told_last():
    mailbox = Mailbox()
    mailbox.begin(100)
    assert mailbox.take()[1] == 100
    mailbox.exchange(150)
    mailbox.exchange(None)
    assert mailbox.take()[1] == 150
    mailbox.begin(100)
    assert mailbox.take()[1] == 100, "after a new start it is fewer"


def test_a_wish_to_stop_outlives_a_new_start_and_one_to_start_anew_does_not():
    mailbox = Mailbox()
    assert mailbox.exchange(None) == "go on"
    mailbox.want("start anew")
    assert mailbox.exchange(3) == "start anew"
    mailbox.begin(3)
    assert mailbox.exchange(3) == "go on"
    mailbox.want("stop")
    mailbox.want("start anew")
    mailbox.begin(3)
    assert mailbox.exchange(3) == "stop"


def test_giving_up_is_final():
    mailbox = Mailbox()
    mailbox.want("stop")
    mailbox.want("give up")
    for wish in ("stop", "start anew", "go on"):
        mailbox.want(wish)
        mailbox.begin(0)
        assert mailbox.exchange(None) == "give up"


def test_starts_in_a_row_at_one_update_are_counted():
    mailbox = Mailbox()
    assert [mailbox.begin(update) for update in (0, 0, 0, 50, 50, 0, 60)] == [1, 2, 3, 1, 2, 1, 1]


def test_sigterm_is_noted_instead_of_ending_the_process():
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption.note_sigterm()
        assert not preemption.was_terminated()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.was_terminated()
        preemption.note_sigterm()
        assert not preemption.was_terminated(), "a process that is used again starts afresh"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def mailbox(ray_here):
    made = open_mailbox()
    yield made
    ray.kill(made)


@pytest.mark.parametrize(
    ("wish", "ends"), [("go on", Preempted), ("start anew", Preempted), ("stop", None), ("give up", None)]
)
def test_a_worker_that_stopped_is_started_anew_unless_that_was_wanted(mailbox, monkeypatch, wish, ends):
    """It may have stopped before the mailbox heard that its machine is about to go."""

    def stopped(*_arguments):
        raise Stopped("stopped after 10 updates")

    monkeypatch.setattr(worker, "_train", stopped)
    monkeypatch.setattr(worker.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(worker.ray_torch, "get_device", lambda: worker.torch.device("cpu"))
    ray.get(mailbox.want.remote(wish))
    arguments = {"job": worker.Job(None, None, 1, {}), "mailbox": mailbox}
    if ends is None:
        run_worker(arguments)
    else:
        with pytest.raises(ends, match="SIGTERM"):
            run_worker(arguments)


def test_a_watch_hears_what_is_wanted_and_tells_how_far_training_is(mailbox, monkeypatch):
    monkeypatch.setattr(worker, "_SECONDS_BETWEEN_EXCHANGES", 0.02)

    class Going:
        updates = 17

    with worker._Watch(mailbox, leads=True, seconds_between_checkpoints=1e9) as watch:
        watch.follow(Going())
        assert watch.request() == worker.Request.GO_ON
        ray.get(mailbox.want.remote("stop"))
        deadline = time.monotonic() + 10.0
        while watch.request() != worker.Request.STOP:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert ray.get(mailbox.take.remote())[1] == 17
    assert "mailbox" not in [thread.name for thread in threading.enumerate()]


def test_only_the_leading_worker_keeps_the_time_of_checkpoints(mailbox):
    for leads in (True, False):
        with worker._Watch(mailbox, leads, seconds_between_checkpoints=0.05) as watch:
            assert watch.request() == worker.Request.GO_ON
            time.sleep(0.1)
            assert watch.request() == (worker.Request.CHECKPOINT if leads else worker.Request.GO_ON)
            watch.saved()
            assert watch.request() == worker.Request.GO_ON


def test_a_worker_whose_mailbox_is_gone_ends_at_once(mailbox, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(worker, "_SECONDS_BETWEEN_EXCHANGES", 0.02)
    monkeypatch.setattr(worker.os, "_exit", lambda status: ended.set())
    with worker._Watch(mailbox, leads=True, seconds_between_checkpoints=1e9):
        ray.kill(mailbox)
        assert ended.wait(20.0)


def test_what_no_new_start_mends_is_posted_by_whichever_worker_met_it(mailbox, monkeypatch):
    from diffusion.errors import InputError
    from workflows.checkpoint_store import CheckpointNotWritten

    monkeypatch.setattr(worker.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(worker.ray_torch, "get_device", lambda: worker.torch.device("cpu"))
    monkeypatch.setattr(worker.Ranks, "of", lambda device: worker.Ranks(1, 2, device))
    for error, kind in ((InputError("photo gone"), "refused"), (CheckpointNotWritten("disk full"), "failed")):

        def fail(*_arguments, error=error):
            raise error

        monkeypatch.setattr(worker, "_train", fail)
        with pytest.raises(type(error)):
            run_worker({"job": worker.Job(None, None, 1, {}), "mailbox": mailbox})
        assert ray.get(mailbox.take.remote())[0] == [{"kind": kind, "reason": str(error)}]
        assert ray.get(mailbox.exchange.remote(None)) == "give up"


def test_a_job_travels_with_its_store(tmp_path):
    import cloudpickle

    from workflows.storage import Storage

    job = worker.Job(None, None, 1, {}, CheckpointStore(Storage(str(tmp_path)), 3))
    assert cloudpickle.loads(cloudpickle.dumps(job)).store.updates() == []
