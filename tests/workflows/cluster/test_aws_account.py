"""What the roles of cluster/aws-account.yaml allow: Ray's requests for its own cluster, and nothing else."""

import fnmatch
import itertools
from pathlib import Path

import pytest
import yaml

FILE = Path(__file__).parents[3] / "cluster" / "aws-account.yaml"
CLUSTER, ACCOUNT, GROUP = "ray-ddpm", "123456789012", "sg-0123456789abcdef0"
VALUES = {
    "Cluster": CLUSTER,
    "Bucket": "mine",
    "AWS::Partition": "aws",
    "AWS::AccountId": ACCOUNT,
    "Group.GroupId": GROUP,
    "Worker.Arn": f"arn:aws:iam::{ACCOUNT}:role/ray-ddpm-worker",
}
INSTANCE = f"arn:aws:ec2:us-west-2:{ACCOUNT}:instance/i-1"
OWN, OTHER = ({"ray-cluster-name": name} for name in (CLUSTER, "production"))


class Template(yaml.SafeLoader):
    """CloudFormation's YAML, with its functions computed."""


def substituted(text):
    for name, value in VALUES.items():
        text = text.replace(f"${{{name}}}", value)
    return text


Template.add_constructor("!Ref", lambda loader, node: VALUES.get(node.value, node.value))
Template.add_constructor("!GetAtt", lambda loader, node: VALUES.get(node.value, node.value))
Template.add_constructor("!Sub", lambda loader, node: substituted(node.value))


@pytest.fixture(name="resources", scope="module")
def _resources():
    return yaml.load(FILE.read_text(), Template)["Resources"]


def allows(resources, role, action, resource, context=None):
    """Whether a role may do something: AWS's rule for statements that only allow, with StringEquals."""
    properties = resources[role]["Properties"]
    documents = [policy["PolicyDocument"] for policy in properties.get("Policies", [])]
    for name in properties["ManagedPolicyArns"]:
        documents.append(resources[name]["Properties"]["PolicyDocument"])
    for statement in itertools.chain.from_iterable(document["Statement"] for document in documents):
        assert statement["Effect"] == "Allow" and set(statement.get("Condition", {})) <= {"StringEquals"}
        conditions = statement.get("Condition", {}).get("StringEquals", {})
        if (
            any(fnmatch.fnmatchcase(action, each) for each in as_list(statement["Action"]))
            and any(fnmatch.fnmatchcase(resource, each) for each in as_list(statement["Resource"]))
            and all((context or {}).get(key) == value for key, value in conditions.items())
        ):
            return True
    return False


def as_list(value):
    return value if isinstance(value, list) else [value]


def requested(tags):
    return {f"aws:RequestTag/{key}": value for key, value in tags.items()}


def tagged(tags):
    return {f"aws:ResourceTag/{key}": value for key, value in tags.items()}


def test_no_role_has_a_policy_of_everything(resources):
    for role in ("Head", "Worker"):
        assert not [
            arn for arn in resources[role]["Properties"]["ManagedPolicyArns"] if arn.startswith("arn:")
        ]
        for action in (
            "ec2:DeleteVolume",
            "ec2:AuthorizeSecurityGroupIngress",
            "iam:CreateUser",
            "s3:DeleteBucket",
        ):
            assert not allows(resources, role, action, "*")


def test_the_head_starts_machines_of_its_cluster(resources):
    """Every resource of RunInstances must be allowed, as Ray's autoscaler and spot requests make it."""
    assert allows(resources, "Head", "ec2:RunInstances", INSTANCE, requested(OWN))
    for part in (
        "volume/*",
        "network-interface/*",
        "subnet/subnet-1",
        "key-pair/ray",
        f"security-group/{GROUP}",
    ):
        arn = f"arn:aws:ec2:us-west-2:{ACCOUNT}:{part}"
        assert allows(resources, "Head", "ec2:RunInstances", arn), part
    assert allows(resources, "Head", "ec2:RunInstances", "arn:aws:ec2:us-west-2::image/ami-1")
    assert allows(resources, "Head", "ec2:CreateTags", INSTANCE, {"ec2:CreateAction": "RunInstances"})
    passed = {"iam:PassedToService": "ec2.amazonaws.com"}
    assert allows(resources, "Head", "iam:PassRole", VALUES["Worker.Arn"], passed)


@pytest.mark.parametrize("tags", [{}, OTHER])
def test_the_head_starts_and_passes_nothing_else(resources, tags):
    assert not allows(resources, "Head", "ec2:RunInstances", INSTANCE, requested(tags))
    other_group = f"arn:aws:ec2:us-west-2:{ACCOUNT}:security-group/sg-0fedcba9876543210"
    assert not allows(resources, "Head", "ec2:RunInstances", other_group)
    passed = {"iam:PassedToService": "ec2.amazonaws.com"}
    for role in ("admin", "ray-ddpm-head"):
        assert not allows(resources, "Head", "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/{role}", passed)
    assert not allows(
        resources,
        "Head",
        "iam:PassRole",
        VALUES["Worker.Arn"],
        {"iam:PassedToService": "lambda.amazonaws.com"},
    )


@pytest.mark.parametrize("action", ["TerminateInstances", "StopInstances", "StartInstances", "CreateTags"])
def test_the_head_changes_machines_of_its_cluster_only(resources, action):
    assert allows(resources, "Head", f"ec2:{action}", INSTANCE, tagged(OWN))
    for tags in ({}, OTHER):
        assert not allows(resources, "Head", f"ec2:{action}", INSTANCE, tagged(tags))
    assert not allows(resources, "Worker", f"ec2:{action}", INSTANCE, tagged(OWN))


def test_the_tag_is_the_one_that_ray_sets_at_the_start(resources):
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

    assert f"aws:RequestTag/{TAG_RAY_CLUSTER_NAME}" in FILE.read_text()
    shipped = yaml.safe_load((FILE.parents[1] / "ray_cluster.yaml").read_text())
    assert shipped["cluster_name"] == CLUSTER
    assert yaml.load(FILE.read_text(), Template)["Parameters"]["Cluster"]["Default"] == CLUSTER
