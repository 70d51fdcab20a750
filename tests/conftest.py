import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Modules that train, export or start processes: `make test-quick` leaves them out. Paths below tests/, the
# longest first: with one of them left to the end, the other processes would wait for it.
LONG = (
    "workflows/training/test_run_training.py",
    "workflows/test_api",
    "workflows/training/test_worker_group.py",
    "workflows/sweep/test_sweep_resume.py",
    "workflows/sweep/test_run_sweep.py",
    "workflows/tracking",
    "workflows/data",
    "diffusion/training/test_loop.py",
    "workflows/test_bulk_sampling.py",
    "diffusion/training/test_distributed.py",
    "workflows/sweep/test_trial.py",
    "diffusion/training/test_overfitting.py",
    "workflows/training",
    "workflows/sweep/test_tuner.py",
    "export",
    "workflows/publishing/test_artifacts.py",
    "diffusion/test_plugin.py",
    "test_wheel.py",
    "diffusion/evaluation",
    "diffusion/training/test_conditional.py",
    "workflows/test_ui.py",
    "diffusion/process/test_recovery.py",
    "benchmarks",
    "workflows/storage/test_old_runs.py",
    "workflows/cli/test_main.py",
)

# The same examples in every run, and no test fails because the machine is busy.
settings.register_profile(
    "project", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")

# Several tests run at a time, each with its processes: more threads than cores slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Mark the tests of the modules in `LONG`, and start with the longest modules."""
    folder = Path(__file__).parent
    ranks = {}
    for item in items:
        path = item.path.relative_to(folder).as_posix()
        ranks[item] = next((rank for rank, start in enumerate(LONG) if path.startswith(start)), len(LONG))
        if ranks[item] < len(LONG):
            item.add_marker("long")
    items.sort(key=ranks.__getitem__)


@pytest.fixture(autouse=True)
def _one_thread():
    """Undo what a command that ran in this process set."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def small_reference(monkeypatch):
    """Samples are compared with few examples, to save time: what is compared is tested elsewhere."""
    from diffusion.evaluation import sample_metrics

    monkeypatch.setattr(sample_metrics, "MAX_REFERENCE", 400)


@contextmanager
def _max_file_size(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(name="max_file_size")
def _max_file_size_fixture():
    """Context manager that limits the size of every file, which simulates a full disk."""
    return _max_file_size
