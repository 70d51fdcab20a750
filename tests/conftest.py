import hashlib
import os
import resource
import sys
from contextlib import contextmanager
from functools import partial
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
    "export",
    "diffusion/training/test_loop.py",
    "workflows/tracking",
    "workflows/data",
    "diffusion/training/test_overfitting.py",
    "workflows/training",
    "diffusion/evaluation",
    "diffusion/training/test_distributed.py",
    "test_wheel.py",
    "workflows/publishing/test_artifacts.py",
    "workflows/sweep/test_trial.py",
    "workflows/test_bulk_sampling.py",
    "diffusion/process/test_recovery.py",
    "workflows/sweep/test_tuner.py",
    "diffusion/test_plugin.py",
    "diffusion/training/test_conditional.py",
    "workflows/test_ui.py",
    "benchmarks",
    "workflows/storage/test_old_runs.py",
    "workflows/cli/test_main.py",
    "workflows/sweep/test_refused_sweep.py",
    "diffusion/data/test_augmentation.py",
    "workflows/test_evaluate.py",
    "workflows/publishing/test_deployed_sampler.py",
    "workflows/evaluation",
    "diffusion/test_devices.py",
    "workflows/test_doctor.py",
    "workflows/test_sync.py",
    "workflows/test_runs.py",
    "workflows/storage/test_storage.py",
    "workflows/sweep/report",
    "diffusion/training/test_super_resolution.py",
    "diffusion/training/test_best_evaluation.py",
)

# Modules that `make test` runs in one process: those that start Ray, and those whose fixtures convert models.
GROUPS = {
    "ray": (
        "workflows/training/test_run_training.py",
        "workflows/training/test_refused_training.py",
        "workflows/training/test_coordinator.py",
        "workflows/training/test_worker_group.py",
        "workflows/test_api.py",
        "workflows/data",
        "workflows/sweep/test_refused_sweep.py",
    ),
    "export": ("export/",),
}

# The same examples in every run, and no test fails because the machine is busy.
settings.register_profile(
    "project", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")

# Several tests run at a time, each with its processes: more threads than cores slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadgroup`, modules whose fixtures are dear run in one process: see `GROUPS`."""
    from xdist.scheduler import LoadFileScheduling

    class LoadGroupScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            path = super()._split_scope(nodeid)
            below = path.removeprefix("tests/")
            return next((name for name, paths in GROUPS.items() if below.startswith(paths)), path)

    return LoadGroupScheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


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


@pytest.fixture(scope="session", autouse=True)
def _one_window_for_the_same_data():
    """Most of the time of loading a data set is that of its log-SNR window; many tests load the same ones."""
    dataset = sys.modules.get("diffusion.data.dataset")
    if dataset is None:  # no test of this session loads data
        yield
        return
    compute, found = dataset.detail_log_snr, {}

    def detail_log_snr(examples):
        values = examples.contiguous().numpy()
        key = values.shape, hashlib.sha256(values).digest()
        if key not in found:
            found[key] = compute(examples)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "detail_log_snr", detail_log_snr)
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Undo what a command that ran in this process set."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def device(monkeypatch):
    """A simulated device other than the CPU."""
    from tests.simulated_device import simulated_device

    with simulated_device(monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def few_trees():
    """Classifiers that tell samples from data have 10 trees instead of 100, to save time."""
    from sklearn import ensemble

    from diffusion.evaluation import sample_metrics

    few = partial(ensemble.HistGradientBoostingClassifier, max_iter=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "HistGradientBoostingClassifier", few)
        patch.setattr(sample_metrics, "_REFERENCES", {})  # which know floors by more trees
        yield


@pytest.fixture(scope="module")
def small_reference(few_trees):
    """Samples are compared with few examples as well: what is compared is tested elsewhere."""
    from diffusion.evaluation import sample_metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_metrics, "MAX_REFERENCE", 400)
        yield


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
