"""The shipped clusters pass Ray's checks and ours; a mistake in one is told in one clear line."""

import copy
import os
from pathlib import Path

import pytest
import yaml

from workflows.cluster import main
from workflows.cluster_cost import hourly_cost, read_prices
from workflows.cluster_file import prepared_by_ray, read_cluster_file

ROOT = Path(__file__).parents[2]
AWS, ON_PREM = ROOT / "ray_cluster.yaml", ROOT / "cluster" / "on-prem.yaml"


@pytest.fixture(autouse=True)
def laptop(tmp_path, monkeypatch):
    """A home folder with a token and a key, in the project's folder."""
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
    """The shipped file with a user's own values in the place of what it asks for."""
    text = path.read_text()
    for placeholder, value in {
        "ami-YOUR-IMAGE": "ami-0123456789abcdef0",
        "sg-YOUR-GROUP": "sg-0123456789abcdef0",
        "=s3://YOUR-BUCKET/": "=s3://mine/",
        "YOUR-HEAD": "10.0.0.10",
        "YOUR-WORKER-1": "10.0.0.11",
        "YOUR-WORKER-2": "10.0.0.12",
        "YOUR-USER": "me",
        "=/YOUR/SHARED/FOLDER": "=/shared/ray-ddpm",
    }.items():
        text = text.replace(placeholder, value)
    return yaml.safe_load(text)


def check(tree, folder, capsys):
    """Exit status, lines of errors, and what was printed."""
    path = folder / "cluster.yaml"
    # Through anchors one list stands in several places; a mutation must reach one of them alone.
    path.write_text(yaml.dump(copy.deepcopy(tree), Dumper=NoAliases))
    status = main(["check", str(path)])
    said = capsys.readouterr()
    return status, [line.removeprefix(f"error: {path}: ") for line in said.err.splitlines()], said.out


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


