"""What a cluster may grow to, and where it keeps things."""

import json
from pathlib import Path

import pytest

from diffusion.errors import InputError
from workflows import nodes
from workflows.group import Layout, groups_at_once, plan_layout
from workflows.options import TrainFlags
from workflows.storage_place import default_output_dir, shared_location
from workflows.tune_options import TuneFlags

GPU = {"CPU": 4, "GPU": 1, "memory": 16e9}
HEAD = {"node:__internal_head__": 1.0, "memory": 8e9}


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A head that runs alone, and the file that `ray up` left there."""

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
        monkeypatch.setenv(nodes.CONFIG_VARIABLE, str(path))
        monkeypatch.setattr(nodes.ray, "nodes", lambda: [{"Alive": True, "Resources": HEAD}])
        return path

    return set_up


def test_a_cluster_without_workers_is_planned_with_those_that_may_come(cloud):
    cloud()
    assert nodes.possible_nodes() == [HEAD, GPU, GPU, GPU, GPU]
    assert plan_layout(4) == Layout(4, threads=4, uses_gpus=True)
    assert groups_at_once(Layout(1, 1, uses_gpus=True, gpus_per_worker=0.25)) == 16
    with pytest.raises(InputError, match="the cluster has 4 GPUs"):
        plan_layout(5)


def test_the_whole_cluster_s_limit_counts_too(cloud):
    cloud(all=2, gpu=4)
    assert nodes.possible_nodes() == [HEAD, GPU, GPU]


def test_machines_of_one_s_own_are_those_that_run(cloud):
    cloud(provider="local")
    assert nodes.possible_nodes() == [HEAD]


@pytest.mark.parametrize("text", [None, "", "{", "{}"])
def test_without_a_readable_file_those_that_run_count(cloud, text):
    path = cloud()
    path.unlink() if text is None else path.write_text(text)
    assert nodes.possible_nodes() == [HEAD]


def test_a_ray_of_one_s_own_does_not_grow(cloud, monkeypatch):
    cloud()
    monkeypatch.delenv("RAY_ADDRESS")
    assert nodes.possible_nodes() == [HEAD]


@pytest.mark.parametrize(
    ("storage", "of_train", "of_tune", "shared"),
    [
        (None, "runs", "runs", "/here/runs/one"),
        ("/shared/ray-ddpm", "/shared/ray-ddpm", "/shared/ray-ddpm", "/here/runs/one"),
        ("s3://mine/ray-ddpm/", "s3://mine/ray-ddpm/", "HOME/runs", "s3://mine/ray-ddpm/one"),
    ],
)
def test_the_cluster_says_where_runs_are_kept(storage, of_train, of_tune, shared, monkeypatch):
    monkeypatch.delenv("RAY_DDPM_STORAGE", raising=False)
    if storage:
        monkeypatch.setenv("RAY_DDPM_STORAGE", storage)
    assert TrainFlags().output_dir == default_output_dir(buckets=True) == of_train
    assert TuneFlags().output_dir == of_tune.replace("HOME", str(Path.home()))
    assert shared_location(Path("/here/runs/one")) == shared


def test_a_cluster_that_is_not_there_is_told_in_one_line(monkeypatch):
    from workflows.ray_session import start_ray

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
