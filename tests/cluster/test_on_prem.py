"""The shipped cluster/on-prem.yaml on three hosts, from `ray up` to `ray down`.

The tests build on each other, in this order.
"""

import json
import time
from functools import partial

import pytest
from lab import ROOT, SHARED, Lab, mlflow_runs, output_of, require_hosts, wait_for
from safetensors.numpy import load_file

pytestmark = pytest.mark.cluster

HOSTS = {"head": "10.200.77.10", "w1": "10.200.77.11", "w2": "10.200.77.12"}
FILE = "~/on-prem.yaml"
DASHBOARD = "http://127.0.0.1:8265"
SHORT_TRAINING = "--training.num-updates 600 --training.checkpoint-minutes 0.03 --metrics.num-samples 200"


@pytest.fixture(scope="module")
def lab():
    require_hosts()
    with Lab(HOSTS) as lab:
        for host in HOSTS:
            lab.power_on(host)
        text = (ROOT / "cluster" / "on-prem.yaml").read_text()
        for placeholder, value in {
            "YOUR-HEAD": HOSTS["head"],
            "YOUR-WORKER-1": HOSTS["w1"],
            "YOUR-WORKER-2": HOSTS["w2"],
            "YOUR-USER": "root",
            "/YOUR/SHARED/FOLDER": f"{SHARED}/ray-ddpm",
        }.items():
            text = text.replace(placeholder, value)
        (lab.folder / "laptop" / "home" / "on-prem.yaml").write_text(text)
        lab.run("laptop", "ray get-auth-token --generate >/dev/null && chmod 600 ~/.ray/auth_token")
        yield lab


@pytest.fixture(scope="module")
def cluster(lab):
    """The lab after `ray up`, once all machines have joined."""
    output = lab.run("laptop", f"python -m workflows.cluster check {FILE}").stdout
    assert "is in order" in output
    lab.run("laptop", f"ray up -y {FILE}", timeout=900)
    wait_for(lambda: num_nodes(lab) == 3, 360, "three nodes")
    return lab


@pytest.fixture(scope="module")
def pages(cluster):
    """The cluster, with MLflow's and Ray's pages forwarded to the laptop as `make cluster-ui` does."""
    cluster.start("laptop", f"exec ray exec {FILE} --port-forward 5000 --port-forward 8265 'sleep infinity'")
    wait_for(lambda: "200" in http_status(cluster, "http://127.0.0.1:5000/health"), 60, "the forwarded pages")
    return cluster


def num_nodes(lab):
    count = "import ray; ray.init(logging_level=40, log_to_driver=False)"
    count += "; print('nodes', sum(n['Alive'] for n in ray.nodes()))"
    output = lab.run("head", f'python -c "{count}"', timeout=60, check=False).stdout
    return int(output.rsplit("nodes ", 1)[1].split()[0]) if "nodes " in output else 0


def http_status(lab, url, headers=""):
    """Request a URL from the laptop; return the HTTP status or the error as text."""
    program = "import urllib.request as u, urllib.error as e, sys\n"
    program += "try: print(u.urlopen(u.Request(sys.argv[1], headers=eval(sys.argv[2])), timeout=10).status)\n"
    program += "except e.HTTPError as error: print(error.code)\nexcept OSError as error: print(error)\n"
    return lab.run("laptop", f"python -c '{program}' '{url}' '{headers or {}}'").stdout


def submit(lab, name, flags=""):
    """Start a training as a job through the forwarded dashboard."""
    command = (
        f"python ray-ddpm/workflows/train.py --data heart --num-workers 2 --name {name} {SHORT_TRAINING}"
    )
    return lab.start(
        "laptop", f"RAY_AUTH_MODE=token ray job submit --address {DASHBOARD} -- {command} {flags}"
    )


def finish(process, seconds):
    output = output_of(process, seconds, "a submitted training")
    assert process.returncode == 0, output[-6000:]
    return output


def newest_checkpoint(lab, name):
    """Return the update of a run's newest checkpoint, 0 if it has none yet."""
    manifests = (lab.folder / "shared" / "ray-ddpm" / name / "checkpoints").glob("[0-9]*/manifest.json")
    return max((int(path.parent.name) for path in manifests), default=0)


def weights(lab, name):
    return load_file(lab.folder / "shared" / "ray-ddpm" / name / "model" / "model.safetensors")


