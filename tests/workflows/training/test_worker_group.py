"""Groups of workers: how many fit on a cluster, their events, and that they leave nothing behind."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import ray
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from mlflow import MlflowClient
from ray.train.torch import TorchTrainer
from ray.util import placement_group_table
from safetensors.torch import load

from diffusion.data.dataset import load_dataset
from diffusion.errors import InputError
from diffusion.presets import preset
from diffusion.training.loop import Training
from tests.workflows.conftest import user_environment
from workflows.data.load import LoadedData
from workflows.training import worker_group
from workflows.training.events import Evaluated, Finished, Started
from workflows.training.worker import TrainingJob
from workflows.training.worker_group import (
    WorkerGroupError,
    WorkerResources,
    max_concurrent_groups,
    plan_workers,
    run_worker_group,
)

ROOT = Path(__file__).parents[3]
TWO_WORKERS = WorkerResources(2, 1, uses_gpus=False)


def nodes_of(*resources):
    return [{"Alive": True, "Resources": {**each, "memory": 1e9}} for each in resources]


@pytest.fixture
def cluster(monkeypatch):
    def set_nodes(*resources):
        monkeypatch.setattr(worker_group.ray, "nodes", lambda: nodes_of(*resources))

    return set_nodes


@pytest.mark.parametrize(
    ("nodes", "num_workers", "threads"),
    [
        ([{"CPU": 2}], 1, 2),
        ([{"CPU": 2}], 2, 1),
        ([{"CPU": 16}], 1, 16),
        ([{"CPU": 16}], 3, 5),
        ([{"CPU": 4}, {"CPU": 4}], 2, 4),
        ([{"CPU": 4}, {"CPU": 4}], 3, 2),
        ([{"CPU": 8}, {"CPU": 2}], 2, 4),
        ([{"CPU": 8}, {"CPU": 2}], 5, 2),
        ([{}, {"CPU": 3}], 3, 1),
    ],
)
def test_workers_share_the_cpu_cores(cluster, nodes, num_workers, threads):
    cluster(*nodes)
    assert plan_workers(num_workers) == WorkerResources(num_workers, threads, uses_gpus=False)


@pytest.mark.parametrize(
    ("nodes", "num_workers", "threads"),
    [
        ([{"CPU": 16, "GPU": 2}], 1, 8),
        ([{"CPU": 16, "GPU": 2}], 2, 8),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], 1, 8),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 12, "GPU": 4}], 6, 3),
    ],
)
def test_each_worker_gets_a_gpu_if_there_are_gpus(cluster, nodes, num_workers, threads):
    cluster(*nodes)
    resources = plan_workers(num_workers)
    assert resources == WorkerResources(num_workers, threads, uses_gpus=True)
    assert resources.per_worker == {"CPU": threads, "GPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "num_workers", "message"),
    [
        ([{"CPU": 2}], 3, "--num-workers 3: the cluster has 2 CPU cores; give 2 or fewer"),
        ([{"CPU": 2}, {"CPU": 1}], 9, "--num-workers 9: the cluster has 3 CPU cores; give 3 or fewer"),
        (
            [{"CPU": 64, "GPU": 1}],
            2,
            "--num-workers 2: the cluster has 1 GPUs (one worker each); give 1 or fewer",
        ),
    ],
)
def test_more_workers_than_fit_are_refused_in_one_line(cluster, nodes, num_workers, message):
    cluster(*nodes)
    with pytest.raises(InputError) as caught:
        plan_workers(num_workers)
    assert str(caught.value) == message
    with pytest.raises(InputError, match="^--workers-per-trial"):
        plan_workers(num_workers, "--workers-per-trial")


def test_dead_machines_do_not_count(monkeypatch):
    dead = {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}
    monkeypatch.setattr(worker_group.ray, "nodes", lambda: [*nodes_of({"CPU": 2}), dead])
    assert plan_workers(2) == TWO_WORKERS
    with pytest.raises(InputError):
        plan_workers(3)


def count_slots(nodes, resources):
    """Number of workers with these resources that fit on the nodes at a time."""
    need = resources.per_worker
    return sum(int(min(node.get(name, 0) // amount for name, amount in need.items())) for node in nodes)


machines = st.lists(
    st.fixed_dictionaries({"CPU": st.integers(0, 12)}, optional={"GPU": st.integers(1, 4)}),
    min_size=1,
    max_size=4,
)


@given(machines, st.integers(1, 20))
def test_planned_workers_fit_and_would_not_with_more_threads(nodes, num_workers):
    """Ray would wait for ever for workers that do not fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_group.ray, "nodes", lambda: nodes_of(*nodes))
        try:
            resources = plan_workers(num_workers)
        except InputError:
            return
        slots = count_slots(nodes, resources)
        assert slots >= num_workers
        num_groups = max_concurrent_groups(resources)
        assert num_groups * num_workers <= slots < (num_groups + 1) * num_workers
        if not resources.uses_gpus:
            more_threads = WorkerResources(num_workers, resources.threads + 1, uses_gpus=False)
            assert count_slots(nodes, more_threads) < num_workers


