"""Events and signals between the workers and their driver, and how a worker reacts to SIGTERM and errors."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import cloudpickle
import pytest
import ray

from diffusion.errors import InputError
from workflows.ray_runtime import preemption
from workflows.storage.storage import Storage
from workflows.training import worker
from workflows.training.checkpoint_store import CheckpointStore, CheckpointWriteError
from workflows.training.coordinator import Coordinator, start_coordinator
from workflows.training.events import Evaluated, Failed, Finished, InputRejected
from workflows.training.worker import Preempted, TrainingStopped, run_worker


def test_events_are_taken_once_and_in_order():
    coordinator = Coordinator()
    for updates in range(3):
        coordinator.add_event(Evaluated(updates, {}, {}))
    events, _ = coordinator.take_events()
    assert [event.updates for event in events] == [0, 1, 2]
    coordinator.add_event(Finished())
    assert coordinator.take_events()[0] == [Finished()]
    assert coordinator.take_events()[0] == []


def test_the_number_of_updates_is_the_one_reported_last():
    coordinator = Coordinator()
    coordinator.record_start(100)
    assert coordinator.take_events()[1] == 100
    coordinator.poll(150)
    coordinator.poll(None)
    assert coordinator.take_events()[1] == 150
    coordinator.record_start(100)
    assert coordinator.take_events()[1] == 100, "it decreases after a restart"


def test_a_stop_signal_outlives_a_restart_and_a_restart_signal_does_not():
    coordinator = Coordinator()
    assert coordinator.poll(None) == "continue"
    coordinator.request_signal("restart")
    assert coordinator.poll(3) == "restart"
    coordinator.record_start(3)
    assert coordinator.poll(3) == "continue"
    coordinator.request_signal("stop")
    coordinator.request_signal("restart")
    coordinator.record_start(3)
    assert coordinator.poll(3) == "stop"


def test_abort_is_final():
    coordinator = Coordinator()
    coordinator.request_signal("stop")
    coordinator.request_signal("abort")
    for later in ("stop", "restart", "continue"):
        coordinator.request_signal(later)
        coordinator.record_start(0)
        assert coordinator.poll(None) == "abort"


def test_consecutive_starts_at_the_same_update_are_counted():
    coordinator = Coordinator()
    attempts = [coordinator.record_start(updates) for updates in (0, 0, 0, 50, 50, 0, 60)]
    assert attempts == [1, 2, 3, 1, 2, 1, 1]


def test_sigterm_is_recorded_instead_of_ending_the_process():
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption.install_sigterm_handler()
        assert not preemption.sigterm_received()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.sigterm_received()
        preemption.install_sigterm_handler()
        assert not preemption.sigterm_received(), "installing the handler clears an earlier SIGTERM"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def coordinator(ray_here):
    actor = start_coordinator()
    yield actor
    ray.kill(actor)


@pytest.fixture
def outside_ray_train(monkeypatch):
    """Let `run_worker` run in this process."""
    monkeypatch.setattr(worker.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(worker.ray_torch, "get_device", lambda: worker.torch.device("cpu"))


def test_a_notice_to_ray_is_heard_beside_sigterm(monkeypatch):
    now, draining, questions = [0.0], [False], []

    def node_is_draining():
        questions.append(now[0])
        return draining[0]

    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(preemption, "node_is_draining", node_is_draining)
    monkeypatch.setattr(preemption, "sigterm_received", lambda: False)
    notice = preemption.PreemptionNotice()
    assert not notice.received()
    draining[0], now[0] = True, 4.9
    assert not notice.received(), "Ray is asked every five seconds"
    now[0] = 5.0
    assert notice.received()
    draining[0], now[0] = False, 10.0
    assert notice.received() and questions == [0.0, 5.0]


def test_the_node_of_a_session_that_nobody_drains_is_not_draining(ray_here):
    assert not preemption.node_is_draining()


@pytest.mark.parametrize(
    ("requested", "error"), [("continue", Preempted), ("restart", Preempted), ("stop", None), ("abort", None)]
)
def test_a_worker_that_stopped_is_restarted_unless_a_stop_was_requested(
    coordinator, outside_ray_train, monkeypatch, requested, error
):
    """It may have stopped before the coordinator learned that its machine will be taken away."""

    def stopped(*_arguments):
        raise TrainingStopped("stopped after 10 updates")

    monkeypatch.setattr(worker, "train", stopped)
    ray.get(coordinator.request_signal.remote(requested))
    arguments = {"job": worker.TrainingJob(None, None, 1, {}), "coordinator": coordinator}
    if error is None:
        run_worker(arguments)
    else:
        with pytest.raises(error, match="SIGTERM"):
            run_worker(arguments)


def test_a_client_receives_signals_and_reports_progress(coordinator, monkeypatch):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.02)

    class RunningTraining:
        updates = 17

    with worker.CoordinatorClient(coordinator, is_main=True, seconds_between_checkpoints=1e9) as client:
        client.follow(RunningTraining())
        assert client.request() == worker.Request.CONTINUE
        ray.get(coordinator.request_signal.remote("stop"))
        deadline = time.monotonic() + 120.0
        while client.request() != worker.Request.STOP:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert ray.get(coordinator.take_events.remote())[1] == 17
    assert "coordinator" not in [thread.name for thread in threading.enumerate()]


def test_only_rank_0_requests_periodic_checkpoints(coordinator, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for is_main in (True, False):
        with worker.CoordinatorClient(coordinator, is_main, seconds_between_checkpoints=60.0) as client:
            clock[0] += 59.0
            assert client.request() == worker.Request.CONTINUE
            clock[0] += 2.0
            assert client.request() == (worker.Request.CHECKPOINT if is_main else worker.Request.CONTINUE)
            client.checkpoint_attempted()
            assert client.request() == worker.Request.CONTINUE


def test_a_worker_whose_coordinator_is_gone_exits_immediately(coordinator, monkeypatch):
    exited = threading.Event()
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(worker.os, "_exit", lambda status: exited.set())
    with worker.CoordinatorClient(coordinator, is_main=True, seconds_between_checkpoints=1e9):
        ray.kill(coordinator)
        assert exited.wait(20.0)


def test_an_error_that_a_restart_cannot_fix_is_reported_by_any_worker(
    coordinator, outside_ray_train, monkeypatch
):
    monkeypatch.setattr(
        worker.DistributedContext,
        "from_process_group",
        lambda device: worker.DistributedContext(1, 2, device),
    )
    for error, event in (
        (InputError("photo gone"), InputRejected("photo gone")),
        (CheckpointWriteError("disk full"), Failed("disk full")),
    ):

        def fail(*_arguments, error=error):
            raise error

        monkeypatch.setattr(worker, "train", fail)
        with pytest.raises(type(error)):
            run_worker({"job": worker.TrainingJob(None, None, 1, {}), "coordinator": coordinator})
        assert ray.get(coordinator.take_events.remote())[0] == [event]
        assert ray.get(coordinator.poll.remote(None)) == "abort"


def test_a_job_is_pickled_with_its_store(tmp_path):
    job = worker.TrainingJob(None, None, 1, {}, CheckpointStore(Storage(str(tmp_path)), 3))
    assert cloudpickle.loads(cloudpickle.dumps(job)).store.updates() == []
