"""Starting and stopping Ray, in a process of its own."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private import services

from workflows.ray_runtime import session

ROOT = Path(__file__).resolve().parents[3]

# A thread collects garbage from the moment when Ray marks the driver as disconnected: with handles in
# reference cycles left to it, Ray ends the process ("The core worker has already been shutdown").
GARBAGE_OF_RAY = """
import gc
import threading
import ray
from ray._private.worker import global_worker
from workflows.ray_runtime.session import start_ray, stop_ray

start_ray(verbose=False)
gc.disable()  # so that what is collected when does not depend on chance
for number in range(20_000):
    cycle = [ray.put(number)]
    cycle.append(cycle)
del cycle

def collect():
    while global_worker.connected:
        pass
    gc.collect()

thread = threading.Thread(target=collect, daemon=True)
thread.start()
stop_ray()
thread.join()
start_ray(verbose=False)
print(ray.get(ray.put("usable again")))
stop_ray()
"""


@pytest.mark.slow
def test_another_thread_may_collect_garbage_while_ray_stops():
    result = subprocess.run(
        [sys.executable, "-c", GARBAGE_OF_RAY], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert (result.returncode, result.stdout) == (0, "usable again\n"), result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Ray ends its processes by their group")
def test_rays_processes_do_not_get_the_signals_of_the_drivers_group():
    original = services.ConsolePopen
    with session._processes_in_own_sessions():
        process = services.ConsolePopen(["sleep", "60"])
    try:
        assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
    finally:
        process.kill()
        process.wait()
    assert services.ConsolePopen is original


def test_sigterm_while_ray_starts_is_an_interrupt(monkeypatch):
    def init(**_arguments):
        sys.exit(15)  # as Ray's own handler does

    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session, "ray_address", lambda: None)
    monkeypatch.setattr(session, "make_token_private", lambda create: "")
    with pytest.raises(KeyboardInterrupt):
        session.start_ray(verbose=False)


@pytest.mark.parametrize("address", [None, "127.0.0.1:6379"])
def test_the_token_is_private_before_ray_starts_and_a_cluster_has_its_own(monkeypatch, tmp_path, address):
    """Ray would write one for everyone to read; one of our own would not open the cluster."""
    token, modes = tmp_path / "auth_token", []

    def init(**_arguments):
        modes.append(stat.S_IMODE(token.stat().st_mode) if token.exists() else None)

    for name, value in (("MODE", "token"), ("TOKEN_PATH", str(token))):
        monkeypatch.setenv(f"RAY_AUTH_{name}", value)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session, "ray_address", lambda: address)
    monkeypatch.setattr(session, "_check_listening", lambda address: None)
    monkeypatch.setattr(session, "treat_as_interrupt", lambda: None)
    monkeypatch.setattr(session, "_started_here", False)
    session.start_ray(verbose=False)
    assert modes == [None if address else 0o600]