def test_access_requires_the_token(pages):
    token = (pages.folder / "laptop" / "home" / ".ray" / "auth_token").read_text().strip()
    assert "401" in http_status(pages, f"{DASHBOARD}/api/jobs/")
    assert "200" in http_status(pages, f"{DASHBOARD}/api/jobs/", f'{{"Authorization": "Bearer {token}"}}')


def test_two_hosts_train_to_the_same_parameters_bit_by_bit(cluster):
    script = f"ray submit {FILE} tests/cluster/equal_parameters.py -- {SHARED}/equal"
    assert "both trained" in cluster.run("laptop", script, timeout=900).stdout
    results = [json.loads(path.read_text()) for path in (cluster.folder / "shared" / "equal").iterdir()]
    assert {each["host"] for each in results} == {"w1", "w2"}
    assert len(results) == 2 and results[0]["digest"] == results[1]["digest"]


def test_a_job_trains_on_two_hosts_and_is_logged_to_mlflow(pages):
    process = submit(pages, "uninterrupted")
    wait_for(
        lambda: newest_checkpoint(pages, "uninterrupted") or process.poll() is not None, 150, "a checkpoint"
    )
    hosts = {host for host in HOSTS if pages.processes(host, "RayTrainWorker")}
    output = finish(process, 900)
    assert hosts == {"w1", "w2"} and "sampler.onnx" in output
    assert mlflow_runs(pages, "laptop")["uninterrupted"] == ["FINISHED"]


def test_failures_do_not_change_the_result(pages):
    """Kill a raylet, MLflow's server, a machine and the driver, one after the other."""
    process = submit(pages, "interrupted")
    wait_for_checkpoint(pages, process, 0)

    before = newest_checkpoint(pages, "interrupted")
    (raylet,) = pages.processes("w1", "raylet/raylet --")
    pages.run("w1", f"kill -9 {raylet}")
    servers = pages.processes("head", "mlflow")
    pages.run("head", f"kill -9 {' '.join(map(str, servers))}")
    wait_for(lambda: not pages.processes("head", "mlflow"), 30, "the end of MLflow's server")
    pages.run("head", "python -m workflows.cluster mlflow")
    wait_for_checkpoint(pages, process, before)

    before = newest_checkpoint(pages, "interrupted")
    pages.power_off("w2")
    time.sleep(5)
    pages.power_on("w2")
    wait_for_checkpoint(pages, process, before)

    drivers = pages.processes("head", "workflows/train.py")
    pages.run("head", f"kill -9 {' '.join(map(str, drivers))}")
    output_of(process, 60, "the end of a training without its driver")
    assert process.returncode != 0 and mlflow_runs(pages, "laptop")["interrupted"] == ["RUNNING"]
    finish(submit(pages, "interrupted", "--resume"), 480)

    assert mlflow_runs(pages, "laptop")["interrupted"] == ["FINISHED"]
    expected, actual = weights(pages, "uninterrupted"), weights(pages, "interrupted")
    assert all((actual[name] == expected[name]).all() for name in expected)
    wait_for(lambda: num_nodes(pages) == 3, 120, "the killed raylet's host")


def wait_for_checkpoint(lab, process, after):
    """Wait until the run "interrupted" has a checkpoint of a later update than `after`."""
    wait_for(
        lambda: newest_checkpoint(lab, "interrupted") > after or process.poll() is not None,
        240,
        "a checkpoint",
    )
    assert process.poll() is None, process.communicate()[0][-4000:]


def test_the_mlflow_server_outlives_a_second_ray_up(cluster):
    before = cluster.processes("head", "mlflow server")
    cluster.run("laptop", f"ray up -y {FILE}", timeout=900)
    assert before and cluster.processes("head", "mlflow server") == before
    wait_for(lambda: num_nodes(cluster) == 3, 360, "three nodes")


def test_ray_down_leaves_no_ray_processes(cluster):
    cluster.run("laptop", f"ray down -y {FILE}", timeout=120)
    names = ("raylet/raylet", "gcs_server", "ray::", "dashboard")
    for host in HOSTS:
        for name in names:
            gone = partial(lambda *of: not cluster.processes(*of), host, name)
            wait_for(gone, 120, f"the end of {name} on {host}")
    cluster.run("head", "python -m workflows.cluster mlflow --stop")
    wait_for(lambda: not cluster.processes("head", "mlflow"), 20, "the end of MLflow's server")
    left = [(host, name) for host in HOSTS for name in names if cluster.processes(host, name)]
    assert not left, "and none was started since"
