"""Use of this machine, sampled in the background."""

import queue

from workflows.tracking import system_metrics
from workflows.tracking.system_metrics import SystemMetrics


def test_samples_are_logged_until_it_is_stopped():
    samples = queue.Queue()
    sampling = SystemMetrics(lambda metrics, step: samples.put((metrics, step)), interval=0.01)
    first, second = (samples.get(timeout=120) for _ in range(2))
    sampling.stop()
    assert {"system/cpu_utilization_percentage", "system/disk_available_megabytes"} <= set(first[0])
    assert all(name.startswith("system/") and value >= 0 for name, value in first[0].items())
    assert second[1] >= first[1] > 1.7e9, "seconds since 1970"
    sampling._thread.join(120)
    assert not sampling._thread.is_alive()


def test_without_psutil_nothing_is_sampled(monkeypatch):
    monkeypatch.setattr(system_metrics, "_monitors", lambda: [])
    sampling = SystemMetrics(lambda *_: 1 / 0, interval=0.0)
    sampling._thread.join(120)
    assert not sampling._thread.is_alive()


def test_a_monitor_that_fails_does_not_hide_the_others():
    class Monitor:
        def __init__(self, value):
            self.value = value

        def collect_metrics(self):
            self.value / 2.0

        def aggregate_metrics(self):
            return {"load": self.value}

        def clear_metrics(self):
            pass

    assert system_metrics._sample([Monitor(None), Monitor(1.0)]) == {"system/load": 1.0}
