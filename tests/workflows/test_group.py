"""Groups of workers: where they fit, what they hand over, and that nothing of them stays."""

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
from ray.util import placement_group_table
from safetensors.torch import load

from diffusion.data import load_dataset
from diffusion.errors import InputError
from diffusion.presets import preset
from diffusion.training import Training
from workflows import group
from workflows.group import GroupFailed, Layout, groups_at_once, plan_layout, run_group
from workflows.worker import Job

ROOT = Path(__file__).parents[2]
TWO = Layout(2, 1, uses_gpus=False)


def nodes_of(*resources):
    return [{"Alive": True, "Resources": {**each, "memory": 1e9}} for each in resources]


@pytest.fixture
def cluster(monkeypatch):
    def set_nodes(*resources):
        monkeypatch.setattr(group.ray, "nodes", lambda: nodes_of(*resources))

    return set_nodes


@pytest.mark.parametrize(
    ("nodes", "workers", "threads"),
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
def test_workers_share_the_processors(cluster, nodes, workers, threads):
    cluster(*nodes)
    assert plan_layout(workers) == Layout(workers, threads, uses_gpus=False)


@pytest.mark.parametrize(
    ("nodes", "workers", "threads"),
    [
        ([{"CPU": 16, "GPU": 2}], 1, 8),
        ([{"CPU": 16, "GPU": 2}], 2, 8),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], 1, 8),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 12, "GPU": 4}], 6, 3),
    ],
)
def test_where_there_are_gpus_each_worker_has_one(cluster, nodes, workers, threads):
    cluster(*nodes)
    layout = plan_layout(workers)
    assert layout == Layout(workers, threads, uses_gpus=True)
    assert layout.resources == {"CPU": threads, "GPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "workers", "words"),
    [
        ([{"CPU": 2}], 3, "--num-workers 3: the cluster has 2 processors; give 2 or fewer"),
        ([{"CPU": 2}, {"CPU": 1}], 9, "--num-workers 9: the cluster has 3 processors; give 3 or fewer"),
        (
            [{"CPU": 64, "GPU": 1}],
            2,
            "--num-workers 2: the cluster has 1 GPUs (one worker each); give 1 or fewer",
        ),
    ],
)
def test_more_workers_than_fit_are_refused_in_one_line(cluster, nodes, workers, words):
    cluster(*nodes)
    with pytest.raises(InputError) as caught:
        plan_layout(workers)
    assert str(caught.value) == words
    with pytest.raises(InputError, match="^--workers-per-trial"):
        plan_layout(workers, "--workers-per-trial")


def test_machines_that_are_gone_do_not_count(monkeypatch):
    gone = {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}
    monkeypatch.setattr(group.ray, "nodes", lambda: [*nodes_of({"CPU": 2}), gone])
    assert plan_layout(2) == TWO
    with pytest.raises(InputError):
        plan_layout(3)


