"""A simulated AWS: moto's EC2, IAM and S3, with the resources that a user creates before `ray up`.

A program that runs on the lab's laptop: `python cloud.py PUBLIC_KEY_FILE`. It prints lines of JSON: first the
ids of the created resources, then the states of all machines by address, whenever one changes.
"""

import json
import logging
import sys
import time
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

ADDRESS, PORT = "10.200.77.1", 5566
REGION, BUCKET = "us-west-2", "lab-bucket"
VARIABLES = {
    "AWS_ENDPOINT_URL": f"http://{ADDRESS}:{PORT}",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t",
}


def make_account(public_key: bytes) -> dict[str, str]:
    """Create a network, a key, a bucket, and the resources of cluster/aws-account.yaml; return their ids."""
    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    boto3.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    vpc = ec2.create_vpc(CidrBlock="10.200.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.200.77.0/24", AvailabilityZone=f"{REGION}a")
    ec2.import_key_pair(KeyName="lab", PublicKeyMaterial=public_key)
    group = ec2.create_security_group(GroupName="lab", Description="lab", VpcId=vpc)["GroupId"]
    policy = json.dumps({"Version": "2012-10-17", "Statement": []})
    for name in ("ray-ddpm-head", "ray-ddpm-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=policy)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    images = ec2.describe_images(Filters=[{"Name": "architecture", "Values": ["x86_64"]}])["Images"]
    image = min(image["ImageId"] for image in images)
    return {"subnet": subnet["Subnet"]["SubnetId"], "group": group, "image": image}


def states() -> dict[str, str]:
    """Return the state of every machine by address, terminated ones included."""
    machine_states = {}
    for reservation in boto3.client("ec2").describe_instances()["Reservations"]:
        for machine in reservation["Instances"]:
            machine_states[machine["PrivateIpAddress"]] = machine["State"]["Name"]
    return machine_states


def main(public_key_file: str) -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    ThreadedMotoServer(ip_address=ADDRESS, port=PORT, verbose=False).start()
    print(json.dumps(make_account(Path(public_key_file).read_bytes())), flush=True)
    previous: dict[str, str] = {}
    while True:
        if (current := states()) != previous:
            print(json.dumps(current), flush=True)
            previous = current
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1])