@given(machines)
def test_the_number_of_workers_that_an_error_message_suggests_is_accepted(nodes):
    assume(any(node["CPU"] for node in nodes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_group.ray, "nodes", lambda: nodes_of(*nodes))
        with pytest.raises(InputError) as caught:
            plan_workers(1000)
        allowed = int(str(caught.value).split("give ")[1].split()[0])
        assume(allowed)
        resources = plan_workers(allowed)
        assert resources.num_workers == allowed and count_slots(nodes, resources) >= allowed


TRIAL_PROCESSES = ("ray::WorkersTrial", "ray::ResourceTrainable", "ray::ImplicitFunc")
GROUP_PROCESSES = (
    *TRIAL_PROCESSES,
    "ray::RayTrainWorker",
    "ray::TrainController",
    "ray::Coordinator",
)


def find_processes(*names):
    """Processes with these names on the Ray of this process."""
    matching = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(names):
                matching.append(process)
    return matching


def left_behind(seconds=30.0):
    """Placement groups, processes and CPUs that ended groups still hold; waits, as Ray takes some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        groups = [each for each in placement_group_table().values() if each["state"] != "REMOVED"]
        held = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
        remaining = [*groups, *find_processes(*GROUP_PROCESSES), *([f"{held:g} CPUs"] if held else [])]
        if not remaining or time.monotonic() > deadline:
            return remaining
        time.sleep(0.2)


@pytest.fixture(scope="module")
def config():
    return preset("heart").with_values(
        {
            "training.num_updates": 40,
            "training.num_evaluations": 4,
            "training.batch_size": 33,
            "network.hidden_size": 16,
            "metrics.num_samples": 20,
            "metrics.num_examples": 32,
            "sampler.num_steps": 4,
        }
    )


@pytest.fixture(scope="module")
def dataset(config):
    return load_dataset(config.data)


@pytest.fixture
def job(ray_here, config, dataset):
    return TrainingJob(config, ray.put(LoadedData(dataset)), 1, {"run_id": "r"})


class StopListening(Exception):
    """Raised by a listener in the middle of a training."""


@pytest.mark.slow
def test_a_group_trains_the_same_model_as_one_process_even_after_interrupted_groups(job, config, dataset):
    """A listener that raises leaves nothing behind that the next group would wait for."""
    received = []

    def listen(event):
        received.append(event)
        if isinstance(event, Evaluated) and event.updates >= 20:
            raise StopListening

    for _ in range(2):
        received.clear()
        with pytest.raises(StopListening):
            run_worker_group(job, TWO_WORKERS, listen)
        assert [type(event) for event in received] == [Started, Evaluated, Evaluated]

    events, progress = [], []
    run_worker_group(job, TWO_WORKERS, events.append, progress.append)
    assert [type(event) for event in events] == [Started, *[Evaluated] * 4, Finished]
    assert events[0].updates == 0 and events[0].history == []
    assert [event.updates for event in events[1:-1]] == [10, 20, 30, 40]
    assert progress == sorted(progress) and progress[-1] <= 40
    assert not left_behind()

    expected = {}

    def report(result):
        expected[result.updates] = (
            {name: weight.clone() for name, weight in result.model.network.state_dict().items()},
            result.metrics,
        )

    Training(config, dataset, report).run()
    for event in events[1:-1]:
        expected_weights, metrics = expected[event.updates]
        weights = load(event.files["model.safetensors"])
        for name, weight in expected_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
        assert event.metrics == pytest.approx(metrics, rel=1e-3)
        pictures = {"untrained.png": event is events[1], "samples.png": event is events[-2]}
        assert set(event.files) == {name for name, there in pictures.items() if there} | {
            "config.json",
            "model.safetensors",
            "elbo_per_example.npy",
        }


@pytest.mark.slow
def test_the_controller_is_ended_even_if_something_still_refers_to_it(job, monkeypatch):
    """Ray ends an actor that nothing refers to; its process has been seen to stay all the same."""
    controllers = []
    shut_down = worker_group._shut_down

    def end_training(event):
        raise StopListening

    def keep_controller(coordinator, *others):
        controllers.append(ray.get(coordinator.controller.remote()))
        shut_down(coordinator, *others)

    monkeypatch.setattr(worker_group, "_shut_down", keep_controller)
    with pytest.raises(StopListening):
        run_worker_group(job, TWO_WORKERS, end_training)
    assert controllers[0] is not None and not left_behind()


@pytest.mark.slow
def test_a_group_whose_worker_dies_fails_in_one_line_and_leaves_nothing(job, config, dataset):
    """No restarts are allowed, as in a trial of a sweep."""
    long = TrainingJob(config.with_values({"training.num_updates": 20_000}), job.data, 1, {})

    def kill_one(event):
        if isinstance(event, Started):
            find_processes("ray::RayTrainWorker")[0].kill()

    with pytest.raises(WorkerGroupError) as caught:
        run_worker_group(long, TWO_WORKERS, kill_one)
    assert "\n" not in str(caught.value) and str(caught.value)
    assert not left_behind()


SWEEP = (
    "--data heart --workers-per-trial 2 --num-trials 6 --name nested --training.num-updates 800 "
    "--training.num-evaluations 4 --training.batch-size 64 --network.hidden-size 16 --metrics.num-samples 50 "
    "--metrics.num-examples 64 --sampler.num-steps 5 --search.num-train-timesteps 50 --search.beta-end 0.2 "
    "--search.learning-rate 1e-6 1e-2 --early-stopping eager"
).split()


@pytest.fixture(scope="module")
def another_ray():
    """Another Ray on the same machine, as of another command."""
    code = "import ray, sys; ray.init('local', num_cpus=1); print('up', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    yield
    process.communicate()


class TrialKiller:
    """Ends two trials by SIGKILL: the first while it trains, the fifth while its workers start."""

    def __init__(self, folder):
        self.folder, self.killed = folder, []
        self.fourth_trial: set[psutil.Process] = set()

    def poll(self):
        """Kill a trial if it is time to, and return how many trials have ended."""
        table = self.folder / "trials.csv"
        num_ended = len(pd.read_csv(table)) if table.exists() else 0
        trials = set(find_processes(*TRIAL_PROCESSES))
        if num_ended == 3:
            self.fourth_trial |= trials
        first_trains = num_ended == 0 and list(self.folder.glob("trials/*/samples.png"))
        fifth_starts = (
            num_ended == 4 and find_processes("ray::RayTrainWorker") and not trials & self.fourth_trial
        )
        if first_trains or fifth_starts:
            for process in trials - set(self.killed) if len(self.killed) == bool(fifth_starts) else ():
                process.kill()
                self.killed.append(process)
        return num_ended


@pytest.fixture(scope="module")
def nested(ray_here, another_ray, tmp_path_factory):
    """Folder of a sweep that stops most of its trials early, and in which two trials are killed."""
    folder = tmp_path_factory.mktemp("nested")
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}
    environment = user_environment()
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **address}
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "workflows" / "tune.py"), *SWEEP],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
    killer = TrialKiller(folder / "runs" / "nested")
    num_ended, last_change = 0, time.monotonic()
    try:
        while process.poll() is None:
            if (current := killer.poll()) != num_ended:
                num_ended, last_change = current, time.monotonic()
            assert time.monotonic() < last_change + 120.0, f"stuck:\n{(folder / 'output.txt').read_text()}"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, (folder / "output.txt").read_text()
    assert len(killer.killed) == 2
    return folder


@pytest.mark.faults
def test_a_sweep_of_nested_groups_ends_although_trials_are_stopped_and_killed(nested):
    table = pd.read_csv(nested / "runs" / "nested" / "trials.csv")
    statuses = table["status"].value_counts().to_dict()
    assert len(table) == 6 and set(statuses) == {"finished", "stopped", "failed"}
    assert statuses["failed"] == 2 and statuses["stopped"] >= 2, "stopped trials had their groups ended early"
    evaluated = table[table["status"] != "failed"]
    assert (evaluated["updates"] >= 200).all() and evaluated["objective"].notna().all()
    assert table[table["status"] == "failed"]["reason"].notna().all()
    assert (nested / "runs/nested/champion/sampler.onnx").exists()
    assert "Traceback" not in (nested / "output.txt").read_text()


@pytest.mark.faults
def test_mlflow_has_every_trial_of_nested_groups(nested):
    client = MlflowClient(f"sqlite:///{nested / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED"] * 2 + ["FINISHED"] * 5, (
        "one of the finished runs is the sweep itself"
    )
    for run in runs:
        if "mlflow.parentRunId" in run.data.tags and run.info.status == "FINISHED":
            steps = [each.step for each in client.get_metric_history(run.info.run_id, "val/mse")]
            assert steps == list(range(200, 200 * len(steps) + 1, 200)) and steps


@pytest.mark.faults
def test_nested_groups_leave_neither_placement_groups_nor_processes(nested):
    assert not left_behind()


def test_ray_trains_cleaner_is_left_out():
    """Without a dashboard it ends every training with 12 s of waiting."""
    names = [
        {type(each).__name__ for each in trainer(lambda: None)._create_default_callbacks()}
        for trainer in (TorchTrainer, worker_group._Trainer)
    ]
    assert names[0] - names[1] == {"PlacementGroupCleanerCallback"} and names[1]


def test_workers_that_do_not_get_their_resources_fail_in_one_line(job, monkeypatch):
    class WaitingTrainer:
        """Trainer that waits for machines; Ray's own waits for ever."""

        def __init__(self, *_, **__):
            pass

        def fit(self):
            time.sleep(20)

    monkeypatch.setattr(worker_group, "_Trainer", WaitingTrainer)
    monkeypatch.setattr(worker_group, "SECONDS_TO_START", 2.0)
    started = time.monotonic()
    with pytest.raises(WorkerGroupError, match="no room for 1 workers .64 CPU each. within") as failure:
        run_worker_group(job, WorkerResources(1, 64, uses_gpus=False), lambda event: None)
    assert "\n" not in str(failure.value) and time.monotonic() - started < 15