@pytest.mark.parametrize("path", [AWS, ON_PREM], ids=["aws", "on-prem"])
def test_a_shipped_file_passes_once_its_values_are_set(path, tmp_path, capsys):
    status, errors, said = check(filled(path), tmp_path, capsys)
    assert (status, errors) == (0, [])
    assert f"Next: ray up {tmp_path / 'cluster.yaml'}" in said


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (AWS, ["image", "security_group", "storage"]),
        (ON_PREM, ["head", "workers", "workers", "user", "storage"]),
    ],
    ids=["aws", "on-prem"],
)
def test_a_shipped_file_names_each_value_that_is_still_to_be_set(path, names, capsys):
    assert main(["check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("metadata.")[1].split()[0] for line in lines] == names


def aws_mutations():
    """Name of a mistake, what makes it, what its line must say."""
    head, gpu = ("available_node_types", "head"), ("available_node_types", "gpu")
    launch = (*gpu, "node_config")
    disk = (*launch, "BlockDeviceMappings", 0, "Ebs")
    start = ("head_start_ray_commands", 1)
    return {
        "typo in provider": ((("provider",), "regin", "x"), "did you mean region?"),
        "unknown key": (((), "max_worker", 3), "'max_worker' was unexpected"),
        "wrong type": (((), "max_workers", "four"), "max_workers: 'four' is not of type 'integer'"),
        "unknown head type": (((), "head_node_type", "hed"), "`head_node_type` must be one of"),
        "no node types": (((), "available_node_types", None), "available_node_types is missing"),
        "region": ((("provider",), "region", "Oregon"), "provider.region Oregon: give a region's name"),
        "zone elsewhere": (
            (("provider",), "availability_zone", "eu-west-1a"),
            "eu-west-1a is not in us-west-2",
        ),
        "stopped nodes": ((("provider",), "cache_stopped_nodes", True), "their disks go on billing"),
        "no idle timeout": (((), "idle_timeout_minutes", 0), "idle_timeout_minutes 0: give 1 or more"),
        "GPU count": (((*gpu, "resources"), "GPU", 4), "resources.GPU 4: a g5.xlarge has 1"),
        "CPU count": (((*gpu, "resources"), "CPU", 64), "resources.CPU 64: a g5.xlarge has 4"),
        "type above all": ((gpu, "max_workers", 9), "gpu.max_workers 9 is more than max_workers 4"),
        "least above most": ((gpu, "max_workers", 0), "gpu.min_workers 1 is more than its max_workers 0"),
        "trials on the head": ((head, "resources", {}), "without CPU: 0 trials run on the head"),
        "spot head": (
            ((*head, "node_config"), "InstanceMarketOptions", {"MarketType": "spot"}),
            "were the head taken away",
        ),
        "two heads": ((head, "max_workers", 1), "the head is one machine"),
        "machine's typo": ((launch, "InstanceType", "g5.xlarg"), "did you mean g5.xlarge?"),
        "unknown machine": ((launch, "InstanceType", "zz9.metal"), "add a line for it there"),
        "no image": ((launch, "ImageId", ...), "ImageId None: give an image"),
        "image's name": ((launch, "ImageId", "ubuntu"), "ImageId ubuntu: give an image"),
        "no group": ((launch, "SecurityGroupIds", ["default"]), "Ray opens SSH to the world"),
        "worker without profile": ((launch, "IamInstanceProfile", ...), "cannot reach s3://mine/ray-ddpm"),
        "head without profile": (((*head, "node_config"), "IamInstanceProfile", ...), "none would start"),
        "launch typo": ((launch, "InstanceMarketOption", {}), "did you mean InstanceMarketOptions?"),
        "spot's typo": ((launch, "InstanceMarketOptions", {"MarketType": "sport"}), "give one such as spot"),
        "disk's type": ((disk, "VolumeType", "gp33"), "VolumeType gp33 is not known to AWS"),
        "disk's size": ((disk, "VolumeSize", 8), "VolumeSize 8: give 60 or more"),
        "disk's size as text": ((disk, "VolumeSize", "150"), "'150': give a whole number"),
        "disk stays": ((disk, "DeleteOnTermination", False), "would stay, and cost"),
        "missing source": ((("file_mounts",), "~/data", "no/such"), "no/such does not exist here"),
        "no token": ((("file_mounts",), "~/.ray/auth_token", ...), "no worker can join"),
        "missing key": ((("auth",), "ssh_private_key", "~/.ssh/none"), "~/.ssh/none does not exist here"),
        "open dashboard": (
            (start, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
            "the dashboard is not bound to the machine itself",
        ),
        "no token asked for": (
            (start, "export RAY_AUTH_MODE=token;", ""),
            "lets in whoever reaches its ports",
        ),
        "no autoscaler": ((start, "--autoscaling-config=", "--x="), "no worker is ever started"),
        "worker's start": (((), "worker_start_ray_commands", ["ray stop"]), "have no `ray start`"),
        "no packages": ((("setup_commands",), 1, "true"), "do not install constraints.txt"),
        "no storage": ((("setup_commands",), 0, "true"), "set no RAY_DDPM_STORAGE"),
        "relative storage": (
            (("setup_commands",), 0, "echo 'export RAY_DDPM_STORAGE=runs' > ~/.ray-ddpm.sh"),
            "RAY_DDPM_STORAGE=runs: give s3://bucket/prefix",
        ),
    }


def mutated(tree, place, name, value):
    """Set, remove (...) or, within a text, replace what stands in a place of the tree."""
    tree = yaml.load(yaml.dump(tree, Dumper=NoAliases), yaml.SafeLoader)
    at = tree
    for step in place[:-1]:
        at = at[step]
    if place and isinstance(at[place[-1]], str):
        assert name in at[place[-1]]
        at[place[-1]] = at[place[-1]].replace(name, value)
        return tree
    at = at[place[-1]] if place else at
    if value is ...:
        del at[name]
    else:
        at[name] = value
    return tree


@pytest.mark.parametrize("mistake", aws_mutations())
def test_a_mistake_in_the_aws_file_is_told_in_one_line(mistake, tmp_path, capsys):
    change, words = aws_mutations()[mistake]
    tree = filled(AWS)
    if mistake == "least above most":
        tree["available_node_types"]["gpu"]["min_workers"] = 1
    status, errors, said = check(mutated(tree, *change), tmp_path, capsys)
    assert status == 2 and said == ""
    assert len(errors) == 1 and words in errors[0], errors


ON_PREM_MUTATIONS = {
    "newer autoscaler": (
        (("head_start_ray_commands", 1), "RAY_enable_autoscaler_v2=0", ""),
        "put export RAY_enable_autoscaler_v2=0; before ray start",
    ),
    "machine twice": ((("provider",), "worker_ips", ["10.0.0.11", "10.0.0.11"]), "10.0.0.11 twice"),
    "head as worker": ((("provider",), "worker_ips", ["10.0.0.10"]), "names the head 10.0.0.10 as well"),
    "no workers": ((("provider",), "worker_ips", []), "provider.worker_ips is missing"),
    "no head": ((("provider",), "head_ip", ...), "provider.head_ip is missing"),
    "typo": ((("provider",), "worker_ip", []), "did you mean worker_ips?"),
    "too many": (((), "max_workers", 5), "max_workers 5 is more than the 2 machines"),
    "no user": ((("auth",), "ssh_user", ...), "auth.ssh_user is missing"),
    "node types": (((), "available_node_types", {"a": {}}), "available_node_types is not supported"),
}


@pytest.mark.parametrize("mistake", ON_PREM_MUTATIONS)
def test_a_mistake_in_the_on_prem_file_is_told_in_one_line(mistake, tmp_path, capsys):
    change, words = ON_PREM_MUTATIONS[mistake]
    status, errors, _ = check(mutated(filled(ON_PREM), *change), tmp_path, capsys)
    assert status == 2
    assert len(errors) == 1 and words in errors[0], errors


def test_a_token_that_others_can_read_is_refused(laptop, tmp_path, capsys):
    (laptop / ".ray" / "auth_token").chmod(0o644)
    status, errors, _ = check(filled(AWS), tmp_path, capsys)
    assert status == 2 and errors[0].endswith("chmod 600 ~/.ray/auth_token")
    (laptop / ".ray" / "auth_token").unlink()
    _, errors, _ = check(filled(AWS), tmp_path, capsys)
    assert errors[0].endswith("make it: ray get-auth-token --generate")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "is no YAML in line"),
        ("- a", "provider.type None: give aws"),
        ("provider: {type: gcp}", "provider.type gcp: give aws"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_what_is_no_cluster_is_refused(text, words, tmp_path, capsys):
    from diffusion.errors import InputError

    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        read_cluster_file(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_bill_is_the_head_and_as_many_of_the_dearest_workers_as_there_can_be(tmp_path):
    table = tmp_path / "prices.csv"
    table.write_text(
        "# my prices\ntype,vcpus,gpus,usd_per_hour\nm6i.xlarge,4,0,1\ng5.xlarge,4,1,10\n"
        "g5.2xlarge,8,1,100\ndisk,,,0.01\naddress,,,0.5\n"
    )
    tree = mutated(filled(AWS), ("available_node_types", "gpu"), "max_workers", 3)
    dear = copy.deepcopy(tree["available_node_types"]["gpu"])
    dear["node_config"]["InstanceType"], dear["max_workers"], dear["min_workers"] = "g5.2xlarge", 2, 1
    tree["available_node_types"]["dear"] = dear
    lines = hourly_cost(prepared_by_ray(tree), read_prices(table))
    # 150 GB at 0.01 and an address at 0.5 are 2 a machine; 4 workers at most, 2 of them dear.
    most = (1 + 2) + 2 * (100 + 2) + 2 * (10 + 2)
    assert [f"{most:.2f} USD an hour" in line for line in lines] == [False] * 4 + [True] + [False] * 3
    assert f"{(1 + 2) + (100 + 2):.2f} USD an hour" in lines[-3]
    assert "my prices" in lines[-2]


def test_spot_is_one_line_away(tmp_path, capsys):
    text = AWS.read_text()
    line = next(line for line in text.splitlines() if "InstanceMarketOptions" in line)
    spot = yaml.safe_load(text.replace(line, line.replace("# ", "", 1)))["available_node_types"]["gpu"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    tree = mutated(filled(AWS), ("available_node_types",), "gpu", spot)
    for name in ("ImageId", "SecurityGroupIds"):
        tree["available_node_types"]["gpu"]["node_config"][name] = filled(AWS)["available_node_types"]["gpu"][
            "node_config"
        ][name]
    status, errors, said = check(tree, tmp_path, capsys)
    assert (status, errors) == (0, []) and "as spot usually less" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("type,usd\n", "its first line must be type,vcpus,gpus,usd_per_hour"),
        ("type,vcpus,gpus,usd_per_hour\na,1,0\n", "line 2: give a type"),
        ("type,vcpus,gpus,usd_per_hour\na,1,0,cheap\n", "line 2: give a type"),
        ("type,vcpus,gpus,usd_per_hour\na,1,0,-1\n", "line 2: give a type"),
    ],
)
def test_a_table_of_another_form_is_refused(text, words, tmp_path):
    from diffusion.errors import InputError

    (tmp_path / "prices.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_prices(tmp_path / "prices.csv")


def test_every_machine_gets_the_whole_code_and_nothing_else():
    """Each package that the wheel holds is mounted, and so is what installing it needs."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {"pyproject.toml", "constraints.txt", "cluster", "~/.ray/auth_token"}
    for path in (AWS, ON_PREM):
        mounts = yaml.safe_load(path.read_text())["file_mounts"]
        assert set(mounts.values()) == needed
        assert all(remote.endswith(local.removeprefix("~/")) for remote, local in mounts.items())
        assert not any(os.path.isabs(local) for local in mounts.values())


@pytest.mark.slow
def test_mlflow_s_server_is_started_once_and_ended_when_asked(laptop, tmp_path, monkeypatch, capsys):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    monkeypatch.setenv("RAY_DDPM_STORAGE", str(tmp_path / "shared"))
    try:
        assert main(["mlflow", "--port", port]) == 0
        number = (laptop / "mlflow" / "server.pid").read_text()
        assert main(["mlflow", "--port", port]) == 0
        assert (laptop / "mlflow" / "server.pid").read_text() == number
        said = capsys.readouterr().out.splitlines()
        assert [line.split(" on ")[0] for line in said] == ["MLflow serves", "MLflow has been serving"]
    finally:
        main(["mlflow", "--stop"])
        os.waitpid(int(number), 0)
    assert (laptop / "mlflow" / "mlflow.db").exists()
    assert main(["mlflow", "--stop"]) == 0
    assert capsys.readouterr().out.endswith("does not run here\n")


def test_without_a_cluster_no_server_is_started(monkeypatch):
    from diffusion.errors import InputError

    monkeypatch.delenv("RAY_DDPM_STORAGE", raising=False)
    with pytest.raises(InputError, match="RAY_DDPM_STORAGE is not set"):
        main(["mlflow"])
