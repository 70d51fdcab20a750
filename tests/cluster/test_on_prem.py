"""The shipped cluster/on-prem.yaml on three hosts, from `ray up` to `ray down`; in this order."""

import json
import time

import pytest
from lab import ROOT, SHARED, Lab, mlflow_runs, wait_for, why_not
from safetensors.numpy import load_file

pytestmark = pytest.mark.cluster

HOSTS = {"head": "10.200.77.10", "w1": "10.200.77.11", "w2": "10.200.77.12"}
FILE = "~/on-prem.yaml"
PAGE = "http://127.0.0.1:8265"
LENGTH = "--training.num-updates 600 --training.checkpoint-minutes 0.03 --metrics.num-samples 200"


@pytest.fixture(scope="module")
def lab():
    if reason := why_not():
        pytest.skip(reason)
    with Lab(HOSTS) as made:
        for host in HOSTS:
            made.power_on(host)
        text = (ROOT / "cluster" / "on-prem.yaml").read_text()
        for placeholder, value in {
            "YOUR-HEAD": HOSTS["head"],
            "YOUR-WORKER-1": HOSTS["w1"],
            "YOUR-WORKER-2": HOSTS["w2"],
            "YOUR-USER": "root",
            "=/YOUR/SHARED/FOLDER": f"={SHARED}/ray-ddpm",
        }.items():
            text = text.replace(placeholder, value)
        (made.folder / "laptop" / "home" / "on-prem.yaml").write_text(text)
        made.run("laptop", "ray get-auth-token --generate >/dev/null && chmod 600 ~/.ray/auth_token")
        yield made


@pytest.fixture(scope="module")
def cluster(lab):
    """The same once all machines have joined."""
    said = lab.run("laptop", f"python -m workflows.cluster check {FILE}").stdout
    assert "is in order" in said
    lab.run("laptop", f"ray up -y {FILE}", timeout=180)
    wait_for(lambda: num_nodes(lab) == 3, 180, "three nodes")
    return lab


@pytest.fixture(scope="module")
def pages(cluster):
    """MLflow's and Ray's pages, forwarded to the laptop as `make cluster-ui` does."""
    cluster.start("laptop", f"exec ray exec {FILE} --port-forward 5000 --port-forward 8265 'sleep infinity'")
    wait_for(lambda: "200" in ask(cluster, "http://127.0.0.1:5000/health"), 60, "the forwarded pages")
    return cluster


def num_nodes(lab):
    count = "import ray; ray.init(logging_level=40, log_to_driver=False)"
    count += "; print('nodes', sum(n['Alive'] for n in ray.nodes()))"
    said = lab.run("head", f'python -c "{count}"', timeout=60, check=False).stdout
    return int(said.rsplit("nodes ", 1)[1].split()[0]) if "nodes " in said else 0


def ask(lab, url, headers=""):
    """What curl would print of the answer's status, from the laptop."""
    program = "import urllib.request as u, urllib.error as e, sys\n"
    program += "try: print(u.urlopen(u.Request(sys.argv[1], headers=eval(sys.argv[2])), timeout=10).status)\n"
    program += "except e.HTTPError as error: print(error.code)\nexcept OSError as error: print(error)\n"
    return lab.run("laptop", f"python -c '{program}' '{url}' '{headers or {}}'").stdout


def submit(lab, name, flags=""):
    """Start a training as a job through the forwarded dashboard."""
    command = f"python ray-ddpm/workflows/train.py --data heart --num-workers 2 --name {name} {LENGTH}"
    return lab.start("laptop", f"RAY_AUTH_MODE=token ray job submit --address {PAGE} -- {command} {flags}")


def finish(process, seconds):
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, said[-6000:]
    return said


def newest(lab, name):
    """Updates of a run's newest checkpoint, 0 where it has none yet."""
    found = (lab.folder / "shared" / "ray-ddpm" / name / "checkpoints").glob("[0-9]*/manifest.json")
    return max((int(path.parent.name) for path in found), default=0)


def weights(lab, name):
    return load_file(lab.folder / "shared" / "ray-ddpm" / name / "model" / "model.safetensors")


