"""Machines that a cluster can grow to, where it stores runs, and joining it."""

import json
from pathlib import Path

import pytest

from diffusion.errors import InputError
from workflows.cli.run_options import TrainFlags
from workflows.cli.tune_options import TuneFlags
from workflows.cluster import nodes
from workflows.cluster.kinds import CLUSTER_KINDS
from workflows.environment import default_output_dir, shared_location
from workflows.training.worker_group import WorkerResources, max_concurrent_groups, plan_workers

GPU = {"CPU": 4, "GPU": 1, "memory": 16e9}
HEAD = {"node:__internal_head__": 1.0, "memory": 8e9}


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Function that simulates a running head node without workers, and the config file of `ray up` there."""

    def set_up(provider="aws", **limits):
        config = {
            "provider": {"type": provider},
            "head_node_type": "head",
            "max_workers": limits.get("all", 4),
            "available_node_types": {
                "head": {"resources": {"CPU": 0}, "max_workers": 0},
                "gpu": {"resources": GPU, "max_workers": limits.get("gpu", 4)},
            },
        }
        path = tmp_path / "ray_bootstrap_config.yaml"
        path.write_text(json.dumps(config))
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        monkeypatch.setenv("RAY_DDPM_CLUSTER_CONFIG", str(path))
        monkeypatch.setattr(nodes.ray, "nodes", lambda: [{"Alive": True, "Resources": HEAD}])
        return path

    return set_up


def test_workers_are_planned_for_machines_that_can_still_be_started(cloud):
    cloud()
    assert nodes.possible_nodes() == [HEAD, GPU, GPU, GPU, GPU]
    assert plan_workers(4) == WorkerResources(4, threads=4, uses_gpus=True)
    assert max_concurrent_groups(WorkerResources(1, 1, uses_gpus=True, gpus_per_worker=0.25)) == 16
    with pytest.raises(InputError, match="the cluster has 4 GPUs"):
        plan_workers(5)


def test_the_limit_of_the_whole_cluster_applies_too(cloud):
    cloud(all=2, gpu=4)
    assert nodes.possible_nodes() == [HEAD, GPU, GPU]


def test_an_on_premises_cluster_has_only_the_running_machines(cloud):
    cloud(provider="local")
    assert nodes.possible_nodes() == [HEAD]


def test_the_kind_of_a_cluster_says_whether_it_starts_machines(cloud, monkeypatch):
    cloud(provider="of_another_package")
    assert nodes.possible_nodes() == [HEAD, GPU, GPU, GPU, GPU], "one that is not known is taken for a cloud"
    monkeypatch.setitem(CLUSTER_KINDS._loaded, "of_another_package", CLUSTER_KINDS["local"])
    assert nodes.possible_nodes() == [HEAD]


@pytest.mark.parametrize("text", [None, "", "{", "{}"])
def test_without_a_readable_config_only_running_machines_count(cloud, text):
    path = cloud()
    path.unlink() if text is None else path.write_text(text)
    assert nodes.possible_nodes() == [HEAD]


def test_a_local_ray_does_not_grow(cloud, monkeypatch):
    cloud()
    monkeypatch.delenv("RAY_ADDRESS")
    assert nodes.possible_nodes() == [HEAD]


@pytest.mark.parametrize(
    ("storage", "output_dir", "shared"),
    [
        (None, "runs", "/here/runs/one"),
        ("/shared/ray-ddpm", "/shared/ray-ddpm", "/here/runs/one"),
        ("s3://mine/ray-ddpm/", "s3://mine/ray-ddpm/", "s3://mine/ray-ddpm/one"),
    ],
)
def test_the_cluster_sets_where_runs_are_stored(storage, output_dir, shared, monkeypatch):
    monkeypatch.delenv("RAY_DDPM_STORAGE", raising=False)
    if storage:
        monkeypatch.setenv("RAY_DDPM_STORAGE", storage)
    assert TrainFlags().output_dir == TuneFlags().output_dir == default_output_dir() == output_dir
    assert shared_location(Path("/here/runs/one")) == shared


def test_a_missing_cluster_is_reported_in_one_line(monkeypatch):
    from workflows.ray_runtime.session import start_ray

    def refuse(**_):
        raise ConnectionError(
            "Could not find any running Ray instance.\nPlease specify the one to connect to"
        )

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(nodes.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(nodes.ray, "init", refuse)
    with pytest.raises(InputError, match="^RAY_ADDRESS auto: this cluster cannot be joined") as error:
        start_ray(verbose=False)
    assert "\n" not in str(error.value) and "unset RAY_ADDRESS" in str(error.value)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConnectionError):
        start_ray(verbose=False)
