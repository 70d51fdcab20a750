"""Tests of all modules of workflows.cluster, through its commands `check` and `mlflow`.

The shipped cluster files pass Ray's validation and ours; each mistake in one is reported in one line.
"""

import copy
import json
import os
from pathlib import Path

import pytest
import yaml

from diffusion.errors import InputError
from workflows.cluster.__main__ import main
from workflows.cluster.config_file import prepare_with_ray, read_cluster_file
from workflows.cluster.cost import hourly_cost, read_prices
from workflows.cluster.kinds import CLUSTER_KINDS
from workflows.environment import cluster_storage

ROOT = Path(__file__).parents[3]
AWS, ON_PREM = ROOT / "ray_cluster.yaml", ROOT / "cluster" / "on-prem.yaml"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder with a token and a key; the working directory is the project's folder."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ssh").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789abcdef")
    (home / ".ray" / "auth_token").chmod(0o600)
    (home / ".ssh" / "id_ed25519").touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(ROOT)
    return home


def filled(path):
    """Content of a shipped file, with its placeholders replaced by a user's values."""
    text = path.read_text()
    for placeholder, value in {
        "ami-YOUR-IMAGE": "ami-0123456789abcdef0",
        "sg-YOUR-GROUP": "sg-0123456789abcdef0",
        "s3://YOUR-BUCKET/": "s3://mine/",
        "YOUR-HEAD": "10.0.0.10",
        "YOUR-WORKER-1": "10.0.0.11",
        "YOUR-WORKER-2": "10.0.0.12",
        "YOUR-USER": "me",
        "/YOUR/SHARED/FOLDER": "/shared/ray-ddpm",
    }.items():
        text = text.replace(placeholder, value)
    return yaml.safe_load(text)


def check(tree, folder, capsys):
    """Run `check` on a tree; return the exit status, the lines of errors, and the standard output."""
    path = folder / "cluster.yaml"
    # Anchors make several keys share one list; a mutation must change only one of them.
    path.write_text(yaml.dump(copy.deepcopy(tree), Dumper=NoAliases))
    status = main(["check", str(path)])
    output = capsys.readouterr()
    return status, [line.removeprefix(f"error: {path}: ") for line in output.err.splitlines()], output.out


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


