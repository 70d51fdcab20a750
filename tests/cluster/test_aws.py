"""The shipped ray_cluster.yaml on a simulated EC2, whose machines are the lab's hosts.

The tests build on each other, in this order.
"""

import contextlib
import csv
import json
import threading

import cloud
import pytest
from lab import ROOT, Lab, mlflow_runs, require_hosts, wait_for

pytestmark = pytest.mark.cluster

FILE = "ray_cluster.yaml"
# In place of `aws s3 cp`, which the hosts lack.
DOWNLOAD = (
    "import boto3, os, sys\n"
    f'for name in sys.argv[1:]: boto3.client("s3").download_file("{cloud.BUCKET}", "ray-ddpm/" + name, '
    "os.path.basename(name))"
)
# By address, in the order in which moto assigns them. w3 would be a restarted worker.
MACHINES = {"10.200.77.4": "head", "10.200.77.5": "w1", "10.200.77.6": "w2", "10.200.77.7": "w3"}
SWEEP = (
    "--data heart --num-trials 4 --workers-per-trial 2 --name first --training.num-updates 200 "
    "--training.num-evaluations 2 --metrics.num-samples 200 --metrics.num-examples 128 --sampler.num-steps 5 "
    "--network.hidden-size 16 --search.num-train-timesteps 50 100 --search.algorithm random"
)


class Cloud:
    """The lab's EC2: switches hosts on and off as it starts and terminates machines."""

    def __init__(self, lab):
        self.lab, self.states, self.failure = lab, {}, None
        self.max_workers = 0  # running at the same time
        self._process = lab.start("laptop", "exec python tests/cluster/cloud.py ~/.ssh/authorized_keys")
        self.account = json.loads(self._process.stdout.readline())
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self.lab.power_off("laptop")  # cloud.py runs there; this ends its output and so the thread
        self._thread.join(30)
        assert self.failure is None, self.failure

    def _follow(self):
        try:
            for line in self._process.stdout:
                self.states = json.loads(line)
                self.max_workers = max(self.max_workers, len(self.workers()))
                for address, state in self.states.items():
                    if state in ("pending", "running"):
                        self.lab.power_on(MACHINES[address])
                    elif state == "terminated":
                        self.lab.power_off(MACHINES[address])
        except Exception as error:
            self.failure = error

    def workers(self):
        running = [address for address, state in self.states.items() if state == "running"]
        return [address for address in running if MACHINES[address] != "head"]


@pytest.fixture(scope="module")
def aws():
    require_hosts()
    hosts = {name: address for address, name in MACHINES.items()}
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(hosts, cloud.VARIABLES))
        aws = stack.enter_context(Cloud(lab))
        project = lab.folder / "laptop" / "home" / "project"
        lab.run("laptop", f"python -m workflows.cluster init {project}")
        (project / FILE).write_text(adapted((ROOT / FILE).read_text(), aws.account))
        lab.run("laptop", "ray get-auth-token --generate >/dev/null && chmod 600 ~/.ray/auth_token")
        yield aws


def adapted(text, account):
    """Fill in a user's values, choose cheaper machines, and adapt to hosts that are not in a real EC2."""
    for shipped, value in {
        "ami-YOUR-IMAGE": account["image"],
        "sg-YOUR-GROUP": account["group"],
        "s3://YOUR-BUCKET/": f"s3://{cloud.BUCKET}/",
        "&worker_type g5.xlarge": "&worker_type m6i.large",
        "&max_workers 4": "&max_workers 2",
        "ssh_user: ubuntu": "ssh_user: root\n  ssh_private_key: ~/.ssh/id_ed25519",
        "cache_stopped_nodes: false": "use_internal_ips: true\n  cache_stopped_nodes: false",
        "idle_timeout_minutes: 10": "idle_timeout_minutes: 0.5",
        "      ImageId: *image\n": f"      ImageId: *image\n      KeyName: lab\n"
        f"      SubnetIds: [{account['subnet']}]\n",
    }.items():
        assert shipped in text, shipped
        text = text.replace(shipped, value)
    return text


def on_laptop(aws, command, timeout):
    return aws.lab.run("laptop", f"cd ~/project; {command}", timeout).stdout


@pytest.fixture(scope="module")
def cluster(aws):
    """The cloud after `ray up`: a head, and nothing else that costs money."""
    output = on_laptop(aws, f"python -m workflows.cluster check {FILE}", 60)
    assert "is in order" in output and "m6i.large" in output
    on_laptop(aws, f"ray up -y {FILE}", 480)
    assert list(aws.states.values()) == ["running"], aws.states
    return aws


@pytest.fixture(scope="module")
def swept(cluster):
    """The cluster after a sweep with two workers per trial, and the output of the sweep."""
    output = on_laptop(cluster, f"ray submit {FILE} workflows/tune.py -- {SWEEP}", 1500)
    return cluster, output


def test_workers_are_started_when_a_sweep_needs_them(swept):
    cluster, output = swept
    assert "champion: trial" in output, output
    assert cluster.failure is None and cluster.max_workers == 2
    runs = mlflow_runs(cluster.lab, "head")
    assert runs.pop("first") == ["FINISHED"] and list(runs.values()) == [["FINISHED"]] * 4, runs


def test_the_champion_is_downloaded_to_the_laptop_and_draws_samples_there(swept):
    cluster, output = swept
    on_laptop(cluster, f"python -c '{DOWNLOAD}' first/champion/sampler.onnx first/trials.csv", 60)
    command = "python -m export.sampler sampler.onnx --num-samples 50 --output samples.csv"
    on_laptop(cluster, command, 60)
    project = cluster.lab.folder / "laptop" / "home" / "project"
    rows = list(csv.reader((project / "samples.csv").read_text().splitlines()))
    assert rows[0] == ["x", "y"] and len(rows) == 51
    statuses = [row["status"] for row in csv.DictReader((project / "trials.csv").read_text().splitlines())]
    assert len(statuses) == 4 and set(statuses) <= {"finished", "stopped"}, output


def test_idle_workers_are_terminated(swept):
    cluster, _ = swept
    wait_for(lambda: not cluster.workers(), 360, "the end of idle workers")
    assert sorted(cluster.states.values()) == ["running", "terminated", "terminated"], cluster.states


def test_ray_down_leaves_nothing_that_costs_money(cluster):
    on_laptop(cluster, f"ray down -y {FILE}", 120)
    wait_for(lambda: set(cluster.states.values()) == {"terminated"}, 60, "the termination of the head")
    assert set(cluster.states.values()) == {"terminated"}, "and none was started since"
    program = "import boto3; print(len(boto3.client('ec2').describe_volumes()['Volumes']))"
    command = f'python -c "{program}"'
    wait_for(lambda: on_laptop(cluster, command, 60).strip() == "0", 20, "the end of the disks")
    assert on_laptop(cluster, command, 60).strip() == "0", "disks"