def test_nobody_gets_in_without_the_token(pages):
    token = (pages.folder / "laptop" / "home" / ".ray" / "auth_token").read_text().strip()
    assert "401" in ask(pages, f"{PAGE}/api/jobs/")
    assert "200" in ask(pages, f"{PAGE}/api/jobs/", f'{{"Authorization": "Bearer {token}"}}')


def test_two_hosts_train_to_the_same_parameters_bit_by_bit(cluster):
    script = f"ray submit {FILE} tests/cluster/equal_parameters.py -- {SHARED}/equal"
    assert "both trained" in cluster.run("laptop", script, timeout=180).stdout
    found = [json.loads(path.read_text()) for path in (cluster.folder / "shared" / "equal").iterdir()]
    assert {each["host"] for each in found} == {"w1", "w2"}
    assert len(found) == 2 and found[0]["digest"] == found[1]["digest"]


def test_a_job_trains_on_two_hosts_and_stands_in_mlflow(pages):
    process = submit(pages, "whole")
    wait_for(lambda: newest(pages, "whole") or process.poll() is not None, 150, "a checkpoint")
    hosts = {host for host in HOSTS if pages.processes(host, "RayTrainWorker")}
    said = finish(process, 180)
    assert hosts == {"w1", "w2"} and "sampler.onnx" in said
    assert mlflow_runs(pages, "laptop")["whole"] == ["FINISHED"]


def test_whatever_dies_costs_nothing_but_time(pages):
    """A raylet, MLflow's server, a machine's power and the driver, one after the other."""
    process = submit(pages, "cut")
    go_on(pages, process, 0)

    before = newest(pages, "cut")
    (raylet,) = pages.processes("w1", "raylet/raylet --")
    pages.run("w1", f"kill -9 {raylet}")
    servers = pages.processes("head", "mlflow")
    pages.run("head", f"kill -9 {' '.join(map(str, servers))}")
    wait_for(lambda: not pages.processes("head", "mlflow"), 30, "the end of MLflow's server")
    pages.run("head", "python -m workflows.cluster mlflow")
    go_on(pages, process, before)

    before = newest(pages, "cut")
    pages.power_off("w2")
    time.sleep(5)
    pages.power_on("w2")
    go_on(pages, process, before)

    drivers = pages.processes("head", "workflows/train.py")
    pages.run("head", f"kill -9 {' '.join(map(str, drivers))}")
    process.communicate(timeout=60)
    assert process.returncode != 0 and mlflow_runs(pages, "laptop")["cut"] == ["RUNNING"]
    finish(submit(pages, "cut", "--resume"), 240)

    assert mlflow_runs(pages, "laptop")["cut"] == ["FINISHED"]
    whole, cut = weights(pages, "whole"), weights(pages, "cut")
    assert all((whole[name] == cut[name]).all() for name in whole)
    wait_for(lambda: num_nodes(pages) == 3, 120, "the killed raylet's host")


def go_on(lab, process, updates):
    """Wait until the run "cut" has a checkpoint of more updates."""
    wait_for(lambda: newest(lab, "cut") > updates or process.poll() is not None, 240, "more work")
    assert process.poll() is None, process.communicate()[0][-4000:]


def test_mlflow_s_server_outlives_a_second_ray_up(cluster):
    before = cluster.processes("head", "mlflow server")
    cluster.run("laptop", f"ray up -y {FILE}", timeout=180)
    assert before and cluster.processes("head", "mlflow server") == before
    wait_for(lambda: num_nodes(cluster) == 3, 180, "three nodes")


def test_ray_down_leaves_nothing_of_ray(cluster):
    cluster.run("laptop", f"ray down -y {FILE}", timeout=120)
    names = ("raylet/raylet", "gcs_server", "ray::", "dashboard")
    deadline = time.monotonic() + 120
    while left := {host: name for host in HOSTS for name in names if cluster.processes(host, name)}:
        assert time.monotonic() < deadline, left
        time.sleep(2)
    cluster.run("head", "python -m workflows.cluster mlflow --stop")
    wait_for(lambda: not cluster.processes("head", "mlflow"), 20, "the end of MLflow's server")