@pytest.mark.parametrize("path", [AWS, ON_PREM], ids=["aws", "on-prem"])
def test_a_shipped_file_passes_once_its_values_are_set(path, tmp_path, capsys):
    status, errors, output = check(filled(path), tmp_path, capsys)
    assert (status, errors) == (0, [])
    assert f"Next: ray up {tmp_path / 'cluster.yaml'}" in output


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (AWS, ["image", "security_group", "storage"]),
        (ON_PREM, ["head", "workers", "workers", "user", "storage"]),
    ],
    ids=["aws", "on-prem"],
)
def test_each_placeholder_of_a_shipped_file_is_reported(path, names, capsys):
    assert main(["check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("metadata.")[1].split()[0] for line in lines] == names


def aws_mutations():
    """By name of a mistake: the arguments of `mutated` that make it, and what its line must contain."""
    head, gpu = ("available_node_types", "head"), ("available_node_types", "gpu")
    launch = (*gpu, "node_config")
    disk = (*launch, "BlockDeviceMappings", 0, "Ebs")
    start = ("head_start_ray_commands", 1)
    return {
        "typo in provider": ((("provider",), "regin", "x"), "did you mean region?"),
        "unknown key": (((), "max_worker", 3), "'max_worker' was unexpected"),
        "wrong type": (
            ((), "max_workers", "four"),
            "max_workers 'four': give a whole number, without quotes",
        ),
        "unknown head type": (((), "head_node_type", "hed"), "`head_node_type` must be one of"),
        "no node types": (((), "available_node_types", None), "available_node_types is missing"),
        "region": ((("provider",), "region", "Oregon"), "provider.region Oregon: give the name of a region"),
        "zone elsewhere": (
            (("provider",), "availability_zone", "eu-west-1a"),
            "eu-west-1a is not in us-west-2",
        ),
        "stopped nodes": ((("provider",), "cache_stopped_nodes", True), "their disks would still cost money"),
        "no idle timeout": (((), "idle_timeout_minutes", 0), "idle_timeout_minutes 0: give 1 or more"),
        "GPU count": (((*gpu, "resources"), "GPU", 4), "resources.GPU 4: a g5.xlarge has 1"),
        "CPU count": (((*gpu, "resources"), "CPU", 64), "resources.CPU 64: a g5.xlarge has 4"),
        "type above all": ((gpu, "max_workers", 9), "gpu.max_workers 9 is more than max_workers 4"),
        "min above max": ((gpu, "max_workers", 0), "gpu.min_workers 1 is more than its max_workers 0"),
        "trials on the head": ((head, "resources", {}), "without CPU: 0, trials would run on the head"),
        "spot head": (
            ((*head, "node_config"), "InstanceMarketOptions", {"MarketType": "spot"}),
            "if AWS reclaimed the head",
        ),
        "two heads": ((head, "max_workers", 1), "there is only one head"),
        "machine's typo": ((launch, "InstanceType", "g5.xlarg"), "did you mean g5.xlarge?"),
        "unknown machine": ((launch, "InstanceType", "zz9.metal"), "add a line for it there"),
        "no image": ((launch, "ImageId", ...), "ImageId None: give an image"),
        "image's name": ((launch, "ImageId", "ubuntu"), "ImageId ubuntu: give an image"),
        "no group": ((launch, "SecurityGroupIds", ["default"]), "Ray opens SSH to the whole internet"),
        "worker without profile": ((launch, "IamInstanceProfile", ...), "cannot access s3://mine/ray-ddpm"),
        "head without profile": (
            ((*head, "node_config"), "IamInstanceProfile", ...),
            "no worker would start",
        ),
        "launch typo": ((launch, "InstanceMarketOption", {}), "did you mean InstanceMarketOptions?"),
        "spot's typo": ((launch, "InstanceMarketOptions", {"MarketType": "sport"}), "give one such as spot"),
        "disk's type": ((disk, "VolumeType", "gp33"), "VolumeType gp33 is not known to AWS"),
        "disk's size": ((disk, "VolumeSize", 8), "VolumeSize 8: give 60 or more"),
        "disk's size as text": ((disk, "VolumeSize", "150"), "'150': give a whole number"),
        "disk stays": ((disk, "DeleteOnTermination", False), "would remain after ray down"),
        "missing source": ((("file_mounts",), "~/data", "no/such"), "no/such does not exist here"),
        "no token": ((("file_mounts",), "~/.ray/auth_token", ...), "no worker can join"),
        "missing key": ((("auth",), "ssh_private_key", "~/.ssh/none"), "~/.ssh/none does not exist here"),
        "open dashboard": (
            (start, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
            "the dashboard can be reached from other machines",
        ),
        "no token required": (
            (start, "export RAY_AUTH_MODE=token;", ""),
            "gives access to anyone who reaches its ports",
        ),
        "no token required by workers": (
            (("worker_start_ray_commands", 1), "export RAY_AUTH_MODE=token;", ""),
            "worker_start_ray_commands: `ray start` without RAY_AUTH_MODE=token gives access",
        ),
        "no autoscaler": ((start, "--autoscaling-config=", "--x="), "Ray never starts a worker"),
        "worker's start": (((), "worker_start_ray_commands", ["ray stop"]), "do not contain `ray start`"),
        "no packages": ((("setup_commands",), 0, "true"), "do not install constraints.txt"),
        "no storage": (
            (("metadata",), "storage", ...),
            "metadata.storage is missing: give s3://bucket/prefix",
        ),
        "relative storage": ((("metadata",), "storage", "runs"), "metadata.storage runs: give s3://bucket/"),
        "no address of a database": (
            (("metadata",), "mlflow_database", "me:geheim@host/mlflow"),
            "give an address such as postgresql://USER:PASSWORD@HOST/DATABASE",
        ),
        "storage in a command": (
            (("metadata",), "storage", "echo 'export RAY_DDPM_STORAGE=s3://mine' > ~/.ray-ddpm.sh"),
            "> ~/.ray-ddpm.sh: give s3://bucket/prefix",
        ),
    }


def mutated(tree, path, name, value):
    """Return a changed copy of the tree.

    Args:
        tree: The tree.
        path: Keys that lead to a mapping, a list or a text of the tree.
        name: Key to set or to remove there; in a text, the part to replace.
        value: New value, or ... to remove the key.
    """
    tree = yaml.load(yaml.dump(tree, Dumper=NoAliases), yaml.SafeLoader)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if path and isinstance(node[path[-1]], str):
        assert name in node[path[-1]]
        node[path[-1]] = node[path[-1]].replace(name, value)
        return tree
    node = node[path[-1]] if path else node
    if value is ...:
        del node[name]
    else:
        node[name] = value
    return tree


@pytest.mark.parametrize("mistake", aws_mutations())
def test_a_mistake_in_the_aws_file_is_reported_in_one_line(mistake, tmp_path, capsys):
    change, words = aws_mutations()[mistake]
    tree = filled(AWS)
    if mistake == "min above max":
        tree["available_node_types"]["gpu"]["min_workers"] = 1
    status, errors, output = check(mutated(tree, *change), tmp_path, capsys)
    assert status == 2 and output == ""
    assert len(errors) == 1 and words in errors[0], errors


ON_PREM_MUTATIONS = {
    "newer autoscaler": (
        (("head_start_ray_commands", 1), "RAY_enable_autoscaler_v2=0", ""),
        "put export RAY_enable_autoscaler_v2=0; before ray start",
    ),
    "machine twice": ((("provider",), "worker_ips", ["10.0.0.11", "10.0.0.11"]), "10.0.0.11 twice"),
    "head as worker": ((("provider",), "worker_ips", ["10.0.0.10"]), "includes the head 10.0.0.10"),
    "no workers": ((("provider",), "worker_ips", []), "provider.worker_ips is missing"),
    "no head": ((("provider",), "head_ip", ...), "provider.head_ip is missing"),
    "typo": ((("provider",), "worker_ip", []), "did you mean worker_ips?"),
    "too many": (((), "max_workers", 5), "max_workers 5 is more than the 2 machines"),
    "no user": ((("auth",), "ssh_user", ...), "auth.ssh_user is missing"),
    "node types": (((), "available_node_types", {"a": {}}), "available_node_types is not supported"),
}


@pytest.mark.parametrize("mistake", ON_PREM_MUTATIONS)
def test_a_mistake_in_the_on_prem_file_is_reported_in_one_line(mistake, tmp_path, capsys):
    change, words = ON_PREM_MUTATIONS[mistake]
    status, errors, _ = check(mutated(filled(ON_PREM), *change), tmp_path, capsys)
    assert status == 2
    assert len(errors) == 1 and words in errors[0], errors


def test_a_token_that_others_can_read_is_refused(home, tmp_path, capsys):
    (home / ".ray" / "auth_token").chmod(0o644)
    status, errors, _ = check(filled(AWS), tmp_path, capsys)
    assert status == 2 and errors[0].endswith("chmod 600 ~/.ray/auth_token")
    (home / ".ray" / "auth_token").unlink()
    _, errors, _ = check(filled(AWS), tmp_path, capsys)
    assert errors[0].endswith("create it: ray get-auth-token --generate")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "is not valid YAML in line"),
        ("- a", "provider.type None: give aws"),
        ("provider: {type: gcp}", "provider.type gcp: give aws"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_is_no_cluster_is_refused(text, words, tmp_path):
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        read_cluster_file(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_cost_is_that_of_the_head_and_the_most_expensive_workers_allowed(tmp_path):
    table = tmp_path / "prices.csv"
    table.write_text(
        "# my prices\ntype,vcpus,gpus,usd_per_hour\nm6i.xlarge,4,0,1\ng5.xlarge,4,1,10\n"
        "g5.2xlarge,8,1,100\ndisk,,,0.01\naddress,,,0.5\n"
    )
    tree = mutated(filled(AWS), ("available_node_types", "gpu"), "max_workers", 3)
    large = copy.deepcopy(tree["available_node_types"]["gpu"])
    large["node_config"]["InstanceType"], large["max_workers"], large["min_workers"] = "g5.2xlarge", 2, 1
    tree["available_node_types"]["large"] = large
    lines = hourly_cost(prepare_with_ray(tree), read_prices(table))
    # 150 GB at 0.01 and an address at 0.5 are 2 per machine; 4 workers at most, 2 of them large.
    max_cost = (1 + 2) + 2 * (100 + 2) + 2 * (10 + 2)
    assert [f"{max_cost:.2f} USD per hour" in line for line in lines] == [False] * 4 + [True] + [False] * 3
    assert f"{(1 + 2) + (100 + 2):.2f} USD per hour" in lines[-3]
    assert "my prices" in lines[-2]


def test_uncommenting_one_line_gives_spot_machines(tmp_path, capsys):
    text = AWS.read_text()
    line = next(line for line in text.splitlines() if "InstanceMarketOptions" in line)
    spot = yaml.safe_load(text.replace(line, line.replace("# ", "", 1)))["available_node_types"]["gpu"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    tree = mutated(filled(AWS), ("available_node_types",), "gpu", spot)
    for name in ("ImageId", "SecurityGroupIds"):
        tree["available_node_types"]["gpu"]["node_config"][name] = filled(AWS)["available_node_types"]["gpu"][
            "node_config"
        ][name]
    status, errors, output = check(tree, tmp_path, capsys)
    assert (status, errors) == (0, []) and "spot usually costs less" in output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("type,usd\n", "the first line must be type,vcpus,gpus,usd_per_hour"),
        ("type,vcpus,gpus,usd_per_hour\na,1,0\n", "line 2: give a type"),
        ("type,vcpus,gpus,usd_per_hour\na,1,0,cheap\n", "line 2: give a type"),
        ("type,vcpus,gpus,usd_per_hour\na,1,0,-1\n", "line 2: give a type"),
    ],
)
def test_a_malformed_price_table_is_refused(text, words, tmp_path):
    (tmp_path / "prices.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_prices(tmp_path / "prices.csv")


def test_every_machine_gets_the_whole_code_and_nothing_else():
    """The packages in the wheel are mounted, and the files needed to install it."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"]}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {"pyproject.toml", "~/.ray/auth_token"}
    for path in (AWS, ON_PREM):
        mounts = yaml.safe_load(path.read_text())["file_mounts"]
        assert set(mounts.values()) == needed
        assert all(remote.endswith(local.removeprefix("~/")) for remote, local in mounts.items())
        assert not any(os.path.isabs(local) for local in mounts.values())


@pytest.mark.slow
def test_the_mlflow_server_is_started_once_and_stopped_on_request(home, tmp_path, monkeypatch, capsys):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    monkeypatch.setenv("RAY_DDPM_STORAGE", str(tmp_path / "shared"))
    try:
        assert main(["mlflow", "--port", port]) == 0
        pid = (home / "mlflow" / "server.pid").read_text()
        assert main(["mlflow", "--port", port]) == 0
        assert (home / "mlflow" / "server.pid").read_text() == pid
        lines = capsys.readouterr().out.splitlines()
        expected = ["MLflow's server started", "MLflow's server is already running"]
        assert [line.split(" on ")[0] for line in lines] == expected
    finally:
        main(["mlflow", "--stop"])
        os.waitpid(int(pid), 0)
    assert (home / "mlflow" / "mlflow.db").exists()
    assert main(["mlflow", "--stop"]) == 0
    assert capsys.readouterr().out.endswith("is not running here\n")


def test_without_a_cluster_no_server_is_started(monkeypatch):
    monkeypatch.delenv("RAY_DDPM_STORAGE", raising=False)
    with pytest.raises(InputError, match="RAY_DDPM_STORAGE is not set"):
        main(["mlflow"])


@pytest.mark.parametrize(
    ("path", "storage"), [(AWS, "s3://mine/ray-ddpm"), (ON_PREM, "/shared/ray-ddpm")], ids=["aws", "on-prem"]
)
def test_the_head_reads_the_storage_from_what_ray_leaves_there(path, storage, tmp_path, monkeypatch):
    """Ray writes the file, with its defaults filled in, to the head node as JSON."""
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(prepare_with_ray(filled(path))))
    monkeypatch.setenv("RAY_DDPM_CLUSTER_CONFIG", str(tmp_path / "ray_bootstrap_config.yaml"))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.delenv("RAY_DDPM_STORAGE", raising=False)
    assert cluster_storage() == storage
    monkeypatch.setenv("RAY_DDPM_STORAGE", "/elsewhere")
    assert cluster_storage() == "/elsewhere"
    monkeypatch.delenv("RAY_DDPM_STORAGE")
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster_storage() is None


@pytest.fixture(name="google_cloud")
def _google_cloud(monkeypatch):
    """A cluster's YAML for a kind that another package adds, tests/plugin."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "plugin")
    monkeypatch.setattr(CLUSTER_KINDS, "_loaded", {})
    tree = filled(AWS)
    tree["provider"] = {
        "type": "gcp",
        "region": "us-west1",
        "availability_zone": "us-west1-a",
        "project_id": "me",
    }
    for node in tree["available_node_types"].values():
        node["node_config"] = {"machineType": "n1-standard-8"}
    return tree


def test_a_cluster_kind_of_another_package_is_checked(google_cloud, tmp_path, capsys):
    assert check(google_cloud, tmp_path, capsys)[:2] == (0, [])
    google_cloud["provider"]["regoin"] = "us-west1"
    next(iter(google_cloud["available_node_types"].values()))["node_config"] = {}
    status, lines, _ = check(google_cloud, tmp_path, capsys)
    assert status == 2 and len(lines) == 2
    assert "provider.regoin is not known" in lines[0] and "did you mean region?" in lines[0]
    assert "machineType is missing" in lines[1]
    del google_cloud["provider"]["project_id"]
    assert check(google_cloud, tmp_path, capsys)[1] == [
        "provider.project_id is missing: give the id of your project"
    ]