def places(nodes, layout):
    """How many of its workers fit on the nodes, side by side."""
    need = layout.resources
    return sum(int(min(node.get(name, 0) // amount for name, amount in need.items())) for node in nodes)


machines = st.lists(
    st.fixed_dictionaries({"CPU": st.integers(0, 12)}, optional={"GPU": st.integers(1, 4)}),
    min_size=1,
    max_size=4,
)


@given(machines, st.integers(1, 20))
def test_what_is_planned_fits_or_it_would_wait_for_ever(nodes, workers):
    """And no thread more would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group.ray, "nodes", lambda: nodes_of(*nodes))
        try:
            layout = plan_layout(workers)
        except InputError:
            return
        assert places(nodes, layout) >= workers
        at_once = groups_at_once(layout)
        assert at_once * workers <= places(nodes, layout) < (at_once + 1) * workers
        if not layout.uses_gpus:
            assert places(nodes, Layout(workers, layout.threads + 1, uses_gpus=False)) < workers


@given(machines)
def test_as_many_workers_as_a_refusal_allows_are_not_refused(nodes):
    assume(any(node["CPU"] for node in nodes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group.ray, "nodes", lambda: nodes_of(*nodes))
        with pytest.raises(InputError) as caught:
            plan_layout(1000)
        allowed = int(str(caught.value).split("give ")[1].split()[0])
        assume(allowed)
        layout = plan_layout(allowed)
        assert layout.num_workers == allowed and places(nodes, layout) >= allowed


TRIALS = ("ray::WorkersTrial", "ray::ResourceTrainable", "ray::ImplicitFunc")
PARTS = (*TRIALS, "ray::RayTrainWorker", "ray::TrainController", "ray::PlacementGroupCleaner", "ray::Mailbox")


def processes(*kinds):
    """Those of groups and trials, on the Ray of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(kinds):
                found.append(process)
    return found


def left_behind(seconds=30.0):
    """Placement groups, processes and held processors of groups that are over; Ray takes some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        groups = [each for each in placement_group_table().values() if each["state"] != "REMOVED"]
        held = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
        found = [*groups, *processes(*PARTS), *([f"{held:g} processors"] if held else [])]
        if not found or time.monotonic() > deadline:
            return found
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
    return Job(config, ray.put(dataset), 1, {"run_id": "r"})


class EnoughSeen(Exception):
    """Whoever listens has seen enough."""


@pytest.mark.slow
def test_a_group_of_workers_is_the_training_in_this_process_whoever_was_cut_off_before(job, config, dataset):
    """Listeners that raise leave nothing that the next group would wait for."""
    seen = []

    def listen(event):
        seen.append(event)
        if event["kind"] == "evaluated" and event["updates"] >= 20:
            raise EnoughSeen

    for _ in range(2):
        seen.clear()
        with pytest.raises(EnoughSeen):
            run_group(job, TWO, listen)
        assert [event["kind"] for event in seen] == ["started", "evaluated", "evaluated"]

    events, progress = [], []
    run_group(job, TWO, events.append, progress.append)
    assert [event["kind"] for event in events] == ["started", *["evaluated"] * 4, "finished"]
    assert events[0]["updates"] == 0 and events[0]["history"] == []
    assert [event["updates"] for event in events[1:-1]] == [10, 20, 30, 40]
    assert progress == sorted(progress) and progress[-1] <= 40
    assert not left_behind()

    alone = {}

    def keep(report):
        alone[report.updates] = (
            {name: weight.clone() for name, weight in report.model.network.state_dict().items()},
            report.metrics,
        )

    Training(config, dataset, keep).run()
    for event in events[1:-1]:
        weights, metrics = alone[event["updates"]]
        theirs = load(event["files"]["model.safetensors"])
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=1e-5)
        assert event["metrics"] == pytest.approx(metrics, rel=1e-3)
        assert set(event["files"]) == {
            "config.json",
            "model.safetensors",
            "samples.png",
            "elbo_per_example.npy",
        }


@pytest.mark.slow
def test_a_group_whose_worker_dies_fails_in_one_line_and_leaves_nothing(job, config, dataset):
    """Without failures allowed, as in a trial of a sweep."""
    long = Job(config.with_values({"training.num_updates": 20_000}), job.dataset, 1, {})

    def kill_one(event):
        if event["kind"] == "started":
            processes("ray::RayTrainWorker")[0].kill()

    with pytest.raises(GroupFailed) as caught:
        run_group(long, TWO, kill_one)
    assert "\n" not in str(caught.value) and str(caught.value)
    assert not left_behind()


SWEEP = (
    "--data heart --workers-per-trial 2 --num-trials 6 --name nested --training.num-updates 800 "
    "--training.num-evaluations 4 --training.batch-size 64 --network.hidden-size 16 --metrics.num-samples 50 "
    "--metrics.num-examples 64 --sampler.num-steps 5 --search.num-train-timesteps 50 --search.beta-end 0.2 "
    "--search.learning-rate 1e-6 1e-2"
).split()


@pytest.fixture(scope="module")
def another_ray():
    """As of another command on the same machine."""
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


class Killer:
    """Ends two trials by SIGKILL: the first while it trains, the fifth while its workers start."""

    def __init__(self, folder):
        self.folder, self.killed = folder, []
        self.fourths: set[psutil.Process] = set()

    def look(self):
        """Kill who is due, and say how many trials are over."""
        table = self.folder / "trials.csv"
        over = len(pd.read_csv(table)) if table.exists() else 0
        trials = set(processes(*TRIALS))
        if over == 3:
            self.fourths |= trials
        due = over == 4 and processes("ray::RayTrainWorker") and not trials & self.fourths
        if (over == 0 and list(self.folder.glob("trials/*/samples.png"))) or due:
            for process in trials - set(self.killed) if len(self.killed) == bool(due) else ():
                process.kill()
                self.killed.append(process)
        return over


@pytest.fixture(scope="module")
def nested(ray_here, another_ray, tmp_path_factory):
    """A sweep that stops most of its trials early, and two of whose trials are killed."""
    folder = tmp_path_factory.mktemp("nested")
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "RAY"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **address}
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "workflows" / "tune.py"), *SWEEP],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
    killer = Killer(folder / "runs" / "nested")
    over, at = 0, time.monotonic()
    try:
        while process.poll() is None:
            if (now := killer.look()) != over:
                over, at = now, time.monotonic()
            assert time.monotonic() < at + 120.0, f"it waits:\n{(folder / 'output.txt').read_text()}"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, (folder / "output.txt").read_text()
    assert len(killer.killed) == 2
    return folder


@pytest.mark.slow
def test_a_sweep_of_nested_groups_ends_though_trials_are_stopped_and_killed(nested):
    table = pd.read_csv(nested / "runs" / "nested" / "trials.csv")
    statuses = table["status"].value_counts().to_dict()
    assert len(table) == 6 and set(statuses) == {"finished", "stopped", "failed"}
    assert statuses["failed"] == 2 and statuses["stopped"] >= 2, "whose groups were cut off"
    ran = table[table["status"] != "failed"]
    assert (ran["updates"] >= 200).all() and ran["objective"].notna().all()
    assert table[table["status"] == "failed"]["reason"].notna().all()
    assert (nested / "runs/nested/champion/sampler.onnx").exists()
    assert "Traceback" not in (nested / "output.txt").read_text()


@pytest.mark.slow
def test_mlflow_holds_every_trial_of_nested_groups(nested):
    client = MlflowClient(f"sqlite:///{nested / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("heart").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED"] * 2 + ["FINISHED"] * 5, (
        "and the sweep itself"
    )
    for run in runs:
        if "mlflow.parentRunId" in run.data.tags and run.info.status == "FINISHED":
            steps = [each.step for each in client.get_metric_history(run.info.run_id, "val/mse")]
            assert steps == list(range(200, 200 * len(steps) + 1, 200)) and steps


@pytest.mark.slow
def test_nested_groups_leave_neither_placement_groups_nor_processes(nested):
    assert not left_behind()


def test_workers_that_find_no_place_are_given_up_in_one_line(job, monkeypatch):
    class Waiting:
        """A trainer that waits for machines, as Ray's does: for ever."""

        def __init__(self, *_, **__):
            pass

        def fit(self):
            time.sleep(20)

    monkeypatch.setattr(group, "TorchTrainer", Waiting)
    monkeypatch.setattr(group, "_SECONDS_TO_START", 2.0)
    started = time.monotonic()
    with pytest.raises(GroupFailed, match="no place for 1 workers .64 CPU each. within") as failure:
        run_group(job, Layout(1, 64, uses_gpus=False), lambda event: None)
    assert "\n" not in str(failure.value) and time.monotonic() - started < 15
